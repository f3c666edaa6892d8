"""How fast is Chronos-Bolt beside the original in PyTorch?

chronos-bolt-small (47.7M parameters), float32, CPU.

Run:   python -m experiments.benchmarks.chronos_bolt --torch-python PATH \\
           --launches 3
Needs: --torch-python, a Python with PyTorch and chronos-forecasting:
       python3.11 -m venv DIR
       DIR/bin/pip install torch==2.13.0 chronos-forecasting
       (a CPU build of torch will do)
Cost:  about two minutes on 2 CPU cores.
Gives: windows per second of forecasting 64 steps from 512, and seconds of a
       training step (pinball loss on 512 -> 64, Adam, dropout 0.1; the
       original with PyTorch's fused Adam), on random walks, the same sizes on
       both sides. The launches of the two sides alternate (launches of one
       program differ, so one launch proves nothing); a ratio is of the medians
       over launches of each launch's best call. Beside the wall clock stand
       the processor's seconds, which other programs on the machine disturb
       less.
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
from experiments.benchmarks.torch_chronos_bolt import CONTEXT, HORIZON, timed

PRESET = "amazon/chronos-bolt-small"


def jax_side(windows: int, rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Compilation is left out."""
    import jax
    import jax.numpy as jnp
    import optax

    import ltsm_jax

    model = ltsm_jax.preset(PRESET)
    params = jax.jit(model.init)(jax.random.key(0))
    walks = jnp.cumsum(
        jax.random.normal(jax.random.key(1), (max(windows, rows), 1, CONTEXT + HORIZON)), axis=-1
    )
    context, target = walks[..., :CONTEXT], walks[..., CONTEXT:]

    forecast = jax.jit(model.predict, static_argnums=2)

    def infer():
        found = forecast(params, context[:windows], HORIZON)
        assert jnp.isfinite(found.point).all()

    found = {"infer": timed(infer, repeats)}
    optimizer = optax.adam(1e-5)
    state = optimizer.init(params)
    batch = {"context": context[:rows], "target": target[:rows]}

    def step(params, state, key):
        loss, gradients = jax.value_and_grad(model.loss)(params, batch, key, True)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, jax.random.key(0)).compile()
    )
    held = [params, state, jax.random.key(2)]

    def train():
        key, held[2] = jax.random.split(held[2])
        held[0], held[1], loss = compiled(held[0], held[1], key)
        assert jnp.isfinite(loss)

    return found | {"train": timed(train, repeats)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.chronos_bolt"
    windows: Annotated[int, flags.whole(1)] = 64
    """windows of one forecasting call"""
    batch: Annotated[int, flags.whole(1)] = 32
    """windows of one training step"""
    repeats: Annotated[int, flags.whole(1)] = 6
    """timed calls of each kind per launch"""
    launches: Annotated[int, flags.whole(1)] = 3
    """launches per side, alternating"""
    torch_python: Annotated[str, flags.text("PATH")] = sys.executable
    """a Python that has the original; by default this one"""
    side: bool = False
    """measure our side once and print JSON; set by the measurement itself"""


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Seconds of a forecast and of a training step, by the clock and of the processor, of each
    side; and ratios.
    """
    asked = args or Options()
    pythons = {"jax": sys.executable, "torch": asked.torch_python if args else peer}
    sides = [side for side, python in pythons.items() if python is not None]
    best: dict[tuple[str, str, str], list[float]] = {}
    for number in range(asked.launches):
        for side in sides:
            sizes = [str(asked.windows), str(asked.batch), str(asked.repeats)]
            program = ["experiments.benchmarks.torch_chronos_bolt", *sizes]
            if side == "jax":
                program = ["experiments.benchmarks.chronos_bolt", "--side"]
                for flag, size in zip(("--windows", "--batch", "--repeats"), sizes, strict=True):
                    program += [flag, size]
            done = subprocess.run(
                [str(pythons[side]), "-m", *program], capture_output=True, text=True
            )
            if done.returncode:
                raise ValueError(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            for kind, clocks in found.items():
                for clock, seconds in clocks.items():
                    best.setdefault((kind, clock, side), []).append(min(seconds))
            told = (
                f"{kind} best {min(c['wall']):.3f} s, median {statistics.median(c['wall']):.3f} s "
                f"(processor {min(c['cpu']):.3f} s)"
                for kind, c in found.items()
            )
            print(f"launch {number} {side:5}: {'; '.join(told)}", file=sys.stderr, flush=True)

    middle = {key: statistics.median(seconds) for key, seconds in best.items()}
    for kind, size, what in (
        ("infer", asked.windows, "forecast"),
        ("train", asked.batch, "training step"),
    ):
        for clock, unit in (("wall", "s"), ("cpu", "s of the processor")):
            for side in sides:
                yield Measured(f"{what} of {size} windows: {side}", middle[kind, clock, side], unit)
            if len(sides) > 1:
                ratio = middle[kind, clock, "jax"] / middle[kind, clock, "torch"]
                yield Measured(f"{what}: jax / torch in {unit}", ratio, "ratio")


BENCHMARK = Benchmark("chronos_bolt", "five minutes", measure, peer="chronos")


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side:
        print(json.dumps(jax_side(args.windows, args.batch, args.repeats)))
        return 0
    for one in measure(None, args):
        print(f"{one.what}: {one.value:.3f} {one.unit}")
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
