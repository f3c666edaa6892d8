"""A column of time -> stamps: the layout of written dates, compact numbers, epochs, zones.

A column has ONE layout, the one in which every cell is a date. Where several are, the one decides
whose stamps are regular; where that leaves more than one, nothing is guessed: the problem quotes
both readings and `date_format`.

Shapes: T rows, U different cells.
"""

import dataclasses
import datetime
import functools
import re
import zoneinfo
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ltsm_jax.frequency import grid_share, infer_freq, to_wall

SHOWN = 5  # offending rows or names quoted in a message
MONTH_NAMES = ["january", "february", "march", "april", "may", "june"]
MONTH_NAMES += ["july", "august", "september", "october", "november", "december"]
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
YEARS = (1500, 2200)  # a bare number outside is no year
EPOCHS = {
    10: 10**6,
    13: 1000,
    16: 1,
    19: 1,
}  # digits of seconds, ms, us, ns since 1970 -> microseconds
NAT = np.datetime64("NaT", "D")
HOUR = 3600 * 10**6
NO_DATES = (
    "numbers that are no dates (first: {}); convert it, or take the rows as they come, without "
    "stamps, "
    "by irregular='ignore'"
)

# A cell without its zone: a date, perhaps a time of day after "T", "_", blanks or (SAS) a colon.
_CELL = re.compile(
    r"^(?P<date>.*?)"
    r"(?:(?:[T_]|,?\s+|(?<=\d):)(?P<hour>\d{1,2}):(?P<minute>\d\d)"
    r"(?::(?P<second>\d\d)(?:[.,](?P<part>\d{1,9}))?)?\s*(?P<half>[AaPp]\.?[Mm]\.?)?)?$"
)
_TOKEN = re.compile(r"\d+|[A-Za-z]+\.?|[^A-Za-z\d]+")
_ISO = r"\d{8}T\d{4}(?:\d\d)?|\d{4}-\d\d-\d\d(?:[T ]\d\d(?::\d\d(?::\d\d(?:\.\d{1,9})?)?)?)?"
_ISO_ZONE = r"Z|[+-]\d\d:?\d\d"
_ZONED = r"(?:Z|[+-]\d\d:?\d\d|:\d\d[+-]\d\d|UTC|GMT)$"


@dataclasses.dataclass
class StampReading:
    """One way to read a column.

    Attributes:
      stamps: [T] datetime64[us], NaT where a cell is no date in this layout.
      layout: as `strptime` writes it, for `date_format`; "" where it cannot be asked for.
      rank: 0 before 1: the second is looked at where the first does not read every cell.
      note: what is said of it.
      refusal: why it cannot be used although it reads every cell.
    """

    stamps: np.ndarray
    layout: str = ""
    rank: int = 0
    note: str = ""
    refusal: str = ""


def rows(mask: np.ndarray, cells: Any = None, stamps: np.ndarray | None = None) -> str:
    """Name the first rows where `mask` [T] holds, by number or stamp, with their cells."""
    at = np.flatnonzero(mask)
    more = ", ..." if len(at) > SHOWN else ""
    if stamps is not None:
        return "at " + ", ".join(format_stamp(stamps[i]) for i in at[:SHOWN]) + more
    shown = [f"{i}" if cells is None else f"{i} {str(cells.iloc[i])[:40]!r}" for i in at[:SHOWN]]
    return f"row{'s' if len(at) > 1 else ''} {', '.join(shown)}{more} (counting from 0)"


def format_stamp(stamp: Any) -> str:
    """A stamp without a tail of zeros."""
    return str(pd.Timestamp(stamp))


