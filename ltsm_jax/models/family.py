"""The contract between a model family and the rest of the library, and the data types that cross
it.

Dimension letters of the library: B batch, C variates (channels), T time steps, L context length, N
patches (tokens), P patch length, D model width, H heads, K head width, F feed-forward width, S key
side of attention, Q quantiles. In [B, C, H] of a forecast, H is the horizon.
"""

import abc
import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from ltsm_jax.layers.missing import mean_observed, mse_observed
from ltsm_jax.layers.multiscale import MultiScale
from ltsm_jax.models.configs import config_from_json
from ltsm_jax.models.groups import Group, LayerStack
from ltsm_jax.trees import Tree

Batch = Mapping[str, jax.Array]
"""One batch: `context` [B, C, L], `target` [B, C, H] (NaN = missing) and, in a partial batch,
`weight` [B] (0 for padding rows); for families with `covariates` also `past` [B, K, L] and `known`
[B, K', L + H], see `predict_with`.
"""

COVARIATES = frozenset({"past", "known"})
"""All kinds of covariates, see `Model.predict_with`."""

Task = Literal["forecasting", "imputation", "anomaly", "classification", "embedding"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forecast:
    """A forecast in the units of the context.

    point: [B, C, H]. quantiles: [B, C, H, Q] at `levels`, or None. samples: [B, C, H, samples], or
    None.
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
        """The factor of A B."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Fine-tuning defaults of one preset. Good learning rates differ by orders of magnitude between
    models.

    lr, batch_size (windows), epochs, schedule, weight_decay, clip: as in `training.TrainConfig`.
    context_len, horizon: time steps. mode: "ims" (the family's training loss) or "direct" (MSE of
    the point forecast), see `tasks.forecasting.Forecasting`. source: where the numbers are from.
    trainable: regular expression of the leaves that the source trains; None: all. lora: the
    adapters that it trains instead. These two are what the strategy "recipe" trains; the others say
    themselves what they train.
    """

    lr: float
    batch_size: int
    epochs: int
    schedule: str
    context_len: int
    horizon: int
    mode: Literal["ims", "direct"]
    source: str
    weight_decay: float = 0.0
    clip: float | None = None
    trainable: str | None = None
    lora: Lora | None = None


def windows_that_fit(bytes_each: float, memory: int = 1 << 30) -> int:
    """The largest power of two of windows, at least 1, whose widest activations fit into so many
    bytes: for `Model.eval_batch`.
    """
    return 1 << max(int(math.log2(memory / bytes_each)), 0)


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """A model family at one size: pure functions of (params, inputs), hashable, so it may be static
    under jit.

    Subclasses add nothing but the methods below; everything they know of their size is in `config`.
    """

    config: Any

    family: ClassVar[str]
    # config by published name: checkpoint file stem, or hub name "owner/name" or
    # "owner/name@revision"
    published: ClassVar[Mapping[str, Any]] = {}
    # modules or leaves that turn what the body gives into forecasts; of several alike, called
    # head_0, head_1, ..., the name without its number
    heads: ClassVar[tuple[str, ...]] = ("head",)
    tasks: ClassVar[tuple[Task, ...]]
    licence: ClassVar[str]  # of the published weights
    head_names: ClassVar[tuple[str, ...]] = ()  # heads that `with_head` can put on
    # the training loss is a mean over rows, so that parts of a batch give the gradient of the whole
    rows_apart: ClassVar[bool] = True
    # regular expression: the leaves of a model with further scales that msft trains; None:
    # `with_scales` refuses
    scalable: ClassVar[str | None] = None
    # weights are of the order of 1 at any width: the factor that is part of them elsewhere stands
    # in the forward pass
    unit_scaled: ClassVar[bool] = False
    shard_rules: ClassVar[
        tuple[tuple[str, tuple[str | None, ...]], ...]
    ]  # regex of the path -> mesh axis per dimension
    prunable: ClassVar[tuple[Group, ...]]
    norms: ClassVar[str] = (
        r"(^|/)(bias|scale)$"  # regular expression: biases, and the scales of norms
    )
    stacks: ClassVar[tuple[LayerStack, ...]] = (
        LayerStack(),
    )  # of layers; what is in them is pruned

    @classmethod
    def presets(cls) -> Mapping[str, Any]:
        """Config by published name, see `published`."""
        return cls.published

    @classmethod
    @abc.abstractmethod
    def small(cls) -> Any:
        """A config of a few thousand parameters with every part of the architecture, for tests and
        smoke runs.
        """

    @classmethod
    def config_from_dict(cls, fields: Mapping[str, Any]) -> Any:
        """The config that `config_to_dict` wrote, of the class that the family annotates `config`
        with.

        Raises: ValueError as of `configs.config_from_json`.
        """
        return config_from_json(typing.get_type_hints(cls)["config"], fields)

    def config_to_dict(self) -> dict[str, Any]:
        """The config as JSON types, for config.json of a model folder."""
        return dataclasses.asdict(self.config)

    @property
    def head_leaves(self) -> str:
        """Regular expression of the leaves of `heads`: those that linear probing trains."""
        return rf"^({'|'.join(self.heads)})(_\d+)?(/|$)"

    @property
    def fixed(self) -> str | None:
        """Regular expression of the leaves that are data, never trained and never mixed."""
        return None

    @property
    def covariates(self) -> frozenset[str]:
        """Kinds of covariates that `predict_with` takes, of `COVARIATES`."""
        return frozenset()

    @property
    def missing_in_front(self) -> bool:
        """Whether NaN in front of a context give the forecast (of a sampling family, its
        distribution) of the context without them.
        """
        return False

    @property
    def variates(self) -> Literal["independent", "joint"]:
        """Whether one window holds one variate, or all of them because the model lets them see each
        other.
        """
        return getattr(self.config, "variates", "independent")

    @property
    def context_len(self) -> int:
        """L, the context length the model was trained with, in time steps."""
        return self.config.context_len

    @property
    def horizon(self) -> int:
        """Time steps of one forecast step; longer horizons are rolled out."""
        return self.config.horizon

    @property
    def patch_len(self) -> int:
        """Time steps of one token; 1 where tokens are single steps or have lengths of several
        kinds.
        """
        return getattr(self.config, "patch_len", 1)

    @property
    def eval_batch(self) -> int:
        """Windows of one forward pass in evaluation: what fits into a few GB. Changes the speed,
        not the value.
        """
        return 2048

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Tree:
        """A fresh draw from the ORIGINAL's own initialisation. It is what smoothed fine-tuning
        mixes in.
        """

    @abc.abstractmethod
    def loss(
        self, params: Tree, batch: Batch, key: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """The original's own fine-tuning loss: a scalar, the mean over rows weighted by
        `batch["weight"]`.

        A missing target (NaN) does not count, and a missing value of the context is read as
        `predict` reads it: the loss and its gradients are finite, and 0 where no target is
        observed.
        """

    def point_loss(
        self, params: Tree, batch: Batch, key: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """MSE of the point forecast [B, C, H], in the units of the batch; for methods that ask for
        it, rolled out where the target is long. NaN as in `loss`.
        """
        steps = batch["target"].shape[-1]
        point_BCH = self._forecast(params, batch["context"], steps, key=key, train=train)
        return mse_observed(point_BCH, batch["target"], batch)

    def _require_reach(self, steps: int) -> None:
        """Refuse a target of more than `horizon` steps, for losses that do not roll out.

        Raises: ValueError with both lengths.
        """
        if steps > self.horizon:
            raise ValueError(
                f"one forward pass reaches {self.horizon} steps, the target has {steps}"
            )

    def _forecast(
        self, params: Tree, context: jax.Array, horizon: int, key=None, train: bool = False
    ) -> jax.Array:
        """The point forecast [B, C, H] of `predict`, with dropout in training; for families with
        the common `point_loss`.
        """
        raise ValueError(f"{self.family} has no point loss")

    def absolute_loss(
        self, params: Tree, batch: Batch, key: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Mean absolute error of the point forecast [B, C, H], in the units of the batch; of
        families that forecast at every token, of all their forecasts. Its minimum is the median.
        NaN as in `loss`. Without dropout.
        """
        target = batch["target"]
        observed = ~jnp.isnan(target)
        context, horizon = batch["context"], target.shape[-1]
        beside = {name: batch[name] for name in self.covariates if name in batch}
        if beside:
            point = self.predict_with(params, context, horizon, **beside, key=key).point
        else:
            point = self.predict(params, context, horizon, key=key).point
        return mean_observed(jnp.abs(point - jnp.where(observed, target, 0.0)), observed, batch)

    def predict(
        self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None
    ) -> Forecast:
        """Forecast `horizon` steps after `context` [B, C, T]; any T >= 1, NaN = missing. In units
        of the context.

        A row's forecast does not depend on the other rows of the batch. Models that sample draw
        from `row_keys(key, context)`; without a key the draws are the same each time. Families with
        covariates say in `predict_with` how they forecast without any.
        """
        return self.predict_with(params, context, horizon, key=key)

    def predict_with(
        self,
        params: Tree,
        context: jax.Array,
        horizon: int,
        *,
        past: jax.Array | None = None,
        known: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Forecast:
        """As `predict`, with covariates.

        Args:
          past: [B, K, T], known up to the end of the context alone; NaN = missing.
          known: [B, K', T + H], known ahead: of the context and of the `horizon` steps after it;
            NaN = not known.
        Raises: ValueError for a family that does not take them (`covariates`).
        """
        raise ValueError(f"{self.family} does not take covariates")

    def for_series(
        self,
        params: Tree,
        *,
        n_variates: int,
        freq: str | None = None,
        key: jax.Array | None = None,
    ) -> tuple["Model", Tree]:
        """The model made ready for one data set: (model, params), the same two for most families.

        Families with frequency classes, tokens per data set or layers per variate put them in here;
        a model that is ready for the data set already comes back as it is. What a data set is
        called plays no part.

        Args:
          n_variates: C.
          freq: step of the series as pandas writes it ("h", "15min"), None where unknown; "oov"
            (out of vocabulary) has a family with tokens of frequencies take the one for unknown
            steps.
          key: PRNG key for parameters absent from the checkpoint; None: nothing is drawn.
        Raises: ValueError for a frequency that the family needs and does not know, and, without a
          key, for data that need parameters absent from the checkpoint.
        """
        return self, params

    def with_head(
        self, params: Tree, head: str, key: jax.Array, **sizes: Any
    ) -> tuple["Model", Tree]:
        """The same body under a fresh, untrained head: (model, params). sizes: horizon=..., or
        n_classes=....

        Raises: ValueError for a head that is not in `head_names`.
        """
        raise ValueError(f"{self.family} has no exchangeable heads")

    def with_scales(self, params: Tree, how: MultiScale, key: jax.Array) -> tuple["Model", Tree]:
        """The same encoder over further, coarser scales of a series as well: (model, params), see
        `layers.multiscale`.

        What is new adds nothing at first: forecasts of the finest scale are those of this model.
        They are mixed with those of the other scales by equal weights.

        Raises: ValueError for a family whose encoder cannot take them (`scalable`), and for a model
        that has them.
        """
        raise ValueError(
            f"{self.family} cannot be fine-tuned at several scales (msft): that is for encoders "
            "whose patches are told apart by ids, such as moirai"
        )

    def embed(self, params: Tree, context: jax.Array) -> jax.Array:
        """Embedding [B, D] (or what the family documents) of `context` [B, C, T]."""
        raise ValueError(f"{self.family} does not do embedding")

    def classify(self, params: Tree, x: jax.Array, key=None, train=False) -> jax.Array:
        """Logits [B, classes] of `x` [B, C, T]."""
        raise ValueError(f"{self.family} does not do classification")

    def routed(
        self, params: Tree, context: jax.Array, horizon: int
    ) -> tuple[dict[str, jax.Array], int]:
        """Where tokens go in a forecast of `horizon` steps: by the path of each layer's experts the
        ids [B, N, K] of those that every token of `context` [B, C, T], and of what is forecast and
        fed back, chooses, -1 for padding; and how many experts the router chooses from.

        Raises: ValueError for a family whose experts cannot be taken out one by one.
        """
        raise ValueError(
            f"{self.family} has no experts that could be pruned by how often they are chosen"
        )

    def impute(
        self, params: Tree, x: jax.Array, observed: jax.Array, key=None, train=False, ims=True
    ) -> jax.Array:
        """Reconstruction [B, C, T] of a series of which only `observed` [B, C, T] points
        are known.
        """
        raise ValueError(f"{self.family} does not do imputation")

    def reconstruct(self, params: Tree, x: jax.Array, key=None, train=False, ims=True) -> jax.Array:
        """The model's expectation [B, C, T'] of the last T' points of `x` [B, C, T]; anomaly scores
        compare the two.
        """
        raise ValueError(f"{self.family} does not do anomaly detection")

    @abc.abstractmethod
    def recipe(self) -> Recipe:
        """Fine-tuning defaults."""

    def _recipe(self, *, source: str, **numbers: Any) -> Recipe:
        """A recipe by its numbers: on the family's own loss, at the model's own context and
        horizon, where they are not told.
        """
        usual = {"context_len": self.context_len, "horizon": self.horizon, "mode": "ims"}
        return Recipe(source=source, **(usual | numbers))

    def check_task(self, task: Task) -> None:
        """Raises: ValueError when the family has no such task."""
        if task not in self.tasks:
            raise ValueError(f"{self.family} does {', '.join(self.tasks)}, not {task}")
