"""TTM (TinyTimeMixer, "Granite TimeSeries"): MLP-Mixers over the patches of a window, from fine to
coarse.

Ekambaram et al., "Tiny Time Mixers (TTMs): Fast Pre-trained Models for Enhanced Zero/Few-Shot
Forecasting of Multivariate Time Series" (NeurIPS 2024, arXiv 2401.03955). Follows
ibm-granite/granite-tsfm (commit 412573a and release 0.3.11), TinyTimeMixerForPrediction: r1, r2,
r2.1 and the plain models of r3 with all of their options. The decomposed models of r3 are two of
these, see `ttm_r3`.

A window is scaled, cut into patches, embedded and mixed over patches and over features (on request
over channels too); each mixing ends with a softmax gate over the axis it mixed. With adaptive
patching the first block sees patches split into 2**(levels - 1) pieces, the last one whole patches.

What r3 adds, each where the config asks for it: patches of averages over 2, 4, 8, ... steps before
those of the window itself (`multi_scale`); learned tokens (`registers`) and tokens that name the
strongest frequencies of the window (`spectrum`) in front; a norm over all tokens together; other
gates; and a head that puts quantiles around the forecast of each step, whose median is then the
point forecast (`quantiles`).

Channels that nobody forecasts are the covariates of a table: the exogenous ones those that are
known ahead, the others those of the past alone (`predict_with`).

Inside the network the patch axis comes first, [P, B, C, D]: mixing over patches and mixing over
features are then both products of two plain matrices, without a transpose.

Departures from the original, each because its behaviour is a mistake or needs what a pure function
has not got:
- A channel without any observation is scaled, under `scaling="mean"`, by 1; the original takes the
  mean of the whole batch, so that rows see each other (`batch_default_scale` for its way).
- Missing values (NaN) are unobserved for the scale and stand as 0 in the patches, as its data
  pipeline fills them; it expects series that are standardised. `fill="mean"` puts the mean of the
  window there. `predict` pads a context that is too short on the left with missing values, as the
  original's data pipeline does. (`apply` without a mask does as r3's model: the zeros that it pads
  with count in the scale. The model of r1 and r2 refuses such a context.)
- A missing target does not count. The original leaves `future_observed_mask` unused where there are
  quantiles.
- BatchNorm (no published model has it) uses its running statistics in training too, and does not
  move them.
- A roll-out is cut to the horizon asked for; the original gives whole forecasts. It gives points
  alone; here the quantiles of a later forecast are those that follow the medians of the earlier
  ones. A shorter horizon is the beginning of a whole forecast; the original's `filter_len`
  normalises the head's input over the steps that it keeps, which changes the quantiles.
"""

import abc
import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.frequency import microseconds
from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, Normal, draw, torch_linear
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import mean_observed
from ltsm_jax.layers.mlp import gelu
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.patches import end_to_end
from ltsm_jax.layers.positions import require_table
from ltsm_jax.models.configs import field_problems, refuse
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group, LayerStack
from ltsm_jax.trees import Tree, flatten, unflatten

SCALE_EPS = 1e-5  # inside the root, added to the variance
LEAST_SCALE = 1e-10  # of the mean scaler
LEAST_WIDTH = 4  # a level that would leave features this narrow keeps whole patches
FREQUENCIES = {
    "oov": 0,
    "min": 1,
    "2min": 2,
    "5min": 3,
    "10min": 4,
    "15min": 5,
    "30min": 6,
    "h": 7,
    "d": 8,
    "W": 9,
}
_MINUTES = {
    1: 1,
    2: 2,
    5: 3,
    10: 4,
    15: 5,
    30: 6,
    60: 7,
    24 * 60: 8,
    7 * 24 * 60: 9,
}  # length of a step -> token

Loss = Literal["mse", "mae", "pinball", "huber"]
GateMode = Literal["softmax", "sigmoid", "glu", "group_sigmoid"]


@dataclasses.dataclass(frozen=True)
class QuantileConfig:
    """The head of quantiles, and the loss that it is trained with.

    levels: ascending, an odd number of them, 0.5 in the middle.
    hidden: its width. kernel_size: steps of its filter over time, odd. eps: least distance between
    two levels. median: the "mean" head's median is the forecast it is given; the "median" head
    learns a correction. condition: what it sees of the decoder: nothing, the mean over the tokens
      ("pool"), or all tokens of width `token_width` ("flatten"); join: how that comes to the hidden
      features of each step.
    point_weight: of the mean absolute error of the median, beside the pinball loss.
    width_weight: of the distance between the outermost levels ("boundary") or of the mean over all
      symmetric pairs ("wis"); width_mode says which.
    """

    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    hidden: int = 8
    kernel_size: int = 3
    eps: float = 1e-6
    median: Literal["mean", "median"] = "median"
    condition: Literal["pool", "flatten"] | None = None
    join: Literal["add", "concat"] = "add"
    token_width: int = 8
    point_weight: float = 0.0
    width_weight: float = 0.0
    width_mode: Literal["boundary", "wis"] = "boundary"

    def __post_init__(self):
        problems = []
        ordered = list(self.levels) == sorted(set(self.levels))
        middle = len(self.levels) // 2
        if len(self.levels) % 2 == 0 or not ordered or not all(0 < q < 1 for q in self.levels):
            problems.append(
                f"levels must be an odd number of ascending ones in (0, 1): {self.levels}"
            )
        elif abs(self.levels[middle] - 0.5) > 1e-6:
            problems.append(f"as many levels must lie below 0.5 as above: {self.levels}")
        if (
            min(self.hidden, self.token_width) < 1
            or self.kernel_size % 2 == 0
            or not 0 < self.kernel_size < 256
        ):
            problems.append(
                "hidden and token_width must be positive, kernel_size odd and below 256"
            )
        if self.eps < 0 or self.point_weight < 0 or self.width_weight < 0:
            problems.append("eps and the weights of the loss must not be negative")
        refuse(self, problems)


@dataclasses.dataclass(frozen=True)
class MixerDims:
    """Hidden widths of a layer's mixers over channels, patches and features; 0: it has no such
    mixer.
    """

    channel: int
    patch: int
    feature: int


