"""TimesFM 1.0 and 2.0 against vectors recorded from the original PyTorch code (`--golden DIR` names
another set).
"""

import ast
import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import export_checkpoint, import_checkpoint, tables
from converters import timesfm_1 as converter
from ltsm_jax import trees
from ltsm_jax.models import folders
from ltsm_jax.models.timesfm_1 import TimesFM1, halved_sinusoids

REL = 1e-4  # of meta.json, times the largest value of the series
FORWARD = "normal left_padded almost_all_padded pad_val scales constant first_patch_constant"
DECODE = "decode decode_long decode_long_padded decode_short_steps decode_maxlen decode_on_context"
FORECAST = "plain normalize window on_context ctx_len"
TAGS = {"pos": True, "nopos": False}  # use_positional_embedding, which has no weights
TAG = ["pos", pytest.param("nopos", marks=pytest.mark.slow)]

apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)
decode = jax.jit(
    lambda model, horizon, args, freq, **options: model.decode(
        *args, horizon, freq_B=freq, **options
    ),
    static_argnums=(0, 1),
    static_argnames=("step", "max_len", "on_context"),
)
forecast = jax.jit(
    lambda model, horizon, *args, freq, **options: model.forecast(
        *args, horizon, freq=freq, **options
    ),
    static_argnums=(0, 1),
    static_argnames=("normalize", "window", "newest", "on_context"),
)


@dataclasses.dataclass(frozen=True)
class Recorded:
    vectors: object
    model: TimesFM1
    params: dict
    io: dict

    def tagged(self, tag, **options):
        return TimesFM1(
            dataclasses.replace(self.model.config, use_positional_embedding=TAGS[tag], **options)
        )

    def require(self, *names):
        for name in names:
            if name not in self.io:
                pytest.skip(f"{name} is not in this set")

    def meaning(self, name):
        return self.vectors.meta["io"][name]["meaning"]


@pytest.fixture(scope="module")
def recorded(golden):
    vectors = golden("timesfm_1")
    model, params = parity.load(vectors)
    return Recorded(vectors, model, params, vectors.arrays("io.npz"))


def test_every_recorded_case_is_known(recorded):
    known = {*FORWARD.split(), *DECODE.split(), *(f"forecast_{name}" for name in FORECAST.split())}
    assert {key.split("/")[0] for key in recorded.io} <= known | {"act", "forecast", "train", "hf"}


