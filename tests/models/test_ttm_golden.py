"""TTM against vectors recorded from the original PyTorch code, every option in a set of its own
(`--golden DIR`).
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
import ttm_vectors
from ttm_vectors import bct

from converters import import_checkpoint, tables
from converters import ttm as converter
from converters.torch_files import CheckpointError
from ltsm_jax import trees
from ltsm_jax.models import ttm
from ltsm_jax.models.ttm import TTM

MAIN = ("ttm", "ttm_r2")


def pytest_generate_tests(metafunc):
    """A set of vectors for each checkpoint found: those of the family, and their variants."""
    if "recorded" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden")
        sets = ttm_vectors.sets_of(root, MAIN, decomposed=False)
        metafunc.parametrize("recorded", sets, indirect=True, scope="module")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A checkpoint, its recorded arrays, and our outputs for all cases of equal shapes, from one
    program.
    """

    vectors: Any
    model: TTM
    params: dict
    io: dict
    outputs: dict  # case -> {name of an output: array}, in our order of axes
    taps: dict  # of the case "normal"

    def cases(self):
        """Names of all cases with an output."""
        return sorted({key.split("/")[0] for key in self.io})


def inputs(model, io, case):
    """Keyword arguments of `apply` for a case."""
    return ttm_vectors.inputs(model.config, io, case, padded=True)


@pytest.fixture(scope="module")
def recorded(request, golden):
    vectors = golden(request.param)
    model, params = parity.load(vectors)
    model = TTM(
        dataclasses.replace(model.config, batch_default_scale=True)
    )  # as the original has it
    io = vectors.arrays("io.npz")
    names = [key.split("/")[0] for key in io if key.endswith("/in/past_values")]
    names = [n for n in names if n != "rolling" and f"{n}/out/prediction_outputs" in io]
    names += [
        n
        for n in sorted({key.split("/")[0] for key in io})
        if n.startswith("loss_") and n not in names
    ]
    outputs, taps = {}, {}
    alone = model.config.scaling == "mean"  # there the original lets rows see each other
    groups: dict = {}
    for name in names:
        length = ttm_vectors.changed(model.config, io, name).filter_len
        shape = io[f"{name}/in/past_values"].shape[1:]
        groups.setdefault((shape, length, name if alone else ""), []).append(name)
    for (_, length, _), group in groups.items():
        given = [inputs(model, io, name) for name in group]
        forward = jax.jit(TTM(dataclasses.replace(model.config, filter_len=length)).apply)
        y, steps = forward(
            params, **{key: np.concatenate([g[key] for g in given]) for key in given[0]}
        )
        first = 0
        for name, g in zip(group, given, strict=True):
            rows = slice(first, first + g["x_BCT"].shape[0])
            first = rows.stop
            found = {"point": y[rows], "loc": steps["loc"][rows], "scale": steps["scale"][rows]}
            outputs[name] = found | (
                {"quantiles": steps["quantiles"][rows]} if "quantiles" in steps else {}
            )
            if name == "normal":
                taps = {tap: np.asarray(value) for tap, value in steps.items()} | {"rows": rows}
                if "spectrum_up" in taps:
                    taps["spectrum_hidden"] = np.maximum(taps["spectrum_up"], 0)
    return Recorded(vectors, model, params, io, outputs, taps)


def test_golden_outputs(recorded):
    model, io = recorded.model, recorded.io
    compared = 0
    channels = model.config.forecast_channels
    for case, found in recorded.outputs.items():
        unit = ttm_vectors.unit_of(case, inputs(model, io, case)["x_BCT"])
        unit = unit if channels is None else unit[:, np.array(channels)]
        for name, ours in (
            ("prediction_outputs", "point"),
            ("quantile_outputs", "quantiles"),
            ("loc", "loc"),
            ("scale", "scale"),
        ):
            if f"{case}/out/{name}" not in io:
                continue
            got, by = np.asarray(found[ours]), unit
            if ours == "quantiles":
                want, by = ttm_vectors.quantiles(io[f"{case}/out/{name}"]), unit[..., None]
            else:
                want = bct(io[f"{case}/out/{name}"])
            if ours in ("loc", "scale") and channels is not None:
                got = got[:, np.array(channels)]
            limits = ttm_vectors.tolerance(recorded.vectors, case, want / by)
            parity.close(got / by, want / by, **limits, what=f"{case}/{name}")
            compared += 1
    assert compared >= 3


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
            got = ttm_vectors.turned(taps, key.removeprefix(prefix))
        elif key in extra:
            name, axes = extra[key]
            got = taps[name].transpose(axes)
        else:
            continue
        batch = got.shape[0] // (taps["scaled"].shape[0])
        got = got[rows.start * batch : rows.stop * batch]
        parity.close(got, want, **ttm_vectors.tolerance(recorded.vectors, "normal", want), what=key)
        compared += 1
    assert compared > 5


