"""Split-conformal quantiles: their order statistics, their record, and that they cover what they
say.
"""

import dataclasses

import numpy as np
import pytest

from ltsm_jax.data.panel import Panel
from ltsm_jax.methods.conformal import ENOUGH, GRID, Calibration, rolling_origins
from ltsm_jax.tasks import panels
from ltsm_jax.tasks.forecasting import SeasonalNaive
from ltsm_jax.tasks.panels import Origins, PanelForecast, error_unit


def found(n=1, c=1, horizon=2, point=0.0, unit=1.0):
    shape = (n, c, horizon)
    return PanelForecast(np.full(shape, point), np.zeros((*shape, 0)), (), np.full((n, c), unit))


def panel(*lengths, targets=1):
    rows = sum(lengths)
    return Panel(
        name="walk",
        ids=np.arange(len(lengths)),
        columns=tuple(f"y{i}" for i in range(targets)),
        values=np.random.default_rng(0).normal(size=(targets, rows)).cumsum(axis=1),
        bounds=np.concatenate([[0], np.cumsum(lengths)]),
    )


def test_levels_are_the_order_statistics_of_n_plus_one():
    errors = np.random.default_rng(0).permutation(np.arange(1, 20, dtype=float)).reshape(19, 1, 1)
    got = Calibration.of(errors, 19, "").quantiles(found(horizon=1), (0.05, 0.1, 0.5, 0.9, 0.95))
    np.testing.assert_array_equal(got.ravel(), [1, 2, 10, 18, 19])


def test_orders_are_rounded_away_from_the_middle():
    errors = np.arange(1, 25, dtype=float).reshape(24, 1, 1)
    got = Calibration.of(errors, 24, "").quantiles(found(horizon=1), (0.1, 0.9))
    np.testing.assert_array_equal(got.ravel(), [2, 23])


def test_where_windows_are_too_few_the_largest_error_stands_in_on_both_sides():
    errors = np.array([[1.0, 2.0], [0.5, -7.0], [0.2, 3.0]])[:, None]
    kept = Calibration.of(errors, 3, "of a test")
    np.testing.assert_array_equal(kept.quantiles(found(), (0.1, 0.9))[0, 0], [[-7, 7], [-7, 7]])
    assert kept.too_few((0.1, 0.5, 0.9)) == (0.1, 0.9)
    assert kept.describe((0.1, 0.5)).endswith(
        "; too few for 0.1, where the largest error stands in"
    )


def test_quantiles_are_in_the_unit_of_each_context_and_rise_with_the_level():
    kept = Calibration.of(np.random.default_rng(0).normal(size=(200, 1, 2)), 200, "")
    one, ten = (kept.quantiles(found(point=3.0, unit=u), (0.05, 0.33, 0.95)) for u in (1.0, 10.0))
    np.testing.assert_allclose(ten - 3, 10 * (one - 3))
    assert (np.diff(one) > 0).all()
    np.testing.assert_array_equal(
        kept.quantiles(found(point=3.0, unit=0.0), (0.05, 0.95)), np.full((1, 1, 2, 2), 3.0)
    )


def test_targets_have_quantiles_of_their_own_where_windows_are_enough():
    errors = np.random.default_rng(0).normal(size=(ENOUGH, 2, 1)) * np.array([[[1.0], [10.0]]])
    own = Calibration.of(errors, ENOUGH, "").quantiles(found(c=2, horizon=1), (0.9,))[0, :, 0, 0]
    assert own[1] > 5 * own[0]
    pooled = Calibration.of(errors, ENOUGH - 1, "").quantiles(found(c=2, horizon=1), (0.9,))[
        0, :, 0, 0
    ]
    assert pooled[0] == pooled[1]
    errors[0, 0] = np.nan
    assert len(Calibration.of(errors, ENOUGH, "").offsets) == 1


