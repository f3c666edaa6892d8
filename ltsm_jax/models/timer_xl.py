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
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import HeadDims, LayerDims, equal_layers, head_width, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Normal, draw, torch_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, mean_observed
from ltsm_jax.layers.mlp import feed_forward
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.patches import end_to_end, newest_patches, token_labels
from ltsm_jax.layers.rope import rotary
from ltsm_jax.models.configs import field_problems, refuse
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

SCALE_EPS = 1e-5  # inside the root, added to the variance
PATCHES = 30  # of the longest context that the checkpoint was trained with: 2880 points


@dataclasses.dataclass(frozen=True)
class TimerXLConfig:
    """Widths are per layer, so that a pruned model is of the same class.

    patch_len P, horizon Q (points that a token predicts), d_model D, head_dim K, layers: H, K
    and F of each, context_len in time steps. joint: the variates of a window see one
    another. covariate: all but the last variate are known ahead, the last is forecast: it sees all
    of the others, each of which sees only itself. use_norm: whether each variate is scaled by its
    own mean and standard deviation.
    """

    patch_len: int
    horizon: int
    d_model: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    context_len: int
    joint: bool = True
    covariate: bool = False
    use_norm: bool = True
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = 0.1

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        problems += field_problems(
            self, "patch_len", "horizon", "d_model", "head_dim", "context_len"
        )
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
        refuse(self, problems)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimerXLConfig":
        """From option names of the original's scripts (input_token_len, output_token_len, d_model,
        n_heads, e_layers, d_ff; seq_len, dropout, activation, use_norm, covariate and data where
        given).
        """
        d, heads, layers = fields["d_model"], fields["n_heads"], fields["e_layers"]
        head_dim = head_width(d, heads)
        if fields.get("flash_attention"):
            raise ValueError(
                "flash_attention: that branch of the original mixes up heads and time; set it to "
                "false"
            )
        # Anything else is gelu there.
        return cls(
            patch_len=fields["input_token_len"],
            horizon=fields["output_token_len"],
            d_model=d,
            head_dim=head_dim,
            layers=equal_layers(layers, heads, head_dim, ffn=fields["d_ff"]),
            context_len=fields.get("seq_len", PATCHES * fields["input_token_len"]),
            joint=not str(fields.get("data", "")).startswith("Univariate"),
            covariate=fields.get("covariate", False),
            use_norm=fields.get("use_norm", True),
            activation="relu" if fields.get("activation", "relu") == "relu" else "gelu",
            dropout=fields.get("dropout", 0.1),
        )


