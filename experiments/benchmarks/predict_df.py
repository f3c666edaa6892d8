"""How fast is `Forecaster.predict` beside chronos-forecasting's `predict_df`?

1,000 items of 512 rows, 24 rows ahead, three quantiles, by a Chronos-Bolt of
the size of chronos-bolt-tiny (8.7M random weights on both sides), float32,
CPU. Both start from the same pandas table and end with one.

Run:   python -m experiments.benchmarks.predict_df --torch-python PATH
Cost:  about a minute on 2 quiet CPU cores.
Needs: PATH, a Python with PyTorch and chronos-forecasting:
       python3.11 -m venv DIR
       DIR/bin/pip install torch==2.13.0 chronos-forecasting
       (a CPU build of torch will do)
Gives: seconds of a call on the wall and of the processor, the best and the
       median of the rounds, and their ratios. The rounds of the two sides
       alternate, each side in a process of its own that has two processors
       and two threads. The first call of each side (compilation, warming up)
       is told apart.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import pandas as pd

import ltsm_jax
from experiments import flags
from experiments.benchmarks.machine import processor
from experiments.benchmarks.torch_predict_df import (
    HORIZON,
    LEVELS,
    THREADS,
    serve,
    table,
    two_processors,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.predict_df"
    torch_python: Annotated[str | None, flags.text("PATH")] = None
    """a Python with PyTorch and chronos-forecasting; without one: ours alone"""
    rounds: Annotated[int, flags.whole(1)] = 5
    """timed calls of each side, alternating"""
    items: Annotated[int, flags.whole(1)] = 1000
    """items of the table"""
    rows: Annotated[int, flags.whole(1)] = 512
    """rows of each"""
    serve: bool = False
    """be our side of the measurement; set by the measurement itself"""


def ours(df: pd.DataFrame) -> Callable[[], pd.DataFrame]:
    """`Forecaster.predict` of a Chronos-Bolt with random weights."""
    model = ltsm_jax.preset("amazon/chronos-bolt-tiny")
    forecaster = ltsm_jax.Forecaster(model, jax.jit(model.init)(jax.random.key(0)))

    def predict():
        return forecaster.predict(
            df,
            HORIZON,
            id="item_id",
            time="timestamp",
            target="target",
            quantile_levels=LEVELS,
        )

    return predict


def main() -> None:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.serve:
        two_processors()
        serve(ours(table(args.items, args.rows)), args.items)
        return

    sizes = ["--items", str(args.items), "--rows", str(args.rows)]
    commands = {"ours": [sys.executable, "-m", Options.program, "--serve", *sizes]}
    if args.torch_python:
        peer = f"{Options.program.rpartition('.')[0]}.torch_predict_df"
        commands["theirs"] = [args.torch_python, "-m", peer, str(args.items), str(args.rows)]
    root = str(Path(__file__).parents[2])
    environment = dict(os.environ, PYTHONPATH=root, OMP_NUM_THREADS=str(THREADS))
    sides = {}
    for side, command in commands.items():
        sides[side] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )
    found = {side: [] for side in sides}
    for _ in range(args.rounds + 1):
        for side, process in sides.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"{side} failed")
            found[side].append(json.loads(answer))
    for process in sides.values():
        process.communicate()

    print(
        f"{processor()}; {THREADS} threads; {args.items} items x {args.rows} -> {HORIZON}, "
        f"{args.rounds} rounds"
    )
    print(f"{'':8s}{'first':>8s}{'wall best':>11s}{'median':>9s}{'cpu best':>10s}{'median':>9s}")
    kept = {}
    for side, rounds in found.items():
        first, rest = rounds[0], rounds[1:]
        wall = [seconds[0] for seconds in rest]
        cpu = [seconds[1] for seconds in rest]
        kept[side] = min(wall), statistics.median(wall), min(cpu), statistics.median(cpu)
        numbers = "{:11.3f}{:9.3f}{:10.3f}{:9.3f}".format(*kept[side])
        print(f"{side:8s}{first[0]:8.2f}{numbers}")
    if "theirs" in kept:
        ratios = [b / a for a, b in zip(kept["ours"], kept["theirs"], strict=True)]
        numbers = "{:11.2f}{:9.2f}{:10.2f}{:9.2f}".format(*ratios)
        print(f"{'times':8s}{'':8s}{numbers}")


if __name__ == "__main__":
    main()
