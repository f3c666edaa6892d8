"""The predictive distribution of the first Moirai families: a mixture of four kinds, in the scale
of the series.

Source: SalesforceAIResearch/uni2ts (commit 8d2a08d), distribution/*; the paper is arXiv 2402.02592,
section 3.1.2.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers.packed import SizedOut

PARAMETERS = {
    "student_t": ("df", "loc", "scale"),
    "normal_fixed": ("loc",),
    "negative_binomial": ("total_count", "logits"),
    "log_normal": ("loc", "scale"),
}
PUBLISHED = (
    "student_t",
    "normal_fixed",
    "negative_binomial",
    "log_normal",
)  # of every published checkpoint
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FLOOR = float(jnp.finfo(jnp.float32).eps)
_LARGE = 1e4  # Poisson rate above which float32 leaves nothing of the exact method
_TARGETS = {
    "student_t": "student_t.StudentTOutput",
    "normal_fixed": "normal.NormalFixedScaleOutput",
    "negative_binomial": "negative_binomial.NegativeBinomialOutput",
    "log_normal": "log_normal.LogNormalOutput",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Mixtures at every place [...]: y = z * scale + loc, z drawn of one of the components.

    log_weights: [..., M], normalised. parts: of each component its parameters [...]. loc, scale:
    [...]. kinds: what the components are, keys of `PARAMETERS`.
    """

    log_weights: jax.Array
    parts: tuple[dict[str, jax.Array], ...]
    loc: jax.Array
    scale: jax.Array
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def log_prob(self, y: jax.Array) -> jax.Array:
        """Log density [...] at y [...]. Components in whose support y is not are left out; the
        weights stay.
        """
        z = (y - self.loc) / self.scale
        logs = [_log_prob(kind, part, z) for kind, part in zip(self.kinds, self.parts, strict=True)]
        return jax.nn.logsumexp(self.log_weights + jnp.stack(logs, -1), axis=-1) - jnp.log(
            self.scale
        )

    def mean(self) -> jax.Array:
        """[...]"""
        means = [_mean(kind, part) for kind, part in zip(self.kinds, self.parts, strict=True)]
        return (jnp.exp(self.log_weights) * jnp.stack(means, -1)).sum(-1) * self.scale + self.loc

    def chosen(self, z: jax.Array, index: jax.Array) -> jax.Array:
        """Samples [n, ...] in the units of the series of draws z [n, ..., M] of every component, of
        which `index` [n, ...] says the one that was drawn.
        """
        return (
            jnp.take_along_axis(z, index[..., None], -1)[..., 0] * self.scale[None] + self.loc[None]
        )

    def sample(self, keys: jax.Array, n: int) -> jax.Array:
        """[B, ..., n] in the units of the series, the places being [B, ...]; keys: one for each
        row.
        """
        return jax.vmap(lambda key, row: jnp.moveaxis(_sample(key, row, n), 0, -1))(keys, self)


def read_published(output: Any) -> tuple[tuple[str, ...], float]:
    """Kinds and fixed scale of `distr_output` in a published config.json.

    Raises: ValueError for another distribution.
    """
    parts = output.get("components") if isinstance(output, Mapping) else None
    if not isinstance(parts, Sequence) or not str(output.get("_target_", "")).endswith(
        ".MixtureOutput"
    ):
        raise ValueError(f"distr_output is not a mixture: {str(output)[:200]}")
    kinds, scales = [], []
    for part in parts:
        target = str(part.get("_target_", "")) if isinstance(part, Mapping) else ""
        kind = next((kind for kind, name in _TARGETS.items() if target.endswith("." + name)), None)
        if kind is None:
            raise ValueError(f"distr_output has a component of another kind: {str(part)[:200]}")
        kinds.append(kind)
        scales += [float(part.get("scale", 1e-3))] if kind == "normal_fixed" else []
    if len(set(scales)) > 1 or not kinds or len(kinds) > 16 or not all(0 < s < 1e6 for s in scales):
        raise ValueError(
            f"distr_output: 1 to 16 components were expected, with one fixed scale > 0: {kinds}, "
            f"{scales}"
        )
    return tuple(kinds), (scales or [1e-3])[0]


