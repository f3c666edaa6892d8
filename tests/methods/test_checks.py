import dataclasses

import jax
import numpy as np
import pytest

from ltsm_jax.methods.checks import bootstrap_difference, paired_difference
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
    assert (high - low) / 2 == pytest.approx(
        1.96 * np.std([(-1.0) ** i for i in range(n)], ddof=1) / n**0.5, rel=1e-6
    )


def gaps(blocks, items, mean, seed=0, shared=0.0, own=0.0):
    """Windows of 5 steps in blocks of 4 origins: a mean, and what blocks and items have
    in common.
    """
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks), 4 * items)
    item = np.tile(np.arange(items), 4 * blocks)
    gap = mean + shared * rng.normal(size=blocks)[block] + own * rng.normal(size=items)[item]
    noisy = gap + 0.01 * rng.normal(size=len(gap))
    return 5 * noisy, np.full(len(gap), 5), block, item


def test_the_interval_holds_the_mean_and_says_what_it_comes_from():
    found = bootstrap_difference(*gaps(20, 1, -1.0, shared=0.3))
    assert found.mean == pytest.approx(-1.0, abs=0.2)
    assert found.low < found.mean < found.high < 0
    assert (found.units, found.blocks, found.items) == ("blocks", 20, 1)
    assert found.shown
    # A hand count of the width: t(19) sd / sqrt(n), wider as neighbours overlap.
    spread = 0.3 * 2.093 / 20**0.5 * (1.25 / 0.75) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(spread, rel=0.35)


def test_the_wider_of_blocks_and_items_counts():
    by_items = bootstrap_difference(*gaps(20, 10, 0.0, own=1.0))
    assert by_items.units == "items"
    by_blocks = bootstrap_difference(*gaps(20, 10, 0.0, shared=1.0))
    assert by_blocks.units == "blocks"
    # One origin in time: items alone can say something.
    one = bootstrap_difference(*gaps(1, 30, -1.0, own=0.1))
    assert (one.units, one.blocks) == ("items", 1)


def test_few_units_give_no_interval():
    found = bootstrap_difference(*gaps(3, 3, -1.0, shared=0.01))
    assert found.units == "" and np.isnan([found.low, found.high]).all()
    assert not found.shown
    assert bootstrap_difference(*gaps(4, 3, -1.0, shared=0.01)).units == "blocks"


def test_unobserved_windows_do_not_count():
    gap, steps, block, item = gaps(10, 1, -1.0, shared=0.1)
    more = [np.append(gap, 0.0), np.append(steps, 0), np.append(block, 99), np.append(item, 7)]
    assert bootstrap_difference(*more) == bootstrap_difference(gap, steps, block, item)
    with pytest.raises(ValueError, match="nothing to compare"):
        bootstrap_difference(gap, 0 * steps, block, item)


@pytest.mark.parametrize("blocks", [4, 6, 12])
def test_equal_forecasts_are_seldom_told_apart(blocks):
    """Targets of 8 rows overlap; at most 5 % of the intervals of each side should lie off zero (2.5
    % nominal).
    """
    rng = np.random.default_rng(blocks)
    h, n = 8, 200
    wrong = 0
    for seed in range(n):
        errors = np.convolve(rng.normal(size=blocks * h + h - 1), np.ones(h), "valid")
        block = np.arange(blocks * h) // h
        found = bootstrap_difference(
            errors, np.full(blocks * h, h), block, 0 * block, seed=seed, resamples=300
        )
        wrong += found.high < 0
    assert wrong <= 0.05 * n
