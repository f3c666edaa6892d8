"""Key table of Moirai 2.0-R: state dicts of uni2ts (Moirai2Module) <-> `ltsm_jax.models.moirai_2`.

The hub holds model.safetensors with config.json beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters import packed_tables as packed
from converters.layout import Layout
from converters.pickles import quoted
from converters.tables import SAME, TRANSPOSE, Rule
from ltsm_jax.models.moirai_2 import PRESETS, Moirai2, Moirai2Config

MODEL, SUFFIXES = Moirai2, packed.SUFFIXES
HINTS = {
    r"/attn/": "check d_model: heads have 64 numbers",
    r"/ffn/": "check d_ff and d_model",
    r"^embed/": "check patch_size and d_model",
    r"^head/": "check num_predict_token, quantile_levels, patch_size and d_model",
}
ANCHOR, OUT = "in_proj.hidden_layer.weight", "out_proj.output_layer.weight"


def keys(config: Moirai2Config) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    rules: list[Rule] = []
    for theirs, ours in (("in_proj", "embed"), ("out_proj", "head")):
        for layer in ("hidden", "output", "residual"):
            rules += [
                (rf"{theirs}\.{layer}_layer\.weight", f"{ours}/{layer}/kernel", TRANSPOSE),
                (rf"{theirs}\.{layer}_layer\.bias", f"{ours}/{layer}/bias", SAME),
            ]
    return [*rules, *packed.attention_keys(config.head_dim), *packed.ffn_keys()]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout of a Moirai 2 state dict. None for other models."""
    return packed.prefix_of(state, ANCHOR)


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[Moirai2Config, list[str]]:
    """The config of a state dict, from config.json of the hub and the shapes.

    Raises: CheckpointError that lists every contradiction.
    """
    sizes = packed.sizes_of(state, packed.LAYER + r"ffn\.fc1\.weight")
    shapes: dict[str, tuple[int, ...]] = {
        key: tuple(getattr(state.get(key), "shape", ())) for key in (ANCHOR, OUT)
    }
    if published is None:
        told = sizes | shapes
        name, note = packed.preset_of(
            told, {name: _sizes(config) for name, config in PRESETS.items()}, where
        )
        return PRESETS[name], [note]
    problems, levels = [], published.get("quantile_levels")
    if len(shapes[ANCHOR]) == 2:
        sizes["patch_size"] = shapes[ANCHOR][1] // 2
    if (
        not isinstance(levels, list | tuple)
        or not 0 < len(levels) <= 1000
        or not all(map(_is_level, levels))
    ):
        problems.append(
            f"quantile_levels: not a list of numbers between 0 and 1: {quoted(str(levels)[:100])}"
        )
    elif (
        len(shapes[OUT]) == 2
        and sizes.get("patch_size")
        and not shapes[OUT][0] % (n := len(levels))
    ):
        sizes["num_predict_token"] = shapes[OUT][0] // n // sizes["patch_size"]
    required = ("patch_size", "d_model", "d_ff", "num_layers", "num_predict_token")
    return packed.build_config(
        published,
        sizes,
        required,
        problems=problems,
        build=Moirai2Config.from_published,
        where=where,
    ), []


def _is_level(x: Any) -> bool:
    return isinstance(x, float) and 0 < x < 1


def _sizes(config: Moirai2Config) -> dict[str, Any]:
    out = config.n_patches * len(config.levels) * config.patch_size
    return {
        "d_model": config.d_model,
        "num_layers": len(config.layers),
        "d_ff": config.layers[0].ffn,
        ANCHOR: (config.d_model, 2 * config.patch_size),
        OUT: (out, config.d_model),
    }


def published(config: Moirai2Config) -> dict[str, Any]:
    """config.json of the hub.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    fields = {
        "attn_dropout_p": config.attn_dropout,
        "d_ff": config.layers[0].ffn,
        "d_model": config.d_model,
        "dropout_p": config.dropout,
        "max_seq_len": config.max_seq_len,
        "num_layers": len(config.layers),
        "num_predict_token": config.n_patches,
        "patch_size": config.patch_size,
        "quantile_levels": list(config.levels),
        "scaling": config.scaling,
    }
    return packed.checked_fields(config, Moirai2Config.from_published, fields)
