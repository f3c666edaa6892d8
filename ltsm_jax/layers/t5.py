"""The encoder and decoder stacks of T5, of which three families are made.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv 1910.10683); T5 1.1 for the gated feed-forward. Against other Transformers: RMSNorm before
each sub-layer, no biases in the linears, attention scores not divided by sqrt(K), a learned bias on
the distance between query and key, head widths that need not multiply to the model width.

Parameters of a stack called `encoder` or `decoder`, i = 0, 1, ...:

    encoder/relative_bias                  [buckets, heads]: one for all layers
    encoder/layer_{i}/norm1/scale          [D]
    encoder/layer_{i}/attn/{q,k,v}/kernel  [D, H, K]
    encoder/layer_{i}/attn/out/kernel      [H, K, D]
    encoder/layer_{i}/norm2/scale          [D]
    encoder/layer_{i}/up/kernel            [D, F]     `wi`, or `wi_1` where there is a gate
    encoder/layer_{i}/gate/kernel          [D, F]     `wi_0`, which goes through the activation
    encoder/layer_{i}/down/kernel          [F, D]     `wo`
    encoder/norm/scale                     [D]
    decoder/...                            the same with layer_{i}/cross/{q,k,v,out}/kernel after
                                           norm2, and norm3 before the feed-forward

`SHARD_RULES` and `initial` go with these names; `converters.t5_stack` has the key table.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import LOWEST, attend, attention_weights
from ltsm_jax.layers.dims import HeadDims, Narrowed, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, Distribution, Normal
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.mlp import feed_forward, gated_feed_forward
from ltsm_jax.layers.network import nested
from ltsm_jax.layers.norm import RMSNorm

Activation = Literal["relu", "gelu", "gelu_new"]  # gelu_new: the approximation with tanh
SHARD_RULES = (
    *shards.LAYERS,
    (r"/relative_bias$", ()),
    *shards.WHOLE,
)

Cache = Mapping[str, Any]
"""Keys and values of a decoder's layers: {"layer_0": {"k", "v", "cross_k", "cross_v"}}, each [B, H,
S, K].
"""


@dataclasses.dataclass(frozen=True)
class T5Layer:
    """A layer's own attention, its feed-forward units, and in a decoder its attention to the
    encoder (cross).
    """

    attn: HeadDims
    ffn: int
    cross: HeadDims | None = None


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Sizes of one stack.

    d_model D, head_dim K, layers: H, K and F of each; the `ids` of its heads are the columns of the
    relative-bias table that they use. n_buckets, max_distance (in tokens): of the relative bias.
    """

    d_model: int
    head_dim: int
    layers: tuple[T5Layer, ...]
    n_buckets: int = 32
    max_distance: int = 128
    activation: Activation = "relu"
    gated: bool = False
    eps: float = 1e-6
    dropout: float = 0.1

    def __post_init__(self):
        scores: dict[str, Narrowed] = {"attn": "channels", "cross": "channels"}
        problems = layer_problems(self.layers, self.head_dim, scores=scores)
        if len({layer.cross is None for layer in self.layers}) > 1:
            problems.append("all layers must look at an encoder's output, or none")
        if min(self.d_model, self.head_dim) < 1:
            problems.append("every size must be positive")
        exact = self.n_buckets // (2 if self.is_decoder else 4)
        if exact < 1 or self.max_distance <= exact:
            problems.append(
                f"{self.n_buckets} buckets have {exact} exact distances a side; there must be one, "
                f"and max_distance ({self.max_distance}) must lie beyond"
            )
        if (
            self.activation not in typing.get_args(Activation)
            or not 0 <= self.dropout < 1
            or not self.eps >= 0
        ):
            problems.append(
                f"activation must be one of {', '.join(typing.get_args(Activation))}, dropout in "
                f"[0, 1), eps not negative: {self.activation}, {self.dropout}, {self.eps}"
            )
        if problems:
            raise ValueError("T5 stack: " + "; ".join(problems))

    @classmethod
    def of(
        cls,
        d_model: int,
        head_dim: int,
        layers: int,
        heads: int,
        ffn: int,
        *,
        decoder: bool = False,
        **rest: Any,
    ) -> "StackConfig":
        """Equal layers."""
        attention = HeadDims.of(heads, head_dim)
        layer = T5Layer(attention, ffn, attention if decoder else None)
        return cls(d_model, head_dim, (layer,) * layers, **rest)

    @property
    def is_decoder(self) -> bool:
        """Whether the stack also looks at an encoder's output."""
        return any(layer.cross is not None for layer in self.layers)

    @property
    def bias_heads(self) -> int:
        """Columns of the relative-bias table."""
        columns: set[int] = set()
        for layer in self.layers:
            columns |= set(layer.attn.numbers)
        return max(columns, default=-1) + 1


