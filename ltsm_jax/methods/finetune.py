"""Run a strategy on the splits of a series, and say honestly what it gained."""

import dataclasses
import functools
import time
import warnings as python_warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from ltsm_jax import sharding, storage, training, trees
from ltsm_jax.data import Series, Splits, Windows, prepare
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.data.splits import Scaler, few_shot_indices
from ltsm_jax.data.tables import read_series
from ltsm_jax.data.windows import windows_between
from ltsm_jax.layers.masks import merge, place
from ltsm_jax.methods import lora
from ltsm_jax.methods.strategies import Strategy, l2_sp_penalty, start_params, strategy, trainable_mask
from ltsm_jax.models import Forecast, Model
from ltsm_jax.tasks import forecasting

Params = Any
Mode = Literal["ims", "direct"]
MODES = ("ims", "direct")
LOSS: dict[Mode, Literal["own", "point"]] = {
    "ims": "own",
    "direct": "point",
}  # the words of the task for the two training losses
COLLAPSED = 0.01  # a forecast that varies less than this share of what it should follow is a flat line


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run of a strategy gave.

    Attributes:
      params: the weights with the lowest validation MSE of the last phase (the start where there is no phase).
      val, test: metrics of these weights in scaled units, see `tasks.forecasting.evaluate`; test is None on request.
      history: one dict per epoch: phase, epoch (counted through all phases), lr, train_loss, val_mse, ...
      epochs: epochs trained, all phases.
      best_epoch: the one `params` are from, counted like `epochs`; 0 without training.
      seconds: training and validation, all launches together.
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


