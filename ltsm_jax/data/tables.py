"""Files and frames in: CSV, parquet or DataFrame -> `Series`, checked at the border.

Whatever is wrong with a source is collected and raised as one `DataError` that says what, where and what to do;
nothing is dropped, filled, sorted or cast without being asked for, and what was asked for and done stands in
`Series.notes`.

Shapes: C variates, T rows.
"""

import csv
import dataclasses
import datetime
import difflib
import gzip
import io
import itertools
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from ltsm_jax.data.series import DataError, Series
from ltsm_jax.frequency import SECONDS, canonical_freq, count_unit, grid, infer_freq, places

TIME_NAMES = ("date", "time", "timestamp", "ds", "datetime")
_PANDAS = tuple(int(part) for part in pd.__version__.split(".")[:2])
# Decimal text to the nearest float64: the default since pandas 3.1, asked for before
_EXACT: dict[str, Any] = {} if _PANDAS >= (3, 1) else {"float_precision": "round_trip"}
SHOWN = 5  # offending rows or names quoted in a message


MISSING = ("error", "interpolate", "keep")
IRREGULAR = ("error", "regularise", "ignore")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How a table is read; the keywords of `read_series`, and of whatever passes them on.

    Attributes:
      target: the column(s) to read; by default every column but those of time and id.
      time: the column of stamps; by default the one called date, time, timestamp, ds or datetime (case aside), else the
        first column when it holds dates. Without one the rows are taken as the grid.
      id: for a long table, the column that tells the series apart: each id becomes a variate (with several targets
        "id/target"). All ids must share one grid.
      freq: step of the grid; by default the most frequent distance of the stamps.
      date_format: layout of the dates as `strptime` writes it ("%d/%m/%Y"); by default the one that fits.
      missing: "error" refuses empty, NaN and infinite cells; "interpolate" fills them linearly in time, and at
        the ends with the nearest value; "keep" leaves empty cells NaN (infinite ones are refused).
      irregular: "error" refuses stamps that are unsorted, repeated or off the grid; "regularise" sorts, moves each row
        to the nearest grid stamp, averages rows that meet there and leaves holes to `missing`; "ignore" takes the rows
        as they are. None is "error", but for a benchmark asked for by name, whose rows are read as they come.
      name: what reports call the series; by default the file's name.

    Example: `read_series("sales.csv", **vars(ReadingOptions(target="sold")))`
    Raises: ValueError for a value that is none of those listed.
    """

    target: str | Sequence[str] | None = None
    time: str | None = None
    id: str | None = None
    freq: str | None = None
    date_format: str | None = None
    missing: Literal["error", "interpolate", "keep"] = "error"
    irregular: Literal["error", "regularise", "ignore"] | None = None
    name: str | None = None

    def __post_init__(self):
        for option, allowed in (("missing", MISSING), ("irregular", IRREGULAR)):
            value = getattr(self, option)
            if value not in allowed and not (option == "irregular" and value is None):
                raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
        if self.freq:
            object.__setattr__(self, "freq", canonical_freq(self.freq))


def read_series(
    source: str | os.PathLike | pd.DataFrame,
    *,
    target: str | Sequence[str] | None = None,
    time: str | None = None,
    id: str | None = None,
    freq: str | None = None,
    date_format: str | None = None,
    missing: Literal["error", "interpolate", "keep"] = "error",
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
) -> Series:
    """Read one multivariate series from a .csv, .csv.gz or .parquet file or a DataFrame, strictly.

    The options are described in `ReadingOptions`, field by field.

    Raises: DataError (a ValueError) with every problem found; FileNotFoundError when there is no such file.
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
    freq, irregular = how.freq, how.irregular or "error"
    name = name or ("data" if isinstance(source, pd.DataFrame) else stem(Path(source)))
    table = source if isinstance(source, pd.DataFrame) else read_table(Path(source))
    if isinstance(table.index, pd.PeriodIndex):
        table = table.set_index(table.index.to_timestamp())
    dated = isinstance(table.index, pd.DatetimeIndex)
    if dated:
        table = table.rename_axis(table.index.name or "timestamp")
        if table.index.name in table.columns:
            raise DataError(f"{name}: {table.index.name!r} names both the index and a column; drop one of them")
    table = table.reset_index(drop=not dated)

    problems: list[str] = []
    notes: list[str] = []
    _check_shape(table, problems)
    _raise(name, problems)
    time_column, targets = _choose_columns(table, target, time, id, problems)
    stamps = None
    if time_column is not None:
        stamps = _parse_stamps(table[time_column], date_format, problems, notes)
    if id is not None and id in table.columns:
        table, stamps, targets = _spread(table, stamps, id, targets, irregular == "regularise", problems)
    values = np.array([_numbers(table[column], column, problems) for column in targets]).reshape(
        len(targets), len(table)
    )
    if stamps is not None:
        freq = freq or infer_freq(stamps)
        if irregular == "error":
            _check_grid(stamps, freq, problems)
        elif irregular == "regularise" and (regular := _regularise(stamps, values, freq, problems, notes)):
            stamps, values = regular
    at = stamps if irregular == "regularise" else None  # rows of the grid are not those of the file
    values = _handle_missing(values, targets, at, missing, problems, notes)
    _raise(name, problems)
    return Series(name, values, tuple(map(str, targets)), stamps, freq, notes=tuple(notes))


