"""What the commands have in common: a base, groups of options, and how they are read."""

import abc
import dataclasses
from typing import Annotated, Any, ClassVar

from ltsm_jax import flags
from ltsm_jax.data.tables import IRREGULAR, MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What is printed."""

    json: bool = False
    """print one JSON object on stdout, and nothing else there"""
    traceback: bool = False
    """show where an error came from (or LTSM_DEBUG=1)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(abc.ABC):
    """One command of `ltsm`; its docstring is what --help says, and its fields are the options."""

    program: ClassVar[str]

    output: Output = dataclasses.field(default_factory=Output)

    @abc.abstractmethod
    def run(self) -> int:
        """Do it; returns the exit code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Licence:
    """Of weights from the hub."""

    accept_license: bool = False
    """accept a licence that forbids commercial use; asked once for each repository"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """How the table is read. Columns that no option names are taken by their names and types; the plan says how."""

    id: Annotated[Any, flags.words()] = None
    """column(s) that tell the items of a long table apart"""
    time: Annotated[Any, flags.words()] = None
    """column(s) of the stamps (date,hour); by default found by their names"""
    target: Annotated[Any, flags.words(unset="found")] = None
    """column(s) to forecast"""
    known: Annotated[Any, flags.words()] = None
    """covariates that are known ahead, as a price; those in --future are"""
    past: Annotated[Any, flags.words()] = None
    """covariates that are known up to the last target"""
    static: Annotated[Any, flags.words()] = None
    """columns that say one thing of an item, as its size"""
    freq: Annotated[str | None, flags.text("STEP")] = None
    """step of the stamps: 15min, h, M, ...; by default found from them"""
    date_format: Annotated[str | None, flags.text("LAYOUT")] = None
    """layout of the dates, as %d/%m/%Y; by default the one that fits"""
    missing: Annotated[str | None, flags.one_of(MISSING, unset="keep")] = None
    """empty cells: error refuses them, interpolate fills them in time, keep leaves them to the model"""
    irregular: Annotated[str | None, flags.one_of(IRREGULAR, unset="error")] = None
    """stamps off the grid: error refuses them, regularise puts rows on it, ignore takes rows as they are"""

    def asked(self) -> dict[str, Any]:
        """Give what was asked for, as keywords of whatever reads a table."""
        found = {}
        for name, value in vars(self).items():
            if value is not None:
                several = list(value) if isinstance(value, tuple) else value
                found[name] = value[0] if isinstance(value, tuple) and len(value) == 1 else several
        return found