def write_published(kinds: Sequence[str], fixed_scale: float) -> dict[str, Any]:
    """The inverse of `read_published`."""
    name = "uni2ts.distribution."
    fixed = {"scale": fixed_scale}
    parts = [
        {"_target_": name + _TARGETS[kind]} | (fixed if kind == "normal_fixed" else {})
        for kind in kinds
    ]
    return {"_target_": name + "mixture.MixtureOutput", "components": parts}


def series_nll(
    y: Mixture, truth_BCH: jax.Array, observed_BCH: jax.Array, weight_B=None
) -> jax.Array:
    """Negative log-likelihood, a scalar: the mean over observed steps, every variate of every row
    counting alike.

    y: mixtures at [B, C, H]. weight: of each row; rows of weight 0 count as absent.
    """
    nll_BC = jnp.where(observed_BCH, -y.log_prob(truth_BCH), 0.0).sum(-1) / jnp.maximum(
        observed_BCH.sum(-1), 1
    )
    weight = jnp.ones(nll_BC.shape[0]) if weight_B is None else weight_B
    counts_BC = observed_BCH.any(-1) * weight[:, None]
    return (nll_BC * counts_BC).sum() / jnp.maximum(counts_BC.sum(), jnp.finfo(jnp.float32).tiny)


def summary(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Median [...] and quantiles [..., Q] at `LEVELS` of samples [..., n]."""
    quantiles = jnp.moveaxis(jnp.quantile(samples, jnp.asarray(LEVELS), axis=-1), 0, -1)
    return quantiles[..., LEVELS.index(0.5)], quantiles


class MixtureHead(nn.Module):
    """Tokens [B, N, D] -> mixtures at [B, N, P] around `loc` and `scale` [B, N, 1], and the raw
    outputs by name.
    """

    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    fixed_scale: float

    @nn.compact
    def __call__(self, x_BND, patch, loc_BN1, scale_BN1):
        m, taps, parts = len(self.kinds), {}, []
        shape = (*x_BND.shape[:2], max(self.sizes))

        def raw(name, dim):
            taps[name] = SizedOut(self.sizes, dim, name=name)(x_BND, patch).astype(jnp.float32)
            return taps[name]

        logits_BNPM = jnp.swapaxes(raw("weights", m).reshape(*shape[:2], m, shape[2]), -1, -2)
        for i, kind in enumerate(self.kinds):
            part = {
                name: _domain(name, raw(f"component_{i}_{name}", 1)) for name in PARAMETERS[kind]
            }
            parts.append(
                part
                | ({"scale": jnp.full(shape, self.fixed_scale)} if kind == "normal_fixed" else {})
            )
        loc, scale = (jnp.broadcast_to(a, shape) for a in (loc_BN1, scale_BN1))
        return Mixture(
            jax.nn.log_softmax(logits_BNPM), tuple(parts), loc, scale=scale, kinds=self.kinds
        ), taps


def _domain(name: str, raw: jax.Array) -> jax.Array:
    if name == "df":
        return 2 + nn.softplus(raw)
    if name == "scale":
        return jnp.maximum(nn.softplus(raw), _FLOOR)
    return nn.softplus(raw) if name == "total_count" else raw


def _log_prob(kind: str, part: dict[str, jax.Array], z: jax.Array) -> jax.Array:
    lgamma = jax.lax.lgamma
    if kind == "student_t":
        df, x = part["df"], (z - part["loc"]) / part["scale"]
        norm = (
            jnp.log(part["scale"])
            + 0.5 * jnp.log(df * math.pi)
            + lgamma(0.5 * df)
            - lgamma(0.5 * (df + 1))
        )
        return -0.5 * (df + 1) * jnp.log1p(jnp.square(x) / df) - norm
    if kind == "normal_fixed":
        return _normal(z, part)
    if kind == "log_normal":
        inside = z > 0
        log_z = jnp.log(
            jnp.where(inside, z, 1.0)
        )  # a number in the support on both sides: gradients stay finite
        return jnp.where(inside, _normal(log_z, part) - log_z, -jnp.inf)
    inside, n, logit = z >= 0, part["total_count"], part["logits"]
    z = jnp.where(inside, z, 1.0)
    log_p = n * nn.log_sigmoid(-logit) + z * nn.log_sigmoid(logit)
    log_p = log_p - (lgamma(1 + z) + lgamma(n) - lgamma(1 + z + n)) - jnp.log(n + z)
    return jnp.where(inside, log_p, -jnp.inf)


def _normal(z: jax.Array, part: dict[str, jax.Array]) -> jax.Array:
    x = (z - part["loc"]) / part["scale"]
    return -0.5 * jnp.square(x) - jnp.log(part["scale"]) - 0.5 * math.log(2 * math.pi)


def _mean(kind: str, part: dict[str, jax.Array]) -> jax.Array:
    if kind == "negative_binomial":
        return part["total_count"] * jnp.exp(part["logits"])
    return (
        jnp.exp(part["loc"] + 0.5 * jnp.square(part["scale"]))
        if kind == "log_normal"
        else part["loc"]
    )


def _sample(key: jax.Array, mixture: Mixture, n: int) -> jax.Array:
    """n draws [n, ...] of one row's mixtures [...]. Only where a negative binomial was drawn do the
    loops behind it do any work.
    """
    shape = (n, *mixture.loc.shape)
    words = _words(key, (7, *shape))
    u_pick, u_noise, u_angle, u_radius, u_boost = _uniform(words[:5])
    below = jnp.cumsum(jnp.exp(mixture.log_weights), axis=-1)[None, ..., :-1]
    index = (u_pick[..., None] > below).sum(-1)
    normal, z = _normal_of(u_noise), jnp.zeros(shape)
    for i, (kind, part) in enumerate(zip(mixture.kinds, mixture.parts, strict=True)):
        part = {name: x[None] for name, x in part.items()}
        if (
            kind == "student_t"
        ):  # Bailey's polar method (Mathematics of Computation 62, 1994): exact, no rejection
            spread = jnp.sqrt(part["df"] * jnp.expm1(-2 / part["df"] * jnp.log(u_radius)))
            drawn = part["loc"] + part["scale"] * spread * jnp.cos(2 * math.pi * u_angle)
        elif kind == "negative_binomial":
            mine = index == i
            rate = _gamma(words[5], jnp.where(mine, part["total_count"], 1.0), u_boost) * jnp.exp(
                part["logits"]
            )
            drawn = _poisson(words[6], jnp.where(mine, rate, 0.0))
        else:
            drawn = part["loc"] + part["scale"] * normal
            drawn = jnp.exp(drawn) if kind == "log_normal" else drawn
        z = jnp.where(index == i, drawn, z)
    return z * mixture.scale[None] + mixture.loc[None]


def _words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random words [*shape]: a counter hashed with the two words of the key. Threefry's bits would
    do as well, at a fifth of the speed, and half of the time that a forecast takes to compile.
    """
    key_data = jax.random.key_data(key).reshape(-1)[-2:]
    counter = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _hash(_hash(key_data[0], counter) ^ key_data[1], 1)


def _uniform(bits: jax.Array) -> jax.Array:
    """Uniform numbers in (0, 1), both ends left out."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24 + 2.0**-25


def _hash(bits: jax.Array, i: jax.Array | int) -> jax.Array:
    """The i-th word after each random word: a counter through the finaliser of MurmurHash3, whose
    bits mix well.
    """
    x = bits + jnp.asarray(i, jnp.uint32) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _normal_of(u: jax.Array) -> jax.Array:
    """Standard normal numbers of uniform ones."""
    return math.sqrt(2) * jax.lax.erf_inv(2 * u - 1)


def _until_accepted(bits: jax.Array, attempt, done: jax.Array, rest: jax.Array) -> jax.Array:
    """`attempt(u1, u2)` -> (value, accepted), with new uniform numbers until every place is done;
    `rest` elsewhere.
    """

    def again(state):
        i, value, done = state
        new, good = attempt(_uniform(_hash(bits, 2 * i)), _uniform(_hash(bits, 2 * i + 1)))
        return i + 1, jnp.where(~done & good, new, value), done | good

    def busy(state):
        i, _, done = state
        return ~done.all() & (i < 200)

    return jax.lax.while_loop(busy, again, (1, rest, done))[1]


def _gamma(bits: jax.Array, a: jax.Array, u: jax.Array) -> jax.Array:
    """Gamma(a, 1) by Marsaglia and Tsang (2000), all places at once: on a CPU `jax.random.gamma`
    goes one by one.
    """
    small = a < 1
    d = jnp.where(small, a + 1, a) - 1 / 3
    c = 1 / jnp.sqrt(9 * d)

    def attempt(u1, u2):
        x = _normal_of(u1)
        v = (1 + c * x) ** 3
        bound = 0.5 * x * x + d - d * v + d * jnp.log(jnp.maximum(v, 1e-30))
        return v, (v > 0) & (jnp.log(u2) < bound)

    v = _until_accepted(bits, attempt, jnp.zeros(a.shape, bool), rest=jnp.ones(a.shape))
    return d * v * jnp.where(small, u ** (1 / a), 1.0)


def _poisson(bits: jax.Array, rate: jax.Array) -> jax.Array:
    """Poisson(rate) as floats: by inversion below 10, by Hoermann's PTRS (1993) above, and above
    `_LARGE`, where the skewness is below 1 %, a rounded normal number.
    """
    u, low = _uniform(bits), jnp.where(rate < 10, rate, 0.0)

    def search(state):
        k, p, below = state
        more = u > below
        k = jnp.where(more, k + 1, k)
        p = jnp.where(more, p * low / jnp.maximum(k, 1.0), p)
        return (
            k,
            p,
            jnp.where(more, below + jnp.maximum(p, 1e-9), below),
        )  # never stuck under a u beside 1

    start = (jnp.zeros_like(u), jnp.exp(-low), jnp.exp(-low))
    k_low = jax.lax.while_loop(lambda s: ((u > s[2]) & (s[0] < 100)).any(), search, start)[0]
    mid = jnp.where((rate >= 10) & (rate <= _LARGE), rate, 10.0)
    root, log_rate = jnp.sqrt(mid), jnp.log(mid)
    b = 0.931 + 2.53 * root
    a = -0.059 + 0.02483 * b
    log_alpha, quick = jnp.log(1.1239 + 1.1328 / (b - 3.4)), 0.9277 - 3.6224 / (b - 2)

    def attempt(u1, v):
        w = u1 - 0.5
        s = jnp.maximum(0.5 - jnp.abs(w), 1e-7)
        k = jnp.floor((2 * a / s + b) * w + mid + 0.43)
        possible = (k >= 0) & ~((s < 0.013) & (v > s))
        exact = jnp.log(v) + log_alpha - jnp.log(a / (s * s) + b)
        inside = exact <= k * log_rate - mid - jax.lax.lgamma(jnp.maximum(k, 0.0) + 1)
        return k, ((s >= 0.07) & (v <= quick)) | (possible & inside)

    done = (rate < 10) | (rate > _LARGE)
    k_mid = _until_accepted(bits, attempt, done, rest=jnp.zeros_like(rate))
    k_high = jnp.round(rate + jnp.sqrt(rate) * _normal_of(u))
    return jnp.where(rate < 10, k_low, jnp.where(rate > _LARGE, k_high, k_mid))
