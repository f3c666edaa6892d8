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

RTOL, ATOL, NLL_RTOL, GRAD_REL, STEEP_REL = 2e-4, 1e-5, 1e-3, 2e-3, 2e-2  # of meta.json


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("moirai")
    model, params = parity.load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


def close(got, want, what, rtol=RTOL, atol=ATOL):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], rtol=rtol, atol=atol, err_msg=what)


@pytest.fixture(scope="module")
def forward(recorded):
    """Case -> (tokens, mixture, taps, log density of the target): all packed and forecast cases, in one program."""
    _, model, params, io = recorded
    width = max(model.config.patch_sizes)
    found = [(case, packed.tokens_of(io, case), io[f"{case}/in/patch_size"]) for case in packed.cases(io, "packed__")]
    for case in packed.cases(io, "forecast__"):
        patch = int(io[f"{case}/in/patch_size"])
        tokens = packed.packed_forecast(io, case, patch, width)
        found.append((case, tokens, np.full(tokens.sample_id.shape, patch)))
    names, sets, patches = zip(*found, strict=True)
    tokens, sizes, places = packed.stacked(sets, patches)

    def run(params, tokens, sizes):
        y, taps = model.apply(params, tokens, sizes)
        return y, taps, y.log_prob(tokens.target), y.mean()

    out = jax.tree.map(np.asarray, jax.jit(run)(params, tokens, sizes))
    cut = lambda place: jax.tree.map(lambda a: a[place] if a.ndim > 2 else a, out)  # noqa: E731
    return {name: (own, *cut(place)) for name, own, place in zip(names, sets, places, strict=True)}


def test_golden_distributions(recorded, forward):
    _, _, _, io = recorded
    compared = 0
    for case, (_, y, taps, log_prob, mean) in forward.items():
        ours = packed.recorded_names(y) | {"loc": taps["loc"], "scale": taps["scale"], "mean": mean}
        for name, got in ours.items():
            if f"{case}/out/{name}" in io:
                close(got, io[f"{case}/out/{name}"], f"{case} {name}")
                compared += 1
        if f"{case}/out/nll" in io:
            close(-log_prob, io[f"{case}/out/nll"], f"{case} nll", NLL_RTOL)
        missed = {k for k in io if k.startswith(f"{case}/out/param/")} - {f"{case}/out/{name}" for name in ours}
        assert not missed
    assert compared


def theirs(name, layers, components):
    """A recorded step's name in ours."""
    for i in range(layers):
        name = name.replace(f"encoder.layers.{i}.self_attn.", f"layer_{i}/attn/").replace(
            f"encoder.layers.{i}.self_attn", f"layer_{i}/attn"
        )
        name = name.replace(f"encoder.layers.{i}.", f"layer_{i}/").replace(f"encoder.layers.{i}", f"layer_{i}")
    for i in range(components):
        name = name.replace(f"param_proj.proj.components.{i}.", f"head/component_{i}_")
    name = name.replace("param_proj.proj.weights_logits", "head/weights").replace("encoder.norm", "norm")
    return name.replace("_proj", "").replace("in", "embed") if name == "in_proj" else name.replace("_proj", "")


def test_golden_steps(recorded, forward):
    _, model, _, io = recorded
    compared = 0
    for case, (tokens, _, taps, _, _) in forward.items():
        b, n = tokens.sample_id.shape
        for key in (k for k in io if k.startswith(f"{case}/out/act/")):
            name = theirs(
                key.removeprefix(f"{case}/out/act/"), len(model.config.ffn_dims), len(model.config.components)
            )
            got, want = np.asarray(taps[name]), io[key]
            if want.ndim == 5:  # q and k after their norms: the original has heads in groups
                want = want.reshape(b, -1, *want.shape[3:])
            elif got.ndim == 4:
                got = got.reshape(b, n, -1)
            close(got[:b, :, :n] if want.ndim == 4 else got, want, key)
            compared += 1
    assert compared


