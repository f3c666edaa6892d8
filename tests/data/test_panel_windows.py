"""Windows of a panel: rolling origins, item by item."""

import numpy as np
import pytest

from ltsm_jax.data import DataError, Series, prepare
from ltsm_jax.data.panel import Panel
from ltsm_jax.data.panel_windows import cut_panel, spread


def panel_of(*items, columns=("sold",)):
    """Items [C, rows] one after the other."""
    values = [np.atleast_2d(np.asarray(item, float)) for item in items]
    lengths = [item.shape[1] for item in values]
    return Panel(
        name="shops",
        ids=np.array([f"shop {i}" for i in range(len(items))], object),
        columns=columns,
        values=np.concatenate(values, axis=1),
        bounds=np.concatenate([[0], np.cumsum(lengths)]),
        first=np.array(["2024-01-01"] * len(items), "datetime64[us]"),
        freq="D",
    )


def numbered(*lengths):
    """Items whose values say where they are from: 1000 * item + row."""
    return panel_of(*[1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)])


def cut(windows):
    """Values [W, context + horizon] of windows of one target each, cut on the host: nothing to
    compile.
    """
    at = np.asarray(windows.starts)[:, None] + np.arange(windows.context_len + windows.horizon)
    return np.asarray(windows.values)[np.asarray(windows.rows)[:, None], at]


def own_values(splits, windows):
    """The same in data units, and the items."""
    item, _ = splits.origins(windows)
    rows = np.asarray(windows.rows)
    mean, std = splits.layout.mean[rows, item], splits.layout.std[rows, item]
    return cut(windows) * std[:, None] + mean[:, None], item


def test_windows_stay_inside_their_item():
    splits = cut_panel(numbered(60, 25, 40), 8, 3)
    for windows in (splits.train, splits.val, splits.test):
        values, item = own_values(splits, windows)
        steps = np.diff(values, axis=1)
        np.testing.assert_allclose(steps[~np.isnan(steps)], 1, atol=1e-2)
        np.testing.assert_array_equal(np.round(values[:, -1]) // 1000, item + 1)


def test_the_last_rows_test_those_before_validate_the_rest_trains():
    """60 rows: 42 train, 6 validate, 12 test. 10 rows are too short for that at horizon 3."""
    splits = cut_panel(numbered(60, 10), 4, 3)
    np.testing.assert_array_equal(splits.edges, [[42, 48, 60], [4, 7, 10]])
    item, origin = splits.origins(splits.test)
    np.testing.assert_array_equal(origin[item == 0], np.arange(48, 58))
    np.testing.assert_array_equal(origin[item == 1], [7])
    item, origin = splits.origins(splits.val)
    np.testing.assert_array_equal(origin[item == 0], np.arange(42, 46))
    np.testing.assert_array_equal(origin[item == 1], [4])
    item, origin = splits.origins(splits.train)
    assert origin[item == 0].max() == 39  # its target ends with the training rows
    np.testing.assert_array_equal(origin[item == 1], [1])


def test_an_item_shorter_than_a_context_begins_with_missing_values():
    splits = cut_panel(numbered(9), 6, 2)
    np.testing.assert_array_equal(splits.edges, [[5, 7, 9]])
    assert (
        splits.layout.front[0] == 4
    )  # what the first training window lacks: it shows a horizon of rows
    values, _ = own_values(splits, splits.val)
    np.testing.assert_allclose(
        values[0], [np.nan, 1000, 1001, 1002, 1003, 1004, 1005, 1006], atol=1e-2
    )
    values, _ = own_values(splits, splits.train)
    np.testing.assert_allclose(values[0, 4:], [1000, 1001, 1002, 1003], atol=1e-2)
    assert np.isnan(values[0, :4]).all()


def test_every_item_counts_in_its_own_unit():
    """Training rows have mean 0 and deviation 1 whatever the item's size; no later row has
    a say.
    """
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=(2, 100))
    large = 5e6 + 1e6 * large
    splits = cut_panel(panel_of(small, large), 8, 4)
    values = np.asarray(splits.layout.values[0])
    for i, item in enumerate((small, large)):
        begin = splits.layout.begin[i]
        mine = values[begin : begin + 100]
        np.testing.assert_allclose([mine[:70].mean(), mine[:70].std()], [0, 1], atol=1e-5)
        np.testing.assert_allclose(
            mine, (item - item[:70].mean()) / item[:70].std(), rtol=1e-4, atol=1e-5
        )


