"""Key table of TiRex-2: state dicts of NX-AI/tirex-2 <-> `ltsm_jax.models.tirex_2`.

The original's modules know some tensors under several names (the recurrence that runs backwards is
the one that runs forwards). model.safetensors holds each once, under any of its names; the older
model.ckpt, with model-config.yaml beside it, holds them under all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import pruned, told
from converters.layout import Layout
from converters.tables import COPY, SAME, TRANSPOSE, Rule, Transform, split_in, split_out
from ltsm_jax.models.tirex_2 import (
    PRESETS,
    PUBLISHED_ACTIVATIONS,
    TOKENIZER_SIZES,
    Kind,
    TiRex2,
    TiRex2Config,
    activation_named,
)
from ltsm_jax.original_files import CheckpointError

MODEL = TiRex2
BESIDE_YAML = "model-config.yaml"
HINTS = {
    r"/mlstm/": "check num_heads of the time mixers",
    r"/slstm/": "check num_slstm_heads of the time mixers",
    r"/attn/": "check num_heads of the variate mixers",
    r"^embed/": "check input_patch_size and input_ff_dim",
    r"^head/": "check quantiles, output_patch_size and h_expand",
}
_ANCHORS = ("input_patch_embedding.hidden_layer.weight", "stack.0.time_mixer.norm_lstm.weight")
_BLOCKS = {"hidden": "hidden", "output": "out", "residual": "residual"}
# Constructor arguments that do not change what the model computes.
_WITHOUT_EFFECT = ("device", "matmul_precision", "postprocessor_cfg", "rnn_backend")
_PUBLISHED = (
    "stack_config",
    "num_blocks",
    "embedding_dim",
    "input_patch_size",
    "output_patch_size",
    "quantiles",
    "tokenizer_cfg",
    "scaler_cfg",
    "h_expand",
    "context_len",
    "future_len",
    "input_ff_dim",
    "act_func",
    "dropout",
    "use_qk_norm",
    "stack_out_norm_config",
    "tta_sign_flip",
    "tta_diff",
)


def _heads_forward(x: np.ndarray) -> np.ndarray:
    if x.ndim != 3:
        raise ValueError("three axes expected")
    return x.transpose(2, 0, 1)


def _heads_inverse(x: np.ndarray) -> np.ndarray:
    return x.transpose(1, 2, 0)


# [H, out, in] <-> [in, H, out]
OF_HEADS = Transform("a linear of each head", _heads_forward, _heads_inverse)


def _split(heads: int, trailing: tuple[int, ...]) -> Transform:
    """Transform [H * ...] <-> [H, ...]."""

    def forward(x):
        if x.ndim != 1:
            raise ValueError("1 axes expected")
        return x.reshape(heads, *trailing)

    def inverse(x):
        return x.reshape(-1)

    return Transform(f"split into {heads} heads", forward, inverse)


def keys(config: TiRex2Config) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    rules: list[Rule] = []
    for theirs, ours in (("input", "embed"), ("output", "head")):
        for part, name in _BLOCKS.items():
            key = rf"{theirs}_patch_embedding\.{part}_layer\."
            rules += [
                (rf"{key}weight", f"{ours}/{name}/kernel", TRANSPOSE),
                (rf"{key}bias", f"{ours}/{name}/bias", SAME),
            ]

    time, variate = r"stack\.(\d+)\.time_mixer\.", r"stack\.(\d+)\.variate_mixer\."
    cell = rf"{time}fwd_cell\."
    backwards = rf"{time}rev_cell\."
    to_cell = r"stack.\1.time_mixer.fwd_cell."
    rules += [
        (rf"{backwards}([a-z_]+)\.(weight|bias)", COPY, rf"{to_cell}\2.\3"),
        (rf"{backwards}(_recurrent_kernel_|_bias_)", COPY, rf"{to_cell}\2"),
        (rf"{backwards}recurrent_kernel", COPY, f"{to_cell}_recurrent_kernel_"),
        (rf"{cell}recurrent_kernel", COPY, f"{to_cell}_recurrent_kernel_"),
    ]

    value, e = config.value_dim, config.slstm_dim
    m_heads, s_heads = config.d_model // value, config.d_model // e
    of_values, of_states = _split(m_heads, (value,)), _split(s_heads, (e,))
    rules += [
        (rf"{time}norm_lstm\.weight", r"layer_\1/norm1/scale", SAME),
        # mLSTM
        (rf"{cell}(q|k)\.weight", r"layer_\1/mlstm/\2/kernel", split_out(config.qk_dim)),
        (rf"{cell}v\.weight", r"layer_\1/mlstm/v/kernel", split_out(value)),
        (rf"{cell}ogate_preact\.weight", r"layer_\1/mlstm/gate/kernel", split_out(value)),
        (rf"{cell}(i|f)gate_preact\.weight", r"layer_\1/mlstm/\2/kernel", split_out(1)),
        (rf"{cell}(i|f)gate_preact\.bias", r"layer_\1/mlstm/\2/bias", _split(m_heads, (1,))),
        (rf"{cell}multihead_norm\.weight", r"layer_\1/mlstm/norm/scale", of_values),
        (rf"{cell}out_proj\.weight", r"layer_\1/mlstm/out/kernel", split_in(value)),
        # sLSTM: the original names the weights of the gates i and f the other way round.
        (rf"{cell}fgate\.weight", r"layer_\1/slstm/i/kernel", OF_HEADS),
        (rf"{cell}igate\.weight", r"layer_\1/slstm/f/kernel", OF_HEADS),
        (rf"{cell}(z|o)gate\.weight", r"layer_\1/slstm/\2/kernel", OF_HEADS),
        (rf"{cell}_recurrent_kernel_", r"layer_\1/slstm/recurrent", SAME),
        (rf"{cell}_bias_", r"layer_\1/slstm/bias", SAME),
        (rf"{cell}group_norm\.weight", r"layer_\1/slstm/norm/scale", of_states),
        # both
        (rf"{time}combination\.weight", r"layer_\1/combine/kernel", TRANSPOSE),
        (rf"{time}norm_ffn\.weight", r"layer_\1/norm2/scale", SAME),
        (rf"{time}ffn\.proj_up_gate\.weight", r"layer_\1/gate/kernel", TRANSPOSE),
        (rf"{time}ffn\.proj_(up|down)\.weight", r"layer_\1/\2/kernel", TRANSPOSE),
        (rf"{variate}norm_attn\.weight", r"layer_\1/variates/norm1/scale", SAME),
    ]
    head = config.head_dim
    for theirs, ours in (("Q", "q"), ("K", "k"), ("V", "v")):
        key = rf"{variate}attn\.W{theirs}\.weight"
        rules.append((key, rf"layer_\1/variates/attn/{ours}/kernel", split_out(head)))
    rules += [
        (rf"{variate}attn\.WO\.weight", r"layer_\1/variates/attn/out/kernel", split_in(head)),
        (rf"{variate}norm_ffn\.weight", r"layer_\1/variates/norm2/scale", SAME),
        (rf"{variate}ffn\.wi\.weight", r"layer_\1/variates/up/kernel", TRANSPOSE),
        (rf"{variate}ffn\.wo\.weight", r"layer_\1/variates/down/kernel", TRANSPOSE),
    ]
    if config.out_norm_eps is not None:
        rules.append((r"stack_out_norm\.weight", "norm/scale", SAME))
    return rules


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """TiRex-2, whatever prefix its keys have. None for other models."""
    first, second = _ANCHORS
    found = [key.removesuffix(first) for key in state if key.endswith(first)]
    if len(found) == 1 and found[0] + second in state:
        return Layout(found[0])
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TiRex2Config, list[str]]:
    """The config of a state dict (without prefix) from the published fields, checked by its shapes.

    Without a config the sizes must be those of a published model, whose config is taken.
    Raises: CheckpointError that lists every contradiction.
    """
    embed, wide = dims(state, _ANCHORS[0])
    (d_model,) = dims(state, _ANCHORS[1], rank=1)
    layers = layer_count(state, r"stack\.(\d+)\.")
    out, hidden = dims(state, "output_patch_embedding.output_layer.weight")
    if published is None:
        return _of_a_preset((d_model, embed, wide, layers, out, hidden), state, where)

    told = Fields(published, where)
    told.integer("embedding_dim", weights=d_model)
    told.integer("input_ff_dim", weights=embed)
    told.integer("num_blocks", high=MAX_LAYERS, weights=layers)
    patch = told.integer("input_patch_size", weights=None if wide is None else wide // 2)
    told.integer("output_patch_size", patch)
    for name in ("context_len", "future_len"):
        told.integer(name)
    expand = told.number("h_expand", high=1024)
    if hidden is not None and d_model is not None and int(d_model * expand) != hidden:
        told.problems.append(
            f"h_expand: {expand:g} times {d_model} in the config, {hidden} in the weights"
        )
    told.number("dropout", high=0.999)
    for name, default in (("use_qk_norm", True), ("tta_sign_flip", False), ("tta_diff", True)):
        told.boolean(name, default)
    _check_levels(told, out, patch)
    _check_activation(told)
    _check_objects(told)
    _check_stack(told, state)
    known = {*_PUBLISHED, *_WITHOUT_EFFECT}
    told.problems += [f"{str(name)[:100]!r}: not known" for name in published if name not in known]
    return told.build(lambda: TiRex2Config.from_published(published)), []


def _of_a_preset(sizes: tuple[Any, ...], state: Mapping[str, Any], where: str):
    """The config of the published model with these sizes, its layers in the order of the state."""
    for name, preset in PRESETS.items():
        own = (
            preset.d_model,
            preset.embed_dim,
            2 * preset.patch_len,
            len(preset.layers),
            len(preset.levels) * preset.patch_len,
            preset.out_dim,
        )
        if own != sizes:
            continue
        kinds = [_kind(state, i) for i in range(len(preset.layers))]
        if None in kinds:
            break
        config = TiRex2Config.of(
            preset.d_model,
            kinds,  # pyright: ignore[reportArgumentType]
            embed_dim=preset.embed_dim,
        )
        return config, [
            f"no config beside the file: the sizes are those of {name}, whose config is taken; "
            "whether its forecasts average those of the negated series is in the config alone"
        ]
    raise CheckpointError(
        f"{where}: the weights don't say all sizes (heads, context length, quantiles), and these "
        f"are no published model's. Put the original's config.json (or {BESIDE_YAML}) beside it."
    )


def _kind(state: Mapping[str, Any], layer: int) -> str | None:
    """Tell the recurrence of a layer by its tensors, under any of their names."""
    for cell in ("fwd_cell", "rev_cell"):
        prefix = f"stack.{layer}.time_mixer.{cell}."
        for kind, name in (("mlstm", "q.weight"), ("slstm", "zgate.weight")):
            if prefix + name in state:
                return kind
    return None


def _check_levels(told: Fields, out: int | None, patch: int) -> None:
    levels: Any = told.published.get("quantiles")

    def is_level(x):
        return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1

    fits = isinstance(levels, list | tuple) and 0 < len(levels) <= 999
    if not fits or not all(map(is_level, levels)):
        what = "not a list of 1 to 999 numbers between 0 and 1"
        told.problems.append(f"quantiles: {what if 'quantiles' in told.published else 'missing'}")
    elif out is not None and len(levels) * patch != out:
        told.problems.append(
            f"quantiles: {len(levels)} in the config, {out / patch:g} in the weights"
        )


def _check_activation(told: Fields) -> None:
    name = told.published.get("act_func")
    if not isinstance(name, str):
        told.problems.append("act_func: missing, or not a name")
        return
    try:
        activation_named(name)
    except ValueError as e:
        told.problems.append(str(e))


def _check_objects(told: Fields) -> None:
    """The objects within the config but for the stack, and their fields."""
    known: dict[str, dict[str, str]] = {
        "tokenizer_cfg": dict.fromkeys(TOKENIZER_SIZES, "integer"),
        "scaler_cfg": {"use_arcsinh": "boolean", "binaryaware": "boolean", "eps": "number"},
        "stack_out_norm_config": {"eps": "number", "use_rmsnorm": "boolean"},
    }
    for name, fields in known.items():
        value = told.published.get(name)
        if value is None:
            if name == "scaler_cfg":
                told.problems.append(f"{name}: missing")
            continue
        if not isinstance(value, Mapping):
            told.problems.append(f"{name}: not an object")
            continue
        inside = Fields(value, told.where)
        for field, kind in fields.items():
            if field not in value:
                continue
            if kind == "integer":
                inside.integer(field)
            elif kind == "boolean":
                inside.boolean(field)
            else:
                inside.number(field, high=1.0)
        inside.problems += [f"{str(f)[:100]!r}: not known" for f in value if f not in fields]
        told.problems += [f"{name}.{problem}" for problem in inside.problems]


def _check_stack(told: Fields, state: Mapping[str, Any]) -> None:
    """The templates and the recipe; each layer must have the recurrence that its template names."""
    stack = told.published.get("stack_config")
    if not isinstance(stack, Mapping):
        told.problems.append("stack_config: missing, or not an object")
        return
    templates, recipe = stack.get("templates"), stack.get("recipe")
    if not isinstance(templates, Mapping) or len(templates) > MAX_LAYERS:
        told.problems.append("stack_config.templates: missing, or not an object")
        return
    if (
        not isinstance(recipe, list | tuple)
        or len(recipe) > MAX_LAYERS
        or not all(isinstance(name, str) for name in recipe)
    ):
        told.problems.append(f"stack_config.recipe: not a list of at most {MAX_LAYERS} names")
        return
    before = len(told.problems)
    for name, template in templates.items():
        where = f"stack_config.templates.{str(name)[:100]}"
        mixers = {}
        for part in ("time_mixer", "variate_mixer"):
            value = template.get(part) if isinstance(template, Mapping) else None
            if not isinstance(value, Mapping):
                told.problems.append(f"{where}.{part}: missing, or not an object")
                continue
            mixers[part] = inside = Fields(value, told.where)
            inside.integer("embedding_dim")
            inside.integer("num_heads", high=4096)
            if part == "time_mixer":
                inside.choice("model_type", ("bi-mlstm", "bi-slstm"))
                if value.get("num_slstm_heads") is not None:
                    inside.integer("num_slstm_heads", high=4096)
            told.problems += [f"{where}.{part}.{problem}" for problem in inside.problems]
        if isinstance(template, Mapping) and template.get("dropout") is not None:
            inside = Fields(template, told.where)
            inside.number("dropout", high=0.999)
            told.problems += [f"{where}.{problem}" for problem in inside.problems]
    if len(told.problems) > before:
        return
    for i, name in enumerate(recipe):
        kind = _kind(state, i)
        if name in templates and kind is not None:
            wanted = templates[name]["time_mixer"]["model_type"]
            if wanted != f"bi-{kind}":
                told.problems.append(
                    f"stack_config.recipe: layer {i} is {wanted} in the config, bi-{kind} in the "
                    "weights"
                )


def published(config: TiRex2Config) -> dict[str, Any]:
    """The fields of the original's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold, and for an
      activation that they have not got.
    """
    d = config.d_model
    kinds: tuple[Kind, ...] = tuple(layer.kind for layer in config.layers)
    heads = {
        "mlstm_heads": d // config.value_dim,
        "slstm_heads": d // config.slstm_dim,
        "n_heads": d // config.head_dim,
    }
    whole = TiRex2Config.of(d, kinds, **heads, embed_dim=config.embed_dim).layers
    if config.layers != whole:
        raise pruned(
            f"the original TiRex-2 has layers whose widths follow from {d}: {told(whole)}; this "
            f"one has {told(config.layers)}"
        )
    torch_names = {ours: theirs for theirs, ours in PUBLISHED_ACTIVATIONS.items()}
    if config.activation not in torch_names:
        raise ValueError(f"the original has no activation {config.activation!r}")
    templates = {}
    for kind in sorted(set(kinds)):
        templates[kind] = {
            "time_mixer": {
                "model_type": f"bi-{kind}",
                "embedding_dim": d,
                "num_heads": heads["mlstm_heads"],
                "num_slstm_heads": heads["slstm_heads"],
            },
            "variate_mixer": {"embedding_dim": d, "num_heads": d // config.head_dim},
            "dropout": config.block_dropout,
            "eps": 1e-7,  # which the original does not use
        }
    norm = config.out_norm_eps
    expand = config.out_dim / d
    if int(d * expand) != config.out_dim:  # the original rounds down
        expand = (config.out_dim + 0.5) / d
    return {
        "stack_config": {"templates": templates, "recipe": list(kinds)},
        "num_blocks": len(kinds),
        "embedding_dim": d,
        "input_patch_size": config.patch_len,
        "output_patch_size": config.patch_len,
        "quantiles": list(config.levels),
        "tokenizer_cfg": dict.fromkeys(TOKENIZER_SIZES, config.patch_len),
        "scaler_cfg": {
            "use_arcsinh": config.arcsinh,
            "binaryaware": config.binary_aware,
            "eps": config.scale_eps,
        },
        "h_expand": expand,
        "context_len": config.context_len,
        "future_len": config.future_len,
        "input_ff_dim": config.embed_dim,
        "act_func": torch_names[config.activation],
        "dropout": config.dropout,
        "use_qk_norm": config.qk_norm,
        "tta_sign_flip": config.sign_flip,
        "tta_diff": config.difference,
        "stack_out_norm_config": None if norm is None else {"eps": norm},
    }
