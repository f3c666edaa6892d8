"""Key table of Timer: state dicts of thuml/Large-Time-Series-Model (TimerBackbone, Model) <->
`ltsm_jax.models.timer`.

The published files are Lightning checkpoints whose keys carry a prefix of six characters;
fine-tuning with the original saves the bare backbone. `Model` of the original registers its modules
twice, so its own state dict holds every tensor twice: `backbone.decoder...` and `decoder...`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from converters.fields import MAX_LAYERS
from converters.layers import equal_layer, pruned
from converters.layout import Layout
from converters.pickles import quoted
from converters.tables import (
    BUFFER,
    CONV1,
    SAME,
    TRANSPOSE,
    Rule,
    problem_list,
    split_bias,
    split_in,
    split_out,
)
from ltsm_jax.models.timer import PRESETS, TABLE_LEN, Timer, TimerConfig, sinusoids
from ltsm_jax.original_files import CheckpointError

MODEL = Timer
EMBED, TABLE = "patch_embedding.value_embedding.weight", "patch_embedding.position_embedding.pe"
LAYER = r"decoder\.attn_layers\.(\d+)\."
ALIASES = {
    "decoder.": "decoder.",
    "proj.": "proj.",
    "enc_embedding.": "patch_embedding.",
}  # outside `backbone.`
SUFFIXES = {".ckpt": "lightning", ".pth": "state_dict"}
DEFAULT_HEADS = 8  # of every published checkpoint; the number is not in the file
HINTS = {
    r"/attn/": "check n_heads",
    r"/(up|down)/": "check d_ff",
    r"^(embed|head)/": "check patch_len and d_model",
}
_SIZES = ("patch_len", "d_model", "d_ff", "e_layers", "n_heads")
_LIMITS = {"e_layers": MAX_LAYERS}
_LIMIT = 1 << 24


def keys(config: TimerConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    heads = config.head_dim
    projections: list[Rule] = []
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
        projection = rf"{LAYER}attention\.{theirs}_projection\."
        projections += [
            (projection + "weight", rf"layer_\1/attn/{ours}/kernel", split_out(heads)),
            (projection + "bias", rf"layer_\1/attn/{ours}/bias", split_bias(heads)),
        ]
    return [
        (r"patch_embedding\.value_embedding\.weight", "embed/kernel", TRANSPOSE),
        (
            r"patch_embedding\.position_embedding\.pe",
            BUFFER,
            "fixed sinusoid table, checked against its formula and kept for an export",
        ),
        *projections,
        (
            LAYER + r"attention\.out_projection\.weight",
            r"layer_\1/attn/out/kernel",
            split_in(heads),
        ),
        (LAYER + r"attention\.out_projection\.bias", r"layer_\1/attn/out/bias", SAME),
        (LAYER + r"conv1\.weight", r"layer_\1/up/kernel", CONV1),
        (LAYER + r"conv1\.bias", r"layer_\1/up/bias", SAME),
        (LAYER + r"conv2\.weight", r"layer_\1/down/kernel", CONV1),
        (LAYER + r"conv2\.bias", r"layer_\1/down/bias", SAME),
        (LAYER + r"norm([12])\.weight", r"layer_\1/norm\2/scale", SAME),
        (LAYER + r"norm([12])\.bias", r"layer_\1/norm\2/bias", SAME),
        (r"decoder\.norm\.weight", "norm/scale", SAME),
        (r"decoder\.norm\.bias", "norm/bias", SAME),
        (r"proj\.weight", "head/kernel", TRANSPOSE),
        (r"proj\.bias", "head/bias", SAME),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout of a Timer state dict: prefix and aliases. None for other models."""
    for anchor in (EMBED, TABLE):
        found = [key for key in state if key.endswith(anchor)]
        if len(found) == 1 and any(".attn_layers." in key for key in state):
            prefix = found[0].removesuffix(anchor)
            return Layout(prefix, ALIASES if prefix.endswith("backbone.") else {})
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TimerConfig, list[str]]:
    """The config of a state dict (without prefix), from its shapes and the published fields beside
    it.

    Args:
      published: option names of the original's scripts (patch_len, d_model, d_ff, e_layers,
        n_heads, seq_len, ...).
    Returns: the config, and what was assumed because nothing says it.
    Raises: CheckpointError that lists every contradiction.
    """
    sizes, problems = _sizes(state)
    if published is None:
        if problems:
            raise CheckpointError(
                problem_list(f"{where}: the sizes of the model can't be read:", problems)
            )
        return _assumed(sizes, where)
    problems = []  # the table will say what is wrong with the keys
    for name in (*_SIZES, "seq_len", "pred_len"):
        told, limit = published.get(name), _LIMITS.get(name, _LIMIT)
        if name not in published:
            problems += [f"{name}: missing"] if name in _SIZES else []
        elif not isinstance(told, int) or isinstance(told, bool) or not 0 < told <= limit:
            problems.append(
                f"{name}: not an integer from 1 to "
                f"{limit}{'' if isinstance(told, int) else ': ' + quoted(told)}"
            )
        elif name in sizes and sizes[name] != told:
            problems.append(f"{name}: the config says {told}, the weights {sizes[name]}")
    if not problems:
        try:
            config = TimerConfig.from_published(dict(published))
            if config.task in Timer.tasks:
                return config, []
            problems.append(
                f"task_name: {quoted(config.task)} is not one of {', '.join(Timer.tasks)}"
            )
        except (ValueError, TypeError, OverflowError, RecursionError) as e:
            problems.append(str(e)[:500])
    raise CheckpointError(
        problem_list(f"{where}: the config does not go with the weights:", problems)
    )


