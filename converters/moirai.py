"""Key table of Moirai 1.0-R and 1.1-R: state dicts of uni2ts (MoiraiModule) <->
`ltsm_jax.models.moirai`.

The hub holds model.safetensors with config.json beside it; older Lightning files have the prefix
"module.".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters import packed_tables as packed
from converters.layout import Layout
from converters.tables import Rule
from ltsm_jax.models.moirai import PRESETS, Moirai, MoiraiConfig

MODEL, SUFFIXES, HINTS = Moirai, packed.SUFFIXES, packed.HINTS
ANCHOR = "mask_encoding.weight"


def keys(config: MoiraiConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    return [
        (r"mask_encoding\.weight", "mask", packed.ROW),
        *packed.sized_keys("in_proj", "embed"),
        *packed.attention_keys(config.head_dim),
        *packed.ffn_keys(),
        *packed.mixture_keys(config.component_parameters),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout of a Moirai state dict. None for other models, Moirai-MoE and Moirai 2
    among them.
    """
    return packed.prefix_of(state, ANCHOR)


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[MoiraiConfig, list[str]]:
    """The config of a state dict, from config.json of the hub and the shapes.

    Raises: CheckpointError that lists every contradiction.
    """
    sizes = packed.sizes_of(state, None)
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
    required = ("d_model", "num_layers")
    return packed.build_config(
        published,
        sizes,
        required,
        problems=problems,
        build=MoiraiConfig.from_published,
        where=where,
    ), []


def _sizes(config: MoiraiConfig) -> dict[str, Any]:
    shape = (len(config.patch_sizes), config.d_model, max(config.patch_sizes))
    return {"d_model": config.d_model, "num_layers": len(config.layers), "in_proj": shape}


def published(config: MoiraiConfig) -> dict[str, Any]:
    """config.json of the hub.

    Raises: ValueError for a pruned model, or one with further scales, which the original's classes
    can't hold.
    """
    if config.multiscale is not None:
        raise ValueError(
            "the original has no further scales: a model tuned by msft can't be exported"
        )
    return packed.published_config(config, MoiraiConfig.from_published)
