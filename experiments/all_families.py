"""Does every family go the whole way?

Each one at its small random size: saved, loaded, tuned by every method,
scored.

Run:   python -m experiments.all_families
       python -m experiments.all_families --data ETTh1 --families timer,ttm
Cost:  about a CPU-minute a family, most of it compiling; the first rows of the
       data, one epoch, one seed.
Gives: a table on the terminal and in OUT/results.csv: a row per family and
       method. The weights are random, so the errors say nothing about the
       models: the run shows that no family needs a special case. A folder per
       family holds the model (OUT/<family>/model) and the comparison as
       `experiments.sff` writes it; its other options, such as --mesh, work
       here too.
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments import demo, flags, folder, launch, sff
from ltsm_jax.data import Series
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.methods.strategies import STRATEGIES, TOOLBOX, VARIANTS
from ltsm_jax.models import FAMILIES, folders

MARK = "all-families.json"  # what tells the folder of a run from any other
METHODS = tuple(name for name in STRATEGIES if name not in (*VARIANTS, *TOOLBOX))
WINDOWS = 40  # of training, for each variate
VARIATES = 2


def part_of(series: Series, context: int, horizon: int, file: Path) -> Path:
    """The first rows of two variates as a CSV: enough for WINDOWS training windows and one of the
    shortest part.
    """
    train = context + horizon + WINDOWS
    rows = max(-(-train * 10 // 7), 10 * (horizon + 1) + 10)
    if rows > series.n_rows:
        raise ValueError(f"{series.name} has {series.n_rows} rows, {rows} are needed")
    table = pd.DataFrame(
        {name: series.values[i, :rows] for i, name in enumerate(series.columns[:VARIATES])}
    )
    if series.timestamps is not None:
        table.insert(0, "date", series.timestamps[:rows])
    table.to_csv(file, index=False)
    return file


def run(
    family: str, series: Series, out: Path, methods: str, more: Sequence[str] = ()
) -> pd.DataFrame:
    """One family through every method: the rows of its results.csv, and the seconds it took.

    more: further flags of `experiments.sff`, such as --mesh.
    Raises: RuntimeError when `experiments.sff` gives up.
    """
    began = time.monotonic()
    cls = FAMILIES[family]
    model = cls(cls.small())
    folders.save(
        out / "model",
        model,
        jax.jit(model.init)(jax.random.key(0)),
        provenance={"source": "random"},
    )
    context, horizon = model.context_len, model.horizon
    data = part_of(series, context, horizon, file=out / "data.csv")
    flags = {
        "data": data,
        "model": out / "model",
        "methods": methods,
        "seeds": 0,
        "epochs": 1,
        "batch-size": 16,
        "context": context,
        "horizon": horizon,
        "out": out / "sff",
    }
    arguments = []
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    if sff.main([*arguments, *more]):
        raise RuntimeError(f"{family}: experiments.sff failed (above)")
    found = pd.read_csv(out / "sff" / "results.csv")
    found.insert(0, "family", family)
    found["family_seconds"] = round(time.monotonic() - began, 1)
    return found


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the run itself; all others are those of `experiments.sff`."""

    program: ClassVar[str] = "experiments.all_families"
    data: Annotated[str, flags.text("DATA")] = "ETTh1"
    """benchmark name or file"""
    families: Annotated[tuple[str, ...], flags.names(tuple(FAMILIES), unset="all")] = ()
    """which families"""
    methods: Annotated[
        tuple[str, ...], flags.names(tuple(STRATEGIES), unset="all but the variants of sff and ff")
    ] = ()
    """which methods"""
    out: Annotated[Path, flags.path()] = Path("runs/all-families")
    """folder of the results, made anew"""


def make_anew(out: Path) -> None:
    """Make an empty folder; one that an earlier run made is replaced.

    Raises: UsageError where it is the folder of something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise flags.UsageError(
            f"{out} holds something else; it would be replaced. Take another --out"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    folder.write_json(out / MARK, {"program": Options.program})


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.all_families`; returns the exit code: 0 where every family came
    through.
    """
    return launch.guarded(lambda: _all(sys.argv[1:] if argv is None else argv))


def _all(argv: Sequence[str]) -> int:
    options, more = flags.parse_some(Options, argv, __doc__)
    families, methods = options.families or tuple(FAMILIES), options.methods or METHODS
    make_anew(options.out)
    try:
        series = load_series(options.data)
    except (OSError, ValueError) as err:
        print(f"{err}\nGoing on with a GENERATED series.", file=sys.stderr)
        series = load_series(str(demo.generated(options.out)))
    found, failed = [], {}
    for name in families:
        (options.out / name).mkdir()
        try:
            found.append(
                run(name, series, options.out / name, methods=",".join(methods), more=more)
            )
        except (ValueError, RuntimeError) as err:
            failed[name] = str(err)
        # nothing that was compiled serves the next family, and it adds up to the memory maps a
        # process may have
        jax.clear_caches()
    table = Table(title=f"{series.name}, small random models, one epoch", title_justify="left")
    for column in ("family", "method", "val MSE", "test MSE", "seconds of the family"):
        table.add_column(column)
    if found:
        rows = pd.concat(found)
        rows.to_csv(options.out / "results.csv", index=False)
        for row in rows.to_dict("records"):
            table.add_row(
                row["family"],
                row["method"],
                f"{row['val_mse']:.4f}",
                f"{row['test_mse']:.4f}",
                f"{row['family_seconds']:.0f}",
            )
    Console().print(table)
    for name, problem in failed.items():
        print(f"FAILED {name}: {problem}", file=sys.stderr)
    print(
        f"{len(families) - len(failed)} of {len(families)} families went through {len(methods)} "
        "methods"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    launch.leave(main())
