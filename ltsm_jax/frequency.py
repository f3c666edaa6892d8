"""Steps in time: the one parser of their names, the step of given stamps, the stamps of a step.

A step is a count and a unit, "15min", "h", "3D", "M"; its canonical name has the largest unit that
divides it. A fixed step (microseconds to weeks) is a length. A step of months ("M", "Q", "Y" and
their multiples) has a day in the month, which `Grid` finds from all stamps: the 15th, the last day,
the last business day, the third Friday.

Stamps are datetime64[us]. Those of a series with a zone are UTC; steps of a day and more are
counted on the clock on the wall (`to_wall`), so that a day at local midnight stays a day where the
clocks change.

Shapes: T stamps.
"""

import dataclasses
import datetime
import re
from typing import Any

import numpy as np
import pandas as pd

LENGTHS = {  # microseconds
    "us": 1,
    "ms": 1000,
    "s": 10**6,
    "min": 60 * 10**6,
    "h": 3600 * 10**6,
    "D": 86400 * 10**6,
    "W": 7 * 86400 * 10**6,
}
LONGEST = 1000 * 366 * LENGTHS["D"]  # a thousand years are no step
MONTHS = {"M": 1, "Q": 3, "Y": 12}
WALL = ("D", "B", "W", "M", "Q", "Y")  # units counted on the clock on the wall
DAY = np.timedelta64(1, "D")
LEAST_SHARE = 0.25  # of the steps that a step must have; below it is jitter

_ALIASES = {  # of pandas 1, 2 and 3 and of common speech; where case tells M from min it is kept
    "us": "us U microsecond microseconds",
    "ms": "ms L millisecond milliseconds",
    "s": "s S sec second seconds",
    "min": "min T t m minute minutes minutely",
    "h": "h H hour hours hourly",
    "D": "D d day days daily",
    "B": "B b bday business",
    "W": "W w week weeks weekly",
    "M": "M MS ME BM BMS BME WOM LWOM month months monthly",
    "Q": "Q QS QE BQ BQS BQE q quarter quarters quarterly",
    "Y": "Y y A a YS YE AS BA BAS BY BYS BYE year years yearly annual",
}
_UNITS: dict[str, str] = {}  # by alias
for _unit, _aliases in _ALIASES.items():
    _UNITS |= dict.fromkeys(_aliases.split(), _unit)


# ---- names ----


def split_freq(freq: Any) -> tuple[int, str] | None:
    """Split a step into count and unit as written: "15min" -> (15, "min"), "W-SUN" -> (1, "W").

    Offsets of pandas are taken by their name, lengths of time as microseconds. None for what is not
    written so.
    """
    if isinstance(freq, datetime.timedelta):
        return freq // datetime.timedelta(microseconds=1), "us"
    text = str(getattr(freq, "freqstr", freq))
    match = re.fullmatch(r"\s*(\d{0,18})\s*([A-Za-z]+)(-[A-Za-z0-9]{3,4})?\s*", text)
    if match is None:
        return None
    return int(match[1] or 1), match[2]


def canonical_freq(freq: Any) -> str:
    """Name a step in the one way: "H", "60min", pd.offsets.Hour() -> "h", "MS" -> "M".

    Raises: ValueError for a step that is none of them.
    """
    count, written = split_freq(freq) or (0, "")
    unit = _UNITS.get(written)
    sizes = MONTHS if unit in MONTHS else LENGTHS
    total = count * sizes.get(unit or "", 1)
    if unit is None or count < 1 or total > (LONGEST if unit in LENGTHS else 12_000):
        shown = str(getattr(freq, "freqstr", freq))[:40]
        raise ValueError(
            f"unknown frequency {shown!r}; give a count and one of {', '.join(_ALIASES)}, such as "
            "'15min'"
        )
    if unit == "B":
        return "B" if count == 1 else f"{count}B"
    unit = next(u for u in reversed(sizes) if total % sizes[u] == 0)
    count = total // sizes[unit]
    return unit if count == 1 else f"{count}{unit}"


