"""Toto 2.0: published sizes, worked examples, and what goes wrong in words."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed, widths

from converters import CheckpointError, export_checkpoint, import_checkpoint, tables
from converters import toto_2 as converter
from converters.torch_files import read_safetensors, write_safetensors
from ltsm_jax import trees
from ltsm_jax.methods import pruning, removal
from ltsm_jax.methods.phases import Phase, trainable_mask
from ltsm_jax.methods.starts import start_params
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models import folders
from ltsm_jax.models.toto_2 import (
    FLAT_SCALE,
    LEVELS,
    MEDIAN,
    PRESETS,
    Toto2,
    Toto2Config,
    causal_scale,
    kinds_of,
)

CONFIG = Toto2.small()
MODEL = Toto2(CONFIG)
# Two layers over time around one over variates, with queries that share keys.
DEEP = Toto2Config.of(
    4,
    16,
    4,
    3,
    24,
    kv_heads=2,
    qk_dim=8,
    v_dim=6,
    group_size=2,
    window=24,
    span=2,
    residual_ratio=2.0,
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def deep():
    return jax.jit(Toto2(DEEP).init)(jax.random.key(1))


def series(b, v, t, seed=0):
    return np.random.default_rng(seed).normal(size=(b, v, t)).astype(np.float32)


predict = jax.jit(
    lambda model, params, x, horizon: model.predict(params, x, horizon), static_argnums=(0, 3)
)


# --- sizes


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("Datadog/Toto-2.0-4m", 4_144_448),
        ("Datadog/Toto-2.0-22m", 21_915_584),
        ("Datadog/Toto-2.0-313m", 312_684_608),
        ("Datadog/Toto-2.0-1B", 1_041_033_024),
        ("Datadog/Toto-2.0-2.5B", 2_454_281_792),
    ],
)
def test_published_parameter_counts(name, parameters):
    """Without the taus, two of each layer, which the original counts among its constants."""
    model = Toto2(PRESETS[name])
    shapes = folders.param_shapes(model)
    fixed = jax.tree.leaves(trees.select(shapes, model.fixed))
    assert trees.count(shapes) - sum(fixed) == parameters
    assert sum(fixed) == 2 * len(model.config.layers)


def test_the_smallest_published_file_has_its_number_of_tensors_and_bytes(tmp_path):
    """48 tensors, 16,582,848 bytes with their names."""
    shapes = folders.param_shapes(Toto2(PRESETS["Datadog/Toto-2.0-4m"]))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state, _ = tables.to_state(converter.keys(PRESETS["Datadog/Toto-2.0-4m"]), zeros)
    assert len(state) == 48
    assert 16_582_848 - 4 * sum(x.size for x in state.values()) == 5024  # of the header


def test_layers_over_variates_stand_where_the_groups_say():
    assert kinds_of(4, 2, 1, False) == ("time", "variate", "time", "variate")
    assert kinds_of(4, 3, 1, True) == ("variate", "time", "time", "variate")
    assert kinds_of(3, 3, 2, False) == ("time", "variate", "variate")
    assert widths(PRESETS["Datadog/Toto-2.0-22m"], "kind") == ("time",) * 5 + ("variate",)


# --- the scale


scale_of = jax.jit(causal_scale, static_argnums=2)


def exactly(x_SP, seen_SP):
    """Mean and deviation at the end of each patch, in float64."""
    locs, scales = [], []
    for i in range(len(x_SP)):
        seen = x_SP[: i + 1][seen_SP[: i + 1]].astype(np.float64)
        locs.append(seen.mean() if len(seen) else 0.0)
        scales.append(max(seen.std(ddof=1), FLAT_SCALE) if len(seen) > 1 else FLAT_SCALE)
    return np.array(locs), np.array(scales)


def troubled(s, p):
    """Series [V, S, P] for which float32 sums are not exact enough."""
    rng = np.random.default_rng(0)
    noise, wave = rng.normal(size=s * p), np.sin(np.arange(s * p) / 7)
    rows = [
        noise,
        1e6 + noise,
        -3e7 + 4 * noise,
        np.full(s * p, 3.7),
        np.where(np.arange(s * p) < s * p // 2, 3.7, 3.7 + 1e-3 * wave),
        np.where(np.arange(s * p) == 0, 1e9, wave),
        np.where(np.arange(s * p) == s * p // 3, 1e12, 5 + wave),
        1e-4 * noise + 10,
        1e-9 * noise,
        np.cumsum(1e4 * noise),
    ]
    return np.stack(rows).astype(np.float32).reshape(len(rows), s, p)


@pytest.mark.parametrize("holes", [False, True])
def test_the_scale_is_as_exact_as_in_float64(holes):
    x_VSP = troubled(130, 32)
    seen_VSP = np.ones(x_VSP.shape, bool)
    if holes:
        seen_VSP &= np.random.default_rng(1).random(x_VSP.shape) < 0.6
        seen_VSP[:, :2] = False
    loc, scale = (np.asarray(y[0]) for y in scale_of(x_VSP[None], seen_VSP[None], 0))
    wrong = []
    for row, (x, seen) in enumerate(zip(x_VSP, seen_VSP, strict=True)):
        want_loc, want_scale = exactly(x, seen)
        np.testing.assert_allclose(scale[row], want_scale, rtol=3e-7, err_msg=f"scale of row {row}")
        # As float32 rounds it, or its neighbour: of an error relative to the scale nothing may be
        # left.
        near = np.spacing(np.abs(want_loc).astype(np.float32)) / 2
        assert (np.abs(loc[row] - want_loc) <= 1.01 * near + 1e-7 * want_scale).all(), (
            f"loc of row {row}"
        )
        sums = np.cumsum(np.where(seen, x, 0).sum(-1, dtype=np.float32), dtype=np.float32)
        counts = np.maximum(np.cumsum(seen.sum(-1)), 1).astype(np.float32)
        wrong.append(np.abs(sums / counts - want_loc).max() / want_scale.max())
    assert max(wrong) > 1e-3, "plain float32 sums would do"


def test_a_series_without_values_so_far_has_a_scale_of_its_own():
    x = series(1, 1, 12).reshape(1, 1, 3, 4)
    seen = np.ones(x.shape, bool)
    seen[0, 0, 0] = False
    seen[0, 0, 1, :3] = False
    loc, scale = scale_of(x, seen, 0)
    np.testing.assert_array_equal(loc[0, 0, :2], [0, x[0, 0, 1, 3]])
    np.testing.assert_array_equal(scale[0, 0, :2], np.float32([FLAT_SCALE, FLAT_SCALE]))


def test_few_values_get_the_scale_of_the_first_ones():
    x = series(1, 1, 16).reshape(1, 1, 4, 4)
    seen = np.ones(x.shape, bool)
    seen[0, 0, 0, :2] = False
    plain, (loc, scale) = scale_of(x, seen, 0), scale_of(x, seen, 7)
    first = x[seen][:7].astype(np.float64)
    np.testing.assert_allclose(loc[0, 0, :2], [first.mean()] * 2, rtol=1e-6)
    np.testing.assert_allclose(scale[0, 0, :2], [first.std(ddof=1)] * 2, rtol=1e-6)
    np.testing.assert_array_equal(loc[0, 0, 2:], plain[0][0, 0, 2:])
    np.testing.assert_array_equal(scale[0, 0, 2:], plain[1][0, 0, 2:])


# --- forecasts


def with_biases(params, step, size):
    """The head says at one step of each patch so much more, in arcsinh units, in the median and
    what is above it.
    """
    bias = np.zeros((CONFIG.patch_len, len(LEVELS)), np.float32)
    # The head's factors, of the readout and of the sum of two.
    bias[step, MEDIAN:] = size * 4 * CONFIG.d_model * np.sqrt(2)
    flat = trees.flatten(params) | {"head/out/bias": jnp.asarray(bias.reshape(-1))}
    return trees.unflatten(flat)


def test_quantiles_are_in_order_and_the_point_is_the_median(params):
    found = predict(MODEL, params, series(3, 2, 48), 21)
    assert found.levels == LEVELS and found.quantiles.shape == (3, 2, 21, 9)
    assert (jnp.diff(found.quantiles, axis=-1) >= 0).all()
    np.testing.assert_array_equal(found.quantiles[..., MEDIAN], found.point)


def test_the_forecast_of_a_scaled_series_is_scaled(params):
    x = series(2, 1, 40)
    one, other = predict(MODEL, params, x, 16), predict(MODEL, params, 256 * x + 1000, 16)
    np.testing.assert_allclose(other.point, 256 * one.point + 1000, rtol=1e-4, atol=0.05)


def test_quantiles_stay_near_the_range_of_the_context(params):
    x = series(2, 1, 40)
    params = with_biases(params, 2, 4.0)
    wide = predict(MODEL, params, x, 16)
    near = predict(Toto2(dataclasses.replace(CONFIG, cap=1e-2)), params, x, 16)
    margin = 0.02 * x.std()
    assert (wide.quantiles > x.max() + margin).any() or (wide.quantiles < x.min() - margin).any()
    assert (near.quantiles <= x.max() + margin).all() and (near.quantiles >= x.min() - margin).all()


def test_a_constant_series_stays(params):
    found = predict(MODEL, params, np.full((1, 1, 48), 3.7, np.float32), 16)
    np.testing.assert_allclose(found.quantiles, 3.7, rtol=1e-3)


@pytest.mark.slow
def test_values_that_overflow_are_the_largest_that_do_not(params):
    """sinh overflows at 90; the gradient does not notice."""
    x, large = series(1, 1, 40), with_biases(params, 2, 200.0)
    batch = {"context": x, "target": series(1, 1, 8, 1)}
    found = predict(MODEL, large, x, 8)
    assert np.isfinite(np.asarray(found.quantiles)).all()
    value, gradients = jax.jit(jax.value_and_grad(lambda params: MODEL.point_loss(params, batch)))(
        large
    )
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))


def test_layers_in_a_loop_give_what_they_give_one_after_another(deep):
    model = Toto2(DEEP)
    x, seen = series(2, 3, 24), np.ones((2, 3, 24), bool)
    forecast = jax.jit(lambda lean: model.forecast(deep, x, seen, 8, lean=lean), static_argnums=0)
    np.testing.assert_allclose(forecast(True), forecast(False), rtol=1e-5, atol=1e-6)


def blocks(config, params, x, horizon, block):
    seen = np.ones(x.shape, bool)
    model = Toto2(config)
    return jax.jit(lambda x: model.forecast(params, x, seen, horizon, block_len=block))(x)


def test_a_block_as_long_as_the_horizon_is_the_single_pass(deep):
    x = series(2, 2, 24)
    np.testing.assert_array_equal(blocks(DEEP, deep, x, 8, 8), blocks(DEEP, deep, x, 8, None))


@pytest.mark.slow
def test_what_the_cache_gives_a_pass_over_everything_gives_too(deep):
    """Where keys do not decay around the middle of each pass, a block is the forecast after a
    longer series.
    """
    x, p = series(2, 2, 24), DEEP.patch_len
    plain = dataclasses.replace(DEEP, xpos=False)
    in_blocks = np.asarray(blocks(plain, deep, x, 3 * p, p))
    for done in (1, 2):
        longer = np.concatenate([x, in_blocks[:, :, : done * p, MEDIAN]], axis=-1)
        again = blocks(plain, deep, longer, p, None)
        np.testing.assert_allclose(
            in_blocks[:, :, done * p : (done + 1) * p], again, rtol=1e-4, atol=1e-5
        )
    # xPos: kept keys are of the middle of their own pass, as in the original.
    in_blocks = np.asarray(blocks(DEEP, deep, x, 2 * p, p))
    again = blocks(DEEP, deep, np.concatenate([x, in_blocks[:, :, :p, MEDIAN]], axis=-1), p, None)
    assert np.abs(in_blocks[:, :, p:] - again).max() > 1e-4


@pytest.mark.slow
def test_predict_decodes_in_blocks_where_the_config_says_so(params):
    x = series(1, 1, 40)
    whole = predict(MODEL, params, x, 24).point
    in_blocks = predict(Toto2(dataclasses.replace(CONFIG, block_len=8)), params, x, 24).point
    np.testing.assert_allclose(in_blocks[..., :8], whole[..., :8], rtol=1e-5, atol=1e-6)
    assert np.abs(in_blocks[..., 8:] - whole[..., 8:]).max() > 1e-4


# --- variates, groups and covariates


def test_variates_see_each_other_in_their_group_alone(params):
    x = series(1, 3, 40)
    other = x.copy()
    other[0, 1] = series(1, 1, 40, 1)
    seen, ids = np.ones(x.shape, bool), np.array([[0, 0, 1]])
    forecast = jax.jit(lambda x: MODEL.forecast(params, x, seen, 8, ids_BV=ids))
    moved = np.abs(forecast(x) - forecast(other)).max(axis=(0, 2, 3))
    assert moved[0] > 1e-4 and moved[2] == 0


@pytest.mark.slow
def test_covariates_are_further_variates(params):
    x, past, known = series(1, 2, 40), series(1, 1, 40, 1), series(1, 1, 56, 2)
    forecast = jax.jit(
        lambda past, known: MODEL.predict_with(params, x, 16, past=past, known=known).point
    )
    base = forecast(past, known)
    assert base.shape == (1, 2, 16)
    later = known.copy()
    # A patch is predicted by the one before it, which sees what is known up to there.
    later[..., 48:] += 3
    np.testing.assert_array_equal(forecast(past, later), base)
    later[..., 42:48] += 3
    moved = np.abs(forecast(past, later) - base)
    assert moved[..., 8:].max() > 1e-4 and moved[..., :8].max() == 0
    assert np.abs(forecast(past + series(1, 1, 40, 3), known) - base).max() > 1e-4
    # What is known of the past alone is a target whose forecast nobody asks for.
    alone = jax.jit(lambda x: MODEL.predict(params, x, 16).point)(np.concatenate([x, past], axis=1))
    only_past = jax.jit(lambda past: MODEL.predict_with(params, x, 16, past=past).point)(past)
    np.testing.assert_allclose(only_past, alone[:, :2], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_loss_takes_covariates_and_does_not_predict_them(params):
    batch = {"context": series(2, 1, 40), "target": series(2, 1, 8, 1)}
    more = batch | {"past": series(2, 1, 40, 2), "known": series(2, 1, 48, 3)}
    loss = jax.jit(lambda batch: MODEL.loss(params, batch))
    point = jax.jit(lambda batch: MODEL.point_loss(params, batch))
    assert np.isfinite(loss(more)) and np.isfinite(point(more))
    assert abs(loss(more) - loss(batch)) > 1e-5 and abs(point(more) - point(batch)) > 1e-5
    # A covariate of noise would be the larger part of a loss that counted it.
    wild = more | {"past": 0 * more["past"], "known": 0 * more["known"]}
    assert abs(loss(wild) - loss(more)) < 0.5 * loss(batch)


# --- missing values


@pytest.mark.slow
def test_steps_in_front_of_a_series_do_not_exist_unless_asked_for(params):
    """A series of three points about 1000: with zeros in front of it, its scale would be
    hundreds.
    """
    x = 1000 + series(1, 1, 3)
    right = predict(MODEL, params, x, 8)
    assert np.abs(right.point - 1000).max() < 100
    quirk = Toto2(dataclasses.replace(CONFIG, front="zeros"))
    whole = np.concatenate([np.zeros((1, 1, 5), np.float32), x], axis=-1)
    np.testing.assert_allclose(
        predict(quirk, params, x, 8).point, predict(MODEL, params, whole, 8).point, rtol=1e-6
    )
    assert np.abs(predict(quirk, params, x, 8).quantiles - 1000).max() > 300
    assert MODEL.missing_in_front


@pytest.mark.parametrize(
    "fill, want", [("last", [3, 3, 5, 5]), ("linear", [3, 4, 5, 5]), ("zero", [3, 0, 5, 0])]
)
def test_missing_values_of_the_last_patch_are_filled_and_those_before_are_missing(fill, want):
    model = Toto2(dataclasses.replace(CONFIG, patch_len=4, fill=fill))
    x = np.array([np.nan, 1, np.nan, 2, 3, np.nan, 5, np.nan], np.float32)[None, None]
    filled, observed = model.prepare(x, 4)
    np.testing.assert_array_equal(filled[0, 0, 4:], want)
    np.testing.assert_array_equal(observed[0, 0], [0, 1, 0, 1, 1, 1, 1, 1])


def test_the_window_is_shared_by_context_and_forecast():
    """48 steps at a horizon of 16, as `context_len` says, and eight more at one patch."""
    x = series(1, 1, 100)
    for horizon, length in ((16, 48), (8, 56), (24, 40), (1000, 8)):
        filled, _ = MODEL.prepare(x, horizon)
        np.testing.assert_array_equal(filled, x[..., -length:])
    assert (MODEL.context_len, MODEL.horizon) == (48, 16)


# --- fine-tuning: what unit scaling means


def test_a_mixed_start_mixes_the_weights_in_effect_and_leaves_the_taus(params):
    """The taus here are none of a fresh draw's, as those of a checkpoint of another depth."""
    given = {
        path: 0.3 * x if path.endswith("_tau") else 2 * x + 0.1
        for path, x in trees.flatten(params).items()
    }
    given, key = trees.unflatten(given), jax.random.key(3)
    at = {
        alpha: start_params(strategy("sff", alpha=alpha), MODEL, given, key)
        for alpha in (0.0, 0.5, 1.0)
    }
    fresh = start_params(strategy("tfs"), MODEL, given, key)
    tuned = start_params(strategy("ff"), MODEL, given, key)
    chex.assert_trees_all_equal(at[1.0], tuned)
    chex.assert_trees_all_equal(at[0.0], fresh)
    drawn, flat = trees.flatten(jax.jit(MODEL.init)(key)), trees.flatten(given)
    for path, leaf in trees.flatten(at[0.5]).items():
        want = flat[path] if path.endswith("_tau") else 0.5 * flat[path] + 0.5 * drawn[path]
        np.testing.assert_allclose(leaf, want, rtol=1e-6, atol=1e-7, err_msg=path)
    for name in ("shrink", "noise"):
        mixed = trees.flatten(start_params(strategy(name, alpha=0.5), MODEL, given, key))
        for path in (path for path in flat if path.endswith("_tau")):
            np.testing.assert_array_equal(mixed[path], flat[path], err_msg=f"{name} {path}")

    # A linear of the mix gives the mix of what both give: the factor is on either side.
    x = series(1, 1, 2 * CONFIG.patch_len)

    first = jax.jit(lambda params: MODEL.apply(params, x)[1]["embed/hidden"])
    np.testing.assert_allclose(
        first(at[0.5]), 0.5 * first(given) + 0.5 * first(fresh), rtol=1e-4, atol=1e-5
    )


