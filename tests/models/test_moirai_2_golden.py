"""Moirai 2 against vectors recorded from uni2ts (`--golden DIR` names another set)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import packed_parity as packed
import parity
import pytest

from ltsm_jax.models.moirai_2 import Moirai2, Moirai2Config

RTOL, ATOL, ROLLOUT_RTOL = (
    1e-4,
    1e-5,
    1e-3,
)  # of meta.json; ATOL is relative to the scale of the series


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("moirai_2")
    model, params = parity.load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


@pytest.fixture(scope="module")
def ran(recorded):
    """{case: (tokens, quantiles, taps)} of all packed cases, in one program."""
    _, model, params, io = recorded
    names = [case for case in packed.cases(io, "") if f"{case}/in/sample_id" in io]
    assert names
    sets = [packed.tokens_of(io, case) for case in names]
    tokens, _, places = packed.stacked(sets)
    out = jax.tree.map(np.asarray, jax.jit(model.apply)(params, tokens))
    cut = lambda place: jax.tree.map(lambda a: a[place] if a.ndim > 2 else a, out)  # noqa: E731
    return {name: (own, *cut(place)) for name, own, place in zip(names, sets, places, strict=True)}


def test_golden_outputs(recorded, ran):
    io, compared = recorded[-1], 0
    for case, (_, y, taps) in ran.items():
        y = y.reshape(*y.shape[:2], -1)
        ours = {
            "preds_normalised": y,
            "scaled_target": taps["scaled"],
            "loc": taps["loc"],
            "scale": taps["scale"],
        }
        in_units = f"{case}/out/preds_normalised" in io
        ours["preds"] = y * taps["scale"] + taps["loc"] if in_units else y
        for name, got in ours.items():
            if f"{case}/out/{name}" in io:
                want = io[f"{case}/out/{name}"]
                scale = np.where(in_units and name in ("preds", "loc", "scale"), taps["scale"], 1)
                allowed = RTOL * np.abs(want) + ATOL * scale
                parity.note(np.abs(got - want), allowed)
                excess = np.abs(got - want) - allowed
                worst = np.unravel_index(excess.argmax(), excess.shape)
                assert excess[worst] <= 0, f"{case} {name} {worst}: {got[worst]}, {want[worst]}"
                compared += 1
    assert compared


def test_golden_steps(recorded, ran):
    io, compared = recorded[-1], 0
    names = (
        (r"^in_proj", "embed"),
        (r"^out_proj", "head"),
        (r"_layer$", ""),
        (r"^(embed|head)\.", r"\1/"),
    )
    for case, (tokens, _, taps) in ran.items():
        as_others = packed.Ran(tokens, None, taps, np.zeros(0), np.zeros(0))
        if any(key.startswith(f"{case}/out/act/") for key in io):
            packed.check_steps(io, {case: as_others}, names, RTOL, ATOL)
            compared += 1
    assert compared


def test_golden_loss_and_gradients(recorded, ran):
    vectors, model, params, io = recorded
    stored, case = vectors.arrays("grads.npz"), "train__next_token"
    tokens = packed.tokens_of(io, case)
    value, grads = jax.jit(jax.value_and_grad(model.packed_loss))(params, tokens)
    np.testing.assert_allclose(value, stored["loss"], rtol=RTOL)
    np.testing.assert_allclose(value, io[f"{case}/out/loss"], rtol=RTOL)
    assert not packed.check_gradients(model, grads, stored, "grad/", 1e-3), "of every parameter"


def test_golden_loss_of_each_shift(recorded):
    """The mean over the first k shifts is the loss of a model that predicts k patches."""
    _, model, params, io = recorded
    case = "train__next_token"
    each = io[f"{case}/out/loss_per_shift"]
    np.testing.assert_allclose(each.mean(), io[f"{case}/out/loss"], rtol=1e-6)
    tokens = packed.tokens_of(io, case)
    np.testing.assert_allclose(jax.jit(model.shifted_losses)(params, tokens), each, rtol=RTOL)


def check(got_BCHQ, want, past, what, horizon_of_one):
    """[B, C, H, Q] against [B, Q, H] or [B, Q, H, C], each series by its own scale; roll-outs less
    tightly.
    """
    want = want[..., None] if want.ndim == 3 else want
    got, want = np.asarray(got_BCHQ), np.transpose(want, (0, 3, 2, 1))
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    (x, observed) = (np.asarray(a) for a in past)
    scale = np.asarray(
        [[np.std(x[i, j][observed[i, j]]) for j in range(x.shape[1])] for i in range(x.shape[0])]
    )
    scale = np.maximum(scale, 1e-3)[..., None, None]
    rtol = np.where(np.arange(got.shape[2]) < horizon_of_one, RTOL, ROLLOUT_RTOL)[
        None, None, :, None
    ]
    excess = np.abs(got - want) - rtol * np.abs(want) - (rtol / RTOL) * ATOL * scale
    parity.note(np.abs(got - want), np.abs(got - want) - excess)
    assert (excess <= 0).all(), (
        f"{what}: off by {np.abs(got - want).max()} at a scale of {scale.ravel()}"
    )


def grouped(io, names):
    """Forecast cases whose inputs have one shape, so that one program and batch serves them."""
    groups = {}
    for case in names:
        past, horizon, more = packed.forecast_of(io, case)
        shape = (
            past[0].shape[1:],
            horizon,
            tuple(jax.tree.map(lambda a: a.shape[1:], more).items()),
        )
        groups.setdefault(shape, []).append((case, past, more))
    return [(shape[1], cases) for shape, cases in groups.items()]


def test_golden_forecasts(recorded):
    _, model, params, io = recorded
    names = packed.cases(io, "forecast__")
    assert names
    for case in names:
        packed.packed_forecast(io, case, model.config.patch_size, model.config.patch_size)
    for horizon, group in grouped(io, names):
        join = lambda *leaves: jnp.concatenate(leaves)  # noqa: E731
        past, more = jax.tree.map(join, *[(past, more) for _, past, more in group])
        run = jax.jit(lambda p, past, more, h=horizon: model.quantiles(p, past, h, **more))
        y, row = np.asarray(run(params, past, more)), 0
        for case, own, _ in group:
            b = own[0].shape[0]
            check(y[row : row + b], io[f"{case}/out/quantiles"], own, case, model.horizon)
            row += b


@pytest.mark.slow
def test_golden_series_of_any_length(recorded):
    """What `predict` makes of ragged series with missing values: its preparation, one batch, and
    itself on one.
    """
    _, model, params, io = recorded
    names = packed.cases(io, "predict__")
    assert names
    for case in names:
        check_series(io, case, model, params)


def check_series(io, case, model, params):
    get = lambda name: io[f"{case}/in/{name}"]  # noqa: E731
    series = [get(f"series/{i}")[None, None] for i in range(int(get("num_series")))]
    horizon, context, want = (
        int(get("prediction_length")),
        int(get("context_length")),
        io[f"{case}/out/quantiles"],
    )
    model = Moirai2(dataclasses.replace(model.config, context_len=context, missing="zero"))
    made = [model.prepare(x, context) for x in series]
    past = tuple(jnp.concatenate(leaves) for leaves in zip(*made, strict=True))
    real = jnp.asarray([min(x.shape[-1], context) for x in series])
    begun = jnp.arange(context)[None] >= context - real[:, None]
    y = jax.jit(lambda p, past, begun: model.quantiles(p, past, horizon, begun_BT=begun))(
        params, past, begun
    )
    check(y, want, past, case, model.horizon)
    i = min(range(len(series)), key=lambda i: series[i].shape[-1])
    forecast = jax.jit(lambda p, x: model.predict(p, x, horizon))(params, series[i])
    check(forecast.quantiles, want[i : i + 1], [a[i : i + 1] for a in past], case, model.horizon)


def test_golden_round_trip(recorded, tmp_path):
    vectors, *_ = recorded
    parity.check_round_trip(vectors.checkpoint, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == vectors.config


def test_golden_initialisation(recorded):
    vectors, *_ = recorded
    stats = vectors.init_stats
    config = Moirai2Config.from_published(
        {"quantile_levels": vectors.config["quantile_levels"]} | stats["config"]
    )
    parity.check_initialisation(Moirai2(config), stats["parameters"])
