"""Series in, windows out: reading and checking data, benchmark files, splits, windows gathered on the device."""

from ltsm_jax.data.series import DataError, Series
from ltsm_jax.data.splits import Borders, Scaler, Splits, borders_of, prepare
from ltsm_jax.data.windows import Windows, batch_at, epoch_order, steps_per_epoch

__all__ = [
    "Borders",
    "DataError",
    "Scaler",
    "Series",
    "Splits",
    "Windows",
    "batch_at",
    "borders_of",
    "epoch_order",
    "prepare",
    "steps_per_epoch",
]
