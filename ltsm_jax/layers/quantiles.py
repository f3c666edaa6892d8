"""Quantiles: the loss that they are trained with, and values between their levels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def level_problems(levels: Sequence[float], name: str = "levels") -> list[str]:
    """Say what keeps numbers from being levels of quantiles. name: of the field of a config."""
    rise = list(levels) == sorted(set(levels))
    if levels and rise and levels[0] > 0 and levels[-1] < 1:
        return []
    return [f"{name} must rise within (0, 1): {levels}"]


def pinball(target: jax.Array, quantiles: jax.Array, levels: Sequence[float]) -> jax.Array:
    """The quantile loss max(l e, (l - 1) e), e = target - quantile, of each level l.

    target: [...]. quantiles: [..., Q] at `levels`. Returns: [..., Q].
    Source: Koenker & Bassett, "Regression Quantiles" (Econometrica 46, 1978).
    """
    level = jnp.asarray(levels, jnp.float32).reshape((1,) * target.ndim + (-1,))
    error = target[..., None] - quantiles
    return jnp.maximum(level * error, (level - 1) * error)


def at_levels(y: jax.Array, levels: Sequence[float], wanted: Sequence[float]) -> jax.Array:
    """Values [..., W] at the levels `wanted` of quantiles y [..., Q] at rising `levels`.

    Linear between neighbours, the end values beyond the ends.
    """
    have = np.asarray(levels, np.float64)
    want = np.clip(np.asarray(wanted, np.float64), have[0], have[-1])
    low = np.clip(np.searchsorted(have, want, side="right") - 1, 0, max(len(have) - 2, 0))
    high = np.minimum(low + 1, len(have) - 1)
    share = (want - have[low]) / np.where(high > low, have[high] - have[low], 1.0)
    share = jnp.asarray(share, jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y[..., low] + (y[..., high] - y[..., low]) * share


def median_of(y: jax.Array, levels: Sequence[float]) -> jax.Array:
    """The median [...] of quantiles y [..., Q]; between the levels beside 0.5 where it is none."""
    return at_levels(y, levels, (0.5,))[..., 0]
