import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from experiments import folder as folders
from experiments import report

ROOT = Path(__file__).parents[2]
BLOCKS = [
    [-0.05, 0.01, 0.04],
    [0.03, -0.01, -0.02],
]  # of each seed: what blocks of windows add to the mean
BASELINES = [
    {"method": "last_value", "val_mse": 2.0, "val_mae": 1.0, "test_mse": 1.5, "test_mae": 0.9}
]


def make(folder, frame, history=3, baselines=BASELINES):
    """A comparison folder as the experiment leaves it, from a table of method, alpha, seed,
    val_mse, test_mse.
    """
    rows = []
    for r in frame:
        method, alpha, seed, val, test = r
        row = {
            "data": "d",
            "model": "m",
            "method": method,
            "alpha": alpha,
            "seed": seed,
            "horizon": 4,
            "val_mse": val,
        }
        row |= {
            "val_mae": val / 2,
            "test_mse": test,
            "test_mae": test / 2,
            "epochs": 3,
            "seconds": 1.5,
            "windows": 10,
        }
        rows.append(row | {"git_commit": "abc", "versions": "v", "device": "cpu"})
        cell = folder / "cells" / report.cell_name(method, np.nan if alpha is None else alpha, seed)
        cell.mkdir(parents=True)
        trained = (
            []
            if method == "zero_shot"
            else [{"epoch": i + 1, "val_mse": val + 1 / (i + 1)} for i in range(history)]
        )
        warnings = ["collapsed: flat"] if method == "tfs" else []
        record = {"row": rows[-1], "history": trained, "warnings": warnings}
        record["val_blocks"] = [val + gap for gap in BLOCKS[seed]]
        folders.write_json(cell / "result.json", record)
        shape = {"context": 12, "target": 4, "point": 4}
        np.savez(
            cell / "forecasts.npz",
            label=np.array(["a", "b"]),
            **{k: np.ones((2, n)) * test for k, n in shape.items()},
        )
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    folders.write_json(folder / "baselines.json", {"baselines": baselines})
    settings = {"data": "d", "model": "m", "context": 12, "horizon": 4, "mode": "ims"}
    run = {
        "settings": settings,
        "command": "python -m experiments.sff --data d",
        "windows": {"val": 7, "test": 10},
    }
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
    s = report.summarise(pd.read_csv(make(tmp_path, FRAME) / "results.csv")).set_index(
        ["method", "alpha"]
    )
    ff, sff = s.loc[("ff", np.nan)], s.loc[("sff", 0.5)]
    assert ff.test_mse == pytest.approx(0.7) and ff.test_mse_std == pytest.approx(
        np.std([0.8, 0.6], ddof=1)
    )
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


NAIVE = [
    {"method": "seasonal_naive", "val_mse": 0.5, "val_mae": 0.4, "test_mse": 0.55, "test_mae": 0.4}
]


def test_verdict_counts_the_naive_forecasts_of_the_same_table(tmp_path):
    summary = report.summarise(pd.read_csv(make(tmp_path, FRAME) / "results.csv"))
    assert report.verdict(summary, BASELINES) == report.verdict(summary)  # they are worse than SFF
    text = report.verdict(summary, [*BASELINES, *NAIVE])
    assert text.startswith(
        "Lowest validation MSE: seasonal naive (0.5000), which needs no model; its test MSE is "
        "0.5500."
    )
    assert (
        "No model here beats it on validation. Lowest of the models: SFF 0.5; its test MSE is "
        "0.6600" in text
    )


def test_equal_within_the_paired_interval_is_said_and_not_called_lost(tmp_path):
    blocks = {("zero_shot", None): np.array([1.0, 2.0, 3.0, 4.0])}
    noise = np.array([0.3, -0.2, -0.25, 0.2])
    summary = report.summarise(pd.read_csv(make(tmp_path, FRAME) / "results.csv"))
    equal = blocks | {("sff", 0.5): blocks["zero_shot", None] + noise}
    gap, width = noise.mean(), 1.96 * noise.std(ddof=1) / 2
    said = f"95 %: {gap - width:+.4f} to {gap + width:+.4f}"
    assert (
        "SFF 0.5 and the checkpoint are equal there within the paired interval (difference in "
        f"MSE, {said})." in (report.verdict(summary, (), equal))
    )
    better = blocks | {("sff", 0.5): blocks["zero_shot", None] - 0.5 + 0.1 * noise}
    assert "equal" not in report.verdict(summary, (), better)
    assert "equal" not in report.verdict(summary, (), blocks)  # nothing to compare by


