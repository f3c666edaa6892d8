"""`Forecaster.fit`: from a table to a forecaster that forecasts with what its verdict deploys."""

import json

import chex
import jax
import numpy as np
import pandas as pd
import pytest

from ltsm_jax import Forecaster
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.methods.decision import Verdict
from ltsm_jax.methods.pruning import apply_masks, full_masks
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.methods.verdict import tuning
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import forecasting, panels
from ltsm_jax.training import TrainConfig, step

QUICK = {
    "budget": 60,
    "config": TrainConfig(epochs=3, lr=1e-2, batch_size=64),
    "show_progress": False,
}
LENGTHS = {"north": 500, "south": 460}  # of all tables here: each shape is compiled


@pytest.fixture(scope="module")
def timer():
    model = Timer(
        TimerConfig(8, 16, 8, equal_layers(1, 2, 8, 24), context_len=32, horizon=8, dropout=0.1)
    )
    return Forecaster(model, model.init(jax.random.key(7)), provenance={"source": "made here"})


def table(period):
    """Sales of two stores of different sizes, with a price that is known ahead."""
    rng = np.random.default_rng(0)
    pattern = (
        rng.normal(size=period) if period == 7 else np.sin(2 * np.pi * np.arange(period) / period)
    )
    parts = []
    for i, (store, rows) in enumerate(LENGTHS.items()):
        sold = 10.0 ** (i + 1) * (
            3 + pattern[np.arange(rows) % period] + 0.05 * rng.normal(size=rows)
        )
        day = pd.date_range("2024-01-01", periods=rows, freq="D")
        parts.append(
            pd.DataFrame({"store": store, "day": day, "sold": sold, "price": rng.normal(size=rows)})
        )
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def fitted(timer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    found = timer.fit(
        table(16),
        8,
        methods="ff",
        id="store",
        time="day",
        target="sold",
        known="price",
        folder=folder,
        **QUICK,
    )
    return found, folder


def test_a_pattern_that_is_learned_is_what_forecasts(fitted, timer):
    found, _ = fitted
    assert found.verdict.deploy == "ff" and found.baseline is None
    assert (found.targets, found.known, found.id, found.time, found.freq) == (
        ("sold",),
        ("price",),
        "store",
        "day",
        "D",
    )
    assert found.params is not timer.params and timer.verdict is None
    assert found.provenance == timer.provenance and found.licence == timer.licence
    assert any(note.startswith("covariates take no part") for note in found.verdict.notes)

    # Columns need not be named again; both stores are forecast in their own size.
    got = found.predict(table(16), 8, quantile_levels=(0.1, 0.9))
    assert list(got.columns) == ["store", "day", "predictions", "0.1", "0.9"]
    phase = 2 * np.pi * (np.arange(460, 468) % 16) / 16
    south = got[got["store"] == "south"]["predictions"]
    np.testing.assert_allclose(south, 100 * (3 + np.sin(phase)), atol=50)
    assert ((got["0.1"] <= got["predictions"]) & (got["predictions"] <= got["0.9"])).all()
    assert any("held out of training" in note for note in got.attrs["notes"])


def test_the_folder_holds_all_that_was_found(fitted):
    found, folder = fitted
    stored = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    assert stored["deploy"] == "ff" and stored["reason"] == found.verdict.reason
    assert stored["methods"].keys() == {"zero_shot", "ff"}
    assert Verdict.from_json(stored).to_json() == found.verdict.to_json()
    assert found.verdict.reason in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.html").is_file()

    again = Forecaster.load(folder / "model")
    assert str(again.verdict) == str(found.verdict)
    want = found.predict(table(16), 8)
    pd.testing.assert_frame_equal(again.predict(table(16), 8), want, rtol=1e-5)


def test_a_run_that_is_called_again_only_reads(fitted, timer):
    """As after a kill: what is finished is not trained once more."""
    found, folder = fitted
    named = {"id": "store", "time": "day", "target": "sold", "known": "price"}
    again = timer.fit(table(16), 8, methods="ff", folder=folder, **named, **QUICK)
    chex.assert_trees_all_equal(again.params, found.params)


def test_an_estimate_of_the_time_compiles_what_does_the_work(fitted, timer):
    """Tuning and forecasts have been compiled by `fitted`: the pieces that are timed are of the
    same programs.
    """
    found, _ = fitted
    named = {"id": "store", "time": "day", "target": "sold", "known": "price"}
    panel = timer.read(table(16), **named)
    found.predict(panel, 8)
    programs = (step.advance, forecasting._batch_errors, panels._forecast)
    before = [program._cache_size() for program in programs]
    prepared = timer.prepared(panel, 8)
    work = tuning(prepared, {"ff": strategy("ff")}, QUICK["config"], QUICK["budget"])
    whole = timer.estimate_fit(prepared, work)
    assert whole.measured and 0 < whole.seconds < 60
    assert found.estimate(panel, 8).seconds < whole.seconds
    assert [program._cache_size() for program in programs] == before


def test_a_naive_forecast_that_wins_is_what_forecasts(timer):
    found = timer.fit(table(7), 8, method="ff", id="store", time="day", target="sold", **QUICK)
    assert found.verdict.deploy == found.baseline == "seasonal_naive"
    got = found.predict(table(7), 8)
    last = table(7)["sold"].to_numpy()[-7:]
    np.testing.assert_allclose(got["predictions"][-8:], [*last, last[0]], rtol=1e-5)
    assert got["predictions"].notna().all() and (got["0.1"] < got["0.9"]).all()


def test_what_was_chosen_on_short_contexts_forecasts_from_such(timer):
    """20 rows: 4 test, 4 validate, and 12 are seen before them."""
    stamps = pd.date_range("2024-01-01", periods=20, freq="h")
    rising = pd.DataFrame({"hour": stamps, "load": np.arange(20.0)})
    found = timer.fit(rising, 4, methods=(), target="load", show_progress=False)
    assert found.verdict.context_len == 8  # a whole patch
    assert found.baseline == "last_value" and found.context_len == 8
    whole = timer.fit(
        table(7), 8, methods=(), id="store", time="day", target="sold", show_progress=False
    )
    assert whole.verdict.context_len == 32 and whole.context_len is None


def test_what_cannot_be_fitted_is_refused(timer):
    with pytest.raises(ValueError, match="give one of the two"):
        timer.fit(table(7), 8, methods="ff", method="sff")
    masks = full_masks(timer.model)
    masks["layer_0"]["up"]["out"] = np.arange(24, dtype=np.float32) % 2
    pruned = Forecaster(timer.model, apply_masks(timer.params, masks))
    with pytest.raises(ValueError, match="hand in the masks"):
        pruned.fit(table(7), 8, target="sold", id="store", time="day", show_progress=False)
