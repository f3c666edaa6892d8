"""Describe a batch whose loss or gradient is not finite, in words."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ltsm_jax import trees

HUGE = 1e6  # beyond any scaled series; one such value swamps all others in a float32 sum of squares
NAMED = 5  # leaves and windows that a message names


def of_tree(what: str, tree: trees.Tree) -> str:
    """Say in one line which leaves of a tree ("parameters", "gradients") are not finite."""
    flat = trees.flatten(tree)
    bad = [path for path, leaf in flat.items() if not bool(jnp.isfinite(leaf).all())]
    if not bad:
        return f"  {what}: all finite"
    names = ", ".join(bad[:NAMED])
    if len(bad) > NAMED:
        names += ", ..."
    return f"  {what}: not finite in {len(bad)} of {len(flat)}: {names}"


def of_batch(
    batch: Mapping[str, np.ndarray],
    indices: np.ndarray,
    weight: np.ndarray,
    describe: Callable[[int], Mapping[str, Any]],
) -> list[str]:
    """Say in a few lines which windows of a batch have values that are huge or not finite.

    Args:
      batch: arrays [B, ...] on the host, by name.
      indices: [B], the numbers of the windows. weight: [B], 0 for rows that fill up the batch.
      describe: tells where a window lies, see `Windows.describe`.
    """
    real = np.flatnonzero(weight > 0)
    suspects, largest = [], 0.0
    for name, values in batch.items():
        size = np.abs(np.asarray(values, np.float64)[real]).reshape(len(real), -1)
        top = np.where(np.isfinite(size).all(1), size.max(1), np.inf)
        largest = max(largest, float(np.max(top[np.isfinite(top)], initial=0)))
        for row in np.flatnonzero(top > HUGE):
            what = "is not finite" if np.isinf(top[row]) else f"reaches {top[row]:.3g}"
            where = describe(int(indices[real[row]]))
            place = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
            suspects.append(f"    {name} {what}: {place}")
    if not suspects:
        return [
            f"  the {len(real)} windows of this batch are finite, no value is beyond "
            f"{largest:.3g}: a smaller lr, or clip, may help"
        ]
    lines = [
        f"  suspect windows of this batch ({len(suspects)} of {len(real)}):",
        *suspects[:NAMED],
    ]
    if len(suspects) > NAMED:
        lines.append("    ...")
    return lines
