"""Toto 2.0 against vectors recorded from the original PyTorch code (`--golden DIR` names another
set).
"""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import toto_2 as converter
from ltsm_jax import trees
from ltsm_jax.models import folders, toto_2
from ltsm_jax.models.toto_2 import LEVELS, Toto2, Toto2Config

MAIN = "toto_2"
ACTIVATIONS = {"rtol": 1e-4, "atol": 1e-4}  # of meta.json


# Each case has shapes of its own, which take seconds to compile: of the others the quick part knows
# by these.
QUICK = ("masked", "single_pass", "block_leading", "gluon_univariate")
KINDS = {"pass_case": "forward", "forecast_case": "forecast", "wrapper_case": "gluon"}


def pytest_generate_tests(metafunc):
    """The set of vectors and its variants, which are slow; and, where a test asks for one, each
    case of a kind.
    """
    if "recorded" not in metafunc.fixturenames:
        return
    root = metafunc.config.getoption("--golden")
    found = sorted(file.parent for file in (root / MAIN).glob("variants/*/meta.json"))
    names = [MAIN, *(str(folder.relative_to(root)) for folder in found)]
    asked = [name for name in KINDS if name in metafunc.fixturenames]
    sets = []
    for name in names:
        slow = name != MAIN
        if not asked:
            sets.append(pytest.param(name, marks=pytest.mark.slow if slow else ()))
            continue
        for case in cases_of(root / name, KINDS[asked[0]]):
            marks = pytest.mark.slow if slow or case not in QUICK else ()
            sets.append(pytest.param(name, case, marks=marks))
    # Without any vectors, one that is skipped.
    arguments = ["recorded", *asked]
    sets = sets or [(MAIN, "")[: len(arguments)]]
    metafunc.parametrize(
        arguments if asked else "recorded", sets, indirect=["recorded"], scope="module"
    )