def _raise(name: str, problems: list[str]) -> None:
    if problems:
        raise DataError(f"{name} cannot be used as it is:\n  " + "\n  ".join(problems))


def stem(path: Path) -> str:
    """The file's name without the endings of data files: "my.data.csv.gz" -> "my.data"."""
    return re.sub(r"(\.(csv|txt|npz|parquet|pq|gz))+$", "", path.name, flags=re.IGNORECASE)


def read_table(path: Path, header: bool = True) -> pd.DataFrame:
    """The file as a table, nothing guessed beyond numbers and text. Without `header` columns are called 0, 1, ..."""
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}" + (" (it is a folder)" if path.is_dir() else ""))
    if path.name.lower().endswith((".parquet", ".pq")):
        try:
            return pd.read_parquet(path, engine="pyarrow")
        except (ValueError, OSError) as e:  # pyarrow's ArrowInvalid is a ValueError
            raise DataError(f"{path}: not a readable parquet file ({e})") from e
    if not path.name.lower().endswith((".csv", ".csv.gz", ".txt", ".txt.gz")):
        raise DataError(f"{path}: cannot tell what this is; .csv, .csv.gz and .parquet are read")
    text = _read_text(path).lstrip("\r\n")
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    rows = io.StringIO(text)
    try:
        names = [cell.strip() for cell in next(csv.reader(rows))]
        if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
            raise DataError(f"{path}: cells are separated by {other!r}; save the file with commas")
        if header and _looks_like_values(names):
            raise DataError(f"{path}: the first line holds values ({', '.join(names[:3])}, ...), not column names")
        if not header:
            rows.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a longer row would lose its last cells
            table = pd.read_csv(
                rows,
                header=None,
                names=range(len(names)),
                index_col=False,
                low_memory=False,
                **_EXACT,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error) as e:
        raise DataError(
            f"{path}: rows of different lengths ({str(e).strip()}); the header has {len(names)} names"
        ) from e
    if not len(table):
        raise DataError(f"{path}: only a header line, no rows")
    table.columns = names if header else [str(i) for i in range(len(names))]
    return table


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as e:
            raise DataError(f"{path}: the gzip file is cut or damaged ({e})") from e
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise DataError(
            f"{path}: not UTF-8 text (line {line}, byte 0x{data[e.start]:02x}); save it as UTF-8, "
            "or pass the DataFrame of pandas.read_csv(path, encoding=...)"
        ) from e


def _looks_like_values(names: list[str]) -> bool:
    """Whether a first line is data: all numbers but perhaps the first cell, and not the numbering 0, 1, 2, ..."""
    tail = names[1:] or names
    try:
        numbers = [float(cell) for cell in tail]
    except ValueError:
        return False
    return not all(b - a == 1 for a, b in itertools.pairwise(numbers)) or numbers[0] not in (0, 1)


def _check_shape(table: pd.DataFrame, problems: list[str]) -> None:
    names = [str(c) for c in table.columns]
    if not len(table):
        problems.append("no rows")
    if doubled := sorted({c for c in names if names.count(c) > 1}):
        problems.append(f"column names used more than once: {_quote(doubled)}; rename them")