PRESETS = {
    # sizes of OpenLTM's load_pth_ckpt.ipynb; no config file ships with the checkpoint
    "timer_xl": TimerXLConfig(
        96,
        96,
        1024,
        head_dim=128,
        layers=equal_layers(8, 8, 128, ffn=2048),
        context_len=2880,
        joint=False,
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
    dims: HeadDims
    dropout: float

    @nn.compact
    def __call__(self, x_BSD, seen_SS, same_SS, train: bool):
        dims, taps = self.dims, {}

        def project(name):
            y_BSHK = Linear((self.d_model,), dims.shapes[name], name=name)(x_BSD)
            return jnp.swapaxes(y_BSHK, 1, 2)

        q_BHSK = taps["q"] = _half_turned(project("q"))
        k_BHSK = taps["k"] = _half_turned(project("k"))
        v_BHSK = project("v")
        # Without heads there is no leaf: neither files nor optimisers need to know of it.
        bias_2H = jnp.zeros((2, 0))
        if dims.heads:
            bias_2H = self.param("variate_bias", nn.initializers.zeros, (2, dims.heads))
        bias_HSS = jnp.where(same_SS[None], bias_2H[1][:, None, None], bias_2H[0][:, None, None])
        taps["bias"] = jnp.broadcast_to(bias_HSS[None], (len(x_BSD), *bias_HSS.shape))
        scale = dims.qk**-0.5
        y_BHSK, _ = attend(
            q_BHSK,
            k_BHSK,
            v_BHSK,
            seen=seen_SS[None, None],
            # As in the original, the bias is scaled with the product.
            bias=bias_HSS[None] * scale,
            scale=scale,
            hidden=-jnp.inf,
            dropout=functools.partial(Dropout(self.dropout), train=train),
        )
        y_BSHK = taps["heads"] = jnp.swapaxes(y_BHSK, 1, 2)
        return Linear(dims.joined, (self.d_model,), name="out")(y_BSHK), taps


def _half_turned(x_BHSK: jax.Array) -> jax.Array:
    """Rotary positions along S on the first half of the last axis."""
    half = x_BHSK.shape[-1] // 2
    positions_11S = jnp.arange(x_BHSK.shape[2])[None, None]
    turned = rotary(x_BHSK[..., :half], positions_11S, pairs="adjacent")
    return jnp.concatenate([turned, x_BHSK[..., half:]], axis=-1)


class Block(nn.Module):
    """Post-norm block [B, S, D] -> [B, S, D], and the named steps in it."""

    cfg: TimerXLConfig
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BSD, seen_SS, same_SS, train: bool):
        cfg, d, ffn_dim = self.cfg, self.cfg.d_model, self.dims.ffn

        def drop(y):
            return Dropout(cfg.dropout)(y, train)

        def norm(name):
            return nn.LayerNorm(1e-5, dtype=x_BSD.dtype, name=name)

        attention = TimeAttention(d, self.dims.attn, cfg.dropout, name="attn")
        a_BSD, taps = attention(x_BSD, seen_SS, same_SS, train=train)
        taps["attn"] = a_BSD
        x_BSD = taps["norm1"] = norm("norm1")(x_BSD + drop(a_BSD))
        y_BSD = drop(feed_forward(x_BSD, ffn_dim, cfg.activation, dropout=drop))
        return norm("norm2")(x_BSD + y_BSD), taps


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
        # A loop and no scan: pruned layers differ in width.
        for i, dims in enumerate(cfg.layers):
            x_BSD, inner = Block(cfg, dims, name=f"layer_{i}")(x_BSD, seen_SS, same_SS, train=train)
            taps |= nested(f"layer_{i}", inner, x_BSD)
        x_BSD = taps["norm"] = nn.LayerNorm(1e-5, dtype=x_BSD.dtype, name="norm")(x_BSD)
        y_BSQ = taps["head"] = Linear((cfg.d_model,), (cfg.horizon,), name="head")(x_BSD)
        return y_BSQ.reshape(b, c, n, cfg.horizon), taps


@dataclasses.dataclass(frozen=True)
class TimerXL(Model):
    """Timer-XL at one size. See the module docstring; `Model` documents the methods."""

    config: TimerXLConfig

    family = "timer_xl"
    published = PRESETS
    tasks = ("forecasting",)
    licence = "MIT (thuml/OpenLTM)"
    shard_rules = (
        (r"^embed/kernel$", (None, "fsdp")),
        (r"/attn/variate_bias$", (None, "tensor")),
        (r"^head/kernel$", ("fsdp", None)),
        *shards.LAYERS,
        *shards.UP_BIAS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn", others=(("variate_bias", 1),)), Group.units())

    @classmethod
    def small(cls) -> TimerXLConfig:
        return TimerXLConfig(
            8, 8, 16, head_dim=8, layers=equal_layers(2, 2, 8, ffn=24), context_len=32
        )

    @property
    def variates(self) -> Literal["independent", "joint"]:
        return "joint" if self.config.joint else "independent"

    @property
    def eval_batch(self) -> int:
        # Attention among all variates grows with their number squared.
        return 64 if self.config.joint else 1024

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases of linear
        layers; norms 1, 0; N(0, 1) for the bias between variates.
        """
        patch_111P = jax.ShapeDtypeStruct((1, 1, 1, self.config.patch_len), jnp.float32)
        shapes = parameter_shapes(TimerXLNet(self.config), key, patch_111P)
        return draw(key, shapes, torch_rule(shapes, own={"variate_bias": Normal(1.0)}))

    def recipe(self) -> Recipe:
        source = (
            "thuml/OpenLTM adaptation script of timer_xl (commit 0b30050): 5e-6, cosine, ten epochs"
        )
        return self._recipe(lr=5e-6, batch_size=2048, epochs=10, schedule="cosine", source=source)

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
        y_BCNQ, taps = run_network(TimerXLNet(cfg), params, p_BCNP, key=key, train=train)
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
        want_BCNQ = token_labels(series_BCT, context.shape[-1] // p, p, points=self.config.horizon)
        want_BCT = want_BCNQ.reshape(*context.shape[:2], -1)
        told = dict(batch) | {"context": context, "target": want_BCT}
        return self.token_loss(params, told, key=key, train=train)

    def token_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE over all tokens against a `target` [B, C, N*Q]: the points that each token is to
        predict.
        """
        context, target = batch["context"], batch["target"]
        y_BCT, _ = self.apply(params, self._windows(fill_missing(context)), key=key, train=train)
        y_BCT = y_BCT.reshape(target.shape)
        if self.config.covariate:
            y_BCT, target = y_BCT[:, -1:], target[:, -1:]
        return mean_observed(jnp.square(y_BCT - jnp.nan_to_num(target)), ~jnp.isnan(target), batch)

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
        x_BCT = newest_patches(x_BCT, p, self.context_len)
        steps = math.ceil(horizon / q)

        def step(window_BCT, _):
            y_BCQ = self.apply(params, window_BCT, key=key, train=train)[0][..., -q:]
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
        # Windows of one variate each, where variates do not see each other, become rows again.
        return end_to_end(y_SBCQ)[..., :horizon].reshape(*context_BCT.shape[:2], horizon)
