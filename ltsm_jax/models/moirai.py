"""Moirai 1.0-R and 1.1-R: a masked encoder over patches of all variates, with a mixture
distribution as output.

Woo et al., "Unified Training of Universal Time Series Forecasting Transformers" (ICML 2024, arXiv
2402.02592). Follows SalesforceAIResearch/uni2ts (commit 8d2a08d), model/moirai: tokens of any
number of variates and samples in one row, each of one of several patch sizes; future tokens are
replaced by one learned vector, and one forward pass gives the distribution of the whole horizon.
The forecast is the median of samples.

As in the original, missing values inside a patch enter the model as zeros before scaling, and the
weights of a patch size smaller than the largest mix the logits of the mixture's components (see
`SizedOut`): the published weights were trained so. Unlike in the original, dropout of attention
weights (0 in every published model) acts in training only.

`with_scales` gives the encoder further, coarser scales of the series to fine-tune with, see
`layers.multiscale`.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers import mixture, multiscale, packed
from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.context import check_context, row_keys
from ltsm_jax.layers.dims import LayerDims, equal_layers, head_width, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.mixture import Mixture, MixtureHead
from ltsm_jax.layers.mlp import GatedMLP
from ltsm_jax.layers.multiscale import (
    CrossScale,
    MultiScale,
    ScaleLayout,
    ScaleLinear,
    ScaleLora,
    ScaleMixture,
)
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.packed import AnyVariateAttention, Series, SizedIn, Tokens, observed_series
from ltsm_jax.layers.scan import equal_runs, loops, through_layers
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree, flatten, unflatten

HEAD_DIM = 64  # the original splits every model width into heads of (at least) this
# Of uni2ts cli/conf/finetune for 1.1-R. Moirai 2 and Moirai-MoE have none there, and take it too.
FINETUNING = {
    "lr": 5e-7,
    "batch_size": 64,
    "epochs": 10,
    "schedule": "constant",
    "weight_decay": 0.1,
    "clip": 1.0,
}


@dataclasses.dataclass(frozen=True)
class MoiraiConfig:
    """Widths are per layer, so that a pruned Moirai is a Moirai.

    d_model D, head_dim K, layers: H, K and F of each, patch_sizes the model has weights for;
    components of the mixture and the scale of the one whose scale is fixed. How it is used:
    context_len and horizon in time steps; patch_size, or "auto" for the one with the best
    likelihood on the end of each context; n_samples of a forecast; variates: whether those of one
    window see each other. multiscale: the scales beside the series itself; None: there are none.
    """

    d_model: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    patch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    components: tuple[str, ...] = mixture.PUBLISHED
    fixed_scale: float = 1e-3
    max_seq_len: int = 512
    scaling: bool = True
    dropout: float = 0.0
    attn_dropout: float = 0.0
    context_len: int = 2048
    horizon: int = 96
    patch_size: int | Literal["auto"] = "auto"
    n_samples: int = 100
    variates: Literal["joint", "independent"] = "joint"
    multiscale: MultiScale | None = None

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        sizes = ("d_model", "head_dim", "max_seq_len", "context_len", "horizon", "n_samples")
        problems += field_problems(self, *sizes, "patch_sizes")
        if self.fixed_scale == 0:
            problems.append("fixed_scale must be positive")
        if self.head_dim % 4:
            problems.append(
                "half a head turns in pairs, so head_dim must be a multiple of 4, got "
                f"{self.head_dim}"
            )
        if len(set(self.patch_sizes)) < len(self.patch_sizes):
            problems.append(f"patch_sizes must be different numbers: {self.patch_sizes}")
        if self.patch_size not in ("auto", *self.patch_sizes):
            problems.append(
                f"patch_size must be auto or one of {self.patch_sizes}, got {self.patch_size!r}"
            )
        if unknown := set(self.components) - set(mixture.PARAMETERS):
            problems.append(
                f"components {sorted(unknown)} are not among {', '.join(mixture.PARAMETERS)}"
            )
        refuse(self, problems)

    @classmethod
    def of(
        cls, d_model: int, layers: int, heads: int | None = None, d_ff: int | None = None, **rest
    ) -> "MoiraiConfig":
        """Equal layers; heads split the model width, by default as in the original."""
        heads = d_model // HEAD_DIM if heads is None else heads
        head_dim = head_width(d_model, heads)
        d_ff = packed.default_ffn_dim(d_model) if d_ff is None else d_ff
        return cls(d_model, head_dim, equal_layers(layers, heads, head_dim, ffn=d_ff), **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "MoiraiConfig":
        """Reads config.json of the hub.

        Raises: ValueError naming the fields that are missing, or a distribution other than the
        mixture.
        """
        required = ("d_model", "num_layers", "patch_sizes", "distr_output")
        require_fields("Moirai", fields, required)
        kinds, fixed_scale = mixture.read_published(fields["distr_output"])
        return cls.of(
            int(fields["d_model"]),
            int(fields["num_layers"]),
            patch_sizes=tuple(int(p) for p in fields["patch_sizes"]),
            components=kinds,
            fixed_scale=fixed_scale,
            max_seq_len=int(fields.get("max_seq_len", 512)),
            scaling=bool(fields.get("scaling", True)),
            dropout=float(fields.get("dropout_p", 0.0)),
            attn_dropout=float(fields.get("attn_dropout_p", 0.0)),
        )

    @property
    def component_parameters(self) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters of each component of the mixture."""
        return tuple(mixture.PARAMETERS[kind] for kind in self.components)

    def distr_output(self) -> dict[str, Any]:
        """The published form of the mixture."""
        return mixture.write_published(self.components, self.fixed_scale)


