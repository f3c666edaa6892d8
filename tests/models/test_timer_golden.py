"""Timer against vectors recorded from the original PyTorch code (`--golden DIR` names
another set).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

import ltsm_jax
from converters import import_checkpoint, tables
from converters import timer as converter
from ltsm_jax import trees
from ltsm_jax.models import folders
from ltsm_jax.models.timer import sinusoids
from ltsm_jax.tasks import anomaly, imputation

RTOL, ATOL = 1e-4, 2e-5  # of meta.json; ATOL is relative to the scale of the series


@pytest.fixture(scope="module", params=["timer"])
def recorded(request, golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden(request.param)
    model, params, *_ = import_checkpoint(vectors.checkpoint)
    return vectors, model, params, vectors.arrays("io.npz")


def bct(x_BTC):
    """The original's [batch, time, variates] in our order."""
    return jnp.swapaxes(jnp.asarray(x_BTC), 1, 2)


def check(got_BCT, want_BTC, x_BTC, atol=None):
    """Equal within the recorded tolerance, each series by the standard deviation of its
    own input.
    """
    got, want, scale = (
        np.asarray(got_BCT),
        np.asarray(bct(want_BTC)),
        np.asarray(bct(x_BTC)).std(-1, keepdims=True),
    )
    assert got.shape == want.shape
    excess = np.abs(got - want) - RTOL * np.abs(want) - (ATOL * scale if atol is None else atol)
    parity.note(np.abs(got - want), np.abs(got - want) - excess)
    assert (excess <= 0).all(), (
        f"off by {np.abs(got - want).max()} at most, {excess.max()} more than allowed"
    )


def close(got, want):
    """Equal within the recorded tolerance; both are in the instance scale, that is of order 1."""
    assert np.shape(got) == np.shape(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=RTOL, atol=ATOL)


# compiled: one program is faster than some hundred operations one by one
predict = jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3))
reconstruct = jax.jit(
    lambda model, *args, ims: model.reconstruct(*args, ims=ims),
    static_argnums=0,
    static_argnames="ims",
)
impute = jax.jit(
    lambda model, *args, ims: model.impute(*args, ims=ims), static_argnums=0, static_argnames="ims"
)


@pytest.mark.parametrize(
    "case",
    ["normal", "output_attention", "scales", "constant", "one_patch", "not_multiple", "longer"],
)
def test_golden_output(recorded, case):
    _, model, params, io = recorded
    x = io["normal/x"] if case == "output_attention" else io[f"{case}/x"]
    check(
        jax.jit(model.apply)(params, bct(x))[0],
        io[f"{case}/y"],
        x,
        atol=1e-4 if case == "constant" else None,
    )


def test_golden_intermediates(recorded):
    _, model, params, io = recorded
    _, taps = jax.jit(model.apply)(params, bct(io["normal/x"]))
    ours = {
        "patches": "patches",
        "value_embed": "value_embed",
        "embed": "embed",
        "final_norm": "norm",
        "proj": "head",
    }
    for i in range(len(model.config.layers)):
        theirs = {
            "_attn_weights": "/attn_weights",
            "_attn_sublayer": "/attn",
            "_norm1": "/norm1",
            "": "",
        }
        ours |= {f"block{i}{name}": f"layer_{i}{tap}" for name, tap in theirs.items()}
        close(taps[f"layer_{i}/attn_weights"], io[f"output_attention/attn{i}"])
    names = {key.removeprefix("normal/act/") for key in io if key.startswith("normal/act/")}
    assert names == set(ours), "every recorded step is compared, and no other"
    for name in names:
        close(taps[ours[name]], io[f"normal/act/{name}"])
    close(taps["embed"], io["normal/encoder_top"])
    close(taps["norm"], io["normal/encoder_bottom"])
    close(taps["mean"], bct(io["normal/means"]))
    close(taps["std"], bct(io["normal/stdev"]))
    table = io["normal/pe_first16"]
    close(sinusoids(*table.shape), table)