def test_what_no_seed_changes_is_no_replicate(tmp_path):
    """A deterministic arm has one number, as often as it was run: no count of seeds, and no spread
    of 0.
    """
    frame = [
        ("zero_shot", None, 0, 1.0, 1.0),
        ("zero_shot", None, 1, 1.0, 1.0),
        ("recipe", None, 0, 0.9, 0.8),
        ("recipe", None, 1, 0.9, 0.8),
        ("ff", None, 0, 0.9, 0.8),
        ("ff", None, 1, 0.9, 0.7),
    ]
    summary = report.summarise(pd.read_csv(make(tmp_path, frame) / "results.csv")).set_index(
        "method"
    )
    assert summary.fixed.to_dict() == {"zero_shot": True, "recipe": True, "ff": False}
    text = report.write_report(tmp_path).read_text()
    assert "| the family's own recipe |  | 0.9000 | 0.8000 | 0.4000 | -20.00" in text
    assert "| full fine-tuning (FF) | 2 | 0.9000 ± 0.0000 | 0.7500 ± 0.0707 |" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_wider_than_the_terminal_goes_below_each_other(tmp_path, width):
    console = Console(width=width, file=io.StringIO())
    report.print_table(make(tmp_path, FRAME), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    heads = [line for line in lines if line.split()[:1] == ["method"]]
    assert len(heads) == {40: 6, 80: 2, 200: 1}[width]
    values = " ".join(lines)
    for number in ("0.6600 ± 0.0849", "-34.00 ± 8.49", "0.3300 ± 0.0424", "0.6000 ± 0.0000"):
        assert number in values


@pytest.mark.slow
def test_a_terminal_without_utf8_gets_the_whole_table(tmp_path):
    script = f"from experiments import report; report.main([{str(make(tmp_path, FRAME))!r}])"
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LANG": "C", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=environment, timeout=900
    )
    said = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert (
        "0.6600 +- 0.0849" in said
        and "Lowest validation MSE: SFF 0.5; its test MSE is 0.6600 +/- 0.0849" in said
    )
    assert "0.6600 ± 0.0849" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_an_edited_table_is_not_believed_and_a_damaged_result_is_named(tmp_path):
    make(tmp_path, FRAME)
    csv = tmp_path / "results.csv"
    csv.write_text(csv.read_text().replace("0.72", "0.01"))
    result = tmp_path / "cells" / "sff-0.9-seed0" / "result.json"
    result.write_text(result.read_text().replace('"test_mse": 0.7', '"test_mse": 0.1'))
    text = report.write_report(tmp_path).read_text()
    assert "| smoothed full fine-tuning (SFF) 0.5 | 2 | 0.6000 ± 0.0000 | 0.6600 ± 0.0849 |" in text
    assert (
        "(SFF) 0.9" not in text and "not believed, and left out" in text and "sff-0.9-seed0" in text
    )


# --- pictures


def axes_of(monkeypatch, draw, *args):
    """The figure that a picture is made of."""
    made = []
    real = report.new_figure

    def spy(*sizes, **kwargs):
        made.append(real(*sizes, **kwargs))
        return made[-1]

    monkeypatch.setattr(report, "new_figure", spy)
    draw(*args)
    return np.ravel(made[0][1])


def test_bars_of_naive_forecasts_far_off_squeeze_nothing(tmp_path, monkeypatch):
    results = pd.read_csv(make(tmp_path, FRAME) / "results.csv")
    far = [*BASELINES, {"method": "seasonal_naive", "val_mse": 40.0, "test_mse": 40.0}]
    summary = report.summarise(results)
    left, right = axes_of(
        monkeypatch, report.plot_bars, summary, results, far, tmp_path / "bars.png"
    )
    assert left.get_xlim()[1] < 2.5  # TFS, the worst method, is at 1.5
    assert "40.000" in " ".join(text.get_text() for text in left.texts)
    (seasonal,) = right.texts  # last value, at +50 %, has its dot where it belongs
    assert (
        seasonal.get_text().startswith("+3900 %")
        and seasonal.get_position()[0] == right.get_xlim()[1]
    )
    dots = [
        line
        for line in right.lines
        if line.get_marker() == "o" and 49.9 < line.get_xdata()[0] < 50.1
    ]
    assert dots


def test_validation_begins_before_training_and_methods_differ_in_more_than_colour(
    tmp_path, monkeypatch
):
    base = {"history": [{"val_mse": 0.9}, {"val_mse": 0.8}], "val_mse": 0.8, "alpha": None}
    cells = [
        base | {"method": m, "seed": s, "start_mse": 1.0}
        for m in ("ff", "lp", "tfs")
        for s in (0, 1)
    ]
    (ax,) = axes_of(monkeypatch, report.plot_validation, cells, tmp_path / "validation.png")
    curves = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in curves] == [[0, 1, 2]] * 3
    assert all(line.get_ydata()[0] == 1.0 for line in curves)
    assert len({(line.get_linestyle(), line.get_marker()) for line in curves}) == 3


def test_forecasts_stand_over_dates(tmp_path, monkeypatch):
    folder = make(tmp_path, FRAME)
    stamps = np.datetime64("2024-03-01T00", "s") + np.arange(16) * np.timedelta64(1, "h")
    for cell in (folder / "cells").iterdir():
        arrays = dict(np.load(cell / "forecasts.npz"))
        np.savez(cell / "forecasts.npz", **arrays, stamps=np.stack([stamps, stamps]))
    found = report.read_folder(folder, report.rank)
    axes = axes_of(monkeypatch, report.plot_forecasts, found.cells, tmp_path / "forecasts.png")
    assert axes[0].get_xlim()[0] > 19000  # days since 1970, and not steps
    assert axes[0].get_ylabel() == "data units"
    drawn = [line for line in axes[0].lines if line.get_marker() not in ("", "None", None)]
    assert (
        len({(line.get_marker(), str(line.get_markevery())) for line in drawn}) == len(drawn) >= 3
    )


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
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else real(name, *a),
    )
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
