import dataclasses

import jax
import numpy as np
import pytest

from ltsm_jax.methods.checks import paired_difference
from ltsm_jax.tasks import forecasting
from ltsm_jax.tasks.forecasting import collapse


def test_flat_forecasts_are_named(model, pre, splits):
    flat = jax.tree.map(np.array, pre)
    flat["head"] = jax.tree.map(np.zeros_like, flat["head"])
    assert "collapsed" in collapse(model, flat, splits.val)[0]
    assert collapse(model, pre, splits.val) == ()


def test_paired_interval_is_of_blocks_not_of_windows(splits, model, pre):
    before = forecasting.errors(model, pre, splits.val)
    shifted = dataclasses.replace(before, squared=before.squared + 8.0)
    mean, (low, high) = paired_difference(before, shifted, splits.val)
    assert mean == pytest.approx(1.0) and high - low == pytest.approx(0.0, abs=1e-9)
    # the same gap over all windows of a block, of alternating sign: as many draws as blocks
    block = (np.asarray(splits.val.starts) - int(splits.val.starts.min())) // 8
    swing = dataclasses.replace(before, squared=before.squared + 8.0 * (-1.0) ** block[:, None])
    _, (low, high) = paired_difference(before, swing, splits.val)
    n = block.max() + 1
    assert (high - low) / 2 == pytest.approx(1.96 * np.std([(-1.0) ** i for i in range(n)], ddof=1) / n**0.5, rel=1e-6)
