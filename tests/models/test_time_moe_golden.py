"""Time-MoE against vectors recorded from the original PyTorch code (`--golden DIR` names another
set).
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import import_checkpoint
from converters import time_moe as converter
from ltsm_jax import trees
from ltsm_jax.layers import experts
from ltsm_jax.layers.causal import greedy_sizes
from ltsm_jax.layers.mlp import ACTIVATIONS
from ltsm_jax.models.time_moe import TimeMoe, TimeMoeConfig, TimeMoeNet

RTOL, ATOL = 1e-4, 2e-5  # of meta.json


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("time_moe")
    return vectors, *parity.load(vectors), vectors.arrays("io.npz")


@pytest.fixture(scope="module")
def forward(recorded):
    """Heads and steps of the recorded input, compiled once."""
    _, model, params, io = recorded
    return apply(model, params, rows(io["normal/x"]))


def rows(x_BL):
    """[B, L] as our [B, 1, L]."""
    return jnp.asarray(x_BL)[:, None]


def check(got, want, what="", atol=ATOL):
    parity.close(got, want, rtol=RTOL, atol=atol, what=what)


apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)
generate = jax.jit(lambda model, *args: model.generate(*args), static_argnums=(0, 3))
predict = jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3))


def test_golden_intermediates(recorded, forward):
    _, model, params, io = recorded
    _, taps = forward
    theirs = {"input_norm": "norm1", "attn_out": "attn", "post_norm": "norm2", "ffn_out": "ffn"}
    theirs |= {
        "shared_expert_before_gate": "shared",
        "router_logits": "router",
        "topk_weights": "router_weights",
    }
    theirs |= {"topk_experts": "router_experts", "attn_weights": "attn_weights"}
    names = [key.removeprefix("normal/act/") for key in io if key.startswith("normal/act/")]
    assert names
    for name in names:
        want = io[f"normal/act/{name}"]
        layer = re.fullmatch(r"layer(\d+)_(\w+)", name)
        if layer is None:
            check(taps[{"embed": "embed", "final_norm": "norm"}[name]], want, name)
        elif layer[2] == "out":
            check(taps[f"layer_{layer[1]}"], want, name)
        elif expert := re.fullmatch(r"expert(\d+)_on_all_tokens", layer[2]):
            x_TD = taps[f"layer_{layer[1]}/norm2"].reshape(-1, model.config.d_model)
            stacked = params[f"layer_{layer[1]}"]["mixture"]["experts"]
            kernels = (stacked["gate"], stacked["up"], stacked["down"])
            ones, chosen = jnp.ones((len(x_TD), 1)), jnp.full((len(x_TD), 1), int(expert[1]))
            act = ACTIVATIONS[model.config.activation]
            check(
                experts.mixture(x_TD, kernels, ones, chosen, act, "dense"),
                want.reshape(x_TD.shape),
                name,
            )
        elif layer[2] == "topk_experts":
            np.testing.assert_array_equal(
                taps[f"layer_{layer[1]}/router_experts"], want, err_msg=name
            )
        else:
            got = taps[f"layer_{layer[1]}/{theirs[layer[2]]}"]
            check(got.reshape(want.shape), want, name)


def test_golden_heads(recorded, forward):
    _, model, _, io = recorded
    heads = {h: y[:, 0] for h, y in zip(model.config.horizons, forward[0], strict=True)}
    found = [key for key in io if key.startswith("normal/logits_")]
    assert len(found) >= len(heads)
    for key in found:
        name = key.removeprefix("normal/logits_")
        if name == "default":
            want = model.config.horizons[0]
        elif name.startswith("max"):
            want = greedy_sizes(int(name[3:]), model.config.horizons)[0]
        else:
            want = int(name[1:])
        check(heads[want][..., : io[key].shape[-1]], io[key], key)


@pytest.mark.slow
def test_golden_generate(recorded):
    _, model, params, io = recorded
    found = [key for key in io if key.startswith("generate/")]
    assert found
    for key in found:
        check(generate(model, params, jnp.asarray(io["normal/x"]), io[key].shape[1]), io[key], key)
    for case in [case for case in ("one_point", "constant") if f"{case}/x" in io]:
        check(
            generate(model, params, jnp.asarray(io[f"{case}/x"]), io[f"{case}/y"].shape[1]),
            io[f"{case}/y"],
            case,
        )


def test_golden_scaled_forecast_is_predict(recorded):
    _, model, params, io = recorded
    x, y = io["scales/x"], io["scales/y"]
    scale = x.std(-1, ddof=1, keepdims=True) + 1e-6
    got = np.asarray(predict(model, params, rows(x), y.shape[1]).point[:, 0])
    allowed = RTOL * np.abs(y) + ATOL * scale
    parity.note(np.abs(got - y), allowed)
    assert (np.abs(got - y) <= allowed).all()


def test_golden_left_padding(recorded):
    _, model, params, io = recorded
    if "left_pad/x" not in io:
        pytest.skip("no left padding in this set")
    x, mask = io["left_pad/x"], io["left_pad/attention_mask"]
    heads, _ = apply(model, params, rows(x), rows(mask))
    want = io["left_pad/logits"]
    got = np.asarray(heads[model.config.horizons.index(want.shape[-1])][:, 0])
    check(got[mask == 1], want[mask == 1])
    horizon = io["left_pad/generate"].shape[1]
    check(
        generate(model, params, jnp.asarray(x), horizon, jnp.asarray(mask)), io["left_pad/generate"]
    )


def test_golden_bfloat16_file(recorded, tmp_path):
    vectors, model, _, io = recorded
    if not (vectors.folder / "bf16").is_dir():
        pytest.skip("no bfloat16 file in this set")
    half, params, provenance, _ = import_checkpoint(vectors.folder / "bf16")
    assert half == model and provenance["dtype"] == "bfloat16"
    heads, _ = apply(half, params, rows(io["normal/x"]))
    check(heads[-1][:, 0], io["bf16/y_float32_compute"])
    # computed in bfloat16 too: the rounding of two programs differs, and a router's close decision
    # may
    net = jax.jit(lambda p, x: TimeMoeNet(half.config).apply({"params": p}, x)[0][-1])
    got, want = (
        net(params, jnp.asarray(io["normal/x"], jnp.bfloat16)),
        io["bf16/y_bfloat16_compute"],
    )
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - want)
    assert np.median(error) <= 5e-2 * np.abs(want).mean()
    parity.check_round_trip(vectors.folder / "bf16" / "model.safetensors", tmp_path)


def losses(vectors, model, io):
    """The recorded losses as functions of the params. Zeros past the end count as labels where
    there is no mask.
    """
    x, labels, cfg = rows(io["train/x"]), rows(io["train/labels"]), model.config
    pad = ((0, 0), (0, 0), (0, max(cfg.horizons) - 1))
    zeros, mask = jnp.pad(labels, pad), jnp.pad(rows(io["train/loss_masks"]), pad)
    found = {
        "loss": lambda q: model.token_loss(q, x, zeros),
        "loss_masked": lambda q: model.token_loss(q, x, zeros, mask),
        "loss_no_aux": lambda q: model.token_loss(q, x, zeros, aux=False),
    }
    if not cfg.dense:
        found["aux_loss"] = lambda q: model.aux_loss(model.apply(q, x)[1])
    for j, h in enumerate(cfg.horizons):
        # one head alone: the mean over heads of a model that has no other
        alone = TimeMoe(dataclasses.replace(cfg, horizons=(h,)))
        found[f"loss_head_h{h}"] = lambda q, j=j, m=alone: m.token_loss(
            _with_head(q, j), x, zeros, aux=False
        )
    about = vectors.meta["io"].get("train/loss_attention_mask", {}).get("meaning", "")
    if told := re.search(r"(\d+) leading zeros in row (\d+)", about):
        seen = jnp.ones_like(x).at[int(told[2]), :, : int(told[1])].set(0)
        found["loss_attention_mask"] = lambda q: model.token_loss(q, x, zeros, observed_BCT=seen)
    return found


def _with_head(params, j):
    body = {name: leaf for name, leaf in params.items() if not name.startswith("head_")}
    return body | {"head_0": params[f"head_{j}"]}


def test_golden_losses(recorded):
    vectors, model, params, io = recorded
    names = {
        key.removeprefix("train/") for key in io if key.startswith("train/") and io[key].ndim == 0
    }
    ours = losses(vectors, model, io)
    assert names <= ours.keys(), "every recorded loss is compared"
    found = jax.jit(lambda q: {name: ours[name](q) for name in names})(params)
    for name in names:
        np.testing.assert_allclose(found[name], io[f"train/{name}"], rtol=RTOL, err_msg=name)


@pytest.mark.parametrize(
    "kind",
    ["grad", *(pytest.param(k, marks=pytest.mark.slow) for k in ("grad_masked", "grad_no_aux"))],
)
def test_golden_gradients(recorded, kind):
    vectors, model, params, io = recorded
    if kind != "grad" and not any(
        key.startswith(f"{kind}/") for key in vectors.arrays("grads.npz")
    ):
        pytest.skip(f"no {kind} in this set")
    want = parity.recorded_gradients(vectors, model, f"{kind}/")
    parity.check_gradients(losses(vectors, model, io)[kind.replace("grad", "loss")], params, want)


@pytest.mark.slow
def test_golden_forms_agree(recorded, forward):
    """Every way to compute the experts gives the recorded numbers."""
    _, model, params, io = recorded
    run = jax.jit(lambda net, p, x: net.apply({"params": p}, x)[1]["norm"], static_argnums=0)
    forms: tuple[experts.Form, ...] = ("dense", "blocks", "ragged")
    for form in forms:
        got = run(TimeMoeNet(model.config, form), params, jnp.asarray(io["normal/x"]))
        check(got, io["normal/act/final_norm"], form)


def test_golden_init_statistics(recorded):
    vectors, _, _, _ = recorded
    stats = vectors.init_stats["params"]
    n_experts, d = stats["model.layers.0.ffn_layer.gate.weight"]["shape"]
    inner = stats["model.layers.0.ffn_layer.shared_expert.up_proj.weight"]["shape"][0]
    config = {
        "hidden_size": d,
        "num_hidden_layers": 1 + max(int(key.split(".")[2]) for key in stats if ".layers." in key),
        "num_attention_heads": 8,
        "intermediate_size": inner,
        "num_experts": n_experts,
        "num_experts_per_tok": inner
        // stats["model.layers.0.ffn_layer.experts.0.up_proj.weight"]["shape"][0],
        "horizon_lengths": [
            e["shape"][0] for key, e in stats.items() if key.startswith("lm_heads.")
        ],
    }
    assert parity.check_initialisation(TimeMoe(TimeMoeConfig.from_published(config)), stats) == len(
        stats
    )


def test_golden_round_trip(recorded, tmp_path):
    vectors, model, params, _ = recorded
    out = parity.check_round_trip(vectors.checkpoint, tmp_path)
    again, _ = converter.configure(
        parity.tensors(out), json.loads(out.with_name("config.json").read_text()), "again"
    )
    assert again == model.config
    assert trees.count(params) == sum(x.size for x in parity.tensors(out).values())
