import json

import jax
import numpy as np
import pytest

from ltsm_jax import training, trees
from ltsm_jax.data import prepare
from ltsm_jax.methods.run import run as run_strategy
from ltsm_jax.methods.strategies import Phase, Strategy, strategy
from ltsm_jax.tasks import forecasting
from ltsm_jax.tasks.forecasting import MODES, Forecasting, training_windows

CONFIG = training.TrainConfig(epochs=2, batch_size=64, lr=1e-3)


@pytest.fixture(scope="module")
def run(model, pre, splits):
    """A quiet run of a strategy by name; the results are kept, since tests compare them with each
    other.
    """
    kept = {}

    def run(name, **kwargs):
        key = (name, *sorted(kwargs.items()))
        if key not in kept:
            chosen = strategy(name, **{k: v for k, v in kwargs.items() if k in ("alpha", "l2_sp")})
            rest = {k: v for k, v in kwargs.items() if k not in ("alpha", "l2_sp", "mode")}
            task = Forecasting(kwargs.get("mode", "ims"))
            kept[key] = run_strategy(
                model, pre, chosen, splits, task=task, config=CONFIG, show_progress=False, **rest
            )
        return kept[key]

    return run


def assert_same_run(a, b):
    for (path, x), y in zip(
        trees.flatten(a.params).items(), trees.flatten(b.params).values(), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=path)
    assert a.history == b.history
    assert (a.val, a.test, a.best_epoch) == (b.val, b.test, b.best_epoch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha, end", [(1.0, "ff"), (0.0, "tfs")])
def test_smoothing_ends_in_its_two_rivals_bit_for_bit(run, alpha, end, mode):
    assert_same_run(run("sff", alpha=alpha, mode=mode), run(end, mode=mode))


def test_between_the_ends_it_is_another_run(run):
    between, ff, tfs = run("sff", alpha=0.7), run("ff"), run("tfs")
    assert len({r.val["mse"] for r in (between, ff, tfs)}) == 3


def test_runs_depend_on_the_seed_and_on_nothing_else(run, model, pre, splits):
    again = run_strategy(model, pre, strategy("ff"), splits, config=CONFIG, show_progress=False)
    assert_same_run(run("ff"), again)
    assert run("ff", seed=1).history != run("ff").history


def test_linear_probing_trains_exactly_the_head(run, pre):
    result = run("lp")
    changed = {
        p
        for (p, x), y in zip(
            trees.flatten(result.params).items(), trees.flatten(pre).values(), strict=True
        )
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
    second = run_strategy(
        model, lp.params, strategy("ff"), splits, config=CONFIG, show_progress=False
    )
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
    result = run_strategy(model, pre, short, splits, config=CONFIG, show_progress=False)
    assert [(h["phase"], h["lr"]) for h in result.history] == [(0, 1e-2), (1, 1e-3), (1, 1e-3)]


@pytest.mark.slow
def test_killed_between_phases_it_goes_on_to_the_same_end(
    run, model, pre, splits, tmp_path, monkeypatch
):
    undisturbed, real = run("lpff"), training.fit

    def dies_in_the_second(*args, **kwargs):
        if kwargs["folder"].name == "phase-1":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    arguments = dict(config=CONFIG, show_progress=False, folder=tmp_path)
    monkeypatch.setattr(training, "fit", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_strategy(model, pre, strategy("lpff"), splits, **arguments)
    monkeypatch.undo()
    assert_same_run(run_strategy(model, pre, strategy("lpff"), splits, **arguments), undisturbed)


@pytest.mark.parametrize("horizon", [pytest.param(4, marks=pytest.mark.slow), 8, 20])
def test_next_token_training_has_targets_of_a_patch_at_any_horizon(model, pre, series, horizon):
    splits = prepare(series, 32, horizon, few_shot=0.5)
    windows = training_windows(model, splits, "ims")
    assert windows.horizon == 8
    assert windows.n == 3 * (210 - 32 - 8 + 1) // 2
    assert int(windows.starts.max()) + 32 + 8 <= 210  # inside the training rows
    result = run_strategy(
        model,
        pre,
        strategy("ff"),
        splits,
        config=training.TrainConfig(epochs=1),
        show_progress=False,
    )
    assert result.test["windows"] == splits.test.n


def test_direct_training_refuses_a_horizon_it_cannot_reach(model, pre, series):
    with pytest.raises(ValueError, match="one patch"):
        run_strategy(
            model,
            pre,
            strategy("ff"),
            prepare(series, 32, 20),
            config=CONFIG,
            task=Forecasting("direct"),
            show_progress=False,
        )


def test_history_is_json(run):
    assert json.loads(json.dumps(run("lpff").history)) == run("lpff").history
