"""Recorded cases of the Moirai families: packed tokens, forecast inputs, mixtures under the original's names."""

import dataclasses

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
    return Tokens(**{ours: jnp.asarray(io[f"{case}/in/{theirs}"]) for theirs, ours in FIELDS.items()})


def bct(x):
    """The original's [batch, time, variates] in our order."""
    return jnp.swapaxes(jnp.asarray(x), 1, 2)


def forecast_of(io, case):
    """Inputs of a forecast case: past series, horizon, and the covariates that `pack` takes."""
    get = lambda name: io[f"{case}/in/{name}"]  # noqa: E731
    more = {"is_pad": jnp.asarray(get("past_is_pad"))}
    if int(get("feat_dynamic_real_dim")):
        more["known"] = bct(get("feat_dynamic_real")), bct(get("observed_feat_dynamic_real"))
    if int(get("past_feat_dynamic_real_dim")):
        more["past_known"] = bct(get("past_feat_dynamic_real")), bct(get("past_observed_feat_dynamic_real"))
    return (bct(get("past_target")), bct(get("past_observed_target"))), int(get("prediction_length")), more


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
    """Token sets of several cases in one batch, padded to one length, so that one program serves them all.

    Returns: tokens, sizes [B, N] (0 where padded), and the rows and length of each case.
    """
    n = max(t.target.shape[1] for t in all_tokens)
    pad = lambda a: jnp.pad(a, ((0, 0), (0, n - a.shape[1])) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    joined = jax.tree.map(lambda *leaves: jnp.concatenate([pad(leaf) for leaf in leaves]), *all_tokens)
    apart = jnp.concatenate([pad(jnp.ones_like(t.sample_id)) for t in all_tokens])  # padding of a case sees its own
    joined = dataclasses.replace(joined, sample_id=jnp.where(apart == 1, joined.sample_id, -1))
    sizes = None if patches is None else jnp.concatenate([pad(jnp.asarray(p, jnp.int32)) for p in patches])
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
    """The recorded draws of one sampling call at the future tokens: values [n, B, C, H, M], components [n, B, C, H]."""
    steps = io[f"{case}/in/past_target"].shape[1]
    if case.startswith("auto__"):
        steps = int(io[f"{case}/in/context_length"])
    tapes = (io[f"{case}/in/tape/{call}/{name}"] for name in ("components", "index"))
    return tuple(np.stack([at_future(one, n_variates, steps, horizon, patch) for one in tape]) for tape in tapes)


def check_gradients(model, grads, stored, prefix, rel, floor=1e-6):
    """Gradients of every parameter against the recorded ones; some sets hold only a part of them, and none of
    what is data."""
    drawn, _ = tables.to_state(converter(model.family).keys(model.config), grads)
    want = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    assert want
    assert want.keys() <= drawn.keys()
    for key, leaf in want.items():
        assert drawn[key].shape == leaf.shape, key
        worst = np.abs(drawn[key] - leaf).max()
        assert worst <= rel * np.abs(leaf).max() + floor, f"{key}: {worst} of {np.abs(leaf).max()}"
    return drawn.keys() - want.keys()
