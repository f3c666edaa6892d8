"""Reading tables: what is accepted, and that everything wrong is said at once, with where and what
to do.
"""

import dataclasses
import gzip
import inspect

import numpy as np
import pandas as pd
import pytest

from ltsm_jax.data.series import DataError
from ltsm_jax.data.tables import ReadingOptions, read_series
from ltsm_jax.frequency import canonical_freq, infer_freq

HOURS = pd.date_range("2024-01-01", periods=48, freq="h")


def table(n=48, **columns):
    """A regular hourly table with two clean variates."""
    rng = np.random.default_rng(0)
    data = {"date": HOURS[:n], "load": rng.normal(size=n), "OT": rng.normal(size=n)}
    return pd.DataFrame(data | columns)


def refused(source, **options) -> str:
    with pytest.raises(DataError) as error:
        read_series(source, **options)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def write(path, text):
    path.write_text(text)
    return path


# ---- accepted
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frame", "csv", "csv.gz", "parquet", "index"])
def test_every_kind_of_source_gives_the_same_series(tmp_path, kind):
    frame, path = table(), tmp_path / f"plant.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind.startswith("csv"):
        frame.to_csv(path, index=False)
    source = {"frame": frame, "index": frame.set_index("date")}.get(kind, path)
    series = read_series(source)
    assert series.columns == ("load", "OT")
    assert series.values.dtype == np.float64
    np.testing.assert_array_equal(
        series.values, frame[["load", "OT"]].to_numpy().T
    )  # to the last bit
    np.testing.assert_array_equal(series.timestamps, HOURS.to_numpy().astype("datetime64[us]"))
    assert (series.freq, series.season, series.notes, series.benchmark) == ("h", 24, (), None)
    assert series.name == ("data" if kind in ("frame", "index") else "plant")


def test_columns_can_be_chosen():
    assert read_series(table(), target="OT").columns == ("OT",)
    assert read_series(table(), target=["OT", "load"]).columns == ("OT", "load")
    assert (
        read_series(table(note=["x"] * 48), target=["OT"]).n_variates == 1
    )  # text elsewhere is no matter


@pytest.mark.parametrize("name", ["date", "Date", "TIME", "timestamp", "ds", "datetime"])
def test_the_time_column_goes_by_its_name_wherever_it_stands(name):
    frame = table().rename(columns={"date": name})[["load", "OT", name]]
    assert read_series(frame).timestamps is not None


def test_the_first_column_is_the_time_when_it_holds_dates(tmp_path):
    path = tmp_path / "a.csv"
    table().rename(columns={"date": "when"}).to_csv(path, index=False)
    assert read_series(path).timestamps[1] == np.datetime64("2024-01-01T01:00", "us")
    assert read_series(path, time="when", target="OT").columns == ("OT",)


def test_files_without_stamps(tmp_path):
    series = read_series(write(tmp_path / "plants.csv", "POWER_5,POWER_6\n0,1.5\n2,3\n"))
    assert series.timestamps is None
    assert (series.freq, series.season) == (None, 1)
    np.testing.assert_array_equal(series.values, [[0, 2], [1.5, 3]])
    assert read_series(tmp_path / "plants.csv", freq="10T").season == 144


@pytest.mark.parametrize(
    "cells, second",
    [
        (["2016/7/1 2:00", "2016/7/1 3:00", "2016/7/1 4:00"], "2016-07-01T03:00"),
        (
            ["2024-01-01 23:00:00", "2024-01-02", "2024-01-02 01:00:00"],
            "2024-01-02T00:00",
        ),  # a midnight without hours
        (
            ["12/02/2024", "13/02/2024", "14/02/2024"],
            "2024-02-13T00:00",
        ),  # no month 13: the day comes first
        (
            ["2024-03-31T01:00+01:00", "2024-03-31T03:00+02:00", "2024-03-31T04:00+02:00"],
            "2024-03-31T01:00",
        ),
        ([20240101, 20240102, 20240103], "2024-01-02T00:00"),
        ([1704067200, 1704070800, 1704074400], "2024-01-01T01:00"),
        ([1704067200000, 1704070800000, 1704074400000], "2024-01-01T01:00"),
        ([1990, 1991, 1992], "1991-01-01T00:00"),
    ],
)
def test_ways_to_write_a_date(cells, second):
    series = read_series(pd.DataFrame({"date": cells, "x": [1.0, 2.0, 3.0]}))
    assert series.timestamps[1] == np.datetime64(second)
    assert any("UTC" in note for note in series.notes) == ("+" in str(cells[0]))


