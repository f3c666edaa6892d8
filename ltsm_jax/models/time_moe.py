"""Time-MoE: a decoder-only Transformer over single points, with a mixture of experts in every
layer.

Shi et al., "Time-MoE: Billion-Scale Time Series Foundation Models with Mixture of Experts" (ICLR
2025, arXiv 2409.16040). Follows Time-MoE/Time-MoE (commit d3524fd). One point is one token; the
model scales nothing itself, its callers do. Here `predict` and `loss` scale each window by the mean
and the unbiased standard deviation (+ 1e-6) of its context, as Prune-then-Finetune's wrapper does
in forecasting, so that losses of all data have one scale.

Routing: softmax over all experts, then the top k, whose weights are not normalised again. `kept`
names the experts that a layer has; the router goes on choosing among all of them, and what is gone
weighs 0, so that taking an expert out equals masking it.

The original's loss pads the series with zeros past its end; without a mask they count as targets,
and its balance term hard-codes two experts per token where a mask is given. Here what lies past the
end of the target never counts, as in the original's own training data, and the balance term has the
k of the config and leaves pruned experts out.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import experts
from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.causal import CausalAttention, causal_mask, empty_cache, greedy_sizes, roll_out
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import ExpertDims, HeadDims, head_width, layer_problems
from ltsm_jax.layers.initial import draw, normal_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, mean_observed
from ltsm_jax.layers.mlp import ACTIVATIONS, GatedMLP
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.scan import equal_runs, loops, through_layers
from ltsm_jax.models.configs import HiddenAct, field_problems, refuse
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

EPS = 1e-6  # added to the standard deviation of the context (Prune-then-Finetune's wrapper)
DELTA = 2.0  # of the Huber loss


@dataclasses.dataclass(frozen=True)
class TimeMoeLayer:
    """A layer's attention, the experts that it has (all of them unless pruned), and the units of
    the shared expert, which every token visits.
    """

    attn: HeadDims
    experts: ExpertDims
    shared: int


@dataclasses.dataclass(frozen=True)
class TimeMoeConfig:
    """Widths are per layer, so that a pruned model is of the same class.

    d_model D, head_dim K, horizons: points that each head predicts, n_experts E that the router
    chooses from, top_k of them per token. dense: the original's `use_dense`, one feed-forward layer
    as wide as the shared expert and no others. max_positions: context and horizon together should
    not pass it. aux_factor: of the balance term, added to the loss where apply_aux. context_len: in
    time steps.
    """

    d_model: int
    head_dim: int
    layers: tuple[TimeMoeLayer, ...]
    horizons: tuple[int, ...]
    n_experts: int
    top_k: int
    context_len: int
    max_positions: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    activation: HiddenAct = "silu"
    dense: bool = False
    apply_aux: bool = True
    aux_factor: float = 0.02
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim, scores={"attn": "pairs"})
        sizes = ("d_model", "head_dim", "context_len", "max_positions", "horizons")
        problems += field_problems(self, *sizes, "n_experts", "top_k")
        if self.head_dim % 2:
            problems.append(
                f"heads must have an even width for the rotary positions, got {self.head_dim}"
            )
        if self.top_k > self.n_experts:
            problems.append(f"a token can't visit {self.top_k} of {self.n_experts} experts")
        kept = [layer.experts.ids for layer in self.layers]
        if any(ids and max(ids) >= self.n_experts for ids in kept):
            problems.append(f"there are {self.n_experts} experts, the layers have {kept}")
        if len(set(self.horizons)) != len(self.horizons):
            problems.append(f"horizons must differ, got {self.horizons}")
        if self.dense and self.apply_aux:
            problems.append("a dense model has no router, so apply_aux must be off")
        refuse(self, problems)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimeMoeConfig":
        """From the fields of the hub's config.json. The context is not among them: three quarters
        of max_position_embeddings are taken, 3072 of 4096 as in the original's evaluation.
        """
        names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        d, heads, layers, inner = (fields[n] for n in names)
        n_experts, top_k = fields.get("num_experts", 8), fields.get("num_experts_per_tok", 2)
        head_dim = head_width(d, heads)
        if top_k < 1 or inner < top_k:
            raise ValueError(
                f"intermediate_size ({inner}) is shared out among num_experts_per_tok ({top_k})"
            )
        layer = TimeMoeLayer(
            attn=HeadDims.of(heads, head_dim, fields.get("num_key_value_heads") or heads),
            experts=ExpertDims(tuple(range(n_experts)), inner // top_k),
            shared=inner,
        )
        return cls(
            d_model=d,
            head_dim=head_dim,
            layers=(layer,) * layers,
            horizons=tuple(fields["horizon_lengths"]),
            n_experts=n_experts,
            top_k=top_k,
            context_len=max(fields.get("max_position_embeddings", 4096) * 3 // 4, 1),
            max_positions=fields.get("max_position_embeddings", 4096),
            rope_theta=float(fields.get("rope_theta", 10000)),
            norm_eps=fields.get("rms_norm_eps", 1e-6),
            activation=fields.get("hidden_act", "silu"),
            dense=fields.get("use_dense", False),
            apply_aux=fields.get("apply_aux_loss", True),
            aux_factor=fields.get("router_aux_loss_factor", 0.02),
            dropout=fields.get("attention_dropout", 0.0),
            init_std=fields.get("initializer_range", 0.02),
        )


def _published(d_model: int, intermediate: int) -> TimeMoeConfig:
    sizes = {"hidden_size": d_model, "intermediate_size": intermediate, "num_attention_heads": 12}
    return TimeMoeConfig.from_published(
        sizes | {"num_hidden_layers": 12, "horizon_lengths": (1, 8, 32, 64)}
    )


PRESETS = {
    "Maple728/TimeMoE-50M": _published(384, 1536),
    "Maple728/TimeMoE-200M": _published(768, 3072),
}


class MixtureLayer(nn.Module):
    """Routed experts plus the shared one behind its gate, [T, D] -> [T, D], and the named steps.

    expert_mask: [E] or None, a factor of each expert's router probability; see `experts.route`.
    """

    cfg: TimeMoeConfig
    dims: TimeMoeLayer
    form: experts.Form = "auto"

    @nn.compact
    def __call__(self, x_TD, expert_mask=None):
        cfg, taps, kept = self.cfg, {}, self.dims.experts.ids
        d, n = cfg.d_model, cfg.n_experts
        taps["router"] = Linear((d,), (n,), use_bias=False, role="router", name="router")(x_TD)
        if len(kept) < n:
            here = np.isin(np.arange(n), kept).astype(np.float32)
            expert_mask = jnp.asarray(here) if expert_mask is None else expert_mask * here
        weight_TK, chosen_TK, taps["router_probs"] = experts.route(
            taps["router"], cfg.top_k, expert_mask
        )
        taps["router_weights"], taps["router_experts"] = weight_TK, chosen_TK
        shared_TD = GatedMLP(self.dims.shared, cfg.activation, name="shared")(x_TD)
        taps["shared"] = shared_TD
        gate_T1 = Linear((d,), (1,), use_bias=False, role="router", name="shared_gate")(x_TD)
        y_TD = jax.nn.sigmoid(gate_T1) * shared_TD
        if not kept:
            return y_TD, taps
        # Place of each expert among those that are there; of the others, whose weight is 0, any.
        if len(kept) < n:
            place_E = np.minimum(np.searchsorted(kept, np.arange(n)), len(kept) - 1)
            chosen_TK = jnp.asarray(place_E)[chosen_TK]
        act = ACTIVATIONS[cfg.activation]
        stacked = experts.Experts(
            d, len(kept), self.dims.experts.ffn, act=act, form=self.form, name="experts"
        )
        return y_TD + stacked(x_TD, weight_TK, chosen_TK), taps


class Block(nn.Module):
    """Pre-norm block [B, N, D] -> [B, N, D], the named steps in it, and its cache."""

    cfg: TimeMoeConfig
    dims: TimeMoeLayer
    form: experts.Form

    @nn.compact
    def __call__(
        self, x_BND, positions_BN, mask_BHNS, cache, start, expert_mask, train: bool, lean: bool
    ):
        cfg, taps = self.cfg, {}
        y_BND = taps["norm1"] = RMSNorm(cfg.norm_eps, name="norm1")(x_BND)
        attention = CausalAttention(
            cfg.d_model,
            self.dims.attn,
            cfg.head_dim,
            base=cfg.rope_theta,
            dropout=cfg.dropout,
            name="attn",
        )
        y_BND, taps["attn_weights"], cache = attention(
            y_BND, positions_BN, mask_BHNS, cache=cache, start=start, train=train, lean=lean
        )
        taps["attn"] = y_BND
        x_BND = x_BND + y_BND
        y_BND = taps["norm2"] = RMSNorm(cfg.norm_eps, name="norm2")(x_BND)
        if cfg.dense:
            y_BND = GatedMLP(self.dims.shared, cfg.activation, name="mlp")(y_BND)
        else:
            y_TD, inner = MixtureLayer(cfg, self.dims, self.form, name="mixture")(
                y_BND.reshape(-1, cfg.d_model), expert_mask
            )
            y_BND, taps = y_TD.reshape(x_BND.shape), taps | inner
        taps["ffn"] = y_BND
        return x_BND + y_BND, taps, cache


class TimeMoeNet(nn.Module):
    """Points [B, N] -> what each head predicts after each of them, a list of [B, N, h]; named
    steps; caches.

    observed_BS: 0 for points of padding on the left, which nobody sees. positions_BN: by default
    counted from `start`. caches, start: of the points before these. last: heads at the last
    position only, and no attention weights of a long sequence. lean: for a forecast, without the
    steps of the layers. expert_masks: per layer [E] or None. whole: see `layers.shortcuts`. form:
    how the experts are computed, see `experts.mixture`.
    """

    cfg: TimeMoeConfig
    form: experts.Form = "auto"
    shortens: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self,
        x_BN,
        observed_BS=None,
        positions_BN=None,
        caches=None,
        start=0,
        last: bool = False,
        expert_masks: Sequence[Any] | None = None,
        train: bool = False,
        lean: bool = False,
        whole: bool = False,
    ):
        cfg, taps, kept = self.cfg, {}, []
        n = x_BN.shape[1]
        gate_BND, value_BND = (
            Linear((1,), (cfg.d_model,), use_bias=False, name=f"embed_{name}")(x_BN[..., None])
            for name in ("gate", "value")
        )
        x_BND = taps["embed"] = ACTIVATIONS[cfg.activation](gate_BND) * value_BND
        if positions_BN is None:
            positions_BN = (start + jnp.arange(n))[None]
        mask_BHNS = causal_mask(
            n, n if caches is None else caches[0][0].shape[2], start=start, observed_BS=observed_BS
        )
        # With caches or masks every layer has something of its own beside its parameters.
        looped = loops(self, lean, train, whole=whole) and caches is None and expert_masks is None
        if looped:

            def layer(i, params, x_BND):
                block = Block(cfg, cfg.layers[i], self.form, parent=None)
                rest = (positions_BN, mask_BHNS, None, start, None, train, last)
                return block.apply({"params": params}, x_BND, *rest)[0]

            runs = equal_runs(cfg.layers)
            x_BND = through_layers(layer, self.variables["params"], x_BND, runs=runs)
        for i, dims in enumerate(() if looped else cfg.layers):
            cache = None if caches is None else caches[i]
            mask = None if expert_masks is None else expert_masks[i]
            block = Block(cfg, dims, self.form, name=f"layer_{i}")
            x_BND, inner, cache = block(
                x_BND,
                positions_BN,
                mask_BHNS,
                cache=cache,
                start=start,
                expert_mask=mask,
                train=train,
                lean=last,
            )
            taps |= nested(f"layer_{i}", inner, x_BND)
            kept.append(cache)
        x_BND = taps["norm"] = RMSNorm(cfg.norm_eps, name="norm")(x_BND)
        x_BND = x_BND[:, -1:] if last else x_BND
        heads = [
            Linear((cfg.d_model,), (h,), use_bias=False, name=f"head_{j}")(x_BND)
            for j, h in enumerate(cfg.horizons)
        ]
        return heads, taps, None if caches is None else kept


def huber(error: jax.Array) -> jax.Array:
    """0.5 e^2 up to |e| = 2, then linear: 2 (|e| - 1)."""
    size = jnp.abs(error)
    return jnp.where(size <= DELTA, 0.5 * jnp.square(error), DELTA * (size - 0.5 * DELTA))


def balance(
    p_LTE: Sequence[jax.Array], chosen_LTK: Sequence[jax.Array], weight_T: jax.Array | None = None
):
    """The router's load-balancing term over the tokens of all layers: E * sum over the k slots and
    the experts of (share of tokens that choose it there) * (its mean probability). About k when
    balanced: every slot is summed.

    p: per layer probabilities [T, E], 0 for pruned experts. chosen: [T, k]. weight_T: of each
    token.
    """
    n_experts = p_LTE[0].shape[-1]
    slots_TKE = jnp.concatenate([jax.nn.one_hot(c, n_experts) for c in chosen_LTK])
    p_TE = jnp.concatenate(p_LTE)
    # an expert that is masked is chosen only to fill up the k, with probability 0
    likely_TK = jnp.take_along_axis(p_TE, jnp.concatenate(chosen_LTK), axis=1) > 0
    slots_TKE = slots_TKE * likely_TK[..., None]
    weight = jnp.ones(p_TE.shape[0]) if weight_T is None else jnp.tile(weight_T, len(p_LTE))
    weight = weight / weight.sum()
    share_KE = jnp.einsum("T,TKE->KE", weight, slots_TKE)
    return n_experts * (share_KE * (weight @ p_TE)[None]).sum()


@dataclasses.dataclass(frozen=True)
class TimeMoe(Model):
    """Time-MoE at one size. See the module docstring; `Model` documents the methods."""

    config: TimeMoeConfig

    family = "time_moe"
    published = PRESETS
    # The balance term is of all tokens of a batch.
    rows_apart = False
    tasks = ("forecasting",)
    licence = "Apache-2.0 (Time-MoE/Time-MoE)"
    shard_rules = (
        (r"^embed_(gate|value)/kernel$", (None, "fsdp")),
        (r"/(router|shared_gate)/kernel$", ("fsdp", None)),
        (r"^head_\d+/kernel$", ("fsdp", None)),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (
        Group.heads("attn", scores="pairs"),
        Group.units("mixture/shared", "shared"),
        Group.units("mlp", "shared"),  # of a dense model
        Group.experts("mixture/experts"),
    )

    @classmethod
    def small(cls) -> TimeMoeConfig:
        experts_of_layer = ExpertDims((0, 1, 2, 3), 12)
        layers = (
            TimeMoeLayer(HeadDims.of(2, 8, kv_heads=2), experts_of_layer, 24),
            TimeMoeLayer(HeadDims.of(2, 8, kv_heads=1), experts_of_layer, 24),
        )
        return TimeMoeConfig(
            d_model=16,
            head_dim=8,
            layers=layers,
            horizons=(1, 4, 8),
            n_experts=4,
            top_k=2,
            context_len=48,
        )

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def horizon(self) -> int:
        return max(self.config.horizons)

    @property
    def eval_batch(self) -> int:
        heads = max(layer.attn.heads for layer in self.config.layers)
        # attention weights of one layer take 4 H L^2 bytes a window: 450 MB at the published sizes
        return max(1, min(2048, (1 << 29) // (heads * self.context_len**2)))

    def init(self, key: jax.Array) -> Tree:
        """N(0, init_std^2) for every matrix, biases 0, norms 1."""
        point_11 = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        shapes = parameter_shapes(TimeMoeNet(self.config), key, point_11)
        return draw(key, shapes, normal_rule(self.config.init_std))

    def recipe(self) -> Recipe:
        source = (
            "Time-MoE main.py (commit d3524fd); the lower rate of Prune-then-Finetune's grid is "
            "1e-5"
        )
        return self._recipe(
            lr=1e-4,
            batch_size=64,
            epochs=1,
            schedule="cosine",
            source=source,
            weight_decay=0.1,
            clip=1.0,
        )

    # --- the network

    def _net(self, params: Tree, x_BN, key=None, train=False, **rest) -> Any:
        return run_network(TimeMoeNet(self.config), params, x_BN, key=key, train=train, **rest)

    def apply(
        self,
        params: Tree,
        x_BCT: jax.Array,
        observed_BCT=None,
        key=None,
        train=False,
        expert_masks=None,
    ):
        """One forward pass, without any scaling: a list of what each head predicts, [B, C, T, h],
        and named steps.

        observed: 0 for points of padding on the left: nobody sees them, and positions count from
        the first that is not padding. expert_masks: per layer [E], factors of the router's
        probabilities (0: pruned).
        """
        b, c, t = x_BCT.shape
        observed_BT = None if observed_BCT is None else observed_BCT.reshape(b * c, t)
        heads, taps, _ = self._net(
            params,
            x_BCT.reshape(b * c, t).astype(jnp.float32),
            key=key,
            train=train,
            observed_BS=observed_BT,
            positions_BN=None if observed_BT is None else _positions(observed_BT),
            expert_masks=expert_masks,
        )
        return [y.reshape(b, c, *y.shape[1:]) for y in heads], taps

    def aux_loss(
        self, taps: Mapping[str, jax.Array], weight_T: jax.Array | None = None
    ) -> jax.Array:
        """The balance term of a forward pass, before its factor. weight_T: of each token (B * N of
        them).
        """
        layers = range(len(self.config.layers))
        p = [taps[f"layer_{i}/router_probs"] for i in layers]
        chosen = [taps[f"layer_{i}/router_experts"] for i in layers]
        return balance(p, chosen, weight_T)

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Huber loss of every head at every point of the context, mean over heads, in the scale of
        the context, plus the balance term in training. NaN in context and target, and what lies
        past the target, is no target.
        """
        context = batch["context"].astype(jnp.float32)
        z_BCT, seen_BCT, mean_BC1, std_BC1 = _scaled(context)
        # Every point is to say what follows it: the labels are the series one point on.
        later_BCT = jnp.concatenate([context[..., 1:], batch["target"]], axis=-1)
        labels_BCT = (later_BCT - mean_BC1) / std_BC1
        return self.token_loss(
            params,
            z_BCT,
            labels_BCT,
            observed_BCT=seen_BCT,
            batch=batch,
            key=key,
            train=train,
            aux=train,
            skip_padding=True,
        )

    def token_loss(
        self,
        params: Tree,
        x_BCT,
        labels_BCT,
        weight_BCT=None,
        observed_BCT=None,
        batch: Batch | None = None,
        key=None,
        train=False,
        aux=True,
        skip_padding=False,
        expert_masks=None,
    ) -> jax.Array:
        """The original's loss of a series x against `labels`, the series one point on, as long as x
        or longer.

        Args:
          labels_BCT: NaN ones, and those past the end, do not count.
          weight_BCT: of each label. observed_BCT: 0 for padding on the left, which the balance term
            skips.
          aux: whether the balance term is added, where the config has it.
          skip_padding: leave out what is predicted at padding; the original leaves it in.
        """
        cfg, batch = self.config, batch or {}
        b, c, t = x_BCT.shape
        positions = None if observed_BCT is None else _positions(observed_BCT.reshape(b * c, t))
        heads, taps, _ = self._net(
            params,
            x_BCT.reshape(b * c, t),
            key=key,
            train=train,
            observed_BS=None if observed_BCT is None else observed_BCT.reshape(b * c, t),
            positions_BN=positions,
            expert_masks=expert_masks,
        )
        longest = t - 1 + max(cfg.horizons)
        pad = ((0, 0), (0, 0), (0, max(longest - labels_BCT.shape[-1], 0)))
        weight_BCT = jnp.ones(labels_BCT.shape) if weight_BCT is None else weight_BCT
        weight_BCT = jnp.pad(jnp.where(jnp.isnan(labels_BCT), 0.0, weight_BCT), pad)
        labels_BCT = jnp.pad(jnp.nan_to_num(labels_BCT), pad)
        losses = []
        for h, y_BTH in zip(cfg.horizons, heads, strict=True):
            places_TH = jnp.arange(t)[:, None] + jnp.arange(h)[None]
            error_BCTH = huber(y_BTH.reshape(b, c, t, h) - labels_BCT[..., places_TH])
            count_BCTH = weight_BCT[..., places_TH]
            if skip_padding and observed_BCT is not None:
                count_BCTH = count_BCTH * observed_BCT[..., None]
            losses.append(mean_observed(error_BCTH, count_BCTH, batch))
        loss = sum(losses[1:], losses[0]) / len(losses)
        if not (aux and cfg.apply_aux):
            return loss
        seen_BCT = jnp.ones((b, c, t)) if observed_BCT is None else observed_BCT.astype(jnp.float32)
        if "weight" in batch:
            seen_BCT = seen_BCT * batch["weight"].reshape(-1, 1, 1)
        return loss + cfg.aux_factor * self.aux_loss(taps, seen_BCT.reshape(-1))

    # --- forecasting

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Rolled out with a cache; at each step the largest head that is not above what remains.

        The context is cut to its newest `context_len` steps. Missing values at its start are
        padding, as the original pads series of different lengths; others take the last value before
        them.
        """
        check_context(context, horizon)
        return Forecast(self._forecast(params, context, horizon, lean=True))

    def _forecast(
        self, params: Tree, context_BCT, horizon: int, key=None, train=False, lean=False
    ) -> jax.Array:
        b, c, _ = context_BCT.shape
        context_BCT = jnp.asarray(context_BCT, jnp.float32)[..., -self.context_len :]
        z_BCT, seen_BCT, mean_BC1, std_BC1 = _scaled(context_BCT)
        t = z_BCT.shape[-1]
        z_BT, seen_BT = z_BCT.reshape(b * c, t), seen_BCT.reshape(b * c, t)
        z_BH = self.generate(
            params, z_BT, horizon, observed_BL=seen_BT, key=key, train=train, lean=lean
        )
        return z_BH.reshape(b, c, horizon) * std_BC1 + mean_BC1

    def generate(
        self,
        params: Tree,
        x_BL,
        horizon: int,
        observed_BL=None,
        key=None,
        train=False,
        expert_masks=None,
        lean=False,
    ) -> jax.Array:
        """`horizon` points [B, horizon] after x [B, L], without any scaling. observed: 0 for
        padding on the left. lean: for a forecast, see `layers.scan`.
        """
        cfg, (b, t) = self.config, x_BL.shape
        sizes = greedy_sizes(horizon, cfg.horizons)
        room = t + sum(sizes[:-1])
        if observed_BL is None:
            observed_BS, first_B1 = None, jnp.zeros((1, 1), jnp.int32)
        else:
            observed_BS = jnp.pad(observed_BL, ((0, 0), (0, room - t)), constant_values=1)
            first_B1 = t - observed_BL.astype(jnp.int32).sum(1, keepdims=True)
        shared = {
            "observed_BS": observed_BS,
            "expert_masks": expert_masks,
            "last": True,
            "lean": lean,
        }
        net = functools.partial(self._net, params, key=key, train=train, **shared)

        def step(state, points_BT, h):
            caches, start = state
            n = points_BT.shape[1]
            # positions count from the first observed point; those of padding are seen by nobody
            positions_BN = jnp.maximum(start + jnp.arange(n)[None] - first_B1, 0)
            heads, _, caches = net(points_BT, positions_BN=positions_BN, caches=caches, start=start)
            y_BH = heads[cfg.horizons.index(h)][:, 0]
            return (caches, start + n), y_BH, y_BH

        # without a further step there is nothing to keep
        heads = [layer.attn for layer in cfg.layers]
        caches = None if len(sizes) == 1 else empty_cache(b, room, heads)
        return roll_out(step((caches, 0), x_BL, sizes[0]), step, sizes)[:, :horizon]

    def routed(
        self, params: Tree, context: jax.Array, horizon: int
    ) -> tuple[dict[str, jax.Array], int]:
        cfg, (b, c, _) = self.config, context.shape
        z_BCT, seen_BCT, _, _ = _scaled(jnp.asarray(context, jnp.float32)[..., -self.context_len :])
        z_RT, seen_RT = (x.reshape(b * c, -1) for x in (z_BCT, seen_BCT))
        # What the last step predicts goes nowhere.
        fed = sum(greedy_sizes(horizon, cfg.horizons)[:-1])
        if fed:
            new_RH = self.generate(params, z_RT, horizon, observed_BL=seen_RT)
            z_RT = jnp.concatenate([z_RT, new_RH[:, :fed]], axis=1)
            seen_RT = jnp.pad(seen_RT, ((0, 0), (0, fed)), constant_values=1)
        # the attention is causal, so one pass over all points sends them where the steps have sent
        # them
        _, taps, _ = self._net(params, z_RT, observed_BS=seen_RT, positions_BN=_positions(seen_RT))
        chosen = {
            f"layer_{i}/mixture/experts": taps[f"layer_{i}/router_experts"]
            for i in range(len(cfg.layers))
        }
        ids = {path: jnp.where(seen_RT.reshape(-1, 1) != 0, x, -1) for path, x in chosen.items()}
        return {path: x.reshape(b, -1, cfg.top_k) for path, x in ids.items()}, cfg.n_experts


def _positions(observed_BT: jax.Array) -> jax.Array:
    """Places counted from the first observed point; padding has 1, as in the original."""
    return jnp.where(observed_BT != 0, jnp.cumsum(observed_BT.astype(jnp.int32), axis=1) - 1, 1)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A series with NaN as (scaled and filled, 1 from its first value on, mean, unbiased standard
    deviation + eps).
    """
    seen = (jnp.cumsum(~jnp.isnan(x), axis=-1) > 0).astype(jnp.float32)
    filled, n = fill_missing(x), seen.sum(-1, keepdims=True)
    mean = (filled * seen).sum(-1, keepdims=True) / jnp.maximum(n, 1.0)
    centred = (filled - mean) * seen
    std = jnp.sqrt(jnp.square(centred).sum(-1, keepdims=True) / jnp.maximum(n - 1.0, 1.0)) + EPS
    return centred / std, seen, *jax.lax.stop_gradient((mean, std))
