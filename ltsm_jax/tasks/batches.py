"""Results of every window, computed in batches of one shape."""

from collections.abc import Callable

import jax
import numpy as np

from ltsm_jax.trees import Tree


def in_batches(f: Callable[[np.ndarray], Tree], n: int, batch_size: int) -> Tree:
    """`f(indices)` for the windows 0..n-1, `batch_size` at a time, joined again: arrays [n, ...] on the host, float64.

    f: from window numbers int32 [B] to a tree of arrays [B, ...]. Every call gets the same B: the last batch is filled
    up with the last window, whose surplus rows are cut off again, so one compilation serves all and no window is lost.

    Raises: ValueError when n or batch_size is below 1.
    """
    if n < 1:
        raise ValueError("no windows to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = min(batch_size, n)
    batches = [f(np.minimum(np.arange(i, i + size, dtype=np.int32), n - 1)) for i in range(0, n, size)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:n].astype(np.float64), *batches)
