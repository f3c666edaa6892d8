"""Parts of the key tables of the Moirai families: the encoder, the mixture head, and reading their
config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from converters.fields import MAX_LAYERS
from converters.layers import pruned, told
from converters.layout import Layout
from converters.pickles import quoted
from converters.tables import SAME, TRANSPOSE, Rule, Transform, problem_list, split_in, split_out
from ltsm_jax.original_files import CheckpointError

LAYER = r"encoder\.layers\.(\d+)\."
SUFFIXES = {
    ".safetensors": "safetensors",
    ".bin": "state_dict",
    ".pth": "state_dict",
    ".ckpt": "lightning",
}
HINTS = {
    r"/attn/": "check d_model: heads have 64 numbers",
    r"/ffn/": "check d_ff and d_model",
    r"^(embed|residual|feature|head)": "check patch_sizes and d_model",
}
COMMON = ("d_model", "num_layers", "max_seq_len")
_LIMIT = 1 << 20  # far above any Moirai: a hostile file must not make us build a huge model


def _swapped(x: np.ndarray) -> np.ndarray:
    if x.ndim != 3:
        raise ValueError("three axes expected")
    return np.swapaxes(x, 1, 2)


def _one_row(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or x.shape[0] != 1:
        raise ValueError("two axes expected, the first of length 1")
    return x[0]


BY_SIZE = Transform("transpose each size", _swapped, _swapped)  # [Z, out, in] <-> [Z, in, out]
ROW = Transform("the only row", _one_row, lambda x: x[None])  # [1, D] <-> [D]


def attention_keys(head_dim: int) -> list[Rule]:
    """The encoder without its feed-forward layers."""
    attn = LAYER + r"self_attn\."
    return [
        (attn + r"(q|k|v)_proj\.weight", r"layer_\1/attn/\2/kernel", split_out(head_dim)),
        (attn + r"out_proj\.weight", r"layer_\1/attn/out/kernel", split_in(head_dim)),
        (attn + r"(q|k)_norm\.weight", r"layer_\1/attn/\2_norm/scale", SAME),
        (attn + r"var_attn_bias\.emb\.weight", r"layer_\1/attn/variate_bias", SAME),
        (LAYER + r"norm([12])\.weight", r"layer_\1/norm\2/scale", SAME),
        (r"encoder\.norm\.weight", "norm/scale", SAME),
    ]


def ffn_keys() -> list[Rule]:
    """Feed-forward layers of one SwiGLU each."""
    names = (("fc1", "up"), ("fc_gate", "gate"), ("fc2", "down"))
    return [
        (LAYER + rf"ffn\.{theirs}\.weight", rf"layer_\1/ffn/{ours}/kernel", TRANSPOSE)
        for theirs, ours in names
    ]


def sized_keys(theirs: str, ours: str) -> list[Rule]:
    """A layer with weights for each patch size."""
    key = re.escape(theirs)
    return [(key + r"\.weight", f"{ours}/kernel", BY_SIZE), (key + r"\.bias", f"{ours}/bias", SAME)]


def mixture_keys(parameters: Sequence[tuple[str, ...]]) -> list[Rule]:
    """The head; parameters: the names of each component's."""
    rules = sized_keys("param_proj.proj.weights_logits", "head/weights")
    for i, names in enumerate(parameters):
        for name in names:
            rules += sized_keys(
                f"param_proj.proj.components.{i}.{name}", f"head/component_{i}_{name}"
            )
    return rules


def prefix_of(state: Mapping[str, Any], anchor: str) -> Layout | None:
    """The layout in which exactly one key ends with `anchor`, beside an encoder with variate
    biases.
    """
    found = [key for key in state if key == anchor or key.endswith("." + anchor)]
    if len(found) != 1 or not any(
        key.endswith(".self_attn.var_attn_bias.emb.weight") for key in state
    ):
        return None
    return Layout(found[0].removesuffix(anchor))


def sizes_of(state: Mapping[str, Any], ffn: str | None) -> dict[str, Any]:
    """Read sizes off the shapes: d_model, num_layers, and d_ff where `ffn` matches the keys of
    feed-forward inputs.
    """
    sizes: dict[str, Any] = {}
    norm = state.get("encoder.norm.weight")
    if isinstance(norm, np.ndarray) and norm.ndim == 1:
        sizes["d_model"] = norm.shape[0]
    layers = {int(m[1]) for key in state if (m := re.match(LAYER, key)) and len(m[1]) < 7}
    if layers and layers == set(range(len(layers))):
        sizes["num_layers"] = len(layers)
    if ffn is not None:
        found = [value for key, value in state.items() if re.fullmatch(ffn, key)]
        widths = {
            value.shape[0] for value in found if isinstance(value, np.ndarray) and value.ndim == 2
        }
        if len(widths) == 1:
            sizes["d_ff"] = widths.pop()
    return sizes


