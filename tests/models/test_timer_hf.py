"""Timer of the hub beyond its original: sizes, the roll-out with and without cache, missing values,
errors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import layers_of

from converters import CheckpointError
from converters import timer_hf as converter
from ltsm_jax import trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import folders
from ltsm_jax.models.timer_hf import PRESETS, TimerHf, TimerHfConfig

MODEL = TimerHf(TimerHfConfig(4, 16, 4, layers_of(4, (2, 3), (24, 8)), (4, 8), context_len=24))
predict = jax.jit(lambda model, *args: model.predict(*args).point[:, 0], static_argnums=(0, 3))
loss = jax.jit(lambda model, *args: model.loss(*args), static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def series(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape).cumsum(-1)


def test_published_parameter_count():
    assert trees.count(folders.param_shapes(TimerHf(PRESETS["thuml/timer-base-84m"]))) == 84_142_080


def test_the_cache_changes_nothing_and_heads_follow_the_remaining_length(params):
    """20 points: heads of 8, 8 and 4; anew on the whole sequence with one scale gives the same."""
    x = series(2, 24)
    mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True) + 1e-6
    got, grown = predict(MODEL, params, x[:, None], 20), (x - mean) / std
    for q in (8, 8, 4):
        heads, _ = jax.jit(MODEL.apply)(params, grown[:, None])
        grown = jnp.concatenate([grown, heads[MODEL.config.horizons.index(q)][:, 0, -1]], -1)
    np.testing.assert_allclose(got, grown[:, 24:] * std + mean, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_heads_that_predict_no_whole_patches(params):
    odd = TimerHf(dataclasses.replace(MODEL.config, horizons=(4, 6)))
    params = jax.jit(odd.init)(jax.random.key(0))
    assert np.isfinite(predict(odd, params, series(2, 1, 24), 16)).all()
    with pytest.raises(
        ValueError, match=r"can't go on with heads of \[6, 6, 4\] points and patches of 4"
    ):
        odd.generate_as_original(params, series(2, 24), 16)


def test_the_originals_scaling_is_a_switch(params):
    """It differs from the second step on, unless the series is so long that it makes
    no difference.
    """
    x = series(2, 1, 24)
    found = {}
    for scaling in ("context", "fed", "sequence"):
        model = TimerHf(dataclasses.replace(MODEL.config, scaling=scaling))
        found[scaling] = np.asarray(predict(model, params, x, 16))
    for other in ("fed", "sequence"):
        np.testing.assert_allclose(
            found["context"][:, :8], found[other][:, :8], rtol=1e-4, atol=1e-5
        )
        assert np.abs(found["context"] - found[other])[:, 8:].max() > 1e-4


def test_missing_targets_do_not_count(params):
    batch = {"context": series(3, 1, 24), "target": series(3, 1, 8, seed=2)}
    whole = loss(MODEL, params, batch)
    hole = loss(MODEL, params, batch | {"target": batch["target"].at[:, :, 5].set(jnp.nan)})
    assert np.isfinite(hole) and hole != whole
    gap = loss(MODEL, params, batch | {"context": batch["context"].at[:, :, 9].set(jnp.nan)})
    assert np.isfinite(gap) and gap != whole


def test_the_loss_has_no_scale(params):
    batch = {"context": series(3, 1, 24), "target": series(3, 1, 8, seed=2)}
    scaled = {name: 1e3 * value + 5e3 for name, value in batch.items()}
    np.testing.assert_allclose(loss(MODEL, params, scaled), loss(MODEL, params, batch), rtol=1e-3)


def test_config_lists_all_its_problems():
    with pytest.raises(ValueError) as info:
        TimerHfConfig(
            4,
            16,
            3,
            (),
            (4, 4),
            context_len=2,
            activation="swoosh",
            scaling="none at all",
        )  # type: ignore[arg-type]
    for word in (
        "at least one layer",
        "even width",
        "hold one patch (4)",
        "must differ",
        "silu",
        "none at all",
    ):
        assert word in str(info.value)


def state_of(config):
    flat = {}
    shapes = folders.param_shapes(TimerHf(config))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    from converters import tables

    flat, _ = tables.to_state(converter.keys(config), params)
    return flat


def test_contradictions_are_listed():
    config = dataclasses.replace(MODEL.config, layers=equal_layers(2, 4, 4, 24))
    state, fields = state_of(config), converter.published(config)
    assert converter.configure(state, fields, "file")[0] == dataclasses.replace(
        config, context_len=120
    )
    wrong = fields | {
        "hidden_size": 18,
        "num_attention_heads": "x" * 9999,
        "output_token_lens": [4, 9],
    }
    wrong |= {"num_hidden_layers": 1 << 40, "hidden_act": None, "initializer_range": float("nan")}
    del wrong["intermediate_size"]
    with pytest.raises(CheckpointError) as info:
        converter.configure(state, wrong, "file")
    lines = str(info.value).split("\n  ")
    assert len(lines) == 8 and max(map(len, lines)) < 300
    for word in (
        "config says 18, the weights 16",
        "intermediate_size: missing",
        "says 9 for head 1, the weights 8",
    ):
        assert word in str(info.value)
    with pytest.raises(CheckpointError, match=r"number of heads.*config.json"):
        converter.configure(state, None, "file")


def test_a_pruned_model_is_not_exported():
    with pytest.raises(ValueError, match="can't be exported"):
        converter.published(MODEL.config)
