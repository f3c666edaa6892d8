"""Learning-rate schedules, and optimisers: Adam as the originals use it, with decay of either kind,
and SGD.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

Schedule = Callable[[np.ndarray], np.ndarray]
OPTIMIZERS = ("adamw", "adam", "sgd")
BETAS = (0.9, 0.999)
EPS = 1e-8


def _halving(epoch, _done):
    return 0.5 ** np.maximum(epoch - 2, 0)


def _timer(epoch, _done):
    return 0.9 ** np.maximum(epoch - 5, 0)


def _pruning(epoch, _done):
    return 0.9 ** np.maximum(epoch - 4, 0)


def _cosine(_epoch, done):
    return 0.5 * (1 + np.cos(np.pi * done))


def _constant(epoch, _done):
    return np.ones(np.shape(epoch))


def _one_cycle(_epoch, done):
    up, down = np.minimum(done / 0.3, 1), np.maximum((done - 0.3) / 0.7, 0)
    rise = 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - np.cos(np.pi * up))
    return np.where(done < 0.3, rise, 4e-6 + (1 - 4e-6) * 0.5 * (1 + np.cos(np.pi * down)))


# Factor of the learning rate, of the epoch (1, 2, ...) and of the share of the run that is done, in
# [0, 1).
SCHEDULES = {
    "halving": _halving,
    "timer": _timer,
    "cosine": _cosine,
    "constant": _constant,
    "one-cycle": _one_cycle,
    "pruning": _pruning,
}


def schedule(
    name: str, lr: float, epochs: int, steps_per_epoch: int, warmup: float = 0.0
) -> Schedule:
    """Learning rate as a function of the step (0, 1, ...; a number or an array of them).

    Args:
      name: "halving": lr in epochs 1 and 2, then half of the epoch before (Meteor-Stars/SFF);
        "timer": lr in epochs 1 to 5, then 0.9 of the epoch before (thuml/Large-Time-Series-Model);
        "cosine": half a cosine from lr to 0 over the steps that follow the warm-up; "constant": lr;
        "one-cycle": from lr / 25 to lr over the first 30 % of the steps, then to lr / 250,000, both
          along half a cosine
        (Smith & Topin, arXiv 1708.07120, with the numbers of torch's OneCycleLR);
        "pruning": lr in epochs 1 to 4, then 0.9 of the epoch before
          (SJTU-DMTai/Prune-then-Finetune).
      lr: the rate at the top.
      epochs, steps_per_epoch: length of the run.
      warmup: share of all steps, in [0, 1), over which the rate climbs linearly to what the
        schedule says.
    Raises: ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    total = epochs * steps_per_epoch
    climb = math.ceil(warmup * total)

    def rate(step):
        step = np.asarray(step)
        done = np.maximum(step - climb, 0) / max(total - climb, 1)
        return (
            lr
            * SCHEDULES[name](step // steps_per_epoch + 1, done)
            * np.minimum(1.0, (step + 1) / (climb + 1))
        )

    return rate


@dataclasses.dataclass(frozen=True)
class Rule:
    """Optimiser of a run; hashable, so that it may be static under jit.

    Attributes:
      name: one of `OPTIMIZERS`.
        "adamw": Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101): each step also
          shrinks every trained
        parameter by lr * weight_decay. Without decay it is Adam.
        "adam": Adam whose decay is part of the gradient, g + weight_decay * p, as torch.optim.Adam
          has it.
        "sgd": m <- betas[0] * m + g + weight_decay * p, the direction is m (torch.optim.SGD);
          betas[1] and eps have no
        say.
      weight_decay: 0 for none.
      clip: the largest global norm a gradient may have before it enters the moments; None or
        math.inf: no limit.
      betas: decay of the first and of the second moment.
      eps: added to the root of the second moment.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    clip: float | None = None
    betas: tuple[float, float] = BETAS
    eps: float = EPS

    @classmethod
    def of(cls, config: Any) -> "Rule":
        """Read it off a `TrainConfig`."""
        return cls(
            config.optimizer,
            config.weight_decay or 0.0,
            config.clip,
            betas=config.betas,
            eps=config.eps,
        )

    def transformation(self) -> Any:
        """Make the optax.GradientTransformation that turns gradients into directions.

        The caller multiplies by -lr, so that the rate can be an argument of a compiled step.
        Raises: ValueError for an unknown name.
        """
        # Only training needs it, and it is a tenth of the time of `import ltsm_jax`.
        import optax

        if self.name not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.name!r}; known: {', '.join(OPTIMIZERS)}")
        parts = []
        if self.clip is not None and self.clip < math.inf:
            parts.append(optax.clip_by_global_norm(self.clip))

        decay = [optax.add_decayed_weights(self.weight_decay)] if self.weight_decay else []
        if self.name == "sgd":
            parts += [*decay, optax.trace(decay=self.betas[0], accumulator_dtype=jnp.float32)]
            return optax.chain(*parts)

        moments = optax.scale_by_adam(
            b1=self.betas[0], b2=self.betas[1], eps=self.eps, mu_dtype=jnp.float32
        )
        parts += [*decay, moments] if self.name == "adam" else [moments, *decay]
        return optax.chain(*parts)


def adam(weight_decay: float = 0.0, clip: float | None = None) -> Any:
    """Make the default `Rule` with this decay (decoupled) and this limit of a gradient's global
    norm.

    Moments 0.9 and 0.999 and eps 1e-8 outside the root, the defaults of the originals.

    Returns: an optax.GradientTransformation; the caller multiplies its directions by -lr.
    """
    return Rule(weight_decay=weight_decay, clip=clip).transformation()
