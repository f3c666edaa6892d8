"""What to deploy: the rule on its own, and comparisons of a small model on small panels."""

import dataclasses
import json

import numpy as np
import pytest

from ltsm_jax.data import DataError
from ltsm_jax.data.panel import Panel
from ltsm_jax.methods import strategies
from ltsm_jax.methods.checks import Difference
from ltsm_jax.methods.decision import UNSHOWN, Verdict, decide, four_digits, signed
from ltsm_jax.methods.pruning import full_masks
from ltsm_jax.methods.verdict import calendar, compare, named, stamps
from ltsm_jax.training import TrainConfig

LENGTHS = (500, 460)  # of all panels here where others are not the point: each shape is compiled
QUICK = {
    "budget": 60,
    "config": TrainConfig(epochs=3, lr=1e-2, batch_size=64),
    "show_progress": False,
}


def between(low, high):
    return Difference((low + high) / 2, low, high, "blocks", 12, 1)


LESS, SAME, MORE = between(-0.3, -0.1), between(-0.1, 0.1), between(0.1, 0.3)
NONE = Difference(-0.5, np.nan, np.nan, "", 2, 1)


@pytest.mark.parametrize(
    ("gain", "over_naive", "zero", "deploy", "says"),
    [
        (LESS, LESS, SAME, "ff", "beats the checkpoint"),
        (LESS, LESS, MORE, "ff", "the seasonal naive forecast"),
        (LESS, SAME, MORE, "seasonal_naive", UNSHOWN),
        (LESS, SAME, SAME, "seasonal_naive", "which is simpler"),
        (LESS, MORE, MORE, "seasonal_naive", "beats the checkpoint"),
        (SAME, LESS, LESS, "zero_shot", UNSHOWN),
        (MORE, LESS, LESS, "zero_shot", "does worse"),
        (
            None,
            None,
            LESS,
            "zero_shot",
            "no tuned model did better than the checkpoint on validation",
        ),
        (None, None, MORE, "seasonal_naive", "beats the checkpoint"),
        (SAME, SAME, SAME, "zero_shot", UNSHOWN),
        (NONE, NONE, NONE, "zero_shot", UNSHOWN),
        (NONE, NONE, NONE, "zero_shot", "too few blocks"),
    ],
)
def test_the_rule(gain, over_naive, zero, deploy, says):
    found = {"tuned_vs_zero_shot": gain, "tuned_vs_naive": over_naive, "zero_shot_vs_naive": zero}
    differences = {key: x for key, x in found.items() if x is not None}
    val = {"zero_shot": 1.0, "ff": 0.9, "seasonal_naive": 1.1}
    name, reason = decide(val, "ff", "seasonal_naive", differences)
    assert name == deploy
    assert says in reason
    assert reason.startswith("Deploy ") and reason.endswith(".") and "\n" not in reason
    if (
        deploy == "seasonal_naive"
    ):  # it is worse than the checkpoint on validation, and that is said
        assert "on validation it did worse than the checkpoint (MSE 1.1000, not 1.0000)" in reason


def test_where_nothing_is_shown_validation_decides():
    val = {"zero_shot": 1.0, "mean": 0.9}
    name, reason = decide(val, None, "mean", {"zero_shot_vs_naive": SAME})
    assert name == "mean" and UNSHOWN in reason and "nothing was tuned" in reason


def panel_of(*items, freq="D", first=None):
    lengths = [len(item) for item in items]
    return Panel(
        name="shops",
        ids=np.array([f"shop {i}" for i in range(len(items))], object),
        columns=("sold",),
        values=np.concatenate(items)[None],
        bounds=np.concatenate([[0], np.cumsum(lengths)]),
        first=np.array(first or ["2024-01-01"] * len(items), "datetime64[us]"),
        freq=freq,
    )


