"""The README's Python runs as printed."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, tmp_path, monkeypatch, capsys):
    t = np.arange(1500)
    sales = 20 + 5 * np.sin(2 * np.pi * t / 24) + np.random.default_rng(0).normal(size=t.size)
    stamps = pd.date_range("2024-01-01", periods=t.size, freq="h")
    pd.DataFrame({"timestamp": stamps, "sales": sales}).to_csv(tmp_path / "sales.csv", index=False)
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
    printed = capsys.readouterr().out
    for line, said in re.findall(r"(print\(.*?\))  # (\(.*?\))$", BLOCKS[number], re.MULTILINE):
        assert said in printed, line


def test_there_is_python_to_run():
    assert len(BLOCKS) >= 2
