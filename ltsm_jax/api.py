"""The public functions: fine-tune, prune and forecast, with data as users have them.

`fit`, `prune` and `forecast` read data in one way and scale them by one rule: a model sees every
window standardised by its own context. No row that the model does not see has a say in what it
sees.
"""

import dataclasses
import functools
import html
import warnings as python_warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ltsm_jax import hosts, trees
from ltsm_jax.data import DataError, Series, Splits
from ltsm_jax.data.tables import ReadingOptions
from ltsm_jax.data.windows import context_scale
from ltsm_jax.loading import load
from ltsm_jax.methods import pruning
from ltsm_jax.methods.alpha import AlphaChoice, choose_alpha, require_mixing
from ltsm_jax.methods.binding import (
    Bound,
    Data,
    as_series,
    bind,
    check_params,
    drawn,
    positive_int,
    ready_for,
)
from ltsm_jax.methods.checks import paired_difference
from ltsm_jax.methods.pruning import PruneConfig, PruneResult
from ltsm_jax.methods.removal import remove
from ltsm_jax.methods.run import RunResult, run
from ltsm_jax.methods.strategies import Strategy, strategy
from ltsm_jax.methods.task_data import TASKS, ready
from ltsm_jax.models import Forecast, Model
from ltsm_jax.models.folders import save
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks import forecasting
from ltsm_jax.tasks.anomaly import ScaledSeries
from ltsm_jax.tasks.forecasting import Mode
from ltsm_jax.training import TrainConfig
from ltsm_jax.trees import Params

__all__ = [
    "Fitted",
    "PruneConfig",
    "PruneResult",
    "Strategy",
    "TrainConfig",
    "fit",
    "forecast",
    "load",
    "prune",
    "remove",
    "save",
]

Kept = Literal["tuned", "zero_shot"]
TaskName = Literal["forecasting", "imputation", "anomaly"]


