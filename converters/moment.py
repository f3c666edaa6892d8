"""Key table of MOMENT: state dicts of momentfm's MOMENTPipeline <-> `ltsm_jax.models.moment`.

The published files hold the reconstruction head. The original loads every file under that head and
then may put on a fresh one; a file with another head is one that was trained and saved. Its
config.json may still say "reconstruction", so the head is told by its shape and by what the config
knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.fields import Fields, dims, layer_count
from converters.layout import Layout
from converters.pickles import quoted
from converters.t5_stack import layer_of_encoder, stack_fields, stack_rules
from converters.tables import BUFFER, SAME, TRANSPOSE, Rule, Transform
from ltsm_jax.models.moment import HEAD_FIELDS, PRESETS, Moment, MomentConfig
from ltsm_jax.original_files import CheckpointError

MODEL = Moment
EMBED, MASK = "patch_embedding.value_embedding.weight", "patch_embedding.mask_embedding"
TABLE, TOKENS = "patch_embedding.position_embedding.pe", "encoder.embed_tokens.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
QUERY, WIDE = (
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
)
HEAD = "head.linear.weight"
POSITIONS = Transform(
    "position table", lambda x: _table(x), lambda x: x[None], keep=True
)  # [1, S, D] <-> [S, D]
HINTS = {
    r"/attn/": "check t5_config: num_heads, d_kv",
    r"/(up|gate|down)/": "check t5_config: d_ff",
    r"^head/": "check task_name, seq_len, forecast_horizon, num_class, n_channels",
    r"^embed/": "check patch_len",
}


def _table(x: np.ndarray) -> np.ndarray:
    if x.ndim != 3 or x.shape[0] != 1:
        raise ValueError("three axes expected, the first of length 1")
    return x[0]


def keys(config: MomentConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    return [
        (r"patch_embedding\.value_embedding\.weight", "embed/kernel", TRANSPOSE),
        (r"patch_embedding\.mask_embedding", "mask_embed", SAME),
        (r"patch_embedding\.position_embedding\.pe", "position_table", POSITIONS),
        (
            r"encoder\.embed_tokens\.weight",
            BUFFER,
            "T5's token embedding, which MOMENT holds and never uses",
        ),
        *stack_rules("encoder", config.head_dim, gated=True),
        (r"head\.linear\.weight", "head/kernel", TRANSPOSE),
        (r"head\.linear\.bias", "head/bias", SAME),
    ]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout of a MOMENT state dict. None for other models."""
    found = [key for key in state if key.endswith(MASK)]
    if len(found) == 1:
        prefix = found[0].removesuffix(MASK)
        if prefix + QUERY in state:
            return Layout(prefix)
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[MomentConfig, list[str]]:
    """The config of a state dict (without prefix), from its shapes and the published config.json
    beside it.

    Returns: the config, and what was assumed because nothing says it.
    Raises: CheckpointError that lists every contradiction.
    """
    notes: list[str] = []
    if published is None:
        published, notes = _assumed(state, where)
    kwargs, inner = published.get("model_kwargs") or {}, published.get("t5_config")
    if not isinstance(kwargs, Mapping) or not isinstance(inner, Mapping):
        raise CheckpointError(
            f"{where}: t5_config (and model_kwargs) of the config must be objects."
        )
    rows, vocab = dims(state, TABLE, 3)[1], dims(state, TOKENS)[0]
    inner = ({} if vocab is None else {"vocab_size": vocab}) | dict(inner)
    fields = {**published, **kwargs, "t5_config": inner} | (
        {} if rows is None else {"table_len": rows}
    )
    told, t5 = Fields(fields, where), Fields(inner, where)
    t5.problems = told.problems
    told.integer("seq_len")
    told.integer("patch_len", weights=dims(state, EMBED)[1])
    for name in ("forecast_horizon", "num_class", "n_channels"):
        told.integer(name, None)
    for name in ("patch_dropout", "head_dropout"):
        told.number(name, None, high=1.0)
    told.choice("task_name", ("reconstruction", "embedding", *HEAD_FIELDS), "reconstruction")
    told.choice("reduction", ("concat", "mean"), "concat")
    t5.integer("vocab_size", 32128, weights=vocab)
    stack_fields(t5, state, decoder=False, gated=True)
    return told.build(lambda: _with_head(fields, state)), notes


