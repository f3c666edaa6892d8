"""`read_panel`: long and wide tables of items of their own lengths, starts and gaps, with
covariates.
"""

import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltsm_jax.data.panel import Panel
from ltsm_jax.data.panel_tables import PanelOptions, read_panel
from ltsm_jax.data.series import DataError
from ltsm_jax.data.tables import read_series

NAN = np.nan


def days(start, count, freq="D"):
    return pd.date_range(start, periods=count, freq=freq)


def shops():
    """A has 4 days from January 1st, B has 3 days from the 3rd and a hole behind the first."""
    a = pd.DataFrame({"shop": "A", "date": days("2024-01-01", 4), "sold": [1.0, 2, 3, 4]})
    b = pd.DataFrame({"shop": "B", "date": days("2024-01-03", 3), "sold": [10.0, 20, 30]})
    b.loc[1:, "date"] += pd.Timedelta(days=1)
    return pd.concat([a, b], ignore_index=True)


def refused(source, **options):
    with pytest.raises(DataError) as e:
        read_panel(source, **options)
    return str(e.value)


def said(panel, text):
    return any(text in note for note in panel.notes)


def items_of(panel):
    """Everything about each item, by its id."""
    found = {}
    for i, key in enumerate(panel.ids):
        rows = slice(*panel.bounds[i : i + 2])
        facts = [panel.values[:, rows], panel.first[i : i + 1]]
        facts += [
            values[:, rows]
            for values in (panel.past_values, panel.known_values)
            if values is not None
        ]
        if panel.future_values is not None:
            facts.append(panel.future_values[:, i])
        if panel.static is not None:
            facts.append(panel.static.iloc[i].astype(str).to_numpy())
        found[key] = facts
    return found


def same(panel, other):
    """Whether two panels hold the same items, in any order."""
    one, two = items_of(panel), items_of(other)
    assert one.keys() == two.keys()
    assert (panel.freq, panel.past, panel.known, panel.columns) == (
        other.freq,
        other.past,
        other.known,
        other.columns,
    )
    assert panel.categories == other.categories
    for key, facts in one.items():
        for fact, twin in zip(facts, two[key], strict=True):
            np.testing.assert_array_equal(fact, twin)


# ---- items ----


def test_items_keep_their_lengths_starts_and_holes():
    panel = read_panel(shops(), id="shop", target="sold")
    assert panel.ids.tolist() == ["A", "B"] and panel.bounds.tolist() == [0, 4, 8]
    np.testing.assert_array_equal(panel.values, [[1, 2, 3, 4, 10, NAN, 20, 30]])
    assert panel.first.astype("datetime64[D]").astype(str).tolist() == ["2024-01-01", "2024-01-03"]
    assert (panel.freq, panel.id_name, panel.time_name, panel.columns) == (
        "D",
        "shop",
        "date",
        ("sold",),
    )
    assert said(panel, "1 stamps of 1 of 2 items (B) had no row")
    assert said(panel, "missing cells of the targets kept: sold 1 of 8")


def test_rows_out_of_order_are_sorted_and_said():
    panel = read_panel(shops().iloc[::-1], id="shop", target="sold")
    assert panel.ids.tolist() == ["B", "A"]  # in order of their first row
    np.testing.assert_array_equal(panel.values, [[10, NAN, 20, 30, 1, 2, 3, 4]])
    assert said(panel, "rows of 2 of 2 items (B, A) were out of order in time, and were sorted")


def test_items_whose_rows_lie_between_one_another_need_no_note():
    table = shops().sort_values("date", kind="stable")
    panel = read_panel(table, id="shop", target="sold")
    same(panel, read_panel(shops(), id="shop", target="sold"))
    assert not said(panel, "sorted")


@pytest.mark.parametrize(
    "ids, kept",
    [
        ([7, 3], np.array([7, 3])),
        (["007", "3"], np.array(["007", "3"], object)),
        (pd.Categorical(["b", "a"]), np.array(["b", "a"], object)),
    ],
)
def test_ids_keep_their_type(ids, kept):
    table = shops()
    table["shop"] = pd.Series(ids).repeat([4, 3]).reset_index(drop=True)
    panel = read_panel(table, id="shop", target="sold")
    assert panel.ids.dtype == kept.dtype and panel.ids.tolist() == kept.tolist()


