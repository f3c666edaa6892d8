"""Widths of attention heads that differ between layers: what taking channels out of a model leaves.

A config has a tuple per width, () where every layer has the width of the published model.
"""

import itertools
from collections.abc import Sequence


def width(dims: Sequence[int], layer: int, whole: int) -> int:
    """The width of a layer's heads. whole: of the published model."""
    return dims[layer] if dims else whole


def width_problems(layers: int, whole: int, **dims: Sequence[int]) -> list[str]:
    """List problems of per-layer widths, by the name of their field."""
    return [
        f"{name} must be empty or name a width from 0 to {whole} for each of {layers} layers, got "
        f"{tuple(found)}"
        for name, found in dims.items()
        if found and (len(found) != layers or not 0 <= min(found) <= max(found) <= whole)
    ]


def pair_problems(
    groups: Sequence[int], head_dim: int, pairs: Sequence[Sequence[Sequence[int]]]
) -> list[str]:
    """List problems of `rotary_pairs`: per layer, for each of its key heads, as many pairs as for
    the others.

    groups: key heads of each layer. A layer with () has all pairs.
    """
    if not pairs:
        return []

    def fits(heads: int, layer: Sequence[Sequence[int]]) -> bool:
        return (
            len(layer) == heads
            and len(set(map(len, layer))) == 1
            and all(sorted(set(head)) == list(head) for head in layer)
            and all(0 <= j < head_dim // 2 for j in itertools.chain.from_iterable(layer))
        )

    if len(pairs) == len(groups) and all(
        not layer or fits(heads, layer) for heads, layer in zip(groups, pairs, strict=True)
    ):
        return []
    return [f"rotary_pairs must name equally many pairs below {head_dim // 2} a head, got {pairs}"]
