"""Sums as exact as in float64, of float32 numbers in pairs: for statistics that cancellation would
ruin.

JAX computes in float32 unless a program asks for float64 everywhere, and accelerators may have
none. A pair is a number of about 48 significant bits, as the sum of two float32, the second below
the last bit of the first (Dekker, "A floating-point technique for extending the available
precision", 1971).

No product here is rounded before it is added, so that a compiler that joins products and sums
changes nothing.
"""

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def two_sum(a: jax.Array, b: jax.Array) -> Pair:
    """Add two numbers exactly: their sum and what rounding took from it (Knuth)."""
    rounded = a + b
    of_b = rounded - a
    return rounded, (a - (rounded - of_b)) + (b - of_b)


def plus(x: Pair, y: Pair) -> Pair:
    """Add two pairs."""
    high, low = two_sum(x[0], y[0])
    second, third = two_sum(x[1], y[1])
    high, low = two_sum(high, low + second)
    return two_sum(high, low + third)


def _halves(a: jax.Array) -> Pair:
    """Split a number into two of at most 12 significant bits, whose products are exact."""
    bits = jax.lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, a - high


def times(x: Pair, y: Pair) -> Pair:
    """Multiply two pairs."""
    (a, b), (c, d) = _halves(x[0]), _halves(y[0])
    high, low = two_sum(a * c, a * d)
    high, rest = two_sum(high, b * c)
    return two_sum(high, low + rest + b * d + (x[0] * y[1] + x[1] * y[0]))


def over(x: Pair, n: jax.Array) -> Pair:
    """Divide a pair by a whole number."""
    quotient = x[0] / n
    zero = jnp.zeros_like(quotient)
    product = times((quotient, zero), (n, zero))
    rest = plus(x, (-product[0], -product[1]))
    return two_sum(quotient, (rest[0] + rest[1]) / n)


def total(x: Pair) -> Pair:
    """Sum over the last axis."""
    zero = jnp.zeros((), jnp.float32)

    def added(x, y):
        return plus((x[0], x[1]), (y[0], y[1]))

    high, low = jax.lax.reduce((x[0], x[1]), (zero, zero), added, (x[0].ndim - 1,))
    return high, low
