"""What the rest of the library knows of a model family: one small contract, and the data types that cross it.

Dimension letters of the library: B batch, C variates (channels), T time steps, L context length, N patches (tokens),
P patch length, D model width, H heads, K head width, F feed-forward width, S key side of attention, Q quantiles. In
[B, C, H] of a forecast, H is the horizon.
"""

import abc
import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from ltsm_jax.trees import Tree, traced

Batch = Mapping[str, jax.Array]
"""One batch: `context` [B, C, L], `target` [B, C, H] (NaN = missing) and, in a partial batch, `weight` [B] (0 for
padding rows)."""

Task = Literal["forecasting", "imputation", "anomaly", "classification", "embedding"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forecast:
    """A forecast in the units of the context.

    point: [B, C, H]. quantiles: [B, C, H, Q] at `levels`, or None. samples: [B, C, H, samples], or None.
    """

    point: jax.Array
    quantiles: jax.Array | None = None
    samples: jax.Array | None = None
    levels: tuple[float, ...] = dataclasses.field(default=(), metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of a rank beside every linear layer, times alpha / rank. See `methods.lora`."""

    rank: int = 4
    alpha: float = 8.0

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Fine-tuning defaults of one preset. Good learning rates differ by orders of magnitude between models.

    lr, batch_size (windows), epochs, schedule, weight_decay, clip: as in `training.TrainConfig`. context_len, horizon:
    time steps. loss: "own" (the family's training loss) or "point" (MSE of the point forecast). source: where the
    numbers are from. trainable: regular expression of the leaves that the source trains; None: all. lora: the adapters
    that it trains instead. These two are what the strategy "recipe" trains; the others say themselves what they train.
    """

    lr: float
    batch_size: int
    epochs: int
    schedule: str
    context_len: int
    horizon: int
    loss: Literal["own", "point"]
    source: str
    weight_decay: float = 0.0
    clip: float | None = None
    trainable: str | None = None
    lora: Lora | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Parts of a layer that a model can lose as a whole: attention heads, feed-forward units, experts.

    kind: what they are. pattern: regular expression that the path of the module around them matches in full. size: the
    config's entry that says how many there are, a field and an index such as "n_heads.\\1" ("encoder.ffn_dims.\\1" of a
    nested config), \\1 being the pattern's first group; or a function of (config, match) that gives it.
    makes, takes: linears in the module whose outputs, or inputs, are the parts: of heads [H, K], of units [F]; names
      that a layer has not got are passed over. For experts the stacked kernels [E, ...].
    axis: where in the outputs of `makes` (and of the stacked kernels) the parts are counted.
    ids: the entry that lists the original numbers of those that are left, for layers in which a part has a place of
      its own (a column of a bias table, an output of a router). With ids, `size` may be None: their number says it.
    others: further leaves in the module with an entry per part: (name, axis).
    shared: entry that counts the key and value heads, where query heads share them.
    inner: entry that holds the width F of each expert, for experts.
    values: entry that holds the width of the values, where it may differ from that of queries and keys. The values come
      out of the last of `makes`; of a fused linear, out of the last along its first axis.
    scores: entry that holds the width of queries and keys, where it may shrink: nothing happens to them before their
      product, and its scale stays that of the whole width.
    pairs: entry that lists, for each key head, the rotary pairs (j, j + K/2) left in queries and keys.
    table: leaf with a column per id on its last axis, as far as the largest id that any layer has left.
    swapped: the module gets the tokens [..., M, S, D] of the layer around it with M and S exchanged.
    """

    kind: Literal["heads", "ffn units", "experts"]
    pattern: str
    size: "str | Callable[[Any, re.Match], str] | None"
    makes: tuple[str, ...]
    takes: tuple[str, ...]
    axis: int = 0
    ids: str | None = None
    others: tuple[tuple[str, int], ...] = ()
    shared: str | None = None
    inner: str | None = None
    values: str | None = None
    scores: str | None = None
    pairs: str | None = None
    table: str | None = None
    swapped: bool = False

    @classmethod
    def heads(cls, pattern: str, size: str | None = r"n_heads.\1", **rest: Any) -> "Group":
        """Attention heads in a module with linears q, k, v and out."""
        return cls("heads", pattern, size, **({"makes": ("q", "k", "v"), "takes": ("out",)} | rest))

    @classmethod
    def units(cls, pattern: str, size: "str | Callable[[Any, re.Match], str]" = r"ffn_dims.\1") -> "Group":
        """Feed-forward units in a module with linears up, down and, where there is one, gate."""
        return cls("ffn units", pattern, size, ("gate", "up"), ("down",))

    @classmethod
    def experts(cls, pattern: str, ids: str = r"kept.\1", inner: str = r"expert_dims.\1") -> "Group":
        """Experts as the stacked kernels gate, up [E, D, F] and down [E, F, D] of a module."""
        return cls("experts", pattern, None, ("gate", "up"), ("down",), ids=ids, inner=inner)


def t5_groups(stack: str) -> tuple[Group, ...]:
    """What layers of a T5 stack can lose, but for cross attention; stack: its path and its entry in the config."""
    return (
        Group.heads(
            rf"{stack}/layer_(\d+)/attn",
            rf"{stack}.n_heads.\1",
            ids=rf"{stack}.bias_columns.\1",
            table=f"{stack}/relative_bias",
            values=rf"{stack}.value_dims.\1",
            scores=rf"{stack}.qk_dims.\1",
        ),
        Group.units(rf"{stack}/layer_(\d+)", rf"{stack}.ffn_dims.\1"),
    )


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """A model family at one size: pure functions of (params, inputs), hashable, so it may be static under jit.

    Subclasses add nothing but the methods below; everything they know of their size is in `config`.
    """

    config: Any

    family: ClassVar[str]
    head: ClassVar[str]  # regular expression: the leaves that linear probing trains
    tasks: ClassVar[tuple[Task, ...]]
    licence: ClassVar[str]  # of the published weights
    heads: ClassVar[tuple[str, ...]] = ()  # heads that `with_head` can put on
    fixed: ClassVar[str | None] = None  # regular expression: leaves that are data, never trained and never mixed
    shard_rules: ClassVar[
        tuple[tuple[str, tuple[str | None, ...]], ...]
    ]  # regex of the path -> mesh axis per dimension
    prunable: ClassVar[tuple[Group, ...]]
    # regular expression: the linears of Transformer and mixer blocks, which are what is pruned; not their routers
    blocks: ClassVar[str] = r"(^|/)((block_\d+_)?layer|block)_\d+/(?!(.*/)?(router|shared_gate)$)"

    @classmethod
    @abc.abstractmethod
    def presets(cls) -> Mapping[str, Any]:
        """Config by published name: checkpoint file stem, or hub name "owner/name" or "owner/name@revision"."""

    @classmethod
    @abc.abstractmethod
    def small(cls) -> Any:
        """A config of a few thousand parameters with every part of the architecture, for tests and smoke runs."""

    @classmethod
    @abc.abstractmethod
    def config_from_dict(cls, fields: Mapping[str, Any]) -> Any:
        """The config that `config_to_dict` wrote."""

    def config_to_dict(self) -> dict[str, Any]:
        """The config as JSON types, for config.json of a model folder."""
        return dataclasses.asdict(self.config)

    @property
    def variates(self) -> Literal["independent", "joint"]:
        """Whether one window holds one variate, or all of them because the model lets them see each other."""
        return "independent"

    @property
    @abc.abstractmethod
    def context_len(self) -> int:
        """L, the context length the model was trained with, in time steps."""

    @property
    @abc.abstractmethod
    def horizon(self) -> int:
        """Time steps of one forecast step; longer horizons are rolled out."""

    @property
    def eval_batch(self) -> int:
        """Windows of one forward pass in evaluation: what fits into a few GB. Changes the speed, not the value."""
        return 2048

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Tree:
        """A fresh draw from the ORIGINAL's own initialisation. It is what smoothed fine-tuning mixes in."""

    @abc.abstractmethod
    def loss(self, params: Tree, batch: Batch, key: jax.Array | None = None, train: bool = False) -> jax.Array:
        """The original's own fine-tuning loss: a scalar, the mean over rows weighted by `batch["weight"]`."""

    def point_loss(self, params: Tree, batch: Batch, key: jax.Array | None = None, train: bool = False) -> jax.Array:
        """MSE of the point forecast [B, C, H], in the units of the batch; for methods that ask for it."""
        raise ValueError(f"{self.family} has no point loss")

    @abc.abstractmethod
    def predict(self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None) -> Forecast:
        """Forecast `horizon` steps after `context` [B, C, T]; any T >= 1, NaN = missing. In units of the context.

        A row's forecast does not depend on the other rows of the batch. Models that sample draw from `row_keys(key,
        context)`; without a key the draws are the same each time.
        """

    def for_series(
        self,
        params: Tree,
        *,
        n_variates: int,
        freq: str | None = None,
        name: str | None = None,
        key: jax.Array | None = None,
    ) -> tuple["Model", Tree]:
        """The model made ready for one data set: (model, params), the same two for most families.

        Families with frequency classes, tokens per data set or layers per variate put them in here; a model that is
        ready for the data set already comes back as it is.

        Args:
          n_variates: C. freq: step of the series as pandas writes it ("h", "15min"), None where unknown.
          name: of the data set. key: draws what the checkpoint has not got.
        Raises: ValueError for a frequency that the family needs and does not know.
        """
        return self, params

    def with_head(self, params: Tree, head: str, key: jax.Array, **sizes: Any) -> tuple["Model", Tree]:
        """The same body under a fresh, untrained head: (model, params). sizes: horizon=..., or n_classes=....

        Raises: ValueError for a head that is not in `heads`.
        """
        raise ValueError(f"{self.family} has no exchangeable heads")

    def embed(self, params: Tree, context: jax.Array) -> jax.Array:
        """Embedding [B, D] (or what the family documents) of `context` [B, C, T]."""
        raise ValueError(f"{self.family} does not do embedding")

    def classify(self, params: Tree, x: jax.Array, key=None, train=False) -> jax.Array:
        """Logits [B, classes] of `x` [B, C, T]."""
        raise ValueError(f"{self.family} does not do classification")

    def routed(self, params: Tree, context: jax.Array, horizon: int) -> tuple[dict[str, jax.Array], int]:
        """Where tokens go in a forecast of `horizon` steps: by the path of each layer's experts the ids [B, N, K] of
        those that every token of `context` [B, C, T], and of what is forecast and fed back, chooses, -1 for padding;
        and how many experts the router chooses from.

        Raises: ValueError for a family whose experts cannot be taken out one by one.
        """
        raise ValueError(f"{self.family} has no experts that could be pruned by how often they are chosen")

    def impute(self, params: Tree, x: jax.Array, observed: jax.Array, key=None, train=False, ims=True) -> jax.Array:
        """Reconstruction [B, C, T] of a series of which only `observed` [B, C, T] points are known."""
        raise ValueError(f"{self.family} does not do imputation")

    def reconstruct(self, params: Tree, x: jax.Array, key=None, train=False, ims=True) -> jax.Array:
        """What the model expects [B, C, T'] at the last T' points of `x` [B, C, T]; anomaly scores compare the two."""
        raise ValueError(f"{self.family} does not do anomaly detection")

    @abc.abstractmethod
    def recipe(self) -> Recipe:
        """Fine-tuning defaults."""

    def check_task(self, task: Task) -> None:
        """Raises: ValueError when the family has no such task."""
        if task not in self.tasks:
            raise ValueError(f"{self.family} does {', '.join(self.tasks)}, not {task}")


def config_from_json(cls: type, fields: Mapping[str, Any]) -> Any:
    """A config dataclass from what `dataclasses.asdict` and JSON made of it: lists are tuples again, at any depth, and
    fields that are dataclasses are built. The inverse of `Model.config_to_dict`.

    Raises: TypeError for a field that the class does not have; ValueError from the class.
    """
    types = typing.get_type_hints(cls)

    def value(name: str, x: Any) -> Any:
        kind = types.get(name)
        if dataclasses.is_dataclass(kind) and isinstance(x, Mapping):
            return config_from_json(typing.cast(type, kind), x)
        return _tuples(x)

    return cls(**{name: value(name, x) for name, x in fields.items()})


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else x


def with_entry(config: Any, entry: str, value: Any) -> Any:
    """The config with another value at an entry such as "n_heads.3" or "encoder.ffn_dims.0": fields and indices.

    Raises: AttributeError, IndexError for an entry that is not there; ValueError from the config's class.
    """
    if not entry:
        return value
    name, _, rest = entry.partition(".")
    if isinstance(config, tuple):
        i = int(name)
        return (*config[:i], with_entry(config[i], rest, value), *config[i + 1 :])
    return dataclasses.replace(config, **{name: with_entry(getattr(config, name), rest, value)})


def entry_of(config: Any, entry: str) -> Any:
    """What stands at an entry of a config, see `with_entry`."""
    for name in entry.split("."):
        config = config[int(name)] if isinstance(config, tuple) else getattr(config, name)
    return config


def row_keys(key: jax.Array | None, context: jax.Array) -> jax.Array:
    """A key for each row of `context` [B, ...], a function of `key` and the row's own bits: keys [B].

    Draws made with it do not depend on where in which batch a row stands. key None: a fixed key.
    """
    key = jax.random.key(0) if key is None else key
    bits_BT = jax.lax.bitcast_convert_type(context.astype(jnp.float32), jnp.uint32).reshape(context.shape[0], -1)
    odd_T = 2 * jnp.arange(bits_BT.shape[1], dtype=jnp.uint32) + 1
    hash_B = (bits_BT * odd_T[None] * jnp.uint32(2654435761)).sum(1, dtype=jnp.uint32)
    return jax.vmap(lambda h: jax.random.fold_in(key, h))(hash_B)


def mean_over_rows(error: jax.Array, batch: Batch) -> jax.Array:
    """Mean of `error` [B, ...] in which each row counts by `batch["weight"]` (all alike where there is none)."""
    row = error.reshape(error.shape[0], -1).mean(axis=1)
    weight = batch.get("weight")
    return row.mean() if weight is None else (row * weight).sum() / weight.sum()


def mean_observed(error: jax.Array, observed: jax.Array, batch: Batch) -> jax.Array:
    """Mean of `error` [B, ...] over what is `observed` (weights of the same shape, 0 for missing), each row counting by
    `batch["weight"]`; 0 where nothing is observed. `error` must be finite everywhere: fill what is missing first."""
    weight = observed.astype(error.dtype)
    if "weight" in batch:
        weight = weight * batch["weight"].reshape(-1, *(1,) * (error.ndim - 1))
    return (error * weight).sum() / jnp.maximum(weight.sum(), jnp.finfo(error.dtype).tiny)


def fill_missing(x: jax.Array) -> jax.Array:
    """NaN along the last axis replaced by the last value before it, or the first after it, or 0 where there is none.

    x: [..., T]. For families whose originals know no missing values.
    """
    observed = ~jnp.isnan(x)
    steps = jnp.arange(x.shape[-1])
    last = jax.lax.cummax(jnp.where(observed, steps, -1), axis=x.ndim - 1)
    first = jnp.argmax(observed, axis=-1, keepdims=True)
    filled = jnp.take_along_axis(x, jnp.where(last < 0, first, last), axis=-1)
    return jnp.where(observed.any(-1, keepdims=True), filled, jnp.zeros_like(x))


def interpolate_missing(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """NaN along the last axis on the straight line between the observed values around it; the last one repeated.

    x: [..., T]. Returns: the series, with 0 before its first value, and where it has begun [..., T].
    """
    observed, steps = ~jnp.isnan(x), jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    last = jax.lax.cummax(jnp.where(observed, steps, -1), axis=x.ndim - 1)
    following = jax.lax.cummin(jnp.where(observed, steps, x.shape[-1]), axis=x.ndim - 1, reverse=True)
    left = jnp.maximum(last, 0)
    right = jnp.where(following < x.shape[-1], following, left)
    known = jnp.where(observed, x, 0.0)
    before, after = (jnp.take_along_axis(known, i, axis=-1) for i in (left, right))
    share = (steps - left) / jnp.maximum(right - left, 1)
    return jnp.where(last >= 0, before + (after - before) * share, 0.0), last >= 0


def check_context(context: Any, horizon: int) -> None:
    """Raises: ValueError for a context that is not [B, C, T] with T >= 1, has an infinity or a variate without any
    observed value (seen only outside jit), or a horizon below 1."""
    problems = []
    if jnp.ndim(context) != 3 or jnp.shape(context)[-1] < 1:
        problems.append(
            f"context must be [batch, variates, time] with at least one time step, got {jnp.shape(context)}"
        )
    elif not traced(context):
        with jax.ensure_compile_time_eval():  # a caller's jit may be around an array that is known
            empty, infinite = jnp.argwhere(jnp.isnan(context).all(-1)), jnp.argwhere(jnp.isinf(context).any(-1))
        if empty.size:
            problems.append(f"no observed value at all in (batch, variate) {empty[:5].tolist()}; drop these series")
        if infinite.size:
            problems.append(f"infinite values in (batch, variate) {infinite[:5].tolist()}; set them to NaN (missing)")
    if horizon < 1:
        problems.append(f"horizon must be at least 1, got {horizon}")
    if problems:
        raise ValueError("; ".join(problems))
