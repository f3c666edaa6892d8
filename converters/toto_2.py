"""Key table of Toto 2.0 (Datadog/Toto-2.0-*, Toto2Model) <-> `ltsm_jax.models.toto_2`.

The tensors are the parameters of both, value for value: the factors of unit scaling are in neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned, told
from converters.layout import Layout
from converters.tables import SAME, TRANSPOSE, Rule, cut_into, split_bias, split_in, split_out
from ltsm_jax.models.toto_2 import LEVELS, PRESETS, Kind, Toto2, Toto2Config, kinds_of
from ltsm_jax.original_files import CheckpointError

MODEL = Toto2
SUFFIXES = {".safetensors": "safetensors"}
ANCHOR = "patch_proj.linear1.weight"
OUT = "output_head.param_projection.proj.linear2.weight"
LAYER = r"transformer\.layers\.(\d+)\."
FIRST = "transformer.layers.0."
HINTS = {
    r"/(time|variate)/": "check num_heads, num_groups, qk_dim and v_dim",
    r"/(up|gate|down)/": "check d_ff",
    r"^(embed|head)/": "check patch_size and d_model",
}
# Fields that say nothing of what is computed, or only one thing that is possible.
_UNREAD = ("heads_per_group", "pre_norm", "dropout_p", "num_output_patches")


def keys(config: Toto2Config) -> list[Rule]:
    """The table, readable beside the original's state dict.

    Raises: ValueError for a pruned model, whose heads differ between layers.
    """
    attn, qk, v = config.layers[0].attn, config.qk_dim, config.head_dim
    h, g = attn.heads, attn.key_heads
    weights = cut_into((h * qk, split_out(qk)), (g * qk, split_out(qk)), (g * v, split_out(v)))
    biases = cut_into((h * qk, split_bias(qk)), (g * qk, split_bias(qk)), (g * v, split_bias(v)))
    rules: list[Rule] = []
    for prefix, ours in (("patch_proj", "embed"), (r"output_head\.param_projection\.proj", "head")):
        for theirs, name in (("linear1", "hidden"), ("linear2", "out"), ("skip_proj", "residual")):
            rules += [
                (rf"{prefix}\.{theirs}\.weight", f"{ours}/{name}/kernel", TRANSPOSE),
                (rf"{prefix}\.{theirs}\.bias", f"{ours}/{name}/bias", SAME),
            ]
    for kind in ("time", "variate"):
        numbers = [str(i) for i, own in enumerate(config.layers) if own.kind == kind]
        if not numbers:
            continue
        attn = rf"transformer\.layers\.({'|'.join(numbers)})\.attn\."
        ours = rf"layer_\1/{kind}/"
        rules += [
            (attn + r"in_proj\.weight", ours + "{q,k,v}/kernel", weights),
            (attn + r"in_proj\.bias", ours + "{q,k,v}/bias", biases),
            (attn + r"out_proj\.weight", ours + "out/kernel", split_in(v)),
            (attn + r"out_proj\.bias", ours + "out/bias", SAME),
            (attn + r"_pds\.per_dim_scale", ours + "scaling", SAME),
            (attn + r"(q_norm|k_norm)\.weight", ours + r"\2/scale", SAME),
        ]
    return [
        *rules,
        (LAYER + r"(attn_tau|mlp_tau)", r"layer_\1/\2", SAME),
        (LAYER + r"(norm1|norm2)\.weight", r"layer_\1/\2/scale", SAME),
        (LAYER + r"ffn\.fc1\.weight", r"layer_\1/{up,gate}/kernel", TRANSPOSE),
        (LAYER + r"ffn\.fc1\.bias", r"layer_\1/{up,gate}/bias", SAME),
        (LAYER + r"ffn\.fc2\.weight", r"layer_\1/down/kernel", TRANSPOSE),
        (LAYER + r"ffn\.fc2\.bias", r"layer_\1/down/bias", SAME),
        (r"transformer\.out_norm\.weight", "norm/scale", SAME),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """Toto 2.0, whatever prefix its keys have. None for other models."""
    found = [key for key in state if key.endswith(ANCHOR)]
    if len(found) == 1:
        prefix = found[0].removesuffix(ANCHOR)
        if prefix + FIRST + "attn_tau" in state and prefix + OUT in state:
            return Layout(prefix)
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[Toto2Config, list[str]]:
    """The config of a state dict from the published config.json, checked against its shapes.

    Without a config.json the sizes must be those of a published model, whose config is taken.
    Raises: CheckpointError that lists every contradiction.
    """
    wide, inputs = dims(state, ANCHOR)
    d_model = None if wide is None else wide // 4
    outputs, _ = dims(state, OUT)
    twice, _ = dims(state, FIRST + "ffn.fc1.weight")
    joined, _ = dims(state, FIRST + "attn.in_proj.weight")
    layers = layer_count(state, LAYER)
    if published is None:
        for name, preset in PRESETS.items():
            told = (
                4 * preset.d_model,
                2 * preset.patch_len,
                len(preset.layers),
                2 * preset.ffn_width,
            )
            if told == (wide, inputs, layers, twice):
                note = f"the sizes are those of {name}, whose config is taken"
                return preset, [f"no config beside the file: {note}"]
        raise CheckpointError(
            f"{where}: the weights don't say all sizes (heads, which layers attend over variates), "
            "and these are no published model's. Put the original's config.json beside the file."
        )
    told = Fields(published, where)
    patch = told.integer("patch_size", weights=None if inputs is None else inputs // 2)
    if outputs is not None and outputs != patch * len(LEVELS):
        told.problems.append(
            f"patch_size: {patch} in the config, {outputs / len(LEVELS):g} in the head's weights"
        )
    d = told.integer("d_model", weights=d_model)
    heads = told.integer("num_heads", high=4096)
    told.integer("num_layers", high=MAX_LAYERS, weights=layers)
    if published.get("d_ff") is not None:
        told.integer("d_ff", weights=None if twice is None else twice // 2)
    sizes = {"num_groups": heads, "qk_dim": d // heads, "v_dim": None}
    for name in sizes:
        if published.get(name) is not None:
            sizes[name] = told.integer(name, high=1 << 16)
    groups, qk, v = sizes["num_groups"], sizes["qk_dim"], sizes["v_dim"] or sizes["qk_dim"]
    if heads % groups:
        told.problems.append(f"num_heads: {heads} is no multiple of num_groups ({groups})")
    wanted = (heads + groups) * qk + groups * v
    if joined is not None and joined != wanted:
        told.problems.append(
            f"num_heads, num_groups, qk_dim, v_dim: {wanted} rows of in_proj, {joined} in the "
            "weights"
        )
    told.integer("num_output_patches", 1, high=1)
    if published.get("layer_group_size") is not None:
        told.integer("layer_group_size", high=1 << 16)
    told.integer("num_variate_layers_per_group", 1, low=0, high=1 << 16)
    for name in ("attn_bias", "per_dim_scale", "use_xpos"):
        told.boolean(name, True)
    for name in ("mlp_bias", "norm_include_weight", "qk_norm", "variate_layer_first"):
        told.boolean(name, False)
    if published.get("qk_norm_include_weight") is not None:
        told.boolean("qk_norm_include_weight")
    told.number("dropout_p", 0.0, high=0.0)
    told.number("norm_eps", 1e-4, high=1.0)
    for name in ("residual_mult", "residual_attn_ratio"):
        told.number(name, 1.0, low=1e-6, high=1e6)
    return told.build(lambda: Toto2Config.from_published(published)), []


def published(config: Toto2Config) -> dict[str, Any]:
    """The fields of the original's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    kinds: tuple[Kind, ...] = tuple(layer.kind for layer in config.layers)
    layer = equal_layer(
        [dataclasses.replace(layer, kind="time") for layer in config.layers], "Toto 2.0"
    )
    heads = layer.attn.heads
    if (heads * config.head_dim, layer.ffn) != (config.attn_width, config.ffn_width):
        raise pruned(
            f"the original Toto 2.0 has layers of {config.attn_width // config.head_dim} heads and "
            f"{config.ffn_width} units; this one has {told(config.layers)}"
        )
    size, variate_layers, first = _grouped(kinds)
    groups = layer.attn.key_heads
    return {
        "attn_bias": config.attn_bias,
        "d_ff": config.ffn_width,
        "d_model": config.d_model,
        "dropout_p": 0.0,
        "heads_per_group": heads // groups,
        "layer_group_size": size,
        "mlp_bias": config.mlp_bias,
        "norm_eps": config.norm_eps,
        "norm_include_weight": config.norm_weight,
        "num_groups": groups,
        "num_heads": heads,
        "num_layers": len(kinds),
        "num_output_patches": 1,
        "num_variate_layers_per_group": variate_layers,
        "patch_size": config.patch_len,
        "per_dim_scale": config.per_dim_scale,
        "pre_norm": True,
        "qk_dim": config.qk_dim,
        "qk_norm": config.qk_norm,
        "qk_norm_include_weight": config.qk_norm_weight,
        "residual_attn_ratio": config.residual_ratio,
        "residual_mult": config.residual_mult,
        "use_xpos": config.xpos,
        "v_dim": config.head_dim,
        "variate_layer_first": first,
    }


def _grouped(kinds: tuple[Kind, ...]) -> tuple[int, int, bool]:
    """The smallest groups of layers that make these kinds: their size, layers over variates,
    whether those lead.

    Raises: ValueError where no groups do.
    """
    for size in range(1, len(kinds) + 1):
        for variate_layers in range(size + 1):
            for first in (False, True):
                if kinds_of(len(kinds), size, variate_layers, variate_first=first) == kinds:
                    return size, variate_layers, first
    raise ValueError(
        f"the original has layers in groups of equal order; {', '.join(kinds)} are in none. A "
        "model without some of its layers can't be exported."
    )