def test_several_columns_of_ids_are_joined():
    table = shops().assign(region=["n", "n", "s", "s", "n", "n", "n"])
    panel = read_panel(table, id=["region", "shop"], target="sold")
    assert panel.ids.tolist() == ["n/A", "s/A", "n/B"] and panel.id_name == "region/shop"
    assert panel.id_columns == ("region", "shop")
    assert panel.take(np.array([2, 0])).id_parts.to_numpy().tolist() == [["n", "B"], ["n", "A"]]
    numbered = read_panel(
        table.assign(region=table["region"].map({"n": 1, "s": 2})),
        id=["region", "shop"],
        target="sold",
    )
    assert numbered.id_parts["region"].tolist() == [1, 2, 1]  # of their own type
    clash = table.assign(region=["a/b"] * 4 + ["a"] * 3, shop=["c"] * 4 + ["b/c"] * 3)
    assert "are the same for different items" in refused(
        clash, id=["region", "shop"], target="sold"
    )


def test_ids_are_found_by_their_name():
    panel = read_panel(shops().rename(columns={"shop": "item_id"}), target="sold")
    assert panel.n_items == 2 and panel.id_name == "item_id"
    assert said(panel, "the items are told apart by 'item_id'")


def test_one_item_with_an_id_keeps_it():
    panel = read_panel(shops().iloc[:4].rename(columns={"shop": "unique_id"}), target="sold")
    assert panel.ids.tolist() == ["A"] and panel.id_name == "unique_id"


def test_ids_of_another_name_are_not_guessed():
    assert "id='shop' reads each as an item" in refused(shops(), target="sold")


def test_an_index_of_ids_and_times():
    table = shops().set_index(["shop", "date"])
    same(read_panel(table, target="sold"), read_panel(shops(), id="shop", target="sold"))


def test_filtered_rows_need_no_reset_index():
    table = shops()
    panel = read_panel(table[table["sold"] != 3], id="shop", target="sold")
    np.testing.assert_array_equal(panel.values, [[1, 2, NAN, 4, 10, NAN, 20, 30]])


def test_the_same_item_and_time_twice_is_refused():
    table = pd.concat([shops(), shops().iloc[[2]]])
    assert "1 rows have the stamp of another of the same item, first 'A' at 2024-01-03" in refused(
        table, id="shop", target="sold"
    )
    panel = read_panel(
        table.assign(sold=[1, 2, 3, 4, 10, 20, 30, 5]),
        id="shop",
        target="sold",
        irregular="regularise",
    )
    assert panel.values[0, 2] == 4 and said(panel, "1 rows averaged with another at the same stamp")


def test_an_item_without_a_target_is_refused_by_name():
    table = shops()
    table.loc[table["shop"] == "B", "sold"] = NAN
    assert "not one value of the target of 1 of 2 items (B)" in refused(
        table, id="shop", target="sold"
    )


# ---- steps ----


def test_items_of_another_step_are_named():
    weekly = pd.DataFrame({"shop": "W", "date": days("2024-01-01", 5, "7D"), "sold": 1.0})
    half = pd.DataFrame({"shop": "H", "date": days("2024-01-01", 9, "12h"), "sold": 1.0})
    table = pd.concat([shops(), weekly, half])
    message = refused(table, id="shop", target="sold")
    assert "2 of 4 items have another step than D (W: W, H: 12h)" in message
    assert "irregular='regularise' puts every item on that grid" in message
    panel = read_panel(table, id="shop", target="sold", irregular="regularise")
    assert panel.lengths.tolist() == [4, 4, 29, 5] and panel.freq == "D"


def test_rows_beside_the_grid_are_named():
    table = shops()
    table.loc[2, "date"] += pd.Timedelta(hours=2)
    message = refused(table, id="shop", target="sold")
    assert (
        "1 rows of 1 of 2 items (A), first A at 2024-01-03 02:00:00 are beside the grid of step D"
        in message
    )
    panel = read_panel(table, id="shop", target="sold", irregular="regularise")
    np.testing.assert_array_equal(panel.values[0, :4], [1, 2, 3, 4])
    assert said(panel, "1 rows moved to the nearest stamp")


def test_items_may_have_phases_of_their_own():
    table = shops()
    table.loc[table["shop"] == "B", "date"] += pd.Timedelta(hours=6)
    panel = read_panel(table, id="shop", target="sold")
    assert str(panel.first[1])[:16] == "2024-01-03T06:00"
    assert str(panel.stamps_after(1)[1, 0])[:16] == "2024-01-07T06:00"


