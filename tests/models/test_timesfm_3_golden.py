"""TimesFM 3.0 against vectors recorded from the original PyTorch code.

`--golden DIR` names another set.
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

from converters import import_checkpoint
from converters import timesfm_3 as converter
from converters.torch_files import CheckpointError
from ltsm_jax.models.timesfm_3 import TimesFM3, quantile_errors

MAIN = "timesfm_3"
# Of meta.json: times the largest value of the series; of activations, which are scaled, absolute.
REL = 1e-4
FORWARD = "forward forward_masked forward_cpm forward_frozen"
DECODE = (
    "decode decode_both decode_masks decode_long decode_h1 decode_ragged decode_short "
    "decode_multivariate decode_past_only decode_past_future decode_padded decode_trend "
    "decode_scales decode_constant decode_nan decode_all_missing"
)
# The other cases are further shapes, each of which is a program to compile.
QUICK_DECODE = ("decode_masks", "decode_long")
FLAGS = {
    "use_symmetric_averaging": "flip_average",
    "make_positive": "infer_is_positive",
    "sort_quantiles": "sort_quantiles",
    "use_znorm": "normalize_inputs",
    "padding_mode": "extend_known",
}
FORECAST = "default symmetric positive unsorted znorm all long"
COVARIATES = "plain edge all"
EVALUATOR = "univariate chunks"
NAMES = ("x_BCNP", "observed_BCNP", "is_target_BCN", "shown_BN")  # what `apply` takes, in order

apply = jax.jit(
    lambda model, freeze_after, *args: model.apply(*args, freeze_after=freeze_after),
    static_argnums=(0, 1),
)
lay_out = jax.jit(
    lambda model, horizon, x, observed, *known: model.lay_out(x, observed, horizon, *known),
    static_argnums=(0, 1),
)
decode = jax.jit(
    lambda model, horizon, params, x, observed, *known: model.decode(
        params, x, observed, horizon, *known
    ),
    static_argnums=(0, 1),
)
forecast = jax.jit(
    lambda model, horizon, params, context, past, known: model.forecast(
        params, context, horizon, past, known
    ),
    static_argnums=(0, 1),
)


def pytest_generate_tests(metafunc):
    """The recorded checkpoint, and with it every variant of its flags."""
    if "recorded" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden")
        names = [pytest.param(MAIN)]
        for file in sorted(root.glob(f"{MAIN}/variants/*/meta.json")):
            names.append(pytest.param(str(file.parent.relative_to(root)), marks=pytest.mark.slow))
        metafunc.parametrize("recorded", names, indirect=True, scope="module")


@dataclasses.dataclass(frozen=True)
class Recorded:
    vectors: Any
    model: TimesFM3
    params: dict
    io: dict

    def require(self, name):
        if name not in self.io:
            pytest.skip(f"{name} is not in this set")

    def noise(self, case):
        """Distance of recorded values from the original in float64, as a share of the largest."""
        return self.vectors.meta["float32_noise_vs_float64"]["per_case"].get(case, 0.0)

    def rel(self, case):
        """The tolerance of a case, as a share of its series' scale."""
        return max(REL, 20 * self.noise(case))

    def allowed(self, case, want, scale):
        """The largest error [B, C] of series of a scale [B, C], beside what the original is off.

        Where a line is taken off, variates see each other's rounding: that of a large one moves
        a small one too.
        """
        return self.rel(case) * scale + self.noise(case) * np.abs(want).max() * (scale > 0)


@pytest.fixture(scope="module")
def recorded(request, golden):
    vectors = golden(request.param)
    model, params = parity.load(vectors)
    return Recorded(vectors, model, params, vectors.arrays("io.npz"))


