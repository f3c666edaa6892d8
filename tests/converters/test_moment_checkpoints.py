"""MOMENT checkpoints: heads that were trained and saved, configs that are missing or wrong,
exports.
"""

import json

import chex
import jax
import numpy as np
import pytest
from layer_widths import narrowed, widths

from converters import CheckpointError, export_checkpoint, import_checkpoint, moment, tables
from converters.torch_files import read_safetensors, write_safetensors
from ltsm_jax import trees
from ltsm_jax.models import folders
from ltsm_jax.models.moment import PRESETS, Moment

TOKENS = moment.TOKENS


@pytest.fixture(scope="module")
def checkpoint():
    """`checkpoint(head, **sizes)`: (state dict, config.json, model, params) of a small random
    model.
    """
    base = Moment(Moment.small())
    params = jax.jit(base.init)(jax.random.key(0))

    def make(head="reconstruction", **sizes):
        model, tree = (base, params)
        if head != "reconstruction":
            model, tree = base.with_head(params, head, jax.random.key(1), **sizes)
        state, _ = tables.to_state(moment.keys(model.config), tree)
        return state | moment.buffers(model.config), moment.published(model.config), model, tree

    return make


def folder(path, state, fields):
    path.mkdir(exist_ok=True)
    write_safetensors(path / "model.safetensors", state, overwrite=True)
    if fields is not None:
        (path / "config.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("head", "sizes"),
    [
        ("reconstruction", {}),
        ("forecasting", {"horizon": 5}),
        ("classification", {"n_classes": 4, "n_variates": 3}),
        ("classification", {"n_classes": 4, "reduction": "mean"}),
    ],
)
def test_every_head_goes_out_and_comes_back(checkpoint, tmp_path, head, sizes):
    _, _, model, params = checkpoint(head, **sizes)
    folders.save(tmp_path / "model", model, params)
    export_checkpoint(tmp_path / "model", tmp_path / "hub")
    assert TOKENS in read_safetensors(tmp_path / "hub" / "model.safetensors"), (
        "the original's class has it"
    )
    again, tree, *_ = import_checkpoint(tmp_path / "hub")
    kept = {"n_variates": again.config.n_variates}  # nothing says it where the head reads the mean
    assert again.config == type(model.config)(**{**vars(model.config), **kept})
    chex.assert_trees_all_equal(tree, params)


@pytest.mark.parametrize(
    ("head", "sizes", "kwargs"),
    [
        ("forecasting", {"horizon": 5}, {"forecast_horizon": 5}),
        ("classification", {"n_classes": 4, "n_variates": 3}, {"num_class": 4, "n_channels": 3}),
    ],
)
def test_a_trained_head_is_found_although_the_config_says_reconstruction(
    checkpoint, tmp_path, head, sizes, kwargs
):
    state, fields, model, _ = checkpoint(head, **sizes)
    plain = {k: v for k, v in fields.items() if k not in kwargs} | {"task_name": "reconstruction"}
    found, *_ = import_checkpoint(folder(tmp_path / head, state, plain | {"model_kwargs": kwargs}))
    assert found.config == model.config


def test_without_config_the_shapes_say_the_sizes(checkpoint, tmp_path):
    state, _, model, params = checkpoint()
    found, tree, provenance, _ = import_checkpoint(folder(tmp_path / "bare", state, None))
    assert widths(found.config, "attn") == widths(model.config, "attn")
    assert found.context_len == 512 // 8 * 8 and "assumed" in provenance["notes"][0]
    chex.assert_trees_all_equal(tree, params)
    del state[moment.BIAS]
    with pytest.raises(CheckpointError, match="Put its config.json beside"):
        import_checkpoint(folder(tmp_path / "bare", state, None))


def test_the_unused_token_embedding_may_be_missing(checkpoint, tmp_path):
    state, fields, model, _ = checkpoint()
    del state[TOKENS]
    assert import_checkpoint(folder(tmp_path / "m", state, fields))[0] == model


def test_contradictions_are_listed_together(checkpoint, tmp_path):
    state, fields, _, _ = checkpoint()
    fields["t5_config"] |= {"d_ff": 7, "num_layers": 3, "d_kv": 5, "vocab_size": 9}
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(
            folder(tmp_path / "m", state, fields | {"patch_len": 4, "task_name": "dance"})
        )
    for part in ("d_ff", "num_layers", "d_kv", "vocab_size", "patch_len", "task_name"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 10**30},
        {"seq_len": -1},
        {"seq_len": None},
        {"seq_len": 10**6},
        {"patch_stride_len": 4},
        {"transformer_type": "decoder_only"},
        {"transformer_type": []},
        {"d_model": 17},
        {"model_kwargs": 3},
        {"model_kwargs": {"forecast_horizon": "many"}},
        {"task_name": {}},
        {"task_name": "forecasting"},
        {"reduction": []},
        {"t5_config": []},
        {"revin_affine": True},
        {"head_dropout": float("nan")},
        {"patch_dropout": 1.0},
        *(
            {"t5_config": change}
            for change in (
                {"relative_attention_max_distance": 1},
                {"relative_attention_max_distance": 10**400},
                {"relative_attention_num_buckets": 10**9},
                {"feed_forward_proj": "relu"},
                {"layer_norm_epsilon": "small"},
                {"dropout_rate": []},
                {"num_layers": 10**9},
                {"vocab_size": 10**12},
                {"d_model": "16"},
            )
        ),
    ],
)
def test_hostile_configs(checkpoint, tmp_path, change):
    state, fields, _, _ = checkpoint()
    if isinstance(change.get("t5_config"), dict):
        change = {"t5_config": fields["t5_config"] | change["t5_config"]}
    with pytest.raises(CheckpointError):
        moment.configure(state, fields | change, "here")


def test_a_head_that_fits_nothing(checkpoint):
    state, fields, _, _ = checkpoint()
    state = state | {moment.HEAD: np.zeros((3, 5), np.float32)}
    with pytest.raises(CheckpointError, match="is no head for task_name"):
        moment.configure(state, fields, "here")


def test_a_pruned_model_can_not_be_exported():
    config = Moment.small()
    with pytest.raises(ValueError, match="pruned"):
        moment.published(narrowed(config, 1, ffn=20))


def test_other_families_are_not_claimed(golden_dir):
    for file in golden_dir.glob("*/model.safetensors"):
        assert (moment.recognise(read_safetensors(file)) is not None) == (
            file.parent.name == "moment"
        ), file


@pytest.mark.parametrize("name", PRESETS)
def test_published_configs_are_read_back(name):
    fields = moment.published(PRESETS[name])
    state = {}
    assert moment.configure(state, fields, name)[0] == PRESETS[name]
    shapes = folders.param_shapes(Moment(PRESETS[name]))
    assert all(tables.key_of(moment.keys(PRESETS[name]), path) for path in trees.flatten(shapes))
