"""Key table of a T5 stack as Hugging Face's T5 names it: the part that the families built on T5
have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned, told
from converters.tables import SAME, TRANSPOSE, Rule, split_in, split_out

ACTIVATIONS = ("relu", "gelu", "gelu_new")


def stack_rules(
    name: str, head_dim: int, *, decoder: bool = False, gated: bool = False
) -> list[Rule]:
    """The lines of one stack. name: "encoder" or "decoder", of the keys and of our paths; head_dim:
    `d_kv`.
    """
    layer, ours = rf"{name}\.block\.(\d+)\.layer\.", rf"{name}/layer_\1/"
    attentions = [("0.SelfAttention", "attn")] + (
        [("1.EncDecAttention", "cross")] if decoder else []
    )
    last = 2 if decoder else 1
    wide = [("wi_0", "gate"), ("wi_1", "up")] if gated else [("wi", "up")]
    rules: list[Rule] = [
        (
            rf"{name}\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
            f"{name}/relative_bias",
            SAME,
        )
    ]
    for theirs, attention in attentions:
        key = layer + theirs.replace(".", r"\.")
        rules += [
            *(
                (rf"{key}\.{x}\.weight", f"{ours}{attention}/{x}/kernel", split_out(head_dim))
                for x in "qkv"
            ),
            (rf"{key}\.o\.weight", f"{ours}{attention}/out/kernel", split_in(head_dim)),
        ]
    rules += [
        (rf"{layer}{j}\.layer_norm\.weight", f"{ours}norm{j + 1}/scale", SAME)
        for j in range(last + 1)
    ]
    rules += [
        (rf"{layer}{last}\.DenseReluDense\.{x}\.weight", f"{ours}{y}/kernel", TRANSPOSE)
        for x, y in wide
    ]
    rules += [
        (rf"{layer}{last}\.DenseReluDense\.wo\.weight", f"{ours}down/kernel", TRANSPOSE),
        (rf"{name}\.final_layer_norm\.weight", f"{name}/norm/scale", SAME),
    ]
    return rules


def stack_fields(told: Fields, state: Mapping[str, Any], *, decoder: bool, gated: bool) -> None:
    """Checks T5's sizes in a published config (d_model, d_kv, num_heads, d_ff, num_layers, ...)
    against each other and against a state dict; what is wrong goes to `told.problems`.
    """
    first = "encoder.block.0.layer."
    heads = dims(state, f"{first}0.SelfAttention.relative_attention_bias.weight")
    inner, d_model = dims(state, f"{first}0.SelfAttention.q.weight")
    d_ff, _ = dims(state, f"{first}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")
    told.integer("d_model", weights=d_model)
    n, k = told.integer("num_heads", high=4096, weights=heads[1]), told.integer("d_kv")
    if inner is not None and n * k != inner:
        told.problems.append(f"num_heads * d_kv: {n} * {k} in the config, {inner} in the weights")
    told.integer("d_ff", weights=d_ff)
    layers = told.integer(
        "num_layers", high=MAX_LAYERS, weights=layer_count(state, r"encoder\.block\.(\d+)\.")
    )
    if decoder and (
        told.published.get("num_decoder_layers") is not None
        or "num_decoder_layers" not in told.published
    ):
        deep = layer_count(state, r"decoder\.block\.(\d+)\.")
        told.integer("num_decoder_layers", layers, high=MAX_LAYERS, weights=deep)
    told.integer("relative_attention_num_buckets", 32, high=1 << 16, weights=heads[0])
    told.integer("relative_attention_max_distance", 128)
    told.number("layer_norm_epsilon", 1e-6, high=1.0)
    told.number("dropout_rate", 0.1, high=1.0)
    told.number("initializer_factor", 1.0, high=1e3)
    told.choice("feed_forward_proj", ("relu", "gelu", "gated-relu", "gated-gelu"), "relu")
    told.choice("dense_act_fn", tuple(ACTIVATIONS), "relu")
    told.boolean("is_gated_act", False)


def equal_stacks(encoder: Any, decoder: Any, original: str) -> Any:
    """Give the record that all layers of both stacks have, but for the decoder's second attention.

    Raises: ValueError for layers that differ, as removal leaves them.
    """
    alike = [*encoder.layers]
    for layer in decoder.layers:
        if layer.cross != layer.attn:
            raise pruned(
                f"the original {original} has as many heads in both attentions of its decoder; "
                f"this one has {told(decoder.layers)}"
            )
        alike.append(dataclasses.replace(layer, cross=None))
    return layer_of_encoder(alike, original)


def layer_of_encoder(layers: Sequence[Any], original: str) -> Any:
    """Give the record that all layers have, whose heads use the first columns of the bias table.

    Raises: ValueError for others, as removal leaves them.
    """
    layer = equal_layer(layers, original)
    if layer.attn.ids is not None:
        raise pruned(
            f"the heads of the original {original} use all columns of the bias table; here they "
            f"use {layer.attn.ids}"
        )
    return layer
