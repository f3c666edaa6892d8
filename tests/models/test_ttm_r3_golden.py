"""Decomposed TTM r3 against vectors recorded from the original, every set (`--golden DIR`)."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import ttm_vectors
from ttm_vectors import bct

from converters import import_checkpoint
from converters import ttm_r3 as converter
from converters.torch_files import CheckpointError
from ltsm_jax.models import ttm_r3
from ltsm_jax.models.ttm_r3 import PARTS, TTMR3

MAIN = ("ttm_r3",)
WEIGHTS = {
    "joint_loss_weight": "joint_weight",
    "trend_loss_weight": "trend_weight",
    "residual_loss_weight": "residual_weight",
}


def pytest_generate_tests(metafunc):
    """A set of vectors for each decomposed checkpoint found."""
    if "recorded" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden")
        sets = ttm_vectors.sets_of(root, MAIN, decomposed=True)
        metafunc.parametrize("recorded", sets, indirect=True, scope="module")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A checkpoint, its recorded arrays, and our forecasts and steps of its cases."""

    vectors: Any
    model: TTMR3
    params: dict
    io: dict
    outputs: dict  # case -> {tap or "point": array}, in our order of axes; filled by `found`

    def alike(self, case):
        """The cases that are one program with this one: of equal shapes."""
        return [name for name in self.cases() if self._shape(name) == self._shape(case)]

    def cases(self):
        """Names of all cases of the whole model."""
        return [
            name
            for name in sorted({key.split("/")[0] for key in self.io})
            if name not in ("rolling", "lowess")
        ]

    def _shape(self, case):
        cfg = self.model_of(case).config
        alone = case if cfg.scaling == "mean" else ""  # there the original lets rows see each other
        return self.io[f"{case}/in/past_values"].shape[1:], cfg.trend.filter_len, alone

    def found(self, case):
        """Our forecast and steps of a case, which are computed with those of all cases alike."""
        if case in self.outputs:
            return self.outputs[case]
        group = self.alike(case)
        given = [inputs(self.model, self.io, name) for name in group]
        together = {key: np.concatenate([g[key] for g in given]) for key in given[0]}
        y, taps = jax.jit(self.model_of(case).apply)(self.params, **together)
        every = {tap: np.asarray(value) for tap, value in taps.items()} | {"point": np.asarray(y)}
        first = 0
        for name, g in zip(group, given, strict=True):
            rows = np.arange(first, first + len(g["x_BCT"]))
            first = rows[-1] + 1
            self.outputs[name] = {
                tap: np.take(x, rows, axis=batch_axis(tap, x, len(y))) for tap, x in every.items()
            }
        return self.outputs[case]

    def model_of(self, case):
        """The model with the config of a case."""
        cfg = self.model.config
        parts = {part: ttm_vectors.changed(getattr(cfg, part), self.io, case) for part in PARTS}
        weights = {
            ours: float(self.io[f"{case}/in/{theirs}"])
            for theirs, ours in WEIGHTS.items()
            if f"{case}/in/{theirs}" in self.io
        }
        return TTMR3(dataclasses.replace(cfg, **parts, **weights))

    def batch(self, case):
        """A case as a training batch: the original ignores the mask of the target."""
        batch = ttm_vectors.batch_of(self.model.config.trend, self.io, case)
        return batch | {"target": bct(self.io[f"{case}/in/future_values"])}


def inputs(model, io, case):
    """Keyword arguments of `apply` for a case."""
    return ttm_vectors.inputs(model.config.trend, io, case, padded=False)


@pytest.fixture(scope="module")
def recorded(request, golden):
    vectors = golden(request.param)
    model, params = parity.load(vectors)
    model = TTMR3(
        dataclasses.replace(model.config, batch_default_scale=True)
    )  # as the original has it
    return Recorded(vectors, model, params, vectors.arrays("io.npz"), {})


def batch_axis(tap, x, b):
    """The axis of a tap that counts the `b` rows: the first, or, with patches first, the second."""
    mixers = (
        "/encoder",
        "/decoder",
        "/embed",
        "/patches",
        "/position",
        "/registers",
        "/tokens",
        "/token",
        "/fcm",
    )
    patches_first = x.ndim == 4 and any(part in f"/{tap}" for part in mixers)
    axis = int(patches_first)
    assert x.shape[axis] == b, tap
    return axis


def compared(recorded, case, key, got, want, unit=None):
    """Compare in units of the case's series, within the recorded tolerance."""
    unit = np.ones((1,) * got.ndim, np.float32) if unit is None else unit
    limits = ttm_vectors.tolerance(recorded.vectors, case, want / unit)
    parity.close(got / unit, want / unit, **limits, what=f"{case}/{key}")


def test_golden_outputs(recorded):
    assert check_outputs(recorded, recorded.alike("normal")) >= 10


@pytest.mark.slow
def test_golden_outputs_of_other_shapes(recorded):
    assert (
        check_outputs(
            recorded, [case for case in recorded.cases() if case not in recorded.alike("normal")]
        )
        >= 5
    )