def test_byte_order_mark_crlf_and_blanks_in_the_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffdate, load\r\n2024-01-01,1\r\n2024-01-02,2\r\n".encode())
    series = read_series(path)
    assert (series.columns, series.freq) == (("load",), "D")


# ---- refused, with the reason
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ("date,OT\n", "only a header line"),
        ("date,OT,OT\n2024-01-01,1,2\n", "column names used more than once: OT"),
        ("date;OT\n2024-01-01;1,5;7\n2024-01-02;2;8\n", "rows of different lengths"),
        ("2024-01-01 00:00:00;1,5\n2024-01-01 01:00:00;1,0\n", "first line holds values"),
        ("2024-01-01 00:00:00,1.5,2.5\n2024-01-01 01:00:00,1.0,2.0\n", "first line holds values"),
        ("date,OT\n2024-01-01,1\n2024-01-02,2,3\n", "rows of different lengths"),
        ("date,OT\n2024-01-01,1,7\n2024-01-02,2,8\n", "rows of different lengths"),
        ("date,name\n2024-01-01,a\n2024-01-02,b\n", "no column of numbers; columns: date, name"),
        ("date\n2024-01-01\n2024-01-02\n", "no column besides date"),
        (",OT\n0,1.5\n1,2.5\n", "column 0 (counting from 0) has no name: a saved index?"),
        (
            "date,time,OT\n2024-01-01,01:00,1\n",
            "several columns may hold the time: date, time; say which with time=",
        ),
        (
            "date,OT\n2024-01-01,1\nsoon,2\n2024-01-03,3\n",
            "time column 'date': 1 cells are no dates, row 1 'soon'",
        ),
        ("date,OT\n2024-01-01,1\n,2\n2024-01-03,3\n", "time column 'date': 1 empty cells, row 1"),
        (
            "time,OT\n0,1\n1,2\n2,3\n",
            "time column 'time' holds numbers that are no dates (first: 0)",
        ),
        ("date,OT\n2024-01-01,\n2024-01-02,\n", "column 'OT': not one finite value"),
    ],
)
def test_broken_files(tmp_path, text, says):
    assert says in refused(write(tmp_path / "broken.csv", text))


