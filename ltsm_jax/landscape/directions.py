"""Directions through the space of parameters: random ones, those of a training run, and those
between models.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding, trees
from ltsm_jax.trees import Patterns, Tree, filter_axes

TINY = 1e-10  # of the release: keeps a filter of zeros from dividing by 0


def random_directions(
    params: Tree,
    seed: int | jax.Array = 0,
    n: int = 2,
    *,
    normalise: bool = True,
    zero_vectors: bool = False,
    skip: Patterns = None,
    sff_directions: bool = False,
) -> tuple[Tree, ...]:
    """Draw `n` random directions, each filter as long as that filter of the parameters.

    Every entry is drawn from N(0, 1); then each filter d_i becomes `d_i * |w_i| / |d_i|`. A filter
    is the weights of one output unit: a column of a kernel [in, out], a unit of a head of a kernel
    [D, H, K]; of other leaves a slice along the first axis; of biases and scales one number. One
    seed draws the same numbers for all models of one shape, so that their surfaces can be compared.

    Args:
      params: any tree of arrays. The directions have its shapes and dtypes, and lie where its
        leaves lie.
      seed: a number or a PRNG key.
      n: how many.
      normalise: False leaves the raw draw.
      zero_vectors: leave biases, scales of norms and other leaves of one axis where they are, as Li
        et al. do.
      skip: leaves that are not moved (see `trees.select`), such as `model.fixed`.
      sff_directions: the released form of Smoothed Full Fine-tuning: entries sqrt(8) * N(0, 1) + 1.
    Raises: ValueError for n below 1, or for `skip` that names no leaf.
    Source: Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018, arXiv
      1712.09913).
    Example: `right, up = random_directions(params, seed=0)`
    """
    if n < 1:
        raise ValueError(f"there must be at least 1 direction, got {n}")
    key = jax.random.key(seed) if isinstance(seed, (int, np.integer)) else seed
    leaves = trees.flatten(params)
    skipped = (
        trees.flatten(trees.select(params, skip))
        if skip is not None
        else dict.fromkeys(leaves, False)
    )

    found = []
    for one in jax.random.split(key, n):
        direction = []
        for (path, leaf), leaf_key in zip(
            leaves.items(), jax.random.split(one, len(leaves)), strict=True
        ):
            leaf = jnp.asarray(leaf)
            still = skipped[path] or (zero_vectors and leaf.ndim <= 1)
            if still or not jnp.issubdtype(leaf.dtype, jnp.floating):
                direction.append(_beside(jnp.zeros(leaf.shape, leaf.dtype), leaf))
                continue
            draw = _beside(jax.random.normal(leaf_key, leaf.shape, jnp.float32), leaf)
            if sff_directions:
                draw = np.sqrt(8.0).astype(np.float32) * draw + 1.0
            if normalise:
                draw = _like_filters(draw, leaf, filter_axes(path, leaf.ndim))
            direction.append(draw.astype(leaf.dtype))
        found.append(jax.tree.unflatten(jax.tree.structure(params), direction))
    return tuple(found)


def _like_filters(draw: jax.Array, leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    others = tuple(axis for axis in range(leaf.ndim) if axis not in axes)

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=others, keepdims=True))

    return draw * (norm(leaf) / (norm(draw) + TINY))


def _beside(x: jax.Array, leaf: jax.Array) -> jax.Array:
    """Colocate an array with a leaf of the same shape, if that is committed."""
    if not getattr(leaf, "committed", False):
        return x
    where = leaf.sharding
    return (
        sharding.put(x, where)
        if isinstance(where, jax.sharding.NamedSharding)
        else jax.device_put(x, where)
    )


@dataclasses.dataclass(frozen=True)
class Plane:
    """A plane through models.

    Attributes:
      origin: the tree at (0, 0).
      directions: two orthogonal trees of length 1.
      places: (x, y) of each model by its name, in units of the parameters.
      explained: share of the spread of a trajectory that each direction has; empty for other
        planes.
    """

    origin: Tree
    directions: tuple[Tree, Tree]
    places: dict[str, tuple[float, float]]
    explained: tuple[float, ...] = ()

    def axes(self, points: int = 25, margin: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
        """Give x [points] and y [points] that reach beyond all models.

        margin: how far beyond, as a share of the spread of the models.

        Example: `x, y = plane.axes(25)`, then
          `surface(loss, plane.origin, plane.directions, x=x, y=y)`
        """
        if points < 2:
            raise ValueError(f"an axis needs at least 2 points, got {points}")
        spots = np.array(list(self.places.values()))
        low, high = spots.min(axis=0), spots.max(axis=0)
        # Models on one line have no spread across it.
        room = margin * np.where(high > low, high - low, (high - low).max())
        x, y = (np.linspace(a, b, points) for a, b in zip(low - room, high + room, strict=True))
        return x, y


def plane_through(models: Mapping[str, Tree]) -> Plane:
    """Find the plane through three models, such as pretrained, random and fine-tuned.

    The first is the origin, the second lies on the x axis: x is along `b - a`, y along
    what of `c - a` is orthogonal to it.

    Args:
      models: three trees of the same shapes by name.
    Raises: ValueError for another number, for trees that differ in structure or shape, or that lie
      on one line.
    Source: Garipov et al., "Loss Surfaces, Mode Connectivity" (NeurIPS 2018, arXiv 1802.10026).
    """
    if len(models) != 3:
        raise ValueError(
            f"a plane goes through three models, got {len(models)}: {', '.join(models)}"
        )
    (first, a), (second, b), (third, c) = models.items()
    trees.require_same(a, b, (first, second))
    trees.require_same(a, c, (first, third))

    along, other = _difference(b, a), _difference(c, a)
    width = _norm(along)
    if width == 0:
        raise ValueError(f"{first} and {second} are the same model: no plane goes through them")
    u = _scaled(along, 1 / width)
    x = _dot(other, u)
    across = _plus(other, u, -x)
    height = _norm(across)
    if height <= 1e-6 * max(_norm(other), width):
        raise ValueError(
            f"{first}, {second} and {third} lie on one line: use one direction instead"
        )
    v = _scaled(across, 1 / height)
    return Plane(a, (u, v), {first: (0.0, 0.0), second: (width, 0.0), third: (x, height)})


def trajectory_plane(models: Sequence[Tree]) -> Plane:
    """Find the plane that a training run moves in most, by its first two principal components.

    Args:
      models: checkpoints in their order, three at least; the last is the origin. Places are called
        by their number.
    Raises: ValueError for fewer than three, for trees that differ in structure or shape, or that
      lie on one line.
    Source: Li et al. (arXiv 1712.09913), section 7.
    """
    if len(models) < 3:
        raise ValueError(f"a plane of a trajectory needs at least 3 checkpoints, got {len(models)}")
    for i, tree in enumerate(models[1:], 1):
        trees.require_same(models[0], tree, ("checkpoint 0", f"checkpoint {i}"))
    origin = models[-1]
    steps = [_difference(tree, origin) for tree in models]

    # The components are mixes of the checkpoints; their table of products, k x k, says which.
    k = len(steps)
    products = np.array([_dot(a, b) for a, b in itertools.product(steps, steps)]).reshape(k, k)
    centre = np.eye(k) - 1 / k
    spread, mixes = np.linalg.eigh(centre @ products @ centre)
    spread, mixes = spread[::-1], mixes[:, ::-1]
    if spread[1] <= 1e-10 * spread[0]:
        raise ValueError("the checkpoints lie on one line: use one direction instead")

    directions = []
    for column in range(2):
        shares = centre @ mixes[:, column]
        mixed = _scaled(steps[0], float(shares[0]))
        for share, step in zip(shares[1:], steps[1:], strict=True):
            mixed = _plus(mixed, step, float(share))
        for earlier in directions:  # what rounding has left
            mixed = _plus(mixed, earlier, -_dot(mixed, earlier))
        directions.append(_scaled(mixed, 1 / _norm(mixed)))
    u, v = directions
    places = {str(i): (_dot(step, u), _dot(step, v)) for i, step in enumerate(steps)}
    explained = tuple(float(part) for part in spread[:2] / spread.sum())
    return Plane(origin=origin, directions=(u, v), places=places, explained=explained)


def _difference(a: Tree, b: Tree) -> Tree:
    def minus(x, y):
        x, y = jnp.asarray(x), jnp.asarray(y)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, jnp.float32)
        return x.astype(jnp.float32) - y.astype(jnp.float32)

    return jax.tree.map(minus, a, b)


def _plus(a: Tree, b: Tree, share: float) -> Tree:
    return jax.tree.map(lambda x, y: x + share * y, a, b)


def _scaled(a: Tree, by: float) -> Tree:
    return jax.tree.map(lambda x: by * x, a)


def _dot(a: Tree, b: Tree) -> float:
    parts = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return float(sum(float(part) for part in jax.tree.leaves(parts)))


def _norm(a: Tree) -> float:
    return float(np.sqrt(_dot(a, a)))