_SIZES = {
    "small": MoiraiConfig.of(384, 6),
    "base": MoiraiConfig.of(768, 12),
    "large": MoiraiConfig.of(1024, 24),
}
PRESETS = {
    f"Salesforce/moirai-{version}-R-{size}": _SIZES[size]
    for version, size in itertools.product(("1.0", "1.1"), _SIZES)
} | {
    # ours, small enough to ship and to train on a laptop
    "moirai-mini": MoiraiConfig.of(
        128,
        4,
        4,
        patch_sizes=(32,),
        patch_size=32,
        context_len=512,
        n_samples=32,
        variates="independent",
    )
}


class Block(nn.Module):
    """Pre-norm block [B, N, D] -> [B, N, D], and the named steps between."""

    cfg: MoiraiConfig
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BND, tokens: Tokens, train: bool, layout: ScaleLayout | None = None):
        cfg, taps = self.cfg, {}
        seen_BNS, same_BNS = tokens.same_sample, tokens.same_variate
        y_BND = taps["norm1"] = RMSNorm(packed.NORM_EPS, name="norm1")(x_BND)
        attention = AnyVariateAttention(cfg.d_model, self.dims.attn, cfg.attn_dropout, name="attn")
        adapters = self.adapters(layout.how, multiscale.scale_index(tokens)) if layout else None
        y_BND, inner = attention(
            y_BND, seen_BNS, same_BNS, time_id_BN=tokens.time_id, train=train, adapters=adapters
        )
        taps |= nested("attn", inner, y_BND)
        x_BND = x_BND + Dropout(cfg.dropout)(y_BND, train)
        if layout:
            x_BND = taps["across"] = CrossScale(layout.how, name="across")(
                x_BND, tokens.sample_id > 0, layout
            )
        y_BND = taps["norm2"] = RMSNorm(packed.NORM_EPS, name="norm2")(x_BND)
        y_BND = taps["ffn"] = GatedMLP(self.dims.ffn, dropout=cfg.dropout, name="ffn")(y_BND, train)
        return x_BND + y_BND, taps

    def adapters(self, how: MultiScale, scale_BN: jax.Array) -> dict[str, Any]:
        """Give what each scale adds to queries, keys and values."""
        found = {}
        for name, shape in self.dims.attn.shapes.items():
            lora = ScaleLora(how, shape, name=f"lora_{name}")
            found[name] = functools.partial(lora, scale_BN=scale_BN)
        return found


