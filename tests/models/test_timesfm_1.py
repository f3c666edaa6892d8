"""TimesFM 1.0 and 2.0: published sizes, worked examples, and what goes wrong in words."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

from converters import CheckpointError, import_checkpoint, tables
from converters import timesfm_1 as converter
from converters.torch_files import write_torch
from ltsm_jax import trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import folders
from ltsm_jax.models.timesfm_1 import (
    PRESETS,
    TimesFM1,
    TimesFM1Config,
    freq_class,
    halved_sinusoids,
)

COUNTS = {
    "google/timesfm-1.0-200m-pytorch": 203_568_960,
    "google/timesfm-2.0-500m-pytorch": 498_828_960,
}
CONFIG = TimesFM1.small()


@pytest.fixture(scope="module")
def params():
    return jax.jit(TimesFM1(CONFIG).init)(jax.random.key(0))


@pytest.mark.parametrize("name", PRESETS)
def test_published_parameter_counts(name):
    assert trees.count(folders.param_shapes(TimesFM1(PRESETS[name]))) == COUNTS[name]


def test_frequencies_have_the_classes_of_the_original():
    for freq, want in {
        "15min": 0,
        "h": 0,
        "D": 0,
        "B": 0,
        "5s": 0,
        "W-SUN": 1,
        "W": 1,
        "MS": 1,
        "ME": 1,
        "3MS": 1,
        "QE-DEC": 2,
        "YS": 2,
        "Y": 2,
        "A-DEC": 2,
    }.items():
        assert freq_class(freq) == want, freq
    with pytest.raises(ValueError, match="no frequency 'fortnight'"):
        freq_class("fortnight")


def test_a_data_set_chooses_the_class_of_frequency(params):
    model = TimesFM1(CONFIG)
    monthly, same = model.for_series(params, n_variates=3, freq="MS")
    assert monthly.config == dataclasses.replace(CONFIG, freq=1) and same is params
    assert monthly.for_series(params, n_variates=3)[0] == monthly
    assert monthly.for_series(params, n_variates=3, freq="oov")[0] == monthly
    x = jnp.sin(jnp.arange(32.0))[None, None]
    hourly, later = (
        jax.jit(m.loss)(params, {"context": x, "target": x[..., :4]}) for m in (model, monthly)
    )
    assert not np.allclose(hourly, later)


def test_the_scale_is_that_of_the_first_patch_with_three_values(params):
    model, x = TimesFM1(CONFIG), np.zeros((3, 24), np.float32)
    x[:, 8:16], x[:, 16:] = np.arange(8), 100.0
    observed = np.ones(x.shape, bool)
    # 2, 3 and no observed values in the first patch
    observed[0, :6] = observed[1, :5] = observed[2, :22] = False
    _, taps = jax.jit(model.apply)(params, x, observed)
    np.testing.assert_allclose(taps["mean"], [3.5, 0.0, 100.0])
    np.testing.assert_allclose(taps["std"], [np.arange(8).std(), 1e-6, 1e-6])
    np.testing.assert_array_equal(taps["observed"], [[1, 1, 1], [1, 1, 1], [0, 0, 1]])


def test_padding_in_front_changes_nothing(params):
    """A short context is read from its first value, whatever stands before it: positions count from
    there.
    """
    model, x = TimesFM1(CONFIG), np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    apply = jax.jit(model.apply)
    alone, _ = apply(params, x)
    observed = np.repeat([False, True], 16)[None].repeat(2, axis=0)
    padded, _ = apply(params, np.concatenate([np.full_like(x, 9.0), x], axis=1), observed)
    np.testing.assert_allclose(padded[:, 2:], alone, rtol=1e-5, atol=1e-5)


def test_a_missing_value_lies_between_its_neighbours(params):
    x = np.random.default_rng(0).normal(size=(1, 1, 32)).astype(np.float32)
    x[0, 0, 10], x[0, 0, -1] = (x[0, 0, 9] + x[0, 0, 11]) / 2, x[0, 0, -2]
    gaps = x.copy()
    gaps[0, 0, [10, -1]] = np.nan
    predict = jax.jit(lambda x: TimesFM1(CONFIG).predict(params, x, 40).point)
    np.testing.assert_allclose(predict(gaps), predict(x), rtol=1e-5, atol=1e-5)


def test_positions_of_the_original():
    """Sines, then cosines, at D/2 timescales from 1 to 10000."""
    table = halved_sinusoids(3, 4)
    np.testing.assert_allclose(
        table[2], [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)], rtol=1e-6
    )


def test_targets_that_are_missing_do_not_count(params):
    model, rng = TimesFM1(CONFIG), np.random.default_rng(0)
    batch = {"context": rng.normal(size=(2, 1, 32)), "target": rng.normal(size=(2, 1, 16))}
    batch = {name: jnp.asarray(x, jnp.float32) for name, x in batch.items()}
    loss = jax.jit(model.loss)
    cut = batch | {"target": batch["target"].at[..., 8:].set(jnp.nan)}
    np.testing.assert_allclose(
        loss(params, cut), loss(params, batch | {"target": batch["target"][..., :8]}), rtol=1e-5
    )
    with pytest.raises(ValueError, match="one output patch"):
        model.loss(params, batch | {"target": jnp.zeros((2, 1, 17))})


def test_the_network_is_strict_about_lengths(params):
    with pytest.raises(ValueError, match="whole patches of 8 time steps, got 12"):
        TimesFM1(CONFIG).apply(params, jnp.zeros((1, 12)))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers": ()}, "at least one layer"),
        ({"layers": equal_layers(2, 2, 9, 24)}, "width from 0 to 8"),
        ({"d_model": 15}, "even"),
        ({"context_len": 33}, "whole patches"),
        ({"quantiles": (0.1, 0.9)}, "0.5 among"),
        ({"freq": 3}, "0, 1 or 2"),
        ({"patch_len": 0}, "positive"),
        ({"quantiles": (0.5, 1.0)}, "between 0 and 1"),
    ],
)
def test_a_config_says_what_is_wrong(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_a_pruned_model_is_of_the_same_class():
    model = TimesFM1(narrowed(CONFIG, 0, attn={"heads": 1}, ffn=5))
    shapes = folders.param_shapes(model)
    assert shapes["layer_0"]["attn"]["q"]["kernel"].shape == (CONFIG.d_model, 1, CONFIG.head_dim)
    context = jax.ShapeDtypeStruct((2, 3, 50), jnp.float32)
    found = jax.eval_shape(lambda params, x: model.predict(params, x, 40), shapes, context)
    assert found.point.shape == (2, 3, 40) and found.quantiles.shape == (2, 3, 40, 9)


# --- checkpoints


def checkpoint(folder, params, published=None, change=None):
    state, _ = tables.to_state(converter.keys(CONFIG), params)
    write_torch(folder / "torch_model.ckpt", (change or (lambda s: s))(state), overwrite=True)
    if published is not None:
        (folder / "config.json").write_text(json.dumps(published))
    return folder / "torch_model.ckpt"


def test_a_pruned_model_is_not_exported():
    with pytest.raises(ValueError, match="pruned model can't be exported"):
        converter.published(narrowed(CONFIG, 1, attn={"heads": 1}))


def test_without_a_config_the_sizes_must_be_published_ones(params, tmp_path):
    with pytest.raises(CheckpointError, match=r"no published TimesFM's.*use_positional_embedding"):
        import_checkpoint(checkpoint(tmp_path, params))
    for name, preset in PRESETS.items():
        sizes = converter._sizes_of(preset) | {"context_len": None}
        assert converter._assumed(sizes, "file") == (
            preset,
            [f"no config beside the file: the sizes are those of {name}, whose config is taken"],
        )


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("num_layers", 10**9, "num_layers: not an integer from 1 to 128"),
        ("num_heads", 4, "num_heads: the config says 4, the weights 2"),
        ("model_dims", "16", "model_dims: not an integer"),
        ("quantiles", [0.1, 0.5], "outputs: the config says 48, the weights 160"),
        ("quantiles", "many", "quantiles: not a list"),
        ("quantiles", [0.1, None], "quantiles: not all of them numbers"),
        ("use_positional_embedding", "yes", "use_positional_embedding: not true or false"),
        ("use_positional_embedding", ..., "lacks use_positional_embedding"),
        ("context_len", 33, "whole patches"),
        ("context_len", True, "context_len: not an integer"),
        ("model_config", [1], "model_config: not an object"),
        ("model_config", {"num_heads": 2, "num_kv_heads": 1}, "num_kv_heads: differs"),
        ("model_config", {"tolerance": "small"}, "tolerance: not a number"),
    ],
)
def test_contradictions_are_told(params, tmp_path, name, value, said):
    published = converter.published(CONFIG)
    del published["model_config"]
    published |= {name: value}
    if value is ...:
        del published[name]
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(checkpoint(tmp_path, params, published))


def test_missing_and_strange_keys_are_listed(params, tmp_path):
    def change(state):
        del state["freq_emb.weight"]
        state["stacked_transformer.layers.0.self_attn.rotary"] = np.zeros(2, np.float32)
        return state

    with pytest.raises(CheckpointError) as error:
        import_checkpoint(checkpoint(tmp_path, params, converter.published(CONFIG), change))
    assert "freq_embed: missing in the checkpoint (its key would be 'freq_emb.weight')" in str(
        error.value
    )
    assert "self_attn.rotary': no rule matches" in str(error.value)


def test_a_fine_tuned_file_of_several_processes_has_a_prefix(params, tmp_path):
    wrapped = checkpoint(
        tmp_path,
        params,
        converter.published(CONFIG),
        lambda s: {f"module.{k}": v for k, v in s.items()},
    )
    model, got, provenance, _ = import_checkpoint(wrapped)
    assert model == TimesFM1(CONFIG) and provenance["prefix"] == "module."
    chex.assert_trees_all_equal(got, params)


def test_timescales_of_the_transformers_form_are_checked():
    table = converter.buffers(CONFIG, converter.TRANSFORMERS)
    assert converter.check_buffers(CONFIG, table) == []
    (key,) = table
    assert "not those from 1 to 10000" in converter.check_buffers(CONFIG, {key: table[key] * 2})[0]
    assert "model (8,)" in converter.check_buffers(CONFIG, {key: table[key][:3]})[0]
    off = dataclasses.replace(CONFIG, use_positional_embedding=False)
    assert converter.buffers(off, converter.TRANSFORMERS) == converter.buffers(CONFIG) == {}
    with pytest.raises(CheckpointError, match="says no, but the weights have"):
        converter.configure(table, converter.published(off, converter.TRANSFORMERS), "file")


def test_both_forms_of_the_published_config_give_the_config_back():
    for table in ("", converter.TRANSFORMERS):
        for config in (CONFIG, *PRESETS.values()):
            told = json.loads(json.dumps(converter.published(config, table)))
            assert TimesFM1Config.from_published(told) == config