def within(got, want, allowed, what=""):
    """|got - want| <= allowed; allowed [B, C], for all that is recorded of a series."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    allowed = allowed.reshape(*allowed.shape, *(1,) * (want.ndim - allowed.ndim))
    parity.note(np.abs(got - want), allowed)
    worst = np.abs(got - want).max()
    assert (np.abs(got - want) <= allowed).all(), (
        f"{what}: off by {worst}, allowed {allowed.min()} to {allowed.max()}"
    )


def test_every_recorded_case_is_known(recorded):
    known = {
        *FORWARD.split(),
        *DECODE.split(),
        "act",
        "train",
        "train_patches",
        "forecast",
        "forecast_cov",
    }
    known |= {f"forecast_{name}" for name in FORECAST.split()}
    known |= {f"forecast_cov_{name}" for name in COVARIATES.split()}
    known |= {f"evaluator_{name}" for name in EVALUATOR.split()}
    assert {key.split("/")[0] for key in recorded.io} <= known


# --- the network


def names_of(model):
    """Our names of the recorded steps."""
    ours = {
        "running_n": "n",
        "running_mean": "mean",
        "running_std": "std",
        "refined_mean": "refined_mean",
        "refined_std": "refined_std",
        "resblock_input": "tokens",
        "raw_logits": "head",
        "pre_transformer_resblock": "embed",
        "pre_transformer_resblock.hidden_layer": "embed/hidden",
        "pre_transformer_resblock.output_layer": "embed/out",
        "pre_transformer_resblock.residual_layer": "embed/residual",
    }
    attention = {
        "query_proj": "q",
        "key_proj": "k",
        "value_proj": "v",
        "rotary_position_embedding": "q_rotated",
        "rotary_position_embedding@1": "k_rotated",
        "query_ln": "q_norm",
        "key_ln": "k_norm",
        "per_dim_scale": "q_scaled",
    }
    steps = {"ff0": "up", "ff1": "down"}
    for place in ("pre", "post"):
        steps |= {f"{place}_{kind}_attn_ln": f"{place}_{kind}_norm" for kind in ("seq", "var")}
        steps[f"{place}_ff_ln"] = f"{place}_ffn_norm"
    for kind in ("seq", "var"):
        steps |= {f"{kind}_attn": kind, f"{kind}_attn.out_proj": kind}
        steps |= {f"{kind}_attn.{theirs}": f"{kind}/{name}" for theirs, name in attention.items()}
    for i in range(len(model.config.layers)):
        ours[f"transformer_stack.layers.{i}"] = f"layer_{i}"
        ours |= {f"transformer_stack.layers.{i}.{t}": f"layer_{i}/{o}" for t, o in steps.items()}
    return ours


def check_steps(recorded, case, taps, scale):
    """Compare all named steps of a case; how many. scale [B, C]: of its series."""
    io, ours, rel = recorded.io, names_of(recorded.model), recorded.rel(case)
    valid, count = io[f"act/{case}/valid_patch"], 0
    for key in [key for key in io if key.startswith(f"act/{case}/")]:
        name, want = key.removeprefix(f"act/{case}/"), io[key]
        if name not in ours:
            continue
        got = np.asarray(taps[ours[name]])
        count += 1
        if name.startswith(("running_", "refined_")):
            limit = np.zeros_like(scale) if name == "running_n" else rel * scale
            within(got, want, limit, key)
            continue
        # The original has one axis for batch and variates (or patches), one for heads and width.
        shape = valid.shape
        if ".var_attn" in name:
            got = np.swapaxes(got, 1, 2)
            want = np.swapaxes(want.reshape(shape[0], shape[2], shape[1], *want.shape[2:]), 1, 2)
        want = want.reshape(*shape, -1)
        parity.close(got.reshape(want.shape)[valid], want[valid], rtol=0, atol=rel, what=key)
    return count


def inputs(io, case):
    """Inputs of `apply`; the original's masks are True where a value is missing or hidden."""
    names = ("values", "masks", "patch_is_target", "patch_cpm_mask")
    x, missing, is_target, hidden = (io.get(f"{case}/in/{name}") for name in names)
    return [x, ~missing, is_target, None if hidden is None else ~hidden]


def largest(x, observed):
    """The largest absolute value [B, C] of what is known of series [B, C, ...]."""
    found = np.where(observed & ~np.isnan(x), np.abs(x), 0.0)
    return found.reshape(*x.shape[:2], -1).max(-1)


@pytest.mark.parametrize("case", FORWARD.split())
def test_golden_network(recorded, case):
    recorded.require(f"{case}/out/logits")
    io, given = recorded.io, inputs(recorded.io, case)
    freeze_after = io.get(f"{case}/in/freeze_after")
    y, taps = apply(
        recorded.model, None if freeze_after is None else int(freeze_after), recorded.params, *given
    )
    scale = largest(*given[:2])
    within(y, io[f"{case}/out/logits"], recorded.rel(case) * scale, case)
    assert check_steps(recorded, case, taps, scale) >= (10 if case == "forward" else 3)
    seen = np.asarray(taps["seen"])
    np.testing.assert_array_equal(seen, io[f"act/{case}/valid_patch"])


# --- series


