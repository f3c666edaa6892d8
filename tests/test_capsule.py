"""A capsule forecasts as the library does, on a machine that has not got the library."""

import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest

from ltsm_jax import Forecaster, capsule
from ltsm_jax.capsule.runner import Capsule
from ltsm_jax.data import read_panel
from ltsm_jax.models.chronos_2 import Chronos2
from ltsm_jax.models.chronos_bolt import ChronosBolt
from ltsm_jax.models.moirai import Moirai
from ltsm_jax.models.timer import Timer

ROWS, HORIZON = 120, 5


def forecaster(family, **facts):
    """A random model that looks at fewer rows than there are, as a capsule at a fixed number."""
    model = family(family.small())
    params = jax.jit(model.init)(jax.random.key(0))
    return Forecaster(model, params, context_len=min(model.context_len, 64), **facts)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    found = pd.DataFrame({"day": pd.date_range("2024-01-01", periods=ROWS, freq="D")})
    found["sold"] = rng.normal(size=ROWS).cumsum() + 1e4
    found["bought"] = np.sin(np.arange(ROWS) / 7 * 2 * np.pi) + rng.normal(0, 0.1, ROWS)
    found.loc[ROWS - 9 : ROWS - 7, "sold"] = np.nan
    return found


def history(table, joint):
    values = table[["sold", "bought"]].to_numpy().T
    return values[None] if joint else values[:, None]


def said_by_the_library(found, levels):
    """Point [C, H] and quantiles [C, H, W] of a table of forecasts."""
    wide = found[["predictions", *map(str, levels)]].to_numpy().reshape(2, HORIZON, -1)
    return wide[..., 0], wide[..., 1:]


CASES = {
    "timer": (Timer, {}, ()),
    "chronos_bolt": (ChronosBolt, {}, (0.1, 0.25, 0.9)),
    "chronos_2": (Chronos2, {}, (0.1, 0.5)),
    "moirai": (Moirai, {"freq": "D"}, (0.2, 0.8)),
    "naive": (Timer, {"baseline": "seasonal_naive", "freq": "D"}, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_capsule_forecasts_as_the_library_does_bit_for_bit(case, table, tmp_path):
    family, facts, levels = CASES[case]
    ours = forecaster(family, **facts)
    file = tmp_path / "x.capsule"
    told = capsule.write(ours, file, HORIZON, quantile_levels=levels, n_targets=2)
    assert told.path == file and told.size == file.stat().st_size and told.drift is None
    theirs = Capsule(file)
    got = theirs.forecast(history(table, theirs.facts["joint"]))
    assert got["levels"] == list(levels)
    want = ours.predict(table, HORIZON, quantile_levels=levels, show_progress=False)
    point, quantiles = said_by_the_library(want, levels)
    np.testing.assert_array_equal(got["point"].reshape(point.shape), point)
    np.testing.assert_array_equal(got["quantiles"].reshape(quantiles.shape), quantiles)


def test_quantiles_of_a_calibration(table, tmp_path):
    ours = forecaster(Timer, freq="D", targets=("sold", "bought"))
    panel = read_panel(table, target=["sold", "bought"])
    with pytest.raises(ValueError, match="has no calibration of 5 steps of 2 targets"):
        capsule.write(ours, tmp_path / "x.capsule", HORIZON)
    ours = ours.calibrated(panel, HORIZON)
    capsule.write(ours, tmp_path / "x.capsule", HORIZON)
    got = Capsule(tmp_path / "x.capsule").forecast(history(table, False))
    want = ours.predict(panel, HORIZON, show_progress=False)
    point, quantiles = said_by_the_library(want, (0.1, 0.5, 0.9))
    np.testing.assert_array_equal(got["point"][:, 0], point)
    np.testing.assert_allclose(got["quantiles"][:, 0], quantiles, rtol=1e-12)


def test_covariates(table, tmp_path):
    ours = forecaster(Chronos2, targets=("sold",), past=("bought",), known=("price",))
    price = np.linspace(3.0, 4.0, ROWS + HORIZON) ** 2
    days = pd.date_range("2024-01-01", periods=ROWS + HORIZON, freq="D")
    whole = table.assign(price=price[:ROWS])
    ahead = pd.DataFrame({"day": days[ROWS:], "price": price[ROWS:]})
    capsule.write(ours, tmp_path / "x.capsule", HORIZON)
    theirs = Capsule(tmp_path / "x.capsule")
    sold, bought = history(table, True)[:, :1], history(table, True)[:, 1:]
    got = theirs.forecast(sold, past=bought, known=price[None, None])
    want = ours.predict(whole, HORIZON, target="sold", future=ahead, show_progress=False)
    np.testing.assert_array_equal(got["point"].ravel(), want["predictions"])
    np.testing.assert_array_equal(got["quantiles"][0, 0], want[["0.1", "0.5", "0.9"]])
    with pytest.raises(ValueError, match=r"known is \[N, 1, time\], not \[0\]"):
        theirs.forecast(sold, past=bought)


def test_it_runs_where_the_library_is_not(table, tmp_path):
    """From another folder, with imports of the library and of flatbuffers refused."""
    ours = forecaster(ChronosBolt, targets=("sold", "bought"))
    capsule.write(ours, tmp_path / "shop.capsule", HORIZON)
    table.to_csv(tmp_path / "history.csv", index=False)
    blocked = (
        "import runpy, sys\n"
        "for name in ('ltsm_jax', 'converters', 'flax', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['shop.capsule', 'history.csv', 'forecast.csv']\n"
        "runpy.run_path('shop.capsule', run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", blocked], cwd=tmp_path, check=True, timeout=600)
    got = pd.read_csv(tmp_path / "forecast.csv")
    want = ours.predict(table, HORIZON, show_progress=False)
    assert got["target"].tolist() == ["sold"] * HORIZON + ["bought"] * HORIZON
    assert got["step"].tolist() == [*range(1, HORIZON + 1)] * 2
    for name in ("predictions", "0.1", "0.5", "0.9"):
        np.testing.assert_array_equal(got[name], want[name])


def test_flatbuffers_is_inside_with_its_licence(tmp_path):
    import zipfile

    capsule.write(forecaster(ChronosBolt), tmp_path / "x.capsule", HORIZON)
    names = zipfile.ZipFile(tmp_path / "x.capsule").namelist()
    assert "flatbuffers/__init__.py" in names and any(n.endswith("/METADATA") for n in names)


@pytest.mark.parametrize("at", [0, 300, 0.3, 0.6, 0.9, -70, -1])
def test_a_changed_byte_is_refused(at, tmp_path, whole):
    data = bytearray(whole)
    place = int(at * len(data)) if isinstance(at, float) else at
    data[place] ^= 1
    (tmp_path / "x.capsule").write_bytes(data)
    with pytest.raises(ValueError, match="damaged or changed"):
        Capsule(tmp_path / "x.capsule")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "x.capsule"
    capsule.write(forecaster(ChronosBolt), file, HORIZON)
    return file.read_bytes()


def test_8_bits_are_a_quarter_and_their_drift_is_said(tmp_path):
    ours = Forecaster.load("timer-tiny")
    full = capsule.write(ours, tmp_path / "full.capsule", 96, quantile_levels=())
    small = capsule.write(ours, tmp_path / "small.capsule", 96, quantile_levels=(), int8=True)
    assert small.size < 0.4 * full.size and small.drift is not None
    mean, largest = small.drift
    assert 0 < mean < largest < 0.2 and "8-bit weights move forecasts" in str(small)
    series = np.sin(np.arange(672) / 24 * 2 * np.pi)[None, None]
    exact, rounded = (
        Capsule(tmp_path / f"{name}.capsule").forecast(series)["point"]
        for name in ("full", "small")
    )
    assert 0 < np.abs(exact - rounded).max() < 0.2


def test_matrices_in_8_bits():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(40, 3, 30)) * np.linspace(0.01, 10, 30)).astype(np.float32)
    matrix[..., 4] = 0
    steps, scale = capsule._in_8_bits(matrix)
    assert steps.dtype == np.int8 and scale.shape == (30,)
    assert np.abs(steps).max((0, 1)).tolist() == [127] * 4 + [0] + [127] * 25
    error = np.abs(np.asarray(capsule._restored((steps, scale))) - matrix)
    assert (error <= scale / 2 * (1 + 1e-5)).all()


