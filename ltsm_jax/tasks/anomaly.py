"""Anomaly detection on the UCR Anomaly Archive: one model per file, a score per token, the rank of
the anomaly.

The protocol of Timer (thuml/Large-Time-Series-Model) and of Smoothed Full Fine-tuning
(Meteor-Stars/SFF): a model is tuned on windows of 768 rows of the anomaly-free beginning of a
series; then windows of 768, 576 apart, run over the rest, and each token of 96 rows is scored by
the error the model makes there. Token t covers rows [b + 96 t, b + 96 (t + 1)), b the end of the
training rows. The result of a file is the rank of the first token that overlaps the anomaly when
tokens are sorted by score, and rank / tokens: the smallest share of the tokens that must be flagged
to find it. The papers call that share alpha, and so do the columns of results; it has nothing to do
with the alpha that mixes models.

Where the released code departs from that by mistake, the correct behaviour is the default and the
released one a named quirk:

| quirk | effect |
| --- | --- |
| `select_on_test` | the validation error, which selects the epoch, is measured on the test rows |
| `touching_is_hit` | a token that ends exactly where the anomaly begins counts as overlapping it |
| `uncovered_is_hit` | only whole windows are scored; an anomaly in the rows after them has rank 1 |

By default the last 10 % of the training rows are held out for validation, overlap is that of
half-open ranges, and the rows after the last whole window are scored by one more window that ends
with the series.

Other archives (`ltsm_jax.tasks.labelled`) go the same way: a series may have several labelled
anomalies, of which the first to be found counts, and a shorter beginning takes shorter windows
(`scale_series(window=...)`).

Series of any length up to `ROWS` share one compilation, as arrays are filled up to fixed sizes.
"""

import dataclasses
import functools
import gzip
import itertools
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import storage
from ltsm_jax.data.series import DataError
from ltsm_jax.data.splits import Scaler
from ltsm_jax.data.windows import Windows, windows_between
from ltsm_jax.layers.missing import mse_observed
from ltsm_jax.models.family import Batch, Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Loss, Part, Source
from ltsm_jax.tasks.batches import in_batches
from ltsm_jax.trees import Tree

