"""How fast is a surface beside loops over its points?

timer-tiny, 25 x 25 points, a fixed sample of ETTh1 test windows, float32.

Run:   python -m experiments.benchmarks.landscape --launches 3
Needs: PyTorch in the same environment, or --torch-python PATH to a Python
       that has it; without either, --torch-python none leaves that side out.
Cost:  about a minute a launch on 2 CPU cores.
Gives: seconds per surface of `ltsm_jax.landscape.surface`; of two loops by
       hand around one compiled function (a Python loop over jitted points, and
       lax.map over all points in one program); and of the original's loop in
       eager PyTorch, on a Timer of the same size: new weights for each point,
       then every batch in evaluation mode. Launches of the sides alternate;
       ratios are of the medians over launches of each launch's best round.
"""

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from experiments import flags, launch
from experiments.benchmarks.machine import processor
from experiments.benchmarks.rows import Benchmark, Measured

OURS, LOOP, MAP, TORCH = "surface", "python loop", "lax.map", "torch loop"


def jax_sides(points: int, windows: int, rounds: int, file: Path) -> dict[str, list[float]]:
    """Seconds of each round by side, compilation left out; the windows are left in `file` for the
    other side.
    """
    import jax
    import jax.numpy as jnp

    import ltsm_jax
    from ltsm_jax import landscape
    from ltsm_jax.data import prepare
    from ltsm_jax.data.benchmarks import load_series

    model, params = ltsm_jax.load("timer-tiny")
    splits = prepare(load_series("ETTh1"), model.context_len, model.horizon)
    loss = landscape.split_loss(model, splits.test, sample=windows)
    right, up = landscape.random_directions(params, 0)
    batch = loss.windows.gather(jnp.arange(loss.windows.n))
    if not file.exists():
        np.savez(file, context=batch["context"][:, 0], target=batch["target"][:, 0])
    axis = landscape.surface(loss, params, right, points=points).x.astype(np.float32)

    def mse(x, y, params, right, up, batch):
        there = jax.tree.map(lambda w, a, b: w + x * a + y * b, params, right, up)
        point = model.predict(there, batch["context"], batch["target"].shape[-1]).point
        return jnp.square(point - batch["target"]).mean()

    one = jax.jit(mse)

    @jax.jit
    def every(places, params, right, up, batch):
        def at(place):
            return mse(place[0], place[1], params, right=right, up=up, batch=batch)

        return jax.lax.map(at, places)

    def by_loop() -> Any:
        losses = []
        for y, x in itertools.product(axis, axis):
            losses.append(float(one(x, y, params, right=right, up=up, batch=batch)))
        return np.array(losses).reshape(points, points)

    def by_map() -> Any:
        places = np.stack([np.tile(axis, points), np.repeat(axis, points)], axis=-1)
        return np.asarray(every(places, params, right, up=up, batch=batch)).reshape(points, points)

    def ours() -> Any:
        return landscape.surface(loss, params, (right, up), points=points).loss

    sides: dict[str, Callable[[], Any]] = {OURS: ours, LOOP: by_loop, MAP: by_map}
    found = {name: side() for name, side in sides.items()}  # compiles
    for name, values in found.items():
        np.testing.assert_allclose(values, found[OURS], rtol=1e-4, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.landscape"
    points: Annotated[int, flags.whole(2)] = 25
    """points on each axis"""
    windows: Annotated[int, flags.whole(1)] = 256
    """windows of the sample"""
    rounds: Annotated[int, flags.whole(1)] = 1
    """surfaces of each side in a launch"""
    launches: Annotated[int, flags.whole(1)] = 3
    """launches, alternating"""
    torch_python: Annotated[str, flags.text("PATH")] = sys.executable
    """a Python that has PyTorch, or none; by default this one"""
    file: Annotated[str | None, flags.text()] = None
    """where one launch puts the windows that the sides share; set by the measurement itself"""


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Seconds of a surface by each side: medians over launches of each launch's best;
    and ratios.
    """
    asked = args or Options(torch_python=peer or "none")
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "windows.npz")
        sizes = [
            "--points",
            str(asked.points),
            "--windows",
            str(asked.windows),
            "--rounds",
            str(asked.rounds),
        ]
        commands = {
            "jax": [
                sys.executable,
                "-m",
                "experiments.benchmarks.landscape",
                "--file",
                file,
                *sizes,
            ]
        }
        if asked.torch_python != "none":
            other = [asked.torch_python, "-m", "experiments.benchmarks.torch_landscape"]
            commands["torch"] = [*other, file, str(asked.points), str(asked.rounds)]
        for number in range(asked.launches):
            for side, command in commands.items():
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
                for name, seconds in json.loads(done.stdout.strip().splitlines()[-1]).items():
                    best.setdefault(name, []).append(min(seconds))
                    print(
                        f"launch {number} {name:12}: best {min(seconds):.2f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    middle = {name: statistics.median(seconds) for name, seconds in best.items()}
    size = f"{asked.points} x {asked.points} points, {asked.windows} windows"
    for name, seconds in middle.items():
        yield Measured(f"{size}: {name}", seconds, "s")
    yield Measured(
        "surface / best loop by hand", middle[OURS] / min(middle[LOOP], middle[MAP]), "ratio"
    )
    if TORCH in middle:
        yield Measured("torch loop / surface", middle[TORCH] / middle[OURS], "ratio")


BENCHMARK = Benchmark("landscape", "six minutes", measure, peer="torch")


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.file:
        print(json.dumps(jax_sides(args.points, args.windows, args.rounds, file=Path(args.file))))
        return 0
    print(processor(), flush=True)
    for one in measure(None, args):
        print(f"{one.what}: {one.value:.2f} {one.unit}")
    print(processor())
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
