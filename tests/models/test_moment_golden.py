"""MOMENT against vectors recorded from momentfm: every output and intermediate, losses, gradients,
initialisation.
"""

import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import converter, import_checkpoint, tables
from converters.torch_files import read_safetensors, write_safetensors
from ltsm_jax import trees
from ltsm_jax.models import folders
from ltsm_jax.models.moment import Moment, random_mask

TAPS = {
    "normalizer": "scaled",
    "tokenizer": "patches",
    "patch_embedding.value_embedding": "value_embed",
    "patch_embedding": "embed",
    "encoder.final_layer_norm": "encoder/norm",
    "encoder": "encoder",
    "head.linear": "head",
    "head": "head",
    "normalizer@1": "in units",
}
BLOCK = {
    "": "",
    ".layer.0.layer_norm": "/norm1",
    ".layer.0.SelfAttention": "/attn",
    ".layer.0": "/after_attn",
    ".layer.1.layer_norm": "/norm2",
    ".layer.1.DenseReluDense": "/ffn",
    ".layer.1": "",
}


@pytest.fixture(scope="module")
def recorded(golden):
    vectors = golden("moment")
    return vectors, vectors.arrays("io.npz")


@pytest.fixture(scope="module")
def loaded(recorded, tmp_path_factory):
    """`loaded(task)`: (model, params) of the checkpoint, under the recorded head of a task of
    tasks.json.
    """
    vectors, _ = recorded
    tasks = json.loads((vectors.folder / "tasks.json").read_text())

    @functools.cache
    def read(task):
        file = vectors.folder / f"head_{task}.safetensors"
        if not file.is_file():
            return parity.load(vectors)
        name, options = tasks[task]
        folder = tmp_path_factory.mktemp(task)
        write_safetensors(
            folder / "model.safetensors",
            parity.tensors(vectors.folder / "model.safetensors") | read_safetensors(file),
        )
        (folder / "config.json").write_text(
            json.dumps(vectors.config | options | {"task_name": name})
        )
        model, params, *_ = import_checkpoint(folder)
        assert model.config.head == name
        return model, params

    return read


def cases(io, *tasks):
    """Names of the recorded cases of a task."""
    found = sorted({key.split("/")[0] for key in io if key.split("__")[0] in tasks})
    if not found:
        pytest.skip(f"no case of {tasks} recorded")
    return found


def inputs(io, case):
    """x [B, C, T], and the masks as [B, 1, T]."""
    x = io[f"{case}/in/x_enc"]
    input_mask = io.get(f"{case}/in/input_mask", np.ones((x.shape[0], x.shape[-1])))
    mask = io.get(f"{case}/in/mask", io.get(f"{case}/out/pretrain_mask"))
    return (
        x,
        input_mask[:, None].astype(np.float32),
        None if mask is None else mask[:, None].astype(np.float32),
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x, input_mask, mask=None):
    return model.apply(params, x, input_mask, mask)


def together(run, io, names):
    """{case: what `run(x, input_mask, mask)` gives}: cases of one length are one batch, since rows
    are independent.
    """
    found = {}
    lengths = {name: io[f"{name}/in/x_enc"].shape[1:] for name in names}
    for length in set(lengths.values()):
        group = [name for name in names if lengths[name] == length]
        parts = [inputs(io, name) for name in group]
        columns = [
            None if any(p is None for p in column) else jnp.concatenate(column)
            for column in zip(*parts)
        ]
        out = run(*columns)
        at = 0
        for name, (x, *_) in zip(group, parts):
            rows = slice(at, at + len(x))
            at += len(x)
            found[name] = jax.tree.map(operator.itemgetter(rows), out)
    return found


def check(vectors, io, key, got, *, fold=None):
    """Within the recorded tolerance, of the array's own size in each series (see the note on
    constants there). Of a series of which nothing is visible the original gives NaN, we a number.
    """
    want, got = io[key], np.asarray(got)
    got = got.reshape(fold or got.shape)
    assert got.shape == want.shape, key
    case = key.split("/")[0]
    blind = np.isnan(want)
    if blind.any():
        _, input_mask, mask = inputs(io, case)
        assert not (input_mask * (1 if mask is None else mask))[blind.any((1, 2))].any(), (
            f"{key}: NaN in the original"
        )
        assert np.isfinite(got).all(), key
    tolerance = vectors.meta["tolerance"]
    size = np.abs(np.where(blind, 0, want)).max(-1, keepdims=True) if want.ndim else np.abs(want)
    error = np.abs(np.where(blind, 0, got - want))
    allowed = tolerance["abs"] + tolerance["rel"] * size
    parity.note(error, allowed)
    assert (error <= allowed).all(), f"{key}: {error.max()} of {size.max()}"
    return float((error / allowed).max(initial=0))


