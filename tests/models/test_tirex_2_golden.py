"""TiRex-2 against vectors recorded from the original package, every set (`--golden DIR`)."""

import dataclasses
import json
import re
from typing import Any

import chex
import jax
import numpy as np
import parity
import pytest
import yaml

from converters import CheckpointError, import_checkpoint
from converters import tirex_2 as converter
from converters.torch_files import write_torch
from ltsm_jax.layers import taps as layer_taps
from ltsm_jax.layers.quantiles import at_levels, median_of
from ltsm_jax.models import tirex_2
from ltsm_jax.models.tirex_2 import TiRex2, has_trend, trend

RTOL = 1e-4  # of meta.json; absolute 1e-4, too, in scaled units and of the largest value of a row
MAIN = "tirex_2"


def pytest_generate_tests(metafunc):
    """The recorded set, and each of its variants."""
    if "recorded" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden")
        found = [
            pytest.param(str(file.parent.relative_to(root)), marks=pytest.mark.slow)
            for file in sorted(root.glob(f"{MAIN}/variants/*/meta.json"))
        ]
        metafunc.parametrize("recorded", [MAIN, *found], indirect=True, scope="module")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A checkpoint read as a user's would be, and the arrays of its cases."""

    vectors: Any
    model: TiRex2
    params: dict
    io: dict
    outputs: dict  # by case, filled by `found`

    def cases(self, suffix):
        """Names of the cases that have an array."""
        return [key.removesuffix(suffix) for key in self.io if key.endswith(suffix)]

    def window(self, case):
        """What `apply` takes of a case, its rows as the members of one group."""
        x, target = self.io[f"{case}/in/x"], self.io[f"{case}/in/target_mask"].astype(bool)
        group = self.io.get(f"{case}/in/group_vector")
        if group is None:  # no mask at all
            seen, mixed = np.ones((len(x), len(x)), bool), np.ones(len(x), bool)
        else:
            same = group[:, None] == group[None]
            seen, mixed = same & ~(~target[:, None] & target[None]), same.sum(axis=1) > 1
        both = tuple(int(i) for i in np.flatnonzero(~target))
        return {"x_GMT": x[None], "seen": seen[None], "mixed": mixed[None]}, both

    def found(self, case):
        """What `apply` gives of a case, and what its linear layers at both ends give."""
        if case in self.outputs:
            return self.outputs[case]
        given, both = self.window(case)
        wanted = [
            f"{block}/{part}"
            for block in ("embed", "head")
            for part in ("hidden", "out", "residual")
        ]

        def applied(params, x_GMT, seen, mixed):
            with layer_taps.calls_of(wanted) as calls:
                y, taps = self.model.apply(params, x_GMT, both=both, seen=seen, mixed=mixed)
            return y, taps | {path: found[0][1] for path, found in calls.items()}

        y, taps = jax.jit(applied)(self.params, **given)
        steps = {name: np.asarray(value) for name, value in taps.items()}
        self.outputs[case] = np.asarray(y[0]), steps
        return self.outputs[case]


@pytest.fixture(scope="module")
def recorded(request, golden):
    vectors = golden(request.param)
    model, params = parity.load(vectors)
    return Recorded(vectors, model, params, vectors.arrays("io.npz"), {})


def check_rows(got_RTQ, want_RQT, what):
    """Equal within the recorded tolerance, each row by its largest value."""
    got, want = np.swapaxes(np.asarray(got_RTQ), 1, 2), np.asarray(want_RQT)
    assert got.shape == want.shape, f"{what}: {got.shape}, {want.shape}"
    allowed = RTOL * np.abs(want) + 1e-4 * np.abs(want).max(axis=(1, 2), keepdims=True)
    error = np.abs(got - want)
    parity.note(error, allowed)
    assert (error <= allowed).all(), f"{what}: off by {error.max()} at most"


QUICK = "multi"  # the case with covariates of all kinds


