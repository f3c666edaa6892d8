"""Key table of Moirai-MoE 1.0-R: state dicts of uni2ts (MoiraiMoEModule) <->
`ltsm_jax.models.moirai_moe`.

The hub holds model.safetensors with config.json beside it. The centroids are a float64 buffer: the
file's own tensor is kept for an export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters import packed_tables as packed
from converters.layout import Layout
from converters.tables import TRANSPOSE, Rule, Transform
from ltsm_jax.models.moirai_moe import N_EXPERTS, PRESETS, MoiraiMoe, MoiraiMoeConfig

MODEL, SUFFIXES = MoiraiMoe, packed.SUFFIXES
HINTS = packed.HINTS | {r"^centroid$": f"the original has {N_EXPERTS} experts in every layer"}
ANCHOR = "encoder.centroid"
CENTROID = Transform("the same in float32", lambda x: x, lambda x: x, keep=True)
EXPERT = packed.LAYER + r"ffn\.experts\.(\d+)\."


def keys(config: MoiraiMoeConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    return [
        *packed.sized_keys("in_proj", "embed"),
        *packed.sized_keys("res_proj", "residual"),
        *packed.sized_keys("feat_proj", "feature"),
        (r"encoder\.centroid", "centroid", CENTROID),
        *packed.attention_keys(config.head_dim),
        (EXPERT + r"fc1\.weight", r"layer_\1/ffn/experts/up[\2]", TRANSPOSE),
        (EXPERT + r"fc_gate\.weight", r"layer_\1/ffn/experts/gate[\2]", TRANSPOSE),
        (EXPERT + r"fc2\.weight", r"layer_\1/ffn/experts/down[\2]", TRANSPOSE),
        *packed.mixture_keys(config.component_parameters),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout of a Moirai-MoE state dict, by its feature layer; None for other models."""
    return packed.prefix_of(state, "feat_proj.weight")


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[MoiraiMoeConfig, list[str]]:
    """The config of a state dict, from config.json of the hub and the shapes.

    Raises: CheckpointError that lists every contradiction.
    """
    sizes = packed.sizes_of(state, EXPERT + r"fc1\.weight")
    if published is None:
        weight = state.get("in_proj.weight")
        told = sizes | {"in_proj": weight.shape if isinstance(weight, np.ndarray) else None}
        name, note = packed.preset_of(
            told, {name: _sizes(config) for name, config in PRESETS.items()}, where
        )
        return PRESETS[name], [note]
    problems = packed.patch_problems(state, published.get("patch_sizes"), "in_proj.weight")
    if "distr_output" not in published:
        problems.append("distr_output: missing")
    required = ["d_model", "num_layers"]
    if published.get("d_ff") is not None:
        required.append("d_ff")
    return packed.build_config(
        published,
        sizes,
        required,
        problems=problems,
        build=MoiraiMoeConfig.from_published,
        where=where,
    ), []


def _sizes(config: MoiraiMoeConfig) -> dict[str, Any]:
    shape = (len(config.patch_sizes), config.d_model, max(config.patch_sizes))
    return {
        "d_model": config.d_model,
        "num_layers": len(config.layers),
        "d_ff": config.layers[0].experts.ffn,
        "in_proj": shape,
    }


def published(config: MoiraiMoeConfig) -> dict[str, Any]:
    """config.json of the hub.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    if any(layer.experts.ids != tuple(range(N_EXPERTS)) for layer in config.layers):
        raise ValueError(
            f"the original has {N_EXPERTS} experts in every layer; a pruned model can't be exported"
        )
    return packed.published_config(
        config, MoiraiMoeConfig.from_published, d_ff=config.layers[0].experts.ffn
    )
