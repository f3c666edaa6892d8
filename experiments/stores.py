"""Write the table of the README's example: sales of 20 stores, with a price.

Stores begin and end on days of their own, a few days and cells are missing,
the price is known four weeks ahead, and the size of a store never changes.

Run:   python -m experiments.stores --seed 0
Cost:  a second.
Gives: stores.csv (store, day, sold, price, size) and ahead.csv (store, day,
       price of the 28 days to come) in the folder of --out.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd

from experiments import flags, launch

AHEAD = 28  # days
STORES = 20
SHORTEST, LONGEST = 300, 900  # days of history


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    program: ClassVar[str] = "experiments.stores"
    out: Annotated[Path, flags.path()] = Path(".")
    """folder of the two files"""
    seed: Annotated[int, flags.whole(0)] = 0
    """of the generated numbers"""


def tables(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The history of every store, and the prices of the days after it."""
    rng = np.random.default_rng(seed)
    past, ahead = [], []
    for number in range(STORES):
        days = int(rng.integers(SHORTEST, LONGEST))
        first = pd.Timestamp("2022-01-01") + pd.Timedelta(days=int(rng.integers(0, 200)))
        t = np.arange(days + AHEAD)
        price = 10 - 2.0 * (rng.random(t.size) < 0.2) + rng.normal(scale=0.1, size=t.size)
        week = 10 * np.sin(2 * np.pi * t / 7)
        sold = 50 + 5 * number + week - 4 * (price - 10) + rng.normal(scale=2, size=t.size)
        sold[rng.random(t.size) < 0.01] = np.nan
        sold[days - 1] = 50 + 5 * number + week[days - 1]
        whole = pd.DataFrame(
            {
                "store": f"store_{number:02d}",
                "day": first + pd.to_timedelta(t, unit="D"),
                "sold": sold.round(2),
                "price": price.round(2),
                "size": ["small", "medium", "large"][number % 3],
            }
        )
        # Days on which nobody wrote anything down, but not the last one.
        written = rng.random(days) >= 0.03
        written[-1] = True
        past.append(whole[:days][written])
        ahead.append(whole[days:][["store", "day", "price"]])
    return pd.concat(past, ignore_index=True), pd.concat(ahead, ignore_index=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.stores`; returns the exit code."""
    return launch.guarded(lambda: _write(sys.argv[1:] if argv is None else argv))


def _write(argv: Sequence[str]) -> int:
    options = flags.parse(Options, argv, __doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, table in zip(("stores.csv", "ahead.csv"), tables(options.seed), strict=True):
        file = options.out / name
        table.to_csv(file, index=False)
        print(f"{file}: {len(table)} rows")
    return 0


if __name__ == "__main__":
    launch.leave(main())