def test_golden_outputs(recorded):
    check_outputs(recorded, QUICK)


@pytest.mark.slow
def test_golden_outputs_of_other_cases(recorded):
    others = [case for case in recorded.cases("/in/x") if case != QUICK]
    assert others
    for case in others:
        check_outputs(recorded, case)


def check_outputs(recorded, case):
    io, (y, taps) = recorded.io, recorded.found(case)
    check_rows(y, io[f"{case}/out/prediction"], case)
    if f"{case}/out/scaled" in io:
        want = np.swapaxes(io[f"{case}/out/scaled"], 1, 2)
        parity.close(taps["scaled"][0], want, atol=1e-4, what=case)
    for name in ("loc", "scale"):
        want = io[f"{case}/out/{name}"]
        parity.close(taps[name][0], want, rtol=1e-5, atol=1e-6, what=f"{case} {name}")
    if f"{case}/out/is_binary" in io:
        np.testing.assert_array_equal(taps["binary"][0], io[f"{case}/out/is_binary"], err_msg=case)


PLAIN = {
    "tokens": "tokens",
    "input_patch_embedding": "embed",
    "input_patch_embedding.hidden_layer": "embed/hidden",
    "input_patch_embedding.output_layer": "embed/out",
    "input_patch_embedding.residual_layer": "embed/residual",
    "stack_out_norm": "norm",
    "output_patch_embedding": "head",
    "time_mixer.norm_lstm": "norm1",
    "time_mixer.norm_ffn": "norm2",
    "time_mixer.ffn": "ffn",
    "time_mixer": "time",
    "": "",
}
MIXED = {"norm_attn": "norm1", "attn": "attn", "norm_ffn": "norm2", "ffn": "ffn"}
CELL = {
    "q": "q",
    "k": "k",
    "v": "v",
    "ogate_preact": "gate",
    "igate_preact": "i",
    "fgate_preact": "f",
    "multihead_norm": "norm",
    "fgate": "i",  # as the original crosses them
    "igate": "f",
    "zgate": "z",
    "ogate": "o",
    "group_norm": "out",
    "": "out",
}
STATES = {
    "denominator": "denominator",
    "m": "m",
    "h": "h",
    "C_last": "C",
    "n_last": "n",
    "m_last": "m_last",
}


def step_of(taps, name, mixed):
    """What is recorded under a name, of our steps."""
    if name in PLAIN:
        return taps[PLAIN[name]][0]
    layer = re.fullmatch(r"stack\.(\d+)\.?(.*)", name)
    prefix, rest = f"layer_{layer[1]}", layer[2]
    if rest in PLAIN:
        return taps[f"{prefix}/{PLAIN[rest]}".rstrip("/")][0]
    mixer, _, part = rest.partition(".")
    if mixer == "variate_mixer":
        return np.swapaxes(taps[f"{prefix}/variates/{MIXED[part]}"][0], 0, 1)[:, mixed[0]]
    known = np.flatnonzero(taps["known"][0])
    if part == "combination" and not len(known):
        return np.zeros((0, *taps["embed"].shape[2:]), np.float32)
    if part == "combination":
        return taps[f"{prefix}/combine"][0][known]

    # Rows that run backwards stand behind all others.
    m = taps["loc"].shape[1]
    cell, _, part = part.partition(".")
    rows = slice(0, m) if cell == "fwd_cell" else m + known
    if part == "states":
        return taps[f"{prefix}/cell/states"].transpose(0, 3, 1, 2, 4)[:, rows]
    if part in STATES:
        x = taps[f"{prefix}/cell/{STATES[part]}"][rows]
        return x[..., None] if part == "m_last" else x
    x = taps[f"{prefix}/cell/{CELL[part]}"][0][rows]
    return x.reshape(*x.shape[:2], -1)


def test_golden_intermediates(recorded):
    assert check_intermediates(recorded, QUICK) or "variants" in str(recorded.vectors.folder)


