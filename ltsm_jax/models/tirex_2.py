"""TiRex-2: recurrent over patches in time, and attention over the variates of a group.

Podest et al., "TiRex-2: Generalizing TiRex to Multivariate Data and Streaming" (arXiv 2607.01204).
Follows the package tirex-2 (release 0.4.0) of NX-AI/tirex-2.

A window holds the context and F future steps, NaN where nothing is known. Every variate is scaled
by its own mean and standard deviation (series of 0 and 1 are left as they are), goes through
arcsinh, and is cut into patches; a token holds the values of one patch and which of them are known.
A block is an mLSTM or an sLSTM over the tokens of each variate and a gated feed-forward layer,
then, for every token, attention over the variates of the group and another feed-forward layer.
Covariates whose future is known go through the recurrence backwards as well, with the same weights.
Token i becomes the quantiles of patch i + 1, which are not sorted: levels may cross.

Around the network `predict` does what the original's does: targets with a trend are differenced and
summed up again, and the distances of the quantiles to the median are calibrated.

Departures from the original:
- Horizons beyond F are rolled out: the median is put behind the context and the next F steps are
  forecast from there, each window with its own quantiles. Past covariates are missing in the steps
  that have been forecast. The original cuts longer horizons off.
- The first difference, 0, stands at the first observed value, so that missing values in front of a
  series change nothing. The original has it at the first step even where that is missing: the quirk
  `zero_at_start`.
- The mean of a constant series is exact. The original feeds the rounding error of the mean, divided
  by 1e-8, to the network.
- Nothing is published about training. The loss is the quantile loss of the scaled window, without
  differencing and calibration.

Letters beyond those of the library: G groups, M members of a group (targets first, then
covariates), A of them that are read in both directions, R rows (a variate in one direction),
S tokens that have been read, V width of the mLSTM's values, E width of an sLSTM head.
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
from ltsm_jax.layers.initial import Constant, Normal, draw, torch_linear
from ltsm_jax.layers.linear import Linear, compute_dtype
from ltsm_jax.layers.missing import mean_observed, mse_observed
from ltsm_jax.layers.mlp import ACTIVATIONS, feed_forward, gated_feed_forward
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.patches import end_to_end
from ltsm_jax.layers.quantiles import DECILES, level_problems, median_of, pinball
from ltsm_jax.layers.residual import ResidualBlock
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import COVARIATES, Batch, Forecast, Model, Recipe, windows_that_fit
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree, flatten

EPS = 1e-6  # of every norm within a block
QK_EPS = float(np.finfo(np.float32).eps)  # of the norm of queries and keys
GATE_CAP = 15.0  # the gates of the mLSTM stay within +-15
CHUNK = 128  # tokens of the mLSTM that are computed at a time
LONGEST_ARC = 20.0  # beyond it sinh would leave float32

# Whether a target is differenced: the share of its variance that a straight line explains, and how
# many standard deviations the line rises over the series.
TREND_SHARE = 0.87
TREND_RISE = 1.5
LEAST_VALUES = 4
LEAST_STD = 1e-12

# Calibration of the distances to the median, at step t: factor * t^power.
PLAIN_FACTOR, PLAIN_POWER = math.sqrt(0.9), 0.02
SUMMED_FACTOR, SUMMED_POWER = math.sqrt(1.68), 0.01


Kind = Literal["mlstm", "slstm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class TiRex2Layer:
    """A layer's recurrence and its heads, the units behind it, its attention over variates, and the
    units behind that.
    """

    kind: Kind
    lstm_heads: int
    ffn: int
    attn: HeadDims
    variate_ffn: int


@dataclasses.dataclass(frozen=True)
class TiRex2Config:
    """Widths are per layer, so that a pruned TiRex-2 is a TiRex-2.

    d_model: D. layers: the recurrence, H, K and F of each.
    qk_dim, value_dim: K and V of an mLSTM head. slstm_dim: E. head_dim: K of the attention.
    embed_dim, out_dim: hidden widths of the blocks that read patches and write forecasts.
    patch_len P, context_len, future_len F: in time steps. levels: quantile levels.
    arcsinh, binary_aware, scale_eps: how a variate is scaled, see the module docstring; the eps is
      the least standard deviation.
    activation: of all feed-forward layers but the gated ones. qk_norm: whether queries and keys are
      normalised. out_norm_eps: of the norm behind the blocks; None: there is none.
    sign_flip: average each forecast with that of the negated series. difference: difference targets
      with a trend.
    dropout, block_dropout: outside and inside the blocks.
    zero_at_start: a quirk of the original, see the module docstring.
    """

    d_model: int
    layers: tuple[TiRex2Layer, ...]
    qk_dim: int
    value_dim: int
    slstm_dim: int
    head_dim: int
    embed_dim: int
    out_dim: int
    patch_len: int = 32
    context_len: int = 2048
    future_len: int = 320
    levels: tuple[float, ...] = DECILES
    arcsinh: bool = True
    binary_aware: bool = True
    scale_eps: float = 1e-8
    activation: Activation = "silu"
    qk_norm: bool = True
    out_norm_eps: float | None = 1e-7
    sign_flip: bool = False
    difference: bool = True
    dropout: float = 0.1
    block_dropout: float = 0.1
    zero_at_start: bool = False

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        sizes = ("d_model", "qk_dim", "value_dim", "slstm_dim", "head_dim", "embed_dim", "out_dim")
        problems += field_problems(self, *sizes, "patch_len", "context_len", "future_len")
        for layer in self.layers:
            problems += field_problems(layer)

        # What an sLSTM head gives has its place in the residual stream.
        slstm = {layer.lstm_heads for layer in self.layers if layer.kind == "slstm"}
        if any(heads * self.slstm_dim != self.d_model for heads in slstm):
            problems.append(
                f"the heads of an sLSTM, {sorted(slstm)} of width {self.slstm_dim}, must make the "
                f"width {self.d_model}"
            )
        if self.patch_len > 0 and self.future_len % self.patch_len:
            problems.append(
                f"future_len must be whole patches of {self.patch_len} steps, got {self.future_len}"
            )
        levels = self.levels
        if unfit := level_problems(levels):
            problems += unfit
        elif len(levels) % 2 == 0:
            problems.append(f"levels must be an odd number, the middle one is the median: {levels}")
        elif self.sign_flip and not np.allclose(levels, 1 - np.asarray(levels)[::-1], atol=1e-6):
            problems.append(f"sign_flip needs levels that are symmetric about 0.5: {levels}")
        refuse(self, problems)

    @classmethod
    def of(
        cls,
        d_model: int,
        kinds: Sequence[Kind],
        *,
        mlstm_heads: int = 4,
        slstm_heads: int = 4,
        n_heads: int = 4,
        embed_dim: int,
        h_expand: float = 4,
        **rest: Any,
    ) -> "TiRex2Config":
        """Layers of equal widths, which follow from d_model as in the original.

        Raises: ValueError for numbers of heads that do not divide the width.
        """
        inner = int(d_model * 0.5)
        divided = {"mlstm_heads": mlstm_heads, "slstm_heads": slstm_heads, "n_heads": n_heads}
        odd = [name for name, heads in divided.items() if heads < 1 or d_model % heads]
        if not odd and inner % mlstm_heads:
            odd = ["mlstm_heads"]
        if odd:
            raise ValueError(
                f"TiRex2Config: {', '.join(odd)} must divide the width {d_model} (and mlstm_heads "
                f"half of it), got {divided}"
            )
        layers = []
        for kind in kinds:
            layer = TiRex2Layer(
                kind=kind,
                lstm_heads=mlstm_heads if kind == "mlstm" else slstm_heads,
                ffn=gated_width(d_model),
                attn=HeadDims.of(n_heads, d_model // n_heads),
                variate_ffn=4 * d_model,
            )
            layers.append(layer)
        return cls(
            d_model=d_model,
            layers=tuple(layers),
            qk_dim=inner // mlstm_heads,
            value_dim=d_model // mlstm_heads,
            slstm_dim=d_model // slstm_heads,
            head_dim=d_model // n_heads,
            embed_dim=embed_dim,
            out_dim=int(d_model * h_expand),
            **rest,
        )

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TiRex2Config":
        """Read the published config.json, which holds the arguments of the original's constructor.

        Raises: ValueError naming the fields that are missing, or a layout that the original cannot
          run either.
        """
        names = (
            "stack_config",
            "num_blocks",
            "embedding_dim",
            "input_patch_size",
            "quantiles",
            "h_expand",
            "context_len",
            "future_len",
            "input_ff_dim",
            "act_func",
            "dropout",
        )
        require_fields("TiRex-2", fields, names)
        d_model, patch = fields["embedding_dim"], fields["input_patch_size"]
        tokenizer = fields.get("tokenizer_cfg", {})
        patches = {fields.get("output_patch_size", patch)}
        patches |= {tokenizer.get(name, patch) for name in TOKENIZER_SIZES}
        if patches != {patch}:
            raise ValueError(
                f"a TiRex-2 has equal input and output patches without overlap, got {patches}"
            )
        kinds, heads, block_dropout = _stack_of(fields["stack_config"], d_model)
        if len(kinds) != fields["num_blocks"]:
            raise ValueError(
                f"num_blocks is {fields['num_blocks']}, the recipe of stack_config names "
                f"{len(kinds)}"
            )
        scaler, norm = fields.get("scaler_cfg", {}), fields.get("stack_out_norm_config")
        return cls.of(
            d_model,
            kinds,
            **heads,
            embed_dim=fields["input_ff_dim"],
            h_expand=fields["h_expand"],
            patch_len=patch,
            context_len=fields["context_len"],
            future_len=fields["future_len"],
            levels=tuple(fields["quantiles"]),
            arcsinh=scaler.get("use_arcsinh", False),
            binary_aware=scaler.get("binaryaware", False),
            scale_eps=float(scaler.get("eps", 1e-8)),
            activation=activation_named(fields["act_func"]),
            qk_norm=fields.get("use_qk_norm", True),
            out_norm_eps=None if norm is None else float(norm.get("eps", 1e-7)),
            sign_flip=fields.get("tta_sign_flip", False),
            difference=fields.get("tta_diff", True),
            dropout=float(fields["dropout"]),
            block_dropout=block_dropout,
        )


TIME_MIXERS: dict[str, Kind] = {"bi-mlstm": "mlstm", "bi-slstm": "slstm"}
TOKENIZER_SIZES = ("input_patch_size", "input_patch_stride", "output_patch_size")
# Names of torch.nn that a published config has, and ours.
PUBLISHED_ACTIVATIONS = {"SiLU": "silu", "GELU": "gelu", "ReLU": "relu"}


def activation_named(name: str) -> Any:
    """Our name of an activation that the original looks up in torch.nn ("SiLU", "torch.nn.GELU").

    Raises: ValueError for one that is not known here.
    """
    last = str(name).rpartition(".")[2]
    if last not in PUBLISHED_ACTIVATIONS:
        known = ", ".join(PUBLISHED_ACTIVATIONS)
        raise ValueError(f"act_func: {str(name)[:100]!r} is not one of {known}")
    return PUBLISHED_ACTIVATIONS[last]


def gated_width(d_model: int) -> int:
    """Width of the gated feed-forward layer: 2.6667 D, rounded to 64 as the original does."""
    return int((2.6667 * d_model + 63) / 64) * 64


def _stack_of(stack: Mapping[str, Any], d_model: int) -> tuple[list[Kind], dict[str, int], float]:
    """Read `stack_config`: the kind of each layer, the numbers of heads, and the dropout.

    Raises: ValueError for templates that differ in what all our layers have in common.
    """
    templates, problems = stack["templates"], []
    kinds: list[Kind] = []
    found: dict[str, set[Any]] = {
        "mlstm_heads": set(),
        "slstm_heads": set(),
        "n_heads": set(),
        "dropout": set(),
    }
    for name in stack["recipe"]:
        if name not in templates:
            raise ValueError(f"stack_config: the recipe names {name!r}, which is no template")
        template = templates[name]
        time, variate = template["time_mixer"], template["variate_mixer"]
        kind = TIME_MIXERS.get(time["model_type"])
        if kind is None:
            raise ValueError(
                f"stack_config: {time['model_type']!r} is no time mixer of TiRex-2; there are "
                "bi-mlstm and bi-slstm"
            )
        kinds.append(kind)
        heads = time["num_heads"]
        if kind == "slstm":
            heads = time.get("num_slstm_heads") or heads
        found[f"{kind}_heads"].add(heads)
        found["n_heads"].add(variate["num_heads"])
        found["dropout"].add(template.get("dropout") or 0.0)
        if {time["embedding_dim"], variate["embedding_dim"]} != {d_model}:
            problems.append(f"the template {name!r} has another embedding_dim than {d_model}")
    problems += [
        f"all layers must have the same {name}, got {sorted(values)}"
        for name, values in found.items()
        if len(values) > 1
    ]
    if problems:
        raise ValueError("stack_config: " + "; ".join(problems))
    told = {name: values.pop() for name, values in found.items() if values}
    dropout = float(told.pop("dropout", 0.0))
    # Of a kind that no layer is of, any number that divides the width will do.
    return kinds, {"mlstm_heads": 1, "slstm_heads": 1} | told, dropout


# The file of the weights is not public without an account; its sizes are those that the published
# numbers of parameters leave. Which of the two kinds of layers comes first is not said: a published
# config.json says it.
_PUBLISHED = TiRex2Config.of(512, ("mlstm", "slstm") * 6, embed_dim=2048)
PRESETS = {
    "NX-AI/TiRex-2": _PUBLISHED,
    "NX-AI/TiRex-2-gifteval-zs": _PUBLISHED,
    "NX-AI/TiRex-2-gifteval-pretrain": _PUBLISHED,
    "NX-AI/TiRex-2-fevbench": _PUBLISHED,
}


# --- recurrences


class HeadLinear(Linear):
    """A linear layer of each head by itself: [..., H, E] -> [..., H, E'], with a kernel [E, H, E'].

    inputs: (E,), of every head. outputs: (H, E').
    """

    @nn.compact
    def __call__(self, x):
        dtype = compute_dtype(x)
        (e,), (h, out) = self.inputs, self.outputs
        kernel_EHO = self.param("kernel", nn.initializers.zeros, (e, h, out)).astype(dtype)
        rows_RHE = x.astype(dtype).reshape(-1, h, e)

        # A product of two matrices a head: XLA's CPU code takes longer for one with a batch axis.
        found = [rows_RHE[:, i] @ kernel_EHO[:, i] for i in range(h)]
        return jnp.stack(found, axis=1).reshape(*x.shape[:-2], h, out)


class HeadNorm(nn.Module):
    """Layer norm over the last axis of each head, [..., H, K], in float32, without a bias."""

    heads: int
    width: int

    @nn.compact
    def __call__(self, x):
        scale_HK = self.param("scale", nn.initializers.ones, (self.heads, self.width))
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + EPS)
        return wide * scale_HK.reshape((1,) * (x.ndim - 2) + scale_HK.shape)


MLSTMState = tuple[jax.Array, jax.Array, jax.Array]  # C [R, H, K, V], n [R, H, K] and m [R, H]


def mlstm(
    q_RHNK: jax.Array,
    k_RHNK: jax.Array,
    v_RHNV: jax.Array,
    i_RHN: jax.Array,
    f_RHN: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run an mLSTM over N tokens, `chunk` of them at a time.

    With a_t = exp(log sigmoid(f_t) + m_(t-1) - m_t), b_t = exp(i_t - m_t) and q' = q / sqrt(K):

        m_t = max(log sigmoid(f_t) + m_(t-1), i_t)
        C_t = a_t C_(t-1) + b_t k_t v_t^T,   n_t = a_t n_(t-1) + b_t k_t
        h_t = C_t^T q' / (max(|n_t . q'|, exp(-m_t)) + 1e-6)

    from zeros. Within a chunk it is a product of masked scores with values, between chunks the
    state is handed on: the same numbers for every chunk length. All in float32.

    Returns: h [R, H, N, V], and the named steps: `denominator` and `m` [R, H, N], and the state
      after the last token, `C`, `n`, `m_last`.
    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517), and "Tiled
      Flash Linear Attention" (arXiv 2503.14376) for the form in chunks.
    """
    r, h, n, k_dim = q_RHNK.shape
    v_dim = v_RHNV.shape[-1]
    wide = (x.astype(jnp.float32) for x in (q_RHNK * k_dim**-0.5, k_RHNK, v_RHNV, i_RHN))
    inputs = (*wide, jax.nn.log_sigmoid(f_RHN.astype(jnp.float32)))

    count = -(-n // chunk)
    if count == 1:
        state, (h_RHNV, denominator, m_RHN) = _mlstm_chunk(None, inputs)
    else:
        # Equal chunks, as few padded tokens as can be. A padded one writes nothing and forgets
        # nothing.
        length = -(-n // count)
        empty = (0.0, 0.0, 0.0, -jnp.inf, 0.0)
        parts = tuple(
            _cut(x, length, count, value=value) for x, value in zip(inputs, empty, strict=True)
        )
        start = (jnp.zeros((r, h, k_dim, v_dim)), jnp.zeros((r, h, k_dim)), jnp.zeros((r, h)))
        state, found = jax.lax.scan(_mlstm_chunk, start, parts)
        h_RHNV, denominator, m_RHN = (_joined(x, n) for x in found)
    steps = {"denominator": denominator, "m": m_RHN}
    steps |= dict(zip(("C", "n", "m_last"), state, strict=True))
    return h_RHNV, steps


def _cut(x: jax.Array, length: int, count: int, value: float) -> jax.Array:
    """Cut tokens [R, H, N, ...] into chunks [count, R, H, length, ...], filled up at the end."""
    missing = count * length - x.shape[2]
    pads = [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, pads, constant_values=value)
    return jnp.moveaxis(x.reshape(*x.shape[:2], count, length, *x.shape[3:]), 2, 0)


def _joined(x: jax.Array, n: int) -> jax.Array:
    """Put chunks [count, R, H, length, ...] together again, the first n tokens of them."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :n]


def _mlstm_chunk(state: MLSTMState | None, inputs: tuple[jax.Array, ...]):
    """One chunk of an mLSTM. state: None at the beginning, where C, n and m are 0."""
    q_RHNK, k_RHSK, v_RHSV, i_RHS, log_f_RHN = inputs
    n = q_RHNK.shape[2]
    m_RH = jnp.zeros(i_RHS.shape[:2]) if state is None else state[2]

    # Token s is in the memory after token t by exp(i_s + the log f after it - m_t): with the sum of
    # log f up to each token, "passed", and i_s - passed_s, the rest is the largest so far.
    passed_RHN = jnp.cumsum(log_f_RHN, axis=-1)
    written_RHS = i_RHS - passed_RHN
    largest_RHN = jnp.maximum(jax.lax.cummax(written_RHS, axis=2), m_RH[..., None])
    m_RHN = passed_RHN + largest_RHN

    before_NS = jnp.tril(jnp.ones((n, n), bool))[None, None]
    gap_RHNS = written_RHS[:, :, None] - largest_RHN[..., None]
    weight_RHNS = jnp.exp(jnp.where(before_NS, gap_RHNS, -jnp.inf))
    score_RHNS = jnp.einsum("RHNK,RHSK->RHNS", q_RHNK, k_RHSK) * weight_RHNS
    value_RHNV = jnp.einsum("RHNS,RHSV->RHNV", score_RHNS, v_RHSV)
    size_RHN = score_RHNS.sum(axis=-1)

    if state is not None:
        left_RHN = jnp.exp(m_RH[..., None] - largest_RHN)
        old_RHNV = jnp.einsum("RHNK,RHKV->RHNV", q_RHNK, state[0])
        value_RHNV = value_RHNV + left_RHN[..., None] * old_RHNV
        size_RHN = size_RHN + left_RHN * jnp.einsum("RHNK,RHK->RHN", q_RHNK, state[1])

    denominator = jnp.maximum(jnp.abs(size_RHN), jnp.exp(-m_RHN))
    h_RHNV = value_RHNV / (denominator + EPS)[..., None]

    end_RH = largest_RHN[..., -1]
    k_RHSK = k_RHSK * jnp.exp(written_RHS - end_RH[..., None])[..., None]
    c_RHKV = jnp.einsum("RHSK,RHSV->RHKV", k_RHSK, v_RHSV)
    n_RHK = k_RHSK.sum(axis=2)
    if state is not None:
        left_RH = jnp.exp(m_RH - end_RH)
        c_RHKV = c_RHKV + left_RH[..., None, None] * state[0]
        n_RHK = n_RHK + left_RH[..., None] * state[1]
    return (c_RHKV, n_RHK, m_RHN[..., -1]), (h_RHNV, denominator, m_RHN)


def slstm(
    gates_NHRGE: jax.Array, recurrent_HEGE: jax.Array, bias_HGE: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run an sLSTM over N tokens, one after the other.

    The gates G are i, f, z, o, of which the tokens give a part, and the last output the rest:

        (i, f, z, o) = gates_t + R y_(t-1) + bias
        m_t = max(i, log sigmoid(f) + m_(t-1)), at the first token i
        c_t = exp(log sigmoid(f) + m_(t-1) - m_t) c_(t-1) + exp(i - m_t) tanh z
        n_t likewise with 1 in place of tanh z
        y_t = sigmoid(o) c_t / n_t

    from zeros. States are float32; R y is computed in the dtype of `recurrent_HEGE`.

    Returns: y [N, H, R, E], and the states y, c, n, m after each token, alike.
    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517).
    """
    _, h, r, _, e = gates_NHRGE.shape
    kernel_HEO = recurrent_HEGE.reshape(h, e, 4 * e)
    offset_H1O = bias_HGE.reshape(h, 1, 4 * e)

    def step(state, gates_HRGE):
        y, c, n, m = state
        turned = jnp.einsum("HRE,HEO->HRO", y.astype(kernel_HEO.dtype), kernel_HEO)
        total = gates_HRGE.reshape(h, r, 4 * e).astype(jnp.float32) + offset_H1O
        total = total + turned.astype(jnp.float32)
        i, f, z, o = jnp.split(total, 4, axis=-1)

        kept = jax.nn.log_sigmoid(f) + m
        m = jnp.maximum(i, kept)
        forget, write = jnp.exp(kept - m), jnp.exp(i - m)
        c = forget * c + write * jnp.tanh(z)
        n = forget * n + write
        y = jax.nn.sigmoid(o) * c / n
        return (y, c, n, m), (y, c, n, m)

    zero = jnp.zeros((h, r, e), jnp.float32)
    # So far below any gate that nothing is left of the start.
    start = (zero, zero, zero, jnp.full_like(zero, -1e30))
    _, states = jax.lax.scan(step, start, gates_NHRGE)
    return states[0], states


class MLSTM(nn.Module):
    """An mLSTM with its projections: x [G, M, N, D] -> [G, M, N, D], each member by itself."""

    cfg: TiRex2Config
    heads: int

    @nn.compact
    def __call__(self, x_GMND):
        cfg, h, taps = self.cfg, self.heads, {}
        widths = {"q": cfg.qk_dim, "k": cfg.qk_dim, "v": cfg.value_dim, "gate": cfg.value_dim}
        found = {}
        for name, k in widths.items():
            linear = Linear((cfg.d_model,), (h, k), use_bias=False, name=name)
            found[name] = taps[name] = linear(x_GMND)
        for name in ("i", "f"):
            gate = Linear((cfg.d_model,), (h, 1), name=name)(x_GMND)
            found[name] = taps[name] = gate[..., 0].astype(jnp.float32)

        rows = {name: _heads_first(found[name]) for name in ("q", "k", "v")}
        capped = {}
        for name in ("i", "f"):
            capped[name] = GATE_CAP * jnp.tanh(_heads_first(found[name]) / GATE_CAP)
        h_RHNV, inner = mlstm(
            rows["q"], rows["k"], rows["v"], i_RHN=capped["i"], f_RHN=capped["f"], chunk=CHUNK
        )
        taps |= inner | {"h": h_RHNV}

        y_GMNHV = jnp.moveaxis(h_RHNV, 1, 2).reshape(*x_GMND.shape[:3], h, cfg.value_dim)
        y_GMNHV = taps["norm"] = HeadNorm(h, cfg.value_dim, name="norm")(y_GMNHV)
        y_GMNHV = jax.nn.sigmoid(found["gate"].astype(jnp.float32)) * y_GMNHV
        out = Linear((h, cfg.value_dim), (cfg.d_model,), use_bias=False, name="out")
        y_GMND = taps["out"] = out(y_GMNHV.astype(x_GMND.dtype))
        return y_GMND, taps


def _heads_first(x: jax.Array) -> jax.Array:
    """[G, M, N, H, ...] -> [R, H, N, ...]."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.moveaxis(x, 2, 1)


class SLSTM(nn.Module):
    """An sLSTM with its projections: x [G, M, N, D] -> [G, M, N, D], each member by itself."""

    cfg: TiRex2Config
    heads: int

    @nn.compact
    def __call__(self, x_GMND):
        h, e, taps = self.heads, self.cfg.slstm_dim, {}
        g, m, n, _ = x_GMND.shape
        x_GMNHE = x_GMND.reshape(g, m, n, h, e)
        gates = []
        for name in ("i", "f", "z", "o"):
            gate = taps[name] = HeadLinear((e,), (h, e), use_bias=False, name=name)(x_GMNHE)
            gates.append(gate.reshape(g * m, n, h, e))
        gates_NHRGE = jnp.transpose(jnp.stack(gates, axis=3), (1, 2, 0, 3, 4))

        recurrent = self.param("recurrent", nn.initializers.zeros, (h, e, 4, e))
        bias = self.param("bias", nn.initializers.zeros, (h, 4, e))
        y_NHRE, states = slstm(gates_NHRGE, recurrent.astype(compute_dtype(x_GMND)), bias)
        taps["states"] = jnp.stack(states)

        y_GMNHE = jnp.transpose(y_NHRE, (2, 0, 1, 3)).reshape(g, m, n, h, e)
        y_GMNHE = HeadNorm(h, e, name="norm")(y_GMNHE)
        y_GMND = taps["out"] = y_GMNHE.reshape(g, m, n, h * e).astype(x_GMND.dtype)
        return y_GMND, taps


# --- the network


class Attention(nn.Module):
    """Attention over the members of a group, x [G, N, M, D]; no positions, no biases.

    seen_GMM: which members (last axis) each member sees.
    """

    cfg: TiRex2Config
    dims: HeadDims

    @nn.compact
    def __call__(self, x_GNMD, seen_GMM, train: bool):
        cfg, dims = self.cfg, self.dims

        def project(name):
            return Linear((cfg.d_model,), dims.shapes[name], use_bias=False, name=name)(x_GNMD)

        q, k = project("q"), project("k")
        v = project("v")
        if cfg.qk_norm:
            q, k = _unit_rms(q), _unit_rms(k)
        q, k, v = (jnp.moveaxis(y, 3, 2) for y in (q, k, v))
        drop = functools.partial(Dropout(cfg.block_dropout), train=train)
        y_GNHMK, _ = attend(
            q, k, v, seen=seen_GMM[:, None, None], scale=cfg.head_dim**-0.5, dropout=drop
        )
        out = Linear(dims.joined, (cfg.d_model,), use_bias=False, name="out")
        y_GNMD = out(jnp.moveaxis(y_GNHMK, 2, 3))
        return Dropout(cfg.block_dropout)(y_GNMD, train)


def _unit_rms(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + QK_EPS)
    return wide.astype(x.dtype)


class VariateMixer(nn.Module):
    """Attention over the members of each group and a feed-forward layer: x [G, M, N, D]."""

    cfg: TiRex2Config
    dims: TiRex2Layer

    @nn.compact
    def __call__(self, x_GMND, seen_GMM, train: bool):
        cfg, taps = self.cfg, {}
        attention = Attention(cfg, self.dims.attn, name="attn")
        z = taps["norm1"] = RMSNorm(EPS, name="norm1")(x_GMND)
        y = attention(jnp.swapaxes(z, 1, 2), seen_GMM, train)
        y = taps["attn"] = jnp.swapaxes(y, 1, 2)
        x_GMND = x_GMND + y

        z = taps["norm2"] = RMSNorm(EPS, name="norm2")(x_GMND)
        drop = functools.partial(Dropout(cfg.block_dropout), train=train)
        f, activation = self.dims.variate_ffn, cfg.activation
        y = taps["ffn"] = feed_forward(z, f, activation, use_bias=False, dropout=drop)
        return x_GMND + y, taps


class Layer(nn.Module):
    """One block: x [G, M, N, D] through the recurrence and over the variates; and the steps.

    both: the members that may be read in both directions. known_GA: which of them are.
    seen_GMM: as of `Attention`; None: there is but one member, and no exchange.
    mixed_GM: which members take part in the exchange; None: all.
    """

    cfg: TiRex2Config
    dims: TiRex2Layer

    @nn.compact
    def __call__(self, x_GMND, both: tuple[int, ...], known_GA, seen_GMM, mixed_GM, train: bool):
        cfg, taps = self.cfg, {}
        m = x_GMND.shape[1]

        # Forwards and backwards are one call, of more members.
        u = taps["norm1"] = RMSNorm(EPS, name="norm1")(x_GMND)
        if both:
            u = jnp.concatenate([u, jnp.flip(u[:, np.asarray(both)], axis=2)], axis=1)
        y = self._recurrence(u, taps)
        if both:
            y = self._combined(
                y[:, :m],
                jnp.flip(y[:, m:], axis=2),
                both,
                known_GA=known_GA,
                train=train,
                taps=taps,
            )
        x_GMND = x_GMND + y

        z = taps["norm2"] = RMSNorm(EPS, name="norm2")(x_GMND)
        y = taps["ffn"] = gated_feed_forward(z, self.dims.ffn)
        x_GMND = taps["time"] = x_GMND + y

        if seen_GMM is not None:
            mixed, inner = VariateMixer(cfg, self.dims, name="variates")(x_GMND, seen_GMM, train)
            taps |= nested("variates", inner)
            if mixed_GM is not None:
                mixed = jnp.where(mixed_GM[..., None, None], mixed, x_GMND)
            x_GMND = mixed
        return x_GMND, taps

    def _recurrence(self, u, taps):
        cfg, heads = self.cfg, self.dims.lstm_heads
        if not heads:
            return jnp.zeros_like(u)  # pruning has left none
        kind = self.dims.kind
        cell = MLSTM(cfg, heads, name=kind) if kind == "mlstm" else SLSTM(cfg, heads, name=kind)
        y, inner = cell(u)
        taps |= nested("cell", inner)
        return y

    def _combined(self, y_GMND, back_GAND, both, known_GA, train, taps):
        """Both directions of the members that have two, and one of the others."""
        d, at = self.cfg.d_model, np.asarray(both)
        forth = y_GMND[:, at]
        combine = Linear((2 * d,), (d,), use_bias=False, name="combine")
        joined = taps["combine"] = combine(jnp.concatenate([forth, back_GAND], axis=-1))
        joined = Dropout(self.cfg.block_dropout)(joined, train)
        joined = jnp.where(known_GA[..., None, None], joined, forth)
        return y_GMND.at[:, at].set(joined)


class TiRex2Net(nn.Module):
    """Tokens [G, M, N, 2P] -> quantiles [G, C, N', Q, P] in the inner scale, and the named steps.

    both, known_GA, seen_GMM, mixed_GM: as of `Layer`. targets: C, of how many members, the first
    ones, forecasts are wanted. last: N', of how many tokens, the last ones.
    """

    cfg: TiRex2Config

    @nn.compact
    def __call__(
        self,
        tokens_GMNP,
        both: tuple[int, ...],
        known_GA,
        seen_GMM,
        mixed_GM,
        targets: int,
        last: int,
        train: bool = False,
    ):
        cfg, taps = self.cfg, {"tokens": tokens_GMNP}
        act = ACTIVATIONS[cfg.activation]
        embed = ResidualBlock(
            2 * cfg.patch_len,
            cfg.embed_dim,
            cfg.d_model,
            activation=act,
            dropout=cfg.dropout,
            name="embed",
        )
        x_GMND = taps["embed"] = embed(tokens_GMNP, train)
        for i, dims in enumerate(cfg.layers):
            layer = Layer(cfg, dims, name=f"layer_{i}")
            x_GMND, inner = layer(
                x_GMND, both, known_GA, seen_GMM=seen_GMM, mixed_GM=mixed_GM, train=train
            )
            taps |= nested(f"layer_{i}", inner, x_GMND)

        x_GCND = x_GMND[:, :targets, x_GMND.shape[2] - last :]
        if cfg.out_norm_eps is not None:
            x_GCND = taps["norm"] = RMSNorm(cfg.out_norm_eps, name="norm")(x_GCND)
        x_GCND = Dropout(cfg.dropout)(x_GCND, train)
        outputs = len(cfg.levels) * cfg.patch_len
        head = ResidualBlock(
            cfg.d_model, cfg.out_dim, outputs, activation=act, dropout=cfg.dropout, name="head"
        )
        y = taps["head"] = head(x_GCND, train)
        y = y.reshape(*y.shape[:3], len(cfg.levels), cfg.patch_len)
        return y.astype(jnp.float32), taps


# --- scaling, trends and calibration


def context_moments(
    x: jax.Array, eps: float, binary_aware: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and deviation of what is observed of x [..., T], and whether it is 0 and 1 alone.

    Such a series, and one without any value, has the mean 0 and the deviation 1.

    Returns: [..., 1] each; the last one False everywhere unless `binary_aware`.
    """
    observed = ~jnp.isnan(x)
    n = observed.sum(axis=-1, keepdims=True)
    first = jnp.take_along_axis(x, jnp.argmax(observed, axis=-1, keepdims=True), axis=-1)
    first = jnp.where(n > 0, first, 0.0)

    # From the first value on: so the mean of a constant series is exact.
    apart = jnp.where(observed, x - first, 0.0)
    mean = apart.sum(axis=-1, keepdims=True) / jnp.maximum(n, 1)
    square = jnp.where(observed, jnp.square(apart - mean), 0.0)
    scale = jnp.sqrt(square.sum(axis=-1, keepdims=True) / jnp.maximum(n, 1))
    loc = first + mean
    scale = jnp.where(n > 0, jnp.maximum(scale, eps), 1.0)

    binary = jnp.zeros(loc.shape, bool)
    if binary_aware:
        binary = (~observed | (x == 0) | (x == 1)).all(axis=-1, keepdims=True)
        loc, scale = jnp.where(binary, 0.0, loc), jnp.where(binary, 1.0, scale)
    return loc, scale, binary


def trend(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fit a straight line to what is observed of x [..., T].

    Returns: by how many standard deviations it rises or falls over T steps, and the share of the
      variance that it explains, [...] each; 0 for series without a spread or with too few values.
    """
    observed = ~jnp.isnan(x)
    n = observed.sum(axis=-1, keepdims=True).astype(jnp.float32)
    many = jnp.maximum(n, 1)

    def centred(y):
        y = jnp.where(observed, y, 0.0)
        return jnp.where(observed, y - y.sum(axis=-1, keepdims=True) / many, 0.0)

    first = jnp.take_along_axis(x, jnp.argmax(observed, axis=-1, keepdims=True), axis=-1)
    values = centred(x - first)
    steps = centred(jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.float32), x.shape))
    squares = jnp.square(values).sum(axis=-1, keepdims=True)
    std = jnp.sqrt(squares / jnp.maximum(n - 1, 1))
    usable = (std >= LEAST_STD) & (n >= LEAST_VALUES)
    z = values / jnp.where(usable, std, 1.0)

    spread = jnp.square(steps).sum(axis=-1)
    spread = jnp.where(usable[..., 0], spread, 1.0)
    slope = (steps * z).sum(axis=-1) / spread
    whole = jnp.where(usable[..., 0], jnp.square(z).sum(axis=-1), 1.0)
    share = jnp.square(slope) * spread / whole
    rise = jnp.abs(slope) * x.shape[-1]
    return jnp.where(usable[..., 0], rise, 0.0), jnp.where(usable[..., 0], share, 0.0)


def has_trend(x: jax.Array) -> jax.Array:
    """Tell which series [...] of x [..., T] the original differences."""
    rise, share = trend(x)
    return (rise >= TREND_RISE) & (share >= TREND_SHARE)


def differences(x: jax.Array, zero_at_start: bool = False) -> tuple[jax.Array, jax.Array]:
    """Differences of x [..., T] from step to step, and its last observed value [..., 1] or 0.

    A difference to or from a missing value is missing. The first one is 0, at the first observed
    value (zero_at_start: at the first step).
    """
    observed = ~jnp.isnan(x)
    steps = jnp.arange(x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,))
    first = jnp.argmax(observed, axis=-1, keepdims=True)
    first = jnp.zeros_like(first) if zero_at_start else first
    front = [(0, 0)] * (x.ndim - 1) + [(1, 0)]
    change = jnp.pad(jnp.diff(x, axis=-1), front, constant_values=jnp.nan)
    change = jnp.where(steps == first, 0.0, change)

    last = jnp.where(observed, steps, -1).max(axis=-1, keepdims=True)
    level = jnp.take_along_axis(x, jnp.maximum(last, 0), axis=-1)
    change = jnp.where(last < 0, jnp.nan, change)
    return change, jnp.where(last < 0, 0.0, level)


def calibrated(y_GCRQ: jax.Array, summed_GC: jax.Array, level_GC: jax.Array) -> jax.Array:
    """Calibrate quantiles of R steps, and sum up those of differenced series, from a level on.

    Distances to the median are those of the network times a factor that grows with the step. Of
    summed series their squares add up, as those of independent errors do; the sign is that of the
    sum over all steps.

    summed_GC: which series were differenced. level_GC: their last observed values.
    """
    steps = y_GCRQ.shape[2]
    t = jnp.arange(1, steps + 1, dtype=jnp.float32).reshape(1, 1, -1, 1)
    middle = y_GCRQ.shape[-1] // 2
    median = y_GCRQ[..., middle : middle + 1]
    apart = y_GCRQ - median
    plain = median + PLAIN_FACTOR * t**PLAIN_POWER * apart

    # sqrt has no derivative at 0, where the median is: the inner `where` keeps it out of gradients.
    squares = jnp.cumsum(jnp.square(apart), axis=2)
    some = squares > 0
    wide = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)
    wide = jnp.sign(apart.sum(axis=2, keepdims=True)) * wide
    summed = jnp.cumsum(median, axis=2) + SUMMED_FACTOR * t**SUMMED_POWER * wide
    summed = summed + level_GC[..., None, None]
    return jnp.where(summed_GC[..., None, None], summed, plain)


# --- the model


@dataclasses.dataclass(frozen=True)
class TiRex2(Model):
    """TiRex-2 at one size. See the module docstring; `Model` documents the methods."""

    config: TiRex2Config

    family = "tirex_2"
    published = PRESETS
    tasks = ("forecasting", "embedding")
    licence = "Apache-2.0 (NX-AI/TiRex-2)"
    shard_rules = (
        (r"^(embed|head)/hidden/kernel$", ("fsdp", "tensor")),
        (r"^(embed|head)/out/kernel$", ("tensor", "fsdp")),
        (r"^(embed|head)/residual/kernel$", (None, "fsdp")),
        (r"/mlstm/[if]/kernel$", ("fsdp", None, None)),
        (r"/slstm/[ifzo]/kernel$", ("fsdp", "tensor", None)),
        (r"/slstm/recurrent$", ("tensor", "fsdp", None, None)),
        (r"/combine/kernel$", ("tensor", "fsdp")),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    # An sLSTM has no output projection: what its heads give are channels of the residual stream,
    # which pruning masks and does not remove.
    prunable = (
        Group.heads(
            "mlstm",
            "lstm_heads",
            makes=("q", "k", "i", "f", "gate", "v"),
            others=(("norm/scale", 0),),
            normed=True,
        ),
        Group.heads("variates/attn", "attn", swapped=True),
        Group.units(),
        Group.units("variates", "variate_ffn"),
    )

    @classmethod
    def small(cls) -> TiRex2Config:
        return TiRex2Config.of(
            16,
            ("mlstm", "slstm"),
            mlstm_heads=2,
            slstm_heads=2,
            n_heads=2,
            embed_dim=24,
            h_expand=2,
            patch_len=8,
            context_len=64,
            future_len=16,
            levels=(0.1, 0.5, 0.9),
        )

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
        """Steps of one forward pass."""
        return self.config.future_len

    @property
    def eval_batch(self) -> int:
        """Windows for which the activations of ten variates fit."""
        cfg = self.config
        tokens = (cfg.context_len + cfg.future_len) // cfg.patch_len + 1
        widths = [12 * cfg.d_model]
        for dims in cfg.layers:
            scores = dims.lstm_heads * min(tokens, CHUNK)
            widths += [3 * dims.ffn, dims.variate_ffn, 3 * scores]
        widest = max(widths)
        return windows_that_fit(40 * tokens * widest)

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults, but for the gates of the recurrences.

        Linears U(+-1/sqrt(inputs)), their biases alike; the gates i and f of an mLSTM have no
        weights, biases N(0, 0.1^2) and from 3 to 6 over the heads; those of an sLSTM have weights
        N(0, 2 / 5D), no recurrent ones, and the bias of f falls from 5 to -7 over the channels of a
        head, faster in early blocks. Norms 1.
        """
        cfg = self.config

        # Two members, one read in both directions: so every part is called.
        tokens = jax.ShapeDtypeStruct((1, 2, 1, 2 * cfg.patch_len), jnp.float32)
        known = jax.ShapeDtypeStruct((1, 1), bool)
        seen = jax.ShapeDtypeStruct((1, 2, 2), bool)
        given = {"known_GA": known, "seen_GMM": seen, "mixed_GM": None}
        shapes = parameter_shapes(TiRex2Net(cfg), key, tokens, (1,), targets=1, last=1, **given)
        return draw(key, shapes, functools.partial(self._distribution, flatten(shapes)))

    def _distribution(self, flat: Mapping[str, Any], path: str, shape: tuple[int, ...]):
        cfg = self.config
        parts = path.split("/")
        if parts[-1] == "scale":
            return Constant(1.0)
        if "slstm" in parts:
            if parts[-1] == "recurrent":
                return Constant(0.0)
            if parts[-1] == "bias":
                place = int(parts[0].removeprefix("layer_")) / max(len(cfg.layers) - 1, 1)
                return functools.partial(_slstm_bias, place=place)
            return Normal(math.sqrt(2 / (5 * cfg.d_model)))
        if "mlstm" in parts and parts[-2] in ("i", "f"):
            if parts[-1] == "kernel":
                return Constant(0.0)
            return Normal(0.1) if parts[-2] == "i" else _mlstm_forget_bias
        return torch_linear(flat, path, heads=("/q", "/k", "/v", "/mlstm/gate")) or Constant(0.0)

    def recipe(self) -> Recipe:
        # No code for training is public.
        source = (
            "ours: nothing is published about fine-tuning TiRex-2; a rate and a batch as those of "
            "Chronos-Bolt, which has the same loss and about the same size; gradients clipped at 1"
        )
        context, horizon = min(self.context_len, 2048), min(self.horizon, 96)
        return self._recipe(
            lr=1e-5,
            batch_size=32,
            epochs=1,
            schedule="cosine",
            context_len=context,
            horizon=horizon,
            source=source,
            clip=1.0,
        )

    # --- the network around its scaling

    def scaled(
        self, x: jax.Array, loc: jax.Array, scale: jax.Array, binary: jax.Array
    ) -> jax.Array:
        """Bring x into the inner scale of the network; arguments as from `context_moments`."""
        z = (x - loc) / scale
        return jnp.where(binary, z, jnp.arcsinh(z)) if self.config.arcsinh else z

    def apply(
        self,
        params: Tree,
        x_GMT: jax.Array,
        *,
        both: Sequence[int] = (),
        seen: jax.Array | None = None,
        mixed: jax.Array | None = None,
        targets: int | None = None,
        last: int | None = None,
        key=None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One forward pass over windows: quantiles [G, C, N' P, Q] in the units of x, and taps.

        Args:
          x_GMT: windows of any length, NaN = missing; the last F steps are the future. Missing
            steps are put in front, up to whole patches.
          both: members that are read in both directions where anything of their future is known (in
            a window shorter than F, anyhow).
          seen: [G, M, M], which members (last axis) each member sees in the exchange; None: all.
          mixed: [G, M], which members take part in it; None: all, or none where there is but one.
          targets: C, of how many members, the first ones, forecasts are wanted; None: of all.
          last: N', of how many tokens, the last ones; None: of all. What token i gives are the
            steps of patch i + 1: the last of them lie behind the window.

        Returns: the forecasts, and taps: `scaled` [G, C, N' P, Q], `loc`, `scale` and `binary`
          [G, M, 1], `known` [G, A], and the steps of the network by the names of its modules.
        """
        cfg, p = self.config, self.config.patch_len
        g, m, t = x_GMT.shape
        x_GMT = x_GMT.astype(jnp.float32)
        loc, scale, binary = context_moments(x_GMT, cfg.scale_eps, cfg.binary_aware)
        z_GMT = self.scaled(x_GMT, loc, scale, binary=binary)

        front = ((0, 0), (0, 0), (-t % p, 0))
        z_GMT = jnp.pad(z_GMT, front, constant_values=jnp.nan)
        observed = ~jnp.isnan(z_GMT)
        values_GMNP = jnp.where(observed, z_GMT, 0.0).reshape(g, m, -1, p)
        there_GMNP = observed.astype(jnp.float32).reshape(g, m, -1, p)
        tokens = jnp.concatenate([values_GMNP, there_GMNP], axis=-1)

        both = tuple(both)
        future = x_GMT[:, np.asarray(both, int), -cfg.future_len :]
        known = (~jnp.isnan(future)).any(axis=-1) | (t < cfg.future_len)
        if m == 1 and mixed is None:
            seen = None
        elif seen is None:
            seen = jnp.ones((g, m, m), bool)

        n = tokens.shape[2]
        targets, last = m if targets is None else targets, n if last is None else last
        options = {"targets": targets, "last": last, "key": key, "train": train}
        y_GCNQP, taps = run_network(
            TiRex2Net(cfg), params, tokens, both, known, seen, mixed, **options
        )
        y_GCRQ = jnp.swapaxes(y_GCNQP, 3, 4).reshape(g, targets, last * p, len(cfg.levels))
        taps |= {"scaled": y_GCRQ, "loc": loc, "scale": scale, "binary": binary, "known": known}

        loc, scale, binary = (a[:, :targets, :, None] for a in (loc, scale, binary))
        if cfg.arcsinh:
            wide = jnp.sinh(jnp.clip(y_GCRQ, -LONGEST_ARC, LONGEST_ARC))
            y_GCRQ = jnp.where(binary, y_GCRQ, wide)
        return y_GCRQ * scale + loc, taps

    def _future(
        self,
        params: Tree,
        x_GMT: jax.Array,
        steps: int,
        *,
        targets: int,
        future: jax.Array | None = None,
        pad: bool = True,
        key=None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Quantiles [G, C, R, Q] of the R = `steps` <= F steps after x, and the taps of `apply`.

        `scaled` among the taps is of these steps, too.

        Args:
          targets: C, the first members; the others are covariates, which do not see them.
          future: [G, A, R], what is known of the future of the last A members.
          pad: put missing steps in front, up to context_len; else up to whole patches.
        """
        cfg, p, f = self.config, self.config.patch_len, self.config.future_len
        x_GMT = x_GMT[..., -cfg.context_len :].astype(jnp.float32)
        g, m, t = x_GMT.shape
        front = max(cfg.context_len - t, 0) if pad else 0
        front += -(t + front) % p  # F is whole patches
        patches = -(-steps // p)
        if future is None:
            # Only the tokens that lead to these steps: later ones are not seen by them.
            ahead, last, both = (patches - 1) * p, patches, ()
        else:
            ahead, last, both = f, f // p + 1, range(m - future.shape[1], m)
        widths = ((0, 0), (0, 0), (front, ahead))
        window = jnp.pad(x_GMT, widths, constant_values=jnp.nan)
        if future is not None:
            window = window.at[:, np.asarray(both), front + t : front + t + steps].set(future)

        # Targets see every member, covariates each other alone.
        is_target_M = np.arange(m) < targets
        seen = jnp.broadcast_to(is_target_M[:, None] | ~is_target_M, (g, m, m))
        y_GCRQ, taps = self.apply(
            params, window, both=both, seen=seen, targets=targets, last=last, key=key, train=train
        )
        return y_GCRQ[:, :, :steps], taps | {"scaled": taps["scaled"][:, :, :steps]}

    # --- losses

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Quantile loss of the targets in the scale of each window; as far as one pass reaches.

        Without differencing and calibration. Covariates of the batch are further members of each
        row's group and have no loss of their own.
        """
        target = jnp.asarray(batch["target"])
        steps = target.shape[-1]
        self._require_reach(steps)
        x_GMT, future = with_covariates(batch["context"], batch.get("past"), batch.get("known"))
        _, taps = self._future(
            params, x_GMT, steps, targets=target.shape[1], future=future, key=key, train=train
        )
        return mean_observed(*self.errors(taps, target), batch)

    def errors(
        self, taps: Mapping[str, jax.Array], target_GCR: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Quantile loss of each step [G, C, R], the mean over levels, and which steps are observed.

        With e = y - q at level l it is max(l e, (l - 1) e), in the inner scale of the window.

        taps: of `apply`; `scaled` [G, C, R, Q] of these steps.
        """
        c = target_GCR.shape[1]
        observed = ~jnp.isnan(target_GCR)
        loc, scale, binary = (taps[name][:, :c] for name in ("loc", "scale", "binary"))
        y_GCR = self.scaled(jnp.where(observed, target_GCR, loc), loc, scale, binary=binary)
        return pinball(y_GCR, taps["scaled"], self.config.levels).mean(axis=-1), observed

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the median that `predict` gives; as far as one forward pass reaches."""
        target = jnp.asarray(batch["target"])
        steps = target.shape[-1]
        self._require_reach(steps)
        x_GMT, future = with_covariates(batch["context"], batch.get("past"), batch.get("known"))
        y_GCRQ = self._window(
            params, x_GMT, steps, targets=target.shape[1], future=future, key=key, train=train
        )
        return mse_observed(median_of(y_GCRQ, self.config.levels), target, batch)

    # --- forecasts

    def predict_with(
        self, params: Tree, context, horizon: int, *, past=None, known=None, key=None
    ) -> Forecast:
        """All variates of a row see each other; covariates are further members of each row's group,
        which the targets see. Point: the median.
        """
        check_context(context, horizon)
        x_GMT, future = with_covariates(context, past, known)
        y_GCRQ = self.rows(params, x_GMT, horizon, targets=context.shape[1], future=future)
        return Forecast(median_of(y_GCRQ, self.config.levels), y_GCRQ, levels=self.config.levels)

    def rows(
        self,
        params: Tree,
        x_GMT: jax.Array,
        horizon: int,
        *,
        targets: int | None = None,
        future: jax.Array | None = None,
        pad: bool = True,
    ) -> jax.Array:
        """Quantiles [G, C, R, Q] of the R = `horizon` steps after x, for groups with covariates.

        Args:
          x_GMT: targets, then covariates known in the past only, then those known ahead; NaN =
            missing.
          targets: C; all members by default.
          future: [G, A, R], the future of the last A members.
          pad: as `_future` has it; the original's `pad_context`. A horizon beyond F pads anyhow.
        """
        f, targets = self.config.future_len, x_GMT.shape[1] if targets is None else targets
        if horizon <= f:
            return self._window(params, x_GMT, horizon, targets=targets, future=future, pad=pad)

        # One program for all windows: a context of one length, missing values in front.
        count = -(-horizon // f)
        missing = max(self.config.context_len - x_GMT.shape[-1], 0)
        x_GMT = jnp.pad(x_GMT, ((0, 0), (0, 0), (missing, 0)), constant_values=jnp.nan)
        parts = None
        if future is not None:
            more = ((0, 0), (0, 0), (0, count * f - horizon))
            future = jnp.pad(future, more, constant_values=jnp.nan)
            parts = jnp.moveaxis(future.reshape(*future.shape[:2], count, f), 2, 0)

        def step(x_GMT, known_GAF):
            y_GCFQ = self._window(params, x_GMT, f, targets=targets, future=known_GAF)
            # Of covariates known in the past only, nothing is known from here on.
            new = jnp.full((*x_GMT.shape[:2], f), jnp.nan)
            new = new.at[:, :targets].set(median_of(y_GCFQ, self.config.levels))
            if known_GAF is not None:
                new = new.at[:, x_GMT.shape[1] - known_GAF.shape[1] :].set(known_GAF)
            return jnp.concatenate([x_GMT, new], axis=-1)[..., f:], y_GCFQ

        _, found = jax.lax.scan(step, x_GMT, parts, length=count)
        return end_to_end(found)[:, :, :horizon]

    def _window(
        self,
        params: Tree,
        x_GMT: jax.Array,
        steps: int,
        *,
        targets: int,
        future: jax.Array | None = None,
        pad: bool = True,
        key=None,
        train: bool = False,
    ) -> jax.Array:
        """Quantiles of at most F steps as `predict` gives them; arguments as of `_future`."""
        cfg, g = self.config, x_GMT.shape[0]
        if cfg.sign_flip:
            x_GMT = jnp.concatenate([x_GMT, -x_GMT])
            future = None if future is None else jnp.concatenate([future, -future])

        own_GCT = x_GMT[:, :targets]
        summed_GC = jnp.zeros(own_GCT.shape[:2], bool)
        level_GC = jnp.zeros(own_GCT.shape[:2])
        if cfg.difference:
            summed_GC = has_trend(own_GCT)
            change_GCT, level_GC1 = differences(own_GCT, cfg.zero_at_start)
            level_GC = level_GC1[..., 0]
            own_GCT = jnp.where(summed_GC[..., None], change_GCT, own_GCT)
            x_GMT = jnp.concatenate([own_GCT, x_GMT[:, targets:]], axis=1)

        y_GCRQ, _ = self._future(
            params, x_GMT, steps, targets=targets, future=future, pad=pad, key=key, train=train
        )
        y_GCRQ = calibrated(y_GCRQ, summed_GC, level_GC)
        if cfg.sign_flip:
            y_GCRQ = (y_GCRQ[:g] - y_GCRQ[g:, ..., ::-1]) / 2
        return y_GCRQ

    def embed(self, params: Tree, context: jax.Array) -> jax.Array:
        """The output of the last block [B, C, N, D]: a token for each patch of the context.

        The context is filled up in front to context_len, as for a forecast.
        """
        p = self.config.patch_len
        x_GMT, targets = jnp.asarray(context), context.shape[1]
        _, taps = self._future(params, x_GMT, p, targets=targets)
        return taps[f"layer_{len(self.config.layers) - 1}"]


def _slstm_bias(key: jax.Array, shape: tuple[int, ...], place: float) -> jax.Array:
    """Bias [H, 4, E] of an sLSTM: of f 5 - 12 u^(0.3 + 1.3 place), u from 0 to 1 over the channels.

    place: of the block, from 0 for the first to 1 for the last.
    """
    h, gates, e = shape
    u = np.arange(e) / max(e - 1, 1)
    bias = np.zeros((h, gates, e), np.float32)
    bias[:, 1] = 5 - 12 * u ** (0.3 + 1.3 * place)
    return jnp.asarray(bias)


def _mlstm_forget_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.linspace(3, 6, shape[0], dtype=np.float32).reshape(shape))
