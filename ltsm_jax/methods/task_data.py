"""Make a user's table ready for a task other than forecasting: windows that training takes, and the
task."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ltsm_jax.data import Borders, DataError, Series, Splits, prepare
from ltsm_jax.data.splits import Scaler
from ltsm_jax.data.windows import windows_between
from ltsm_jax.methods import checks
from ltsm_jax.models import Model
from ltsm_jax.tasks import anomaly, imputation
from ltsm_jax.tasks.base import Task
from ltsm_jax.tasks.imputation import Holes, Imputation
from ltsm_jax.trees import Params

TASKS = ("imputation", "anomaly")
HELD_OUT = 0.1  # share of the rows, the last ones, that select the epoch


def imputation_of(
    model: Model,
    series: Series,
    *,
    rate: float = 0.25,
    holes: Holes = "blocks",
    few_shot: float = 1.0,
) -> tuple[Splits, Imputation]:
    """Cut a table into windows of the model's own context; the last tenth of the rows validates,
    none is for tests.

    Cells that are empty are neither shown nor scored. rate, holes: what is hidden, see
    `tasks.imputation`.
    Raises: DataError for a table that is too short for a window in either part.
    """
    patch, end = model.config.patch_len, series.n_rows
    longest = int(end * HELD_OUT)
    window = min(model.context_len, max(longest // 2, 2 * patch)) // patch * patch
    cut = end - max(longest, 2 * window)
    if cut <= window:
        raise DataError(
            f"{series.name}: {end} rows are too few to tune on, at least {3 * window + 1} are "
            "needed"
        )
    # What follows a window is not read: a row stands for it, and the last one for the part of
    # tests.
    borders = Borders((0, cut), (cut + window, end - 1), (end - 1, end))
    splits = prepare(series, window, 1, borders=borders, few_shot=few_shot, joint=True)
    return splits, Imputation(rate=rate, holes=holes)


@dataclasses.dataclass(frozen=True)
class Ready:
    """A table made ready for a task.

    data, task: for `methods.run.run`. errors: from parameters to sums of squared errors and how
    many were summed, of each unit of the validation part. blocks: the block of time of each unit.
    notes: what was done to the table.
    """

    data: Any
    task: Task
    errors: Callable[[Params], tuple[np.ndarray, np.ndarray]]
    blocks: np.ndarray
    notes: tuple[str, ...]

    def difference(self, before: Params, after: Params) -> checks.Difference:
        """Validation error of `after` minus that of `before`, with an interval from blocks of
        time."""
        (total_before, counts), (total_after, _) = self.errors(before), self.errors(after)
        return checks.bootstrap_difference(
            total_after - total_before,
            counts,
            self.blocks,
            item_W=np.zeros_like(self.blocks),
        )


def ready(
    kind: Literal["imputation", "anomaly"],
    model: Model,
    series: Series,
    *,
    few_shot: float = 1.0,
) -> Ready:
    """Make a table ready for tuning: for anomaly detection all of it is taken to be free of
    anomalies."""
    model.check_task(kind)
    if kind == "imputation":
        splits, task = imputation_of(model, series, few_shot=few_shot)

        def hidden(params: Params) -> tuple[np.ndarray, np.ndarray]:
            found = imputation.window_sums(model, params, splits.val, split="val", **task.options)
            return found["mse"], found["points"]

        starts = np.asarray(splits.val.starts)
        return Ready(
            data=splits,
            task=task,
            errors=hidden,
            blocks=(starts - starts.min()) // splits.val.context_len,
            notes=splits.notes,
        )

    if few_shot != 1:
        raise ValueError(
            "few_shot is for forecasting and imputation; anomaly detection trains on all rows"
        )
    values = Scaler.fit(series.values).transform(series.values).astype(np.float32)
    prepared, detects = anomaly_of(series.name, values, series.n_rows)

    def per_row(params: Params) -> tuple[np.ndarray, np.ndarray]:
        errors = anomaly.row_errors(
            model, params, prepared.values, rows=prepared.validate_rows, window=prepared.window
        )
        return errors, np.ones_like(errors)

    lo, hi = prepared.validate_rows
    return Ready(
        data=prepared,
        task=detects,
        errors=per_row,
        blocks=np.arange(hi - lo) // anomaly.TOKEN,
        notes=series.notes,
    )


def anomaly_of(
    name: str, values: np.ndarray, cut: int
) -> tuple[anomaly.ScaledSeries, anomaly.Anomaly]:
    """Cut the first `cut` rows of scaled values [C, T] into windows; the last tenth of them selects
    the epoch.

    Raises: DataError for empty cells there, and for too few rows.
    """
    if np.isnan(values[:, :cut]).any():
        raise DataError(
            f"{name}: tuning needs a first part without empty cells: missing='interpolate' fills "
            "them"
        )
    inner = anomaly.rows_to_train(cut)
    window = min(anomaly.WINDOW, inner // anomaly.TOKEN * anomaly.TOKEN)
    if window < anomaly.SHORTEST_WINDOW:
        least = anomaly.SHORTEST_WINDOW
        raise DataError(
            f"{name}: {inner} rows to tune on are too few, at least {least} are needed; or "
            "method='zero_shot'"
        )
    prepared = anomaly.ScaledSeries(
        values=values,  # pyright: ignore[reportArgumentType]
        train=windows_between(
            values, 0, inner, context_len=window - anomaly.TOKEN, horizon=anomaly.TOKEN
        ),
        validate_rows=(inner, cut),
        series=anomaly.Unlabelled(name),
        window=window,
    )
    return prepared, anomaly.Anomaly()
