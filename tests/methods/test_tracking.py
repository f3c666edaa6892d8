"""Curvature in the history of a fine-tuning."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import curvature, hosts, training
from ltsm_jax.methods import tracking
from ltsm_jax.methods.run import run
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks import forecasting

CONFIG = training.TrainConfig(epochs=2, batch_size=128, lr=1e-3, schedule="constant")
NUMBERS = {"top_eigenvalue", "trace", "sharpness"}


@pytest.fixture(scope="module")
def tune(model, pre, splits):
    """A quiet full fine-tuning of two epochs."""

    def tune(method="ff", **more):
        return run(
            model,
            pre,
            strategy(method),
            splits,
            config=CONFIG,
            show_progress=False,
            test=False,
            **more,
        )

    return tune


@pytest.fixture(scope="module")
def found(tune):
    """Measured at the start and after the second epoch."""
    return tune(curvature_at=(0, 2))


def test_what_is_measured_is_the_curvature_of_the_loss_on_windows_spread_evenly(
    model, pre, splits, found
):
    windows = forecasting.training_windows(model, splits, "ims")
    batch = windows.gather(jnp.asarray(np.linspace(0, windows.n - 1, 64), jnp.int32))

    def loss(params):
        return model.loss(params, batch)

    (top,) = curvature.top_eigenvalues(loss, pre, steps=20, tolerance=1e-3)
    np.testing.assert_allclose(found.start_curvature["top_eigenvalue"], top, rtol=1e-3)
    np.testing.assert_allclose(
        found.start_curvature["sharpness"], curvature.sharpness(loss, pre, 0.05), rtol=1e-3
    )


def test_it_stands_in_the_row_of_its_epoch_and_changes_nothing_else(tune, found):
    first, second = found.history
    assert not NUMBERS & set(first) and set(second) > NUMBERS
    assert all(np.isfinite(second[name]) for name in NUMBERS)
    assert second["top_eigenvalue"] != found.start_curvature["top_eigenvalue"]
    plain = tune()
    assert plain.start_curvature is None
    rows = [
        {name: value for name, value in row.items() if name not in NUMBERS} for row in found.history
    ]
    assert rows == plain.history and found.val == plain.val


def test_a_checkpoint_alone_is_measured_too(tune, found):
    assert tune("zero_shot", curvature_at=(0,)).start_curvature == found.start_curvature


@pytest.mark.slow
def test_a_run_that_was_stopped_has_the_numbers_of_an_undisturbed_one(
    tune, tmp_path, monkeypatch, found
):
    measure, calls = tracking.Tracker.measure, []

    def stopped_once(self, params):
        calls.append(params)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
            hosts.pause()
        return measure(self, params)

    monkeypatch.setattr(tracking.Tracker, "measure", stopped_once)
    with pytest.raises(KeyboardInterrupt):
        tune(curvature_at=(0, 2), folder=tmp_path)
    again = tune(curvature_at=(0, 2), folder=tmp_path)
    assert again.history == found.history and again.start_curvature == found.start_curvature


def test_of_a_quadratic_it_is_exact():
    class Rows:
        n = 3

        def over(self, mesh):
            return self

        def gather(self, numbers):
            return {"x": jnp.asarray([1.0, 2.0, 3.0])[numbers]}

    jax.tree_util.register_pytree_node(Rows, lambda rows: ((), None), lambda _, children: Rows())

    def loss(params, batch, key, train):
        assert key is None and not train
        return (
            (batch["weight"] * batch["x"]).sum()
            / 4
            * (params["w"] ** 2 * jnp.array([1.0, 2.0])).sum()
        )

    tracker = tracking.tracker(loss, Rows(), Placement(), sample=64)
    # 6 / 4 * (w0^2 + 2 w1^2): eigenvalues 3 and 6; at (1, 0) the gradient is (3, 0)
    numbers = tracker.measure({"w": jnp.array([1.0, 0.0])})
    np.testing.assert_allclose([numbers["top_eigenvalue"], numbers["trace"]], [6.0, 9.0], rtol=1e-5)
    np.testing.assert_allclose(numbers["sharpness"], 1.5 * (1.05**2 - 1), rtol=1e-5)
    assert tracker.windows == 3


def test_epochs_before_the_start_are_refused(tune):
    with pytest.raises(ValueError, match="0 for the start; got -1"):
        tune(curvature_at=(-1,))
