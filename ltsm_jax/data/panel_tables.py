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
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from ltsm_jax.data.columns import ID_NAMES, QUOTED, Name, quote, short, to_number
from ltsm_jax.data.items import Items, fill_linearly
from ltsm_jax.data.panel import Panel
from ltsm_jax.data.panel_grids import FIRST, MOST_HOLES, Ahead, GridLayout, GridReader, Times
from ltsm_jax.data.series import Series, clip
from ltsm_jax.data.sources import as_table
from ltsm_jax.data.stamps import counts_rows, holds_dates, is_numeric, is_time, rows
from ltsm_jax.data.tables import check_options, longest_gap, tail
from ltsm_jax.frequency import from_wall

TARGET_NAMES = ("target", "y", "value")
SURE_ID_NAMES = ("id", "item_id", "unique_id", "series_id", "ts_id")  # ids even of one kind
MOST_AHEAD = 10_000  # steps ahead, where items are short
MANY_KINDS = 10_000  # more kinds of text are no categories


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanelOptions:
    """Options for reading a table of many items; the keywords of `read_panel`.

    Attributes:
      id: the column(s) that tell the items apart; several are joined by "/" in messages, and come
        back under their own names. By default a column
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
      future: a second table (whatever `source` may be) with id, time and the covariates ahead. One
        without ids is taken for each item, where all items end at one stamp.
      freq, date_format: as in `ReadingOptions` ("oov" included); by default the most common step of
        the items.
      missing: "keep" leaves empty targets NaN, "error" refuses them, "interpolate" fills them
        linearly in time within the item, and at its ends with the nearest value. Rows behind the
        last target are the future in any case.
      irregular: "error" refuses items off the grid of the common step (rows out of order are
        sorted, and holes are made rows, with a note); "regularise" moves each row to the nearest
        stamp of the grid and averages those that meet there; "ignore" takes the rows as they come,
        without stamps.
      early_ends: "error" refuses a wide table without `target` in which the values of some columns
        end long before those of others, as these may be covariates; "holes" takes the rows behind
        the last value of such a column for holes, which suits what fills them.
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
    early_ends: Literal["error", "holes"] = "error"
    name: str | None = None

    def __post_init__(self):
        check_options(self, ("target", "time", "id", "known", "past", "static"))
        if self.early_ends not in ("error", "holes"):
            raise ValueError(f"early_ends must be 'error' or 'holes', not {self.early_ends!r}")


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
    early_ends: Literal["error", "holes"] = "error",
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
        early_ends=early_ends,
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
        names = ", ".join(given)
        raise ValueError(
            f"{names}: no options of a {kind}, which has been read already; give the table"
        )
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


class _PanelReader(GridReader):
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
        times = self.times_of(table, ahead, roles.time)
        self.stop()
        self.find_ids(table, roles, times)
        ids, codes, codes_ahead = self.items_of(table, ahead, roles, times=times)
        self.stop()
        if ahead is not None and codes_ahead is None:
            ahead, codes_ahead = self.for_all_items(ahead, times, len(ids))
        self.choose_by_kind(table, ahead, roles, codes=codes, codes_ahead=codes_ahead)
        values = self.numbers(table, roles.target)
        self.stop()

        items, grids = self.grids_of(codes, times, ids)
        if self.problems and roles.id and times.clock is not None:
            self.suggest_ids(table, roles, times.clock, codes=codes)
        self.stop()
        # Places say all from here on: of fifty million rows each array takes 400 MB.
        times.clock = None
        items = dataclasses.replace(items, clock=grids.place)
        last = self.last_rows(items, grids.place, values, ids=ids)
        self.stop()
        layout = GridLayout.of(items, grids.place, last, ids=ids)
        self.choose_by_place(table, roles, layout)
        targets = np.empty((len(values), int(layout.bounds[-1])))
        for target, row in zip(targets, values, strict=True):
            target[:] = layout.spread(items.sorted(row))
        del values
        self.check_ends(targets, roles)

        filled = self.filled(targets, roles.target, layout)
        rows = self.steps_ahead(times, grids, codes_ahead, layout=layout)
        covariates = self.covariates(table, ahead, roles, layout=layout, rows=rows)
        static = self.static_of(table, roles, codes, n=len(ids))
        self.stop()
        return Panel(
            name=self.name,
            ids=ids,
            columns=tuple(map(str, roles.target)),
            values=filled,
            bounds=layout.bounds,
            first=None if grids.first is None else from_wall(grids.first, grids.zone),
            freq=self.freq,
            model_freq="oov" if self.how.freq == "oov" else None,
            tz=times.tz,
            rules=grids.rules,
            id_name="/".join(map(str, roles.id)) or None,
            id_parts=_id_parts(table, roles.id, codes),
            time_name=self.time_name(roles.time) if grids.first is not None else None,
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
        """Assign a role to each column by the options, and find the time."""
        asked = {}
        for role in ("target", "known", "past", "static", "id", "time"):
            given = getattr(self.how, role)
            asked[role] = self.found(table, role, given)
            if given is not None and not asked[role] and not self.problems:
                self.problems.append(f"{role} is an empty list")
        counts = collections.Counter(itertools.chain.from_iterable(asked.values()))
        if doubled := [column for column, count in counts.items() if count > 1]:
            names = quote(doubled)
            self.problems.append(f"columns named more than once, or for two roles: {names}")

        roles = _Roles(**asked, left=[])
        taken = list(counts)
        if self.how.time is None:
            roles.time = self.find_time(table, labels, taken) or self.dates(table, taken)
        if self.how.id is None and len(labels) > 1 and set(labels) & set(roles.time):
            roles.id = [label for label in labels if label not in (*roles.time, *taken)]
            names = " and ".join(repr(str(column)) for column in roles.id)
            self.notes.append(f"the items are told apart by {names} of the index")
        if not roles.id:
            self.check_labels(table, labels, roles.time, taken=taken)

        apart = {*taken, *roles.time, *roles.id, *labels, *self.undecided}
        for column in table.columns:
            nameless = str(column).strip() == "" or str(column).startswith("Unnamed: ")
            if column not in apart and nameless and counts_rows(table[column]):
                name = short(column)
                self.notes.append(
                    f"a column without a name ({name}) was left out: it numbers the rows"
                )
            elif column not in apart:
                roles.left.append(column)
        return roles

    def dates(self, table: pd.DataFrame, taken: list) -> list:
        """The only column of dates, whatever its name; of several one must be named."""
        if self.undecided:
            return []
        free = [column for column in table.columns if column not in taken]
        found = [column for column in free if holds_dates(table[column])]
        if len(found) > 1:
            names = quote(found)
            self.problems.append(
                f"several columns may hold the time: {names}; say which with time="
            )
        elif found:
            self.notes.append(f"{str(found[0])!r} is taken as the time; time= says otherwise")
        return found[:1]

    def time_name(self, time: list) -> str | None:
        """Name of the column of time; None where several were joined."""
        return str(time[0]) if len(time) == 1 else None

    def check_ahead(self, table: pd.DataFrame, ahead: pd.DataFrame | None, roles: _Roles) -> None:
        """The rows ahead need the time and the covariates that are asked for."""
        if ahead is None:
            return
        for role, columns in (("time", roles.time), ("known", roles.known)):
            before = len(self.problems)
            self.found(ahead, role, columns)
            self.problems[before:] = [f"future: {problem}" for problem in self.problems[before:]]
        kept = {*roles.time, *roles.id, *roles.known, *roles.left, *roles.static}
        if more := [column for column in ahead.columns if column not in kept]:
            names = quote(more)
            self.notes.append(f"left out of future, being no covariates of the table: {names}")

    def find_ids(self, table: pd.DataFrame, roles: _Roles, times: Times) -> None:
        """Take the columns that tell items apart by their names; refuse to guess others."""
        if roles.id:
            return
        taken = {*roles.time, *roles.target, *roles.known, *roles.past, *roles.static}
        named = self.named_ids(table, taken)
        sure = [c for c in table.columns if c not in taken and str(c).casefold() in SURE_ID_NAMES]
        one_kind = [c for c in sure if c not in named and _one_kind(table[c])]
        stamps = None if times.clock is None else times.clock
        choices = self.ids_that_tell_apart(table, roles.time, taken, stamps=stamps)
        if choices and all(str(c).casefold() in ID_NAMES for c in choices[0]):
            roles.id = choices[0]
        elif choices:
            self.refuse_ids(table, choices[0])
        elif named or one_kind:
            roles.id = [*named, *one_kind][:1]
        if roles.id:
            names = " and ".join(repr(str(column)) for column in roles.id)
            self.notes.append(f"the items are told apart by {names}; id= says otherwise")
            roles.left = [column for column in roles.left if column not in roles.id]

    def suggest_ids(
        self,
        table: pd.DataFrame,
        roles: _Roles,
        clock: np.ndarray,
        codes: np.ndarray,
    ) -> None:
        """Say which column the ids lack where rows of one id have the same stamp."""
        if not pd.DataFrame({"id": codes, "time": clock}).duplicated().any():
            return
        taken = {*roles.time, *roles.id, *roles.target}
        choices = self.ids_that_tell_apart(table, roles.time, taken, stamps=clock, codes=codes)
        if choices:
            self.refuse_ids(table, [*roles.id, *choices[0]])

    def choose_by_kind(
        self,
        table: pd.DataFrame,
        ahead: pd.DataFrame | None,
        roles: _Roles,
        codes: np.ndarray,
        codes_ahead: np.ndarray | None,
    ) -> None:
        """Columns left over: the target where none is named, facts of the items, what is ahead."""
        ahead_has = set() if ahead is None else set(ahead.columns)
        if roles.id and not roles.target:
            named = [column for column in roles.left if str(column).casefold() in TARGET_NAMES]
            free = [column for column in roles.left if column not in ahead_has]
            numbers = [column for column in free if is_numeric(table[column])]
            if len(named) == 1:
                roles.target = named
            elif len(numbers) == 1:
                roles.target = numbers
                self.say_target(numbers[0])
        roles.left = [column for column in roles.left if column not in roles.target]

        asked = list(roles.static)
        known_ahead = []
        for column in list(roles.left):
            cells_ahead = ahead[column] if ahead is not None and column in ahead_has else None
            if roles.id and self.is_fact(
                table[column], codes, cells_ahead, codes_ahead=codes_ahead
            ):
                roles.static.append(column)
            elif cells_ahead is not None and self.how.known is None:
                known_ahead.append(column)
            else:
                continue
            roles.left.remove(column)
        roles.known = [*roles.known, *known_ahead]

        if not roles.target and roles.id:
            self.choose_target(table, roles)
        elif not roles.target:
            roles.target, roles.left = roles.left, []
            self.check_default(table, roles.target, roles.time, ids=roles.id)
            if not self.any_numbers(table, roles.target):
                roles.target = []  # every cell of them would be listed
        found = [column for column in roles.static if column not in asked]
        if found:
            self.notes.append(f"static, the same in all rows of an item: {quote(found)}")

    def choose_target(self, table: pd.DataFrame, roles: _Roles) -> None:
        """The only column of numbers that is left; several are refused by name."""
        numbers = [column for column in roles.left if self.any_numbers(table, [column])]
        if len(numbers) == 1:
            roles.target = numbers
            roles.left.remove(numbers[0])
            self.say_target(numbers[0])
            return
        if numbers:
            self.problems.append(
                f"several columns may be the target: {quote(numbers)}; say which with target=; the "
                "others are covariates (known= names those that are known ahead)"
            )
        else:
            columns = quote(list(table.columns))
            self.problems.append(f"no column of numbers to forecast; columns: {columns}")

    def say_target(self, column: Any) -> None:
        """Say that a column was taken for the target."""
        self.notes.append(f"{str(column)!r} is the target: no other column of numbers is left")

    def is_fact(
        self,
        cells: Any,
        codes: np.ndarray,
        ahead: Any,
        codes_ahead: np.ndarray | None,
    ) -> bool:
        """Return whether the cells of each item are the same, empty ones aside, in the rows ahead
        too.
        """
        if cells.isna().all():
            return False
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

    def choose_by_place(self, table: pd.DataFrame, roles: _Roles, layout: GridLayout) -> None:
        """Covariates left over: known ahead if rows behind the last target hold them, else past."""
        behind = layout.rows_behind()
        known, past, out = [], [], []
        for column in roles.left:
            cells: Any = table[column]
            if not _serves(cells):
                out.append(column)
            elif self.how.known is None and len(behind) and cells.iloc[behind].notna().any():
                known.append(column)
            else:
                past.append(column)
        roles.known, roles.past, roles.left = [*roles.known, *known], [*roles.past, *past], []
        if known:
            self.notes.append(f"known ahead, with values behind the last target: {quote(known)}")
        if past:
            self.notes.append(f"columns left over are past covariates: {quote(past)}")
        if out:
            why = "empty, dates, text that is no kinds, or text and numbers"
            self.notes.append(f"left out ({why}): {quote(out)}")
        if len(behind) and not roles.known:
            count = len(behind)
            self.notes.append(
                f"{count} rows behind the last target of their item were cut off: they are the "
                "future",
            )

    # ---- items ----

    def items_of(
        self, table: pd.DataFrame, ahead: pd.DataFrame | None, roles: _Roles, times: Times
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids [N], item of each row [T], item of each row ahead [A], -1: not in the table).

        The last is None without rows ahead, and where these are of all items, see `for_all_items`.
        """
        if not roles.id:
            ids = np.array([self.name], object)
            none = None if ahead is None else np.zeros(len(ahead), np.int64)
            return ids, np.zeros(len(table), np.int32), none
        column = self.joined(table, "id", roles.id)
        if column is None:
            return np.zeros(0, object), np.zeros(0, np.int64), None
        codes, kinds = pd.factorize(column)
        codes = codes.astype(np.int32)
        ids = _own_type(kinds)
        if len(roles.id) > 1 and len(table[roles.id].drop_duplicates()) > len(ids):
            self.problems.append(
                f"ids of {quote(roles.id)}, joined by '/', are the same for different items; take "
                "the '/' out of their cells"
            )
        if ahead is None or self.is_of_all_items(ahead, roles, codes, times=times):
            return ids, codes, None

        if len(ids) == 1 and not set(roles.id) & set(ahead.columns):
            return ids, codes, np.zeros(len(ahead), np.int64)  # it can be of no other item
        before = len(self.problems)
        self.found(ahead, "id", roles.id)
        column = self.joined(ahead, "id", roles.id) if len(self.problems) == before else None
        self.problems[before:] = [f"future: {problem}" for problem in self.problems[before:]]
        if column is None:
            return ids, codes, None
        codes_ahead = pd.Index(ids).get_indexer(pd.Index(_own_type(column)))
        unknown = codes_ahead < 0
        if unknown.all():
            self.problems.append(
                f"future: not one of its ids is in the table (future: {_like(column)}, table: "
                f"{_like(ids)}); ids must be of one type"
            )
        elif unknown.any():
            kinds = list(dict.fromkeys(column[unknown]))
            names = quote(kinds)
            self.notes.append(f"rows of future for ids that the table lacks were left out: {names}")
        return ids, codes, codes_ahead

    def is_of_all_items(
        self, ahead: pd.DataFrame, roles: _Roles, codes: np.ndarray, times: Times
    ) -> bool:
        """Return whether rows ahead without ids can only mean all of several items: these end at
        one stamp, and no stamp ahead occurs twice.
        """
        n = int(codes.max()) + 1
        if (
            n < 2
            or set(roles.id) & set(ahead.columns)
            or times.clock is None
            or times.ahead is None
        ):
            return False
        last = np.full(n, np.iinfo(np.int64).min)
        np.maximum.at(last, codes, times.clock)
        return bool((last == last[0]).all()) and len(np.unique(times.ahead)) == len(times.ahead)

    def for_all_items(
        self, ahead: pd.DataFrame, times: Times, n: int
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """The rows ahead once for each of `n` items, and the items they then are of; `times`
        likewise.
        """
        self.notes.append(
            f"future has no ids: its {len(ahead)} rows are taken for each of the {n} items"
        )
        rows = np.tile(np.arange(len(ahead)), n)
        if times.ahead is not None:
            times.ahead = times.ahead[rows]
        return ahead.iloc[rows].reset_index(drop=True), np.repeat(np.arange(n), len(ahead))

    # ---- values ----

    def last_rows(
        self,
        items: Items,
        place: np.ndarray,
        values: np.ndarray,
        ids: np.ndarray,
    ) -> np.ndarray:
        """Place of the last row of each item with a target [N]; items without one are a problem."""
        seen = np.zeros(len(place), bool)
        for row in values:
            seen |= ~items.sorted(np.isnan(row))
        last = np.maximum.reduceat(np.where(seen, place, -1), items.starts[:-1])
        if (last < 0).any():
            which = self.several(ids, last < 0)
            self.problems.append(
                f"not one value of the target{which}: nothing to forecast from; leave these rows "
                "out",
            )
        return last

    def check_ends(self, values: np.ndarray, roles: _Roles) -> None:
        """Refuse a wide table where some columns go on behind the others: covariates, perhaps."""
        if (
            self.how.early_ends == "holes"
            or self.how.target is not None
            or roles.id
            or len(values) < 2
        ):
            return
        empty = np.isnan(values)
        ends = [tail(row) for row in empty]
        for c, row in enumerate(empty):
            if ends[c] > max(longest_gap(row), 1):
                self.problems.append(
                    f"column {short(roles.target[c])}: the last {ends[c]} rows are empty where "
                    "other columns go on; name the columns to forecast by target=: the rows behind "
                    "their last value are the future, and the other columns are covariates"
                )

    def filled(self, values: np.ndarray, targets: list, layout: GridLayout) -> np.ndarray:
        """Refuse, fill or keep the empty cells of the targets [C, R], as `missing` says; infinite
        ones are refused."""
        counts = []
        for c, row in enumerate(values):
            infinite = np.isinf(row)
            if infinite.any():
                self.problems.append(
                    f"column {short(targets[c])}: {int(infinite.sum())} infinite cells, "
                    f"{self.where(infinite, layout)}",
                )
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
            rows = values.shape[1]
            self.notes.append(f"missing cells of the targets {done}: {quote(counts)} of {rows}")
        return values

    def where(self, mask: np.ndarray, layout: GridLayout) -> str:
        """The first rows of the grids where `mask` [R] holds, by item and place."""
        shown = []
        for row in np.flatnonzero(mask)[:FIRST]:
            i = int(np.searchsorted(layout.bounds, row, side="right")) - 1
            owner = f"{str(layout.ids[i])[:QUOTED]} " if len(layout.ids) > 1 else ""
            shown.append(f"{owner}row {row - layout.bounds[i]}")
        more = ", ..." if mask.sum() > FIRST else ""
        return f"{', '.join(shown)}{more} (counting from 0, by time)"

    # ---- covariates ----

    def covariates(
        self,
        table: pd.DataFrame,
        ahead: pd.DataFrame | None,
        roles: _Roles,
        layout: GridLayout,
        rows: Ahead | None,
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
            cells_there = None
            if rows is not None and ahead is not None and column in set(ahead.columns):
                cells_there = ahead[column]
            cells, own, kinds = self.covariate(table[column], cells_there)
            cells = layout.items.sorted(cells)
            known_values.append(layout.spread(cells, mean=not kinds))
            cells_ahead.append((cells[behind.rows], own))
            categories |= {str(column): kinds} if kinds else {}
        if categories:
            order = quote(_order(categories))
            self.notes.append(f"categories are numbered 0, 1, ... in this order: {order}")
        # A copy: where no row was moved, the values are still the table's own.
        known = np.array(known_values) if known_values else None
        future_values = None
        if known is not None and not self.problems:
            future_values = self.future_values(
                known, cells_ahead, behind, rows=rows, layout=layout, roles=roles
            )
        return dict(
            past=tuple(map(str, roles.past)),
            past_values=np.array(past_values) if past_values else None,
            known=tuple(map(str, roles.known)),
            known_values=known,
            future_values=future_values,
            categories=categories,
        )

    def covariate(
        self,
        cells: Any,
        ahead: Any,
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
        """(numbers [T], numbers of the rows ahead or None, kinds of text or ()) of one covariate.

        Truth values are 0 and 1; a category is its place among the kinds, those ahead among them.
        """
        both = cells
        if ahead is not None:
            both = pd.concat([cells, ahead], ignore_index=True).rename(cells.name)
        kinds: tuple[str, ...] = ()
        if _holds_truth(both):
            numbers = _as_numbers(both)
        elif isinstance(cells.dtype, pd.CategoricalDtype) or _holds_kinds(both):
            numbers, kinds = _numbered(cells, both)
        else:
            own = self.finite(cells)
            before = len(self.problems)
            behind = None if ahead is None else self.finite(ahead)
            self.problems[before:] = [f"future: {problem}" for problem in self.problems[before:]]
            return own, behind, ()
        return numbers[: len(cells)], None if ahead is None else numbers[len(cells) :], kinds

    def finite(self, cells: Any) -> np.ndarray:
        """Cells of a covariate as numbers [T]; infinite ones go to the problems."""
        numbers = self.numbers(cells.to_frame(), [cells.name])[0]
        infinite = np.isinf(numbers)
        if infinite.any():
            name, where = short(cells.name), rows(infinite, cells)
            self.problems.append(f"column {name}: {int(infinite.sum())} infinite, {where}")
        return numbers

    def future_values(
        self,
        known_values: np.ndarray,
        cells_ahead: list[tuple[np.ndarray, np.ndarray | None]],
        behind: Ahead,
        rows: Ahead | None,
        layout: GridLayout,
        roles: _Roles,
    ) -> np.ndarray | None:
        """The known covariates [K, N, F] behind the last target of each item, NaN where not given.

        What the table says goes before what `future` says of the same stamp.
        """
        sources = [behind] if rows is None else [rows, behind]
        steps = [source.place - layout.last[source.owners] for source in sources]
        width = max((int(step.max(initial=0)) for step in steps), default=0)
        if not width:
            self.notes.append(f"no values ahead of the known covariates: {quote(roles.known)}")
            return None
        longest = int(layout.last.max()) + 1
        if width > max(MOST_HOLES * longest, MOST_AHEAD):
            self.problems.append(
                f"rows of known covariates lie up to {width} steps behind the last target; check "
                "the dates",
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
                differ += self.fill_known(known_values[k], cells, rows, layout=layout)
            step = behind.place - layout.last[behind.owners]
            given = ~np.isnan(own)
            future[k, behind.owners[given], step[given] - 1] = own[given]
        if differ:
            self.notes.append(f"{differ} cells of future contradict the table, whose are taken")
        self.say_missing(future, layout, roles)
        return future

    def say_missing(self, future: np.ndarray, layout: GridLayout, roles: _Roles) -> None:
        """Say which items lack known covariates [K, N, F] up to where most items have them."""
        width = future.shape[2]
        given: Any = ~np.isnan(future).all(axis=0)
        span = np.where(given.any(axis=1), width - given[:, ::-1].argmax(axis=1), 0)
        counts = np.bincount(span, minlength=width + 1)
        usual = width - int(counts[::-1].argmax())  # the longer of two that are as frequent
        needed = np.arange(width) < np.maximum(span, usual)[:, None]
        missing = np.isnan(future).any(axis=0) & needed
        if missing.any():
            which = self.several(layout.ids, np.any(missing, axis=1))
            self.notes.append(
                f"known covariates are missing for {int(missing.sum())} of {int(needed.sum())} "
                f"steps ahead{which}: {quote(roles.known)}"
            )

    def fill_known(
        self, values: np.ndarray, cells: np.ndarray, rows: Ahead, layout: GridLayout
    ) -> int:
        """Fill empty cells of the rows [R] from future, in place; count others that differ."""
        last = layout.last[rows.owners]
        here = (rows.place >= 0) & (rows.place <= last) & ~np.isnan(cells)
        at = layout.bounds[rows.owners[here]] + rows.place[here]
        given = cells[here]
        empty = np.isnan(values[at])
        differ = int((values[at][~empty] != given[~empty]).sum())
        values[at[empty]] = given[empty]
        return differ

    def static_of(
        self,
        table: pd.DataFrame,
        roles: _Roles,
        codes: np.ndarray,
        n: int,
    ) -> pd.DataFrame | None:
        """One row per item of the columns that are facts of it: numbers, and categories."""
        facts = {}
        for column in roles.static:
            cells: Any = table[column]
            row = self.fact(cells, codes, n)
            if row is None:
                name = short(column)
                self.problems.append(
                    f"static column {name} changes within an item: past= or known="
                )
                continue
            # An item without a cell has the row -1, which no table has.
            taken = cells.reset_index(drop=True).reindex(row).reset_index(drop=True)
            if _holds_truth(taken):
                taken = pd.Series(_as_numbers(taken))
            facts[str(column)] = taken if is_numeric(taken) else taken.astype("category")
        return pd.DataFrame(facts) if facts else None


def _id_parts(table: pd.DataFrame, columns: list, codes: np.ndarray) -> pd.DataFrame | None:
    """The cells of several id columns, one row per item, each of its own type."""
    if len(columns) < 2:
        return None
    _, first = np.unique(codes, return_index=True)
    parts = table[columns].iloc[first].reset_index(drop=True)
    return pd.DataFrame({str(name): _own_type(parts[name]) for name in columns})


def _one_kind(cells: Any) -> bool:
    """Return whether all cells are the same, and none is empty."""
    return cells.nunique() == 1 and not cells.isna().any()


def _own_type(ids: Any) -> np.ndarray:
    """Ids as an array of their own type; text and what has no such type as objects."""
    ids = pd.Index(ids)
    if isinstance(ids.dtype, pd.CategoricalDtype):
        ids = ids.astype(ids.categories.dtype)
    return ids.to_numpy() if isinstance(ids.dtype, np.dtype) else ids.to_numpy(object)


def _holds_truth(cells: Any) -> bool:
    """Return whether cells, empty ones aside, are truth values."""
    if pd.api.types.is_bool_dtype(cells):
        return True
    if cells.dtype != object:
        return False
    kinds = cells.dropna().unique()
    return len(kinds) > 0 and all(isinstance(kind, bool | np.bool_) for kind in kinds)


def _serves(cells: Any) -> bool:
    """Return whether an unnamed column can be a covariate: numbers, truth, kinds of text."""
    if cells.isna().all() or pd.api.types.is_complex_dtype(cells):
        return False
    if is_numeric(cells) or _holds_truth(cells):
        return True
    categories = isinstance(cells.dtype, pd.CategoricalDtype)
    return (categories or _holds_kinds(cells)) and cells.nunique() <= MANY_KINDS


def _like(ids: Any) -> str:
    """The first ids as they are, text in quotes."""
    return ", ".join(repr(key) for key in list(_own_type(ids)[:FIRST]))


def _as_numbers(truth: Any) -> np.ndarray:
    """Truth values as 0 and 1, NaN where they are empty [T]."""
    return truth.astype("boolean").to_numpy(np.float64, na_value=np.nan)


def _holds_kinds(cells: Any) -> bool:
    """Return whether cells are text of which less than half of the kinds are numbers."""
    if is_numeric(cells) or is_time(cells) or pd.api.types.is_timedelta64_dtype(cells):
        return False
    kinds = pd.Series(cells.dropna().unique())
    if not len(kinds) or not all(isinstance(kind, str) for kind in kinds):
        return False
    return bool(to_number(kinds).notna().mean() < 0.5)


def _numbered(cells: Any, both: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """(the number of each cell's kind [T], the kinds, in their own order or sorted)."""
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
