"""TTM against vectors recorded from the original PyTorch code, every option in a set of its own (`--golden DIR`)."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import import_checkpoint, tables
from converters import ttm as converter
from converters.torch_files import CheckpointError
from ltsm_jax import trees
from ltsm_jax.models.ttm import TTM

MAIN = ("ttm", "ttm_r2")


def pytest_generate_tests(metafunc):
    """A set of vectors for each checkpoint found: those of the family, and their variants."""
    if "recorded" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden")
        found = sorted(
            str(file.parent.relative_to(root))
            for pattern in ("ttm*/meta.json", "ttm*/variants/*/meta.json")
            for file in root.glob(pattern)
        )
        sets = [pytest.param(name, marks=() if name == MAIN[0] else pytest.mark.slow) for name in found or MAIN]
        metafunc.parametrize("recorded", sets, indirect=True, scope="module")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A checkpoint, its recorded arrays, and our outputs for all cases of equal shapes, from one program."""

    vectors: Any
    model: TTM
    params: dict
    io: dict
    outputs: dict  # case -> (forecast [B, C', H], loc, scale)
    taps: dict  # of the case "normal"

    def tolerance(self):
        """Of meta.json."""
        told = self.vectors.meta["tolerance"]
        return {"rtol": told["rel"], "atol": told["abs"]}

    def cases(self):
        """Names of all cases with an output."""
        return sorted({key.split("/")[0] for key in self.io})


def bct(x_BTC):
    """The original's [batch, time, channels] in our order, and back."""
    return np.swapaxes(np.asarray(x_BTC), 1, 2)


def inputs(model, io, case):
    """Keyword arguments of `apply` for a case."""
    x = bct(io[f"{case}/in/past_values"])
    found = {"x_BCT": x, "observed_BCT": np.ones_like(x)}
    if f"{case}/in/past_observed_mask" in io:
        found["observed_BCT"] = bct(io[f"{case}/in/past_observed_mask"])
    if model.config.exogenous:
        found["future_BCH"] = bct(io[f"{case}/in/future_values"])
    if model.config.freq_vocab:
        found["freq_token"] = np.asarray(io[f"{case}/in/freq_token"], np.int32)
    if model.config.vocab:
        found["categories"] = np.asarray(io[f"{case}/in/static_categorical_values"]).astype(np.int32)
    return found


@pytest.fixture(scope="module")
def recorded(request, golden):
    vectors = golden(request.param)
    model, params = parity.load(vectors)
    model = TTM(dataclasses.replace(model.config, batch_default_scale=True))  # as the original has it
    io = vectors.arrays("io.npz")
    names = [key.split("/")[0] for key in io if key.endswith("/in/past_values")]
    names = [n for n in names if n != "rolling" and f"{n}/out/prediction_outputs" in io]
    forward = jax.jit(model.apply)
    outputs, taps = {}, {}
    alone = model.config.scaling == "mean"  # there the original lets rows see each other
    groups: dict = {}
    for name in names:
        groups.setdefault((io[f"{name}/in/past_values"].shape[1:], name if alone else ""), []).append(name)
    for group in groups.values():
        given = [inputs(model, io, name) for name in group]
        y, steps = forward(params, **{key: np.concatenate([g[key] for g in given]) for key in given[0]})
        first = 0
        for name, g in zip(group, given, strict=True):
            rows = slice(first, first + g["x_BCT"].shape[0])
            first = rows.stop
            outputs[name] = (y[rows], steps["loc"][rows], steps["scale"][rows])
            if name == "normal":
                taps = {tap: np.asarray(value) for tap, value in steps.items()} | {"rows": rows}
    return Recorded(vectors, model, params, io, outputs, taps)


def test_golden_outputs(recorded):
    model, io = recorded.model, recorded.io
    compared = 0
    channels = model.config.forecast_channels
    for case, (y, loc, scale) in recorded.outputs.items():
        x = np.asarray(inputs(model, io, case)["x_BCT"])
        unit = np.maximum(x.std(-1, keepdims=True), 1.0) if case == "scales" else np.ones((1, 1, 1))
        pick = unit if channels is None or unit.shape[1] == 1 else unit[:, np.array(channels)]
        tolerance = recorded.tolerance()
        for name, got in (("prediction_outputs", y), ("loc", loc), ("scale", scale)):
            if f"{case}/out/{name}" not in io:
                continue
            want = np.asarray(bct(io[f"{case}/out/{name}"]))
            got = np.asarray(got if name == "prediction_outputs" or channels is None else got[:, np.array(channels)])
            parity.close(got / pick, want / pick, **tolerance, what=f"{case}/{name}")
            compared += 1
    assert compared >= 3


