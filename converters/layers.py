"""Layers of a model to export: the original's classes hold equal layers only."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def equal_layer(layers: Sequence[Any], original: str) -> Any:
    """Give the record that all layers have, see `ltsm_jax.layers.dims`.

    Raises: ValueError for layers that differ, as removal leaves them.
    """
    if len(set(layers)) != 1:
        raise pruned(f"the original {original} has equal layers; this one has {told(layers)}")
    return layers[0]


def told(layers: Sequence[Any]) -> str:
    """Layers in words, the first three that differ: "layer 1: attn 2 heads of 8, ffn 24"."""
    first: dict[Any, int] = {}
    for i, layer in enumerate(layers):
        first.setdefault(layer, i)
    found = [f"layer {i}: {_widths(layer)}" for layer, i in first.items()]
    return "; ".join(found[:3])


def _widths(layer: Any) -> str:
    words = []
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if hasattr(value, "heads"):
            value = f"{value.heads} heads of {value.value}"
        elif hasattr(value, "ids"):
            value = f"{len(value.ids)} of {value.ffn}"
        words.append(f"{field.name} {value}")
    return ", ".join(words)


def pruned(why: str) -> ValueError:
    """Make the error of a model that removal has made smaller than the original can hold."""
    return ValueError(f"{why}. A pruned model can't be exported.")