def _sizes(state: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    sizes: dict[str, int] = {}
    problems = []
    embed = state.get(EMBED)
    if isinstance(embed, np.ndarray) and embed.ndim == 2:
        sizes["d_model"], sizes["patch_len"] = embed.shape
    else:
        problems.append(f"{EMBED}: missing, or not a matrix")
    layers = {int(m[1]) for key in state if (m := re.match(LAYER, key)) and len(m[1]) < 7}
    if layers and layers == set(range(len(layers))) and len(layers) <= _LIMITS["e_layers"]:
        sizes["e_layers"] = len(layers)
    else:
        problems.append(
            f"the layers {sorted(layers)[:20]} do not count from 0 to {_LIMITS['e_layers']} "
            "without a gap"
        )
    convs = [value for key, value in state.items() if re.fullmatch(LAYER + r"conv1\.weight", key)]
    widths = {
        value.shape[0] for value in convs if isinstance(value, np.ndarray) and value.ndim == 3
    }
    if len(widths) == 1:
        sizes["d_ff"] = widths.pop()
    else:
        problems.append(
            f"conv1.weight of the layers has widths {sorted(widths)[:20]}; one was expected"
        )
    return sizes, problems


def _assumed(sizes: Mapping[str, int], where: str) -> tuple[TimerConfig, list[str]]:
    shape = tuple(sizes[name] for name in ("patch_len", "d_model", "d_ff", "e_layers"))
    for name, preset in PRESETS.items():
        if shape == (preset.patch_len, preset.d_model, preset.layers[0].ffn, len(preset.layers)):
            return preset, [
                f"no config beside the file: the sizes are those of {name}, whose config is taken"
            ]
    patch_len, d_model, d_ff, layers = shape
    try:
        config = TimerConfig.of(
            patch_len,
            d_model,
            d_ff,
            layers=layers,
            heads=DEFAULT_HEADS,
            context_len=7 * patch_len,
            horizon=patch_len,
        )
    except ValueError as e:
        raise CheckpointError(
            f"{where}: the number of heads is not in the file, and the published {DEFAULT_HEADS} "
            f"does not fit: {e}. "
            'Put the original\'s options beside the file as config.json: {"patch_len", "d_model", '
            '"d_ff", "e_layers", '
            '"n_heads", "seq_len", "pred_len"}'
        ) from None
    notes = (
        f"no config beside the file: n_heads={DEFAULT_HEADS}, gelu and a context of 7 patches are "
        "assumed"
    )
    return config, [notes]


def published(config: TimerConfig) -> dict[str, Any]:
    """The config under the option names of the original's scripts.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "Timer")
    if layer.attn.heads * config.head_dim != config.d_model:
        raise pruned(
            f"the original Timer has heads that are together as wide as the model "
            f"({config.d_model}); this one has {layer.attn.heads} of {config.head_dim}"
        )
    return {
        "task_name": {"forecasting": "forecast", "anomaly": "anomaly_detection"}.get(
            config.task, config.task
        ),
        "patch_len": config.patch_len,
        "d_model": config.d_model,
        "d_ff": layer.ffn,
        "e_layers": len(config.layers),
        "n_heads": layer.attn.heads,
        "seq_len": config.context_len,
        "pred_len": config.horizon,
        "dropout": config.dropout,
        "activation": config.activation,
    }


def buffers(config: TimerConfig) -> dict[str, np.ndarray]:
    """The buffers that the original's class would have."""
    return {TABLE: sinusoids(TABLE_LEN, config.d_model)[None]}


def check_buffers(config: TimerConfig, state: Mapping[str, Any]) -> list[str]:
    """List problems of the sinusoid table of a state dict; empty where it is the formula's."""
    table, shape = state.get(TABLE), (1, TABLE_LEN, config.d_model)
    if table is None:
        return [f"{TABLE}: missing in the checkpoint"]
    if not isinstance(table, np.ndarray) or table.shape != shape or table.dtype.kind in "cb":
        return [
            f"{TABLE}: checkpoint {getattr(table, 'shape', type(table).__name__)}, model {shape}"
        ]
    # Two float32 exponentials may differ in a frequency's last place; the angle, and the table,
    # drift apart row by row.
    rounding = 0.0 if table.dtype.kind in "iu" else float(ml_dtypes.finfo(table.dtype).eps) / 2
    allowed = 1e-6 + rounding + np.arange(TABLE_LEN)[:, None] * 2.0**-23
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(table[0].astype(np.float64) - sinusoids(TABLE_LEN, config.d_model))
    if not (error <= allowed).all():
        worst = np.nanmax(error) if np.isfinite(error).any() else np.nan
        return [
            f"{TABLE}: not the sinusoid table of Timer (differs by {worst:.3g}); the model would "
            "not use this one"
        ]
    return []
