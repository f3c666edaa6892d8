"""Timer-XL beyond its original: sizes, who sees whom, joint and independent variates, the loss,
errors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

from converters import CheckpointError, tables
from converters import timer_xl as converter
from ltsm_jax import trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import folders
from ltsm_jax.models.timer_xl import PRESETS, TimerXL, TimerXLConfig, variate_mask

MODEL = TimerXL(TimerXLConfig(4, 4, 16, 8, equal_layers(1, 2, 8, 24), context_len=16, dropout=0.1))
ALONE = TimerXL(dataclasses.replace(MODEL.config, joint=False))
predict = jax.jit(lambda model, *args: model.predict(*args).point, static_argnums=(0, 3))
loss = jax.jit(lambda model, *args: model.loss(*args), static_argnums=(0, 4))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def series(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape).cumsum(-1)


def test_published_parameter_count():
    model = TimerXL(PRESETS["timer_xl"])
    assert trees.count(folders.param_shapes(model)) == 67_398_880
    assert model.variates == "independent", "its bias between variates was never trained"


def test_masks():
    """Two variates of two tokens, one variate after the other."""
    seen, same = variate_mask(2, 2, covariate=False)
    np.testing.assert_array_equal(seen, [[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(same, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    seen, _ = variate_mask(2, 2, covariate=True)
    np.testing.assert_array_equal(seen, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])


def test_variates_see_each_other_where_they_are_joint(params):
    x = series(1, 3, 16)
    other = x.at[:, 0].set(series(1, 16, seed=5))
    together, moved = predict(MODEL, params, x, 8), predict(MODEL, params, other, 8)
    assert np.abs(np.asarray(together - moved)[:, 1:]).max() > 1e-4
    single, moved = predict(ALONE, params, x, 8), predict(ALONE, params, other, 8)
    np.testing.assert_allclose(single[:, 1:], moved[:, 1:], rtol=1e-5)
    np.testing.assert_allclose(
        single[:, :1], predict(MODEL, params, x[:, :1], 8), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("q", [2, 4, 6])
def test_steps_that_are_no_patch(q):
    model = TimerXL(dataclasses.replace(MODEL.config, horizon=q))
    params = jax.jit(model.init)(jax.random.key(0))
    assert predict(model, params, series(1, 2, 4), 7).shape == (1, 2, 7)
    batch = {"context": series(1, 2, 16), "target": series(1, 2, q, seed=2)}
    assert np.isfinite(loss(model, params, batch, None, False))


def test_missing_targets_do_not_count(params):
    batch = {"context": series(3, 2, 16), "target": series(3, 2, 4, seed=2)}
    whole = loss(MODEL, params, batch, None, False)
    for name, place in (("target", (0, 1, 2)), ("context", (1, 0, slice(0, 3)))):
        hole = loss(MODEL, params, batch | {name: batch[name].at[place].set(jnp.nan)}, None, False)
        assert np.isfinite(hole) and hole != whole
    noisy = [loss(MODEL, params, batch, jax.random.key(i), True) for i in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]


def test_covariates_count_the_last_variate_only(params):
    model = TimerXL(dataclasses.replace(MODEL.config, covariate=True))
    batch = {"context": series(2, 3, 16), "target": series(2, 3, 4, seed=2)}
    changed = batch | {"target": batch["target"].at[:, 0].add(3.0)}
    assert loss(model, params, batch, None, False) == loss(model, params, changed, None, False)


def test_config_lists_all_its_problems():
    with pytest.raises(ValueError) as info:
        TimerXLConfig(4, 4, 16, 6, (), 2, joint=False, covariate=True, activation="silu")  # pyright: ignore[reportArgumentType]
    for word in (
        "at least one layer",
        "multiple of 4",
        "one patch (4)",
        "see one another",
        "one of relu, gelu",
    ):
        assert word in str(info.value)
    fields = converter.published(MODEL.config)
    with pytest.raises(ValueError, match="mixes up heads and time"):
        TimerXLConfig.from_published(fields | {"flash_attention": True})


def test_sizes_are_read_from_the_tensors_and_contradictions_listed():
    shapes = folders.param_shapes(MODEL)
    state, _ = tables.to_state(
        converter.keys(MODEL.config), jax.tree.map(lambda s: np.zeros(s.shape, "f4"), shapes)
    )
    config, notes = converter.configure(state, None, "file")
    assert config == dataclasses.replace(MODEL.config, context_len=120) and "assumed" in notes[0]
    assert (
        converter.recognise({f"module.{key}": value for key, value in state.items()}).prefix
        == "module."
    )  # pyright: ignore[reportOptionalMemberAccess]
    fields = converter.published(ALONE.config)
    assert converter.configure(state, fields, "file")[0] == ALONE.config
    wrong = fields | {
        "d_model": 20,
        "n_heads": 0,
        "e_layers": 1 << 40,
        "use_norm": "yes",
        "dropout": float("nan"),
    }
    with pytest.raises(CheckpointError) as info:
        converter.configure(state, wrong, "file")
    assert len(str(info.value).split("\n  ")) == 6, str(info.value)
    with pytest.raises(CheckpointError, match="flash_attention"):
        converter.configure(state, fields | {"flash_attention": True}, "file")
    with pytest.raises(ValueError, match="can't be exported"):
        converter.published(narrowed(MODEL.config, 0, attn={"heads": 3}))
