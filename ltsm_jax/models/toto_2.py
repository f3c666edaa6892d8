"""Toto 2.0: a decoder over patches in time and over the variates of a group, in unit-scaled
weights.

"Toto 2.0" (Datadog, arXiv 2605.20119). Follows the package toto-2 2.0.0 (DataDog/toto, commit
46bd92a) with dd-unit-scaling 0.1.0 and unit-scaling 0.3.5.

Each patch is scaled by mean and deviation of everything visible up to its own end, goes through
arcsinh, and is a token together with which of its values are missing. Most layers attend over
the time of each variate, causally; a few, over the variates of a group at each patch. Patch i
gives nine quantiles of patch i + 1. A forecast puts empty patches behind the context and reads all
of them in one pass, or some at a time (`block_len`), with keys and values kept in between.

Unit scaling (Blake et al., "u-muP", arXiv 2407.17465): every weight is of the order of 1, and the
factor that is part of the weights elsewhere stands in the forward pass: (W x + b) / sqrt(inputs),
of the last linears of the head (W x + b) / inputs, where `inputs` are those of the published width,
also after some have been pruned. Branch and stream are added as (tau f(x) + x) / sqrt(1 + tau^2).

What that means for fine-tuning:

- A fresh draw is N(0, 1) for every weight matrix, 0 for biases and per-dimension scales, 1 for
  norms. The parameters here are those of the checkpoint, and not what they are in effect: a mix of
  pretrained and fresh ones, alpha W + (1 - alpha) Z, goes through the same factor on both sides, so
  that it is the same mix of the weights in effect. With factors folded into the weights, Z would
  have to be N(0, 1 / inputs), and N(0, 1 / inputs^2) of the head.
- The taus are numbers that the depth decides, not weights. They are `fixed`: whatever the start or
  the method, they are those of the checkpoint; nothing mixes, trains, decays or prunes them.
- A step of Adam moves a weight of the order of 1 relatively less than one of the order of
  1 / sqrt(inputs): for the same change of the function learning rates are larger by sqrt(inputs).

Departures from the original:
- Gradients are those of the function. The original's backward pass is another function, whose
  factors differ from those of the forward pass: `gradient="umup"`.
- Steps in front of the first value of a series do not exist. The original takes those in the last
  patch of a context for observed zeros, which moves the scale of a series shorter than a patch:
  `front="zeros"`.

Letters beyond those of the library: V variates of a group with their covariates, S patches of one
pass, I inputs of a token.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import pairs
from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import HeadDims, layer_problems
from ltsm_jax.layers.initial import Constant, Normal, draw
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, interpolate_missing, mean_observed, mse_observed
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.patches import end_to_end
from ltsm_jax.layers.quantiles import DECILES, pinball
from ltsm_jax.layers.rope import rotary
from ltsm_jax.layers.scan import equal_runs, loops, through_layers
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import COVARIATES, Batch, Forecast, Model, Recipe, windows_that_fit
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

LEVELS = DECILES
MEDIAN = LEVELS.index(0.5)
FLAT_SCALE = 1e-6  # the least deviation of a series
ROPE_BASE = 10000.0
XPOS_BASE = 256.0  # steps of one power of the xPos decay
GAIN = math.exp(0.8 * math.log(math.sqrt(2 / (1 - 1 / math.pi))) + 0.2 * math.log(2))  # of silu
NOWHERE = -1  # the group of a patch without any observed value

Kind = Literal["time", "variate"]
Cache = tuple[jax.Array, jax.Array]  # rotated keys [B, V, G, S, K] and values of one time layer


@dataclasses.dataclass(frozen=True)
class Toto2Layer:
    """A layer: the axis that it attends over (kind), its attention, its feed-forward units."""

    kind: Kind
    attn: HeadDims
    ffn: int


@dataclasses.dataclass(frozen=True)
class Toto2Config:
    """Widths are per layer, so that a pruned Toto is a Toto.

    patch_len: P, time steps of a token.
    d_model: D.
    qk_dim: width of queries and keys. head_dim: width of values.
    layers: H, G, K and F of each, and what it attends over.
    attn_width, ffn_width: inputs of the output projection, and of the second feed-forward linear,
      in the published model: they decide the scale of these, whatever is pruned.
    attn_bias, mlp_bias, norm_weight, qk_norm, qk_norm_weight, per_dim_scale, xpos: what there is.
    residual_mult, residual_ratio: of these the taus are made.

    How the model is used:
    window: steps that one pass reads at most, of context and forecast without its last patch.
    span: patches that training hides in a row at most.
    block_len: steps that a forecast decodes at a time, whole patches; None is all.
    min_observed: values that a scale needs; else it is that of the first so many.
    cap: how many deviations a forecast may leave the range of the context; 0 for no limit.
    fill: what missing values of the last patch become.
    front, gradient: quirks of the original, see the module docstring.
    """

    patch_len: int
    d_model: int
    qk_dim: int
    head_dim: int
    layers: tuple[Toto2Layer, ...]
    attn_width: int
    ffn_width: int
    window: int = 4096
    attn_bias: bool = True
    mlp_bias: bool = False
    norm_weight: bool = False
    qk_norm: bool = False
    qk_norm_weight: bool = False
    per_dim_scale: bool = True
    xpos: bool = True
    norm_eps: float = 1e-4
    residual_mult: float = 0.75
    residual_ratio: float = 5.136215466577748
    span: int = 16
    block_len: int | None = None
    min_observed: int = 8
    cap: float = 1e4
    fill: Literal["last", "linear", "zero"] = "last"
    front: Literal["missing", "zeros"] = "missing"
    gradient: Literal["exact", "umup"] = "exact"

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim, qk_dim=self.qk_dim)
        sizes = ("patch_len", "d_model", "qk_dim", "head_dim", "attn_width", "ffn_width")
        problems += field_problems(self, *sizes, "window", "span")
        for layer in self.layers:
            problems += field_problems(layer)
        if self.min_observed < 0:
            problems.append(f"min_observed must not be negative, got {self.min_observed}")
        block = self.patch_len if self.block_len is None else self.block_len
        if block < 1 or (self.patch_len > 0 and block % self.patch_len):
            problems.append(
                f"block_len must be whole patches of {self.patch_len} steps, got {block}"
            )
        if self.qk_dim % 4:
            problems.append(
                "half of a head turns in pairs, so qk_dim must be a multiple of 4, "
                f"got {self.qk_dim}"
            )
        if not (self.residual_mult > 0 and self.residual_ratio > 0 and self.cap >= 0):
            problems.append("residual_mult and residual_ratio must be positive, cap not negative")
        refuse(self, problems)

    @classmethod
    def of(
        cls,
        patch_len: int,
        d_model: int,
        heads: int,
        layers: int,
        d_ff: int,
        *,
        kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        group_size: int | None = None,
        variate_layers: int = 1,
        variate_first: bool = False,
        **rest: Any,
    ) -> "Toto2Config":
        """Make equal layers; the last of every `group_size` (or the first) are over variates."""
        qk_dim = d_model // heads if qk_dim is None else qk_dim
        v_dim = qk_dim if v_dim is None else v_dim
        group_size = layers if group_size is None else group_size
        kinds = kinds_of(layers, group_size, variate_layers, variate_first=variate_first)
        attention = HeadDims(heads, qk_dim, v_dim, kv_heads=heads if kv_heads is None else kv_heads)
        return cls(
            patch_len=patch_len,
            d_model=d_model,
            qk_dim=qk_dim,
            head_dim=v_dim,
            layers=tuple(Toto2Layer(kind, attention, d_ff) for kind in kinds),
            attn_width=heads * v_dim,
            ffn_width=d_ff,
            **rest,
        )

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "Toto2Config":
        """Read a published config.json.

        Raises: ValueError naming the fields that are missing, or what the original can't forecast
          with.
        """
        required = ("patch_size", "d_model", "num_heads", "num_layers")
        require_fields("Toto 2.0", fields, required)
        d, heads, layers = fields["d_model"], fields["num_heads"], fields["num_layers"]
        if heads < 1 or (d % heads and not fields.get("qk_dim")):
            raise ValueError(f"d_model ({d}) must be a multiple of num_heads ({heads})")
        if fields.get("dropout_p"):
            raise ValueError("Toto 2.0 has no dropout: dropout_p must be 0")
        if fields.get("num_output_patches", 1) != 1:
            raise ValueError(
                "the original forecasts one patch at each: num_output_patches must be 1"
            )
        norm_weight = bool(fields.get("norm_include_weight", False))
        qk_norm_weight = fields.get("qk_norm_include_weight")
        return cls.of(
            fields["patch_size"],
            d,
            heads,
            layers=layers,
            d_ff=fields.get("d_ff") or (int(8 * d / 3) + 7) // 8 * 8,
            kv_heads=fields.get("num_groups") or heads,
            qk_dim=fields.get("qk_dim") or None,
            v_dim=fields.get("v_dim") or None,
            group_size=fields.get("layer_group_size"),
            variate_layers=fields.get("num_variate_layers_per_group", 1),
            variate_first=fields.get("variate_layer_first", False),
            attn_bias=fields.get("attn_bias", True),
            mlp_bias=fields.get("mlp_bias", False),
            norm_weight=norm_weight,
            qk_norm=fields.get("qk_norm", False),
            qk_norm_weight=norm_weight if qk_norm_weight is None else qk_norm_weight,
            per_dim_scale=fields.get("per_dim_scale", True),
            xpos=fields.get("use_xpos", True),
            norm_eps=float(fields.get("norm_eps", 1e-4)),
            residual_mult=float(fields.get("residual_mult", 0.75)),
            residual_ratio=float(fields.get("residual_attn_ratio", cls.residual_ratio)),
        )

    def tau(self, layer: int, branch: Literal["attn", "mlp"]) -> float:
        """The weight of a branch beside the stream, in a model of this depth."""
        r = self.residual_ratio
        of_mlp = self.residual_mult * math.sqrt(2 / (1 + r * r))
        of_attn = r * of_mlp
        i = 2 * layer + (branch == "mlp")
        before = (i + 1) // 2 * of_attn**2 + i // 2 * of_mlp**2
        return (of_mlp if branch == "mlp" else of_attn) / math.sqrt(len(self.layers) + before)


def kinds_of(
    layers: int, group_size: int, variate_layers: int, variate_first: bool
) -> tuple[Kind, ...]:
    """The axis that each layer attends over: variates in the last (or first) few layers of every
    group, time in the others.
    """
    kinds: list[Kind] = []
    for i in range(layers):
        place = i % max(group_size, 1)
        first = place < variate_layers
        last = place >= group_size - variate_layers
        kinds.append("variate" if (first if variate_first else last) else "time")
    return tuple(kinds)


# Sizes of the paper's table. The one layer over variates is the last; of 22m, 313m and 1B that is
# assumed, as a published config.json was at hand of none of them.
PRESETS = {
    "Datadog/Toto-2.0-4m": Toto2Config.of(32, 256, 4, layers=4, d_ff=688),
    "Datadog/Toto-2.0-22m": Toto2Config.of(32, 512, 8, layers=6, d_ff=1368),
    "Datadog/Toto-2.0-313m": Toto2Config.of(32, 1024, 16, layers=24, d_ff=2736),
    "Datadog/Toto-2.0-1B": Toto2Config.of(32, 1536, 24, layers=36, d_ff=4096, norm_eps=5e-4),
    "Datadog/Toto-2.0-2.5B": Toto2Config.of(32, 2048, 32, layers=48, d_ff=5464, norm_eps=5e-4),
    # ours, small enough to ship and to train on a laptop: series by series, and patches as long as
    # the forecast (see `moirai2-mini`)
    "toto2-mini": Toto2Config.of(
        96, 128, 4, layers=4, d_ff=256, variate_layers=0, window=672, span=1
    ),
}


# --- the scale


def _moments(pivot: jax.Array, n: jax.Array, sums: pairs.Pair) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of n values.

    sums: [2, ...], of their distances to a pivot and of the squares of these.
    """
    distances, squares = (sums[0][0], sums[1][0]), (sums[0][1], sums[1][1])
    mean = pairs.over(distances, jnp.maximum(n, 1.0))
    high, low = pairs.two_sum(pivot, mean[0])
    loc = jnp.where(n > 0, high + (low + mean[1]), 0.0)
    less = pairs.times(distances, mean)
    around = pairs.plus(squares, (-less[0], -less[1]))
    around = jnp.maximum(around[0] + around[1], 0.0)
    return loc, jnp.maximum(jnp.sqrt(around / jnp.maximum(n - 1, 1.0)), FLAT_SCALE)


