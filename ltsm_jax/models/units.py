"""UniTS: one network for forecasting, imputation, anomaly detection and classification, told apart
by learned tokens.

Gao et al., "UniTS: A Unified Multi-Task Time Series Model" (NeurIPS 2024, arXiv 2403.00131).
Follows mims-harvard/UniTS (commit 0e02814), models/UniTS.py.

A window of V variates, scaled by its own mean and deviation, is cut into patches. Before the patch
tokens of each variate stand the prompt tokens of its data set; behind them, for a forecast, as many
generated tokens as the future has patches (GEN tower), for classification one token of the task.
Blocks attend over tokens, then over variates, then mix channels and tokens; the layers that mix
tokens are stored for a fixed number of them and interpolated to what is there. A model speaks for
one data set of its checkpoint (`UnitsConfig.dataset`); for data with another number of variates
`for_series` takes the tokens of one that has as many, or draws new ones.

The original leaves the last steps of a horizon at the mean where it is no whole number of patches;
`predict` generates one token more instead. `apply` does as the original.

Letters beyond those of the library: V variates of a data set, T tokens with the prompts, M classes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import head_width, layer_problems
from ltsm_jax.layers.dropout import Dropout
from ltsm_jax.layers.initial import Constant, Normal, draw, torch_linear
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import fill_missing, mse_observed
from ltsm_jax.layers.mlp import feed_forward, gelu
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.positions import sinusoids
from ltsm_jax.models.configs import field_problems, refuse
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group, LayerStack
from ltsm_jax.trees import Tree, flatten, unflatten

SCALE_EPS = 1e-5  # inside the root, added to the variance
TABLE_LEN = 5000  # rows of the learned position table
TOKENS = 128  # tokens that prompt2forecast and the forecast head are stored for
CLASS_HEADS = 8  # heads of the classification head, whatever those of the blocks
KINDS = ("long_term_forecast", "classification", "imputation", "anomaly_detection")


@dataclasses.dataclass(frozen=True)
class UnitsTask:
    """A task of the checkpoint: its name, kind (one of KINDS, "pretrain_" before it in
    self-supervised training), data set, window and horizon in time steps, variates V and classes M.
    """

    name: str
    kind: str
    dataset: str
    context_len: int
    horizon: int
    n_variates: int
    n_classes: int = 0

    @property
    def has_cls(self) -> bool:
        """Whether it has a classification token."""
        return self.kind == "classification" or self.kind.startswith("pretrain_")


@dataclasses.dataclass(frozen=True)
class UnitsLayer:
    """A layer's heads of the attention over tokens and of that over variates, and its feed-forward
    units, of which the first half mixes tokens.
    """

    seq_heads: int
    var_heads: int
    ffn: int


@dataclasses.dataclass(frozen=True)
class UnitsConfig:
    """Widths are per layer, so that a pruned UniTS is a UniTS.

    d_model D, head_dim K; layers: H and F of each. patch_len P, prompt_len: prompt
    tokens. tasks: what the checkpoint has tokens for; dataset: the data set it speaks for, by
    default that of the first task. context_len and horizon in time steps, by default those of the
    data set's first forecasting task.
    """

    d_model: int
    head_dim: int
    layers: tuple[UnitsLayer, ...]
    tasks: tuple[UnitsTask, ...]
    patch_len: int = 16
    prompt_len: int = 10
    dropout: float = 0.1
    dataset: str = ""
    classifies: str = ""

    def __post_init__(self):
        problems, tasks = layer_problems(self.layers, self.head_dim), self.tasks
        problems += field_problems(self, "d_model", "head_dim", "patch_len", "prompt_len")
        if self.d_model % CLASS_HEADS or self.d_model % 2:
            problems.append(f"d_model must be a multiple of {CLASS_HEADS}, got {self.d_model}")
        if any(layer.ffn % 2 for layer in self.layers):
            problems.append(f"ffn must be even, half of it mixes tokens: {self.layers}")
        if not tasks or len({t.name for t in tasks}) < len(tasks):
            problems.append("there must be tasks, each with a name of its own")
        sizes: dict[str, set[int]] = {}
        for t in tasks:
            sizes.setdefault(t.dataset, set()).add(t.n_variates)
            if t.kind.removeprefix("pretrain_") not in KINDS:
                problems.append(f"{t.name}: {t.kind!r} is not one of {', '.join(KINDS)}")
            if min(t.context_len, t.n_variates) < 1 or min(t.horizon, t.n_classes) < 0:
                problems.append(f"{t.name}: every size must be positive")
            if t.kind == "classification" and t.n_classes < 1:
                problems.append(f"{t.name}: a classification task needs its number of classes")
            if "/" in t.name + t.dataset:
                problems.append(f"{t.name}: names may have no slash")
        problems += [
            f"{name}: tasks with {sorted(v)} variates" for name, v in sizes.items() if len(v) > 1
        ]
        if self.dataset and self.dataset not in sizes:
            problems.append(f"no task has the data set {self.dataset!r}; known: {', '.join(sizes)}")
        refuse(self, problems)

    @classmethod
    def of(
        cls, d_model: int, heads: int, layers: int, tasks: tuple[UnitsTask, ...], **rest
    ) -> "UnitsConfig":
        """Equal layers; heads split the model width and the feed-forward width is 8 D, as in the
        original.
        """
        equal = (UnitsLayer(heads, heads, 8 * d_model),) * layers
        return cls(d_model, head_width(d_model, heads), equal, tasks=tasks, **rest)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "UnitsConfig":
        """Reads {"args": options of the original's scripts, "task_dataset": the yaml of the tasks}.

        Raises: ValueError naming what is missing.
        """
        args, tasks = fields.get("args", {}), fields.get("task_dataset", {})
        missing = [
            f"args.{n}"
            for n in ("d_model", "n_heads", "e_layers", "patch_len", "prompt_num")
            if n not in args
        ]
        for name, task in tasks.items():
            missing += [
                f"task_dataset.{name}.{n}"
                for n in ("task_name", "dataset", "enc_in")
                if n not in task
            ]
        if missing or not tasks:
            raise ValueError(
                f"the config of a UniTS checkpoint lacks {', '.join(missing) or 'task_dataset'}"
            )
        if args.get("stride", args["patch_len"]) != args["patch_len"]:
            raise ValueError("UniTS has patches without overlap: stride must be patch_len")
        return cls.of(
            args["d_model"],
            args["n_heads"],
            args["e_layers"],
            tasks=tuple(
                UnitsTask(
                    name,
                    t["task_name"],
                    t["dataset"],
                    context_len=t.get("seq_len", 96),
                    horizon=t.get("pred_len", 0),
                    n_variates=t["enc_in"],
                    n_classes=t.get("num_class", 0),
                )
                for name, t in tasks.items()
            ),
            patch_len=args["patch_len"],
            prompt_len=args["prompt_num"],
            dropout=args.get("dropout", 0.1),
        )

    @property
    def datasets(self) -> dict[str, int]:
        """Variates by data set, in the order of the tasks."""
        return {t.dataset: t.n_variates for t in self.tasks}

    @property
    def current(self) -> str:
        """The data set the model speaks for."""
        return self.dataset or self.tasks[0].dataset

    @property
    def pretrained_head(self) -> bool:
        """Whether the head of self-supervised training is part of the checkpoint."""
        return any(t.kind.startswith("pretrain_") for t in self.tasks)


# tasks of data_provider/multi_task.yaml that forecast the common benchmarks; a checkpoint's own
# come with its config
_VARIATES = {"ECL": 321, "ETTh1": 7, "Exchange": 8, "ILI": 7, "Traffic": 862, "Weather": 21}
_HORIZONS = {"ILI": (60,), "Exchange": (192, 336)}  # of the others: (96, 192, 336, 720)


def _forecasting() -> tuple[UnitsTask, ...]:
    found = []
    for name, variates in _VARIATES.items():
        for horizon in _HORIZONS.get(name, (96, 192, 336, 720)):
            task = f"LTF_{name}_p{horizon}"
            found.append(
                UnitsTask(
                    task,
                    "long_term_forecast",
                    name,
                    context_len=96,
                    horizon=horizon,
                    n_variates=variates,
                )
            )
    return tuple(found)


_TASKS = _forecasting()
PRESETS = {
    "units_x128": UnitsConfig.of(128, 8, 3, tasks=_TASKS, dataset="ETTh1"),
    "units_x64": UnitsConfig.of(64, 8, 3, tasks=_TASKS, dataset="ETTh1"),
    "units_x32": UnitsConfig.of(32, 8, 3, tasks=_TASKS, dataset="ETTh1"),
}


@functools.cache
def _stretch(n: int, m: int) -> np.ndarray:
    """[n, m]: linear interpolation of m values to n, half-pixel centres, without smoothing when it
    shrinks.
    """
    at = np.maximum((np.arange(n) + 0.5) * m / n - 0.5, 0)
    low = np.minimum(np.floor(at).astype(int), m - 1)
    share = at - low
    matrix = np.zeros((n, m))
    matrix[np.arange(n), low] += 1 - share
    matrix[np.arange(n), np.minimum(low + 1, m - 1)] += share
    return matrix.astype(np.float32)


class DynamicLinear(nn.Module):
    """A linear layer over the last axis, of any length: its kernel is interpolated from the stored
    [inputs, outputs].

    The first `fixed` inputs are prompts, whose part of the kernel is stretched along its outputs
    only.
    """

    inputs: int
    outputs: int
    fixed: int

    @nn.compact
    def __call__(self, x, outputs: int):
        kernel = self.param("kernel", nn.initializers.zeros, (self.inputs, self.outputs)).astype(
            x.dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,)).astype(x.dtype)
        n = x.shape[-1]
        # At the stored lengths the matrices that stretch are the identity.
        if (n, outputs) != (self.inputs, self.outputs):
            out = jnp.asarray(_stretch(outputs, self.outputs), x.dtype)
            along = jnp.asarray(_stretch(n - self.fixed, self.inputs - self.fixed), x.dtype)
            kernel = jnp.concatenate([kernel[: self.fixed], along @ kernel[self.fixed :]]) @ out.T
            bias = bias if outputs == self.outputs else out @ bias
        return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def over_tokens(layer: DynamicLinear, x_BVTD: jax.Array, outputs: int) -> jax.Array:
    """The layer over the token axis: [B, V, outputs, D]."""
    return jnp.swapaxes(layer(jnp.swapaxes(x_BVTD, 2, 3), outputs), 2, 3)


class Gate(nn.Module):
    """y times the sigmoid of one number made of it."""

    @nn.compact
    def __call__(self, y):
        return nn.sigmoid(Linear((y.shape[-1],), (1,), name="linear")(y)) * y


class Attention(nn.Module):
    """Attention of x [B, V, T, D] over tokens, or over variates: then queries and keys are means
    over the tokens.
    """

    d_model: int
    n_heads: int
    head_dim: int
    dropout: float
    over_variates: bool

    @nn.compact
    def __call__(self, x_BVTD, train: bool):
        heads = (self.n_heads, self.head_dim)
        x3 = Linear((self.d_model,), (3, *heads), use_bias=False, name="qkv")(x_BVTD)
        q, k, v = (x3[..., i, :, :] for i in range(3))  # [B, V, T, H, K]
        over = self._over_variates if self.over_variates else self._over_tokens
        y_BVTHK = over(q, k, v)
        out = Linear(heads, (self.d_model,), name="out")
        return Dropout(self.dropout)(out(y_BVTHK), train)

    def _over_tokens(self, q, k, v):
        q_BVHTK, k_BVHTK, v_BVHTK = (jnp.moveaxis(y, 3, 2) for y in (q, k, v))
        y_BVHTK, _ = attend(q_BVHTK, k_BVHTK, v_BVHTK, scale=self.head_dim**-0.5)
        return jnp.moveaxis(y_BVHTK, 2, 3)

    def _over_variates(self, q, k, v):
        # One weight for all tokens of two variates: their values are one long vector.
        q_BHVK, k_BHVK = (jnp.swapaxes(y.mean(2), 1, 2) for y in (q, k))
        v_BHVTK = jnp.moveaxis(v, 3, 1)
        *front, t, k_dim = v_BHVTK.shape
        v_BHV_ = v_BHVTK.reshape(*front, t * k_dim)  # no -1: a layer may have lost all its heads
        y_BHV_, _ = attend(q_BHVK, k_BHVK, v_BHV_, scale=self.head_dim**-0.5)
        return jnp.moveaxis(y_BHV_.reshape(v_BHVTK.shape), 1, 3)


class Mix(nn.Module):
    """Feed-forward [B, V, T, D] whose first half also mixes the first `n_tokens` tokens, prompts
    among them.
    """

    cfg: UnitsConfig
    width: int

    @nn.compact
    def __call__(self, x_BVTD, n_tokens: int, train: bool):
        cfg, d, half = self.cfg, self.cfg.d_model, self.width // 2
        # Each token with its two neighbours: the first linear is a convolution over three tokens.
        t = x_BVTD.shape[2]
        padded = jnp.pad(x_BVTD, ((0, 0), (0, 0), (1, 1), (0, 0)))
        near_BVT3D = jnp.stack([padded[:, :, i : i + t] for i in range(3)], axis=3)
        y = Linear((3, d), (self.width,), name="up")(near_BVT3D)

        # Half of the channels are mixed over tokens: prompts and the others by a layer each. A
        # token of the task, behind `n_tokens`, takes no part in that.
        mixed, plain = y[..., :half], y[..., half:]
        first, rest = mixed[:, :, :n_tokens], mixed[:, :, n_tokens:]
        seq = DynamicLinear(2 * d, 2 * d, cfg.prompt_len, name="seq")
        seq_BVTF = over_tokens(seq, first, n_tokens - cfg.prompt_len)
        prompt = DynamicLinear(2 * d, cfg.prompt_len, cfg.prompt_len, name="prompt")
        prompt_BVTF = over_tokens(prompt, first, cfg.prompt_len)
        mixed = jnp.concatenate([prompt_BVTF, seq_BVTF, rest], axis=2)
        y = gelu(jnp.concatenate([mixed, plain], axis=-1))

        y = Dropout(cfg.dropout)(y, train)
        return Dropout(cfg.dropout)(Linear((self.width,), (d,), name="down")(y), train)


class Block(nn.Module):
    """x [B, V, T, D] through both attentions and the mixing layer, each gated; and the named steps
    between.
    """

    cfg: UnitsConfig
    dims: UnitsLayer

    @nn.compact
    def __call__(self, x, n_tokens: int, train: bool):
        cfg, dims, taps = self.cfg, self.dims, {}

        def norm(x, name):
            return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)

        for name, heads in (("seq", dims.seq_heads), ("var", dims.var_heads)):
            sizes = (cfg.d_model, heads, cfg.head_dim)
            attention = Attention(*sizes, cfg.dropout, over_variates=name == "var", name=name)
            y = taps[f"attn_{name}"] = attention(norm(x, f"norm_{name}"), train)
            x = taps[f"after_{name}_att"] = x + Gate(name=f"gate_{name}")(y)
        y = Mix(cfg, dims.ffn, name="mix")(norm(x, "norm_mix"), n_tokens, train)
        taps["dyn_mlp"] = y
        return x + Gate(name="gate_mix")(y), taps


class ForecastHead(nn.Module):
    """Tokens [B, V, T, D] -> patches [B, V, n, P] of the last n; and the named steps between."""

    cfg: UnitsConfig
    fixed: int

    @nn.compact
    def __call__(self, x, n: int, train: bool):
        cfg, d, taps = self.cfg, self.cfg.d_model, {}
        x = taps["proj_in"] = Linear((d,), (d,), name="proj_in")(x)
        y = taps["pos_proj"] = over_tokens(
            DynamicLinear(TOKENS, TOKENS, self.fixed, name="pos_proj"), x, n
        )
        drop = functools.partial(Dropout(cfg.dropout), train=train)
        y = feed_forward(x[:, :, -n:] + y, 4 * d, "gelu", dropout=drop)
        y = taps["mlp"] = Dropout(cfg.dropout)(y, train)
        y = taps["proj_out"] = Linear((d,), (cfg.patch_len,), name="proj_out")(y)
        return y, taps


class ClassHead(nn.Module):
    """Tokens [B, V, T, D], the last one of the task -> its feature [B, V, D]; and the named steps
    between.
    """

    cfg: UnitsConfig

    @nn.compact
    def __call__(self, x, train: bool):
        cfg, d, taps = self.cfg, self.cfg.d_model, {}
        heads = (CLASS_HEADS, d // CLASS_HEADS)
        x = taps["proj_in"] = Linear((d,), (d,), name="proj_in")(x)
        q_BVHK = Linear((d,), heads, use_bias=False, name="q")(x[:, :, -1])
        kv = Linear((d,), (2, *heads), use_bias=False, name="kv")(x)
        k_BVHTK, v_BVHTK = (jnp.moveaxis(kv[..., i, :, :], 3, 2) for i in range(2))
        # The task's token asks all tokens.
        y_BVH1K, _ = attend(q_BVHK[..., None, :], k_BVHTK, v_BVHTK, scale=heads[1] ** -0.5)
        y = taps["cross_att"] = Linear(heads, (d,), name="out")(y_BVH1K[..., 0, :])

        z = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(y)
        drop = functools.partial(Dropout(cfg.dropout), train=train)
        z = Dropout(cfg.dropout)(feed_forward(z, 8 * d, "gelu", dropout=drop), train)
        y = taps["mlp"] = y + Gate(name="gate")(z)
        return y, taps


class UnitsNet(nn.Module):
    """Patches [B, V, N, P] in instance scale through the network. n_new: patches to generate behind
    them; shown: [B, V, N], False for patches to fill in; task: name of a task with a classification
    token. Gives patches [B, V, N + n_new, P], or logits [B, M] of a task, and the named steps
    between. With both shown and task, the pass of self-supervised training: patches from the tokens
    and patches from the classification token, each [B, V, N, P].
    """

    cfg: UnitsConfig
    dataset: str

    @nn.compact
    def __call__(self, p_BVNP, n_new: int = 0, shown_BVN=None, task: str = "", train: bool = False):
        cfg, taps, total = self.cfg, {}, p_BVNP.shape[2] + n_new
        if total > TABLE_LEN:
            raise ValueError(f"{total} patches; the position table of UniTS has {TABLE_LEN} rows")
        tokens = self._learned_tokens()
        table_TD = self.param("positions", nn.initializers.zeros, (TABLE_LEN, cfg.d_model))

        def rows(name):
            of_batch = jnp.broadcast_to(tokens[name][None], (p_BVNP.shape[0], *tokens[name].shape))
            return of_batch.astype(p_BVNP.dtype)

        # Prompts, patches with what is generated among and behind them, and the task's token.
        embed = Linear((cfg.patch_len,), (cfg.d_model,), use_bias=False, name="embed")
        x = taps["patch_tokens"] = Dropout(cfg.dropout)(embed(p_BVNP), train)
        prompts, masked = rows(f"prompt_tokens/{self.dataset}"), rows(f"mask_tokens/{self.dataset}")
        x = self._generated(x, prompts, masked, n_new=n_new, shown_BVN=shown_BVN, taps=taps)
        place = table_TD[:total].astype(x.dtype)[None, None]
        x = jnp.concatenate([prompts, x + place], 2)
        n_tokens = x.shape[2]
        if task:
            x = jnp.concatenate([x, rows(f"cls/{task}")], 2)
        taps["input"] = x

        for i, dims in enumerate(cfg.layers):
            x, inner = Block(cfg, dims, name=f"block_{i}")(x, n_tokens, train)
            taps |= nested(f"block_{i}", inner, x)
        options = {"total": total, "n_tokens": n_tokens, "task": task, "train": train}
        category = tokens.get(f"category/{task}") if task else None
        return self._outputs(x, taps, category, hides=shown_BVN is not None, **options)

    def _learned_tokens(self) -> dict[str, jax.Array]:
        """All learned tokens of the checkpoint, [V, count, D] each."""
        cfg, shapes = self.cfg, {}
        for name, size in cfg.datasets.items():
            shapes[f"prompt_tokens/{name}"] = size, cfg.prompt_len
            shapes[f"mask_tokens/{name}"] = size, 1
        for task in cfg.tasks:
            if task.has_cls:
                shapes[f"cls_tokens/{task.name}"] = task.n_variates, 1
            if task.kind == "classification":
                shapes[f"category_tokens/{task.name}"] = task.n_variates, task.n_classes
        tokens = {}
        for name, shape in shapes.items():
            short = name.replace("cls_tokens/", "cls/").replace("category_tokens/", "category/")
            tokens[short] = self.param(name, nn.initializers.zeros, (*shape, cfg.d_model))
        return tokens

    def _generated(self, x, prompts, masked, n_new: int, shown_BVN, taps):
        """Patch tokens [B, V, N + n_new, D] with generated ones: for hidden patches, and behind."""
        (b, v, n, _), cfg = x.shape, self.cfg
        generate = DynamicLinear(TOKENS, TOKENS, cfg.prompt_len, name="generate")
        if shown_BVN is not None or self.is_initializing():
            shown = jnp.ones((b, v, n), bool) if shown_BVN is None else shown_BVN
            filled = jnp.where(shown[..., None], x, masked)
            made = over_tokens(generate, jnp.concatenate([prompts, filled], 2), n)
            taps["generated"] = made
            x = jnp.where(shown[..., None], filled, made)
        if n_new:
            full = jnp.concatenate([prompts, x, jnp.repeat(masked, n_new, 2)], 2)
            made = taps["generated"] = over_tokens(generate, full, n + n_new)
            x = jnp.concatenate([x, made[:, :, -n_new:]], 2)
        return x

    def _outputs(self, x, taps, category, *, hides, total, n_tokens, task, train):
        """Patches, logits, or both reconstructions of self-supervised training, and the steps.

        All heads are made where parameters are counted.
        """
        cfg, every, both = self.cfg, self.is_initializing(), bool(task) and hides
        feature = logits = patches = None
        if task or every:
            feature, inner = ClassHead(cfg, name="class_head")(x, train)
            taps |= nested("class_head", inner)
            if category is not None:
                # The original's einsum sums over an axis of length M once more, so its logits are
                # M times as large.
                fit_BVM = jnp.einsum("BVD,VMD->BVM", feature, category.astype(x.dtype))
                logits = (category.shape[1] * fit_BVM.mean(1)).astype(jnp.float32)
        if not task or both or every:
            head = ForecastHead(cfg, cfg.prompt_len, name="forecast_head")
            patches, inner = head(x[:, :, :n_tokens], total, train)
            taps |= nested("forecast_head", inner)
        if cfg.pretrained_head and (both or every):
            # The tokens behind the classification token give no gradient, so that all of the loss
            # goes through it.
            tokens_BVND = jax.lax.stop_gradient(x[:, :, cfg.prompt_len : n_tokens])
            feature = x[:, :, -1] if feature is None else feature
            fused = jnp.concatenate([feature[:, :, None], tokens_BVND], axis=2)
            again, inner = ForecastHead(cfg, 1, name="pretrain_head")(fused, total, train)
            taps |= nested("pretrain_head", inner)
            if both:
                return (patches, again), taps
        return (logits if task else patches), taps


@dataclasses.dataclass(frozen=True)
class Units(Model):
    """UniTS at one size. See the module docstring; `Model` documents the methods."""

    config: UnitsConfig

    family = "units"
    published = PRESETS
    heads = ("forecast_head",)
    tasks = ("forecasting", "imputation", "anomaly", "classification")
    head_names = ("classification",)
    licence = "MIT (mims-harvard/UniTS)"
    shard_rules = (
        (r"^embed/kernel$", (None, "fsdp")),
        (r"/(seq|var)/qkv/kernel$", ("fsdp", None, "tensor", None)),
        (r"/mix/up/kernel$", (None, "fsdp", "tensor")),
        (r"head/proj_in/kernel$", ("fsdp", "tensor")),
        (r"head/proj_out/kernel$", ("fsdp", None)),
        (r"^class_head/(q|kv|out)/kernel$", ()),
        (r"tokens/|^positions$|/gate\w*/|/(pos_proj|prompt)/|/mix/seq/|^generate/", ()),
        *shards.LAYERS,
        *shards.WHOLE,
    )
    stacks = (LayerStack(name="block"),)
    prunable = (
        Group.heads("seq", "seq_heads", makes=("qkv",), axis=1),
        Group.heads("var", "var_heads", makes=("qkv",), axis=1),
    )

    @classmethod
    def small(cls) -> UnitsConfig:
        tasks = (
            UnitsTask("LTF_a", "long_term_forecast", "a", context_len=40, horizon=16, n_variates=2),
            UnitsTask(
                "CLS_b", "classification", "b", context_len=32, horizon=0, n_variates=3, n_classes=2
            ),
        )
        return UnitsConfig.of(16, 2, 2, tasks=tasks, patch_len=8, prompt_len=3)

    @property
    def variates(self) -> Literal["independent", "joint"]:
        return "joint"

    @property
    def task(self) -> UnitsTask:
        """The task that gives window and horizon: the data set's first one that forecasts, else its
        first.
        """
        mine = [t for t in self.config.tasks if t.dataset == self.config.current]
        return next((t for t in mine if t.horizon), mine[0])

    @property
    def context_len(self) -> int:
        return self.task.context_len

    @property
    def horizon(self) -> int:
        return self.task.horizon or self.config.patch_len

    @property
    def eval_batch(self) -> int:
        return max(2048 // self.task.n_variates, 1)

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults for linear layers and convolutions, U(-1/sqrt(inputs), 1/sqrt(inputs)),
        those over tokens included; tokens N(0, 0.02^2), mask tokens 0; positions: the sinusoid
        table.
        """
        cfg = self.config
        name, size = next(iter(cfg.datasets.items()))
        patch = jax.ShapeDtypeStruct((1, size, 2, cfg.patch_len), jnp.float32)
        shapes = parameter_shapes(UnitsNet(cfg, name), key, patch)
        # The names of tokens, which hold a slash for Flax, become branches of the tree.
        flat = flatten(shapes)
        shapes = unflatten(flat)

        def rule(path, shape):
            if path == "positions":
                return lambda key, shape: jnp.asarray(sinusoids(*shape))
            if path.startswith("mask_tokens/"):
                return Constant(0.0)
            if "_tokens/" in path:
                return Normal(0.02)
            linear = torch_linear(flat, path, heads=("/qkv", "/kv", "/q"))
            return linear or Constant(float(path.endswith("/scale")))

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = (
            "mims-harvard/UniTS scripts, prompt tuning: lr 1e-3 at an effective batch of 32, "
            "tokens alone"
        )
        return self._recipe(
            lr=1e-3,
            batch_size=32,
            epochs=5,
            schedule="cosine",
            source=source,
            trainable=r"_tokens/",
        )

    def for_series(
        self, params: Tree, *, n_variates: int, freq=None, key=None
    ) -> tuple["Units", Tree]:
        """Speak for data with so many variates: with the tokens of the current data set where it
        has as many, else of the first forecasting task that has, else with tokens drawn from `key`.
        """
        # Tokens that were trained come first, those of the data set at hand before all others.
        cfg = self.config
        if cfg.datasets[cfg.current] == n_variates:
            return self, params
        for task in cfg.tasks:
            if task.horizon and task.n_variates == n_variates:
                return Units(dataclasses.replace(cfg, dataset=task.dataset)), params

        if key is None:
            told = ", ".join(f"{name} ({size})" for name, size in list(cfg.datasets.items())[:20])
            raise ValueError(
                f"this UniTS has no tokens for {n_variates} variates; its data sets are {told}. "
                "New tokens must be drawn and trained; give a key to draw them with: "
                f"for_series(params, n_variates={n_variates}, key=jax.random.key(0))"
            )
        name = f"data_{n_variates}"
        while name in cfg.datasets:  # of a checkpoint that calls another data set so
            name += "_"
        same = self.task
        task = UnitsTask(
            f"LTF_{name}",
            "long_term_forecast",
            name,
            context_len=same.context_len,
            horizon=same.horizon,
            n_variates=n_variates,
        )
        cfg = dataclasses.replace(cfg, tasks=(*cfg.tasks, task), dataset=name)
        return Units(cfg), self._with_tokens(cfg, params, key)

    def with_head(
        self, params: Tree, head: str, key: jax.Array, **sizes: Any
    ) -> tuple["Units", Tree]:
        """Fresh tokens for a classification task of the current data set. sizes: n_classes, and
        optionally name.
        """
        if head not in self.head_names:
            raise ValueError(
                f"{self.family} has no head {head!r}, only {', '.join(self.head_names)}"
            )
        if "n_classes" not in sizes:
            raise ValueError("a classification head needs n_classes=...")
        old = self.task
        name = sizes.get("name", f"CLS_{old.dataset}")
        while "name" not in sizes and name in [task.name for task in self.config.tasks]:
            # a checkpoint that classifies this data set already keeps its own tokens beside
            name += "_"
        task = UnitsTask(
            name,
            "classification",
            old.dataset,
            context_len=old.context_len,
            horizon=0,
            n_variates=old.n_variates,
            n_classes=sizes["n_classes"],
        )
        cfg = dataclasses.replace(self.config, tasks=(*self.config.tasks, task), classifies=name)
        return Units(cfg), self._with_tokens(cfg, params, key)

    def _with_tokens(self, cfg: UnitsConfig, params: Tree, key: jax.Array) -> Tree:
        fresh = flatten(Units(cfg).init(key))
        return unflatten(fresh | flatten(params))

    # --- the network around its instance scaling

    def apply(
        self,
        params: Tree,
        x_BVL: jax.Array,
        n_new: int = 0,
        observed_BVL=None,
        task: str = "",
        key=None,
        train=False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One pass in the units of x: [B, V, (N + n_new) P] for the padded window and `n_new`
        patches behind it, or logits [B, M] of `task`; and the named steps. With `observed` (1 or 0;
        x must hold 0 where it is 0 and be whole patches), patches with any hidden point are filled
        in.
        """
        cfg, p = self.config, self.config.patch_len
        dataset = next(t.dataset for t in cfg.tasks if t.name == task) if task else cfg.current
        b, v, length = x_BVL.shape
        if v != cfg.datasets[dataset]:
            raise ValueError(
                f"the tokens of {dataset!r} are for {cfg.datasets[dataset]} variates, the window "
                f"has {v}; make the model ready for the data with `for_series` first"
            )
        x = x_BVL.astype(jnp.float32)
        # With `observed` too, as in the original: hidden points count as 0.
        mean = x.mean(-1, keepdims=True)
        z = x - mean
        shown = None
        if observed_BVL is None:
            std = jnp.sqrt(jnp.square(z).mean(-1, keepdims=True) + SCALE_EPS)
        else:
            if length % p:
                raise ValueError(
                    f"imputation needs a window of whole patches ({p}), got {length} steps"
                )
            z = jnp.where(observed_BVL == 0, 0.0, z)
            n = jnp.maximum((observed_BVL == 1).sum(-1, keepdims=True), 1)
            std = jnp.sqrt(jnp.square(z).sum(-1, keepdims=True) / n + SCALE_EPS)
            # A patch with one hidden point is filled in as a whole.
            shown = (observed_BVL != 0).reshape(b, v, -1, p).all(-1)
        mean, std = jax.lax.stop_gradient((mean, std))
        z = jnp.pad(z / std, ((0, 0), (0, 0), (0, -length % p)))
        options = {"n_new": n_new, "shown_BVN": shown, "task": task, "key": key, "train": train}
        p_BVNP = z.reshape(b, v, -1, p)
        y, taps = run_network(UnitsNet(cfg, dataset), _joined(params), p_BVNP, **options)
        taps |= {"scaled": z, "mean": mean, "std": std}
        if task:
            return y, taps
        y = taps["folded"] = y.reshape(b, v, -1).astype(jnp.float32)
        return y * std + mean, taps

    def self_supervised(
        self, params: Tree, x_BVL: jax.Array, shown_BN: jax.Array, task: str, key=None, train=False
    ) -> tuple[jax.Array, jax.Array]:
        """Reconstructions that self-supervised training compares with x [B, V, L], in the units of
        x: that [B, V, L] from the tokens of the patches that are not hidden, and that from the
        classification token of `task`. Its loss is the sum of the two MSEs over all points. shown:
        [B, N], False for a hidden patch, for all variates alike.

        Raises: ValueError for a checkpoint without the head of self-supervised training.
        """
        cfg, p = self.config, self.config.patch_len
        if not cfg.pretrained_head:
            raise ValueError(
                "the checkpoint has no head of self-supervised training (pretrain_head)"
            )
        dataset = next(t.dataset for t in cfg.tasks if t.name == task)
        b, v, length = x_BVL.shape
        x = x_BVL.astype(jnp.float32)
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        mean, std = jax.lax.stop_gradient((mean, jnp.sqrt(var + SCALE_EPS)))
        z = jnp.pad((x - mean) / std, ((0, 0), (0, 0), (0, -length % p))).reshape(b, v, -1, p)
        shown = jnp.broadcast_to(shown_BN[:, None], (b, v, z.shape[2]))
        options = {"shown_BVN": shown, "task": task, "key": key, "train": train}
        both, _ = run_network(UnitsNet(cfg, dataset), _joined(params), z, **options)
        one, two = (
            y.reshape(b, v, -1)[..., :length].astype(jnp.float32) * std + mean for y in both
        )
        return one, two

    def forecast(
        self, params: Tree, x_BVL: jax.Array, horizon: int, key=None, train=False
    ) -> jax.Array:
        """The `horizon` steps after x, [B, V, H]: what the padding of the window holds, and as many
        generated patches as the rest needs, at least one.
        """
        # `apply` fills the window up to whole patches: their end is part of the horizon already.
        p, length = self.config.patch_len, x_BVL.shape[-1]
        pad = -length % p
        y, _ = self.apply(params, x_BVL, max(-(-(horizon - pad) // p), 1), key=key, train=train)
        return y[..., length : length + horizon]

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the forecast over the observed targets, as in supervised training."""
        x = fill_missing(batch["context"])
        y = self.forecast(params, x, batch["target"].shape[-1], key=key, train=train)
        return mse_observed(y, batch["target"], batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        return self.loss(params, batch, key=key, train=train)

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """The whole horizon at once, with as many generated tokens as it takes, as in the original.
        The context is cut to the newest `context_len` steps; missing values take the last value
        before them.
        """
        check_context(context, horizon)
        x = fill_missing(jnp.asarray(context, jnp.float32))[..., -self.context_len :]
        return Forecast(self.forecast(params, x, horizon))

    def impute(self, params: Tree, x, observed, key=None, train=False, ims=True) -> jax.Array:
        """Reconstruction [B, V, T] of x where `observed` is 0 or x is NaN. T must be whole patches.
        ims has no meaning here.
        """
        observed = jnp.where(jnp.isnan(x), 0.0, observed.astype(jnp.float32))
        return self.apply(
            params, jnp.where(observed == 0, 0.0, x), observed_BVL=observed, key=key, train=train
        )[0]

    def reconstruct(self, params: Tree, x, key=None, train=False, ims=True) -> jax.Array:
        """The model's expectation, [B, V, T], of all points; missing ones take the last value
        before them. ims has no meaning here.
        """
        return self.apply(params, fill_missing(x), key=key, train=train)[0][..., : x.shape[-1]]

    def classify(
        self, params: Tree, x: jax.Array, key=None, train=False, task: str = ""
    ) -> jax.Array:
        """Logits [B, M] of x [B, V, T]; missing values take the last value before them.

        task: by default the one `with_head` made, else the data set's own.

        Raises: ValueError where there is no classification task.
        """
        own = [
            t.name
            for t in self.config.tasks
            if t.kind == "classification" and t.dataset == self.config.current
        ]
        task = task or self.config.classifies or next(iter(own), "")
        if not task:
            raise ValueError(
                f"no classification task for {self.config.current!r}: name one, or make one with "
                "`model.with_head(params, 'classification', key, n_classes=...)`"
            )
        return self.apply(params, fill_missing(x), task=task, key=key, train=train)[0]


def _joined(params: Tree) -> Tree:
    """The tree as Flax knows it: "prompt_tokens/ETTh1" is one name there."""
    flat = {}
    for name, branch in params.items():
        if name.endswith("_tokens"):
            flat |= {f"{name}/{data}": leaf for data, leaf in branch.items()}
        else:
            flat[name] = branch
    return flat
