"""Tables of text in other dialects than commas and points, and workbooks."""

import datetime
import sys
from pathlib import Path

import numpy as np
import pytest

from ltsm_jax.data.dialects import separator_of
from ltsm_jax.data.panel_tables import read_panel
from ltsm_jax.data.series import DataError
from ltsm_jax.data.sources import as_table, read_table, stem
from ltsm_jax.data.tables import read_series


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("sign, name", [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_separators_are_found_and_said(tmp_path, sign, name):
    text = "date,load,price\n2024-01-01,1.5,-2\n2024-01-02,0.1,3e2\n".replace(",", sign)
    series = read_series(write(tmp_path / "a.csv", text))
    assert series.columns == ("load", "price")
    np.testing.assert_array_equal(series.values, [[1.5, 0.1], [-2, 300]])
    assert f"cells are separated by {name}" in series.notes


def test_decimal_commas_and_thousands(tmp_path):
    text = "Datum;Last;Preis\n12.02.2024;1.234,56;7\n13.02.2024;-0,1;\n14.02.2024;1.000;9\n"
    series = read_series(write(tmp_path / "a.csv", text), time="Datum", missing="keep")
    np.testing.assert_array_equal(series.values, [[1234.56, -0.1, 1000], [7, np.nan, 9]])
    assert "a comma is the decimal sign in Last" in series.notes
    assert str(series.timestamps[0])[:10] == "2024-02-12"


def test_decimals_are_read_to_the_nearest_number(tmp_path):
    text = "y;z\n0,1;0,30000000000000004\n5e-324;1,7976931348623157\n"
    table = read_table(write(tmp_path / "a.csv", text))
    assert table["z"].tolist() == [0.30000000000000004, 1.7976931348623157]


def test_a_column_that_could_be_either_stays_as_a_whole_and_is_said(tmp_path):
    text = "date;a;b;c\n2024-01-01;1.234;0,5;1.234.567\n2024-01-02;5.678;0,7;12.000\n"
    series = read_series(write(tmp_path / "a.csv", text))
    np.testing.assert_array_equal(series.values, [[1.234, 5.678], [0.5, 0.7], [1234567, 12000]])
    notes = "\n".join(series.notes)
    assert "cells such as 1.234 in a are read with a decimal point" in notes
    assert "points part thousands in c" in notes


def test_points_alone_are_decimals_whatever_the_separator(tmp_path):
    series = read_series(
        write(tmp_path / "a.tsv", "date\ty\n2024-01-01\t1.234\n2024-01-02\t5.678\n")
    )
    np.testing.assert_array_equal(series.values, [[1.234, 5.678]])
    assert not any("decimal" in note for note in series.notes)


def test_points_and_commas_mixed_in_a_column_are_refused(tmp_path):
    with pytest.raises(DataError, match="column .y.: 1 cells are not numbers, row 0 .1,5."):
        read_series(write(tmp_path / "a.csv", "date;y\n2024-01-01;1,5\n2024-01-02;1.5\n"))


def test_a_first_line_may_name_the_separator(tmp_path):
    series = read_series(
        write(tmp_path / "a.csv", "sep=;\ndate;y\n2024-01-01;1,5\n2024-01-02;2,5\n")
    )
    assert series.columns == ("y",) and series.values.tolist() == [[1.5, 2.5]]


def test_thousands_may_be_parted_by_blanks(tmp_path):
    text = "date;y\n2024-01-01;1\u202f234,5\n2024-01-02;12 345\n"
    assert read_series(write(tmp_path / "a.csv", text)).values.tolist() == [[1234.5, 12345]]


def test_quoted_cells_may_hold_the_separator(tmp_path):
    text = 'date,"sales, net"\n2024-01-01,"1.5"\n2024-01-02,2\n'
    assert read_series(write(tmp_path / "a.csv", text)).columns == ("sales, net",)
    text = 'date;"net; of tax"\n2024-01-01;"1,5"\n2024-01-02;"2,5"\n'
    series = read_series(write(tmp_path / "b.csv", text))
    assert series.columns == ("net; of tax",)
    np.testing.assert_array_equal(series.values, [[1.5, 2.5]])


@pytest.mark.parametrize(
    "text, sign",
    [
        ("date,y\n2024-01-01,1\n", ","),
        ("y\n1\n2\n", ","),
        ("date;price, EUR\n2024-01-01;1,5\n", ";"),
        ("t,lat;lon,y\n1,52;13,5\n", ","),
        ("a|b|c\n1|2|3\n", "|"),
        ("date;y\n2024-01-01;1;2\n", ";"),
        ("", ","),
    ],
)
def test_the_sign_that_parts_every_line_alike_is_taken(text, sign):
    assert separator_of(text) == sign


def test_a_text_whose_header_was_eaten_as_names_is_refused(tmp_path):
    with pytest.raises(DataError, match="first line holds values"):
        read_series(write(tmp_path / "a.csv", "2024-01-01;1,5\n2024-01-02;2,5\n"))


def test_notes_reach_the_panel(tmp_path):
    text = "shop;date;sold\nA;2024-01-01;1,5\nA;2024-01-02;2,5\nB;2024-01-01;3\nB;2024-01-02;4\n"
    panel = read_panel(write(tmp_path / "a.csv", text), id="shop")
    np.testing.assert_array_equal(panel.values, [[1.5, 2.5, 3, 4]])
    assert "cells are separated by semicolons" in panel.notes


# ---- workbooks ----


def test_a_workbook_without_openpyxl_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="pip install openpyxl"):
        as_table(path)


def test_the_first_sheet_of_a_workbook_is_read(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append([None])
    sheet.append([None, "date", "sold", "promo"])
    for day in range(1, 4):
        sheet.append([None, datetime.datetime(2024, 1, day), day + 0.5, "a" if day % 2 else "b"])
    book.create_sheet("other")
    path = tmp_path / "shop.xlsx"
    book.save(path)
    panel = read_panel(path, target="sold")
    np.testing.assert_array_equal(panel.values, [[1.5, 2.5, 3.5]])
    assert panel.name == "shop" and panel.freq == "D" and panel.past == ("promo",)
    assert any("of 2 sheets the first is read" in note for note in panel.notes)


def test_a_damaged_workbook_is_refused(tmp_path):
    pytest.importorskip("openpyxl")
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"no workbook")
    with pytest.raises(DataError, match="not a readable workbook"):
        as_table(path)


def test_names_of_files():
    assert [stem(Path(name)) for name in ("a.tsv", "b.xlsx", "c.tsv.gz")] == ["a", "b", "c"]