def test_month_ends_over_february_are_those_of_all_items():
    ends = days("2023-09-30", 6, "ME")  # to 2024-02-29
    table = pd.DataFrame(
        {
            "id": ["a"] * 6 + ["b"],
            "ds": [*ends, pd.Timestamp("2024-02-29")],
            "y": np.arange(7.0),
        }
    )
    panel = read_panel(table)
    assert panel.freq == "M"
    after = panel.stamps_after(2).astype("datetime64[D]").astype(str).tolist()
    assert after == [["2024-03-31", "2024-04-30"]] * 2
    assert str(panel.take(np.array([1])).stamps_after(1)[0, 0])[:10] == "2024-03-31"
    assert str(panel.item(0).timestamps[-1])[:10] == "2024-02-29"


def test_every_item_has_its_own_day_in_the_month():
    table = pd.DataFrame(
        {
            "id": ["a"] * 5 + ["b"] * 4,
            "ds": [
                *days("2023-10-31", 5, "ME"),
                *(days("2024-01-01", 4, "MS") + pd.Timedelta(days=14)),
            ],
            "y": np.arange(9.0),
        }
    )
    panel = read_panel(table)
    after = panel.stamps_after(2).astype("datetime64[D]").astype(str).tolist()
    assert after == [["2024-03-31", "2024-04-30"], ["2024-05-15", "2024-06-15"]]
    assert panel.take(np.array([1])).stamps_after(1).astype("datetime64[D]").astype(
        str
    ).tolist() == [["2024-05-15"]]


def test_business_days():
    table = pd.DataFrame({"id": ["a"] * 8 + ["b"] * 3, "y": 1.0})
    table["ds"] = [*days("2024-01-01", 8, "B"), *days("2024-01-02", 3, "B")]
    panel = read_panel(table)
    assert panel.freq == "B" and panel.lengths.tolist() == [8, 3]
    assert panel.stamps_after(1).astype("datetime64[D]").astype(str).tolist() == [
        ["2024-01-11"],
        ["2024-01-05"],
    ]


def test_days_at_local_midnight_where_the_clocks_change():
    stamps = pd.date_range("2024-03-29", periods=5, freq="D", tz="Europe/Berlin")
    table = pd.DataFrame(
        {"id": ["a"] * 5 + ["b"] * 3, "ds": [*stamps, *stamps[2:]], "y": np.arange(8.0)}
    )
    panel = read_panel(table)
    assert (panel.freq, panel.tz, panel.n_rows) == ("D", "Europe/Berlin", 8)
    assert str(panel.stamps_after(1)[0, 0]) == "2024-04-02T22:00:00.000000"  # UTC


def test_whole_numbers_count_the_rows():
    table = pd.DataFrame({"id": list("aaabbb"), "ds": [0, 1, 2, 5, 6, 8], "y": np.arange(6.0)})
    panel = read_panel(table)
    np.testing.assert_array_equal(panel.values, [[0, 1, 2, 3, 4, NAN, 5]])
    assert panel.first is None and said(panel, "'ds' only numbers the rows")


def test_a_table_without_time_keeps_its_order():
    table = pd.DataFrame({"id": ["a", "b", "a", "b", "a"], "y": np.arange(5.0)})
    panel = read_panel(table, id="id")
    np.testing.assert_array_equal(panel.values, [[0, 2, 4, 1, 3]])
    assert panel.first is None and panel.bounds.tolist() == [0, 3, 5]


def test_one_row_each_and_no_step():
    table = pd.DataFrame({"id": ["a", "b"], "ds": days("2024-01-01", 2), "y": [1.0, 2.0]})
    panel = read_panel(table, id="id")
    assert panel.freq is None and panel.stamps_after(2) is None
    assert read_panel(table, id="id", freq="D").stamps_after(1).shape == (2, 1)


def test_dates_as_text_have_one_layout_in_the_table_and_ahead():
    table = pd.DataFrame(
        {"id": "a", "ds": ["01/02/2024", "02/02/2024", "03/02/2024"], "y": 1.0, "x": 1.0}
    )
    future = pd.DataFrame(
        {"id": "a", "ds": [f"{day:02}/02/2024" for day in range(4, 20)], "x": 2.0}
    )
    panel = read_panel(table, future=future, id="id")
    assert panel.freq == "D" and panel.future_values.shape == (1, 1, 16)


# ---- covariates ----


