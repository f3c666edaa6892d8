"""Chronos-T5 against vectors recorded from the original PyTorch code (`--golden DIR` names another
set).
"""

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import (
    check_gradients,
    check_initialisation,
    check_round_trip,
    close,
    load,
    recorded_gradients,
)

from converters import import_checkpoint
from ltsm_jax.layers import t5
from ltsm_jax.models import chronos_t5
from ltsm_jax.models.chronos_t5 import ChronosT5, ChronosT5Config, ChronosT5Net

LOGITS = {"rtol": 0, "atol": 1e-4}  # of meta.json, also for what lies before them


@pytest.fixture(scope="module")
def recorded(golden):
    """(vectors, model, params, io arrays): the checkpoint read as a user's would be."""
    vectors = golden("chronos_t5")
    model, params = load(vectors)
    return vectors, model, params, vectors.arrays("io.npz")


def cases(io, *names):
    """The recorded cases that have all of these arrays."""
    found = [
        key.split("/")[0] for key in io if key.endswith("/" + names[0]) and key.count("/") == 2
    ]
    found = [case for case in found if all(f"{case}/{name}" in io for name in names)]
    assert found, names
    return found


@pytest.fixture(scope="module")
def taught(recorded):
    """{case: (logits, named steps, loss)} with the target given, of every case that has one."""
    _, model, params, io = recorded

    @jax.jit
    def both(params, x, y):
        return *model.apply(params, x, y), model.loss(params, {"context": x, "target": y})

    return {
        case: both(params, io[f"{case}/in/context"][:, None], io[f"{case}/in/label"][:, None])
        for case in cases(io, "out/logits", "in/label")
    }


def test_golden_bins(recorded):
    *_, io = recorded
    for name in ("tokenizer", "published_tokenizer"):
        want = io[f"{name}/centers"]
        centres, boundaries = chronos_t5.bins(len(want), float(want[0]), float(want[-1]))
        np.testing.assert_array_equal(centres, want, err_msg=name)
        np.testing.assert_array_equal(boundaries, io[f"{name}/boundaries"], err_msg=name)


def test_golden_tokens(recorded):
    _, model, _, io = recorded
    centres = io["published_tokenizer/centers"]
    length = io["published_tokenizer/out/token_ids"].shape[1]
    special = int(io["published_tokenizer/out/ids_scale1"].max()) - len(centres)
    published = dataclasses.replace(
        chronos_t5.PRESETS["amazon/chronos-t5-tiny"],
        n_special=special,
        n_tokens=len(centres) + special + 1,
        low=float(centres[0]),
        high=float(centres[-1]),
    )
    published = dataclasses.replace(published, context_len=length - published.use_eos)
    contexts = {
        case: (
            published if case == "published_tokenizer" else model.config,
            io[f"{case}/in/context"],
        )
        for case in cases(io, "out/token_ids", "in/context")
    }
    if "tok_no_eos/out/token_ids" in io:
        contexts["tok_no_eos"] = (
            dataclasses.replace(model.config, use_eos=False),
            io["nan/in/context"],
        )

    @jax.jit  # all cases in one program
    def tokens():
        found, labels = {}, {}
        for case, (cfg, x) in contexts.items():
            x = jnp.asarray(x)[:, -cfg.context_len :]
            scale = chronos_t5.mean_scale(x)
            found[case] = (*chronos_t5.tokenize(cfg, x, scale), scale)
            if f"{case}/in/label" in io:
                labels[case] = chronos_t5.tokenize(cfg, jnp.asarray(io[f"{case}/in/label"]), scale)
        return found, labels

    found, labels = tokens()
    for case, (ids, observed, scale) in found.items():
        np.testing.assert_array_equal(ids, io[f"{case}/out/token_ids"], err_msg=case)
        np.testing.assert_array_equal(observed, io[f"{case}/out/attention_mask"], err_msg=case)
        if f"{case}/out/scale" in io:
            close(scale, io[f"{case}/out/scale"], rtol=1e-6, atol=0, what=case)
    for case, (ids, observed) in labels.items():
        np.testing.assert_array_equal(ids, io[f"{case}/out/label_ids"], err_msg=case)
        np.testing.assert_array_equal(observed, io[f"{case}/out/label_mask"], err_msg=case)
    for cfg, x, want in (
        (model.config, "edges/in/values", "edges/out/token_ids"),
        (published, "published_tokenizer/in/values_scale1", "published_tokenizer/out/ids_scale1"),
    ):
        ids, _ = chronos_t5.tokenize(
            dataclasses.replace(cfg, use_eos=False), jnp.asarray(io[x]), jnp.ones(1)
        )
        np.testing.assert_array_equal(ids, io[want], err_msg=want)


