"""Which form of a mixture of experts is the fastest here?

Every expert on every token, or each on its own?

Run:   python -m experiments.benchmarks.experts --tokens 64 512 4096
Cost:  2 minutes on two cores.
Gives: ms of the forward pass and of value and gradient for the forms of
       `ltsm_jax.layers.experts.mixture` at the width of TimeMoE-50M, best of
       interleaved repetitions, and in brackets the processor time of all
       cores, which other programs disturb less; results in that module's
       docstring. Routing is of random tokens by a random router, so the load
       of the experts is uneven.
"""

import dataclasses
import sys
import time
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, launch
from ltsm_jax.layers.experts import mixture, route

D, F, E, K = 384, 768, 8, 2
FORMS = ("dense", "blocks", "turns", "ragged")


def compiled(form):
    def forward(x_TD, kernels, weight_TK, chosen_TK):
        return mixture(x_TD, kernels, weight_TK, chosen_TK=chosen_TK, act=jax.nn.silu, form=form)

    def loss(x_TD, kernels, weight_TK, chosen_TK):
        return jnp.square(forward(x_TD, kernels, weight_TK, chosen_TK=chosen_TK)).mean()

    return {
        "forward": jax.jit(forward),
        "gradient": jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))),
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.experts"
    tokens: tuple[int, ...] = (64, 512, 4096)
    """tokens of a call"""
    repeat: Annotated[int, flags.whole(1)] = 5
    """timed calls of each kind"""


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    print(
        f"{jax.devices()[0].device_kind}, D {D}, F {F}, {E} experts, {K} per token; ms, best "
        "(processor time, best)"
    )
    for t in args.tokens:
        keys = jax.random.split(jax.random.key(0), 5)
        x_TD = jax.random.normal(keys[0], (t, D))
        shapes = ((E, D, F), (E, D, F), (E, F, D))
        kernels = tuple(
            0.05 * jax.random.normal(k, s) for k, s in zip(keys[1:4], shapes, strict=True)
        )
        weight_TK, chosen_TK, _ = route(x_TD @ (0.1 * jax.random.normal(keys[4], (D, E))), K)
        functions = {}
        for form in FORMS:
            for kind, f in compiled(form).items():
                functions[form, kind] = f
        times = {name: [] for name in functions}
        for repeat in range(args.repeat + 1):  # the first compiles
            for name, f in functions.items():
                before = time.perf_counter(), time.process_time()
                jax.block_until_ready(f(x_TD, kernels, weight_TK, chosen_TK))
                after = time.perf_counter(), time.process_time()
                if repeat:
                    times[name].append(1e3 * np.subtract(after, before))
        for (form, kind), found in times.items():
            wall, processor = np.min(found, axis=0)
            print(f"{t:6} tokens  {form:7} {kind:9} {wall:8.1f} ({processor:.1f})", flush=True)
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
