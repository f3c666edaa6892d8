"""Command-line options: each is one field of a dataclass, with type, default, text and check.

    @dataclasses.dataclass(frozen=True)
    class Options:
        program: ClassVar[str] = "ltsm mine"
        seeds: Annotated[tuple[int, ...], wholes(0, says="at least 0")] = (0, 1, 2)
        "seeds of the runs"

    options = flags.parse(Options, sys.argv[1:], __doc__)

`parse` names everything that is wrong in one UsageError; `--help` is the module's docstring and a
line per field. A field that is itself a dataclass is a group of options: its name is a title in
--help, no part of the options' names.
"""

import dataclasses
import difflib
import math
import re
import shlex
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ltsm_jax.data.panel_tables import PanelOptions
from ltsm_jax.data.tables import IRREGULAR, MISSING, ReadingOptions
from ltsm_jax.tasks import forecasting
from ltsm_jax.training.config import COMPUTE, REMAT
from ltsm_jax.training.optimizers import SCHEDULES

T = TypeVar("T")
Check = PrimitiveConstructorSpec
TINY = sys.float_info.min
HUGE = sys.float_info.max
BELOW_1 = math.nextafter(1.0, 0.0)
FLAG = "{flag}"  # in the text of a check: the name of the option that it is asked about


class UsageError(ValueError):
    """Flags, files and lengths that do not work; the message lists all of them."""


class Problem(str):
    """Stands in a field for a value that failed its check, until all problems are known; says what
    is wrong.
    """


# --------------------------------------------------------------------------------------------------
# checks: what an option takes


def exact(value: Any) -> str:
    """Write a value so that reading gives it back: 0.7, 1, 1e-05, 0.30000001."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def written(value: Any) -> str:
    """Write the value of an option as the command line takes it."""
    if isinstance(value, tuple | list):
        return ",".join(exact(item) for item in value)
    return exact(value)


def check(read: Callable[[str], Any], metavar: str, unset: str = "none") -> Check:
    """Make a check from a function that reads a value or raises ValueError; `unset`: what --help
    calls None.
    """

    def construct(words: list[str]) -> Any:
        try:
            return read(words[0])
        except ValueError as err:
            return Problem(err)

    def show(value: Any) -> list[str]:
        return [unset if value is None or value == () else written(value)]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=construct,
        is_instance=lambda value: True,
        str_from_instance=show,
    )


def _items(kind: Callable[[str], Any], text: str) -> tuple[Any, ...]:
    """Read "a,b,c": no empty item, none twice."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"{FLAG} {text!r}: an empty item; write them as a,b,c")
    values = []
    for item in items:
        try:
            values.append(kind(item))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{FLAG}: {item!r} is not {what}") from None
    if len(set(values)) < len(values):
        raise ValueError(f"{FLAG} {text!r}: duplicate item")
    return tuple(values)


def _numbers(
    kind: Callable[[str], Any], low: float, high: float, says: str, text: str
) -> tuple[Any, ...]:
    values = _items(kind, text)
    bad = [value for value in values if not low <= value <= high]
    if bad:
        raise ValueError(f"{FLAG} must be {says}; got {', '.join(map(str, bad))}")
    return values


def _one(values: Sequence[Any], text: str) -> Any:
    if len(values) > 1:
        raise ValueError(f"{FLAG} takes one value; got {text!r}")
    return values[0]


def wholes(low: float, high: float = math.inf, *, says: str, unset: str = "none") -> Check:
    """Take whole numbers in [low, high], separated by commas; `says` puts the range in words."""
    return check(lambda text: _numbers(int, low, high, says=says, text=text), "N,N,...", unset)


def whole(low: float, high: float = math.inf, *, says: str = "", unset: str = "none") -> Check:
    """Take one whole number in [low, high]."""
    words = says or f"at least {low}"
    return check(
        lambda text: _one(_numbers(int, low, high, says=words, text=text), text), "N", unset
    )


