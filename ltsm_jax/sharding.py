"""Parameters over the devices of a mesh: a table from path to axes, and everything else follows the
parameters.

A mesh has three axes. `data`: every device has all parameters and a part of the batch. `fsdp`: a
part of the batch too, and a part of every large parameter, gathered when it is used. `tensor`:
heads and feed-forward units are split, so each device computes a part of every layer. A family says
in `Model.shard_rules` which axes of its parameters may be split; nothing in the models knows of it.
Training needs no flag: it follows the placement of the parameters it is given.

    mesh = make_mesh("data=2,fsdp=4")
    params, notes = shard(params, model.shard_rules, mesh)
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ltsm_jax import trees

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # how the rows of a batch are split
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(spec: str | None = None, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that `spec` asks for.

    Args:
      spec: "data=2,fsdp=4" (axes left out are 1; one of them may be -1: what the others leave);
        None: all devices on `data`.
      devices: by default all that JAX has, those of other hosts included.
    Returns: the mesh, its axes always `data`, `fsdp`, `tensor`; None for one device and no spec:
    nothing to share.
    Raises: ValueError for unknown axes, sizes that are no numbers, or sizes that do not multiply to
    the devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if spec is None:
        if n == 1:
            return None
        spec = f"data={n}"
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    problems, seen = [], set()
    for item in spec.split(","):
        name, _, size = (part.strip() for part in item.partition("="))
        if name not in AXES or name in seen:
            problems.append(f"{name!r} is {'given twice' if name in seen else 'no axis'}")
        elif not re.fullmatch(r"-1|[1-9]\d*", size):
            problems.append(f"{name}={size}: a size is a positive number, or -1 for the rest")
        else:
            sizes[name] = int(size)
        seen.add(name)
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size > 0)
    if len(free) > 1:
        problems.append(f"only one of {', '.join(free)} can be -1")
    elif free and not problems and n % known == 0:
        sizes[free[0]] = n // known
    elif not problems and known != n:
        problems.append(
            f"{' x '.join(map(str, sizes.values()))} devices are asked for, {n} are there"
        )
    if problems:
        raise ValueError(
            f"mesh {spec!r}: {'; '.join(problems)}. Write it as data=2,fsdp=2,tensor=2"
        )
    # Mesh and not jax.make_mesh: the latter's axes are Explicit by default, which Flax's layers
    # cannot take
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def specs(shapes: trees.Tree, rules: Rules, mesh: Mesh) -> tuple[trees.Tree, tuple[str, ...]]:
    """A PartitionSpec for every leaf, by the first rule whose expression is found in its path.

    Args:
      shapes: tree of arrays or of `jax.ShapeDtypeStruct`.
      rules: a family's `shard_rules`: (regular expression, axis name or None for each dimension).
    Returns: the tree of specs, and a line for every axis that stays whole because the mesh does not
    divide it.
    Raises: ValueError listing the leaves that no rule matches.
    """
    found, notes, unmatched = {}, [], []
    for path, leaf in trees.flatten(shapes).items():
        axes = next((axes for pattern, axes in rules if re.search(pattern, path)), None)
        if axes is None:
            unmatched.append(path)
            continue
        kept = []
        for i, axis in enumerate(axes):
            size = 1 if axis is None else mesh.shape[axis]
            if leaf.shape[i] % size:
                notes.append(
                    f"{path} {leaf.shape}: {size} {axis} devices do not divide axis {i}, which "
                    "stays whole"
                )
                axis = None
            kept.append(axis if size > 1 else None)
        found[path] = spec_of(kept)
    if unmatched:
        raise ValueError(
            f"no shard rule for {', '.join(unmatched)}; the family's shard_rules must name every "
            "parameter"
        )
    return trees.unflatten(found), tuple(notes)


def axes_of(leaf: Any) -> tuple[Any, ...]:
    """For every axis of an array on a mesh, the mesh axes it is split by; None where it
    is whole.
    """
    return (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))


def spec_of(axes: Sequence[Any]) -> PartitionSpec:
    """The spec of these mesh axes, as the compiler writes it: another spelling would compile the
    next step anew.
    """
    kept = list(axes)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def shard(
    params: trees.Tree, rules: Rules, mesh: Mesh | None
) -> tuple[trees.Tree, tuple[str, ...]]:
    """`params` laid out over the mesh, and what could not be split (see `specs`). Each device gets
    its part only.

    mesh: None leaves `params` where they are.
    """
    if mesh is None:
        return params, ()
    table, notes = specs(params, rules, mesh)
    return jax.tree.map(
        lambda leaf, spec: put(leaf, NamedSharding(mesh, spec)), params, table
    ), notes


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """One array laid out as `sharding` says; on several hosts each one brings the parts of its own
    devices.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if getattr(leaf, "sharding", None) == sharding:
        return leaf
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding))
    host = on_host(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def on_host(leaf: Any) -> np.ndarray:
    """The whole array in the memory of this host; where its parts lie on several hosts, all of them
    must call.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices a model computes on: all devices of a mesh, or, without one, where its arrays
    lie.

    An entry point asks for it once, `Placement.of(params)`, and hands it down. It is hashable, so
    that it may be static under jit.

    Attributes:
      mesh: the mesh; None: nothing is shared among devices, and every method leaves what it is
        given as it is.
    """

    mesh: Mesh | None = None

    @classmethod
    def of(cls, *trees: trees.Tree) -> "Placement":
        """Read the placement off the leaves of `trees`: the first mesh of several devices that one
        of them lies on.

        Inside jit no leaf tells where it lies.
        """
        for leaf in jax.tree.leaves(trees):
            sharding = getattr(leaf, "sharding", None)
            if (
                isinstance(sharding, NamedSharding)
                and sharding.mesh.size > 1
                and isinstance(sharding.mesh, Mesh)
            ):
                return cls(sharding.mesh)
        return cls()

    @property
    def row_parts(self) -> int:
        """Number of devices among which the rows of a batch are split."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def rows(self, batch: trees.Tree) -> trees.Tree:
        """Inside jit: split the rows of a batch among the devices, so that each computes
        its own.
        """
        return self._constrain(batch, BATCH)

    def everywhere(self, tree: trees.Tree) -> trees.Tree:
        """Inside jit: make `tree` whole on every device, where every host can read it."""
        return self._constrain(tree, PartitionSpec())

    def put_rows(self, batch: trees.Tree) -> trees.Tree:
        """Outside jit: lay the rows of a batch among the devices; they must divide it."""
        return self._put(batch, BATCH)

    def replicate(self, tree: trees.Tree) -> trees.Tree:
        """Outside jit: lay `tree` whole on every device."""
        return self._put(tree, PartitionSpec())

    def check_hosts(self) -> None:
        """Raises: ValueError where there are several hosts and the mesh does not have the devices
        of all.
        """
        if jax.process_count() > 1 and (self.mesh is None or self.mesh.size < jax.device_count()):
            raise ValueError(
                "several hosts work together: lay the parameters over all devices with "
                "sharding.shard"
            )

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises: ValueError where the rows of a (micro-)batch do not divide evenly among the
        devices.
        """
        parts = accumulate * self.row_parts
        if batch_size % parts == 0:
            return
        near = max(batch_size // parts, 1) * parts
        among = f"{self.row_parts} devices (data x fsdp)"
        if accumulate > 1:
            among += f" x {accumulate} parts"
        raise ValueError(f"batch_size {batch_size} does not divide among {among}; {near} does")

    def _constrain(self, tree: trees.Tree, spec: PartitionSpec) -> trees.Tree:
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))

    def _put(self, tree: trees.Tree, spec: PartitionSpec) -> trees.Tree:
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda leaf: put(leaf, sharding), tree)


