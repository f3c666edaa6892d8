"""A column of time: one layout for all cells, both readings where two hold, zones kept."""

import datetime

import numpy as np
import pandas as pd
import pytest

from ltsm_jax.data.stamps import holds_dates, parse_stamps


def read(cells, **options):
    """(stamps as text, zone, notes) of a column that can be read."""
    problems, notes = [], []
    found = parse_stamps(pd.Series(cells, name="when"), problems, notes, **options)
    assert found is not None, problems
    assert not problems
    return [str(s).removesuffix(".000000") for s in found[0]], found[1], notes


def refused(cells, **options) -> str:
    problems = []
    assert parse_stamps(pd.Series(cells, name="when"), problems, [], **options) is None
    assert len(problems) == 1
    return problems[0]


FIRSTS = [f"01/{month:02}/2023" for month in range(1, 13)]


@pytest.mark.parametrize(
    "cells, second",
    [
        (["2024-01-01 00:00", "2024-01-01 01:00"], "2024-01-01T01:00:00"),
        (["2024/1/1", "2024/1/2"], "2024-01-02T00:00:00"),
        (["20240101T0000", "20240101T0100"], "2024-01-01T01:00:00"),
        (["31/01/2024", "29/02/2024"], "2024-02-29T00:00:00"),
        (["01/31/2024", "02/29/2024"], "2024-02-29T00:00:00"),
        (["13.01.2024 23:00", "14.01.2024 24:00"], "2024-01-15T00:00:00"),
        (["1/30/2024 11:30:00 PM", "1/31/2024 12:30:00 AM"], "2024-01-31T00:30:00"),
        (["Jan-24", "Feb-24"], "2024-02-01T00:00:00"),
        (["2024-Jan", "2024-Feb"], "2024-02-01T00:00:00"),
        (["May 2024", "June 2024", "Sept 2024"], "2024-06-01T00:00:00"),
        (["05-Jan-2024", "06-Jan-2024"], "2024-01-06T00:00:00"),
        (["05-JAN-24", "06-JAN-24"], "2024-01-06T00:00:00"),
        (["Jan 5, 2024", "Jan 6, 2024"], "2024-01-06T00:00:00"),
        (["Fri, 5 January 2024", "Sat, 6 January 2024"], "2024-01-06T00:00:00"),
        (["01JAN2024:05:00:00", "01JAN2024:06:00:00"], "2024-01-01T06:00:00"),
        (["2024Q1", "2024Q2"], "2024-04-01T00:00:00"),
        (["Q1 2024", "Q2 2024"], "2024-04-01T00:00:00"),
        (["1Q2024", "2Q2024"], "2024-04-01T00:00:00"),
        (["2024M01", "2024M02"], "2024-02-01T00:00:00"),
        (["2024-W01", "2024-W02"], "2024-01-08T00:00:00"),
        (["01/2024", "02/2024"], "2024-02-01T00:00:00"),
        (["2024-01", "2024-02"], "2024-02-01T00:00:00"),
        ([2024010100, 2024010200], "2024-01-02T00:00:00"),
        ([202401010030, 202401010100], "2024-01-01T01:00:00"),
        ([202401, 202402, 202403], "2024-02-01T00:00:00"),
        ([2024001, 2024032], "2024-02-01T00:00:00"),
        ([13012024, 14012024], "2024-01-14T00:00:00"),
        ([1990, 1991], "1991-01-01T00:00:00"),
        ([1704067200.5, 1704067201.0], "2024-01-01T00:00:01"),
        ([datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)], "2024-01-02T00:00:00"),
        (pd.period_range("2024Q1", periods=2, freq="Q"), "2024-04-01T00:00:00"),
        (pd.Categorical(["2024-01-01", "2024-01-02"]), "2024-01-02T00:00:00"),
    ],
)
def test_layouts(cells, second):
    assert read(cells)[0][1] == second


def test_one_layout_decides_where_it_alone_is_regular():
    twice = FIRSTS + [f"01/{month:02}/2024" for month in range(1, 13)]
    assert read(twice)[0][1] == "2023-02-01T00:00:00"
    american = [f"{month:02}/01/{year}" for year in (2023, 2024) for month in range(1, 13)]
    assert read(american)[0][1] == "2023-02-01T00:00:00"
    with_a_hole = [cell for cell in twice if cell != "01/05/2023"]
    assert read(with_a_hole)[0][1] == "2023-02-01T00:00:00"
    assert read(FIRSTS, freq="M")[0][1] == "2023-02-01T00:00:00"
    months_of_two_years = [200800 + m for m in range(1, 13)] + [200900 + m for m in range(1, 13)]
    assert read(months_of_two_years)[0][1] == "2008-02-01T00:00:00"


@pytest.mark.parametrize(
    "cells, readings",
    [
        (FIRSTS, {"%d/%m/%Y": "2023-02-01", "%m/%d/%Y": "2023-01-02"}),
        ([f"{c} 05:00" for c in FIRSTS], {"%d/%m/%Y": "2023-02-01", "%m/%d/%Y": "2023-01-02"}),
        ([200801 + i for i in range(12)], {"%Y%m": "2008-02-01", "%y%m%d": "2020-08-02"}),
        (
            ["24-01-05", "24-01-06", "24-01-07"],
            {"%d-%m-%y": "2006-01-24", "%y-%m-%d": "2024-01-06"},
        ),
        (["05/24", "06/24", "07/24"], {"%m/%y": "2024-06-01"}),
        (["24-Jan", "24-Feb", "24-Mar"], {"%y-%b": "2024-02-01"}),
    ],
)
def test_two_readings_are_refused_with_both_and_each_can_be_asked_for(cells, readings):
    text = refused(cells)
    assert "time column 'when' can be read in 2 ways" in text
    for layout, second in readings.items():
        assert f"date_format='{layout}'" in text
        assert read(cells, date_format=layout)[0][1][:10] == second
    assert "say which with date_format=" in text


