import importlib.util

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models.timer import Timer, TimerConfig


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than the rest of a comparison whose programs are compiled."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """A model folder: one layer over 4 patches of 8."""
    model = Timer(TimerConfig(8, 8, 8, equal_layers(1, 1, 8, 8), context_len=32, horizon=8))
    return ltsm_jax.save(
        tmp_path_factory.mktemp("models") / "micro", model, model.init(jax.random.key(7))
    )


@pytest.fixture(scope="session")
def waves(tmp_path_factory):
    """A CSV of 300 hours of three noisy waves."""
    t, rng = np.arange(300), np.random.default_rng(0)
    values = {
        c: np.sin(2 * np.pi * (t + 3 * i) / 12) * (i + 1) + 0.3 * rng.normal(size=300)
        for i, c in enumerate("abc")
    }
    file = tmp_path_factory.mktemp("data") / "waves.csv"
    pd.DataFrame({"date": pd.date_range("2024-01-01", periods=300, freq="h"), **values}).to_csv(
        file, index=False
    )
    return file
