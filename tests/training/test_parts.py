"""Parts of a batch that a CPU takes one after the other, chosen from shapes."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import small_problem as problem

from ltsm_jax.data import prepare
from ltsm_jax.data.series import Series
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models.time_moe import TimeMoe
from ltsm_jax.models.timer import Timer
from ltsm_jax.sharding import Placement
from ltsm_jax.training import TrainConfig, memory, parts, step

AUTO = dataclasses.replace(problem.CONFIG, accumulate="auto", epochs=1)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts so small that the small problem is taken in several."""
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    monkeypatch.setattr(parts, "TIMES_PARAMETERS", 0)


def test_the_number_brings_a_part_to_the_size_aimed_at():
    mb = 2**20
    assert parts.number_of(2048, 64 * mb, 8 * mb) == 1
    assert parts.number_of(2048, 1900 * mb, 8 * mb) == 32
    assert (
        parts.number_of(256, 3200 * mb, 270 * mb) == 4
    )  # adding gradients of a large model costs more
    assert parts.number_of(64, 800 * mb, 270 * mb) == 1
    assert parts.number_of(96, 1900 * mb, 8 * mb) == 32  # of 24, 32 and 48
    assert parts.number_of(2003, 1900 * mb, 8 * mb) == 1  # a prime: one row a part is no choice


def settled(config, source=None) -> Any:
    params = problem.init()
    source = problem.train_windows() if source is None else source
    loss, key = step.as_pytree(problem.dry_loss), jax.random.key(0)
    frozen = jax.tree.map(lambda _: None, params)
    return parts.settled(config, params, frozen, source, loss, key, placement=Placement())


def test_a_number_that_was_said_stays(small_parts):
    said = dataclasses.replace(AUTO, accumulate=3)
    assert settled(said) is said


def test_missing_values_are_not_taken_apart(small_parts):
    assert settled(AUTO).accumulate > 1
    values = problem.series()
    values[0, 50] = np.nan
    assert settled(AUTO, problem.train_windows(values)).accumulate == 1


def test_accelerators_take_the_whole_batch(small_parts, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert settled(AUTO).accumulate == 1


@pytest.fixture
def little_memory(monkeypatch):
    """`little_memory(n)`: an accelerator that has room for n of the 48 windows of a batch, and the
    state.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def room_for(rows):
        params, loss, key = problem.init(), step.as_pytree(problem.dry_loss), jax.random.key(0)
        frozen = jax.tree.map(lambda _: None, params)
        config = dataclasses.replace(AUTO, accumulate=1)
        takes = memory.estimate_before(
            config, params, frozen, problem.train_windows(), loss, key, Placement(), writes=False
        )
        left = -(-takes.activations * rows // 48)
        monkeypatch.setattr(memory, "available", lambda: takes.fixed + left)

    return room_for


@pytest.mark.parametrize("room, wanted", [(48, 1), (47, 2), (24, 2), (23, 3), (1, 48)])
def test_a_batch_that_does_not_fit_is_taken_in_the_fewest_parts_that_do(
    little_memory, room, wanted
):
    little_memory(room)
    assert settled(AUTO).accumulate == wanted
    # What was said stays, and is refused later.
    assert settled(dataclasses.replace(AUTO, accumulate=1)).accumulate == 1


def test_what_cannot_be_taken_apart_is_computed_again(little_memory):
    little_memory(44)
    values = problem.series()
    values[0, 50] = np.nan
    either = dataclasses.replace(AUTO, remat="auto")
    assert settled(either).remat == "none" and settled(either).accumulate == 2
    found = settled(either, problem.train_windows(values))
    assert (found.accumulate, found.remat) == (1, "all but products")
    little_memory(48)
    found = settled(either, problem.train_windows(values))
    assert (found.accumulate, found.remat) == (1, "none")


def test_where_nothing_fits_the_run_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 100)
    with pytest.raises(ValueError, match="only 0.00 MB is available: train fewer parameters"):
        problem.fit(config=dataclasses.replace(AUTO, remat="auto"))


def test_a_run_records_its_parts_and_goes_on_with_them(small_parts, monkeypatch, tmp_path):
    whole = problem.fit(loss_fn=problem.dry_loss, config=dataclasses.replace(AUTO, accumulate=1))
    found = problem.fit(loss_fn=problem.dry_loss, config=AUTO, folder=tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["train"]["accumulate"]
    assert recorded == settled(AUTO).accumulate > 1
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)

    # A version that would choose otherwise goes on with what the folder has.
    monkeypatch.setattr(parts, "PART_BYTES", 2**26)
    assert settled(AUTO).accumulate == 1
    again = problem.fit(loss_fn=problem.dry_loss, config=AUTO, folder=tmp_path)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_no_mean_over_rows_takes_the_whole_batch():
    series = Series(
        "noise", np.random.default_rng(0).normal(size=(1, 400)), ("y",), None, "h", None
    )
    for model, wanted in ((Timer(Timer.small()), "auto"), (TimeMoe(TimeMoe.small()), 1)):
        params = model.init(jax.random.key(0))
        data = prepare(series, model.context_len, model.horizon)
        running = Running(
            model, params, strategy("ff"), data, config=TrainConfig(accumulate="auto")
        )
        assert running.config.accumulate == wanted


def test_a_step_cannot_be_traced_with_open_parts():
    with pytest.raises(ValueError, match="say a number of parts"):
        step.trace_step(
            problem.dry_loss, jax.eval_shape(problem.init), problem.train_windows(), config=AUTO
        )
    open_remat = dataclasses.replace(AUTO, accumulate=1, remat="auto")
    with pytest.raises(ValueError, match="say one of none"):
        step.How.of(open_remat)
