"""Results of every window, computed in batches of one shape."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ltsm_jax import sharding
from ltsm_jax.trees import Tree


def in_batches(f: Callable[[Any], Tree], n: int, batch_size: int, mesh: Mesh | None = None) -> Tree:
    """`f(indices)` for the windows 0..n-1, `batch_size` at a time, joined again: arrays [n, ...] on the host, float64.

    Args:
      f: from window numbers int32 [B] to a tree of arrays [B, ...]. Every call gets the same B: the last batch is
        filled up with the last window, whose surplus rows are cut off again: one compilation serves all, and no window
        is lost.
      mesh: the devices among which the rows of a batch are split, and B rounded up to what they divide. On several
        hosts all call, and all get everything.
    Raises: ValueError when n or batch_size is below 1.
    """
    if n < 1:
        raise ValueError("no windows to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parts = sharding.row_parts(mesh)
    size = -(-min(batch_size, n) // parts) * parts

    def placed(start: int) -> Any:
        indices = np.minimum(np.arange(start, start + size, dtype=np.int32), n - 1)
        return indices if mesh is None else sharding.put(indices, NamedSharding(mesh, sharding.BATCH))

    batches = [f(placed(i)) for i in range(0, n, size)]
    join = lambda *parts: np.concatenate([sharding.on_host(part) for part in parts])[:n].astype(np.float64)  # noqa: E731
    return jax.tree.map(join, *batches)
