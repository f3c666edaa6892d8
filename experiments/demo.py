"""The method in one command: zero-shot, from scratch, full fine-tuning and smoothed full fine-tuning on ETTh1.

Run:    make demo        (python -m experiments.demo [--out runs/demo])
Cost:   about two minutes on 2 CPU cores: the shipped timer-tiny, a tenth of the training windows, 4 epochs, one seed.
Gives:  a table, and the path of a picture. `experiments.sff` is the same comparison at full length, with seeds.
Data:   ETTh1 from $LTSM_DATA, the cache or its public address; without any of them a generated series, and it says so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments import report, sff
from ltsm_jax.data.benchmarks import load_series

METHODS = "zero_shot,tfs,ff,sff"
BUDGET = ["--alpha", "0.7", "--seeds", "0", "--few-shot", "0.1", "--epochs", "4", "--batch-size", "256"]


def generated(folder: Path) -> Path:
    """A CSV of two years of three hourly series with day, week, trend and noise, for machines without network."""
    rng, t = np.random.default_rng(0), np.arange(2 * 365 * 24)
    columns = {}
    for name, phase, noise in (("north", 0, 0.4), ("south", 5, 0.6), ("east", 11, 0.8)):
        day, week = np.sin(2 * np.pi * (t + phase) / 24), np.sin(2 * np.pi * t / 168 + phase)
        drift = np.cumsum(rng.normal(scale=0.02, size=t.size))
        columns[name] = 10 + (2 + week) * day + 0.5 * np.abs(day) + drift + rng.normal(scale=noise, size=t.size)
    stamps = pd.date_range("2023-01-01", periods=t.size, freq="h")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "generated.csv"
    pd.DataFrame({"date": stamps, **columns}).to_csv(file, index=False, float_format="%.6f")
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.demo`; returns the exit code."""
    parser = argparse.ArgumentParser("python -m experiments.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results [runs/demo]")
    parser.add_argument("--model", default="timer-tiny", help="as for experiments.sff [timer-tiny], as further flags")
    args, more = parser.parse_known_args(argv)
    data = "ETTh1"
    try:
        load_series(data)
    except (OSError, ValueError) as err:
        data = str(generated(args.out))
        bar = "!" * 100
        print(f"{bar}\nNO REAL DATA: ETTh1 could not be had.\n{err}\nGoing on with a GENERATED series, {data}: "
              f"its numbers say nothing about real data.\n{bar}")  # fmt: skip
    out = args.out / Path(data).stem
    code = sff.main(["--data", data, "--model", args.model, "--methods", METHODS, *BUDGET, "--out", str(out), *more])
    if code == 0:
        picture = out / "plots" / "forecasts.png"
        print(f"picture: {picture}" if picture.is_file() else "no picture: " + report.NO_PICTURES)
    return code


if __name__ == "__main__":
    sys.exit(main())
