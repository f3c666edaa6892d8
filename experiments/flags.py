"""Options that several experiments have, beside the checks of `ltsm_jax.flags`, which are found
here too.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from ltsm_jax.data.splits import SPLIT_QUIRKS
from ltsm_jax.data.tables import ReadingOptions
from ltsm_jax.flags import (
    BELOW_1,
    FLAG,
    HUGE,
    TINY,
    Compute,
    Reading,
    Tuning,
    UsageError,
    check,
    command,
    described,
    exact,
    flag_of,
    given,
    in_flags,
    known_flags,
    names,
    number,
    numbers,
    one_of,
    parse,
    parse_some,
    path,
    text,
    whole,
    whole_or,
    wholes,
    words,
)
from ltsm_jax.methods.strategies import MIXED, strategy
from ltsm_jax.training import optimizers
from ltsm_jax.training.lanes import ASKED

__all__ = [
    "BELOW_1",
    "FLAG",
    "HUGE",
    "TINY",
    "Devices",
    "Hosts",
    "Options",
    "Reading",
    "Training",
    "UsageError",
    "command",
    "described",
    "exact",
    "flag_of",
    "given",
    "in_flags",
    "known_flags",
    "names",
    "number",
    "numbers",
    "one_of",
    "parse",
    "parse_some",
    "path",
    "text",
    "whole",
    "whole_or",
    "wholes",
    "words",
]


def _betas(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 2 or not all(0 <= value < 1 for value in values):
        raise ValueError(f"{FLAG} must be two numbers in [0, 1), as 0.9,0.999; got {text!r}")
    return values


@dataclasses.dataclass(frozen=True)
class Training(Tuning):
    """Of every run; what is not given is as the model's recipe has it."""

    lr: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        tuple[float, ...] | None, numbers(TINY, HUGE, says="positive", unset="recipe")
    ] = None
    """learning rate; of several, each arm takes that of the lowest validation MSE at the
    first seed
    """
    few_shot: Annotated[float, number(TINY, 1, says="a share above 0 and at most 1")] = 1.0
    """share of the training windows"""
    weight_decay: Annotated[float | None, number(0, HUGE, says="at least 0", unset="recipe")] = None
    """decay of the weights per step, times the learning rate"""
    patience: Annotated[int | None, whole(1)] = None
    """stop after this many epochs without a better validation MSE; by default never"""
    optimizer: Annotated[
        str,
        one_of(optimizers.OPTIMIZERS),
        described(
            "adamw (decay beside the gradient; Adam where there is none), adam (decay in the "
            "gradient) or sgd (momentum: the first of --betas)"
        ),
    ] = "adamw"
    betas: Annotated[tuple[float, ...], check(_betas, "X,X")] = optimizers.BETAS
    """decay of Adam's first and second moment"""
    eps: Annotated[float, number(TINY, HUGE, says="positive")] = optimizers.EPS
    """added to the root of Adam's second moment"""

    @property
    def lrs(self) -> tuple[float | None, ...]:
        """Learning rates to choose from; (None,), that of the config, where there is no choice."""
        return self.lr if self.lr is not None and len(self.lr) > 1 else (None,)

    def unusual(self) -> dict[str, object]:
        """Give what is not as the recipe or the default has it, of the options that earlier
        versions did not have.

        A setting that is as ever has no name in the record of a folder, so that folders of earlier
        versions go on.
        """
        found = {}
        for name in ("weight_decay", "patience", "optimizer", "betas", "eps"):
            value, default = getattr(self, name), getattr(Training, name)
            if value != default:
                found[name] = list(value) if isinstance(value, tuple) else value
        return found


REPORT_BY = ("validation", "last", "best-test")


