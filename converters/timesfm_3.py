"""Key table of TimesFM 3.0: `model.safetensors` of google/timesfm-3.0-pytorch <->
`ltsm_jax.models.timesfm_3`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned, told
from converters.layout import Layout
from converters.tables import SAME, TRANSPOSE, Rule, split_bias, split_in, split_out
from ltsm_jax.models.timesfm_3 import OPTIONS, PRESETS, TimesFM3, TimesFM3Config
from ltsm_jax.original_files import CheckpointError

MODEL = TimesFM3
SUFFIXES = {".safetensors": "safetensors", ".bin": "state_dict", ".pth": "state_dict"}
HINTS = {
    r"/(seq|var)/": "check num_heads",
    r"/(up|down)/": "check the width of the feed-forward layers",
    r"^head/": "check output_patch_len and quantiles",
    r"^embed/": "check input_patch_len, output_patch_len and residual_block_config",
}
# Ends of keys that no other model has together.
ANCHOR = "pre_transformer_resblock.hidden_layer.weight"
MARK = "transformer_stack.layers.0.seq_attn.query_proj.weight"
_ACTIVATIONS = ("relu", "swish", "none")
_NORMS = ("rms", "none")


def keys(config: TimesFM3Config) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    head = config.head_dim
    layer = r"transformer_stack\.layers\.(\d+)\."
    block = r"pre_transformer_resblock\."
    rules: list[Rule] = [(block + r"pre_norm\.weight", "embed/norm/scale", SAME)]
    for theirs, ours in (("hidden", "hidden"), ("output", "out"), ("residual", "residual")):
        rules += [
            (rf"{block}{theirs}_layer\.weight", f"embed/{ours}/kernel", TRANSPOSE),
            (rf"{block}{theirs}_layer\.bias", f"embed/{ours}/bias", SAME),
        ]
    for kind in ("seq", "var"):
        attention, ours = rf"{layer}{kind}_attn\.", rf"layer_\1/{kind}"
        for theirs, name in (("query", "q"), ("key", "k"), ("value", "v")):
            rules += [
                (rf"{attention}{theirs}_proj\.weight", f"{ours}/{name}/kernel", split_out(head)),
                (rf"{attention}{theirs}_proj\.bias", f"{ours}/{name}/bias", split_bias(head)),
            ]
        rules += [
            (rf"{attention}out_proj\.weight", f"{ours}/out/kernel", split_in(head)),
            (rf"{attention}out_proj\.bias", f"{ours}/out/bias", SAME),
            (rf"{attention}query_ln\.weight", f"{ours}/q_norm/scale", SAME),
            (rf"{attention}key_ln\.weight", f"{ours}/k_norm/scale", SAME),
            (rf"{attention}per_dim_scale\.per_dim_scale", f"{ours}/scaling", SAME),
        ]
    for place in ("pre", "post"):
        rules += [
            (rf"{layer}{place}_seq_attn_ln\.weight", rf"layer_\1/{place}_seq_norm/scale", SAME),
            (rf"{layer}{place}_var_attn_ln\.weight", rf"layer_\1/{place}_var_norm/scale", SAME),
            (rf"{layer}{place}_ff_ln\.weight", rf"layer_\1/{place}_ffn_norm/scale", SAME),
        ]
    for theirs, ours in (("ff0", "up"), ("ff1", "down")):
        rules += [
            (rf"{layer}{theirs}\.weight", rf"layer_\1/{ours}/kernel", TRANSPOSE),
            (rf"{layer}{theirs}\.bias", rf"layer_\1/{ours}/bias", SAME),
        ]
    return [
        *rules,
        (r"output_head\.weight", "head/kernel", TRANSPOSE),
        (r"output_head\.bias", "head/bias", SAME),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """TimesFM 3, whatever prefix its keys have. None for other models."""
    found = []
    for end in (ANCHOR, MARK):
        found += [key.removesuffix(end) for key in state if key.endswith(end)]
    # One of the two may be missing, which is then told by its name.
    return Layout(found[0]) if found and set(found) == {found[0]} else None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TimesFM3Config, list[str]]:
    """The config of a state dict (without prefix) from the published config.json, checked against
    its shapes.

    Without a config.json the sizes must be those of a published model, whose config is taken.
    Raises: CheckpointError that lists every contradiction.
    """
    sizes = _sizes(state)
    if published is None:
        for name, preset in PRESETS.items():
            if _sizes_of(preset) == sizes:
                note = f"no config beside the file: the sizes are those of {name}, whose config "
                return preset, [note + "is taken"]
        raise CheckpointError(
            f"{where}: the weights don't say all of the model (patch lengths, quantiles, options), "
            "and their sizes are no published model's. Put the original's config.json beside the "
            "file."
        )

    told = Fields(published, where)
    told.integer("input_patch_len")
    told.integer("output_patch_len")
    for name in OPTIONS:
        if name not in ("value_clip", "linear_detrending_threshold"):
            told.boolean(name, True)
    told.number("value_clip", 1e20, high=1e30)
    told.number("linear_detrending_threshold", 0.5)
    told.choice("input_transform", ("identity",), "identity")
    quantiles = published.get("quantiles")
    if not isinstance(quantiles, list | tuple) or not 0 < len(quantiles) <= 999:
        told.problems.append("quantiles: missing, or not a list of 1 to 999 numbers")
    elif not all(isinstance(q, float) and 0 < q < 1 for q in quantiles):
        told.problems.append("quantiles: not all of them numbers between 0 and 1")

    block = _inner(told, "residual_block_config")
    if block is not None:
        block.integer("hidden_dims", weights=sizes["embed_dim"])
        block.choice("activation", _ACTIVATIONS)
        block.choice("prenorm", _NORMS, "none")
        block.boolean("use_bias")
        block.boolean("identity_skip", False)
        told.problems += [f"residual_block_config.{problem}" for problem in block.problems]
    stack = _inner(told, "transformer_config")
    if stack is not None:
        stack.integer("num_layers", high=MAX_LAYERS, weights=sizes["layers"])
        layer = _inner(stack, "transformer")
        if layer is not None:
            _check_layer(layer, sizes)
            wide = layer.published.get("model_dims")
            if block is not None and block.published.get("output_dims", wide) != wide:
                layer.problems.append("model_dims: not residual_block_config.output_dims")
            stack.problems += [f"transformer.{problem}" for problem in layer.problems]
        told.problems += [f"transformer_config.{problem}" for problem in stack.problems]

    config = told.build(lambda: TimesFM3Config.from_published(dict(published)))
    told.problems += [
        f"{name}: {size} by the config, {sizes[name]} in the weights"
        for name, size in _sizes_of(config).items()
        if sizes[name] not in (None, size)
    ]
    return told.build(lambda: config), []


def _inner(fields: Fields, name: str) -> Fields | None:
    """The fields of an object among the fields."""
    found = fields.published.get(name)
    if isinstance(found, Mapping):
        return Fields(found, fields.where)
    what = "not an object" if name in fields.published else "missing"
    fields.problems.append(f"{name}: {what}")
    return None


def _check_layer(layer: Fields, sizes: Mapping[str, int | None]) -> None:
    """The fields of all layers."""
    d_model = layer.integer("model_dims", weights=sizes["d_model"])
    layer.integer("hidden_dims", weights=sizes["d_ff"])
    heads = layer.integer("num_heads", high=4096)
    if d_model % heads:
        layer.problems.append(f"num_heads: {heads} do not divide model_dims ({d_model})")
    layer.choice("ff_activation", _ACTIVATIONS)
    layer.choice("qk_norm", _NORMS)
    layer.choice("v_norm", _NORMS, "none")
    for name in ("use_bias", "use_rope_seq", "use_rope_var"):
        layer.boolean(name)
    for name in ("causal_attention", "use_memory_efficient_attention", "use_sdpa"):
        layer.boolean(name, True)
    for name in ("attention_norm", "feedforward_norm"):
        layer.choice(name, ("rms",), "rms")


def _sizes(state: Mapping[str, Any]) -> dict[str, int | None]:
    """Read sizes off the shapes of the tensors; None for those that are not there."""
    embed_dim, inputs = dims(state, ANCHOR)
    outputs, d_model = dims(state, "output_head.weight")
    (head_dim,) = dims(state, MARK.replace("query_proj.weight", "per_dim_scale.per_dim_scale"), 1)
    return {
        "token": inputs,
        "embed_dim": embed_dim,
        "outputs": outputs,
        "d_model": d_model,
        "head_dim": head_dim,
        "d_ff": dims(state, "transformer_stack.layers.0.ff0.weight")[0],
        "layers": layer_count(state, r"transformer_stack\.layers\.(\d+)\."),
    }


def _sizes_of(config: TimesFM3Config) -> dict[str, int]:
    """Give the sizes that `_sizes` reads off the weights of a model of this config."""
    return {
        "token": 2 * (config.patch_len + config.output_len),
        "embed_dim": config.embed_dim,
        "outputs": config.output_len * len(config.quantiles),
        "d_model": config.d_model,
        "head_dim": config.head_dim,
        "d_ff": config.layers[0].ffn,
        "layers": len(config.layers),
    }


def published(config: TimesFM3Config) -> dict[str, Any]:
    """The fields of the original's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "TimesFM")
    found = {(dims.heads, dims.qk, dims.value) for dims in (layer.seq, layer.var)}
    k = config.head_dim
    if found != {(config.d_model // k, k, k)}:
        raise pruned(
            "the original TimesFM has heads that are together as wide as the model "
            f"({config.d_model}); this one has {told(config.layers)}"
        )
    return {
        "input_patch_len": config.patch_len,
        "input_transform": "identity",
        "output_patch_len": config.output_len,
        "quantiles": list(config.quantiles),
        "residual_block_config": {
            "activation": config.activation,
            "dropout": 0.0,
            "hidden_dims": config.embed_dim,
            "identity_skip": config.identity_skip,
            "output_dims": config.d_model,
            "prenorm": "rms" if config.embed_norm else "none",
            "use_bias": config.embed_bias,
        },
        "transformer_config": {
            "num_layers": len(config.layers),
            "transformer": {
                "attention_norm": "rms",
                "causal_attention": config.causal,
                "debug_no_masking": False,
                "deterministic": True,
                "feedforward_norm": "rms",
                "ff_activation": config.ffn_activation,
                "hidden_dims": layer.ffn,
                "max_variates": 32,
                "model_dims": config.d_model,
                "num_heads": layer.seq.heads,
                "paired_token_skip_second": False,
                "qk_norm": "rms" if config.qk_norm else "none",
                "training": True,
                "use_bias": config.use_bias,
                "use_memory_efficient_attention": not config.scaled,
                "use_rope_seq": config.rope_seq,
                "use_rope_var": config.rope_var,
                "use_sdpa": True,
                "v_norm": "rms" if config.value_norm else "none",
            },
            "use_remat": True,
        },
        **{theirs: getattr(config, ours) for theirs, ours in OPTIONS.items()},
    }