@pytest.mark.slow
def test_golden_intermediates_of_other_cases(recorded):
    cases = {match[1] for key in recorded.io if (match := re.match("act/([^/]+)/", key))}
    for case in sorted(cases - {QUICK}):
        assert check_intermediates(recorded, case)


def check_intermediates(recorded, case):
    """Compare all steps recorded of a case; how many they are."""
    prefix, compared = f"act/{case}/", 0
    given, _ = recorded.window(case)
    for key, want in recorded.io.items():
        if key.startswith(prefix):
            taps = recorded.found(case)[1]
            got = step_of(taps, key.removeprefix(prefix), given["mixed"])
            parity.close(got, want, atol=1e-4, what=key)
            compared += 1
    return compared


def test_golden_chunks(recorded, monkeypatch):
    """Of any length: the recorded sequence of many tokens, in several chunks."""
    case = "long" if "long/in/x" in recorded.io else "multi"
    given, both = recorded.window(case)
    monkeypatch.setattr(tirex_2, "CHUNK", 3)
    run = jax.jit(
        lambda x_GMT, seen, mixed: recorded.model.apply(
            recorded.params, x_GMT, both=both, seen=seen, mixed=mixed
        )
    )
    check_rows(run(**given)[0][0], recorded.io[f"{case}/out/prediction"], case)


def future_of(model, taps):
    """The steps of the future window, of all that `apply` gives."""
    p, f = model.config.patch_len, model.config.future_len
    return taps | {"scaled": taps["scaled"][:, :, -p - f : -p]}


def own_loss(model, params, given, both, labels):
    _, taps = model.apply(params, both=both, **given)
    error, observed = model.errors(future_of(model, taps), labels[None])
    return (error * observed).sum() / observed.sum()


def test_golden_losses(recorded):
    """From the recorded window; the gradients' tests take the loss anew."""
    model, io = recorded.model, recorded.io
    cases = [case for case in recorded.cases("/out/loss") if case == QUICK]
    assert cases
    for case in cases:
        labels, taps = io[f"{case}/in/future"], recorded.found(case)[1]
        error, observed = model.errors(future_of(model, taps), labels[None])
        loss = (error * observed).sum() / observed.sum()
        np.testing.assert_allclose(loss, io[f"{case}/out/loss"], rtol=1e-5)
        scaled = model.scaled(labels[None], taps["loc"], taps["scale"], taps["binary"])
        parity.close(np.nan_to_num(scaled[0]), io[f"{case}/out/loss_target"], atol=1e-4, what=case)


def test_golden_loss_of_a_batch(recorded):
    """`loss` makes the window itself."""
    model, io = recorded.model, recorded.io
    x, labels = io["univariate/in/x"], io["univariate/in/future"]
    f = model.config.future_len
    if x.shape[1] != model.config.context_len + f or not io["univariate/in/target_mask"].all():
        pytest.skip("recorded with another length, or with covariates")
    batch = {"context": x[:, None, :-f], "target": labels[:, None]}
    got = jax.jit(model.loss)(recorded.params, batch)
    np.testing.assert_allclose(got, io["univariate/out/loss"], rtol=1e-5)


@pytest.mark.parametrize("case, prefix", [(QUICK, "grad/"), ("univariate", "univariate/grad/")])
@pytest.mark.slow
def test_golden_gradients(recorded, case, prefix):
    model = recorded.model
    given, both = recorded.window(case)
    labels = recorded.io[f"{case}/in/future"]
    if not any(key.startswith(prefix) for key in recorded.vectors.arrays("grads.npz")):
        pytest.skip("no gradients of this case recorded")
    want = parity.recorded_gradients(recorded.vectors, model, prefix=prefix)
    value = parity.check_gradients(
        lambda p: own_loss(model, p, given, both, labels), recorded.params, want
    )
    np.testing.assert_allclose(value, recorded.io[f"{case}/out/loss"], rtol=1e-5)


