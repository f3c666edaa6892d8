import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import anomaly as command
from experiments import anomaly_report
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import anomaly
from ltsm_jax.training import step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = Timer(
        TimerConfig.of(96, 8, 16, 1, 2, context_len=768, horizon=96, task="anomaly", dropout=0.0)
    )
    place = tmp_path_factory.mktemp("models") / "small"
    ltsm_jax.save(place, model, jax.jit(model.init)(jax.random.key(0)))
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("ucr")
    for number, (n_rows, b) in enumerate([(1700, 500), (2300, 700), (1900, 600)], 1):
        values = np.sin(np.arange(n_rows) / 5) + 0.01 * np.random.default_rng(number).normal(
            size=n_rows
        )
        values[1400:1410] += 3
        file = place / f"{number}_UCR_Anomaly_sine_{b}_1400_1409.txt"
        file.write_text("\n".join(map(str, values)))
    return place


def arguments(data, model, out, *more):
    return ["--data", str(data), "--model", str(model), "--out", str(out), *more]


def test_files_of_different_length_share_a_program_and_go_on(data, model, tmp_path, capsys):
    before = anomaly._batch_errors._cache_size()
    words = arguments(data, model, tmp_path / "o", "--methods", "zero_shot", "--point-adjust")
    assert command.main(words) == 0
    assert anomaly._batch_errors._cache_size() == before + 1
    found = pd.read_csv(tmp_path / "o" / "results.csv")
    assert list(found.columns[:6]) == ["file", "method", "seed", "rank", "alpha", "found_at_3"]
    assert found["method"].tolist() == [
        m for m in ("zero_shot", "last", "z_score", "discord") for _ in range(3)
    ]
    np.testing.assert_allclose(found["alpha"], found["rank"] / found["tokens"])
    assert (found["found_at_3"] == (found["alpha"] <= 0.03)).all()
    assert (found[found["method"] == "z_score"]["rank"] == 1).all()
    assert set(found["window"]) == {384}  # 500 training rows hold none of 768
    text = (tmp_path / "o" / "report.md").read_text()
    assert "| zero-shot |" in text and "It inflates" in text and "plots/found.png" in text
    assert (tmp_path / "o" / "plots" / "examples.png").is_file()

    capsys.readouterr()
    assert command.main(words) == 0
    assert "[1/" not in capsys.readouterr().out  # nothing was run again
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "o" / "results.csv"), found)
    assert command.main([*words, "--smooth", "3"]) == 2  # other settings want another folder


@pytest.mark.slow
def test_files_of_different_length_train_in_one_program(data, model, tmp_path):
    more = (
        "--methods",
        "zero_shot,ff,sff,tfs",
        "--epochs",
        "2",
        "--windows",
        "16",
        "--batch-size",
        "8",
    )
    before = step.advance._cache_size()
    assert command.main(arguments(data, model, tmp_path / "o", *more)) == 0
    assert step.advance._cache_size() == before + 1
    found = pd.read_csv(tmp_path / "o" / "results.csv")
    assert len(found) == 3 * 7 and found["val_mse"].notna().sum() == 12
    scores = found.pivot(index="file", columns="method", values="val_mse")
    assert (scores["ff"] != scores["sff"]).all() and (scores["ff"] != scores["zero_shot"]).all()


def test_a_file_that_is_too_short_is_named_and_left_out(data, model, tmp_path, capsys):
    words = arguments(data, model, tmp_path / "o", "--window", "576", "--plan")
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "1_UCR_Anomaly_sine_500_1400_1409: left out" in said and "1 series of" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--window", "500"), "multiple of 96"),
        (("--window", "1152"), "left out"),
        (("--methods", "ff,fff"), "unknown"),
        (("--methods", "ff", "--alpha", "0.5"), "--alpha is for"),
        (("--data", "nowhere"), "no such file"),
    ],
)
def test_refusals(data, model, tmp_path, capsys, more, said):
    assert command.main(arguments(data, model, tmp_path / "o", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_named_archives_need_the_folder_of_data(monkeypatch, tmp_path):
    monkeypatch.setenv("LTSM_DATA", str(tmp_path))
    assert command.path_of("UCR") == tmp_path / "anomaly" / "ucr"
    monkeypatch.delenv("LTSM_DATA")
    with pytest.raises(command.flags.UsageError, match="LTSM_DATA"):
        command.path_of("nab")


def test_summary_and_differences():
    rows = []
    for file, alphas in {"a": (0.01, 0.2), "b": (0.04, 0.04), "c": (1.0, 0.05)}.items():
        for method, alpha in zip(("ff", "sff"), alphas, strict=True):
            row = {
                "file": file,
                "method": method,
                "seed": 0,
                "rank": 1.0 if alpha < 1 else np.nan,
                "alpha": alpha,
            }
            row |= {f"found_at_{q}": int(alpha <= q / 100) for q in (1, 3, 5, 10)}
            names = ("place_right", "vus_pr", "auc_pr", "f1", "range_f1", "seconds")
            rows.append(row | dict.fromkeys(names, 0.5))
    found = anomaly_report.summarise(pd.DataFrame(rows)).set_index("method")
    assert found.loc["ff", ["files", "missed", "found_at_1", "found_at_5"]].tolist() == [3, 1, 1, 2]
    assert found.loc["ff", "alpha"] == pytest.approx(0.35) and found["wins"].tolist() == [1.5, 1.5]
    mean, low, high = anomaly_report.difference(pd.DataFrame(rows), "sff", "ff", "alpha")
    assert mean == pytest.approx((0.19 + 0 - 0.95) / 3) and low < mean < high
