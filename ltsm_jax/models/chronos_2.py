"""Chronos-2: an encoder over patches in time and over the series of a group, with the future's
quantiles at once.

Ansari et al., "Chronos-2: From Univariate to Universal Forecasting" (arXiv 2510.15821). Follows
amazon-science/chronos-forecasting (commit 95185d1), src/chronos/chronos2.

A series of T points, NaN where nothing was observed, is scaled by its own mean and standard
deviation, goes through arcsinh and is cut into patches; a token holds the time, the values and the
mask of one patch. Behind the context stand a learned token and one token for each future patch,
which holds what is known of the future (covariates) or nothing. A layer attends over the time of
each series, then at each time over the series of its group, so the variates of a window and their
covariates see each other. The last tokens become the quantiles of the future, which are not sorted.
Beyond `max_patches` patches the forecast is rolled out along nine quantile paths, weighed by the
probability they stand for.

Letters beyond those of the library: G groups, M members of a group, R future steps, S tokens of a
series.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context, with_covariates
from ltsm_jax.layers.dims import HeadDims, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, Normal, draw
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import mean_over_rows, mse_observed, scale_of_observed
from ltsm_jax.layers.mlp import ACTIVATIONS, feed_forward
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.quantiles import DECILES, at_levels, level_problems, median_of
from ltsm_jax.layers.residual import ResidualBlock
from ltsm_jax.layers.rope import rotary
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import COVARIATES, Batch, Forecast, Model, Recipe, windows_that_fit
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

FLAT_SCALE = 1e-5  # the scale of a series without any spread, in place of 0
PATHS = DECILES  # quantile levels along which long horizons are rolled out
LEVELS = (0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99)


@dataclasses.dataclass(frozen=True)
class Chronos2Layer:
    """A layer's attention over time and over a group, and its feed-forward units."""

    time: HeadDims
    group: HeadDims
    ffn: int