def test_files_that_are_no_text_tables(tmp_path):
    latin = tmp_path / "latin.csv"
    latin.write_bytes("date,Größe\n2024-01-01,1\n".encode("latin-1"))
    assert "not UTF-8 text (line 1, byte 0xf6)" in refused(latin)
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"date,OT\n" + b"2024-01-01,1\n" * 500)[:-20])
    assert "cut or damaged" in refused(cut)
    assert "cut or damaged" in refused(write(tmp_path / "not.csv.gz", "date,OT\n"))
    assert "not a readable parquet file" in refused(write(tmp_path / "not.parquet", "date,OT\n"))
    assert "cannot tell what this is" in refused(write(tmp_path / "table.xls", "x"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_series(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        read_series(tmp_path)


def test_text_cells_are_quoted_with_their_rows(tmp_path):
    lines = ["date,load,OT"] + [f"2024-01-{d:02},{d},{d}" for d in range(1, 21)]
    for row, cell in ((2, "n.a."), (5, "broken"), (7, "?"), (8, "?"), (9, "-"), (15, "1 234")):
        lines[row + 1] = lines[row + 1].rsplit(",", 1)[0] + f",{cell}"
    text = refused(write(tmp_path / "a.csv", "\n".join(lines)))
    assert (
        "column 'OT': 6 cells are not numbers, rows 2 'n.a.', 5 'broken', 7 '?', 8 '?', 9 '-', ... "
        "(count" in text
    )
    assert "load" not in text


def test_missing_and_infinite_cells_are_counted_by_column():
    frame = table()
    frame.loc[[3, 4, 9], "load"] = np.nan
    frame.loc[7, "OT"] = np.inf
    text = refused(frame)
    assert "column 'load': 3 missing, rows 3, 4, 9" in text
    assert "column 'OT': 1 infinite, row 7" in text
    assert "missing='interpolate'" in text


def test_interpolation_fills_linearly_and_says_so():
    frame = table()
    frame["load"] = np.arange(48.0)
    frame.loc[[0, 3, 4, 47], "load"] = [np.nan, np.inf, np.nan, np.nan]
    series = read_series(frame, missing="interpolate")
    np.testing.assert_array_equal(series.values[0], [1, *range(1, 47), 46])
    np.testing.assert_array_equal(series.values[1], frame["OT"])
    assert series.notes == ("missing cells filled by linear interpolation (4.17 % of all): load 4",)
    frame["load"] = np.nan
    assert "not one finite value" in refused(frame, missing="interpolate")


def test_wrong_column_names_come_with_near_ones():
    text = refused(table(), target=["ot", "lood", "zzz"], time="Datum", id="series")
    assert "target column 'ot' is not there; did you mean 'OT'? columns: date, load, OT" in text
    assert "target column 'lood' is not there; did you mean 'load'?" in text
    assert "target column 'zzz' is not there; columns" in text
    assert "time column 'Datum' is not there; did you mean 'date'?" in text
    assert "id column 'series' is not there" in text
    assert "twice: OT, OT" in refused(table(), target=["OT", "OT"])
    assert "empty list" in refused(table(), target=[])


def test_all_problems_in_one_error():
    frame = table(OT=["x"] + ["1"] * 47)
    frame.loc[5, "load"] = np.nan
    frame["date"] = frame["date"].where(frame.index != 9, HOURS[8])
    text = refused(frame, target=["load", "OT", "lod"])
    for part in (
        "'lod' is not there",
        "column 'OT': 1 cells",
        "column 'load': 1 missing",
        "1 stamps repeated",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "column", [[True, False] * 24, list(map(str, range(48))), HOURS, [1 + 2j] * 48]
)
def test_columns_that_only_look_like_numbers(column):
    text = refused(table(odd=column))
    assert "'odd'" in text
    assert "numbers" in text


def test_options_are_checked():
    for options in ({"missing": "drop"}, {"irregular": "sort"}, {"freq": "fortnight"}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            read_series(table(), **options)


def test_an_index_of_dates_beside_a_column_of_the_same_name():
    assert "'date' names both the index and a column" in refused(
        table().set_index("date", drop=False)
    )


def test_a_table_without_rows():
    assert "no rows" in refused(table().iloc[:0])


# ---- time
# --------------------------------------------------------------------------------------------------


def test_irregular_stamps_are_named():
    frame = table()
    text = refused(pd.concat([frame[:10], frame[9:20], frame[23:]]))
    assert "1 stamps repeated, first in row 10: 2024-01-01 09:00:00" in text
    assert (
        "1 steps that are not h, first in row 21: 2024-01-01 23:00:00 follows 2024-01-01 19:00:00"
        in text
    )
    assert "irregular='regularise'" in text
    swapped = refused(frame.iloc[[0, 1, 3, 2, *range(4, 48)]])
    assert "1 stamps earlier than the one before, first in row 3: 2024-01-01 02:00:00" in swapped
    shifted = frame.assign(
        date=frame["date"] + pd.to_timedelta(np.where(frame.index == 30, 90, 0), unit="s")
    )
    assert "2 steps that are not h, first in row 30: 2024-01-02 06:01:30" in refused(shifted)


def test_regularise_sorts_moves_averages_and_leaves_holes():
    frame = table()
    frame["load"] = np.arange(48.0)
    stamps = frame["date"].copy()
    stamps[30] += pd.Timedelta("90s")
    messy = frame.assign(date=stamps).drop([20, 21])
    messy = pd.concat([messy, frame.loc[[5]].assign(load=7.0)]).sample(frac=1, random_state=1)
    text = refused(messy, irregular="regularise")
    assert "column 'load': 2 missing, at 2024-01-01 20:00:00, 2024-01-01 21:00:00" in text
    series = read_series(messy, irregular="regularise", missing="interpolate")
    np.testing.assert_array_equal(series.timestamps, HOURS.to_numpy().astype("datetime64[us]"))
    want = np.arange(48.0)
    want[5] = (5 + 7) / 2
    np.testing.assert_allclose(series.values[0], want)
    assert (
        "1 rows moved to the nearest stamp, 1 averaged with another, 2 of 48 rows were holes"
        in series.notes[0]
    )
    regular = read_series(frame, irregular="regularise")
    np.testing.assert_array_equal(regular.values[0], np.arange(48.0))
    assert regular.notes == ()


def test_the_grid_is_the_one_most_stamps_lie_on():
    frame = table()
    frame.loc[0, "date"] += pd.Timedelta("20min")
    series = read_series(frame, irregular="regularise")
    np.testing.assert_array_equal(series.timestamps, HOURS.to_numpy().astype("datetime64[us]"))


def test_ignore_takes_the_rows_as_they_are():
    frame = table().iloc[[0, 1, 1, 5, 4]]
    series = read_series(frame, irregular="ignore", freq="H")
    np.testing.assert_array_equal(series.values[1], frame["OT"])
    assert series.freq == "h"


def test_a_grid_that_would_explode_is_refused():
    frame = pd.DataFrame(
        {"date": pd.to_datetime(["2020-01-01", "2020-01-02", "2024-01-01"]), "x": [1.0, 2, 3]}
    )
    assert "a grid of step D would have 1462 rows for 3 stamps" in refused(
        frame, irregular="regularise"
    )


@pytest.mark.parametrize(
    "freq, pandas, season",
    [
        ("5min", "5min", 288),
        ("10min", "10min", 144),
        ("15min", "15min", 96),
        ("30min", "30min", 48),
        ("h", "h", 24),
        ("2h", "2h", 12),
        ("D", "D", 7),
        ("B", "B", 5),
        ("W", "W-SUN", 52),
        ("W", "W-WED", 52),
        ("M", "MS", 12),
        ("M", "ME", 12),
        ("Q", "QS", 4),
        ("Q", "QE", 4),
        ("Y", "YE", 1),
        ("s", "s", 3600),
        ("7min", "7min", 1),
        ("4W", "28D", 13),
    ],
)
def test_steps_are_inferred_checked_and_regularised(freq, pandas, season):
    stamps = pd.date_range("2019-12-31", periods=40, freq=pandas)
    frame = pd.DataFrame({"ds": stamps, "y": np.arange(40.0)})
    series = read_series(frame)
    canonical = canonical_freq(freq)
    assert (series.freq, series.season) == (canonical, season)
    assert canonical_freq(canonical) == canonical
    holes = frame.drop([7, 20])
    assert f"2 steps that are not {canonical}" in refused(holes)
    filled = read_series(holes, irregular="regularise", missing="interpolate")
    np.testing.assert_array_equal(filled.timestamps, stamps.to_numpy().astype("datetime64[us]"))
    np.testing.assert_allclose(filled.values[0], np.arange(40.0))


def test_steps_that_cannot_be_inferred():
    assert infer_freq(HOURS[:1].to_numpy()) is None
    jitter = HOURS.to_numpy() + np.random.default_rng(0).integers(0, 10**9, 48).astype(
        "timedelta64[us]"
    )
    assert infer_freq(jitter) is None
    frame = table(date=jitter)
    assert "give freq=" in refused(frame)
    assert "give freq=" in refused(frame, irregular="regularise")
    np.testing.assert_array_equal(
        read_series(frame, irregular="regularise", freq="h").values, read_series(table()).values
    )
    assert read_series(table(1), freq="D").freq == "D"


# ---- long tables
# --------------------------------------------------------------------------------------------------


def long_table(ids=("a", "b", "c"), n=30):
    parts = [
        pd.DataFrame(
            {
                "item_id": key,
                "timestamp": HOURS[:n],
                "target": np.arange(n) + 100.0 * i,
                "price": 1.0 * i,
            }
        )
        for i, key in enumerate(ids)
    ]
    return pd.concat(parts)


def test_ids_of_one_grid_become_variates():
    series = read_series(long_table(), id="item_id", target="target")
    assert series.columns == ("a", "b", "c")
    np.testing.assert_array_equal(series.values, np.arange(30) + 100.0 * np.arange(3)[:, None])
    both = read_series(long_table(), id="item_id")
    assert both.columns[:3] == ("a/target", "a/price", "b/target")
    by_time = long_table().sort_values(["timestamp", "item_id"])
    np.testing.assert_array_equal(
        read_series(by_time, id="item_id", target="target").values, series.values
    )
    shuffled = long_table().sample(frac=1, random_state=0)
    sorted_again = read_series(shuffled, id="item_id", target="target", irregular="regularise")
    order = [sorted_again.columns.index(c) for c in series.columns]
    np.testing.assert_array_equal(sorted_again.values[order], series.values)


def test_ids_of_different_grids_are_refused_by_name():
    frame = pd.concat([long_table(("a", "b")), long_table(("short",), 12)])
    text = refused(frame, id="item_id", target="target")
    assert "1 of 3 ids have other stamps or lengths" in text
    assert "short: 12 rows, 2024-01-01 00:00:00 to 2024-01-01 11:00:00" in text
    assert "read each id on its own" in text
    empty = long_table()
    empty["item_id"] = empty["item_id"].where(np.arange(len(empty)) != 4)
    assert "id column 'item_id': 1 empty cells, row 4" in refused(
        empty, id="item_id", target="target"
    )


# ---- one list of options
# ---------------------------------------------------------------------------------------------


def test_the_options_are_those_of_the_function():
    keywords = list(inspect.signature(read_series).parameters.values())[1:]
    fields = dataclasses.fields(ReadingOptions)
    assert [(k.name, k.default) for k in keywords] == [(f.name, f.default) for f in fields]
    how = ReadingOptions(target="OT", freq="60min")
    assert read_series(table(), **vars(how)).columns == ("OT",)
    assert how.freq == "h"


def test_missing_cells_can_be_kept():
    frame = table()
    frame.loc[[0, 3, 47], "load"] = np.nan
    series = read_series(frame, missing="keep")
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(series.values[0])), [0, 3, 47])
    assert series.notes == ("missing cells kept (3.12 % of all): load 3",)
    frame.loc[5, "load"] = np.inf
    assert "column 'load': 1 infinite, row 5" in refused(frame, missing="keep")


def test_the_layout_of_dates_can_be_given():
    frame = table(3, date=["01/02/2024", "02/02/2024", "03/02/2024"])
    assert read_series(frame, date_format="%d/%m/%Y").timestamps[1] == np.datetime64("2024-02-02")
    assert read_series(frame, date_format="%m/%d/%Y", freq="M").timestamps[1] == np.datetime64(
        "2024-02-02"
    )
    assert "3 cells are no dates" in refused(frame, date_format="%Y-%m-%d")
