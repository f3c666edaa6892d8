import json
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import cells, pruning_report
from experiments import prune_then_finetune as experiment
from ltsm_jax import trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.methods import pruning, removal, run
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import forecasting

FIRST = [
    "data",
    "model",
    "method",
    "alpha",
    "ratio",
    "ema",
    "seed",
    "horizon",
    "val_mse",
    "val_mae",
    "test_mse",
]
CLOCKS = ["seconds", "latency_ms", "whole_latency_ms", "speedup"]
PRUNED = {"ratio": [0.3, 0.3, 0.6, 0.6], "seed": [0, 1, 0, 1]}


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A model folder: one layer with two heads, over 4 patches of 8."""
    model = Timer(
        TimerConfig(8, 8, 4, equal_layers(1, 2, 4, 8), context_len=32, horizon=8, dropout=0.0)
    )
    return ltsm_jax.save(
        tmp_path_factory.mktemp("models") / "micro", model, model.init(jax.random.key(7))
    )


@pytest.fixture(scope="module")
def command(micro, waves):
    """The command line of a comparison that takes seconds; a flag None is left out."""

    def command(out, **flags):
        flags = {
            "ratios": "0.3,0.6",
            "ema": "0.5",
            "methods": "ff,sff",
            "alpha": "0.7",
            "seeds": "0,1",
            "epochs": "2",
            "batch-size": "128",
            "macro-batch": "128",
            "lr": "1e-3",
            "timed-runs": "3",
        } | flags
        words = ["--data", str(waves), "--model", str(micro), "--out", str(out)]
        return words + [
            word
            for name, value in flags.items()
            if value is not None
            for word in (f"--{name}", value)
        ]

    return command


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory):
    """An undisturbed comparison of all arms with two seeds."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert experiment.main(command(out)) == 0
    return out


def rows(folder):
    return pd.read_csv(folder / "results.csv")


def pick(frame, method, seed=0):
    return frame[(frame.method == method) & (frame.seed == seed)]


def test_results_have_a_row_per_arm_ratio_and_seed(folder):
    frame, choice = rows(folder), json.loads((folder / "choice.json").read_text())
    assert list(frame.columns[: len(FIRST)]) == FIRST
    expected = [(m, s) for m in ("zero_shot", "ff", "sff") for s in (0, 1)] + [
        ("pruned", s) for s in (0, 1, 0, 1)
    ]
    tuned = [("pruned+ff", 0), ("pruned+ff", 1), ("pruned+sff", 0), ("pruned+sff", 1)]
    found = list(zip(frame.method, frame.seed, strict=True))
    assert sorted(found) == sorted(expected + tuned)
    pruned = frame[frame.method == "pruned"]
    assert {name: pruned[name].tolist() for name in PRUNED} == PRUNED
    np.testing.assert_allclose(pruned.channels_left, [0.7, 0.7, 0.4, 0.4], atol=0.01)
    # the choice is by validation of what is pruned and not tuned, mean over the seeds
    means = pruned.groupby("ratio").val_mse.mean()
    assert choice["ratio"] == means.idxmin() and choice["val_mse"] == pytest.approx(means.min())
    assert set(frame[frame.method.str.contains("+", regex=False)].ratio) == {choice["ratio"]}


def test_arms_share_their_budget_and_their_masks(folder):
    frame = rows(folder)
    tuned = frame[frame.method.isin(["ff", "sff", "pruned+ff", "pruned+sff"])]
    assert (
        tuned[["epochs", "lr", "batch_size", "schedule", "train_windows", "trained_parameters"]]
        .drop_duplicates()
        .shape[0]
        == 1
    )
    assert set(frame[~frame.method.isin(["zero_shot", "pruned"])].epochs) == {2}
    # what is masked stays 0 through fine-tuning, from a mixture with random weights too
    for seed in (0, 1):
        here = frame[(frame.seed == seed) & (frame.ratio == pick(frame, "pruned+ff").ratio.iloc[0])]
        left = here.set_index("method").nonzero_parameters
        assert (
            left["pruned+ff"] == left["pruned+sff"] == left["pruned"] + 3 * 8
        )  # biases of norms are 0 at the start
        assert here.parameters.nunique() == 1
    assert (
        frame[frame.method == "pruned"].nonzero_parameters < frame.whole_parameters.iloc[0]
    ).all()


