"""TiRex-2: published sizes, worked examples, and what goes wrong in words."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from layer_widths import narrowed, widths

from converters import CheckpointError, import_checkpoint, tables
from converters import tirex_2 as converter
from converters.torch_files import write_safetensors, write_torch
from ltsm_jax import trees
from ltsm_jax.layers.masks import apply_masks, mask_shapes, masked
from ltsm_jax.layers.quantiles import at_levels
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.methods.removal import remove
from ltsm_jax.models import folders, tirex_2
from ltsm_jax.models.tirex_2 import (
    PRESETS,
    TiRex2,
    TiRex2Config,
    calibrated,
    context_moments,
    differences,
    has_trend,
    trend,
)

CONFIG = TiRex2.small()
MODEL = TiRex2(CONFIG)
NAN = np.float32(np.nan)


@pytest.fixture(scope="module")
def params():
    """A fresh draw with everything moved off its start, where gates and norms are constants."""
    drawn = trees.flatten(jax.jit(MODEL.init)(jax.random.key(0)))
    rng = np.random.default_rng(1)
    moved = {
        path: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for path, x in drawn.items()
    }
    return trees.unflatten(moved)


def wave(b, c, t, seed=0):
    rng = np.random.default_rng(seed)
    x = np.sin(2 * np.pi * np.arange(t) / 12 + np.arange(b * c).reshape(b, c, 1))
    return np.asarray(x + 0.2 * rng.normal(size=(b, c, t)), np.float32)


predict = jax.jit(lambda p, x, h: MODEL.predict(p, x, h), static_argnums=2)
predict_with = jax.jit(
    lambda p, x, h, past, known: MODEL.predict_with(p, x, h, past=past, known=known),
    static_argnums=2,
)


@pytest.mark.parametrize("name", PRESETS)
def test_published_parameter_counts(name):
    """The published numbers, without and in what mixes variates."""
    flat = trees.flatten(folders.param_shapes(TiRex2(PRESETS[name])))
    mixing = sum(x.size for path, x in flat.items() if "/variates/" in path or "/combine/" in path)
    whole = sum(x.size for x in flat.values())
    assert (whole, whole - mixing, mixing) == (82_501_744, 38_449_264, 44_052_480)


# --- recurrences


def plain_mlstm(q, k, v, i, f):
    """The recurrence as it is written, token by token, in float64."""
    n, k_dim = q.shape
    c, z, m = np.zeros((k_dim, v.shape[1])), np.zeros(k_dim), 0.0
    out = []
    for t in range(n):
        log_f = -np.log1p(np.exp(-f[t]))
        new = max(log_f + m, i[t])
        keep, write = np.exp(log_f + m - new), np.exp(i[t] - new)
        c, z, m = keep * c + write * np.outer(k[t], v[t]), keep * z + write * k[t], new
        scaled = q[t] / np.sqrt(k_dim)
        out.append(c.T @ scaled / (max(abs(z @ scaled), np.exp(-m)) + 1e-6))
    return np.stack(out)


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_chunks_of_an_mlstm_are_its_recurrence(chunk):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 2, 3, 23, 4)).astype(np.float32)
    v = rng.normal(size=(2, 3, 23, 6)).astype(np.float32)
    i, f = 15 * np.tanh(rng.normal(size=(2, 2, 3, 23)) * 2).astype(np.float32)
    got, steps = jax.jit(lambda *x: tirex_2.mlstm(*x, chunk))(q, k, v, i, f)
    for r in range(2):
        for h in range(3):
            want = plain_mlstm(*(x[r, h].astype(np.float64) for x in (q, k, v, i, f)))
            np.testing.assert_allclose(got[r, h], want, rtol=2e-4, atol=2e-5)
    assert steps["C"].shape == (2, 3, 4, 6)


def test_an_mlstm_that_forgets_everything_stays_finite():
    """Gates at their ends, over many tokens: in value and gradient."""
    x = np.ones((1, 1, 300, 2), np.float32)
    low = np.full((1, 1, 300), -15.0, np.float32)

    def total(q, i, f):
        return tirex_2.mlstm(q, q, q, i, f, 64)[0].sum()

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    for i, f in ((low, low), (-low, low), (low, -low), (-low, -low)):
        value, grads = both(x, i, f)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_an_slstm_token_by_token():
    rng = np.random.default_rng(0)
    h, r, e, n = 2, 3, 4, 7
    gates = rng.normal(size=(n, h, r, 4, e)) * 3
    kernel, bias = rng.normal(size=(h, e, 4, e)), rng.normal(size=(h, 4, e))
    got, _ = jax.jit(tirex_2.slstm)(*(x.astype(np.float32) for x in (gates, kernel, bias)))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for head in range(h):
        for row in range(r):
            y, c, z = np.zeros(e), np.zeros(e), np.zeros(e)
            m = None
            for t in range(n):
                total = gates[t, head, row] + np.einsum("e,ego->go", y, kernel[head]) + bias[head]
                log_f = np.log(sigmoid(total[1]))
                new = total[0] if m is None else np.maximum(total[0], log_f + m)
                keep = np.zeros(e) if m is None else np.exp(log_f + m - new)
                write, m = np.exp(total[0] - new), new
                c, z = keep * c + write * np.tanh(total[2]), keep * z + write
                y = sigmoid(total[3]) * c / np.maximum(z, 1)
                np.testing.assert_allclose(got[t, head, row], y, rtol=1e-4, atol=1e-5)


def test_the_past_does_not_see_the_future(params):
    """But through the statistics, which are those of the whole window."""
    x = wave(1, 1, 80)
    other = x.copy()
    other[..., 40:] = other[..., 79:39:-1]  # the same values, so the same statistics
    run = jax.jit(lambda x: MODEL.apply(params, x)[0])
    one, two = run(x), run(other)
    np.testing.assert_allclose(one[..., :40, :], two[..., :40, :], rtol=1e-3, atol=1e-4)
    assert not np.allclose(one[..., 40:, :], two[..., 40:, :], atol=1e-2)


# --- scaling, trends, calibration


def test_statistics_by_hand():
    x = np.array(
        [[1, NAN, 3, 5], [3.7, 3.7, NAN, 3.7], [0, 1, NAN, 1], [0, 0, 0, 0], [NAN] * 4], np.float32
    )
    loc, scale, binary = context_moments(x, 1e-8, True)
    np.testing.assert_allclose(loc[:, 0], [3, 3.7, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(scale[:, 0], [np.sqrt(8 / 3), 1e-8, 1, 1, 1], rtol=1e-6)
    assert binary[:, 0].tolist() == [False, False, True, True, True]

    # Constants have exactly their own value as the mean, whatever float32 makes of sums.
    assert (loc[1, 0] == np.float32(3.7)).all()
    loc, scale, binary = context_moments(x, 1e-5, False)
    np.testing.assert_allclose(scale[2:, 0], [np.sqrt(2 / 9), 1e-5, 1], rtol=1e-6)
    assert not binary.any()


def test_trends_by_hand():
    t = np.arange(20, dtype=np.float32)
    noise = np.random.default_rng(0).normal(size=20).astype(np.float32)
    holes = 3 * t
    holes[[0, 3, 4, 19]] = NAN
    few = np.full(20, NAN, np.float32)
    few[[2, 9, 15]] = 1, 2, 3
    x = np.stack([2 * t + 5, -t, noise, holes, few, np.full(20, 7, np.float32)])
    rise, share = trend(x)
    line = (t - t.mean()) / t.std(ddof=1)
    np.testing.assert_allclose(rise[:2], 20 * (line[1] - line[0]), rtol=1e-5)
    np.testing.assert_allclose(share[:2], 1, rtol=1e-5)
    assert has_trend(x).tolist() == [True, True, False, True, False, False]
    np.testing.assert_array_equal(rise[4:], 0)

    # Far from zero, large and small.
    for unit, offset in ((1e-6, 0), (1e12, 0), (1, 1e5)):
        assert has_trend(np.asarray(x * unit + offset, np.float32)).tolist()[:3] == [
            True,
            True,
            False,
        ]


def test_differences_begin_at_the_first_value():
    x = np.array([[NAN, NAN, 5, 7, NAN, 4, 6, NAN], [1, 2, 4, 8, 16, 32, 64, 128]], np.float32)
    change, last = differences(x)
    np.testing.assert_array_equal(change[0], [NAN, NAN, 0, 2, NAN, NAN, 2, NAN])
    np.testing.assert_array_equal(change[1], [0, 1, 2, 4, 8, 16, 32, 64])
    assert last[:, 0].tolist() == [6, 128]

    # As the original has it.
    change, _ = differences(x, zero_at_start=True)
    np.testing.assert_array_equal(change[0], [0, NAN, NAN, 2, NAN, NAN, 2, NAN])


def test_calibration_by_hand():
    y = np.array([[1.0, 2, 4], [0, 2, 3]], np.float32)[None, None]  # two steps, three levels
    y = np.concatenate([y, y], axis=1)
    got = calibrated(y, jnp.array([[False, True]]), jnp.array([[100.0, 10.0]]))
    factor = np.sqrt(0.9) * np.array([1, 2**0.02])
    np.testing.assert_allclose(got[0, 0, :, 0], [2 - factor[0], 2 - 2 * factor[1]], atol=1e-6)
    np.testing.assert_allclose(got[0, 0, :, 1], [2, 2], rtol=1e-6)
    np.testing.assert_allclose(got[0, 0, :, 2], [2 + 2 * factor[0], 2 + factor[1]], rtol=1e-6)
    factor = np.sqrt(1.68) * np.array([1, 2**0.01])
    np.testing.assert_allclose(got[0, 1, :, 1], [12, 14], rtol=1e-6)
    np.testing.assert_allclose(
        got[0, 1, :, 0], [12 - factor[0], 14 - factor[1] * np.sqrt(5)], rtol=1e-6
    )
    np.testing.assert_allclose(
        got[0, 1, :, 2], [12 + 2 * factor[0], 14 + factor[1] * np.sqrt(5)], rtol=1e-6
    )


def test_a_line_is_continued_from_where_it_ends(params):
    """Of a series with a trend the changes are forecast: the level of the series says nothing."""
    x = wave(1, 1, 60) * 0.1 + np.arange(60, dtype=np.float32)
    found = [predict(params, x + offset, 8).point for offset in (0, 1000)]
    np.testing.assert_allclose(found[1] - 1000, found[0], atol=2e-3)


def test_averaging_with_the_negated_series_is_fair(params):
    """The forecast of -x is that of x, negated, with its levels in reverse."""
    model = TiRex2(dataclasses.replace(CONFIG, sign_flip=True))
    run = jax.jit(lambda x: model.predict(params, x, 8).quantiles)
    x = wave(2, 2, 50)
    x[0, 0] += np.arange(50)
    np.testing.assert_allclose(run(-x), -run(x)[..., ::-1], rtol=1e-4, atol=1e-4)


def test_levels_between_the_models():
    y = np.array([[0.0, 1.0, 4.0]], np.float32)
    got = at_levels(y, (0.1, 0.5, 0.9), (0.01, 0.3, 0.5, 0.7, 0.99))
    np.testing.assert_allclose(got[0], [0, 0.5, 1, 2.5, 4], rtol=1e-6)


# --- forecasts


def test_fewer_steps_are_the_first_of_more(params):
    """Only the tokens that lead to them are computed."""
    x = wave(2, 2, 50)
    whole = predict(params, x, CONFIG.future_len).quantiles
    for h in (1, 8, 9):
        np.testing.assert_allclose(
            predict(params, x, h).quantiles, whole[:, :, :h], rtol=1e-5, atol=1e-5
        )


def test_a_long_horizon_goes_on_from_its_own_median(params):
    x, f = wave(2, 2, 50), CONFIG.future_len
    long = predict(params, x, 2 * f + 3)
    first = predict(params, x, f).point
    second = predict(params, np.concatenate([x, first], axis=-1), f).point
    third = predict(params, np.concatenate([x, first, second], axis=-1), 3).point
    want = np.concatenate([first, second, third], axis=-1)
    np.testing.assert_allclose(long.point, want, rtol=1e-3, atol=1e-3)
    assert long.quantiles.shape == (2, 2, 2 * f + 3, 3)


def test_a_long_horizon_with_covariates(params):
    """What is known ahead goes on as it is known, what is not is missing."""
    f = CONFIG.future_len
    h = f + 5
    x, past, known = wave(1, 1, 50), wave(1, 2, 50, seed=1), wave(1, 1, 50 + h, seed=2)
    long = predict_with(params, x, h, past, known).point
    first = predict_with(params, x, f, past, known[..., : 50 + f]).point
    more = np.concatenate([past, np.full((1, 2, f), NAN)], axis=-1)
    second = predict_with(params, np.concatenate([x, first], axis=-1), 5, more, known).point
    np.testing.assert_allclose(long, np.concatenate([first, second], axis=-1), rtol=1e-3, atol=1e-3)


def test_covariates_reach_the_targets_and_not_the_other_way_round(params):
    x, past, known = wave(2, 1, 50), wave(2, 1, 50, seed=1), wave(2, 1, 58, seed=2)
    plain = predict_with(params, x, 8, past, known).point
    changed = known.copy()
    changed[..., 55] += 5
    assert not np.allclose(plain, predict_with(params, x, 8, past, changed).point, atol=1e-3)
    assert not np.allclose(plain, predict_with(params, x, 8, -2 * past, known).point, atol=1e-3)

    # Seen at the last layer: a covariate's tokens do not change with the target.
    def tokens(x):
        members = jnp.concatenate([x, past], axis=1)
        return MODEL._future(params, members, 8, targets=1)[1]["layer_1"]

    one, two = jax.jit(tokens)(x), jax.jit(tokens)(3 * x[:, :, ::-1])
    np.testing.assert_array_equal(one[:, 1], two[:, 1])
    assert not np.allclose(one[:, 0], two[:, 0], atol=1e-3)


def test_a_covariate_without_a_known_future_is_a_past_one(params):
    x, past = wave(2, 1, 50), wave(2, 1, 50, seed=1)
    unknown = np.concatenate([past, np.full((2, 1, 8), NAN)], axis=-1)
    np.testing.assert_allclose(
        predict_with(params, x, 8, past, None).point,
        predict_with(params, x, 8, None, unknown).point,
        rtol=1e-4,
        atol=1e-5,
    )


def test_missing_values_in_front_change_no_forecast_with_a_trend(params):
    x = wave(1, 1, 30) + np.arange(30, dtype=np.float32)
    front = np.concatenate([np.full((1, 1, 21), NAN), x], axis=-1)
    assert has_trend(x).all() and has_trend(front).all()
    np.testing.assert_allclose(
        predict(params, front, 8).point, predict(params, x, 8).point, rtol=1e-4
    )


def test_embeddings_are_of_the_context(params):
    x = wave(2, 2, 50)
    found = jax.jit(MODEL.embed)(params, x)
    assert found.shape == (2, 2, CONFIG.context_len // CONFIG.patch_len, CONFIG.d_model)
    longer = np.concatenate([np.full((2, 2, 10), NAN), x], axis=-1)
    np.testing.assert_allclose(jax.jit(MODEL.embed)(params, longer), found, rtol=1e-4, atol=1e-4)


# --- losses


def test_the_loss_is_that_of_the_window(params):
    """As written: scaled targets, quantile loss, a mean over levels and what is observed."""
    x, target = wave(2, 2, 40), wave(2, 2, 8, seed=3)
    target[0, 0, 3:] = NAN
    x[1, 1] = np.arange(40) % 2  # 0 and 1: not scaled
    got = jax.jit(MODEL.loss)(params, {"context": x, "target": target})
    _, taps = jax.jit(lambda x: MODEL._future(params, x, 8, targets=2))(x)
    mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    y = np.arcsinh((target - mean) / std)
    y[1, 1] = target[1, 1]
    e = y[..., None] - np.asarray(taps["scaled"])
    levels = np.array(CONFIG.levels)
    want = np.nanmean(np.maximum(levels * e, (levels - 1) * e).mean(-1))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_covariates_take_part_in_the_loss(params):
    batch = {"context": wave(2, 1, 40), "target": wave(2, 1, 8, seed=3)}
    loss = jax.jit(MODEL.loss)
    more = batch | {"past": wave(2, 1, 40, seed=1), "known": wave(2, 2, 48, seed=2)}
    changed = more | {
        "known": more["known"] * np.where(np.arange(48) < 40, 1, -1).astype(np.float32)
    }
    assert len({float(loss(params, each)) for each in (batch, more, changed)}) == 3
    gradient = jax.jit(jax.grad(MODEL.loss))
    flat = trees.flatten(gradient(params, more))
    still = [path for path, g in flat.items() if not np.any(np.asarray(g))]
    assert not still

    # Nothing runs backwards without covariates that are known ahead.
    flat = trees.flatten(gradient(params, batch | {"past": more["past"]}))
    assert {path for path, g in flat.items() if not np.any(np.asarray(g))} == {
        "layer_0/combine/kernel",
        "layer_1/combine/kernel",
    }


def test_losses_reach_one_pass(params):
    batch = {"context": wave(2, 1, 40), "target": wave(2, 1, 17)}
    for loss in (MODEL.loss, MODEL.point_loss):
        with pytest.raises(
            ValueError, match="one forward pass reaches 16 steps, the target has 17"
        ):
            loss(params, batch)


def test_states_are_wide_where_products_are_narrow(params):
    x = wave(2, 2, 50)

    def narrow(x):
        _, taps = Runtime(compute="bfloat16").call(MODEL._future, params, x, 8, targets=2)
        return taps

    taps = jax.jit(narrow)(x)
    assert taps["embed"].dtype == jnp.bfloat16
    for name in ("layer_0/cell/C", "layer_0/cell/m", "layer_1/cell/states"):
        assert taps[name].dtype == jnp.float32, name
    want = jax.jit(lambda x: MODEL._future(params, x, 8, targets=2)[1]["scaled"])(x)
    np.testing.assert_allclose(taps["scaled"], want, atol=0.1)


# --- pruning


def mask_tree(params, **zeros):
    """Masks of ones, with zeros at some channels: {path: index}."""
    flat = trees.flatten(
        jax.tree.map(
            lambda s: np.ones(s.shape, np.float32), mask_shapes(MODEL.init, jax.random.key(0))
        )
    )
    for path, index in zeros.items():
        flat[path.replace("__", "/")][index] = 0
    return trees.unflatten(flat)


def test_heads_of_the_recurrence_go_as_a_whole(params):
    """The norm mixes the channels of a head: those that v lacks are not dead behind it."""
    masks = mask_tree(
        params,
        layer_0__mlstm__out__in=0,
        layer_0__mlstm__v__out=(1, slice(3)),
        layer_1__slstm__z__out=0,
    )
    small, fewer, _ = remove(MODEL, params, masks)
    assert widths(small.config, "lstm_heads") == (1, 2)
    assert fewer["layer_0"]["mlstm"]["v"]["kernel"].shape == (16, 1, 8)
    assert fewer["layer_0"]["mlstm"]["norm"]["scale"].shape == (1, 8)
    x = wave(2, 2, 50)

    def with_masks(x):
        with masked(masks):
            return MODEL.predict(params, x, 8).point

    want = jax.jit(with_masks)(x)
    np.testing.assert_allclose(
        jax.jit(small.predict, static_argnums=2)(fewer, x, 8).point, want, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        predict(apply_masks(params, masks), x, 8).point, want, rtol=1e-4, atol=1e-5
    )


def test_a_recurrence_without_heads_gives_nothing(params):
    masks = mask_tree(params, layer_0__mlstm__out__in=slice(None))
    small, fewer, _ = remove(MODEL, params, masks)
    assert widths(small.config, "lstm_heads") == (0, 2)
    assert "mlstm" not in fewer["layer_0"]
    assert type(MODEL).config_from_dict(small.config_to_dict()) == small.config
    x = wave(1, 1, 50)
    got = jax.jit(small.predict, static_argnums=2)(fewer, x, 8).point
    np.testing.assert_allclose(
        got, predict(apply_masks(params, masks), x, 8).point, rtol=1e-4, atol=1e-5
    )


# --- configs and files


def test_configs_that_make_no_sense_are_refused():
    cases = {
        "at least one layer": {"layers": ()},
        "whole patches of 8 steps, got 20": {"future_len": 20},
        "must rise within": {"levels": (0.5, 0.1, 0.9)},
        "must be an odd number": {"levels": (0.1, 0.9)},
        "symmetric about 0.5": {"levels": (0.1, 0.5, 0.8), "sign_flip": True},
        "qk_dim must be positive": {"qk_dim": 0},
        "activation must be one of": {"activation": "tanh"},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes)
    of_a_layer = {
        "must make the width 16": {"lstm_heads": 1},
        "kind must be one of mlstm, slstm": {"kind": "gru"},
        "value must be a width from 0 to 8": {"attn": {"value": 9}},
    }
    for message, changes in of_a_layer.items():
        with pytest.raises(ValueError, match=message):
            narrowed(CONFIG, 1, **changes)
    with pytest.raises(ValueError, match="mlstm_heads must divide the width 16"):
        TiRex2Config.of(16, ("mlstm",), mlstm_heads=3, embed_dim=8)


def test_the_published_config_gives_the_config_back():
    odd = dataclasses.replace(
        CONFIG, out_norm_eps=None, activation="gelu", out_dim=37, qk_norm=False
    )
    for config in (CONFIG, odd, *PRESETS.values()):
        told = json.loads(json.dumps(converter.published(config)))
        assert TiRex2Config.from_published(told) == config
    with pytest.raises(ValueError, match="pruned model can't be exported"):
        converter.published(narrowed(CONFIG, 1, ffn=8))
    with pytest.raises(ValueError, match="lstm_heads 1, "):
        converter.published(narrowed(CONFIG, 0, lstm_heads=1))
    with pytest.raises(ValueError, match="no activation 'gelu_tanh'"):
        converter.published(dataclasses.replace(CONFIG, activation="gelu_tanh"))


def checkpoint(folder, params, published=None, *, change=lambda state: state):
    """A folder as the original's, and what import reads of it."""
    state, _ = tables.to_state(converter.keys(CONFIG), params)
    write_safetensors(folder / "model.safetensors", change(dict(state)))
    if published is not None:
        (folder / "config.json").write_text(json.dumps(published))
    return folder


