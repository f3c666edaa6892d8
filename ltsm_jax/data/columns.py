"""Columns of a table: which is the time, the id, a target; their stamps and numbers.

`TableReader` is the part that readers of series and of panels share: what is wrong with a table
piles up in `problems` and is raised as one `DataError`, what was done to it in `notes`.

Shapes: C variates, T rows of the table.
"""

import collections
import difflib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ltsm_jax.data.series import DataError, clip
from ltsm_jax.data.sources import is_path, stem
from ltsm_jax.data.stamps import (
    YEARS,
    counts_rows,
    holds_dates,
    is_numeric,
    is_time,
    parse_stamps,
    rows,
)
from ltsm_jax.frequency import infer_freq

TIME_NAMES = ("date", "time", "timestamp", "ds", "datetime")
PERIOD_NAMES = (
    "ts",
    "year",
    "yearmonth",
    "yyyymm",
    "month",
    "period",
    "quarter",
    "week",
    "day",
)  # if numbers are dates
CALENDAR = ("year", "month", "day", "hour")  # columns that hold one time between them
ID_NAMES = (
    "id",
    "item_id",
    "unique_id",
    "series_id",
    "ts_id",
    "item",
    "series",
    "symbol",
    "ticker",
    "sku",
    "store",
)
LARGEST = 1e100  # of a value: its square is a float64 still
QUOTED = 40  # characters of a name or cell in a message
LINES = 12  # problems in a message

Name = str | int | tuple
Stamps = np.ndarray | None


