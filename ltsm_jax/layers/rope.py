"""Rotary position embedding (Su et al., arXiv 2104.09864) in the two layouts that the families use."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


def rotary(
    x: jax.Array, positions: jax.Array, *, base: float = 10000.0, pairs: Literal["halves", "adjacent"] = "halves"
) -> jax.Array:
    """Rotates the last axis of x by angles `position * base**(-2j/K)`, j = 0..K/2-1.

    Args:
      x: [..., K], K even.
      positions: integers or floats that broadcast to x without its last axis (same rank, axes of length 1 allowed).
      pairs: which elements turn together: "halves" (j, j + K/2) as in Llama, "adjacent" (2j, 2j + 1) as in the paper.
    Returns: [..., K] in the dtype of x; angles are computed in float32.
    """
    k = x.shape[-1]
    # on the host: an accelerator's power is off by so much that far positions turn by another angle
    frequency = (base ** (-np.arange(0, k, 2) / k)).astype(np.float32)
    angle = positions[..., None].astype(jnp.float32) * frequency.reshape((1,) * positions.ndim + (-1,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide = x.astype(jnp.float32)
    if pairs == "halves":
        a, b = wide[..., : k // 2], wide[..., k // 2 :]
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = wide[..., ::2], wide[..., 1::2]
        y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return y.astype(x.dtype)
