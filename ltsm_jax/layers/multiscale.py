"""Several scales of a series at once, for multi-scale fine-tuning (MSFT) of encoders over packed
tokens.

A series is averaged over 2, 4, ... neighbouring steps, and each scale is cut into patches of one
size: the tokens of scale s are sample s + 1 of a row (`layers.packed`), so that attention stays
within a scale, with times of its own. What is new beside the pretrained encoder begins as nothing:
a linear layer for each scale after the patches' embedding, adapters of low rank for each scale on
queries, keys and values, and between attention and feed-forward layer a passage to the next scale,
in both directions. The forecasts of all scales, brought back to the steps of the series, are mixed
by learned weights, which begin equal.

Letters as in `layers.packed`; S scales, the finest first, R rank.

Source: Qiao et al., "Multi-Scale Finetuning for Encoder-based Time Series Foundation Models"
(NeurIPS 2025, arXiv 2506.14087). Where the passage lies within a layer and that padding has no part
in it are ours, and so is the forecast: the paper averages the scales' forecasts, here a sample path
is that of one scale, drawn by its weight, so that the mean is the paper's and the spread is not
narrowed.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import packed
from ltsm_jax.layers.initial import Constant, Distribution, Uniform
from ltsm_jax.layers.mixture import Mixture
from ltsm_jax.layers.packed import Series, Tokens

MOST_SCALES = 8


@dataclasses.dataclass(frozen=True)
class MultiScale:
    """How a series is seen at several scales.

    Attributes:
      further: scales beside the series itself, each of half as many steps as the one before.
      rank: of the adapters of a scale, which are not multiplied by anything.
    Raises: ValueError for numbers out of range.
    """

    further: int = 2
    rank: int = 16

    def __post_init__(self):
        if not 1 <= self.further <= MOST_SCALES:
            raise ValueError(f"1 to {MOST_SCALES} further scales can be added; got {self.further}")
        if not 1 <= self.rank <= 1024:
            raise ValueError(
                f"the rank of the adapters of a scale must lie between 1 and 1024; got {self.rank}"
            )

    @property
    def scales(self) -> int:
        """S, the series itself included."""
        return self.further + 1


def pooled(series: Series, factor: int, *, before: bool) -> Series:
    """Average the observed values of every `factor` steps: [B, C, T] -> [B, C, ceil(T / factor)].

    before: fill up in front, as a past needs it, and not behind. A step is observed where any of
    its own is.
    """
    x, observed = series
    missing = -x.shape[-1] % factor
    widths = [(0, 0), (0, 0), (missing, 0) if before else (0, missing)]
    shape = (*x.shape[:2], -1, factor)
    known = jnp.pad(observed, widths).reshape(shape)
    count = known.sum(-1)
    total = jnp.where(known, jnp.pad(x, widths).reshape(shape), 0.0).sum(-1)
    return total / jnp.maximum(count, 1), count > 0


@dataclasses.dataclass(frozen=True)
class ScaleLayout:
    """Where the tokens of each scale stand in a row: the pasts of all scales, then the futures of
    all scales.

    how: the scales. places: [N of the scale] of each scale. parents: of each scale but the
    coarsest, which token of the next one has the same steps, a number within that scale. first:
    place of the first future token. futures: how many of them each scale has.
    """

    how: MultiScale
    places: tuple[np.ndarray, ...]
    parents: tuple[np.ndarray, ...]
    first: int
    futures: tuple[int, ...]


def pack_scales(
    past: Series,
    horizon: int,
    patch: int,
    width: int,
    how: MultiScale,
    begun_BT: jax.Array | None = None,
) -> tuple[Tokens, ScaleLayout]:
    """Tokens of a forecast at every scale, see `packed.pack`, and where they stand."""
    pasts, futures = [], []
    steps: list[tuple[int, int]] = []
    n_variates, time_steps = past[0].shape[1:]
    if begun_BT is None:
        begun_BT = jnp.ones((past[0].shape[0], time_steps), bool)
    begun = jnp.zeros_like(begun_BT, jnp.float32)[:, None], begun_BT[:, None]
    for s in range(how.scales):
        factor = 2**s
        series = pooled(past, factor, before=True)
        # A coarse step has begun where any step within it has.
        _, begun_B1S = pooled(begun, factor, before=True)
        ahead = -(-horizon // factor)
        tokens = packed.pack(series, ahead, patch, width=width, begun_BT=begun_B1S[:, 0])
        tokens = dataclasses.replace(tokens, sample_id=tokens.sample_id * (s + 1))
        steps.append((-(-series[0].shape[-1] // patch), -(-ahead // patch)))
        cut = n_variates * steps[-1][0]
        pasts.append(jax.tree.map(lambda leaf, cut=cut: leaf[:, :cut], tokens))
        futures.append(jax.tree.map(lambda leaf, cut=cut: leaf[:, cut:], tokens))
    tokens = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *pasts, *futures)
    return tokens, _layout(how, n_variates, steps)


def _layout(how: MultiScale, n_variates: int, steps: Sequence[tuple[int, int]]) -> ScaleLayout:
    """Where tokens stand; steps: of each scale the tokens of one variate's past and future."""
    places: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    sizes = [n_variates * past for past, _ in steps]
    futures = [n_variates * ahead for _, ahead in steps]
    starts = np.cumsum([0, *sizes, *futures])
    for s in range(len(steps)):
        here = np.arange(sizes[s]) + starts[s]
        places.append(np.concatenate([here, np.arange(futures[s]) + starts[len(steps) + s]]))
    for (past, ahead), (coarse_past, coarse_ahead) in itertools.pairwise(steps):
        # Pasts end at the same step, futures begin there: counted from it, token i lies in token i
        # // 2.
        within = coarse_past - 1 - np.arange(past)[::-1] // 2
        of_past = np.arange(n_variates)[:, None] * coarse_past + within[None]
        of_future = np.arange(n_variates)[:, None] * coarse_ahead + np.arange(ahead)[None] // 2
        parents.append(
            np.concatenate([of_past.ravel(), n_variates * coarse_past + of_future.ravel()])
        )
    return ScaleLayout(
        how, tuple(places), tuple(parents), first=int(sum(sizes)), futures=tuple(futures)
    )


