"""Dropout at half the price of its random numbers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers.threefry import random_words


class Dropout(nn.Module):
    """Zeroes each value with probability `rate` and scales the others up, from 16 random bits a
    value.

    Random numbers are what dropout costs, and `nn.Dropout` draws 32 bits a value. The rate is
    rounded to a multiple of 2**-16 and the scale made to match, so the mean is kept exactly.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return x
        kept = round((1 - self.rate) * 2**16)
        n = math.prod(x.shape)
        words = random_words(self.make_rng("dropout"), -(-n // 2))
        bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:n].reshape(x.shape)
        return jnp.where(
            bits < jnp.uint16(kept), x * jnp.asarray(2**16 / kept, x.dtype), jnp.zeros_like(x)
        )
