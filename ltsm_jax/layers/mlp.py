"""Feed-forward layers, plain and gated; activations under the names of published configs."""

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.linear import Linear

Activation = Callable[[jax.Array], jax.Array]


def identity(x: jax.Array) -> jax.Array:
    """Give x back: what a published config calls the activation "none"."""
    return x


def gelu(x: jax.Array) -> jax.Array:
    """x times the share of a standard normal distribution below x.

    By the error function, as in PyTorch, in float32. `nn.gelu` takes its complement, which is exact
    also where the result is next to nothing, and takes longer on a CPU.
    """
    x_32 = x.astype(jnp.float32)
    return (x_32 * (0.5 * (1 + jax.lax.erf(x_32 * math.sqrt(0.5))))).astype(x.dtype)


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": gelu,
    "gelu_new": nn.gelu,  # the approximation with tanh
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "none": identity,
}


def feed_forward(
    x: jax.Array,
    width: int,
    activation: str,
    *,
    use_bias: bool = True,
    dropout: Activation = identity,
) -> jax.Array:
    """`down(dropout(activation(up(x))))` over the last axis: [..., D] -> [..., D], F inside.

    The two linears are made in the module that calls, which therefore must be in its `__call__`:
    they are its `up` and `down`.

    width: F. dropout: of what is inside.
    """
    d = x.shape[-1]
    y = ACTIVATIONS[activation](Linear((d,), (width,), use_bias, name="up")(x))
    return Linear((width,), (d,), use_bias, name="down")(dropout(y))


def gated_feed_forward(
    x: jax.Array, width: int, activation: str = "silu", *, dropout: Activation = identity
) -> jax.Array:
    """`down(dropout(activation(gate(x)) * up(x)))`, no biases: [..., D] -> [..., D], F inside.

    The three linears are made in the module that calls, as those of `feed_forward`.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    d = x.shape[-1]
    gate = Linear((d,), (width,), use_bias=False, name="gate")(x)
    up = Linear((d,), (width,), use_bias=False, name="up")(x)
    y = dropout(ACTIVATIONS[activation](gate) * up)
    return Linear((width,), (d,), use_bias=False, name="down")(y)


class GatedMLP(nn.Module):
    """`gated_feed_forward` as a module, with dropout inside and behind: [..., D] -> [..., D]."""

    ffn_dim: int
    activation: str = "silu"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = False):
        def drop(y):
            return Dropout(self.dropout)(y, train)

        return drop(gated_feed_forward(x, self.ffn_dim, self.activation, dropout=drop))
