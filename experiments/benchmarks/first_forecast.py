"""How long until the first forecast, and how many windows a second after?

Every family at a published size.

Run:   python -m experiments.benchmarks.first_forecast
       python -m experiments.benchmarks.first_forecast --families timer,ttm
Cost:  about ten minutes on 2 CPU cores for all families.
Gives: seconds from the start of a fresh process to the first forecast of one
       window (imports, compilation, forward pass; not the drawing of the
       random weights, on which the time does not depend), in a process whose
       cache of compiled programs is empty (cold), and in a second one that
       finds what the first has kept (warm); then windows a second at the
       batch size, best of 5 after compilation (of fewer where they take more
       than 20 s together; --batch 0 leaves them out). Context and horizon are
       those of the family's recipe; the preset is the family's smallest
       published one, or what --presets names.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time

STARTED = time.perf_counter()

from collections.abc import Iterator  # noqa: E402

from experiments.benchmarks.rows import Benchmark, Measured  # noqa: E402

BATCH = 8
OURS = re.compile(r"[a-z]+\d*-(tiny|mini|small)")  # sizes that this library has added
# What a process that is timed runs: nothing that reads options, which would be timed too.
CHILD = "import json, sys; from experiments.benchmarks import first_forecast as f; "
CHILD += "print(json.dumps(f.one(sys.argv[1], int(sys.argv[2]))))"
ENOUGH = 20.0  # seconds of timed calls, after which no further one is made


def one(name: str, batch: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import ltsm_jax
    from ltsm_jax import storage, trees

    storage.keep_compiled()  # as loading a model does
    model = ltsm_jax.preset(name)
    before = time.perf_counter()
    params = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0)))
    drawing = time.perf_counter() - before
    model, params = model.for_series(params, n_variates=1, freq="h", key=jax.random.key(1))
    recipe = model.recipe()
    t = np.arange(recipe.context_len)
    x = jnp.asarray(
        np.sin(2 * np.pi * t / 24)[None, None]
        + 0.1 * np.random.default_rng(0).normal(size=(max(batch, 1), 1, t.size))
    )

    def predict(p, x):
        return model.predict(p, x, recipe.horizon).point

    predict = jax.jit(predict)
    jax.block_until_ready(predict(params, x[:1]))
    first = time.perf_counter() - STARTED - drawing
    seconds = []
    if batch:
        jax.block_until_ready(predict(params, x))
    while batch and len(seconds) < 5 and sum(seconds) < ENOUGH:
        began = time.perf_counter()
        jax.block_until_ready(predict(params, x))
        seconds.append(time.perf_counter() - began)
    return {
        "family": model.family,
        "preset": name,
        "parameters": trees.count(params),
        "context": recipe.context_len,
        "horizon": recipe.horizon,
        "first": round(first, 1),
        "windows_per_second": float(f"{batch / min(seconds):.3g}") if seconds else None,
    }


def published(family: str) -> dict[str, int]:
    """Parameters of the family's published presets that forecast, by name."""
    from ltsm_jax import trees
    from ltsm_jax.models import FAMILIES, folders

    cls = FAMILIES[family]
    counts = {
        name: trees.count(folders.param_shapes(cls(config)))
        for name, config in cls.presets().items()
        if name not in folders.shipped() and not OURS.fullmatch(name)
    }
    return {
        n: c for n, c in counts.items() if "imputation" not in n and "anomaly" not in n
    } or counts


def smallest(family: str) -> str:
    """The family's published preset with the fewest parameters."""
    counts = published(family)
    return min(counts, key=counts.__getitem__)


def child(name: str, batch: int, cache: str) -> dict | str:
    """Run `one` in a fresh process. Returns: its row, or the last line of its error.

    cache: folder of compiled programs.
    """
    command = [sys.executable, "-c", CHILD, name, str(batch)]
    environment = {
        key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
    }
    environment["LTSM_CACHE"] = cache
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def cold_and_warm(name: str, batch: int) -> dict | str:
    """The row of a process that compiles everything, with the first forecast of a second process as
    "warm".
    """
    with tempfile.TemporaryDirectory() as cache:
        cold = child(name, batch, cache)
        warm = cold if isinstance(cold, str) else child(name, 0, cache)
    if isinstance(cold, str) or isinstance(warm, str):
        return str(warm)
    return cold | {"warm": warm["first"]}


def measure(peer: str | None) -> Iterator[Measured]:
    """Seconds to the first forecast, and windows per second, of the smallest size of
    every family.
    """
    from ltsm_jax.models import FAMILIES

    for family in FAMILIES:
        name = smallest(family)
        found = cold_and_warm(name, BATCH)
        if isinstance(found, str):
            raise ValueError(f"{name} failed: {found}")
        yield Measured(f"{name}: first forecast", found["first"], "s")
        yield Measured(f"{name}: first forecast, warm cache", found["warm"], "s")
        yield Measured(
            f"{name}: windows at batch {BATCH}", found["windows_per_second"], "windows/s"
        )


BENCHMARK = Benchmark("first_forecast", "ten minutes", measure)


def main() -> int:
    import dataclasses
    from typing import Annotated, ClassVar

    from experiments import flags
    from ltsm_jax.models import FAMILIES

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Options of the measurement."""

        program: ClassVar[str] = "experiments.benchmarks.first_forecast"
        families: Annotated[tuple[str, ...], flags.names(tuple(FAMILIES), unset="all")] = ()
        """which families"""
        presets: Annotated[tuple[str, ...], flags.words()] = ()
        """published sizes, instead of the smallest of each family"""
        batch: Annotated[int, flags.whole(0)] = BATCH
        """windows of a call; 0: first forecasts alone"""

    args = flags.parse(Options, sys.argv[1:], __doc__)
    names = args.presets or [smallest(family) for family in args.families or FAMILIES]
    print(
        "| family | preset | parameters | context -> horizon | first forecast cold, s | warm, s | "
        f"windows/s at batch {args.batch} |"
    )
    print("| --- | --- | ---: | --- | ---: | ---: | ---: |")
    for name in names:
        r = cold_and_warm(name, args.batch)
        if isinstance(r, str):
            print(f"| | `{name}` | failed: {r} | | | | |")
            continue
        rate = f"{r['windows_per_second']:g}" if args.batch else ""
        print(
            f"| `{r['family']}` | `{r['preset']}` | {r['parameters'] / 1e6:.1f}M | {r['context']} "
            f"-> {r['horizon']} | {r['first']:.1f} | {r['warm']:.1f} | {rate} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    from experiments import launch

    launch.leave(launch.guarded(main))