def test_a_fresh_draw_keeps_the_size_of_what_runs_through_it():
    """What the factors are for: of the order of 1 at any width, of a readout 1 / sqrt(inputs)."""
    for width in (32, 128):
        model = Toto2(Toto2Config.of(8, width, 4, 2, 2 * width, window=72))
        params = jax.jit(model.init)(jax.random.key(0))
        _, taps = jax.jit(model.apply)(params, series(4, 2, 64))
        assert 0.5 < np.std(taps["embed"]) < 2 and 0.5 < np.std(taps["layer_1/gate"]) < 2
        assert 0.5 < np.std(taps["head"]) * np.sqrt(width) < 2


def test_nothing_trains_or_decays_the_taus(params):
    flat = trees.flatten(trainable_mask(Phase("all"), MODEL, params))
    assert {path for path, trains in flat.items() if not trains} == {
        p for p in flat if p.endswith("_tau")
    }
    masks = trees.flatten(pruning.full_masks(MODEL, include_embed=True, include_head=True))
    assert not any("_tau" in path for path in masks)


@pytest.mark.slow
def test_the_original_gradient_is_of_the_same_function(params):
    batch = {"context": series(2, 2, 40), "target": series(2, 2, 8, 1)}
    quirk = Toto2(dataclasses.replace(CONFIG, gradient="umup"))
    losses = [jax.jit(jax.value_and_grad(model.loss))(params, batch) for model in (MODEL, quirk)]
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-6)
    one, other = (trees.flatten(grad) for _, grad in losses)
    # Biases of keys that no position turns have none.
    some = [path for path in one if not path.endswith("_tau") and np.abs(one[path]).max() > 1e-6]
    alike = [path for path in some if np.allclose(one[path], other[path], rtol=1e-2)]
    assert len(some) > 20 and not alike


