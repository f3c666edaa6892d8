"""Missing values (NaN): filled where an original knows none, and left out of means.

A batch is what `models.family.Batch` says: a mapping with `weight` [B] where its rows do not count
alike.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]


# --- means


def mean_over_rows(error: jax.Array, batch: Batch) -> jax.Array:
    """Average `error` [B, ...], each row counting by `batch["weight"]` (all alike where there is
    none).
    """
    row = error.reshape(error.shape[0], -1).mean(axis=1)
    weight = batch.get("weight")
    return row.mean() if weight is None else (row * weight).sum() / weight.sum()


def mse_observed(y: jax.Array, target: jax.Array, batch: Batch) -> jax.Array:
    """Mean squared error over the targets [B, ...] that are not NaN, each row counting by its
    weight.

    Every observed target counts alike; the result is 0 where none is. Without NaN it is, bit for
    bit, `mean_over_rows` of the squared errors.
    """
    observed = ~jnp.isnan(target)

    # The inner `where` keeps NaN out of the gradient, the outer one keeps what was filled in out of
    # the sum.
    gap = y - jnp.where(observed, target, 0.0)
    error = jnp.where(observed, jnp.square(gap), 0.0)

    # Exactly 1 without NaN: the mean of ones need not be, since XLA multiplies by a rounded 1 / n.
    share = mean_over_rows(observed.astype(error.dtype), batch)
    share = jnp.where(observed.all(), 1.0, jnp.maximum(share, jnp.finfo(error.dtype).tiny))
    return mean_over_rows(error, batch) / share


def mean_observed(error: jax.Array, observed: jax.Array, batch: Batch) -> jax.Array:
    """Average what is observed of `error` [B, ...], each row counting by `batch["weight"]`; 0 where
    nothing is.

    error: finite everywhere: fill what is missing first. observed: of the same shape, a weight of
    each entry, 0 for missing.
    """
    weight = observed.astype(error.dtype)
    if "weight" in batch:
        weight = weight * batch["weight"].reshape(-1, *(1,) * (error.ndim - 1))
    return (error * weight).sum() / jnp.maximum(weight.sum(), jnp.finfo(error.dtype).tiny)


def scale_of_observed(x: jax.Array, flat: float) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation [..., 1] of what is not NaN of x [..., T].

    flat: the deviation of a series without a spread, in place of 0. One without any value has the
    mean 0 and the deviation 1.
    """
    observed = ~jnp.isnan(x)
    n = observed.sum(-1, keepdims=True)

    def mean(y):
        return jnp.where(observed, y, 0.0).sum(-1, keepdims=True) / jnp.maximum(n, 1)

    loc = mean(x)
    scale = jnp.sqrt(mean(jnp.square(x - loc)))
    return loc, jnp.where(n == 0, 1.0, jnp.where(scale == 0, flat, scale))


# --- filling


def fill_missing(x: jax.Array) -> jax.Array:
    """Fill NaN of x [..., T] with the last value before it, or the first after it, or 0 where there
    is none.

    For families whose originals know no missing values.
    """
    observed = ~jnp.isnan(x)
    steps = jnp.arange(x.shape[-1])
    last = jax.lax.cummax(jnp.where(observed, steps, -1), axis=x.ndim - 1)
    first = jnp.argmax(observed, axis=-1, keepdims=True)

    filled = jnp.take_along_axis(x, jnp.where(last < 0, first, last), axis=-1)
    return jnp.where(observed.any(-1, keepdims=True), filled, jnp.zeros_like(x))


def interpolate_missing(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fill NaN of x [..., T] on the straight line between the observed values around it; the last
    one is repeated.

    Returns: the series, with 0 before its first value, and where it has begun [..., T].
    """
    observed = ~jnp.isnan(x)
    steps = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    axis = x.ndim - 1

    # Places of the observed values around each step; the nearer end where there is one side alone.
    last = jax.lax.cummax(jnp.where(observed, steps, -1), axis=axis)
    following = jax.lax.cummin(jnp.where(observed, steps, x.shape[-1]), axis=axis, reverse=True)
    left = jnp.maximum(last, 0)
    right = jnp.where(following < x.shape[-1], following, left)

    known = jnp.where(observed, x, 0.0)
    before, after = (jnp.take_along_axis(known, i, axis=-1) for i in (left, right))
    share = (steps - left) / jnp.maximum(right - left, 1)
    return jnp.where(last >= 0, before + (after - before) * share, 0.0), last >= 0