class TableReader:
    """One table on its way to numbers and stamps; problems and notes pile up here."""

    kind_of_id = "a variate"  # what the rows of one id become

    def __init__(self, how: Any, source: Any):
        self.how = how
        self.name = how.name or (stem(Path(source)) if is_path(source) else "data")
        self.irregular = how.irregular or "error"
        self.freq = None if how.freq == "oov" else how.freq
        self.source = source
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.undecided: list = []  # columns of which one or another is the time

    def stop(self) -> None:
        """Raise what was found so far."""
        if not self.problems:
            return
        lines = [clip(problem, 600) for problem in self.problems[:LINES]]
        if len(self.problems) > LINES:
            lines.append(f"... and {len(self.problems) - LINES} more problems")
        raise DataError(f"{self.name} cannot be used as it is:\n  " + "\n  ".join(lines))

    def index_as_columns(self, table: pd.DataFrame) -> tuple[pd.DataFrame, list]:
        """(table with its index as columns in front, their names); an index that only numbers the
        rows is dropped."""
        if isinstance(table.columns, pd.MultiIndex):
            table = table.set_axis(["/".join(map(str, names)) for names in table.columns], axis=1)
        index = table.index
        if isinstance(index, pd.RangeIndex) and index.step > 0 and index.name is None:
            return table.reset_index(drop=True), []
        levels = [index.get_level_values(i) for i in range(index.nlevels)]
        names = []
        for i, level in enumerate(levels):
            unnamed = (
                "timestamp"
                if is_time(level.to_series())
                else "index"
                if len(levels) == 1
                else f"level_{i}"
            )
            names.append(unnamed if level.name is None else level.name)
        present = set(table.columns)
        for name in names:
            if name in present:
                self.problems.append(
                    f"{name!r} names both the index and a column; drop one of them"
                )
        if self.problems:
            return table.reset_index(drop=True), []
        front = pd.DataFrame(dict(zip(names, (level.array for level in levels), strict=True)))
        return pd.concat([front, table.reset_index(drop=True)], axis=1), names

    def check_shape(self, table: pd.DataFrame) -> None:
        """No rows, and names that occur twice."""
        if not len(table):
            self.problems.append("no rows")
        counts = collections.Counter(str(column) for column in table.columns)
        if doubled := sorted(name for name, count in counts.items() if count > 1):
            self.problems.append(f"column names used more than once: {quote(doubled)}; rename them")

    def found(self, table: pd.DataFrame, role: str, given: Any) -> list:
        """The columns that an option names; those that are not there go to the problems."""
        if given is None:
            return []
        known = {column: column for column in table.columns}
        by_text = {str(column): column for column in table.columns}
        # A tuple may be one name of a column with levels.
        joined = "/".join(map(str, given)) if isinstance(given, tuple) else None
        if joined in known:
            return [joined]
        single = isinstance(given, str) or not isinstance(given, Iterable)
        columns = []
        for name in [given] if single else list(given):
            text = "/".join(map(str, name)) if isinstance(name, tuple) else str(name)
            column = known.get(name, by_text.get(text)) if _hashable(name) else None
            if column is None or isinstance(name, bool):
                self.problems.append(
                    f"{role} column {name!r} is not there; {near_names(name, list(table.columns))}"
                )
            else:
                columns.append(column)
        return columns

    def find_time(self, table: pd.DataFrame, labels: list, taken: list) -> list:
        """The columns of time when none is named: by their names, else a first column of dates."""
        columns = [column for column in table.columns if column not in set(taken)]
        folded = {str(column).casefold(): column for column in columns}
        named = [column for column in columns if str(column).casefold() in TIME_NAMES]
        dated = [label for label in labels if label in columns and holds_dates(table[label])]
        if not named and dated:
            named = dated
        if len(named) > 1:
            names = [str(column) for column in named]
            self.problems.append(
                f"several columns may hold the time: {', '.join(names)}; say which with time= "
                f"(time={names!r} joins them)"
            )
            self.undecided = named
            return []
        if named:
            return named

        calendar = [
            folded[name] for name in CALENDAR if name in folded and is_numeric(table[folded[name]])
        ]
        if len(calendar) > 1 and [str(c).casefold() for c in calendar] == list(
            CALENDAR[: len(calendar)]
        ):
            self.notes.append(f"the time is taken from {', '.join(map(str, calendar))}")
            return calendar
        quarters = [folded[name] for name in ("year", "quarter") if name in folded]
        if len(quarters) == 2 and all(is_numeric(table[c]) for c in quarters):
            self.notes.append(f"the time is taken from {quarters[0]}, {quarters[1]}")
            return quarters
        period = [c for c in columns[:1] if str(c).casefold() in PERIOD_NAMES]
        period += [folded["year"]] if "year" in folded else []
        # An index of numbers like 20240101 is no numbering of rows.
        period += [c for c in labels if c in columns and _least(table[c]) > 180_000]
        for column in period:
            if is_numeric(table[column]) and self.numbers_are_dates(table[column]):
                self.notes.append(
                    f"{column!r} is taken as the time; time= and target= say otherwise"
                )
                return [column]
        first = [column for column in table.columns if column not in labels][:1]
        return [c for c in first if c in columns and holds_dates(table[c])]

    def numbers_are_dates(self, column: Any) -> bool:
        """Return whether numbers are dates of one step, without repeats."""
        problems: list[str] = []
        found = parse_stamps(column, problems, [])
        if problems or found is None:
            return False
        unique = np.unique(found[0])
        return len(unique) == len(column) and infer_freq(unique) is not None

    def is_id_like(self, table: pd.DataFrame, label: Any) -> bool:
        """Return whether labels of rows repeat, as the names of several series do."""
        cells: Any = table[label]
        return not is_numeric(cells) and 1 < cells.nunique() < len(cells)

    def check_labels(self, table: pd.DataFrame, labels: list, time: list, taken: list) -> None:
        """An index that is neither time nor id nor a plain numbering is not dropped in silence."""
        if time or self.irregular == "ignore":
            return
        for label in labels:
            column: Any = table[label]
            if (
                label in taken
                or self.is_id_like(table, label)
                or (len(column) > 1 and column.nunique() == 1)
            ):
                continue
            if counts_rows(column) and YEARS[0] < column.min() and column.max() < YEARS[1]:
                self.notes.append(
                    f"the index {label!r} only numbers the rows; called 'year' it would be the time"
                )
            if pd.api.types.is_timedelta64_dtype(column):
                self.problems.append(
                    f"the index {label!r} holds lengths of time, no dates; add the date of its "
                    "start to it, or reset_index(drop=True)"
                )
            elif not is_numeric(column):
                self.problems.append(
                    f"the index {label!r} holds no dates (first: "
                    f"{str(column.iloc[0])[:QUOTED]!r}); reset_index(drop=True) leaves it out"
                )
            elif not counts_rows(column) and len(column) > 1:
                steps = np.diff(column.to_numpy(np.float64))
                row = int((steps != 1).argmax()) + 1
                self.problems.append(
                    f"the index {label!r} does not number the rows one after the other (row {row}: "
                    f"{column.iloc[row]} follows {column.iloc[row - 1]}): rows are out of order or "
                    "left out; reset_index(drop=True) or irregular='ignore' takes them as they "
                    "come"
                )

    def any_numbers(self, table: pd.DataFrame, columns: list) -> bool:
        """Return whether a column holds numbers, as such or as text."""
        cells = [table[column] for column in columns]
        return any(is_numeric(c) or (not is_time(c) and to_number(c).notna().any()) for c in cells)

    def check_default(self, table: pd.DataFrame, wanted: list, time: list, ids: list) -> None:
        """Columns without a name and tables without numbers."""
        columns = list(table.columns)
        unnamed = [
            i
            for i, c in enumerate(columns)
            if str(c).strip() == "" or str(c).startswith("Unnamed: ")
        ]
        if unnamed:
            self.problems.append(
                f"column {unnamed[0]} (counting from 0) has no name: a saved index? Name it, drop "
                "it, or give target="
            )
        for column in [c for c in wanted if str(c).casefold() in PERIOD_NAMES][:3]:
            self.notes.append(f"{column!r} is read as a variate; target= leaves it out")
        if wanted and not self.any_numbers(table, wanted):
            self.problems.append(f"no column of numbers; columns: {quote(columns)}")
        elif not wanted:
            besides = " and ".join(map(str, [*time, *ids]))
            self.problems.append(f"no column besides {besides}" if besides else "no columns")

    def joined(self, table: pd.DataFrame, role: str, given: Any) -> Any:
        """The id column: one, or several joined by "/"; None where there is none or where it is
        damaged."""
        known = len(self.problems)
        columns = self.found(table, role, given)
        del self.problems[known:]  # said before
        for column in columns:
            empty = table[column].isna().to_numpy()
            if empty.any():
                self.problems.append(
                    f"id column {column!r}: {empty.sum()} empty cells, {rows(empty)}"
                )
                return None
        if len(columns) < 2:
            return table[columns[0]] if columns else None
        joined: Any = table[columns[0]].astype(str)
        for column in columns[1:]:
            joined = joined + "/" + table[column].astype(str)
        return joined.rename("/".join(map(str, columns)))

    def stamps_of(self, table: pd.DataFrame, time: list) -> tuple[Stamps, str | None]:
        """(stamps [T] in UTC or as written, zone), or (None, None)."""
        if not time:
            return None, None
        column = table[time[0]] if len(time) == 1 else joined_time(table, time)
        if self.how.date_format is not None:
            pass  # numbers in that layout are dates
        elif counts_rows(column) and not self.numbers_are_dates(column):
            # Following the message or naming the targets: the numbers are no stamps, the rows stay
            # in their order.
            if self.irregular == "ignore" or (
                self.how.target is not None and self.how.time is None
            ):
                self.notes.append(f"{column.name!r} only numbers the rows: there are no stamps")
                return None, None
        elif (
            is_numeric(column) and self.irregular == "ignore" and not self.numbers_are_dates(column)
        ):
            self.notes.append(
                f"the numbers in {column.name!r} are no dates and were left out: there are no "
                "stamps"
            )
            return None, None
        found = parse_stamps(
            column,
            self.problems,
            self.notes,
            date_format=self.how.date_format,
            freq=self.freq,
        )
        return found or (None, None)

    def ids_that_tell_apart(
        self,
        table: pd.DataFrame,
        time: list,
        taken: set,
        stamps: Stamps,
        codes: np.ndarray | None = None,
    ) -> list[list]:
        """Every choice of columns that tells rows of one stamp apart, likely ones first; [] where
        no stamp repeats.

        Args:
          taken: columns that are no ids: those of the time, of the ids given, of targets asked for.
          codes: [T] items by the ids given; None: there are none.
        """
        if stamps is None:
            return []
        frame = pd.DataFrame({"stamp": stamps})
        if codes is not None:
            frame["given"] = codes
        repeats = float(frame.duplicated().mean())
        if not repeats:
            return []
        columns = [c for c in table.columns if c not in taken]
        named = self.named_ids(table, taken)
        able = [c for c in columns[:200] if c in named or comes_in_kinds(table[c])]
        able = sorted(able, key=lambda c: (c not in named, is_numeric(table[c])))[:50]
        self.check_clock(table, able, time)
        several = [c for c in able if c in named or tells_apart(table[c], repeats)]
        choices = [[c] for c in several]
        choices += map(list, itertools.combinations(several[:8], 2))
        return [choice for choice in choices if not self.repeated(frame, table, choice)]

    def repeated(self, frame: pd.DataFrame, table: pd.DataFrame, columns: list) -> bool:
        """Return whether rows of `frame` repeat even where `columns` of the table are added."""
        cells = {f"id {c}": _codes(table[c]) for c in columns}
        return bool(frame.assign(**cells).duplicated().any())

    def named_ids(self, table: pd.DataFrame, taken: set) -> list:
        """Columns that are called like ids and hold several kinds."""
        columns = [c for c in table.columns if c not in taken and str(c).casefold() in ID_NAMES]
        return [c for c in columns if comes_in_kinds(table[c])]

    def refuse_ids(self, table: pd.DataFrame, columns: list) -> None:
        """Say which option reads the table, and nothing else: the rest comes from reading it as one
        series."""
        kinds = table[columns].drop_duplicates()
        first = ", ".join("/".join(map(str, row))[:QUOTED] for row in kinds.head(3).to_numpy())
        more = ", ..." if len(kinds) > 3 else ""
        names = [str(column) for column in columns]
        option = repr(names[0]) if len(names) == 1 else repr(names)
        column = "columns" if len(names) > 1 else "column"
        self.problems = [
            f"several series follow one another: {column} {' and '.join(map(repr, names))} of "
            f"{len(kinds)} kinds ({first}{more}); id={option} reads each as {self.kind_of_id}"
        ]
        self.stop()

    def check_clock(self, table: pd.DataFrame, able: list, time: list) -> None:
        """Refuse dates that repeat because the time of day is in a column of its own."""
        clock = [c for c in able if str(c).casefold() in ("hour", "hr")]
        if not clock or len(time) != 1:
            return
        both = [str(time[0]), str(clock[0])]
        self.problems = [
            f"stamps of {both[0]!r} repeat, and {both[1]!r} tells them apart: time={both!r} joins "
            "them"
        ]
        self.stop()

    def numbers(self, table: pd.DataFrame, targets: list) -> np.ndarray:
        """[C, T] float64, NaN where a cell is empty; text and numbers beyond `LARGEST` go to the
        problems."""
        if not targets:
            return np.zeros((0, len(table)))
        part: Any = table[targets]
        plain = all(isinstance(dtype, np.dtype) and dtype.kind in "iuf" for dtype in part.dtypes)
        if plain:
            values = np.ascontiguousarray(part.to_numpy(np.float64).T)
        else:
            values = np.array([self.column(part[column], column) for column in targets])
        with np.errstate(invalid="ignore"):
            large = np.isfinite(values) & (np.abs(values) > LARGEST)
        for c in np.flatnonzero(large.any(axis=1))[:LINES]:
            cells = table[targets[c]]
            self.problems.append(
                f"column {short(targets[c])}: {large[c].sum()} numbers beyond {LARGEST:g}, which "
                f"is the limit, {rows(large[c], cells)}; give the column another unit"
            )
        return values

    def column(self, column: Any, name: Any) -> np.ndarray:
        """[T] float64, NaN where a cell is empty; text goes to the problems."""
        types = pd.api.types
        if is_numeric(column) and not types.is_complex_dtype(column):
            return column.to_numpy(np.float64, na_value=np.nan)
        if is_time(column) or types.is_timedelta64_dtype(column) or types.is_complex_dtype(column):
            hint = f"; time={str(name)!r} takes it as the time" if is_time(column) else ""
            self.problems.append(
                f"column {short(name)} holds {column.dtype}, not real numbers; convert it, or "
                f"choose columns with target={hint}"
            )
            return np.full(len(column), np.nan)
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        number = to_number(column)
        truth = np.array([isinstance(cell, bool | np.bool_) for cell in column])
        text = column.notna().to_numpy() & (number.isna().to_numpy() | truth)
        if text.any():
            hint = (
                f"; time={str(name)!r} takes it as the time"
                if text.all() and holds_dates(column)
                else ""
            )
            self.problems.append(
                f"column {short(name)}: {text.sum()} cells are not numbers, {rows(text, column)}; "
                f"clean them (empty = missing) or choose columns with target={hint}"
            )
        elif any(isinstance(cell, str) for cell in column):
            self.problems.append(
                f"column {short(name)} holds numbers as text; convert it with pandas.to_numeric"
            )
        return number.to_numpy(np.float64, na_value=np.nan)


