"""Tables as users have them, one of every kind that was once read wrongly, and every advice of a
message followed.
"""

import datetime
import gzip
import re
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from ltsm_jax.data import load_series
from ltsm_jax.data.series import DataError
from ltsm_jax.data.tables import read_series

DAYS = pd.date_range("2024-01-01", periods=12, freq="D")


def csv(path, rows, header="date,y", end="\n"):
    """A file of these rows, each a tuple of cells."""
    lines = [header] if header else []
    lines += [",".join(str(cell) for cell in row) for row in rows]
    path.write_bytes((end.join(lines) + end).encode())
    return path


def numbered(cells):
    """Rows of (cell, 0), (cell, 1), ..."""
    return [(cell, i) for i, cell in enumerate(cells)]


def refused(source, **options) -> str:
    with pytest.raises(DataError) as error:
        load_series(source, **options)
    text = str(error.value)
    assert len(text) <= 2000
    return text


def after(series, n=2):
    return [str(stamp) for stamp in series.in_zone(series.stamps_after(n))]


def frame(index=None, **columns):
    return pd.DataFrame(columns or {"y": np.arange(12.0)}, index=index)


# ---- facts from a file's name
# ----------------------------------------------------------------------------------------


def test_a_table_called_like_a_benchmark_is_a_table(tmp_path, monkeypatch, caplog):
    path = csv(tmp_path / "weather.csv", numbered(DAYS.date), header="date,temp")
    series = load_series(path)
    assert (series.benchmark, series.freq, series.name) == (None, "D", "weather")
    assert after(series) == ["2024-01-13 00:00:00", "2024-01-14 00:00:00"]
    assert series.notes == (
        "called like the benchmark weather, but not its published file: read as any other table",
    )
    assert not caplog.text
    monkeypatch.setenv("LTSM_DATA", str(tmp_path))
    assert load_series("weather").benchmark == "weather"  # asked for by name


# ---- steps and what follows
# ------------------------------------------------------------------------------------------


def test_month_ends_go_on_as_month_ends(tmp_path):
    ends = pd.date_range("2014-03-31", "2019-02-28", freq="ME")
    series = load_series(csv(tmp_path / "a.csv", numbered(ends.date)))
    assert (series.freq, series.season) == ("M", 12)
    assert after(series) == ["2019-03-31 00:00:00", "2019-04-30 00:00:00"]


def test_a_hole_among_month_ends_is_filled_and_no_stamp_moved(tmp_path):
    ends = pd.date_range("2018-02-28", "2019-04-30", freq="ME")
    path = csv(tmp_path / "a.csv", [row for row in numbered(ends.date) if row[1] != 5])
    assert "1 steps that are not M" in refused(path)
    series = load_series(path, irregular="regularise", missing="interpolate")
    np.testing.assert_array_equal(series.timestamps, ends.to_numpy().astype("datetime64[us]"))
    np.testing.assert_array_equal(series.values[0], np.arange(15))
    assert "0 rows moved to the nearest stamp" in series.notes[0]
    assert after(series) == ["2019-05-31 00:00:00", "2019-06-30 00:00:00"]


@pytest.mark.parametrize(
    "freq, canonical, season, following",
    [
        ("28D", "4W", 13, "2024-12-29 00:00:00"),
        ("QE", "Q", 4, "2027-03-31 00:00:00"),
        ("13W", "13W", 4, "2027-01-24 00:00:00"),
        ("YE", "Y", 1, "2036-12-31 00:00:00"),
        ("BME", "M", 12, "2025-01-31 00:00:00"),
        ("100ms", "100ms", 1, "2024-01-28 00:00:01.200000"),
    ],
)
def test_constant_steps_and_calendars(tmp_path, freq, canonical, season, following):
    stamps = pd.date_range("2024-01-28", periods=12, freq=freq)
    series = load_series(csv(tmp_path / "a.csv", numbered(stamps)))
    assert (series.freq, series.season, after(series)[0]) == (canonical, season, following)


