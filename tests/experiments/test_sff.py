import dataclasses
import json

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import cells, flags, report, sff
from experiments.flags import UsageError
from ltsm_jax import training, trees
from ltsm_jax.methods import run
from ltsm_jax.tasks import forecasting

FIRST = [
    "data",
    "model",
    "method",
    "alpha",
    "seed",
    "horizon",
    "val_mse",
    "val_mae",
    "test_mse",
    "test_mae",
]
FIRST += ["epochs", "seconds", "windows"]
CLOCKS = ["seconds"]
METHODS = "zero_shot,ff,tfs,sff,lp,lpff"


@pytest.fixture(scope="module")
def command(micro, waves):
    """The command line of a comparison that takes seconds."""

    def command(out, methods=METHODS, **flags):
        flags = {
            "alpha": "0.7",
            "seeds": "0,1",
            "epochs": "2",
            "batch-size": "128",
            "lr": "1e-3",
        } | flags
        if not {"sff", "noise"} & set(methods.split(",")):
            del flags["alpha"]
        words = [
            "--data",
            str(waves),
            "--model",
            str(micro),
            "--methods",
            methods,
            "--out",
            str(out),
        ]
        return words + [word for name, value in flags.items() for word in (f"--{name}", value)]

    return command


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory):
    """An undisturbed comparison of all six methods with two seeds."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert sff.main(command(out)) == 0
    return out


def rows(folder):
    return pd.read_csv(folder / "results.csv")


def one(frame, method, seed=0):
    return frame[(frame.method == method) & (frame.seed == seed)].iloc[0]


def test_a_stride_scores_every_nth_start_of_all_variates(command, tmp_path):
    c = sff.resolve(sff.parse(command(tmp_path, **{"score-stride": "10"})))
    for windows, rows_of_part in ((c.splits.val, 30), (c.splits.test, 60)):
        starts, rows = np.asarray(windows.starts), np.asarray(windows.rows)
        assert len(starts) == 3 * len(range(0, rows_of_part - 8 + 1, 10))
        for row in range(3):
            assert set(np.diff(starts[rows == row])) == {10}
    assert c.settings["score_stride"] == 10
    assert c.windows.n > 3 * 10  # all training windows


def test_results_have_a_row_per_method_and_seed(folder):
    frame = rows(folder)
    assert list(frame.columns[: len(FIRST)]) == FIRST
    assert list(zip(frame.method, frame.seed)) == [
        (m, s) for m in METHODS.split(",") for s in (0, 1)
    ]
    assert frame.alpha.notna().tolist() == (frame.method == "sff").tolist()
    assert set(frame.alpha.dropna()) == {0.7}
    assert (
        set(frame.data) == {"waves"} and set(frame.model) == {"micro"} and set(frame.horizon) == {8}
    )
    assert set(frame.windows) == {3 * (60 - 8 + 1)}  # every test window of every column
    assert set(frame["mode"]) == {"ims"}
    assert frame.epochs.tolist() == [0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 4, 4]
    assert (
        frame[["val_mse", "val_mae", "test_mse", "test_mae", "test_rmse", "test_mape", "test_mase"]]
        .notna()
        .all(axis=None)
    )
    np.testing.assert_allclose(frame.test_rmse**2, frame.test_mse)
    assert one(frame, "lp").trained_parameters == 8 * 8 + 8
    assert (frame.git_commit.str.len() > 0).all()


def test_numbers_are_those_of_the_saved_models(folder, micro, waves):
    c = sff.resolve(sff.parse(["--data", str(waves), "--model", str(micro), "--out", str(folder)]))
    for method in ("ff", "sff-0.7", "lpff"):
        model, params = ltsm_jax.load(folder / "cells" / f"{method}-seed1" / "model")
        row = one(rows(folder), method.split("-")[0], 1)
        for part in ("val", "test"):
            score = forecasting.evaluate(model, params, getattr(c.splits, part))
            assert [score[k] for k in ("mse", "mae")] == [row[f"{part}_mse"], row[f"{part}_mae"]]
    zero = forecasting.evaluate(c.model, c.params, c.splits.test)
    assert (
        one(rows(folder), "zero_shot").test_mse
        == one(rows(folder), "zero_shot", 1).test_mse
        == zero["mse"]
    )


def test_first_phase_of_lpff_is_lp(folder):
    lp, lpff = (
        json.loads((folder / f"cells/{m}-seed0/result.json").read_text())["history"]
        for m in ("lp", "lpff")
    )
    assert lpff[:2] == lp
    assert len(lpff) == 4


def test_finished_cells_are_not_run_again(folder, command, monkeypatch, capsys):
    before = (folder / "results.csv").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("a finished cell ran")

    monkeypatch.setattr(run, "run", never)
    assert sff.main(command(folder)) == 0
    assert (folder / "results.csv").read_bytes() == before
    assert capsys.readouterr().out.count("finished before") == 12


def test_more_cells_join_the_same_folder(folder, command, tmp_path):
    import shutil

    out = tmp_path / "more"
    shutil.copytree(folder, out)
    assert sff.main(command(out, "sff", alpha="0.3,0.7", seeds="0")) == 0
    frame = rows(out)
    assert len(frame) == 13
    assert frame[frame.method == "sff"][["alpha", "seed"]].values.tolist() == [
        [0.3, 0],
        [0.7, 0],
        [0.7, 1],
    ]
    assert frame[frame.alpha != 0.3].reset_index(drop=True).equals(rows(folder))
    assert (out / "plots" / "alpha.png").is_file()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in between may catch it."""