def priced():
    table = shops().assign(price=[5.0, 6, 7, 8, 50, 60, 70])
    future = pd.DataFrame(
        {
            "shop": ["A", "A", "B"],
            "date": [*days("2024-01-05", 2), pd.Timestamp("2024-01-07")],
            "price": [9.0, 10, 80],
        }
    )
    return table, future


def test_covariates_known_ahead_from_a_second_table(tmp_path):
    table, future = priced()
    panel = read_panel(table, id="shop", target="sold", future=future)
    assert panel.known == ("price",) and panel.past == ()
    np.testing.assert_array_equal(panel.known_values, [[5, 6, 7, 8, 50, NAN, 60, 70]])
    np.testing.assert_array_equal(panel.future_values, [[[9, 10], [80, NAN]]])
    assert said(
        panel, "known covariates are missing for 1 of 4 steps ahead of 1 of 2 items (B): price"
    )

    future.to_csv(tmp_path / "future.csv", index=False)
    table.to_csv(tmp_path / "table.csv", index=False)
    same(
        panel,
        read_panel(
            tmp_path / "table.csv", id="shop", target="sold", future=tmp_path / "future.csv"
        ),
    )


def test_covariates_known_ahead_from_rows_behind_the_last_target():
    table, future = priced()
    panel = read_panel(pd.concat([table, future]), id="shop", target="sold")
    same(panel, read_panel(table, id="shop", target="sold", future=future))
    assert said(panel, "known ahead, with values behind the last target: price")


def test_an_item_that_ends_earlier_does_not_make_the_others_lack_covariates():
    table, future = priced()
    table = table[table["shop"] == "A"]
    both = pd.concat([table, table.assign(shop="C"), table.assign(shop="D").iloc[:-1]])
    ahead = future[future["shop"] == "A"]
    ahead = pd.concat([ahead.assign(shop=shop) for shop in "ACD"])
    last = table.assign(shop="D", sold=NAN).iloc[-1:]
    panel = read_panel(pd.concat([both, last]), id="shop", target="sold", future=ahead)
    assert panel.future_values.shape == (1, 3, 3)
    np.testing.assert_array_equal(panel.future_values[0, 1:], [[9, 10, NAN], [8, 9, 10]])
    assert not said(panel, "missing for")


def test_rows_behind_the_last_target_are_no_observations():
    table = shops()
    table.loc[[3, 6], "sold"] = NAN
    panel = read_panel(table, id="shop", target="sold")
    assert panel.bounds.tolist() == [0, 3, 6]
    assert said(
        panel, "2 rows behind the last target of their item were cut off: they are the future"
    )


def test_filling_from_future_leaves_the_table_alone():
    """Rows that lie on the grid as they are: the panel's values are those of the table."""
    table = pd.DataFrame(
        {"id": "a", "ds": days("2024-01-01", 4), "y": [1.0, 2, 3, 4], "x": [5.0, NAN, 7, 8]}
    )
    future = pd.DataFrame({"id": "a", "ds": days("2024-01-01", 6), "x": [5.0, 6, 7, 8, 9, 10]})
    before = table.copy()
    panel = read_panel(table, id="id", target="y", future=future)
    np.testing.assert_array_equal(panel.known_values, [[5, 6, 7, 8]])
    np.testing.assert_array_equal(panel.future_values, [[[9, 10]]])
    pd.testing.assert_frame_equal(table, before)


def test_the_table_goes_before_future_where_they_meet():
    table, future = priced()
    table.loc[2, "price"] = NAN
    past = pd.DataFrame({"shop": "A", "date": days("2024-01-03", 2), "price": [7.0, 99.0]})
    panel = read_panel(table, id="shop", target="sold", future=pd.concat([past, future]))
    np.testing.assert_array_equal(panel.known_values[0, :4], [5, 6, 7, 8])
    assert said(panel, "1 cells of future contradict the table")


def test_rows_of_future_for_other_items_are_left_out_and_wrong_types_refused():
    table, future = priced()
    more = pd.concat([future, future.assign(shop="C")])
    panel = read_panel(table, id="shop", target="sold", future=more)
    assert panel.future_values.shape == (1, 2, 2) and said(panel, "left out: C")
    assert "not one of its ids is in the table" in refused(
        table, id="shop", target="sold", future=future.assign(shop=1)
    )
    assert "future: id column 'shop' is not there" in refused(
        table, id="shop", target="sold", future=future.drop(columns="shop")
    )
    late = future.assign(date=future["date"] + pd.Timedelta(hours=1))
    assert "future: 3 rows are beside the grid" in refused(
        table, id="shop", target="sold", future=late
    )


