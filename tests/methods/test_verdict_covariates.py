"""Chronos-2 is tuned and scored with the covariates that it forecasts with."""

import jax
import numpy as np
import pytest

from ltsm_jax import Forecaster
from ltsm_jax.data.panel import Panel
from ltsm_jax.data.panel_windows import cut_panel
from ltsm_jax.methods.verdict import bind_panel, compare
from ltsm_jax.models.chronos_2 import Chronos2, Chronos2Config
from ltsm_jax.tasks.panels import Origins
from ltsm_jax.training import TrainConfig

HORIZON = 8
LENGTHS = (300, 230)


@pytest.fixture(scope="module")
def model():
    sizes = {"head_dim": 8, "patch_len": 8, "context_len": 32, "max_patches": 1, "time_scale": 32}
    return Chronos2(
        Chronos2Config.of(16, 2, 32, 1, **sizes, levels=(0.1, 0.5, 0.9), init_factor=1.0)
    )


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def panel():
    """Sales that follow a price known ahead, and nothing else that could be forecast."""
    rng = np.random.default_rng(0)
    rows = sum(LENGTHS)
    price = np.where(rng.random(rows) < 0.5, 8.0, 10.0)
    price[LENGTHS[0] :] += 1e4  # as large as an id, and of no more say for that
    weather = rng.normal(size=rows)
    sold = 20 - 3 * (price % 100) + 0.1 * rng.normal(size=rows)
    sold[LENGTHS[0] :] *= 10
    sold[[5, 40, 333]] = np.nan
    price[60] = np.nan
    return Panel(
        name="shops",
        ids=np.array(["a", "b"], object),
        columns=("sold",),
        values=sold[None],
        bounds=np.array([0, LENGTHS[0], rows]),
        freq="D",
        first=np.array(["2024-01-01"] * 2, "datetime64[us]"),
        past=("weather",),
        past_values=weather[None],
        known=("price",),
        known_values=price[None],
    )


@pytest.fixture(scope="module")
def found(model, params, panel):
    config = TrainConfig(epochs=2, lr=1e-2, batch_size=32)
    return compare(
        model, params, panel, HORIZON, methods="ff", config=config, budget=300, show_progress=False
    )


def test_windows_hold_the_covariates_of_their_own_rows(model, params, panel):
    splits = bind_panel(model, params, panel, HORIZON).splits
    windows = splits.test
    assert (windows.n_past, windows.n_known) == (1, 1)
    numbers = np.array([0, windows.n - 1])
    batch = jax.jit(lambda w, i: w.gather(i))(windows, numbers)
    item, origin = splits.origins(windows)
    for k, i in enumerate(numbers):
        first = panel.bounds[item[i]] + origin[i] - windows.context_len
        rows = slice(first, first + windows.context_len + HORIZON)
        own = slice(*panel.bounds[item[i] : item[i] + 2])
        price = panel.known_values[0] - np.nanmean(panel.known_values[0, own])
        weather = panel.past_values[0] - panel.past_values[0, own].mean()
        np.testing.assert_allclose(batch["known"][k, 0], price[rows], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            batch["past"][k, 0], weather[rows][:-HORIZON], rtol=1e-5, atol=1e-6
        )
        assert batch["target"].shape == (2, 1, HORIZON)


@pytest.mark.slow
def test_scores_are_those_of_what_is_deployed(model, params, panel, found):
    """The test MSE of the checkpoint, from forecasts of the forecaster after the same rows."""
    splits = found.splits
    item, origin = splits.origins(splits.test)
    ends = panel.bounds[item] + origin
    got = Forecaster(model, params).after(panel, Origins(item, ends), HORIZON)
    at = ends[:, None] + np.arange(HORIZON)
    truth = panel.values[0][at]
    gap = (got.point[:, 0] - truth) / splits.layout.std[0, item][:, None]
    mse = np.nanmean(np.square(gap))
    assert found.verdict.candidate("zero_shot").test["mse"] == pytest.approx(mse, rel=1e-4)


@pytest.mark.slow
def test_a_price_that_is_known_ahead_pays_in_tuning(found):
    verdict = found.verdict
    assert verdict.deploy == "ff" and verdict.differences["tuned_vs_naive"].high < 0
    assert verdict.candidate("ff").test["mse"] < 0.8  # without the price nobody is better than 1
    assert "chronos_2 is tuned and scored with covariates: price, weather" in verdict.notes


def test_a_family_without_covariates_sees_none(panel):
    splits = cut_panel(panel, 32, HORIZON, joint=True)
    assert splits.layout.values.shape[0] == 1 and splits.test.n_known == 0
    with pytest.raises(ValueError, match="joint"):
        cut_panel(panel, 32, HORIZON, covariates={"known"})


def test_only_targets_have_a_loss(model, params):
    """The original's loss: covariates are members of the group whose targets are missing, and count
    in the mean.
    """
    rng = np.random.default_rng(1)
    context, target = rng.normal(size=(2, 1, 32)), rng.normal(size=(2, 1, HORIZON))
    past, known = rng.normal(size=(2, 2, 32)), rng.normal(size=(2, 1, 32 + HORIZON))
    batch = {"context": context, "target": target, "past": past, "known": known}
    batch = {name: x.astype(np.float32) for name, x in batch.items()}
    nothing = np.full((2, 3, HORIZON), np.nan, np.float32)

    @jax.jit
    def both(params, batch):
        x = np.concatenate([context, past, known[..., :32]], axis=1).astype(np.float32)
        future = np.concatenate([nothing, known[..., 32:]], axis=1).astype(np.float32)
        wanted = np.concatenate([target, nothing], axis=1).astype(np.float32)
        series = model.series_loss(params, x, wanted, future=future)
        return model.loss(params, batch), series, model.point_loss(params, batch)

    loss, series, point = both(params, batch)
    assert (series[:, 1:] == 0).all() and (series[:, 0] > 0).all()
    assert float(loss) == pytest.approx(float(series.mean()), rel=1e-6)
    forecast = jax.jit(lambda p, c, a, k: model.predict_with(p, c, HORIZON, past=a, known=k).point)
    got = forecast(params, *(batch[name] for name in ("context", "past", "known")))
    assert float(point) == pytest.approx(float(np.square(got - batch["target"]).mean()), rel=1e-5)


def test_forecasting_takes_them_in_training_too(model, params, panel):
    """As a forecast does: standardised by what the context shows; one that does not move there is
    only moved to 0.
    """
    prepared = bind_panel(model, params, panel, HORIZON)
    source = prepared.task.windows(model, prepared.splits)
    batch = jax.jit(lambda s, i: s.gather(i))(source, np.arange(4))
    seen = np.asarray(batch["known"])[..., : batch["context"].shape[-1]]
    moves = np.nanmax(seen, axis=-1) > np.nanmin(seen, axis=-1)
    np.testing.assert_allclose(np.nanmean(seen, axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(seen, axis=-1)[moves], 1, atol=1e-4)
