"""Normalisation layers that several families share."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32; no mean is taken off, no
    bias.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), as in T5
    and Llama.
    """

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
