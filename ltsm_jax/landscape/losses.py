"""The loss of a model on the windows of a split, as a function of its parameters alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.data.windows import Windows
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.models.family import Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.trees import Tree

Kind = Literal["mse", "own"]
KINDS = get_args(Kind)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["windows"],
    meta_fields=["model", "kind", "task", "batch_size", "placement"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class SplitLoss:
    """`loss(params) -> scalar` of a model on windows; make it with `split_loss`.

    It is a tree whose arrays are the windows, so that a compiled function takes it as an argument:
    two splits of one size share a compilation.
    """

    windows: Windows
    model: Model
    kind: Kind
    task: Forecasting
    batch_size: int
    placement: Placement

    def __call__(self, params: Tree) -> jax.Array:
        """Compute the loss of all windows, a float32 scalar; inside or outside jit."""
        return self.prepared()(params)

    def prepared(self) -> Callable[[Tree], jax.Array]:
        """Give the same function, with the windows cut already where they are one batch.

        For a loop over parameters inside jit: it does not cut them again at every turn. Several
        batches are cut in turn, so that the memory is that of one.
        """
        n = self.windows.n
        blocks = -(-n // self.batch_size)

        # The last batch is filled up with repeated windows of weight 0: one shape serves all.
        numbers = np.arange(blocks * self.batch_size)
        indices = jnp.asarray(np.minimum(numbers, n - 1), jnp.int32).reshape(
            blocks, self.batch_size
        )
        weights = jnp.asarray(numbers < n, jnp.float32).reshape(blocks, self.batch_size)
        if blocks == 1:
            batch = self._cut(indices[0])

            def of_one(params: Tree) -> jax.Array:
                total, count = self._sums(params, batch, weights[0])
                return total / count

            return of_one

        # What the backward pass needs of a batch is computed again.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def sums(
            params: Tree, indices: jax.Array, weight: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return self._sums(params, self._cut(indices), weight)

        def of_all(params: Tree) -> jax.Array:
            def add(carry, batch):
                total, count = sums(params, *batch)
                return (carry[0] + total, carry[1] + count), None

            zero = jnp.zeros((), jnp.float32)
            (total, count), _ = jax.lax.scan(add, (zero, zero), (indices, weights))
            return total / count

        return of_all

    def _cut(self, indices: jax.Array) -> dict[str, jax.Array]:
        """Cut the windows `indices` [B]."""
        return self.placement.rows(self.windows.gather(indices))

    def _sums(
        self, params: Tree, batch: dict[str, jax.Array], weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sum over the windows of a batch of what is averaged, and the weight of that sum."""
        runtime = Runtime(placement=self.placement)
        if self.kind == "own":
            loss = runtime.call(self.model.loss, params, batch | {"weight": weight})
            return loss * weight.sum(), weight.sum()
        target = batch["target"]
        predict = self.task.predictor(self.model).predict
        point = runtime.call(predict, params, batch["context"], target.shape[-1]).point
        observed = ~jnp.isnan(target) & (weight > 0)[:, None, None]
        # The inner `where` keeps missing targets out of the gradient as well.
        error = jnp.where(observed, point - jnp.where(observed, target, 0.0), 0.0)
        return jnp.square(error).sum(), observed.sum().astype(jnp.float32)


def split_loss(
    model: Model,
    windows: Windows,
    *,
    kind: Kind = "mse",
    sample: int | None = None,
    task: Forecasting | None = None,
    batch_size: int | None = None,
    placement: Placement | None = None,
) -> SplitLoss:
    """Make `loss(params) -> scalar` of a model on a split, or on a fixed subsample of its windows.

    Args:
      model: the model; one that forecasts.
      windows: of a split, such as `splits.test`. For "own" they need targets as long as the model's
        own loss wants, as `task.windows(model, splits)` gives.
      kind: "mse": mean squared error of the forecast over all observed steps, as
        `tasks.forecasting.evaluate` scores it; "own": the training loss of the family, without
        dropout.
      sample: number of windows, evenly spaced over the split and the same at every call; None: all.
      task: says how windows are scaled; by default as the benchmarks have it.
      batch_size: windows of one forward pass; None: the model's `eval_batch`. It changes speed and
        memory, not the value.
      placement: the devices among which the windows of a batch are split; by default none are.
        Needed for parameters that lie in parts over a mesh (`Placement.of(params)`).
    Raises: ValueError for a model that does not forecast, an unknown kind, or a sample below 1.
    Example: `loss = split_loss(model, splits.test, sample=512)`, then `loss(params)`
    """
    model.check_task("forecasting")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1 window, got {sample}")
    if windows.n < 1:
        raise ValueError("there are no windows to compute a loss of")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    placement = placement or Placement()
    task = task or Forecasting()

    if sample is not None and sample < windows.n:
        windows = windows.take(np.linspace(0, windows.n - 1, sample).astype(np.int32))
    parts = placement.row_parts
    rows = min(batch_size or model.eval_batch * parts, windows.n)
    rows = -(-rows // parts) * parts  # the devices must divide a batch
    return SplitLoss(
        windows=windows.over(placement.mesh),
        model=model,
        kind=kind,
        task=task,
        batch_size=rows,
        placement=placement,
    )