def series(io, case):
    """The recorded targets and covariates as `decode` takes them.

    Returns: (horizon, x, observed), then both of what is known ahead, if anything is.
    """
    target = io[f"{case}/in/target"]
    t = target.shape[-1]
    x, observed = [target], [~io.get(f"{case}/in/target_mask", np.zeros(target.shape, bool))]
    for name, mask in (
        ("past_only_covariates", "past_only_mask"),
        ("past_future_covariates", "past_future_mask"),
    ):
        if f"{case}/in/{name}" in io:
            x.append(io[f"{case}/in/{name}"])
            observed.append(~io.get(f"{case}/in/{mask}", np.zeros(x[-1].shape, bool)))
    together = np.concatenate([part[..., :t] for part in x], axis=1)
    there = np.concatenate([part[..., :t] for part in observed], axis=1)
    if f"{case}/in/mask" in io:
        there = there & ~io[f"{case}/in/mask"][:, None]
    if x[-1].shape[-1] == t:
        return int(io[f"{case}/in/horizon"]), together, there
    return x[-1].shape[-1] - t, together, there, x[-1][..., t:], observed[-1][..., t:]


def scale_of(x, observed, known=None, known_observed=None):
    """Largest values [B, C] of series and of what is known ahead of the last ones."""
    scale = largest(x, observed)
    if known is not None:
        shown = known.shape[1]
        scale[:, -shown:] = np.maximum(scale[:, -shown:], largest(known, known_observed))
    return scale


@pytest.mark.parametrize(
    "case",
    [
        case if case in QUICK_DECODE else pytest.param(case, marks=pytest.mark.slow)
        for case in DECODE.split()
    ],
)
def test_golden_forecast(recorded, case):
    recorded.require(f"{case}/out/forecast")
    io, model, rel = recorded.io, recorded.model, recorded.rel(case)
    horizon, *given = series(io, case)
    scale = scale_of(*given)
    got = decode(model, horizon, recorded.params, *given)
    want = io[f"{case}/out/forecast"]
    within(got, want, recorded.allowed(case, want, scale), case)

    placed, trend = lay_out(model, horizon, *given)
    if f"act/{case}/apply_detrend" in io:
        np.testing.assert_array_equal(trend.used, io[f"act/{case}/apply_detrend"])
    if f"act/{case}/values" not in io:
        return
    if model.config.detrending:
        within(trend.slope, io[f"act/{case}/m_trend"], rel * scale, "slope")
        within(trend.level, io[f"act/{case}/c_trend"], rel * scale, "level")
    np.testing.assert_array_equal(placed["observed_BCNP"], ~io[f"act/{case}/masks"])
    np.testing.assert_array_equal(placed["is_target_BCN"], io[f"act/{case}/patch_is_target"])
    within(placed["x_BCNP"], io[f"act/{case}/values"], rel * scale, "values")
    context, ahead = io[f"act/{case}/num_patches"]
    assert model.outputs(horizon)[1] == ahead and placed["x_BCNP"].shape[2] == context + ahead

    # Steps of the whole pass, of which `decode` leaves the end out.
    freeze_after = int(context) - 1 if model.config.frozen_stats else None
    _, taps = apply(model, freeze_after, recorded.params, *(placed[name] for name in NAMES))
    assert check_steps(recorded, case, taps, scale) >= 3


# --- losses


def training_loss(recorded):
    """params -> the recorded objective of a forecast, in the units of the series."""
    io, model = recorded.io, recorded.model
    horizon, *given = series(io, "train")
    future = io["train/in/future"]

    def loss(params):
        y = model.decode(params, *given[:2], horizon, *given[2:])
        return quantile_errors(
            y[:, : future.shape[1]], jnp.asarray(future), model.config.quantiles
        ).mean()

    return loss


def test_golden_loss(recorded):
    want = parity.recorded_gradients(recorded.vectors, recorded.model)
    value = parity.check_gradients(training_loss(recorded), recorded.params, want)
    np.testing.assert_allclose(value, recorded.io["train/out/loss"], rtol=recorded.rel("train"))


@pytest.mark.slow
def test_golden_loss_of_patches(recorded):
    io, model = recorded.io, recorded.model
    given = inputs(io, "train_patches")
    want = parity.recorded_gradients(recorded.vectors, model, prefix="grad_patches/")
    value = parity.check_gradients(
        lambda params: model.patch_loss(params, *given), recorded.params, want
    )
    np.testing.assert_allclose(
        value, io["train_patches/out/loss"], rtol=recorded.rel("train_patches")
    )


