"""Anomaly scores that need no model: moving z-score, residual of the last value, matrix-profile
discord.

Each takes a whole series [T] and gives a score per row [T], higher is more anomalous. They look at
values alone, so any part of the result may be compared with a model's.
"""

from collections.abc import Callable

import numpy as np

BLOCK_BYTES = 2**27  # of the table of correlations that is held at a time
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

    Constant subsequences are alike to each other and unlike (correlation 0) to all else. Memory and
    time: blocks of 128 MB, T * T * length multiplications.
    Source: Yeh et al., "Matrix Profile I" (ICDM 2016); Keogh et al., "HOT SAX" (ICDM 2005) for
    discords.
    Raises: ValueError for a length below 4 or a series shorter than two lengths.
    """
    values = np.asarray(values, np.float64)
    if length < 4 or len(values) < 2 * length:
        raise ValueError(f"{len(values)} rows do not hold two subsequences of {length}, at least 4, rows")
    z, constant = _normalised(values, length)
    n, gap = len(z), max(length // 2, 1)
    nearest = np.empty(n, np.float32)
    block = max(1, BLOCK_BYTES // (4 * n))
    for start in range(0, n, block):
        stop = min(start + block, n)
        correlation = z[start:stop] @ z.T
        for i in range(start, stop):
            # Its own neighbours overlap it, and are like it for that alone.
            correlation[i - start, max(i - gap, 0) : i + gap + 1] = -1
        nearest[start:stop] = correlation.max(axis=1)
    if constant.sum() > 1:
        nearest[constant] = 1
    distance = np.sqrt(2 * length * np.maximum(1 - nearest.astype(np.float64), 0))
    front = (length - 1) // 2
    return np.pad(distance, (front, len(values) - n - front), mode="edge")


def _normalised(values: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale every subsequence to mean 0 and norm 1, [n, length] float32; and say which are constant
    [n]."""
    windows = np.lib.stride_tricks.sliding_window_view(values - values.mean(), length)
    mean = windows.mean(axis=1, keepdims=True)
    norm = np.sqrt(np.square(windows - mean).sum(axis=1, keepdims=True))
    constant = norm[:, 0] <= 1e-9 * max(np.abs(values).max(), 1e-12) * length
    scaled = (windows - mean) / np.where(constant[:, None], 1, norm)
    scaled[constant] = 0
    return scaled.astype(np.float32), constant


def period(values: np.ndarray) -> int:
    """Estimate the main period: the lag of 16 to 256 rows with the highest peak of autocorrelation.

    Only lags behind the first fall to a half are looked at, as a smooth series is like itself nearby.
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
