import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers.dropout import Dropout


def drop(x, rate, seed=0, train=True):
    return Dropout(rate).apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(99_999,), (300, 7, 49)])
def test_share_and_mean(rate, shape):
    y = np.asarray(drop(jnp.ones(shape), rate))
    n, dropped = y.size, (y == 0).mean()
    assert abs(dropped - rate) < 5 * np.sqrt(rate * (1 - rate) / n) + 2**-16
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-3)
    assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / n)


def test_neighbours_are_independent():
    # two values share one random word: their halves must not be related
    kept = np.asarray(drop(jnp.ones(200_000), 0.3)) != 0
    for shift in (1, 2):
        assert abs(np.corrcoef(kept[:-shift], kept[shift:])[0, 1]) < 5 / np.sqrt(kept.size)
    assert abs((kept[::2] & kept[1::2]).mean() - 0.49) < 5 * np.sqrt(0.25 / 100_000)


def test_off_and_repeatable():
    x = jnp.arange(5.0)
    assert drop(x, 0.5, train=False) is x and drop(x, 0.0) is x
    np.testing.assert_array_equal(drop(x, 0.5, 3), drop(x, 0.5, 3))
    assert drop(jnp.ones(3, jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_the_gradient_draws_no_word_again():
    # Each word costs 20 rounds; XLA's CPU code would draw it for each use.
    def loss(x, key):
        y = Dropout(0.5).apply({}, jnp.sin(x), True, rngs={"dropout": key})
        return jnp.square(y).sum()

    x, key = jnp.ones((64, 33)), jax.random.key(0)
    alone = jax.jit(loss).lower(x, key).compile().as_text()
    both = jax.jit(jax.value_and_grad(loss)).lower(x, key).compile().as_text()
    assert 20 < both.count(" xor(") <= alone.count(" xor(")