def cases_of(folder, kind):
    """Names of the recorded cases of a kind."""
    file = folder / "meta.json"
    told = json.loads(file.read_text())["cases"] if file.is_file() else {}
    return [name for name, case in told.items() if case["kind"] == kind]


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A checkpoint and its recorded arrays."""

    vectors: Any
    model: Toto2
    params: dict
    io: dict

    def require(self, *names):
        for name in names:
            if name not in self.io:
                pytest.skip(f"{name} is not in this set")


@pytest.fixture(scope="module")
def recorded(request, golden):
    vectors = golden(request.param)
    model, params = parity.load(vectors)
    assert isinstance(model, Toto2)
    return Recorded(vectors, model, params, vectors.arrays("io.npz"))


# --- one pass


def inputs(io, case):
    """Arguments of `apply` and of `sequence_loss` for a case."""
    return {
        "x_BVT": io[f"{case}/in/target"],
        "observed_BVT": io[f"{case}/in/target_mask"],
        "shown_BVT": io[f"{case}/in/cpm_mask"],
        "ids_BV": io[f"{case}/in/series_ids"].astype(np.int32),
    }


def stretched(y_BVS, p):
    """A number of each patch as one of each step."""
    return np.repeat(np.asarray(y_BVS), p, axis=-1)


def close_to_case(got, want, what):
    """Equal within 1e-4 of the largest value of the case, and relatively."""
    parity.close(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), what=what)


def levels_first(y):
    return np.moveaxis(np.asarray(y), -1, 0)


sequence_loss = jax.jit(
    lambda model, params, given: model.sequence_loss(params, **given), static_argnums=0
)


def test_golden_passes(recorded, pass_case):
    io, case, p = recorded.io, pass_case, recorded.model.config.patch_len
    loss, taps = sequence_loss(recorded.model, recorded.params, inputs(io, case))
    y = taps["quantiles"]
    steps = int(io.get(f"{case}/in/num_return_steps", y.shape[2]))
    close_to_case(levels_first(y[:, :, -steps:]), io[f"{case}/out/quantiles"], case)
    for name in ("loc", "scale"):
        want = io[f"{case}/out/{name}"]
        got = stretched(taps[name], p)[..., -want.shape[-1] :]
        parity.close(got, want, rtol=1e-6, atol=0, what=f"{case}/{name}")
    if f"{case}/out/loss" in io:
        parity.close(taps["weight"], io[f"{case}/out/loss_weight"], rtol=0, atol=0, what=case)
        counts = np.asarray(taps["weight"]) > 0
        got, want = np.asarray(taps["target"])[counts], io[f"{case}/out/loss_target"][counts]
        parity.close(got, want, **ACTIVATIONS, what=case)
        np.testing.assert_allclose(loss, io[f"{case}/out/loss"], rtol=1e-5, err_msg=case)
    compare_steps(recorded, case, taps)


def compare_steps(recorded, case, taps):
    """The recorded outputs of modules, where there are some of this case."""
    ours = activations(recorded.model.config, taps)
    for key, want in recorded.io.items():
        if key.startswith(f"act/{case}/"):
            got = np.asarray(ours[key.removeprefix(f"act/{case}/")])
            assert got.size == want.size, key
            parity.close(got.reshape(want.shape), want, **ACTIVATIONS, what=key)


def joined(taps, layer, names):
    """What the original makes with one linear: our parts beside each other."""
    return np.concatenate(
        [np.asarray(taps[f"{layer}/{name}"]).reshape(*_front(taps, layer), -1) for name in names],
        -1,
    )


def _front(taps, layer):
    return taps[f"{layer}/q"].shape[:3]


def swapped(config, layer, y):
    """[B, V, S, ...] in the order in which the original has a layer over variates."""
    return (
        np.swapaxes(np.asarray(y), 1, 2)
        if config.layers[layer].kind == "variate"
        else np.asarray(y)
    )


def activations(config, taps):
    """Our steps by the original's names, in its shapes but for the leading axes."""
    found = {
        "patch_proj_in": taps["patches"],
        "patch_proj": taps["embed"],
        "transformer.out_norm": taps["norm"],
    }
    parts = {"linear1": "hidden", "linear2": "out", "skip_proj": "residual"}
    for theirs, ours in parts.items():
        found |= {
            f"patch_proj.{theirs}": taps[f"embed/{ours}"],
            f"output_head.{theirs}": taps[f"head/{ours}"],
        }
    found["output_head.proj"] = taps["head"]
    outside = {
        "after_attn": "after_attn",
        "ffn.gated": "gated",
        "norm2": "norm2",
        "ffn.fc2": "down",
        "norm1": "norm1",
    }
    outside |= {"attn.out_proj": "attn"}
    inside = {
        "attn.q_per_dim_scaled": "q_scaled",
        "attn.q_rot": "q_turned",
        "attn.k_rot": "k_turned",
    }
    for i in range(len(config.layers)):
        theirs, ours = f"transformer.layers.{i}", f"layer_{i}"
        found[theirs] = swapped(config, i, taps[ours])
        for name, tap in outside.items():
            found[f"{theirs}.{name}"] = swapped(config, i, taps[f"{ours}/{tap}"])
        for name, tap in inside.items():
            if f"{ours}/{tap}" in taps:
                found[f"{theirs}.{name}"] = taps[f"{ours}/{tap}"]
        found[f"{theirs}.attn.in_proj"] = joined(taps, ours, "qkv")
        found[f"{theirs}.attn.sdpa"] = joined(taps, ours, ["mixed"])
        both = [swapped(config, i, taps[f"{ours}/{name}"]) for name in ("up", "gate")]
        found[f"{theirs}.ffn.fc1"] = np.concatenate(both, axis=-1)
    return found


# --- gradients


def gradient_cases(recorded):
    """The case of each recorded set of gradients: (case, prefix, umup)."""
    names, told = recorded.vectors.arrays("grads.npz"), recorded.vectors.meta["grads"]
    (plain,) = [text for keys, text in told.items() if keys.startswith("loss")]
    case = re.search(r"case (\w+)", plain)
    assert case
    found = [(case[1], "grad/", False)]
    others = {key.split("/")[0] for key in names if "/grad/" in key} - {"umup"}
    found += [(name, f"{name}/grad/", False) for name in sorted(others)]
    if any(key.startswith("umup/") for key in names):
        found.append((case[1], "umup/grad/", True))
    return found