def _where(there: jax.Array, x: pairs.Pair) -> pairs.Pair:
    return jnp.where(there, x[0], 0.0), jnp.where(there, x[1], 0.0)


def causal_scale(
    x_BVSP: jax.Array, visible_BVSP: jax.Array, min_observed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation (of n values, with n - 1) [B, V, S] of what is visible up to the end of
    each patch.

    The sums are as exact as in float64, with float32 arithmetic: what is summed are the distances
    to the first visible value, as pairs of float32. A series without any value so far has 0 and
    FLAT_SCALE.

    min_observed: patches with fewer values so far get the numbers of the first so many.
    """
    b, v, s, p = x_BVSP.shape
    x_BVSP = jax.lax.stop_gradient(x_BVSP)
    flat = visible_BVSP.reshape(b, v, s * p)
    first = jnp.argmax(flat, axis=-1, keepdims=True)
    pivot_BV1 = jnp.take_along_axis(x_BVSP.reshape(b, v, s * p), first, axis=-1)

    # What is summed, [2, B, V, S, P] of each half of a pair: distances, and their squares.
    distance = pairs.two_sum(x_BVSP, jnp.broadcast_to(-pivot_BV1[..., None], x_BVSP.shape))
    squares = pairs.times(distance, distance)
    terms = jnp.stack([distance[0], squares[0]]), jnp.stack([distance[1], squares[1]])
    terms = _where(visible_BVSP[None], terms)
    running = jax.lax.associative_scan(pairs.plus, pairs.total(terms), axis=3)
    n_BVS = jnp.cumsum(visible_BVSP.sum(-1).astype(jnp.float32), axis=-1)
    loc_BVS, scale_BVS = _moments(pivot_BV1, n_BVS, running)

    if min_observed:
        early = visible_BVSP & (jnp.cumsum(flat, axis=-1).reshape(b, v, s, p) <= min_observed)
        high, low = pairs.total(pairs.total(_where(early[None], terms)))
        count_BV1 = early.sum((-2, -1)).astype(jnp.float32)[..., None]
        loc_BV1, scale_BV1 = _moments(pivot_BV1, count_BV1, (high[..., None], low[..., None]))
        few_BVS = n_BVS < min_observed
        loc_BVS = jnp.where(few_BVS, loc_BV1, loc_BVS)
        scale_BVS = jnp.where(few_BVS, scale_BV1, scale_BVS)
    return jax.lax.stop_gradient((loc_BVS, scale_BVS))


# --- factors that stand in one direction alone: the original's backward pass is made of them


@jax.custom_vjp
def times_forward(x: jax.Array, factor: Any) -> jax.Array:
    """x times a number, in the dtype of x, with the gradient of x."""
    return (x * factor).astype(x.dtype)


times_forward.defvjp(
    lambda x, factor: ((x * factor).astype(x.dtype), factor),
    lambda factor, g: (g, jnp.zeros_like(factor)),
)


@jax.custom_vjp
def times_backward(x: jax.Array, factor: Any) -> jax.Array:
    """x, with a gradient times a number."""
    return x


times_backward.defvjp(
    lambda x, factor: (x, factor),
    lambda factor, g: ((g * factor).astype(g.dtype), jnp.zeros_like(factor)),
)


# --- the network


def entering(x: jax.Array, tau: jax.Array, umup: bool) -> jax.Array:
    """Give a branch its input: there the original applies the factor that its gradient has."""
    return times_backward(x, tau * jax.lax.rsqrt(1 + tau * tau)) if umup else x


def leaving(x: jax.Array, y: jax.Array, tau: jax.Array, umup: bool) -> jax.Array:
    """(tau y + x) / sqrt(1 + tau^2): the stream x with what a branch made of it."""
    rest = jax.lax.rsqrt(1 + tau * tau)
    y = times_forward(y, tau * rest) if umup else y * (tau * rest)
    return (y + x * rest).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A linear in unit scaling: (W x + b) / sqrt(fan_in), of a readout (W x + b) / fan_in.

    backward: of the original's gradient of x the factor; that of W and b is 1 / sqrt(rows).
    """

    forward: float
    backward: float
    umup: bool

    @classmethod
    def of(
        cls, cfg: Toto2Config, fan_in: int, fan_out: int | None = None, readout: bool = False
    ) -> "Scaled":
        """fan_out: where the original scales the gradient of x by it, and not by fan_in."""
        backward = (fan_in if fan_out is None else fan_out) ** -0.5
        return cls(1 / fan_in if readout else fan_in**-0.5, backward, cfg.gradient == "umup")

    def __call__(self, linear: Linear, x: jax.Array) -> jax.Array:
        """Apply a linear to x."""
        if not self.umup:
            return linear(x) * self.forward
        rows = math.prod(x.shape[: x.ndim - len(linear.inputs)])
        y = linear(times_backward(x, self.backward * math.sqrt(rows)))
        return times_forward(times_backward(y, rows**-0.5), self.forward)


class Norm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` over the last axis, in float32; times `scale` where there is
    one.
    """

    eps: float
    weight: bool
    umup: bool

    @nn.compact
    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        if self.weight:
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
            if self.umup:
                scale = times_backward(scale, math.sqrt(x.shape[-1] / x.size))
            wide = wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return wide.astype(x.dtype)


class Residual(nn.Module):
    """`(out(k silu(hidden(x))) + residual(x)) / sqrt(2)`, and the named steps; readout: the
    head's.
    """

    cfg: Toto2Config
    inputs: int
    outputs: int
    readout: bool

    @nn.compact
    def __call__(self, x):
        cfg, into, out, taps = self.cfg, (self.inputs,), (self.outputs,), {}
        inner = 4 * cfg.d_model
        hidden_fan = None if self.readout else inner
        out_fan = self.outputs if self.readout else None
        first = Scaled.of(cfg, self.inputs, hidden_fan)
        second = Scaled.of(cfg, inner, out_fan, readout=self.readout)
        beside = Scaled.of(cfg, self.inputs, self.outputs, readout=self.readout)
        half = 2**-0.5
        umup = cfg.gradient == "umup"
        # Factors of a sum are applied to the original's gradient where it leaves the branches.
        x = times_backward(x, half) if umup else x
        taps["hidden"] = first(Linear(into, (inner,), name="hidden"), x)
        taps["out"] = second(Linear((inner,), out, name="out"), GAIN * nn.silu(taps["hidden"]))
        taps["residual"] = beside(Linear(into, out, name="residual"), x)
        both = taps["out"] + taps["residual"]
        return times_forward(both, half) if umup else both * half, taps


def turned(x: jax.Array, positions: jax.Array, center: Any, sign: int, xpos: bool) -> jax.Array:
    """Rotate neighbouring pairs of the last axis by position, and let keys decay with distance
    (xPos).

    Pair i of queries (sign 1) is also multiplied with b_i^((position - center) / 256), of keys
    (sign -1) divided by it, b_i = (2i + 0.4 w) / (1.4 w), w the length of the axis.

    positions: integers that broadcast to x without its last axis.
    Source: Sun et al., "A Length-Extrapolatable Transformer" (arXiv 2212.10554).
    """
    w = x.shape[-1]
    y = rotary(x, positions, base=ROPE_BASE, pairs="adjacent")
    if not xpos:
        return y
    decay = np.log((np.arange(0, w, 2) + 0.4 * w) / (1.4 * w)).astype(np.float32)
    decay = np.repeat(decay, 2).reshape((1,) * positions.ndim + (w,))
    power = (positions - center).astype(jnp.float32)[..., None] * (sign / XPOS_BASE)
    return (y.astype(jnp.float32) * jnp.exp(power * decay)).astype(x.dtype)


class Attention(nn.Module):
    """Attention over the last axis but one of x [A, B, N, D], and the named steps, keys and values.

    seen: which keys each query sees, broadcast to [A, B, 1, N, S]. places: positions [N] and their
    center where positions count, else None. cache: keys and values before these.
    """

    cfg: Toto2Config
    dims: HeadDims

    @nn.compact
    def __call__(self, x_ABND, seen, places, cache: Cache | None):
        cfg, dims, taps, umup = self.cfg, self.dims, {}, self.cfg.gradient == "umup"
        scaled = Scaled.of(cfg, cfg.d_model)
        project = {}
        for name, shape in dims.shapes.items():
            linear = Linear((cfg.d_model,), shape, cfg.attn_bias, name=name)
            taps[name] = scaled(linear, x_ABND)
            project[name] = jnp.swapaxes(taps[name], 2, 3)
        q_ABHNK, k_ABGNK, v_ABGNV = project["q"], project["k"], project["v"]
        if cfg.qk_norm:
            q_ABHNK = Norm(cfg.norm_eps, cfg.qk_norm_weight, umup, name="q_norm")(q_ABHNK)
            k_ABGNK = Norm(cfg.norm_eps, cfg.qk_norm_weight, umup, name="k_norm")(k_ABGNK)
        if cfg.per_dim_scale:
            scaling_K = self.param("scaling", nn.initializers.zeros, (cfg.qk_dim,))
            if umup:
                factor = 2 * math.log(2) * math.sqrt(cfg.qk_dim / max(q_ABHNK.size, 1))
                scaling_K = times_backward(scaling_K, factor)
            scaling_K = (nn.softplus(scaling_K) / math.log(2)).astype(q_ABHNK.dtype)
            q_ABHNK = q_ABHNK * scaling_K.reshape(1, 1, 1, 1, -1)
        taps["q_scaled"] = q_ABHNK
        if places is not None:
            q_ABHNK, k_ABGNK = self._turned(q_ABHNK, places, 1), self._turned(k_ABGNK, places, -1)
            taps["q_turned"], taps["k_turned"] = q_ABHNK, k_ABGNK
        own = k_ABGNK, v_ABGNV
        if cache is not None:
            k_ABGNK, v_ABGNV = (
                jnp.concatenate([old.astype(new.dtype), new], axis=3)
                for old, new in zip(cache, own, strict=True)
            )
        if dims.key_heads != dims.heads:
            shared = dims.heads // max(dims.key_heads, 1)
            k_ABGNK, v_ABGNV = (jnp.repeat(y, shared, axis=2) for y in (k_ABGNK, v_ABGNV))
        # Every token sees itself, so that no row is all hidden.
        y_ABHNV, _ = attend(
            q_ABHNK, k_ABGNK, v_ABGNV, seen=seen, scale=1 / cfg.qk_dim, hidden=-jnp.inf
        )
        y_ABNHV = jnp.swapaxes(y_ABHNV, 2, 3)
        taps["mixed"] = y_ABNHV
        out = Linear(dims.joined, (cfg.d_model,), cfg.attn_bias, name="out")
        return Scaled.of(cfg, cfg.attn_width)(out, y_ABNHV), own, taps

    def _turned(self, x_ABHNK, places, sign: int):
        """The first half of each head, turned; the other half as it is."""
        positions_N, center = places
        half = self.cfg.qk_dim // 2
        positions = positions_N.reshape(1, 1, 1, -1)
        first = turned(x_ABHNK[..., :half], positions, center, sign=sign, xpos=self.cfg.xpos)
        return jnp.concatenate([first, x_ABHNK[..., half:]], axis=-1)


class Layer(nn.Module):
    """x [B, V, S, D] through attention, over time or over variates, and feed-forward.

    Returns: x, the named steps, and the keys and values of attention over time (else None).
    """

    cfg: Toto2Config
    layer: int

    @nn.compact
    def __call__(self, x_BVSD, seen_BVSS, seen_BSVV, places, cache: Cache | None):
        cfg, i, umup = self.cfg, self.layer, self.cfg.gradient == "umup"
        dims, taps, own = cfg.layers[i], {}, None

        tau = self._tau("attn")
        norm = Norm(cfg.norm_eps, cfg.norm_weight, umup, name="norm1")
        y_BVSD = taps["norm1"] = norm(entering(x_BVSD, tau, umup))
        attention = Attention(cfg, dims.attn, name=dims.kind)
        if dims.kind == "time":
            y_BVSD, own, inner = attention(y_BVSD, seen_BVSS, places, cache=cache)
        else:
            y_BSVD, _, inner = attention(jnp.swapaxes(y_BVSD, 1, 2), seen_BSVV, None, cache=None)
            y_BVSD = jnp.swapaxes(y_BSVD, 1, 2)
        taps |= inner | {"attn": y_BVSD}
        x_BVSD = taps["after_attn"] = leaving(x_BVSD, y_BVSD, tau, umup=umup)

        tau = self._tau("mlp")
        norm = Norm(cfg.norm_eps, cfg.norm_weight, umup, name="norm2")
        y_BVSD = taps["norm2"] = norm(entering(x_BVSD, tau, umup))
        into, hidden = (cfg.d_model,), (dims.ffn,)
        scaled = Scaled.of(cfg, cfg.d_model, 2 * cfg.ffn_width)
        taps["up"] = scaled(Linear(into, hidden, cfg.mlp_bias, name="up"), y_BVSD)
        taps["gate"] = scaled(Linear(into, hidden, cfg.mlp_bias, name="gate"), y_BVSD)
        taps["gated"] = taps["up"] * nn.silu(taps["gate"])
        scaled = Scaled.of(cfg, cfg.ffn_width, cfg.d_model)
        y_BVSD = taps["down"] = scaled(
            Linear(hidden, into, cfg.mlp_bias, name="down"), taps["gated"]
        )
        return leaving(x_BVSD, y_BVSD, tau, umup=umup), taps, own

    def _tau(self, branch: Literal["attn", "mlp"]) -> jax.Array:
        init = nn.initializers.constant(self.cfg.tau(self.layer, branch))
        return self.param(f"{branch}_tau", init, ())


class Toto2Net(nn.Module):
    """Tokens [B, V, S, 2P] -> quantiles [B, V, n, P, Q] of the patch after each, in arcsinh units.

    seen_BVSS: which tokens see each other in time, [B, V, S, S] or, with caches, [B, V, S, M + S].
    seen_BSVV: which variates see each other at each patch.
    places: positions [S] and the center of xPos.
    caches: of each layer, with M keys; None for layers over variates.
    only: the tokens whose quantiles are asked for, all by default.
    lean: for a forecast, without the steps inside the layers.
    whole: see `layers.shortcuts`.
    Returns: quantiles, caches of these tokens by layer (none of a lean pass without caches), and
      the named steps.
    """

    cfg: Toto2Config
    shortens: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self,
        p_BVSI,
        seen_BVSS,
        seen_BSVV,
        places,
        caches: Sequence[Cache | None] | None = None,
        only: slice = slice(None),
        lean: bool = False,
        whole: bool = False,
    ):
        cfg, taps, kept = self.cfg, {"patches": p_BVSI}, []
        embed = Residual(cfg, 2 * cfg.patch_len, cfg.d_model, readout=False, name="embed")
        x_BVSD, inner = embed(p_BVSI)
        taps |= nested("embed", inner, x_BVSD)
        seen = seen_BVSS[:, :, None], seen_BSVV[:, :, None]
        looped = loops(self, lean, False, whole=whole) and caches is None
        if looped:

            def layer(i, params, x_BVSD):
                own = Layer(cfg, i, parent=None)
                return own.apply({"params": params}, x_BVSD, *seen, places, None)[0]

            runs = equal_runs(cfg.layers)
            x_BVSD = through_layers(layer, self.variables["params"], x_BVSD, runs=runs)
        for i in range(0 if looped else len(cfg.layers)):
            cache = None if caches is None else caches[i]
            x_BVSD, inner, own = Layer(cfg, i, name=f"layer_{i}")(x_BVSD, *seen, places, cache)
            taps |= nested(f"layer_{i}", inner, x_BVSD)
            kept.append(own)
        norm = Norm(cfg.norm_eps, cfg.norm_weight, cfg.gradient == "umup", name="norm")
        x_BVSD = taps["norm"] = norm(x_BVSD)
        outputs = cfg.patch_len * len(LEVELS)
        head = Residual(cfg, cfg.d_model, outputs, readout=True, name="head")
        y_BVSO, inner = head(x_BVSD[:, :, only])
        taps |= nested("head", inner, y_BVSO)
        shape = (*y_BVSO.shape[:3], cfg.patch_len, len(LEVELS))
        return y_BVSO.astype(jnp.float32).reshape(shape), kept, taps


@dataclasses.dataclass(frozen=True)
class Toto2(Model):
    """Toto 2.0 at one size. See the module docstring; `Model` documents the methods."""

    config: Toto2Config

    family = "toto_2"
    published = PRESETS
    unit_scaled = True
    tasks = ("forecasting",)
    licence = "Apache-2.0 (Datadog/Toto-2.0)"
    shard_rules = (
        (r"^embed/(hidden|residual)/kernel$", (None, "fsdp")),
        (r"^embed/out/kernel$", ("tensor", "fsdp")),
        (r"^head/hidden/kernel$", ("fsdp", "tensor")),
        (r"^head/(out|residual)/kernel$", ("fsdp", None)),
        (r"_tau$", ()),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (
        Group.heads("time", "attn"),
        Group.heads("variate", "attn", swapped=True),
        Group.units(),
    )

    @property
    def missing_in_front(self) -> bool:
        """Whether steps in front of a series do not exist."""
        return self.config.front == "missing"

    @classmethod
    def small(cls) -> Toto2Config:
        # Norms with weights, biases everywhere and a larger share of the branches than the
        # published have.
        more = {"norm_weight": True, "mlp_bias": True, "residual_mult": 2.0, "residual_ratio": 2.0}
        return Toto2Config.of(8, 16, 2, layers=2, d_ff=24, window=56, span=2, **more)

    @property
    def covariates(self) -> frozenset[str]:
        """None where no layer attends over variates: nothing would read them."""
        return COVARIATES if self.variates == "joint" else frozenset()

    @property
    def fixed(self) -> str | None:
        return r"_tau$"

    @property
    def variates(self) -> Literal["independent", "joint"]:
        """Joint where a layer attends over variates; without one, each is forecast by itself."""
        joint = any(layer.kind == "variate" for layer in self.config.layers)
        return "joint" if joint else "independent"

    @property
    def context_len(self) -> int:
        """The window less a forecast of `horizon`; shorter horizons read a longer context."""
        cfg = self.config
        return max(cfg.patch_len, cfg.window - (cfg.span - 1) * cfg.patch_len)

    @property
    def horizon(self) -> int:
        """The longest stretch that training hides. One pass reaches any horizon, beyond this one
        without practice.
        """
        return self.config.span * self.config.patch_len

    @property
    def eval_batch(self) -> int:
        """Windows of ten variates whose activations fit."""
        cfg = self.config
        tokens = cfg.window // cfg.patch_len + cfg.span
        widest = max(max(dims.ffn, dims.attn.heads * tokens) for dims in cfg.layers)
        wide = max(widest, 4 * cfg.d_model)
        return windows_that_fit(40 * tokens * wide)

    def init(self, key: jax.Array) -> Tree:
        """Draw N(0, 1) for weight matrices; see the module docstring for what that means."""
        cfg = self.config
        patch = jax.ShapeDtypeStruct((1, 1, 1, 2 * cfg.patch_len), jnp.float32)
        seen = jax.ShapeDtypeStruct((1, 1, 1, 1), bool)
        places = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        shapes = parameter_shapes(Toto2Net(cfg), key, patch, seen, seen, places)

        def rule(path, shape):
            if path.endswith("_tau"):
                layer, _, name = path.partition("/")
                branch = "attn" if name == "attn_tau" else "mlp"
                return Constant(cfg.tau(int(layer.removeprefix("layer_")), branch))
            if path.endswith("/kernel"):
                return Normal(1.0)
            return Constant(1.0 if path.endswith("/scale") else 0.0)

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = (
            "none is published for fine-tuning: a tenth of the paper's AdamW rate (0.012, arXiv "
            "2605.20119), divided by sqrt(inputs) of the layers as u-muP has it; the paper's clip "
            "of 7"
        )
        rate = 0.1 * 0.012 / math.sqrt(self.config.d_model)
        context, horizon = min(self.context_len, 2048), min(self.horizon, 96)
        return self._recipe(
            lr=rate,
            batch_size=32,
            epochs=1,
            schedule="cosine",
            context_len=context,
            horizon=horizon,
            source=source,
            clip=7.0,
        )

    # --- one pass over patches

    def apply(
        self,
        params: Tree,
        x_BVT: jax.Array,
        observed_BVT: jax.Array | None = None,
        *,
        shown_BVT: jax.Array | None = None,
        ids_BV: jax.Array | None = None,
        min_observed: int = 0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Quantiles [B, V, S, P, Q] of the patch after each, in arcsinh units, unsorted; and the
        named steps.

        The quantiles after patch i are in the scale of patch i, `loc` and `scale` [B, V, S] of the
        named steps.

        Args:
          x_BVT: whole patches; finite where not observed.
          observed_BVT: booleans, all by default.
          shown_BVT: False for what is hidden in training (contiguous patch masking); all True by
            default.
          ids_BV: the group of each variate; all of one by default.
          min_observed: see `causal_scale`.
        Raises: ValueError for T that is not whole patches.
        """
        b, v, _ = x_BVT.shape
        observed = jnp.ones(x_BVT.shape, bool) if observed_BVT is None else observed_BVT
        shown = jnp.ones(x_BVT.shape, bool) if shown_BVT is None else shown_BVT
        ids = jnp.zeros((b, v), jnp.int32) if ids_BV is None else ids_BV.astype(jnp.int32)
        x, observed, shown = (
            self._patches(y) for y in (x_BVT.astype(jnp.float32), observed, shown)
        )
        tokens, loc, scale = self._tokens(x, observed & shown, min_observed)
        there = observed.any(-1) | ~shown.all(-1)
        groups_BVS = jnp.where(there, ids[..., None], NOWHERE)
        y, _, taps = self._network(params, tokens, groups_BVS)
        return y, taps | {"loc": loc, "scale": scale}

    def _patches(self, x_BVT):
        p = self.config.patch_len
        if x_BVT.shape[-1] % p:
            raise ValueError(
                f"whole patches of {p} time steps are taken, got {x_BVT.shape[-1]} steps"
            )
        return x_BVT.reshape(*x_BVT.shape[:2], -1, p)

    def _tokens(self, x_BVSP, visible_BVSP, min_observed: int):
        """Inputs of the tokens [B, V, S, 2P], and the mean and scale [B, V, S] of each."""
        loc, scale = causal_scale(x_BVSP, visible_BVSP, min_observed)
        z_BVSP = jnp.arcsinh((x_BVSP - loc[..., None]) / scale[..., None])
        z_BVSP = jnp.where(visible_BVSP, z_BVSP, 0.0)
        return jnp.concatenate([z_BVSP, 1.0 - visible_BVSP], axis=-1), loc, scale

    def _network(
        self, params: Tree, tokens, groups_BVS, only: slice = slice(None), lean: bool = False
    ):
        """A pass without caches: tokens see those before them of their own group, and their group's
        at their patch.
        """
        s = tokens.shape[2]
        seen_BVSS = groups_BVS[..., :, None] == groups_BVS[..., None, :]
        seen_BVSS = seen_BVSS & jnp.tril(jnp.ones((s, s), bool))[None, None]
        places = np.arange(s), s // 2
        inputs = (tokens, seen_BVSS, _together(groups_BVS), places)
        return run_network(Toto2Net(self.config), params, *inputs, only=only, lean=lean)

    def sequence_loss(
        self,
        params: Tree,
        x_BVT: jax.Array,
        observed_BVT: jax.Array | None = None,
        *,
        shown_BVT: jax.Array | None = None,
        ids_BV: jax.Array | None = None,
        counts_BV: jax.Array | None = None,
        min_observed: int = 0,
        batch: Batch | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean pinball loss of every observed value behind the first patch, in arcsinh units, and
        the named steps.

        Each patch is predicted, in its scale, by the one before it, where anything of the series
        was visible up to there. Arguments as of `apply`; counts_BV: weights of variates. batch:
        with weights of rows.
        Source: the paper's training loss; the package has none.
        """
        y, taps = self.apply(
            params,
            x_BVT,
            observed_BVT,
            shown_BVT=shown_BVT,
            ids_BV=ids_BV,
            min_observed=min_observed,
        )
        observed = jnp.ones(x_BVT.shape, bool) if observed_BVT is None else observed_BVT
        visible = observed if shown_BVT is None else observed & shown_BVT
        x, observed, visible = (
            self._patches(a) for a in (x_BVT.astype(jnp.float32), observed, visible)
        )
        z = jnp.arcsinh(
            (x[:, :, 1:] - taps["loc"][:, :, :-1, None]) / taps["scale"][:, :, :-1, None]
        )
        begun = jnp.cumsum(visible.any(-1), axis=-1)[:, :, :-1] > 0
        weight = (observed[:, :, 1:] & begun[..., None]).astype(jnp.float32)
        if counts_BV is not None:
            weight = weight * counts_BV[..., None, None]
        z = jnp.where(weight > 0, z, 0.0)
        error = pinball(z, y[:, :, :-1], LEVELS).mean(-1)
        loss = mean_observed(error, weight, {} if batch is None else batch)
        return loss, taps | {"quantiles": y, "target": z, "weight": weight}

    # --- forecasts

    def forecast(
        self,
        params: Tree,
        x_BVT: jax.Array,
        observed_BVT: jax.Array,
        horizon: int,
        *,
        ids_BV: jax.Array | None = None,
        known_BET: jax.Array | None = None,
        known_observed_BET: jax.Array | None = None,
        known_ids_BE: jax.Array | None = None,
        block_len: int | None = None,
        min_observed: int = 0,
        cap: float = 0.0,
        lean: bool = False,
        taps: list[dict[str, jax.Array]] | None = None,
    ) -> jax.Array:
        """Quantiles [B, V, H, Q] of the steps after whole patches, in order, in the units of x.

        Args:
          x_BVT: whole patches, finite where not observed; the last one should be all observed, as
            the original counts it. observed_BVT: booleans.
          ids_BV: the group of each variate; all of one by default.
          known_BET: further variates that are known up to the end of the horizon, [B, E, T + H],
            with known_observed_BET, and their groups.
          block_len: steps of one pass, whole patches; None is all. After each pass its medians are
            part of the series; keys and values of what came before are kept as they were made.
          min_observed: see `causal_scale`. lean: see `Toto2Net`.
          cap: deviations at the end of the context that a quantile may leave its range by.
          taps: a list to which the steps of each pass are added; without a loop over blocks.
        """
        p, (b, v, t) = self.config.patch_len, x_BVT.shape
        n, ahead = t // p, -(-horizon // p)
        block = ahead if block_len is None else min(block_len // p, ahead)
        rounds = -(-ahead // block)
        ids = jnp.zeros((b, v), jnp.int32) if ids_BV is None else ids_BV.astype(jnp.int32)

        # All that will ever be read: the context, the known future, and room for what is decoded.
        more = ((0, 0), (0, 0), (0, rounds * block * p))
        x, observed = jnp.pad(x_BVT.astype(jnp.float32), more), jnp.pad(observed_BVT, more)
        if known_BET is not None:
            known = _known_ahead(known_BET, known_observed_BET, known_ids_BE, length=x.shape[-1])
            x, observed, ids = (
                jnp.concatenate(both, axis=1) for both in zip((x, observed, ids), known)
            )
        x_BVSP, seen_BVSP = self._patches(x), self._patches(observed)

        # Patches of the future are of their group, and so is the last one of the context, whatever
        # is known of them.
        there_BVS = seen_BVSP.any(-1) | (np.arange(x_BVSP.shape[2]) >= n - 1)[None, None]
        groups_BVS = jnp.where(there_BVS, ids[..., None], NOWHERE)

        # The first pass: the context and the first block.
        first = n + block
        inputs = (x_BVSP[:, :, :first], seen_BVSP[:, :, :first], min_observed)
        tokens, loc, scale = self._tokens(*inputs)
        passes = Passes(
            targets=v,
            context=n,
            ahead=ahead,
            block=block,
            rounds=rounds,
            min_observed=min_observed,
            there_BVS=there_BVS,
            groups_BVS=groups_BVS,
            bounds_BV=_range(x_BVT, observed_BVT, cap * scale[:, :v, n - 1]) if cap else None,
        )
        own_groups, only = groups_BVS[:, :, :first], slice(n - 1, first - 1)
        y, own, steps = self._network(
            params, tokens, own_groups, only=only, lean=lean and rounds == 1
        )
        found = passes.real(y, loc, scale, last=n - 1)
        if taps is not None:
            taps.append(steps | {"groups": own_groups})

        if rounds > 1:
            state = (x_BVSP, seen_BVSP, passes.caches(own), found)
            later = self._later_blocks(params, passes, state, taps=taps)
            found = jnp.concatenate([found, later], axis=2)
        return found.reshape(b, v, -1, len(LEVELS))[:, :, :horizon]

    def _later_blocks(self, params: Tree, passes: "Passes", state, taps: list | None) -> jax.Array:
        """Quantiles [B, V, M, P, Q] of all blocks behind the first one; state: as of `_again`."""
        starts = passes.context + passes.block * np.arange(passes.rounds - 1)

        def step(state, start):
            state, steps = self._again(params, passes, state, start=start)
            return state, (state[-1], steps)

        if taps is None:
            # The named steps are not asked for, and the compiler leaves out what is not returned.
            def lean_step(state, start):
                state, (block_BVNPQ, _) = step(state, start)
                return state, block_BVNPQ

            _, later = jax.lax.scan(lean_step, state, starts)
        else:
            found = []
            for start in starts:
                state, (block_BVNPQ, steps) = step(state, start)
                found.append(block_BVNPQ)
                taps.append(steps | {"groups": passes.groups_BVS[:, :, : 2 * passes.block]})
            later = jnp.stack(found)
        return end_to_end(later)

    def _again(self, params: Tree, passes: "Passes", state, start):
        """Commit the block at patch `start`, and decode the next.

        state: patches of the whole series, which of their values are observed, caches, and the
        quantiles of the block. Returns: the next state, and the named steps.
        """
        x_BVSP, seen_BVSP, caches, block_BVNPQ = state
        p, block, both = self.config.patch_len, passes.block, 2 * passes.block

        # The medians are part of the series from now on, and the scale counts them.
        place = (0, 0, start, 0)
        x_BVSP = jax.lax.dynamic_update_slice(x_BVSP, block_BVNPQ[..., MEDIAN], place)
        there = jnp.ones(block_BVNPQ.shape[:-1], bool)
        seen_BVSP = jax.lax.dynamic_update_slice(seen_BVSP, there, place)
        tokens, loc, scale = self._tokens(x_BVSP, seen_BVSP, passes.min_observed)
        tokens = jax.lax.dynamic_slice_in_dim(tokens, start, both, axis=2)

        # What is committed counts as observed, also holes of known covariates.
        committed_SI = (np.arange(both) < block)[:, None] & (np.arange(2 * p) >= p)[None]
        tokens = jnp.where(committed_SI[None, None], 0.0, tokens)

        # xPos has its center in the middle of all positions of a pass, of which the last may have
        # fewer.
        end = jnp.minimum(start + both, passes.context + passes.ahead)
        places = start + jnp.arange(both), end // 2
        # The original takes the groups of later passes from the start of the context.
        seen_BSVV = _together(passes.groups_BVS[:, :, :both])
        inputs = (tokens, passes.seen(start), seen_BSVV, places, caches)
        only = slice(block - 1, both - 1)
        y, own, steps = run_network(Toto2Net(self.config), params, *inputs, only=only)

        kept = []
        for old, new in zip(caches, own, strict=True):
            # Layers over variates have no cache.
            kept.append(
                None if old is None or new is None else _written(old, new, block, start=start)
            )
        block_BVNPQ = passes.real(y, loc, scale, last=start + block - 1)
        return (x_BVSP, seen_BVSP, kept, block_BVNPQ), steps

    # --- series with missing values

    def prepare(self, context: jax.Array, horizon: int) -> tuple[jax.Array, jax.Array]:
        """The newest whole patches [B, V, T'] of a context with NaN: without NaN, and which steps
        are observed.

        As the original's GluonTS wrapper does it: the context and all forecast patches but one are
        `window` long at most; missing values are filled (`fill`) and count as missing, but for
        those of the last patch. There, what lies in front of the first value is missing, unless
        `front` says otherwise.
        """
        cfg, p = self.config, self.config.patch_len
        x = jnp.asarray(context, jnp.float32)
        observed = ~jnp.isnan(x)
        begun = jnp.cumsum(observed, axis=-1) > 0
        if cfg.fill == "last":
            filled = fill_missing(x)
        elif cfg.fill == "linear":
            filled, _ = interpolate_missing(x)
        else:
            filled = jnp.nan_to_num(x)
        filled = jnp.where(begun, filled, 0.0)
        rest = cfg.window - (-(-horizon // p) - 1) * p
        length = max(p, rest // p * p)
        pad = ((0, 0), (0, 0), (-x.shape[-1] % p, 0))
        filled, observed, begun = (
            jnp.pad(y, pad)[..., -length:] for y in (filled, observed, begun)
        )
        last = (np.arange(filled.shape[-1]) >= filled.shape[-1] - p)[None, None]
        forced = begun if cfg.front == "missing" else jnp.ones_like(begun)
        return filled, observed | (last & forced)

    def _known(
        self, known: jax.Array, t: int, length: int, steps: int
    ) -> tuple[jax.Array, jax.Array]:
        """Covariates that are known ahead, with `length` steps of past: values and which of them
        are known.
        """
        known = jnp.asarray(known, jnp.float32)
        known = known[..., max(t - length, 0) : t + steps]
        front = length + steps - known.shape[-1]
        known = jnp.pad(known, ((0, 0), (0, 0), (max(front, 0), 0)), constant_values=jnp.nan)
        return jnp.nan_to_num(known), ~jnp.isnan(known)

    def _rolled(self, params: Tree, context, horizon: int, past, known, lean: bool) -> jax.Array:
        """Quantiles [B, C, H, Q] after a context with missing values, by the options of the
        config.
        """
        cfg, c = self.config, context.shape[1]
        members = context
        if past is not None:
            members = jnp.concatenate([context, jnp.asarray(past, jnp.float32)], axis=1)
        x, observed = self.prepare(members, horizon)
        more = {}
        if known is not None:
            t, length = context.shape[-1], x.shape[-1]
            more["known_BET"], more["known_observed_BET"] = self._known(
                known, t, length, steps=horizon
            )
        y_BVHQ = self.forecast(
            params,
            x,
            observed,
            horizon=horizon,
            block_len=cfg.block_len,
            min_observed=cfg.min_observed,
            cap=cfg.cap,
            lean=lean,
            **more,
        )
        return y_BVHQ[:, :c]

    def predict_with(
        self, params: Tree, context, horizon: int, *, past=None, known=None, key=None
    ) -> Forecast:
        """All variates of a row see each other. Point: the median. `prepare`: missing values.

        Covariates are further variates of each row, behind the targets, as in the original.
        A patch is forecast by the token before it: what is known of the future helps from its next
        patch on.
        """
        check_context(context, horizon)
        x = jnp.asarray(context, jnp.float32)
        y_BCHQ = self._rolled(params, x, horizon, past=past, known=known, lean=True)
        return Forecast(y_BCHQ[..., MEDIAN], y_BCHQ, levels=LEVELS)

    # --- training

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """`sequence_loss` of context and target, of which the target is hidden as in a forecast.

        So every patch of the context is predicted from those before it, and the target from the
        context alone. Training hides random stretches of up to `span` patches; here it is the one
        that is to be forecast. Covariates of the batch are further variates, which are not
        predicted.
        """
        cfg, (_, c, t) = self.config, batch["context"].shape
        steps = batch["target"].shape[-1]
        ahead = -(-steps // cfg.patch_len) * cfg.patch_len
        members = [batch["context"].astype(jnp.float32)]
        if "past" in batch:
            members.append(batch["past"].astype(jnp.float32))
        x, observed = self.prepare(jnp.concatenate(members, axis=1), steps)
        length, v = x.shape[-1], x.shape[1]

        target = batch["target"].astype(jnp.float32)
        target = jnp.pad(target, ((0, 0), (0, v - c), (0, ahead - steps)), constant_values=jnp.nan)
        x = jnp.concatenate([x, jnp.nan_to_num(target)], axis=-1)
        observed = jnp.concatenate([observed, ~jnp.isnan(target)], axis=-1)
        shown = jnp.broadcast_to((np.arange(length + ahead) < length)[None, None], x.shape)
        if "known" in batch:
            known, there = self._known(batch["known"], t, length, steps=steps)
            more = ((0, 0), (0, 0), (0, ahead - steps))
            known, there = jnp.pad(known, more), jnp.pad(there, more)
            x, observed = (
                jnp.concatenate([x, known], axis=1),
                jnp.concatenate([observed, there], axis=1),
            )
            shown = jnp.concatenate([shown, jnp.ones(known.shape, bool)], axis=1)
        counts = jnp.broadcast_to((np.arange(x.shape[1]) < c).astype(np.float32)[None], x.shape[:2])
        loss, _ = self.sequence_loss(
            params,
            x,
            observed,
            shown_BVT=shown,
            counts_BV=counts,
            min_observed=cfg.min_observed,
            batch=batch,
        )
        return loss

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median over the observed targets."""
        context, steps = batch["context"].astype(jnp.float32), batch["target"].shape[-1]
        y_BCHQ = self._rolled(
            params, context, steps, past=batch.get("past"), known=batch.get("known"), lean=False
        )
        return mse_observed(y_BCHQ[..., MEDIAN], batch["target"], batch)


@dataclasses.dataclass(frozen=True)
class Passes:
    """The passes of one forecast: what is the same in all of them.

    targets: V, the first variates, which are forecast. context: patches of it. ahead: patches of
    the horizon. block: patches that a pass decodes. rounds: how many passes there are.
    min_observed: see `causal_scale`.
    there_BVS, groups_BVS: which patches exist, and the group of each.
    bounds_BV: the least and the largest value that a quantile may have; None: any.
    """

    targets: int
    context: int
    ahead: int
    block: int
    rounds: int
    min_observed: int
    there_BVS: jax.Array
    groups_BVS: jax.Array
    bounds_BV: tuple[jax.Array, jax.Array] | None

    @property
    def room(self) -> int:
        """Patches whose keys are kept: of the context, and of blocks once they are decoded."""
        return self.context + (self.rounds - 1) * self.block

    def caches(self, own: Sequence[Cache | None]) -> list[Cache | None]:
        """Keys and values of the context by layer, with room for those of later blocks."""
        found = []
        for cache in own:
            found.append(None if cache is None else _with_room(cache, self.context, self.room))
        return found

    def real(self, y_BVNPQ: jax.Array, loc_BVS, scale_BVS, last) -> jax.Array:
        """Quantiles of patches in the units of x, in order; scaled as patch `last` is."""
        v = self.targets
        loc = jax.lax.dynamic_slice_in_dim(loc_BVS[:, :v], last, 1, axis=2)
        scale = jax.lax.dynamic_slice_in_dim(scale_BVS[:, :v], last, 1, axis=2)
        y = _unscaled(y_BVNPQ[:, :v], loc[..., None, None], scale[..., None, None])
        if self.bounds_BV is not None:
            low, high = (bound[..., None, None, None] for bound in self.bounds_BV)
            y = jnp.clip(y, low, high)
        return jnp.sort(y, axis=-1)

    def seen(self, start) -> jax.Array:
        """Which keys the two blocks from patch `start` on see [B, V, S, M + S]: those that are
        kept of what came before, and their own up to each.
        """
        both, n = 2 * self.block, self.context
        later = ((0, 0), (0, 0), (0, self.room - n))
        kept_BVM = jnp.pad(self.there_BVS[:, :, :n], later, constant_values=True)
        before_M = jnp.arange(self.room) < start
        rows = kept_BVM.shape[:2]
        seen_BVSM = (kept_BVM & before_M[None, None])[:, :, None]
        seen_BVSM = jnp.broadcast_to(seen_BVSM, (*rows, both, self.room))
        causal_SS = jnp.tril(jnp.ones((both, both), bool))
        seen_BVSS = jnp.broadcast_to(causal_SS[None, None], (*rows, both, both))
        return jnp.concatenate([seen_BVSM, seen_BVSS], axis=-1)


def _known_ahead(
    known_BET: jax.Array, observed_BET: Any, ids_BE: Any, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Covariates of `length` steps: values, which are observed, and their groups; all of one group
    and observed where nothing else is told.
    """
    b, e, t = known_BET.shape
    more = ((0, 0), (0, 0), (0, length - t))
    observed = jnp.ones(known_BET.shape, bool) if observed_BET is None else observed_BET
    ids = jnp.zeros((b, e), jnp.int32) if ids_BE is None else ids_BE.astype(jnp.int32)
    return jnp.pad(known_BET.astype(jnp.float32), more), jnp.pad(observed, more), ids


def _together(groups_BVS: jax.Array) -> jax.Array:
    """Which variates are of one group at each patch [B, S, V, V]."""
    groups_BSV = jnp.swapaxes(groups_BVS, 1, 2)
    return groups_BSV[..., :, None] == groups_BSV[..., None, :]


def _unscaled(y_BVNPQ: jax.Array, loc: jax.Array, scale: jax.Array) -> jax.Array:
    """arcsinh units -> those of the series; what overflows is the nearest that did not, of the
    patch and level.
    """
    x = jnp.sinh(y_BVNPQ) * scale + loc
    fits = jnp.isfinite(x)
    # The inner `where` keeps the overflow out of the gradient.
    x = jnp.where(fits, jnp.sinh(jnp.where(fits, y_BVNPQ, 0.0)) * scale + loc, 0.0)
    most = jnp.where(fits, x, -jnp.inf).max(-2, keepdims=True)
    least = jnp.where(fits, x, jnp.inf).min(-2, keepdims=True)
    bound = jnp.where(y_BVNPQ > 0, most, least)
    bound = jnp.where(jnp.isfinite(bound), bound, loc)
    return jnp.where(fits, x, bound)


def _range(
    x_BVT: jax.Array, observed_BVT: jax.Array, margin_BV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The least and the largest value that a forecast may have; around 0 where nothing is
    observed.
    """
    there_BV = observed_BVT.any(-1)
    low_BV = jnp.where(observed_BVT, x_BVT, jnp.inf).min(-1)
    high_BV = jnp.where(observed_BVT, x_BVT, -jnp.inf).max(-1)
    low_BV, high_BV = jnp.where(there_BV, low_BV, 0.0), jnp.where(there_BV, high_BV, 0.0)
    return low_BV - margin_BV, high_BV + margin_BV


def _with_room(cache: Cache, n: int, room: int) -> Cache:
    """The first n keys and values, with room for more."""
    more = ((0, 0), (0, 0), (0, 0), (0, room - n), (0, 0))
    keys, values = (jnp.pad(y[:, :, :, :n], more) for y in cache)
    return keys, values


def _written(cache: Cache, own: Cache, block: int, start) -> Cache:
    """The cache with the keys and values of the first `block` tokens at `start`."""
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(
            old, new[:, :, :, :block].astype(old.dtype), start, axis=3
        )
        for old, new in zip(cache, own, strict=True)
    )
    return keys, values