@pytest.mark.parametrize(
    "where",
    [
        *(
            pytest.param(w, marks=pytest.mark.slow)
            for w in ("in training", "between training and result")
        ),
        "in the second phase",
    ],
)
def test_killed_and_started_again_it_gives_the_same_rows(
    folder, command, tmp_path, monkeypatch, no_pictures, where
):
    out, calls = tmp_path / "killed", []
    with monkeypatch.context() as patch:
        if where == "between training and result":
            target, name, fatal = (
                cells,
                "write_examples",
                lambda args, kwargs: "ff-seed1" in str(args[3]),
            )
        elif where == "in training":  # validation after the second epoch of the first trained cell
            target, name, fatal = forecasting, "evaluate", lambda args, kwargs: len(calls) == 8
        else:
            target, name, fatal = (
                training,
                "fit",
                lambda args, kwargs: "lpff-seed0/training/phase-1" in str(kwargs["folder"]),
            )
        real = getattr(target, name)

        def dying(*args, **kwargs):
            calls.append(1)
            if fatal(args, kwargs):
                raise Killed
            return real(*args, **kwargs)

        patch.setattr(target, name, dying)
        with pytest.raises(Killed):
            sff.main(command(out, "zero_shot,ff,lpff"))
    assert not (out / "results.csv").is_file() or len(rows(out)) < 6
    assert sff.main(command(out, "zero_shot,ff,lpff")) == 0
    undisturbed = rows(folder)
    undisturbed = undisturbed[undisturbed.method.isin(["zero_shot", "ff", "lpff"])].reset_index(
        drop=True
    )
    assert rows(out).drop(columns=CLOCKS).equals(undisturbed.drop(columns=CLOCKS))
    for cell in ("ff-seed1", "lpff-seed0"):
        a, b = (ltsm_jax.load(f / "cells" / cell / "model")[1] for f in (out, folder))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)


def test_another_setting_in_the_same_folder_is_refused(folder, command, capsys):
    before = (folder / "results.csv").read_bytes()
    assert sff.main(command(folder, lr="2e-3", epochs="3")) == 2
    said = capsys.readouterr().err
    assert "holds a comparison with other settings" in said
    assert "lr: 0.001 there, 0.002 now" in said and "epochs: 2 there, 3 now" in said
    assert (folder / "results.csv").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_diverges_does_not_stop_the_others(command, tmp_path, capsys, no_pictures):
    out = tmp_path / "diverges"
    real = sff.strategy

    def strategy(name, **kwargs):
        import dataclasses

        from ltsm_jax.methods.strategies import Phase

        made = real(name, **kwargs)
        return dataclasses.replace(made, phases=(Phase(lr=1e30),)) if name == "ff" else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sff, "strategy", strategy)
        assert sff.main(command(out, "zero_shot,ff,lp", seeds="0")) == 1
    assert rows(out).method.tolist() == ["zero_shot", "lp"]
    assert "failed: [2/3] FF, seed 0" in capsys.readouterr().err


