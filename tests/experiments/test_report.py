import importlib.util

import numpy as np
import pandas as pd
import pytest

from experiments import folder as folders
from experiments import report

BLOCKS = [[-0.05, 0.01, 0.04], [0.03, -0.01, -0.02]]  # of each seed: what blocks of windows add to the mean
BASELINES = [{"method": "last_value", "val_mse": 2.0, "val_mae": 1.0, "test_mse": 1.5, "test_mae": 0.9}]


def make(folder, frame, history=3, baselines=BASELINES):
    """A comparison folder as the experiment leaves it, from a table of method, alpha, seed, val_mse, test_mse."""
    rows = []
    for r in frame:
        method, alpha, seed, val, test = r
        row = {"data": "d", "model": "m", "method": method, "alpha": alpha, "seed": seed, "horizon": 4, "val_mse": val}
        row |= {"val_mae": val / 2, "test_mse": test, "test_mae": test / 2, "epochs": 3, "seconds": 1.5, "windows": 10}
        rows.append(row | {"git_commit": "abc", "versions": "v", "device": "cpu"})
        cell = folder / "cells" / report.cell_name(method, np.nan if alpha is None else alpha, seed)
        cell.mkdir(parents=True)
        trained = (
            [] if method == "zero_shot" else [{"epoch": i + 1, "val_mse": val + 1 / (i + 1)} for i in range(history)]
        )
        warnings = ["collapsed: flat"] if method == "tfs" else []
        record = {"row": rows[-1], "history": trained, "warnings": warnings}
        record["val_blocks"] = [val + gap for gap in BLOCKS[seed]]
        folders.write_json(cell / "result.json", record)
        shape = {"context": 12, "target": 4, "point": 4}
        np.savez(
            cell / "forecasts.npz", label=np.array(["a", "b"]), **{k: np.ones((2, n)) * test for k, n in shape.items()}
        )
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    folders.write_json(folder / "baselines.json", {"baselines": baselines})
    settings = {"data": "d", "model": "m", "context": 12, "horizon": 4, "mode": "ims"}
    run = {"settings": settings, "command": "python -m experiments.sff --data d", "windows": {"val": 7, "test": 10}}
    folders.write_json(folder / "run.json", run | {"model": {"family": "timer"}})
    return folder


FRAME = [
    ("zero_shot", None, 0, 1.0, 1.0),
    ("zero_shot", None, 1, 1.0, 1.0),
    ("ff", None, 0, 0.9, 0.8),
    ("ff", None, 1, 0.7, 0.6),
    ("tfs", None, 0, 1.4, 1.5),
    ("sff", 0.5, 0, 0.6, 0.72),
    ("sff", 0.5, 1, 0.6, 0.6),
    ("sff", 0.9, 0, 0.7, 0.7),
]


def test_summary_is_mean_std_and_paired_change(tmp_path):
    s = report.summarise(pd.read_csv(make(tmp_path, FRAME) / "results.csv")).set_index(["method", "alpha"])
    ff, sff = s.loc[("ff", np.nan)], s.loc[("sff", 0.5)]
    assert ff.test_mse == pytest.approx(0.7) and ff.test_mse_std == pytest.approx(np.std([0.8, 0.6], ddof=1))
    assert ff.vs_zero_shot == pytest.approx(-30.0)
    assert np.isnan(ff.vs_ff)
    assert sff.vs_ff == pytest.approx((-10.0 + 0.0) / 2)  # seed by seed, not mean against mean
    assert sff.vs_ff_std == pytest.approx(np.std([-10.0, 0.0], ddof=1))
    assert s.seeds.tolist() == [2, 2, 1, 2, 1]
    assert np.isnan(s.loc[("zero_shot", np.nan)].test_mse_std)
    assert np.isnan(s.loc[("tfs", np.nan)].test_mse_std)  # one seed has no spread


def test_verdict_follows_validation_not_test(tmp_path):
    summary = report.summarise(pd.read_csv(make(tmp_path, FRAME) / "results.csv"))
    assert report.verdict(summary).startswith(
        "Lowest validation MSE: SFF 0.5; its test MSE is 0.6600 ± 0.0849 (-34.00 % against"
    )
    lost = summary[summary.method.isin(["zero_shot", "tfs"])]
    assert "keep the checkpoint" in report.verdict(lost)


def test_report_has_the_numbers_the_warnings_and_the_pictures(tmp_path):
    text = report.write_report(make(tmp_path, FRAME)).read_text()
    assert "| smoothed full fine-tuning (SFF) 0.5 | 2 | 0.6000 ± 0.0000 | 0.6600 ± 0.0849 |" in text
    assert "| last value |  | 2.0000 | 1.5000 | 0.9000 | +50.00 |" in text
    assert "TFS, seed 0: collapsed: flat" in text
    assert "python -m experiments.sff --data d" in text
    pictures = {"bars", "validation", "alpha", "forecasts"}
    assert {p.stem for p in (tmp_path / "plots").glob("*.png")} == pictures
    assert all(f"(plots/{name}.png)" in text for name in pictures)


def test_report_without_matplotlib_has_tables_and_says_so(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    text = report.write_report(make(tmp_path, FRAME)).read_text()
    assert "No pictures: matplotlib is not installed" in text and "0.6600 ± 0.0849" in text
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "frame", [FRAME[:1], FRAME[2:3], FRAME[4:6]], ids=["zero-shot alone", "one run", "no zero-shot"]
)
def test_small_comparisons_have_a_report_too(tmp_path, frame, capsys):
    assert report.main([str(make(tmp_path, frame))]) == 0
    assert "Lowest validation MSE" in capsys.readouterr().out
    assert (tmp_path / "plots" / "bars.png").is_file()


def test_no_number_of_the_table_is_cut_off_the_terminal(tmp_path, capsys):
    report.print_table(make(tmp_path, FRAME))
    said = capsys.readouterr().out
    assert "0.6600 ± 0.0849" in said and "…" not in said


def test_another_folder_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no results.csv, run.json, baselines.json" in capsys.readouterr().err