def test_models_with_parts_taken_out_forecast_as_the_rows_say(folder):
    frame = rows(folder)
    assert (frame.removal_gap.dropna() < 1e-5).all() and frame.removal_gap.notna().sum() == 4
    c = experiment.resolve(
        experiment.parse(json.loads((folder / "run.json").read_text())["command"].split()[3:])
    )
    for cell, row in (
        ("pruned-r0.6-e0.5-seed1", frame[(frame.ratio == 0.6) & (frame.seed == 1)].iloc[0]),
        (None, pick(frame, "pruned+sff").iloc[0]),
    ):
        cell = cell or f"pruned+sff-a0.7-r{row.ratio:g}-e0.5-seed0"
        model, params = ltsm_jax.load(folder / "cells" / cell / "model")
        assert trees.count(params) == row.parameters
        score = forecasting.evaluate(model, params, c.splits.test)
        assert score["mse"] == pytest.approx(row.test_mse, rel=1e-5)


def test_times_and_memory_are_measured_of_every_cut(folder):
    pruned = rows(folder)[lambda f: f.method == "pruned"]
    assert (
        (pruned[["latency_ms", "whole_latency_ms", "peak_mb", "whole_peak_mb"]] > 0)
        .to_numpy()
        .all()
    )
    assert ((pruned.speedup > 0.05) & (pruned.speedup < 20)).all()


def test_report_has_arms_ratios_pictures_and_the_checkpoints_statistics(folder):
    text = (folder / "report.md").read_text()
    parts = [
        "| zero-shot |",
        "| FF |",
        "+ SFF 0.7 |",
        "## Choice",
        "## What differs between the arms",
        "## Ratios",
    ]
    parts += [
        "## The checkpoint before pruning",
        "layer_0/attn",
        "plots/sparsity.png",
        "plots/pareto.png",
    ]
    assert [part for part in parts if part not in text] == []
    assert (folder / "plots" / "sparsity.png").is_file() and (
        folder / "plots" / "pareto.png"
    ).is_file()
    statistics = json.loads((folder / "redundancy.json").read_text())
    assert len(statistics["heads"]["layer_0/attn"]["contribution"]) == 2
    assert len(statistics["units"]["layer_0"]["active"]) == 8


def test_finished_cells_and_pruning_runs_are_not_run_again(
    folder, command, monkeypatch, capsys, no_pictures
):
    before = (folder / "results.csv").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("a finished cell ran")

    for module, name in ((run, "run"), (pruning, "prune"), (removal, "remove")):
        monkeypatch.setattr(module, name, never)
    assert experiment.main(command(folder)) == 0
    assert (folder / "results.csv").read_bytes() == before
    assert capsys.readouterr().out.count("finished before") == 14


class Killed(BaseException):
    """Stands for SIGKILL: nothing in between may catch it."""


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("after a pruning run", marks=pytest.mark.slow),
        "before the result of a tuned cell",
    ],
)
def test_killed_and_started_again_it_gives_the_same_rows(
    folder, command, tmp_path, monkeypatch, no_pictures, where
):
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        target, name = (
            (removal, "remove") if where == "after a pruning run" else (cells, "write_examples")
        )
        real = getattr(target, name)

        def dying(*args, **kwargs):
            if target is removal or "pruned+ff" in str(args[3]):
                raise Killed
            return real(*args, **kwargs)

        patch.setattr(target, name, dying)
        with pytest.raises(Killed):
            experiment.main(command(out, methods="ff", alpha=None))
    assert experiment.main(command(out, methods="ff", alpha=None)) == 0
    undisturbed = rows(folder)
    undisturbed = undisturbed[~undisturbed.method.str.contains("sff")].reset_index(drop=True)
    assert rows(out).drop(columns=CLOCKS).equals(undisturbed.drop(columns=CLOCKS))


def test_another_setting_in_the_same_folder_is_refused(folder, command, capsys):
    before = (folder / "results.csv").read_bytes()
    assert experiment.main(command(folder, score="taylor1", stride="2")) == 2
    said = capsys.readouterr().err
    assert "score: taylor2 there, taylor1 now" in said and "stride: 1 there, 2 now" in said
    assert (folder / "results.csv").read_bytes() == before


@pytest.mark.slow
def test_more_ratios_join_the_same_folder(folder, command, tmp_path, no_pictures):
    out = tmp_path / "more"
    shutil.copytree(folder, out)
    assert (
        experiment.main(
            command(out, ratios="0.45,0.3", seeds="0", methods="ff", alpha=None, tune="each")
        )
        == 0
    )
    frame = rows(out)
    assert len(frame) == len(rows(folder)) + 1 + len(
        {0.45, 0.3} - set(pick(rows(folder), "pruned+ff").ratio)
    )
    assert set(pick(frame, "pruned+ff").ratio) >= {0.45, 0.3}


