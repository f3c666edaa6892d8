import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.mlp import gelu


@pytest.mark.parametrize("outputs", [(7,), (2, 3), (0,)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_transposed_form_is_the_same_function(outputs, use_bias):
    plain, other = (Linear((5,), outputs, use_bias, transposed=flag) for flag in (False, True))
    x = jax.random.normal(jax.random.key(0), (4, 3, 5))
    shapes = jax.eval_shape(plain.init, jax.random.key(1), x)
    assert shapes == jax.eval_shape(other.init, jax.random.key(1), x)
    leaves, structure = jax.tree.flatten(shapes)
    params = structure.unflatten(
        [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    )

    def both(layer):
        def loss(params, x):
            y = layer.apply(params, x)
            return jnp.sin(y).sum(), y

        (_, y), found = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, found

    chex.assert_trees_all_close(both(plain), both(other), rtol=1e-5, atol=1e-5)


def test_a_caller_who_transposes_around_it_pays_for_no_transpose():
    x, layer = jnp.ones((5, 64)), Linear((5,), (7,), transposed=True)
    params = jax.tree.map(jnp.ones_like, layer.init(jax.random.key(0), x.T))
    call = jax.jit(lambda params, x: layer.apply(params, x.T).T)
    text = call.lower(params, x).compile().as_text()
    assert "f32[7,64]" in text and "f32[64,7]" not in text and " transpose(" not in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_is_that_of_the_definition(dtype):
    x = jnp.linspace(-6, 6, 241).astype(dtype)
    exact = np.asarray(jax.nn.gelu(x.astype(jnp.float32), approximate=False))
    found = gelu(x)
    assert found.dtype == dtype
    # of float32 the error of 1 + erf(x), of bfloat16 one rounding
    atol, rtol = (5e-7, 1e-6) if dtype == jnp.float32 else (5e-7, 2**-8)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=rtol, atol=atol)
