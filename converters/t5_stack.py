"""Key table of a T5 stack as Hugging Face's T5 names it: the part that the families built on T5 have in common."""

from __future__ import annotations

from converters.tables import SAME, TRANSPOSE, Rule, split_in, split_out


def stack_rules(name: str, head_dim: int, *, decoder: bool = False, gated: bool = False) -> list[Rule]:
    """The lines of one stack. name: "encoder" or "decoder", of the keys and of our paths; head_dim: `d_kv`."""
    layer, ours = rf"{name}\.block\.(\d+)\.layer\.", rf"{name}/layer_\1/"
    attentions = [("0.SelfAttention", "attn")] + ([("1.EncDecAttention", "cross")] if decoder else [])
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
            *((rf"{key}\.{x}\.weight", f"{ours}{attention}/{x}/kernel", split_out(head_dim)) for x in "qkv"),
            (rf"{key}\.o\.weight", f"{ours}{attention}/out/kernel", split_in(head_dim)),
        ]
    rules += [(rf"{layer}{j}\.layer_norm\.weight", f"{ours}norm{j + 1}/scale", SAME) for j in range(last + 1)]
    rules += [(rf"{layer}{last}\.DenseReluDense\.{x}\.weight", f"{ours}{y}/kernel", TRANSPOSE) for x, y in wide]
    rules += [
        (rf"{layer}{last}\.DenseReluDense\.wo\.weight", f"{ours}down/kernel", TRANSPOSE),
        (rf"{name}\.final_layer_norm\.weight", f"{name}/norm/scale", SAME),
    ]
    return rules
