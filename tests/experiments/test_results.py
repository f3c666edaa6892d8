"""The committed tables of results: RESULTS.md names them all, and two cells are made again."""

import re
from pathlib import Path

import pandas as pd
import pytest

from experiments import sff
from ltsm_jax.data import synthetic

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "docs" / "results"
COMMAND = (
    "--model timer-tiny --methods zero_shot,ff --seeds 0 --epochs 1 --few-shot 0.05"
    " --batch-size 16 --score-stride 20 --horizon 96"
)


def test_results_md_names_every_table_and_stays_short():
    text = (ROOT / "RESULTS.md").read_text()
    named = re.findall(r"`([\w*-]+\.csv)`", text)
    there = {path.name for path in TABLES.glob("*.csv")}
    for name in there:
        assert any(Path(name).match(pattern) for pattern in named), (
            f"RESULTS.md does not name {name}"
        )
    for pattern in named:
        assert any(Path(name).match(pattern) for name in there), f"{pattern} is not in docs/results"
    assert len(text.splitlines()) < 350


@pytest.mark.slow
def test_two_committed_cells_are_made_again_from_scratch(tmp_path, no_pictures):
    committed = pd.read_csv(TABLES / "generated-cells.csv").set_index("method")
    assert COMMAND in " ".join((ROOT / "RESULTS.md").read_text().replace("\\\n", " ").split())
    table = pd.DataFrame(synthetic.generate(0, 2, 2400).T, columns=["a", "b"])
    table.to_csv(tmp_path / "generated.csv", index=False)
    words = [
        "--data",
        str(tmp_path / "generated.csv"),
        *COMMAND.split(),
        "--out",
        str(tmp_path / "run"),
    ]
    assert sff.main(words) == 0
    found = pd.read_csv(tmp_path / "run" / "results.csv").set_index("method")
    assert sorted(found.index) == ["ff", "zero_shot"]
    for part in ("val_mse", "val_mae", "test_mse", "test_mae"):
        # six steps on another processor or version of jax round otherwise
        assert found[part].to_dict() == pytest.approx(committed[part].to_dict(), rel=1e-3), part
    assert committed.test_mse["ff"] != pytest.approx(committed.test_mse["zero_shot"], rel=1e-2)
