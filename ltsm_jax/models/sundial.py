"""Sundial: a decoder-only Transformer over patches whose forecasts are drawn by flow matching.

Liu et al., "Sundial: A Family of Highly Capable Time Series Foundation Models" (ICML 2025, arXiv
2502.00816). Follows the hub's remote code of thuml/sundial-base-128m (as vendored in sktime commit
7bd7d16). The Transformer's state at a patch is the condition z of a small network that predicts,
from a noised version, the Q points that follow. It predicts the CLEAN points, not the velocity;
sampling integrates `net(x, t, z) - noise` by Euler's method, with the noise it began with all
along. A longer horizon goes on from the median of the samples, point by point (of an even number
the lower of the two in the middle), so that all samples share one path.

Differences by default, where the original has a slip: `loss` scales context and target as
forecasting does (the original's training forward has another rule: 1 in the place of standard
deviations up to 0.01), and a mask of target points goes with its own row (the original tiles it
over rows of another order).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.causal import CausalAttention, causal_mask, empty_cache, roll_out
from ltsm_jax.layers.context import check_context, row_keys
from ltsm_jax.layers.dims import LayerDims, equal_layers, head_width, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import draw, normal_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, mean_observed, mse_observed
from ltsm_jax.layers.mlp import ACTIVATIONS, GatedMLP
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.patches import token_labels
from ltsm_jax.models.configs import HiddenAct, field_problems, refuse
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

EPS = 1e-5  # added to the standard deviation of the context
# of the rotary positions, whatever rope_theta the published config names: the original never reads
# it
BASE = 10000.0
PATCHES = 180  # of the longest context that the checkpoint was trained with: 2880 points
TIME_FEATURES = 256
LEVELS = tuple(q / 10 for q in range(1, 10))

MAX_FLOW_DEPTH = 64  # the published has 3


@dataclasses.dataclass(frozen=True)
class SundialConfig:
    """Widths are per layer, so that a pruned model is of the same class.

    patch_len P, horizon Q (points of one draw), d_model D, head_dim K, layers: H, K and F of each,
    embed_dim: width inside the patch embedding, flow_depth: residual blocks of the flow
    network, sampling_steps of Euler's method, train_draws: noised targets per token in training,
    n_samples of `predict` (their mean is the point forecast), context_len in time steps.
    """

    patch_len: int
    horizon: int
    d_model: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    embed_dim: int
    flow_depth: int
    context_len: int
    sampling_steps: int = 50
    train_draws: int = 4
    n_samples: int = 20
    activation: HiddenAct = "silu"
    dropout: float = 0.1
    init_std: float = 0.02
    max_positions: int = 10000  # of the original's rotary table, which grows on demand

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim, scores={"attn": "pairs"})
        sizes = ("patch_len", "horizon", "d_model", "head_dim", "embed_dim", "context_len")
        counts = ("sampling_steps", "train_draws", "n_samples", "max_positions")
        problems += field_problems(self, *sizes, *counts)
        if not 0 <= self.flow_depth <= MAX_FLOW_DEPTH:
            problems.append(f"flow_depth must be 0 to {MAX_FLOW_DEPTH}, got {self.flow_depth}")
        if self.head_dim % 2:
            problems.append(
                f"heads must have an even width for the rotary positions, got {self.head_dim}"
            )
        refuse(self, problems)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "SundialConfig":
        """From the fields of the hub's config.json. The context is not among them: 180 patches are
        taken.
        """
        d_model, heads = fields["hidden_size"], fields["num_attention_heads"]
        layers, ffn = fields["num_hidden_layers"], fields["intermediate_size"]
        head_dim = head_width(d_model, heads)
        return cls(
            patch_len=fields["input_token_len"],
            horizon=fields["output_token_lens"][-1],
            d_model=d_model,
            head_dim=head_dim,
            layers=equal_layers(layers, heads, head_dim, ffn=ffn),
            embed_dim=ffn,
            flow_depth=fields.get("flow_loss_depth", 3),
            context_len=PATCHES * fields["input_token_len"],
            sampling_steps=fields.get("num_sampling_steps", 50),
            train_draws=fields.get("diffusion_batch_mul", 4),
            activation=fields.get("hidden_act", "silu"),
            dropout=fields.get("dropout_rate", 0.1),
            init_std=fields.get("initializer_range", 0.02),
            max_positions=fields.get("max_position_embeddings", 10000),
        )


PRESETS = {
    "thuml/sundial-base-128m": SundialConfig(
        patch_len=16,
        horizon=720,
        d_model=768,
        head_dim=64,
        layers=equal_layers(12, 12, 64, ffn=3072),
        embed_dim=3072,
        flow_depth=3,
        context_len=2880,
    )
}


class Block(nn.Module):
    """Pre-norm block [B, N, D] -> [B, N, D], the named steps in it, and its cache."""

    cfg: SundialConfig
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BND, positions_BN, mask_BHNS, cache, start, train: bool):
        cfg, taps = self.cfg, {}
        y_BND = taps["norm1"] = nn.LayerNorm(1e-5, dtype=x_BND.dtype, name="norm1")(x_BND)
        attention = CausalAttention(
            cfg.d_model, self.dims.attn, cfg.head_dim, base=BASE, dropout=cfg.dropout, name="attn"
        )
        y_BND, taps["attn_weights"], cache = attention(
            y_BND, positions_BN, mask_BHNS, cache=cache, start=start, train=train
        )
        taps["attn"] = y_BND
        x_BND = x_BND + y_BND
        y_BND = taps["norm2"] = nn.LayerNorm(1e-5, dtype=x_BND.dtype, name="norm2")(x_BND)
        y_BND = taps["mlp"] = GatedMLP(self.dims.ffn, cfg.activation, name="mlp")(y_BND)
        return x_BND + y_BND, taps, cache


class SundialNet(nn.Module):
    """Scaled points [B, L] -> states z of their patches [B, N, D], the named steps, and the caches.

    A length that is no multiple of P is padded with zeros on the left; a second half of each
    patch's features says which points are no padding. caches, start: of the tokens before these.
    """

    cfg: SundialConfig

    @nn.compact
    def __call__(self, x_BL, caches=None, start=0, train: bool = False):
        cfg, kept = self.cfg, []
        (b, length), p, d = x_BL.shape, cfg.patch_len, cfg.d_model
        pad = ((0, 0), (-length % p, 0))
        patches = (jnp.pad(y_BL, pad).reshape(b, -1, p) for y_BL in (x_BL, jnp.ones_like(x_BL)))
        u_BNP = jnp.concatenate(list(patches), axis=-1)
        n = u_BNP.shape[1]
        h_BNF = Linear((2 * p,), (cfg.embed_dim,), name="embed_hidden")(u_BNP)
        y_BND = Linear((cfg.embed_dim,), (d,), name="embed_out")(ACTIVATIONS[cfg.activation](h_BNF))
        y_BND = Dropout(cfg.dropout)(y_BND, train)
        residual_BND = Linear((2 * p,), (d,), name="embed_residual")(u_BNP)
        x_BND = y_BND + residual_BND
        taps = {
            "patches": u_BNP,
            "embed_hidden": h_BNF,
            "embed_residual": residual_BND,
            "embed": x_BND,
        }
        positions_BN = (start + jnp.arange(n))[None]
        mask_BHNS = causal_mask(n, n if caches is None else caches[0][0].shape[2], start)
        # A loop and no scan: pruned layers differ in width.
        for i, dims in enumerate(cfg.layers):
            cache = None if caches is None else caches[i]
            x_BND, inner, cache = Block(cfg, dims, name=f"layer_{i}")(
                x_BND, positions_BN, mask_BHNS, cache=cache, start=start, train=train
            )
            taps |= nested(f"layer_{i}", inner, x_BND)
            kept.append(cache)
        z_BND = taps["norm"] = nn.LayerNorm(1e-5, dtype=x_BND.dtype, name="norm")(x_BND)
        return z_BND, taps, None if caches is None else kept


def time_features(t: jax.Array) -> jax.Array:
    """256 features of a time in [0, 1], [...] -> [..., 256]: cosines, then sines, of 1000 t at 128
    frequencies.
    """
    half = TIME_FEATURES // 2
    # on the host, rounded as in the original: angles reach 1000, where the last place of a
    # frequency is seen
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = 1000.0 * t[..., None] * frequency.reshape((1,) * t.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class FlowNet(nn.Module):
    """Noised points x [R, S, Q] at times t [R or 1, S or 1] under conditions z [R, 1, D] -> clean
    points [R, S, Q].

    S draws under one condition share what depends on time and condition alone. Returns the named
    steps, too.
    """

    cfg: SundialConfig

    @nn.compact
    def __call__(self, x_RSQ, t_RS, z_R1D):
        cfg, taps, d = self.cfg, {}, self.cfg.d_model

        def modulated(y, shift, scale):
            return y * (1 + scale) + shift

        x_RSD = taps["input_proj"] = Linear((cfg.horizon,), (d,), name="input")(x_RSQ)
        taps["time_freq"] = time_features(t_RS)
        time_in = Linear((TIME_FEATURES,), (d,), name="time_in")
        y_RSD = nn.silu(time_in(taps["time_freq"].astype(x_RSQ.dtype)))
        y_RSD = taps["time_embed"] = Linear((d,), (d,), name="time_out")(y_RSD)
        taps["cond_embed"] = Linear((d,), (d,), name="condition")(z_R1D)
        y_RSD = nn.silu(y_RSD + taps["cond_embed"])
        for k in range(cfg.flow_depth):
            name = f"block_{k}"
            # Time and condition say how each block shifts, scales and lets through.
            modulation = Linear((d,), (3 * d,), name=f"{name}_modulation")
            shift, scale, gate = jnp.split(modulation(y_RSD), 3, axis=-1)
            h_RSD = nn.LayerNorm(1e-6, dtype=x_RSD.dtype, name=f"{name}_norm")(x_RSD)
            h_RSD = nn.silu(Linear((d,), (d,), name=f"{name}_in")(modulated(h_RSD, shift, scale)))
            out = Linear((d,), (d,), name=f"{name}_out")
            x_RSD = taps[f"res_block{k}"] = x_RSD + gate * out(h_RSD)
        shift, scale = jnp.split(Linear((d,), (2 * d,), name="final_modulation")(y_RSD), 2, axis=-1)
        plain = nn.LayerNorm(
            1e-6, use_bias=False, use_scale=False, dtype=x_RSD.dtype, name="final_norm"
        )
        final = Linear((d,), (cfg.horizon,), name="final")
        y_RSQ = taps["final_layer"] = final(modulated(plain(x_RSD), shift, scale))
        return y_RSQ, taps


@dataclasses.dataclass(frozen=True)
class Sundial(Model):
    """Sundial at one size. See the module docstring; `Model` documents the methods."""

    config: SundialConfig

    family = "sundial"
    published = PRESETS
    heads = ("flow",)
    tasks = ("forecasting",)
    licence = "Apache-2.0 (thuml/sundial-base-128m)"
    shard_rules = (
        (r"^embed_(hidden|residual)/kernel$", (None, "fsdp")),
        (r"^embed_out/kernel$", ("fsdp", None)),
        (r"^flow/.*/kernel$", ("fsdp", None)),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn", scores="pairs"), Group.units("mlp"))

    @classmethod
    def small(cls) -> SundialConfig:
        return SundialConfig(
            patch_len=8,
            horizon=16,
            d_model=16,
            head_dim=8,
            layers=equal_layers(2, 2, 8, ffn=24),
            embed_dim=24,
            flow_depth=1,
            context_len=48,
            sampling_steps=4,
            train_draws=2,
            n_samples=3,
        )

    @property
    def eval_batch(self) -> int:
        # attention weights take 2 MB a window and layer at the published sizes, draws 2 MB a window
        return 128

    def init(self, key: jax.Array) -> Tree:
        """N(0, init_std^2) for every matrix, the flow network's included, biases 0, norms 1
        and 0.
        """
        cfg = self.config

        def of(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        shapes = dict(parameter_shapes(SundialNet(cfg), key, of(1, cfg.patch_len)))
        network = FlowNet(cfg, name="flow")
        shapes["flow"] = parameter_shapes(
            network, key, of(1, 1, cfg.horizon), of(1, 1), of(1, 1, cfg.d_model)
        )

        return draw(key, shapes, normal_rule(cfg.init_std))

    def recipe(self) -> Recipe:
        source = (
            "no fine-tuning code is published; rate, schedule and length of the same authors' "
            "Timer-XL script"
        )
        return self._recipe(lr=5e-6, batch_size=256, epochs=10, schedule="cosine", source=source)

    # --- the networks

    def apply(self, params: Tree, x_BCT: jax.Array, key=None, train=False):
        """States z of the patches of a scaled series, [B, C, N, D], and the named steps; no scaling
        is done.
        """
        b, c, t = x_BCT.shape
        z_BND, taps, _ = self._net(
            params, x_BCT.reshape(b * c, t).astype(jnp.float32), key, train=train
        )
        return z_BND.reshape(b, c, *z_BND.shape[1:]), taps

    def _net(self, params: Tree, x_BL, key=None, train=False, **rest) -> Any:
        trunk = {name: leaf for name, leaf in params.items() if name != "flow"}
        return run_network(SundialNet(self.config), trunk, x_BL, key=key, train=train, **rest)

    def flow(self, params: Tree, x_RSQ: jax.Array, t_RS: jax.Array, z_R1D: jax.Array):
        """The clean points [R, S, Q] that the flow network sees in x, and the named steps; see
        `FlowNet`.
        """
        network = FlowNet(self.config, name="flow")
        return run_network(network, params["flow"], x_RSQ, t_RS, z_R1D)

    def sample(self, params: Tree, z_BD: jax.Array, noise_BSQ: jax.Array) -> jax.Array:
        """Draws of the next Q points [B, S, Q] under conditions z, from standard normal `noise`, in
        scaled units.
        """
        steps = self.config.sampling_steps

        def step(x_BSQ, i):
            t_11 = jnp.full((1, 1), i.astype(jnp.float32) / steps)
            clean_BSQ, _ = self.flow(params, x_BSQ, t_11, z_R1D=z_BD[:, None])
            return x_BSQ + (clean_BSQ - noise_BSQ) / steps, None

        return jax.lax.scan(step, noise_BSQ, jnp.arange(steps))[0]

    # --- training

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Flow-matching loss of every token in the scale of the context: sum over the next Q points
        of the squared error of the clean points, weighed by 1/j; mean over tokens and draws.

        NaN in the target, and what lies past its end, does not count. The context is cut to its
        newest whole patches. Without a key the draws are the same each time.
        """
        p, q = self.config.patch_len, self.config.horizon
        context = batch["context"].astype(jnp.float32)
        if context.shape[-1] < p:
            raise ValueError(
                f"the loss needs a context of one patch ({p}), got {context.shape[-1]} steps"
            )
        context = context[..., context.shape[-1] % p :]
        mean_BC1, std_BC1 = moments(fill_missing(context))
        series_BCT = (jnp.concatenate([context, batch["target"]], axis=-1) - mean_BC1) / std_BC1
        x_BCT = fill_missing(series_BCT[..., : context.shape[-1]])
        (b, c), n = context.shape[:2], context.shape[-1] // p
        # Every token has draws of its own, and a loss without a key the same ones each time.
        own_key = jax.random.key(0) if key is None else key
        noise_key, time_key, drop_key = jax.random.split(own_key, 3)
        rows = (self.config.train_draws, b * c * n)
        noise, t = jax.random.normal(noise_key, (*rows, q)), jax.random.uniform(time_key, rows)
        return self.token_loss(
            params,
            x_BCT,
            series_BCT[..., p:],
            noise_MRQ=noise,
            t_MR=t,
            batch=batch,
            key=drop_key,
            train=train and key is not None,
        )

    def token_loss(
        self,
        params: Tree,
        x_BCT,
        labels_BCT,
        noise_MRQ,
        t_MR,
        weight_BCN=None,
        points_BCNQ=None,
        batch: Batch | None = None,
        key=None,
        train=False,
    ) -> jax.Array:
        """The original's loss with its draws as arguments, of a series x (whole patches) and
        `labels`, the series one patch on, in scaled units.

        Args:
          noise_MRQ, t_MR: M draws for each of the R = B*C*N tokens, variate after variate of row
            after row.
          weight_BCN: of each token. points_BCNQ: of each of its points. NaN labels, and those past
            the end, count 0.
        """
        p, q = self.config.patch_len, self.config.horizon
        z_BCND, _ = self.apply(params, x_BCT, key=key, train=train)
        (b, c, n, d), draws = z_BCND.shape, noise_MRQ.shape[0]
        want_BCNQ = token_labels(labels_BCT, n, p, points=q)
        count_BCNQ = (~jnp.isnan(want_BCNQ)).astype(jnp.float32)
        token_BCN = count_BCNQ.max(-1)  # a token without any label is no token
        count_BCNQ = count_BCNQ if points_BCNQ is None else count_BCNQ * points_BCNQ
        token_BCN = token_BCN if weight_BCN is None else token_BCN * weight_BCN

        # Noised targets, and what the network makes of them.
        want_R1Q = jnp.nan_to_num(want_BCNQ).reshape(-1, 1, q)
        noise_RMQ, t_RM = jnp.swapaxes(noise_MRQ, 0, 1), t_MR.T
        noised_RMQ = t_RM[..., None] * want_R1Q + (1 - t_RM[..., None]) * noise_RMQ
        clean_RMQ, _ = self.flow(params, noised_RMQ, t_RM, z_R1D=z_BCND.reshape(-1, 1, d))
        weight_Q = (1.0 / jnp.arange(1, q + 1)).reshape(1, 1, q) * count_BCNQ.reshape(-1, 1, q)
        error_R = (weight_Q * jnp.square(clean_RMQ - want_R1Q)).sum((1, 2))
        error_BCN = error_R.reshape(b, c, n) / draws
        return mean_observed(error_BCN, token_BCN, batch or {})

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the mean of `n_samples` forecasts, through the sampling."""
        point_BCH = self._samples(
            params, batch["context"], batch["target"].shape[-1], key=key, train=train
        ).mean(-1)
        return mse_observed(point_BCH, batch["target"], batch)

    # --- forecasting

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """`n_samples` draws, their quantiles, and as point forecast their mean; rolled out as the
        module says.

        The context is cut to its newest `context_len` steps; missing values take the last value
        before them.
        """
        check_context(context, horizon)
        samples_BCHS = self._samples(params, context, horizon, key=key)
        quantiles = jnp.moveaxis(jnp.quantile(samples_BCHS, jnp.asarray(LEVELS), axis=-1), 0, -1)
        return Forecast(samples_BCHS.mean(-1), quantiles, samples=samples_BCHS, levels=LEVELS)

    def _samples(self, params: Tree, context_BCT, horizon: int, key=None, train=False) -> jax.Array:
        cfg, (b, c, _) = self.config, context_BCT.shape
        x_BCT = fill_missing(jnp.asarray(context_BCT, jnp.float32))[..., -self.context_len :]
        x_BL = x_BCT.reshape(b * c, -1)
        shape = (math.ceil(horizon / cfg.horizon), cfg.n_samples, cfg.horizon)
        noise_BTSQ = jax.vmap(lambda k: jax.random.normal(k, shape))(row_keys(key, x_BL))
        noise_TBSQ = jnp.swapaxes(noise_BTSQ, 0, 1)
        y_BSH = self.generate(params, x_BL, horizon, noise_TBSQ=noise_TBSQ, key=key, train=train)
        return jnp.swapaxes(y_BSH, 1, 2).reshape(b, c, horizon, -1)

    def generate(
        self,
        params: Tree,
        x_BL: jax.Array,
        horizon: int,
        noise_TBSQ: jax.Array,
        scaled=False,
        key=None,
        train=False,
    ) -> jax.Array:
        """S draws of `horizon` points [B, S, horizon] after x [B, L], in its units.

        Args:
          noise_TBSQ: standard normal noise of each step of the roll-out, ceil(horizon / Q) of them.
          scaled: x is in scaled units already.
        """
        cfg = self.config
        mean_B1, std_B1 = (jnp.zeros((1, 1)), jnp.ones((1, 1))) if scaled else moments(x_BL)
        z_BL = (x_BL - mean_B1) / std_B1
        sizes = [cfg.horizon] * noise_TBSQ.shape[0]
        if cfg.horizon % cfg.patch_len and len(sizes) > 1:
            y_BSH = self._generate_anew(params, z_BL, noise_TBSQ, key=key, train=train)
        else:
            y_BSH = self._generate_cached(
                params, z_BL, noise_TBSQ, sizes=sizes, key=key, train=train
            )
        return y_BSH[..., :horizon] * std_B1[:, None] + mean_B1[:, None]

    def _generate_cached(self, params, z_BL, noise_TBSQ, sizes, key, train) -> jax.Array:
        cfg = self.config
        room = -(-z_BL.shape[-1] // cfg.patch_len) + sum(sizes[:-1]) // cfg.patch_len

        def step(state, points_BL, _):
            caches, start, i = state
            z_BND, _, caches = self._net(
                params, points_BL, key, train=train, caches=caches, start=start
            )
            y_BSQ = self.sample(params, z_BND[:, -1], noise_TBSQ[i])
            return (caches, start + z_BND.shape[1], i + 1), median(y_BSQ), y_BSQ

        # without a further step there is nothing to keep
        heads = [dims.attn for dims in cfg.layers]
        caches = None if len(sizes) == 1 else empty_cache(z_BL.shape[0], room, heads)
        return roll_out(step((caches, 0, 0), z_BL, sizes[0]), step, sizes)

    def _generate_anew(self, params, z_BL, noise_TBSQ, key, train) -> jax.Array:
        """Draws that are no whole number of patches move the patches' borders: without cache (the
        original can't).
        """
        found = []
        for noise_BSQ in noise_TBSQ:
            state_BND, *_ = self._net(params, z_BL, key=key, train=train)
            found.append(self.sample(params, state_BND[:, -1], noise_BSQ))
            z_BL = jnp.concatenate([z_BL, median(found[-1])], axis=-1)
        return jnp.concatenate(found, axis=-1)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean, and biased standard deviation plus eps, over the last axis, which stays with length 1;
    no gradient.
    """
    mean = x.mean(-1, keepdims=True)
    return jax.lax.stop_gradient(
        (mean, jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True)) + EPS)
    )


def median(y_BSQ: jax.Array) -> jax.Array:
    """Median over samples [B, Q], of an even number the lower of the two in the middle."""
    return jnp.sort(y_BSQ, axis=1)[:, (y_BSQ.shape[1] - 1) // 2]
