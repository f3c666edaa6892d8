import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import training
from ltsm_jax.data import DataError
from ltsm_jax.methods.run import run
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models.units import Units, UnitsConfig
from ltsm_jax.tasks import classification
from ltsm_jax.tasks.classification import Classification, Examples, Parts


def examples(n, seed):
    """Three variates of 32 steps; class 1 swings twice as fast as class 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    t = np.arange(32)
    phase = rng.uniform(0, 2 * np.pi, (n, 3, 1))
    values = np.sin(2 * np.pi * t * (1 + labels[:, None, None]) / 16 + phase) + 0.1 * rng.normal(
        size=(n, 3, 32)
    )
    return Examples.of(values, labels)


@pytest.fixture(scope="module")
def parts():
    return Parts(examples(96, 0), examples(32, 1), examples(32, 2))


@pytest.fixture(scope="module")
def model():
    """UniTS of one layer: the compiler takes most of the time here."""
    small = Units.small()
    config = UnitsConfig.of(16, 2, 1, small.tasks, patch_len=8, prompt_len=3)
    return Units(dataclasses.replace(config, dataset="b"))


def test_scores_by_hand():
    label, guess = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 0])
    found = classification.accuracy_and_f1(guess, label)
    # F1: class 0 has 2 hits of 3 guessed and 3 there, class 1 has 1 of 2 and 1, class 2 has none
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert found["examples"] == 5


def test_loss_is_the_cross_entropy_of_rows_that_count(model, parts):
    params = model.init(jax.random.key(0))
    batch = parts.train.gather(jnp.arange(4))
    logits = np.asarray(jax.jit(model.classify)(params, batch["context"]), np.float64)
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = -log[np.arange(4), np.asarray(batch["label"])]
    loss = Classification().loss(model)
    value = jax.jit(loss, static_argnums=3)
    assert float(value(params, batch, None, False)) == pytest.approx(want.mean(), rel=1e-4)
    weighted = batch | {"weight": jnp.array([1.0, 1.0, 0.0, 0.0])}
    assert float(value(params, weighted, None, False)) == pytest.approx(want[:2].mean(), rel=1e-4)
    assert loss is Classification().loss(Units(model.config)), "equal models share a compilation"


@pytest.mark.slow
def test_the_runner_tunes_a_classifier(model, parts):
    params = jax.jit(model.init)(jax.random.key(0))
    config = training.TrainConfig(epochs=4, batch_size=16, lr=5e-3, schedule="constant")
    result = run(
        model,
        params,
        strategy("ff"),
        parts,
        task=Classification(),
        config=config,
        show_progress=False,
    )
    before = Classification().evaluate(model, params, parts, "test")
    assert result.test["loss"] < before["loss"]
    best = min(range(4), key=lambda i: result.history[i]["val_loss"])
    assert result.best_epoch == best + 1 and result.val["loss"] == result.history[best]["val_loss"]
    assert set(Classification().row(result.test)) == {"accuracy", "macro_f1"}
    most = np.bincount(np.asarray(parts.train.labels)).argmax()
    got = Classification().baselines(model, parts)["most frequent class"]["accuracy"]
    assert got == pytest.approx(np.mean(np.asarray(parts.val.labels) == most))


def test_refusals(model, parts):
    four = np.zeros((4, 3, 32))
    for values, labels in (
        (np.zeros((4, 32)), [0] * 4),
        (four, [0.5] * 4),
        (four, [-1] * 4),
        (four, [0] * 3),
    ):
        with pytest.raises(DataError, match="must be"):
            Examples.of(values, labels)
    three = Examples.of(np.asarray(parts.val.values), np.arange(32) % 3)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="3 classes, the model has 2"):
        Classification().evaluate(model, params, dataclasses.replace(parts, val=three))
    with pytest.raises(DataError, match="differ"):
        Parts(parts.train, Examples.of(np.zeros((2, 2, 32)), [0, 1]), parts.test)
