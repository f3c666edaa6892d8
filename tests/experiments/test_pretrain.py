"""Six steps of pre-training: a model folder, scores beside the baselines, a rerun that trains
nothing.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
import ltsm_jax.training
from experiments import folder, pretrain
from experiments.pretrain import Pretrain
from ltsm_jax.data import Series, synthetic
from ltsm_jax.data.corpus import ScaledWindows, pool
from ltsm_jax.models import folders, moirai_2, timer
from ltsm_jax.tasks import forecasting

LENGTH = 800


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    """A preset of one narrow layer: what is tested here does not depend on the size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timer.PRESETS, "small", timer.TimerConfig.of(96, 16, 32, 1, 2))
        patch.setattr(pretrain, "HELD_OUT", 32)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six steps on generated and real series, scored on a table of two series."""
    root = tmp_path_factory.mktemp("pretrain")
    (root / "corpus").mkdir()
    real = synthetic.generate(5, 6, 1500)
    np.savez(root / "corpus" / "real.npz", values=real.ravel(), offsets=np.arange(7) * 1500)
    table = pd.DataFrame(synthetic.generate(6, 2, 2000).T, columns=["a", "b"])
    table.insert(0, "date", pd.date_range("2020", periods=2000, freq="h"))
    table.to_csv(root / "own.csv", index=False)
    args = Pretrain(
        out=root / "run",
        preset="small",
        generated=24,
        length=LENGTH,
        corpus=root / "corpus",
        steps=6,
        batch_size=8,
        evaluate=(str(root / "own.csv"),),
        parts=("val",),
    )
    return args, pretrain.main(args)


def test_the_model_folder_says_where_it_comes_from(finished):
    args, _ = finished
    model, params = ltsm_jax.load(args.out / "model")
    assert model == ltsm_jax.preset("small")
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
    made = json.loads((args.out / "model" / "config.json").read_text())["provenance"]
    assert made["steps"] == 6 and made["seed"] == 0 and made["licence"] == "Apache-2.0"
    assert made["source"].endswith("generated series and real series")
    assert made["cost"]["wall_minutes"] >= 0 and made["versions"]["jax"] == jax.__version__


def test_scores_stand_beside_the_baselines(finished):
    args, results = finished
    assert list(results["method"]) == ["zero-shot", "last value", "seasonal naive (24)"]
    assert (results["windows"] == 2 * (200 - 96 + 1)).all()  # every window of both variates
    assert np.isfinite(results[["mse", "mase"]]).all(axis=None)
    pd.testing.assert_frame_equal(pd.read_csv(args.out / "results.csv"), results)


def test_a_finished_model_is_scored_without_training(finished, tmp_path):
    args, results = finished
    again = Pretrain(
        out=tmp_path / "scores",
        model=str(args.out / "model"),
        evaluate=args.evaluate,
        parts=("val",),
    )
    found = pretrain.main(again)
    pd.testing.assert_frame_equal(found.drop(columns="model"), results.drop(columns="model"))
    assert set(found["model"]) == {"model"} and not (tmp_path / "scores" / "model").exists()


def test_a_short_series_is_scored_with_the_lengths_that_fit():
    small = ltsm_jax.preset("small")  # 672 -> 96, patches of 96

    def lengths(rows):
        return pretrain.lengths_for(small, Series("a", np.zeros((1, rows)), ("a",)))

    assert lengths(2000) == (672, 96)  # parts of 200 rows hold a horizon twice
    assert lengths(966) == (576, 24)  # parts of 97 and 193 do not; 676 rows to train


def test_files_are_left_out_of_the_corpus_and_the_rest_is_recorded(finished):
    args, _ = finished
    made = json.loads((args.out / "model" / "config.json").read_text())["provenance"]["corpus"]
    assert made["series"] == 6 and made["points"] == 9000 and made["left_out"] == []
    with pytest.raises(ValueError, match="no files called nowhere"):
        pretrain.corpus_of(dataclasses.replace(args, leave_out=("nowhere",)))
    with pytest.raises(ValueError, match="no training window of .*: 0 series"):
        pretrain.windows(
            dataclasses.replace(args, leave_out=("real",), generated=0), ltsm_jax.preset("small")
        )


def test_training_moved_every_parameter(finished):
    args, _ = finished
    model, params = ltsm_jax.load(args.out / "model")
    start = model.init(ltsm_jax.training.keys(0)["init"])
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start)))


def test_again_trains_nothing_and_scores_the_same(finished):
    args, results = finished
    before = (args.out / "train" / "metrics.jsonl").read_bytes()
    pd.testing.assert_frame_equal(pretrain.main(args), results)
    assert (args.out / "train" / "metrics.jsonl").read_bytes() == before


def test_a_second_process_with_the_same_folder_is_refused(finished):
    args, _ = finished
    with folder.held(args.out), pytest.raises(ValueError, match="is in use by process"):
        pretrain.main(args)


def test_training_goes_on_from_a_model_with_the_absolute_loss_and_scores_some_windows(
    finished, tmp_path
):
    args, results = finished
    more = dataclasses.replace(
        args,
        out=tmp_path / "more",
        start=str(args.out / "model"),
        corpus=None,
        loss="absolute",
        choose=False,
        steps=2,
        score_stride=7,
    )
    found = pretrain.main(more)
    # 105 starts of each of two variates: the 1st, 8th, ..., 99th
    assert found["windows"].tolist() == [2 * 15] * 3 and results["windows"].tolist() == [210] * 3
    record = json.loads((tmp_path / "more" / "train" / "config.json").read_text())
    assert "absolute, without dropout" in json.dumps(record) and str(
        args.out / "model"
    ) in json.dumps(record)
    old, new = (jax.tree.leaves(ltsm_jax.load(run.out / "model")[1]) for run in (args, more))
    gaps = [float(jnp.abs(a - b).max()) for a, b in zip(old, new, strict=True)]
    # two steps of at most about lr each: it has moved, and it is no fresh model
    assert 0 < max(gaps) < 0.01


def test_more_of_a_window_can_be_ahead_than_the_horizon():
    model = timer.Timer(timer.TimerConfig.of(96, 16, 16, 1, 2, context_len=672, horizon=96))
    assert pretrain.taught_lengths(model, None) == (672, 96)
    context_len, horizon = pretrain.taught_lengths(model, 480)
    assert (context_len, horizon) == (288, 480)
    x = np.arange(900.0, dtype=np.float32)
    whole = pool([x], 672, 96).train
    cut = dataclasses.replace(whole, context_len=context_len, horizon=horizon)
    assert cut.n == whole.n
    batch = cut.gather(jnp.array([0]))
    start = int(whole.starts[0])
    np.testing.assert_array_equal(batch["context"][0, 0], x[start : start + 288])
    np.testing.assert_array_equal(batch["target"][0, 0], x[start + 288 : start + 768])
    with pytest.raises(pretrain.flags.UsageError, match="context in windows of 768 steps, got 768"):
        pretrain.taught_lengths(model, 768)
    with pytest.raises(pretrain.flags.UsageError, match="imputation is what this preset is for"):
        pretrain.taught_lengths(ltsm_jax.preset("timer-tiny-imputation"), 96)


def test_the_steps_ahead_decide_the_run(finished, tmp_path, monkeypatch):
    args, _ = finished
    config = moirai_2.Moirai2Config.of(
        96, 16, 16, 1, 2, n_patches=1, context_len=672, variates="independent"
    )
    monkeypatch.setitem(moirai_2.PRESETS, "small-decoder", config)
    own = {"preset": "small-decoder", "corpus": None, "evaluate": (), "choose": False, "steps": 2}
    runs = []
    for name, ahead in (("horizon", None), ("more", 480)):
        run = dataclasses.replace(args, out=tmp_path / name, ahead=ahead, **own)
        pretrain.main(run)
        runs.append(jax.tree.leaves(ltsm_jax.load(run.out / "model")[1]))
    assert any((a != b).any() for a, b in zip(*runs, strict=True))
    record = json.loads((tmp_path / "more" / "train" / "config.json").read_text())
    assert '"ahead": 480' in json.dumps(record)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["imputation", "anomaly"])
def test_presets_of_other_tasks_are_trained_for_them(task, tmp_path, monkeypatch):
    sizes = {"imputation": (24, 192, 24), "anomaly": (96, 768, 96)}
    patch, context, horizon = sizes[task]
    config = timer.TimerConfig.of(
        patch, 16, 32, 1, 2, context_len=context, horizon=horizon, task=task
    )
    monkeypatch.setitem(timer.PRESETS, "tiny-task", config)
    args = Pretrain(
        out=tmp_path / "run", preset="tiny-task", generated=24, length=LENGTH, steps=4, batch_size=8
    )
    assert pretrain.main(args) is None
    model, params = ltsm_jax.load(tmp_path / "run" / "model")
    start = model.init(ltsm_jax.training.keys(0)["init"])
    moved = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
    ]
    assert all(moved)
    made = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["provenance"]
    assert made["loss"].startswith(task) and made["source"].endswith("generated series only")
    metrics = [
        json.loads(line)
        for line in (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    assert np.isfinite(metrics[-1]["val_mse"])
    with pytest.raises(pretrain.flags.UsageError, match=f"experiments.{task} scores it"):
        pretrain.main(dataclasses.replace(args, evaluate=("ETTh1",), out=tmp_path / "other"))


def test_pools_are_joined_without_windows_across_them(finished):
    args, _ = finished
    model = ltsm_jax.preset("small")
    parts = pretrain.windows(args, model)
    n_generated = 24 * ((LENGTH - 768) // 16 + 1)
    assert parts.train.n > n_generated and parts.val is not None
    own = synthetic.generate(0, 24, LENGTH)
    first, last = parts.train.gather(jnp.array([0, n_generated - 1]))["context"][:, 0]
    np.testing.assert_array_equal(first, own[0, :672])
    np.testing.assert_array_equal(last, own[-1, LENGTH - 768 : LENGTH - 96])
    real = synthetic.generate(5, 6, 1500)
    after = parts.train.gather(jnp.array([n_generated]))
    joined = np.concatenate([after["context"][0, 0], after["target"][0, 0]])
    start = int(parts.train.starts[n_generated]) - own.size
    np.testing.assert_array_equal(joined, real[0, start : start + 768])


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--generated N, --corpus FOLDER"):
        pretrain.windows(Pretrain(out=tmp_path, generated=0), ltsm_jax.preset("small"))


@pytest.mark.parametrize("name", ["timer-tiny", "timer-median", "moirai2-mini", "toto2-mini"])
def test_a_shipped_model_is_small_and_says_where_it_comes_from(name):
    folder = folders.SHIPPED / name
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 6e6
    made = json.loads((folder / "config.json").read_text())["provenance"]
    assert made["source"].endswith("generated series only") and made["licence"] == "Apache-2.0"
    assert (
        made["command"].startswith("python -m experiments.pretrain")
        and made["cost"]["wall_minutes"] > 0
    )


def test_the_model_of_medians_has_lower_absolute_errors_than_the_one_of_means():
    windows = ScaledWindows(pool(synthetic.generate(1, 256, 768), 672, 96).train)
    mae = {}
    for name in ("timer-tiny", "timer-median"):
        mae[name] = forecasting.evaluate(*ltsm_jax.load(name), windows)["mae"]
    assert mae["timer-median"] < 0.995 * mae["timer-tiny"]  # 0.5450 and 0.5502


@pytest.mark.parametrize("name", ["timer-tiny", "moirai2-mini", "toto2-mini"])
def test_a_shipped_model_forecasts_series_it_has_not_seen(name):
    model, params = ltsm_jax.load(name)
    series = synthetic.generate(
        1, 256, 768
    )  # of the seed that chose its epoch, not of the one that trained it
    windows = ScaledWindows(pool(series, 672, 96).train)
    score = lambda predictor, weights: forecasting.evaluate(predictor, weights, windows)["mse"]  # noqa: E731
    best_naive = min(score(forecasting.SeasonalNaive(season), {}) for season in (1, 24, 96))
    assert score(model, params) < 0.6 * best_naive
