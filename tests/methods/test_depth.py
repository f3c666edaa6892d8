"""Depth pruning: the influence of layers, and models without some of them."""

import dataclasses
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import layers_of, widths

import converters
import ltsm_jax
from ltsm_jax import training, trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.layers.shortcuts import go_whole
from ltsm_jax.methods import pruning, removal
from ltsm_jax.methods.pruning import depth
from ltsm_jax.methods.run import run
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models import FAMILIES, parts
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks.forecasting import Forecasting, training_windows

REFUSED = (
    "ttm",
    "ttm_r3",
)  # blocks of other resolutions
ONE_PASS = {"ratio": 0.3, "ema": 0.5, "epochs": 0}


@pytest.fixture(scope="module")
def deep():
    """Three layers of different widths, so that a mistaken order shows."""
    return Timer(
        TimerConfig(8, 16, 8, layers_of(8, (2, 1, 2), (24, 16, 8)), context_len=32, horizon=8)
    )


@pytest.fixture(scope="module")
def weights(deep):
    """Off their start, where all layers look alike."""
    return jax.tree.map(lambda p: 1.5 * p + 0.01, deep.init(jax.random.key(3)))


def skipping(model, params, context, horizon, skipped):
    """The forecast of the whole model whose layers at these paths give back what they get."""

    def skip(call, args, kwargs, at):
        result = call(*args, **go_whole(at, kwargs))
        if at.method_name != "__call__" or "/".join(at.module.path) not in skipped:
            return result
        return (args[0], *result[1:]) if isinstance(result, tuple) else args[0]

    with nn.intercept_methods(skip):
        return model.predict(params, context, horizon).point


def test_influence_of_tokens_by_hand():
    x = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    y = jnp.array([[0.0, 5.0], [0.0, 3.0], [-1.0, -1.0], [1.0, 1.0]])
    # a right angle, the same direction, the opposite one, and no direction
    np.testing.assert_allclose(depth._turned("layer_0", x, y), [1.0 + 0.0 + 2.0, 3.0], atol=1e-6)
    np.testing.assert_allclose(depth._turned("layer_0", x, (y, {})), [3.0, 3.0], atol=1e-6)
    with pytest.raises(ValueError, match="its influence is not defined"):
        depth._turned("layer_0", x, y[:2])


def test_influence_is_the_mean_over_all_windows_whatever_the_batch(deep, weights, splits):
    task = Forecasting()
    windows = training_windows(deep, splits, "ims").take(np.arange(50))
    found = pruning.block_influence(deep, weights, [windows], task=task, batch_size=50)
    assert list(found) == ["layer_0", "layer_1", "layer_2"]
    assert all(0 < value < 2 for value in found.values()) and len(set(found.values())) == 3
    parts_of_it = [windows.take(np.arange(25)), windows.take(np.arange(25, 50))]
    again = pruning.block_influence(deep, weights, parts_of_it, task=task, batch_size=25)
    np.testing.assert_allclose(list(again.values()), list(found.values()), rtol=1e-5)