class MoiraiNet(nn.Module):
    """Packed tokens -> mixtures [B, N, P] in the units of the tokens, and the named steps between.

    patch: the patch size of all tokens, or of each [B, N]. only: the tokens (first, last but one)
    whose distribution is asked for; None: all. lean: for a forecast, without the steps of the
    layers. layout: of the scales, where there are several. scale: mean and standard deviation
    [B, C] of each variate, where they are known. whole: see `layers.shortcuts`.
    """

    cfg: MoiraiConfig
    shortens: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        patch,
        train: bool = False,
        only: tuple[int, int] | None = None,
        lean: bool = False,
        layout: ScaleLayout | None = None,
        scale: tuple[jax.Array, jax.Array] | None = None,
        whole: bool = False,
    ):
        cfg = self.cfg
        assert (layout is None) == (cfg.multiscale is None), "tokens of all scales, or of one"
        if not cfg.scaling:
            loc_BN1, scale_BN1 = packed.neutral_scale(tokens)
        elif scale is None:
            loc_BN1, scale_BN1 = packed.token_scale(tokens)
        else:
            loc_BN1, scale_BN1 = packed.scale_of_variates(tokens, *scale)
        taps = {"loc": loc_BN1, "scale": scale_BN1}
        scaled_BNP = (tokens.target - loc_BN1) / scale_BN1
        x_BND = taps["embed"] = SizedIn(cfg.patch_sizes, cfg.d_model, name="embed")(
            scaled_BNP, patch
        )
        if layout:
            x_BND = ScaleLinear(layout.how, name="scale_in")(x_BND, multiscale.scale_index(tokens))
        mask_D = self.param("mask", nn.initializers.zeros, (cfg.d_model,)).astype(x_BND.dtype)
        x_BND = jnp.where(tokens.predicted[..., None], mask_D[None, None], x_BND)
        looped = loops(self, lean, train, whole=whole)
        if looped:

            def layer(i, params, x_BND):
                return Block(cfg, cfg.layers[i], parent=None).apply(
                    {"params": params}, x_BND, tokens, train=train, layout=layout
                )[0]

            runs = equal_runs(cfg.layers)
            x_BND = through_layers(layer, self.variables["params"], x_BND, runs=runs)
        for i, dims in enumerate(() if looped else cfg.layers):
            x_BND, inner = Block(cfg, dims, name=f"layer_{i}")(x_BND, tokens, train, layout=layout)
            taps |= nested(f"layer_{i}", inner, x_BND)
        x_BND = taps["norm"] = RMSNorm(packed.NORM_EPS, name="norm")(x_BND)
        cut = slice(None) if only is None else slice(*only)
        patch = patch if isinstance(patch, int) else patch[:, cut]
        head = MixtureHead(cfg.patch_sizes, cfg.components, cfg.fixed_scale, name="head")
        y, raw = head(x_BND[:, cut], patch, loc_BN1[:, cut], scale_BN1=scale_BN1[:, cut])
        return y, taps | nested("head", raw)