MIXERS = {"channel_feature_mixer": "channel_mixer", "patch_mixer": "patch_mixer", "feature_mixer": "feature_mixer"}
STEPS = {
    "norm": "norm",
    "norm.norm": "norm",
    "norm_attn": "norm_attn",
    "norm_attn.norm": "norm_attn",
    "self_attn_layer": "attn",
    "mlp": "mlp",
    "mlp.fc1": "up",
    "mlp.dropout1": "hidden",
    "mlp.fc2": "mlp",
    "mlp.dropout2": "mlp",
    "gating_block": "gate",
    "gating_block.attn_layer": "gate/logits",
    "gating_block.attn_softmax": "gate/weights",
}
PLACES = {  # the original's module -> our tap, and how ours has to be turned
    "backbone.scaler": ("scaled", (0, 2, 1)),
    "backbone.patching": ("patches", (1, 2, 0, 3)),
    "backbone.encoder.patcher": ("embed", (1, 2, 0, 3)),
    "backbone.encoder.freq_mod": ("freq", (0, 1)),
    "backbone.encoder.positional_encoder": ("position", (1, 2, 0, 3)),
    "backbone.encoder.mlp_mixer_encoder": ("encoder", (1, 2, 0, 3)),
    "decoder.adapter": ("decoder/adapter", (1, 2, 0, 3)),
    "decoder.decoder_raw_embedding": ("decoder/raw_embed", (1, 2, 0, 3)),
    "decoder.decoder_cat_embedding_layer": ("decoder/categories", (1, 2, 0, 3)),
    "head.base_forecast_block": ("head", (0, 1, 2)),
    "head": ("forecast", (0, 2, 1)),
    "head.fcm_block": ("forecast", (0, 2, 1)),
    "head.fcm_block.fcm_patch_block": ("fcm/windows", (1, 0, 2, 3)),
    "head.fcm_block.fcm_embedding": ("fcm/embed", (1, 2, 0, 3)),
    "head.fcm_block.exog_mixer": ("fcm/mixers", (1, 2, 0, 3)),
    "head.fcm_block.fcm_gating_block": ("fcm/gate", (0, 1, 2, 3)),
    "head.fcm_block.fcm_gating_block.attn_layer": ("fcm/gate/logits", (0, 1, 2, 3)),
    "head.fcm_block.fcm_gating_block.attn_softmax": ("fcm/gate/weights", (0, 1, 2, 3)),
    "head.fcm_block.mlp": ("fcm/out", (0, 1, 2)),
}
STACKS = {
    "backbone.encoder.mlp_mixer_encoder.": "encoder/",
    "decoder.decoder_block.": "decoder/",
    "head.fcm_block.exog_mixer.": "fcm/mixers/",
}


def place(module):
    """Our tap of an original module, and the order of its axes there."""
    if module in PLACES:
        return PLACES[module]
    stack = next(theirs for theirs in STACKS if module.startswith(theirs))
    inner = r"mixers\.(\d+)(?:\.mixer_layers\.(\d+))?(?:\.(\w+_mixer))?(?:\.(.+))?"
    match = re.fullmatch(inner, module.removeprefix(stack))
    assert match, module
    block, layer, mixer, step = match.groups()
    return STACKS[stack], block, layer, MIXERS.get(mixer, ""), STEPS[step] if step else ""


def turned(taps, module):
    """Our tap of an original module, its axes in the original's order."""
    found = place(module)
    if len(found) == 2:
        name, axes = found
        value = taps[name].transpose(axes)
    else:
        stack, block, layer, mixer, step = found
        inner = f"block_{block}" + (f"_layer_{layer}" if layer else "")
        inner = inner if stack + inner in taps else f"layer_{block}"
        name = stack + "/".join(filter(None, (inner, mixer, step)))
        axes = (1, 2, 0, 3)
        if step.startswith(("up", "hidden", "mlp", "gate")):
            axes = {"patch_mixer": (1, 2, 3, 0), "channel_mixer": (1, 3, 0, 2)}.get(mixer, axes)
        value = taps[name].transpose(axes)
        if step == "attn":
            value = value.reshape(-1, *value.shape[2:])
    return value


def test_golden_intermediates(recorded):
    io, taps = recorded.io, recorded.taps
    rows = taps["rows"]
    compared = 0
    prefix = "normal/out/act/"
    extra = {
        "normal/out/backbone_hidden_state": ("encoder", (1, 2, 0, 3)),
        "normal/out/decoder_hidden_state": ("decoder", (1, 2, 0, 3)),
    }
    for key, want in io.items():
        if key.startswith(prefix):
            got = turned(taps, key.removeprefix(prefix))
        elif key in extra:
            name, axes = extra[key]
            got = taps[name].transpose(axes)
        else:
            continue
        batch = got.shape[0] // (taps["scaled"].shape[0])
        if got.ndim == 4 and got.shape[0] == 1:  # the gate of the forecast mixer
            got = got[0, rows]
        else:
            got = got[rows.start * batch : rows.stop * batch]
        parity.close(got, want, **recorded.tolerance(), what=key)
        compared += 1
    assert compared > 5


def batch_of(model, io, case):
    """A case as a training batch."""
    x, target = bct(io[f"{case}/in/past_values"]), bct(io[f"{case}/in/future_values"])
    if f"{case}/in/future_observed_mask" in io:
        target = jnp.where(bct(io[f"{case}/in/future_observed_mask"]) > 0, target, jnp.nan)
    batch = {"context": x, "target": target}
    given = inputs(model, io, case)
    return batch | {name: given[name] for name in ("freq_token", "categories") if name in given}


