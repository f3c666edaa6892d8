import json

import jax
import numpy as np
import pytest

import ltsm_jax
from ltsm_jax import training, trees
from ltsm_jax.data import prepare
from ltsm_jax.methods import finetune
from ltsm_jax.methods.strategies import Phase, Strategy, strategy
from ltsm_jax.models.units import Units
from ltsm_jax.tasks import forecasting

CONFIG = training.TrainConfig(epochs=2, batch_size=64, lr=1e-3)


@pytest.fixture(scope="module")
def run(model, pre, splits):
    """A quiet run of a strategy by name; the results are kept, since tests compare them with each other."""
    kept = {}

    def run(name, **kwargs):
        key = (name, *sorted(kwargs.items()))
        if key not in kept:
            chosen = strategy(name, **{k: v for k, v in kwargs.items() if k in ("alpha", "l2_sp")})
            rest = {k: v for k, v in kwargs.items() if k not in ("alpha", "l2_sp")}
            kept[key] = finetune.run(model, pre, chosen, splits, config=CONFIG, show_progress=False, **rest)
        return kept[key]

    return run


def assert_same_run(a, b):
    for (path, x), y in zip(trees.flatten(a.params).items(), trees.flatten(b.params).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)
    assert a.history == b.history
    assert (a.val, a.test, a.best_epoch) == (b.val, b.test, b.best_epoch)


@pytest.mark.parametrize("mode", finetune.MODES)
@pytest.mark.parametrize("alpha, end", [(1.0, "ff"), (0.0, "tfs")])
def test_smoothing_ends_in_its_two_rivals_bit_for_bit(run, alpha, end, mode):
    assert_same_run(run("sff", alpha=alpha, mode=mode), run(end, mode=mode))


def test_between_the_ends_it_is_another_run(run):
    between, ff, tfs = run("sff", alpha=0.7), run("ff"), run("tfs")
    assert len({r.val["mse"] for r in (between, ff, tfs)}) == 3


def test_runs_depend_on_the_seed_and_on_nothing_else(run, model, pre, splits):
    again = finetune.run(model, pre, strategy("ff"), splits, config=CONFIG, show_progress=False)
    assert_same_run(run("ff"), again)
    assert run("ff", seed=1).history != run("ff").history


def test_linear_probing_trains_exactly_the_head(run, pre):
    result = run("lp")
    changed = {
        p
        for (p, x), y in zip(trees.flatten(result.params).items(), trees.flatten(pre).values(), strict=True)
        if (x != y).any()
    }
    assert changed == {"head/kernel", "head/bias"}
    assert result.trained == 16 * 8 + 8


def test_first_phase_of_lpff_is_lp_and_the_second_starts_from_its_best(run, model, pre, splits):
    lp, lpff = run("lp"), run("lpff")
    assert [h["phase"] for h in lpff.history] == [0, 0, 1, 1]
    assert [h["epoch"] for h in lpff.history] == [1, 2, 3, 4]
    assert lpff.history[:2] == lp.history
    assert lpff.epochs == 4 and lpff.best_epoch in (3, 4)
    # phase 2 on its own: fresh optimiser, same learning rate, same batches
    second = finetune.run(model, lp.params, strategy("ff"), splits, config=CONFIG, show_progress=False)
    for x, y in zip(jax.tree.leaves(second.params), jax.tree.leaves(lpff.params), strict=True):
        np.testing.assert_array_equal(x, y)
    assert [h["lr"] for h in lpff.history[2:]] == [h["lr"] for h in lpff.history[:2]]


def test_pull_to_the_start_grows_with_its_weight(run, pre):
    def distance(params):
        return sum(
            float(np.sum((np.asarray(a) - np.asarray(b)) ** 2))
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(pre))
        )

    free, weak, strong = (
        distance(run(*a, **k).params)
        for a, k in ((("ff",), {}), (("l2sp",), {"l2_sp": 1.0}), (("l2sp",), {"l2_sp": 100.0}))
    )
    assert strong < weak < free


def test_zero_shot_is_the_checkpoint(run, model, pre, splits):
    result = run("zero_shot")
    assert result.params is pre
    assert result.val == forecasting.evaluate(model, pre, splits.val)
    assert result.test == forecasting.evaluate(model, pre, splits.test)
    assert (result.epochs, result.best_epoch, result.trained, result.history) == (0, 0, 0, [])


def test_best_validation_weights_are_the_ones_scored(run):
    result = run("ff")
    losses = [h["val_mse"] for h in result.history]
    assert result.val["mse"] == min(losses) == losses[result.best_epoch - 1]


def test_phases_can_have_their_own_length_and_rate(model, pre, splits):
    short = Strategy("mine", phases=(Phase("head", epochs=1, lr=1e-2), Phase()))
    result = finetune.run(model, pre, short, splits, config=CONFIG, show_progress=False)
    assert [(h["phase"], h["lr"]) for h in result.history] == [(0, 1e-2), (1, 1e-3), (1, 1e-3)]


