"""Random words as one expression, which a compiler computes in registers.

On CPUs, JAX's own form is a loop that writes all words to memory several times. Of a layer with
dropout, most of the time is theirs.
"""

import jax
import jax.numpy as jnp

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of even and odd groups of four rounds
GROUPS = 5
PARITY = 0x1BD11BDA  # of the key schedule


def random_words(key: jax.Array, n: int) -> jax.Array:
    """Draw n random 32-bit words [n]: `jax.random.bits(key, (n,))`, bit for bit.

    key: one key. Keys of another generator than JAX's default are left to JAX.
    Source: Threefry-2x32 with 20 rounds, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
    3" (SC 2011); word i is the exclusive or of the two words of the counter (0, i).
    """
    if str(jax.random.key_impl(key)) != "threefry2x32" or n >= 2**32:
        return jax.random.bits(key, (n,), jnp.uint32)
    first, second = jax.random.key_data(key)
    schedule = (first, second, first ^ second ^ jnp.uint32(PARITY))
    a = jnp.full(n, first)
    b = jnp.arange(n, dtype=jnp.uint32) + second
    for group in range(GROUPS):
        for rotation in ROTATIONS[group % 2]:
            a = a + b
            b = (b << rotation) | (b >> (32 - rotation))
            b = a ^ b
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return a ^ b
