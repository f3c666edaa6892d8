"""Choices of alpha: what is tried, what wins, and that curvature and gradients are those of the
formulas.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import ltsm_jax
from ltsm_jax import training
from ltsm_jax.landscape import split_loss
from ltsm_jax.methods import alpha as choices
from ltsm_jax.methods.alpha import by_curvature, choose_alpha, describe, learn
from ltsm_jax.methods.run import run
from ltsm_jax.methods.starts import groups_of, start_params
from ltsm_jax.methods.strategies import sff, strategy
from ltsm_jax.tasks.forecasting import Forecasting, evaluate
from ltsm_jax.training import NonFiniteError, TrainConfig

QUICK = TrainConfig(epochs=1, batch_size=64)


@pytest.fixture(scope="module")
def good(model, pre, splits):
    """A model that knows the data, so that mixing costs something."""
    config = TrainConfig(epochs=2, batch_size=64, lr=3e-3)
    return run(
        model, pre, strategy("ff"), splits, config=config, test=False, show_progress=False
    ).params


@pytest.fixture(scope="module")
def auto(model, good, splits):
    return ltsm_jax.fit(
        model, good, splits, method="sff", alpha="auto", config=QUICK, show_progress=False
    )


def test_auto_trains_the_grid_at_equal_budget_and_keeps_the_best_by_validation(
    auto, model, good, splits
):
    trials = auto.choice.trials
    assert [trial.strategy.alpha for trial in trials] == [0.5, 0.7, 0.9, 1.0]
    assert {trial.epochs for trial in trials} == {1}
    best = min(trials, key=lambda trial: trial.score)
    assert auto.choice.strategy == auto.result.strategy == best.strategy
    assert auto.result.val["mse"] == best.score == pytest.approx(auto.tuned["mse"])
    assert auto.result.test is None


@pytest.mark.slow
def test_auto_at_one_is_full_fine_tuning(auto, model, good, splits):
    full = ltsm_jax.fit(model, good, splits, method="ff", config=QUICK, show_progress=False)
    assert auto.choice.trials[-1].score == full.tuned["mse"]
    assert full.choice is None


def test_auto_says_what_it_picked(auto):
    text = str(auto)
    for trial in auto.choice.trials:
        assert f"{trial.strategy.alpha:g}: {trial.score:.4f}" in text
    assert f"alpha {auto.choice.strategy.alpha:g}, picked by validation MSE" in text
    table = str(auto.choice).splitlines()
    assert len(table) == 5 and sum(line.startswith("> ") for line in table) == 1
    # Numbers stand below each other, however long the names are.
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "ff", "alpha": "auto"}, "no alpha to choose for 'ff'; it is for sff, noise"),
        ({"method": "sff", "alpha": "best"}, "a number or 'auto'; got 'best'"),
        ({"method": sff(0.5), "alpha": "auto"}, "a Strategy has its own"),
    ],
)
def test_wrong_automatic_alphas_are_refused(model, pre, splits, options, message):
    with pytest.raises(ValueError, match=message):
        ltsm_jax.fit(model, pre, splits, **options)


def test_without_epochs_the_start_decides(model, good, splits):
    found = choose_alpha(model, good, splits, epochs=0, grid=(0.5, 1.0))
    for trial in found.trials:
        begin = start_params(trial.strategy, model, good, training.keys(0)["aux"])
        assert trial.score == trial.start == evaluate(model, begin, splits.val)["mse"]
    assert found.strategy.alpha == 1.0 and found.result is None


def test_groups_take_their_best_alpha_one_after_the_other(model, good, splits, monkeypatch):
    # The score says which alphas are right, whatever the model: the search has to find them.
    right = {"head": 1.0, "norms": 0.5, "embedding": 0.7, "biases": 0.9, "body": 1.0}

    def score(self, candidate):
        return sum((alpha - right[group]) ** 2 for group, alpha in candidate.start.alphas)

    monkeypatch.setattr(choices._Scorer, "at_start", score)
    found = choose_alpha(model, good, splits, by="groups", epochs=0)
    assert dict(found.strategy.start.alphas) == right
    assert len(found.trials) == 1 + 5 * 3  # 0.7 is in the grid: each group tries three others


def test_a_training_that_fails_loses(model, good, splits, monkeypatch):
    def train(self, candidate):
        if candidate.alpha == 0.5:
            raise NonFiniteError("step 3: the loss is nan\nmore")
        raise NonFiniteError("step 9: the loss is inf")

    monkeypatch.setattr(choices._Scorer, "train", train)
    with pytest.raises(
        NonFiniteError, match="at every alpha that was tried: step 3: the loss is nan"
    ):
        choose_alpha(model, good, splits, grid=(0.5, 1.0))


def test_sharpness_is_the_mean_diagonal_of_the_hessian_in_each_place():
    # loss = sum of c_i w_i^2 / 2 has the diagonal c; random signs give the trace of a diagonal
    # exactly.
    params = {
        "a": jnp.ones(3),
        "b": {"x": jnp.ones(2), "y": jnp.ones((1, 2))},
        "still": jnp.ones(4),
    }
    curves = {
        "a": jnp.array([1.0, 2, 3]),
        "b": {"x": jnp.array([4.0, 5]), "y": jnp.array([[6.0, 7]])},
        "still": jnp.full(4, 100.0),
    }

    def loss(tree):
        return sum(
            jnp.sum(c * w**2) / 2
            for c, w in zip(jax.tree.leaves(curves), jax.tree.leaves(tree), strict=True)
        )

    places = {"a": "first", "b/x": "second", "b/y": "second"}
    found = choices._sharpness_by_place(
        jax.tree_util.Partial(loss), params, places, jax.random.key(0), 2
    )
    assert found == {"first": pytest.approx(2.0), "second": pytest.approx(5.5)}


def test_alphas_by_curvature_follow_their_formula():
    found = by_curvature({"a": 1.0, "b": 2.0, "c": 3.0}, 0.7)
    assert found == {"a": pytest.approx(0.85), "b": pytest.approx(0.7), "c": pytest.approx(0.55)}
    # No more than twice what is asked for, nothing for layers that curve down, and never below 0.
    assert by_curvature({"a": 9.0, "b": 0.0, "c": -1.0}, 0.7) == {
        "a": pytest.approx(0.4),
        "b": 1.0,
        "c": 1.0,
    }
    assert min(by_curvature({"a": 9.0, "b": 1.0, "c": 1.0}, 0.2).values()) == 0.0
    with pytest.raises(ValueError, match="no layer has a positive curvature"):
        by_curvature({"a": -1.0}, 0.7)


@pytest.mark.slow
def test_layers_get_the_alphas_of_their_curvature(model, good, splits):
    found = choose_alpha(model, good, splits, by="layers", epochs=0, grid=(0.7, 1.0), samples=2)
    (trial,) = found.trials
    sharpness = choices.layer_sharpness(model, good, splits, samples=2, task=Forecasting())
    assert dict(trial.strategy.start.alphas) == by_curvature(sharpness, 0.7)
    assert set(sharpness) == {"layer_0", "head", "embedding", "norms"}
    assert describe(0.7, {"layer_0": 0.5}) == "layer_0 0.5, else 0.7"


def test_the_gradient_of_the_learned_alphas_is_that_of_the_validation_loss(model, good, splits):
    """Against the difference of two validation losses after the same steps of training."""
    still = dataclasses.replace(model, config=dataclasses.replace(model.config, dropout=0.0))
    start = sff(0.7).start
    mixing = choices._Mixing(groups_of(still, good), start)
    other = still.init(training.keys(0)["aux"])
    task = Forecasting()
    windows, validation = task.windows(still, splits), split_loss(still, splits.val, sample=32)
    batches = jax.random.randint(jax.random.key(1), (2, 16), 0, windows.n)

    def outer(logits):
        return choices._outer(
            logits,
            good,
            other,
            windows,
            validation,
            batches,
            jax.random.key(2),
            jnp.float32(0.05),
            mixing=mixing,
            loss=task.loss(still),
        )

    logits = dict.fromkeys(mixing.groups, jnp.float32(0.8))
    _, slope = outer(logits)
    step = 0.05
    for group in ("body", "head"):
        above = outer(logits | {group: logits[group] + step})[0]
        below = outer(logits | {group: logits[group] - step})[0]
        assert float(slope[group]) == pytest.approx(
            float(above - below) / (2 * step), rel=0.03, abs=1e-4
        )


@pytest.mark.slow
def test_learned_alphas_lower_the_validation_loss(model, good, splits):
    alphas, steps = learn(
        model, good, splits, sff(0.7, keep=("norms",)), outer_steps=6, inner_steps=2, sample=64
    )
    assert len(steps) == 6 and set(alphas) == {"head", "embedding", "biases", "body"}
    assert all(step == pytest.approx(0.7) for name, step in steps[0].items() if name != "loss")
    best = min(steps, key=lambda step: step["loss"])
    assert best["loss"] < steps[0]["loss"]
    assert alphas == {group: pytest.approx(best[group], abs=1e-4) for group in alphas}


def test_what_cannot_be_chosen_is_refused(model, pre, splits):
    for options, message in [
        ({"by": "luck"}, "by must be one of grid, groups, layers, learned"),
        ({"grid": ()}, "the grid of alphas is empty"),
        ({"epochs": -1}, "epochs must be 0 or more"),
        ({"method": "lora"}, "no alpha to choose for 'lora'"),
        ({"grid": (0.5, 1.5), "epochs": 0}, "between 0 and 1; got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_alpha(model, pre, splits, **options)
    with pytest.raises(ValueError, match="ff mixes nothing"):
        learn(model, pre, splits, strategy("ff"))
