"""Timer of the hub against vectors recorded from the original PyTorch code (`--golden DIR` names
another set).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import timer_hf as converter
from ltsm_jax.layers.causal import greedy_sizes
from ltsm_jax.models.timer_hf import TimerHf, TimerHfConfig, unbiased_moments

RTOL, ATOL = 1e-4, 2e-5  # of meta.json, relative to the scale of the series


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("timer_hf")
    return vectors, *parity.load(vectors), vectors.arrays("io.npz")


def rows(x_BL):
    """[B, L] as our [B, 1, L]."""
    return jnp.asarray(x_BL)[:, None]


def check(got, want, x_BL=None, atol=ATOL, what=""):
    """Equal within the recorded tolerance, each row by the standard deviation of its own series x
    (1 without).
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, what
    scale = 1.0 if x_BL is None else np.asarray(x_BL).std(-1).reshape(-1, *(1,) * (want.ndim - 1))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=what)
    excess = np.nan_to_num(np.abs(got - want) - RTOL * np.abs(want) - atol * scale)
    parity.note(np.abs(got - want), np.abs(got - want) - excess)
    assert (excess <= 0).all(), (
        f"{what}: off by {np.nanmax(np.abs(got - want))}, {excess.max()} more than allowed"
    )


apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)
generate = jax.jit(
    lambda model, *args: model.generate_as_original(*args), static_argnums=(0, 3, 4, 5)
)
scaled = jax.jit(lambda model, *args: model.generate(*args), static_argnums=(0, 3))
predict = jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3))


def test_golden_intermediates_and_heads(recorded):
    _, model, params, io = recorded
    heads, taps = apply(model, params, rows(io["normal/x"]))
    ours = {"embed": "embed"}
    for i in range(len(model.config.layers)):
        theirs = {"_attn_out": "/attn", "_norm1": "/norm1", "_ffn_out": "/mlp", "_out": ""}
        ours |= {f"layer{i}{name}": f"layer_{i}{tap}" for name, tap in theirs.items()}
    names = {key.removeprefix("normal/act/") for key in io if key.startswith("normal/act/")}
    assert names == set(ours), "every recorded step is compared, and no other"
    for name in names:
        check(taps[ours[name]], io[f"normal/act/{name}"], what=name)
    check(taps["norm"], io["normal/hidden"])
    found = 0
    for q, y in zip(model.config.horizons, heads, strict=True):
        key = f"normal/head{q}_all_positions"
        if key in io:
            check(y[:, 0], io[key], what=key)
            found += 1
    assert found


def test_golden_scale(recorded):
    _, _, _, io = recorded
    mean, std = unbiased_moments(jnp.asarray(io["normal/x_raw"]), 0.0)
    check(mean, io["normal/mean"], io["normal/x_raw"])
    check(std, io["normal/std"], io["normal/x_raw"])
    check((io["normal/x_raw"] - mean) / std, io["normal/x"])


def test_golden_single_forward(recorded):
    """The original's `forward`: one head, at the last position, with and without its
    own scaling.
    """
    _, model, params, io = recorded
    raw, x = io["normal/x_raw"], io["normal/x"]
    first = model.config.horizons[0]
    check(generate(model, params, jnp.asarray(raw), first), io["normal/forward_revin"], raw)
    check(generate(model, params, jnp.asarray(x), first, False), io["normal/forward_norevin"])
    heads, _ = apply(model, params, rows(x))
    for key in [key for key in io if key.startswith("normal/forward_max")]:
        n = io[key].shape[1]
        chosen = model.config.horizons.index(greedy_sizes(n, model.config.horizons)[0])
        check(heads[chosen][:, 0, -1, :n], io[key], what=key)


def cases(io, group):
    return sorted({key.split("/")[0] for key in io if key.split("/")[0].startswith(group)})


@pytest.mark.slow
def test_golden_generate(recorded):
    """`generate` in all its ways, with the scaling that the original has in each; constant series
    give its NaN.
    """
    _, model, params, io = recorded
    found = cases(io, "gen_")
    assert found
    for case in found:
        x, y = io[f"{case}/x"], io[f"{case}/y"]
        got = generate(
            model, params, jnp.asarray(x), y.shape[1], "norevin" not in case, "nocache" not in case
        )
        check(got, y, x, 1e-3 if case == "gen_long_cache" else ATOL, what=case)
        whole = not any(
            q % model.config.patch_len for q in greedy_sizes(y.shape[1], model.config.horizons)
        )
        if "norevin" in case and whole:  # without its scaling, the original's way is ours
            check(scaled(model, params, jnp.asarray(x), y.shape[1]), y, x, what=case)


