"""`Forecaster`: long forecasts of panels, their quantiles, and what is said about them."""

import dataclasses
import sys

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax import Forecaster
from ltsm_jax.data import DataError, Series
from ltsm_jax.data.panel import Panel
from ltsm_jax.methods.conformal import Calibration
from ltsm_jax.methods.decision import Candidate, Verdict
from ltsm_jax.models.chronos_2 import Chronos2
from ltsm_jax.models.chronos_bolt import ChronosBolt
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import panels

TIMER = Timer(TimerConfig.of(8, 16, 32, 1, 2, context_len=32, horizon=8))
BOLT = ChronosBolt(ChronosBolt.small())


@pytest.fixture(scope="module")
def timer():
    return Forecaster(TIMER, TIMER.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def bolt():
    return Forecaster(BOLT, BOLT.init(jax.random.key(0)))


def panel(lengths=(100, 20, 57, 33), targets=("sold",), **changes):
    """Stores of different lengths, hourly, each on a level of its own."""
    rows = sum(lengths)
    noise = np.random.default_rng(0).normal(size=(len(targets), rows))
    level = np.repeat(10.0 ** np.arange(len(lengths)), lengths)
    facts = {
        "name": "shop",
        "ids": np.array([f"s{i}" for i in range(len(lengths))], object),
        "columns": tuple(targets),
        "values": level * (2 + np.sin(np.arange(rows) / 4) + 0.1 * noise),
        "bounds": np.concatenate([[0], np.cumsum(lengths)]),
        "first": np.full(len(lengths), np.datetime64("2024-01-01", "us")),
        "freq": "h",
        "id_name": "store",
        "time_name": "when",
    }
    return Panel(**facts | changes)


def test_a_long_table_item_by_item_target_by_target(bolt):
    got = bolt.predict(panel(targets=("sold", "returned")), 3, quantile_levels=(0.9, 0.2))
    assert list(got.columns) == ["store", "when", "target_name", "predictions", "0.9", "0.2"]
    assert len(got) == 4 * 2 * 3
    assert got["store"].tolist()[:7] == ["s0"] * 6 + ["s1"]
    assert got["target_name"].tolist()[:6] == ["sold"] * 3 + ["returned"] * 3
    assert got["when"].tolist()[6:9] == list(pd.date_range("2024-01-01 20:00", periods=3, freq="h"))


def test_several_id_columns_come_back_under_their_own_names(timer, tmp_path):
    rows = [50, 44]
    table = pd.DataFrame(
        {
            "region": np.repeat([1, 2], rows),
            "shop": "a",
            "when": np.concatenate(
                [pd.date_range("2024-01-01", periods=n, freq="h") for n in rows]
            ),
            "sold": np.sin(np.arange(sum(rows)) / 4),
        }
    )
    got = timer.predict(table, 2, id=["region", "shop"], target="sold", quantile_levels=())
    assert list(got.columns) == ["region", "shop", "when", "predictions"]
    assert got["region"].tolist() == [1, 1, 2, 2] and got["shop"].tolist() == ["a"] * 4
    assert timer.plot(table, got, id=["region", "shop"], target="sold") is not None

    # What was fitted on such columns reads them again, from disk as well.
    fitted = dataclasses.replace(timer, id=("region", "shop"), targets=("sold",))
    again = Forecaster.load(fitted.save(tmp_path / "m"))
    assert again.id == ("region", "shop")
    pd.testing.assert_frame_equal(again.predict(table, 2, quantile_levels=()), got)


def test_a_time_of_several_columns_comes_back_as_timestamp(timer):
    stamps = pd.date_range("2024-01-01", periods=50, freq="h")
    table = pd.DataFrame(
        {
            "date": stamps.strftime("%Y-%m-%d"),
            "hour": stamps.hour,
            "load": np.sin(np.arange(50) / 4),
        }
    )
    got = timer.predict(table, 2, time=["date", "hour"], quantile_levels=())
    assert got["timestamp"].tolist() == list(pd.date_range("2024-01-03 02:00", periods=2, freq="h"))


def test_short_contexts_keep_nearly_all_rows():
    """Of a family that knows no missing values in front: whole patches, and of many at most a ninth
    goes.
    """
    rows = np.arange(1, 5000)
    for patch in (1, 8, 96):
        kept = panels.rung_below(rows, patch)
        whole = np.where(rows < patch, rows, rows // patch * patch)
        assert (kept <= whole).all() and (kept > whole * 8 / 9 - 1e-9).all()
        if patch > 16:
            few = (rows >= patch) & (rows < 16 * patch)
            np.testing.assert_array_equal(kept[few], whole[few])
    assert len(np.unique(panels.rung_below(np.arange(256, 512), 1))) == 8


def test_a_series_has_neither_id_nor_names(bolt):
    one = Series("one", np.sin(np.arange(50) / 4)[None], ("y",))
    assert list(bolt.predict(one, 2, quantile_levels=()).columns) == ["predictions"]


@pytest.mark.parametrize("which", ["timer", "bolt"])
def test_a_forecast_does_not_depend_on_the_other_items(which, request):
    forecaster = request.getfixturevalue(which)
    every = panel()
    together = forecaster.predict(every, 4, quantile_levels=())
    for i, item in enumerate(every.ids):
        alone = forecaster.predict(every.take(np.array([i])), 4, quantile_levels=())
        np.testing.assert_allclose(
            together[together["store"] == item]["predictions"], alone["predictions"], rtol=1e-5
        )


def test_a_long_item_is_forecast_as_forecast_does(timer):
    every = panel()
    want = ltsm_jax.forecast(timer.model, timer.params, every.item(0), 4)["sold"]
    got = timer.predict(every, 4, quantile_levels=())["predictions"][:4]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_levels_of_the_model_are_its_own_and_those_between_are_interpolated(bolt):
    one = panel((64,))
    low, middle = BOLT.config.levels[:2]
    got = bolt.predict(one, 4, quantile_levels=(low, middle, (low + middle) / 2))
    z = ((one.values - one.values.mean()) / one.values.std()).astype(np.float32)[None]
    found = np.asarray(
        jax.jit(BOLT.predict, static_argnums=2)(bolt.params, z, 4).quantiles[0, 0], np.float64
    )
    want = np.sort(found, axis=-1) * one.values.std() + one.values.mean()
    np.testing.assert_allclose(got[[f"{low:g}", f"{middle:g}"]], want[:, :2], rtol=1e-5)
    np.testing.assert_allclose(got[f"{(low + middle) / 2:g}"], want[:, :2].mean(axis=1), rtol=1e-5)


def test_quantiles_never_cross_and_leave_the_point_alone(bolt):
    levels = (0.01, 0.1, 0.5, 0.9, 0.99)
    got = bolt.predict(panel(), 4, quantile_levels=levels)
    columns = got[[f"{level:g}" for level in levels]].to_numpy()
    assert (np.diff(columns, axis=1) >= 0).all()
    alone = bolt.predict(panel(), 4, quantile_levels=())
    np.testing.assert_allclose(got["predictions"], alone["predictions"], rtol=1e-6)
    (said,) = [note for note in got.attrs["notes"] if "split-conformal" in note]
    assert said.startswith("quantiles 0.01, 0.99: ")


@pytest.mark.parametrize("levels", [(0.1, 0.1), (0, 0.5), (1.2,), ("a",), (True,)])
def test_levels_that_are_none_are_refused(timer, levels):
    with pytest.raises(ValueError, match="quantile_levels are numbers between 0 and 1, each once"):
        timer.predict(panel(), 4, quantile_levels=levels)


def test_a_history_too_short_to_measure_errors_is_refused_for_such_levels(timer):
    short = panel((9,))
    with pytest.raises(
        DataError, match=r"timer does not say quantiles 0.1, 0.5, 0.9 itself.*quantile_levels=\(\)"
    ):
        timer.predict(short, 8)
    assert len(timer.predict(short, 8, quantile_levels=())) == 8


def test_an_item_without_values_is_named(timer):
    every = panel()
    values = every.values.copy()
    values[:, 100:120] = np.nan
    with pytest.raises(
        DataError, match="no value in the last 16 rows of sold of s1; leave these out"
    ):
        timer.predict(dataclasses.replace(every, values=values), 4)


def test_damaged_weights_are_named(timer):
    bad = Forecaster(TIMER, jax.tree.map(lambda leaf: leaf * np.nan, timer.params))
    with pytest.raises(ValueError, match="parameters are not finite"):
        bad.predict(panel(), 4)


def test_covariates_that_are_not_used_are_said(timer):
    every = panel()
    with_price = dataclasses.replace(every, past=("price",), past_values=np.ones((1, every.n_rows)))
    got = timer.predict(with_price, 4, quantile_levels=())
    assert "timer does not use covariates: price" in got.attrs["notes"]


def a_verdict():
    """One of the checkpoint alone."""
    scores = {"mse": 1.0, "mae": 0.5, "windows": 7}
    return Verdict(
        deploy="zero_shot",
        reason="no difference that the data can show",
        candidates=(Candidate("zero_shot", "model", scores),),
        tuned=None,
        naive=None,
        differences={},
        name="shop",
        model="timer",
        columns=("sold",),
        horizon=4,
        context_len=32,
        freq="h",
        items=1,
        windows={"train": 0, "val": 7, "test": 7},
        spans={},
        settings={},
    )


def test_saved_and_loaded_it_is_the_same(timer, tmp_path):
    facts = {
        "freq": "h",
        "targets": ("sold",),
        "known": ("price",),
        "id": "store",
        "time": "when",
        "verdict": a_verdict(),
        "calibration": Calibration.of(
            np.random.default_rng(0).normal(size=(30, 1, 4)), 30, "of a test"
        ),
        "provenance": {"source": "made here", "licence": "MIT"},
    }
    forecaster = dataclasses.replace(timer, licence="", **facts)
    forecaster.save(tmp_path / "model")
    again = Forecaster.load(tmp_path / "model")
    for name in ("freq", "targets", "known", "id", "time", "verdict", "provenance", "licence"):
        assert getattr(again, name) == getattr(forecaster, name), name
    assert again.licence == "MIT"
    want = forecaster.predict(panel(), 4)
    pd.testing.assert_frame_equal(again.predict(panel(), 4), want, rtol=1e-6)
    assert "from the errors of 30 forecasts of a test" in want.attrs["notes"][-1]
    model, _ = ltsm_jax.load(tmp_path / "model")
    assert model == TIMER
    with pytest.raises(FileExistsError):
        forecaster.save(tmp_path / "model")
    forecaster.save(tmp_path / "model", overwrite=True)


def test_a_damaged_record_is_refused(timer, tmp_path):
    bad = {"targets": "sold"}
    ltsm_jax.save(tmp_path / "model", timer.model, timer.params, provenance={"forecaster": bad})
    with pytest.raises(
        ValueError, match=r"model: what it holds of a Forecaster can't be read \(targets"
    ):
        Forecaster.load(tmp_path / "model")


def test_says_what_it_is(timer):
    told = dataclasses.replace(timer, targets=("sold",), freq="h", baseline="seasonal_naive")
    assert "timer" in str(told) and "fitted on: sold, step h" in str(told)
    assert "forecasts with: seasonal_naive" in str(told)
    assert repr(told).startswith("<Forecaster timer, ")


def test_exported_it_is_what_the_original_loads(bolt, tmp_path):
    bolt.export(tmp_path / "published")
    again = Forecaster.load(tmp_path / "published")
    assert again.model == bolt.model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, bolt.params))