# --- the original's wrapper, which forecasts series of several lengths in passes


@dataclasses.dataclass(frozen=True)
class Query:
    """Series [C, T] with covariates [K, T] and [K', T + horizon], from where its targets begin."""

    context: np.ndarray
    past: np.ndarray | None = None
    known: np.ndarray | None = None

    @classmethod
    def of(cls, context, past=None, known=None):
        context = np.atleast_2d(context)
        seen = ~np.isnan(context).all(0)
        begin = int(seen.argmax()) if seen.any() else 0
        return cls(*(None if x is None else x[:, begin:] for x in (context, past, known)))

    def padded(self, length):
        """With NaN in front, so that the context has so many steps; each a batch of one row."""
        front = max(length - self.context.shape[1], 0)
        rows = []
        for x in (self.context, self.past, self.known):
            if x is not None:
                x = np.pad(x, ((0, 0), (front, 0)), constant_values=np.nan)[None].astype(np.float32)
            rows.append(x)
        return rows


def pass_lengths(queries, size, limit, twice):
    """The context [steps] of the passes that forecast each series, and its negative."""
    repeat = 2 if twice else 1
    lengths = np.repeat([query.context.shape[1] for query in queries], repeat)
    found = []
    for i in range(len(lengths)):
        first = i // size * size
        found.append(min(lengths[first : first + size].max(), limit))
    return np.reshape(found, (-1, repeat))


