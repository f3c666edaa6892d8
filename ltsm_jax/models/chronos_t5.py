"""Chronos (the first generation): a T5 language model over the values of one variate, forecasting
by sampling.

Ansari et al., "Chronos: Learning the Language of Time Series" (TMLR 2024, arXiv 2403.07815).
Follows amazon-science/chronos-forecasting (commit 95185d1). The context is divided by its mean
absolute value and quantised: every time step is a token, one of some 4000 equal bins of the scaled
value. Encoder and decoder are T5's; the output layer is the embedding table again. A forecast is a
set of sampled paths: EOS is never drawn, and of the other tokens only the `top_k` likeliest.

Faithful oddities: special tokens (padding, which can be drawn) and the first ordinary one all
decode to the lowest bin; a roll-out feeds the LOWER of the two middle values back as the median;
special token 2 of 2 stands for no value at all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import t5
from ltsm_jax.layers.context import check_context, row_keys
from ltsm_jax.layers.initial import Normal, draw
from ltsm_jax.layers.missing import mean_observed
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.quantiles import DECILES
from ltsm_jax.models.configs import refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import T5_GROUPS, LayerStack
from ltsm_jax.trees import Tree

MEMORY = 2 << 30  # bytes that one forward pass of an evaluation may take, roughly


@dataclasses.dataclass(frozen=True)
class ChronosT5Config:
    """encoder, decoder: the T5 stacks, with widths per layer. vocab_size V: rows of the embedding
    table.

    n_tokens: ids that the tokenizer knows, of which the first `n_special` are no values; low, high:
    centres of the first and the last bin, in multiples of the context's mean absolute value. pad,
    eos, start: token ids; use_eos: the context (and a target) ends with EOS. context_len, horizon:
    time steps; n_samples, temperature, top_k (None: all), top_p: of the sampling. missing_prob: in
    training each series loses a share of its values, drawn from U(0, this). init_factor: of the
    initialisation.
    """

    encoder: t5.StackConfig
    decoder: t5.StackConfig
    vocab_size: int = 4096
    n_tokens: int = 4096
    n_special: int = 2
    low: float = -15.0
    high: float = 15.0
    pad: int = 0
    eos: int = 1
    start: int = 0
    use_eos: bool = True
    context_len: int = 512
    horizon: int = 64
    n_samples: int = 20
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    missing_prob: float = 0.2
    init_factor: float = 0.05

    def __post_init__(self):
        problems = []
        if (
            self.encoder.is_decoder
            or not self.decoder.is_decoder
            or self.encoder.d_model != self.decoder.d_model
        ):
            problems.append("encoder and decoder must be what they are called, and of one width")
        if (
            self.n_special < 0
            or self.n_tokens < self.n_special + 3
            or self.vocab_size < self.n_tokens
        ):
            problems.append(
                f"{self.n_tokens} tokens must hold {self.n_special} special ones and two bins or "
                f"more, and fit into {self.vocab_size} embeddings"
            )
        if not all(0 <= token < self.vocab_size for token in (self.pad, self.eos, self.start)):
            problems.append(
                f"pad, eos and start must be token ids: {self.pad}, {self.eos}, {self.start}"
            )
        if not -1e19 < self.low < self.high < 1e19:
            problems.append(f"low ({self.low}) must lie below high ({self.high})")
        if min(self.context_len, self.horizon, self.n_samples, self.top_k or 1) < 1:
            problems.append("context_len, horizon, n_samples and top_k must be at least 1")
        if not 0 < self.temperature < math.inf or not 0 <= self.top_p <= 1:
            problems.append(
                f"temperature must be positive, top_p in [0, 1]: {self.temperature}, {self.top_p}"
            )
        if not 0 <= self.missing_prob < 1 or not self.init_factor >= 0:
            problems.append("missing_prob must lie in [0, 1), init_factor must not be negative")
        refuse(self, problems)

    @property
    def d_model(self) -> int:
        """D."""
        return self.encoder.d_model

    @classmethod
    def of(
        cls,
        d_model: int,
        d_kv: int,
        heads: int,
        d_ff: int,
        layers: int,
        decoder_layers: int | None = None,
        **rest,
    ) -> "ChronosT5Config":
        """Equal layers. rest: fields of this class, and of both stacks (n_buckets, max_distance,
        eps, dropout).
        """
        shared = {
            name: rest.pop(name)
            for name in ("n_buckets", "max_distance", "eps", "dropout")
            if name in rest
        }
        n = layers if decoder_layers is None else decoder_layers
        encoder = t5.StackConfig.of(d_model, d_kv, layers, heads=heads, ffn=d_ff, **shared)
        decoder = t5.StackConfig.of(d_model, d_kv, n, heads=heads, ffn=d_ff, decoder=True, **shared)
        return cls(encoder, decoder, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "ChronosT5Config":
        """Reads config.json of the hub: T5's fields, and the tokenizer's and sampler's under
        `chronos_config`.

        Raises: ValueError naming the fields that are missing, or that say another architecture.
        """
        chronos = fields.get("chronos_config", {})
        top = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers")
        inner = {
            "chronos_config": (
                "n_tokens",
                "n_special_tokens",
                "pad_token_id",
                "eos_token_id",
                "context_length",
                "prediction_length",
            ),
            "chronos_config.tokenizer_kwargs": ("low_limit", "high_limit"),
        }
        require_fields("Chronos-T5", fields, top, inner=inner)
        limits = chronos["tokenizer_kwargs"]
        other = [
            f"{name} is {told!r}, not {known!r}"
            for name, told, known in (
                ("feed_forward_proj", fields.get("feed_forward_proj", "relu"), "relu"),
                ("tie_word_embeddings", fields.get("tie_word_embeddings", True), True),
                ("model_type", chronos.get("model_type", "seq2seq"), "seq2seq"),
                (
                    "tokenizer_class",
                    chronos.get("tokenizer_class", "MeanScaleUniformBins"),
                    "MeanScaleUniformBins",
                ),
            )
            if told != known
        ]
        if other:
            raise ValueError(f"not a Chronos-T5 as published: {'; '.join(other)}")
        return cls.of(
            *(int(fields[name]) for name in ("d_model", "d_kv", "num_heads", "d_ff", "num_layers")),
            decoder_layers=int(fields.get("num_decoder_layers") or fields["num_layers"]),
            n_buckets=int(fields.get("relative_attention_num_buckets", 32)),
            max_distance=int(fields.get("relative_attention_max_distance", 128)),
            eps=float(fields.get("layer_norm_epsilon", 1e-6)),
            dropout=float(fields.get("dropout_rate", 0.1)),
            vocab_size=int(fields["vocab_size"]),
            n_tokens=int(chronos["n_tokens"]),
            n_special=int(chronos["n_special_tokens"]),
            low=float(limits["low_limit"]),
            high=float(limits["high_limit"]),
            pad=int(chronos["pad_token_id"]),
            eos=int(chronos["eos_token_id"]),
            start=int(fields.get("decoder_start_token_id", chronos["pad_token_id"])),
            use_eos=bool(chronos.get("use_eos_token", True)),
            context_len=int(chronos["context_length"]),
            horizon=int(chronos["prediction_length"]),
            n_samples=int(chronos.get("num_samples", 20)),
            temperature=float(chronos.get("temperature", 1.0)),
            top_k=int(chronos.get("top_k") or 0) or None,
            top_p=float(chronos.get("top_p", 1.0)),
            init_factor=float(fields.get("initializer_factor", 1.0)),
        )


PRESETS = {
    f"amazon/chronos-t5-{name}": ChronosT5Config.of(*sizes)
    for name, sizes in {
        "tiny": (256, 64, 4, 1024, 4),
        "mini": (384, 64, 8, 1536, 4),
        "small": (512, 64, 8, 2048, 6),
        "base": (768, 64, 12, 3072, 12),
        "large": (1024, 64, 16, 4096, 24),
    }.items()
}


# --- the tokenizer


@functools.lru_cache
def bins(n: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres [n] of the bins and the boundaries [n + 1] around them, float32, bit by bit those of
    the original.

    Its centres are stepped from both ends towards the middle, each product and sum rounded once; a
    value on a boundary would fall into another bin with NumPy's own `linspace`.
    """
    step = np.float64(np.float32(np.float32(high) - np.float32(low)) / np.float32(n - 1))
    i = np.arange(n, dtype=np.float64)
    from_low = np.float64(np.float32(low)) + step * i
    from_high = np.float64(np.float32(high)) - step * (n - 1 - i)
    centres = np.where(i < n // 2, from_low, from_high).astype(np.float32)
    middles = (centres[1:] + centres[:-1]) / np.float32(2)
    limit = np.float32(1e20)
    return centres, np.concatenate([[-limit], middles, [limit]]).astype(np.float32)


def _bins(cfg: ChronosT5Config) -> tuple[np.ndarray, np.ndarray]:
    return bins(cfg.n_tokens - cfg.n_special - 1, cfg.low, cfg.high)


def mean_scale(x_BT: jax.Array) -> jax.Array:
    """Mean absolute value [B] of what is observed of x [B, T]; 1 where that is 0 or nothing is."""
    observed_BT = ~jnp.isnan(x_BT)
    total_B = jnp.where(observed_BT, jnp.abs(x_BT), 0.0).sum(-1)
    scale_B = total_B / jnp.maximum(observed_BT.sum(-1), 1)
    return jnp.where(scale_B > 0, scale_B, 1.0)


def tokenize(
    cfg: ChronosT5Config, x_BT: jax.Array, scale_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Token ids [B, T] of x [B, T], and where there is a value, [B, T]; ends with EOS, [B, T + 1],
    where the model uses it. Missing values (NaN) are padding. Values beyond the outer bins fall
    into them.
    """
    observed_BT = ~jnp.isnan(x_BT)
    z_BT = jnp.where(observed_BT, x_BT, 0.0) / scale_B[:, None]
    bin_BT = jnp.searchsorted(jnp.asarray(_bins(cfg)[1]), z_BT, side="right")
    ids_BT = jnp.where(observed_BT, jnp.clip(bin_BT + cfg.n_special, 0, cfg.n_tokens - 1), cfg.pad)
    if cfg.use_eos:
        ids_BT = jnp.pad(ids_BT, ((0, 0), (0, 1)), constant_values=cfg.eos)
        observed_BT = jnp.pad(observed_BT, ((0, 0), (0, 1)), constant_values=True)
    return ids_BT.astype(jnp.int32), observed_BT


def token_values(cfg: ChronosT5Config) -> np.ndarray:
    """[V]: what each token stands for, in multiples of the scale. Ids that are no value stand for
    the lowest bin.
    """
    centres, _ = _bins(cfg)
    return centres[np.clip(np.arange(cfg.vocab_size) - cfg.n_special - 1, 0, len(centres) - 1)]


# --- which token is drawn


def scores(cfg: ChronosT5Config, logits: jax.Array) -> jax.Array:
    """Logits [..., V] as the sampler sees them: EOS removed (-inf), divided by the temperature, all
    but the `top_k` highest removed (ties with the last of them stay), then the tail that `top_p`
    cuts off.
    """
    y = logits.astype(jnp.float32).at[..., cfg.eos].set(-jnp.inf)
    if cfg.temperature != 1:
        y = y / cfg.temperature
    if cfg.top_k is not None and cfg.top_k < cfg.vocab_size:
        y = jnp.where(y < kth_largest(y, cfg.top_k)[..., None], -jnp.inf, y)
    if cfg.top_p < 1:
        order = jnp.argsort(y, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(y, order, -1)), -1)
        cut = (below <= 1 - cfg.top_p).at[..., -1].set(False)  # the likeliest token always stays
        y = jnp.where(jnp.take_along_axis(cut, jnp.argsort(order, axis=-1), -1), -jnp.inf, y)
    return y


def kth_largest(x: jax.Array, k: int) -> jax.Array:
    """The k-th largest value along the last axis of x [..., V], float32; k from 1 to V.

    Found bit by bit, from the highest, by counting what lies above: 32 passes over the row. XLA's
    code for the CPU sorts the row for `top_k`, which takes 15 times as long for 4096 tokens, longer
    than the network itself.
    """
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Unsigned integers in the order of the floats.
    rank = jnp.where(bits >= sign, ~bits, bits | sign)

    def one(i, found):
        higher = found | (sign >> jnp.uint32(i))
        enough = (rank >= higher[..., None]).sum(-1, dtype=jnp.int32) >= k
        return jnp.where(enough, higher, found)

    found = jax.lax.fori_loop(0, 32, one, jnp.zeros(x.shape[:-1], jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)


def pick(y: jax.Array, u: jax.Array) -> jax.Array:
    """Token ids [...] drawn from scores [..., V] with uniform numbers u [...] in [0, 1): where the
    cumulative sum of the probabilities passes u. One random number a token; a Gumbel draw would
    take V of them.
    """
    p = jnp.exp(y - y.max(-1, keepdims=True))
    total = cumulative(p)
    # a sum made in parts need not grow monotonically to the last bit: only what has a probability
    # can be drawn
    at = u[..., None] * jnp.where(p > 0, total, 0.0).max(-1, keepdims=True)
    return jnp.argmax((p > 0) & (total > at), axis=-1)


def cumulative(p: jax.Array) -> jax.Array:
    """Cumulative sum along the last axis of p [..., V], as products with two small triangular
    matrices: inside blocks of about the root of V, and of the blocks before. `jnp.cumsum` takes
    longer, to compile too.
    """
    v = p.shape[-1]
    size = math.isqrt(v - 1) + 1
    blocks = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -v % size)]).reshape(*p.shape[:-1], -1, size)
    add = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    inside = add(blocks, jnp.tri(size, dtype=p.dtype).T)
    before = add(inside[..., -1], jnp.tri(blocks.shape[-2], k=-1, dtype=p.dtype).T)
    return (inside + before[..., None]).reshape(*p.shape[:-1], -1)[..., :v]


def pick_gumbel(y: jax.Array, noise: jax.Array) -> jax.Array:
    """Token ids [...] drawn from scores [..., V] with Gumbel noise [..., V]: for draws that were
    recorded.
    """
    return jnp.argmax(y + noise, axis=-1)


def forecast_of(samples: jax.Array, levels: tuple[float, ...] = DECILES) -> Forecast:
    """The forecast that sampled paths [B, C, H, samples] make: their mean, and their quantiles
    (interpolated).
    """
    quantiles_QBCH = jnp.quantile(samples, jnp.asarray(levels), axis=-1)
    return Forecast(samples.mean(-1), jnp.moveaxis(quantiles_QBCH, 0, -1), samples, levels=levels)


class ChronosT5Net(nn.Module):
    """Context tokens and the tokens so far -> logits of the next ones.

    Args:
      ids, observed: [R, S], the context's tokens and where they are no padding. ids None: the cache
        has it.
      so_far: [R', N], the tokens before those to be predicted, first the start token; R' = R, or a
        multiple of R in which several paths of one series follow each other. None: only the context
        is read, into a cache.
      cache, start: see `t5.Stack`.
    Returns: (logits [R', N, V] or None, the named steps, the decoder's cache). "memory" is the
    encoder's output.
    """

    cfg: ChronosT5Config

    @nn.compact
    def __call__(
        self, ids, observed, so_far, train: bool = False, *, cache: Any = None, start: Any = None
    ):
        cfg, taps, memory = self.cfg, {}, None
        shared_VD = self.param("shared", nn.initializers.zeros, (cfg.vocab_size, cfg.d_model))
        if ids is not None:
            memory, inner, _ = t5.Stack(cfg.encoder, name="encoder")(
                shared_VD[ids], observed, train=train
            )
            taps = {"memory": memory} | nested("encoder", inner)
        y_RND, inner, cache = t5.Stack(cfg.decoder, name="decoder")(
            None if so_far is None else shared_VD[so_far],
            memory=memory,
            memory_mask=observed,
            train=train,
            cache=cache,
            start=start,
        )
        if y_RND is None:
            return None, taps, cache
        logits_RNV = (y_RND * cfg.d_model**-0.5) @ shared_VD.T.astype(y_RND.dtype)
        return logits_RNV, taps | nested("decoder", inner), cache


@dataclasses.dataclass(frozen=True)
class ChronosT5(Model):
    """Chronos-T5 at one size. See the module docstring; `Model` documents the methods."""

    config: ChronosT5Config

    family = "chronos_t5"
    published = PRESETS
    # The output layer is the embedding of the input too.
    heads = ("shared",)
    tasks = ("forecasting", "embedding")
    licence = "Apache-2.0 (amazon/chronos-t5)"
    shard_rules = ((r"^shared$", ("tensor", "fsdp")), *t5.SHARD_RULES)
    stacks = (
        LayerStack("encoder", ("encoder", "layers")),
        LayerStack("decoder", ("decoder", "layers")),
    )
    prunable = T5_GROUPS

    @classmethod
    def small(cls) -> ChronosT5Config:
        return ChronosT5Config.of(
            16,
            6,
            2,
            d_ff=24,
            layers=2,
            n_buckets=8,
            max_distance=20,
            vocab_size=64,
            n_tokens=64,
            context_len=32,
            horizon=8,
            n_samples=6,
            top_k=50,
            init_factor=1.0,
        )

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def eval_batch(self) -> int:
        cfg, paths = self.config, self.config.n_samples
        s, n = cfg.context_len + 1, cfg.horizon
        own = [layer.attn.heads for layer in cfg.decoder.layers]
        cross = [layer.cross.heads for layer in cfg.decoder.layers if layer.cross]

        # Scores and weights of one layer, keys and values of the context, and of each path.
        row = 4 * s * s * max(layer.attn.heads for layer in cfg.encoder.layers) * 2
        row += 8 * s * cfg.encoder.head_dim * sum(cross)
        row += 8 * n * cfg.decoder.head_dim * sum(own) * paths
        row += 4 * paths * cfg.vocab_size * 6
        return max(1, min(256, MEMORY // row))

    def init(self, key: jax.Array) -> Tree:
        """T5's: normals with standard deviations from the fan-in, all times `init_factor`; norms
        are `init_factor`.
        """
        cfg = self.config
        ids_11 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = parameter_shapes(ChronosT5Net(cfg), key, ids_11, ids_11, ids_11)

        def rule(path, shape):
            if path == "shared":
                return Normal(cfg.init_factor)
            return t5.initial(path, shape, cfg.d_model, factor=cfg.init_factor)

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = (
            "scripts/training of chronos-forecasting: 1000 steps of AdamW from 1e-3, there with a "
            "linear decay"
        )
        return self._recipe(lr=1e-3, batch_size=32, epochs=1, schedule="cosine", source=source)

    # --- with the answer given

    def _net(self, params: Tree, *args, key=None, train=False, **rest) -> Any:
        return run_network(ChronosT5Net(self.config), params, *args, key=key, train=train, **rest)

    def apply(self, params: Tree, context: jax.Array, target: jax.Array, key=None, train=False):
        """Logits of the target's tokens, each given those before it: [R, N, V] for R = B * C
        series, and named steps.

        context: [B, C, T]. target: [B, C, horizon], NaN = missing. N = horizon, one more with EOS.
        The named steps hold "labels" [R, N], "scored" [R, N] (False where the target is missing),
        "scale" [R] and "ids" [R, S] too.
        """
        cfg = self.config
        x_RT = self._series(context)[:, -cfg.context_len :]
        y_RH = target.astype(jnp.float32).reshape(x_RT.shape[0], -1)
        scale_R = mean_scale(x_RT)
        ids_RS, observed_RS = tokenize(cfg, x_RT, scale_R)
        labels_RN, scored_RN = tokenize(cfg, y_RH, scale_R)
        start_R1 = jnp.full((y_RH.shape[0], 1), cfg.start, labels_RN.dtype)
        so_far_RN = jnp.concatenate([start_R1, labels_RN[:, :-1]], axis=1)
        logits_RNV, taps, _ = self._net(
            params, ids_RS, observed_RS, so_far_RN, key=key, train=train
        )
        return logits_RNV, taps | {
            "labels": labels_RN,
            "scored": scored_RN,
            "scale": scale_R,
            "ids": ids_RS,
        }

    def _series(self, context: jax.Array) -> jax.Array:
        """Each variate a row: [R, T]."""
        return jnp.asarray(context, jnp.float32).reshape(-1, context.shape[-1])

    def _taught(self, params: Tree, batch: Batch, key: Any, train: bool):
        """`apply` to a batch whose target may be shorter than the horizon; in training with values
        left out.
        """
        cfg, (context, target) = self.config, (batch["context"], batch["target"])
        short = cfg.horizon - target.shape[-1]
        if short < 0:
            raise ValueError(
                f"Chronos-T5 learns {cfg.horizon} steps at a time, not {target.shape[-1]}; cut the "
                "target"
            )
        # What a target lacks at its end is missing, and has no part in the loss.
        end = ((0, 0), (0, 0), (0, short))
        target = jnp.pad(target.astype(jnp.float32), end, constant_values=jnp.nan)
        if train and key is not None and cfg.missing_prob:
            key, missing_key = jax.random.split(key)
            t = context.shape[-1]
            whole = jnp.concatenate([context.astype(jnp.float32), target], axis=-1)
            rows = (*whole.shape[:2], 1)
            share_BC1 = jax.random.uniform(missing_key, rows, maxval=cfg.missing_prob)
            lost = jax.random.uniform(jax.random.fold_in(missing_key, 1), whole.shape) < share_BC1
            whole = jnp.where(lost, jnp.nan, whole)
            context, target = whole[..., :t], whole[..., t:]
        return self.apply(params, context, target, key=key, train=train)

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Cross entropy of the target's tokens, EOS included: the mean over all of the batch that
        are not missing.

        A target shorter than the horizon is missing at its end; a longer one is an error. In
        training each series first loses a share of its values, up to `missing_prob`, as in the
        original's pipeline.
        """
        logits_RNV, taps = self._taught(params, batch, key, train=train)
        log_RNV = jax.nn.log_softmax(logits_RNV.astype(jnp.float32))
        nll_RN = -jnp.take_along_axis(log_RNV, taps["labels"][..., None], axis=-1)[..., 0]
        b = batch["context"].shape[0]
        return mean_observed(nll_RN.reshape(b, -1), taps["scored"].reshape(b, -1), batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the expected value under the predicted distribution of each step, given the true
        values before it.

        Of all tokens but EOS, without `top_k` and `top_p`: the mean of the samples, made
        differentiable. It differs from what `predict` forecasts as a taught path differs from a
        sampled one. In the (squared) units of the batch.
        """
        cfg, target = self.config, batch["target"]
        logits_RNV, taps = self._taught(params, batch, key, train=train)
        (b, c, h), values_V1 = target.shape, jnp.asarray(token_values(cfg))[:, None]
        open_RHV = logits_RNV[:, :h].astype(jnp.float32).at[..., cfg.eos].set(-jnp.inf)
        y_RH = (jax.nn.softmax(open_RHV) @ values_V1)[..., 0] * taps["scale"][:, None]
        observed = ~jnp.isnan(target)
        gap_BCH = y_RH.reshape(b, c, h) - jnp.where(observed, target, 0.0)
        error_BCH = jnp.where(observed, gap_BCH, 0.0)
        return mean_observed(jnp.square(error_BCH), observed, batch)

    # --- by sampling

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """`n_samples` paths, their mean as the point forecast and their quantiles at 0.1 to 0.9
        (0.5 is the median).

        The mean is what the original's pipeline calls the point forecast, and what an MSE asks for.
        Beyond the model's own horizon, block after block: the (lower) median of the paths is
        appended to the context in its own units, which is then scaled and quantised anew. The
        context is cut to its newest `context_len` steps.
        """
        check_context(context, horizon)
        x_RT = self._series(context)
        samples_RHN = self.sample(params, x_RT, horizon, keys=row_keys(key, x_RT))
        return forecast_of(samples_RHN.reshape(*context.shape[:2], horizon, -1))

    def sample(
        self, params: Tree, x_RT: jax.Array, horizon: int, keys: Any = None, gumbel: Any = None
    ) -> jax.Array:
        """Paths [R, horizon, n_samples] after each series of x [R, T], in its units.

        Args:
          keys: [R], one for each series; its draws are the same whatever the horizon and the other
            series are.
          gumbel: instead of keys, [steps, R * n_samples, V] with at least `horizon` steps: noise
            that was recorded.
        """
        cfg, r = self.config, x_RT.shape[0]
        blocks, paths = -(-horizon // cfg.horizon), cfg.n_samples
        length = min(horizon, cfg.horizon)  # of one block
        # Padding on the left changes nothing (it is hidden and positions are relative), so one
        # length serves all blocks.
        width = min(cfg.context_len, x_RT.shape[1] + (blocks - 1) * cfg.horizon)
        front = ((0, 0), (max(width - x_RT.shape[1], 0), 0))
        x_RW = jnp.pad(x_RT, front, constant_values=jnp.nan)[:, -width:]

        # Random numbers of each block and step, so that a longer horizon begins like a shorter one.
        if gumbel is None:
            draws = jax.vmap(lambda k: jax.random.uniform(k, (blocks * length * paths,)))(keys)
            draws = jnp.swapaxes(draws.reshape(r, -1, paths), 0, 1)
        else:
            missing = max(blocks * length - gumbel.shape[0], 0)
            draws = jnp.pad(jnp.asarray(gumbel), ((0, missing), (0, 0), (0, 0)))[: blocks * length]
            draws = draws.reshape(-1, r, paths, cfg.vocab_size)
        draws = draws.reshape(blocks, length, *draws.shape[1:])
        choose = pick if gumbel is None else pick_gumbel
        if blocks == 1:
            y_RNH = self._block(params, x_RW, draws[0], choose=choose, steps=length)
            return jnp.swapaxes(y_RNH, 1, 2)
        steps = jnp.full(blocks, length).at[-1].set(horizon - (blocks - 1) * length)

        def block(x_RW, per_block):
            y_RNH = self._block(params, x_RW, per_block[0], choose=choose, steps=per_block[1])
            # The lower one of two, as torch has it.
            middle_RH = jnp.sort(y_RNH, axis=1)[:, (paths - 1) // 2]
            return jnp.concatenate([x_RW, middle_RH], axis=1)[:, -width:], y_RNH

        _, y_SRNH = jax.lax.scan(block, x_RW, (draws, steps))
        return jnp.moveaxis(y_SRNH, (0, 3), (1, 2)).reshape(r, blocks * length, paths)[:, :horizon]

    def _block(
        self, params: Tree, x_RW: jax.Array, draws: jax.Array, choose: Callable, steps: Any
    ) -> jax.Array:
        """Paths [R, paths, length] of one block; of the `length` steps of draws [length, R, paths,
        ...] only the first `steps` are taken.
        """
        cfg, (length, r, paths) = self.config, draws.shape[:3]
        scale_R = mean_scale(x_RW)
        ids_RS, observed_RS = tokenize(cfg, x_RW, scale_R)
        # Once for all paths of a series.
        _, _, context = self._net(params, ids_RS, observed_RS, None)
        ids_RNS = jnp.full((r, paths, length + 1), cfg.start, ids_RS.dtype)

        def step(i, carry):
            ids_RNS, own = carry
            last = jax.lax.dynamic_slice_in_dim(ids_RNS, i, 1, axis=2).reshape(r * paths, 1)
            cache = {layer: context[layer] | own[layer] for layer in own}
            logits, _, cache = self._net(params, None, observed_RS, last, cache=cache, start=i)
            y_RNV = scores(cfg, logits.reshape(r, paths, -1))
            chosen_RN = choose(y_RNV, jax.lax.dynamic_index_in_dim(draws, i, keepdims=False))
            next_RN1 = chosen_RN[..., None].astype(ids_RNS.dtype)
            ids_RNS = jax.lax.dynamic_update_slice_in_dim(ids_RNS, next_RN1, i + 1, axis=2)
            # Keys and values of the context are the same in each step.
            kept = {}
            for layer, arrays in cache.items():
                kept[layer] = {"k": arrays["k"], "v": arrays["v"]}
            return ids_RNS, kept

        start = (ids_RNS, t5.empty_decoder_cache(cfg.decoder, r * paths, length))
        ids_RNS, _ = jax.lax.fori_loop(0, steps, step, start)
        return jnp.asarray(token_values(cfg))[ids_RNS[..., 1:]] * scale_R[:, None, None]

    def embed(self, params: Tree, context: jax.Array) -> jax.Array:
        """The encoder's output [B, C, S, D] for `context` [B, C, T]: a vector for each of the
        newest `context_len` steps, and a last one for EOS where the model uses it. The scale is not
        in it (`mean_scale` gives it).
        """
        check_context(context, 1)
        x_RT = self._series(context)[:, -self.config.context_len :]
        _, taps, _ = self._net(params, *tokenize(self.config, x_RT, mean_scale(x_RT)), None)
        return taps["memory"].reshape(*context.shape[:2], *taps["memory"].shape[1:])
