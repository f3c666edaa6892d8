"""Train, validation and test parts of a series: borders, scaling, few-shot subsets, windows.

The protocol of the long-term-forecasting literature as Smoothed Full Fine-tuning (Meteor-Stars/SFF)
and Timer (thuml/Large-Time-Series-Model) use it. Where the released code departs from its own
protocol by mistake, the correct behaviour is the default and the released one a named quirk:

| quirk | effect |
| --- | --- |
| `etm1_typo` | ETTm1 is split 70/10/20 of the whole file (its name is misspelt in SFF's list) |
| `pems_ratio` | PEMS files are split 70/10/20 (only the exact name "PEMS" gets 60/20/20 there) |
| `few_shot_stride` | few-shot windows are every int(1 // ratio)-th: the tail is never seen |
"""

import dataclasses
import logging
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from ltsm_jax.data import benchmarks
from ltsm_jax.data.series import DataError, Series
from ltsm_jax.data.windows import Windows, windows_between

log = logging.getLogger(__name__)

SPLIT_QUIRKS = frozenset({"etm1_typo", "pems_ratio", "few_shot_stride"})
PARTS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Borders:
    """Row ranges [lo, hi) of the three parts; every TARGET row of a part's windows lies in its
    range.

    Validation and test windows take their context from up to `context_len` rows before `lo`;
    training windows lie wholly inside their range.

    Raises: ValueError when a range is negative or empty, or the parts overlap or are out of order.
    """

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]

    def __post_init__(self):
        edges = [*self.train, *self.val, *self.test]
        empty = [part for part in PARTS if getattr(self, part)[0] >= getattr(self, part)[1]]
        if edges != sorted(edges) or edges[0] < 0 or empty:
            raise ValueError(f"parts must follow one another, each with at least one row: {self}")


def borders_of(name: str | None, n_rows: int, quirks: Collection[str] = frozenset()) -> Borders:
    """Borders of a benchmark by its name or alias; of any other series (or None) 70/10/20 percent
    of `n_rows`.

    Raises: ValueError for an unknown quirk, and when the benchmark's borders do not fit in
    `n_rows`.
    """
    quirks = _known(quirks)
    benchmark = benchmarks.benchmark_named(name) if name else None
    rule = benchmark.borders if benchmark else (0.7, 0.2)
    if benchmark and (
        (benchmark.name == "ETTm1" and "etm1_typo" in quirks)
        or (benchmark.name.startswith("PEMS") and "pems_ratio" in quirks)
    ):
        rule = (0.7, 0.2)
    if len(rule) == 3:
        a, b, c = rule
    else:
        # int() of the float product, as in the released code: it decides the last row of each part
        a, b, c = int(n_rows * rule[0]), n_rows - int(n_rows * rule[1]), n_rows
    if c > n_rows or not 0 < a < b < c:
        why = "is the file cut short?" if len(rule) == 3 else "it is too short to be split."
        raise DataError(
            f"{name or 'series'}: {n_rows} rows do not hold the parts train [0, {a}), val [{a}, "
            f"{b}), test [{b}, {c}): {why} Other borders can be given as "
            "borders=Borders(train=..., val=..., test=...)"
        )
    return Borders((0, a), (a, b), (b, c))


def _known(quirks: Collection[str]) -> frozenset[str]:
    quirks = frozenset({quirks} if isinstance(quirks, str) else quirks)
    if unknown := quirks - SPLIT_QUIRKS:
        raise ValueError(f"unknown quirks {sorted(unknown)}; there are {sorted(SPLIT_QUIRKS)}")
    return quirks


