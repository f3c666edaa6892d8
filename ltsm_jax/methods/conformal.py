"""Split-conformal intervals: quantiles of a point forecast's errors, measured on windows of the past.

Where a family says no quantiles, or none at a level asked for, the errors that its point forecast
made on windows before the end of the history stand in: per step ahead, in units of the context's
standard deviation, and corrected for their number as split-conformal prediction does it (Vovk et
al., "Algorithmic Learning in a Random World", 2005): the level a of n errors is the order statistic
number (n + 1) a, rounded outwards. Where n is too small for a level, the largest error of any step
is taken, on either side, and that is said.

Shapes: n windows, M origins, C targets, H steps ahead, G levels of the grid, W levels asked for.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ltsm_jax.data.panel import Panel
from ltsm_jax.tasks.panels import Origins

# Level of a grid point; those between are interpolated.
GRID = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.025),
    *(round(0.01 * i, 2) for i in range(3, 98)),
    *(0.975, 0.98, 0.99, 0.995, 0.9975, 0.999),
)
WINDOWS = 512  # that a calibration looks at, at most, unless every item needs one


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Quantiles of a point forecast's errors.

    Attributes:
      offsets: [H, G] error (true minus forecast) at each level of `GRID`, in units of the context's
        standard deviation.
      counts: [H] errors that each step's quantiles come from.
      source: what it was calibrated on, in words.
    """

    offsets: np.ndarray
    counts: np.ndarray
    source: str

    @property
    def horizon(self) -> int:
        """Steps ahead that were calibrated."""
        return len(self.offsets)

    @property
    def windows(self) -> int:
        """Errors of the step that has fewest."""
        return int(self.counts.min())

    @classmethod
    def of(cls, errors: np.ndarray, source: str) -> "Calibration":
        """From the errors [n, H] of n windows, NaN where nothing was observed.

        Raises: ValueError where a step has no error at all.
        """
        counts = (~np.isnan(errors)).sum(axis=0)
        if not len(errors) or (counts == 0).any():
            raise ValueError("there are steps ahead for which no error could be measured")
        n, levels = counts[:, None], np.asarray(GRID)
        at = (n + 1) * levels
        outwards = np.where(levels < 0.5, np.floor(at + 1e-9), np.ceil(at - 1e-9)).astype(int)
        rising = np.sort(errors, axis=0)  # NaN at the end
        offsets = np.take_along_axis(rising, np.clip(outwards, 1, n).T - 1, axis=0).T

        # Beyond what n errors can say, the largest of any step: an interval that is too wide
        # rather than one of no width.
        largest = np.nanmax(np.abs(errors))
        offsets = np.where(outwards < 1, -largest, offsets)
        offsets = np.where(outwards > n, largest, offsets)
        return cls(offsets, counts, source)

    def at(self, levels: Sequence[float], horizon: int) -> np.ndarray:
        """Errors [H, W] at `levels`, of the first `horizon` steps; rising where the levels are."""
        return np.array([np.interp(levels, GRID, row) for row in self.offsets[:horizon]])

    def too_few(self, levels: Sequence[float]) -> tuple[float, ...]:
        """Those of `levels` for which there were too few windows, so that the largest error stands in."""
        n = self.windows
        return tuple(x for x in levels if (n + 1) * min(x, 1 - x) < 1 - 1e-9)

    def describe(self, levels: Sequence[float]) -> str:
        """One line for notes: levels, number of windows and where they are from."""
        shown = ", ".join(f"{level:g}" for level in levels)
        said = f"quantiles {shown}: split-conformal, from the errors of {self.windows} windows {self.source}"
        if few := self.too_few(levels):
            shown = ", ".join(f"{level:g}" for level in few)
            said += f"; too few for {shown}, where the largest error stands in"
        return said

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "grid": list(GRID),
            "offsets": [[float(f"{x:.7g}") for x in row] for row in self.offsets],
            "counts": [int(n) for n in self.counts],
            "source": self.source,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Calibration":
        """Read back what `to_json` wrote.

        Raises: ValueError for anything else.
        """
        try:
            offsets = np.array(fields["offsets"], np.float64)
            counts = np.array(fields["counts"], np.int64)
            grid, source = tuple(fields["grid"]), str(fields["source"])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"this is no calibration: {type(err).__name__} {err}") from err
        if offsets.ndim != 2 or offsets.shape != (len(counts), len(grid)) or not len(counts):
            raise ValueError(f"a calibration of {len(counts)} steps and {len(grid)} levels has {offsets.shape} offsets")
        if not np.isfinite(offsets).all() or (np.diff(offsets, axis=1) < 0).any():
            raise ValueError("the offsets of a calibration are finite and rise with the level")
        if grid != GRID:  # of another version
            offsets = np.array([np.interp(GRID, grid, row) for row in offsets])
        return cls(offsets, counts, source)


def rolling_origins(panel: Panel, horizon: int, context_len: int, windows: int = WINDOWS) -> Origins:
    """Origins before the end of each item's history, the newest first; none that leaves no context.

    About `windows` in all, spread over the items, at least one of each of `windows` items. Targets
    lie within the history. A context has at least half the rows that the forecast itself sees.
    """
    n = panel.lengths
    seen = np.minimum(n, context_len)
    room = n - horizon - np.maximum(-(-seen // 2), 1) + 1  # origins that fit, one row apart
    able = np.flatnonzero(room > 0)
    if not len(able):
        return Origins.none()
    if len(able) > windows:
        able = able[np.linspace(0, len(able) - 1, windows).astype(int)]
    each = max(math.ceil(windows / len(able)), 1)
    items, ends = [], []
    for i in able:
        count = min(each, int(room[i]))
        back = np.unique(np.linspace(0, room[i] - 1, count).astype(int))
        items.append(np.full(len(back), i))
        ends.append(panel.bounds[i + 1] - horizon - back)
    return Origins(np.concatenate(items), np.concatenate(ends))


def targets_after(panel: Panel, origins: Origins, horizon: int) -> np.ndarray:
    """What came after each origin [M, C, H]; every target lies within its item."""
    at = origins.ends[:, None] + np.arange(horizon)
    return panel.values[:, at].swapaxes(0, 1)
