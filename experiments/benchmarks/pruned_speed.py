"""How much faster is a model without half its heads and feed-forward units?

Run:   python -m experiments.benchmarks.pruned_speed --rounds 9
Cost:  two minutes on two cores.
Gives: times of Timer_forecast_1.0 (67M parameters, random weights: speed does
       not depend on them), 64 windows of 672 -> 96, forecast by one compiled
       program, CPU. Whole and pruned take turns within one run, so that other
       work on the machine meets both; "best" and "median" are over the
       rounds, "cpu" is the least time of all cores together, "ratio" is of
       the two sizes.

       The second part decides whether the residual stream should be narrowed
       too (`methods.removal`): a feed-forward layer of that Timer (D 1024, F
       2048) of which a tenth, a quarter or half of the input and of the output
       channels are dead, on its 448 tokens. "zeros" is what removal leaves;
       "gather" reads the live channels only and adds to the live ones only,
       `x.at[:, out].add(f(x[:, in]))`; "bound" is the time of a layer that is
       as narrow without any indices.

On two cores to themselves (4 rounds): the forecast 2.05 times faster (best),
2.00 (median), 2.06 (cpu: 0.435 s against 0.212 s). Milliseconds of all cores
for the layer, zeros / gather / bound, with other work on the machine: a tenth
dead 27.0 / 27.1 / 24.3, a quarter 25.9 / 23.8 / 20.1, half 26.6 / 16.9 / 13.4.
"""

import dataclasses
import json
import statistics
import sys
import time
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, launch
from ltsm_jax import trees
from ltsm_jax.methods.pruning import full_masks
from ltsm_jax.methods.removal import remove
from ltsm_jax.models.timer import PRESETS, Timer


def halved(model: Timer) -> trees.Tree:
    """Masks in which every second head and every second feed-forward unit of each layer is dead."""
    masks = {path: np.array(mask) for path, mask in trees.flatten(full_masks(model)).items()}
    for path, mask in masks.items():
        if path.endswith(("attn/out/in", "down/in")):
            mask[::2] = 0
    return trees.unflatten(masks)


def in_turns(programs: dict, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each program, taken in turns: the best and the median, and the least of all cores
    together.
    """
    for run in programs.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in programs}
    cores = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            start, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
            cores[name].append(time.process_time() - cpu)
    return {
        name: {"best": min(s), "median": statistics.median(s), "cpu": min(cores[name])}
        for name, s in seconds.items()
    }


def forecasts(rounds: int) -> dict:
    model = Timer(PRESETS["Timer_forecast_1.0"])
    params = jax.jit(model.init)(jax.random.key(0))
    small, fewer, _ = remove(model, params, halved(model))
    assert {(layer.attn.heads, layer.ffn) for layer in small.config.layers} == {(4, 1024)}
    context = jax.random.normal(jax.random.key(1), (64, 1, model.context_len))
    predict = jax.jit(lambda m, p, x: m.predict(p, x, model.horizon).point, static_argnums=0)
    programs = {
        "whole": lambda: predict(model, params, context),
        "pruned": lambda: predict(small, fewer, context),
    }
    times = in_turns(programs, rounds)
    sizes = {"parameters": trees.count(params), "parameters left": trees.count(fewer)}
    return (
        sizes
        | times
        | {f"ratio of {k}": times["whole"][k] / times["pruned"][k] for k in times["whole"]}
    )


def outer(rounds: int, dead: float) -> dict:
    d, f, tokens = 1024, 2048, 448
    keys = jax.random.split(jax.random.key(0), 5)
    up, down = (
        jax.random.normal(keys[0], (d, f)) * d**-0.5,
        jax.random.normal(keys[1], (f, d)) * f**-0.5,
    )
    x, n = jax.random.normal(keys[2], (tokens, d)), round(d * (1 - dead))
    into, out = (jnp.sort(jax.random.permutation(key, d)[:n]) for key in keys[3:])
    whole = jax.jit(lambda x, up, down: x + jax.nn.gelu(x @ up, approximate=False) @ down)
    live = jax.jit(
        lambda x, up, down: x.at[:, out].add(jax.nn.gelu(x[:, into] @ up, approximate=False) @ down)
    )
    zeros = (
        jnp.zeros_like(up).at[into].set(up[into]),
        jnp.zeros_like(down).at[:, out].set(down[:, out]),
    )
    fewer, first = (up[into], down[:, out]), x[:, :n]
    np.testing.assert_allclose(whole(x, *zeros), live(x, *fewer), rtol=1e-4, atol=1e-4)
    return in_turns(
        {
            "zeros": lambda: whole(x, *zeros),
            "gather": lambda: live(x, *fewer),
            "bound": lambda: whole(first, *fewer),
        },
        rounds * 5,
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.pruned_speed"
    rounds: Annotated[int, flags.whole(1)] = 9
    """turns of the programs"""


def main() -> int:
    rounds = flags.parse(Options, sys.argv[1:], __doc__).rounds
    print("forecast", json.dumps(forecasts(rounds)), flush=True)
    for dead in (0.1, 0.25, 0.5):
        print("outer", dead, json.dumps(outer(rounds, dead)), flush=True)
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
