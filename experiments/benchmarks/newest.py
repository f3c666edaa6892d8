"""How fast are TimesFM 3.0, TiRex-2, TTM r3, Toto 2.0 beside their originals?

Published sizes (331M, 82.5M, 1.5M, 21.9M parameters), float32, CPU. Both sides
have the same random weights: ours are exported and loaded by the original.

Run:   python -m experiments.benchmarks.newest --peer-python PATH
       python -m experiments.benchmarks.newest --peer-python PATH \\
           --families tirex_2,ttm_r3 --repeats 3
Needs: --peer-python, a Python with the originals: `.ci/run peers` makes one in
       .ci/venv-peers. Without it our side is measured alone.
       4 GB of memory a side.
Cost:  six minutes on 2 CPU cores.
Gives: windows a second of forecasts from 512 steps, 96 steps far (TTM r3: 16,
       TimesFM 3.0: 128), on each side in the batches that are quickest for
       it; of TTM r3 also windows a second of a training step with its own
       loss, dropout and AdamW, the batch in parts whose gradients add up: of
       ours as many as `accumulate="auto"` says, of the original the quickest
       of 1, 2, 4 and 8. Both sides run at once and take turns, call by call,
       with as many threads as there are cores; the numbers are medians.
       Beside the clock stand the processor's seconds, which other programs on
       the machine disturb less. Outputs, and the loss before the first step,
       are compared before anything is timed.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from experiments import flags, launch
from experiments.benchmarks import torch_newest
from experiments.benchmarks.rows import Benchmark, Measured

CONTEXT = 512
LARGEST = 1e-3  # relative difference of the outputs, see `compared`


@dataclasses.dataclass(frozen=True)
class Race:
    """A family at a published size. windows, batch: of a forecast, and of a training step; 0 where
    the original does not train.
    """

    preset: str
    windows: int
    horizon: int = 96
    batch: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The calls that are timed."""
        return ("forecast", "train") if self.batch else ("forecast",)


