"""How long does reading a panel of many items take, and how much memory?

A long parquet table of `--items` items with `--rows` rows each (id, time, target, and by
`--price` a covariate) is written to a temporary folder and read by `read_panel` in a
process of its own.

Run:   python -m experiments.benchmarks.panel
Needs: nothing; about 2 GB of disk for the default sizes.
Cost:  about two minutes on 2 CPU cores.
Gives: seconds of reading, and the peak of resident memory of that process, with what
       its imports alone take.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from experiments import flags, launch

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
    read: Annotated[str | None, flags.text("PATH")] = None
    """read this table instead of writing one, in this process"""


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


def read(path: str) -> dict[str, float]:
    """Seconds of reading, and gigabytes of memory before it and at its peak."""
    from ltsm_jax.data.panel_tables import read_panel

    before = peak()
    started = time.perf_counter()
    panel = read_panel(path, id="item_id", target="target")
    seconds = time.perf_counter() - started
    for note in panel.notes:
        print(note, file=sys.stderr)
    return {
        "items": panel.n_items,
        "rows": panel.n_rows,
        "seconds": seconds,
        "before": before,
        "peak": peak(),
    }


def peak() -> float:
    """Gigabytes of resident memory at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.read:
        print(json.dumps(read(args.read)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "panel.parquet"
        write(path, args)
        size = path.stat().st_size / 1e9
        command = [sys.executable, "-m", Options.program, "--read", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"read {found['items']:,} items, {found['rows']:,} rows ({size:.2f} GB of parquet) "
        f"in {found['seconds']:.1f} s; "
        f"peak RSS {found['peak']:.2f} GB, {found['before']:.2f} GB of it imports"
    )
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
