import numpy as np
import pytest

from ltsm_jax.tasks import random_kernels
from ltsm_jax.tasks.random_kernels import RandomConvolution


def waves(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    phase = rng.uniform(0, 2 * np.pi, (n, 2, 1))
    t = np.arange(60)
    values = np.sin(2 * np.pi * t * (1 + labels[:, None, None]) / 20 + phase)
    return values + 0.3 * rng.normal(size=values.shape), labels


def test_features_of_a_kernel_by_hand():
    """Weights 1, 0, -1 with dilation 2 and padding 2 over -1.5, -0.5, 0.5, 1.5 / std."""
    x = np.arange(4.0)[None, None]
    z = (x - 1.5)[0, 0] / x.std()
    kernel = RandomConvolution(np.array([0]), np.array([[1.0, 0, -1]]), 0.1, 2, 2)
    padded = np.concatenate([[0, 0], z, [0, 0]])
    response = [padded[i] - padded[i + 4] + 0.1 for i in range(4)]
    want = [max(response), np.mean(np.array(response) > 0)]
    np.testing.assert_allclose(random_kernels.features(x, [kernel])[0], want)


def test_kernels_fit_the_series():
    for n_steps in (1, 5, 8, 300):
        for kernel in random_kernels.draw_kernels(0, 3, n_steps, 50):
            length = kernel.weights.shape[1]
            assert n_steps + 2 * kernel.padding > (length - 1) * kernel.dilation
            np.testing.assert_allclose(kernel.weights.sum(axis=1), 0, atol=1e-12)
        found = random_kernels.features(
            np.ones((2, 3, n_steps)), random_kernels.draw_kernels(0, 3, n_steps, 9)
        )
        assert np.isfinite(found).all() and found.shape == (2, 18)


def test_the_ridge_takes_the_penalty_of_the_lowest_error_of_left_out_rows(monkeypatch):
    """Against refitting without each row, one penalty at a time."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(20, 4)), rng.integers(0, 2, 20)
    labels[:2] = 0, 1
    test = rng.normal(size=(50, 4))
    z = (x - x.mean(0)) / x.std(0)
    errors = []
    for penalty in random_kernels.PENALTIES:
        total = 0.0
        for i in range(20):
            rest = np.delete(np.arange(20), i)
            a = np.c_[z[rest], np.ones(19)]
            y = 2.0 * labels - 1
            weights = np.linalg.solve(a.T @ a + penalty * np.diag([1, 1, 1, 1, 0]), a.T @ y[rest])
            total += (np.r_[z[i], 1] @ weights - y[i]) ** 2
        errors.append(total)
    best = random_kernels.PENALTIES[int(np.argmin(errors))]
    found = random_kernels.ridge(x, labels, test)
    monkeypatch.setattr(random_kernels, "PENALTIES", [best])
    np.testing.assert_array_equal(found, random_kernels.ridge(x, labels, test))


def test_it_tells_waves_apart_and_is_reproducible():
    (train, labels), (test, wanted) = waves(60, 0), waves(40, 1)
    guess = random_kernels.classify(train, labels, test, count=40)
    assert (guess == wanted).mean() > 0.9
    np.testing.assert_array_equal(guess, random_kernels.classify(train, labels, test, count=40))


def test_missing_values_are_lived_with():
    (train, labels), (test, wanted) = waves(60, 0), waves(40, 1)
    test[:, :, :10] = np.nan
    assert (random_kernels.classify(train, labels, test, count=40) == wanted).mean() > 0.6


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        random_kernels.classify(np.ones((3, 1, 9)), np.zeros(3), np.ones((1, 1, 9)))
