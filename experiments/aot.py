"""Does it fit, and what does it cost?

Compiles the training step for machines that are not at hand.

Run:   python -m experiments.aot --family timer --topology v5e:4x4 \\
           --mesh data=4,fsdp=4
       python -m experiments.aot --preset amazon/chronos-bolt-base \\
           --topology h200:8 --batch 1024 --compute bfloat16
       python -m experiments.aot --family time_moe --preset small \\
           --topology cpu:8 --mesh data=2,fsdp=2,tensor=2
Needs: for TPUs  pip install "ltsm-jax[tpu-aot]" (libtpu), for GPUs
       pip install "ltsm-jax[cuda-aot]" (the CUDA compiler); neither a TPU nor
       a GPU nor a driver. The weights are not needed either.
Cost:  a quarter of a minute to some minutes on 2 CPU cores, by the number of
       layers.
Gives: bytes on each device, floating-point operations, collectives, and the
       verdict. Exit code 0: it fits, 1: it does not, 2: the options do not go
       together. What is compiled is the program that `ltsm_jax.training.fit`
       runs (`training.step.trace_step`), on windows of a series of --variates
       and --rows. Not counted: the forward passes of the validation between
       epochs, what the runtime takes, and the checkpoint that SFF keeps beside
       its mixture.
"""

import dataclasses
import difflib
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from experiments import counting, flags, launch, targets
from experiments.counting import Traffic
from experiments.targets import Target
from ltsm_jax import sharding, training, trees
from ltsm_jax.data.windows import windows_between
from ltsm_jax.methods import binding
from ltsm_jax.methods.phases import Phase, trainable_mask
from ltsm_jax.models import FAMILIES, Model, near_presets, preset
from ltsm_jax.tasks import forecasting
from ltsm_jax.training.step import trace_step

