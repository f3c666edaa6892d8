"""Options that several experiments have, beside the checks of `ltsm_jax.flags`, which are found here too."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

from ltsm_jax.data.splits import QUIRKS
from ltsm_jax.data.tables import ReadingOptions
from ltsm_jax.flags import (
    BELOW_1,
    HUGE,
    TINY,
    Compute,
    Reading,
    Tuning,
    UsageError,
    command,
    described,
    exact,
    flag_of,
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
from ltsm_jax.methods.strategies import MIXED

__all__ = [
    "BELOW_1",
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


@dataclasses.dataclass(frozen=True)
class Training(Tuning):
    """Of every run; what is not given is as the model's recipe has it."""

    few_shot: Annotated[float, number(TINY, 1, says="a share above 0 and at most 1")] = 1.0
    """share of the training windows"""


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
    """What every comparison of methods asks for."""

    program: ClassVar[str]  # what `python -m` runs
    data: Annotated[str, text("DATA")] = "ETTh1"
    """benchmark name ($LTSM_DATA, cache or download) or a .csv, .csv.gz or .parquet file"""
    model: Annotated[str, text("MODEL")] = "timer-tiny"
    """shipped name, model folder, original checkpoint, or hub name owner/name[@revision]"""
    accept_license: bool = False
    """accept a licence that forbids commercial use; asked once for each repository"""
    head: Annotated[str | None, text("NAME")] = None
    """put a fresh, untrained head of this name on the model (Model.heads); by default the checkpoint's own stays"""
    methods: Annotated[tuple[str, ...], words()] = ()
    """what to compare"""
    alpha: Annotated[tuple[float, ...], numbers(0, 1, says="between 0 and 1, the weight of the pretrained side")] = (
        0.7,
    )
    """weights of the pretrained side, for the methods that mix"""
    seeds: Annotated[tuple[int, ...], wholes(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = (0, 1, 2)
    """a run for each"""
    horizon: Annotated[int | None, whole(1, unset="recipe")] = None
    """steps to forecast"""
    context: Annotated[int | None, whole(1, unset="recipe")] = None
    """steps the model sees"""
    quirks: Annotated[
        tuple[str, ...],
        names(tuple(sorted(QUIRKS))),
        described(f"released behaviours to follow, of {', '.join(sorted(QUIRKS))}"),
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
        return Path(self.out or f"runs/{'-'.join((self.program.split('.')[-1], *parts))}").expanduser()

    @property
    def tunings(self) -> tuple[tuple[str, float | None], ...]:
        """(method, alpha) of every kind of run; alpha None where a method has none."""
        found = []
        for method in self.methods:
            found += [(method, alpha) for alpha in (self.alpha if method in MIXED else (None,))]
        return tuple(found)

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        found = []
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
