"""AutoETS of statsforecast on windows, where that package is installed: one fit per window, on the
host.
"""

import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np

from ltsm_jax.data import Windows
from ltsm_jax.layers.missing import interpolate_missing
from ltsm_jax.tasks.forecasting import Errors


def is_installed() -> bool:
    """Return whether statsforecast is installed."""
    return importlib.util.find_spec("statsforecast") is not None


def ets_forecast(contexts: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """Forecasts [W, H] of contexts [W, L], NaN = missing; those with too few values repeat the last
    one.
    """
    from statsforecast.models import AutoETS

    found = np.empty((len(contexts), horizon))
    filled, begun = interpolate_missing(jnp.asarray(contexts))
    for i, (row, seen) in enumerate(
        zip(np.asarray(filled, np.float64), np.asarray(begun), strict=True)
    ):
        known = row[seen]
        length = season if len(known) >= 2 * season else 1
        if len(known) < 8 or np.ptp(known) == 0:
            found[i] = known[-1] if len(known) else 0.0
            continue
        model: Any = AutoETS(season_length=length)
        found[i] = model.forecast(known, horizon)["mean"]
    return np.where(np.isfinite(found), found, contexts[:, -1:])


def ets_errors(windows: Windows, indices: np.ndarray, season: int) -> Errors:
    """Errors of the windows numbered `indices`, as `tasks.forecasting.errors` gives them."""
    batch = windows.gather(jnp.asarray(indices))
    context, target = (np.asarray(batch[name], np.float64) for name in ("context", "target"))
    w, c, horizon = target.shape
    point = ets_forecast(context.reshape(w * c, -1), horizon, season).reshape(target.shape)

    observed = ~np.isnan(target)
    gap = np.where(observed, point - target, 0.0)
    zero = target == 0
    rows = (
        np.arange(c)[None] if windows.rows is None else np.asarray(windows.rows)[indices][:, None]
    )
    share = np.abs(gap) / np.where(zero | ~observed, 1.0, np.abs(target))
    return Errors(
        squared=np.square(gap).sum(-1),
        absolute=np.abs(gap).sum(-1),
        percentage=np.where(zero, 0.0, share).sum(-1),
        zeros=zero.sum(-1),
        steps=observed.sum(-1),
        variates=np.broadcast_to(rows, (w, c)),
        horizon=horizon,
    )
