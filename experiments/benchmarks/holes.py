"""Does `ltsm_jax.impute` fill the holes of a table better than a straight line?

A user's case, with the truth at hand: the last rows of a data set become a
table, cells of it are taken out, and one call returns it without holes. What
it wrote there is compared with what was there, and so is linear interpolation
of each column. Holes are made as `experiments.imputation` makes them, window
of 192 rows by window.

Run:   LTSM_DATA=FOLDER python -m experiments.benchmarks.holes \\
           --data ETTh1,weather --out runs/holes.csv
Cost:  20 seconds on 2 CPU cores.
Gives: a line for each data set, kind of holes and rate, seeds pooled: mean
       squared errors on the hidden cells, in units of the variance of each
       column, and what filled how many columns (a column is filled by the
       straight line where no other is clearly better on known cells).
       With --out, a row of a CSV file for each seed.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import pandas as pd

import ltsm_jax
from experiments import flags
from ltsm_jax import storage
from ltsm_jax.data import load_series
from ltsm_jax.imputation import FILLS
from ltsm_jax.tasks.imputation import HOLES, Holes, hole_mask

WINDOW, PATCH = 192, 24


def with_holes(truth: pd.DataFrame, holes: Holes, rate: float, seed: int) -> pd.DataFrame:
    """Take cells out of a table whose rows are whole windows."""
    n_windows, n_columns = len(truth) // WINDOW, truth.shape[1]
    keys = jax.random.split(jax.random.key(seed), n_windows)
    masks = jax.vmap(
        lambda key: hole_mask(key, WINDOW, n_columns, patch_len=PATCH, rate=rate, holes=holes)
    )(keys)
    visible = np.asarray(masks).transpose(0, 2, 1).reshape(len(truth), n_columns)
    return truth.where(visible)


def straight(table: pd.DataFrame) -> pd.DataFrame:
    """Interpolate each column linearly, constant beyond its ends."""
    return table.interpolate(method="linear", limit_direction="both")


def errors(truth: pd.DataFrame, holed: pd.DataFrame, filled: pd.DataFrame) -> tuple[float, int]:
    """Give the sum of squared errors on the hidden cells, in units of each column's variance, and
    their number.
    """
    hidden = holed.isna().to_numpy() & truth.notna().to_numpy()
    deviation = truth.std(ddof=0).to_numpy()
    scaled = (filled.to_numpy() - truth.to_numpy()) / np.where(deviation > 0, deviation, 1.0)
    return float(np.square(scaled[hidden]).sum()), int(hidden.sum())


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.holes"
    data: Annotated[tuple[str, ...], flags.words()] = ("ETTh1", "weather")
    """benchmark names"""
    model: Annotated[str, flags.text("NAME")] = "timer-tiny-imputation"
    """a shipped model or model folder that imputes"""
    rows: Annotated[int, flags.whole(WINDOW)] = 15 * WINDOW
    """rows at the end of each data set, cut to whole windows"""
    holes: Annotated[tuple[Any, ...], flags.names(HOLES)] = HOLES
    """kinds of holes"""
    rates: Annotated[
        tuple[float, ...], flags.numbers(flags.TINY, flags.BELOW_1, says="above 0 and below 1")
    ] = (0.125, 0.5)
    """shares hidden of what follows the first patch of each window"""
    seeds: Annotated[
        tuple[int, ...], flags.wholes(0, 2**32 - 1, says="between 0 and 2**32 - 1")
    ] = (0, 1, 2)
    """of the holes"""
    out: Annotated[Path | None, flags.path()] = None
    """CSV file of the rows"""


def measure(args: Options) -> pd.DataFrame:
    """Fill every table; a row for each."""
    model, params = ltsm_jax.load(args.model)
    found = []
    for data in args.data:
        series = load_series(data)
        n_rows = min(args.rows, series.n_rows) // WINDOW * WINDOW
        truth = pd.DataFrame(
            np.asarray(series.values[:, -n_rows:]).T.astype(float), columns=list(series.columns)
        )
        for holes in args.holes:
            for rate in args.rates:
                for seed in args.seeds:
                    holed = with_holes(truth, holes, rate, seed=seed)
                    imputed = ltsm_jax.impute(model, params, holed, show_progress=False)
                    ours, cells = errors(truth, holed, imputed.table.loc[:, list(truth.columns)])
                    line, _ = errors(truth, holed, straight(holed))
                    filled_by = imputed.check.filled_by.value_counts()
                    row = {
                        "data": data,
                        "model": args.model,
                        "holes": holes,
                        "rate": rate,
                        "seed": seed,
                        "rows": n_rows,
                        "cells": cells,
                        "mse": ours / cells,
                        "linear_mse": line / cells,
                    }
                    columns = {f"columns_{fill}": int(filled_by.get(fill, 0)) for fill in FILLS}
                    found.append(row | columns)
                told(pd.DataFrame(found[-len(args.seeds) :]))
    return pd.DataFrame(found)


def told(rows: pd.DataFrame) -> None:
    """Print the line of one data set, kind and rate."""
    first, cells = rows.iloc[0], rows.cells.sum()
    ours, line = ((rows[name] * rows.cells).sum() / cells for name in ("mse", "linear_mse"))
    by = ", ".join(f"{fill} {rows[f'columns_{fill}'].sum()}" for fill in FILLS)
    print(
        f"{first.data:10s} {first.holes:8s} {first.rate:5.3g}: impute {ours:.4f}, straight line "
        f"{line:.4f} ({ours / line - 1:+.1%}); columns by {by}",
        flush=True,
    )


def main() -> None:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    rows = measure(args)
    if args.out is not None:
        out = storage.user_path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = f"LTSM_DATA=FOLDER python -m {args.program} {shlex.join(sys.argv[1:])}"
        rows.assign(command=command).to_csv(out, index=False)


if __name__ == "__main__":
    main()
