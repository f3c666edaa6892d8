"""Schedules against the lists of the originals, Adam against its formula."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ltsm_jax.training import TrainConfig, adam, schedule
from ltsm_jax.training.optimizers import Rule


def per_epoch(name, epochs, steps_per_epoch=3, **kwargs):
    rates = schedule(name, 3e-5, epochs, steps_per_epoch, **kwargs)(
        np.arange(epochs * steps_per_epoch)
    )
    rows = rates.reshape(epochs, steps_per_epoch)
    return rows[:, 0], rows


def test_halving_is_the_list_of_the_release():
    first, rows = per_epoch("halving", 10)
    expected = [
        3e-5,
        3e-5,
        1.5e-5,
        7.5e-6,
        3.75e-6,
        1.875e-6,
        9.375e-7,
        4.6875e-7,
        2.34375e-7,
        1.171875e-7,
    ]
    np.testing.assert_allclose(first, expected, rtol=1e-12)
    assert (rows == first[:, None]).all()  # constant within an epoch


def test_timer_is_flat_for_five_epochs_and_then_falls_by_a_tenth():
    first, _ = per_epoch("timer", 8)
    np.testing.assert_allclose(
        first, 3e-5 * np.array([1, 1, 1, 1, 1, 0.9, 0.81, 0.729]), rtol=1e-12
    )


def test_cosine_falls_from_the_rate_to_nearly_nothing():
    rates = schedule("cosine", 2.0, 10, 10)(np.arange(100))
    assert rates[0] == 2.0
    assert (np.diff(rates) < 0).all()
    np.testing.assert_allclose(rates[50], 1.0)
    assert 0 < rates[-1] < 1e-3


def test_one_cycle_rises_and_falls_along_cosines():
    rates = schedule("one-cycle", 2.0, 10, 10)(np.arange(100))
    np.testing.assert_allclose(rates[[0, 15, 30, 65]], [0.08, 1.04, 2.0, 1.000004], rtol=1e-6)
    assert rates.argmax() == 30
    assert (np.diff(rates[:31]) > 0).all() and (np.diff(rates[30:]) < 0).all()
    assert 0 < rates[-1] < 2e-3


def test_warmup_climbs_linearly_to_the_schedule():
    rates = schedule("constant", 1.0, 1, 40, warmup=0.1)(np.arange(40))
    np.testing.assert_allclose(rates[:6], [0.2, 0.4, 0.6, 0.8, 1, 1])
    cosine = schedule("cosine", 1.0, 1, 40, warmup=0.1)(np.arange(40))
    assert cosine.argmax() == 4
    assert cosine[4] == 1


def test_a_schedule_takes_one_step_too_and_an_unknown_name_is_refused():
    assert schedule("halving", 1.0, 10, 5)(14) == 0.5
    with pytest.raises(ValueError, match=r"'linear'; known: halving, timer, cosine, constant"):
        schedule("linear", 1.0, 10, 5)


def adam_by_hand(params, grads, lr, weight_decay=0.0):
    """torch.optim.Adam and AdamW with their defaults, written out in float64."""
    p, m, v = params.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads.astype(np.float64), 1):
        p = p * (1 - lr * weight_decay)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p = p - lr / (1 - 0.9**t) * m / (np.sqrt(v) / np.sqrt(1 - 0.999**t) + 1e-8)
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_follows_the_formula(weight_decay):
    rng = np.random.default_rng(0)
    start = rng.standard_normal(50).astype(np.float32)
    # down to the size of eps, where its place in or out of the root shows
    grads = (rng.standard_normal((8, 50)) * 10.0 ** rng.integers(-9, 2, 50)).astype(np.float32)
    tx, params = adam(weight_decay), jnp.asarray(start)
    state = tx.init(params)
    for g in grads:
        direction, state = tx.update(jnp.asarray(g), state, params)
        params = params - 0.01 * direction
    np.testing.assert_allclose(
        params, adam_by_hand(start, grads, 0.01, weight_decay), rtol=2e-5, atol=2e-6
    )


def test_clip_bounds_the_norm_of_the_gradient_before_the_moments():
    tx, grads = adam(clip=1.0), {"a": jnp.full(3, 30.0), "b": jnp.full(1, 40.0)}
    _, state = tx.update(grads, tx.init(grads), grads)
    moments = optax.tree_utils.tree_get(state, "mu")
    norm = np.sqrt(sum(np.square(m).sum() for m in moments.values()))
    np.testing.assert_allclose(norm, 0.1, rtol=1e-6)  # (1 - 0.9) times a gradient of norm 1


def test_the_schedule_of_the_pruning_release_is_flat_for_four_epochs_and_then_falls_by_a_tenth():
    first, rows = per_epoch("pruning", 7)
    np.testing.assert_allclose(first, 3e-5 * np.array([1, 1, 1, 1, 0.9, 0.81, 0.729]), rtol=1e-12)
    assert (rows == first[:, None]).all()


def after(rule, start, grads, lr):
    tx, params = rule.transformation(), jnp.asarray(start)
    state = tx.init(params)
    for g in grads:
        direction, state = tx.update(jnp.asarray(g), state, params)
        params = params - lr * direction
    return params


def by_hand(name, start, grads, lr, decay, betas, eps):
    """torch.optim.Adam (decay in the gradient), AdamW and SGD with momentum, written out in
    float64.
    """
    p, m, v = start.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads.astype(np.float64), 1):
        if name != "adamw":
            g = g + decay * p
        if name == "sgd":
            m = betas[0] * m + g
            p = p - lr * m
            continue
        if name == "adamw":
            p = p * (1 - lr * decay)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr / (1 - betas[0] ** t) * m / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return p


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_each_optimizer_follows_its_formula_with_its_own_betas_and_eps(name):
    rng = np.random.default_rng(1)
    start = rng.standard_normal(20).astype(np.float32)
    grads = rng.standard_normal((6, 20)).astype(np.float32)
    rule = Rule(name, weight_decay=0.3, betas=(0.8, 0.95), eps=0.1)
    found = after(rule, start, grads, 0.02)
    np.testing.assert_allclose(
        found, by_hand(name, start, grads, 0.02, 0.3, (0.8, 0.95), 0.1), rtol=2e-5, atol=2e-6
    )


def test_the_default_rule_is_that_of_before_bit_for_bit_and_an_unknown_name_is_refused():
    rng = np.random.default_rng(2)
    start, grads = (
        rng.standard_normal(20).astype(np.float32),
        rng.standard_normal((3, 20)).astype(np.float32),
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.float32),
        optax.add_decayed_weights(0.1),
    )
    params = jnp.asarray(start)
    state = tx.init(params)
    for g in grads:
        direction, state = tx.update(jnp.asarray(g), state, params)
        params = params - 0.01 * direction
    config = TrainConfig(weight_decay=0.1, clip=1.0)
    np.testing.assert_array_equal(after(Rule.of(config), start, grads, 0.01), params)
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; known: adamw, adam, sgd"):
        Rule("lion").transformation()
