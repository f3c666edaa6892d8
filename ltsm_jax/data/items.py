"""Rows of many items at once: sorted by item and time, their common step, their places on a grid.

Nothing here loops over the items that have a constant step; a hundred thousand of them are a few
passes over arrays.

Shapes: N items, T rows of all items together.
"""

import dataclasses

import numpy as np

from ltsm_jax.frequency import (
    LEAST_SHARE,
    LENGTHS,
    canonical_freq,
    day_rule,
    infer_freq,
    rounded_step,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Rows of N items, sorted by item and, within an item, by time.

    Attributes:
      starts: [N + 1] int64, the first sorted row of each item, and T.
      clock: [T] int64, times of the sorted rows; places in the item where rows have no time.
      order: [T] the rows of the table in sorted order; None where they came sorted.
      unsorted: [N] bool, the items whose rows were out of order in time.
    """

    starts: np.ndarray
    clock: np.ndarray
    order: np.ndarray | None
    unsorted: np.ndarray

    @classmethod
    def sort(cls, codes: np.ndarray, n: int, clock: np.ndarray | None) -> "Items":
        """Sort rows, stably.

        Args:
          codes: [T] number of the item of each row, each of 0 .. n - 1 at least once.
          clock: [T] int64, or None: the rows of an item are taken in their order.
        """
        counts = np.bincount(codes, minlength=n)
        starts = np.concatenate([[0], np.cumsum(counts)])
        order = None
        if (codes[1:] < codes[:-1]).any():
            order = np.argsort(codes, kind="stable")
        if clock is None:
            return cls(starts, places_in_item(starts), order, unsorted=np.zeros(n, bool))

        clock = clock if order is None else clock[order]
        back = np.flatnonzero((clock[1:] < clock[:-1]) & inside(starts))
        unsorted = np.zeros(n, bool)
        if len(back):
            owner = np.repeat(np.arange(n, dtype=np.int32), counts)
            unsorted[owner[back]] = True
            within = np.lexsort((clock, owner))
            clock = clock[within]
            order = within if order is None else order[within]
        return cls(starts, clock, order, unsorted=unsorted)

    @property
    def n(self) -> int:
        """N."""
        return len(self.starts) - 1

    @property
    def counts(self) -> np.ndarray:
        """Rows of each item [N]."""
        return np.diff(self.starts)

    @property
    def owners(self) -> np.ndarray:
        """The item of each sorted row, int32 [T]."""
        return np.repeat(np.arange(self.n, dtype=np.int32), self.counts)

    def sorted(self, cells: np.ndarray) -> np.ndarray:
        """Cells [..., T] of the table's rows in sorted order."""
        return cells if self.order is None else cells[..., self.order]

    def rows(self, i: int) -> slice:
        """The sorted rows of item i."""
        return slice(int(self.starts[i]), int(self.starts[i + 1]))


def places_in_item(starts: np.ndarray) -> np.ndarray:
    """Number of each row in its item, int64 [T], from the items' first rows [N + 1]."""
    return np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))


def inside(starts: np.ndarray) -> np.ndarray:
    """Mask of the steps from a sorted row to the next that stay in one item, bool [T - 1]."""
    stays = np.ones(max(int(starts[-1]) - 1, 0), bool)
    stays[starts[1:-1] - 1] = False
    return stays


# ---- the common step ----


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The steps of time within items.

    Attributes:
      usual: [N] int64 microseconds, the most frequent step of each item; 0 where it has one row.
      common: that of most items; 0 where no item has two rows.
      share: share of the steps of these items that are the common one.
      constant: every step of every item is the common one.
    """

    usual: np.ndarray
    common: int
    share: float
    constant: bool


def steps_of(items: Items) -> Steps:
    """Find the usual step of each item and of all, rows at one time left aside."""
    steps = np.diff(items.clock)
    stays = inside(items.starts)
    stays &= steps > 0
    usual = np.zeros(items.n, np.int64)
    if not stays.any():
        return Steps(usual=usual, common=0, share=0.0, constant=False)
    if stays.all():
        owners = items.owners[1:]
    else:
        owners, steps = items.owners[1:][stays], steps[stays]

    # Items of one constant step need no counting, and they are nearly all.
    first = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
    some = owners[first]
    least, most = np.minimum.reduceat(steps, first), np.maximum.reduceat(steps, first)
    usual[some] = least
    varied = np.zeros(items.n, bool)
    varied[some] = least < most
    if varied.any():
        chosen = varied[owners]
        counts = np.diff(np.concatenate([first, [len(steps)]]))
        constant = least == most
        frequent = _most_frequent_each(
            owners[chosen],
            steps[chosen],
            others=(least[constant], counts[constant]),
        )
        usual[frequent[0]] = frequent[1]

    # Of steps that equally many items have, the one that is more frequent overall.
    kinds, counts = np.unique(usual[usual > 0], return_counts=True)
    kinds = kinds[counts == counts.max()]
    common = int(kinds[0])
    if len(kinds) > 1:
        every, overall = np.unique(steps, return_counts=True)
        common = int(kinds[np.argmax(overall[np.searchsorted(every, kinds)])])
    alike = (usual == common)[owners]
    share = float((steps[alike] == common).mean())
    return Steps(usual=usual, common=common, share=share, constant=bool(alike.all() and share == 1))


def _most_frequent_each(
    owners: np.ndarray,
    steps: np.ndarray,
    others: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(owners, the most frequent step of each).

    Of several the one that all items together have most often, and of these the smallest.

    Args:
      others: steps of the other items, and how often they have them.
    """
    kinds, codes, overall = np.unique(steps, return_inverse=True, return_counts=True)
    place = np.minimum(np.searchsorted(kinds, others[0]), len(kinds) - 1)
    shared = kinds[place] == others[0]
    np.add.at(overall, place[shared], others[1][shared])
    order = np.lexsort((codes, owners))
    owners, codes = owners[order], codes[order]
    new = np.concatenate([[True], (owners[1:] != owners[:-1]) | (codes[1:] != codes[:-1])])
    at = np.flatnonzero(new)
    counts = np.diff(np.concatenate([at, [len(codes)]]))
    owners, codes = owners[at], codes[at]

    best = np.lexsort((codes, -overall[codes], -counts, owners))
    owners, codes = owners[best], codes[best]
    first = np.concatenate([[True], owners[1:] != owners[:-1]])
    return owners[first], kinds[codes[first]]


