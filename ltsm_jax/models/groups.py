"""Parts that a family declares as prunable: attention heads, feed-forward units, experts.

A family lists them as `Model.prunable`; `models.parts` finds and removes them without knowing the
family.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Group:
    """Parts of a layer that a model can lose as a whole: attention heads, feed-forward units,
    experts.

    kind: what they are. pattern: regular expression that the path of the module around them matches
    in full. size: the config's entry that says how many there are, a field and an index such as
    "n_heads.\\1" ("encoder.ffn_dims.\\1" of a nested config), \\1 being the pattern's first group;
    or a function of (config, match) that gives it. makes, takes: linears in the module whose
      outputs, or inputs, are the parts: of heads [H, K], of units [F]; names that a layer has not
        got are passed over. For experts the stacked kernels [E, ...].
    axis: where in the outputs of `makes` (and of the stacked kernels) the parts are counted.
    ids: the entry that lists the original numbers of those that are left, for layers in which a
      part has a place of its own (a column of a bias table, an output of a router). With ids,
      `size` may be None: their number says it.
    others: further leaves in the module with an entry per part: (name, axis).
    shared: entry that counts the key and value heads, where query heads share them.
    inner: entry that holds the width F of each expert, for experts.
    values: entry that holds the width of the values, where it may differ from that of queries and
      keys. The values come out of the last of `makes`; of a fused linear, out of the last along its
      first axis.
    scores: entry that holds the width of queries and keys, where it may shrink: nothing happens to
      them before their product, and its scale stays that of the whole width.
    pairs: entry that lists, for each key head, the rotary pairs (j, j + K/2) left in queries and
      keys.
    table: leaf with a column per id on its last axis, as far as the largest id that any layer has
      left.
    normed: what a head gives is normalised before `takes`, so that a channel that the values lack
      is not 0 there: a head is dead where `takes` masks all of its channels, and nothing else
      tells. Without `values`.
    swapped: the module gets the tokens [..., M, S, D] of the layer around it with M and S
      exchanged.
    beside: further entries that a layer has, such as its kind; they go where the layer goes.
    """

    kind: Literal["heads", "ffn units", "experts"]
    pattern: str
    size: "str | Callable[[Any, re.Match], str] | None"
    makes: tuple[str, ...]
    takes: tuple[str, ...]
    axis: int = 0
    ids: str | None = None
    others: tuple[tuple[str, int], ...] = ()
    shared: str | None = None
    inner: str | None = None
    values: str | None = None
    scores: str | None = None
    pairs: str | None = None
    table: str | None = None
    normed: bool = False
    swapped: bool = False
    beside: tuple[str, ...] = ()

    @classmethod
    def heads(cls, pattern: str, size: str | None = r"n_heads.\1", **rest: Any) -> "Group":
        """Attention heads in a module with linears q, k, v and out."""
        return cls("heads", pattern, size, **({"makes": ("q", "k", "v"), "takes": ("out",)} | rest))

    @classmethod
    def units(
        cls, pattern: str, size: "str | Callable[[Any, re.Match], str]" = r"ffn_dims.\1"
    ) -> "Group":
        """Feed-forward units in a module with linears up, down and, where there is one, gate."""
        return cls("ffn units", pattern, size, ("gate", "up"), ("down",))

    @classmethod
    def experts(
        cls, pattern: str, ids: str = r"kept.\1", inner: str = r"expert_dims.\1"
    ) -> "Group":
        """Experts as the stacked kernels gate, up [E, D, F] and down [E, F, D] of a module."""
        return cls("experts", pattern, None, ("gate", "up"), ("down",), ids=ids, inner=inner)


def t5_groups(stack: str) -> tuple[Group, ...]:
    """Prunable groups of the layers of a T5 stack, cross attention excepted; stack: its path and
    its entry in the config.
    """
    return (
        Group.heads(
            rf"{stack}/layer_(\d+)/attn",
            rf"{stack}.n_heads.\1",
            ids=rf"{stack}.bias_columns.\1",
            table=f"{stack}/relative_bias",
            values=rf"{stack}.value_dims.\1",
            scores=rf"{stack}.qk_dims.\1",
        ),
        Group.units(rf"{stack}/layer_(\d+)", rf"{stack}.ffn_dims.\1"),
    )