FREQ = "h"  # of the series, for families that want to know
SMALL = "small"  # the preset of every family that tests use


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of one compilation."""

    program: ClassVar[str] = "experiments.aot"
    topology: Annotated[str, flags.text("TARGET")]
    """v5e:4x4, v4:2x2x2, h200:8, h100:2x8 (hosts x GPUs), cpu:8, ..."""
    family: Annotated[str | None, flags.text("NAME")] = None
    """of the model; alone it means the first of its published sizes"""
    preset: Annotated[str | None, flags.text("NAME")] = None
    """published size: checkpoint or hub name, or "small" for the size of tests"""
    batch: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """windows per step, all devices together"""
    context: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """steps the model sees"""
    horizon: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """steps of the forecast, for --mode direct"""
    mode: Annotated[forecasting.Mode | None, flags.one_of(forecasting.MODES, unset="recipe")] = None
    """training loss: the family's own (ims) or direct"""
    trainable: Annotated[
        Literal["all", "head", "recipe"], flags.one_of(("all", "head", "recipe"))
    ] = "all"
    """what is trained: all, head or recipe"""
    variates: Annotated[int, flags.whole(1)] = 7
    """of the series; 7, as ETTh1"""
    rows: Annotated[int, flags.whole(2)] = 17420
    """of the series; 17420, as ETTh1"""
    json: bool = False
    """print the report as a line of JSON"""
    row: bool = False
    """print a row of the table in TPU.md"""
    devices: flags.Devices = dataclasses.field(default_factory=flags.Devices)

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together."""
        return ["--json and --row: give one of the two"] if self.json and self.row else []


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of one compilation; all sizes are bytes on one device.

    Attributes:
      model, parameters, topology, devices, mesh, batch, context, horizon: what was compiled.
      settings: flags that are not at their defaults.
      state: parameters, gradients' moments and the other arguments of the step. kept: what `fit`
        keeps beside them, the weights it started from and the best ones so far. temporary: what the
        step itself needs beyond its arguments; None where the compiler gave up. capacity: what
        programs can take; None where it is not known.
      needed: state, kept and temporary together.
      flops: of the matrix products, all devices together, one step; compiler_flops: of one device,
        as the compiler counts, loops' bodies once; None where it says nothing.
      collectives: by kind, of one step. seconds: of the compilation.
    """

    model: str
    parameters: int
    topology: str
    devices: int
    mesh: str
    batch: int
    context: int
    horizon: int
    settings: dict[str, Any]
    state: int
    kept: int
    temporary: int | None
    needed: int
    capacity: int | None
    flops: int
    compiler_flops: float | None
    collectives: dict[str, Traffic]
    seconds: float

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the capacity is not known."""
        return None if self.capacity is None else self.needed <= self.capacity

    @property
    def per_device(self) -> int:
        """Windows that one device has in memory at a time."""
        sizes = dict(item.split("=") for item in self.mesh.split(","))
        return self.batch // (
            int(sizes["data"]) * int(sizes["fsdp"]) * self.settings.get("accumulate", 1)
        )


# --------------------------------------------------------------------------------------------------
# what to compile


def find_model(family: str | None, name: str | None) -> tuple[str, Model]:
    """(name, model) that --family and --preset mean: a published size, or "small" of a family.

    Raises: ValueError for names that are unknown or do not belong together.
    """
    if family is not None and family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"--family: unknown {family!r}{hint}; known: {', '.join(FAMILIES)}")
    if family is None and (name is None or name == SMALL):
        raise ValueError(
            "--family names the model, or --preset one published size; families: "
            f"{', '.join(FAMILIES)}"
        )
    if family is None:
        return str(name), preset(str(name))
    cls = FAMILIES[family]
    if name == SMALL:
        return f"{family} ({SMALL})", cls(cls.small())
    name = next(iter(cls.presets())) if name is None else name
    if name not in cls.presets():
        near = near_presets(name)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(
            f"--preset: {family} has no {name!r}{hint}; it has: {', '.join(cls.presets())}, {SMALL}"
        )
    return name, cls(cls.presets()[name])


def ready(model: Model, n_variates: int) -> tuple[Model, trees.Tree]:
    """The model made ready for a series, and the shapes of its parameters."""
    made = []

    def build():
        key = training.keys(0)["init"]
        made[:] = model.for_series(model.init(key), n_variates=n_variates, freq=FREQ, key=key)
        return made[1]

    shapes = jax.eval_shape(build)
    return made[0], shapes


@dataclasses.dataclass(frozen=True)
class Job:
    """One step to be compiled: everything `trace_step` wants, and what to call it."""

    name: str
    model: Model
    params: trees.Tree  # shapes with shardings
    source: Any  # windows
    loss: Any
    config: training.TrainConfig
    batch: int
    trainable: trees.Tree | None
    target: Target
    mesh: jax.sharding.Mesh | None
    notes: tuple[str, ...]


def resolve(args: Options, target: Target) -> Job:
    """Flags to a job, with the model's recipe for what they leave out.

    Raises: ValueError for flags that do not go together.
    """
    name, model = find_model(args.family, args.preset)
    model, shapes = ready(model, args.variates)
    mesh = sharding.make_mesh(args.devices.mesh, target.devices)
    notes: tuple[str, ...] = ()
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(target.devices[0]), shapes)
    else:
        table, notes = sharding.specs(shapes, model.shard_rules, mesh)
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), table)
    # a new struct: the weak type of flax's ones must not come along
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
    )
    mode = args.mode or binding.default_mode(model)
    recipe = model.recipe()
    horizon = model.horizon if mode == "ims" else args.horizon or recipe.horizon
    if args.horizon not in (None, horizon):
        raise ValueError(
            f"--horizon {args.horizon}: the family's own loss takes {horizon} steps; see --mode "
            "direct"
        )
    how = args.devices
    changes = {"compute": how.compute, "accumulate": how.accumulate, "remat": how.remat}
    config = binding.train_config(
        model, **changes | ({} if args.batch is None else {"batch_size": args.batch})
    )
    assert config.batch_size is not None, "filled"
    values, joint = np.zeros((args.variates, args.rows), np.float32), model.variates == "joint"
    source = windows_between(
        values,
        0,
        args.rows,
        context_len=args.context or recipe.context_len,
        horizon=horizon,
        joint=joint,
    )
    if source.n < config.batch_size:
        raise ValueError(
            f"--batch {config.batch_size}: the series has only {source.n} windows; see --rows, "
            "--variates"
        )
    trainable = trainable_mask(Phase(args.trainable), model, params)
    loss = forecasting.loss_fn(model, mode)
    return Job(
        name=name,
        model=model,
        params=params,
        source=source,
        loss=loss,
        config=config,
        batch=config.batch_size,
        trainable=trainable,
        target=target,
        mesh=mesh,
        notes=notes,
    )


# --------------------------------------------------------------------------------------------------
# compiling


def bytes_on_one(tree: trees.Tree) -> int:
    """Bytes of a tree of shapes on one device; a leaf without sharding is whole there."""

    def size(x):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * jnp.dtype(x.dtype).itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def compile_step(job: Job) -> Report:
    """Compiles the step and reads off what it takes.

    Raises: ValueError where loss, context, horizon and batch do not go together.
    """
    traced = trace_step(
        job.loss, job.params, job.source, config=job.config, trainable=job.trainable
    )
    began = time.monotonic()
    moving = job.params if job.trainable is None else trees.partition(job.params, job.trainable)[0]
    trained, capacity = bytes_on_one(moving), job.target.capacity
    kept = 2 * trained
    state = (
        bytes_on_one(job.params) + 2 * trained
    )  # Adam's two moments; the compiler's figure also has its padding
    temporary, compiler_flops, found = None, None, {}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as err:
        short = targets.shortage(str(err))
        if short is None:
            raise
        needed, capacity = short.needed + kept + (0 if short.whole else state), short.capacity
    else:
        memory: Any = compiled.memory_analysis()
        state = memory.argument_size_in_bytes
        temporary = (
            memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
        needed = state + kept + temporary
        compiler_flops = _compiler_flops(compiled)
        found = counting.collectives(compiled.as_text() or "")
    defaults = {"compute": "float32", "accumulate": 1, "remat": "none"}
    settings = {
        k: v
        for k, v in dataclasses.asdict(job.config).items()
        if k in defaults and v != defaults[k]
    }
    if job.trainable is not None:
        settings["trainable"] = trees.count(moving)
    return Report(
        model=job.name,
        parameters=trees.count(job.params),
        topology=job.target.name,
        devices=1 if job.mesh is None else job.mesh.size,
        mesh=mesh_text(job.mesh),
        batch=job.batch,
        context=job.source.context_len,
        horizon=job.source.horizon,
        settings=settings,
        state=state,
        kept=kept,
        temporary=temporary,
        needed=needed,
        capacity=capacity,
        flops=counting.product_flops(traced.jaxpr),
        compiler_flops=compiler_flops,
        collectives=found,
        seconds=time.monotonic() - began,
    )


def _compiler_flops(compiled: Any) -> float | None:
    found: Any = compiled.cost_analysis()  # a list in some versions of JAX, None on some platforms
    found = found[0] if isinstance(found, list) and found else found
    return found.get("flops") if found else None


def mesh_text(mesh: jax.sharding.Mesh | None) -> str:
    """A mesh as --mesh takes it."""
    sizes = dict.fromkeys(sharding.AXES, 1) if mesh is None else mesh.shape
    return ",".join(f"{axis}={sizes[axis]}" for axis in sharding.AXES)


# --------------------------------------------------------------------------------------------------
# saying it


def advice(report: Report) -> list[str]:
    """Suggest flags to try where the step does not fit; estimates, since memory is not quite linear
    in the batch.
    """
    if report.fits is not False or report.capacity is None:
        return []
    fixed = report.state + report.kept
    sizes = {}
    for item in report.mesh.split(","):
        axis, size = item.split("=")
        sizes[axis] = int(size)
    found = []
    spread = report.devices // sizes["tensor"]
    if sizes["fsdp"] < spread and fixed > report.capacity / 8:
        tensor = f",tensor={sizes['tensor']}" if sizes["tensor"] > 1 else ""
        found.append(
            f"--mesh data=1,fsdp={spread}{tensor}  splits parameters and optimiser further"
        )
    room, rows = report.capacity - fixed, report.per_device
    if room <= 0:
        return [
            *found,
            "more devices, or train fewer parameters: weights and optimiser alone are too much",
        ]
    if report.settings.get("compute", "float32") == "float32":
        found.append("--compute bfloat16  halves most of what the backward pass keeps")
    if report.settings.get("remat", "none") == "none":
        found.append(
            '--remat "all but products"  computes again what is between the matrix products'
        )
    parts = math.ceil((report.needed - fixed) / room)
    if divisor := next((d for d in range(parts, rows + 1) if rows % d == 0), None):
        found.append(
            f"--accumulate {report.settings.get('accumulate', 1) * divisor}  takes the batch in "
            "parts"
        )
        found.append(f"--batch {report.batch // divisor}")
    else:
        found.append(
            f"more devices: one window ({report.context} steps) a device and part is too much"
        )
    if (
        report.topology.split(":")[0] in targets.GPUS
        and report.needed <= report.capacity / targets.GPU_SHARE * 0.95
    ):
        found.append(
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment lets JAX take 95 % of the "
            "GPU's memory"
        )
    return found


def gib(n: float) -> str:
    """Bytes in GiB, the unit in which compilers and clouds count memory."""
    return f"{n / targets.GIB:.2f}"


def flops(n: float) -> str:
    """Operations with a prefix."""
    power, prefix = next((p for p in ((15, "P"), (12, "T"), (9, "G")) if n >= 10 ** p[0]), (6, "M"))
    return f"{n / 10**power:.3g} {prefix}FLOP"


def text(report: Report) -> str:
    """The report for people."""
    mib = 2**20
    settings = "".join(f", {name} {value}" for name, value in report.settings.items())
    traffic = ", ".join(
        f"{t.count} {kind} ({t.bytes / mib:.0f} MiB)" for kind, t in report.collectives.items()
    )
    compiler = (
        "says nothing"
        if report.compiler_flops is None
        else f"counts {flops(report.compiler_flops)}"
    )
    temporary = "too much" if report.temporary is None else gib(report.temporary)
    of = "" if report.capacity is None else f" of {gib(report.capacity)}"
    lines = [
        f"{report.model}: {report.parameters / 1e6:.1f} M parameters on {report.topology}, "
        f"{report.mesh}",
        f"  batch {report.batch} of {report.context} + {report.horizon} steps, "
        f"{report.per_device} on a device at a time{settings}",
        "  GiB on a device",
        f"    {gib(report.state):>8}  arguments of the step: parameters, optimiser, series",
        f"    {gib(report.kept):>8}  kept beside: the weights it began with, and the best ones",
        f"    {temporary:>8}  of the step itself",
        f"    {gib(report.needed):>8}  together{of}",
        f"  matrix products of a step: {flops(report.flops)}, "
        f"{flops(report.flops / report.devices)} a device; the compiler {compiler} a device",
        "  collectives of a step: "
        f"{traffic or ('unknown' if report.temporary is None else 'none')}",
        f"  compiled in {report.seconds:.0f} s",
    ]
    if report.fits is None:
        return "\n".join([*lines, "No verdict: the memory of this target is not known."])
    gap = report.needed - (report.capacity or 0)
    if report.fits:
        return "\n".join([*lines, f"FITS, {gib(-gap)} GiB are left on each device."])
    return "\n".join(
        [
            *lines,
            f"DOES NOT FIT: {gib(gap)} GiB are lacking on each device. Try:",
            *(f"  {line}" for line in advice(report)),
        ]
    )


def row(report: Report) -> str:
    """The report as a row of the table in TPU.md."""
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items()) or "defaults"
    mesh = (
        ", ".join(item for item in report.mesh.split(",") if not item.endswith("=1"))
        or "one device"
    )
    traffic = sum(t.bytes for t in report.collectives.values()) / targets.GIB
    step = "-" if report.temporary is None else gib(report.temporary)
    verdict = {True: "yes", False: "**no**", None: "?"}[report.fits]
    cells = (
        f"{report.model} ({report.parameters / 1e6:.1f} M)",
        report.topology,
        mesh,
        f"{report.batch} x ({report.context} + {report.horizon})",
        settings,
        gib(report.state + report.kept),
        step,
        gib(report.needed) + (f" / {gib(report.capacity)}" if report.capacity else ""),
        verdict,
        flops(report.flops),
        f"{traffic:.2f}",
    )
    return f"| {' | '.join(cells)} |"


# --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Raises: UsageError listing every bad flag."""
    return flags.parse(Options, argv, __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.aot`; returns the exit code: 0 fits (or not known), 1 does not, 2
    can't be asked.
    """
    return launch.guarded(lambda: _aot(sys.argv[1:] if argv is None else argv))


def _aot(argv: Sequence[str]) -> int:
    options, problems = parse(argv), []
    for check in (
        lambda: find_model(options.family, options.preset),
        lambda: targets.parse(options.topology),
    ):
        try:
            check()
        except ValueError as err:
            problems.append(str(err))
    if problems:
        raise flags.UsageError("\n".join(problems))
    job = resolve(options, targets.find(options.topology))
    for note in job.notes:
        print(note, file=sys.stderr)
    report = compile_step(job)
    if options.json:
        print(json.dumps(dataclasses.asdict(report) | {"fits": report.fits}))
    else:
        print(row(report) if options.row else text(report))
    return 1 if report.fits is False else 0


if __name__ == "__main__":
    launch.leave(main())
