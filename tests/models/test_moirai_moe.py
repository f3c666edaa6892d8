"""Moirai-MoE beyond its original: sizes, routing, pruned experts, the roll-out, the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

from ltsm_jax import trees
from ltsm_jax.layers import packed
from ltsm_jax.layers.packed import observed_series
from ltsm_jax.models import folders
from ltsm_jax.models.moirai_moe import PRESETS, MoiraiMoe

MODEL = MoiraiMoe(MoiraiMoe.small())
# with the centroids, which the paper does not count: 117.0 and 935.1 million without
COUNTS = {
    "Salesforce/moirai-moe-1.0-R-small": 117_099_528,
    "Salesforce/moirai-moe-1.0-R-base": 935_361_504,
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def series(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape).cumsum(-1)


forward = jax.jit(lambda model, params, x: model.apply(params, x, 8), static_argnums=0)


def tokens(x, horizon=8):
    return packed.pack(observed_series(x), horizon, 8, 8)


def test_published_parameter_counts():
    for name, config in PRESETS.items():
        shapes = folders.param_shapes(MoiraiMoe(config))
        assert trees.count(shapes) == COUNTS[name]
        centroids = shapes["centroid"].size
        assert centroids == len(config.layers) * 32 * config.d_model


def test_tokens_go_to_the_two_farthest_centroids(params):
    _, taps = forward(MODEL, params, tokens(series(2, 1, 32)))
    for i in range(len(MODEL.config.layers)):
        gap = (
            np.asarray(taps[f"layer_{i}/norm2"])[:, :, None]
            - np.asarray(params["centroid"][i])[None, None]
        )
        distance = np.sqrt(np.square(gap).sum(-1))
        np.testing.assert_allclose(taps[f"layer_{i}/ffn/distance"], distance, rtol=1e-4, atol=1e-4)
        order = np.argsort(-distance, axis=-1)[..., :2]
        np.testing.assert_array_equal(taps[f"layer_{i}/ffn/experts"], order)
        far = np.take_along_axis(distance, order, -1)
        want = np.exp(far) / np.exp(far).sum(-1, keepdims=True)
        np.testing.assert_allclose(taps[f"layer_{i}/ffn/weights"], want, rtol=1e-3)


def test_a_pruned_layer_routes_among_the_experts_that_are_left(params):
    """Expert 1 of layer 0 away: as if its centroid were so near that nobody goes there."""
    kept = (0, 2, 3)
    small = MoiraiMoe(narrowed(MODEL.config, 0, experts={"ids": kept}))
    cut = jax.tree.map(lambda leaf: leaf, params)
    inner = cut["layer_0"]["ffn"]["experts"]
    cut["layer_0"]["ffn"]["experts"] = {
        name: leaf[jnp.asarray(kept)] for name, leaf in inner.items()
    }
    assert trees.flatten(folders.param_shapes(small))["layer_0/ffn/experts/up"].shape[0] == 3
    _, taps = forward(small, cut, tokens(series(2, 1, 32)))
    assert not (np.asarray(taps["layer_0/ffn/experts"]) == 1).any()
    _, all_taps = forward(MODEL, params, tokens(series(2, 1, 32)))
    same = ~(np.asarray(all_taps["layer_0/ffn/experts"]) == 1).any(-1)
    np.testing.assert_allclose(
        np.asarray(taps["layer_0/ffn"])[same],
        np.asarray(all_taps["layer_0/ffn"])[same],
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="at least 2 experts"):
        narrowed(MODEL.config, 0, experts={"ids": (0,)})


def test_the_future_is_not_seen(params):
    """Placeholders, and what stands in later tokens, change no distribution before them."""
    x = series(1, 2, 32)
    one = tokens(x, 16)
    other = dataclasses.replace(one, target=one.target.at[:, 8:].set(5.0))
    at = np.asarray([3, 7])
    run = jax.jit(lambda t: MODEL.apply(params, t, 8, only=at)[0].mean())
    np.testing.assert_array_equal(run(one), run(other))


@pytest.mark.slow
def test_the_first_patch_of_a_long_forecast_is_the_short_forecast(params):
    x = series(2, 2, 32)
    short, long = (jax.jit(lambda x, h=h: MODEL.predict(params, x, h))(x) for h in (8, 24))
    np.testing.assert_allclose(long.samples[:, :, :8], short.samples, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_loss_is_the_packed_loss_of_the_same_tokens(params):
    x = series(2, 1, 48)
    context, target = x[..., :32], x[..., 32:].at[0, 0, 3].set(jnp.nan)
    packed_tokens = packed.pack(observed_series(context), 16, 8, 8, future=observed_series(target))
    want = jax.jit(lambda p, x: MODEL.packed_loss(p, x, 8))(params, packed_tokens)
    got = jax.jit(MODEL.loss)(params, {"context": context, "target": target})
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_centroids_are_data(params):
    x = series(2, 1, 40)
    grads = jax.jit(
        jax.grad(lambda p: MODEL.loss(p, {"context": x[..., :32], "target": x[..., 32:]}))
    )(params)
    assert not np.asarray(grads["centroid"]).any()
    assert trees.select(params, MODEL.fixed)["centroid"]
