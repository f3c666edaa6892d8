"""How fast is a training step of the published Timer beside eager PyTorch?

67.4M parameters, 672 -> 96, float32.

Run:   python -m experiments.benchmarks.train_step --batch 64 --launches 3 \\
           --steps 8
Needs: PyTorch in the same environment, or --torch-python PATH to a Python
       that has it.
Cost:  about three minutes on 2 CPU cores.
Gives: seconds per step of both sides, each with Adam and dropout 0.1,
       next-token loss. The launches of the two sides alternate (launches of
       one program differ, so one launch proves nothing); the ratio is of the
       medians over launches of each launch's best step.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated, ClassVar

from experiments import flags, launch
from experiments.benchmarks.rows import Benchmark, Measured

PRESET = "Timer_forecast_1.0"


def jax_steps(batch: int, steps: int) -> list[float]:
    """Seconds of each step, compilation left out."""
    import jax
    import jax.numpy as jnp
    import optax

    import ltsm_jax

    model = ltsm_jax.preset(PRESET)
    params = model.init(jax.random.key(0))
    optimizer = optax.adam(3e-5)
    state = optimizer.init(params)
    draw = jax.random.normal(jax.random.key(1), (batch, 1, model.context_len + model.horizon))
    data = {"context": draw[..., : model.context_len], "target": draw[..., model.context_len :]}

    def step(params, state, data, key):
        loss, gradients = jax.value_and_grad(model.loss)(params, data, key, True)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, data, jax.random.key(0)).compile()
    )
    seconds = []
    for i in range(steps + 1):
        started = time.perf_counter()
        params, state, loss = compiled(params, state, data, jax.random.key(i))
        assert jnp.isfinite(loss)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.train_step"
    batch: Annotated[int, flags.whole(1)] = 64
    """windows per step"""
    steps: Annotated[int, flags.whole(1)] = 8
    """timed steps per launch"""
    launches: Annotated[int, flags.whole(1)] = 3
    """launches per side, alternating"""
    torch_python: Annotated[str, flags.text("PATH")] = sys.executable
    """a Python that has PyTorch; by default this one"""
    side: bool = False
    """measure our side once and print JSON; set by the measurement itself"""


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Seconds of a step of each side: medians over launches of each launch's best step, and their
    ratio.
    """
    asked = args or Options(steps=6)
    pythons = {"jax": sys.executable, "torch": asked.torch_python if args else peer}
    best: dict[str, list[float]] = {
        side: [] for side, python in pythons.items() if python is not None
    }
    for number in range(asked.launches):
        for side in best:
            program = [
                "experiments.benchmarks.torch_train_step",
                str(asked.batch),
                str(asked.steps),
            ]
            if side == "jax":
                program = ["experiments.benchmarks.train_step", "--side"]
                program += ["--batch", str(asked.batch), "--steps", str(asked.steps)]
            done = subprocess.run(
                [str(pythons[side]), "-m", *program], capture_output=True, text=True
            )
            if done.returncode:
                raise ValueError(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
            seconds = json.loads(done.stdout.strip().splitlines()[-1])
            best[side].append(min(seconds))
            print(
                f"launch {number} {side:5}: best {min(seconds):.3f} s, median "
                f"{statistics.median(seconds):.3f} s",
                file=sys.stderr,
                flush=True,
            )
    middle = {side: statistics.median(seconds) for side, seconds in best.items()}
    for side, seconds in middle.items():
        yield Measured(f"training step of {PRESET}, batch {asked.batch}: {side}", seconds, "s")
    if "torch" in middle:
        yield Measured("jax / torch", middle["jax"] / middle["torch"], "ratio")


BENCHMARK = Benchmark("train_step", "three minutes", measure, peer="torch")


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side:
        print(json.dumps(jax_steps(args.batch, args.steps)))
        return 0
    for one in measure(None, args):
        print(f"{one.what}: {one.value:.3f} {one.unit}")
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
