"""Key table of Chronos-T5 (amazon/chronos-t5-*) <-> `ltsm_jax.models.chronos_t5`.

The files are those of transformers' T5ForConditionalGeneration, in float32 although config.json
says bfloat16. The embedding table is `shared.weight`; some files hold it again as the stacks'
`embed_tokens` or as `lm_head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layout import Layout
from converters.pickles import quoted
from converters.t5_stack import equal_stacks, stack_rules
from converters.tables import COPY, SAME, Rule
from ltsm_jax.models.chronos_t5 import PRESETS, ChronosT5, ChronosT5Config
from ltsm_jax.original_files import CheckpointError

MODEL = ChronosT5
SHARED = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
BESIDE = ("generation_config.json",)
HINTS = {
    r"/(attn|cross)/": "check d_kv and num_heads",
    r"/(up|down)/": "check d_ff",
    r"^shared$": "check vocab_size and d_model",
    r"/relative_bias$": "check relative_attention_num_buckets and num_heads",
}
_QUERY, _CROSS = (
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.block.0.layer.1.EncDecAttention.q.weight",
)
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_WIDE = "encoder.block.0.layer.1.DenseReluDense.wi.weight"


def keys(config: ChronosT5Config) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    return [
        (r"shared\.weight", "shared", SAME),
        (r"(encoder|decoder)\.embed_tokens\.weight", COPY, SHARED),
        (r"lm_head\.weight", COPY, SHARED),
        *stack_rules("encoder", config.encoder.head_dim),
        *stack_rules("decoder", config.decoder.head_dim, decoder=True),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """A T5 with both stacks and nothing around them but its embedding; no prefix. None for other
    models.
    """
    ours = _QUERY in state and _CROSS in state and any(key in state for key in (SHARED, *COPIES))
    return Layout() if ours and not any("patch_embedding" in key for key in state) else None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[ChronosT5Config, list[str]]:
    """The config of a state dict from config.json, or the preset of these sizes where there is
    none.

    Raises: CheckpointError that lists every contradiction.
    """
    v, d = next(
        (found for key in (SHARED, *COPIES) if (found := dims(state, key))[0] is not None),
        (None, None),
    )
    buckets, heads = dims(state, _BIAS)
    ffn, inner = dims(state, _WIDE)[0], dims(state, _QUERY)[0]
    layers = layer_count(state, r"encoder\.block\.(\d+)\.")
    if published is None:
        for name, preset in PRESETS.items():
            stack = preset.encoder
            if (v, d, heads, ffn, layers) == (
                preset.vocab_size,
                stack.d_model,
                stack.layers[0].attn.heads,
                stack.layers[0].ffn,
                len(stack.layers),
            ):
                return preset, [
                    f"no config beside the file: the sizes are those of {name}, whose config is "
                    "taken"
                ]
        raise CheckpointError(
            f"{where}: what the tokens mean is not in the tensors, and these are not the sizes of "
            f"{', '.join(PRESETS)}. Put the published config.json beside the file."
        )
    told = Fields(published, where)
    told.integer("vocab_size", weights=v)
    told.integer("d_model", weights=d)
    k, h = told.integer("d_kv"), told.integer("num_heads", high=4096, weights=heads)
    if inner is not None and not told.problems and k * h != inner:
        told.problems.append(f"d_kv: {h} heads of {k} are not the {inner} rows of the weights")
    told.integer("d_ff", weights=ffn)
    n = told.integer("num_layers", high=MAX_LAYERS, weights=layers)
    told.integer(
        "num_decoder_layers",
        n,
        high=MAX_LAYERS,
        weights=layer_count(state, r"decoder\.block\.(\d+)\."),
    )
    told.integer("relative_attention_num_buckets", 32, low=4, high=4096, weights=buckets)
    told.integer("relative_attention_max_distance", 128)
    told.number("layer_norm_epsilon", 1e-6, high=1.0)
    told.number("dropout_rate", 0.1, high=0.999)
    told.number("initializer_factor", 1.0, high=1e3)
    told.choice("feed_forward_proj", ("relu",), "relu")
    if not told.boolean("tie_word_embeddings", True):
        told.problems.append(
            "tie_word_embeddings: false, but Chronos-T5 uses one table for input and output"
        )
    inside, beside = _part(told, "chronos_config", needed=True), _part(told, "generation_config")
    ids = _tokenizer(inside)
    ids["decoder_start_token_id"] = told.integer(
        "decoder_start_token_id", ids["pad_token_id"], low=0
    )
    for name, fields in (("", told), ("generation_config.", beside)):
        for token, number in ids.items():
            other = fields.published.get(token)
            if other is not None and other != number:
                told.problems.append(f"{name}{token}: {quoted(str(other))}, elsewhere {number}")
    told.problems += [f"chronos_config.{problem}" for problem in inside.problems]
    return told.build(lambda: ChronosT5Config.from_published(published)), []


def _part(told: Fields, name: str, needed: bool = False) -> Fields:
    """The fields of an object in the config."""
    found = told.published.get(name)
    if not isinstance(found, Mapping):
        if needed or found is not None:
            told.problems.append(f"{name}: {'missing' if found is None else 'not an object'}")
        found = {}
    return Fields(found, told.where)


def _tokenizer(inside: Fields) -> dict[str, int]:
    """Checks `chronos_config`; the ids of padding and EOS."""
    inside.choice("tokenizer_class", ("MeanScaleUniformBins",), "MeanScaleUniformBins")
    inside.choice("model_type", ("seq2seq",), "seq2seq")
    inside.boolean("use_eos_token", True)
    inside.integer("n_tokens")
    inside.integer("n_special_tokens", low=0)
    inside.integer("context_length")
    inside.integer("prediction_length", high=1 << 16)
    inside.integer("num_samples", 20, high=1 << 16)
    if inside.published.get("top_k") is not None:
        inside.integer("top_k", low=0)
    inside.number("temperature", 1.0, low=1e-6)
    inside.number("top_p", 1.0, high=1.0)
    limits = _part(inside, "tokenizer_kwargs", needed=True)
    for name in ("low_limit", "high_limit"):
        limits.number(name, low=-1e9)
    inside.problems += [f"tokenizer_kwargs.{problem}" for problem in limits.problems]
    return {name: inside.integer(name, low=0) for name in ("pad_token_id", "eos_token_id")}


def published(config: ChronosT5Config) -> dict[str, Any]:
    """The fields of config.json, and those of generation_config.json under that name.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    stacks = (config.encoder, config.decoder)
    layer = equal_stacks(*stacks, "Chronos-T5")
    of_both = {
        (s.head_dim, s.n_buckets, s.max_distance, s.eps, s.dropout, s.activation, s.gated)
        for s in stacks
    }
    if len(of_both) != 1:
        raise ValueError(
            "the original Chronos-T5 has one setting for both stacks; here they differ"
        )
    stack = config.encoder
    ids = {
        "decoder_start_token_id": config.start,
        "eos_token_id": config.eos,
        "pad_token_id": config.pad,
    }
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": stack.d_model,
        "d_kv": stack.head_dim,
        "d_ff": layer.ffn,
        "num_heads": layer.attn.heads,
        "num_layers": len(stack.layers),
        "num_decoder_layers": len(config.decoder.layers),
        "relative_attention_num_buckets": stack.n_buckets,
        "relative_attention_max_distance": stack.max_distance,
        "layer_norm_epsilon": stack.eps,
        "dropout_rate": stack.dropout,
        "initializer_factor": config.init_factor,
        "feed_forward_proj": "relu",
        "dense_act_fn": "relu",
        "is_gated_act": False,
        "is_encoder_decoder": True,
        "use_cache": True,
        "torch_dtype": "float32",
        **ids,
        "chronos_config": {
            "tokenizer_class": "MeanScaleUniformBins",
            "tokenizer_kwargs": {"low_limit": config.low, "high_limit": config.high},
            "n_tokens": config.n_tokens,
            "n_special_tokens": config.n_special,
            "pad_token_id": config.pad,
            "eos_token_id": config.eos,
            "use_eos_token": config.use_eos,
            "model_type": "seq2seq",
            "context_length": config.context_len,
            "prediction_length": config.horizon,
            "num_samples": config.n_samples,
            "temperature": config.temperature,
            "top_k": config.top_k or 0,
            "top_p": config.top_p,
        },
        "generation_config": {"_from_model_config": True, **ids},
    }
