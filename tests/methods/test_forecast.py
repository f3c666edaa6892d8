import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax.data import DataError, Series
from ltsm_jax.models.chronos_bolt import ChronosBolt
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.models.ttm import TTM, TTMConfig
from ltsm_jax.models.units import Units

MODEL = Timer(TimerConfig.of(8, 16, 32, 1, 2, context_len=32, horizon=8))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


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
    assert list(got.columns) == ["ds", "a", "b"] and len(got) == 11
    assert got["ds"][0] == pd.Timestamp(first) and np.isfinite(got[["a", "b"]]).all(axis=None)
    assert got["b"].between(1e6 - 1000, 1e6 + 1000).all()


def test_does_not_depend_on_the_unit(params):
    df = table()
    tiny = df.assign(a=df["a"] * 1e-6)
    a, b = (ltsm_jax.forecast(MODEL, params, x, 8)["a"] for x in (df, tiny))
    np.testing.assert_allclose(b, a * 1e-6, rtol=1e-3, atol=1e-10)


def test_equals_predict_on_the_standardised_context(params):
    df = table()
    x = df[["a"]].to_numpy().T[:, -32:]
    z = (x - x.mean()) / x.std()
    predict = jax.jit(MODEL.predict, static_argnums=2)
    want = (
        np.asarray(predict(params, z[None].astype(np.float32), 8).point)[0, 0] * x.std() + x.mean()
    )
    np.testing.assert_allclose(
        ltsm_jax.forecast(MODEL, params, df, 8, target="a")["a"], want, rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def mixer():
    """A TTM of a few thousand parameters, for one variate at a time."""
    config = TTMConfig.of(
        context_len=32,
        horizon=8,
        patch_len=8,
        d_model=16,
        decoder_d_model=12,
        layers=1,
        decoder_layers=1,
        levels=1,
    )
    model = TTM(config)
    return model, jax.jit(model.init)(jax.random.key(1))


def spiked(rows):
    """A column of 10 +- 1 with a spike of a million in the rows before those that the
    model sees.
    """
    values = 10 + np.random.default_rng(0).normal(size=rows)
    values[50] = 1e6
    return pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=rows, freq="h"), "y": values})


@pytest.mark.parametrize("which", ["timer", "ttm"])
def test_rows_that_the_model_does_not_see_change_nothing(params, mixer, which):
    model, weights = (MODEL, params) if which == "timer" else mixer
    df = spiked(12000)
    shown = df.tail(model.context_len)
    whole, alone = (ltsm_jax.forecast(model, weights, x, 20)["y"] for x in (df, shown))
    np.testing.assert_allclose(whole, alone, rtol=1e-4)
    assert whole.between(0, 20).all()


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e20, 1e150])
def test_values_of_any_size_are_forecast_alike(params, size):
    values = table()[["a"]].to_numpy().T
    small, large = (Series("made", values * factor, ("a",)) for factor in (1.0, size))
    want, got = (
        ltsm_jax.forecast(MODEL, params, series, 8)["a"].to_numpy() for series in (small, large)
    )
    np.testing.assert_allclose(got / size, want, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-9, 1e120])
def test_a_constant_column_is_forecast_by_its_size(params, value):
    def moves(constant):
        series = Series("made", np.full((1, 60), constant), ("y",))
        return ltsm_jax.forecast(MODEL, params, series, 8)["y"].to_numpy() - constant

    size = abs(value) or 1.0
    np.testing.assert_allclose(moves(value) / size, moves(1.0), rtol=1e-5, atol=1e-9)


