"""Timer as published on the Hugging Face hub (thuml/timer-base-84m): a decoder-only Transformer
over patches.

Liu et al., "Timer: Generative Pre-trained Transformers Are Large Time Series Models" (ICML 2024,
arXiv 2402.02368). Follows the hub's remote code (version 70077a7, as vendored in sktime commit
0eb40b6). Another network than `timer` (the checkpoints of Large-Time-Series-Model) and `timer_xl`
(OpenLTM): rotary positions on whole heads, gated feed-forward layers, no bias at the embedding and
at the heads. Prune-then-Finetune calls this checkpoint TimerXL.

The original's `generate` scales what it is fed at each step: with its cache that is, from the
second step on, the last few predicted points alone, while the cached tokens stand in the scale of
the context. Here every step has the scale of the context, as in Prune-then-Finetune's wrapper and
in the example of the checkpoint's own page; the original's numbers are behind `scaling`. The same
wrapper trains on scaled inputs and unscaled labels; here both have one scale.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.causal import (
    Cache,
    CausalAttention,
    causal_mask,
    empty_cache,
    greedy_sizes,
    roll_out,
)
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import LayerDims, equal_layers, head_width, layer_problems
from ltsm_jax.layers.initial import draw, normal_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, mean_observed
from ltsm_jax.layers.mlp import GatedMLP
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.patches import token_labels
from ltsm_jax.models.configs import HiddenAct, field_problems, refuse
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

EPS = 1e-6  # added to the standard deviation of the context (Prune-then-Finetune's wrapper)
# of the rotary positions, whatever rope_theta the published config names: the original never reads
# it
BASE = 10000.0
PATCHES = 30  # of the longest context that the checkpoint was trained with: 2880 points

Scaling = Literal["context", "fed", "sequence"]


@dataclasses.dataclass(frozen=True)
class TimerHfConfig:
    """Widths are per layer, so that a pruned model is of the same class.

    patch_len P, d_model D, head_dim K, layers: H, K and F of each, horizons: points that each head
    predicts, context_len in time steps. dropout: of the attention weights, in
    training only (the original drops in evaluation too; published: 0). scaling: "context" (see the
    module docstring), or the original's: "fed" (its default, with the cache) and "sequence"
    (without cache: the whole sequence anew at each step), both without any eps.
    """

    patch_len: int
    d_model: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    horizons: tuple[int, ...]
    context_len: int
    activation: HiddenAct = "silu"
    dropout: float = 0.0
    init_std: float = 0.02
    max_positions: int = 10000  # of the original's rotary table, which grows on demand
    scaling: Scaling = "context"

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim, scores={"attn": "pairs"})
        sizes = ("patch_len", "d_model", "head_dim", "context_len", "max_positions", "horizons")
        problems += field_problems(self, *sizes)
        if self.head_dim % 2:
            problems.append(
                f"heads must have an even width for the rotary positions, got {self.head_dim}"
            )
        if self.context_len < self.patch_len:
            problems.append(
                f"the context ({self.context_len}) must hold one patch ({self.patch_len})"
            )
        if len(set(self.horizons)) != len(self.horizons):
            problems.append(f"horizons must differ, got {self.horizons}")
        refuse(self, problems)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimerHfConfig":
        """From the fields of the hub's config.json. The context is not among them: 30 patches are
        taken.
        """
        d_model, heads = fields["hidden_size"], fields["num_attention_heads"]
        layers, ffn = fields["num_hidden_layers"], fields["intermediate_size"]
        head_dim = head_width(d_model, heads)
        return cls(
            patch_len=fields["input_token_len"],
            d_model=d_model,
            head_dim=head_dim,
            layers=equal_layers(layers, heads, head_dim, ffn=ffn),
            horizons=tuple(fields["output_token_lens"]),
            context_len=PATCHES * fields["input_token_len"],
            activation=fields.get("hidden_act", "silu"),
            dropout=fields.get("attention_dropout", 0.0),
            init_std=fields.get("initializer_range", 0.02),
            max_positions=fields.get("max_position_embeddings", 10000),
        )


PRESETS = {
    "thuml/timer-base-84m": TimerHfConfig(
        patch_len=96,
        d_model=1024,
        head_dim=128,
        layers=equal_layers(8, 8, 128, ffn=2048),
        horizons=(96,),
        context_len=2880,
    )
}


class Block(nn.Module):
    """Post-norm block [B, N, D] -> [B, N, D], the named steps in it, and its cache."""

    cfg: TimerHfConfig
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BND, positions_BN, mask_BHNS, cache, start, train: bool):
        cfg, taps = self.cfg, {}
        attention = CausalAttention(
            cfg.d_model, self.dims.attn, cfg.head_dim, base=BASE, dropout=cfg.dropout, name="attn"
        )
        a_BND, taps["attn_weights"], cache = attention(
            x_BND, positions_BN, mask_BHNS, cache=cache, start=start, train=train
        )
        taps["attn"] = a_BND
        x_BND = taps["norm1"] = nn.LayerNorm(1e-5, dtype=x_BND.dtype, name="norm1")(x_BND + a_BND)
        y_BND = taps["mlp"] = GatedMLP(self.dims.ffn, cfg.activation, name="mlp")(x_BND)
        return nn.LayerNorm(1e-5, dtype=x_BND.dtype, name="norm2")(x_BND + y_BND), taps, cache


class TimerHfNet(nn.Module):
    """Patches [B, N, P] -> what each head predicts after each of them, a list of [B, N, q]; named
    steps; caches.

    observed_BN: 0 for patches of padding on the left, which nobody sees. caches, start: of the
    tokens before these. last: heads at the last position only, [B, 1, q].
    """

    cfg: TimerHfConfig

    @nn.compact
    def __call__(
        self, p_BNP, observed_BN=None, caches=None, start=0, last: bool = False, train: bool = False
    ):
        cfg, taps, kept = self.cfg, {"patches": p_BNP}, []
        n = p_BNP.shape[1]
        embed = Linear((cfg.patch_len,), (cfg.d_model,), use_bias=False, name="embed")
        x_BND = taps["embed"] = embed(p_BNP)
        positions_BN = (start + jnp.arange(n))[None]
        if observed_BN is not None:
            positions_BN = jnp.where(observed_BN != 0, jnp.cumsum(observed_BN, axis=1) - 1, 1)
        mask_BHNS = causal_mask(
            n, n if caches is None else caches[0][0].shape[2], start=start, observed_BS=observed_BN
        )
        # A loop and no scan: pruned layers differ in width.
        for i, dims in enumerate(cfg.layers):
            cache = None if caches is None else caches[i]
            x_BND, inner, cache = Block(cfg, dims, name=f"layer_{i}")(
                x_BND, positions_BN, mask_BHNS, cache=cache, start=start, train=train
            )
            taps |= nested(f"layer_{i}", inner, x_BND)
            kept.append(cache)
        x_BND = taps["norm"] = nn.LayerNorm(1e-5, dtype=x_BND.dtype, name="norm")(x_BND)
        x_BND = x_BND[:, -1:] if last else x_BND
        heads = [
            Linear((cfg.d_model,), (q,), use_bias=False, name=f"head_{j}")(x_BND)
            for j, q in enumerate(cfg.horizons)
        ]
        return heads, taps, None if caches is None else kept


def unbiased_moments(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Mean, and unbiased standard deviation plus eps, over the last axis, which stays with length
    1.
    """
    mean = x.mean(-1, keepdims=True)
    return mean, jnp.sqrt(
        jnp.square(x - mean).sum(-1, keepdims=True) / max(x.shape[-1] - 1, 1)
    ) + eps


