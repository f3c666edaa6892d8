"""Curvature against Hessians that are known: small ones, which are built, and larger ones, which
Lanczos meets.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import curvature, trees


def quadratic(eigenvalues, seed=0):
    """0.5 x' A x with the eigenvalues given, over a tree of two leaves; and A."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    matrix = (basis * eigenvalues) @ basis.T
    arrays = jnp.asarray(matrix, jnp.float32)

    def loss(params):
        x = jnp.concatenate([params["a"], params["b"]["c"].ravel()])
        return 0.5 * x @ arrays @ x

    half = n // 2
    params = {"a": jnp.ones(half), "b": {"c": jnp.ones((n - half, 1))}}
    return loss, params, matrix


SMALL = np.array([7.0, 7.0, 3.0, 1.0, 0.0, -2.0])
# A bulk around 0 and three that stand out, as of trained networks.
LARGE = np.concatenate([[40.0, 25.0, 12.0], np.linspace(-1, 2, 297)])


@pytest.fixture(scope="module")
def small():
    return quadratic(SMALL)


@pytest.fixture(scope="module")
def large():
    return quadratic(LARGE)


def test_products_are_those_of_the_hessian(small):
    loss, params, matrix = small
    vector = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), params)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(vector)])
    found = jax.jit(lambda p, v: curvature.hvp(loss, p, v))(params, vector)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_allclose(
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)]),
        matrix @ flat,
        rtol=1e-5,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="vector"):
        curvature.hvp(loss, params, {"a": vector["a"]})


def test_of_a_small_hessian_everything_is_exact(small):
    loss, params, _ = small
    found = curvature.top_eigenvalues(loss, params, k=3, key=jax.random.key(0))
    np.testing.assert_allclose(found, [7, 7, 3], rtol=1e-5)
    np.testing.assert_allclose(curvature.trace(loss, params, key=jax.random.key(0)), 16, rtol=1e-5)
    assert curvature.trace_estimate(loss, params)[1] == 0
    spectrum = curvature.spectral_density(loss, params)
    np.testing.assert_allclose(spectrum.values, np.sort(SMALL), atol=1e-5)
    np.testing.assert_allclose(spectrum.weights, 1 / 6)
    assert spectrum.share(6.5) == pytest.approx(2 / 6)
    assert spectrum.trace == pytest.approx(16, rel=1e-5)


def test_lanczos_finds_what_stands_out(large):
    loss, params, _ = large
    found = curvature.top_eigenvalues(loss, params, k=3, key=jax.random.key(1))
    np.testing.assert_allclose(found, [40, 25, 12], rtol=1e-5)


def test_lanczos_ends_when_it_knows(large, monkeypatch):
    loss, params, _ = large
    products = []
    real = curvature._product
    monkeypatch.setattr(curvature, "_product", lambda *args: (products.append(1), real(*args))[1])
    curvature.top_eigenvalues(loss, params, k=1, tolerance=1e-3)
    few = len(products)
    curvature.top_eigenvalues(loss, params, k=1, tolerance=0.0)
    assert few < 10 and 20 < len(products) - few <= 60


def test_equal_eigenvalues_of_a_low_rank_are_all_found():
    loss, params, _ = quadratic(np.concatenate([[9.0, 9.0, 5.0, 4.0], np.zeros(296)]))
    np.testing.assert_allclose(
        curvature.top_eigenvalues(loss, params, k=4, steps=20), [9, 9, 5, 4], rtol=1e-4
    )


def test_the_trace_lies_within_its_error(large):
    loss, params, _ = large
    value, error = curvature.trace_estimate(loss, params, 0, samples=60)
    assert 0 < error < 0.2 * LARGE.sum()
    assert abs(value - LARGE.sum()) < 3 * error
    loss, params, _ = quadratic(np.concatenate([[9.0, 5.0, -4.0], np.zeros(297)]))
    np.testing.assert_allclose(
        curvature.trace(loss, params, samples=12), 10, rtol=1e-4
    )  # of rank 3, below 12 / 3


