"""Flags of experiments that compare methods: what each is called, what it takes, and what is wrong with it."""

import argparse
import dataclasses
import difflib
import functools
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments import launch
from ltsm_jax.data.splits import QUIRKS
from ltsm_jax.methods.strategies import MIXED
from ltsm_jax.tasks import forecasting
from ltsm_jax.training.config import COMPUTE, REMAT
from ltsm_jax.training.optimizers import SCHEDULES


class UsageError(ValueError):
    """Flags, files and lengths that do not work; the message lists all of them."""


def list_of(kind: Callable[[str], Any], text: str, name: str) -> list:
    """The items of "a,b,c", each made by `kind`; no empty ones, none twice."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"--{name} {text!r}: an empty item; write them as a,b,c")
    values = []
    for item in items:
        try:
            values.append(kind(item))
        except ValueError:
            what = {int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"--{name}: {item!r} is not {what}") from None
    if len(set(values)) < len(values):
        raise ValueError(f"--{name} {text!r}: an item stands there twice")
    return values


def numbers(kind: Callable[[str], Any], low: float, high: float, says: str, text: str, name: str) -> list:
    """Numbers in [low, high], which `says` puts in words."""
    values = list_of(kind, text, name)
    if bad := [v for v in values if not low <= v <= high]:
        raise ValueError(f"--{name} must be {says}; got {', '.join(map(str, bad))}")
    return values


def number(kind: Callable[[str], Any], low: float, high: float, says: str, text: str, name: str) -> Any:
    """One number in [low, high]."""
    values = numbers(kind, low, high, says, text, name)
    if len(values) > 1:
        raise ValueError(f"--{name} takes one value; got {text!r}")
    return values[0]


def names(known: Sequence[str], text: str, name: str) -> list[str]:
    """Names among the `known` ones."""
    items = list_of(str, text, name)
    if unknown := [item for item in items if item not in known]:
        near = [m for item in unknown for m in difflib.get_close_matches(item, known, 1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"--{name}: unknown {', '.join(map(repr, unknown))}{hint}; known: {', '.join(known)}")
    return items


def one_of(known: Sequence[str], text: str, name: str) -> str:
    """One name among the `known` ones."""
    return names(known, text, name)[0] if "," not in text else names(known, repr(text), name)[0]


TINY = sys.float_info.min
Parser = Callable[[str, str], Any]
PARSERS: dict[str, Parser] = {
    "alpha": functools.partial(numbers, float, 0, 1, "between 0 and 1, the weight of the pretrained side"),
    "seeds": functools.partial(numbers, int, 0, 2**32 - 1, "between 0 and 2**32 - 1"),
    "horizon": functools.partial(number, int, 1, math.inf, "at least 1"),
    "context": functools.partial(number, int, 1, math.inf, "at least 1"),
    "epochs": functools.partial(number, int, 1, math.inf, "at least 1"),
    "batch-size": functools.partial(number, int, 1, math.inf, "at least 1"),
    "lr": functools.partial(number, float, TINY, sys.float_info.max, "positive"),
    "few-shot": functools.partial(number, float, TINY, 1, "a share above 0 and at most 1"),
    "accumulate": functools.partial(number, int, 1, math.inf, "at least 1"),
    "num-processes": functools.partial(number, int, 1, math.inf, "at least 1"),
    "process-id": functools.partial(number, int, 0, math.inf, "at least 0"),
    "compute": functools.partial(one_of, COMPUTE),
    "remat": functools.partial(one_of, tuple(REMAT)),
    "mode": functools.partial(one_of, forecasting.MODES),
    "schedule": functools.partial(one_of, tuple(SCHEDULES)),
    "quirks": functools.partial(names, tuple(sorted(QUIRKS))),
    "missing": functools.partial(one_of, ("error", "interpolate")),
    "irregular": functools.partial(one_of, ("error", "regularise", "ignore")),
    "target": functools.partial(list_of, str),
}
FLAGS = {  # what --help says; an experiment puts its own beside them
    "data": "benchmark name ($LTSM_DATA, cache or download) or a .csv, .csv.gz or .parquet file [ETTh1]",
    "model": "shipped name, model folder, original checkpoint, or hub name owner/name[@revision] [timer-tiny]",
    "head": "put a fresh, untrained head of this name on the model (Model.heads) [the checkpoint's own]",
    "methods": "what to compare",
    "alpha": "weight(s) of the pretrained side, for the methods that mix [0.7]",
    "seeds": "[0,1,2]",
    "horizon": "steps to forecast [the model's recipe, as for all that follow without a default]",
    "out": "folder of the results [runs/<experiment>-<data>-<model>]",
    "context": "steps the model sees",
    "mode": "training loss: ims (next token) or direct (the forecast only)",
    "epochs": "",
    "batch-size": "windows per step",
    "lr": "",
    "schedule": f"of {', '.join(SCHEDULES)}",
    "few-shot": "share of the training windows [1]",
    "quirks": f"released behaviours to follow, of {','.join(sorted(QUIRKS))}",
    "target": "column(s) of a table to use [all]",
    "time": "time column of a table [found by name]",
    "missing": "error or interpolate [error]",
    "irregular": "error, regularise or ignore [a benchmark: its rows as they are; else error]",
    **launch.FLAGS,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, checked one by one; None is "as the model's recipe has it"."""

    program: ClassVar[str]  # what `python -m` runs
    data: str = "ETTh1"
    model: str = "timer-tiny"
    head: str | None = None
    methods: tuple[str, ...] = ()
    alpha: tuple[float, ...] = (0.7,)
    seeds: tuple[int, ...] = (0, 1, 2)
    horizon: int | None = None
    out: str | None = None
    context: int | None = None
    mode: forecasting.Mode | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    schedule: str | None = None
    few_shot: float = 1.0
    quirks: tuple[str, ...] = ()
    target: tuple[str, ...] | None = None
    time: str | None = None
    missing: str = "error"
    irregular: str | None = None
    mesh: str | None = None
    compute: str | None = None
    accumulate: int | None = None
    remat: str | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    plan: bool = False

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        names = (Path(name).name.split(".")[0] for name in (self.data, self.model))
        return Path(self.out or f"runs/{'-'.join((self.program.split('.')[-1], *names))}")

    @property
    def tunings(self) -> tuple[tuple[str, float | None], ...]:
        """(method, alpha) of every kind of run; alpha None where a method has none."""
        return tuple((m, alpha) for m in self.methods for alpha in (self.alpha if m in MIXED else (None,)))

    def command(self) -> str:
        """The command line that asks for these options; defaults are left out, but for the names of data and model."""
        parts = ["python", "-m", self.program]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in launch.PLACE:
                continue
            if field.name in ("data", "model", "out") or value != field.default:
                value = str(self.folder) if field.name == "out" else value
                text = (
                    ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
                    if isinstance(value, tuple)
                    else str(value)
                )
                parts += [f"--{field.name.replace('_', '-')}", *([] if value is True else [text])]
        return shlex.join(parts)


