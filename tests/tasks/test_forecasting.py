import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.data.windows import windows_between
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import forecasting
from ltsm_jax.tasks.forecasting import SeasonalNaive, naive_forecasts

MODEL = Timer(TimerConfig.of(8, 16, 32, 2, 4, context_len=32, horizon=8))


@functools.partial(jax.jit, static_argnums=2)
def predict(params, context, horizon):
    return MODEL.predict(params, context, horizon).point


@pytest.fixture(scope="module")
def split():
    values = (
        np.asarray(jax.random.normal(jax.random.key(0), (3, 400))).cumsum(-1).astype(np.float32)
    )
    return values, windows_between(values, 20, 380, 32, 8)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def test_scores_equal_those_of_all_windows_at_once(split, params):
    values, windows = split
    context = np.stack([values[c, s : s + 32] for c in range(3) for s in range(20, 341)])[:, None]
    target = np.stack([values[c, s + 32 : s + 40] for c in range(3) for s in range(20, 341)])[
        :, None
    ].astype(np.float64)
    error = np.asarray(predict(params, context, 8), np.float64) - target
    found = forecasting.evaluate(
        MODEL, params, windows, batch_size=100, naive_scale=np.array([0.5, 1.0, 2.0])
    )
    assert found["windows"] == 3 * 321 == windows.n
    want = {"mse": (error**2).mean(), "mae": abs(error).mean(), "rmse": (error**2).mean() ** 0.5}
    want |= {"mape": abs(error / target).mean()}
    want |= {"mase": (abs(error).reshape(3, -1).mean(1) / [0.5, 1, 2]).mean()}
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("predictor", [MODEL, SeasonalNaive(12)], ids=["timer", "naive"])
def test_value_does_not_depend_on_the_batch_size(split, params, predictor):
    few = split[1].take(np.arange(0, split[1].n, 7))
    want = forecasting.evaluate(predictor, params, few, batch_size=few.n)
    for batch_size in (1, 7, 64, 2048):
        found = forecasting.evaluate(predictor, params, few, batch_size=batch_size)
        for name, value in want.items():
            np.testing.assert_allclose(
                found[name], value, rtol=1e-6, err_msg=f"{name} at {batch_size}"
            )


def test_joint_windows_score_every_variate(split, params):
    values, windows = split
    joint = windows_between(values, 20, 380, 32, 8, joint=True)
    alone = forecasting.evaluate(MODEL, params, windows)
    together = forecasting.evaluate(MODEL, params, joint)
    assert together["windows"] == alone["windows"]
    np.testing.assert_allclose(together["mse"], alone["mse"], rtol=1e-6)
    one, all_ = (
        forecasting.errors(MODEL, params, w) for w in (windows, joint)
    )  # variate by variate, window by window
    np.testing.assert_allclose(all_.absolute.T.reshape(-1, 1), one.absolute, rtol=1e-4)
    np.testing.assert_array_equal(all_.variates.T.reshape(-1, 1), one.variates)


def test_horizons_past_the_models_own_are_rolled_out(split, params):
    windows = windows_between(split[0], 20, 120, 32, 20)
    found = forecasting.errors(MODEL, params, windows)
    batch = windows.gather(jnp.arange(windows.n))
    error = np.asarray(predict(params, batch["context"], 20)) - np.asarray(batch["target"])
    np.testing.assert_allclose(found.squared, np.square(error).sum(-1), rtol=1e-5)
    assert found.horizon == 20


def test_naive_baselines():
    values = np.tile(np.arange(12.0, dtype=np.float32), 20)[None]
    windows = windows_between(values, 0, 240, 36, 18)
    assert forecasting.evaluate(SeasonalNaive(12), {}, windows)["mse"] == 0
    assert forecasting.evaluate(SeasonalNaive(), {}, windows)["mse"] > 1
    np.testing.assert_array_equal(
        SeasonalNaive(3).predict({}, jnp.arange(5.0)[None, None], 4).point[0, 0], [2, 3, 4, 2]
    )
    np.testing.assert_array_equal(
        SeasonalNaive(9).predict({}, jnp.arange(3.0)[None, None], 4).point[0, 0], [0, 1, 2, 0]
    )


def test_zero_targets_are_left_out_of_mape_alone():
    values = np.zeros((1, 60), np.float32)
    values[0, 50:] = 2.0
    windows = windows_between(values, 0, 60, 10, 10)
    found = forecasting.evaluate(SeasonalNaive(), {}, windows)
    assert found["mape"] == 1.0  # where the target is 2 and the forecast 0
    assert 0 < found["mse"] < 4
    assert np.isnan(forecasting.evaluate(SeasonalNaive(), {}, windows.take(np.arange(5)))["mape"])


def test_refusals(split):
    with pytest.raises(ValueError, match="mode must be one of ims, direct"):
        forecasting.loss_fn(MODEL, "own")
    with pytest.raises(ValueError, match="no windows"):
        forecasting.evaluate(MODEL, {}, split[1].take(np.arange(0)))


def test_naive_forecasts_by_name():
    context = jnp.array([[[jnp.nan, 1.0, 2.0, 3.0, jnp.nan]]])
    found = {
        name: naive.predict({}, context, 2).point[0, 0]
        for name, naive in naive_forecasts(2).items()
    }
    assert list(found) == ["last_value", "seasonal_naive", "mean"]
    np.testing.assert_allclose(found["last_value"], [3, 3])
    np.testing.assert_allclose(found["mean"], [2, 2])
    assert list(naive_forecasts()) == ["last_value", "mean"]
