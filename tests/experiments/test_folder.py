"""The folder of a comparison: whose it is, what is believed of it, and what a kill leaves."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import cells, flags, folder, prune_then_finetune, report, sff
from ltsm_jax.models.timer_xl import TimerXL
from ltsm_jax.storage import DamagedError

ROOT = Path(__file__).parents[2]
CLOCKS = ["seconds"]


@pytest.fixture(scope="module")
def words(micro, waves):
    """The command line of a comparison that trains nothing but a head."""

    def words(out, model=micro, data=waves, methods="zero_shot,lp"):
        return [
            "--data",
            str(data),
            "--model",
            str(model),
            "--methods",
            methods,
            "--seeds",
            "0",
            "--epochs",
            "1",
            "--batch-size",
            "256",
            "--lr",
            "1e-3",
            "--out",
            str(out),
        ]

    return words


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            report.importlib.util, "find_spec", lambda name: None
        )  # drawing takes longer than the rest
        assert sff.main(words(out)) == 0
    return out


@pytest.fixture
def out(whole, tmp_path, monkeypatch):
    """A copy of a finished comparison."""
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    return Path(shutil.copytree(whole, tmp_path / "whole"))


def files(path):
    """Every file in a folder with its bytes, but the lock."""
    return {
        p.relative_to(path): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and p.name != folder.LOCK
    }


def scores(path):
    return pd.read_csv(path / "results.csv").drop(columns=CLOCKS)


# --- what is believed


def edit(result):
    record = json.loads(result.read_text())
    record["row"]["test_mse"] /= 2
    result.write_text(json.dumps(record, indent=1) + "\n")


def cut(result):
    result.write_bytes(result.read_bytes()[:100])


def swap(result):
    """Example forecasts of another run beside a result that is whole."""
    np.savez(result.with_name("forecasts.npz"), label=np.array(["x"]), point=np.zeros((1, 8)))


@pytest.mark.parametrize("damage", [edit, cut, swap])
def test_a_damaged_result_is_named_and_its_cell_is_run_again(out, whole, words, damage, capsys):
    damage(out / "cells" / "lp-seed0" / "result.json")
    assert sff.main(words(out)) == 0
    said = capsys.readouterr().out
    assert "not believed, and run again" in said and "lp-seed0" in said
    assert said.count("finished before") == 1  # zero-shot
    pd.testing.assert_frame_equal(scores(out), scores(whole))
    record = folder.read_result(out, "lp-seed0")
    clocks = {name: record[name] for name in ("row", "compile_seconds")}
    assert record == folder.read_result(whole, "lp-seed0") | clocks


def test_edited_scores_of_the_naive_forecasts_are_made_anew(out, whole, words):
    file = out / "baselines.json"
    file.write_text(file.read_text().replace('"val_mse": ', '"val_mse": 1'))
    assert sff.main(words(out)) == 0
    assert file.read_bytes() == (whole / "baselines.json").read_bytes()


def test_a_result_that_was_removed_from_the_record_is_no_result(tmp_path):
    assert folder.read_result(tmp_path, "ff-seed0") is None
    place = tmp_path / "cells" / "ff-seed0"
    place.mkdir(parents=True)
    folder.write_json(place / "result.json", {"row": {"seed": 0}, "files": {"forecasts.npz": "0"}})
    with pytest.raises(DamagedError, match=r"forecasts.npz is cut or altered"):
        folder.read_result(tmp_path, "ff-seed0")


# --- whose it is


def refused(out, argv, capsys, main=sff.main):
    before = files(out)
    assert main(argv) == 2
    assert files(out) == before, "a refused run changed the folder"
    return capsys.readouterr().err


def test_another_model_of_the_same_name_is_refused_by_name(out, words, micro, tmp_path, capsys):
    model, params = ltsm_jax.load(micro)
    other = ltsm_jax.save(tmp_path / "weights" / "micro", model, model.init(jax.random.key(8)))
    assert "weights of the model: " in refused(out, words(out, other), capsys)
    config = dataclasses.replace(model.config, activation="relu")
    other = ltsm_jax.save(tmp_path / "config" / "micro", type(model)(config), params)
    said = refused(out, words(out, other), capsys)
    assert "model config.activation: gelu there, relu now" in said and "weights" not in said
    other = TimerXL(TimerXL.small())
    other = ltsm_jax.save(
        tmp_path / "family" / "micro", other, jax.jit(other.init)(jax.random.key(0))
    )
    flags = [*words(out, other), "--context", "32", "--horizon", "8"]
    assert "model family: timer there, timer_xl now" in refused(out, flags, capsys)


def test_the_same_values_at_other_times_are_refused(out, words, waves, tmp_path, capsys):
    table = pd.read_csv(waves)
    table["date"] = pd.date_range("2023-06-01", periods=len(table), freq="h")
    table.to_csv(tmp_path / "waves.csv", index=False)
    said = refused(out, words(out, data=tmp_path / "waves.csv"), capsys)
    assert "data (values, stamps and columns): " in said and "stamps: 2024-01-01" in said


def test_two_experiments_share_no_folder(out, words, capsys):
    pruning = [*words(out, methods="lp"), "--ratios", "0.3", "--macro-batch", "256"]
    said = refused(out, pruning, capsys, prune_then_finetune.main)
    assert "holds a comparison of experiments.sff; take another --out" in said
    record = json.loads((out / "run.json").read_text())
    del record["digest"]
    folder.write_json(out / "run.json", record | {"experiment": "experiments.prune_then_finetune"})
    assert "holds a comparison of experiments.prune_then_finetune" in refused(
        out, words(out), capsys
    )


def test_results_without_their_settings_are_no_ones(out, words, tmp_path, micro, capsys):
    """With run.json gone, rows of another model must not join."""
    (out / "run.json").unlink()
    model, _ = ltsm_jax.load(micro)
    other = ltsm_jax.save(tmp_path / "weights" / "micro", model, model.init(jax.random.key(8)))
    assert "has a result of another comparison, cells/lp-seed0" in refused(
        out, words(out, other), capsys
    )
    assert sff.main(words(out)) == 0


def test_a_folder_of_an_earlier_version_is_refused_clearly(out, words, capsys):
    record = json.loads((out / "run.json").read_text())
    for name in ("digest", "experiment", "model"):
        del record[name]
    folder.write_json(out / "run.json", record)
    assert "was made by an earlier version, which did not record the model" in refused(
        out, words(out), capsys
    )


# --- one process at a time


def test_a_second_process_is_refused_and_the_rows_are_the_firsts(out, words, capsys):
    with folder.held(out):
        said = refused(out, words(out), capsys)
    assert f"{out} is in use by process {os.getpid()} on " in said and "take another --out" in said
    assert sff.main(words(out)) == 0


def test_the_end_of_a_process_lets_go_however_it_comes(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from experiments import folder\n"
        "with folder.held(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(flags.UsageError, match=f"in use by process {process.pid}"),
            folder.held(tmp_path),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with folder.held(tmp_path):
        pass


# --- what a kill leaves


def test_scrap_of_kills_is_removed_at_the_next_start(out, whole, words):
    cell = out / "cells" / "lp-seed0"
    scrap = [
        out / ".run.json",
        out / ".results.csv",
        out / ".report.md",
        cell / ".result.json",
        cell / ".forecasts.npz",
    ]
    for file in scrap:
        file.write_text("half")
    trees = [
        cell / ".model.0a1b.tmp",
        cell / ".model.0a1b.old",
        cell / "training" / "phase-0" / "checkpoints",
    ]
    for tree in trees:
        (tree / "params").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    assert sff.main(words(out)) == 0
    assert not [path for path in [*scrap, *trees] if path.exists()]
    assert (out / "notes.txt").read_text() == "mine"
    assert files(out).keys() == files(whole).keys() | {Path("notes.txt")}


def test_a_write_that_fails_leaves_the_old_file_and_no_scrap(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("whole")
    with (
        pytest.raises(OSError, match=r"No space left on device: .*results.csv"),
        folder.replacing(file) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")  # as a write says it: without a name
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]


# --- names


def test_values_that_differ_in_the_seventh_digit_have_cells_of_their_own():
    alphas = (0.7, 0.70000001, 0.3, 1.0)
    found = [
        cell.name for cell in sff.cells_of(sff.Options(methods=("sff",), alpha=alphas, seeds=(0,)))
    ]
    assert found == ["sff-0.7-seed0", "sff-0.70000001-seed0", "sff-0.3-seed0", "sff-1-seed0"]
    o = prune_then_finetune.Options(ratios=(0.1, 0.10000001), ema=(0.5, 0.50000001), seeds=(0,))
    found = [cell.name for cell in prune_then_finetune.pruned_cells(o)]
    assert found[0] == "pruned-r0.1-e0.5-seed0" and len(set(found)) == 4
    (tuned, *_) = prune_then_finetune.tuned_cells(o, [(0.10000001, 0.5)])
    assert tuned.name == "pruned+ff-r0.10000001-e0.5-seed0"


def test_a_record_says_what_a_comparison_is_of(out):
    record = json.loads((out / "run.json").read_text())
    assert record["experiment"] == "experiments.sff"
    assert record["model"]["family"] == "timer" and record["model"]["config"]["d_model"] == 8
    assert {"data_sha256", "model_sha256", "stamps", "step"} <= record["settings"].keys()
    assert (
        cells.EXAMPLES_FILE in json.loads((out / "cells/lp-seed0/result.json").read_text())["files"]
    )
