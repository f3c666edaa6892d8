"""Packed tokens of the Moirai families: samples and variates in one row, told apart by ids, and
what works on them.

A row is a sequence of tokens. A token is a patch of one variate of one sample: its first `patch`
values are used, the rest of its width is zero. Letters: B rows, N tokens (S on the key side of
attention), P token width, C variates of a row, T time steps, D model width, H heads, K head width,
F feed-forward width; Z is the number of patch sizes.

Source: Woo et al., "Unified Training of Universal Time Series Forecasting Transformers" (ICML 2024,
arXiv 2402.02592), as SalesforceAIResearch/uni2ts (commit 8d2a08d) runs it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.dims import HeadDims
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, Distribution, Normal, Uniform, draw, torch_linear
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.rope import rotary
from ltsm_jax.trees import Tree, flatten, unflatten

NORM_EPS = 1e-5
SCALE_EPS = 1e-5  # inside the root, added to the variance
_SIZED = re.compile(r"^(embed|residual)$|^head/")  # layers with weights for each patch size
Series = tuple[
    jax.Array, jax.Array
]  # values [B, C, T] (0 where unknown) and which of them are observed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Packed tokens.

    target: [B, N, P] values, never NaN. observed: [B, N, P] bool. sample_id: [B, N], 0 = padding,
    1.. = which sample. time_id: [B, N], the patch's place in its sample. variate_id: [B, N].
    predicted: [B, N] bool, what is to be forecast: kept out of the scaler.
    """

    target: jax.Array
    observed: jax.Array
    sample_id: jax.Array
    time_id: jax.Array
    variate_id: jax.Array
    predicted: jax.Array

    @property
    def same_sample(self) -> jax.Array:
        """[B, N, S]"""
        return self.sample_id[:, :, None] == self.sample_id[:, None, :]

    @property
    def same_variate(self) -> jax.Array:
        """[B, N, S], whatever the sample."""
        return self.variate_id[:, :, None] == self.variate_id[:, None, :]

    @property
    def causal(self) -> jax.Array:
        """[B, N, S]: of the same sample, and the key's time is not after the query's."""
        return self.same_sample & (self.time_id[:, :, None] >= self.time_id[:, None, :])


def group_sum(together_BNS: jax.Array, x_BS: jax.Array) -> jax.Array:
    """[B, N]: the sum of x over the tokens that go together with each, exact on every device."""
    return jnp.einsum(
        "BNS,BS->BN", together_BNS.astype(x_BS.dtype), x_BS, precision=jax.lax.Precision.HIGHEST
    )


