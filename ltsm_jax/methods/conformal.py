"""Split-conformal intervals: quantiles of a point forecast's errors, measured on windows of the
past.

Where a family says no quantiles, or none at a level asked for, the errors that its point forecast
made on windows before the end of the history stand in: per step ahead, in a unit that each context
gives (`tasks.panels.error_unit`), corrected for their number as split-conformal prediction does it
(Vovk et al., "Algorithmic Learning in a Random World", 2005): the level a of n errors is the order
statistic number (n + 1) a, rounded outwards. Where n is too small for a level, the largest error of
any step is taken, on either side, and that is said.

Errors of several items are pooled. Those of several targets are, too, unless there are windows
enough for quantiles of each.

Shapes: M origins, C targets (1 where they are pooled), H steps ahead, G levels of the grid, W
levels asked for.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ltsm_jax.data.panel import Panel
from ltsm_jax.tasks.panels import Origins, PanelForecast

# Levels of the grid; those between are interpolated.
GRID = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(round(0.05 * i, 2) for i in range(2, 19)),
    *(0.925, 0.95, 0.96, 0.97, 0.975, 0.98, 0.99, 0.995, 0.9975, 0.999),
)
WINDOWS = 512  # origins that a calibration looks at, at most
FEWEST = 128  # origins, where each has many targets
ENOUGH = 100  # windows without overlap from which on each target has quantiles of its own
MOST = 1 << 18  # numbers of a calibration that is kept per target


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Quantiles of a point forecast's errors.

    Attributes:
      offsets: [C, H, G] error (true minus forecast) at each level of `GRID`, in the context's unit.
      counts: [C, H] errors that these come from.
      apart: windows among them that do not overlap, about.
      source: what it was calibrated on, in words.
    """

    offsets: np.ndarray
    counts: np.ndarray
    apart: int
    source: str

    @property
    def horizon(self) -> int:
        """Steps ahead that were calibrated."""
        return self.offsets.shape[1]

    def fits(self, horizon: int, n_targets: int) -> bool:
        """Return whether it says something of `horizon` steps of `n_targets` targets."""
        return horizon <= self.horizon and len(self.offsets) in (1, n_targets)

    @classmethod
    def of(cls, errors: np.ndarray, apart: int, source: str) -> "Calibration":
        """From errors [M, C, H], NaN where nothing was observed.

        Raises: ValueError where there are steps without any error.
        """
        m, c, horizon = errors.shape
        if apart < ENOUGH or c * horizon * len(GRID) > MOST or (_observed(errors) < ENOUGH).any():
            errors = errors.reshape(m * c, 1, horizon)
        counts = _observed(errors)
        if (counts == 0).any():
            raise ValueError("there are steps ahead for which no error could be measured")
        n, levels = counts[..., None], np.asarray(GRID)
        at = (n + 1) * levels
        outwards = np.where(levels < 0.5, np.floor(at + 1e-9), np.ceil(at - 1e-9)).astype(int)
        rising = np.moveaxis(np.sort(errors, axis=0), 0, -1)  # NaN at the end
        offsets = np.take_along_axis(rising, np.clip(outwards, 1, n) - 1, axis=-1)

        # Beyond what n errors can say, the largest of any step: an interval that is too wide
        # rather than one of no width.
        largest = np.nanmax(np.abs(errors), axis=(0, 2))[:, None, None]
        offsets = np.where(outwards < 1, -largest, offsets)
        offsets = np.where(outwards > n, largest, offsets)
        return cls(offsets, counts, apart, source=source)

    @classmethod
    def measured(
        cls, panel: Panel, origins: Origins, found: PanelForecast, source: str
    ) -> "Calibration":
        """From forecasts of a panel's own past.

        found: of `origins`, with units.
        Raises: ValueError where nothing could be measured.
        """
        horizon = found.point.shape[-1]
        if not len(origins.items):
            raise ValueError("no item is long enough")
        at = origins.ends[:, None] + np.arange(horizon)
        true = panel.values[:, at].swapaxes(0, 1)
        unit = np.where(found.unit > 0, found.unit, np.nan)  # of a context that moves
        items = len(np.unique(origins.items))
        told = f"{source} of {items} items" if items > 1 else source
        return cls.of((true - found.point) / unit[..., None], _apart(origins, horizon), told)

    def quantiles(self, found: PanelForecast, levels: Sequence[float]) -> np.ndarray:
        """Quantiles [M, C, H, W] around a forecast at `levels`; rising where the levels are."""
        offsets = self.at(found.point.shape[-1], levels)
        return found.point[..., None] + found.unit[..., None, None] * offsets[None]

    def at(self, horizon: int, levels: Sequence[float]) -> np.ndarray:
        """Offsets [C, H, W] of the first `horizon` steps at `levels`, in the context's unit."""
        flat = self.offsets[:, :horizon].reshape(-1, len(GRID))
        at = np.array([np.interp(levels, GRID, row) for row in flat])
        return at.reshape(-1, horizon, len(levels))

    def too_few(self, levels: Sequence[float]) -> tuple[float, ...]:
        """Those of `levels` that lie beyond what so many windows can say."""
        n = self.counts.min()
        return tuple(x for x in levels if (n + 1) * min(x, 1 - x) < 1 - 1e-9)

    def describe(self, levels: Sequence[float]) -> str:
        """One line for notes: levels, number of windows and where they are from."""
        said = f"quantiles {_shown(levels)}: split-conformal, from the errors of {self.told}"
        if few := self.too_few(levels):
            said += f"; too few for {_shown(few)}, where the largest error stands in"
        return said

    @property
    def told(self) -> str:
        """Number of windows and where they are from."""
        pooled = "" if len(self.offsets) > 1 else "pooled over targets and items, "
        return (
            f"{self.counts.min()} forecasts {self.source} ({pooled}about {self.apart} windows do "
            "not overlap)"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "grid": list(GRID),
            "offsets": np.vectorize(_shortened)(self.offsets).tolist(),
            "counts": self.counts.tolist(),
            "apart": self.apart,
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
            grid = np.array(fields["grid"], np.float64)
            apart, source = int(fields["apart"]), str(fields["source"])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"this is no calibration: {type(err).__name__} {err}") from err
        if offsets.ndim != 3 or offsets.shape != (*counts.shape, len(grid)) or not offsets.size:
            raise ValueError(
                f"a calibration has offsets [C, H, G] and counts [C, H], not {offsets.shape} "
                f"{counts.shape}"
            )
        if (
            not np.isfinite(offsets).all()
            or (np.diff(offsets) < 0).any()
            or (np.diff(grid) <= 0).any()
        ):
            raise ValueError("levels rise, and with them the offsets of a calibration")
        if tuple(grid) != GRID:  # of another version
            flat = offsets.reshape(-1, len(grid))
            offsets = np.array([np.interp(GRID, grid, row) for row in flat]).reshape(
                *counts.shape, -1
            )
        return cls(offsets, counts, apart, source=source)