def within(got, want, scale, what=""):
    """|got - want| <= REL * scale, a scale for each row (of the recorded values where the series is
    zero).
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, what
    scale = np.where(scale > 0, scale, np.abs(want).reshape(len(want), -1).max(1))
    error = np.abs(got - want).reshape(len(want), -1).max(1)
    assert (error <= REL * scale).all(), f"{what}: {error / scale} of the scale"


def largest(x, padding=None):
    """The largest observed value of each row."""
    hidden = (np.abs(x) > 1e9) | (False if padding is None else padding[:, : x.shape[1]] == 1)
    return np.abs(np.where(hidden, 0, x)).max(1)


@pytest.mark.parametrize("tag", TAG)
@pytest.mark.parametrize("case", FORWARD.split())
def test_golden_output(recorded, case, tag):
    recorded.require(f"{case}/out/{tag}/output_ts")
    io = recorded.io
    x, padding, freq = (io[f"{case}/in/{name}"] for name in ("input_ts", "input_padding", "freq"))
    y, taps = apply(recorded.tagged(tag), recorded.params, x, padding == 0, freq[:, 0])
    want, scale = io[f"{case}/out/{tag}/output_ts"], largest(x, padding)
    valid = io[f"{case}/out/patched_padding"] == 0
    np.testing.assert_array_equal(taps["observed"], valid)
    if case == "first_patch_constant":
        scale = np.abs(want).reshape(len(want), -1).max(1)
    keep = valid[..., None, None]
    within(np.where(keep, y, 0), np.where(keep, want, 0), scale, case)
    within(taps["mean"], io[f"{case}/out/loc"], scale, "loc")
    within(taps["std"], io[f"{case}/out/scale"], scale, "scale")
    patches = io[f"{case}/out/normalised_patches"]
    within(
        taps["patches"],
        patches,
        np.abs(patches).reshape(len(patches), -1).max(1),
        "normalised patches",
    )


def names_of(model):
    """Our names of the recorded steps."""
    ours = {
        "model_input_before_freq": "placed",
        "input_ff_layer": "embed",
        "freq_emb": "freq_embed",
        "horizon_ff_layer": "head",
    }
    if model.config.use_positional_embedding:
        ours["position_emb"] = "positions"
    for i in range(len(model.config.layers)):
        theirs = {".input_layernorm": "/attn_norm", ".self_attn": "/attn", ".mlp": "", "": ""}
        ours |= {
            f"stacked_transformer.layers.{i}{name}": f"layer_{i}{tap}"
            for name, tap in theirs.items()
        }
    return ours


@pytest.mark.parametrize("tag", TAG)
def test_golden_intermediates(recorded, tag):
    io, model = recorded.io, recorded.tagged(tag)
    names = {
        key.removeprefix(f"act/normal/{tag}/") for key in io if key.startswith(f"act/normal/{tag}/")
    }
    ours = names_of(model)
    assert names == set(ours), "every recorded step is compared, and no other"
    x, padding, freq = (io[f"normal/in/{name}"] for name in ("input_ts", "input_padding", "freq"))
    _, taps = apply(model, recorded.params, x, padding == 0, freq[:, 0])
    for name in names:
        parity.close(
            np.asarray(taps[ours[name]]).reshape(io[f"act/normal/{tag}/{name}"].shape),
            io[f"act/normal/{tag}/{name}"],
            what=name,
        )
    if model.config.use_positional_embedding:
        table = io[f"act/normal/{tag}/position_emb"][0]
        parity.close(halved_sinusoids(*table.shape), table, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tag", TAG)
@pytest.mark.parametrize("case", DECODE.split())
def test_golden_rollout(recorded, case, tag):
    recorded.require(f"{case}/out/{tag}/full")
    io = recorded.io
    told = {
        name: int(io[f"{case}/in/{name}"])
        for name in ("horizon_len", "output_patch_len", "max_len", "return_forecast_on_context")
        if f"{case}/in/{name}" in io
    }
    x, padding, freq = (io[f"{case}/in/{name}"] for name in ("input_ts", "input_padding", "freq"))
    t = x.shape[1]
    assert (padding[:, t:] == 0).all()
    options = {"step": told.get("output_patch_len"), "max_len": told.get("max_len")}
    options["on_context"] = on_context = bool(told.get("return_forecast_on_context"))
    got = decode(
        recorded.tagged(tag),
        told["horizon_len"],
        (recorded.params, x, padding[:, :t] == 0),
        freq[:, 0],
        **options,
    )
    want = io[f"{case}/out/{tag}/full"]
    keep = np.ones(want.shape[:2], bool)
    if on_context:  # rows of padded patches are not compared
        p = recorded.model.config.patch_len
        padded = padding[:, :t].reshape(len(x), -1, p).min(-1) == 1
        keep[:, : want.shape[1] - told["horizon_len"]] = ~np.repeat(padded[:, :-1], p, axis=1)
    within(
        np.where(keep[..., None], got, 0),
        np.where(keep[..., None], want, 0),
        largest(x, padding),
        case,
    )


def series(io):
    """The recorded series as one batch [B, 1, T], NaN in front of the shorter ones."""
    found = [io[f"forecast/in/series_{i}"] for i in range(100) if f"forecast/in/series_{i}" in io]
    batch = np.full((len(found), 1, max(map(len, found))), np.nan, np.float32)
    for row, x in zip(batch, found, strict=True):
        row[0, -len(x) :] = x
    return batch


@pytest.mark.parametrize("tag", TAG)
@pytest.mark.parametrize("case", FORECAST.split())
def test_golden_forecast(recorded, case, tag):
    key = f"forecast_{case}/out/{tag}/full"
    recorded.require(key)
    io, meaning = recorded.io, recorded.meaning(f"forecast_{case}/out/{tag}/point_median")
    options = ast.literal_eval(re.search(r"kwargs (\{.*?\})", meaning)[1])
    context_len = int(re.search(r"context_len=(\d+)", meaning)[1])
    horizon = int(io["forecast/in/horizon_len"])
    model = recorded.tagged(tag, context_len=context_len)
    freq = options.pop("freq", None)
    x = series(io)
    on_context = options.pop("return_forecast_on_context", False)
    freq = (
        jnp.zeros(len(x), int) if freq is None else jnp.asarray(freq)
    )  # 0 by default in the original
    names = {"normalize": "normalize", "window_size": "window", "forecast_context_len": "newest"}
    told = {names[name]: value for name, value in options.items()}
    got = forecast(
        model, horizon, recorded.params, x, freq=freq[:, None], on_context=on_context, **told
    )[:, 0]
    want, p = io[key], model.config.patch_len
    keep = np.ones(want.shape[:2], bool)
    if on_context:  # rows of padded patches are not compared
        begun = np.cumsum(~np.isnan(x[:, 0, -context_len:]), axis=1) > 0
        begun = np.pad(begun, ((0, 0), (context_len - begun.shape[1], 0)))
        observed = begun.reshape(len(x), -1, p).any(-1)
        keep[:, : context_len - p] = np.repeat(observed[:, :-1], p, axis=1)
    scale = np.nanmax(np.abs(x[:, 0]), axis=1)
    within(np.where(keep[..., None], got, 0), np.where(keep[..., None], want, 0), scale, case)
    columns = {"point_median": 1 + model.config.quantiles.index(0.5), "point_mean": 0}
    for name, column in columns.items():
        if f"forecast_{case}/out/{tag}/{name}" in io:
            point = io[f"forecast_{case}/out/{tag}/{name}"]
            within(np.where(keep, got[..., column], 0), np.where(keep, point, 0), scale, name)


def test_golden_forecast_is_what_predict_gives(recorded):
    """`predict` of a series in one class of frequency; point and quantiles are columns of the
    recorded forecast.
    """
    io, horizon = recorded.io, int(recorded.io["forecast/in/horizon_len"])
    want = io["forecast_plain/out/pos/full"]
    x, predict = (
        series(io),
        jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3)),
    )
    columns = {"median": 1 + recorded.model.config.quantiles.index(0.5), "mean": 0}
    for freq, (point, column) in zip(
        sorted(set(io["forecast/in/freq"].tolist())), columns.items(), strict=False
    ):
        rows = io["forecast/in/freq"] == freq
        got = predict(recorded.tagged("pos", freq=freq, point=point), recorded.params, x, horizon)
        scale = np.nanmax(np.abs(x[rows, 0]), axis=1)
        within(got.point[rows, 0], want[rows, :, column], scale)
        within(got.quantiles[rows, 0], want[rows, :, 1:], scale)
        assert got.levels == recorded.model.config.quantiles


def train_batch(io):
    x, padding = io["train/in/input_ts"], io["train/in/input_padding"]
    assert (np.diff(padding, axis=1) <= 0).all(), "padding in front"
    context = np.where(padding == 1, np.nan, x).astype(np.float32)
    return {
        "context": jnp.asarray(context)[:, None],
        "target": jnp.asarray(io["train/in/target"])[:, None],
        "freq": jnp.asarray(io["train/in/freq"]),
    }


@pytest.mark.parametrize("tag", TAG)
def test_golden_losses_and_gradients(recorded, tag):
    io, batch = recorded.io, train_batch(recorded.io)
    plain, model = recorded.tagged(tag, quantile_loss=False, point="mean"), recorded.tagged(tag)
    for loss in (plain.loss, plain.point_loss):
        np.testing.assert_allclose(
            jax.jit(loss)(recorded.params, batch), io[f"train/out/{tag}/loss_mse"], rtol=REL
        )
    want = io[f"train/out/{tag}/loss_mse_quantile"]
    own = TAGS[tag] == recorded.model.config.use_positional_embedding
    prefix = "grad/" if own else f"{tag}/grad/"
    gradients = parity.recorded_gradients(recorded.vectors, model, prefix)
    value = parity.check_gradients(lambda q: model.loss(q, batch), recorded.params, gradients)
    np.testing.assert_allclose(value, want, rtol=REL)


def told_in_both(model):
    """The config without what only one form of config.json says."""
    return dataclasses.replace(model.config, point="mean", context_len=model.config.patch_len)


def test_golden_transformers_form(recorded, tmp_path):
    """The same weights under the keys of the transformers library: the same model, outputs and loss
    of its class.
    """
    folder, io = recorded.vectors.folder / "hf", recorded.io
    model, params, provenance, _ = import_checkpoint(folder)
    assert (
        told_in_both(model) == told_in_both(recorded.model)
        and provenance["table"] == converter.TRANSFORMERS
    )
    chex.assert_trees_all_equal(params, recorded.params)
    meaning = recorded.meaning("hf/out/full_predictions")
    rows = [int(i) for i in re.findall(r"series_(\d+)", meaning)]
    freq = [int(i) for i in re.search(r"freq ([\d,]+)", meaning)[1].split(",")]
    want, y = io["hf/out/full_predictions"], io["hf/in/future_values"]
    x = series(io)[rows]
    full = forecast(model, want.shape[1], params, x, freq=jnp.asarray(freq)[:, None])[:, 0]
    within(full, want, np.nanmax(np.abs(x[:, 0]), axis=1))
    off = y[..., None] - np.asarray(full)[:, : y.shape[1], 1:]
    q = np.asarray(model.config.quantiles)
    loss = (
        np.square(y - full[:, : y.shape[1], 0]).mean() + np.maximum(q * off, (q - 1) * off).mean()
    )
    np.testing.assert_allclose(loss, io["hf/out/loss"], rtol=REL)

    parity.check_round_trip(folder / "model.safetensors", tmp_path)
    again, same, *_ = import_checkpoint(
        tmp_path / "again.safetensors"
    )  # its config.json was written too
    assert again == model
    chex.assert_trees_all_equal(same, params)


def test_golden_round_trip(recorded, tmp_path):
    out = parity.check_round_trip(recorded.vectors.checkpoint, tmp_path)
    assert import_checkpoint(out)[0] == recorded.model
    # the other form is one suffix away, and has the recorded tensors
    export_checkpoint(tmp_path / "model", tmp_path / "hub" / "model.safetensors")
    want = parity.tensors(recorded.vectors.folder / "hf" / "model.safetensors")
    got = parity.tensors(tmp_path / "hub" / "model.safetensors")
    if not recorded.model.config.use_positional_embedding:
        want.pop(converter.TIMESCALES, None)
    assert got.keys() == want.keys()
    for key, value in want.items():
        if key == converter.TIMESCALES:
            np.testing.assert_allclose(got[key], value, rtol=1e-6)
        else:
            assert tables.same_bytes(got[key], value), key
    assert told_in_both(import_checkpoint(tmp_path / "hub")[0]) == told_in_both(recorded.model)


def test_golden_init_statistics(recorded):
    stats = recorded.vectors.init_stats
    config = type(recorded.model.config).from_published(stats["_about"]["config"])
    told = {
        k: v
        for k, v in stats["params"].items()
        if not v["distribution"].startswith("UNINITIALISED")
    }
    assert parity.check_initialisation(TimesFM1(config), told) == len(told)
    drawn = trees.flatten(jax.jit(TimesFM1(config).init)(jax.random.key(0)))
    rest = [path for path in drawn if path.endswith("/scaling")]
    assert len(told) + len(rest) == len(stats["params"])
    for path in rest:  # uninitialised in the original: neutral here
        np.testing.assert_array_equal(drawn[path], 0)


def test_golden_parameters_are_counted(recorded):
    shapes = folders.param_shapes(recorded.model)
    state = parity.tensors(recorded.vectors.checkpoint)
    assert trees.count(shapes) == sum(value.size for value in state.values())
