"""Every family through the comparison of methods, at its small random size."""

import pandas as pd
import pytest

from experiments import all_families, demo, sff
from ltsm_jax.models import FAMILIES


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return str(demo.generated(tmp_path_factory.mktemp("data")))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_goes_through_every_method(family, table, tmp_path, capfd, request):
    """One of them with lanes chosen by time and pictures, which know no family and take a third of
    the time.
    """
    words = []
    if family != "timer":
        words = ["--lanes", "off"]
        request.getfixturevalue("no_pictures")
    assert (
        all_families.main(
            ["--data", table, "--families", family, "--out", str(tmp_path / "out"), *words]
        )
        == 0
    )
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(rows["method"]) == set(all_families.METHODS)
    assert rows[["val_mse", "test_mse"]].notna().all(axis=None)
    assert (
        f"1 of 1 families went through {len(all_families.METHODS)} methods"
        in capfd.readouterr().out
    )


def test_unknown_families_are_refused_with_a_hint(capfd):
    assert all_families.main(["--families", "timr"]) == 2
    assert "did you mean timer?" in capfd.readouterr().err


def test_a_failing_family_is_named_and_gives_exit_code_1(table, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sff, "main", lambda argv: 1)
    out = ["--out", str(tmp_path / "out")]
    assert all_families.main(["--data", table, "--families", "timer", *out]) == 1
    said = capfd.readouterr()
    assert "FAILED timer" in said.err and "0 of 1 families" in said.out


def test_unknown_methods_are_refused_before_anything_runs(table, tmp_path, capfd):
    out = tmp_path / "out"
    assert all_families.main(["--data", table, "--methods", "ff,sfff", "--out", str(out)]) == 2
    assert "did you mean sff?" in capfd.readouterr().err and not out.exists()


def test_a_folder_of_something_else_is_never_replaced(table, tmp_path, capfd):
    """`--out .` in a folder with one's own files must not empty it."""
    (tmp_path / "thesis.tex").write_text("years of work")
    assert all_families.main(["--data", table, "--families", "timer", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capfd.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