# --- pruning


@pytest.mark.slow
def test_a_model_without_heads_and_units_keeps_its_factors(deep):
    """They are made of the published widths: what is left computes what the masked model does."""
    model, masks = Toto2(DEEP), pruning.full_masks(Toto2(DEEP))
    flat = {path: np.asarray(mask) for path, mask in trees.flatten(masks).items()}
    flat["layer_0/time/out/in"] = np.repeat(np.float32([0, 0, 1, 1]), 6).reshape(4, 6)
    flat["layer_1/variate/out/in"] = np.repeat(np.float32([1, 1, 0, 0]), 6).reshape(4, 6)
    flat["layer_2/down/in"] = np.float32(np.arange(24) % 3 > 0)
    masks = trees.unflatten(flat)
    small, left, _ = removal.remove(model, deep, masks)
    assert widths(small.config, "attn.heads") == (2, 2, 4)
    assert widths(small.config, "attn.kv_heads") == (1, 1, 2)
    assert widths(small.config, "ffn") == (24, 24, 16)
    assert (small.config.attn_width, small.config.ffn_width) == (DEEP.attn_width, DEEP.ffn_width)
    x, merged = series(2, 2, 24), pruning.apply_masks(deep, masks)
    want = predict(model, merged, x, 8).point
    np.testing.assert_allclose(predict(small, left, x, 8).point, want, rtol=1e-4, atol=1e-5)
    assert np.abs(predict(model, deep, x, 8).point - want).max() > 1e-3


