"""What a TrainConfig takes, what it refuses by name, and how a recipe fills it."""

import dataclasses
import json
import math

import numpy as np
import pytest
import small_problem as problem

from ltsm_jax import training
from ltsm_jax.models import FAMILIES
from ltsm_jax.training import TrainConfig, step

RECIPE = {
    "epochs": 7,
    "batch_size": 32,
    "lr": 1e-4,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "clip": 2.0,
}


@pytest.mark.parametrize("value", [1.5, 2.0, True, np.True_, "3", 0, -1, math.nan, math.inf, [1]])
@pytest.mark.parametrize(
    "name",
    ["epochs", "batch_size", "patience", "keep_checkpoints", "accumulate", "steps_per_dispatch"],
)
def test_counts_are_whole_numbers_from_one_on(name, value):
    with pytest.raises(
        ValueError, match=rf"TrainConfig: {name} must be a whole number .*, got "
    ) as caught:
        TrainConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [True, "1e-3", math.nan, -1.0, 1j, None, [1.0]])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip", "warmup", "checkpoint_seconds"])
def test_amounts_are_real_numbers_in_range(name, value):
    if value is None and name in ("lr", "weight_decay", "clip"):
        assert name in TrainConfig(**{name: value}).unfilled
        return
    with pytest.raises(ValueError, match=rf"TrainConfig: {name} must be "):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0}, {"clip": 0.0}, {"lr": math.inf}, {"weight_decay": math.inf}, {"warmup": 1}],
)
def test_a_zero_never_means_the_default_and_infinity_only_no_limit(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        TrainConfig(**changes)
    assert TrainConfig(clip=math.inf).clip == math.inf
    assert TrainConfig(weight_decay=0).weight_decay == 0.0


@pytest.mark.parametrize("seed", [True, -1, 2**32, 0.0, "0"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed must be a whole number in"):
        TrainConfig(seed=seed)


def test_all_that_is_wrong_is_said_at_once_and_shortly():
    with pytest.raises(
        ValueError, match=r"epochs must be .*; lr must be .*; schedule must be one of halving"
    ) as caught:
        TrainConfig(epochs=0, lr=float("nan"), schedule="x" * 10_000)
    assert len(str(caught.value)) < 600


def test_numbers_of_numpy_become_those_of_python():
    config = TrainConfig(
        epochs=np.int64(3),
        lr=np.float32(0.5),
        seed=np.uint32(7),
        clip=np.float64(1),
        accumulate=np.int8(2),
    )
    assert config == TrainConfig(epochs=3, lr=0.5, seed=7, clip=1.0, accumulate=2)
    json.dumps(dataclasses.asdict(config))


def test_an_override_changes_what_it_names_and_the_recipe_says_the_rest():
    config = TrainConfig(epochs=1).filled(RECIPE, seed=3)
    assert config == TrainConfig(**(RECIPE | {"epochs": 1}), seed=3)
    assert config.unfilled == ()
    model = FAMILIES["timer"](FAMILIES["timer"].small())
    recipe, filled = model.recipe(), TrainConfig(epochs=1).filled(model.recipe(), seed=0)
    assert (filled.batch_size, filled.lr, filled.schedule) == (
        recipe.batch_size,
        recipe.lr,
        recipe.schedule,
    )
    assert filled.epochs == 1 != recipe.epochs
    assert (
        TrainConfig(batch_size=5).filled(RECIPE).filled(RECIPE | {"epochs": 9}).epochs == 7
    )  # filled once


def test_a_recipe_without_a_limit_fills_it_and_a_config_can_lift_that_of_a_recipe():
    unlimited = TrainConfig().filled(RECIPE | {"clip": None}, seed=0)
    assert unlimited.clip == math.inf and unlimited.unfilled == ()
    assert TrainConfig(clip=math.inf).filled(RECIPE).clip == math.inf
    assert TrainConfig().filled(RECIPE).clip == 2.0
    assert (
        json.loads(json.dumps(unlimited.record()))["clip"] is None
    )  # as folders have always had it
    assert len(training.adam(clip=math.inf).init({"a": np.ones(1)})) == len(
        training.adam().init({"a": np.ones(1)})
    )


def test_recipes_are_checked_like_configs():
    with pytest.raises(ValueError, match="not learning_rate"):
        TrainConfig().filled({"learning_rate": 1e-3})
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        TrainConfig().filled({"batch_size": 0})


def test_two_seeds_are_refused():
    assert (
        TrainConfig(seed=4).filled(RECIPE, seed=4).seed
        == TrainConfig(seed=4).filled(RECIPE).seed
        == 4
    )
    with pytest.raises(ValueError, match="seed=0 is asked for, and the config says seed=4"):
        TrainConfig(seed=4).filled(RECIPE, seed=0)


def test_what_nobody_has_said_is_named_and_the_advice_works():
    config = TrainConfig(epochs=1, batch_size=48)
    with pytest.raises(
        ValueError, match="does not say lr, schedule, weight_decay, clip, seed: give them"
    ) as caught:
        problem.fit(config=config)
    assert "config.filled(model.recipe(), seed=0)" in str(caught.value)
    model = FAMILIES["timer"](FAMILIES["timer"].small())
    assert problem.fit(config=config.filled(model.recipe(), seed=0)).steps == 7
    with pytest.raises(ValueError, match="must say batch_size, weight_decay, clip"):
        step.trace_step(problem.loss, problem.init(), problem.train_windows(), config=TrainConfig())


@pytest.mark.parametrize(
    "betas", [(0.9,), (0.9, 1.0), (0.9, -0.1), "0.9", 0.9, None, (0.9, 0.99, 0.999)]
)
def test_betas_are_two_shares(betas):
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\)"):
        TrainConfig(betas=betas)


def test_the_optimizer_is_checked_and_recorded_only_where_it_is_not_that_of_before():
    with pytest.raises(
        ValueError,
        match="optimizer must be one of adamw, adam, sgd, got 'lion'; eps must be a positive",
    ):
        TrainConfig(optimizer="lion", eps=0)
    plain = TrainConfig().filled(RECIPE, seed=0).record()
    assert not {"optimizer", "betas", "eps"} & set(plain)  # folders of before go on
    other = TrainConfig(optimizer="sgd", betas=[0, 0.5], eps=1e-3).filled(RECIPE, seed=0).record()
    assert other == plain | {"optimizer": "sgd", "betas": (0.0, 0.5), "eps": 1e-3}
