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
import time
from typing import Annotated, ClassVar

from experiments import flags, launch

PRESET = "amazon/chronos-bolt-small"
CONTEXT, HORIZON = 512, 64


def timed(call, repeats: int) -> dict[str, list[float]]:
    """Wall and processor seconds of each call after the first."""
    wall, cpu = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return {"wall": wall[1:], "cpu": cpu[1:]}


def jax_side(windows: int, rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Compilation is left out."""
    import jax
    import jax.numpy as jnp
    import optax

    import ltsm_jax

    model = ltsm_jax.preset(PRESET)
    params = jax.jit(model.init)(jax.random.key(0))
    walks = jnp.cumsum(jax.random.normal(jax.random.key(1), (max(windows, rows), 1, CONTEXT + HORIZON)), axis=-1)
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

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, jax.random.key(0)).compile()
    held = [params, state, jax.random.key(2)]

    def train():
        key, held[2] = jax.random.split(held[2])
        held[0], held[1], loss = compiled(held[0], held[1], key)
        assert jnp.isfinite(loss)

    return found | {"train": timed(train, repeats)}


def torch_side(windows: int, rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """The original's class, untrained."""
    import torch
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    torch.manual_seed(0)
    chronos = {"context_length": 2048, "prediction_length": HORIZON, "input_patch_size": 16, "input_patch_stride": 16}
    chronos |= {"quantiles": [i / 10 for i in range(1, 10)], "use_reg_token": True}
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "num_decoder_layers": 6}
    model = ChronosBoltModelForForecasting(
        T5Config(**sizes, vocab_size=2, initializer_factor=0.05, decoder_start_token_id=0, chronos_config=chronos)
    )
    walks = torch.randn(max(windows, rows), CONTEXT + HORIZON).cumsum(-1)
    context, target = walks[:, :CONTEXT], walks[:, CONTEXT:]
    model.eval()

    def infer():
        with torch.inference_mode():
            assert torch.isfinite(model(context=context[:windows]).quantile_preds).all()

    found = {"infer": timed(infer, repeats)}
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)

    def train():
        optimizer.zero_grad()
        loss = model(context=context[:rows], target=target[:rows].clone()).loss
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)

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
    side: Annotated[str | None, flags.one_of(("jax", "torch"))] = None
    """what one launch measures; set by the measurement itself"""


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side:
        side = jax_side if args.side == "jax" else torch_side
        print(json.dumps(side(args.windows, args.batch, args.repeats)))
        return 0
    best: dict[tuple[str, str, str], list[float]] = {}
    for number in range(args.launches):
        for side in ("jax", "torch"):
            python = args.torch_python if side == "torch" else sys.executable
            command = [python, "-m", "experiments.benchmarks.chronos_bolt", "--side", side]
            command += ["--windows", str(args.windows), "--batch", str(args.batch), "--repeats", str(args.repeats)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            for kind, clocks in found.items():
                for clock, seconds in clocks.items():
                    best.setdefault((kind, clock, side), []).append(min(seconds))
            told = (
                f"{kind} best {min(c['wall']):.3f} s, median {statistics.median(c['wall']):.3f} s (processor "
                f"{min(c['cpu']):.3f} s)"
                for kind, c in found.items()
            )
            print(f"launch {number} {side:5}: {'; '.join(told)}", flush=True)
    middle = {key: statistics.median(seconds) for key, seconds in best.items()}
    for kind, size, what in (("infer", args.windows, "forecast"), ("train", args.batch, "training step")):
        ours, theirs = (middle[kind, "wall", side] for side in ("jax", "torch"))
        cpu = middle[kind, "cpu", "jax"] / middle[kind, "cpu", "torch"]
        print(
            f"{what} of {size} windows: jax {ours:.3f} s ({size / ours:.0f} windows/s), torch {theirs:.3f} s "
            f"({size / theirs:.0f} windows/s), jax/torch {ours / theirs:.2f} (processor {cpu:.2f})"
        )
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
