"""Steps: their names, the step of given stamps, the stamps that follow."""

import numpy as np
import pandas as pd
import pytest

from ltsm_jax.frequency import (
    Grid,
    canonical_freq,
    day_rule,
    following,
    from_wall,
    infer_freq,
    microseconds,
    season_of,
    split_freq,
    to_wall,
    unit_of,
)


def stamps(*text):
    return np.array(text, "datetime64[us]")


def dated(freq, n, start="2020-01-31", tz=None):
    index = pd.date_range(start, periods=n, freq=freq, tz=tz)
    if tz is not None:
        index = index.tz_convert("UTC").tz_localize(None)
    return index.to_numpy().astype("datetime64[us]")


# ---- names ----


@pytest.mark.parametrize(
    "aliases, canonical",
    [
        ("h H hour 1h 60min 60T 3600s", "h"),
        ("15min 15T 15m 900S", "15min"),
        ("D d day daily 24h", "D"),
        ("W W-SUN 7D weekly", "W"),
        ("M MS ME monthly", "M"),
        ("Q QS QE-DEC 3M", "Q"),
        ("Y A AS-JAN YE 12M 4Q", "Y"),
        ("B bday", "B"),
        ("2W 14D", "2W"),
        ("s S sec 1000ms", "s"),
        ("100ms 100L 100000us", "100ms"),
        ("M BME WOM-3FRI", "M"),
    ],
)
def test_old_and_new_names_of_steps(aliases, canonical):
    assert {canonical_freq(alias) for alias in aliases.split()} == {canonical}


@pytest.mark.parametrize(
    "offset, canonical",
    [
        (pd.offsets.Hour(), "h"),
        (pd.offsets.Minute(15), "15min"),
        (pd.offsets.MonthEnd(), "M"),
        (pd.offsets.Week(weekday=2), "W"),
        (pd.offsets.BusinessDay(), "B"),
        (pd.offsets.QuarterEnd(startingMonth=11), "Q"),
        (pd.offsets.Milli(100), "100ms"),
    ],
)
def test_offsets_of_pandas_are_names_too(offset, canonical):
    assert canonical_freq(offset) == canonical


@pytest.mark.parametrize(
    "freq", ["", "fortnight", "0h", "1.5h", "15", "-h", "hh", "9" * 18 + "W", "h" * 9999]
)
def test_unknown_steps_are_errors(freq):
    with pytest.raises(ValueError, match="unknown frequency") as error:
        canonical_freq(freq)
    assert len(str(error.value)) < 300


def test_the_season_of_an_old_name():
    assert season_of("15T") == 96
    assert season_of("100ms") == 1


def test_a_step_is_taken_apart():
    assert (split_freq("15min"), split_freq("W-SUN"), split_freq("?")) == (
        (15, "min"),
        (1, "W"),
        None,
    )
    assert (unit_of("3MS"), unit_of("fortnight")) == ("M", None)
    assert (microseconds("60min"), microseconds("M"), microseconds(None)) == (
        3600 * 10**6,
        None,
        None,
    )


# ---- the step of given stamps ----


@pytest.mark.parametrize(
    "pandas, canonical",
    [
        ("ME", "M"),
        ("MS", "M"),
        ("BME", "M"),
        ("BMS", "M"),
        ("WOM-3FRI", "M"),
        ("2MS", "2M"),
        ("QE-NOV", "Q"),
        ("BQE-DEC", "Q"),
        ("6ME", "2Q"),
        ("YE-JUN", "Y"),
        ("5YS", "5Y"),
        ("28D", "4W"),
        ("30D", "30D"),
        ("13W", "13W"),
        ("365D", "365D"),
        ("W-WED", "W"),
        ("B", "B"),
        ("100ms", "100ms"),
        ("3us", "3us"),
    ],
)
def test_steps_go_on_where_they_stop(pandas, canonical):
    """Inferred from all stamps, also with two of them missing; what follows is what pandas would
    write.
    """
    whole = dated(pandas, 33)
    assert infer_freq(whole[:30]) == canonical
    np.testing.assert_array_equal(following(whole[:30], 3, canonical), whole[30:])
    holes = np.delete(whole[:30], [7, 13])
    assert infer_freq(holes) == canonical
    grid = Grid.through(holes, canonical)
    places = grid.places(holes)
    np.testing.assert_array_equal(places, np.rint(places))
    np.testing.assert_array_equal(grid.stamps(np.arange(30) + int(places[0])), whole[:30])