@dataclasses.dataclass(frozen=True)
class TTMConfig:
    """Hidden widths are per layer, so that a pruned TTM is a TTM.

    context_len L, horizon H, patch_len, patch_stride in time steps; d_model D and decoder_d_model.
    encoder, decoder: hidden widths of each layer, block by block in the order of computation. No
      decoder: ().
    levels, decoder_levels: blocks of adaptive patching, each with an equal share of the layers; 0:
    plain layers. n_channels, mix_channels, decoder_mix_channels: C of the mixers over channels, and
    which parts have them. freq_vocab: rows of the table of frequency tokens, a prefix patch; 0: no
      prefix. freq_token: the one of the data set at hand (`for_series`).
    vocab: sizes of the static categorical variables (with decoder_mix_channels); categories: their
    values. targets: channels to forecast, None: all that are not exogenous. exogenous: channels
      whose future is known, by the forecast channel mixer (fcm). filter_len: forecast only so many
      of the first `horizon` steps.
    fcm_context, fcm_layers, fcm_offset: steps around each forecast step that the mixer sees, its
      hidden widths, how many of the newest steps of the past it leaves out.
    loss, quantile, huber_delta: the training loss of a model without quantiles.
    multi_scale: patches of averages over 2, 4, ... steps too, as long as one patch can be filled;
    coarsest first. registers: learned tokens. spectrum: tokens of the strongest frequencies of the
      window, from a table (spectrum_table) or from the number of the frequency; spectrum_skip_mean:
      not the frequency 0; spectrum_joined: all in one token, each of a width in [spectrum_least,
      spectrum_most].
    base_norm: a norm over all tokens together, which multi_scale always has.
    gate, gate_groups: how each mixing ends; logits are averaged over so many groups
    ("group_sigmoid"). quantiles: the head of quantiles, None: points alone.
    fill, batch_default_scale: see the module's docstring.
    """

    context_len: int
    horizon: int
    patch_len: int
    patch_stride: int
    d_model: int
    encoder: tuple[MixerDims, ...]
    decoder_d_model: int
    decoder: tuple[MixerDims, ...]
    levels: int = 0
    decoder_levels: int = 0
    n_channels: int = 1
    mix_channels: bool = False
    decoder_mix_channels: bool = False
    raw_residual: bool = False
    gated: bool = True
    norm: Literal["LayerNorm", "BatchNorm"] = "LayerNorm"
    norm_eps: float = 1e-5
    attn_heads: int = 0
    position: Literal["sincos", "random"] | None = None
    freq_vocab: int = 0
    freq_token: int | None = None
    vocab: tuple[int, ...] = ()
    categories: tuple[int, ...] | None = None
    scaling: Literal["std", "mean"] | None = "std"
    targets: tuple[int, ...] | None = None
    exogenous: tuple[int, ...] = ()
    filter_len: int | None = None
    fcm: bool = False
    fcm_context: int = 1
    fcm_layers: tuple[MixerDims, ...] = ()
    fcm_gated: bool = True
    fcm_past: bool = True
    fcm_offset: int | None = None
    dropout: float = 0.2
    head_dropout: float = 0.2
    loss: Loss = "mse"
    quantile: float = 0.5
    huber_delta: float = 1.0
    post_init: bool = False
    multi_scale: bool = False
    registers: int = 0
    spectrum: int = 0
    spectrum_table: bool = True
    spectrum_skip_mean: bool = False
    spectrum_joined: bool = False
    spectrum_least: int = 4
    spectrum_most: int = 64
    base_norm: bool = False
    gate: GateMode = "softmax"
    gate_groups: int = 8
    quantiles: QuantileConfig | None = None
    fill: Literal["zero", "mean"] = "zero"
    batch_default_scale: bool = False

    def __post_init__(self):
        sizes = ("context_len", "horizon", "patch_len", "patch_stride", "d_model", "n_channels")
        problems = field_problems(self, *sizes, "decoder_d_model", "spectrum_least", "gate_groups")
        if not (self.norm_eps > 0 and 0 < self.quantile < 1 and self.huber_delta > 0):
            problems.append(f"norm_eps, huber_delta > 0 and quantile in (0, 1): {self}")
        problems += self._problems_of_sizes()
        problems += self._problems_of_channels()
        problems += self._problems_of_r3()
        refuse(self, problems)

    def _problems_of_sizes(self) -> list[str]:
        """Say which lengths and widths do not go together."""
        problems = []
        if self.context_len <= self.patch_len:
            problems.append(
                f"the context ({self.context_len}) must be longer than a patch ({self.patch_len})"
            )
        for name, widths, levels, width in (
            ("encoder", self.encoder, self.levels, self.d_model),
            ("decoder", self.decoder, self.decoder_levels, self.decoder_d_model),
        ):
            if name == "encoder" and not widths:
                problems.append("the encoder must have at least one layer")
            if any(min(dims.channel, dims.patch, dims.feature) < 0 for dims in widths):
                problems.append(f"hidden widths of the {name} must not be negative: {widths}")
            if levels < 0 or (levels and len(widths) % levels):
                problems.append(
                    f"{len(widths)} layers of the {name} are no equal share for {levels} levels"
                )
            elif odd := [f for f in factors(levels, width) if width % f]:
                problems.append(f"{name}: patches of width {width} can't be split by {odd}")
        heads = self.attn_heads
        attended = (self.d_model, self.decoder_d_model) if self.decoder else (self.d_model,)
        if heads < 0 or (heads and any(w % heads for w in attended)):
            problems.append(f"{heads} attention heads do not divide the widths {attended}")
        return problems

    def _problems_of_channels(self) -> list[str]:
        """Say what can't be among channels, categories, frequencies and the mixer of forecasts."""
        problems = []
        if self.vocab and not (self.decoder and self.decoder_mix_channels):
            problems.append("categorical variables need a decoder that mixes channels")
        if self.categories is not None and (
            len(self.categories) != len(self.vocab)
            or any(not 0 <= v < n for v, n in zip(self.categories, self.vocab, strict=True))
        ):
            problems.append(
                f"categories {self.categories} are not values of variables with {self.vocab} "
                "values each"
            )
        if self.freq_token is not None and not 0 <= self.freq_token < self.freq_vocab:
            problems.append(f"frequency token {self.freq_token} is not one of {self.freq_vocab}")
        for name, channels in (("targets", self.targets or ()), ("exogenous", self.exogenous)):
            if len(set(channels)) < len(channels) or any(
                not 0 <= c < self.n_channels for c in channels
            ):
                problems.append(
                    f"{name} {channels} must be different channels of {self.n_channels}"
                )
        if self.filter_len is not None and not 0 < self.filter_len <= self.horizon:
            problems.append(f"filter_len must lie in [1, {self.horizon}], got {self.filter_len}")
        if self.exogenous and not self.fcm:
            problems.append("exogenous channels are used by the forecast channel mixer alone (fcm)")
        if self.fcm and (
            self.fcm_context < 0
            or (not self.fcm_context and (self.fcm_layers or not self.fcm_gated))
        ):
            problems.append(
                f"the forecast channel mixer can't work with a context of {self.fcm_context}"
            )
        if self.fcm_offset is not None and self.fcm_offset < 1:
            problems.append(f"fcm_offset must be at least 1, or None, got {self.fcm_offset}")
        return problems

    def _problems_of_r3(self) -> list[str]:
        """Say what can't be among the options that came with r3."""
        problems = []
        if min(self.registers, self.spectrum) < 0:
            problems.append("registers and spectrum must not be negative")
        bins = self.context_len // 2 + 1 - self.spectrum_skip_mean
        if self.spectrum > bins:
            problems.append(
                f"a window of {self.context_len} steps has {bins} frequencies, not {self.spectrum}"
            )
        if self.multi_scale and self.patch_stride != self.patch_len:
            problems.append(
                "patches of several scales can't overlap: patch_stride must be patch_len"
            )
        if self.raw_residual and (self.multi_scale or self.registers or self.spectrum):
            problems.append(
                "raw_residual adds a patch to each token; there are tokens of other kinds here"
            )
        if self.quantiles is not None:
            forecast = self.forecast_channels
            if (
                self.quantiles.condition
                and forecast is not None
                and len(forecast) < self.n_channels
            ):
                problems.append("quantiles that see the decoder need a forecast of every channel")
            if (self.filter_len or self.horizon) < 2:
                problems.append(
                    "the head of quantiles normalises over the horizon, which must be at least 2"
                )
        return problems

    @classmethod
    def of(
        cls,
        *,
        context_len: int,
        horizon: int,
        patch_len: int,
        d_model: int,
        decoder_d_model: int,
        layers: int = 2,
        decoder_layers: int = 2,
        levels: int = 3,
        decoder_levels: int = 0,
        patch_stride: int | None = None,
        expansion: int = 2,
        fcm_layers: int = 0,
        use_decoder: bool = True,
        **rest,
    ) -> "TTMConfig":
        """Layers as the original builds them: every hidden width is `expansion` times what is
        mixed.
        """
        stride = patch_len if patch_stride is None else patch_stride
        channels, vocab, exogenous = (
            rest.get("n_channels", 1),
            rest.get("vocab", ()),
            rest.get("exogenous", ()),
        )
        if (
            min(context_len - patch_len, patch_len, stride, expansion, layers) < 1
            or max(levels, decoder_levels) > 16
        ):
            raise ValueError(
                f"context_len {context_len} must be longer than patch_len {patch_len}, and stride "
                f"{stride}, layers {layers} and expansion {expansion} at least 1, levels at most 16"
            )
        patches = (context_len - patch_len) // stride + 1
        n = sum(scales(patches)) if rest.get("multi_scale") else patches
        n += tokens_in_front(
            rest.get("freq_vocab", 0),
            rest.get("registers", 0),
            rest.get("spectrum", 0),
            spectrum_joined=rest.get("spectrum_joined", False),
        )

        def widths(mixed, n_channels, n_patches, width, count, n_levels):
            hidden = expansion * n_channels if mixed else 0
            found = []
            for f in factors(n_levels, width):
                # A single piece of a single patch leaves nothing to mix over patches.
                over_patches = expansion * f * n_patches if f * n_patches > 1 else 0
                found += [MixerDims(hidden, over_patches, expansion * (width // f))] * count
            return tuple(found)

        encoder = widths(
            rest.get("mix_channels"), channels, n, width=d_model, count=layers, n_levels=levels
        )
        both = channels + len(vocab)
        decoder = widths(
            rest.get("decoder_mix_channels"),
            both,
            n,
            width=decoder_d_model,
            count=decoder_layers,
            n_levels=decoder_levels,
        )
        step = 2 * (2 * rest.get("fcm_context", 1) + 1)
        targets = rest.get("targets")
        seen = (channels - len(exogenous) if targets is None else len(targets)) + len(exogenous)
        return cls(
            context_len=context_len,
            horizon=horizon,
            patch_len=patch_len,
            patch_stride=stride,
            d_model=d_model,
            encoder=encoder,
            decoder_d_model=decoder_d_model,
            decoder=decoder if use_decoder else (),
            levels=levels,
            decoder_levels=decoder_levels,
            fcm_layers=widths(False, 0, seen, width=step, count=fcm_layers, n_levels=0),
            **rest,
        )

    @property
    def window_patches(self) -> int:
        """Patches that the window itself is cut into."""
        return (self.context_len - self.patch_len) // self.patch_stride + 1

    @property
    def n_patches(self) -> int:
        """N, the patches of all scales and the tokens in front."""
        own = self.window_patches
        patches = sum(scales(own)) if self.multi_scale else own
        return patches + tokens_in_front(
            self.freq_vocab, self.registers, self.spectrum, spectrum_joined=self.spectrum_joined
        )

    @property
    def spectrum_width(self) -> int:
        """Width of the vector of one frequency."""
        if not self.spectrum_joined:
            return self.d_model
        share = max(self.d_model // self.spectrum, self.spectrum_least)
        return min(share, self.spectrum_most)

    @property
    def forecast_channels(self) -> tuple[int, ...] | None:
        """Channels that are forecast; None: all, however many there are."""
        if self.targets is not None:
            return tuple(sorted(self.targets))  # the original sorts them too
        return (
            tuple(c for c in range(self.n_channels) if c not in self.exogenous)
            if self.exogenous
            else None
        )

    @property
    def known_channels(self) -> tuple[int, ...]:
        """Channels, by number, that are covariates known ahead: the exogenous ones."""
        forecast = self.forecast_channels or ()
        return tuple(sorted(c for c in self.exogenous if c not in forecast))

    @property
    def past_channels(self) -> tuple[int, ...]:
        """Channels, by number, that are covariates known in the past alone: neither forecast nor
        exogenous.
        """
        if self.forecast_channels is None:
            return ()
        others = (*self.forecast_channels, *self.exogenous)
        return tuple(c for c in range(self.n_channels) if c not in others)

    @property
    def covariates(self) -> frozenset[str]:
        """Kinds of covariates among the channels: "past" and "known"."""
        kinds = {"past": self.past_channels, "known": self.known_channels}
        return frozenset(kind for kind, channels in kinds.items() if channels)


def scales(patches: int) -> tuple[int, ...]:
    """Patches of the averages over 1, 2, 4, ... steps of a window of so many patches."""
    return tuple(patches >> i for i in range(patches.bit_length()))


def tokens_in_front(freq_vocab: int, registers: int, spectrum: int, spectrum_joined: bool) -> int:
    """Tokens before the patches: of frequencies of the window, registers, and the step of the
    series.
    """
    bins = min(spectrum, 1) if spectrum_joined else spectrum
    return bins + registers + bool(freq_vocab)


def factors(levels: int, width: int) -> tuple[int, ...]:
    """Into how many pieces each block of adaptive patching splits a patch: finest first, (1,)
    without levels.
    """
    split = [2**level for level in reversed(range(levels))] or [1]
    return tuple(1 if width // f <= LEAST_WIDTH else f for f in split)


def _granite(horizon: int, context: int, **rest) -> TTMConfig:
    patch, d, decoder = (64, 192, 128) if context == 512 else (128, 384, 256)
    sizes: dict[str, Any] = {"patch_len": patch, "d_model": d, "decoder_d_model": decoder} | rest
    return TTMConfig.of(context_len=context, horizon=horizon, **sizes)


# Dropout as in the two config.json at hand (r1 and r2, 512 -> 96); the other revisions bring their
# own files.
_R2 = {"dropout": 0.4, "head_dropout": 0.4}
PRESETS = {
    "ibm-granite/granite-timeseries-ttm-r1": _granite(96, 512),
    "ibm-granite/granite-timeseries-ttm-r1@1024_96_v1": _granite(
        96, 1024, patch_len=64, d_model=192, decoder_d_model=128
    ),
    "ibm-granite/granite-timeseries-ttm-r2": _granite(96, 512, **_R2),
}
for _context, _horizon in itertools.product((512, 1024, 1536), (96, 192, 336, 720)):
    PRESETS[f"ibm-granite/granite-timeseries-ttm-r2@{_context}-{_horizon}-r2"] = _granite(
        _horizon, _context, **_R2
    )


def frequency_token(freq: str | None, vocab: int) -> int:
    """The token of a time step as pandas writes it: "h", "1h", "H", "60min", "W-SUN", ...

    Raises: ValueError listing the known ones, also for a frequency that is not known (None); "oov"
      says that on purpose.
    """
    minutes = (microseconds(freq) or 0) / 60e6
    token = FREQUENCIES["oov"] if freq == "oov" else _MINUTES.get(minutes)  # pyright: ignore
    if token is None or token >= vocab:
        known = ", ".join(name for name, number in FREQUENCIES.items() if number < vocab)
        raise ValueError(
            f"the model has a token for each of the frequencies {known}; none for {freq!r}. With "
            "freq='oov' it takes the token of unknown frequencies"
        )
    return token


def sincos(n: int, d_model: int) -> np.ndarray:
    """The original's position table [n, D], float32: sines in even columns, cosines in odd ones,
    its mean taken off and divided by ten of its standard deviations.
    """
    require_table(n, d_model)
    angle = (
        np.arange(n)[:, None]
        * np.exp(np.arange(0, d_model, 2) * -(math.log(10000.0) / d_model))[None]
    )
    table = np.zeros((n, d_model))
    table[:, 0::2], table[:, 1::2] = np.sin(angle), np.cos(angle)[:, : d_model // 2]
    table -= table.mean()
    return (table / (table.std(ddof=1) * 10)).astype(np.float32)


class Norm(nn.Module):
    """LayerNorm over features, or BatchNorm with its running statistics (leaves `mean`
    and `var`).
    """

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x):
        if self.kind == "LayerNorm":
            return nn.LayerNorm(epsilon=self.eps, use_fast_variance=False, name="layer")(x)
        starts = {"mean": 0.0, "var": 1.0, "scale": 1.0, "bias": 0.0}
        own = {}
        for name, value in starts.items():
            leaf = self.param(name, nn.initializers.constant(value), x.shape[-1:])
            own[name] = leaf.reshape((1,) * (x.ndim - 1) + x.shape[-1:])
        gap = x.astype(jnp.float32) - own["mean"]
        normed = gap * jax.lax.rsqrt(own["var"] + self.eps)
        return (normed * own["scale"] + own["bias"]).astype(x.dtype)


PATCH, CHANNEL, FEATURE = 0, 2, 3  # axes of x_PBCD


def along(x_PBCD: jax.Array, axis: int, outputs: int, name: str) -> jax.Array:
    """A linear layer over one axis of x, of the module that calls this."""
    linear = Linear((x_PBCD.shape[axis],), (outputs,), transposed=axis == PATCH, name=name)
    if axis == FEATURE:
        return linear(x_PBCD)
    if axis == PATCH:
        rest = x_PBCD.shape[1:]
        return linear(x_PBCD.reshape(x_PBCD.shape[0], -1).T).T.reshape(-1, *rest)
    return jnp.swapaxes(linear(jnp.swapaxes(x_PBCD, axis, -1)), axis, -1)


class Gate(nn.Module):
    """x times weights from a linear layer of x, over one axis; and the steps between.

    The weights are the softmax or the sigmoid of its outputs, or the sigmoid of their means over
    `groups` groups (as many as divide the axis, at most). With "glu" it has twice as many outputs,
    and one half gates the other.
    """

    axis: int
    mode: GateMode = "softmax"
    groups: int = 8

    @nn.compact
    def __call__(self, x):
        n = x.shape[self.axis]
        outputs = 2 * n if self.mode == "glu" else n
        logits = along(x, self.axis, outputs, name="linear")
        wide = logits.astype(jnp.float32)
        if self.mode == "softmax":
            weights = jax.nn.softmax(wide, axis=self.axis).astype(x.dtype)
        elif self.mode == "glu":
            x, wide = jnp.split(wide, 2, axis=self.axis)
            weights = jax.nn.sigmoid(wide)
            x, weights = x.astype(logits.dtype), weights.astype(logits.dtype)
        else:
            if self.mode == "group_sigmoid":
                wide = self._averaged(wide)
            weights = jax.nn.sigmoid(wide).astype(x.dtype)
        return x * weights, {"logits": logits, "weights": weights}

    def _averaged(self, x):
        """Replace each value by the mean of its group of neighbours along the axis."""
        n, axis = x.shape[self.axis], self.axis
        groups = next(g for g in range(min(self.groups, n), 0, -1) if n % g == 0)
        shape = (*x.shape[:axis], groups, n // groups, *x.shape[axis + 1 :])
        means = x.reshape(shape).mean(axis=axis + 1)
        return jnp.repeat(means, n // groups, axis=axis)


class Attention(nn.Module):
    """Self-attention over the patches of x_PBCD."""

    n_heads: int
    dropout: float

    @nn.compact
    def __call__(self, x_PBCD, train: bool):
        d = x_PBCD.shape[-1]
        heads = (self.n_heads, d // self.n_heads)

        def project(name):
            return jnp.moveaxis(Linear((d,), heads, name=name)(x_PBCD), 0, 3)  # [B, C, H, P, K]

        q, drop = (
            project("q") * heads[1] ** -0.5,
            functools.partial(Dropout(self.dropout), train=train),
        )
        y_BCHPK, _ = attend(q, project("k"), project("v"), dropout=drop)
        return Linear(heads, (d,), name="out")(jnp.moveaxis(y_BCHPK, 3, 0))


class Mixer(nn.Module):
    """Residual MLP over one axis of x_PBCD, with its gate; and the named steps between."""

    cfg: TTMConfig
    axis: int
    hidden: int
    gated: bool
    dropout: float

    @nn.compact
    def __call__(self, x_PBCD, train: bool):
        cfg, axis, taps = self.cfg, self.axis, {}
        n = x_PBCD.shape[axis]

        def gate(y):
            y, inner = Gate(axis, cfg.gate, cfg.gate_groups, name="gate")(y)
            taps.update(nested("gate", inner, y))
            return y

        h = taps["norm"] = Norm(cfg.norm, cfg.norm_eps, name="norm")(x_PBCD)
        attended = axis == PATCH and cfg.attn_heads > 0
        if attended:
            taps["attn"] = Attention(cfg.attn_heads, self.dropout, name="attn")(h, train)
        # The original gates what enters a mixer over channels, and what leaves the other two.
        if self.gated and axis == CHANNEL:
            h = gate(h)
        u = taps["up"] = along(h, axis, self.hidden, name="up")
        u = taps["hidden"] = Dropout(self.dropout)(gelu(u), train)
        h = along(u, axis, n, name="down")
        h = taps["mlp"] = Dropout(self.dropout)(h, train)
        if self.gated and axis != CHANNEL:
            h = gate(h)
        if attended:
            h = taps["norm_attn"] = Norm(cfg.norm, cfg.norm_eps, name="norm_attn")(h + taps["attn"])
        return x_PBCD + h, taps


class Layer(nn.Module):
    """The mixers of one layer over channels, patches and features, as far as it has them; and the
    steps between.
    """

    cfg: TTMConfig
    dims: MixerDims
    gated: bool
    dropout: float

    @nn.compact
    def __call__(self, x_PBCD, train: bool):
        taps = {}
        for kind, axis in (("channel", CHANNEL), ("patch", PATCH), ("feature", FEATURE)):
            hidden = getattr(self.dims, kind)
            if hidden:
                name = f"{kind}_mixer"
                x_PBCD, inner = Mixer(
                    self.cfg, axis, hidden, gated=self.gated, dropout=self.dropout, name=name
                )(x_PBCD, train)
                taps |= nested(name, inner, x_PBCD)
        return x_PBCD, taps


class Mixers(nn.Module):
    """Layers block by block, x_PBCD -> x_PBCD; and the named steps between."""

    cfg: TTMConfig
    layers: tuple[MixerDims, ...]
    levels: int
    gated: bool
    dropout: float

    @nn.compact
    def __call__(self, x_PBCD, train: bool):
        taps = {}
        blocks = factors(self.levels, x_PBCD.shape[-1])
        share = len(self.layers) // len(blocks)
        p, b, c, d = x_PBCD.shape
        for j, f in enumerate(blocks):
            # Split each patch into f pieces, finest blocks first; and put them together again.
            pieces = jnp.moveaxis(x_PBCD.reshape(p, b, c, f, d // f), 3, 1)
            x_PBCD = pieces.reshape(p * f, b, c, d // f)
            for i, dims in enumerate(self.layers[j * share : (j + 1) * share]):
                name = f"block_{j}_layer_{i}" if self.levels else f"layer_{i}"
                x_PBCD, inner = Layer(self.cfg, dims, self.gated, dropout=self.dropout, name=name)(
                    x_PBCD, train
                )
                taps |= nested(name, inner, x_PBCD)
            x_PBCD = jnp.moveaxis(x_PBCD.reshape(p, f, b, c, d // f), 1, 3).reshape(p, b, c, d)
            if self.levels:
                taps[f"block_{j}"] = x_PBCD
        return x_PBCD, taps


class Decoder(nn.Module):
    """Narrower mixers over x_PBCD, with the patches and the static categories where the config asks
    for them.
    """

    cfg: TTMConfig

    @nn.compact
    def __call__(self, x_PBCD, p_PBCK, categories_BV, train: bool):
        cfg, taps = self.cfg, {}
        d, n_channels = cfg.decoder_d_model, x_PBCD.shape[2]
        if cfg.d_model != d:
            x_PBCD = taps["adapter"] = Linear((cfg.d_model,), (d,), name="adapter")(x_PBCD)
        if cfg.raw_residual:
            # Tokens in front of the patches have none of their own.
            prefix = ((x_PBCD.shape[0] - p_PBCK.shape[0], 0), (0, 0), (0, 0), (0, 0))
            embed = Linear((cfg.patch_len,), (d,), name="raw_embed")
            taps["raw_embed"] = embed(jnp.pad(p_PBCK, prefix))
            x_PBCD = x_PBCD + taps["raw_embed"]
        if cfg.vocab:
            # Categories are further channels, which the mixers over channels see.
            rows = []
            for k, n in enumerate(cfg.vocab):
                table = self.param(f"category_{k}", nn.initializers.zeros, (n, d))
                rows.append(table[categories_BV[:, k]])
            one_BVD = jnp.stack(rows, axis=1)
            e_PBVD = jnp.broadcast_to(one_BVD[None], (x_PBCD.shape[0], *one_BVD.shape))
            taps["categories"] = e_PBVD
            x_PBCD = jnp.concatenate([x_PBCD, e_PBVD.astype(x_PBCD.dtype)], axis=2)
        mixers = Mixers(
            cfg,
            cfg.decoder,
            cfg.decoder_levels,
            gated=cfg.gated,
            dropout=cfg.head_dropout,
            name="mixers",
        )
        x_PBCD, inner = mixers(x_PBCD, train)
        return x_PBCD[:, :, :n_channels], taps | inner


class ForecastMixer(nn.Module):
    """Corrects the forecasts of all targets from each other and from the known future of the
    exogenous channels.

    base_BCH, past_BCS (the `fcm_context` steps before), future_BXH, past_BXS -> [B, C, H]; all in
    what the original mixes here: scaled forecasts with raw values, which are expected to be
    standardised.
    """

    cfg: TTMConfig

    @nn.compact
    def __call__(self, base_BCH, past_BCS, future_BXH, past_BXS, train: bool):
        cfg, taps, s = self.cfg, {}, self.cfg.fcm_context
        b, c, h = base_BCH.shape
        e_BET = jnp.concatenate([base_BCH, future_BXH], axis=1)
        e = e_BET.shape[1]
        nothing = jnp.zeros((b, e, s), e_BET.dtype)
        before = jnp.concatenate([past_BCS, past_BXS], axis=1) if cfg.fcm_past else nothing
        # Each forecast step with the s steps before and behind it.
        e_BET = jnp.concatenate([before, e_BET, nothing], axis=-1)
        steps = np.arange(h)[:, None] + np.arange(2 * s + 1)[None]
        w_EBHS = jnp.moveaxis(e_BET[..., steps], 1, 0)
        taps["windows"] = w_EBHS
        if cfg.fcm_layers:
            step = 2 * (2 * s + 1)
            w_EBHS = taps["embed"] = Linear((2 * s + 1,), (step,), name="embed")(w_EBHS)
            mixers = Mixers(
                cfg, cfg.fcm_layers, 0, gated=cfg.fcm_gated, dropout=cfg.head_dropout, name="mixers"
            )
            w_EBHS, inner = mixers(w_EBHS, train)
            taps |= nested("mixers", inner, w_EBHS)
        f_1BHF = jnp.moveaxis(w_EBHS, 0, 2).reshape(1, b, h, -1)
        if cfg.fcm_gated:
            f_1BHF, inner = Gate(FEATURE, cfg.gate, cfg.gate_groups, name="gate")(f_1BHF)
            taps |= nested("gate", inner, f_1BHF)
        y_BHC = taps["out"] = Linear((f_1BHF.shape[-1],), (c,), name="out")(f_1BHF)[0]
        return base_BCH + jnp.swapaxes(y_BHC, 1, 2), taps


class Filter(nn.Module):
    """A weighted sum of neighbouring steps of x [..., T], zeros beyond the ends."""

    size: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.zeros, (self.size,))
        bias = self.param("bias", nn.initializers.zeros, (1,))
        beyond = self.size // 2
        padded = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (beyond, beyond)))
        y = jnp.zeros_like(x)
        for step in range(self.size):
            y = y + kernel[step] * padded[..., step : step + x.shape[-1]]
        return y + bias.reshape((1,) * x.ndim)


class OverTime(nn.Module):
    """Normalise x [..., T] over its steps, with one scale and one bias for all."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (1,)).reshape((1,) * x.ndim)
        bias = self.param("bias", nn.initializers.zeros, (1,)).reshape((1,) * x.ndim)
        gap = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(gap).mean(axis=-1, keepdims=True)
        return gap * jax.lax.rsqrt(variance + self.eps) * scale + bias


class QuantileHead(nn.Module):
    """Quantiles around a forecast: f_BCH and the decoder's x_PBCD -> [B, C, H, Q], ascending, in
    the units of f.

    The lower levels go down from the median in positive steps, the upper ones up, so that they
    can't cross. Everything is computed in float32.
    """

    cfg: QuantileConfig

    @nn.compact
    def __call__(self, f_BCH, x_PBCD):
        cfg, taps = self.cfg, {}
        side = len(cfg.levels) // 2
        f_BCH = f_BCH.astype(jnp.float32)
        h_BCH = taps["filter"] = Filter(cfg.kernel_size, name="filter")(f_BCH)
        h_BCH = taps["norm"] = OverTime(name="norm")(h_BCH)
        h_BCHF = taps["up"] = Linear((1,), (cfg.hidden,), name="up")(h_BCH[..., None])
        h_BCHF = gelu(h_BCHF)
        if cfg.condition:
            c_BCF, inner = self._condition(x_PBCD)
            taps |= inner
            c_BCHF = jnp.broadcast_to(c_BCF[:, :, None], h_BCHF.shape).astype(h_BCHF.dtype)
            if cfg.join == "add":
                h_BCHF = h_BCHF + c_BCHF
            else:
                h_BCHF = jnp.concatenate([h_BCHF, c_BCHF], axis=-1)
        o_BCHQ = Linear((h_BCHF.shape[-1],), (len(cfg.levels),), name="down")(h_BCHF)
        taps["down"] = o_BCHQ
        o_BCHQ = o_BCHQ.astype(jnp.float32)

        # Output 0 corrects the median; then the steps downwards, from the median on, then those
        # upwards.
        median_BCH1 = f_BCH[..., None]
        if cfg.median == "median":
            median_BCH1 = median_BCH1 + o_BCHQ[..., :1]
        steps = jax.nn.softplus(o_BCHQ[..., 1:]) + cfg.eps
        down = jnp.cumsum(steps[..., :side], axis=-1)[..., ::-1]
        up = jnp.cumsum(steps[..., side:], axis=-1)
        q_BCHQ = jnp.concatenate([median_BCH1 - down, median_BCH1, median_BCH1 + up], axis=-1)
        taps["levels"] = q_BCHQ
        return q_BCHQ, taps

    def _condition(self, x_PBCD):
        """Input of the head from the decoder, [B, C, F], and the steps between."""
        cfg, (p, b, c, d) = self.cfg, x_PBCD.shape
        if cfg.condition == "pool":
            pooled = Linear((d,), (cfg.hidden,), name="pool")(x_PBCD.mean(axis=0))
            return pooled, {"pool": pooled}
        t_PBCK = Linear((d,), (cfg.token_width,), name="token")(x_PBCD)
        t_BCF = jnp.moveaxis(t_PBCK, 0, 2).reshape(b, c, p * cfg.token_width)
        flat = Linear((t_BCF.shape[-1],), (cfg.hidden,), name="flat")(t_BCF)
        return flat, {"token": t_PBCK, "flat": flat}


def of_targets(cfg: TTMConfig, x_BC: jax.Array) -> jax.Array:
    """Select the channels that are forecast from [B, C, ...]."""
    targets = cfg.forecast_channels
    return x_BC if targets is None else x_BC[:, np.array(targets)]


def with_covariate_channels(
    cfg: TTMConfig, context_BCT, target_BCH, past_BKT=None, known_BKS=None
) -> tuple[jax.Array, jax.Array]:
    """Put targets and covariates into the order of the channels that the config numbers.

    Args:
      context_BCT, target_BCH: of the channels that are forecast, by rising number.
      past_BKT: of `cfg.past_channels`. known_BKS: of `cfg.known_channels`, S = T + H steps.
    Returns: the past [B, n_channels, T] and the future [B, n_channels, H], which is NaN for
      channels known in the past alone.
    Raises: ValueError for other numbers of rows than there are channels of a kind.
    """
    b, _, t = context_BCT.shape
    parts = (
        ("targets", cfg.forecast_channels or tuple(range(cfg.n_channels)), context_BCT),
        ("covariates of the past", cfg.past_channels, past_BKT),
        ("covariates known ahead", cfg.known_channels, known_BKS),
    )
    problems = []
    for what, channels, rows in parts:
        given = 0 if rows is None else rows.shape[1]
        if given != len(channels):
            problems.append(f"it takes {len(channels)} {what} (channels {channels}), got {given}")
    if problems:
        raise ValueError(
            f"this TTM tells its {cfg.n_channels} channels apart by number: " + "; ".join(problems)
        )
    past, future = [context_BCT], [target_BCH]
    if past_BKT is not None:
        past.append(past_BKT)
        future.append(jnp.full((b, past_BKT.shape[1], target_BCH.shape[-1]), jnp.nan))
    if known_BKS is not None:
        past.append(known_BKS[..., :t])
        future.append(known_BKS[..., t:])
    order = np.argsort(np.concatenate([channels for _, channels, _ in parts]).astype(int))
    return jnp.concatenate(past, axis=1)[:, order], jnp.concatenate(future, axis=1)[:, order]


def all_channels(cfg: TTMConfig, batch: Batch) -> Batch:
    """Put the covariates of a batch among its channels; a batch without any holds them already."""
    if "past" not in batch and "known" not in batch:
        return batch
    past, known = batch.get("past"), batch.get("known")
    context, target = with_covariate_channels(
        cfg, batch["context"], batch["target"], past_BKT=past, known_BKS=known
    )
    rest = {name: value for name, value in batch.items() if name not in ("past", "known")}
    return rest | {"context": context, "target": target}


class TTMNet(nn.Module):
    """Scaled patches of a window -> scaled forecasts, and the named steps.

    p_PBCK: patches. past_BCL: the raw window. future_BCH: raw future, read for exogenous channels.
    freq_B, categories_BV and bins_BCS (numbers of the strongest frequencies, the strongest first):
    integers. The last four may be None where the config has no use for them.
    Returns: forecasts of all channels [B, C, H], forecasts of the targets, their quantiles [B, C',
    H, Q] or None, taps.
    """

    cfg: TTMConfig

    @nn.compact
    def __call__(
        self, p_PBCK, past_BCL, future_BCH, freq_B, categories_BV, bins_BCS, train: bool = False
    ):
        cfg, taps = self.cfg, {"patches": p_PBCK}
        x_PBCD = self._tokens(self._patches(p_PBCK, taps), freq_B, bins_BCS, taps=taps)
        _, b, c, d = x_PBCD.shape
        if cfg.position:
            table_ND = self.param("position", nn.initializers.zeros, (cfg.n_patches, d))
            x_PBCD = taps["position"] = x_PBCD + table_ND[:, None, None].astype(x_PBCD.dtype)
        if cfg.multi_scale or cfg.base_norm:
            norm = nn.LayerNorm(epsilon=cfg.norm_eps, use_fast_variance=False, name="base_norm")
            x_BCF = taps["base_norm"] = norm(jnp.moveaxis(x_PBCD, 0, 2).reshape(b, c, -1))
            x_PBCD = jnp.moveaxis(x_BCF.reshape(b, c, -1, d), 2, 0)
        mixers = Mixers(
            cfg, cfg.encoder, cfg.levels, gated=cfg.gated, dropout=cfg.dropout, name="encoder"
        )
        x_PBCD, inner = mixers(x_PBCD, train)
        taps |= nested("encoder", inner, x_PBCD)
        if cfg.decoder:
            x_PBCD, inner = Decoder(cfg, name="decoder")(x_PBCD, p_PBCK, categories_BV, train=train)
            taps |= nested("decoder", inner)
        taps["decoder"] = x_PBCD
        x_BCF = Dropout(cfg.head_dropout)(jnp.moveaxis(x_PBCD, 0, 2).reshape(b, c, -1), train)
        head = Linear((x_BCF.shape[-1],), (cfg.horizon,), name="head")
        taps["head"] = head(x_BCF)
        all_BCH = taps["head"][..., : cfg.filter_len]
        y_BCH = of_targets(cfg, all_BCH)
        if cfg.fcm:
            y_BCH = self._mixed(y_BCH, past_BCL, future_BCH, train=train, taps=taps)
        taps["forecast"] = y_BCH
        q_BCHQ = None
        if cfg.quantiles is not None:
            head = QuantileHead(cfg.quantiles, name="quantiles")
            q_BCHQ, inner = head(y_BCH, x_PBCD)
            taps |= nested("quantiles", inner)
            y_BCH = q_BCHQ[..., len(cfg.quantiles.levels) // 2]
        return all_BCH, y_BCH, q_BCHQ, taps

    def _mixed(self, y_BCH, past_BCL, future_BCH, train: bool, taps):
        """Forecasts [B, C', H] of the targets by the forecast channel mixer."""
        cfg, known = self.cfg, np.array(self.cfg.exogenous, int)
        last = past_BCL.shape[-1] - (cfg.fcm_offset or 0)
        near_BCS = past_BCL[..., last - cfg.fcm_context : last].astype(y_BCH.dtype)
        future_BXH = future_BCH[:, known].astype(y_BCH.dtype) if cfg.exogenous else y_BCH[:, :0]
        mixer, near = ForecastMixer(cfg, name="fcm"), of_targets(cfg, near_BCS)
        y_BCH, inner = mixer(y_BCH, near, future_BXH, past_BXS=near_BCS[:, known], train=train)
        taps |= nested("fcm", inner)
        return y_BCH

    def _patches(self, p_PBCK, taps):
        """Embed the patches; with several scales those of each, the coarsest first."""
        cfg = self.cfg
        if not cfg.multi_scale:
            x_PBCD = taps["embed"] = Linear((cfg.patch_len,), (cfg.d_model,), name="embed")(p_PBCK)
            return x_PBCD
        n, b, c, k = p_PBCK.shape
        series_BCT = jnp.moveaxis(p_PBCK, 0, 2).reshape(b, c, n * k)
        embedded = []
        for i, count in enumerate(scales(n)):
            # The newest steps are left out where they fill no whole average, the oldest averages
            # where they fill no whole patch.
            steps = (n * k) >> i
            means_BCT = series_BCT[..., : steps << i].reshape(b, c, steps, 1 << i).mean(axis=-1)
            patches = means_BCT[..., steps - count * k :].reshape(b, c, count, k)
            linear = Linear((k,), (cfg.d_model,), name=f"embed_{i}")
            embedded.append(linear(jnp.moveaxis(patches, 2, 0)))
            taps[f"embed_{i}"] = embedded[-1]
        x_PBCD = taps["embed"] = jnp.concatenate(embedded[::-1])
        return x_PBCD

    def _tokens(self, x_PBCD, freq_B, bins_BCS, taps):
        """Put the tokens in front of the patches, each kind before those that were there."""
        cfg, (_, b, c, d) = self.cfg, x_PBCD.shape
        if cfg.freq_vocab:
            middle = (cfg.patch_len + d) // 2
            table = self.param("freq_table", nn.initializers.zeros, (cfg.freq_vocab, cfg.patch_len))
            up = Linear((cfg.patch_len,), (middle,), name="freq_up")
            f_BK = gelu(up(table[freq_B]))
            f_BD = Linear((middle,), (d,), name="freq_down")(f_BK).astype(x_PBCD.dtype)
            taps["freq"] = f_BD
            prefix = jnp.broadcast_to(f_BD[None, :, None], (1, b, c, d))
            x_PBCD = jnp.concatenate([prefix, x_PBCD])
        if cfg.registers:
            r_RD = self.param("registers", nn.initializers.zeros, (cfg.registers, d))
            r_R11D = r_RD[:, None, None].astype(x_PBCD.dtype)
            r_RBCD = jnp.broadcast_to(r_R11D, (cfg.registers, b, c, d))
            x_PBCD = taps["registers"] = jnp.concatenate([r_RBCD, x_PBCD])
        if cfg.spectrum:
            e_SBCD = self._frequencies(bins_BCS, taps).astype(x_PBCD.dtype)
            x_PBCD = taps["tokens"] = jnp.concatenate([e_SBCD, x_PBCD])
        return x_PBCD

    def _frequencies(self, bins_BCS, taps):
        """Tokens [S, B, C, D] that say which frequencies of the window are the strongest."""
        cfg, width = self.cfg, self.cfg.spectrum_width
        n_bins = cfg.context_len // 2 + 1
        if cfg.spectrum_table:
            table = self.param("spectrum_table", nn.initializers.zeros, (n_bins, width))
            e_BCSK = table[bins_BCS]
        else:
            share_BCS1 = bins_BCS[..., None].astype(jnp.float32) / n_bins
            up = taps["spectrum_up"] = Linear((1,), (width,), name="spectrum_up")(share_BCS1)
            e_BCSK = Linear((width,), (width,), name="spectrum_down")(nn.relu(up))
        taps["spectrum"] = e_BCSK
        if cfg.spectrum_joined:
            b, c, s, k = e_BCSK.shape
            join = Linear((s * k,), (cfg.d_model,), name="spectrum_join")
            joined = taps["spectrum_join"] = join(e_BCSK.reshape(b, c, s * k))
            e_BCSK = joined[:, :, None]
        return jnp.moveaxis(e_BCSK, 2, 0)


def location_scale(scaling, x, observed, batch_default=False):
    """Location and scale [B, C, 1] of the observed values of x [B, C, T]; see the module's
    docstring.
    """
    n = observed.sum(-1, keepdims=True)
    if scaling == "std":
        loc = (x * observed).sum(-1, keepdims=True) / jnp.maximum(n, 1)
        variance = jnp.square((x - loc) * observed).sum(-1, keepdims=True) / jnp.maximum(n, 1)
        return loc, jnp.sqrt(variance + SCALE_EPS)
    loc = jnp.zeros_like(n)
    if scaling is None:
        return loc, jnp.ones_like(n)
    # The scale of a series without values is 1, or what the original takes: the batch's.
    total = jnp.abs(x * observed).sum(-1, keepdims=True)
    default = jnp.ones_like(n[:1])
    if batch_default:
        default = total.sum(0, keepdims=True) / jnp.maximum(n.sum(0, keepdims=True), 1)
    return loc, jnp.maximum(jnp.where(n > 0, total / jnp.maximum(n, 1), default), LEAST_SCALE)


# --- losses


def point_error(cfg: TTMConfig, y_BCH, target_BCH, batch: Batch) -> jax.Array:
    """Mean of the config's error of forecasts over the observed values of the first steps of the
    target.
    """
    target = target_BCH[..., : y_BCH.shape[-1]]
    # The inner `where` keeps NaN out of the gradient, the outer one out of the sum.
    seen = ~jnp.isnan(target)
    gap = jnp.where(seen, y_BCH[..., : target.shape[-1]] - jnp.where(seen, target, 0.0), 0.0)
    if cfg.loss == "mse":
        error = jnp.square(gap)
    elif cfg.loss == "mae":
        error = jnp.abs(gap)
    elif cfg.loss == "pinball":
        error = jnp.maximum(-cfg.quantile * gap, (1 - cfg.quantile) * gap)
    else:
        near, d = jnp.abs(gap), cfg.huber_delta
        error = jnp.where(near <= d, 0.5 * jnp.square(gap), d * (near - 0.5 * d))
    return mean_observed(error, seen, batch)


def own_error(cfg: TTMConfig, y_BCH, q_BCHQ, target_BCH, batch: Batch) -> jax.Array:
    """The training loss of forecasts and of their quantiles [B, C, H, Q], where there are some, in
    their units.

    Without quantiles `point_error`; with them the pinball loss, mean over levels, plus
    `point_weight` times the mean absolute error of the forecast, plus `width_weight` times the mean
    distance between levels on both sides.
    """
    head = cfg.quantiles
    if head is None or q_BCHQ is None:
        return point_error(cfg, y_BCH, target_BCH, batch=batch)
    target = target_BCH[..., : y_BCH.shape[-1]]
    q_BCHQ = q_BCHQ[..., : target.shape[-1], :]
    seen = ~jnp.isnan(target)
    gap = jnp.where(seen[..., None], jnp.where(seen, target, 0.0)[..., None] - q_BCHQ, 0.0)
    levels = jnp.asarray(head.levels, jnp.float32).reshape((1,) * 3 + (-1,))
    error = jnp.maximum(levels * gap, (levels - 1) * gap).mean(axis=-1)
    if head.width_weight:
        pairs = len(head.levels) // 2 if head.width_mode == "wis" else 1
        width = (q_BCHQ[..., ::-1] - q_BCHQ)[..., :pairs].mean(axis=-1)
        error = error + head.width_weight * jnp.where(seen, width, 0.0)
    loss = mean_observed(error, seen, batch)
    if head.point_weight:
        absolute = dataclasses.replace(cfg, loss="mae")
        loss = loss + head.point_weight * point_error(absolute, y_BCH, target_BCH, batch=batch)
    return loss


class Forecasts(Model):
    """Forecasts around one pass (`apply`): what TTM and its decomposed form have in common."""

    @property
    @abc.abstractmethod
    def part(self) -> TTMConfig:
        """The config that says channels, horizon and the kind of output."""

    @abc.abstractmethod
    def apply(self, params: Tree, x_BCT, observed_BCT=None, **told: Any) -> Any:
        """One forward pass: forecasts [B, C', H] of the target channels, and the named steps.

        told: `future_BCH`, `freq_token`, `categories`, `key` and `train`, see `TTM.apply`.
        """

    @abc.abstractmethod
    def filled(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A context without gaps, and which of its steps were observed (1 or 0)."""

    @property
    def horizon(self) -> int:
        return self.part.filter_len or self.part.horizon

    @property
    def covariates(self) -> frozenset[str]:
        """Known ahead are exogenous channels, known in the past those that nobody forecasts."""
        return self.part.covariates

    def _forecast_for(self, params: Tree, batch: Batch, key, train: bool):
        """Forecasts and taps of a batch, from all that it brings."""
        cfg, steps, most = self.part, batch["target"].shape[-1], self.horizon
        # A filtered forecast is compared with as much of the target as it reaches.
        if cfg.filter_len is None:
            self._require_reach(steps)
        future = None
        if cfg.exogenous:
            future = jnp.pad(batch["target"], ((0, 0), (0, 0), (0, max(most - steps, 0))))
        x, observed = self.filled(batch["context"])
        more = {name: batch[name] for name in ("freq_token", "categories") if name in batch}
        return self.apply(params, x, observed, future_BCH=future, key=key, train=train, **more)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the forecast at the first steps of the target, of one forecast at most."""
        batch = all_channels(self.part, batch)
        y, _ = self._forecast_for(params, batch, key, train=train)
        return TTM(self.part).error(y, batch, "mse")

    def predict(
        self, params: Tree, context, horizon: int, key=None, *, future=None, categories=None
    ) -> Forecast:
        """Rolled out forecast by forecast in a window of fixed length, scaled anew at each step, as
        in the original.

        The forecast has the target channels alone, [B, C', H], where the config names some. Missing
        values and short contexts: see the module's docstring.

        Args:
          future: [B, C, horizon], of which the exogenous channels are read. categories: [B, V],
            else the config's.
        """
        check_context(context, horizon)
        x_BCL, observed_BCL = self.filled(jnp.asarray(context, jnp.float32))
        told = {"future_BCH": future, "categories": categories}
        return self.roll_out(params, x_BCL, observed_BCL, horizon=horizon, **told)

    def predict_with(
        self,
        params: Tree,
        context: jax.Array,
        horizon: int,
        *,
        past: jax.Array | None = None,
        known: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Forecast:
        """The covariates are further channels: those known ahead the exogenous ones, those of the
        past the ones that are neither forecast nor exogenous, each by rising number.
        """
        if past is None and known is None:
            return self.predict(params, context, horizon, key=key)
        unknown = jnp.full((*context.shape[:2], horizon), jnp.nan)
        every, future = with_covariate_channels(
            self.part, context, unknown, past_BKT=past, known_BKS=known
        )
        return self.predict(params, every, horizon, key=key, future=future)

    def roll_out(
        self,
        params: Tree,
        x_BCL,
        observed_BCL,
        horizon: int,
        *,
        future_BCH=None,
        freq_token=None,
        categories=None,
    ) -> Forecast:
        """`predict` of a window without gaps. Forecasts become the newest values of the window;
        those of channels that are neither target nor exogenous are the ones before the forecast
        channel mixer.
        """
        cfg, one = self.part, self.horizon
        steps = math.ceil(horizon / one)
        known, targets = np.array(cfg.exogenous, int), cfg.forecast_channels
        future_SBCH = self._future(future_BCH, horizon, steps) if cfg.exogenous else None

        def step(state, future):
            x, observed = state
            told = {"freq_token": freq_token, "categories": categories}
            y, taps = self.apply(params, x, observed, future_BCH=future, **told)
            # Channels that nobody forecasts go on with the forecast that the head gave them.
            new = y if targets is None else taps["all"].at[:, np.array(targets)].set(y)
            if cfg.exogenous:
                # What is not known of the future is filled as what is missing in the past.
                filling = TTM(cfg).filling(x, observed > 0)
                future = jnp.where(jnp.isnan(future), filling, future)
                new = new.at[:, known].set(future[:, known])
            length = x.shape[-1]
            x = jnp.concatenate([x, new], axis=-1)[..., -length:]
            observed = jnp.concatenate([observed, jnp.ones_like(new)], axis=-1)[..., -length:]
            return (x, observed), (y, taps.get("quantiles"))

        state = (x_BCL, observed_BCL)
        if steps == 1:
            _, (y, q) = step(state, None if future_SBCH is None else future_SBCH[0])
        else:
            _, (y_SBCH, q) = jax.lax.scan(step, state, future_SBCH, length=steps)
            y, q = end_to_end(y_SBCH), None if q is None else end_to_end(q)
        if q is None or cfg.quantiles is None:
            return Forecast(y[..., :horizon])
        return Forecast(y[..., :horizon], q[..., :horizon, :], levels=cfg.quantiles.levels)

    def _future(self, future_BCH, horizon: int, steps: int) -> jax.Array:
        """The future of the exogenous channels, of each forecast of a roll-out [S, B, C, H]; the
        last values repeated up to whole forecasts.
        """
        if future_BCH is None or future_BCH.shape[-1] < horizon:
            raise ValueError(
                f"the future of the exogenous channels {self.part.exogenous} must reach {horizon} "
                "steps"
            )
        length = steps * self.horizon
        missing = ((0, 0), (0, 0), (0, max(length - future_BCH.shape[-1], 0)))
        future_BCH = jnp.pad(future_BCH, missing, mode="edge")[..., :length]
        parts = future_BCH.reshape(*future_BCH.shape[:2], steps, self.horizon)
        return jnp.moveaxis(parts, 2, 0)


@dataclasses.dataclass(frozen=True)
class TTM(Forecasts):
    """TTM at one size. See the module docstring; `Model` documents the methods.

    branch: of a TTM that is a part of another model, where its parameters lie in that model's.
    """

    config: TTMConfig
    branch: str | None = None

    family = "ttm"
    published = PRESETS
    heads = ("head", "quantiles")
    tasks = ("forecasting",)
    licence = "Apache-2.0 (ibm-granite/granite-timeseries-ttm-r1, -r2, -r3)"
    shard_rules = (
        (
            r"(^|/)(embed|embed_\d+|raw_embed|adapter|freq_up|freq_down|linear|head|out)/kernel$",
            ("fsdp", None),
        ),
        (r"(^|/)quantiles/(pool|token|flat)/kernel$", ("fsdp", None)),
        # Too small to be worth dividing.
        (r"(^|/)(spectrum_(up|down|join)|quantiles/(filter|up|down))/kernel$", ()),
        (r"(^|/)quantiles/(filter|up|down)/bias$", ()),
        (r"(^|/)(freq_table|category_\d+|position|registers|spectrum_table)$", ()),
        (r"/(mean|var)$", ()),
        *shards.LAYERS,
        *shards.UP_BIAS,
        *shards.WHOLE,
    )
    stacks = (
        LayerStack("encoder", ("encoder",), levels="levels"),
        LayerStack("decoder/mixers", ("decoder",), levels="decoder_levels"),
        LayerStack("fcm/mixers", ("fcm_layers",)),
    )
    prunable = (
        Group.units("channel_mixer", "channel"),
        Group.units("patch_mixer", "patch"),
        Group.units("feature_mixer", "feature"),
    )

    @classmethod
    def small(cls) -> TTMConfig:
        return TTMConfig.of(
            context_len=32,
            horizon=8,
            patch_len=8,
            d_model=16,
            decoder_d_model=12,
            layers=1,
            decoder_layers=1,
            levels=2,
            n_channels=2,
            decoder_mix_channels=True,
            freq_vocab=10,
        )

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def fixed(self) -> str | None:
        """Running statistics of BatchNorm and the computed position table, where the config has
        them.
        """
        found = []
        if self.config.norm == "BatchNorm":
            found.append(r"/norm(_attn)?/(mean|var)$")
        if self.config.position == "sincos":
            found.append(r"(^|/)position$")
        return "|".join(found) or None

    @property
    def variates(self) -> Literal["independent", "joint"]:
        """Joint as soon as channels are mixed, or told apart by number."""
        cfg = self.config
        joint = (
            cfg.mix_channels
            or (cfg.decoder_mix_channels and cfg.decoder)
            or cfg.fcm
            or cfg.targets is not None
        )
        return "joint" if joint else "independent"

    @property
    def part(self) -> TTMConfig:
        """The config itself."""
        return self.config

    @property
    def eval_batch(self) -> int:
        # activations that stay in a CPU's cache: half as many again windows a second as in batches
        # of thousands
        return max(64 // (self.config.n_channels if self.variates == "joint" else 1), 1)

    @property
    def _network(self) -> TTMNet:
        return TTMNet(self.config, name=self.branch)

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases of linear
        layers, N(0, 1) for embeddings and registers; norms 1, 0. The random position table is N(0,
        1). With `post_init` that is N(0, 0.1^2), and the kernels of the convolutions in the head of
        quantiles are 1 / their size.
        """
        cfg = self.config
        c = cfg.n_channels
        patches = jax.ShapeDtypeStruct((cfg.window_patches, 1, c, cfg.patch_len), jnp.float32)
        past, future = (
            jax.ShapeDtypeStruct((1, c, t), jnp.float32) for t in (cfg.context_len, self.horizon)
        )
        freq, categories, bins = (
            jax.ShapeDtypeStruct(shape, jnp.int32)
            for shape in ((1,), (1, len(cfg.vocab)), (1, c, cfg.spectrum))
        )
        shapes = parameter_shapes(self._network, key, patches, past, future, freq, categories, bins)
        flat = flatten(shapes)

        def rule(path, shape):
            name = path.rpartition("/")[2]
            if path == "position":
                table = jnp.asarray(sincos(*shape))
                return (
                    Normal(0.1 if cfg.post_init else 1.0)
                    if cfg.position == "random"
                    else lambda *_: table
                )
            if name in ("freq_table", "registers", "spectrum_table") or name.startswith(
                "category_"
            ):
                return Normal(1.0)
            if cfg.post_init and path in ("quantiles/up/kernel", "quantiles/down/kernel"):
                return Constant(1.0)
            if cfg.post_init and path == "quantiles/filter/kernel":
                return Constant(1 / shape[0])
            linear = torch_linear(flat, path, heads=("/q", "/k", "/v", "quantiles/filter"))
            return linear or Constant(float(name in ("scale", "var")))

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        # granite-tsfm searches the rate anew for each data set; of 1e-3 and 1e-4 the latter had the
        # lower validation MSE on ETTh1, with the backbone frozen and with all weights trained
        source = (
            "granite-tsfm: backbone frozen, AdamW, one cycle of the learning rate; the rate by "
            "validation on ETTh1"
        )
        trainable = (
            r"^(decoder|head|fcm|quantiles)/" if self.config.decoder else r"^(head|fcm|quantiles)/"
        )
        return self._recipe(
            lr=1e-4,
            batch_size=64,
            epochs=10,
            schedule="one-cycle",
            source=source,
            weight_decay=0.01,
            trainable=trainable,
        )

    def for_series(
        self, params: Tree, *, n_variates: int, freq=None, key=None
    ) -> tuple["TTM", Tree]:
        """Set the frequency token; draw mixers over channels anew for another number
        of channels.
        """
        cfg = self.config
        if cfg.freq_vocab and (freq is not None or cfg.freq_token is None):
            cfg = dataclasses.replace(cfg, freq_token=frequency_token(freq, cfg.freq_vocab))
        # The targets of a table whose covariates are the other channels: nothing is missing.
        beside = cfg.covariates and n_variates == len(cfg.forecast_channels or ())
        if self.variates == "joint" and n_variates != cfg.n_channels and not beside:
            numbered = max((*(cfg.targets or ()), *cfg.exogenous, -1))
            if numbered >= n_variates:
                raise ValueError(
                    f"the model tells channels apart by number, up to {numbered}; there are "
                    f"{n_variates}"
                )
            # A mixer over channels has weights for each of them: its widths change with their
            # number, at the same share of hidden units.
            widths = {}
            for part in ("encoder", "decoder"):
                layers = []
                for dims in getattr(cfg, part):
                    hidden = self._hidden(dims.channel, n_variates, part == "decoder")
                    layers.append(dataclasses.replace(dims, channel=hidden))
                widths[part] = tuple(layers)
            cfg = dataclasses.replace(cfg, n_channels=n_variates, **widths)
            if cfg.fcm_layers:
                seen = len(cfg.forecast_channels or range(n_variates)) + len(cfg.exogenous)
                hidden = 2 * seen if seen > 1 else 0
                layers = [dataclasses.replace(dims, patch=hidden) for dims in cfg.fcm_layers]
                cfg = dataclasses.replace(cfg, fcm_layers=tuple(layers))
            if key is None:
                raise ValueError(
                    f"this TTM mixes {self.config.n_channels} channels, not {n_variates}: new "
                    f"mixers must be drawn and trained; give {self.config.n_channels} variates, or "
                    f"a key to draw them with: for_series(params, n_variates={n_variates}, "
                    "key=jax.random.key(0))"
                )
            # All that does not depend on the number of channels stays as it was trained.
            fresh = flatten(TTM(cfg).init(key))
            old = flatten(params)
            kept = {
                path: old[path] if path in old and old[path].shape == leaf.shape else leaf
                for path, leaf in fresh.items()
            }
            params = unflatten(kept)
        return (self if cfg == self.config else TTM(cfg)), params

    def _hidden(self, old: int, n_variates: int, decoder: bool) -> int:
        """Hidden width of a mixer over channels for another number of channels, in the same
        proportion.
        """
        extra = len(self.config.vocab) if decoder else 0
        return max(old * (n_variates + extra) // (self.config.n_channels + extra), 1) if old else 0

    # --- the network around its scaling

    def apply(
        self,
        params: Tree,
        x_BCT: jax.Array,
        observed_BCT=None,
        *,
        future_BCH=None,
        freq_token=None,
        categories=None,
        key=None,
        train=False,
    ):
        """One forward pass in the units of x: forecasts [B, C', H] of the target channels, and the
        named steps.

        Of more than `context_len` steps the newest are taken. Fewer are padded with zeros in front;
        where `observed_BCT` is given, these do not count in the scale.

        Args:
          observed_BCT: 1 or 0; what is 0 does not count in the scale, but x is still what the
            patches show there.
          future_BCH: known future, of which the exogenous channels are read; missing values are
            filled as in the past.
          freq_token: integers [B] or one, by default the config's. categories: [B, V], likewise.
        Returns: the forecasts (of a model with quantiles their medians), and taps; among them
          `all`, the forecasts of all channels [B, C, H] before they are mixed, and, of a model with
          quantiles, `quantiles` [B, C', H, Q], both in the units of x.
        """
        cfg, (b, c, _) = self.config, x_BCT.shape
        if cfg.covariates and c == len(cfg.forecast_channels or ()):
            raise ValueError(
                f"of the model's {cfg.n_channels} channels only the {c} that are forecast were "
                f"given: it takes covariates, {len(cfg.past_channels)} of the past and "
                f"{len(cfg.known_channels)} known ahead"
            )
        if self.variates == "joint" and c != cfg.n_channels:
            raise ValueError(
                f"the model mixes {cfg.n_channels} channels, got {c}; for_series makes it ready "
                "for another number"
            )
        if cfg.exogenous and future_BCH is None:
            raise ValueError(
                f"channels {cfg.exogenous} are exogenous: their future must be given (future=...)"
            )
        freq_B, categories_BV = self._told(b, freq_token, categories)

        # Scale the window, and cut it.
        x_BCL = self._padded(x_BCT).astype(jnp.float32)
        observed_BCL = jnp.ones_like(x_BCL)
        if observed_BCT is not None:
            observed_BCL = self._padded(observed_BCT).astype(jnp.float32)
        loc_BC1, scale_BC1 = location_scale(
            cfg.scaling, x_BCL, observed_BCL, batch_default=cfg.batch_default_scale
        )
        z_BCL = (x_BCL - loc_BC1) / scale_BC1
        if future_BCH is not None:
            future_BCH = future_BCH[..., : self.horizon].astype(jnp.float32)
            filling_BC1 = self.filling(x_BCL, observed_BCL > 0)
            future_BCH = jnp.where(jnp.isnan(future_BCH), filling_BC1, future_BCH)

        bins_BCS = self._bins(z_BCL) if cfg.spectrum else None
        inputs = (self._cut(z_BCL), x_BCL, future_BCH, freq_B, categories_BV, bins_BCS)
        all_BCH, y_BCH, q_BCHQ, taps = run_network(
            self._network, params, *inputs, key=key, train=train
        )

        # Back into the units of x.
        taps |= {"scaled": z_BCL, "loc": loc_BC1, "scale": scale_BC1}
        taps["all"] = all_BCH * scale_BC1 + loc_BC1
        scale_BC1, loc_BC1 = of_targets(cfg, scale_BC1), of_targets(cfg, loc_BC1)
        if q_BCHQ is not None:
            taps["quantiles"] = q_BCHQ * scale_BC1[..., None] + loc_BC1[..., None]
        return y_BCH * scale_BC1 + loc_BC1, taps

    def _told(self, rows: int, freq_token, categories) -> tuple[jax.Array, jax.Array]:
        """The frequency token [B] and the categories [B, V] of each row; by default the config's.

        Raises: ValueError where the model asks for them and nothing says them.
        """
        cfg, v = self.config, len(self.config.vocab)
        freq_token = cfg.freq_token if freq_token is None else freq_token
        if cfg.freq_vocab and freq_token is None:
            raise ValueError(
                "the model asks for the frequency of the series: for_series(params, freq=...) sets "
                "it"
            )
        categories = cfg.categories if categories is None else categories
        if v and categories is None:
            raise ValueError(
                f"the model asks for {v} static categories: categories=..., or of the config"
            )
        token = jnp.asarray(0 if freq_token is None else freq_token, jnp.int32)
        values = jnp.zeros((1, 0), jnp.int32)
        if v:
            values = jnp.asarray(categories, jnp.int32).reshape(-1, v)
        return jnp.broadcast_to(token, (rows,)), jnp.broadcast_to(values, (rows, v))

    def _cut(self, z_BCL: jax.Array) -> jax.Array:
        """Patches [P, B, C, K] of a window; what fills no patch is left out in front."""
        cfg, n = self.config, self.config.window_patches
        start = cfg.context_len - cfg.patch_len - cfg.patch_stride * (n - 1)
        if cfg.patch_stride == cfg.patch_len:
            p_BCPK = z_BCL[..., start:].reshape(*z_BCL.shape[:2], n, cfg.patch_len)
        else:
            first_P = start + np.arange(n) * cfg.patch_stride
            p_BCPK = z_BCL[..., first_P[:, None] + np.arange(cfg.patch_len)[None]]
        return jnp.moveaxis(p_BCPK, 2, 0)

    def _padded(self, x_BCT):
        """The newest `context_len` steps of x, after zeros where there are fewer."""
        t, wanted = x_BCT.shape[-1], self.config.context_len
        padded = jnp.pad(x_BCT, ((0, 0), (0, 0), (max(wanted - t, 0), 0)))
        return padded[..., padded.shape[-1] - wanted :]

    def _bins(self, z_BCL):
        """Numbers [B, C, S] of the strongest frequencies of the scaled window, the
        strongest first.
        """
        cfg = self.config
        size = jnp.abs(jnp.fft.rfft(jax.lax.stop_gradient(z_BCL), axis=-1))
        first = int(cfg.spectrum_skip_mean)
        _, bins_BCS = jax.lax.top_k(size[..., first:], cfg.spectrum)
        return bins_BCS + first

    def targets(self, batch: Batch) -> jax.Array:
        """The target [B, C', H'] of the channels that are forecast."""
        return of_targets(self.config, batch["target"])

    def error(self, y_BCH: jax.Array, batch: Batch, loss: Loss) -> jax.Array:
        """Mean error of forecasts [B, C', H] over all observed values of the target channels of
        `batch`.
        """
        return point_error(
            dataclasses.replace(self.config, loss=loss), y_BCH, self.targets(batch), batch=batch
        )

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """The config's loss of the forecast, in the units of the batch, over all observed values of
        the target.

        MSE, MAE, pinball or Huber; of a model with quantiles what `own_error` says. The target
        holds all channels; a batch may also bring `freq_token` and `categories`.
        """
        batch = all_channels(self.config, batch)
        y, taps = self._forecast_for(params, batch, key, train=train)
        target_BCH = self.targets(batch)
        return own_error(self.config, y, taps.get("quantiles"), target_BCH=target_BCH, batch=batch)

    def filled(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The newest `context_len` steps without gaps, and which of them were observed (1 or 0)."""
        x = context.astype(jnp.float32)
        keep = self.context_len
        short = max(keep - x.shape[-1], 0)
        x = jnp.pad(x, ((0, 0), (0, 0), (short, 0)), constant_values=jnp.nan)
        x = x[..., x.shape[-1] - keep :]
        seen = ~jnp.isnan(x)
        return jnp.where(seen, x, self.filling(x, seen)), seen.astype(jnp.float32)

    def filling(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        """The value in place of missing ones [B, C, 1]: 0, or the mean of the observed values."""
        if self.config.fill == "zero":
            return jnp.zeros_like(x[..., :1])
        count = jnp.maximum(seen.sum(-1, keepdims=True), 1)
        return jnp.where(seen, x, 0.0).sum(-1, keepdims=True) / count
