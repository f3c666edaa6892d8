"""Adapters of low rank: they begin at the checkpoint, change linears by their rank, and leave
everything else.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import training, trees
from ltsm_jax.methods import lora, pruning, run
from ltsm_jax.methods.strategies import Phase, Strategy, strategy
from ltsm_jax.models.family import Lora
from ltsm_jax.models.time_moe import TimeMoe
from ltsm_jax.models.timesfm_2p5 import TimesFM2p5

CONFIG = training.TrainConfig(epochs=1, batch_size=64, lr=1e-2)


@pytest.fixture(scope="module")
def tuned(model, pre, splits):
    return run.run(
        model, pre, strategy("lora", lora_rank=2), splits, config=CONFIG, show_progress=False
    )


def test_they_begin_at_the_checkpoint(model, pre):
    new = lora.adapters(model, pre, 3, jax.random.key(0))
    merged = lora.merge_adapters(pre, new, 2.0)
    for (path, got), want in zip(trees.flatten(merged).items(), jax.tree.leaves(pre), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=path)
    for path, leaf in trees.flatten(new).items():
        inputs = leaf.shape[:-1]
        if path.endswith("/a"):  # uniform: variance bound^2 / 3
            assert np.abs(leaf).max() <= math.prod(inputs) ** -0.5
            assert np.std(leaf) == pytest.approx(math.prod(inputs) ** -0.5 / 3**0.5, rel=0.35), path


def test_the_sum_is_two_thin_products_beside_the_weights(model, pre):
    new = lora.adapters(model, pre, 3, jax.random.key(0))
    new = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), new)
    kernel, merged = (
        pre["layer_0"]["attn"]["q"]["kernel"],
        lora.merge_adapters(pre, new, 2.0)["layer_0"]["attn"]["q"]["kernel"],
    )
    ab, x = new["layer_0"]["attn"]["q"], jax.random.normal(jax.random.key(2), (5, kernel.shape[0]))
    want = jnp.tensordot(x, kernel, 1) + 2.0 * jnp.tensordot(x @ ab["a"], ab["b"], 1)
    np.testing.assert_allclose(jnp.tensordot(x, merged, 1), want, rtol=1e-5, atol=1e-5)


def test_linears_change_by_the_rank_and_nothing_else_changes(model, pre, tuned):
    linears = 0
    for (path, after), before in zip(
        trees.flatten(tuned.params).items(), jax.tree.leaves(pre), strict=True
    ):
        change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
        if not path.endswith("/kernel"):
            assert not change.any(), path
            continue
        linears += 1
        rows = {"q": 1, "k": 1, "v": 1}.get(
            path.split("/")[-2], change.ndim - 1
        )  # axes that are inputs
        sizes = np.linalg.svd(change.reshape(math.prod(change.shape[:rows]), -1), compute_uv=False)
        assert sizes[0] > 0 and (sizes[2:] < 1e-4 * sizes[0]).all(), path
    assert linears == 2 + 6 * len(model.config.layers)
    new = lora.adapters(model, pre, 2, jax.random.key(0))
    assert tuned.trained == trees.count(new) < trees.count(pre) / 2


@pytest.mark.slow
def test_what_is_pruned_stays_pruned(model, pre, splits):
    masks = jax.tree.map(
        lambda m: (jnp.arange(m.size).reshape(m.shape) % 3 > 0) * 1.0, pruning.full_masks(model)
    )
    result = run.run(
        model, pre, strategy("lora"), splits, config=CONFIG, masks=masks, show_progress=False
    )
    again = pruning.apply_masks(result.params, masks)
    for (path, got), want in zip(
        trees.flatten(result.params).items(), jax.tree.leaves(again), strict=True
    ):
        np.testing.assert_array_equal(got, want, err_msg=path)
    assert (
        result.params["layer_0"]["up"]["kernel"]
        != pruning.apply_masks(pre, masks)["layer_0"]["up"]["kernel"]
    ).any()


def test_stacked_experts_have_adapters_each_and_routers_have_none():
    model = TimeMoe(TimeMoe.small())
    params = jax.jit(model.init)(jax.random.key(0))
    new = lora.adapters(model, params, 2, jax.random.key(0))
    flat, weights = trees.flatten(new), trees.flatten(params)
    stacks = [path for path in weights if "/experts/" in path]
    assert stacks and not [path for path in flat if "router" in path or "shared_gate" in path]
    for path in stacks:
        e, into, out = weights[path].shape
        assert flat[f"{path}/a"].shape == (e, into, 2) and flat[f"{path}/b"].shape == (e, 2, out)
    moved = jax.tree.map(lambda x: x + 0.1, new)
    merged = trees.flatten(lora.merge_adapters(params, moved, 0.5))
    for path in stacks:
        change = 0.5 * np.einsum(
            "eir,ero->eio", trees.flatten(moved)[f"{path}/a"], trees.flatten(moved)[f"{path}/b"]
        )
        np.testing.assert_allclose(
            merged[path], weights[path] + change, rtol=1e-5, atol=1e-6, err_msg=path
        )


def test_the_recipe_of_a_family_may_be_adapters(model):
    published = TimesFM2p5(TimesFM2p5.small())
    assert (
        strategy("recipe").phases[0].adapters(published) == published.recipe().lora == Lora(4, 8.0)
    )
    assert strategy("recipe").phases[0].adapters(model) is None
    assert strategy("lora", lora_rank=16).phases[0].adapters(model) == Lora(16, 32.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda model, pre: strategy("lora", lora_rank=0), "at least 1"),
        (lambda model, pre: lora.adapters(model, pre, 0, jax.random.key(0)), "at least 1"),
        (
            lambda model, pre: Strategy("mine", phases=(Phase(lora=Lora(), l2_sp=0.1),)),
            "trains no weights",
        ),
        (lambda model, pre: Phase("head", lora=Lora()), "trains no weights"),
    ],
)
def test_what_does_not_go_together_is_refused(make, message, model, pre):
    with pytest.raises(ValueError, match=message):
        make(model, pre)
