"""Key tables of TimesFM 2.5: google-research/timesfm (`model.safetensors` of
google/timesfm-2.5-200m-pytorch), and the form of the transformers library
(`TimesFm2_5ModelForPrediction`) <-> `ltsm_jax.models.timesfm_2p5`.

The config.json of the original's checkpoint names no sizes (they stand in its code), so where the
fields are missing the tensors say them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer
from converters.layout import Layout
from converters.tables import SAME, TRANSPOSE, Rule, problem_list, split_in, split_out
from ltsm_jax.models.timesfm_2p5 import DECILES, PRESETS, TimesFM2p5, TimesFM2p5Config
from ltsm_jax.original_files import CheckpointError

MODEL = TimesFM2p5
TRANSFORMERS = "transformers"  # name of the second table
SUFFIXES = {".safetensors": "safetensors", ".bin": "state_dict", ".pth": "state_dict"}
HINTS = {
    r"/attn/": "check num_heads and head_dim",
    r"/(up|down)/": "check the width of the feed-forward layers",
    r"^(spread_)?head/": "check the output lengths and quantiles",
    r"^embed/": "check input_patch_len",
}
# ends of keys that no other model has together
_ANCHORS = {
    "": (
        "tokenizer.hidden_layer.weight",
        "stacked_xf.0.attn.qkv_proj.weight",
        "output_projection_point.output_layer.weight",
    ),
    TRANSFORMERS: (
        "model.input_ff_layer.input_layer.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "output_projection_point.output_layer.weight",
    ),
}
# what the original's Definition says beside the sizes, and what `TimesFM2p5` is
_FIXED = {
    "attention_norm": "rms",
    "feedforward_norm": "rms",
    "qk_norm": "rms",
    "use_bias": False,
    "use_rotary_position_embeddings": True,
    "ff_activation": "swish",
    "fuse_qkv": True,
}
_NORMS = {  # ours: the original's, transformers'
    "pre_attn_norm": ("pre_attn_ln", "input_layernorm"),
    "post_attn_norm": ("post_attn_ln", "post_attention_layernorm"),
    "pre_ffn_norm": ("pre_ff_ln", "pre_feedforward_layernorm"),
    "post_ffn_norm": ("post_ff_ln", "post_feedforward_layernorm"),
}


def keys(config: TimesFM2p5Config, table: str = "") -> list[Rule]:
    """The table, readable beside the original's state dict."""
    head, transformers = config.head_dim, table == TRANSFORMERS
    layer = r"model\.layers\.(\d+)\." if transformers else r"stacked_xf\.(\d+)\."
    hidden = "input_layer" if transformers else "hidden_layer"
    embed = r"model\.input_ff_layer" if transformers else "tokenizer"
    attention = (
        [
            (
                layer + r"self_attn\.(q|k|v)_proj\.weight",
                r"layer_\1/attn/\2/kernel",
                split_out(head),
            ),
            (layer + r"self_attn\.o_proj\.weight", r"layer_\1/attn/out/kernel", split_in(head)),
            (layer + r"self_attn\.(q|k)_norm\.weight", r"layer_\1/attn/\2_norm/scale", SAME),
            (layer + r"self_attn\.scaling", r"layer_\1/attn/scaling", SAME),
            (layer + r"mlp\.ff0\.weight", r"layer_\1/up/kernel", TRANSPOSE),
            (layer + r"mlp\.ff1\.weight", r"layer_\1/down/kernel", TRANSPOSE),
        ]
        if transformers
        else [
            (layer + r"attn\.qkv_proj\.weight", r"layer_\1/attn/{q,k,v}/kernel", split_out(head)),
            (layer + r"attn\.out\.weight", r"layer_\1/attn/out/kernel", split_in(head)),
            (layer + r"attn\.query_ln\.scale", r"layer_\1/attn/q_norm/scale", SAME),
            (layer + r"attn\.key_ln\.scale", r"layer_\1/attn/k_norm/scale", SAME),
            (layer + r"attn\.per_dim_scale\.per_dim_scale", r"layer_\1/attn/scaling", SAME),
            (layer + r"ff0\.weight", r"layer_\1/up/kernel", TRANSPOSE),
            (layer + r"ff1\.weight", r"layer_\1/down/kernel", TRANSPOSE),
        ]
    )
    parts = ((hidden, "hidden"), ("output_layer", "out"), ("residual_layer", "residual"))
    blocks: list[Rule] = []
    for theirs, ours in parts:
        blocks += [
            (rf"{embed}\.{theirs}\.weight", f"embed/{ours}/kernel", TRANSPOSE),
            (rf"{embed}\.{theirs}\.bias", f"embed/{ours}/bias", SAME),
            (rf"output_projection_point\.{theirs}\.weight", f"head/{ours}/kernel", TRANSPOSE),
            (
                rf"output_projection_quantiles\.{theirs}\.weight",
                f"spread_head/{ours}/kernel",
                TRANSPOSE,
            ),
        ]
    norms: list[Rule] = []
    for ours, (original, renamed) in _NORMS.items():
        norm = rf"{renamed}\.weight" if transformers else rf"{original}\.scale"
        norms.append((layer + norm, rf"layer_\1/{ours}/scale", SAME))
    return [*blocks, *attention, *norms]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout of a TimesFM 2.5 state dict: prefix, and which table. None for other models."""
    for table in (TRANSFORMERS, ""):
        found = []  # what stands before each anchor
        for end in _ANCHORS[table]:
            found.append({key.removesuffix(end) for key in state if key.endswith(end)})
        prefixes = [names.pop() for names in found[:2] if len(names) == 1]
        if len(prefixes) + bool(found[2]) > 1 and prefixes:  # one tensor may be missing
            return Layout(prefixes[0], table=table)
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TimesFM2p5Config, list[str]]:
    """The config of a state dict (without prefix), from its shapes and the published fields beside
    it.

    Args:
      published: the fields of the original's Definition, or of the transformers library's
        config.json; one with neither (that of the published checkpoint) counts as none.
    Returns: the config, and what was assumed because nothing says it.
    Raises: CheckpointError that lists every contradiction.
    """
    sizes = _sizes(state)
    if published is None or not (
        {"stacked_transformers", "hidden_size", "input_patch_len"} & set(published)
    ):
        return _assumed(sizes, where)
    told = Fields(published, where)
    if "stacked_transformers" in published or "input_patch_len" in published:
        _check_definition(told, sizes)
    else:
        _check_transformers(told, sizes)
    quantiles = published.get("quantiles", DECILES)
    if not isinstance(quantiles, list | tuple) or len(quantiles) > 999:
        told.problems.append("quantiles: not a list of fewer than 1000 numbers")
    elif not all(isinstance(q, float) for q in quantiles):
        told.problems.append("quantiles: not all of them numbers")
    told.integer("decode_index", 5, low=0)
    config = told.build(lambda: TimesFM2p5Config.from_published(dict(published)))
    told.problems += [
        f"{name}: the config says {size}, the weights {sizes[name]}"
        for name, size in _sizes_of(config).items()
        if sizes[name] not in (None, size)
    ]
    return told.build(lambda: config), []


def _check_definition(told: Fields, sizes: Mapping[str, int | None]) -> None:
    """The fields of the original's Definition, which are nested."""

    def inner(fields: Fields, name: str) -> Fields | None:
        found = fields.published.get(name)
        if not isinstance(found, Mapping):
            told.problems.append(
                f"{name}: {'missing' if name not in fields.published else 'not an object'}"
            )
            return None
        return Fields(found, told.where)

    told.integer("input_patch_len", weights=sizes["patch_len"])
    told.integer("output_patch_len")
    told.integer("output_quantile_len")
    told.integer("context_limit", 16384, high=1 << 30)
    for name, size in _BLOCKS.items():
        block = inner(told, name)
        if block:
            block.integer("hidden_dims", weights=sizes[size])
            block.choice("activation", ("swish",), "swish")
            told.problems += [f"{name}.{problem}" for problem in block.problems]
    stack = inner(told, "stacked_transformers")
    if stack:
        stack.integer("num_layers", high=MAX_LAYERS, weights=sizes["layers"])
        layer = inner(stack, "transformer")
        if layer:
            layer.integer("model_dims", weights=sizes["d_model"])
            layer.integer("hidden_dims", weights=sizes["d_ff"])
            layer.integer("num_heads", weights=sizes["heads"])
            _check_fixed(layer, _FIXED)
            told.problems += layer.problems
        told.problems += stack.problems


