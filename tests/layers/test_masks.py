"""Masks from outside: a masked model is the model with masked weights, in every family."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.layers import masks as layer_masks
from ltsm_jax.methods.pruning import apply_masks, full_masks, masked
from ltsm_jax.models import FAMILIES

# post-norm with GELU, SwiGLU with experts; T5 with ReLU, mixers and the others take longer to
# compile
QUICK = ("timer", "time_moe")
FAMILY = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]


def ready(name):
    model = FAMILIES[name](FAMILIES[name].small())
    params = jax.jit(model.init)(jax.random.key(1))
    return model.for_series(params, n_variates=2, freq="h", key=jax.random.key(2))


def a_batch(model, b=2, seed=0):
    c = 2 if model.variates == "joint" else 1
    x = (
        np.random.default_rng(seed)
        .normal(size=(b, c, model.context_len + model.horizon))
        .cumsum(-1)
        .astype(np.float32)
    )
    return {
        "context": jnp.asarray(x[..., : model.context_len]),
        "target": jnp.asarray(x[..., model.context_len :]),
    }


def at_random(masks, share=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape) >= share, jnp.float32), masks)


@pytest.mark.parametrize("name", FAMILY)
def test_a_masked_model_is_the_model_with_masked_weights(name):
    model, params = ready(name)
    batch, ones = a_batch(model), full_masks(model)
    # larger than many an initialisation, for which the blocks hardly matter
    noise = jax.tree.map(
        lambda x: 0.2 * np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype), params
    )
    params = jax.tree.map(jnp.add, params, noise)

    @jax.jit
    def losses(params, masks):
        with masked(masks):
            under = model.loss(params, batch)
        # T5's attention goes a shorter way for few queries, which rounds differently, unless its
        # linears are watched
        with masked({}):
            return model.loss(apply_masks(params, masks), batch), under

    chex.assert_trees_all_equal(apply_masks(params, ones), params)
    whole, under = losses(params, ones)
    np.testing.assert_array_equal(under, whole)
    merged, under = losses(params, at_random(ones))
    np.testing.assert_allclose(under, merged, rtol=2e-6)
    assert abs(merged - whole) > 1e-3 * abs(whole), "these masks must matter"


def test_masked_weights_have_no_gradient():
    model = FAMILIES["time_moe"](FAMILIES["time_moe"].small())
    some = at_random(full_masks(model))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    grad = trees.flatten(
        jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(apply_masks(p, some)))))(params)
    )
    m = some["layer_0"]["mixture"]["experts"]["up"]
    expected = np.asarray(m["in"])[:, :, None] * np.asarray(m["out"])[:, None, :]
    np.testing.assert_array_equal(grad["layer_0/mixture/experts/up"], expected)
    m = some["layer_1"]["attn"]["out"]
    expected = np.asarray(m["in"])[:, :, None] * np.asarray(m["out"])[None, None]
    np.testing.assert_array_equal(grad["layer_1/attn/out/kernel"], expected)
    np.testing.assert_array_equal(grad["layer_1/attn/q/bias"], some["layer_1"]["attn"]["q"]["out"])
    np.testing.assert_array_equal(grad["layer_1/mixture/router/kernel"], np.ones((16, 4)))


def test_the_bias_goes_with_the_output_and_a_mask_in_float32_leaves_bfloat16():
    model, params = ready("timer")
    masks = full_masks(model)
    masks["layer_0"]["up"]["out"] = masks["layer_0"]["up"]["out"].at[3].set(0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = apply_masks(half, masks)["layer_0"]["up"]
    assert merged["bias"][3] == 0 and merged["bias"].dtype == jnp.bfloat16
    assert (merged["kernel"][:, 3] == 0).all() and (merged["kernel"][:, 2] != 0).any()


def test_masks_that_do_not_fit_are_all_named():
    _, params = ready("timer")
    one = lambda *shape: jnp.ones(shape)  # noqa: E731
    masks = {
        "layer_0": {
            "up": {"in": one(16), "out": one(7)},
            "sideways": {"in": one(16), "out": one(24)},
        },
        "layer_1": {"down": {"out": one(16)}},
    }
    with pytest.raises(ValueError, match="do not fit") as error:
        apply_masks(params, masks)
    for part in (
        "layer_0/up: masks for weights (16, 7)",
        "layer_0/sideways: the model has no",
        "layer_1/down/out",
    ):
        assert part in str(error.value)


@pytest.mark.slow
def test_shapes_are_those_of_the_weights_in_every_family():
    for name, cls in FAMILIES.items():
        model = cls(cls.small())
        params = jax.eval_shape(model.init, jax.random.key(0))
        found = layer_masks.mask_shapes(model.init, jax.random.key(0))
        assert layer_masks.masks_by_weight(params, found), name


@pytest.mark.slow
def test_a_branch_of_the_parameters_has_its_own_paths():
    model, params = ready("sundial")
    masks = full_masks(model, include_head=True)
    assert set(masks) == {"layer_0", "layer_1", "flow"}
    batch = a_batch(model)

    @jax.jit
    def losses(masks):
        with masked(masks):
            under = model.loss(params, batch)
        return under, model.loss(apply_masks(params, masks), batch)

    whole, _ = losses(masks)
    masks["flow"]["input"]["out"] = jnp.zeros_like(masks["flow"]["input"]["out"])
    under, merged = losses(masks)
    np.testing.assert_allclose(under, merged, rtol=1e-6)
    assert under != whole
