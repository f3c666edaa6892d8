"""Chronos-Bolt: a T5 encoder over patches, a T5 decoder of one step, and nine quantiles of the next
64 values from it.

Ansari et al., "Chronos: Learning the Language of Time Series" (arXiv 2403.07815) is the paper of
its predecessor; Bolt itself is described where it is published. Follows
amazon-science/chronos-forecasting (commit 95185d1), src/chronos/chronos_bolt.py, on Hugging Face's
T5 (4.57.3).

A context of T points, NaN where nothing was observed, is scaled by its own mean and standard
deviation and cut into patches; a token is made of a patch's values and its mask of observed points.
Patches without any observed point stay in the sequence, hidden from all others. The decoder's only
token asks the encoded patches, and its output becomes all quantiles at once; they are not sorted.
Beyond 64 steps the forecast is rolled out: each quantile's path is put behind a context of its own,
and of the 9 x 9 quantiles that follow the 9 quantiles are taken.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import t5
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.initial import Constant, Normal, draw
from ltsm_jax.layers.missing import mean_observed, mean_over_rows, scale_of_observed
from ltsm_jax.layers.mlp import ACTIVATIONS
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.quantiles import DECILES, level_problems, median_of
from ltsm_jax.layers.residual import ResidualBlock
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe, windows_that_fit
from ltsm_jax.models.groups import T5_GROUPS, LayerStack
from ltsm_jax.trees import Tree

FLAT_SCALE = 1e-5  # the scale of a series without any spread, in place of 0


@dataclasses.dataclass(frozen=True)
class ChronosBoltConfig:
    """The two stacks hold the widths of each layer, so that a pruned Chronos-Bolt is a
    Chronos-Bolt.

    encoder, decoder: sizes of the stacks, of one d_model D. block_dim: hidden width F of the two
    residual blocks. patch_len P and stride in time steps, context_len and horizon too. levels:
    quantile levels, Q. reg_token: whether a learned token stands behind the patches. start_token:
    row of the token table that the decoder starts with. init_factor: of the original's
    initialisation.
    """

    encoder: t5.StackConfig
    decoder: t5.StackConfig
    block_dim: int
    patch_len: int = 16
    stride: int = 16
    context_len: int = 2048
    horizon: int = 64
    levels: tuple[float, ...] = DECILES
    reg_token: bool = True
    start_token: int = 0
    init_factor: float = 0.05

    def __post_init__(self):
        problems = []
        if self.encoder.is_decoder or not self.decoder.is_decoder:
            problems.append(
                "the layers of the decoder must look at the encoder, and those of the encoder not"
            )
        if self.encoder.d_model != self.decoder.d_model:
            problems.append(
                f"encoder and decoder differ in width: {self.encoder.d_model}, "
                f"{self.decoder.d_model}"
            )
        problems += field_problems(
            self, "block_dim", "patch_len", "stride", "context_len", "horizon"
        )
        if self.stride > self.patch_len:
            problems.append(
                f"patches of {self.patch_len} every {self.stride} steps would leave points out"
            )
        problems += level_problems(self.levels)
        if not 0 <= self.start_token < self.vocabulary:
            problems.append(f"start_token must be below {self.vocabulary}, got {self.start_token}")
        refuse(self, problems)

    @property
    def vocabulary(self) -> int:
        """Rows of the token table: the decoder's start, and [REG]."""
        return 2 if self.reg_token else 1

    @classmethod
    def of(
        cls,
        d_model: int,
        heads: int,
        d_ff: int,
        layers: int,
        *,
        head_dim: int = 64,
        decoder_layers=None,
        **rest,
    ) -> "ChronosBoltConfig":
        """Equal layers. rest: fields of this class or of `t5.StackConfig`, which both stacks then
        get.
        """
        own = {f.name for f in dataclasses.fields(cls)}
        both = {name: rest.pop(name) for name in list(rest) if name not in own}
        deep = layers if decoder_layers is None else decoder_layers
        encoder = t5.StackConfig.of(d_model, head_dim, layers, heads=heads, ffn=d_ff, **both)
        decoder = t5.StackConfig.of(
            d_model, head_dim, deep, heads=heads, ffn=d_ff, decoder=True, **both
        )
        return cls(encoder, decoder, d_ff, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "ChronosBoltConfig":
        """Reads a published config.json: T5's fields, and `chronos_config` within.

        Raises: ValueError naming the fields that are missing.
        """
        chronos = fields.get("chronos_config", {})
        names = ("d_model", "num_heads", "d_ff", "num_layers", "d_kv")
        inner = ("context_length", "prediction_length", "quantiles")
        inner += ("input_patch_size", "input_patch_stride")
        require_fields("Chronos-Bolt", fields, names, inner={"chronos_config": inner})
        activation, gated = activation_of(fields)
        return cls.of(
            fields["d_model"],
            fields["num_heads"],
            fields["d_ff"],
            layers=fields["num_layers"],
            head_dim=fields["d_kv"],
            decoder_layers=fields.get("num_decoder_layers"),
            n_buckets=fields.get("relative_attention_num_buckets", 32),
            max_distance=fields.get("relative_attention_max_distance", 128),
            activation=activation,
            gated=gated,
            eps=fields.get("layer_norm_epsilon", 1e-6),
            dropout=fields.get("dropout_rate", 0.1),
            patch_len=chronos["input_patch_size"],
            stride=chronos["input_patch_stride"],
            context_len=chronos["context_length"],
            horizon=chronos["prediction_length"],
            levels=tuple(chronos["quantiles"]),
            reg_token=chronos.get("use_reg_token", False),
            start_token=fields.get("decoder_start_token_id", 0),
            init_factor=fields.get("initializer_factor", 1.0),
        )


def activation_of(fields: Mapping[str, Any]) -> tuple[Any, bool]:
    """Activation and gate of T5's config.json: `feed_forward_proj`, and the two fields that
    override it.
    """
    *gate, name = str(fields.get("feed_forward_proj", "relu")).split("-", 1)
    name = "gelu_new" if (gate, name) == (["gated"], "gelu") else name
    return fields.get("dense_act_fn", name), bool(fields.get("is_gated_act", gate == ["gated"]))


# widths and depths: their parameter counts are those of the published models, 9M, 21M, 48M and 205M
PRESETS = {
    "amazon/chronos-bolt-tiny": ChronosBoltConfig.of(256, 4, 1024, layers=4),
    "amazon/chronos-bolt-mini": ChronosBoltConfig.of(384, 8, 1536, layers=4),
    "amazon/chronos-bolt-small": ChronosBoltConfig.of(512, 8, 2048, layers=6),
    "amazon/chronos-bolt-base": ChronosBoltConfig.of(768, 12, 3072, layers=12),
    # ours, small enough to ship and to train on a laptop
    "bolt-mini": ChronosBoltConfig.of(
        128, 4, 512, layers=2, head_dim=32, context_len=512, horizon=96
    ),
}


class ChronosBoltNet(nn.Module):
    """Scaled patches [B, N, P], 0 where not observed, and their mask -> quantiles [B, Q, H] in the
    same scale, and the named steps between. `encode_only` stops behind the encoder: [B, N + 1, D].
    """

    cfg: ChronosBoltConfig

    @nn.compact
    def __call__(self, p_BNP, mask_BNP, train: bool = False, encode_only: bool = False):
        cfg, taps = self.cfg, {"patches": p_BNP, "patch_mask": mask_BNP}
        d_model, q, h = cfg.encoder.d_model, len(cfg.levels), cfg.horizon
        activation, dropout = ACTIVATIONS[cfg.encoder.activation], cfg.encoder.dropout

        def block(inputs, outputs, name):
            return ResidualBlock(
                inputs, cfg.block_dim, outputs, activation=activation, dropout=dropout, name=name
            )

        both_BN2P = jnp.concatenate([p_BNP, mask_BNP.astype(p_BNP.dtype)], axis=-1)
        x_BND = taps["embed"] = block(2 * cfg.patch_len, d_model, "embed")(both_BN2P, train)
        seen_BN = mask_BNP.sum(-1) > 0
        tokens_VD = self.param("tokens", nn.initializers.zeros, (cfg.vocabulary, d_model)).astype(
            x_BND.dtype
        )

        def row(i):
            return jnp.broadcast_to(tokens_VD[i].reshape(1, 1, -1), (x_BND.shape[0], 1, d_model))

        start_B1D = row(cfg.start_token)
        if cfg.reg_token:
            x_BND = jnp.concatenate([x_BND, row(1)], axis=1)
            seen_BN = jnp.pad(seen_BN, ((0, 0), (0, 1)), constant_values=True)
        taps |= {"encoder_input": x_BND, "seen": seen_BN}
        m_BND, inner, _ = t5.Stack(cfg.encoder, name="encoder")(x_BND, seen_BN, train=train)
        taps |= nested("encoder", inner)
        if encode_only and not self.is_initializing():
            return m_BND, taps
        y_B1D, inner, _ = t5.Stack(cfg.decoder, name="decoder")(
            start_B1D, memory=m_BND, memory_mask=seen_BN, train=train
        )
        taps |= nested("decoder", inner)
        y_B1O = taps["head"] = block(d_model, q * h, "head")(y_B1D, train)
        return y_B1O.reshape(-1, q, h).astype(jnp.float32), taps


@dataclasses.dataclass(frozen=True)
class ChronosBolt(Model):
    """Chronos-Bolt at one size. See the module docstring; `Model` documents the methods."""

    config: ChronosBoltConfig

    family = "chronos_bolt"
    published = PRESETS
    tasks = ("forecasting", "embedding")
    licence = "Apache-2.0 (amazon/chronos-bolt)"
    shard_rules = (
        (r"^embed/hidden/kernel$", (None, "tensor")),
        (r"^embed/out/kernel$", ("tensor", "fsdp")),
        (r"^embed/residual/kernel$", (None, "fsdp")),
        (r"^head/hidden/kernel$", ("fsdp", "tensor")),
        (r"^head/out/kernel$", ("tensor", "fsdp")),
        (r"^head/residual/kernel$", ("fsdp", None)),
        *t5.SHARD_RULES,
        (r"^tokens$", ()),
    )
    stacks = (
        LayerStack("encoder", ("encoder", "layers")),
        LayerStack("decoder", ("decoder", "layers")),
    )
    prunable = T5_GROUPS

    @classmethod
    def small(cls) -> ChronosBoltConfig:
        return ChronosBoltConfig.of(
            16,
            2,
            24,
            layers=2,
            head_dim=5,
            decoder_layers=1,
            patch_len=8,
            stride=8,
            context_len=64,
            horizon=16,
            levels=(0.1, 0.5, 0.9),
        )

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def eval_batch(self) -> int:
        """As many windows as fit when each is rolled out once for every quantile."""
        cfg = self.config
        tokens = cfg.context_len // cfg.stride + 1
        heads = max(layer.attn.heads for layer in cfg.encoder.layers)
        row = 4 * tokens * max(2 * cfg.block_dim, heads * tokens)
        return windows_that_fit(len(cfg.levels) * row, memory=2 << 30)

    def init(self, key: jax.Array) -> Tree:
        """Everything is multiplied by the factor, the scales of the norms too. The head's first
        layers take the width of the input patches for their own inputs, as in the original.
        """
        cfg = self.config
        patch = jax.ShapeDtypeStruct((1, 1, cfg.patch_len), jnp.float32)
        shapes = parameter_shapes(ChronosBoltNet(cfg), key, patch, patch)

        def rule(path, shape):
            if path == "tokens":
                return Normal(cfg.init_factor)
            if path.startswith(("embed/", "head/")):
                if path.endswith("/bias"):
                    return Constant(0.0)
                inputs = cfg.block_dim if "/out/" in path else 2 * cfg.patch_len
                return Normal(cfg.init_factor * inputs**-0.5)
            return t5.initial(path, shape, cfg.encoder.d_model, factor=cfg.init_factor)

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = "AutoGluon's defaults, from memory: AdamW, 1000 steps of 32 windows"
        return self._recipe(lr=1e-5, batch_size=32, epochs=1, schedule="cosine", source=source)

    # --- the network between its scalings

    def patches(
        self, x: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Patches [B, N, P] of x [B, T] in the scale of its last context_len points, their mask,
        and the scale.

        mask: 1 where a point is to be seen, all observed ones by default; it has no part in the
        scale, as in the original. Points that are NaN are never seen.
        """
        cfg = self.config
        x = x.astype(jnp.float32)[..., -cfg.context_len :]
        observed = ~jnp.isnan(x)
        mask = (
            jnp.ones_like(x) if mask is None else mask.astype(jnp.float32)[..., -cfg.context_len :]
        )
        mask = jnp.where(observed, mask, 0.0)
        loc, scale = scale_of_observed(x, FLAT_SCALE)
        scaled = jnp.where(observed, (x - loc) / scale, 0.0)
        left = -x.shape[-1] % cfg.patch_len
        values, mask = (
            jnp.pad(y, ((0, 0), (left, 0))) for y in (jnp.where(mask > 0, scaled, 0.0), mask)
        )
        length = values.shape[-1]

        def cut(y):
            if cfg.stride == cfg.patch_len:
                return y.reshape(-1, length // cfg.patch_len, cfg.patch_len)
            starts = np.arange(0, length - cfg.patch_len + 1, cfg.stride)
            return y[:, starts[:, None] + np.arange(cfg.patch_len)[None]]

        return cut(values), cut(mask), {"scaled": scaled, "loc": loc, "scale": scale}

    def apply(
        self,
        params: Tree,
        x: jax.Array,
        mask: jax.Array | None = None,
        key=None,
        train=False,
        encode_only=False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One forward pass: quantiles [B, C, H, Q] of the next `horizon` steps in the units of x,
        and the named steps.

        x: [B, C, T], any T >= 1, NaN = missing, of which the last context_len points are used.
        mask: see `patches`. The steps have one row a series, B * C; "quantiles" among them is [B *
        C, Q, H] in the scale of the series. encode_only: the encoder's output [B, C, N + 1, D]
        instead, the last token being [REG] where there is one.
        """
        b, c, t = x.shape
        mask = None if mask is None else mask.reshape(b * c, t)
        p_BNP, mask_BNP, scaling = self.patches(x.reshape(b * c, t), mask)
        cfg = self.config
        net, options = ChronosBoltNet(cfg), {"encode_only": encode_only}
        y, taps = run_network(net, params, p_BNP, mask_BNP, key=key, train=train, **options)
        taps |= scaling
        if encode_only:
            return y.reshape(b, c, *y.shape[1:]), taps
        taps["quantiles"] = y
        y_BHQ = jnp.swapaxes(y * scaling["scale"][..., None] + scaling["loc"][..., None], 1, 2)
        return y_BHQ.reshape(b, c, cfg.horizon, len(cfg.levels)), taps

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Twice the pinball loss in the scale of the context: mean over the levels, SUM over the
        steps, mean over rows.

        Targets of at most `horizon` steps; missing ones (NaN) add nothing and are not counted in
        any mean.
        """
        cfg, target = self.config, batch["target"]
        b, c, h = target.shape
        self._require_reach(h)
        _, taps = self.apply(params, batch["context"], key=key, train=train)
        y = (target.reshape(b * c, h).astype(jnp.float32) - taps["loc"]) / taps["scale"]
        observed = ~jnp.isnan(y)[:, None]
        y, q = jnp.where(observed, y[:, None], 0.0), taps["quantiles"][..., :h]
        level = jnp.asarray(cfg.levels, jnp.float32).reshape(1, -1, 1)
        error = 2 * jnp.abs((y - q) * ((y <= q).astype(jnp.float32) - level)) * observed
        return mean_over_rows(error.mean(1).sum(-1).reshape(b, c), batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median in the units of the batch, over the observed steps; targets of at most
        `horizon` steps.
        """
        target = batch["target"]
        self._require_reach(target.shape[-1])
        y_BCHQ, _ = self.apply(params, batch["context"], key=key, train=train)
        y = self._point(y_BCHQ)[..., : target.shape[-1]]
        observed = ~jnp.isnan(target)
        return mean_observed(jnp.square(y - jnp.where(observed, target, 0.0)), observed, batch)

    def _point(self, y_BCHQ: jax.Array) -> jax.Array:
        """The median [B, C, H]: that of the levels, or between the two beside it."""
        return median_of(y_BCHQ, self.config.levels)

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Quantiles as they come from the model, not sorted; the point is the median. See the
        module docstring for what happens beyond the model's own horizon.
        """
        check_context(context, horizon)
        cfg = self.config
        x_BCT = jnp.asarray(context, jnp.float32)[..., -cfg.context_len :]
        y_BCHQ, _ = self.apply(params, x_BCT)
        blocks = math.ceil(horizon / cfg.horizon)
        if blocks > 1:
            later_BCHQ = self._rolled_out(params, x_BCT, y_BCHQ, blocks=blocks - 1)
            y_BCHQ = jnp.concatenate([y_BCHQ, later_BCHQ], axis=2)
        y_BCHQ = y_BCHQ[..., :horizon, :]
        return Forecast(self._point(y_BCHQ), y_BCHQ, levels=cfg.levels)

    def _rolled_out(
        self, params: Tree, x_BCT: jax.Array, y_BCHQ: jax.Array, blocks: int
    ) -> jax.Array:
        """The `blocks` blocks [B, C, blocks * H, Q] that follow the first one."""
        cfg = self.config
        (b, c, t), h, q = x_BCT.shape, cfg.horizon, len(cfg.levels)
        length = min(cfg.context_len, t + blocks * h)

        def step(paths, _):
            x_RQT, y_RQH = paths
            x_RQT = jnp.concatenate([x_RQT, y_RQH], axis=-1)[..., -length:]
            y_RQHQ, _ = self.apply(params, x_RQT)
            y_RZH = jnp.swapaxes(y_RQHQ, 2, 3).reshape(b * c, q * q, h)
            y_QRH = jnp.quantile(y_RZH, jnp.asarray(cfg.levels, jnp.float32), axis=1)
            y_RQH = jnp.swapaxes(y_QRH, 0, 1)
            return (x_RQT, y_RQH), y_RQH

        x_RQT = jnp.repeat(x_BCT.reshape(b * c, 1, t), q, axis=1)
        paths = x_RQT, jnp.swapaxes(y_BCHQ.reshape(b * c, h, q), 1, 2)
        if cfg.stride == cfg.patch_len:
            # Of one length throughout: patches of nothing but missing points, on the left, change
            # nothing.
            front = ((0, 0), (0, 0), (length - t, 0))
            paths = jnp.pad(x_RQT, front, constant_values=jnp.nan), paths[1]
            _, y_SRQH = jax.lax.scan(step, paths, length=blocks)
        else:
            # Patches that overlap begin elsewhere in a longer window: each window is cut anew.
            found = []
            for _ in range(blocks):
                paths, y_RQH = step(paths, None)
                found.append(y_RQH)
            y_SRQH = jnp.stack(found)
        return jnp.transpose(y_SRQH, (1, 0, 3, 2)).reshape(b, c, blocks * h, q)

    def predict_quantiles(
        self,
        params: Tree,
        context: jax.Array,
        horizon: int,
        levels: Sequence[float] = DECILES,
        original: bool = False,
    ) -> jax.Array:
        """Quantiles [B, C, H, len(levels)] of a forecast at any levels.

        Levels that are all among the model's own are taken as they are. Otherwise all are
        interpolated between the sorted values of the model's levels, and are the lowest or highest
        value outside of them.

        original: as the original does it, which repeats the first and the last value and then takes
          the sorted Q + 2 values for evenly spaced levels from 0 to 1. The same for (0.1, ..., 0.9)
          and quantiles that do not cross.
        Raises: ValueError for levels outside [0, 1].
        """
        y_BCHQ = self.predict(params, context, horizon).quantiles
        return self.quantiles_at(y_BCHQ, levels, original)

    def quantiles_at(self, y_BCHQ, levels: Sequence[float], original: bool = False) -> jax.Array:
        """Turn the quantiles [..., Q] of a forecast into those of `predict_quantiles` [...,
        len(levels)].
        """
        if not all(0 <= level <= 1 for level in levels):
            raise ValueError(f"quantile levels lie in [0, 1], got {tuple(levels)}")
        own = self.config.levels
        if set(levels) <= set(own):
            return y_BCHQ[..., np.array([own.index(level) for level in levels])]
        if original:
            y_BCHQ = jnp.concatenate([y_BCHQ[..., :1], y_BCHQ, y_BCHQ[..., -1:]], axis=-1)
            return jnp.moveaxis(
                jnp.quantile(y_BCHQ, jnp.asarray(levels, jnp.float32), axis=-1), 0, -1
            )
        weights = np.stack([np.interp(levels, own, row) for row in np.eye(len(own))])
        return jnp.sort(y_BCHQ, axis=-1) @ jnp.asarray(weights, y_BCHQ.dtype)

    def embed(self, params: Tree, context: jax.Array) -> jax.Array:
        """Encoder output [B, C, N + 1, D] of each patch and, at the end, of [REG] where the model
        has it.
        """
        check_context(context, 1)
        return self.apply(params, jnp.asarray(context), encode_only=True)[0]
