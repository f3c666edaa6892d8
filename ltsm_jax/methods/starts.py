"""Start points of fine-tuning: which parameters a run begins with.

A start is a small value that says how pretrained and random parameters are put together;
`start_params` computes them.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp

from ltsm_jax import sharding, trees
from ltsm_jax.layers.multiscale import MultiScale
from ltsm_jax.models import folders, parts
from ltsm_jax.trees import Params

Group = Literal["head", "norms", "embedding", "biases", "body"]
GROUPS = get_args(Group)
Other = Literal["random", "noise", "zeros", "sum"]
OTHERS = get_args(Other)
# folded into the key of the random model: new adapters must not be the bits that drew it
SCALES = 0x4D534654


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Start from the checkpoint as it is."""


@dataclasses.dataclass(frozen=True)
class Random:
    """Start from the model's own random initialisation."""


@dataclasses.dataclass(frozen=True)
class Interpolated:
    """Start from `alpha * pretrained + (1 - alpha) * other`, every tensor, norms and biases
    included.

    Attributes:
      alpha: weight of the pretrained side, in [0, 1].
      norm: what becomes of the length of a tensor, see `trees.interpolate`.
      keep: groups of leaves that stay pretrained, of `GROUPS`.
      alphas: (name, alpha) of groups, or of layers as `body_layer_of` names them ("layer_0"), that
        have an alpha of their own; that of the layer goes before that of the group. A mapping will
        do.
      other: the other side. "random": a fresh model. "noise": Gaussian, each tensor of the norm
        that it has in the fresh model. "zeros": nothing, so that the checkpoint is shrunk alone.
        "sum": pretrained + random, so that the start is `pretrained + (1 - alpha) * random` and
          nothing shrinks.
    Raises: ValueError for an unknown norm, group or other side, and for an alpha outside [0, 1].
      Names of layers are checked by `start_params`, which knows the model.
    """

    alpha: float
    norm: trees.Norm = "none"
    keep: tuple[str, ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    other: Other = "random"

    def __post_init__(self):
        pairs = self.alphas.items() if isinstance(self.alphas, Mapping) else self.alphas
        object.__setattr__(self, "alphas", tuple((name, float(alpha)) for name, alpha in pairs))
        object.__setattr__(
            self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep)
        )
        if self.norm not in trees.NORMS:
            raise ValueError(f"norm must be one of {', '.join(trees.NORMS)}; got {self.norm!r}")
        if self.other not in OTHERS:
            raise ValueError(f"other must be one of {', '.join(OTHERS)}; got {self.other!r}")
        if unknown := [group for group in self.keep if group not in GROUPS]:
            raise ValueError(
                f"keep takes groups of leaves, of {', '.join(GROUPS)}; got {', '.join(unknown)}"
            )
        for name, alpha in (("alpha", self.alpha), *self.alphas):
            if not 0 <= alpha <= 1:
                raise ValueError(
                    f"{name} is the weight of the pretrained side, between 0 and 1; got {alpha}"
                )


Start = Pretrained | Random | Interpolated


class Starting(Protocol):
    """A strategy, as far as its start goes."""

    @property
    def start(self) -> Start:
        """How pretrained and random parameters are put together."""
        ...

    @property
    def multiscale(self) -> MultiScale | None:
        """Further scales of the series that are trained with."""
        ...

    @property
    def reinit_head(self) -> bool:
        """Whether the head is the random model's in any case."""
        ...


def prepared(
    strategy: Starting, model: Any, params: Params, aux_key: jax.Array
) -> tuple[Any, Params]:
    """The model that a strategy trains, and its pretrained parameters: those given, but with
    further scales for msft.

    aux_key: as for `start_params`, which comes after it.
    Raises: ValueError for a family that takes no further scales, see `Model.with_scales`.
    """
    if strategy.multiscale is None:
        return model, params
    model, params = model.with_scales(
        params, strategy.multiscale, jax.random.fold_in(aux_key, SCALES)
    )
    return model, sharding.colocate(params)


def start_params(strategy: Starting, model: Any, params: Params, aux_key: jax.Array) -> Params:
    """Make the parameters that a run of `strategy` starts from.

    The random model is ONE draw, `model.init(aux_key)`, shared by tfs, sff and every new head: that
    is why sff at alpha 0 and tfs agree bit for bit.

    Args:
      params: the pretrained tree; not modified.
      aux_key: `training.keys(seed)["aux"]`.
    Raises: ValueError where `params` is not a tree of this model, and for an alpha of a layer that
      does not exist.
    """
    start = strategy.start
    trees.require_same(params, folders.param_shapes(model), names=("params", "model"))
    if isinstance(start, Pretrained) and not strategy.reinit_head:
        return params
    aux = _fresh(model, params, aux_key)
    match start:
        case Random():
            mixed = aux
        case Interpolated():
            mixed = _mixed(start, model, params, other=_other(start, params, aux, aux_key=aux_key))
        case _:
            mixed = params
    if not strategy.reinit_head:
        return mixed
    new = trees.select(params, model.head_leaves)
    return jax.tree.map(lambda is_new, fresh, old: fresh if is_new else old, new, aux, mixed)