def relative_buckets(
    relative: np.ndarray, *, bidirectional: bool, n_buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket of each distance `key position - query position`: int32, of the shape of `relative`.

    Near distances have buckets of their own, farther ones share them on a logarithmic scale up to
    `max_distance`. bidirectional: half of the buckets for keys after the query; otherwise these
    fall into the bucket of distance 0. The scale is computed in float32 in the original's order of
    operations: its rounding decides some distances.
    """
    relative = np.asarray(relative)
    if bidirectional:
        n_buckets //= 2
        base, distance = np.where(relative > 0, n_buckets, 0), np.abs(relative)
    else:
        base, distance = 0, np.maximum(-relative, 0)
    exact = n_buckets // 2
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    # the logarithm rounded once: NumPy's own in float32 may be off by one place where the bucket
    # changes
    log = np.log(ratio.astype(np.float64)).astype(np.float32)
    far = exact + (
        log / np.float32(math.log(max_distance / exact)) * np.float32(n_buckets - exact)
    ).astype(np.int64)
    return (base + np.where(distance < exact, distance, np.minimum(far, n_buckets - 1))).astype(
        np.int32
    )


def position_bias(
    table: jax.Array,
    n: int,
    s: int,
    *,
    bidirectional: bool,
    max_distance: int,
    start: jax.Array | int | None = None,
) -> jax.Array:
    """The bias [H, N, S] that the scores of N queries and S keys get, keys at positions 0, 1, ....

    table: [buckets, H]. start: position of the first query, below s; None is 0.
    """
    earliest = 0 if start is None else s - 1
    buckets = relative_buckets(
        np.arange(1 - n - earliest, s),
        bidirectional=bidirectional,
        n_buckets=table.shape[0],
        max_distance=max_distance,
    )
    b_HR = table[buckets].T  # of each distance
    if start is not None:
        b_HR = jax.lax.dynamic_slice_in_dim(b_HR, s - 1 - start, n + s - 1, axis=1)
    # [i, j] = b[j - i] by laying rows of n + s distances one place short beside each other. A
    # gather of [N, S, H] would do, but its gradient is a scatter, which takes longer than the rest
    # of the attention.
    b_HR = jnp.concatenate([b_HR[:, n - 1 :], b_HR[:, :1], b_HR[:, : n - 1]], axis=1)
    h = b_HR.shape[0]
    rows = jnp.broadcast_to(b_HR[:, None], (h, n, n + s)).reshape(h, n * (n + s))
    return rows[:, : n * (n + s - 1)].reshape(h, n, n + s - 1)[..., :s]


def hidden(mask: jax.Array) -> jax.Array:
    """Offset of the attention scores: 0 where the mask is not 0, float32's lowest number where it
    is. Where every key is hidden the attention is uniform, as in the original, and not NaN.
    """
    return jnp.where(mask != 0, 0.0, LOWEST)


class Kernel(nn.Module):
    """The kernel of a `Linear` of this name, for a product that the layer itself can't do."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @nn.compact
    def __call__(self, dtype):
        shape = (*self.inputs, *self.outputs)
        return (
            self.param("kernel", nn.initializers.zeros, shape).astype(dtype)
            if all(shape)
            else jnp.zeros(shape, dtype)
        )


class Attention(nn.Module):
    """Attention of x [B, N, D] to a source [B, S, D]: [B, N, D], and the keys and values [B, H, S,
    K].

    bias: added to the scores, broadcasts to [B, H, N, S]. source None: keys and values are `kv`
    alone; with both, the new ones are written into `kv` at `start`. Rows of x may be a multiple of
    the source's: row r looks at the source's row r // multiple. keep: keys and values are wanted;
    they need not come back otherwise. whole: see `layers.shortcuts`.
    """

    shortens: ClassVar[bool] = True

    cfg: StackConfig
    dims: HeadDims

    @nn.compact
    def __call__(
        self,
        x_BND,
        source_BSD: Any,
        bias,
        train: bool,
        kv: Any = None,
        start: Any = 0,
        keep: bool = False,
        whole: bool = False,
    ) -> tuple[Any, Any]:
        if x_BND is None:  # nobody asks yet
            return None, (self._split(source_BSD, "k"), self._split(source_BSD, "v"))
        cfg, shape = self.cfg, x_BND.shape
        rows = kv[0].shape[0] if source_BSD is None else source_BSD.shape[0]
        q_BHNK = self._split(x_BND.reshape(rows, -1, cfg.d_model), "q")
        drop = functools.partial(Dropout(cfg.dropout), train=train)

        # A shorter way for few queries of new keys that nobody wants to keep.
        n, k = q_BHNK.shape[2:]
        s = 0 if source_BSD is None else source_BSD.shape[1]
        fewer = n * (k + s) < s * k
        if fewer and source_BSD is not None and not (keep or kv or whole):
            y_BNHK = self._without_keys(q_BHNK, source_BSD, bias, drop=drop)
        else:
            if source_BSD is not None:
                new = self._split(source_BSD, "k"), self._split(source_BSD, "v")
                kv = _written(kv, new, start) if kv else new
            y_BHNK, _ = attend(q_BHNK, *kv, bias=bias, dropout=drop)
            y_BNHK = jnp.swapaxes(y_BHNK, 1, 2)
        out = Linear(self.dims.joined, (cfg.d_model,), use_bias=False, name="out")
        return out(y_BNHK).reshape(shape), kv

    def _split(self, y, name: str) -> jax.Array:
        """Queries, keys or values [B, H, N, K]."""
        y_BNHK = Linear((self.cfg.d_model,), self.dims.shapes[name], use_bias=False, name=name)(y)
        return jnp.swapaxes(y_BNHK, 1, 2)

    def _without_keys(self, q_BHNK, source_BSD, bias, drop) -> jax.Array:
        """Attend [B, N, H, K] without the keys and values of all of the source m.

        (q W') m' for q (m W)' and (w m) W for w (m W): that takes a tenth off a forecast of one
        decoder step.
        """
        m_BSD = source_BSD.astype(q_BHNK.dtype)
        inputs = (self.cfg.d_model,)
        k_DHK = Kernel(inputs, self.dims.shapes["k"], name="k")(m_BSD.dtype)
        v_DHK = Kernel(inputs, self.dims.shapes["v"], name="v")(m_BSD.dtype)
        p_BHND = jnp.einsum("BHNK,DHK->BHND", q_BHNK, k_DHK)
        s_BHNS = jnp.einsum("BHND,BSD->BHNS", p_BHND, m_BSD)
        w_BHNS = drop(attention_weights(s_BHNS, bias=bias).astype(m_BSD.dtype))
        y_BHND = jnp.einsum("BHNS,BSD->BHND", w_BHNS, m_BSD)
        return jnp.einsum("BHND,DHK->BNHK", y_BHND, v_DHK)


def _written(old: Any, new: Any, start: Any) -> tuple[jax.Array, ...]:
    """Keys and values with new ones written over them from token `start` on."""
    place = (0, 0, start, 0)
    found = []
    for y, more in zip(old, new, strict=True):
        found.append(jax.lax.dynamic_update_slice(y, more.astype(y.dtype), place))
    return tuple(found)


class Block(nn.Module):
    """One layer [B, N, D] -> [B, N, D]; the named steps between; its part of the cache."""

    cfg: StackConfig
    dims: T5Layer

    @nn.compact
    def __call__(self, x_BND, bias, memory_BMD, memory_bias, train: bool, cache: Any, start: Any):
        cfg, dims, taps, new = self.cfg, self.dims, {}, {}

        def drop(y):
            return Dropout(cfg.dropout)(y, train)

        if x_BND is None:
            assert dims.cross is not None  # `Stack` asks a decoder alone
            cross = Attention(cfg, dims.cross, name="cross")
            _, (new["cross_k"], new["cross_v"]) = cross(None, memory_BMD, None, train=train)
            return None, taps, new
        kept: Any = cache or {}
        kv = (kept["k"], kept["v"]) if kept else None
        h_BND = taps["norm1"] = RMSNorm(cfg.eps, name="norm1")(x_BND)
        attn = Attention(cfg, self.dims.attn, name="attn")
        taps["attn"], kv = attn(
            h_BND, h_BND, bias, train=train, kv=kv, start=start, keep=bool(kept)
        )
        if kept:
            new["k"], new["v"] = kv
        x_BND = taps["after_attn"] = x_BND + drop(taps["attn"])
        if dims.cross is not None:
            kv = None if memory_BMD is not None else (kept["cross_k"], kept["cross_v"])
            h_BND = taps["norm2"] = RMSNorm(cfg.eps, name="norm2")(x_BND)
            cross = Attention(cfg, dims.cross, name="cross")
            taps["cross"], kv = cross(
                h_BND, memory_BMD, memory_bias, train=train, kv=kv, keep=bool(kept)
            )
            if kept:
                new["cross_k"], new["cross_v"] = kv
            x_BND = taps["after_cross"] = x_BND + drop(taps["cross"])
        name, ffn_dim = "norm2" if dims.cross is None else "norm3", dims.ffn
        h_BND = taps[name] = RMSNorm(cfg.eps, name=name)(x_BND)
        made = gated_feed_forward if cfg.gated else functools.partial(feed_forward, use_bias=False)
        taps["ffn"] = made(h_BND, ffn_dim, cfg.activation, dropout=drop)
        return x_BND + drop(taps["ffn"]), taps, new


class Stack(nn.Module):
    """A T5 encoder, or decoder where the config has `cross_heads`: [B, N, D] -> [B, N, D].

    Args:
      x: [B, N, D], the embedded tokens; None, for a decoder: only the memory's keys and values are
        made, to be put into the cache of another call.
      mask: [B, N], 0 where a token is hidden from all others (padding). Not with a cache.
      memory: [B', M, D], the encoder's output, for a decoder; B a multiple of B' (several rows may
        share a memory).
      memory_mask: [B', M].
      train: with dropout.
      cache, start: for a decoder that goes token by token: x are the N tokens from position `start`
        on, whose keys and values are written there. The first call has a cache of
        `empty_decoder_cache` and the memory; the later ones find the memory's keys and values in
        the cache and need no memory, but its mask.
    Returns: (y, taps, cache). taps: "norm", and for each layer "layer_0" (its output) and
      "layer_0/" + norm1, attn (the sub-layer's output), after_attn (added to the stream), norm2,
      ffn; a decoder has cross and after_cross too, and norm3 before ffn. cache: the new one, None
      where none was given.
    """

    cfg: StackConfig

    @nn.compact
    def __call__(
        self,
        x,
        mask=None,
        *,
        memory=None,
        memory_mask=None,
        train=False,
        cache: Any = None,
        start: Any = None,
    ):
        cfg, taps, new = self.cfg, {}, {}

        def drop(y):
            return Dropout(cfg.dropout)(y, train)

        if (
            cfg.is_decoder
            and memory is None
            and (cache is None or "cross_k" not in cache["layer_0"])
        ):
            raise ValueError(
                "a decoder needs the encoder's output: as `memory`, or from earlier in the cache"
            )
        if x is None:
            for i, dims in enumerate(cfg.layers):
                block = Block(cfg, dims, name=f"layer_{i}")
                *_, new[f"layer_{i}"] = block(
                    None, None, memory, memory_bias=None, train=train, cache=None, start=None
                )
            return None, taps, new
        shape = (cfg.n_buckets, cfg.bias_heads)
        table = (
            self.param("relative_bias", nn.initializers.zeros, shape)
            if cfg.bias_heads
            else jnp.zeros(shape)
        )
        table = table.astype(jnp.float32)
        n = x.shape[1]
        s = n if cache is None else cache["layer_0"]["k"].shape[2]
        start = start if cache is None or start is not None else 0
        bias_HNS = position_bias(
            table,
            n,
            s,
            bidirectional=not cfg.is_decoder,
            max_distance=cfg.max_distance,
            start=start,
        )
        if cfg.is_decoder:
            before_NS = jnp.arange(s)[None] <= jnp.arange(n)[:, None] + (
                0 if start is None else start
            )
            bias_HNS = bias_HNS + hidden(before_NS)[None]
        mask_bias = 0.0 if mask is None else hidden(mask)[:, None, None]
        memory_bias = 0.0 if memory_mask is None else hidden(memory_mask)[:, None, None]
        x = drop(x)
        for i, dims in enumerate(cfg.layers):  # a loop, not a scan: pruned layers differ in width
            own_HNS = bias_HNS
            if dims.attn.numbers != tuple(range(cfg.bias_heads)):
                own_HNS = bias_HNS[np.array(dims.attn.numbers, int)]
            x, inner, new[f"layer_{i}"] = Block(cfg, dims, name=f"layer_{i}")(
                x,
                own_HNS[None] + mask_bias,
                memory,
                memory_bias=memory_bias,
                train=train,
                cache=cache and cache[f"layer_{i}"],
                start=start,
            )
            taps |= nested(f"layer_{i}", inner, x)
        taps["norm"] = RMSNorm(cfg.eps, name="norm")(x)
        return drop(taps["norm"]), taps, new if cache else None


def empty_decoder_cache(cfg: StackConfig, rows: int, length: int, dtype=jnp.float32) -> Cache:
    """The cache with which a decoder starts: room for `length` tokens in each of `rows` rows."""
    cache = {}
    for i, dims in enumerate(cfg.layers):
        own = {}
        for name in "kv":
            heads, width = dims.attn.shapes[name]
            own[name] = jnp.zeros((rows, heads, length, width), dtype)
        cache[f"layer_{i}"] = own
    return cache


def initial(path: str, shape: tuple[int, ...], d_model: int, factor: float = 1.0) -> Distribution:
    """The original's distribution of a parameter of a stack; `factor` is its `initializer_factor`.

    A normal with standard deviation `factor` over the root of the inputs, of D * K for queries;
    norms are `factor`.
    """
    name = path.removesuffix("/kernel").rsplit("/", 1)[-1]
    if path.endswith("/scale"):
        return Constant(factor)
    inputs = {"q": (d_model, shape[-1]), "out": shape[:-1], "down": shape[:1]}.get(name, (d_model,))
    return Normal(factor * max(math.prod(inputs), 1) ** -0.5)