_BLOCKS = {
    "tokenizer": "embed_dim",
    "output_projection_point": "point_dim",
    "output_projection_quantiles": "spread_dim",
}


def _check_transformers(told: Fields, sizes: Mapping[str, int | None]) -> None:
    """The fields of the transformers library's config.json."""
    for name, size in {
        "patch_length": "patch_len",
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_attention_heads": "heads",
        "head_dim": "head_dim",
    }.items():
        told.integer(name, weights=sizes[size])
    heads = told.published.get("num_attention_heads")
    if told.published.get("num_key_value_heads", heads) != heads:
        told.problems.append(
            "num_key_value_heads: differs from num_attention_heads, which no TimesFM has"
        )
    told.integer("num_hidden_layers", high=MAX_LAYERS, weights=sizes["layers"])
    told.integer("horizon_length")
    told.integer("output_quantile_len")
    told.integer("context_length", 16384, high=1 << 30)
    told.number("rms_norm_eps", 1e-6, high=1.0)
    for name in ("use_continuous_quantile_head", "force_flip_invariance", "infer_is_positive"):
        told.boolean(name, True)
    _check_fixed(told, {"activation": "swish", "use_bias": False, "attention_bias": False})
    rope = told.published.get("rope_parameters", {})
    if (
        not isinstance(rope, Mapping)
        or rope.get("rope_theta", 1e4) != 1e4
        or rope.get("rope_type", "default") != "default"
    ):
        told.problems.append(
            "rope_parameters: not those of TimesFM 2.5 (default, rope_theta 10000)"
        )