def colocate(tree: trees.Tree) -> trees.Tree:
    """Colocate uncommitted leaves with the first committed one (`jax.Array.committed`); on a mesh
    they are replicated.

    The results of a step are committed as a whole: without this, the first step on a mixed tree
    would have other shardings than the second, and the step would be compiled twice.
    """
    leaves = jax.tree.leaves(tree)
    placed = next((leaf.sharding for leaf in leaves if getattr(leaf, "committed", False)), None)
    if placed is None:
        return tree
    where = (
        NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else placed
    )
    return jax.tree.map(
        lambda leaf: leaf if getattr(leaf, "committed", False) else put(leaf, where), tree
    )


def like(tree: trees.Tree, params: trees.Tree, mesh: Mesh) -> trees.Tree:
    """Shardings for a tree that is made of copies of the parameters, such as optimiser state, masks
    or stacked lanes.

    A leaf whose path ends with that of a parameter and that has its shape lies as the parameter
    does; one with further leading axes has these whole and the rest as the parameter; everything
    else (counters) is whole everywhere.
    """
    known = trees.flatten(params)

    def sharding(path, leaf):
        parts = trees.path_of(path).split("/")
        for start in range(len(parts)):
            twin = known.get("/".join(parts[start:]))
            if twin is not None and leaf.shape[leaf.ndim - twin.ndim :] == twin.shape:
                spec = twin.sharding.spec
                return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - twin.ndim), *spec))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)