@pytest.fixture(scope="module")
def losses(recorded):
    """(params, tokens, patch) -> loss and gradients; cases of one shape share a program."""
    return jax.jit(jax.value_and_grad(recorded[1].packed_loss))


def test_golden_losses(recorded, losses):
    _, _, params, io = recorded
    names = [case for case in packed.cases(io, "packed__") if f"{case}/out/loss" in io]
    assert names
    for case in names:
        got, _ = losses(params, packed.tokens_of(io, case), jnp.asarray(io[f"{case}/in/patch_size"]))
        close(got, io[f"{case}/out/loss"], case, NLL_RTOL)


@pytest.mark.parametrize(
    "prefix, case, rel", [("", "normal", GRAD_REL), ("near_normalfixed/", "near_normalfixed", STEEP_REL)]
)
def test_golden_gradients(recorded, losses, prefix, case, rel):
    vectors, model, params, io = recorded
    stored = vectors.arrays("grads.npz")
    if not any(key.startswith(f"{prefix}grad/") for key in stored):
        pytest.skip(f"no gradients under {prefix}grad/")
    case = f"packed__{case}"
    value, grads = losses(params, packed.tokens_of(io, case), jnp.asarray(io[f"{case}/in/patch_size"]))
    close(value, stored[f"{prefix}loss"], f"{case} loss", NLL_RTOL)
    left_out = packed.check_gradients(model, grads, stored, f"{prefix}grad/", rel)
    assert not (left_out and not prefix), "of every parameter"


def check_samples(got_nBCH, want_BnHC, what):
    want = want_BnHC[..., None] if want_BnHC.ndim == 3 else want_BnHC
    close(np.transpose(got_nBCH, (1, 0, 3, 2)), want, what)


def test_golden_samples(recorded, forward):
    io = recorded[-1]
    names = packed.cases(io, "forecast__")
    assert names
    for case in names:
        (x, _), horizon, _ = packed.forecast_of(io, case)
        patch, c, t = int(io[f"{case}/in/patch_size"]), x.shape[1], x.shape[-1]
        at_future = functools.partial(packed.at_future, n_variates=c, time_steps=t, horizon=horizon, patch=patch)
        y = jax.tree.map(at_future, forward[case][1])
        samples = y.chosen(*packed.drawn(io, case, 0, c, horizon, patch))
        check_samples(samples, io[f"{case}/out/forecast_samples"], case)


def test_golden_choice_of_the_patch_size(recorded):
    _, model, params, io = recorded
    names = packed.cases(io, "auto__")
    assert names
    for case in names:
        past, horizon, more = packed.forecast_of(io, case)
        context, c, sizes = int(io[f"{case}/in/context_length"]), past[0].shape[1], model.config.patch_sizes
        run = jax.jit(lambda p, past, pad, h=horizon, n=context: model.best_future(p, past, h, n, pad))
        y, losses = run(params, past, more["is_pad"])
        close(losses, io[f"{case}/out/val_loss"], case, NLL_RTOL)
        best = io[f"{case}/out/chosen_patch_index"]
        np.testing.assert_array_equal(np.argmin(losses, 0), best)
        tapes = [packed.drawn(io, case, call, c, horizon, patch) for call, patch in enumerate(sizes)]
        values, index = (np.stack([tapes[z][i][:, b] for b, z in enumerate(best)], 1) for i in (0, 1))
        check_samples(y.chosen(values, index), io[f"{case}/out/forecast_samples"], case)


def test_golden_round_trip(recorded, tmp_path):
    vectors, *_ = recorded
    parity.check_round_trip(vectors.checkpoint, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == vectors.config


def test_golden_initialisation(recorded):
    """Tensors with zeros in them have not the spread of their bound: the recorded one stands for it."""
    vectors, *_ = recorded
    stats = vectors.init_stats
    distribution = {"distr_output": vectors.config["distr_output"]}
    config = MoiraiConfig.from_published(stats["config"] | distribution)
    parity.check_initialisation(Moirai(config), stats["parameters"])
