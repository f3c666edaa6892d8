"""Estimates of time: operations of a traced function, and what a piece that was timed
stands for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.training import progress, timing
from ltsm_jax.training.timing import Piece, TimeEstimate


def test_operations_of_products_loops_and_branches():
    def work(x, w):
        x = jnp.einsum("bik,kj->bij", x, w)  # 2 * (5 * 4 * 6) * 3

        def again(carry, _):
            return carry @ jnp.ones((6, 6)), None  # 2 * (5 * 4 * 6) * 6, seven times

        x, _ = jax.lax.scan(again, x, length=7)
        return jax.lax.cond(x.sum() > 0, lambda y: y @ jnp.ones((6, 2)), lambda y: y[..., :2], x)

    shapes = jax.ShapeDtypeStruct((5, 4, 3), jnp.float32), jax.ShapeDtypeStruct((3, 6), jnp.float32)
    jaxpr = jax.jit(work).trace(*shapes).jaxpr
    assert timing.operations(jaxpr) == 2 * 120 * 3 + 7 * 2 * 120 * 6 + 2 * 40 * 6
    assert 8 < timing.equations(jaxpr) < 40

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID")

    shapes = (
        jax.ShapeDtypeStruct((2, 3, 10), jnp.float32),
        jax.ShapeDtypeStruct((4, 3, 5), jnp.float32),
    )
    assert timing.operations(jax.jit(convolution).trace(*shapes).jaxpr) == 2 * (2 * 4 * 6) * 3 * 5


def test_a_piece_is_compiled_once_and_run(monkeypatch):
    work = jax.jit(lambda x: x @ x)
    x = np.ones((8, 8), np.float32)
    found = timing.of(lambda: work(x), lambda: work.trace(x))
    assert (
        found.measured
        and found.seconds > 0
        and found.compile_seconds > 0
        and work._cache_size() == 1
    )

    # What would take long alone, or be compiled for nothing, is reckoned.
    monkeypatch.setattr(timing, "speed", lambda: 1000.0)
    slow = timing.of(lambda: pytest.fail("not run"), lambda: work.trace(x))
    assert not slow.measured and slow.seconds == 2 * 8**3 / (1000 * timing.EFFICIENCY)
    monkeypatch.setattr(timing, "speed", lambda: 1e12)
    monkeypatch.setattr(timing, "MOST_EQUATIONS", 0)
    assert not timing.of(
        lambda: pytest.fail("not run"), lambda: work.trace(x), work_follows=False
    ).measured


def test_what_is_said():
    assert (
        str(TimeEstimate.of(Piece(0.5, 3.0), 20) + TimeEstimate(1.0, 0.0))
        == "about 14 s, 3 s of it to compile"
    )
    assert (
        str(TimeEstimate(7000.0, 0.0, measured=False))
        == "about 1.9 h; reckoned from floating-point operations"
    )
    assert [timing.time_in_words(x) for x in (0.01, 45, 100, 4000, 40000)] == [
        "1 s",
        "45 s",
        "2 min",
        "67 min",
        "11 h",
    ]


def test_counted_work_says_what_is_left_when_it_takes_long(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Counter("forecast", "contexts") as told:
        for done in range(0, 100_001, 10_000):
            told(done, 100_000)
            now[0] += 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "forecast: 20,000 of 100,000 contexts, 24 s left"
    assert len(lines) == 4
    with progress.Counter("forecast", "contexts", show=False) as told:
        for done in (1, 2):
            now[0] += 10
            told(done, 3)
    assert not capsys.readouterr().err
