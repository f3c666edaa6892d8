"""Whatever holds a table -> a pandas DataFrame: files, frames, arrays, Arrow and polars tables.

Nothing is guessed beyond numbers, text and the dialect of a text (`dialects`), which is said in the
notes. What a file expands to is bounded while it is read: a compressed file by `EXPANSION` times
its size.

Shapes: C variates, T rows.
"""

import csv
import gzip
import io
import itertools
import os
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import interchange, parquet

from ltsm_jax.data.dialects import EXACT, SEPARATORS, read_decimal_commas, separator_of
from ltsm_jax.data.series import DataError, clip
from ltsm_jax.data.stamps import holds_dates

EXPANSION = 50  # a table of text compresses to a third or a twentieth; zeros alone to a thousandth
ALWAYS_READ = 100 * 10**6  # expanded bytes, whatever the file's size
MOST_COLUMNS = 250_000
SOURCES = (
    "give a path, a pandas DataFrame or Series, an array [T] or [T, C], or a polars or Arrow table"
)


def stem(path: Path) -> str:
    """The file's name without the endings of data files: "my.data.csv.gz" -> "my.data"."""
    return re.sub(
        r"(\.(csv|tsv|tab|txt|npz|parquet|pq|xlsx|xlsm|gz))+$", "", path.name, flags=re.IGNORECASE
    )


def is_path(source: Any) -> bool:
    """Return whether a source names a file."""
    return isinstance(source, str | os.PathLike)


def as_table(source: Any, notes: list[str] | None = None) -> pd.DataFrame:
    """Take the table out of a path, frame, series, array [T] or [T, C], polars or Arrow table.

    Columns of an array are called "0", "1", ...; a series without a name is "value".

    Args:
      notes: what was found out about a file, its dialect, is added to them.

    Raises: DataError for anything else, and for what is wrong with a file.
    """
    if is_path(source):
        return read_table(Path(source).expanduser(), notes=notes)
    if isinstance(source, pd.DataFrame):
        return source
    if isinstance(source, pd.Series):
        return source.to_frame("value" if source.name is None else source.name)
    if isinstance(source, np.ndarray | jax.Array):
        return _from_array(np.asanyarray(source))
    if hasattr(source, "__arrow_c_stream__") or hasattr(source, "__dataframe__"):
        return _from_arrow(source)
    if hasattr(source, "__arrow_c_array__"):
        return _from_arrow(pa.table({"value": pa.array(source)}))
    hint = "; call collect() on it first" if hasattr(source, "collect") else ""
    raise DataError(f"data of type {type(source).__name__} cannot be read{hint}; {SOURCES}")


def _from_array(array: np.ndarray) -> pd.DataFrame:
    if isinstance(array, np.ma.MaskedArray):  # what is masked is missing
        array = np.ma.filled(array.astype(np.float64), np.nan)
    if array.dtype.names:
        return pd.DataFrame(array)
    if array.ndim not in (1, 2):
        raise DataError(f"an array of shape {array.shape} cannot be read; {SOURCES}")
    array = np.asarray(array)
    array = array[:, None] if array.ndim == 1 else array
    return pd.DataFrame(array, columns=[str(c) for c in range(array.shape[1])])


def _from_arrow(source: Any) -> pd.DataFrame:
    try:
        if hasattr(source, "__arrow_c_stream__"):
            try:
                table = pa.table(source)
            except (pa.ArrowException, TypeError, ValueError):  # a column alone
                name = getattr(source, "name", None) or getattr(source, "_name", None)
                table = pa.table({str(name or "value"): pa.chunked_array(source)})
        else:
            table = interchange.from_dataframe(source)
        return _to_pandas(table)
    except (pa.ArrowException, TypeError, ValueError, NotImplementedError) as e:
        kind = type(source).__name__
        raise DataError(
            f"data of type {kind} cannot be read ({clip(str(e), 300)}); {SOURCES}"
        ) from e


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    try:
        return table.to_pandas()
    except Exception:  # what pandas wrote about its index is damaged: the columns are whole
        return table.replace_schema_metadata(None).to_pandas()


# ---- files ----


def read_table(path: Path, header: bool = True, notes: list[str] | None = None) -> pd.DataFrame:
    """Read a file as a table. Without `header` its columns are called "0", "1", ...

    Text may be parted by commas, semicolons, tabs or bars, the last three with decimal commas.

    Args:
      notes: what was found out about the file is added to them.

    Raises: FileNotFoundError; DataError for what is wrong with the file, and for one that expands
      beyond all measure.
    """
    notes = [] if notes is None else notes
    if not path.is_file():
        raise FileNotFoundError(
            f"no data file at {path}" + (" (it is a folder)" if path.is_dir() else "")
        )
    if path.name.lower().endswith((".parquet", ".pq")):
        return _read_parquet(path)
    if path.name.lower().endswith((".xlsx", ".xlsm")):
        return _read_sheet(path, notes)
    if not re.search(r"\.(csv|tsv|tab|txt)(\.gz)?$", path.name, flags=re.IGNORECASE):
        raise DataError(
            f"{path}: cannot tell what this is; .csv, .tsv, .txt (also with .gz), .parquet and "
            ".xlsx are read"
        )
    return _read_text_table(path, header, notes)


