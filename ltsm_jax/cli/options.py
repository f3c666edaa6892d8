"""Options and steps that the commands share: groups of options, reading of table and model, and the
plan.
"""

import abc
import dataclasses
from typing import Annotated, Any, ClassVar

import tyro

from ltsm_jax import flags, trees
from ltsm_jax.cli import printing
from ltsm_jax.data import DataError, Panel
from ltsm_jax.data.tables import IRREGULAR, MISSING
from ltsm_jax.forecaster import Forecaster

MODEL = (
    "shipped name, model folder, what `ltsm fit` wrote, original checkpoint, or name of the hub "
    "(owner/name)"
)


def quantile_levels() -> flags.Check:
    """Take quantile levels, or `none`."""

    def read(text: str) -> tuple[float, ...]:
        return (
            ()
            if text == "none"
            else flags.read_numbers(text, flags.TINY, flags.BELOW_1, says="between 0 and 1")
        )

    return flags.check(read, "X,X,...")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Options of the output."""

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
class Columns:
    """How the rows of a table are read. Columns that no option names are taken by their names and
    types.
    """

    id: Annotated[Any, flags.words()] = None
    """column(s) that tell the items of a long table apart"""
    time: Annotated[Any, flags.words()] = None
    """column(s) of the stamps (date,hour); by default found by their names"""
    target: Annotated[Any, flags.words(unset="found")] = None
    """column(s) of the targets"""
    freq: Annotated[str | None, flags.text("STEP")] = None
    """step of the stamps: 15min, h, M, ...; by default found from them"""
    date_format: Annotated[str | None, flags.text("LAYOUT")] = None
    """layout of the dates, as %d/%m/%Y; by default the one that fits"""
    irregular: Annotated[str | None, flags.one_of(IRREGULAR, unset="error")] = None
    """stamps off the grid: error refuses them, regularise puts rows on it, ignore takes rows as
    they are
    """

    def asked(self) -> dict[str, Any]:
        """Give what was asked for, as keywords of whatever reads a table."""
        return flags.keywords(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Columns):
    """How the table is read. Columns that no option names are taken by their names and types; the
    plan says how.
    """

    known: Annotated[Any, flags.words()] = None
    """covariates that are known ahead, as a price; those in --future are"""
    past: Annotated[Any, flags.words()] = None
    """covariates that are known up to the last target"""
    static: Annotated[Any, flags.words()] = None
    """columns that say one thing of an item, as its size"""
    missing: Annotated[str | None, flags.one_of(MISSING, unset="keep")] = None
    """empty cells: error refuses them, interpolate fills them in time, keep leaves them to the
    model
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnTable(Command):
    """A command about a table: what `forecast`, `fit`, `prune`, `evaluate` and `compare` share."""

    data: Annotated[tyro.conf.Positional[str], flags.text("DATA")]
    """table: .csv, .parquet or .xlsx, or the name of a benchmark"""
    horizon: Annotated[int, flags.whole(1)]
    """rows to forecast"""
    plan: bool = False
    """say what would be done, and stop"""
    table: Table = dataclasses.field(default_factory=Table)
    licence: Licence = dataclasses.field(default_factory=Licence)

    def load(self, source: str) -> Forecaster:
        """Load a model or a saved forecaster."""
        return Forecaster.load(source, accept_license=self.licence.accept_license)

    def read(self, forecaster: Forecaster, future: str | None = None) -> Panel:
        """Read the table, as the forecaster was fitted on one where nothing else is asked for.

        Raises: DataError, also for a file that is not there.
        """
        try:
            return forecaster.read(self.data, future=future, **self.table.asked())
        except FileNotFoundError as error:
            raise DataError(str(error)) from error

    def announce(self, plan: dict[str, Any], notes: tuple[str, ...] = ()) -> bool:
        """Say the plan on stderr, or, with --plan and --json, on stdout.

        Returns: whether to stop there.
        """
        if self.plan and self.output.json:
            printing.show_json({"plan": plan, "notes": list(notes)})
        else:
            printing.say(printing.facts(plan))
            if notes:
                printing.say(printing.notes(notes))
        return self.plan


def of_table(panel: Panel) -> dict[str, str]:
    """Say what a table holds: items, rows, columns by their roles, step and stamps."""
    shortest, longest = panel.lengths.min(), panel.lengths.max()
    rows = f"{shortest:,} to {longest:,} rows" if shortest < longest else f"{longest:,} rows"
    items = (
        f"{panel.n_items:,} items of {rows}, {panel.n_rows:,} in all" if panel.n_items > 1 else rows
    )
    static = () if panel.static is None else tuple(map(str, panel.static.columns))
    roles = {
        "id": panel.id_columns,
        "time": (panel.time_name,) if panel.time_name else (),
        "target": panel.columns,
        "known ahead": panel.known,
        "past": panel.past,
        "static": static,
    }
    columns = [f"{role} {_few(names)}" for role, names in roles.items() if names]
    found = {"data": f"{panel.name}: {items}", "columns": "; ".join(columns)}
    step = panel.freq or "unknown"
    ahead = panel.stamps_after(1) if panel.first is not None else None
    if ahead is not None:
        first, last = (str(stamp)[:16].replace("T", " ") for stamp in (ahead.min(), ahead.max()))
        step += f"; what is forecast begins at {first}" + (f" to {last}" if first != last else "")
    return found | {"step": step}


def _few(names: tuple[Any, ...]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(map(str, names[:6])) + more


def of_model(source: str, forecaster: Forecaster) -> str:
    """Say what a model is, in a line."""
    model = forecaster.model
    said = (
        f"{source}: {model.family}, {trees.count(forecaster.params):,} parameters, licence "
        f"{forecaster.licence}"
    )
    if forecaster.baseline is not None:
        said += f"; forecasts with {forecaster.baseline}, as its verdict says"
    return said