def is_numeric(column: Any) -> bool:
    """Return whether a column holds numbers that are no truth values."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def is_time(column: Any) -> bool:
    """Return whether a column holds stamps, dates or periods as such, not as text or numbers."""
    if pd.api.types.is_datetime64_any_dtype(column) or isinstance(column.dtype, pd.PeriodDtype):
        return True
    present = column.dropna()
    # np.datetime64 in an object column counts too: some readers leave it there
    return bool(len(present)) and isinstance(present.iloc[0], datetime.date | np.datetime64)


def holds_dates(column: Any) -> bool:
    """Return whether an unnamed column is the time: dates, or text whose first cell is one."""
    if is_time(column):
        return True
    present = column.dropna()
    if is_numeric(column) or not len(present) or not isinstance(present.iloc[0], str):
        return False
    first = present.iloc[:1]
    if re.fullmatch(r"\s*\d{1,7}\s*", first.iloc[0]):
        return False
    if any(not r.refusal and not np.isnat(r.stamps).any() for r in _readings(first)):
        return True
    problems: list[str] = []
    cells, offsets = _without_zone(first, column.name, problems)
    if problems or offsets is None:
        return False
    return any(not r.refusal and not np.isnat(r.stamps).any() for r in _readings(cells))


def counts_rows(column: Any) -> bool:
    """Return whether numbers [T] that are no dates only count the rows: a constant step upwards."""
    if not is_numeric(column) or len(column) < 2 or column.isna().any():
        return False
    steps = np.diff(column.to_numpy(np.float64))
    return bool(steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-6, atol=0))


def parse_stamps(
    column: Any,
    problems: list[str],
    notes: list[str],
    *,
    date_format: str | None = None,
    freq: str | None = None,
) -> tuple[np.ndarray, str | None] | None:
    """Read stamps [T] datetime64[us], in UTC where they have a zone, and the zone's name.

    Args:
      column: of one dtype or of text; `column.name` is quoted.
      date_format: the layout of the dates; a time of day after it is read by itself where it holds
        none.
      freq: the step that decides between layouts, where it is known.

    Returns: None where something is wrong; the reasons go to `problems`.
    """
    name = column.name
    empty = column.isna().to_numpy()
    if empty.any():
        problems.append(f"time column {name!r}: {empty.sum()} empty cells, {rows(empty)}")
        return None
    if is_time(column):
        return _from_objects(column, problems)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    if pd.api.types.is_bool_dtype(column):
        problems.append(f"time column {name!r} holds truth values, no dates")
        return None

    fast = _fast_iso(column) if date_format is None else None
    if fast is not None:
        utc, offsets = fast
        return utc, None if offsets is None else _zone_of_offsets(utc, offsets, name, notes=notes)
    cells = _as_text(column)
    if cells is None:
        first = str(column.iloc[0])[:40]
        problems.append(f"time column {name!r} holds {NO_DATES.format(first)}")
        return None

    if not is_numeric(column):
        before = len(problems)
        cells, offsets = _without_zone(cells, name, problems)
        if len(problems) > before:
            return None
    else:
        offsets = None
    try:
        readings = _formatted(cells, date_format) if date_format else _readings(cells)
    except (ValueError, re.error) as e:
        problems.append(f"date_format={date_format!r} is no layout of dates: {e}")
        return None
    chosen = _choose(readings, cells, column, freq=freq, problems=problems)
    if chosen is None:
        return None
    if chosen.note:
        notes.append(f"{name}: {chosen.note}")
    if offsets is None:
        return chosen.stamps, None
    utc = chosen.stamps - offsets.astype("timedelta64[us]")
    return utc, _zone_of_offsets(utc, offsets, name, notes=notes)


# ---- stamps as such ----


def _from_objects(column: Any, problems: list[str]) -> tuple[np.ndarray, str | None] | None:
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    try:
        index = pd.DatetimeIndex(pd.to_datetime(column))
    except (ValueError, TypeError):  # several zones, or with and without one
        zoned = [getattr(cell, "tzinfo", None) is not None for cell in column]
        if not all(zoned):
            problems.append(
                f"time column {column.name!r}: some stamps have a zone and some have none"
            )
            return None
        offsets = np.array([cell.utcoffset() for cell in column], "timedelta64[us]").astype(
            np.int64
        )
        utc = pd.to_datetime(column, utc=True).dt.tz_localize(None)
        utc = utc.to_numpy().astype("datetime64[us]")
        return utc, _zone_of_offsets(utc, offsets, column.name, notes=[])
    if index.tz is None:
        return index.to_numpy().astype("datetime64[us]"), None
    utc = index.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")
    return utc, _zone_name(index)


def _zone_name(index: pd.DatetimeIndex) -> str:
    """A name by which pandas finds the zone of the stamps again: its own, else its last offset."""
    name = str(index.tz)
    try:
        pd.Timestamp(0, tz=name)
        return name
    except (KeyError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        last: Any = index[-1]
        offset = last.utcoffset() or datetime.timedelta(0)
        return _offset_name(int(offset.total_seconds()) * 10**6)


def _offset_name(offset: int) -> str:
    """Microseconds east of Greenwich -> "UTC+02:00"."""
    minutes = abs(offset) // (60 * 10**6)
    if not minutes:
        return "UTC"
    return f"UTC{'-' if offset < 0 else '+'}{minutes // 60:02}:{minutes % 60:02}"


def _zone_of_offsets(utc: np.ndarray, offsets: np.ndarray, name: Any, notes: list[str]) -> str:
    """The zone of written offsets [T] microseconds: one offset, or the zone whose clocks change
    like that."""
    if (offsets == offsets[0]).all():
        zone = _offset_name(int(offsets[0]))
        notes.append(f"stamps of {name!r} have the offset {zone}")
        return zone
    order = np.argsort(utc, kind="stable")
    utc, offsets = utc[order], offsets[order]
    change = np.flatnonzero(np.diff(offsets))
    asked = np.unique(np.concatenate([[0, len(utc) - 1], change[:100], change[:100] + 1]))
    usual = ("Europe/Berlin", "Europe/London", "America/New_York", "America/Chicago")
    usual += ("America/Denver", "America/Los_Angeles", "Australia/Sydney")
    # Names of a region and a place: the others are old, or not known to every release of pandas.
    places = [zone for zone in sorted(zoneinfo.available_timezones()) if "/" in zone]
    for zone in (*usual, *places):
        likely = np.array_equal(
            (to_wall(utc[asked], zone) - utc[asked]).astype(np.int64), offsets[asked]
        )
        if likely and np.array_equal((to_wall(utc, zone) - utc).astype(np.int64), offsets):
            notes.append(
                f"the UTC offsets of {name!r} change as in {zone}, which is taken for the zone"
            )
            return zone
    notes.append(
        f"the offsets of {name!r} change as in no known zone: its stamps are converted to UTC"
    )
    return "UTC"


# ---- text and numbers ----


def _fast_iso(column: Any) -> tuple[np.ndarray, np.ndarray | None] | None:
    """(stamps [T], UTC where there are offsets, offsets [T] or None) of plain ISO dates, nearly all
    there are.

    None for a column of anything else.
    """
    first = column.iloc[0] if len(column) else None
    match = (
        re.fullmatch(f"({_ISO})({_ISO_ZONE})?", first.strip()) if isinstance(first, str) else None
    )
    if match is None:
        return None
    cells = column.str.strip()
    offsets = None
    if match[2]:
        # The zone as the last characters: a slice is ten times as quick as a pattern.
        codes, kinds = pd.factorize(cells.str.slice(-len(match[2])))
        if not all(re.fullmatch(_ISO_ZONE, kind) for kind in kinds):
            return None
        offsets = np.array([_offset(kind) for kind in kinds], np.int64)[codes]
    elif cells.str.contains(_ZONED).any():
        return None
    try:
        stamps = pd.to_datetime(cells, format="ISO8601", errors="coerce", utc=offsets is not None)
    except (ValueError, TypeError):
        return None
    if stamps.isna().any() or not pd.api.types.is_datetime64_any_dtype(stamps):
        return None
    if offsets is not None:
        stamps = stamps.dt.tz_localize(None)
    return stamps.to_numpy().astype("datetime64[us]"), offsets


def _as_text(column: Any) -> Any:
    """Cells as text [T]; whole numbers without a fraction, None for numbers that no date is written
    as."""
    if not is_numeric(column):
        return column.astype(str).str.strip()
    number = column.to_numpy(np.float64, na_value=np.nan)
    if pd.api.types.is_integer_dtype(column):
        text = column.astype("int64").astype(str)
    elif (
        np.isfinite(number).all()
        and (number == np.rint(number)).all()
        and abs(number).max() < 2**53
    ):
        text = pd.Series(number.astype(np.int64).astype(str), index=column.index)
    elif number.min() > 1e8 and number.max() < 1e11:  # seconds with a fraction
        return pd.Series([f"{cell:.6f}" for cell in number], index=column.index)
    else:
        return None
    digits = text.str.len()
    known = digits.isin([4, 6, 7, 8, 10, 12, 14, *EPOCHS])
    return text if known.all() and digits.max() - digits.min() <= 1 and number.min() > 0 else None


def _without_zone(cells: Any, name: Any, problems: list[str]) -> tuple[Any, np.ndarray | None]:
    """(cells without their zones, offsets [T] microseconds east, or None where there are none)."""
    zoned = cells.str.contains(_ZONED)
    if not zoned.any():
        return cells, None
    found = cells.str.extract(
        r"^(?P<rest>.*?)\s*(?P<zone>Z|UTC|GMT|(?<=[\d\s])[+-]\d\d:\d\d|(?<=:\d\d)[+-]\d\d(?:\d\d)?"
        r"|(?<=:\d\d\.\d{3})[+-]\d{4}|(?<=\d\s)[+-]\d{4})?$"
    )
    with_zone = found["zone"].notna().to_numpy()
    if not with_zone.any():  # such as 01-01-2024, whose year looks like an offset
        return cells, None
    if not with_zone.all():
        odd = ~with_zone if with_zone.mean() > 0.5 else with_zone
        kind = (
            "no zone, the others have one" if with_zone.mean() > 0.5 else "a zone, the others none"
        )
        problems.append(f"time column {name!r}: {odd.sum()} cells have {kind}, {rows(odd, cells)}")
        return cells, None
    codes, kinds = pd.factorize(found["zone"])
    return found["rest"], np.array([_offset(kind) for kind in kinds], np.int64)[codes]


def _offset(zone: str) -> int:
    """ "+02:00", "-0530", "+02", "Z" -> microseconds east of Greenwich."""
    digits = re.sub(r"\D", "", zone)
    if not digits:
        return 0
    size = int(digits[:2]) * 60 + int(digits[2:4] or 0)
    return (-size if zone.startswith("-") else size) * 60 * 10**6


def _choose(
    readings: list[StampReading], cells: Any, column: Any, freq: str | None, problems: list[str]
) -> StampReading | None:
    """The one reading that holds; what is wrong or undecided goes to `problems`."""
    name = column.name
    whole = [r for r in readings if not np.isnat(r.stamps).any()]
    lowest = min((r.rank for r in whole), default=0)
    whole = [r for r in whole if r.rank == lowest]
    if not whole and is_numeric(column):
        problems.append(f"time column {name!r} holds {NO_DATES.format(cells.iloc[0])}")
        return None
    if not whole:
        best = min(readings, key=lambda r: int(np.isnat(r.stamps).sum()), default=None)
        unread = np.isnat(best.stamps) if best else np.ones(len(cells), bool)
        like = (
            "" if unread.all() else f"; the others are written like {cells[~unread].iloc[0][:40]!r}"
        )
        problems.append(
            f"time column {name!r}: {unread.sum()} cells are no dates, {rows(unread, cells)}{like}"
        )
        return None

    different: list[StampReading] = []
    for reading in whole:
        if not any(np.array_equal(reading.stamps, other.stamps) for other in different):
            different.append(reading)
    if len(different) > 1:
        fills = [_fill(reading.stamps, freq) for reading in different]
        likely = [
            r for r, fill in zip(different, fills, strict=True) if fill > max(0.8 * max(fills), 0.5)
        ]
        different = likely or different
    if len(different) > 1:
        problems.append(_both(different[:3], cells, name))
        return None
    if different[0].refusal:
        problems.append(f"time column {name!r}: {different[0].refusal}")
        return None
    return different[0]


def _fill(stamps: np.ndarray, freq: str | None) -> float:
    """Share of the regular grid that stamps [T] fill: 1 is regular, 0 has no step."""
    freq = freq or infer_freq(stamps)
    return 0.0 if freq is None else grid_share(stamps, freq)


def _both(readings: list[StampReading], cells: Any, name: Any) -> str:
    """Two readings or three of one cell on which they differ, each with how to ask for it."""
    differ = np.zeros(len(cells), bool)
    for reading in readings[1:]:
        differ |= reading.stamps != readings[0].stamps
    row = int(differ.argmax())
    shown = []
    for reading in readings:
        step = infer_freq(reading.stamps)
        facts = [f"date_format={reading.layout!r}"] if reading.layout else []
        facts += [] if not reading.refusal else ["a date without a year"]
        facts += [f"a step of {step}"] if step else []
        date = "" if reading.refusal else f"{format_stamp(reading.stamps[row])} "
        shown.append(f"{date}({', '.join(facts)})")
    return (
        f"time column {name!r} can be read in {len(readings)} ways: row {row} "
        f"{cells.iloc[row][:40]!r} is " + " or ".join(shown) + "; say which with date_format="
    )


def _formatted(cells: Any, date_format: str) -> list[StampReading]:
    """The cells in the layout that was asked for; a time of day is read by itself where the layout
    has none."""
    date_format = re.sub(r"\s*%[zZ]$", "", date_format)  # zones have been read and taken off
    parts = _parts(cells)
    if parts is None or re.search(r"%[HIMSfpTcX]", date_format) or date_format == "ISO8601":
        return [StampReading(_strptime(cells, date_format), date_format)]
    dates, into = parts
    return [StampReading(_strptime(dates, date_format) + into, date_format)]


def _strptime(cells: Any, layout: str) -> np.ndarray:
    """[T] datetime64[us] of text in a layout, NaT where it does not fit."""
    codes, kinds = pd.factorize(cells)
    kinds = pd.Series(kinds, dtype=object)
    stamps = pd.to_datetime(kinds, format=layout, errors="coerce")
    if stamps.isna().any():  # names of months at another length
        layout = layout.replace("%B", "%b")
        stamps = pd.to_datetime(kinds.map(_short_months), format=layout, errors="coerce")
    return stamps.to_numpy().astype("datetime64[us]")[codes]


def _short_months(text: str) -> str:
    return re.sub(
        r"[A-Za-z]{3,}\.?", lambda word: word[0][:3] if _month(word[0]) else word[0], text
    )


@functools.lru_cache(maxsize=1024)
def _month(word: str) -> int:
    """Number of the month with this English name or a beginning of it; 0 for any other word."""
    word = word.strip(".").casefold()
    if word == "sept":
        return 9
    found = [i for i, name in enumerate(MONTH_NAMES, 1) if len(word) >= 3 and name.startswith(word)]
    return found[0] if found else 0


def _parts(cells: Any) -> tuple[Any, np.ndarray] | None:
    """(dates as text [T], time of day [T] timedelta64[us]); None where no cell has a time of
    day."""
    if not cells.str.contains(":", regex=False).any():
        return None
    found = cells.str.extract(_CELL)
    hour = _floats(found["hour"])
    minute = np.nan_to_num(_floats(found["minute"]))
    second = np.nan_to_num(_floats(found["second"]))
    part = np.nan_to_num(_floats(found["part"].str.slice(0, 6).str.ljust(6, "0")))
    half = found["half"].str[0].str.upper()
    twelve = half.notna().to_numpy()
    wrong = (
        (minute > 59) | (second > 59) | (hour > 24) | ((hour == 24) & (minute + second + part > 0))
    )
    wrong |= twelve & ((hour < 1) | (hour > 12))
    hour = np.where(twelve, hour % 12 + 12 * (half == "P").to_numpy(), hour)
    into = np.nan_to_num(hour) * HOUR + minute * 60e6 + second * 1e6 + part
    into = into.astype(np.int64).astype("timedelta64[us]")
    into[wrong] = np.timedelta64("NaT", "us")
    return found["date"].str.strip().str.rstrip(","), into


def _floats(digits: Any) -> np.ndarray:
    """[T] float64 of text of digits, NaN where there is none."""
    number: Any = pd.to_numeric(digits)
    return number.to_numpy(np.float64, na_value=np.nan)


def _readings(cells: Any) -> list[StampReading]:
    """Every layout in which the cells [T] of text without zones may be written."""
    parts = _parts(cells)
    dates, into = (cells, np.zeros(1, "timedelta64[us]")) if parts is None else parts
    codes, kinds = pd.factorize(dates)
    tokens = [_without_weekday(_TOKEN.findall(kind)) for kind in kinds]
    shapes = [_shape(words) for words in tokens]
    if not shapes:
        return []
    # One layout for a column: that of most cells. Others are no dates in it.
    shape = max(dict.fromkeys(shapes), key=shapes.count)
    like = [i for i, other in enumerate(shapes) if other == shape]
    first = kinds[like[0]]
    weekday = first[: len(first) - len("".join(tokens[like[0]]))]
    weekday = re.sub(r"[A-Za-z]+", lambda word: "%a" if len(word[0]) == 3 else "%A", weekday)

    found = []
    for reading in _layouts([tokens[i] for i in like], bare=parts is None):
        stamps = np.full(len(kinds), NAT, "datetime64[us]")
        stamps[like] = reading.stamps
        reading.stamps = stamps[codes] + into
        reading.layout = reading.layout and weekday + reading.layout
        found.append(reading)
    return found


def _without_weekday(words: list[str]) -> list[str]:
    """The tokens of a date without the name of the day in front."""
    word = words[0].strip(".").casefold() if words else ""
    if len(word) >= 3 and any(day.startswith(word) for day in WEEKDAYS):
        return words[2:]
    return words


def _shape(words: list[str]) -> tuple[str, ...]:
    """Describe the tokens of a date: numbers "0", months "Jan", other words and separators as they
    are.
    """
    return tuple("0" if w.isdigit() else "Jan" if _month(w) else w for w in words)


# ---- layouts ----


def _column(words: list[list[str]], i: int) -> list[str]:
    """Token i of every cell."""
    return [cell[i] for cell in words]


def _layouts(words: list[list[str]], bare: bool) -> Iterator[StampReading]:
    """Every layout of dates [U], given as tokens of one shape. `bare`: there is no time of day
    beside them."""
    shape = _shape(words[0])
    fields = [i for i, kind in enumerate(shape) if kind in ("0", "Jan")]
    texts = [_column(words, i) for i in fields]
    kinds = "".join("0" if shape[i] == "0" else "J" for i in fields)
    lengths = [set(map(len, column)) for column in texts]
    letters = [i for i, kind in enumerate(shape) if kind[0].isalpha() and kind != "Jan"]
    if not fields or any(max(size) > 19 for size in lengths):
        return
    if letters:
        yield from _lettered(words, shape, letters)
        return
    if kinds == "0":
        yield from _compact(words, bare)
        return
    if kinds == "00" and shape[1] == "." and bare and lengths[0] == {10}:
        since = [int(a) * 10**6 + int(b.ljust(6, "0")[:6]) for a, b in zip(*texts, strict=True)]
        yield StampReading(np.array(since, "datetime64[us]"))
        return
    for roles, rank in _roles(kinds, lengths):
        yield _reading(words, fields, roles, rank=rank)


def _roles(kinds: str, lengths: list[set[int]]) -> list[tuple[str, int]]:
    """(what each field may be, rank) by the kinds of the fields and their numbers of digits.

    Y and y are a year of four digits or two, m and b a month as number or name, d a day, j a day of
    the year.
    """
    four = [size == {4} for size in lengths]
    two = [size == {2} for size in lengths]
    short = [max(size) <= 2 for size in lengths]
    if kinds == "000":
        if four[0]:
            return [("Ymd", 0)]
        if four[2]:
            return [("dmY", 0), ("mdY", 0)]
        years = [("dmy", two[2]), ("mdy", two[2]), ("ymd", two[0])]
        return [(roles, 0) for roles, fits in years if fits and all(short)]
    if kinds == "00":
        if four[0]:
            return [("Yj", 0)] if lengths[1] == {3} else [("Ym", 0)]
        if four[1]:
            return [("mY", 0)]
        years = [("my", two[1]), ("ym", two[0]), ("dm", True), ("md", True)]
        return [(roles, 0) for roles, fits in years if fits and all(short)]
    if kinds == "0J0":
        return [("Ybd", 0)] if four[0] else [("dbY", 0)] if four[2] else [("dby", 0)] * two[2]
    if kinds == "J00":
        return [("bdY", 0)] if four[2] else [("bdy", 0)] * two[2]
    if kinds == "0J":
        return [("Yb", 0)] if four[0] else [("yb", 0)] * two[0] + [("db", 0)]
    if kinds == "J0":
        # "Jan-24" is a month of a year; the 24th of January is looked at only where no year fits.
        return [("bY", 0)] if four[1] else [("by", 0)] * two[1] + [("bd", 1)]
    return []


def _reading(words: list[list[str]], fields: list[int], roles: str, rank: int) -> StampReading:
    """Dates [U] whose `fields`, places among the tokens, have these roles."""
    parts: dict[str, np.ndarray] = {}
    layout = list(words[0])
    for i, role in zip(fields, roles, strict=True):
        column = [cell[i] for cell in words]
        if role == "b":
            parts["m"] = np.array([_month(text) for text in column])
            layout[i] = "%b" if len(words[0][i]) == 3 else "%B"
        else:
            parts[role] = np.array([int(text) for text in column], np.int64)
            layout[i] = f"%{role}"
    stamps, note = _dates(parts)
    refusal = ""
    if "y" not in parts and "Y" not in parts:
        refusal = f"its dates have no year (first: {''.join(words[0])!r}); write the year too"
        layout = []
    return StampReading(
        stamps=stamps, layout="".join(layout), rank=rank, note=note, refusal=refusal
    )


def _dates(
    parts: dict[str, np.ndarray], years: tuple[int, int] = (1000, 2999)
) -> tuple[np.ndarray, str]:
    """(dates [U] datetime64[us] of years, months and days; NaT where there is no such date, what to
    say of them)."""
    count = len(next(iter(parts.values())))
    note = ""
    if "y" in parts:
        year = parts["y"] + np.where(parts["y"] < 69, 2000, 1900)
        note = f"years of two digits are read as {year.min()} to {year.max()}"
    else:
        year = parts.get("Y", np.full(count, 2000))  # without a year: a leap year
    month = parts.get("m", np.ones(count, np.int64))
    day = parts.get("j", parts.get("d", np.ones(count, np.int64)))
    good = (year >= years[0]) & (year <= years[1]) & (month >= 1) & (month <= 12) & (day >= 1)

    year, month, day = (np.where(good, part, 1) for part in (year, month, day))
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    dates = months.astype("datetime64[D]") + (day - 1).astype("timedelta64[D]")
    unit = "datetime64[Y]" if "j" in parts else "datetime64[M]"
    good &= dates.astype(unit) == months.astype(unit)
    return np.where(good, dates, NAT).astype("datetime64[us]"), note


def _compact(words: list[list[str]], bare: bool) -> Iterator[StampReading]:
    """Dates [U] of digits alone: 2024, 202401, 20240131, 2024013123, seconds since 1970, ..."""
    texts = [cell[0] for cell in words]
    lengths = {len(text) for text in texts}
    if lengths == {7, 8}:  # a first zero was lost: 1012024
        texts = [text.zfill(8) for text in texts]
        lengths = {8}
        layouts = [("dmY", 0), ("mdY", 0)]
    elif len(lengths) > 1:
        return
    else:
        layouts = {
            4: [("Y", 0)],
            6: [("Ym", 0), ("ymd", 0), ("dmy", 1), ("mdy", 1)],
            7: [("Yj", 0)],
            8: [("Ymd", 0), ("dmY", 1), ("mdY", 1)],
            10: [("YmdH", 0)],
            12: [("YmdHM", 0)],
            14: [("YmdHMS", 0)],
        }.get(lengths.pop(), [])
    sizes = {"Y": 4, "j": 3}
    for roles, rank in layouts:
        if not bare and "H" in roles:
            continue
        parts, start = {}, 0
        for role in roles:
            stop = start + sizes.get(role, 2)
            parts[role] = np.array([int(text[start:stop]) for text in texts], np.int64)
            start = stop
        # A calendar of digits goes before seconds since 1970, which are no date by chance only.
        stamps, note = _dates(parts, YEARS)
        for role, most, length in (("H", 24, HOUR), ("M", 59, HOUR // 60), ("S", 59, 10**6)):
            if role in parts:
                stamps = stamps + (parts[role] * length).astype("timedelta64[us]")
                stamps[parts[role] > most] = NAT
        yield StampReading(
            stamps=stamps, layout="".join(f"%{role}" for role in roles), rank=rank, note=note
        )
    size = len(texts[0])
    if bare and size in EPOCHS:
        number = np.array([int(text) for text in texts], object)
        since = [n // 1000 if size == 19 else n * EPOCHS[size] for n in number]
        if max(since) < 2**62:
            yield StampReading(np.array(since, np.int64).astype("datetime64[us]"), rank=2)


def _lettered(
    words: list[list[str]], shape: tuple[str, ...], letters: list[int]
) -> Iterator[StampReading]:
    """Quarters, months and weeks by letter, dates [U]: 2024Q1, 2024-Q1, Q1 2024, 1Q2024, 2024M01,
    2024-W05-1."""
    letter = shape[letters[0]].upper()
    numbers = [i for i, kind in enumerate(shape) if kind == "0"]
    if (
        len(letters) > 1
        or letter not in ("Q", "M", "W")
        or not 2 <= len(numbers) <= 2 + (letter == "W")
    ):
        return
    at = letters[0]
    # The number right behind the letter, else right before it.
    before = at - 1 in numbers and len(words[0][at - 1]) == 1
    own = at - 1 if before or at + 1 not in numbers else at + 1
    others = [i for i in numbers if i != own]
    columns = {i: np.array(list(map(int, _column(words, i))), np.int64) for i in numbers}
    year, count = columns[others[0]], columns.get(own)
    if count is None or {len(cell[others[0]]) for cell in words} != {4}:
        return
    if letter == "W":
        weekday = columns[others[1]] if len(others) > 1 else np.ones(len(words), np.int64)
        fourth, _ = _dates({"Y": year, "d": np.full(len(words), 4)})  # January 4th is in week 1
        days = fourth.astype("datetime64[D]")
        monday = days - ((days.astype(np.int64) + 3) % 7).astype("timedelta64[D]")
        dates = monday + ((count - 1) * 7 + weekday - 1).astype("timedelta64[D]")
        good = (count >= 1) & (count <= 53) & (weekday >= 1) & (weekday <= 7)
        yield StampReading(np.where(good, dates, NAT).astype("datetime64[us]"))
        return
    good = (count >= 1) & (count <= 4) if letter == "Q" else np.ones(len(words), bool)
    month = (count - 1) * 3 + 1 if letter == "Q" else count
    stamps, _ = _dates({"Y": year, "m": month})
    stamps[~good] = NAT
    yield StampReading(stamps)