def _fresh(model: Any, params: Params, aux_key: jax.Array) -> Params:
    """The random model, where the pretrained one lies; what the family fixes is as there."""
    aux = jax.tree.map(_placed_like, model.init(aux_key), params)
    if not model.fixed:
        return aux
    return jax.tree.map(
        lambda keep, old, new: old if keep else new, trees.select(params, model.fixed), params, aux
    )


def other_side(start: Interpolated, model: Any, params: Params, aux_key: jax.Array) -> Params:
    """The tree that `start` mixes with the pretrained one; arguments as of `start_params`."""
    return _other(start, params, _fresh(model, params, aux_key), aux_key=aux_key)


def _other(start: Interpolated, params: Params, random: Params, aux_key: jax.Array) -> Params:
    match start.other:
        case "random":
            return random
        case "noise":
            # fold_in: the noise must not be the bits that drew the random model.
            return equal_norm_noise(jax.random.fold_in(aux_key, 1), random)
        case "zeros":
            return jax.tree.map(jnp.zeros_like, params)
        case "sum":
            return jax.tree.map(jnp.add, params, random)


def _mixed(start: Interpolated, model: Any, params: Params, other: Params) -> Params:
    """The mix of pretrained parameters and the other side that `start` describes."""
    groups = groups_of(model, params)
    named = dict(start.alphas)
    layers = dict.fromkeys(layer for path in groups if (layer := body_layer_of(model, path)))
    if unknown := [name for name in named if name not in GROUPS and name not in layers]:
        known = ", ".join((*GROUPS, *layers))
        raise ValueError(
            f"{model.family} has no {', '.join(unknown)} to give an alpha; there are: {known}"
        )

    def alpha_of(path: str) -> float:
        group = groups.get(path, "body")
        return named.get(body_layer_of(model, path) or group, named.get(group, start.alpha))

    def stays(path: str) -> bool:
        return path not in groups or groups[path] in start.keep

    return trees.interpolate(params, other, alpha_of, skip=stays, norm=start.norm)


def groups_of(model: Any, params: Params) -> dict[str, Group]:
    """The group of every leaf that takes part in mixing, by its path.

    A leaf is of the first group that it fits. "head": what the family declares as its head.
    "norms": scales and shifts of normalisations, and other learned scales. "embedding": what else
      lies outside the blocks, such as patch
    embeddings, tokens and tables. "biases" and "body": biases, and all else, inside the blocks.
    Leaves that the family fixes are in none.
    """
    flat = trees.flatten(params)
    found: dict[str, Group] = {}
    for path in flat:
        if model.fixed and re.search(model.fixed, path):
            continue
        module, _, name = path.rpartition("/")
        # The shift of a normalisation is called bias; the scale beside it tells it from that of a
        # linear.
        beside = f"{module}/scale" if module else "scale"
        if re.search(model.head_leaves, path):
            found[path] = "head"
        elif name in ("scale", "scaling") or (name == "bias" and beside in flat):
            found[path] = "norms"
        elif body_layer_of(model, path) is None:
            found[path] = "embedding"
        elif name == "bias" or name.endswith("_bias"):
            found[path] = "biases"
        else:
            found[path] = "body"
    return found


def body_layer_of(model: Any, path: str) -> str | None:
    """The layer that a leaf lies in, such as "layer_0" or "encoder/layer_1"; None for what lies
    outside the blocks.
    """
    in_head = re.search(model.head_leaves, path)
    return None if in_head else parts.layer_of(model, path)


def _placed_like(fresh: jax.Array, old: Any) -> jax.Array:
    """`fresh` where `old` lies: shards stay shards, and a run from scratch shares the compiled step
    of the others.
    """
    fresh = fresh.astype(old.dtype)
    return (
        jax.device_put(fresh, old.sharding)
        if isinstance(old, jax.Array) and old.committed
        else fresh
    )


def equal_norm_noise(key: jax.Array, params: Params) -> Params:
    """Gaussian noise shaped like `params`, each tensor rescaled to the Euclidean norm of its
    counterpart.
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn, scales = [], []
    for one, leaf in zip(keys, leaves, strict=True):
        z = jax.random.normal(one, (leaf.size,), leaf.dtype)  # the numbers of any other shape
        drawn.append(z)
        scales.append(jnp.linalg.norm(leaf.ravel()) / jnp.linalg.norm(z))
    shapes = tuple(leaf.shape for leaf in leaves)
    return treedef.unflatten(_scaled(drawn, scales, shapes))


@functools.partial(jax.jit, static_argnums=2)
def _scaled(
    drawn: list[jax.Array], scales: list[jax.Array], shapes: tuple[tuple[int, ...], ...]
) -> list[jax.Array]:
    """Multiply each array by its scale and give it its shape: one program for all of them."""
    parts = zip(drawn, scales, shapes, strict=True)
    return [(z * scale).reshape(shape) for z, scale, shape in parts]
