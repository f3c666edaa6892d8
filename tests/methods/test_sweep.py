"""Runs of strategies as lanes end as `run` ends them one by one."""

import functools

import chex
import jax
import numpy as np
import pytest

from ltsm_jax import training
from ltsm_jax.layers.masks import mask_shapes
from ltsm_jax.methods import sweep as module
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.run import run as run_strategy
from ltsm_jax.methods.strategies import Phase, Strategy, ff, lora, lpff, sff, zero_shot
from ltsm_jax.methods.sweep import sweep
from ltsm_jax.stacks import Over, TreeStack
from ltsm_jax.tasks.forecasting import evaluate, evaluate_lanes
from ltsm_jax.training import lanes

CONFIG = training.TrainConfig(epochs=2, batch_size=64, lr=1e-3)


@pytest.fixture
def mapped(monkeypatch):
    """Lanes one after the other in one program, chosen without timing; gives the numbers of lanes
    of each program.
    """
    programs, as_lanes = [], lanes._as_lanes

    def counted(jobs, members, *rest, **named):
        programs.append(len(members))
        return as_lanes(jobs, members, *rest, **named)

    monkeypatch.setattr(
        lanes, "plan_lanes", lambda *args, **kwargs: lanes.LanePlan("mapped", 99, "mapped")
    )
    monkeypatch.setattr(lanes, "_as_lanes", counted)
    return programs


def assert_same(found, wanted):
    chex.assert_trees_all_equal(found.params, wanted.params)
    assert found.history == wanted.history
    for name in ("val", "test", "epochs", "best_epoch", "trained", "warnings"):
        assert getattr(found, name) == getattr(wanted, name)


@pytest.mark.slow
def test_a_sweep_gives_what_runs_one_by_one_give_phase_by_phase(
    model, pre, splits, mapped, tmp_path
):
    strategies = [zero_shot(), sff(0.5), lpff()]
    settings = {"config": CONFIG, "show_progress": False}
    found = sweep(model, pre, strategies, splits, seeds=(0, 1), folder=tmp_path, **settings)
    assert mapped == [2, 2, 2], "sff, the head of lpff, all of lpff"
    wanted = [
        run_strategy(model, pre, s, splits, seed=seed, **settings)
        for s in strategies
        for seed in (0, 1)
    ]
    for a, b in zip(found, wanted, strict=True):
        assert_same(a, b)
    # and from the folder
    again = sweep(
        model, pre, strategies[1:], splits, seeds=(0, 1), folder=tmp_path, test=False, **settings
    )
    assert mapped == [2, 2, 2] and again[0].val == found[2].val and again[0].test is None
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == [
        "lanes",
        "lpff",
        "lpff",
        "sff",
        "sff",
    ]


@pytest.mark.slow
def test_learning_rates_are_lanes_and_one_that_diverges_is_returned(model, pre, splits, mapped):
    strategies = [ff(), Strategy("wild", phases=(Phase(lr=1e30),))]
    found = sweep(
        model,
        pre,
        strategies,
        splits,
        lrs=(1e-3, 1e-2),
        config=CONFIG,
        test=False,
        show_progress=False,
    )
    assert mapped == [4]
    assert [type(each).__name__ for each in found] == [
        "RunResult",
        "RunResult",
        "NonFiniteError",
        "NonFiniteError",
    ]
    assert [each.history[0]["lr"] for each in found[:2]] == [1e-3, 1e-2]
    assert found[0].val != found[1].val


@pytest.mark.slow
def test_adapters_and_masks_are_lanes_of_their_own(model, pre, splits, mapped):
    ones = jax.tree.map(
        lambda x: np.ones(x.shape, bool), mask_shapes(model.init, jax.random.key(0))
    )

    def masks(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: rng.random(x.shape) < 0.8, ones)

    asked = []
    for seed in (0, 1):
        asked.append({"strategy": lora(2), "seed": seed})
        asked.append({"strategy": ff(), "seed": seed, "masks": masks(seed)})
    makers = []
    for kwargs in asked:
        more = {"config": CONFIG, "show_progress": False} | kwargs
        makers.append(functools.partial(Running, model, pre, more.pop("strategy"), splits, **more))
    found = module.train(makers, pre, finish=lambda running: running.result(test=False))
    assert mapped == [2, 2]
    for result, kwargs in zip(found, asked, strict=True):
        more = {"config": CONFIG, "show_progress": False, "test": False} | kwargs
        assert_same(result, run_strategy(model, pre, more.pop("strategy"), splits, **more))


def test_what_is_no_lane_is_left_to_the_caller_on_request(model, pre, splits):
    made = []

    def make():
        made.append(Running(model, pre, ff(), splits, config=CONFIG, show_progress=False))
        return made[-1]

    found = module.train([make, make], pre, lanes="off", others=False)
    assert found == [None, None] and made[0].phase == 0


def test_lanes_are_scored_in_one_program_as_each_alone(model, pre, splits):
    both = [pre, model.init(jax.random.key(3))]
    both[1] = dict(both[1], head=pre["head"])  # held once
    stack = TreeStack.of(both)
    assert len(stack.shared) == len(jax.tree.leaves(pre["head"]))
    wanted = [evaluate(model, params, splits.val) for params in both]
    assert evaluate_lanes(model, stack, splits.val, Over("mapped")) == wanted
    for mine, other in zip(
        evaluate_lanes(model, stack, splits.val, Over("batched")), wanted, strict=True
    ):
        assert mine == pytest.approx(other, rel=1e-5)


def test_names_of_folders_tell_runs_apart():
    names = {
        module._name(s, lr, seed)
        for s in (sff(0.5), sff(0.7))
        for lr in (None, 1e-3)
        for seed in (0, 1)
    }
    assert len(names) == 8
