"""How much memory training takes on a device: an estimate before anything is compiled, and a
refusal that helps.

Counted are the state, a gradient, what the backward pass keeps of the forward pass, and its own
scratch. On the CPU also the copy that a checkpoint is written from, and all devices of this host,
which share its memory. It is rough: the compiler fuses some of it away. `experiments.aot` asks the
compiler.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ltsm_jax import hosts, sharding
from ltsm_jax.data import windows
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.sharding import Placement
from ltsm_jax.training import optimizers, step
from ltsm_jax.training.config import TrainConfig
from ltsm_jax.trees import Tree

# XLA's own figures for Timer, known only after compiling, are 1.2 (timer-tiny) and 1.4 (67M) times
# what the backward pass keeps
SCRATCH = 1.4


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes of one memory.

    Attributes:
      fixed: parameters, optimiser state, a gradient, and on the CPU the copy of a checkpoint.
      activations: what a batch needs beyond that, at this number of parts.
      batch_size, accumulate: the batch, and the parts it is taken in one after the other.
      row_parts: devices among which the rows of a part are split.
      sharing: devices that share the memory.
      kept: what the backward pass of a part keeps, on all devices together.
    """

    fixed: int
    activations: int
    batch_size: int
    accumulate: int
    row_parts: int
    sharing: int
    kept: int = 0

    def fits(self, available: int) -> bool:
        """Whether `available` bytes are enough."""
        return self.fixed + self.activations <= available

    def check(self, available: int | None) -> str:
        """Say in one line what training takes and what is available.

        Raises: ValueError naming what fits, where this does not.
        """
        needed = (
            f"about {size_in_words(self.fixed)} of memory for parameters and optimiser, "
            f"{size_in_words(self.activations)} for a batch of {self.batch_size}"
        )
        if self.accumulate > 1:
            needed += f" in {self.accumulate} parts"
        if available is None:
            return needed
        if self.fits(available):
            return f"{needed}; {size_in_words(available)} is available"
        raise ValueError(
            f"training takes {needed}, but only {size_in_words(available)} is available: "
            f"{self.advice(available)}"
        )

    def advice(self, available: int) -> str:
        """Name what would fit into `available` bytes."""
        left = available - self.fixed
        found = []
        batch_size = int(left / max(self.activations, 1) * self.batch_size)
        batch_size -= batch_size % (self.row_parts * self.accumulate)
        if batch_size >= 1:
            found.append(f"batch_size={batch_size} fits")
        if (parts := self.parts_that_fit(available)) is not None:
            found.append(
                f"accumulate={parts} takes this batch in {parts} parts, which fit one after the "
                "other"
            )
        if not found:
            return (
                "train fewer parameters (trainable), or take a smaller model or a machine with "
                "more memory"
            )
        return "; or ".join(found)

    def parts_that_fit(self, available: int) -> int | None:
        """Smallest larger `accumulate` that divides the batch and whose parts fit into `available`
        bytes with the rest; None: there is none.
        """
        left = available - self.fixed
        for parts in range(self.accumulate + 1, self.batch_size // self.row_parts + 1):
            divides = self.batch_size % (parts * self.row_parts) == 0
            if divides and self.activations * self.accumulate / parts <= left:
                return parts
        return None


def estimate(
    state: Tree,
    frozen: Tree,
    source: Any,
    loss_fn: Any,
    key: jax.Array,
    *,
    batch_size: int,
    how: step.How,
    runtime: Runtime,
    writes_checkpoints: bool,
) -> MemoryEstimate:
    """Estimate what `training.fit` takes, from shapes alone.

    Args:
      state: shapes of what moves, {"params", "optimizer", ...}, with shardings where there are any.
      frozen: the other parameters.
      source, loss_fn: as for `fit`. key: of the dropout.
      batch_size: windows of a step, all parts together.
      how: how gradients are computed. runtime: what with, on the devices of the parameters.
      writes_checkpoints: whether the run has a folder.
    """
    on_cpu, placement = runtime.on_cpu, runtime.placement
    sharing = len(placement.mesh.local_devices) if placement.mesh and on_cpu else 1
    kept = kept_by_backward(
        state["params"],
        frozen,
        source,
        loss_fn=loss_fn,
        key=key,
        rows=batch_size // how.accumulate,
        how=how,
        runtime=runtime,
    )
    activations = int(SCRATCH * kept * sharing / placement.row_parts)
    copies = 2 if writes_checkpoints and on_cpu else 1
    beside = 2 if how.rho else 1  # a gradient, and of SAM the weights uphill
    fixed = sharing * (copies * bytes_on_one(state) + beside * bytes_on_one(state["params"]))
    return MemoryEstimate(
        fixed=fixed,
        activations=activations,
        batch_size=batch_size,
        accumulate=how.accumulate,
        row_parts=placement.row_parts,
        sharing=sharing,
        kept=kept,
    )


def estimate_before(
    config: TrainConfig,
    moving: Tree,
    frozen: Tree,
    source: Any,
    loss_fn: Any,
    key: jax.Array,
    placement: Placement,
    *,
    writes: bool,
) -> MemoryEstimate:
    """Estimate what `training.fit` with a validation takes, of which nothing lies in memory yet.

    Args:
      config: filled, nothing of it open.
      moving, frozen, source, loss_fn, key, placement: as for `estimate`.
      writes: whether the run has a folder.
    """

    def state_of(params: Tree) -> Tree:
        optimizer = optimizers.Rule.of(config).transformation().init(params)
        state = {"params": params, "optimizer": optimizer, "best": params}
        return state | ({"average": params} if config.averages else {})

    shapes = jax.eval_shape(state_of, moving)
    if placement.mesh is not None:
        shardings = sharding.like(shapes, moving, placement.mesh)
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
    return estimate(
        shapes,
        frozen,
        source.over(placement.mesh),
        loss_fn=loss_fn,
        key=key,
        batch_size=min(config.batch_size or 1, int(source.n)),
        how=step.How.of(config),
        runtime=step.runtime_of(config, placement),
        writes_checkpoints=writes,
    )


def kept_by_backward(
    moving, frozen, source, loss_fn, key, rows: int, how: step.How, runtime: Runtime
) -> int:
    """Bytes that the backward pass of `rows` windows keeps of its forward pass, beside the
    parameters.
    """
    # on one device: what the devices of a mesh keep is the same, together
    whole = dataclasses.replace(runtime, placement=Placement())
    backward = _backward.eval_shape(
        moving, frozen, source, loss_fn=loss_fn, key=key, rows=rows, how=how, runtime=whole
    )
    kept = bytes_in(backward)
    # in another dtype it keeps copies of the parameters, in float32 themselves
    weights = bytes_in(moving) + bytes_in(frozen) if runtime.compute is None else 0
    return max(kept - weights, 0)


# Never run: it is for its shapes, which jit keeps from one run to the next.
@functools.partial(jax.jit, static_argnames=("rows", "how", "runtime"))
def _backward(moving, frozen, source, loss_fn, key, *, rows: int, how: step.How, runtime: Runtime):
    """Give the backward pass of one part, with all that it holds."""
    indices, weight = windows.batch_at(jnp.arange(source.n), 0, rows)
    batch = step.gather(source, indices, weight, placement=runtime.placement)

    def of(moving):
        return step.objective(
            moving, frozen, batch, key=key, loss_fn=loss_fn, penalty=None, runtime=runtime
        )

    return jax.vjp(step.recomputing(of, how), moving)[1]


def available() -> int | None:
    """Bytes free for training on the first local device; of several hosts, on that with the least.
    None: unknown.
    """
    here = _available_here()
    if hosts.process_count() == 1:
        return here
    # the host with the least decides for all; in MB, for they agree in 32 bits
    least = int(hosts.agree(-1 if here is None else here // 2**20).min())
    return None if least < 0 else least * 2**20


def _available_here() -> int | None:
    """Bytes free on the default device; on the CPU those the system, and the container, can still
    give.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    free = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / "memory.max").read_text().strip(),
            int((group / "memory.current").read_text()),
        )
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit != "max":
            free.append(int(limit) - used + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return min(free)


def bytes_on_one(tree: Tree) -> int:
    """Bytes of the arrays, or shapes, of `tree` that lie on one device."""

    def part(x):
        whole = getattr(x, "sharding", None) is None
        return jax.ShapeDtypeStruct(x.shape if whole else x.sharding.shard_shape(x.shape), x.dtype)

    return bytes_in(jax.tree.map(part, tree))


def bytes_in(tree: Tree) -> int:
    """Bytes of all arrays, or shapes, of `tree`."""
    return sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "shape")
    )


def size_in_words(n: int) -> str:
    """Say a number of bytes."""
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.2f} MB"
