"""Mixtures of experts: routing, and forms that agree in value and gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers.experts import Form, mixture, route
from ltsm_jax.layers.runtime import Runtime

D, F = 6, 10
FORMS: tuple[Form, ...] = ("dense", "blocks", "turns", "ragged")
MIXTURE = jax.jit(mixture, static_argnums=(4, 5))
ROUTE = jax.jit(route, static_argnums=1)


def kernels(e, seed=0):
    return tuple(
        normal(seed + i, *shape) for i, shape in enumerate(((e, D, F), (e, D, F), (e, F, D)))
    )


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(x_TD, kernels, weight_TK, chosen_TK):
    gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
    y_TD = np.zeros(x_TD.shape)
    for t, x in enumerate(np.asarray(x_TD, np.float64)):
        for w, i in zip(
            np.asarray(weight_TK[t], np.float64), np.asarray(chosen_TK[t]), strict=True
        ):
            g = x @ gate[i]
            y_TD[t] += w * ((g / (1 + np.exp(-g))) * (x @ up[i])) @ down[i]
    return y_TD


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("t, e, k", [(1, 1, 1), (37, 5, 2), (300, 3, 2), (64, 8, 8)])
def test_every_form_is_the_sum_over_a_tokens_experts(form, t, e, k):
    x_TD, logits_TE = normal(10, t, D), 3 * normal(11, t, e)
    weight_TK, chosen_TK, _ = ROUTE(logits_TE, k)
    got = MIXTURE(x_TD, kernels(e), weight_TK, chosen_TK, jax.nn.silu, form)
    np.testing.assert_allclose(
        got, by_hand(x_TD, kernels(e), weight_TK, chosen_TK), rtol=1e-4, atol=1e-4
    )


def test_all_tokens_with_one_expert():
    """The worst load: nothing is dropped."""
    x_TD = normal(10, 200, D)
    weight_TK, chosen_TK = np.ones((200, 1), np.float32), np.full((200, 1), 3)
    want = by_hand(x_TD, kernels(6), weight_TK, chosen_TK)
    for form in FORMS:
        got = MIXTURE(x_TD, kernels(6), weight_TK, chosen_TK, jax.nn.silu, form)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=form)


@pytest.mark.slow
def test_gradients_of_all_forms_agree():
    x_TD, logits_TE = normal(10, 50, D), normal(11, 50, 4)

    def loss(x_TD, logits_TE, kernels, form):
        weight_TK, chosen_TK, _ = route(logits_TE, 2)
        return jnp.square(mixture(x_TD, kernels, weight_TK, chosen_TK, jax.nn.silu, form)).mean()

    grads = [
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)(
            x_TD, logits_TE, kernels(4), form
        )
        for form in FORMS
    ]
    for other in grads[1:]:
        chex.assert_trees_all_close(grads[0], other, rtol=1e-4, atol=1e-4)


def test_forms_of_experts_under_vmap_and_forward_derivatives():
    """Lanes of runs, and products with a Hessian."""
    x_LTD, logits_LTE = normal(10, 2, 20, D), normal(11, 2, 20, 4)

    def total(x_TD, logits_TE, form):
        weight_TK, chosen_TK, _ = route(logits_TE, 2)
        return jnp.square(mixture(x_TD, kernels(4), weight_TK, chosen_TK, jax.nn.silu, form)).sum()

    def found(x_LTD, logits_LTE, form):
        one = functools.partial(total, form=form)
        slope = jax.grad(one)
        _, curved = jax.jvp(lambda x: slope(x, logits_LTE[0]), (x_LTD[0],), (x_LTD[1],))
        return jax.vmap(one)(x_LTD, logits_LTE), jax.vmap(slope)(x_LTD, logits_LTE), curved

    found = jax.jit(found, static_argnums=2)
    want, got = (found(x_LTD, logits_LTE, form) for form in ("dense", "turns"))
    chex.assert_trees_all_close(want, got, rtol=1e-4, atol=1e-3)


def test_pruned_experts_leave_the_others_their_weights():
    """The worked example of Prune-then-Finetune's router: weights are not normalised after
    a mask.
    """
    logits = jnp.log(jnp.asarray([[0.610, 0.224, 0.136, 0.030]]))
    weight, chosen, p = route(logits, 2, jnp.asarray([0.0, 1, 1, 1]))
    np.testing.assert_array_equal(chosen, [[1, 2]])
    np.testing.assert_allclose(weight, [[0.224, 0.136]], rtol=1e-5)
    np.testing.assert_allclose(p, [[0, 0.224, 0.136, 0.030]], rtol=1e-5)
    weight, chosen, _ = route(logits, 2, jnp.asarray([0.0, 1, 0, 0]))
    assert chosen[0, 0] == 1 and weight[0, 1] == 0, "the second slot weighs nothing"


def test_a_program_for_another_machine_takes_that_machines_form():
    def form(platform):
        def f(x_TD, weight_TK, chosen_TK):
            return mixture(
                x_TD,
                kernels(4),
                weight_TK,
                chosen_TK,
                jax.nn.silu,
                runtime=Runtime(platform=platform),
            )

        text = str(
            jax.make_jaxpr(f)(jnp.ones((8, D)), jnp.ones((8, 2)), jnp.ones((8, 2), jnp.int32))
        )
        return "ragged" if "ragged_dot" in text else "another"

    assert (form("tpu"), form("gpu"), form("cpu")) == ("ragged", "ragged", "another")
