"""Widths of layers: one small record for each layer of a config.

A pruned model is a model of the same class whose layers differ in width, so a config holds a tuple
of records, one a layer, in the order of a forward pass:

    config.layers[3].attn.heads   query heads of the fourth layer
    config.layers[3].attn.value   width of the values of each of them
    config.layers[3].ffn          its feed-forward units

`LayerDims` is the record of a layer of one attention and one feed-forward part. A family whose
layers have other parts (a second attention, experts, a kind) has a dataclass of its own, made of
the same pieces: `HeadDims` for an attention, `ExpertDims` for experts, an int for units or for
heads of one fixed width. Everything in a record is as the layer has it now; what the published
model had (`head_dim`, which decides the scale of the scores) stays a field of the config.

What can be removed from a layer names the field of the record that counts it:
`Group.heads("attn")` says that the heads in the module `attn` of each layer are those of the field
`attn`, see `models.groups`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Narrowed = Literal["whole", "channels", "pairs"]
"""Parts that pruning may remove from queries and keys: none, channels, or rotary pairs."""


@dataclasses.dataclass(frozen=True)
class HeadDims:
    """Heads of one attention.

    heads: H. qk: width K of a head's queries and keys. value: width V of its values. kv_heads: G
    heads of keys and values, each shared by H / G query heads; None: every head has its own.
    pairs: for each key head the rotary pairs (j, j + K/2) of the published head that its queries
    and keys still have, as many for each; () is all. ids: the numbers of the heads in the published
    model, for layers in which a head has a place of its own (a column of a bias table); None: the
    first H.
    """

    heads: int
    qk: int
    value: int
    kv_heads: int | None = None
    pairs: tuple[tuple[int, ...], ...] = ()
    ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, heads: int, head_dim: int, kv_heads: int | None = None) -> "HeadDims":
        """Whole heads, whose queries, keys and values have one width."""
        return cls(heads, head_dim, head_dim, kv_heads=kv_heads)

    @property
    def key_heads(self) -> int:
        """Heads of keys and values, G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each head in the published model."""
        return tuple(range(self.heads)) if self.ids is None else self.ids

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Heads and their width of q, k and v: the outputs of these linears."""
        groups = self.key_heads
        return {"q": (self.heads, self.qk), "k": (groups, self.qk), "v": (groups, self.value)}

    @property
    def joined(self) -> tuple[int, int]:
        """Heads and the width of their values, the inputs of the output projection."""
        return self.heads, self.value


@dataclasses.dataclass(frozen=True)
class ExpertDims:
    """Experts of one layer. ids: their numbers among the outputs of the router, in order. ffn:
    width F of each.
    """

    ids: tuple[int, ...]
    ffn: int


@dataclasses.dataclass(frozen=True)
class LayerDims:
    """A layer of one attention and `ffn` feed-forward units, F."""

    attn: HeadDims
    ffn: int


def head_width(d_model: int, heads: int) -> int:
    """Split a model width into heads.

    Raises: ValueError for a number of heads that does not divide it.
    """
    if heads < 1 or d_model % heads:
        raise ValueError(
            f"the width ({d_model}) must be a multiple of the number of heads ({heads})"
        )
    return d_model // heads


def equal_layers(
    layers: int, heads: int, head_dim: int, ffn: int, kv_heads: int | None = None
) -> tuple[LayerDims, ...]:
    """Layers of equal widths, as published models have them."""
    return (LayerDims(HeadDims.of(heads, head_dim, kv_heads), ffn),) * layers


def attention_dims(layers: Iterable[Any]) -> list[tuple[str, HeadDims]]:
    """List the attentions of all layers: ("layers[0].attn", its record), ...."""
    return [(where, dims) for where, dims in _parts(layers) if isinstance(dims, HeadDims)]


