"""report.md and report.html of a verdict."""

import dataclasses
import importlib.util
import re
from xml.etree import ElementTree

import pytest

from ltsm_jax.methods.checks import Difference
from ltsm_jax.methods.decision import Candidate, Verdict
from ltsm_jax.report import figures, write_report


def scores(mse):
    return {"mse": mse, "mae": mse**0.5, "windows": 40}


def history(*errors):
    return tuple({"epoch": i, "val_mse": mse, "val_mae": mse**0.5} for i, mse in enumerate(errors))


def example(stamps=True, item="shop <1>"):
    days = [f"2024-03-{day:02}T00:00:00" for day in range(1, 13)]
    return {
        "item": item,
        "column": "sold, $",
        "stamps": days if stamps else None,
        "context": [3.0, 4.0, None, 3.0, 4.0, 5.0, 3.0, 4.0],
        "target": [5.0, 3.0, None, 5.0],
        "forecasts": {
            "zero_shot": [4.0, 4.0, 4.0, 4.0],
            "ff": [5.0, 3.0, 4.0, 5.0],
            "last_value": [4.0] * 4,
        },
    }


@pytest.fixture
def verdict():
    return Verdict(
        deploy="ff",
        reason="Deploy the model tuned by ff: it beats a < b & c.",
        candidates=(
            Candidate(
                "zero_shot", "model", scores(1.0), scores(1.1), 0.5, 2.0, history=history(1.0)
            ),
            Candidate(
                "ff",
                "model",
                scores(0.5),
                scores(0.6),
                7.25,
                9.0,
                3,
                2,
                history(1.0, 0.7, 0.5, 0.6),
                ("look",),
            ),
            Candidate(
                "sff", "model", scores(0.55), None, 7.0, 9.0, 3, 3, history(40.0, 0.8, 0.6, 0.55)
            ),
            Candidate("last_value", "naive", scores(9.0), scores(99.5)),
        ),
        tuned="ff",
        naive="last_value",
        differences={
            "tuned_vs_zero_shot": Difference(-0.5, -0.7, -0.3, "blocks", 12, 2),
            "zero_shot_vs_naive": Difference(-98.4, float("nan"), float("nan"), "", 2, 1),
        },
        name="shops | 2024",
        model="timer",
        columns=("sold, $",),
        horizon=4,
        context_len=8,
        freq="D",
        items=2,
        windows={"train": 1200, "val": 40, "test": 40},
        spans={
            "train": ("2023-01-01T00:00:00", "2023-12-31T00:00:00"),
            "test": ("2024-03-01T06:00:00", "2024-04-01"),
        },
        settings={"mode": "ims", "budget": 400, "train": {"lr": 1e-4, "clip": None}},
        notes=("train: 3 windows left out",),
        examples=(example(), example(False)),
        versions={"jax": "1.2.3", "device": "cpu"},
    )


def test_the_sentence_comes_first_then_the_table(verdict, tmp_path):
    markdown, page = write_report(verdict, tmp_path / "new")
    lines = markdown.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == [
        "# shops \\| 2024, timer, horizon 4",
        "",
        "Deploy the model tuned by ff: it beats a &lt; b & c.",
    ]
    text = "\n".join(lines)
    assert "| **ff** | 0.5000 | 0.7071 | 0.6000 | 0.7746 | 3 | 7.2 |" in text
    assert "| sff | 0.5500 | 0.7416 | - | - | 3 | 7.0 |" in text
    assert "- ff - zero_shot: -0.5000 (95 %: -0.7000 to -0.3000, from 12 blocks of time)" in text
    assert (
        "- zero_shot - last_value: -98.4000; too few for an interval: 2 blocks of time and 1 item"
        in text
    )
    assert "| training | 1,200 windows, 2023-01-01 to 2023-12-31 |" in text
    assert "| test | 40 windows, 2024-03-01 06:00:00 to 2024-04-01 |" in text
    assert "- train: 3 windows left out" in text and "- ff: look" in text
    assert "| jax | 1.2.3 |" in text and "| lr | 0.0001 |" in text and "clip" not in text
    assert "without compilation" in text and "Every item is cut by itself" in text

    shown = page.read_text(encoding="utf-8")
    assert shown.index(
        '<p class="verdict">Deploy the model tuned by ff: it beats a &lt; b &amp; c.'
    ) < shown.index("<td>")
    assert '<tr class="deployed"><td>ff</td>' in shown


def test_the_page_needs_nothing_from_elsewhere(verdict, tmp_path):
    pytest.importorskip("matplotlib")
    _, page = write_report(verdict, tmp_path)
    text = page.read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "<script" not in text and "<link" not in text and "@import" not in text
    used = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert used and all(link.startswith("#") for link in used)
    assert "<?xml" not in text and "<metadata" not in text
    assert "<1>" not in text


def test_pictures_begin_at_epoch_0_and_have_dates(verdict):
    pytest.importorskip("matplotlib")
    (_, bars), (_, curves), (_, forecasts) = figures(verdict)

    # 99.5 is cut at the edge, with its number; the axis shows the others.
    (ax,) = bars.axes
    assert ax.get_xlim()[1] < 3
    assert [text.get_text() for text in ax.texts if "\u25b8" in text.get_text()] == [
        "9.0000 \u25b8",
        "99.5000 \u25b8",
    ]

    (ax,) = curves.axes
    by_name = {line.get_label(): line for line in ax.lines}
    assert list(by_name["ff"].get_xdata()) == [0, 1, 2, 3]
    assert ax.get_ylim()[1] < 2  # smoothed weights begin at 40
    assert "last_value: 9.0000 (off the axis)" in by_name

    dated, plain = forecasts.axes[:2]
    assert dated.get_title(loc="left") == "shop <1>: sold, \\$"
    assert dated.get_ylabel() == "sold, \\$"
    assert str(dated.lines[1].get_xdata()[0]).startswith("2024-03-09")  # after 8 days of context
    assert plain.get_xlabel() == "rows from the start of the forecast"


def test_without_training_there_is_no_curve(verdict):
    pytest.importorskip("matplotlib")
    few = dataclasses.replace(
        verdict, candidates=verdict.candidates[:1], naive=None, deploy="zero_shot", examples=()
    )
    assert len(figures(few)) == 1


def test_without_matplotlib_the_tables_say_so(verdict, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    markdown, page = write_report(verdict, tmp_path)
    for file in (markdown, page):
        text = file.read_text(encoding="utf-8")
        assert "matplotlib is not installed" in text and "<svg" not in text
