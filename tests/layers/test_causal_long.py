"""Attention of a long sequence, one head of one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.layers import causal
from ltsm_jax.models.time_moe import TimeMoe


@pytest.fixture
def short(monkeypatch):
    """Call long what is short, in blocks of queries of which the last is partial."""
    monkeypatch.setattr(causal, "LONG", 8)
    monkeypatch.setattr(causal, "QUERIES", 5)


@pytest.mark.parametrize("rows", [1, 3])
def test_it_equals_the_weights_of_the_mask_times_the_values(short, rows):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(3, 2, n, 4)).astype(np.float32) for n in (12, 14, 14)
    )  # room for two more keys
    seen = np.ones((rows, 14), bool)
    seen[-1, 0] = False
    found = causal.attend_by_head(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(seen), 0.5
    )

    mask = (np.arange(14)[None] <= np.arange(12)[:, None])[None, None] & seen[:, None, None]
    scores = np.where(mask, 0.5 * q @ np.swapaxes(k, 2, 3), -np.inf)
    scores[..., 0, 0] = np.where(
        np.isinf(scores[..., 0, 0]), 0.0, scores[..., 0, 0]
    )  # sees nothing: left out below
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(found[:, :, 1:], expected[:, :, 1:], rtol=1e-5, atol=1e-6)


def test_time_moe_forecasts_the_same(short, monkeypatch):
    model = TimeMoe(TimeMoe.small())
    params = model.init(jax.random.key(0))
    context = np.random.default_rng(0).normal(size=(2, 1, 20)).astype(np.float32)
    context[1, 0, :3] = np.nan  # padding on the left
    horizon = 2 * model.horizon + 1  # three steps with a cache
    called = []
    whole = causal.attend_by_head
    monkeypatch.setattr(
        causal, "attend_by_head", lambda *args, **named: called.append(1) or whole(*args, **named)
    )
    found = jax.jit(lambda p, x: model.predict(p, x, horizon).point)(params, context)
    assert len(called) == len(
        model.config.layers
    )  # the first pass alone; later ones have one query block
    monkeypatch.setattr(causal, "LONG", 1024)
    expected = jax.jit(lambda p, x: model.predict(p, x, horizon).point)(params, context)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
