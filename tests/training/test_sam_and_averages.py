"""Gradients taken uphill (SAM) and averages of weights (EMA, SWA), against the same written out
step by step.
"""

import dataclasses
import functools
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_problem as problem

from ltsm_jax import hosts, training, trees
from ltsm_jax.data import windows
from ltsm_jax.training import step

HEAD = trees.select(problem.init(), "^head/")
EPOCHS, BATCH, RATE = 2, 48, 3e-3
SHORT = dataclasses.replace(problem.CONFIG, epochs=EPOCHS, batch_size=BATCH, lr=RATE)


def config(**changes):
    return dataclasses.replace(SHORT, **changes)


def mean_loss(moving, frozen, rows):
    error = problem.predict(trees.combine(moving, frozen), rows["context"]) - rows["target"]
    return jnp.square(error).mean()


@functools.cache
def written_out(rho=0.0):
    """The weights after every step of SHORT with the body frozen; the last batch is
    just shorter.
    """
    source, keys, tx = problem.train_windows(), training.keys(0), training.adam()
    moving, frozen = trees.partition(problem.init(), HEAD)
    state, passed = tx.init(moving), []
    gradient = jax.jit(jax.grad(mean_loss))
    for epoch in range(EPOCHS):
        order = windows.epoch_order(keys["data"], epoch, source.n)
        for start in range(0, source.n, BATCH):
            rows = source.gather(order[start : start + BATCH])
            g = gradient(moving, frozen, rows)
            if rho:
                length = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(g)))
                near = jax.tree.map(lambda p, d, length=length: p + rho * d / length, moving, g)
                g = gradient(near, frozen, rows)
            direction, state = tx.update(g, state, moving)
            moving = jax.tree.map(lambda p, d: p - RATE * d, moving, direction)
            passed.append(trees.combine(moving, frozen))
    return passed


def fit(**changes):
    more = {name: changes.pop(name) for name in ("folder", "validate") if name in changes}
    return problem.fit(loss_fn=problem.dry_loss, config=config(**changes), trainable=HEAD, **more)


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), a, b)


def assert_same_bits(a, b):
    chex.assert_trees_all_equal(a, b)


def test_uphill_of_a_quadratic_by_hand():
    # loss (w0^2 + 2 w1^2) / 2 at (3, 2): gradient (3, 4) of length 5
    at = {"w": jnp.array([3.0, 2.0])}

    def gradients_at(params):
        return jax.value_and_grad(lambda p: (jnp.array([0.5, 1.0]) * p["w"] ** 2).sum())(params)

    how = step.How(1, "none", rho=0.5)
    np.testing.assert_allclose(
        step.uphill(at, gradients_at(at)[1], 0.5)["w"], [3.3, 2.4], rtol=1e-6
    )
    loss, gradients = step.loss_and_gradients(gradients_at, at, how)
    assert float(loss) == 8.5  # where the weights are
    np.testing.assert_allclose(gradients["w"], [3.3, 4.8], rtol=1e-6)
    still = {"w": jnp.zeros(2)}
    assert_same_bits(step.uphill(still, still, 0.5), still)  # no gradient, no direction


def test_sam_steps_by_the_gradient_uphill_of_what_is_trained():
    found = fit(rho=0.5)
    assert_close(found.last_params, written_out(0.5)[-1])
    assert_same_bits(found.last_params["body"], problem.init()["body"])
    apart = np.abs(
        written_out(0.5)[-1]["head"]["kernel"] - written_out()[-1]["head"]["kernel"]
    ).max()
    assert apart > 1e-3  # or the comparison above would say nothing


@pytest.mark.slow
def test_sam_of_a_batch_in_parts_is_that_of_the_batch():
    assert_close(
        fit(rho=0.5, accumulate=2, remat="all but products").last_params, written_out(0.5)[-1]
    )


def test_ema_is_the_average_that_is_validated_and_kept():
    seen = []

    def validate(params):
        seen.append(jax.tree.map(np.array, params))  # the steps donate theirs
        return problem.validate(params)

    found = fit(ema=0.8, validate=validate)
    assert found.best_epoch is not None
    average = problem.init()
    steps = written_out()
    for i, weights in enumerate(steps):
        average = jax.tree.map(lambda a, w: 0.8 * a + 0.2 * w, average, weights)
        if i + 1 == len(steps) // 2:
            assert_close(seen[0], average)
    assert_close(seen[1], average)
    assert_same_bits(found.params, seen[found.best_epoch - 1])
    assert_close(found.last_params, steps[-1])  # the average has no say in the steps


def test_swa_is_the_mean_over_the_last_epochs_and_they_alone_are_selected():
    seen = []

    def worse_and_worse(params):
        seen.append(jax.tree.map(np.array, params))  # the steps donate theirs
        return {"mse": float(len(seen))}

    plain = fit(epochs=4, validate=worse_and_worse)
    ends, seen[:] = list(seen), []
    found = fit(epochs=4, swa=0.5, validate=worse_and_worse)
    assert plain.best_epoch == 1 and found.best_epoch == 3
    assert_same_bits(seen[:3], ends[:3])
    assert_close(seen[3], jax.tree.map(lambda a, b: (a + b) / 2, ends[2], ends[3]))
    assert_same_bits(found.params, ends[2])
    assert_same_bits(found.last_params, plain.last_params)


@pytest.mark.parametrize(
    "average", [{"ema": 0.8}, pytest.param({"swa": 1.0}, marks=pytest.mark.slow)]
)
def test_an_average_survives_a_stop_in_a_validation(tmp_path, average):
    undisturbed = fit(**average)
    calls = []

    def stopped_once(params):
        calls.append(params)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
            hosts.pause()  # as a real validation does between its batches
        return problem.validate(params)

    with pytest.raises(KeyboardInterrupt, match="checkpoint"):
        fit(**average, folder=tmp_path, validate=stopped_once)
    again = fit(**average, folder=tmp_path, validate=stopped_once)
    assert len(calls) == 3  # the second epoch's validation came again, and no other
    assert_same_bits(again.params, undisturbed.params)
    assert again.history == undisturbed.history


def test_without_validation_the_average_is_what_is_kept():
    found = fit(swa=1.0, validate=None)
    half = len(written_out()) // 2
    assert_close(
        found.params,
        jax.tree.map(lambda a, b: (a + b) / 2, written_out()[half - 1], written_out()[-1]),
    )


def test_what_a_config_records_of_them():
    assert not {"rho", "ema", "swa"} & config().record().keys()  # as folders from before have it
    assert config(rho=0.05).record()["rho"] == 0.05
    with pytest.raises(ValueError, match="take one of them"):
        config(ema=0.9, swa=0.5)
    with pytest.raises(ValueError, match="ema must be a share"):
        config(ema=1.0)
