"""`Panel`: items of different lengths in one ragged array."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from ltsm_jax.data.panel import Panel
from ltsm_jax.data.series import DataError, Series
from ltsm_jax.data.tables import read_series
from ltsm_jax.frequency import DayRule


def panel(freq="D", tz=None):
    return Panel(
        name="shops",
        ids=np.array(["a", "b"], object),
        columns=("sold",),
        values=np.arange(5.0)[None],
        bounds=np.array([0, 3, 5]),
        first=np.array(["2024-01-30", "2024-02-28"], "datetime64[us]"),
        freq=freq,
        tz=tz,
        known=("price",),
        known_values=10 + np.arange(5.0)[None],
        future_values=np.arange(4.0).reshape(1, 2, 2),
    )


def test_contexts_of_shorter_items_begin_with_missing_values():
    found = panel().contexts(np.array([1, 0]), 3)
    np.testing.assert_array_equal(found, [[[np.nan, 3, 4]], [[0, 1, 2]]])
    known = panel().contexts(np.array([1]), 1, panel().known_values)
    np.testing.assert_array_equal(known, [[[14]]])


def test_every_item_goes_on_after_its_own_end():
    np.testing.assert_array_equal(
        panel().stamps_after(2),
        np.array([["2024-02-02", "2024-02-03"], ["2024-03-01", "2024-03-02"]], "datetime64[us]"),
    )


def test_months_follow_by_the_calendar():
    one = Panel.of(
        Series(
            "y",
            np.zeros((1, 2)),
            ("y",),
            np.array(["2024-01-31", "2024-02-29"], "datetime64[us]"),
            "M",
        )
    )
    assert str(one.stamps_after(2)[0, -1])[:10] == "2024-04-30"


def test_the_end_of_february_is_the_end_of_a_month_where_other_items_say_so():
    two = dataclasses.replace(
        panel("M"),
        first=np.array(["2024-01-31", "2024-02-29"], "datetime64[us]"),
    )
    assert two.stamps_after(1).astype("datetime64[D]").astype(str).tolist() == [
        ["2024-04-30"],
        ["2024-04-30"],
    ]
    assert two.item(1).timestamps.astype("datetime64[D]").astype(str).tolist() == [
        "2024-02-29",
        "2024-03-31",
    ]


def test_rules_of_days_in_the_month_go_with_their_items():
    rules = (DayRule("day", 31), DayRule("day", 15))
    two = dataclasses.replace(
        panel("M"),
        first=np.array(["2024-01-31", "2024-02-15"], "datetime64[us]"),
        rules=rules,
    )
    assert two.stamps_after(1).astype("datetime64[D]").astype(str).tolist() == [
        ["2024-04-30"],
        ["2024-04-15"],
    ]
    swapped = two.take(np.array([1, 0]))
    assert swapped.rules == rules[::-1]
    assert swapped.stamps_after(1).astype("datetime64[D]").astype(str).tolist() == [
        ["2024-04-15"],
        ["2024-04-30"],
    ]


def test_months_of_a_zone_are_those_on_the_wall():
    stamps = pd.date_range("2024-01-31", periods=3, freq="ME", tz="America/New_York")
    series = read_series(pd.DataFrame({"ds": stamps, "y": 1.0}))
    after = Panel.of(series).stamps_after(1)
    np.testing.assert_array_equal(after[0], series.stamps_after(1))
    assert str(after[0, 0]) == "2024-04-30T04:00:00.000000"


def test_an_item_is_a_series_and_items_can_be_taken():
    second = panel().take(np.array([1]))
    assert (
        second.n_items == 1 and second.ids[0] == "b" and second.future_values.tolist() == [[[2, 3]]]
    )
    np.testing.assert_array_equal(second.known_values, [[13, 14]])
    series = panel().item(0)
    assert series.columns == ("sold",) and str(series.timestamps[-1])[:10] == "2024-02-01"


@pytest.mark.parametrize("bounds", [[0, 5], [0, 5, 5], [1, 3, 5], [0, 3, 4]])
def test_bounds_must_be_those_of_the_items(bounds):
    with pytest.raises(DataError):
        Panel(
            name="x",
            ids=np.array(["a", "b"]),
            columns=("y",),
            values=np.zeros((1, 5)),
            bounds=np.array(bounds),
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"future_values": np.zeros((1, 3, 2))},
        {"known_values": np.zeros((1, 4))},
        {"first": np.zeros(3, "datetime64[us]")},
        {"static": pd.DataFrame({"size": [1]})},
        {"columns": ("a", "b")},
    ],
)
def test_parts_of_other_shapes_are_refused(wrong):
    with pytest.raises(DataError):
        dataclasses.replace(panel(), **wrong)
