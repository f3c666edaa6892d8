"""What TTM r3 promises beyond its vectors: sizes, smoothing, tokens, gates, quantiles, errors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from converters import CheckpointError
from converters import ttm as plain_converter
from converters import ttm_r3 as converter
from ltsm_jax import trees
from ltsm_jax.models import folders, ttm, ttm_r3
from ltsm_jax.models.ttm import TTM, Gate, QuantileConfig, TTMConfig
from ltsm_jax.models.ttm_r3 import PRESETS, TTMR3, TTMR3Config, smooth

HUB = "ibm-granite/granite-timeseries-ttm-r3"


@pytest.fixture(scope="module")
def small():
    """The small size with a fresh draw."""
    model = TTMR3(TTMR3.small())
    return model, jax.jit(model.init)(jax.random.key(0))


def waves(b, t):
    """Noisy waves [b, 1, t], another in every row."""
    noise = np.random.default_rng(0).normal(size=(b, 1, t))
    phase = np.arange(b).reshape(b, 1, 1)
    return np.asarray(np.sin(np.arange(t) / 4 + phase) + 0.1 * noise, np.float32)


def test_published_parameter_counts():
    shapes = folders.param_shapes(TTMR3(PRESETS[f"{HUB}@52-16-dec-52-r3"]))
    assert trees.count(shapes) == 1_453_596
    assert trees.count(shapes["trend"]) == 70_873
    assert trees.count(shapes["residual"]) == 1_382_723


def test_parameter_count_of_the_authors_example():
    """A plain model, 1536 -> 96, with every kind of token but the step's."""
    config = TTMConfig.of(
        context_len=1536,
        horizon=96,
        patch_len=64,
        d_model=256,
        decoder_d_model=128,
        layers=8,
        decoder_layers=2,
        levels=3,
        expansion=3,
        multi_scale=True,
        registers=5,
        spectrum=16,
        gate="glu",
        quantiles=QuantileConfig(median="mean", condition="flatten", join="concat"),
    )
    assert trees.count(folders.param_shapes(TTM(config))) == 13_111_363


# --- smoothing


def test_smoothing_keeps_the_mean_and_is_not_led_astray_by_one_value():
    y = waves(2, 40)
    astray = y.copy()
    astray[0, 0, 20] += 1000.0
    calm, moved = (np.asarray(jax.jit(smooth)(x)) for x in (y, astray))
    np.testing.assert_allclose(calm.mean(-1), y.mean(-1), atol=1e-5)
    np.testing.assert_array_equal(calm[1], moved[1])

    # All of it is in the mean, that of the series; a thousandth of it would show in the shape.
    shapes = [x[0, 0] - x[0, 0].mean() for x in (calm, moved)]
    assert np.abs(shapes[0] - shapes[1]).max() < 1.0
    np.testing.assert_allclose(moved[0].mean(-1), astray[0].mean(-1), rtol=1e-5)


