"""Fresh parameters: each family says how every leaf is distributed, one generator draws
them all.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.trees import Tree, flatten, traced, unflatten


@dataclasses.dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float


@dataclasses.dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float


Distribution = Uniform | Normal | Constant | Callable[[jax.Array, tuple[int, ...]], jax.Array]


def torch_linear(
    flat: Mapping[str, Any], path: str, heads: tuple[str, ...] = ("/q", "/k", "/v")
) -> Uniform | None:
    """Give PyTorch's default distribution of the weights and the bias of a linear layer,
    U(-1/sqrt(inputs), 1/sqrt(inputs)); None for a leaf of anything else.

    Args:
      flat: shapes by path; a linear is what has a kernel.
      heads: ends of the paths of linears that have one axis of inputs and all others of outputs;
        elsewhere the last axis alone is the outputs.
    """
    module = path.rpartition("/")[0]
    kernel = flat.get(f"{module}/kernel")
    if kernel is None:
        return None
    inputs = kernel.shape[:1] if module.endswith(heads) else kernel.shape[:-1]
    return Uniform(math.prod(inputs) ** -0.5)


def torch_rule(shapes: Tree, scale: float = 1.0, own: Mapping[str, Distribution] | None = None):
    """Make the rule of a family whose original leaves most to PyTorch, see `torch_linear`.

    scale: of norms; what else no linear has is 0. own: distributions of other leaves, by name.
    """
    flat, own = flatten(shapes), own or {}

    def rule(path: str, shape: tuple[int, ...]) -> Distribution:
        name = path.rpartition("/")[2]
        if name in own:
            return own[name]
        return torch_linear(flat, path) or Constant(scale if name == "scale" else 0.0)

    return rule


def normal_rule(std: float):
    """Make the rule of a family with N(0, std^2) for every weight, biases 0 and norms 1."""

    def rule(path: str, shape: tuple[int, ...]) -> Distribution:
        if path.endswith(("/bias", "/scale")):
            return Constant(float(path.endswith("/scale")))
        return Normal(std)

    return rule


def draw(
    key: jax.Array, shapes: Tree, rule: Callable[[str, tuple[int, ...]], Distribution]
) -> Tree:
    """Parameters for a tree of shapes.

    Args:
      shapes: from `jax.eval_shape`.
      rule: (path, shape) -> its distribution; a function (key, shape) -> array where none of the
        three fits.
    Returns: a tree like `shapes`, float32.
    """
    flat = flatten(shapes)
    rules = {path: rule(path, tuple(leaf.shape)) for path, leaf in flat.items()}
    params = {}

    # Outside jit the numbers are cut on the host: there each new shape is a program to compile, and
    # here none is. (`jnp.asarray` would be one, too.)
    xp, placed = (jnp, jnp.asarray) if traced(key) else (np, jax.device_put)
    # one draw a kind for all: a generator compiled once and not once per parameter, which takes
    # half a minute
    for kind, generator, kind_key, scale in (
        (Uniform, lambda k, n: jax.random.uniform(k, (n,), minval=-1.0), key, lambda r: r.bound),
        (
            Normal,
            lambda k, n: jax.random.normal(k, (n,)),
            jax.random.fold_in(key, 1),
            lambda r: r.std,
        ),
    ):
        chosen = [path for path in flat if isinstance(rules[path], kind)]
        if not chosen:
            continue
        numbers, used = xp.asarray(generator(kind_key, sum(flat[path].size for path in chosen))), 0
        for path in chosen:
            leaf = flat[path]
            part = scale(rules[path]) * numbers[used : used + leaf.size].reshape(leaf.shape)
            params[path] = placed(part)
            used += leaf.size
    for path, how in rules.items():
        if isinstance(how, Constant):
            params[path] = placed(xp.full(flat[path].shape, how.value, jnp.float32))
        elif callable(how):
            params[path] = how(
                jax.random.fold_in(key, zlib.crc32(path.encode())), tuple(flat[path].shape)
            )
    return unflatten({path: params[path] for path in flat})