@pytest.mark.parametrize("written", ["iso", "Z", "seconds", "milliseconds"])
def test_stamps_with_zones_and_epochs_are_found_under_any_name(written):
    stamps = pd.date_range("2024-03-30", periods=60, freq="h", tz="Europe/Berlin")
    utc = stamps.tz_convert("UTC").tz_localize(None)
    cells = {
        "iso": [stamp.isoformat() for stamp in stamps],
        "Z": utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": utc.astype("datetime64[s]").astype(np.int64),
        "milliseconds": utc.astype("datetime64[ms]").astype(np.int64),
    }
    panel = read_panel(pd.DataFrame({"ts": cells[written], "load": np.arange(60.0)}))
    assert (panel.columns, panel.time_name, panel.freq) == (("load",), "ts", "h")
    assert panel.first[0] == np.datetime64("2024-03-29T23:00")
    assert panel.tz == {"iso": "Europe/Berlin", "Z": "UTC"}.get(written)


def test_a_future_without_ids_is_of_all_items_where_these_end_together():
    stamps = pd.date_range("2024-01-01", periods=6, freq="D")
    table = pd.concat(
        [
            pd.DataFrame({"shop": shop, "date": stamps[i:], "sold": 1.0 + i, "holiday": 0.0})
            for i, shop in enumerate("AB")
        ]
    )
    ahead = pd.DataFrame(
        {"date": pd.date_range("2024-01-07", periods=3, freq="D"), "holiday": [0.0, 1, 0]}
    )
    panel = read_panel(table, id="shop", target="sold", future=ahead)
    np.testing.assert_array_equal(panel.future_values, [[[0, 1, 0], [0, 1, 0]]])
    assert said(panel, "its 3 rows are taken for each of the 2 items")

    # Whose rows would they be?
    for other, of in ((table, pd.concat([ahead, ahead])), (table[:-1], ahead)):
        assert "future: id column 'shop' is not there" in refused(
            other, id="shop", target="sold", future=of
        )


def test_truth_values_and_categories_are_numbers():
    table, future = priced()
    table = table.assign(
        promo=[True, False] * 3 + [True], sky=["sun", "rain", None, "sun", "fog", "fog", "sun"]
    )
    future = future.assign(promo=False, sky=["snow", "sun", "rain"])
    panel = read_panel(table, id="shop", target="sold", future=future)
    assert panel.known == ("price", "promo", "sky")
    assert panel.categories == {"sky": ("fog", "rain", "snow", "sun")}
    np.testing.assert_array_equal(panel.known_values[1], [1, 0, 1, 0, 1, NAN, 0, 1])
    np.testing.assert_array_equal(panel.known_values[2], [3, 1, NAN, 3, 0, NAN, 0, 3])
    np.testing.assert_array_equal(panel.future_values[2], [[2, 3], [1, NAN]])
    assert said(
        panel, "categories are numbered 0, 1, ... in this order: sky (fog, rain, snow, sun)"
    )


def test_a_column_of_categories_keeps_its_order():
    order = pd.CategoricalDtype(["S", "M", "L"], ordered=True)
    table, _ = priced()
    table["size"] = pd.Series(list("LMSLLSS")).astype(order)
    panel = read_panel(table, id="shop", target="sold")
    assert panel.categories == {"size": ("S", "M", "L")}
    np.testing.assert_array_equal(
        panel.past_values[panel.past.index("size")], [2, 1, 0, 2, 2, NAN, 0, 0]
    )


def test_what_is_the_same_in_all_rows_of_an_item_is_a_fact_of_it():
    table = priced()[0].assign(
        size=["big"] * 4 + ["small"] * 3, area=[5] * 4 + [7] * 3, open=[True] * 7
    )
    panel = read_panel(table, id="shop", target="sold")
    assert list(panel.static.columns) == ["size", "area", "open"]
    assert panel.static["size"].tolist() == ["big", "small"] and panel.static["area"].tolist() == [
        5,
        7,
    ]
    assert panel.static["open"].tolist() == [1, 1]
    assert panel.past == ("price",) and said(panel, "columns left over are past covariates: price")
    message = refused(table, id="shop", target="sold", static="price")
    assert "static column 'price' changes within an item: past= or known=" in message


