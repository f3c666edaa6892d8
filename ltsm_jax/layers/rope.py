"""Rotary position embedding (Su et al., arXiv 2104.09864) in the two layouts that the
families use.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


def rotary_frequencies(k: int, base: float = 10000.0) -> np.ndarray:
    """base**(-2j/K), j = 0..K/2-1, float32: on the host, since an accelerator's power is off by so
    much that far positions turn by another angle.
    """
    return (base ** (-np.arange(0, k, 2) / k)).astype(np.float32)


def rotary(
    x: jax.Array,
    positions: jax.Array,
    *,
    base: float = 10000.0,
    pairs: Literal["halves", "adjacent"] = "halves",
    frequencies: np.ndarray | None = None,
) -> jax.Array:
    """Rotates the last axis of x by angles `position * base**(-2j/K)`, j = 0..K/2-1.

    Args:
      x: [..., K], K even.
      positions: integers or floats that broadcast to x without its last axis (same rank, axes of
        length 1 allowed).
      pairs: which elements turn together: "halves" (j, j + K/2) as in Llama, "adjacent" (2j, 2j +
        1) as in the paper.
      frequencies: [..., K/2] that broadcasts to x's pairs, for x that has lost some of its pairs;
        None: of all pairs.
    Returns: [..., K] in the dtype of x; angles are computed in float32.
    """
    k = x.shape[-1]
    if frequencies is None:
        frequencies = rotary_frequencies(k, base).reshape((1,) * positions.ndim + (k // 2,))
    angle = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide = x.astype(jnp.float32)
    if pairs == "halves":
        a, b = wide[..., : k // 2], wide[..., k // 2 :]
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = wide[..., ::2], wide[..., 1::2]
        y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return y.astype(x.dtype)
