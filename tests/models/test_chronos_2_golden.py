"""Chronos-2 against vectors recorded from the original PyTorch code (`--golden DIR` names another
set).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import chronos_2 as converter
from ltsm_jax import trees
from ltsm_jax.layers.quantiles import at_levels
from ltsm_jax.models import folders
from ltsm_jax.models.chronos_2 import (
    PRESETS,
    Chronos2,
    masses,
    weighted_quantile,
)

# of meta.json, for quantiles relative to the scale of the series; 1e-3 where sinh has amplified
# them
RTOL = 1e-4


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("chronos_2")
    model, params = parity.load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


def cases(io, suffix):
    found = [key.removesuffix(suffix) for key in io if key.endswith(suffix)]
    assert found, f"nothing recorded under {suffix}"
    return found


def inputs(io, case, prefix="in"):
    """What `apply` and `rows` take, the batch axis of the original as the members of one group."""
    x = io[f"{case}/{prefix}/context"]
    groups = io.get(f"{case}/{prefix}/group_ids", np.arange(len(x)))
    found = {"same": jnp.asarray(groups[:, None] == groups[None])[None]}
    names = {
        "mask": "context_mask",
        "future": "future_covariates",
        "future_mask": "future_covariates_mask",
    }
    for ours, theirs in names.items():
        if f"{case}/{prefix}/{theirs}" in io:
            found[ours] = jnp.asarray(io[f"{case}/{prefix}/{theirs}"])[None]
    return jnp.asarray(x)[None], found


apply = jax.jit(
    lambda model, params, x, n, more: model.apply(params, x, n, **more), static_argnums=(0, 3)
)
rows = jax.jit(
    lambda model, params, x, horizon, more, paths, most: model.rows(
        params, x, horizon, paths=paths, max_patches=most, **more
    ),
    static_argnums=(0, 3, 5, 6),
)


def check(got_MRQ, want_MQR, x_MT, what, relative=False):
    """Equal within the recorded tolerance, each series by its own scale; relative beyond many
    scales (sinh).
    """
    got, want = np.swapaxes(np.asarray(got_MRQ), 1, 2), np.asarray(want_MQR)
    assert got.shape == want.shape, f"{what}: {got.shape}, {want.shape}"
    scale = np.array(
        [np.std(s[~np.isnan(s)]) if np.isfinite(s).any() else 1.0 for s in np.asarray(x_MT)]
    )
    scale = np.maximum(scale, 1e-5).reshape(-1, 1, 1)
    excess = np.abs(got - want) - 1e-4 * scale - (1e-3 if relative else RTOL) * np.abs(want)
    parity.note(np.abs(got - want), np.abs(got - want) - excess)
    assert (excess <= 0).all(), f"{what}: off by {np.abs(got - want).max()} at most"


def test_golden_outputs(recorded):
    _, model, params, io = recorded
    for case in cases(io, "/out/quantile_preds"):
        x, more = inputs(io, case)
        y, taps = apply(model, params, x, int(io[f"{case}/in/num_output_patches"]), more)
        check(y[0], io[f"{case}/out/quantile_preds"], x[0], case, model.config.arcsinh)
        for name in ("loc", "scale"):
            if f"{case}/out/{name}" in io:
                parity.close(taps[name][0], io[f"{case}/out/{name}"], what=case)
        if f"{case}/out/encoder" in io:
            valid = io[f"{case}/out/valid_token"].astype(bool)
            parity.close(
                taps["norm"][0][valid], io[f"{case}/out/encoder"][valid], atol=1e-4, what=case
            )


def test_golden_intermediates(recorded):
    _, model, params, io = recorded
    ours = {
        "instance_norm": "scaled",
        "patched_context": "patches",
        "patched_future": "future_patches",
        "input_patch_embedding": "embed",
        "input_patch_embedding_future": "embed_future",
        "encoder.final_layer_norm": "norm",
        "output_patch_embedding": "head",
        "loc": "loc",
        "scale": "scale",
    }
    for i in range(len(model.config.layers)):
        ours |= {
            f"encoder.block.{i}": f"layer_{i}",
            f"encoder.block.{i}.layer.0": f"layer_{i}/time",
        }
        ours |= {
            f"encoder.block.{i}.layer.1": f"layer_{i}/group",
            f"encoder.block.{i}.layer.2": f"layer_{i}",
        }
    compared = 0
    for case in dict.fromkeys(m[1] for key in io if (m := re.match(r"act/([^/]+)/", key))):
        x, more = inputs(io, case)
        _, taps = apply(model, params, x, int(io[f"{case}/in/num_output_patches"]), more)
        valid = io.get(f"{case}/out/valid_token", np.ones(taps["seen"].shape[1:])).astype(bool)
        for key in [key for key in io if key.startswith(f"act/{case}/")]:
            name = key.removeprefix(f"act/{case}/")
            got, want = np.asarray(taps[ours[name]][0]), np.nan_to_num(io[key])
            if got.shape[:2] == valid.shape:
                got, want = got[valid], want[valid]
            if name == "instance_norm":
                got = np.nan_to_num(got)
            parity.close(got, want, atol=1e-4, what=key)
            compared += 1
    assert compared


def path_levels(io, case):
    return tuple(
        round(float(q), 6) for q in io.get(f"{case}/in/unrolled_quantiles", np.arange(1, 10) / 10)
    )


@pytest.mark.slow
def test_golden_forecasts_of_the_pipeline(recorded):
    """From the padded batch that the original's pipeline makes of its inputs, covariates and long
    horizons included.
    """
    _, model, params, io = recorded
    for case in cases(io, "/batch/context"):
        x, more = inputs(io, case, "batch")
        horizon = int(io[f"{case}/in/prediction_length"])
        if case.endswith("_cross"):  # recorded before the pipeline puts all tasks into one group
            more["same"] = jnp.ones_like(more["same"])
        y = rows(model, params, x, horizon, more, path_levels(io, case), None)
        for i, (start, stop) in enumerate(io[f"{case}/batch/target_idx_ranges"]):
            check(
                y[0, start:stop],
                io[f"{case}/out/predict_{i}"],
                x[0, start:stop],
                f"{case} {i}",
                True,
            )


def tensor(io, case):
    """Inputs that are one array [b, v, t], as `predict` takes them."""
    return jnp.asarray(io[f"{case}/in/inputs"])


@pytest.mark.slow
def test_golden_forecasts_of_plain_arrays(recorded):
    """`predict` groups the variates of a row, as the original's pipeline does with one array."""
    _, model, params, io = recorded
    predict = jax.jit(lambda x, h: model.predict(params, x, h), static_argnums=1)
    compared = 0
    for case in cases(io, "/in/inputs"):
        if "cross" in case:
            continue  # one group across tasks: above
        x, horizon = tensor(io, case), int(io[f"{case}/in/prediction_length"])
        if f"{case}/in/unrolled_quantiles" in io or f"{case}/in/context_length" in io:
            most = int(io.get(f"{case}/in/max_output_patches", model.config.max_patches))
            x = x[..., -int(io.get(f"{case}/in/context_length", x.shape[-1])) :]
            y = rows(model, params, x, horizon, {}, path_levels(io, case), most)
        else:
            found = predict(x, horizon)
            assert found.levels == model.config.levels
            y = found.quantiles
        for i in range(len(x)):
            check(y[i], io[f"{case}/out/predict_{i}"], x[i], f"{case} {i}", True)
            compared += 1
    assert compared


