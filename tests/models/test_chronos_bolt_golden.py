"""Chronos-Bolt against vectors recorded from the original PyTorch code (`--golden DIR` names
another set).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import chronos_bolt as converter

RTOL, ATOL = 1e-4, 1e-4  # of meta.json; ATOL is relative to the scale of the series


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("chronos_bolt")
    model, params = parity.load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


def row(x_BT):
    """[batch, time] as one variate."""
    return jnp.asarray(x_BT)[:, None]


def check(got, want, x, what=""):
    """Equal within the recorded tolerance, each series by its own scale. got: [B, 1, H, Q], want:
    [B, Q, H].
    """
    got, want = np.swapaxes(np.asarray(got)[:, 0], 1, 2), np.asarray(want)
    assert got.shape == want.shape, what
    scale = [
        np.std(series[~np.isnan(series)]) if np.isfinite(series).any() else 1.0 for series in x
    ]
    excess = (
        np.abs(got - want) - RTOL * np.abs(want) - ATOL * np.maximum(scale, 1e-5).reshape(-1, 1, 1)
    )
    parity.note(np.abs(got - want), np.abs(got - want) - excess)
    assert (excess <= 0).all(), f"{what}: off by {np.abs(got - want).max()} at most"


# compiled: one program is faster than some hundred operations one by one
apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)
encode = jax.jit(lambda model, *args: model.embed(*args), static_argnums=0)
predict = jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3))
loss = jax.jit(lambda model, *args: model.loss(*args), static_argnums=0)


def cases(io, suffix):
    """Names of the recorded cases that have a given array."""
    found = [key.removesuffix(suffix) for key in io if key.endswith(suffix)]
    assert found, f"nothing recorded under {suffix}"
    return found


def by_length(io, names):
    """Cases with contexts of one length as one batch: {length: [(case, context [B, T], slice of the
    batch)]}.
    """
    groups = {}
    for case in names:
        x = context_of(io, case)
        group = groups.setdefault(x.shape[-1], [])
        start = group[-1][2].stop if group else 0
        group.append((case, x, slice(start, start + len(x))))
    return groups


def context_of(io, case):
    if f"{case}/in/context" in io:
        return io[f"{case}/in/context"]
    # a list of series of unequal length
    lists = [io[key] for key in sorted(io) if re.fullmatch(rf"{case}/in/context_\d+", key)]
    longest = max(map(len, lists))
    return np.stack([np.pad(s, (longest - len(s), 0), constant_values=np.nan) for s in lists])


def test_golden_outputs(recorded):
    _, model, params, io = recorded
    for group in by_length(io, cases(io, "/out/quantile_preds")).values():
        x = np.concatenate([x for _, x, _ in group])
        mask = np.concatenate([io.get(f"{case}/in/mask", np.ones_like(x)) for case, x, _ in group])
        y, taps = apply(model, params, row(x), row(mask))
        for case, x, rows in group:
            check(y[rows], io[f"{case}/out/quantile_preds"], x, case)
            if f"{case}/out/loc" in io:
                parity.close(taps["loc"][rows, 0], io[f"{case}/out/loc"], what=case)
                parity.close(taps["scale"][rows, 0], io[f"{case}/out/scale"], what=case)
            if f"{case}/out/embed" in io:
                parity.close(
                    taps["encoder/norm"][rows], io[f"{case}/out/embed"], atol=1e-4, what=case
                )
    cases(io, "/out/embed")
    x = context_of(io, "normal")
    parity.close(
        encode(model, params, row(x))[:, 0], io["act/normal/encoder.final_layer_norm"], atol=1e-4
    )


def test_golden_intermediates(recorded):
    _, model, params, io = recorded
    _, taps = apply(model, params, row(io["normal/in/context"]))
    ours = {
        "scaled_context": "scaled",
        "patched_context": "patches",
        "patched_mask": "patch_mask",
        "input_patch_embedding": "embed",
        "encoder_input": "encoder_input",
        "attention_mask": "seen",
        "encoder.final_layer_norm": "encoder/norm",
        "decoder.final_layer_norm": "decoder/norm",
        "output_patch_embedding": "head",
        "loc": "loc",
        "scale": "scale",
    }
    steps = {"encoder": ("/after_attn", ""), "decoder": ("/after_attn", "/after_cross", "")}
    for stack, names in steps.items():
        for i in range(len(getattr(model.config, stack).layers)):
            ours[f"{stack}.block.{i}"] = f"{stack}/layer_{i}"
            ours |= {
                f"{stack}.block.{i}.layer.{j}": f"{stack}/layer_{i}{name}"
                for j, name in enumerate(names)
            }
    recorded_steps = [
        key.removeprefix("act/normal/") for key in io if key.startswith("act/normal/")
    ]
    assert set(recorded_steps) == set(ours), "every recorded step is compared, and no other"
    for name in recorded_steps:
        want = np.nan_to_num(
            io[f"act/normal/{name}"]
        )  # missing points are 0 where the original still has NaN
        parity.close(np.asarray(taps[ours[name]], np.float32), want, atol=1e-4, what=name)


def test_golden_rollout(recorded):
    """`predict` at any horizon, and `predict_quantiles` from it."""
    _, model, params, io = recorded
    wants = {case: io[f"{case}/out/predict"] for case in cases(io, "/out/predict")}
    wants |= {
        case: np.swapaxes(io[f"{case}/out/quantiles"], 1, 2) for case in cases(io, "/out/quantiles")
    }
    for group in by_length(io, wants).values():
        horizon = max(wants[case].shape[-1] for case, *_ in group)
        found = predict(model, params, row(np.concatenate([x for _, x, _ in group])), horizon)
        assert found.levels == model.config.levels
        for case, x, rows in group:
            want = wants[case]
            assert int(io.get(f"{case}/in/prediction_length", want.shape[-1])) == want.shape[-1]
            y = found.quantiles[rows, :, : want.shape[-1]]
            if f"{case}/in/levels" in io:
                levels = tuple(round(float(level), 6) for level in io[f"{case}/in/levels"])
                y = model.quantiles_at(y, levels, original=True)
                point = found.point[rows, :, : want.shape[-1], None]
                check(point, io[f"{case}/out/mean"][:, None], x, case)
            check(y, want, x, case)


def batch_of(io, case):
    """The batch of a recorded loss; a target that the original hid by a mask is missing for us."""
    target = io[f"{case}/in/target"]
    if f"{case}/in/target_mask" in io:
        target = np.where(io[f"{case}/in/target_mask"] > 0, target, np.nan)
    return {"context": row(io[f"{case}/in/context"]), "target": row(target)}


def test_golden_losses(recorded):
    """All at once: a case is a batch in which the rows of the others have no weight."""
    _, model, params, io = recorded
    for group in by_length(io, cases(io, "/out/loss")).values():
        target = np.full((sum(len(x) for _, x, _ in group), 1, model.horizon), np.nan, np.float32)
        for case, _, rows in group:
            y = batch_of(io, case)["target"]
            target[rows, :, : y.shape[-1]] = y
        batch = {
            "context": row(np.concatenate([x for _, x, _ in group])),
            "target": jnp.asarray(target),
        }
        for case, _, rows in group:
            weight = np.zeros(len(target), np.float32)
            weight[rows] = 1
            got = loss(model, params, batch | {"weight": jnp.asarray(weight)})
            np.testing.assert_allclose(got, io[f"{case}/out/loss"], rtol=RTOL, err_msg=case)


@pytest.mark.parametrize("prefix", ["", "nan/"])
def test_golden_gradients(recorded, prefix):
    vectors, model, params, io = recorded
    stored = vectors.arrays("grads.npz")
    if f"{prefix}loss" not in stored:
        pytest.skip(f"no gradients recorded under {prefix!r}")
    batch = batch_of(stored, "nan") if prefix else batch_of(io, "normal")
    np.testing.assert_allclose(loss(model, params, batch), stored[f"{prefix}loss"], rtol=RTOL)
    want = parity.recorded_gradients(vectors, model, prefix=f"{prefix}grad/")
    parity.check_gradients(lambda p: model.loss(p, batch), params, want)


def test_golden_initialisation(recorded):
    vectors, model, *_ = recorded
    stats = vectors.init_stats
    config = type(model.config).from_published(stats["_about"]["config"])
    assert parity.check_initialisation(type(model)(config), stats["params"]) == len(stats["params"])


def test_golden_round_trip(recorded, tmp_path):
    vectors, model, *_ = recorded
    out = parity.check_round_trip(vectors.checkpoint, tmp_path)
    assert out.with_name("config.json").exists()
    told = converter.published(model.config)
    wrong = {
        name: (told[name], value)
        for name, value in vectors.config.items()
        if told.get(name, value) != value
    }
    assert set(wrong) <= {"vocab_size", "transformers_version"}, wrong
