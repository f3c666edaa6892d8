"""Apply a network to its parameters: what the pure functions of a family do with its modules."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from ltsm_jax.trees import Tree, traced


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


def parameter_shapes(network: nn.Module, key: jax.Array, *inputs: Any, **options: Any) -> Tree:
    """Give the shapes that a network's parameters have, as `jax.ShapeDtypeStruct`; nothing is
    computed.

    Equal networks with equal inputs are traced once, which takes up to a second: every fresh model
    of one size asks for the same shapes. Inside jit and `jax.eval_shape` the network is called each
    time: whoever looks at the calls of its modules does so there.

    Args:
      key: of the fresh parameters, which says whether this is inside jit.
      inputs, options: what the network is called with. Of arrays, and of structures of arrays, only
        the shapes count; the rest must be hashable.
    """
    leaves, structure = jax.tree.flatten((inputs, options))
    facts = []
    for leaf in leaves:
        is_array = hasattr(leaf, "shape")
        facts.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf)
    trace = _parameter_shapes.__wrapped__ if traced(key) else _parameter_shapes
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    found = trace(network, structure, tuple(facts), x64=x64)
    return jax.tree.map(lambda leaf: leaf, found)  # containers of the caller's own


@functools.lru_cache(maxsize=256)
def _parameter_shapes(network: nn.Module, structure: Any, facts: tuple, *, x64: bool) -> Tree:
    """x64: whether JAX computes in 64 bits, which dtypes may follow."""
    del x64

    def init(key: jax.Array, arrays: list[jax.Array]) -> Tree:
        given = iter(arrays)
        leaves = [next(given) if isinstance(fact, jax.ShapeDtypeStruct) else fact for fact in facts]
        inputs, options = structure.unflatten(leaves)
        return network.init(key, *inputs, **options)

    arrays = [fact for fact in facts if isinstance(fact, jax.ShapeDtypeStruct)]
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(init, key, arrays)["params"]
