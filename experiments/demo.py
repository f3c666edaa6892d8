"""The method in one command, on ETTh1.

Zero-shot, from scratch, full fine-tuning and smoothed full fine-tuning.

Run:   make demo
       python -m experiments.demo --out runs/demo
Cost:  about two minutes on 2 CPU cores: the shipped timer-tiny, a tenth of
       the training windows, 4 epochs, one seed.
Gives: a table, and the path of a picture. `experiments.sff` is the same
       comparison at full length, with seeds; its other options work here too.
Data:  ETTh1 from $LTSM_DATA, the cache or its public address; without any of
       them a generated series, and it says so.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd

from experiments import flags, launch, report, sff
from ltsm_jax.data.benchmarks import load_series

METHODS = "zero_shot,tfs,ff,sff"
BUDGET = [
    "--alpha",
    "0.7",
    "--seeds",
    "0",
    "--few-shot",
    "0.1",
    "--epochs",
    "4",
    "--batch-size",
    "256",
]


def generated(folder: Path) -> Path:
    """A CSV of two years of three hourly series with day, week, trend and noise, for machines
    without network.
    """
    rng, t = np.random.default_rng(0), np.arange(2 * 365 * 24)
    columns = {}
    for name, phase, noise in (("north", 0, 0.4), ("south", 5, 0.6), ("east", 11, 0.8)):
        day, week = np.sin(2 * np.pi * (t + phase) / 24), np.sin(2 * np.pi * t / 168 + phase)
        drift = np.cumsum(rng.normal(scale=0.02, size=t.size))
        columns[name] = (
            10 + (2 + week) * day + 0.5 * np.abs(day) + drift + rng.normal(scale=noise, size=t.size)
        )
    stamps = pd.date_range("2023-01-01", periods=t.size, freq="h")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "generated.csv"
    pd.DataFrame({"date": stamps, **columns}).to_csv(file, index=False, float_format="%.6f")
    return file


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the demo itself."""

    program: ClassVar[str] = "experiments.demo"
    out: Annotated[Path, flags.path()] = Path("runs/demo")
    """folder of the results"""
    model: Annotated[str, flags.text("MODEL")] = "timer-tiny"
    """shipped name, model folder, original checkpoint or hub name"""
    plan: bool = False
    """print what would run, and stop"""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.demo`; returns the exit code."""
    return launch.guarded(lambda: _demo(sys.argv[1:] if argv is None else argv))


def _demo(argv: Sequence[str]) -> int:
    options, more = flags.parse_some(Options, argv, __doc__)
    data = "ETTh1"
    try:
        load_series(data)
    except (OSError, ValueError) as err:
        data = str(generated(options.out))
        bar = "!" * 79
        print(
            f"{bar}\nNO REAL DATA: ETTh1 is not available.\n{err}\nGoing on with a GENERATED "
            f"series, {data}: "
            f"its numbers say nothing about real data.\n{bar}"
        )
    out = options.out / Path(data).stem
    words = [
        "--data",
        data,
        "--model",
        options.model,
        "--methods",
        METHODS,
        *BUDGET,
        "--out",
        str(out),
    ]
    code = sff.main([*words, *more, *(["--plan"] if options.plan else [])])
    picture = out / "plots" / "forecasts.png"
    if code == 0 and not options.plan:
        found = importlib.util.find_spec("matplotlib")
        print("no picture: " + report.NO_PICTURES if found is None else f"picture: {picture}")
    return code


if __name__ == "__main__":
    launch.leave(main())
