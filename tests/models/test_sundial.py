"""Sundial beyond its original: sizes, draws, the median path, the loss, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

from converters import CheckpointError, tables
from converters import sundial as converter
from ltsm_jax import trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import folders
from ltsm_jax.models.sundial import PRESETS, Sundial, SundialConfig, median

MODEL = Sundial(
    SundialConfig(
        patch_len=4,
        horizon=8,
        d_model=8,
        head_dim=4,
        layers=equal_layers(1, 2, 4, 12),
        embed_dim=12,
        flow_depth=1,
        context_len=16,
        sampling_steps=3,
        n_samples=4,
        init_std=0.3,
    )
)
predict = jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3))
loss = jax.jit(lambda model, *args: model.loss(*args), static_argnums=(0, 4))
generate = jax.jit(lambda model, *args: model.generate(*args), static_argnums=(0, 3))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def series(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape).cumsum(-1)


def test_published_parameter_count():
    assert (
        trees.count(folders.param_shapes(Sundial(PRESETS["thuml/sundial-base-128m"])))
        == 128_329_680
    )


def test_draws_follow_key_and_series(params):
    x = series(3, 1, 16)
    one, same = (predict(MODEL, params, x, 8, jax.random.key(3)) for _ in range(2))
    np.testing.assert_array_equal(one.samples, same.samples)
    other = predict(MODEL, params, x, 8, jax.random.key(4))
    assert np.abs(np.asarray(one.samples - other.samples)).min() > 0
    np.testing.assert_allclose(one.point, one.samples.mean(-1), rtol=1e-5, atol=1e-5)
    quantiles = np.asarray(one.quantiles)
    assert (quantiles[..., 1:] >= quantiles[..., :-1]).all() and quantiles.shape[-1] == len(
        one.levels
    )
    spread = np.asarray(one.samples).std(-1)
    assert (spread > 0).all()


def test_all_samples_go_on_from_the_median(params):
    """The second step is a first step after context and median, in the scale of the context."""
    x, noise = series(2, 16), jax.random.normal(jax.random.key(7), (2, 2, 4, 8))
    mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True) + 1e-5
    both = generate(MODEL, params, x, 16, noise)
    z = (x - mean) / std
    first = (both[..., :8] - mean[:, None]) / std[:, None]
    longer = jnp.concatenate([z, median(first)], -1)
    state, _ = jax.jit(MODEL.apply)(params, longer[:, None])
    want = jax.jit(MODEL.sample)(params, state[:, 0, -1], noise[1])
    np.testing.assert_allclose(
        both[..., 8:], want * std[:, None] + mean[:, None], rtol=1e-4, atol=1e-4
    )


def test_the_median_of_an_even_number_is_the_lower():
    np.testing.assert_array_equal(median(jnp.asarray([[[4.0], [1], [3], [2]]])), [[2.0]])
    np.testing.assert_array_equal(median(jnp.asarray([[[4.0], [1], [3]]])), [[3.0]])


def test_draws_that_are_no_whole_patches():
    model = Sundial(dataclasses.replace(MODEL.config, horizon=6))
    found = predict(model, jax.jit(model.init)(jax.random.key(0)), series(1, 1, 15), 13, None)
    assert found.point.shape == (1, 1, 13) and np.isfinite(found.point).all()


def test_the_loss_has_no_scale_and_skips_what_is_missing(params):
    batch, key = {"context": series(3, 1, 16), "target": series(3, 1, 8, seed=2)}, jax.random.key(5)
    one = loss(MODEL, params, batch, key, False)
    scaled = {name: 1e3 * value + 5e3 for name, value in batch.items()}
    np.testing.assert_allclose(loss(MODEL, params, scaled, key, False), one, rtol=1e-2)
    assert loss(MODEL, params, batch, jax.random.key(6), False) != one
    for name, place in (("target", (0, 0, slice(2, None))), ("context", (1, 0, slice(0, 5)))):
        hole = loss(MODEL, params, batch | {name: batch[name].at[place].set(jnp.nan)}, key, False)
        assert np.isfinite(hole) and hole != one


def test_config_lists_all_its_problems():
    with pytest.raises(ValueError) as info:
        SundialConfig(4, 8, 8, 3, (), 12, -1, context_len=16, activation="swoosh")
    for word in ("at least one layer", "flow_depth must be 0 to 64, got -1", "even width", "silu"):
        assert word in str(info.value)


def test_contradictions_are_listed():
    shapes = folders.param_shapes(MODEL)
    state, _ = tables.to_state(
        converter.keys(MODEL.config), jax.tree.map(lambda s: np.zeros(s.shape, "f4"), shapes)
    )
    fields = converter.published(MODEL.config)
    want = dataclasses.replace(MODEL.config, context_len=720, n_samples=20)
    assert converter.configure(state, fields, "file")[0] == want
    wrong = fields | {
        "hidden_size": 9,
        "num_sampling_steps": 1 << 40,
        "output_token_lens": [],
        "flow_loss_depth": 2,
    }
    wrong |= {"num_attention_heads": True, "dropout_rate": "much"}
    with pytest.raises(CheckpointError) as info:
        converter.configure(state, wrong, "file")
    lines = str(info.value).split("\n  ")
    assert len(lines) == 8 and "flow_loss_depth: the config says 2, the weights 1" in lines, str(
        info.value
    )
    with pytest.raises(CheckpointError, match=r"number of heads.*config.json"):
        converter.configure(state, None, "file")
    with pytest.raises(ValueError, match="can't be exported"):
        converter.published(narrowed(MODEL.config, 0, ffn=5))
