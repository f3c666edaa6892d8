"""What does each family cost at a published size?

Compiling, forecasting, a training step, memory, and how much of the processor
is used.

Run:   python -m experiments.benchmarks.families
       python -m experiments.benchmarks.families --only-families timer,ttm
Cost:  about twenty minutes on 2 CPU cores for all families.
Gives: a line of JSON for each family: parameters; seconds to trace and compile
       its forecast and its training step; forecast windows a second; seconds
       of a training step (Adam, dropout, the recipe's loss; all parameters);
       GB of memory that its process had taken after the forecasts, and at
       most; and of both kinds of work the share of the speed of a large
       matrix product, measured in the same process, that the matrix products
       in it reached (an expert counts for the tokens that are routed to it).
       Times are the best of 3 calls after compilation, or of as many as 20
       seconds allow. Every family runs in a process of its own. A family whose
       training would not fit into the memory that is free is skipped, and its
       line says why. Weights are drawn, not loaded; the series is made up.
"""

import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import aot, counting, flags, launch
from experiments.benchmarks import first_forecast, rows
from experiments.benchmarks.rows import Benchmark, Measured
from ltsm_jax import training, trees
from ltsm_jax.data import windows
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.methods import binding
from ltsm_jax.methods.phases import Phase, trainable_mask
from ltsm_jax.models import FAMILIES, Model
from ltsm_jax.tasks import forecasting
from ltsm_jax.training import memory, optimizers
from ltsm_jax.training import step as training_step

