"""Run a strategy on the data of a task."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from ltsm_jax import storage, training, trees
from ltsm_jax.layers.masks import apply_masks, place
from ltsm_jax.methods import lora, tracking
from ltsm_jax.methods.binding import model_facts
from ltsm_jax.methods.phases import Phase, l2_sp_penalty, mixed_out, trainable_mask, with_anchor
from ltsm_jax.methods.starts import prepared, start_params
from ltsm_jax.methods.strategies import Strategy
from ltsm_jax.models import Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Task
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.training import compiling
from ltsm_jax.trees import Params

FORECASTING = Forecasting()


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Result of a run of a strategy.

    Attributes:
      model: what `params` belong to: the model that was tuned, with further scales where the
        strategy adds them.
      params: the weights that validated best in the last phase (the start where there is no phase).
      val, test: metrics of these weights, see `evaluate` of the task; test is None on request.
      history: one dict per epoch: phase, epoch (counted through all phases), lr, train_loss,
        val_mse, ...
      epochs: epochs trained, all phases.
      best_epoch: the one `params` are from, counted like `epochs`; 0 without training.
      seconds: training and validation, all launches together, without compilation.
      compile_seconds: those that they waited for the compiler: nearly none for whoever comes
        second.
      trained: parameters that were trainable in the last phase.
      warnings: what a user should look at, in words.
      mixes: of a strategy that mixes tuned weights with the checkpoint: validation metrics by the
        weight of the tuned side. The best of them is `weight`, and `params` are that mix.
      start_curvature: of the weights that the first phase starts from, where epoch 0 was asked for.
    """

    strategy: Strategy
    model: Model
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
    mixes: dict[float, dict[str, Any]] = dataclasses.field(default_factory=dict)
    weight: float | None = None
    start_curvature: dict[str, float] | None = None


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
    test_each_epoch: bool = False,
    curvature_at: Collection[int] = (),
) -> RunResult:
    """Fine-tune `model` from `params` by `strategy`, validate after every epoch, score the best
    weights.

    Args:
      params: pretrained weights; not modified.
      data: what the task works on: for forecasting `Splits` from `data.prepare`, of which
        validation and test are scored at their horizon, by roll-out where it is longer than the
        model's own.
      task: says what the windows, the loss and the scores are; with its options, see
        `tasks.forecasting.Forecasting`.
      seed: gives the random model, the data order and the dropout, each under its own key.
      config: what it leaves out is the model's recipe; its seed, where it says one, must be the
        same.
      folder: where checkpoints go; a run that was killed continues from there. One of another
        model, of other weights or of other data is refused.
      test: score the test part as well.
      label, show_progress: of the progress bar; the label is part of what a run folder must agree
        with.
      masks: of a pruned model, see `methods.pruning`: training starts from the masked weights
        (masked after a strategy has mixed in random ones), and what is masked stays 0.
      quirks: "no-dropout": all dropout rates are 0, as the release of Prune-then-Finetune has it
        for pruned models, and for them alone.
      test_each_epoch: score the test part after every epoch too; the scores stand in the history
        under "test_<name>", and select nothing.
      curvature_at: epochs, counted through all phases, after which the curvature of the task's loss
        is measured, see `tracking.Tracker.measure`: it stands in the history under top_eigenvalue,
          trace and sharpness. 0: of the start,
        see `RunResult.start_curvature`. With averages of weights, of the average.
    Raises: ValueError where model, data, masks and task do not go together, and for an unknown
      quirk; training.NonFiniteError from training.
    """
    running = Running(
        model=model,
        params=params,
        strategy=strategy,
        data=data,
        task=task,
        seed=seed,
        config=config,
        folder=folder,
        label=label,
        show_progress=show_progress,
        masks=masks,
        quirks=quirks,
        test_each_epoch=test_each_epoch,
        curvature_at=curvature_at,
    )
    while not running.trained_out:
        running.take(training.fit(**running.job()))
    return running.result(test=test)