RACES = {
    # Whole outputs of 64 steps: `predict` rounds up to them, as the original's forecasts do.
    # `decode`, which is raced, does not, and the last steps of a part of an output are others.
    "timesfm_3": Race("google/timesfm-3.0-pytorch", 16, horizon=128),
    "tirex_2": Race("NX-AI/TiRex-2", 16),
    "ttm_r3": Race(
        "ibm-granite/granite-timeseries-ttm-r3@52-16-dec-52-r3", 512, horizon=16, batch=64
    ),
    "toto_2": Race("Datadog/Toto-2.0-22m", 64),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    program: ClassVar[str] = "experiments.benchmarks.newest"
    families: Annotated[tuple[str, ...], flags.names(tuple(RACES), unset="all")] = ()
    """which families"""
    repeats: Annotated[int, flags.whole(1)] = 7
    """timed calls of each kind and side"""
    peer_python: Annotated[str | None, flags.text("PATH")] = None
    """a Python that has the originals"""
    side: Annotated[Literal["forecast", "train"] | None, flags.one_of(("forecast", "train"))] = None
    """be our side of one race; set by the measurement itself"""
    folder: Annotated[Path | None, flags.path("FOLDER")] = None
    """what --side reads; set by the measurement itself"""

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together."""
        alone = self.side is not None and (self.folder is None or len(self.families) != 1)
        return ["--side needs --folder and one of --families"] if alone else []


# --- our side


def prepare(race: Race, place: Path, kind: str) -> None:
    """Write fresh weights as the original reads them, and random walks."""
    import jax

    import ltsm_jax
    from ltsm_jax import Forecaster

    model = ltsm_jax.preset(race.preset)
    params = jax.jit(model.init)(jax.random.key(0))
    Forecaster(model, params).export(place / "model", overwrite=True)
    rows = race.batch if kind == "train" else race.windows
    steps = np.random.default_rng(0).normal(size=(rows, 1, CONTEXT + race.horizon))
    walks = np.cumsum(steps, axis=-1).astype(np.float32)
    np.savez(place / "in.npz", context=walks[..., :CONTEXT], target=walks[..., CONTEXT:])


def forecasting(model: Any, params: Any, horizon: int):
    """From series [B, C, T] to the quantiles [B, C, H, Q]."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def quantiles(params, context):
        if model.family == "toto_2":  # without what its leaderboard entry puts around the network
            return model.forecast(params, context, ~jnp.isnan(context), horizon)
        return model.predict(params, context, horizon).quantiles

    return lambda context: np.asarray(quantiles(params, context))


def training(model: Any, params: Any, context: np.ndarray, target: np.ndarray):
    """The loss without dropout, and a call that does one step with it: that of the library's own
    loop, in as many parts as `accumulate="auto"` finds.
    """
    import jax
    import jax.numpy as jnp

    from ltsm_jax import trees
    from ltsm_jax.data.windows import Windows
    from ltsm_jax.layers.runtime import Runtime
    from ltsm_jax.sharding import Placement
    from ltsm_jax.training import TrainConfig, keys, optimizers, parts, step

    before = np.asarray(jax.jit(model.loss)(params, {"context": context, "target": target}))
    n = len(context)
    rows = jnp.arange(n, dtype=jnp.int32)
    values = jnp.asarray(np.concatenate([context, target], axis=-1)[:, 0])
    windows = Windows(
        values,
        starts=jnp.zeros_like(rows),
        rows=rows,
        context_len=context.shape[-1],
        horizon=target.shape[-1],
    )
    config = TrainConfig(
        batch_size=n, weight_decay=torch_newest.WEIGHT_DECAY, clip=math.inf, accumulate="auto"
    )
    moving, frozen = trees.partition(params, trees.select(params, None))
    loss, key = step.as_pytree(model.loss), keys(0)["dropout"]
    config = parts.settled(
        config, moving, frozen, source=windows, loss_fn=loss, key=key, placement=Placement()
    )
    rule = optimizers.Rule.of(config)
    moving = jax.tree.map(step.strong, moving)

    def one_step(moving, state, frozen, windows, key):
        key, own = jax.random.split(key)
        found, _, moving, state = step.update(
            moving,
            state,
            frozen,
            source=windows,
            rows=(rows, jnp.ones(n)),
            rate=torch_newest.LEARNING_RATE,
            key=own,
            loss_fn=loss,
            penalty=None,
            tx=rule.transformation(),
            how=step.How.of(config),
            runtime=Runtime(),
        )
        return moving, state, key, found

    compiled = jax.jit(one_step, donate_argnames=("moving", "state", "key"))
    held = [moving, jax.jit(rule.transformation().init)(moving), key]

    def call():
        moving, state, key = held
        *held[:], found = compiled(moving, state, frozen, windows, key)
        assert jnp.isfinite(found)

    return before, call


def jax_side(family: str, kind: str, place: Path) -> None:
    """Write what we compute, then wait for our turns. Compilation is left out."""
    import jax

    import ltsm_jax

    model, params = ltsm_jax.load(place / "model")
    assert model.family == family
    given = np.load(place / "in.npz")
    params, context, target = jax.device_put(params), given["context"], given["target"]
    if kind == "train":
        found, call = training(model, params, context, target=target)
    else:
        forecast = forecasting(model, params, horizon=target.shape[-1])
        found, call = forecast(context), torch_newest.quickest(forecast, context)
    np.save(place / f"jax_{kind}.npy", found)
    torch_newest.serve(call)


# --- the race


class Side:
    """A process that computes when it is its turn."""

    def __init__(self, name: str, program: list[str]):
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.seconds: dict[str, list[float]] = {"wall": [], "cpu": []}

    def line(self) -> str:
        """Read the next line that it prints. Raises: ValueError with its last words where it has
        ended.
        """
        assert self.process.stdout
        found = self.process.stdout.readline()
        if not found:
            self.errors.seek(0)
            raise ValueError(f"the {self.name} side failed:\n{self.errors.read().strip()[-2000:]}")
        return found

    def wait(self) -> None:
        """Wait until it has computed for the first time; whatever it prints before is its own."""
        while self.line().strip() != "ready":
            pass

    def turn(self) -> None:
        """Let it compute once, and keep the seconds."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for clock, seconds in json.loads(self.line()).items():
            self.seconds[clock].append(seconds)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.errors.close()


def programs(family: str, kind: str, place: Path, peer: str | None) -> dict[str, list[str]]:
    """Command lines of the sides."""
    words = ["--side", kind, "--families", family, "--folder", str(place)]
    found = {"jax": [sys.executable, "-m", "experiments.benchmarks.newest", *words]}
    if peer is not None:
        other = "experiments.benchmarks.torch_newest"
        found["torch"] = [peer, "-m", other, family, kind, str(place)]
    return found


def compared(place: Path, kind: str) -> float:
    """The largest difference of the outputs, relative to the standard deviation of the context or
    to the output itself, whichever is larger; of losses the relative one.

    Fresh weights forecast at any scale: TimesFM 3 takes its own medians into the scale of the rows
    after them, which multiplies what they are from patch to patch.

    Raises: ValueError where it is more than rounding.
    """
    ours, theirs = (np.load(place / f"{side}_{kind}.npy") for side in ("jax", "torch"))
    if ours.shape != theirs.shape:
        raise ValueError(f"{kind}: shapes {ours.shape} of ours and {theirs.shape} of the original")
    unit = np.abs(theirs)
    if kind == "forecast":
        deviation = np.load(place / "in.npz")["context"].std(axis=-1)[..., None, None]
        unit = np.maximum(unit, deviation)
    found = float((np.abs(ours - theirs) / unit).max())
    if not found <= LARGEST:
        raise ValueError(f"{kind}: the two sides differ by {found:.2g}, more than {LARGEST:g}")
    return found


def race(family: str, kind: str, peer: str | None, repeats: int) -> Iterator[Measured]:
    """Windows a second of each side, and ratios of the seconds."""
    one, sides = RACES[family], []
    what = f"{family} {kind}"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(one, place, kind)
        try:
            for name, program in programs(family, kind, place, peer=peer).items():
                sides.append(Side(name, program))
                sides[-1].wait()
            if peer is not None:
                yield Measured(f"{what}: largest difference", compared(place, kind), "relative")
            for number in range(repeats):
                for side in sides if number % 2 == 0 else reversed(sides):
                    side.turn()
        finally:
            for side in sides:
                side.close()
    rows = one.batch if kind == "train" else one.windows
    middle = {}
    for side in sides:
        for clock, seconds in side.seconds.items():
            middle[side.name, clock] = statistics.median(seconds)
        yield Measured(f"{what}: {side.name}", rows / middle[side.name, "wall"], "windows/s")
        yield Measured(f"{what}: {side.name}", middle[side.name, "cpu"], "s of the processor")
    if peer is not None:
        for clock, unit in (("wall", "s"), ("cpu", "s of the processor")):
            ratio = middle["jax", clock] / middle["torch", clock]
            yield Measured(f"{what}: jax / torch in {unit}", ratio, "ratio")


def measure(peer: str | None, args: Options | None = None) -> Iterator[Measured]:
    """Races of all families, one after the other."""
    asked = args or Options()
    for family in asked.families or RACES:
        for kind in RACES[family].kinds:
            yield from race(
                family, kind, asked.peer_python if args else peer, repeats=asked.repeats
            )


BENCHMARK = Benchmark("newest", "ten minutes", measure, peer="newest")


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.side is not None:
        assert args.folder is not None
        jax_side(args.families[0], args.side, args.folder)
        return 0
    for one in measure(None, args):
        print(f"{one.what}: {one.value:.4g} {one.unit}", flush=True)
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
