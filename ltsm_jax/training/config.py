"""How to train: the fields of a run, and the random keys of its seed."""

import dataclasses
import math
import numbers
import operator
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import numpy as np

from ltsm_jax.training import checkpoints, optimizers

COMPUTE = ("float32", "bfloat16")
REMAT = ("none", "all but products")
KEY_NAMES = ("init", "aux", "data", "dropout")
RECIPE = (
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "weight_decay",
    "clip",
)  # fields that a recipe fills
LATER: dict[str, Any] = {  # unrecorded where they are these
    "optimizer": "adamw",
    "betas": optimizers.BETAS,
    "eps": optimizers.EPS,
    "rho": 0.0,
    "ema": 0.0,
    "swa": 0.0,
}
FREE = (
    "checkpoint_seconds",
    "keep_checkpoints",
    "steps_per_dispatch",
)  # have no influence on results
MOST_STEPS = 4096  # of one dispatch; so long is the buffer of its losses
LONGEST = 60  # characters of a refused value that a message quotes


def keys(seed: int) -> dict[str, jax.Array]:
    """Make the named keys of one seed: `init`, `aux` (the random model SFF mixes in), `data`
    (order), `dropout`.

    A key depends on its name and the seed alone, so methods that use more keys than others still
    see the same data.
    """
    return {
        name: jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        for name in KEY_NAMES
    }


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of training. Of the first seven fields, those that are None are left to a recipe and
    the caller.

    `TrainConfig(epochs=1)` changes the epochs of a recipe and nothing else of it: see `filled`.

    Attributes:
      epochs: passes over the training windows.
      batch_size: windows per step; the last, partial batch of an epoch is kept.
      lr, schedule: see `optimizers.schedule`.
      weight_decay: see `optimizers.Rule`; 0 for none.
      clip: the largest global norm of a gradient, see `optimizers.Rule`; math.inf for no limit.
      seed: of the data order and dropout.
      warmup: see `optimizers.schedule`.
      patience: stop after this many epochs without a better validation MSE; None: never.
      checkpoint_seconds: time between checkpoints inside an epoch; one more follows each epoch.
      keep_checkpoints: how many stay; each has the best weights, too. A finished run keeps its
        last.
      steps_per_dispatch: None: from the measured time of a step. Has no influence on results.
      compute: dtype of the matrix products, "float32" or "bfloat16"; parameters, norms and losses
        stay in float32.
      accumulate: parts a batch is taken in, one after the other, for the memory of one part at a
        time. "auto": as many as are quickest on a CPU, by the shapes of model and batch, and where
        that does not fit into the free memory of a device, the fewest that do (see
        `training.parts`); a folder records how many. A loss that is no mean over rows (missing
        targets, a balance term) is that of each part.
      remat: what the backward pass computes again instead of keeping it: "none", or
        "all but products" (everything but the results of matrix products without batch axes), for
        less memory and more time, or "auto": the latter only where the former does not fit. A
        folder records which.
      optimizer, betas, eps: see `optimizers.Rule`.
      rho: take the gradient this far up the gradient (SAM, see `step.uphill`), for twice the time;
        0: where it is.
      ema: validate and keep an exponential moving average of the weights: after each step it is
        `ema * average + (1 - ema) * weights`, from the start on; 0: the weights themselves.
      swa: validate and keep the mean of the weights after each of the last epochs, this share of
        them and at least one; epochs before are validated, but not selected. 0: the weights
        themselves.
    Raises: ValueError listing every field of a wrong type or out of range.
    """

    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    schedule: str | None = None
    weight_decay: float | None = None
    clip: float | None = None
    seed: int | None = None
    warmup: float = 0.0
    patience: int | None = None
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = checkpoints.KEEP
    steps_per_dispatch: int | None = None
    compute: str = "float32"
    accumulate: int | Literal["auto"] = 1
    remat: str = "none"
    optimizer: str = "adamw"
    betas: tuple[float, float] = optimizers.BETAS
    eps: float = optimizers.EPS
    rho: float = 0.0
    ema: float = 0.0
    swa: float = 0.0

    def __post_init__(self):
        problems = []
        for name, (rule, wanted) in _RULES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            try:
                # numpy's numbers become Python's, which a folder's config.json can hold
                object.__setattr__(self, name, rule(value))
            except (TypeError, ValueError):
                problems.append(f"{name} must be {wanted}, got {_quoted(value)}")
        if not problems and self.ema and self.swa:
            problems.append("ema and swa are two ways to average the weights: take one of them")
        if problems:
            raise ValueError("TrainConfig: " + "; ".join(problems))

    @property
    def unfilled(self) -> tuple[str, ...]:
        """Names of the fields that a recipe or the caller still has to say."""
        return tuple(name for name in (*RECIPE, "seed") if getattr(self, name) is None)

    def filled(self, recipe: Any, *, seed: int | None = None) -> "TrainConfig":
        """Fill the fields that are None from a recipe, and the seed from the caller's.

        Args:
          recipe: anything with the fields epochs, batch_size, lr, schedule, weight_decay and clip,
            such as a `models.Recipe`, or a mapping with some of them. Its clip may be None: no
            limit.
          seed: of the run; None: that of the config.
        Raises: ValueError for a mapping with other names, or a config with another seed than the
        caller's.
        """
        if isinstance(recipe, Mapping):
            if unknown := sorted(set(recipe) - set(RECIPE)):
                raise ValueError(
                    f"a recipe has {', '.join(RECIPE)}, not {', '.join(map(str, unknown))}"
                )
            said = dict(recipe)
        else:
            said = {name: getattr(recipe, name) for name in RECIPE}
        if "clip" in said and said["clip"] is None:
            said["clip"] = math.inf
        changes = {name: value for name, value in said.items() if getattr(self, name) is None}
        if seed is not None:
            if self.seed is not None and self.seed != seed:
                raise ValueError(
                    f"seed={seed} is asked for, and the config says seed={self.seed}: give one of "
                    "them"
                )
            changes["seed"] = seed
        return dataclasses.replace(self, **changes)

    def require_filled(self) -> None:
        """Raises: ValueError naming the fields that are still None."""
        if self.unfilled:
            raise ValueError(
                f"the TrainConfig does not say {', '.join(self.unfilled)}: give them, or fill them "
                "from a model's recipe with config.filled(model.recipe(), seed=0)"
            )

    def record(self) -> dict[str, Any]:
        """Give the fields that decide a result as JSON knows them; no limit of the gradient is
        None.
        """
        fields = {
            name: value for name, value in dataclasses.asdict(self).items() if name not in FREE
        }
        # Folders of earlier versions do not name these, and have to go on.
        fields = {
            name: value
            for name, value in fields.items()
            if name not in LATER or value != LATER[name]
        }
        return fields | {"clip": None if self.clip == math.inf else self.clip}

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is validated and kept instead of the weights."""
        return bool(self.ema or self.swa)

    @property
    def first_averaged(self) -> int:
        """Number, from 0, of the first epoch that `swa` averages."""
        assert self.epochs is not None, "filled"
        return self.epochs - max(round(self.swa * self.epochs), 1)