def patch_problems(state: Mapping[str, Any], patches: Any, anchor: str) -> list[str]:
    """List problems of the published `patch_sizes`, also against the layer whose weight is
    `anchor`.
    """
    fits = (
        isinstance(patches, list | tuple) and 0 < len(patches) <= 64 and all(map(_is_size, patches))
    )
    if not fits or len(set(patches)) < len(patches) or max(patches) > 1 << 14:
        return [
            f"patch_sizes: not a list of different integers from 1 to {1 << 14}: "
            f"{quoted(str(patches))}"
        ]
    weight = state.get(anchor)
    if isinstance(weight, np.ndarray) and weight.ndim == 3:
        told, found = (len(patches), max(patches)), (weight.shape[0], weight.shape[2])
        if told != found:
            return [
                f"patch_sizes: the config has {told[0]}, the largest {told[1]}, the weights "
                f"{found[0]}, {found[1]}"
            ]
    return []


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 < x <= _LIMIT


def build_config(
    published: Mapping[str, Any],
    sizes: Mapping[str, Any],
    required: Sequence[str],
    problems: list[str],
    build: Callable[[Mapping[str, Any]], Any],
    where: str,
) -> Any:
    """The config of the published fields.

    Args:
      sizes: integers that the shapes say. required: integers that must be there. problems: found
        before.
      build: the config's `from_published`.
    Raises: CheckpointError that lists every contradiction.
    """
    if "num_layers" not in sizes:
        problems.append("encoder.layers: their numbers do not count from 0 without a gap")
    for name in dict.fromkeys((*required, *COMMON)):
        told, limit = published.get(name), MAX_LAYERS if name == "num_layers" else _LIMIT
        if name not in published:
            problems += [f"{name}: missing"] if name in required else []
        elif not isinstance(told, int) or not _is_size(told) or told > limit:
            problems.append(f"{name}: not an integer from 1 to {limit}: {quoted(str(told))}")
        elif name in sizes and sizes[name] != told:
            problems.append(f"{name}: the config says {told}, the weights {sizes[name]}")
    for name in ("dropout_p", "attn_dropout_p"):
        told = published.get(name, 0.0)
        if isinstance(told, bool) or not isinstance(told, int | float) or not 0 <= told < 1:
            problems.append(f"{name}: not a number in [0, 1): {quoted(str(told))}")
    if not isinstance(published.get("scaling", True), bool):
        problems.append(f"scaling: neither true nor false: {quoted(str(published['scaling']))}")
    if not problems:
        try:
            return build(published)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as e:
            problems.append(str(e)[:500])
    raise CheckpointError(
        problem_list(f"{where}: the config does not go with the weights:", problems)
    )


def preset_of(
    told: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[str, str]:
    """Name of the first preset whose sizes are all those of the weights, and the note that says so.

    Raises: CheckpointError where there is none: what a patch is can't be read from the weights.
    """
    for name, sizes in presets.items():
        if all(told.get(key) == size for key, size in sizes.items()):
            return (
                name,
                f"no config beside the file: the sizes are those of {name}, whose config is taken",
            )
    raise CheckpointError(
        f"{where}: what its patches and heads are is not in the weights, and their sizes ("
        + ", ".join(f"{key} {size}" for key, size in told.items())
        + ") are not those of a published model. Put the original's config.json beside the file."
    )


def published_config(
    config: Any, build: Callable[[Mapping[str, Any]], Any], **others: Any
) -> dict[str, Any]:
    """config.json of a model with a mixture head; others: fields of one family.

    Raises: ValueError for a model whose widths the published fields can't say.
    """
    fields = {
        "attn_dropout_p": config.attn_dropout,
        "d_model": config.d_model,
        "distr_output": config.distr_output(),
        "dropout_p": config.dropout,
        "max_seq_len": config.max_seq_len,
        "num_layers": len(config.layers),
        "patch_sizes": list(config.patch_sizes),
        "scaling": config.scaling,
        **others,
    }
    return checked_fields(config, build, fields)


def checked_fields(
    config: Any, build: Callable[[Mapping[str, Any]], Any], fields: dict[str, Any]
) -> dict[str, Any]:
    """`fields`, sorted, if they give the widths of `config` back.

    Raises: ValueError otherwise.
    """
    again = build(fields)
    ours, theirs = ((c.d_model, c.head_dim, c.layers) for c in (config, again))
    if ours != theirs:
        raise pruned(
            "the original has equal layers with heads of about 64 numbers, at this width "
            f"{told(again.layers)}; this one has heads of {config.head_dim} numbers and "
            f"{told(config.layers)}"
        )
    return dict(sorted(fields.items()))
