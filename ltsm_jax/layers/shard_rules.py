"""Mesh axes of the linears that layers have in common, by the names of their modules.

A family lists its own rules first, then these, then what is whole on every device: the first rule
whose pattern is found in a path is the one that counts, see `ltsm_jax.sharding`. Heads, units and
the width of experts lie along "tensor", the residual stream along "fsdp".
"""

Rules = tuple[tuple[str, tuple[str | None, ...]], ...]

_ATTENTION = r"/(attn|cross|group|mlstm|seq|time|var|variate)"

LAYERS: Rules = (
    (_ATTENTION + r"/(q|k|v|gate)/kernel$", ("fsdp", "tensor", None)),  # D H K
    (_ATTENTION + r"/[qkv]/bias$", ("tensor", None)),  # H K
    (_ATTENTION + r"/out/kernel$", ("tensor", None, "fsdp")),  # H K D
    (r"/(up|gate)/kernel$", ("fsdp", "tensor")),  # D F
    (r"/down/kernel$", ("tensor", "fsdp")),  # F D
    (r"/experts/(gate|up)$", (None, "fsdp", "tensor")),  # E D F
    (r"/experts/down$", (None, "tensor", "fsdp")),  # E F D
)
UP_BIAS: Rules = ((r"/up/bias$", ("tensor",)),)  # F, of feed-forward layers with biases
WHOLE: Rules = ((r"/(scale|scaling|bias)$", ()),)
