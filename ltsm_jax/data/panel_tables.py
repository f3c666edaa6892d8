"""Tables in, long or wide -> `Panel`: items of different lengths, starts and gaps, with covariates.

A long table holds items below one another, told apart by an id; a wide one is a single item whose
columns are its targets. What is wrong is collected and raised as one `DataError`; what was done
(sorted, holes made rows, columns taken for covariates) stands in `Panel.notes`.

No step loops over the items where these have a constant step: rows are sorted once, by item and
time, and each column is then scattered to its rows of the grid.

Shapes: N items, T rows of the table, R rows of the grids of all items together, F rows ahead.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from ltsm_jax.data.columns import ID_NAMES, QUOTED, Name, TableReader, joined_time, quote, short, to_number
from ltsm_jax.data.items import (
    Items,
    Steps,
    coarser,
    common_freq,
    fill_linearly,
    inside,
    places_in_item,
    steps_of,
)
from ltsm_jax.data.panel import Panel
from ltsm_jax.data.series import Series, clip
from ltsm_jax.data.sources import as_table
from ltsm_jax.data.stamps import counts_rows, is_numeric, is_time, parse_stamps, rows, show
from ltsm_jax.data.tables import check_options, longest_gap, tail
from ltsm_jax.frequency import (
    LENGTHS,
    MONTHS,
    DayRule,
    Grid,
    canonical_freq,
    count_unit,
    day_rule,
    from_wall,
    microseconds,
    on_wall,
    places_from,
    rounded_step,
    to_wall,
)

TARGET_NAMES = ("target", "y", "value")
SURE_ID_NAMES = ("id", "item_id", "unique_id", "series_id", "ts_id")  # ids even of one kind
FIRST = 3  # items named in a message
MOST_HOLES = 20  # rows of a grid for each row of the table
MOST_AHEAD = 10_000  # steps ahead, where items are short
MANY_KINDS = 10_000  # more kinds of text are no categories


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanelOptions:
    """How a table of many items is read; the keywords of `read_panel`.

    Attributes:
      id: the column(s) that tell the items apart; several are joined by "/". By default a column
        called id, item_id, unique_id, ... where stamps repeat and it tells them apart, or the
        levels of the index beside the time. A table without one is a single item.
      time: the column(s) of stamps, found as in `ReadingOptions.time`. Whole numbers that are no
        dates count the rows.
      target: the column(s) to forecast. By default, of a long table, the one called target, y or
        value, or the only column of numbers that is left; of a wide one every column of numbers.
      known: covariates known ahead: the table holds them in rows behind the last target, or
        `future` does. By default the columns of `future`, and those with values behind the last
        target.
      past: covariates known up to the last target only. By default what is left over.
      static: facts of an item, the same in all its rows. By default columns that are.
      future: a second table (whatever `source` may be) with id, time and the covariates ahead.
      freq, date_format: as in `ReadingOptions`; by default the most common step of the items.
      missing: "keep" leaves empty targets NaN, "error" refuses them, "interpolate" fills them
        linearly in time within the item, and at its ends with the nearest value. Rows behind the
        last target are the future in any case.
      irregular: "error" refuses items off the grid of the common step (rows out of order are
        sorted, and holes are made rows, with a note); "regularise" moves each row to the nearest
        stamp of the grid and averages those that meet there; "ignore" takes the rows as they come,
        without stamps.
      name: what reports call the panel; by default the file's name.

    Raises: ValueError for a value that is none of those listed.
    """

    id: Name | Sequence[Name] | None = None
    time: Name | Sequence[Name] | None = None
    target: Name | Sequence[Name] | None = None
    known: Name | Sequence[Name] | None = None
    past: Name | Sequence[Name] | None = None
    static: Name | Sequence[Name] | None = None
    future: Any = None
    freq: Any = None
    date_format: str | None = None
    missing: Literal["keep", "error", "interpolate"] = "keep"
    irregular: Literal["error", "regularise", "ignore"] | None = None
    name: str | None = None

    def __post_init__(self):
        check_options(self, ("target", "time", "id", "known", "past", "static"))


def read_panel(
    source: Any,
    *,
    id: Name | Sequence[Name] | None = None,
    time: Name | Sequence[Name] | None = None,
    target: Name | Sequence[Name] | None = None,
    known: Name | Sequence[Name] | None = None,
    past: Name | Sequence[Name] | None = None,
    static: Name | Sequence[Name] | None = None,
    future: Any = None,
    freq: Any = None,
    date_format: str | None = None,
    missing: Literal["keep", "error", "interpolate"] = "keep",
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
) -> Panel:
    """Read a table of one item or many, long or wide, with covariates.

    The options are described in `PanelOptions`, field by field.

    Args:
      source: a file, a pandas DataFrame or Series, an array [T] or [T, C] (rows first), a polars or
        Arrow table. A `Series` becomes a panel of one item; a `Panel` is returned as it is.

    Example: `read_panel("shops.csv", id="shop", target="sold", future="prices.csv")`
    Raises: DataError (a ValueError) with every problem found; FileNotFoundError when there is no
      such file; ValueError for options beside a source that has been read already.
    """
    how = PanelOptions(
        id=id,
        time=time,
        target=target,
        known=known,
        past=past,
        static=static,
        future=future,
        freq=freq,
        date_format=date_format,
        missing=missing,
        irregular=irregular,
        name=name,
    )
    if isinstance(source, Panel | Series):
        return _read_already(source, how)
    return _PanelReader(how, source).read()


def _read_already(source: Panel | Series, how: PanelOptions) -> Panel:
    given = []
    for field in dataclasses.fields(PanelOptions):
        value = getattr(how, field.name)
        if value is not None and value is not field.default and field.name != "name":
            given.append(field.name)
    if given:
        kind = type(source).__name__
        raise ValueError(f"{', '.join(given)}: no options of a {kind}, which has been read already; give the table")
    panel = Panel.of(source) if isinstance(source, Series) else source
    return panel if how.name is None else dataclasses.replace(panel, name=how.name)


@dataclasses.dataclass
class _Roles:
    """Columns of a table by what they are."""

    time: list
    id: list
    target: list
    known: list
    past: list
    static: list
    left: list  # not decided yet: their values tell


@dataclasses.dataclass
class _Times:
    """Times of the rows of a table and of the rows ahead.

    Attributes:
      clock: [T] int64, microseconds in UTC (or as written), or whole numbers that count the rows;
        None where there is no time.
      ahead: the same of the rows ahead.
      tz: zone of the stamps.
      numbers: the clock counts rows.
    """

    clock: np.ndarray | None = None
    ahead: np.ndarray | None = None
    tz: str | None = None
    numbers: bool = False


@dataclasses.dataclass
class _Grids:
    """Where the sorted rows lie on the grids of their items.

    Attributes:
      place: [T] whole places, 0 the first row of an item.
      first: [N] datetime64[us] stamp of place 0, as the steps are counted; None without stamps.
      zone: zone of the clock on the wall that the steps are counted on, or None.
      rules: the day in the month; see `Panel.rules`.
      numbered: step of a clock that counts rows.
    """

    place: np.ndarray
    first: np.ndarray | None = None
    zone: str | None = None
    rules: tuple[DayRule, ...] = ()
    numbered: tuple[np.ndarray, int] | None = None


class _PanelReader(TableReader):
    """One table, perhaps with a second one of the rows ahead, on its way to a `Panel`."""

    how: PanelOptions
    kind_of_id = "an item"

    def read(self) -> Panel:
        table, labels = self.index_as_columns(as_table(self.source, self.notes))
        self.check_shape(table)
        self.stop()
        ahead = self.rows_ahead()
        roles = self.choose(table, labels)
        self.check_ahead(table, ahead, roles)
        self.stop()
        times = self.times_of(table, ahead, roles)
        self.stop()
        self.find_ids(table, roles, times)
        ids, codes, codes_ahead = self.items_of(table, ahead, roles)
        self.stop()
        self.choose_by_kind(table, ahead, roles, codes, codes_ahead)
        values = self.numbers(table, roles.target)
        self.stop()

        items, grids = self.grids_of(codes, times, ids)
        self.stop()
        sorted_values = items.sorted(values)
        del values
        last = self.last_rows(items, grids.place, sorted_values, ids)
        self.stop()
        layout = _Layout.of(items, grids.place, last, ids)
        self.choose_by_place(table, roles, layout)
        targets = np.array([layout.spread(row) for row in sorted_values])
        del sorted_values
        self.check_ends(targets, roles)

        filled = self.filled(targets, roles.target, layout)
        rows = self.steps_ahead(times, grids, codes_ahead, layout)
        covariates = self.covariates(table, ahead, roles, layout, rows)
        static = self.static_of(table, roles, codes, len(ids))
        self.stop()
        return Panel(
            name=self.name,
            ids=ids,
            columns=tuple(map(str, roles.target)),
            values=filled,
            bounds=layout.bounds,
            first=None if grids.first is None else from_wall(grids.first, grids.zone),
            freq=self.freq,
            tz=times.tz,
            rules=grids.rules,
            id_name="/".join(map(str, roles.id)) or None,
            time_name=str(roles.time[0]) if grids.first is not None and len(roles.time) == 1 else None,
            static=static,
            notes=tuple(clip(note, 500) for note in self.notes),
            **covariates,
        )

    # ---- columns ----

    def rows_ahead(self) -> pd.DataFrame | None:
        """The table of the rows ahead, its index as columns in front."""
        if self.how.future is None:
            return None
        notes: list[str] = []
        ahead, _ = self.index_as_columns(as_table(self.how.future, notes))
        self.notes += [f"future: {note}" for note in notes]
        self.check_shape(ahead)
        self.problems = [f"future: {problem}" for problem in self.problems]
        self.stop()
        return ahead

    def choose(self, table: pd.DataFrame, labels: list) -> _Roles:
        """What the options say of each column, and the time."""
        asked = {}
        for role in ("target", "known", "past", "static", "id", "time"):
            given = getattr(self.how, role)
            asked[role] = self.found(table, role, given)
            if given is not None and not asked[role] and not self.problems:
                self.problems.append(f"{role} is an empty list")
        counts = collections.Counter(column for columns in asked.values() for column in columns)
        if doubled := [column for column, count in counts.items() if count > 1]:
            self.problems.append(f"columns named more than once, or for two roles: {quote(doubled)}")

        roles = _Roles(**asked, left=[])
        taken = list(counts)
        if self.how.time is None:
            roles.time = self.find_time(table, labels, taken)
        if self.how.id is None and len(labels) > 1 and set(labels) & set(roles.time):
            roles.id = [label for label in labels if label not in (*roles.time, *taken)]
            names = " and ".join(map(str, roles.id))
            self.notes.append(f"{names}, of the index, tells the items apart")
        if not roles.id:
            self.check_labels(table, labels, roles.time, taken)

        apart = {*taken, *roles.time, *roles.id, *labels, *self.undecided}
        for column in table.columns:
            nameless = str(column).strip() == "" or str(column).startswith("Unnamed: ")
            if column not in apart and nameless and counts_rows(table[column]):
                self.notes.append(f"a column without a name ({short(column)}) only numbers the rows and was left out")
            elif column not in apart:
                roles.left.append(column)
        return roles

    def check_ahead(self, table: pd.DataFrame, ahead: pd.DataFrame | None, roles: _Roles) -> None:
        """The rows ahead need the time and the covariates that are asked for."""
        if ahead is None:
            return
        for role, columns in (("time", roles.time), ("id", roles.id), ("known", roles.known)):
            before = len(self.problems)
            self.found(ahead, role, columns)
            self.problems[before:] = [f"future: {problem}" for problem in self.problems[before:]]
        kept = {*roles.time, *roles.id, *roles.known, *roles.left, *roles.static}
        if more := [column for column in ahead.columns if column not in kept]:
            self.notes.append(f"columns of future that were left out: {quote(more)}")

    def find_ids(self, table: pd.DataFrame, roles: _Roles, times: _Times) -> None:
        """Take the columns that tell items apart by their names; refuse to guess others."""
        if roles.id:
            return
        taken = {*roles.time, *roles.target, *roles.known, *roles.past, *roles.static}
        named = self.named_ids(table, taken)
        sure = [c for c in table.columns if c not in taken and str(c).casefold() in SURE_ID_NAMES]
        one_kind = [c for c in sure if c not in named and _one_kind(table[c])]
        stamps = None if times.clock is None else times.clock
        choices = self.ids_that_tell_apart(table, roles.time, taken, stamps)
        if choices and all(str(c).casefold() in ID_NAMES for c in choices[0]):
            roles.id = choices[0]
        elif choices:
            self.refuse_ids(table, choices[0])
        elif named or one_kind:
            roles.id = [*named, *one_kind][:1]
        if roles.id:
            names = " and ".join(repr(str(column)) for column in roles.id)
            self.notes.append(f"{names} tells the items apart; id= says otherwise")
            roles.left = [column for column in roles.left if column not in roles.id]

    def choose_by_kind(
        self,
        table: pd.DataFrame,
        ahead: pd.DataFrame | None,
        roles: _Roles,
        codes: np.ndarray,
        codes_ahead: np.ndarray | None,
    ) -> None:
        """Columns left over: the target where none is named, facts of the items, what is ahead."""
        if roles.id and not roles.target:
            named = [column for column in roles.left if str(column).casefold() in TARGET_NAMES]
            if len(named) == 1:
                roles.target = named
        roles.left = [column for column in roles.left if column not in roles.target]

        known_ahead = []
        for column in list(roles.left):
            cells_ahead = ahead[column] if ahead is not None and column in set(ahead.columns) else None
            if roles.id and self.is_fact(table[column], codes, cells_ahead, codes_ahead):
                roles.static.append(column)
            elif cells_ahead is not None:
                known_ahead.append(column)
            else:
                continue
            roles.left.remove(column)
        if self.how.known is None:
            roles.known = known_ahead
        elif known_ahead:
            self.notes.append(f"known= leaves out columns of future: {quote(known_ahead)}")

        if not roles.target and roles.id:
            self.choose_target(table, roles)
        elif not roles.target:
            roles.target, roles.left = roles.left, []
            self.check_default(table, roles.target, roles.time, roles.id)
            if not self.any_numbers(table, roles.target):
                roles.target = []  # every cell of them would be listed
        taken = [column for column in roles.static if getattr(self.how, "static", None) is None]
        if taken:
            self.notes.append(f"the same in all rows of an item, and taken for its facts (static): {quote(taken)}")

    def choose_target(self, table: pd.DataFrame, roles: _Roles) -> None:
        """The only column of numbers that is left; several are refused by name."""
        numbers = [column for column in roles.left if self.any_numbers(table, [column])]
        if len(numbers) == 1:
            roles.target = numbers
            roles.left.remove(numbers[0])
            self.notes.append(f"{str(numbers[0])!r} is taken for the target: no other column of numbers is left")
            return
        if numbers:
            named = quote(numbers)
            self.problems.append(
                f"several columns may be the target: {named}; say which with target= (several are forecast side by "
                "side); the others are covariates, those that are known ahead by known="
            )
        else:
            self.problems.append(f"no column of numbers to forecast; columns: {quote(list(table.columns))}")

    def is_fact(self, cells: Any, codes: np.ndarray, ahead: Any, codes_ahead: np.ndarray | None) -> bool:
        """Whether cells, empty ones aside, are the same in all rows of each item, those ahead too."""
        if ahead is not None and codes_ahead is not None:
            cells = pd.concat([cells, ahead], ignore_index=True)
            codes = np.concatenate([codes, codes_ahead])
            cells, codes = cells[codes >= 0], codes[codes >= 0]
        return self.fact(cells, codes, int(codes.max()) + 1) is not None

    def fact(self, cells: Any, codes: np.ndarray, n: int) -> Any:
        """One row of each item [n] that has a cell, or -1; None where cells of an item differ."""
        kinds, _ = pd.factorize(cells)
        present = np.flatnonzero(kinds >= 0)
        row = np.full(n, -1)
        row[codes[present[::-1]]] = present[::-1]  # the first one is written last
        same = kinds[present] == kinds[row[codes[present]]]
        return row if same.all() else None

    def choose_by_place(self, table: pd.DataFrame, roles: _Roles, layout: "_Layout") -> None:
        """Covariates left over: known ahead where rows behind the last target hold them, else past."""
        behind = layout.rows_behind()
        known, past, out = [], [], []
        for column in roles.left:
            cells: Any = table[column]
            many = not is_numeric(cells) and not pd.api.types.is_bool_dtype(cells) and cells.nunique() > MANY_KINDS
            if is_time(cells) or many or cells.isna().all():
                out.append(column)
            elif self.how.known is None and len(behind) and cells.iloc[behind].notna().any():
                known.append(column)
            else:
                past.append(column)
        roles.known, roles.past, roles.left = [*roles.known, *known], [*roles.past, *past], []
        if known:
            self.notes.append(f"covariates known ahead, with values behind the last target: {quote(known)}")
        if past:
            self.notes.append(f"columns left over are past covariates: {quote(past)}")
        if out:
            self.notes.append(f"columns left out (dates, empty, or more than {MANY_KINDS} kinds): {quote(out)}")
        count = len(behind)
        if count and not roles.known:
            self.notes.append(f"{count} rows behind the last target of their item were cut off: they are the future")

    # ---- items ----

    def items_of(
        self, table: pd.DataFrame, ahead: pd.DataFrame | None, roles: _Roles
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids [N], item of each row [T], of each row ahead: -1 where the table has no such item)."""
        if not roles.id:
            ids = np.array([self.name], object)
            none = None if ahead is None else np.zeros(len(ahead), np.int64)
            return ids, np.zeros(len(table), np.int64), none
        column = self.joined(table, "id", roles.id)
        if column is None:
            return np.zeros(0, object), np.zeros(0, np.int64), None
        codes, kinds = pd.factorize(column)
        ids = _own_type(kinds)
        if ahead is None:
            return ids, codes, None

        before = len(self.problems)
        column = self.joined(ahead, "id", roles.id)
        self.problems[before:] = [f"future: {problem}" for problem in self.problems[before:]]
        if column is None:
            return ids, codes, None
        codes_ahead = pd.Index(ids).get_indexer(pd.Index(_own_type(column)))
        unknown = codes_ahead < 0
        if unknown.all():
            self.problems.append(
                f"future: not one of its ids is in the table (future: {quote(list(column[:FIRST]))}; table: "
                f"{quote(list(ids[:FIRST]))}); ids must be of one type"
            )
        elif unknown.any():
            kinds = list(dict.fromkeys(column[unknown]))
            self.notes.append(f"future rows of ids that the table has not were left out: {quote(kinds)}")
        return ids, codes, codes_ahead

    def named(self, ids: np.ndarray, which: np.ndarray) -> str:
        """The first few of the items where `which` [N] holds."""
        at = np.flatnonzero(which)
        shown = ", ".join(str(ids[i])[:QUOTED] for i in at[:FIRST])
        return shown + (", ..." if len(at) > FIRST else "")

    def several(self, ids: np.ndarray, which: np.ndarray) -> str:
        """How many items, and the first of them: "2 of 9 items (a, b)"; nothing where there is one."""
        if len(ids) == 1:
            return ""
        return f" of {int(which.sum())} of {len(ids)} items ({self.named(ids, which)})"

    # ---- time ----

    def times_of(self, table: pd.DataFrame, ahead: pd.DataFrame | None, roles: _Roles) -> _Times:
        """The times of the rows, and of those ahead: one layout of dates for both."""
        if not roles.time:
            return _Times()
        column = self.time_column(table, roles.time)
        column_ahead = None if ahead is None else self.time_column(ahead, roles.time)
        both = [column] if column_ahead is None else [column, column_ahead]
        numbers = is_numeric(column) and self.how.date_format is None
        if numbers and self.counts(both):
            self.notes.append(f"{column.name!r} only numbers the rows: there are no stamps")
            found = [cells.to_numpy(np.int64) for cells in both]
            return _Times(found[0], found[1] if len(found) > 1 else None, None, numbers=True)

        if len(both) > 1 and is_time(both[0]) == is_time(both[1]) and not is_time(column):
            # Text of both is read together: 02/03 may be decided by a date of either.
            together = self.stamps_of_kinds(pd.concat(both, ignore_index=True).rename(column.name))
            if together is None:
                return _Times()
            stamps, tz = together
            return _Times(stamps[: len(column)], stamps[len(column) :], tz)
        found = [self.stamps_of_kinds(cells) for cells in both]
        if found[0] is None or found[-1] is None:
            return _Times()
        (stamps, tz), (stamps_ahead, tz_ahead) = found[0], found[-1]
        if (tz is None) != (tz_ahead is None):
            self.problems.append("the table and future must both have stamps with a zone, or both without")
        return _Times(stamps, None if column_ahead is None else stamps_ahead, tz)

    def time_column(self, table: pd.DataFrame, time: list) -> Any:
        """The column of time: one, or several joined."""
        return table[time[0]] if len(time) == 1 else joined_time(table, time)

    def counts(self, columns: list) -> bool:
        """Whether columns of numbers count the rows: whole numbers that are no dates."""
        kinds: Any = pd.Series(pd.concat(columns, ignore_index=True).unique()).sort_values()
        if kinds.isna().any() or not (kinds == np.rint(kinds)).all():
            return False
        return not self.numbers_are_dates(kinds)

    def stamps_of_kinds(self, column: Any) -> tuple[np.ndarray, str | None] | None:
        """(microseconds int64 [T], zone) of a column; text and numbers are read once for each kind."""
        if is_time(column) or column.isna().any():
            found = parse_stamps(column, self.problems, self.notes, date_format=self.how.date_format, freq=self.freq)
            return None if found is None else (found[0].astype(np.int64), found[1])
        codes, kinds = pd.factorize(column)
        kinds = pd.Series(kinds, name=column.name)
        before = len(self.problems)
        found = parse_stamps(kinds, self.problems, self.notes, date_format=self.how.date_format, freq=self.freq)
        if found is None:
            # Read again, as a whole: the rows in a message are those of the table.
            if len(column) < 10**6:
                del self.problems[before:]
                parse_stamps(column, self.problems, [], date_format=self.how.date_format, freq=self.freq)
            return None
        return found[0].astype(np.int64)[codes], found[1]

    # ---- grids ----

    def grids_of(self, codes: np.ndarray, times: _Times, ids: np.ndarray) -> tuple[Items, _Grids]:
        """Sort the rows and place each on the grid of its item."""
        if times.clock is None:
            items = Items.sort(codes, len(ids), None)
            return items, _Grids(items.clock)
        items = Items.sort(codes, len(ids), times.clock)
        if self.irregular == "ignore":
            self.notes.append("the rows of each item are taken as they come, without stamps")
            if self.freq is None and not times.numbers:
                self.freq = common_freq(items, steps_of(items))
            times.clock = times.ahead = None
            items = Items.sort(codes, len(ids), None)
            return items, _Grids(items.clock)
        if items.unsorted.any():
            which = self.several(ids, items.unsorted)
            self.notes.append(f"rows{which} were out of order in time, and were sorted")
        if times.numbers:
            return items, self.numbered_grids(items, ids)
        return self.stamped_grids(items, times, ids)

    def numbered_grids(self, items: Items, ids: np.ndarray) -> _Grids:
        """Places of rows that are counted by whole numbers."""
        steps = steps_of(items)
        common = max(steps.common, 1)
        first = items.clock[items.starts[:-1]]
        place = (items.clock - np.repeat(first, items.counts)) / common
        off = place != np.rint(place)
        self.check_places(items, np.rint(place).astype(np.int64), off, ids, steps, unit="rows")
        return _Grids(np.rint(place).astype(np.int64), numbered=(first, common))

    def stamped_grids(self, items: Items, times: _Times, ids: np.ndarray) -> tuple[Items, _Grids]:
        """Places of rows with stamps on the grids of the common step."""
        items, steps, zone = self.counted(items, times)
        stamps = items.clock.view("datetime64[us]")
        first = stamps[items.starts[:-1]].copy()
        if self.freq is None:
            if (items.counts > 1).any():
                self.problems.append("time: no step of time to be found in the stamps; give freq=")
            return items, _Grids(items.clock - np.repeat(first.astype(np.int64), items.counts), first, zone)

        place, off = self.places(items, stamps, first, steps)
        if self.irregular == "regularise" and off.any():
            self.move_to_grids(items, stamps, place, first, off)
        self.check_places(items, place, off, ids, steps, unit=self.freq)
        return items, _Grids(place, first, zone, self.rules_of(items, stamps))

    def counted(self, items: Items, times: _Times) -> tuple[Items, Steps, str | None]:
        """(items with the clock that steps are counted on, their steps, the zone of that clock).

        Steps of a day and more are counted on the clock on the wall; those under a day, and days
        that are regular in UTC only, in UTC.
        """
        steps = steps_of(items)
        if times.tz is not None:
            on_the_wall = dataclasses.replace(items, clock=_wall(items.clock, times.tz))
            wall_steps = steps_of(on_the_wall)
            freq = self.freq or common_freq(on_the_wall, wall_steps)
            if freq is not None and on_wall(freq):
                length = microseconds(freq)
                if length != steps.common or steps.share <= wall_steps.share:
                    self.freq = freq
                    return on_the_wall, wall_steps, times.tz
                self.notes.append(
                    f"the steps are regular in UTC, not on the clock in {times.tz}: the stamps are given in UTC"
                )
                times.tz = "UTC"
        self.freq = self.freq or common_freq(items, steps)
        return items, steps, None

    def places(
        self, items: Items, stamps: np.ndarray, first: np.ndarray, steps: Steps
    ) -> tuple[np.ndarray, np.ndarray]:
        """(whole places [T] in their items, which rows are off the grid [T])."""
        assert self.freq is not None
        if steps.constant and steps.common == microseconds(self.freq) and not self.repeated_times(items).any():
            return places_in_item(items.starts), np.zeros(len(stamps), bool)
        exact = places_from(np.repeat(first, items.counts), stamps, self.freq)
        place = np.rint(exact).astype(np.int64)
        off = np.abs(exact - place) > 1e-9
        if count_unit(self.freq)[1] == "B":
            off |= ~np.is_busday(stamps.astype("datetime64[D]"))
        length = microseconds(self.freq)
        if length is not None and length < LENGTHS["s"]:
            for i in np.unique(items.owners[off]):
                rows_of = items.rows(i)
                # A rate of many hertz, written in whole milliseconds, is a regular one.
                if rounded_step(stamps[rows_of]) is not None:
                    place[rows_of] = np.arange(rows_of.stop - rows_of.start)
                    off[rows_of] = False
        return place, off

    def repeated_times(self, items: Items) -> np.ndarray:
        """Which steps [T - 1] lead from a row to another of the same item and time."""
        return (items.clock[1:] == items.clock[:-1]) & inside(items.starts)

    def move_to_grids(
        self, items: Items, stamps: np.ndarray, place: np.ndarray, first: np.ndarray, off: np.ndarray
    ) -> None:
        """Move the rows of items that are off the grid to its nearest stamps, in place."""
        assert self.freq is not None
        moved = 0
        for i in np.unique(items.owners[off]):
            rows_of = items.rows(i)
            grid = Grid.through(stamps[rows_of], self.freq)
            at = np.rint(grid.places(stamps[rows_of])).astype(np.int64)
            moved += int((grid.stamps(at) != stamps[rows_of]).sum())
            place[rows_of] = at - at.min()
            first[i] = grid.stamps(at.min()[None])[0]
        self.notes.append(f"{moved} rows moved to the nearest stamp of a grid of step {self.freq}")

    def check_places(
        self,
        items: Items,
        place: np.ndarray,
        off: np.ndarray,
        ids: np.ndarray,
        steps: Steps,
        unit: str,
    ) -> None:
        """Rows off the grid, at one time, and holes: refused, or said in the notes."""
        met = (place[1:] == place[:-1]) & inside(items.starts)
        twice = met & (items.clock[1:] == items.clock[:-1])
        if self.irregular == "error":
            self.check_steps(items, place, off, ids, steps, unit)
            if met.any():
                self.problems.append(self.meeting(items, twice if twice.any() else met, ids, steps, bool(twice.any())))
        elif met.any():
            self.notes.append(f"{int(met.sum())} rows averaged with another at the same stamp")
        lengths = place[items.starts[1:] - 1] + 1
        holes = int(lengths.sum()) - len(place) + int(met.sum())
        if holes > MOST_HOLES * len(place):
            self.problems.append(
                f"time: grids of step {unit} would have {int(lengths.sum())} rows for {len(place)} "
                "of the table; give a longer freq="
            )
        elif holes and not self.problems:
            counts = items.counts - np.bincount(items.owners[1:][met], minlength=items.n)
            which = lengths > counts
            self.notes.append(
                f"{holes} stamps{self.several(ids, which)} had no row, and are rows of missing values now"
            )

    def check_steps(
        self, items: Items, place: np.ndarray, off: np.ndarray, ids: np.ndarray, steps: Steps, unit: str
    ) -> None:
        """Items of another step, and rows beside the grid, go to the problems, the first by name."""
        beside = np.zeros(items.n, bool)
        beside[items.owners[off]] = True
        other = coarser(items, place) | (beside & (steps.usual != steps.common) & (steps.usual > 0))
        beside &= ~other
        advice = "irregular='regularise' puts every item on that grid, holes missing"
        if other.any():
            shown = []
            for i in np.flatnonzero(other)[:FIRST]:
                own = str(steps.usual[i]) if unit == "rows" else canonical_freq(f"{steps.usual[i]}us")
                shown.append(f"{str(ids[i])[:QUOTED]}: {own}")
            more = ", ..." if other.sum() > FIRST else ""
            what = f"{int(other.sum())} of {len(ids)} items have" if len(ids) > 1 else "the rows have"
            self.problems.append(
                f"time: {what} another step than {unit} ({', '.join(shown)}{more}); freq= names the "
                f"step to forecast, and {advice}; or read items of one step at a time"
            )
        if beside.any():
            i = int(np.flatnonzero(beside)[0])
            row = int(np.flatnonzero(off[items.rows(i)])[0]) + items.rows(i).start
            stamp = show(items.clock[row : row + 1].view("datetime64[us]")[0])
            which = f"{self.several(ids, beside)}, first {str(ids[i])[:QUOTED]} at" if len(ids) > 1 else ", first"
            self.problems.append(
                f"time: {int(off.sum())} rows{which} {stamp} are beside the grid of step {unit}; {advice}"
            )

    def meeting(self, items: Items, met: np.ndarray, ids: np.ndarray, steps: Steps, exactly: bool) -> str:
        """What to say of rows of one item at one stamp."""
        row = int(met.argmax()) + 1
        i = int(items.owners[row])
        stamp = (
            str(items.clock[row]) if self.freq is None else show(items.clock[row : row + 1].view("datetime64[us]")[0])
        )
        what = "the stamp of another" if exactly else f"the step ({self.freq}) of another"
        if len(ids) > 1:
            owner = f" of the same item, first {str(ids[i])[:QUOTED]!r} at {stamp}"
        else:
            owner = f", first {stamp}; id= names the column that tells several items apart"
        return f"time: {int(met.sum())} rows have {what}{owner}; drop them, or irregular='regularise' averages them"

    def rules_of(self, items: Items, stamps: np.ndarray) -> tuple[DayRule, ...]:
        """The day in the month of all items, or of each where they differ; () for other steps."""
        if count_unit(self.freq or "D")[1] not in MONTHS:
            return ()
        rule, all_on_it = day_rule(np.unique(stamps))
        if all_on_it or items.n == 1:
            return (rule,)
        rules = []
        for i in range(items.n):
            own = stamps[items.rows(i)]
            rules.append(rule if rule.holds(own).all() else day_rule(own)[0])
        return tuple(rules)

    # ---- values ----

    def last_rows(self, items: Items, place: np.ndarray, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Place of the last row of each item with a target [N]; items without one are a problem."""
        seen = np.zeros(len(place), bool)
        for row in values:
            seen |= ~np.isnan(row)
        last = np.maximum.reduceat(np.where(seen, place, -1), items.starts[:-1])
        if (last < 0).any():
            which = self.several(ids, last < 0)
            self.problems.append(f"not one value of the target{which}: nothing to forecast from; leave these rows out")
        return last

    def check_ends(self, values: np.ndarray, roles: _Roles) -> None:
        """Refuse a wide table of which some columns end long before the others: they may be covariates."""
        if self.how.target is not None or roles.id or len(values) < 2:
            return
        empty = np.isnan(values)
        ends = [tail(row) for row in empty]
        for c, row in enumerate(empty):
            if ends[c] > max(longest_gap(row), 1) and min(ends) == 0:
                self.problems.append(
                    f"column {short(roles.target[c])}: the last {ends[c]} rows are empty where other "
                    "columns go on; name the columns to forecast by target=: the rows behind their "
                    "last value are the future, and the other columns are covariates"
                )

    def filled(self, values: np.ndarray, targets: list, layout: "_Layout") -> np.ndarray:
        """Refuse, fill or keep the empty cells of the targets [C, R], as `missing` says; infinite
        ones are refused."""
        counts = []
        for c, row in enumerate(values):
            infinite = np.isinf(row)
            if infinite.any():
                where = self.where(infinite, layout)
                self.problems.append(f"column {short(targets[c])}: {int(infinite.sum())} infinite cells, {where}")
            empty = np.isnan(row)
            if not empty.any():
                continue
            counts.append(f"{str(targets[c])[:QUOTED]} {int(empty.sum())}")
            if self.how.missing == "error":
                where = self.where(empty, layout)
                self.problems.append(
                    f"column {short(targets[c])}: {int(empty.sum())} missing, {where}; "
                    "missing='interpolate' fills them, missing='keep' leaves them empty"
                )
            elif self.how.missing == "interpolate":
                values[c] = fill_linearly(row, layout.bounds)
        if counts and not self.problems:
            done = "filled by linear interpolation" if self.how.missing == "interpolate" else "kept"
            self.notes.append(f"missing cells of the targets {done}: {quote(counts)} of {values.shape[1]}")
        return values

    def where(self, mask: np.ndarray, layout: "_Layout") -> str:
        """The first rows of the grids where `mask` [R] holds, by item and place."""
        shown = []
        for row in np.flatnonzero(mask)[:FIRST]:
            i = int(np.searchsorted(layout.bounds, row, side="right")) - 1
            owner = f"{str(layout.ids[i])[:QUOTED]} " if len(layout.ids) > 1 else ""
            shown.append(f"{owner}row {row - layout.bounds[i]}")
        return ", ".join(shown) + (", ..." if mask.sum() > FIRST else "") + " (counting from 0, by time)"

    # ---- covariates ----

    def covariates(
        self, table: pd.DataFrame, ahead: pd.DataFrame | None, roles: _Roles, layout: "_Layout", rows: "_Ahead | None"
    ) -> dict:
        """The fields of a `Panel` that hold covariates."""
        categories: dict[str, tuple[str, ...]] = {}
        past_values, known_values, cells_ahead = [], [], []
        for column in roles.past:
            cells, _, kinds = self.covariate(table[column], None)
            past_values.append(layout.spread(layout.items.sorted(cells), mean=not kinds))
            categories |= {str(column): kinds} if kinds else {}
        behind = layout.behind()
        for column in roles.known:
            there = rows is not None and ahead is not None and column in set(ahead.columns)
            cells, own, kinds = self.covariate(table[column], ahead[column] if there and ahead is not None else None)
            cells = layout.items.sorted(cells)
            known_values.append(layout.spread(cells, mean=not kinds))
            cells_ahead.append((cells[behind.rows], own))
            categories |= {str(column): kinds} if kinds else {}
        if categories:
            self.notes.append(f"categories are numbered 0, 1, ... in this order: {quote(_order(categories))}")
        known = np.array(known_values) if known_values else None
        future_values = None
        if known is not None and not self.problems:
            future_values = self.future_values(known, cells_ahead, behind, rows, layout, roles)
        return dict(
            past=tuple(map(str, roles.past)),
            past_values=np.array(past_values) if past_values else None,
            known=tuple(map(str, roles.known)),
            known_values=known,
            future_values=future_values,
            categories=categories,
        )

    def covariate(self, cells: Any, ahead: Any) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
        """(numbers [T], numbers of the rows ahead or None, kinds of text or ()) of one covariate.

        Truth values are 0 and 1; a category is its place among the kinds, those ahead among them.
        """
        name = cells.name
        count = len(cells)
        both = cells if ahead is None else pd.concat([cells, ahead], ignore_index=True).rename(name)
        kinds: tuple[str, ...] = ()
        if _holds_truth(both):
            numbers = _as_numbers(both)
        elif isinstance(cells.dtype, pd.CategoricalDtype) or _holds_kinds(both):
            numbers, kinds = _numbered(cells, both)
        else:
            frame = both.to_frame()
            numbers = self.numbers(frame, [name])[0]
            if np.isinf(numbers).any():
                wrong = np.isinf(numbers)
                self.problems.append(f"column {short(name)}: {int(wrong.sum())} infinite, {rows(wrong, both)}")
        return numbers[:count], None if ahead is None else numbers[count:], kinds

    def steps_ahead(self, times: _Times, grids: _Grids, codes: np.ndarray | None, layout: "_Layout") -> "_Ahead | None":
        """Where the rows ahead [A] lie on the grids of their items."""
        if codes is None:
            return None
        ours = np.flatnonzero(codes >= 0)
        owners = codes[ours]
        if times.ahead is None:
            order = np.argsort(owners, kind="stable")
            counts = np.bincount(owners, minlength=len(layout.ids))
            within = np.empty(len(owners), np.int64)
            within[order] = places_in_item(np.concatenate([[0], np.cumsum(counts)]))
            return _Ahead(ours, owners, layout.last[owners] + 1 + within)
        clock = times.ahead[ours]
        if grids.numbered is not None:
            first, step = grids.numbered
            exact = (clock - first[owners]) / step
            off = exact != np.rint(exact)
        elif self.freq is None or grids.first is None:
            self.problems.append("future: no step of time to be found in the table; give freq=")
            return None
        else:
            stamps = _wall(clock, grids.zone).view("datetime64[us]")
            exact = places_from(grids.first[owners], stamps, self.freq)
            off = np.abs(exact - np.rint(exact)) > 1e-9
        if off.any() and self.irregular != "regularise":
            row = int(off.argmax())
            stamp = str(clock[row]) if grids.numbered else show(clock[row : row + 1].view("datetime64[us]")[0])
            self.problems.append(
                f"future: {int(off.sum())} rows are beside the grid of their item, first row {ours[row]}: "
                f"{str(layout.ids[owners[row]])[:QUOTED]} at {stamp}, where the step is "
                f"{self.freq or 'that of the table'}"
            )
            return None
        place = np.rint(exact).astype(np.int64)
        found = _Ahead(ours, owners, place)
        pairs = pd.DataFrame({"owner": owners, "place": place})
        if pairs.duplicated().any():
            row = int(pairs.duplicated().to_numpy().argmax())
            self.problems.append(
                f"future: {int(pairs.duplicated().sum())} rows have the id and time of another, first row {ours[row]}"
            )
        return found

    def future_values(
        self,
        known_values: np.ndarray,
        cells_ahead: list[tuple[np.ndarray, np.ndarray | None]],
        behind: "_Ahead",
        rows: "_Ahead | None",
        layout: "_Layout",
        roles: _Roles,
    ) -> np.ndarray | None:
        """The known covariates [K, N, F] behind the last target of each item; NaN where none is given.

        What the table says goes before what `future` says of the same stamp.
        """
        sources = [behind] if rows is None else [rows, behind]
        steps = [source.place - layout.last[source.owners] for source in sources]
        width = max((int(step.max(initial=0)) for step in steps), default=0)
        if not width:
            return None
        longest = int(layout.last.max()) + 1
        if width > max(MOST_HOLES * longest, MOST_AHEAD):
            self.problems.append(
                f"rows of known covariates lie up to {width} steps behind the last target; check the dates"
            )
            return None

        n = len(layout.last)
        future = np.full((len(known_values), n, width), np.nan)
        differ = 0
        for k, (own, cells) in enumerate(cells_ahead):
            if rows is not None and cells is not None:
                cells = cells[rows.rows]
                step = rows.place - layout.last[rows.owners]
                after = step > 0
                future[k, rows.owners[after], step[after] - 1] = cells[after]
                known_values[k], others = self.filled_known(known_values[k], cells, rows, layout)
                differ += others
            step = behind.place - layout.last[behind.owners]
            given = ~np.isnan(own)
            future[k, behind.owners[given], step[given] - 1] = own[given]
        if differ:
            self.notes.append(f"{differ} cells of future contradict the table, whose cells are taken")
        missing: Any = np.isnan(future).any(axis=0)
        if missing.any():
            which = missing.any(axis=1)
            self.notes.append(
                f"known covariates are missing for {int(missing.sum())} of {missing.size} steps ahead"
                f"{self.several(layout.ids, which)}: {quote(roles.known)}"
            )
        return future

    def filled_known(
        self, values: np.ndarray, cells: np.ndarray, rows: "_Ahead", layout: "_Layout"
    ) -> tuple[np.ndarray, int]:
        """The table's rows [R], empty cells filled from those of future; and how many others differ."""
        last = layout.last[rows.owners]
        here = (rows.place >= 0) & (rows.place <= last) & ~np.isnan(cells)
        at = layout.bounds[rows.owners[here]] + rows.place[here]
        given = cells[here]
        empty = np.isnan(values[at])
        differ = int((values[at][~empty] != given[~empty]).sum())
        if empty.any():
            # Where no row was moved, the values are still the table's own.
            values = values.copy()
            values[at[empty]] = given[empty]
        return values, differ

    def static_of(self, table: pd.DataFrame, roles: _Roles, codes: np.ndarray, n: int) -> pd.DataFrame | None:
        """One row per item of the columns that are facts of it: numbers, and categories."""
        facts = {}
        for column in roles.static:
            cells: Any = table[column]
            row = self.fact(cells, codes, n)
            if row is None:
                self.problems.append(f"static column {short(column)} changes within an item; it is a covariate (past=)")
                continue
            taken = cells.iloc[np.maximum(row, 0)].reset_index(drop=True).where(row >= 0)
            if _holds_truth(taken):
                taken = pd.Series(_as_numbers(taken))
            facts[str(column)] = taken if is_numeric(taken) else taken.astype("category")
        return pd.DataFrame(facts) if facts else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Ahead:
    """Rows ahead: their number in their table [A], their items [A], their places there [A]."""

    rows: np.ndarray
    owners: np.ndarray
    place: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """From sorted rows [T] to rows of the grids [R].

    Attributes:
      items, place: the sorted rows, and the place of each in its item.
      last: [N] place of each item's last row with a target.
      bounds: [N + 1] first row of each item among the R.
      slot: [T] where each row goes; R or more: behind the last target. None: they are the R rows.
      meet: whether several rows go to one place.
    """

    items: Items
    place: np.ndarray
    last: np.ndarray
    ids: np.ndarray
    bounds: np.ndarray
    slot: np.ndarray | None
    meet: bool

    @classmethod
    def of(cls, items: Items, place: np.ndarray, last: np.ndarray, ids: np.ndarray) -> "_Layout":
        bounds = np.concatenate([[0], np.cumsum(last + 1)])
        n_rows = int(bounds[-1])
        meet = bool(((place[1:] == place[:-1]) & inside(items.starts)).any())
        ends = place[items.starts[1:] - 1]
        if n_rows == len(place) and not meet and (ends == last).all():
            return cls(items, place, last, ids, bounds, None, False)
        owners = items.owners
        slot = np.where(place <= last[owners], bounds[owners] + place, n_rows)
        return cls(items, place, last, ids, bounds, slot, meet)

    def behind(self) -> _Ahead:
        """The sorted rows behind the last target of their items."""
        at = np.zeros(0, np.int64) if self.slot is None else np.flatnonzero(self.slot >= self.bounds[-1])
        return _Ahead(at, self.items.owners[at], self.place[at])

    def rows_behind(self) -> np.ndarray:
        """The same by their number in the table."""
        at = self.behind().rows
        return at if self.items.order is None else self.items.order[at]

    def spread(self, cells: np.ndarray, mean: bool = True) -> np.ndarray:
        """Cells [T] of sorted rows on the grids [R], NaN in holes.

        Of several at one place the mean of those that are not empty, or (not mean) the first.
        """
        if self.slot is None:
            return cells
        n_rows = int(self.bounds[-1])
        used = self.slot < n_rows
        if self.meet:
            used &= ~np.isnan(cells)
        slot, cells = self.slot[used], cells[used]
        found = np.full(n_rows, np.nan)
        if self.meet and mean:
            seen = np.bincount(slot, minlength=n_rows)
            total = np.bincount(slot, cells, minlength=n_rows)
            np.divide(total, seen, out=found, where=seen > 0)
        else:
            found[slot[::-1]] = cells[::-1]
        return found


def _wall(clock: np.ndarray, tz: str | None) -> np.ndarray:
    """Microseconds in UTC -> microseconds on the clock on the wall, both int64 [T]."""
    return to_wall(clock.view("datetime64[us]"), tz).view(np.int64)


def _one_kind(cells: Any) -> bool:
    """Whether all cells are the same, and none is empty."""
    return cells.nunique() == 1 and not cells.isna().any()


def _own_type(ids: Any) -> np.ndarray:
    """Ids as an array of their own type; text and what has no such type as objects."""
    ids = pd.Index(ids)
    if isinstance(ids.dtype, pd.CategoricalDtype):
        ids = ids.astype(ids.categories.dtype)
    return ids.to_numpy() if isinstance(ids.dtype, np.dtype) else ids.to_numpy(object)


def _holds_truth(cells: Any) -> bool:
    """Whether cells, empty ones aside, are truth values."""
    if pd.api.types.is_bool_dtype(cells):
        return True
    present = cells.dropna()
    return cells.dtype == object and bool(len(present)) and all(isinstance(c, bool | np.bool_) for c in present)


def _as_numbers(truth: Any) -> np.ndarray:
    """Truth values as 0 and 1, NaN where they are empty [T]."""
    return truth.astype(object).where(truth.notna(), np.nan).astype(np.float64).to_numpy()


def _holds_kinds(cells: Any) -> bool:
    """Whether cells are text of which less than half of the kinds are numbers."""
    if is_numeric(cells) or is_time(cells) or pd.api.types.is_timedelta64_dtype(cells):
        return False
    kinds = pd.Series(cells.dropna().unique())
    if not len(kinds) or not all(isinstance(kind, str) for kind in kinds):
        return False
    return bool(to_number(kinds).notna().mean() < 0.5)


def _numbered(cells: Any, both: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """(the number of each cell's kind [T], the kinds): in their own order where they have one, else sorted."""
    own = list(cells.cat.categories) if isinstance(cells.dtype, pd.CategoricalDtype) else []
    others = [kind for kind in both.dropna().unique() if kind not in set(own)]
    kinds = pd.Index([*own, *sorted(others, key=str)], dtype=object)
    number = kinds.get_indexer(pd.Index(both.astype(object))).astype(np.float64)
    number[number < 0] = np.nan
    return number, tuple(map(str, kinds))


def _order(categories: dict[str, tuple[str, ...]]) -> list[str]:
    """Each covariate with its first kinds."""
    said = []
    for name, kinds in categories.items():
        more = ", ..." if len(kinds) > 4 else ""
        said.append(f"{name} ({', '.join(kinds[:4])}{more})")
    return said
