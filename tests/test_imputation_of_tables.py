import json

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments.benchmarks import holes
from ltsm_jax import cli, imputation
from ltsm_jax.data import DataError, read_panel
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.methods.task_data import imputation_of, ready
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.training import TrainConfig

# A random model: with an instance norm it expects the mean of the window and little else.
MODEL = Timer(
    TimerConfig(
        8, 8, 8, equal_layers(1, 1, 8, 8), context_len=32, horizon=8, task="imputation", dropout=0.0
    )
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def table(n=100, columns=("a", "b")):
    rng = np.random.default_rng(0)
    found = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=n, freq="h")})
    for name in columns:
        found[name] = rng.normal(size=n).cumsum() + 100
    return found


def with_holes(data, holes):
    data = data.copy()
    for name, rows in holes.items():
        data.loc[rows, name] = np.nan
    return data


@pytest.fixture(scope="module")
def holed():
    return with_holes(table(), {"a": [0, 1, 40, 41, 42, 43, 70], "b": list(range(30, 62))})


@pytest.mark.parametrize("fill", ["auto", "anchored", "model", "linear"])
def test_holes_alone_are_filled_and_flagged(fill, params, holed):
    found = ltsm_jax.impute(MODEL, params, holed, fill=fill)
    assert list(found.table.columns) == ["date", "a", "b", "a_filled", "b_filled"]
    assert (found.table["date"] == holed["date"]).all() and found.n_filled == 39
    for name in ("a", "b"):
        was_empty = holed[name].isna().to_numpy()
        assert (found.table[f"{name}_filled"].to_numpy() == was_empty).all()
        after = found.table[name].to_numpy()
        assert np.isfinite(after).all()
        np.testing.assert_array_equal(
            after[~was_empty], holed[name].to_numpy()[~was_empty], "the same bits"
        )
    assert found.check["column"].tolist() == ["a", "b"]
    if fill != "auto":
        assert set(found.check["filled_by"]) == {fill} and (found.check["cells"] == 0).all()


def test_the_line_is_numpys_and_auto_takes_what_is_better_on_hidden_cells(params, holed):
    line = ltsm_jax.impute(MODEL, params, holed, fill="linear").table
    known = holed["a"].notna().to_numpy()
    rows = np.arange(len(holed))
    np.testing.assert_array_equal(line["a"], np.interp(rows, rows[known], holed["a"][known]))
    found = ltsm_jax.impute(MODEL, params, holed)
    check = found.check.set_index("column")
    assert (check["cells"] > 0).all()
    names = ["anchored", "model", "linear"]
    lowest = check[[f"{name}_mse" for name in names]].idxmin(axis=1).str.removesuffix("_mse")
    assert ((check["filled_by"] == lowest) | (check["filled_by"] == "linear")).all()
    ways = {name: ltsm_jax.impute(MODEL, params, holed, fill=name).table for name in names}
    for name in ("a", "b"):
        np.testing.assert_array_equal(found.table[name], ways[check.loc[name, "filled_by"]][name])
    assert "known cells, hidden alike" in str(found) and found._repr_html_().startswith("<pre>")


def test_a_way_to_fill_is_chosen_where_it_is_better_in_most_spans_of_time_not_by_one_event():
    line = np.full(8, 10.0)
    steadily, once = line - [1, 2, 1, 2, 1, 2, 1, 2], line.copy()
    once[3] = 0.0
    errors = np.stack(
        [[line, line, steadily], [steadily, once, once], [line, line, line]]
    )  # K = 3 ways, C = 3 columns
    assert imputation._chosen(errors, imputation.FILLS).tolist() == [1, 2, 0]
    assert imputation._chosen(np.zeros((3, 2, 8)), imputation.FILLS).tolist() == [0, 0], (
        "nothing could be hidden"
    )
    assert imputation._chosen(errors[:1], ("model",)).tolist() == [0, 0, 0]
    assert imputation._chosen(errors[:, :, :1], imputation.FILLS).tolist() == [1, 2, 0], (
        "one span: the lowest"
    )