def _whole(low: int, high: float = math.inf) -> Callable[[Any], int]:
    """Make the rule of a whole number in [low, high]."""

    def rule(value: Any) -> int:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # no 1.5, no 2.0, no "2"
        if not low <= number <= high:
            raise ValueError
        return number

    return rule


def _count_or_auto(value: Any) -> int | str:
    """Read a whole number of at least 1, or "auto"."""
    return value if isinstance(value, str) and value == "auto" else _whole(1)(value)


def _real(fits: Callable[[float], bool]) -> Callable[[Any], float]:
    """Make the rule of a number for which `fits` is true; it is not for NaN."""

    def rule(value: Any) -> float:
        if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
            raise TypeError
        if not fits(float(value)):
            raise ValueError
        return float(value)

    return rule


def _betas(value: Any) -> tuple[float, float]:
    """Read two shares in [0, 1), from a tuple or from what JSON makes of it."""
    if isinstance(value, str) or len(value) != 2:
        raise ValueError
    share = _real(lambda x: 0 <= x < 1)
    return share(value[0]), share(value[1])


def _one_of(names: Collection[str]) -> Callable[[Any], str]:
    """Make the rule of a name."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return rule


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


_OPTIONAL = (*RECIPE, "seed", "patience", "steps_per_dispatch")
_COUNT = (_whole(1), "a whole number of at least 1")
_RULES = {
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "lr": (_real(lambda x: 0 < x < math.inf), "a positive, finite number"),
    "schedule": (_one_of(optimizers.SCHEDULES), f"one of {', '.join(optimizers.SCHEDULES)}"),
    "weight_decay": (_real(lambda x: 0 <= x < math.inf), "a finite number, not negative"),
    "clip": (_real(lambda x: x > 0), "a positive number (math.inf: no limit)"),
    "seed": (_whole(0, 2**32 - 1), "a whole number in [0, 2**32)"),
    "warmup": (_real(lambda x: 0 <= x < 1), "a share of the run, in [0, 1)"),
    "patience": _COUNT,
    "checkpoint_seconds": (_real(lambda x: x >= 0), "a number, not negative"),
    "keep_checkpoints": _COUNT,
    "steps_per_dispatch": (_whole(1, MOST_STEPS), f"a whole number in [1, {MOST_STEPS}]"),
    "compute": (_one_of(COMPUTE), f"one of {', '.join(COMPUTE)}"),
    "accumulate": (_count_or_auto, 'a whole number of at least 1, or "auto"'),
    "remat": (_one_of((*REMAT, "auto")), f"one of {', '.join(REMAT)}, auto"),
    "optimizer": (_one_of(optimizers.OPTIMIZERS), f"one of {', '.join(optimizers.OPTIMIZERS)}"),
    "betas": (_betas, "two numbers in [0, 1)"),
    "eps": (_real(lambda x: 0 < x < math.inf), "a positive, finite number"),
    "rho": (_real(lambda x: 0 <= x < math.inf), "a finite number, not negative"),
    "ema": (_real(lambda x: 0 <= x < 1), "a share, in [0, 1)"),
    "swa": (_real(lambda x: 0 <= x <= 1), "a share of the epochs, in [0, 1]"),
}
