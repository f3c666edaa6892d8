"""Multi-scale fine-tuning: where it begins, what it trains, how it is kept, and who cannot
have it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltsm_jax
from converters import moirai as converter
from ltsm_jax import trees
from ltsm_jax.data import Series, prepare
from ltsm_jax.layers import multiscale
from ltsm_jax.layers.multiscale import MultiScale
from ltsm_jax.layers.packed import observed_series
from ltsm_jax.methods import verdict
from ltsm_jax.methods.run import run
from ltsm_jax.methods.strategies import msft, strategy
from ltsm_jax.models import FAMILIES
from ltsm_jax.models.moirai import Moirai
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.training import TrainConfig

MODEL = Moirai(Moirai.small())
HOW = MultiScale(further=2, rank=4)
HORIZON = 9


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def scaled(params):
    """The model with two further scales: (model, params)."""
    return MODEL.with_scales(params, HOW, jax.random.key(1))


def walks(*shape, seed=0):
    """Random walks with a gap, and two steps missing at the front of one."""
    x = np.random.default_rng(seed).normal(size=shape).cumsum(-1).astype(np.float32)
    x[0, 0, :2] = np.nan
    x[-1, -1, 11:14] = np.nan
    return x


def new_parts(scaled, params):
    return sorted(set(trees.flatten(scaled[1])) - set(trees.flatten(params)))


def test_a_scale_averages_what_is_observed():
    x = observed_series(np.array([[[5.0, 1.0, 3.0, np.nan, np.nan, np.nan, 8.0]]]))
    past, known = multiscale.pooled(x, 2, before=True)
    np.testing.assert_array_equal(past, [[[5.0, 2.0, 0.0, 8.0]]])
    np.testing.assert_array_equal(known, [[[True, True, False, True]]])
    future, known = multiscale.pooled(x, 4, before=False)
    np.testing.assert_array_equal(future, [[[3.0, 8.0]]])
    assert known.all()


def test_tokens_of_the_same_steps_belong_together():
    """Of two variates, 5 + 3 steps in patches of 2: counted from where the future begins."""
    past = observed_series(np.zeros((1, 2, 5)))
    tokens, layout = multiscale.pack_scales(past, 3, 2, 2, MultiScale(further=1))
    assert layout.first == 2 * 3 + 2 * 2 and layout.futures == (4, 2)
    assert [len(place) for place in layout.places] == [2 * 3 + 4, 2 * 2 + 2]
    np.testing.assert_array_equal(layout.parents[0], [0, 1, 1, 2, 3, 3, 4, 4, 5, 5])
    np.testing.assert_array_equal(multiscale.scale_index(tokens)[0, layout.places[1]], np.ones(6))
    np.testing.assert_array_equal(tokens.variate_id[0, layout.places[1]], [0, 0, 1, 1, 0, 1])
    assert (
        np.asarray(tokens.predicted)[0, layout.first :].all()
        and not np.asarray(tokens.predicted)[0, : layout.first].any()
    )


@pytest.mark.slow
def test_each_scale_begins_as_the_checkpoint_on_that_scale(params, scaled):
    model, new = scaled
    past = observed_series(walks(2, 2, 30))
    parts = jax.jit(lambda p, x: model.scaled_future(p, x, HORIZON, 8))(new, past)
    assert [part.loc.shape for part in parts] == [(2, 2, 9), (2, 2, 5), (2, 2, 3)]
    for s, part in enumerate(parts):
        own, steps = multiscale.pooled(past, 2**s, before=True), part.loc.shape[-1]
        want = jax.jit(lambda p, x, steps=steps: MODEL.future(p, x, steps, 8))(params, own)
        for got, there in zip(jax.tree.leaves(part), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, there, rtol=2e-5, atol=2e-5)
    mix = multiscale.mixed(new["scale_weights"], parts, HORIZON)
    means = [np.repeat(part.mean(), 2**s, -1)[..., :HORIZON] for s, part in enumerate(parts)]
    np.testing.assert_allclose(mix.mean(), np.mean(means, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_samples_are_of_the_mixture(scaled):
    model, new = scaled
    new = new | {"scale_weights": jnp.asarray([0.0, 1.0, -40.0])}
    parts = jax.jit(lambda p, x: model.scaled_future(p, x, HORIZON, 8))(
        new, observed_series(walks(1, 1, 30))
    )
    mix = multiscale.mixed(new["scale_weights"], parts, HORIZON)
    keys = jax.random.split(jax.random.key(3), 1)
    found = jax.jit(lambda keys: mix.sample(keys, 4000))(keys)
    # The share of paths of a scale is its weight: of means, and so of every interval.
    level = np.asarray(jnp.quantile(found, 0.3, axis=-1))[..., None]
    apart = [jax.jit(lambda keys, part=part: part.sample(keys, 4000))(keys) for part in mix.parts]
    below = [float((np.asarray(draws) < level).mean()) for draws in apart]
    shares = np.asarray(mix.weights[0])
    np.testing.assert_allclose(
        shares, np.exp([0, 1, -40]) / np.exp([0, 1]).sum(), rtol=1e-5, atol=1e-12
    )
    assert float((np.asarray(found) < level).mean()) == pytest.approx(
        float(shares @ below), abs=0.02
    )


@pytest.mark.slow
def test_every_new_part_has_a_gradient(params, scaled):
    model, new = scaled
    batch = {"context": walks(2, 2, 30), "target": walks(2, 2, HORIZON + 6, seed=1)[..., :HORIZON]}
    gradient = jax.jit(jax.grad(lambda p: model.loss(p, batch)))
    flat = trees.flatten(gradient(new))
    fresh = new_parts(scaled, params)
    waiting = [path for path in fresh if not np.asarray(flat[path]).any()]
    # As with any adapter of low rank, the outer factor moves first.
    assert waiting == [path for path in fresh if path.endswith("/a")]
    moved = trees.flatten(new)
    for path in fresh:
        if path.endswith("/b"):
            moved[path] = moved[path] + 0.1
    flat = trees.flatten(gradient(trees.unflatten(moved)))
    assert all(np.asarray(flat[path]).any() for path in fresh)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in flat.values())


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [8, "auto"])
def test_a_few_steps_lower_the_loss_and_come_back_from_disk(params, tmp_path, patch_size):
    model = Moirai(dataclasses.replace(MODEL.config, patch_size=patch_size, variates="independent"))
    t, rng = np.arange(400), np.random.default_rng(0)
    values = np.stack(
        [np.sin(2 * np.pi * t / (12 + c)) + 0.1 * rng.normal(size=400) for c in range(2)]
    )
    series = Series("waves", values, ("a", "b"), None, None)
    splits = prepare(series, model.context_len, model.horizon)
    config = TrainConfig(epochs=2, batch_size=64, lr=3e-3, schedule="constant")
    found = ltsm_jax.fit(
        model,
        params,
        splits,
        method=msft(2, rank=4),
        config=config,
        keep="tuned",
        show_progress=False,
    )
    losses = [entry["train_loss"] for entry in found.result.history]
    assert losses[1] < losses[0]
    assert found.model.config.multiscale == HOW and found.tuned["mse"] == found.result.val["mse"]

    begin = trees.flatten(model.with_scales(params, HOW, jax.random.key(1))[1])
    tuned = trees.flatten(found.params)
    old = {
        path
        for path in trees.flatten(params)
        if (np.asarray(tuned[path]) != np.asarray(begin[path])).any()
    }
    assert old and not [
        path for path in old if "/ffn/" in path or ("kernel" in path and "head/" not in path)
    ]
    assert all(np.asarray(tuned[path]).any() for path in set(begin) - set(trees.flatten(params)))

    ltsm_jax.save(tmp_path / "tuned", found.model, found.params)
    again, loaded = ltsm_jax.load(str(tmp_path / "tuned"))
    assert again == found.model
    context = walks(2, 1, 40)
    one, other = (
        jax.jit(m.predict, static_argnums=2)(p, context, 8)
        for m, p in ((found.model, found.params), (again, loaded))
    )
    np.testing.assert_array_equal(one.samples, other.samples)
    assert np.isfinite(one.point).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_takes_further_scales_or_says_that_it_does_not(name):
    model = FAMILIES[name](FAMILIES[name].small())
    if model.scalable is None:
        with pytest.raises(ValueError, match="cannot be fine-tuned at several scales"):
            model.with_scales({}, HOW, jax.random.key(0))
    else:
        old, new = jax.eval_shape(
            lambda key: (p := model.init(key), model.with_scales(p, HOW, key)[1]), jax.random.key(0)
        )
        added = set(trees.flatten(new)) - set(trees.flatten(old))
        chosen = trees.flatten(trees.select(new, model.scalable))
        assert added and all(chosen[path] for path in added)


def test_what_it_cannot_do_is_refused(model, pre, splits, params, scaled):
    with pytest.raises(ValueError, match="timer cannot be fine-tuned at several scales"):
        run(model, pre, strategy("msft"), splits, task=Forecasting())
    with pytest.raises(ValueError, match="1 to 8 further scales"):
        msft(0)
    with pytest.raises(ValueError, match="at least 1 scale"):
        strategy("msft", scales=0)
    with pytest.raises(ValueError, match="has further scales already"):
        scaled[0].with_scales(scaled[1], HOW, jax.random.key(0))
    with pytest.raises(ValueError, match="can't be exported"):
        converter.published(scaled[0].config)
    with pytest.raises(ValueError, match=r"tune by ltsm_jax.fit"):
        verdict.named("msft", MODEL)
    with pytest.raises(ValueError, match="no masks for"):
        run(MODEL, params, strategy("msft"), splits, masks={})
    with pytest.raises(ValueError, match="1 to 8 further scales"):
        Moirai.config_from_dict(
            scaled[0].config_to_dict() | {"multiscale": {"further": 90, "rank": 4}}
        )
