"""Training, validation and test windows of a panel: rolling origins, item by item.

All items lie one after the other in one long row per target, and a window is a start in that row
from which it stays inside its item. So `Windows` serve a panel as they serve a series: gathering,
training, scoring and checkpoints are the same code.

The last rows of every item are its test part, those before its validation part, the rest trains.
An item that is shorter than a context gets missing values in front of it, as a forecast of it does.

Shapes: N items, C targets, R rows in the layout, W windows, L context rows, H horizon rows.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.data.panel import Panel
from ltsm_jax.data.series import DataError
from ltsm_jax.data.splits import PARTS, borders_of
from ltsm_jax.data.windows import Windows

MOST_TRAIN = 2**20  # training windows in a table; a run of some hundred steps sees fewer
MOST_SCORED = 4096  # windows of validation and of test
MOST_ROWS = 2**31 - 1  # starts are int32
CHUNK = 2**20  # rows that are scaled at a time
SHORTEST_VAL = 0.1  # share of the rows that validate where an item is too short for 70/10/20


@dataclasses.dataclass(frozen=True, eq=False)
class PanelLayout:
    """Placement of a panel's items in the long row of each target, and their units.

    Attributes:
      values: [C + K, R] float32, NaN = missing: targets standardised per item by their training
        rows, then covariates in units of their own around 0, those of the past before those known
        ahead.
      mean, std: [C, N] of these training rows, data units; std is 1 where they do not move.
      front: [N] rows of missing values in front of each item.
      begin: [N] the place of each item's own first row.
      n_past, n_known: how many covariates of each kind there are.
    """

    values: jax.Array
    mean: np.ndarray
    std: np.ndarray
    front: np.ndarray
    begin: np.ndarray
    n_past: int = 0
    n_known: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class PanelSplits:
    """The three parts of a panel as windows; a stand-in for `Splits` wherever windows are used.

    Attributes:
      train, val, test: windows in units standardised per item and target by its training rows.
        Training windows have targets of `horizon` rows; `training` gives them with others.
      panel: what they were cut from. layout: where its items lie.
      edges: [N, 3] int64, counted in the item's own rows: where training, validation and test end.
        An item without a validation and a test part has its length three times.
      most_train, seed: cap of a table of training windows, and of the draw where it is reached.
      repeats: how often a training window stands in its table, so that an epoch of few windows has
        some steps.
      notes: what was done on the way, one line each, those of the panel first.
    """

    train: Windows
    val: Windows
    test: Windows
    panel: Panel
    layout: PanelLayout
    edges: np.ndarray
    most_train: int = MOST_TRAIN
    seed: int = 0
    repeats: int = 1
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the targets."""
        return self.panel.columns

    @property
    def season(self) -> int:
        """Rows in the main season; 1 where there is none."""
        return self.panel.season

    @property
    def timestamps(self) -> np.ndarray | None:
        """First stamp of each item, or None."""
        return self.panel.first

    def training(self, horizon: int) -> Windows:
        """Training windows whose targets have `horizon` rows: that of the cut, or
        its `target_len`.
        """
        have = self.train
        origins = _training_origins(
            self.edges[:, 0], have.context_len, horizon, horizon=have.horizon
        )
        found = _table(
            self.layout,
            origins,
            have.context_len,
            horizon=horizon,
            joint=have.joint,
            columns=self.columns,
            most=self.most_train,
            seed=self.seed,
        ).windows
        return found if self.repeats == 1 else found.take(np.tile(np.arange(found.n), self.repeats))

    def origins(self, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
        """Item [W] of each window, and the row [W] of that item where its target begins."""
        rows = np.asarray(windows.starts, np.int64) + windows.context_len
        item = np.searchsorted(self.layout.begin, rows, side="right") - 1
        return item, rows - self.layout.begin[item]


def cut_panel(
    panel: Panel,
    context_len: int,
    horizon: int,
    *,
    train_context: int | None = None,
    target_len: int | None = None,
    joint: bool = False,
    covariates: Collection[str] = (),
    most_train: int = MOST_TRAIN,
    most_scored: int = MOST_SCORED,
    seed: int = 0,
) -> PanelSplits:
    """Cut a panel into training, validation and test windows that never cross items.

    An item is split 70/10/20 percent where each part holds a horizon; a shorter one tests on its
    last horizon and validates on the tenth of its rows (a horizon at least) before; one with fewer
    than two horizons and a row only trains. Items whose training rows do not move have no unit to
    be scored in and are left out of validation and test. Windows without an observed value in
    their context or their target are left out. `notes` count all of that.

    Args:
      context_len: rows that validation and test windows show: what a forecast would see.
      horizon: rows that are forecast and scored.
      train_context: rows that training windows show; None: as many.
      target_len: most rows that a training target will have (`PanelSplits.training`); None: the
        horizon.
      joint: windows of all targets instead of one each.
      covariates: kinds of the panel's covariates that windows hold, of "past" and "known"; they go
        with windows of all targets.
      most_train, most_scored: caps of the tables. Where there are more windows, as many are drawn,
        one from each of as many equal stretches, so that no hour of a day is preferred.
      seed: of that draw.
    Raises: DataError where no item is long enough to be split, or holds infinite values.
    """
    if context_len < 1 or horizon < 1:
        raise ValueError(
            f"context_len and horizon must be at least 1, got {context_len} and {horizon}"
        )
    train_context = train_context or context_len
    target_len = max(target_len or horizon, horizon)

    if covariates and not joint:
        raise ValueError("covariates go with windows of all targets: joint=True")

    edges = _edges(panel, horizon)
    scored, notes = _long_enough(panel, edges, horizon)

    # Rows that the first window of each item lacks, whichever of the two lengths a target has.
    front = np.where(scored, np.maximum(context_len - edges[:, 0], 0), 0)
    for length in (horizon, target_len):
        first, count = _training_origins(edges[:, 0], train_context, length, horizon=horizon)
        front = np.maximum(front, np.where(count > 0, train_context - first, 0))
    layout, still = _lay_out(panel, edges[:, 0], front, covariates=covariates)
    usable, left_out = _that_move(panel, scored, np.asarray(still.all(axis=0)))
    notes += left_out

    parts = {}
    for part in PARTS:
        if part == "train":
            origins = _training_origins(edges[:, 0], train_context, horizon, horizon=horizon)
            length, most = train_context, most_train
        else:
            lo, hi = edges[:, PARTS.index(part) - 1], edges[:, PARTS.index(part)]
            origins = lo, np.where(usable, hi - lo - horizon + 1, 0)
            length, most = context_len, most_scored
        found = _table(
            layout,
            origins,
            length,
            horizon=horizon,
            joint=joint,
            columns=panel.columns,
            most=most,
            seed=seed,
        )
        notes += _left_out(panel, part, found)
        parts[part] = found.windows
    return PanelSplits(
        **parts,
        panel=panel,
        layout=layout,
        edges=edges,
        most_train=most_train,
        seed=seed,
        notes=(*panel.notes, *notes),
    )


def _long_enough(panel: Panel, edges: np.ndarray, horizon: int) -> tuple[np.ndarray, list[str]]:
    """Tell the items [N] that are long enough to be scored, and say how many are not.

    Raises: DataError where none is.
    """
    scored = edges[:, 0] < edges[:, 2]
    if not scored.any():
        most = (int(panel.lengths.max()) - 1) // 2
        fits = f"the longest allows a horizon of {most}" if most >= 1 else "forecast without tuning"
        raise DataError(
            f"{panel.name}: no item has the {2 * horizon + 1} rows that it takes to train, "
            f"validate and test at a horizon of {horizon}; {fits}"
        )
    if scored.all():
        return scored, []
    short = int((~scored).sum())
    return scored, [
        f"{short} of {panel.n_items} items are too short to be split at horizon {horizon} and "
        "only train"
    ]


def _that_move(panel: Panel, scored: np.ndarray, flat: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Leave out of scoring the items [N] that are flat in their training rows, and say how many.

    A still item would be scored in data units, and one of them can outweigh all others. Where there
    is nothing else, it is scored all the same.
    """
    usable = scored & ~flat
    if not usable.any() or not (scored & flat).any():
        return scored, []
    count = int((scored & flat).sum())
    return usable, [
        f"{count} of {panel.n_items} items do not move in their training rows and are not scored"
    ]


def _left_out(panel: Panel, part: str, found: "_Table") -> list[str]:
    """Say which windows of a part are left out.

    Raises: DataError where none is left to score.
    """
    notes = []
    if found.taken < found.total:
        notes.append(f"{part}: {found.taken:,} of {found.total:,} windows, spread evenly")
    if empty := found.taken - found.windows.n:
        notes.append(f"{part}: {empty:,} windows left out, without an observed context or target")
    if part != "train" and not found.windows.n:
        raise DataError(
            f"{panel.name}: no {part} window has an observed value in its context and in its target"
        )
    return notes


def _edges(panel: Panel, horizon: int) -> np.ndarray:
    """Rows [N, 3] where training, validation and test of each item end."""
    edges = np.empty((panel.n_items, 3), np.int64)
    known: dict[int, tuple[int, int, int]] = {}
    for i, rows in enumerate(panel.lengths.tolist()):
        if rows not in known:
            known[rows] = _edges_of(rows, horizon)
        edges[i] = known[rows]
    return edges


def _edges_of(rows: int, horizon: int) -> tuple[int, int, int]:
    if rows < 2 * horizon + 1:
        return rows, rows, rows
    if rows >= 10:
        usual = borders_of(None, rows)
        lengths = [hi - lo for lo, hi in (usual.val, usual.test)]
        if min(lengths) >= horizon:
            return usual.train[1], usual.val[1], rows
    test = rows - horizon
    return test - max(horizon, int(rows * SHORTEST_VAL)), test, rows


def _training_origins(
    train_rows: np.ndarray, context_len: int, target_len: int, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """First row [N] of each item where a training target begins, -1 for none, and how many [N].

    Contexts are whole where an item has at least `horizon` such windows. In a shorter one they show
    at least `horizon` rows of it, or all that there are. A target lies in the item wholly.
    """
    last = train_rows - target_len
    short = np.minimum(last, min(context_len, horizon))
    first = np.where(last >= context_len + horizon, context_len, short)
    first = np.where(last >= 1, first, -1)
    return first, np.where(first >= 0, last - first + 1, 0)


def _lay_out(
    panel: Panel, train_rows: np.ndarray, front: np.ndarray, covariates: Collection[str]
) -> tuple[PanelLayout, np.ndarray]:
    """The layout, standardised by the first `train_rows` [N] of each item; whether these are still
    [C, N].

    Of covariates only the mean of an item is taken away: windows are standardised by themselves,
    and float32 holds small differences around 0 best.
    """
    lengths = panel.lengths
    past = panel.past_values if "past" in covariates and panel.past else None
    known = panel.known_values if "known" in covariates and panel.known else None
    beside = [values for values in (past, known) if values is not None]
    c, rows = panel.n_variates, int(front.sum()) + panel.n_rows
    if rows > MOST_ROWS:
        raise DataError(
            f"{panel.name}: {rows:,} rows, with those that shorter items lack in front; at most "
            f"{MOST_ROWS:,} fit: take fewer items, or a shorter context"
        )
    out = np.full((c + sum(len(values) for values in beside), rows), np.nan, np.float32)
    mean, std = np.zeros((c, panel.n_items)), np.ones((c, panel.n_items))
    still = np.ones((c, panel.n_items), bool)
    shift = np.cumsum(front)  # how far each item's rows lie behind their place in the panel

    # Some items at a time: a hundred thousand of them need no second copy in float64.
    chunk = np.searchsorted(panel.bounds, np.arange(0, panel.n_rows, CHUNK), side="right") - 1
    for a, b in zip(np.unique(chunk), [*np.unique(chunk)[1:], panel.n_items], strict=True):
        lo, hi = int(panel.bounds[a]), int(panel.bounds[b])
        block = panel.values[:, lo:hi]
        if np.isinf(block).any():
            bad = [
                name for name, row in zip(panel.columns, block, strict=True) if np.isinf(row).any()
            ]
            raise DataError(
                f"{panel.name}: infinite values in {', '.join(bad[:5])}; replace them, or leave "
                "them empty"
            )
        own = lengths[a:b]
        within = np.arange(hi - lo) - np.repeat(panel.bounds[a:b] - lo, own)
        trains = within < np.repeat(train_rows[a:b], own)
        ends = panel.bounds[a:b] - lo
        mean[:, a:b], std[:, a:b], still[:, a:b] = _moments(np.where(trains, block, np.nan), ends)

        scaled = (block - np.repeat(mean[:, a:b], own, axis=1)) / np.repeat(
            std[:, a:b], own, axis=1
        )
        place = np.arange(lo, hi) + np.repeat(shift[a:b], own)
        out[:c, place] = scaled
        row = c
        for values in beside:
            more = values[:, lo:hi]
            middle, _, _ = _moments(more, ends)
            out[row : row + len(more), place] = more - np.repeat(middle, own, axis=1)
            row += len(more)
    return PanelLayout(
        values=jnp.asarray(out),
        mean=mean,
        std=std,
        front=front,
        begin=panel.bounds[:-1] + shift,
        n_past=0 if past is None else len(past),
        n_known=0 if known is None else len(known),
    ), still


def _moments(values: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, population std and stillness [C, n] of the observed values of items that begin at
    `first` [n].

    The std of what does not move, or has no value, is 1.
    """
    lengths = np.diff(np.append(first, values.shape[1]))
    high = np.fmax.reduceat(values, first, axis=1)
    low = np.fmin.reduceat(values, first, axis=1)
    still = ~(high > low)

    # Squares of 1e200 are infinite: values count relative to the largest.
    largest = np.fmax(np.abs(high), np.abs(low))
    size = np.where(largest > 1e100, largest, 1.0)
    observed = ~np.isnan(values)
    small = np.where(observed, values / np.repeat(size, lengths, axis=1), 0.0)
    count = np.maximum(np.add.reduceat(observed, first, axis=1, dtype=np.int64), 1)
    mean = np.add.reduceat(small, first, axis=1) / count
    centred = np.where(observed, small - np.repeat(mean, lengths, axis=1), 0.0)
    std = np.sqrt(np.add.reduceat(np.square(centred), first, axis=1) / count)
    return mean * size, np.where(still, 1.0, std * size), still


@dataclasses.dataclass(frozen=True)
class _Table:
    """Windows with an observed context and target, of `taken` that were looked at, of `total` that
    there are.
    """

    windows: Windows
    taken: int
    total: int


def _table(
    layout: PanelLayout,
    origins: tuple[np.ndarray, np.ndarray],
    context_len: int,
    horizon: int,
    joint: bool,
    columns: tuple[str, ...],
    most: int,
    seed: int,
) -> _Table:
    """Windows of the first origin of each item [N] and those after it, as many as the counts [N]
    say.
    """
    first, count = origins
    before = np.concatenate([[0], np.cumsum(count)])
    each = int(before[-1])
    targets = len(layout.mean)
    total = each if joint else each * targets
    number = spread(total, most, seed)

    # Numbered target by target, in each item by item.
    variate, place = number // max(each, 1), number % max(each, 1)
    item = np.searchsorted(before, place, side="right") - 1
    own_start = first[item] + place - before[item] - context_len
    if (own_start < -layout.front[item]).any():
        raise ValueError(
            f"windows of {context_len} + {horizon} rows cross items: cut the panel with this "
            "target_len"
        )
    starts = (layout.begin[item] + own_start).astype(np.int32)
    seen = _observed(
        np.asarray(layout.values)[:targets],
        starts,
        None if joint else variate,
        context_len=context_len,
        horizon=horizon,
    )

    rows = None if joint else jnp.asarray(variate[seen].astype(np.int32))
    windows = Windows(
        values=layout.values,
        starts=jnp.asarray(starts[seen]),
        rows=rows,
        context_len=context_len,
        horizon=horizon,
        columns=columns,
        n_past=layout.n_past,
        n_known=layout.n_known,
    )
    return _Table(windows, len(number), total)


def spread(n: int, most: int, seed: int) -> np.ndarray:
    """Numbers below `n`, all of them or `most`: one at random from each of as many equal stretches,
    int64.
    """
    if n <= most:
        return np.arange(n)
    edges = np.arange(most + 1, dtype=np.int64) * n // most
    widths = np.diff(edges)
    return edges[:-1] + (np.random.default_rng(seed).random(most) * widths).astype(np.int64)


def _observed(
    values: np.ndarray,
    starts: np.ndarray,
    variate: np.ndarray | None,
    context_len: int,
    horizon: int,
) -> np.ndarray:
    """Return whether each window [W] has an observed value in its context and one in its target."""
    found = np.zeros(len(starts), bool)

    def check(observed_R: Any, mine: np.ndarray) -> None:
        before = np.zeros(len(observed_R) + 1, np.int32)
        np.cumsum(observed_R, out=before[1:])
        middle = starts[mine].astype(np.int64) + context_len
        in_context = before[middle] - before[middle - context_len]
        in_target = before[middle + horizon] - before[middle]
        found[mine] = (in_context > 0) & (in_target > 0)

    # One target at a time: counts of all rows of all of them would be as large as the panel.
    if variate is None:
        check(np.any(~np.isnan(values), axis=0), np.arange(len(starts)))
        return found
    for c, row in enumerate(values):
        check(~np.isnan(row), np.flatnonzero(variate == c))
    return found
