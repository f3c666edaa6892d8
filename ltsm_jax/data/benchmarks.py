"""The benchmark files of the long-term-forecasting literature, by name: what is known of them, and
where they are.

A name is looked up in `$LTSM_DATA` (the folder and its sub-folders, plain or gzip), then in the
cache (`$LTSM_CACHE`, else ~/.cache/ltsm_jax, sub-folder data), then downloaded from its public
place into the cache.

Rows are read as the literature reads them: as they come. The weather file has one stamp twice, one
gap and -9999 for missing values, and published scores include all of them.
"""

import dataclasses
import difflib
import hashlib
import http.client
import io
import logging
import os
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ltsm_jax.data.series import DataError, Series
from ltsm_jax.data.sources import is_path, read_bytes, read_table, stem
from ltsm_jax.data.tables import read_series
from ltsm_jax.storage import cache_folder

log = logging.getLogger(__name__)


class MissingDataError(DataError, FileNotFoundError):
    """A data file that is in none of the places looked at."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Description of one benchmark file.

    Attributes:
      name: canonical name.
      file: name of the file as published.
      rows, variates: T and C.
      freq: canonical step.
      borders: (train end, val end, test end) in rows, or (train share, test share) of the rows.
      digest: "sha256:..." or "md5:..." of the published bytes, unzipped; None where none is known.
      url: a public place that has these bytes, plain or gzip; None where no stable one is known.
      aliases: further names, case aside.
    """

    name: str
    file: str
    rows: int
    variates: int
    freq: str
    borders: tuple[int, int, int] | tuple[float, float] = (0.7, 0.2)
    digest: str | None = None
    url: str | None = None
    aliases: tuple[str, ...] = ()


# Pinned revisions. Digests: of the files themselves where a copy was at hand (ETTh1, ETTm1,
# weather, exchange_rate, national_illness, the two subsets), else as several independent public
# repositories record them; PEMS: Zenodo's md5.
_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small"
_TSLIB = "https://huggingface.co/datasets/thuml/Time-Series-Library/resolve/2b66e59ee19dac8f6f19fb5d4997f289fdfea357"
_LSTNET = "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data"
_LSTNET += "/7f402f185cc2435b5e66aed13a3b560ed142e023"
_CONCORD = (
    "https://raw.githubusercontent.com/Lucasmhw/CONCORD/7306bbc627a1853e32b04b7b2cae15a12f8bd6ca"
)
_PEMS = "https://zenodo.org/records/7816008/files"