WINDOW, TOKEN = 768, 96
SHORTEST_WINDOW = 3 * TOKEN
# Series and tables of windows are filled up to multiples of these, to share a compilation.
ROWS, STARTS = 2**17, 512
ANOMALY_QUIRKS = frozenset({"select_on_test", "touching_is_hit", "uncovered_is_hit"})
_NAME = re.compile(r"\d+_UCR_Anomaly_.+_(\d+)_(\d+)_(\d+)\.txt(\.gz)?")


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """A series with labelled anomalies: one, as in the UCR archive, or several.

    name: of the file. values [T] float64, data units. train_end b: rows [0, b) are free of
    anomalies.
    anomaly: its first and last row, both inclusive. others: further anomalies.
    """

    name: str
    values: np.ndarray
    train_end: int
    anomaly: tuple[int, int]
    others: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        problems = []
        if self.values.ndim != 1 or not np.isfinite(self.values).all():
            problems.append("it must be one column of finite numbers")
        for first, last in self.spans:
            if not 0 < self.train_end <= first <= last < len(self.values):
                problems.append(
                    f"training rows [0, {self.train_end}) and anomaly rows {first} to {last} must "
                    f"follow one another inside its {len(self.values)} rows"
                )
        if problems:
            raise DataError(f"{self.name}: " + "; ".join(problems))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First and last row of every anomaly."""
        return (self.anomaly, *self.others)


@dataclasses.dataclass(frozen=True)
class Unlabelled:
    """A table of which no anomaly is known: it can be trained on and scored, not ranked."""

    name: str
    spans: tuple[tuple[int, int], ...] = ()


def read_ucr(path: str | Path) -> Labelled:
    """A file of the archive, `<id>_UCR_Anomaly_<name>_<b>_<first>_<last>.txt`, also as `.txt.gz`.

    One value a line, or all on one line.

    Raises: ValueError for another name, text that is no number, or rows that do not fit the labels;
    FileNotFoundError.
    """
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if not match:
        raise DataError(
            f"{path.name} is not named <id>_UCR_Anomaly_<name>_<train end>_<first row>_<last "
            "row>.txt"
        )
    b, first, last = (int(g) for g in match.groups()[:3])
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        values = np.array(text.decode("ascii").split(), dtype=np.float64)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as err:
        raise DataError(f"{path.name} cannot be read as numbers: {err}") from err
    return Labelled(
        name=path.name.removesuffix(".gz").removesuffix(".txt"),
        values=values,
        train_end=b,
        anomaly=(first, last),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledSeries:
    """A labelled series made ready: scaled with its training rows, on the device.

    values: [1, T] float32, scaled units; of an unlabelled table [C, T], whose errors are means over
    its columns.
    train: windows of `window` rows, 768 in the protocol (672 shown, 96 more).
    validate_rows: the rows [lo, hi) whose error selects the epoch. series: where it comes from.
    """

    values: jax.Array
    train: Windows
    validate_rows: tuple[int, int]
    series: Labelled | Unlabelled
    quirks: frozenset[str] = frozenset()
    window: int = WINDOW


def scale_series(
    series: Labelled,
    *,
    holdout: float = 0.1,
    quirks: Collection[str] = frozenset(),
    window: int = WINDOW,
    n_windows: int | None = None,
) -> ScaledSeries:
    """Scale a series with mean and population std of rows [0, b), and cut its training windows,
    stride 1.

    Args:
      holdout: share of the training rows, at their end, kept for validation; not used with quirk
        `select_on_test`.
      quirks: released behaviours to follow, of `ANOMALY_QUIRKS`; they are kept in the result.
      window: rows of a window, a multiple of 96 from 288 on; 768 in the protocol.
      n_windows: take exactly that many training windows, evenly spread over all (some repeatedly
        where there are fewer), so that series of different length train in one compiled program;
        None: each one once.
    Raises: ValueError for unknown quirks, a holdout outside (0, 1), a window of another length, or
    too few rows for one
    training window.
    """
    if window % TOKEN or window < SHORTEST_WINDOW:
        raise ValueError(
            f"window must be a multiple of {TOKEN} from {SHORTEST_WINDOW} on; got {window}"
        )
    quirks = frozenset(quirks)
    if unknown := quirks - ANOMALY_QUIRKS:
        raise ValueError(f"unknown quirks {sorted(unknown)}; there are {sorted(ANOMALY_QUIRKS)}")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout is a share of the training rows, between 0 and 1; got {holdout}")
    b, n_rows = series.train_end, len(series.values)
    on_test = "select_on_test" in quirks
    cut = b if on_test else rows_to_train(b, holdout)
    if cut < window:
        raise DataError(
            f"{series.name}: {cut} training rows are too few for one window of {window}"
            + (
                ""
                if on_test
                else f" ({b - cut} of {b} are held out for validation; holdout= changes that)"
            )
        )
    values = jnp.asarray(
        Scaler.fit(series.values[None, :b]).transform(series.values[None]), jnp.float32
    )
    shown = np.asarray(values)
    if n_windows is not None:
        shown = _filled(shown[:, :cut], ROWS)
    train = windows_between(
        shown, 0, cut, context_len=window - TOKEN, horizon=TOKEN, columns=(series.name,)
    )
    if n_windows is not None:
        train = train.take(np.arange(n_windows) * train.n // n_windows)
    return ScaledSeries(
        values=values,
        train=train,
        validate_rows=(b, n_rows) if on_test else (cut, b),
        series=series,
        quirks=quirks,
        window=window,
    )


def rows_to_train(train_end: int, holdout: float = 0.1) -> int:
    """Count the anomaly-free rows of [0, train_end) to train on; the last ones are held out."""
    return train_end - max(int(train_end * holdout), 1)


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last entry of the last axis up to a multiple of `size`."""
    more = -array.shape[-1] % size
    widths = [(0, 0)] * (array.ndim - 1) + [(0, more)]
    return np.pad(array, widths, mode="edge")


def loss_fn(
    model: Model, *, ims: bool = True
) -> Callable[[Tree, Batch, jax.Array | None, bool], jax.Array]:
    """The training loss `f(params, batch, key, train) -> scalar`: mean squared error, squared units
    of the batch.

    A window is `context` [B, C, L] and `target` [B, C, H] of the batch, one after the other; rows
    count by `weight`, missing values (NaN) do not.

    Args:
      ims: True: each token predicts the next, all but the first are scored. False: the model
        reconstructs the whole window from itself, the default of the released SFF script.
    Raises: ValueError for a model without this task.
    """
    model.check_task("anomaly")

    def loss(params: Tree, batch: Batch, key: jax.Array | None, train: bool) -> jax.Array:
        x_BCT = jnp.concatenate([batch["context"], batch["target"]], axis=-1)
        y_BCT = model.reconstruct(params, x_BCT, key=key, train=train, ims=ims)
        return mse_observed(y_BCT, x_BCT[..., x_BCT.shape[-1] - y_BCT.shape[-1] :], batch)

    return loss