@pytest.mark.parametrize("length", [5, 6, 40, 333])
def test_smoothing_is_a_mirrored_average_weighed_by_distances(length):
    """Against the formula in float64, step by step, with sorted distances."""
    y = np.random.default_rng(length).normal(size=length) + np.linspace(0, 3, length)
    span = max(5, round(0.15 * length))
    span += span % 2 == 0
    span = min(span, length if length % 2 else length - 1)
    places = np.arange(span) - span // 2
    kernel = np.exp(-np.square(places / (0.25 * span)) / 2)
    kernel /= kernel.sum()

    def averaged(x):
        return np.convolve(np.pad(x, span // 2, mode="reflect"), kernel, mode="valid")

    def lower_median(x):
        return np.sort(x)[(len(x) - 1) // 2]

    weights = np.ones(length)
    for _ in range(3):
        trend = averaged(y * weights) / (averaged(weights) + 1e-8)
        trend += (y - trend).mean()
        distance = y - trend - lower_median(y - trend)
        share = np.square(distance / (6 * (lower_median(np.abs(distance)) + 1e-8)))
        weights = np.square(1 - np.minimum(share, 1))
    found = jax.jit(smooth)(jnp.asarray(y, jnp.float32)[None, None])
    np.testing.assert_allclose(found[0, 0], trend, atol=5e-5)


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.just(2), st.just(1), st.integers(1, 9)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.integers(0, 8),
)
@settings(deadline=None)
def test_the_value_of_a_rank_is_the_sorted_one(x, rank):
    rank = min(rank, x.shape[-1] - 1)
    found = ttm_r3._smallest(jnp.asarray(x), jnp.full((2, 1, 1), rank))
    np.testing.assert_array_equal(found, np.sort(x, axis=-1)[..., rank : rank + 1])


def test_values_that_do_not_exist_are_not_smoothed():
    y, seen = waves(2, 40), np.ones((2, 1, 40), np.float32)
    seen[0, 0, 30:35] = 0
    other = np.where(seen > 0, y, np.float32(77.0))
    one, two = (np.asarray(jax.jit(smooth)(x, seen)) for x in (y, other))
    np.testing.assert_array_equal(one[seen > 0], two[seen > 0])
    assert np.isfinite(one).all()


# --- what r3 adds to TTM


def test_tokens_are_counted():
    """25 steps are 6 patches of 4, 3 of pairs, 1 of fours; 2 frequencies, 3 registers, 1 step."""
    sizes: dict[str, Any] = {
        "context_len": 25,
        "horizon": 4,
        "patch_len": 4,
        "d_model": 8,
        "decoder_d_model": 8,
    }
    config = TTMConfig.of(**sizes, multi_scale=True, spectrum=2, registers=3, freq_vocab=10)
    assert ttm.scales(6) == (6, 3, 1)
    assert config.n_patches == 6 + 3 + 1 + 2 + 3 + 1
    joined = TTMConfig.of(**sizes, spectrum=2, spectrum_joined=True)
    assert joined.n_patches == 6 + 1
    assert joined.spectrum_width == 4


def test_the_strongest_frequencies_come_first():
    sizes: dict[str, Any] = {
        "context_len": 32,
        "horizon": 4,
        "patch_len": 8,
        "d_model": 8,
        "decoder_d_model": 8,
    }
    t = 2 * np.pi * np.arange(32) / 32
    x = (5 + np.sin(3 * t) + 2 * np.cos(7 * t)).reshape(1, 1, 32).astype(np.float32)
    np.testing.assert_array_equal(TTM(TTMConfig.of(**sizes, spectrum=3))._bins(x), [[[0, 7, 3]]])
    config = TTMConfig.of(**sizes, spectrum=2, spectrum_skip_mean=True)
    np.testing.assert_array_equal(TTM(config)._bins(x), [[[7, 3]]])


@pytest.mark.parametrize("mode", ["softmax", "sigmoid", "glu", "group_sigmoid"])
def test_gates(mode):
    """Against NumPy, over ten features, which eight groups do not divide: five do."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 1, 1, 10)).astype(np.float32)
    kernel = rng.normal(size=(10, 20 if mode == "glu" else 10)).astype(np.float32)
    params = {"linear": {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)}}
    found, _ = Gate(ttm.FEATURE, mode, 8).apply({"params": params}, x)  # pyright: ignore
    logits = x @ kernel

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    first, second = logits[..., :10], logits[..., 10:] if mode == "glu" else 0
    pairs = np.repeat(first.reshape(2, 1, 1, 5, 2).mean(-1), 2, axis=-1)
    wanted = {
        "softmax": x * np.exp(first) / np.exp(first).sum(-1, keepdims=True),
        "sigmoid": x * sigmoid(first),
        "glu": first * sigmoid(second),
        "group_sigmoid": x * sigmoid(pairs),
    }
    np.testing.assert_allclose(found, wanted[mode], rtol=1e-5, atol=1e-6)


def test_pinball_loss_by_hand():
    """A median that is 1 too low and 2 too high, a missing target, the width of the
    outer levels.
    """
    head = QuantileConfig(levels=(0.1, 0.5, 0.9), point_weight=2.0, width_weight=0.1)
    config = TTMConfig.of(
        context_len=16, horizon=3, patch_len=4, d_model=8, decoder_d_model=8, quantiles=head
    )
    q = jnp.asarray([[[[-1.0, 0.0, 1.0]] * 3]])
    target = jnp.asarray([[[1.0, -2.0, jnp.nan]]])
    first = (0.1 * 2 + 0.5 * 1 + 0.9 * 0) / 3
    second = (0.9 * 1 + 0.5 * 2 + 0.1 * 3) / 3
    wanted = (first + second) / 2 + 0.1 * 2 + 2 * (1 + 2) / 2
    np.testing.assert_allclose(ttm.own_error(config, q[..., 1], q, target, {}), wanted, rtol=1e-6)


# --- the two parts


def test_quantiles_of_the_sum():
    """Distances 3 and 4 are together 5, or 7 where they are to add up."""
    model = TTMR3(TTMR3.small())
    trend = jnp.asarray([[[[-3.0, 0.0, 3.0]]]])
    residual = jnp.asarray([[[[6.0, 10.0, 14.0]]]])
    np.testing.assert_allclose(model._joined(trend, residual), [[[[5.0, 10.0, 15.0]]]], rtol=1e-6)
    plain = TTMR3(dataclasses.replace(model.config, add_variances=False))
    np.testing.assert_allclose(plain._joined(trend, residual), [[[[3.0, 10.0, 17.0]]]], rtol=1e-6)


def test_forecasts_are_sums_whose_quantiles_do_not_cross(small):
    model, params = small
    x = waves(3, 32)
    y, taps = jax.jit(model.apply)(params, x)
    scaled = np.asarray(taps["trend"] + taps["residual"])
    np.testing.assert_allclose(
        y, scaled * np.asarray(taps["scale"]) + np.asarray(taps["loc"]), rtol=1e-5
    )
    np.testing.assert_allclose(
        taps["trend_input"][..., -24:] + taps["residual_input"],
        taps["scaled"][..., -24:],
        atol=1e-6,
    )
    assert (np.diff(taps["quantiles"], axis=-1) > 0).all()

    # A forecast of several steps begins with that of one, and has quantiles to its end.
    predict = jax.jit(lambda horizon: model.predict(params, x, horizon), static_argnums=0)
    long = predict(20)
    assert long.quantiles is not None and long.quantiles.shape == (3, 1, 20, 3)
    assert long.levels == (0.1, 0.5, 0.9)
    np.testing.assert_allclose(long.point[..., :8], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(long.quantiles[..., :8, :], taps["quantiles"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(long.quantiles[..., 1], long.point)


@pytest.mark.slow
def test_the_shortest_contexts_have_forecasts(small):
    model, params = small
    for t in (1, 5):
        assert np.isfinite(jax.jit(model.apply)(params, waves(2, t))[0]).all()


def test_each_weight_is_that_of_its_error(small):
    model, params = small
    x = waves(2, 40)
    batch = {"context": x[..., :32], "target": x[..., 32:]}
    _, taps = jax.jit(model.apply)(params, batch["context"])
    errors = model.errors(taps, batch)
    changes = {"joint_weight": 0.5, "trend_weight": 2.0, "residual_weight": 0.0}
    weighted = TTMR3(dataclasses.replace(model.config, **changes))
    np.testing.assert_allclose(
        weighted.weighted(errors), 0.5 * errors["joint"] + 2 * errors["trend"], rtol=1e-6
    )


@pytest.mark.slow
def test_a_part_alone_is_trained_alone(small):
    """As the authors train the trend first: nothing then moves the other part."""
    model, params = small
    x = waves(2, 40)
    batch = {"context": x[..., :32], "target": x[..., 32:]}
    alone = TTMR3(dataclasses.replace(model.config, joint_weight=0.0, residual_weight=0.0))
    gradients = jax.jit(jax.grad(lambda p: alone.loss(p, batch)))(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients["residual"]))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients["trend"]))


def test_the_targets_of_the_parts_add_up(small):
    model, _ = small
    x = waves(2, 40)
    target = x[..., 32:].copy()
    target[0, 0, 5] = np.nan
    taps = {
        "scaled": jnp.asarray(x[..., :32]),
        "loc": jnp.zeros((2, 1, 1)),
        "scale": jnp.ones((2, 1, 1)),
    }
    trend, residual, joint = model.targets(taps, {"target": target})
    np.testing.assert_allclose(trend + residual, joint, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(trend), np.isnan(target))
    shorter = model.targets(taps, {"target": target[..., :5]})
    np.testing.assert_array_equal(np.isnan(shorter[0][..., 5:]), True)


def test_both_parts_learn_the_frequency():
    cfg = TTMR3.small()
    parts = {name: ttm_with(getattr(cfg, name), freq_vocab=10) for name in ("trend", "residual")}
    model = TTMR3(dataclasses.replace(cfg, **parts))
    params = jax.jit(model.init)(jax.random.key(0))
    ready, same = model.for_series(params, n_variates=1, freq="h")
    assert (ready.config.trend.freq_token, ready.config.residual.freq_token) == (7, 7)
    assert same["trend"] is params["trend"]
    assert ready.for_series(params, n_variates=1, freq="h")[0] is ready


def ttm_with(config, **changes):
    """A config with other options, its hidden widths those of one token more."""
    widths = {}
    for part in ("encoder", "decoder"):
        layers = getattr(config, part)
        wider = [dataclasses.replace(dims, patch=dims.patch and dims.patch + 2) for dims in layers]
        widths[part] = tuple(wider)
    return dataclasses.replace(config, **changes, **widths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spectrum": 18}, "has 17 frequencies"),
        ({"multi_scale": True, "patch_stride": 4}, "can't overlap"),
        ({"registers": 1, "raw_residual": True}, "tokens of other kinds"),
        ({"gate": "tanh"}, "gate must be one of"),
        ({"quantiles": QuantileConfig(), "filter_len": 1}, "at least 2"),
        (
            {"quantiles": QuantileConfig(condition="pool"), "targets": (0,), "n_channels": 2},
            "every channel",
        ),
    ],
)
def test_a_config_that_can_not_be_is_refused(change: dict[str, Any], message):
    sizes: dict[str, Any] = {
        "context_len": 32,
        "horizon": 4,
        "patch_len": 8,
        "d_model": 8,
        "decoder_d_model": 8,
    }
    with pytest.raises(ValueError, match=message):
        TTMConfig.of(**sizes | change)


def test_heads_and_parts_that_can_not_be_are_refused():
    for levels in ((0.1, 0.9), (0.5, 0.1, 0.9), (0.1, 0.2, 0.5)):
        with pytest.raises(ValueError, match="levels"):
            QuantileConfig(levels=levels)
    cfg = TTMR3.small()
    with pytest.raises(ValueError, match="must have the same horizon"):
        TTMR3Config(cfg.trend, dataclasses.replace(cfg.residual, horizon=9))
    with pytest.raises(ValueError, match="scaling=None"):
        TTMR3Config(cfg.trend, dataclasses.replace(cfg.residual, scaling="std"))


# --- config.json


def test_what_the_original_has_no_place_for_is_not_exported():
    cfg = TTMR3.small()
    assert converter.published(cfg)["trend_patch_length"] == 12
    with pytest.raises(ValueError, match=r"no place for .*gate of the trend"):
        converter.published(
            dataclasses.replace(cfg, trend=dataclasses.replace(cfg.trend, gate="sigmoid"))
        )
    (dims,) = cfg.trend.encoder
    less = dataclasses.replace(dims, patch=dims.patch - 1)
    pruned = dataclasses.replace(cfg.trend, encoder=(less,))
    with pytest.raises(ValueError, match="pruned"):
        converter.published(dataclasses.replace(cfg, trend=pruned))


def test_fields_of_r3_stand_in_a_file_only_where_they_are_used():
    config = TTMConfig.of(context_len=16, horizon=4, patch_len=4, d_model=8, decoder_d_model=8)
    told = plain_converter.published(config)
    assert not told.keys() & {"multi_scale", "gate_mode", "register_tokens", "multi_quantile_head"}


def test_problems_of_a_config_are_listed_by_part():
    fields = converter.published(TTMR3.small())
    wrong = fields | {
        "trend_d_model": -1,
        "residual_context_length": "long",
        "joint_loss_weight": -1,
    }
    with pytest.raises(CheckpointError) as caught:
        converter.configure({}, wrong, "here")
    for told in ("trend: d_model", "residual: context_length", "joint_loss_weight"):
        assert told in str(caught.value), told
