"""Check what training gave: flat forecasts, and whether a difference is more than chance."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ltsm_jax import sharding
from ltsm_jax.data import Windows
from ltsm_jax.models import Model
from ltsm_jax.tasks import forecasting

Params = Any
COLLAPSED = 0.01  # a forecast that varies less than this share of what it should follow is a flat line


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
