"""The block that takes patches into a model and forecasts out of it: two layers beside a linear
one.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.linear import Linear


class ResidualBlock(nn.Module):
    """`dropout(out(activation(hidden(x)))) + residual(x)` over the last axis: [..., inputs] ->
    [..., outputs].
    """

    inputs: int
    hidden: int
    outputs: int
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    use_bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = False):
        into, out, bias = (self.inputs,), (self.outputs,), self.use_bias
        y = self.activation(Linear(into, (self.hidden,), bias, name="hidden")(x))
        y = Linear((self.hidden,), out, bias, name="out")(y)
        return Dropout(self.dropout)(y, train) + Linear(into, out, bias, name="residual")(x)