def test_what_is_left_computes_what_skipping_the_layer_does(deep, weights, splits):
    context = splits.val.gather(jnp.arange(4))["context"]
    for gone in (["layer_1"], ["layer_0", "layer_2"]):
        small, left = pruning.drop_layers(deep, weights, gone)
        want = skipping(deep, weights, context, 8, gone)
        np.testing.assert_allclose(
            small.predict(left, context, 8).point, want, rtol=1e-6, atol=1e-6
        )
    assert small.config == dataclasses.replace(deep.config, layers=deep.config.layers[1:2])
    np.testing.assert_array_equal(
        left["layer_0"]["up"]["kernel"], weights["layer_1"]["up"]["kernel"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_every_plain_stack_can_be_shorter(name):
    model = FAMILIES[name](FAMILIES[name].small())
    params = jax.jit(model.init)(jax.random.key(0))
    layer = next(stack[0] for stack in parts.stacks(model, trees.flatten(params)) if len(stack) > 1)
    small, left = pruning.drop_layers(model, params, [layer])
    assert trees.count(left) < trees.count(params)
    assert small.config_from_dict(json.loads(json.dumps(small.config_to_dict()))) == small.config
    noise = np.random.default_rng(0).normal(size=(2, 2, model.context_len))
    context = jnp.asarray(np.cumsum(noise, -1), jnp.float32)
    want = jax.jit(lambda p, x: skipping(model, p, x, model.horizon, [layer]))(params, context)
    found = jax.jit(lambda p, x: small.predict(p, x, small.horizon).point)(left, context)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_other_stacks_are_refused_before_anything_is_measured(name):
    model = FAMILIES[name](FAMILIES[name].small())
    params = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(model.init, jax.random.key(0))
    )
    with pytest.raises(
        ValueError, match=f"layers of a {name} can't be taken out: they are not a plain list"
    ):
        depth.check_depth(model, params, 1)


def test_the_least_influential_layers_go_but_never_all_of_a_stack(deep, weights):
    influence = {"layer_0": 0.3, "layer_1": 0.1, "layer_2": 0.2}
    assert pruning.least_influential(deep, weights, influence, 2) == ("layer_1", "layer_2")
    with pytest.raises(ValueError, match="depth 3: of 3 layers at most 2 can go"):
        pruning.least_influential(deep, weights, influence, 3)
    with pytest.raises(ValueError, match="layer_7: no layers of this timer; there are layer_0"):
        pruning.drop_layers(deep, weights, ["layer_7"])
    with pytest.raises(ValueError, match="must not be negative"):
        pruning.PruneConfig(**ONE_PASS, depth=-1)


@pytest.mark.slow
def test_a_shorter_model_is_saved_loaded_tuned_and_exported_like_any_other(
    deep, weights, splits, tmp_path
):
    config = pruning.PruneConfig(**ONE_PASS, depth=1)
    found = pruning.prune(
        deep, weights, splits, config, folder=tmp_path / "pruning", show_progress=False
    )
    influence = found.influence
    assert influence is not None and found.gone == (min(influence, key=influence.__getitem__),)
    assert len(found.model.config.layers) == 2 and set(found.masks) == {"layer_0", "layer_1"}
    again = pruning.prune(
        deep, weights, splits, config, folder=tmp_path / "pruning", show_progress=False
    )
    assert again.influence == influence and again.model == found.model

    tuning = training.TrainConfig(epochs=1, batch_size=128, lr=1e-3)
    chosen = strategy("sff")
    tuned = run(
        found.model,
        found.params,
        chosen,
        splits,
        config=tuning,
        masks=found.masks,
        show_progress=False,
    )
    assert np.isfinite(tuned.val["mse"])
    ltsm_jax.save(tmp_path / "model", found.model, tuned.params)
    model, params = ltsm_jax.load(tmp_path / "model")
    assert model == found.model
    chex.assert_trees_all_equal(params, tuned.params)


def test_a_model_pruned_in_depth_and_width_is_exported_at_its_depth_and_the_full_width(
    splits, tmp_path
):
    whole = Timer(TimerConfig(8, 16, 8, equal_layers(3, 2, 8, 24), context_len=32, horizon=8))
    weights = jax.tree.map(lambda p: 1.5 * p, whole.init(jax.random.key(3)))
    shorter, left = pruning.drop_layers(whole, weights, ["layer_1"])
    masks = trees.flatten(pruning.full_masks(shorter))
    masks["layer_0/up/out"] = np.asarray(masks["layer_0/up/out"]) * (np.arange(24) > 5)
    small, params, _ = removal.remove(shorter, left, trees.unflatten(masks))
    assert widths(small.config, "ffn") == (18, 24)

    made = {"pruned_from": whole.config_to_dict()}
    ltsm_jax.save(tmp_path / "model", small, params, provenance=made)
    (note,) = converters.export_checkpoint(tmp_path / "model", tmp_path / "original.ckpt")
    assert "written at full size" in note
    model, back = ltsm_jax.load(tmp_path / "original.ckpt")
    assert widths(model.config, "ffn") == (24, 24)
    context = splits.val.gather(jnp.arange(4))["context"]
    want, found = (m.predict(p, context, 8).point for m, p in ((small, params), (model, back)))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)

    # Without layers alone there is one width, and nothing to fill up.
    ltsm_jax.save(tmp_path / "plain", shorter, left, provenance=made)
    assert converters.export_checkpoint(tmp_path / "plain", tmp_path / "plain.ckpt") == []
    model, back = ltsm_jax.load(tmp_path / "plain.ckpt")
    chex.assert_trees_all_equal(back, left)
