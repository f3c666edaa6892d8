"""MOMENT's own promises: sizes of the published models, heads, windows, masks, roll-outs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.methods import phases, starts, strategies
from ltsm_jax.models import folders
from ltsm_jax.models.moment import PRESETS, Moment, random_mask, standardised
from ltsm_jax.tasks import anomaly, imputation

KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def moment():
    """A small MOMENT whose every parameter does something: (model, params)."""
    model = Moment(Moment.small())
    params = jax.jit(model.init)(KEY)
    return model, params | {"mask_embed": jax.random.normal(KEY, params["mask_embed"].shape)}


@pytest.fixture(scope="module")
def forecaster(moment):
    return moment[0].with_head(moment[1], "forecasting", KEY, horizon=5)


def series(b, c, t, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(b, c, t)).cumsum(-1), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def predict(model, params, x, horizon):
    return model.predict(params, x, horizon).point


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("small", 37_901_512),
        ("base", 113_481_608),
        pytest.param("large", 346_368_520, marks=pytest.mark.slow),
    ],
)
def test_published_sizes(name, n):
    """The hub's counts (37.9, 113 and 346 M) hold the position table, and the token embedding that
    nothing uses.
    """
    model = Moment(PRESETS[f"AutonLab/MOMENT-1-{name}"])
    assert (
        trees.count(folders.param_shapes(model)) + model.config.vocab_size * model.config.d_model
        == n
    )


def test_scale_by_hand():
    x = jnp.asarray([[[1.0, 3.0, jnp.nan, 100.0]]])
    z, mean, std = standardised(x, jnp.asarray([[[1.0, 1.0, 1.0, 0.0]]]))
    assert mean.item() == 2 and std.item() == pytest.approx(1 + 1e-5)
    np.testing.assert_allclose(z[0, 0], [-1, 1, 0, 98], rtol=1e-4)
    z, _, std = standardised(jnp.full((1, 1, 4), 3.0), jnp.ones((1, 1, 4)))
    assert not z.any() and std.item() == np.float32(1e-5)


def test_random_masks_hide_a_share_of_the_patches_of_data():
    data = jnp.ones((50, 1, 80)).at[:25, :, :21].set(0)
    mask = np.asarray(jax.jit(random_mask, static_argnums=(2, 3))(KEY, data, 0.3, 8)).reshape(
        50, 10, 8
    )
    assert (mask == mask[..., :1]).all(), "whole patches"
    kept = mask[..., 0].sum(-1)
    assert (kept[25:] == 7).all() and (kept[:25] == np.ceil(0.7 * 7)).all()
    assert not mask[:25, :3].any(), "what padding touches is hidden too"
    assert len(np.unique(np.asarray(mask[25:, :, 0]), axis=0)) > 15


def test_short_and_long_contexts(moment):
    model, params = moment
    x = series(2, 1, 3 * model.context_len)
    np.testing.assert_array_equal(model.window(x)[0], x[..., -model.context_len :])
    # 20 steps are padded with zeros that are not looked at
    short = x[..., -20:]
    padded, data = model.window(short)
    assert padded.shape[-1] == model.context_len and data.sum() == 2 * 20
    np.testing.assert_array_equal(padded[..., -20:], short)
    other, _ = jax.jit(model.short_forecast, static_argnums=2)(
        params, jnp.where(data == 0, 1e3 * padded[..., -1:], padded), 5, data
    )
    np.testing.assert_allclose(predict(model, params, short, 5), other, rtol=1e-5, atol=1e-5)
    # less than a patch is filled up with its first value
    padded, data = model.window(x[..., -3:])
    assert data.sum() == 2 * model.config.patch_len
    np.testing.assert_array_equal(padded[..., -8:-2], jnp.broadcast_to(x[..., -3:-2], (2, 1, 6)))


def test_variates_do_not_see_each_other(moment):
    model, params = moment
    x = series(1, 3, model.context_len)
    apart = predict(model, params, x.reshape(3, 1, -1), 5)
    np.testing.assert_allclose(
        predict(model, params, x, 5).reshape(3, 1, 5), apart, rtol=1e-5, atol=1e-5
    )


def test_long_horizons_are_rolled_out_in_equal_passes(moment, forecaster):
    model, params = moment
    assert model.horizon == model.context_len // 2 == 32
    x = series(2, 1, model.context_len)
    found = predict(model, params, x, 45)  # two passes of 24 steps
    first = predict(model, params, x, 24)
    second = predict(model, params, jnp.concatenate([x, first], -1)[..., -64:], 24)[..., :21]
    np.testing.assert_allclose(found, jnp.concatenate([first, second], -1), rtol=1e-4, atol=1e-4)

    model, params = forecaster
    found = predict(model, params, x, 7)
    first = predict(model, params, x, 5)
    second = predict(model, params, jnp.concatenate([x, first], -1)[..., -64:], 5)[..., :2]
    np.testing.assert_allclose(found, jnp.concatenate([first, second], -1), rtol=1e-4, atol=1e-4)


def test_heads_are_asked_for_by_name(moment, forecaster):
    model, params = moment
    x = series(2, 3, model.context_len)
    with pytest.raises(
        ValueError, match=r'classification head.*with_head\(params, "classification".*n_classes'
    ):
        model.classify(params, x)
    for call in (forecaster[0].impute, lambda p, x, _: forecaster[0].reconstruct(p, x)):
        with pytest.raises(
            ValueError, match="needs the reconstruction head; this MOMENT has the forecasting head"
        ):
            call(forecaster[1], x, jnp.ones_like(x))
    classifier, tuned = model.with_head(params, "classification", KEY, n_classes=4, n_variates=3)
    with pytest.raises(ValueError, match="reads 3 variates, the series have 2"):
        jax.eval_shape(classifier.classify, tuned, x[:, :2])
    with pytest.raises(
        ValueError, match=r'forecast needs.*with_head\(params, "forecasting", key, horizon'
    ):
        classifier.predict(tuned, x, 3)
    with pytest.raises(ValueError, match="not 'survival'"):
        model.with_head(params, "survival", KEY)
    with pytest.raises(ValueError, match="forecasting head has no n_classes"):
        model.with_head(params, "forecasting", KEY, horizon=3, n_classes=2)
    with pytest.raises(ValueError, match="needs horizon"):
        model.with_head(params, "forecasting", KEY)
    with pytest.raises(ValueError, match="needs n_variates"):
        model.with_head(params, "classification", KEY, n_classes=2)


def test_a_new_head_leaves_the_body_alone(moment, forecaster):
    model, params = moment
    classifier, tuned = model.with_head(params, "classification", KEY, n_classes=4, n_variates=3)
    for new_model, new in ((classifier, tuned), forecaster):
        trees.require_same(folders.param_shapes(new_model), new)
        assert (
            new["encoder"] is params["encoder"]
            and new["position_table"] is params["position_table"]
        )
        assert new_model.recipe().trainable == "^head/"
    x = series(2, 3, model.context_len)
    embed = jax.jit(model.embed)
    assert embed(params, x).shape == (2, model.config.d_model)
    np.testing.assert_array_equal(jax.jit(classifier.embed)(tuned, x), embed(params, x))
    back, again = classifier.with_head(tuned, "reconstruction", KEY)
    assert back == model and jax.tree.structure(again) == jax.tree.structure(params)


def test_classification_loss_counts_rows_by_weight(moment):
    model, params = moment
    model, params = model.with_head(params, "classification", KEY, n_classes=4, reduction="mean")
    batch = {"context": series(3, 2, 50), "label": jnp.asarray([0, 3, 1])}
    loss = jax.jit(model.loss)
    logits = np.asarray(jax.jit(model.classify)(params, batch["context"]), np.float64)
    each = np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), [0, 3, 1]]
    np.testing.assert_allclose(loss(params, batch), each.mean(), rtol=1e-5)
    weighed = loss(params, batch | {"weight": jnp.asarray([1.0, 1, 0])})
    np.testing.assert_allclose(weighed, each[:2].mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="label"):
        model.loss(params, {"context": batch["context"]})


def test_pretraining_loss_scores_known_hidden_steps_only(moment):
    model, params = moment
    x = series(2, 1, model.context_len)
    data, mask = jnp.ones_like(x), jnp.ones_like(x).at[..., 16:24].set(0)
    loss = jax.jit(model.masked_loss)
    y = jax.jit(lambda x: model.apply(params, x, data, mask)[0])(x)
    want = jnp.square(y - x)[..., 16:24].mean()
    np.testing.assert_allclose(loss(params, {"context": x}, data, mask), want, rtol=1e-5)
    gap = x.at[..., 18].set(jnp.nan)
    known = jnp.square(y - x)[
        ..., jnp.asarray([16, 17, 19, 20, 21, 22, 23])
    ]  # hidden: the NaN changes nothing else
    np.testing.assert_allclose(loss(params, {"context": gap}, data, mask), known.mean(), rtol=1e-5)


def test_the_position_table_is_used_and_stays(moment):
    model, params = moment
    x = series(1, 1, model.context_len)
    moved = params | {"position_table": params["position_table"][::-1]}
    assert not np.allclose(predict(model, params, x, 5), predict(model, moved, x, 5), rtol=1e-3)
    batch = {"context": x, "target": x[..., :5]}
    grads = jax.jit(jax.grad(lambda p: model.loss(p, batch, KEY)))(params)
    assert not grads["position_table"].any() and grads["mask_embed"].any()
    start = starts.start_params(strategies.sff(0.3), model, moved, KEY)
    np.testing.assert_array_equal(start["position_table"], moved["position_table"])
    mask = phases.trainable_mask(phases.Phase("all"), model, params)
    assert mask and not mask["position_table"] and mask["mask_embed"]


@pytest.mark.slow
def test_imputation_of_variates_lengths_and_gaps(moment):
    model, params = moment
    impute = jax.jit(model.impute)
    x = series(2, 2, model.context_len)
    observed = jnp.ones_like(x).at[0, 0, 8:24].set(0).at[1, 1, 40:48].set(0)
    y = impute(params, jnp.where(observed == 0, jnp.nan, x), observed)
    assert y.shape == x.shape and np.isfinite(y).all()
    np.testing.assert_allclose(
        impute(params, jnp.where(observed == 0, 1e6, x), observed), y, rtol=1e-4, atol=1e-4
    )
    # hidden points of one variate are no matter of the other
    alone = impute(params, x[1:, 1:], observed[1:, 1:])
    np.testing.assert_allclose(y[1:, 1:], alone, rtol=1e-4, atol=1e-4)
    # 70 steps: the newest window, and before it what the one before says
    longer = jnp.concatenate([x[..., :6] + 1, x], -1)
    seen = jnp.concatenate([jnp.ones_like(x[..., :6]), observed], -1)
    found = impute(params, longer, seen)
    np.testing.assert_allclose(found[..., 6:], y, rtol=1e-4, atol=1e-4)
    before = impute(params, longer[..., :64], seen[..., :64])
    np.testing.assert_allclose(found[..., :6], before[..., :6], rtol=1e-4, atol=1e-4)
    assert impute(params, x[..., :13], observed[..., :13]).shape == (2, 2, 13)
    assert np.isfinite(impute(params, x[..., :3], jnp.zeros_like(x[..., :3]))).all(), (
        "nothing to see"
    )


def test_the_tasks_take_it(moment):
    model, params = moment
    x = series(2, 1, 48)
    loss = jax.jit(imputation.loss_fn(model), static_argnums=3)
    assert np.isfinite(loss(params, {"context": x}, KEY, True))
    window = series(1, 1, anomaly.WINDOW)
    parts = {"context": window[..., : -anomaly.TOKEN], "target": window[..., -anomaly.TOKEN :]}
    assert np.isfinite(
        jax.jit(anomaly.loss_fn(model), static_argnums=3)(params, parts, None, False)
    )
    assert jax.eval_shape(model.reconstruct, params, window).shape == window.shape


def test_bfloat16_products(moment):
    model, params = moment
    x = series(2, 1, model.context_len)

    @jax.jit
    def run(params, x):
        return Runtime(compute="bfloat16").call(model.predict, params, x, 5).point

    np.testing.assert_allclose(run(params, x), predict(model, params, x, 5), rtol=0.2, atol=0.2)