def recorded_gradients(recorded, prefix):
    """By path; of the taus, which are no parameters to the original, there are none."""
    arrays = recorded.vectors.arrays("grads.npz")
    stored = {name.removeprefix(prefix): g for name, g in arrays.items() if name.startswith(prefix)}
    layers = [f"transformer.layers.{i}" for i in range(len(recorded.model.config.layers))]
    taus = [f"{layer}.{name}_tau" for layer in layers for name in ("attn", "mlp")]
    state = stored | {name: np.zeros((), np.float32) for name in taus}
    rules = converter.keys(recorded.model.config)
    found = parity.tables.to_params(
        rules, state, folders.param_shapes(recorded.model), what=prefix
    ).params
    return {path: g for path, g in trees.flatten(found).items() if not path.endswith("_tau")}


def trained(model, params):
    """(what is trained, what is fixed)."""
    fixed = trees.select(params, model.fixed)
    return trees.partition(params, jax.tree.map(lambda keep: not keep, fixed))


def test_golden_gradients(recorded):
    """Exact ones, and as the original's own backward pass gives them."""
    moving, rest = trained(recorded.model, recorded.params)
    for case, prefix, umup in gradient_cases(recorded):
        gradient = "umup" if umup else "exact"
        model = Toto2(dataclasses.replace(recorded.model.config, gradient=gradient))
        given = {name: jnp.asarray(x) for name, x in inputs(recorded.io, case).items()}

        def loss(moving, model=model, given=given):
            return model.sequence_loss(trees.combine(moving, rest), **given)[0]

        value = parity.check_gradients(loss, moving, recorded_gradients(recorded, prefix))
        np.testing.assert_allclose(value, recorded.io[f"{case}/out/loss"], rtol=1e-5)


# --- forecasts


def forecast(recorded, case, taps=None):
    io = recorded.io
    more = {
        name: io.get(f"{case}/in/{key}")
        for name, key in (
            ("known_BET", "known_dynamic"),
            ("known_observed_BET", "known_dynamic_mask"),
            ("known_ids_BE", "known_dynamic_series_ids"),
        )
    }
    arrays = {
        name: x.astype(np.int32) if "ids" in name else x
        for name, x in more.items()
        if x is not None
    }
    block = int(io[f"{case}/in/decode_block_size"])
    model, horizon = recorded.model, int(io[f"{case}/in/horizon"])
    options = {
        "block_len": block or None,
        "min_observed": int(io[f"{case}/in/scaler_fallback_min_obs"]),
        "cap": float(io[f"{case}/in/quantile_real_cap_k"]),
    }
    observed = io[f"{case}/in/target_mask"].copy()
    # As the original does before anything else.
    observed[..., -model.config.patch_len :] = True
    ids = io[f"{case}/in/series_ids"].astype(np.int32)

    def run(params, x, observed, ids, arrays):
        steps = None if taps is None else []
        y = model.forecast(
            params, x, observed, horizon, ids_BV=ids, **options, **arrays, taps=steps
        )
        return y, steps

    y, steps = jax.jit(run)(recorded.params, io[f"{case}/in/target"], observed, ids, arrays)
    if taps is not None:
        taps += steps
    return y


def test_golden_forecasts(recorded, forecast_case):
    io, case = recorded.io, forecast_case
    y = forecast(recorded, case)
    close_to_case(levels_first(y), io[f"{case}/out/quantiles"], case)
    close_to_case(y[..., toto_2.MEDIAN], io[f"{case}/out/point"], f"{case} point")


