"""Patches of series: the newest whole ones of a context, the points that a token predicts, and the
pieces of a roll-out.
"""

import jax
import jax.numpy as jnp


def newest_patches(x_BCT: jax.Array, patch_len: int, most: int) -> jax.Array:
    """The newest whole patches of x [B, C, T], of at most `most` steps but at least one patch.

    A series shorter than a patch gets its first value in front, up to one.
    """
    t = x_BCT.shape[-1]
    keep = max(min(t, most) // patch_len * patch_len, patch_len)
    front = ((0, 0), (0, 0), (max(keep - t, 0), 0))
    return jnp.pad(x_BCT, front, mode="edge")[..., -keep:]


def token_labels(series_BCT: jax.Array, tokens: int, patch_len: int, points: int) -> jax.Array:
    """The `points` points [B, C, N, Q] that each of N tokens predicts.

    series_BCT: what follows the first token, its own patch left out: token i predicts the points
    from `i * patch_len` on. NaN beyond the end.
    """
    missing = max((tokens - 1) * patch_len + points - series_BCT.shape[-1], 0)
    behind = ((0, 0), (0, 0), (0, missing))
    long_BCT = jnp.pad(series_BCT, behind, constant_values=jnp.nan)
    places_NQ = patch_len * jnp.arange(tokens)[:, None] + jnp.arange(points)[None]
    return long_BCT[..., places_NQ]


def end_to_end(y_SBCP: jax.Array) -> jax.Array:
    """Lay the S pieces of a roll-out end to end: [S, B, C, P, ...] -> [B, C, S P, ...]."""
    s, b, c, p, *rest = y_SBCP.shape
    return jnp.moveaxis(y_SBCP, 0, 2).reshape(b, c, s * p, *rest)
