"""Tables in: files, frames, arrays -> `Series`, checked at the border.

Whatever is wrong with a source is collected and raised as one `DataError` that says what, where and
what to do; nothing is dropped, filled, sorted or cast without being asked for, and what was asked
for and done stands in `Series.notes`.

Shapes: C variates, T rows of the table or of the grid.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from ltsm_jax.data.columns import QUOTED, Name, Stamps, TableReader, quote, short
from ltsm_jax.data.series import Series, clip
from ltsm_jax.data.sources import as_table
from ltsm_jax.data.stamps import format_stamp, rows
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

MISSING = ("error", "interpolate", "keep")
IRREGULAR = ("error", "regularise", "ignore")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Options for reading a table; the keywords of `read_series`, and of whatever passes them on.

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
        check_options(self, ("target", "time", "id"))


def check_options(options: Any, columns: Sequence[str]) -> None:
    """Check the options of a reader, and write names of columns and the step in one way.

    Args:
      options: a frozen dataclass with date_format, missing, irregular and freq, changed in place.
      columns: its fields that name columns.

    Raises: ValueError for a value that is none of those listed.
    """
    for option in columns:
        value = getattr(options, option)
        # `df.columns[1:]`, a set, a generator; a tuple may be one name of a column with levels
        if isinstance(value, Iterable) and not isinstance(value, str | list | tuple):
            object.__setattr__(options, option, list(value))
    if options.date_format is not None and not isinstance(options.date_format, str):
        raise ValueError(
            f"date_format must be text such as '%d/%m/%Y', not {options.date_format!r}"
        )
    for option, allowed in (("missing", MISSING), ("irregular", IRREGULAR)):
        value = getattr(options, option)
        if value not in allowed and not (option == "irregular" and value is None):
            raise ValueError(
                f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}"
            )
    if options.freq is not None and options.freq != "oov":
        object.__setattr__(options, "freq", canonical_freq(options.freq))


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
      source: a file (.csv, .tsv, .txt, also with .gz; .parquet; .xlsx), a pandas DataFrame or
        Series, an array [T] or [T, C] (rows first), a polars or Arrow table.

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
    return _SeriesReader(how, source).read()


class _SeriesReader(TableReader):
    """One table on its way to a `Series`."""

    def read(self) -> Series:
        table = as_table(self.source, self.notes)
        table, labels = self.index_as_columns(table)
        self.check_shape(table)
        self.stop()
        time, targets = self.choose_columns(table, labels)
        stamps, tz = self.stamps_of(table, time)
        if stamps is not None and tz is not None:
            tz = self.zone_of_steps(stamps, tz)
        if not self.problems:
            self.look_for_ids(table, time, targets, stamps=stamps)
        id_column = self.joined(table, "id", self.how.id)
        values = self.numbers(table, targets)
        if id_column is not None:
            stamps, values, targets = self.spread(stamps, values, targets, ids=id_column, tz=tz)
        elif stamps is not None and len(values):
            stamps, values = self.on_grid(stamps, values, tz)
        if self.how.missing != "error":
            stamps, values = self.without_future(stamps, values)
        # Rows of the grid are not those of the file.
        at = stamps if self.irregular == "regularise" else None
        values = self.fill(values, targets, at)
        if stamps is not None and "timestamp" in targets:
            self.problems.append(
                "a column to read is called 'timestamp' beside the time, and a forecast has a "
                "column of that name: rename it, or leave it out with target="
            )
        self.stop()
        return Series(
            name=self.name,
            values=values,
            columns=tuple(map(str, targets)),
            timestamps=stamps,
            freq=self.freq,
            notes=tuple(clip(note, 500) for note in self.notes),
            tz=tz,
            model_freq="oov" if self.how.freq == "oov" else None,
            time_name=str(time[0]) if stamps is not None and len(time) == 1 else None,
        )

    # ---- columns ----

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
            self.problems.append(f"target names a column twice: {quote(wanted)}")
        asked = how.target is not None
        wanted = list(dict.fromkeys(wanted))
        if how.time is None:
            time = self.find_time(table, labels, [*wanted, *ids])
        self.check_labels(table, labels, time, taken=[*wanted, *ids])
        if not asked:
            apart = {
                *time,
                *ids,
                *self.undecided,
                *(label for label in labels if not self.is_id_like(table, label)),
            }
            wanted = [column for column in columns if column not in apart]
            self.check_default(table, wanted, time, ids=ids)
            if not self.any_numbers(table, wanted):
                wanted = []  # every cell of them would be listed
        return time, wanted

    # ---- time ----

    def clock(self, stamps: np.ndarray, tz: str | None) -> np.ndarray:
        """Choose the clock that steps are counted on: UTC, for steps of a day and more the wall
        clock.
        """
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
        self.notes.append(
            f"the steps are regular in UTC, not on the clock in {tz}: the stamps are given in UTC"
        )
        return "UTC"

    def look_for_ids(self, table: pd.DataFrame, time: list, targets: list, stamps: Stamps) -> None:
        """Refuse several series below one another by the name of the column(s) that tell them
        apart."""
        given = self.found(table, "id", self.how.id)
        asked = set(targets) if self.how.target is not None else set()
        taken = {*time, *given, *asked}
        codes = None
        if given:
            codes = table.groupby(given, sort=False, dropna=False).ngroup().to_numpy()
        for columns in self.ids_that_tell_apart(table, time, taken, stamps=stamps, codes=codes):
            self.refuse_ids(table, [*given, *columns])
        named = self.named_ids(table, taken)
        if named and not given:
            self.refuse_ids(table, named[:1])

    def on_grid(
        self, stamps: np.ndarray, values: np.ndarray, tz: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
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
            found.append(
                f"{count} stamps earlier than the one before, first in row {i}: "
                f"{format_stamp(clock[i])}"
            )
        unique, first_rows = np.unique(clock, return_index=True)
        if len(unique) < len(clock):
            again = np.ones(len(clock), bool)
            again[first_rows] = False
            i = int(again.argmax())
            found.append(
                f"{again.sum()} stamps repeated, first in row {i}: {format_stamp(clock[i])}"
            )
        advice = (
            "irregular='regularise' sorts the rows and puts them on the regular grid, holes missing"
        )
        if self.freq is None and len(unique) > 1:
            found.append("no step of time to be found in the stamps; give freq=")
            advice = (
                "give freq= with irregular='regularise', which puts the rows on that grid, holes "
                "missing"
            )
        elif self.freq is not None and rounded_step(unique) is None:
            places = Grid.through(unique, self.freq).places(unique)
            wrong = np.abs(np.diff(places) - 1) > 1e-9
            if wrong.any():
                i = int(wrong.argmax()) + 1
                pair = f"{format_stamp(unique[i])} follows {format_stamp(unique[i - 1])}"
                where = f"first in row {first_rows[i]}: {pair}"
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
                f"time: a grid of step {self.freq} would have {n} rows for {len(clock)} stamps; "
                "give a longer freq="
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
                f"put on a grid of step {self.freq}: {unsorted} stamps out of order, {off.sum()} "
                f"rows moved to the nearest stamp, {met} averaged with another, {holes} of {n} "
                "rows were holes"
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
        groups = {
            key: np.asarray(at)
            for key, at in ids.groupby(ids, sort=False, observed=True).indices.items()
        }
        names = [
            f"{key}" if len(targets) == 1 else f"{key}/{target}"
            for key, target in itertools.product(groups, targets)
        ]
        counts = collections.Counter(names)
        if doubled := sorted(name for name, count in counts.items() if count > 1):
            self.problems.append(
                f"ids and targets give one name twice: {quote(doubled)}; rename them"
            )
            return stamps, values, targets

        every = itertools.product(groups.values(), range(len(targets)))
        tracks = [(at, values[c, at]) for at, c in every]
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
            self.problems.append(self.different_ids(stamps, groups, odd, name=ids.name))
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
            span = ""
            if stamps is not None:
                first, last = stamps[groups[key][0]], stamps[groups[key][-1]]
                span = f", {format_stamp(first)} to {format_stamp(last)}"
            lines.append(f"{str(key)[:QUOTED]}: {len(groups[key])} rows{span}")
        hint = (
            ""
            if stamps is None
            else "; irregular='regularise' with missing='keep' puts them on one grid, holes NaN"
        )
        return (
            f"{len(odd)} of {len(groups)} ids have other stamps or lengths than the first, so they "
            f"are not variates of one series ({'; '.join(lines)}); read each id on its own, as the "
            f"rows of a DataFrame where {str(name)[:QUOTED]!r} is that id{hint}"
        )

    # ---- values ----

    def without_future(self, stamps: Stamps, values: np.ndarray) -> tuple[Stamps, np.ndarray]:
        """Drop the last rows of (stamps, values) in which every variate is empty: they are not
        observed yet.
        """
        seen: Any = ~np.isnan(values).all(axis=0)
        if self.problems or not seen.any() or seen[-1]:
            return stamps, values
        end = int(np.flatnonzero(seen)[-1]) + 1
        count = values.shape[1] - end
        self.notes.append(
            f"the last {count} rows hold no value and were cut off: they are the future"
        )
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
            name = short(columns[c])
            if any(problem.startswith(f"column {name}") for problem in unread):
                continue
            infinite = np.isinf(values[c])
            missing = np.zeros_like(infinite) if self.how.missing == "keep" else np.isnan(values[c])
            kinds = ((missing, "missing"), (infinite, "infinite"))
            what = [
                f"{mask.sum()} {kind}, {rows(mask, stamps=stamps)}"
                for mask, kind in kinds
                if mask.any()
            ]
            end = tail(bad[c])
            if bad[c].all():
                self.problems.append(f"column {name}: not one finite value")
            elif self.how.missing == "error" or (infinite.any() and not interpolate):
                # Infinite cells are no holes: "keep" refuses them too.
                kept = "" if infinite.any() else "missing='keep' leaves them empty, "
                self.problems.append(
                    f"column {name}: {'; '.join(what)}; missing='interpolate' fills them, {kept}or "
                    f"clean the column{ends}"
                )
            elif interpolate and end > max(longest_gap(bad[c]), 1) and end > tail(bad.all(axis=0)):
                self.problems.append(
                    f"column {name}: the last {end} rows are empty where other columns go on, and "
                    "a forecast would begin after them; name the columns to forecast by target=, "
                    "which cuts the rows off as the future, or leave them empty by missing='keep'"
                )
            else:
                changed.append(f"{str(columns[c])[:QUOTED]} {bad[c].sum()}")
            if interpolate and not bad[c].all():
                every = np.arange(values.shape[1])
                values[c, bad[c]] = np.interp(every[bad[c]], every[~bad[c]], values[c, ~bad[c]])
        if changed:
            done = "filled by linear interpolation" if interpolate else "kept"
            self.notes.append(
                f"missing cells {done} ({100 * bad.mean():.3g} % of all): {quote(changed)}"
            )
        return values

    def future_rows(self, values: np.ndarray) -> str:
        """Add to a message about missing values that the last rows hold none at all."""
        empty: Any = np.isnan(values).all(axis=0)
        if not len(empty) or not empty[-1] or empty.all():
            return ""
        count = len(empty) - 1 - int(np.flatnonzero(~empty)[-1])
        return f" (the last {count} rows hold no value: missing='keep' cuts them off as the future)"


def tail(bad: np.ndarray) -> int:
    """Count the empty cells at the end of [T]."""
    return len(bad) if bad.all() else int(bad[::-1].argmin())


def longest_gap(bad: np.ndarray) -> int:
    """The longest run of empty cells [T] with values on both sides."""
    at = np.flatnonzero(~bad)
    return int(np.diff(at).max(initial=1)) - 1


def _same_stamps(stamps: Stamps, at: np.ndarray, first: np.ndarray) -> bool:
    if len(at) != len(first):
        return False
    return stamps is None or np.array_equal(stamps[at], stamps[first])
