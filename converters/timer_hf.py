"""Key table of Timer on the hub (thuml/timer-base-84m, TimerForPrediction) <->
`ltsm_jax.models.timer_hf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned
from converters.layout import Layout
from converters.tables import SAME, TRANSPOSE, Rule, split_bias, split_in, split_out
from ltsm_jax.models.configs import HIDDEN_ACTS
from ltsm_jax.models.timer_hf import PRESETS, TimerHf, TimerHfConfig
from ltsm_jax.original_files import CheckpointError

MODEL = TimerHf
EMBED, HEAD = "model.embed_layer.emb.weight", r"lm_heads\.(\d+)\.weight"
LAYER = r"model\.layers\.(\d+)\."
HINTS = {
    r"/attn/": "check num_attention_heads",
    r"/mlp/": "check intermediate_size",
    r"^embed/": "check input_token_len and hidden_size",
    r"^head_": "check output_token_lens",
}


def keys(config: TimerHfConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    k = config.head_dim
    return [
        (r"model\.embed_layer\.emb\.weight", "embed/kernel", TRANSPOSE),
        (LAYER + r"self_attn\.(q|k|v)_proj\.weight", r"layer_\1/attn/\2/kernel", split_out(k)),
        (LAYER + r"self_attn\.(q|k|v)_proj\.bias", r"layer_\1/attn/\2/bias", split_bias(k)),
        (LAYER + r"self_attn\.o_proj\.weight", r"layer_\1/attn/out/kernel", split_in(k)),
        (LAYER + r"ffn_layer\.(gate|up|down)_proj\.weight", r"layer_\1/mlp/\2/kernel", TRANSPOSE),
        (LAYER + r"norm(1|2)\.weight", r"layer_\1/norm\2/scale", SAME),
        (LAYER + r"norm(1|2)\.bias", r"layer_\1/norm\2/bias", SAME),
        (r"model\.norm\.weight", "norm/scale", SAME),
        (r"model\.norm\.bias", "norm/bias", SAME),
        (HEAD, r"head_\1/kernel", TRANSPOSE),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """No prefix; None for other models."""
    return Layout() if EMBED in state and "lm_heads.0.weight" in state else None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TimerHfConfig, list[str]]:
    """The config of a state dict from config.json, or the preset of these sizes where there is
    none.

    Raises: CheckpointError that lists every contradiction.
    """
    d, patch_len = dims(state, EMBED)
    ffn, _ = dims(state, "model.layers.0.ffn_layer.up_proj.weight")
    layers = layer_count(state, LAYER)
    if published is None:
        for name, preset in PRESETS.items():
            if (d, patch_len, ffn, layers) == (
                preset.d_model,
                preset.patch_len,
                preset.layers[0].ffn,
                len(preset.layers),
            ):
                return preset, [
                    f"no config beside the file: the sizes are those of {name}, whose config is "
                    "taken"
                ]
        raise CheckpointError(
            f"{where}: the number of heads is not in the tensors, and these are not the sizes of "
            f"{', '.join(PRESETS)}. Put the published config.json beside the file."
        )
    told = Fields(published, where)
    told.integer("num_hidden_layers", high=MAX_LAYERS, weights=layers)
    width = told.integer("hidden_size", weights=d)
    heads = told.integer("num_attention_heads")
    told.integer("input_token_len", weights=patch_len)
    told.integer("intermediate_size", weights=ffn)
    for j, q in enumerate(told.integers("output_token_lens")):
        there = dims(state, f"lm_heads.{j}.weight")[0]
        if there not in (None, q):
            told.problems.append(
                f"output_token_lens: the config says {q} for head {j}, the weights {there}"
            )
    if width % heads:
        told.problems.append(
            f"hidden_size: {width} is no multiple of num_attention_heads ({heads})"
        )
    told.choice("hidden_act", HIDDEN_ACTS, "silu")
    told.number("attention_dropout", 0.0, high=0.999)
    told.number("initializer_range", 0.02, high=1e3)
    told.integer("max_position_embeddings", 10000, high=1 << 30)
    return told.build(lambda: TimerHfConfig.from_published(published)), []


def published(config: TimerHfConfig) -> dict[str, Any]:
    """The config as the hub's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "Timer")
    if layer.attn.heads * config.head_dim != config.d_model:
        raise pruned(
            f"the original Timer has heads that are together as wide as the model "
            f"({config.d_model}); this one has {layer.attn.heads} of {config.head_dim}"
        )
    return {
        "architectures": ["TimerForPrediction"],
        "auto_map": {
            "AutoConfig": "configuration_timer.TimerConfig",
            "AutoModelForCausalLM": "modeling_timer.TimerForPrediction",
        },
        "model_type": "timer",
        "input_token_len": config.patch_len,
        "output_token_lens": list(config.horizons),
        "hidden_size": config.d_model,
        "intermediate_size": layer.ffn,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": layer.attn.heads,
        "hidden_act": config.activation,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_positions,
        "rope_theta": 10000,
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_cache": True,
    }