def test_a_model_whose_batch_cannot_be_open_takes_windows_by_the_batch(tmp_path, table):
    class Counting(Timer):
        def predict(self, params, context, horizon, key=None):
            assert int(context.shape[0]) > 0  # asks for a number
            return super().predict(params, context, horizon, key)

    model = Counting(Timer.small())
    ours = Forecaster(model, jax.jit(model.init)(jax.random.key(0)))
    file = tmp_path / "x.capsule"
    told = capsule.write(ours, file, HORIZON, quantile_levels=())
    assert told.batch == capsule.BATCH and "32 at a time" in str(told)
    got = Capsule(file).forecast(np.repeat(history(table, False), 20, axis=0))["point"]
    want = ours.predict(table, HORIZON, quantile_levels=(), show_progress=False)["predictions"]
    np.testing.assert_allclose(got[::20].ravel(), want, rtol=1e-5)
    np.testing.assert_array_equal(got[:20], np.repeat(got[:1], 20, axis=0))


def test_what_cannot_be_written_or_read(tmp_path, table, whole):
    ours = forecaster(ChronosBolt)
    file = tmp_path / "x.capsule"
    file.write_bytes(whole)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        capsule.write(ours, file, HORIZON)
    capsule.write(ours, file, HORIZON, overwrite=True)
    theirs = Capsule(file)
    with pytest.raises(ValueError, match=r"history is \[N, 1, time\], not \[1, 2, 120\]"):
        theirs.forecast(history(table, True))
    with pytest.raises(ValueError, match="no value in the last"):
        theirs.forecast(np.full((1, 1, 50), np.nan))
    with pytest.raises(ValueError, match="takes no past covariates"):
        theirs.forecast(np.ones((1, 1, 50)), past=np.ones((1, 1, 50)))