def whole_or(word: str, low: float) -> Check:
    """Take one whole number of at least `low`, or a word."""

    def read(text: str) -> int | str:
        says = f"at least {low}, or {word}"
        return (
            word if text == word else _one(_numbers(int, low, math.inf, says=says, text=text), text)
        )

    return check(read, "N")


def read_numbers(text: str, low: float, high: float, *, says: str) -> tuple[float, ...]:
    """Read numbers in [low, high], separated by commas.

    Raises: ValueError; `FLAG` in its message stands for the option.
    """
    return _numbers(float, low, high, says=says, text=text)


def numbers(low: float, high: float, *, says: str, unset: str = "none") -> Check:
    """Take numbers in [low, high], separated by commas."""
    return check(lambda text: _numbers(float, low, high, says=says, text=text), "X,X,...", unset)


def number(low: float, high: float, *, says: str, unset: str = "none") -> Check:
    """Take one number in [low, high]."""
    return check(
        lambda text: _one(_numbers(float, low, high, says=says, text=text), text), "X", unset
    )


def number_or(word: str, low: float, high: float, *, unset: str = "none") -> Check:
    """Take one number in [low, high], or a word."""

    def read(text: str) -> float | str:
        says = f"between {low:g} and {high:g}, or {word}"
        return (
            word if text == word else _one(_numbers(float, low, high, says=says, text=text), text)
        )

    return check(read, "X", unset)


def unknown(what: str, items: Sequence[str], known: Sequence[str]) -> str:
    """Say that names are not among the known ones, with the nearest of those."""
    near = []
    for item in items:
        near += difflib.get_close_matches(item, known, 1)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return f"{what}: unknown {', '.join(map(repr, items))}{hint}; known: {', '.join(known)}"


def _names(known: Sequence[str], text: str) -> tuple[str, ...]:
    items = _items(str, text)
    strange = [item for item in items if item not in known]
    if strange:
        raise ValueError(unknown(FLAG, strange, known))
    return items


def names(known: Sequence[str], *, unset: str = "none") -> Check:
    """Take some of the known names, separated by commas."""
    return check(lambda text: _names(known, text), "NAME,...", unset)


def one_of(known: Sequence[str], *, unset: str = "none") -> Check:
    """Take one of the known names."""

    def read(text: str) -> str:
        if text not in known:
            raise ValueError(unknown(FLAG, [text], known))
        return text

    return check(read, "NAME", unset)


def words(*, unset: str = "none") -> Check:
    """Take any words, separated by commas."""
    return check(lambda text: _items(str, text), "NAME,...", unset)


def text(metavar: str = "TEXT", *, unset: str = "none") -> Check:
    """Take any text."""
    return check(str, metavar, unset)


def path(metavar: str = "PATH", *, unset: str = "none") -> Check:
    """Take a file or folder; ~ is the home folder."""
    return check(lambda text: Path(text).expanduser(), metavar, unset)


REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _plain(info: PrimitiveTypeInfo) -> Check | None:
    """Give fields that say nothing but their type the same kind of check, so that their problems
    are collected too.
    """
    kind = info.type
    union = get_origin(kind) in (Union, types.UnionType)
    parts = [part for part in get_args(kind) if part is not type(None)] if union else [kind]
    if len(parts) == 1 and get_origin(parts[0]) is Literal:
        return one_of(get_args(parts[0]))
    if parts == [str]:
        return text()
    if parts == [Path]:
        return path()
    if parts == [int]:
        return whole(-math.inf)
    if parts == [float]:
        return number(-HUGE, HUGE, says="finite")
    return None


def described(help_text: str) -> Any:
    """The text of an option where a docstring cannot hold it, as it lists names that the code
    knows.
    """
    return tyro.conf.arg(help=help_text)


# --------------------------------------------------------------------------------------------------
# reading a command line


