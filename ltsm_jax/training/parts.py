"""In how many parts a CPU takes a batch, where the config leaves that open (`accumulate="auto"`).

A training step on a CPU writes what the backward pass keeps into fresh memory, and the system hands
that memory out page by page, zeroed: for a small model at a large batch that is a quarter of the
step or more. Parts taken one after the other inside one program use the same memory again. Too many
parts cost as well: each adds its gradient, as large as the parameters, to a sum.

The choice follows from shapes alone, never from a clock: one command gives one result. It differs
from the whole batch by rounding, and by the dropout, of which each part draws its own.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from ltsm_jax import hosts
from ltsm_jax.training import checkpoints, memory, step
from ltsm_jax.training.config import TrainConfig
from ltsm_jax.trees import Tree

# A Timer of 2.2M parameters at batch 2048, on 2 cores of a Zen 4: 2.27 s a step in one part, 1.89 s
# in 8, 1.74 s in 16, 1.70 s in 32 (57 MB a part). One of 67M at batch 64: 1.41 s in one part (0.8
# GB), 1.48 s in two.
PART_BYTES = 2**26
TIMES_PARAMETERS = 3


def settled(
    config: TrainConfig,
    moving: Tree,
    frozen: Tree,
    source: Any,
    loss_fn: Any,
    key: jax.Array,
    *,
    on_mesh: bool,
    folder: Any = None,
) -> TrainConfig:
    """Put a number in the place of `accumulate="auto"`; a config that has one comes back as it is.

    A folder that holds a run already has the number of that run, so that a run goes on as it began.
    Otherwise it is 1 on accelerators, over a mesh, and for windows with missing values, whose parts
    would not count by what they observe.

    Args:
      moving, frozen: parameters that are trained, and the others.
      source, loss_fn: as for `fit`.
      key: of the dropout.
      on_mesh: whether the parameters lie over several devices.
      folder: of the run, or None.
    """
    if config.accumulate != "auto":
        return config
    recorded = (
        None if folder is None else hosts.on_first(checkpoints.recorded, folder, "train.accumulate")
    )
    if recorded is not None:
        return dataclasses.replace(config, accumulate=recorded)

    whole = dataclasses.replace(config, accumulate=1)
    if jax.default_backend() != "cpu" or on_mesh or _has_missing(source):
        return whole
    assert config.batch_size, "filled"
    batch_size = min(config.batch_size, int(source.n))
    kept = memory.kept_by_backward(
        moving, frozen, source, loss_fn=loss_fn, key=key, rows=batch_size, how=step.How.of(whole)
    )
    of_parameters = memory.bytes_in(moving)
    return dataclasses.replace(
        config, accumulate=number_of(batch_size, memory.SCRATCH * kept, of_parameters)
    )


def number_of(batch_size: int, activations: float, parameters: int) -> int:
    """Choose the parts of a batch: the divisor of `batch_size` that brings a part nearest to the
    size aimed at.

    That is `PART_BYTES`, or `TIMES_PARAMETERS` times the bytes of the trained parameters, whichever
    is more.

    Args:
      activations: bytes that the whole batch keeps for its backward pass.
      parameters: bytes of the trained parameters.
    """
    wanted = activations / max(PART_BYTES, TIMES_PARAMETERS * parameters)
    if wanted <= 1:
        return 1
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    return min(divisors, key=lambda parts: abs(math.log(parts / wanted)))


def _has_missing(source: Any) -> bool:
    """Tell whether a source holds NaN anywhere."""
    floats = [leaf for leaf in jax.tree.leaves(source) if np.issubdtype(leaf.dtype, np.floating)]
    return any(bool(np.isnan(np.asarray(leaf)).any()) for leaf in floats)