def test_golden_losses(recorded):
    """Of the recorded kind, on the forecasts of the programs that were run for all cases."""
    io, compared = recorded.io, 0
    for case in recorded.cases():
        if f"{case}/out/loss" not in io or f"{case}/in/future_values" not in io:
            continue
        config = ttm_vectors.changed(recorded.model.config, io, case)
        batch = ttm_vectors.batch_of(config, io, case)
        found = recorded.outputs[case]
        targets = TTM(config).targets(batch)
        got = ttm.own_error(config, found["point"], found.get("quantiles"), targets, batch)
        np.testing.assert_allclose(
            got,
            io[f"{case}/out/loss"],
            rtol=recorded.vectors.meta["tolerance"]["rel"],
            err_msg=case,
        )
        compared += 1
    assert compared >= 2


@pytest.mark.slow
def test_golden_gradients(recorded):
    """Of every parameter; and the value of the loss, through `loss` itself."""
    model, io = recorded.model, recorded.io
    batch = ttm_vectors.batch_of(model.config, io, "normal")
    value, got = jax.jit(jax.value_and_grad(lambda p: model.loss(p, batch)))(recorded.params)
    np.testing.assert_allclose(
        value, io["normal/out/loss"], rtol=recorded.vectors.meta["tolerance"]["rel"]
    )
    stored = {
        k: v for k, v in recorded.vectors.arrays("grads.npz").items() if k.startswith("grad/")
    }
    stored = {key.removeprefix("grad/"): leaf for key, leaf in stored.items()}
    rules = [rule for rule in converter.keys(model.config) if rule[1] != tables.BUFFER]
    flat = trees.flatten(got)
    data = {
        path for path in flat if model.fixed and re.search(model.fixed, path)
    }  # no gradient there
    keys = {found[0]: path for path in data if (found := tables.key_of(rules, path))}
    rest = {
        key: np.zeros(flat[path].shape, np.float32)
        for key, path in keys.items()
        if key not in stored
    }
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
    limits = ttm_vectors.tolerance(recorded.vectors, "rolling", want)
    parity.close(got.point, want, **limits, what="rolling")
    assert want.shape[-1] == -(-asked // model.horizon) * model.horizon, (
        "the original gives whole forecasts"
    )


def test_golden_missing_values_are_zeros_that_do_not_count(recorded):
    """What `predict` makes of NaN is what the original was given: zeros there, and the mask."""
    if "masked_zero_filled/in/past_values" not in recorded.io:
        pytest.skip("no such case recorded")
    given = inputs(recorded.model, recorded.io, "masked_zero_filled")
    x, observed = recorded.model.filled(
        jnp.where(given["observed_BCT"] > 0, given["x_BCT"], jnp.nan)
    )
    np.testing.assert_array_equal(x, given["x_BCT"])
    np.testing.assert_array_equal(observed, given["observed_BCT"])


def test_golden_round_trip(recorded, tmp_path):
    """Tensors come back byte for byte, and config.json says the same model."""
    out = parity.check_round_trip(recorded.vectors.checkpoint, tmp_path)
    assert import_checkpoint(out)[0] == import_checkpoint(recorded.vectors.checkpoint)[0]
    told = json.loads((tmp_path / "config.json").read_text())
    before = recorded.vectors.config
    for field in (
        "num_patches",
        "context_length",
        "mode",
        "decoder_mode",
        "scaling",
        "loss",
        "num_layers",
    ):
        assert told[field] == before[field], field
    with pytest.raises(CheckpointError, match=r"Put the original config\.json"):
        converter.configure(parity.tensors(recorded.vectors.checkpoint), None, "here")


@pytest.mark.parametrize("name", MAIN)
def test_golden_initialisation(golden, name):
    stats = golden(name).init_stats
    told, problems = converter.read_fields(stats["config"])
    assert not problems
    assert parity.check_initialisation(TTM(converter.config_of(told)), stats["parameters"]) > 10
