"""Check what training gave: whether a difference is more than chance."""

import numpy as np

from ltsm_jax.data import Windows
from ltsm_jax.tasks import forecasting


def block_means(total_N: np.ndarray, steps_N: np.ndarray, windows: Windows) -> np.ndarray:
    """Average over blocks of `horizon` consecutive starts, all variates together: float64 [blocks].

    Neighbouring windows share most of their targets and all variates share their time, so single windows are no
    independent draws; blocks nearly are. Blocks without any observed step are left out.

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
