"""Packed tokens: their scale, their order, and the loss over them."""

import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers import packed


def series(b, c, t, seed=0):
    x = np.random.default_rng(seed).normal(size=(b, c, t)).astype(np.float32)
    return x, np.ones_like(x, bool)


@pytest.mark.parametrize(
    "offset, size", [(0, 1), (1e4, 1), (1e6, 10), (-3e7, 100), (0, 1e-8), (0, 1e15), (0, 1e30)]
)
def test_scale_is_that_of_float64(offset, size):
    x, observed = series(2, 2, 30)
    x = (x * size + offset).astype(np.float32)
    observed[0, 1, 5:9] = False
    tokens = packed.pack((jnp.asarray(x), jnp.asarray(observed)), 4, 4, 4)
    loc, scale = packed.token_scale(tokens)
    wide = x.astype(np.float64)
    for b in range(2):
        for c in range(2):
            seen = wide[b, c][observed[b, c]]
            np.testing.assert_allclose(loc[b, c * 8, 0], seen.mean(), rtol=2e-7, atol=1e-6 * size)
            np.testing.assert_allclose(
                scale[b, c * 8, 0], np.sqrt(seen.var(ddof=1) + 1e-5), rtol=3e-6
            )


def test_scale_of_what_is_constant_missing_or_padding():
    x = jnp.asarray([[[5.0] * 8], [[0.0] * 8], [[1.0] * 8]])
    observed = jnp.asarray([[[True] * 8], [[False] * 8], [[True] + [False] * 7]])
    tokens = packed.pack(
        (x, observed), 4, 4, 4, begun_BT=jnp.asarray([[True] * 8, [False] * 8, [True] * 8])
    )
    loc, scale = packed.token_scale(tokens)
    tiny = np.sqrt(1e-5)
    np.testing.assert_allclose(loc[:, 0, 0], [5.0, 0.0, 1.0])
    np.testing.assert_allclose(scale[:, 0, 0], [tiny, 1.0, tiny], rtol=1e-6)
    np.testing.assert_allclose(
        scale[1, 2, 0], tiny, rtol=1e-6
    )  # the future of a series without a past is no padding


def test_order_times_and_padding_of_a_forecast():
    x, observed = series(1, 2, 10)
    observed[:, :, :3] = False
    tokens = packed.pack((jnp.asarray(x), jnp.asarray(observed)), 5, 4, 6)
    assert tokens.target.shape == (1, 2 * 3 + 2 * 2, 6)
    np.testing.assert_array_equal(tokens.variate_id[0], [0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
    np.testing.assert_array_equal(tokens.time_id[0], [0, 0, 1, 0, 0, 1, 2, 3, 2, 3])
    np.testing.assert_array_equal(tokens.predicted[0], [0] * 6 + [1] * 4)
    np.testing.assert_array_equal(tokens.target[0, 2], [*x[0, 0, 6:], 0, 0])
    np.testing.assert_array_equal(tokens.observed[0, 7], [1, 0, 0, 0, 0, 0])
    first, last = packed.future_tokens(2, 10, 5, 4)
    assert (first, last) == (6, 10)
    found = packed.unpack(jnp.arange(24.0).reshape(1, 4, 6), 2, 5, 4)
    np.testing.assert_array_equal(found[0], [[0, 1, 2, 3, 6], [12, 13, 14, 15, 18]])


def test_every_variate_counts_alike_in_the_loss():
    x, observed = series(2, 2, 4)
    future = (
        jnp.zeros((2, 2, 4)),
        jnp.asarray([[[1, 1, 1, 1], [1, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]], bool),
    )
    tokens = packed.pack((jnp.asarray(x), jnp.asarray(observed)), 4, 4, 4, future=future)
    error = (
        jnp.zeros((2, 4, 4))
        .at[0, 2]
        .set(1.0)
        .at[0, 3]
        .set(4.0)
        .at[1, 2]
        .set(7.0)
        .at[:, :2]
        .set(99.0)
    )
    np.testing.assert_allclose(packed.group_mean(error, tokens), (1 + 4 + 7) / 3, rtol=1e-6)
    np.testing.assert_allclose(
        packed.group_mean(error, tokens, jnp.asarray([1.0, 0.0])), 2.5, rtol=1e-6
    )


def test_default_width_of_the_feed_forward_layers():
    assert [packed.default_ffn_dim(d) for d in (384, 768, 1024)] == [1024, 2048, 2736]


def test_scale_of_a_variate_is_that_of_its_tokens():
    x, observed = series(2, 3, 10)
    x[:, 1] += 1e4
    observed[0, 2, 4:7] = False
    begun = np.ones((2, 10), bool)
    begun[1, :6], observed[1, :, :6] = False, False
    x, observed = jnp.asarray(x), jnp.asarray(observed)
    tokens = packed.pack((x, observed), 5, 4, 8, begun_BT=jnp.asarray(begun))
    assert (np.asarray(tokens.sample_id) == 0).any(), "some tokens are padding"
    got = packed.scale_of_variates(tokens, *packed.series_scale(x, observed))
    for one, want in zip(got, packed.token_scale(tokens), strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-6, atol=1e-6)