_MONTH = 30 * 24  # ETT months have 30 days: 12 of them to train, 4 to validate, 4 to test
_ETTH = (12 * _MONTH, 16 * _MONTH, 20 * _MONTH)
_ETTM = (4 * 12 * _MONTH, 4 * 16 * _MONTH, 4 * 20 * _MONTH)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "ETTh1",
            "ETTh1.csv",
            rows=17420,
            variates=7,
            freq="h",
            borders=_ETTH,
            digest="sha256:f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
            url=f"{_ETT}/ETTh1.csv",
        ),
        Benchmark(
            "ETTh2",
            "ETTh2.csv",
            rows=17420,
            variates=7,
            freq="h",
            borders=_ETTH,
            digest="sha256:a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
            url=f"{_ETT}/ETTh2.csv",
        ),
        Benchmark(
            "ETTm1",
            "ETTm1.csv",
            rows=69680,
            variates=7,
            freq="15min",
            borders=_ETTM,
            digest="sha256:6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
            url=f"{_ETT}/ETTm1.csv",
        ),
        Benchmark(
            "ETTm2",
            "ETTm2.csv",
            rows=69680,
            variates=7,
            freq="15min",
            borders=_ETTM,
            digest="sha256:db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
            url=f"{_ETT}/ETTm2.csv",
        ),
        Benchmark(
            "weather",
            "weather.csv",
            rows=52696,
            variates=21,
            freq="10min",
            digest="sha256:34ee981d07313e51da2a50bb600072c8ae4a69cb4b0651f4cb93a069d7a2ba63",
            url=f"{_TSLIB}/weather/weather.csv",
        ),
        Benchmark(
            "electricity",
            "electricity.csv",
            rows=26304,
            variates=321,
            freq="h",
            digest="sha256:7e45845d54c5219bad0ae6bc1b5316cf8ff9cead5d33fa998a5a51c2e4a497ad",
            url=f"{_TSLIB}/electricity/electricity.csv",
            aliases=("ECL",),
        ),
        Benchmark(
            "traffic",
            "traffic.csv",
            rows=17544,
            variates=862,
            freq="h",
            digest="sha256:cb06463d56fa17d87f47027cd9389ceae82a69eddee51cdb61480e120dab0b16",
            url=f"{_TSLIB}/traffic/traffic.csv",
        ),
        Benchmark(
            "exchange_rate",
            "exchange_rate.csv",
            rows=7588,
            variates=8,
            freq="D",
            digest="sha256:48b4d9d3d508f5104162e85b9a6042e3557fde11aa9f2944eba8c0d0efc89842",
            url=f"{_TSLIB}/exchange_rate/exchange_rate.csv",
            aliases=("exchange",),
        ),
        Benchmark(
            "national_illness",
            "national_illness.csv",
            rows=966,
            variates=7,
            freq="W",
            digest="sha256:93601f64d2566dc796ca4305adad8b8560c2db1a1ff04543c3bd813a7263570a",
            url=f"{_TSLIB}/illness/national_illness.csv",
            aliases=("ILI", "illness"),
        ),
        Benchmark(
            "solar",
            "solar_AL.txt",
            rows=52560,
            variates=137,
            freq="10min",
            digest="sha256:230327ef72d2abb387939d4a35d6fd34f1066071bc7c40ce7ecf5531a0122ac2",
            url=f"{_LSTNET}/solar-energy/solar_AL.txt.gz",
            aliases=("solar_energy", "solar-energy"),
        ),
        Benchmark(
            "PEMS03",
            "PEMS03.npz",
            rows=26208,
            variates=358,
            freq="5min",
            borders=(0.6, 0.2),
            digest="md5:651add9bb9eaf7f5eda2f2ee8778a182",
            url=f"{_PEMS}/PEMS03.npz",
        ),
        Benchmark(
            "PEMS04",
            "PEMS04.npz",
            rows=16992,
            variates=307,
            freq="5min",
            borders=(0.6, 0.2),
            digest="md5:5238832691101da85fcac772a32051da",
            url=f"{_PEMS}/PEMS04.npz",
        ),
        Benchmark(
            "PEMS07",
            "PEMS07.npz",
            rows=28224,
            variates=883,
            freq="5min",
            borders=(0.6, 0.2),
            digest="md5:978d3d9b85fe640a446983a34271a48d",
            url=f"{_PEMS}/PEMS07.npz",
        ),
        Benchmark(
            "PEMS08",
            "PEMS08.npz",
            rows=17856,
            variates=170,
            freq="5min",
            borders=(0.6, 0.2),
            digest="md5:2a528d169c0d90294c9e24288a430132",
            url=f"{_PEMS}/PEMS08.npz",
        ),
        Benchmark(
            "traffic_6",
            "traffic_6.csv",
            rows=17544,
            variates=6,
            freq="h",
            digest="sha256:e13028520dc78d2c2c183cf95448a99a296442525eb04c2b2c15276a739a543d",
            url=f"{_CONCORD}/traffic.csv",
        ),
        Benchmark(
            "solar_12",
            "solar_12.csv",
            rows=52560,
            variates=12,
            freq="10min",
            digest="sha256:6966d7eba10804e70a716bc1e37f6326a610776ed1b46a5f4ac61c9f8c7e706d",
            url=f"{_CONCORD}/solar_energy_137_10min.csv",
        ),
    )
}


def _by_alias() -> dict[str, Benchmark]:
    """Benchmarks by every name they are found under, in lower case."""
    found = {}
    for benchmark in BENCHMARKS.values():
        for alias in (benchmark.name, PurePath(benchmark.file).stem, *benchmark.aliases):
            found[alias.casefold()] = benchmark
    return found


_BY_ALIAS = _by_alias()


def benchmark_named(name: str) -> Benchmark | None:
    """The benchmark called `name` (its name or an alias, case aside), or None."""
    return _BY_ALIAS.get(name.casefold())


