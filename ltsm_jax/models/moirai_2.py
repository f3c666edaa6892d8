"""Moirai 2.0-R: a causal decoder over patches of all variates that gives quantiles of the next few
patches.

Liu et al., "Moirai 2.0: When Less Is More for Time Series Forecasting" (arXiv 2511.11698). Follows
SalesforceAIResearch/uni2ts (commit 8d2a08d), model/moirai2. One patch size, what is observed is an
input of its own, and the output of a token are the quantiles of the K patches after it. Farther
horizons are rolled out: one copy of the series per quantile, each continued with its own quantile;
the quantiles of the copies' quantiles are the next ones. The scale of a copy counts what was
generated. The quantiles of the first K patches may cross, as in the original.

The original's roll-out stops with an error at several variates; here all of them go on together.
Its `predict` sets missing values to 0, because its imputation takes the axis of time for that of
variates; here they get what it means to give them, the mean so far (`missing="zero"` is the
original). Dropout of attention weights (0 in the published model) acts in training only, in the
original always.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import packed
from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import LayerDims, equal_layers, head_width, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Normal, draw, torch_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.mlp import GatedMLP
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.packed import AnyVariateAttention, Series, Tokens, observed_series
from ltsm_jax.layers.quantiles import DECILES, level_problems, median_of
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.models.moirai import FINETUNING, HEAD_DIM
from ltsm_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Moirai2Config:
    """Widths are per layer, so that a pruned Moirai 2 is a Moirai 2.

    patch_size P, d_model D, head_dim K, layers: H, K and F of each, n_patches: how many patches a
    token predicts, levels of the quantiles. How it is used: context_len in time steps; missing:
    what stands for missing values, the mean so far or 0; variates: whether those of one window see
    each other.
    """

    patch_size: int
    d_model: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    n_patches: int = 4
    levels: tuple[float, ...] = DECILES
    max_seq_len: int = 512
    scaling: bool = True
    dropout: float = 0.0
    attn_dropout: float = 0.0
    context_len: int = 1680
    missing: Literal["mean", "zero"] = "mean"
    variates: Literal["joint", "independent"] = "joint"

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        sizes = ("patch_size", "d_model", "head_dim", "n_patches", "max_seq_len", "context_len")
        problems += field_problems(self, *sizes) + level_problems(self.levels)
        if self.head_dim % 4:
            problems.append(
                "half a head turns in pairs, so head_dim must be a multiple of 4, got "
                f"{self.head_dim}"
            )
        refuse(self, problems)

    @classmethod
    def of(
        cls, patch_size: int, d_model: int, d_ff: int, layers: int, heads: int | None = None, **rest
    ) -> "Moirai2Config":
        """Equal layers; heads split the model width, by default as in the original."""
        heads = d_model // HEAD_DIM if heads is None else heads
        head_dim = head_width(d_model, heads)
        equal = equal_layers(layers, heads, head_dim, ffn=d_ff)
        return cls(patch_size, d_model, head_dim, layers=equal, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "Moirai2Config":
        """Reads config.json of the hub.

        Raises: ValueError naming the fields that are missing.
        """
        sizes = ("patch_size", "d_model", "d_ff", "num_layers")
        require_fields("Moirai 2", fields, (*sizes, "num_predict_token", "quantile_levels"))
        return cls.of(
            *(int(fields[name]) for name in sizes),
            n_patches=int(fields["num_predict_token"]),
            levels=tuple(map(float, fields["quantile_levels"])),
            max_seq_len=int(fields.get("max_seq_len", 512)),
            scaling=bool(fields.get("scaling", True)),
            dropout=float(fields.get("dropout_p", 0.0)),
            attn_dropout=float(fields.get("attn_dropout_p", 0.0)),
        )


PRESETS = {
    "Salesforce/moirai-2.0-R-small": Moirai2Config.of(16, 384, 1024, layers=6),
    # ours, small enough to ship and to train on a laptop. Patches as long as the forecast, a day of
    # quarter hours or four of hours: seasons of 12, 24, 48 and 96 steps begin alike in all of them
    "moirai2-mini": Moirai2Config.of(
        96,
        128,
        256,
        layers=4,
        heads=4,
        n_patches=1,
        context_len=672,
        variates="independent",
    ),
}


class Residual(nn.Module):
    """`output(silu(hidden x)) + residual x`: [..., in] -> [..., out]; and the named
    steps between.
    """

    width: int
    features: int

    @nn.compact
    def __call__(self, x):
        into, taps = (x.shape[-1],), {}
        taps["hidden"] = Linear(into, (self.width,), name="hidden")(x)
        taps["silu"] = nn.silu(taps["hidden"])
        taps["output"] = Linear((self.width,), (self.features,), name="output")(taps["silu"])
        taps["residual"] = Linear(into, (self.features,), name="residual")(x)
        return taps["output"] + taps["residual"], taps


class Block(nn.Module):
    """Pre-norm block [B, N, D] -> [B, N, D], and the named steps between."""

    cfg: Moirai2Config
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BND, tokens: Tokens, train: bool):
        cfg, taps = self.cfg, {}
        y_BND = taps["norm1"] = RMSNorm(packed.NORM_EPS, name="norm1")(x_BND)
        attention = AnyVariateAttention(cfg.d_model, self.dims.attn, cfg.attn_dropout, name="attn")
        y_BND, inner = attention(
            y_BND, tokens.causal, tokens.same_variate, time_id_BN=tokens.time_id, train=train
        )
        taps |= nested("attn", inner, y_BND)
        x_BND = x_BND + Dropout(cfg.dropout)(y_BND, train)
        y_BND = taps["norm2"] = RMSNorm(packed.NORM_EPS, name="norm2")(x_BND)
        y_BND = taps["ffn"] = GatedMLP(self.dims.ffn, dropout=cfg.dropout, name="ffn")(y_BND, train)
        return x_BND + y_BND, taps


class Moirai2Net(nn.Module):
    """Packed tokens -> quantiles [B, N, patches, Q, P] of the patches after each, in the scale of
    its series; and the named steps between. only: places [n] of the tokens whose quantiles are
    asked for; None: all.
    """

    cfg: Moirai2Config

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False, only=None):
        cfg = self.cfg
        loc_BN1, scale_BN1 = (
            packed.token_scale(tokens) if cfg.scaling else packed.neutral_scale(tokens)
        )
        scaled_BNP = (tokens.target - loc_BN1) / scale_BN1
        taps = {"loc": loc_BN1, "scale": scale_BN1, "scaled": scaled_BNP}
        x_BNI = jnp.concatenate([scaled_BNP, tokens.observed.astype(scaled_BNP.dtype)], axis=-1)
        x_BND, inner = Residual(cfg.d_model, cfg.d_model, name="embed")(x_BNI)
        taps |= nested("embed", inner, x_BND)
        # A loop and no scan: pruned layers differ in width.
        for i, dims in enumerate(cfg.layers):
            x_BND, inner = Block(cfg, dims, name=f"layer_{i}")(x_BND, tokens, train)
            taps |= nested(f"layer_{i}", inner, x_BND)
        x_BND = taps["norm"] = RMSNorm(packed.NORM_EPS, name="norm")(x_BND)
        x_BND = x_BND if only is None else x_BND[:, only]
        shape = (cfg.n_patches, len(cfg.levels), cfg.patch_size)
        y_BNO, inner = Residual(cfg.d_model, int(np.prod(shape)), name="head")(x_BND)
        taps |= nested("head", inner, y_BNO)
        return y_BNO.astype(jnp.float32).reshape(*x_BND.shape[:2], *shape), taps


def causal_mean(x_BCT: jax.Array) -> jax.Array:
    """NaN replaced by the mean of the points before it, a missing one among these standing for the
    last observed one; 0 where nothing was observed yet.
    """
    observed = ~jnp.isnan(x_BCT)
    steps = jnp.arange(x_BCT.shape[-1]).reshape((1,) * (x_BCT.ndim - 1) + (-1,))
    last = jax.lax.cummax(jnp.where(observed, steps, 0), axis=x_BCT.ndim - 1)
    held = jnp.nan_to_num(jnp.take_along_axis(x_BCT, last, axis=-1))
    first = held[..., :1]
    before = jnp.pad(jnp.cumsum(held - first, axis=-1), ((0, 0),) * (x_BCT.ndim - 1) + ((1, 0),))[
        ..., :-1
    ]
    return jnp.where(
        observed, x_BCT, jnp.where(steps == 0, 0.0, first + before / jnp.maximum(steps, 1))
    )


@dataclasses.dataclass(frozen=True)
class Moirai2(Model):
    """Moirai 2 at one size. See the module docstring; `Model` documents the methods."""

    config: Moirai2Config

    family = "moirai_2"
    published = PRESETS
    tasks = ("forecasting",)
    licence = "CC-BY-NC-4.0, non-commercial (Salesforce/moirai-2.0-R)"
    shard_rules = (
        (r"^embed/(hidden|residual|output)/kernel$", (None, "fsdp")),
        (r"^head/.*/kernel$", ("fsdp", None)),
        (r"/attn/variate_bias$", (None, "tensor")),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn", others=(("variate_bias", 1),)), Group.units("ffn"))

    @classmethod
    def small(cls) -> Moirai2Config:
        return Moirai2Config.of(
            4, 16, 24, layers=2, heads=2, n_patches=2, levels=(0.1, 0.5, 0.9), context_len=32
        )

    @property
    def horizon(self) -> int:
        return self.config.n_patches * self.config.patch_size

    @property
    def eval_batch(self) -> int:
        # Times the number of quantiles, once the roll-out has begun.
        return 32

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults: N(0, 1) for the variate biases; U(+-1/sqrt(inputs)) for weights and
        biases; norms 1.
        """
        cfg = self.config
        shapes = parameter_shapes(Moirai2Net(cfg), key, packed.one_token(cfg.patch_size))
        return draw(key, shapes, torch_rule(shapes, own={"variate_bias": Normal(1.0)}))

    def recipe(self) -> Recipe:
        source = (
            "none in uni2ts for Moirai 2: that of Moirai 1.1-R (lr 5e-7, AdamW, decay 0.1, clip "
            "1.0)"
        )
        return self._recipe(source=source, **FINETUNING)

    # --- the network, and what is made of its quantiles

    def apply(
        self, params: Tree, tokens: Tokens, key=None, train=False, only=None
    ) -> tuple[jax.Array, dict]:
        """One forward pass: at every token quantiles [B, N, patches, Q, P] of the patches after it,
        in the scale of its series (`loc` and `scale` of the named steps), and the named steps.
        """
        return run_network(Moirai2Net(self.config), params, tokens, key=key, train=train, only=only)

    def shifted_losses(
        self, params: Tree, tokens: Tokens, key=None, train=False, weight=None
    ) -> jax.Array:
        """Quantile losses [n_patches] in the scale of the series: of the predicted tokens under the
        token 1, 2, ... before each, every variate of every sample counting alike.

        The tokens of a variate must follow each other. weight: of each row.
        """
        cfg = self.config
        y, taps = self.apply(params, tokens, key=key, train=train)
        level = jnp.asarray(cfg.levels)[None, None, :, None]
        losses = []
        for k in range(1, cfg.n_patches + 1):
            before, after = (
                jax.tree.map(lambda leaf, cut=cut: leaf[:, cut], tokens)
                for cut in (slice(None, -k), slice(k, None))
            )
            same = (before.sample_id == after.sample_id) & (before.variate_id == after.variate_id)
            after = dataclasses.replace(after, predicted=after.predicted & same)
            error = taps["scaled"][:, k:, None] - y[:, :-k, k - 1]
            pinball = jnp.where(error > 0, level * error, (level - 1) * error).mean(2)
            losses.append(packed.group_mean(pinball, after, weight))
        return jnp.stack(losses)

    def packed_loss(
        self, params: Tree, tokens: Tokens, key=None, train=False, weight=None
    ) -> jax.Array:
        """Mean of `shifted_losses`. The repository has the loss of one shift but no trainer; the
        mean is ours.
        """
        return self.shifted_losses(params, tokens, key=key, train=train, weight=weight).mean()

    def first(
        self, params: Tree, tokens: Tokens, last: np.ndarray, key=None, train=False
    ) -> jax.Array:
        """Quantiles [B, C, steps, Q] of the `n_patches` patches after the tokens at the places
        `last` [C], in the units of the tokens.
        """
        y, taps = self.apply(params, tokens, key=key, train=train, only=last)
        y = y * taps["scale"][:, last, :, None, None] + taps["loc"][:, last, :, None, None]
        return jnp.swapaxes(y, -1, -2).reshape(*y.shape[:2], -1, y.shape[3])

    def quantiles(self, params: Tree, past: Series, horizon: int, **covariates) -> jax.Array:
        """Quantiles [B, C, H, Q] after `past`, in its units; rolled out where they are far.

        covariates: `begun_BT`, `known`, `past_known`, see `layers.packed.pack`.
        """
        cfg, (b, c, t) = self.config, past[0].shape
        p, k, q = cfg.patch_size, cfg.n_patches, len(cfg.levels)
        rounds = -(-horizon // (k * p))
        # Tokens past the horizon are seen by none before them.
        far = horizon if rounds == 1 else rounds * k * p
        if "known" in covariates:
            more = ((0, 0), (0, 0), (0, far - horizon))
            covariates["known"] = tuple(jnp.pad(a, more) for a in covariates["known"])
        tokens = packed.pack(past, far, p, width=p, **covariates)
        before, steps = -(-t // p), -(-far // p)
        last, after = np.arange(c) * before + before - 1, c * before + np.arange(c) * steps
        y_BCTQ = self.first(params, tokens, last)
        if rounds == 1:
            return y_BCTQ[:, :, :horizon]
        # one copy per quantile, beside each other in a row's place: [B * Q, N]
        copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, q, axis=0), tokens)
        level = jnp.asarray(cfg.levels)

        def go_on(state, start):
            copies, y_BCTQ = state
            places = (jnp.asarray(after)[:, None] + start + jnp.arange(k)[None]).reshape(-1)
            values = jnp.moveaxis(y_BCTQ, -1, 1).reshape(b * q, c * k, p)
            copies = dataclasses.replace(
                copies,
                target=copies.target.at[:, places].set(values),
                predicted=copies.predicted.at[:, places].set(False),
            )
            y_RCTQ = self.first(params, copies, jnp.asarray(after) + start + k - 1)
            # The quantiles of all copies' quantiles are the next ones.
            each_BCTSQ = jnp.moveaxis(y_RCTQ.reshape(b, q, c, k * p, q), 1, 3)
            all_BCTS = each_BCTSQ.reshape(b, c, k * p, q * q)
            new_BCTQ = jnp.moveaxis(jnp.quantile(all_BCTS, level, axis=-1), 0, -1)
            return (copies, new_BCTQ), new_BCTQ

        _, later = jax.lax.scan(go_on, (copies, y_BCTQ), jnp.arange(rounds - 1) * k)
        later = jnp.moveaxis(later, 0, 2).reshape(b, c, -1, q)
        return jnp.concatenate([y_BCTQ, later], axis=2)[:, :, :horizon]

    def _filled(self, x_BCT: jax.Array) -> jax.Array:
        return causal_mean(x_BCT) if self.config.missing == "mean" else jnp.nan_to_num(x_BCT)

    def prepare(self, x_BCT: jax.Array, length: int | None = None) -> Series:
        """The context as the original's pipeline makes it: missing values filled, the newest
        `context_len` steps, and one shorter than that filled up on the left with its first value,
        that counts as observed if that is.

        length: fill up to this many steps; by default to whole patches, which gives the same
        forecast.
        """
        cfg = self.config
        x_BCT = jnp.asarray(x_BCT, jnp.float32)
        observed = ~jnp.isnan(x_BCT)
        t = min(x_BCT.shape[-1], cfg.context_len)
        x, observed = self._filled(x_BCT)[..., -t:], observed[..., -t:]
        length = (
            min(-(-t // cfg.patch_size) * cfg.patch_size, cfg.context_len)
            if length is None
            else length
        )
        width = ((0, 0), (0, 0), (length - t, 0))
        return jnp.pad(x, width, mode="edge"), jnp.pad(observed, width, mode="edge")

    # --- the contract

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """`packed_loss` of the target's patches, each given the true ones before it."""
        cfg, rows = self.config, packed.rows_of(batch, self.config.variates)
        (_, c, t), h = rows["context"].shape, rows["target"].shape[-1]
        past, p = self.prepare(rows["context"]), cfg.patch_size
        joined = self._filled(jnp.concatenate([rows["context"], rows["target"]], axis=-1))
        future = joined[..., t:], ~jnp.isnan(rows["target"])
        tokens = packed.pack(past, h, p, width=p, future=future)
        n_past, n_future = -(-past[0].shape[-1] // p), -(-h // p)
        spans = [(i * n_past, c * n_past + i * n_future) for i in range(c)]
        order = np.concatenate([np.r_[x : x + n_past, y : y + n_future] for x, y in spans])
        # The future of a variate behind its past.
        tokens = jax.tree.map(lambda leaf: leaf[:, order], tokens)
        return self.packed_loss(params, tokens, key=key, train=train, weight=rows.get("weight"))

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median, over the observed targets. It reaches as far as one forward pass:
        `horizon`.
        """
        rows = packed.rows_of(batch, self.config.variates)
        h = rows["target"].shape[-1]
        if h > self.horizon:
            raise ValueError(
                f"the point loss reaches {self.horizon} steps, not {h}; use the quantile loss "
                "(mode='ims')"
            )
        past = self.prepare(rows["context"])
        (_, c, t), p = past[0].shape, self.config.patch_size
        before = -(-t // p)
        tokens = packed.pack(past, h, p, width=p)
        y = self.first(params, tokens, np.arange(c) * before + before - 1, key=key, train=train)[
            :, :, :h
        ]
        return packed.masked_mse(
            median_of(y, self.config.levels), *observed_series(rows["target"]), rows.get("weight")
        )

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Quantiles; the point is the median. The context is made as `prepare` says."""
        check_context(context, horizon)
        x = packed.rows_of({"context": jnp.asarray(context, jnp.float32)}, self.config.variates)[
            "context"
        ]
        y = self.quantiles(params, self.prepare(x), horizon)
        y = y.reshape(*context.shape[:2], horizon, -1)
        return Forecast(median_of(y, self.config.levels), y, None, levels=self.config.levels)