def _check_fixed(fields: Fields, fixed: Mapping[str, Any]) -> None:
    fields.problems += [
        f"{name}: TimesFM 2.5 has {value!r} here"
        for name, value in fixed.items()
        if fields.published.get(name, value) != value
    ]


def _sizes(state: Mapping[str, Any]) -> dict[str, int | None]:
    """Read sizes off the tensors, None where they don't tell."""
    transformers = any(key.startswith("model.") for key in state)
    layers, hidden = (
        ("model.layers.", "input_layer") if transformers else ("stacked_xf.", "hidden_layer")
    )
    embed = "model.input_ff_layer" if transformers else "tokenizer"
    embed_dim, inputs = dims(state, f"{embed}.{hidden}.weight")
    (head_dim,) = dims(
        state,
        f"{layers}0.self_attn.scaling" if transformers else f"{layers}0.attn.query_ln.scale",
        1,
    )
    rows, d_model = dims(
        state,
        f"{layers}0.self_attn.q_proj.weight" if transformers else f"{layers}0.attn.qkv_proj.weight",
    )
    outputs, point_dim = dims(state, "output_projection_point.output_layer.weight")
    spreads, spread_dim = dims(state, "output_projection_quantiles.output_layer.weight")
    return {
        "patch_len": inputs and inputs // 2,
        "embed_dim": embed_dim,
        "d_model": d_model,
        "d_ff": dims(
            state, f"{layers}0.mlp.ff0.weight" if transformers else f"{layers}0.ff0.weight"
        )[0],
        "layers": layer_count(state, re.escape(layers) + r"(\d+)\."),
        "heads": rows and head_dim and rows // head_dim // (1 if transformers else 3),
        "head_dim": head_dim,
        "outputs": outputs,
        "point_dim": point_dim,
        "spreads": spreads,
        "spread_dim": spread_dim,
    }


def _sizes_of(config: TimesFM2p5Config) -> dict[str, int]:
    """The sizes that `_sizes` reads off the weights, as a config has them."""
    columns = 1 + len(config.quantiles)
    return {
        "patch_len": config.patch_len,
        "embed_dim": config.embed_dim,
        "d_model": config.d_model,
        "d_ff": config.layers[0].ffn,
        "layers": len(config.layers),
        "heads": config.layers[0].attn.heads,
        "head_dim": config.head_dim,
        "outputs": config.output_len * columns,
        "point_dim": config.point_dim,
        "spreads": config.spread_len * columns,
        "spread_dim": config.spread_dim,
    }


