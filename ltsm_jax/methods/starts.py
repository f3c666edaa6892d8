"""Start points of fine-tuning: which parameters a run begins with.

A start is a small value that says how pretrained and random parameters are put together; `start_params` computes them.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ltsm_jax import trees
from ltsm_jax.models import folders

Params = Any


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Start from the checkpoint as it is."""


@dataclasses.dataclass(frozen=True)
class Random:
    """Start from the model's own random initialisation."""


@dataclasses.dataclass(frozen=True)
class Interpolated:
    """Start from `alpha * pretrained + (1 - alpha) * random`, every tensor, norms and biases included."""

    alpha: float


@dataclasses.dataclass(frozen=True)
class NoiseInterpolated:
    """Start from `alpha * pretrained + (1 - alpha) * noise`, Gaussian, each tensor of the random model's norm."""

    alpha: float


Start = Pretrained | Random | Interpolated | NoiseInterpolated


class Starting(Protocol):
    """A strategy, as far as its start goes."""

    @property
    def start(self) -> Start:
        """How pretrained and random parameters are put together."""
        ...

    @property
    def reinit_head(self) -> bool:
        """Whether the head is the random model's in any case."""
        ...


def start_params(strategy: Starting, model: Any, params: Params, aux_key: jax.Array) -> Params:
    """Parameters a run of `strategy` starts from.

    The random model is ONE draw, `model.init(aux_key)`, shared by tfs, sff and every new head: that is why sff at
    alpha 0 and tfs agree bit for bit.

    Args:
      params: the pretrained tree; not modified.
      aux_key: `training.keys(seed)["aux"]`.
    Raises: ValueError where `params` is not a tree of this model.
    """
    start = strategy.start
    trees.require_same(params, folders.shapes(model), names=("params", "model"))
    if isinstance(start, Pretrained) and not strategy.reinit_head:
        return params
    aux = jax.tree.map(_placed_like, model.init(aux_key), params)
    if model.fixed:
        aux = jax.tree.map(lambda keep, old, new: old if keep else new, trees.select(params, model.fixed), params, aux)
    match start:
        case Random():
            mixed = aux
        case Interpolated(alpha):
            mixed = trees.interpolate(params, aux, alpha, skip=model.fixed)
        case NoiseInterpolated(alpha):
            # fold_in: the noise must not be the bits that drew `aux`.
            noisy = equal_norm_noise(jax.random.fold_in(aux_key, 1), aux)
            mixed = trees.interpolate(params, noisy, alpha, skip=model.fixed)
        case _:
            mixed = params
    if not strategy.reinit_head:
        return mixed
    new = trees.select(params, model.head)
    return jax.tree.map(lambda is_new, fresh, old: fresh if is_new else old, new, aux, mixed)


def _placed_like(fresh: jax.Array, old: Any) -> jax.Array:
    """`fresh` where `old` lies: shards stay shards, and a run from scratch shares the compiled step of the others."""
    fresh = fresh.astype(old.dtype)
    return jax.device_put(fresh, old.sharding) if isinstance(old, jax.Array) and old.committed else fresh


def equal_norm_noise(key: jax.Array, params: Params) -> Params:
    """Gaussian noise shaped like `params`, each tensor rescaled to the Euclidean norm of its counterpart."""
    leaves, treedef = jax.tree.flatten(params)

    def draw(key: jax.Array, leaf: jax.Array) -> jax.Array:
        z = jax.random.normal(key, leaf.shape, leaf.dtype)
        return z * (jnp.linalg.norm(leaf.ravel()) / jnp.linalg.norm(z.ravel()))

    return treedef.unflatten(
        [draw(k, leaf) for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)]
    )
