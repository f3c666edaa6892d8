"""Moirai 2 beyond its original: sizes, filling and padding, the roll-out of several variates,
losses.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.layers import packed
from ltsm_jax.models import folders
from ltsm_jax.models.moirai_2 import PRESETS, Moirai2, causal_mean

MODEL = Moirai2(Moirai2.small())
predict = jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def series(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape).cumsum(-1)


def using(**changes):
    return Moirai2(dataclasses.replace(MODEL.config, **changes))


def test_published_parameter_count():
    assert (
        trees.count(folders.param_shapes(Moirai2(PRESETS["Salesforce/moirai-2.0-R-small"])))
        == 11_387_208
    )


def test_missing_values_take_the_mean_so_far():
    nan = jnp.nan
    got = causal_mean(
        jnp.asarray([[nan, nan, 4.0, nan, 7.0, nan, nan], [2.0, nan, nan, 8.0, nan, 1.0, nan]])
    )
    # a missing point counts as the last one observed: 0, 0, 4, 4, 7, 7 before the end of row 1
    np.testing.assert_allclose(got[0], [0, 0, 4, 4 / 3, 7, 15 / 5, 22 / 6], rtol=1e-6)
    np.testing.assert_allclose(got[1], [2, 2, 2, 8, 14 / 4, 1, 23 / 6], rtol=1e-6)
    far = causal_mean(jnp.asarray([[1e6, 1e6 + 1, nan, 1e6 + 2, nan]]))
    np.testing.assert_allclose(far[0], [1e6, 1e6 + 1, 1e6 + 0.5, 1e6 + 2, 1e6 + 1], rtol=1e-7)


def test_short_series_are_filled_with_their_first_value():
    x = jnp.asarray([[[3.0, 1.0, jnp.nan, 2.0, 5.0]]])
    values, observed = MODEL.prepare(x)
    np.testing.assert_array_equal(values[0, 0], [3, 3, 3, 3, 1, 2, 2, 5])
    np.testing.assert_array_equal(observed[0, 0], [1, 1, 1, 1, 1, 0, 1, 1])
    assert using(context_len=6).prepare(x)[0].shape[-1] == 6, "never more than the context"
    assert MODEL.prepare(series(1, 1, 100))[0].shape[-1] == MODEL.context_len
    np.testing.assert_array_equal(using(missing="zero").prepare(x)[0][0, 0, 5], 0.0)


@pytest.mark.slow
def test_series_of_one_value_in_every_variate_roll_out_as_one(params):
    """Two equal variates that never see each other forecast what one does."""
    apart = jax.tree.map(lambda leaf: leaf, params)
    for name in ("layer_0", "layer_1"):
        apart[name]["attn"]["variate_bias"] = jnp.asarray([[-1e4] * 2, [0.0] * 2])
    x = series(2, 1, 32)
    one = predict(MODEL, apart, x, 20)
    both = predict(MODEL, apart, jnp.concatenate([x, x * 3 + 1], axis=1), 20)
    np.testing.assert_allclose(both.quantiles[:, :1], one.quantiles, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(both.quantiles[:, 1:], one.quantiles * 3 + 1, rtol=1e-3, atol=1e-3)
    alone = predict(using(variates="independent"), params, jnp.concatenate([x, x + 5], axis=1), 20)
    want = predict(MODEL, params, x, 20)
    np.testing.assert_allclose(alone.quantiles[:, :1], want.quantiles, rtol=1e-4, atol=1e-4)


def test_the_start_of_a_long_forecast_is_the_short_forecast(params):
    x = series(2, 2, 32)
    short, long = (predict(MODEL, params, x, h) for h in (8, 20))
    np.testing.assert_allclose(long.quantiles[:, :, :8], short.quantiles, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(long.point, long.quantiles[..., 1])


def test_a_median_that_is_no_level_lies_between_two(params):
    odd = using(levels=(0.2, 0.6, 0.9))
    x, weights = series(1, 1, 32), np.asarray([0.25, 0.75])
    found = predict(odd, params, x, 4)
    np.testing.assert_allclose(found.point, found.quantiles[..., :2] @ weights, rtol=1e-5)
    assert found.levels == (0.2, 0.6, 0.9)


@pytest.mark.slow
def test_loss_of_one_variate_is_the_packed_loss(params):
    x = series(2, 1, 40)
    tokens = packed.pack(
        (x[..., :32], jnp.ones((2, 1, 32), bool)),
        8,
        4,
        4,
        future=(x[..., 32:], jnp.ones((2, 1, 8), bool)),
    )
    want, loss = jax.jit(MODEL.packed_loss)(params, tokens), jax.jit(MODEL.loss)
    np.testing.assert_allclose(
        loss(params, {"context": x[..., :32], "target": x[..., 32:]}), want, rtol=1e-5
    )
    two = jnp.concatenate([x, -x], axis=1)
    both = loss(params, {"context": two[..., :32], "target": two[..., 32:]})
    assert np.isfinite(both) and both != want
    with pytest.raises(ValueError, match="reaches 8 steps, not 9"):
        MODEL.point_loss(params, {"context": x[..., :31], "target": x[..., 31:]})


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="must rise within"):
        using(levels=(0.5, 0.1))
    with pytest.raises(ValueError, match="one of mean, zero"):
        using(missing="last")
    with pytest.raises(ValueError, match="lacks d_ff, num_predict_token, quantile_levels"):
        type(MODEL.config).from_published({"patch_size": 8, "d_model": 64, "num_layers": 1})
