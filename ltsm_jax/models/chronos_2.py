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

from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, Normal, draw
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import mean_over_rows, mse_observed
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.residual import ResidualBlock
from ltsm_jax.layers.rope import rotary
from ltsm_jax.layers.widths import width, width_problems
from ltsm_jax.models.configs import config_from_json
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

FLAT_SCALE = 1e-5  # the scale of a series without any spread, in place of 0
PATHS = (
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
)  # quantile levels along which long horizons are rolled out
LEVELS = (0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99)
MEMORY = 1 << 30  # bytes that the widest activations of one evaluation batch may take


@dataclasses.dataclass(frozen=True)
class Chronos2Config:
    """Widths are per layer, so that a pruned Chronos-2 is a Chronos-2.

    d_model D, head_dim K, n_heads H of the attention over time and group_heads of that over a
    group, ffn_dims F; block_dim: hidden width of the two residual blocks. patch_len P and
    context_len in time steps; max_patches: future patches of one forward pass. levels: quantile
    levels Q. time_scale: steps by which the time in a token is divided. value_dims: K of the values
    of each layer in the attention over time, group_value_dims and group_qk_dims that of the values,
    and of queries and keys, in the attention over a group; () is head_dim.
    """

    d_model: int
    head_dim: int
    n_heads: tuple[int, ...]
    group_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]
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
    value_dims: tuple[int, ...] = ()
    group_value_dims: tuple[int, ...] = ()
    group_qk_dims: tuple[int, ...] = ()

    def __post_init__(self):
        dims = {
            name: getattr(self, name)
            for name in ("value_dims", "group_value_dims", "group_qk_dims")
        }
        problems = width_problems(len(self.n_heads), self.head_dim, **dims)
        if not self.n_heads or not len(self.n_heads) == len(self.group_heads) == len(self.ffn_dims):
            problems.append(
                "n_heads, group_heads and ffn_dims must name the same layers, at least one"
            )
        sizes = (
            self.d_model,
            self.head_dim,
            self.block_dim,
            self.patch_len,
            self.context_len,
            self.max_patches,
        )
        if (
            min(*sizes, self.time_scale) < 1
            or min(*self.n_heads, *self.group_heads, *self.ffn_dims, 1) < 0
        ):
            problems.append("every size must be positive")
        if self.head_dim % 2:
            problems.append(f"head_dim must be even for the rotation, got {self.head_dim}")
        if (
            not self.levels
            or list(self.levels) != sorted(set(self.levels))
            or min(self.levels) <= 0
        ):
            problems.append(f"levels must rise within (0, 1): {self.levels}")
        elif self.levels[-1] >= 1:
            problems.append(f"levels must lie within (0, 1): {self.levels}")
        if self.activation not in ("relu", "gelu") or not 0 <= self.dropout < 1:
            problems.append(
                f"activation must be relu or gelu and dropout in [0, 1): {self.activation}, "
                f"{self.dropout}"
            )
        if problems:
            raise ValueError("Chronos2Config: " + "; ".join(problems))

    @classmethod
    def of(
        cls, d_model: int, heads: int, d_ff: int, layers: int, *, head_dim: int = 64, **rest
    ) -> "Chronos2Config":
        """Equal layers."""
        equal = (heads,) * layers
        return cls(d_model, head_dim, equal, equal, (d_ff,) * layers, d_ff, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "Chronos2Config":
        """Reads a published config.json: T5's fields, and `chronos_config` within.

        Raises: ValueError naming the fields that are missing, or a layout that the original cannot
        run either.
        """
        chronos = fields.get("chronos_config", {})
        missing = [
            name
            for name in ("d_model", "num_heads", "d_ff", "num_layers", "d_kv")
            if name not in fields
        ]
        names = ("context_length", "input_patch_size", "max_output_patches", "quantiles")
        missing += [f"chronos_config.{name}" for name in names if name not in chronos]
        if missing:
            raise ValueError(f"the config of a Chronos-2 checkpoint lacks {', '.join(missing)}")
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
            fields["num_layers"],
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
    "amazon/chronos-2": Chronos2Config.of(768, 12, 3072, 12),
    "autogluon/chronos-2-small": Chronos2Config.of(512, 8, 2048, 6),
    "autogluon/chronos-2-synth": Chronos2Config.of(768, 12, 3072, 12),
}
ACTIVATIONS = {"relu": nn.relu, "gelu": functools.partial(nn.gelu, approximate=False)}


