import pandas as pd
import pytest

from experiments import few_shot, lists, sff
from ltsm_jax.training import lanes


def test_combinations_of_all_lists(tmp_path):
    words = ["--data", "a.csv,b.csv", "--few-shot=0.1,0.2", "--alpha", "0.5,0.7", "--out", "o"]
    found = lists.combinations(words)
    assert list(found) == ["a.csv-0.1", "a.csv-0.2", "b.csv-0.1", "b.csv-0.2"]
    assert found["b.csv-0.1"] == [
        "--data",
        "b.csv",
        "--few-shot=0.1",
        "--alpha",
        "0.5,0.7",
        "--out",
        "o",
    ]
    assert lists.combinations(["--data", "a.csv", "--alpha", "0.5,0.7"]) == {}
    assert list(lists.combinations(words, ("--few-shot",))) == ["0.1", "0.2"]
    odd = tmp_path / "a,b.csv"
    odd.touch()
    assert lists.combinations(["--data", str(odd)]) == {}, "a file with a comma in its name"


def test_each_runs_in_a_folder_of_its_own_and_all_are_joined(tmp_path):
    seen = []

    def one(words):
        seen.append(words)
        out = lists.out_of(words, "")
        out.mkdir(parents=True)
        pd.DataFrame({"data": [words[1]], "test_mse": [1.0]}).to_csv(
            out / "results.csv", index=False
        )
        return 1 if words[1] == "a" else 0

    words = ["--data", "a,b", "--out", str(tmp_path / "o"), "--epochs", "1"]
    assert lists.run(words, lists.out_of(words, ""), one) == 1, "a run failed, the others ran"
    assert seen[1] == ["--data", "b", "--epochs", "1", "--out", str(tmp_path / "o" / "b")]
    assert pd.read_csv(tmp_path / "o" / "results.csv")["data"].tolist() == ["a", "b"]
    assert lists.run(["--data", "a"], tmp_path, one) is None
    assert lists.run(words, tmp_path, lambda words: 75) == 75, "stopped: nothing after it runs"


def test_ranks_and_wins_by_hand():
    rows = []
    for share, errors in {0.1: (1.0, 0.8, 2.0), 0.5: (1.0, 1.5, 1.2)}.items():
        for method, mse in zip(("ff", "sff", "tfs"), errors, strict=True):
            facts = {"data": "a", "model": "m", "few_shot": share, "budget": ""}
            rows.append(facts | {"method": method, "seed": 0, "test_mse": mse})
    table = pd.DataFrame(rows)
    assert few_shot.wins(table).to_dict() == {"ff": 1.0, "sff": 1.0, "tfs": 0.0}
    found = pd.DataFrame(few_shot.rank_rows(table)).set_index(["few_shot", "method"])
    assert (
        found.loc[("0.1", "sff"), "mean_rank"] == 1 and found.loc[("0.5", "sff"), "mean_rank"] == 3
    )
    assert found.loc[("all", "ff"), "wins"] == 1
    assert few_shot.errors(table)[1][0] == ["a", "m", "FF", "1.0000", "1.0000"]


@pytest.mark.slow
def test_one_table_across_shares(micro, waves, tmp_path, capsys):
    words = [
        "--data",
        str(waves),
        "--model",
        str(micro),
        "--few-shot",
        "0.5,1",
        "--methods",
        "zero_shot,ff,sff",
    ]
    more = [
        "--seeds",
        "0,1",
        "--epochs",
        "1",
        "--horizon",
        "8",
        "--context",
        "32",
        "--lanes",
        lanes.ASKED[-1],
    ]
    assert few_shot.main([*words, *more, "--out", str(tmp_path / "few")]) == 0
    table = pd.read_csv(tmp_path / "few" / "results.csv")
    assert table.groupby(["few_shot", "method"]).size().tolist() == [2, 2, 2] * 2
    found = pd.read_csv(tmp_path / "few" / "differences.csv")
    assert set(found["arm"]) == {"zero_shot", "sff"} and (found["seeds"] == 2).all()
    report = (tmp_path / "few" / "report.md").read_text()
    assert "Mean ranks and wins" in report and "Gain over full fine-tuning" in report

    assert sff.main([*words, *more, "--out", str(tmp_path / "sff")]) == 0
    joined = pd.read_csv(tmp_path / "sff" / "results.csv")
    assert joined["few_shot"].tolist() == [0.5] * 6 + [1.0] * 6
    capsys.readouterr()
    assert few_shot.main([*words, "--methods", "nothing", "--out", str(tmp_path / "x")]) == 2
    assert "nothing" in capsys.readouterr().err