def test_seven_business_days(tmp_path):
    days = pd.bdate_range("2024-01-02", periods=7)
    series = load_series(csv(tmp_path / "a.csv", numbered(days.date)))
    assert (series.freq, series.season) == ("B", 5)
    assert after(series, 3)[2] == "2024-01-15 00:00:00"


def test_a_step_that_models_have_no_token_for(tmp_path):
    path = csv(
        tmp_path / "a.csv", numbered(pd.date_range("2024-01-01", periods=12, freq="MS").date)
    )
    series = load_series(path, freq="oov")
    assert (series.freq, series.model_freq) == ("M", "oov")
    assert load_series(path).model_freq is None


# ---- layouts
# --------------------------------------------------------------------------------------------------


def test_day_and_month_in_either_order(tmp_path):
    firsts = pd.date_range("2023-01-01", periods=24, freq="MS").strftime("%d/%m/%Y")
    series = load_series(csv(tmp_path / "two_years.csv", numbered(firsts)))
    assert (series.freq, series.n_rows) == ("M", 24)
    path = csv(tmp_path / "one_year.csv", numbered(firsts[:12]))
    text = refused(path)
    asked = re.findall(r"date_format='([^']*)'", text)
    assert asked == ["%d/%m/%Y", "%m/%d/%Y"]
    assert [load_series(path, date_format=layout).freq for layout in asked] == ["M", "D"]


def test_digits_are_a_calendar_before_they_are_seconds(tmp_path):
    path = csv(
        tmp_path / "a.csv",
        numbered(2024010100 + 100 * day for day in range(31)),
        header="timestamp,views",
    )
    series = load_series(path)
    assert (series.freq, after(series)[0]) == ("D", "2024-02-01 00:00:00")


# ---- zones
# --------------------------------------------------------------------------------------------------


def test_days_at_local_midnight_over_a_change_of_the_clocks(tmp_path):
    days = pd.date_range("2024-10-10", periods=30, freq="D", tz="Europe/Berlin")
    text = [day.isoformat() for day in days]
    series = load_series(csv(tmp_path / "a.csv", numbered(text)))
    assert (series.freq, series.season) == ("D", 7)
    assert [stamp.isoformat() for stamp in series.in_zone(series.timestamps)] == text
    assert after(series) == ["2024-11-09 00:00:00+01:00", "2024-11-10 00:00:00+01:00"]


@pytest.mark.parametrize("freq", ["MS", "ME", "W-SUN", "D"])
def test_zoned_steps_in_a_frame_with_holes(freq):
    stamps = pd.date_range("2024-01-01", periods=14, freq=freq, tz="America/New_York")
    table = pd.DataFrame({"date": stamps[:12], "y": np.arange(12.0)}).drop([4, 5])
    series = read_series(table, irregular="regularise", missing="keep")
    assert list(series.in_zone(series.timestamps)) == list(stamps[:12])
    assert list(series.in_zone(series.stamps_after(2))) == list(stamps[12:])


def test_days_at_one_time_in_utc_that_were_shown_in_a_zone():
    days = pd.date_range("2024-03-25", periods=14, freq="D", tz="UTC").tz_convert("Europe/Berlin")
    for rows in (slice(None), [0, 1, *range(3, 14)]):
        table = pd.DataFrame({"date": days, "y": np.arange(14.0)}).iloc[rows]
        series = read_series(table, irregular="regularise", missing="keep")
        assert (series.freq, series.tz, after(series)[0]) == (
            "D",
            "UTC",
            "2024-04-08 00:00:00+00:00",
        )
        assert "regular in UTC, not on the clock in Europe/Berlin" in series.notes[0]