@pytest.mark.parametrize("case", ["rollout_multiple", "rollout_remainder"])
def test_golden_rollout(recorded, case):
    _, model, params, io = recorded
    x, steps = io[f"{case}/x"], io[f"{case}/y_all_steps"]
    want = io[f"{case}/y" if f"{case}/y" in io else f"{case}/y_ltsm"]
    check(predict(model, params, bct(x), steps.shape[1]).point, steps, x)
    check(predict(model, params, bct(x), want.shape[1]).point, want, x)
    first = min(model.horizon, want.shape[1])
    check(predict(model, params, bct(x), first).point, want[:, :first], x)


def test_golden_anomaly(recorded):
    _, model, params, io = recorded
    x = io["anomaly/x"]
    check(reconstruct(model, params, bct(x), ims=False), io["anomaly/y_full_window"], x)
    check(reconstruct(model, params, bct(x), ims=True), io["anomaly/y_ims"], x)
    p, window = model.config.patch_len, bct(x)
    for ims, name in ((False, "score_dms"), (True, "score_ims")):
        expected = reconstruct(model, params, window, ims=ims)
        actual = window[..., p:] if ims else window
        if ims:  # the last token of the window is not scored
            expected, actual = expected[..., :-p], actual[..., :-p]
        error = jnp.square(expected - actual).reshape(*window.shape[:2], -1, p).mean((0, 1, 3))
        np.testing.assert_allclose(error, io[f"anomaly/{name}"], rtol=RTOL)


@pytest.mark.parametrize(
    "case",
    [
        "imputation",
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ("imputation_points", "imputation_nomask")
        ),
    ],
)
def test_golden_imputation(recorded, case):
    _, model, params, io = recorded
    x = io[f"{case}/x"]
    mask = io.get(f"{case}/mask", np.ones_like(x))
    y, taps = jax.jit(model.apply)(params, bct(x), bct(mask))
    check(y, io[f"{case}/y"], x)
    check(impute(model, params, bct(x), bct(mask), ims=False), io[f"{case}/y"], x)
    p = model.config.patch_len
    shifted = np.concatenate([x[:, :p], io[f"{case}/y"][:, :-p]], axis=1)
    check(impute(model, params, bct(x), bct(mask), ims=True), shifted, x)
    if case == "imputation":
        close(taps["mean"][..., 0], io["imputation/means"])
        close(taps["std"][..., 0], io["imputation/stdev"])


def losses(model, io):
    """The recorded training losses as functions of the params."""
    direct = {"context": bct(io["train/x"]), "target": bct(io["train/y_dms"])}
    tokens = {
        "context": bct(io["train/x"]),
        "target": bct(io["train/y_ims"]),
    }  # recorded with a target of its own
    truth, observed = bct(io["imputation/x_true"]), bct(io["imputation/mask"])
    window = {"context": bct(io["anomaly/x"]), "target": bct(io["anomaly/x"])[..., :0]}

    def hidden(q, ims):
        error, scored = imputation.hidden_error(model, q, truth, observed == 1, None, False, ims)
        return jnp.square(error).sum() / scored.sum()

    return {
        "loss_dms": lambda q: model.point_loss(q, direct),
        "loss_ims": lambda q: model.token_loss(q, tokens),
        "loss_imputation_dms": lambda q: hidden(q, ims=False),
        "loss_imputation_ims": lambda q: hidden(q, ims=True),
        "loss_anomaly_dms": lambda q: anomaly.loss_fn(model, ims=False)(q, window, None, False),
        "loss_anomaly_ims": lambda q: anomaly.loss_fn(model, ims=True)(q, window, None, False),
    }


@pytest.mark.parametrize("name", ["anomaly_dms", "anomaly_ims"])
def test_golden_loss(recorded, name):
    """The losses without recorded gradients; the others are compared beside theirs."""
    _, model, params, io = recorded
    np.testing.assert_allclose(
        jax.jit(losses(model, io)[f"loss_{name}"])(params), io[f"train/loss_{name}"], rtol=RTOL
    )


def test_golden_next_token_loss_moves_the_series_by_one_patch(recorded):
    _, model, params, io = recorded
    x, p = np.asarray(bct(io["train/x"])), model.config.patch_len
    new = np.asarray(bct(io["train/y_ims"]))[..., :p]
    shifted = np.concatenate([x[..., p:], new], axis=-1)
    want = jax.jit(model.token_loss)(params, {"context": x, "target": shifted})
    np.testing.assert_allclose(
        jax.jit(model.loss)(params, {"context": x, "target": new}), want, rtol=1e-6
    )


