"""How long is an epoch of fine-tuning, beside the pipeline of the SFF release?

A Timer of 2.2M parameters (d 256, 4 layers) on ETTh1, 672 -> 96, batch 2048,
Adam at 3e-5, dropout 0.1, the loss of the forecast ("direct"): windows, steps,
validation and test.

Run:   LTSM_DATA=FOLDER python -m experiments.benchmarks.epoch \\
           --torch-python PATH
Needs: a Python with PyTorch, or --torch-python none for our side alone.
Cost:  two to three minutes a launch of both sides on 2 CPU cores.
Gives: seconds of an epoch of each side, compilation left out (and named), from
       launches that alternate, and the ratio of the medians. Both sides begin
       with the same weights; their validation errors at the start must agree
       to 1e-5 (relative), or nothing is reported. --accumulate 1 takes the
       whole batch at once, and auto the parts that a CPU likes.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from experiments import flags, launch
from experiments.benchmarks.machine import processor
from experiments.benchmarks.rows import Benchmark, Measured

OURS, PEER = "ltsm_jax", "released pipeline"
SIZES = (96, 256, 512, 4, 8)  # patch, model width, feed-forward width, layers, heads


def series(data: str) -> Any:
    from ltsm_jax.data import load_series

    return load_series(data)


def model_and_params() -> tuple[Any, Any]:
    """The model and a draw of its initialisation."""
    import jax

    from ltsm_jax.models.timer import Timer, TimerConfig

    model = Timer(TimerConfig.of(*SIZES, context_len=672, horizon=96))
    return model, jax.jit(model.init)(jax.random.key(0))


def torch_names(flat: dict[str, Any]) -> dict[str, Any]:
    """Weights by the names and in the layout of `torch_timer.TorchTimer`."""
    d = SIZES[1]
    attention = {
        "q": "query_projection",
        "k": "key_projection",
        "v": "value_projection",
        "out": "out_projection",
    }
    ends = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    found = {}
    for path, value in flat.items():
        *layer, name, end = path.split("/")
        value = np.asarray(value)
        if name in attention:
            flat_shape = (d, -1) if name != "out" else (-1, d)
            value = value.reshape(flat_shape).T if end == "kernel" else value.reshape(-1)
        elif end == "kernel":
            value = value.T
        place = f"blocks.{layer[0].removeprefix('layer_')}." if layer else ""
        if name in attention:
            place += f"attention.{attention[name]}"
        elif name in ("up", "down"):
            place += {"up": "conv1", "down": "conv2"}[name]
            value = value[..., None] if end == "kernel" else value
        else:
            place += {"embed": "embedding", "head": "proj"}.get(name, name)
        found[f"{place}.{ends[end]}"] = np.ascontiguousarray(value)
    return found


def prepare_peer(data: str, folder: Path) -> None:
    """Write the weights and the rows of each part for the other side."""
    from ltsm_jax import trees
    from ltsm_jax.data import prepare

    _, params = model_and_params()
    np.savez(folder / "weights.npz", **torch_names(trees.flatten(params)))
    splits = prepare(series(data), 672, 96)
    rows: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        part = getattr(splits, name)
        starts = np.asarray(part.starts)
        rows[name] = np.asarray(part.values)[:, starts.min() : starts.max() + 672 + 96].T
    np.savez(folder / "rows.npz", **rows)


def ours(data: str, accumulate: int | Literal["auto"]) -> dict[str, float]:
    """Scores of the start and after an epoch, and the seconds of the epoch."""
    from ltsm_jax.data import prepare
    from ltsm_jax.methods.run import run
    from ltsm_jax.methods.strategies import strategy
    from ltsm_jax.tasks import forecasting
    from ltsm_jax.training import TrainConfig, compiling

    model, params = model_and_params()
    read = series(data)
    config = TrainConfig(epochs=1, batch_size=2048, lr=3e-5, accumulate=accumulate)
    started = time.perf_counter()
    with compiling.measured() as waited:
        splits = prepare(read, 672, 96)
        task = forecasting.Forecasting("direct")
        found = run(
            model,
            params,
            strategy("ff"),
            data=splits,
            task=task,
            config=config,
            show_progress=False,
        )
    seconds = time.perf_counter() - started
    assert found.val and found.test
    start = forecasting.evaluate(model, params, splits.val)["mse"]
    return {
        "start": start,
        "val": found.val["mse"],
        "test": found.test["mse"],
        "seconds": seconds - waited.seconds,
        "compile_seconds": waited.seconds,
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.epoch"
    data: Annotated[str, flags.text("DATA")] = "ETTh1"
    """benchmark name"""
    launches: Annotated[int, flags.whole(1)] = 3
    """launches of each side, alternating"""
    accumulate: Annotated[int | Literal["auto"], flags.whole_or("auto", 1)] = "auto"
    """parts of a batch on our side"""
    workers: Annotated[int, flags.whole(0)] = 0
    """processes that load windows on the other side"""
    torch_python: Annotated[str, flags.text("PATH")] = sys.executable
    """a Python that has PyTorch, or none; by default this one"""
    side: bool = False
    """measure our side once and print JSON; set by the measurement itself"""


def launched(args: Options) -> dict[str, list[dict[str, float]]]:
    """Launch both sides in turn and collect their measurements, which are also printed on stderr.

    Raises: ValueError where a side fails, AssertionError where the two forecast otherwise.
    """
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, "-m", Options.program, "--side", "--data", args.data]
        commands = {OURS: [*own, "--accumulate", str(args.accumulate)]}
        if args.torch_python != "none":
            prepare_peer(args.data, Path(folder))
            peer = [args.torch_python, "-m", "experiments.benchmarks.torch_epoch"]
            commands[PEER] = [*peer, folder, str(args.workers), str(os.cpu_count())]
        for number in range(args.launches):
            for side, command in commands.items():
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
                one = json.loads(done.stdout.strip().splitlines()[-1])
                found.setdefault(side, []).append(one)
                print(f"launch {number} {side:9}: {json.dumps(one)}", file=sys.stderr, flush=True)
                # outputs first: a race between different answers does not count
                starts = [each[0]["start"] for each in found.values()]
                np.testing.assert_allclose(
                    starts, starts[0], rtol=1e-5, err_msg="the sides forecast otherwise"
                )
    return found


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Seconds of an epoch of each side: medians over launches, and their ratio."""
    args = dataclasses.replace(
        args or Options(), **({} if args else {"torch_python": peer or "none"})
    )
    found = launched(args)
    middle = {}
    for side, each in found.items():
        middle[side] = statistics.median(one["seconds"] for one in each)
    for side, seconds in middle.items():
        yield Measured(f"epoch of {args.data}, validation and test: {side}", seconds, "s")
    compiling = statistics.median(one["compile_seconds"] for one in found[OURS])
    yield Measured(f"compilation: {OURS}", compiling, "s")
    if PEER in middle:
        yield Measured(f"{OURS} / {PEER}", middle[OURS] / middle[PEER], "ratio")


BENCHMARK = Benchmark(
    "epoch", "two to three minutes a launch of both sides, three launches", measure, peer="torch"
)


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side:
        print(json.dumps(ours(args.data, args.accumulate)))
        return 0
    print(processor(), flush=True)
    for one in measure(None, args):
        print(f"{one.what}: {one.value:.2f} {one.unit}")
    print(processor())
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
