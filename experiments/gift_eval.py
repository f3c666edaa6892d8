"""Evaluate models as GIFT-Eval does: its windows, MASE and quantile loss.

GIFT-Eval (Aksu et al., arXiv 2410.10393) forecasts rolling windows without
overlap at the end of every series: as many as fill a tenth of the shortest
one, 20 at most, at least one; a horizon that follows from the step, times 10
for medium and 15 for long term.

Run:   python -m experiments.gift_eval --data FOLDER/ett1/H,my.csv \\
           --models timer-tiny,amazon/chronos-bolt-tiny --out runs/gift
Data:  folders of GIFT-Eval (*.arrow, without its package), benchmark names, or
       tables as `ltsm forecast` takes them.
Cost:  a forecast of every series in every window.
Gives: OUT/results.csv and a table on the terminal: MASE (of the median) and
       CRPS as the mean weighted quantile loss at 0.1, ..., 0.9 for each data
       set and model, seasonal naive beside them.

Quantiles that a model does not say are split-conformal, calibrated on rows
before the first window. Whether a model was trained on a data set is not
known here: say so where you show the numbers.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa

from experiments import flags, launch
from ltsm_jax import Forecaster, storage
from ltsm_jax.data import Panel, load_series, read_panel
from ltsm_jax.data.benchmarks import BENCHMARKS
from ltsm_jax.frequency import Grid, canonical_freq, count_unit, season_of
from ltsm_jax.report import markdown_table
from ltsm_jax.tasks.panels import Origins

LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))
TERMS = {"short": 1, "medium": 10, "long": 15}
HORIZONS = {"s": 60, "min": 48, "h": 48, "D": 30, "B": 30, "W": 8, "M": 12, "Q": 8, "Y": 6}
WITHOUT_SEASON = ("D", "W")  # there, as in gluonts; elsewhere a season is what it is for us
SHARE, MOST = 0.1, 20  # of the shortest series that windows fill; windows
NAIVE = "seasonal_naive"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    program: ClassVar[str] = "experiments.gift_eval"
    data: Annotated[tuple[str, ...], flags.words()]
    """folders of GIFT-Eval, benchmark names or tables"""
    models: Annotated[tuple[str, ...], flags.words()] = ("timer-tiny",)
    """shipped names, model folders, what `ltsm fit` wrote, or hub names"""
    term: Annotated[str, flags.one_of(tuple(TERMS))] = "short"
    """how far ahead: a horizon of the step, 10 times, or 15 times"""
    horizon: Annotated[int | None, flags.whole(1, unset="of the step")] = None
    """steps ahead, in place of what the step and the term say"""
    seed: Annotated[int, flags.whole(0)] = 0
    """of the draws of models that sample"""
    out: Annotated[Path, flags.path("FOLDER")] = Path("runs/gift")
    """folder of the results"""
    accept_license: bool = False
    """accept a licence that forbids commercial use"""


# --- data and windows


def read(data: str) -> Panel:
    """Read a data set: of GIFT-Eval, of a name, or a table."""
    if data in BENCHMARKS:
        return Panel.of(load_series(data))
    files = sorted(Path(data).glob("*.arrow")) if Path(data).is_dir() else []
    return read_arrow(files, data) if files else read_panel(data)


def read_arrow(files: Sequence[Path], name: str) -> Panel:
    """Read GIFT-Eval's own files: a row per item, with its start, step and target [T] or [C, T].

    Raises: ValueError for other columns, and for several steps.
    """
    tables = []
    for file in files:
        with pa.memory_map(str(file)) as source:
            tables.append(pa.ipc.open_stream(source).read_all())
    table = pa.concat_tables(tables)
    if missing := {"item_id", "start", "freq", "target"} - set(table.column_names):
        raise ValueError(f"{name}: no column {', '.join(sorted(missing))}; not of GIFT-Eval")
    steps = set(table["freq"].to_pylist())
    if len(steps) > 1:
        raise ValueError(f"{name}: several steps, {', '.join(sorted(steps))}")
    freq = canonical_freq(steps.pop())
    parts = []
    for row in table.select(["item_id", "start", "target"]).to_pylist():
        values = np.atleast_2d(np.asarray(row["target"], float))
        grid = Grid.through(np.array([row["start"]], "datetime64[us]"), freq)
        stamps = grid.stamps(np.arange(values.shape[1]))
        columns = {f"target_{c}": variate for c, variate in enumerate(values)}
        parts.append(pd.DataFrame({"item_id": str(row["item_id"]), "stamp": stamps, **columns}))
    whole = pd.concat(parts, ignore_index=True)
    targets = [column for column in whole.columns if column.startswith("target_")]
    return read_panel(whole, id="item_id", time="stamp", target=targets, freq=freq, name=name)


def horizon_of(freq: str | None, term: str) -> int:
    """Give the steps ahead that GIFT-Eval forecasts at a step.

    Raises: ValueError for a step that is not known, or has none.
    """
    unit = count_unit(freq)[1] if freq else None
    if unit not in HORIZONS:
        raise ValueError(f"no horizon belongs to the step {freq}: give --horizon")
    return HORIZONS[unit] * TERMS[term]


def gift_season(freq: str | None) -> int:
    """Give the rows of a season as GIFT-Eval counts them: of days and weeks it knows none."""
    if freq is None or count_unit(freq)[1] in WITHOUT_SEASON:
        return 1
    return season_of(freq)


def windows_of(panel: Panel, horizon: int) -> Origins:
    """Give the windows at the end of each item, the oldest first.

    Raises: ValueError for items that hold no window and a row before it.
    """
    shortest = int(panel.lengths.min())
    count = min(max(1, math.ceil(SHARE * shortest / horizon)), MOST)
    if shortest <= count * horizon:
        raise ValueError(
            f"{panel.name}: the shortest item has {shortest} rows, {count} windows of {horizon} "
            "and a row before them do not fit; give a shorter --horizon"
        )
    back = horizon * np.arange(count, 0, -1)
    items = np.repeat(np.arange(panel.n_items), count)
    return Origins(items, (panel.bounds[1:, None] - back).ravel())


# --- scores


def seasonal_error(past: np.ndarray, season: int) -> float:
    """Mean absolute difference of rows [T] one season apart; of neighbours in a shorter past."""
    lag = season if season < len(past) else 1
    return float(np.nanmean(np.abs(past[lag:] - past[:-lag]))) if len(past) > lag else math.nan


def scores(
    true: np.ndarray, quantiles: np.ndarray, levels: Sequence[float], errors: np.ndarray
) -> dict[str, float]:
    """Score forecasts [M, H, W] at `levels` of values [M, H] (NaN = missing).

    errors: [M] seasonal errors; windows without one (a past that does not move) have no MASE.
    Returns: MASE, the mean over windows of the median's absolute error over the seasonal error; and
      CRPS as the mean over levels of 2 * (pinball loss of all values) / (sum of all |values|).
    """
    seen = ~np.isnan(true)
    distance = np.where(seen, np.abs(true - quantiles[..., list(levels).index(0.5)]), 0.0)
    each = distance.sum(1) / np.maximum(seen.sum(1), 1)
    able = seen.any(1) & (errors > 0)
    mase = float((each[able] / errors[able]).mean()) if able.any() else math.nan
    gap = np.where(seen[..., None], true[..., None] - quantiles, 0.0)
    level = np.asarray(levels)
    pinball = np.maximum(level * gap, (level - 1) * gap).sum((0, 1))
    return {"mase": mase, "crps": float((2 * pinball / np.nansum(np.abs(true))).mean())}


def evaluate(forecaster: Forecaster, panel: Panel, horizon: int, seed: int = 0) -> dict[str, Any]:
    """Forecast every window of a panel, and score it."""
    origins = windows_of(panel, horizon)
    way = forecaster.way(panel.n_variates, panel.model_freq or panel.freq, panel.season)
    _, unsaid = way.split(panel, horizon, LEVELS)
    if unsaid:
        first = origins.ends.reshape(panel.n_items, -1)[:, 0]
        forecaster = forecaster.calibrated(panel.until(first), horizon)
    found = forecaster.after(panel, origins, horizon, levels=LEVELS, seed=seed)
    rows = origins.ends[:, None] + np.arange(horizon)
    true = panel.values[:, rows].swapaxes(0, 1)  # [M, C, H]
    season = gift_season(panel.freq)
    starts = panel.bounds[origins.items]
    errors = np.empty(true.shape[:2])
    for m, (start, end) in enumerate(zip(starts, origins.ends, strict=True)):
        for c in range(panel.n_variates):
            errors[m, c] = seasonal_error(panel.values[c, start:end], season)
    flat = true.reshape(-1, horizon)
    return {
        "horizon": horizon,
        "windows": len(origins.items) // panel.n_items,
        "series": panel.n_items * panel.n_variates,
        **scores(
            flat, found.quantiles.reshape(len(flat), horizon, -1), LEVELS, errors=errors.ravel()
        ),
    }


# --- the command


def run(options: Options) -> pd.DataFrame:
    """Evaluate every model on every data set: a row for each."""
    forecasters = {}
    for name in options.models:
        forecasters[name] = Forecaster.load(name, accept_license=options.accept_license)
    forecasters[NAIVE] = dataclasses.replace(forecasters[options.models[0]], baseline=NAIVE)
    rows = []
    for data in options.data:
        panel = read(data)
        horizon = options.horizon or horizon_of(panel.freq, options.term)
        for name, forecaster in forecasters.items():
            found = evaluate(forecaster, panel, horizon, seed=options.seed)
            rows.append({"data": panel.name, "model": name, "term": options.term, **found})
            launch.say(f"{panel.name}, {name}: MASE {found['mase']:.4f}, CRPS {found['crps']:.4f}")
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.gift_eval`; returns the exit code."""
    return launch.guarded(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    options = flags.parse(Options, argv, __doc__)
    results = run(options)
    out = storage.user_path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results.to_csv(out / "results.csv", index=False)
    cells = []
    for row in results.to_dict("records"):
        cells.append([row["data"], row["model"], f"{row['mase']:.4f}", f"{row['crps']:.4f}"])
    launch.say(markdown_table(["data", "model", "MASE", "CRPS"], cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