def test_golden_prune_then_finetune_is_predict(recorded):
    _, model, params, io = recorded
    found = cases(io, "ptf")
    assert found
    for case in found:
        x, y = io[f"{case}/x"], io[f"{case}/y"]
        if any(
            q % model.config.patch_len for q in greedy_sizes(y.shape[1], model.config.horizons)[:-1]
        ):
            mean, std = unbiased_moments(
                jnp.asarray(x), 1e-6
            )  # the original keeps the patches' old borders
            got = generate(model, params, (x - mean) / std, y.shape[1], False) * std + mean
        else:
            got = predict(model, params, rows(x), y.shape[1]).point[:, 0]
        check(got, y, x, what=case)


def test_golden_left_padding(recorded):
    _, model, params, io = recorded
    heads, _ = apply(
        model, params, rows(io["normal/x"]), jnp.asarray(io["left_pad/attention_mask"])[:, None]
    )
    check(heads[0][:, 0, -1], io["left_pad/y"])


def losses(model, io):
    """The recorded losses as functions of the params."""
    x, labels = rows(io["train/x"]), rows(io["train/labels"])
    mean, std = unbiased_moments(x, 1e-6)
    mask = rows(io["train/loss_masks"])
    return {
        "loss": lambda q: model.token_loss(q, x, labels),
        "loss_ptf": lambda q: model.token_loss(q, (x - mean) / std, labels),
        "loss_masked": lambda q: model.token_loss(q, x, labels, weight_BCN=mask),
    }


def test_golden_losses(recorded):
    _, model, params, io = recorded
    for name, loss in losses(model, io).items():
        if name == "loss":
            continue  # compared beside its gradients
        np.testing.assert_allclose(
            jax.jit(loss)(params), io[f"train/{name}"], rtol=RTOL, err_msg=name
        )
    heads, _ = apply(model, params, rows(io["train/x"]))
    check(heads[0][:, 0], io["train/logits"])


@pytest.mark.parametrize(
    "kind",
    ["grad", *(pytest.param(k, marks=pytest.mark.slow) for k in ("grad_ptf", "grad_masked"))],
)
def test_golden_loss_and_gradients(recorded, kind):
    vectors, model, params, io = recorded
    want = parity.recorded_gradients(vectors, model, f"{kind}/")
    name = kind.replace("grad", "loss")
    value = parity.check_gradients(losses(model, io)[name], params, want)
    np.testing.assert_allclose(value, io[f"train/{name}"], rtol=RTOL, err_msg=name)


def test_golden_own_loss_is_in_the_scale_of_the_context(recorded):
    _, model, params, io = recorded
    x, p = rows(io["train/x"]), model.config.patch_len
    ahead = rows(io["train/labels"])[..., -model.horizon :]
    mean, std = unbiased_moments(x, 1e-6)
    labels = (jnp.concatenate([x[..., p:], ahead], -1) - mean) / std
    want = jax.jit(model.token_loss)(params, (x - mean) / std, labels)
    np.testing.assert_allclose(
        jax.jit(model.loss)(params, {"context": x, "target": ahead}), want, rtol=1e-6
    )


def test_golden_init_statistics(recorded):
    vectors, _, _, _ = recorded
    stats = vectors.init_stats["params"]
    layers = 1 + max(int(key.split(".")[2]) for key in stats if ".layers." in key)
    d, p = stats[converter.EMBED]["shape"]
    config = {
        "hidden_size": d,
        "input_token_len": p,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "intermediate_size": stats["model.layers.0.ffn_layer.up_proj.weight"]["shape"][0],
        "output_token_lens": [
            e["shape"][0] for key, e in stats.items() if key.startswith("lm_heads.")
        ],
    }
    model = TimerHf(TimerHfConfig.from_published(config))
    assert parity.check_initialisation(model, stats) == len(stats)


def test_golden_round_trip(recorded, tmp_path):
    vectors, model, *_ = recorded
    out = parity.check_round_trip(vectors.checkpoint, tmp_path)
    again, _ = converter.configure(
        parity.tensors(out), json.loads(out.with_name("config.json").read_text()), "again"
    )
    assert again == model.config