def test_a_model_that_says_a_constant_fills_by_the_straight_line(params):
    """The ends of a fill are moved to the values beside it, and a constant has no shape of
    its own.
    """
    constant = params | {"head": jax.tree.map(np.zeros_like, params["head"])}
    data = with_holes(table(columns=("a",)), {"a": [50, 51, 52, 53]})
    found = ltsm_jax.impute(MODEL, constant, data, fill="anchored").table["a"]
    np.testing.assert_allclose(
        found, ltsm_jax.impute(MODEL, constant, data, fill="linear").table["a"], rtol=1e-5
    )


@pytest.mark.parametrize("n", [3, 9, 31, 32, 33, 200])
def test_any_length(n, params):
    found = ltsm_jax.impute(MODEL, params, with_holes(table(n), {"a": [1]}), fill="model").table
    assert (
        len(found) == n
        and np.isfinite(found[["a", "b"]]).all(axis=None)
        and found["a_filled"].sum() == 1
    )


def test_a_longer_outage_than_a_window_and_a_column_without_values(params):
    data = with_holes(table(200), {"a": list(range(50, 150))})
    found = ltsm_jax.impute(MODEL, params, data, fill="model").table
    assert np.isfinite(found["a"]).all() and found["a_filled"].sum() == 100
    empty = ltsm_jax.impute(MODEL, params, data.assign(b=np.nan), target=["a", "b"])
    assert empty.table["b"].isna().all() and not empty.table["b_filled"].any()
    assert "200 cells are left empty" in str(empty)


def test_a_column_that_ends_before_the_others_has_holes_there(params):
    """A forecast would have to know whether it begins behind the others; a fill does not."""
    data = with_holes(table(200), {"a": list(range(150, 200))})
    found = ltsm_jax.impute(MODEL, params, data).table
    assert len(found) == 200 and found["a_filled"].sum() == 50 and np.isfinite(found["a"]).all()
    with pytest.raises(DataError, match="the last 50 rows are empty where other columns go on"):
        read_panel(data)


def test_the_error_on_holes_of_a_table_is_in_units_of_its_variance():
    truth = pd.DataFrame({"a": [0.0, 2.0, 0.0, 2.0], "b": [10.0, 10.0, 30.0, np.nan]})
    holed = truth.where([[False, True], [True, False], [True, True], [True, False]])
    filled = holed.fillna({"a": 2.0, "b": 20.0})
    total, cells = holes.errors(truth, holed, filled)
    assert cells == 2  # the last cell of b was never known
    np.testing.assert_allclose(total, 2.0**2 / 1.0 + 10.0**2 / (800 / 9))


def test_long_tables_of_items_of_different_length(params):
    one, two = (
        with_holes(table(60, ("sold",)), {"sold": [10]}),
        with_holes(table(45, ("sold",)), {"sold": [0, 20, 21]}),
    )
    long = pd.concat([one.assign(shop="x"), two.assign(shop="y")], ignore_index=True)
    found = ltsm_jax.impute(MODEL, params, long, id="shop", target="sold")
    assert list(found.table.columns) == ["shop", "date", "sold", "sold_filled"]
    assert found.table.groupby("shop")["sold_filled"].sum().to_dict() == {"x": 1, "y": 3}
    alone = ltsm_jax.impute(MODEL, params, two, target="sold", fill="model").table["sold"]
    both = ltsm_jax.impute(MODEL, params, long, id="shop", target="sold", fill="model").table
    np.testing.assert_allclose(both[both["shop"] == "y"]["sold"], alone, rtol=1e-5)


def test_rows_that_a_table_leaves_out_are_holes(params):
    data = table(80, ("a",)).drop(index=[30, 31])
    found = ltsm_jax.impute(MODEL, params, data, irregular="regularise").table
    assert len(found) == 80 and found.index[found["a_filled"]].tolist() == [30, 31]