@dataclasses.dataclass(frozen=True, eq=False)
class Scaler:
    """Standardisation of each variate with `mean` [C] and population `std` [C] of its training rows
    (float64).
    """

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> "Scaler":
        """From the observed values of [C, T] in data units; one that is constant there gets std 1:
        it becomes zeros.
        """
        if not np.isnan(values).any() and np.abs(values).max() <= 1e100:
            constant = values.max(axis=1) == values.min(
                axis=1
            )  # exact, where a computed std may be 1e-17
            return cls(values.mean(axis=1), np.where(constant, 1.0, values.std(axis=1)))

        mean, std = np.zeros(len(values)), np.ones(len(values))
        for i, row in enumerate(values):
            known = row[~np.isnan(row)]
            if not known.size:
                continue
            # Squares of 1e200 are infinite: values count relative to the largest.
            largest = np.abs(known).max()
            size = largest if largest > 1e100 else 1.0
            mean[i] = (known / size).mean() * size
            if known.max() != known.min():
                std[i] = (known / size).std() * size
        return cls(mean, std)

    def transform(self, values: np.ndarray) -> np.ndarray:
        """[..., C, T] in data units to scaled units."""
        return (values - self.mean[:, None]) / self.std[:, None]

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """[..., C, T] in scaled units to data units."""
        return values * self.std[:, None] + self.mean[:, None]


