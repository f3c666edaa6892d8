"""Recorded cases of the Moirai families: packed tokens, forecast inputs, mixtures under the
original's names.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters import converter, tables
from ltsm_jax.layers.packed import Tokens, future_tokens, pack, unpack

FIELDS = {
    "target": "target",
    "observed_mask": "observed",
    "sample_id": "sample_id",
    "time_id": "time_id",
    "variate_id": "variate_id",
    "prediction_mask": "predicted",
}
KINDS = {
    "studentt": "student_t",
    "normalfixed": "normal_fixed",
    "negbinomial": "negative_binomial",
    "lognormal": "log_normal",
}


PACK = jax.jit(pack, static_argnums=(1, 2, 3))


def cases(vectors, prefix):
    """Names of the recorded cases that start with `prefix`."""
    names = dict.fromkeys(key.split("/")[0] for key in vectors if key.startswith(prefix))
    return list(names)


def tokens_of(io, case):
    """The packed tokens of a case."""
    return Tokens(
        **{ours: jnp.asarray(io[f"{case}/in/{theirs}"]) for theirs, ours in FIELDS.items()}
    )


def bct(x):
    """The original's [batch, time, variates] in our order."""
    return jnp.swapaxes(jnp.asarray(x), 1, 2)


def forecast_of(io, case):
    """Inputs of a forecast case: past series, horizon, and the covariates that `pack` takes."""
    get = lambda name: io[f"{case}/in/{name}"]  # noqa: E731
    more = {"begun_BT": ~jnp.asarray(get("past_is_pad"))}
    if int(get("feat_dynamic_real_dim")):
        more["known"] = bct(get("feat_dynamic_real")), bct(get("observed_feat_dynamic_real"))
    if int(get("past_feat_dynamic_real_dim")):
        more["past_known"] = (
            bct(get("past_feat_dynamic_real")),
            bct(get("past_observed_feat_dynamic_real")),
        )
    return (
        (bct(get("past_target")), bct(get("past_observed_target"))),
        int(get("prediction_length")),
        more,
    )


def packed_forecast(io, case, patch, width):
    """The tokens of a forecast case, compared with the recorded ones where they are."""
    past, horizon, more = forecast_of(io, case)
    tokens = PACK(past, horizon, patch, width, **more)
    for theirs, ours in FIELDS.items():
        if f"{case}/out/converted/{theirs}" in io:
            want = io[f"{case}/out/converted/{theirs}"]
            np.testing.assert_array_equal(getattr(tokens, ours), want, err_msg=f"{case} {theirs}")
    return tokens


def stacked(all_tokens, patches=None):
    """Token sets of several cases in one batch, padded to one length, so that one program serves
    them all.

    Returns: tokens, sizes [B, N] (0 where padded), and the rows and length of each case.
    """
    n = max(t.target.shape[1] for t in all_tokens)
    pad = lambda a: jnp.pad(a, ((0, 0), (0, n - a.shape[1])) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    joined = jax.tree.map(
        lambda *leaves: jnp.concatenate([pad(leaf) for leaf in leaves]), *all_tokens
    )
    apart = jnp.concatenate(
        [pad(jnp.ones_like(t.sample_id)) for t in all_tokens]
    )  # padding of a case sees its own
    joined = dataclasses.replace(joined, sample_id=jnp.where(apart == 1, joined.sample_id, -1))
    sizes = (
        None
        if patches is None
        else jnp.concatenate([pad(jnp.asarray(p, jnp.int32)) for p in patches])
    )
    places, first = [], 0
    for t in all_tokens:
        b, m = t.target.shape[:2]
        places.append((slice(first, first + b), slice(0, m)))
        first += b
    return joined, sizes, places


def recorded_names(mixture):
    """A mixture under the names of the recorded vectors: {"param/studentt/df": ..., ...}."""
    ours = dict(zip(mixture.kinds, mixture.parts, strict=True))
    named = {
        f"param/{theirs}/{name}": value
        for theirs, kind in KINDS.items()
        if kind in ours
        for name, value in ours[kind].items()
    }
    return named | {"param/weights_logits_normalized": mixture.log_weights}


def at_future(a, n_variates, time_steps, horizon, patch):
    """What stands at the future tokens of `pack`: [B, N, P, ...] -> [B, C, H, ...]."""
    first, last = future_tokens(n_variates, time_steps, horizon, patch)
    return unpack(np.asarray(a)[:, first:last], n_variates, horizon, patch)


def drawn(io, case, call, n_variates, horizon, patch):
    """The recorded draws of one sampling call at the future tokens: values [n, B, C, H, M],
    components [n, B, C, H].
    """
    steps = io[f"{case}/in/past_target"].shape[1]
    if case.startswith("auto__"):
        steps = int(io[f"{case}/in/context_length"])
    tapes = (io[f"{case}/in/tape/{call}/{name}"] for name in ("components", "index"))
    return tuple(
        np.stack([at_future(one, n_variates, steps, horizon, patch) for one in tape])
        for tape in tapes
    )


def check_gradients(model, grads, stored, prefix, rel, floor=1e-6):
    """Gradients of every parameter against the recorded ones; some sets hold only a part of them,
    and none of what is data.
    """
    drawn, _ = tables.to_state(converter(model.family).keys(model.config), grads)
    want = {
        key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)
    }
    assert want
    assert want.keys() <= drawn.keys()
    for key, leaf in want.items():
        assert drawn[key].shape == leaf.shape, key
        worst = np.abs(drawn[key] - leaf).max()
        assert worst <= rel * np.abs(leaf).max() + floor, f"{key}: {worst} of {np.abs(leaf).max()}"
    return drawn.keys() - want.keys()