def nested(fields, path, value):
    """A copy of nested fields with one of them changed, or without it."""
    (name, *rest), copy = path, dict(fields)
    if rest:
        copy[name] = nested(copy[name], rest, value)
    elif value is ...:
        del copy[name]
    else:
        copy[name] = value
    return copy


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("num_blocks", 10**9, "num_blocks: not an integer from 1 to 128"),
        ("embedding_dim", 32, "embedding_dim: the config says 32, the weights 16"),
        ("h_expand", 3, "h_expand: 3 times 16 in the config, 32 in the weights"),
        ("quantiles", [0.1, 0.2, 0.5, 0.8, 0.9], "quantiles: 5 in the config, 3 in the weights"),
        ("quantiles", [0.1, None], "quantiles: not a list"),
        ("act_func", "os.system", "act_func: 'os.system' is not one of SiLU, GELU, ReLU"),
        ("tokenizer_cfg input_patch_stride", 4, "equal input and output patches without overlap"),
        ("scaler_cfg", 3, "scaler_cfg: not an object"),
        ("scaler_cfg use_arcsinh", "yes", "scaler_cfg.use_arcsinh: not true or false"),
        ("tta_diff", 1, "tta_diff: not true or false"),
        ("stack_config", ..., "stack_config: missing"),
        ("stack_config recipe", ["mlstm", 3], "stack_config.recipe: not a list"),
        ("stack_config recipe", ["slstm", "mlstm"], "layer 0 is bi-slstm in the config"),
        ("stack_config recipe", ["mlstm"], "num_blocks is 2, the recipe of stack_config names 1"),
        ("stack_config recipe", ["mlstm", "gru"], "the recipe names 'gru', which is no template"),
        (
            "stack_config templates slstm variate_mixer num_heads",
            4,
            "all layers must have the same n_",
        ),
        (
            "stack_config templates mlstm time_mixer model_type",
            "gru",
            "not one of bi-mlstm, bi-slstm",
        ),
        ("stack_config templates mlstm time_mixer num_heads", 3, "mlstm_heads must divide the"),
        (
            "stack_config templates mlstm time_mixer",
            3,
            "templates.mlstm.time_mixer: missing, or not",
        ),
        ("strange", 1, "'strange': not known"),
    ],
)
def test_contradictions_are_told(params, tmp_path, path, value, said):
    published = nested(converter.published(CONFIG), path.split(), value)
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(checkpoint(tmp_path, params, published))