def few_shot_indices(n: int, ratio: float, quirks: Collection[str] = frozenset()) -> np.ndarray:
    """Choose the windows, of `n`, that a few-shot run trains on, int64 [max(int(n * ratio), 1)];
    not random.

    Evenly spread over the whole table: floor(j * n / m) for j = 0..m-1. With quirk
    `few_shot_stride` the released j * int(1 // ratio): rounded down (1 // 0.1 is 9), it leaves out
    the last windows, hence the last variates.

    Raises: ValueError when ratio is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"few_shot must be a share in (0, 1], got {ratio}")
    m = max(int(n * ratio), 1)
    j = np.arange(m, dtype=np.int64)
    return j * int(1 // ratio) if "few_shot_stride" in _known(quirks) else j * n // m


def naive_scale(scaled: np.ndarray, season: int) -> np.ndarray:
    """Mean absolute error of the seasonal naive forecast, per variate [C]: mean |y_t -
    y_(t-season)| over [C, T].

    The denominator of MASE (Hyndman & Koehler 2006). 0 for a variate that repeats exactly: MASE is
    undefined there.
    Raises: ValueError when T <= season or season < 1.
    """
    if not 1 <= season < scaled.shape[1]:
        raise ValueError(
            f"a season of {season} rows needs more than {season} rows, there are {scaled.shape[1]}"
        )
    steps_CT = np.abs(scaled[:, season:] - scaled[:, :-season])
    if not np.isnan(steps_CT).any():
        return steps_CT.mean(axis=1)
    known_CT = ~np.isnan(steps_CT)
    return np.where(known_CT, steps_CT, 0.0).sum(axis=1) / np.maximum(known_CT.sum(axis=1), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of a series as windows in scaled units, and what they were made from."""

    train: Windows
    val: Windows
    test: Windows
    scaler: Scaler
    series: Series
    borders: Borders
    few_shot: float = 1.0
    quirks: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the variates."""
        return self.series.columns

    @property
    def season(self) -> int:
        """Rows in the main season of the series; 1 where there is none."""
        return self.series.season

    @property
    def timestamps(self) -> np.ndarray | None:
        """Stamps of the series, or None."""
        return self.series.timestamps

    def training(self, horizon: int) -> Windows:
        """Training windows whose targets have `horizon` rows, the same share of them as
        of `train`.
        """
        have = self.train
        if horizon == have.horizon:
            return have
        full = windows_between(
            have.values,
            *self.borders.train,
            context_len=have.context_len,
            horizon=horizon,
            joint=have.joint,
            columns=have.columns,
            timestamps=have.timestamps,
        )
        if self.few_shot == 1:
            return full
        return full.take(few_shot_indices(full.n, self.few_shot, self.quirks))

    def naive_scale(self, season: int) -> np.ndarray:
        """`naive_scale` [C] of all training rows, scaled units."""
        lo, hi = self.borders.train
        return naive_scale(self.scaler.transform(self.series.values[:, lo:hi]), season)


def prepare(
    series: Series,
    context_len: int,
    horizon: int,
    *,
    borders: Borders | None = None,
    few_shot: float = 1.0,
    quirks: Collection[str] = frozenset(),
    joint: bool = False,
) -> Splits:
    """Splits, standardises and windows a series: stride 1, no window left out, the series on the
    device once.

    Missing values (NaN) stay missing. Windows without any observed value in their context or their
    target cannot be used; `notes` counts them.

    Args:
      context_len, horizon: rows a window shows and rows it asks for.
      borders: by default those of `series.benchmark`, else 70/10/20 percent.
      few_shot: share of the training windows kept (`few_shot_indices`); validation, test and
        scaling stay full.
      quirks: released behaviours to follow, of `SPLIT_QUIRKS`.
      joint: windows of all variates instead of one variate each.

    Raises: ValueError when a part is too short for one window, naming each such part and what would
      fit; when the series holds infinity, or no window of a part has observed values; for unknown
      quirks or a bad `few_shot`.
    """
    quirks = _known(quirks)
    borders = borders or borders_of(series.benchmark, series.n_rows, quirks)
    _check_room(series, borders, context_len, horizon=horizon)
    bad = [
        name for name, row in zip(series.columns, series.values, strict=True) if np.isinf(row).any()
    ]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise DataError(
            f"{series.name}: infinite values in {shown}; replace them, or leave them empty"
        )

    train_rows = series.values[:, slice(*borders.train)]
    scaler = Scaler.fit(train_rows)
    notes = list(series.notes)
    still = [
        name
        for name, row in zip(series.columns, train_rows, strict=True)
        if not np.isnan(row).all() and np.nanmax(row) == np.nanmin(row)
    ]
    if still:
        notes.append(
            f"constant in the training rows, so only shifted, not scaled: {', '.join(still)}"
        )
        log.warning("%s: %s", series.name, notes[-1])

    values = jnp.asarray(scaler.transform(series.values), jnp.float32)
    facts = {"columns": series.columns, "timestamps": series.timestamps}
    parts = {}
    for part in PARTS:
        lo, hi = getattr(borders, part)
        lo = lo if part == "train" else lo - context_len
        try:
            parts[part] = windows_between(
                values, lo, hi, context_len=context_len, horizon=horizon, joint=joint, **facts
            )
        except ValueError as err:
            raise DataError(
                f"{series.name}, {part}: {err}; read it with missing='interpolate'"
            ) from None
        whole = (hi - lo - context_len - horizon + 1) * (1 if joint else series.n_variates)
        if left_out := whole - parts[part].n:
            notes.append(
                f"{part}: {left_out} of {whole} windows left out, without an observed context or "
                "target"
            )
    if few_shot != 1:
        parts["train"] = parts["train"].take(few_shot_indices(parts["train"].n, few_shot, quirks))
    return Splits(
        **parts,
        scaler=scaler,
        series=series,
        borders=borders,
        few_shot=few_shot,
        quirks=quirks,
        notes=tuple(notes),
    )


def _check_room(series: Series, borders: Borders, context_len: int, horizon: int) -> None:
    """Every part holds at least one window, or a DataError that says which do not and what would
    fit.
    """
    if context_len < 1 or horizon < 1:
        raise ValueError(
            f"context_len and horizon must be at least 1, got {context_len} and {horizon}"
        )
    if borders.test[1] > series.n_rows:
        raise DataError(
            f"{series.name}: the borders end at row {borders.test[1]}, the series has "
            f"{series.n_rows} rows"
        )
    n_train, n_val, n_test = (hi - lo for lo, hi in (borders.train, borders.val, borders.test))
    problems = []
    if n_train < context_len + horizon:
        need = context_len + horizon
        problems.append(
            f"train: {n_train} rows, needs {need} ({context_len} context + {horizon} horizon)"
        )
    problems += [
        f"{part}: {n} rows, needs {horizon} (horizon)"
        for part, n in (("val", n_val), ("test", n_test))
        if n < horizon
    ]
    if not problems:
        return
    most_horizon = min(n_train - 1, n_val, n_test)
    fits = []
    if horizon <= most_horizon:
        fits.append(f"horizon {horizon} with context up to {n_train - horizon}")
    if n_train > context_len:
        fits.append(
            f"context {context_len} with horizon up to {min(n_train - context_len, n_val, n_test)}"
        )
    fits.append(f"in general context + horizon <= {n_train} with horizon <= {most_horizon}")
    raise DataError(
        f"{series.name} ({series.n_rows} rows) is too short for windows of {context_len} + "
        f"{horizon}:\n  "
        + "\n  ".join(problems)
        + f"\nThe rows hold: {'; '.join(fits)}; a model may take less. Or give other borders."
    )