def test_draws_history_and_bands(bolt, tmp_path):
    every = panel()
    table = bolt.predict(every, 4)
    figure = bolt.plot(every, table, tmp_path / "forecast.png", items=["s2", "s0"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["s2", "s0"]
    lines = figure.axes[0].get_lines()
    np.testing.assert_array_equal(
        lines[1].get_ydata(), table[table["store"] == "s2"]["predictions"]
    )
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no item 'nowhere'"):
        bolt.plot(every, table, items=["nowhere"])
    with pytest.raises(ValueError, match="is not one of"):
        bolt.plot(every, table[1:])


def test_a_picture_without_matplotlib_says_what_to_install(bolt, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    every = panel()
    with pytest.raises(ImportError, match="pip install"):
        bolt.plot(every, bolt.predict(every, 4))


def shops():
    """A long table of two shops, one of them a day later, with a price that is known three rows
    ahead.
    """
    parts = []
    for shop, start, rows in (("north", "2024-01-01", 60), ("south", "2024-01-02", 48)):
        t = np.arange(rows)
        stamps = pd.date_range(start, periods=rows, freq="h")
        sold = np.where(t < rows - 3, 20 + 5 * np.sin(t / 4), np.nan)
        parts.append(pd.DataFrame({"shop": shop, "hour": stamps, "sold": sold, "price": 1 + t % 3}))
    return pd.concat(parts, ignore_index=True)


def test_reads_a_long_table(bolt):
    got = bolt.predict(shops(), 3, id="shop", time="hour", target="sold", quantile_levels=(0.5,))
    assert list(got.columns) == ["shop", "hour", "predictions", "0.5"]
    assert got["shop"].tolist() == ["north"] * 3 + ["south"] * 3
    assert got["hour"][0] == pd.Timestamp("2024-01-03 09:00")
    assert got["hour"][3] == pd.Timestamp("2024-01-03 21:00")
    assert "chronos_bolt does not use covariates: price" in got.attrs["notes"]


def test_oov_is_what_the_model_is_told_of_the_step(timer, monkeypatch):
    told = []

    def for_series(self, params, *, freq=None, **rest):
        told.append(freq)
        return self, params

    monkeypatch.setattr(Timer, "for_series", for_series)
    named = {"id": "shop", "time": "hour", "target": "sold", "quantile_levels": ()}
    timer.predict(shops(), 3, **named)
    got = timer.predict(shops(), 3, freq="oov", **named)
    assert told == ["h", "oov"]
    assert got["hour"][0] == pd.Timestamp("2024-01-03 09:00"), "the stamps keep their step"


def test_what_it_was_fitted_on_is_what_it_reads(bolt):
    fitted = dataclasses.replace(bolt, id="shop", time="hour", targets=("sold",), known=("price",))
    table = shops().assign(returned=1.5)
    want = bolt.predict(shops(), 3, id="shop", time="hour", target="sold")
    pd.testing.assert_frame_equal(fitted.predict(table, 3)[list(want.columns)], want)


def test_a_naive_forecast_that_a_verdict_found_best_is_what_forecasts(timer):
    every = panel()
    naive = dataclasses.replace(timer, baseline="seasonal_naive")
    got = naive.predict(every, 30)
    want = [np.resize(every.item(i).values[0, -24:], 30) for i in (0, 2, 3)]
    rows = ~got["store"].eq("s1")  # it is shorter than a season
    np.testing.assert_allclose(got[rows]["predictions"], np.concatenate(want), rtol=1e-6)
    assert got.attrs["notes"][0] == "forecast with seasonal_naive, as the verdict says"
    assert got.attrs["notes"][-1].startswith("quantiles 0.1, 0.5, 0.9: split-conformal")
    with pytest.raises(ValueError, match="baseline must be one of last_value"):
        dataclasses.replace(timer, baseline="naive")


def test_a_context_of_its_own_is_all_that_it_looks_at(timer):
    every = panel((100,))
    short = dataclasses.replace(timer, context_len=16).predict(every, 4, quantile_levels=())
    cut = dataclasses.replace(every, values=every.values[:, -16:], bounds=np.array([0, 16]))
    want = timer.predict(cut, 4, quantile_levels=())
    np.testing.assert_allclose(short["predictions"], want["predictions"], rtol=1e-6)


CHRONOS = Chronos2(Chronos2.small())


@pytest.fixture(scope="module")
def chronos():
    return Forecaster(CHRONOS, CHRONOS.init(jax.random.key(0)))


def with_price(ahead, horizon=6):
    """Two stores whose price is known `ahead` rows further."""
    every = panel((64, 64))
    price = np.random.default_rng(1).normal(size=(1, every.n_rows))
    future = np.full((1, 2, ahead), 3.0)
    return dataclasses.replace(every, known=("price",), known_values=price, future_values=future)


def test_a_price_known_ahead_changes_the_forecast(chronos):
    every = with_price(6)
    got = chronos.predict(every, 6)
    dearer = every.future_values.copy()
    dearer[:, 1] += 5
    other = chronos.predict(dataclasses.replace(every, future_values=dearer), 6)
    changed = got["predictions"] != other["predictions"]
    assert not changed[:6].any(), "the price of one store is no other's"
    assert changed[6:].all()
    assert not any("does not use" in note for note in got.attrs["notes"])


def test_covariates_are_members_of_the_group_as_rows_has_them(chronos):
    every = with_price(6)
    past = dataclasses.replace(every, past=("visitors",), past_values=every.known_values**2)
    got = chronos.predict(past, 6)["predictions"][:6].to_numpy()
    sold = every.values[0, :64]
    z = [
        (x - x.mean()) / x.std()
        for x in (sold, every.known_values[0, :64] ** 2, every.known_values[0, :64])
    ]
    future = np.full((1, 3, 6), np.nan, np.float32)
    price = every.known_values[0, :64]
    future[0, 2] = (3.0 - price.mean()) / price.std()
    rows = jax.jit(lambda p, x, f: CHRONOS.rows(p, x, 6, future=f))
    want = rows(chronos.params, np.array(z, np.float32)[None], future)[
        0, 0, :, CHRONOS.config.levels.index(0.5)
    ]
    np.testing.assert_allclose(
        got, np.asarray(want, np.float64) * sold.std() + sold.mean(), rtol=1e-5
    )


def test_without_covariates_it_is_predict(chronos):
    x = np.random.default_rng(0).normal(size=(2, 1, 64)).astype(np.float32)
    plain = jax.jit(lambda p, x: CHRONOS.predict(p, x, 6))(chronos.params, x)
    none = jax.jit(lambda p, x: CHRONOS.predict_with(p, x, 6))(chronos.params, x)
    np.testing.assert_array_equal(plain.quantiles, none.quantiles)


def test_a_future_that_ends_before_the_forecast_is_said(chronos):
    got = chronos.predict(with_price(4), 6)
    assert (
        "price is known 4 rows ahead in 2 of 2 items, and the forecast has 6: it is unknown after "
        "that" in got.attrs["notes"]
    )
    assert np.isfinite(got["predictions"]).all()


def test_quantiles_of_what_has_never_moved_lie_on_the_forecast(timer):
    still = panel(lengths=(100,), values=np.full((1, 100), 7.0))
    got = dataclasses.replace(timer, baseline="last_value").predict(still, 4)
    np.testing.assert_array_equal(got[["predictions", "0.1", "0.5", "0.9"]], np.full((4, 4), 7.0))
    assert (
        "1 of 1 contexts do not move: there these quantiles lie on the forecast"
        in got.attrs["notes"]
    )
