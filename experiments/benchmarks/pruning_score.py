"""What does scoring the channels of a batch cost?

Next to a training step of the same batch.

Run:   python -m experiments.benchmarks.pruning_score
       python -m experiments.benchmarks.pruning_score --batch 64 \\
           --model ibm-granite/granite-timeseries-ttm-r2@1536-96-r2
Cost:  3 minutes on two cores.
Gives: ms of a training step (loss, gradient of all weights, Adam; dropout on)
       and of scoring with per-row gradients ("taylor2"), by rows in one
       backward pass, and with one gradient of the mean ("taylor1"); best and
       median of interleaved repetitions, and the ratio of scoring to the
       training step measured just before it.

Random weights and random series. On two cores to themselves, medians of the
ratio: Timer (67 M, batch 16) taylor2 0.93 (16 rows) and 1.16 (8 rows), taylor1
0.53; TTM r2 (3 M, 7 variates, batch 64) taylor2 0.98 (32 rows) and 1.07 (8
rows), taylor1 0.94. Both scores go through the network forwards and backwards
without gradients of weights, so they can cost less than a training step.
"""

import dataclasses
import sys
import time
from typing import Annotated, ClassVar

import jax
import numpy as np
import optax

from experiments import flags, launch
from ltsm_jax.methods import binding
from ltsm_jax.methods.pruning import full_masks, gradient_sums
from ltsm_jax.models import preset
from ltsm_jax.tasks import forecasting
from ltsm_jax.training import adam


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.pruning_score"
    model: Annotated[str, flags.text("NAME")] = "Timer_forecast_1.0"
    """published size"""
    batch: Annotated[int, flags.whole(1)] = 16
    """windows of a batch"""
    variates: Annotated[int, flags.whole(1)] = 7
    """of one window, for models that join them"""
    chunk: tuple[int, ...] = (8, 32)
    """rows in one backward pass"""
    repeat: Annotated[int, flags.whole(1)] = 5
    """timed calls of each kind"""


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    model = preset(args.model)
    params, masks = jax.jit(model.init)(jax.random.key(0)), full_masks(model)
    loss = forecasting.loss_fn(model, binding.default_mode(model))
    shape = (
        args.batch,
        args.variates if model.variates == "joint" else 1,
        model.context_len + model.horizon,
    )
    x = np.random.default_rng(0).normal(size=shape).cumsum(-1).astype(np.float32)
    batch = {"context": x[..., : model.context_len], "target": x[..., model.context_len :]}
    optimizer, key = adam(), jax.random.key(1)

    @jax.jit
    def train(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch, key, True)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def score(squares, chunk):
        f = jax.jit(
            lambda p, m, b: gradient_sums(
                loss, p, m, batch=b, key=key, squares=squares, chunk=chunk
            )
        )
        return lambda: f(params, masks, batch)

    state = optimizer.init(params)
    work = {"training step": lambda: train(params, state, batch)}
    for chunk in sorted({min(c, args.batch) for c in args.chunk}):
        work[f"taylor2, {chunk} rows"] = score(True, chunk)
    work["taylor1"] = score(False, args.batch)
    times = {name: [] for name in work}
    for repeat in range(args.repeat + 1):  # the first compiles
        for name, f in work.items():
            before = time.perf_counter()
            jax.block_until_ready(f())
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - before))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    channels = sum(leaf.size for leaf in jax.tree.leaves(masks))
    print(
        f"{args.model}, {weights:,} weights, {channels:,} channels, batch {args.batch}, "
        f"{jax.devices()[0].device_kind}"
    )
    step = np.asarray(times["training step"])
    for name, found in times.items():
        ratio = np.median(np.asarray(found) / step)
        print(
            f"{name:20} {min(found):9.0f} ms ({np.median(found):.0f})  {ratio:5.2f} of a training "
            "step",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