@dataclasses.dataclass(frozen=True)
class Chronos2Config:
    """Widths are per layer, so that a pruned Chronos-2 is a Chronos-2.

    d_model D, head_dim K, layers: H, K and F of each; block_dim: hidden width of the two residual
    blocks. patch_len P and context_len in time steps; max_patches: future patches of one forward
    pass. levels: quantile levels Q. time_scale: steps by which the time in a token is divided.
    """

    d_model: int
    head_dim: int
    layers: tuple[Chronos2Layer, ...]
    block_dim: int
    patch_len: int = 16
    context_len: int = 8192
    max_patches: int = 64
    levels: tuple[float, ...] = LEVELS
    time_scale: int = 8192
    arcsinh: bool = True
    rope_base: float = 10000.0
    activation: Literal["relu", "gelu"] = "relu"
    eps: float = 1e-6
    dropout: float = 0.1
    init_factor: float = 0.05

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim, scores={"group": "channels"})
        sizes = ("d_model", "head_dim", "block_dim", "patch_len", "context_len", "max_patches")
        problems += field_problems(self, *sizes, "time_scale") + level_problems(self.levels)
        if self.head_dim % 2:
            problems.append(f"head_dim must be even for the rotation, got {self.head_dim}")
        refuse(self, problems)

    @classmethod
    def of(
        cls, d_model: int, heads: int, d_ff: int, layers: int, *, head_dim: int = 64, **rest
    ) -> "Chronos2Config":
        """Equal layers."""
        attention = HeadDims.of(heads, head_dim)
        equal = (Chronos2Layer(attention, attention, d_ff),) * layers
        return cls(d_model, head_dim, equal, block_dim=d_ff, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "Chronos2Config":
        """Reads a published config.json: T5's fields, and `chronos_config` within.

        Raises: ValueError naming the fields that are missing, or a layout that the original cannot
        run either.
        """
        chronos = fields.get("chronos_config", {})
        names = ("d_model", "num_heads", "d_ff", "num_layers", "d_kv")
        inner = ("context_length", "input_patch_size", "max_output_patches", "quantiles")
        require_fields("Chronos-2", fields, names, inner={"chronos_config": inner})
        patch = chronos["input_patch_size"]
        same = {chronos.get(name, patch) for name in ("output_patch_size", "input_patch_stride")}
        if (
            same != {patch}
            or not chronos.get("use_reg_token", True)
            or fields.get("is_gated_act", False)
        ):
            raise ValueError(
                "a Chronos-2 has equal input and output patches without overlap, the token behind "
                "the context, and no gated feed-forward layers"
            )
        return cls.of(
            fields["d_model"],
            fields["num_heads"],
            fields["d_ff"],
            layers=fields["num_layers"],
            head_dim=fields["d_kv"],
            patch_len=patch,
            context_len=chronos["context_length"],
            max_patches=chronos["max_output_patches"],
            levels=tuple(chronos["quantiles"]),
            time_scale=chronos.get("time_encoding_scale") or chronos["context_length"],
            arcsinh=chronos.get("use_arcsinh", False),
            rope_base=fields.get("rope_theta", 10000.0),
            activation=fields.get("dense_act_fn", "relu"),
            eps=fields.get("layer_norm_epsilon", 1e-6),
            dropout=fields.get("dropout_rate", 0.1),
            init_factor=fields.get("initializer_factor", 1.0),
        )


# widths and depths: their parameter counts are those of the published models, 120M and 28M
PRESETS = {
    "amazon/chronos-2": Chronos2Config.of(768, 12, 3072, layers=12),
    "autogluon/chronos-2-small": Chronos2Config.of(512, 8, 2048, layers=6),
    "autogluon/chronos-2-synth": Chronos2Config.of(768, 12, 3072, layers=12),
}


class Attention(nn.Module):
    """Attention over the last axis but one of x [A, B, S, D], without bias and without a scale;
    keys hidden by `seen` (broadcast to [A, B, 1, S, S]). rotate: positions are told by rotation.
    """

    cfg: Chronos2Config
    dims: HeadDims
    rotate: bool

    @nn.compact
    def __call__(self, x_ABSD, seen, train: bool):
        cfg, dims = self.cfg, self.dims

        def project(name):
            linear = Linear((cfg.d_model,), dims.shapes[name], use_bias=False, name=name)
            return jnp.moveaxis(linear(x_ABSD), 3, 2)

        q, k, v = project("q"), project("k"), project("v")
        if self.rotate:
            positions = jnp.arange(x_ABSD.shape[2]).reshape(1, 1, 1, -1)
            q, k = (rotary(y, positions, base=cfg.rope_base) for y in (q, k))
        # A token alone in its group, hidden, sees all others, as in the original; none sees it.
        drop = functools.partial(Dropout(cfg.dropout), train=train)
        y_ABHSK, _ = attend(q, k, v, seen=seen, dropout=drop)
        values = dims.joined
        out = Linear(values, (cfg.d_model,), use_bias=False, name="out")
        return out(jnp.moveaxis(y_ABHSK, 2, 3))


class Layer(nn.Module):
    """x [G, M, S, D] through attention over time, attention over the group, and feed-forward; and
    the steps between.
    """

    cfg: Chronos2Config
    dims: Chronos2Layer

    @nn.compact
    def __call__(self, x_GMSD, seen_GMS, same_GMM, train: bool):
        cfg, taps = self.cfg, {}

        def drop(y):
            return Dropout(cfg.dropout)(y, train)

        def norm(i):
            return RMSNorm(cfg.eps, name=f"norm{i}")(x_GMSD)

        seen = seen_GMS[:, :, None, None, :]
        attend = Attention(cfg, self.dims.time, True, name="time")
        y = attend(norm(1), seen, train)
        x_GMSD = taps["time"] = x_GMSD + drop(y)
        seen = same_GMM[:, None, None] & jnp.swapaxes(seen_GMS, 1, 2)[:, :, None, None, :]
        attend = Attention(cfg, self.dims.group, False, name="group")
        y = attend(jnp.swapaxes(norm(2), 1, 2), seen, train)
        x_GMSD = taps["group"] = x_GMSD + drop(jnp.swapaxes(y, 1, 2))
        width_F, activation = self.dims.ffn, cfg.activation
        y = feed_forward(norm(3), width_F, activation, use_bias=False, dropout=drop)
        x_GMSD = x_GMSD + drop(y)
        return x_GMSD, taps


class Chronos2Net(nn.Module):
    """Tokens of the context [G, M, N, 3P] and of the future [G, M, N', 3P], and which context
    tokens have anything to see [G, M, N] -> quantiles [G, M, N', Q, P] in the inner scale, and the
    named steps between.
    """

    cfg: Chronos2Config

    @nn.compact
    def __call__(self, p_GMNP, future_GMNP, seen_GMN, same_GMM, train: bool = False):
        cfg, taps = self.cfg, {"patches": p_GMNP, "future_patches": future_GMNP}

        def block(inputs, outputs, name):
            activation = ACTIVATIONS[cfg.activation]
            return ResidualBlock(
                inputs,
                cfg.block_dim,
                outputs,
                activation=activation,
                dropout=cfg.dropout,
                name=name,
            )

        embed = block(3 * cfg.patch_len, cfg.d_model, "embed")
        x = taps["embed"] = embed(p_GMNP, train)
        ahead = taps["embed_future"] = embed(future_GMNP, train)
        # Row 0 is never used.
        tokens_VD = self.param("tokens", nn.initializers.zeros, (2, cfg.d_model))
        reg = jnp.broadcast_to(
            tokens_VD[1].astype(x.dtype).reshape(1, 1, 1, -1), (*x.shape[:2], 1, cfg.d_model)
        )
        x_GMSD = jnp.concatenate([x, reg, ahead], axis=2)
        x_GMSD = Dropout(cfg.dropout)(x_GMSD, train)
        n = ahead.shape[2]
        seen_GMS = taps["seen"] = jnp.pad(
            seen_GMN, ((0, 0), (0, 0), (0, n + 1)), constant_values=True
        )
        for i, dims in enumerate(cfg.layers):
            x_GMSD, inner = Layer(cfg, dims, name=f"layer_{i}")(
                x_GMSD, seen_GMS, same_GMM, train=train
            )
            taps |= nested(f"layer_{i}", inner, x_GMSD)
        x_GMSD = taps["norm"] = Dropout(cfg.dropout)(RMSNorm(cfg.eps, name="norm")(x_GMSD), train)
        out = len(cfg.levels) * cfg.patch_len
        y = taps["head"] = block(cfg.d_model, out, "head")(x_GMSD[:, :, -n:], train)
        return y.reshape(*y.shape[:3], len(cfg.levels), cfg.patch_len).astype(jnp.float32), taps


@dataclasses.dataclass(frozen=True)
class Chronos2(Model):
    """Chronos-2 at one size. See the module docstring; `Model` documents the methods."""

    config: Chronos2Config

    family = "chronos_2"
    published = PRESETS
    tasks = ("forecasting", "embedding")
    licence = "Apache-2.0 (amazon/chronos-2)"
    shard_rules = (
        (r"^embed/hidden/kernel$", (None, "tensor")),
        (r"^head/hidden/kernel$", ("fsdp", "tensor")),
        (r"^(embed|head)/out/kernel$", ("tensor", "fsdp")),
        (r"^(embed|head)/residual/kernel$", (None, "fsdp")),
        (r"^tokens$", ()),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (
        Group.heads("time"),
        Group.heads("group", scores="channels", swapped=True),
        Group.units(),
    )

    @classmethod
    def small(cls) -> Chronos2Config:
        sizes = {
            "head_dim": 6,
            "patch_len": 8,
            "context_len": 64,
            "max_patches": 2,
            "time_scale": 64,
        }
        return Chronos2Config.of(16, 2, 24, layers=2, **sizes, levels=PATHS)

    @property
    def covariates(self) -> frozenset[str]:
        return COVARIATES

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def variates(self) -> Literal["independent", "joint"]:
        return "joint"

    @property
    def horizon(self) -> int:
        """Steps of one forward pass; a shorter horizon takes as many future patches as it needs."""
        return self.config.max_patches * self.config.patch_len

    @property
    def eval_batch(self) -> int:
        """Windows for which the attention over time of ten variates fits."""
        cfg = self.config
        tokens = cfg.context_len // cfg.patch_len + cfg.max_patches + 1
        row = 40 * tokens * max(max(dims.ffn, dims.time.heads * tokens) for dims in cfg.layers)
        return windows_that_fit(row)

    def init(self, key: jax.Array) -> Tree:
        """Everything is multiplied by the factor, the scales of the norms too."""
        cfg = self.config
        one = jax.ShapeDtypeStruct((1, 1, 1, 3 * cfg.patch_len), jnp.float32)
        seen, same = (jax.ShapeDtypeStruct(shape, bool) for shape in ((1, 1, 1), (1, 1, 1)))
        shapes = parameter_shapes(Chronos2Net(cfg), key, one, one, seen, same)
        factor, d, k = cfg.init_factor, cfg.d_model, cfg.head_dim

        def rule(path, shape):
            if path == "tokens":
                return Normal(factor)
            if path.endswith("/scale"):
                return Constant(factor)
            if path.endswith("/bias"):
                return Constant(0.0)
            if path.endswith("/q/kernel"):
                return Normal(factor * (d * k) ** -0.5)
            if path.endswith(("/k/kernel", "/v/kernel")):
                return Normal(factor * d**-0.5)
            # Its own inputs: heads * K, D or F.
            return Normal(factor * math.prod(shape[:-1]) ** -0.5)

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = (
            "Chronos-2 fit() (amazon-science/chronos-forecasting): AdamW, 1000 steps of 256 "
            "series, linear decay"
        )
        return self._recipe(
            lr=1e-6,
            batch_size=32,
            epochs=1,
            schedule="cosine",
            context_len=min(self.context_len, 2048),
            horizon=min(self.horizon, 96),
            source=source,
        )

    # --- the network between its scalings

    def apply(
        self,
        params: Tree,
        x: jax.Array,
        n_patches: int,
        *,
        same: jax.Array | None = None,
        mask: jax.Array | None = None,
        future: jax.Array | None = None,
        future_mask: jax.Array | None = None,
        key=None,
        train=False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One forward pass: quantiles [G, M, n_patches * P, Q] in the units of x, and the named
        steps.

        Args:
          x: [G, M, T], any T >= 1, NaN = missing, of which the last context_len points are used.
          n_patches: future patches.
          same: [G, M, M] booleans, which members see each other; all of a group by default.
          mask: [G, M, T], 1 where a point is to be seen; it has no part in the scale, as in the
            original.
          future: [G, M, R], what is known of the future (covariates), NaN elsewhere; R <= n_patches
            * P.
          future_mask: [G, M, R], 1 where it is to be seen.
        """
        cfg, (g, m, _) = self.config, x.shape
        x = x.astype(jnp.float32)[..., -cfg.context_len :]
        if mask is not None:
            mask = mask.astype(jnp.float32)[..., -cfg.context_len :]
        same = jnp.ones((g, m, m), bool) if same is None else same
        loc, scale = scale_of_observed(x, FLAT_SCALE)

        tokens, inner, visible = self._context_tokens(x, mask, loc, scale=scale)
        ahead = self._future_tokens((g, m, n_patches), future, future_mask, loc=loc, scale=scale)
        net, seen = Chronos2Net(cfg), visible.sum(-1) > 0
        y, taps = run_network(net, params, tokens, ahead, seen, same, key=key, train=train)

        y_GMQR = jnp.moveaxis(y, 3, 2).reshape(g, m, len(cfg.levels), -1)
        known_GMR = ahead[..., -cfg.patch_len :].reshape(g, m, -1)
        taps |= {"scaled": inner, "loc": loc, "scale": scale, "known": known_GMR}
        taps["quantiles"] = y_GMQR
        outer = (jnp.sinh(y_GMQR) if cfg.arcsinh else y_GMQR) * scale[..., None] + loc[..., None]
        return jnp.swapaxes(outer, 2, 3), taps

    def _context_tokens(self, x, mask, loc, scale):
        """Tokens [G, M, N, 3P] of x, x in the inner scale, and which of its points are visible."""
        p = self.config.patch_len
        inner = self.scaled(x, loc, scale)
        there = jnp.where(jnp.isnan(x), 0.0, 1.0 if mask is None else mask)
        # The newest patch is whole: what is missing to a whole number of them is in front.
        left = ((0, 0), (0, 0), (-x.shape[-1] % p, 0))
        values, visible = self._patches(jnp.pad(inner, left), jnp.pad(there, left))
        time = self._time(-values.shape[2] * p, values.shape)
        return jnp.concatenate([time, values, visible], axis=-1), inner, visible

    def _future_tokens(self, shape: tuple[int, int, int], future, mask, loc, scale):
        """Tokens [G, M, n_patches, 3P] of what is known of the future, if anything is."""
        p, (g, m, n_patches) = self.config.patch_len, shape
        if future is None:
            future = jnp.full((g, m, n_patches * p), jnp.nan)
        there = jnp.where(jnp.isnan(future), 0.0, 1.0 if mask is None else mask)
        right = ((0, 0), (0, 0), (0, n_patches * p - future.shape[-1]))
        inner = jnp.pad(self.scaled(future, loc, scale), right)
        ahead, visible = self._patches(inner, jnp.pad(there.astype(jnp.float32), right))
        return jnp.concatenate([self._time(0, ahead.shape), ahead, visible], axis=-1)

    def _patches(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Values [.., N, P] and masks of whole patches, 0 where nothing is to be seen."""
        mask = jnp.where(jnp.isnan(x), 0.0, mask)
        values = jnp.where(mask > 0, jnp.nan_to_num(x), 0.0)
        shape = (*x.shape[:-1], -1, self.config.patch_len)
        return values.reshape(shape), mask.reshape(shape)

    def _time(self, start: int, shape: tuple[int, ...]) -> jax.Array:
        """The scaled places [G, M, k, P] of k patches from time step `start` on."""
        k, p = shape[2:]
        steps = (start + jnp.arange(k * p)).reshape(1, 1, k, p)
        return jnp.broadcast_to(steps / self.config.time_scale, shape)

    def scaled(self, x: jax.Array, loc: jax.Array, scale: jax.Array) -> jax.Array:
        """x in the inner scale of the network."""
        z = (x - loc) / scale
        return jnp.arcsinh(z) if self.config.arcsinh else z

    def series_loss(
        self,
        params: Tree,
        x,
        target,
        *,
        future=None,
        same=None,
        target_mask=None,
        key=None,
        train=False,
    ) -> jax.Array:
        """The original's loss of each series [G, M]: twice the quantile loss in the inner scale of
        the context, mean over the future patches' steps (those without a target, or known
        beforehand, count as 0), sum over levels.
        """
        cfg = self.config
        n_patches = -(-target.shape[-1] // cfg.patch_len)
        self._require_reach(target.shape[-1])
        _, taps = self.apply(params, x, n_patches, same=same, future=future, key=key, train=train)
        pad = ((0, 0), (0, 0), (0, n_patches * cfg.patch_len - target.shape[-1]))
        seen = ~jnp.isnan(target) if target_mask is None else (target_mask > 0) & ~jnp.isnan(target)
        seen = jnp.pad(seen, pad) & (taps["known"] == 0)
        z = jnp.pad(self.scaled(jnp.nan_to_num(target), taps["loc"], taps["scale"]), pad)
        z, seen = jnp.where(seen, z, 0.0)[:, :, None], seen[:, :, None]
        y_GMQR = taps["quantiles"]
        level = jnp.asarray(cfg.levels, jnp.float32).reshape(1, 1, -1, 1)
        error = 2 * jnp.abs((z - y_GMQR) * ((z <= y_GMQR).astype(jnp.float32) - level)) * seen
        return error.mean(-1).sum(-1)

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Quantile loss of all variates in the scale of each context; see `series_loss`.

        Covariates of the batch are further members of each row's group. They have no loss of their
        own, and count as rows without any error in the mean, as when the original tunes with them.
        """
        x, future = self._group(batch["context"], batch.get("past"), batch.get("known"))
        target = batch["target"]
        no_target = ((0, 0), (0, x.shape[1] - target.shape[1]), (0, 0))
        target = jnp.pad(target, no_target, constant_values=jnp.nan)
        error = self.series_loss(params, x, target, future=future, key=key, train=train)
        return mean_over_rows(error, batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median over the observed targets; as far as one forward pass reaches."""
        steps = batch["target"].shape[-1]
        n_patches = -(-steps // self.config.patch_len)
        self._require_reach(steps)
        x, future = self._group(batch["context"], batch.get("past"), batch.get("known"))
        y_GMRQ, _ = self.apply(params, x, n_patches, future=future, key=key, train=train)
        y_GMRQ = y_GMRQ[:, : batch["target"].shape[1]]
        point = median_of(y_GMRQ[..., :steps, :], self.config.levels)
        return mse_observed(point, batch["target"], batch)

    # --- forecasts

    def predict_with(
        self, params: Tree, context, horizon: int, *, past=None, known=None, key=None
    ) -> Forecast:
        """All variates of a row see each other. Point: the median. See `rows` for covariates: they
        are further members of each row's group, behind the targets, as in the original.
        """
        check_context(context, horizon)
        x, future = self._group(context, past, known)
        y_GMRQ = self.rows(params, x, horizon, future=future)[:, : context.shape[1]]
        point = median_of(y_GMRQ, self.config.levels)
        return Forecast(point, y_GMRQ, levels=self.config.levels)

    def _group(self, context, past=None, known=None) -> tuple[jax.Array, jax.Array | None]:
        """The members of a group [G, M, T], and what is known of their future [G, M, R] or None."""
        x, ahead = with_covariates(context, past, known)
        if ahead is not None:
            # Nothing is known ahead of the members in front.
            unknown = ((0, 0), (x.shape[1] - ahead.shape[1], 0), (0, 0))
            ahead = jnp.pad(ahead, unknown, constant_values=jnp.nan)
        return x, ahead

    def rows(
        self,
        params: Tree,
        x: jax.Array,
        horizon: int,
        *,
        future: jax.Array | None = None,
        same: jax.Array | None = None,
        paths: Sequence[float] = PATHS,
        max_patches: int | None = None,
    ) -> jax.Array:
        """Quantiles [G, M, R, Q] of the `horizon` steps after x, for groups of targets and
        covariates.

        Args:
          x: [G, M, T], targets and covariates of a group (or, with `same`, of several), NaN =
            missing.
          future: [G, M, R], the known future of covariates; NaN for targets and for covariates
            known in the past only. Forecasts of covariate rows are there and mean nothing.
          same: [G, M, M] booleans, which rows see each other; all by default.
          paths: levels along which a horizon past max_patches is rolled out: each path is put
            behind a context of its own, and of all that follows the model's levels are taken,
            weighed by the probability each path stands for.
          max_patches: future patches of one forward pass; the config's by default.
        """
        cfg, p = self.config, self.config.patch_len
        g, m, _ = x.shape
        most = min(max_patches or cfg.max_patches, cfg.max_patches)
        weights = np.outer(masses(paths), masses(cfg.levels)).reshape(-1)

        def for_each_path(y):
            """Repeat rows once for each path, where more than one pass is made."""
            return y if y is None or horizon <= most * p else jnp.repeat(y, len(paths), axis=0)

        found, done = [], 0
        while done < horizon:
            n_patches = min(-(-(horizon - done) // p), most)
            step = n_patches * p
            known = None
            if future is not None and future.shape[-1] > done:
                known = future[..., done : done + step]
            if not found:
                y_GMRQ, _ = self.apply(params, x, n_patches, same=same, future=known)
                x, same = for_each_path(x), for_each_path(same)
            else:
                # Each path gives all quantiles; those of all paths together are the next ones.
                repeated = for_each_path(known)
                y, _ = self.apply(params, x, n_patches, same=same, future=repeated)
                y_GMRAQ = jnp.moveaxis(y.reshape(g, len(paths), m, step, -1), 1, 3)
                y_GMRQ = weighted_quantile(y_GMRAQ.reshape(g, m, step, -1), weights, cfg.levels)
            found.append(y_GMRQ)
            done += step
            if done < horizon:
                given = None if future is None else future[..., done - step : done]
                new = self._along_paths(y_GMRQ, paths, given)
                x = jnp.concatenate([x, new], axis=-1)[..., -cfg.context_len :]
        return jnp.concatenate(found, axis=2)[:, :, :horizon]

    def _along_paths(self, y_GMRQ, paths: Sequence[float], given) -> jax.Array:
        """Continue each path [G * A, M, R] with the forecast at its own quantile level.

        given: [G, M, R'], known values of covariates, which replace their forecasts; NaN: unknown.
        """
        g, m, steps, _ = y_GMRQ.shape
        new_GMRA = at_levels(y_GMRQ, self.config.levels, paths)
        if given is not None:
            later = ((0, 0), (0, 0), (0, steps - given.shape[2]))
            known_GMR1 = jnp.pad(given, later, constant_values=jnp.nan)[..., None]
            new_GMRA = jnp.where(jnp.isnan(known_GMR1), new_GMRA, known_GMR1)
        return jnp.moveaxis(new_GMRA, 3, 1).reshape(g * len(paths), m, steps)

    def embed(self, params: Tree, context: jax.Array) -> jax.Array:
        """The encoder's output [B, C, N + 2, D]: a token a patch of the context, the learned token,
        a future patch.
        """
        return self.apply(params, context, 1)[1]["norm"]


def masses(levels: Sequence[float]) -> np.ndarray:
    """The probability that each of some quantiles stands for: half the way to its neighbours (0 and
    1 at the ends), as shares of the whole.
    """
    ends = np.concatenate([[0.0], np.asarray(levels, np.float64), [1.0]])
    mass = (ends[2:] - ends[:-2]) / 2
    return mass / mass.sum()


def weighted_quantile(
    y: jax.Array, weights: np.ndarray | jax.Array, wanted: Sequence[float]
) -> jax.Array:
    """Quantiles [..., W] of values y [..., V] with weights [V]: linear in the cumulated weight of
    the sorted values.
    """
    order = jnp.argsort(y, axis=-1)
    values = jnp.take_along_axis(y, order, axis=-1)
    cumulated = jnp.cumsum(jnp.asarray(weights, jnp.float32)[order], axis=-1)
    cumulated = cumulated / cumulated[..., -1:]
    flat = values.reshape(-1, y.shape[-1]), cumulated.reshape(-1, y.shape[-1])
    want = jnp.asarray(wanted, jnp.float32)
    found = jax.vmap(lambda v, c: jnp.interp(want, c, v))(*flat)
    return found.reshape(*y.shape[:-1], len(wanted))
