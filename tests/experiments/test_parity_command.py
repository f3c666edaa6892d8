"""The side-by-side with numbers that the released code left."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import parity

GOLDEN = Path(__file__).parents[1] / "golden" / "parity"


def test_the_recorded_numbers_come_out_again_and_parts_that_lack_something_are_named(
    tmp_path, capsys
):
    assert parity.main(["--recorded", str(GOLDEN), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 comparisons within what rounding explains" in said
    assert "left out: sff: " in said and "has no sff.json" in said and "left out: pruning: " in said
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert (
        table.part.tolist() == ["imputation", "imputation", "anomaly", "anomaly"]
        and table.good.all()
    )
    assert (table.difference <= table.limit).all()


def test_another_number_than_the_recorded_one_gives_exit_code_1(tmp_path, capsys):
    for file in GOLDEN.glob("imp*"):
        shutil.copy(file, tmp_path)
    stored = dict(np.load(tmp_path / "imp.npz"))
    np.savez(tmp_path / "imp.npz", **(stored | {"ims": stored["ims"] + 1e-4}))
    assert parity.main(["--recorded", str(tmp_path), "--parts", "imputation"]) == 1
    assert "1 of 2 comparisons" in capsys.readouterr().out
    (tmp_path / "imp.npz").unlink()
    assert (
        parity.main(["--recorded", str(tmp_path), "--parts", "imputation"]) == 1
    )  # nothing was compared


def test_a_difference_that_is_no_number_and_another_shape_do_not_pass(monkeypatch, capsys):
    assert not parity.compare("sff", "train loss", "", np.nan, 1.0).good
    with pytest.raises(ValueError, match=r"ours has the shape \(2,\), theirs \(3,\)"):
        parity.compare("sff", "train loss", "", np.zeros(2), np.zeros(3))
    monkeypatch.delenv(parity.FOLDER, raising=False)
    assert parity.main([]) == 2
    assert "give --recorded" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_and_pruning_are_the_released_ones(capsys):
    """With $LTSM_PARITY, the folder of the recordings, and $LTSM_PARITY_TTM, the published
    TTM r2.
    """
    folder, checkpoint = os.environ.get(parity.FOLDER), os.environ.get("LTSM_PARITY_TTM")
    if not folder:
        pytest.skip(f"{parity.FOLDER} names no folder of recordings")
    rows, left_out = parity.run(
        Path(folder), tuple(parity.PARTS), Path(checkpoint) if checkpoint else None
    )
    assert [row for row in rows if not row.good] == []
    assert set(left_out) <= (set() if checkpoint else {"pruning"})
