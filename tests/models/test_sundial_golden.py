"""Sundial against vectors recorded from the original PyTorch code (`--golden DIR` names another
set).

Every random number of the original is recorded; ours go in as arguments.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import sundial as converter
from ltsm_jax.models.sundial import Sundial, SundialConfig, moments, time_features

RTOL, ATOL, SAMPLED = (
    1e-4,
    5e-5,
    1e-4,
)  # of meta.json; after many sampling steps relative to the scale of the series


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("sundial")
    return vectors, *parity.load(vectors), vectors.arrays("io.npz")


def rows(x_BL):
    """[B, L] as our [B, 1, L]."""
    return jnp.asarray(x_BL)[:, None]


def check(got, want, what="", atol=ATOL):
    parity.close(got, want, rtol=RTOL, atol=atol, what=what)


def check_sampled(got_BSH, want_BSH, x_BL, what=""):
    """Equal within the recorded tolerance, each row by the standard deviation of its own series."""
    got, scale = np.asarray(got_BSH), np.asarray(x_BL).std(-1)[:, None, None] + 1e-5
    assert got.shape == want_BSH.shape, what
    excess = np.abs(got - want_BSH) - RTOL * np.abs(want_BSH) - SAMPLED * scale
    parity.note(np.abs(got - want_BSH), np.abs(got - want_BSH) - excess)
    assert (excess <= 0).all(), f"{what}: off by {np.abs(got - want_BSH).max()}"


apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)
flow = jax.jit(lambda model, *args: model.flow(*args), static_argnums=0)
sample = jax.jit(lambda model, *args: model.sample(*args), static_argnums=0)
generate = jax.jit(lambda model, *args: model.generate(*args), static_argnums=(0, 3, 5))


def draws(noise, b):
    """Recorded noise [S*B, Q], sample-major, as [B, S, Q]."""
    return jnp.swapaxes(jnp.asarray(noise).reshape(-1, b, noise.shape[-1]), 0, 1)


def test_golden_intermediates(recorded):
    _, model, params, io = recorded
    z, taps = apply(model, params, rows(io["normal/x"]))
    ours = {
        "embed_hidden_layer": "embed_hidden",
        "embed_residual_layer": "embed_residual",
        "embed": "embed",
    }
    for i in range(len(model.config.layers)):
        theirs = {
            "_norm1": "/norm1",
            "_attn_out": "/attn",
            "_norm2": "/norm2",
            "_ffn_out": "/mlp",
            "_out": "",
        }
        ours |= {f"layer{i}{name}": f"layer_{i}{tap}" for name, tap in theirs.items()}
    names = {key.removeprefix("normal/act/") for key in io if key.startswith("normal/act/")}
    assert names and names <= set(ours), "every recorded step is compared"
    for name in names:
        check(taps[ours[name]], io[f"normal/act/{name}"], name)
    check(z[:, 0], io["normal/hidden"])
    mean, std = moments(jnp.asarray(io["normal/x_raw"]))
    scale = np.abs(io["normal/x_raw"]).max()
    np.testing.assert_allclose(mean, io["normal/mean"], rtol=RTOL, atol=ATOL * scale)
    np.testing.assert_allclose(std, io["normal/stdev"], rtol=RTOL)


def test_golden_left_padding(recorded):
    _, model, params, io = recorded
    z, taps = apply(model, params, rows(io["embed_left_pad/x"]))
    check(taps["embed"], io["embed_left_pad/embed"])
    check(z[:, 0], io["embed_left_pad/hidden"])


def test_golden_flow_network(recorded):
    _, model, params, io = recorded
    y, taps = flow(
        model, params, rows(io["net/x"]), jnp.asarray(io["net/t"])[:, None], rows(io["net/z"])
    )
    check(y[:, 0], io["net/y"])
    check(time_features(jnp.asarray(io["net/t"])), io["net/time_freq"])
    names = [key.removeprefix("net/act/") for key in io if key.startswith("net/act/")]
    assert names
    for name in names:
        check(taps[name][:, 0], io[f"net/act/{name}"], name)


def test_golden_sampling(recorded):
    _, model, params, io = recorded
    b = len(io["sample/z"])
    got = sample(model, params, jnp.asarray(io["sample/z"]), draws(io["sample/noise"], b))
    check(got, io["sample/y"], atol=SAMPLED)
    check(draws(io["sample/path"][-1], b), io["sample/y"], atol=SAMPLED)
    assert len(io["sample/path"]) == model.config.sampling_steps + 1


def test_golden_generate(recorded):
    _, model, params, io = recorded
    cases = sorted({key.split("/")[0] for key in io if key.startswith("gen_")})
    assert cases
    for case in cases:
        x, y = io[f"{case}/x"], io[f"{case}/y"]
        steps = sorted(
            (key for key in io if re.fullmatch(rf"{case}/noise\d+", key)),
            key=lambda k: int(k.split("noise")[1]),
        )
        noise = jnp.stack([draws(io[key], len(x)) for key in steps])
        got = generate(model, params, jnp.asarray(x), y.shape[-1], noise, "norevin" in case)
        check_sampled(got, y, x, case)


def losses(model, io):
    """The recorded losses, with their draws, as functions of the params."""
    x, labels, cfg = rows(io["train/x"]), rows(io["train/labels"]), model.config
    b, n = x.shape[0], x.shape[-1] // cfg.patch_len
    noise = jnp.asarray(io["train/noise"]).reshape(cfg.train_draws, b * n, -1)
    t = jnp.asarray(io["train/t"]).reshape(cfg.train_draws, b * n)
    mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    std = jnp.where(std > 1e-2, std, 1.0)  # the rule of the original's training forward
    # the original gives token r of the b-major list the point mask of row r mod B
    points = jnp.asarray(io["train/mask_y"])[jnp.arange(b * n) % b].reshape(b, 1, n, -1)
    masks = {"weight_BCN": rows(io["train/loss_masks"]), "points_BCNQ": points}
    return {
        "loss": lambda q: model.token_loss(q, x, labels, noise, t),
        "loss_revin": lambda q: model.token_loss(
            q, (x - mean) / std, (labels - mean) / std, noise, t
        ),
        "loss_masked": lambda q: model.token_loss(q, x, labels, noise, t, **masks),
    }


def test_golden_losses(recorded):
    _, model, params, io = recorded
    for name, loss in losses(model, io).items():
        if name == "loss":
            continue  # compared beside its gradients
        np.testing.assert_allclose(
            jax.jit(loss)(params), io[f"train/{name}"], rtol=RTOL, err_msg=name
        )


@pytest.mark.parametrize(
    "kind",
    ["grad", *(pytest.param(k, marks=pytest.mark.slow) for k in ("grad_revin", "grad_masked"))],
)
def test_golden_loss_and_gradients(recorded, kind):
    vectors, model, params, io = recorded
    want = parity.recorded_gradients(vectors, model, f"{kind}/")
    name = kind.replace("grad", "loss")
    value = parity.check_gradients(losses(model, io)[name], params, want)
    np.testing.assert_allclose(value, io[f"train/{name}"], rtol=RTOL, err_msg=name)


def test_golden_init_statistics(recorded):
    vectors, *_ = recorded
    stats = vectors.init_stats["params"]
    d, both = stats[converter.EMBED]["shape"]
    config = {
        "hidden_size": d,
        "input_token_len": both // 2,
        "num_hidden_layers": 1 + max(int(key.split(".")[2]) for key in stats if ".layers." in key),
        "flow_loss_depth": 1
        + max(int(key.split(".")[3]) for key in stats if ".res_blocks." in key),
        "num_attention_heads": 8,
        "intermediate_size": stats["model.layers.0.ffn_layer.up_proj.weight"]["shape"][0],
        "output_token_lens": [stats[converter.FLOW_IN]["shape"][1]],
    }
    assert parity.check_initialisation(Sundial(SundialConfig.from_published(config)), stats) == len(
        stats
    )


def test_golden_round_trip(recorded, tmp_path):
    vectors, model, *_ = recorded
    out = parity.check_round_trip(vectors.checkpoint, tmp_path)
    again, _ = converter.configure(
        parity.tensors(out), json.loads(out.with_name("config.json").read_text()), "again"
    )
    assert again == model.config
