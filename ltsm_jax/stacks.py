"""Compute a function for several trees of one structure, the lanes of a stack, in one program.

Runs that differ in their numbers alone, such as a seed, a start or a learning rate, can take their
steps together. What differs between the lanes has one more axis in front, L; what they have in
common is held once.

    stack = Stack.of([{"w": w_0, "x": x}, {"w": w_1, "x": x}])    # w [L, ...], x once
    Over("batched").each(lambda tree: tree["w"] @ tree["x"], stack)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ltsm_jax import sharding, trees
from ltsm_jax.trees import Tree

Mode = Literal["batched", "mapped"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclasses.dataclass(frozen=True, eq=False)
class TreeStack:
    """L trees of one structure; a pytree.

    Attributes:
      own: the leaves that differ between lanes, [L, ...].
      shared: the leaves that are one and the same array in every lane.
      which: for each leaf, in the order of the tree, whether it is among `own`; static under jit.
      structure: of the tree of one lane; static under jit.
    """

    own: list[Any]
    shared: list[Any]
    which: tuple[bool, ...]
    structure: Any

    @classmethod
    def of(
        cls, lanes: Sequence[Tree], join: Callable[[Sequence[Any]], Any] = jnp.stack
    ) -> "TreeStack":
        """Stack the trees of all lanes; a leaf that is the same object in all of them is held once.

        join: makes one array [L, ...] of the leaves of all lanes.
        """
        structure = jax.tree.structure(lanes[0])
        own, shared, which = [], [], []
        for leaves in zip(*map(jax.tree.leaves, lanes), strict=True):
            differs = any(leaf is not leaves[0] for leaf in leaves)
            which.append(differs)
            if differs:
                own.append(join(leaves))
            else:
                shared.append(leaves[0])
        return cls(own, shared, tuple(which), structure=structure)

    @classmethod
    def whole(cls, tree: Tree) -> "TreeStack":
        """Make a stack of a tree whose leaves have the axis of the lanes already."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(leaves, [], (True,) * len(leaves), structure=structure)

    def merge(self, other: "TreeStack") -> "TreeStack":
        """Merge the two parts of `trees.partition`, lane by lane."""
        both = trees.combine(self._marked(), other._marked())
        leaves = jax.tree.leaves(both)
        own = [leaf.array for leaf in leaves if leaf.own]
        shared = [leaf.array for leaf in leaves if not leaf.own]
        return TreeStack(
            own=own,
            shared=shared,
            which=tuple(leaf.own for leaf in leaves),
            structure=jax.tree.structure(both),
        )

    def lane(self, own: Sequence[Any]) -> Tree:
        """Give the tree of one lane. own: its slices of `self.own`."""
        mine, rest = iter(own), iter(self.shared)
        leaves = [next(mine) if differs else next(rest) for differs in self.which]
        return jax.tree.unflatten(self.structure, leaves)

    def _marked(self) -> Tree:
        own, shared = iter(self.own), iter(self.shared)
        leaves = [_Marked(differs, next(own if differs else shared)) for differs in self.which]
        return jax.tree.unflatten(self.structure, leaves)


jax.tree_util.register_dataclass(
    TreeStack, data_fields=["own", "shared"], meta_fields=["which", "structure"]
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Marked:
    """A leaf of a stack, and whether it is a lane's own; to JAX a leaf itself."""

    own: bool
    array: Any


@dataclasses.dataclass(frozen=True)
class Over:
    """Way of running a function over the lanes of stacks; static under jit.

    Attributes:
      mode: "batched": all lanes at once, with one more axis in every operation. "mapped": one lane
        after the other inside the program, each with the bits that it would have alone.
      mesh: over whose devices the lanes are spread, each device with its own and with no word to
        the others; None: they stay where they are. Their number must divide L.
    """

    mode: Mode
    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """Number of devices that have lanes."""
        return 1 if self.mesh is None else self.mesh.size

    def each(self, function: Callable[..., Tree], *stacks: TreeStack, shared: Tree = None) -> Tree:
        """Compute `function(*trees of one lane)` for every lane; results have the axis L in front.

        shared: where it is not None, the last argument of every call. To be used inside jit.
        """

        def local(*stacks: TreeStack, shared: Tree) -> Tree:
            def one(owns):
                lane = [stack.lane(own) for stack, own in zip(stacks, owns, strict=True)]
                return function(*lane) if shared is None else function(*lane, shared)

            owns = [stack.own for stack in stacks]
            return jax.vmap(one)(owns) if self.mode == "batched" else jax.lax.map(one, owns)

        return self.spread(local, *stacks, shared=shared)

    def spread(
        self, function: Callable[..., Tree], *stacks: TreeStack, shared: Tree = None
    ) -> Tree:
        """Compute `function(*stacks, shared=shared)` on every device, with stacks of its
        own lanes.
        """
        if self.mesh is None:
            return function(*stacks, shared=shared)
        lanes, everywhere = self._spec, PartitionSpec()

        def here(owns, common, shared):
            pairs = zip(stacks, owns, common, strict=True)
            local = [dataclasses.replace(s, own=own, shared=rest) for s, own, rest in pairs]
            return function(*local, shared=shared)

        spread = jax.shard_map(
            here,
            mesh=self.mesh,
            in_specs=(lanes, everywhere, everywhere),
            out_specs=lanes,
            check_vma=False,
        )
        own = [stack.own for stack in stacks]
        return spread(own, [stack.shared for stack in stacks], shared)

    def stack(self, lanes: Sequence[Tree]) -> TreeStack:
        """Outside jit: `TreeStack.of`, its lanes over the devices, and what they share on all
        of them.
        """
        stack = TreeStack.of(lanes, self.join)
        if self.mesh is None:
            return stack
        return dataclasses.replace(
            stack, shared=sharding.Placement(self.mesh).replicate(stack.shared)
        )

    def join(self, leaves: Sequence[Any]) -> jax.Array:
        """Outside jit: make one array [L, ...] of the leaves of all lanes, laid over
        the devices.
        """
        if self.mesh is None:
            return jnp.stack(leaves)
        if jax.dtypes.issubdtype(getattr(leaves[0], "dtype", None), jax.dtypes.prng_key):
            return jax.device_put(jnp.stack(leaves), self.sharding)
        # By way of the host: no device has room for all lanes.
        return sharding.put(np.stack([sharding.on_host(leaf) for leaf in leaves]), self.sharding)

    @property
    def sharding(self) -> NamedSharding:
        """Sharding of arrays with the axis of the lanes."""
        assert self.mesh is not None, "there is a mesh to lie on"
        return NamedSharding(self.mesh, self._spec)

    @property
    def _spec(self) -> PartitionSpec:
        assert self.mesh is not None, "there is a mesh to lie on"
        axes: list[str] = [name for name, size in self.mesh.shape.items() if size > 1]
        # As the compiler writes it: another spelling would compile the next step anew.
        return PartitionSpec(axes[0] if len(axes) == 1 else tuple(axes))


def take(tree: Tree, lane: int) -> Tree:
    """Take one lane of a tree of arrays [L, ...], on one device."""
    return jax.tree.map(lambda leaf: leaf[lane], tree)
