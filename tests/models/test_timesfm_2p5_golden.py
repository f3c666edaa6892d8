"""TimesFM 2.5 against vectors recorded from the original PyTorch code (`--golden DIR` names another
set).
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from converters import import_checkpoint, tables
from converters import timesfm_2p5 as converter
from ltsm_jax import trees
from ltsm_jax.models import folders
from ltsm_jax.models.timesfm_2p5 import TimesFM2p5

# of meta.json: times the largest value of the series; of activations, which are in its scale:
# absolute
REL = 1e-4
FORWARD = "forward forward_masked"
DECODE = "decode decode_masked decode_long decode_long_masked decode_scales decode_constant"
FORECAST = "default_flags plain normalize cq_head fix_crossing backcast all"
OFF = {
    "normalize_inputs": False,
    "use_continuous_quantile_head": False,
    "force_flip_invariance": False,
    "infer_is_positive": False,
    "fix_quantile_crossing": False,
}

network = jax.jit(lambda model, *args: model.network(*args), static_argnums=0)
decode = jax.jit(lambda model, horizon, *args: model.decode(*args, horizon), static_argnums=(0, 1))
forecast = jax.jit(
    lambda model, horizon, *args, backcast=False: model.forecast(*args, horizon, backcast),
    static_argnums=(0, 1),
    static_argnames="backcast",
)


@dataclasses.dataclass(frozen=True)
class Recorded:
    vectors: object
    model: TimesFM2p5
    params: dict
    io: dict

    def require(self, *names):
        for name in names:
            if name not in self.io:
                pytest.skip(f"{name} is not in this set")


@pytest.fixture(scope="module")
def recorded(golden):
    vectors = golden("timesfm_2p5")
    model, params = parity.load(vectors)
    return Recorded(vectors, model, params, vectors.arrays("io.npz"))


def having(model, **options):
    return TimesFM2p5(dataclasses.replace(model.config, **options))


def within(got, want, scale, what=""):
    """|got - want| <= REL * scale, a scale for each row (of the recorded values where the series is
    zero).
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    scale = np.where(scale > 0, scale, np.abs(want).reshape(len(want), -1).max(1))
    error = np.abs(got - want).reshape(len(want), -1).max(1)
    assert (error <= REL * scale).all(), f"{what}: {error / np.maximum(scale, 1e-30)} of the scale"


def test_every_recorded_case_is_known(recorded):
    known = {*FORWARD.split(), *DECODE.split(), *(f"forecast_{name}" for name in FORECAST.split())}
    assert {key.split("/")[0] for key in recorded.io} <= known | {
        "act",
        "naive",
        "forecast",
        "train",
        "hf",
    }


def names_of(model):
    """Our names of the recorded steps."""
    ours = {
        "tokenizer": "embed",
        "output_projection_point": "head",
        "output_projection_quantiles": "spread_head",
    }
    steps = {
        "pre_attn_ln": "pre_attn_norm",
        "attn": "attn",
        "attn.query_ln": "attn/q_norm",
        "attn.key_ln": "attn/k_norm",
        "attn.per_dim_scale": "attn/q_scaled",
        "post_attn_ln": "post_attn_norm",
        "pre_ff_ln": "pre_ffn_norm",
        "post_ff_ln": "post_ffn_norm",
    }
    for i in range(len(model.config.layers)):
        ours |= {f"stacked_xf.{i}": f"layer_{i}"} | {
            f"stacked_xf.{i}.{t}": f"layer_{i}/{o}" for t, o in steps.items()
        }
    return ours


@pytest.mark.parametrize("case", FORWARD.split())
def test_golden_network(recorded, case):
    recorded.require(f"{case}/out/output_ts")
    io, ours = recorded.io, names_of(recorded.model)
    z, masks = io[f"{case}/in/inputs"], io[f"{case}/in/masks"]
    y, spread, _, taps = network(recorded.model, recorded.params, z, ~masks)
    valid = io.get(f"{case}/in/valid_patch", ~masks[..., -1])
    last = f"layer_{len(recorded.model.config.layers) - 1}"
    got = {"input_embeddings": taps["embed"], "output_embeddings": taps[last], "output_ts": y}
    got["output_quantile_spread"] = spread
    for name, value in got.items():
        want = io[f"{case}/out/{name}"]
        parity.close(
            np.asarray(value).reshape(want.shape)[valid], want[valid], rtol=0, atol=REL, what=name
        )
    for key in [key for key in io if key.startswith(f"act/{case}/")]:
        value = taps[ours[key.removeprefix(f"act/{case}/")]]
        parity.close(np.asarray(value)[valid], io[key][valid], rtol=0, atol=REL, what=key)
    if case == "forward":
        assert any(key.startswith("act/forward/") for key in io)