def count_unit(freq: str) -> tuple[int, str]:
    """Count and unit of a canonical step: "15min" -> (15, "min"), "h" -> (1, "h")."""
    count, unit = re.fullmatch(r"(\d*)(\D+)", freq).groups()  # type: ignore[union-attr]
    return int(count or 1), unit


def unit_of(freq: Any) -> str | None:
    """Find the canonical unit of a step, whatever its count: "3MS" -> "M", "?" -> None."""
    _, written = split_freq(freq) or (0, "")
    return _UNITS.get(written)


def microseconds(freq: Any) -> int | None:
    """Measure a fixed step: "1h" -> 3.6e9; None for months, business days and unknown names."""
    count, written = split_freq(freq) or (0, "")
    unit = _UNITS.get(written)
    return count * LENGTHS[unit] if count and unit in LENGTHS else None


def season_of(freq: Any) -> int:
    """Rows in the main season of a step, for MASE and the seasonal naive forecast.

    A day of minutes or hours (15min -> 96, h -> 24), an hour of seconds, a week of days (D -> 7,
    B -> 5), a year of weeks, months or quarters (W -> 52, M -> 12, Q -> 4); 1 where the step does
    not divide it or is under a second.
    """
    whole = {"s": 3600, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 52, "M": 12, "Q": 4, "Y": 1}
    count, unit = count_unit(canonical_freq(freq))
    rows = whole.get(unit, 1)
    return rows // count if rows % count == 0 else 1


# ---- zones ----


def on_wall(freq: str) -> bool:
    """Return whether a canonical step is counted on the clock on the wall: a day and more."""
    return count_unit(freq)[1] in WALL


def to_wall(stamps: np.ndarray, tz: str | None) -> np.ndarray:
    """Convert stamps [T] in UTC to what the clock in zone `tz` shows; as they are without one."""
    if tz is None:
        return stamps
    local = pd.DatetimeIndex(stamps).tz_localize("UTC").tz_convert(tz)
    return local.tz_localize(None).to_numpy().astype("datetime64[us]")


def from_wall(stamps: np.ndarray, tz: str | None) -> np.ndarray:
    """Invert `to_wall`.

    A time that the clock skips is moved on; of one that it shows twice the second is taken.
    """
    if tz is None:
        return stamps
    second = np.zeros(len(stamps), bool)  # not in summer time
    local = pd.DatetimeIndex(stamps).tz_localize(tz, ambiguous=second, nonexistent="shift_forward")
    return local.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")


# ---- days in the month ----


@dataclasses.dataclass(frozen=True)
class DayRule:
    """A day in every month.

    Attributes:
      kind: "day": the `number`-th, or the last day of a shorter month (31: the last of each).
        "weekday": the `number`-th (from 0; -1: the last) of the days in `weekmask`: business days
        or one weekday.
    """

    kind: str
    number: int
    weekmask: str = "1111100"

    def days(self, months: np.ndarray) -> np.ndarray:
        """The day [T] datetime64[D] in months [T] datetime64[M]."""
        after = (months + np.timedelta64(1, "M")).astype("datetime64[D]")
        if self.kind == "day":
            return np.minimum(months.astype("datetime64[D]") + (self.number - 1) * DAY, after - DAY)
        start = after if self.number < 0 else months.astype("datetime64[D]")
        return np.busday_offset(start, self.number, roll="forward", weekmask=self.weekmask)

    def holds(self, stamps: np.ndarray) -> np.ndarray:
        """Mask of the stamps [T] that fall on the day, bool [T]."""
        return self.days(stamps.astype("datetime64[M]")) == stamps.astype("datetime64[D]")


def day_rule(stamps: np.ndarray) -> tuple[DayRule, bool]:
    """Find the day in the month on which the stamps [T] fall, and whether all of them do.

    A number of the day first, the largest that holds for most (02-28, 04-30: the last day); rules
    of weekdays only where they hold for all.
    """
    numbered = [DayRule("day", number) for number in range(31, 0, -1)]
    counts = [int(rule.holds(stamps).sum()) for rule in numbered]
    best = int(np.argmax(counts))
    if counts[best] == len(stamps):
        return numbered[best], True

    first = stamps[0].astype("datetime64[D]")
    weekday = (int(first.astype(np.int64)) + 3) % 7  # Monday is 0
    nth = int((first - first.astype("datetime64[M]").astype("datetime64[D]")) / DAY) // 7
    mask = "".join("1" if day == weekday else "0" for day in range(7))
    others = [
        DayRule("weekday", 0),
        DayRule("weekday", -1),
        DayRule("weekday", nth, mask),
        DayRule("weekday", -1, mask),
    ]
    for rule in others:
        if rule.holds(stamps).all():
            return rule, True
    return numbered[best], False


