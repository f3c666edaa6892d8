"""The runtime that layers are traced with."""

import jax
import jax.numpy as jnp
import pytest

from ltsm_jax.layers.linear import Linear, compute_dtype
from ltsm_jax.layers.runtime import Runtime

NARROW = Runtime(compute="bfloat16")


def test_layers_find_the_runtime_of_their_call_and_no_other():
    x = jnp.ones((3, 2))
    assert compute_dtype(x) == jnp.float32
    assert NARROW.call(compute_dtype, x) == jnp.bfloat16
    assert compute_dtype(x) == jnp.float32

    with pytest.raises(ZeroDivisionError):
        NARROW.call(lambda: 1 / 0)
    assert Runtime.current() == Runtime()


def test_products_are_narrow_and_parameters_are_not():
    linear, x = Linear((2,), (4,)), jax.ShapeDtypeStruct((3, 2), jnp.float32)
    params = jax.eval_shape(lambda x: NARROW.call(linear.init, jax.random.key(0), x), x)
    assert params["params"]["kernel"].dtype == jnp.float32

    y = jax.eval_shape(lambda p, x: NARROW.call(linear.apply, p, x), params, x)
    assert (y.shape, y.dtype) == ((3, 4), jnp.bfloat16)


def test_a_program_has_one_runtime():
    assert NARROW.call(Runtime(compute="bfloat16").call, Runtime.current) == NARROW
    with pytest.raises(AssertionError, match="one runtime"):
        NARROW.call(Runtime().call, Runtime.current)
    assert Runtime.current() == Runtime()