def load_series(
    source: Any, *, as_benchmark: bool = True, download: bool = True, **options: Any
) -> Series:
    """A series by benchmark name, or from a file, DataFrame or array (`read_series`).

    A benchmark is asked for by its name ("ETTh1"): its rows are read as they are, and `prepare`
    gives it the benchmark's borders. When what lies in `$LTSM_DATA` is not the published file, a
    warning and `Series.notes` say so. A path is a benchmark only where its bytes are the published
    ones; any other file of that name is a table like every other, and `Series.notes` says so.

    Args:
      as_benchmark: False reads the published file at a path like any other table, too.
      download: whether a benchmark found nowhere may be fetched.
      options: those of `read_series`; a benchmark needs none, `target` picks some of its columns.

    Raises: MissingDataError listing every place looked at; DataError for what is wrong with the
      data, or when a download or a file of the cache is not the published one.
    """
    if not is_path(source):
        return read_series(source, **options)
    if (
        isinstance(source, str)
        and stem(Path(source)) == source
        and (benchmark := benchmark_named(source))
    ):
        path, cached = locate(benchmark, download=download)
        wrong = _difference(benchmark, path)
        if wrong and cached:
            raise DataError(
                f"{path} is damaged ({wrong}); delete it, and it will be downloaded again"
            )
        return _read_benchmark(benchmark, path, wrong, options=options)

    path = Path(source).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(stem(path).casefold(), _BY_ALIAS, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise MissingDataError(
            f"no data file at {path}; {hint}benchmarks by name: {', '.join(BENCHMARKS)}"
        )
    benchmark = benchmark_named(stem(path)) if as_benchmark else None
    if benchmark is None:
        return read_series(path, **options)
    if _is_published(benchmark, path):
        return _read_benchmark(benchmark, path, None, options=options)
    series = read_series(path, **options)
    note = (
        f"called like the benchmark {benchmark.name}, but not its published file: read as any "
        "other table"
    )
    return dataclasses.replace(series, notes=(*series.notes, note))


def _read_benchmark(
    benchmark: Benchmark, path: Path, wrong: str | None, options: dict[str, Any]
) -> Series:
    """The rows as they come; `wrong`: what tells the file from the published one."""
    table = (
        _read_npz(path)
        if path.suffix == ".npz"
        else read_table(path, header=path.suffixes[:1] != [".txt"])
    )
    how: dict[str, Any] = {"irregular": "ignore", "freq": benchmark.freq, "name": benchmark.name}
    how |= {option: value for option, value in options.items() if value is not None}
    series = read_series(table, **how)
    if not wrong and not benchmark.digest and options.get("target") is None:
        shape = (series.n_rows, series.n_variates)
        if shape != (benchmark.rows, benchmark.variates):
            wrong = (
                f"{shape[0]} rows x {shape[1]} variates, published {benchmark.rows} x "
                f"{benchmark.variates}"
            )
    notes = series.notes
    if wrong:
        notes += (f"not the published {benchmark.file}: {wrong}",)
        log.warning(
            "%s: %s. It gets the borders of %s all the same.", path, notes[-1], benchmark.name
        )
    return dataclasses.replace(series, benchmark=benchmark.name, notes=notes)


def _read_npz(path: Path) -> pd.DataFrame:
    """Feature 0 of array `data` [T, C, features] of a PEMS file."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            data = file["data"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise DataError(f"{path}: not an .npz file with an array `data` ({e})") from e
    if data.ndim not in (2, 3) or not np.issubdtype(data.dtype, np.number):
        raise DataError(
            f"{path}: `data` is {data.dtype} {data.shape}, not numbers [rows, sensors, features]"
        )
    data = data if data.ndim == 2 else data[:, :, 0]
    return pd.DataFrame(data, columns=[str(i) for i in range(data.shape[1])])


# ---- finding and fetching
# --------------------------------------------------------------------------------------------


def locate(benchmark: Benchmark, *, download: bool = True) -> tuple[Path, bool]:
    """(file, whether it lies in the cache), downloading it if need be.

    Raises: MissingDataError listing every place looked at and where to put the file; DataError when
      the downloaded file is not the published one.
    """
    tried = []
    own = os.environ.get("LTSM_DATA")
    if not own:
        tried.append("$LTSM_DATA: not set")
    elif found := _in_folder(Path(own), benchmark):
        return found, False
    else:
        tried.append(
            f"$LTSM_DATA: not in {own} nor one folder below"
            + ("" if Path(own).is_dir() else " (no folder)")
        )
    cache = cache_folder("data")
    if found := _in_folder(cache, benchmark):
        return found, True
    tried.append(f"cache: not in {cache}")
    if benchmark.url is None:
        tried.append("download: no public address known")
    elif not download:
        tried.append(f"download: not asked for ({benchmark.url})")
    else:
        try:
            return _download(benchmark, cache), True
        except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
            tried.append(f"download: {benchmark.url}: {getattr(e, 'reason', None) or e}")
    file = (
        benchmark.file
        if benchmark.file.endswith(".npz")
        else f"{benchmark.file} (or {benchmark.file}.gz)"
    )
    raise MissingDataError(
        f"{benchmark.name} was not found:\n  "
        + "\n  ".join(tried)
        + f"\nPut {file} into {own or 'a folder and set LTSM_DATA to that folder'}."
    )


def _in_folder(folder: Path, benchmark: Benchmark) -> Path | None:
    """The benchmark's file in `folder` or one folder below; the published name before others, the
    nearer before.
    """
    kind = PurePath(benchmark.file).suffix
    endings = (kind,) if kind == ".npz" else (kind, f"{kind}.gz", ".csv", ".csv.gz", ".parquet")
    found = []
    for depth, pattern in enumerate(("*", "*/*")):
        for path in folder.glob(pattern):
            if (
                path.name.lower().endswith(endings)
                and benchmark_named(stem(path)) is benchmark
                and path.is_file()
            ):
                found.append((depth, path.name != benchmark.file, str(path), path))
    return min(found)[-1] if found else None


def _difference(benchmark: Benchmark, path: Path) -> str | None:
    """Describe how the file differs from the published one, or None; CRLF and LF line ends count as
    the same.
    """
    if benchmark.digest is None or path.suffix == ".parquet":
        return None
    try:
        data = read_bytes(path)
    except DataError as e:
        return f"cut or damaged gzip file: {e}"
    algorithm, published = benchmark.digest.split(":")
    forms = [data]
    if not benchmark.file.endswith(".npz"):
        unix = data.replace(b"\r\n", b"\n")
        forms += [unix, unix.replace(b"\n", b"\r\n")]
    if any(hashlib.new(algorithm, form).hexdigest() == published for form in forms):
        return None
    return f"{algorithm} {hashlib.new(algorithm, data).hexdigest()}, published {published}"


def _is_published(benchmark: Benchmark, path: Path) -> bool:
    """Return whether the file's bytes are known to be the published ones."""
    known = benchmark.digest is not None and path.suffix != ".parquet"
    return known and _difference(benchmark, path) is None


def _download(benchmark: Benchmark, folder: Path) -> Path:
    """Fetches the file beside its place, compares the digest, then renames: what bears its name is
    whole.
    """
    assert benchmark.url is not None
    folder.mkdir(parents=True, exist_ok=True)
    part = (
        folder
        / f"{benchmark.file}.{os.getpid()}.part{'.gz' if benchmark.url.endswith('.gz') else ''}"
    )
    try:
        _fetch(benchmark.url, part)
        if wrong := _difference(benchmark, part):
            raise DataError(
                f"{benchmark.url} is not the file it was ({wrong}); nothing was kept. If you have "
                f"{benchmark.file}, put it into $LTSM_DATA"
            )
        if benchmark.digest is None:
            log.warning("%s: downloaded, unverified: no published digest is known", benchmark.file)
        target = folder / (benchmark.file + (".gz" if part.suffix == ".gz" else ""))
        part.replace(target)
        return target
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> None:
    """url -> path in chunks, with a progress bar after two seconds."""
    request = urllib.request.Request(url, headers={"User-Agent": "ltsm_jax"})
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress("{task.description}", *columns, console=console, transient=True)
    start, shown, got = time.monotonic(), False, 0
    with urllib.request.urlopen(request, timeout=30) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or None
        task = bar.add_task(PurePath(url).name, total=total)
        try:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                got += len(chunk)
                if not shown and time.monotonic() - start > 2:
                    shown = True
                    if console.is_terminal:
                        bar.start()
                    else:
                        console.print(
                            f"downloading {url}" + (f" ({total / 1e6:.1f} MB)" if total else "")
                        )
                bar.update(task, completed=got)
        finally:
            if shown and console.is_terminal:
                bar.stop()
    if total is not None and got != total:
        raise OSError(f"the connection ended after {got} of {total} bytes")
