"""Means over what is observed, and the losses of Timer and UniTS where something is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers.missing import mean_observed, mean_over_rows, mse_observed
from ltsm_jax.models.timer import Timer
from ltsm_jax.models.units import Units

RNG = np.random.default_rng(0)
Y, TARGET = (jnp.asarray(RNG.normal(size=(3, 2, 7)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("batch", [{}, {"weight": jnp.asarray([1.0, 1.0, 0.0])}])
def test_without_gaps_it_is_the_mean_over_rows_bit_for_bit(batch):
    want = mean_over_rows(jnp.square(Y - TARGET), batch)
    assert mse_observed(Y, TARGET, batch) == want


def test_every_observed_target_counts_alike():
    target = TARGET.at[0, 1, 2:5].set(jnp.nan).at[1].set(jnp.nan)
    weight = np.asarray([1.0, 1.0, 0.5])

    error, seen = np.square(np.asarray(Y) - np.asarray(target)), ~np.isnan(np.asarray(target))
    share = seen * weight[:, None, None]
    want = (np.where(seen, error, 0.0) * share).sum() / share.sum()

    got = mse_observed(Y, target, {"weight": jnp.asarray(weight, jnp.float32)})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    filled = jnp.where(seen, jnp.square(Y - jnp.nan_to_num(target)), 0.0)
    same = mean_observed(filled, jnp.asarray(seen), {"weight": jnp.asarray(weight, jnp.float32)})
    np.testing.assert_allclose(got, same, rtol=1e-6)


def test_nothing_observed_is_a_loss_of_0_without_gradient():
    value, gradient = jax.value_and_grad(mse_observed)(Y, jnp.full_like(TARGET, jnp.nan), {})
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)


def test_timer_learns_from_what_is_observed_alone():
    model = Timer(Timer.small())
    params = jax.jit(model.init)(jax.random.key(0))
    x = np.sin(np.arange(40) / 3)[None, None].astype(np.float32)
    x[..., 10:13], x[..., 35:] = np.nan, np.nan

    # What the model reads: the last value before a gap. What it is compared with: values that
    # exist.
    filled = x[..., :32].copy()
    filled[..., 10:13] = x[..., 9]
    predicted = np.asarray(jax.jit(lambda x: model.apply(params, x)[0])(jnp.asarray(filled)))
    want = np.nanmean(np.square(predicted - x[..., 8:]))

    batch = {"context": jnp.asarray(x[..., :32]), "target": jnp.asarray(x[..., 32:])}
    got = jax.jit(model.loss)(params, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("family", [Timer, Units])
def test_reconstruction_and_imputation_take_missing_values(family):
    model = family(family.small())
    params = jax.jit(model.init)(jax.random.key(0))
    impute = jax.jit(lambda x, seen: model.impute(params, x, seen))
    x = jnp.sin(jnp.arange(80.0).reshape(1, 2, 40) / 3).at[..., 10:13].set(jnp.nan)
    seen = jnp.ones_like(x).at[..., 24:32].set(0.0)
    assert jnp.isfinite(jax.jit(model.reconstruct)(params, x)).all()
    assert jnp.isfinite(impute(x, seen)).all()

    # NaN is one way to say that a point is not observed.
    hidden = jnp.where(jnp.isnan(x), 0.0, seen)
    same = impute(jnp.nan_to_num(x), hidden)
    np.testing.assert_array_equal(impute(x, seen)[..., 16:], same[..., 16:])

    # A window of which nothing is known has no scale; it must not break the batch it is in.
    assert jnp.isfinite(impute(x, jnp.zeros_like(x))).all()
