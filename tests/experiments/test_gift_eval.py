"""GIFT-Eval's windows and scores, by hand."""

import math

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from experiments import gift_eval
from ltsm_jax import Forecaster
from ltsm_jax.data import DataError, read_panel
from ltsm_jax.models.chronos_bolt import ChronosBolt


def panel_of(lengths, freq="D"):
    rng = np.random.default_rng(0)
    parts = []
    for name, n in lengths.items():
        stamps = pd.date_range("2020-01-01", periods=n, freq=freq)
        parts.append(pd.DataFrame({"id": name, "day": stamps, "y": rng.normal(size=n).cumsum()}))
    return read_panel(pd.concat(parts), id="id", target="y")


def write(table, file):
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    "freq, term, horizon, season",
    [
        ("h", "short", 48, 24),
        ("15min", "medium", 480, 96),
        ("D", "short", 30, 1),
        ("W", "long", 120, 1),
        ("M", "short", 12, 12),
        ("Q", "short", 8, 4),
        ("10s", "short", 60, 360),
    ],
)
def test_horizon_and_season_follow_from_the_step(freq, term, horizon, season):
    assert gift_eval.horizon_of(freq, term) == horizon
    assert gift_eval.gift_season(freq) == season


def test_a_step_without_a_horizon():
    with pytest.raises(ValueError, match="give --horizon"):
        gift_eval.horizon_of(None, "short")
    assert gift_eval.gift_season(None) == 1


def test_windows_fill_a_tenth_of_the_shortest_series_without_overlap():
    panel = panel_of({"a": 120, "b": 100})
    origins = gift_eval.windows_of(panel, 4)  # ceil(10 / 4) = 3
    assert origins.items.tolist() == [0, 0, 0, 1, 1, 1]
    assert origins.ends.tolist() == [108, 112, 116, 208, 212, 216]
    assert len(gift_eval.windows_of(panel, 30).items) == 2, "at least one"
    assert len(gift_eval.windows_of(panel_of({"a": 900}), 1).items) == 20, "at most 20"
    with pytest.raises(ValueError, match="do not fit"):
        gift_eval.windows_of(panel, 100)


def test_scores_of_an_example_by_hand():
    true = np.array([[2.0, 4.0], [10.0, np.nan]])
    said = np.array([[1.0, 5.0], [8.0, 3.0]])
    quantiles = np.stack([said - 1, said, said + 2], axis=-1)  # levels 0.1, 0.5, 0.9
    found = gift_eval.scores(true, quantiles, (0.1, 0.5, 0.9), np.array([0.5, 4.0]))
    # absolute errors 1, 1 and 2; over seasonal errors 0.5 and 4
    assert found["mase"] == pytest.approx((1 / 0.5 + 2 / 4) / 2)
    # gaps to the low quantile 2, 0, 3; to the median 1, -1, 2; to the high one -1, -3, 0
    low = 0.1 * 2 + 0 + 0.1 * 3
    middle = 0.5 * (1 + 1 + 2)
    high = 0.1 * 1 + 0.1 * 3 + 0
    assert found["crps"] == pytest.approx(2 * (low + middle + high) / 3 / (2 + 4 + 10))


def test_a_window_without_seasonal_error_has_no_mase():
    true, quantiles = np.ones((2, 3)), np.zeros((2, 3, 1))
    found = gift_eval.scores(true, quantiles, (0.5,), np.array([0.0, 2.0]))
    assert found["mase"] == 0.5
    assert math.isnan(gift_eval.scores(true, quantiles, (0.5,), np.zeros(2))["mase"])
    assert gift_eval.seasonal_error(np.array([1.0, 2.0, 4.0]), 2) == 3.0
    assert gift_eval.seasonal_error(np.array([1.0, 2.0]), 7) == 1.0, "of neighbours"


def test_mase_is_that_of_the_librarys_medians():
    panel = panel_of({"a": 60})
    model = ChronosBolt(ChronosBolt.small())
    bolt = Forecaster(model, jax.jit(model.init)(jax.random.key(0)), context_len=16)
    found = gift_eval.evaluate(bolt, panel, 2)  # three windows
    y, days = panel.values[0], pd.date_range("2020-01-01", periods=60)
    each = []
    for end in (54, 56, 58):
        table = pd.DataFrame({"day": days[:end], "y": y[:end]})
        said = bolt.predict(table, 2, quantile_levels=(0.5,), show_progress=False)
        error = np.abs(y[end : end + 2] - said["0.5"].to_numpy()).mean()
        each.append(error / np.abs(np.diff(y[:end])).mean())
    assert (found["windows"], found["series"]) == (3, 1)
    np.testing.assert_allclose(found["mase"], np.mean(each), rtol=1e-5)


def test_the_command_reads_gift_evals_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = {
        "item_id": ["x", "y"],
        "start": [pd.Timestamp("2020-01-01"), pd.Timestamp("2020-02-01")],
        "freq": ["D", "D"],
        "target": [rng.normal(size=(2, 80)).tolist(), rng.normal(size=(2, 70)).tolist()],
    }
    table = pa.table(rows)
    place = tmp_path / "set/D"
    place.mkdir(parents=True)
    write(table, place / "data-00000-of-00001.arrow")
    model = ChronosBolt(ChronosBolt.small())
    Forecaster(model, jax.jit(model.init)(jax.random.key(0))).save(tmp_path / "bolt")
    words = ["--data", str(place), "--models", str(tmp_path / "bolt"), "--horizon", "3"]
    assert gift_eval.main([*words, "--out", str(tmp_path / "out")]) == 0
    found = pd.read_csv(tmp_path / "out/results.csv")
    assert found["model"].tolist() == [str(tmp_path / "bolt"), "seasonal_naive"]
    assert found["series"].tolist() == [4, 4] and found["windows"].tolist() == [3, 3]
    assert np.isfinite(found[["mase", "crps"]]).all(axis=None)
    assert "seasonal_naive" in capsys.readouterr().out

    panel = gift_eval.read(str(place))
    assert panel.n_items == 2 and panel.columns == ("target_0", "target_1") and panel.freq == "D"


def test_files_that_are_not_gift_evals(tmp_path):
    table = pa.table({"a": [1]})
    write(table, tmp_path / "x.arrow")
    with pytest.raises(ValueError, match="no column freq, item_id, start, target"):
        gift_eval.read(str(tmp_path))


def test_a_panel_cut_off():
    panel = panel_of({"a": 20, "b": 10})
    cut = panel.until(np.array([15, 24]))
    assert cut.bounds.tolist() == [0, 15, 19]
    np.testing.assert_array_equal(cut.values[0, 15:], panel.values[0, 20:24])
    with pytest.raises(DataError):
        panel.until(np.array([15, 20]))
