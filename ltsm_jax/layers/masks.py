"""Masks on the channels of linear layers, from outside: y = m_out * (W (m_in * x) + b), without a
model knowing of it.

A tree of masks has, at the path of a linear, its two masks {"in": [*inputs], "out": [*outputs]},
and at the path of stacked experts one such pair for each of their three products, with the experts
as first axis: {"gate": {"in": [E, D], "out": [E, F]}, "up": ..., "down": {"in": [E, F], "out": [E,
D]}}. The values are 0 or 1, or whatever one wants the gradient at.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ltsm_jax import sharding
from ltsm_jax.layers.experts import Experts
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.shortcuts import go_whole
from ltsm_jax.sharding import Placement
from ltsm_jax.trees import Tree, flatten, unflatten


def module_path(module: nn.Module) -> str:
    """The path of a module's parameters in the whole tree, "layer_0/attn/out"."""
    return "/".join(_path(module))


def _path(module: nn.Module) -> tuple[str, ...]:
    """The names of `module_path`, none for a linear that is the whole network.

    A network that is applied to one branch of the parameters is made with the name of the branch,
    `FlowNet(cfg, name="flow")`. Flax leaves that out of `path`, as it does all names of networks.
    """
    network = module
    while isinstance(network.parent, nn.Module):
        network = network.parent
    branch = () if network.name is None else (network.name,)
    return *branch, *module.path


@contextlib.contextmanager
def masked(masks: Tree):
    """While this is open, every `Linear` and `Experts` that is traced and has masks in the tree is
    multiplied by them.

    masks: nested dict, see the module's docstring; a layer without an entry stays as it is. Masks
    stay float32 where the layer computes in another dtype, so that their gradient is summed in
    float32. Open it inside the function that is compiled or differentiated. Experts take the form
    "dense" in it, which under `vmap` keeps one copy of the kernels.
    """

    def call(function, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, Linear | Experts):
            return function(*args, **go_whole(context, kwargs))
        own = _at(masks, _path(module))
        if own is None:
            return function(*args, **kwargs)
        if isinstance(module, Experts):
            return function(*args, **kwargs, masks=own)
        (x,) = args
        return _times(function(_times(x, own["in"])), own["out"])

    with nn.intercept_methods(call):
        yield


def mask_shapes(function: Callable[..., Any], *args: Any) -> Tree:
    """The tree of masks that fits the linears and experts that function(*args) calls, as
    `jax.ShapeDtypeStruct`.

    Nothing is computed. Layers without any weight left have no masks.
    """
    found: dict[str, Tree] = {}

    def pair(inputs, outputs):
        return {
            "in": jax.ShapeDtypeStruct(inputs, jnp.float32),
            "out": jax.ShapeDtypeStruct(outputs, jnp.float32),
        }

    for path, module in _called(function, *args).items():
        if isinstance(module, Linear):
            if math.prod((*module.inputs, *module.outputs)):
                found[path] = pair(module.inputs, module.outputs)
            continue
        e, d, f = module.n_experts, module.d_model, module.ffn_dim
        if e * d * f:
            found[path] = {
                "gate": pair((e, d), (e, f)),
                "up": pair((e, d), (e, f)),
                "down": pair((e, f), (e, d)),
            }
    return unflatten(found)


def routers(function: Callable[..., Any], *args: Any) -> frozenset[str]:
    """Find the paths of the linears that function(*args) calls as routers, see `Linear.role`."""
    called = _called(function, *args)
    return frozenset(path for path, module in called.items() if _is_router(module))


def _is_router(module: Linear | Experts) -> bool:
    return isinstance(module, Linear) and module.role == "router"


def _called(function: Callable[..., Any], *args: Any) -> dict[str, Linear | Experts]:
    """The linears and experts that function(*args) calls, by path. Nothing is computed."""
    found: dict[str, Linear | Experts] = {}

    def call(inner, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, Linear | Experts):
            found[module_path(module)] = module
        return inner(*args, **go_whole(context, kwargs))

    with nn.intercept_methods(call):
        jax.eval_shape(function, *args)
    return found


