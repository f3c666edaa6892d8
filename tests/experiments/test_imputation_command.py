import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import imputation as command
from experiments import imputation_report
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models.moment import Moment
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.models.units import Units, UnitsConfig

COLUMNS = ["data", "model", "method", "seed", "rate", "test_mse", "test_mae"]


def units():
    small = Units.small()
    config = UnitsConfig.of(16, 2, 1, small.tasks, patch_len=8, prompt_len=3)
    return Units(dataclasses.replace(config, dataset="b"))


MODELS = {
    "timer": lambda: Timer(
        TimerConfig(
            8, 16, 8, equal_layers(1, 2, 8, 24), context_len=32, horizon=8, task="imputation"
        )
    ),
    "moment": lambda: Moment(Moment.small()),
    "units": units,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """400 hours of two noisy days, as a CSV."""
    rows, rng = np.arange(400), np.random.default_rng(0)
    values = np.sin(2 * np.pi * rows / 24 + np.arange(2)[:, None]) + 0.1 * rng.normal(size=(2, 400))
    table = pd.DataFrame(values.T, columns=["a", "b"])
    table.insert(0, "date", pd.date_range("2024", periods=400, freq="h"))
    place = tmp_path_factory.mktemp("waves") / "waves.csv"
    table.to_csv(place, index=False)
    return place


def arguments(data, family, place, *more):
    model = MODELS[family]()
    ltsm_jax.save(place / "model", model, jax.jit(model.init)(jax.random.key(0)), overwrite=True)
    words = ["--data", str(data), "--model", str(place / "model"), "--window", "32", "--patch", "8"]
    return [*words, "--epochs", "1", "--batch-size", "64", "--out", str(place / "o"), *more]


@pytest.mark.slow
@pytest.mark.parametrize("family", list(MODELS))
def test_a_table_of_methods_and_baselines(family, data, tmp_path, capsys):
    words = arguments(
        data, family, tmp_path, "--rates", "0.25,0.5", "--methods", "zero_shot,ff", "--seeds", "0,1"
    )
    assert command.main(words) == 0
    found = pd.read_csv(tmp_path / "o" / "results.csv")
    assert found.columns[:7].tolist() == COLUMNS
    per_rate = ["zero_shot", "ff", "ff", "linear", "last", "seasonal_naive"]
    assert found["method"].tolist() == 2 * per_rate and found["rate"].tolist() == 6 * [0.25] + 6 * [
        0.5
    ]
    assert np.isfinite(found[["test_mse", "test_mae", "val_mse", "anchored_mse"]]).all(axis=None)
    assert found.groupby("rate")["points"].nunique().tolist() == [1, 1], (
        "all are scored on the same points"
    )
    by_method = found[found["rate"] == 0.5].set_index("method")["test_mse"]
    assert by_method["seasonal_naive"] < by_method["linear"] < by_method["last"]
    report = (tmp_path / "o" / "report.md").read_text()
    assert "| linear interpolation |" in report and "Difference to linear interpolation" in report
    assert (tmp_path / "o" / "plots" / "rates.png").is_file() and (
        tmp_path / "o" / "plots" / "fills.png"
    ).is_file()
    capsys.readouterr()
    before = (tmp_path / "o" / "results.csv").read_bytes()
    assert command.main(words) == 0 and "[1/" not in capsys.readouterr().out, "nothing runs twice"
    assert (tmp_path / "o" / "results.csv").read_bytes() == before


@pytest.mark.slow
def test_other_kinds_of_holes_and_refusals(data, tmp_path, capsys, no_pictures):
    words = arguments(
        data, "timer", tmp_path, "--holes", "points,blocks,outages", "--methods", "zero_shot"
    )
    assert command.main(words) == 0
    found = pd.read_csv(tmp_path / "o" / "results.csv").set_index(["holes", "method"])
    shown = found["points"].groupby("holes").first() / (found["windows"].iloc[0] * 2 * 32)
    np.testing.assert_allclose(
        shown, 0.25 * 24 / 32, atol=0.05
    )  # the same share, whatever the kind
    assert found.loc[("points", "linear"), "test_mse"] < found.loc[("blocks", "linear"), "test_mse"]
    assert command.main([*words, "--patch", "4"]) == 2  # other settings want another folder
    assert (
        command.main([*words, "--window", "36"]) == 2
        and "whole patches of 8" in capsys.readouterr().err
    )


def test_ranks_share_ties_and_differences_are_relative():
    rows = []
    for data, errors in {"a": (1.0, 2.0, 2.0), "b": (3.0, 1.5, 3.0)}.items():
        for method, mse in zip(("ff", "sff", "linear"), errors, strict=True):
            rows.append(
                {
                    "data": data,
                    "holes": "patches",
                    "rate": 0.5,
                    "method": method,
                    "seed": 0,
                    "test_mse": mse,
                }
            )
    table = pd.DataFrame(rows)
    assert imputation_report.ranks(table)[1] == [
        ["FF", "1.75", "1 of 2"],
        ["SFF", "1.75", "1 of 2"],
        ["linear interpolation", "2.50", "0 of 2"],
    ]
    against = {row[0]: row for row in imputation_report.differences(table, "ff")[1]}
    assert against["SFF"][1] == "+25.0" and against["linear interpolation"][1] == "+50.0"
    assert against["SFF"][3] == "1 of 2"
