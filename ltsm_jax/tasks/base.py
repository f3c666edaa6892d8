"""The protocol of a task: everything that methods may know of it.

A task is a small frozen value, such as `Forecasting(mode="direct")`. Methods ask it for windows, a
loss and scores, and know no task by name: fine-tuning, pruning and every comparison run through the
same code for all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
from jax.sharding import Mesh

from ltsm_jax.models.family import Batch, Model
from ltsm_jax.sharding import Placement
from ltsm_jax.trees import Tree

Part = Literal["train", "val", "test"]
Loss = Callable[[Tree, Batch, jax.Array | None, bool], jax.Array]


class Source(Protocol):
    """Windows that training can gather on the device: a pytree, such as `data.Windows`."""

    @property
    def n(self) -> int:
        """Number of windows."""
        ...

    def gather(self, indices: jax.Array) -> dict[str, jax.Array]:
        """The windows numbered `indices` [B] as a batch."""
        ...

    def over(self, mesh: Mesh | None) -> Any:
        """The same windows where the devices of a mesh can cut them."""
        ...


class Task(Protocol):
    """One task with its options: frozen and hashable, so that it may be static under jit.

    `data` is what the task's own preparation gives: `data.Splits` for forecasting and imputation,
    `anomaly.ScaledSeries`, `classification.Examples`.
    """

    @property
    def selects(self) -> str:
        """Name the metric of `evaluate` whose lowest value in validation selects an epoch."""
        ...

    def windows(self, model: Model, data: Any, part: Part = "train") -> Source:
        """Cut the windows of a part, as the loss of the task wants them."""
        ...

    def loss(self, model: Model) -> Loss:
        """Give the training loss; one and the same function for equal models, so that they share a
        compilation.
        """
        ...

    def evaluate(
        self,
        model: Model,
        params: Tree,
        data: Any,
        part: Part = "val",
        placement: Placement | None = None,
    ) -> dict[str, Any]:
        """Score every window of a part. placement: of the parameters; None: ask them."""
        ...

    def baselines(self, model: Model, data: Any, part: Part = "val") -> dict[str, dict[str, Any]]:
        """Score what has learned nothing, by its name; of the model only sizes are looked at. Empty
        where the task knows nothing of the kind.
        """
        ...

    def warnings(
        self, model: Model, params: Tree, data: Any, placement: Placement | None = None
    ) -> tuple[str, ...]:
        """Say what a user should look at in what this model does, in words; empty where there is
        nothing.
        """
        ...

    def facts(self, data: Any) -> dict[str, Any]:
        """List what decides a result and is not in the model, as JSON: the options, the data and
        their digests.
        """
        ...

    def row(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Pick what a report shows of the scores of a part."""
        ...