def waves(period, *lengths, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    return [
        10.0**i * (np.sin(2 * np.pi * (np.arange(n) + 3 * i) / period) + noise * rng.normal(size=n))
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def found(model, pre):
    """A pattern of 16 days, which a week knows nothing of, in two items of sizes 1 and 10."""
    panel = panel_of(*waves(16, *LENGTHS), first=["2024-01-01", "2024-02-10"])
    return compare(model, pre, panel, 8, methods=["ff", "sff"], **QUICK)


def test_a_pattern_that_is_learned_is_deployed(found, model):
    verdict = found.verdict
    assert verdict.deploy in ("ff", "sff") and verdict.deploy == verdict.tuned
    assert found.model == model and found.params is found.results[verdict.deploy].params
    for key in ("tuned_vs_zero_shot", "tuned_vs_naive"):
        assert verdict.differences[key].high < 0
    names = [candidate.name for candidate in verdict.candidates]
    assert names[:6] == ["zero_shot", "ff", "sff", "last_value", "seasonal_naive", "mean"]

    best = verdict.candidate(verdict.deploy)
    gap = best.test["mse"] - verdict.candidate("zero_shot").test["mse"]
    assert verdict.differences["tuned_vs_zero_shot"].mean == pytest.approx(gap, rel=1e-6)
    # What validation did not choose was never scored on the test span.
    tested = {candidate.name for candidate in verdict.candidates if candidate.test}
    assert tested == {"zero_shot", verdict.naive, verdict.deploy}


def test_both_items_count_alike(found):
    verdict = found.verdict
    assert verdict.items == 2 and verdict.windows == {"train": 594, "val": 82, "test": 178}
    assert verdict.blocks == 12  # origins from 2025-02-04 to 2025-05-07, 93 days
    assert verdict.candidate("mean").val["mse"] == pytest.approx(1.0, abs=0.15)


def test_history_begins_before_training(found):
    verdict = found.verdict
    zero = verdict.candidate("zero_shot")
    full = verdict.candidate("ff")
    assert [entry["epoch"] for entry in full.history] == [0, 1, 2, 3]
    assert full.history[0]["val_mse"] == pytest.approx(zero.val["mse"], rel=1e-5)
    assert full.history[full.best_epoch]["val_mse"] == full.val["mse"]
    assert zero.history[0]["val_mse"] == zero.val["mse"]
    # Smoothed fine-tuning begins elsewhere.
    assert verdict.candidate("sff").history[0]["val_mse"] != zero.val["mse"]


def test_a_verdict_says_when_and_fits_the_terminal(found):
    verdict = found.verdict
    assert verdict.spans["train"][0].startswith("2024-01-01")
    assert verdict.spans["test"] == ("2025-02-04T00:00:00", "2025-05-14T00:00:00")
    text = str(verdict)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("Deploy the model tuned by")
    assert verdict.versions.keys() == {"ltsm-jax", "python", "jax", "numpy", "device"}
    example = verdict.examples[-1]
    assert example["item"] == "shop 1" and len(example["stamps"]) == len(example["context"]) + 8
    assert np.abs(example["target"]).max() > 5  # in units of the item


def test_a_verdict_survives_json(found):
    text = json.dumps(found.verdict.to_json(), allow_nan=False)
    stored = json.loads(text)
    assert {"deploy", "reason", "methods", "naive"} <= stored.keys()
    assert stored["methods"].keys() == {"zero_shot", "ff", "sff"}
    assert stored["naive"].keys() >= {"last_value", "seasonal_naive", "mean"}
    again = Verdict.from_json(stored)
    assert str(again) == str(found.verdict)
    assert again.to_json() == stored
    unsure = dataclasses.replace(found.verdict, differences={"zero_shot_vs_naive": NONE})
    back = Verdict.from_json(json.loads(json.dumps(unsure.to_json(), allow_nan=False)))
    assert np.isnan(back.differences["zero_shot_vs_naive"].low)
    with pytest.raises(ValueError, match="no verdict"):
        Verdict.from_json({"deploy": "ff"})


def test_where_the_seasonal_naive_forecast_wins_it_is_named(model, pre):
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=7)
    items = [np.tile(pattern, 80)[:n] + 0.01 * rng.normal(size=n) for n in LENGTHS]
    found = compare(model, pre, panel_of(*items), 8, methods="ff", **QUICK)
    assert found.verdict.deploy == "seasonal_naive"
    assert "Deploy the seasonal naive forecast" in found.verdict.reason
    assert found.verdict.differences["zero_shot_vs_naive"].low > 0


@pytest.mark.slow
def test_three_windows_show_nothing(model, pre):
    """One window each to validate and to test, and one to train on."""
    panel = panel_of(*waves(16, 26))
    found = compare(model, pre, panel, 8, methods="ff", budget=2, show_progress=False)
    verdict = found.verdict
    assert verdict.windows["val"] == verdict.windows["test"] == 1
    assert verdict.deploy not in ("ff", "sff")
    assert UNSHOWN in verdict.reason or "no tuned model did better" in verdict.reason
    assert any("1 block of time and 1 item:" in note for note in verdict.notes)
    with pytest.raises(DataError, match="horizon"):
        compare(model, pre, panel_of(*waves(16, 16)), 8, show_progress=False)


@pytest.mark.slow
def test_masks_stay_in_every_model(model, pre):
    masks = full_masks(model)
    masks["layer_0"]["up"]["out"] = np.zeros(24, np.float32)
    found = compare(
        model, pre, panel_of(*waves(16, *LENGTHS)), 8, methods="ff", masks=masks, **QUICK
    )
    assert found.verdict.deploy == "ff"
    assert not np.asarray(found.params["layer_0"]["up"]["kernel"]).any()


def test_auto_ets_meets_the_others_on_the_same_windows(model, pre, monkeypatch):
    """It is fitted on some windows only; the best naive forecast and the intervals are those of
    these windows.
    """
    pytest.importorskip("statsforecast")
    monkeypatch.setattr("ltsm_jax.methods.verdict.MOST_ETS", 12)
    trend = [np.arange(n) + 0.1 * np.random.default_rng(n).normal(size=n) for n in LENGTHS]
    found = compare(model, pre, panel_of(*trend), 8, methods=(), show_progress=False)
    verdict = found.verdict
    assert verdict.naive == verdict.deploy == "auto_ets"
    ets = verdict.candidate("auto_ets")
    assert ets.val["windows"] == ets.test["windows"] == 12
    assert "scored on 12 windows, spread evenly" in ets.notes
    assert verdict.differences["zero_shot_vs_naive"].low > 0
    assert set(verdict.examples[0]["forecasts"]) == {"zero_shot"}


def test_tiny_differences_are_not_printed_as_zero():
    assert signed(-2.6e-9) == "-2.6e-09" and four_digits(2.6e-9) == "2.600e-09"
    assert (signed(0.25), signed(-0.25), four_digits(0.0)) == ("+0.2500", "-0.2500", "0.0000")


def test_methods_by_name(model):
    assert list(named("auto", model)) == ["ff", "sff"]
    assert list(named("zero_shot, ff", model)) == ["ff"]
    assert list(named(["zero_shot", "last_value"], model)) == []
    two = [strategies.sff(0.5), strategies.sff(0.9)]
    assert list(named(two, model)) == ["sff-0.5", "sff-0.9"]
    assert [found.alpha for found in named("auto", model, 0.9).values()] == [None, 0.9]
    assert [found.alpha for found in named("sff,noise", model).values()] == [0.7, 0.7]
    assert list(named("auto", model, "auto")) == ["ff", "sff-0.5", "sff-0.7", "sff-0.9"]
    assert list(named("lora,sff", model, "auto")) == [
        "lora",
        "sff-0.5",
        "sff-0.7",
        "sff-0.9",
        "sff-1",
    ]
    with pytest.raises(ValueError, match="a number or 'auto'; got 'best'"):
        named("sff", model, "best")
    with pytest.raises(ValueError, match="alpha is for sff, noise, .* by name, and none of them"):
        named("ff", model, 0.9)
    with pytest.raises(ValueError, match="duplicate method ff"):
        named(["ff", "ff"], model)
    with pytest.raises(ValueError, match="did you mean sff"):
        named("sfff", model)


def test_items_meet_on_a_common_calendar():
    panel = panel_of(np.zeros(5), np.zeros(3), freq="M", first=["2024-01-31", "2024-03-31"])
    np.testing.assert_array_equal(calendar(panel), [0, 2])
    assert stamps(panel, 1, 1, 2) == ["2024-04-30T00:00:00", "2024-05-31T00:00:00"]
    bare = dataclasses.replace(panel, first=None, freq=None)
    np.testing.assert_array_equal(calendar(bare), [0, 2])  # all end together
    assert stamps(bare, 0, 0, 1) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "walk"])
def test_chance_is_not_taken_for_a_gain(kind, model, pre):
    """In 20 seeds at most one wrong "tune"."""
    wrong = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=600)
        values = np.cumsum(values) if kind == "walk" else values
        found = compare(model, pre, panel_of(values), 8, seed=seed, **QUICK)
        wrong += found.verdict.deploy in ("ff", "sff")
    assert wrong <= 1