def scale_index(tokens: Tokens) -> jax.Array:
    """[B, N]: which scale a token is of; padding counts as of the finest."""
    return jnp.maximum(tokens.sample_id - 1, 0)


class ScaleLinear(nn.Module):
    """x + x W_s + b_s by the token's scale s: [B, N, D] -> [B, N, D]; kernel [S, D, D], bias [S,
    D].
    """

    how: MultiScale

    @nn.compact
    def __call__(self, x_BND, scale_BN):
        s, d = self.how.scales, x_BND.shape[-1]
        kernel_SDD = self.param("kernel", nn.initializers.zeros, (s, d, d)).astype(x_BND.dtype)
        bias_SD = self.param("bias", nn.initializers.zeros, (s, d)).astype(x_BND.dtype)
        y_BND = x_BND
        for i in range(s):
            change_BND = x_BND @ kernel_SDD[i] + bias_SD[i][None, None]
            y_BND = y_BND + jnp.where((scale_BN == i)[..., None], change_BND, 0)
        return y_BND


class ScaleLora(nn.Module):
    """x A_s B_s by the token's scale s: [B, N, D] -> [B, N, *outputs]; a [S, D, R], b [S, R,
    *outputs].
    """

    how: MultiScale
    outputs: tuple[int, ...]

    @nn.compact
    def __call__(self, x_BND, scale_BN):
        s, r, d = self.how.scales, self.how.rank, x_BND.shape[-1]
        a_SDR = self.param("a", nn.initializers.zeros, (s, d, r)).astype(x_BND.dtype)
        b = self.param("b", nn.initializers.zeros, (s, r, *self.outputs)).astype(x_BND.dtype)
        # Of the thin product of all scales only a token's own part is kept.
        thin_BNSR = jnp.einsum("BND,SDR->BNSR", x_BND, a_SDR)
        own_BNS = jax.nn.one_hot(scale_BN, s, dtype=x_BND.dtype)
        y = (thin_BNSR * own_BNS[..., None]).reshape(*scale_BN.shape, s * r) @ b.reshape(s * r, -1)
        return y.reshape(*scale_BN.shape, *self.outputs)