class Running:
    """A run of a strategy, phase by phase: `job` says what `training.fit` is to do next, `take`
    takes what it gave.

    `run` does one after the other; several runs can also take their steps together, see
    `methods.sweep`.

    Args: as for `run`.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        strategy: Strategy,
        data: Any,
        *,
        task: Task = FORECASTING,
        seed: int = 0,
        config: training.TrainConfig | None = None,
        folder: str | Path | None = None,
        label: str | None = None,
        show_progress: bool = True,
        masks: Params | None = None,
        quirks: Collection[str] = (),
        test_each_epoch: bool = False,
        curvature_at: Collection[int] = (),
    ):
        if unknown := set(quirks) - {"no-dropout"}:
            raise ValueError(f"unknown quirks {sorted(unknown)}; there is no-dropout")
        if strategy.multiscale is not None and masks is not None:
            raise ValueError(
                f"{strategy.name} adds parameters that a pruned model has no masks for: take out "
                "what is pruned first (remove), and tune the smaller model without masks"
            )
        self.keys = training.keys(seed)
        model, params = prepared(strategy, model, params, aux_key=self.keys["aux"])
        self.model, self.strategy, self.data, self.task = model, strategy, data, task
        self.folder, self.show_progress, self.test_each_epoch = (
            folder,
            show_progress,
            test_each_epoch,
        )
        self.label = strategy.name if label is None else label
        self.config = (config or training.TrainConfig()).filled(model.recipe(), seed=seed)
        if self.config.accumulate == "auto" and not model.rows_apart:
            self.config = dataclasses.replace(self.config, accumulate=1)
        self.placement = Placement.of(params)
        self.windows = task.windows(model, data)
        self.loss = task.loss(without_dropout(model) if "no-dropout" in quirks else model)
        self.checkpoint = params
        self.current = start_params(strategy, model, params, aux_key=self.keys["aux"])
        self.masks = masks
        if masks is not None:
            self.masks = place(masks, self.current, self.placement)
            self.current = apply_masks(self.current, self.masks, self.placement)

        # Every phase has the run's seed: the last phase of lpff sees the batches and dropout that
        # ff sees.
        self.facts: dict[str, Any] = {"strategy": strategy.record()}
        if folder is not None:  # digests take a moment, and only a folder needs them
            self.facts |= model_facts(model, params) | task.facts(data)
        if quirks:
            self.facts["quirks"] = sorted(quirks)
        if masks is not None:
            self.facts["masks"] = storage.sha256_of(masks)
        if odd := [epoch for epoch in curvature_at if epoch < 0]:
            raise ValueError(
                f"curvature_at lists epochs, 0 for the start; got {', '.join(map(str, odd))}"
            )
        self.curvature_at = frozenset(curvature_at)
        self.start_curvature: dict[str, float] | None = None
        self.phase = 0  # the next one
        self.whole: Callable[[Params], Params] = (
            itself  # weights of the model, of what the phase trains
        )
        self.history: list[dict[str, Any]] = []
        self.val: dict[str, Any] | None = None
        self.epochs = self.best_epoch = self.trained = 0
        self.seconds = self.compile_seconds = 0.0

    @property
    def trained_out(self) -> bool:
        """Whether no phase is left."""
        return self.phase == len(self.strategy.phases)

    def validate(self, candidate: Params) -> dict[str, Any]:
        """Score weights of the model on the validation part."""
        return self.task.evaluate(
            self.model, candidate, self.data, part="val", placement=self.placement
        )

    def watch(self, candidate: Params, epoch: int) -> dict[str, Any]:
        """Give what the history has of an epoch beside its validation: test scores and curvature,
        as asked for.
        """
        found = self.test_scores(candidate) if self.test_each_epoch else {}
        if epoch in self.curvature_at:
            found |= self.tracker.measure(candidate)
        return found

    @functools.cached_property
    def tracker(self) -> tracking.Tracker:
        """Measure of curvature, of the task's own loss without the terms that a strategy adds."""
        return tracking.tracker(self.loss, self.windows, self.placement)

    def test_scores(self, candidate: Params) -> dict[str, Any]:
        """Score weights of the model on the test part, under the names that its scores have in the
        history.
        """
        scores = self.task.evaluate(
            self.model, candidate, self.data, part="test", placement=self.placement
        )
        return {
            f"test_{name}": value.item() if hasattr(value, "item") else value
            for name, value in scores.items()
        }

    def job(self) -> dict[str, Any]:
        """Arguments of `training.fit` for the next phase."""
        i, phase = self.phase, self.strategy.phases[self.phase]
        begin, mask = self.current, trainable_mask(phase, self.model, self.current)
        phase_loss = self.loss_of(phase)
        self.whole = itself
        if (adapters := phase.adapters(self.model)) is not None:
            key = jax.random.fold_in(self.keys["aux"], 2 + i)
            begin, mask, phase_loss, self.whole = lora.beside(
                self.model, self.current, phase_loss, config=adapters, key=key
            )
        # Partial: the reference weights reach the compiled step as arguments instead of as
        # constants
        penalty = (
            jax.tree_util.Partial(l2_sp_penalty, self.current, phase.l2_sp) if phase.l2_sp else None
        )
        self.trained = trees.count(begin if mask is None else trees.partition(begin, mask)[0])
        if i == 0 and 0 in self.curvature_at:
            self.start_curvature = self.tracker.measure(self.current)
        whole, several, before = self.whole, len(self.strategy.phases) > 1, self.epochs

        def watch(candidate: Params, epoch: int) -> dict[str, Any]:
            return self.watch(whole(candidate), before + epoch)

        return {
            "loss_fn": phase_loss,
            "params": begin,
            "train_source": self.windows,
            "config": dataclasses.replace(self.config, **phase.changes()),
            "validate": lambda candidate: self.validate(whole(candidate)),
            "watch": watch if self.test_each_epoch or self.curvature_at else None,
            "select": self.task.selects,
            "trainable": mask,
            "penalty": penalty,
            "folder": None if self.folder is None else Path(self.folder) / f"phase-{i}",
            "label": f"{self.label}, phase {i + 1} of {len(self.strategy.phases)}"
            if several
            else self.label,
            "facts": self.facts
            | {"phase": i}
            | ({} if adapters is None else {"adapters": dataclasses.asdict(adapters)}),
            "show_progress": self.show_progress,
        }

    def loss_of(self, phase: Phase) -> Callable[..., jax.Array]:
        """Give the loss that a phase minimises, a function of weights of the model."""
        loss = self.loss
        if phase.anchor:
            loss = with_anchor(loss, self.model, self.checkpoint, weight=phase.anchor)
        if self.masks is not None:
            loss = jax.tree_util.Partial(_masked_loss, jax.tree_util.Partial(loss), self.masks)
        if phase.mixout:
            loss = mixed_out(loss, self.current, phase.mixout)
        return loss

    def take(self, fitted: training.FitResult) -> None:
        """Go on from what `training.fit` gave for the last `job`."""
        self.history += [
            h | {"phase": self.phase, "epoch": self.epochs + h["epoch"]} for h in fitted.history
        ]
        assert fitted.best_epoch is not None, "there is a validation after every epoch"
        self.best_epoch = self.epochs + fitted.best_epoch
        best = fitted.history[fitted.best_epoch - 1]  # the weights that are kept were scored there
        self.val = {
            name.removeprefix("val_"): x for name, x in best.items() if name.startswith("val_")
        }
        self.epochs += len(fitted.history)
        self.seconds += fitted.seconds
        self.compile_seconds += fitted.compile_seconds
        self.current = self.whole(fitted.params)
        self.phase += 1
        if not self.trained_out and (mix := self.strategy.phases[self.phase].mix) is not None:
            self.current = start_params(
                Strategy("mix", mix), self.model, self.current, aux_key=self.keys["aux"]
            )
        if self.masks is not None:
            self.current = apply_masks(self.current, self.masks, self.placement)

    def result(self, *, test: bool = True) -> RunResult:
        """Score the weights that validated best. test: on the test part, too."""
        began = time.monotonic()
        with compiling.measured() as waited:
            val = self.validate(self.current) if self.val is None else self.val
            if not self.strategy.phases and 0 in self.curvature_at:
                self.start_curvature = self.tracker.measure(self.current)
            mixes, weight = {}, None
            if self.strategy.wise:
                mixes, weight, val = self.mix(val)
            scores = (
                self.task.evaluate(
                    self.model, self.current, self.data, part="test", placement=self.placement
                )
                if test
                else None
            )
        seconds, compile_seconds = self.seconds, self.compile_seconds
        if not self.strategy.phases:
            compile_seconds = waited.seconds
            seconds = time.monotonic() - began - compile_seconds
        return RunResult(
            strategy=self.strategy,
            model=self.model,
            params=self.current,
            val=val,
            test=scores,
            history=self.history,
            epochs=self.epochs,
            best_epoch=self.best_epoch,
            seconds=seconds,
            trained=self.trained,
            warnings=self.task.warnings(
                self.model, self.current, self.data, placement=self.placement
            ),
            compile_seconds=compile_seconds,
            mixes=mixes,
            weight=weight,
            start_curvature=self.start_curvature,
        )

    def mix(self, val: dict[str, Any]) -> tuple[dict[float, dict[str, Any]], float, dict[str, Any]]:
        """Put the best mix of tuned weights and checkpoint in the place of the tuned weights, see
        `Strategy.wise`.

        val: of the tuned weights.
        Returns: metrics of each mix, the weight of the best, and its metrics; where equal, the
        largest weight.
        """
        checkpoint, tuned = self.checkpoint, self.current
        if self.masks is not None:
            checkpoint = apply_masks(checkpoint, self.masks, self.placement)

        found: dict[float, dict[str, Any]] = {}
        chosen, lowest = None, math.inf
        for weight in sorted(self.strategy.wise, reverse=True):
            mixed = (
                tuned
                if weight == 1
                else trees.wise_ft(checkpoint, tuned, weight, skip=self.model.fixed)
            )
            found[weight] = val if weight == 1 else self.validate(mixed)
            if found[weight][self.task.selects] < lowest:
                chosen, lowest = weight, found[weight][self.task.selects]
                self.current = mixed
        if chosen is None:
            raise training.NonFiniteError(
                f"no mix of tuned weights and checkpoint has a finite error: {found}"
            )
        return found, chosen, found[chosen]


def _masked_loss(loss, masks, params, batch, key, train):
    return loss(apply_masks(params, masks), batch, key, train)


def itself(params: Params) -> Params:
    """Give `params` back: weights that a phase trains as they are."""
    return params


def without_dropout(model: Model) -> Model:
    """The model with every dropout rate of its config at 0."""

    def still(config):
        rates = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        inner = {
            name: still(value) for name, value in rates.items() if dataclasses.is_dataclass(value)
        }
        return dataclasses.replace(
            config, **inner, **{name: 0.0 for name in rates if "dropout" in name}
        )

    return dataclasses.replace(model, config=still(model.config))
