"""Borders, scaling and few-shot subsets against the numbers of the published protocol."""

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltsm_jax.data.benchmarks import BENCHMARKS, MissingDataError, load_series
from ltsm_jax.data.series import Series
from ltsm_jax.data.splits import Borders, Scaler, borders_of, few_shot_indices, naive_scale, prepare
from ltsm_jax.data.windows import steps_per_epoch

ETTH1_WINDOWS = 55_111


def series_of(n_rows, n_variates=1, benchmark=None, seed=0):
    values = np.random.default_rng(seed).normal(size=(n_variates, n_rows)).cumsum(axis=1)
    return Series("made", values, tuple(f"v{c}" for c in range(n_variates)), benchmark=benchmark)


@pytest.mark.parametrize(
    "name, quirks, windows, steps",
    [
        ("ETTh1", (), (7873, 2785, 2785), 27),
        ("ETTh2", (), (7873, 2785, 2785), 27),
        ("ETTm1", (), (33793, 11425, 11425), 116),
        ("ETTm2", (), (33793, 11425, 11425), 116),
        ("ETTm1", ("etm1_typo",), (48009, 6873, 13841), 165),
        ("ETTm2", ("etm1_typo",), (33793, 11425, 11425), 116),
        ("weather", (), (36120, 5175, 10444), 371),
        ("electricity", (), (17645, 2537, 5165), 2766),
        ("traffic", (), (11513, 1661, 3413), 4846),
        ("exchange_rate", (), (4544, 665, 1422), 18),
    ],
)
def test_windows_of_672_and_96_as_published(name, quirks, windows, steps):
    benchmark = BENCHMARKS[name]
    splits = prepare(series_of(benchmark.rows, benchmark=name), 672, 96, quirks=quirks)
    assert (splits.train.n, splits.val.n, splits.test.n) == windows
    assert steps_per_epoch(splits.train.n * benchmark.variates, 2048) == steps


def test_all_seven_variates_of_etth():
    splits = prepare(series_of(17420, 7, "ETTh1"), 672, 96)
    assert (splits.train.n, splits.val.n, splits.test.n) == (ETTH1_WINDOWS, 19_495, 19_495)
    assert splits.columns == tuple(f"v{c}" for c in range(7))


@pytest.mark.parametrize(
    "name, n_rows, quirks, ends",
    [
        ("ETTh1", 17420, (), (8640, 11520, 14400)),
        ("ettm2", 69680, (), (34560, 46080, 57600)),
        ("ETTm1", 69680, ("etm1_typo",), (48776, 55744, 69680)),
        ("ECL", 26304, (), (18412, 21044, 26304)),
        ("ILI", 966, (), (676, 773, 966)),
        ("weather", 52696, (), (36887, 42157, 52696)),
        ("exchange", 7588, (), (5311, 6071, 7588)),
        ("traffic_6", 17544, (), (12280, 14036, 17544)),
        ("solar", 52560, (), (36792, 42048, 52560)),
        ("PEMS08", 17856, (), (10713, 14285, 17856)),
        ("PEMS08", 17856, ("pems_ratio",), (12499, 14285, 17856)),
        ("my own", 1000, (), (700, 800, 1000)),
        (None, 1000, ("pems_ratio", "etm1_typo"), (700, 800, 1000)),
    ],
)
def test_borders_by_name(name, n_rows, quirks, ends):
    a, b, c = ends
    assert borders_of(name, n_rows, quirks) == Borders((0, a), (a, b), (b, c))


def test_a_file_cut_short_does_not_get_the_borders():
    with pytest.raises(
        ValueError, match=r"ETTh1: 14399 rows do not hold.*test \[11520, 14400\).*cut short"
    ):
        borders_of("ETTh1", 14_399)


@given(
    n_variates=st.integers(1, 3),
    edges=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    context_len=st.integers(1, 12),
    horizon=st.integers(1, 8),
)
@settings(max_examples=15)
def test_every_target_row_lies_in_its_part_and_none_is_missed(
    n_variates, edges, context_len, horizon
):
    start, *parts = edges
    sizes = parts[0] + context_len + horizon, parts[1] + horizon, parts[2] + horizon
    a, b, c, d = np.cumsum([start, *sizes]).tolist()
    borders = Borders((a, b), (b, c), (c, d))
    series = series_of(d + 3, n_variates)
    splits = prepare(series, context_len, horizon, borders=borders)
    scaled = splits.scaler.transform(series.values).astype(np.float32)
    for part, first in (("train", a + context_len), ("val", b), ("test", c)):
        windows, (_, hi) = getattr(splits, part), getattr(borders, part)
        target_starts = np.asarray(windows.starts) + context_len
        assert windows.n == n_variates * (hi - horizon - first + 1)
        pairs = list(zip(np.asarray(windows.rows).tolist(), target_starts.tolist(), strict=True))
        assert pairs == [(v, t) for v in range(n_variates) for t in range(first, hi - horizon + 1)]
        batch = windows.gather(np.array([windows.n - 1]))
        np.testing.assert_array_equal(batch["target"][0, 0], scaled[-1, hi - horizon : hi])


