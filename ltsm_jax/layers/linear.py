"""Linear layers as products of two plain matrices."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers.runtime import Runtime


def compute_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype in which a product with x is to be computed: what the program's runtime says, else
    x's own.
    """
    return jnp.dtype(Runtime.current().compute or x.dtype)


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axes of `inputs` shape, giving `outputs` shape.

    kernel [*inputs, *outputs], bias [*outputs]: with heads as axes of their own, a pruned head is a
    shorter axis. The values come from the family's `init`; here they are zeros of the right shape.
    A layer that has lost all its heads or units has no kernel, and is its bias, or 0.

    role: "router" for a linear that weighs others up and is no part of the function itself: it is
    never pruned and gets no adapters.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = True
    role: Literal["plain", "router"] = "plain"

    @nn.compact
    def __call__(self, x):
        dtype = compute_dtype(x)
        batch, n, m = (
            x.shape[: x.ndim - len(self.inputs)],
            math.prod(self.inputs),
            math.prod(self.outputs),
        )
        rows = math.prod(batch)
        if n and m:
            kernel = self.param(
                "kernel", nn.initializers.zeros, (*self.inputs, *self.outputs)
            ).astype(dtype)
            # one product of two matrices, whatever the batch and head axes: XLA's CPU code takes
            # less than half the time of the backward pass of a product with two batch axes
            y = x.astype(dtype).reshape(rows, n) @ kernel.reshape(n, m)
        else:  # no arrays without values: neither files nor optimisers need to know of them
            y = jnp.zeros((rows, m), dtype)
        if self.use_bias and m:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs).astype(dtype).reshape(
                1, m
            )
        return y.reshape(*batch, *self.outputs)