class Attention(nn.Module):
    """Attention over the last axis but one of x [A, B, S, D], without bias and without a scale;
    keys hidden by `seen` (broadcast to [A, B, 1, S, S]). rotate: positions are told by rotation.
    """

    cfg: Chronos2Config
    n_heads: int
    qk_dim: int
    value_dim: int
    rotate: bool

    @nn.compact
    def __call__(self, x_ABSD, seen, train: bool):
        cfg = self.cfg
        heads, values = (self.n_heads, self.qk_dim), (self.n_heads, self.value_dim)
        q, k, v = (
            jnp.moveaxis(Linear((cfg.d_model,), shape, False, name=n)(x_ABSD), 3, 2)
            for n, shape in (("q", heads), ("k", heads), ("v", values))
        )
        if self.rotate:
            positions = jnp.arange(x_ABSD.shape[2]).reshape(1, 1, 1, -1)
            q, k = (rotary(y, positions, base=cfg.rope_base) for y in (q, k))
        s_ABHSS = jnp.einsum("ABHNK,ABHSK->ABHNS", q, k).astype(jnp.float32)
        # the lowest number and not -inf: a token alone in its group, hidden, sees all others, as in
        # the original; none sees it
        s_ABHSS = s_ABHSS + jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
        w_ABHSS = Dropout(cfg.dropout)(jax.nn.softmax(s_ABHSS).astype(x_ABSD.dtype), train)
        y_ABSHK = jnp.moveaxis(jnp.einsum("ABHNS,ABHSK->ABHNK", w_ABHSS, v), 2, 3)
        return Linear(values, (cfg.d_model,), False, name="out")(y_ABSHK)


class Layer(nn.Module):
    """x [G, M, S, D] through attention over time, attention over the group, and feed-forward; and
    the steps between.
    """

    cfg: Chronos2Config
    layer: int

    @nn.compact
    def __call__(self, x_GMSD, seen_GMS, same_GMM, train: bool):
        cfg, taps = self.cfg, {}

        def drop(y):
            return Dropout(cfg.dropout)(y, train)

        def norm(i):
            return RMSNorm(cfg.eps, name=f"norm{i}")(x_GMSD)

        hide = seen_GMS[:, :, None, None, :]
        value_dim = width(cfg.value_dims, self.layer, cfg.head_dim)
        attend = Attention(cfg, cfg.n_heads[self.layer], cfg.head_dim, value_dim, True, name="time")
        y = attend(norm(1), hide, train)
        x_GMSD = taps["time"] = x_GMSD + drop(y)
        hide = same_GMM[:, None, None] & jnp.swapaxes(seen_GMS, 1, 2)[:, :, None, None, :]
        qk_dim, value_dim = (
            width(w, self.layer, cfg.head_dim) for w in (cfg.group_qk_dims, cfg.group_value_dims)
        )
        attend = Attention(cfg, cfg.group_heads[self.layer], qk_dim, value_dim, False, name="group")
        y = attend(jnp.swapaxes(norm(2), 1, 2), hide, train)
        x_GMSD = taps["group"] = x_GMSD + drop(jnp.swapaxes(y, 1, 2))
        f = cfg.ffn_dims[self.layer]
        y = drop(
            ACTIVATIONS[cfg.activation](Linear((cfg.d_model,), (f,), False, name="up")(norm(3)))
        )
        x_GMSD = x_GMSD + drop(Linear((f,), (cfg.d_model,), False, name="down")(y))
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
                inputs, cfg.block_dim, outputs, activation, dropout=cfg.dropout, name=name
            )

        embed = block(3 * cfg.patch_len, cfg.d_model, "embed")
        x = taps["embed"] = embed(p_GMNP, train)
        ahead = taps["embed_future"] = embed(future_GMNP, train)
        tokens_VD = self.param(
            "tokens", nn.initializers.zeros, (2, cfg.d_model)
        )  # row 0 is never used
        reg = jnp.broadcast_to(
            tokens_VD[1].astype(x.dtype).reshape(1, 1, 1, -1), (*x.shape[:2], 1, cfg.d_model)
        )
        x_GMSD = jnp.concatenate([x, reg, ahead], axis=2)
        x_GMSD = Dropout(cfg.dropout)(x_GMSD, train)
        n = ahead.shape[2]
        seen_GMS = taps["seen"] = jnp.pad(
            seen_GMN, ((0, 0), (0, 0), (0, n + 1)), constant_values=True
        )
        for i in range(len(cfg.ffn_dims)):
            x_GMSD, inner = Layer(cfg, i, name=f"layer_{i}")(x_GMSD, seen_GMS, same_GMM, train)
            taps |= {f"layer_{i}/{name}": value for name, value in inner.items()} | {
                f"layer_{i}": x_GMSD
            }
        x_GMSD = taps["norm"] = Dropout(cfg.dropout)(RMSNorm(cfg.eps, name="norm")(x_GMSD), train)
        out = len(cfg.levels) * cfg.patch_len
        y = taps["head"] = block(cfg.d_model, out, "head")(x_GMSD[:, :, -n:], train)
        return y.reshape(*y.shape[:3], len(cfg.levels), cfg.patch_len).astype(jnp.float32), taps


