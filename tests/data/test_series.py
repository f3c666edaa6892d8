"""`Series`: shapes, what follows the last row, the zone."""

import numpy as np
import pandas as pd
import pytest

from ltsm_jax.data.series import LONGEST_MESSAGE, DataError, Series

HOURS = pd.date_range("2024-01-01", periods=48, freq="h")


def test_series_checks_its_shapes():
    with pytest.raises(DataError, match="column names"):
        Series("x", np.zeros((2, 5)), ("a",))
    with pytest.raises(DataError, match="timestamps"):
        Series("x", np.zeros((1, 5)), ("a",), HOURS[:4].to_numpy())


def test_stamps_after_the_last_row():
    ends = pd.date_range("2018-03-31", periods=12, freq="ME").to_numpy().astype("datetime64[us]")
    series = Series("x", np.zeros((1, 12)), ("a",), ends, "M")
    assert [str(s)[:10] for s in series.stamps_after(3)] == [
        "2019-03-31",
        "2019-04-30",
        "2019-05-31",
    ]
    assert len(series.stamps_after(0)) == 0
    assert Series("x", np.zeros((1, 12)), ("a",), ends).stamps_after(3) is None
    assert Series("x", np.zeros((1, 12)), ("a",), freq="M").stamps_after(3) is None


def test_stamps_come_back_in_their_zone():
    index = pd.date_range("2024-10-20", periods=13, freq="D", tz="Europe/Berlin")
    utc = index.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")
    series = Series("x", np.zeros((1, 10)), ("a",), utc[:10], "D", tz="Europe/Berlin")
    assert list(series.in_zone(series.stamps_after(3))) == list(index[10:])
    naive = Series("x", np.zeros((1, 10)), ("a",), utc[:10], "D")
    assert naive.in_zone(naive.timestamps).tz is None


def test_a_message_stays_short():
    text = str(DataError("column 'x' is wrong; " * 10_000))
    assert len(text) == LONGEST_MESSAGE
    assert text.endswith(" ...")
