"""`Panel`: N items with C targets each, on grids of their own, with covariates.

Items lie one after the other in one ragged array, so that a hundred thousand of them are a few
arrays and no window has to be copied: item i holds the rows `bounds[i]:bounds[i + 1]`.

Shapes: N items, C targets, R rows of all items together, K covariates, F rows of the known future.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd

from ltsm_jax.data.series import DataError, Series
from ltsm_jax.frequency import (
    MONTHS,
    DayRule,
    count_unit,
    day_rule,
    from_wall,
    on_wall,
    season_of,
    stamps_from,
    to_wall,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Panel:
    """N items, each on a regular grid of one step; see the module docstring.

    The last row of an item holds an observed target: what comes after it is the future.

    Attributes:
      name: what reports call the table.
      ids: [N] the items' names, as they came in. A table without ids is one item.
      columns: name of each target.
      values: [C, R] float64, data units, NaN = missing.
      bounds: [N + 1] int64, first row of each item, and R.
      first: [N] datetime64[us], the stamp of each item's first row (UTC where there is a zone), or
        None when the source has none.
      freq: canonical step of all items, or None where it is not known.
      model_freq: frequency that a model is told where it is another than `freq`: "oov", out of its
        vocabulary.
      tz: zone that the stamps came in, or None.
      rules: the day in the month, for steps of months: one rule for all items or one for each; ()
        has it found from the first stamps of all items.
      id_name, time_name: names of these columns; None where the table has none. Of several id
        columns the names, and in `ids` the cells, are joined by "/".
      id_parts: one row per item with the cells of several id columns under their own names; None:
        there is one at most.
      past: names of the covariates that are known up to the last target. past_values: [K, R].
      known: names of those that are known ahead. known_values: [K, R]. future_values: [K, N, F],
        the F rows after each item's last, NaN where nothing is known.
      categories: the kinds of each covariate of text, by its name; a cell holds the place of its
        kind there.
      static: one row per item, in the order of `ids`: numbers and categories; None: there are none.
      notes: what was done to the data or found about them, one line each, for reports.
    """

    name: str
    ids: np.ndarray
    columns: tuple[str, ...]
    values: np.ndarray
    bounds: np.ndarray
    first: np.ndarray | None = None
    freq: str | None = None
    tz: str | None = None
    rules: tuple[DayRule, ...] = ()
    id_name: str | None = None
    time_name: str | None = None
    past: tuple[str, ...] = ()
    past_values: np.ndarray | None = None
    known: tuple[str, ...] = ()
    known_values: np.ndarray | None = None
    future_values: np.ndarray | None = None
    categories: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    static: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()
    model_freq: str | None = None
    id_parts: pd.DataFrame | None = None

    def __post_init__(self):
        n, rows = len(self.ids), self.values.shape[-1]
        if self.values.ndim != 2 or len(self.columns) != len(self.values):
            raise DataError(
                f"values of shape {self.values.shape} need [C, R] and {len(self.columns)} names of "
                "targets"
            )
        if self.bounds.shape != (n + 1,) or self.bounds[0] != 0 or self.bounds[-1] != rows:
            raise DataError(f"{n} items of {rows} rows need {n + 1} bounds from 0 to {rows}")
        if n < 1 or (np.diff(self.bounds) < 1).any():
            raise DataError("a panel has at least one item, and every item at least one row")
        for names, values in ((self.past, self.past_values), (self.known, self.known_values)):
            if names and (values is None or values.shape != (len(names), rows)):
                raise DataError(
                    f"{len(names)} covariates ({', '.join(names)}) need values of [{len(names)}, "
                    f"{rows}]"
                )

        ahead = self.future_values
        if ahead is not None and ahead.shape[:2] != (len(self.known), n):
            needed = f"[K, N, F], K {len(self.known)}, N {n}"
            raise DataError(f"future_values of shape {ahead.shape} need {needed}")
        if self.first is not None and self.first.shape != (n,):
            raise DataError(f"{n} items need {n} first stamps, not {self.first.shape}")
        if self.static is not None and len(self.static) != n:
            raise DataError(f"{n} items need {n} rows of static covariates, not {len(self.static)}")

    @property
    def id_columns(self) -> tuple[str, ...]:
        """Names of the columns that tell the items apart."""
        if self.id_parts is not None:
            return tuple(self.id_parts.columns)
        return () if self.id_name is None else (self.id_name,)

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def n_variates(self) -> int:
        """C."""
        return len(self.values)

    @property
    def n_rows(self) -> int:
        """R, of all items together."""
        return self.values.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each item [N]."""
        return np.diff(self.bounds)

    @property
    def season(self) -> int:
        """Rows in the main season (`season_of`); 1 where the step is not known."""
        return season_of(self.freq) if self.freq else 1

    def until(self, ends: np.ndarray) -> "Panel":
        """Cut every item off before a row of the panel, `ends` [N]; nothing is known after it.

        Raises: DataError where nothing is left of an item.
        """
        spans = [np.arange(a, b) for a, b in zip(self.bounds[:-1], ends, strict=True)]
        rows = np.concatenate(spans)
        bounds = np.concatenate([[0], np.cumsum([len(span) for span in spans])])
        return dataclasses.replace(
            self,
            values=self.values[:, rows],
            bounds=bounds,
            past_values=None if self.past_values is None else self.past_values[:, rows],
            known_values=None if self.known_values is None else self.known_values[:, rows],
            future_values=None,
        )

    @classmethod
    def of(cls, series: Series) -> "Panel":
        """A series as a panel of one item without id."""
        rules = ()
        if series.timestamps is not None and _in_months(series.freq):
            rules = (day_rule(to_wall(series.timestamps, series.tz))[0],)
        return cls(
            name=series.name,
            ids=np.array([series.name], object),
            columns=series.columns,
            values=series.values,
            bounds=np.array([0, series.n_rows]),
            first=None if series.timestamps is None else series.timestamps[:1],
            freq=series.freq,
            model_freq=series.model_freq,
            tz=series.tz,
            rules=rules,
            time_name=series.time_name,
            notes=series.notes,
        )

    def item(self, i: int) -> Series:
        """Item number i as a `Series` of its targets."""
        lo, hi = self.bounds[i : i + 2]
        stamps = self.stamps_at(np.array([i]), np.arange(hi - lo)[None])
        stamps = None if stamps is None else stamps[0]
        return Series(
            name=str(self.ids[i]),
            values=self.values[:, lo:hi],
            columns=self.columns,
            timestamps=stamps,
            freq=self.freq,
            tz=self.tz,
            time_name=self.time_name,
        )

    def take(self, items: np.ndarray) -> "Panel":
        """The items numbered `items`, in that order, as a panel of their own."""
        every = np.arange(self.n_rows)
        rows = np.concatenate([every[self.bounds[i] : self.bounds[i + 1]] for i in items])

        def cut(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[:, rows]

        return dataclasses.replace(
            self,
            ids=self.ids[items],
            values=self.values[:, rows],
            bounds=np.concatenate([[0], np.cumsum(self.lengths[items])]),
            first=None if self.first is None else self.first[items],
            rules=self.rules if len(self.rules) < 2 else tuple(self.rules[i] for i in items),
            past_values=cut(self.past_values),
            known_values=cut(self.known_values),
            future_values=None if self.future_values is None else self.future_values[:, items],
            static=None if self.static is None else self.static.iloc[items].reset_index(drop=True),
            id_parts=None
            if self.id_parts is None
            else self.id_parts.iloc[items].reset_index(drop=True),
        )

    def contexts(
        self, items: np.ndarray, length: int, values: np.ndarray | None = None
    ) -> np.ndarray:
        """The last `length` rows of `items` [M] as [M, C, length]; NaN in front of shorter ones.

        values: [K, R] to cut instead of the targets, such as `past_values`.
        """
        source = self.values if values is None else values
        at = self.bounds[np.asarray(items) + 1][:, None] - length + np.arange(length)
        inside = at >= self.bounds[items][:, None]
        found = source[:, np.where(inside, at, 0)]
        return np.where(inside, found, np.nan).swapaxes(0, 1)

    def stamps_after(self, n: int) -> np.ndarray | None:
        """The `n` stamps [N, n] that follow each item's last; None where stamps or step are not
        known.
        """
        places = (self.lengths - 1)[:, None] + np.arange(1, n + 1)
        return self.stamps_at(np.arange(self.n_items), places)

    def stamps_at(self, items: np.ndarray, places: np.ndarray) -> np.ndarray | None:
        """The stamps [M, n] at `places` [M, n] of items [M], counted from each item's first row.

        They are UTC where there is a zone; None where stamps or step are not known.
        """
        if self.first is None or self.freq is None:
            return None
        zone = self.tz if on_wall(self.freq) else None
        wall = to_wall(self.first, zone)
        found = np.empty(places.shape, "datetime64[us]")
        for rule, rows in self._rules(wall, items):
            found[rows] = stamps_from(
                wall[items[rows]][:, None], places[rows], self.freq, rule=rule
            )
        return from_wall(found.ravel(), zone).reshape(found.shape)

    def _rules(
        self,
        wall: np.ndarray,
        items: np.ndarray,
    ) -> list[tuple[DayRule | None, np.ndarray]]:
        """Each rule of the day in the month with the places in `items` where it holds."""
        every = np.arange(len(items))
        if not _in_months(self.freq):
            return [(None, every)]
        if len(self.rules) < 2:
            # One stamp does not tell the 28th from the end of February: those of all items do.
            rule = self.rules[0] if self.rules else day_rule(wall)[0]
            return [(rule, every)]
        own = [self.rules[i] for i in items]
        groups = []
        for rule in dict.fromkeys(own):
            places = np.flatnonzero([other == rule for other in own])
            groups.append((rule, places))
        return groups


def _in_months(freq: str | None) -> bool:
    """Return whether a step has a day in the month."""
    return freq is not None and count_unit(freq)[1] in MONTHS