def test_years_of_two_digits_are_said():
    assert read(["Nov-68", "Dec-68"])[2] == ["when: years of two digits are read as 2068 to 2068"]
    assert read(["Nov-69", "Dec-69"])[0] == ["1969-11-01T00:00:00", "1969-12-01T00:00:00"]


def test_dates_without_a_year_are_refused():
    assert "its dates have no year (first: '1-Jan'); write the year too" in refused(
        ["1-Jan", "2-Jan", "3-Jan"]
    )


def test_a_layout_that_was_asked_for_is_the_only_one():
    assert read(["1. 5. 24", "1. 6. 24"], date_format="%m. %d. %y")[0][1] == "2024-01-06T00:00:00"
    assert (
        read(["3 June 2024", "3 July 2024"], date_format="%d %B %Y")[0][1] == "2024-07-03T00:00:00"
    )
    assert (
        read(["01/02/2024 10h", "01/02/2024 11h"], date_format="%d/%m/%Y %Hh")[0][1]
        == "2024-02-01T11:00:00"
    )
    assert "2 cells are no dates" in refused(["2024-01-01", "2024-01-02"], date_format="%d/%m/%Y")


@pytest.mark.parametrize(
    "cells, says",
    [
        (
            ["2024-01-01", "soon", "2024-01-03"],
            "1 cells are no dates, row 1 'soon' (counting from 0); the others are",
        ),
        (["2024-01-01", None], "1 empty cells, row 1"),
        ([pd.NaT, pd.NaT], "2 empty cells, rows 0, 1"),
        ([0, 1, 2], "holds numbers that are no dates (first: 0)"),
        ([0.25, 0.5], "holds numbers that are no dates (first: 0.25)"),
        ([True, False], "holds truth values"),
        (["2024-02-30", "2024-03-01"], "1 cells are no dates, row 0 '2024-02-30'"),
        (["2024-01-01 25:00", "2024-01-01 23:00"], "1 cells are no dates, row 0"),
        (
            ["2024-01-01 00:00", "2024-01-01 01:00+01:00"],
            "1 cells have a zone, the others none, row 1",
        ),
        (["a", "b"], "2 cells are no dates"),
        (["Feb-30 24", "Q5 2024"], "cells are no dates"),
    ],
)
def test_cells_that_are_no_dates(cells, says):
    assert says in refused(cells)


# ---- zones ----


@pytest.mark.parametrize(
    "zone", ["Europe/Berlin", "America/New_York", "Australia/Sydney", "Asia/Kolkata"]
)
@pytest.mark.parametrize("layout", ["%Y-%m-%dT%H:%M:%S%z", "%d/%m/%Y %H:%M%z"])
def test_offsets_keep_their_zone(zone, layout):
    index = pd.date_range("2024-03-01", periods=300, freq="D", tz=zone)
    stamps, tz, notes = read(index.strftime(layout))
    again = pd.DatetimeIndex(stamps).tz_localize("UTC").tz_convert(tz)
    assert list(again.strftime(layout)) == list(index.strftime(layout))
    assert any("UTC" in note for note in notes)


def test_stamps_with_a_zone_keep_it():
    index = pd.date_range("2024-10-26", periods=3, freq="D", tz="Europe/Paris")
    for cells in (index, list(index.to_pydatetime()), pd.Series(list(index), dtype=object)):
        stamps, tz, _ = read(cells)
        assert tz == "Europe/Paris"
        assert stamps[1] == "2024-10-26T22:00:00"
    fixed = [pd.Timestamp("2024-01-01T00:00+02:00"), pd.Timestamp("2024-01-02T00:00+02:00")]
    assert read(fixed)[1] == "UTC+02:00"
    assert read(["2024-01-01T00:00:00Z", "2024-01-01T01:00:00Z"])[1] == "UTC"


def test_offsets_that_no_zone_has_become_utc():
    stamps, tz, notes = read(
        ["2024-01-01T00:00:00+01:00", "2024-01-01T02:00:00+02:30", "2024-01-01T02:00:00+01:00"]
    )
    assert (stamps[0], tz) == ("2023-12-31T23:00:00", "UTC")
    assert "no known zone" in notes[0]


# ---- which column ----


def test_a_column_holds_dates():
    for cells in (["2024-01-01"], [None, "Jan-24"], [datetime.date(2024, 1, 1)], ["01/02/2024"]):
        assert holds_dates(pd.Series(cells, dtype=object))
    for cells in (["a"], ["12"], [1.5], [20240101], [None], ["Q1"], ["May"], ["1-Jan"]):
        assert not holds_dates(pd.Series(cells))


def test_many_stamps_are_read_in_a_moment():
    index = pd.date_range("2000-01-01", periods=10_000, freq="h", tz="Europe/Berlin")
    for layout in ("%Y-%m-%dT%H:%M:%S%z", "%d/%m/%Y %H:%M%z"):
        stamps, tz, _ = read(index.strftime(layout))
        assert (len(stamps), tz) == (len(index), "Europe/Berlin")


def test_numbers_of_the_year_0_are_no_dates():
    assert "no dates" in refused(np.arange(1000, 1100))
