"""From a table with gaps to a pruned, tuned model in the original's file, as a user writes it."""

import jax
import numpy as np
import pandas as pd
import pytest

import converters
import ltsm_jax
from ltsm_jax import trees
from ltsm_jax.methods import pruning
from ltsm_jax.models.timer import Timer, TimerConfig


@pytest.fixture(scope="module")
def sales(tmp_path_factory):
    """1200 hours of two shops; one was closed for three days, and some hours are missing in the
    other.
    """
    t, rng = np.arange(1200), np.random.default_rng(0)
    shops = {
        "north": 20 + 5 * np.sin(2 * np.pi * t / 24) + rng.normal(size=t.size),
        "south": 300 + 90 * np.cos(2 * np.pi * t / 24) + 9 * rng.normal(size=t.size),
    }
    shops["north"][500:572] = np.nan
    shops["south"][rng.choice(1200, 40, replace=False)] = np.nan
    stamps = pd.date_range("2024-01-01", periods=t.size, freq="h")
    path = tmp_path_factory.mktemp("user") / "sales.csv"
    pd.DataFrame({"hour": stamps} | shops).to_csv(path, index=False)
    return path


def test_prune_fit_forecast_save_load_export(sales, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    # As "timer-tiny", which the README's lines go through, in a quarter of the time that its layers
    # take to compile.
    little = Timer(TimerConfig.of(48, 16, 24, 1, 2, context_len=192, horizon=48))
    ltsm_jax.save("little", little, little.init(jax.random.key(0)))
    few = {"few_shot": 0.02, "show_progress": False}
    one = ltsm_jax.TrainConfig(epochs=1, batch_size=4)

    model, params = ltsm_jax.load("little")
    pruning_config = ltsm_jax.PruneConfig(ratio=0.3, ema=0.5, epochs=1, batch_size=4)
    found = ltsm_jax.prune(model, params, sales, pruning_config, horizon=48, missing="keep", **few)
    fitted = ltsm_jax.fit(
        found, sales, missing="keep", method="ff", config=one, keep="tuned", **few
    )
    future = ltsm_jax.forecast(fitted.model, fitted.params, sales, 48, missing="keep")
    ltsm_jax.save("tuned", fitted.model, fitted.params)
    again = ltsm_jax.load("tuned")
    converters.export_checkpoint("tuned", "tuned.ckpt")

    print(fitted)
    assert "validation MSE" in capsys.readouterr().out
    assert fitted.splits.val.horizon == found.splits.val.horizon == 48
    assert any("windows left out" in note for note in fitted.splits.notes) or not np.isnan(
        fitted.tuned["mse"]
    )

    # What was pruned stayed 0 through training, and something was trained.
    merged = pruning.apply_masks(fitted.params, found.masks)
    for (path, got), want in zip(
        trees.flatten(fitted.params).items(), trees.flatten(merged).values(), strict=True
    ):
        np.testing.assert_array_equal(got, want, err_msg=path)
    assert 0 < pruning.share_left(found.masks) < 1
    assert (
        np.asarray(fitted.params["head"]["kernel"]) != np.asarray(params["head"]["kernel"])
    ).any()

    # One row per hour after the last, in the units of each shop.
    assert list(future.columns[1:]) == ["north", "south"] and len(future) == 48
    assert future.iloc[0, 0] == pd.Timestamp("2024-02-20") and np.isfinite(
        future[["north", "south"]]
    ).all(axis=None)
    assert future["north"].between(0, 40).all() and future["south"].between(100, 500).all()

    loaded = ltsm_jax.forecast(*again, sales, 48, missing="keep")
    pd.testing.assert_frame_equal(loaded, future)
    back, weights, *_ = converters.import_checkpoint("tuned.ckpt")
    pd.testing.assert_frame_equal(
        ltsm_jax.forecast(back, weights, sales, 48, missing="keep"), future
    )


@pytest.mark.slow
def test_after_remove_the_zeros_stay_zero(model, pre, series):
    quiet = {"few_shot": 0.2, "show_progress": False}
    found = ltsm_jax.prune(
        model, pre, series, ltsm_jax.PruneConfig(ratio=0.5, ema=0.5, epochs=1), **quiet
    )
    small, weights, masks = ltsm_jax.remove(found.model, found.params, found.masks)
    assert pruning.share_left(masks) < 1, "channels of the residual stream stay, as zeros"

    tuning = {
        "method": "ff",
        "config": ltsm_jax.TrainConfig(epochs=1, batch_size=16, lr=1e-2),
        "keep": "tuned",
    }
    with pytest.raises(ValueError, match=r"masks=masks\), or masks=\{\}"):
        ltsm_jax.fit(small, weights, series, **tuning, **quiet)
    fitted = ltsm_jax.fit(small, weights, series, masks=masks, **tuning, **quiet)
    merged = trees.flatten(pruning.apply_masks(fitted.params, masks))
    for path, got in trees.flatten(fitted.params).items():
        np.testing.assert_array_equal(got, merged[path], err_msg=path)
    revived = trees.flatten(
        ltsm_jax.fit(small, weights, series, masks={}, **tuning, **quiet).params
    )
    dead = trees.flatten(pruning.apply_masks(trees.unflatten(revived), masks))
    assert any((np.asarray(x) != np.asarray(dead[path])).any() for path, x in revived.items())