RTOL, ATOL, NLL_RTOL, GRAD_REL, STEEP_REL = (
    2e-4,
    1e-5,
    1e-3,
    2e-3,
    2e-2,
)  # of meta.json of the mixture families


def close(got, want, what, rtol=RTOL, atol=ATOL):
    """Equal within the recorded tolerance wherever the original is finite."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], rtol=rtol, atol=atol, err_msg=what)


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a model made of one recorded case, as numpy: mixture and named steps at all of its
    tokens.
    """

    tokens: Tokens
    mixture: Any
    taps: dict
    log_prob: np.ndarray
    mean: np.ndarray


def forward(model, params, io):
    """{case: Ran} of all packed and forecast cases, in one program."""
    width = max(model.config.patch_sizes)
    names = [case for case in cases(io, "") if f"{case}/in/sample_id" in io]
    found = [(case, tokens_of(io, case), io[f"{case}/in/patch_size"]) for case in names]
    for case in cases(io, "forecast__"):
        patch = int(io[f"{case}/in/patch_size"])
        tokens = packed_forecast(io, case, patch, width)
        found.append((case, tokens, np.full(tokens.sample_id.shape, patch)))
    names, sets, patches = zip(*found, strict=True)
    return dict(zip(names, run(model, params, sets, patches), strict=True))


def run(model, params, sets, patches):
    """[Ran] of several sets of tokens, in one program."""
    tokens, sizes, places = stacked(sets, patches)

    def all_of_it(params, tokens, sizes):
        y, taps = model.apply(params, tokens, sizes)
        return y, taps, y.log_prob(tokens.target), y.mean()

    out = jax.tree.map(np.asarray, jax.jit(all_of_it)(params, tokens, sizes))
    cut = lambda place: jax.tree.map(lambda a: a[place] if a.ndim > 2 else a, out)  # noqa: E731
    return [Ran(own, *cut(place)) for own, place in zip(sets, places, strict=True)]


def check_distributions(io, ran):
    """Scaler, parameters, mean and log density of every case."""
    compared = 0
    for case, one in ran.items():
        named = recorded_names(one.mixture) | {
            "loc": one.taps["loc"],
            "scale": one.taps["scale"],
            "mean": one.mean,
        }
        for name, got in named.items():
            if f"{case}/out/{name}" in io:
                close(got, io[f"{case}/out/{name}"], f"{case} {name}")
                compared += 1
        if f"{case}/out/nll" in io:
            close(-one.log_prob, io[f"{case}/out/nll"], f"{case} nll", NLL_RTOL)
        missed = {k for k in io if k.startswith(f"{case}/out/param/")} - {
            f"{case}/out/{name}" for name in named
        }
        assert not missed
    assert compared


def check_steps(io, ran, renamed, rtol=RTOL, atol=ATOL):
    """Every recorded step under its name; renamed: (regular expression of the original's, ours)."""
    compared = 0
    for case, one in ran.items():
        b, n = one.tokens.sample_id.shape
        for key in (k for k in io if k.startswith(f"{case}/out/act/")):
            name = key.removeprefix(f"{case}/out/act/")
            for pattern, ours in (*renamed, *RENAMED):
                name = re.sub(pattern, ours, name)
            got, want = one.taps[name], io[key]
            if want.ndim == 5:  # q and k after their norms: the original has heads in groups
                want = want.reshape(b, -1, *want.shape[3:])
                got = got[:, :, :n]
            close(got.reshape(want.shape), want, key, rtol, atol)
            compared += 1
    assert compared


RENAMED = (
    (r"^encoder\.layers\.(\d+)\.self_attn\.([qkv]_norm)", r"layer_\1/attn/\2"),
    (r"^encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"layer_\1/attn/\2"),
    (r"^encoder\.layers\.(\d+)\.self_attn$", r"layer_\1/attn"),
    (r"^encoder\.layers\.(\d+)\.", r"layer_\1/"),
    (r"^encoder\.layers\.(\d+)$", r"layer_\1"),
    (r"^encoder\.norm$", "norm"),
    (r"^param_proj\.proj\.weights_logits", "head/weights"),
    (r"^param_proj\.proj\.components\.(\d+)\.", r"head/component_\1_"),
)


def check_samples(got_nBCH, want_BnHC, what):
    """Samples against the official output, which has no axis of variates where there is one."""
    want = want_BnHC[..., None] if want_BnHC.ndim == 3 else want_BnHC
    close(np.transpose(got_nBCH, (1, 0, 3, 2)), want, what)
