"""Check what training gave: whether a difference is more than chance."""

import dataclasses

import numpy as np

from ltsm_jax.data import Windows
from ltsm_jax.tasks import forecasting

RESAMPLES = 2000
FEWEST = 4  # units that an interval needs
# correlation of the means of neighbouring blocks of overlapping targets, if nothing else ties them
OVERLAP = 0.25
MOST_TIED = 0.9


def block_means(total_N: np.ndarray, steps_N: np.ndarray, windows: Windows) -> np.ndarray:
    """Average over blocks of `horizon` consecutive starts, all variates together: float64 [blocks].

    Neighbouring windows share most of their targets and all variates share their time, so single
    windows are no independent draws; blocks nearly are. Blocks without any observed step are left
    out.

    Args:
      total_N: sum over the observed steps of each window [N]. steps_N: how many those are [N].
    """
    starts_N = np.asarray(windows.starts)
    block_N = (starts_N - starts_N.min()) // windows.horizon
    steps = np.bincount(block_N, steps_N)
    return np.bincount(block_N, total_N)[steps > 0] / steps[steps > 0]


def paired_difference(
    before: forecasting.Errors, after: forecasting.Errors, windows: Windows
) -> tuple[float, tuple[float, float]]:
    """Mean difference in MSE (after - before) over the same windows, and about 95 % around it.

    The interval comes from `block_means`. Steps whose target is missing count in neither.

    Returns: (difference, (low, high)); the interval is NaN where there are fewer than two blocks.
    """
    gap_N = (after.squared - before.squared).sum(axis=1)
    steps_N = before.steps.sum(axis=1)
    mean = float(gap_N.sum() / steps_N.sum())
    means = block_means(gap_N, steps_N, windows)
    if len(means) < 2:
        return mean, (float("nan"), float("nan"))
    spread = 1.96 * float(means.std(ddof=1)) / len(means) ** 0.5
    return mean, (mean - spread, mean + spread)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean difference in MSE of two forecasts of the same windows; below zero the first is better.

    Attributes:
      mean: over all observed steps.
      low, high: about 95 % around it; NaN where there are too few units to estimate it from.
      units: what the interval comes from: "blocks" of time, "items", or "" where there is none.
      blocks, items: how many of them there are.
    """

    mean: float
    low: float
    high: float
    units: str
    blocks: int
    items: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def bootstrap_difference(
    gap_W: np.ndarray,
    steps_W: np.ndarray,
    block_W: np.ndarray,
    item_W: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Mean difference over windows, with the wider of two paired block-bootstrap intervals.

    Windows of one stretch of time share what happened then, and windows of one item share the item,
    so neither are independent draws. Once blocks of time with all their items are drawn with
    replacement, once items with all their windows; whichever interval is wider counts. One that
    comes from fewer than `FEWEST` units is none.

    A percentile interval of few units is too narrow. Both arms are therefore widened by
    t(0.975, n - 1) / 1.96 * sqrt(n / (n - 1)) (the expanded interval of Hesterberg, arXiv
    1411.5279, with widths in place of levels), and, as targets of neighbouring blocks overlap,
    those of blocks also by sqrt((1 + r) / (1 - r)) with r the correlation of neighbours, at least
    `OVERLAP`.

    Args:
      gap_W: squared errors of the first forecast minus those of the second, summed over the
        observed steps of each window. steps_W: how many these are; windows without any do not
          count.
      block_W: number of the block of time of each window. item_W: number of its item.
      seed: of the draws.
    """
    seen = steps_W > 0
    gap_W, steps_W, block_W, item_W = gap_W[seen], steps_W[seen], block_W[seen], item_W[seen]
    if not len(gap_W):
        raise ValueError("no target of these windows is observed: there is nothing to compare")
    mean = float(gap_W.sum() / steps_W.sum())

    found = {}
    counts = {}
    for name, unit_W in (("blocks", block_W), ("items", item_W)):
        numbers, place_W = np.unique(unit_W, return_inverse=True)
        counts[name] = len(numbers)
        if len(numbers) < FEWEST:
            continue
        totals, steps = np.bincount(place_W, gap_W), np.bincount(place_W, steps_W)
        widen = _small_sample(len(numbers))
        if name == "blocks":
            widen *= _tied(totals / steps, numbers)
        low, high = _percentiles(totals, steps, seed, resamples=resamples)
        found[name] = mean + widen * min(low - mean, 0.0), mean + widen * max(high - mean, 0.0)

    low, high, units = float("nan"), float("nan"), ""
    if found:
        units = max(found, key=lambda name: found[name][1] - found[name][0])
        low, high = found[units]
    return Difference(
        mean=mean,
        low=float(low),
        high=float(high),
        units=units,
        blocks=counts["blocks"],
        items=counts["items"],
    )


def _percentiles(
    totals: np.ndarray, steps: np.ndarray, seed: int, resamples: int
) -> tuple[float, float]:
    """2.5 and 97.5 percent points of the mean over units drawn with replacement."""
    rng = np.random.default_rng(seed)
    n = len(totals)
    means = []
    # Some resamples at a time: all of them are units times resamples numbers.
    for first in range(0, resamples, 100):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(100, resamples - first))
        means.append((drawn @ totals) / (drawn @ steps))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _small_sample(n: int) -> float:
    """Factor by which an interval of `n` units has to be wider than its percentiles."""
    from scipy.special import stdtrit  # of a dependency of JAX

    return float(stdtrit(n - 1, 0.975)) / 1.96 * (n / (n - 1)) ** 0.5


def _tied(means: np.ndarray, numbers: np.ndarray) -> float:
    """Factor by which an interval has to be wider because neighbouring blocks are correlated."""
    centred = means - means.mean()
    next_to = np.diff(numbers) == 1
    variance = np.square(centred).mean()
    if not variance > 0:
        return 1.0
    shared = (centred[1:] * centred[:-1])[next_to].sum() / len(means)
    r = min(max(shared / variance, OVERLAP), MOST_TIED)
    return ((1 + r) / (1 - r)) ** 0.5