@pytest.mark.slow
def test_a_run_per_ratio_and_dropout_off_in_pruned_arms_alone(
    command, tmp_path, monkeypatch, no_pictures
):
    asked, real = [], run.run

    def spy(model, params, strategy, *args, **kwargs):
        asked.append(
            (strategy.name, kwargs.get("masks") is not None, tuple(kwargs.get("quirks", ())))
        )
        return real(model, params, strategy, *args, **kwargs)

    monkeypatch.setattr(run, "run", spy)
    out = tmp_path / "each"
    flags = {
        "ratios": None,
        "ratio": "0.2,0.5",
        "seeds": "0",
        "methods": "ff",
        "alpha": None,
        "timed-runs": "0",
    }
    assert experiment.main(command(out, quirks="no-dropout", **flags)) == 0
    assert asked == [
        ("zero_shot", False, ()),
        ("ff", False, ()),
        ("zero_shot", True, ()),
        ("zero_shot", True, ()),
        ("ff", True, ("no-dropout",)),
    ]
    frame = rows(out)
    left = frame[frame.method == "pruned"].channels_left.to_numpy()
    assert 1 > left[0] > left[1] > 0
    assert "no-dropout" in (out / "report.md").read_text().split("## Look at this")[1]
    assert "matplotlib is not installed" in (out / "report.md").read_text()
    assert sorted(f.name for f in (out / "masks").iterdir()) == [
        "r0.2-e0.5-seed0",
        "r0.5-e0.5-seed0",
    ]
    assert "latency_ms" not in frame and (frame.peak_mb.dropna() > 0).all()