# ---- the index
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        DAYS,
        DAYS.strftime("%Y-%m-%d"),
        DAYS.strftime("%b %d, %Y"),
        DAYS.date,
        list(DAYS),
        pd.Index(pd.Series(DAYS).astype("timestamp[us][pyarrow]")),
        pd.Index([20240101 + i for i in range(12)]),
        pd.PeriodIndex(DAYS, freq="D"),
        pd.MultiIndex.from_product([["a"], DAYS], names=["item", "time"]),
    ],
)
def test_an_index_of_dates_is_the_time_and_its_order_counts(index):
    series = read_series(frame(index))
    np.testing.assert_array_equal(series.timestamps, DAYS.to_numpy().astype("datetime64[us]"))
    backwards = frame(index)[::-1]
    assert "11 stamps earlier than the one before" in refused(backwards)
    again = read_series(backwards, irregular="regularise")
    np.testing.assert_array_equal(again.values, series.values)


@pytest.mark.parametrize("names", [["item", "time"], [None, None]])
def test_an_index_of_items_and_times(names):
    table = frame(pd.MultiIndex.from_product([["a", "b"], DAYS[:6]], names=names))
    item = names[0] or "level_0"
    for options in ({}, {"target": "y"}, {"irregular": "regularise"}):
        assert f"column '{item}' of 2 kinds (a, b); id='{item}'" in refused(table, **options)
    series = read_series(table, id=item)
    np.testing.assert_array_equal(series.values, np.arange(12.0).reshape(2, 6))
    assert (series.columns, series.freq) == (("a", "b"), "D")


def test_an_index_of_names_is_refused_by_name():
    text = refused(frame(list("abcdefghijkl")))
    assert "the index 'index' holds no dates (first: 'a')" in text
    assert "reset_index(drop=True)" in text
    assert read_series(frame(list("abcdefghijkl")).reset_index(drop=True)).n_rows == 12
    assert "lengths of time" in refused(frame(pd.timedelta_range(0, periods=12, freq="h")))


def test_rows_out_of_order_or_left_out_are_refused_where_there_is_no_time():
    for rows, where in (
        (frame()[::-1], "row 1: 10 follows 11"),
        (frame().drop([3, 4]), "row 3: 5 follows 2"),
    ):
        text = refused(rows)
        assert where in text
        assert "irregular='ignore'" in text
        np.testing.assert_array_equal(read_series(rows, irregular="ignore").values[0], rows["y"])
        np.testing.assert_array_equal(read_series(rows.reset_index(drop=True)).values[0], rows["y"])
    dated = frame(date=DAYS, y=np.arange(12.0))[4:]  # row numbers are of no matter beside stamps
    assert read_series(dated).notes == ()


# ---- which column is the time
# ----------------------------------------------------------------------------------------


def test_a_year_is_the_time_and_that_is_said(tmp_path):
    path = csv(tmp_path / "co2.csv", [(1960 + i, 315 + i) for i in range(60)], header="year,co2")
    series = load_series(path)
    assert (series.columns, series.freq, after(series)[0]) == (("co2",), "Y", "2020-01-01 00:00:00")
    assert series.notes == ("'year' is taken as the time; time= and target= say otherwise",)
    assert load_series(path, target=["year", "co2"]).n_variates == 2
    assert read_series(frame(pd.RangeIndex(1990, 2002, name="year"))).freq == "Y"


def test_a_time_in_several_columns():
    months = pd.date_range("2022-01-01", periods=12, freq="MS")
    calendar = frame(year=months.year, month=months.month, y=np.arange(12.0))
    series = read_series(calendar)
    assert (series.columns, series.freq) == (("y",), "M")
    assert series.notes == ("the time is taken from year, month",)

    quarters = frame(
        year=np.repeat([2021, 2022, 2023], 4), quarter=[1, 2, 3, 4] * 3, y=np.arange(12.0)
    )
    assert (read_series(quarters).freq, after(read_series(quarters))[0]) == (
        "Q",
        "2024-01-01 00:00:00",
    )
    weeks = frame(week=range(202340, 202352), y=np.arange(12.0))
    assert read_series(weeks).notes == ("'week' is read as a variate; target= leaves it out",)

    hours = pd.date_range("2024-01-13", periods=72, freq="h")
    split = pd.DataFrame(
        {"date": hours.strftime("%d/%m/%Y"), "hour": hours.hour, "y": np.arange(72.0)}
    )
    for options in ({}, {"irregular": "regularise"}):
        assert "time=['date', 'hour'] joins them" in refused(split, **options)
    np.testing.assert_array_equal(
        read_series(split, time=["date", "hour"]).timestamps, hours.to_numpy()
    )

    clock = split.assign(time=hours.strftime("%H:%M")).drop(columns="hour")
    assert "several columns may hold the time: date, time" in refused(clock)
    assert "time=['date', 'time'] joins them" in refused(clock)
    np.testing.assert_array_equal(
        read_series(clock, time=["date", "time"]).timestamps, hours.to_numpy()
    )