def test_the_density_has_the_moments_of_the_spectrum(large):
    loss, params, _ = large
    spectrum = curvature.spectral_density(loss, params, 0, steps=40, probes=6)
    assert spectrum.size == 300 and spectrum.weights.sum() == pytest.approx(1)
    # A probe is a random vector: its mean of the eigenvalues has a standard deviation of about 0.2
    # here.
    assert spectrum.trace / 300 == pytest.approx(LARGE.mean(), abs=0.25)
    assert spectrum.share(-1.01, 2.01) == pytest.approx(297 / 300, abs=0.01)
    np.testing.assert_allclose(spectrum.values[-1], 40, rtol=1e-4)
    at, density = spectrum.density(points=2000)
    assert np.trapezoid(density, at) == pytest.approx(1, abs=1e-3)
    assert density[np.argmin(np.abs(at - 0.5))] == pytest.approx(
        0.33, abs=0.08
    )  # 297/300 spread over a length of 3


def test_leaves_that_are_left_out_are_constants(small):
    _, params, matrix = small
    loss, _, _ = small
    found = curvature.top_eigenvalues(loss, params, k=1, only="^a$")
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix[:3, :3])[-1:], rtol=1e-5)
    whole = params | {"steps": jnp.arange(3)}  # integers are never moved
    np.testing.assert_allclose(curvature.trace(loss, whole), 16, rtol=1e-5)
    assert not curvature.hvp(loss, whole, whole)["steps"].any()


def test_sharpness_is_the_rise_along_the_gradient(small):
    loss, params, matrix = small
    flat = np.ones(6)
    gradient = matrix @ flat
    there = flat + 0.05 * gradient / np.linalg.norm(gradient)
    want = 0.5 * there @ matrix @ there - 0.5 * flat @ matrix @ flat
    assert curvature.sharpness(loss, params, rho=0.05) == pytest.approx(want, rel=1e-4)
    still = jax.tree.map(jnp.zeros_like, params)
    assert curvature.sharpness(loss, still) == 0


def test_a_loss_that_is_a_tree_is_compiled_once(large):
    _, params, matrix = large

    def scaled(by, params):
        x = jnp.concatenate(jax.tree.leaves(jax.tree.map(jnp.ravel, params)))
        return by * x @ jnp.asarray(matrix, jnp.float32) @ x

    before = curvature._product._cache_size()
    for by in (0.5, 1.0):
        loss = jax.tree_util.Partial(scaled, jnp.float32(by))
        found = curvature.top_eigenvalues(loss, params)
        np.testing.assert_allclose(found, [80 * by], rtol=1e-5)
    assert curvature._product._cache_size() == before + 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda loss, p: curvature.top_eigenvalues(loss, p, k=0), "number of parameters, 6"),
        (lambda loss, p: curvature.top_eigenvalues(loss, p, k=7), "number of parameters, 6"),
        (lambda loss, p: curvature.trace(loss, p, samples=5), "at least 6 samples"),
        (lambda loss, p: curvature.spectral_density(loss, p, probes=0), "at least 1"),
        (lambda loss, p: curvature.sharpness(loss, p, rho=0), "rho must be positive"),
        (lambda loss, p: curvature.trace(lambda q: jnp.inf * loss(q), p), "not finite"),
        (lambda loss, p: curvature.trace(loss, {"a": jnp.arange(3)}), "none is a float"),
        (lambda loss, p: curvature.trace(loss, p, only="z"), "no path"),
    ],
)
def test_what_cannot_be_measured_is_refused(small, call, message):
    loss, params, _ = small
    with pytest.raises(ValueError, match=message):
        call(loss, params)


def test_vectors_lie_where_the_parameters_lie():
    problem = curvature._Problem.of(
        lambda p: p["w"].sum(), {"w": jax.device_put(jnp.ones(3), jax.devices()[0])}, None
    )
    assert (
        trees.flatten(problem.signs(jax.random.key(0)))["w"].sharding
        == problem.params["w"].sharding
    )
