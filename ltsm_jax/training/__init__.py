"""Training: one loop, its optimisers, and runs on disk that survive being killed."""

from ltsm_jax.training.checkpoints import RunFolder, WriteError, read_checkpoint
from ltsm_jax.training.config import TrainConfig, keys
from ltsm_jax.training.loop import FitResult, NonFiniteError, fit
from ltsm_jax.training.optimizers import adam, schedule

__all__ = [
    "FitResult",
    "NonFiniteError",
    "RunFolder",
    "TrainConfig",
    "WriteError",
    "adam",
    "fit",
    "keys",
    "read_checkpoint",
    "schedule",
]