def check_acts(vectors, io, case, taps, output):
    """Every recorded intermediate of a case."""
    taps = taps | {"in units": output}
    prefix = f"{case}/out/act/"
    for key in [k for k in io if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.startswith("encoder.block."):
            i, rest = (
                name.removeprefix("encoder.block.").split(".", 1)
                if name.count(".") > 2
                else (name[14:], "")
            )
            ours = f"encoder/layer_{i}{BLOCK['.' + rest if rest else '']}"
        else:
            ours = TAPS[name]
        check(vectors, io, key, taps[ours], fold=io[key].shape)


def test_golden_reconstruction(recorded, loaded):
    vectors, io = recorded
    model, params = loaded("reconstruction")
    names = cases(io, "reconstruction")
    found = together(functools.partial(apply, model, params), io, names)
    for case in names:
        y, taps = found[case]
        check(vectors, io, f"{case}/out/reconstruction", y)
        check_acts(vectors, io, case, taps, y)


def test_golden_default_mask(recorded):
    """Without a mask all is visible, except blocks of 8 steps (whatever the patch length) that
    padding touches.
    """
    _, io = recorded
    for case in cases(io, "reconstruction"):
        if f"{case}/in/mask" not in io:
            _, input_mask, _ = inputs(io, case)
            found = random_mask(None, jnp.asarray(input_mask), 0.0, 8)
            np.testing.assert_array_equal(found[:, 0], io[f"{case}/out/pretrain_mask"])


def test_golden_anomaly(recorded, loaded):
    """`reconstruct` and the scores made of it; under padding through `apply`, which takes
    the mask.
    """
    vectors, io = recorded
    model, params = loaded("reconstruction")
    names = cases(io, "reconstruct", "anomaly")
    run = lambda x, data, _: apply(model, params, x, data, jnp.ones_like(data))[0]  # noqa: E731
    found = together(run, io, names)
    for case in names:
        x, input_mask, _ = inputs(io, case)
        y = found[case]
        check(vectors, io, f"{case}/out/reconstruction", y)
        if f"{case}/out/anomaly_scores" in io:
            error = np.asarray(y) - x
            squared = str(io[f"{case}/in/anomaly_criterion"]) == "mse"
            check(vectors, io, f"{case}/out/anomaly_scores", error**2 if squared else np.abs(error))
        if input_mask.all() and x.shape[-1] <= model.context_len:
            again = jax.jit(model.reconstruct)(params, jnp.asarray(x))
            check(vectors, io, f"{case}/out/reconstruction", again)


def test_golden_short_forecast(recorded, loaded):
    vectors, io = recorded
    model, params = loaded("reconstruction")
    for case in cases(io, "short_forecast"):
        x, input_mask, _ = inputs(io, case)
        horizon = int(io[f"{case}/in/forecast_horizon"])
        run = jax.jit(functools.partial(model.short_forecast, horizon=horizon))
        y, taps = run(params, jnp.asarray(x), input_mask=jnp.asarray(input_mask))
        check(vectors, io, f"{case}/out/forecast", y)
        check(vectors, io, f"{case}/out/reconstruction", taps["reconstruction"])
        np.testing.assert_array_equal(taps["input_mask"][:, 0], io[f"{case}/out/input_mask_after"])
        if horizon <= model.horizon and x.shape[-1] == model.context_len and not input_mask.all():
            shortest = (
                input_mask[:, 0].sum(-1).argmin()
            )  # a short context is padded as the original's data sets do
            context = jnp.asarray(x[shortest : shortest + 1, :, input_mask[shortest, 0] == 1])
            point = jax.jit(functools.partial(model.predict, horizon=horizon))(
                params, context
            ).point
            check(
                vectors,
                io | {"row": io[f"{case}/out/forecast"][shortest : shortest + 1]},
                "row",
                point,
            )


def test_golden_forecasting_head(recorded, loaded):
    vectors, io = recorded
    names = cases(io, "forecasting")
    model, params = loaded("forecasting")
    found = together(lambda x, data, _: apply(model, params, x, data), io, names)
    for case in names:
        y, taps = found[case]
        check(vectors, io, f"{case}/out/forecast", y)
        check_acts(vectors, io, case, taps, y)
    whole = [case for case in names if inputs(io, case)[1].all()]
    predict = jax.jit(lambda x: model.predict(params, x, model.horizon).point)
    again = together(lambda x, *_: predict(x), io, whole)
    for case in whole:
        check(vectors, io, f"{case}/out/forecast", again[case])


def test_golden_classification(recorded, loaded):
    vectors, io = recorded
    tasks = {key.split("__")[0] for key in io if key.startswith("classification")}
    for task in sorted(tasks) or pytest.skip("no classification recorded"):
        model, params = loaded(task)
        names = cases(io, task)
        found = together(functools.partial(apply, model, params), io, names)
        for case in names:
            logits, taps = found[case]
            check(vectors, io, f"{case}/out/logits", logits)
            check(vectors, io, f"{case}/out/embeddings", taps["features"])
            check_acts(vectors, io, case, taps, logits)


def test_golden_embedding(recorded, loaded):
    vectors, io = recorded
    model, params = loaded("embedding")
    names = cases(io, "embedding")
    embed = jax.jit(
        lambda *x: {
            reduction: model.embed_window(params, *x, reduction) for reduction in ("mean", "none")
        }
    )
    found = together(lambda x, data, _: embed(x, data), io, names)
    for case in names:
        reduction = str(io.get(f"{case}/in/reduction", "mean"))
        check(vectors, io, f"{case}/out/embeddings", found[case][reduction])
        for key in [k for k in io if k.startswith(f"{case}/out/act/")]:
            assert key.endswith("act/encoder"), key
            check(vectors, io, key, found[case]["none"], fold=io[key].shape)


def losses(model, io, grads, task):
    """The recorded loss of a task, of the params."""
    x, input_mask, mask = map(
        jnp.asarray, (v if v is not None else 0 for v in inputs(io, f"{task}__normal"))
    )
    batch = {"context": x}
    if task == "reconstruction":
        return lambda q: model.masked_loss(q, batch, input_mask, mask)
    if task == "forecasting":
        return lambda q: model.loss(q, batch | {"target": jnp.asarray(grads["forecasting/target"])})
    return lambda q: model.loss(q, batch | {"label": jnp.asarray(grads[f"{task}/labels"])})


@pytest.mark.parametrize("task", ["reconstruction", "forecasting", "classification"])
def test_golden_loss_and_gradients(recorded, loaded, task):
    vectors, io = recorded
    grads = vectors.arrays("grads.npz")
    if f"{task}/loss" not in grads:
        pytest.skip(f"no loss of {task} recorded")
    model, params = loaded(task)
    loss = losses(model, io, grads, task)
    tolerance = vectors.meta["tolerance"]
    stored = {
        k.removeprefix(f"{task}/grad/"): v
        for k, v in grads.items()
        if k.startswith(f"{task}/grad/")
    }
    for key in vectors.meta["zero_grad_params"][task]:
        assert not stored[key].any(), key
    stored["patch_embedding.position_embedding.pe"] = np.zeros(
        (1, *params["position_table"].shape), np.float32
    )
    rules = [
        (key, tables.DROP, "") if to == tables.BUFFER else (key, to, how)
        for key, to, how in converter("moment").keys(model.config)
    ]
    want = tables.to_params(rules, stored, folders.param_shapes(model), what=task).params
    value = parity.check_gradients(loss, params, trees.flatten(want))
    np.testing.assert_allclose(value, grads[f"{task}/loss"], tolerance["rel"], tolerance["abs"])


def test_golden_round_trip(recorded, tmp_path):
    vectors, _ = recorded
    out = parity.check_round_trip(vectors.folder / "model.safetensors", tmp_path)
    again = json.loads(out.with_name("config.json").read_text())
    ours, theirs = again["t5_config"], vectors.config["t5_config"]
    assert {k: ours[k] for k in theirs if k in ours} == {k: theirs[k] for k in theirs if k in ours}
    left_out = {"t5_config", "transformer_backbone", "d_model"}
    told = {k: v for k, v in vectors.config.items() if k not in left_out}
    assert {k: again[k] for k in told if k in again} == told


@pytest.mark.parametrize("head", [None, "forecasting", "classification"])
def test_golden_initialisation(recorded, head):
    vectors, _ = recorded
    stats = vectors.init_stats
    config = converter("moment").configure({}, stats["config"], "init_stats.json")[0]
    model, entries = Moment(config), dict(stats["parameters"])
    if head is None:
        entries = {k: v for k, v in entries.items() if not k.startswith("head_")}
        assert parity.check_initialisation(model, entries) == len(entries) - 1, (
            "all but the token embedding"
        )
        return
    weight = entries.get(f"head_{head}.linear.weight")
    if weight is None:
        pytest.skip(f"no {head} head in init_stats.json")
    outputs, width = weight["shape"]
    sizes = (
        {"horizon": outputs}
        if head == "forecasting"
        else {"n_classes": outputs, "reduction": "mean"}
    )
    if head == "classification" and width != config.d_model:
        sizes = {"n_classes": outputs, "n_variates": width // config.d_model}
    if head == "forecasting":
        assert width == config.d_model * config.n_patches
    entries = {
        f"head.linear.{k}": v | {"bound": width**-0.5}
        for k in ("weight", "bias")
        if (v := entries.get(f"head_{head}.linear.{k}"))
    }
    fresh = model.with_head({}, head, jax.random.key(5), **sizes)[1]["head"]
    for key, entry in entries.items():
        x = np.asarray(fresh["kernel"].T if key.endswith("weight") else fresh["bias"], np.float64)
        b, n = entry["bound"], x.size
        assert list(x.shape) == entry["shape"]
        assert np.abs(x).max() <= b * (1 + 1e-6)
        assert abs(x.mean()) <= 5 * b / np.sqrt(3 * n)
        assert abs(x.std() - b / np.sqrt(3)) <= 5 * b / np.sqrt(15 * n)
