"""How to train: the fields of a run, and the random keys of its seed."""

import dataclasses
import math
import zlib

import jax

from ltsm_jax.training import checkpoints, optimizers

COMPUTE = ("float32", "bfloat16")
REMAT = ("none", "all but products")
KEY_NAMES = ("init", "aux", "data", "dropout")
MOST_STEPS = 4096  # of one dispatch; so long is the buffer of its losses


def keys(seed: int) -> dict[str, jax.Array]:
    """Named keys of one seed: `init`, `aux` (the random model SFF mixes in), `data` (order), `dropout`.

    A key depends on its name and the seed alone, so methods that use more keys than others still see the same data.
    """
    return {name: jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())) for name in KEY_NAMES}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are those of the SFF release (Meteor-Stars/SFF).

    Attributes:
      epochs: passes over the training windows.
      batch_size: windows per step; the last, partial batch of an epoch is kept.
      lr, schedule, warmup: see `optimizers.schedule`.
      weight_decay, clip: see `optimizers.adam`.
      patience: stop after this many epochs without a better validation MSE; None: never.
      seed: of the data order and dropout.
      checkpoint_seconds: time between checkpoints inside an epoch; one more follows each epoch.
      keep_checkpoints: how many stay; each has the best weights, too. A finished run keeps its last.
      steps_per_dispatch: None: from the measured time of a step. Has no influence on results.
      compute: dtype of the matrix products, "float32" or "bfloat16"; parameters, norms and losses stay in float32.
      accumulate: parts a batch is taken in, one after the other, for the memory of one part at a time.
      remat: what the backward pass computes again instead of keeping it: "none", or "all but products" (everything but
        the results of matrix products without batch axes), for less memory and more time.
    Raises: ValueError listing every field out of range.
    """

    epochs: int = 10
    batch_size: int = 2048
    lr: float = 3e-5
    schedule: str = "halving"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    patience: int | None = None
    seed: int = 0
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = checkpoints.KEEP
    steps_per_dispatch: int | None = None
    compute: str = "float32"
    accumulate: int = 1
    remat: str = "none"

    def __post_init__(self):
        bad = {
            "epochs must be at least 1": self.epochs < 1,
            "batch_size must be at least 1": self.batch_size < 1,
            "lr must be positive and finite": not 0 < self.lr < math.inf,
            f"schedule must be one of {', '.join(optimizers.SCHEDULES)}": self.schedule not in optimizers.SCHEDULES,
            "warmup is a share of the run, in [0, 1)": not 0 <= self.warmup < 1,
            "weight_decay must not be negative": not 0 <= self.weight_decay < math.inf,
            "clip must be positive": self.clip is not None and not self.clip > 0,
            "patience must be at least 1": self.patience is not None and self.patience < 1,
            "seed must be in [0, 2**32)": not 0 <= self.seed < 2**32,
            "checkpoint_seconds must not be negative": not self.checkpoint_seconds >= 0,
            "keep_checkpoints must be at least 1": self.keep_checkpoints < 1,
            f"steps_per_dispatch must be in [1, {MOST_STEPS}]": self.steps_per_dispatch is not None
            and not 1 <= self.steps_per_dispatch <= MOST_STEPS,
            f"compute must be one of {', '.join(COMPUTE)}": self.compute not in COMPUTE,
            "accumulate must be at least 1": self.accumulate < 1,
            f"remat must be one of {', '.join(REMAT)}": self.remat not in REMAT,
        }
        if problems := [text for text, is_bad in bad.items() if is_bad]:
            raise ValueError(f"{self}: " + "; ".join(problems))