def test_layers_keep_their_kind_when_others_are_taken_out(deep):
    model = Toto2(DEEP)
    assert widths(DEEP, "kind") == ("time", "variate", "time")
    small, left = pruning.drop_layers(model, deep, ["layer_0"])
    assert widths(small.config, "kind") == ("variate", "time")
    np.testing.assert_array_equal(
        left["layer_0"]["variate"]["q"]["kernel"], deep["layer_1"]["variate"]["q"]["kernel"]
    )
    np.testing.assert_array_equal(left["layer_1"]["attn_tau"], deep["layer_2"]["attn_tau"])
    assert predict(small, left, series(1, 2, 24), 8).point.shape == (1, 2, 8)


# --- checkpoints


def checkpoint(folder, config, params, fields=None, change=None):
    state, _ = tables.to_state(converter.keys(config), params)
    write_safetensors(
        folder / "model.safetensors", change(state) if change else state, overwrite=True
    )
    fields = converter.published(config) if fields is None else fields
    (folder / "config.json").write_text(json.dumps(fields))
    return state


def test_a_checkpoint_in_several_files(deep, tmp_path):
    """Large ones are published so; the bytes come back in one."""
    state = checkpoint(tmp_path, DEEP, deep)
    (tmp_path / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {key: names[i % 3] for i, key in enumerate(sorted(state))}
    for name in names:
        write_safetensors(
            tmp_path / name, {key: state[key] for key, file in where.items() if file == name}
        )
    index = {"metadata": {"total_size": sum(x.nbytes for x in state.values())}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model, params, *_ = import_checkpoint(tmp_path, tmp_path / "ours")
    assert isinstance(model, Toto2)
    # The file does not say how it is used, so that is as by default.
    assert model.config == dataclasses.replace(DEEP, window=4096, span=16)
    chex.assert_trees_all_equal(params, deep)
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    again = read_safetensors(tmp_path / "theirs" / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(tables.same_bytes(again[key], state[key]) for key in state)


def of_kinds(*kinds, check=True):
    """DEEP with layers of these kinds; without a check its layers alone."""
    layers = tuple(dataclasses.replace(DEEP.layers[0], kind=kind) for kind in kinds)
    return dataclasses.replace(DEEP, layers=layers) if check else layers


def odd(**changes):
    """Layers of which the first has other heads."""
    layer = DEEP.layers[0]
    attention = dataclasses.replace(layer.attn, **changes)
    return (dataclasses.replace(layer, attn=attention), *DEEP.layers[1:])


def test_variates_are_joint_where_a_layer_attends_over_them():
    assert Toto2(PRESETS["Datadog/Toto-2.0-4m"]).variates == "joint"
    alone = Toto2(PRESETS["toto2-mini"])
    assert alone.variates == "independent" and not alone.covariates


def test_published_configs_come_back():
    for config in (*PRESETS.values(), DEEP):
        # How a model is used is no part of them: those of ours come back with the original's.
        config = dataclasses.replace(config, window=4096, span=16)
        told = json.loads(json.dumps(converter.published(config)))
        assert Toto2Config.from_published(told) == config
    for config, said in (
        (narrowed(DEEP, 1, ffn=8), "pruned model can't be exported"),
        (of_kinds("time", "variate", "variate"), None),
        (of_kinds("variate", "time", "time"), None),
    ):
        if said is None:
            assert Toto2Config.from_published(converter.published(config)).layers == config.layers
            continue
        with pytest.raises(ValueError, match=said):
            converter.published(config)
    with pytest.raises(ValueError, match="without some of its layers"):
        converter._grouped(("variate", "variate", "time", "time", "variate", "time"))


def test_sizes_that_a_published_config_leaves_out():
    config = Toto2Config.from_published(
        {"patch_size": 32, "d_model": 256, "num_heads": 4, "num_layers": 4}
    )
    assert config == PRESETS["Datadog/Toto-2.0-4m"]
    for change, said in (
        ({"d_model": None}, "lacks d_model"),
        ({"dropout_p": 0.1}, "dropout_p must be 0"),
        ({"num_output_patches": 2}, "num_output_patches must be 1"),
        ({"num_heads": 5}, "multiple of num_heads"),
    ):
        fields = {"patch_size": 32, "d_model": 256, "num_heads": 4, "num_layers": 4} | change
        fields = {name: value for name, value in fields.items() if value is not None}
        with pytest.raises(ValueError, match=said):
            Toto2Config.from_published(fields)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"patch_size": 8}, "patch_size: the config says 8, the weights 4"),
        ({"d_model": 32}, "d_model: the config says 32, the weights 16"),
        ({"num_layers": 4}, "num_layers: the config says 4, the weights 3"),
        ({"d_ff": 48}, "d_ff: the config says 48, the weights 24"),
        ({"num_groups": 4}, "88 rows of in_proj, 60 in the weights"),
        ({"num_groups": 3}, "no multiple of num_groups"),
        ({"num_output_patches": 2}, "num_output_patches: not an integer from 1 to 1"),
        ({"dropout_p": 0.5}, "dropout_p: not a number from 0 to 0"),
        ({"use_xpos": "yes"}, "use_xpos: not true or false"),
        ({"norm_eps": -1}, "norm_eps: not a number"),
        ({"attn_bias": False}, "the model has no layer_0/time/q/bias"),
        ({"norm_include_weight": True}, "norm/scale: missing in the checkpoint"),
        ({"layer_group_size": 3}, "missing in the checkpoint"),
    ],
)
def test_contradictions_are_told(deep, tmp_path, change, said):
    fields = converter.published(DEEP) | change
    checkpoint(tmp_path, DEEP, deep, fields)
    if "layer_group_size" in change:
        # The tensors of both kinds of layers are the same, so that nothing can tell.
        model, *_ = import_checkpoint(tmp_path)
        assert isinstance(model, Toto2)
        assert [dims.kind for dims in model.config.layers] == ["time", "time", "variate"]
        return
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(tmp_path)


