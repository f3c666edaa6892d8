"""Moirai-MoE 1.0-R: a causal decoder over patches of all variates, with a sparse mixture of experts
in every layer.

Liu et al., "Moirai-MoE: Empowering Time Series Foundation Models with Sparse Mixture of Experts"
(arXiv 2410.10469). Follows SalesforceAIResearch/uni2ts (commit 8d2a08d), model/moirai_moe. A
token's output is the distribution of the NEXT patch of its variate; longer horizons are sampled
patch by patch, each sample its own series, whose scale then counts what was generated. So every
step reads the whole context anew: see `MoiraiMoe.rollout`.

The router has no weights: a token goes to the two experts whose centroids are FARTHEST from it,
weighed by the softmax of the two distances. The paper says closest; the code, with which the
weights were trained, does this. The centroids are data (k-means on a dense Moirai): `fixed`, never
trained or mixed. A fresh model has none (the original leaves the memory as it is), so `init` draws
them. `kept` names the experts that a layer still has; the others' centroids stay.

As in the original, the weights of a patch size smaller than the largest mix the logits of the
mixture's components (see `SizedOut`). Unlike in the original, dropout of attention weights (0 in
every published model) acts in training only.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import experts, mixture, packed
from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.context import check_context, row_keys
from ltsm_jax.layers.dims import ExpertDims, HeadDims, head_width, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Normal, Uniform
from ltsm_jax.layers.mixture import Mixture, MixtureHead
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.packed import AnyVariateAttention, SizedIn, Tokens, observed_series
from ltsm_jax.layers.scan import equal_runs, loops, through_layers
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.models.moirai import FINETUNING, HEAD_DIM
from ltsm_jax.trees import Tree

# Hard-coded in the original.
N_EXPERTS, TOP_K = 32, 2


@dataclasses.dataclass(frozen=True)
class MoiraiMoeLayer:
    """A layer's attention, and the experts that it has (all of them unless pruned)."""

    attn: HeadDims
    experts: ExpertDims