def decoded(recorded, case):
    io = recorded.io
    horizon = int(io[f"{case}/in/horizon"])
    return decode(
        recorded.model, horizon, recorded.params, io[f"{case}/in/inputs"], ~io[f"{case}/in/masks"]
    )


@pytest.mark.parametrize("case", DECODE.split())
def test_golden_rollout(recorded, case):
    recorded.require(f"{case}/out/renormed_outputs")
    io = recorded.io
    y, spread, more, taps = decoded(recorded, case)
    scale = np.abs(np.where(io[f"{case}/in/masks"], 0, io[f"{case}/in/inputs"])).max(1)
    within(y, io[f"{case}/out/renormed_outputs"], scale, "outputs of the context")
    within(spread, io[f"{case}/out/renormed_quantile_spread"], scale, "spread")
    assert (more.shape[1] > 0) == (f"{case}/out/ar_renormed_outputs" in io)
    if more.shape[1]:
        within(more, io[f"{case}/out/ar_renormed_outputs"], scale, "further outputs")
    valid = ~io[f"{case}/in/masks"].reshape(*y.shape[:2], -1)[..., -1]
    ours = names_of(recorded.model) | {"context_mu": "mean", "context_sigma": "std"}
    for key in [key for key in io if key.startswith(f"act/{case}/")]:
        value, want = np.asarray(taps[ours[key.removeprefix(f"act/{case}/")]]), io[key]
        if key.endswith(("_mu", "_sigma")):
            within(value, want, scale, key)
        else:
            parity.close(value[valid], want[valid], rtol=0, atol=REL, what=key)
    if case == "decode":
        assert any(key.startswith("act/decode/") for key in io)


def series(io, name, length=0):
    """The recorded series as one batch [B, 1, T], NaN in front of the shorter ones."""
    found = [io[f"{name}/in/series_{i}"] for i in range(100) if f"{name}/in/series_{i}" in io]
    batch = np.full((len(found), 1, max(length, *map(len, found))), np.nan, np.float32)
    for row, x in zip(batch, found, strict=True):
        row[0, -len(x) :] = x
    return batch


def test_golden_naive_forecast(recorded):
    """Series of different lengths in one batch: each as if it stood alone."""
    io, horizon = recorded.io, int(recorded.io["naive/in/horizon"])
    x = series(io, "naive")
    got = forecast(having(recorded.model, **OFF), horizon, recorded.params, x)
    want = np.stack([io[f"naive/out/forecast_{i}"] for i in range(len(x))])
    within(got[:, 0], want, np.nanmax(np.abs(x[:, 0]), axis=1))


