"""Key table of Timer-XL: state dicts of thuml/OpenLTM (models/timer_xl.py) <->
`ltsm_jax.models.timer_xl`.

The published file is a bare state dict; files trained under DataParallel have `module.` before
every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned
from converters.layout import Layout
from converters.tables import CONV1, SAME, TRANSPOSE, Rule, split_bias, split_in, split_out
from ltsm_jax.models.timer_xl import PATCHES, PRESETS, TimerXL, TimerXLConfig
from ltsm_jax.original_files import CheckpointError

MODEL = TimerXL
LAYER = r"blocks\.attn_layers\.(\d+)\."
BIAS = "blocks.attn_layers.0.attention.inner_attention.attn_bias.emb.weight"
HINTS = {
    r"/attn/": "check n_heads",
    r"/(up|down)/": "check d_ff",
    r"^embed/": "check input_token_len and d_model",
    r"^head/": "check output_token_len",
}
_SIZES = {"input_token_len", "output_token_len", "d_model", "n_heads", "e_layers", "d_ff"}


def keys(config: TimerXLConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    k = config.head_dim
    attention = LAYER + r"attention\."
    projections: list[Rule] = []
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
        projection = rf"{attention}{theirs}_projection\."
        projections += [
            (projection + "weight", rf"layer_\1/attn/{ours}/kernel", split_out(k)),
            (projection + "bias", rf"layer_\1/attn/{ours}/bias", split_bias(k)),
        ]
    return [
        (r"embedding\.weight", "embed/kernel", TRANSPOSE),
        (r"embedding\.bias", "embed/bias", SAME),
        *projections,
        (attention + r"out_projection\.weight", r"layer_\1/attn/out/kernel", split_in(k)),
        (attention + r"out_projection\.bias", r"layer_\1/attn/out/bias", SAME),
        (
            attention + r"inner_attention\.attn_bias\.emb\.weight",
            r"layer_\1/attn/variate_bias",
            SAME,
        ),
        (LAYER + r"conv1\.weight", r"layer_\1/up/kernel", CONV1),
        (LAYER + r"conv1\.bias", r"layer_\1/up/bias", SAME),
        (LAYER + r"conv2\.weight", r"layer_\1/down/kernel", CONV1),
        (LAYER + r"conv2\.bias", r"layer_\1/down/bias", SAME),
        (LAYER + r"norm(1|2)\.weight", r"layer_\1/norm\2/scale", SAME),
        (LAYER + r"norm(1|2)\.bias", r"layer_\1/norm\2/bias", SAME),
        (r"blocks\.norm\.weight", "norm/scale", SAME),
        (r"blocks\.norm\.bias", "norm/bias", SAME),
        (r"head\.weight", "head/kernel", TRANSPOSE),
        (r"head\.bias", "head/bias", SAME),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The prefix of a Timer-XL state dict ("" or "module."). None for other models."""
    for key in state:
        if key.endswith(BIAS) and key.removesuffix(BIAS) + "embedding.weight" in state:
            return Layout(key.removesuffix(BIAS))
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TimerXLConfig, list[str]]:
    """The config of a state dict (without prefix), from its shapes, which tell every size, and the
    options beside it.

    Raises: CheckpointError that lists every contradiction.
    """
    d, patch_len = dims(state, "embedding.weight")
    sizes = {
        "d_model": d,
        "input_token_len": patch_len,
        "output_token_len": dims(state, "head.weight")[0],
        "d_ff": dims(state, "blocks.attn_layers.0.conv1.weight", 3)[0],
        "n_heads": dims(state, BIAS)[1],
        "e_layers": layer_count(state, LAYER),
    }
    notes = []
    if published is None:
        if missing := [name for name, size in sizes.items() if not size]:
            raise CheckpointError(
                f"{where}: the sizes of the model can't be read: {', '.join(missing)}"
            )
        published = sizes
        for name, preset in PRESETS.items():
            known = {
                "d_model": preset.d_model,
                "input_token_len": preset.patch_len,
                "output_token_len": preset.horizon,
                "d_ff": preset.layers[0].ffn,
                "n_heads": preset.layers[0].attn.heads,
                "e_layers": len(preset.layers),
            }
            if known == sizes:
                return preset, [
                    f"no config beside the file: the sizes are those of {name}, whose config is "
                    "taken"
                ]
        notes = [
            "no config beside the file: relu, instance scaling, joint variates, 30 patches of "
            "context are assumed"
        ]
    told = Fields(published, where)
    read = {
        name: told.integer(
            name, high=MAX_LAYERS if name == "e_layers" else 1 << 20, weights=sizes[name]
        )
        for name in sorted(_SIZES)
    }
    if read["d_model"] % read["n_heads"]:
        told.problems.append(
            f"d_model: {read['d_model']} is no multiple of n_heads ({read['n_heads']})"
        )
    told.integer("seq_len", PATCHES * read["input_token_len"], high=1 << 24)
    told.number("dropout", 0.1, high=0.999)
    for name, default in (("use_norm", True), ("covariate", False), ("flash_attention", False)):
        told.boolean(name, default)
    return told.build(lambda: TimerXLConfig.from_published(published)), notes


def published(config: TimerXLConfig) -> dict[str, Any]:
    """The config under the option names of the original's scripts.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "Timer-XL")
    if layer.attn.heads * config.head_dim != config.d_model:
        raise pruned(
            f"the original Timer-XL has heads that are together as wide as the model "
            f"({config.d_model}); this one has {layer.attn.heads} of {config.head_dim}"
        )
    return {
        "input_token_len": config.patch_len,
        "output_token_len": config.horizon,
        "d_model": config.d_model,
        "n_heads": layer.attn.heads,
        "e_layers": len(config.layers),
        "d_ff": layer.ffn,
        "seq_len": config.context_len,
        "dropout": config.dropout,
        "activation": config.activation,
        "use_norm": config.use_norm,
        "flash_attention": False,
        "covariate": config.covariate,
        "output_attention": False,
        "data": "MultivariateDatasetBenchmark" if config.joint else "UnivariateDatasetBenchmark",
    }