@dataclasses.dataclass(frozen=True, repr=False)
class Fitted:
    """Result of `fit`; print it.

    Attributes:
      params: the weights to use: the tuned ones, or the ones before where tuning lost (`kept` says
        which).
      kept: "tuned" or "zero_shot".
      zero_shot, tuned: validation metrics before and after, in units standardised by the training
        part.
      choice: what was tried to choose alpha, where it was "auto"; None elsewhere.
      naive: validation metrics of the naive forecasts by name: "last value" and, with a season,
        "seasonal naive".
      difference: mean of (tuned - zero-shot) MSE over the same validation windows; below zero is a
        gain.
      interval: about 95 % around it, from means over blocks of windows that share no target; NaN
        under two blocks.
      result: the whole run (`result.params` are the tuned weights in any case). splits: what it ran
        on. notes: how the table was read and cut.
      model: what `params` belong to: the model given to `fit`, made ready for the data where it
        needed that, and with the scales that "msft" adds where its weights are kept. Forecast
        with both: `forecast(fitted.model, fitted.params, ...)`.
    """

    params: Params
    kept: Kept
    zero_shot: dict[str, Any]
    tuned: dict[str, Any]
    difference: float
    interval: tuple[float, float]
    result: RunResult
    splits: Splits | ScaledSeries
    model: Model
    naive: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    choice: AlphaChoice | None = None
    notes: tuple[str, ...] = ()

    @property
    def clear(self) -> bool:
        """Whether the interval around the difference leaves zero out."""
        low, high = self.interval
        return low > 0 or high < 0

    @property
    def verdict(self) -> str:
        """The outcome in words: tuned against untuned, and both against the naive forecasts."""
        said = "kept the tuned weights" if self.kept == "tuned" else "kept the weights from before"
        if np.isnan(self.interval[0]):
            said += ": validation is too short to say how sure that is"
        elif not self.clear:
            said += ": no difference that the data can show"
        elif self.kept == "zero_shot":
            said = "tuning lost: " + said
        elif self.difference > 0:
            said += ", although tuning lost"
        best = min((self.tuned if self.kept == "tuned" else self.zero_shot)["mse"], np.inf)
        better = {
            name: scores["mse"] for name, scores in self.naive.items() if scores["mse"] < best
        }
        if better:
            name = min(better, key=lambda n: better[n])
            said += f"\nthe {name} is better than either: validation MSE {better[name]:.4f}"
        return said

    def __str__(self) -> str:
        before, after = self.zero_shot["mse"], self.tuned["mse"]
        # A share of an error that is printed as 0.0000 says nothing.
        change = f"{100 * (after / before - 1):+.2f} %; " if before >= 5e-5 else ""
        low, high = self.interval
        sure = "" if np.isnan(low) else f", 95 % in {low:+.4f} .. {high:+.4f}"
        naive = [f"{name} {scores['mse']:.4f}" for name, scores in self.naive.items()]
        lines = [
            f"{self.result.strategy.name}: validation MSE {before:.4f} before, {after:.4f} tuned "
            f"({change}difference {self.difference:+.4f}{sure})",
            *([] if self.choice is None else [_chosen(self.choice)]),
            *(["beside it: " + ", ".join(naive)] if naive else []),
            self.verdict,
            *self.notes,
            *self.result.warnings,
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        mse = {"before": self.zero_shot["mse"], "tuned": self.tuned["mse"]}
        scores = ", ".join(f"{name} {value:.4g}" for name, value in mse.items())
        return (
            f"<Fitted {self.model.family} by {self.result.strategy.name}: validation MSE {scores}; "
            f"kept {self.kept}>"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@hosts.interruptible()
def fit(
    model: Model | PruneResult,
    params: Params | None = None,
    data: Data | Splits | None = None,
    *,
    task: TaskName = "forecasting",
    method: str | Strategy = "sff",
    masks: Params | None = None,
    horizon: int | None = None,
    context_len: int | None = None,
    target: str | Sequence[str] | None = None,
    time: str | None = None,
    id: str | None = None,
    freq: str | None = None,
    date_format: str | None = None,
    missing: Literal["error", "interpolate", "keep"] = "error",
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
    alpha: float | Literal["auto"] | None = None,
    few_shot: float = 1.0,
    mode: Mode | None = None,
    seed: int = 0,
    config: TrainConfig | None = None,
    keep: Literal["best", "tuned"] = "best",
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> Fitted:
    """Fine-tune on your own data, and get the model back as it was where tuning does not pay.

    The checkpoint is scored first, beside naive forecasts; validation decides. The test part of the
    data is never looked at. A table is split 70/10/20 percent; one too short for that is cut as
    training can take it, and `fitted.splits.notes` say how.

    Args:
      model, params: from `ltsm_jax.load`; neither is modified. Or a result of `prune` in place of
        both, `fit(found, data)`: the masks are taken from it, and, where they are not given,
        horizon, context and data.
      data: a benchmark name, a CSV or parquet file, a DataFrame, a `Series`, or ready `Splits`.
      task: "forecasting"; "imputation", which hides runs of known cells of windows and asks for
        them; or "anomaly", which reconstructs a table that holds nothing unusual. For the last two
        the last tenth of the rows validates, and horizon, context_len, mode, masks and alpha="auto"
        are not for them. `fitted.model` and `fitted.params` go into `impute` and `detect`.
      method: a name of `methods.strategies.STRATEGIES`, or a `Strategy`.
      masks: of a pruned model; what they prune stays 0. After `remove`, hand in the masks it
        returned. A model with channels of zeros, as `remove` leaves them, is refused without:
        training would bring them back. `masks={}` trains them all the same.
      horizon, context_len: time steps; by default the model's own.
      target, time, id, freq, date_format, missing, irregular, name: how a table is read, see
        `data.tables. ReadingOptions`.
      alpha: for the methods that mix (`methods.strategies.MIXED`), the weight of the pretrained
        side; by default 0.7. "auto" trains with each of `methods.alpha.GRID`, equally long, and
        keeps the one with the lowest validation MSE; `fitted.choice` says what was tried. It takes
        as many times as long; 1 is the checkpoint without mixing, so that `sff` there is plain full
        fine-tuning.
      few_shot: share of the training windows.
      mode: the training loss, "ims" or "direct", see `tasks.forecasting.Forecasting`; by default
        the model's recipe.
      seed: of the random model, the data order and the dropout.
      config: a `TrainConfig`; what it leaves out is the model's recipe.
      keep: "tuned" returns the tuned weights even where they lost.
      folder: checkpoints, so that a killed run continues.
      show_progress: a bar on a terminal, else a line every few seconds.
    Raises: ValueError for data, names and lengths that do not work, before anything is trained.
    Example: `fitted = ltsm_jax.fit(model, params, "sales.csv", horizon=48); print(fitted)`
    """
    if keep not in ("best", "tuned"):
        raise ValueError(f"keep must be 'best' or 'tuned'; got {keep!r}")
    chosen = _strategy_of(method, alpha)
    options = ReadingOptions(
        target=target,
        time=time,
        id=id,
        freq=freq,
        date_format=date_format,
        missing=missing,
        irregular=irregular,
        name=name,
    )
    how = _How(keep, seed=seed, config=config, folder=folder, show_progress=show_progress)
    if task != "forecasting":
        other = {"horizon": horizon, "context_len": context_len, "mode": mode, "masks": masks}
        return _fit_task(
            task,
            model,
            params,
            data=data,
            options=options,
            chosen=chosen,
            given=[name for name, value in other.items() if value is not None],
            few_shot=few_shot,
            how=how,
        )
    job = _job(model, params, data, masks=masks, horizon=horizon, context_len=context_len)
    bound = bind(
        job.model,
        job.params,
        job.data,
        options=options,
        horizon=job.horizon,
        context_len=job.context_len,
        mode=mode,
        few_shot=few_shot,
        seed=seed,
    )
    fitted = _fit_forecasting(
        bound,
        method if chosen is None else chosen,
        masks=job.masks,
        how=how,
    )
    if fitted.result.warnings:
        python_warnings.warn("; ".join(fitted.result.warnings), stacklevel=2)
    return fitted


class _How(NamedTuple):
    """The arguments of `fit` that say how to train and what to keep, whatever the task."""

    keep: Literal["best", "tuned"]
    seed: int
    config: TrainConfig | None
    folder: str | Path | None
    show_progress: bool

    def run(self) -> dict[str, Any]:
        """The keywords that `run` and `choose_alpha` share."""
        return {
            "seed": self.seed,
            "config": self.config,
            "folder": self.folder,
            "show_progress": self.show_progress,
        }


class _Job(NamedTuple):
    """The arguments of `fit` that a pruning result may stand for."""

    model: Model
    params: Params
    data: Data | Splits
    masks: Params | None
    horizon: int | None
    context_len: int | None


def _job(
    model: Model | PruneResult,
    params: Any,
    data: Data | Splits | None,
    *,
    masks: Params | None,
    horizon: int | None,
    context_len: int | None,
) -> _Job:
    """Resolve the two ways to call `fit`: with a model and its parameters, or a pruning result.

    Raises: ValueError where data are missing or given twice, or a model was pruned and the masks
      are missing.
    """
    if not isinstance(model, PruneResult):
        if masks is None:
            check_params(model, params)
            pruning.refuse_pruned(model, params)
        if data is None:
            raise ValueError(
                "fit(model, params, data): there are no data; or fit(found, data) for a result of "
                "prune"
            )
        return _Job(
            model=model,
            params=params,
            data=data,
            masks=masks,
            horizon=horizon,
            context_len=context_len,
        )

    found = model
    if params is not None and data is not None:
        raise ValueError(
            "fit(found, data) takes model and parameters from the pruning result: leave params away"
        )
    # `fit(found, data)`: the second argument is in the place of the parameters.
    given: Any = params if data is None else data
    if given is None:
        given = found.splits
    elif not isinstance(given, Splits):
        # What was pruned for one horizon is tuned for it, unless another is asked for.
        horizon = found.splits.val.horizon if horizon is None else horizon
        context_len = found.splits.val.context_len if context_len is None else context_len
    masks = found.masks if masks is None else masks
    return _Job(
        model=found.model,
        params=found.params,
        data=given,
        masks=masks,
        horizon=horizon,
        context_len=context_len,
    )


def _fit_forecasting(
    bound: Bound,
    method: str | Strategy,
    *,
    masks: Params | None,
    how: _How,
) -> Fitted:
    """Score the checkpoint, tune it, score it again, and let validation decide."""
    splits, forecasts = bound.splits, bound.task
    placement = Placement.of(bound.params)
    start = bound.params
    if masks is not None:
        start = pruning.apply_masks(bound.params, masks, placement)
    before = forecasting.errors(
        forecasts.predictor(bound.model), start, splits.val, placement=placement
    )
    result, choice = _tune(bound, method, masks=masks, how=how)
    after = forecasting.errors(
        forecasts.predictor(result.model), result.params, splits.val, placement=placement
    )

    difference, interval = paired_difference(before, after, splits.val)
    zero_shot, tuned = forecasting.summarise(before), forecasting.summarise(after)
    won = how.keep == "tuned" or tuned["mse"] < zero_shot["mse"]
    return Fitted(
        params=result.params if won else start,
        kept="tuned" if won else "zero_shot",
        zero_shot=zero_shot,
        tuned=tuned,
        difference=difference,
        interval=interval,
        result=result,
        splits=splits,
        model=result.model if won else bound.model,
        naive=forecasts.baselines(bound.model, splits),
        choice=choice,
        notes=splits.notes,
    )


def _strategy_of(method: str | Strategy, alpha: float | Literal["auto"] | None) -> Strategy | None:
    """The strategy that `fit` is asked for, or None where alpha has to be chosen first.

    Raises: ValueError for an alpha that does not go with the method.
    """
    if isinstance(method, Strategy):
        if alpha is not None:
            raise ValueError("alpha is for a method by name; a Strategy has its own")
        return method
    if alpha == "auto":
        require_mixing(method)
        return None
    if isinstance(alpha, str):
        raise ValueError(f"alpha is a number or 'auto'; got {alpha!r}")
    return strategy(method, alpha=0.7 if alpha is None else alpha)


def _tune(
    bound: Bound, method: str | Strategy, *, masks: Params | None, how: _How
) -> tuple[RunResult, AlphaChoice | None]:
    """Train on data that are bound to a model. method: a name where alpha has to be chosen.

    Returns: the run, and how alpha was chosen where it was.
    """
    if isinstance(method, Strategy):
        result = run(
            bound.model,
            bound.params,
            method,
            data=bound.splits,
            task=bound.task,
            masks=masks,
            test=False,
            **how.run(),
        )
        return result, None
    choice = choose_alpha(
        bound.model,
        bound.params,
        bound.splits,
        method=method,
        task=bound.task,
        masks=masks,
        **how.run(),
    )
    assert choice.result is not None, "it was trained"
    return choice.result, choice


def _fit_task(
    kind: Literal["imputation", "anomaly"],
    model: Model | PruneResult,
    params: Any,
    data: Data | Splits | None,
    options: ReadingOptions,
    chosen: Strategy | None,
    *,
    given: list[str],
    few_shot: float,
    how: _How,
) -> Fitted:
    """Tune for another task than forecasting; validation decides as there.

    given: arguments of `fit` that were given and are for forecasting alone.
    """
    if chosen is None:
        given = [*given, "alpha='auto'"]
    if (
        kind not in TASKS
        or given
        or isinstance(model, PruneResult)
        or isinstance(data, Splits)
        or data is None
    ):
        told = f"; {', '.join(given)} are for forecasting" if given else ""
        raise ValueError(
            f"task must be forecasting, {' or '.join(TASKS)}, the last two with a model, "
            f"params and a table{told}"
        )
    check_params(model, params)
    assert chosen is not None
    series = as_series(data, options)
    model, params = ready_for(model, params, series, seed=how.seed)
    made = ready(kind, model, series, few_shot=few_shot)
    zero_shot = made.task.evaluate(model, params, made.data, part="val")
    result = run(
        model,
        params,
        chosen,
        data=made.data,
        task=made.task,
        test=False,
        **how.run(),
    )
    found = made.difference(params, result.params)
    won = how.keep == "tuned" or result.val["mse"] < zero_shot["mse"]
    return Fitted(
        params=result.params if won else params,
        kept="tuned" if won else "zero_shot",
        zero_shot=zero_shot,
        tuned=result.val,
        difference=found.mean,
        interval=(found.low, found.high),
        result=result,
        splits=made.data,
        model=model,
        naive=made.task.baselines(model, made.data),
        notes=made.notes,
    )


def _chosen(choice: AlphaChoice) -> str:
    """Say which alpha was picked, and what the others gave."""
    scores = [f"{row['alpha']:g}: {row['score']:.4f}" for row in choice.table()]
    return f"alpha {choice.strategy.alpha:g}, picked by validation MSE ({', '.join(scores)})"


def prune(
    model: Model,
    params: Params,
    data: Data | Splits,
    config: PruneConfig,
    *,
    horizon: int | None = None,
    context_len: int | None = None,
    target: str | Sequence[str] | None = None,
    time: str | None = None,
    id: str | None = None,
    freq: str | None = None,
    date_format: str | None = None,
    missing: Literal["error", "interpolate", "keep"] = "error",
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
    few_shot: float = 1.0,
    mode: Mode | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> PruneResult:
    """Find what of a pretrained model a data set does not need. No weight is trained.

    Fine-tune what is left with `fit(found, data)`; take the rest out with `remove(found.model,
    found.params, found.masks)`.

    Args:
      model, params: from `ltsm_jax.load`; neither is modified.
      data: as for `fit`; the training and the validation part are looked at.
      config: how to prune, a `PruneConfig`.
      horizon, context_len, few_shot, mode, seed, folder, show_progress: as for `fit`. A killed run
        goes on from the folder and ends with the same bits.
      target, time, id, freq, date_format, missing, irregular, name: how a table is read, see
        `data.tables. ReadingOptions`.
    Raises: ValueError for data, names and lengths that do not work.
    Example:
    `ltsm_jax.prune(model, params, "sales.csv", PruneConfig(ratio=0.3, ema=0.5, epochs=1))`
    """
    if not isinstance(config, PruneConfig):
        raise ValueError(
            f"prune takes a PruneConfig, such as PruneConfig(ratio=0.3, ema=0.5); got {config!r}"
        )
    options = ReadingOptions(
        target=target,
        time=time,
        id=id,
        freq=freq,
        date_format=date_format,
        missing=missing,
        irregular=irregular,
        name=name,
    )
    bound = bind(
        model,
        params,
        data,
        options=options,
        horizon=horizon,
        context_len=context_len,
        mode=mode,
        few_shot=few_shot,
        seed=seed,
    )
    return pruning.prune(
        bound.model,
        bound.params,
        bound.splits,
        config=config,
        task=bound.task,
        seed=seed,
        folder=folder,
        show_progress=show_progress,
    )


@hosts.interruptible()
def forecast(
    model: Model,
    params: Params,
    data: Data,
    horizon: int,
    *,
    target: str | Sequence[str] | None = None,
    time: str | None = None,
    id: str | None = None,
    freq: str | None = None,
    date_format: str | None = None,
    missing: Literal["error", "interpolate", "keep"] = "error",
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
    untrained: bool = False,
) -> pd.DataFrame:
    """Forecast what comes after the end of a table, in its own units.

    The model sees the last `model.context_len` rows, each column standardised by what it has there,
    so that neither its unit nor older rows matter; its forecast is scaled back.

    Args:
      model, params: from `ltsm_jax.load`, or `fitted.model` and `fitted.params`.
      data: a benchmark name, a CSV or parquet file, a DataFrame or a `Series`.
      horizon: rows to forecast.
      target, time, id, freq, date_format, missing, irregular, name: how a table is read, see
        `data.tables. ReadingOptions`.
      untrained: forecast even where the model lacks parameters for such data, which are then drawn
        at random.
    Returns: one row per step: the stamps, where those of the table are regular, under the name that
      they have there ("timestamp" where they have none) and in their zone, then a column per
      variate under its own name, and, where the model has quantiles, "<name> <level>".
    Raises: ValueError (DataError) for data that cannot be used, parameters of another model or that
      are not finite, and for a model that has to be tuned on such data first.
    Example: `ltsm_jax.forecast(model, params, "sales.csv", 48)`
    """
    horizon = positive_int(horizon, "horizon")
    check_params(model, params)
    options = ReadingOptions(
        target=target,
        time=time,
        id=id,
        freq=freq,
        date_format=date_format,
        missing=missing,
        irregular=irregular,
        name=name,
    )
    series = as_series(data, options)
    ready, ready_params = ready_for(model, params, series)
    if (fresh := drawn(params, ready_params)) and not untrained:
        raise ValueError(
            f"this {model.family} model has no parameters for {series.n_variates} variates such as "
            f"these: {len(fresh)} arrays ({fresh[0]}, ...) would be drawn at random. Tune it with "
            "fit(...) and forecast with fitted.model and fitted.params, or ask for what random "
            "ones give with untrained=True"
        )
    model, params = ready, ready_params

    context_CL = _context(series, model.context_len)
    mean_C1, std_C1 = context_scale(context_CL)
    scaled_1CL = ((context_CL - mean_C1) / std_C1)[None].astype(np.float32)
    found = _predict(model, params, scaled_1CL, horizon=horizon)
    if not bool(np.isfinite(np.asarray(found.point)).all()):
        _refuse_bad_weights(params)
        raise ValueError(f"{series.name}: the forecast is not finite although data and weights are")
    return _forecast_table(series, found, mean_C1, std_C1=std_C1)


def _context(series: Series, context_len: int) -> np.ndarray:
    """Take the last rows [C, L] of a series.

    Raises: DataError naming the columns that hold no value there.
    """
    context_CL = series.values[:, -context_len:]
    empty = [
        column
        for column, row in zip(series.columns, context_CL, strict=True)
        if np.isnan(row).all()
    ]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(
            f"{series.name}: no value in the last {context_CL.shape[1]} rows of {shown}"
        )
    return context_CL


def _forecast_table(
    series: Series, found: Forecast, mean_C1: np.ndarray, std_C1: np.ndarray
) -> pd.DataFrame:
    """Lay out a forecast of one series as the table that `forecast` returns, in data units."""

    def in_data_units(values_CH: Any) -> np.ndarray:
        return np.asarray(values_CH, np.float64) * std_C1 + mean_C1

    columns: list[tuple[str, Any]] = []
    stamps = series.stamps_after(found.point.shape[-1])
    if stamps is not None:
        columns.append((series.time_name or "timestamp", series.in_zone(stamps)))
    columns += zip(series.columns, in_data_units(found.point[0]), strict=True)
    for q, level in enumerate(found.levels):
        assert found.quantiles is not None
        names = (f"{column} {level:g}" for column in series.columns)
        columns += zip(names, in_data_units(found.quantiles[0, ..., q]), strict=True)

    names = [column for column, _ in columns]
    duplicates = sorted({column for column in names if names.count(column) > 1})
    if duplicates:
        raise DataError(
            f"{series.name}: the forecast would have two columns called "
            f"{', '.join(map(repr, duplicates))}; rename those of the table"
        )
    return pd.DataFrame(dict(columns))


@functools.partial(jax.jit, static_argnames=("model", "horizon"))
def _predict(model: Model, params: Params, context: jax.Array, horizon: int) -> Forecast:
    return model.predict(params, context, horizon)


def _refuse_bad_weights(params: Params) -> None:
    """Raises: ValueError naming the parameters that are not finite."""
    flat = trees.flatten(params)
    bad = [path for path, leaf in flat.items() if not bool(jnp.isfinite(leaf).all())]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise ValueError(
            f"{len(bad)} of {len(flat)} parameters are not finite ({shown}): the weights are "
            "damaged"
        )
