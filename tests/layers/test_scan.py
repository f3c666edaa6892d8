"""Equal layers as one loop: the numbers of one layer after another, from fewer compiled layers."""

from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest

from ltsm_jax.layers import taps
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.scan import equal_runs, loops, through_layers

WIDTHS = (8, 8, 8, 6, 6, 8)


class Network(nn.Module):
    """Layers [B, 4] -> [B, 4] of several widths, in one loop where they are equal."""

    lean: bool
    shortens: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x, whole=False):
        if not loops(self, self.lean, train=False, whole=whole):
            for i, width in enumerate(WIDTHS):
                x = Layer(width, name=f"layer_{i}")(x)
            return x

        def apply(i, params, x):
            return Layer(WIDTHS[i], parent=None).apply({"params": params}, x)

        return through_layers(apply, self.variables["params"], x, equal_runs(WIDTHS))


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        wide = jax.nn.silu(Linear((4,), (self.width,), name="up")(x))
        return x + Linear((self.width,), (4,), name="down")(wide)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Network(True).init, jax.random.key(0), np.ones((3, 4), np.float32))[
        "params"
    ]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_runs_are_neighbours_of_equal_widths():
    assert equal_runs(WIDTHS) == [range(3), range(3, 5), range(5, 6)]
    assert equal_runs(tuple(zip(WIDTHS, "abbbbb", strict=True))) == [
        range(1),
        range(1, 3),
        range(3, 5),
        range(5, 6),
    ]
    assert equal_runs((8, 8, 8)) == [range(3)]


def test_the_loop_gives_the_numbers_of_its_layers(params):
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    loop = jax.jit(lambda p, x: Network(True).apply({"params": p}, x))
    each = jax.jit(lambda p, x: Network(False).apply({"params": p}, x))
    np.testing.assert_allclose(loop(params, x), each(params, x), rtol=1e-6, atol=1e-6)
    text = loop.lower(params, x).as_text()
    assert text.count("stablehlo.dot_general") == 6  # two of each of the three runs
    assert each.lower(params, x).as_text().count("stablehlo.dot_general") == 12


def test_who_watches_meets_every_layer(params):
    def run(p, x):
        with taps.arguments_of([f"layer_{i}/down" for i in range(len(WIDTHS))]) as seen:
            Network(True).apply({"params": p}, x)
        return seen

    seen = jax.eval_shape(run, params, np.ones((3, 4), np.float32))
    assert [len(calls) for calls in seen.values()] == [1] * len(WIDTHS)
