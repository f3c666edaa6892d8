"""The toolbox of strategies and curvature from the command line."""

import json

import pandas as pd
import pytest

from experiments import sff


@pytest.mark.slow
def test_a_comparison_takes_their_options_and_shows_the_curvature(micro, waves, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "--data",
        str(waves),
        "--model",
        str(micro),
        "--out",
        str(out),
        "--methods",
        "sam,wise_ft",
        "--seeds",
        "0",
    ]
    words += [
        "--epochs",
        "1",
        "--batch-size",
        "128",
        "--lr",
        "1e-3",
        "--sam-rho",
        "0.2",
        "--curvature",
        "0,1",
    ]
    assert sff.main(words) == 0
    rows = pd.read_csv(out / "results.csv")
    assert rows["sam_rho"].tolist()[0] == 0.2 and rows["sam_rho"].isna().tolist() == [False, True]

    records = {
        name: json.loads((out / "cells" / f"{name}-seed0" / "result.json").read_text())
        for name in ("sam", "wise_ft")
    }
    records = {name: record.get("record", record) for name, record in records.items()}
    assert records["sam"]["start_curvature"] == records["wise_ft"]["start_curvature"]
    assert records["sam"]["history"][0]["trace"] != records["wise_ft"]["history"][0]["trace"]
    assert [mix["weight"] for mix in records["wise_ft"]["mixes"]] == [
        i / 10 for i in reversed(range(11))
    ]

    text = (out / "report.md").read_text()
    assert "## Curvature" in text and "plots/curvature.png" in text
    top = f"{records['sam']['start_curvature']['top_eigenvalue']:.4g}"
    assert text.count(top) >= 2  # both start from the checkpoint
    assert sff.main(words) == 0
    assert "finished before" in capsys.readouterr().out