def test_the_record_gives_the_same_back():
    kept = Calibration.of(np.random.default_rng(0).normal(size=(60, 1, 3)), 20, "of a test")
    again = Calibration.from_json(kept.to_json())
    np.testing.assert_allclose(again.offsets, kept.offsets, rtol=1e-6)
    assert again.told == kept.told
    assert "about 20 windows do not overlap" in again.told
    assert again.fits(3, 5)
    assert not again.fits(4, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": [[[1.0]]]},
        {"offsets": None},
        {"counts": []},
        {"grid": [0.5] * len(GRID)},
        {"apart": "many"},
    ],
)
def test_a_damaged_record_is_refused(change):
    kept = Calibration.of(np.random.default_rng(0).normal(size=(60, 1, 3)), 20, "").to_json()
    with pytest.raises(ValueError, match="calibration|offsets|levels"):
        Calibration.from_json(kept | change)


def test_a_falling_record_is_refused():
    kept = Calibration.of(np.random.default_rng(0).normal(size=(60, 1, 3)), 20, "").to_json()
    kept["offsets"][0][1].reverse()
    with pytest.raises(ValueError, match="levels rise"):
        Calibration.from_json(kept)


def test_origins_lie_in_their_items_and_leave_a_context():
    every = panel(100, 13, 7, 40)
    got = rolling_origins(every, 6, 20)
    assert set(got.items) == {0, 1, 3}, "seven rows hold no context of four and a horizon of six"
    start, stop = every.bounds[got.items], every.bounds[got.items + 1]
    assert (got.ends + 6 <= stop).all()
    assert (got.ends - start >= np.minimum(stop - start, 20) / 2).all()
    first = got.ends[got.items == 0]
    assert first.min() == 10 and first.max() == 94, (
        "from the oldest that has half a context to the newest"
    )


def test_long_items_have_whole_contexts():
    assert rolling_origins(panel(400), 6, 20).ends.min() == 20


def test_origins_are_few_where_items_are_many():
    assert len(rolling_origins(panel(*[30] * 2000), 6, 20).items) == 512
    assert len(rolling_origins(panel(4000, targets=50), 6, 20).items) == 128


def test_the_unit_knows_spread_and_repetition_and_is_zero_where_nothing_moves():
    wave = np.tile([1.0, -1.0, 1.0, -1.0], 25)
    assert error_unit(wave, 1) == pytest.approx(np.sqrt(2))
    assert error_unit(wave, 2) == pytest.approx(0.1), "a hundredth of the spread at least"
    holes = np.where(np.arange(100) % 7 == 0, np.nan, wave)
    assert error_unit(holes, 1) == pytest.approx(np.sqrt(2), rel=0.05)
    assert error_unit(np.zeros(50), 1) == 0


def test_a_context_that_does_not_move_takes_the_unit_of_the_whole_item():
    still = panel(200)
    values = np.concatenate([np.sin(np.arange(150)), np.zeros(50)])[None]
    still = dataclasses.replace(still, values=values)
    got = panels.forecast_panel(SeasonalNaive(), {}, still, 2, context_len=40, season=1)
    assert 0.5 < got.unit[0, 0] < 1


def test_covers_what_it_says_on_rows_that_come_later():
    """A walk with steps that grow: an interval of 80 % holds 80 % of what comes, in units of the
    context.
    """
    rng = np.random.default_rng(0)
    scale = np.linspace(1, 3, 6000)
    walk = dataclasses.replace(
        panel(6000), values=(rng.standard_t(4, size=6000) * scale).cumsum()[None]
    )
    past = dataclasses.replace(walk, values=walk.values[:, :4000], bounds=np.array([0, 4000]))

    def after(panel, ends):
        origins = Origins(np.zeros(len(ends), int), ends)
        return origins, panels.forecast_panel(
            SeasonalNaive(), {}, panel, 8, context_len=64, origins=origins, season=1
        )

    kept = Calibration.measured(
        past, *after(past, rolling_origins(past, 8, 64).ends), "of the past"
    )
    ends = np.arange(4000, 5992, 2)
    _, later = after(walk, ends)
    true = walk.values[0, ends[:, None] + np.arange(8)]
    for share in (0.8, 0.95):
        quantiles = kept.quantiles(later, ((1 - share) / 2, (1 + share) / 2))[:, 0]
        inside = (quantiles[..., 0] <= true) & (true <= quantiles[..., 1])
        assert abs(inside.mean() - share) < 0.05
