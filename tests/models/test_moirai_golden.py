"""Moirai 1 against vectors recorded from uni2ts (`--golden DIR` names another set)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import packed_parity as packed
import parity
import pytest

from ltsm_jax.models.moirai import Moirai, MoiraiConfig


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("moirai")
    model, params = parity.load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


@pytest.fixture(scope="module")
def ran(recorded):
    """All packed and forecast cases through the model."""
    _, model, params, io = recorded
    return packed.forward(model, params, io)


def test_golden_distributions(recorded, ran):
    packed.check_distributions(recorded[-1], ran)


def test_golden_steps(recorded, ran):
    packed.check_steps(recorded[-1], ran, [(r"^in_proj$", "embed")])


@pytest.fixture(scope="module")
def losses(recorded):
    """(params, tokens, patch) -> loss and gradients; cases of one shape share a program."""
    return jax.jit(jax.value_and_grad(recorded[1].packed_loss))


def test_golden_losses(recorded, losses):
    _, _, params, io = recorded
    names = [case for case in packed.cases(io, "packed__") if f"{case}/out/loss" in io]
    assert names
    for case in names:
        got, _ = losses(
            params, packed.tokens_of(io, case), jnp.asarray(io[f"{case}/in/patch_size"])
        )
        packed.close(got, io[f"{case}/out/loss"], case, packed.NLL_RTOL)


@pytest.mark.parametrize(
    "prefix, case, rel",
    [("", "normal", packed.GRAD_REL), ("near_normalfixed/", "near_normalfixed", packed.STEEP_REL)],
)
def test_golden_gradients(recorded, losses, prefix, case, rel):
    vectors, model, params, io = recorded
    stored = vectors.arrays("grads.npz")
    if not any(key.startswith(f"{prefix}grad/") for key in stored):
        pytest.skip(f"no gradients under {prefix}grad/")
    case = f"packed__{case}"
    value, grads = losses(
        params, packed.tokens_of(io, case), jnp.asarray(io[f"{case}/in/patch_size"])
    )
    packed.close(value, stored[f"{prefix}loss"], f"{case} loss", packed.NLL_RTOL)
    left_out = packed.check_gradients(model, grads, stored, f"{prefix}grad/", rel)
    assert not (left_out and not prefix), "of every parameter"


def test_golden_samples(recorded, ran):
    io = recorded[-1]
    names = packed.cases(io, "forecast__")
    assert names
    for case in names:
        (x, _), horizon, _ = packed.forecast_of(io, case)
        patch, c, t = int(io[f"{case}/in/patch_size"]), x.shape[1], x.shape[-1]
        at_future = functools.partial(
            packed.at_future, n_variates=c, time_steps=t, horizon=horizon, patch=patch
        )
        y = jax.tree.map(at_future, ran[case].mixture)
        samples = y.chosen(*packed.drawn(io, case, 0, c, horizon, patch))
        packed.check_samples(samples, io[f"{case}/out/forecast_samples"], case)


@pytest.mark.slow
def test_golden_choice_of_the_patch_size(recorded):
    _, model, params, io = recorded
    names = packed.cases(io, "auto__")
    assert names
    for case in names:
        past, horizon, more = packed.forecast_of(io, case)
        context, c, sizes = (
            int(io[f"{case}/in/context_length"]),
            past[0].shape[1],
            model.config.patch_sizes,
        )
        run = jax.jit(
            lambda p, past, begun, h=horizon, n=context: model.best_future(p, past, h, n, begun)
        )
        y, losses = run(params, past, more["begun_BT"])
        packed.close(losses, io[f"{case}/out/val_loss"], case, packed.NLL_RTOL)
        best = io[f"{case}/out/chosen_patch_index"]
        np.testing.assert_array_equal(np.argmin(losses, 0), best)
        tapes = [
            packed.drawn(io, case, call, c, horizon, patch) for call, patch in enumerate(sizes)
        ]
        values, index = (
            np.stack([tapes[z][i][:, b] for b, z in enumerate(best)], 1) for i in (0, 1)
        )
        packed.check_samples(y.chosen(values, index), io[f"{case}/out/forecast_samples"], case)


def test_golden_round_trip(recorded, tmp_path):
    vectors, *_ = recorded
    parity.check_round_trip(vectors.checkpoint, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == vectors.config


def test_golden_initialisation(recorded):
    """Tensors with zeros in them have not the spread of their bound: the recorded one stands for
    it.
    """
    vectors, *_ = recorded
    stats = vectors.init_stats
    distribution = {"distr_output": vectors.config["distr_output"]}
    config = MoiraiConfig.from_published(stats["config"] | distribution)
    parity.check_initialisation(Moirai(config), stats["parameters"])