def test_rows_without_stamps_and_a_table_without_holes(params):
    data = table(50, ("a",)).drop(columns="date")
    found = ltsm_jax.impute(MODEL, params, data)
    assert (
        list(found.table.columns) == ["row", "a", "a_filled"]
        and found.n_filled == 0
        and not len(found.check)
    )


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (table(), {"fill": "mean"}, "fill must be auto"),
        (table().rename(columns={"b": "a_filled"}), {}, "a_filled"),
        (table(), {"method": "fff"}, "unknown method"),
        (table(40), {"method": "ff"}, "too few to tune on"),
    ],
)
def test_refusals(params, data, options, said):
    with pytest.raises(ValueError, match=said):
        ltsm_jax.impute(MODEL, params, data, **options)


def test_a_family_without_the_task_is_refused():
    model = ltsm_jax.preset("amazon/chronos-bolt-tiny")
    with pytest.raises(ValueError, match="not imputation|not those of"):
        ltsm_jax.impute(model, {}, table())


def test_windows_of_a_table_to_tune_on():
    series = ltsm_jax.data.load_series(table(400))
    splits, task = imputation_of(MODEL, series)
    cut = 400 - max(40, 2 * splits.train.context_len)
    assert splits.train.context_len == 16 and task.holes == "blocks"
    assert np.asarray(splits.train.starts).max() + 16 < cut <= np.asarray(splits.val.starts).min()
    assert np.asarray(splits.val.starts).max() + 16 == 398


def test_a_difference_of_two_equal_models_is_none(params):
    made = ready("imputation", MODEL, ltsm_jax.data.load_series(table(2000)))
    found = made.difference(params, params)
    assert found.mean == 0 and found.low == found.high == 0
    total, points = made.errors(params)
    scores = made.task.evaluate(MODEL, params, made.data, "val")
    assert (
        total.sum() / points.sum() == pytest.approx(scores["mse"])
        and points.sum() == scores["points"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["imputation", "anomaly"])
def test_fit_for_a_task(task, params):
    config = TrainConfig(epochs=2, batch_size=16, lr=1e-3)
    model = MODEL
    if task == "anomaly":
        model = Timer(
            TimerConfig.of(
                96, 8, 16, 1, 2, context_len=768, horizon=96, task="anomaly", dropout=0.0
            )
        )
        params = jax.jit(model.init)(jax.random.key(0))
    data = table(1000, ("a",))
    fitted = ltsm_jax.fit(
        model, params, data, task=task, method="ff", config=config, show_progress=False
    )
    assert fitted.kept in ("tuned", "zero_shot") and np.isfinite(fitted.difference)
    assert fitted.difference == pytest.approx(
        fitted.tuned["mse"] - fitted.zero_shot["mse"], abs=1e-5
    )
    assert ("linear" in str(fitted)) == (task == "imputation") and "ff: validation MSE" in str(
        fitted
    )
    if task == "imputation":
        tuned = ltsm_jax.impute(
            model, params, with_holes(data, {"a": [5]}), method="ff", config=config
        )
        assert "tuned on the table by ff" in str(tuned)


def test_fit_says_what_is_for_forecasting_alone(params):
    with pytest.raises(ValueError, match="horizon, mode are for forecasting"):
        ltsm_jax.fit(MODEL, params, table(), task="imputation", horizon=8, mode="ims")
    with pytest.raises(ValueError, match="task must be"):
        ltsm_jax.fit(MODEL, params, table(), task="guess")


def test_the_command(params, holed, tmp_path, capsys):
    ltsm_jax.save(tmp_path / "model", MODEL, params)
    holed.to_csv(tmp_path / "t.csv", index=False)
    words = ["impute", str(tmp_path / "t.csv"), "--model", str(tmp_path / "model")]
    out = ["--out", str(tmp_path / "w.csv"), "--plot", str(tmp_path / "w.png")]
    assert cli.main([*words, *out]) == 0
    assert "39 of 200 cells filled" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "w.csv")
    assert (
        written.notna().all(axis=None)
        and written["b_filled"].sum() == 32
        and (tmp_path / "w.png").is_file()
    )
    assert cli.main([*words, *out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["filled"] == 39
    assert cli.main([*words, "--plan"]) == 0
    assert cli.main(["impute", "nowhere.csv", "--model", str(tmp_path / "model")]) == 3
