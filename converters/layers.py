"""What an original says of its layers: equal ones, since its classes hold no others."""

import reprlib
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
    """Layers in words, shortened: each width with the number of the first layer that has it."""
    first = {layer: i for i, layer in reversed(list(enumerate(layers)))}
    found = [f"layer {i}: {reprlib.repr(layer)}" for layer, i in first.items()]
    return "; ".join(sorted(found)[:3])


def pruned(why: str) -> ValueError:
    """Make the error of a model that removal has made smaller than the original can hold."""
    return ValueError(f"{why}. A pruned model can't be exported.")
