"""Dialects of tables of text: the sign between cells, the decimal sign, thousands.

A dialect is found from the cells and said in the notes. Where a column can be read in two ways it
stays what it is, as a whole.
"""

import csv
import io
import re
from typing import Any

import numpy as np
import pandas as pd

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SAMPLE = 100  # lines that are looked at for the sign between cells
_PANDAS = tuple(int(part) for part in pd.__version__.split(".")[:2])
# Decimal text to the nearest float64: the default since pandas 3.1, asked for before
EXACT: dict[str, Any] = {} if _PANDAS >= (3, 1) else {"float_precision": "round_trip"}

_GROUPED = r"\d{1,3}(?:[.' \u00a0\u202f]\d{3})+"  # 1.234.567
_WITH_COMMA = re.compile(rf"[+-]?(?:\d+|{_GROUPED})?,\d+(?:[eE][+-]?\d+)?")
_WHOLE = re.compile(rf"[+-]?(?:\d+|{_GROUPED})")
_TWO_GROUPS = re.compile(r"[+-]?\d{1,3}(?:[.' \u00a0\u202f]\d{3}){2,}")
_POINT_OR_GROUP = re.compile(r"[+-]?\d{1,3}\.\d{3}")  # 1.234: a fraction, or a thousand and more


def separator_of(text: str) -> str:
    """Find the sign between the cells of a text: the one that gives every line equally many.

    Of several the one with the most cells, of those the one that is no comma (`a;b, c` has prices
    or names with commas in it); a comma where none does.
    """
    lines = _first_lines(text)
    found = []
    for sign in SEPARATORS:
        try:
            counts = [len(cells) for cells in csv.reader(lines, delimiter=sign) if cells]
        except csv.Error:
            continue
        # A quoted cell may be cut where the sample ends.
        whole = counts[:-1] if len(lines) == SAMPLE else counts
        if whole and whole[0] > 1 and len(set(whole)) == 1:
            found.append((whole[0], sign != ",", sign))
    if found:
        return max(found)[-1]
    first = lines[0] if lines else ""
    if "," in first:
        return ","
    return max((";", "\t", "|"), key=first.count) if re.search(r"[;\t|]", first) else ","


def _first_lines(text: str) -> list[str]:
    lines, start = [], 0
    while len(lines) < SAMPLE and start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        lines.append(text[start:end])
        start = end
    return lines


def read_decimal_commas(
    table: pd.DataFrame, text: str, separator: str, names: list[str] | None, notes: list[str]
) -> None:
    """Turn columns of numbers with decimal commas into numbers, in place.

    Args:
      table: columns are numbered 0, 1, ...
      text: what it was read from.
      names: those in the first line of the text; None: there is no such line.
      notes: what was read so is said here.
    """
    skipped = 0 if names is None else 1
    names = [str(column) for column in table.columns] if names is None else names
    changed, grouped = [], []
    for column in table.columns:
        kinds = _kinds(table[column])
        if kinds and all(_WITH_COMMA.fullmatch(kind) or _WHOLE.fullmatch(kind) for kind in kinds):
            if any("," in kind for kind in kinds):
                changed.append(column)
            elif any(_TWO_GROUPS.fullmatch(kind) for kind in kinds):
                grouped.append(column)
    if not changed:
        return

    for column in (*changed, *grouped):
        table[column] = _with_points(table[column])
    notes.append(f"a comma is the decimal sign in {_named(names, changed)}")
    if grouped:
        notes.append(f"points part thousands in {_named(names, grouped)}")

    both = []
    for column in table.columns:
        read = column in changed or column in grouped or table[column].dtype.kind != "f"
        if not read and _either(text, separator, skipped, column=column):
            both.append(column)
    if both:
        notes.append(
            f"cells such as 1.234 in {_named(names, both)} are read with a decimal point, though "
            "other columns have a decimal comma",
        )


def _kinds(column: Any) -> list[str]:
    """The different cells of a column of text; none for another column."""
    if pd.api.types.is_numeric_dtype(column):
        return []
    kinds = [kind for kind in column.unique() if isinstance(kind, str)]
    return [kind.strip() for kind in kinds]


def _with_points(column: Any) -> np.ndarray:
    """Cells such as "1.234,5" as the nearest float64 [T]."""
    codes, kinds = pd.factorize(column)
    plain = [re.sub(r"[.' \u00a0\u202f]", "", kind.strip()).replace(",", ".") for kind in kinds]
    numbers = np.array([float(kind) for kind in plain] + [np.nan])
    return numbers[codes]  # an empty cell has the code -1


def _either(text: str, separator: str, skipped: int, column: int) -> bool:
    """Return whether every cell of a column is written like 1.234."""
    cells = pd.read_csv(
        io.StringIO(text),
        sep=separator,
        header=None,
        skiprows=skipped,
        usecols=[column],
        dtype=str,
    )
    kinds = _kinds(cells[column])
    return bool(kinds) and all(_POINT_OR_GROUP.fullmatch(kind) for kind in kinds)


def _named(names: list[str], columns: list[int]) -> str:
    shown = ", ".join(names[c].strip()[:40] for c in columns[:12])
    return shown + (f", ... ({len(columns)} in all)" if len(columns) > 12 else "")
