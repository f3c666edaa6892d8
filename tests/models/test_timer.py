"""Timer beyond its original: contexts of any length, missing values, scales,
invariances, configs.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

import ltsm_jax
from ltsm_jax import storage, trees
from ltsm_jax.layers.missing import fill_missing
from ltsm_jax.models import Model, folders
from ltsm_jax.models.timer import Timer, TimerConfig

MODEL = Timer(TimerConfig.of(8, 16, 32, 2, 4, context_len=56, horizon=8))
predict = jax.jit(MODEL.predict, static_argnums=2)
apply = jax.jit(MODEL.apply)
loss = jax.jit(MODEL.loss, static_argnums=3)
point_loss = jax.jit(MODEL.point_loss)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def test_fresh_parameters_are_the_same_inside_jit_and_outside(params):
    """Outside, the draws are cut on the host; inside, by the compiled program."""
    inside = jax.jit(MODEL.init)(jax.random.key(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    chex.assert_trees_all_close(inside, params, rtol=1e-6, atol=1e-8)


def series(b=2, c=3, t=56, seed=1):
    noise = np.random.default_rng(seed).normal(size=(b, c, t))
    return noise.cumsum(-1).astype(np.float32)


LENGTHS, HORIZONS = (1, 3, 8, 50, 56, 500), (1, 7, 8, 9, 96)
# Every length and every horizon, and the corners; each pair is a program of its own, so the others
# are for `make slow`.
DAILY = {(1, 1), (3, 7), (8, 8), (50, 9), (56, 7), (500, 96), (1, 96), (500, 1)}
PAIRS = [
    pytest.param(length, horizon, marks=() if (length, horizon) in DAILY else slow)
    for length in LENGTHS
    for horizon in HORIZONS
]


@pytest.mark.parametrize("length, horizon", PAIRS)
def test_any_context_and_horizon(params, length, horizon):
    forecast = predict(params, series(t=length), horizon)
    assert forecast.point.shape == (2, 3, horizon) and np.isfinite(forecast.point).all()


def test_longer_horizons_begin_with_the_shorter_ones(params):
    x = series()
    np.testing.assert_allclose(
        predict(params, x, 30).point[..., :5], predict(params, x, 5).point, rtol=1e-5, atol=1e-5
    )


def test_a_context_past_the_trained_length_is_cut_to_its_newest_part(params):
    x = series(t=200)
    np.testing.assert_array_equal(
        predict(params, x, 8).point, predict(params, x[..., -56:], 8).point
    )
    np.testing.assert_array_equal(
        predict(params, x[..., -50:], 8).point, predict(params, x[..., -48:], 8).point
    )


@pytest.mark.parametrize("holes", [slice(20, 23), slice(0, 9), slice(40, 56), slice(0, 55)])
def test_missing_values_take_the_last_value_before_them(params, holes):
    x = series()
    x[..., holes] = np.nan
    got = predict(params, x, 8).point
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, predict(params, np.asarray(fill_missing(x)), 8).point)


def test_filling():
    x = jnp.array([[jnp.nan, 1.0, jnp.nan, jnp.nan, 2.0, jnp.nan], [jnp.nan] * 6])
    np.testing.assert_array_equal(fill_missing(x), [[1, 1, 1, 1, 2, 2], [0] * 6])


def test_what_cannot_be_forecast_is_a_clear_error(params):
    x = series()
    x[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"no observed value.*\[\[1, 2\]\]"):
        MODEL.predict(params, x, 8)
    x = series()
    x[0, 1, 3] = np.inf
    with pytest.raises(ValueError, match=r"infinite.*\[\[0, 1\]\]"):
        MODEL.predict(params, x, 8)
    with pytest.raises(ValueError, match=r"\[batch, variates, time\].*horizon must be at least 1"):
        MODEL.predict(params, series()[0], 0)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e8])
def test_scales(params, scale):
    assert np.isfinite(predict(params, series() * scale, 20).point).all()
    # what lies well above the eps of the instance scale is equivariant
    if scale >= 1e4:
        want = np.asarray(predict(params, series() * 1e3, 8).point)
        np.testing.assert_allclose(
            predict(params, series() * scale, 8).point, want * (scale / 1e3), rtol=2e-3
        )


def test_constant_series(params):
    x = np.full((1, 1, 56), 3.5, np.float32)
    got = predict(params, x, 8).point
    assert np.isfinite(got).all() and np.abs(got - 3.5).max() < 0.1  # std is sqrt(eps) = 0.003


@pytest.mark.parametrize("b, c", [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_series_do_not_see_one_another(params, b, c):
    x = series(b, c)
    together = predict(params, x, 8).point
    alone = predict(params, x[-1:, -1:], 8).point
    np.testing.assert_allclose(together[-1:, -1:], alone, rtol=1e-4, atol=1e-5)


def test_tokens_see_only_what_lies_before_them(params):
    x = series()
    # the instance scale sees everything, so change the future in a way that keeps mean and variance
    y = x.copy()
    y[..., 40:48], y[..., 48:56] = x[..., 48:56], x[..., 40:48]
    a, b = apply(params, x)[0], apply(params, y)[0]
    np.testing.assert_allclose(a[..., :40], b[..., :40], rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(a - b)[..., 40:]).max() > 1e-3


@pytest.mark.slow
def test_direct_loss_is_the_error_of_predict_and_rows_count_by_weight(params):
    batch = {"context": jnp.asarray(series(b=4)), "target": jnp.asarray(series(b=4, t=5, seed=2))}
    point = predict(params, batch["context"], 5).point
    np.testing.assert_allclose(
        point_loss(params, batch), np.square(point - batch["target"]).mean(), rtol=1e-5
    )
    whole = dict(batch, target=jnp.asarray(series(b=4, t=8, seed=2)))
    for loss_of in (loss, point_loss):
        half = {name: value[:2] for name, value in whole.items()}
        weighted = dict(whole, weight=jnp.array([1.0, 1.0, 0.0, 0.0]))
        np.testing.assert_allclose(loss_of(params, weighted), loss_of(params, half), rtol=1e-6)


def test_absolute_loss_is_the_mean_over_all_tokens_and_skips_missing_targets(params):
    x = np.random.default_rng(4).normal(size=(2, 1, 40)).astype(np.float32)
    batch = {"context": jnp.asarray(x[..., :32]), "target": jnp.asarray(x[..., 32:])}
    y, _ = MODEL.apply(params, batch["context"])
    gap = np.abs(np.asarray(y) - x[..., 8:])
    np.testing.assert_allclose(MODEL.absolute_loss(params, batch), gap.mean(), rtol=1e-5)
    batch["target"] = batch["target"].at[0, 0, 3].set(jnp.nan)
    gap[0, 0, 24 + 3] = np.nan
    np.testing.assert_allclose(MODEL.absolute_loss(params, batch), np.nanmean(gap), rtol=1e-5)
    # the default of a family, which this one replaces: of the forecast alone
    of_forecast = Model.absolute_loss(MODEL, params, batch)
    np.testing.assert_allclose(of_forecast, np.nanmean(gap[..., -8:]), rtol=1e-5)


def test_losses_refuse_lengths_they_cannot_serve(params):
    with pytest.raises(ValueError, match="whole patches"):
        MODEL.loss(params, {"context": jnp.zeros((1, 1, 50)), "target": jnp.zeros((1, 1, 8))})
    with pytest.raises(ValueError, match="next-token loss"):
        MODEL.point_loss(params, {"context": jnp.zeros((1, 1, 56)), "target": jnp.zeros((1, 1, 9))})


def test_dropout_acts_in_training_only(params):
    batch = {"context": jnp.asarray(series()), "target": jnp.asarray(series(t=8, seed=2))}
    still = loss(params, batch)
    assert loss(params, batch, jax.random.key(0), False) == still
    one, two = (loss(params, batch, jax.random.key(i), True) for i in (0, 1))
    assert one != two and one != still
    assert loss(params, batch, jax.random.key(0), True) == one


def test_a_pruned_timer_is_a_timer():
    cfg = narrowed(MODEL.config, 1, attn={"heads": 1}, ffn=5)
    params = Timer(cfg).init(jax.random.key(0))
    assert params["layer_1"]["attn"]["q"]["kernel"].shape == (16, 1, 4) and params["layer_1"]["up"][
        "kernel"
    ].shape == (
        16,
        5,
    )
    smaller = jax.jit(Timer(cfg).predict, static_argnums=2)
    assert smaller(params, series(), 8).point.shape == (2, 3, 8)


def test_config_lists_all_its_problems():
    with pytest.raises(ValueError) as info:
        TimerConfig(8, 15, 4, (), context_len=4, horizon=9, activation="swish")
    for word in ("at least one layer", "even", "one patch (8)", "horizon cannot be 9", "swish"):
        assert word in str(info.value)
    with pytest.raises(ValueError, match="e_layers, n_heads"):
        TimerConfig.from_published({"patch_len": 8, "d_model": 16, "d_ff": 32})


def test_folder_round_trip(tmp_path, params):
    folders.save(
        tmp_path / "m",
        MODEL,
        params,
        provenance={"source": "here"},
        buffers={"t": np.ones(3, np.float32)},
    )
    model, again = ltsm_jax.load(tmp_path / "m")
    assert model == MODEL
    chex.assert_trees_all_equal(again, params)
    assert folders.read_config(tmp_path / "m")[1]["provenance"] == {"source": "here"}
    np.testing.assert_array_equal(folders.read_buffers(tmp_path / "m")["t"], np.ones(3))
    with pytest.raises(FileExistsError):
        ltsm_jax.save(tmp_path / "m", MODEL, params)


def test_saving_params_of_another_model_is_refused(tmp_path, params):
    wider = Timer(TimerConfig.of(8, 16, 64, 2, 4, context_len=56, horizon=8))
    with pytest.raises(ValueError, match="layer_1/up/kernel"):
        ltsm_jax.save(tmp_path / "m", wider, params)
    assert list(tmp_path.iterdir()) == []


def test_loading_what_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"timer-tiny"):
        ltsm_jax.load("timer-tinny")
    with pytest.raises(FileNotFoundError, match=r"published preset.*ltsm_jax.preset"):
        ltsm_jax.load("Timer_forecast_1.0")
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        ltsm_jax.load(tmp_path)


def test_a_published_preset_is_read_from_the_cache(tmp_path, monkeypatch, params):
    from converters import export_checkpoint
    from ltsm_jax.models import timer

    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(timer.PRESETS, "Timer_test_1.0", MODEL.config)
    with pytest.raises(FileNotFoundError, match=r"cache/models/Timer_test_1.0.ckpt"):
        ltsm_jax.load("Timer_test_1.0")
    ltsm_jax.save(tmp_path / "m", MODEL, params)
    export_checkpoint(tmp_path / "m", tmp_path / "cache" / "models" / "Timer_test_1.0.ckpt")
    for source in ("Timer_test_1.0", tmp_path / "cache" / "models"):
        model, again = ltsm_jax.load(source)
        assert model == MODEL
        chex.assert_trees_all_equal(again, params)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"family": "timer"}', '{"family": "nobody", "config": {}}', "[1]"]
)
def test_damaged_config_is_one_clear_error(tmp_path, params, text):
    folders.save(tmp_path / "m", MODEL, params)
    (tmp_path / "m" / folders.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"config.json"):
        ltsm_jax.load(tmp_path / "m")


def test_config_of_another_size_is_refused_by_path(tmp_path, params):
    folders.save(tmp_path / "m", MODEL, params)
    file = tmp_path / "m" / folders.CONFIG
    record = storage.read_record(file)
    record["config"] |= {"patch_len": 7, "horizon": 7}
    storage.write_record(file, record)
    with pytest.raises(ValueError, match="embed/kernel"):
        ltsm_jax.load(tmp_path / "m")


def test_shard_rules_cover_every_parameter(params):
    import re

    for path, leaf in trees.flatten(params).items():
        rules = [spec for pattern, spec in MODEL.shard_rules if re.search(pattern, path)]
        assert rules, path
        assert len(rules[0]) in (0, leaf.ndim), path


@pytest.mark.slow
def test_the_advice_of_the_losses_can_be_followed():
    params = jax.jit(MODEL.init)(jax.random.key(0))
    steps = lambda t, h: {"context": jnp.ones((1, 1, t)), "target": jnp.ones((1, 1, h))}  # noqa: E731
    with pytest.raises(ValueError, match="got 60 steps: take 56$"):
        MODEL.loss(params, steps(60, 8))
    with pytest.raises(
        ValueError, match=r"got 7 steps: take 8, or the direct loss \(mode='direct'\)"
    ):
        MODEL.loss(params, steps(56, 7))
    with pytest.raises(
        ValueError, match=r"take a shorter target, or the next-token loss \(mode='ims'\)"
    ):
        MODEL.point_loss(params, steps(60, 9))
    for loss, sizes in (
        (MODEL.loss, (56, 8)),
        (MODEL.point_loss, (56, 7)),
        (MODEL.point_loss, (60, 8)),
    ):
        assert jax.eval_shape(loss, params, steps(*sizes)).shape == ()