def test_a_table_without_a_target_says_all_that_is_wrong():
    table = frame(date=DAYS[::-1], y=np.arange(12.0))
    for options in ({}, {"irregular": "regularise"}, {"irregular": "regularise", "id": "y"}):
        assert "target column 'z' is not there" in refused(table, target="z", **options)


def test_numbers_that_count_the_rows(tmp_path):
    path = csv(tmp_path / "a.csv", numbered(range(30)), header="ds,y")
    text = refused(path)
    assert "numbers that are no dates (first: 0)" in text
    assert "irregular='ignore'" in text
    for options in ({"irregular": "ignore"}, {"target": "y"}):
        series = load_series(path, **options)
        assert (series.columns, series.timestamps, series.n_rows) == (("y",), None, 30)
        assert series.notes == ("'ds' only numbers the rows: there are no stamps",)


def test_a_column_of_dates_that_was_not_seen_is_named():
    table = frame(y=np.arange(12.0), Datum=DAYS.strftime("%Y-%m-%d"))
    assert "time='Datum' takes it as the time" in refused(table)
    assert read_series(table, time="Datum").freq == "D"
    assert "time='Datum'" in refused(table.assign(Datum=DAYS))


# ---- files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [0, 1, 5, 7.5])
def test_a_file_without_names_is_refused_whatever_its_first_value(tmp_path, cell):
    rows = [(DAYS[0].date(), cell), *((day.date(), 3) for day in DAYS[1:])]
    path = csv(tmp_path / "a.csv", rows, header="")
    text = refused(path)
    assert "first line holds values (2024-01-01" in text
    assert "put a line of names above it" in text
    path.write_text("date,y\n" + path.read_text())
    assert load_series(path).n_rows == 12


def test_columns_that_are_numbered_are_names(tmp_path):
    path = csv(tmp_path / "a.csv", [(1.5, 2.5), (3.5, 4.5)], header="0,1")
    assert load_series(path).columns == ("0", "1")
    assert load_series(path, target=0).columns == ("0",)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    series = load_series(csv(tmp_path / "a.csv", numbered(DAYS.date), end=end))
    assert (series.n_rows, series.freq) == (12, "D")