def test_one_item_is_cut_like_a_series():
    """The windows of `prepare`, in its order and its units."""
    rng = np.random.default_rng(1)
    values = np.cumsum(rng.normal(size=(2, 200)), axis=1)
    series = Series("walk", values, ("a", "b"))
    for joint in (False, True):
        mine = cut_panel(Panel.of(series), 16, 8, joint=joint, target_len=12)
        theirs = prepare(series, 16, 8, joint=joint)
        np.testing.assert_allclose(mine.layout.values, theirs.val.values, atol=1e-5)
        for part in ("train", "val", "test"):
            ours, expected = getattr(mine, part), getattr(theirs, part)
            np.testing.assert_array_equal(ours.starts, expected.starts)
            np.testing.assert_array_equal(ours.rows, expected.rows)
        longer = mine.training(12)
        assert longer.horizon == 12
        assert longer.n == theirs.training(12).n


def test_a_target_longer_than_the_cut_allows_is_refused():
    splits = cut_panel(numbered(20, 20), 8, 2)
    with pytest.raises(ValueError, match="target_len"):
        splits.training(12)
    assert cut_panel(numbered(20, 20), 8, 2, target_len=12).training(12).n == 2


def test_what_is_too_short_only_trains_and_is_counted():
    splits = cut_panel(numbered(30, 6, 3), 4, 3)
    item, _ = splits.origins(splits.test)
    assert set(item) == {0}
    item, _ = splits.origins(splits.train)
    assert set(item) == {0, 1}  # 3 rows hold no context before a target of 3
    assert "2 of 3 items are too short to be split at horizon 3 and only train" in splits.notes
    with pytest.raises(DataError, match="the longest allows a horizon of 2"):
        cut_panel(numbered(6, 5), 4, 3)


def test_still_items_are_not_scored_beside_others():
    flat = np.r_[np.zeros(28), 1e6 * np.ones(12)]
    splits = cut_panel(panel_of(np.arange(40.0), flat), 4, 3)
    for windows in (splits.val, splits.test):
        assert set(splits.origins(windows)[0]) == {0}
    assert "1 of 2 items do not move in their training rows and are not scored" in splits.notes
    alone = cut_panel(panel_of(np.ones(40)), 4, 3)
    assert alone.test.n > 0


def test_windows_without_an_observed_value_are_left_out():
    values = np.arange(60.0)
    values[50:56] = np.nan
    splits = cut_panel(panel_of(values), 4, 3)
    observed = ~np.isnan(cut(splits.test))
    assert observed[:, :4].any(axis=1).all()
    assert observed[:, 4:].any(axis=1).all()
    # Nothing is observed in the targets that begin in rows 50 to 53, nor in the contexts that end
    # before 54 to 56.
    np.testing.assert_array_equal(splits.origins(splits.test)[1], [48, 49, 57])
    assert any(note.startswith("test: 7 windows left out") for note in splits.notes)


def test_large_tables_are_thinned_evenly():
    assert list(spread(3, 5, seed=0)) == [0, 1, 2]
    numbers = spread(1000, 100, seed=0)
    assert ((numbers // 10) == np.arange(100)).all()
    assert len(set(numbers % 10)) > 5  # not the same hour of every day
    splits = cut_panel(numbered(*[60] * 30), 8, 3, most_train=50, most_scored=20)
    assert (splits.train.n, splits.val.n, splits.test.n) == (50, 20, 20)
    assert len(set(splits.origins(splits.test)[0])) > 10
    assert "test: 20 of 300 windows, spread evenly" in splits.notes


def test_infinite_values_are_refused():
    values = np.arange(40.0)
    values[3] = np.inf
    with pytest.raises(DataError, match="infinite values in sold"):
        cut_panel(panel_of(values), 4, 3)
