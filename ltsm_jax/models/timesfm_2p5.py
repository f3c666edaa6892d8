"""TimesFM 2.5: a decoder-only Transformer over patches of one variate, with a longer patch and
quantiles coming out.

Das et al., "A decoder-only foundation model for time-series forecasting" (ICML 2024, arXiv
2310.10688), in the version of September 2025. Follows google-research/timesfm (commit 3dae50b),
src/timesfm. Unlike 1.0 and 2.0 it has rotary positions, four norms a block, and a scale that runs
along: each patch is scaled by the mean and the deviation of everything up to its own end, and so is
what comes out of it. Columns of an output are the mean and the quantiles; a second head says at
once how far the quantiles lie from the median over the next `spread_len` steps.

Two things of the original's programs are done otherwise. The fine-tuning loss of its port in the
transformers library pairs the quantile columns with the wrong levels; here they are aligned
(`aligned=False` is the port's). It clips forecasts at zero where the context has no negative value,
which is wrong for a series that was standardised before it came here; so this is off
(`infer_is_positive`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import HeadDims, LayerDims, equal_layers, head_width, layer_problems
from ltsm_jax.layers.initial import draw, torch_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import interpolate_missing, mean_observed
from ltsm_jax.layers.mlp import feed_forward
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.quantiles import DECILES, pinball
from ltsm_jax.layers.residual import ResidualBlock
from ltsm_jax.layers.rope import rotary
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Lora, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

LOG2_E = 1.442695041  # as the original rounds it
MIN_SCALE = 1e-6  # a smaller deviation does not divide
UNSEEN = -1e30  # finite: a padded patch, which sees nothing, attends evenly to all

Cache = tuple[jax.Array, jax.Array]  # keys and values [B, H, S, K] of one layer
# How many values, their mean, sum of squares around it.
Stats = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class TimesFM2p5Config:
    """Widths are per layer, so that a pruned TimesFM is a TimesFM.

    patch_len P of the input, output_len O of the output (whole patches), spread_len: steps of the
    quantile head, d_model D, head_dim K, layers: H, K and F of each; embed_dim, point_dim,
    spread_dim: hidden widths of the blocks before and after the layers. quantiles: levels of the
    columns 1, 2, ...; point_column: the column that is the point forecast, and goes back in when a
    forecast is rolled out. context_len: time steps of a window by default; max_context: where a
    longer context is cut.

    The options are those of the original's ForecastConfig, set as its README has them (two of them
    apart: see the module docstring, and normalize_inputs, which cancels). force_flip_invariance:
    average with the forecast of -x, turned back. use_continuous_quantile_head: quantiles from the
    second head. fix_quantile_crossing: sort them.
    """

    patch_len: int
    output_len: int
    spread_len: int
    d_model: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    embed_dim: int
    point_dim: int
    spread_dim: int
    quantiles: tuple[float, ...] = DECILES
    point_column: int = 5
    context_len: int = 1024
    max_context: int = 16384
    norm_eps: float = 1e-6
    normalize_inputs: bool = False
    use_continuous_quantile_head: bool = True
    force_flip_invariance: bool = True
    infer_is_positive: bool = False
    fix_quantile_crossing: bool = True

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        lengths = ("patch_len", "output_len", "spread_len", "context_len", "max_context")
        widths = ("d_model", "head_dim", "embed_dim", "point_dim", "spread_dim")
        problems += field_problems(self, *lengths, *widths)
        if self.patch_len > 0 and self.output_len % self.patch_len:
            problems.append(
                f"an output ({self.output_len}) must be whole patches ({self.patch_len})"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if any(not 0 < q < 1 for q in self.quantiles):
            problems.append(f"quantiles must lie between 0 and 1: {self.quantiles}")
        if not 0 <= self.point_column <= len(self.quantiles):
            problems.append(
                f"point_column must be one of {1 + len(self.quantiles)} columns, got "
                f"{self.point_column}"
            )
        refuse(self, problems)

    @classmethod
    def of(cls, patch_len, output_len, spread_len, d_model, d_ff, layers, heads, head_dim, **rest):
        """Equal layers; blocks around them as wide as the model, unless `rest` says otherwise."""
        rest = {"embed_dim": d_model, "point_dim": d_model, "spread_dim": d_model} | rest
        equal = equal_layers(layers, heads, head_dim, ffn=d_ff)
        return cls(
            patch_len=patch_len,
            output_len=output_len,
            spread_len=spread_len,
            d_model=d_model,
            head_dim=head_dim,
            layers=equal,
            **rest,
        )

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimesFM2p5Config":
        """Reads the fields of the original's Definition, or the config.json of the transformers
        library.

        Raises: ValueError naming the fields that are missing.
        """
        if "stacked_transformers" not in fields:
            return cls._from_transformers(fields)
        names = ("input_patch_len", "output_patch_len", "output_quantile_len", "tokenizer")
        names += ("output_projection_point", "output_projection_quantiles")
        inner = {
            "stacked_transformers": ("num_layers", "transformer"),
            "stacked_transformers.transformer": ("model_dims", "hidden_dims", "num_heads"),
        }
        require_fields("TimesFM 2.5", fields, names, inner=inner)
        stack = fields["stacked_transformers"]
        layer = stack["transformer"]
        rest = {ours: fields[theirs] for theirs, ours in _RENAMED.items() if theirs in fields}
        return cls.of(
            patch_len=fields["input_patch_len"],
            output_len=fields["output_patch_len"],
            spread_len=fields["output_quantile_len"],
            d_model=layer["model_dims"],
            d_ff=layer["hidden_dims"],
            layers=stack["num_layers"],
            heads=layer["num_heads"],
            head_dim=head_width(layer["model_dims"], layer["num_heads"]),
            embed_dim=fields["tokenizer"]["hidden_dims"],
            point_dim=fields["output_projection_point"]["hidden_dims"],
            spread_dim=fields["output_projection_quantiles"]["hidden_dims"],
            **cls._options(rest),
        )

    @classmethod
    def _from_transformers(cls, fields: Mapping[str, Any]) -> "TimesFM2p5Config":
        names = ("patch_length", "horizon_length", "output_quantile_len", "hidden_size")
        names += ("intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        require_fields("TimesFM 2.5", fields, names)
        renamed = _RENAMED | {"context_length": "max_context", "rms_norm_eps": "norm_eps"}
        for name in ("use_continuous_quantile_head", "force_flip_invariance"):
            renamed[name] = name
        rest = {ours: fields[theirs] for theirs, ours in renamed.items() if theirs in fields}
        sizes: Any = [fields[name] for name in names]
        return cls.of(*sizes, **cls._options(rest))

    @classmethod
    def _options(cls, told: dict[str, Any]) -> dict[str, Any]:
        told["quantiles"] = tuple(told.get("quantiles", DECILES))
        return told | {"context_len": min(1024, told.get("max_context", 1024))}


_RENAMED = {
    "context_limit": "max_context",
    "quantiles": "quantiles",
    "decode_index": "point_column",
}


# from TimesFM_2p5_200M_Definition in the original; the config.json of its checkpoint names no sizes
_LARGE = TimesFM2p5Config.of(
    patch_len=32,
    output_len=128,
    spread_len=1024,
    d_model=1280,
    d_ff=1280,
    layers=20,
    heads=16,
    head_dim=80,
)
PRESETS = {
    "google/timesfm-2.5-200m-pytorch": _LARGE,
    "google/timesfm-2.5-200m-transformers": _LARGE,
}


class Attention(nn.Module):
    """Self-attention [B, N, D] -> [B, N, D]: rotary positions, then norms of queries and keys, then
    a scale of the queries per dimension. Returns the output, the cache with the new keys and
    values, and the steps between.
    """

    cfg: TimesFM2p5Config
    dims: HeadDims

    @nn.compact
    def __call__(self, x_BND, positions_BN, seen_BHNS, cache: Cache | None, start):
        cfg, dims = self.cfg, self.dims

        def project(name):
            linear = Linear((cfg.d_model,), dims.shapes[name], use_bias=False, name=name)
            return jnp.swapaxes(linear(x_BND), 1, 2)

        def normed(name):
            turned = rotary(project(name), positions_BN[:, None])
            return RMSNorm(cfg.norm_eps, name=f"{name}_norm")(turned)

        q_BHNK, k_BHSK, v_BHSK = normed("q"), normed("k"), project("v")
        taps = {"q_norm": jnp.swapaxes(q_BHNK, 1, 2), "k_norm": jnp.swapaxes(k_BHSK, 1, 2)}
        scaling_K = nn.softplus(self.param("scaling", nn.initializers.zeros, (cfg.head_dim,)))
        scaling_K = (scaling_K * (LOG2_E * cfg.head_dim**-0.5)).astype(q_BHNK.dtype)
        q_BHNK = q_BHNK * scaling_K[None, None, None]
        taps["q_scaled"] = jnp.swapaxes(q_BHNK, 1, 2)
        if cache is not None:
            k_BHSK, v_BHSK = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=2)
                for old, new in zip(cache, (k_BHSK, v_BHSK), strict=True)
            )
        y_BHNK, taps["weights"] = attend(q_BHNK, k_BHSK, v_BHSK, seen=seen_BHNS, hidden=UNSEEN)
        values = dims.joined
        out = Linear(values, (cfg.d_model,), use_bias=False, name="out")
        return out(jnp.swapaxes(y_BHNK, 1, 2)), (k_BHSK, v_BHSK), taps


class Block(nn.Module):
    """Attention and feed-forward, each between two norms of its own and added to its input."""

    cfg: TimesFM2p5Config
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BND, positions_BN, seen_BHNS, cache: Cache | None, start):
        cfg, taps = self.cfg, {}

        def norm(name, y_BND):
            taps[name] = RMSNorm(cfg.norm_eps, name=name)(y_BND)
            return taps[name]

        attention = Attention(cfg, self.dims.attn, name="attn")
        y_BND, cache, inner = attention(
            norm("pre_attn_norm", x_BND), positions_BN, seen_BHNS, cache=cache, start=start
        )
        taps |= nested("attn", inner, y_BND)
        x_BND = x_BND + norm("post_attn_norm", y_BND)
        y_BND = norm("pre_ffn_norm", x_BND)
        y_BND = feed_forward(y_BND, self.dims.ffn, "silu", use_bias=False)
        return x_BND + norm("post_ffn_norm", y_BND), cache, taps


class TimesFM2p5Net(nn.Module):
    """Scaled patches [B, N, P] and which points are observed [B, N, P] -> scaled outputs [B, N, O,
    1 + Q] and spreads [B, N, spread_len, 1 + Q] (of the last patch alone: N is 1), the caches of
    all layers, the named steps between.

    padded_B: how many patches in front are padding. caches: of the `start` patches that came
    before.
    """

    cfg: TimesFM2p5Config

    @nn.compact
    def __call__(
        self,
        z_BNP,
        observed_BNP,
        padded_B,
        caches: list[Cache] | None = None,
        start=0,
        last: bool = False,
    ):
        cfg, taps, kept = self.cfg, {}, []
        n = z_BNP.shape[1]
        s = caches[0][0].shape[2] if caches else n
        embed = ResidualBlock(2 * cfg.patch_len, cfg.embed_dim, cfg.d_model, name="embed")
        # The original's mask, which its weights are made for, is 1 where nothing is observed.
        mask_BNP = (~observed_BNP).astype(z_BNP.dtype)
        x_BND = taps["embed"] = embed(jnp.concatenate([z_BNP, mask_BNP], axis=-1))
        place_N = start + jnp.arange(n)
        seen_BHNS = (jnp.arange(s)[None] <= place_N[:, None])[None, None]
        seen_BHNS = seen_BHNS & (jnp.arange(s)[None] >= padded_B[:, None])[:, None, None]
        positions_BN = place_N[None] - padded_B[:, None]
        # A loop and no scan: pruned layers differ in width.
        for i, dims in enumerate(cfg.layers):
            block = Block(cfg, dims, name=f"layer_{i}")
            x_BND, cache, inner = block(
                x_BND, positions_BN, seen_BHNS, cache=caches[i] if caches else None, start=start
            )
            kept.append(cache)
            taps |= nested(f"layer_{i}", inner, x_BND)
        x_BND = x_BND[:, -1:] if last else x_BND
        columns = 1 + len(cfg.quantiles)
        head = ResidualBlock(
            cfg.d_model, cfg.point_dim, cfg.output_len * columns, use_bias=False, name="head"
        )
        spread = ResidualBlock(
            cfg.d_model,
            cfg.spread_dim,
            cfg.spread_len * columns,
            use_bias=False,
            name="spread_head",
        )
        y_BN_, w_BN_ = taps["head"], taps["spread_head"] = head(x_BND), spread(x_BND)
        y_BNOQ = y_BN_.reshape(*y_BN_.shape[:2], cfg.output_len, columns)
        return y_BNOQ, w_BN_.reshape(*w_BN_.shape[:2], cfg.spread_len, columns), kept, taps


def running_stats(x_BNP: jax.Array, observed_BNP: jax.Array, before: Stats | None = None) -> Stats:
    """Statistics [B, N] of all observed values up to the end of each patch, on top of those
    `before` [B].
    """
    weight_BNP = observed_BNP.astype(jnp.float32)
    n_BN = weight_BNP.sum(-1)
    mean_BN = (x_BNP * weight_BNP).sum(-1) / jnp.maximum(n_BN, 1.0)
    squares_BN = (jnp.square(x_BNP - mean_BN[..., None]) * weight_BNP).sum(-1)
    found = jax.lax.associative_scan(merged, (n_BN, mean_BN, squares_BN), axis=1)
    if before is None:
        return found
    n_B, mean_B, squares_B = before
    return merged((n_B[:, None], mean_B[:, None], squares_B[:, None]), found)


def merged(a: Stats, b: Stats) -> Stats:
    """Statistics of two sets of values together (Chan et al.)."""
    n = a[0] + b[0]
    share = b[0] / jnp.maximum(n, 1.0)
    apart = b[1] - a[1]
    return n, a[1] + apart * share, a[2] + b[2] + jnp.square(apart) * a[0] * share


def mean_and_deviation(stats: Stats) -> tuple[jax.Array, jax.Array]:
    """As they scale a patch; never differentiated."""
    n, mean, squares = stats
    return jax.lax.stop_gradient((mean, jnp.sqrt(squares / jnp.maximum(n, 1.0))))


def unbiased_scale(x_BT: jax.Array, begun_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation [B, 1] of each series, of n values with n - 1 in the place of n; 1 where
    it is tiny.
    """
    n_B1 = jnp.maximum(begun_BT.sum(1, keepdims=True), 1)
    mean_B1 = x_BT.sum(1, keepdims=True) / n_B1
    squares_B1 = jnp.where(begun_BT, jnp.square(x_BT - mean_B1), 0.0).sum(1, keepdims=True)
    std_B1 = jnp.sqrt(squares_B1 / jnp.maximum(n_B1 - 1, 1))
    return mean_B1, jnp.where(std_B1 < MIN_SCALE, 1.0, std_B1)