@dataclasses.dataclass(frozen=True)
class Chronos2(Model):
    """Chronos-2 at one size. See the module docstring; `Model` documents the methods."""

    config: Chronos2Config

    family = "chronos_2"
    covariates = frozenset({"past", "known"})
    missing_in_front = True
    head_leaves = r"^head/"
    tasks = ("forecasting", "embedding")
    licence = "Apache-2.0 (amazon/chronos-2)"
    shard_rules = (
        (r"^embed/hidden/kernel$", (None, "tensor")),
        (r"^head/hidden/kernel$", ("fsdp", "tensor")),
        (r"^(embed|head)/out/kernel$", ("tensor", "fsdp")),
        (r"^(embed|head)/residual/kernel$", (None, "fsdp")),
        (r"/(time|group)/[qkv]/kernel$", ("fsdp", "tensor", None)),
        (r"/(time|group)/out/kernel$", ("tensor", None, "fsdp")),
        (r"/up/kernel$", ("fsdp", "tensor")),
        (r"/down/kernel$", ("tensor", "fsdp")),
        (r"(^tokens|/scale|/bias)$", ()),
    )
    prunable = (
        Group.heads(r"layer_(\d+)/time", values=r"value_dims.\1"),
        Group.heads(
            r"layer_(\d+)/group",
            r"group_heads.\1",
            values=r"group_value_dims.\1",
            scores=r"group_qk_dims.\1",
            swapped=True,
        ),
        Group.units(r"layer_(\d+)"),
    )

    @classmethod
    def presets(cls) -> Mapping[str, Chronos2Config]:
        return PRESETS

    @classmethod
    def config_from_dict(cls, fields: Mapping[str, Any]) -> Chronos2Config:
        return config_from_json(Chronos2Config, fields)

    @classmethod
    def small(cls) -> Chronos2Config:
        sizes = {
            "head_dim": 6,
            "patch_len": 8,
            "context_len": 64,
            "max_patches": 2,
            "time_scale": 64,
        }
        return Chronos2Config.of(16, 2, 24, 2, **sizes, levels=PATHS)

    @property
    def variates(self) -> Literal["independent", "joint"]:
        return "joint"

    @property
    def context_len(self) -> int:
        return self.config.context_len

    @property
    def horizon(self) -> int:
        """Steps of one forward pass; a shorter horizon takes as many future patches as it needs."""
        return self.config.max_patches * self.config.patch_len

    @property
    def eval_batch(self) -> int:
        """Windows for which the attention over time of ten variates fits."""
        cfg = self.config
        tokens = cfg.context_len // cfg.patch_len + cfg.max_patches + 1
        row = 40 * tokens * max(*cfg.ffn_dims, *(h * tokens for h in cfg.n_heads))
        return 1 << max(int(math.log2(MEMORY / row)), 0)

    def init(self, key: jax.Array) -> Tree:
        """Everything is multiplied by the factor, the scales of the norms too."""
        cfg = self.config
        one = jax.ShapeDtypeStruct((1, 1, 1, 3 * cfg.patch_len), jnp.float32)
        seen, same = (jax.ShapeDtypeStruct(shape, bool) for shape in ((1, 1, 1), (1, 1, 1)))
        shapes = jax.eval_shape(Chronos2Net(cfg).init, key, one, one, seen, same)["params"]
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
            return Normal(
                factor * math.prod(shape[:-1]) ** -0.5
            )  # its own inputs: heads * K, D or F

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = (
            "Chronos-2 fit() (amazon-science/chronos-forecasting): AdamW, 1000 steps of 256 "
            "series, linear decay"
        )
        return Recipe(
            1e-6, 32, 1, "cosine", min(self.context_len, 2048), min(self.horizon, 96), "ims", source
        )

    # --- the network between its scalings

    def _patches(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Values [.., N, P] and masks of whole patches, 0 where nothing is to be seen."""
        mask = jnp.where(jnp.isnan(x), 0.0, mask)
        values = jnp.where(mask > 0, jnp.nan_to_num(x), 0.0)
        return tuple(y.reshape(*y.shape[:-1], -1, self.config.patch_len) for y in (values, mask))  # pyright: ignore[reportReturnType]

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
        cfg, p = self.config, self.config.patch_len
        g, m, _ = x.shape
        x = x.astype(jnp.float32)[..., -cfg.context_len :]
        mask = (
            jnp.ones_like(x) if mask is None else mask.astype(jnp.float32)[..., -cfg.context_len :]
        )
        same = jnp.ones((g, m, m), bool) if same is None else same
        observed = ~jnp.isnan(x)
        n = observed.sum(-1, keepdims=True)

        def mean(y):
            return jnp.where(observed, y, 0.0).sum(-1, keepdims=True) / jnp.maximum(n, 1)

        loc = mean(x)
        scale = jnp.sqrt(mean(jnp.square(x - loc)))
        scale = jnp.where(n == 0, 1.0, jnp.where(scale == 0, FLAT_SCALE, scale))
        inner = self.scaled(x, loc, scale)
        left = ((0, 0), (0, 0), (-x.shape[-1] % p, 0))
        values, visible = self._patches(
            *(jnp.pad(y, left) for y in (inner, jnp.where(observed, mask, 0.0)))
        )

        def time(start, k):
            """The scaled places of k patches from time step `start` on: [G, M, k, P]."""
            steps = (start + jnp.arange(k * p)).reshape(1, 1, k, p)
            return jnp.broadcast_to(steps / cfg.time_scale, (g, m, k, p))

        future = jnp.full((g, m, n_patches * p), jnp.nan) if future is None else future
        future_mask = (
            jnp.ones_like(future) if future_mask is None else future_mask.astype(jnp.float32)
        )
        right = ((0, 0), (0, 0), (0, n_patches * p - future.shape[-1]))
        known = [
            jnp.pad(y, right)
            for y in (
                self.scaled(future, loc, scale),
                jnp.where(jnp.isnan(future), 0.0, future_mask),
            )
        ]
        ahead, ahead_mask = self._patches(*known)
        count = values.shape[2]
        tokens = jnp.concatenate([time(-count * p, count), values, visible], axis=-1)
        ahead_tokens = jnp.concatenate([time(0, n_patches), ahead, ahead_mask], axis=-1)
        rngs = {"dropout": key} if train and cfg.dropout else None
        net: Any = Chronos2Net(cfg)  # Flax types what apply returns too widely
        y, taps = net.apply(
            {"params": params},
            tokens,
            ahead_tokens,
            visible.sum(-1) > 0,
            same,
            train and rngs is not None,
            rngs=rngs,
        )
        y_GMQR = jnp.moveaxis(y, 3, 2).reshape(g, m, len(cfg.levels), n_patches * p)
        taps |= {"scaled": inner, "loc": loc, "scale": scale, "quantiles": y_GMQR}
        outer = (jnp.sinh(y_GMQR) if cfg.arcsinh else y_GMQR) * scale[..., None] + loc[..., None]
        known_GMR = ahead_mask.reshape(g, m, -1)
        return jnp.swapaxes(outer, 2, 3), taps | {"known": known_GMR}

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
        if n_patches > cfg.max_patches:
            raise ValueError(
                f"one forward pass reaches {self.horizon} steps, the target has {target.shape[-1]}"
            )
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
        x, future = _with_covariates(batch["context"], batch.get("past"), batch.get("known"))
        target = batch["target"]
        no_target = ((0, 0), (0, x.shape[1] - target.shape[1]), (0, 0))
        target = jnp.pad(target, no_target, constant_values=jnp.nan)
        error = self.series_loss(params, x, target, future=future, key=key, train=train)
        return mean_over_rows(error, batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median over the observed targets; as far as one forward pass reaches."""
        steps = batch["target"].shape[-1]
        n_patches = -(-steps // self.config.patch_len)
        if n_patches > self.config.max_patches:
            raise ValueError(
                f"one forward pass reaches {self.horizon} steps, the target has {steps}"
            )
        x, future = _with_covariates(batch["context"], batch.get("past"), batch.get("known"))
        y_GMRQ, _ = self.apply(params, x, n_patches, future=future, key=key, train=train)
        y_GMRQ = y_GMRQ[:, : batch["target"].shape[1]]
        point = interpolate_quantiles(y_GMRQ, self.config.levels, (0.5,))[..., :steps, 0]
        return mse_observed(point, batch["target"], batch)

    # --- forecasts

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """All variates of a row see each other. Point: the median. See `rows` for covariates."""
        check_context(context, horizon)
        y_GMRQ = self.rows(params, jnp.asarray(context, jnp.float32), horizon)
        point = interpolate_quantiles(y_GMRQ, self.config.levels, (0.5,))[..., 0]
        return Forecast(point, y_GMRQ, levels=self.config.levels)

    def predict_with(
        self,
        params: Tree,
        context: jax.Array,
        horizon: int,
        *,
        past: jax.Array | None = None,
        known: jax.Array | None = None,
        key=None,
    ) -> Forecast:
        """The covariates are further members of each row's group, behind the targets, as in the
        original.
        """
        check_context(context, horizon)
        x, future = _with_covariates(jnp.asarray(context, jnp.float32), past, known)
        y_GMRQ = self.rows(params, x, horizon, future=future)[:, : context.shape[1]]
        point = interpolate_quantiles(y_GMRQ, self.config.levels, (0.5,))[..., 0]
        return Forecast(point, y_GMRQ, levels=self.config.levels)

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

        def every(y):
            """A row per path, where more than one pass is made."""
            return y if horizon <= most * p else jnp.repeat(y, len(paths), axis=0)

        found, done = [], 0
        while done < horizon:
            n_patches = min(-(-(horizon - done) // p), most)
            step = n_patches * p
            known = (
                None
                if future is None or future.shape[-1] <= done
                else future[..., done : done + step]
            )
            if not found:
                y_GMRQ, _ = self.apply(params, x, n_patches, same=same, future=known)
                x, same = every(x), None if same is None else every(same)
            else:
                known = None if known is None else every(known)
                y, _ = self.apply(params, x, n_patches, same=same, future=known)
                y = jnp.moveaxis(y.reshape(g, len(paths), m, step, -1), 1, 3).reshape(
                    g, m, step, -1
                )
                y_GMRQ = weighted_quantile(y, weights, cfg.levels)
            found.append(y_GMRQ)
            done += step
            if done < horizon:
                new_GMRA = interpolate_quantiles(y_GMRQ, cfg.levels, paths)
                if (
                    future is not None
                ):  # a covariate goes on as it is known to, not as it was forecast
                    given = future[..., done - step : done, None]
                    given = jnp.pad(
                        given,
                        ((0, 0), (0, 0), (0, step - given.shape[2]), (0, 0)),
                        constant_values=jnp.nan,
                    )
                    new_GMRA = jnp.where(jnp.isnan(given), new_GMRA, given)
                new = jnp.moveaxis(new_GMRA, 3, 1).reshape(g * len(paths), m, step)
                x = jnp.concatenate([x, new], axis=-1)[..., -cfg.context_len :]
        return jnp.concatenate(found, axis=2)[:, :, :horizon]

    def embed(self, params: Tree, context: jax.Array) -> jax.Array:
        """The encoder's output [B, C, N + 2, D]: a token a patch of the context, the learned token,
        a future patch.
        """
        return self.apply(params, context, 1)[1]["norm"]


def _with_covariates(
    context: jax.Array, past: jax.Array | None, known: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Put covariates behind the targets of a group: its members [G, M, T], and what is known ahead
    [G, M, R] or None.

    context: [G, C, T]. past: [G, K, T]. known: [G, K', T + R].
    """
    members, future = [context], None
    if past is not None:
        members.append(jnp.asarray(past, jnp.float32))
    if known is not None:
        t = context.shape[-1]
        known = jnp.asarray(known, jnp.float32)
        # Nothing is known ahead of the members in front.
        unknown = sum(x.shape[1] for x in members)
        future = jnp.pad(known[..., t:], ((0, 0), (unknown, 0), (0, 0)), constant_values=jnp.nan)
        members.append(known[..., :t])
    return (jnp.concatenate(members, axis=1) if len(members) > 1 else context), future


def interpolate_quantiles(
    y: jax.Array, levels: Sequence[float], wanted: Sequence[float]
) -> jax.Array:
    """Values [..., W] at the levels `wanted` of quantiles y [..., Q] at rising `levels`: linear
    between neighbours, the end values beyond the ends.
    """
    have, want = np.asarray(levels, np.float64), np.asarray(wanted, np.float64)
    low = np.clip(np.searchsorted(have, want, side="right") - 1, 0, max(len(have) - 2, 0))
    high = np.minimum(low + 1, len(have) - 1)
    span = np.where(high > low, have[high] - have[low], 1.0)
    share = np.clip((want - have[low]) / span, 0.0, 1.0).astype(np.float32)
    share = jnp.asarray(share).reshape((1,) * (y.ndim - 1) + (-1,))
    return y[..., low] + (y[..., high] - y[..., low]) * share


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