def test_golden_values_of_tokens(recorded):
    _, model, _, io = recorded
    values = chronos_t5.token_values(model.config)[io["decode_tokens/in/token_ids"]]
    scale = io["decode_tokens/in/scale"].reshape(-1, 1, 1)
    close(values * scale, io["decode_tokens/out/values"], rtol=1e-6, atol=0)


def test_golden_logits_and_loss(recorded, taught):
    *_, io = recorded
    for case, (logits, taps, loss) in taught.items():
        close(logits, io[f"{case}/out/logits"], what=case, **LOGITS)
        labels = np.where(taps["scored"], taps["labels"], -100)
        np.testing.assert_array_equal(labels, io[f"{case}/in/labels"], err_msg=case)
        np.testing.assert_allclose(loss, io[f"{case}/out/loss"], rtol=1e-5, err_msg=case)


def test_golden_intermediates(recorded, taught):
    *_, io = recorded
    for case, (_, taps, _) in taught.items():
        close(taps["memory"], io[f"{case}/out/encoder_last_hidden_state"], what=case, **LOGITS)
    names = {"encoder": ("after_attn", ""), "decoder": ("after_attn", "after_cross", "")}
    compared = 0
    for key in io:
        if not key.startswith("act/"):
            continue
        _, case, module = key.split("/")
        stack, _, rest = module.partition(".")
        layer = re.fullmatch(r"block\.(\d+)(?:\.layer\.(\d+))?", rest)
        if rest == "final_layer_norm":
            tap = "norm"
        else:
            assert layer, key
            tap = "/".join(filter(None, (f"layer_{layer[1]}", names[stack][int(layer[2] or -1)])))
        close(taught[case][1][f"{stack}/{tap}"], io[key], what=key, **LOGITS)
        compared += 1
    assert compared


def test_golden_embedding(recorded):
    _, model, params, io = recorded
    embed = jax.jit(model.embed)
    contexts = {
        case: io[f"{case}/in/context"]
        for case in cases(io, "out/embed")
        if f"{case}/in/context" in io
    }
    ragged = [io[key] for key in sorted(io) if key.startswith("list/in/context_")]
    if ragged:  # shorter series are missing at the start
        longest = max(map(len, ragged))
        rows = [np.pad(x, (longest - len(x), 0), constant_values=np.nan) for x in ragged]
        contexts["list"] = np.stack(rows)
        close(
            chronos_t5.mean_scale(jnp.asarray(contexts["list"])),
            io["list/out/scale"],
            rtol=1e-6,
            atol=0,
        )
    assert contexts
    for case, x in contexts.items():
        close(embed(params, x[:, None])[:, 0], io[f"{case}/out/embed"], what=case, **LOGITS)


@pytest.mark.parametrize("prefix", ["grad/", "nan/grad/"])
def test_golden_gradients(recorded, prefix):
    vectors, model, params, io = recorded
    case = "nan" if prefix.startswith("nan") else "normal"
    batch = {
        "context": io[f"{case}/in/context"][:, None],
        "target": io[f"{case}/in/label"][:, None],
    }
    want = recorded_gradients(vectors, model, prefix)
    check_gradients(lambda q: model.loss(q, batch), params, want)


def sampler(model, io, case):
    """The model with the sampling parameters of a case."""
    temperature, top_k, top_p = (float(p) for p in io[f"{case}/in/params"])
    told = {"temperature": temperature, "top_k": int(top_k) or None, "top_p": top_p}
    if f"{case}/in/num_samples" in io:
        told["n_samples"] = int(io[f"{case}/in/num_samples"])
    return ChronosT5(dataclasses.replace(model.config, **told))