GRADIENTS = {
    "grad": "dms",
    "grad_ims": "ims",
    "grad_imputation": "imputation_dms",
    "grad_imputation_ims": "imputation_ims",
}


@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("grad", "grad_ims") else pytest.param(k, marks=pytest.mark.slow)
        for k in GRADIENTS
    ],
)
def test_golden_loss_and_gradients(recorded, kind):
    vectors, model, params, io = recorded
    stored = {
        k.split("/", 1)[1]: v
        for k, v in vectors.arrays("grads.npz").items()
        if k.split("/", 1)[0] == kind
    }
    assert stored, "recorded for this loss"
    layout = converter.recognise(stored)
    stripped, _, problems = layout.strip(stored)
    rules = [rule for rule in converter.keys(model.config) if rule[1] != tables.BUFFER]
    want = tables.to_params(
        rules, stripped, folders.param_shapes(model), what=kind, problems=problems
    ).params
    name = f"loss_{GRADIENTS[kind]}"
    value, gradients = jax.jit(jax.value_and_grad(losses(model, io)[name]))(params)
    np.testing.assert_allclose(value, io[f"train/{name}"], rtol=RTOL)
    got = trees.flatten(gradients)
    for path, leaf in trees.flatten(want).items():
        allowed = 1e-3 * np.abs(leaf).max() + 1e-6
        assert np.abs(np.asarray(got[path]) - leaf).max() <= allowed, path
    assert got.keys() == trees.flatten(want).keys(), "of every parameter"


def test_golden_load_equals_import(recorded):
    vectors, model, params, _ = recorded
    again_model, again = ltsm_jax.load(vectors.checkpoint)
    assert again_model == model
    chex.assert_trees_all_equal(again, params)


def test_golden_init_statistics(recorded):
    """A fresh draw has the recorded distribution, parameter by parameter.

    For n draws from U(-b, b): the mean has standard error b / sqrt(3n), the standard deviation
    about b / sqrt(15n), and the extremes lie within the bound; 5 standard errors over some 40
    tensors let a true init fail once in 10^4.
    """
    vectors, model, *_ = recorded
    stats = vectors.init_stats["params"]
    state = {key: np.zeros(entry["shape"], np.float32) for key, entry in stats.items()}
    layout = converter.recognise(state)
    stripped, *_ = layout.strip(state)
    config, _ = converter.configure(stripped, None, "init_stats.json")
    fresh = jax.jit(type(model)(config).init)(jax.random.key(20))
    rules = [rule for rule in converter.keys(config) if rule[1] != tables.BUFFER]
    drawn, wider = tables.to_state(rules, fresh, "float32")
    assert not wider
    learned = {key: entry for key, entry in stats.items() if "buffer" not in entry["distribution"]}
    named = {layout.prefix + key: value for key, value in drawn.items()}
    assert named.keys() == learned.keys()
    for key, entry in learned.items():
        x = np.asarray(named[key], np.float64)
        assert list(x.shape) == entry["shape"], key
        if "bound" in entry:
            b, n = entry["bound"], x.size
            assert np.abs(x).max() <= b * (1 + 1e-6), key
            assert np.abs(x).max() >= b * (1 - 12 / n), key  # P(all below) = (1 - 12/n)^n = e^-12
            assert abs(x.mean()) <= 5 * b / np.sqrt(3 * n), key
            assert abs(x.std() - b / np.sqrt(3)) <= 5 * b / np.sqrt(15 * n), key
        else:  # layer norms: constants
            assert entry["std"] == 0, f"{key}: {entry['distribution']}"
            np.testing.assert_array_equal(x, entry["mean"], err_msg=key)


def test_golden_predict_is_the_last_patch_under_jit(recorded):
    _, model, params, io = recorded
    x, p = io["normal/x"], model.config.patch_len
    check(predict(model, params, bct(x), p).point, io["normal/y"][:, -p:], x)