def test_what_cannot_be_forecast_is_said_in_one_line(params):
    other = Timer(TimerConfig.of(8, 16, 24, 1, 2, context_len=32, horizon=8))
    cases = [
        (
            lambda: ltsm_jax.forecast(MODEL, other.init(jax.random.key(0)), table(), 3),
            "not those of this timer model",
        ),
        (lambda: ltsm_jax.forecast(MODEL, params, table(), 4.0), "horizon must be a whole number"),
        (lambda: ltsm_jax.forecast(MODEL, params, table(), 0), "horizon must be a whole number"),
        (lambda: ltsm_jax.forecast(MODEL, params, table(), True), "horizon must be a whole number"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert len(ltsm_jax.forecast(MODEL, params, table(), np.int64(3))) == 3


def test_weights_that_are_not_finite_are_refused_by_name(params):
    bad = jax.tree.map(np.array, params)
    bad["head"]["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of .* parameters are not finite \\(head/kernel\\)"):
        ltsm_jax.forecast(MODEL, bad, table(), 8)


def test_missing_values_may_stay(params):
    holes = table()
    holes.loc[70:75, "a"] = np.nan
    got = ltsm_jax.forecast(MODEL, params, holes, 8, missing="keep")
    assert np.isfinite(got[["a", "b"]]).all(axis=None)
    holes.loc[60:, "a"] = np.nan
    with pytest.raises(DataError, match="no value in the last 32 rows of a"):
        ltsm_jax.forecast(MODEL, params, holes, 8, missing="keep")


def test_columns_that_would_meet_are_refused(params):
    clash = table().rename(columns={"a": "timestamp"})
    with pytest.raises(DataError, match="'timestamp'.*rename"):
        ltsm_jax.forecast(MODEL, params, clash, 3, time="ds")
    again = ltsm_jax.forecast(
        MODEL, params, clash.rename(columns={"timestamp": "stamp"}), 3, time="ds"
    )
    assert list(again.columns)[1:] == ["stamp", "b"]

    bolt = ChronosBolt(ChronosBolt.small())
    weights = jax.jit(bolt.init)(jax.random.key(0))
    quantiles = table().rename(columns={"b": "a 0.5"})
    with pytest.raises(DataError, match="two columns called 'a 0.5'"):
        ltsm_jax.forecast(bolt, weights, quantiles, 3)
    assert "a 0.5" in ltsm_jax.forecast(bolt, weights, quantiles, 3, target="a").columns


def test_stamps_come_back_under_their_name(params):
    dated = table()
    assert (
        ltsm_jax.forecast(
            MODEL, params, dated.rename(columns={"ds": "Tag"}), 2, time="Tag"
        ).columns[0]
        == "Tag"
    )
    index = dated.set_index("ds")
    assert ltsm_jax.forecast(MODEL, params, index, 2).columns[0] == "ds"
    assert ltsm_jax.forecast(MODEL, params, index.rename_axis(None), 2).columns[0] == "timestamp"


def test_stamps_come_back_in_their_zone(params):
    df = table()
    df["ds"] = df["ds"].dt.tz_localize("Europe/Berlin")
    got = ltsm_jax.forecast(MODEL, params, df, 2)["ds"]
    assert (
        got[0] == pd.Timestamp("2024-01-05 04:00", tz="Europe/Berlin")
        and str(got.dt.tz) == "Europe/Berlin"
    )


def test_tables_without_stamps_and_bad_tables(params):
    assert list(ltsm_jax.forecast(MODEL, params, table()[["a"]], 3).columns) == ["a"]
    with pytest.raises(DataError, match="nothere"):
        ltsm_jax.forecast(MODEL, params, table(), 3, target="nothere")
    broken = table()
    broken.loc[5, "a"] = np.nan
    with pytest.raises(DataError, match="a"):
        ltsm_jax.forecast(MODEL, params, broken, 3)
    assert len(ltsm_jax.forecast(MODEL, params, broken, 3, missing="interpolate")) == 3


def shop(rows=150):
    t = np.arange(rows)
    stamps = pd.date_range("2024-01-01", periods=rows, freq="D")
    columns = {name: 10 + np.sin(t / 3 + i) for i, name in enumerate("abc")}
    return pd.DataFrame({"ds": stamps} | columns)


@pytest.mark.slow
def test_a_models_weights_do_not_depend_on_the_name_of_a_file(tmp_path):
    """Tokens that a UniTS lacks are drawn for tuning, are those of the tuned model under any name,
    and nowhere else.
    """
    model = Units(Units.small())
    weights = jax.jit(model.init)(jax.random.key(0))
    for name in ("shop_a", "shop_b", "weather"):
        shop().to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(
        ValueError, match=r"no parameters for 3 variates.*fit\(\.\.\.\).*untrained=True"
    ) as caught:
        ltsm_jax.forecast(model, weights, tmp_path / "shop_a.csv", 4)
    assert len(str(caught.value)) < 500

    tuning = {
        "method": "recipe",
        "config": ltsm_jax.TrainConfig(epochs=1),
        "keep": "tuned",
        "show_progress": False,
    }
    fitted = ltsm_jax.fit(model, weights, tmp_path / "shop_a.csv", **tuning)
    got = [
        ltsm_jax.forecast(fitted.model, fitted.params, tmp_path / f"{name}.csv", 4)
        for name in ("shop_a", "shop_b")
    ]
    pd.testing.assert_frame_equal(*got)
    asked = ltsm_jax.forecast(model, weights, tmp_path / "shop_a.csv", 4, untrained=True)
    assert not np.allclose(asked[["a", "b", "c"]], got[0][["a", "b", "c"]], rtol=1e-4)


@pytest.mark.slow
def test_mixers_over_channels_are_not_drawn_anew_for_a_forecast():
    model = TTM(TTM.small())
    weights = jax.jit(model.init)(jax.random.key(0))
    with pytest.raises(ValueError, match="no parameters for 3 variates"):
        ltsm_jax.forecast(model, weights, shop(), 4)
    assert len(ltsm_jax.forecast(model, weights, shop(), 4, target=["a", "b"])) == 4
    assert len(ltsm_jax.forecast(model, weights, shop(), 4, untrained=True)) == 4
