import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax import cli
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.training import TrainConfig

# A random model: with an instance norm it expects the mean of the window and little else.
MODEL = Timer(
    TimerConfig.of(96, 8, 16, 1, 2, context_len=768, horizon=96, task="anomaly", dropout=0.0)
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def table(n=800, columns=("a", "b")):
    rng = np.random.default_rng(0)
    found = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=n, freq="h")})
    for name in columns:
        found[name] = rng.normal(size=n) * 10 + 100
    return found


@pytest.fixture(scope="module")
def found(params):
    data = table()
    data.loc[600:603, "b"] += 200
    return ltsm_jax.detect(MODEL, params, data, first=0.5, quantile=0.999)


def test_a_jump_is_flagged_with_its_dates_and_column(found):
    t = found.table
    assert list(t.columns) == ["date", "a", "b", "score", "anomalous", "column"] and len(t) == 800
    assert t["score"].iloc[:96].isna().all() and t["score"].iloc[96:].notna().all()
    assert t["anomalous"].iloc[600:604].all() and not t["anomalous"].iloc[:400].any()
    assert t["anomalous"].sum() < 12 and (t["column"].iloc[600:604] == "b").all()
    best = found.ranges().iloc[0]
    assert (best["from"], best["rows"]) == (pd.Timestamp("2024-01-26"), 4)
    assert "2024-01-26 00:00:00 to 2024-01-26 03:00:00: 4 rows" in str(found)
    assert "rows anomalous" in repr(found) and found._repr_html_().startswith("<pre>")


def test_scores_are_relative_to_the_first_part_and_its_quantile(found):
    """The score of a row is the larger of two targets' errors, so its mean in the first part is
    above 1.
    """
    before = found.table["score"].iloc[96:400]
    assert found.threshold == pytest.approx(np.quantile(before, 0.999)) and 1 < before.mean() < 2


def test_the_picture(found, tmp_path):
    figure = found.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000 and len(figure.axes) == 3


def test_empty_cells_have_no_score_and_rows_without_stamps_a_number(params):
    data = table(columns=("a",)).drop(columns="date")
    data.loc[[500, 501], "a"] = np.nan
    found = ltsm_jax.detect(MODEL, params, data, missing="keep", first=0.5)
    assert list(found.table.columns) == ["row", "a", "score", "anomalous"]
    assert (
        found.table["score"].iloc[96:].isna().sum() == 2
        and not found.table["anomalous"].iloc[500:502].any()
    )


def test_units_do_not_matter(params):
    data = table(columns=("a",))
    first = ltsm_jax.detect(MODEL, params, data, first=0.5).table["score"]
    second = ltsm_jax.detect(MODEL, params, data.assign(a=data["a"] * 1e6 - 5), first=0.5).table[
        "score"
    ]
    np.testing.assert_allclose(first, second, rtol=1e-2)


def test_a_constant_target_is_no_anomaly(params):
    found = ltsm_jax.detect(MODEL, params, table().assign(a=3.0), first=0.5)
    assert np.isfinite(found.table["score"].iloc[96:]).all()


@pytest.mark.slow
def test_tuning_on_the_first_part(params):
    config = TrainConfig(epochs=1, batch_size=16)
    found = ltsm_jax.detect(
        MODEL,
        params,
        table(1000, ("a",)),
        first=0.6,
        method="ff",
        config=config,
        show_progress=False,
    )
    assert "tuned on the first 600 rows by ff" in str(found)
    changed = jax.tree.map(lambda p, q: bool((p != q).any()), params, found.params)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (table(250), {"first": 0.9}, "at least 288"),
        (table(400), {}, "a threshold needs 196"),
        (table(), {"first": 1.0}, "between 0 and 1"),
        (table(), {"quantile": 0.0}, "between 0 and 1"),
        (table(columns=("score",)), {"first": 0.5}, "called score"),
        (table(), {"first": 0.5, "method": "fff"}, "unknown method"),
        (
            table().assign(a=np.where(np.arange(800) < 350, np.nan, 1)),
            {"first": 0.5, "missing": "keep"},
            "fewer than 100 known rows",
        ),
        (table(600), {"first": 0.4, "method": "ff"}, "too few, at least 288"),
    ],
)
def test_refusals(params, data, options, said):
    with pytest.raises(ValueError, match=said):
        ltsm_jax.detect(MODEL, params, data, **options)


def test_the_command(params, tmp_path, capsys):
    ltsm_jax.save(tmp_path / "model", MODEL, params)
    data = table()
    data.loc[600:603, "b"] += 200
    data.to_csv(tmp_path / "t.csv", index=False)
    words = [
        "detect",
        str(tmp_path / "t.csv"),
        "--model",
        str(tmp_path / "model"),
        "--first",
        "0.5",
    ]
    out = [
        "--out",
        str(tmp_path / "s.csv"),
        "--plot",
        str(tmp_path / "s.png"),
        "--quantile",
        "0.999",
    ]
    assert cli.main([*words, *out]) == 0
    assert "2024-01-26 00:00:00" in capsys.readouterr().out
    assert (
        pd.read_csv(tmp_path / "s.csv")["anomalous"].iloc[600:604].all()
        and (tmp_path / "s.png").is_file()
    )
    assert cli.main([*words, "--plan", "--json"]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "none" / "s.csv")]) == 2
    assert cli.main(["detect", "nowhere.csv", "--model", str(tmp_path / "model")]) == 3