@functools.partial(jax.jit, static_argnames=("model", "ims", "window"))
def _batch_errors(
    model: Model,
    params: Tree,
    values: jax.Array,
    starts: jax.Array,
    indices: jax.Array,
    ims: bool,
    window: int,
) -> jax.Array:
    size = (values.shape[0], window)
    x_BCT = jax.vmap(lambda t: jax.lax.dynamic_slice(values, (0, t), size))(starts[indices])
    y_BCT = model.reconstruct(params, x_BCT, ims=ims)
    if y_BCT.shape[-1] < window - TOKEN:
        raise ValueError(
            f"{model} covers only {y_BCT.shape[-1]} points of a window, scored are {window - TOKEN}"
        )
    return jnp.square(y_BCT - x_BCT[..., window - y_BCT.shape[-1] :]).mean(axis=1)


def _window_errors(
    model: Model,
    params: Tree,
    values: jax.Array,
    starts: np.ndarray,
    ims: bool,
    batch_size: int,
    placement: Placement | None = None,
    window: int = WINDOW,
) -> np.ndarray:
    """Squared errors of the last points of each window [W, 768 - 96], direct mode [W, 768]; float64
    on the host."""
    placement = placement or Placement.of(params)
    filled = _filled(np.asarray(values), ROWS)
    table = _filled(np.asarray(starts, np.int32), STARTS)
    filled, table = placement.replicate((jnp.asarray(filled), jnp.asarray(table)))

    def one_batch(indices: jax.Array) -> jax.Array:
        return _batch_errors(
            model, params, filled, starts=table, indices=indices, ims=ims, window=window
        )

    # A batch is never smaller than asked for: the table goes on with its last window.
    n = len(starts)
    return in_batches(one_batch, max(n, batch_size), batch_size, placement=placement)[:n]


def window_starts(lo: int, hi: int, window: int = WINDOW) -> np.ndarray:
    """First rows of the whole windows that score rows from `lo` on and end by `hi`: lo - 96, then
    576 apart."""
    return np.arange(lo - TOKEN, hi - window + 1, window - 2 * TOKEN)


def row_errors(
    model: Model,
    params: Tree,
    values: jax.Array,
    rows: tuple[int, int],
    *,
    ims: bool = True,
    tail: bool = True,
    batch_size: int = 128,
    placement: Placement | None = None,
    window: int = WINDOW,
) -> np.ndarray:
    """Squared error of the model at each row of [lo, hi), float64, each row once; in the squared
    units of `values`.

    Whole windows start at lo - 96, 576 apart, and each gives its points 96 to 671. The rows after
    them, fewer than 672, come from one more window that ends at `hi`; `tail=False` leaves them out,
    so the result is shorter.

    Args:
      values: [1, T]. Rows before `lo` serve as context, so lo >= 96 and hi >= 768.
      batch_size: windows per forward pass. placement: of the parameters; None: ask them.
      window: rows of a window; another one than 768 changes the numbers above alike.
    Raises: ValueError for rows that leave too little context.
    """
    lo, hi = rows
    if not TOKEN <= lo < hi <= values.shape[-1] or hi < window:
        raise ValueError(
            f"rows [{lo}, {hi}) need {TOKEN} rows before them and {window} in all, of "
            f"{values.shape[-1]}"
        )
    stride = window - 2 * TOKEN
    starts = window_starts(lo, hi, window)
    left = hi - lo - stride * len(starts) if tail else 0
    if left:
        starts = np.append(starts, hi - window)
    if not len(starts):
        return np.zeros(0)
    errors = _window_errors(
        model,
        params,
        values,
        starts=starts,
        ims=ims,
        batch_size=batch_size,
        placement=placement,
        window=window,
    )
    errors = errors[:, -(window - TOKEN) :]
    whole = errors[: len(starts) - bool(left), :stride].ravel()
    return np.concatenate([whole, errors[-1, errors.shape[1] - left :]])


