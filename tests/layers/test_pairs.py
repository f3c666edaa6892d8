"""Pairs of float32: sums and products as exact as in float64."""

import jax
import numpy as np

from ltsm_jax.layers import pairs


def numbers(n, seed=0):
    """Numbers of very different sizes and both signs."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=n) * 10.0 ** rng.integers(-6, 7, size=n)).astype(np.float32)


def pair(x):
    """float64 as a pair, to the last bit that a pair has."""
    high = np.float32(x)
    return high, np.float32(x - high)


def value(x):
    return np.asarray(x[0], np.float64) + np.asarray(x[1], np.float64)


def test_a_sum_of_two_loses_nothing():
    a, b = numbers(1000), numbers(1000, 1)
    got = jax.jit(pairs.two_sum)(a, b)
    np.testing.assert_array_equal(value(got), np.float64(a) + np.float64(b))
    np.testing.assert_array_equal(got[0], a + b)


def test_products_quotients_and_sums_of_pairs():
    x, y = (np.float64(numbers(1000, i)) * (1 + 1e-9 * i) for i in (2, 3))
    n = np.arange(1, 1001, dtype=np.float32)
    for got, want in (
        (jax.jit(pairs.times)(pair(x), pair(y)), x * y),
        (jax.jit(pairs.over)(pair(x), n), x / n),
    ):
        np.testing.assert_allclose(value(got), want, rtol=1e-13)
    got = value(jax.jit(pairs.plus)(pair(x), pair(y)))
    assert (np.abs(got - (x + y)) <= 1e-13 * (np.abs(x) + np.abs(y))).all()


def test_a_long_sum_that_cancels():
    """1e8 and as much less; float32 keeps nothing of the rest."""
    rest = numbers(501)
    x = np.concatenate([np.full(250, 1e8, np.float32), rest, np.full(250, -1e8, np.float32)])
    got = value(jax.jit(pairs.total)((x, np.zeros_like(x))))
    want = np.float64(rest).sum()
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert abs(x.sum(dtype=np.float32) - want) > 1e-7 * abs(want)