def masks_by_weight(params: Tree, masks: Tree) -> dict[str, tuple[Any, Any]]:
    """(m_in, m_out) by the path of the weights that they mask: "layer_0/up/kernel", and of stacked
    experts "layer_0/mixture/experts/gate".

    Raises: ValueError listing masks whose weights are not in `params` or have another shape.
    """
    flat, own, found, problems = flatten(params), flatten(masks), {}, []
    for path in own:
        layer, _, side = path.rpartition("/")
        if side == "out" and f"{layer}/in" in own:
            continue
        if side != "in" or f"{layer}/out" not in own:
            problems.append(f"  {path}: masks come in pairs named in and out")
            continue
        leaf = layer if layer in flat else f"{layer}/kernel"
        into, out = own[path], own[f"{layer}/out"]
        fits = (
            (*jnp.shape(into), *jnp.shape(out))
            if leaf != layer
            else (*jnp.shape(into), *jnp.shape(out)[1:])
        )
        if (
            leaf not in flat and f"{layer}/bias" in flat and not all(fits)
        ):  # has lost all its inputs, is its bias
            found[leaf] = into, out
        elif leaf not in flat:
            problems.append(f"  {layer}: the model has no such linear")
        elif jnp.shape(flat[leaf]) != fits:
            problems.append(
                f"  {layer}: masks for weights {fits}, the model's are {jnp.shape(flat[leaf])}"
            )
        else:
            found[leaf] = into, out
    if problems:
        raise ValueError(
            "masks do not fit the model (they belong to another one?):\n" + "\n".join(problems)
        )
    return found


def place(masks: Tree, params: Tree, placement: Placement | None = None) -> Tree:
    """`masks` laid over the mesh of `params`, each as the weights it belongs to; as they are where
    there is no mesh.

    Of a kernel [*inputs, *outputs], `in` is split as the axes of the inputs are and `out` as those
    of the outputs; of stacked experts [E, *inputs, *outputs] both begin with E. Without a kernel
    `out` lies as the bias.

    Args:
      masks: the same on every host, or on the mesh already. params: nested dict of the model.
      placement: of the parameters; None: ask them.
    Raises: ValueError listing masks that do not fit the parameters.
    """
    mesh = (placement or Placement.of(params)).mesh
    if mesh is None:
        return masks
    flat, found = flatten(params), {}
    for path, (m_in, m_out) in masks_by_weight(params, masks).items():
        layer, n = path.removesuffix("/kernel"), m_in.ndim
        leaf = flat[path] if path in flat else flat[f"{layer}/bias"]
        axes = sharding.axes_of(leaf) if path in flat else (*[None] * n, *sharding.axes_of(leaf))
        stack = axes[:1] if path == layer else ()
        for side, mask, own in (("in", m_in, axes[:n]), ("out", m_out, (*stack, *axes[n:]))):
            found[f"{layer}/{side}"] = sharding.put(
                mask, NamedSharding(mesh, sharding.spec_of(own))
            )
    return unflatten({path: found[path] for path in flatten(masks)})


def apply_masks(params: Tree, masks: Tree, placement: Placement | None = None) -> Tree:
    """The masked model's weights: kernel * m_in * m_out, bias * m_out; everything else as it is.

    With masks of 0 and 1 it is the masked model, exactly, and weights that a mask makes 0 have
    gradient 0: training the weights of `apply_masks(params, masks)` leaves what is pruned at 0.
    Works under jit and grad.

    Args:
      params: nested dict of the model. masks: a tree of masks, of some or all of its linears and
        experts; outside jit they may lie anywhere, on several hosts each has the same. placement:
        of the parameters; None: ask them, which inside jit do not say.
    Returns: a tree like `params`, which outside jit lies as they do.
    Raises: ValueError listing masks that do not fit the parameters.
    """
    placement = placement or Placement.of(params)
    if placement.mesh is None:  # or inside jit
        return _merge(params, masks)
    # a bias is whole where its outputs are split: the compiler would split the product
    as_before = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(_merge, out_shardings=as_before)(params, place(masks, params, placement))


def _merge(params: Tree, masks: Tree) -> Tree:
    flat = dict(flatten(params))
    for path, (m_in, m_out) in masks_by_weight(params, masks).items():
        stacked, bias = not path.endswith("/kernel"), path[: -len("kernel")] + "bias"
        if not stacked and bias in flat:
            flat[bias] = flat[bias] * m_out.astype(flat[bias].dtype)
        if path not in flat:
            continue
        kernel = flat[path]  # of experts: the first axis of both masks
        rows = m_in.reshape(*m_in.shape, *(1,) * (m_out.ndim - stacked))
        columns = m_out.reshape(*m_out.shape[:1], 1, *m_out.shape[1:]) if stacked else m_out
        columns = columns.reshape(*(1,) * (kernel.ndim - columns.ndim), *columns.shape)
        flat[path] = kernel * (rows * columns).astype(kernel.dtype)
    return unflatten(flat)


def _at(tree: Tree, path: tuple[str, ...]) -> Tree | None:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _times(x: jax.Array, mask: jax.Array) -> jax.Array:
    mask = mask.reshape(*(1,) * (x.ndim - mask.ndim), *mask.shape)
    return (x * mask).astype(x.dtype)
