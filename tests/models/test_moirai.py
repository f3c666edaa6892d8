"""Moirai 1 beyond its original: sizes, use of variates and patch sizes, missing values, losses,
fresh parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.layers import packed
from ltsm_jax.layers.packed import observed_series
from ltsm_jax.models import folders
from ltsm_jax.models.moirai import PRESETS, Moirai, MoiraiConfig

MODEL = Moirai(Moirai.small())
loss = jax.jit(lambda model, *args: model.loss(*args), static_argnums=0)
COUNTS = {"small": 13_827_528, "base": 91_357_728, "large": 310_970_624}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def series(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape).cumsum(-1)


def using(**changes):
    return Moirai(dataclasses.replace(MODEL.config, **changes))


@pytest.mark.slow
def test_published_parameter_counts():
    published = {name: config for name, config in PRESETS.items() if name.startswith("Salesforce/")}
    assert {name.rsplit("-", 1)[1] for name in published} == set(COUNTS)
    for name, config in published.items():
        assert (
            trees.count(folders.param_shapes(Moirai(config))) == COUNTS[name.rsplit("-", 1)[1]]
        ), name


@pytest.mark.slow
def test_variates_see_each_other_only_where_they_are_joint(params):
    x = series(1, 2, 32)
    other = x.at[:, 1].multiply(-1.0)
    mean = jax.jit(lambda x: MODEL.future(params, observed_series(x), 8, 8).mean())
    assert not np.allclose(mean(x)[:, 0], mean(other)[:, 0])
    alone = using(variates="independent")
    assert alone.variates == "independent"
    predict = jax.jit(lambda x: alone.predict(params, x, 8).point)
    np.testing.assert_array_equal(predict(x)[:, 0], predict(other)[:, 0])
    batch = {"context": x, "target": series(1, 2, 8, seed=2), "weight": jnp.ones(1)}
    rows = {name: jnp.swapaxes(leaf, 0, 1) for name, leaf in batch.items() if name != "weight"}
    np.testing.assert_allclose(loss(alone, params, batch), loss(MODEL, params, rows), rtol=1e-5)


@pytest.mark.slow
def test_auto_takes_the_patch_size_with_the_better_end(params):
    """Each row by itself: the forecast is that of the size that would have forecast the last steps
    best.
    """
    auto = using(patch_size="auto")
    x = observed_series(series(3, 1, 40))
    best, loss_ZB = jax.jit(lambda p, x: auto.best_future(p, x, 8, 32))(params, x)
    cut = tuple(leaf[..., -32:] for leaf in x)
    mean = jax.jit(lambda q, cut, p: MODEL.future(q, cut, 8, p).mean(), static_argnums=2)
    each = jnp.stack([mean(params, cut, p) for p in MODEL.config.patch_sizes])
    chosen = each[np.argmin(loss_ZB, 0), np.arange(3)]
    np.testing.assert_allclose(best.mean(), chosen, rtol=1e-5, atol=1e-5)
    assert auto.training_patch in MODEL.config.patch_sizes
    alone = jax.jit(lambda p, x: auto.predict(p, x, 8))(
        params, series(1, 1, 1)
    )  # nothing to choose by
    assert np.isfinite(alone.point).all()


@pytest.mark.slow
def test_loss_is_the_packed_loss_of_the_same_tokens(params):
    context, target = (
        series(2, 2, 32),
        series(2, 2, 10, seed=2).at[0, 0, 3:].set(jnp.nan).at[1, 1, :].set(jnp.nan),
    )
    tokens = packed.pack(observed_series(context), 10, 8, 8, future=observed_series(target))
    weight = jnp.asarray([2.0, 1.0])
    want = jax.jit(lambda p, x: MODEL.packed_loss(p, x, 8, weight=weight))(params, tokens)
    got = loss(MODEL, params, {"context": context, "target": target, "weight": weight})
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_forecast_follows_scale_and_offset(params):
    x = series(2, 1, 32)
    predict = jax.jit(lambda x: MODEL.future(params, observed_series(x), 8, 8).mean())
    np.testing.assert_allclose(predict(x * 1e3 + 1e5), predict(x) * 1e3 + 1e5, rtol=1e-3)


def test_samples_follow_the_key_and_give_the_point(params):
    x = series(2, 1, 32)
    predict = jax.jit(lambda x, key: MODEL.predict(params, x, 8, key))
    one, again, other = (predict(x, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.samples, again.samples)
    assert not np.array_equal(one.samples, other.samples)
    assert one.samples.shape == (2, 1, 8, MODEL.config.n_samples)
    np.testing.assert_allclose(one.point, np.median(one.samples, -1), rtol=1e-5)
    assert (np.diff(one.quantiles, axis=-1) >= 0).all()


def test_fresh_weights_of_smaller_patches_are_zero_past_them(params):
    kernel, bias = params["embed"]["kernel"], params["embed"]["bias"]
    head = params["head"]["weights"]["kernel"]
    for z, p in enumerate(MODEL.config.patch_sizes):
        assert not np.asarray(kernel[z, p:]).any()
        assert not np.asarray(head[z, :, 4 * p :]).any()
        assert 0.8 * p**-0.5 < np.abs(bias[z]).max() <= p**-0.5
        assert 0.8 * p**-0.5 < np.abs(kernel[z, :p]).max() <= p**-0.5
        assert 0.8 * 16**-0.5 < np.abs(head[z, :, : 4 * p]).max() <= 16**-0.5


@pytest.mark.slow
def test_parameters_of_half_the_width_work(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    got = jax.jit(lambda p, x: MODEL.future(p, observed_series(x), 8, 8).mean())(
        half, series(1, 1, 32)
    )
    assert np.isfinite(np.asarray(got, np.float32)).all()


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="patch_size must be auto or one of"):
        using(patch_size=5)
    with pytest.raises(ValueError, match="one of joint, independent"):
        using(variates="both")
    with pytest.raises(ValueError, match="multiple of 4"):
        using(head_dim=6)
    with pytest.raises(ValueError, match="components \\['cauchy'\\]"):
        using(components=("cauchy",))
    with pytest.raises(ValueError, match="lacks patch_sizes, distr_output"):
        MoiraiConfig.from_published({"d_model": 64, "num_layers": 1})