def test_advice_about_files(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("date,Größe\n2024-01-01,1\n2024-01-02,2\n".encode("latin-1"))
    assert "pass the DataFrame of pandas.read_csv(path, encoding=...)" in refused(path)
    assert read_series(pd.read_csv(path, encoding="latin-1")).columns == ("Größe",)

    frame(date=DAYS, y=np.arange(12.0)).to_csv(path)  # with the index
    assert "column 0 (counting from 0) has no name" in refused(path)
    assert load_series(path, target="y").freq == "D"

    as_text = frame(date=DAYS, y=[str(i) for i in range(12)])
    assert "convert it with pandas.to_numeric" in refused(as_text)
    assert read_series(as_text.assign(y=pd.to_numeric(as_text["y"]))).n_rows == 12

    far = frame(date=pd.to_datetime(["2020-01-01", "2020-01-02", "2024-01-01"]), y=np.ones(3))
    assert "give a longer freq=" in refused(far, irregular="regularise")
    assert read_series(far, irregular="regularise", freq="Y", missing="keep").n_rows == 5


def test_a_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    csv(tmp_path / "mine.csv", numbered(DAYS.date))
    assert load_series("~/mine.csv").name == "mine"
    assert read_series("~/mine.csv").name == "mine"


def test_stamps_that_are_all_empty(tmp_path):
    assert "time column 'date': 12 empty cells" in refused(
        csv(tmp_path / "a.csv", numbered([""] * 12))
    )


def test_a_small_file_that_expands_beyond_measure(tmp_path):
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb", 9) as file:
        file.write(b"date,y\n")
        for _ in range(200):
            file.write(b"0" * 10**6)
    start = time.monotonic()
    assert "expand to more than 100 MB" in refused(path)
    assert time.monotonic() - start < 20
    table = pa.table({"y": pa.array(np.zeros(20_000_000))})
    pyarrow.parquet.write_table(table, tmp_path / "bomb.parquet")
    assert "expand to more than 100 MB" in refused(tmp_path / "bomb.parquet")


def test_a_parquet_file_whose_index_is_gone(tmp_path):
    table = pa.Table.from_pandas(frame(DAYS.rename("date")))
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(table, whole)
    assert load_series(whole).freq == "D"
    damaged = table.rename_columns(
        ["y", "day"]
    )  # what pandas noted names a column that is not there
    pyarrow.parquet.write_table(damaged, tmp_path / "damaged.parquet")
    assert load_series(tmp_path / "damaged.parquet", time="day").freq == "D"


# ---- long tables
# --------------------------------------------------------------------------------------------------


def long(ids=("A", "B"), n=6, name="unique_id"):
    parts = [
        pd.DataFrame({name: key, "ds": DAYS[:n], "y": 10.0 * i + np.arange(n)})
        for i, key in enumerate(ids)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("name", ["unique_id", "item_id", "which", "store"])
@pytest.mark.parametrize(
    "options", [{}, {"target": "y"}, {"irregular": "regularise"}, {"irregular": "ignore"}]
)
def test_several_series_below_one_another_are_named_and_never_averaged(name, options):
    table = long(name=name)
    if name == "store":
        table[name] = table[name].map({"A": 1, "B": 2})
    text = refused(table, **options)
    assert f"several series follow one another: column '{name}' of 2 kinds" in text
    assert f"id='{name}'" in text
    series = read_series(table, **options | {"id": name, "target": "y"})
    np.testing.assert_array_equal(series.values, [np.arange(6), 10 + np.arange(6)])
    by_time = table.sort_values(["ds", name])
    assert f"id='{name}'" in refused(by_time, **options)


def test_series_that_two_columns_tell_apart():
    table = pd.concat([long().assign(shop=shop) for shop in ("x", "y")], ignore_index=True)
    for options in ({}, {"id": "unique_id"}, {"irregular": "regularise", "id": "unique_id"}):
        assert "id=['unique_id', 'shop'] reads each as a variate" in refused(table, **options)
    series = read_series(table, id=["unique_id", "shop"])
    assert sorted(series.columns) == ["A/x", "A/y", "B/x", "B/y"]
    assert series.values.shape == (4, 6)


def test_ids_of_different_stamps_on_one_grid():
    table = long().drop([0, 4])
    text = refused(table, id="unique_id")
    assert "read each id on its own" in text
    assert "irregular='regularise' with missing='keep'" in text
    series = read_series(table, id="unique_id", irregular="regularise", missing="keep")
    np.testing.assert_array_equal(np.isnan(series.values), [[1, 0, 0, 0, 1, 0], [0] * 6])
    assert read_series(table[table["unique_id"] == "B"], target="y").n_rows == 6


def test_a_number_for_each_row_is_no_id():
    table = frame(id=range(12), date=DAYS, y=np.arange(12.0))
    assert read_series(table, target="y").n_rows == 12


# ---- missing values
# --------------------------------------------------------------------------------------------------


def sales():
    """Twelve days of sales, prices known three days ahead."""
    return frame(date=DAYS, sales=[*np.arange(9.0), None, None, None], price=np.ones(12))


@pytest.mark.parametrize("missing", ["keep", "interpolate"])
def test_last_rows_without_a_target_are_the_future(missing):
    text = refused(sales(), target="sales")
    assert "the last 3 rows hold no value: missing='keep' cuts them off as the future" in text
    series = read_series(sales(), target="sales", missing=missing)
    np.testing.assert_array_equal(series.values, [np.arange(9.0)])
    assert after(series)[0] == "2024-01-10 00:00:00"
    assert series.notes == ("the last 3 rows hold no value and were cut off: they are the future",)


def test_a_target_that_ends_before_the_others_is_not_made_up():
    text = refused(sales(), missing="interpolate")
    assert "column 'sales': the last 3 rows are empty where other columns go on" in text
    assert read_series(sales(), missing="interpolate", target="sales").n_rows == 9
    kept = read_series(sales(), missing="keep")
    assert np.isnan(kept.values[0, 9:]).all()


# ---- values
# --------------------------------------------------------------------------------------------------


def test_values_beyond_the_limit_are_refused_with_it(tmp_path):
    path = csv(tmp_path / "a.csv", [(day.date(), "1e200") for day in DAYS])
    assert "12 numbers beyond 1e+100, which is the limit, row" in refused(path)
    assert "beyond 1e+100" in refused(path, missing="interpolate")
    assert read_series(frame(y=np.full(12, 1e100))).values.max() == 1e100


# ---- what may be a table
# ---------------------------------------------------------------------------------------------


def test_series_arrays_and_arrow_tables():
    y = np.arange(12.0)
    np.testing.assert_array_equal(read_series(pd.Series(y, DAYS)).values, [y])
    assert read_series(pd.Series(y, DAYS, name="sold")).columns == ("sold",)
    assert read_series(pd.Series(y, DAYS)).freq == "D"
    assert read_series(y, freq="h").freq == "h"
    rows_first = read_series(np.stack([y, 2 * y], axis=1))
    assert (rows_first.columns, rows_first.values.shape) == (("0", "1"), (2, 12))
    table = pa.table({"date": DAYS.date, "y": y})
    for source in (table, table["y"], table.to_batches()[0]):
        np.testing.assert_array_equal(load_series(source).values, [y])
    assert load_series(table).freq == "D"

    class Exchanged:  # what the interchange protocol asks for, and nothing else
        def __dataframe__(self, *args, **kwargs):
            return table.select(["y"]).__dataframe__(*args, **kwargs)

    np.testing.assert_array_equal(load_series(Exchanged(), target="y").values, [y])


def test_polars():
    polars = pytest.importorskip("polars")
    series = load_series(polars.DataFrame({"date": list(DAYS.date), "y": np.arange(12.0)}))
    assert (series.columns, series.freq) == (("y",), "D")
    assert "collect()" in refused(polars.LazyFrame({"y": [1.0]}))


@pytest.mark.parametrize("source", [[1.0, 2.0], {"y": [1.0]}, np.zeros((2, 3, 4)), None, 5])
def test_anything_else_is_refused_by_name(source):
    text = refused(source)
    assert (
        "cannot be read; give a path, a pandas DataFrame or Series, an array [T] or [T, C]" in text
    )


def test_columns_by_index_number_and_levels():
    table = frame(date=DAYS, a=np.arange(12.0), b=np.arange(12.0))
    assert read_series(table, target=table.columns[1:]).columns == ("a", "b")
    numbered = pd.DataFrame(np.ones((12, 2)), DAYS)
    assert read_series(numbered, target=1).columns == ("1",)
    assert read_series(numbered, target=[0]).columns == ("0",)
    assert "target column 0 is not there; columns: date, a, b" in refused(table, target=0)
    assert "target column True is not there" in refused(table, target=True)
    levels = pd.DataFrame(
        np.ones((12, 2)), DAYS, pd.MultiIndex.from_product([["Close"], ["A", "B"]])
    )
    assert read_series(levels).columns == ("Close/A", "Close/B")
    assert read_series(levels, target=("Close", "B")).columns == ("Close/B",)


def test_an_offset_of_pandas_is_a_step():
    hours = frame(date=pd.date_range("2024", periods=12, freq="h"), y=np.arange(12.0))
    for freq in (pd.offsets.Hour(), pd.Timedelta("1h"), datetime.timedelta(hours=1)):
        assert read_series(hours, freq=freq).freq == "h"


def test_options_of_a_wrong_kind():
    dated = frame(date=DAYS.strftime("%Y-%m-%d"), y=np.arange(12.0))
    assert "date_format='%Q%' is no layout of dates" in refused(dated, date_format="%Q%")
    for options in ({"date_format": 5}, {"freq": 5}, {"missing": True}, {"irregular": 0}):
        with pytest.raises(
            ValueError, match=next(iter(options)) if "freq" not in options else "unknown frequency"
        ):
            read_series(dated, **options)
    for target in (iter(["y"]), {"y"}, np.array(["y"]), pd.Index(["y"]), ("y",), np.str_("y")):
        assert read_series(dated, target=target).columns == ("y",)


def test_what_is_masked_is_missing():
    masked = np.ma.masked_array([1, 2, 3, 4], [0, 1, 0, 0])
    assert "column '0': 1 missing, row 1" in refused(masked)
    np.testing.assert_array_equal(read_series(masked, missing="keep").values, [[1, np.nan, 3, 4]])


def test_whole_numbers_beyond_every_limit():
    table = frame(date=DAYS, y=pd.Series([10**400, *range(11)], dtype=object))
    assert "column 'y': 1 numbers beyond 1e+100" in refused(table)


def test_a_file_of_too_many_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a," * 300_000 + "b\n" + "1," * 300_000 + "1\n")
    assert "300001 columns; at most 250000 are read" in refused(path)


def test_names_that_clash():
    table = frame(date=DAYS, timestamp=np.arange(12.0))
    assert "called 'timestamp' beside the time" in refused(table, time="date")
    assert read_series(table.rename(columns={"timestamp": "y"})).columns == ("y",)
    ids = long(("a", "a/y")).rename(columns={"y": "y/y"}).assign(y=1.0)
    assert "give one name twice: a/y/y" in refused(ids, id="unique_id")


def test_a_date_object_beside_text():
    mixed = frame(date=[datetime.date(2024, 1, 1), "2024-01-02", *DAYS[2:].date])
    assert "date" in refused(mixed.assign(y=1.0).assign(y=list("abcdefghijkl")))


# ---- many columns, long messages
# -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_forty_thousand_columns_are_read_in_seconds():
    values = np.ones((20, 40_000))
    values[3] = np.nan
    table = pd.DataFrame(values, columns=[f"c{i}" for i in range(40_000)])
    table.insert(0, "date", pd.date_range("2024", periods=20, freq="h"))
    start = time.process_time()
    assert read_series(table, missing="keep").n_variates == 40_000
    assert "... and 39988 more problems" in refused(table)
    assert "did you mean" in refused(table, target="c1x")
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "options",
    [
        {"target": "q" * 9999},
        {"time": "q" * 9999},
        {"id": "q" * 9999},
        {"target": ["a", "b"] * 500},
    ],
)
def test_messages_stay_short_whatever_they_quote(options):
    wide = pd.DataFrame(np.full((5, 50), np.nan), columns=["n" * 3000 + str(i) for i in range(50)])
    refused(wide, **options)
    refused(wide)
    refused(wide.assign(date=["x" * 3000] * 5))
    refused(pd.DataFrame([["x" * 3000] * 50] * 5, columns=wide.columns))


# ---- jitter
# --------------------------------------------------------------------------------------------------


def test_stamps_without_a_step_and_the_advice():
    seconds = np.cumsum(np.random.default_rng(0).integers(1, 1000, 50))
    table = pd.DataFrame(
        {"date": pd.Timestamp("2024-01-01") + pd.to_timedelta(seconds, unit="s"), "y": np.ones(50)}
    )
    text = refused(table)
    assert "give freq= with irregular='regularise'" in text
    assert "irregular='ignore'" in text
    series = read_series(table, freq="10min", irregular="regularise", missing="keep")
    assert (series.freq, series.season) == ("10min", 144)
    assert read_series(table, irregular="ignore").freq is None
