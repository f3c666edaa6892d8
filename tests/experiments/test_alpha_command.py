"""The table of choices of alpha, from its flags to its report."""

import json

import pandas as pd
import pytest

from experiments import alpha
from ltsm_jax.methods.strategies import MIXED

METHODS = "zero_shot,ff,sff,short,groups,layers,learned"


@pytest.fixture(scope="module")
def command(micro, waves):
    """The command line of a table that takes seconds."""

    def command(out, methods=METHODS, **more):
        flags = {
            "alpha": "0.6,0.9",
            "seeds": "0",
            "epochs": "1",
            "batch-size": "128",
            "search-epochs": "0",
        } | more
        flags |= {"outer-steps": "2", "inner-steps": "1", "samples": "1"}
        words = [
            "--data",
            str(waves),
            "--model",
            str(micro),
            "--methods",
            methods,
            "--out",
            str(out),
            "--curvature",
        ]
        return words + [word for name, value in flags.items() for word in (f"--{name}", value)]

    return command


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory):
    """A finished table."""
    out = tmp_path_factory.mktemp("runs") / "choices"
    assert alpha.main(command(out)) == 0
    return out


@pytest.mark.slow
def test_every_choice_has_a_row_with_its_alphas(folder):
    frame = pd.read_csv(folder / "results.csv").fillna({"alphas": ""}).astype({"alphas": str})
    rows = frame.set_index("method")
    assert list(frame["method"]) == [
        "zero_shot",
        "ff",
        "sff",
        "sff",
        "short",
        "groups",
        "layers",
        "learned",
    ]
    assert list(frame[frame["method"] == "sff"]["alpha"]) == [0.6, 0.9]
    assert "head " in rows.loc["groups", "alphas"] and "body " in rows.loc["learned", "alphas"]
    assert "layer_0 " in rows.loc["layers", "alphas"]
    assert (frame[["start_val_mse", "val_mse", "test_mse"]] > 0).all(axis=None)
    assert frame["top_eigenvalue"].notna().all()
    # What is not mixed starts as the checkpoint, and so has its curvature.
    assert rows.loc["ff", "start_val_mse"] == pytest.approx(rows.loc["zero_shot", "val_mse"])
    assert rows.loc["ff", "top_eigenvalue"] == pytest.approx(
        rows.loc["zero_shot", "top_eigenvalue"]
    )


@pytest.mark.slow
def test_a_search_leaves_its_trials_and_the_run_begins_with_what_it_chose(folder):
    found = json.loads((folder / "cells" / "short-seed0" / "choice.json").read_text())
    assert [trial["alpha"] for trial in found["trials"]] == [0.6, 0.9, 1.0]
    best = min(found["trials"], key=lambda trial: trial["score"])
    assert best["alpha"] == found["alpha"]
    frame = pd.read_csv(folder / "results.csv").set_index("method")
    assert frame.loc["short", "start_val_mse"] == pytest.approx(best["score"])


@pytest.mark.slow
def test_the_same_command_runs_nothing_again(command, folder, monkeypatch, capfd):
    before = (folder / "results.csv").read_bytes()

    def again(*args):
        raise AssertionError("finished cells are not run again")

    monkeypatch.setattr(alpha, "run_cell", again)
    assert alpha.main(command(folder)) == 0
    assert "finished before" in capfd.readouterr().out
    assert (folder / "results.csv").read_bytes() == before


@pytest.mark.slow
def test_a_search_that_was_finished_is_not_repeated(command, folder, monkeypatch):
    (folder / "cells" / "layers-seed0" / "result.json").unlink()

    def again(*args, **kwargs):
        raise AssertionError("what was chosen stays")

    monkeypatch.setattr(alpha, "choose_alpha", again)
    assert alpha.main(command(folder)) == 0
    assert "layers" in set(pd.read_csv(folder / "results.csv")["method"])


@pytest.mark.slow
def test_the_report_says_what_validation_picks(folder):
    text = (folder / "report.md").read_text()
    table = pd.read_csv(folder / "results.csv")
    best = table.loc[table["val_mse"].idxmin()]
    assert f"test MSE {best.test_mse:.4f}" in text.split("\n")[2]
    assert "Of the grid, with FF as alpha 1," in text
    assert "| SFF, alpha by group |" in text and "top eigenvalue" in text


def test_all_mixes_are_in_the_table_by_default():
    options = alpha.parse(["--alpha", "0.5,0.7"])
    tunings = options.tunings
    assert {method for method, _ in tunings} == {
        "zero_shot",
        "ff",
        *MIXED,
        "short",
        "groups",
        "layers",
        "learned",
    }
    assert ("sff", 0.5) in tunings and ("sff", 0.7) in tunings and ("perturb", 0.7) in tunings


@pytest.mark.parametrize(
    "words, message",
    [
        (["--at", "1"], "--at 1 mixes nothing"),
        (["--choose-alpha"], "--choose-alpha, --origins and several --lr are for experiments.sff"),
        (["--methods", "ff,grups"], "did you mean groups?"),
        (["--report-by", "last", "--test-each-epoch"], "--report-by is for experiments.sff"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, message, capfd):
    assert alpha.main(words) == 2
    assert message in capfd.readouterr().err