def common_freq(items: Items, steps: Steps) -> str | None:
    """Infer the canonical step of most items by the rules of `infer_freq`; None: none stands out.

    Months are sought in the stamps of all such items together: those of one item may be too few.
    """
    if not steps.common:
        return None
    days = steps.common / LENGTHS["D"]
    alike = steps.usual == steps.common
    if days >= 28:
        return _long_freq(items, steps)
    if steps.constant:
        return canonical_freq(f"{steps.common}us")
    if steps.common < LENGTHS["s"]:
        # A rate of many hertz, rounded to milliseconds, has steps of two lengths.
        item = int(np.flatnonzero(alike)[0])
        stamps = items.clock[items.rows(item)].astype("datetime64[us]")
        if (rounded := rounded_step(np.unique(stamps))) is not None:
            return canonical_freq(f"{rounded}us")
    if steps.share < LEAST_SHARE:
        return None
    if days == 1 and _skip_weekends(items, alike):
        return "B"
    return canonical_freq(f"{steps.common}us")


def _long_freq(items: Items, steps: Steps) -> str | None:
    """The step of items whose usual step has four weeks or more."""
    long = steps.usual >= 28 * LENGTHS["D"]
    stamps = items.clock[long[items.owners]]
    pooled = np.unique(stamps).astype("datetime64[us]")
    rule, all_on_it = day_rule(pooled)
    if all_on_it and rule.kind == "day":
        months = _usual_months(items, long)
        if months > 0:
            return canonical_freq(f"{months}M")
    if steps.share == 1:
        return canonical_freq(f"{steps.common}us")

    # Days of the month differ from item to item: each is looked at by itself.
    found: dict[str, int] = {}
    for i in np.flatnonzero(long):
        freq = infer_freq(items.clock[items.rows(int(i))].astype("datetime64[us]"))
        if freq is not None:
            found[freq] = found.get(freq, 0) + 1
    return max(sorted(found), key=lambda freq: found[freq]) if found else None


def _usual_months(items: Items, chosen: np.ndarray) -> int:
    """The most frequent step in months of the chosen items."""
    months = items.clock.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64)
    stays = inside(items.starts) & chosen[items.owners[1:]]
    kinds, counts = np.unique(np.diff(months)[stays], return_counts=True)
    return int(kinds[counts.argmax()])


def _skip_weekends(items: Items, chosen: np.ndarray) -> bool:
    """Return whether the chosen items have no stamp on a weekend and step from Friday to Monday."""
    days = items.clock.astype("datetime64[us]").astype("datetime64[D]")
    if not np.is_busday(days[chosen[items.owners]]).all():
        return False
    stays = inside(items.starts) & chosen[items.owners[1:]]
    before, after = days[:-1][stays], days[1:][stays]
    over = (after - before).astype(np.int64) > 1
    return bool((np.busday_count(before[over], after[over]) == 1).any())


def coarser(items: Items, place: np.ndarray) -> np.ndarray:
    """Mask of the items with a coarser step, bool [N]: three steps or more of one length over a
    place.

    Steps of several lengths must be six to count: holes may lie so by chance.

    Args:
      place: [T] whole places of the sorted rows on the items' grids.
    """
    steps = np.diff(place)
    stays = inside(items.starts) & (steps > 0)
    found = np.zeros(items.n, bool)
    if not stays.any() or (steps[stays] == 1).all():
        return found
    owners, steps = items.owners[1:][stays], steps[stays]
    first = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
    divisor = np.gcd.reduceat(steps, first)
    constant = np.minimum.reduceat(steps, first) == np.maximum.reduceat(steps, first)
    count = np.diff(np.concatenate([first, [len(steps)]]))
    found[owners[first]] = (divisor > 1) & (count >= np.where(constant, 3, 6))
    return found


# ---- values ----


def fill_linearly(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Fill the NaN of values [R] linearly within each item, and at its ends with the nearest value.

    Items without a finite value stay NaN.
    """
    present = np.isfinite(values)
    at = np.arange(len(values))
    begin = np.repeat(bounds[:-1], np.diff(bounds))
    end = np.repeat(bounds[1:], np.diff(bounds))
    before = np.maximum.accumulate(np.where(present, at, -1))
    after = np.minimum.accumulate(np.where(present, at, len(values))[::-1])[::-1]
    has_before, has_after = before >= begin, after < end

    left = values[np.where(has_before, before, 0)]
    right = values[np.where(has_after, after, 0)]
    left, right = np.where(has_before, left, right), np.where(has_after, right, left)
    gap = np.maximum(after - before, 1)
    share = np.where(has_before & has_after, (at - before) / gap, 0.0)
    filled = left + share * (right - left)
    filled[~(has_before | has_after)] = np.nan
    return np.where(present, values, filled)
