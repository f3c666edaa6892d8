"""Do split-conformal intervals cover what they say?

On rows that come after everything that they were made from: a forecaster
is calibrated on the rows before the test span alone (the last fifth of each
item, or of a benchmark its published part), as `Forecaster.predict` does on
the history that it is given. Then it forecasts from origins spread over the
test span.

Run:   LTSM_DATA=FOLDER python -m experiments.benchmarks.coverage --horizon 24
Cost:  about a minute on 2 CPU cores.
Gives: a line per data set and forecaster: the share of the test span's
       values inside the intervals of 80 % and 95 %, and how far single
       targets or items are from it on average.
Data:  ETTh1, weather and traffic_6 from $LTSM_DATA; those that are not there
       are left out.
"""

import dataclasses
import sys
from typing import Annotated, ClassVar

import jax
import numpy as np

from experiments import flags
from ltsm_jax import Forecaster
from ltsm_jax.data import MissingDataError, Panel, borders_of, load_series
from ltsm_jax.models.ttm import TTM
from ltsm_jax.tasks.panels import Origins

DATA = ("ETTh1", "weather", "traffic_6 as items")
WANTED = (0.8, 0.95)


def read(name: str) -> tuple[Panel, np.ndarray]:
    """A data set as a panel, and the row of it [N] at which each item's test span begins."""
    series = load_series(name.split()[0])
    panel = Panel.of(series)
    if "items" not in name:
        return panel, np.array([borders_of(series.benchmark, series.n_rows).test[0]])
    # Each variate an item of its own, which begins a bit later than the one before.
    parts = [series.values[c, 500 * c :] for c in range(series.n_variates)]
    lengths = np.array([len(part) for part in parts])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    panel = dataclasses.replace(
        panel,
        ids=np.array(series.columns, object),
        columns=("value",),
        values=np.concatenate(parts)[None],
        bounds=bounds,
        first=None,
        id_name="id",
    )
    return panel, bounds[:-1] + lengths * 4 // 5


def forecasters(panel: Panel) -> dict[str, Forecaster]:
    """A pretrained model, one that knows nothing, and a naive forecast."""
    timer = Forecaster.load("timer-tiny")
    mixer = TTM(TTM.small())
    draw, more = jax.random.split(jax.random.key(0))
    facts = {"n_variates": panel.n_variates, "freq": panel.freq, "key": more}
    return {
        "timer-tiny": timer,
        "ttm, random": Forecaster(*mixer.for_series(mixer.init(draw), **facts)),
        "seasonal naive": dataclasses.replace(timer, baseline="seasonal_naive"),
    }


def coverage(
    panel: Panel, starts: np.ndarray, forecaster: Forecaster, horizon: int, windows: int
) -> str:
    """One line of the table."""
    forecaster = forecaster.calibrated(panel.until(starts), horizon)

    last = panel.bounds[1:] - horizon
    each = max(windows // panel.n_items, 1)
    ends = [
        np.linspace(start, end, each).astype(int) for start, end in zip(starts, last, strict=True)
    ]
    origins = Origins(np.repeat(np.arange(panel.n_items), each), np.concatenate(ends))
    levels = {(1 - share) / 2 for share in WANTED}
    levels = sorted(levels | {(1 + share) / 2 for share in WANTED})
    found = forecaster.after(panel, origins, horizon, levels=levels)
    true = panel.values[:, origins.ends[:, None] + np.arange(horizon)].swapaxes(0, 1)

    cells = []
    for share in WANTED:
        low, high = (
            found.quantiles[..., levels.index(x)] for x in ((1 - share) / 2, (1 + share) / 2)
        )
        inside = (true >= low) & (true <= high)
        by_target = inside.reshape(panel.n_items, each, panel.n_variates, horizon).mean(axis=(1, 3))
        apart = np.abs(by_target - share).mean()
        cells.append(f"{share:.0%}: {inside.mean():6.1%} (each {apart:4.1%} off)")
    assert forecaster.calibration is not None
    return "  ".join(cells) + f"  {forecaster.calibration.told}"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.coverage"
    horizon: Annotated[int, flags.whole(1)] = 96
    """rows ahead"""
    windows: Annotated[int, flags.whole(1)] = 200
    """origins in the test span"""


def main() -> None:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    for name in DATA:
        try:
            panel, starts = read(name)
        except MissingDataError:
            continue
        for kind, forecaster in forecasters(panel).items():
            line = coverage(panel, starts, forecaster, horizon=args.horizon, windows=args.windows)
            print(f"{name:18s} {kind:14s} {line}", flush=True)


if __name__ == "__main__":
    main()
