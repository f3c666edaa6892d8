"""Depth: which layers of a model change little of what runs through them, and the model without
those.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import hosts, sharding, trees
from ltsm_jax.layers import taps
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.models import Model
from ltsm_jax.models.parts import shorter, stacks
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Task
from ltsm_jax.trees import Params


def block_influence(
    model: Model,
    params: Params,
    parts: Sequence[Any],
    *,
    task: Task,
    batch_size: int = 64,
    placement: Placement | None = None,
) -> dict[str, float]:
    """Measure how much each layer turns the stream: 1 - cos(its input, its output), mean over
    tokens.

    The tokens are those of the training loss, without dropout, over every window of all `parts`
    together. Tokens of zeros have no direction and do not count. No gradient is taken.

    Args:
      parts: windows as the loss of the task takes them, such as `task.windows(model, splits)`.
      task: whose loss runs the forward pass.
      batch_size: windows of one forward pass.
      placement: of the parameters; None: ask them. The devices of a mesh share the windows of
        every batch that they divide.
    Returns: by the path of each layer, in [0, 2]; 0 for a layer that only rescales.
    Raises: ValueError for layers whose input and output are not of one shape.
    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
      Expect" (arXiv 2403.03853), section 3.2.
    """
    placement = placement or Placement.of(params)
    total: dict[str, np.ndarray] = {}
    for part in parts:
        placed = part.over(placement.mesh)
        for start in range(0, part.n, batch_size):
            numbers = np.arange(start, min(start + batch_size, part.n), dtype=np.int32)
            split = placement if len(numbers) % placement.row_parts == 0 else Placement()
            sums = _sums(
                model,
                task,
                params,
                windows=placed,
                numbers=numbers,
                placement=placement,
                split=split,
            )
            for layer, pair in sums.items():
                total[layer] = total.get(layer, 0.0) + sharding.on_host(pair).astype(np.float64)
            hosts.pause()
    return {layer: float(turned / max(count, 1.0)) for layer, (turned, count) in total.items()}


def _layers(model: Model, params: Params) -> list[str]:
    """The paths of all layers, stack by stack."""
    return list(itertools.chain.from_iterable(stacks(model, trees.flatten(params))))


@functools.partial(jax.jit, static_argnames=("model", "task", "placement", "split"))
def _sums(
    model: Model,
    task: Task,
    params: Params,
    windows: Any,
    numbers,
    placement: Placement,
    split: Placement,
):
    """By layer [2]: the sum of 1 - cos over the tokens of a batch, and how many tokens
    there are.
    """
    layers = _layers(model, params)
    batch = split.rows(windows.gather(numbers))
    with taps.calls_of(layers) as seen:
        Runtime(placement=split).call(task.loss(model), params, batch, None, False)

    found = {}
    for layer, calls in seen.items():
        pairs = [_turned(layer, args[0], out) for args, out in calls]
        found[layer] = sum(pairs, jnp.zeros(2))
    return placement.everywhere(found)


def _turned(layer: str, x: jax.Array, out: Any) -> jax.Array:
    y = out[0] if isinstance(out, tuple) else out
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(
            f"{layer} makes {jnp.shape(y)} of {jnp.shape(x)}: its influence is not defined"
        )
    x, y = (z.reshape(-1, z.shape[-1]).astype(jnp.float32) for z in (x, y))
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    there = lengths > 0
    turned = 1 - (x * y).sum(-1) / jnp.where(there, lengths, 1.0)
    return jnp.stack([jnp.where(there, turned, 0.0).sum(), there.sum().astype(jnp.float32)])


def least_influential(
    model: Model, params: Params, influence: Mapping[str, float], count: int
) -> tuple[str, ...]:
    """Choose the `count` layers of least influence, never all of a stack.

    Returns: their paths, in the order in which they go.
    Raises: ValueError for a count that would leave a stack without a layer whatever is chosen.
    """
    own: dict[str, tuple[str, ...]] = {}
    for stack in stacks(model, trees.flatten(params)):
        own |= dict.fromkeys(stack, stack)
    remaining = {stack: len(stack) for stack in own.values()}
    most = sum(n - 1 for n in remaining.values())
    if count > most:
        raise ValueError(
            f"depth {count}: of {len(own)} layers at most {most} can go, one of each stack stays"
        )
    gone: list[str] = []
    for layer in sorted(influence, key=lambda layer: influence[layer]):
        if len(gone) < count and remaining[own[layer]] > 1:
            gone.append(layer)
            remaining[own[layer]] -= 1
    return tuple(gone)


def check_depth(model: Model, params: Params, count: int) -> None:
    """Raises: ValueError, before anything is measured, where `count` layers can't be taken out of
    this model.
    """
    if not count:
        return
    equal = dict.fromkeys(_layers(model, params), 0.0)
    shorter(model, params, least_influential(model, params, equal, count=count))


def drop_layers(model: Model, params: Params, gone: Sequence[str]) -> tuple[Model, Params]:
    """The model without whole layers: (model, params).

    Args:
      gone: paths of layers, such as "layer_2" or "encoder/layer_0"; those left keep their order and
        are numbered anew.
    Returns: a model of the same class with a smaller config. The parameters lie where they lay.
    Raises: ValueError for paths that are no layers, a stack that would be empty, and a family whose
      layers are not one plain list of equal ones.
    """
    fewer, left = shorter(model, params, gone)
    return fewer, sharding.shard(left, fewer.shard_rules, Placement.of(params).mesh)[0]