def test_missing_and_strange_keys_are_listed(params, tmp_path):
    def change(state):
        del state["stack.1.time_mixer.fwd_cell.zgate.weight"]
        state["stack.0.time_mixer.conv.weight"] = np.zeros(2, np.float32)
        state["stack.0.time_mixer.rev_cell.q.weight"] = (
            state["stack.0.time_mixer.fwd_cell.q.weight"] + 1
        )
        return state

    with pytest.raises(CheckpointError) as error:
        import_checkpoint(checkpoint(tmp_path, params, converter.published(CONFIG), change=change))
    for said in (
        "layer_1/slstm/z/kernel: missing in the checkpoint",
        "stack.0.time_mixer.conv.weight': no rule matches",
        "rev_cell.q.weight': differs from",
    ):
        assert said in str(error.value)


def test_without_a_config_the_published_sizes_are_known():
    """And the order of the layers is that of the tensors."""
    whole = TiRex2(TiRex2Config.of(512, ("slstm", "mlstm") * 6, embed_dim=2048))
    zeros = jax.tree.map(
        lambda s: np.broadcast_to(np.float32(0), s.shape), folders.param_shapes(whole)
    )
    state, _ = tables.to_state(converter.keys(whole.config), zeros)
    config, notes = converter.configure(state, None, "file")
    assert config == whole.config
    assert "whose config is taken" in notes[0]


