"""The part of a report that shows curvature at chosen epochs of a fine-tuning (`--curvature`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltsm_jax.plotting import new_figure

NUMBERS = ("top_eigenvalue", "trace", "sharpness")
TEXT = (
    "Of the training loss on a fixed subsample of its windows, without dropout: the largest "
    "eigenvalue of its Hessian, the trace, and how much the loss rises within 0.05 up the "
    "gradient (SAM's sharpness). Means over seeds; epoch 0 is the start."
)

Arm = tuple[str, float | None]


def collect(cells: Sequence[dict[str, Any]]) -> dict[Arm, dict[int, dict[str, float]]]:
    """Means over seeds by (method, alpha) and epoch; empty where nothing was measured."""
    found: dict[Arm, dict[int, list[dict[str, float]]]] = {}
    for cell in cells:
        rows = [row for row in cell["history"] if NUMBERS[0] in row]
        if cell.get("start_curvature"):
            rows.insert(0, {"epoch": 0} | cell["start_curvature"])
        for row in rows:
            epochs = found.setdefault((cell["method"], cell["alpha"]), {})
            epochs.setdefault(row["epoch"], []).append(row)

    means = {}
    for arm, epochs in found.items():
        means[arm] = {}
        for epoch, rows in sorted(epochs.items()):
            means[arm][epoch] = {}
            for name in NUMBERS:
                means[arm][epoch][name] = float(np.mean([row[name] for row in rows]))
    return means


def table(
    cells: Sequence[dict[str, Any]], label: Callable[[str, float | None], str]
) -> tuple[list, list]:
    """Header and rows of the table."""
    header = ["method", "epoch", "top eigenvalue", "trace", "sharpness"]
    rows = []
    for (method, alpha), epochs in collect(cells).items():
        for epoch, numbers in epochs.items():
            rows.append(
                [label(method, alpha), str(epoch), *(f"{numbers[name]:.4g}" for name in NUMBERS)]
            )
    return header, rows


def plot(
    cells: Sequence[dict[str, Any]], label: Callable[[str, float | None], str], path: Path
) -> bool:
    """Draw the largest eigenvalue by epoch. Returns: False where none was measured, and then there
    is no picture.
    """
    found = collect(cells)
    if not found:
        return False
    figure, ax = new_figure(8, 4.5)
    for (method, alpha), epochs in found.items():
        ax.plot(
            list(epochs),
            [row[NUMBERS[0]] for row in epochs.values()],
            marker="o",
            label=label(method, alpha),
        )
    ax.set_xlabel("epoch (0: the start)")
    ax.set_ylabel("largest eigenvalue of the Hessian")
    ax.legend(frameon=False)
    figure.savefig(path)
    return True
