"""Series with labelled anomalies from the files of several archives.

| archive | files |
| --- | --- |
| UCR | `<id>_UCR_Anomaly_<name>_<b>_<first>_<last>.txt[.gz]`, see `tasks.anomaly.read_ucr` |
| NAB | `<folder>/<name>.csv[.gz]` with columns timestamp,value, and `combined_windows.json` in a
folder above |
| SMAP, MSL | a folder with `labeled_anomalies.csv`, `train/<channel>.npy` and `test/<channel>.npy`
|

All become `Labelled`: one column, anomaly-free rows in front, first and last row of each anomaly.
"""

import ast
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ltsm_jax.data.series import DataError
from ltsm_jax.tasks.anomaly import Labelled, read_ucr

NAB_LABELS = "combined_windows.json"
SMAP_LABELS = "labeled_anomalies.csv"
PROBATION, LONGEST_PROBATION = (
    0.15,
    750,
)  # of NAB: the share of a series that is not scored, at most so many rows


def read_labelled(paths: Iterable[str | Path]) -> tuple[list[Labelled], list[str]]:
    """Read files, and all files of folders, of any of the archives.

    Returns: the series in the order of their paths, and what was left out and why, a line each.
    Raises: ValueError for a file that cannot be read, or where nothing is found; FileNotFoundError.
    """
    found, notes = [], []
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        if path.is_dir() and (path / SMAP_LABELS).is_file():
            found += read_channels(path)
            continue
        single = path.is_file()
        for file in [path] if single else _files(path):
            series = read_ucr(file) if _is_text(file) else read_nab(file)
            if series is not None:
                found.append(series)
            else:
                notes.append(f"{file.name}: left out, no anomaly is labelled behind its first part")
    if not found:
        where = ", ".join(map(str, paths))
        raise DataError(f"no labelled series in {where}: " + ("; ".join(notes) or "no files"))
    return found, notes


def _files(folder: Path) -> list[Path]:
    kinds = (".txt", ".txt.gz", ".csv", ".csv.gz")
    return sorted(path for path in folder.rglob("*") if path.name.endswith(kinds))


def _is_text(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith(".txt")


def read_nab(path: str | Path, labels: str | Path | None = None) -> Labelled | None:
    """Read a series of the Numenta Anomaly Benchmark with its label windows.

    The first 15 % of the rows, at most 750, are the benchmark's probationary part and train;
    windows that begin in it are left out. A row is anomalous when its stamp is inside a window,
    both ends included.

    Args:
      path: .csv or .csv.gz with columns timestamp, value. labels: the windows; by default
        `combined_windows.json` of the nearest folder above the file.
    Returns: None where no window is left.
    Raises: ValueError for a file without labels, or one that is no table of stamps and numbers;
    FileNotFoundError.
    """
    path = Path(path)
    labels = _labels_above(path) if labels is None else Path(labels)
    windows = _windows_of(path, labels)
    try:
        table = pd.read_csv(path)
        stamps = pd.to_datetime(table["timestamp"])
        values = table["value"].to_numpy(np.float64)
    except (KeyError, ValueError, OSError, EOFError, UnicodeDecodeError) as error:
        said = f"{path.name} is not a table of columns timestamp and value: {error}"
        raise DataError(said) from error
    train_end = min(int(PROBATION * len(values)), LONGEST_PROBATION)
    spans = []
    for first, last in windows:
        inside = np.flatnonzero((stamps >= first) & (stamps <= last))
        if len(inside) and inside[0] >= train_end:
            spans.append((int(inside[0]), int(inside[-1])))
    if not spans:
        return None
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    return Labelled(
        name=name, values=values, train_end=train_end, anomaly=spans[0], others=tuple(spans[1:])
    )


def _labels_above(path: Path) -> Path:
    for folder in path.resolve().parents:
        if (folder / NAB_LABELS).is_file():
            return folder / NAB_LABELS
    raise DataError(f"{path.name}: its label windows, {NAB_LABELS}, are in no folder above it")


def _windows_of(path: Path, labels: Path) -> list[tuple[pd.Timestamp, pd.Timestamp]]:
    try:
        everything = json.loads(labels.read_text(encoding="utf-8"))
        name = f"{path.parent.name}/{path.name.removesuffix('.gz')}"
        if name not in everything:
            raise DataError(f"{labels} has no windows of {name}")
        return [(_stamp(first), _stamp(last)) for first, last in everything[name]]
    except DataError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{labels} is not a table of label windows: {error}") from error


def _stamp(text: Any) -> pd.Timestamp:
    stamp = pd.Timestamp(text)
    if not isinstance(stamp, pd.Timestamp):  # NaT, which is after nothing and before nothing
        raise ValueError(f"{text!r} is no date")
    return stamp


def read_channels(folder: str | Path, channels: Sequence[str] | None = None) -> list[Labelled]:
    """Read channels in the form of SMAP and MSL (the telemetry of NASA): `train/<channel>.npy`,
    `test/<channel>.npy`.

    Of each array [rows, columns] the first column, the telemetry, is taken; the others are
    commands. Test rows follow the training rows, and the spans of `labeled_anomalies.csv` count
    test rows, both ends included.

    Args:
      folder: with `labeled_anomalies.csv` (columns chan_id, anomaly_sequences). channels: some;
        None: all of the table that have both files.
    Raises: ValueError for files that cannot be read, or where none is left.
    """
    folder = Path(folder)
    try:
        table = pd.read_csv(folder / SMAP_LABELS)
        names, sequences = (table[c].astype(str) for c in ("chan_id", "anomaly_sequences"))
        rows = list(zip(names, sequences, strict=True))
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"{folder / SMAP_LABELS}: {error}") from error
    found = []
    for channel, text in rows:
        files = [folder / part / f"{channel}.npy" for part in ("train", "test")]
        wanted = channels is None or channel in channels
        if wanted and all(file.is_file() for file in files):
            train, test = (_first_column(file) for file in files)
            spans = _spans_of(channel, text, len(train))
            values, others = np.concatenate([train, test]), tuple(spans[1:])
            found.append(
                Labelled(
                    name=channel,
                    values=values,
                    train_end=len(train),
                    anomaly=spans[0],
                    others=others,
                )
            )
    if not found:
        raise DataError(f"{folder}: no channel of {SMAP_LABELS} has a file in train/ and in test/")
    return found


def _first_column(file: Path) -> np.ndarray:
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file.name} cannot be read as an array: {error}") from error
    if values.ndim not in (1, 2) or not len(values) or not np.issubdtype(values.dtype, np.number):
        got = f"{values.dtype} {values.shape}"
        raise DataError(f"{file.name} must be an array of numbers [rows, columns], not {got}")
    return values.reshape(len(values), -1)[:, 0].astype(np.float64)


def _spans_of(channel: str, text: str, shift: int) -> list[tuple[int, int]]:
    try:
        pairs: Any = ast.literal_eval(text)
        spans = [(int(first) + shift, int(last) + shift) for first, last in pairs]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise DataError(f"{channel}: {text[:80]!r} is not a list of [first, last] rows") from error
    if not spans:
        raise DataError(f"{channel}: no anomaly is labelled")
    return sorted(spans)