def test_yaml_that_is_no_config_is_refused(params, tmp_path):
    state, _ = tables.to_state(converter.keys(CONFIG), params)
    write_torch(tmp_path / "model.ckpt", state)
    file = tmp_path / "model-config.yaml"
    for text, said in (
        ("a: &a [1, 2]\nb: *a\n", "it refers to parts of itself"),
        ("a: !!python/object/apply:os.system [ls]\n", "not readable YAML"),
        ("[" * 400, "not readable YAML"),
        ("{" * 501, "more than 500 lists"),
        ("a: b: c", "not readable YAML"),
        ("# " + "x" * 70_000, "more than 32 KB"),
        ("- 1\n- 2\n", "an object of hyper-parameters was expected"),
        ("1: 2\n? [3, 4]\n: 5\n", "not readable YAML"),
        ("1: 2\n2001-01-01: !!set {3}\n", "embedding_dim: missing"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            import_checkpoint(tmp_path)
    file.write_text(yaml.safe_dump(converter.published(CONFIG)))
    model, got, *_ = import_checkpoint(tmp_path)
    assert model == MODEL
    chex.assert_trees_all_equal(got, params)

    # config.json goes before it.
    (tmp_path / "config.json").write_text(
        json.dumps(converter.published(CONFIG) | {"tta_diff": False})
    )
    assert not import_checkpoint(tmp_path)[0].config.difference
