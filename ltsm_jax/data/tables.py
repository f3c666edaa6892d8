"""Tables in: files, frames, arrays -> `Series`, checked at the border.

Whatever is wrong with a source is collected and raised as one `DataError` that says what, where and
what to do; nothing is dropped, filled, sorted or cast without being asked for, and what was asked
for and done stands in `Series.notes`.

Shapes: C variates, T rows of the table or of the grid.
"""

import collections
import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from ltsm_jax.data.series import DataError, Series, clip
from ltsm_jax.data.sources import as_table, is_path, stem
from ltsm_jax.data.stamps import (
    YEARS,
    counts_rows,
    holds_dates,
    is_numeric,
    is_time,
    parse_stamps,
    rows,
    show,
)
from ltsm_jax.frequency import (
    Grid,
    canonical_freq,
    from_wall,
    grid_share,
    infer_freq,
    on_wall,
    rounded_step,
    to_wall,
)

TIME_NAMES = ("date", "time", "timestamp", "ds", "datetime")
PERIOD_NAMES = (
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
MISSING = ("error", "interpolate", "keep")
IRREGULAR = ("error", "regularise", "ignore")
QUOTED = 40  # characters of a name or cell in a message
LINES = 12  # problems in a message

Name = str | int | tuple
Stamps = np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How a table is read; the keywords of `read_series`, and of whatever passes them on.

    Attributes:
      target: the column(s) to read, by name; by default every column but those of time and id.
      time: the column of stamps; by default the one called date, time, timestamp, ds or datetime
        (case aside), a year (with month, day, hour beside it), else the first column when it holds
        dates. The index of a DataFrame counts as columns in front. Several columns are joined:
        `time=["date", "hour"]`. Without one the rows are taken as the grid. Stamps keep their zone
        (`Series.tz`).
      id: for a long table, the column(s) that tell the series apart: each id becomes a variate
        (with several targets "id/target"). All ids must share one grid, or be put on one by
        `irregular="regularise"`.
      freq: step of the grid ("15min", "h", "M", an offset of pandas); by default that of the
        stamps. "oov" (out of vocabulary) also takes that of the stamps, and has a model with
        frequency tokens take the one for unknown steps.
      date_format: layout of the dates as `strptime` writes it ("%d/%m/%Y"); a time of day after the
        date is read by itself where the layout has none. By default the layout that reads every
        cell and gives a regular grid.
      missing: "error" refuses empty, NaN and infinite cells; "interpolate" fills them linearly in
        time, and at the ends with the nearest value; "keep" leaves empty cells NaN (infinite ones
        are refused). The last two cut off the last rows where every target is empty: they are the
        future.
      irregular: "error" refuses stamps that are unsorted, repeated or off the grid; "regularise"
        sorts, moves each row to the nearest grid stamp, averages rows that meet there and leaves
        holes to `missing`; "ignore" takes the rows as they are. None is "error", but for a
        benchmark asked for by name, whose rows are read as they come.
      name: what reports call the series; by default the file's name.

    Example: `read_series("sales.csv", **vars(ReadingOptions(target="sold")))`
    Raises: ValueError for a value that is none of those listed.
    """

    target: Name | Sequence[Name] | None = None
    time: Name | Sequence[Name] | None = None
    id: Name | Sequence[Name] | None = None
    freq: Any = None
    date_format: str | None = None
    missing: Literal["error", "interpolate", "keep"] = "error"
    irregular: Literal["error", "regularise", "ignore"] | None = None
    name: str | None = None

    def __post_init__(self):
        for option in ("target", "time", "id"):
            value = getattr(self, option)
            # `df.columns[1:]`, a set, a generator; a tuple may be one name of a column with levels
            if isinstance(value, Iterable) and not isinstance(value, str | list | tuple):
                object.__setattr__(self, option, list(value))
        if self.date_format is not None and not isinstance(self.date_format, str):
            raise ValueError(f"date_format must be text such as '%d/%m/%Y', not {self.date_format!r}")
        for option, allowed in (("missing", MISSING), ("irregular", IRREGULAR)):
            value = getattr(self, option)
            if value not in allowed and not (option == "irregular" and value is None):
                raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
        if self.freq is not None and self.freq != "oov":
            object.__setattr__(self, "freq", canonical_freq(self.freq))


def read_series(
    source: Any,
    *,
    target: Name | Sequence[Name] | None = None,
    time: Name | Sequence[Name] | None = None,
    id: Name | Sequence[Name] | None = None,
    freq: Any = None,
    date_format: str | None = None,
    missing: Literal["error", "interpolate", "keep"] = "error",
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
) -> Series:
    """Read one multivariate series, strictly.

    The options are described in `ReadingOptions`, field by field.

    Args:
      source: a .csv, .csv.gz or .parquet file, a pandas DataFrame or Series, an array [T] or [T, C]
        (rows first), a polars or Arrow table.

    Raises: DataError (a ValueError) with every problem found; FileNotFoundError when there is no
      such file.
    """
    how = ReadingOptions(
        target=target,
        time=time,
        id=id,
        freq=freq,
        date_format=date_format,
        missing=missing,
        irregular=irregular,
        name=name,
    )
    return _Reader(how, source).read()


class _Reader:
    """One table on its way to a `Series`; problems and notes pile up here."""

    def __init__(self, how: ReadingOptions, source: Any):
        self.how = how
        self.name = how.name or (stem(Path(source)) if is_path(source) else "data")
        self.irregular = how.irregular or "error"
        self.freq = None if how.freq == "oov" else how.freq
        self.source = source
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.undecided: list = []  # columns of which one or another is the time

    def read(self) -> Series:
        table = as_table(self.source)
        table, labels = self.index_as_columns(table)
        self.check_shape(table)
        self.stop()
        time, targets = self.choose_columns(table, labels)
        stamps, tz = self.stamps_of(table, time)
        if stamps is not None and tz is not None:
            tz = self.zone_of_steps(stamps, tz)
        if not self.problems:
            self.look_for_ids(table, time, targets, stamps)
        id_column = self.joined(table, "id", self.how.id)
        values = self.numbers(table, targets)
        if id_column is not None:
            stamps, values, targets = self.spread(stamps, values, targets, id_column, tz)
        elif stamps is not None and len(values):
            stamps, values = self.on_grid(stamps, values, tz)
        if self.how.missing != "error":
            stamps, values = self.without_future(stamps, values)
        # Rows of the grid are not those of the file.
        at = stamps if self.irregular == "regularise" else None
        values = self.fill(values, targets, at)
        if stamps is not None and "timestamp" in targets:
            self.problems.append(
                "a column to read is called 'timestamp' beside the time, and a forecast has a column of that name: "
                "rename it, or leave it out with target="
            )
        self.stop()
        return Series(
            self.name,
            values,
            tuple(map(str, targets)),
            stamps,
            self.freq,
            notes=tuple(clip(note, 500) for note in self.notes),
            tz=tz,
            model_freq="oov" if self.how.freq == "oov" else None,
            time_name=str(time[0]) if stamps is not None and len(time) == 1 else None,
        )

    def stop(self) -> None:
        """Raise what was found so far."""
        if not self.problems:
            return
        lines = [clip(problem, 600) for problem in self.problems[:LINES]]
        if len(self.problems) > LINES:
            lines.append(f"... and {len(self.problems) - LINES} more problems")
        raise DataError(f"{self.name} cannot be used as it is:\n  " + "\n  ".join(lines))

    # ---- columns ----

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
            unnamed = "timestamp" if is_time(level.to_series()) else "index" if len(levels) == 1 else f"level_{i}"
            names.append(unnamed if level.name is None else level.name)
        present = set(table.columns)
        for name in names:
            if name in present:
                self.problems.append(f"{name!r} names both the index and a column; drop one of them")
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
            self.problems.append(f"column names used more than once: {_quote(doubled)}; rename them")

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
                self.problems.append(f"{role} column {name!r} is not there; {_near(name, list(table.columns))}")
            else:
                columns.append(column)
        return columns

    def choose_columns(self, table: pd.DataFrame, labels: list) -> tuple[list, list]:
        """(columns of time, target columns); what cannot be found or decided goes to the
        problems."""
        how, columns = self.how, list(table.columns)
        wanted = self.found(table, "target", how.target)
        time = self.found(table, "time", how.time)
        ids = self.found(table, "id", how.id)
        if how.target is not None and not wanted and not self.problems:
            self.problems.append("target is an empty list")
        if len(set(wanted)) < len(wanted):
            self.problems.append(f"target names a column twice: {_quote(wanted)}")
        asked = how.target is not None
        wanted = list(dict.fromkeys(wanted))
        if how.time is None:
            time = self.find_time(table, labels, [*wanted, *ids])
        self.check_labels(table, labels, time, [*wanted, *ids])
        if not asked:
            apart = {
                *time,
                *ids,
                *self.undecided,
                *(label for label in labels if not self.is_id_like(table, label)),
            }
            wanted = [column for column in columns if column not in apart]
            self.check_default(table, wanted, time, ids)
            if not self.any_numbers(table, wanted):
                wanted = []  # every cell of them would be listed
        return time, wanted

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

        calendar = [folded[name] for name in CALENDAR if name in folded and is_numeric(table[folded[name]])]
        if len(calendar) > 1 and [str(c).casefold() for c in calendar] == list(CALENDAR[: len(calendar)]):
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
                self.notes.append(f"{column!r} is taken as the time; time= and target= say otherwise")
                return [column]
        first = [column for column in table.columns if column not in labels][:1]
        return [c for c in first if c in columns and holds_dates(table[c])]

    def numbers_are_dates(self, column: Any) -> bool:
        """Whether numbers are dates of one step, without repeats."""
        problems: list[str] = []
        found = parse_stamps(column, problems, [])
        if problems or found is None:
            return False
        unique = np.unique(found[0])
        return len(unique) == len(column) and infer_freq(unique) is not None

    def is_id_like(self, table: pd.DataFrame, label: Any) -> bool:
        """Whether labels of rows repeat, as the names of several series do."""
        cells: Any = table[label]
        return not is_numeric(cells) and 1 < cells.nunique() < len(cells)

    def check_labels(self, table: pd.DataFrame, labels: list, time: list, taken: list) -> None:
        """An index that is neither time nor id nor a plain numbering is not dropped in silence."""
        if time or self.irregular == "ignore":
            return
        for label in labels:
            column: Any = table[label]
            if label in taken or self.is_id_like(table, label) or (len(column) > 1 and column.nunique() == 1):
                continue
            if counts_rows(column) and YEARS[0] < column.min() and column.max() < YEARS[1]:
                self.notes.append(f"the index {label!r} only numbers the rows; called 'year' it would be the time")
            if pd.api.types.is_timedelta64_dtype(column):
                self.problems.append(
                    f"the index {label!r} holds lengths of time, no dates; add the date of its start to it, or "
                    "reset_index(drop=True)"
                )
            elif not is_numeric(column):
                self.problems.append(
                    f"the index {label!r} holds no dates (first: {str(column.iloc[0])[:QUOTED]!r}); "
                    "reset_index(drop=True) leaves it out"
                )
            elif not counts_rows(column) and len(column) > 1:
                steps = np.diff(column.to_numpy(np.float64))
                row = int((steps != 1).argmax()) + 1
                self.problems.append(
                    f"the index {label!r} does not number the rows one after the other (row {row}: {column.iloc[row]} "
                    f"follows {column.iloc[row - 1]}): rows are out of order or left out; reset_index(drop=True) or "
                    "irregular='ignore' takes them as they come"
                )

    def any_numbers(self, table: pd.DataFrame, columns: list) -> bool:
        """Whether a column holds numbers, as such or as text."""
        return any(is_numeric(table[c]) or _to_number(table[c]).notna().any() for c in columns)

    def check_default(self, table: pd.DataFrame, wanted: list, time: list, ids: list) -> None:
        """Columns without a name and tables without numbers."""
        columns = list(table.columns)
        unnamed = [i for i, c in enumerate(columns) if str(c).strip() == "" or str(c).startswith("Unnamed: ")]
        if unnamed:
            self.problems.append(
                f"column {unnamed[0]} (counting from 0) has no name: a saved index? Name it, drop it, or give target="
            )
        for column in [c for c in wanted if str(c).casefold() in PERIOD_NAMES][:3]:
            self.notes.append(f"{column!r} is read as a variate; target= leaves it out")
        if wanted and not self.any_numbers(table, wanted):
            self.problems.append(f"no column of numbers; columns: {_quote(columns)}")
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
                self.problems.append(f"id column {column!r}: {empty.sum()} empty cells, {rows(empty)}")
                return None
        if len(columns) < 2:
            return table[columns[0]] if columns else None
        joined: Any = table[columns[0]].astype(str)
        for column in columns[1:]:
            joined = joined + "/" + table[column].astype(str)
        return joined.rename("/".join(map(str, columns)))

    # ---- time ----

    def stamps_of(self, table: pd.DataFrame, time: list) -> tuple[Stamps, str | None]:
        """(stamps [T] in UTC or as written, zone), or (None, None)."""
        if not time:
            return None, None
        column = table[time[0]] if len(time) == 1 else _joined_time(table, time)
        if self.how.date_format is not None:
            pass  # numbers in that layout are dates
        elif counts_rows(column) and not self.numbers_are_dates(column):
            # Following the message or naming the targets: the numbers are no stamps, the rows stay in their order.
            if self.irregular == "ignore" or (self.how.target is not None and self.how.time is None):
                self.notes.append(f"{column.name!r} only numbers the rows: there are no stamps")
                return None, None
        elif is_numeric(column) and self.irregular == "ignore" and not self.numbers_are_dates(column):
            self.notes.append(f"the numbers in {column.name!r} are no dates and were left out: there are no stamps")
            return None, None
        found = parse_stamps(
            column,
            self.problems,
            self.notes,
            date_format=self.how.date_format,
            freq=self.freq,
        )
        return found or (None, None)

    def clock(self, stamps: np.ndarray, tz: str | None) -> np.ndarray:
        """What steps are counted in: UTC, for steps of a day and more the clock on the wall."""
        if tz is None:
            return stamps
        wall = to_wall(stamps, tz)
        freq = self.freq or infer_freq(wall)
        return wall if freq is not None and on_wall(freq) else stamps

    def zone_of_steps(self, stamps: np.ndarray, tz: str) -> str:
        """The zone itself, or UTC where days at one time in UTC were only shown in it."""
        wall = to_wall(stamps, tz)
        freq = self.freq or infer_freq(wall)
        if freq is None or not on_wall(freq) or grid_share(wall, freq) >= grid_share(stamps, freq):
            return tz
        self.notes.append(f"the steps are regular in UTC, not on the clock in {tz}: the stamps are given in UTC")
        return "UTC"

    def look_for_ids(self, table: pd.DataFrame, time: list, targets: list, stamps: Stamps) -> None:
        """Refuse several series below one another by the name of the column(s) that tell them
        apart."""
        given = self.found(table, "id", self.how.id)
        asked = set(targets) if self.how.target is not None else set()
        apart = {*time, *given, *asked}
        columns = [c for c in table.columns if c not in apart]
        named = [c for c in columns if str(c).casefold() in ID_NAMES and _comes_in_kinds(table[c])]
        if stamps is not None:
            frame = pd.DataFrame({"stamp": stamps})
            for column in given:
                frame[f"given {column}"] = table[column].astype(str)
            repeats = float(frame.duplicated().mean())
            if repeats:
                able = [c for c in columns[:200] if c in named or _comes_in_kinds(table[c])]
                able = sorted(able, key=lambda c: (c not in named, is_numeric(table[c])))[:50]
                self.check_clock(table, able, time)
                several = [c for c in able if c in named or _tells_apart(table[c], repeats)]
                choices = [[c] for c in several] + [list(pair) for pair in itertools.combinations(several[:8], 2)]
                for columns in choices:
                    cells = {f"id {c}": table[c].astype(str) for c in columns}
                    if not frame.assign(**cells).duplicated().any():
                        self.refuse_ids(table, [*given, *columns])
        if named and not given:
            self.refuse_ids(table, named[:1])

    def check_clock(self, table: pd.DataFrame, able: list, time: list) -> None:
        """Refuse dates that repeat because the time of day is in a column of its own."""
        clock = [c for c in able if str(c).casefold() in ("hour", "hr")]
        if not clock or len(time) != 1:
            return
        both = [str(time[0]), str(clock[0])]
        self.problems = [f"stamps of {both[0]!r} repeat, and {both[1]!r} tells them apart: time={both!r} joins them"]
        self.stop()

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
            f"several series follow one another: {column} {' and '.join(map(repr, names))} of {len(kinds)} kinds "
            f"({first}{more}); id={option} reads each as a variate"
        ]
        self.stop()

    def on_grid(self, stamps: np.ndarray, values: np.ndarray, tz: str | None) -> tuple[np.ndarray, np.ndarray]:
        """(stamps, values) checked or put on the regular grid, as `irregular` says."""
        clock = self.clock(stamps, tz)
        self.freq = self.freq or infer_freq(clock)
        if self.irregular == "error":
            self.check_grid(clock)
        elif self.irregular == "regularise":
            every = np.arange(len(stamps))
            found = self.regularise(clock, [(every, row) for row in values])
            if found is not None:
                zone = tz if clock is not stamps else None
                return from_wall(found[0], zone), found[1]
        return stamps, values

    def check_grid(self, clock: np.ndarray) -> None:
        """Unsorted, repeated and off-grid stamps go to the problems, the first of each kind by
        name."""
        if len(clock) < 2:
            return
        found = []
        steps = np.diff(clock).astype(np.int64)
        if (steps < 0).any():
            i = int((steps < 0).argmax()) + 1
            count = (steps < 0).sum()
            found.append(f"{count} stamps earlier than the one before, first in row {i}: {show(clock[i])}")
        unique, first_rows = np.unique(clock, return_index=True)
        if len(unique) < len(clock):
            again = np.ones(len(clock), bool)
            again[first_rows] = False
            i = int(again.argmax())
            found.append(f"{again.sum()} stamps repeated, first in row {i}: {show(clock[i])}")
        advice = "irregular='regularise' sorts the rows and puts them on the regular grid, holes missing"
        if self.freq is None and len(unique) > 1:
            found.append("no step of time to be found in the stamps; give freq=")
            advice = "give freq= with irregular='regularise', which puts the rows on that grid, holes missing"
        elif self.freq is not None and rounded_step(unique) is None:
            places = Grid.through(unique, self.freq).places(unique)
            wrong = np.abs(np.diff(places) - 1) > 1e-9
            if wrong.any():
                i = int(wrong.argmax()) + 1
                where = f"first in row {first_rows[i]}: {show(unique[i])} follows {show(unique[i - 1])}"
                found.append(f"{wrong.sum()} steps that are not {self.freq}, {where}")
        if found:
            self.problems += [f"time: {f}" for f in found]
            self.problems.append(f"time: {advice}; irregular='ignore' takes them as they come")

    def regularise(
        self, clock: np.ndarray, tracks: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(stamps [T], values [C, T]) on the regular grid through stamps of all rows.

        Args:
          clock: stamps of all rows of the table.
          tracks: for each variate its rows in the table and its values there: moved to the nearest
            stamp of the grid, averaged where several rows meet.
        """
        if self.freq is None:
            self.problems.append("time: no step to be found in the stamps; give freq=")
            return None
        grid = Grid.through(np.sort(clock), self.freq)
        place = grid.places(clock)
        at = np.rint(place).astype(np.int64)
        start = int(at.min())
        stamps_at = grid.stamps(np.unique(at))
        off = stamps_at[np.searchsorted(np.unique(at), at)] != clock
        n = int(at.max()) - start + 1
        if n > 20 * len(clock):
            self.problems.append(
                f"time: a grid of step {self.freq} would have {n} rows for {len(clock)} stamps; give a longer freq="
            )
            return None
        values = np.full((len(tracks), n), np.nan)
        met = 0
        for c, (where, row) in enumerate(tracks):
            here = at[where] - start
            present = np.isfinite(row)
            # An infinite cell is an error or a hole, never part of a mean.
            seen = np.bincount(here[present], minlength=n)
            total = np.bincount(here[present], row[present], minlength=n)
            np.divide(total, seen, out=values[c], where=seen > 0)
            met = max(met, len(here) - len(np.unique(here)))
        holes = n - len(np.unique(at))
        unsorted = int((np.diff(clock[tracks[0][0]]).astype(np.int64) < 0).sum())
        if unsorted or met or holes or off.any():
            self.notes.append(
                f"put on a grid of step {self.freq}: {unsorted} stamps out of order, {off.sum()} rows moved to the "
                f"nearest stamp, {met} averaged with another, {holes} of {n} rows were holes"
            )
        return grid.stamps(start + np.arange(n)), values

    # ---- long tables ----

    def spread(
        self, stamps: Stamps, values: np.ndarray, targets: list, ids: Any, tz: str | None
    ) -> tuple[Stamps, np.ndarray, list]:
        """A long table with one variate per id (and target) beside one another, on the stamps all
        ids share."""
        if self.problems or not targets:
            return stamps, values, targets  # the cells can still be checked
        groups = {key: np.asarray(at) for key, at in ids.groupby(ids, sort=False, observed=True).indices.items()}
        names = [f"{key}" if len(targets) == 1 else f"{key}/{target}" for key in groups for target in targets]
        counts = collections.Counter(names)
        if doubled := sorted(name for name, count in counts.items() if count > 1):
            self.problems.append(f"ids and targets give one name twice: {_quote(doubled)}; rename them")
            return stamps, values, targets

        tracks = [(at, values[c, at]) for at in groups.values() for c in range(len(targets))]
        if stamps is not None and self.irregular == "regularise":
            clock = self.clock(stamps, tz)
            self.freq = self.freq or infer_freq(clock)
            found = self.regularise(clock, tracks)
            if found is None:
                return stamps, values, targets
            zone = tz if clock is not stamps else None
            return from_wall(found[0], zone), found[1], names

        first = next(iter(groups.values()))
        odd = [key for key, at in groups.items() if not _same_stamps(stamps, at, first)]
        if odd:
            self.problems.append(self.different_ids(stamps, groups, odd, ids.name))
            return stamps, values, targets
        wide = np.array([row for _, row in tracks])
        if stamps is None:
            return None, wide, names
        stamps, wide = self.on_grid(stamps[first], wide, tz)
        return stamps, wide, names

    def different_ids(self, stamps: Stamps, groups: dict, odd: list, name: Any) -> str:
        """Ids whose stamps differ from the first one's, and what to do."""
        lines = []
        for key in [next(iter(groups)), *odd[:3]]:
            span = "" if stamps is None else f", {show(stamps[groups[key][0]])} to {show(stamps[groups[key][-1]])}"
            lines.append(f"{str(key)[:QUOTED]}: {len(groups[key])} rows{span}")
        hint = "" if stamps is None else "; irregular='regularise' with missing='keep' puts them on one grid, holes NaN"
        return (
            f"{len(odd)} of {len(groups)} ids have other stamps or lengths than the first, so they are not variates of "
            f"one series ({'; '.join(lines)}); read each id on its own, as the rows of a DataFrame where "
            f"{str(name)[:QUOTED]!r} is that id{hint}"
        )

    # ---- values ----

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
                f"column {_short(targets[c])}: {large[c].sum()} numbers beyond {LARGEST:g}, which is the limit, "
                f"{rows(large[c], cells)}; give the column another unit"
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
                f"column {_short(name)} holds {column.dtype}, not real numbers; convert it, or choose columns with "
                f"target={hint}"
            )
            return np.full(len(column), np.nan)
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        number = _to_number(column)
        truth = np.array([isinstance(cell, bool | np.bool_) for cell in column])
        text = column.notna().to_numpy() & (number.isna().to_numpy() | truth)
        if text.any():
            hint = f"; time={str(name)!r} takes it as the time" if text.all() and holds_dates(column) else ""
            self.problems.append(
                f"column {_short(name)}: {text.sum()} cells are not numbers, {rows(text, column)}; "
                f"clean them (empty = missing) or choose columns with target={hint}"
            )
        elif any(isinstance(cell, str) for cell in column):
            self.problems.append(f"column {_short(name)} holds numbers as text; convert it with pandas.to_numeric")
        return number.to_numpy(np.float64, na_value=np.nan)

    def without_future(self, stamps: Stamps, values: np.ndarray) -> tuple[Stamps, np.ndarray]:
        """(stamps, values) without the last rows in which every variate is empty: nobody has
        observed them yet."""
        seen: Any = ~np.isnan(values).all(axis=0)
        if self.problems or not seen.any() or seen[-1]:
            return stamps, values
        end = int(np.flatnonzero(seen)[-1]) + 1
        count = values.shape[1] - end
        self.notes.append(f"the last {count} rows hold no value and were cut off: they are the future")
        return None if stamps is None else stamps[:end], values[:, :end]

    def fill(self, values: np.ndarray, columns: list, stamps: Stamps) -> np.ndarray:
        """Refuse, fill or keep the cells that are not finite, as `missing` says."""
        bad: Any = ~np.isfinite(values)
        changed: list[str] = []
        values = values.copy()
        interpolate = self.how.missing == "interpolate"
        ends = self.future_rows(values)
        unread = tuple(p for p in self.problems if p.startswith("column "))
        for c in np.flatnonzero(bad.any(axis=1)):
            name = _short(columns[c])
            if any(problem.startswith(f"column {name}") for problem in unread):
                continue
            infinite = np.isinf(values[c])
            missing = np.zeros_like(infinite) if self.how.missing == "keep" else np.isnan(values[c])
            kinds = ((missing, "missing"), (infinite, "infinite"))
            what = [f"{mask.sum()} {kind}, {rows(mask, stamps=stamps)}" for mask, kind in kinds if mask.any()]
            tail = _tail(bad[c])
            if bad[c].all():
                self.problems.append(f"column {name}: not one finite value")
            elif self.how.missing == "error" or (infinite.any() and not interpolate):
                # Infinite cells are no holes: "keep" refuses them too.
                kept = "" if infinite.any() else "missing='keep' leaves them empty, "
                self.problems.append(
                    f"column {name}: {'; '.join(what)}; missing='interpolate' fills them, {kept}or clean the "
                    f"column{ends}"
                )
            elif interpolate and tail > max(_longest_gap(bad[c]), 1) and tail > _tail(bad.all(axis=0)):
                self.problems.append(
                    f"column {name}: the last {tail} rows are empty where other columns go on, and a forecast would "
                    "begin after them; name the columns to forecast by target=, which cuts the rows off as the future, "
                    "or leave them empty by missing='keep'"
                )
            else:
                changed.append(f"{str(columns[c])[:QUOTED]} {bad[c].sum()}")
            if interpolate and not bad[c].all():
                every = np.arange(values.shape[1])
                values[c, bad[c]] = np.interp(every[bad[c]], every[~bad[c]], values[c, ~bad[c]])
        if changed:
            done = "filled by linear interpolation" if interpolate else "kept"
            self.notes.append(f"missing cells {done} ({100 * bad.mean():.3g} % of all): {_quote(changed)}")
        return values

    def future_rows(self, values: np.ndarray) -> str:
        """What to say of last rows without any value, where missing values are errors."""
        empty: Any = np.isnan(values).all(axis=0)
        if not len(empty) or not empty[-1] or empty.all():
            return ""
        count = len(empty) - 1 - int(np.flatnonzero(~empty)[-1])
        return f" (the last {count} rows hold no value: missing='keep' cuts them off as the future)"


