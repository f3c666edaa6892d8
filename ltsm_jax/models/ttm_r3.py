"""TTM revision 3, decomposed: one TTM forecasts the trend of a series, another what is left of it.

Follows ibm-granite/granite-tsfm (release 0.3.11), TinyTimeMixerForDecomposedPrediction. The plain
models of r3 are of the family `ttm`, whose docstring says what r3 added to it.

The whole context is scaled and smoothed (`smooth`, a kernel average in which outliers count less).
The first TTM is given the scaled context itself and learns to forecast its smooth part; the second
is given the last steps of the difference. Points add up; quantiles add up too, or as the
distances to the median of two independent forecasts do.

Departures from the original:
- A missing target does not count, neither in the loss nor in the smoothed target. The original
  ignores `future_observed_mask` here.
- Missing values (NaN) are unobserved for the scale and stand as 0 in the context, as in `ttm`.
- A context of less than 5 steps gets zeros in front once it is scaled. The original refuses less
  than 3; of 3 and 4 its smooth part is decided by rounding.
- Roll-outs: as in `ttm`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers.network import nested
from ltsm_jax.models import ttm
from ltsm_jax.models.configs import field_problems, refuse
from ltsm_jax.models.family import Batch, Recipe
from ltsm_jax.models.groups import LayerStack
from ltsm_jax.models.ttm import TTM, Forecasts, QuantileConfig, TTMConfig
from ltsm_jax.trees import Tree

PARTS = ("trend", "residual")
LEAST_STEPS = 5  # of what is smoothed
LEAST_WEIGHT = 1e-8  # beside sums of weights
DIFFERENCE_WEIGHT = 0.1  # of the error of the trend's steps, beside quantiles
# What the two parts must have in common, because the file says it once.
COMMON = (
    "horizon",
    "n_channels",
    "targets",
    "exogenous",
    "filter_len",
    "vocab",
    "categories",
    "freq_vocab",
    "freq_token",
    "loss",
    "quantile",
    "huber_delta",
    "quantiles",
    "fill",
)


@dataclasses.dataclass(frozen=True)
class TTMR3Config:
    """Two TTMs, and what joins them.

    trend, residual: the parts, without a scaling of their own. scaling: of the whole context.
    add_variances: quantiles of the sum as of independent parts; else the parts' quantiles add up.
    joint_weight, trend_weight, residual_weight: of the three errors in the training loss.
    batch_default_scale: as in `ttm.TTMConfig`.
    """

    trend: TTMConfig
    residual: TTMConfig
    scaling: Literal["std", "mean"] | None = "std"
    add_variances: bool = False
    joint_weight: float = 1.0
    trend_weight: float = 1.0
    residual_weight: float = 1.0
    batch_default_scale: bool = False

    def __post_init__(self):
        problems = field_problems(self)
        for name in PARTS:
            if getattr(self, name).scaling is not None:
                problems.append(
                    f"{name}: the context is scaled before it is taken apart: scaling=None"
                )
        odd = [name for name in COMMON if getattr(self.trend, name) != getattr(self.residual, name)]
        if odd:
            problems.append(f"trend and residual must have the same {', '.join(odd)}")
        if min(self.joint_weight, self.trend_weight, self.residual_weight) < 0:
            problems.append("the weights of the losses must not be negative")
        refuse(self, problems)


def _published(
    *, context_len: int, horizon: int, residual_len: int, trend: dict[str, Any], **sizes: Any
) -> TTMR3Config:
    """A decomposed model as the originals are: what `trend` does not say is as in `sizes`."""
    head = QuantileConfig(
        median="mean", condition="flatten", join="concat", token_width=4, point_weight=2.0
    )
    common: dict[str, Any] = {
        "horizon": horizon,
        "scaling": None,
        "expansion": 3,
        "multi_scale": True,
        "levels": 0,
        "loss": "mae",
        "quantiles": head,
    }
    return TTMR3Config(
        trend=TTMConfig.of(context_len=context_len, **(common | sizes | trend)),
        residual=TTMConfig.of(context_len=residual_len, **(common | sizes)),
        add_variances=True,
    )


PRESETS = {
    "ibm-granite/granite-timeseries-ttm-r3@52-16-dec-52-r3": _published(
        context_len=52,
        horizon=16,
        residual_len=52,
        patch_len=4,
        d_model=128,
        decoder_d_model=64,
        layers=10,
        decoder_layers=4,
        registers=2,
        trend={
            "patch_len": 13,
            "d_model": 26,
            "decoder_d_model": 26,
            "decoder_layers": 2,
            "registers": 1,
        },
    )
}


def smooth(y_BCT: jax.Array, seen_BCT: jax.Array | None = None) -> jax.Array:
    """Smooth series [B, C, T], T >= 5, so that single outliers move the result little.

    A Gaussian average over 0.15 T steps, whose mean is then made that of the series. Twice more
    with weights a = (1 - (r / 6m)^2)^2, 0 where |r| > 6m, of the distances r to the result, less
    their median, and m the median of |r|.

    seen_BCT: 1 or 0: values that do not exist, of which all averages are taken without.
    Source: `robust_lowess_like` of granite-tsfm.
    """
    t = y_BCT.shape[-1]
    span = max(5, round(0.15 * t))
    span = min(span + (span % 2 == 0), t if t % 2 else t - 1)
    offsets = np.arange(span) - (span - 1) / 2
    kernel = np.exp(-((offsets / (0.25 * span)) ** 2) / 2)
    filter_2SS = _toeplitz(kernel / kernel.sum())
    seen_BCT = jnp.ones_like(y_BCT) if seen_BCT is None else seen_BCT
    total = jnp.maximum(seen_BCT.sum(axis=-1, keepdims=True), 1.0)

    def averaged(x_BCT):
        """Average the neighbours of each step, mirrored at the ends."""
        ends = ((0, 0), (0, 0), (span // 2, span // 2))
        return _filtered(jnp.pad(x_BCT, ends, mode="reflect"), filter_2SS)[..., :t]

    def weighted(weights):
        trend = averaged(y_BCT * weights) / (averaged(weights) + LEAST_WEIGHT)
        gap = ((y_BCT - trend) * seen_BCT).sum(axis=-1, keepdims=True)
        return trend + gap / total

    # Values far from the result, measured by the typical distance, weigh little the next time.
    trend = weighted(seen_BCT)
    for _ in range(2):
        distance = y_BCT - trend
        distance = distance - _lower_median(distance, seen_BCT)
        typical = _lower_median(jnp.abs(distance), seen_BCT) + LEAST_WEIGHT
        share = jnp.minimum(jnp.square(distance / (6 * typical)), 1.0)
        trend = weighted(seen_BCT * jnp.square(1 - share))
    return trend


def _toeplitz(kernel_S: np.ndarray) -> jax.Array:
    """The matrix [2S, S] that filters S neighbouring steps, given those and the S steps after."""
    span = len(kernel_S)
    found = np.zeros((2 * span, span), np.float32)
    for step in range(span):
        found[step : step + span, step] = kernel_S
    return jnp.asarray(found)


def _filtered(x_BCT: jax.Array, filter_2SS: jax.Array) -> jax.Array:
    """Filter each step with the S - 1 after it: [B, C, T] -> [B, C, at least T - S + 1].

    By a product of matrices, as XLA's convolutions of one channel are slow on CPUs.
    """
    span = filter_2SS.shape[1]
    pieces = 1 + -(-(x_BCT.shape[-1] - span + 1) // span)
    missing = max(pieces * span - x_BCT.shape[-1], 0)
    x_BCT = jnp.pad(x_BCT, ((0, 0), (0, 0), (0, missing)))[..., : pieces * span]
    x_BCNS = x_BCT.reshape(*x_BCT.shape[:2], pieces, span)
    pairs = jnp.concatenate([x_BCNS[:, :, :-1], x_BCNS[:, :, 1:]], axis=-1)
    y_RS = jnp.matmul(pairs.reshape(-1, 2 * span), filter_2SS, precision=jax.lax.Precision.HIGHEST)
    return y_RS.reshape(*x_BCT.shape[:2], -1)


def _lower_median(x_BCT: jax.Array, seen_BCT: jax.Array) -> jax.Array:
    """Median [B, C, 1] of what is seen, the lower of two middle values; 0 where nothing is."""
    count_BC1 = seen_BCT.sum(axis=-1, keepdims=True).astype(jnp.int32)
    middle = _smallest(jnp.where(seen_BCT > 0, x_BCT, jnp.inf), jnp.maximum(count_BC1 - 1, 0) // 2)
    return jnp.where(count_BC1 > 0, middle, 0.0)


def _smallest(x_BCT: jax.Array, rank_BC1: jax.Array) -> jax.Array:
    """The value [B, C, 1] of float32 x that so many others are smaller than; not of NaN.

    Finds its 32 bits one after the other by counting what is smaller, as XLA sorts slowly on CPUs.
    """
    order_BCT = _as_ordered_bits(jax.lax.bitcast_convert_type(x_BCT, jnp.int32))

    def take_bit(i, found_BC1):
        bit = jnp.left_shift(jnp.int32(1), 31 - i)  # the first is the sign: it wraps to 0
        larger_BC1 = found_BC1 + bit
        smaller = (order_BCT < larger_BC1).sum(axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(smaller <= rank_BC1, larger_BC1, found_BC1)

    least = jnp.full(rank_BC1.shape, jnp.iinfo(jnp.int32).min)
    found = _as_ordered_bits(jax.lax.fori_loop(0, 32, take_bit, least))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _as_ordered_bits(bits: jax.Array) -> jax.Array:
    """Integers in the order of the floats with these bits; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _stacks_of(part: str) -> tuple[LayerStack, ...]:
    """The stacks of a part, under its name."""
    found = []
    for stack in TTM.stacks:
        path, records = f"{part}/{stack.path}", (part, *stack.records)
        found.append(dataclasses.replace(stack, path=path, records=records))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class TTMR3(Forecasts):
    """A decomposed TTM at one size. See the module docstring; `Model` documents the methods."""

    config: TTMR3Config

    family = "ttm_r3"
    published = PRESETS
    heads = ("trend/head", "trend/quantiles", "residual/head", "residual/quantiles")
    tasks = ("forecasting",)
    licence = "Apache-2.0 (ibm-granite/granite-timeseries-ttm-r3)"
    shard_rules = TTM.shard_rules
    stacks = (*_stacks_of("trend"), *_stacks_of("residual"))
    prunable = TTM.prunable

    @classmethod
    def small(cls) -> TTMR3Config:
        head = QuantileConfig(
            levels=(0.1, 0.5, 0.9),
            hidden=3,
            median="mean",
            condition="flatten",
            join="concat",
            token_width=2,
            point_weight=2.0,
        )
        common: dict[str, Any] = {
            "horizon": 8,
            "scaling": None,
            "layers": 1,
            "decoder_layers": 1,
            "registers": 1,
            "multi_scale": True,
            "loss": "mae",
            "quantiles": head,
        }
        trend: dict[str, Any] = {"patch_len": 12, "d_model": 6, "decoder_d_model": 6, "levels": 0}
        residual: dict[str, Any] = {
            "patch_len": 8,
            "d_model": 12,
            "decoder_d_model": 8,
            "levels": 2,
            "spectrum": 2,
        }
        return TTMR3Config(
            trend=TTMConfig.of(context_len=32, **(common | trend)),
            residual=TTMConfig.of(context_len=24, **(common | residual)),
            add_variances=True,
        )

    @property
    def trend(self) -> TTM:
        """The TTM that forecasts the trend."""
        return TTM(self.config.trend, branch="trend")

    @property
    def residual(self) -> TTM:
        """The TTM that forecasts what is left."""
        return TTM(self.config.residual, branch="residual")

    @property
    def fixed(self) -> str | None:
        """The leaves that either part never trains."""
        found = {part.fixed for _, part in self._parts() if part.fixed}
        return "|".join(sorted(found)) or None

    @property
    def variates(self) -> Literal["independent", "joint"]:
        joint = any(part.variates == "joint" for _, part in self._parts())
        return "joint" if joint else "independent"

    @property
    def context_len(self) -> int:
        return self.config.trend.context_len

    @property
    def part(self) -> TTMConfig:
        """That of the trend: the residual's has the same channels and horizon."""
        return self.config.trend

    @property
    def eval_batch(self) -> int:
        return min(part.eval_batch for _, part in self._parts())

    def _parts(self) -> tuple[tuple[str, TTM], tuple[str, TTM]]:
        return ("trend", self.trend), ("residual", self.residual)

    def init(self, key: jax.Array) -> Tree:
        """Both parts as `TTM.init` draws them."""
        params = {}
        for one, (name, part) in zip(jax.random.split(key), self._parts(), strict=True):
            params[name] = part.init(one)
        return params

    def recipe(self) -> Recipe:
        # The authors train the trend alone, then the residual alone, then both with weights 0.1,
        # 0.1 and 1 (the config's); how they fine-tune a published model they do not say.
        plain = self.trend.recipe()
        return dataclasses.replace(
            plain,
            horizon=self.horizon,
            source=f"as r1 and r2, nothing is published for r3; {plain.source}",
            trainable=r"^(trend|residual)/(decoder|head|fcm|quantiles)/",
        )

    def for_series(
        self, params: Tree, *, n_variates: int, freq=None, key=None
    ) -> tuple["TTMR3", Tree]:
        """Both parts made ready, see `TTM.for_series`."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        ready, configs = {}, {}
        for one, (name, part) in zip(keys, self._parts(), strict=True):
            model, ready[name] = part.for_series(
                params[name], n_variates=n_variates, freq=freq, key=one
            )
            configs[name] = model.config
        config = dataclasses.replace(self.config, **configs)
        if config == self.config and all(ready[name] is params[name] for name in PARTS):
            return self, params
        return TTMR3(config), ready

    # --- the two networks around scaling and smoothing

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
        """Forecast [B, C', H] the target channels once, in the units of x, and give the named
        steps.

        Every step that is given counts in the scale and in the smooth part; the parts then take the
        newest steps, as many as they know, or fill up with zeros. Arguments as of `TTM.apply`; the
        future of exogenous channels reaches the parts as it is, not scaled, as in the original.

        Returns: the forecasts, and taps: `quantiles` [B, C', H, Q] and `all`, as of `TTM.apply`;
          `trend_input` [B, C, T] and `residual_input`, scaled; those of the parts, `trend/...` and
          `residual/...`, and their forecasts `trend` and `residual`, in scaled units too.
        """
        cfg = self.config
        x_BCT = x_BCT.astype(jnp.float32)
        observed = (
            jnp.ones_like(x_BCT) if observed_BCT is None else observed_BCT.astype(jnp.float32)
        )
        loc_BC1, scale_BC1 = ttm.location_scale(
            cfg.scaling, x_BCT, observed, batch_default=cfg.batch_default_scale
        )
        z_BCT = (x_BCT - loc_BC1) / scale_BC1
        # Smoothing mirrors a few steps at either end, which a shorter series lacks.
        few = max(LEAST_STEPS - z_BCT.shape[-1], 0)
        z_BCT = jnp.pad(z_BCT, ((0, 0), (0, 0), (few, 0)))
        smooth_BCT = smooth(jax.lax.stop_gradient(z_BCT))
        rest_BCL = (z_BCT - smooth_BCT)[..., -cfg.residual.context_len :]
        taps = {
            "scaled": z_BCT,
            "loc": loc_BC1,
            "scale": scale_BC1,
            "trend_input": smooth_BCT,
            "residual_input": rest_BCL,
        }

        points, quantiles, every = [], [], []
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        for (name, part), given, one in zip(self._parts(), (z_BCT, rest_BCL), keys, strict=True):
            y_BCH, inner = part.apply(
                params[name],
                given,
                future_BCH=future_BCH,
                freq_token=freq_token,
                categories=categories,
                key=one,
                train=train,
            )
            points.append(y_BCH)
            quantiles.append(inner.get("quantiles"))
            every.append(inner["all"])
            taps |= nested(name, inner, y_BCH)

        taps["all"] = (every[0] + every[1]) * scale_BC1 + loc_BC1
        loc_BC1, scale_BC1 = (ttm.of_targets(cfg.trend, x) for x in (loc_BC1, scale_BC1))
        joint_BCH = taps["joint"] = points[0] + points[1]
        if cfg.trend.quantiles is not None:
            joint_BCHQ = taps["joint_quantiles"] = self._joined(*quantiles)
            taps["quantiles"] = joint_BCHQ * scale_BC1[..., None] + loc_BC1[..., None]
        return joint_BCH * scale_BC1 + loc_BC1, taps

    def _joined(self, trend_BCHQ, residual_BCHQ):
        """Quantiles of the sum of the parts."""
        both = trend_BCHQ + residual_BCHQ
        if not self.config.add_variances:
            return both
        middle = both.shape[-1] // 2

        def distance(q_BCHQ):
            return q_BCHQ - q_BCHQ[..., middle : middle + 1]

        # Independent parts: the squares of their distances from the median add up, not they.
        of_trend, of_residual = distance(trend_BCHQ), distance(residual_BCHQ)
        spread = jnp.sqrt(jnp.square(of_trend) + jnp.square(of_residual) + LEAST_WEIGHT)
        return both[..., middle : middle + 1] + jnp.sign(of_trend + of_residual) * spread

    def targets(self, taps: Mapping[str, jax.Array], batch: Batch) -> tuple[jax.Array, ...]:
        """Take the target apart: trend, residual and all of it, [B, C', H] each, scaled.

        What is missing of the target is NaN in all of them. The trend is what smoothing the context
        and the target together makes of the latter.
        """
        target_BCH = batch["target"][..., : self.horizon].astype(jnp.float32)
        missing = self.horizon - target_BCH.shape[-1]
        target_BCH = jnp.pad(target_BCH, ((0, 0), (0, 0), (0, missing)), constant_values=jnp.nan)
        scaled_BCH = (target_BCH - taps["loc"]) / taps["scale"]
        seen = ~jnp.isnan(scaled_BCH)
        z_BCT = taps["scaled"]
        whole_BCT = jnp.concatenate([z_BCT, jnp.where(seen, scaled_BCH, 0.0)], axis=-1)
        weights = jnp.concatenate([jnp.ones_like(z_BCT), seen.astype(jnp.float32)], axis=-1)
        # Data to learn from: no gradient is taken through the choice of medians and quotients.
        trend_BCH = smooth(jax.lax.stop_gradient(whole_BCT), weights)[..., -self.horizon :]
        trend_BCH = jnp.where(seen, trend_BCH, jnp.nan)
        found = (trend_BCH, scaled_BCH - trend_BCH, scaled_BCH)
        return tuple(ttm.of_targets(self.config.trend, x) for x in found)

    def errors(self, taps: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        """The errors of the sum ("joint") and of the parts, in scaled units, see `ttm.own_error`.

        Beside that of the trend stands the error of the steps that it makes.
        """
        part = self.config.trend
        trend, residual, joint = self.targets(taps, batch)
        found = {
            "joint": ttm.own_error(
                part, taps["joint"], taps.get("joint_quantiles"), target_BCH=joint, batch=batch
            ),
            "trend": ttm.own_error(
                part, taps["trend"], taps.get("trend/quantiles"), target_BCH=trend, batch=batch
            ),
            "residual": ttm.own_error(
                part,
                taps["residual"],
                taps.get("residual/quantiles"),
                target_BCH=residual,
                batch=batch,
            ),
        }
        moves, wanted = jnp.diff(taps["trend"], axis=-1), jnp.diff(trend, axis=-1)
        by = part if part.quantiles is None else dataclasses.replace(part, loss="mae")
        found["trend"] += DIFFERENCE_WEIGHT * ttm.point_error(by, moves, wanted, batch=batch)
        return found

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """The weighted sum of `errors`, in scaled units, over all observed values of the target."""
        batch = ttm.all_channels(self.config.trend, batch)
        _, taps = self._forecast_for(params, batch, key, train=train)
        return self.weighted(self.errors(taps, batch))

    def weighted(self, errors: Mapping[str, jax.Array]) -> jax.Array:
        """The training loss from its three parts."""
        cfg = self.config
        return (
            cfg.joint_weight * errors["joint"]
            + cfg.trend_weight * errors["trend"]
            + cfg.residual_weight * errors["residual"]
        )

    def filled(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The whole context without gaps, however long; and which of its steps were observed."""
        x = context.astype(jnp.float32)
        seen = ~jnp.isnan(x)
        return jnp.where(seen, x, self.trend.filling(x, seen)), seen.astype(jnp.float32)