@pytest.mark.slow
def test_golden_rounds_of_block_decoding(recorded):
    """What each pass reads and gives. The loop over blocks gives what they give side by side."""
    io = recorded.io
    cases = {m[1] for key in io if (m := re.match(r"act/(\w+)/round0/", key))}
    if not cases:
        pytest.skip("no rounds are recorded")
    for case in sorted(cases):
        taps = []
        y = forecast(recorded, case, taps)
        close_to_case(levels_first(y), io[f"{case}/out/quantiles"], case)
        for i, steps in enumerate(taps):
            # The last block may have fewer patches in the original; here those behind it are cut.
            want = io[f"act/{case}/round{i}/transformer_in"]
            n = want.shape[2]
            parity.close(steps["embed"][:, :, :n], want, **ACTIVATIONS, what=f"{case} {i} in")
            want = io[f"act/{case}/round{i}/transformer_out"]
            parity.close(steps["norm"][:, :, :n], want, **ACTIVATIONS, what=f"{case} {i} out")
            np.testing.assert_array_equal(
                steps["groups"][:, :, :n], io[f"act/{case}/round{i}/group_ids"]
            )
        assert f"act/{case}/round{len(taps)}/transformer_in" not in io


def wrapped(recorded, case):
    """(model as the original's GluonTS wrapper is set, contexts by series, horizon)."""
    io, told = recorded.io, f"{case}/in/"
    block = int(io[told + "decode_block_size"])
    fill = {"ffill": "last", "linear": "linear", "none": "zero"}[str(io[told + "imputation"])]
    config = dataclasses.replace(
        recorded.model.config,
        window=int(io[told + "context_length"]),
        block_len=block or None,
        min_observed=int(io[told + "scaler_fallback_min_obs"]),
        cap=float(io[told + "quantile_real_cap_k"]),
        fill=fill,
        front="zeros",
    )
    return Toto2(config), int(io[told + "prediction_length"])


def series(recorded, case):
    """The series of a case, each as (target [1, C, T], past [1, K, T] or None, known [1, K', T + H]
    or None).
    """
    found = []
    for i in range(int(recorded.io[f"{case}/in/num_series"])):
        own = [
            recorded.io.get(f"{case}/in/series{i}/{name}")
            for name in ("target", "past_feat_dynamic_real", "feat_dynamic_real")
        ]
        found.append([None if x is None else np.atleast_2d(x)[None] for x in own])
    return found


def test_golden_wrapper(recorded, wrapper_case):
    """`predict` of series with missing values, of any length, with covariates: the leaderboard's
    pipeline.
    """
    case = wrapper_case
    model, horizon = wrapped(recorded, case)
    predict = jax.jit(model.predict_with, static_argnums=2)
    want = recorded.io[f"{case}/out/forecast_arrays"]  # series, levels, [variates,] steps
    want = want.reshape(len(want), len(LEVELS), -1, horizon)
    # Each alone: a batch is filled up by NaN in front, which the quirk of the wrapper takes for
    # zeros.
    for i, (target, past, known) in enumerate(series(recorded, case)):
        found = predict(recorded.params, target, horizon, past=past, known=known)
        assert found.levels == LEVELS
        np.testing.assert_array_equal(found.quantiles[..., toto_2.MEDIAN], found.point)
        close_to_case(levels_first(found.quantiles[0]), want[i], f"{case} {i}")


@pytest.mark.slow
def test_golden_preparation(recorded, wrapper_case):
    """The batches that the wrapper hands to the network, but for the last patch, which it calls
    observed later.
    """
    case = wrapper_case
    model, horizon = wrapped(recorded, case)
    want = recorded.io[f"{case}/out/batch/past_target"]
    seen = recorded.io[f"{case}/out/batch/past_observed_target"].copy()
    seen[..., -model.config.patch_len :] = True
    for i, (target, _, _) in enumerate(series(recorded, case)):
        x, observed = model.prepare(target, horizon)
        x, observed = np.asarray(x[0]), np.asarray(observed[0])
        # A batch of the original has one length for all.
        front = ((0, 0), (want.shape[-1] - x.shape[-1], 0))
        np.testing.assert_array_equal(np.pad(x, front), want[i], err_msg=f"{case} {i}")
        np.testing.assert_array_equal(np.pad(observed, front), seen[i], err_msg=f"{case} {i}")


# --- small functions of the original


