import dataclasses
import inspect
import json

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax import training, trees
from ltsm_jax.api import fit
from ltsm_jax.data import DataError, Series, prepare
from ltsm_jax.data.tables import ReadingOptions
from ltsm_jax.methods import strategies
from ltsm_jax.methods.binding import cut_windows
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.models.ttm import TTM, TTMConfig

SHORT = {
    "config": training.TrainConfig(epochs=1, batch_size=64),
    "few_shot": 0.3,
    "show_progress": False,
}


def test_fit_keeps_what_validation_prefers(model, pre, series, splits):
    quiet = dict(
        config=training.TrainConfig(epochs=3, batch_size=64, lr=3e-3),
        horizon=8,
        show_progress=False,
    )
    fitted = fit(model, pre, series, method="ff", **quiet)
    assert fitted.kept == "tuned" and fitted.params is fitted.result.params
    assert fitted.difference == pytest.approx(fitted.tuned["mse"] - fitted.zero_shot["mse"])
    assert fitted.interval[0] < fitted.difference < fitted.interval[1] < 0
    assert fitted.result.test is None
    assert "kept the tuned weights" in str(fitted)

    better = fitted.params
    worse = fit(
        model,
        better,
        splits,
        method="tfs",
        **(quiet | {"config": training.TrainConfig(epochs=1, lr=1e-6)}),
    )
    assert worse.kept == "zero_shot" and worse.params is better
    assert worse.difference > 0 and "tuning lost" in str(worse)
    anyway = fit(
        model,
        better,
        splits,
        method="tfs",
        keep="tuned",
        **(quiet | {"config": training.TrainConfig(epochs=1, lr=1e-6)}),
    )
    assert anyway.params is anyway.result.params and anyway.kept == "tuned"


def test_fit_reads_tables_and_files(model, pre, series, tmp_path):
    table = pd.DataFrame(series.values.T, columns=list(series.columns)).assign(
        date=series.timestamps
    )
    table.to_csv(tmp_path / "waves.csv", index=False)
    quiet = dict(
        method="sff",
        alpha=0.9,
        target="b",
        config=training.TrainConfig(epochs=1, batch_size=64),
        show_progress=False,
    )
    from_table = fit(model, pre, table, **quiet)
    from_file = fit(model, pre, tmp_path / "waves.csv", **quiet)
    assert from_table.splits.columns == from_file.splits.columns == ("b",)
    assert from_table.tuned == from_file.tuned
    assert from_file.splits.val.horizon == model.horizon