def _codes(cells: Any) -> np.ndarray:
    """The kinds of cells as whole numbers [T]."""
    return pd.factorize(cells)[0]


def joined_time(table: pd.DataFrame, time: list) -> Any:
    """One column of text from several of time: date and hour, year and month and day."""
    parts = []
    for column in time:
        cells: Any = table[column]
        whole = is_numeric(cells) and cells.notna().all() and (cells == np.rint(cells)).all()
        text = cells.astype("int64").astype(str) if whole else cells.astype(str)
        if is_time(cells) and not is_numeric(cells):
            text = pd.Series(
                pd.DatetimeIndex(pd.to_datetime(cells)).strftime("%Y-%m-%d"), index=cells.index
            )
        if whole and str(column).casefold() in ("hour", "hr"):
            text = text + ":00"
        if whole and str(column).casefold() == "quarter":
            text = "Q" + text
        parts.append(text.str.strip().where(cells.notna()))
    joined = parts[0]
    for part in parts[1:]:
        # Fields of a date are joined by "-", a time of day by a blank.
        clock = part.str.contains(":", regex=False).fillna(False).any()
        joined = joined + (" " if clock else "-") + part
    return joined.rename(" and ".join(map(str, time)))


def comes_in_kinds(cells: Any) -> bool:
    """Return whether cells are names of kinds, each of several rows: text, categories or whole
    numbers.
    """
    if is_time(cells) or pd.api.types.is_float_dtype(cells):
        return False
    if pd.api.types.is_bool_dtype(cells):
        return False
    kinds = cells.nunique()
    return 2 <= kinds <= len(cells) / 2 and not cells.isna().any()


