"""Run a strategy on the data of a task."""

import dataclasses
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from ltsm_jax import storage, training, trees
from ltsm_jax.layers.masks import merge, place
from ltsm_jax.methods import lora
from ltsm_jax.methods.binding import model_facts
from ltsm_jax.methods.starts import start_params
from ltsm_jax.methods.strategies import Strategy, l2_sp_penalty, trainable_mask
from ltsm_jax.models import Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Task
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.training import compiling

Params = Any
FORECASTING = Forecasting()


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a run of a strategy.

    Attributes:
      params: the weights that validated best in the last phase (the start where there is no phase).
      val, test: metrics of these weights, see `evaluate` of the task; test is None on request.
      history: one dict per epoch: phase, epoch (counted through all phases), lr, train_loss, val_mse, ...
      epochs: epochs trained, all phases.
      best_epoch: the one `params` are from, counted like `epochs`; 0 without training.
      seconds: training and validation, all launches together, without compilation.
      compile_seconds: those that they waited for the compiler: nearly none for whoever comes second.
      trained: parameters that were trainable in the last phase.
      warnings: what a user should look at, in words.
    """

    strategy: Strategy
    params: Params
    val: dict[str, Any]
    test: dict[str, Any] | None
    history: list[dict[str, Any]]
    epochs: int
    best_epoch: int
    seconds: float
    trained: int
    warnings: tuple[str, ...] = ()
    compile_seconds: float = 0.0


def run(
    model: Model,
    params: Params,
    strategy: Strategy,
    data: Any,
    *,
    task: Task = FORECASTING,
    seed: int = 0,
    config: training.TrainConfig | None = None,
    folder: str | Path | None = None,
    test: bool = True,
    label: str | None = None,
    show_progress: bool = True,
    masks: Params | None = None,
    quirks: Collection[str] = (),
) -> Result:
    """Fine-tune `model` from `params` by `strategy`, validate after every epoch, score the best weights.

    Args:
      params: pretrained weights; not modified.
      data: what the task works on: for forecasting `Splits` from `data.prepare`, of which validation and test are
        scored at their horizon, by roll-out where it is longer than the model's own.
      task: says what the windows, the loss and the scores are; with its options, see `tasks.forecasting.Forecasting`.
      seed: gives the random model, the data order and the dropout, each under its own key.
      config: what it leaves out is the model's recipe; its seed, where it says one, must be the same.
      folder: where checkpoints go; a run that was killed continues from there. One of another model, of other weights
        or of other data is refused.
      test: score the test part as well.
      label, show_progress: of the progress bar; the label is part of what a run folder must agree with.
      masks: of a pruned model, see `methods.pruning`: training starts from the masked weights (masked after a strategy
        has mixed in random ones), and what is masked stays 0.
      quirks: "no-dropout": all dropout rates are 0, as the release of Prune-then-Finetune has it for pruned models, and
        for them alone.
    Raises: ValueError where model, data, masks and task do not go together, and for an unknown quirk;
      training.NonFiniteError from training.
    """
    if unknown := set(quirks) - {"no-dropout"}:
        raise ValueError(f"unknown quirks {sorted(unknown)}; there is no-dropout")
    label = strategy.name if label is None else label
    config = (config or training.TrainConfig()).filled(model.recipe(), seed=seed)
    keys = training.keys(seed)
    placement = Placement.of(params)
    windows = task.windows(model, data)
    loss = task.loss(without_dropout(model) if "no-dropout" in quirks else model)
    current = start_params(strategy, model, params, keys["aux"])
    if masks is not None:
        masks = place(masks, current, placement)
        current = merge(current, masks, placement)
        loss = jax.tree_util.Partial(_masked_loss, jax.tree_util.Partial(loss), masks)

    def validate(candidate: Params) -> dict[str, Any]:
        return task.evaluate(model, candidate, data, "val", placement)

    # Every phase has the run's seed: the last phase of lpff sees the batches and dropout that ff sees.
    facts: dict[str, Any] = {"strategy": dataclasses.asdict(strategy)}
    if folder is not None:  # digests take a moment, and only a folder needs them
        facts |= model_facts(model, params) | task.facts(data)
    if quirks:
        facts["quirks"] = sorted(quirks)
    if masks is not None:
        facts["masks"] = storage.sha256_of(masks)
    history: list[dict[str, Any]] = []
    val: dict[str, Any] | None = None
    epochs = best_epoch = trained = 0
    seconds = compile_seconds = 0.0
    for i, phase in enumerate(strategy.phases):
        changes = {name: getattr(phase, name) for name in ("epochs", "lr") if getattr(phase, name) is not None}
        begin, mask, phase_loss, whole = current, trainable_mask(phase, model, current), loss, _itself
        if (adapters := phase.adapters(model)) is not None:
            key = jax.random.fold_in(keys["aux"], 2 + i)
            begin, mask, phase_loss, whole = lora.beside(model, current, loss, adapters, key)
        # Partial: the reference weights reach the compiled step as arguments instead of as constants
        penalty = jax.tree_util.Partial(l2_sp_penalty, current, phase.l2_sp) if phase.l2_sp else None
        fitted = training.fit(
            phase_loss,
            begin,
            windows,
            config=dataclasses.replace(config, **changes),
            validate=lambda candidate, whole=whole: validate(whole(candidate)),
            select=task.selects,
            trainable=mask,
            penalty=penalty,
            folder=None if folder is None else Path(folder) / f"phase-{i}",
            label=label if len(strategy.phases) == 1 else f"{label}, phase {i + 1} of {len(strategy.phases)}",
            facts=facts | {"phase": i} | ({} if adapters is None else {"adapters": dataclasses.asdict(adapters)}),
            show_progress=show_progress,
        )
        history += [h | {"phase": i, "epoch": epochs + h["epoch"]} for h in fitted.history]
        assert fitted.best_epoch is not None, "there is a validation after every epoch"
        best_epoch = epochs + fitted.best_epoch
        best = fitted.history[fitted.best_epoch - 1]  # the weights that are kept were scored there
        val = {name.removeprefix("val_"): x for name, x in best.items() if name.startswith("val_")}
        epochs += len(fitted.history)
        seconds += fitted.seconds
        compile_seconds += fitted.compile_seconds
        current = whole(fitted.params)
        if masks is not None:
            current = merge(current, masks, placement)
        trained = trees.count(begin if mask is None else trees.partition(begin, mask)[0])

    began = time.monotonic()
    with compiling.measured() as waited:
        val = validate(current) if val is None else val
        scores = task.evaluate(model, current, data, "test", placement) if test else None
    if not strategy.phases:
        compile_seconds = waited.seconds
        seconds = time.monotonic() - began - compile_seconds
    found = task.warnings(model, current, data, placement)
    return Result(
        strategy,
        current,
        val,
        scores,
        history,
        epochs,
        best_epoch,
        seconds,
        trained,
        found,
        compile_seconds,
    )


def _masked_loss(loss, masks, params, batch, key, train):
    return loss(merge(params, masks), batch, key, train)


def _itself(params: Params) -> Params:
    return params


def without_dropout(model: Model) -> Model:
    """The model with every dropout rate of its config at 0."""

    def still(config):
        rates = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        inner = {name: still(value) for name, value in rates.items() if dataclasses.is_dataclass(value)}
        return dataclasses.replace(config, **inner, **{name: 0.0 for name in rates if "dropout" in name})

    return dataclasses.replace(model, config=still(model.config))