def _tail(bad: np.ndarray) -> int:
    """How many of the last cells [T] are empty."""
    return len(bad) if bad.all() else int(bad[::-1].argmin())


def _longest_gap(bad: np.ndarray) -> int:
    """The longest run of empty cells [T] with values on both sides."""
    at = np.flatnonzero(~bad)
    return int(np.diff(at).max(initial=1)) - 1


def _joined_time(table: pd.DataFrame, time: list) -> Any:
    """One column of text from several of time: date and hour, year and month and day."""
    parts = []
    for column in time:
        cells: Any = table[column]
        whole = is_numeric(cells) and cells.notna().all() and (cells == np.rint(cells)).all()
        text = cells.astype("int64").astype(str) if whole else cells.astype(str)
        if is_time(cells) and not is_numeric(cells):
            text = pd.Series(pd.DatetimeIndex(pd.to_datetime(cells)).strftime("%Y-%m-%d"), index=cells.index)
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


def _comes_in_kinds(cells: Any) -> bool:
    """Whether cells are names of kinds, each of several rows: text, categories or whole numbers."""
    if is_time(cells) or pd.api.types.is_float_dtype(cells):
        return False
    if pd.api.types.is_bool_dtype(cells):
        return False
    kinds = cells.nunique()
    return 2 <= kinds <= len(cells) / 2 and not cells.isna().any()


