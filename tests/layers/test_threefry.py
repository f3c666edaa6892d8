import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers.threefry import random_words


@pytest.mark.parametrize("n", [1, 7, 4096, 100_001])
def test_words_are_those_of_jax(n):
    for seed in (0, 1, 2**31 + 5):
        key = jax.random.key(seed)
        expected = jax.random.bits(key, (n,), jnp.uint32)
        np.testing.assert_array_equal(random_words(key, n), expected)
        np.testing.assert_array_equal(jax.jit(random_words, static_argnums=1)(key, n), expected)


def test_raw_keys():
    key = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(random_words(key, 9), jax.random.bits(key, (9,), jnp.uint32))


def test_many_keys_at_once():
    keys = jax.random.split(jax.random.key(1), 5)
    many = jax.vmap(lambda key: random_words(key, 33))(keys)
    expected = [jax.random.bits(key, (33,), jnp.uint32) for key in keys]
    np.testing.assert_array_equal(many, jnp.stack(expected))


def test_other_generators_are_left_to_jax():
    key = jax.random.key(4, impl="rbg")
    np.testing.assert_array_equal(random_words(key, 50), jax.random.bits(key, (50,), jnp.uint32))