def leaves(options: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Every option with its value, those of groups included, in the order of --help."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value)
        else:
            yield field, value


def flag_of(field: str) -> str:
    """Name of the option of a field: "few_shot" is --few-shot."""
    return f"--{field.replace('_', '-')}"


def known_flags(cls: type) -> list[str]:
    """Every option of a program, as it is written."""
    found = []
    for field in dataclasses.fields(cls):
        group = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        found += known_flags(group) if isinstance(group, type) else [flag_of(field.name)]
    return found


def program_of(options: Any) -> str:
    """The command that a shell runs: `program`, with `python -m` where it is a module with dots."""
    return options.program if "." not in options.program else f"python -m {options.program}"


def parse_some(cls: type[T], argv: Sequence[str], doc: str | None) -> tuple[T, list[str]]:
    """Read the options of `cls` (its `program` is the command), and leave alone what it does not
    know.

    Raises: UsageError listing every value that fails its check, and what `cls.problems(given)`
    finds where all pass.
    """
    with REGISTRY:  # as an argument the oldest supported tyro does not take it
        options, rest = tyro.cli(
            cls,
            prog=program_of(cls),
            description=textwrap.indent(
                doc or "", " ", lambda line: True
            ),  # tyro joins lines that begin with a letter
            args=list(argv),
            return_unknown_args=True,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    problems = []
    for field, value in leaves(options):
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Problem):
                problems.append(item.replace(FLAG, flag_of(field.name)))
    if problems:
        raise UsageError("\n".join([*problems, *(_unknown_options(cls, rest) if rest else [])]))
    return options, rest


def parse(cls: type[T], argv: Sequence[str], doc: str | None) -> T:
    """Read a command line that has no other options than those of `cls`.

    A method `problems(given)` of `cls`, where there is one, says what is wrong with options that do
    not go together; `given` are the names of the fields that the command line sets.
    Raises: UsageError listing everything that is wrong.
    """
    options, rest = parse_some(cls, argv, doc)
    problems = _unknown_options(cls, rest)
    judge = getattr(options, "problems", None)
    if judge is not None:
        problems += judge(given(argv))
    if problems:
        raise UsageError("\n".join(problems))
    return options


def given(argv: Sequence[str]) -> set[str]:
    """Names of the fields that a command line sets."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def _unknown_options(cls: type, rest: Sequence[str]) -> list[str]:
    known, problems, after = known_flags(cls), [], False
    for word in rest:
        if word.startswith("-") or not after:  # a word behind an unknown option is its value
            near = difflib.get_close_matches(word.split("=")[0], known, 1)
            problems.append(
                f"unknown argument {word!r}" + (f" (did you mean {near[0]}?)" if near else "")
            )
        after = word.startswith("-")
    return problems


def command(options: Any, always: Sequence[str] = (), without: Sequence[str] = ()) -> str:
    """Write the command line that asks for these options; defaults are left out, but for fields
    that `always` names.

    without: fields that are no part of what is asked for.
    """
    parts = program_of(options).split()
    for field, value in leaves(options):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name in without or (value == default and field.name not in always):
            continue
        parts += [flag_of(field.name), *([] if value is True else [written(value)])]
    return shlex.join(parts)


# --------------------------------------------------------------------------------------------------
# messages of the library in the words of a command line

# Options of the library's functions that are options here, under their own name where nothing else
# is said.
_READING = [field.name for field in dataclasses.fields(PanelOptions) if field.name != "name"]
_SAME_NAMES = (
    *_READING,
    *("horizon", "alpha", "mode", "epochs", "batch_size", "lr", "schedule", "few_shot"),
    *("first", "mesh", "accumulate", "compute", "remat"),
)
PYTHON_NAMES = {name: name for name in _SAME_NAMES}
PYTHON_NAMES |= {"quantile_levels": "levels", "context_len": "context"}
_VALUE = (
    r"(?P<none>\(\))|(?P<list>\[[^\]\n]*\])"
    r"""|(?P<quote>['"])(?P<quoted>[^'"\n]*)(?P=quote)|(?P<bare>[\w.+-]*\w|\.\.\.)"""
)
_KEYWORD = re.compile(
    rf"(?<![\w.\-]){'(?P<name>' + '|'.join(PYTHON_NAMES) + ')'}=(?:{_VALUE})?(?![\w(])"
)


def in_flags(message: str) -> str:
    """Write Python keywords in a message as options: missing='interpolate' becomes --missing
    interpolate.
    """

    def rewrite(match: re.Match) -> str:
        flag = flag_of(PYTHON_NAMES[match["name"]])
        if match["none"] is not None:
            return f"{flag} none"
        if match["list"] is not None:
            items = re.findall(r"""['"]([^'"]*)['"]|([\w.+-]+)""", match["list"])
            return f"{flag} {','.join(a or b for a, b in items)}".rstrip()
        value = match["quoted"] if match["quote"] else match["bare"]
        return f"{flag} {shlex.quote(value)}" if value else flag

    return _KEYWORD.sub(rewrite, message)


# --------------------------------------------------------------------------------------------------
# options that programs share


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How to train; what is not given is as the model's recipe has it."""

    mode: Annotated[forecasting.Mode | None, one_of(forecasting.MODES, unset="recipe")] = None
    """loss: ims (the family's own, next token) or direct (the forecast only)"""
    epochs: Annotated[int | None, whole(1, unset="recipe")] = None
    """passes over the training windows"""
    batch_size: Annotated[int | None, whole(1, unset="recipe")] = None
    """windows per step"""
    lr: Annotated[float | None, number(TINY, HUGE, says="positive", unset="recipe")] = None
    """learning rate"""
    schedule: Annotated[
        str | None,
        one_of(tuple(SCHEDULES), unset="recipe"),
        described(f"of the learning rate: {', '.join(SCHEDULES)}"),
    ] = None


@dataclasses.dataclass(frozen=True)
class Compute:
    """Options for the memory and time of a step."""

    compute: Annotated[str, one_of(COMPUTE)] = "float32"
    """dtype of the matrix products in training: float32 or bfloat16"""
    accumulate: Annotated[int | Literal["auto"], whole_or("auto", 1)] = 1
    """parts a batch is taken in, for less memory; auto: as many as are quickest on a CPU, or as
    the memory of a device needs
    """
    remat: Annotated[str, one_of((*REMAT, "auto"))] = "none"
    """what the backward pass computes again, for less memory: none, "all but products", or auto:
    the latter where the former does not fit
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(ReadingOptions):
    """How a table is read; the options of `ltsm_jax.data.read_series`."""

    target: Annotated[Any, words(unset="all")] = None
    """column(s) to read; by default all but those of time and id"""
    time: Annotated[Any, words()] = None
    """column(s) of the stamps (date,hour); by default found by their names"""
    id: Annotated[Any, words()] = None
    """column(s) that tell the series of a long table apart; each becomes a variate"""
    freq: Annotated[Any, text("STEP")] = None
    """step of the stamps: 15min, h, M, ...; by default found from them"""
    date_format: Annotated[str | None, text("LAYOUT")] = None
    """layout of the dates, as %d/%m/%Y; by default the one that fits"""
    missing: Annotated[Any, one_of(MISSING)] = "error"
    """empty cells: error refuses them, interpolate fills them in time, keep leaves them out of
    training and scores
    """
    irregular: Annotated[Any, one_of(IRREGULAR)] = None
    """stamps off the grid: error refuses them, regularise puts rows on it, ignore takes the rows as
    they are; by default error, and for a benchmark asked for by name ignore
    """
    name: Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress] = None

    def __post_init__(self):
        pass  # each option has been checked by itself; `Options.problems` asks for the rest

    def asked(self) -> dict[str, Any]:
        """Give what was asked for as keywords of `read_series`."""
        return keywords(self)


def keywords(options: Any) -> dict[str, Any]:
    """Give the options that are set as keywords of a function: one name of several as it is,
    several as a list.
    """
    found = {}
    for name, value in vars(options).items():
        if isinstance(value, tuple):
            found[name] = value[0] if len(value) == 1 else list(value)
        elif value is not None:
            found[name] = value
    return found
