"""fev tasks: the score of fev is that of the forecasts that the library makes."""

import numpy as np
import pandas as pd
import pytest

from experiments import fev_tasks
from ltsm_jax import Forecaster
from ltsm_jax.models.chronos_2 import Chronos2
from ltsm_jax.models.chronos_bolt import ChronosBolt

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:A future version of pandas"),  # fev's own
]
fev = pytest.importorskip("fev")
HORIZON = 4


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks of a local file: one of a target, one of two targets with covariates."""
    place = tmp_path_factory.mktemp("fev")
    rng = np.random.default_rng(0)
    rows = []
    for name, length in (("b", 70), ("a", 90), ("c", 60)):
        rows.append(
            {
                "id": name,
                "timestamp": list(pd.date_range("2024-01-01", periods=length, freq="D")),
                "target": rng.normal(size=length).cumsum(),
                "other": rng.normal(size=length).cumsum() + 10,
                "price": rng.uniform(1, 2, length),
                "visits": rng.normal(size=length),
                "kind": name.upper(),
            }
        )
    pd.DataFrame(rows).to_parquet(place / "data.parquet")
    (place / "tasks.yaml").write_text(
        f"""tasks:
- dataset_path: {place}/data.parquet
  horizon: {HORIZON}
  num_windows: 2
  seasonality: 7
  eval_metric: MASE
- dataset_path: {place}/data.parquet
  horizon: {HORIZON}
  num_windows: 2
  seasonality: 7
  eval_metric: WQL
  extra_metrics: [SQL, MASE]
  quantile_levels: [0.1, 0.5, 0.9]
  target: [target, other]
  known_dynamic_columns: [price]
  past_dynamic_columns: [visits]
  static_columns: [kind]
"""
    )
    return place / "tasks.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    import jax

    found = {}
    for family in (ChronosBolt, Chronos2):
        model = family(family.small())
        place = tmp_path_factory.mktemp("models") / model.family
        Forecaster(model, jax.jit(model.init)(jax.random.key(0))).save(place)
        found[model.family] = str(place)
    return found


def mase(true, said, past, season=7):
    """By its definition, of one series."""
    return np.abs(true - said).mean() / np.abs(past[season:] - past[:-season]).mean()


def test_the_score_is_that_of_the_librarys_forecasts(tasks, models):
    task = fev_tasks.load_tasks(tasks)[0]
    forecaster = Forecaster.load(models["chronos_bolt"])
    options = fev_tasks.Options(tasks=tasks)
    found = fev_tasks.summary(forecaster, "bolt", task, options)
    assert found["model_name"] == "bolt" and not found["trained_on_this_dataset"]
    scores = []
    for window in task.iter_windows():
        past, _, truth = window._get_past_future_test_data()
        for series, after in zip(past, truth, strict=True):
            table = pd.DataFrame({"day": series["timestamp"], "y": series["target"]})
            said = forecaster.predict(
                table, HORIZON, target="y", quantile_levels=(), show_progress=False
            )["predictions"].to_numpy()
            scores.append(mase(after["target"], said, np.asarray(series["target"])))
    assert len(scores) == 6 and found["num_forecasts"] == 6
    np.testing.assert_allclose(found["test_error"], np.mean(scores), rtol=1e-5)


def test_covariates_reach_a_model_that_takes_them_and_quantiles_come_out(tasks, models):
    task = fev_tasks.load_tasks(tasks)[1]
    forecaster = Forecaster.load(models["chronos_2"])
    window = next(iter(task.iter_windows()))
    found = fev_tasks.forecasts(forecaster, task, window)
    assert set(found) == {"target", "other"}
    assert [len(records) for records in found.values()] == [3, 3]
    assert set(found["target"][0]) == {"predictions", "0.1", "0.5", "0.9"}
    past, reading = fev_tasks.tables_of(task, window)
    assert reading["known"] == ["price"] and reading["past"] == ["visits"]
    dearer = reading["future"].assign(price=reading["future"].price * 3)
    changed = forecaster.predict(
        past, HORIZON, show_progress=False, **(reading | {"future": dearer})
    )
    first = changed[(changed["id"] == "a") & (changed["target_name"] == "target")]
    assert np.abs(first["predictions"] - found["target"][0]["predictions"]).max() > 1e-6


def test_the_command_goes_on_where_it_stopped(tasks, models, tmp_path, capsys, monkeypatch):
    words = ["--tasks", str(tasks), "--models", ",".join(models.values()), "--out"]
    assert fev_tasks.main([*words, str(tmp_path / "out")]) == 0
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert len(results) == 6 and set(results["model_name"]) == {*models.values(), "seasonal_naive"}
    assert {"test_error", "dataset_fingerprint", "fev_version", "horizon"} <= set(results)
    said = capsys.readouterr()
    assert "| seasonal_naive | 1.000 |" in said.out + said.err
    board = fev.leaderboard(str(tmp_path / "out/results.csv"), baseline_model="seasonal_naive")
    assert len(board) == 3  # fev reads its own form back

    monkeypatch.setattr(fev_tasks, "summary", lambda *_: pytest.fail("evaluated again"))
    assert fev_tasks.main([*words, str(tmp_path / "out")]) == 0


def test_tuned_on_the_first_window(tasks, models, tmp_path):
    words = ["--tasks", str(tasks), "--models", models["chronos_bolt"], "--method", "ff"]
    assert fev_tasks.main([*words, "--budget", "3", "--out", str(tmp_path)]) == 0
    results = pd.read_csv(tmp_path / "results.csv").set_index("model_name")
    tuned = results.loc[f"{models['chronos_bolt']}+ff"]
    assert tuned["trained_on_this_dataset"].all() and (tuned["training_time_s"] > 0).all()


def test_errors_in_words(tmp_path, capsys):
    assert fev_tasks.main(["--tasks", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "odd.yaml").write_text("tasks:\n- horizon: 3\n")
    assert fev_tasks.main(["--tasks", str(tmp_path / "odd.yaml")]) == 2
    said = capsys.readouterr().err
    assert "no such file" in said and "no tasks of fev" in said
