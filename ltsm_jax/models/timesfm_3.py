"""TimesFM 3.0: variates and covariates that see each other, and the whole horizon in one pass.

Follows timesfm 3.0.2 (package `timesfm3`, PyTorch) and the weights google/timesfm-3.0-pytorch, the
successor of TimesFM 2.5 (`timesfm_2p5`; Das et al., arXiv 2310.10688). As there, each patch is
scaled by the mean and the deviation of everything up to its own end, and so is what comes out of
it.

What is new: a layer attends over the patches of a variate, then over the variates of a patch.
Covariates are further variates; a token holds its own patch and, of covariates that are known
ahead, the patches that follow it. The horizon is a run of hidden patches behind the context, each
of which forecasts what comes after it, so nothing is rolled out. Along the horizon the scale takes
in the model's own median (`refine`). Neighbouring forecasts overlap and are blended, and a straight
line is taken off a context that mostly is one.

One thing of the original is done otherwise: there a forecast depends on how many patches of padding
stand in front of a context, and so on the series beside it in a pass. Here a context begins at
its own first value; `padding_counts` is the original's behaviour.

Letters beyond those of the library: O points of an output, M = O / P patches of an output, R steps
of the future, E steps of an output that are used when outputs are blended.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import HeadDims, attention_dims, head_width, layer_problems
from ltsm_jax.layers.initial import draw, torch_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import interpolate_missing, mean_observed
from ltsm_jax.layers.mlp import ACTIVATIONS
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.quantiles import DECILES, level_problems, pinball
from ltsm_jax.layers.rope import rotary
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import (
    COVARIATES,
    Batch,
    Forecast,
    Lora,
    Model,
    Recipe,
    windows_that_fit,
)
from ltsm_jax.models.groups import Group
from ltsm_jax.models.timesfm_2p5 import (
    LOG2_E,
    MIN_SCALE,
    UNSEEN,
    merged,
    running_stats,
    unbiased_scale,
)
from ltsm_jax.trees import Tree

EPS = 1.1920929e-07  # of float32, which is what PyTorch's RMSNorm takes by default

Activation = Literal["relu", "swish", "none"]

# Of one layer in a published config.
LAYER_FIELDS = (
    "model_dims",
    "hidden_dims",
    "num_heads",
    "ff_activation",
    "qk_norm",
    "use_bias",
    "use_rope_seq",
    "use_rope_var",
)


@dataclasses.dataclass(frozen=True)
class TimesFM3Layer:
    """A layer's attention over time (seq) and over variates (var), and its feed-forward units."""

    seq: HeadDims
    var: HeadDims
    ffn: int