def run(
    model: Model,
    params: Params,
    strategy: Strategy,
    splits: Splits,
    *,
    seed: int = 0,
    config: training.TrainConfig | None = None,
    mode: Mode = "ims",
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
      splits: from `data.prepare`; validation and test are scored at its horizon, by roll-out where it is longer than
        the model's own.
      seed: gives the random model, the data order and the dropout, each under its own key.
      config: by default `train_config(model)`.
      mode: "ims": the model's own loss (Timer: every next token), on windows of the model's own horizon.
        "direct": MSE of the forecast at the horizon of `splits`.
      folder: where checkpoints go; a run that was killed continues from there.
      test: score the test part as well.
      label, show_progress: of the progress bar; the label is part of what a run folder must agree with.
      masks: of a pruned model, see `methods.pruning`: training starts from the masked weights (masked after a strategy
        has mixed in random ones), and what is masked stays 0.
      quirks: "no-dropout": all dropout rates are 0, as the release of Prune-then-Finetune has it for pruned models, and
        for them alone.
    Raises: ValueError where model, windows, masks and mode do not go together, and for an unknown quirk;
      training.NonFiniteError from training.
    """
    if unknown := set(quirks) - {"no-dropout"}:
        raise ValueError(f"unknown quirks {sorted(unknown)}; there is no-dropout")
    label = strategy.name if label is None else label
    config = dataclasses.replace(config or train_config(model), seed=seed)
    keys = training.keys(seed)
    windows = training_windows(model, splits, mode)
    loss = _loss(without_dropout(model) if "no-dropout" in quirks else model, mode)
    current = start_params(strategy, model, params, keys["aux"])
    if masks is not None:
        masks = place(masks, current)
        current = merge(current, masks)
        loss = jax.tree_util.Partial(_masked_loss, jax.tree_util.Partial(loss), masks)

    def validate(candidate: Params) -> dict[str, Any]:
        return forecasting.evaluate(model, candidate, splits.val)

    # Every phase has the run's seed: the last phase of lpff sees the batches and dropout that ff sees.
    facts = {"strategy": dataclasses.asdict(strategy), "mode": mode, "horizon": splits.val.horizon}
    facts |= {"quirks": sorted(quirks)} if quirks else {}
    facts |= {} if masks is None else {"masks": storage.sha256_of(masks)}
    history: list[dict[str, Any]] = []
    val: dict[str, Any] | None = None
    epochs = best_epoch = trained = 0
    seconds = 0.0
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
        current = whole(fitted.params) if masks is None else merge(whole(fitted.params), masks)
        trained = trees.count(begin if mask is None else trees.partition(begin, mask)[0])

    began = time.monotonic()
    val = validate(current) if val is None else val
    scores = forecasting.evaluate(model, current, splits.test) if test else None
    if not strategy.phases:
        seconds = time.monotonic() - began
    found = collapse(model, current, splits.val)
    return Result(strategy, current, val, scores, history, epochs, best_epoch, seconds, trained, found)


@functools.cache
def _loss(model: Model, mode: Mode):
    # methods of two equal models are not equal: without this each load of a checkpoint compiles the step again
    return forecasting.loss_fn(model, LOSS[mode])


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


def train_config(model: Model, **changes: Any) -> training.TrainConfig:
    """The model's own fine-tuning recipe as a `TrainConfig`, with `changes`."""
    recipe = model.recipe()
    fields = ("epochs", "batch_size", "lr", "schedule", "weight_decay", "clip")
    defaults = {name: getattr(recipe, name) for name in fields}
    return training.TrainConfig(**(defaults | changes))


def training_windows(model: Model, splits: Splits, mode: Mode) -> Windows:
    """The training windows of `splits`, with the target length that the loss of `mode` wants.

    The next-token loss needs targets of the model's own horizon whatever horizon is scored; longer ones would only cost
    windows, shorter ones do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    have = splits.train
    if mode == "direct" or have.horizon == model.horizon:
        return have
    facts = {"columns": have.columns, "timestamps": have.timestamps}
    full = windows_between(
        have.values, *splits.borders.train, have.context_len, model.horizon, joint=have.joint, **facts
    )
    return full if splits.few_shot == 1 else full.take(few_shot_indices(full.n, splits.few_shot, splits.quirks))


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _forecast(
    model: Model, params: Params, windows: Windows, indices: jax.Array, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch = windows.gather(indices)
    point = model.predict(params, batch["context"], windows.horizon).point
    return sharding.everywhere((batch["context"], batch["target"], point), mesh)


def forecast_windows(model: Model, params: Params, windows: Windows, indices: np.ndarray) -> tuple[np.ndarray, ...]:
    """(context [B, C, L], target [B, C, H], point forecast [B, C, H]) of windows number `indices` [B], float64."""
    mesh = sharding.mesh_of(params)
    found = _forecast(model, params, windows.over(mesh), np.asarray(indices, np.int32), mesh)
    return tuple(sharding.on_host(x).astype(np.float64) for x in found)


def collapse(model: Model, params: Params, windows: Windows, sample: int = 256) -> tuple[str, ...]:
    """Warns of forecasts that are flat lines although what they should follow moves.

    Compares the variance inside the forecasts with that inside their targets, over `sample` windows spread evenly.
    """
    indices = np.linspace(0, windows.n - 1, min(sample, windows.n)).astype(np.int32)
    _, target, point = forecast_windows(model, params, windows, indices)
    got, expected = float(point.var(axis=-1).mean()), float(target.var(axis=-1).mean())
    if windows.horizon == 1 or got >= COLLAPSED * expected:
        return ()
    share = got / expected
    return (f"collapsed: forecasts vary {share:.2%} as much as the data, nearly flat lines; lower lr or start closer",)


# ---------------------------------------------------------------------------------------------------------------------
# one call for notebooks


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` returns; print it.

    Attributes:
      params: the weights to use: the tuned ones, or the pretrained ones where tuning lost (`kept` says which).
      kept: "tuned" or "zero_shot".
      zero_shot, tuned: validation metrics before and after, scaled units.
      difference: mean of (tuned - zero-shot) MSE over the same validation windows; below zero is a gain.
      interval: about 95 % around it, from means over blocks of windows that share no target; NaN under two blocks.
      result: the whole run (`result.params` are the tuned weights in any case). splits: what it ran on.
      model: what `params` belong to: the model given to `fit`, made ready for the data where it needed that.
    """

    params: Params
    kept: Literal["tuned", "zero_shot"]
    zero_shot: dict[str, Any]
    tuned: dict[str, Any]
    difference: float
    interval: tuple[float, float]
    result: Result
    splits: Splits
    model: Model

    def __str__(self) -> str:
        before, after = self.zero_shot["mse"], self.tuned["mse"]
        lines = [
            f"{self.result.strategy.name}: validation MSE {before:.4f} zero-shot, {after:.4f} tuned "
            f"({100 * (after / before - 1):+.2f} %; difference {self.difference:+.4f}, "
            f"95 % in {self.interval[0]:+.4f} .. {self.interval[1]:+.4f})",
            "kept the tuned weights" if self.kept == "tuned" else "tuning lost: kept the zero-shot weights",
            *self.result.warnings,
        ]
        return "\n".join(lines)


def fit(
    model: Model,
    params: Params,
    data: str | Path | pd.DataFrame | Series | Splits,
    *,
    method: str = "sff",
    horizon: int | None = None,
    alpha: float = 0.7,
    context_len: int | None = None,
    target: str | Sequence[str] | None = None,
    few_shot: float = 1.0,
    mode: Mode | None = None,
    seed: int = 0,
    config: training.TrainConfig | None = None,
    keep: Literal["best", "tuned"] = "best",
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> Fitted:
    """Fine-tune on your own data, and get the zero-shot model back where tuning does not pay.

    The checkpoint is scored first; validation decides. The test part of the data is never looked at.

    Args:
      model, params: from `ltsm_jax.load`; neither is modified.
      data: a benchmark name, a CSV or parquet file, a DataFrame, a `Series`, or ready `Splits`.
      method: a name of `methods.strategies.STRATEGIES`.
      horizon, context_len: time steps; by default the model's own.
      alpha: for sff and noise, the weight of the pretrained side.
      target: columns to use of a table; by default all.
      few_shot: share of the training windows.
      mode: "ims" or "direct", see `run`; by default the model's recipe.
      config: a `training.TrainConfig`; by default the model's recipe.
      keep: "tuned" returns the tuned weights even where they lost.
      folder: checkpoints, so that a killed run continues.
      show_progress: a bar on a terminal, else a line every few seconds.
    Raises: ValueError for data, names and lengths that do not work, before anything is trained.
    Example: `fitted = ltsm_jax.fit(model, params, "sales.csv", horizon=48); print(fitted)`
    """
    if keep not in ("best", "tuned"):
        raise ValueError(f"keep must be 'best' or 'tuned'; got {keep!r}")
    chosen = strategy(method, alpha=alpha)
    mode = mode or default_mode(model)
    model, params, splits = as_splits(model, params, data, horizon=horizon, context_len=context_len, target=target,
                                      few_shot=few_shot, seed=seed)  # fmt: skip
    before = forecasting.errors(model, params, splits.val)
    result = run(model, params, chosen, splits, seed=seed, config=config, mode=mode, folder=folder, test=False,
                 show_progress=show_progress)  # fmt: skip
    after = forecasting.errors(model, result.params, splits.val)
    difference, interval = paired_difference(before, after, splits.val)
    zero_shot, tuned = forecasting.summarise(before), forecasting.summarise(after)
    won = keep == "tuned" or tuned["mse"] < zero_shot["mse"]
    if result.warnings:
        python_warnings.warn("; ".join(result.warnings), stacklevel=2)
    kept, best = ("tuned", result.params) if won else ("zero_shot", params)
    return Fitted(best, kept, zero_shot, tuned, difference, interval, result, splits, model)


def forecast(
    model: Model, params: Params, data: str | Path | pd.DataFrame | Series, horizon: int, **read: Any
) -> pd.DataFrame:
    """What comes after the end of a table, in its own units.

    Each column is standardised over its whole length before the model sees it, so that its unit does not matter, and
    scaled back after.

    Args:
      model, params: from `ltsm_jax.load` or `fit`.
      data: a benchmark name, a CSV or parquet file, a DataFrame or a `Series`.
      horizon: rows to forecast.
      read: options of `data.read_series` (`target`, `time`, `freq`, `missing`, ...).
    Returns: one row per step: the column "timestamp" where the stamps of the table are regular, then a column per
      variate under its own name, and, where the model has quantiles, "<name> <level>".
    Raises: ValueError (DataError) for data that cannot be used.
    Example: `ltsm_jax.forecast(model, params, "sales.csv", 48)`
    """
    series = as_series(data, **read)
    model, params = ready_for(model, params, series)
    scaler = Scaler.fit(series.values)
    context_1CL = scaler.transform(series.values)[None, :, -model.context_len :].astype(np.float32)
    found = _predict(model, params, context_1CL, horizon)
    stamps = series.stamps_after(horizon)
    table = {} if stamps is None else {"timestamp": stamps}
    point_CH = scaler.inverse(np.asarray(found.point[0], np.float64))
    table |= dict(zip(series.columns, point_CH, strict=True))
    for q, level in enumerate(found.levels):
        quantile_CH = scaler.inverse(np.asarray(found.quantiles[0, ..., q], np.float64))
        table |= {f"{name} {level:g}": row for name, row in zip(series.columns, quantile_CH, strict=True)}
    return pd.DataFrame(table)


@functools.partial(jax.jit, static_argnames=("model", "horizon"))
def _predict(model: Model, params: Params, context: jax.Array, horizon: int) -> Forecast:
    return model.predict(params, context, horizon)


def ready_for(model: Model, params: Params, series: Series, seed: int = 0) -> tuple[Model, Params]:
    """`Model.for_series` with the facts of `series`; what a checkpoint lacks is drawn from the seed's `init` key."""
    model, params = model.for_series(
        params, n_variates=series.n_variates, freq=series.freq, name=series.name, key=training.keys(seed)["init"]
    )
    return model, sharding.together(params)


def as_series(data: str | Path | pd.DataFrame | Series, **read: Any) -> Series:
    """A `Series` from whatever names one; `read` goes to `data.read_series`."""
    if isinstance(data, Series):
        return data
    return read_series(data, **read) if isinstance(data, pd.DataFrame) else load_series(data, **read)


def as_splits(
    model: Model,
    params: Params,
    data: str | Path | pd.DataFrame | Series | Splits,
    *,
    horizon: int | None = None,
    context_len: int | None = None,
    target: str | Sequence[str] | None = None,
    few_shot: float = 1.0,
    seed: int = 0,
) -> tuple[Model, Params, Splits]:
    """(model, params, splits): the windows of `data`, and the model made ready for them; arguments as in `fit`. Splits
    come back as they are, and the model with them."""
    if isinstance(data, Splits):
        return model, params, data
    series = as_series(data, target=target)
    model, params = ready_for(model, params, series, seed)
    lengths = context_len or model.recipe().context_len, horizon or model.recipe().horizon
    return model, params, prepare(series, *lengths, few_shot=few_shot, joint=model.variates == "joint")


def default_mode(model: Model) -> Mode:
    """The mode of the model's recipe."""
    return "ims" if model.recipe().loss == "own" else "direct"


def paired_difference(
    before: forecasting.Errors, after: forecasting.Errors, windows: Windows
) -> tuple[float, tuple[float, float]]:
    """Mean difference in MSE (after - before) over the same windows, and about 95 % around it.

    Neighbouring windows share most of their targets and all variates share their time, so single windows are no
    independent draws: the interval comes from means of blocks of `horizon` consecutive starts, all variates together.

    Returns: (difference, (low, high)); the interval is NaN where there are fewer than two blocks.
    """
    gap_N = ((after.squared - before.squared) / windows.horizon).mean(axis=1)
    starts_N = np.asarray(windows.starts)
    block_N = (starts_N - starts_N.min()) // windows.horizon
    count = np.bincount(block_N)
    means = np.bincount(block_N, gap_N)[count > 0] / count[count > 0]
    mean = float(gap_N.mean())
    if len(means) < 2:
        return mean, (float("nan"), float("nan"))
    spread = 1.96 * float(means.std(ddof=1)) / len(means) ** 0.5
    return mean, (mean - spread, mean + spread)
