"""Series in, windows out: reading and checking data, benchmark files, splits, windows gathered on
the device.
"""

from ltsm_jax.data.benchmarks import BENCHMARKS, MissingDataError, load_series
from ltsm_jax.data.panel import Panel
from ltsm_jax.data.panel_tables import PanelOptions, read_panel
from ltsm_jax.data.series import DataError, Series
from ltsm_jax.data.splits import Borders, Scaler, Splits, borders_of, prepare
from ltsm_jax.data.tables import ReadingOptions, read_series
from ltsm_jax.data.windows import Windows, batch_at, epoch_order, steps_per_epoch

__all__ = [
    "BENCHMARKS",
    "Borders",
    "DataError",
    "MissingDataError",
    "Panel",
    "PanelOptions",
    "ReadingOptions",
    "Scaler",
    "Series",
    "Splits",
    "Windows",
    "batch_at",
    "borders_of",
    "epoch_order",
    "load_series",
    "prepare",
    "read_panel",
    "read_series",
    "steps_per_epoch",
]
