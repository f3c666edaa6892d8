"""Key tables of TimesFM 1.0 and 2.0: `torch_model.ckpt` of google-research/timesfm v1 (a bare state
dict, without a config file), and the form of the transformers library (`TimesFmModelForPrediction`)
<-> `ltsm_jax.models.timesfm_1`.

What the .ckpt file does not say (positions or not, quantiles, context) is taken from the preset
whose sizes it has, or from a config.json beside it with the fields of the original's
TimesFmHparams.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.fields import MAX_LAYERS, MAX_SIZE, Fields, dims, layer_count
from converters.layers import equal_layer, pruned
from converters.layout import Layout
from converters.tables import BUFFER, SAME, TRANSPOSE, Rule, split_bias, split_in, split_out
from ltsm_jax.models.timesfm_1 import DECILES, FREQS, PRESETS, TimesFM1, TimesFM1Config, timescales
from ltsm_jax.original_files import CheckpointError

MODEL = TimesFM1
TRANSFORMERS = "transformers"  # name of the second table
TABLES = {".safetensors": TRANSFORMERS}  # the only form in which there is such a file
SUFFIXES = {
    ".ckpt": "state_dict",
    ".pth": "state_dict",
    ".bin": "state_dict",
    ".safetensors": "safetensors",
}
HINTS = {
    r"/attn/": "check num_heads and head_dim",
    r"/(up|down)/|/hidden/": "check intermediate_size",
    r"^head/": "check output_patch_len and quantiles",
    r"^embed/": "check input_patch_len",
}
TIMESCALES = "decoder.position_emb.inv_timescales"
# ends of keys that no other model has together
_ANCHORS = {
    "": (
        "input_ff_layer.hidden_layer.0.weight",
        "freq_emb.weight",
        "stacked_transformer.layers.0.self_attn.scaling",
    ),
    TRANSFORMERS: (
        "decoder.input_ff_layer.input_layer.weight",
        "decoder.freq_emb.weight",
        "decoder.layers.0.self_attn.scaling",
    ),
}


def keys(config: TimesFM1Config, table: str = "") -> list[Rule]:
    """The table, readable beside the original's state dict."""
    head, transformers = config.head_dim, table == TRANSFORMERS
    root = r"decoder\." if transformers else ""
    layer = r"decoder\.layers\.(\d+)\." if transformers else r"stacked_transformer\.layers\.(\d+)\."
    hidden = "input_layer" if transformers else r"hidden_layer\.0"
    fused = [
        (layer + r"self_attn\.qkv_proj\.weight", r"layer_\1/attn/{q,k,v}/kernel", split_out(head)),
        (layer + r"self_attn\.qkv_proj\.bias", r"layer_\1/attn/{q,k,v}/bias", split_bias(head)),
    ]
    split = [
        (layer + r"self_attn\.(q|k|v)_proj\.weight", r"layer_\1/attn/\2/kernel", split_out(head)),
        (layer + r"self_attn\.(q|k|v)_proj\.bias", r"layer_\1/attn/\2/bias", split_bias(head)),
        (
            re.escape(TIMESCALES),
            BUFFER,
            "fixed timescales, checked against their formula and kept for an export",
        ),
    ]
    parts = ((hidden, "hidden"), ("output_layer", "out"), ("residual_layer", "residual"))
    blocks: list[Rule] = []
    for block, ours in ((root + "input_ff_layer", "embed"), ("horizon_ff_layer", "head")):
        for theirs, part in parts:
            blocks += [
                (rf"{block}\.{theirs}\.weight", f"{ours}/{part}/kernel", TRANSPOSE),
                (rf"{block}\.{theirs}\.bias", f"{ours}/{part}/bias", SAME),
            ]
    return [
        *blocks,
        (root + r"freq_emb\.weight", "freq_embed", SAME),
        *(split if transformers else fused),
        (layer + r"self_attn\.o_proj\.weight", r"layer_\1/attn/out/kernel", split_in(head)),
        (layer + r"self_attn\.o_proj\.bias", r"layer_\1/attn/out/bias", SAME),
        (layer + r"self_attn\.scaling", r"layer_\1/attn/scaling", SAME),
        (layer + r"input_layernorm\.weight", r"layer_\1/attn_norm/scale", SAME),
        (layer + r"mlp\.layer_norm\.weight", r"layer_\1/ffn_norm/scale", SAME),
        (layer + r"mlp\.layer_norm\.bias", r"layer_\1/ffn_norm/bias", SAME),
        (layer + r"mlp\.gate_proj\.weight", r"layer_\1/up/kernel", TRANSPOSE),
        (layer + r"mlp\.gate_proj\.bias", r"layer_\1/up/bias", SAME),
        (layer + r"mlp\.down_proj\.weight", r"layer_\1/down/kernel", TRANSPOSE),
        (layer + r"mlp\.down_proj\.bias", r"layer_\1/down/bias", SAME),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout of a TimesFM 1.0 or 2.0 state dict: prefix, and which table. None for other
    models.
    """
    for table in (TRANSFORMERS, ""):
        found = []  # what stands before each anchor
        for end in _ANCHORS[table]:
            found.append({key.removesuffix(end) for key in state if key.endswith(end)})
        prefixes = [names.pop() for names in found if len(names) == 1]
        if len(prefixes) > 1:  # one tensor may be missing
            return Layout(max(prefixes, key=prefixes.count), table=table)
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TimesFM1Config, list[str]]:
    """The config of a state dict (without prefix), from its shapes and the published fields beside
    it.

    Args:
      published: the fields of the original's TimesFmHparams, or of the transformers library's
        config.json.
    Returns: the config, and what was assumed because nothing says it.
    Raises: CheckpointError that lists every contradiction.
    """
    sizes = _sizes(state)
    if published is None:
        return _assumed(sizes, where)
    told = Fields(published, where)
    inner = published.get("model_config", {})
    if not isinstance(inner, Mapping):
        told.problems.append("model_config: not an object")
        inner = {}
    parts = (told, Fields(inner, where))
    for fields, place in ((told, 0), (parts[1], 1), (told, 2)):
        for size, names in _NAMES.items():
            high = MAX_LAYERS if size == "layers" else MAX_SIZE
            fields.integer(names[place], None, high=high, weights=sizes[size])
    for fields in parts:
        for name in ("rms_norm_eps", "tolerance", "pad_val"):
            fields.number(name, 0.0, high=1e38)
        fields.integer("freq_size", FREQS, low=FREQS, high=FREQS)
        quantiles = fields.published.get("quantiles", DECILES)
        if not isinstance(quantiles, list | tuple) or len(quantiles) > 999:
            fields.problems.append("quantiles: not a list of fewer than 1000 numbers")
        elif not all(isinstance(q, float) for q in quantiles):
            fields.problems.append("quantiles: not all of them numbers")
        positions = "use_positional_embedding"
        if positions in fields.published and not fields.boolean(positions) and TIMESCALES in state:
            fields.problems.append(
                f"{positions}: the config says no, but the weights have {TIMESCALES}"
            )
    if inner.get("num_kv_heads", inner.get("num_heads")) != inner.get("num_heads"):
        told.problems.append("num_kv_heads: differs from num_heads, which no TimesFM has")
    told.problems += parts[1].problems
    # TimesFmHparams has no names for these two
    known = {
        name: size
        for name, size in (("intermediate_size", sizes["d_ff"]), ("head_dim", sizes["head_dim"]))
        if size
    }
    config = told.build(lambda: TimesFM1Config.from_published(known | dict(published)))
    told.problems += [
        f"{name}: the config says {size}, the weights {sizes[name]}"
        for name, size in _sizes_of(config).items()
        if sizes[name] not in (None, size)
    ]
    return told.build(lambda: config), []


# a size: its name in TimesFmHparams, in TimesFMConfig ("model_config") and in the transformers
# library
_NAMES = {
    "patch_len": ("input_patch_len", "patch_len", "patch_length"),
    "d_model": ("model_dims", "hidden_size", "hidden_size"),
    "d_ff": ("intermediate_size", "intermediate_size", "intermediate_size"),
    "layers": ("num_layers", "num_layers", "num_hidden_layers"),
    "heads": ("num_heads", "num_heads", "num_attention_heads"),
    "head_dim": ("head_dim", "head_dim", "head_dim"),
    "output_len": ("output_patch_len", "horizon_len", "horizon_length"),
    "context_len": ("context_len", "context_len", "context_length"),
}


def _sizes(state: Mapping[str, Any]) -> dict[str, int | None]:
    """Read sizes off the tensors, None where they don't tell."""
    transformers = any(key.startswith("decoder.") for key in state)
    root, hidden = ("decoder.", "input_layer") if transformers else ("", "hidden_layer.0")
    layers = "decoder.layers." if transformers else "stacked_transformer.layers."
    (head_dim,) = dims(state, f"{layers}0.self_attn.scaling", 1)
    rows, _ = dims(state, f"{layers}0.self_attn.{'q' if transformers else 'qkv'}_proj.weight")
    block_dim, inputs = dims(state, f"{root}input_ff_layer.{hidden}.weight")
    return {
        "patch_len": inputs and inputs // 2,
        "d_model": dims(state, f"{root}freq_emb.weight")[1],
        "d_ff": dims(state, f"{layers}0.mlp.gate_proj.weight")[0],
        "block_dim": block_dim,
        "layers": layer_count(state, re.escape(layers) + r"(\d+)\."),
        "heads": rows and head_dim and rows // head_dim // (1 if transformers else 3),
        "head_dim": head_dim,
        "outputs": dims(state, "horizon_ff_layer.output_layer.weight")[0],
        "output_len": None,
        "context_len": None,
    }


def _sizes_of(config: TimesFM1Config) -> dict[str, int]:
    """The sizes that `_sizes` reads off the weights, as a config has them."""
    return {
        "patch_len": config.patch_len,
        "d_model": config.d_model,
        "d_ff": config.layers[0].ffn,
        "block_dim": config.block_dim,
        "layers": len(config.layers),
        "heads": config.layers[0].attn.heads,
        "head_dim": config.head_dim,
        "outputs": config.output_len * (1 + len(config.quantiles)),
    }


def _assumed(sizes: Mapping[str, int | None], where: str) -> tuple[TimesFM1Config, list[str]]:
    for name, preset in PRESETS.items():
        if _sizes_of(preset).items() <= sizes.items():
            return preset, [
                f"no config beside the file: the sizes are those of {name}, whose config is taken"
            ]
    raise CheckpointError(
        f"{where}: the sizes "
        f"({', '.join(f'{name} {size}' for name, size in sizes.items() if size)}) are no published "
        "TimesFM's, and the file does not say whether positions are embedded nor which quantiles "
        "there are. Put the "
        'original\'s hyper-parameters beside the file as config.json: {"context_len", '
        '"input_patch_len", '
        '"output_patch_len", "num_layers", "num_heads", "model_dims", "quantiles", '
        '"use_positional_embedding"}'
    )


def published(config: TimesFM1Config, table: str = "") -> dict[str, Any]:
    """The config under the names of the original's TimesFmHparams and TimesFMConfig, or of
    transformers.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "TimesFM")
    if layer.ffn != config.block_dim:
        raise pruned(
            "the original TimesFM has blocks around its layers that are as wide as these "
            f"({layer.ffn}); here they are of {config.block_dim}"
        )
    alike = {
        "head_dim": config.head_dim,
        "hidden_size": config.d_model,
        "intermediate_size": config.block_dim,
        "pad_val": config.pad_val,
        "quantiles": list(config.quantiles),
        "rms_norm_eps": config.norm_eps,
        "tolerance": config.min_scale,
        "use_positional_embedding": config.use_positional_embedding,
    }
    if table == TRANSFORMERS:
        return {
            "architectures": ["TimesFmModelForPrediction"],
            "attention_dropout": 0.0,
            "context_length": config.context_len,
            "dtype": "float32",
            "freq_size": FREQS,
            "horizon_length": config.output_len,
            "initializer_range": 0.02,
            "max_timescale": 10000,
            "min_timescale": 1,
            "model_type": "timesfm",
            "num_attention_heads": layer.attn.heads,
            "num_hidden_layers": len(config.layers),
            "patch_length": config.patch_len,
            **alike,
        }
    if layer.attn.heads * config.head_dim != config.d_model:
        raise ValueError(
            f"the original TimesFM has model_dims = heads * head width, not {config.d_model} and "
            f"{layer.attn.heads} * {config.head_dim}"
        )
    return {
        "context_len": config.context_len,
        "horizon_len": config.output_len,
        "input_patch_len": config.patch_len,
        "output_patch_len": config.output_len,
        "num_layers": len(config.layers),
        "num_heads": layer.attn.heads,
        "model_dims": config.d_model,
        "quantiles": list(config.quantiles),
        "use_positional_embedding": config.use_positional_embedding,
        "point_forecast_mode": config.point,
        "model_config": {
            "num_layers": len(config.layers),
            "num_heads": layer.attn.heads,
            "num_kv_heads": layer.attn.heads,
            "patch_len": config.patch_len,
            "horizon_len": config.output_len,
            **alike,
        },
    }


def buffers(config: TimesFM1Config, table: str = "") -> dict[str, np.ndarray]:
    """The buffers that the class of the transformers library would have; the original's
    has none.
    """
    if table != TRANSFORMERS or not config.use_positional_embedding:
        return {}
    return {TIMESCALES: timescales(config.d_model)}


def check_buffers(config: TimesFM1Config, state: Mapping[str, Any]) -> list[str]:
    """List problems of the timescales of a state dict; empty where they are the formula's, or
    absent.
    """
    if TIMESCALES not in state:
        return []
    told, ours = state[TIMESCALES], timescales(config.d_model)
    if not isinstance(told, np.ndarray) or told.shape != ours.shape or told.dtype.kind not in "f":
        return [
            f"{TIMESCALES}: checkpoint {getattr(told, 'shape', type(told).__name__)}, model "
            f"{ours.shape}"
        ]
    if not np.allclose(told, ours, rtol=1e-4, atol=0):
        return [f"{TIMESCALES}: not those from 1 to 10000; the model would not use these"]
    return []
