"""Generated series: reproducible, finite, varied, with the structure that their
docstring promises.
"""

import numpy as np
import pytest

from ltsm_jax.data import synthetic
from ltsm_jax.data.synthetic import generate

LENGTH = 768


@pytest.fixture(scope="module")
def series():
    return generate(0, 1024, LENGTH)


def test_shape_dtype_and_finite(series):
    assert series.shape == (1024, LENGTH) and series.dtype == np.float32
    assert np.isfinite(series).all()


def test_no_series_is_constant_and_few_are_mostly_so(series):
    assert (series.std(1) > 0).all()
    repeats = (np.diff(series, axis=1) == 0).mean(1)
    assert (repeats > 0.5).mean() < 0.1  # nights, counts, clipped and stuck stretches
    assert (repeats > 0.02).mean() > 0.1


def test_same_seed_same_series_and_n_is_only_a_cut():
    a = generate(7, 300, 96)
    np.testing.assert_array_equal(a, generate(7, 300, 96))
    np.testing.assert_array_equal(a[:5], generate(7, 5, 96))  # n crosses a chunk above, not here
    assert not np.isclose(a, generate(8, 300, 96)).all(1).any()
    assert len(np.unique(a, axis=0)) == 300


@pytest.mark.parametrize("length", [32, 97, 1000])
def test_any_length(length):
    assert generate(1, 3, length).shape == (3, length)


@pytest.mark.parametrize(("n", "length"), [(0, 100), (3, 31), (-1, 100)])
def test_impossible_sizes_are_refused(n, length):
    with pytest.raises(ValueError, match=f"n={n}, length={length}"):
        generate(0, n, length)


def autocorrelation(x, lag):
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    return (x[:, lag:] * x[:, :-lag]).mean(1)


def test_real_periods_are_there_and_others_are_not_favoured(series):
    """A season shows as a peak of the autocorrelation at its lag over the mean of the lags half a
    season away.
    """

    def share(period):
        half = period // 2
        beside = (
            autocorrelation(series, period - half) + autocorrelation(series, period + half)
        ) / 2
        return (autocorrelation(series, period) - beside > 0.3).mean()

    assert share(24) > 0.12 and share(96) > 0.12
    assert share(24) > 2 * share(34)


def test_noise_runs_from_almost_none_to_most_of_a_series(series):
    steps = np.diff(series, n=2, axis=1).std(1) / (
        6**0.5 * series.std(1)
    )  # 1 for white noise, 0 for a smooth curve
    assert (steps < 0.1).mean() > 0.1
    assert (steps > 0.6).mean() > 0.1


def test_signs_and_scales_are_mixed(series):
    assert 0.3 < (series.mean(1) > 0).mean() < 0.7
    scale = np.log10(series.std(1))
    assert scale.std() > 0.5


@pytest.mark.parametrize(
    ("draw", "share"), synthetic.FAMILIES, ids=lambda f: getattr(f, "__name__", "")
)
def test_every_family_gives_finite_varied_series(draw, share):
    x = draw(np.random.default_rng(3), 64, 400)
    assert x.shape == (64, 400) and np.isfinite(x).all() and 0 < share < 1
    assert (x.std(1) > 0).mean() > 0.9  # a burst may stay away for 400 steps


def test_shares_sum_to_one():
    for shares in (
        synthetic.DAY_SHARES,
        synthetic.PERIOD_SHARES,
        [share for _, share in synthetic.FAMILIES],
    ):
        np.testing.assert_allclose(np.sum(shares), 1, rtol=1e-12)


def test_periodic_process_has_the_covariance_of_its_kernel():
    """4000 draws of one kernel: the sample covariance of step 0 and step j is exp(-2 sin^2(pi j /
    G) / roughness^2).
    """
    table = synthetic._periodic_table(np.random.default_rng(0), np.full(4000, 0.7))
    u = np.arange(synthetic.GRID) / synthetic.GRID
    kernel = np.exp(-2 * (np.sin(np.pi * u) / 0.7) ** 2)
    found = (table[:, :1] * table).mean(0)
    assert (
        np.abs(found - kernel).max() < 5 * (2 / 4000) ** 0.5
    )  # std of a product of unit normals is at most sqrt(2)


def test_stationary_process_has_the_covariance_of_its_kernel():
    """An RBF and a rational-quadratic kernel are drawn at random, both near 1 at lag 1 when the
    scale is long.
    """
    x = synthetic._stationary(np.random.default_rng(0), np.full(2000, np.inf), np.ones(2000), 256)
    np.testing.assert_allclose(x.var(), 1, atol=0.1)
    assert 0.8 < (x[:, 100] * x[:, 101]).mean() < 1.1
    local = synthetic._stationary(
        np.random.default_rng(0), np.full(2000, 24.0), np.full(2000, 0.5), 256
    )
    at = lambda lag: (local[:, 100] * local[:, 100 + lag]).mean()  # noqa: E731
    assert at(24) > at(12) + 0.3


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_coloured_noise_has_its_slope(beta):
    x = synthetic._coloured(np.random.default_rng(0), 400, 1024, np.full(400, beta))
    power = (np.abs(np.fft.rfft(x * np.hanning(1024), axis=1)) ** 2).mean(0)
    k = np.arange(8, 256)
    slope = np.polyfit(np.log(k), np.log(power[k]), 1)[0]
    assert abs(slope + beta) < 0.1


def test_autoregression_remembers_as_told():
    x = synthetic._ar(np.random.default_rng(0), 3000, 50, np.full(3000, 0.8))
    np.testing.assert_allclose(x.std(0), 1, atol=0.08)
    np.testing.assert_allclose((x[:, 1:] * x[:, :-1]).mean(), 0.8, atol=0.03)
