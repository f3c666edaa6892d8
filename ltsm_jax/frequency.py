"""Steps in time: their names, the step of given stamps, the grid of a step.

Shapes: T stamps.
"""

import re

import numpy as np

SECONDS = {"s": 1, "min": 60, "h": 3600, "D": 86400, "W": 7 * 86400}
MONTHS = {"M": 1, "Q": 3, "Y": 12}
_ALIASES = {  # of pandas 1, 2 and 3 and of common speech; where case tells M from min it is kept
    "s": "s S sec second seconds",
    "min": "min T t m minute minutes minutely",
    "h": "h H hour hours hourly",
    "D": "D d day days daily",
    "B": "B b bday business",
    "W": "W w week weeks weekly",
    "M": "M MS ME month months monthly",
    "Q": "Q QS QE q quarter quarters quarterly",
    "Y": "Y y A a YS YE AS year years yearly annual",
}
_UNITS = {alias: unit for unit, aliases in _ALIASES.items() for alias in aliases.split()}


def canonical_freq(freq: str) -> str:
    """The one name of a step: "H", "1h" and "60min" -> "h", "15T" -> "15min", "MS" -> "M", "W-SUN" -> "W".

    Raises: ValueError for a step that is none of them.
    """
    match = re.fullmatch(r"\s*(\d*)\s*([A-Za-z]+)(-[A-Za-z]{3})?\s*", freq)
    unit = _UNITS.get(match[2]) if match else None
    count = int(match[1] or 1) if match else 0
    if unit is None or count < 1:
        raise ValueError(f"unknown frequency {freq!r}; give a count and one of {', '.join(_ALIASES)}, such as '15min'")
    size, units = (MONTHS, ("Y", "Q", "M")) if unit in MONTHS else (SECONDS, ("W", "D", "h", "min", "s"))
    if unit != "B":  # the largest unit that divides it
        total = count * size[unit]
        unit = next(u for u in units if total % size[u] == 0)
        count = total // size[unit]
    return unit if count == 1 else f"{count}{unit}"


def season_of(freq: str) -> int:
    """Rows in the main season of a step, for MASE and the seasonal naive forecast.

    A day of minutes or hours (15min -> 96, h -> 24), an hour of seconds, a week of days (D -> 7, B -> 5), a year of
    weeks, months or quarters (W -> 52, M -> 12, Q -> 4); 1 where the step does not divide it.
    """
    count, unit = count_unit(canonical_freq(freq))
    whole = {"s": 3600, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 52, "M": 12, "Q": 4, "Y": 1}[unit]
    return whole // count if whole % count == 0 else 1


def count_unit(freq: str) -> tuple[int, str]:
    """Count and unit of a canonical step: "15min" -> (15, "min"), "h" -> (1, "h")."""
    count, unit = re.fullmatch(r"(\d*)(\D+)", freq).groups()  # type: ignore[union-attr]
    return int(count or 1), unit


def infer_freq(stamps: np.ndarray) -> str | None:
    """Canonical step of stamps [T] datetime64: the most frequent distance; None when none stands out."""
    stamps = np.unique(stamps.astype("datetime64[us]"))
    steps = np.diff(stamps).astype(np.int64)
    if not steps.size:
        return None
    kinds, counts = np.unique(steps, return_counts=True)
    seconds, rest = divmod(int(kinds[counts.argmax()]), 10**6)
    share = counts.max() / steps.size
    for unit, low, high in (("M", 28, 31), ("Q", 90, 92), ("Y", 365, 366)):
        if low <= seconds / 86400 <= high and (np.diff(places(stamps, unit)) == 1).mean() >= share:
            return unit
    if rest or not seconds or share < 0.25:  # under a second, or jitter
        return None
    weekdays = (stamps.astype("datetime64[D]").astype(np.int64) + 3) % 7  # Monday is 0
    if seconds == 86400 and len(stamps) > 7 and weekdays.max() < 5:
        return "B"
    return canonical_freq(f"{seconds}s")


def places(stamps: np.ndarray, freq: str) -> np.ndarray:
    """Place of each stamp on the grid of step `freq` from stamps[0], float64 [T]; whole numbers are on the grid."""
    count, unit = count_unit(freq)
    if unit in MONTHS:
        place = stamps.astype("datetime64[M]").astype(np.int64) / MONTHS[unit]
        return (np.floor(place) - np.floor(place[0])) / count
    if unit == "B":
        days = stamps.astype("datetime64[D]")
        return np.busday_count(days[0], days) / count
    return (stamps - stamps[0]).astype(np.int64) / (count * SECONDS[unit] * 10**6)


def grid(first: np.datetime64, n: int, freq: str) -> np.ndarray:
    """Stamps [n] datetime64[us] of the grid that starts at `first`; months keep its day where they have it."""
    count, unit = count_unit(freq)
    k = np.arange(n) * count
    if unit in MONTHS:
        start = first.astype("datetime64[M]")
        month = start + (k * MONTHS[unit]).astype("timedelta64[M]")
        into = first - start.astype("datetime64[us]")
        last = (month + np.timedelta64(1, "M")).astype("datetime64[D]") - np.timedelta64(1, "D")
        day = np.minimum(month.astype("datetime64[D]") + into.astype("timedelta64[D]"), last)
        return day.astype("datetime64[us]") + into % np.timedelta64(1, "D")
    if unit == "B":
        day = first.astype("datetime64[D]")
        return np.busday_offset(day, k, roll="forward").astype("datetime64[us]") + (first - day)
    return first + (k * SECONDS[unit]).astype("timedelta64[s]")
