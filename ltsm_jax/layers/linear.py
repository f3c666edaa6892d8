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
    transposed: computed as `(kernel.T @ x.T + bias).T`, for a caller who has the inputs on the
    first axis and transposes before and after. XLA drops both transposes, and its CPU code is
    quicker at this product than at one with a transposed left side.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = True
    role: Literal["plain", "router"] = "plain"
    transposed: bool = False

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
            x, kernel = x.astype(dtype).reshape(rows, n), kernel.reshape(n, m)
            y = kernel.T @ x.T if self.transposed else x @ kernel
        else:  # no arrays without values: neither files nor optimisers need to know of them
            y = jnp.zeros((m, rows) if self.transposed else (rows, m), dtype)
        if self.use_bias and m:
            bias = self.param("bias", nn.initializers.zeros, self.outputs).astype(dtype)
            y = y + bias.reshape((m, 1) if self.transposed else (1, m))
        y = y.T if self.transposed else y
        return y.reshape(*batch, *self.outputs)
