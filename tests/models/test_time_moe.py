"""Time-MoE beyond its original: sizes, pruned experts, padding and missing values, the loss,
errors.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

from converters import CheckpointError, tables
from converters import time_moe as converter
from ltsm_jax import trees
from ltsm_jax.layers.dims import ExpertDims, HeadDims
from ltsm_jax.models import folders
from ltsm_jax.models.time_moe import PRESETS, TimeMoe, TimeMoeConfig, TimeMoeLayer, balance, huber

MODEL = TimeMoe(
    TimeMoeConfig(
        d_model=8,
        head_dim=4,
        layers=(TimeMoeLayer(HeadDims.of(2, 4, kv_heads=1), ExpertDims((0, 1, 2, 3), 6), 12),),
        horizons=(1, 4),
        n_experts=4,
        top_k=2,
        context_len=24,
        init_std=0.5,
    )
)
predict = jax.jit(lambda model, *args: model.predict(*args).point, static_argnums=(0, 3))
loss = jax.jit(lambda model, *args: model.loss(*args), static_argnums=(0, 4))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def series(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape).cumsum(-1)


@pytest.mark.parametrize(
    "name, count", [("Maple728/TimeMoE-50M", 113_352_192), ("Maple728/TimeMoE-200M", 453_196_800)]
)
def test_published_parameter_counts(name, count):
    assert trees.count(folders.param_shapes(TimeMoe(PRESETS[name]))) == count


@pytest.mark.slow
def test_an_expert_taken_out_is_an_expert_masked(params):
    x, gone = series(2, 1, 24), (0, 3)
    kept = tuple(i for i in range(4) if i not in gone)
    mask = [jnp.asarray([float(i in kept) for i in range(4)])]
    smaller = TimeMoe(narrowed(MODEL.config, 0, experts={"ids": kept}))
    cut = jax.tree.map(lambda leaf: leaf, params)
    stacked = params["layer_0"]["mixture"]["experts"]
    cut["layer_0"]["mixture"]["experts"] = {
        name: leaf[jnp.asarray(kept)] for name, leaf in stacked.items()
    }
    masked, _ = jax.jit(lambda p, x: MODEL.apply(p, x, expert_masks=mask))(params, x)
    removed, _ = jax.jit(smaller.apply)(cut, x)
    whole, _ = jax.jit(MODEL.apply)(params, x)
    chex.assert_trees_all_close(masked, removed, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(masked[0] - whole[0])).max() > 1e-3
    # the gradient of the mask is what scores experts
    score = jax.jit(jax.grad(lambda m: MODEL.token_loss(params, x, x, expert_masks=[m])))(
        jnp.ones(4)
    )
    assert np.isfinite(score).all() and np.abs(np.asarray(score)).max() > 0
    none = TimeMoe(narrowed(MODEL.config, 0, experts={"ids": ()}))
    assert np.isfinite(jax.jit(none.apply)(jax.jit(none.init)(jax.random.key(0)), x)[0][0]).all()


def test_padding_on_the_left_is_not_seen(params):
    """A series that begins late is forecast as if it were alone."""
    x = series(1, 1, 24)
    late = x.at[..., :9].set(jnp.nan)
    np.testing.assert_allclose(
        predict(MODEL, params, late, 6), predict(MODEL, params, x[..., 9:], 6), rtol=1e-4
    )


def test_the_loss_has_no_scale_and_skips_what_is_missing(params):
    batch = {"context": series(3, 1, 24), "target": series(3, 1, 4, seed=2)}
    one = loss(MODEL, params, batch, None, False)
    scaled = {name: 1e3 * value + 5e3 for name, value in batch.items()}
    np.testing.assert_allclose(loss(MODEL, params, scaled, None, False), one, rtol=1e-3)
    for name, place in (
        ("target", (0, 0, 2)),
        ("context", (1, 0, slice(0, 7))),
        ("context", (1, 0, 12)),
    ):
        hole = loss(MODEL, params, batch | {name: batch[name].at[place].set(jnp.nan)}, None, False)
        assert np.isfinite(hole) and hole != one, (name, place)
    assert loss(MODEL, params, batch, None, True) > one, "the balance term belongs to training"


def test_huber():
    np.testing.assert_allclose(huber(jnp.asarray([0.5, -2.0, 3.0])), [0.125, 2.0, 4.0])


def test_balance_counts_every_slot():
    """Even routing gives k; pruned experts have no part."""
    p = jnp.full((4, 4), 0.25)
    chosen = jnp.asarray([[0, 1], [1, 2], [2, 3], [3, 0]])
    np.testing.assert_allclose(balance([p], [chosen]), 2.0)
    np.testing.assert_allclose(balance([p.at[:, 0].set(0.0)], [chosen]), 4 * 6 / 4 * 0.25)
    weight = jnp.asarray([1.0, 0, 1, 0])
    np.testing.assert_allclose(balance([p], [chosen], weight), 2.0)


def test_config_lists_all_its_problems():
    with pytest.raises(ValueError) as info:
        TimeMoeConfig(
            8,
            3,
            (TimeMoeLayer(HeadDims.of(3, 3, kv_heads=2), ExpertDims((1, 0), 6), 12),),
            (4, 4),
            2,
            3,
            24,
            dense=True,
            activation="swoosh",
        )
    for word in (
        "multiple of kv_heads",
        "even width",
        "3 of 2 experts",
        "in order",
        "must differ",
    ):
        assert word in str(info.value)
    for word in ("apply_aux must be off", "silu"):
        assert word in str(info.value)


def test_contradictions_are_listed():
    shapes = folders.param_shapes(MODEL)
    state, _ = tables.to_state(
        converter.keys(MODEL.config), jax.tree.map(lambda s: np.zeros(s.shape, "f4"), shapes)
    )
    fields = converter.published(MODEL.config) | {"max_position_embeddings": 32}
    assert converter.configure(state, fields, "file")[0] == dataclasses.replace(
        MODEL.config, max_positions=32
    )
    wrong = fields | {
        "hidden_size": 18,
        "num_experts": 1 << 50,
        "horizon_lengths": [1, 9],
        "use_dense": "yes",
    }
    wrong |= {"num_key_value_heads": 0, "rope_theta": None, "input_size": 2}
    with pytest.raises(CheckpointError) as info:
        converter.configure(state, wrong, "file")
    assert len(str(info.value).split("\n  ")) == 8, str(info.value)
    with pytest.raises(CheckpointError, match=r"number of heads.*config.json"):
        converter.configure(state, None, "file")


def test_a_pruned_model_is_not_exported():
    with pytest.raises(ValueError, match="can't be exported"):
        converter.published(narrowed(MODEL.config, 0, experts={"ids": (0, 1)}))
