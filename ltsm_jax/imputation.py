"""`impute`: a table without holes, and which cells were filled.

A model reconstructs windows around the holes of each item. Its values are taken as they are, or
with both ends of a fill moved to the values beside it (`tasks.imputation.anchored`), which is good
for short holes. Which is better, and whether it beats a straight line, is measured on cells of the
same table that are known, hidden in holes of the same form: each column is filled by the best, and
by the line where no other is clearly better.
"""

import dataclasses
import functools
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ltsm_jax import storage
from ltsm_jax.data import DataError, Panel, Series
from ltsm_jax.data.benchmarks import BENCHMARKS, load_series
from ltsm_jax.data.panel_tables import read_panel
from ltsm_jax.methods.binding import Data, check_params, ready_for
from ltsm_jax.methods.run import run
from ltsm_jax.methods.strategies import Strategy, strategy
from ltsm_jax.methods.task_data import imputation_of
from ltsm_jax.models import Model
from ltsm_jax.plotting import NO_PICTURES, new_figure
from ltsm_jax.tasks import imputation
from ltsm_jax.tasks.batches import in_batches
from ltsm_jax.training import TrainConfig
from ltsm_jax.trees import Params

Fill = Literal["auto", "anchored", "model", "linear"]
FILLS: tuple[Fill, ...] = ("anchored", "model", "linear")  # the first where nothing can be measured
WORDS = {"anchored": "model, anchored", "model": "model", "linear": "straight line"}
FILLED = "_filled"  # behind the name of a target: the name of its flags
CHECKED = (
    0.05  # share of the known cells that are hidden to compare with the straight line, at least
)
SPANS = 8  # of time in each item, whose errors say how sure a comparison is
SURE = 1.5  # standard errors by which a model has to be better than the straight line
BATCH = 64  # windows per forward pass
DRAWN = 6  # columns that are drawn


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Imputed:
    """Result of `impute`; print it.

    Attributes:
      table: a row per row of the data, item by item: ids, stamps (or "row"), the targets without
        holes, and for each target "<name>_filled", True where a cell was filled. Known cells are
        what they were.
      check: a row per target with holes: `cells` that were known and hidden, `anchored_mse`,
        `model_mse` and `linear_mse` there (in units of the item's variance; NaN where it was not
        measured), and `filled_by`, one of "anchored", "model" and "linear".
      panel: what was read. params: what filled it, tuned where a method was asked for.
      notes: what was done, in words.
    """

    table: pd.DataFrame
    check: pd.DataFrame
    panel: Panel
    params: Params
    notes: tuple[str, ...] = ()

    @property
    def n_filled(self) -> int:
        """Number of cells that were filled."""
        return int(
            self.table[[f"{name}{FILLED}" for name in self.panel.columns]].to_numpy(bool).sum()
        )

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the targets of the first item with the filled cells marked; returns the matplotlib
        Figure.

        path: file to write (.png, .svg, .pdf), or None.
        Raises: ImportError with what to install.
        """
        shown = self.panel.columns[:DRAWN]
        try:
            figure, axes = new_figure(
                9, 2 * len(shown), nrows=len(shown), sharex=True, squeeze=False
            )
        except ImportError as error:
            raise ImportError(NO_PICTURES) from error
        first = self.table.iloc[: self.panel.bounds[1]]
        x = first[self.panel.time_name or "row"]
        if isinstance(x.dtype, pd.DatetimeTZDtype):
            x = x.dt.tz_localize(None)
        for ax, name in zip(axes[:, 0], shown, strict=True):
            values, filled = first[name].to_numpy(float), first[f"{name}{FILLED}"].to_numpy(bool)
            ax.plot(x, np.where(filled, np.nan, values), color="#334155", linewidth=0.8)
            ax.plot(x[filled], values[filled], ".", color="#D55E00", markersize=3)
            ax.set_title(str(name), fontsize="medium", loc="left")
        if path is not None:
            figure.savefig(storage.user_path(path))
        return figure

    def __str__(self) -> str:
        cells = self.panel.values.size
        lines = [f"{self.panel.name}: {self.n_filled:,} of {cells:,} cells filled"]
        for row in self.check.to_dict("records"):
            said = f"  {row['column']}: by the {WORDS[row['filled_by']]}"
            if row["cells"]:
                mse = [f"{WORDS[name]} {row[f'{name}_mse']:.4g}" for name in FILLS]
                said += f"; on {row['cells']:,} known cells, hidden alike: MSE {', '.join(mse)}"
            lines.append(said)
        return "\n".join([*lines, *self.notes])

    def __repr__(self) -> str:
        return (
            f"<Imputed {self.panel.name}: {self.n_filled} of {self.panel.values.size} cells filled>"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def impute(
    model: Model,
    params: Params,
    data: Data | Panel,
    *,
    fill: Fill = "auto",
    method: str | Strategy = "zero_shot",
    target: str | Sequence[str] | None = None,
    time: str | Sequence[str] | None = None,
    id: str | Sequence[str] | None = None,
    freq: str | None = None,
    date_format: str | None = None,
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
    seed: int = 0,
    config: TrainConfig | None = None,
    show_progress: bool = True,
) -> Imputed:
    """Fill the empty cells of a table, wide or long, of any length.

    Rows behind the last value of an item are the future, not holes, and are left away. A target of
    an item that holds no value at all stays empty.

    Args:
      model, params: from `ltsm_jax.load`, of a family that does imputation (timer, moment, units).
      data: a benchmark name, a CSV or parquet file, a DataFrame, a `Series` or a `Panel`.
      fill: "model"; "anchored", the model with the ends of each fill moved to the values beside it;
        "linear", the straight line; "auto": the one of the lowest error on known cells of the
        column that were hidden in holes of the same form, the straight line unless another is
        clearly better (see `_chosen`).
      method: a name of `methods.strategies.STRATEGIES`, or a `Strategy`: how to tune on the table
        before; by default not at all. For a table of one item.
      target, time, id, freq, date_format, irregular, name: how a table is read, see
        `data.panel_tables.PanelOptions`.
        `irregular="regularise"` makes rows of the stamps that a table leaves out, and they are
        filled too.
      seed, config, show_progress: of tuning, as for `ltsm_jax.fit`.
    Raises: ValueError for a model without the task, and data that cannot be read.
    Example: `ltsm_jax.impute(*ltsm_jax.load("timer-tiny-imputation"), "sensors.csv").table`
    """
    if fill not in ("auto", *FILLS):
        raise ValueError(f"fill must be auto, {', '.join(FILLS)}; got {fill!r}")
    check_params(model, params)
    model.check_task("imputation")
    chosen = strategy(method) if isinstance(method, str) else method
    asked = {
        "target": target,
        "time": time,
        "id": id,
        "freq": freq,
        "date_format": date_format,
        "irregular": irregular,
        "name": name,
    }
    panel = read_for_imputation(
        data, **{key: value for key, value in asked.items() if value is not None}
    )
    taken = {*panel.id_columns, panel.time_name or "row", *panel.columns}
    if clash := sorted(f"{c}{FILLED}" for c in panel.columns if f"{c}{FILLED}" in taken):
        raise DataError(
            f"{panel.name}: {', '.join(clash)} is also the name of a flag of the result; rename it"
        )
    notes = list(panel.notes)
    model, params = ready_for(model, params, panel.item(0), seed=seed)
    if chosen.phases:
        if panel.n_items > 1:
            raise DataError(
                f"{panel.name}: tuning takes a table of one item, not of {panel.n_items}"
            )
        prepared, task = imputation_of(model, panel.item(0))
        params = run(
            model,
            params,
            chosen,
            data=prepared,
            task=task,
            seed=seed,
            config=config,
            test=False,
            show_progress=show_progress,
        ).params
        notes.append(f"tuned on the table by {chosen.name}")

    values, check = _filled(model, params, panel, fill=fill)
    if left := int(np.isnan(values).sum()):
        notes.append(f"{left:,} cells are left empty: their target holds no value in that item")
    return Imputed(
        table=_table(panel, values), check=check, panel=panel, params=params, notes=tuple(notes)
    )


def read_for_imputation(data: Data | Panel, **options: Any) -> Panel:
    """Read what `impute` fills; options as there."""
    if isinstance(data, str) and data in BENCHMARKS:
        return Panel.of(load_series(data, **options))
    if isinstance(data, Panel | Series):
        return read_panel(data, **options)
    # A column that ends before the others has holes there: nothing is forecast that might begin
    # behind it.
    return read_panel(data, early_ends="holes", **options)


def _table(panel: Panel, values: np.ndarray) -> pd.DataFrame:
    """Set the filled values [C, R] as the table that a user gets."""
    items = np.repeat(np.arange(panel.n_items), panel.lengths)
    columns: dict[str, Any] = {}
    if panel.id_parts is not None:
        columns |= {str(name): panel.id_parts[name].to_numpy()[items] for name in panel.id_parts}
    elif panel.id_name is not None:
        columns[panel.id_name] = panel.ids[items]
    place = np.arange(panel.n_rows) - panel.bounds[items]
    stamps = [panel.item(i) for i in range(panel.n_items)] if panel.first is not None else []
    if stamps and all(one.timestamps is not None for one in stamps):
        joined = np.concatenate([one.timestamps for one in stamps if one.timestamps is not None])
        columns[panel.time_name or "time"] = stamps[0].in_zone(joined)
    else:
        columns["row"] = place
    columns |= {str(name): row for name, row in zip(panel.columns, values, strict=True)}
    was_empty = np.isnan(panel.values) & ~np.isnan(values)
    columns |= {f"{name}{FILLED}": row for name, row in zip(panel.columns, was_empty, strict=True)}
    return pd.DataFrame(columns)


# --- what goes into a hole


def _filled(
    model: Model,
    params: Params,
    panel: Panel,
    fill: Fill,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Fill the holes of all items. Returns: values [C, R], and `Imputed.check`."""
    ways = {
        "anchored": functools.partial(_by_model, model, params, True),
        "model": functools.partial(_by_model, model, params, False),
        "linear": _by_line,
    }
    asked = FILLS if fill == "auto" else (fill,)
    holes = np.isnan(panel.values)
    counts = np.zeros(panel.n_variates, int)
    blocks = []  # [K, C, N] each: squared errors of each way, summed over spans of time
    guesses = np.stack([panel.values] * len(asked))
    for lo, hi in zip(panel.bounds[:-1], panel.bounds[1:], strict=True):
        known = panel.values[:, lo:hi]
        if not holes[:, lo:hi].any():
            continue
        mean, std = _scale(known)
        scaled = (known - mean) / std
        extra = _like_holes(np.isnan(known)) if fill == "auto" else np.zeros_like(known, bool)
        counts += extra.sum(axis=1)
        errors = np.zeros((len(asked), *known.shape))
        for k, name in enumerate(asked):
            guesses[k, :, lo:hi] = ways[name](scaled) * std + mean
            if extra.any():
                again = ways[name](np.where(extra, np.nan, scaled))
                errors[k] = np.square(np.where(extra, again - scaled, 0.0))
        edges = np.unique(np.linspace(0, hi - lo, SPANS, endpoint=False).astype(int))
        blocks.append(np.add.reduceat(errors, edges, axis=2))
    errors_KCN = (
        np.concatenate(blocks, axis=2) if blocks else np.zeros((len(asked), panel.n_variates, 1))
    )
    best = _chosen(errors_KCN, asked)
    errors = errors_KCN.sum(axis=2)
    values = np.where(holes, guesses[best, np.arange(panel.n_variates)], panel.values)
    rows = []
    for c in np.flatnonzero(holes.any(axis=1)):
        row: dict[str, Any] = {"column": str(panel.columns[c]), "cells": int(counts[c])}
        row |= {f"{name}_mse": np.nan for name in FILLS}
        if counts[c]:
            row |= {f"{name}_mse": errors[k, c] / counts[c] for k, name in enumerate(asked)}
        rows.append(row | {"filled_by": asked[best[c]]})
    columns = ["column", "cells", *(f"{name}_mse" for name in FILLS), "filled_by"]
    return values, pd.DataFrame(rows, columns=columns)


