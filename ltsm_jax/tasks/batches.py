"""Results of every window, computed in batches of one shape."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ltsm_jax import hosts, sharding
from ltsm_jax.sharding import Placement
from ltsm_jax.trees import Tree

HERE = Placement()  # where the arrays lie; nothing is split
# rows that a CPU takes at a time: what it writes between two layers is then used again, from its
# caches
CHUNK = 256


def in_chunks(
    f: Callable[[jax.Array], Tree], indices: jax.Array, placement: Placement = HERE
) -> Tree:
    """Compute `f(indices)` inside a program: on a CPU `CHUNK` rows at a time, elsewhere and over a
    mesh all at once.

    A quarter to a third of a small model's evaluation went into fresh memory for the results of
    2048 rows at a time.

    Args:
      f: from window numbers int32 [B] to a tree of arrays [B, ...], row by row.
      indices: int32 [B]; taken whole where B is no multiple of `CHUNK`.
    """
    rows = indices.shape[0]
    if jax.default_backend() != "cpu" or placement.mesh is not None or rows % CHUNK:
        return f(indices)
    found = jax.lax.map(f, indices.reshape(-1, CHUNK))
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), found)


@hosts.interruptible()
def in_batches(
    f: Callable[[Any], Tree], n: int, batch_size: int, placement: Placement = HERE
) -> Tree:
    """Compute `f(indices)` for the windows 0..n-1, `batch_size` at a time, and join the results.

    Args:
      f: from window numbers int32 [B] to a tree of arrays [B, ...]. Every call gets the same B: the
        last batch is filled up with the last window, whose surplus rows are cut off again: one
        compilation serves all, and no window is lost.
      placement: the devices among which the rows of a batch are split, and B rounded up to what
        they divide. On several hosts all call, and all get everything.
    Returns: arrays [n, ...] on the host, float64.
    Raises: ValueError when n or batch_size is below 1; on one host, after a signal, what
    `hosts.stopped` makes.
    """
    if n < 1:
        raise ValueError("no windows to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = rounded(batch_size, n, placement)
    batches = []
    for start in range(0, n, size):
        indices = np.minimum(np.arange(start, start + size, dtype=np.int32), n - 1)
        batches.append(f(placement.put_rows(indices)))
        hosts.pause()

    def join(*parts: Any) -> np.ndarray:
        on_host = [sharding.on_host(part) for part in parts]
        return np.concatenate(on_host)[:n].astype(np.float64)

    return jax.tree.map(join, *batches)


def rounded(batch_size: int, n: int, placement: Placement) -> int:
    """Rows of each batch of `in_batches`: at most all `n`, rounded up to what the
    devices divide.
    """
    parts = placement.row_parts
    return -(-min(batch_size, n) // parts) * parts
