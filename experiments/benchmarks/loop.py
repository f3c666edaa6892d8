"""What do the training loop and the evaluation cost beyond the model itself?

timer-tiny, one process.

Run:   LTSM_DATA=FOLDER python -m experiments.benchmarks.loop
Cost:  about two minutes on 2 CPU cores.
Gives: overhead: share of an epoch's wall time at batch 256 that is not spent
       inside the compiled training steps, with checkpoints and metrics on
       (Python, records, dispatch); aim: under 2 %.
       evaluation: seconds for all test windows of ETTh1 (19,495 windows of
       672 -> 96), compilation left out; aim: under 15 s on 2 cores.
"""

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Annotated, ClassVar

import jax
import numpy as np

import ltsm_jax
from experiments import flags, launch
from experiments.benchmarks.rows import Benchmark, Measured
from ltsm_jax import training
from ltsm_jax.data import load_series, prepare
from ltsm_jax.tasks import forecasting
from ltsm_jax.training import loop, step


def overhead(model, params, windows, epochs: int) -> list[float]:
    """Share of each epoch after the first that is spent outside the compiled steps."""
    inside, marks = [0.0], []
    advance, end_epoch = step.advance, loop.Fitting.end_epoch

    def timed(*args, **kwargs):
        started = time.perf_counter()
        done = jax.block_until_ready(advance(*args, **kwargs))
        inside.append(time.perf_counter() - started)
        return done

    def marked(self, epoch):
        end_epoch(self, epoch)
        marks.append((time.perf_counter(), sum(inside)))

    step.advance, loop.Fitting.end_epoch = timed, marked
    try:
        config = training.TrainConfig(epochs=epochs, batch_size=256, lr=3e-4).filled(
            model.recipe(), seed=0
        )
        with tempfile.TemporaryDirectory() as folder:
            training.fit(
                model.loss,
                params,
                windows,
                config=config,
                folder=f"{folder}/run",
                show_progress=False,
            )
    finally:
        step.advance, loop.Fitting.end_epoch = advance, end_epoch
    return [(b[0] - a[0]) / (b[1] - a[1]) - 1 for a, b in itertools.pairwise(marks)]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.loop"
    data: Annotated[str, flags.text("DATA")] = "ETTh1"
    """benchmark name or file"""
    steps: Annotated[int, flags.whole(1)] = 40
    """training steps of an epoch"""
    epochs: Annotated[int, flags.whole(2)] = 5
    """epochs, of which the first is left out"""


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Share of an epoch outside the compiled steps (the largest of all epochs), and seconds of an
    evaluation.
    """
    args = args or Options()
    model, params = ltsm_jax.load("timer-tiny")
    splits = prepare(load_series(args.data), model.context_len, model.horizon)
    shares = overhead(
        model, params, splits.train.take(np.arange(256 * args.steps)), epochs=args.epochs
    )
    yield Measured("share of an epoch outside the compiled steps: least", min(shares), "share")
    yield Measured("the same: most", max(shares), "share")
    seconds, found = [], {}
    for _ in range(4):
        started = time.perf_counter()
        found = forecasting.evaluate(model, params, splits.test)
        seconds.append(time.perf_counter() - started)
    yield Measured(f"evaluation of {found['windows']} windows", min(seconds[1:]), "s")
    yield Measured("the same, with compilation", seconds[0], "s")


BENCHMARK = Benchmark("loop", "two minutes", measure)


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    for one in measure(None, args):
        print(
            f"{one.what}: {one.value:.2%}"
            if one.unit == "share"
            else f"{one.what}: {one.value:.2f} {one.unit}"
        )
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