class CrossScale(nn.Module):
    """Passages between neighbouring scales [B, N, D] -> [B, N, D]: the mean of two branches.

    From coarse to fine, each token gets a linear map of the one with the same steps in the next
    coarser scale, which has got its own before. From fine to coarse, each token gets the mean of
    such maps of its tokens in the finer scale. kernels [S - 1, D, D], biases [S - 1, D]. Padding
    gives nothing.
    """

    how: MultiScale

    @nn.compact
    def __call__(self, x_BND, real_BN, layout: ScaleLayout):
        n, d = self.how.further, x_BND.shape[-1]

        def passage(name):
            kernel = self.param(f"{name}_kernel", nn.initializers.zeros, (n, d, d)).astype(
                x_BND.dtype
            )
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (n, d)).astype(x_BND.dtype)
            return lambda i, y_BND: y_BND @ kernel[i] + bias[i][None, None]

        to_fine, to_coarse = passage("to_fine"), passage("to_coarse")
        scales = [x_BND[:, place] for place in layout.places]
        real = [real_BN[:, place].astype(x_BND.dtype) for place in layout.places]

        finer = list(scales)
        for i in reversed(range(n)):
            given_BND = to_fine(i, finer[i + 1]) * real[i + 1][..., None]
            finer[i] = scales[i] + given_BND[:, layout.parents[i]]
        coarser = list(scales)
        for i in range(n):
            child_SN = np.arange(coarser[i + 1].shape[1])[:, None] == layout.parents[i][None]
            share_BSN = child_SN[None].astype(x_BND.dtype) * real[i][:, None]
            share_BSN = share_BSN / jnp.maximum(share_BSN.sum(-1, keepdims=True), 1)
            coarser[i + 1] = scales[i + 1] + jnp.einsum(
                "BSN,BND->BSD", share_BSN, to_coarse(i, coarser[i])
            )

        fused_BND = jnp.concatenate(
            [(a + b) / 2 for a, b in zip(finer, coarser, strict=True)], axis=1
        )
        return fused_BND[:, np.argsort(np.concatenate(layout.places))]


def distribution(path: str, shape: tuple[int, ...]) -> Distribution | None:
    """Fresh values of what is new: all that adds to the pretrained encoder adds nothing at first.

    None for parameters that are not of this module.
    """
    layer, _, leaf = path.rpartition("/")
    if layer.rpartition("/")[2].startswith("lora_"):
        return Uniform(shape[1] ** -0.5) if leaf == "a" else Constant(0.0)
    new = path == "scale_weights" or layer == "scale_in" or layer.endswith("/across")
    return Constant(0.0) if new else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleMixture:
    """Forecasts of all scales, mixed; used as a `Mixture` is.

    weights: [B, S], of the scales, sums to 1. parts: of each scale mixtures at [B, C, H].
    """

    weights: jax.Array
    parts: tuple[Mixture, ...]

    def log_prob(self, y: jax.Array) -> jax.Array:
        """Log density [B, C, H] at y [B, C, H]."""
        logs = jnp.stack([part.log_prob(y) for part in self.parts], -1)
        return jax.nn.logsumexp(jnp.log(self.weights)[..., None, None, :] + logs, axis=-1)

    def mean(self) -> jax.Array:
        """[B, C, H], the weighted average of the scales' means."""
        means = jnp.stack([part.mean() for part in self.parts], -1)
        return (self.weights[..., None, None, :] * means).sum(-1)

    def sample(self, keys: jax.Array, n: int) -> jax.Array:
        """[B, C, H, n]; keys: one for each row. Every step of a path is of one scale."""
        own = jax.vmap(lambda key: jax.random.split(key, len(self.parts) + 1))(keys)
        paths = jnp.stack([part.sample(own[:, i + 1], n) for i, part in enumerate(self.parts)], -1)
        log_weights = jnp.log(self.weights)
        chosen = jax.vmap(lambda key, logs: jax.random.categorical(key, logs, shape=(n,)))(
            own[:, 0], log_weights
        )
        return jnp.take_along_axis(paths, chosen[:, None, None, :, None], axis=-1)[..., 0]


def mixed(weights: jax.Array, parts: Sequence[Mixture], horizon: int) -> ScaleMixture:
    """Mix the forecasts of all scales, each of its own steps; a coarse step stands for each of
    those it is made of.

    weights: logits [S].
    """
    at_steps = []
    for s, part in enumerate(parts):
        at_steps.append(
            jax.tree.map(lambda leaf, s=s: jnp.repeat(leaf, 2**s, axis=2)[:, :, :horizon], part)
        )
    rows = parts[0].loc.shape[0]
    shares = jnp.broadcast_to(jax.nn.softmax(weights.astype(jnp.float32))[None], (rows, len(parts)))
    return ScaleMixture(shares, tuple(at_steps))
