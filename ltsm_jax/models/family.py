"""What the rest of the library knows of a model family: one small contract, and the data types that cross it.

Dimension letters of the library: B batch, C variates (channels), T time steps, L context length, N patches (tokens),
P patch length, D model width, H heads, K head width, F feed-forward width, S key side of attention, Q quantiles. In
[B, C, H] of a forecast, H is the horizon.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from ltsm_jax.trees import Tree, traced

Batch = Mapping[str, jax.Array]
"""One batch: `context` [B, C, L], `target` [B, C, H] and, in a partial batch, `weight` [B] (0 for padding rows)."""

Task = Literal["forecasting", "imputation", "anomaly"]


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
class Recipe:
    """Fine-tuning defaults of one preset. Good learning rates differ by orders of magnitude between models.

    lr, batch_size (windows), epochs, schedule: as in `training.TrainConfig`. context_len, horizon: time steps.
    loss: "own" (the family's training loss) or "point" (MSE of the point forecast). source: where the numbers are from.
    """

    lr: float
    batch_size: int
    epochs: int
    schedule: str
    context_len: int
    horizon: int
    loss: Literal["own", "point"]
    source: str


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """A model family at one size: pure functions of (params, inputs), hashable, so it may be static under jit.

    Subclasses add nothing but the methods below; everything they know of their size is in `config`.
    """

    config: Any

    family: ClassVar[str]
    head: ClassVar[str]  # regular expression: the leaves that linear probing trains
    tasks: ClassVar[tuple[Task, ...]]
    variates: ClassVar[Literal["independent", "joint"]]
    licence: ClassVar[str]  # of the published weights
    shard_rules: ClassVar[
        tuple[tuple[str, tuple[str | None, ...]], ...]
    ]  # regex of the path -> mesh axis per dimension
    prunable: ClassVar[tuple[tuple[str, str], ...]]  # regex of a linear layer -> what its structured groups are

    @classmethod
    @abc.abstractmethod
    def presets(cls) -> Mapping[str, Any]:
        """Config by published name (checkpoint file stem or hub name)."""

    @classmethod
    @abc.abstractmethod
    def config_from_dict(cls, fields: Mapping[str, Any]) -> Any:
        """The config that `config_to_dict` wrote."""

    def config_to_dict(self) -> dict[str, Any]:
        """The config as JSON types, for config.json of a model folder."""
        return dataclasses.asdict(self.config)

    @property
    @abc.abstractmethod
    def context_len(self) -> int:
        """L, the context length the model was trained with, in time steps."""

    @property
    @abc.abstractmethod
    def horizon(self) -> int:
        """Time steps of one forecast step; longer horizons are rolled out."""

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
        """Forecast `horizon` steps after `context` [B, C, T]; any T >= 1, NaN = missing. In units of the context."""

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


def mean_over_rows(error: jax.Array, batch: Batch) -> jax.Array:
    """Mean of `error` [B, ...] in which each row counts by `batch["weight"]` (all alike where there is none)."""
    row = error.reshape(error.shape[0], -1).mean(axis=1)
    weight = batch.get("weight")
    return row.mean() if weight is None else (row * weight).sum() / weight.sum()


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


def check_context(context: Any, horizon: int) -> None:
    """Raises: ValueError for a context that is not [B, C, T] with T >= 1, has an infinity or a variate without any
    observed value (seen only outside jit), or a horizon below 1."""
    problems = []
    if jnp.ndim(context) != 3 or jnp.shape(context)[-1] < 1:
        problems.append(
            f"context must be [batch, variates, time] with at least one time step, got {jnp.shape(context)}"
        )
    elif not traced(context):
        rows = jnp.argwhere(jnp.isnan(context).all(-1))
        if rows.size:
            problems.append(f"no observed value at all in (batch, variate) {rows[:5].tolist()}; drop these series")
        rows = jnp.argwhere(jnp.isinf(context).any(-1))
        if rows.size:
            problems.append(f"infinite values in (batch, variate) {rows[:5].tolist()}; set them to NaN (missing)")
    if horizon < 1:
        problems.append(f"horizon must be at least 1, got {horizon}")
    if problems:
        raise ValueError("; ".join(problems))
