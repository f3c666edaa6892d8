"""Classification: which of several classes an example belongs to.

Examples are arrays [N, C, T] with a label each. The loss is the cross entropy of the model's
logits; accuracy and the macro-averaged F1 are scored. M classes are numbered 0 .. M - 1.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ltsm_jax import sharding, storage
from ltsm_jax.data.series import DataError
from ltsm_jax.layers.missing import mean_over_rows
from ltsm_jax.models.family import Batch, Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Loss, Part, Source
from ltsm_jax.tasks.batches import in_batches
from ltsm_jax.trees import Tree

BATCH = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples: values [N, C, T] float32 and labels [N] int32. A pytree."""

    values: jax.Array
    labels: jax.Array

    @classmethod
    def of(cls, values: Any, labels: Sequence[int] | np.ndarray) -> "Examples":
        """Check and place arrays.

        Raises: DataError for other shapes, infinite values, or labels that are no whole numbers
        from 0.
        """
        x, y = np.asarray(values), np.asarray(labels)
        problems = []
        if x.ndim != 3 or not x.size:
            problems.append(f"values must be [examples, variates, steps], not {x.shape}")
        elif np.isinf(x).any():
            problems.append("values are infinite in places")
        if (
            y.shape != x.shape[:1]
            or not np.issubdtype(y.dtype, np.integer)
            or (y.size and y.min() < 0)
        ):
            problems.append(
                f"labels must be one whole number from 0 for each example, not {y.dtype} {y.shape}"
            )
        if problems:
            raise DataError("; ".join(problems))
        return cls(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))

    @property
    def n(self) -> int:
        """Number of examples N."""
        return self.labels.shape[0]

    def gather(self, indices: jax.Array) -> dict[str, jax.Array]:
        """The examples numbered `indices` [B]: {"context": [B, C, T], "label": [B]}."""
        return {"context": self.values[indices], "label": self.labels[indices]}

    def take(self, indices: np.ndarray) -> "Examples":
        """Only the examples numbered `indices`, in that order."""
        return Examples(self.values[indices], self.labels[indices])

    def over(self, mesh: Mesh | None) -> "Examples":
        """The same examples, whole on every device of a mesh."""
        return self if mesh is None else Placement(mesh).replicate(self)


jax.tree_util.register_dataclass(Examples, data_fields=["values", "labels"], meta_fields=[])


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Examples to train on, to select with and to test on; all of one number of variates
    and steps.
    """

    train: Examples
    val: Examples
    test: Examples

    def __post_init__(self):
        shapes = {part: getattr(self, part).values.shape[1:] for part in ("train", "val", "test")}
        if len(set(shapes.values())) > 1:
            raise DataError(f"the parts differ in variates or steps: {shapes}")

    @property
    def n_classes(self) -> int:
        """M: one more than the largest label of all parts."""
        return 1 + max(int(np.max(part.labels)) for part in (self.train, self.val, self.test))


@functools.cache
def loss_fn(model: Model) -> Loss:
    """The training loss `f(params, batch, key, train) -> scalar`: cross entropy in nats, rows
    counting by `weight`.

    Raises: ValueError for a model without this task.
    """
    model.check_task("classification")

    def loss(params: Tree, batch: Batch, key: jax.Array | None, train: bool) -> jax.Array:
        logits_BM = model.classify(params, batch["context"], key=key, train=train)
        return mean_over_rows(_entropy(logits_BM, batch["label"])[:, None], batch)

    return loss


def _entropy(logits_BM: jax.Array, label_B: jax.Array) -> jax.Array:
    """Cross entropy of each row [B]."""
    log_BM = jax.nn.log_softmax(logits_BM.astype(jnp.float32))
    return -jnp.take_along_axis(log_BM, label_B[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "placement"))
def _scores(
    model: Model, params: Tree, examples: Examples, indices: jax.Array, placement: Placement
) -> dict[str, jax.Array]:
    batch = placement.rows(examples.gather(indices))
    logits_BM = model.classify(params, batch["context"])
    found = {"loss": _entropy(logits_BM, batch["label"]), "guess": jnp.argmax(logits_BM, axis=1)}
    return placement.everywhere(found)


def guesses(
    model: Model,
    params: Tree,
    examples: Examples,
    *,
    batch_size: int = BATCH,
    placement: Placement | None = None,
) -> dict[str, np.ndarray]:
    """Loss [N] and most likely class [N], "guess", of every example.

    Raises: ValueError for no example, or a model without this task.
    """
    model.check_task("classification")
    placement = placement or Placement.of(params)
    placed = examples.over(placement.mesh)
    one_batch = functools.partial(_scores, model, params, placed, placement=placement)
    return in_batches(one_batch, examples.n, batch_size, placement=placement)


def evaluate(
    model: Model,
    params: Tree,
    examples: Examples,
    *,
    batch_size: int = BATCH,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Score every example: loss (cross entropy), accuracy, macro_f1, and how many there are.

    Raises: ValueError for no example, or a model without this task.
    """
    found = guesses(model, params, examples, batch_size=batch_size, placement=placement)
    scores = accuracy_and_f1(found["guess"].astype(int), sharding.on_host(examples.labels))
    return {"loss": float(found["loss"].mean())} | scores