def _assumed(sizes: Mapping[str, int | None], where: str) -> tuple[TimesFM2p5Config, list[str]]:
    for name, preset in PRESETS.items():
        if _sizes_of(preset) == sizes:
            return preset, [
                f"no sizes beside the file: they are those of {name}, whose config is taken"
            ]
    unknown = [f"{name}: not in the tensors" for name, size in sizes.items() if not size]
    columns = 1 + len(DECILES)
    size: dict[str, Any] = dict(sizes)
    if not unknown:
        unknown = [
            f"{name}: {size[name]} is no multiple of {columns}"
            for name in ("outputs", "spreads")
            if size[name] % columns
        ]
        unknown += ["layers: too many"] if size["layers"] > MAX_LAYERS else []
    if unknown:
        raise CheckpointError(
            problem_list(f"{where}: the sizes of the model can't be read:", unknown)
        )
    try:
        config = TimesFM2p5Config.of(
            *(
                size["patch_len"],
                size["outputs"] // columns,
                size["spreads"] // columns,
                size["d_model"],
                size["d_ff"],
            ),
            *(size["layers"], size["heads"], size["head_dim"]),
            **{name: size[name] for name in _BLOCKS.values()},
        )
    except ValueError as e:
        raise CheckpointError(
            f"{where}: the sizes of the tensors make no TimesFM 2.5 with nine quantiles: {e}"
        ) from None
    return config, ["no sizes beside the file: those of the tensors, with quantiles 0.1 to 0.9"]


def published(config: TimesFM2p5Config, table: str = "") -> dict[str, Any]:
    """The config under the names of the original's Definition, or of the transformers library.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    equal_layer(config.layers, "TimesFM")
    if table == TRANSFORMERS:
        return _transformers_config(config)
    return _definition(config)


def _transformers_config(config: TimesFM2p5Config) -> dict[str, Any]:
    """The config.json of the transformers library, of a model with equal layers."""
    d, layer = config.d_model, config.layers[0]
    if {config.embed_dim, config.point_dim, config.spread_dim} != {d}:
        raise ValueError(
            f"the transformers library has blocks as wide as the model ({d}); this one has others"
        )
    return {
        "activation": "swish",
        "architectures": ["TimesFm2_5ModelForPrediction"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "context_length": config.max_context,
        "decode_index": config.point_column,
        "dtype": "float32",
        "force_flip_invariance": config.force_flip_invariance,
        "head_dim": config.head_dim,
        "hidden_size": d,
        "horizon_length": config.output_len,
        # the port's default; what it does is not what `TimesFM2p5` does
        "infer_is_positive": True,
        "initializer_range": 0.02,
        "intermediate_size": layer.ffn,
        "max_position_embeddings": 16384,
        "model_type": "timesfm2_5",
        "num_attention_heads": layer.attn.heads,
        "num_hidden_layers": len(config.layers),
        "num_key_value_heads": layer.attn.heads,
        "output_quantile_len": config.spread_len,
        "patch_length": config.patch_len,
        "quantiles": list(config.quantiles),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "use_bias": False,
        "use_continuous_quantile_head": config.use_continuous_quantile_head,
    }


def _definition(config: TimesFM2p5Config) -> dict[str, Any]:
    """The fields of the original's Definition, of a model with equal layers."""
    d, columns, layer = config.d_model, 1 + len(config.quantiles), config.layers[0]
    if layer.attn.heads * config.head_dim != d:
        raise ValueError(
            f"the original TimesFM has model_dims = heads * head width, not {d} and "
            f"{layer.attn.heads} * {config.head_dim}"
        )
    block = {"activation": "swish"}
    return {
        "context_limit": config.max_context,
        "input_patch_len": config.patch_len,
        "output_patch_len": config.output_len,
        "output_quantile_len": config.spread_len,
        "quantiles": list(config.quantiles),
        "decode_index": config.point_column,
        "tokenizer": block
        | {
            "input_dims": 2 * config.patch_len,
            "hidden_dims": config.embed_dim,
            "output_dims": d,
            "use_bias": True,
        },
        "stacked_transformers": {
            "num_layers": len(config.layers),
            "transformer": {
                "model_dims": d,
                "hidden_dims": layer.ffn,
                "num_heads": layer.attn.heads,
                **_FIXED,
            },
        },
        "output_projection_point": block
        | {
            "input_dims": d,
            "hidden_dims": config.point_dim,
            "output_dims": config.output_len * columns,
            "use_bias": False,
        },
        "output_projection_quantiles": block
        | {
            "input_dims": d,
            "hidden_dims": config.spread_dim,
            "output_dims": config.spread_len * columns,
            "use_bias": False,
        },
    }