@dataclasses.dataclass(frozen=True)
class Devices(Compute):
    """Where arrays lie, and what memory a step takes."""

    mesh: Annotated[str | None, text("AXES")] = None
    """devices by axis, as data=4,fsdp=2,tensor=1; by default all on data"""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes at one job."""

    coordinator: Annotated[str | None, text("ADDRESS")] = None
    """address:port of process 0, or auto (SLURM, TPU pod, Open MPI, Kubernetes)"""
    num_processes: Annotated[int | None, whole(1)] = None
    """how many processes there are, with an address"""
    process_id: Annotated[int | None, whole(0)] = None
    """which of them this one is, from 0, with an address"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every comparison of methods."""

    program: ClassVar[str]  # what `python -m` runs
    data: Annotated[str, text("DATA")] = "ETTh1"
    """benchmark name ($LTSM_DATA, cache or download) or a .csv, .csv.gz or .parquet file"""
    model: Annotated[str, text("MODEL")] = "timer-tiny"
    """shipped name, model folder, original checkpoint, or hub name owner/name[@revision]"""
    accept_license: bool = False
    """accept a licence that forbids commercial use; asked once for each repository"""
    head: Annotated[str | None, text("NAME")] = None
    """put a fresh, untrained head of this name on the model (Model.head_names); by default the
    checkpoint's own stays
    """
    methods: Annotated[tuple[str, ...], words()] = ()
    """what to compare"""
    alpha: Annotated[
        tuple[float, ...], numbers(0, 1, says="between 0 and 1, the weight of the pretrained side")
    ] = (0.7,)
    """weights of the pretrained side, for the methods that mix"""
    seeds: Annotated[tuple[int, ...], wholes(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = (
        0,
        1,
        2,
    )
    """a run for each"""
    choose_alpha: bool = False
    """of several --alpha, each method takes the one of lowest validation MSE at the first seed, and
    only that at the others
    """
    origins: Annotated[int, whole(1)] = 1
    """blocks to choose settings by: the validation part, and, rolling back, as many rows before it
    as often, each after training on what lies before it
    """
    score_stride: Annotated[int, whole(1)] = 1
    """validate and test on every N-th start of a window, of all variates; 1: on all, as the
    literature does
    """
    test_each_epoch: bool = False
    """score the test part after every epoch too, for --report-by; nothing is chosen by it"""
    report_by: Annotated[
        str,
        one_of(REPORT_BY),
        described(
            "the epoch whose test error the report shows: validation (the lowest validation MSE), "
            "last, or best-test (the lowest test error, which nobody can know beforehand: a "
            "bound); of runs with --test-each-epoch"
        ),
    ] = "validation"
    lanes: Annotated[str, one_of(ASKED)] = "auto"
    """train runs that are alike as lanes of one program: auto (where a few timed steps say that it
    is quicker), on or off
    """
    horizon: Annotated[int | None, whole(1, unset="recipe")] = None
    """steps to forecast"""
    context: Annotated[int | None, whole(1, unset="recipe")] = None
    """steps the model sees"""
    quirks: Annotated[
        tuple[str, ...],
        names(tuple(sorted(SPLIT_QUIRKS))),
        described(f"released behaviours to follow, of {', '.join(sorted(SPLIT_QUIRKS))}"),
    ] = ()
    out: Annotated[str | None, text("FOLDER")] = None
    """folder of the results; by default runs/EXPERIMENT-DATA-MODEL"""
    plan: bool = False
    """print what would run, and stop"""
    reading: Reading = dataclasses.field(default_factory=Reading)
    training: Training = dataclasses.field(default_factory=Training)
    devices: Devices = dataclasses.field(default_factory=Devices)
    hosts: Hosts = dataclasses.field(default_factory=Hosts)

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        parts = (Path(name).name.split(".")[0] for name in (self.data, self.model))
        return Path(
            self.out or f"runs/{'-'.join((self.program.split('.')[-1], *parts))}"
        ).expanduser()

    @property
    def tunings(self) -> tuple[tuple[str, float | None], ...]:
        """(method, alpha) of every kind of run; alpha None where a method has none."""
        found = []
        for method in self.methods:
            found += [(method, alpha) for alpha in (self.alpha if method in MIXED else (None,))]
        return tuple(found)

    @property
    def over(self) -> tuple[str, ...]:
        """Columns whose value validation chooses for each arm, see `experiments.grid`."""
        chosen = ("alpha",) if self.choose_alpha else ()
        return (*chosen, "lr") if len(self.training.lrs) > 1 else chosen

    def lrs_of(self, method: str) -> Sequence[float | None]:
        """Learning rates of a method to choose from; (None,) where there is no choice, or nothing
        is trained.
        """
        name = method.rpartition("+")[2]
        trained = name != "pruned" and strategy(name, alpha=0.5).phases
        return self.training.lrs if trained else (None,)

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        found = []
        if self.choose_alpha and len(self.alpha) < 2:
            found.append("--choose-alpha chooses among several: give them as --alpha 0.5,0.7,0.9")
        if self.origins > 1 and not self.over:
            found.append("--origins is for choosing settings: give several --lr, or --choose-alpha")
        if self.report_by != "validation" and not self.test_each_epoch:
            found.append(f"--report-by {self.report_by} needs --test-each-epoch")
        if "alpha" in given and not set(self.methods) & set(MIXED):
            found.append(f"--alpha is for {', '.join(MIXED)}, and none of them is among --methods")
        try:
            ReadingOptions(**self.reading.asked())
        except ValueError as err:
            found.append(in_flags(str(err)))
        return found

    def command(self) -> str:
        """Write the command line that asks for the same, on one host or several."""
        place = dataclasses.replace(self, out=str(self.folder))
        hosts = [field.name for field in dataclasses.fields(Hosts)]
        return command(place, always=("data", "model", "out"), without=hosts)