def accuracy_and_f1(guess: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """Accuracy, and F1 averaged over the classes that occur among labels and guesses, each class
    counting alike.
    """
    each = []
    for one in np.union1d(guess, label):
        hits = int(((guess == one) & (label == one)).sum())
        wrong = int(((guess == one) != (label == one)).sum())
        each.append(2 * hits / (2 * hits + wrong))
    return {
        "accuracy": float((guess == label).mean()),
        "macro_f1": float(np.mean(each)),
        "examples": len(label),
    }


@dataclasses.dataclass(frozen=True)
class Classification:
    """The task of classification on `Parts`."""

    @property
    def selects(self) -> str:
        """The cross entropy, which still tells two models apart that are right equally often."""
        return "loss"

    def windows(self, model: Model, data: Parts, part: Part = "train") -> Source:
        """The examples of a part."""
        return getattr(data, part)

    def loss(self, model: Model) -> Loss:
        """See `loss_fn`."""
        return loss_fn(model)

    def evaluate(
        self,
        model: Model,
        params: Tree,
        data: Parts,
        part: Part = "val",
        placement: Placement | None = None,
    ) -> dict[str, Any]:
        """See `evaluate`, of every example of a part.

        Raises: ValueError where the labels name more classes than the model has.
        """
        x = jax.ShapeDtypeStruct((1, *data.train.values.shape[1:]), jnp.float32)
        n_classes = jax.eval_shape(model.classify, params, x).shape[1]
        if data.n_classes > n_classes:
            raise ValueError(
                f"the labels name {data.n_classes} classes, the model has {n_classes}: give it a "
                f"head with with_head(params, 'classification', key, n_classes={data.n_classes})"
            )
        return evaluate(model, params, getattr(data, part), placement=placement)

    def baselines(self, model: Model, data: Parts, part: Part = "val") -> dict[str, dict[str, Any]]:
        """The most frequent class of the training part, always."""
        label = np.asarray(getattr(data, part).labels)
        most = np.bincount(np.asarray(data.train.labels)).argmax()
        return {"most frequent class": accuracy_and_f1(np.full(label.shape, most), label)}

    def warnings(
        self, model: Model, params: Tree, data: Parts, placement: Placement | None = None
    ) -> tuple[str, ...]:
        """Say so where the model gives one class to all of several."""
        guess = guesses(model, params, data.val, placement=placement)["guess"]
        if len(np.unique(guess)) > 1 or len(np.unique(np.asarray(data.val.labels))) == 1:
            return ()
        return ("collapsed: every example gets the same class; lower lr or start closer",)

    def facts(self, data: Parts) -> dict[str, Any]:
        """The task, and digests of the examples."""
        digests = {part: storage.sha256_of(getattr(data, part)) for part in ("train", "val")}
        return {"task": "classification", "data_sha256": digests}

    def row(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracy and macro F1."""
        return {name: scores[name] for name in ("accuracy", "macro_f1")}
