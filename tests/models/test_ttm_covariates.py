"""TTM with covariates: exogenous channels and those that nobody forecasts, from tables."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from ttm_vectors import bct, quantiles, tolerance

from ltsm_jax import Forecaster
from ltsm_jax.data.panel import Panel
from ltsm_jax.methods.verdict import compare
from ltsm_jax.models.ttm import TTM, QuantileConfig, TTMConfig
from ltsm_jax.models.ttm_r3 import TTMR3, TTMR3Config
from ltsm_jax.training import TrainConfig

HORIZON = 4
# Channels 1 and 3 are forecast, 0 is known ahead, 2 in the past alone.
CHANNELS: dict[str, Any] = {
    "n_channels": 4,
    "targets": (3, 1),
    "exogenous": (0,),
    "fcm": True,
    "fcm_layers": 1,
}
TINY: dict[str, Any] = {
    "context_len": 16,
    "horizon": HORIZON,
    "patch_len": 4,
    "d_model": 8,
    "decoder_d_model": 8,
    "layers": 1,
    "decoder_layers": 1,
    "levels": 0,
}


def plain():
    """A TTM as r1 and r2 are, whose decoder mixes channels."""
    return TTM(TTMConfig.of(**TINY, **CHANNELS, decoder_mix_channels=True))


def decomposed():
    """A TTM r3 with quantiles."""
    head = QuantileConfig(levels=(0.1, 0.5, 0.9), hidden=3)
    r3 = {"scaling": None, "multi_scale": True, "loss": "mae", "quantiles": head}
    trend = TTMConfig.of(**TINY, **CHANNELS, **r3)
    return TTMR3(TTMR3Config(trend=trend, residual=trend))


@pytest.fixture(
    scope="module",
    params=[plain, pytest.param(decomposed, marks=pytest.mark.slow)],
    ids=lambda build: build.__name__,
)
def model(request):
    return request.param()


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def panel():
    """Two shops that sell and take back by the price, which is known six days ahead."""
    rng = np.random.default_rng(0)
    lengths = (260, 200)
    rows = sum(lengths)
    price = np.where(rng.random(rows + 12) < 0.5, 8.0, 10.0)
    sold = 20 - 3 * price[:rows] + 0.1 * rng.normal(size=rows)
    return Panel(
        name="shops",
        ids=np.array(["a", "b"], object),
        columns=("sold", "returned"),
        values=np.stack([sold, 0.1 * rng.normal(size=rows) - sold]),
        bounds=np.array([0, lengths[0], rows]),
        freq="D",
        first=np.array(["2024-01-01"] * 2, "datetime64[us]"),
        past=("weather",),
        past_values=rng.normal(size=(1, rows)),
        known=("price",),
        known_values=price[None, :rows],
        future_values=price[rows:].reshape(1, 2, 6),
    )


def standardised(x, of):
    """Rows x by mean and deviation of `of`."""
    return ((x - of.mean(-1, keepdims=True)) / of.std(-1, keepdims=True)).astype(np.float32)


def test_a_forecast_of_a_panel_is_the_network_on_all_channels(model, params, panel):
    got = Forecaster(model, params).predict(panel, HORIZON, quantile_levels=())
    assert not any("does not use" in note for note in got.attrs["notes"])

    t = model.context_len
    sold, back = (row[panel.bounds[1] - t : panel.bounds[1]] for row in panel.values)
    weather = panel.past_values[0, panel.bounds[1] - t : panel.bounds[1]]
    price = panel.known_values[0, panel.bounds[1] - t : panel.bounds[1]]
    context = np.stack([standardised(x, x) for x in (price, sold, weather, back)])[None]
    future = np.zeros((1, 4, HORIZON), np.float32)
    future[0, 0] = standardised(panel.future_values[0, 0, :HORIZON], price)
    want, _ = jax.jit(lambda p, x, f: model.apply(p, x, future_BCH=f))(params, context, future)
    units = np.stack([sold, back])
    want = np.asarray(want[0], np.float64) * units.std(-1, keepdims=True)
    want += units.mean(-1, keepdims=True)
    np.testing.assert_allclose(
        got["predictions"][: 2 * HORIZON].to_numpy().reshape(2, HORIZON), want, rtol=1e-4, atol=1e-4
    )


def test_another_price_changes_the_forecast_of_its_shop_alone(model, params, panel):
    levels = (0.1, 0.9) if isinstance(model, TTMR3) else ()
    forecaster = Forecaster(model, params)
    one = forecaster.predict(panel, HORIZON, quantile_levels=levels)
    ahead = panel.future_values.copy()
    ahead[:, 1] += 5
    other = forecaster.predict(
        dataclasses.replace(panel, future_values=ahead), HORIZON, quantile_levels=levels
    )
    changed = (one["predictions"] != other["predictions"]).to_numpy().reshape(2, 2, HORIZON)
    assert not changed[0].any() and changed[1].any(axis=-1).all()


def test_weather_is_seen_where_channels_are_mixed(panel):
    """By the decoder's mixer over channels; it is forecast for nobody."""
    mixed = plain()
    forecaster = Forecaster(mixed, jax.jit(mixed.init)(jax.random.key(0)))
    one = forecaster.predict(panel, HORIZON, quantile_levels=())
    rain = dataclasses.replace(panel, past_values=panel.past_values[:, ::-1])
    other = forecaster.predict(rain, HORIZON, quantile_levels=())
    assert (one["predictions"] != other["predictions"]).all()


