"""The context that a forecast starts from: what is asked of it, and keys that follow its rows."""

from typing import Any

import jax
import jax.numpy as jnp

from ltsm_jax.trees import traced


def row_keys(key: jax.Array | None, context: jax.Array) -> jax.Array:
    """A key for each row of `context` [B, ...], a function of `key` and the row's own bits: keys [B].

    Draws made with it do not depend on where in which batch a row stands. key None: a fixed key.
    """
    key = jax.random.key(0) if key is None else key
    bits_BT = jax.lax.bitcast_convert_type(context.astype(jnp.float32), jnp.uint32).reshape(context.shape[0], -1)
    odd_T = 2 * jnp.arange(bits_BT.shape[1], dtype=jnp.uint32) + 1
    hash_B = (bits_BT * odd_T[None] * jnp.uint32(2654435761)).sum(1, dtype=jnp.uint32)
    return jax.vmap(lambda h: jax.random.fold_in(key, h))(hash_B)


def check_context(context: Any, horizon: int) -> None:
    """Raises: ValueError for a context that is not [B, C, T] with T >= 1, has an infinity or a variate without any
    observed value (seen only outside jit), or a horizon below 1."""
    problems = []
    if jnp.ndim(context) != 3 or jnp.shape(context)[-1] < 1:
        problems.append(
            f"context must be [batch, variates, time] with at least one time step, got {jnp.shape(context)}"
        )
    elif not traced(context):
        with jax.ensure_compile_time_eval():  # a caller's jit may be around an array that is known
            empty, infinite = jnp.argwhere(jnp.isnan(context).all(-1)), jnp.argwhere(jnp.isinf(context).any(-1))
        if empty.size:
            problems.append(f"no observed value at all in (batch, variate) {empty[:5].tolist()}; drop these series")
        if infinite.size:
            problems.append(f"infinite values in (batch, variate) {infinite[:5].tolist()}; set them to NaN (missing)")
    if horizon < 1:
        problems.append(f"horizon must be at least 1, got {horizon}")
    if problems:
        raise ValueError("; ".join(problems))
