"""How fast is TimesFM 3.0 beside the original in PyTorch?

google/timesfm-3.0-pytorch (330.7M parameters, fresh ones), float32, CPU.

Run:   python -m experiments.benchmarks.timesfm_3 --torch-python PATH \\
           --launches 3
Needs: --torch-python, a Python with PyTorch and the original:
       python3.11 -m venv DIR
       DIR/bin/pip install torch==2.13.0 timesfm==3.0.2
       (a CPU build of torch will do)
       2 GB of memory a side.
Cost:  about three minutes on 2 CPU cores.
Gives: seconds of forecasting 96 steps from 1024, of random walks of one
       variate, the same sizes on both sides. The launches of the two sides
       alternate; a ratio is of the medians over launches of each launch's best
       call. Beside the wall clock stand the processor's seconds, which other
       programs on the machine disturb less. The original has no training to
       compare with.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, ClassVar

from experiments import flags, launch
from experiments.benchmarks.rows import Benchmark, Measured
from experiments.benchmarks.torch_chronos_bolt import timed
from experiments.benchmarks.torch_timesfm_3 import CONTEXT, HORIZON

PRESET = "google/timesfm-3.0-pytorch"


def jax_side(windows: int, repeats: int) -> dict[str, list[float]]:
    """Compilation is left out."""
    import jax
    import jax.numpy as jnp

    import ltsm_jax

    model = ltsm_jax.preset(PRESET)
    params = jax.jit(model.init)(jax.random.key(0))
    walks = jnp.cumsum(jax.random.normal(jax.random.key(1), (windows, 1, CONTEXT)), axis=-1)
    forecast = jax.jit(model.predict, static_argnums=2)

    def infer():
        found = forecast(params, walks, HORIZON)
        assert jnp.isfinite(found.point).all()

    return timed(infer, repeats)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.timesfm_3"
    windows: Annotated[int, flags.whole(1)] = 16
    """windows of one forecasting call"""
    repeats: Annotated[int, flags.whole(1)] = 4
    """timed calls per launch"""
    launches: Annotated[int, flags.whole(1)] = 3
    """launches per side, alternating"""
    torch_python: Annotated[str, flags.text("PATH")] = sys.executable
    """a Python that has the original; by default this one"""
    side: bool = False
    """measure our side once and print JSON; set by the measurement itself"""


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Seconds of a forecast, by the clock and of the processor, of each side; and ratios."""
    asked = args or Options()
    sizes = [str(asked.windows), str(asked.repeats)]
    ours = [
        "experiments.benchmarks.timesfm_3",
        "--side",
        "--windows",
        sizes[0],
        "--repeats",
        sizes[1],
    ]
    programs = {"jax": [sys.executable, "-m", *ours]}
    python = asked.torch_python if args else peer
    if python is not None:
        programs["torch"] = [python, "-m", "experiments.benchmarks.torch_timesfm_3", *sizes]

    best: dict[tuple[str, str], list[float]] = {}
    for number in range(asked.launches):
        for side, program in programs.items():
            done = subprocess.run(program, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            for clock, seconds in found.items():
                best.setdefault((clock, side), []).append(min(seconds))
            told = ", ".join(f"{clock} {min(seconds):.3f} s" for clock, seconds in found.items())
            print(f"launch {number} {side:5}: {told}", file=sys.stderr, flush=True)

    middle = {key: statistics.median(seconds) for key, seconds in best.items()}
    for clock, unit in (("wall", "s"), ("cpu", "s of the processor")):
        for side in programs:
            yield Measured(
                f"forecast of {asked.windows} windows: {side}", middle[clock, side], unit
            )
        if "torch" in programs:
            ratio = middle[clock, "jax"] / middle[clock, "torch"]
            yield Measured(f"forecast: jax / torch in {unit}", ratio, "ratio")


BENCHMARK = Benchmark("timesfm_3", "three minutes", measure, peer="timesfm")


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side:
        print(json.dumps(jax_side(args.windows, args.repeats)))
        return 0
    for one in measure(None, args):
        print(f"{one.what}: {one.value:.3f} {one.unit}")
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