def test_losses_of_a_batch_with_covariates_are_those_of_all_channels(model, params):
    rng = np.random.default_rng(1)
    every = rng.normal(size=(3, 4, 16 + HORIZON)).astype(np.float32)
    context, target = every[..., :16], every[..., 16:]
    forecast = [1, 3]
    whole = {"context": context, "target": target}
    apart = {
        "context": context[:, forecast],
        "target": target[:, forecast],
        "past": context[:, [2]],
        "known": every[:, [0]],
    }
    own = jax.jit(model.loss)
    np.testing.assert_array_equal(own(params, apart), own(params, whole))
    if isinstance(model, TTMR3):  # the other losses of its sum are as of a plain TTM
        return

    def others(params, batch):
        return model.point_loss(params, batch), model.absolute_loss(params, apart)

    squared, absolute = jax.jit(others)(params, apart)
    forecasts, _ = jax.jit(model.apply)(params, context, future_BCH=target)
    np.testing.assert_allclose(absolute, np.abs(forecasts - target[:, forecast]).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        squared, np.square(forecasts - target[:, forecast]).mean(), rtol=1e-5
    )


def test_what_is_not_known_of_the_future_is_filled_in_a_roll_out(model, params):
    """As what is missing in the past, also where a mixer over channels reads it from the window."""
    rng = np.random.default_rng(2)
    context = rng.normal(size=(1, 2, 16)).astype(np.float32)
    past = rng.normal(size=(1, 1, 16)).astype(np.float32)
    known = rng.normal(size=(1, 1, 16 + 7)).astype(np.float32)
    predict = jax.jit(lambda known: model.predict_with(params, context, 7, past=past, known=known))
    gap, zero = known.copy(), known.copy()
    gap[..., 18], zero[..., 18] = np.nan, 0.0
    point = np.asarray(predict(gap).point)
    assert np.isfinite(point).all()
    np.testing.assert_array_equal(point, predict(zero).point)


def test_wrong_numbers_of_covariates_are_said(model, params):
    context = np.zeros((1, 2, 16), np.float32)
    past, known = np.zeros((1, 1, 16), np.float32), np.zeros((1, 3, 16 + HORIZON), np.float32)
    assert model.covariates == {"past", "known"}
    with pytest.raises(
        ValueError, match=r"takes 1 covariates known ahead \(channels \(0,\)\), got 3"
    ):
        model.predict_with(params, context, HORIZON, past=past, known=known)
    with pytest.raises(ValueError, match=r"takes 1 covariates of the past .*got 0"):
        model.predict_with(params, context, HORIZON, known=known[:, :1])
    with pytest.raises(ValueError, match="only the 2 that are forecast were given"):
        model.apply(params, context, future_BCH=jnp.zeros((1, 2, HORIZON)))
    ready, same = model.for_series(params, n_variates=2)
    assert ready == model and same is params
    assert TTM(TTMConfig.of(**TINY)).covariates == frozenset()


def test_golden_forecasts_with_an_exogenous_channel(golden):
    """The recorded channels, handed in as targets and covariates."""
    vectors = golden("ttm_r3/variants/group_sigmoid_exog_cat")
    model, params = parity.load(vectors)
    io = vectors.arrays("io.npz")
    assert model.covariates == {"known"}
    forecast = np.array(model.config.forecast_channels)
    known = np.array(model.config.known_channels)
    x, future = bct(io["normal/in/past_values"]), bct(io["normal/in/future_values"])
    beside = np.concatenate([x, future], axis=-1)[:, known]
    for row, categories in enumerate(np.asarray(io["normal/in/static_categorical_values"], int)):
        config = dataclasses.replace(model.config, categories=tuple(map(int, categories)))
        found = jax.jit(TTM(config).predict_with, static_argnums=2)(
            params, x[[row]][:, forecast], future.shape[-1], known=beside[[row]]
        )
        for name, got, want in (
            ("point", found.point, bct(io["normal/out/prediction_outputs"])),
            ("quantiles", found.quantiles, quantiles(io["normal/out/quantile_outputs"])),
        ):
            limits = tolerance(vectors, "normal", want)
            parity.close(np.asarray(got), want[[row]], **limits, what=name)


@pytest.mark.slow
def test_a_price_that_is_known_ahead_pays_in_tuning(panel):
    """Sales follow nothing but the price: without it no forecast has an error below that of the
    mean.
    """
    model = plain()
    config = TrainConfig(epochs=2, lr=1e-2, batch_size=32)
    found = compare(
        model,
        jax.jit(model.init)(jax.random.key(0)),
        panel,
        HORIZON,
        methods="ff",
        config=config,
        budget=400,
        show_progress=False,
    )
    assert "ttm is tuned and scored with covariates: price, weather" in found.verdict.notes
    assert found.verdict.candidate("ff").test["mse"] < 0.5
