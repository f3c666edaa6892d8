"""Moirai-MoE against vectors recorded from uni2ts (`--golden DIR` names another set)."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import packed_parity as packed
import parity
import pytest

from ltsm_jax.layers.packed import group_mean
from ltsm_jax.models.moirai_moe import MoiraiMoe, MoiraiMoeConfig


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("moirai_moe")
    model, params = parity.load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


@pytest.fixture(scope="module")
def ran(recorded):
    """All packed and forecast cases through the model."""
    _, model, params, io = recorded
    return packed.forward(model, params, io)


@pytest.mark.slow
def test_golden_distributions(recorded, ran):
    packed.check_distributions(recorded[-1], ran)


def test_golden_steps(recorded, ran):
    names = [(r"^in_proj$", "embed"), (r"^res_proj$", "residual"), (r"^feat_proj$", "feature")]
    packed.check_steps(recorded[-1], ran, names)


def test_golden_router(recorded, ran):
    """Distances, the two farthest experts and their weights, in every layer."""
    io, compared = recorded[-1], 0
    for case, one in ran.items():
        for key in (k for k in io if k.startswith(f"{case}/out/router/")):
            _, _, _, layer, name = key.split("/")
            got = one.taps[f"layer_{layer}/ffn/{name}"]
            if name == "experts":
                np.testing.assert_array_equal(got, io[key], err_msg=key)
            else:
                packed.close(got, io[key], key)
            compared += 1
    assert compared


def test_golden_losses(recorded, ran):
    """Of the token itself, as recorded for the packed cases, and of the token after it."""
    io, compared = recorded[-1], 0
    for case, one in ran.items():
        if f"{case}/out/nll" in io:
            got = packed_mean(-one.log_prob, one.tokens)
            packed.close(got, io[f"{case}/out/loss"], case, packed.NLL_RTOL)
            compared += 1
        if f"{case}/out/nll_next_token" in io:
            before = jax.tree.map(lambda leaf: leaf[:, :-1], one.mixture)
            nll = -before.log_prob(one.tokens.target[:, 1:])
            want = io[f"{case}/out/nll_next_token"]
            # beside the steep component float32 noise of the original is 2.4e-4 of the largest
            # (meta.json), also at 0
            atol = packed.NLL_RTOL * np.abs(want).max() if "near" in case else packed.ATOL
            packed.close(nll, want, case, packed.NLL_RTOL, atol)
            compared += 1
    assert compared


packed_mean = jax.jit(group_mean)


@pytest.fixture(scope="module")
def losses(recorded):
    """(params, tokens, patch) -> loss and gradients; cases of one shape share a program."""
    return jax.jit(jax.value_and_grad(recorded[1].packed_loss))


@pytest.mark.parametrize(
    "prefix, case, rel",
    [
        ("", "next_token", packed.GRAD_REL),
        ("near_normalfixed/", "near_normalfixed", packed.STEEP_REL),
    ],
)
def test_golden_gradients(recorded, losses, prefix, case, rel):
    vectors, model, params, io = recorded
    stored = vectors.arrays("grads.npz")
    if not any(key.startswith(f"{prefix}grad/") for key in stored):
        pytest.skip(f"no gradients under {prefix}grad/")
    case = f"train__{case}"
    value, grads = losses(
        params, packed.tokens_of(io, case), jnp.asarray(io[f"{case}/in/patch_size"])
    )
    packed.close(value, stored[f"{prefix}loss"], f"{case} loss", packed.NLL_RTOL)
    packed.close(value, io[f"{case}/out/loss"], f"{case} loss", packed.NLL_RTOL)
    left_out = packed.check_gradients(model, grads, stored, f"{prefix}grad/", rel)
    assert prefix or left_out == {"encoder.centroid"}, (
        "of every parameter, and the centroids are none"
    )
    assert not np.asarray(grads["centroid"]).any()


def sizes_of(io, case):
    """Variates, past steps, horizon, patches of the future."""
    (x, _), horizon, _ = packed.forecast_of(io, case)
    return x.shape[1], x.shape[2], horizon, -(-horizon // int(io[f"{case}/in/patch_size"]))


def at_patch(model, io, case):
    """The model at the patch size of a case."""
    return MoiraiMoe(dataclasses.replace(model.config, patch_size=int(io[f"{case}/in/patch_size"])))


def draws(io, case, call):
    """Recorded draws of a call at all tokens: values [R, N, P, M] and components [R, N, P] of the
    copies, and of the first call [n, B, N, P, M], [n, B, N, P].
    """
    z, index = (io[f"{case}/in/tape/{call}/{name}"] for name in ("components", "index"))
    return (
        (z, index)
        if call == 0
        else (z[0].reshape(-1, *z.shape[3:]), index[0].reshape(-1, *index.shape[3:]))
    )


@pytest.mark.slow
def test_golden_rollout(recorded, ran):
    """Step by step with the recorded draws: the parameters at every step, and the samples."""
    _, model, params, io = recorded
    names = packed.cases(io, "forecast__")
    assert names
    tokens, paths, now = {}, {}, {case: ran[case].mixture for case in names}
    for step in range(max(sizes_of(io, case)[3] for case in names)):
        if step:
            left = [case for case in names if sizes_of(io, case)[3] > step]
            patches = [
                np.full(tokens[case].sample_id.shape, int(io[f"{case}/in/patch_size"]))
                for case in left
            ]
            found = packed.run(model, params, [tokens[case] for case in left], patches)
            now = {case: one.mixture for case, one in zip(left, found, strict=True)}
        for case, y in now.items():
            c, t, horizon, steps = sizes_of(io, case)
            last, first, _ = at_patch(model, io, case)._places(c, t, horizon)
            check_parameters(io, case, step, y)
            z, index = draws(io, case, step)
            at = last if step == 0 else first + step - 1
            if step == 0:
                cut = jax.tree.map(lambda leaf, at=at: leaf[:, at], y)
                values = np.asarray(cut.chosen(z[:, :, at], index[:, :, at]))
                n = values.shape[0]
                copies = jax.tree.map(
                    lambda leaf, n=n: np.tile(leaf, (n, *(1,) * (leaf.ndim - 1))), ran[case].tokens
                )
                tokens[case], paths[case] = copies, [values]
            else:
                cut = jax.tree.map(lambda leaf, at=at: leaf[:, at], y)
                values = np.asarray(cut.chosen(z[None][:, :, at], index[None][:, :, at]))[0]
                paths[case].append(values.reshape(paths[case][0].shape))
            if steps > step + 1:
                rows = values.reshape(-1, *values.shape[-2:])
                tokens[case] = at_patch(model, io, case).fill(
                    jax.tree.map(jnp.asarray, tokens[case]), jnp.asarray(first + step), rows
                )
    for case in names:
        c, _, horizon, _ = sizes_of(io, case)
        patch = int(io[f"{case}/in/patch_size"])
        samples = np.stack([path[..., :patch] for path in paths[case]], 3)
        samples = samples.reshape(*samples.shape[:3], -1)[..., :horizon]
        packed.check_samples(samples, io[f"{case}/out/forecast_samples"], case)


def check_parameters(io, case, step, y):
    kinds = dict(zip(y.kinds, y.parts, strict=True))
    for key in (k for k in io if k.startswith(f"{case}/out/step/{step}/")):
        name, want = key.rsplit("/", 1)[1], io[key]
        if name == "weights_logits_normalized":
            got = y.log_weights
        else:
            kind, parameter = name.split("_", 1)
            got = kinds[packed.KINDS[kind]][parameter]
        packed.close(np.asarray(got).reshape(want.shape), want, key)


def test_golden_rollout_in_one_program(recorded, ran):
    """What `predict` runs, with the recorded draws in the place of its own, in the case of most
    variates.
    """
    _, model, params, io = recorded
    case = max(
        packed.cases(io, "forecast__"),
        key=lambda name: (sizes_of(io, name)[3] > 1, sizes_of(io, name)[0]),
    )
    c, t, horizon, steps = sizes_of(io, case)
    model = at_patch(model, io, case)
    last, first, _ = model._places(c, t, horizon)
    start, *later = [draws(io, case, step) for step in range(steps)]
    later = [(z[:, first + i], index[:, first + i]) for i, (z, index) in enumerate(later)]
    z_SRCPM, index_SRCP = (
        (jnp.stack(leaves) for leaves in zip(*later, strict=True)) if later else (None, None)
    )

    def draw(step, y):
        if isinstance(step, int):
            return y.chosen(jnp.asarray(start[0][:, :, last]), jnp.asarray(start[1][:, :, last]))
        return y.chosen(z_SRCPM[step - 1][None], index_SRCP[step - 1][None])[0]

    rollout = functools.partial(model.rollout, last=last, first=first, steps=steps, draw=draw)
    samples = jax.jit(rollout)(params, ran[case].tokens)[..., :horizon]
    packed.check_samples(samples, io[f"{case}/out/forecast_samples"], case)


def test_golden_round_trip(recorded, tmp_path):
    vectors, *_ = recorded
    parity.check_round_trip(vectors.checkpoint, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == vectors.config


def test_golden_initialisation(recorded):
    """Without the centroids, which the original leaves as the memory was."""
    vectors, *_ = recorded
    stats = vectors.init_stats
    config = MoiraiMoeConfig.from_published(
        stats["config"] | {"distr_output": vectors.config["distr_output"]}
    )
    learned = {
        key: entry for key, entry in stats["parameters"].items() if entry["kind"] == "parameter"
    }
    parity.check_initialisation(
        MoiraiMoe(dataclasses.replace(config, patch_size=config.patch_sizes[0])), learned
    )