def _assumed(state: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """A config.json for the sizes that the shapes tell."""
    d_model, patch_len = dims(state, EMBED)
    buckets, heads = dims(state, BIAS)
    inner, d_ff, layers = (
        dims(state, QUERY)[0],
        dims(state, WIDE)[0],
        layer_count(state, r"encoder\.block\.(\d+)\."),
    )
    if (
        not (d_model and patch_len and buckets and heads and inner and d_ff and layers)
        or inner % heads
    ):
        raise CheckpointError(
            f"{where}: the sizes of the model can't be read from {EMBED}, {BIAS}, {QUERY}, {WIDE} "
            "and the number of layers. Put its config.json beside the file."
        )
    fields = published(next(iter(PRESETS.values())))
    fields["patch_len"] = fields["patch_stride_len"] = patch_len
    fields["t5_config"] |= {
        "d_model": d_model,
        "d_ff": d_ff,
        "num_heads": heads,
        "d_kv": inner // heads,
        "num_layers": layers,
        "relative_attention_num_buckets": buckets,
        "vocab_size": dims(state, TOKENS)[0] or 32128,
    }
    note = (
        "no config beside the file: a context of 512 steps and what all published models share "
        "are assumed"
    )
    return fields, [note]


def _with_head(fields: dict[str, Any], state: Mapping[str, Any]) -> MomentConfig:
    """The config with the head that the file has. Raises: ValueError."""
    told = fields.get("task_name", "reconstruction")
    body = MomentConfig.from_published(
        {**fields, "model_kwargs": {}, "task_name": "reconstruction"}
    )
    head = state.get(HEAD)
    if not isinstance(head, np.ndarray) or head.ndim != 2:
        return body  # the table will say so
    outputs, inputs = (int(n) for n in head.shape)
    fits: dict[str, dict[str, Any]] = {}
    if (outputs, inputs) == (body.patch_len, body.d_model):
        fits["reconstruction"] = {}
    if (
        inputs == body.n_patches * body.d_model
        and fields.get("forecast_horizon", outputs) == outputs
    ):
        fits["forecasting"] = {"forecast_horizon": outputs}
    variates = fields.get("n_channels", max(inputs // body.d_model, 1))
    reduction = fields.get("reduction", "concat")
    width = body.d_model * (variates if reduction == "concat" else 1)
    if inputs == width and fields.get("num_class", outputs) == outputs:
        fits["classification"] = {
            "num_class": outputs,
            "n_channels": variates,
            "reduction": reduction,
        }
    named = [name for name, options in HEAD_FIELDS.items() if not fields.keys().isdisjoint(options)]
    # what the config says, then what it has options of, then what only the shape says
    chosen = next((name for name in (told, *named, "forecasting") if name in fits), None)
    if chosen is None:
        raise ValueError(
            f"{HEAD} {head.shape} is no head for task_name {quoted(told)}, {body.n_patches} "
            f"patches of {body.patch_len} and d_model {body.d_model}; check seq_len, "
            "forecast_horizon, num_class, n_channels"
        )
    return MomentConfig.from_published(
        {**fields, "model_kwargs": {}, "task_name": chosen, **fits[chosen]}
    )


def published(config: MomentConfig) -> dict[str, Any]:
    """The config as a published config.json.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer = layer_of_encoder(config.layers, "MOMENT")
    name = {512: "small", 768: "base"}.get(config.d_model, "large")
    fields = {
        "task_name": config.head,
        "model_name": "MOMENT",
        "transformer_type": "encoder_only",
        # that of t5_config, as the original reads it under a backbone of this name
        "d_model": None,
        "seq_len": config.context_len,
        "patch_len": config.patch_len,
        "patch_stride_len": config.patch_len,
        "device": "cpu",
        "transformer_backbone": f"google/flan-t5-{name}",
        "model_kwargs": {},  # must be there for the original to load
        "t5_config": {
            "architectures": ["T5ForConditionalGeneration"],
            "d_ff": layer.ffn,
            "d_kv": config.head_dim,
            "d_model": config.d_model,
            "decoder_start_token_id": 0,
            "dropout_rate": config.dropout,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "layer_norm_epsilon": config.eps,
            "model_type": "t5",
            "n_positions": 512,
            "num_decoder_layers": len(config.layers),
            "num_heads": layer.attn.heads,
            "num_layers": len(config.layers),
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_max_distance": config.max_distance,
            "relative_attention_num_buckets": config.n_buckets,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": config.vocab_size,
        },
    }
    fields |= {
        theirs: getattr(config, ours) or 1
        for theirs, ours in HEAD_FIELDS.get(config.head, {}).items()
    }
    usual = MomentConfig.of(layers=1, d_model=2, d_ff=1, heads=1, head_dim=1)
    fields |= {
        name: getattr(config, name)
        for name in ("patch_dropout", "head_dropout")
        if getattr(config, name) != getattr(usual, name)
    }
    return fields


def buffers(config: MomentConfig) -> dict[str, np.ndarray]:
    """The token embedding that the original's class has and never uses: zeros."""
    return {TOKENS: np.zeros((config.vocab_size, config.d_model), np.float32)}
