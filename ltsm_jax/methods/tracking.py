"""Curvature of the training loss at chosen epochs of a fine-tuning.

Measured on a fixed subsample of the training windows, without dropout, so that the numbers of
different epochs, methods and seeds can be compared.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import curvature
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.sharding import Placement
from ltsm_jax.trees import Params

SAMPLE = 64  # windows, evenly spaced
STEPS = 20  # of Lanczos at most
SAMPLES = 12  # Hessian-vector products of the trace
RHO = 0.05  # of SAM's sharpness
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Tracker:
    """Measures curvature at weights of one model on one batch; make it with `tracker`."""

    loss: Callable[[Params], jax.Array]
    windows: int

    def measure(self, params: Params) -> dict[str, float]:
        """Measure the largest eigenvalue and the trace of the Hessian, and SAM's sharpness at 0.05.

        Of a model with few parameters they are exact, see `curvature`; else the eigenvalue is that
        of 20 steps of Lanczos, and the trace an estimate from 12 products, with the same random
        vectors each time. About 80 gradients of the subsample in all.
        """
        (top,) = curvature.top_eigenvalues(self.loss, params, steps=STEPS, tolerance=TOLERANCE)
        return {
            "top_eigenvalue": float(top),
            "trace": curvature.trace(self.loss, params, samples=SAMPLES),
            "sharpness": curvature.sharpness(self.loss, params, RHO),
        }


def tracker(
    loss: Callable[..., jax.Array],
    source: Any,
    placement: Placement,
    sample: int = SAMPLE,
) -> Tracker:
    """Make a `Tracker` of a training loss.

    Args:
      loss: (params, batch, key, train) -> scalar, of plain weights.
      source: training windows, as for `training.fit`; `sample` of them are gathered once.
      placement: of the parameters. On a mesh the sample is cut to what its devices divide.
    Raises: ValueError where there are fewer windows than devices to share them.
    """
    parts = placement.row_parts
    count = min(sample, int(source.n)) // parts * parts
    if count < 1:
        raise ValueError(
            f"{source.n} windows are too few for {parts} devices to measure curvature on"
        )
    numbers = np.linspace(0, int(source.n) - 1, count).astype(np.int32)
    placed = source.over(placement.mesh)
    batch = _gathered(placed, numbers, placement)
    on_batch = jax.tree_util.Partial(_mean_loss(placement), jax.tree_util.Partial(loss), batch)
    return Tracker(on_batch, count)


def _gathered(source: Any, numbers: np.ndarray, placement: Placement) -> dict[str, jax.Array]:
    @jax.jit
    def gather(source, numbers):
        rows = placement.rows(source.gather(numbers))
        return rows | {"weight": placement.rows(jnp.ones(len(numbers), jnp.float32))}

    return gather(source, numbers)


@functools.cache
def _mean_loss(placement: Placement) -> Callable[..., jax.Array]:
    # One and the same function for equal placements, so that runs share a compilation.
    def mean_loss(loss, batch, params):
        return Runtime(placement=placement).call(loss, params, batch, None, False)

    return mean_loss