def test_roles_that_are_asked_for():
    table, future = priced()
    table = table.assign(a=range(7), b=range(7))
    panel = read_panel(
        table, id="shop", target=["sold", "a"], past="b", known="price", future=future
    )
    assert (panel.columns, panel.past, panel.known) == (("sold", "a"), ("b",), ("price",))
    np.testing.assert_array_equal(panel.values[1], [0, 1, 2, 3, 4, NAN, 5, 6])
    assert "columns named more than once, or for two roles: price" in refused(
        table, id="shop", target="sold", past="price", known="price"
    )
    assert "known column 'prise' is not there; did you mean 'price'?" in refused(
        table, id="shop", target="sold", known="prise"
    )
    assert "future: known column 'b' is not there" in refused(
        table, id="shop", target="sold", known="b", future=future
    )


def test_the_target_is_found_or_asked_for():
    assert read_panel(shops(), id="shop").columns == ("sold",)
    table, future = priced()
    assert read_panel(table, id="shop", future=future).columns == ("sold",)
    message = refused(table, id="shop")
    assert "several columns may be the target: sold, price; say which with target=" in message
    assert read_panel(table.rename(columns={"sold": "y"}), id="shop").columns == ("y",)


def test_a_lone_column_of_numbers_is_the_target_though_it_is_constant():
    panel = read_panel(shops().iloc[:1], id="shop")
    assert panel.columns == ("sold",) and panel.values.tolist() == [[1]]


def test_columns_that_can_be_no_covariates_are_left_out_and_said():
    table = shops().assign(
        empty=NAN,
        opened=days("2020-01-01", 7),
        mixed=["1", "b", "3", "4", "5", "6", "7"],
        wait=pd.to_timedelta(range(7), unit="h"),
        truth=[True, None, False, True, True, False, True],
    )
    panel = read_panel(table, id="shop", time="date", target="sold")
    assert panel.past == ("truth",) and panel.static is None
    assert said(
        panel,
        "left out (empty, dates, text that is no kinds, or text and numbers): empty, opened, "
        "mixed, wait",
    )
    assert "'mixed': 1 cells are not numbers" in refused(
        table, id="shop", time="date", target="sold", past="mixed"
    )


def test_dates_are_found_under_any_name_and_years_too():
    table = shops().rename(columns={"date": "wann"})
    assert read_panel(table, id="shop").time_name == "wann"
    two = table.assign(other=table["wann"])
    assert "several columns may hold the time: wann, other; say which with time=" in refused(
        two, id="shop"
    )
    years = pd.DataFrame(
        {"land": list("xxxyyy"), "year": [2001, 2002, 2003] * 2, "gdp": np.arange(6.0)}
    )
    panel = read_panel(years, id="land")
    assert (panel.freq, panel.time_name, panel.columns) == ("Y", "year", ("gdp",))
    months = years.rename(columns={"year": "month"}).assign(year=2001, month=[1, 2, 3] * 2)
    assert read_panel(months, id="land").freq == "M"


def test_ids_that_lack_a_column_are_named():
    table = pd.concat([shops().assign(item=item) for item in ("i", "j")])
    assert "id=['shop', 'item'] reads each as an item" in refused(table, id="shop", target="sold")
    panel = read_panel(table, id=["shop", "item"], target="sold")
    assert panel.ids.tolist() == ["A/i", "B/i", "A/j", "B/j"]
    named = read_panel(table.rename(columns={"shop": "store"}), target="sold")
    assert named.id_name == "store/item"


def test_rows_ahead_of_a_lone_item_need_no_id():
    table, future = priced()
    own = future[future["shop"] == "A"].drop(columns="shop")
    panel = read_panel(table[table["shop"] == "A"], id="shop", target="sold", future=own)
    np.testing.assert_array_equal(panel.future_values, [[[9, 10]]])


def test_rows_ahead_follow_where_there_are_no_stamps():
    table, future = priced()
    panel = read_panel(
        table.drop(columns="date"),
        id="shop",
        target="sold",
        future=future.drop(columns="date").iloc[::-1],
    )
    np.testing.assert_array_equal(panel.future_values, [[[10, 9], [80, NAN]]])
    counted = table.assign(date=[0, 1, 2, 3, 7, 8, 9])
    panel = read_panel(counted, id="shop", target="sold", future=future.assign(date=[4, 5, 11]))
    np.testing.assert_array_equal(panel.future_values, [[[9, 10], [NAN, 80]]])


