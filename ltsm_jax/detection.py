"""`detect`: an anomaly score for every row of a table, and which rows are out of the ordinary.

The model says what it expects at each row from the rows around or before it, and the squared error,
in units of what is usual on the first part of the table, is the score. The threshold is a quantile
of the scores on that first part, which is taken to be free of anomalies.
"""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from ltsm_jax import storage
from ltsm_jax.data import DataError, Scaler, Series
from ltsm_jax.data.tables import ReadingOptions
from ltsm_jax.methods.binding import Data, as_series, check_params, ready_for
from ltsm_jax.methods.run import run
from ltsm_jax.methods.strategies import Strategy, strategy
from ltsm_jax.methods.task_data import anomaly_of
from ltsm_jax.models import Model
from ltsm_jax.plotting import NO_PICTURES, new_figure
from ltsm_jax.tasks import anomaly
from ltsm_jax.tasks.detection_scores import spans_of
from ltsm_jax.training import TrainConfig
from ltsm_jax.trees import Params

FEWEST = 100  # rows that a threshold is chosen on
SHOWN = 10  # ranges that are printed
RESULT = ("score", "anomalous", "column")  # names of what is found
DRAWN = 6  # columns that are drawn
TINY = 1e-12


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detected:
    """Result of `detect`; print it.

    Attributes:
      table: a row per row of the data: the stamps (or "row"), the targets, `score` (1: the mean of
        the first part; NaN where nothing is known: the first 96 rows, and empty cells), `anomalous`
        (False in the first part), and with several targets `column`, the one with the highest
        score.
      threshold: rows of a higher score are anomalous. first_rows: rows of the first part.
      series: what was scored. params: what scored it, tuned where a method was asked for.
      notes: what was done, in words.
    """

    table: pd.DataFrame
    threshold: float
    first_rows: int
    series: Series
    params: Params
    notes: tuple[str, ...] = ()

    @property
    def n_anomalous(self) -> int:
        """Number of anomalous rows."""
        return int(self.table["anomalous"].to_numpy(bool).sum())

    def ranges(self) -> pd.DataFrame:
        """Give the runs of anomalous rows, the highest score first.

        Columns: from, to (both inclusive), rows, score (the highest of the run)."""
        time = self.table.columns[0]
        rows = []
        for first, last in spans_of(self.table["anomalous"].to_numpy()):
            part = self.table.iloc[first : last + 1]
            rows.append((part[time].iloc[0], part[time].iloc[-1], len(part), part["score"].max()))
        found = pd.DataFrame(rows, columns=["from", "to", "rows", "score"])
        return found.sort_values("score", ascending=False, ignore_index=True)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the targets with the anomalous rows marked, and the score below; returns the
        matplotlib Figure.

        path: file to write (.png, .svg, .pdf), or None.
        Raises: ImportError with what to install.
        """
        shown = self.series.columns[:DRAWN]
        try:
            figure, axes = new_figure(9, 2 * (len(shown) + 1), nrows=len(shown) + 1, sharex=True)
        except ImportError as error:
            raise ImportError(NO_PICTURES) from error
        x = self.table.iloc[:, 0]
        if isinstance(x.dtype, pd.DatetimeTZDtype):
            x = x.dt.tz_localize(None)
        marked = self.table["anomalous"].to_numpy()
        for ax, name, values in zip(axes, shown, self.series.values, strict=False):
            ax.plot(x, values, color="#334155", linewidth=0.8)
            ax.plot(x[marked], values[marked], "o", color="#D55E00", markersize=3)
            ax.set_title(str(name), fontsize="medium", loc="left")
        score = axes[-1]
        score.plot(x, self.table["score"], color="#0072B2", linewidth=0.8)
        score.axhline(self.threshold, color="#D55E00", linewidth=0.8, linestyle="--")
        score.axvspan(x.iloc[0], x.iloc[self.first_rows - 1], color="#E6E6E6", linewidth=0)
        title = "score; dashed: threshold, grey: the part it was chosen on"
        score.set_title(title, fontsize="medium", loc="left")
        if (self.table["score"].to_numpy(float) > 0).any():
            score.set_yscale("log")
        if path is not None:
            figure.savefig(storage.user_path(path))
        return figure

    def __str__(self) -> str:
        count = self.n_anomalous
        after = len(self.table) - self.first_rows
        lines = [
            f"{self.series.name}: {count:,} of {after:,} rows are anomalous (score above "
            f"{self.threshold:.3g}; threshold from the first {self.first_rows:,} rows)"
        ]
        ranges = self.ranges()
        for _, one in ranges.head(SHOWN).iterrows():
            lines.append(
                f"  {one['from']} to {one['to']}: {one['rows']} rows, score up to "
                f"{one['score']:.3g}"
            )
        if len(ranges) > SHOWN:
            lines.append(f"  and {len(ranges) - SHOWN} more ranges")
        return "\n".join([*lines, *self.notes])

    def __repr__(self) -> str:
        count = self.n_anomalous
        return f"<Detected {self.series.name}: {count} of {len(self.table)} rows anomalous>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def detect(
    model: Model,
    params: Params,
    data: Data,
    *,
    first: float = 0.3,
    quantile: float = 0.995,
    method: str | Strategy = "zero_shot",
    target: str | Sequence[str] | None = None,
    time: str | None = None,
    id: str | None = None,
    freq: str | None = None,
    date_format: str | None = None,
    missing: Literal["error", "interpolate", "keep"] = "error",
    irregular: Literal["error", "regularise", "ignore"] | None = None,
    name: str | None = None,
    seed: int = 0,
    config: TrainConfig | None = None,
    show_progress: bool = True,
) -> Detected:
    """Score every row of a table, and flag those above a threshold chosen on its first part.

    A row's score is the largest of its targets' squared errors, each over its mean on the first
    part. Every target is looked at by itself. Labels are not needed and not used.

    Args:
      model, params: from `ltsm_jax.load`, of a family that does anomaly detection (timer, moment,
        units).
      data: a benchmark name, a CSV or parquet file, a DataFrame, or a `Series`.
      first: share of the rows, from the first on, that hold nothing unusual; at least 196 rows.
      quantile: of the scores on that part: the threshold. Of 1,000 ordinary rows about
        1,000 * (1 - quantile) are flagged.
      method: a name of `methods.strategies.STRATEGIES`, or a `Strategy`: how to tune on the first
        part before; by default not at all.
      target, time, id, freq, date_format, missing, irregular, name: how a table is read, see
        `data.tables.ReadingOptions`.
      seed, config, show_progress: of tuning, as for `ltsm_jax.fit`.
    Raises: ValueError for a model without the task, data that cannot be read, a table that is too
      short, and shares out of range.
    Example: `print(ltsm_jax.detect(*ltsm_jax.load("timer-tiny"), "machine.csv", first=0.5))`
    """
    if not 0 < first < 1 or not 0 < quantile < 1:
        raise ValueError(
            f"first and quantile are shares between 0 and 1; got {first} and {quantile}"
        )
    check_params(model, params)
    model.check_task("anomaly")
    chosen = strategy(method) if isinstance(method, str) else method
    options = ReadingOptions(
        target=target,
        time=time,
        id=id,
        freq=freq,
        date_format=date_format,
        missing=missing,
        irregular=irregular,
        name=name,
    )
    series = as_series(data, options)
    if taken := [name for name in RESULT if name in map(str, series.columns)]:
        raise DataError(
            f"{series.name}: a target is called {', '.join(taken)}, as a column of the result is; "
            "rename it"
        )
    model, params = ready_for(model, params, series, seed=seed)
    cut = int(first * series.n_rows)
    window = _window(series, cut)
    values = Scaler.fit(series.values[:, :cut]).transform(series.values).astype(np.float32)

    notes = list(series.notes)
    if chosen.phases:
        params = _tuned(
            model,
            params,
            chosen,
            name=series.name,
            values=values,
            cut=cut,
            seed=seed,
            config=config,
            show_progress=show_progress,
        )
        notes.append(f"tuned on the first {cut:,} rows by {chosen.name}")
    errors = np.full(values.shape, np.nan)
    for column, row in enumerate(values):
        rows = (anomaly.TOKEN, series.n_rows)
        errors[column, anomaly.TOKEN :] = anomaly.row_errors(
            model, params, row[None], rows=rows, window=window
        )
    notes.append(f"the first {anomaly.TOKEN} rows are context alone and have no score")
    return _detected(series, errors, cut, quantile=quantile, params=params, notes=notes)


def _window(series: Series, cut: int) -> int:
    """Choose the rows of a window: 768, or fewer where the table is short.

    Raises: DataError for a table, or a first part, that is too short to be scored.
    """
    problems = []
    if series.n_rows < anomaly.SHORTEST_WINDOW:
        problems.append(
            f"{series.n_rows} rows are too few: at least {anomaly.SHORTEST_WINDOW} are needed"
        )
    if cut < anomaly.TOKEN + FEWEST:
        problems.append(
            f"its first part has {cut} rows, and a threshold needs {anomaly.TOKEN + FEWEST}: take "
            "a larger first= or a longer table"
        )
    if problems:
        raise DataError(f"{series.name}: " + "; ".join(problems))
    return min(anomaly.WINDOW, series.n_rows // anomaly.TOKEN * anomaly.TOKEN)


def _tuned(
    model: Model,
    params: Params,
    chosen: Strategy,
    name: str,
    values: np.ndarray,
    cut: int,
    seed: int,
    config: TrainConfig | None,
    show_progress: bool,
) -> Params:
    """Tune on the first part, whose last 10 % select the epoch."""
    prepared, task = anomaly_of(name, values, cut)
    result = run(
        model,
        params,
        chosen,
        data=prepared,
        task=task,
        seed=seed,
        config=config,
        test=False,
        show_progress=show_progress,
    )
    return result.params


def _detected(
    series: Series,
    errors: np.ndarray,
    cut: int,
    quantile: float,
    params: Params,
    notes: Sequence[str],
) -> Detected:
    """Turn the squared errors of each target [C, T] into scores, a threshold and flags."""
    known = ~np.isnan(errors)
    usual = [row[:cut][there[:cut]] for row, there in zip(errors, known, strict=True)]
    if empty := [str(c) for c, row in zip(series.columns, usual, strict=True) if len(row) < FEWEST]:
        raise DataError(
            f"{series.name}: fewer than {FEWEST} known rows in the first part of {', '.join(empty)}"
        )
    means = np.array([max(row.mean(), TINY) for row in usual])
    # Rows without any known cell have no score; elsewhere an unknown cell cannot be the largest.
    relative = np.where(known, errors / means[:, None], -np.inf)
    scores = np.where(known.any(axis=0), relative.max(axis=0), np.nan)
    before = scores[:cut]
    threshold = float(np.quantile(before[~np.isnan(before)], quantile))
    flagged = np.nan_to_num(scores, nan=-np.inf) > threshold
    flagged[:cut] = False

    if series.timestamps is None:
        columns: dict[str, Any] = {"row": np.arange(series.n_rows)}
    else:
        columns = {series.time_name or "time": series.in_zone(series.timestamps)}
    columns |= {str(name): row for name, row in zip(series.columns, series.values, strict=True)}
    columns |= {"score": scores, "anomalous": flagged}
    if series.n_variates > 1:
        highest = np.array(series.columns, object)[relative.argmax(axis=0)]
        columns["column"] = np.where(known.any(axis=0), highest, "")
    return Detected(
        table=pd.DataFrame(columns),
        threshold=threshold,
        first_rows=cut,
        series=series,
        params=params,
        notes=tuple(notes),
    )