def flipped(y: jax.Array) -> jax.Array:
    """Turn a forecast of -x into one of x, but for its sign: the mean in its place, the quantiles
    in reverse.
    """
    return jnp.concatenate([y[..., :1], y[..., :0:-1]], axis=-1)


@dataclasses.dataclass(frozen=True)
class TimesFM2p5(Model):
    """TimesFM 2.5 at one size. See the module docstring; `Model` documents the methods."""

    config: TimesFM2p5Config

    family = "timesfm_2p5"
    published = PRESETS
    heads = ("head", "spread_head")
    tasks = ("forecasting",)
    licence = "Apache-2.0 (google/timesfm-2.5-200m-pytorch)"
    shard_rules = (
        (r"^(embed|head|spread_head)/hidden/kernel$", ("fsdp", "tensor")),
        (r"^embed/hidden/bias$", ("tensor",)),
        (r"^(embed|head|spread_head)/out/kernel$", ("tensor", "fsdp")),
        (r"^(embed|head|spread_head)/residual/kernel$", (None, "fsdp")),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn"), Group.units())

    @classmethod
    def small(cls) -> TimesFM2p5Config:
        return TimesFM2p5Config.of(
            patch_len=8,
            output_len=16,
            spread_len=32,
            d_model=16,
            d_ff=24,
            layers=2,
            heads=2,
            head_dim=8,
            context_len=32,
        )

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def horizon(self) -> int:
        return self.config.output_len

    @property
    def eval_batch(self) -> int:
        return max(1, 8192 * self.config.patch_len // self.config.context_len)

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults for linear layers; the norms' scales 0, so that every block is the
        identity at first.
        """
        cfg = self.config
        patches = jax.ShapeDtypeStruct((1, 1, cfg.patch_len), jnp.float32)
        observed = jax.ShapeDtypeStruct(patches.shape, bool)
        none = jax.ShapeDtypeStruct((1,), jnp.int32)
        shapes = parameter_shapes(TimesFM2p5Net(cfg), key, patches, observed, none)
        return draw(key, shapes, torch_rule(shapes, scale=0.0))

    def recipe(self) -> Recipe:
        source = "google-research/timesfm timesfm-forecasting/examples/finetuning/finetune_lora.py"
        return self._recipe(
            lr=1e-4,
            batch_size=32,
            epochs=10,
            schedule="cosine",
            source=source,
            weight_decay=0.01,
            clip=1.0,
            lora=Lora(4, 8.0),
        )

    # --- the network, and around its running scale, in rows [B, T]

    def network(
        self, params: Tree, z_BNP, observed_BNP, caches=None, start=0, padded_B=None, last=False
    ):
        """`TimesFM2p5Net` with these parameters. A patch counts as padding where its last
        point is not observed.
        """
        padded_B = (~observed_BNP[..., -1]).sum(1) if padded_B is None else padded_B
        net = TimesFM2p5Net(self.config)
        return run_network(
            net, params, z_BNP, observed_BNP, padded_B, caches=caches, start=start, last=last
        )

    def apply(self, params: Tree, x_BT: jax.Array, observed_BT=None, last: bool = False):
        """One forward pass in the units of x: outputs [B, N, O, 1 + Q] and spreads [B, N,
        spread_len, 1 + Q] after each of the N = T / P patches, and the named steps. observed:
        booleans, False where x is no value, in front only.

        Raises: ValueError for T that is not whole patches.
        """
        y_BNOQ, w_BNSQ, *_, taps = self._prefill(params, x_BT, observed_BT, last=last)
        return y_BNOQ, w_BNSQ, taps

    def _prefill(self, params: Tree, x_BT, observed_BT, last: bool):
        p, (b, t) = self.config.patch_len, x_BT.shape
        if t % p or not t:
            raise ValueError(f"TimesFM takes whole patches of {p} time steps, got {t} steps")
        observed_BT = jnp.ones((b, t), bool) if observed_BT is None else observed_BT
        observed_BNP = observed_BT.reshape(b, -1, p)
        x_BNP = jnp.where(observed_BNP, x_BT.astype(jnp.float32).reshape(b, -1, p), 0.0)
        stats = running_stats(x_BNP, observed_BNP)
        mean_BN, std_BN = mean_and_deviation(stats)
        z_BNP = self._scaled(x_BNP, observed_BNP, mean_BN, std_BN=std_BN)
        y_BNOQ, w_BNSQ, caches, taps = self.network(params, z_BNP, observed_BNP, last=last)
        taps |= {"mean": mean_BN, "std": std_BN}
        keep = slice(-1, None) if last else slice(None)
        scale, shift = std_BN[:, keep, None, None], mean_BN[:, keep, None, None]
        padded_B = (~observed_BNP[..., -1]).sum(1)
        return y_BNOQ * scale + shift, w_BNSQ * scale + shift, caches, stats, padded_B, taps

    def _scaled(self, x_BNP, observed_BNP, mean_BN, std_BN):
        std_BN = jnp.where(std_BN < MIN_SCALE, 1.0, std_BN)
        return jnp.where(observed_BNP, (x_BNP - mean_BN[..., None]) / std_BN[..., None], 0.0)

    def decode(
        self,
        params: Tree,
        x_BT: jax.Array,
        observed_BT: jax.Array,
        horizon: int,
        last: bool = False,
    ):
        """The original's roll-out: the point column goes back in as O / P patches, and the last of
        them speaks.

        Keys and values are kept, and so is the scale, which runs on. last: of the context, say only
        what follows.
        Returns: outputs of the context [B, N, O, 1 + Q], spread after it [B, spread_len, 1 + Q],
        the further outputs [B, steps, O, 1 + Q] (steps may be 0), and the named steps of the pass
        over the context.
        """
        cfg = self.config
        y_BNOQ, w_BNSQ, caches, stats, padded_B, taps = self._prefill(
            params, x_BT, observed_BT, last=last
        )
        b, m = x_BT.shape[0], cfg.output_len // cfg.patch_len
        steps = (horizon - 1) // cfg.output_len
        if not steps:
            return y_BNOQ, w_BNSQ[:, -1], jnp.zeros((b, 0, *y_BNOQ.shape[2:])), taps

        # Room for the keys and values of what is forecast.
        room = ((0, 0), (0, 0), (0, steps * m), (0, 0))
        caches = jax.tree.map(lambda y_BHSK: jnp.pad(y_BHSK, room), caches)

        def again(carry, _):
            caches, before, points_BO, start = carry
            x_BNP = points_BO.reshape(b, m, cfg.patch_len)
            observed_BNP = jnp.ones_like(x_BNP, bool)
            stats = running_stats(x_BNP, observed_BNP, before)
            mean_BN, std_BN = mean_and_deviation(stats)
            z_BNP = self._scaled(x_BNP, observed_BNP, mean_BN, std_BN=std_BN)
            y_BNOQ, _, caches, _ = self.network(
                params,
                z_BNP,
                observed_BNP,
                caches=caches,
                start=start,
                padded_B=padded_B,
                last=True,
            )
            y_BOQ = y_BNOQ[:, 0] * std_BN[:, -1, None, None] + mean_BN[:, -1, None, None]
            before = tuple(y[:, -1] for y in stats)
            return (caches, before, y_BOQ[..., cfg.point_column], start + m), y_BOQ

        before, points_BO = tuple(y[:, -1] for y in stats), y_BNOQ[:, -1, :, cfg.point_column]
        first = (caches, before, points_BO, jnp.asarray(x_BT.shape[1] // cfg.patch_len))
        _, y_SBOQ = jax.lax.scan(again, first, length=steps)
        return y_BNOQ, w_BNSQ[:, -1], jnp.moveaxis(y_SBOQ, 0, 1), taps

    # --- series [B, C, T]

    def forecast(
        self, params: Tree, context: jax.Array, horizon: int, backcast: bool = False
    ) -> jax.Array:
        """Mean and quantiles [B, C, horizon, 1 + Q] after `context` [B, C, T], by the options of
        the config.

        backcast: put before it what the patches but the last say of the patch after them: [B, C, T'
        - P + horizon, 1 + Q], where T' is the context cut or padded in front to whole patches; 0
          for padding.
        """
        cfg, (b, c, _) = self.config, jnp.shape(context)
        x_BT, begun_BT = self._newest(context)
        front = ((0, 0), (-x_BT.shape[1] % cfg.patch_len, 0))
        x_BT, begun_BT = jnp.pad(x_BT, front), jnp.pad(begun_BT, front)
        positive_B = (x_BT >= 0).all(1)
        mean_B1, std_B1 = jnp.zeros((b * c, 1)), jnp.ones((b * c, 1))
        if cfg.normalize_inputs:
            mean_B1, std_B1 = unbiased_scale(x_BT, begun_BT)
            x_BT = jnp.where(begun_BT, (x_BT - mean_B1) / std_B1, 0.0)
        if cfg.force_flip_invariance:
            # The series turned over are rows of their own, in the same pass.
            x_BT = jnp.concatenate([x_BT, -x_BT])
            begun_BT = jnp.concatenate([begun_BT, begun_BT])

        y_BNOQ, w_BSQ, more_BNOQ, _ = self.decode(
            params, x_BT, begun_BT, horizon=horizon, last=not backcast
        )
        rows, columns = len(x_BT), y_BNOQ.shape[-1]
        more_BHQ = more_BNOQ.reshape(rows, -1, columns)
        y_BHQ = jnp.concatenate([y_BNOQ[:, -1], more_BHQ], axis=1)
        back_BTQ = y_BNOQ[:, :-1, : cfg.patch_len].reshape(rows, -1, columns)
        if cfg.force_flip_invariance:
            y_BHQ, back_BTQ, w_BSQ = (
                (y[: b * c] - flipped(y[b * c :])) / 2 for y in (y_BHQ, back_BTQ, w_BSQ)
            )

        # The options of the original, in its order.
        y_BHQ = y_BHQ[:, :horizon]
        if cfg.use_continuous_quantile_head:
            y_BHQ = self._spread(y_BHQ, w_BSQ)
        y_BHQ = jnp.concatenate([back_BTQ, y_BHQ], axis=1) if backcast else y_BHQ
        if cfg.fix_quantile_crossing:
            y_BHQ = self._uncrossed(y_BHQ)
        y_BHQ = y_BHQ * std_B1[..., None] + mean_B1[..., None]
        if cfg.infer_is_positive:
            y_BHQ = jnp.where(positive_B[:, None, None], jnp.maximum(y_BHQ, 0.0), y_BHQ)
        return y_BHQ.reshape(b, c, *y_BHQ.shape[1:])

    def _newest(self, context):
        """The rows [B * C, T] that the network reads, gaps filled, and where each has begun."""
        x_BT, begun_BT = interpolate_missing(
            jnp.asarray(context, jnp.float32).reshape(-1, context.shape[-1])
        )
        limit = math.ceil(self.config.max_context / self.config.patch_len) * self.config.patch_len
        return x_BT[:, -limit:], begun_BT[:, -limit:]

    def _spread(self, y_BHQ, w_BSQ):
        """Quantiles as far from the point column as the quantile head says, for as many steps as it
        knows.
        """
        s, k = min(y_BHQ.shape[1], self.config.spread_len), self.config.point_column
        near_BSQ = w_BSQ[:, :s] - w_BSQ[:, :s, k : k + 1] + y_BHQ[:, :s, k : k + 1]
        column_Q = jnp.arange(y_BHQ.shape[-1])
        near_BSQ = jnp.where(
            ((column_Q == 0) | (column_Q == k))[None, None], y_BHQ[:, :s], near_BSQ
        )
        return jnp.concatenate([near_BSQ, y_BHQ[:, s:]], axis=1)

    def _uncrossed(self, y_BHQ):
        """Quantiles in order, from the point column outwards: none below it is above its neighbour,
        and so on.
        """
        k, axis = self.config.point_column, y_BHQ.ndim - 1
        below = jax.lax.cummin(y_BHQ[..., 1 : k + 1], axis=axis, reverse=True)
        above = jax.lax.cummax(y_BHQ[..., max(k, 1) :], axis=axis)[..., bool(k) :]
        return jnp.concatenate([y_BHQ[..., :1], below, above], axis=-1)

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Rolled out O steps at a time, with keys and values kept. The newest `max_context` steps
        are read.

        Missing values lie on the line between their neighbours, before the first value they are
        padding, after the last they repeat it. Beyond `spread_len` steps the quantiles are those of
        the first head.
        """
        check_context(context, horizon)
        full_BCHQ = self.forecast(params, context, horizon)
        return Forecast(
            full_BCHQ[..., self.config.point_column],
            full_BCHQ[..., 1:],
            levels=self.config.quantiles,
        )

    def _for_training(self, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Forecast of the target [B, C, H, 1 + Q], the target with 0 for NaN, and what of it is
        observed.
        """
        target = batch["target"]
        if target.shape[-1] > self.config.output_len:
            raise ValueError(
                f"the loss reaches one output ({self.config.output_len} steps), not "
                f"{target.shape[-1]} steps"
            )
        raw = TimesFM2p5(
            dataclasses.replace(self.config, fix_quantile_crossing=False, infer_is_positive=False)
        )
        observed = ~jnp.isnan(target)
        full_BCHQ = raw.forecast(params, batch["context"], target.shape[-1])
        return full_BCHQ, jnp.where(observed, target, 0.0), observed

    def loss(
        self, params: Tree, batch: Batch, key=None, train=False, *, aligned: bool = True
    ) -> jax.Array:
        """The fine-tuning loss of the port in the transformers library: MSE of the point column
        plus the mean over the quantiles of the pinball loss, target and forecast scaled by mean and
        deviation of the whole context. At most O steps of target.

        aligned=False: as the port has it, which leaves the point column out and takes the mean and
        the quantiles that are left, in order, for the quantiles.
        """
        y_BCHQ, target_BCH, observed_BCH = self._for_training(params, batch)
        k = self.config.point_column
        mean_B1, std_B1 = (
            y.reshape(*target_BCH.shape[:2], 1)
            for y in unbiased_scale(*self._newest(batch["context"]))
        )
        target_BCH = (target_BCH - mean_B1) / std_B1
        y_BCHQ = (y_BCHQ - mean_B1[..., None]) / std_B1[..., None]
        columns = y_BCHQ[..., 1:]
        if not aligned:
            columns = jnp.concatenate([y_BCHQ[..., :k], y_BCHQ[..., k + 1 :]], axis=-1)
        error_BCH = jnp.square(y_BCHQ[..., k] - target_BCH)
        error_BCH = error_BCH + pinball(target_BCH, columns, self.config.quantiles).mean(-1)
        return mean_observed(error_BCH, observed_BCH, batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the point column. At most O steps of target."""
        y_BCHQ, target_BCH, observed_BCH = self._for_training(params, batch)
        return mean_observed(
            jnp.square(y_BCHQ[..., self.config.point_column] - target_BCH), observed_BCH, batch
        )
