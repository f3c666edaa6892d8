"""TimesFM 2.5: published sizes, worked examples, and what goes wrong in words."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

from converters import CheckpointError, import_checkpoint, tables
from converters import timesfm_2p5 as converter
from converters.torch_files import write_safetensors
from ltsm_jax import trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import folders
from ltsm_jax.models.timesfm_2p5 import (
    PRESETS,
    TimesFM2p5,
    TimesFM2p5Config,
    flipped,
    mean_and_deviation,
    running_stats,
)

CONFIG = TimesFM2p5.small()


@pytest.fixture(scope="module")
def params():
    """A fresh draw with norms of 1: with its own, of 0, every block is the identity."""
    drawn = jax.jit(TimesFM2p5(CONFIG).init)(jax.random.key(0))
    flat = trees.flatten(drawn)
    return trees.unflatten(
        {path: jnp.ones_like(x) if path.endswith("/scale") else x for path, x in flat.items()}
    )


@pytest.mark.parametrize("name", PRESETS)
def test_published_parameter_counts(name):
    assert trees.count(folders.param_shapes(TimesFM2p5(PRESETS[name]))) == 231_289_280


def test_the_scale_runs_along():
    """Each patch sees the mean and the deviation of all values up to its own end."""
    x = np.random.default_rng(0).normal(3, 2, size=(2, 5, 4)).astype(np.float32)
    observed = np.ones(x.shape, bool)
    observed[1, :2], observed[1, 2, 0] = False, False
    mean, std = mean_and_deviation(running_stats(x, observed))
    for i in range(5):
        np.testing.assert_allclose(mean[0, i], x[0, : i + 1].mean(), rtol=1e-5)
        np.testing.assert_allclose(std[0, i], x[0, : i + 1].std(), rtol=1e-5)
    np.testing.assert_array_equal(mean[1, :2], 0)
    seen = x[1].ravel()[9:]
    np.testing.assert_allclose(mean[1, -1], seen.mean(), rtol=1e-5)
    np.testing.assert_allclose(std[1, -1], seen.std(), rtol=1e-5)
    first = running_stats(x[:, :3], observed[:, :3])
    rest = running_stats(x[:, 3:], observed[:, 3:], tuple(y[:, -1] for y in first))
    np.testing.assert_allclose(rest[1], mean[:, 3:], rtol=1e-5)


def test_a_constant_series_stays(params):
    x = jnp.full((1, 1, 30), 3.7)
    found = jax.jit(lambda x: TimesFM2p5(CONFIG).predict(params, x, 40))(x)
    np.testing.assert_allclose(found.point, 3.7, rtol=1e-5)
    np.testing.assert_allclose(found.quantiles, 3.7, rtol=1e-5)


def test_the_forecast_of_the_turned_series_is_turned(params):
    """By force_flip_invariance: quantile q of -x is minus quantile 1 - q of x."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 32)), jnp.float32)
    predict = jax.jit(lambda x: TimesFM2p5(CONFIG).predict(params, x, 20))
    up, down = predict(x), predict(-x)
    np.testing.assert_allclose(down.point, -up.point, atol=1e-5)
    np.testing.assert_allclose(down.quantiles, -up.quantiles[..., ::-1], atol=1e-5)
    assert flipped(jnp.arange(4.0)).tolist() == [0, 3, 2, 1]


def test_quantiles_are_in_order(params):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, 32)), jnp.float32)
    found = jax.jit(lambda x: TimesFM2p5(CONFIG).predict(params, x, 50))(x)
    assert (jnp.diff(found.quantiles, axis=-1) >= 0).all()
    np.testing.assert_array_equal(found.quantiles[..., 4], found.point)


def test_keys_and_values_that_are_kept_change_nothing(params):
    """What the roll-out gives from its cache, a pass over everything gives too."""
    model, m, n = TimesFM2p5(CONFIG), CONFIG.output_len // CONFIG.patch_len, 3
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, n * CONFIG.patch_len)), jnp.float32)
    y, _, more, _ = jax.jit(
        lambda x: model.decode(params, x, jnp.ones_like(x, bool), 2 * CONFIG.output_len)
    )(x)
    again, *_ = jax.jit(lambda x: model.apply(params, x))(
        jnp.concatenate([x, y[:, -1, :, CONFIG.point_column]], axis=1)
    )
    assert again.shape[1] == n + m
    np.testing.assert_allclose(more[:, 0], again[:, -1], rtol=1e-4, atol=1e-4)


