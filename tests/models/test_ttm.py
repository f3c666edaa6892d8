"""What TTM promises beyond its recorded vectors: published sizes, frequencies, channels, gaps, and
real checkpoints.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import parity
import pytest

import ltsm_jax
from converters import CheckpointError
from converters import ttm as converter
from ltsm_jax import data, trees
from ltsm_jax.data import prepare
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.models import folders
from ltsm_jax.models.ttm import PRESETS, TTM, TTMConfig, frequency_token, sincos
from ltsm_jax.tasks import forecasting

TINY: dict[str, Any] = {
    "context_len": 16,
    "horizon": 4,
    "patch_len": 4,
    "d_model": 8,
    "decoder_d_model": 8,
    "layers": 1,
    "decoder_layers": 1,
    "levels": 0,
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("r1", 805_280),
        ("r1@1024_96_v1", 946_336),
        ("r2", 805_280),
        ("r2@512-96-r2", 805_280),
        ("r2@1024-96-r2", 2_964_960),
        ("r2@1536-96-r2", 3_081_120),
    ],
)
def test_published_parameter_counts(name, parameters):
    shapes = folders.param_shapes(TTM(PRESETS[f"ibm-granite/granite-timeseries-ttm-{name}"]))
    assert trees.count(shapes) == parameters


@pytest.mark.parametrize(
    ("freq", "token"),
    [
        ("min", 1),
        ("1min", 1),
        ("T", 1),
        ("2min", 2),
        ("5min", 3),
        ("10min", 4),
        ("15T", 5),
        ("30min", 6),
        ("h", 7),
        ("1h", 7),
        ("H", 7),
        ("60min", 7),
        ("D", 8),
        ("24h", 8),
        ("W", 9),
        ("W-SUN", 9),
        ("7D", 9),
        ("oov", 0),
    ],
)
def test_every_spelling_of_a_frequency_has_the_token_of_its_step(freq, token):
    assert frequency_token(freq, 10) == token


@pytest.mark.parametrize("freq", [None, "MS"])
def test_the_advice_for_an_unknown_frequency_works_through_the_public_calls(freq):
    """Three columns by the month, or by nothing but their order."""
    model = TTM(TTMConfig.of(**TINY, freq_vocab=10))
    params = jax.jit(model.init)(jax.random.key(0))
    table = pd.DataFrame({name: np.sin(np.arange(60) + i) for i, name in enumerate("abc")})
    if freq:
        table.insert(0, "date", pd.date_range("2019-01-01", periods=60, freq=freq))
    with pytest.raises(
        ValueError, match="With freq='oov' it takes the token of unknown frequencies"
    ):
        ltsm_jax.forecast(model, params, table, 4)

    found = ltsm_jax.forecast(model, params, table, 4, freq="oov")
    assert np.isfinite(found[["a", "b", "c"]].to_numpy()).all()
    if freq:
        assert list(found["date"]) == list(pd.date_range("2024-01-01", periods=4, freq=freq))

    # `fit` reads in the same way.
    series = data.read_series(table, freq="oov")
    ready, _ = model.for_series(params, n_variates=3, freq=series.model_freq)
    assert ready.config.freq_token == 0


@pytest.mark.parametrize("freq", [None, "", "3h", "M", "MS", "fortnight"])
def test_an_unknown_frequency_is_an_error_that_lists_the_known_ones(freq):
    with pytest.raises(ValueError, match=r"15min, 30min, h, d, W; none for"):
        frequency_token(freq, 10)


def test_a_token_beyond_the_table_of_the_checkpoint_is_unknown_too():
    with pytest.raises(ValueError, match="2min, 5min, 10min; none for 'h'"):
        frequency_token("h", 5)


def test_the_model_asks_for_a_frequency_and_keeps_the_one_it_has():
    model = TTM(TTM.small())
    params = jax.jit(model.init)(jax.random.key(0))
    with pytest.raises(ValueError, match="for_series"):
        model.predict(params, jnp.ones((1, 2, 32)), 4)
    ready, same = model.for_series(params, n_variates=2, freq="15min")
    assert ready.config.freq_token == 5
    assert same is params
    assert ready.for_series(params, n_variates=2)[0] is ready
    with pytest.raises(ValueError, match="none for None"):
        model.for_series(params, n_variates=2)


def test_the_advice_for_a_frequency_without_a_token_can_be_followed():
    model = TTM(TTM.small())
    params = jax.jit(model.init)(jax.random.key(0))
    months = pd.date_range("2020-01-31", periods=40, freq="ME")
    table = pd.DataFrame(
        {"date": months, "a": np.sin(np.arange(40.0)), "b": np.cos(np.arange(40.0))}
    )
    with pytest.raises(ValueError, match="none for 'M'. With freq='oov'"):
        ltsm_jax.forecast(model, params, table, 2)
    got = ltsm_jax.forecast(model, params, table, 2, freq="oov")
    assert [str(stamp)[:10] for stamp in got["date"]] == ["2023-05-31", "2023-06-30"]


def test_another_number_of_channels_draws_their_mixers_anew_and_nothing_else():
    model = TTM(TTM.small())
    params = jax.jit(model.init)(jax.random.key(0))
    wide, grown = model.for_series(params, n_variates=5, freq="h", key=jax.random.key(1))
    assert wide.config.n_channels == 5
    old, new = trees.flatten(params), trees.flatten(grown)
    assert old.keys() == new.keys()
    other = {path for path in old if old[path].shape != new[path].shape}
    assert other and all("/channel_mixer/" in path for path in other)
    for path in old.keys() - other:
        np.testing.assert_array_equal(old[path], new[path])
    with pytest.raises(ValueError, match="mixes 5 channels, got 2"):
        wide.apply(grown, jnp.ones((1, 2, 32)))
    assert wide.for_series(grown, n_variates=5, freq="h")[1] is grown, "nothing is left to draw"


def test_without_a_key_nothing_is_drawn():
    model = TTM(TTM.small())
    params = jax.jit(model.init)(jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"mixes 2 channels, not 5.*for_series\(params, n_variates=5, key="
    ) as told:
        model.for_series(params, n_variates=5, freq="h")

    # The advice works as it stands.
    advice = str(told.value).partition(" with: ")[2]
    wide, _ = eval(
        f"model.{advice[:-1]}, freq='h')", {"model": model, "params": params, "jax": jax}
    )
    assert wide.config.n_channels == 5


def test_variates_are_joint_where_channels_are_mixed_or_numbered():
    assert TTM(TTMConfig.of(**TINY)).variates == "independent"
    changes: tuple[dict[str, Any], ...] = (
        {"mix_channels": True},
        {"decoder_mix_channels": True},
        {"fcm": True},
        {"targets": (0,)},
    )
    for change in changes:
        assert TTM(TTMConfig.of(**TINY, **change)).variates == "joint", change
    assert TTM(TTMConfig.of(**TINY)).fixed is None
    assert TTM(TTMConfig.of(**TINY, norm="BatchNorm", position="sincos")).fixed


def test_exogenous_channels_need_their_future_and_are_not_forecast():
    model = TTM(TTMConfig.of(**TINY, n_channels=3, exogenous=(1,), fcm=True))
    params = jax.jit(model.init)(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    with pytest.raises(ValueError, match="future of the exogenous channels"):
        model.predict(params, x, 4)
    predict = jax.jit(lambda future: model.predict(params, x, 7, future=future).point)
    future = jnp.ones((2, 3, 7))
    one = predict(future)
    assert one.shape == (2, 2, 7)
    np.testing.assert_array_equal(
        predict(future.at[:, 0].set(9.0)), one
    )  # the future of a target is not seen
    late = predict(future.at[:, 1, 6].set(9.0))
    np.testing.assert_array_equal(late[..., :4], one[..., :4])  # nor what lies beyond a forecast
    assert not np.array_equal(late[..., 4:], one[..., 4:])

    # Missing in the known future: filled as in the past, with 0.
    gap, filled = (predict(future.at[:, 1, 2].set(value)) for value in (jnp.nan, 0.0))
    np.testing.assert_array_equal(gap, filled)


def test_a_short_context_is_one_with_missing_values_in_front():
    model = TTM(TTMConfig.of(**TINY))
    x = jnp.arange(5.0).reshape(1, 1, 5)
    filled, observed = model.filled(x)
    np.testing.assert_array_equal(filled[0, 0], [0.0] * 11 + [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(observed[0, 0], [0.0] * 11 + [1.0] * 5)
    centred = TTM(dataclasses.replace(model.config, fill="mean")).filled(x)[0]
    np.testing.assert_array_equal(centred[0, 0, :11], 2.0)


def test_missing_targets_and_rows_without_weight_do_not_count():
    model = TTM(dataclasses.replace(TTMConfig.of(**TINY), loss="mae"))
    y = jnp.zeros((2, 1, 4))
    target = jnp.asarray([[[1.0, jnp.nan, 3.0, jnp.nan]], [[5.0, 5.0, 5.0, 5.0]]])
    np.testing.assert_allclose(model.error(y, {"target": target}, "mae"), (1 + 3 + 4 * 5) / 6)
    weighted = {"target": target, "weight": jnp.asarray([1.0, 0.0])}
    np.testing.assert_allclose(model.error(y, weighted, "mse"), (1 + 9) / 2)


def test_sincos_has_mean_zero_and_a_tenth_of_unit_spread():
    table = sincos(7, 12)
    np.testing.assert_allclose([table.mean(), table.std(ddof=1)], [0, 0.1], atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_len": 16}, "must be longer"),
        ({"vocab": (3,)}, "decoder that mixes channels"),
        ({"targets": (1,)}, "different channels of 1"),
        ({"filter_len": 9}, "filter_len"),
        ({"attn_heads": 3}, "do not divide"),
        ({"loss": "nll"}, "loss must be one of"),
    ],
)
def test_a_config_that_can_not_be_is_refused(change: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        TTMConfig.of(**TINY | change)


PUBLISHED = {
    "context_length": 16,
    "prediction_length": 4,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": 8,
    "num_layers": 1,
}


def test_every_problem_of_a_config_is_listed_at_once():
    wrong = PUBLISHED | {
        "d_model": -1,
        "scaling": "median",
        "mode": ["mix"],
        "dropout": "a",
        "num_layers": 10**9,
        "prediction_channel_indices": [0, "x"],
        "multi_quantile_heads": [0.1],
        "loss": "nll",
    }
    del wrong["patch_length"]
    with pytest.raises(CheckpointError) as caught:
        converter.configure({}, wrong, "here")
    named = (
        "d_model",
        "scaling",
        "mode",
        "dropout",
        "num_layers",
        "prediction_channel_indices",
        "loss",
    )
    for name in (*named, "multi_quantile_heads", "patch_length: missing"):
        assert name in str(caught.value), name


def test_a_config_at_odds_with_the_weights_is_refused():
    state = {converter.ANCHOR: np.zeros((8, 5), np.float32)}
    with pytest.raises(CheckpointError, match=r"the config says \(8, 4\), the weights \(8, 5\)"):
        converter.configure(state, PUBLISHED, "here")


def test_a_pruned_model_can_not_be_exported():
    config = TTMConfig.of(**TINY)
    (dims,) = config.encoder
    less = dataclasses.replace(dims, patch=dims.patch - 1)
    with pytest.raises(ValueError, match="pruned"):
        converter.published(dataclasses.replace(config, encoder=(less,)))
    assert converter.published(config)["expansion_factor"] == 2


# MSE and MAE of the original, zero-shot on ETTh1, 512 -> 96, standardised by the train rows, every
# test window
REAL = {"ttm_r1_512_96": (0.3632, 0.3965), "ttm_r2_512_96": (0.3628, 0.3890)}


@pytest.mark.parametrize("name", REAL)
def test_published_checkpoints_give_the_originals_scores(name, tmp_path):
    """With $LTSM_CHECKPOINTS a folder that holds the published checkpoints, and $LTSM_DATA the
    benchmark files.
    """
    folder = Path(os.environ.get("LTSM_CHECKPOINTS", "")) / name
    if "LTSM_CHECKPOINTS" not in os.environ or not folder.is_dir() or "LTSM_DATA" not in os.environ:
        pytest.skip("LTSM_CHECKPOINTS or LTSM_DATA do not name folders with the files")
    model, params = ltsm_jax.load(folder)
    assert trees.count(params) == 805_280
    assert model.config in PRESETS.values()
    splits = prepare(load_series("ETTh1"), model.context_len, model.horizon)
    found = forecasting.evaluate(model, params, splits.test)
    assert found["windows"] == 7 * 2785
    np.testing.assert_allclose([found["mse"], found["mae"]], REAL[name], atol=0.5e-4)
    parity.check_round_trip(folder / "model.safetensors", tmp_path)