def test_month_ends_go_on_as_month_ends_from_a_short_month():
    ends = dated("ME", 14, "2018-01-31")
    assert str(ends[-1])[:10] == "2019-02-28"
    assert [str(s)[:10] for s in following(ends, 2, "M")] == ["2019-03-31", "2019-04-30"]
    thirtieth = stamps("2019-01-30", "2019-02-28")
    assert [str(s)[:10] for s in following(thirtieth, 2, "M")] == ["2019-03-30", "2019-04-30"]
    assert [str(s)[:10] for s in following(ends[-1:], 1, "M")] == ["2019-03-31"]


def test_an_exact_step_goes_before_months():
    four_weeks = stamps("2024-01-28", "2024-02-25", "2024-03-24", "2024-04-21")
    assert infer_freq(four_weeks) == "4W"
    assert (
        infer_freq(stamps("2024-07-01", "2024-08-01", "2024-09-01")) == "M"
    )  # 31 days twice, but the first of each
    assert infer_freq(stamps("2021-01-01", "2022-01-01", "2023-01-01")) == "Y"


def test_business_days_in_a_week():
    week = stamps(
        "2024-01-02",
        "2024-01-03",
        "2024-01-04",
        "2024-01-05",
        "2024-01-08",
        "2024-01-09",
        "2024-01-10",
    )
    assert infer_freq(week) == "B"
    assert infer_freq(week[:4]) == "D"
    assert [str(s)[:10] for s in following(week[:4], 2, "B")] == ["2024-01-08", "2024-01-09"]


def test_a_rate_that_is_rounded_is_a_step():
    since = np.rint(np.arange(600) * 1000 / 60).astype("timedelta64[ms]")  # 60 Hz in milliseconds
    rounded = np.datetime64("2024-01-01", "us") + since
    assert abs(microseconds(infer_freq(rounded)) - 1e6 / 60) < 2
    rounded[300] += np.timedelta64(5, "ms")
    assert infer_freq(rounded) == "17ms"


def test_a_rule_holds_for_all_or_is_the_one_of_most():
    thursdays = stamps("2024-01-04", "2024-02-01", "2024-03-07")  # the first of each month
    assert day_rule(thursdays)[1]
    rule, all_of_them = day_rule(stamps("2024-01-15", "2024-02-15", "2024-03-16"))
    assert (rule.number, all_of_them) == (15, False)


# ---- zones ----


def test_steps_of_a_day_and_more_keep_the_time_on_the_wall():
    midnight = dated("D", 30, "2024-10-10", "Europe/Berlin")
    whole = dated("D", 33, "2024-10-10", "Europe/Berlin")
    np.testing.assert_array_equal(following(midnight, 3, "D", "Europe/Berlin"), whole[30:])
    assert infer_freq(to_wall(midnight, "Europe/Berlin")) == "D"
    months = dated("MS", 15, "2024-01-01", "America/New_York")
    np.testing.assert_array_equal(following(months[:12], 3, "M", "America/New_York"), months[12:])
    hours = dated("h", 60, "2024-03-30", "Europe/Berlin")
    np.testing.assert_array_equal(following(hours[:20], 40, "h", "Europe/Berlin"), hours[20:])


def test_times_that_the_clock_skips_or_shows_twice():
    skipped = from_wall(stamps("2024-03-31T02:30", "2024-10-27T02:30"), "Europe/Berlin")
    np.testing.assert_array_equal(skipped, stamps("2024-03-31T01:00", "2024-10-27T01:30"))
    np.testing.assert_array_equal(to_wall(skipped, None), skipped)