def test_golden_overflow(recorded):
    """Infinite values become the nearest finite ones of their patch."""
    recorded.require("util/clamp_nonfinite/in")
    x, want = recorded.io["util/clamp_nonfinite/in"], recorded.io["util/clamp_nonfinite/out"]
    # Through sinh, with float64 to go back: what is infinite there is infinite here.
    y = np.where(np.isfinite(x), np.arcsinh(np.float64(x)), np.sign(x) * 100.0)[:, :, None, :, None]
    got = toto_2._unscaled(jnp.asarray(y, jnp.float32), jnp.zeros((1,) * 5), jnp.ones((1,) * 5))
    parity.close(np.asarray(got)[:, :, 0, :, 0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fill, name", [("last", "ffill"), ("linear", "linear")])
def test_golden_imputation(recorded, fill, name):
    recorded.require("util/impute/in")
    x, want = recorded.io["util/impute/in"][None], recorded.io[f"util/impute/{name}"]
    config = dataclasses.replace(
        recorded.model.config, fill=fill, patch_len=x.shape[-1], block_len=None
    )
    got, _ = Toto2(config).prepare(jnp.asarray(x), 1)
    parity.close(got[0], want, rtol=1e-6, atol=1e-6)


def test_golden_taus(recorded):
    recorded.require("util/tau")
    for layers, mult, ratio, i, want in recorded.io["util/tau"]:
        small = Toto2Config.of(
            4, 8, 2, int(layers), 8, residual_mult=float(mult), residual_ratio=float(ratio)
        )
        got = small.tau(int(i) // 2, "mlp" if int(i) % 2 else "attn")
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_golden_rotation(recorded):
    recorded.require("util/xpos/in")
    x, ids = recorded.io["util/xpos/in"], recorded.io["util/xpos/ids"].astype(np.int32)
    for name, sign, places in (
        ("q", 1, ids),
        ("k", -1, ids),
        ("q_default", 1, np.arange(len(ids))),
    ):
        positions = jnp.asarray(places).reshape(1, 1, -1)
        center = (int(places.max()) + 1) // 2
        got = toto_2.turned(jnp.asarray(x), positions, center, sign, True)
        parity.close(got, recorded.io[f"util/xpos/{name}"], rtol=1e-5, atol=1e-5, what=name)


# --- checkpoint and initialisation


def test_golden_round_trip(recorded, tmp_path):
    parity.check_round_trip(recorded.vectors.checkpoint, tmp_path)
    told = converter.published(recorded.model.config)
    assert Toto2Config.from_published(told) == recorded.model.config
    # Several groupings may make the same layers, of which ours is the smallest.
    grouping = ("layer_group_size", "num_variate_layers_per_group", "variate_layer_first")
    names = [name for name in recorded.vectors.config if name not in grouping]
    assert {name: told[name] for name in names} == {
        name: recorded.vectors.config[name] for name in names
    }


def test_golden_config_comes_back(recorded, tmp_path):
    """config.json of an export is the one that was imported."""
    parity.check_round_trip(recorded.vectors.folder / "model.safetensors", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == recorded.vectors.config


def test_golden_parameters_are_counted(recorded):
    moving, _ = trained(recorded.model, folders.param_shapes(recorded.model))
    assert trees.count(moving) == recorded.vectors.meta["num_parameters"]


def test_golden_init_statistics(recorded):
    if not (recorded.vectors.folder / "init_stats.json").is_file():
        pytest.skip("no fresh draw is recorded")
    about, stats = (recorded.vectors.init_stats[name] for name in ("_about", "params"))
    fields = dict(about["config"])
    fields["d_ff"] = stats["transformer.layers.0.ffn.fc2.weight"]["shape"][1]
    model = Toto2(Toto2Config.from_published(fields))
    assert parity.check_initialisation(model, stats) == len(stats)
    # The taus are those of the formula to the last bit.
    drawn = trees.flatten(jax.jit(model.init)(jax.random.key(0)))
    for i in range(len(model.config.layers)):
        np.testing.assert_array_equal(
            drawn[f"layer_{i}/attn_tau"], np.float32(model.config.tau(i, "attn"))
        )
        np.testing.assert_array_equal(
            drawn[f"layer_{i}/mlp_tau"], np.float32(model.config.tau(i, "mlp"))
        )
