"""The mixture distribution: densities and samples agree with each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers import mixture
from ltsm_jax.layers.mixture import Mixture

PARTS = {
    "student_t": {"df": 3.5, "loc": 0.3, "scale": 0.7},
    "normal_fixed": {"loc": -0.4, "scale": 1e-3},
    "negative_binomial": {"total_count": 1.7, "logits": 0.6},
    "log_normal": {"loc": 0.2, "scale": 0.5},
}


def made(kinds, weights, shape=(1, 1), loc=2.0, scale=3.0, **changes):
    parts = tuple(
        {name: jnp.full(shape, x) for name, x in (PARTS[kind] | changes).items()} for kind in kinds
    )
    log_weights = jnp.broadcast_to(jnp.log(jnp.asarray(weights)), (*shape, len(kinds)))
    return Mixture(log_weights, parts, jnp.full(shape, loc), jnp.full(shape, scale), tuple(kinds))


def samples(y, n, seed=0):
    keys = jax.random.split(jax.random.key(seed), y.loc.shape[0])
    return np.asarray(jax.jit(Mixture.sample, static_argnums=2)(y, keys, n))


@pytest.mark.parametrize("kind", ["student_t", "log_normal"])
def test_densities_integrate_to_one_and_to_the_mean(kind):
    y = made([kind], [1.0], loc=0.0, scale=1.0)
    grid = np.sinh(np.linspace(-9, 9, 8001))
    whole = Mixture(
        *jax.tree.map(lambda leaf: leaf[0], (y.log_weights, y.parts, y.loc, y.scale)), y.kinds
    )
    density = np.exp(np.asarray(whole.log_prob(jnp.asarray(grid, jnp.float32)), np.float64))
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, rtol=1e-3)
    np.testing.assert_allclose(np.trapezoid(density * grid, grid), y.mean()[0, 0], rtol=5e-3)


def test_negative_binomial_is_a_distribution_over_whole_numbers():
    y = made(["negative_binomial"], [1.0], loc=0.0, scale=1.0)
    counts = jnp.arange(400.0)
    p = np.exp(np.asarray(y.log_prob(counts[None])[0], np.float64))
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-4)
    np.testing.assert_allclose((p * counts).sum(), y.mean()[0, 0], rtol=1e-3)
    drawn = samples(y, 40_000)[0, 0]
    found = np.bincount(drawn.astype(int), minlength=12)[:12] / drawn.size
    np.testing.assert_allclose(found, p[:12], atol=5 * math.sqrt(0.25 / drawn.size))


def test_samples_follow_the_density():
    """The share of samples below a value is what the density gives, for the whole mixture."""
    kinds, weights = list(mixture.PUBLISHED), [0.4, 0.1, 0.2, 0.3]
    y = made(kinds, weights)
    drawn = (samples(y, 40_000)[0, 0] - 2.0) / 3.0
    alone = [
        (samples(made([kind], [1.0], loc=0.0, scale=1.0), 40_000, seed=i)[0, 0])
        for i, kind in enumerate(kinds)
    ]
    for cut in (-1.0, -0.4, 0.0, 0.5, 1.0, 2.5, 8.0):
        want = sum(w * (one <= cut).mean() for w, one in zip(weights, alone, strict=True))
        assert abs((drawn <= cut).mean() - want) < 0.012, cut
    np.testing.assert_allclose(np.median(alone[0]), 0.3, atol=0.02)
    np.testing.assert_allclose(alone[1].std(), 1e-3, rtol=0.03)
    np.testing.assert_allclose(np.log(alone[3]).std(), 0.5, rtol=0.03)


@pytest.mark.parametrize("count, logit", [(0.05, 1.0), (30.0, 1.5), (5000.0, 3.0)])
def test_negative_binomials_of_every_size(count, logit):
    y = made(["negative_binomial"], [1.0], loc=0.0, scale=1.0, total_count=count, logits=logit)
    drawn = samples(y, 20_000)[0, 0]
    mean = count * math.exp(logit)
    spread = math.sqrt(mean * (1 + math.exp(logit)))
    assert abs(drawn.mean() - mean) < 5 * spread / math.sqrt(drawn.size)
    np.testing.assert_allclose(drawn.std(), spread, rtol=0.15 if count < 1 else 0.03)
    assert (drawn == np.round(drawn)).all()


@pytest.mark.slow
def test_a_rows_samples_do_not_depend_on_the_others():
    y = made(["student_t", "negative_binomial"], [0.5, 0.5], shape=(3, 2))
    keys = jax.random.split(jax.random.key(1), 3)
    alone = jax.tree.map(lambda leaf: leaf[1:2], y)
    np.testing.assert_array_equal(y.sample(keys, 7)[1:2], alone.sample(keys[1:2], 7))


def test_values_outside_a_support_leave_gradients_finite():
    def loss(logits, z):
        y = made(list(mixture.PUBLISHED), [0.25] * 4, loc=0.0, scale=1.0)
        return (
            Mixture(jax.nn.log_softmax(logits), y.parts, y.loc, y.scale, y.kinds).log_prob(z).sum()
        )

    for z in (-1.0, 0.0, 1.0):
        grads = jax.grad(loss, argnums=(0, 1))(jnp.zeros((1, 1, 4)), jnp.full((1, 1), z))
        assert all(np.isfinite(np.asarray(g)).all() for g in grads), z


def test_published_form():
    told = mixture.write_published(mixture.PUBLISHED, 1e-3)
    assert mixture.read_published(told) == (mixture.PUBLISHED, 1e-3)
    for wrong in (
        None,
        {},
        {"_target_": "x.NormalOutput"},
        told | {"components": [{"_target_": "x.y.BetaOutput"}]},
    ):
        with pytest.raises(ValueError, match="distr_output"):
            mixture.read_published(wrong)
