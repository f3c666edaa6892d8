"""Timer: a decoder-only Transformer over patches of one variate, trained to predict the next patch.

Liu et al., "Timer: Generative Pre-trained Transformers Are Large Time Series Models" (ICML 2024,
arXiv 2402.02368). Follows thuml/Large-Time-Series-Model (commit 1ff8d1a) and, in the same
mathematics, Meteor-Stars/SFF (commit 2dfb50b): post-norm blocks, a sinusoid position table, an
extra norm before the head, instance scaling around it all. A token's output is the prediction of
the NEXT patch, so the forecast is the last token's.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import HeadDims, LayerDims, equal_layers, head_width, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import draw, torch_rule
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, mean_observed, mse_observed
from ltsm_jax.layers.mlp import feed_forward
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.patches import end_to_end, newest_patches
from ltsm_jax.layers.positions import sinusoids
from ltsm_jax.models.configs import field_problems, refuse, require_fields
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe, Task
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree

SCALE_EPS = 1e-5  # inside the root, added to the variance
# Rows of the original's position table: the longest sequence it can take, in patches.
TABLE_LEN = 5000


@dataclasses.dataclass(frozen=True)
class TimerConfig:
    """Widths are per layer, so that a pruned Timer is a Timer.

    patch_len P, d_model D, head_dim K, layers: H, K and F of each, context_len and
    horizon in time steps (the published use: horizon = P). The scale of the scores is that of
    head_dim, whatever is left of a head.
    """

    patch_len: int
    d_model: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    context_len: int = 672
    horizon: int = 96
    task: Task = "forecasting"
    activation: Literal["gelu", "relu"] = "gelu"
    dropout: float = 0.1

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim, scores={"attn": "channels"})
        if self.d_model % 2:
            problems.append(f"d_model must be even for the sinusoid table, got {self.d_model}")
        problems += field_problems(
            self, "patch_len", "d_model", "head_dim", "context_len", "horizon"
        )
        if self.context_len < self.patch_len:
            problems.append(
                f"the context ({self.context_len}) must hold one patch ({self.patch_len})"
            )
        if self.horizon > self.patch_len:
            problems.append(
                f"one step predicts one patch ({self.patch_len}), so the horizon cannot be "
                f"{self.horizon}"
            )
        refuse(self, problems)

    @classmethod
    def of(
        cls, patch_len: int, d_model: int, d_ff: int, layers: int, heads: int, **rest
    ) -> "TimerConfig":
        """Equal layers; heads split the model width as in the original."""
        head_dim = head_width(d_model, heads)
        equal = equal_layers(layers, heads, head_dim, ffn=d_ff)
        return cls(patch_len, d_model, head_dim, layers=equal, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimerConfig":
        """Reads the option names of the original's scripts (patch_len, d_model, d_ff, e_layers,
        n_heads, seq_len, ...).

        Raises: ValueError naming the options that are missing.
        """
        names = ("patch_len", "d_model", "d_ff", "e_layers", "n_heads")
        require_fields("Timer", fields, names)
        options = (("context_len", "seq_len"), ("dropout", "dropout"))
        rest = {ours: fields[theirs] for ours, theirs in options if theirs in fields}
        task = fields.get("task_name", "forecasting")

        # One step predicts one patch: a longer forecast of the scripts is rolled out. For them
        # every activation but relu is gelu.
        patch_len = int(fields["patch_len"])
        return cls.of(
            *(int(fields[name]) for name in names),
            horizon=min(int(fields.get("pred_len", patch_len)), patch_len),
            task={"forecast": "forecasting", "anomaly_detection": "anomaly"}.get(task, task),
            activation="relu" if fields.get("activation") == "relu" else "gelu",
            **rest,
        )


PRESETS = {
    # hyper-parameters from the scripts of thuml/Large-Time-Series-Model; no config file ships with
    # the checkpoints
    "Timer_forecast_1.0": TimerConfig.of(
        96, 1024, 2048, layers=8, heads=8, context_len=672, horizon=96
    ),
    "Timer_imputation_1.0": TimerConfig.of(
        24, 256, 512, layers=4, heads=8, context_len=192, horizon=24, task="imputation"
    ),
    "Timer_anomaly_detection_1.0": TimerConfig.of(
        96, 256, 512, layers=4, heads=8, context_len=768, horizon=96, task="anomaly"
    ),
    # ours, small enough to ship and to train on a laptop
    "timer-tiny": TimerConfig.of(96, 128, 256, layers=4, heads=4, context_len=672, horizon=96),
    # timer-tiny, trained on absolute error
    "timer-median": TimerConfig.of(96, 128, 256, layers=4, heads=4, context_len=672, horizon=96),
    "timer-tiny-imputation": TimerConfig.of(
        24, 128, 256, layers=4, heads=4, context_len=192, horizon=24, task="imputation"
    ),
    "timer-tiny-anomaly": TimerConfig.of(
        96, 128, 256, layers=4, heads=4, context_len=768, horizon=96, task="anomaly"
    ),
    "timer-small": TimerConfig.of(96, 256, 1024, layers=6, heads=8, context_len=672, horizon=96),
}


class Attention(nn.Module):
    """Causal self-attention [B, N, D] -> [B, N, D], and its weights [B, H, N, S]."""

    cfg: TimerConfig
    dims: HeadDims

    @nn.compact
    def __call__(self, x_BND, train: bool):
        cfg, dims = self.cfg, self.dims

        def project(name):
            y_BNHK = Linear((cfg.d_model,), dims.shapes[name], name=name)(x_BND)
            return jnp.swapaxes(y_BNHK, 1, 2)

        n = x_BND.shape[1]
        y_BHNK, w_BHNS = attend(
            project("q"),
            project("k"),
            project("v"),
            seen=jnp.tril(jnp.ones((n, n), bool))[None, None],
            scale=cfg.head_dim**-0.5,
            hidden=-jnp.inf,
            dropout=functools.partial(Dropout(cfg.dropout), train=train),
        )
        out = Linear(dims.joined, (cfg.d_model,), name="out")
        return out(jnp.swapaxes(y_BHNK, 1, 2)), w_BHNS


class Block(nn.Module):
    """Post-norm block [B, N, D] -> [B, N, D]: attention, then feed-forward; and the named steps
    between.
    """

    cfg: TimerConfig
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BND, train: bool):
        cfg, ffn_dim, taps = self.cfg, self.dims.ffn, {}

        def drop(y):
            return Dropout(cfg.dropout)(y, train)

        a_BND, taps["attn_weights"] = Attention(cfg, self.dims.attn, name="attn")(x_BND, train)
        taps["attn"] = a_BND
        x_BND = taps["norm1"] = nn.LayerNorm(epsilon=1e-5, name="norm1")(x_BND + drop(a_BND))
        y_BND = drop(feed_forward(x_BND, ffn_dim, cfg.activation, dropout=drop))
        return nn.LayerNorm(epsilon=1e-5, name="norm2")(x_BND + y_BND), taps


class TimerNet(nn.Module):
    """Patches [B, N, P] in instance scale -> next patches [B, N, P], and the named
    steps between.
    """

    cfg: TimerConfig

    @nn.compact
    def __call__(self, p_BNP, train: bool = False):
        cfg, taps = self.cfg, {"patches": p_BNP}
        n = p_BNP.shape[1]
        if n > TABLE_LEN:
            raise ValueError(f"{n} patches; Timer's position table has {TABLE_LEN} rows")
        embed = Linear((cfg.patch_len,), (cfg.d_model,), use_bias=False, name="embed")
        x_BND = taps["value_embed"] = embed(p_BNP)
        x_BND = taps["embed"] = x_BND + jnp.asarray(sinusoids(n, cfg.d_model), x_BND.dtype)[None]
        x_BND = Dropout(cfg.dropout)(x_BND, train)
        # A loop and no scan: pruned layers differ in width.
        for i, dims in enumerate(cfg.layers):
            x_BND, inner = Block(cfg, dims, name=f"layer_{i}")(x_BND, train)
            taps |= nested(f"layer_{i}", inner, x_BND)
        x_BND = taps["norm"] = nn.LayerNorm(epsilon=1e-5, name="norm")(x_BND)
        y_BNP = taps["head"] = Linear((cfg.d_model,), (cfg.patch_len,), name="head")(x_BND)
        return y_BNP, taps


@dataclasses.dataclass(frozen=True)
class Timer(Model):
    """Timer at one size. See the module docstring; `Model` documents the methods."""

    config: TimerConfig

    family = "timer"
    published = PRESETS
    tasks = ("forecasting", "imputation", "anomaly")
    licence = "Apache-2.0 (thuml/Large-Time-Series-Model)"
    shard_rules = (
        (r"^embed/kernel$", (None, "fsdp")),
        (r"^head/kernel$", ("fsdp", None)),
        *shards.LAYERS,
        *shards.UP_BIAS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn", scores="channels"), Group.units())

    @classmethod
    def small(cls) -> TimerConfig:
        return TimerConfig.of(8, 16, 24, layers=2, heads=2, context_len=32, horizon=8)

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases of linear
        layers; norms 1, 0.
        """
        patch_11P = jax.ShapeDtypeStruct((1, 1, self.config.patch_len), jnp.float32)
        shapes = parameter_shapes(TimerNet(self.config), key, patch_11P)
        return draw(key, shapes, torch_rule(shapes))

    def recipe(self) -> Recipe:
        if self.config in (PRESETS["timer-tiny"], PRESETS["timer-small"]):
            # lr: the lower validation MSE of full fine-tuning on ETTh1, of 1e-4 and 3e-4; the batch
            # is small so that a run from scratch gets a thousand steps in five epochs
            tiny = self.config == PRESETS["timer-tiny"]
            source = "validation on ETTh1" if tiny else "that of timer-tiny, not measured"
            return self._recipe(
                lr=1e-4, batch_size=256, epochs=5, schedule="halving", source=source
            )
        source = (
            "thuml/Large-Time-Series-Model scripts; schedule of Meteor-Stars/SFF (commit 2dfb50b)"
        )
        lr, batch_size = (3e-5, 2048) if self.config.task == "forecasting" else (1e-4, 128)
        return self._recipe(
            lr=lr, batch_size=batch_size, epochs=10, schedule="halving", source=source
        )

    # --- the network around its instance scaling

    def apply(self, params: Tree, x_BCT: jax.Array, observed_BCT=None, key=None, train=False):
        """One forward pass in the units of x: next-patch predictions [B, C, N*P], N = T // P, and
        the named steps.

        Points after the last whole patch count in the scale but are no patch, as in the original.
        With `observed` (1 or 0), x must hold 0 where it is 0, and the scale is of the observed
        points only.
        """
        cfg = self.config
        b, c, t = x_BCT.shape
        n = t // cfg.patch_len
        if n < 1:
            raise ValueError(
                f"Timer needs at least one patch of {cfg.patch_len} time steps, got {t}"
            )
        x_BCT = x_BCT.astype(jnp.float32)
        if observed_BCT is None:
            mean_BC1 = x_BCT.mean(-1, keepdims=True)
            z_BCT = x_BCT - mean_BC1
            std_BC1 = jnp.sqrt(jnp.square(z_BCT).mean(-1, keepdims=True) + SCALE_EPS)
        else:
            n_BC1 = jnp.maximum(observed_BCT.sum(-1, keepdims=True), 1.0)
            mean_BC1 = x_BCT.sum(-1, keepdims=True) / n_BC1
            z_BCT = jnp.where(observed_BCT == 0, 0.0, x_BCT - mean_BC1)
            std_BC1 = jnp.sqrt(jnp.square(z_BCT).sum(-1, keepdims=True) / n_BC1 + SCALE_EPS)
        mean_BC1, std_BC1 = jax.lax.stop_gradient((mean_BC1, std_BC1))
        p_BNP = (z_BCT / std_BC1)[..., : n * cfg.patch_len].reshape(b * c, n, cfg.patch_len)
        y_BNP, taps = run_network(TimerNet(cfg), params, p_BNP, key=key, train=train)
        y_BCT = y_BNP.reshape(b, c, n * cfg.patch_len) * std_BC1 + mean_BC1
        return y_BCT, taps | {"mean": mean_BC1, "std": std_BC1}

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Next-token MSE over all tokens (the original's `use_ims`): the target is the series moved
        by one patch.

        The context must be whole patches; of the target, the first patch is used. Missing values
        are no targets; the model reads the last value before them there, as in `predict`.
        """
        return self.token_loss(params, self._next_tokens(batch), key=key, train=train)

    def absolute_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """Mean absolute error of the next patch over all tokens; otherwise as `loss`."""
        shifted = self._next_tokens(batch)
        y_BCT, _ = self.apply(params, fill_missing(shifted["context"]), key=key, train=train)
        observed = ~jnp.isnan(shifted["target"])
        gap = y_BCT - jnp.where(observed, shifted["target"], 0.0)
        return mean_observed(jnp.abs(gap), observed, batch)

    def _next_tokens(self, batch: Batch) -> dict[str, jax.Array]:
        """Give a batch whose `target` is the series moved by one patch: what each token is to
        predict.
        """
        p, (context, target) = self.config.patch_len, (batch["context"], batch["target"])
        problems, steps = [], context.shape[-1]
        if steps % p:
            problems.append(
                f"a context of whole patches ({p}), got {steps} steps: take "
                f"{max(steps // p, 1) * p}"
            )
        if target.shape[-1] < p:
            got = target.shape[-1]
            problems.append(
                f"a target of one patch ({p}), got {got} steps: take {p}, or the direct loss "
                "(mode='direct')"
            )
        if problems:
            raise ValueError(f"the next-token loss needs {'; and '.join(problems)}")
        shifted_BCT = jnp.concatenate([context[..., p:], target[..., :p]], axis=-1)
        return dict(batch) | {"target": shifted_BCT}

    def token_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE over all tokens against a `target` as long as the context: what each time step's
        token is to predict.
        """
        y_BCT, _ = self.apply(params, fill_missing(batch["context"]), key=key, train=train)
        return mse_observed(y_BCT, batch["target"], batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the last token's patch alone (the original's default, direct multi-step)."""
        p, (context, target) = self.config.patch_len, (batch["context"], batch["target"])
        if target.shape[-1] > p:
            raise ValueError(
                f"the direct loss reaches one patch ({p} steps), not {target.shape[-1]}; take a "
                "shorter target, or the next-token loss (mode='ims')"
            )
        x_BCT = fill_missing(context)[..., context.shape[-1] % p :]
        y_BCT, _ = self.apply(params, x_BCT, key=key, train=train)
        return mse_observed(y_BCT[..., -p:][..., : target.shape[-1]], target, batch)

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Rolled out patch by patch in a window of fixed length, scaled anew at each step, as in
        the original.

        The context is cut to the newest whole patches of at most `context_len` steps; one shorter
        than a patch is padded on the left with its first value. Missing values take the last value
        before them.
        """
        check_context(context, horizon)
        p = self.config.patch_len
        x_BCT = fill_missing(jnp.asarray(context, jnp.float32))
        x_BCT = newest_patches(x_BCT, p, self.context_len)
        steps = math.ceil(horizon / p)
        if steps == 1:
            return Forecast(self.apply(params, x_BCT)[0][..., -p:][..., :horizon])

        def step(window_BCT, _):
            y_BCP = self.apply(params, window_BCT)[0][..., -p:]
            return jnp.concatenate([window_BCT[..., p:], y_BCP], axis=-1), y_BCP

        # The window has one length throughout, so that all steps are one program.
        _, y_SBCP = jax.lax.scan(step, x_BCT, length=steps)
        return Forecast(end_to_end(y_SBCP)[..., :horizon])

    def impute(self, params: Tree, x, observed, key=None, train=False, ims=True) -> jax.Array:
        """Reconstruction [B, C, T] of x where `observed` is 0, in data units. T must be whole
        patches.

        NaN in x is not observed either. ims: patch j is what the token before it predicts (the
        first patch, which nothing predicts, is x itself, missing values filled);
        otherwise the token's own output, the released script's default.
        """
        p = self.config.patch_len
        if x.shape[-1] % p:
            raise ValueError(
                f"imputation needs a series of whole patches ({p}), got {x.shape[-1]} steps"
            )
        observed = jnp.where(jnp.isnan(x), 0.0, observed.astype(jnp.float32))
        shown_BCT = jnp.where(observed == 0, 0.0, x)
        y_BCT, _ = self.apply(params, shown_BCT, observed, key=key, train=train)
        if not ims:
            return y_BCT
        return jnp.concatenate([fill_missing(x)[..., :p], y_BCT[..., :-p]], axis=-1)

    def reconstruct(self, params: Tree, x, key=None, train=False, ims=True) -> jax.Array:
        """The model's expectation, in data units. ims: [B, C, T - P], the predictions of x[..., P:]
        from the patches before; otherwise [B, C, T], each token's own output (the released script's
        default). Missing values take the last value before them.
        """
        x = fill_missing(x)
        # What the last patch predicts lies behind the series.
        x = x[..., : -self.config.patch_len] if ims else x
        return self.apply(params, x, key=key, train=train)[0]