def _observed(errors: np.ndarray) -> np.ndarray:
    """Number of errors [C, H] that are not NaN."""
    return (~np.isnan(errors)).sum(axis=0)


def _shown(levels: Sequence[float]) -> str:
    return ", ".join(f"{level:g}" for level in levels)


def _shortened(x: float) -> float:
    """A number of seven digits, which JSON writes shortly."""
    return float(f"{x:.7g}")


def _apart(origins: Origins, horizon: int) -> int:
    """Number of windows among the targets of `origins` that do not overlap."""
    order = np.lexsort((origins.ends, origins.items))
    count, last = 0, (-1, 0)
    for item, end in zip(origins.items[order].tolist(), origins.ends[order].tolist(), strict=True):
        if item != last[0] or end >= last[1] + horizon:
            count, last = count + 1, (item, end)
    return count


def rolling_origins(
    panel: Panel, horizon: int, context_len: int, windows: int | None = None
) -> Origins:
    """Origins in the history of a panel whose targets lie in it, too.

    Spread evenly over all items and all of their rows: of the newest alone one learns how one
    season went. A context has at least half the rows that the forecast itself sees, and all of them
    in long items.

    windows: about how many; by default fewer where each has many targets.
    """
    if windows is None:
        windows = int(np.clip(2 * WINDOWS // panel.n_variates, FEWEST, WINDOWS))
    n = panel.lengths
    seen = np.minimum(n, context_len)
    room = n - horizon - np.maximum(-(-seen // 2), 1) + 1  # origins that fit, one row apart
    # A long item has enough of them with whole contexts, all of one length.
    whole = n - horizon - context_len + 1
    room = np.where(whole >= FEWEST, whole, room)
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
