"""Softmax attention between projected queries, keys and values: the part that all families share.

Each family has its own attention class, with its projections, positions and norms; what it does
with queries, keys and values is here. Heads, and whatever else goes in parallel, stand in front:
queries [..., N, K], keys [..., S, K], values [..., S, V]. As plain batched products of matrices
XLA's CPU code takes half the time of products with heads behind the tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# The score of a key that is not seen. A finite one: a query that sees nothing (padding) attends
# evenly to all keys, as in most originals. With -inf it would be NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def attention_weights(
    scores: jax.Array,
    *,
    seen: jax.Array | None = None,
    bias: jax.Array | float | None = None,
    scale: float | None = None,
    hidden: float = LOWEST,
) -> jax.Array:
    """softmax(scale * scores + bias) over the last axis, in float32, of keys that are seen.

    Args:
      scores: [..., N, S], products of queries and keys, of any dtype.
      seen: booleans that broadcast to them, True where a query sees a key; None: everywhere.
      bias: broadcasts to them.
      scale: of the scores; None: 1.
      hidden: score of what is not seen.
    """
    scores = scores.astype(jnp.float32)
    if scale is not None:
        scores = scores * scale
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = jnp.where(seen, scores, hidden)
    return jax.nn.softmax(scores)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    seen: jax.Array | None = None,
    bias: jax.Array | float | None = None,
    scale: float | None = None,
    hidden: float = LOWEST,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Values averaged by how well their keys fit the queries: softmax(scale * q k' + bias) v.

    Args:
      q: [..., N, K]. k: [..., S, K]. v: [..., S, V]; equal axes in front.
      seen, bias, scale, hidden: see `attention_weights`.
      dropout: of the weights.
    Returns: [..., N, V], and the weights [..., N, S] before dropout, in the dtype of v.
    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762).
    """
    scores = jnp.einsum("...NK,...SK->...NS", q, k)
    weights = attention_weights(scores, seen=seen, bias=bias, scale=scale, hidden=hidden)
    weights = weights.astype(v.dtype)
    kept = weights if dropout is None else dropout(weights)
    return jnp.einsum("...NS,...SV->...NV", kept, v), weights
