"""MOMENT: a T5 encoder over patches of one variate, trained to fill in the patches that were hidden
from it.

Goswami et al., "MOMENT: A Family of Open Time-series Foundation Models" (ICML 2024, arXiv
2402.03885). Follows momentfm 0.1.5 (moment-timeseries-foundation-model/moment, commit 38f7310) with
the T5 encoder of transformers 4.57.6.

A series is scaled by mean and deviation of what is seen of it, cut into patches, embedded (a hidden
patch is one learned vector, [MASK]), given a position table that the checkpoint brings, and
encoded. What comes after is the head:

    reconstruction   a patch from each token: the published head, pretrained. For imputation,
                     anomaly scores, and zero-shot forecasts, for which patches of [MASK] stand
                     where the forecast is wanted
    forecasting      all tokens -> `horizon` steps
    classification   mean token of all variates -> logits

The published files have no heads of the last two kinds: `Moment.with_head` puts an untrained one
on, and the training is yours.

Masks are 1 where something is there, as in the original. `input_mask` says what is data (0: padding
on the left, which no token attends to), `mask` what of the data may be seen (0: hidden, becomes
[MASK]). A patch counts as there when all its steps are.

Different from the original, which gives NaN: a series of which nothing is seen has mean 0 and
deviation 1e-5; missing values are at the mean in `reconstruct` too. Its mask generator hides blocks
of 8 steps whatever the patch length; here they are patches (8 steps in every published model).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import t5
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, draw, torch_linear
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import mean_over_rows
from ltsm_jax.layers.network import parameter_shapes, run_network
from ltsm_jax.layers.patches import end_to_end
from ltsm_jax.layers.positions import require_table
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import T5_GROUPS, LayerStack
from ltsm_jax.trees import Tree, flatten

SCALE_EPS = 1e-5  # added to the deviation, after the root
TABLE_LEN = 5000  # rows of the original's position table
ORTHOGONAL_GAIN = 1.41
MASK_RATIO = 0.3  # share of patches hidden in pretraining

Head = Literal["reconstruction", "forecasting", "classification"]
HEAD_FIELDS = {  # options of a head, by the original's name
    "forecasting": {"forecast_horizon": "horizon"},
    "classification": {
        "num_class": "n_classes",
        "n_channels": "n_variates",
        "reduction": "reduction",
    },
}


@dataclasses.dataclass(frozen=True)
class MomentConfig:
    """Widths are per layer, so that a pruned MOMENT is a MOMENT.

    d_model D, head_dim K, layers: H, K and F of each, as in `t5.StackConfig`. patch_len P and
    context_len in time steps. head: what is on top, with horizon (steps of the forecasting head),
    n_classes, n_variates and reduction (of the classification head: "concat" reads all variates,
    "mean" their mean). dropout is T5's, patch_dropout after the embedding, head_dropout in the
    head. table_len: rows of the position table. vocab_size: of T5's token embedding, which the
    checkpoint holds and nothing uses.
    """

    d_model: int
    head_dim: int
    layers: tuple[t5.T5Layer, ...]
    patch_len: int = 8
    context_len: int = 512
    head: Head = "reconstruction"
    horizon: int = 0
    n_classes: int = 0
    n_variates: int = 0
    reduction: Literal["concat", "mean"] = "concat"
    n_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dropout: float = 0.1
    patch_dropout: float = 0.1
    head_dropout: float = 0.1
    table_len: int = TABLE_LEN
    vocab_size: int = 32128

    def __post_init__(self):
        sizes = ("d_model", "head_dim", "patch_len", "context_len", "table_len")
        problems = field_problems(self, *sizes)
        if self.d_model % 2:
            problems.append(f"d_model must be even for the sinusoid table, got {self.d_model}")
        if self.patch_len > 0 and not 1 <= self.n_patches <= self.table_len:
            problems.append(
                f"the context ({self.context_len} steps) must be 1 to {self.table_len} patches of "
                f"{self.patch_len}"
            )
        if self.head == "forecasting" and self.horizon < 1:
            problems.append("a forecasting head needs horizon of at least 1")
        if self.head == "classification" and self.n_classes < 1:
            problems.append("a classification head needs n_classes of at least 1")
        if self.head == "classification" and self.reduction == "concat" and self.n_variates < 1:
            problems.append("a classification head that reads all variates needs n_variates")
        refuse(self, problems)
        _ = self.stack  # its own checks

    @property
    def n_patches(self) -> int:
        """Tokens of one context."""
        return self.context_len // self.patch_len

    @property
    def stack(self) -> t5.StackConfig:
        """The encoder."""
        return t5.StackConfig(
            self.d_model,
            self.head_dim,
            self.layers,
            n_buckets=self.n_buckets,
            max_distance=self.max_distance,
            activation="gelu_new",
            gated=True,
            eps=self.eps,
            dropout=self.dropout,
        )

    @classmethod
    def of(
        cls, layers: int, d_model: int, d_ff: int, heads: int, head_dim: int, **rest: Any
    ) -> "MomentConfig":
        """All layers alike."""
        equal = t5.StackConfig.of(d_model, head_dim, layers, heads=heads, ffn=d_ff).layers
        return cls(d_model, head_dim, equal, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "MomentConfig":
        """Reads a published config.json (seq_len, patch_len, t5_config, ..., and what model_kwargs
        puts over them).

        Raises: ValueError for fields that are missing, or name a variant that no published model
        is.
        """
        fields = {**fields, **(fields.get("model_kwargs") or {})}
        inner = fields.get("t5_config")
        if not isinstance(inner, Mapping):
            raise ValueError("the config of a MOMENT checkpoint lacks t5_config")
        sizes = ("num_layers", "d_model", "d_ff", "num_heads", "d_kv")
        require_fields("MOMENT", fields, ("seq_len", "patch_len"), inner={"t5_config": sizes})
        fixed = {
            "transformer_type": ("encoder_only",),
            "patch_stride_len": (fields["patch_len"],),
            "d_model": (None, inner["d_model"]),
            "revin_affine": (False,),
            "value_embedding_bias": (False,),
            "add_positional_embedding": (True,),
        }
        odd = [
            f"{name} {fields[name]!r}"
            for name, known in fixed.items()
            if name in fields and fields[name] not in known
        ]
        if inner.get("feed_forward_proj", "relu") != "gated-gelu":
            odd.append(f"t5_config.feed_forward_proj {inner.get('feed_forward_proj', 'relu')!r}")
        if odd:
            raise ValueError(f"no published MOMENT has {', '.join(odd)}")
        rest: dict[str, Any] = {
            ours: source[theirs]
            for source, theirs, ours in (
                (inner, "relative_attention_num_buckets", "n_buckets"),
                (inner, "relative_attention_max_distance", "max_distance"),
                (inner, "layer_norm_epsilon", "eps"),
                (inner, "dropout_rate", "dropout"),
                (inner, "vocab_size", "vocab_size"),
                (fields, "patch_dropout", "patch_dropout"),
                (fields, "head_dropout", "head_dropout"),
                (fields, "table_len", "table_len"),
            )
            if theirs in source
        }
        task = fields.get("task_name", "reconstruction")
        of_head = HEAD_FIELDS.get(task, {})
        rest |= {ours: fields[theirs] for theirs, ours in of_head.items() if theirs in fields}
        head = "reconstruction" if task == "embedding" else task
        rest |= {"patch_len": fields["patch_len"], "context_len": fields["seq_len"], "head": head}
        return cls.of(*(inner[name] for name in sizes), **rest)


PRESETS = {
    "AutonLab/MOMENT-1-small": MomentConfig.of(8, 512, 1024, heads=6, head_dim=64),
    "AutonLab/MOMENT-1-base": MomentConfig.of(12, 768, 2048, heads=12, head_dim=64),
    "AutonLab/MOMENT-1-large": MomentConfig.of(24, 1024, 2816, heads=16, head_dim=64),
}


def interleaved_sinusoids(n: int, d_model: int) -> np.ndarray:
    """The position table of a fresh model [n, D], float32: sines in even columns, cosines in odd
    ones, base 10000.
    """
    require_table(n, d_model)
    frequency = np.exp(
        np.arange(0, d_model, 2, dtype=np.float32) * np.float32(-math.log(10000.0) / d_model)
    )
    angle = (np.arange(n, dtype=np.float32)[:, None] * frequency).astype(np.float64)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(n, d_model).astype(np.float32)


def whole_patches(mask: jax.Array, patch_len: int) -> jax.Array:
    """[..., T] -> [..., N]: 1 where all steps of a patch are 1; steps after the last whole patch
    are left out.
    """
    n = mask.shape[-1] // patch_len
    cut = mask[..., : n * patch_len].reshape(*mask.shape[:-1], n, patch_len)
    return (cut != 0).all(-1).astype(jnp.float32)


def random_mask(
    key: jax.Array | None, input_mask: jax.Array, ratio: float, block: int
) -> jax.Array:
    """Draw the visible points of pretraining, [..., T]: a share `ratio` (rounded down) of the
    blocks of data is hidden.

    Blocks that are not all data are hidden too. T is cut to whole blocks. key: may be None where
    ratio is 0.
    """
    # Blocks of data in an order by chance, the others behind them; the first ones stay visible.
    data = whole_patches(input_mask, block)
    noise = jnp.zeros_like(data) if key is None else jax.random.uniform(key, data.shape)
    rank = jnp.argsort(jnp.argsort(jnp.where(data == 1, noise, 2.0), axis=-1), axis=-1)
    kept = rank < jnp.ceil(data.sum(-1, keepdims=True) * (1 - ratio))
    return jnp.repeat(kept.astype(jnp.float32), block, axis=-1)


class MomentNet(nn.Module):
    """Scaled patches [B, C, N, P] -> the head's output, still scaled, and the named steps between.

    visible [B, C, N]: 0 where a patch is [MASK]. data [B, C, N]: 0 where no token looks. The output
    is [B, C, N*P], [B, C, horizon] or [B, classes]; without head, [B, C, N, D].
    """

    cfg: MomentConfig
    with_head: bool = True

    @nn.compact
    def __call__(self, p_BCNP, visible_BCN, data_BCN, train: bool = False):
        cfg, taps = self.cfg, {"patches": p_BCNP}
        b, c, n, _ = p_BCNP.shape
        if n > cfg.table_len:
            raise ValueError(f"{n} patches; the position table has {cfg.table_len} rows")
        x_BCND = Linear((cfg.patch_len,), (cfg.d_model,), use_bias=False, name="embed")(
            p_BCNP
        ).astype(p_BCNP.dtype)
        taps["value_embed"] = x_BCND
        mask_D = self.param("mask_embed", nn.initializers.zeros, (cfg.d_model,)).astype(
            x_BCND.dtype
        )
        # a buffer of the original that is used: data, not to be trained
        table_SD = self.param("position_table", nn.initializers.zeros, (cfg.table_len, cfg.d_model))
        positions_ND = jax.lax.stop_gradient(table_SD[:n]).astype(x_BCND.dtype)
        x_BCND = (
            jnp.where(visible_BCN[..., None] != 0, x_BCND, mask_D[None, None, None])
            + positions_ND[None, None]
        )
        x_BCND = taps["embed"] = Dropout(cfg.patch_dropout)(x_BCND, train)
        # Which gives None only where it gets None.
        encoder: Any = t5.Stack(cfg.stack, name="encoder")
        x_BND, inner, _ = encoder(
            x_BCND.reshape(b * c, n, -1), data_BCN.reshape(b * c, n), train=train
        )
        taps |= {f"encoder/{name}": value.reshape(x_BCND.shape) for name, value in inner.items()}
        x_BCND = taps["encoder"] = x_BND.reshape(b, c, n, -1)
        if not self.with_head:
            return x_BCND, taps

        def drop(y):
            return Dropout(cfg.head_dropout)(y, train)

        def head(width, out):
            return Linear((width,), (out,), name="head")

        if cfg.head == "reconstruction":
            y_BCNP = taps["head"] = head(cfg.d_model, cfg.patch_len)(drop(x_BCND))
            return y_BCNP.reshape(b, c, -1), taps
        if cfg.head == "forecasting":
            if n != cfg.n_patches:
                raise ValueError(f"the forecasting head reads {cfg.n_patches} patches, not {n}")
            taps["head"] = head(n * cfg.d_model, cfg.horizon)(x_BCND.reshape(b, c, -1))
            return drop(taps["head"]), taps  # dropout after the linear, as in the original
        if cfg.reduction == "mean":
            f_BNF = x_BCND.mean(1)
        elif c == cfg.n_variates:
            f_BNF = jnp.moveaxis(x_BCND, 1, -1).reshape(b, n, -1)  # variates are the fast index
        else:
            raise ValueError(
                f"the classification head reads {cfg.n_variates} variates, the series have {c}"
            )
        taps["features"] = f_BNF
        taps["head"] = head(f_BNF.shape[-1], cfg.n_classes)(drop(f_BNF.mean(1)))
        return taps["head"], taps


@dataclasses.dataclass(frozen=True)
class Moment(Model):
    """MOMENT at one size under one head. See the module docstring; `Model` documents
    the methods.
    """

    config: MomentConfig

    family = "moment"
    published = PRESETS
    head_names = ("reconstruction", "forecasting", "classification")
    # A batch's loss is a mean over all of its masked points, and masks are random.
    rows_apart = False
    tasks = ("forecasting", "imputation", "anomaly", "classification", "embedding")
    licence = "MIT (AutonLab/MOMENT-1)"
    shard_rules = (
        *t5.SHARD_RULES,
        (r"^embed/kernel$", (None, "fsdp")),
        (r"^(position_table|mask_embed)$", ()),
        (r"^head/kernel$", ("fsdp", None)),
    )
    stacks = (LayerStack("encoder", ("layers",)),)
    prunable = T5_GROUPS

    @classmethod
    def small(cls) -> MomentConfig:
        return MomentConfig.of(
            2,
            16,
            24,
            heads=2,
            head_dim=6,
            patch_len=8,
            context_len=64,
            n_buckets=8,
            max_distance=16,
            table_len=64,
            vocab_size=32,
        )

    @property
    def fixed(self) -> str | None:
        return r"^position_table$"

    @property
    def horizon(self) -> int:
        """Of the forecasting head; otherwise half the window, as much as one zero-shot pass is
        asked to hide.
        """
        cfg = self.config
        return (
            cfg.horizon if cfg.head == "forecasting" else max(cfg.n_patches // 2, 1) * cfg.patch_len
        )

    @property
    def eval_batch(self) -> int:
        return 256

    def init(self, key: jax.Array) -> Tree:
        """T5's own scheme in the encoder; orthogonal embedding and reconstruction head (gain 1.41,
        bias 0), [MASK] 0; torch's default U(-1/sqrt(fan_in), 1/sqrt(fan_in)) in the other heads.
        The position table is its formula.
        """
        return self._draw(key, self._shapes(key))

    def _shapes(self, key: jax.Array) -> Tree:
        cfg = self.config
        c, n = max(cfg.n_variates, 1), 1 if cfg.head == "reconstruction" else cfg.n_patches
        p_BCNP = jax.ShapeDtypeStruct((1, c, n, cfg.patch_len), jnp.float32)
        m_BCN = jax.ShapeDtypeStruct((1, c, n), jnp.float32)
        return parameter_shapes(MomentNet(cfg), key, p_BCNP, m_BCN, m_BCN)

    def _draw(self, key: jax.Array, shapes: Tree) -> Tree:
        d_model, flat = self.config.d_model, flatten(shapes)
        orthogonal = jax.nn.initializers.orthogonal(ORTHOGONAL_GAIN)

        def rule(path, shape):
            if path == "position_table":
                return lambda _, shape: jnp.asarray(interleaved_sinusoids(*shape))
            if path.startswith("encoder/"):
                return t5.initial(path, shape, d_model)
            if path.startswith("head/") and self.config.head != "reconstruction":
                return torch_linear(flat, path) or Constant(0.0)
            return orthogonal if path.endswith("/kernel") else Constant(0.0)

        return draw(key, shapes, rule)

    def with_head(
        self, params: Tree, head: str, key: jax.Array, **sizes: Any
    ) -> tuple["Moment", Tree]:
        """The same body under a fresh, untrained head.

        Args:
          head: "forecasting" with horizon=; "classification" with n_classes= and n_variates= (or
            reduction="mean", which needs no n_variates); "reconstruction". head_dropout= goes with
            each.
        Raises: ValueError for another head, or sizes that are missing or not known.
        """
        if head not in self.head_names:
            raise ValueError(f"moment has the heads {', '.join(self.head_names)}, not {head!r}")
        known = {
            "forecasting": {"horizon"},
            "classification": {"n_classes", "n_variates", "reduction"},
        }
        if unknown := sorted(sizes.keys() - known.get(head, set()) - {"head_dropout"}):
            raise ValueError(f"a {head} head has no {', '.join(unknown)}")
        # The sizes of the head before are no part of the new one's config.
        blank = {"horizon": 0, "n_classes": 0, "n_variates": 0, "reduction": "concat", "head": head}
        model = Moment(dataclasses.replace(self.config, **(blank | sizes)))
        return model, dict(params) | model._draw(key, {"head": model._shapes(key)["head"]})

    def _need(self, head: Head, what: str) -> None:
        if self.config.head != head:
            sizes = {
                "forecasting": ", horizon=...",
                "classification": ", n_classes=..., n_variates=...",
            }.get(head, "")
            raise ValueError(
                f"{what} needs the {head} head; this MOMENT has the {self.config.head} head. "
                + (
                    "Load the published checkpoint again, or put"
                    if head == "reconstruction"
                    else "Put"
                )
                + " an untrained one on and train it: model, params = model.with_head(params, "
                f'"{head}", key{sizes})'
            )

    def recipe(self) -> Recipe:
        """Linear probing: embedder and encoder are frozen unless asked otherwise."""
        source = (
            "moment tutorials/forecasting.ipynb: OneCycle with peak 1e-4 (here a cosine), clip 5, "
            "8 windows of 7 variates a batch (here about as many of one), the body frozen"
        )
        horizon = self.config.horizon or min(96, self.horizon)
        return self._recipe(
            lr=1e-4,
            batch_size=64,
            epochs=3,
            schedule="cosine",
            horizon=horizon,
            source=source,
            clip=5.0,
            trainable=r"^head/",
        )

    # --- the network around its instance scaling

    def _net(
        self, params: Tree, z_BCT, visible_BCT, data_BCT, key=None, train=False, with_head=True
    ):
        cfg = self.config
        b, c, t = z_BCT.shape
        n = t // cfg.patch_len
        if n < 1:
            raise ValueError(
                f"MOMENT needs at least one patch of {cfg.patch_len} time steps, got {t}"
            )
        p_BCNP = z_BCT[..., : n * cfg.patch_len].reshape(b, c, n, cfg.patch_len)
        visible_BCN, data_BCN = (
            jnp.broadcast_to(whole_patches(m, cfg.patch_len), (b, c, n))
            for m in (visible_BCT, data_BCT)
        )
        net = MomentNet(cfg, with_head)
        y, taps = run_network(net, params, p_BCNP, visible_BCN, data_BCN, key=key, train=train)
        return y, {"scaled": z_BCT} | taps

    def apply(
        self, params: Tree, x_BCT: jax.Array, input_mask=None, mask=None, key=None, train=False
    ):
        """One forward pass of the original's `forward`: what the head gives, in units of x, and the
        named steps.

        Args:
          x: [B, C, T], NaN = missing. Steps after the last whole patch count in the scale but are
            no patch.
          input_mask: [B, C, T] or [B, 1, T], 1 = data, 0 = padding; None: all data.
          mask: the same, 1 = visible, 0 = hidden, for the reconstruction head alone; None: all
            patches of data.
        Returns: reconstruction [B, C, N*P], forecast [B, C, horizon] (T must be the context length)
          or logits [B, classes]; and the taps.
        """
        cfg = self.config
        data = jnp.ones((x_BCT.shape[0], 1, x_BCT.shape[-1])) if input_mask is None else input_mask
        seen = data
        if cfg.head == "reconstruction":
            if mask is None:
                n = data.shape[-1] // cfg.patch_len * cfg.patch_len
                mask = jnp.pad(
                    random_mask(None, data, 0.0, block=cfg.patch_len),
                    ((0, 0), (0, 0), (0, data.shape[-1] - n)),
                )
            visible, seen = mask, data * mask
        elif mask is not None:
            raise ValueError(
                f"`mask` is for the reconstruction head; this MOMENT has the {cfg.head} head"
            )
        else:
            # the original embeds padding as values under this head, as [MASK] under that one
            visible = jnp.ones_like(data) if cfg.head == "forecasting" else data
        z_BCT, mean_BC1, std_BC1 = standardised(x_BCT, seen)
        y, taps = self._net(params, z_BCT, visible, data_BCT=data, key=key, train=train)
        taps |= {"mean": mean_BC1, "std": std_BC1}
        return (y if cfg.head == "classification" else y * std_BC1 + mean_BC1), taps

    def short_forecast(
        self, params: Tree, x_BCT: jax.Array, horizon: int, input_mask=None, key=None, train=False
    ):
        """The zero-shot forecast of the reconstruction head: [B, C, horizon], and the taps.

        The window moves on by as many patches as the horizon takes; where they come to stand are
        [MASK]s, all attended to. Scale of the window before it moved. T must be whole patches, more
        than are hidden for a sensible result.
        """
        self._need("reconstruction", "short_forecast")
        new = -(-horizon // self.config.patch_len) * self.config.patch_len
        if new > x_BCT.shape[-1]:
            raise ValueError(
                f"{horizon} steps do not fit into a window of {x_BCT.shape[-1]}; use predict"
            )
        data = jnp.ones((x_BCT.shape[0], 1, x_BCT.shape[-1])) if input_mask is None else input_mask
        z_BCT, mean_BC1, std_BC1 = standardised(x_BCT, data)
        # What moves out in front comes in behind, where it is hidden: no value of it is read.
        data = jnp.roll(data, -new, axis=-1).at[..., -new:].set(1)
        visible = jnp.ones_like(data).at[..., -new:].set(0)
        y_BCT, taps = self._net(
            params, jnp.roll(z_BCT, -new, axis=-1), visible, data_BCT=data, key=key, train=train
        )
        y_BCT = y_BCT * std_BC1 + mean_BC1
        ahead = y_BCT[..., y_BCT.shape[-1] - new :][..., :horizon]
        return ahead, taps | {
            "mean": mean_BC1,
            "std": std_BC1,
            "reconstruction": y_BCT,
            "input_mask": data,
        }

    def window(self, x_BCT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The newest `context_len` steps (whole patches) of x [B, C, W], and their input mask [B,
        1, W].

        A shorter series is padded on the left with zeros under a mask of 0, as the original's data
        sets do; one shorter than a patch is filled up with its first value before, because nobody
        attends to a patch that is part padding. Missing values stay NaN: `apply` puts them at the
        mean, as the original does.
        """
        p, t = self.config.patch_len, x_BCT.shape[-1]
        w = self.config.n_patches * p

        def pads(n):
            return (0, 0), (0, 0), (max(n, 0), 0)

        x_BCW = jnp.pad(x_BCT.astype(jnp.float32)[..., -w:], pads(p - t), mode="edge")
        pad = max(w - x_BCW.shape[-1], 0)
        data = (jnp.arange(w) >= pad).astype(jnp.float32)
        return jnp.pad(x_BCW, pads(pad)), jnp.broadcast_to(
            data.reshape(1, 1, w), (x_BCT.shape[0], 1, w)
        )

    # --- forecasting

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Of the forecasting head, or zero-shot from the reconstruction head (`short_forecast`),
        from the `window`.

        Horizons past `horizon` are rolled out in a window that takes in the forecasts; zero-shot,
        in as few equal passes as hide no more than half the window. The original has neither.
        Raises: ValueError under a classification head.
        """
        check_context(context, horizon)
        return Forecast(self._forecast(params, jnp.asarray(context), horizon, key=key))

    def _forecast(
        self, params: Tree, context: jax.Array, horizon: int, key=None, train=False
    ) -> jax.Array:
        cfg = self.config
        if cfg.head == "classification":
            self._need("forecasting", "a forecast")
        # Zero-shot passes hide as little as will do: equal parts of the horizon, in whole patches.
        steps = -(-horizon // self.horizon)
        ahead = self.horizon
        if cfg.head == "reconstruction":
            ahead = (
                horizon if steps == 1 else -(-horizon // (steps * cfg.patch_len)) * cfg.patch_len
            )

        def one(x, data, key):
            if cfg.head == "forecasting":
                return self.apply(params, x, data, key=key, train=train)[0]
            return self.short_forecast(params, x, ahead, input_mask=data, key=key, train=train)[0]

        x_BCW, data_BCW = self.window(context)
        w = x_BCW.shape[-1]
        if steps == 1:
            return one(x_BCW, data_BCW, key)[..., :horizon]

        def step(carry, i):
            x, data = carry
            y = one(x, data, None if key is None else jax.random.fold_in(key, i))
            new = jnp.ones((*data.shape[:2], y.shape[-1]))
            return (
                jnp.concatenate([x, y], -1)[..., -w:],
                jnp.concatenate([data, new], -1)[..., -w:],
            ), y

        _, y_SBCH = jax.lax.scan(step, (x_BCW, data_BCW), jnp.arange(steps))
        return end_to_end(y_SBCH)[..., :horizon]

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """The original's loss of the head that is on.

        forecasting: MSE of the forecast. reconstruction: that of pretraining, the MSE of 30 % of
        the patches, hidden at random from `key`, in the newest window of context and target.
        classification: cross entropy against `batch["label"]` [B], integers.
        """
        if self.config.head == "forecasting":
            return self.point_loss(params, batch, key=key, train=train)
        if self.config.head == "classification":
            if "label" not in batch:
                raise ValueError(
                    'the loss of the classification head needs batch["label"] [B], the class of '
                    "each row"
                )
            logits = self.classify(params, batch["context"], key, train=train).astype(jnp.float32)
            picked = jnp.take_along_axis(
                jax.nn.log_softmax(logits), batch["label"].reshape(-1, 1), axis=-1
            )
            return mean_over_rows(-picked, batch)
        x_BCW, data = self.window(jnp.concatenate([batch["context"], batch["target"]], axis=-1))
        mask_key, dropout_key = (jax.random.key(0), None) if key is None else jax.random.split(key)
        mask = random_mask(mask_key, data, MASK_RATIO, block=self.config.patch_len)
        return self.masked_loss(
            params, dict(batch) | {"context": x_BCW}, data, mask=mask, key=dropout_key, train=train
        )

    def masked_loss(
        self, params: Tree, batch: Batch, input_mask, mask, key=None, train=False
    ) -> jax.Array:
        """MSE of the reconstruction of `context` over its known data steps that `mask` hides; masks
        as in `apply`.
        """
        self._need("reconstruction", "this loss")
        x_BCT = batch["context"]
        y_BCT, _ = self.apply(params, x_BCT, input_mask=input_mask, mask=mask, key=key, train=train)
        # What the network saw is no test of it, and padding or NaN no target.
        scored = input_mask * (1 - mask) * ~jnp.isnan(x_BCT)
        weight = batch.get("weight", jnp.ones(x_BCT.shape[0])).reshape(-1, 1, 1)
        error = jnp.square(y_BCT - jnp.nan_to_num(x_BCT)) * scored
        return (error * weight).sum() / ((scored * weight).sum() + 1e-7)

    # --- the other tasks

    def impute(self, params: Tree, x, observed, key=None, train=False, ims=True) -> jax.Array:
        """Reconstruction [B, C, T] of x where `observed` is 0, in data units; any T >= 1, NaN =
        missing.

        A patch with a hole is [MASK] as a whole, as in the original. Series longer than the context
        are cut into windows of it. ims has no meaning here: every patch is what its own token says.
        """
        self._need("reconstruction", "imputation")

        def one(x, data, observed):
            return self.apply(params, x, input_mask=data, mask=observed, key=key, train=train)[0]

        return self._in_windows(one, jnp.asarray(x, jnp.float32), observed.astype(jnp.float32))

    def reconstruct(self, params: Tree, x, key=None, train=False, ims=True) -> jax.Array:
        """Reconstruction [B, C, T] with nothing hidden, as the original's `detect_anomalies`
        compares it with x.

        Series longer than the context are cut into windows of it. ims has no meaning here.
        """
        self._need("reconstruction", "anomaly detection")

        def one(x, data):
            return self.apply(
                params, x, input_mask=data, mask=jnp.ones_like(data), key=key, train=train
            )[0]

        return self._in_windows(one, jnp.asarray(x, jnp.float32))

    def _in_windows(self, f, *arrays_BCT: jax.Array) -> jax.Array:
        """f(x, input_mask, ...) -> [B, C, T] over windows of at most the context, which end with
        the series; the first one may overlap the second. Short series are padded on the left to
        whole patches.
        """
        p, t = self.config.patch_len, arrays_BCT[0].shape[-1]
        w = self.config.n_patches * p
        # One short window, of as many patches as there are.
        if t <= w:
            pad = -t % p
            arrays = [jnp.pad(a, ((0, 0), (0, 0), (pad, 0))) for a in arrays_BCT]
            data = (jnp.arange(t + pad) >= pad).astype(jnp.float32)
            data = jnp.broadcast_to(data.reshape(1, 1, -1), (arrays[0].shape[0], 1, t + pad))
            return f(arrays[0], data, *arrays[1:])[..., pad:]
        # Whole windows, as rows of one batch; of the first one only what no other holds is kept.
        n = -(-t // w)
        starts = [max(t - (n - i) * w, 0) for i in range(n)]

        def in_windows(a):
            return jnp.concatenate([a[..., start : start + w] for start in starts])

        cut = list(map(in_windows, arrays_BCT))
        parts = jnp.split(f(cut[0], jnp.ones((cut[0].shape[0], 1, w)), *cut[1:]), n)
        return jnp.concatenate([parts[0][..., : t - (n - 1) * w], *parts[1:]], axis=-1)

    def embed(
        self, params: Tree, context: jax.Array, reduction: Literal["mean", "none"] = "mean"
    ) -> jax.Array:
        """Embedding [B, D]: the mean token over variates, then over the patches of data; under any
        head.

        reduction: "none" gives every token of the `window`, [B, C, N, D].
        """
        check_context(context, 1)
        x_BCW, data = self.window(jnp.asarray(context))
        return self.embed_window(params, x_BCW, data, reduction=reduction)

    def embed_window(self, params: Tree, x_BCT, input_mask, reduction: str = "mean") -> jax.Array:
        """As `embed`, of x as it is; input_mask [B, 1, T]."""
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction is mean or none, not {reduction!r}")
        z_BCT, *_ = standardised(x_BCT, input_mask)
        e_BCND, _ = self._net(params, z_BCT, input_mask, data_BCT=input_mask, with_head=False)
        if reduction == "none":
            return e_BCND
        data_BN1 = whole_patches(input_mask, self.config.patch_len)[:, 0, :, None]
        return (e_BCND.mean(1) * data_BN1).sum(1) / data_BN1.sum(1)

    def classify(self, params: Tree, x: jax.Array, key=None, train=False) -> jax.Array:
        """Logits [B, classes] of the `window` of x [B, C, T]. Raises: ValueError under another
        head.
        """
        self._need("classification", "classification")
        x_BCW, data = self.window(jnp.asarray(x))
        return self.apply(params, x_BCW, data, key=key, train=train)[0]


def standardised(x_BCT: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x in units of its own deviation around its mean, both over what is seen (1) and not NaN: (z,
    mean, std).

    All steps are scaled, whatever is not finite becomes 0. No gradient flows through mean and
    deviation.
    """
    x_BCT = x_BCT.astype(jnp.float32)
    # Hidden points are scaled too, though they count neither in the mean nor in the deviation.
    known = (seen != 0) & ~jnp.isnan(x_BCT)
    n_BC1 = jnp.maximum(known.sum(-1, keepdims=True), 1)
    mean_BC1 = jnp.where(known, x_BCT, 0.0).sum(-1, keepdims=True) / n_BC1
    z_BCT = x_BCT - mean_BC1
    std_BC1 = (
        jnp.sqrt(jnp.where(known, jnp.square(z_BCT), 0.0).sum(-1, keepdims=True) / n_BC1)
        + SCALE_EPS
    )
    mean_BC1, std_BC1 = jax.lax.stop_gradient((mean_BC1, std_BC1))
    return jnp.nan_to_num(z_BCT / std_BC1, nan=0.0, posinf=0.0, neginf=0.0), mean_BC1, std_BC1