def losses_of(recorded):
    """case -> the model with the loss that was recorded for it."""
    found = {}
    for case in recorded.cases():
        if f"{case}/out/loss" not in recorded.io or f"{case}/in/future_values" not in recorded.io:
            continue
        kind = case.removeprefix("loss_").split("_")[0] if case.startswith("loss_") else recorded.model.config.loss
        changes = {"loss": kind} | {
            field: float(recorded.io[f"{case}/in/{field}"])
            for field in ("quantile", "huber_delta")
            if f"{case}/in/{field}" in recorded.io
        }
        found[case] = TTM(dataclasses.replace(recorded.model.config, **changes))
    return found


def test_golden_losses(recorded):
    """Of the recorded kind, on the forecasts of the program that was run for all cases."""
    found = losses_of(recorded)
    assert len(found) >= 2
    for case, model in found.items():
        got = model.error(recorded.outputs[case][0], batch_of(model, recorded.io, case), model.config.loss)
        np.testing.assert_allclose(
            got, recorded.io[f"{case}/out/loss"], rtol=recorded.vectors.meta["tolerance"]["rel"], err_msg=case
        )


@pytest.mark.slow
def test_golden_gradients(recorded):
    """Of every parameter; and the value of the loss, through `loss` itself."""
    model, io = recorded.model, recorded.io
    batch = batch_of(model, io, "normal")
    value, got = jax.jit(jax.value_and_grad(lambda p: model.loss(p, batch)))(recorded.params)
    np.testing.assert_allclose(value, io["normal/out/loss"], rtol=recorded.vectors.meta["tolerance"]["rel"])
    stored = {k: v for k, v in recorded.vectors.arrays("grads.npz").items() if k.startswith("grad/")}
    stored = {key.removeprefix("grad/"): leaf for key, leaf in stored.items()}
    rules = [rule for rule in converter.keys(model.config) if rule[1] != tables.BUFFER]
    flat = trees.flatten(got)
    data = {path for path in flat if model.fixed and re.search(model.fixed, path)}  # no gradient there
    keys = {found[0]: path for path in data if (found := tables.key_of(rules, path))}
    rest = {key: np.zeros(flat[path].shape, np.float32) for key, path in keys.items() if key not in stored}
    want = trees.flatten(tables.to_params(rules, stored | rest, got, what="gradients").params)
    for path in flat.keys() - data:
        parity.check_gradient(flat[path], want[path], path)
    assert len(flat) > len(data)


def test_golden_rollout(recorded):
    io, model = recorded.io, recorded.model
    if "rolling/out/prediction_outputs" not in io:
        pytest.skip("no roll-out recorded")
    want = bct(io["rolling/out/prediction_outputs"])
    given = inputs(model, io, "rolling")
    asked = int(io["rolling/in/requested_prediction_length"])
    roll = jax.jit(model.roll_out, static_argnums=3)
    got = roll(
        recorded.params,
        given["x_BCT"],
        given["observed_BCT"],
        want.shape[-1],
        freq_token=given.get("freq_token"),
        categories=given.get("categories"),
    )
    parity.close(got, want, **recorded.tolerance(), what="rolling")
    assert want.shape[-1] == -(-asked // model.horizon) * model.horizon, "the original gives whole forecasts"


def test_golden_missing_values_are_zeros_that_do_not_count(recorded):
    """What `predict` makes of NaN is what the original was given: zeros there, and the mask."""
    if "masked_zero_filled/in/past_values" not in recorded.io:
        pytest.skip("no such case recorded")
    given = inputs(recorded.model, recorded.io, "masked_zero_filled")
    x, observed = recorded.model.filled(jnp.where(given["observed_BCT"] > 0, given["x_BCT"], jnp.nan))
    np.testing.assert_array_equal(x, given["x_BCT"])
    np.testing.assert_array_equal(observed, given["observed_BCT"])


def test_golden_round_trip(recorded, tmp_path):
    """Tensors come back byte for byte, and config.json says the same model."""
    out = parity.check_round_trip(recorded.vectors.checkpoint, tmp_path)
    assert import_checkpoint(out)[0] == import_checkpoint(recorded.vectors.checkpoint)[0]
    told = json.loads((tmp_path / "config.json").read_text())
    before = recorded.vectors.config
    for field in ("num_patches", "context_length", "mode", "decoder_mode", "scaling", "loss", "num_layers"):
        assert told[field] == before[field], field
    with pytest.raises(CheckpointError, match=r"Put the original config\.json"):
        converter.configure(parity.tensors(recorded.vectors.checkpoint), None, "here")


@pytest.mark.parametrize("name", MAIN)
def test_golden_initialisation(golden, name):
    stats = golden(name).init_stats
    told, problems = converter._told(stats["config"])
    assert not problems
    assert parity.check_initialisation(TTM(converter._config(told)), stats["parameters"]) > 10