def _choose_columns(
    table: pd.DataFrame, target: str | Sequence[str] | None, time: str | None, id: str | None, problems: list[str]
) -> tuple[Any, list]:
    """(time column or None, target columns); what cannot be found or decided goes to `problems`."""
    columns = list(table.columns)
    wanted = [target] if isinstance(target, str) else list(target or ())
    for role, name in [*(("target", name) for name in wanted), ("time", time), ("id", id)]:
        if name is not None and name not in columns:
            problems.append(f"{role} column {name!r} is not there; {_near(name, columns)}")
    if target is not None and not wanted:
        problems.append("target is an empty list")
    if len(set(wanted)) < len(wanted):
        problems.append(f"target names a column twice: {_quote(wanted)}")
    asked, wanted = bool(wanted), [c for c in dict.fromkeys(wanted) if c in columns]
    time = time if time in columns else None

    if time is None:
        named = [c for c in columns if str(c).casefold() in TIME_NAMES and c not in wanted]
        if len(named) > 1:
            problems.append(f"several columns may hold the time: {', '.join(map(str, named))}; say which with time=")
        elif named:
            time = named[0]
        elif columns and columns[0] not in (*wanted, id) and _holds_dates(table[columns[0]]):
            time = columns[0]
    if not asked:
        wanted = [c for c in columns if c not in (time, id)]
        unnamed = [i for i, c in enumerate(columns) if str(c).strip() == "" or str(c).startswith("Unnamed: ")]
        if unnamed:
            problems.append(
                f"column {unnamed[0]} (counting from 0) has no name: a saved index? Name it, drop it, or give target="
            )
        numeric = [c for c in wanted if _is_numeric(table[c])]
        text = [c for c in wanted if c not in numeric and _to_number(table[c]).isna().all()]
        if wanted and len(text) == len(wanted):
            problems.append(f"no column of numbers; columns: {_quote(columns)}")
            wanted = []  # every cell of them would be listed
        elif not wanted:
            problems.append(f"no column besides {time if id is None else f'{time} and {id}'}")
    return time, wanted


def _near(name: Any, columns: list) -> str:
    """What a missing name may have meant, and what there is."""
    folded = {str(c).casefold(): str(c) for c in columns}
    near = [folded[c] for c in difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.5)]
    return (f"did you mean {' or '.join(map(repr, near))}? " if near else "") + f"columns: {_quote(columns)}"


def _quote(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:12])) + (f", ... ({len(items)} in all)" if len(items) > 12 else "")


def _is_numeric(column: Any) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _to_number(column: Any) -> Any:
    return pd.to_numeric(column, errors="coerce")