def test_rows_as_they_come():
    panel = read_panel(shops().iloc[::-1], id="shop", irregular="ignore")
    np.testing.assert_array_equal(panel.values, [[30, 20, 10, 4, 3, 2, 1]])
    assert (
        panel.first is None
        and panel.freq == "D"
        and said(panel, "taken as they come, without stamps")
    )


# ---- wide tables ----


def test_a_wide_table_is_one_item():
    table = pd.DataFrame({"date": days("2024-01-01", 3), "a": [1.0, 2, 3], "b": [4.0, NAN, 6]})
    panel = read_panel(table)
    assert panel.n_items == 1 and panel.columns == ("a", "b") and panel.id_name is None
    np.testing.assert_array_equal(panel.values, [[1, 2, 3], [4, NAN, 6]])


def test_a_wide_table_with_covariates():
    table = pd.DataFrame(
        {
            "time": days("2024-01-01", 4, "h"),
            "sales": [1.0, 2, 3, 4],
            "price": 5.0,
            "open": [1, 0, 1, 0],
        }
    )
    future = pd.DataFrame(
        {"time": days("2024-01-01 04:00", 2, "h"), "price": [6.0, 7.0], "open": [1, 1]}
    )
    panel = read_panel(table, target="sales", future=future)
    assert (panel.columns, panel.known) == (("sales",), ("price", "open"))
    np.testing.assert_array_equal(panel.future_values, [[[6, 7]], [[1, 1]]])
    assert read_panel(table, future=future).columns == ("sales",)
    assert read_panel(table, target="sales").past == ("price", "open")


def test_a_wide_table_whose_target_ends_before_its_covariates_is_asked_about():
    table = pd.DataFrame(
        {"date": days("2024-01-01", 5), "sales": [1.0, 2, 3, NAN, NAN], "price": [1.0, 2, 3, 4, 5]}
    )
    message = refused(table)
    assert (
        "column 'sales': the last 2 rows are empty where other columns go on; name the columns to "
        "forecast" in message
    )
    panel = read_panel(table, target="sales")
    assert panel.known == ("price",) and panel.n_rows == 3
    np.testing.assert_array_equal(panel.future_values, [[[4, 5]]])


def test_arrays_and_series_are_read_as_they_come():
    panel = read_panel(np.arange(6.0).reshape(3, 2))
    assert panel.columns == ("0", "1") and panel.n_rows == 3 and panel.first is None
    series = read_series(pd.Series([1.0, 2.0], days("2024-01-01", 2), name="y"))
    one = read_panel(series, name="mine")
    assert one.name == "mine" and one.columns == ("y",) and read_panel(one) is one
    with pytest.raises(
        ValueError, match="id, freq: no options of a Panel, which has been read already"
    ):
        read_panel(one, id="shop", freq="D")


def test_other_kinds_of_tables():
    wanted = read_panel(shops(), id="shop", target="sold")
    same(wanted, read_panel(pa.table(shops()), id="shop", target="sold"))
    polars = pytest.importorskip("polars")
    same(wanted, read_panel(polars.from_pandas(shops()), id="shop", target="sold"))


# ---- values ----


def test_missing_values_are_kept_filled_or_refused():
    table = shops()
    table.loc[[0, 2], "sold"] = NAN
    kept = read_panel(table, id="shop", target="sold")
    np.testing.assert_array_equal(kept.values, [[NAN, 2, NAN, 4, 10, NAN, 20, 30]])
    filled = read_panel(table, id="shop", target="sold", missing="interpolate")
    np.testing.assert_array_equal(filled.values, [[2, 2, 3, 4, 10, 15, 20, 30]])
    message = refused(table, id="shop", target="sold", missing="error")
    assert "column 'sold': 3 missing, A row 0, A row 2, B row 1" in message


def test_infinite_and_too_large_values_and_text_are_refused():
    assert "1 infinite cells, B row 2" in refused(
        shops().replace(20.0, np.inf), id="shop", target="sold"
    )
    assert "numbers beyond 1e+100" in refused(
        shops().replace(20.0, 1e200), id="shop", target="sold"
    )
    table = shops().astype({"sold": object}).replace(20.0, "n/a")
    assert "column 'sold': 1 cells are not numbers, row 5 'n/a'" in refused(
        table, id="shop", target="sold"
    )


def test_options_are_checked():
    with pytest.raises(ValueError, match="missing must be one of"):
        PanelOptions(missing="drop")
    with pytest.raises(ValueError, match="unknown frequency"):
        read_panel(shops(), freq="fortnight")
    assert PanelOptions(freq="H", known=(c for c in "ab")) == PanelOptions(
        freq="h", known=["a", "b"]
    )


