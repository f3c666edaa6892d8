"""`Series`: shapes and what follows the last row."""

import numpy as np
import pandas as pd
import pytest

from ltsm_jax.data.series import DataError, Series

HOURS = pd.date_range("2024-01-01", periods=48, freq="h")


def test_series_checks_its_shapes():
    with pytest.raises(DataError, match="column names"):
        Series("x", np.zeros((2, 5)), ("a",))
    with pytest.raises(DataError, match="timestamps"):
        Series("x", np.zeros((1, 5)), ("a",), HOURS[:4].to_numpy())