# Cases whose forecasts are compared in every run: covariates, a trend, both augmentations.
QUICK_FORECASTS = ("covariates_flip", "predict")


def forecasts(recorded, case):
    """(model, series) of a case: of each what `rows` takes, the recorded forecast and point."""
    io = recorded.io
    changes: dict[str, Any] = {"zero_at_start": True}
    for ours, theirs in (("sign_flip", "tta_sign_flip"), ("difference", "tta_diff")):
        if int(io[f"{case}/in/{theirs}"]) >= 0:
            changes[ours] = bool(io[f"{case}/in/{theirs}"])
    model = TiRex2(dataclasses.replace(recorded.model.config, **changes))
    steps = min(int(io[f"{case}/in/prediction_length"]), model.config.future_len)
    names = [f"{case}/in/series{i}" for i in range(int(io[f"{case}/in/num_series"]))]
    pad = bool(io[f"{case}/in/pad_context"])
    longest = max(io[f"{name}/target"].shape[-1] for name in names)
    found = []
    for i, name in enumerate(names):
        members = [io[f"{name}/target"]]
        t = members[0].shape[-1]
        future = None
        if f"{name}/past_covariates" in io:
            members.append(io[f"{name}/past_covariates"])
        if f"{name}/future_covariates" in io:
            known = io[f"{name}/future_covariates"]
            members.append(known[:, :t])
            future = known[None, :, t : t + steps]
        x = np.concatenate(members)[None]
        if not pad:  # but to the longest of the batch
            x = np.pad(x, ((0, 0), (0, 0), (longest - t, 0)), constant_values=np.nan)
        kwargs = {"targets": len(members[0]), "pad": pad}
        found.append(
            (x, future, steps, kwargs, io[f"{case}/out/forecast{i}"], io[f"{case}/out/point{i}"])
        )
    return model, found


@pytest.mark.slow
def test_golden_forecasts(recorded):
    """Of the package's own `predict`: covariates, trends, both augmentations, all lengths."""
    assert check_forecasts(recorded, recorded.cases("/in/num_series"))


def test_golden_forecast(recorded):
    """Of a few cases."""
    cases = [case for case in recorded.cases("/in/num_series") if case in QUICK_FORECASTS]
    assert check_forecasts(recorded, cases)


def check_forecasts(recorded, cases):
    compared = 0
    run = jax.jit(
        lambda params, x, future, model, steps, targets, pad: model.rows(
            params, x, steps, targets=targets, future=future, pad=pad
        ),
        static_argnums=(3, 4, 5, 6),
    )
    for case in cases:
        model, series = forecasts(recorded, case)
        flags = []
        for i, (x, future, steps, more, want, point) in enumerate(series):
            y = run(recorded.params, x, future, model, steps, more["targets"], more["pad"])
            check_rows(y[0], want, f"{case} {i}")
            check_rows(
                median_of(y, model.config.levels)[0][..., None], point[:, None], f"{case} {i} point"
            )
            flags += np.asarray(has_trend(x[0, : more["targets"]])).tolist()
            compared += 1
        if model.config.difference:
            assert flags == recorded.io[f"{case}/out/batch/differenced"].tolist(), case
    return compared


def test_golden_trends(recorded):
    io = recorded.io
    if "util/trend/in" not in io:
        pytest.skip("no trends recorded")
    rise, share = trend(io["util/trend/in"])
    want = np.nan_to_num(io["util/trend/score_r2"])
    parity.close(np.stack([rise, share], axis=1), want, what="trend")
    np.testing.assert_array_equal(has_trend(io["util/trend/in"]), io["util/trend/flag"])


def test_golden_levels_of_ones_own(recorded):
    io = recorded.io
    if "util/quantile_levels/in" not in io:
        pytest.skip("no levels recorded")
    y = np.moveaxis(io["util/quantile_levels/in"].astype(np.float32), 1, 2)
    got = at_levels(y, recorded.model.config.levels, io["util/quantile_levels/levels"])
    parity.close(np.moveaxis(np.asarray(got), 2, 0), io["util/quantile_levels/out"])


