"""The loss on a grid of points around a model: computed on all devices, kept on disk as
it grows.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ltsm_jax import hosts, sharding, storage, trees
from ltsm_jax.sharding import Placement
from ltsm_jax.training import memory
from ltsm_jax.trees import Tree

Loss = Callable[[Tree], jax.Array]

POINTS = "points.json"  # the losses of the finished points, in a folder
CALL = 32  # points of one call at most, for each device, where they are computed one after another
# of such a call: long enough to hide what lies between two, short enough to stop and to save
CALL_SECONDS = 0.5
AGAIN = 8  # stored points that are computed again, to see whether the loss is the same
MOST = 64  # points at once on an accelerator: beyond that it is busy anyway
SHARE = 0.5  # of the free memory for the points at once
SAVE_EVERY = 1.0  # seconds between two writes
SAME = 1e-3  # relative: a loss that differs by more at a stored point is another loss


@dataclasses.dataclass(frozen=True)
class Surface:
    """The loss around a model.

    Attributes:
      x: [X] float64, steps along the first direction.
      y: [Y] float64, steps along the second; None on a line.
      loss: [Y, X] float32, row = y, column = x; [X] on a line. Not finite where the loss was not.
    """

    x: np.ndarray
    y: np.ndarray | None
    loss: np.ndarray

    @property
    def centre(self) -> float:
        """The loss at the point nearest to (0, 0)."""
        column = int(np.argmin(np.abs(self.x)))
        if self.y is None:
            return float(self.loss[column])
        return float(self.loss[int(np.argmin(np.abs(self.y))), column])

    @property
    def range(self) -> float:
        """Largest minus smallest loss, of the points where it is finite."""
        finite = self.loss[np.isfinite(self.loss)].astype(np.float64)
        return float(finite.max() - finite.min()) if finite.size else math.nan

    @property
    def mean_abs_laplacian(self) -> float:
        """Mean |Laplacian| over the inner points, by the five-point formula; on a line three-point.

        In units of the loss over squared units of x. Points beside one that is not finite are left
        out. Exact for a quadratic loss; the axes must be evenly spaced. NaN where there is no inner
        point.
        """
        loss = self.loss.astype(np.float64)
        with np.errstate(invalid="ignore"):  # inf - inf beside a point that is not finite
            bent = _second_difference(loss, self.x)
            if self.y is not None:
                along_y = _second_difference(loss.T, self.y).T
                bent = bent[1:-1] + along_y[:, 1:-1]
        bent = np.abs(bent[np.isfinite(bent)])
        return float(bent.mean()) if bent.size else math.nan

    @property
    def doubling_radius(self) -> float:
        """Distance from (0, 0) to the nearest point where the loss is twice that of the centre.

        Between two points of the grid the loss is taken for linear. inf: it is below that on the
        whole grid. NaN where the centre is not above 0, as of a log-likelihood.
        """
        x, level = self.x, 2 * self.centre
        if not level > 0:
            return math.nan
        if self.y is None:
            return _nearest_crossing(self.loss[None], x[None], np.zeros((1, len(x))), level=level)
        wide, high = np.meshgrid(x, self.y)
        rows = _nearest_crossing(self.loss, wide, high, level=level)
        columns = _nearest_crossing(self.loss.T, wide.T, high.T, level=level)
        return min(rows, columns)

    def smoothness(self) -> dict[str, float]:
        """Give the numbers of smoothness: centre, range, mean_abs_laplacian, doubling_radius."""
        names = ("centre", "range", "mean_abs_laplacian", "doubling_radius")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | Path) -> Path:
        """Write x, y (none on a line) and loss to a .npz file. Returns its path."""
        arrays: dict[str, Any] = {"x": self.x, "loss": self.loss}
        if self.y is not None:
            arrays["y"] = self.y
        path = Path(path)
        path = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Surface":
        """Read what `save` wrote."""
        with np.load(path) as file:
            return cls(file["x"], file["y"] if "y" in file.files else None, file["loss"])


def _second_difference(loss: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Second derivative along the last axis, at its inner points."""
    if len(at) < 3:
        return np.zeros((*loss.shape[:-1], 0))
    step = (at[-1] - at[0]) / (len(at) - 1)
    return (loss[..., 2:] - 2 * loss[..., 1:-1] + loss[..., :-2]) / step**2