def test_a_grid_of_far_too_small_a_step_is_refused():
    assert "give a longer freq=" in refused(
        shops(), id="shop", target="sold", freq="s", irregular="regularise"
    )
    wrong = shops()
    wrong.loc[6, "date"] = pd.Timestamp("2204-01-07")
    assert "(most: B, 2024-01-03 00:00:00 to 2204-01-07 00:00:00); check these dates" in refused(
        wrong, id="shop"
    )


def test_holes_that_lie_regularly_by_chance_are_no_other_step():
    few = pd.DataFrame({"shop": "F", "date": days("2024-01-01", 9)[[0, 2, 4, 8]], "sold": 1.0})
    panel = read_panel(pd.concat([shops(), few]), id="shop")
    assert panel.lengths.tolist() == [4, 4, 9]
    many = pd.DataFrame(
        {"shop": "F", "date": days("2024-01-01", 19)[[0, 2, 4, 8, 10, 12, 18]], "sold": 1.0}
    )
    assert "another step than D (F: 2D)" in refused(pd.concat([shops(), many]), id="shop", freq="D")


def test_days_that_are_regular_in_utc_only_are_counted_there():
    stamps = pd.date_range("2024-03-28", periods=6, freq="D", tz="UTC").tz_convert("Europe/Berlin")
    table = pd.DataFrame(
        {"id": ["a"] * 6 + ["b"] * 4, "ds": [*stamps, *stamps[2:]], "y": np.arange(10.0)}
    )
    panel = read_panel(table)
    assert (panel.freq, panel.tz, panel.lengths.tolist()) == ("D", "UTC", [6, 4])
    assert said(panel, "the steps are regular in UTC, not on the clock in Europe/Berlin")
    assert str(panel.stamps_after(1)[1, 0]) == "2024-04-03T00:00:00.000000"


# ---- properties ----


@st.composite
def tables(draw):
    """A long table of up to five items with holes, a covariate and a fact."""
    parts = []
    for item in range(draw(st.integers(1, 5))):
        count = draw(st.integers(4, 12))
        start = draw(st.integers(0, 20))
        kept = [0, 1, *sorted(draw(st.sets(st.integers(2, count - 1), min_size=1)))]
        value = np.arange(count, dtype=float) * (item + 1)
        part = pd.DataFrame(
            {"shop": f"s{item}", "date": days("2024-01-01", count) + pd.Timedelta(days=start)}
        )
        part["sold"] = value
        part["price"] = value + 0.5
        part["sky"] = np.where(np.arange(count) % 3 == 0, "sun", f"rain{item}")
        part["kind"] = "xy"[item % 2]
        parts.append(part.iloc[kept])
    return pd.concat(parts, ignore_index=True)


@settings(max_examples=15, deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(table, random):
    order = list(range(len(table)))
    random.shuffle(order)
    panel = read_panel(table, id="shop", target="sold", freq="D")
    same(panel, read_panel(table.iloc[order], id="shop", target="sold", freq="D"))


@settings(max_examples=15, deadline=None)
@given(tables(), st.integers(0, 4))
def test_an_item_does_not_depend_on_the_others(table, item):
    table = table.drop(columns="sky")  # codes are those of all items together
    every = items_of(
        read_panel(table, id="shop", target="sold", freq="D", past="price", static="kind")
    )
    key = f"s{item % len(every)}"
    alone = read_panel(
        table[table["shop"] == key], id="shop", target="sold", freq="D", past="price", static="kind"
    )
    for fact, twin in zip(every[key], items_of(alone)[key], strict=True):
        np.testing.assert_array_equal(fact, twin)


def test_a_long_table_and_its_items_read_one_by_one_agree():
    table = shops()
    panel = read_panel(table, id="shop", target="sold")
    for i, key in enumerate(panel.ids):
        own = table[table["shop"] == key].drop(columns="shop").set_index("date")
        series = read_series(own, irregular="regularise", missing="keep")
        item = panel.item(i)
        np.testing.assert_array_equal(item.values, series.values)
        np.testing.assert_array_equal(item.timestamps, series.timestamps)


def test_a_panel_is_not_changed_by_reading():
    table = shops()
    before = table.copy()
    read_panel(table, id="shop", target="sold", missing="interpolate")
    pd.testing.assert_frame_equal(table, before)
    assert dataclasses.is_dataclass(Panel)
