"""Many series of any length as training windows: a folder of files, or an array of generated ones.

The series are laid end to end in one row on the device, and a table of first rows says where a
window may begin, so that none crosses from one series into the next. What a window may not be (too
short a series, too many missing values, a flat context) is decided here, once, and counted; nothing
is dropped in silence.

Folder: every `.npz`, `.csv`, `.csv.gz` and `.parquet` directly in it. A `.npz` holds `values`
(float, all series one after another, NaN = missing) and `offsets` (int [n + 1], series i is
values[offsets[i]:offsets[i+1]]), optionally `names` [n]; further keys are ignored. Of a table each
numeric column is a series.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ltsm_jax import hosts, storage
from ltsm_jax.data.series import DataError
from ltsm_jax.data.windows import Windows

SUFFIXES = (".npz", ".csv", ".csv.gz", ".parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Windows over many series.

    train, val: the two parts; every target row of `val` lies after every row of `train` of the same
      series. val is None where no window was set aside.
    notes: how many windows there are and how many series or windows were left out for which reason,
    one line each.
    """

    train: Windows
    val: Windows | None
    notes: tuple[str, ...]


def pool(
    series: Iterable[np.ndarray],
    context_len: int,
    horizon: int,
    *,
    stride: int = 96,
    val_share: float = 0.0,
    max_missing: float = 0.1,
) -> Pool:
    """Windows over `series`, in data units (see `ScaledWindows` for a scale per window).

    Args:
      series: arrays [T] of any lengths, NaN = missing.
      context_len, horizon: rows of a window's two parts.
      stride: rows from one window of a series to the next, counted back from its last row.
      val_share: the last so much of each series is for validation: val targets lie in it, train
        windows before it.
      max_missing: windows in which a larger share is missing, of the context or of the target, are
        left out. Holes in the others hold the last value before them (the first after, at the head
        of a series).
    Raises: DataError (a ValueError) when not a single training window is left; the counts say why.
      ValueError for infinite values.
    """
    if min(context_len, horizon, stride) < 1 or not 0 <= val_share < 1 or not 0 <= max_missing < 1:
        raise ValueError(
            "pool needs context_len, horizon and stride of at least 1 and val_share and "
            f"max_missing in [0, 1); got {context_len}, {horizon}, {stride}, {val_share}, "
            f"{max_missing}"
        )
    length = context_len + horizon
    flat, tables, left_out, offset, n_series = [], {"train": [], "val": []}, Counter(), 0, 0
    for i, values in enumerate(series):
        x = np.asarray(values, np.float32)
        n_series += 1
        if x.ndim != 1 or np.isinf(x).any():
            infinite = int(np.isinf(x).sum())
            raise ValueError(
                f"series {i}: shape {x.shape}, {infinite} infinite values; it must be [T], finite "
                "or NaN"
            )
        if x.size < length:
            left_out[f"series shorter than one window ({length} rows)"] += 1
            continue
        missing = np.isnan(x)
        if missing.all():
            left_out["series without any value"] += 1
            continue
        filled = _fill(x, missing)
        starts = np.arange(x.size - length, -1, -stride)[::-1]
        good = _usable(
            starts,
            filled,
            missing,
            context_len=context_len,
            horizon=horizon,
            max_missing=max_missing,
            left_out=left_out,
        )
        border = x.size - int(x.size * val_share)
        before, after = good + length <= border, good + context_len >= border
        tables["train"].append(offset + good[before])
        tables["val"].append(offset + good[after & ~before])
        left_out["windows whose target lies across the border of train and val"] += int(
            (~before & ~after).sum()
        )
        flat.append(filled)
        offset += x.size
    if offset >= 2**31:
        raise ValueError(f"{offset} values are more than int32 can index; split the corpus")

    starts = {
        part: np.concatenate(table) if table else np.zeros(0, int) for part, table in tables.items()
    }
    counts = f"{starts['train'].size} training windows"
    counts += f" and {starts['val'].size} for validation" if val_share else ""
    notes = [f"{n_series} series, of which {len(flat)} are used ({offset} values): {counts}"]
    notes += [f"left out: {count} {reason}" for reason, count in left_out.items() if count]
    if not starts["train"].size:
        raise DataError(
            f"no training window of {context_len} + {horizon} rows: " + "; ".join(notes)
        )
    values = jnp.asarray(np.concatenate(flat)[None])
    parts = {
        part: Windows(
            values=values,
            starts=jnp.asarray(s, jnp.int32),
            rows=jnp.zeros(s.size, jnp.int32),
            context_len=context_len,
            horizon=horizon,
        )
        for part, s in starts.items()
        if s.size
    }
    return Pool(parts["train"], parts.get("val"), tuple(notes))


