"""Rows of a table on the grids of their items: times, the common step, places, rows ahead.

Shapes: N items, T rows of the table, A rows ahead, R rows of the grids of all items together.
"""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from ltsm_jax.data.columns import QUOTED, TableReader, joined_time
from ltsm_jax.data.items import (
    Items,
    Steps,
    coarser,
    common_freq,
    inside,
    places_in_item,
    steps_of,
)
from ltsm_jax.data.stamps import format_stamp, is_numeric, is_time, parse_stamps
from ltsm_jax.frequency import (
    LENGTHS,
    MONTHS,
    DayRule,
    Grid,
    canonical_freq,
    count_unit,
    day_rule,
    microseconds,
    on_wall,
    places_from,
    rounded_step,
    to_wall,
)

FIRST = 3  # items named in a message
MOST_HOLES = 20  # rows of a grid for each row of the table
LONG = 10**6  # rows; dates of longer columns are not read twice for a message


@dataclasses.dataclass
class Times:
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
class Grids:
    """Places of the sorted rows on the grids of their items.

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


@dataclasses.dataclass(frozen=True, eq=False)
class Ahead:
    """Rows ahead: their number in their table [A], their items [A], their places there [A]."""

    rows: np.ndarray
    owners: np.ndarray
    place: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class GridLayout:
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
    def of(cls, items: Items, place: np.ndarray, last: np.ndarray, ids: np.ndarray) -> "GridLayout":
        """Lay the sorted rows out, those behind the last target of their item left aside."""
        bounds = np.concatenate([[0], np.cumsum(last + 1)])
        n_rows = int(bounds[-1])
        meet = bool(((place[1:] == place[:-1]) & inside(items.starts)).any())
        ends = place[items.starts[1:] - 1]
        if n_rows == len(place) and not meet and (ends == last).all():
            return cls(items, place, last, ids=ids, bounds=bounds, slot=None, meet=False)
        owners = items.owners
        slot = np.where(place <= last[owners], bounds[owners] + place, n_rows)
        slot = slot.astype(np.int32 if n_rows < 2**31 else np.int64)
        return cls(items, place, last, ids=ids, bounds=bounds, slot=slot, meet=meet)

    def behind(self) -> Ahead:
        """The sorted rows behind the last target of their items."""
        at = np.zeros(0, np.int64)
        if self.slot is not None:
            at = np.flatnonzero(self.slot >= self.bounds[-1])
        return Ahead(at, self.items.owners[at], self.place[at])

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


class GridReader(TableReader):
    """A reader that places rows on the grids of their items."""

    def several(self, ids: np.ndarray, which: np.ndarray) -> str:
        """Say how many items, and name the first of them: " of 2 of 9 items (a, b)"; "" for a lone
        item.

        Args:
          which: [N] bool.
        """
        if len(ids) == 1:
            return ""
        at = np.flatnonzero(which)
        shown = ", ".join(str(ids[i])[:QUOTED] for i in at[:FIRST])
        more = ", ..." if len(at) > FIRST else ""
        return f" of {len(at)} of {len(ids)} items ({shown}{more})"

    # ---- times ----

    def times_of(self, table: pd.DataFrame, ahead: pd.DataFrame | None, time: list) -> Times:
        """The times of the rows, and of those ahead: one layout of dates for both."""
        if not time:
            return Times()
        column = self.time_column(table, time)
        column_ahead = None if ahead is None else self.time_column(ahead, time)
        both = [column] if column_ahead is None else [column, column_ahead]
        numbers = is_numeric(column) and self.how.date_format is None
        if numbers and self.counts(both):
            self.notes.append(f"{column.name!r} only numbers the rows: there are no stamps")
            found = [cells.to_numpy(np.int64) for cells in both]
            return Times(found[0], found[1] if len(found) > 1 else None, None, numbers=True)

        if len(both) > 1 and is_time(both[0]) == is_time(both[1]) and not is_time(column):
            # Text of both is read together: 02/03 may be decided by a date of either.
            together = self.stamps_of_kinds(pd.concat(both, ignore_index=True).rename(column.name))
            if together is None:
                return Times()
            stamps, tz = together
            return Times(stamps[: len(column)], stamps[len(column) :], tz)
        found = [self.stamps_of_kinds(cells) for cells in both]
        if found[0] is None or found[-1] is None:
            return Times()
        (stamps, tz), (stamps_ahead, tz_ahead) = found[0], found[-1]
        if (tz is None) != (tz_ahead is None):
            both_or_none = "must both have stamps with a zone, or both without"
            self.problems.append(f"the table and future {both_or_none}")
        return Times(stamps, None if column_ahead is None else stamps_ahead, tz)

    def time_column(self, table: pd.DataFrame, time: list) -> Any:
        """The column of time: one, or several joined."""
        return table[time[0]] if len(time) == 1 else joined_time(table, time)

    def counts(self, columns: list) -> bool:
        """Return whether columns of numbers count the rows: whole numbers that are no dates."""
        kinds: Any = pd.Series(pd.concat(columns, ignore_index=True).unique()).sort_values()
        if kinds.isna().any() or not (kinds == np.rint(kinds)).all():
            return False
        return not self.numbers_are_dates(kinds)

    def numbers_are_dates(self, column: Any) -> bool:
        """Return whether numbers are dates of one step; those of several items repeat."""
        return super().numbers_are_dates(pd.Series(column.unique(), name=column.name))

    def stamps_of_kinds(self, column: Any) -> tuple[np.ndarray, str | None] | None:
        """(microseconds int64 [T], zone) of a column; each kind of text or number is read once."""
        if is_time(column) or column.isna().any():
            found = self.parsed(column)
            return None if found is None else (found[0].astype(np.int64), found[1])
        codes, kinds = pd.factorize(column)
        before = len(self.problems)
        found = self.parsed(pd.Series(kinds, name=column.name))
        if found is None:
            # Read again as a whole: the rows in a message are those of the table.
            if len(column) < LONG:
                del self.problems[before:]
                self.parsed(column)
            return None
        return found[0].astype(np.int64)[codes], found[1]

    def parsed(self, column: Any) -> tuple[np.ndarray, str | None] | None:
        """(stamps [T], zone) of a column as the options say."""
        return parse_stamps(
            column,
            self.problems,
            self.notes,
            date_format=self.how.date_format,
            freq=self.freq,
        )

    # ---- grids ----

    def grids_of(self, codes: np.ndarray, times: Times, ids: np.ndarray) -> tuple[Items, Grids]:
        """Sort the rows and place each on the grid of its item."""
        if times.clock is None:
            items = Items.sort(codes, len(ids), None)
            return items, Grids(items.clock)
        items = Items.sort(codes, len(ids), times.clock)
        if self.irregular == "ignore":
            self.notes.append("the rows of each item are taken as they come, without stamps")
            if self.freq is None and not times.numbers:
                self.freq = common_freq(items, steps_of(items))
            times.clock = times.ahead = None
            items = Items.sort(codes, len(ids), None)
            return items, Grids(items.clock)
        if items.unsorted.any():
            which = self.several(ids, items.unsorted)
            self.notes.append(f"rows{which} were out of order in time, and were sorted")
        if times.numbers:
            return items, self.numbered_grids(items, ids)
        return self.stamped_grids(items, times, ids)

    def numbered_grids(self, items: Items, ids: np.ndarray) -> Grids:
        """Places of rows that are counted by whole numbers."""
        steps = steps_of(items)
        common = max(steps.common, 1)
        first = items.clock[items.starts[:-1]]
        exact = (items.clock - np.repeat(first, items.counts)) / common
        place = np.rint(exact).astype(np.int64)
        self.check_places(items, place, place != exact, ids=ids, steps=steps)
        return Grids(place, numbered=(first, common))

    def stamped_grids(self, items: Items, times: Times, ids: np.ndarray) -> tuple[Items, Grids]:
        """Places of rows with stamps on the grids of the common step."""
        items, steps, zone = self.counted(items, times)
        stamps = items.clock.view("datetime64[us]")
        first = stamps[items.starts[:-1]].copy()
        if self.freq is None:
            if (items.counts > 1).any():
                self.problems.append("time: no step of time to be found in the stamps; give freq=")
            return items, Grids(places_in_item(items.starts), first, zone)

        place, off = self.places(items, stamps, first, steps=steps)
        if self.irregular == "regularise" and off.any():
            self.move_to_grids(items, stamps, place, first=first, off=off)
        self.check_places(items, place, off, ids=ids, steps=steps)
        return items, Grids(place=place, first=first, zone=zone, rules=self.rules_of(items, stamps))

    def counted(self, items: Items, times: Times) -> tuple[Items, Steps, str | None]:
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
                    f"the steps are regular in UTC, not on the clock in {times.tz}: the stamps are "
                    "given in UTC",
                )
                times.tz = "UTC"
        self.freq = self.freq or common_freq(items, steps)
        return items, steps, None

    def places(
        self, items: Items, stamps: np.ndarray, first: np.ndarray, steps: Steps
    ) -> tuple[np.ndarray, np.ndarray]:
        """(whole places [T] in their items, which rows are off the grid [T])."""
        assert self.freq is not None
        length = microseconds(self.freq)
        constant = steps.constant and steps.common == length
        if constant and not self.repeated_times(items).any():
            return places_in_item(items.starts), np.zeros(len(stamps), bool)
        place, off = self.nearest(np.repeat(first, items.counts), stamps)
        if length is not None and length < LENGTHS["s"]:
            for i in np.unique(items.owners[off]):
                rows_of = items.rows(int(i))
                # A rate of many hertz, written in whole milliseconds, is a regular one.
                if rounded_step(stamps[rows_of]) is not None:
                    place[rows_of] = np.arange(rows_of.stop - rows_of.start)
                    off[rows_of] = False
        return place, off

    def nearest(self, first: np.ndarray, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nearest whole places of stamps [T] from `first` [T], which of them are off the grid)."""
        assert self.freq is not None
        exact = places_from(first, stamps, self.freq)
        place = np.rint(exact).astype(np.int64)
        off = np.abs(exact - place) > 1e-9
        if count_unit(self.freq)[1] == "B":
            off |= ~np.is_busday(stamps.astype("datetime64[D]"))
        return place, off

    def repeated_times(self, items: Items) -> np.ndarray:
        """Mask [T - 1] of the steps that lead from a row to another of the same item and time."""
        return (items.clock[1:] == items.clock[:-1]) & inside(items.starts)

    def move_to_grids(
        self,
        items: Items,
        stamps: np.ndarray,
        place: np.ndarray,
        first: np.ndarray,
        off: np.ndarray,
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
    ) -> None:
        """Rows off the grid, at one time, and holes: refused, or said in the notes."""
        met = (place[1:] == place[:-1]) & inside(items.starts)
        twice = met & (items.clock[1:] == items.clock[:-1])
        if self.irregular == "error":
            self.check_steps(items, place, off, ids=ids, steps=steps)
            if twice.any():
                self.problems.append(self.meeting(items, twice, ids, what="the stamp"))
            elif met.any():
                self.problems.append(self.meeting(items, met, ids, what=f"the step ({self.freq})"))
        elif met.any():
            self.notes.append(f"{int(met.sum())} rows averaged with another at the same stamp")
        lengths = place[items.starts[1:] - 1] + 1
        holes = int(lengths.sum()) - len(place) + int(met.sum())
        if holes > MOST_HOLES * len(place):
            worst = int((lengths - items.counts).argmax())
            span = items.clock[items.starts[worst]], items.clock[items.starts[worst + 1] - 1]
            shown = f"{str(ids[worst])[:QUOTED]}, " if len(ids) > 1 else ""
            shown += f"{self.written(span[0])} to {self.written(span[1])}"
            self.problems.append(
                f"time: grids of step {self.freq or steps.common} would have {int(lengths.sum())} "
                f"rows for {len(place)} of the table (most: {shown}); check these dates, or give "
                "a longer freq=",
            )
        elif holes and not self.problems:
            counts = items.counts - np.bincount(items.owners[1:][met], minlength=items.n)
            which = self.several(ids, lengths > counts)
            self.notes.append(f"{holes} stamps{which} had no row: rows of missing values now")

    def check_steps(
        self,
        items: Items,
        place: np.ndarray,
        off: np.ndarray,
        ids: np.ndarray,
        steps: Steps,
    ) -> None:
        """Items of another step, and rows beside the grid, are problems: the first by name."""
        beside = np.zeros(items.n, bool)
        beside[items.owners[off]] = True
        other = beside & (steps.usual != steps.common) & (steps.usual > 0)
        other |= coarser(items, place)
        beside &= ~other
        unit = self.freq or str(steps.common)
        advice = "irregular='regularise' puts every item on that grid, holes missing"
        if self.freq is None:
            advice = "number the rows of all items alike"
        if other.any():
            shown = []
            for i in np.flatnonzero(other)[:FIRST]:
                step = str(steps.usual[i])
                own = step if self.freq is None else canonical_freq(f"{step}us")
                shown.append(f"{str(ids[i])[:QUOTED]}: {own}")
            more = ", ..." if other.sum() > FIRST else ""
            who = "the rows have"
            if len(ids) > 1:
                who = f"{int(other.sum())} of {len(ids)} items have"
            self.problems.append(
                f"time: {who} another step than {unit} ({', '.join(shown)}{more}); freq= names the "
                f"step to forecast, and {advice}; or read items of one step at a time"
            )
        if beside.any():
            i = int(beside.argmax())
            row = items.rows(i).start + int(off[items.rows(i)].argmax())
            first = f"first {str(ids[i])[:QUOTED]} at" if len(ids) > 1 else ", first"
            which = self.several(ids, beside) + (", " if len(ids) > 1 else "") + first
            self.problems.append(
                f"time: {int(off.sum())} rows{which} {self.written(items.clock[row])} are beside "
                f"the grid of step {unit}; {advice}"
            )

    def meeting(self, items: Items, met: np.ndarray, ids: np.ndarray, what: str) -> str:
        """Report rows of one item at one stamp; `met` [T - 1]: from a row to the next."""
        row = int(met.argmax()) + 1
        stamp = self.written(items.clock[row])
        if len(ids) > 1:
            owner = str(ids[items.owners[row]])[:QUOTED]
            where = f" of the same item, first {owner!r} at {stamp}"
        else:
            where = f", first {stamp} (id= names the column that tells several items apart)"
        return (
            f"time: {int(met.sum())} rows have {what} of another{where}; drop them, or "
            "irregular='regularise' averages them"
        )

    def written(self, time: Any) -> str:
        """A time of the clock as a message shows it."""
        return str(time) if self.freq is None else format_stamp(time.view("datetime64[us]"))

    def rules_of(self, items: Items, stamps: np.ndarray) -> tuple[DayRule, ...]:
        """The day in the month of all items, or of each where they differ; () for other steps."""
        if count_unit(self.freq or "D")[1] not in MONTHS:
            return ()
        rule, all_on_it = day_rule(np.unique(stamps))
        if all_on_it:
            return (rule,)
        rules, beside = [], 0
        for i in range(items.n):
            own = stamps[items.rows(i)]
            rules.append(rule if rule.holds(own).all() else day_rule(own)[0])
            beside += int((~rules[-1].holds(own)).sum())
        if beside and self.irregular != "regularise":
            self.notes.append(
                f"{beside} stamps lie on another day of the month than most of their item, and are "
                "taken for that day",
            )
        return tuple(rules)

    # ---- rows ahead ----

    def steps_ahead(
        self,
        times: Times,
        grids: Grids,
        codes: np.ndarray | None,
        layout: GridLayout,
    ) -> Ahead | None:
        """Places of the rows ahead [A] on the grids of their items; None where there are none.

        Args:
          codes: [A] the item of each row, -1: the table has no such item.
        """
        if codes is None:
            return None
        ours = np.flatnonzero(codes >= 0)
        owners = codes[ours]
        if times.ahead is None:
            order = np.argsort(owners, kind="stable")
            counts = np.bincount(owners, minlength=len(layout.ids))
            within = np.empty(len(owners), np.int64)
            within[order] = places_in_item(np.concatenate([[0], np.cumsum(counts)]))
            return Ahead(ours, owners, layout.last[owners] + 1 + within)
        clock = times.ahead[ours]
        if grids.numbered is not None:
            first, step = grids.numbered
            exact = (clock - first[owners]) / step
            place = np.rint(exact).astype(np.int64)
            off = exact != place
        elif self.freq is None or grids.first is None:
            self.problems.append("future: no step of time to be found in the table; give freq=")
            return None
        else:
            stamps = _wall(clock, grids.zone).view("datetime64[us]")
            place, off = self.nearest(grids.first[owners], stamps)

        if off.any() and self.irregular != "regularise":
            row = int(off.argmax())
            owner = str(layout.ids[owners[row]])[:QUOTED]
            self.problems.append(
                f"future: {int(off.sum())} rows are beside the grid of their item, first row "
                f"{ours[row]}: {owner} at {self.written(clock[row])}, where the step is "
                f"{self.freq or 'that of the table'}"
            )
            return None
        again = pd.DataFrame({"owner": owners, "place": place}).duplicated().to_numpy()
        if again.any():
            self.problems.append(
                f"future: {int(again.sum())} rows have the id and time of another, first row "
                f"{ours[again.argmax()]}",
            )
        return Ahead(ours, owners, place)


def _wall(clock: np.ndarray, tz: str | None) -> np.ndarray:
    """Microseconds in UTC -> microseconds on the clock on the wall, both int64 [T]."""
    return to_wall(clock.view("datetime64[us]"), tz).view(np.int64)
