"""Generated time series: what `timer-tiny` is trained on, and a stand-in where no real data may be
used.

`generate(seed, n, length)` draws from a mixture of five families, each a small story of how a
series comes about:

- gp, 20 %: Gaussian processes. Sums of one to four periodic, locally periodic, RBF and
  rational-quadratic terms, some of them times a line, and white noise (the idea of KernelSynth in
  Chronos, Ansari et al. 2024, arXiv 2403.07815; sampled by FFT instead of a Cholesky factor for
  each series).
- calendar, 40 %: loads. A daily profile with sharp peaks, another one on days of rest, day-to-day
  level and amplitude that remember yesterday, a slow wander, noise that follows the load.
- structure, 15 %: trend, one to three seasons of drifting amplitude, regimes, coloured noise.
- sparse, 10 %: never negative. Zero at night (solar), counts, bursts.
- wander, 15 %: random walks, AR(1), 1/f noise, often with a faint season. Little of it can be
  forecast, which is what a model has to learn from it: to shrink.

Then, each on a share of all series: outliers, level shifts, ramps, clipping, rounding, stuck
stretches, slower sampling, a flipped sign; and a random scale and offset for every one. Noise runs
from almost none to more than signal.

Two periods of three are those of calendars (a day of hours, half-hours, 15, 10 or 5 minutes, a week
of days or hours, a year of weeks or months, ...), the others any real number from 4 to 720 steps.
"""

import numpy as np

CHUNK = (
    256  # series drawn from one seed: the first m series of generate(seed, n) do not depend on n
)
GRID = 512  # phases at which one period of a profile is tabulated

DAYS = np.array(
    [24, 96, 48, 144, 288, 12, 72, 36], np.float64
)  # steps a day: of hours, 15 min, 30 min, 10 min, ...
DAY_SHARES = np.array([0.36, 0.27, 0.11, 0.11, 0.05, 0.04, 0.03, 0.03])
PERIODS = np.array([24, 96, 48, 144, 288, 168, 336, 672, 7, 12, 52, 4, 30, 60, 365])
PERIOD_SHARES = np.array(
    [0.25, 0.18, 0.08, 0.08, 0.05, 0.08, 0.04, 0.02, 0.06, 0.06, 0.04, 0.02, 0.02, 0.01, 0.01]
)


def generate(seed: int, n: int, length: int) -> np.ndarray:
    """`n` generated series of `length` steps, float32 [n, length], finite, none of them constant.

    A pure function of (seed, length), and of n only as a cut: `generate(s, 10, T)[:5]` is
    `generate(s, 5, T)`. The units of each series are its own. Mixture: module docstring. Cost:
    about 1 ms for 1024 steps on one core.

    Raises: ValueError if n < 1 or length < 32.
    """
    if n < 1 or length < 32:
        raise ValueError(f"generate needs n >= 1 and length >= 32; got n={n}, length={length}")
    out = np.empty((n, length), np.float32)
    for i, lo in enumerate(range(0, n, CHUNK)):
        out[lo : lo + CHUNK] = _chunk(np.random.default_rng([seed, length, i]), length)[: n - lo]
    return out


def _chunk(rng, T):
    family = rng.choice(len(FAMILIES), CHUNK, p=[share for _, share in FAMILIES])
    x = np.zeros((CHUNK, T))
    for k, (draw, _) in enumerate(FAMILIES):
        rows = np.flatnonzero(family == k)
        if rows.size:
            x[rows] = _unit(draw(rng, rows.size, T))
    x = _mishaps(rng, x)
    std = x.std(1, keepdims=True)
    flat = (
        std[:, 0] < 1e-3
    )  # a mishap (clipping, rounding) may leave nothing: such a row becomes a noisy line
    x[flat] += rng.normal(size=(int(flat.sum()), T))
    scale = np.exp(rng.normal(0, 2, (CHUNK, 1)))
    return (scale * (x + rng.normal(0, 3, (CHUNK, 1)))).astype(np.float32)


# ---- families: (rng, n, T) -> [n, T] ----