def _usable(
    starts: np.ndarray,
    filled: np.ndarray,
    missing: np.ndarray,
    context_len: int,
    horizon: int,
    max_missing: float,
    left_out: Counter,
) -> np.ndarray:
    """Those of `starts` whose windows have values enough and a context that moves.

    filled, missing: a series [T] without holes, and where they were. left_out: counts the others.
    """
    holes, moves = _before(missing), _before(np.diff(filled) != 0)
    in_context = holes[starts + context_len] - holes[starts]
    in_target = holes[starts + context_len + horizon] - holes[starts + context_len]
    full = (in_context <= max_missing * context_len) & (in_target <= max_missing * horizon)
    flat_context = moves[starts + context_len - 1] == moves[starts]
    left_out["windows with too many missing values"] += int((~full).sum())
    left_out["windows with a constant context"] += int((full & flat_context).sum())
    return starts[full & ~flat_context]


def shared(make: Callable[[], Pool], folder: str | Path) -> Pool:
    """`make()`, which on several hosts the first alone calls: the others need not read what it
    reads.

    The first writes what it made to `folder`, which all see, and all map it: each host reads of the
    series what its devices hold (`Windows.over`). All call; `folder` may be removed when the
    windows are no longer needed.
    """
    if hosts.process_count() == 1:
        return make()
    hosts.on_first(_write, make, Path(folder))
    return hosts.on_every_host(_map, Path(folder))


def _write(make: Callable[[], Pool], folder: Path) -> None:
    found = make()
    shutil.rmtree(folder, ignore_errors=True)  # of a launch before this one
    folder.mkdir(parents=True)
    parts = {
        name: part
        for name, part in (("train", found.train), ("val", found.val))
        if part is not None
    }
    facts = {
        "notes": found.notes,
        "lengths": [found.train.context_len, found.train.horizon],
        "parts": {},
    }
    for name, part in parts.items():
        of = "train" if part.values is found.train.values else name
        facts["parts"][name] = of
        np.save(folder / f"{name}.starts.npy", part.starts)
        if of == name:
            np.save(folder / f"{name}.values.npy", part.values)
    storage.write_record(folder / "windows.json", facts)


def _map(folder: Path) -> Pool:
    facts = storage.read_record(folder / "windows.json")

    def part(name: str) -> Windows:
        values = np.load(folder / f"{facts['parts'][name]}.values.npy", mmap_mode="r")
        starts = np.load(folder / f"{name}.starts.npy")
        context_len, horizon = facts["lengths"]
        rows = np.zeros_like(starts)
        return Windows(values, starts, rows, context_len=context_len, horizon=horizon)  # pyright: ignore[reportArgumentType]

    return Pool(
        part("train"), part("val") if "val" in facts["parts"] else None, tuple(facts["notes"])
    )


