"""Key table of Chronos-Bolt: state dicts of amazon-science/chronos-forecasting
(ChronosBoltModelForForecasting, on Hugging Face's T5) <-> `ltsm_jax.models.chronos_bolt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import Fields, are_levels, dims, layer_count
from converters.layers import pruned
from converters.layout import Layout
from converters.pickles import quoted
from converters.t5_stack import equal_stacks, stack_fields, stack_rules
from converters.tables import COPY, DROP, SAME, TRANSPOSE, Rule
from ltsm_jax.models.chronos_bolt import PRESETS, ChronosBolt, ChronosBoltConfig, activation_of
from ltsm_jax.original_files import CheckpointError

MODEL = ChronosBolt
ANCHOR = "input_patch_embedding.hidden_layer.weight"
HINTS = {
    r"/(attn|cross)/": "check num_heads and d_kv",
    r"/(up|gate|down)/": "check d_ff",
    r"^embed/": "check d_model, d_ff and input_patch_size",
    r"^head/": "check d_ff, prediction_length and the number of quantiles",
    r"^tokens": "check use_reg_token",
}
_BOTH = ("head_dim", "n_buckets", "max_distance", "activation", "gated", "eps", "dropout")
_CHRONOS = (
    "context_length",
    "prediction_length",
    "input_patch_size",
    "input_patch_stride",
    "quantiles",
)


def keys(config: ChronosBoltConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    rules: list[Rule] = [
        (r"shared\.weight", "tokens", SAME),
        (r"encoder\.embed_tokens\.weight", COPY, "shared.weight"),
        (r"decoder\.embed_tokens\.weight", COPY, "shared.weight"),
        (r"lm_head\.weight", DROP, "a head of T5 that the original does not use either"),
        (r"quantiles", DROP, "the levels, which are in the config"),
    ]
    for theirs, ours in (("input", "embed"), ("output", "head")):
        for layer, name in (("hidden", "hidden"), ("output", "out"), ("residual", "residual")):
            key = rf"{theirs}_patch_embedding\.{layer}_layer\."
            rules += [
                (rf"{key}weight", f"{ours}/{name}/kernel", TRANSPOSE),
                (rf"{key}bias", f"{ours}/{name}/bias", SAME),
            ]
    gated = config.encoder.gated
    rules += stack_rules("encoder", config.encoder.head_dim, gated=gated)
    return rules + stack_rules("decoder", config.decoder.head_dim, decoder=True, gated=gated)


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """Chronos-Bolt, whatever prefix its keys have. None for other models."""
    found = [key for key in state if key.endswith(ANCHOR)]
    if len(found) == 1:
        prefix = found[0].removesuffix(ANCHOR)
        if f"{prefix}decoder.block.0.layer.1.EncDecAttention.q.weight" in state:
            return Layout(prefix)
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[ChronosBoltConfig, list[str]]:
    """The config of a state dict (without prefix) from the published config.json, checked against
    its shapes.

    Without a config.json the sizes must be those of a published model, whose config is taken.
    Raises: CheckpointError that lists every contradiction.
    """
    if published is None:
        return _assumed(state, where)
    told = Fields(published, where)
    chronos = published.get("chronos_config")
    if not isinstance(chronos, Mapping):
        told.problems.append(
            "chronos_config: " + ("not an object" if "chronos_config" in published else "missing")
        )
        chronos = {}
    inside = Fields(chronos, where)
    patch = dims(state, ANCHOR)[1]
    out = dims(state, "output_patch_embedding.output_layer.weight")[0]
    inside.integer("context_length")
    horizon = inside.integer("prediction_length")
    inside.integer("input_patch_size", weights=None if patch is None else patch // 2)
    inside.integer("input_patch_stride")
    inside.boolean("use_reg_token", False)
    levels = chronos.get("quantiles")
    if not are_levels(levels):
        what = (
            "missing"
            if "quantiles" not in chronos
            else "not a list of 1 to 999 numbers between 0 and 1"
        )
        inside.problems.append(f"quantiles: {what}")
    elif out is not None and len(levels) * horizon != out:
        inside.problems.append(
            f"quantiles, prediction_length: {len(levels)} of {horizon} steps in the config, "
            f"together {out} in the weights"
        )
    inside.problems += [
        f"{quoted(name)}: not known" for name in chronos if name not in (*_CHRONOS, "use_reg_token")
    ]
    if isinstance(published.get("chronos_config"), Mapping):
        told.problems += [f"chronos_config.{problem}" for problem in inside.problems]
    told.integer("decoder_start_token_id", 0, low=0, high=1)
    gated = activation_of(published)[1]
    stack_fields(told, state, decoder=True, gated=gated)
    return told.build(lambda: ChronosBoltConfig.from_published(published)), []


def _assumed(state: Mapping[str, Any], where: str) -> tuple[ChronosBoltConfig, list[str]]:
    inner, d_model = dims(state, "encoder.block.0.layer.0.SelfAttention.q.weight")
    d_ff, patch = dims(state, ANCHOR)
    out = dims(state, "output_patch_embedding.output_layer.weight")[0]
    layers = [layer_count(state, rf"{name}\.block\.(\d+)\.") for name in ("encoder", "decoder")]
    sizes = (d_model, inner, d_ff, *layers, patch, out)
    for name, preset in PRESETS.items():
        stack = preset.encoder
        inner, deep = stack.layers[0].attn.heads * stack.head_dim, len(preset.decoder.layers)
        width = len(preset.levels) * preset.horizon
        if sizes == (
            stack.d_model,
            inner,
            preset.block_dim,
            len(stack.layers),
            deep,
            2 * preset.patch_len,
            width,
        ):
            return preset, [
                f"no config beside the file: the sizes are those of {name}, whose config is taken"
            ]
    raise CheckpointError(
        f"{where}: the weights don't say all sizes (heads, context and prediction length, "
        "quantiles), and these are no published model's. Put the original's config.json beside "
        "the file."
    )


def published(config: ChronosBoltConfig) -> dict[str, Any]:
    """The fields of the original's config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    one, two = config.encoder, config.decoder
    layer = equal_stacks(one, two, "Chronos-Bolt")
    if layer.ffn != config.block_dim:
        raise pruned(
            "the original Chronos-Bolt has blocks around its layers that are as wide as these "
            f"({layer.ffn}); here they are of {config.block_dim}"
        )
    if any(getattr(one, name) != getattr(two, name) for name in _BOTH):
        raise ValueError(
            "the original Chronos-Bolt has one setting for both stacks; here they differ"
        )
    return {
        "architectures": ["ChronosBoltModelForForecasting"],
        "model_type": "t5",
        "chronos_pipeline_class": "ChronosBoltPipeline",
        "chronos_config": {
            "context_length": config.context_len,
            "prediction_length": config.horizon,
            "input_patch_size": config.patch_len,
            "input_patch_stride": config.stride,
            "quantiles": list(config.levels),
            "use_reg_token": config.reg_token,
        },
        "d_model": one.d_model,
        "d_kv": one.head_dim,
        "num_heads": layer.attn.heads,
        "d_ff": config.block_dim,
        "num_layers": len(one.layers),
        "num_decoder_layers": len(two.layers),
        "feed_forward_proj": ("gated-" if one.gated else "") + one.activation.removesuffix("_new"),
        "dense_act_fn": one.activation,
        "is_gated_act": one.gated,
        "relative_attention_num_buckets": one.n_buckets,
        "relative_attention_max_distance": one.max_distance,
        "layer_norm_epsilon": one.eps,
        "dropout_rate": one.dropout,
        "initializer_factor": config.init_factor,
        "is_encoder_decoder": True,
        "use_cache": True,
        "decoder_start_token_id": config.start_token,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": config.vocabulary,
        "torch_dtype": "float32",
        **({"reg_token_id": 1} if config.reg_token else {}),
    }
