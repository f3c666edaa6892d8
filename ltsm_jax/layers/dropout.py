"""Dropout at half the price of its random numbers."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.layers.threefry import random_words

STEPS = 2**16  # of the rate


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
        kept = round((1 - self.rate) * STEPS)
        key, draw = self.make_rng("dropout"), functools.partial(_keeps, shape=x.shape, kept=kept)
        runtime = Runtime.current()
        keeps = _once(draw, key) if runtime.on_cpu and not runtime.placement.mesh else draw(key)
        return jnp.where(keeps, x * jnp.asarray(STEPS / kept, x.dtype), jnp.zeros_like(x))


@functools.partial(jax.jit, static_argnames=("shape", "kept"))
def _keeps(key: jax.Array, *, shape: tuple[int, ...], kept: int) -> jax.Array:
    """Draw which values are kept, `kept` of 2**16 on average."""
    n = math.prod(shape)
    bits = jax.lax.bitcast_convert_type(random_words(key, -(-n // 2)), jnp.uint16)
    return bits.reshape(-1)[:n].reshape(shape) < jnp.uint16(kept)


def _once(draw, key: jax.Array) -> jax.Array:
    """`draw(key)`, an array that is computed once.

    XLA's CPU code would draw the words anew for each half of them, for each use of the result and
    in the backward pass. It keeps what a branch gives, as long as it cannot tell which one is
    taken: it is always the first.
    """
    taken = (jax.random.key_data(key).reshape(-1)[0] | 1) > 0
    shape = jax.eval_shape(draw, key)
    return jax.lax.cond(taken, draw, lambda key: jnp.zeros(shape.shape, shape.dtype), key)