def _tells_apart(cells: Any, repeats: float) -> bool:
    """Whether kinds look like series: they stand in blocks, or many of the stamps repeat."""
    changes = int((cells.to_numpy()[1:] != cells.to_numpy()[:-1]).sum())
    blocks = changes + 1 == cells.nunique() and not is_numeric(cells)
    return blocks or repeats >= 0.25


def _same_stamps(stamps: Stamps, at: np.ndarray, first: np.ndarray) -> bool:
    if len(at) != len(first):
        return False
    return stamps is None or np.array_equal(stamps[at], stamps[first])


def _least(cells: Any) -> float:
    """The least of numbers; minus infinity for other cells."""
    return float(cells.min()) if is_numeric(cells) and len(cells) else -np.inf


def _hashable(name: Any) -> bool:
    try:
        hash(name)
        return True
    except TypeError:
        return False


def _near(name: Any, columns: list) -> str:
    """What a missing name may have meant, and what there is."""
    folded = {str(c)[:200].casefold(): str(c) for c in columns[:2000]}
    close = difflib.get_close_matches(str(name)[:200].casefold(), folded, n=3, cutoff=0.5)
    near = [_short(folded[c]) for c in close]
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"columns: {_quote(columns)}"


def _short(name: Any) -> str:
    return repr(str(name)[:QUOTED] if isinstance(name, str) else name)[: QUOTED + 20]


def _quote(items: Sequence[Any]) -> str:
    shown = ", ".join(str(item)[:QUOTED] for item in items[:12])
    return shown + (f", ... ({len(items)} in all)" if len(items) > 12 else "")


def _to_number(column: Any) -> Any:
    try:
        return pd.to_numeric(column, errors="coerce")
    except OverflowError:  # whole numbers beyond float64 are beyond every limit
        huge = column.map(lambda cell: isinstance(cell, int) and abs(cell) > LARGEST)
        return pd.to_numeric(column.mask(huge, 10 * LARGEST), errors="coerce")
