"""Timer-XL: a decoder-only Transformer over the patches of all variates of a window at once.

Liu et al., "Timer-XL: Long-Context Transformers for Unified Time Series Forecasting" (ICLR 2025,
arXiv 2410.04803). Follows thuml/OpenLTM (commit 0b30050, models/timer_xl.py): post-norm blocks;
tokens of C variates in one sequence, variate after variate, in which a token sees every variate up
to its own time; a learned bias per head says whether two tokens are of one variate; rotary
positions on the first half of each head, counted along the flattened sequence, so that variates
differ in position too. The branch behind the original's `flash_attention` mixes up heads and time;
it is not reproduced.

The published checkpoint was trained on single variates, and its bias between variates has never
been trained: its preset takes each variate by itself (`joint` off), as the original's adaptation
scripts do.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers.causal import ACTIVATIONS
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, Normal, Uniform, draw
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, mean_observed, mse_observed
from ltsm_jax.layers.rope import rotary
from ltsm_jax.layers.widths import width, width_problems
from ltsm_jax.models.configs import config_from_json
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree, flatten

SCALE_EPS = 1e-5  # inside the root, added to the variance
PATCHES = 30  # of the longest context that the checkpoint was trained with: 2880 points


@dataclasses.dataclass(frozen=True)
class TimerXLConfig:
    """Widths are per layer, so that a pruned model is of the same class.

    patch_len P, horizon Q (points that a token predicts), d_model D, head_dim K, n_heads H and
    ffn_dims F of each layer, context_len in time steps. joint: the variates of a window see one
    another. covariate: all but the last variate are known ahead, the last is forecast: it sees all
    of the others, each of which sees only itself. use_norm: whether each variate is scaled by its
    own mean and standard deviation. value_dims: K of the values of each layer, () is head_dim.
    """

    patch_len: int
    horizon: int
    d_model: int
    head_dim: int
    n_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]
    context_len: int
    joint: bool = True
    covariate: bool = False
    use_norm: bool = True
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = 0.1
    value_dims: tuple[int, ...] = ()

    def __post_init__(self):
        problems = width_problems(len(self.n_heads), self.head_dim, value_dims=self.value_dims)
        if len(self.n_heads) != len(self.ffn_dims) or not self.n_heads:
            problems.append(
                f"n_heads {self.n_heads} and ffn_dims {self.ffn_dims} must name the same layers"
            )
        sizes = (self.patch_len, self.horizon, self.d_model, self.head_dim, self.context_len)
        if min(sizes) < 1 or min(*self.n_heads, *self.ffn_dims, 1) < 0:
            problems.append(f"every size must be positive: {self}")
        if self.head_dim % 4:
            problems.append(
                "half of a head turns in pairs, so its width must be a multiple of 4, not "
                f"{self.head_dim}"
            )
        if self.context_len < self.patch_len:
            problems.append(
                f"the context ({self.context_len}) must hold one patch ({self.patch_len})"
            )
        if self.covariate and not self.joint:
            problems.append("covariates need variates that see one another (joint)")
        if self.activation not in ("relu", "gelu") or not 0 <= self.dropout < 1:
            problems.append(
                f"activation must be relu or gelu and dropout in [0, 1): {self.activation}, "
                f"{self.dropout}"
            )
        if problems:
            raise ValueError("TimerXLConfig: " + "; ".join(problems))

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimerXLConfig":
        """From option names of the original's scripts (input_token_len, output_token_len, d_model,
        n_heads, e_layers, d_ff; seq_len, dropout, activation, use_norm, covariate and data where
        given).
        """
        d, heads, layers = fields["d_model"], fields["n_heads"], fields["e_layers"]
        if heads < 1 or d % heads:
            raise ValueError(f"d_model ({d}) must be a multiple of n_heads ({heads})")
        if fields.get("flash_attention"):
            raise ValueError(
                "flash_attention: that branch of the original mixes up heads and time; set it to "
                "false"
            )
        return cls(
            patch_len=fields["input_token_len"],
            horizon=fields["output_token_len"],
            d_model=d,
            head_dim=d // heads,
            n_heads=(heads,) * layers,
            ffn_dims=(fields["d_ff"],) * layers,
            context_len=fields.get("seq_len", PATCHES * fields["input_token_len"]),
            joint=not str(fields.get("data", "")).startswith("Univariate"),
            covariate=fields.get("covariate", False),
            use_norm=fields.get("use_norm", True),
            activation="relu"
            if fields.get("activation", "relu") == "relu"
            else "gelu",  # anything else is gelu there
            dropout=fields.get("dropout", 0.1),
        )


PRESETS = {
    # sizes of OpenLTM's load_pth_ckpt.ipynb; no config file ships with the checkpoint
    "timer_xl": TimerXLConfig(
        96, 96, 1024, 128, (8,) * 8, (2048,) * 8, context_len=2880, joint=False
    )
}


def variate_mask(c: int, n: int, covariate: bool) -> tuple[jax.Array, jax.Array]:
    """For C variates of N tokens in one sequence: which keys a query sees, and which are of its own
    variate; both [C*N, C*N].
    """
    variate, time = jnp.repeat(jnp.arange(c), n), jnp.tile(jnp.arange(n), c)
    same = variate[:, None] == variate[None]
    past = time[None] <= time[:, None]
    if not covariate:
        return past, same
    target_sees_others = (variate == c - 1)[:, None] & (variate != c - 1)[None]
    return (same & past) | target_sees_others, same


class TimeAttention(nn.Module):
    """Self-attention over the tokens of all variates [B, S, D] -> [B, S, D], and its
    named steps.
    """

    d_model: int
    n_heads: int
    head_dim: int
    value_dim: int
    dropout: float

    @nn.compact
    def __call__(self, x_BSD, seen_SS, same_SS, train: bool):
        heads, values, taps = (self.n_heads, self.head_dim), (self.n_heads, self.value_dim), {}
        # heads beside the batch: as plain batched products XLA's CPU code takes half the time of
        # "BNHK,BSHK->BHNS"
        q_BHSK, k_BHSK, v_BHSK = (
            jnp.swapaxes(Linear((self.d_model,), shape, name=n)(x_BSD), 1, 2)
            for n, shape in (("q", heads), ("k", heads), ("v", values))
        )
        q_BHSK, k_BHSK = taps["q"], taps["k"] = _half_turned(q_BHSK), _half_turned(k_BHSK)
        shape = (2, self.n_heads)
        bias_2H = (
            self.param("variate_bias", nn.initializers.zeros, shape)
            if self.n_heads
            else jnp.zeros(shape)
        )
        bias_HSS = jnp.where(same_SS[None], bias_2H[1][:, None, None], bias_2H[0][:, None, None])
        taps["bias"] = jnp.broadcast_to(bias_HSS[None], (len(x_BSD), *bias_HSS.shape))
        # as in the original, the bias is scaled with the product
        s_BHSS = (
            jnp.einsum("BHNK,BHSK->BHNS", q_BHSK, k_BHSK).astype(jnp.float32) + bias_HSS[None]
        ) * (self.head_dim**-0.5)
        w_BHSS = jax.nn.softmax(jnp.where(seen_SS[None, None], s_BHSS, -jnp.inf)).astype(
            v_BHSK.dtype
        )
        y_BHSK = jnp.einsum("BHNS,BHSK->BHNK", Dropout(self.dropout)(w_BHSS, train), v_BHSK)
        y_BSHK = taps["heads"] = jnp.swapaxes(y_BHSK, 1, 2)
        return Linear(values, (self.d_model,), name="out")(y_BSHK), taps


def _half_turned(x_BHSK: jax.Array) -> jax.Array:
    """Rotary positions along S on the first half of the last axis."""
    half = x_BHSK.shape[-1] // 2
    positions_11S = jnp.arange(x_BHSK.shape[2])[None, None]
    turned = rotary(x_BHSK[..., :half], positions_11S, pairs="adjacent")
    return jnp.concatenate([turned, x_BHSK[..., half:]], axis=-1)


class Block(nn.Module):
    """Post-norm block [B, S, D] -> [B, S, D], and the named steps in it."""

    cfg: TimerXLConfig
    layer: int

    @nn.compact
    def __call__(self, x_BSD, seen_SS, same_SS, train: bool):
        cfg, d, ffn_dim = self.cfg, self.cfg.d_model, self.cfg.ffn_dims[self.layer]

        def drop(y):
            return Dropout(cfg.dropout)(y, train)

        def norm(name):
            return nn.LayerNorm(1e-5, dtype=x_BSD.dtype, name=name)

        value_dim = width(cfg.value_dims, self.layer, cfg.head_dim)
        attention = TimeAttention(
            d, cfg.n_heads[self.layer], cfg.head_dim, value_dim, cfg.dropout, name="attn"
        )
        a_BSD, taps = attention(x_BSD, seen_SS, same_SS, train)
        taps["attn"] = a_BSD
        x_BSD = taps["norm1"] = norm("norm1")(x_BSD + drop(a_BSD))
        y_BSF = drop(ACTIVATIONS[cfg.activation](Linear((d,), (ffn_dim,), name="up")(x_BSD)))
        return norm("norm2")(x_BSD + drop(Linear((ffn_dim,), (d,), name="down")(y_BSF))), taps


class TimerXLNet(nn.Module):
    """Patches [B, C, N, P] in instance scale -> the points after each [B, C, N, Q], and the named
    steps between.
    """

    cfg: TimerXLConfig

    @nn.compact
    def __call__(self, p_BCNP, train: bool = False):
        cfg, taps = self.cfg, {"patches": p_BCNP}
        b, c, n, p = p_BCNP.shape
        x_BCND = taps["embed"] = Linear((p,), (cfg.d_model,), name="embed")(p_BCNP)
        x_BSD = x_BCND.reshape(b, c * n, cfg.d_model)
        seen_SS, same_SS = variate_mask(c, n, cfg.covariate)
        for i in range(len(cfg.ffn_dims)):  # a loop, not a scan: pruned layers differ in width
            x_BSD, inner = Block(cfg, i, name=f"layer_{i}")(x_BSD, seen_SS, same_SS, train)
            taps |= {f"layer_{i}/{name}": value for name, value in inner.items()} | {
                f"layer_{i}": x_BSD
            }
        x_BSD = taps["norm"] = nn.LayerNorm(1e-5, dtype=x_BSD.dtype, name="norm")(x_BSD)
        y_BSQ = taps["head"] = Linear((cfg.d_model,), (cfg.horizon,), name="head")(x_BSD)
        return y_BSQ.reshape(b, c, n, cfg.horizon), taps


@dataclasses.dataclass(frozen=True)
class TimerXL(Model):
    """Timer-XL at one size. See the module docstring; `Model` documents the methods."""

    config: TimerXLConfig

    family = "timer_xl"
    head_leaves = r"^head/"
    tasks = ("forecasting",)
    licence = "MIT (thuml/OpenLTM)"
    shard_rules = (
        (r"^embed/kernel$", (None, "fsdp")),
        (r"/attn/[qkv]/kernel$", ("fsdp", "tensor", None)),
        (r"/attn/[qkv]/bias$", ("tensor", None)),
        (r"/attn/out/kernel$", ("tensor", None, "fsdp")),
        (r"/attn/variate_bias$", (None, "tensor")),
        (r"/up/kernel$", ("fsdp", "tensor")),
        (r"/up/bias$", ("tensor",)),
        (r"/down/kernel$", ("tensor", "fsdp")),
        (r"^head/kernel$", ("fsdp", None)),
        (r"/(scale|bias)$", ()),
    )
    prunable = (
        Group.heads(r"layer_(\d+)/attn", others=(("variate_bias", 1),), values=r"value_dims.\1"),
        Group.units(r"layer_(\d+)"),
    )

    @classmethod
    def presets(cls) -> Mapping[str, TimerXLConfig]:
        return PRESETS

    @classmethod
    def config_from_dict(cls, fields: Mapping[str, Any]) -> TimerXLConfig:
        return config_from_json(TimerXLConfig, fields)

    @classmethod
    def small(cls) -> TimerXLConfig:
        return TimerXLConfig(8, 8, 16, 8, (2, 2), (24, 24), context_len=32)

    @property
    def variates(self) -> Literal["independent", "joint"]:
        return "joint" if self.config.joint else "independent"

    @property
    def context_len(self) -> int:
        return self.config.context_len

    @property
    def horizon(self) -> int:
        return self.config.horizon

    @property
    def eval_batch(self) -> int:
        return (
            64 if self.config.joint else 1024
        )  # attention among all variates grows with their number squared

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases of linear
        layers; norms 1, 0; N(0, 1) for the bias between variates.
        """
        patch_111P = jax.ShapeDtypeStruct((1, 1, 1, self.config.patch_len), jnp.float32)
        shapes = jax.eval_shape(TimerXLNet(self.config).init, key, patch_111P)["params"]
        flat = flatten(shapes)

        def rule(path, _):
            layer = path.rsplit("/", 1)[0]
            kernel = flat.get(f"{layer}/kernel")
            if path.endswith("/variate_bias"):
                return Normal(1.0)
            if kernel is None:
                return Constant(float(path.endswith("/scale")))
            inputs = kernel.shape[:1] if layer.endswith(("/q", "/k", "/v")) else kernel.shape[:-1]
            return Uniform(math.prod(inputs) ** -0.5)

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = (
            "thuml/OpenLTM adaptation script of timer_xl (commit 0b30050): 5e-6, cosine, ten epochs"
        )
        return Recipe(5e-6, 2048, 10, "cosine", self.context_len, self.horizon, "ims", source)

    # --- the network around its instance scaling

    def apply(self, params: Tree, x_BCT: jax.Array, key=None, train=False):
        """One forward pass in the units of x, all variates in one sequence: [B, C, N*Q], N = T //
        P, and named steps.

        Points after the last whole patch count in the scale but are no patch, as in the original.
        """
        cfg, (b, c, t) = self.config, x_BCT.shape
        n = t // cfg.patch_len
        if n < 1:
            raise ValueError(
                f"Timer-XL needs at least one patch of {cfg.patch_len} time steps, got {t}"
            )
        x_BCT = x_BCT.astype(jnp.float32)
        mean_BC1, std_BC1 = jnp.zeros((b, c, 1)), jnp.ones((b, c, 1))
        if cfg.use_norm:
            mean_BC1 = x_BCT.mean(-1, keepdims=True)
            std_BC1 = jnp.sqrt(jnp.square(x_BCT - mean_BC1).mean(-1, keepdims=True) + SCALE_EPS)
        p_BCNP = ((x_BCT - mean_BC1) / std_BC1)[..., : n * cfg.patch_len].reshape(
            b, c, n, cfg.patch_len
        )
        train = train and key is not None and cfg.dropout > 0
        net: Any = TimerXLNet(cfg)  # Flax types what apply returns too widely
        y_BCNQ, taps = net.apply(
            {"params": params}, p_BCNP, train, rngs={"dropout": key} if train else None
        )
        return y_BCNQ.reshape(b, c, n * cfg.horizon) * std_BC1 + mean_BC1, taps

    def _windows(self, x_BCT: jax.Array) -> jax.Array:
        """Windows as the network takes them: variates by themselves where they are not joint."""
        return x_BCT if self.config.joint else x_BCT.reshape(-1, 1, x_BCT.shape[-1])

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of every token's next points, in the units of the batch; the last variate alone
        counts with covariates.

        The context is cut to its newest whole patches; NaN in the target, and what lies past its
        end, does not count.
        """
        p, context = self.config.patch_len, batch["context"]
        if context.shape[-1] < p:
            raise ValueError(
                f"the next-patch loss needs a context of one patch ({p}), got {context.shape[-1]} "
                "steps"
            )
        context = context[..., context.shape[-1] % p :]
        series_BCT = jnp.concatenate([context[..., p:], batch["target"]], axis=-1)
        n, q = context.shape[-1] // p, self.config.horizon
        pad = max((n - 1) * p + q - series_BCT.shape[-1], 0)
        series_BCT = jnp.pad(series_BCT, ((0, 0), (0, 0), (0, pad)), constant_values=jnp.nan)
        places_T = (p * jnp.arange(n)[:, None] + jnp.arange(q)[None]).reshape(-1)
        return self.token_loss(
            params,
            dict(batch) | {"context": context, "target": series_BCT[..., places_T]},
            key,
            train,
        )

    def token_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE over all tokens against a `target` [B, C, N*Q]: the points that each token is to
        predict.
        """
        context, target = batch["context"], batch["target"]
        y_BCT, _ = self.apply(params, self._windows(fill_missing(context)), key, train)
        y_BCT = y_BCT.reshape(target.shape)
        if self.config.covariate:
            y_BCT, target = y_BCT[:, -1:], target[:, -1:]
        return mean_observed(jnp.square(y_BCT - jnp.nan_to_num(target)), ~jnp.isnan(target), batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the forecast, rolled out where the target is longer than one step."""
        point_BCH = self._forecast(params, batch["context"], batch["target"].shape[-1], key, train)
        return mse_observed(point_BCH, batch["target"], batch)

    # --- forecasting

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Rolled out in a window that loses its oldest patch and gains the forecast at each step,
        scaled anew each.

        The context is cut to its newest whole patches of at most `context_len` steps; one shorter
        than a patch is padded on the left with its first value. Missing values take the last value
        before them.
        """
        check_context(context, horizon)
        return Forecast(self._forecast(params, context, horizon))

    def _forecast(
        self, params: Tree, context_BCT, horizon: int, key=None, train=False
    ) -> jax.Array:
        p, q = self.config.patch_len, self.config.horizon
        x_BCT = fill_missing(jnp.asarray(context_BCT, jnp.float32))
        keep = max(min(x_BCT.shape[-1], self.context_len) // p * p, p)
        x_BCT = jnp.pad(x_BCT, ((0, 0), (0, 0), (max(keep - x_BCT.shape[-1], 0), 0)), mode="edge")[
            ..., -keep:
        ]
        steps = math.ceil(horizon / q)

        def step(window_BCT, _):
            y_BCQ = self.apply(params, window_BCT, key, train)[0][..., -q:]
            # a window of one patch that predicts less than a patch keeps what it needs
            drop = min(p, window_BCT.shape[-1] + q - p)
            return jnp.concatenate([window_BCT[..., drop:], y_BCQ], axis=-1), y_BCQ

        window_BCT = self._windows(x_BCT)
        if p == q and steps > 1:
            _, y_SBCQ = jax.lax.scan(step, window_BCT, length=steps)
        else:  # the window changes its length: forward passes of their own
            found = []
            for _ in range(steps):
                window_BCT, y_BCQ = step(window_BCT, None)
                found.append(y_BCQ)
            y_SBCQ = jnp.stack(found)
        y_BCT = jnp.moveaxis(y_SBCQ, 0, 2).reshape(*context_BCT.shape[:2], steps * q)
        return y_BCT[..., :horizon]
