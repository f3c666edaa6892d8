"""Parts of decoder-only families: causal attention with a cache, and the roll-out loop.

A cache is an argument and a result, never a hidden state: per layer the rotated keys and the values
[B, G, S, K] of a sequence that has room for S tokens, of which the first `start` are written.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers.attend import LOWEST, attend
from ltsm_jax.layers.dims import HeadDims
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.rope import rotary, rotary_frequencies

Cache = tuple[jax.Array, jax.Array]  # keys and values of one layer

# From so many tokens on a pass that needs no attention weights takes one head of one row at a time:
# the weights of all at once are gigabytes, written and read several times.
LONG = 1024
QUERIES = 768  # that such a head takes at a time, with the keys up to the last of them alone


def causal_mask(
    n: int, s: int, start: jax.Array | int = 0, observed_BS: jax.Array | None = None
) -> jax.Array:
    """Which keys a query sees [B or 1, 1, n, s]: those up to its own place, n queries standing from
    `start` on.

    observed_BS: where given, keys at which it is 0 are seen by nobody.
    """
    seen_NS = jnp.arange(s)[None, :] <= start + jnp.arange(n)[:, None]
    if observed_BS is None:
        return seen_NS[None, None]
    return seen_NS[None, None] & (observed_BS != 0)[:, None, None, :]


def _written(old_BGSK: jax.Array, new_BGNK: jax.Array, start) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
        old_BGSK, new_BGNK.astype(old_BGSK.dtype), start, axis=2
    )


def _kept(pairs, head_dim: int, base: float, heads: int) -> np.ndarray | None:
    """Frequencies [1, heads, 1, K/2] of the pairs that the heads of each group still have; None: of
    all.
    """
    if not pairs:
        return None
    kept_GK = rotary_frequencies(head_dim, base)[np.asarray(pairs, int)]
    return np.repeat(kept_GK, heads // len(pairs), axis=0)[None, :, None]


def attend_by_head(
    q_BHNK: jax.Array, k_BHSK: jax.Array, v_BHSV: jax.Array, seen_BS: jax.Array, scale: float
) -> jax.Array:
    """Causal attention of N queries that are the first tokens of the S, one head of one row after
    the other.

    Equal, but for rounding, to the weights of `causal_mask` times the values, for every query that
    sees a key.

    Args:
      seen_BS: B rows or one; keys at which it is False are seen by nobody.
      scale: factor of the scores.
    Returns: [B, H, N, V].
    """
    b, h, n, _ = q_BHNK.shape

    def one(inputs: tuple[jax.Array, ...]) -> jax.Array:
        row, q_NK, k_SK, v_SV = inputs
        seen_S = seen_BS[row]
        found = []
        for first in range(0, n, QUERIES):
            stop = min(first + QUERIES, n)
            s_QS = (q_NK[first:stop] @ k_SK[:stop].T).astype(jnp.float32) * scale
            place_Q1 = jnp.arange(first, stop)[:, None]
            mask_QS = (jnp.arange(stop)[None] <= place_Q1) & seen_S[None, :stop]
            w_QS = jax.nn.softmax(jnp.where(mask_QS, s_QS, LOWEST))
            found.append(w_QS.astype(v_SV.dtype) @ v_SV[:stop])
        return jnp.concatenate(found)

    rows_R = jnp.repeat(jnp.arange(b) % seen_BS.shape[0], h)
    heads = (x.reshape(b * h, *x.shape[2:]) for x in (q_BHNK, k_BHSK, v_BHSV))
    y_RNV = jax.lax.map(one, (rows_R, *heads))
    return y_RNV.reshape(b, h, n, -1)


class CausalAttention(nn.Module):
    """Self-attention with rotary positions on whole heads, [B, N, D] -> [B, N, D]; q, k, v with
    bias, out without.

    dims: its heads; head h uses key head h // (H // G). head_dim: width of a whole head, which
    decides the scale and the rotation whatever is left. lean: the weights are not asked for: None
    where the sequence is `LONG`.
    Returns: output, weights [B, H, N, S], and the cache with the N new tokens in it (None without
    one).
    """

    d_model: int
    dims: HeadDims
    head_dim: int
    base: float = 10000.0
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BND,
        positions_BN,
        mask_BHNS,
        cache: Cache | None = None,
        start=0,
        train: bool = False,
        lean: bool = False,
    ):
        dims = self.dims

        def project(name):
            y_BNHK = Linear((self.d_model,), dims.shapes[name], name=name)(x_BND)
            return jnp.swapaxes(y_BNHK, 1, 2)

        def turned(y_BHNK):
            kept = _kept(dims.pairs, self.head_dim, self.base, heads=y_BHNK.shape[1])
            return rotary(y_BHNK, positions_BN[:, None], base=self.base, frequencies=kept)

        q_BHNK = turned(project("q"))
        k_BGSK = turned(project("k"))
        v_BGSK = project("v")
        if cache is not None:
            cache = _written(cache[0], k_BGSK, start), _written(cache[1], v_BGSK, start)
            k_BGSK, v_BGSK = (y.astype(q_BHNK.dtype) for y in cache)
        if dims.key_heads != dims.heads:
            copies = dims.heads // dims.key_heads
            k_BGSK, v_BGSK = (jnp.repeat(y, copies, axis=1) for y in (k_BGSK, v_BGSK))

        scale = self.head_dim**-0.5
        from_start = isinstance(start, int) and start == 0
        if lean and not train and x_BND.shape[1] >= LONG and from_start:
            # What the last query sees is all that any query may see.
            seen_BS = mask_BHNS[:, 0, -1]
            y_BHNK = attend_by_head(q_BHNK, k_BGSK, v_BGSK, seen_BS=seen_BS, scale=scale)
            w_BHNS = None
        else:
            drop = functools.partial(Dropout(self.dropout), train=train)
            y_BHNK, w_BHNS = attend(
                q_BHNK, k_BGSK, v_BGSK, seen=mask_BHNS, scale=scale, dropout=drop
            )
        out = Linear(dims.joined, (self.d_model,), use_bias=False, name="out")
        return out(jnp.swapaxes(y_BHNK, 1, 2)), w_BHNS, cache


def empty_cache(b: int, s: int, layers: Iterable[HeadDims]) -> list[Cache]:
    """Caches of all layers, by their heads, with room for s tokens."""
    caches = []
    for dims in layers:
        shapes = (dims.shapes["k"], dims.shapes["v"])
        caches.append(tuple(jnp.zeros((b, g, s, k), jnp.float32) for g, k in shapes))
    return caches


def greedy_sizes(horizon: int, sizes: Sequence[int]) -> list[int]:
    """Which output sizes a roll-out of `horizon` points uses, step by step: at each the largest
    that is not above what remains, looking through `sizes` in order up to the first larger one; the
    first where even that is larger.
    """
    steps = []
    while horizon > 0:
        chosen = sizes[0]
        for size in itertools.takewhile(lambda size: size <= horizon, sizes[1:]):  # noqa: B023
            chosen = size
        steps.append(chosen)
        horizon -= chosen
    return steps


def roll_out(
    first: tuple[Any, jax.Array, jax.Array],
    extend: Callable[[Any, jax.Array, int], tuple[Any, jax.Array, jax.Array]],
    sizes: Sequence[int],
) -> jax.Array:
    """The outputs of all steps along the last axis, [..., sum(sizes)]; equal steps in a row are one
    `lax.scan`.

    Args:
      first: what the first step gave: (state, points to feed [B, sizes[0]], output [...,
        sizes[0]]).
      extend: (state, points [B, before], now) -> (state, points [B, now], output [..., now]), one
        step further.
      sizes: output size of each step.
    """
    state, points, output = first
    outputs = [output]
    for (before, now), run in itertools.groupby(itertools.pairwise(sizes)):
        n = len(list(run))
        if n == 1 or before != now:  # n > 1 takes equal sizes: (a, b), (a, b) would be no chain
            state, points, output = extend(state, points, now)
            outputs.append(output)
            continue

        def again(carry, _, now=now):
            state, points, output = extend(carry[0], carry[1], now)
            return (state, points), output

        (state, points), found = jax.lax.scan(again, (state, points), length=n)
        outputs.append(jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], n * now))
    return jnp.concatenate(outputs, axis=-1)