def _chosen(errors_KCN: np.ndarray, asked: Sequence[str]) -> np.ndarray:
    """Choose the way to fill each column [C], by squared errors of K ways in N spans of time.

    The way of the lowest error, but the straight line unless that way is better by more than `SURE`
    standard errors of the difference over spans: a lower sum that comes from a single event of the
    column (rain, a spike; it alone makes one standard error) is no reason to expect one elsewhere.
    """
    if "linear" not in asked or len(asked) == 1:
        return errors_KCN.sum(axis=2).argmin(axis=0)
    line = asked.index("linear")
    gain_KCN = errors_KCN[line] - errors_KCN
    n_spans = gain_KCN.shape[2]
    doubt_KC = (
        gain_KCN.std(axis=2, ddof=1) / np.sqrt(n_spans)
        if n_spans > 1
        else np.zeros(gain_KCN.shape[:2])
    )
    eligible_KC = gain_KCN.mean(axis=2) > SURE * doubt_KC
    eligible_KC[line] = True
    # Where nothing could be hidden, nothing speaks for the line either: the first way.
    eligible_KC |= ~errors_KCN.any(axis=(0, 2))
    return np.where(eligible_KC, errors_KCN.sum(axis=2), np.inf).argmin(axis=0)


def _scale(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [C, 1] of what is known of values [C, T]; 0 and 1 where nothing is, or all is
    one value."""
    there = ~np.isnan(known)
    n = np.maximum(there.sum(axis=1, keepdims=True), 1)
    mean = np.where(there, known, 0.0).sum(axis=1, keepdims=True) / n
    std = np.sqrt(np.square(np.where(there, known - mean, 0.0)).sum(axis=1, keepdims=True) / n)
    return mean, np.where(std > 0, std, 1.0)


def _like_holes(holes: np.ndarray) -> np.ndarray:
    """Choose known cells [C, T] to hide: the holes moved in time, as often as it takes to hide a
    share `CHECKED`."""
    n_rows = holes.shape[1]
    found = np.zeros_like(holes)
    for c, row in enumerate(holes):
        share = row.mean()
        if not 0 < share < 1:
            continue
        times = int(np.clip(np.ceil(CHECKED / share), 1, 8))
        for k in range(times):
            found[c] |= np.roll(row, (k + 1) * n_rows // (times + 1))
    return found & ~holes


def _by_line(scaled: np.ndarray) -> np.ndarray:
    """Fill NaN of [C, T] by linear interpolation, at the ends with the nearest value; a row of NaN
    stays so."""
    filled = scaled.copy()
    every = np.arange(scaled.shape[1])
    for row in filled:
        bad = np.isnan(row)
        if bad.any() and not bad.all():
            row[bad] = np.interp(every[bad], every[~bad], row[~bad])
    return filled


def _by_model(model: Model, params: Params, anchor: bool, scaled: np.ndarray) -> np.ndarray:
    """Fill NaN of [C, T] by the model. anchor: with the ends of each fill moved.

    Windows overlap by three quarters, and a cell is taken from the one that has it nearest to its
    middle. Where a window knows less than a patch of a variate, the straight line stands in.
    """
    patch = getattr(model.config, "patch_len", 1)
    window = max(model.context_len // patch, 2) * patch
    n_variates, n_rows = scaled.shape
    # A patch in front, of which nothing is known, so that the first rows may be asked for too.
    length = max(patch + n_rows, window)
    padded = np.full((n_variates, length), np.nan, np.float32)
    padded[:, patch : patch + n_rows] = scaled
    stride = max(window // (4 * patch), 1) * patch
    starts = np.unique(np.append(np.arange(0, length - window, stride), length - window))
    asked = np.isnan(padded)
    asked[:, :patch] = asked[:, patch + n_rows :] = False
    joint = model.variates == "joint"
    jobs = []
    for start in starts:
        rows = np.flatnonzero(asked[:, start : start + window].any(axis=1))
        if len(rows):
            jobs += (
                [(start, np.arange(n_variates))]
                if joint
                else [(start, np.array([row])) for row in rows]
            )
    if not jobs:
        return scaled
    windows = np.stack([padded[rows, start : start + window] for start, rows in jobs])
    guesses = in_batches(
        lambda i: _reconstruct(model, params, anchor, windows=windows, indices=i), len(jobs), BATCH
    )

    line = _by_line(scaled)
    filled = np.full((n_variates, length), np.nan)
    filled[:, patch : patch + n_rows] = line
    nearest = np.zeros((n_variates, length), int)
    centred = np.minimum(np.arange(window) + 1, window - np.arange(window))
    for (start, rows), guess, shown in zip(jobs, guesses, windows, strict=True):
        enough = (~np.isnan(shown)).sum(axis=1) >= patch
        cut = (rows[enough][:, None], np.arange(start, start + window)[None])
        better = (centred > nearest[cut]) & asked[cut] & np.isfinite(guess[enough])
        filled[cut] = np.where(better, guess[enough], filled[cut])
        nearest[cut] = np.where(better, centred, nearest[cut])
    return np.where(np.isnan(scaled), filled[:, patch : patch + n_rows], scaled)


def _reconstruct(
    model: Model,
    params: Params,
    anchor: bool,
    windows: np.ndarray,
    indices: Any,
) -> jax.Array:
    return _guess(model, params, anchor, x_BCT=jnp.asarray(windows[np.asarray(indices)]))


@functools.partial(jax.jit, static_argnames=("model", "anchor"))
def _guess(model: Model, params: Params, anchor: bool, x_BCT: jax.Array) -> jax.Array:
    y_BCT = imputation.filled(model, params, x_BCT)
    return imputation.anchored(y_BCT, x_BCT) if anchor else y_BCT