def validation_error(
    model: Model,
    params: Tree,
    task: ScaledSeries,
    *,
    ims: bool = True,
    batch_size: int = 128,
    placement: Placement | None = None,
) -> float:
    """Mean squared error on the rows that select the epoch, scaled units: held-out training rows,
    each row once.

    With quirk `select_on_test`: the mean over all points that the whole test windows predict, as
    released.
    """
    if "select_on_test" not in task.quirks:
        how: dict[str, Any] = {
            "ims": ims,
            "batch_size": batch_size,
            "placement": placement,
            "window": task.window,
        }
        return float(row_errors(model, params, task.values, rows=task.validate_rows, **how).mean())
    starts = window_starts(*task.validate_rows, task.window)
    if not len(starts):
        raise DataError(
            f"{task.series.name}: the test rows {task.validate_rows} hold no whole window of "
            f"{task.window}"
        )
    errors = _window_errors(
        model,
        params,
        task.values,
        starts=starts,
        ims=ims,
        batch_size=batch_size,
        placement=placement,
        window=task.window,
    )
    return float(errors.mean())


@dataclasses.dataclass(frozen=True)
class AnomalyOutcome:
    """Outcome for one file.

    Attributes:
      name: of the file.
      rank: of the first overlapping token, 1 for the highest score; None: the anomaly was missed
        because no scored token overlaps it.
      n_tokens: tokens that were scored.
    """

    name: str
    rank: int | None
    n_tokens: int

    @property
    def share(self) -> float:
        """Share of tokens, from the top, that must be flagged to find the anomaly; 1 for a miss."""
        return 1.0 if self.rank is None else self.rank / self.n_tokens


def token_scores(errors: np.ndarray) -> np.ndarray:
    """Mean of each 96 entries of `errors` [R], [ceil(R / 96)]; the last token may be short."""
    edges = np.arange(0, len(errors), TOKEN)
    return np.add.reduceat(errors, edges) / np.diff(np.append(edges, len(errors)))


def rank_anomaly(
    scores: np.ndarray,
    anomaly: tuple[int, int] | Sequence[tuple[int, int]],
    first_row: int,
    *,
    last_row: int | None = None,
    quirks: Collection[str] = frozenset(),
    name: str = "",
) -> AnomalyOutcome:
    """Place of the first token, by descending score, that overlaps the anomaly.

    Args:
      scores: [tokens]; token t covers rows [first_row + 96 t, first_row + 96 (t + 1)), cut at
        `last_row` (exclusive).
      anomaly: first and last row, inclusive; of several anomalies a list of such.
      quirks: `touching_is_hit` and `uncovered_is_hit` are obeyed.
    Raises: ValueError for no scores, or scores that are not finite (a model that diverged).
    """
    scores = np.asarray(scores)
    if not scores.size or not np.isfinite(scores).all():
        bad = np.sum(~np.isfinite(scores))
        raise ValueError(
            f"{name or 'series'}: {bad} of {scores.size} scores are not finite: did the model "
            "diverge?"
        )
    start = first_row + TOKEN * np.arange(len(scores))
    end = start + TOKEN if last_row is None else np.minimum(start + TOKEN, last_row)
    overlaps = np.zeros(len(scores), bool)
    for first, last in np.atleast_2d(anomaly):
        overlaps |= (start <= last) & (end > first)
        if "touching_is_hit" in quirks:
            overlaps |= end == first
    hits = np.flatnonzero(overlaps[np.argsort(-scores, kind="stable")])
    if hits.size:
        return AnomalyOutcome(name, int(hits[0]) + 1, len(scores))
    return AnomalyOutcome(name, 1 if "uncovered_is_hit" in quirks else None, len(scores))


