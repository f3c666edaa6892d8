import jax
import numpy as np
import pytest

from ltsm_jax.data import Series, prepare
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models.timer import Timer, TimerConfig


@pytest.fixture(scope="session")
def model():
    """One layer over 4 patches of 8, with dropout: what takes time here is the compiler."""
    return Timer(
        TimerConfig(8, 16, 8, equal_layers(1, 2, 8, 24), context_len=32, horizon=8, dropout=0.1)
    )


@pytest.fixture(scope="session")
def pre(model):
    """Weights to start from."""
    return model.init(jax.random.key(7))


@pytest.fixture(scope="session")
def series():
    """Three noisy seasons of 12 hours, 300 rows."""
    t, rng = np.arange(300), np.random.default_rng(0)
    values = np.stack(
        [
            np.sin(2 * np.pi * (t + 3 * c) / 12) * (c + 1) + 0.3 * rng.normal(size=300)
            for c in range(3)
        ]
    )
    stamps = np.datetime64("2024-01-01", "us") + t * np.timedelta64(1, "h")
    return Series("waves", values, ("a", "b", "c"), stamps, "h")


@pytest.fixture(scope="session")
def splits(series):
    return prepare(series, 32, 8)