def test_forecasts_can_be_kept_from_falling_below_zero(params):
    x = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 32)), jnp.float32)) * 3
    x = x.at[1].add(-1.0)
    found = {}
    for on in (False, True):
        model = TimesFM2p5(dataclasses.replace(CONFIG, infer_is_positive=on))
        found[on] = jax.jit(lambda x, model=model: model.predict(params, x, 16))(x).quantiles
    assert (found[False][0] < 0).any()
    np.testing.assert_array_equal(found[True][0], jnp.maximum(found[False][0], 0))
    np.testing.assert_array_equal(found[True][1], found[False][1])


def test_the_loss_does_not_know_the_unit(params):
    rng = np.random.default_rng(0)
    batch = {"context": rng.normal(size=(2, 1, 32)), "target": rng.normal(size=(2, 1, 16))}
    batch = {name: jnp.asarray(x, jnp.float32) for name, x in batch.items()}
    loss = jax.jit(lambda batch: TimesFM2p5(CONFIG).loss(params, batch))
    np.testing.assert_allclose(
        loss({k: 100 * v + 7 for k, v in batch.items()}), loss(batch), rtol=1e-4
    )
    cut = batch | {"target": batch["target"].at[..., 8:].set(jnp.nan)}
    np.testing.assert_allclose(
        loss(cut), loss(batch | {"target": batch["target"][..., :8]}), rtol=1e-4
    )
    with pytest.raises(ValueError, match="reaches one output"):
        TimesFM2p5(CONFIG).loss(params, batch | {"target": jnp.zeros((2, 1, 17))})


