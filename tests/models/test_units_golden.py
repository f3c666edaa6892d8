"""UniTS against vectors recorded from the original PyTorch code (`--golden DIR` names
another set).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest

from converters import export_checkpoint, import_checkpoint, tables
from converters import units as table
from converters.torch_files import read_torch
from ltsm_jax import trees
from ltsm_jax.models import folders
from ltsm_jax.models.units import PRESETS, DynamicLinear, Units, UnitsConfig

RTOL, ATOL = (
    2e-5,
    2e-5,
)  # of meta.json: relative to the scale of the series; constant series and logits 1e-4


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("units")
    model, params = parity.load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


def bvt(x_BTV):
    return np.swapaxes(np.asarray(x_BTV), 1, 2)


def check(got_BVT, want_BTV, x_BTV, what, atol=None):
    """Equal within the recorded tolerance, each series by the larger of its deviation and size."""
    got, want = np.asarray(got_BVT), np.asarray(bvt(want_BTV))
    assert got.shape == want.shape, f"{what}: {got.shape}, {want.shape}"
    x = np.asarray(bvt(x_BTV))
    scale = np.maximum(x.std(-1, keepdims=True), np.abs(x).max(-1, keepdims=True))
    allowed = RTOL * np.abs(want) + (ATOL * scale if atol is None else atol)
    parity.note(np.abs(got - want), allowed)
    assert (np.abs(got - want) <= allowed).all(), f"{what}: off by {np.abs(got - want).max()}"


def speaking_for(model, dataset):
    """The model with the tokens of one of its data sets."""
    return Units(type(model.config)(**{**vars(model.config), "dataset": dataset}))


def tasks(model, kind):
    return [t for t in model.config.tasks if t.kind == kind]


apply = jax.jit(
    lambda model, p, x, n, observed, task: model.apply(p, x, n, observed, task),
    static_argnums=(0, 3, 5),
)


RECONSTRUCT = jax.jit(lambda model, p, x: model.reconstruct(p, x), static_argnums=0)
SELF_SUPERVISED = jax.jit(
    lambda model, p, x, shown, task: model.self_supervised(p, x, shown, task),
    static_argnums=(0, 4),
)
PREDICT = jax.jit(lambda model, p, x, h: model.predict(p, x, h), static_argnums=(0, 3))


def as_the_original(model, params, x_BVL, horizon):
    """The last `horizon` steps as the original cuts them: steps that no patch covers stay at the
    mean.
    """
    p, length = model.config.patch_len, x_BVL.shape[-1]
    n_new = (horizon - (-length % p)) // p
    y, taps = apply(model, params, x_BVL, n_new, None, "")
    missing = length + horizon - y.shape[-1]
    y = np.concatenate([y, np.broadcast_to(taps["mean"], (*y.shape[:2], missing))], -1)
    return y[..., -horizon:], taps


@pytest.mark.slow
def test_golden_forecasts(recorded):
    _, model, params, io = recorded
    todo = [(t.name, t, t.horizon) for t in tasks(model, "long_term_forecast")]
    first = todo[0][1]
    todo += [
        (case, first, io[f"{case}/y"].shape[1])
        for case in ("scales", "constant", "new_length")
        if f"{case}/y" in io
    ]
    assert len(todo) > 1
    for case, task, horizon in todo:
        ready, x = speaking_for(model, task.dataset), io[f"{case}/x"]
        y, _ = as_the_original(ready, params, bvt(x), horizon)
        check(y, io[f"{case}/y"], x, case, atol=1e-4 if case == "constant" else None)
        if (horizon + x.shape[1]) % model.config.patch_len == 0 and case == first.name:
            check(PREDICT(ready, params, bvt(x), horizon).point, io[f"{case}/y"], x, case)


def test_a_horizon_is_never_filled_with_the_mean(recorded):
    _, model, params, io = recorded
    p = model.config.patch_len
    task = tasks(model, "long_term_forecast")[0]
    ready, x = speaking_for(model, task.dataset), bvt(io[f"{task.name}/x"])
    y = PREDICT(ready, params, x, 2 * p + 3).point
    mean = x.mean(-1, keepdims=True)
    assert (np.abs(np.asarray(y - mean)[..., -3:]) > 0).all()
    np.testing.assert_allclose(
        y, PREDICT(ready, params, x, 3 * p).point[..., : 2 * p + 3], rtol=1e-5, atol=1e-5
    )


STEPS = {
    "normalised_padded": "scaled",
    "patch_tokens": "patch_tokens",
    "prompt2forecat_out_BVDT": "generated",
    "tokens_into_block0": "input",
    "fh_proj_in": "forecast_head/proj_in",
    "fh_pos_proj_BVDT": "forecast_head/pos_proj",
    "fh_mlp": "forecast_head/mlp",
    "fh_proj_out": "forecast_head/proj_out",
    "fh_folded_normalised": "folded",
    "ch_proj_in": "class_head/proj_in",
    "ch_cross_att": "class_head/cross_att",
    "ch_mlp": "class_head/mlp",
}


def test_golden_intermediates(recorded):
    _, model, params, io = recorded
    names = dict.fromkeys(m[1] for key in io if (m := re.match(r"([^/]+)/act/", key)))
    assert names
    for case in names:
        task = next(t for t in model.config.tasks if t.name == case)
        ready, kind = speaking_for(model, task.dataset), task.kind
        observed = bvt(io[f"{case}/mask"]) if kind == "imputation" else None
        x = bvt(io[f"{case}/x_masked" if kind == "imputation" else f"{case}/x"])
        p = model.config.patch_len
        n_new = (
            (task.horizon + x.shape[-1]) // p - -(-x.shape[-1] // p)
            if kind == "long_term_forecast"
            else 0
        )
        _, taps = apply(ready, params, x, n_new, observed, case if kind == "classification" else "")
        parity.close(taps["mean"][..., 0], np.asarray(io[f"{case}/means"])[:, 0], what=case)
        parity.close(taps["std"][..., 0], np.asarray(io[f"{case}/stdev"])[:, 0], what=case)
        for key in [key for key in io if key.startswith(f"{case}/act/")]:
            name, want = key.split("/act/")[1], io[key]
            m = re.match(r"block(\d+)_(\w+)", name)
            tap = STEPS.get(name) or (f"block_{m[1]}" + ("" if m[2] == "out" else f"/{m[2]}"))
            got = np.asarray(taps[tap])
            if name.endswith("BVDT"):
                got = np.swapaxes(got, 2, 3)
            if name == "fh_folded_normalised":
                got = np.swapaxes(got, 1, 2)
            parity.close(got.reshape(want.shape), want, rtol=1e-4, atol=1e-4, what=key)


def test_golden_classification(recorded):
    _, model, params, io = recorded
    todo = [(t.name, t) for t in tasks(model, "classification")]
    todo += [(case, todo[0][1]) for case in ("constant_cls",) if f"{case}/y" in io]
    for case, task in todo:
        y, _ = apply(model, params, bvt(io[f"{case}/x"]), 0, None, task.name)
        np.testing.assert_allclose(y, io[f"{case}/y"], rtol=RTOL, atol=1e-4, err_msg=case)


def test_golden_imputation(recorded):
    _, model, params, io = recorded
    task = tasks(model, "imputation")[0]
    ready = speaking_for(model, task.dataset)
    for case in (task.name, "imputation_points"):
        if f"{case}/y" in io:
            x, mask = io[f"{case}/x_masked"], io[f"{case}/mask"]
            check(apply(ready, params, bvt(x), 0, bvt(mask), "")[0], io[f"{case}/y"], x, case)


def test_golden_anomaly(recorded):
    _, model, params, io = recorded
    todo = [(t.name, t) for t in tasks(model, "anomaly_detection")]
    todo += [(case, todo[0][1]) for case in ("scales_anomaly",) if f"{case}/y" in io]
    for case, task in todo:
        x = io[f"{case}/x"]
        y = RECONSTRUCT(speaking_for(model, task.dataset), params, bvt(x))
        check(y, io[f"{case}/y"], x, case)
        if f"{case}/score" in io:
            score = np.square(np.asarray(y) - bvt(x)).mean(1)
            np.testing.assert_allclose(score, io[f"{case}/score"], rtol=1e-3, atol=1e-5)


def losses(model, params, io):
    """The recorded losses as functions of the params, by kind of task."""

    def named(kind):
        names = [t for t in tasks(model, kind) if f"{t.name}/x" in io]
        return names[0], speaking_for(model, names[0].dataset)

    found = {}
    for kind in ("long_term_forecast", "classification", "imputation", "anomaly_detection"):
        if f"train/{kind}/loss" not in io:
            continue
        task, ready = named(kind)
        x = bvt(io[f"{task.name}/x"])
        if kind == "long_term_forecast":
            batch = {"context": x, "target": bvt(io[f"train/{kind}/target"])}
            found[kind] = lambda p, ready=ready, batch=batch: ready.loss(p, batch)
        elif kind == "classification":
            labels = jnp.asarray(io[f"train/{kind}/target"]).reshape(-1)
            found[kind] = lambda p, ready=ready, x=x, y=labels, name=task.name: (
                optax.softmax_cross_entropy_with_integer_labels(
                    ready.classify(p, x, task=name), y
                ).mean()
            )
        elif kind == "imputation":
            true, mask = bvt(io[f"{task.name}/x_true"]), bvt(io[f"{task.name}/mask"])

            def imputed(p, ready=ready, true=true, mask=mask):
                error = jnp.square(ready.impute(p, true, mask) - true) * (mask == 0)
                return error.sum() / (mask == 0).sum()

            found[kind] = imputed
        else:
            found[kind] = lambda p, ready=ready, x=x: jnp.square(ready.reconstruct(p, x) - x).mean()
    assert found
    return found


@pytest.mark.slow
def test_golden_losses_and_gradients(recorded):
    vectors, model, params, io = recorded
    stored = vectors.arrays("grads.npz")
    shapes = trees.flatten(folders.param_shapes(model))
    for kind, loss in losses(model, params, io).items():
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        np.testing.assert_allclose(value, io[f"train/{kind}/loss"], rtol=1e-4, err_msg=kind)
        prefix = f"grad/{kind}/module."
        want = {key.removeprefix(prefix): g for key, g in stored.items() if key.startswith(prefix)}
        assert want, kind
        got, seen = trees.flatten(grads), set()
        rules = table.keys(model.config)
        # tensors without a gradient were not recorded; the positions only in their first rows
        first = {key: re.search(r"\[:,:,:(\d+)\]$", key) for key in want}
        for key, g in want.items():
            name, rows = re.sub(r"\[.*\]$", "", key), first[key]
            for pattern, target, how in rules:
                m = re.fullmatch(pattern, name)
                if m and not isinstance(how, str):
                    path, ours = m.expand(target), how.forward(g)
                    mine = np.asarray(got[path])
                    mine = mine[: int(rows[1])] if rows else mine
                    parity.check_gradient(mine, ours, f"{kind} {path}")
                    seen.add(path)
        for path in shapes.keys() - seen:
            assert np.abs(np.asarray(got[path])).max() == 0, (
                f"{kind}: {path} has a gradient, none was recorded"
            )


def test_golden_dynamic_linear(recorded):
    _, model, params, io = recorded
    head = params["generate"]
    compared = 0
    for key in [key for key in io if re.fullmatch(r"dynamic_linear/in\d+_out\d+/x", key)]:
        want = io[key.removesuffix("x") + "y"]
        layer = DynamicLinear(*head["kernel"].shape, model.config.prompt_len)
        got = layer.apply({"params": head}, jnp.asarray(io[key]), want.shape[-1])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=key)
        compared += 1
    assert compared


def test_golden_round_trips(recorded, tmp_path):
    vectors, model, *_ = recorded
    out = parity.check_round_trip(vectors.checkpoint, tmp_path)
    assert UnitsConfig.from_published(table.published(model.config)) == model.config
    assert import_checkpoint(out)[0] == model


def import_and_save(file, folder):
    import_checkpoint(file, folder)
    return folder


def test_golden_self_supervised_checkpoint(recorded, tmp_path, golden_dir):
    folder = golden_dir / "units" / "pretrain"
    if not folder.is_dir():
        pytest.skip("no self-supervised checkpoint recorded")
    file = next(folder.glob("*.pth"))
    model, params, provenance, _ = import_checkpoint(file)
    assert provenance["container"] == "student"
    assert model.config.pretrained_head and "pretrain_head" in params
    export_checkpoint(import_and_save(file, tmp_path / "model"), tmp_path / "again.pth")
    before, after = read_torch(file).content["student"], parity.tensors(tmp_path / "again.pth")
    assert before.keys() == after.keys()
    assert all(tables.same_bytes(before[key], after[key]) for key in before)
    with np.load(folder / "io.npz") as io:
        if "finetune_forecast/x" in io:
            x, want = io["finetune_forecast/x"], io["finetune_forecast/y"]
            y, _ = as_the_original(
                speaking_for(model, model.config.tasks[0].dataset), params, bvt(x), want.shape[1]
            )
            check(y, want, x, "finetune_forecast")
        compared = 0
        for task in (t.name for t in model.config.tasks if f"{t.name}/cls_out" in io):
            x, hidden = io[f"{task}/x"], io[f"{task}/token_mask"]
            mask_out, cls_out = SELF_SUPERVISED(model, params, bvt(x), hidden == 0, task)
            check(mask_out, io[f"{task}/mask_out"], x, f"{task}, tokens")
            check(cls_out, io[f"{task}/cls_out"], x, f"{task}, classification token")
            for name, y in (("loss_mask", mask_out), ("loss_cls", cls_out)):
                loss = np.square(np.asarray(y) - np.asarray(bvt(x))).mean()
                np.testing.assert_allclose(
                    loss, io[f"{task}/{name}"], rtol=1e-4, err_msg=f"{task}/{name}"
                )
            compared += 1
        assert compared or not any(key.endswith("/cls_out") for key in io)


def test_golden_initialisation(recorded):
    vectors, *_ = recorded
    stats = vectors.init_stats
    state = {
        k.removeprefix("module."): np.broadcast_to(np.float32(0), e["shape"])
        for k, e in stats["params"].items()
    }
    config, _ = table.configure(state, None, "init_stats.json")
    named = {k.removeprefix("module."): e for k, e in stats["params"].items()}
    assert parity.check_initialisation(Units(config), named) > 20


def test_published_parameter_count():
    shapes = trees.flatten(folders.param_shapes(Units(PRESETS["units_x128"])))
    unused = 3 * 2 * (128 * 128 + 128)  # projections that the file holds and nothing uses
    assert (
        sum(leaf.size for path, leaf in shapes.items() if "_tokens/" not in path) + unused
        == 3_449_144
    )