@pytest.mark.slow
def test_killed_between_phases_it_goes_on_to_the_same_end(run, model, pre, splits, tmp_path, monkeypatch):
    undisturbed, real = run("lpff"), training.fit

    def dies_in_the_second(*args, **kwargs):
        if kwargs["folder"].name == "phase-1":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    arguments = dict(config=CONFIG, show_progress=False, folder=tmp_path)
    monkeypatch.setattr(training, "fit", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(model, pre, strategy("lpff"), splits, **arguments)
    monkeypatch.undo()
    assert_same_run(finetune.run(model, pre, strategy("lpff"), splits, **arguments), undisturbed)


@pytest.mark.parametrize("horizon", [4, 8, 20])
def test_next_token_training_has_targets_of_a_patch_at_any_horizon(model, pre, series, horizon):
    splits = prepare(series, 32, horizon, few_shot=0.5)
    windows = finetune.training_windows(model, splits, "ims")
    assert windows.horizon == 8
    assert windows.n == 3 * (210 - 32 - 8 + 1) // 2
    assert int(windows.starts.max()) + 32 + 8 <= 210  # inside the training rows
    result = finetune.run(
        model, pre, strategy("ff"), splits, config=training.TrainConfig(epochs=1), show_progress=False
    )
    assert result.test["windows"] == splits.test.n


def test_direct_training_refuses_a_horizon_it_cannot_reach(model, pre, series):
    with pytest.raises(ValueError, match="one patch"):
        finetune.run(
            model, pre, strategy("ff"), prepare(series, 32, 20), config=CONFIG, mode="direct", show_progress=False
        )


def test_what_a_checkpoint_lacks_lies_beside_what_it_has(series):
    model = Units(Units.small())
    loaded = jax.device_put(jax.jit(model.init)(jax.random.key(0)), jax.devices()[0])
    ready, params = finetune.ready_for(model, loaded, series)
    assert ready != model and len(jax.tree.leaves(params)) > len(jax.tree.leaves(loaded)), "there are new tokens"
    assert all(leaf.committed for leaf in jax.tree.leaves(params))


def test_flat_forecasts_are_named(model, pre, splits):
    flat = jax.tree.map(np.array, pre)
    flat["head"] = jax.tree.map(np.zeros_like, flat["head"])
    assert "collapsed" in finetune.collapse(model, flat, splits.val)[0]
    assert finetune.collapse(model, pre, splits.val) == ()


# ---------------------------------------------------------------------------------------------------------------------
# ltsm_jax.fit


def test_fit_keeps_what_validation_prefers(model, pre, series, splits):
    quiet = dict(config=training.TrainConfig(epochs=3, batch_size=64, lr=3e-3), horizon=8, show_progress=False)
    fitted = finetune.fit(model, pre, series, method="ff", **quiet)
    assert fitted.kept == "tuned" and fitted.params is fitted.result.params
    assert fitted.difference == pytest.approx(fitted.tuned["mse"] - fitted.zero_shot["mse"])
    assert fitted.interval[0] < fitted.difference < fitted.interval[1] < 0
    assert fitted.result.test is None
    assert "kept the tuned weights" in str(fitted)

    better = fitted.params
    worse = finetune.fit(
        model, better, splits, method="tfs", **(quiet | {"config": training.TrainConfig(epochs=1, lr=1e-6)})
    )
    assert worse.kept == "zero_shot" and worse.params is better
    assert worse.difference > 0 and "tuning lost" in str(worse)
    anyway = finetune.fit(
        model,
        better,
        splits,
        method="tfs",
        keep="tuned",
        **(quiet | {"config": training.TrainConfig(epochs=1, lr=1e-6)}),
    )
    assert anyway.params is anyway.result.params and anyway.kept == "tuned"


def test_fit_reads_tables_and_files(model, pre, series, tmp_path):
    import pandas as pd

    table = pd.DataFrame(series.values.T, columns=list(series.columns)).assign(date=series.timestamps)
    table.to_csv(tmp_path / "waves.csv", index=False)
    quiet = dict(
        method="sff", alpha=0.9, target="b", config=training.TrainConfig(epochs=1, batch_size=64), show_progress=False
    )
    from_table = finetune.fit(model, pre, table, **quiet)
    from_file = finetune.fit(model, pre, tmp_path / "waves.csv", **quiet)
    assert from_table.splits.columns == from_file.splits.columns == ("b",)
    assert from_table.tuned == from_file.tuned
    assert from_file.splits.val.horizon == model.horizon


def test_fit_is_public():
    assert ltsm_jax.fit is finetune.fit


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"method": "ssf"}, "unknown method"),
        ({"keep": "both"}, "keep must be"),
        ({"mode": "own"}, "mode must be one of ims, direct"),
    ],
)
def test_fit_refuses_what_it_does_not_know(model, pre, splits, kwargs, message):
    with pytest.raises(ValueError, match=message):
        finetune.fit(model, pre, splits, **kwargs)


def test_paired_interval_is_of_blocks_not_of_windows(splits, model, pre):
    before = forecasting.errors(model, pre, splits.val)
    shifted = forecasting.Errors(
        before.squared + 8.0, before.absolute, before.percentage, before.zeros, before.variates, 8
    )
    mean, (low, high) = finetune.paired_difference(before, shifted, splits.val)
    assert mean == pytest.approx(1.0) and high - low == pytest.approx(0.0, abs=1e-9)
    # the same gap over all windows of a block, of alternating sign: as many draws as blocks
    block = (np.asarray(splits.val.starts) - int(splits.val.starts.min())) // 8
    swing = forecasting.Errors(
        before.squared + 8.0 * (-1.0) ** block[:, None],
        before.absolute,
        before.percentage,
        before.zeros,
        before.variates,
        8,
    )
    _, (low, high) = finetune.paired_difference(before, swing, splits.val)
    n = block.max() + 1
    assert (high - low) / 2 == pytest.approx(1.96 * np.std([(-1.0) ** i for i in range(n)], ddof=1) / n**0.5, rel=1e-6)


def test_history_is_json(run):
    assert json.loads(json.dumps(run("lpff").history)) == run("lpff").history
