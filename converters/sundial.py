"""Key table of Sundial (thuml/sundial-base-128m, SundialForPrediction) <->
`ltsm_jax.models.sundial`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned
from converters.layout import Layout
from converters.tables import SAME, TRANSPOSE, Rule, split_bias, split_in, split_out
from ltsm_jax.models.configs import HIDDEN_ACTS
from ltsm_jax.models.sundial import PRESETS, Sundial, SundialConfig
from ltsm_jax.original_files import CheckpointError

MODEL = Sundial
EMBED, FLOW_IN = "model.embed_layer.residual_layer.weight", "flow_loss.net.input_proj.weight"
LAYER, BLOCK = r"model\.layers\.(\d+)\.", r"flow_loss\.net\.res_blocks\.(\d+)\."
HINTS = {
    r"/attn/": "check num_attention_heads",
    r"/mlp/": "check intermediate_size",
    r"^embed_": "check input_token_len and intermediate_size",
    r"^flow/": "check output_token_lens, hidden_size and flow_loss_depth",
}
MAX_STEPS = 100_000


def keys(config: SundialConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    k = config.head_dim
    linears = [  # with bias, and not split into heads
        (r"model\.embed_layer\.hidden_layer", "embed_hidden"),
        (r"model\.embed_layer\.output_layer", "embed_out"),
        (r"model\.embed_layer\.residual_layer", "embed_residual"),
        (r"flow_loss\.net\.time_embed\.mlp\.0", "flow/time_in"),
        (r"flow_loss\.net\.time_embed\.mlp\.2", "flow/time_out"),
        (r"flow_loss\.net\.cond_embed", "flow/condition"),
        (r"flow_loss\.net\.input_proj", "flow/input"),
        (BLOCK + r"mlp\.0", r"flow/block_\1_in"),
        (BLOCK + r"mlp\.2", r"flow/block_\1_out"),
        (BLOCK + r"adaLN_modulation\.1", r"flow/block_\1_modulation"),
        (r"flow_loss\.net\.final_layer\.linear", "flow/final"),
        (r"flow_loss\.net\.final_layer\.adaLN_modulation\.1", "flow/final_modulation"),
    ]
    norms = [
        (LAYER + r"norm(1|2)", r"layer_\1/norm\2"),
        (r"model\.norm", "norm"),
        (BLOCK + "in_ln", r"flow/block_\1_norm"),
    ]
    of_linears: list[Rule] = []
    for key, path in linears:
        of_linears.append((rf"{key}\.weight", f"{path}/kernel", TRANSPOSE))
        of_linears.append((rf"{key}\.bias", f"{path}/bias", SAME))
    of_norms: list[Rule] = []
    for key, path in norms:
        of_norms.append((rf"{key}\.weight", f"{path}/scale", SAME))
        of_norms.append((rf"{key}\.bias", f"{path}/bias", SAME))
    return [
        (LAYER + r"self_attn\.(q|k|v)_proj\.weight", r"layer_\1/attn/\2/kernel", split_out(k)),
        (LAYER + r"self_attn\.(q|k|v)_proj\.bias", r"layer_\1/attn/\2/bias", split_bias(k)),
        (LAYER + r"self_attn\.o_proj\.weight", r"layer_\1/attn/out/kernel", split_in(k)),
        (LAYER + r"ffn_layer\.(gate|up|down)_proj\.weight", r"layer_\1/mlp/\2/kernel", TRANSPOSE),
        *of_linears,
        *of_norms,
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """No prefix; None for other models."""
    return Layout() if EMBED in state and FLOW_IN in state else None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[SundialConfig, list[str]]:
    """The config of a state dict from config.json, or the preset of these sizes where there is
    none.

    Raises: CheckpointError that lists every contradiction.
    """
    d, both = dims(state, EMBED)
    sizes = {
        "hidden_size": d,
        "input_token_len": None if both is None else both // 2,
        "intermediate_size": dims(state, "model.layers.0.ffn_layer.up_proj.weight")[0],
        "num_hidden_layers": layer_count(state, LAYER),
        "flow_loss_depth": layer_count(state, BLOCK),
    }
    horizon = dims(state, FLOW_IN)[1]
    if published is None:
        for name, preset in PRESETS.items():
            known = (
                preset.d_model,
                preset.patch_len,
                preset.layers[0].ffn,
                len(preset.layers),
                preset.flow_depth,
            )
            if (*known, preset.horizon) == (*sizes.values(), horizon):
                return preset, [
                    f"no config beside the file: the sizes are those of {name}, whose config is "
                    "taken"
                ]
        raise CheckpointError(
            f"{where}: the number of heads is not in the tensors, and these are not the sizes of "
            f"{', '.join(PRESETS)}. Put the published config.json beside the file."
        )
    told = Fields(published, where)
    for name in ("num_hidden_layers", "hidden_size", "input_token_len", "intermediate_size"):
        told.integer(
            name, high=MAX_LAYERS if name == "num_hidden_layers" else 1 << 20, weights=sizes[name]
        )
    told.integer(
        "flow_loss_depth", 3, low=0, high=MAX_LAYERS, weights=sizes["flow_loss_depth"] or 0
    )
    width, heads = told.integer("hidden_size"), told.integer("num_attention_heads")
    if width % heads:
        told.problems.append(
            f"hidden_size: {width} is no multiple of num_attention_heads ({heads})"
        )
    last = told.integers("output_token_lens")[-1]
    if horizon not in (None, last):
        told.problems.append(
            f"output_token_lens: the config ends with {last}, the weights have {horizon}"
        )
    told.integer("num_sampling_steps", 50, high=MAX_STEPS)
    told.integer("diffusion_batch_mul", 4, high=MAX_STEPS)
    told.integer("max_position_embeddings", 10000, high=1 << 30)
    told.choice("hidden_act", HIDDEN_ACTS, "silu")
    told.number("dropout_rate", 0.1, high=0.999)
    told.number("initializer_range", 0.02, high=1e3)
    told.problems = list(dict.fromkeys(told.problems))
    return told.build(lambda: SundialConfig.from_published(published)), []


def published(config: SundialConfig) -> dict[str, Any]:
    """The config as the hub's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = equal_layer(config.layers, "Sundial")
    if layer.attn.heads * config.head_dim != config.d_model or layer.ffn != config.embed_dim:
        raise pruned(
            "the original Sundial has heads that are together as wide as the model "
            f"({config.d_model}) and a patch embedding as wide as the feed-forward layers "
            f"({layer.ffn}); this one has {layer.attn.heads} heads of {config.head_dim} and an "
            f"embedding of {config.embed_dim}"
        )
    return {
        "architectures": ["SundialForPrediction"],
        "auto_map": {
            "AutoConfig": "configuration_sundial.SundialConfig",
            "AutoModelForCausalLM": "modeling_sundial.SundialForPrediction",
        },
        "model_type": "sundial",
        "input_token_len": config.patch_len,
        "output_token_lens": [config.horizon],
        "hidden_size": config.d_model,
        "intermediate_size": config.embed_dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": layer.attn.heads,
        "flow_loss_depth": config.flow_depth,
        "num_sampling_steps": config.sampling_steps,
        "diffusion_batch_mul": config.train_draws,
        "hidden_act": config.activation,
        "dropout_rate": config.dropout,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_positions,
        "rope_theta": 10000,
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_cache": True,
    }
