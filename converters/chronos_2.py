"""Key table of Chronos-2: state dicts of amazon-science/chronos-forecasting <->
`ltsm_jax.models.chronos_2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, are_levels, dims, layer_count
from converters.layers import equal_layer, pruned, told
from converters.layout import Layout
from converters.pickles import quoted
from converters.tables import DROP, SAME, TRANSPOSE, Rule, split_in, split_out
from ltsm_jax.models.chronos_2 import PRESETS, Chronos2, Chronos2Config
from ltsm_jax.original_files import CheckpointError

MODEL = Chronos2
ANCHOR = "input_patch_embedding.hidden_layer.weight"
MARK = "encoder.block.0.layer.1.self_attention.q.weight"
HINTS = {
    r"/(time|group)/": "check num_heads and d_kv",
    r"/(up|down)/": "check d_ff",
    r"^(embed|head)/": "check input_patch_size, quantiles and d_ff",
}
_CHRONOS = (
    "context_length",
    "input_patch_size",
    "input_patch_stride",
    "max_output_patches",
    "output_patch_size",
    "quantiles",
    "time_encoding_scale",
    "use_arcsinh",
    "use_reg_token",
)


def keys(config: Chronos2Config) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    layer = r"encoder\.block\.(\d+)\.layer\."
    rules: list[Rule] = [
        (r"shared\.weight", "tokens", SAME),
        (r"(?:quantiles|.*\.inv_freq)", DROP, "recomputed from the config"),
    ]
    for theirs, ours in (("input", "embed"), ("output", "head")):
        for part, name in (("hidden", "hidden"), ("output", "out"), ("residual", "residual")):
            key = rf"{theirs}_patch_embedding\.{part}_layer\."
            rules += [
                (rf"{key}weight", f"{ours}/{name}/kernel", TRANSPOSE),
                (rf"{key}bias", f"{ours}/{name}/bias", SAME),
            ]
    for j, name in enumerate(("time", "group")):
        rules += [
            *(
                (
                    rf"{layer}{j}\.self_attention\.{x}\.weight",
                    rf"layer_\1/{name}/{x}/kernel",
                    split_out(config.head_dim),
                )
                for x in "qkv"
            ),
            (
                rf"{layer}{j}\.self_attention\.o\.weight",
                rf"layer_\1/{name}/out/kernel",
                split_in(config.head_dim),
            ),
        ]
    rules += [
        (rf"{layer}{j}\.layer_norm\.weight", rf"layer_\1/norm{j + 1}/scale", SAME) for j in range(3)
    ]
    return [
        *rules,
        (rf"{layer}2\.mlp\.wi\.weight", r"layer_\1/up/kernel", TRANSPOSE),
        (rf"{layer}2\.mlp\.wo\.weight", r"layer_\1/down/kernel", TRANSPOSE),
        (r"encoder\.final_layer_norm\.weight", "norm/scale", SAME),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """Chronos-2, whatever prefix its keys have. None for other models."""
    found = [key for key in state if key.endswith(ANCHOR)]
    if len(found) == 1 and found[0].removesuffix(ANCHOR) + MARK in state:
        return Layout(found[0].removesuffix(ANCHOR))
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[Chronos2Config, list[str]]:
    """The config of a state dict (without prefix) from the published config.json, checked against
    its shapes.

    Without a config.json the sizes must be those of a published model, whose config is taken.
    Raises: CheckpointError that lists every contradiction.
    """
    inner, d_model = dims(state, MARK)
    d_ff, wide = dims(state, ANCHOR)
    out = dims(state, "output_patch_embedding.output_layer.weight")[0]
    layers = layer_count(state, r"encoder\.block\.(\d+)\.")
    if published is None:
        return _assumed((inner, d_model, d_ff, wide, out, layers), where)
    told = Fields(published, where)
    chronos = published.get("chronos_config")
    if isinstance(chronos, Mapping):
        inside = _chronos_fields(chronos, wide, out, where=where)
        told.problems += [f"chronos_config.{problem}" for problem in inside.problems]
    else:
        told.problems.append(
            "chronos_config: " + ("not an object" if "chronos_config" in published else "missing")
        )
    told.integer("d_model", weights=d_model)
    told.integer("d_ff", weights=d_ff)
    told.integer("num_layers", high=MAX_LAYERS, weights=layers)
    heads, width = told.integer("num_heads", high=4096), told.integer("d_kv", high=1 << 16)
    if inner is not None and heads * width != inner:
        told.problems.append(
            f"num_heads, d_kv: {heads} heads of {width} in the config, together {inner} in the "
            "weights"
        )
    told.choice("dense_act_fn", ("relu", "gelu"), "relu")
    told.boolean("is_gated_act", False)
    for name, default, high in (
        ("rope_theta", 10000.0, 1e9),
        ("layer_norm_epsilon", 1e-6, 1.0),
        ("dropout_rate", 0.1, 0.999),
        ("initializer_factor", 1.0, 1e6),
    ):
        told.number(name, default, high=high)
    return told.build(lambda: Chronos2Config.from_published(published)), []


def _assumed(sizes: tuple[int | None, ...], where: str) -> tuple[Chronos2Config, list[str]]:
    """The config of the published model that has these sizes, and a note that says so.

    Raises: CheckpointError where none has.
    """
    for name, preset in PRESETS.items():
        own = (
            preset.layers[0].time.heads * preset.head_dim,
            preset.d_model,
            preset.block_dim,
            3 * preset.patch_len,
            len(preset.levels) * preset.patch_len,
            len(preset.layers),
        )
        if sizes == own:
            return preset, [
                f"no config beside the file: the sizes are those of {name}, whose config is taken"
            ]
    raise CheckpointError(
        f"{where}: the weights don't say all sizes (heads, context length, quantiles), and "
        "these are no published model's. Put the original's config.json beside the file."
    )


def _chronos_fields(
    chronos: Mapping[str, Any], wide: int | None, out: int | None, where: str
) -> Fields:
    """The fields of `chronos_config`, read with checks. wide, out: inputs and outputs of the model
    by its weights.
    """
    inside = Fields(chronos, where)
    patch = inside.integer("input_patch_size", weights=None if wide is None else wide // 3)
    for name in ("output_patch_size", "input_patch_stride"):
        inside.integer(name, patch)
    for name in ("context_length", "max_output_patches"):
        inside.integer(name)
    if chronos.get("time_encoding_scale") is not None:
        inside.integer("time_encoding_scale")
    for name in ("use_arcsinh", "use_reg_token"):
        inside.boolean(name, False)
    levels = chronos.get("quantiles")
    if not are_levels(levels):
        what = (
            "missing"
            if "quantiles" not in chronos
            else "not a list of 1 to 999 numbers between 0 and 1"
        )
        inside.problems.append(f"quantiles: {what}")
    elif out is not None and len(levels) * patch != out:
        inside.problems.append(
            f"quantiles: {len(levels)} in the config, {out / patch:g} in the weights"
        )
    inside.problems += [f"{quoted(name)}: not known" for name in chronos if name not in _CHRONOS]
    return inside


def published(config: Chronos2Config) -> dict[str, Any]:
    """The fields of the original's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "Chronos-2")
    if layer.time.heads != layer.group.heads or layer.ffn != config.block_dim:
        raise pruned(
            "the original Chronos-2 has as many heads in both attentions and blocks as wide as the "
            f"feed-forward layers; this one has {told(config.layers)}, blocks of {config.block_dim}"
        )
    return {
        "architectures": ["Chronos2Model"],
        "model_type": "t5",
        "chronos_pipeline_class": "Chronos2Pipeline",
        "chronos_config": {
            "context_length": config.context_len,
            "input_patch_size": config.patch_len,
            "input_patch_stride": config.patch_len,
            "max_output_patches": config.max_patches,
            "output_patch_size": config.patch_len,
            "quantiles": list(config.levels),
            "time_encoding_scale": config.time_scale,
            "use_arcsinh": config.arcsinh,
            "use_reg_token": True,
        },
        "d_ff": config.block_dim,
        "d_kv": config.head_dim,
        "d_model": config.d_model,
        "dense_act_fn": config.activation,
        "dropout_rate": config.dropout,
        "feed_forward_proj": config.activation,
        "initializer_factor": config.init_factor,
        "is_gated_act": False,
        "layer_norm_epsilon": config.eps,
        "num_heads": layer.time.heads,
        "num_layers": len(config.layers),
        "pad_token_id": 0,
        "reg_token_id": 1,
        "rope_theta": config.rope_base,
        "torch_dtype": "float32",
        "vocab_size": 2,
    }
