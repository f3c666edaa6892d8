"""Are eight runs quicker as lanes of one program than one after the other?

Smoothed full fine-tuning, four alphas x two seeds, of a Timer whose size is
given; dropout on.

Run:   python -m experiments.benchmarks.lanes
       python -m experiments.benchmarks.lanes --width 256 --layers 8 --batch 64
Cost:  half a minute on 2 CPU cores; the second command three minutes.
Gives: seconds of training and validation of eight runs one after the other, of
       eight lanes batched and mapped, and of what --lanes auto chooses, its
       timed steps included; compilation is left out of all of them and given
       beside. The ways take turns (--rounds); ratios are of medians. On a CPU
       auto should be no slower than one after the other, on an accelerator
       batched lanes should take at most 0.35 of its time.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from experiments import flags, launch
from experiments.benchmarks import machine
from ltsm_jax import stacks, training
from ltsm_jax.data import Series, Splits, prepare
from ltsm_jax.methods import sweep
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.strategies import sff
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.sharding import Placement
from ltsm_jax.stacks import Over
from ltsm_jax.training import compiling, lanes

ALPHAS, SEEDS = (0.5, 0.7, 0.9, 1.0), (0, 1)
ROWS, COLUMNS = 3000, 2


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.lanes"
    width: Annotated[int, flags.whole(8)] = 32
    """of the model; its feed-forward layers are four times as wide"""
    layers: Annotated[int, flags.whole(1)] = 1
    """of the model"""
    batch: Annotated[int, flags.whole(1)] = 16
    """windows per step"""
    epochs: Annotated[int, flags.whole(1)] = 2
    """epochs, each with a validation"""
    windows: Annotated[int, flags.whole(1)] = 800
    """training windows"""
    rounds: Annotated[int, flags.whole(1)] = 3
    """turns of all ways"""


def problem(options: Options) -> tuple[Timer, Any, Splits]:
    """Make a model, its weights, and windows of noisy waves."""
    width = options.width
    config = TimerConfig.of(
        24,
        width,
        4 * width,
        layers=options.layers,
        heads=max(width // 32, 1),
        context_len=168,
        horizon=24,
        dropout=0.1,
    )
    model = Timer(config)
    t, rng = np.arange(ROWS), np.random.default_rng(0)
    waves = [
        np.sin(2 * np.pi * t / (24 + 6 * c)) + 0.3 * rng.normal(size=ROWS) for c in range(COLUMNS)
    ]
    names = tuple(f"wave {c}" for c in range(COLUMNS))
    splits = prepare(
        Series(name="waves", values=np.stack(waves), columns=names, timestamps=None, freq=None),
        model.context_len,
        model.horizon,
    )
    some = np.linspace(0, splits.train.n - 1, min(options.windows, splits.train.n)).astype(np.int32)
    splits = dataclasses.replace(splits, train=splits.train.take(some))
    return model, jax.jit(model.init)(jax.random.key(0)), splits


def jobs(options: Options, made: tuple[Timer, Any, Splits]) -> tuple[list[dict[str, Any]], Running]:
    """Describe the eight runs, from one and the same start of the clock each time."""
    model, params, splits = made
    config = training.TrainConfig(epochs=options.epochs, batch_size=options.batch, lr=1e-4)
    runs = []
    for alpha in ALPHAS:
        for seed in SEEDS:
            runs.append(
                Running(
                    model=model,
                    params=params,
                    strategy=sff(alpha),
                    data=splits,
                    config=config,
                    seed=seed,
                    show_progress=False,
                )
            )
    return [run.job() for run in runs], runs[0]


def main() -> int:
    """Measure."""
    options = flags.parse(Options, sys.argv[1:], __doc__)
    made = problem(options)
    described, one = jobs(options, made)
    evaluate = sweep.evaluation(one)
    mesh = Placement.of(described[0]["params"]).mesh

    def together(mode: stacks.Mode) -> list[Any]:
        return lanes.fit_as_lanes(described, Over(mode, mesh), evaluate)

    def asked(way: lanes.Asked) -> list[Any]:
        return lanes.fit_jobs(described, lanes=way, evaluate=evaluate)

    ways = {
        "one after the other": lambda: asked("off"),
        "lanes, batched": lambda: together("batched"),
        "lanes, mapped": lambda: together("mapped"),
        "what auto chooses": lambda: asked("auto"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    compiled: dict[str, float] = {}
    scores: dict[str, Sequence[float]] = {}
    for turn in range(options.rounds + 1):  # the first one compiles
        for name, way in ways.items():
            began = time.perf_counter()
            with compiling.measured() as waited:
                found = way()
            if turn:
                seconds[name].append(time.perf_counter() - began - waited.seconds)
            else:
                compiled[name] = waited.seconds
            scores[name] = [result.history[-1]["val_mse"] for result in found]

    size = sum(leaf.size for leaf in jax.tree.leaves(made[1]))
    steps = -(-made[2].train.n // options.batch)
    work = f"{options.epochs} epochs of {steps} steps of {options.batch} windows"
    print(
        f"{machine.processor()}; {jax.default_backend()}; {len(described)} runs of {size:,} "
        f"parameters, {work}"
    )
    base = statistics.median(seconds["one after the other"])
    for name, values in seconds.items():
        median = statistics.median(values)
        gap = max(
            abs(a / b - 1) for a, b in zip(scores[name], scores["one after the other"], strict=True)
        )
        print(
            f"{name:20} {median:7.2f} s, {median / base:.2f} of one after the other (compiled in "
            f"{compiled[name]:.1f} s; validation errors differ by {gap:.0e})"
        )
    print(f"auto: {lanes.plan_lanes(described).why}")
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