def test_scaling_uses_the_training_rows_and_the_population_std():
    series = series_of(1000, 3)
    train = series.values[:, :700]
    splits = prepare(series, 20, 5)
    np.testing.assert_allclose(splits.scaler.mean, train.mean(axis=1), rtol=1e-15)
    np.testing.assert_allclose(splits.scaler.std, train.std(axis=1), rtol=1e-15)
    changed = Series("made", series.values.copy(), series.columns)
    changed.values[:, 700:] += 100
    np.testing.assert_array_equal(prepare(changed, 20, 5).scaler.std, splits.scaler.std)
    few = prepare(series, 20, 5, few_shot=0.05)
    np.testing.assert_array_equal(
        few.scaler.mean, splits.scaler.mean
    )  # of all training rows, few-shot too
    np.testing.assert_allclose(
        splits.train.values,
        (series.values - train.mean(1)[:, None]) / train.std(1)[:, None],
        rtol=1e-6,
    )
    round_trip = splits.scaler.inverse(splits.scaler.transform(series.values))
    np.testing.assert_allclose(round_trip, series.values, rtol=1e-12)


def test_a_constant_variate_becomes_zeros_with_a_note(caplog):
    series = series_of(200, 2)
    series.values[1, :140] = 0.1  # its computed std is not exactly 0
    splits = prepare(series, 10, 5)
    assert splits.scaler.std[1] == 1
    assert not np.any(splits.train.values[1, :140] > 1e-6)
    assert "constant in the training rows" in splits.notes[0]
    assert "v1" in splits.notes[0]
    assert "constant" in caplog.text