def test_plan_runs_nothing(command, tmp_path, capsys):
    assert experiment.main([*command(tmp_path / "plan", tune="all", ema="0.2,0.5"), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "30: 6 whole, 8 pruned, 16 pruned and tuned" in said and "4 runs of 1 epochs" in said
    assert not (tmp_path / "plan").exists()


def test_the_command_in_the_report_asks_for_the_same(folder, command):
    text = json.loads((folder / "run.json").read_text())["command"]
    assert text.startswith("python -m experiments.prune_then_finetune --data ")
    assert experiment.parse(text.split()[3:]) == experiment.parse(command(folder))


@pytest.mark.parametrize(
    "flags, messages",
    [
        (["--ratios", "0.2,1"], ["--ratios must be above 0 and below 1; got 1.0"]),
        (["--ratios", "0.2", "--ratio", "0.1,0.2"], ["--ratio takes one value beside it"]),
        (
            ["--ratio", "0,0.1", "--ema", "1.5"],
            ["--ratio must be above 0", "--ema must be above 0 and at most 1"],
        ),
        (["--ratios", "0.2", "--methods", "zero_shot"], ["unknown 'zero_shot'"]),
        (["--ratios", "0.2", "--score", "taylor3"], ["did you mean taylor"]),
        (["--ratios", "0.2", "--tune", "both"], ["known: chosen, each, all"]),
        (["--ratios", "0.2", "--quirks", "nodropout"], ["did you mean no-dropout"]),
        (
            ["--ratios", "0.2", "--alpha", "0.5", "--methods", "ff"],
            ["none of them is among --methods"],
        ),
        (["--ratios", "0.2", "--prune-epoch", "1"], ["did you mean --prune-epochs"]),
    ],
)
def test_bad_flags_are_named_all_at_once(flags, messages, capsys):
    assert experiment.main(flags) == 2
    said = capsys.readouterr().err
    assert [m for m in messages if m not in said] == []


def options(**changes):
    return experiment.Options(ratios=(0.2, 0.5), ema=(0.1, 0.8), **changes)


def scored(*triples, before=1.0):
    rows = [
        {"method": "pruned", "ratio": r, "ema": e, "seed": s, "val_mse": v}
        for r, e, s, v in triples
    ]
    return [
        *rows,
        {"method": "zero_shot", "ratio": None, "ema": None, "seed": 0, "val_mse": before},
    ]


def test_choice_is_the_lowest_mean_over_seeds_and_the_first_of_equals():
    found = experiment.choose(
        scored(
            (0.2, 0.1, 0, 0.9),
            (0.2, 0.1, 1, 0.7),
            (0.2, 0.8, 0, 0.6),
            (0.2, 0.8, 1, 1.0),
            (0.5, 0.1, 0, 0.79),
            (0.5, 0.1, 1, 0.95),
            (0.5, 0.8, 0, 0.85),
        ),
        options(),
    )
    assert (found["ratio"], found["ema"], found["val_mse"], found["seeds"]) == (0.2, 0.1, 0.8, 2)
    assert found["ema_of_ratio"] == {"0.2": 0.1, "0.5": 0.8} and found["warning"] == ""
    assert experiment.choose(scored(), options()) is None


def test_a_warning_where_validation_prefers_the_whole_model():
    for before, warns in ((0.79, True), (0.8, True), (0.81, False)):
        found = experiment.choose(scored((0.2, 0.1, 0, 0.8), before=before), options())
        assert found["warning"].startswith("Validation prefers the model as it was") is warns


def test_summary_pairs_each_arm_with_the_same_seed_of_the_whole_model():
    nothing = {
        "val_mse": 1.0,
        "val_mae": 1.0,
        "test_mae": 1.0,
        "parameters": 5,
        "nonzero_parameters": 5,
    }
    nothing |= {
        "whole_parameters": 10,
        "epochs": 1,
        "seconds": 1.0,
        "latency_ms": np.nan,
        "speedup": np.nan,
    }
    table = [
        ("zero_shot", None, None, 0, 1.0),
        ("zero_shot", None, None, 1, 1.0),
        ("sff", 0.7, None, 0, 0.8),
        ("sff", 0.7, None, 1, 0.5),
        ("pruned", None, 0.2, 0, 1.1),
        ("pruned", None, 0.2, 1, 1.3),
        ("pruned+sff", 0.7, 0.2, 0, 0.4),
        ("pruned+sff", 0.7, 0.2, 1, 0.5),
    ]
    frame = pd.DataFrame(
        [
            nothing
            | {
                "method": m,
                "alpha": a,
                "ratio": r,
                "ema": None if r is None else 0.5,
                "seed": s,
                "test_mse": t,
            }
            for m, a, r, s, t in table
        ]
    )
    found = pruning_report.summarise(frame).set_index("method")
    assert found.loc["pruned", "vs_whole"] == pytest.approx(20.0)  # against zero-shot
    assert found.loc["pruned+sff", "vs_whole"] == pytest.approx(
        -25.0
    )  # -50 % and 0 %, against SFF of the same alpha
    assert found.loc["pruned+sff", "vs_whole_std"] == pytest.approx(np.std([-50, 0], ddof=1))
    assert found.loc["sff", "vs_zero_shot"] == pytest.approx(-35.0) and np.isnan(
        found.loc["sff", "vs_whole"]
    )
    assert np.isnan(found.loc["zero_shot", "test_mse_std"])


def test_the_verdict_counts_naive_forecasts_and_says_what_is_equal():
    row = {
        "alpha": None,
        "val_mse": 1.0,
        "test_mse": 1.1,
        "test_mse_std": np.nan,
        "vs_zero_shot": np.nan,
    }
    row |= {"vs_whole": np.nan, "ratio": np.nan, "ema": np.nan}
    cut = row | {
        "method": "pruned",
        "ratio": 0.2,
        "ema": 0.5,
        "val_mse": 1.05,
        "vs_zero_shot": 2.0,
        "vs_whole": 2.0,
    }
    summary = pd.DataFrame([row | {"method": "zero_shot"}, cut])
    plain = pruning_report.verdict(summary)
    assert plain.startswith(
        "Lowest validation MSE: zero-shot; its test MSE is 1.1000. Neither pruning nor tuning beat"
    )
    naive = [{"method": "seasonal_naive", "val_mse": 0.9, "test_mse": 0.8}]
    said = pruning_report.verdict(summary, naive)
    assert said.startswith(
        "Lowest validation MSE: seasonal naive (0.9000), which needs no model; its test MSE is "
        "0.8000"
    )
    blocks = {("zero_shot", None, None, None): np.array([1.0, 2.0, 3.0])}
    equal = blocks | {("pruned", None, 0.2, 0.5): np.array([1.4, 1.9, 2.9])}
    assert "pruned 0.2 (EMA 0.5) and the checkpoint are equal there" in pruning_report.verdict(
        summary, (), equal
    )
    worse = blocks | {("pruned", None, 0.2, 0.5): np.array([1.4, 2.41, 3.4])}
    assert "equal" not in pruning_report.verdict(summary, (), worse)


@pytest.mark.parametrize(
    "arm, text",
    [
        (("ff", None, None, None), "FF"),
        (("pruned", None, 0.3, 0.5), "pruned 0.3 (EMA 0.5)"),
        (("pruned+sff", 0.7, 0.3, 0.5), "pruned 0.3 (EMA 0.5) + SFF 0.7"),
        (("pruned+ff", np.nan, np.nan, np.nan), "pruned + FF"),
    ],
)
def test_labels(arm, text):
    assert pruning_report.label(*arm) == text


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert pruning_report.main([str(tmp_path)]) == 2
    assert "no results.csv, run.json, baselines.json, choice.json" in capsys.readouterr().err
