"""Apply a network to its parameters: what the pure functions of a family do with its modules."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from ltsm_jax.trees import Tree


def run_network(
    network: nn.Module,
    params: Tree,
    *inputs: Any,
    key: jax.Array | None = None,
    train: bool = False,
    **options: Any,
) -> Any:
    """Give what a network makes of its inputs.

    key, train: dropout is drawn where both are given; the network then gets `train=True`.
    options: further arguments of the network by name.
    """
    if train and key is not None:
        options |= {"train": True, "rngs": {"dropout": key}}
    return network.apply({"params": params}, *inputs, **options)


def nested(name: str, steps: Mapping[str, Any], result: Any = None) -> dict[str, Any]:
    """Put the named steps of a part under the part's name, and its result under the name itself.

    nested("layer_0", {"norm1": a}, b)  # {"layer_0/norm1": a, "layer_0": b}
    """
    found = {f"{name}/{step}": value for step, value in steps.items()}
    return found if result is None else found | {name: result}
