"""How a batch is taken where the config leaves that open: in how many parts (`accumulate="auto"`),
and what the backward pass computes again (`remat="auto"`).

A training step on a CPU writes what the backward pass keeps into fresh memory, and the system hands
that memory out page by page, zeroed: for a small model at a large batch that is a quarter of the
step or more. Parts taken one after the other inside one program use the same memory again. Too many
parts cost as well: each adds its gradient, as large as the parameters, to a sum. That choice
follows from shapes alone, never from a clock: one command gives one result. It differs from the
whole batch by rounding, and by the dropout, of which each part draws its own.

Where a step would not fit into the memory that is free, on any device, it is taken in the fewest
parts that do; where no number of parts does, or none may be taken, the backward pass computes
again. So a smaller machine takes more parts, and differs by rounding from a larger one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ltsm_jax import hosts
from ltsm_jax.sharding import Placement
from ltsm_jax.training import checkpoints, memory
from ltsm_jax.training.config import REMAT, TrainConfig
from ltsm_jax.trees import Tree

OPEN = ("accumulate", "remat")  # fields of a config that may be "auto"

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
    placement: Placement,
    folder: Any = None,
) -> TrainConfig:
    """Put values in the place of "auto"; a config without any comes back as it is.

    A folder that holds a run already has the values of that run, so that a run goes on as it began.
    Windows with missing values are never taken apart, as the parts would not count by what they
    observe.

    Args:
      moving, frozen: parameters that are trained, and the others.
      source, loss_fn: as for `fit`.
      key: of the dropout.
      placement: of the parameters.
      folder: of the run, or None.
    """
    for field in OPEN:
        if getattr(config, field) == "auto" and folder is not None:
            recorded = hosts.on_first(checkpoints.recorded, folder, f"train.{field}")
            if recorded is not None:
                config = dataclasses.replace(config, **{field: recorded})
    undecided = [field for field in OPEN if getattr(config, field) == "auto"]
    if not undecided:
        return config

    def takes(config: TrainConfig) -> memory.MemoryEstimate:
        return memory.estimate_before(
            config,
            moving,
            frozen,
            source=source,
            loss_fn=loss_fn,
            key=key,
            placement=placement,
            writes=folder is not None,
        )

    @functools.cache  # it looks at all values, where it has to
    def splits() -> bool:
        return "accumulate" in undecided and not _has_missing(source)

    plain = {"accumulate": 1, "remat": "none"}
    config = dataclasses.replace(
        config, **{field: plain[field] for field in OPEN if getattr(config, field) == "auto"}
    )
    if jax.default_backend() == "cpu" and placement.mesh is None and splits():
        kept = memory.SCRATCH * takes(config).kept
        batch_size = min(config.batch_size or 1, int(source.n))
        parts = number_of(batch_size, kept, memory.bytes_in(moving))
        config = dataclasses.replace(config, accumulate=parts)
    remats = REMAT if "remat" in undecided else (config.remat,)
    return that_fits(config, remats, splits, takes=takes, available=memory.available())


def that_fits(
    config: TrainConfig,
    remats: Sequence[str],
    splits: Callable[[], bool],
    takes: Callable[[TrainConfig], memory.MemoryEstimate],
    available: int | None,
) -> TrainConfig:
    """Change a config as little as lets training fit into `available` bytes; where nothing does,
    or that is unknown, it stays.

    Args:
      remats: values of `remat` to try, in this order.
      splits: whether the batch may be taken in more parts.
      takes: the memory that training by a config takes.
    """
    if available is None:
        return config
    for remat in remats:
        tried = dataclasses.replace(config, remat=remat)
        found = takes(tried)
        if found.fits(available):
            return tried
        parts = found.parts_that_fit(available) if splits() else None
        if parts is not None:
            return dataclasses.replace(tried, accumulate=parts)
    return config


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
