"""LoRA: of every linear layer a change of low rank is trained beside its weights, which stay as
they are.

W + scale * A B with A [*inputs, R] and B [R, *outputs]; of stacked experts A [E, D, R] and B [E, R,
F]. A starts uniform in +-1 / sqrt(inputs), B at 0, so that training begins at the checkpoint. All
linear layers have adapters, embedding and head included; routers and gates of shared experts,
convolutions, norms and biases have none. What comes out is a plain tree of weights: the adapters
are added in.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv
2106.09685; the start of A is that of the PEFT library. The gradient here goes through the sum W +
scale * A B: the same function as two thin products beside W, for the memory of one layer's weights
at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ltsm_jax import sharding, trees
from ltsm_jax.layers import masks as channels
from ltsm_jax.models import Model
from ltsm_jax.models.family import Lora
from ltsm_jax.sharding import Placement
from ltsm_jax.trees import Tree


def beside(
    model: Model, params: Tree, loss: Callable[..., jax.Array], config: Lora, key: jax.Array
) -> tuple[Tree, Tree, Callable[..., jax.Array], Callable[[Tree], Tree]]:
    """Prepare for `training.fit` to train new adapters beside `params`.

    Args:
      loss: (params, batch, key, train) -> scalar, of plain weights.
    Returns: the tree to begin with, {"weights": params, "adapters": new ones}; what of it is
      trainable; the loss of such a tree; the function that makes plain weights of it.
    Raises: ValueError, as `adapters`.
    """
    tree = {"weights": params, "adapters": adapters(model, params, config.rank, key=key)}
    trainable = {
        name: jax.tree.map(lambda _, own=name == "adapters": own, part)
        for name, part in tree.items()
    }
    adapted = jax.tree_util.Partial(_adapted_loss, jax.tree_util.Partial(loss), config.scale)
    return (
        tree,
        trainable,
        adapted,
        lambda tree: merge_adapters(tree["weights"], tree["adapters"], config.scale),
    )


def _adapted_loss(loss, scale, tree, batch, key, train):
    return loss(merge_adapters(tree["weights"], tree["adapters"], scale), batch, key, train)


def adapters(model: Model, params: Tree, rank: int, key: jax.Array) -> Tree:
    """New adapters for `params`, laid over its mesh as the weights they belong to: A as the inputs,
    B as the outputs.

    Returns: nested dict {..path of a linear, or of the kernels of experts..: {"a": A, "b": B}},
    float32.
    Raises: ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1; got {rank}")
    routers = channels.routers(model.init, jax.random.key(0))
    fixed = trees.flatten(trees.select(params, model.fixed)) if model.fixed else {}
    ones = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype), channels.mask_shapes(model.init, jax.random.key(0))
    )
    placement = Placement.of(params)
    placed, mesh, found = channels.place(ones, params, placement), placement.mesh, {}
    for i, (leaf, (m_in, m_out)) in enumerate(channels.masks_by_weight(params, placed).items()):
        path, stack = (
            leaf.removesuffix("/kernel"),
            int(not leaf.endswith("/kernel")),
        )  # experts: their number leads
        if path in routers or fixed.get(leaf):
            continue
        bound = math.prod(m_in.shape[stack:]) ** -0.5
        shape = *m_in.shape, rank
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
        b = jnp.zeros((*m_out.shape[:stack], rank, *m_out.shape[stack:]))
        if mesh is not None:
            out = sharding.axes_of(m_out)
            a = sharding.put(a, NamedSharding(mesh, m_in.sharding.spec))
            b = sharding.put(
                b, NamedSharding(mesh, sharding.spec_of((*out[:stack], None, *out[stack:])))
            )
        found |= {f"{path}/a": a, f"{path}/b": b}
    return trees.unflatten(found)


@jax.jit
def merge_adapters(params: Tree, adapters: Tree, scale: Any) -> Tree:
    """`params` with scale * A B added to every weight that has an adapter; a tree like `params`.
    Works under grad.
    """
    flat, own = dict(trees.flatten(params)), trees.flatten(adapters)
    for path in [path.removesuffix("/a") for path in own if path.endswith("/a")]:
        a, b = own[f"{path}/a"], own[f"{path}/b"]
        stacked = path in flat
        product = jnp.matmul if stacked else functools.partial(jnp.tensordot, axes=1)
        leaf = path if stacked else f"{path}/kernel"
        change = product(a, b, precision=jax.lax.Precision.HIGHEST)
        flat[leaf] = flat[leaf] + (scale * change).astype(flat[leaf].dtype)
    return trees.unflatten(flat)