@pytest.mark.parametrize(
    "case",
    [
        c if c in ("plain", "all") else pytest.param(c, marks=pytest.mark.slow)
        for c in FORECAST.split()
    ],
)
def test_golden_forecast(recorded, case):
    recorded.require(f"forecast_{case}/out/full")
    io, told = recorded.io, f"forecast_{case}/in/"
    flags = {name: bool(io[f"{told}flag_{name}"]) for name in OFF}
    backcast, horizon = bool(io[f"{told}flag_return_backcast"]), int(io[f"{told}horizon"])
    limit, p = int(io[f"{told}max_context"]), recorded.model.config.patch_len
    x = series(io, "forecast", -(-limit // p) * p)
    model = having(recorded.model, **flags, max_context=limit)
    got = np.asarray(forecast(model, horizon, recorded.params, x, backcast=backcast)[:, 0])
    scale = np.nanmax(np.abs(x[:, 0]), axis=1)
    within(got, io[f"forecast_{case}/out/full"], scale, "full")
    within(got[..., model.config.point_column], io[f"forecast_{case}/out/point"], scale, "point")
    if case == "all":
        found = jax.jit(model.predict, static_argnums=2)(recorded.params, x, horizon)
        within(found.point[:, 0], io[f"forecast_{case}/out/point"], scale, "point of predict")
        within(
            found.quantiles[:, 0],
            io[f"forecast_{case}/out/full"][..., 1:],
            scale,
            "quantiles of predict",
        )
        assert found.levels == model.config.quantiles


def pinball(columns, y, levels):
    off = y[..., None] - columns
    q = jnp.asarray(levels).reshape((1,) * (off.ndim - 1) + (-1,))
    return jnp.maximum(q * off, (q - 1) * off).mean()


def parts_of_the_train_loss(model, io, params):
    """MSE of the mean column, pinball losses of the point head and of the quantile head, after the
    last patch.
    """
    y, spread, *_ = model.decode(
        params, io["train/in/inputs"], ~io["train/in/masks"], model.config.output_len
    )
    target, levels = jnp.asarray(io["train/in/target"]), model.config.quantiles
    h = target.shape[1]
    mean, *heads = y[:, -1, :h, 0], y[:, -1, :h, 1:], spread[:, :h, 1:]
    return jnp.square(mean - target).mean(), *(pinball(head, target, levels) for head in heads)


def test_golden_train_loss_and_gradients(recorded):
    io, model = recorded.io, recorded.model
    got = jax.jit(lambda q: parts_of_the_train_loss(model, io, q))(recorded.params)
    names = ("mse_mean", "pinball_point_head", "pinball_quantile_head")
    np.testing.assert_allclose(got, [io[f"train/out/{name}"] for name in names], rtol=REL)
    want = parity.recorded_gradients(recorded.vectors, model)
    parity.check_gradients(
        lambda q: sum(parts_of_the_train_loss(model, io, q)), recorded.params, want
    )


@pytest.fixture(scope="module")
def port(recorded):
    """The same weights under the keys of the transformers library: (model, params, batch of its
    case).
    """
    model, params, provenance, _ = import_checkpoint(recorded.vectors.folder / "hf")
    assert provenance["table"] == converter.TRANSFORMERS
    chex.assert_trees_all_equal(params, recorded.params)
    context, target = (
        jnp.asarray(recorded.io[f"hf/in/{name}_values"])[:, None] for name in ("past", "future")
    )
    model = having(model, fix_quantile_crossing=False, infer_is_positive=bool((context >= 0).all()))
    return model, params, {"context": context, "target": target}


@pytest.mark.parametrize("kind", ["flip", pytest.param("noflip", marks=pytest.mark.slow)])
def test_golden_transformers_form(recorded, port, kind):
    """Forecast and loss of the port, with its quantiles out of place."""
    recorded.require(f"hf/out/{kind}/loss")
    io, (model, params, batch) = recorded.io, port
    model = having(model, force_flip_invariance=kind == "flip")
    want = io[f"hf/out/{kind}/full_predictions"]
    got = np.asarray(forecast(model, want.shape[1], params, batch["context"])[:, 0])
    scale = np.abs(batch["context"][:, 0]).max(1)
    within(got, want, scale, "full")
    within(
        got[..., model.config.point_column], io[f"hf/out/{kind}/mean_predictions"], scale, "point"
    )
    loss = lambda q: model.loss(q, batch, aligned=False)  # noqa: E731
    if any(key.startswith(f"hf_{kind}/grad/") for key in recorded.vectors.arrays("grads.npz")):
        gradients = parity.recorded_gradients(recorded.vectors, model, f"hf_{kind}/grad/")
        value = parity.check_gradients(loss, params, gradients)
    else:
        value = jax.jit(loss)(params)
    np.testing.assert_allclose(value, io[f"hf/out/{kind}/loss"], rtol=REL)


def test_golden_point_loss_is_the_error_of_the_median(recorded, port):
    io, (model, params, batch) = recorded.io, port
    model = having(model, force_flip_invariance=True)
    y = io["hf/out/flip/mean_predictions"][:, : batch["target"].shape[-1]]
    want = np.square(y - batch["target"][:, 0]).mean()
    np.testing.assert_allclose(jax.jit(model.point_loss)(params, batch), want, rtol=REL)


@pytest.mark.parametrize("form", ["", "hf"])
def test_golden_round_trip(recorded, tmp_path, form):
    folder = recorded.vectors.folder / form
    out = parity.check_round_trip(
        folder / "model.safetensors", tmp_path
    )  # in the form that it came in
    model, params, *_ = import_checkpoint(folder)
    again, same, *_ = import_checkpoint(out)  # its config.json was written too
    assert again == model
    chex.assert_trees_all_equal(same, params)


def test_golden_both_forms_are_the_same_model(recorded, port):
    other = {"max_context", "context_len", "infer_is_positive", "fix_quantile_crossing"}
    mine, theirs = (dataclasses.asdict(model.config) for model in (recorded.model, port[0]))
    differ = {name for name in mine if mine[name] != theirs[name]} - other
    assert not differ
    state, _ = tables.to_state(
        converter.keys(recorded.model.config, converter.TRANSFORMERS), recorded.params
    )
    want = parity.tensors(recorded.vectors.folder / "hf" / "model.safetensors")
    assert state.keys() == want.keys()
    for key, value in want.items():
        assert tables.same_bytes(state[key], value), key


def test_golden_init_statistics(recorded):
    stats = recorded.vectors.init_stats
    config = type(recorded.model.config).from_published(stats["_about"]["config"])
    assert parity.check_initialisation(TimesFM2p5(config), stats["params"]) == len(stats["params"])


def test_golden_parameters_are_counted(recorded):
    state = parity.tensors(recorded.vectors.checkpoint)
    assert trees.count(folders.param_shapes(recorded.model)) == sum(
        value.size for value in state.values()
    )