def with_options(recorded, **options):
    """The model that forecasts as the original's wrapper does."""
    io = recorded.io
    limit = int(io["forecast/in/max_context"])
    config = dataclasses.replace(
        recorded.model.config, max_context=limit, padding_counts=True, **options
    )
    return TimesFM3(config), -(-limit // config.patch_len) * config.patch_len


def forecasts(recorded, queries, horizon, size, options):
    """The quantiles [C, horizon, Q] of each query, in passes of `size`."""
    model, limit = with_options(recorded, **options)
    lengths = pass_lengths(queries, size, limit, model.config.flip_average)
    found: list[Any] = [None] * len(queries)

    def run(model, rows, lengths, sign=1):
        # Series of one shape are one batch.
        padded = [queries[i].padded(length) for i, length in zip(rows, lengths, strict=True)]
        shapes = [row[0].shape for row in padded]
        for shape in sorted(set(shapes)):
            alike = [j for j, other in enumerate(shapes) if other == shape]
            batch = []
            for parts in zip(*(padded[j] for j in alike), strict=True):
                batch.append(None if parts[0] is None else sign * np.concatenate(parts))
            y = np.asarray(forecast(model, horizon, recorded.params, *batch))
            yield from ((rows[j], y[k]) for k, j in enumerate(alike))

    # Where a pass ends between a series and its negative, the two are padded differently.
    same = [i for i, pair in enumerate(lengths) if len(set(pair)) == 1]
    split = [i for i in range(len(queries)) if i not in same]
    for i, y in run(model, same, [lengths[i][0] for i in same]):
        found[i] = y
    if split:
        once = TimesFM3(
            dataclasses.replace(model.config, flip_average=False, infer_is_positive=False)
        )
        up = dict(run(once, split, [lengths[i][0] for i in split]))
        down = dict(run(once, split, [lengths[i][1] for i in split], sign=-1))
        for i in split:
            y = (up[i] - down[i][..., ::-1]) / 2
            if model.config.infer_is_positive:
                seen = queries[i].context
                positive = ~(seen < 0).any(-1) & ~np.isnan(seen).all(-1)
                y = np.where(positive[:, None, None], np.maximum(y, 0), y)
            found[i] = y
    return found


def check_wrapper(recorded, case, queries, size, options):
    """Compare the forecasts of a case with its quantiles [series, (targets,) horizon, Q]."""
    io = recorded.io
    horizon, want = int(io[f"{case}/in/horizon"]), io[f"{case}/out/quantiles"]
    got = forecasts(recorded, queries, horizon, size, options)
    for i, query in enumerate(queries):
        scale = largest(query.context[None], ~np.isnan(query.context)[None])[0]
        each = want[i].reshape(got[i].shape)
        within(got[i], each, recorded.rel(case) * scale, f"{case}: series {i}")
    if f"{case}/out/forecast" in io:
        column = int(io["forecast/in/median_quantile_index"])
        np.testing.assert_array_equal(want[..., column], io[f"{case}/out/forecast"])


def flags(io, case):
    """Our options of a case."""
    return {ours: bool(io[f"{case}/in/flag_{theirs}"]) for theirs, ours in FLAGS.items()}


def listed(io, prefix):
    """The recorded series under a prefix, in their order."""
    count = sum(re.fullmatch(re.escape(prefix) + r"\d+", key) is not None for key in io)
    return [io[f"{prefix}{i}"] for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORECAST.split())
def test_golden_wrapper(recorded, name):
    case = f"forecast_{name}"
    recorded.require(f"{case}/out/quantiles")
    io = recorded.io
    queries = [Query.of(x) for x in listed(io, "forecast/in/context_")]
    if name == "long":
        queries = [queries[0], queries[-1]]
    options = flags(io, "forecast_default" if name == "long" else case)
    check_wrapper(recorded, case, queries, int(io["forecast/in/per_core_batch_size"]), options)


@pytest.mark.slow
@pytest.mark.parametrize("name", COVARIATES.split())
def test_golden_covariates(recorded, name):
    case = f"forecast_cov_{name}"
    recorded.require(f"{case}/out/quantiles")
    io, horizon = recorded.io, int(recorded.io[f"{case}/in/horizon"])
    contexts = listed(io, "forecast_cov/in/context_")
    queries = []
    for i, context in enumerate(contexts):
        parts = [context]
        for kind, ahead in (("past_only_covariates", 0), ("past_future_covariates", horizon)):
            prefix = f"forecast_cov/in/{kind}_"
            given = [io[key] for key in io if key.startswith(prefix)]
            # A series that has none beside others that do gets zeros.
            nothing = (
                np.zeros((given[0].shape[0], context.shape[1] + ahead), np.float32)
                if given
                else None
            )
            parts.append(io.get(f"{prefix}{i}", nothing))
        queries.append(Query.of(*parts))
    check_wrapper(
        recorded, case, queries, int(io["forecast_cov/in/per_core_batch_size"]), flags(io, case)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATOR.split())
def test_golden_evaluator(recorded, name):
    """Each variate alone, and more variates than see each other."""
    case = f"evaluator_{name}"
    recorded.require(f"{case}/out/quantiles")
    io, options = recorded.io, {"flip_average": True, "infer_is_positive": True}
    horizon, want = int(io[f"{case}/in/horizon"]), io[f"{case}/out/quantiles"]
    contexts = listed(io, f"{case}/in/context_")
    told = recorded.vectors.meta["io"][f"{case}/in/horizon"]["meaning"]
    size = re.search(r"per_core_batch_size (\d+)", told)
    if name == "univariate":
        queries = [Query.of(row) for context in contexts for row in context]
        assert size
        got = forecasts(recorded, queries, horizon, int(size[1]), options)
    else:
        beside = [io.get(f"{case}/in/{kind}_covariates_0") for kind in ("past_only", "past_future")]
        queries = [Query.of(row) for row in contexts[0]]
        assert len(queries) > recorded.model.config.max_variates
        got = forecasts(recorded, [Query.of(contexts[0], *beside)], horizon, 2, options)[0]
    want = want.reshape(len(queries), 1, *want.shape[-2:])
    for query, y, each in zip(queries, got, want, strict=True):
        scale = largest(query.context[None], ~np.isnan(query.context)[None])[0]
        within(y.reshape(each.shape), each, recorded.rel(case) * scale, case)


# --- files


def test_golden_round_trip(recorded, tmp_path):
    """Tensors come back byte for byte, and config.json says the same model."""
    out = parity.check_round_trip(recorded.vectors.checkpoint, tmp_path)
    assert import_checkpoint(out)[0] == recorded.model
    told = json.loads((tmp_path / "config.json").read_text())
    assert told == recorded.vectors.config

    # Without the fields that the import remembered, too.
    state = parity.tensors(recorded.vectors.checkpoint)
    again, _ = converter.configure(
        state, json.loads(json.dumps(converter.published(recorded.model.config))), "here"
    )
    assert again == recorded.model.config
    with pytest.raises(CheckpointError, match=r"Put the original's config\.json"):
        converter.configure(state, None, "here")


def test_golden_initialisation(golden):
    stats = golden(MAIN).init_stats
    shapes = {name: np.zeros(entry["shape"], np.float32) for name, entry in stats["params"].items()}
    config, _ = converter.configure(shapes, stats["_about"]["config"], "init_stats.json")
    assert parity.check_initialisation(TimesFM3(config), stats["params"]) == len(stats["params"])