def test_without_a_config_the_sizes_must_be_published(deep, tmp_path):
    checkpoint(tmp_path, DEEP, deep)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"Put the original's config.json beside the file"):
        import_checkpoint(tmp_path)
    preset = PRESETS["Datadog/Toto-2.0-4m"]
    shapes = folders.param_shapes(Toto2(preset))
    state, _ = tables.to_state(
        converter.keys(preset), jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    )
    found, notes = converter.configure(state, None, "file")
    assert found == preset and "Toto-2.0-4m" in notes[0]


def test_missing_and_strange_keys_are_listed(deep, tmp_path):
    def change(state):
        del state["transformer.layers.2.ffn.fc2.weight"]
        state["transformer.rotary.inv_freq"] = np.zeros(2, np.float32)
        state["transformer.layers.1.attn.in_proj.bias"] = np.zeros(7, np.float32)
        return state

    checkpoint(tmp_path, DEEP, deep, change=change)
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(tmp_path)
    told = str(error.value)
    assert "layer_2/down/kernel: missing in the checkpoint" in told
    assert "transformer.rotary.inv_freq': no rule matches" in told
    assert (
        "(7,) is not cut into [32, 16, 12] (check num_heads, num_groups, qk_dim and v_dim)" in told
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers": ()}, "at least one layer"),
        ({"layers": odd(kv_heads=3)}, "multiple of kv_heads"),
        ({"qk_dim": 6}, "multiple of 4"),
        ({"patch_len": 0}, "positive"),
        ({"block_len": 6}, "whole patches of 4 steps"),
        ({"fill": "mean"}, "fill must be one of last, linear, zero"),
        ({"gradient": "none"}, "gradient must be one of"),
        (
            {"layers": of_kinds("time", "space", "time", check=False)},
            "kind must be one of time, variate",
        ),
        ({"layers": odd(value=7)}, "width from 0 to 6"),
        ({"residual_mult": 0.0}, "must be positive"),
    ],
)
def test_a_config_says_what_is_wrong(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(DEEP, **change)


def test_the_network_is_strict_about_lengths(params):
    with pytest.raises(ValueError, match="whole patches of 8 time steps are taken, got 12"):
        MODEL.apply(params, jnp.zeros((1, 1, 12)))