def test_golden_round_trip(recorded, tmp_path):
    """Tensors come back byte for byte, and the fields of config.json as they were."""
    out = parity.check_round_trip(recorded.vectors.checkpoint, tmp_path)
    assert json.loads((out.parent / "config.json").read_text()) == recorded.vectors.config

    # Without the fields that the import remembered, it is the same model.
    state = parity.tensors(recorded.vectors.checkpoint)
    told = json.loads(json.dumps(converter.published(recorded.model.config)))
    assert converter.configure(state, told, "here")[0] == recorded.model.config
    with pytest.raises(CheckpointError, match=r"Put the original's config\.json"):
        converter.configure(state, None, "here")


def test_golden_older_files(recorded, tmp_path):
    """A pickle with every tensor under all of its names, and the config as YAML."""
    state = parity.tensors(recorded.vectors.checkpoint)
    for name in recorded.vectors.meta["aliases_not_stored"]:
        source = name.replace(".rev_cell.", ".fwd_cell.")
        source = re.sub(r"\.recurrent_kernel$", "._recurrent_kernel_", source)
        state[name] = state[source]
    folder = tmp_path / "older"
    folder.mkdir()
    (folder / "model-config.yaml").write_text(yaml.safe_dump(recorded.vectors.config))
    write_torch(folder / "model.ckpt", {"state_dict": state})
    model, params, provenance, _ = import_checkpoint(folder)
    assert model == recorded.model
    chex.assert_trees_all_equal(params, recorded.params)
    assert set(recorded.vectors.meta["aliases_not_stored"]) <= set(provenance["copies"])

    # And back: every name is there again.
    again = parity.check_round_trip(folder / "model.ckpt", tmp_path)
    assert parity.tensors(again).keys() == state.keys()


def test_golden_names_that_a_file_may_have_instead(recorded, tmp_path):
    """Only those of the recurrence that runs backwards."""
    state = parity.tensors(recorded.vectors.checkpoint)
    turned = {}
    for key, value in state.items():
        key = key.replace("fwd_cell._recurrent_kernel_", "fwd_cell.recurrent_kernel")
        turned[key.replace(".fwd_cell.", ".rev_cell.")] = value
    write_torch(tmp_path / "model.ckpt", turned)
    model, params, *_ = import_checkpoint(tmp_path / "model.ckpt", config=recorded.vectors.config)
    assert model == recorded.model
    chex.assert_trees_all_equal(params, recorded.params)


def test_golden_initialisation(golden):
    vectors = golden(MAIN)
    stats = vectors.init_stats["params"]
    shapes = {key: np.broadcast_to(np.float32(0), entry["shape"]) for key, entry in stats.items()}
    config, _ = converter.configure(
        shapes, vectors.init_stats["_about"]["config"], "init_stats.json"
    )
    model = TiRex2(config)
    expected = {key: 0.1 for key in stats if key.endswith("igate_preact.bias")}
    assert parity.check_initialisation(model, stats, expected=expected) == len(stats)

    params = jax.jit(model.init)(jax.random.key(0))
    for key, entry in stats.items():
        if "head0_slot1" in entry:
            bias = params[f"layer_{key.split('.')[1]}"]["slstm"]["bias"]
            places = (
                np.linspace(0, bias.shape[-1] - 1, len(entry["head0_slot1"])).round().astype(int)
            )
            np.testing.assert_allclose(
                bias[0, 1, places], entry["head0_slot1"], rtol=1e-5, atol=1e-5
            )
            np.testing.assert_array_equal(
                bias[:, 1], np.broadcast_to(bias[:1, 1], bias[:, 1].shape)
            )
            np.testing.assert_array_equal(np.delete(bias, 1, axis=1), 0)
