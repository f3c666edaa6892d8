"""The study: its rule, its ranks, and a tiny one from its command to its tables."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from experiments import study


def record(method, seed, mse, blocks=None, **more):
    facts = {"data": "a", "model": "m", "few_shot": 1.0, "budget": "300"} | more
    blocks = mse + np.linspace(-0.1, 0.1, 12) if blocks is None else blocks
    return facts | {"method": method, "seed": seed, "test_mse": mse, "blocks": blocks}


def arms(**means):
    """Three seeds of each arm, with a common noise of the seed."""
    noise = (0.0, 0.02, -0.01)
    return [
        record(arm, seed, mean + noise[seed] + 1e-4 * seed)
        for arm, mean in means.items()
        for seed in range(3)
    ]


def test_an_arm_helps_or_harms_where_both_intervals_leave_zero_out():
    found = study.differences(arms(ff=0.5, better=0.45, worse=0.6)).set_index("arm")
    assert found.rule.to_dict() == {"better": "helps", "worse": "harms"}
    assert found.gain["better"] == pytest.approx(0.05) and found.gain_percent[
        "better"
    ] == pytest.approx(10, rel=0.01)
    assert found.seeds.tolist() == [3, 3]
    assert "ff" not in found.index


def test_a_gain_that_seeds_or_blocks_of_time_do_not_show_does_not_count():
    wide = np.array([1.0, -1.0] * 6)
    by_time = [record("ff", s, 0.5, blocks=0.5 + wide) for s in (0, 1, 2)]
    by_time += [record("arm", s, 0.45 + 1e-4 * s, blocks=0.45 - wide) for s in (0, 1, 2)]
    by_seed = [record("ff", s, 0.5) for s in (0, 1, 2)]
    by_seed += [record("arm", s, mse) for s, mse in enumerate((0.4, 0.49, 0.46))]
    one = [record("ff", 0, 0.5), record("arm", 0, 0.4)]
    for records in (by_time, by_seed, one):
        found = study.differences(records)
        assert found.rule.tolist() == ["not shown"] and found.gain[0] > 0


def test_interval_over_seeds_is_students():
    low, high = study.seed_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert np.isnan(study.seed_interval(np.array([1.0]))).all()
    many = study.seed_interval(np.tile([0.0, 1.0], 20))[1] - 0.5
    assert many == pytest.approx(2.023 * np.tile([0.0, 1.0], 20).std(ddof=1) / 40**0.5, rel=0.01)


def test_a_claim_is_reproduced_by_most_pairs_and_else_not_confirmed():
    def table(*words):
        return pd.DataFrame({"arm": "sff", "rule": list(words)})

    assert (
        "smoothing (SFF): reproduced (helps in 2 of 3 pairs"
        in study.verdicts(table("helps", "helps", "harms"))["sff"]
    )
    half = study.verdicts(table("helps", "not shown"))["sff"]
    assert "implementation exact, claim not confirmed on obtainable weights" in half
    assert study.verdicts(pd.DataFrame()) == {}


def test_sharpness_is_correlated_with_the_gain_where_it_was_measured():
    records = []
    for data, gain, before in (
        ("a", 0.01, 1.0),
        ("b", 0.02, 3.0),
        ("c", 0.03, 4.0),
        ("d", 0.04, 9.0),
    ):
        for arm, mse, sharp in (
            ("ff", 0.5, before),
            ("sff", 0.5 - gain, 0.9 * before - 0.05 * before**2),
        ):
            records.append(record(arm, 0, mse, data=data, sharpness=sharp))
            records.append(record(arm, 1, mse, data=data, sharpness=float("nan")))  # a seed without
    found = study.differences(records)
    assert found.sharpness_before.tolist() == [1.0, 3.0, 4.0, 9.0]
    text = study.sharpness_lines(found)[-1]
    # the relative fall is 0.1 + 0.05 * before: its ranks are those of the gain, as are those of the
    # sharpness
    assert "over 4 pairs: mixing lowers it in 4" in text and "+1.00 of the eigenvalue" in text
    assert "+1.00 of its relative fall" in text
    assert study.sharpness_lines(study.differences(records[:-4])) == []
    assert study.spearman([1, 2, 3, 4], [10, 30, 30, 20]) == pytest.approx(0.316, abs=1e-3)


def test_ranks_are_of_data_and_model_with_the_critical_difference_of_nemenyi():
    rows = []
    for data, scale in (("a", 1.0), ("b", 100.0), ("c", 1.0)):
        for arm, mse in (("ff", 1.0), ("sff", 1.1), ("lp", 0.9)):
            rows += [
                record(arm, seed, scale * mse, data=data, budget=b)
                for seed in (0, 1)
                for b in ("1", "2")
            ]
    rows.append(record("ff", 0, 1.0, data="d"))  # lacks the other arms
    ranks, blocks, width = study.mean_ranks(pd.DataFrame(rows))
    assert ranks.arm.tolist() == ["lp", "ff", "sff"] and ranks["rank"].tolist() == [1, 2, 3]
    assert blocks == 3
    assert width == pytest.approx(2.344 * (3 * 4 / 18) ** 0.5)


def test_the_tables_of_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    ranges = [stats.studentized_range.ppf(0.95, k, np.inf) / 2**0.5 for k in (2, 5, 11, 20)]
    assert [study.NEMENYI[k - 2] for k in (2, 5, 11, 20)] == pytest.approx(ranges, abs=1e-3)
    degrees = np.arange(len(study.STUDENT)) + 1
    assert pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3) == study.STUDENT


@pytest.mark.parametrize(
    "count, wanted, stride", [(2785, 300, 11), (100, 300, 1), (480, 10, 53), (1400, 200, 11)]
)
def test_scored_windows_meet_every_hour_and_weekday(count, wanted, stride):
    assert study.stride_for(count, wanted) == stride
    assert len({(i * stride) % 168 for i in range(168)}) == 168


@pytest.fixture
def words(micro, waves, tmp_path):
    """A study that takes seconds."""
    flags = (
        "--arms zero_shot,ff,sff,pruned+ff --shares 1 --steps 4,6,11 --seeds 0,1 --horizon 8 --lr "
        "1e-3 --alpha 0.7"
    )
    more = ["--batch-size", "128", "--ratio", "0.3", "--out", str(tmp_path / "study")]
    return ["--data", str(waves), "--models", str(micro), *flags.split(), *more]


def test_plan_counts_pairs_by_epochs_and_runs_nothing(words, tmp_path, capsys):
    assert study.main([*words, "--plan"]) == 0
    said = capsys.readouterr().out
    # 513 windows are 5 steps: 4 and 6 steps are both one epoch, which is one pair
    assert (
        "waves-micro-1-4: 1 epochs, 5 steps" in said
        and "waves-micro-1-11: 2 epochs, 10 steps" in said
    )
    assert "2 pairs, " in said and "hours of training (a guess from sizes)" in said
    assert not (tmp_path / "study").exists()
    # as many windows of every set, and about so many to score
    few = [*words, "--train-windows", "200", "--score-windows", "20", "--steps", "4"]
    options, rest = study.flags.parse_some(study.Options, few, "")
    pair = study.pairs_of(dataclasses.replace(options, more=" ".join(rest)))[0]
    assert int(513 * pair.few_shot) == 200 and (pair.epochs, pair.steps) == (2, 4)
    assert "--score-stride" in study.commands(study.Options(out=tmp_path), pair)["sff"]
    assert study.main(["--arms", "sff", "--plan"]) == 2
    assert "--arms lacks ff" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_study_goes_from_its_command_to_its_tables_and_runs_nothing_twice(
    words, tmp_path, no_pictures, capsys
):
    words[words.index("--steps") + 1] = "4"
    assert study.main(words) == 0
    out = tmp_path / "study"
    table, found = (pd.read_csv(out / f"{name}.csv") for name in ("results", "differences"))
    assert table.method.value_counts().to_dict() == {
        "zero_shot": 2,
        "ff": 2,
        "sff": 2,
        "pruned+ff": 2,
    }
    assert table.steps.tolist() == [0, 0] + [5] * 6 and set(table.budget) == {4}
    assert sorted(found.arm) == ["pruned+ff", "sff", "zero_shot"]
    mine, base = (table[table.method == name].set_index("seed").test_mse for name in ("sff", "ff"))
    row = found[found.arm == "sff"].iloc[0]
    assert (
        row.gain == pytest.approx((base - mine).mean())
        and np.isfinite([row.seed_low, row.block_low]).all()
    )
    text = (out / "report.md").read_text()
    assert (
        "smoothing (SFF): " in text
        and "pruning (Prune-then-Finetune): " in text
        and "In a pair an arm HELPS" in text
    )
    before = (out / "results.csv").read_bytes()
    capsys.readouterr()
    assert study.main(words) == 0
    assert (out / "results.csv").read_bytes() == before
    said = capsys.readouterr().out
    assert "from finished runs" in said and said.count("finished before") == 12