def test_fit_is_public():
    assert ltsm_jax.fit is fit


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"method": "ssf"}, "unknown method"),
        ({"keep": "both"}, "keep must be"),
        ({"mode": "own"}, "mode must be one of ims, direct"),
    ],
)
def test_fit_refuses_what_it_does_not_know(model, pre, splits, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit(model, pre, splits, **kwargs)


def test_fit_prune_and_forecast_read_by_the_same_options():
    reading = {field.name for field in dataclasses.fields(ReadingOptions)}
    for call in (ltsm_jax.fit, ltsm_jax.prune, ltsm_jax.forecast):
        assert reading <= set(inspect.signature(call).parameters), call
    assert "masks" in inspect.signature(ltsm_jax.fit).parameters


@pytest.mark.slow
def test_what_forecast_reads_fit_reads(model, pre, series):
    """A long table of two items with gaps, out of order: every option that its messages name is one
    of fit.
    """
    long = pd.concat(
        [
            pd.DataFrame({"item": name, "at": series.timestamps, "sold": row})
            for name, row in zip("pq", series.values)
        ]
    )
    long = long.drop(index=[100, 101]).sample(frac=1.0, random_state=0)
    how = {
        "target": "sold",
        "time": "at",
        "id": "item",
        "irregular": "regularise",
        "missing": "interpolate",
    }
    fitted = fit(model, pre, long, method="ff", **SHORT, **how)
    future = ltsm_jax.forecast(fitted.model, fitted.params, long, 3, **how)
    assert fitted.splits.columns == tuple(future.columns[1:])
    assert len(fitted.splits.columns) == 2


def test_a_recipe_keeps_what_a_config_leaves_out(model, pre, splits):
    fitted = fit(
        model, pre, splits, method="ff", config=ltsm_jax.TrainConfig(epochs=1), show_progress=False
    )
    history = fitted.result.history
    assert len(history) == 1 and history[0]["lr"] == pytest.approx(model.recipe().lr)
    assert history[0]["step"] == -(-splits.train.n // model.recipe().batch_size)


def test_two_seeds_are_refused(model, pre, splits):
    with pytest.raises(ValueError, match="seed=1 is asked for, and the config says seed=2"):
        fit(model, pre, splits, seed=1, config=ltsm_jax.TrainConfig(seed=2))


def test_a_strategy_of_ones_own_is_as_good_as_a_name(model, pre, splits):
    assert ltsm_jax.Strategy is strategies.Strategy
    named = fit(
        model,
        pre,
        splits,
        method="sff",
        alpha=0.9,
        config=training.TrainConfig(epochs=1),
        show_progress=False,
    )
    own = fit(
        model,
        pre,
        splits,
        method=strategies.sff(0.9),
        config=training.TrainConfig(epochs=1),
        show_progress=False,
    )
    for a, b in zip(
        jax.tree.leaves(named.result.params), jax.tree.leaves(own.result.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="a Strategy has its own"):
        fit(model, pre, splits, method=strategies.sff(0.9), alpha=0.5)


# --------------------------------------------------------------------------------------------------
# one scaling rule


def test_what_lies_outside_the_windows_does_not_change_training(model, pre, series):
    """Another unit, and a rescaled stretch that no window of the last rows sees: the same steps are
    taken.
    """
    quiet = {
        "method": "ff",
        "config": training.TrainConfig(epochs=1, batch_size=64),
        "show_progress": False,
    }
    plain = fit(model, pre, series, **quiet)
    scaled = dataclasses.replace(series, values=series.values * 1e6 + 3e7)
    other = fit(model, pre, scaled, **quiet)
    assert other.tuned["mse"] == pytest.approx(plain.tuned["mse"], rel=1e-3)
    assert other.result.history[0]["train_loss"] == pytest.approx(
        plain.result.history[0]["train_loss"], rel=1e-3
    )


def test_a_fit_scores_what_a_forecast_gives(model, pre, series):
    """The last validation window, forecast from a table that ends before its target, has the error
    that fit reports.
    """
    splits = prepare(series, 64, 8)  # longer than the model's own 32
    task = ltsm_jax.api.forecasting.Forecasting("ims", "context")
    lo = splits.borders.val[0]
    one = dataclasses.replace(splits, val=splits.val.take(np.array([0])))
    mse = task.evaluate(model, pre, one)["mse"]
    before = Series("a", series.values[:1, :lo], ("a",))
    got = ltsm_jax.forecast(model, pre, before, 8)["a"].to_numpy()
    truth = series.values[0, lo : lo + 8]
    assert mse == pytest.approx(np.mean(np.square((got - truth) / splits.scaler.std[0])), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# missing values


@pytest.mark.slow
def test_a_series_with_gaps_is_tuned_as_it_is(model, pre, series):
    holes = dataclasses.replace(series, values=series.values.copy())
    holes.values[0, 40:90] = np.nan
    holes.values[2, ::7] = np.nan
    fitted = fit(model, pre, holes, method="ff", **SHORT)
    assert np.isfinite([fitted.zero_shot["mse"], fitted.tuned["mse"], fitted.difference]).all()
    assert np.isfinite(fitted.result.history[0]["train_loss"])
    assert any("left out" in note for note in fitted.splits.notes)
    assert all(np.isfinite(scores["mse"]) for scores in fitted.naive.values())
    # scored over what is observed: by hand, from the forecasts
    task, windows = ltsm_jax.api.forecasting.Forecasting("ims", "context"), fitted.splits.val
    _, target, point = ltsm_jax.api.forecasting.forecast_windows(
        task.predictor(model), pre, windows, np.arange(windows.n)
    )
    assert fitted.zero_shot["mse"] == pytest.approx(np.nanmean(np.square(point - target)), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# the verdict


@pytest.mark.slow
def test_naive_forecasts_count_in_the_verdict(model, pre):
    """A season of a day that repeats but for a little noise: a model that was never trained is far
    behind.
    """
    t, rng = np.arange(300), np.random.default_rng(0)
    stamps = np.datetime64("2024-01-01", "us") + t * np.timedelta64(1, "h")
    values = (np.sin(2 * np.pi * t / 24) + 0.01 * rng.normal(size=300))[None]
    fitted = fit(model, pre, Series("days", values, ("y",), stamps, "h"), method="ff", **SHORT)
    assert set(fitted.naive) == {"last value", "seasonal naive"}
    assert fitted.naive["seasonal naive"]["mse"] < fitted.tuned["mse"]
    assert "the seasonal naive is better than either: validation MSE" in str(fitted)


def test_equal_within_the_interval_is_no_loss(model, pre, splits):
    fitted = fit(
        model,
        pre,
        splits,
        method="ff",
        config=training.TrainConfig(epochs=1, lr=1e-12),
        show_progress=False,
    )
    same = dataclasses.replace(fitted, kept="zero_shot", interval=(-1e-3, 1e-3), difference=1e-6)
    assert "no difference that the data can show" in str(same) and "lost" not in str(same)
    unsure = dataclasses.replace(fitted, interval=(float("nan"), float("nan")))
    assert "too short to say" in str(unsure) and "nan" not in str(unsure)


def test_a_constant_column_has_a_verdict(model, pre):
    fitted = fit(model, pre, Series("still", np.full((1, 300), 5.0), ("y",)), method="ff", **SHORT)
    assert "validation MSE" in str(fitted)


def test_in_a_notebook_it_is_short(model, pre, splits):
    fitted = fit(
        model, pre, splits, method="ff", config=training.TrainConfig(epochs=1), show_progress=False
    )
    assert len(repr(fitted)) < 200 and "validation MSE" in repr(fitted)
    assert len(fitted._repr_html_()) < 2000


# --------------------------------------------------------------------------------------------------
# folders


def test_a_folder_belongs_to_one_model_and_one_table(model, pre, splits, series, tmp_path):
    quiet = {"method": "ff", "config": training.TrainConfig(epochs=1), "show_progress": False}
    first = fit(model, pre, splits, folder=tmp_path / "run", **quiet)
    again = fit(model, pre, splits, folder=tmp_path / "run", **quiet)
    assert again.tuned == first.tuned

    other = Timer(dataclasses.replace(model.config, activation="relu"))
    with pytest.raises(ValueError, match=r"activation|model"):
        fit(other, pre, splits, folder=tmp_path / "run", **quiet)
    later = dataclasses.replace(series, timestamps=series.timestamps + np.timedelta64(1, "D"))
    with pytest.raises(ValueError, match="stamps|data_sha256"):
        fit(model, pre, prepare(later, 32, 8), folder=tmp_path / "run", **quiet)
    moved = jax.tree.map(lambda leaf: leaf * 1.01, pre)
    with pytest.raises(ValueError, match="params_sha256|another"):
        fit(model, moved, splits, folder=tmp_path / "run", **quiet)


# --------------------------------------------------------------------------------------------------
# what fits


def months(rows=144):
    t = np.arange(rows)
    stamps = (np.datetime64("2010-01") + t.astype("timedelta64[M]")).astype("datetime64[us]")
    values = (
        100 + t / 10 + 10 * np.sin(2 * np.pi * t / 12) + np.random.default_rng(0).normal(size=rows)
    )
    return Series("monthly", values[None], ("y",), stamps, "MS")


PATCH_96 = Timer(
    TimerConfig.of(96, 8, 8, 1, 1, context_len=672, horizon=96)
)  # as timer-tiny counts, but smaller
MIXER = TTM(
    TTMConfig.of(
        context_len=96,
        horizon=24,
        patch_len=12,
        d_model=16,
        decoder_d_model=12,
        layers=1,
        decoder_layers=1,
        levels=1,
    )
)


@pytest.mark.parametrize(
    "which", [PATCH_96, pytest.param(MIXER, marks=pytest.mark.slow)], ids=["timer", "ttm"]
)
def test_144_months_are_tuned_for_12(which):
    params = jax.jit(which.init)(jax.random.key(0))
    fitted = fit(which, params, months(), method="ff", horizon=12, **(SHORT | {"few_shot": 1.0}))
    assert np.isfinite(fitted.tuned["mse"]) and fitted.splits.val.horizon == 12
    assert fitted.splits.train.n >= 1
    if which is PATCH_96:
        assert fitted.splits.val.context_len == 96
        assert any("context of 96 rows instead of 672" in note for note in fitted.splits.notes)
        assert any("training loss: direct" in note for note in fitted.splits.notes)
        assert "context of 96 rows" in str(fitted), "whoever prints it reads what was given up"


@pytest.mark.parametrize(
    "which", [PATCH_96, pytest.param(MIXER, marks=pytest.mark.slow)], ids=["timer", "ttm"]
)
@pytest.mark.parametrize(
    "asked", [{"context_len": 140}, {"horizon": 90}, {"horizon": 60, "mode": "ims"}]
)
def test_the_advice_works_when_it_is_followed(which, asked):
    params = jax.eval_shape(which.init, jax.random.key(0))
    asked = {"horizon": 12} | asked
    with pytest.raises(DataError, match="What fits: ") as caught:
        cut_windows(which, params, months(), **asked)
    advice = dict(part.split("=") for part in str(caught.value).split("What fits: ")[1].split(", "))
    follow = {"horizon": asked["horizon"]} | {
        k: json.loads(v.replace("'", '"')) for k, v in advice.items()
    }
    splits, mode = cut_windows(which, params, months(), **follow)
    assert splits.train.n >= 1 and splits.val.n >= 1 and mode == follow["mode"]


def test_a_series_that_nothing_fits_is_told_so():
    params = jax.eval_shape(PATCH_96.init, jax.random.key(0))
    with pytest.raises(DataError, match="too few to tune this model on"):
        cut_windows(PATCH_96, params, months(30), horizon=12)


def test_a_long_series_is_cut_as_ever(model, pre, series):
    splits, mode = cut_windows(model, pre, series, horizon=8)
    want = prepare(series, 32, 8)
    assert (splits.borders, splits.notes, mode) == (want.borders, want.notes, "ims")
    assert trees.flatten(splits.train).keys() == trees.flatten(want.train).keys()
    np.testing.assert_array_equal(splits.train.starts, want.train.starts)