def _holds_dates(column: Any) -> bool:
    """Whether an unnamed first column is the time: dates, or text whose first cell is one."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    present = column.dropna()
    if _is_numeric(column) or not len(present) or not isinstance(present.iloc[0], (str, datetime.date)):
        return False
    return bool(_to_utc(present.iloc[:1]).notna().all())


def _to_utc(column: Any, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that formats differ is found out by the caller
        return pd.to_datetime(column, errors="coerce", utc=True, **how)


def _parse_stamps(column: Any, date_format: str | None, problems: list[str], notes: list[str]) -> np.ndarray | None:
    """Stamps [T] datetime64[us] in UTC, or None with the reasons in `problems`."""
    name = column.name
    if date_format is not None:
        tries = [_to_utc(column.astype(str).where(column.notna()), format=date_format)]
    elif _is_numeric(column):
        digits = (
            {len(str(int(v))) for v in column.dropna().iloc[[0, -1]] if float(v).is_integer()} if len(column) else set()
        )
        unit = {10: "s", 13: "ms", 16: "us", 19: "ns"}.get(max(digits, default=0))
        layout = {4: "%Y", 8: "%Y%m%d"}.get(max(digits, default=0))
        if len(digits) != 1 or not (unit or layout) or column.isna().any():
            first = column.iloc[0] if len(column) else ""
            problems.append(
                f"time column {name!r} holds numbers that are no dates (first: {first}); "
                "convert it, or name the columns to read with target= and the time with time="
            )
            return None
        if layout:
            column = column.astype("int64").astype(str)
        tries = [_to_utc(column, unit=unit) if unit else _to_utc(column, format=layout)]
    else:
        tries = [_to_utc(column)]
        if (tries[0].isna() & column.notna()).any():  # midnight without 00:00, or the day before the month
            tries += [_to_utc(column, format="ISO8601"), _to_utc(column, dayfirst=True)]
        first = str(column.dropna().iloc[0]) if column.notna().any() else ""
        if re.search(r"\d(Z|[+-]\d\d(:?\d\d)?)$", first) and re.search(r"\d:\d", first):
            notes.append(f"stamps of {name!r} converted to UTC")
    stamps = min(tries, key=lambda t: t.isna().sum())
    empty, unread = column.isna().to_numpy(), (stamps.isna() & column.notna()).to_numpy()
    if empty.any():
        problems.append(f"time column {name!r}: {empty.sum()} empty cells, {_rows(empty)}")
    if unread.any():
        problems.append(f"time column {name!r}: {unread.sum()} cells are no dates, {_rows(unread, column)}")
    if empty.any() or unread.any():
        return None
    return stamps.dt.tz_localize(None).to_numpy().astype("datetime64[us]")


def _show(stamp: Any) -> str:
    return str(pd.Timestamp(stamp))  # without a tail of zeros


def _rows(mask: np.ndarray, cells: Any = None, stamps: np.ndarray | None = None) -> str:
    """The first rows where `mask` holds, by number or stamp, with what stands there."""
    at = np.flatnonzero(mask)
    more = ", ..." if len(at) > SHOWN else ""
    if stamps is not None:
        return "at " + ", ".join(_show(stamps[i]) for i in at[:SHOWN]) + more
    shown = [f"{i}" if cells is None else f"{i} {str(cells.iloc[i])[:40]!r}" for i in at[:SHOWN]]
    return f"row{'s' if len(at) > 1 else ''} {', '.join(shown)}{more} (counting from 0)"


def _spread(
    table: Any, stamps: np.ndarray | None, id: str, targets: list, sort: bool, problems: list[str]
) -> tuple[pd.DataFrame, np.ndarray | None, list[str]]:
    """A long table with one variate per id (and target) beside one another, and the stamps all ids share."""
    if table[id].isna().any():
        problems.append(f"id column {id!r}: {table[id].isna().sum()} empty cells, {_rows(table[id].isna().to_numpy())}")
    if problems:
        return table, None, targets  # the cells can still be checked
    groups = {key: np.asarray(at) for key, at in table.groupby(id, sort=False).indices.items()}
    if sort and stamps is not None:
        groups = {key: at[np.argsort(stamps[at], kind="stable")] for key, at in groups.items()}
    first = next(iter(groups.values()))
    odd = [
        key
        for key, at in groups.items()
        if len(at) != len(first) or (stamps is not None and not np.array_equal(stamps[at], stamps[first]))
    ]
    if odd:
        lines = []
        for key in [next(iter(groups)), *odd[:SHOWN]]:
            span = "" if stamps is None else f", {_show(stamps[groups[key][0]])} to {_show(stamps[groups[key][-1]])}"
            lines.append(f"{key}: {len(groups[key])} rows{span}")
        problems.append(
            f"{len(odd)} of {len(groups)} ids have other stamps or lengths than the first, so they are not variates of "
            f"one series ({'; '.join(lines)}); read each id on its own"
        )
        return table, None, targets
    wide = {
        f"{key}" if len(targets) == 1 else f"{key}/{target}": table[target].iloc[at].reset_index(drop=True)
        for key, at in groups.items()
        for target in targets
    }
    return pd.DataFrame(wide), None if stamps is None else stamps[first], list(wide)


def _numbers(column: Any, name: Any, problems: list[str]) -> np.ndarray:
    """[T] float64, NaN where a cell is empty; text goes to `problems`."""
    types = pd.api.types
    if _is_numeric(column) and not types.is_complex_dtype(column):
        return column.to_numpy(np.float64, na_value=np.nan)
    if types.is_datetime64_any_dtype(column) or types.is_timedelta64_dtype(column) or types.is_complex_dtype(column):
        problems.append(
            f"column {name!r} holds {column.dtype}, not real numbers; convert it, or choose columns with target="
        )
        return np.full(len(column), np.nan)
    number = _to_number(column)
    truth = np.array([isinstance(cell, bool | np.bool_) for cell in column])
    text = column.notna().to_numpy() & (number.isna().to_numpy() | truth)
    if text.any():
        problems.append(
            f"column {name!r}: {text.sum()} cells are not numbers, {_rows(text, column)}; "
            "clean them (empty = missing) or choose columns with target="
        )
    elif any(isinstance(cell, str) for cell in column):
        problems.append(f"column {name!r} holds numbers as text; convert it with pandas.to_numeric")
    return number.to_numpy(np.float64, na_value=np.nan)


def _check_grid(stamps: np.ndarray, freq: str | None, problems: list[str]) -> None:
    """Unsorted, repeated and off-grid stamps go to `problems`, the first of each kind by name."""
    if len(stamps) < 2:
        return
    found = []
    steps = np.diff(stamps).astype(np.int64)
    if (steps < 0).any():
        i = int((steps < 0).argmax()) + 1
        found.append(f"{(steps < 0).sum()} stamps earlier than the one before, first in row {i}: {_show(stamps[i])}")
    unique, first_rows = np.unique(stamps, return_index=True)
    if len(unique) < len(stamps):
        again = np.ones(len(stamps), bool)
        again[first_rows] = False
        i = int(again.argmax())
        found.append(f"{again.sum()} stamps repeated, first in row {i}: {_show(stamps[i])}")
    if freq is None:
        found.append("no step of time to be found in the stamps; give freq=")
    else:
        at = places(unique, freq)
        wrong = np.abs(np.diff(at) - 1) > 1e-9
        if wrong.any():
            i = int(wrong.argmax()) + 1
            where = f"first in row {first_rows[i]}: {_show(unique[i])} follows {_show(unique[i - 1])}"
            found.append(f"{wrong.sum()} steps that are not {freq}, {where}")
    if found:
        problems += [f"time: {f}" for f in found]
        problems.append("time: irregular='regularise' sorts the rows and puts them on the regular grid, holes missing")


def _regularise(
    stamps: np.ndarray, values: np.ndarray, freq: str | None, problems: list[str], notes: list[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """(stamps, values) on the regular grid: rows sorted, moved to the nearest stamp, averaged where several meet."""
    if freq is None:
        problems.append("time: no step to be found in the stamps; give freq=")
        return None
    order = np.argsort(stamps, kind="stable")
    stamps_sorted, values = stamps[order], values[:, order]
    count, unit = count_unit(freq)
    first = stamps_sorted[0]
    if unit in SECONDS:  # the grid most stamps lie on
        step = count * SECONDS[unit] * 10**6
        since = stamps_sorted.astype(np.int64)
        phases, counts = np.unique(since % step, return_counts=True)
        phase = phases[counts.argmax()]
        first = np.datetime64(int(round((int(since[0]) - int(phase)) / step) * step + phase), "us")
    place = places(np.concatenate([[first], stamps_sorted]), freq)[1:]
    at = np.rint(place).astype(np.int64)
    at, off = at - at[0], np.abs(place - at) > 1e-9
    n = int(at[-1]) + 1
    if n > 20 * len(stamps):
        problems.append(
            f"time: a grid of step {freq} would have {n} rows for {len(stamps)} stamps; give a longer freq="
        )
        return None
    total, seen = np.zeros((len(values), n)), np.zeros((len(values), n))
    present = np.isfinite(values)
    for c, row in enumerate(values):
        total[c] = np.bincount(at[present[c]], row[present[c]], minlength=n)
        seen[c] = np.bincount(at[present[c]], minlength=n)
    met, holes = len(at) - len(np.unique(at)), n - len(np.unique(at))
    unsorted = int((np.diff(stamps).astype(np.int64) < 0).sum())
    if unsorted or met or holes or off.any():
        notes.append(
            f"put on a grid of step {freq}: {unsorted} stamps out of order, {off.sum()} rows moved to the nearest "
            f"stamp, {met} averaged with another, {holes} of {n} rows were holes"
        )
    return grid(first, n, freq), np.divide(total, seen, out=np.full_like(total, np.nan), where=seen > 0)


def _handle_missing(
    values: np.ndarray, columns: list, stamps: np.ndarray | None, missing: str, problems: list[str], notes: list[str]
) -> np.ndarray:
    """Refuses or fills the cells that are not finite."""
    bad = ~np.isfinite(values)
    filled, kept, values = [], [], values.copy()
    for c, name in enumerate(columns):
        if not bad[c].any() or any(p.startswith(f"column {name!r}") for p in problems):
            continue
        kinds = ((np.isnan(values[c]), "missing"), (np.isinf(values[c]), "infinite"))
        what = [f"{mask.sum()} {kind}, {_rows(mask, stamps=stamps)}" for mask, kind in kinds if mask.any()]
        if bad[c].all():
            problems.append(f"column {name!r}: not one finite value")
        elif missing == "keep":
            if np.isinf(values[c]).any():
                problems.append(f"column {name!r}: {what[-1]}; missing='interpolate' fills them, or clean the column")
            else:
                kept.append(f"{name} {bad[c].sum()}")
        elif missing == "error":
            problems.append(
                f"column {name!r}: {'; '.join(what)}; missing='interpolate' fills them, or clean the column"
            )
        else:
            rows = np.arange(values.shape[1])
            values[c, bad[c]] = np.interp(rows[bad[c]], rows[~bad[c]], values[c, ~bad[c]])
            filled.append(f"{name} {bad[c].sum()}")
    if filled:
        share = 100 * bad.mean()
        notes.append(f"missing cells filled by linear interpolation ({share:.3g} % of all): {_quote(filled)}")
    if kept:
        notes.append(f"missing cells kept ({100 * bad.mean():.3g} % of all): {_quote(kept)}")
    return values