@dataclasses.dataclass(frozen=True)
class TimesFM3Config:
    """Widths are per layer, so that a pruned TimesFM is a TimesFM.

    patch_len P of the input, output_len O of the output (whole patches), d_model D, head_dim K,
    layers: H, K and F of each, embed_dim: hidden width of the block that makes tokens.
    quantiles: levels of the columns; the middle one is the point forecast.
    context_len: time steps of a window by default; max_context: where a longer context is cut.
    max_variates: how many variates see each other; targets beyond that are forecast in chunks,
    each with all covariates.

    Parts of the network: activation, ffn_activation, use_bias (of the layers), embed_bias,
    embed_norm (a norm of what is hidden in the first block), identity_skip (its input is added as
    it is), qk_norm, value_norm, rope_seq, rope_var, causal, scaled (the scores are divided by
    sqrt(K) once more), variate_attention. value_clip: largest absolute value in and out.
    refine: the scale takes in what was forecast. frozen_stats: the scale stays at the end of
    the context. stitching: outputs overlap. detrending: a straight line is taken off where what is
    left deviates by less than detrend_threshold times the deviation before.

    Options of a forecast, by default as in the original: sort_quantiles; flip_average: average with
    the forecast of -x, turned back; normalize_inputs: scale series by their whole context first;
    infer_is_positive: no forecast below 0 after a context without negative values; extend_known:
    repeat the last known value of covariates up to whole outputs; padding_counts: see the module
    docstring.
    """

    patch_len: int
    output_len: int
    d_model: int
    head_dim: int
    layers: tuple[TimesFM3Layer, ...]
    embed_dim: int
    quantiles: tuple[float, ...] = DECILES
    context_len: int = 1024
    max_context: int = 15360
    max_variates: int = 32
    activation: Activation = "relu"
    ffn_activation: Activation = "relu"
    use_bias: bool = False
    embed_bias: bool = False
    embed_norm: bool = False
    identity_skip: bool = False
    qk_norm: bool = True
    value_norm: bool = False
    rope_seq: bool = True
    rope_var: bool = False
    causal: bool = True
    scaled: bool = False
    variate_attention: bool = True
    value_clip: float = 1e20
    refine: bool = True
    frozen_stats: bool = False
    stitching: bool = True
    detrending: bool = True
    detrend_threshold: float = 0.5
    sort_quantiles: bool = True
    flip_average: bool = False
    normalize_inputs: bool = False
    infer_is_positive: bool = False
    extend_known: bool = False
    padding_counts: bool = False

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        problems += level_problems(self.quantiles, "quantiles")
        sizes = ("patch_len", "output_len", "d_model", "head_dim", "embed_dim", "context_len")
        problems += field_problems(self, *sizes, "max_context", "max_variates")
        if self.patch_len > 0 and self.output_len % self.patch_len:
            sizes = f"{self.output_len} of {self.patch_len}"
            problems.append(f"an output must be whole patches, got {sizes}")
        if self.head_dim % 2 and (self.rope_seq or self.rope_var):
            problems.append(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if not self.value_clip > 0:
            problems.append(f"value_clip must be positive, got {self.value_clip}")
        if not self.detrend_threshold >= 0:
            problems.append(f"detrend_threshold must not be negative, got {self.detrend_threshold}")
        if self.identity_skip and 2 * (self.patch_len + self.output_len) != self.d_model:
            problems.append(f"identity_skip needs d_model = 2 (P + O), got {self.d_model}")
        narrow = [name for name, dims in attention_dims(self.layers) if dims.value != self.head_dim]
        if self.value_norm and narrow:
            problems.append(f"value_norm is over whole values, not those of {', '.join(narrow)}")
        refuse(self, problems)

    @property
    def ahead(self) -> int:
        """M, patches of an output."""
        return self.output_len // self.patch_len

    @property
    def point_column(self) -> int:
        """The column of the median."""
        return len(self.quantiles) // 2

    @classmethod
    def of(cls, patch_len, output_len, d_model, d_ff, layers, heads, **rest) -> "TimesFM3Config":
        """Equal layers, with heads as wide together as the model."""
        rest = {"embed_dim": d_model} | rest
        head_dim = head_width(d_model, heads)
        attention = HeadDims.of(heads, head_dim)
        equal = (TimesFM3Layer(attention, attention, d_ff),) * layers
        return cls(patch_len, output_len, d_model, head_dim=head_dim, layers=equal, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimesFM3Config":
        """Reads a published config.json.

        Raises: ValueError naming the fields that are missing.
        """
        require_fields(
            "TimesFM 3",
            fields,
            ("input_patch_len", "output_patch_len", "quantiles"),
            inner={
                "residual_block_config": ("hidden_dims", "use_bias", "activation"),
                "transformer_config": ("num_layers", "transformer"),
                "transformer_config.transformer": LAYER_FIELDS,
            },
        )
        block, stack = fields["residual_block_config"], fields["transformer_config"]
        layer = stack["transformer"]

        options = {ours: fields[theirs] for theirs, ours in OPTIONS.items() if theirs in fields}
        return cls.of(
            patch_len=fields["input_patch_len"],
            output_len=fields["output_patch_len"],
            d_model=layer["model_dims"],
            d_ff=layer["hidden_dims"],
            layers=stack["num_layers"],
            heads=layer["num_heads"],
            embed_dim=block["hidden_dims"],
            quantiles=tuple(fields["quantiles"]),
            activation=block["activation"],
            embed_bias=block["use_bias"],
            embed_norm=block.get("prenorm", "none") == "rms",
            identity_skip=block.get("identity_skip", False),
            ffn_activation=layer["ff_activation"],
            use_bias=layer["use_bias"],
            qk_norm=layer["qk_norm"] == "rms",
            value_norm=layer.get("v_norm", "none") == "rms",
            rope_seq=layer["use_rope_seq"],
            rope_var=layer["use_rope_var"],
            causal=layer.get("causal_attention", True),
            scaled=not layer.get("use_memory_efficient_attention", True),
            **options,
        )


OPTIONS = {  # the published name of a field of its own, ours
    "use_variate_attention": "variate_attention",
    "value_clip": "value_clip",
    "use_stitching": "stitching",
    "use_linear_detrending": "detrending",
    "linear_detrending_threshold": "detrend_threshold",
    "use_iterative_cpm_revin": "refine",
    "use_frozen_running_stats": "frozen_stats",
}


# Sizes of the published config.json: 330,710,976 parameters.
PRESETS = {
    "google/timesfm-3.0-pytorch": TimesFM3Config.of(
        patch_len=32, output_len=64, d_model=1280, d_ff=1280, layers=20, heads=16
    )
}


class Embed(nn.Module):
    """Tokens [..., 2 (P + O)] -> [..., D]: `out(activation(hidden(z))) + residual(z)`."""

    cfg: TimesFM3Config

    @nn.compact
    def __call__(self, z):
        cfg, taps = self.cfg, {}
        inputs, d_model = (2 * (cfg.patch_len + cfg.output_len),), (cfg.d_model,)
        inner = RMSNorm(EPS, name="norm")(z) if cfg.embed_norm else z
        hidden = Linear(inputs, (cfg.embed_dim,), cfg.embed_bias, name="hidden")
        y = taps["hidden"] = hidden(inner)
        out = Linear((cfg.embed_dim,), d_model, cfg.embed_bias, name="out")
        y = taps["out"] = out(ACTIVATIONS[cfg.activation](y))
        if cfg.identity_skip:
            skipped = z.astype(y.dtype)
        else:
            skipped = Linear(inputs, d_model, cfg.embed_bias, name="residual")(z)
        taps["residual"] = skipped
        return y + skipped, taps


class Attention(nn.Module):
    """Attention over the last axis but one of x [A, B, S, D], and the steps between.

    Keys are hidden by `seen` (broadcast to [A, B, 1, S, S]). positions [A, 1, 1, S] are told by
    rotation before the norms of queries and keys; None: they are not told. Queries are then scaled
    per dimension. A query that sees no key attends evenly to all of them; nothing depends on it.
    """

    cfg: TimesFM3Config
    dims: HeadDims

    @nn.compact
    def __call__(self, x_ABSD, seen, positions):
        cfg, dims, taps = self.cfg, self.dims, {}
        parts = {}
        for name, shape in dims.shapes.items():
            linear = Linear((cfg.d_model,), shape, cfg.use_bias, name=name)
            y_ABSHK = taps[name] = linear(x_ABSD)
            # Heads beside the batch: XLA's CPU code is faster for plain batched products.
            parts[name] = jnp.moveaxis(y_ABSHK, 3, 2)

        for name in ("q", "k"):
            y_ABHSK = parts[name]
            if positions is not None:
                y_ABHSK = rotary(y_ABHSK, positions)
                taps[f"{name}_rotated"] = jnp.moveaxis(y_ABHSK, 2, 3)
            if cfg.qk_norm:
                y_ABHSK = RMSNorm(EPS, name=f"{name}_norm")(y_ABHSK)
                taps[f"{name}_norm"] = jnp.moveaxis(y_ABHSK, 2, 3)
            parts[name] = y_ABHSK
        if cfg.value_norm:
            wide = parts["v"].astype(jnp.float32)
            square = jnp.square(wide).mean(-1, keepdims=True)
            parts["v"] = (wide * jax.lax.rsqrt(square + EPS)).astype(parts["v"].dtype)

        scaling_K = nn.softplus(self.param("scaling", nn.initializers.zeros, (cfg.head_dim,)))
        scaling_K = (scaling_K * (LOG2_E * cfg.head_dim**-0.5)).astype(parts["q"].dtype)
        q_ABHSK = parts["q"] * scaling_K.reshape(1, 1, 1, 1, -1)
        taps["q_scaled"] = jnp.moveaxis(q_ABHSK, 2, 3)

        # The original's fused attention divides by the root twice, so it multiplies before.
        factor = 1.0 if cfg.scaled else cfg.head_dim**0.5
        y_ABHSK, _ = attend(q_ABHSK, parts["k"], parts["v"], seen=seen, scale=factor, hidden=UNSEEN)
        out = Linear(dims.joined, (cfg.d_model,), cfg.use_bias, name="out")
        return out(jnp.moveaxis(y_ABHSK, 2, 3)), taps


class Layer(nn.Module):
    """x [B, C, N, D] through attention over time, over variates, and feed-forward, each between two
    norms of its own and added to its input; and the steps between."""

    cfg: TimesFM3Config
    dims: TimesFM3Layer

    @nn.compact
    def __call__(self, x_BCND, seen_BCN, positions_BN):
        cfg, taps = self.cfg, {}

        def norm(name, y_BCND):
            taps[name] = RMSNorm(EPS, name=name)(y_BCND)
            return taps[name]

        _, c, n, _ = x_BCND.shape
        seen = seen_BCN[:, :, None, None]
        if cfg.causal:
            seen = seen & jnp.tril(jnp.ones((n, n), bool))[None, None, None]
        positions = positions_BN[:, None, None] if cfg.rope_seq else None
        attend = Attention(cfg, self.dims.seq, name="seq")
        y_BCND, inner = attend(norm("pre_seq_norm", x_BCND), seen, positions)
        taps |= nested("seq", inner, y_BCND)
        x_BCND = x_BCND + norm("post_seq_norm", y_BCND)

        if cfg.variate_attention:
            # Patches take the place of the batch: at each of them all variates see each other.
            x_BNCD = jnp.swapaxes(norm("pre_var_norm", x_BCND), 1, 2)
            seen = jnp.swapaxes(seen_BCN, 1, 2)[:, :, None, None]
            positions = jnp.arange(c).reshape(1, 1, 1, c) if cfg.rope_var else None
            attend = Attention(cfg, self.dims.var, name="var")
            y_BNCD, inner = attend(x_BNCD, seen, positions)
            taps |= nested("var", inner, y_BNCD)
            x_BCND = x_BCND + norm("post_var_norm", jnp.swapaxes(y_BNCD, 1, 2))

        f = self.dims.ffn
        up = Linear((cfg.d_model,), (f,), cfg.use_bias, name="up")
        taps["up"] = up(norm("pre_ffn_norm", x_BCND))
        down = Linear((f,), (cfg.d_model,), cfg.use_bias, name="down")
        taps["down"] = down(ACTIVATIONS[cfg.ffn_activation](taps["up"]))
        return x_BCND + norm("post_ffn_norm", taps["down"]), taps


class TimesFM3Net(nn.Module):
    """Tokens [B, C, N, 2 (P + O)], which of them are seen [B, C, N] and their places [B, N] ->
    scaled outputs [B, C, N', O, Q] of the patches from `first` on, and the named steps between."""

    cfg: TimesFM3Config

    @nn.compact
    def __call__(self, z_BCNZ, seen_BCN, positions_BN, first: int = 0):
        cfg = self.cfg
        x_BCND, inner = Embed(cfg, name="embed")(z_BCNZ)
        taps = nested("embed", inner, x_BCND)
        for i, dims in enumerate(cfg.layers):  # a loop, not a scan: pruned layers differ in width
            x_BCND, inner = Layer(cfg, dims, name=f"layer_{i}")(x_BCND, seen_BCN, positions_BN)
            taps |= nested(f"layer_{i}", inner, x_BCND)
        columns = len(cfg.quantiles)
        head = Linear((cfg.d_model,), (cfg.output_len * columns,), name="head")
        y_BCN_ = taps["head"] = head(x_BCND[:, :, first:]).astype(jnp.float32)
        return y_BCN_.reshape(*y_BCN_.shape[:3], cfg.output_len, columns), taps


# --- scales


def root(x: jax.Array) -> jax.Array:
    """The square root, with slope 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def refine(
    stats: tuple[jax.Array, jax.Array, jax.Array],
    median_BCNO: jax.Array,
    shown_BN: jax.Array,
    patch_len: int,
    clip: float,
) -> tuple[jax.Array, jax.Array]:
    """Take the model's own median into the scale along hidden patches.

    A hidden patch is scaled by what was seen before it and the median forecast of it. The forecast
    is that of the last patch before the hidden run, as far as it reaches (M patches); then that of
    the hidden patch reached, and so on.

    Args:
      stats: number, mean and deviation [B, C, N] of the values up to the end of each patch.
      median_BCNO: scaled median after each patch.
      shown_BN: booleans, False for the hidden patches, which are to be forecast.
      clip: largest absolute value of a median.
    Returns: mean and deviation [B, C, N]; those of `stats` where nothing is hidden.
    """
    b, c, _, o = median_BCNO.shape
    ahead = o // patch_len
    count_BC1 = jnp.full((b, c), float(patch_len))

    def step(carry, inputs):
        state, forecast_BCMP, k_B = carry
        seen, median_BCO, shown_B = inputs
        mean, std = seen[1:]
        index = jnp.broadcast_to(k_B[:, None, None, None], (b, c, 1, patch_len))
        points_BCP = jnp.take_along_axis(forecast_BCMP, index, axis=2)[:, :, 0]
        centre_BC = points_BCP.mean(-1)
        squares_BC = jnp.square(points_BCP - centre_BC[..., None]).sum(-1)

        before = (state[0], state[1], state[0] * jnp.square(state[2]))
        total, centre, squares = merged(before, (count_BC1, centre_BC, squares_BC))
        grown = (total, centre, root(squares / jnp.maximum(total, 1.0)))
        shown = shown_B[:, None]
        state = tuple(jnp.where(shown, old, new) for new, old in zip(grown, seen, strict=True))

        # Which of the M patches of the last forecast comes next; 0 asks for a forecast anew.
        k_B = jnp.where(shown_B, 0, (k_B + 1) % ahead)
        mean, std = state[1:]
        fresh = jnp.clip(median_BCO * std[..., None] + mean[..., None], -clip, clip)
        fresh = fresh.reshape(b, c, ahead, patch_len)
        forecast_BCMP = jnp.where((k_B == 0)[:, None, None, None], fresh, forecast_BCMP)
        return (state, forecast_BCMP, k_B), state[1:]

    nothing = jnp.zeros((b, c))
    start = (nothing, nothing, nothing)
    carry = (start, jnp.zeros((b, c, ahead, patch_len)), jnp.zeros(b, jnp.int32))
    by_patch = [jnp.moveaxis(x, 2, 0) for x in stats]
    inputs = (tuple(by_patch), jnp.moveaxis(median_BCNO, 2, 0), jnp.moveaxis(shown_BN, 1, 0))
    _, (mean, std) = jax.lax.scan(step, carry, inputs)
    return jnp.moveaxis(mean, 0, 2), jnp.moveaxis(std, 0, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trend:
    """A straight line per variate, `slope * time + level`: time is 0 at the last step of the
    context and -1 a context before it. used: whether the line is taken off. All [B, C]."""

    slope: jax.Array
    level: jax.Array
    used: jax.Array

    def at(self, time_T: jax.Array) -> jax.Array:
        """Values [B, C, T] of the lines that are used, 0 of the others."""
        line = self.slope[..., None] * time_T[None, None] + self.level[..., None]
        return jnp.where(self.used[..., None], line, 0.0)


def fit_trend(x_BCT: jax.Array, observed_BCT: jax.Array, threshold: float) -> Trend:
    """Fit a line to what is observed, by least squares.

    It is used where the deviation of what is left is below `threshold` times that of the series.
    The original's sums are of raw values; here they are of differences from one of them and from
    their mean, which is the same but for rounding: a large offset or a constant cannot tip it.
    """
    t = x_BCT.shape[-1]
    n = jnp.maximum(observed_BCT.sum(-1, keepdims=True), 1)

    def mean(y_BCT):
        return jnp.where(observed_BCT, y_BCT, 0.0).sum(-1, keepdims=True) / n

    time = jnp.broadcast_to(((jnp.arange(t) - (t - 1)) / t).reshape(1, 1, t), x_BCT.shape)
    first = jnp.argmax(observed_BCT, axis=-1, keepdims=True)
    known = observed_BCT.any(-1, keepdims=True)
    reference = jnp.where(known, jnp.take_along_axis(x_BCT, first, axis=-1), 0.0)
    gap = x_BCT - reference
    middle, centre = mean(time), mean(gap)
    apart, off = time - middle, gap - centre
    spread = mean(jnp.square(apart))
    slope = jnp.where(spread > 0, mean(apart * off) / jnp.where(spread > 0, spread, 1.0), 0.0)

    before = jnp.sqrt(mean(jnp.square(off)))
    after = jnp.sqrt(mean(jnp.square(off - slope * apart)))
    level = reference + centre - slope * middle
    used = after < threshold * before
    return Trend(slope[..., 0], level[..., 0], used[..., 0])


def with_ends(x: jax.Array) -> jax.Array:
    """Fill NaN of x [..., T] on the line between the observed values around it; beyond the first
    and the last of them they are repeated. A row without any becomes 0."""
    filled, begun = interpolate_missing(x)
    first = jnp.take_along_axis(x, jnp.argmax(begun, axis=-1, keepdims=True), axis=-1)
    return jnp.where(begun, filled, jnp.where(jnp.isnan(first), 0.0, first))


def quantile_errors(y: jax.Array, target: jax.Array, quantiles: tuple[float, ...]) -> jax.Array:
    """Squared error of the median plus the mean pinball loss of all quantiles y [..., Q], of each
    entry of target [...]."""
    square = jnp.square(target - y[..., len(quantiles) // 2])
    return square + pinball(target, y, quantiles).mean(-1)


@dataclasses.dataclass(frozen=True)
class TimesFM3(Model):
    """TimesFM 3.0 at one size. See the module docstring; `Model` documents the methods."""

    config: TimesFM3Config

    family = "timesfm_3"
    published = PRESETS
    tasks = ("forecasting",)
    licence = "timesfm-non-commercial-license-v1.0, non-commercial (google/timesfm-3.0-pytorch)"
    shard_rules = (
        (r"^embed/hidden/kernel$", (None, "tensor")),
        (r"^embed/hidden/bias$", ("tensor",)),
        (r"^embed/out/kernel$", ("tensor", "fsdp")),
        (r"^embed/residual/kernel$", (None, "fsdp")),
        (r"^head/kernel$", ("fsdp", "tensor")),
        (r"^head/bias$", ("tensor",)),
        *shards.LAYERS,
        *shards.UP_BIAS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("seq"), Group.heads("var", swapped=True), Group.units())

    @classmethod
    def small(cls) -> TimesFM3Config:
        return TimesFM3Config.of(
            patch_len=8, output_len=16, d_model=16, d_ff=24, layers=2, heads=2, context_len=32
        )

    @property
    def covariates(self) -> frozenset[str]:
        return COVARIATES

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def variates(self) -> Literal["independent", "joint"]:
        return "joint" if self.config.variate_attention else "independent"

    @property
    def horizon(self) -> int:
        """Steps of one output; a longer horizon takes more hidden patches, in the same pass."""
        return self.config.output_len

    @property
    def eval_batch(self) -> int:
        """Windows for which the attention over time of ten variates fits."""
        cfg = self.config
        tokens = -(-cfg.context_len // cfg.patch_len) + cfg.ahead
        widest = max(max(dims.ffn, dims.seq.heads * tokens) for dims in cfg.layers)
        row = 40 * tokens * max(widest, cfg.d_model)
        return windows_that_fit(row)

    def init(self, key: jax.Array) -> Tree:
        """PyTorch's defaults, which are all that the original has: linear layers uniform by their
        inputs, norms 1, scalings 0."""
        cfg = self.config
        inputs = 2 * (cfg.patch_len + cfg.output_len)
        tokens = jax.ShapeDtypeStruct((1, 1, 1, inputs), jnp.float32)
        seen = jax.ShapeDtypeStruct((1, 1, 1), jnp.bool_)
        positions = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = parameter_shapes(TimesFM3Net(cfg), key, tokens, seen, positions)
        return draw(key, shapes, torch_rule(shapes))

    def recipe(self) -> Recipe:
        source = (
            "none is published for 3.0; that of 2.5: google-research/timesfm "
            "timesfm-forecasting/examples/finetuning/finetune_lora.py"
        )
        return self._recipe(
            lr=1e-4,
            batch_size=32,
            epochs=10,
            schedule="cosine",
            source=source,
            weight_decay=0.01,
            clip=1.0,
            lora=Lora(4, 8.0),
        )

    # --- patches

    def _following(self, x_BCNP: jax.Array, fill) -> jax.Array:
        """The O points [B, C, N, O] after each patch; `fill` beyond the last one."""
        cfg, (b, c, n, _) = self.config, x_BCNP.shape
        ends = ((0, 0), (0, 0), (0, cfg.ahead), (0, 0))
        padded = jnp.pad(x_BCNP, ends, constant_values=fill)
        windows = [padded[:, :, 1 + j : 1 + j + n] for j in range(cfg.ahead)]
        return jnp.stack(windows, axis=3).reshape(b, c, n, cfg.output_len)

    def apply(
        self,
        params: Tree,
        x_BCNP: jax.Array,
        observed_BCNP: jax.Array,
        is_target_BCN: jax.Array,
        shown_BN: jax.Array | None = None,
        *,
        freeze_after: int | None = None,
        begin_B: jax.Array | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One forward pass: quantiles [B, C, N', O, Q] in the units of x of the O points after each
        patch from `first` on, and the named steps.

        Args:
          x_BCNP: patches of all variates; a NaN that is observed counts as 0.
          observed_BCNP: booleans, False where x is no value.
          is_target_BCN: booleans, True where the patches that follow must not be shown.
          shown_BN: booleans, False for patches of targets that are hidden and forecast; None: all
            are shown.
          freeze_after: patch after which mean and deviation stay as they are.
          begin_B: patches in front that do not exist: nothing sees them, and places are counted
            from here.
          last: patches that the network is given, where those beyond are only looked ahead to.
        """
        cfg, (b, _, n, p) = self.config, x_BCNP.shape
        clip = cfg.value_clip
        x_BCNP = x_BCNP.astype(jnp.float32)
        x_BCNP = jnp.clip(jnp.where(jnp.isnan(x_BCNP), 0.0, x_BCNP), -clip, clip)

        # The scale, before anything is hidden: what is known of covariates counts.
        n_BCN, mean_BCN, std_BCN = self._scale(x_BCNP, observed_BCNP, freeze_after)
        if shown_BN is not None:
            observed_BCNP = observed_BCNP & (shown_BN[:, None] | ~is_target_BCN)[..., None]
        tokens, filled_BCN = self._tokens(
            x_BCNP, observed_BCNP, is_target_BCN, mean_BCN=mean_BCN, std_BCN=std_BCN
        )

        # Patches in front that hold nothing are not seen; later ones are, empty or not.
        seen_BCN = jax.lax.cummax(filled_BCN.astype(jnp.int32), axis=2) > 0
        positions_BN = jnp.broadcast_to(jnp.arange(n)[None], (b, n))
        if begin_B is not None:
            positions_BN = positions_BN - begin_B[:, None]
            seen_BCN = seen_BCN & (positions_BN >= 0)[:, None]

        stop = n if last is None else last
        inputs = (tokens[:, :, :stop], seen_BCN[:, :, :stop], positions_BN[:, :stop])
        raw_BCNOQ, taps = run_network(TimesFM3Net(cfg), params, *inputs, first=first)
        taps |= {"tokens": tokens, "seen": seen_BCN, "raw": raw_BCNOQ}
        taps |= {"n": n_BCN, "mean": mean_BCN, "std": std_BCN}

        # Back into the units of x, by the scale of each patch that is asked for.
        asked = slice(first, stop)
        mean, std = mean_BCN[:, :, asked], std_BCN[:, :, asked]
        if cfg.refine and shown_BN is not None:
            stats = (n_BCN[:, :, asked], mean, std)
            median = raw_BCNOQ[..., cfg.point_column]
            mean, std = refine(stats, median, shown_BN[:, asked], patch_len=p, clip=clip)
            taps |= {"refined_mean": mean, "refined_std": std}
        y_BCNOQ = raw_BCNOQ * std[..., None, None] + mean[..., None, None]
        return jnp.clip(y_BCNOQ, -clip, clip), taps

    def _scale(self, x_BCNP, observed_BCNP, freeze_after: int | None) -> tuple[jax.Array, ...]:
        """Number, mean and deviation [B, C, N] of all observed values up to the end of each patch.

        freeze_after: patch after which mean and deviation stay as they are; None: they never do.
        """
        b, c, n, p = x_BCNP.shape
        rows = (b * c, n, p)
        found = running_stats(x_BCNP.reshape(rows), observed_BCNP.reshape(rows))
        n_BCN, mean_BCN, squares_BCN = (y.reshape(b, c, n) for y in found)
        std_BCN = jnp.sqrt(squares_BCN / jnp.maximum(n_BCN, 1.0))
        if freeze_after is not None:
            kept_N = np.minimum(np.arange(n), freeze_after)
            mean_BCN, std_BCN = mean_BCN[..., kept_N], std_BCN[..., kept_N]
        return n_BCN, mean_BCN, std_BCN

    def _tokens(self, x_BCNP, observed_BCNP, is_target_BCN, mean_BCN, std_BCN):
        """Tokens [B, C, N, 2 (P + O)]: the patch itself, what is shown of its future, and both
        masks; and which of them hold anything [B, C, N].
        """
        future_BCNO = self._following(x_BCNP, 0.0)
        known_BCNO = self._following(observed_BCNP, False) & ~is_target_BCN[..., None]
        shift = mean_BCN[..., None]
        scale = jnp.where(std_BCN < MIN_SCALE, 1.0, std_BCN)[..., None]
        own = jnp.where(observed_BCNP, (x_BCNP - shift) / scale, 0.0)
        future = jnp.where(known_BCNO, (future_BCNO - shift) / scale, 0.0)
        # The original's masks, which its weights are made for, are 1 where there is no value.
        masks = [(~observed_BCNP).astype(jnp.float32), (~known_BCNO).astype(jnp.float32)]
        tokens = jnp.concatenate([own, future, *masks], axis=-1)
        return tokens, observed_BCNP.any(-1) | known_BCNO.any(-1)

    def patch_loss(
        self,
        params: Tree,
        x_BCNP: jax.Array,
        observed_BCNP: jax.Array,
        is_target_BCN: jax.Array,
        shown_BN: jax.Array | None = None,
    ) -> jax.Array:
        """The loss of a pass over whole patches, in the units of x, as for training from scratch:
        each patch of a target forecasts the observed points among the O that follow it."""
        y_BCNOQ, _ = self.apply(
            params, x_BCNP, observed_BCNP, is_target_BCN=is_target_BCN, shown_BN=shown_BN
        )
        target = jnp.where(observed_BCNP & ~jnp.isnan(x_BCNP), x_BCNP, 0.0)
        target_BCNO = self._following(target, 0.0)
        observed = self._following(observed_BCNP, False) & is_target_BCN[..., None]
        return mean_observed(
            quantile_errors(y_BCNOQ, target_BCNO, self.config.quantiles), observed, {}
        )

    # --- series [B, C, T]: targets, then covariates

    def outputs(self, horizon: int) -> tuple[int, int]:
        """How many outputs make a forecast, and how many patches of the horizon they look into."""
        cfg = self.config
        if not cfg.stitching:
            count = -(-horizon // cfg.output_len)
            return count, count * cfg.ahead
        overlap = min(2 * cfg.patch_len, cfg.output_len) - cfg.patch_len
        count = max(-(-(horizon - overlap) // cfg.patch_len), 1)
        return count, count + cfg.ahead - 1

    def lay_out(
        self,
        x_BCT: jax.Array,
        observed_BCT: jax.Array,
        horizon: int,
        known_BCR: jax.Array | None = None,
        observed_BCR: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], Trend]:
        """Place series in patches: what `apply` takes for a forecast, and the lines taken off.

        See `decode` for the arguments.
        """
        cfg, (b, c, t) = self.config, x_BCT.shape
        p, (_, patches) = cfg.patch_len, self.outputs(horizon)
        front = ((0, 0), (0, 0), (-t % p, 0))
        x_BCT = jnp.pad(x_BCT.astype(jnp.float32), front)
        observed_BCT = jnp.pad(observed_BCT, front)
        length = x_BCT.shape[-1]

        trend = fit_trend(x_BCT, observed_BCT, cfg.detrend_threshold)
        if not cfg.detrending:
            trend = dataclasses.replace(trend, used=jnp.zeros((b, c), bool))
        x_BCT = x_BCT - trend.at((jnp.arange(length) - (length - 1)) / length)

        # Behind the context: what is known ahead, of the last variates, and nothing of the others.
        shown = 0
        ahead_BCR = jnp.zeros((b, c, patches * p))
        there_BCR = jnp.zeros((b, c, patches * p), bool)
        if known_BCR is not None:
            shown = known_BCR.shape[1]
            if observed_BCR is None:
                observed_BCR = jnp.ones(known_BCR.shape, bool)
            line_BCR = trend.at(jnp.arange(1, horizon + 1) / length)[:, c - shown :]
            place = ((0, 0), (c - shown, 0), (0, patches * p - horizon))
            ahead_BCR = jnp.pad(known_BCR.astype(jnp.float32) - line_BCR, place)
            there_BCR = jnp.pad(observed_BCR, place)
        x = jnp.concatenate([x_BCT, ahead_BCR], axis=-1)
        observed = jnp.concatenate([observed_BCT, there_BCR], axis=-1)
        x = jnp.where(observed, x, 0.0)

        n = x.shape[-1] // p
        is_target_C = np.arange(c) < c - shown
        shown_N = np.arange(n) < length // p
        inputs = {
            "x_BCNP": x.reshape(b, c, n, p),
            "observed_BCNP": observed.reshape(b, c, n, p),
            "is_target_BCN": jnp.broadcast_to(is_target_C.reshape(1, c, 1), (b, c, n)),
            "shown_BN": jnp.broadcast_to(shown_N[None], (b, n)),
        }
        return inputs, trend

    def decode(
        self,
        params: Tree,
        x_BCT: jax.Array,
        observed_BCT: jax.Array,
        horizon: int,
        known_BCR: jax.Array | None = None,
        observed_BCR: jax.Array | None = None,
        begin_B: jax.Array | None = None,
    ) -> jax.Array:
        """Quantiles [B, C, horizon, Q] after x, of all variates and unsorted.

        Args:
          x_BCT: context of all variates, observed_BCT: booleans, where it has a value.
          known_BCR: the `horizon` steps to come of the last variates; observed_BCR: booleans, where
            they have a value, by default everywhere.
          begin_B: time steps in front that do not exist, see `apply`; whole patches count.
        """
        cfg, t = self.config, x_BCT.shape[-1]
        p, (count, patches) = cfg.patch_len, self.outputs(horizon)
        inputs, trend = self.lay_out(
            x_BCT, observed_BCT, horizon, known_BCR=known_BCR, observed_BCR=observed_BCR
        )
        context = inputs["x_BCNP"].shape[2] - patches

        # Later patches change nothing before them where attention is causal: leave them out.
        stride = 1 if cfg.stitching else cfg.ahead
        used = context + (count - 1) * stride
        y_BCNOQ, _ = self.apply(
            params,
            **inputs,
            freeze_after=context - 1 if cfg.frozen_stats else None,
            begin_B=None if begin_B is None else (begin_B + -t % p) // p,
            first=context - 1,
            last=used if cfg.causal else None,
        )
        y_BCFOQ = y_BCNOQ[:, :, : (count - 1) * stride + 1 : stride]
        y_BCRQ = self._joined(y_BCFOQ)[:, :, :horizon]
        line_BCR = trend.at(jnp.arange(1, horizon + 1) / (context * p))
        return y_BCRQ + line_BCR[..., None]

    def _joined(self, y_BCFOQ: jax.Array) -> jax.Array:
        """The outputs of F patches as one series [B, C, R, Q], blended where two overlap."""
        cfg, (b, c, count, _, q) = self.config, y_BCFOQ.shape
        if not cfg.stitching:
            return y_BCFOQ.reshape(b, c, -1, q)
        p = cfg.patch_len
        overlap = min(2 * p, cfg.output_len) - p
        main, tail = y_BCFOQ[..., :p, :], y_BCFOQ[..., p : p + overlap, :]
        if count > 1 and overlap:
            share = jnp.linspace(0.0, 1.0, overlap).reshape(1, 1, 1, overlap, 1)
            blend = main[:, :, 1:, :overlap] * share + tail[:, :, :-1] * (1 - share)
            rest = jnp.concatenate([blend, main[:, :, 1:, overlap:]], axis=3)
            main = jnp.concatenate([main[:, :, :1], rest], axis=2)
        return jnp.concatenate([main.reshape(b, c, count * p, q), tail[:, :, -1]], axis=2)

    # --- forecasts of targets [B, C, T]

    def forecast(
        self,
        params: Tree,
        context: jax.Array,
        horizon: int,
        past: jax.Array | None = None,
        known: jax.Array | None = None,
    ) -> jax.Array:
        """Quantiles [B, C, horizon, Q] after `context` [B, C, T], by the options of the config.

        past: [B, K, T] and known: [B, K', T + horizon], covariates. A row begins where any target
        has its first value; later gaps lie on the line between their neighbours.
        """
        cfg, (b, c, _) = self.config, context.shape
        past, known = self._thinned(past, known, c)
        slots = cfg.max_variates - sum(x.shape[1] for x in (past, known) if x is not None)
        if c <= slots:
            return self._forecast(params, context, horizon, past=past, known=known)

        # Too many to see each other: chunks as rows of their own; the first fill up the last.
        chunks = -(-c // slots)
        chosen = np.resize(np.arange(c), chunks * slots)
        rows = context[:, chosen].reshape(b * chunks, slots, -1)
        beside = [None if x is None else jnp.repeat(x, chunks, axis=0) for x in (past, known)]
        y_BCRQ = self._forecast(params, rows, horizon, *beside)
        return y_BCRQ.reshape(b, chunks * slots, *y_BCRQ.shape[2:])[:, :c]

    def _thinned(self, past, known, targets: int):
        """So few covariates that a target fits beside them, chosen as the original chooses."""
        kinds = [0 if x is None else x.shape[1] for x in (past, known)]
        if targets + sum(kinds) <= self.config.max_variates:
            return past, known
        room, rng = self.config.max_variates - 1, np.random.default_rng(42)
        if kinds[1] > room:
            known = known[:, np.sort(rng.choice(kinds[1], room, replace=False))]
        room -= 0 if known is None else known.shape[1]
        if kinds[0] > room:
            past = past[:, np.sort(rng.choice(kinds[0], room, replace=False))]
        return past, known

    def _forecast(self, params: Tree, context, horizon: int, past, known):
        cfg, (b, c, t) = self.config, context.shape
        seen_BCT = ~jnp.isnan(context)
        nowhere_B1 = ~seen_BCT.any((1, 2))[:, None]
        begun_BT = jax.lax.cummax(seen_BCT.any(1).astype(jnp.int32), axis=1) > 0
        begun_BT = begun_BT | nowhere_B1
        positive_BC = seen_BCT.any(-1) & (~seen_BCT | (context >= 0)).all(-1)

        steps = self._steps(horizon, known)
        members, future = [context], None
        if past is not None:
            members.append(past)
        x_BCT, begun = _from_begin(jnp.concatenate(members, axis=1), begun_BT)
        if known is not None:
            always = jnp.ones((b, known.shape[-1] - t), bool)
            known, known_begun = _from_begin(known, jnp.concatenate([begun_BT, always], axis=1))

        mean = jnp.zeros((b, x_BCT.shape[1], 1))
        std = jnp.ones((b, x_BCT.shape[1], 1))
        if cfg.normalize_inputs:
            x_BCT, mean, std = _standardised(x_BCT, begun)
            if known is not None:
                known, *_ = _standardised(known, known_begun)
        if known is not None:
            extra = ((0, 0), (0, 0), (0, steps - horizon))
            future = jnp.pad(known[..., t:], extra, mode="edge")
            x_BCT = jnp.concatenate([x_BCT, known[..., :t]], axis=1)

        # The newest steps that the model was made for.
        limit = math.ceil(cfg.max_context / cfg.patch_len) * cfg.patch_len
        x_BCT, begun_BT = x_BCT[..., -limit:], begun_BT[:, -limit:]
        observed_BCT = jnp.broadcast_to(begun_BT[:, None], x_BCT.shape)
        begin_B = None if cfg.padding_counts else (~begun_BT).sum(-1)

        def decode(sign):
            ahead = None if future is None else sign * future
            y = self.decode(
                params, sign * x_BCT, observed_BCT, horizon=steps, known_BCR=ahead, begin_B=begin_B
            )
            y = y[:, :c]
            return jnp.sort(y, axis=-1) if cfg.sort_quantiles else y

        y_BCRQ = decode(1.0)
        if cfg.flip_average:
            y_BCRQ = (y_BCRQ - decode(-1.0)[..., ::-1]) / 2
        y_BCRQ = y_BCRQ[:, :, :horizon] * std[:, :c, :, None] + mean[:, :c, :, None]
        if cfg.infer_is_positive:
            y_BCRQ = jnp.where(positive_BC[..., None, None], jnp.maximum(y_BCRQ, 0.0), y_BCRQ)
        return y_BCRQ

    def _steps(self, horizon: int, known) -> int:
        """How far the network forecasts: whole outputs, unless covariates are known less far."""
        cfg = self.config
        if known is not None and not cfg.extend_known:
            return horizon
        return -(-horizon // cfg.output_len) * cfg.output_len

    def predict_with(
        self, params: Tree, context, horizon: int, *, past=None, known=None, key=None
    ) -> Forecast:
        """All variates of a row see each other, up to `max_variates`. Point: the median.

        The newest `max_context` steps are read. What is missing lies on the line between its
        neighbours, as in the original; beyond the first and the last value of a variate they are
        repeated. Covariates are further variates of each row, filled as the targets are.
        """
        check_context(context, horizon)
        given = [None if x is None else jnp.asarray(x, jnp.float32) for x in (past, known)]
        context = jnp.asarray(context, jnp.float32)
        y_BCRQ = self.forecast(params, context, horizon, *given)
        point = y_BCRQ[..., self.config.point_column]
        return Forecast(point, y_BCRQ, levels=self.config.quantiles)

    # --- losses

    def _for_training(self, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Quantiles of the target [B, C, H, Q], unsorted; the target with 0 for NaN, and what of it
        is observed."""
        target, context = batch["target"], batch["context"]
        options = {"sort_quantiles": False, "infer_is_positive": False}
        raw = TimesFM3(dataclasses.replace(self.config, **options))
        covariates = (batch.get("past"), batch.get("known"))
        y_BCHQ = raw.forecast(params, context, target.shape[-1], *covariates)
        observed = ~jnp.isnan(target)
        return y_BCHQ, jnp.where(observed, target, 0.0), observed

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median plus the mean over the quantiles of the pinball loss, of the targets
        alone, each series in units of its context's deviation.

        The original is published without training code: this is the loss that its kind of output
        asks for, that of 2.5 but for the mean column. Any horizon.
        """
        y_BCHQ, target_BCH, observed_BCH = self._for_training(params, batch)
        b, c, _ = target_BCH.shape
        series = batch["context"].reshape(b * c, -1)
        _, std = unbiased_scale(*interpolate_missing(series))
        std_BC1 = std.reshape(b, c, 1)
        error = quantile_errors(
            y_BCHQ / std_BC1[..., None], target_BCH / std_BC1, self.config.quantiles
        )
        return mean_observed(error, observed_BCH, batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median over the observed targets. Any horizon."""
        y_BCHQ, target_BCH, observed_BCH = self._for_training(params, batch)
        gap_BCH = y_BCHQ[..., self.config.point_column] - target_BCH
        return mean_observed(jnp.square(gap_BCH), observed_BCH, batch)


def _from_begin(x_BCT: jax.Array, begun_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Variates without gaps, 0 before the row has begun; and where it has [B, C, T]."""
    begun = jnp.broadcast_to(begun_BT[:, None], x_BCT.shape)
    filled = with_ends(jnp.where(begun, x_BCT, jnp.nan))
    return jnp.where(begun, filled, 0.0), begun


def _standardised(x_BCT, begun) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x by its mean and deviation since it has begun; and the two [B, C, 1]."""
    n = jnp.maximum(begun.sum(-1, keepdims=True), 1)
    mean = x_BCT.sum(-1, keepdims=True) / n
    squares = jnp.where(begun, jnp.square(x_BCT - mean), 0.0).sum(-1, keepdims=True)
    std = jnp.sqrt(squares / n)
    std = jnp.where(std < 1e-7, 1.0, std)
    return jnp.where(begun, (x_BCT - mean) / std, 0.0), mean, std