def check_outputs(recorded, cases):
    """Compare all that was recorded of some cases; how many arrays that is."""
    model, io, count = recorded.model, recorded.io, 0
    channels = model.config.trend.forecast_channels
    for case in cases:
        found = recorded.found(case)
        whole = ttm_vectors.unit_of(case, inputs(model, io, case)["x_BCT"])

        def of_targets(x, channels=channels):
            return x if channels is None else x[:, np.array(channels)]

        unit, loc, scale = (of_targets(x) for x in (whole, found["loc"], found["scale"]))
        ours = {
            "prediction_outputs": found["point"],
            "trend_prediction_outputs": found["trend"] * scale + loc,
            "residual_prediction_outputs": found["residual"] * scale + loc,
            "trend_input": found["trend_input"] * found["scale"] + found["loc"],
            "residual_input": found["residual_input"] * found["scale"] + found["loc"],
            "scaled_past_values": found["scaled"],
            "loc": loc,
            "scale": scale,
        }
        for name, got in ours.items():
            if f"{case}/out/{name}" in io:
                by = whole if got.shape[1] == whole.shape[1] else unit
                compared(recorded, case, name, got, bct(io[f"{case}/out/{name}"]), by)
                count += 1
        if "quantiles" not in found:
            continue
        levels = {"quantile_outputs": found["quantiles"]}
        for part in PARTS:
            scaled = found[f"{part}/quantiles"]
            levels[f"{part}_quantile_outputs"] = scaled * scale[..., None] + loc[..., None]
        for name, got in levels.items():
            if f"{case}/out/{name}" in io:
                want = ttm_vectors.quantiles(io[f"{case}/out/{name}"])
                compared(recorded, case, name, got, want, unit[..., None])
                count += 1
    return count


def test_golden_intermediates(recorded):
    taps = dict(recorded.found("normal"))
    for tap in [tap for tap in taps if tap.endswith("spectrum_up")]:
        taps[tap.replace("_up", "_hidden")] = np.maximum(taps[tap], 0)
    prefix, count = "normal/out/act/", 0
    for key, want in recorded.io.items():
        if key.startswith(prefix):
            got = ttm_vectors.turned(taps, key.removeprefix(prefix))
            compared(recorded, "normal", key, got, want)
            count += 1
    assert count > 10


def test_golden_losses(recorded):
    assert check_losses(recorded, recorded.alike("normal")) >= 2


@pytest.mark.slow
def test_golden_losses_of_other_shapes(recorded):
    assert (
        check_losses(
            recorded, [case for case in recorded.cases() if case not in recorded.alike("normal")]
        )
        >= 1
    )


def check_losses(recorded, cases):
    """Compare all parts of the losses, and the smoothed targets; how many cases that are."""
    io, rel, count = recorded.io, recorded.vectors.meta["tolerance"]["rel"], 0
    for case in cases:
        if f"{case}/out/loss" not in io:
            continue
        taps = recorded.found(case)
        model, batch = recorded.model_of(case), recorded.batch(case)
        errors = model.errors(taps, batch)
        wanted = {f"{name}_loss": value for name, value in errors.items()} | {
            "loss": model.weighted(errors)
        }
        for name, got in wanted.items():
            np.testing.assert_allclose(
                got, io[f"{case}/out/{name}"], rtol=rel, err_msg=f"{case}/{name}"
            )
        if f"{case}/out/tau_tgt" in io:
            trend, residual, _ = model.targets(taps, batch)
            compared(recorded, case, "tau_tgt", trend, bct(io[f"{case}/out/tau_tgt"]))
            compared(recorded, case, "r_tgt", residual, bct(io[f"{case}/out/r_tgt"]))
        count += 1
    return count


@pytest.mark.slow
def test_golden_gradients(recorded):
    """Of every parameter; and the value of the loss, through `loss` itself."""
    model, vectors = recorded.model, recorded.vectors
    batch = recorded.batch("normal")
    want = parity.recorded_gradients(vectors, model)
    value = parity.check_gradients(lambda params: model.loss(params, batch), recorded.params, want)
    np.testing.assert_allclose(
        value, recorded.io["normal/out/loss"], rtol=vectors.meta["tolerance"]["rel"]
    )


def test_golden_rollout(recorded):
    io, model = recorded.io, recorded.model
    if "rolling/out/prediction_outputs" not in io:
        pytest.skip("no roll-out recorded")
    want = bct(io["rolling/out/prediction_outputs"])
    given = inputs(model, io, "rolling")
    roll = jax.jit(model.roll_out, static_argnums=3)
    got = roll(
        recorded.params, given.pop("x_BCT"), given.pop("observed_BCT"), want.shape[-1], **given
    )
    compared(recorded, "rolling", "prediction_outputs", np.asarray(got.point), want)


def test_golden_smoothing(recorded):
    """Alone, of series with an outlier, short ones too."""
    smooth, io = jax.jit(ttm_r3.smooth), recorded.io
    lengths = [key.removeprefix("lowess/in/x_") for key in io if key.startswith("lowess/in/x_")]
    if not lengths:
        pytest.skip("no smoothing recorded")
    for length in lengths:
        got = np.asarray(smooth(bct(io[f"lowess/in/x_{length}"])))
        compared(recorded, "lowess", length, got, bct(io[f"lowess/out/trend_{length}"]))


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
    model = import_checkpoint(recorded.vectors.checkpoint)[0]
    assert import_checkpoint(out)[0] == model
    told = json.loads((tmp_path / "config.json").read_text())
    before = recorded.vectors.config
    for field in (
        "context_length",
        "residual_context_length",
        "trend_d_model",
        "scaling",
        "loss",
        "architectures",
    ):
        assert told[field] == before[field], field

    # Without the fields that the import remembered, too.
    state = parity.tensors(recorded.vectors.checkpoint)
    again, _ = converter.configure(
        state, json.loads(json.dumps(converter.published(model.config))), "here"
    )
    assert again == model.config
    with pytest.raises(CheckpointError, match=r"Put the original config\.json"):
        converter.configure(state, None, "here")


def test_golden_initialisation(golden):
    stats = golden(MAIN[0]).init_stats
    shapes = {
        name: np.zeros(entry["shape"], np.float32) for name, entry in stats["parameters"].items()
    }
    config, _ = converter.configure(shapes, stats["config"], "init_stats.json")
    assert parity.check_initialisation(TTMR3(config), stats["parameters"]) == len(
        stats["parameters"]
    )
