"""Print the output of commands: tables of 80 columns, one JSON object, all else on stderr."""

import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ltsm_jax.flags import in_flags

WIDTH = 80


def say(text: str = "") -> None:
    """Print on stderr: plans, notes, progress."""
    print(text, file=sys.stderr, flush=True)


def show(text: str = "") -> None:
    """Print on stdout: what was asked for."""
    print(text, flush=True)


def show_json(found: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout. Numbers that JSON does not have are null."""
    show(json.dumps(_plain(found), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Set a table of at most `WIDTH` columns; the first `left` columns begin, the others end, where
    their header does.

    Where it would be wider, the first column is cut in its middle.
    """
    lines = [list(header), *map(list, rows)]
    widths = []
    for column in range(len(header)):
        widths.append(max(len(line[column]) for line in lines))
    surplus = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    if surplus > 0:
        widths[0] = max(widths[0] - surplus, 8)
    return "\n".join(_line(line, widths, left) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    set_ = []
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        cell = shorten(cell, width)
        set_.append(cell.ljust(width) if column < left else cell.rjust(width))
    return "  ".join(set_).rstrip()


def shorten(text: str, width: int) -> str:
    """Cut a text in its middle, where it is too long."""
    if len(text) <= width:
        return text
    end = (width - 3) // 2
    return text[: width - 3 - end] + "..." + text[len(text) - end :]


def facts(entries: Mapping[str, Any]) -> str:
    """Set names and what belongs to them, one below the other, wrapped at `WIDTH`."""
    wide = max((len(name) for name in entries), default=0) + 2
    lines = []
    for name, value in entries.items():
        lines += textwrap.wrap(
            str(value),
            WIDTH,
            initial_indent=name.ljust(wide),
            subsequent_indent=" " * wide,
            break_on_hyphens=False,
            break_long_words=False,  # a path that is broken cannot be copied
        ) or [name]
    return "\n".join(lines)


def notes(lines: Sequence[str]) -> str:
    """Set notes below a plan, wrapped likewise, with options in the words of a command line."""
    return "\n".join(facts({"note": in_flags(line)}) for line in lines)


def in_millions(n: int) -> str:
    """Say a number of parameters: 8.7 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return str(n)
