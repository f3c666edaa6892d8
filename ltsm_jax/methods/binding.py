"""Bind data to a model: series, splits and training windows that fit it, and its own training recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ltsm_jax import sharding, storage, training
from ltsm_jax.data import Series, Splits, prepare
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.data.tables import read_series
from ltsm_jax.models import Model
from ltsm_jax.tasks.forecasting import Mode

Params = Any


def ready_for(model: Model, params: Params, series: Series, seed: int = 0) -> tuple[Model, Params]:
    """`Model.for_series` with the facts of `series`; what a checkpoint lacks is drawn from the seed's `init` key."""
    model, params = model.for_series(
        params, n_variates=series.n_variates, freq=series.freq, name=series.name, key=training.keys(seed)["init"]
    )
    return model, sharding.together(params)


def as_series(data: str | Path | pd.DataFrame | Series, **read: Any) -> Series:
    """A `Series` from whatever names one; `read` goes to `data.read_series`."""
    if isinstance(data, Series):
        return data
    return read_series(data, **read) if isinstance(data, pd.DataFrame) else load_series(data, **read)


def as_splits(
    model: Model,
    params: Params,
    data: str | Path | pd.DataFrame | Series | Splits,
    *,
    horizon: int | None = None,
    context_len: int | None = None,
    target: str | Sequence[str] | None = None,
    few_shot: float = 1.0,
    seed: int = 0,
) -> tuple[Model, Params, Splits]:
    """(model, params, splits): the windows of `data`, and the model made ready for them; arguments as in `fit`. Splits
    come back as they are, and the model with them."""
    if isinstance(data, Splits):
        return model, params, data
    series = as_series(data, target=target)
    model, params = ready_for(model, params, series, seed)
    lengths = context_len or model.recipe().context_len, horizon or model.recipe().horizon
    return model, params, prepare(series, *lengths, few_shot=few_shot, joint=model.variates == "joint")


def default_mode(model: Model) -> Mode:
    """The mode of the model's recipe."""
    return "ims" if model.recipe().loss == "own" else "direct"


def train_config(model: Model, **changes: Any) -> training.TrainConfig:
    """The model's own fine-tuning recipe as a `TrainConfig`, with `changes`."""
    return training.TrainConfig(**changes).filled(model.recipe())


def model_facts(model: Model, params: Params) -> dict[str, Any]:
    """What a run folder records of a model, so that another one is refused: family, config, digest of the weights.

    On several hosts all call.
    """
    return {
        "model": {"family": model.family, "config": model.config_to_dict()},
        "params_sha256": storage.sha256_of(params),
    }
