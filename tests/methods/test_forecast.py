import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax.data import DataError
from ltsm_jax.models.timer import Timer, TimerConfig

MODEL = Timer(TimerConfig.of(8, 16, 32, 1, 2, context_len=32, horizon=8))


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def table(rows=100, freq="h"):
    t = np.arange(rows)
    stamps = pd.date_range("2024-01-01", periods=rows, freq=freq)
    return pd.DataFrame({"when": stamps, "a": np.sin(t / 4), "b": 1e6 + 50 * np.cos(t / 3)}).rename(
        columns={"when": "ds"}
    )


@pytest.mark.parametrize(
    "freq, first", [("h", "2024-01-05 04:00"), ("15min", "2024-01-02 01:00"), ("MS", "2032-05-01")]
)
def test_continues_a_table_under_its_own_names_and_stamps(params, freq, first):
    df = table(freq=freq)
    got = ltsm_jax.forecast(MODEL, params, df, 11)
    assert list(got.columns) == ["timestamp", "a", "b"] and len(got) == 11
    assert got["timestamp"][0] == pd.Timestamp(first) and np.isfinite(got[["a", "b"]]).all(axis=None)
    assert got["b"].between(1e6 - 1000, 1e6 + 1000).all()


def test_does_not_depend_on_the_unit(params):
    df = table()
    tiny = df.assign(a=df["a"] * 1e-6)
    a, b = (ltsm_jax.forecast(MODEL, params, x, 8)["a"] for x in (df, tiny))
    np.testing.assert_allclose(b, a * 1e-6, rtol=1e-3, atol=1e-10)


def test_equals_predict_on_standardised_data(params):
    df = table()
    x = df[["a"]].to_numpy().T
    z = (x - x.mean()) / x.std()
    want = np.asarray(MODEL.predict(params, z[None, :, -32:].astype(np.float32), 8).point[0, 0]) * x.std() + x.mean()
    np.testing.assert_allclose(ltsm_jax.forecast(MODEL, params, df, 8, target="a")["a"], want, rtol=1e-5, atol=1e-6)


def test_tables_without_stamps_and_bad_tables(params):
    assert list(ltsm_jax.forecast(MODEL, params, table()[["a"]], 3).columns) == ["a"]
    with pytest.raises(DataError, match="nothere"):
        ltsm_jax.forecast(MODEL, params, table(), 3, target="nothere")
    broken = table()
    broken.loc[5, "a"] = np.nan
    with pytest.raises(DataError, match="a"):
        ltsm_jax.forecast(MODEL, params, broken, 3)
    assert len(ltsm_jax.forecast(MODEL, params, broken, 3, missing="interpolate")) == 3