def test_golden_logits_token_by_token(recorded):
    """Along the paths that the original sampled: at once, and with a cache of keys and values."""
    _, model, params, io = recorded
    cfg, want = model.config, io["generate/out/logits"]
    so_far = jnp.asarray(io["generate/out/sequences"][:, :-1])
    x = jnp.asarray(io["generate/in/context"])
    tokens = chronos_t5.tokenize(cfg, x, chronos_t5.mean_scale(x))
    rows, n = so_far.shape
    net: Any = ChronosT5Net(cfg)
    assert (np.asarray(so_far[:, 0]) == cfg.start).all()

    @jax.jit
    def both(params):
        at_once, *_ = net.apply({"params": params}, *tokens, so_far)
        *_, context = net.apply({"params": params}, *tokens, None)

        def step(own, i):
            token = jax.lax.dynamic_slice_in_dim(so_far, i, 1, axis=1)
            cache = {layer: context[layer] | own[layer] for layer in own}
            logits, _, cache = net.apply(
                {"params": params}, None, tokens[1], token, cache=cache, start=i
            )
            return {
                layer: {name: kv[name] for name in "kv"} for layer, kv in cache.items()
            }, logits[:, 0]

        _, one_by_one = jax.lax.scan(
            step, t5.empty_decoder_cache(cfg.decoder, rows, n), jnp.arange(n)
        )
        return at_once, jnp.swapaxes(one_by_one, 0, 1)

    for logits in both(params):
        close(logits, want, **LOGITS)


def test_golden_scores(recorded):
    _, model, _, io = recorded
    found = cases(io, "out/scores", "out/logits", "in/params")
    for case in found:
        got = jax.jit(lambda y, case=case: chronos_t5.scores(sampler(model, io, case).config, y))(
            io[f"{case}/out/logits"]
        )
        close(got, io[f"{case}/out/scores"], rtol=1e-6, atol=1e-6, what=case)


@pytest.fixture(scope="module")
def sampled(recorded):
    """{case: samples [B, H, samples]} with the recorded noise."""
    _, model, params, io = recorded
    found = {}
    for case in cases(io, "out/samples", "in/gumbel"):
        one, horizon = sampler(model, io, case), int(io[f"{case}/in/prediction_length"])
        sample = jax.jit(
            lambda q, x, noise, one=one, horizon=horizon: one.sample(q, x, horizon, gumbel=noise)
        )
        found[case] = sample(params, io[f"{case}/in/context"], io[f"{case}/in/gumbel"])
    return found


@pytest.mark.slow
def test_golden_samples(recorded, sampled):
    *_, io = recorded
    for case, got in sampled.items():
        close(
            np.moveaxis(np.asarray(got), 2, 1),
            io[f"{case}/out/samples"],
            rtol=1e-5,
            atol=0,
            what=case,
        )


def test_golden_quantiles_of_samples(recorded, sampled):
    *_, io = recorded
    if "sample_quantiles/out/quantiles" not in io:
        pytest.skip("not recorded")
    levels = tuple(map(float, io["sample_quantiles/in/levels"]))
    forecast = chronos_t5.forecast_of(sampled["sample"][:, None], levels)
    close(forecast.quantiles[:, 0], io["sample_quantiles/out/quantiles"], rtol=1e-5, atol=1e-6)
    close(forecast.point[:, 0], io["sample_quantiles/out/mean"], rtol=1e-5, atol=1e-6)


def test_golden_buckets(recorded):
    *_, io = recorded
    found = [key for key in io if key.startswith("util/buckets/out/")]
    if not found:
        pytest.skip("not recorded")
    for key in found:
        kind, n_buckets, distance = key.rsplit("/", 1)[1].split("_")
        got = t5.relative_buckets(
            io["util/buckets/in/relative_position"],
            bidirectional=kind == "bidirectional",
            n_buckets=int(n_buckets),
            max_distance=int(distance),
        )
        np.testing.assert_array_equal(got, io[key], err_msg=key)


def test_golden_initialisation(recorded):
    vectors, *_ = recorded
    stats = vectors.init_stats
    model = ChronosT5(ChronosT5Config.from_published(stats["_about"]["config"]))
    assert check_initialisation(model, stats["params"]) == len(stats["params"])


def test_golden_round_trip(recorded, tmp_path):
    vectors, model, params, _ = recorded
    file = check_round_trip(vectors.checkpoint, tmp_path)
    again, same, *_ = import_checkpoint(file)
    assert again == model, "config.json and generation_config.json were written too"
    chex.assert_trees_all_equal(same, params)