def read_flags(
    program: str,
    doc: str | None,
    argv: Sequence[str],
    flags: Mapping[str, str],
    parsers: Mapping[str, Parser],
    switches: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The flags that were given, as fields of `Options`, and everything that is wrong with them.

    flags: what --help says of each. parsers: for those that are more than text. switches: flags without a value.
    """
    parser = argparse.ArgumentParser(f"python -m {program}", description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, text in flags.items():
        parser.add_argument(f"--{name}", metavar="", help=text)
    for name, text in {**(switches or {}), "plan": "print what would run, and stop"}.items():
        parser.add_argument(f"--{name}", action="store_true", default=None, help=text)
    given, unknown = parser.parse_known_args(argv)
    known_flags = [option for action in parser._actions for option in action.option_strings]
    problems, values = [], {}
    for item in unknown:
        near = difflib.get_close_matches(item.split("=")[0], known_flags, 1)
        problems.append(f"unknown argument {item!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    for field, value in vars(given).items():
        if value is None:
            continue
        name = field.replace("_", "-")
        try:
            value = parsers[name](value, name) if name in parsers else value
        except ValueError as err:
            problems.append(str(err))
            continue
        values[field] = tuple(value) if isinstance(value, list) else value
    return values, problems


def alpha_problems(values: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    """What is wrong with an alpha that was given, if any; methods: the default ones."""
    if "alpha" not in values or set(values.get("methods", methods)) & set(MIXED):
        return []
    return [f"--alpha is for {' and '.join(MIXED)}, and neither is among --methods"]