@pytest.mark.parametrize(
    "ratio, stride, n, reached",
    [
        (0.01, 99, 551, 0.99),
        (0.05, 19, 2755, 0.95),
        (0.1, 9, 5511, 0.90),
        (0.2, 4, 11022, 0.80),
        (0.25, 4, 13777, 1.0),
        (0.4, 2, 22044, 0.80),
        (0.5, 2, 27555, 1.0),
        (0.75, 1, 41333, 0.75),
        (1, 1, 55111, 1.0),
    ],
)
def test_few_shot_windows_of_etth1(ratio, stride, n, reached):
    released = few_shot_indices(ETTH1_WINDOWS, ratio, {"few_shot_stride"})
    np.testing.assert_array_equal(released, np.arange(n) * stride)
    assert released[-1] / ETTH1_WINDOWS == pytest.approx(reached, abs=0.005)

    even = few_shot_indices(ETTH1_WINDOWS, ratio)
    assert even.tolist() == [j * ETTH1_WINDOWS // n for j in range(n)]
    assert even[-1] >= ETTH1_WINDOWS - ETTH1_WINDOWS / n - 1  # it reaches the last variate
    assert len(np.unique(even)) == n


def test_the_released_stride_ends_where_the_release_ends():
    assert few_shot_indices(ETTH1_WINDOWS, 0.1, {"few_shot_stride"})[-1] == 49_590
    assert few_shot_indices(ETTH1_WINDOWS, 0.05, {"few_shot_stride"})[-1] == 52_326


def test_few_shot_keeps_at_least_one_window_and_leaves_the_other_parts_alone():
    assert few_shot_indices(10, 0.001).tolist() == [0]
    series = series_of(500, 2)
    full, few = prepare(series, 20, 5), prepare(series, 20, 5, few_shot=0.1)
    keep = few_shot_indices(full.train.n, 0.1)
    np.testing.assert_array_equal(few.train.starts, full.train.starts[keep])
    np.testing.assert_array_equal(few.train.rows, full.train.rows[keep])
    assert (few.val.n, few.test.n) == (full.val.n, full.test.n)
    for ratio in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
            prepare(series, 20, 5, few_shot=ratio)


def test_joint_windows():
    splits = prepare(series_of(500, 3), 20, 5, joint=True)
    assert splits.train.n == 350 - 25 + 1
    assert splits.test.gather(np.arange(2))["context"].shape == (2, 3, 20)


def test_parts_too_short_are_named_with_what_would_fit():
    with pytest.raises(ValueError) as error:
        prepare(series_of(966, 7, "national_illness"), 672, 96)
    text = str(error.value)
    assert "train: 676 rows, needs 768 (672 context + 96 horizon)" in text
    assert "horizon 96 with context up to 580" in text
    assert "context 672 with horizon up to 4" in text
    prepare(series_of(966, 1, "national_illness"), 580, 96)
    prepare(series_of(966, 1, "national_illness"), 672, 4)
    with pytest.raises(ValueError) as error:
        prepare(series_of(966, 7, "national_illness"), 672, 98)
    assert "train: " in str(error.value)
    assert "val: 97 rows, needs 98 (horizon)" in str(error.value)
    with pytest.raises(ValueError, match=r"3 rows .* too short to be split"):
        prepare(series_of(3), 672, 96)


def test_infinite_values_are_refused():
    series = series_of(300, 2)
    series.values[1, 7] = np.inf
    with pytest.raises(ValueError, match=r"infinite values in v1"):
        prepare(series, 10, 5)


def test_missing_values_stay_and_windows_without_any_are_left_out_and_counted():
    whole = series_of(300, 2)
    holes = dataclasses.replace(whole, values=whole.values.copy())
    holes.values[0, 20:60] = np.nan
    splits, before = prepare(holes, 10, 5), prepare(whole, 10, 5)
    known = whole.values[0, np.r_[0:20, 60:210]]
    assert splits.scaler.mean[0] == pytest.approx(known.mean()) and splits.scaler.std[
        0
    ] == pytest.approx(known.std())
    assert (splits.scaler.mean[1], splits.scaler.std[1]) == (
        before.scaler.mean[1],
        before.scaler.std[1],
    )
    # of variate 0 all contexts in rows 20 to 59 go (31 of them), and all targets in them: 36, of
    # which 26 lie in both
    first = np.arange(210 - 15 + 1)
    gone = [s for s in first if (s >= 20 and s + 10 <= 60) or (s + 10 >= 20 and s + 15 <= 60)]
    kept = np.asarray(splits.train.starts)[np.asarray(splits.train.rows) == 0]
    np.testing.assert_array_equal(kept, np.setdiff1d(first, gone))
    assert splits.train.n == before.train.n - len(gone)
    assert f"train: {len(gone)} of {before.train.n} windows left out" in " ".join(splits.notes)
    assert (splits.val.n, splits.test.n) == (before.val.n, before.test.n)
    assert np.isnan(splits.train.values).sum() == 40
    joint = prepare(holes, 10, 5, joint=True)
    assert joint.train.n == len(first), "the other variate is observed"


@pytest.mark.parametrize(
    "ranges",
    [
        ((0, 5), (4, 9), (9, 12)),
        ((0, 5), (5, 5), (5, 12)),
        ((-1, 5), (5, 9), (9, 12)),
        ((5, 9), (0, 5), (9, 12)),
    ],
)
def test_borders_follow_one_another(ranges):
    with pytest.raises(ValueError, match="must follow one another"):
        Borders(*ranges)


def test_borders_beyond_the_series_and_unknown_quirks():
    with pytest.raises(ValueError, match="borders end at row 500, the series has 400"):
        prepare(series_of(400), 10, 5, borders=Borders((0, 300), (300, 400), (400, 500)))
    with pytest.raises(ValueError, match=r"unknown quirks \['etm_typo'\]; there are .*etm1_typo"):
        prepare(series_of(400), 10, 5, quirks="etm_typo")


def test_seasonal_naive_scale():
    series = series_of(300, 2)
    splits = prepare(series, 10, 5)
    scaled = Scaler.fit(series.values[:, :210]).transform(series.values[:, :210])
    want = [np.mean([abs(row[t] - row[t - 7]) for t in range(7, 210)]) for row in scaled]
    np.testing.assert_allclose(splits.naive_scale(7), want, rtol=1e-12)
    with pytest.raises(ValueError, match="needs more than"):
        naive_scale(scaled, 210)


@pytest.mark.skipif("LTSM_DATA" not in os.environ, reason="LTSM_DATA is not set")
@pytest.mark.parametrize("name", ["ETTh1", "ETTm1", "weather", "exchange_rate"])
def test_the_real_files(name):
    try:
        series = load_series(name, download=False)
    except MissingDataError:
        pytest.skip(f"{name} is not in LTSM_DATA")
    benchmark = BENCHMARKS[name]
    assert series.values.shape == (benchmark.variates, benchmark.rows)
    assert series.notes == ()
    splits = prepare(series, 672, 96)
    lo, hi = splits.borders.train
    train = np.asarray(splits.train.values)[:, lo:hi].astype(np.float64)
    np.testing.assert_allclose(train.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(train.std(axis=1), 1, atol=1e-6)
    assert splits.train.describe(0)["first"] == str(series.timestamps[0].item())