BATCH = 8
CALLS = 3  # timed ones of each kind
ENOUGH = 20.0  # seconds of timed calls, after which no further one is made
SIDE = 2048  # of the matrices whose product is the speed that a share is of
Size = Literal["smallest", "largest", "tests"]
SIZES: tuple[Size, ...] = ("smallest", "largest", "tests")
# unit of each number in a family's line
UNITS = {
    "parameters": "parameters",
    "forecast_compile_seconds": "s",
    "windows_per_second": "windows/s",
    "forecast_share_of_peak": "share",
    "forecast_gigabytes": "GB",
    "step_compile_seconds": "s",
    "step_seconds": "s",
    "step_share_of_peak": "share",
    "gigabytes": "GB",
    "peak_gigaflops": "GFLOP/s",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.families"
    only_families: Annotated[tuple[str, ...], flags.names(tuple(FAMILIES), unset="all")] = ()
    """which families"""
    size: Annotated[Size, flags.one_of(SIZES)] = "smallest"
    """published size of each: smallest or largest; tests: that of the tests"""
    batch: Annotated[int, flags.whole(1)] = BATCH
    """windows of a forecast, and of a training step"""
    gigabytes: Annotated[
        float | None, flags.number(0, float("inf"), says="a positive number", unset="free")
    ] = None
    """memory above which a family is skipped; by default what is free"""
    side: bool = False
    """measure the one family in this process; set by the measurement itself"""


# ------------------------------------------------------------------------------------------------
# one family, in a process of its own


@dataclasses.dataclass(frozen=True)
class Timed:
    """One kind of work: seconds to trace and compile it, seconds of a call, FLOPs of a call."""

    compile_seconds: float
    seconds: float
    flops: int


def peak_flops() -> float:
    """Floating-point operations a second of a large float32 matrix product, best of some."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(seconds)


def flops_of(function: Callable, *inputs: Any) -> int:
    """Count the matrix products of `function(runtime, *inputs)`."""
    # In the form for a GPU each token is multiplied by its own experts alone. On a CPU the loops
    # over experts have lengths that the tokens decide, which cannot be counted.
    counted = functools.partial(function, Runtime(platform="gpu"))
    return counting.product_flops(jax.make_jaxpr(counted)(*inputs))


def timed(function: Callable, state: Any, *inputs: Any) -> Timed:
    """Compile and time `function(runtime, state, *inputs)`, which gives the next state.

    state: it is given up to the first call.
    """
    began = time.perf_counter()
    here = functools.partial(function, Runtime())
    compiled = jax.jit(here, donate_argnums=0).lower(state, *inputs).compile()
    compile_seconds = time.perf_counter() - began
    flops = flops_of(function, state, *inputs)

    state = jax.block_until_ready(compiled(state, *inputs))
    seconds: list[float] = []
    while len(seconds) < CALLS and sum(seconds) < ENOUGH:
        began = time.perf_counter()
        state = jax.block_until_ready(compiled(state, *inputs))
        seconds.append(time.perf_counter() - began)
    return Timed(compile_seconds, min(seconds), flops)


def gigabytes() -> float:
    """Most memory that this process has taken so far: on an accelerator of the device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9


class Training(NamedTuple):
    """The parts of a training step of a family."""

    source: windows.Windows
    loss: Any
    config: training.TrainConfig
    batch_size: int
    lr: float
    trainable: Any  # a tree of booleans like the parameters

    @property
    def how(self) -> training_step.How:
        """Settings of a step's computation."""
        return training_step.How.of(self.config)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The recipe's optimizer."""
        return optimizers.Rule.of(self.config).transformation()


def training_of(model: Model, shapes: Any, batch: int) -> Training:
    """Set up what a fit of as many windows as a batch holds would be, on a made-up series.

    shapes: of the model's parameters, which need not be drawn yet.
    """
    recipe, mode = model.recipe(), binding.default_mode(model)
    horizon = training_horizon(model)
    length = recipe.context_len + horizon + batch - 1
    noise = np.random.default_rng(0).normal(size=length)
    waves = np.sin(2 * np.pi * np.arange(length) / 24) + 0.1 * noise
    source = windows.windows_between(
        waves.astype(np.float32)[None],
        0,
        length,
        context_len=recipe.context_len,
        horizon=horizon,
        joint=model.variates == "joint",
    )
    trainable = trainable_mask(Phase("all"), model, shapes)
    return Training(
        source=source,
        loss=training_step.as_pytree(forecasting.loss_fn(model, mode)),
        config=binding.train_config(model, batch_size=batch, accumulate=1),
        batch_size=batch,
        lr=recipe.lr,
        trainable=trees.select(shapes, None) if trainable is None else trainable,
    )


def training_horizon(model: Model) -> int:
    """Rows that a training target has."""
    own_loss = binding.default_mode(model) == "ims"
    return model.horizon if own_loss else model.recipe().horizon


def check_memory(work: Training, shapes: Any, key: jax.Array, gigabytes: float | None) -> None:
    """Raises: ValueError where a training step would take more memory than is free, or than
    `gigabytes`.
    """
    moving, frozen = trees.partition(shapes, work.trainable)
    state_shapes = {"params": moving, "optimizer": jax.eval_shape(work.optimizer.init, moving)}
    estimate = memory.estimate(
        state_shapes,
        frozen,
        work.source,
        loss_fn=work.loss,
        key=key,
        batch_size=work.batch_size,
        how=work.how,
        runtime=Runtime(),
        writes_checkpoints=False,
    )
    estimate.check(memory.available() if gigabytes is None else int(gigabytes * 1e9))


def time_forecasts(model: Model, params: Any, source: windows.Windows, batch: int) -> Timed:
    """Time forecasts of one batch of contexts of one variate."""
    horizon = model.recipe().horizon
    context = source.gather(jnp.arange(batch))["context"][:, :1]

    def predict(runtime, previous, params, context):
        # What a call gives back takes the place of what the one before it gave.
        return runtime.call(model.predict, params, context, horizon).point

    return timed(predict, jnp.zeros((batch, 1, horizon)), params, context)


def time_steps(work: Training, moving: Any, frozen: Any, key: jax.Array) -> Timed:
    """Time training steps on one batch. moving, frozen: the parameters; `moving` is given up."""
    optimizer = work.optimizer
    batch_rows = windows.batch_at(jnp.arange(work.source.n), 0, work.batch_size)

    def train(runtime, state, frozen, source, batch_rows, key):
        moving, opt_state = state
        _, _, *state = training_step.update(
            moving,
            opt_state,
            frozen,
            source=source,
            rows=batch_rows,
            rate=work.lr,
            key=key,
            loss_fn=work.loss,
            penalty=None,
            tx=optimizer,
            how=work.how,
            runtime=runtime,
        )
        return tuple(state)

    state = jax.tree.map(training_step.strong, (moving, optimizer.init(moving)))
    del moving
    return timed(train, state, frozen, work.source, batch_rows, key)


def one(family: str, preset: str, args: Options) -> dict[str, Any]:
    """Measure one family.

    Returns: its line; one with the reason under "skipped" where training would not fit.
    """
    name, model = aot.find_model(family, preset)
    model, shapes = aot.ready(model, 1)
    recipe = model.recipe()
    found = {
        "family": family,
        "preset": name,
        "parameters": trees.count(shapes),
        "batch": args.batch,
        "context": recipe.context_len,
        "horizon": recipe.horizon,
        "training_horizon": training_horizon(model),
    }
    keys = training.keys(0)
    work = training_of(model, shapes, args.batch)
    try:
        check_memory(work, shapes, keys["dropout"], gigabytes=args.gigabytes)
    except ValueError as err:
        return found | {"skipped": str(err)}

    params = jax.jit(model.init)(keys["init"])
    model, params = model.for_series(params, n_variates=1, freq=aot.FREQ, key=keys["init"])
    peak = peak_flops()
    forecasts = time_forecasts(model, params, work.source, batch=args.batch)
    after_forecasts = gigabytes()

    moving, frozen = trees.partition(params, work.trainable)
    del params
    steps = time_steps(work, moving, frozen, key=keys["dropout"])
    peak = max(peak, peak_flops())

    return found | {
        "forecast_compile_seconds": round(forecasts.compile_seconds, 2),
        "windows_per_second": rounded(args.batch / forecasts.seconds),
        "forecast_share_of_peak": rounded(forecasts.flops / forecasts.seconds / peak),
        "forecast_gigabytes": round(after_forecasts, 2),
        "step_compile_seconds": round(steps.compile_seconds, 2),
        "step_seconds": rounded(steps.seconds),
        "step_share_of_peak": rounded(steps.flops / steps.seconds / peak),
        "gigabytes": round(gigabytes(), 2),
        "peak_gigaflops": round(peak / 1e9, 1),
    }


def rounded(value: float) -> float:
    """Keep three digits."""
    return float(f"{value:.3g}")


# ------------------------------------------------------------------------------------------------
# all of them


def preset_of(family: str, size: Size) -> str:
    """Name the preset of a family that a size means."""
    if size == "tests":
        return aot.SMALL
    counts = first_forecast.published(family)
    best = min if size == "smallest" else max
    return best(counts, key=counts.__getitem__)


def lines(args: Options) -> Iterator[dict[str, Any]]:
    """Run each family in a fresh process and give its line; of one that fails, its error's last."""
    for family in args.only_families or FAMILIES:
        command = [sys.executable, "-m", Options.program, "--side", "--only-families", family]
        command += ["--size", args.size, "--batch", str(args.batch)]
        if args.gigabytes is not None:
            command += ["--gigabytes", str(args.gigabytes)]
        # Programs kept by an earlier run would hide what compiling takes.
        environment = {
            key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
            yield {"family": family, "failed": said[-1]}
        else:
            yield json.loads(done.stdout.strip().splitlines()[-1])


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Give the numbers of all families at their smallest size; skipped ones are named on stderr."""
    for line in lines(args or Options()):
        if "failed" in line:
            raise ValueError(f"{line['family']} failed: {line['failed']}")
        if "skipped" in line:
            print(f"{line['preset']} is skipped: {line['skipped']}", file=sys.stderr, flush=True)
            continue
        for what, unit in UNITS.items():
            yield Measured(f"{line['preset']}: {what.replace('_', ' ')}", line[what], unit)


BENCHMARK = Benchmark("families", "twenty minutes", measure)


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side:
        (family,) = args.only_families
        print(json.dumps(one(family, preset_of(family, args.size), args)))
        return 0
    failed = False
    for line in lines(args):
        # The machine is watched for each family: half an hour is long.
        print(json.dumps(line | rows.circumstances(rows.busy())), flush=True)
        failed = failed or "failed" in line
    return int(failed)


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