# ---- grids ----


@dataclasses.dataclass(frozen=True)
class Grid:
    """The regular stamps of a step, placed by some stamps of a series. Stamp 0 is the one nearest
    to the first.

    Attributes:
      freq: canonical step.
      first: stamp 0, datetime64[us].
      rule: the day in the month, for steps of months.
    """

    freq: str
    first: np.datetime64
    rule: DayRule | None = None

    @classmethod
    def through(cls, stamps: np.ndarray, freq: str) -> "Grid":
        """The grid of step `freq` on which most of the stamps [T > 0] lie."""
        stamps = stamps.astype("datetime64[us]")
        _, unit = count_unit(freq)
        length = microseconds(freq)
        if length is not None:
            since = stamps.astype(np.int64)
            phase = _most_frequent(since % length)
            first = round((int(since[0]) - phase) / length) * length + phase
            return cls(freq, np.datetime64(first, "us"))

        days = stamps.astype("datetime64[D]")
        into = np.timedelta64(_most_frequent((stamps - days).astype(np.int64)), "us")
        if unit == "B":
            return cls(
                freq, np.busday_offset(days[0], 0, roll="forward").astype("datetime64[us]") + into
            )
        rule, _ = day_rule(stamps)
        first_day = rule.days(stamps[:1].astype("datetime64[M]"))[0]
        return cls(freq, first_day.astype("datetime64[us]") + into, rule)

    def places(self, stamps: np.ndarray) -> np.ndarray:
        """Place of stamps [T] on the grid, float64 [T]; whole numbers are on it.

        A step of months asks for the month (the quarter, the year) only: the day in it is free.
        """
        return places_from(self.first, stamps, self.freq)

    def stamps(self, places: np.ndarray) -> np.ndarray:
        """Stamps [T] datetime64[us] at whole places [T]."""
        return stamps_from(self.first, places, self.freq, rule=self.rule)


