"""Chronos-T5 checkpoints: copies of the embedding, the files beside them, and configs that do not
fit.
"""

import dataclasses
import json
import shutil

import chex
import numpy as np
import pytest
from layer_widths import narrowed

from converters import CheckpointError, chronos_t5, export_checkpoint, import_checkpoint
from converters.torch_files import read_safetensors, write_safetensors
from ltsm_jax.models import FAMILIES


@pytest.fixture
def folder(golden, tmp_path):
    """A recorded checkpoint as it lies on the hub, to be changed."""
    vectors = golden("chronos_t5")
    for name in ("config.json", "generation_config.json"):
        if (vectors.folder / name).is_file():
            shutil.copy(vectors.folder / name, tmp_path)
    shutil.copy(vectors.checkpoint, tmp_path / "model.safetensors")
    return tmp_path


def rewrite(folder, change):
    """The checkpoint with another state dict."""
    path = folder / "model.safetensors"
    state = dict(read_safetensors(path))
    change(state)
    write_safetensors(path, state, overwrite=True)


def edit(folder, name="config.json", **fields):
    """The config with other fields; `chronos_config__x` is the field x inside `chronos_config`."""
    path = folder / name
    told = json.loads(path.read_text()) if path.is_file() else {}
    for field, value in fields.items():
        inner, _, last = field.rpartition("__")
        (told[inner] if inner else told)[last] = value
    path.write_text(json.dumps(told))


def test_every_layout_of_the_embedding_is_read_and_written_back(folder):
    model, params, *_ = import_checkpoint(folder)

    def all_four(state):
        state |= dict.fromkeys(chronos_t5.COPIES, state["shared.weight"])

    rewrite(folder, all_four)
    again, same, provenance, _ = import_checkpoint(folder, folder / "model")
    assert again == model
    chex.assert_trees_all_equal(same, params)
    assert provenance["copies"] == dict.fromkeys(chronos_t5.COPIES, "shared.weight")
    export_checkpoint(folder / "model", folder / "out")
    assert (
        read_safetensors(folder / "out" / "model.safetensors").keys()
        == read_safetensors(folder / "model.safetensors").keys()
    )
    told = json.loads((folder / "out" / "generation_config.json").read_text())
    assert told["decoder_start_token_id"] == model.config.start

    rewrite(folder, lambda state: state.pop("shared.weight"))
    _, same, *_ = import_checkpoint(folder)
    chex.assert_trees_all_equal(same, params)

    rewrite(folder, lambda state: state.update({"lm_head.weight": state["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match="should be a copy"):
        import_checkpoint(folder)


def test_other_models_are_not_claimed(golden_dir):
    found = {}
    for folder in sorted(golden_dir.iterdir()):
        files = [p for p in folder.glob("**/*.safetensors") if p.is_file()]
        for file in files:
            state = dict.fromkeys(read_safetensors(file))
            found[file.relative_to(golden_dir)] = chronos_t5.recognise(state) is not None
    claimed = {path.parts[0] for path, ours in found.items() if ours}
    assert claimed == {"chronos_t5"}
    assert "chronos_t5" in FAMILIES


def test_without_a_config_only_published_sizes_are_known(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="Put the published config.json beside the file"):
        import_checkpoint(folder)
    preset = chronos_t5.PRESETS["amazon/chronos-t5-mini"]
    stack = preset.encoder
    d, heads, ffn = stack.d_model, stack.layers[0].attn.heads, stack.layers[0].ffn
    inner = heads * stack.head_dim
    layers = {
        f"encoder.block.{i}.layer.0.SelfAttention.q.weight": np.zeros((inner, d))
        for i in range(len(stack.layers))
    }
    state = layers | {
        "shared.weight": np.zeros((preset.vocab_size, d), np.float32),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": np.zeros(
            (stack.n_buckets, heads)
        ),
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": np.zeros((ffn, d)),
    }
    config, notes = chronos_t5.configure(state, None, "here")
    assert config == preset
    assert "chronos-t5-mini" in notes[0]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"d_model": 7777}, r"d_model: the config says 7777, the weights \d+"),
        ({"num_layers": 77}, "num_layers: the config says 77"),
        ({"num_decoder_layers": 10**9}, "num_decoder_layers: not an integer from 1 to"),
        ({"d_kv": 1 << 40}, "d_kv: not an integer"),
        ({"d_kv": 1}, "d_kv: .* rows of the weights"),
        ({"vocab_size": True}, "vocab_size: not an integer"),
        ({"dropout_rate": "much"}, "dropout_rate: not a number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: not a number"),
        ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj: not one of relu"),
        ({"tie_word_embeddings": False}, "one table for input and output"),
        ({"pad_token_id": 777}, "pad_token_id: '777', elsewhere"),
        ({"chronos_config": None}, "chronos_config: missing"),
        ({"chronos_config": [1]}, "chronos_config: not an object"),
        ({"chronos_config__n_tokens": 10**7}, "chronos_config.n_tokens: not an integer"),
        ({"chronos_config__n_special_tokens": 1000}, "must hold 1000 special ones"),
        ({"chronos_config__model_type": "causal"}, "chronos_config.model_type: not one of seq2seq"),
        (
            {"chronos_config__tokenizer_class": "Other"},
            "chronos_config.tokenizer_class: not one of",
        ),
        (
            {"chronos_config__tokenizer_kwargs": {"low_limit": 1}},
            "tokenizer_kwargs.high_limit: missing",
        ),
        ({"chronos_config__top_k": -1}, "chronos_config.top_k: not an integer"),
        (
            {"chronos_config__prediction_length": 10**12},
            "chronos_config.prediction_length: not an integer",
        ),
        ({"chronos_config__temperature": 0}, "chronos_config.temperature: not a number"),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder, fields, what):
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=what):
        import_checkpoint(folder)


def test_the_files_beside_it_must_agree(folder):
    edit(folder, "generation_config.json", eos_token_id=777)
    with pytest.raises(CheckpointError, match=r"generation_config.eos_token_id: '777', elsewhere"):
        import_checkpoint(folder)


def test_a_pruned_model_is_not_exported():
    config = chronos_t5.ChronosT5.small()
    assert chronos_t5.ChronosT5Config.from_published(chronos_t5.published(config)) == config
    narrow = narrowed(config.decoder, 1, ffn=8)
    with pytest.raises(ValueError, match="pruned model can't be exported"):
        chronos_t5.published(dataclasses.replace(config, decoder=narrow))