def read_folder(folder: str | Path, *, leave_out: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Read every series of a folder by "file/name": float32 [T], NaN = missing. Formats: module
    docstring.

    Args:
      folder: it holds the files.
      leave_out: names of files, without what follows the first dot, that are not read, such as
        those of which a data set for evaluation is made.
    Raises: FileNotFoundError; ValueError for a name in `leave_out` that no file has; DataError
      listing every file that cannot be read and why.
    """
    folder = Path(folder)
    files = (
        sorted(f for f in folder.iterdir() if f.name.endswith(SUFFIXES)) if folder.is_dir() else []
    )
    if not files:
        raise FileNotFoundError(f"{folder} is not a folder with {', '.join(SUFFIXES)} files")
    if unknown := set(leave_out) - {file.name.split(".")[0] for file in files}:
        raise ValueError(f"{folder} has no files called {', '.join(sorted(unknown))} to leave out")
    files = [file for file in files if file.name.split(".")[0] not in leave_out]
    series, problems = {}, []
    for file in files:
        try:
            found = _read_npz(file) if file.suffix == ".npz" else _read_table(file)
            if not found:
                raise ValueError("no numeric column")
            series |= {f"{file.name.split('.')[0]}/{name}": x for name, x in found.items()}
        except (
            Exception
        ) as err:  # zip, csv and parquet readers raise what they please: all are collected
            problems.append(f"{file.name}: {type(err).__name__}: {err}")
    if problems:
        raise DataError(f"{folder}: cannot read\n  " + "\n  ".join(problems))
    return series


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledWindows:
    """Windows in which each window has the scale of its own context: mean 0, std 1 there, values
    cut at +-`limit`.

    What a loss over series of all sizes needs. A context much calmer than its target counts with a
    twentieth of the window's std. A pytree like `Windows`; stands in for it wherever `n` and
    `gather` are all that is asked for.
    """

    windows: Windows
    limit: float = 10.0
    n_past: ClassVar[int] = 0  # a corpus has no covariates
    n_known: ClassVar[int] = 0

    @property
    def n(self) -> int:
        """Number of windows."""
        return self.windows.n

    @property
    def horizon(self) -> int:
        """Rows of a target."""
        return self.windows.horizon

    @property
    def joint(self) -> bool:
        """Whether a window holds all variates."""
        return self.windows.joint

    @property
    def rows(self) -> jax.Array | None:
        """The variate of each window."""
        return self.windows.rows

    def over(self, mesh: Mesh | None) -> "ScaledWindows":
        """As `Windows.over`."""
        return dataclasses.replace(self, windows=self.windows.over(mesh))

    def gather(self, indices: jax.Array) -> dict[str, jax.Array]:
        """As `Windows.gather`, scaled per window and variate."""
        batch = self.windows.gather(indices)
        x, y = batch["context"], batch["target"]
        mean = x.mean(-1, keepdims=True)
        floor = 0.05 * jnp.concatenate([x, y], axis=-1).std(-1, keepdims=True)
        std = jnp.maximum(jnp.maximum(x.std(-1, keepdims=True), floor), 1e-12)
        scaled = {"context": (x - mean) / std, "target": (y - mean) / std}
        return batch | jax.tree.map(lambda v: jnp.clip(v, -self.limit, self.limit), scaled)


jax.tree_util.register_dataclass(ScaledWindows, data_fields=["windows"], meta_fields=["limit"])


def _fill(x, missing):
    """The last value before each hole, the first value of all at the head."""
    last = np.maximum.accumulate(np.where(missing, -1, np.arange(x.size)))
    return x[np.where(last < 0, np.argmin(missing), last)]


def _before(flags):
    """Number of True before each place: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(flags)])


def _read_npz(file):
    # opened here, as numpy leaves a file open that is no zip; allow_pickle stays off: the file is
    # data
    with open(file, "rb") as opened, np.load(opened) as z:
        if absent := {"values", "offsets"} - set(z.files):
            raise ValueError(
                f"lacks {', '.join(sorted(absent))}; it has {', '.join(z.files) or 'nothing'}"
            )
        values, offsets = np.asarray(z["values"], np.float32), z["offsets"]
        names = z["names"] if "names" in z.files else np.arange(offsets.size - 1)
    bounds = (
        offsets.ndim == 1 and offsets.size > 1 and (offsets[0], offsets[-1]) == (0, values.size)
    )
    if not bounds or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must rise from 0 to {values.size}, the number of values")
    if len(names) != offsets.size - 1:
        raise ValueError(f"{len(names)} names for {offsets.size - 1} series")
    return {f"{i}:{name}": values[offsets[i] : offsets[i + 1]] for i, name in enumerate(names)}


def _read_table(file):
    import pandas as pd  # slow to import, and only tables need it

    frame = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    numeric = frame.select_dtypes("number")
    return {
        str(name): numeric[name].to_numpy(np.float32, na_value=np.nan) for name in numeric.columns
    }
