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
from typing import Annotated, ClassVar

from experiments import flags, launch

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

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, data, jax.random.key(0)).compile()
    seconds = []
    for i in range(steps + 1):
        started = time.perf_counter()
        params, state, loss = compiled(params, state, data, jax.random.key(i))
        assert jnp.isfinite(loss)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def torch_steps(batch: int, steps: int) -> list[float]:
    """Seconds of each step after the first."""
    import torch

    from experiments.benchmarks.torch_timer import TorchTimer

    torch.manual_seed(0)
    model = TorchTimer(96, 1024, 2048, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-5)
    draw = torch.randn(batch, 672 + 96)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(draw[:, :672]), draw[:, 96:])
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
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
    side: Annotated[str | None, flags.one_of(("jax", "torch"))] = None
    """what one launch measures; set by the measurement itself"""


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side:
        print(json.dumps((jax_steps if args.side == "jax" else torch_steps)(args.batch, args.steps)))
        return 0
    best: dict[str, list[float]] = {"jax": [], "torch": []}
    for number in range(args.launches):
        for side in best:
            python = args.torch_python if side == "torch" else sys.executable
            command = [python, "-m", "experiments.benchmarks.train_step", "--side", side]
            command += ["--batch", str(args.batch), "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
            seconds = json.loads(done.stdout.strip().splitlines()[-1])
            best[side].append(min(seconds))
            print(
                f"launch {number} {side:5}: best {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s",
                flush=True,
            )
    jax_s, torch_s = statistics.median(best["jax"]), statistics.median(best["torch"])
    print(f"batch {args.batch}: jax {jax_s:.3f} s, torch {torch_s:.3f} s per step, jax/torch {jax_s / torch_s:.2f}")
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
