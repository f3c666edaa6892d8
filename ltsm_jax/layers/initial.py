"""Fresh parameters: each family says how every leaf is distributed, one generator draws
them all.
"""

import dataclasses
import zlib
from collections.abc import Callable

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
    # here none is.
    xp = jnp if traced(key) else np
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
            params[path] = jnp.asarray(part)
            used += leaf.size
    for path, how in rules.items():
        if isinstance(how, Constant):
            params[path] = jnp.asarray(xp.full(flat[path].shape, how.value, jnp.float32))
        elif callable(how):
            params[path] = how(
                jax.random.fold_in(key, zlib.crc32(path.encode())), tuple(flat[path].shape)
            )
    return unflatten({path: params[path] for path in flat})