def _read_text_table(path: Path, header: bool, notes: list[str]) -> pd.DataFrame:
    text = _read_text(path).lstrip("\n")
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    named = re.match(r'"?sep=(.)"?\n', text)  # for Excel, which takes the line away
    if named:
        text = text[named.end() :]
    separator = named[1] if named and named[1] in SEPARATORS else separator_of(text)
    lines = io.StringIO(text)
    names: list[str] = []
    try:
        names = [cell.strip() for cell in next(csv.reader(lines, delimiter=separator))]
        if len(names) > MOST_COLUMNS:
            raise DataError(f"{path}: {len(names)} columns; at most {MOST_COLUMNS} are read")
        decimal = "." if separator == "," else ","
        if header and _looks_like_values([name.replace(decimal, ".") for name in names]):
            raise DataError(
                f"{path}: the first line holds values ({', '.join(n[:40] for n in names[:3])}, "
                "...), not column names; put a line of names above it"
            )
        if not header:
            lines.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", pd.errors.ParserWarning
            )  # a longer row would lose its last cells
            table = pd.read_csv(
                lines,
                sep=separator,
                header=None,
                names=range(len(names)),
                index_col=False,
                low_memory=False,
                **EXACT,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error) as e:
        raise DataError(
            f"{path}: rows of different lengths ({clip(str(e).strip(), 300)}); the header has "
            f"{len(names)} names"
        ) from e
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    if not len(table):
        raise DataError(f"{path}: only a header line, no rows")
    if separator != ",":
        notes.append(f"cells are separated by {SEPARATORS[separator]}")
        read_decimal_commas(table, text, separator, names=names if header else None, notes=notes)
    table.columns = names if header else [str(i) for i in range(len(names))]
    return table


def _read_sheet(path: Path, notes: list[str]) -> pd.DataFrame:
    """The first sheet of a workbook, names in its first row."""
    try:
        import openpyxl
    except ImportError as e:
        raise DataError(
            f"{path}: a workbook is read by openpyxl, which is not installed: pip install openpyxl"
        ) from e
    try:
        with zipfile.ZipFile(path) as file:
            _check_expansion(path, sum(part.file_size for part in file.infolist()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions, which are not read
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            cells = list(book.worksheets[0].iter_rows(values_only=True))
            sheets = [sheet.title for sheet in book.worksheets]
            book.close()
    except DataError:
        raise
    except Exception as e:  # openpyxl lets pass what its parsers of XML raise
        raise DataError(f"{path}: not a readable workbook ({clip(str(e), 300)})") from e
    return _from_cells(path, cells, sheets, notes=notes)


def _from_cells(
    path: Path, cells: list[tuple], sheets: list[str], notes: list[str]
) -> pd.DataFrame:
    """A table of the rows of a sheet; empty rows and columns around it are left out."""
    table = pd.DataFrame(cells, dtype=object).dropna(how="all").dropna(how="all", axis=1)
    if len(table) < 2:
        raise DataError(
            f"{path}: the first sheet ({clip(str(sheets[0]), 40)}) holds no table with a header "
            "and rows"
        )
    names = ["" if pd.isna(name) else str(name).strip() for name in table.iloc[0]]
    if _looks_like_values(names):
        raise DataError(
            f"{path}: the first row holds values ({', '.join(names[:3])}, ...), not column names"
        )
    if len(sheets) > 1:
        notes.append(f"of {len(sheets)} sheets the first is read, {clip(str(sheets[0]), 40)!r}")
    table = table.iloc[1:].reset_index(drop=True).infer_objects()
    table.columns = names
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        with parquet.ParquetFile(path) as file:
            facts = file.metadata
            groups = (facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
            _check_expansion(path, max(facts.num_rows * facts.num_columns * 8, sum(groups)))
            table = file.read()
        return _to_pandas(table)
    except (ValueError, OSError, pa.ArrowException, KeyError, TypeError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: not a readable parquet file ({clip(str(e), 300)})") from e


def _check_expansion(path: Path, expanded: int) -> None:
    limit = max(ALWAYS_READ, EXPANSION * path.stat().st_size)
    if expanded > limit:
        raise DataError(
            f"{path}: {path.stat().st_size / 1e6:.3g} MB expand to more than {limit / 1e6:.0f} MB, "
            f"{EXPANSION} times the file's size; if it is sound, expand it yourself and pass the "
            "DataFrame"
        )


def read_bytes(path: Path) -> bytes:
    """Read the bytes of a file, expanded if it is gzip.

    Raises: DataError for a damaged gzip file and for one that expands beyond `EXPANSION` times its
      size.
    """
    if path.suffix.lower() != ".gz":
        return path.read_bytes()
    parts, size = [], 0
    try:
        with gzip.open(path) as file:
            while part := file.read(1 << 22):
                size += len(part)
                _check_expansion(path, size)
                parts.append(part)
    except (EOFError, OSError, zlib.error) as e:
        raise DataError(f"{path}: the gzip file is cut or damaged ({clip(str(e), 300)})") from e
    return b"".join(parts)


def _read_text(path: Path) -> str:
    """The text of a file, lines ended by "\\n"."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise DataError(
            f"{path}: not UTF-8 text (line {line}, byte 0x{data[e.start]:02x}); save it as UTF-8, "
            "or pass the DataFrame of pandas.read_csv(path, encoding=...)"
        ) from e
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _looks_like_values(names: list[str]) -> bool:
    """Return whether a first line is data: all numbers but perhaps the first cell, and not the
    numbering 0, 1, 2, ...
    """
    first, tail = names[0], names[1:] or names
    try:
        numbers = [float(cell) for cell in tail]
    except ValueError:
        return False
    counted = all(b - a == 1 for a, b in itertools.pairwise(numbers)) and numbers[0] in (0, 1)
    # Columns numbered by pandas: a name (not a date or a number) before them, or all of 0, 1, 2,
    # ...
    whole = re.fullmatch(r"0+|1", first) is not None and len(names) > 1
    named = not re.fullmatch(r"[-+\d.eE]+", first) and not holds_dates(pd.Series([first]))
    return not (counted and (named or (whole and numbers[0] == float(first) + 1)))
