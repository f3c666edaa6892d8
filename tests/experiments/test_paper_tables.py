"""The scripts of the papers' tables: their commands are read, and a cell of each runs at a tiny
size.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments import prune_then_finetune, sff

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "experiments" / "paper"


def script(name, *words, **env):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | env
    return subprocess.run(
        ["bash", str(PAPER / name), *words], env=env, cwd=ROOT, capture_output=True, text=True
    )


def commands(name, **env):
    done = script(name, "--list", **env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_cell_of_the_sff_table_is_a_command_with_the_released_settings():
    found = commands("sff_table.sh")
    assert len(found) == 12 * 6
    for words in found[:6]:
        o = sff.parse(words[3:])
        assert (o.training.lr, o.training.epochs, o.training.batch_size) == ((3e-5,), 10, 2048)
        assert (o.context, o.horizon, o.alpha, o.training.mode) == (672, 96, (0.7,), "direct")
    assert [o.split(",") for o in (words[words.index("--methods") + 1] for words in found[:6])][
        -1
    ] == ["sff"]
    assert (
        len({words[words.index("--out") + 1] for words in found}) == 12
    )  # the methods of a data set share a folder


def test_every_model_of_the_pruning_table_has_its_grid():
    assert len(commands("prune_table.sh")) == 8 * 5 * 4
    found = commands("prune_table.sh", DATA="ETTm1", HORIZONS="192")
    read = {
        words[words.index("--model") + 1]: prune_then_finetune.parse(words[3:]) for words in found
    }
    assert len(read) == 8
    head = read["ibm-granite/granite-timeseries-ttm-r2@1536-192-r2"]
    assert head.shares == (0.01, 0.02, 0.05) and head.tune == "each" and "head-only" in head.quirks
    assert (head.context, head.pruning.prune_epochs, head.pruning.score) == (1536, 10, "taylor1")
    experts = read["Maple728/TimeMoE-200M"]
    assert (experts.pruning.expert_threshold, experts.pruning.prune_batch_size) == (0.001, 16)
    assert (experts.training.weight_decay, experts.training.betas) == (0.1, (0.9, 0.95))
    assert read["Salesforce/moirai-1.0-R-large"].context == 3072
    assert all(
        o.seeds == (1,) and o.training.schedule == "pruning" and o.training.patience == 1
        for o in read.values()
    )
    assert script("prune_table.sh", "--list", MODELS="unknown").returncode != 0


@pytest.mark.parametrize("name", ["sff", "prune"])
def test_what_others_report_is_marked_and_blank_where_it_is_not_known(name):
    table = pd.read_csv(PAPER / f"{name}_reported.csv")
    assert table[["whose", "source"]].notna().all(axis=None)
    of_paper = table.whose.str.startswith("the paper")
    assert table[of_paper].mse.isna().all() and table[~of_paper].mse.notna().all()
    assert not table.duplicated(["data", "horizon", "model", "method", "whose"]).any()


@pytest.mark.slow
def test_a_cell_of_each_table_runs_at_a_tiny_size(micro, waves, tmp_path):
    sizes = "--context 32 --horizon 8 --epochs 1 --batch-size 128"
    env = {"DATA": str(waves), "OUT": str(tmp_path)}
    done = script("sff_table.sh", MODELS=str(micro), METHODS="sff", TINY=sizes, **env)
    assert done.returncode == 0, done.stderr
    row = pd.read_csv(tmp_path / "waves-micro" / "results.csv").iloc[0]
    assert (row.method, row.alpha, row["mode"], row.lr) == ("sff", 0.7, "direct", 3e-5)
    sizes += " --ratio 0.3 --lr 1e-4,1e-3 --timed-runs 0"
    env |= {"WEIGHTS": str(micro), "MODELS": "thuml/timer-base-84m", "HORIZONS": "8"}
    done = script("prune_table.sh", TINY=sizes, **env)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "waves-8-timer-base-84m" / "results.csv")
    assert sorted(table.method) == ["ff", "ff", "pruned", "pruned+ff", "pruned+ff", "zero_shot"]
