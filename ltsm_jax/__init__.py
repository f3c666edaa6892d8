"""Large time-series models in JAX: load, fine-tune, forecast, measure, write back."""

from ltsm_jax import curvature, landscape
from ltsm_jax.api import (
    PruneConfig,
    Strategy,
    TrainConfig,
    fit,
    forecast,
    load,
    prune,
    remove,
    save,
)
from ltsm_jax.detection import Detected, detect
from ltsm_jax.forecaster import Forecaster
from ltsm_jax.imputation import Imputed, impute
from ltsm_jax.models import Forecast, Model, preset
from ltsm_jax.trees import ema, interpolate, shrink_and_perturb, soup, wise_ft

__version__ = "0.1.0"

__all__ = [
    "Detected",
    "Forecast",
    "Forecaster",
    "Imputed",
    "Model",
    "PruneConfig",
    "Strategy",
    "TrainConfig",
    "curvature",
    "detect",
    "ema",
    "fit",
    "forecast",
    "impute",
    "interpolate",
    "landscape",
    "load",
    "preset",
    "prune",
    "remove",
    "save",
    "shrink_and_perturb",
    "soup",
    "wise_ft",
]