def _gp(rng, n, T):
    """A sum of one to four GP terms, each periodic (purely or locally) or not (RBF or rational
    quadratic).
    """
    x, terms = np.zeros((n, T)), rng.integers(1, 5, n)
    for j in range(4):
        kind = rng.choice(3, n, p=[0.45, 0.25, 0.3])  # pure period, local period, aperiodic
        period = _periods(rng, n)
        roughness = _log_uniform(rng, 0.25, 2.0, size=n)
        term = _lookup(_periodic_table(rng, roughness), _phase(rng, period, T))
        local = kind != 0
        term[local] = _stationary(
            rng, np.where(kind == 1, period, np.inf)[local], roughness[local], T=T
        )
        line = (
            rng.random(n) < 0.15
        )  # a product with the linear kernel is a product of the sample with a line
        term *= np.where(line[:, None], np.linspace(-1, 1, T) + rng.uniform(-1, 1, (n, 1)), 1.0)
        x += np.where(j < terms, rng.lognormal(0, 0.7, n), 0.0)[:, None] * term
    return _add_noise(rng, _unit(x), 0.02, high=0.8, white=0.6)


def _calendar(rng, n, T):
    """Days of two shapes (work and rest) around a level and an amplitude that remember the day
    before.
    """
    period = rng.choice(DAYS, n, p=DAY_SHARES)
    steps = np.arange(T) + rng.integers(0, 7 * period.astype(int))[:, None]
    day = (steps // period[:, None]).astype(int)
    phase = steps / period[:, None] % 1
    work, rest = _day_shape(rng, n), _day_shape(rng, n)
    rest = work + _gate(rng, n, 0.6) * rng.uniform(0.1, 1.0, (n, 1)) * (rest - work)
    is_rest = (day % 7 >= 5) & (rng.random((n, 1)) < 0.65)  # a third of the series knows no week
    x = np.where(is_rest, _lookup(rest, phase), _lookup(work, phase))
    # Single weekdays differ as well, a little in most series and much in some.
    week = rng.normal(size=(n, 7)) * _gate(rng, n, 0.5) * _log_uniform(rng, 0.05, 0.6, size=(n, 1))
    x += (
        np.take_along_axis(week, day % 7, 1)
        - _gate(rng, n, 0.4) * rng.uniform(0, 1.0, (n, 1)) * is_rest
    )

    n_days = day.max() + 2
    amplitude = _ar(rng, n, n_days, rho=rng.uniform(0, 0.95, n)) * rng.uniform(0, 0.4, (n, 1))
    level = _ar(rng, n, n_days, rho=rng.uniform(0, 0.98, n)) * _log_uniform(
        rng, 0.03, 1.5, size=(n, 1)
    )
    abrupt = (
        rng.random((n, 1)) < 0.4
    )  # a new day begins with a jump, or yesterday glides into today
    blend = np.where(abrupt, 0.0, phase)

    def at(table):
        today, tomorrow = (np.take_along_axis(table, day + i, 1) for i in (0, 1))
        return today * (1 - blend) + tomorrow * blend

    x = x * np.clip(1 + at(amplitude), 0.05, None) + at(level)

    slow = (
        _coloured(rng, n, T, beta=rng.uniform(1.2, 2.4, n))
        * _gate(rng, n, 0.7)
        * _log_uniform(rng, 0.05, 1.5, size=(n, 1))
    )
    return _add_noise(rng, x + slow, 0.02, high=1.2, white=0.35)


def _structure(rng, n, T):
    """Trend, seasons whose amplitude drifts, regimes."""
    t = np.linspace(0, 1, T)
    bend = rng.uniform(0.05, 0.95, (n, 1))
    slope = rng.normal(0, 1.5, (n, 1)) * _gate(rng, n, 0.6)
    x = slope * t + rng.normal(0, 2.0, (n, 1)) * _gate(rng, n, 0.4) * np.clip(t - bend, 0, None)
    saturating = _gate(rng, n, 0.15)
    x += (
        saturating
        * rng.normal(0, 2, (n, 1))
        / (1 + np.exp(-(t - bend) * _log_uniform(rng, 5, 40, size=(n, 1))))
    )
    for j in range(3):
        season = _lookup(_day_shape(rng, n), _phase(rng, _periods(rng, n), T))
        drift = np.exp(
            _smooth(rng, n, T, scale=_log_uniform(rng, 0.1, 1.0, size=n) * T)
            * rng.uniform(0, 0.5, (n, 1))
        )
        x += (
            _gate(rng, n, (0.95, 0.5, 0.25)[j])
            * rng.lognormal(-0.4 * j, 0.5, (n, 1))
            * season
            * drift
        )
    # Regimes: a two-state chain that shifts the level and scales what is there.
    switch = np.cumsum(rng.random((n, T)) < 2.0 / T, 1) % 2 * _gate(rng, n, 0.25)
    x = x * (1 + switch * rng.uniform(-0.6, 0.8, (n, 1))) + switch * rng.normal(0, 1, (n, 1))
    return _add_noise(rng, x, 0.02, high=1.2, white=0.4)


def _sparse(rng, n, T):
    """Never below zero: sun with nights and clouds, bursts, counts."""
    period = rng.choice(DAYS, n, p=DAY_SHARES)[:, None]
    phase = (np.arange(T) / period + rng.random((n, 1))) % 1
    day_len = rng.uniform(0.3, 0.6, (n, 1))
    sun = np.clip(np.sin(np.pi * phase / day_len), 0, None) * (phase < day_len)
    clouds = _smooth(rng, n, T, scale=_log_uniform(rng, 0.03, 2.0, size=n) * period[:, 0])
    sun = sun ** _log_uniform(rng, 0.7, 2.0, size=(n, 1)) * np.clip(
        1 - rng.uniform(0, 1, (n, 1)) * np.abs(clouds), 0, None
    )

    rate = np.exp(
        1.2 * _lookup(_day_shape(rng, n), phase) * _gate(rng, n, 0.7) + rng.uniform(-1.5, 3, (n, 1))
    )
    rate *= np.exp(
        0.5 * _coloured(rng, n, T, beta=rng.uniform(0.5, 2.0, n)) * rng.uniform(0, 1, (n, 1))
    )
    counts = rng.poisson(np.minimum(rate, 1e4)).astype(np.float64)
    bursts = counts * rng.gamma(1.0, 1.0, (n, T))
    kind = rng.choice(3, n, p=[0.5, 0.3, 0.2])[:, None]
    return np.where(kind == 0, sun, np.where(kind == 1, counts, bursts))


def _wander(rng, n, T):
    """Random walk, AR(1) or 1/f noise; in two of three a season that is easily lost in it."""
    kind = rng.choice(3, n, p=[0.35, 0.3, 0.35])[:, None]
    walk = _unit(
        np.cumsum(
            rng.standard_t(4, (n, T)) * np.exp(_smooth(rng, n, T, scale=np.full(n, T / 8.0)) * 0.5),
            1,
        )
    )
    ar = _ar(rng, n, T, rho=1 - _log_uniform(rng, 0.002, 0.7, size=n))
    x = np.where(
        kind == 0,
        walk,
        np.where(kind == 1, ar, _coloured(rng, n, T, beta=rng.uniform(0.2, 2.6, n))),
    )
    season = _lookup(_day_shape(rng, n), _phase(rng, _periods(rng, n), T))
    return x + _gate(rng, n, 0.65) * _log_uniform(rng, 0.1, 1.2, size=(n, 1)) * season


FAMILIES = ((_gp, 0.2), (_calendar, 0.4), (_structure, 0.15), (_sparse, 0.1), (_wander, 0.15))


# ---- what happens to measured series ----


def _mishaps(rng, x):
    """Outliers, shifts, ramps, saturation, rounding, stuck sensors, slow sampling, sign. In units
    of each row's std.
    """
    n, T = x.shape
    t = np.arange(T)

    def hit(share):
        """Choose about this share of the rows: bool [n, 1]."""
        return rng.random((n, 1)) < share

    spikes = (
        (rng.random((n, T)) < _log_uniform(rng, 3e-4, 1e-2, size=(n, 1)))
        * rng.standard_t(2.5, (n, T)).clip(-8, 8)
        * 2
    )
    x = x + hit(0.12) * spikes
    x = x + hit(0.1) * rng.normal(0, 1.5, (n, 1)) * (t >= rng.integers(0, T, (n, 1)))
    begin, span = rng.integers(0, T, (n, 1)), rng.integers(8, T // 3 + 9, (n, 1))
    x = x + hit(0.06) * rng.normal(0, 2, (n, 1)) * np.clip((t - begin) / span, 0, 1)

    ranked = np.sort(x[:, ::4], axis=1)

    def quantile(q):
        return np.take_along_axis(ranked, (q * ranked.shape[1]).astype(int), 1)

    low, high = quantile(rng.uniform(0.02, 0.35, (n, 1))), quantile(rng.uniform(0.75, 0.98, (n, 1)))
    x = np.where(hit(0.06), np.maximum(x, low), x)
    x = np.where(hit(0.03), np.minimum(x, high), x)

    slower = hit(0.1)[
        :, 0
    ]  # sampled more finely than it was measured: straight lines between the points
    if slower.any():
        at = t * rng.uniform(0.3, 1.0, (int(slower.sum()), 1))
        lo = at.astype(int)
        w, rows, hi = at - lo, x[slower], np.minimum(lo + 1, T - 1)
        x[slower] = np.take_along_axis(rows, lo, 1) * (1 - w) + np.take_along_axis(rows, hi, 1) * w

    grain = _log_uniform(rng, 0.02, 0.4, size=(n, 1))
    x = np.where(hit(0.08), np.round(x / grain) * grain, x)

    stuck = (t >= begin) & (t < begin + np.minimum(span, 96)) & hit(0.05)
    return np.where(stuck, np.take_along_axis(x, begin, 1), x) * np.where(hit(0.3), -1.0, 1.0)


def _add_noise(rng, x, low, high, *, white):
    """x (made unit) plus noise of relative std in [low, high], white or coloured, at times growing
    with the signal.
    """
    n, T = x.shape
    x = _unit(x)
    beta = np.where(rng.random(n) < white, 0.0, rng.uniform(0.0, 1.6, n))
    noise = _coloured(rng, n, T, beta=beta)
    follows = np.clip(1 + rng.uniform(0, 0.9, (n, 1)) * _gate(rng, n, 0.3) * x, 0.1, None)
    return x + _log_uniform(rng, low, high, size=(n, 1)) * follows * noise


# ---- building blocks ----


def _day_shape(rng, n):
    """One period of a profile [n, GRID], unit variance: bumps from broad to spiky, a smooth curve,
    on/off blocks.
    """
    u = np.arange(GRID) / GRID
    x = np.zeros((n, GRID))
    for j in range(4):
        sharp = _log_uniform(rng, 0.5, 80, size=(n, 1))
        bump = np.exp(sharp * (np.cos(2 * np.pi * (u - rng.random((n, 1)))) - 1))
        x += _gate(rng, n, (1.0, 0.7, 0.4, 0.25)[j]) * rng.normal(0.6, 0.8, (n, 1)) * bump
    curve = _periodic_table(rng, _log_uniform(rng, 0.4, 2.5, size=n))
    x = _unit(x) * rng.uniform(0, 1, (n, 1)) + _unit(curve) * rng.uniform(0, 1, (n, 1))
    edge = _log_uniform(rng, 30, 400, size=(n, 1))
    block = np.tanh(
        edge * (np.cos(2 * np.pi * (u - rng.random((n, 1)))) - rng.uniform(-0.8, 0.8, (n, 1))) * 0.2
    )
    return _unit(x + _gate(rng, n, 0.2) * rng.uniform(0.3, 1.5, (n, 1)) * block)


def _periodic_table(rng, roughness):
    """One period [n, GRID] of a GP with kernel exp(-2 sin^2(pi u) / roughness^2): circulant, so the
    FFT is exact.
    """
    kernel = np.exp(-2 * (np.sin(np.pi * np.arange(GRID) / GRID) / roughness[:, None]) ** 2)
    return _from_circulant(rng, kernel)


def _stationary(rng, period, roughness, T):
    """[n, T] of a GP with an RBF or rational-quadratic kernel, times a periodic one where period is
    finite.

    By circulant embedding of more than twice the length; kernels that have not died out there are
    cut at zero power.
    """
    n, M = period.size, 1 << int(np.ceil(np.log2(2 * T)))
    lag = np.minimum(np.arange(M), M - np.arange(M)).astype(np.float64)
    local = np.isfinite(period)
    scale = np.where(
        local,
        _log_uniform(rng, 1, 8, size=n) * np.minimum(period, T / 8),
        _log_uniform(rng, 2, T / 4, size=n),
    )
    d2 = (lag / scale[:, None]) ** 2
    alpha = _log_uniform(rng, 0.3, 3, size=(n, 1))
    kernel = np.where(rng.random((n, 1)) < 0.6, np.exp(-d2 / 2), (1 + d2 / (2 * alpha)) ** -alpha)
    kernel[local] *= np.exp(
        -2 * (np.sin(np.pi * lag / period[local, None]) / roughness[local, None]) ** 2
    )
    return _from_circulant(rng, kernel)[:, :T]


def _from_circulant(rng, kernel):
    """Samples [n, M] of the periodic GPs whose covariance with step 0 is kernel [n,
    M] (symmetric).
    """
    n, M = kernel.shape
    power = np.clip(np.fft.rfft(kernel, axis=1).real, 0, None)
    return np.fft.irfft(
        np.sqrt(power) * np.fft.rfft(rng.standard_normal((n, M)), axis=1), M, axis=1
    )


def _smooth(rng, n, T, scale):
    """Gaussian-filtered noise [n, T] of unit variance; scale [n] in steps."""
    f = np.fft.rfftfreq(2 * T)
    gain = np.exp(-((np.pi * f * scale[:, None]) ** 2))
    return _spectral(rng, n, T, gain=gain)


def _coloured(rng, n, T, beta):
    """Noise [n, T] of unit variance with power 1/f^beta; beta [n]: 0 white, 1 pink, 2 like a random
    walk.
    """
    f = np.fft.rfftfreq(2 * T)
    f[0] = f[1]
    return _spectral(rng, n, T, gain=f ** (-beta[:, None] / 2))


def _spectral(rng, n, T, gain):
    """Twice the length is drawn and half kept, so that the end does not meet the beginning."""
    z = rng.standard_normal((n, T + 1, 2)).view(np.complex128)[..., 0]
    return _unit(np.fft.irfft(gain * z, 2 * T, axis=1)[:, :T])


def _ar(rng, n, T, rho):
    """Stationary AR(1) [n, T] of unit variance; rho [n]."""
    e = rng.standard_normal((T, n))
    e[1:] *= np.sqrt(1 - rho**2)
    for i in range(1, T):
        e[i] += rho * e[i - 1]
    return e.T


def _lookup(table, phase):
    """table [n, GRID] of one period, read at phase [n, T] in [0, 1) with straight lines between the
    entries.
    """
    at = phase * GRID
    lo = at.astype(np.int64)
    w = at - lo
    lo %= GRID
    return (
        np.take_along_axis(table, lo, 1) * (1 - w)
        + np.take_along_axis(table, (lo + 1) % GRID, 1) * w
    )


def _phase(rng, period, T):
    return (np.arange(T) / period[:, None] + rng.random((period.size, 1))) % 1


def _periods(rng, n):
    return np.where(
        rng.random(n) < 2 / 3,
        rng.choice(PERIODS, n, p=PERIOD_SHARES),
        _log_uniform(rng, 4, 720, size=n),
    )


def _gate(rng, n, share):
    """[n, 1]: 1 in `share` of the series, else 0."""
    return (rng.random((n, 1)) < share).astype(np.float64)


def _log_uniform(rng, low, high, size):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _unit(x):
    """Rows of zero mean and unit std; a constant row becomes zeros."""
    x = x - x.mean(1, keepdims=True)
    return x / np.maximum(x.std(1, keepdims=True), 1e-9)
