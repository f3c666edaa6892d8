"""Does every family go the whole way?  Each one at its small random size: saved, loaded, tuned by every method, scored.

Run:    python -m experiments.all_families [--data ETTh1] [--families timer,ttm] [--out runs/all-families]
Cost:   about a CPU-minute a family, most of it compiling; the first rows of the data, one epoch, one seed.
Gives:  a table on the terminal and in OUT/results.csv: a row per family and method. The weights are random, so the
        errors say nothing about the models: the run shows that no family needs a special case. A folder per family
        holds the model (OUT/<family>/model) and the comparison as `experiments.sff` writes it.
"""

import argparse
import difflib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments import demo, sff
from ltsm_jax.data import Series
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.methods.strategies import STRATEGIES
from ltsm_jax.models import FAMILIES, folders

WINDOWS = 40  # of training, for each variate
VARIATES = 2


def part_of(series: Series, context: int, horizon: int, file: Path) -> Path:
    """The first rows of two variates as a CSV: enough for WINDOWS training windows and one of the shortest part."""
    train = context + horizon + WINDOWS
    rows = max(-(-train * 10 // 7), 10 * (horizon + 1) + 10)
    if rows > series.n_rows:
        raise ValueError(f"{series.name} has {series.n_rows} rows, {rows} are needed")
    table = pd.DataFrame({name: series.values[i, :rows] for i, name in enumerate(series.columns[:VARIATES])})
    if series.timestamps is not None:
        table.insert(0, "date", series.timestamps[:rows])
    table.to_csv(file, index=False)
    return file


def run(family: str, series: Series, out: Path, methods: str, more: Sequence[str] = ()) -> pd.DataFrame:
    """One family through every method: the rows of its results.csv, and the seconds it took.

    more: further flags of `experiments.sff`, such as --mesh.
    Raises: RuntimeError when `experiments.sff` gives up.
    """
    began = time.monotonic()
    cls = FAMILIES[family]
    model = cls(cls.small())
    folders.save(out / "model", model, jax.jit(model.init)(jax.random.key(0)), provenance={"source": "random"})
    context, horizon = model.context_len, model.horizon
    data = part_of(series, context, horizon, out / "data.csv")
    flags = {"data": data, "model": out / "model", "methods": methods, "seeds": 0, "epochs": 1, "batch-size": 16,
             "context": context, "horizon": horizon, "out": out / "sff"}  # fmt: skip
    if sff.main([*(text for name, value in flags.items() for text in (f"--{name}", str(value))), *more]):
        raise RuntimeError(f"{family}: experiments.sff failed (above)")
    found = pd.read_csv(out / "sff" / "results.csv")
    found.insert(0, "family", family)
    found["family_seconds"] = round(time.monotonic() - began, 1)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.all_families`; returns the exit code: 0 where every family came through."""
    parser = argparse.ArgumentParser("python -m experiments.all_families", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data", default="ETTh1", help="as for experiments.sff [ETTh1]")
    parser.add_argument("--families", default=",".join(FAMILIES), help="[all]")
    parser.add_argument("--methods", default=",".join(STRATEGIES), help="[all]")
    parser.add_argument("--out", type=Path, default=Path("runs/all-families"), help="made anew [runs/all-families]")
    args, more = parser.parse_known_args(argv)  # the rest, such as --mesh, is for experiments.sff
    names = args.families.split(",")
    if unknown := [n for n in names if n not in FAMILIES]:
        near = [m for n in unknown for m in difflib.get_close_matches(n, FAMILIES, 1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        print(f"unknown families {', '.join(unknown)}{hint}; known: {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    try:
        series = load_series(args.data)
    except (OSError, ValueError) as err:
        print(f"{err}\nGoing on with a GENERATED series.", file=sys.stderr)
        series = load_series(str(demo.generated(args.out)))
    found, failed = [], {}
    for name in names:
        (args.out / name).mkdir()
        try:
            found.append(run(name, series, args.out / name, args.methods, more))
        except (ValueError, RuntimeError) as err:
            failed[name] = str(err)
        # nothing that was compiled serves the next family, and it adds up to the memory maps a process may have
        jax.clear_caches()
    table = Table(title=f"{series.name}, small random models, one epoch", title_justify="left")
    for column in ("family", "method", "val MSE", "test MSE", "seconds of the family"):
        table.add_column(column)
    if found:
        rows = pd.concat(found)
        rows.to_csv(args.out / "results.csv", index=False)
        for row in rows.to_dict("records"):
            table.add_row(row["family"], row["method"], f"{row['val_mse']:.4f}", f"{row['test_mse']:.4f}",
                          f"{row['family_seconds']:.0f}")  # fmt: skip
    Console(width=100).print(table)
    for name, problem in failed.items():
        print(f"FAILED {name}: {problem}", file=sys.stderr)
    print(f"{len(names) - len(failed)} of {len(names)} families went through {args.methods.count(',') + 1} methods")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