@pytest.mark.slow
def test_alphas_are_for_mixtures_only_and_own_columns_work(command, tmp_path, capsys):
    out = tmp_path / "target"
    flags = {
        "alpha": "0.5,1",
        "target": "b",
        "seeds": "0",
        "epochs": "1",
        "few-shot": "0.5",
        "mode": "direct",
        "horizon": "6",
    }
    assert sff.main(command(out, "ff,sff,noise", **flags)) == 0
    frame = rows(out)
    assert list(zip(frame.method, frame.alpha.fillna(-1))) == [
        ("ff", -1),
        ("sff", 0.5),
        ("sff", 1.0),
        ("noise", 0.5),
        ("noise", 1.0),
    ]
    assert set(frame.windows) == {60 - 6 + 1}
    assert set(frame.train_windows) == {(210 - 32 - 6 + 1) // 2}
    assert set(frame["mode"]) == {"direct"} and set(frame.horizon) == {6}
    # alpha = 1 is full fine-tuning, whole runs
    same = frame[(frame.method == "ff") | (frame.alpha == 1.0)]
    assert same[["val_mse", "test_mse", "test_mae"]].drop_duplicates().shape[0] == 1
    said = capsys.readouterr().out
    assert "300 rows x 1 columns (b), step h" in said
    assert "86 to train" in said and "55 to test" in said


def test_plan_runs_nothing(command, tmp_path, capsys):
    assert sff.main([*command(tmp_path / "plan"), "--plan"]) == 0
    assert "12: zero_shot, ff, tfs, sff, lp, lpff x seeds 0, 1" in capsys.readouterr().out
    assert not (tmp_path / "plan").exists()


def test_the_command_in_the_report_asks_for_the_same(folder, command):
    text = json.loads((folder / "run.json").read_text())["command"]
    assert text.startswith("python -m experiments.sff --data ")
    assert sff.parse(text.split()[3:]) == sff.parse(command(folder))


def test_defaults_are_the_models_recipe(micro, waves):
    c = sff.resolve(sff.parse(["--data", str(waves), "--model", str(micro)]))
    recipe = c.model.recipe()
    assert (c.config.lr, c.config.batch_size, c.config.epochs, c.config.schedule) == (
        recipe.lr,
        recipe.batch_size,
        recipe.epochs,
        recipe.schedule,
    )
    assert (c.settings["context"], c.settings["horizon"], c.task.mode) == (32, 8, "ims")
    assert len(sff.cells_of(c.options)) == 18 and c.folder.name == "sff-waves-micro"


@pytest.mark.parametrize(
    "asked",
    [
        ("--horizon", "40"),
        ("--context", "300"),
        ("--context", "30"),
        ("--horizon", "9", "--mode", "direct"),
    ],
)
def test_the_advice_of_a_refusal_works(micro, waves, asked):
    words = ["--data", str(waves), "--model", str(micro)]
    with pytest.raises(flags.UsageError) as caught:
        sff.resolve(sff.parse([*words, *asked]))
    advice = flags.in_flags(str(caught.value)).split("What fits: ")[1].replace(",", "").split()
    rest = [word for pair in zip(asked[::2], asked[1::2]) if pair[0] not in advice for word in pair]
    c = sff.resolve(sff.parse([*words, *rest, *advice]))
    assert c.splits.train.n and c.splits.val.n and c.splits.test.n


def test_a_benchmark_with_a_repeated_stamp_is_used_as_published(micro, tmp_path, monkeypatch):
    """As weather has one; a table of one's own is refused for it, and so is a benchmark
    when asked.
    """
    stamps = pd.date_range("2020-01-01", periods=600, freq="10min").to_numpy().copy()
    stamps[50] = stamps[49]
    values = np.sin(np.arange(600) / 9)[:, None] + np.random.default_rng(0).normal(size=(600, 2))
    table = pd.DataFrame({"date": stamps, "p": values[:, 0], "OT": values[:, 1]})
    for name in ("weather.csv", "mine.csv"):
        table.to_csv(tmp_path / name, index=False)
    monkeypatch.setenv("LTSM_DATA", str(tmp_path))
    c = sff.resolve(sff.parse(["--data", "weather", "--model", str(micro)]))
    assert c.settings["rows"] == 600 and c.splits.series.name == "weather"
    for data in (["weather", "--irregular", "error"], [str(tmp_path / "mine.csv")]):
        with pytest.raises(UsageError, match="1 stamps repeated"):
            sff.resolve(sff.parse(["--data", *data, "--model", str(micro)]))


def test_flags_for_memory_reach_training_and_the_folder(micro, waves):
    flags = ["--compute", "bfloat16", "--accumulate", "2", "--remat", "all but products"]
    c = sff.resolve(sff.parse(["--data", str(waves), "--model", str(micro), *flags]))
    for found in (dataclasses.asdict(c.config), c.settings):
        assert [found[k] for k in ("compute", "accumulate", "remat")] == [
            "bfloat16",
            2,
            "all but products",
        ]


@pytest.mark.parametrize(
    "flags, messages",
    [
        (
            ["--methods", "ff,sfff"],
            ["unknown 'sfff' (did you mean sff?)", "known: zero_shot, ff, tfs, sff"],
        ),
        (["--methods", "ff,,lp"], ["an empty item"]),
        (["--methods", "ff,ff"], ["duplicate item"]),
        (["--alpha", "0.5,1.5"], ["--alpha must be between 0 and 1", "1.5"]),
        (["--alpha", "nan"], ["--alpha must be between 0 and 1"]),
        (["--alpha", "0.5", "--methods", "ff,lp"], ["none of them is among --methods"]),
        (["--seeds", "0,x"], ["--seeds: 'x' is not a whole number"]),
        (["--seeds", "-1"], ["--seeds must be between 0"]),
        (
            ["--horizon", "0", "--context", "-3"],
            ["--horizon must be at least 1", "--context must be at least 1"],
        ),
        (["--horizon", "96,192"], ["--horizon takes one value"]),
        (["--lr", "0", "--few-shot", "2"], ["--lr must be positive", "--few-shot must be a share"]),
        (["--lr", "inf"], ["--lr must be positive"]),
        (["--mode", "imss"], ["did you mean ims", "known: ims, direct"]),
        (["--schedule", "linear"], ["known: halving"]),
        (["--remat", "all"], ["unknown 'all'", "known: none, all but products"]),
        (["--quirks", "etm1"], ["did you mean etm1_typo"]),
        (["--sed", "1"], ["unknown argument '--sed' (did you mean --seed"]),
        (
            ["--method", "ff", "--lr", "x", "--epochs", "1.5"],
            ["--methods", "'x' is not a number", "'1.5' is not a"],
        ),
    ],
)
def test_bad_flags_are_named_all_at_once(flags, messages, capsys):
    assert sff.main(flags) == 2
    said = capsys.readouterr().err
    assert [m for m in messages if m not in said] == []


@pytest.mark.parametrize(
    "flags, messages",
    [
        (
            {"data": "nowhere.csv", "model": "no-such-model"},
            ["nowhere.csv", "no model 'no-such-model'"],
        ),
        ({"context": "33"}, ["whole patches (8)"]),
        ({"context": "400"}, ["too short for windows of 400 + 8"]),
        ({"mode": "direct", "horizon": "16"}, ["one patch"]),
        ({"target": "d"}, ["d"]),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(command, tmp_path, flags, messages, capsys):
    assert (
        sff.main(
            [*command(tmp_path / "out"), *[w for k, v in flags.items() for w in (f"--{k}", v)]]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert [m for m in messages if m not in said] == []
    assert not (tmp_path / "out").exists()


def test_saved_models_differ_from_the_checkpoint_by_what_was_trained(folder, micro):
    _, before = ltsm_jax.load(micro)
    _, after = ltsm_jax.load(folder / "cells" / "lp-seed0" / "model")
    changed = {
        p
        for (p, x), y in zip(
            trees.flatten(before).items(), trees.flatten(after).values(), strict=True
        )
        if (x != y).any()
    }
    assert changed == {"head/kernel", "head/bias"}


def test_cells_keep_their_metrics_and_drop_their_checkpoints(folder):
    training_folder = folder / "cells" / "lpff-seed0" / "training"
    assert all((training_folder / f"phase-{i}" / "metrics.jsonl").is_file() for i in (0, 1))
    assert not list(folder.rglob("checkpoints"))
    assert report.cell_name("sff", 0.7, 0) == "sff-0.7-seed0"
