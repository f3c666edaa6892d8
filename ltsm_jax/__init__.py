"""Large time-series models in JAX: load, fine-tune, forecast, measure, write back."""

from ltsm_jax.loading import load
from ltsm_jax.methods.finetune import fit, forecast
from ltsm_jax.methods.pruning import prune
from ltsm_jax.methods.removal import remove
from ltsm_jax.models import Forecast, Model, preset
from ltsm_jax.models.folders import save
from ltsm_jax.trees import ema, interpolate, shrink_and_perturb, soup, wise_ft

__version__ = "0.1.0"

__all__ = [
    "Forecast",
    "Model",
    "ema",
    "fit",
    "forecast",
    "interpolate",
    "load",
    "preset",
    "prune",
    "remove",
    "save",
    "shrink_and_perturb",
    "soup",
    "wise_ft",
]