def token_scale(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation [B, N, 1] of each token's variate in its sample; padding gets 0
    and 1.

    Over the observed values of tokens that are not predicted; n - 1 in the variance, `SCALE_EPS`
    inside the root. The original counts in float64. Here the mean is taken twice, the second time
    of what the first left over, and squares are of values brought below 1: as exact in float32, at
    any offset and size.
    """
    used_BNP = tokens.observed & ~tokens.predicted[..., None]
    together_BNS = tokens.same_sample & tokens.same_variate

    def total(x_BNP):
        return group_sum(together_BNS, jnp.where(used_BNP, x_BNP, 0.0).sum(-1))

    x_BNP = tokens.target.astype(jnp.float32)
    n_BN = total(jnp.ones_like(x_BNP))
    count_BN = jnp.maximum(n_BN, 1.0)
    rough_BN = total(x_BNP) / count_BN
    rest_BNP = x_BNP - rough_BN[..., None]
    shift_BN = total(rest_BNP) / count_BN
    loc_BN = rough_BN + shift_BN
    rest_BNP = jnp.where(used_BNP, rest_BNP - shift_BN[..., None], 0.0)
    size_BN = jnp.where(together_BNS, jnp.abs(rest_BNP).max(-1)[:, None, :], 0.0).max(-1)
    size_BN = jnp.maximum(size_BN, 1.0)
    squares_BN = total(jnp.square(rest_BNP / size_BN[..., None])) / jnp.maximum(n_BN - 1, 1.0)
    scale_BN = size_BN * jnp.sqrt(squares_BN + SCALE_EPS / size_BN / size_BN)
    real_BN = tokens.sample_id != 0
    loc_BN, scale_BN = jnp.where(real_BN, loc_BN, 0.0), jnp.where(real_BN, scale_BN, 1.0)
    return jax.lax.stop_gradient((loc_BN[..., None], scale_BN[..., None]))


def series_scale(x_BCT: jax.Array, observed_BCT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the mean and standard deviation [B, C] of each variate, as `token_scale` does."""
    b, c, _ = x_BCT.shape
    variate_BC = jnp.broadcast_to(jnp.arange(c)[None], (b, c))
    same_BC = jnp.ones((b, c), jnp.int32)
    # One token holds all of a variate: a scale is the same for tokens of any size.
    whole = Tokens(
        x_BCT,
        observed_BCT,
        same_BC,
        time_id=same_BC,
        variate_id=variate_BC,
        predicted=jnp.zeros((b, c), bool),
    )
    loc_BC1, scale_BC1 = token_scale(whole)
    return loc_BC1[..., 0], scale_BC1[..., 0]


def scale_of_variates(
    tokens: Tokens, loc_BC: jax.Array, scale_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Give `token_scale` of rows of one sample each by the mean and deviation of each variate."""
    real_BN = tokens.sample_id != 0
    loc_BN = jnp.take_along_axis(loc_BC, tokens.variate_id, axis=1)
    scale_BN = jnp.take_along_axis(scale_BC, tokens.variate_id, axis=1)
    loc_BN, scale_BN = jnp.where(real_BN, loc_BN, 0.0), jnp.where(real_BN, scale_BN, 1.0)
    return loc_BN[..., None], scale_BN[..., None]


def _patches(x_BCT: jax.Array, patch: int, left: bool, fill=0) -> jax.Array:
    """[B, C, N, patch], padded on one side."""
    missing = -x_BCT.shape[-1] % patch
    widths = [(0, 0)] * (x_BCT.ndim - 1) + [(missing, 0) if left else (0, missing)]
    x_BCT = jnp.pad(x_BCT, widths, constant_values=fill)
    return x_BCT.reshape(*x_BCT.shape[:-1], -1, patch)


def pack(
    past: Series,
    horizon: int,
    patch: int,
    width: int,
    *,
    future: Series | None = None,
    begun_BT: jax.Array | None = None,
    known: Series | None = None,
    past_known: Series | None = None,
) -> Tokens:
    """Tokens of a forecast: the past of every variate, then the future of every variate, then
    covariates.

    The past is filled up on the left and the future on the right to whole patches, with zeros that
    are not observed. Times count the patches that hold any observed value of any variate of `past`;
    empty ones in front share time 0.

    Args:
      past: values and observed [B, C, T]. horizon: H. patch: steps per token. width: P of the
        tokens.
      future: the true [B, C, H] where it is known; zeros, counted as observed, where not.
      begun_BT: booleans, False before the series began; a token of such steps alone is padding.
      known: covariates [B, F, T + H]. past_known: covariates [B, G, T].
    """
    x_BCT, observed_BCT = past
    b, c, t = x_BCT.shape
    if future is None:
        future = jnp.zeros((b, c, horizon), x_BCT.dtype), jnp.ones((b, c, horizon), bool)
    begun_BT = jnp.ones((b, t), bool) if begun_BT is None else begun_BT
    seen_BN = _patches(observed_BCT.any(1), patch, True).any(-1)
    past_BN = jnp.maximum(jnp.cumsum(seen_BN, axis=1) - 1, 0)
    steps = -(-horizon // patch)
    future_BN = past_BN[:, -1:] + 1 + jnp.arange(steps)[None]
    real_BN = _patches(begun_BT, patch, True, fill=False).any(-1)
    # What fills a first patch up counts as begun for covariates, as in the original.
    real_covariate_BN = _patches(begun_BT, patch, True, fill=True).any(-1)
    after_BN = jnp.ones((b, steps), bool)

    parts = [
        (past, True, real_BN, past_BN, 0, False),
        (future, False, after_BN, future_BN, 0, True),
    ]
    if known is not None:
        values, there = known
        before = values[..., :t], there[..., :t]
        after = values[..., t:], there[..., t:]
        parts += [
            (before, True, real_covariate_BN, past_BN, c, False),
            (after, False, after_BN, future_BN, c, False),
        ]
        c += values.shape[1]
    if past_known is not None:
        parts.append((past_known, True, real_covariate_BN, past_BN, c, False))

    def flat(a):
        """The patches of all variates in a row, each filled up to the width: [B, N, width]."""
        return jnp.pad(a.reshape(b, -1, patch), ((0, 0), (0, 0), (0, width - patch)))

    tokens = []
    for (x, observed), left, sample_BN, time_BN, first, predicted in parts:
        n_variates, n = x.shape[1], time_BN.shape[1]
        variate_N = jnp.repeat(first + jnp.arange(n_variates), n)
        tokens.append(
            Tokens(
                target=flat(_patches(x.astype(jnp.float32), patch, left)),
                observed=flat(_patches(observed, patch, left)),
                sample_id=jnp.tile(sample_BN.astype(jnp.int32), (1, n_variates)),
                time_id=jnp.tile(time_BN, (1, n_variates)),
                variate_id=jnp.broadcast_to(variate_N[None], (b, variate_N.shape[0])),
                predicted=jnp.full((b, variate_N.shape[0]), predicted),
            )
        )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *tokens)


def one_token(patch: int) -> Tokens:
    """Shapes of the tokens of one patch and its future, to ask a network for its parameters."""

    def made() -> Tokens:
        past = observed_series(jnp.zeros((1, 1, patch)))
        return pack(past, 1, patch, width=patch)

    return jax.eval_shape(made)


def future_tokens(n_variates: int, time_steps: int, horizon: int, patch: int) -> tuple[int, int]:
    """First and last-but-one place of the future tokens of `pack`."""
    first = n_variates * -(-time_steps // patch)
    return first, first + n_variates * -(-horizon // patch)


def unpack(y_BNP: jax.Array, n_variates: int, horizon: int, patch: int) -> jax.Array:
    """[B, C, H, ...] of the future tokens [B, C * steps, P, ...] of `pack`."""
    b, _, _, *rest = y_BNP.shape
    return y_BNP[:, :, :patch].reshape(b, n_variates, -1, *rest)[:, :, :horizon]


class SizedIn(nn.Module):
    """Patches into the model, with weights of their own for each patch size: [B, N, P] -> [B, N,
    D].

    kernel [Z, P, D], bias [Z, D]. Of the kernel of a size p only the first p rows are used: what
    stands behind a patch in its token is not zero after scaling. `patch`: one size for all tokens,
    or [B, N]; a size of 0 (padding) gives 0.
    """

    sizes: tuple[int, ...]
    features: int

    @nn.compact
    def __call__(self, x_BNP, patch):
        shape = (len(self.sizes), max(self.sizes), self.features)
        kernel_ZPD = self.param("kernel", nn.initializers.zeros, shape).astype(x_BNP.dtype)
        bias_ZD = self.param("bias", nn.initializers.zeros, (shape[0], shape[2])).astype(
            x_BNP.dtype
        )

        def one(z, p):
            y = x_BNP[..., :p].reshape(-1, p) @ kernel_ZPD[z, :p] + bias_ZD[z][None]
            return y.reshape(*x_BNP.shape[:2], self.features)

        return by_size(one, self.sizes, patch)


class SizedOut(nn.Module):
    """Out of the model to `dim` numbers per time step, by patch size: [B, N, D] -> [B, N, dim * P].

    kernel [Z, D, dim * P], bias [Z, dim * P]. Of the kernel of a size p the first dim * p columns
    are used, of the bias all. Read as [dim, P] (the caller does), so at dim > 1 those columns are
    not the first p steps of each of the dim numbers: the original's layout, which its published
    weights were trained with.
    """

    sizes: tuple[int, ...]
    dim: int

    @nn.compact
    def __call__(self, x_BND, patch):
        d, out = x_BND.shape[-1], self.dim * max(self.sizes)
        kernel_ZDO = self.param("kernel", nn.initializers.zeros, (len(self.sizes), d, out)).astype(
            x_BND.dtype
        )
        bias_ZO = self.param("bias", nn.initializers.zeros, (len(self.sizes), out)).astype(
            x_BND.dtype
        )

        def one(z, p):
            y = x_BND.reshape(-1, d) @ kernel_ZDO[z, :, : self.dim * p]
            y = jnp.pad(y, ((0, 0), (0, out - self.dim * p))) + bias_ZO[z][None]
            return y.reshape(*x_BND.shape[:2], out)

        return by_size(one, self.sizes, patch)


def by_size(one, sizes: tuple[int, ...], patch) -> jax.Array:
    """`one(z, sizes[z])` [B, N, ...] of the tokens' own size; 0 where that is none of `sizes`.

    patch: an int is one size for all, which costs one call; an array [B, N] costs one for each
    size.
    """
    if isinstance(patch, int):
        return one(sizes.index(patch), patch)
    outs = [jnp.where((patch == p)[..., None], one(z, p), 0) for z, p in enumerate(sizes)]
    return sum(outs[1:], outs[0])


class AnyVariateAttention(nn.Module):
    """Self-attention over packed tokens [B, N, D] -> [B, N, D], and the named steps between.

    q and k are normalised per head, then the first half of each head turns by the token's time; a
    learned number per head is added to the score of tokens of the same variate, another to that of
    different ones. seen, same_variate: [B, N, S] bool. time_id: [B, N]. only: places of the tokens
    that ask; None: all of them. adapters: functions of the tokens by the name, q, k or v, of what
    they are added to.
    """

    d_model: int
    dims: HeadDims
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x_BND, seen_BNS, same_variate_BNS, time_id_BN, train: bool, only=None, adapters=None
    ):
        dims, half, taps = self.dims, self.dims.qk // 2, {}
        asking = slice(None) if only is None else only

        def project(name):
            shape = dims.shapes[name]
            from_BND = x_BND[:, asking] if name == "q" else x_BND
            taps[name] = Linear((self.d_model,), shape, use_bias=False, name=name)(from_BND)
            if adapters is not None and name in adapters:
                taps[name] = taps[name] + adapters[name](from_BND)
            return jnp.swapaxes(taps[name], 1, 2)  # heads beside the batch: plain batched products

        def turned(name):
            y = taps[f"{name}_norm"] = RMSNorm(NORM_EPS, name=f"{name}_norm")(project(name))
            place_BN = time_id_BN[:, asking] if name == "q" else time_id_BN
            first = rotary(y[..., :half], place_BN[:, None], pairs="adjacent")
            return jnp.concatenate([first, y[..., half:]], axis=-1)

        shape = (2, dims.heads)
        bias_2H = (
            self.param("variate_bias", nn.initializers.zeros, shape)
            if dims.heads
            else jnp.zeros(shape)
        )
        bias_2H = bias_2H.astype(jnp.float32)
        bias = bias_2H[:, None, :, None, None]
        y_BHNK, _ = attend(
            turned("q"),
            turned("k"),
            project("v"),
            seen=seen_BNS[:, asking][:, None],
            bias=jnp.where(same_variate_BNS[:, asking][:, None], bias[1], bias[0]),
            scale=dims.qk**-0.5,
            hidden=-jnp.inf,
            dropout=functools.partial(Dropout(self.dropout), train=train),
        )
        out = Linear(dims.joined, (self.d_model,), use_bias=False, name="out")
        return out(jnp.swapaxes(y_BHNK, 1, 2)), taps


def default_ffn_dim(d_model: int) -> int:
    """F where the published config names none: two thirds of four times D, up to a multiple
    of 8.
    """
    return math.ceil(int(4 * d_model * 2 / 3) / 8) * 8


def group_mean(
    error_BNP: jax.Array, tokens: Tokens, weight_B: jax.Array | None = None
) -> jax.Array:
    """Mean over the predicted, observed entries in which every variate of every sample counts
    alike: a scalar.

    weight: of each row; rows of weight 0 count as absent.
    """
    scored_BNP = tokens.observed & tokens.predicted[..., None]
    weight_B1 = jnp.ones((error_BNP.shape[0], 1)) if weight_B is None else weight_B[:, None]
    entries_BN = scored_BNP.sum(-1).astype(jnp.float32)
    group_BN = jnp.maximum(group_sum(tokens.same_sample & tokens.same_variate, entries_BN), 1.0)
    groups = (weight_B1 * entries_BN / group_BN).sum()
    error_BN = jnp.where(scored_BNP, error_BNP, 0.0).sum(-1)
    return (weight_B1 * error_BN / group_BN).sum() / jnp.maximum(
        groups, jnp.finfo(jnp.float32).tiny
    )


def neutral_scale(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """Mean 0 and scale 1 of every token: a model without scaling."""
    shape = (*tokens.sample_id.shape, 1)
    return jnp.zeros(shape), jnp.ones(shape)


def observed_series(x_BCT: jax.Array) -> Series:
    """Values with 0 for NaN, float32, and what is observed."""
    x_BCT = jnp.asarray(x_BCT, jnp.float32)
    observed = ~jnp.isnan(x_BCT)
    return jnp.where(observed, x_BCT, 0.0), observed


def rows_of(batch: Mapping[str, jax.Array], variates: str) -> dict[str, jax.Array]:
    """A batch (`context`, `target` [B, C, .], `weight` [B], what there is of them) in rows of the
    model: as it is where variates are "joint", each variate a row of its own where they are
    "independent".
    """
    if variates == "joint":
        return dict(batch)
    c = batch["context"].shape[1]
    return {
        k: jnp.repeat(x, c) if k == "weight" else x.reshape(-1, 1, x.shape[-1])
        for k, x in batch.items()
    }


def masked_mse(
    y_BCH: jax.Array, truth_BCH: jax.Array, observed_BCH: jax.Array, weight_B=None
) -> jax.Array:
    """MSE where observed; weight: of each row."""
    weight = jnp.ones(y_BCH.shape[0]) if weight_B is None else weight_B
    counts_BCH = observed_BCH * weight[:, None, None]
    squares = jnp.where(observed_BCH, jnp.square(y_BCH - truth_BCH), 0.0)
    return (counts_BCH * squares).sum() / jnp.maximum(counts_BCH.sum(), jnp.finfo(jnp.float32).tiny)


def fresh(
    key: jax.Array,
    shapes: Tree,
    patch_sizes: tuple[int, ...],
    d_model: int,
    own: Callable[[str, tuple[int, ...]], Distribution | None] = lambda path, shape: None,
) -> Tree:
    """Fresh parameters of a family with patch sizes. own: (path, shape) -> distribution, of what it
    has alone.
    """

    flat = flatten(shapes)

    def rule(path, shape):
        layer, _, leaf = path.rpartition("/")
        if (special := own(path, shape)) is not None:
            return special
        if leaf == "scale":
            return Constant(1.0)
        if leaf in ("mask", "variate_bias"):
            return Normal(1.0)
        if _SIZED.search(layer):
            return Uniform(1.0)
        return torch_linear(flat, path) or Constant(0.0)

    def narrowed(path, leaf):
        layer, _, name = path.rpartition("/")
        if not _SIZED.search(layer):
            return leaf
        into = not layer.startswith("head/")
        bound_Z = np.asarray([p**-0.5 if into else d_model**-0.5 for p in patch_sizes], np.float32)
        bound = bound_Z.reshape(-1, *(1,) * (leaf.ndim - 1))
        axis = 1 if into and name == "kernel" else leaf.ndim - 1
        if into and name == "bias":
            return leaf * bound
        used_Z = np.asarray(patch_sizes) * (leaf.shape[axis] // max(patch_sizes))
        inside = (
            np.arange(leaf.shape[axis])[None] < used_Z[:, None]
        )  # the rest of the axis is of larger sizes
        inside = inside.reshape(
            -1, *(leaf.shape[i] if i == axis else 1 for i in range(1, leaf.ndim))
        )
        return leaf * (bound * inside)

    drawn = flatten(draw(key, shapes, rule))
    return unflatten({path: narrowed(path, leaf) for path, leaf in drawn.items()})
