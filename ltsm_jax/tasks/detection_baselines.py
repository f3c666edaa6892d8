"""Anomaly scores that need no model: moving z-score, residual of the last value, matrix-profile
discord.

Each takes a whole series [T] and gives a score per row [T], higher is more anomalous. They look at
values alone, so any part of the result may be compared with a model's.
"""

from collections.abc import Callable

import numpy as np

PERIODS = (16, 256)  # shortest and longest subsequence
USUAL_PERIOD = 96


def last_value(values: np.ndarray) -> np.ndarray:
    """Score a row by its squared difference to the row before; the first row gets 0."""
    return np.square(np.diff(values, prepend=values[:1]))


def moving_z_score(values: np.ndarray, width: int = 96) -> np.ndarray:
    """Score a row by its distance from the mean of the `width` rows before, in their standard
    deviations.

    Rows with fewer before them take those there are; the first row gets 0. A stretch that is
    constant counts with a millionth of the whole series' deviation, so that a jump out of it is far
    but finite.
    """
    values = np.asarray(values, np.float64)
    centred = values - values.mean()
    total = np.concatenate([[0.0], np.cumsum(centred)])
    squares = np.concatenate([[0.0], np.cumsum(np.square(centred))])
    row = np.arange(len(values))
    first = np.maximum(row - width, 0)
    count = np.maximum(row - first, 1)
    mean = (total[row] - total[first]) / count
    variance = np.maximum((squares[row] - squares[first]) / count - np.square(mean), 0)
    floor = 1e-6 * max(centred.std(), 1e-12)
    scores = np.abs(centred - mean) / np.maximum(np.sqrt(variance), floor)
    scores[0] = 0
    return scores


def discord(values: np.ndarray, length: int) -> np.ndarray:
    """Score a row by how far the subsequence around it is from the one most like it in the series.

    The exact matrix profile: every z-normalised subsequence of `length` rows is correlated with
    every other, those that begin within half a length left out, and its score is the Euclidean
    distance to the nearest. A row takes the score of the subsequence that has it in the middle. The
    largest is the discord.

    Constant subsequences are alike to each other and unlike (correlation 0) to all else. Time: T *
    T, two minutes of a core for 128,000 rows.
    Source: Yeh et al., "Matrix Profile I" (ICDM 2016); Keogh et al., "HOT SAX" (ICDM 2005) for
    discords; the order of the sums, diagonal by diagonal, is that of Zhu et al., "SCRIMP" (ICDM
    2018).
    Raises: ValueError for a length below 4 or a series shorter than two lengths.
    """
    values = np.asarray(values, np.float64)
    if length < 4 or len(values) < 2 * length:
        told = f"two subsequences of {length}, at least 4, rows"
        raise ValueError(f"{len(values)} rows do not hold {told}")
    centred = values - values.mean()
    mean, inverse, constant = _moments(centred, length)
    n = len(mean)
    nearest = np.full(n, -1.0)
    for lag in range(max(length // 2, 1) + 1, n):
        # The dot products of all pairs that are `lag` apart are differences of one running sum.
        total = np.cumsum(centred[: len(centred) - lag] * centred[lag:])
        product = total[length - 1 :].copy()
        product[1:] -= total[: n - lag - 1]
        product -= length * mean[: n - lag] * mean[lag:]
        product *= inverse[: n - lag]
        product *= inverse[lag:]
        np.maximum(nearest[: n - lag], product, out=nearest[: n - lag])
        np.maximum(nearest[lag:], product, out=nearest[lag:])
    if constant.sum() > 1:
        nearest[constant] = 1
    distance = np.sqrt(2 * length * np.maximum(1 - nearest, 0))
    front = (length - 1) // 2
    return np.pad(distance, (front, len(values) - n - front), mode="edge")


def _moments(centred: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give mean and 1 / norm of every subsequence [n], the latter 0 for constant ones, and which
    those are."""
    windows = np.lib.stride_tricks.sliding_window_view(centred, length)
    mean = windows.mean(axis=1)
    norm = windows.std(axis=1) * np.sqrt(length)
    constant = norm <= 1e-9 * max(np.abs(centred).max(), 1e-12) * length
    inverse = np.where(constant, 0, 1 / np.where(constant, 1, norm))
    return mean, inverse, constant


def period(values: np.ndarray) -> int:
    """Estimate the main period: the lag of 16 to 256 rows with the highest peak of autocorrelation.

    Only lags behind the first fall to a half are looked at, as a smooth series is like itself
    nearby.
    Returns: 96 where there is no peak.
    """
    values = np.asarray(values, np.float64)
    centred = values - values.mean()
    size = 1 << (2 * len(values) - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    low, high = PERIODS
    # Sums and not means of products: a multiple of the period comes out lower than the period.
    found = np.fft.irfft(np.square(np.abs(spectrum)), size)[: min(high + 2, len(values))]
    fallen = np.flatnonzero(found < found[0] / 2)
    first = max(low, int(fallen[0])) if len(fallen) else len(found)
    best, place = 0.0, USUAL_PERIOD
    for lag in range(first, len(found) - 1):
        peak = found[lag] > found[lag - 1] and found[lag] >= found[lag + 1]
        if peak and found[lag] > best:
            best, place = found[lag], lag
    return place


def scorers(train: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Give every baseline by its name; `train` [b]: anomaly-free rows, for the length of
    subsequences."""
    length = period(train)

    def discords(values: np.ndarray) -> np.ndarray:
        return discord(values, length)

    return {"last": last_value, "z_score": moving_z_score, "discord": discords}
