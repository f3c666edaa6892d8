"""The context that a forecast starts from: what is asked of it, and keys that follow its rows."""

from typing import Any

import jax
import jax.numpy as jnp

from ltsm_jax.trees import traced

LARGEST = 1e16  # beyond it a sum of squares of a long context overflows float32


def check_context(context: Any, horizon: int) -> None:
    """Refuse a context that no forecast can follow; its values are seen outside jit alone.

    Raises: ValueError for a context that is not [B, C, T] with T >= 1, a variate without any
      observed value, infinite values or ones beyond `LARGEST`, or a horizon below 1.
    """
    problems = []
    if jnp.ndim(context) != 3 or jnp.shape(context)[-1] < 1:
        shape = jnp.shape(context)
        problems.append(
            f"context must be [batch, variates, time] with at least one time step, got {shape}"
        )
    elif not traced(context):
        problems += _value_problems(context)
    if horizon < 1:
        problems.append(f"horizon must be at least 1, got {horizon}")
    if problems:
        raise ValueError("; ".join(problems))


def _value_problems(context: Any) -> list[str]:
    with jax.ensure_compile_time_eval():  # a caller's jit may be around an array that is known
        infinite = jnp.isinf(context)
        huge = (jnp.abs(context) > LARGEST) & ~infinite
        checks = (
            (jnp.isnan(context).all(-1), "no observed value at all in {}; drop these series"),
            (infinite.any(-1), "infinite values in {}; set them to NaN (missing)"),
            (
                huge.any(-1),
                f"values beyond {LARGEST:g} in {{}}; divide these series by their scale",
            ),
        )
        found = [(jnp.argwhere(bad_BC)[:5].tolist(), message) for bad_BC, message in checks]
    return [message.format(f"(batch, variate) {places}") for places, message in found if places]


def row_keys(key: jax.Array | None, context: jax.Array) -> jax.Array:
    """A key for each row of `context` [B, ...], a function of `key` and the row's own bits: keys
    [B].

    Draws made with it do not depend on where in which batch a row stands. key None: a fixed key.
    """
    key = jax.random.key(0) if key is None else key
    bits_BT = jax.lax.bitcast_convert_type(context.astype(jnp.float32), jnp.uint32).reshape(
        context.shape[0], -1
    )
    odd_T = 2 * jnp.arange(bits_BT.shape[1], dtype=jnp.uint32) + 1
    hash_B = (bits_BT * odd_T[None] * jnp.uint32(2654435761)).sum(1, dtype=jnp.uint32)
    return jax.vmap(lambda h: jax.random.fold_in(key, h))(hash_B)


def with_covariates(context: Any, past: Any, known: Any) -> tuple[jax.Array, jax.Array | None]:
    """Put covariates behind the targets of a group: its members [G, M, T], and what is known ahead
    of the last A of them [G, A, R], or None.

    context: [G, C, T]. past: [G, K, T] or None. known: [G, A, T + R] or None.
    """
    members, ahead = [jnp.asarray(context, jnp.float32)], None
    t = members[0].shape[-1]
    if past is not None:
        members.append(jnp.asarray(past, jnp.float32))
    if known is not None and known.shape[1]:
        known = jnp.asarray(known, jnp.float32)
        members.append(known[..., :t])
        ahead = known[..., t:]
    return jnp.concatenate(members, axis=1), ahead