def places_from(first: Any, stamps: np.ndarray, freq: str) -> np.ndarray:
    """Steps from `first` to stamps [T], float64 [T]; whole numbers are on the grid of `first`.

    A step of months asks for the month (the quarter, the year) only: the day in it is free.

    Args:
      first: datetime64[us], one stamp or one for each of `stamps`.
      freq: canonical step.
    """
    count, unit = count_unit(freq)
    length = microseconds(freq)
    if length is not None:
        return (stamps - first).astype(np.int64) / length
    if unit == "B":
        return (
            np.busday_count(first.astype("datetime64[D]"), stamps.astype("datetime64[D]")) / count
        )
    period = _months(stamps) // MONTHS[unit]
    return (period - _months(first) // MONTHS[unit]) / count


def stamps_from(
    first: Any, places: np.ndarray, freq: str, rule: DayRule | None = None
) -> np.ndarray:
    """Stamps datetime64[us] at whole places from `first`; both broadcast against each other.

    Args:
      rule: the day in the month, which steps of months need.
    """
    count, unit = count_unit(freq)
    length = microseconds(freq)
    places = np.asarray(places, np.int64) * count
    if length is not None:
        return first + (places * (length // count)).astype("timedelta64[us]")
    day = first.astype("datetime64[D]")
    into = first - day
    if unit == "B":
        return np.busday_offset(day, places, roll="forward").astype("datetime64[us]") + into
    assert rule is not None
    months = first.astype("datetime64[M]") + (places * MONTHS[unit]).astype("timedelta64[M]")
    return rule.days(months).astype("datetime64[us]") + into


def _months(stamps: Any) -> Any:
    return stamps.astype("datetime64[M]").astype(np.int64)


def _most_frequent(numbers: np.ndarray) -> int:
    """The most frequent of whole numbers, the smallest of those that tie."""
    kinds, counts = np.unique(numbers, return_counts=True)
    return int(kinds[counts.argmax()])


def grid_share(stamps: np.ndarray, freq: str) -> float:
    """Share of a regular grid of step `freq` that stamps [T], in any order, fill: 1 is regular."""
    stamps = np.unique(stamps)
    if len(stamps) < 2:
        return 0.0
    places = Grid.through(stamps, freq).places(stamps)
    whole = np.unique(np.rint(places))
    on_grid = float((np.abs(places - np.rint(places)) < 1e-9).mean())
    return on_grid * len(whole) / max(float(whole[-1] - whole[0] + 1), len(stamps))


def following(stamps: np.ndarray, n: int, freq: str, tz: str | None = None) -> np.ndarray:
    """Continue the grid: the `n` stamps [n] after the last of `stamps` [T > 0], in UTC where there
    is a zone.

    Example: 2019-01-31, 2019-02-28 by "M" -> 2019-03-31, 2019-04-30, ...
    """
    zone = tz if on_wall(freq) else None
    wall = to_wall(stamps.astype("datetime64[us]"), zone)
    length = microseconds(freq)
    if length is not None:
        found = wall[-1] + (np.arange(1, n + 1) * length).astype("timedelta64[us]")
    else:
        grid = Grid.through(wall, freq)
        last = int(np.floor(grid.places(wall[-1:])[0]))
        found = grid.stamps(last + np.arange(1, n + 1))
    return from_wall(found, zone)


# ---- the step of given stamps ----


def infer_freq(stamps: np.ndarray) -> str | None:
    """Infer the canonical step of stamps [T], in any order; None when none stands out.

    In this order: months where every stamp falls on one day of the month; a constant step, exactly
    (from four weeks up also with holes); months by weekdays; business days; the most frequent step.
    """
    stamps = np.unique(stamps.astype("datetime64[us]"))
    steps = np.diff(stamps).astype(np.int64)
    if not steps.size:
        return None
    common = _most_frequent(steps)
    share = float((steps == common).mean())
    days = common / LENGTHS["D"]

    if days >= 28:
        rule, all_on_it = day_rule(stamps)
        months = _most_frequent(np.diff(_months(stamps)))
        if months > 0 and all_on_it and rule.kind == "day":
            return canonical_freq(f"{months}M")
    if share == 1 or (days >= 28 and share >= LEAST_SHARE and not (steps % common).any()):
        return canonical_freq(f"{common}us")
    if days >= 28:
        if months > 0 and all_on_it:
            return canonical_freq(f"{months}M")
        for unit, low, high in (("M", 28, 31), ("Q", 90, 92), ("Y", 365, 366)):
            periods = np.diff(_months(stamps) // MONTHS[unit])
            if low <= days <= high and (periods == 1).mean() >= share:
                return unit
    if (rounded := rounded_step(stamps)) is not None:
        return canonical_freq(f"{rounded}us")
    if share < LEAST_SHARE:
        return None
    if days == 1 and _skips_weekends(stamps):
        return "B"
    return canonical_freq(f"{common}us")


def _skips_weekends(stamps: np.ndarray) -> bool:
    """Return whether sorted stamps [T] step from Friday to Monday and have none on a weekend."""
    days = stamps.astype("datetime64[D]")
    next_business_day = np.busday_count(days[:-1], days[1:]) == 1
    over_a_weekend = next_business_day & (np.diff(days).astype(np.int64) > 1)
    return bool(over_a_weekend.any() and np.is_busday(days).all())


def rounded_step(stamps: np.ndarray) -> int | None:
    """Step in microseconds of sorted stamps [T] that are a constant rate, rounded: 60 Hz in
    milliseconds.

    None where a stamp is off by more than the last place written, and for steps of a second and
    more.
    """
    since = (stamps - stamps[0]).astype(np.int64)
    if len(since) < 4:
        return None
    place = 1000 if (since % 1000 == 0).all() else 1
    step = since[-1] / (len(since) - 1)
    if step >= LENGTHS["s"] or step < 3 * place:
        return None
    off = np.abs(since - np.arange(len(since)) * step)
    return round(step) if off.max() <= place else None