def test_the_network_is_strict_about_lengths(params):
    with pytest.raises(ValueError, match="whole patches of 8 time steps, got 12"):
        TimesFM2p5(CONFIG).apply(params, jnp.zeros((1, 12)))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers": ()}, "at least one layer"),
        ({"layers": equal_layers(2, 2, 9, 24)}, "width from 0 to 8"),
        ({"head_dim": 7}, "even"),
        ({"output_len": 12}, "whole patches"),
        ({"point_column": 10}, "one of 10 columns"),
        ({"patch_len": 0}, "positive"),
        ({"quantiles": (0.5, 1.0)}, "between 0 and 1"),
    ],
)
def test_a_config_says_what_is_wrong(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_a_pruned_model_is_of_the_same_class():
    model = TimesFM2p5(narrowed(CONFIG, 0, attn={"heads": 1}, ffn=5))
    shapes = folders.param_shapes(model)
    assert shapes["layer_0"]["attn"]["q"]["kernel"].shape == (CONFIG.d_model, 1, CONFIG.head_dim)
    context = jax.ShapeDtypeStruct((2, 3, 50), jnp.float32)
    found = jax.eval_shape(lambda params, x: model.predict(params, x, 40), shapes, context)
    assert found.point.shape == (2, 3, 40) and found.quantiles.shape == (2, 3, 40, 9)


# --- checkpoints


def checkpoint(folder, params, published=None, table="", change=None):
    state, _ = tables.to_state(converter.keys(CONFIG, table), params)
    write_safetensors(
        folder / "model.safetensors", (change or (lambda s: s))(state), overwrite=True
    )
    if published is not None:
        (folder / "config.json").write_text(json.dumps(published))
    return folder


@pytest.mark.parametrize("table", ["", converter.TRANSFORMERS])
def test_without_sizes_in_the_config_the_tensors_tell(params, tmp_path, table):
    """The published config.json of the original names none."""
    folder = checkpoint(tmp_path, params, {"torch_compile": True}, table)
    model, got, provenance, _ = import_checkpoint(folder)
    assert model.config == dataclasses.replace(CONFIG, context_len=1024)
    assert "no sizes" in provenance["notes"][0]
    chex.assert_trees_all_equal(got, params)


def test_the_published_sizes_are_known():
    sizes = converter._sizes_of(PRESETS["google/timesfm-2.5-200m-pytorch"])
    assert converter._assumed(sizes, "file")[0] == PRESETS["google/timesfm-2.5-200m-pytorch"]
    with pytest.raises(CheckpointError, match="d_ff: not in the tensors"):
        converter._assumed(sizes | {"d_ff": None}, "file")
    with pytest.raises(CheckpointError, match="outputs: 1281 is no multiple of 10"):
        converter._assumed(sizes | {"outputs": 1281}, "file")


def nested(fields, path, value):
    """A copy of nested fields with one of them changed, or without it."""
    (name, *rest), copy = path, dict(fields)
    if rest:
        copy[name] = nested(copy[name], rest, value)
    elif value is ...:
        del copy[name]
    else:
        copy[name] = value
    return copy


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("stacked_transformers num_layers", 10**9, "num_layers: not an integer from 1 to 128"),
        (
            "stacked_transformers transformer num_heads",
            4,
            "num_heads: the config says 4, the weights 2",
        ),
        ("stacked_transformers transformer use_bias", True, "use_bias: TimesFM 2.5 has False here"),
        ("stacked_transformers transformer", 3, "transformer: not an object"),
        ("tokenizer", ..., "tokenizer: missing"),
        ("tokenizer hidden_dims", "wide", "tokenizer.hidden_dims: not an integer"),
        ("input_patch_len", -8, "input_patch_len: not an integer"),
        ("output_patch_len", 24, "outputs: the config says 240, the weights 160"),
        ("quantiles", [0.5, None], "quantiles: not all of them numbers"),
        ("decode_index", 11, "point_column must be one of 10"),
        ("context_limit", True, "context_limit: not an integer"),
    ],
)
def test_contradictions_are_told(params, tmp_path, path, value, said):
    published = nested(converter.published(CONFIG), path.split(), value)
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(checkpoint(tmp_path, params, published))


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("hidden_size", 32, "hidden_size: the config says 32, the weights 16"),
        ("num_key_value_heads", 1, "num_key_value_heads: differs"),
        ("rope_parameters", {"rope_theta": 1e6}, "rope_parameters: not those"),
        ("activation", "gelu", "activation: TimesFM 2.5 has 'swish' here"),
        ("use_continuous_quantile_head", 3, "use_continuous_quantile_head: not true or false"),
        ("head_dim", ..., "head_dim: missing"),
    ],
)
def test_contradictions_of_the_other_form_are_told(params, tmp_path, name, value, said):
    published = nested(converter.published(CONFIG, converter.TRANSFORMERS), [name], value)
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(checkpoint(tmp_path, params, published, converter.TRANSFORMERS))


def test_missing_and_strange_keys_are_listed(params, tmp_path):
    def change(state):
        del state["tokenizer.hidden_layer.weight"]
        state["stacked_xf.0.attn.rotary"] = np.zeros(2, np.float32)
        return state

    with pytest.raises(CheckpointError) as error:
        import_checkpoint(checkpoint(tmp_path, params, converter.published(CONFIG), change=change))
    assert "embed/hidden/kernel: missing in the checkpoint" in str(error.value)
    assert "stacked_xf.0.attn.rotary': no rule matches" in str(error.value)


def test_both_forms_of_the_published_config_give_the_config_back():
    for table in ("", converter.TRANSFORMERS):
        for config in (dataclasses.replace(CONFIG, context_len=1024), *PRESETS.values()):
            told = json.loads(json.dumps(converter.published(config, table)))
            assert TimesFM2p5Config.from_published(told) == config
    with pytest.raises(ValueError, match="pruned model can't be exported"):
        converter.published(narrowed(CONFIG, 1, ffn=8))
    with pytest.raises(ValueError, match="blocks as wide as the model"):
        converter.published(dataclasses.replace(CONFIG, point_dim=8), converter.TRANSFORMERS)
