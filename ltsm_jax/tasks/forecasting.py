"""Forecasting: the loss of a batch, and the score of every window of a split."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ltsm_jax import sharding
from ltsm_jax.data.windows import Windows
from ltsm_jax.layers.experts import rows_over
from ltsm_jax.models.family import Batch, Forecast, Model
from ltsm_jax.tasks.batches import in_batches
from ltsm_jax.trees import Tree


class Predictor(Protocol):
    """Anything that forecasts: a `Model` or a baseline. Must be hashable; it is static under jit."""

    @property
    def eval_batch(self) -> int: ...

    def predict(self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None) -> Forecast: ...


@dataclasses.dataclass(frozen=True)
class SeasonalNaive:
    """Baseline: the last `season` observed steps, over and over; season 1 repeats the last value."""

    season: int = 1
    eval_batch: int = 2048

    def predict(self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None) -> Forecast:
        season = min(self.season, context.shape[-1])
        repeats = -(-horizon // season)
        return Forecast(jnp.tile(context[..., -season:], (1, 1, repeats))[..., :horizon])


def loss_fn(
    model: Model, mode: Literal["own", "point"] = "own"
) -> Callable[[Tree, Batch, jax.Array | None, bool], jax.Array]:
    """The training loss `f(params, batch, key, train) -> scalar`, in the (squared) units of the batch.

    mode: "own" is the family's own loss (Timer: next token, "IMS"); "point" is the MSE of the point forecast
    ("direct").
    """
    model.check_task("forecasting")
    if mode not in ("own", "point"):
        raise ValueError(f"loss mode must be 'own' or 'point', got {mode!r}")
    return model.loss if mode == "own" else model.point_loss


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of every window, summed over the horizon: squared, absolute, absolute over |target| [N, C].

    zeros [N, C]: steps whose target is exactly 0; they have no percentage error and are left out of MAPE alone.
    variates [N, C]: which variate each entry is of. horizon: steps per entry.
    """

    squared: np.ndarray
    absolute: np.ndarray
    percentage: np.ndarray
    zeros: np.ndarray
    variates: np.ndarray
    horizon: int


@functools.partial(jax.jit, static_argnames=("predictor", "mesh"))
def _batch_errors(
    predictor: Predictor, params: Tree, windows: Windows, indices: jax.Array, mesh: Mesh | None
) -> dict[str, jax.Array]:
    batch = sharding.by_rows(windows.gather(indices), mesh)
    target = batch["target"]
    with rows_over(mesh):
        difference = predictor.predict(params, batch["context"], target.shape[-1]).point - target
    zero = target == 0
    found = {
        "squared": jnp.square(difference).sum(-1),
        "absolute": jnp.abs(difference).sum(-1),
        "percentage": jnp.abs(jnp.where(zero, 0.0, difference / jnp.where(zero, 1.0, target))).sum(-1),
        "zeros": zero.sum(-1),
    }
    return sharding.everywhere(found, mesh)


def errors(predictor: Predictor, params: Tree, windows: Windows, *, batch_size: int | None = None) -> Errors:
    """Errors of every window, none dropped, forecast on device in batches.

    The last batch is filled up with repeated windows, whose errors are cut off again: one compilation serves all.
    Where the parameters lie over a mesh, each device forecasts its part of a batch; every host gets all errors.
    batch_size: windows per forward pass; None: the predictor's `eval_batch` (for each device that has rows).
    """
    mesh = sharding.mesh_of(params)
    placed = windows.over(mesh)
    size = batch_size or predictor.eval_batch * sharding.row_parts(mesh)
    sums = in_batches(
        lambda indices: _batch_errors(predictor, params, placed, indices, mesh),
        windows.n,
        size,
        sharding.Placement(mesh),
    )
    shape = sums["squared"].shape
    rows = np.arange(shape[1])[None] if windows.joint else np.asarray(windows.rows)[:, None]
    return Errors(**sums, variates=np.broadcast_to(rows, shape), horizon=windows.horizon)


def summarise(found: Errors, naive_scale: np.ndarray | None = None) -> dict[str, float]:
    """Means over all windows, steps and variates: mse, mae, rmse, mape (a fraction), and mase where a scale is given.

    Summed in float64 on the host, so the value does not depend on the batch size beyond the rounding of the forward
    pass itself.

    Args:
      found: from `errors`.
      naive_scale: [variates], the in-sample seasonal-naive MAE of each variate in the units of the data.
    """
    entries, steps = found.squared.size, found.squared.size * found.horizon
    mse = found.squared.sum() / steps
    scored = steps - found.zeros.sum()
    result = {
        "mse": mse,
        "mae": found.absolute.sum() / steps,
        "rmse": float(np.sqrt(mse)),
        "mape": found.percentage.sum() / scored if scored else float("nan"),
    }
    if naive_scale is not None:
        scale = np.asarray(naive_scale)[found.variates]
        usable = scale > 0  # a constant variate has no scale
        per_entry = found.absolute[usable] / scale[usable]
        result["mase"] = per_entry.sum() / (per_entry.size * found.horizon) if per_entry.size else float("nan")
    return {name: float(value) for name, value in result.items()} | {"windows": entries}


def evaluate(
    predictor: Predictor,
    params: Tree,
    windows: Windows,
    *,
    batch_size: int | None = None,
    naive_scale: np.ndarray | None = None,
) -> dict[str, Any]:
    """Score of a split: mse, mae, rmse, mape, (mase), and the number of windows scored (one per variate).

    Args:
      predictor: a model or a baseline.
      params: its parameters; `{}` for a baseline.
      windows: the split. Horizons past the model's own are rolled out.
      batch_size: windows per forward pass; changes the speed, not the value. None: the predictor's `eval_batch`.
      naive_scale: see `summarise`.
    Raises: ValueError when there is no window.
    """
    return summarise(errors(predictor, params, windows, batch_size=batch_size), naive_scale)
