"""What users call: fine-tune, prune and forecast, with data as they have it."""

import dataclasses
import functools
import warnings as python_warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd

from ltsm_jax import training
from ltsm_jax.data import Series, Splits
from ltsm_jax.data.splits import Scaler
from ltsm_jax.loading import load
from ltsm_jax.methods.binding import Mode, as_series, as_splits, default_mode, ready_for
from ltsm_jax.methods.checks import paired_difference
from ltsm_jax.methods.pruning import prune
from ltsm_jax.methods.removal import remove
from ltsm_jax.methods.run import Result, run
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models import Forecast, Model
from ltsm_jax.models.folders import save
from ltsm_jax.tasks import forecasting

__all__ = ["Fitted", "fit", "forecast", "load", "prune", "remove", "save"]

Params = Any


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
      config: a `training.TrainConfig`; what it leaves out is the model's recipe.
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
