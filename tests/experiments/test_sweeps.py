"""Comparisons whose cells are trained as lanes of one program give what they give one by one."""

import json

import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import alpha, cells, prune_then_finetune, sff
from ltsm_jax import trees
from ltsm_jax.training import lanes

CLOCKS = ["seconds"]


@pytest.fixture(scope="module")
def command(micro, waves):
    def command(out, **flags):
        flags = {"seeds": "0,1", "epochs": "2", "batch-size": "128", "lr": "1e-3"} | flags
        words = ["--data", str(waves), "--model", str(micro), "--out", str(out)]
        return words + [word for name, value in flags.items() for word in (f"--{name}", value)]

    return command


def rows(folder):
    return pd.read_csv(folder / "results.csv").drop(columns=CLOCKS)


def files(folder):
    """Every file of the comparison, but for those of a model's arrays, whose names are drawn."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in found if "arrays" not in path.parts}


@pytest.fixture
def counted(monkeypatch):
    """Numbers of lanes of each program."""
    programs, as_lanes = [], lanes._as_lanes

    def counted(jobs, members, *rest, **named):
        programs.append(len(members))
        return as_lanes(jobs, members, *rest, **named)

    monkeypatch.setattr(lanes, "_as_lanes", counted)
    return programs


class Killed(BaseException):
    """Stands for SIGKILL: nothing in between may catch it."""


@pytest.mark.slow
def test_sff_as_lanes_writes_what_it_writes_one_by_one(
    command, tmp_path, counted, no_pictures, monkeypatch
):
    asked = {"methods": "zero_shot,ff,sff", "alpha": "0.9", "seeds": "0,1"}
    assert sff.main(command(tmp_path / "off", **asked, lanes="off")) == 0
    assert counted == []
    # killed after the first epoch of all lanes, and between training and the first result
    for target, name in ((lanes.Sweep, "end_epoch"), (cells, "row_of")):
        real = getattr(target, name)

        def dying(*args, real=real, **kwargs):
            if real is cells.row_of and args[1]["method"] == "zero_shot":
                return real(*args, **kwargs)
            if real is not cells.row_of and args[1] == 0:
                return real(*args, **kwargs)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(target, name, dying)
            with pytest.raises(Killed):
                sff.main(command(tmp_path / "on", **asked, lanes="on"))
    assert sff.main(command(tmp_path / "on", **asked, lanes="on")) == 0
    assert counted == [4, 4], "four lanes, which went on once and were finished then"
    pd.testing.assert_frame_equal(rows(tmp_path / "on"), rows(tmp_path / "off"))
    assert files(tmp_path / "on") == files(tmp_path / "off") | {"lanes/choice.json"}
    for cell in ("ff-seed0", "sff-0.9-seed1"):
        (_, a), (_, b) = (
            ltsm_jax.load(tmp_path / way / "cells" / cell / "model") for way in ("on", "off")
        )
        for mine, other in zip(trees.flatten(a).values(), trees.flatten(b).values(), strict=True):
            np.testing.assert_array_equal(mine, other)
        place = f"cells/{cell}/training/phase-0/metrics.jsonl"
        assert (tmp_path / "on" / place).read_bytes() == (tmp_path / "off" / place).read_bytes()


@pytest.mark.slow
def test_learning_rates_to_choose_from_are_lanes_and_a_wild_one_fails_alone(
    command, tmp_path, counted, no_pictures
):
    asked = {"methods": "ff", "lr": "1e-3,1e-2,1e30", "lanes": "on"}
    assert sff.main(command(tmp_path / "grid", **asked)) == 1
    assert counted == [3]
    frame = rows(tmp_path / "grid")
    assert frame.lr.tolist() == [1e-3, 1e-2, 1e-2] or frame.lr.nunique() == 2
    assert not (tmp_path / "grid" / "cells" / "ff-lr1e+30-seed0").exists()


@pytest.mark.slow
def test_pruned_models_are_lanes_under_their_masks(command, tmp_path, counted, no_pictures):
    asked = {"methods": "ff", "ratios": "0.2,0.4", "tune": "all", "timed-runs": "0"}
    assert prune_then_finetune.main(command(tmp_path / "off", **asked, lanes="off")) == 0
    assert prune_then_finetune.main(command(tmp_path / "on", **asked, lanes="on")) == 0
    assert counted == [2, 4], "ff whole with two seeds, and pruned at two ratios"
    timed = ["peak_mb", "whole_peak_mb"]
    a, b = (rows(tmp_path / way).drop(columns=timed, errors="ignore") for way in ("on", "off"))
    pd.testing.assert_frame_equal(a, b)
    choice = json.loads((tmp_path / "on" / "lanes" / "choice.json").read_text())
    assert {c["way"] for c in choice["choices"].values()} == {"mapped"}


@pytest.mark.slow
def test_choices_of_alpha_are_lanes_and_what_a_search_chose_is_one_of_them(
    command, tmp_path, counted, no_pictures
):
    asked = {
        "methods": "zero_shot,ff,sff,sff_norm,short",
        "alpha": "0.6,0.9",
        "seeds": "0",
        "search-epochs": "0",
    }
    assert alpha.main(command(tmp_path / "off", **asked, lanes="off")) == 0
    assert counted == []
    assert alpha.main(command(tmp_path / "on", **asked, lanes="on")) == 0
    assert counted == [5], "ff, two alphas of sff, sff_norm, and the alpha that short has found"
    a, b = (rows(tmp_path / way).drop(columns=["search_seconds"]) for way in ("on", "off"))
    pd.testing.assert_frame_equal(a, b)