@dataclasses.dataclass(frozen=True)
class TimerHf(Model):
    """Timer of the hub at one size. See the module docstring; `Model` documents the methods."""

    config: TimerHfConfig

    family = "timer_hf"
    published = PRESETS
    tasks = ("forecasting",)
    licence = "Apache-2.0 (thuml/timer-base-84m)"
    shard_rules = (
        (r"^embed/kernel$", (None, "fsdp")),
        (r"^head_\d+/kernel$", ("fsdp", None)),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn", scores="pairs"), Group.units("mlp"))

    @classmethod
    def small(cls) -> TimerHfConfig:
        return TimerHfConfig(
            8, 16, 8, layers=equal_layers(2, 2, 8, ffn=24), horizons=(8, 16), context_len=48
        )

    @property
    def horizon(self) -> int:
        return max(self.config.horizons)

    @property
    def eval_batch(self) -> int:
        # The caches of a long roll-out take a MB per token and 100 windows.
        return 512

    def init(self, key: jax.Array) -> Tree:
        """N(0, init_std^2) for every matrix, biases 0, norms 1 and 0."""
        patch_11P = jax.ShapeDtypeStruct((1, 1, self.config.patch_len), jnp.float32)
        shapes = parameter_shapes(TimerHfNet(self.config), key, patch_11P)
        return draw(key, shapes, normal_rule(self.config.init_std))

    def recipe(self) -> Recipe:
        p = self.config.patch_len
        source = (
            "thuml/OpenLTM adaptation script of the same checkpoint's network; inside "
            "Prune-then-Finetune's grid"
        )
        return self._recipe(
            lr=5e-6,
            batch_size=2048,
            epochs=10,
            schedule="cosine",
            context_len=self.context_len // p * p,
            source=source,
        )

    # --- the network

    def _net(self, params: Tree, p_BNP, key=None, train=False, **rest) -> Any:
        return run_network(TimerHfNet(self.config), params, p_BNP, key=key, train=train, **rest)

    def apply(self, params: Tree, x_BCT: jax.Array, observed_BCN=None, key=None, train=False):
        """One forward pass, without any scaling: a list of what each head predicts, [B, C, N, q],
        and named steps.

        N = T // P; points after the last whole patch are left out, as in the original. observed: 0
        for patches of padding on the left.
        """
        b, c, t = x_BCT.shape
        p_BNP = self._patches(x_BCT.reshape(b * c, t).astype(jnp.float32))
        observed_BN = None if observed_BCN is None else observed_BCN.reshape(b * c, -1)
        heads, taps, _ = self._net(params, p_BNP, key=key, train=train, observed_BN=observed_BN)
        return [y.reshape(b, c, *y.shape[1:]) for y in heads], taps

    def _patches(self, x_BL: jax.Array) -> jax.Array:
        p, (b, t) = self.config.patch_len, x_BL.shape
        if t < p:
            raise ValueError(f"Timer needs at least one patch of {p} time steps, got {t}")
        return x_BL[:, : t // p * p].reshape(b, t // p, p)

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Next-patch MSE over all tokens, mean over heads, in the scale of the context. NaN in the
        target, and what lies beyond the target's end, does not count. The context is cut to its
        newest whole patches.
        """
        p, context = self.config.patch_len, batch["context"].astype(jnp.float32)
        if context.shape[-1] < p:
            raise ValueError(
                f"the next-patch loss needs a context of one patch ({p}), got {context.shape[-1]} "
                "steps"
            )
        context = context[..., context.shape[-1] % p :]
        mean_BC1, std_BC1 = jax.lax.stop_gradient(unbiased_moments(fill_missing(context), EPS))
        series_BCT = (jnp.concatenate([context, batch["target"]], axis=-1) - mean_BC1) / std_BC1
        x_BCT = fill_missing(series_BCT[..., : context.shape[-1]])
        return self.token_loss(
            params, x_BCT, series_BCT[..., p:], batch=batch, key=key, train=train
        )

    def token_loss(
        self,
        params: Tree,
        x_BCT,
        labels_BCT,
        batch: Batch | None = None,
        weight_BCN=None,
        key=None,
        train=False,
    ) -> jax.Array:
        """The original's loss: per head the MSE of every token's q points against `labels`, the
        series one patch on; mean over the heads. NaN labels, and those past the end, do not count.
        weight_BCN: of each token.
        """
        heads, _ = self.apply(params, x_BCT, key=key, train=train)
        losses = []
        for y_BCNQ in heads:
            n, q = y_BCNQ.shape[2:]
            want_BCNQ = token_labels(labels_BCT, n, self.config.patch_len, points=q)
            count_BCNQ = (~jnp.isnan(want_BCNQ)).astype(jnp.float32)
            if weight_BCN is not None:
                count_BCNQ = count_BCNQ * weight_BCN[..., None]
            error_BCNQ = jnp.square(y_BCNQ - jnp.nan_to_num(want_BCNQ))
            losses.append(mean_observed(error_BCNQ, count_BCNQ, batch or {}))
        return sum(losses[1:], losses[0]) / len(losses)

    # --- forecasting

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Rolled out with a cache; at each step the largest head that is not above what remains.

        The context is cut to its newest whole patches of at most `context_len` steps; one shorter
        than a patch is padded on the left with its first value. Missing values take the last value
        before them.
        """
        check_context(context, horizon)
        return Forecast(self._forecast(params, context, horizon))

    def _forecast(
        self, params: Tree, context_BCT, horizon: int, key=None, train=False
    ) -> jax.Array:
        b, c, _ = context_BCT.shape
        x_BCT = fill_missing(jnp.asarray(context_BCT, jnp.float32))[..., -self.context_len :]
        x_BL = x_BCT.reshape(b * c, -1)
        mean_B1, std_B1 = unbiased_moments(x_BL, EPS)
        if x_BL.shape[-1] < self.config.patch_len:
            x_BL = jnp.pad(x_BL, ((0, 0), (self.config.patch_len - x_BL.shape[-1], 0)), mode="edge")
        if self.config.scaling == "context":
            z_BL = (x_BL - mean_B1) / std_B1
            z_BH = self.generate(params, z_BL, horizon, key=key, train=train)
            y_BH = z_BH * std_B1 + mean_B1
        else:
            # The original scales what it is fed: with its cache, the newest points alone.
            fed = self.config.scaling == "fed"
            y_BH = self.generate_as_original(params, x_BL, horizon, use_cache=fed)
        return y_BH.reshape(b, c, horizon)

    def generate(
        self, params: Tree, x_BL: jax.Array, horizon: int, key=None, train=False
    ) -> jax.Array:
        """`horizon` points [B, horizon] after x [B, L], without any scaling. L >= P; the oldest
        points that fill no patch are left out.
        """
        p, cfg = self.config.patch_len, self.config
        sizes, x_BL = greedy_sizes(horizon, cfg.horizons), x_BL[:, x_BL.shape[-1] % p :]
        # One step needs no cache. Steps that are no whole patches move the borders of the patches,
        # so that each reads the series anew.
        if len(sizes) == 1:
            return self._next(params, x_BL, sizes[0], key=key, train=train)[0][:, :horizon]
        if any(q % p for q in sizes[:-1]):
            length = x_BL.shape[-1]
            for q in sizes:
                y_BQ, *_ = self._next(
                    params, x_BL[:, x_BL.shape[-1] % p :], q, key=key, train=train
                )
                x_BL = jnp.concatenate([x_BL, y_BQ], axis=-1)
            return x_BL[:, length : length + horizon]

        def step(state, points_BT, q):
            caches, start = state
            y_BQ, caches, n = self._next(
                params, points_BT, q, key=key, train=train, caches=caches, start=start
            )
            return (caches, start + n), y_BQ, y_BQ

        caches = self._cache(x_BL.shape[0], (x_BL.shape[-1] + sum(sizes[:-1])) // p)
        return roll_out(step((caches, 0), x_BL, sizes[0]), step, sizes)[:, :horizon]

    def generate_as_original(
        self,
        params: Tree,
        x_BL: jax.Array,
        horizon: int,
        revin: bool = True,
        use_cache: bool = True,
    ) -> jax.Array:
        """The original's `generate` with all its scaling, see the module docstring, in the units of
        x.

        Raises: ValueError where the original fails: heads that predict no whole patches lose count
        of its tokens.
        """
        p = self.config.patch_len
        x_BL = x_BL[:, x_BL.shape[-1] % p :]
        length, sizes = x_BL.shape[-1], greedy_sizes(horizon, self.config.horizons)
        room = (length + sum(sizes)) // p
        caches = self._cache(x_BL.shape[0], room) if use_cache else None
        # Tokens in the cache, and tokens by the original's attention mask.
        kept, counted = 0, length // p
        for q in sizes:
            fed_BT = x_BL[:, kept * p :]
            if kept + fed_BT.shape[-1] // p != counted or fed_BT.shape[-1] < p:
                raise ValueError(
                    f"the original can't go on with heads of {sizes} points and patches of {p}"
                )
            mean_B1, std_B1 = unbiased_moments(fed_BT, 0.0) if revin else (0.0, 1.0)
            scaled_BT = (fed_BT - mean_B1) / std_B1
            y_BQ, caches, n = self._next(params, scaled_BT, q, caches=caches, start=kept)
            x_BL = jnp.concatenate([x_BL, y_BQ * std_B1 + mean_B1], axis=-1)
            kept, counted = (kept + n if use_cache else 0), counted + q // p
        return x_BL[:, length : length + horizon]

    def _cache(self, b: int, room: int) -> list[Cache]:
        cfg = self.config
        return empty_cache(b, room, [dims.attn for dims in cfg.layers])

    def _next(
        self, params, points_BT, q: int, key=None, train=False, caches=None, start=0
    ) -> tuple[Any, Any, int]:
        """Predict with the head of q points after points [B, T]. Returns also the caches, and how
        many tokens the points were.
        """
        p_BNP = self._patches(points_BT)
        heads, _, caches = self._net(
            params, p_BNP, key=key, train=train, caches=caches, start=start, last=True
        )
        return heads[self.config.horizons.index(q)][:, 0], caches, p_BNP.shape[1]