def _filled(x: jax.Array, missing: int) -> jax.Array:
    """x [..., T] with `missing` steps of 0 or False more in front."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(missing, 0)])


@dataclasses.dataclass(frozen=True)
class Moirai(Model):
    """Moirai at one size. See the module docstring; `Model` documents the methods."""

    config: MoiraiConfig

    family = "moirai"
    published = PRESETS
    tasks = ("forecasting",)
    # beside what is new: as in MSFT, not the embedding, the projections of attention and the
    # feed-forward layers
    scalable = r"^scale_|/lora_[qkv]/|/across/|^head/|^mask$|/variate_bias$|norm\d?/scale$"
    licence = "CC-BY-NC-4.0, non-commercial (Salesforce/moirai-1.x-R)"
    shard_rules = (
        (r"^scale_|/lora_[qkv]/|/across/", ()),
        (r"^embed/kernel$", (None, None, "fsdp")),
        (r"^head/.*/kernel$", (None, "fsdp", None)),
        (r"^mask$", ()),
        (r"/attn/variate_bias$", (None, "tensor")),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn", others=(("variate_bias", 1),)), Group.units("ffn"))

    @classmethod
    def small(cls) -> MoiraiConfig:
        return MoiraiConfig.of(
            16,
            2,
            2,
            d_ff=24,
            patch_sizes=(4, 8),
            context_len=32,
            horizon=8,
            patch_size=8,
            n_samples=20,
        )

    @property
    def eval_batch(self) -> int:
        return 32

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults: N(0, 1) for the mask vector and the variate biases; U(+-1/sqrt(inputs))
        for all else, with zeros where a smaller patch size has no weights; norms 1.
        """
        cfg = self.config
        patch = max(cfg.patch_sizes)
        net: Any = MoiraiNet(cfg)
        how = cfg.multiscale
        if how is None:
            shapes = parameter_shapes(net, key, packed.one_token(patch), patch)
        else:

            def of_scales(key):
                past = observed_series(jnp.zeros((1, 1, patch)))
                tokens, layout = multiscale.pack_scales(past, 1, patch, width=patch, how=how)
                return net.init(key, tokens, patch, layout=layout)

            shapes = jax.eval_shape(of_scales, key)["params"]
            shapes |= {"scale_weights": jax.ShapeDtypeStruct((how.scales,), jnp.float32)}
        return packed.fresh(
            key, shapes, cfg.patch_sizes, d_model=cfg.d_model, own=multiscale.distribution
        )

    def with_scales(self, params: Tree, how: MultiScale, key: jax.Array) -> tuple["Moirai", Tree]:
        if self.config.multiscale is not None:
            raise ValueError(
                "this Moirai has further scales already; start from the model without them"
            )
        model = Moirai(dataclasses.replace(self.config, multiscale=how))
        fresh = flatten(model.init(key)) | flatten(params)
        return model, unflatten(fresh)

    def recipe(self) -> Recipe:
        source = (
            "uni2ts cli/conf/finetune (lr 5e-7 for 1.1-R, AdamW, decay 0.1, clip 1.0); epochs and "
            "context ours"
        )
        return self._recipe(source=source, **FINETUNING)

    # --- the network, and distributions of the future

    def apply(
        self,
        params: Tree,
        tokens: Tokens,
        patch,
        key=None,
        train=False,
        only=None,
        lean=False,
        layout=None,
        scale=None,
    ) -> tuple[Mixture, dict]:
        """One forward pass: the distribution of every entry of the tokens [B, N, P] in their units,
        and named steps.

        patch, only, lean, layout, scale: see `MoiraiNet`.
        """
        options = {"only": only, "lean": lean, "layout": layout, "scale": scale}
        net = MoiraiNet(self.config)
        return run_network(net, params, tokens, patch, key=key, train=train, **options)

    def packed_loss(
        self, params: Tree, tokens: Tokens, patch, key=None, train=False, weight=None
    ) -> jax.Array:
        """The original's training loss: negative log-likelihood of the predicted, observed entries
        in the units of the tokens, every variate of every sample counting alike. weight: of each
        row.
        """
        y, _ = self.apply(params, tokens, patch, key=key, train=train)
        return packed.group_mean(-y.log_prob(tokens.target), tokens, weight)

    def future(
        self,
        params: Tree,
        past: Series,
        horizon: int,
        patch: int,
        key=None,
        train=False,
        future=None,
        lean=False,
        scale=None,
        **covariates,
    ) -> Mixture | ScaleMixture:
        """Distribution [B, C, H] of the steps after `past`, in its units.

        patch: one of `patch_sizes`. lean: for a forecast, see `layers.scan`. scale: see
        `MoiraiNet`, for models of one scale. future, covariates: `begun_BT`, `known`, `past_known`,
        see `layers.packed.pack`; of several scales there is `begun_BT` alone.
        """
        if self.config.multiscale:
            parts = self.scaled_future(
                params, past, horizon, patch=patch, key=key, train=train, lean=lean, **covariates
            )
            return multiscale.mixed(params["scale_weights"], parts, horizon)
        _, c, t = past[0].shape
        width = max(self.config.patch_sizes)
        tokens = packed.pack(past, horizon, patch, width=width, future=future, **covariates)
        only = packed.future_tokens(c, t, horizon, patch=patch)
        y, _ = self.apply(
            params, tokens, patch, key=key, train=train, only=only, lean=lean, scale=scale
        )
        return jax.tree.map(lambda leaf: packed.unpack(leaf, c, horizon, patch=patch), y)

    def scaled_future(
        self,
        params: Tree,
        past: Series,
        horizon: int,
        patch: int,
        key=None,
        train=False,
        lean=False,
        begun_BT=None,
    ) -> tuple[Mixture, ...]:
        """Distributions [B, C, ceil(H / 2^s)] of the coming steps of each scale s; arguments as of
        `future`.
        """
        how = self.config.multiscale
        assert how is not None, "this model has one scale"
        c, width = past[0].shape[1], max(self.config.patch_sizes)
        tokens, layout = multiscale.pack_scales(
            past, horizon, patch, width=width, how=how, begun_BT=begun_BT
        )
        only = layout.first, layout.first + sum(layout.futures)
        y, _ = self.apply(
            params, tokens, patch, key=key, train=train, only=only, lean=lean, layout=layout
        )
        parts, begin = [], 0
        for s, n in enumerate(layout.futures):
            own = jax.tree.map(lambda leaf, begin=begin, n=n: leaf[:, begin : begin + n], y)
            steps = -(-horizon // 2**s)
            parts.append(
                jax.tree.map(
                    lambda leaf, steps=steps: packed.unpack(leaf, c, steps, patch=patch), own
                )
            )
            begin += n
        return tuple(parts)

    def best_future(
        self, params: Tree, past: Series, horizon: int, context_len: int, begun_BT=None
    ):
        """`future` after the last `context_len` steps of `past`, at the patch size that would have
        forecast the last `horizon` steps best, each row its own: (mixture, validation losses [Z,
        B]).

        The loss of a row is the negative log-likelihood, summed over variates of the mean over
        their observed steps. A past shorter than two horizons is split in the middle.
        """
        (x, observed), sizes = past, self.config.patch_sizes
        b, _, t = x.shape
        begun = jnp.ones((b, t), bool) if begun_BT is None else begun_BT
        held, first = min(horizon, t // 2), max(t - context_len, 0)
        length = max(t - held, t - first)

        def window(start: int, stop: int) -> tuple[jax.Array, ...]:
            """Values, observed and begun of the steps from `start` to `stop`, filled up in front
            to `length`.
            """
            missing = length - (stop - start)
            series = (leaf[..., start:stop] for leaf in (x, observed, begun))
            return tuple(_filled(leaf, missing) for leaf in series)

        def after(window: tuple[jax.Array, ...], patch: int, steps: int) -> Mixture | ScaleMixture:
            x, observed, begun, *scale = window
            past, more = (x, observed), {"scale": scale or None, "begun_BT": begun}
            return self.future(params, past, steps, patch=patch, lean=True, **more)

        # A forecast of the end of the context, which is known, and of the horizon, at each size.
        stacked = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
        shorter, whole = window(0, t - held), window(first, t)
        if held == horizon:  # both passes of a size are one program, run twice
            both = stacked(shorter, whole)
            # All patch sizes cut the same values, whose scale is computed once.
            rows = (leaf.reshape(2 * b, *leaf.shape[2:]) for leaf in both[:2])
            both = *both, *(leaf.reshape(2, b, -1) for leaf in packed.series_scale(*rows))
            found = [
                jax.lax.map(functools.partial(after, patch=p, steps=horizon), both) for p in sizes
            ]
            tried = stacked(*(jax.tree.map(operator.itemgetter(0), y) for y in found))
            found = stacked(*(jax.tree.map(operator.itemgetter(1), y) for y in found))
        else:
            tried = stacked(*(after(shorter, p, held) for p in sizes)) if held else None
            found = stacked(*(after(whole, p, horizon) for p in sizes))

        # Each row takes the size with the best likelihood of what is known.
        loss_ZB = jnp.zeros((len(sizes), b))
        if tried is not None:
            rest, known = x[None, ..., t - held :], observed[None, ..., t - held :]
            nll_ZBCH = jnp.where(known, -tried.log_prob(rest), 0.0)
            loss_ZB = (nll_ZBCH.sum(-1) / jnp.maximum(known.sum(-1), 1)).sum(-1)
        best_B = jnp.argmin(loss_ZB, axis=0)
        return jax.tree.map(lambda leaf: leaf[best_B, jnp.arange(b)], found), loss_ZB

    # --- the contract

    @property
    def training_patch(self) -> int:
        """The patch size of the losses: the configured one, or the middle of `patch_sizes` (the
        original draws one for each sample, of those that suit its frequency).
        """
        cfg = self.config
        if cfg.patch_size == "auto":
            return cfg.patch_sizes[len(cfg.patch_sizes) // 2]
        return cfg.patch_size

    def _distribution(
        self, params: Tree, batch: Batch, key, train: bool
    ) -> tuple[Mixture | ScaleMixture, Batch]:
        """Distribution of a batch's targets, and the batch in rows of the model."""
        rows = packed.rows_of(batch, self.config.variates)
        past = observed_series(rows["context"])
        return self.future(
            params, past, rows["target"].shape[-1], patch=self.training_patch, key=key, train=train
        ), rows

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Negative log-likelihood of the target in its units, as in the original: the mean over
        observed steps, each variate of each row counting alike. Of several scales the weighted
        average of the losses of each, whose target is that of the series, averaged as its context
        is.
        """
        if self.config.multiscale:
            return self._scaled_loss(params, batch, key, train=train)
        y, rows = self._distribution(params, batch, key, train=train)
        assert isinstance(y, Mixture), "of one scale"
        return mixture.series_nll(y, *observed_series(rows["target"]), rows.get("weight"))

    def _scaled_loss(self, params: Tree, batch: Batch, key, train: bool) -> jax.Array:
        rows = packed.rows_of(batch, self.config.variates)
        past, truth = observed_series(rows["context"]), observed_series(rows["target"])
        parts = self.scaled_future(
            params, past, truth[0].shape[-1], patch=self.training_patch, key=key, train=train
        )
        losses = []
        for s, part in enumerate(parts):
            own = multiscale.pooled(truth, 2**s, before=False)
            losses.append(mixture.series_nll(part, *own, rows.get("weight")))
        # Weights of any size make shares that sum to 1.
        share_S = jax.nn.softmax(params["scale_weights"].astype(jnp.float32))
        return (share_S * jnp.stack(losses)).sum()

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the distribution's mean, over the observed targets."""
        y, rows = self._distribution(params, batch, key, train=train)
        return packed.masked_mse(y.mean(), *observed_series(rows["target"]), rows.get("weight"))

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Samples of the distribution of one forward pass; the point is their median.

        The context is cut to `context_len`, with patch_size "auto" to one horizon more: the last
        horizon steps choose the patch size. Missing values are not observed, as in the original's
        pipeline.
        """
        check_context(context, horizon)
        cfg = self.config
        x = packed.rows_of({"context": jnp.asarray(context, jnp.float32)}, cfg.variates)["context"]
        if cfg.patch_size == "auto":
            x = x[..., -cfg.context_len - horizon :]
            y, _ = self.best_future(
                params, observed_series(x), horizon, context_len=cfg.context_len
            )
        else:
            x = x[..., -cfg.context_len :]
            y = self.future(params, observed_series(x), horizon, patch=cfg.patch_size, lean=True)
        samples = y.sample(row_keys(key, x), cfg.n_samples).reshape(*context.shape[:2], horizon, -1)
        return Forecast(*mixture.summary(samples), samples, mixture.LEVELS)