def evaluate(
    model: Model,
    params: Tree,
    task: ScaledSeries,
    *,
    ims: bool = True,
    tail: bool = True,
    batch_size: int = 128,
    placement: Placement | None = None,
) -> AnomalyOutcome:
    """Scores every token of the test rows and ranks the anomaly.

    Args:
      task: from `scale_series`; its quirks are obeyed.
      ims: as in `loss_fn`. In direct mode the same points of the same windows are scored (the
        released code scores eight tokens a window there and loses track of their rows).
      tail: score the rows after the last whole window too; False leaves them out, and an anomaly
        there is a miss (rank None; with quirk `uncovered_is_hit`, which implies tail=False, rank
        1).
    Raises: ValueError when nothing can be scored or the model gives values that are not finite.
    """
    model.check_task("anomaly")
    series = task.series
    if isinstance(series, Unlabelled):
        raise DataError(f"{series.name}: no anomaly is labelled, so none can be ranked")
    rows = (series.train_end, len(series.values))
    tail = tail and "uncovered_is_hit" not in task.quirks
    errors = row_errors(
        model,
        params,
        task.values,
        rows=rows,
        ims=ims,
        tail=tail,
        batch_size=batch_size,
        placement=placement,
        window=task.window,
    )
    if not errors.size:
        raise DataError(
            f"{series.name}: the test rows {rows} hold no whole window of {task.window}"
        )
    return rank_rows(errors, series, task.quirks)


def rank_rows(
    errors: np.ndarray, series: Labelled, quirks: Collection[str] = frozenset()
) -> AnomalyOutcome:
    """Rank a series by a score of each of its rows from `series.train_end` on, of a model or of
    anything else."""
    first, end = series.train_end, series.train_end + len(errors)
    scores = token_scores(errors)
    return rank_anomaly(scores, series.spans, first, last_row=end, quirks=quirks, name=series.name)


def count_found(
    results: Iterable[AnomalyOutcome], quantiles: Collection[float] = (0.01, 0.03, 0.05, 0.1)
) -> dict[str, Any]:
    """Count the files in which the anomaly is found when the top q of the tokens is flagged.

    Returns: {"files", "missed", "mean_share", "found": {q: number of files with share <= q}}.
    Raises: ValueError for no results.
    """
    results = list(results)
    if not results:
        raise ValueError("no results to summarise")
    shares = np.array([r.share for r in results])
    missed = sum(r.rank is None for r in results)
    return {
        "files": len(results),
        "missed": missed,
        "mean_share": float(shares.mean()),
        "found": {q: int((shares <= q).sum()) for q in quantiles},
    }


@functools.cache
def _loss(model: Model, ims: bool) -> Loss:
    return loss_fn(model, ims=ims)


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """The task of finding the labelled anomaly of a series, `ScaledSeries` by `scale_series`.

    ims: see `loss_fn`.
    """

    ims: bool = True

    @property
    def selects(self) -> str:
        """The mean squared error on the rows held out, see `validation_error`."""
        return "mse"

    def windows(self, model: Model, data: ScaledSeries, part: Part = "train") -> Source:
        """The training windows. Raises: ValueError for another part, which is scored row by row."""
        if part != "train":
            raise ValueError(
                f"anomaly detection has no windows of the part {part!r}: its rows are scored one "
                "by one"
            )
        return data.train

    def loss(self, model: Model) -> Loss:
        """Mean squared error of the reconstruction, see `loss_fn`."""
        return _loss(model, self.ims)

    def evaluate(
        self,
        model: Model,
        params: Tree,
        data: ScaledSeries,
        part: Part = "val",
        placement: Placement | None = None,
    ) -> dict[str, Any]:
        """Score "val" by the mean squared error, "test" by the rank of the anomaly among the
        tokens, see `evaluate`.
        """
        if part == "val":
            return {"mse": validation_error(model, params, data, ims=self.ims, placement=placement)}
        found = evaluate(model, params, data, ims=self.ims, placement=placement)
        return {"rank": found.rank, "alpha": found.share, "tokens": found.n_tokens}

    def baselines(
        self, model: Model, data: ScaledSeries, part: Part = "val"
    ) -> dict[str, dict[str, Any]]:
        """None is known."""
        return {}

    def warnings(
        self, model: Model, params: Tree, data: ScaledSeries, placement: Placement | None = None
    ) -> tuple[str, ...]:
        """Nothing: no kind of collapse is known."""
        return ()

    def facts(self, data: ScaledSeries) -> dict[str, Any]:
        """The options, the series and what selects, and a digest of its values."""
        return {
            "task": "anomaly",
            "ims": self.ims,
            "series": data.series.name,
            "anomaly": list(itertools.chain.from_iterable(data.series.spans)),
            "window": data.window,
            "validate_rows": list(data.validate_rows),
            "task_quirks": sorted(data.quirks),
            "data_sha256": storage.sha256_of({"values": data.values, "train": data.train}),
        }

    def row(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Rank, and the share under its published name alpha."""
        return {name: scores[name] for name in ("rank", "alpha")}