def _nearest_crossing(loss: np.ndarray, x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Smallest distance from (0, 0) to where the loss passes `level` between two neighbours along
    the last axis.
    """
    loss = np.where(np.isfinite(loss), loss, np.float64(np.finfo(np.float32).max)).astype(
        np.float64
    )
    before, after = loss[:, :-1], loss[:, 1:]
    crossed = (before < level) != (after < level)
    if not crossed.any():
        return math.inf
    share = (level - before[crossed]) / (after - before)[crossed]
    at_x = x[:, :-1][crossed] + share * (x[:, 1:] - x[:, :-1])[crossed]
    at_y = y[:, :-1][crossed] + share * (y[:, 1:] - y[:, :-1])[crossed]
    return float(np.hypot(at_x, at_y).min())


def axis(radius: float, points: int) -> np.ndarray:
    """Give `points` numbers from -radius to radius, evenly spaced; of an odd number the middle one
    is exactly 0.
    """
    return radius * (np.arange(points) * 2 - (points - 1)) / (points - 1)


@hosts.interruptible()
def surface(
    loss: Loss,
    params: Tree,
    directions: Tree | Sequence[Tree],
    *,
    radius: float = 1.0,
    points: int = 25,
    x: np.ndarray | None = None,
    y: np.ndarray | None = None,
    at_once: int | None = None,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Surface:
    """Compute the loss on a plane, `loss(params + x * right + y * up)`, or on a line.

    On a CPU points are computed one after another inside one compiled loop, which is faster there
    than any number at once; on an accelerator as many at once as half of its free memory holds. The
    value of a point depends on neither beyond rounding.

    Parameters that lie whole on every device of a mesh: the points are split among the devices.
    Parameters that lie in parts, or a loss that splits its rows (`split_loss(placement=...)`): all
    devices work at one point after another.

    Args:
      loss: any function of a tree like `params` that returns a scalar, such as `split_loss` makes.
        One that is a tree itself (`jax.tree_util.Partial`, `SplitLoss`) is passed as an argument,
        and compiled once for all its values.
      params: the point (0, 0). Arithmetic is in float32 at least; leaves keep their dtype; integers
        are not moved.
      directions: one tree like `params`, for a line, or two, for a plane.
      radius: each axis goes from -radius to radius.
      points: on each axis; an odd number has the centre among them.
      x, y: other axes, [X] and [Y], in place of `radius` and `points`.
      at_once: points computed at once on each device; by default chosen as said above.
      folder: where finished points are kept. The same call resumes from it, and ends with the same
        bits as an uninterrupted one. A folder of other axes, parameters, directions, facts
        or of another loss is refused.
      facts: what else a folder must agree with, JSON values.
      progress: called as `progress(done, all)` after each part.
    Returns: a `Surface`.
    Raises: ValueError for directions that do not fit, axes that are too short, a loss that is no
      scalar, or a folder of something else; on one host, after Ctrl-C, KeyboardInterrupt, when the
      finished points are kept.
    Example: `surface(lambda p: (p["w"] ** 2).sum(), params, random_directions(params), points=11)`
    """
    ways = _directions_of(directions, params)
    x = axis(radius, _checked(points, radius)) if x is None else np.asarray(x, np.float64)
    if len(ways) == 1:
        if y is not None:
            raise ValueError(
                "y is for a plane, and there is one direction: give two, or leave y out"
            )
    else:
        y = axis(radius, _checked(points, radius)) if y is None else np.asarray(y, np.float64)
    places = _places(x, y)

    loss = loss if _is_tree(loss) else jax.tree_util.Partial(loss)

    placement = Placement.of(params)
    spread = _spread_over(placement, params, loss)
    if spread is not None:
        loss, ways = placement.replicate(loss), placement.replicate(ways)
    devices = 1 if spread is None else spread.size

    kept = _Kept(folder=folder, x=x, y=y, params=params, directions=ways, loss=loss, facts=facts)
    if at_once is None:
        at_once = kept.at_once or _points_at_once(loss, params, ways, places=places)
    size = devices * (at_once if at_once > 1 else CALL)
    size = min(size, devices * -(-len(places) // devices))

    def compute(start: int, count: int) -> np.ndarray:
        # One shape serves all parts, of which only the first `count` points are computed: a point
        # has the same bits in whatever part it is.
        part = places[np.minimum(np.arange(start, start + size), len(places) - 1)]
        part = part.astype(np.float32)
        each = size // devices
        counts = np.clip(count - each * np.arange(devices), 0, each).astype(np.int32)
        if spread is not None:
            part, counts = placement.replicate(part), placement.replicate(counts)
        found = _losses(
            loss,
            params,
            ways,
            places=part,
            counts=counts,
            at_once=at_once,
            spread=spread,
            placement=placement,
        )
        return sharding.on_host(found)[:count]

    found = kept.begin(at_once, compute)
    # Hosts and devices that work together must agree on the parts; one device takes its time.
    alone = devices == 1 and at_once == 1 and hosts.process_count() == 1
    pace = 1 if alone else size
    saved = time.monotonic()
    while len(found) < len(places):
        began = time.monotonic()
        found = np.concatenate([found, compute(len(found), min(pace, len(places) - len(found)))])
        if alone:
            pace = _paced(pace, time.monotonic() - began, size)
        if progress is not None:
            progress(len(found), len(places))
        stopping = hosts.stopping() and hosts.process_count() == 1
        late = time.monotonic() - saved > SAVE_EVERY
        if stopping or len(found) == len(places) or hosts.agree(late).any():
            kept.write(found)
            saved = time.monotonic()
        hosts.stop_if_asked(f"after {len(found)} of {len(places)} points of the surface")
    grid = found if y is None else found.reshape(len(y), len(x))
    return Surface(x, y, grid)


def _paced(points: int, seconds: float, most: int) -> int:
    """Points of the next call, after one of so many points that took so long."""
    if seconds > CALL_SECONDS:
        return max(points // 2, 1)
    return min(2 * points, most) if seconds < CALL_SECONDS / 2 else points


def _checked(points: int, radius: float) -> int:
    if points < 2:
        raise ValueError(f"an axis needs at least 2 points, got {points}")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be a positive number, got {radius}")
    return points


def _directions_of(directions: Tree | Sequence[Tree], params: Tree) -> tuple[Tree, ...]:
    """One or two trees like `params`, checked."""
    if jax.tree.structure(directions) == jax.tree.structure(params):
        several = (directions,)
    elif isinstance(directions, (tuple, list)):
        several = tuple(directions)
    else:
        several = (directions,)
    if len(several) not in (1, 2):
        raise ValueError(f"a surface has one or two directions, got {len(several)}")
    for i, direction in enumerate(several):
        trees.require_same(params, direction, ("params", f"direction {i}"))
    return several


def _places(x: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    """The points in the order of the grid, [N, 1] or [N, 2]."""
    for name, axis in (("x", x), ("y", y)):
        if axis is not None and (axis.ndim != 1 or len(axis) < 1 or not np.isfinite(axis).all()):
            raise ValueError(f"{name} must be a vector of finite numbers, got shape {axis.shape}")
    if y is None:
        return x[:, None]
    wide, high = np.meshgrid(x, y)
    return np.stack([wide.ravel(), high.ravel()], axis=-1)


def _is_tree(loss: Loss) -> bool:
    """Return whether a loss is a tree of arrays that can be called, and no leaf."""
    return not jax.tree_util.all_leaves([loss])


def _spread_over(placement: Placement, params: Tree, loss: Loss) -> Mesh | None:
    """The mesh among whose devices the points are split; None where they are not."""
    whole = all(
        leaf.is_fully_replicated for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)
    )
    rows = getattr(loss, "placement", None)
    if placement.mesh is None or not whole or (rows is not None and rows.mesh is not None):
        return None
    return placement.mesh


def moved(params: Tree, directions: Sequence[Tree], place: jax.Array) -> Tree:
    """Compute `params + place[0] * directions[0] + ...`, in float32 at least; leaves keep their
    dtype.
    """

    def move(leaf, *ways):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        there = leaf.astype(wide)
        for i, way in enumerate(ways):
            there = there + place[i].astype(wide) * way.astype(wide)
        return there.astype(leaf.dtype)

    return jax.tree.map(move, jax.tree.map(jnp.asarray, params), *directions)


@functools.partial(jax.jit, static_argnames=("at_once", "spread", "placement"))
def _losses(
    loss: Loss,
    params: Tree,
    directions: tuple[Tree, ...],
    places: jax.Array,
    counts: jax.Array,
    *,
    at_once: int,
    spread: Mesh | None,
    placement: Placement,
) -> jax.Array:
    """Losses [N] at `places` [N, 1 or 2]; each device those of its first `counts` [devices] places.

    What it leaves out is 0, or, of several points at once, the loss all the same.
    """

    def several(loss, params, directions, places, counts):
        # What no parameter changes, such as cutting windows, is done once and not at each point.
        prepare = getattr(loss, "prepared", None)
        prepared = loss if prepare is None else prepare()

        def at(place):
            found = prepared(moved(params, directions, place))
            if jnp.shape(found) != ():
                raise ValueError(
                    f"the loss must return a scalar; it returns shape {jnp.shape(found)}"
                )
            return jnp.asarray(found, jnp.float32)

        if at_once > 1:
            return jax.lax.map(at, places, batch_size=at_once)
        losses = jnp.zeros(len(places), jnp.float32)
        return jax.lax.fori_loop(
            0, counts[0], lambda i, found: found.at[i].set(at(places[i])), losses
        )

    if spread is None:
        return placement.everywhere(several(loss, params, directions, places=places, counts=counts))
    whole, split = PartitionSpec(), PartitionSpec(spread.axis_names)
    over = jax.shard_map(
        several,
        mesh=spread,
        in_specs=(whole, whole, whole, split, split),
        out_specs=split,
        check_vma=False,
    )
    return placement.everywhere(over(loss, params, directions, places, counts))


def _points_at_once(
    loss: Loss, params: Tree, directions: tuple[Tree, ...], places: np.ndarray
) -> int:
    """Choose how many points each device computes at once: 1 on a CPU, else by the free memory.

    A CPU has no idle units that more points would fill, and more of them leave its caches
    (1.3 times as long as one after another). An accelerator is idle during one point of a
    small model.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    platform = next(iter(leaves[0].devices())).platform if leaves else jax.default_backend()
    free = memory.available()
    if platform == "cpu" or free is None:
        return 1
    first, count = places[:1].astype(np.float32), np.ones(1, np.int32)
    one = _losses.lower(
        loss,
        params,
        directions,
        places=first,
        counts=count,
        at_once=1,
        spread=None,
        placement=Placement(),
    )
    analysis = one.compile().memory_analysis()
    needed = memory.bytes_on_one(params) + (0 if analysis is None else analysis.temp_size_in_bytes)
    return int(min(max(SHARE * free // max(needed, 1), 1), MOST, len(places)))


class _Kept:
    """The finished points of a surface in its folder, if it has one."""

    def __init__(self, folder, x, y, params, directions, loss, facts):
        self.file = None if folder is None else Path(folder) / POINTS
        self.facts: dict[str, Any] = {}
        self.at_once: int | None = None
        self.losses: list[float] = []
        if self.file is None:
            return
        self.facts = {
            "x": x.tolist(),
            "y": None if y is None else y.tolist(),
            "params": storage.sha256_of(params),
            "directions": storage.sha256_of(directions),
            "facts": dict(facts or {}),
        }
        arrays = [leaf for leaf in jax.tree.leaves(loss) if hasattr(leaf, "dtype")]
        if arrays:
            self.facts["data"] = storage.sha256_of(arrays)
        record = hosts.on_first(self._read)
        if record is None:
            return
        stored = record["facts"]
        other = [name for name, value in self.facts.items() if stored.get(name) != value]
        other += [name for name in stored if name not in self.facts]
        if other:
            raise ValueError(
                f"{folder} holds a surface with other {', '.join(other)}; take another folder"
            )
        self.at_once, self.losses = record["at_once"], record["losses"]

    def _read(self) -> dict[str, Any] | None:
        assert self.file is not None
        return storage.read_record(self.file) if self.file.is_file() else None

    def begin(self, at_once: int, compute: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """Give the points that are there already, after a look whether the loss is still
        the same.
        """
        stored = np.array([float(text) for text in self.losses], np.float32)
        usable = at_once == self.at_once and len(stored) > 0
        self.at_once = at_once
        if not usable:
            return np.zeros(0, np.float32)
        again = compute(0, min(len(stored), AGAIN))
        if not np.allclose(again, stored[: len(again)], rtol=SAME, atol=0.0, equal_nan=True):
            raise ValueError(
                f"{self.file} holds a surface of another loss: {stored[0]} at its first point, and "
                f"now {again[0]}; take another folder"
            )
        return stored

    def write(self, found: np.ndarray) -> None:
        """Write the points that are finished, whole or not at all."""
        if self.file is None:
            return
        # As text: JSON has no infinite numbers.
        record = {
            "facts": self.facts,
            "at_once": self.at_once,
            "losses": [repr(float(value)) for value in found],
        }
        hosts.on_first(self._replace, record)

    def _replace(self, record: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}")
        storage.write_record(temporary, record)
        temporary.replace(self.file)
