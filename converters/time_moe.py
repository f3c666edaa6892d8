"""Key table of Time-MoE (Maple728/TimeMoE-*, TimeMoeForPrediction)
<-> `ltsm_jax.models.time_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned
from converters.layout import Layout
from converters.tables import SAME, TRANSPOSE, Rule, split_bias, split_in, split_out
from ltsm_jax.models.configs import HIDDEN_ACTS
from ltsm_jax.models.time_moe import PRESETS, TimeMoe, TimeMoeConfig
from ltsm_jax.original_files import CheckpointError

MODEL = TimeMoe
EMBED = "model.embed_layer.emb_layer.weight"
LAYER = r"model\.layers\.(\d+)\."
FFN = LAYER + r"ffn_layer\."
HINTS = {
    r"/attn/": "check num_attention_heads and num_key_value_heads",
    r"/experts/": "check num_experts, num_experts_per_tok and intermediate_size",
    r"/(shared|mlp)/": "check intermediate_size",
    r"/router/": "check num_experts",
    r"^head_": "check horizon_lengths",
}
MAX_EXPERTS = 1024


def keys(config: TimeMoeConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    k = config.head_dim
    return [
        (r"model\.embed_layer\.emb_layer\.weight", "embed_value/kernel", TRANSPOSE),
        (r"model\.embed_layer\.gate_layer\.weight", "embed_gate/kernel", TRANSPOSE),
        (LAYER + r"input_layernorm\.weight", r"layer_\1/norm1/scale", SAME),
        (LAYER + r"post_attention_layernorm\.weight", r"layer_\1/norm2/scale", SAME),
        (LAYER + r"self_attn\.(q|k|v)_proj\.weight", r"layer_\1/attn/\2/kernel", split_out(k)),
        (LAYER + r"self_attn\.(q|k|v)_proj\.bias", r"layer_\1/attn/\2/bias", split_bias(k)),
        (LAYER + r"self_attn\.o_proj\.weight", r"layer_\1/attn/out/kernel", split_in(k)),
        (FFN + r"gate\.weight", r"layer_\1/mixture/router/kernel", TRANSPOSE),
        (
            FFN + r"experts\.(\d+)\.(gate|up|down)_proj\.weight",
            r"layer_\1/mixture/experts/\3[\2]",
            TRANSPOSE,
        ),
        (
            FFN + r"shared_expert\.(gate|up|down)_proj\.weight",
            r"layer_\1/mixture/shared/\2/kernel",
            TRANSPOSE,
        ),
        (FFN + r"shared_expert_gate\.weight", r"layer_\1/mixture/shared_gate/kernel", TRANSPOSE),
        (FFN + r"(gate|up|down)_proj\.weight", r"layer_\1/mlp/\2/kernel", TRANSPOSE),  # use_dense
        (r"model\.norm\.weight", "norm/scale", SAME),
        (r"lm_heads\.(\d+)\.out_layer\.weight", r"head_\1/kernel", TRANSPOSE),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """No prefix; None for other models."""
    return Layout() if EMBED in state and "lm_heads.0.out_layer.weight" in state else None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TimeMoeConfig, list[str]]:
    """The config of a state dict from config.json, or the preset of these sizes where there is
    none.

    Raises: CheckpointError that lists every contradiction.
    """
    d, _ = dims(state, EMBED)
    layers = layer_count(state, LAYER)
    n_experts, _ = dims(state, "model.layers.0.ffn_layer.gate.weight")
    inner = dims(state, "model.layers.0.ffn_layer.shared_expert.up_proj.weight")[0]
    inner = inner or dims(state, "model.layers.0.ffn_layer.up_proj.weight")[0]
    if published is None:
        for name, preset in PRESETS.items():
            if (d, layers, n_experts, inner) == (
                preset.d_model,
                len(preset.layers),
                preset.n_experts,
                preset.layers[0].shared,
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
    told.integer("intermediate_size", weights=inner)
    told.integer("num_experts", 8, high=MAX_EXPERTS, weights=n_experts)
    told.integer("num_experts_per_tok", 2, high=MAX_EXPERTS)
    told.integer("input_size", 1, high=1)
    if published.get("num_key_value_heads") is not None:
        groups = told.integer("num_key_value_heads")
        if heads % groups:
            told.problems.append(
                f"num_attention_heads: {heads} is no multiple of num_key_value_heads ({groups})"
            )
    for j, h in enumerate(told.integers("horizon_lengths")):
        there = dims(state, f"lm_heads.{j}.out_layer.weight")[0]
        if there not in (None, h):
            told.problems.append(
                f"horizon_lengths: the config says {h} for head {j}, the weights {there}"
            )
    if width % heads:
        told.problems.append(
            f"hidden_size: {width} is no multiple of num_attention_heads ({heads})"
        )
    told.choice("hidden_act", HIDDEN_ACTS, "silu")
    told.boolean("use_dense", False)
    told.boolean("apply_aux_loss", True)
    for name, default, high in (
        ("attention_dropout", 0.0, 0.999),
        ("router_aux_loss_factor", 0.02, 1e6),
        ("rope_theta", 10000, 1e12),
        ("rms_norm_eps", 1e-6, 1.0),
        ("initializer_range", 0.02, 1e3),
    ):
        told.number(name, default, low=1e-30 if name == "rope_theta" else 0.0, high=high)
    told.integer("max_position_embeddings", 4096, high=1 << 30)
    return told.build(lambda: TimeMoeConfig.from_published(published)), []


def published(config: TimeMoeConfig) -> dict[str, Any]:
    """The config as the hub's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "Time-MoE")
    heads, inner = layer.attn.heads, layer.shared
    if (
        heads * config.head_dim != config.d_model
        or len(layer.experts.ids) != config.n_experts
        or layer.experts.ffn != inner // config.top_k
    ):
        raise pruned(
            "the original Time-MoE has all experts, hidden size = heads * head width and experts "
            f"of 1/k of the shared one's width; this one has hidden size {config.d_model}, {heads} "
            f"heads of width {config.head_dim}, experts {layer.experts.ids} of width "
            f"{layer.experts.ffn}, shared {inner}"
        )
    return {
        "architectures": ["TimeMoeForPrediction"],
        "auto_map": {
            "AutoConfig": "configuration_time_moe.TimeMoeConfig",
            "AutoModelForCausalLM": "modeling_time_moe.TimeMoeForPrediction",
        },
        "model_type": "time_moe",
        "input_size": 1,
        "hidden_size": config.d_model,
        "intermediate_size": inner,
        "horizon_lengths": list(config.horizons),
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": heads,
        "num_key_value_heads": layer.attn.key_heads,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "use_dense": config.dense,
        "apply_aux_loss": config.apply_aux,
        "router_aux_loss_factor": config.aux_factor,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_cache": True,
    }