def tells_apart(cells: Any, repeats: float) -> bool:
    """Return whether kinds look like series: they stand in blocks, or many of the stamps repeat."""
    changes = int((cells.to_numpy()[1:] != cells.to_numpy()[:-1]).sum())
    blocks = changes + 1 == cells.nunique() and not is_numeric(cells)
    return blocks or repeats >= 0.25


def _least(cells: Any) -> float:
    """The least of numbers; minus infinity for other cells."""
    return float(cells.min()) if is_numeric(cells) and len(cells) else -np.inf


def _hashable(name: Any) -> bool:
    try:
        hash(name)
        return True
    except TypeError:
        return False


def near_names(name: Any, columns: list) -> str:
    """Suggest columns that a missing name may have meant, and list the columns there are."""
    folded = {str(c)[:200].casefold(): str(c) for c in columns[:2000]}
    close = difflib.get_close_matches(str(name)[:200].casefold(), folded, n=3, cutoff=0.5)
    near = [short(folded[c]) for c in close]
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"columns: {quote(columns)}"


def short(name: Any) -> str:
    """A name of a column as a message quotes it."""
    return repr(str(name)[:QUOTED] if isinstance(name, str) else name)[: QUOTED + 20]


def quote(items: Sequence[Any]) -> str:
    """List names or cells in a message, the first twelve of them."""
    shown = ", ".join(str(item)[:QUOTED] for item in items[:12])
    return shown + (f", ... ({len(items)} in all)" if len(items) > 12 else "")


def to_number(column: Any) -> Any:
    """Cells as numbers [T], NaN where they are none."""
    try:
        return pd.to_numeric(column, errors="coerce")
    except OverflowError:  # whole numbers beyond float64 are beyond every limit
        huge = column.map(lambda cell: isinstance(cell, int) and abs(cell) > LARGEST)
        return pd.to_numeric(column.mask(huge, 10 * LARGEST), errors="coerce")