@dataclasses.dataclass(frozen=True)
class MoiraiMoeConfig:
    """Widths are per layer, so that a pruned Moirai-MoE is a Moirai-MoE.

    d_model D, head_dim K, n_experts E that have centroids, of which each layer has some;
    patch_sizes the model has weights for; components of the mixture and the scale of the one whose
    scale is fixed. How it is used: context_len and horizon in time steps; patch_size; n_samples of
    a forecast; variates: whether those of one window see each other.
    """

    d_model: int
    head_dim: int
    layers: tuple[MoiraiMoeLayer, ...]
    n_experts: int = N_EXPERTS
    patch_sizes: tuple[int, ...] = (16,)
    components: tuple[str, ...] = mixture.PUBLISHED
    fixed_scale: float = 1e-3
    max_seq_len: int = 512
    scaling: bool = True
    dropout: float = 0.0
    attn_dropout: float = 0.0
    context_len: int = 1024
    horizon: int = 96
    patch_size: int = 16
    n_samples: int = 100
    variates: Literal["joint", "independent"] = "joint"

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        sizes = ("d_model", "head_dim", "max_seq_len", "context_len", "horizon", "n_samples")
        problems += field_problems(self, *sizes, "patch_sizes")
        if self.fixed_scale == 0:
            problems.append("fixed_scale must be positive")
        if self.head_dim % 4:
            problems.append(
                "half a head turns in pairs, so head_dim must be a multiple of 4, got "
                f"{self.head_dim}"
            )
        if self.patch_size not in self.patch_sizes or len(set(self.patch_sizes)) < len(
            self.patch_sizes
        ):
            problems.append(
                f"patch_size ({self.patch_size}) must be one of the patch_sizes: {self.patch_sizes}"
            )
        if unknown := set(self.components) - set(mixture.PARAMETERS):
            problems.append(
                f"components {sorted(unknown)} are not among {', '.join(mixture.PARAMETERS)}"
            )
        for layer in self.layers:
            ids = layer.experts.ids
            if len(ids) < TOP_K or max(ids) >= self.n_experts:
                problems.append(
                    f"a layer has at least {TOP_K} experts from 0 to {self.n_experts - 1}, got "
                    f"{ids}"
                )
        refuse(self, problems)

    @classmethod
    def of(
        cls,
        d_model: int,
        layers: int,
        d_ff: int | None = None,
        heads: int | None = None,
        n_experts=N_EXPERTS,
        **rest,
    ) -> "MoiraiMoeConfig":
        """Equal layers with all experts; heads split the model width, by default as in the
        original.
        """
        heads = d_model // HEAD_DIM if heads is None else heads
        head_dim = head_width(d_model, heads)
        d_ff = packed.default_ffn_dim(d_model) if d_ff is None else d_ff
        experts_of_layer = ExpertDims(tuple(range(n_experts)), d_ff)
        layer = MoiraiMoeLayer(HeadDims.of(heads, head_dim), experts_of_layer)
        return cls(d_model, head_dim, (layer,) * layers, n_experts=n_experts, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "MoiraiMoeConfig":
        """Reads config.json of the hub.

        Raises: ValueError naming the fields that are missing, or a distribution other than the
        mixture.
        """
        required = ("d_model", "num_layers", "patch_sizes", "distr_output")
        require_fields("Moirai-MoE", fields, required)
        kinds, fixed_scale = mixture.read_published(fields["distr_output"])
        patch_sizes, d_ff = tuple(int(p) for p in fields["patch_sizes"]), fields.get("d_ff")
        return cls.of(
            int(fields["d_model"]),
            int(fields["num_layers"]),
            None if d_ff is None else int(d_ff),
            patch_sizes=patch_sizes,
            # of several, the one of the published models, or the first
            patch_size=16 if 16 in patch_sizes else patch_sizes[0],
            components=kinds,
            fixed_scale=fixed_scale,
            max_seq_len=int(fields.get("max_seq_len", 512)),
            scaling=bool(fields.get("scaling", True)),
            dropout=float(fields.get("dropout_p", 0.0)),
            attn_dropout=float(fields.get("attn_dropout_p", 0.0)),
        )

    @property
    def component_parameters(self) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters of each component of the mixture."""
        return tuple(mixture.PARAMETERS[kind] for kind in self.components)

    def distr_output(self) -> dict[str, Any]:
        """The published form of the mixture."""
        return mixture.write_published(self.components, self.fixed_scale)


PRESETS = {
    "Salesforce/moirai-moe-1.0-R-small": MoiraiMoeConfig.of(384, 6, 512),
    "Salesforce/moirai-moe-1.0-R-base": MoiraiMoeConfig.of(768, 12, 1024),
}


class SizedSquare(nn.Module):
    """Features to features, with weights of their own for each patch size: kernel [Z, D, D], bias
    [Z, D].
    """

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x_BND, patch):
        d = x_BND.shape[-1]
        kernel_ZDD = self.param("kernel", nn.initializers.zeros, (len(self.sizes), d, d)).astype(
            x_BND.dtype
        )
        bias_ZD = self.param("bias", nn.initializers.zeros, (len(self.sizes), d)).astype(
            x_BND.dtype
        )

        def one(z, _):
            return (x_BND.reshape(-1, d) @ kernel_ZDD[z] + bias_ZD[z][None]).reshape(x_BND.shape)

        return packed.by_size(one, self.sizes, patch)


class Routed(nn.Module):
    """Tokens through the experts of the two farthest centroids [E, D]: [B, N, D] -> [B, N, D], and
    the named steps.
    """

    cfg: MoiraiMoeConfig
    dims: MoiraiMoeLayer

    @nn.compact
    def __call__(self, x_BND, centroid_ED):
        cfg, taps, kept = self.cfg, {}, self.dims.experts.ids
        x_TD = x_BND.reshape(-1, cfg.d_model)
        wide = x_TD.astype(jnp.float32)
        centre_ED = centroid_ED.astype(jnp.float32)[np.asarray(kept)]

        # |x - c|^2 from one product of matrices, in full precision: the order of the distances says
        # which experts a token visits.
        product_TE = jnp.matmul(wide, centre_ED.T, precision=jax.lax.Precision.HIGHEST)
        square_TE = (
            jnp.square(wide).sum(-1, keepdims=True)
            + jnp.square(centre_ED).sum(-1)[None]
            - 2 * product_TE
        )
        distance_TE = taps["distance"] = jnp.sqrt(jnp.maximum(square_TE, 1e-12))
        far_TK, chosen_TK = jax.lax.top_k(distance_TE, TOP_K)
        taps["weights"], taps["experts"] = jax.nn.softmax(far_TK), jnp.asarray(kept)[chosen_TK]
        stacked = experts.Experts(
            cfg.d_model, len(kept), self.dims.experts.ffn, act=nn.silu, name="experts"
        )
        y_BND = stacked(x_TD, taps["weights"], chosen_TK).reshape(x_BND.shape)
        return y_BND, {name: value.reshape(*x_BND.shape[:2], -1) for name, value in taps.items()}


class Block(nn.Module):
    """Pre-norm block [B, N, D] -> [B, N, D], and the named steps between.

    only: places of the tokens that are asked for; None: all of them.
    """

    cfg: MoiraiMoeConfig
    dims: MoiraiMoeLayer

    @nn.compact
    def __call__(self, x_BND, centroid_ED, tokens: Tokens, train: bool, only=None):
        cfg, taps = self.cfg, {}
        y_BND = taps["norm1"] = RMSNorm(packed.NORM_EPS, name="norm1")(x_BND)
        attention = AnyVariateAttention(cfg.d_model, self.dims.attn, cfg.attn_dropout, name="attn")
        y_BND, inner = attention(
            y_BND,
            tokens.causal,
            tokens.same_variate,
            time_id_BN=tokens.time_id,
            train=train,
            only=only,
        )
        taps |= nested("attn", inner, y_BND)
        x_BND = x_BND if only is None else x_BND[:, only]
        x_BND = x_BND + Dropout(cfg.dropout)(y_BND, train)
        y_BND = taps["norm2"] = RMSNorm(packed.NORM_EPS, name="norm2")(x_BND)
        y_BND, inner = Routed(cfg, self.dims, name="ffn")(y_BND, centroid_ED)
        taps |= nested("ffn", inner, y_BND)
        return x_BND + Dropout(cfg.dropout)(y_BND, train), taps


class MoiraiMoeNet(nn.Module):
    """Packed tokens -> mixtures [B, N, P] in the units of the tokens, and the named steps between.

    patch: the patch size of all tokens, or of each [B, N]. only: places [n] of the tokens whose
    distribution is asked for; None: all. lean: for a forecast, without the steps of the layers.
    whole: see `layers.shortcuts`.
    """

    cfg: MoiraiMoeConfig
    shortens: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        patch,
        train: bool = False,
        only=None,
        lean: bool = False,
        whole: bool = False,
    ):
        cfg = self.cfg
        loc_BN1, scale_BN1 = (
            packed.token_scale(tokens) if cfg.scaling else packed.neutral_scale(tokens)
        )
        taps = {"loc": loc_BN1, "scale": scale_BN1}
        scaled_BNP = (tokens.target - loc_BN1) / scale_BN1
        for name in ("embed", "residual"):
            taps[name] = SizedIn(cfg.patch_sizes, cfg.d_model, name=name)(scaled_BNP, patch)
        taps["feature"] = SizedSquare(cfg.patch_sizes, name="feature")(
            nn.silu(taps["embed"]), patch
        )
        x_BND = taps["feature"] + taps["residual"]
        shape = (len(cfg.layers), cfg.n_experts, cfg.d_model)
        centroid_LED = jax.lax.stop_gradient(self.param("centroid", nn.initializers.zeros, shape))
        depth = len(cfg.layers)
        looped = loops(self, lean, train, whole=whole)
        if looped:
            layers = self.variables["params"]
            layers = {
                f"layer_{i}": {"block": layers[f"layer_{i}"], "centroid": centroid_LED[i]}
                for i in range(depth)
            }

            def layer(i, params, x_BND, only=None):
                block = Block(cfg, cfg.layers[i], parent=None)
                return block.apply(
                    {"params": params["block"]},
                    x_BND,
                    params["centroid"],
                    tokens=tokens,
                    train=train,
                    only=only,
                )[0]

            # The last layer is on its own: of it, nothing but the tokens asked for is computed.
            runs = equal_runs(cfg.layers[:-1])
            x_BND = through_layers(layer, layers, x_BND, runs=runs)
            x_BND = layer(depth - 1, layers[f"layer_{depth - 1}"], x_BND, only=only)
        for i, dims in enumerate(() if looped else cfg.layers):
            x_BND, inner = Block(cfg, dims, name=f"layer_{i}")(
                x_BND, centroid_LED[i], tokens, train=train
            )
            taps |= nested(f"layer_{i}", inner, x_BND)
        x_BND = taps["norm"] = RMSNorm(packed.NORM_EPS, name="norm")(x_BND)
        cut = slice(None) if only is None else only
        patch = patch if isinstance(patch, int) else patch[:, cut]
        head = MixtureHead(cfg.patch_sizes, cfg.components, cfg.fixed_scale, name="head")
        x_BND = x_BND if looped else x_BND[:, cut]
        y, raw = head(x_BND, patch, loc_BN1[:, cut], scale_BN1=scale_BN1[:, cut])
        return y, taps | nested("head", raw)


@dataclasses.dataclass(frozen=True)
class MoiraiMoe(Model):
    """Moirai-MoE at one size. See the module docstring; `Model` documents the methods."""

    config: MoiraiMoeConfig

    family = "moirai_moe"
    published = PRESETS
    tasks = ("forecasting",)
    licence = "CC-BY-NC-4.0, non-commercial (Salesforce/moirai-moe-1.0-R)"
    shard_rules = (
        (r"^(embed|residual|feature)/kernel$", (None, None, "fsdp")),
        (r"^head/.*/kernel$", (None, "fsdp", None)),
        (r"^centroid$", ()),
        (r"/attn/variate_bias$", (None, "tensor")),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn", others=(("variate_bias", 1),)), Group.experts("ffn/experts"))

    @classmethod
    def small(cls) -> MoiraiMoeConfig:
        return MoiraiMoeConfig.of(
            16,
            2,
            8,
            heads=2,
            n_experts=4,
            patch_sizes=(4, 8),
            patch_size=8,
            context_len=32,
            horizon=8,
            n_samples=10,
        )

    @property
    def fixed(self) -> str | None:
        return r"^centroid$"

    @property
    def eval_batch(self) -> int:
        # Times n_samples, once the roll-out has begun.
        return 8

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults: N(0, 1) for the variate biases; U(+-1/sqrt(inputs)) for weights, with
        zeros where a smaller patch size has none; the feature layer U(+-1/D), since torch takes its
        first two axes for inputs; norms 1. Centroids N(0, 1), ours: the original has no scheme for
        them.
        """
        cfg = self.config
        patch = max(cfg.patch_sizes)
        shapes = parameter_shapes(MoiraiMoeNet(cfg), key, packed.one_token(patch), patch)

        def rule(path, shape):
            if path == "centroid":
                return Normal(1.0)
            if path.startswith("feature/"):
                return Uniform(1 / cfg.d_model)
            return Uniform(shape[1] ** -0.5) if "/experts/" in path else None

        return packed.fresh(key, shapes, cfg.patch_sizes, d_model=cfg.d_model, own=rule)

    def recipe(self) -> Recipe:
        source = (
            "none in uni2ts for MoE: that of Moirai 1.1-R (lr 5e-7, AdamW, decay 0.1, clip 1.0)"
        )
        return self._recipe(source=source, **FINETUNING)

    # --- the network, and what is made of its next-patch distributions

    def apply(
        self, params: Tree, tokens: Tokens, patch, key=None, train=False, only=None, lean=False
    ) -> tuple[Mixture, dict]:
        """One forward pass: at every token the distribution [B, N, P] of the patch after it, in the
        units of the tokens, and the named steps.

        patch, only, lean: see `MoiraiMoeNet`.
        """
        options = {"only": only, "lean": lean}
        net = MoiraiMoeNet(self.config)
        return run_network(net, params, tokens, patch, key=key, train=train, **options)

    def packed_loss(
        self, params: Tree, tokens: Tokens, patch, key=None, train=False, weight=None
    ) -> jax.Array:
        """Negative log-likelihood of the predicted, observed entries under the token before each,
        every variate of every sample counting alike. The tokens of a variate must follow each
        other. weight: of each row.
        """
        y, _ = self.apply(params, tokens, patch, key=key, train=train)
        before = jax.tree.map(lambda leaf: leaf[:, :-1], y)
        after = jax.tree.map(lambda leaf: leaf[:, 1:], tokens)
        return packed.group_mean(-before.log_prob(after.target), after, weight)

    def fill(self, tokens: Tokens, places: jax.Array, values_RCP: jax.Array) -> Tokens:
        """The tokens with generated values at `places` [C], which from now on count in
        the scaler.
        """
        inside = jnp.arange(tokens.target.shape[-1]) < self.config.patch_size
        return dataclasses.replace(
            tokens,
            target=tokens.target.at[:, places].set(jnp.where(inside[None, None], values_RCP, 0.0)),
            predicted=tokens.predicted.at[:, places].set(False),
        )

    def rollout(
        self,
        params: Tree,
        tokens: Tokens,
        last: np.ndarray,
        first: np.ndarray,
        steps: int,
        draw: Callable,
    ) -> jax.Array:
        """Sample paths [n, B, C, steps * patch] after packed tokens.

        Keys and values of the context are not kept from step to step, nor shared between samples.
        Mean and scale of a variate count what was generated so far: each sample has its own, and
        others after each step. They enter the context's tokens before a nonlinear layer and the
        choice of experts, so all of these are other tokens. Only the first step, before anything is
        generated, is one pass for all samples; of the last layer, each step computes the tokens
        asked for.

        Args:
          last: places [C] of the last token of each variate's past. first: of the first one of its
            future, from where the others follow.
          draw: (step, mixture at [R, C, P]) -> samples: [n, B, C, P] at step 0, where R is B; [R,
            C, P] at later ones, where R is n * B.
        """
        p = self.config.patch_size
        y, _ = self.apply(params, tokens, p, only=last, lean=True)
        start = draw(0, y)
        n, b = start.shape[:2]
        if steps == 1:
            return start[..., :p]
        copies = jax.tree.map(lambda leaf: jnp.tile(leaf, (n, *(1,) * (leaf.ndim - 1))), tokens)
        values = start.reshape(n * b, *start.shape[2:])

        def step(state, j):
            copies, values = state
            places = jnp.asarray(first) + j - 1
            copies = self.fill(copies, places, values)
            y, _ = self.apply(params, copies, p, only=places, lean=True)
            return (copies, draw(j, y)), values

        (_, values), earlier = jax.lax.scan(step, (copies, values), jnp.arange(1, steps))
        all_SRCP = jnp.concatenate([earlier, values[None]])[..., :p]
        return jnp.moveaxis(all_SRCP, 0, 2).reshape(n, b, len(last), steps * p)

    # --- the contract

    def _places(
        self, n_variates: int, time_steps: int, horizon: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Of the tokens of `pack`: the last of each past [C], the first of each future [C], and
        steps of the future.
        """
        p = self.config.patch_size
        past, steps, c = -(-time_steps // p), -(-horizon // p), np.arange(n_variates)
        return c * past + past - 1, n_variates * past + c * steps, steps

    def _distribution(self, params: Tree, batch: Batch, key, train: bool) -> tuple[Mixture, dict]:
        """Distribution of a batch's targets, each patch given the true ones before it; and the
        batch in rows.
        """
        cfg, rows = self.config, packed.rows_of(batch, self.config.variates)
        p, (_, c, t), h = cfg.patch_size, rows["context"].shape, rows["target"].shape[-1]
        future = observed_series(rows["target"])
        tokens = packed.pack(
            observed_series(rows["context"]), h, p, width=max(cfg.patch_sizes), future=future
        )
        last, first, steps = self._places(c, t, h)
        only = np.concatenate(
            [np.r_[x, y : y + steps - 1] for x, y in zip(last, first, strict=True)]
        )
        y, _ = self.apply(params, tokens, p, key=key, train=train, only=only)
        return jax.tree.map(lambda leaf: packed.unpack(leaf, c, h, patch=p), y), rows

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Negative log-likelihood of the target in its units, each patch given the true ones before
        it; every variate of each row counts alike. The repository has no trainer for MoE: this is
        Moirai's loss, one token on.
        """
        y, rows = self._distribution(params, batch, key, train=train)
        return mixture.series_nll(y, *observed_series(rows["target"]), rows.get("weight"))

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the distribution's mean, over the observed targets; each patch given the true ones
        before it.
        """
        y, rows = self._distribution(params, batch, key, train=train)
        return packed.masked_mse(y.mean(), *observed_series(rows["target"]), rows.get("weight"))

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Sample paths, patch by patch; the point is their median.

        The context is cut to `context_len`. Missing values are not observed, as in the original's
        pipeline.
        """
        check_context(context, horizon)
        cfg = self.config
        x = packed.rows_of({"context": jnp.asarray(context, jnp.float32)}, cfg.variates)["context"]
        x = x[..., -cfg.context_len :]
        (_, c, t), n, keys = x.shape, cfg.n_samples, row_keys(key, x)
        tokens = packed.pack(
            observed_series(x), horizon, cfg.patch_size, width=max(cfg.patch_sizes)
        )
        last, first, steps = self._places(c, t, horizon)

        def draw(step, y):
            if isinstance(step, int):
                return jnp.moveaxis(y.sample(keys, n), -1, 0)
            number_R = jnp.repeat(jnp.arange(n), x.shape[0]) + n * step
            return y.sample(jax.vmap(jax.random.fold_in)(jnp.tile(keys, n), number_R), 1)[..., 0]

        paths_nBCH = self.rollout(params, tokens, last, first=first, steps=steps, draw=draw)[
            ..., :horizon
        ]
        samples = jnp.moveaxis(paths_nBCH, 0, -1).reshape(*context.shape[:2], horizon, n)
        return Forecast(*mixture.summary(samples), samples, mixture.LEVELS)
