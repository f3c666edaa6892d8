"""Settings that validation chooses: learning rates, alpha, ratio; test errors of every epoch;
blocks of validation.
"""

import json

import numpy as np
import pandas as pd
import pytest

from experiments import cells, grid, prune_then_finetune, report, sff
from experiments.flags import UsageError

LRS = "1e-4,1e-2"


@pytest.fixture(scope="module")
def words(micro, waves):
    """The start of a command line."""
    return ["--data", str(waves), "--model", str(micro), "--epochs", "2", "--batch-size", "128"]


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """A comparison whose learning rates and alpha are chosen, of two seeds, with test errors of
    every epoch.
    """
    out = tmp_path_factory.mktemp("choosing") / "sff"
    flags = [
        "--methods",
        "zero_shot,ff,sff",
        "--alpha",
        "0.5,0.9",
        "--choose-alpha",
        "--lr",
        LRS,
        "--seeds",
        "4,1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert sff.main([*words, *flags, "--test-each-epoch", "--out", str(out)]) == 0
    return out


def test_each_arm_has_every_candidate_at_the_first_seed_and_its_best_alone_at_the_others(folder):
    frame = pd.read_csv(folder / "results.csv")
    first, other = frame[frame.seed == 4], frame[frame.seed == 1]
    assert first.method.value_counts().to_dict() == {"zero_shot": 1, "ff": 2, "sff": 4}
    assert other.method.tolist() == ["zero_shot", "ff", "sff"] and other.chosen.all()
    for method in ("ff", "sff"):
        mine = first[first.method == method]
        best = mine.loc[mine.val_mse.idxmin()]
        assert mine[mine.chosen].index.tolist() == [best.name]
        there = other[other.method == method].iloc[0]
        assert there.lr == best.lr and (method == "ff" or there.alpha == best.alpha)
    assert frame[frame.method == "zero_shot"].lr.isna().all()


@pytest.mark.slow
def test_a_candidate_is_the_run_that_its_learning_rate_makes(folder, words, tmp_path, no_pictures):
    chosen = (
        pd.read_csv(folder / "results.csv").query("method == 'ff' and chosen and seed == 4").iloc[0]
    )
    flags = ["--methods", "ff", "--lr", f"{chosen.lr}", "--seeds", "4"]
    assert sff.main([*words, *flags, "--out", str(tmp_path / "one")]) == 0
    alone = pd.read_csv(tmp_path / "one" / "results.csv").iloc[0]
    for name in ("val_mse", "val_mae", "test_mse", "test_mae", "lr", "best_epoch"):
        assert alone[name] == chosen[name], name
    assert "chosen" not in alone and "last_test_mse" not in alone  # as ever where nothing is chosen


def test_the_report_compares_the_chosen_and_shows_the_candidates(folder):
    found = report.read_folder(folder, report.rank)
    summary = report.summarise(found.compared().table)
    assert summary.method.tolist() == ["zero_shot", "ff", "sff"] and summary.seeds.tolist() == [
        2,
        2,
        2,
    ]
    text = (folder / "report.md").read_text()
    part = text.partition("## Chosen by validation")[2].partition("\n\nThe candidates")[0]
    assert (
        part.count("| chosen |") == 2 and part.count("| ff |") == 2 and part.count("| sff |") == 4
    )


def test_another_first_seed_and_one_learning_rate_are_refused_in_the_same_folder(
    folder, words, capsys
):
    before = (folder / "results.csv").read_bytes()
    flags = ["--methods", "sff", "--alpha", "0.5,0.9", "--choose-alpha", "--out", str(folder)]
    assert sff.main([*words, *flags, "--lr", LRS, "--seeds", "1,4"]) == 2
    assert "chosen_at_seed: 4 there, 1 now" in capsys.readouterr().err
    assert sff.main([*words, *flags, "--lr", "1e-4", "--seeds", "4"]) == 2
    said = capsys.readouterr().err
    assert "lr: by validation there, 0.0001 now" in said
    assert "chosen_by_validation: alpha,lr there, alpha now" in said
    assert (folder / "results.csv").read_bytes() == before


def test_test_errors_of_every_epoch_are_kept_and_reported_by_choice(folder):
    found = report.read_folder(folder, report.rank)
    for cell in found.cells:
        tests = [epoch["test_mse"] for epoch in cell["history"]] or [cell["test_mse"]]
        best = cell["best_epoch"] - 1 if cell["history"] else 0
        assert tests[best] == cell["test_mse"]  # the weights that are kept were scored there
        assert cell["last_test_mse"] == tests[-1] and cell["best_test_mse"] == min(tests)
    last, best = (found.compared(by).table for by in ("last", "best-test"))
    assert last.test_mse.tolist() == found.compared().table.last_test_mse.tolist()
    assert (best.test_mse <= found.compared().table.test_mse).all()
    text = report.write_report(folder, "best-test").read_text()
    assert "they are a bound, and no result" in text
    report.write_report(folder)


def test_a_folder_without_test_errors_of_every_epoch_says_how_to_get_them(folder, tmp_path):
    found = report.read_folder(folder, report.rank)
    bare = [{k: v for k, v in cell.items() if not k.startswith("last_")} for cell in found.cells]
    other = report.Found(found.table, bare, found.run, found.baselines, [])
    with pytest.raises(
        ValueError, match="no test errors of every epoch; run it with --test-each-epoch"
    ):
        other.compared("last")


def test_choices_are_of_the_mean_over_blocks_and_of_complete_candidates():
    rows = []
    for lr, values in ((0.1, (1.0, 3.0)), (0.2, (1.5, 2.0)), (0.3, (0.5,))):
        for origin, value in enumerate(values):
            rows.append(
                {
                    "method": "ff",
                    "alpha": None,
                    "lr": lr,
                    "seed": 0,
                    "origin": origin,
                    "val_mse": value,
                }
            )
    rows.append({"method": "ff", "alpha": None, "lr": 0.1, "seed": 1, "origin": 0, "val_mse": 0.0})
    assert grid.choices(rows, ("lr",), 0) == {("ff", None, None, None): (0.2,)}
    marked = grid.mark(rows, {grid.OVER: "lr", grid.SEED: 0})
    assert [(row["lr"], row["origin"]) for row in marked if row["chosen"]] == [(0.2, 0)]
    assert grid.mark(rows, {}) == rows


def test_blocks_of_validation_roll_back_each_before_its_own_training_part(words):
    flags = ["--methods", "ff", "--lr", "1e-3,1e-2", "--origins", "3", "--seeds", "0,1"]
    c = sff.resolve(sff.parse([*words, *flags]))
    found = sff.cells_of(c.options)
    assert len(found) == 6 and {cell.seed for cell in found} == {0}
    lo, hi = c.splits.borders.val
    for cell in found:
        borders = cells.at(c, cell).splits.borders
        shift = cell.origin * (hi - lo)
        assert borders.val == (lo - shift, hi - shift) and borders.train == (0, lo - shift)
        assert borders.test == c.splits.borders.test
        assert cells.at(c, cell).config.lr == cell.lr
    assert found[1].name == "ff-lr0.001-origin1-seed0"
    with pytest.raises(
        UsageError, match=r"--origins 9: 210 training rows do not hold so many blocks"
    ):
        sff.resolve(sff.parse([*words, *flags[:4], "--origins", "9"]))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--choose-alpha"], "--choose-alpha chooses among several"),
        (["--origins", "2"], "--origins is for choosing settings"),
        (["--report-by", "last"], "--report-by last needs --test-each-epoch"),
        (["--betas", "0.9"], r"--betas must be two numbers in \[0, 1\)"),
        (["--optimizer", "adm"], "did you mean adam"),
        (["--patience", "0"], "--patience must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_named(words, flags, says):
    with pytest.raises(UsageError, match=says):
        sff.parse([*words, *flags])


def test_training_flags_reach_the_config_and_only_unusual_ones_the_settings(words):
    plain = sff.resolve(sff.parse(words))
    assert not {"weight_decay", "patience", "optimizer", "betas", "eps", grid.OVER} & set(
        plain.settings
    )
    flags = (
        "--weight-decay 0.1 --patience 2 --optimizer adam --betas 0.8,0.99 --eps 1e-6 --schedule "
        "pruning"
    )
    c = sff.resolve(sff.parse([*words, *flags.split()]))
    config = c.config
    assert (config.weight_decay, config.patience, config.optimizer) == (0.1, 2, "adam")
    assert (config.betas, config.eps, config.schedule) == ((0.8, 0.99), 1e-6, "pruning")
    assert c.settings["optimizer"] == "adam" and c.settings["betas"] == [0.8, 0.99]
    assert sff.parse(c.options.command().split()[3:]).training == c.options.training


@pytest.mark.slow
def test_ratio_ema_and_rate_of_a_pruned_model_are_chosen_once_it_is_fine_tuned(
    words, tmp_path, no_pictures
):
    flags = [
        "--ratio",
        "0.2,0.4",
        "--ema",
        "0.5",
        "--methods",
        "ff",
        "--lr",
        "1e-3,1e-2",
        "--seeds",
        "0,1",
    ]
    more = [
        "--tune",
        "validated",
        "--macro-batch",
        "128",
        "--timed-runs",
        "0",
        "--out",
        str(tmp_path / "prune"),
    ]
    assert prune_then_finetune.main([*words, *flags, *more]) == 0
    frame = pd.read_csv(tmp_path / "prune" / "results.csv")
    first, other = frame[frame.seed == 0], frame[frame.seed == 1]
    counts = {"zero_shot": 1, "ff": 2, "pruned": 2, "pruned+ff": 4}
    assert first.method.value_counts().to_dict() == counts
    assert sorted(other.method) == sorted(counts)
    mine = first[first.method == "pruned+ff"]
    best = mine.loc[mine.val_mse.idxmin()]
    there = other[other.method == "pruned+ff"].iloc[0]
    assert (there.ratio, there.ema, there.lr) == (best.ratio, best.ema, best.lr)
    assert frame.chosen.sum() == 2 * len(counts)
    text = (tmp_path / "prune" / "report.md").read_text()
    assert (
        "## Chosen by validation" in text and "| by validation |" not in text.partition("## How")[0]
    )
    record = json.loads((tmp_path / "prune" / "run.json").read_text())
    assert record["settings"][grid.OVER] == "ratio,ema,lr"
    assert np.isfinite(frame.test_mse).all()


def test_the_papers_ratios_are_the_default_and_nested_ones_are_asked_for(words):
    plain = prune_then_finetune.parse(words)
    assert "depth" not in prune_then_finetune.resolve(plain).settings  # it is one of the later ones
    assert plain.ratios is None and plain.shares == prune_then_finetune.RATIO
    assert prune_then_finetune.parse([*words, "--ratios", "0.3"]).shares == (0.3,)