def layer_problems(
    layers: Sequence[Any],
    head_dim: int,
    *,
    qk_dim: int | None = None,
    scores: Mapping[str, Narrowed] | None = None,
) -> list[str]:
    """List what is wrong with the records of layers.

    Args:
      head_dim: width of a head in the published model. qk_dim: of its queries and keys, where it is
        another.
      scores: by the field of a record, what queries and keys of this attention can lose; nothing
        where none is told.
    """
    problems = [] if layers else ["there must be at least one layer"]
    for where, dims in _parts(layers):
        if isinstance(dims, HeadDims):
            can_lose = (scores or {}).get(where.rpartition(".")[2], "whole")
            whole = head_dim if qk_dim is None else qk_dim
            found = _head_problems(dims, whole, head_dim, scores=can_lose)
        elif isinstance(dims, ExpertDims):
            found = _expert_problems(dims)
        else:
            found = _negative("size", dims)
        problems += [f"{where}: {problem}" for problem in found]
    return problems


def _parts(layers: Iterable[Any]) -> list[tuple[str, Any]]:
    """List the counts and records of all layers, by where they stand."""
    found = []
    for i, layer in enumerate(layers):
        for field in dataclasses.fields(layer):
            dims = getattr(layer, field.name)
            if isinstance(dims, HeadDims | ExpertDims | int):
                found.append((f"layers[{i}].{field.name}", dims))
    return found


def _negative(name: str, size: int) -> list[str]:
    return [] if size >= 0 else [f"{name} must not be negative, got {size}"]


def _head_problems(dims: HeadDims, qk_dim: int, head_dim: int, scores: Narrowed) -> list[str]:
    problems = _negative("heads", dims.heads)
    if not 0 <= dims.value <= head_dim:
        problems.append(f"value must be a width from 0 to {head_dim}, got {dims.value}")
    if dims.heads and (dims.key_heads < 1 or dims.heads % dims.key_heads):
        problems.append(f"heads ({dims.heads}) must be a multiple of kv_heads ({dims.kv_heads})")
    elif dims.key_heads < 0:
        problems += _negative("kv_heads", dims.key_heads)
    if dims.ids is not None and (len(dims.ids) != dims.heads or min(dims.ids, default=0) < 0):
        problems.append(f"ids must name each of {dims.heads} heads, got {dims.ids}")

    if dims.pairs and scores != "pairs":
        problems.append("queries and keys of this attention have no rotary pairs to lose")
    elif dims.pairs:
        problems += _pair_problems(dims, qk_dim)
    elif scores == "channels" or not dims.heads:
        # A layer without heads has no queries, whatever their width was.
        if not 0 <= dims.qk <= qk_dim:
            problems.append(f"qk must be a width from 0 to {qk_dim}, got {dims.qk}")
    elif dims.qk != qk_dim:
        problems.append(f"queries and keys are whole here: qk must be {qk_dim}, got {dims.qk}")
    return problems


def _pair_problems(dims: HeadDims, qk_dim: int) -> list[str]:
    """Say what is wrong with rotary pairs: each key head has some, as many as the others, in
    order.
    """
    counts = {len(head) for head in dims.pairs}
    ordered = all(sorted(set(head)) == list(head) for head in dims.pairs)
    known = all(0 <= pair < qk_dim // 2 for pair in set().union(*dims.pairs))
    if len(dims.pairs) == dims.key_heads and counts == {dims.qk // 2} and ordered and known:
        return [] if dims.qk % 2 == 0 else [f"qk must be even, got {dims.qk}"]
    return [
        f"pairs must name {dims.qk // 2} rotary pairs below {qk_dim // 2} for each of "
        f"{dims.key_heads} key heads, in order, got {dims.pairs}"
    ]


def _expert_problems(dims: ExpertDims) -> list[str]:
    problems = _negative("ffn", dims.ffn)
    if sorted(set(dims.ids)) != list(dims.ids) or min(dims.ids, default=0) < 0:
        problems.append(f"ids must name experts in order, got {dims.ids}")
    return problems
