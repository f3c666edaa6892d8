"""A panel of many items: seconds and memory of reading, tuning, forecasting.

A long parquet table (id, time, target, and by --price a covariate) is
written to a temporary folder. A process of its own reads it, tunes
timer-tiny on it with a verdict, and forecasts every item 24 rows ahead.

Run:   python -m experiments.benchmarks.panel --items 10000
       python -m experiments.benchmarks.panel
Cost:  2 GB of disk and about six minutes on 2 CPU cores for the 100,000
       items of the second command.
Gives: seconds of each step, and the peak of resident memory up to its end,
       of which the imports are said apart.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet

import ltsm_jax
from experiments import flags, launch
from experiments.benchmarks.machine import processor
from ltsm_jax.data.panel_tables import read_panel

HORIZON = 24
GROUP = 2000  # items written at a time


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.panel"
    items: Annotated[int, flags.whole(1)] = 100_000
    """items of the table"""
    rows: Annotated[int, flags.whole(2)] = 500
    """rows of each item"""
    ids: Annotated[str, flags.one_of(("whole", "text"))] = "text"
    """ids: whole numbers, or short text"""
    price: bool = False
    """with a covariate that is known ahead for 28 rows behind the last target"""
    by_time: bool = False
    """rows ordered by time, not by item"""
    budget: Annotated[int, flags.whole(0)] = 50
    """steps of the tuning; 0: none"""
    read: Annotated[str | None, flags.text("PATH")] = None
    """measure with this table, in this process; set by the measurement itself"""


def write(path: Path, args: Options) -> None:
    """Write the table in groups of rows, so that it never lies in memory as a whole."""
    rng = np.random.default_rng(0)
    schema = None
    writer = None
    for block in blocks(args):
        table = pa.table(part(args, rng, *block))
        if writer is None:
            schema = table.schema
            writer = parquet.ParquetWriter(path, schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def blocks(args: Options) -> list[tuple[np.ndarray, np.ndarray]]:
    """(items, rows of each) of the groups that are written one after the other."""
    found = []
    if args.by_time:
        every = np.arange(args.items)
        step = max(GROUP * args.rows // args.items, 1)
        for start in range(0, args.rows, step):
            found.append((every, np.arange(start, min(start + step, args.rows))))
    else:
        every = np.arange(args.rows)
        for start in range(0, args.items, GROUP):
            found.append((np.arange(start, min(start + GROUP, args.items)), every))
    return found


def part(args: Options, rng: np.random.Generator, items: np.ndarray, rows: np.ndarray) -> dict:
    """Columns of some items and rows, in the order that is asked for."""
    if args.by_time:
        row, item = (grid.ravel() for grid in np.meshgrid(rows, items, indexing="ij"))
    else:
        item, row = (grid.ravel() for grid in np.meshgrid(items, rows, indexing="ij"))
    value = rng.normal(size=len(item))
    columns: dict = {"item_id": item}
    if args.ids == "text":
        columns["item_id"] = np.char.add("item_", item.astype(str))
    columns["timestamp"] = np.datetime64("2022-01-01", "us") + row * np.timedelta64(1, "D")
    columns["target"] = value
    if args.price:
        columns["target"] = np.where(row < args.rows - 28, value, np.nan)
        columns["price"] = np.round(10 + rng.normal(size=len(item)), 2)
    return columns


def measure(path: str, args: Options) -> list[dict[str, Any]]:
    """Each step with its seconds, and the gigabytes of memory at its end; in this process."""
    found: list[dict[str, Any]] = [{"step": "imports", "seconds": 0.0, "peak": peak()}]

    def timed(step: str, started: float) -> None:
        found.append({"step": step, "seconds": time.perf_counter() - started, "peak": peak()})

    started = time.perf_counter()
    panel = read_panel(path, id="item_id", target="target")
    timed(f"read {panel.n_items:,} items, {panel.n_rows:,} rows", started)

    forecaster = ltsm_jax.Forecaster.load("timer-tiny")
    if args.budget:
        started = time.perf_counter()
        fitted = forecaster.fit(
            panel, HORIZON, methods=["ff"], budget=args.budget, show_progress=False
        )
        timed(f"tuned, {args.budget} steps, and scored", started)
        print(fitted, file=sys.stderr)

    started = time.perf_counter()
    table = forecaster.predict(panel, HORIZON)
    timed(f"forecast {len(table):,} rows with intervals", started)
    return found


def peak() -> float:
    """Gigabytes of resident memory at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.read:
        print(json.dumps(measure(args.read, args)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "panel.parquet"
        write(path, args)
        print(f"{processor()}; {path.stat().st_size / 1e9:.2f} GB of parquet", flush=True)
        command = [
            sys.executable,
            "-m",
            Options.program,
            "--read",
            str(path),
            "--budget",
            str(args.budget),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for row in json.loads(done.stdout.splitlines()[-1]):
        print(f"{row['step']:45s} {row['seconds']:7.1f} s   peak RSS {row['peak']:5.2f} GB")
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