@pytest.mark.slow
def test_golden_levels_of_ones_own(recorded):
    _, model, params, io = recorded
    x = tensor(io, "predict_3d")
    y = model.rows(params, x, int(io["predict_3d/in/prediction_length"]))
    for case in cases(io, "/out/quantiles"):
        want = io[f"{case}/out/quantiles"]
        if want.shape[:2] != x.shape[:2]:
            pytest.skip("recorded for other inputs")
        levels = tuple(round(float(q), 6) for q in io[f"{case}/in/levels"])
        got = at_levels(y, model.config.levels, levels)
        for i in range(len(x)):
            check(got[i], np.swapaxes(want[i], 1, 2), x[i], case, True)
        parity.close(
            at_levels(y, model.config.levels, (0.5,))[..., 0],
            io[f"{case}/out/mean"],
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.slow
def test_golden_embeddings(recorded):
    _, model, params, io = recorded
    names = sorted(key for key in io if re.fullmatch(r"embed/out/embedding_\d+", key))
    series = [io[f"predict_list/in/input_{i}"] for i in range(len(names))]
    longest = max(s.shape[-1] for s in series)
    for name, s in zip(names, series, strict=True):
        x = np.pad(np.atleast_2d(s), ((0, 0), (longest - s.shape[-1], 0)), constant_values=np.nan)
        got, want = model.embed(params, jnp.asarray(x)[None])[0], io[name]
        hidden = longest - s.shape[-1]  # tokens without any observed point: nobody attends to them
        first = hidden // model.config.patch_len
        parity.close(got[:, first:], want[:, first:], atol=1e-4, what=name)


def batch_of(io, case):
    x, more = inputs(io, case)
    target = jnp.asarray(io[f"{case}/in/future_target"])[None]
    mask = io.get(f"{case}/in/future_target_mask")
    more = {name: value for name, value in more.items() if name in ("same", "future")}
    return x, target, more | ({} if mask is None else {"target_mask": jnp.asarray(mask)[None]})


@pytest.mark.slow
def test_golden_losses(recorded):
    _, model, params, io = recorded
    for case in cases(io, "/out/loss"):
        x, target, more = batch_of(io, case)
        got = jax.jit(lambda p, x=x, t=target, m=more: model.series_loss(p, x, t, **m).mean())(
            params
        )
        np.testing.assert_allclose(got, io[f"{case}/out/loss"], rtol=RTOL, err_msg=case)
        if set(more) == {"same"} and case == "normal":
            batch = {"context": x[0][:, None], "target": target[0][:, None]}
            np.testing.assert_allclose(model.loss(params, batch), io[f"{case}/out/loss"], rtol=RTOL)


@pytest.mark.parametrize("prefix, case", [("", "normal"), ("groups/", "groups_covariates")])
def test_golden_gradients(recorded, prefix, case):
    vectors, model, params, io = recorded
    x, target, more = batch_of(io, case)
    want = parity.recorded_gradients(vectors, model, prefix=f"{prefix}grad/")
    # alone in its group, a series gives the group's q and k nothing but round-off
    only = r"^(?!.*/group/[qk]/)" if case == "normal" else None
    parity.check_gradients(
        lambda p: model.series_loss(p, x, target, **more).mean(), params, want, only=only
    )


def test_golden_quantile_tools(recorded):
    *_, io = recorded
    values, query = io["util/in/values"], io["util/in/query"].tolist()
    levels = io["util/in/levels"].tolist()
    parity.close(
        at_levels(jnp.asarray(values), levels, query),
        io["util/out/interpolate_quantiles"],
    )
    parity.close(
        weighted_quantile(jnp.asarray(values), io["util/in/weights"], query),
        io["util/out/weighted_quantile"],
    )
    parity.close(masses(levels), io["util/out/prob_mass"])


def test_golden_initialisation(recorded):
    vectors, model, *_ = recorded
    stats = vectors.init_stats["params"]
    shapes = {key: np.broadcast_to(np.float32(0), entry["shape"]) for key, entry in stats.items()}
    d_ff, wide = shapes["input_patch_embedding.hidden_layer.weight"].shape
    d_model, layers = (
        shapes["shared.weight"].shape[1],
        converter.layer_count(shapes, r"encoder\.block\.(\d+)\."),
    )
    inner = shapes["encoder.block.0.layer.0.self_attention.q.weight"].shape[0]
    out = shapes["output_patch_embedding.output_layer.weight"].shape[0]
    told = (
        vectors.init_stats["_about"].get("config", {})
        if isinstance(vectors.init_stats["_about"], dict)
        else {}
    )
    heads = told.get("num_heads", inner // 64)
    levels = tuple((i + 1) / (out * 3 // wide + 1) for i in range(out * 3 // wide))
    config = type(model.config).of(
        d_model, heads, d_ff, layers, head_dim=inner // heads, patch_len=wide // 3, levels=levels
    )
    assert parity.check_initialisation(Chronos2(config), stats) == len(stats)


def test_golden_round_trip(recorded, tmp_path):
    vectors, model, *_ = recorded
    parity.check_round_trip(vectors.checkpoint, tmp_path)
    told = converter.published(model.config)
    wrong = {
        name: (told[name], value)
        for name, value in vectors.config.items()
        if told.get(name, value) != value
    }
    assert not wrong


@pytest.mark.parametrize(
    "name, millions", [("amazon/chronos-2", 119.478), ("autogluon/chronos-2-small", 28.263)]
)
def test_published_parameter_counts(name, millions):
    assert round(trees.count(folders.param_shapes(Chronos2(PRESETS[name]))) / 1e6, 3) == millions
