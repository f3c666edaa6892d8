"""The recorded vectors of TTM, plain or decomposed, in our words and order of axes."""

import dataclasses
import json
import re

import numpy as np
import pytest

from ltsm_jax.models.ttm import TTMConfig

DECOMPOSED = "TinyTimeMixerForDecomposedPrediction"


def sets_of(root, main, *, decomposed):
    """Parameters for the recorded checkpoints of one kind below `root`; `main[0]` is the
    quick one.
    """
    found = []
    for pattern in ("ttm*/meta.json", "ttm*/variants/*/meta.json"):
        for file in sorted(root.glob(pattern)):
            architectures = (
                json.loads((file.parent / "config.json").read_text()).get("architectures") or ()
            )
            if (DECOMPOSED in architectures) == decomposed:
                found.append(str(file.parent.relative_to(root)))
    return [
        pytest.param(name, marks=() if name == main[0] else pytest.mark.slow)
        for name in found or main
    ]


def bct(x_BTC):
    """The original's [batch, time, channels] in our order, and back."""
    return np.swapaxes(np.asarray(x_BTC), 1, 2)


def quantiles(x_BQTC):
    """The original's [batch, quantiles, time, channels] in our order."""
    return np.asarray(x_BQTC).transpose(0, 3, 2, 1)


def inputs(config, io, case, *, padded):
    """Keyword arguments of `apply` for a case of a TTM with this config.

    padded: whether a short context without a mask is padded with zeros that count as observed.
    """
    x = bct(io[f"{case}/in/past_values"])
    steps = max(x.shape[-1], config.context_len) if padded else x.shape[-1]
    found = {"x_BCT": x, "observed_BCT": np.ones((*x.shape[:-1], steps), x.dtype)}
    if f"{case}/in/past_observed_mask" in io:
        front = steps - x.shape[-1]  # what a mask does not reach is not observed
        found["observed_BCT"] = np.pad(
            bct(io[f"{case}/in/past_observed_mask"]), ((0, 0), (0, 0), (front, 0))
        )
    if config.exogenous:
        found["future_BCH"] = bct(io[f"{case}/in/future_values"])
    if config.freq_vocab:
        found["freq_token"] = np.asarray(io[f"{case}/in/freq_token"], np.int32)
    if config.vocab:
        found["categories"] = np.asarray(io[f"{case}/in/static_categorical_values"]).astype(
            np.int32
        )
    return found


def batch_of(config, io, case):
    """A case as a training batch. With quantiles the original ignores the mask of the target."""
    x, target = bct(io[f"{case}/in/past_values"]), bct(io[f"{case}/in/future_values"])
    mask = f"{case}/in/future_observed_mask"
    if mask in io and config.quantiles is None:
        target = np.where(bct(io[mask]) > 0, target, np.float32(np.nan))
    batch = {"context": x, "target": target}
    given = inputs(config, io, case, padded=True)
    return batch | {name: given[name] for name in ("freq_token", "categories") if name in given}


def changed(config: TTMConfig, io, case) -> TTMConfig:
    """The config of a case, some of which change fields of it."""
    kind = case.removeprefix("loss_").split("_")[0]
    if case.startswith("loss_") and kind in ("mse", "mae", "pinball", "huber"):
        config = dataclasses.replace(config, loss=kind)
    for theirs, ours in (("quantile", "quantile"), ("huber_delta", "huber_delta")):
        if f"{case}/in/{theirs}" in io:
            config = dataclasses.replace(config, **{ours: float(io[f"{case}/in/{theirs}"])})
    if f"{case}/in/prediction_filter_length" in io:
        config = dataclasses.replace(
            config, filter_len=int(io[f"{case}/in/prediction_filter_length"])
        )
    head = config.quantiles
    if head is not None:
        if f"{case}/in/point_extra_weight" in io:
            head = dataclasses.replace(
                head, point_weight=float(io[f"{case}/in/point_extra_weight"])
            )
        if f"{case}/in/penalize_large_width_ratio" in io:
            mode = "wis" if case.endswith("_wis") else "boundary"
            weight = float(io[f"{case}/in/penalize_large_width_ratio"])
            head = dataclasses.replace(head, width_weight=weight, width_mode=mode)
        config = dataclasses.replace(config, quantiles=head)
    return config


def tolerance(vectors, case, want):
    """Of meta.json: where 20 times the original's own noise is larger, that."""
    told = vectors.meta["tolerance"]
    noise = vectors.meta.get("float32_noise_vs_float64", {}).get("per_case", {}).get(case, 0.0)
    return {"rtol": told["rel"], "atol": max(told["abs"], 20 * noise * float(np.abs(want).max()))}


def unit_of(case, x_BCT):
    """The unit [B, C, 1] of differences: series of other scales are compared in theirs."""
    if case == "scales":
        return np.maximum(np.asarray(x_BCT).std(-1, keepdims=True), 1.0)
    return np.ones((*x_BCT.shape[:2], 1), np.float32)


MIXERS = {
    "channel_feature_mixer": "channel_mixer",
    "patch_mixer": "patch_mixer",
    "feature_mixer": "feature_mixer",
}
STEPS = {
    "norm": "norm",
    "norm.norm": "norm",
    "norm_attn": "norm_attn",
    "norm_attn.norm": "norm_attn",
    "self_attn_layer": "attn",
    "mlp": "mlp",
    "mlp.fc1": "up",
    "mlp.dropout1": "hidden",
    "mlp.fc2": "mlp",
    "mlp.dropout2": "mlp",
    "gating_block": "gate",
    "gating_block.attn_layer": "gate/logits",
    "gating_block.attn_softmax": "gate/weights",
}
PLACES = {  # the original's module -> our tap, and how ours has to be turned
    "backbone.scaler": ("scaled", (0, 2, 1)),
    "backbone.patching": ("patches", (1, 2, 0, 3)),
    "backbone.encoder.patcher": ("embed", (1, 2, 0, 3)),
    "backbone.encoder.freq_mod": ("freq", (0, 1)),
    "backbone.encoder.add_tokens": ("registers", (1, 2, 0, 3)),
    "backbone.encoder.add_fft_tokens": ("tokens", (1, 2, 0, 3)),
    "backbone.encoder.add_fft_tokens.freq_embedding": ("spectrum", (0, 1, 2, 3)),
    "backbone.encoder.add_fft_tokens.freq_index_mlp": ("spectrum", (0, 1, 2, 3)),
    "backbone.encoder.add_fft_tokens.freq_index_mlp.0": ("spectrum_up", (0, 1, 2, 3)),
    "backbone.encoder.add_fft_tokens.freq_index_mlp.1": ("spectrum_hidden", (0, 1, 2, 3)),
    "backbone.encoder.add_fft_tokens.freq_index_mlp.2": ("spectrum", (0, 1, 2, 3)),
    "backbone.encoder.add_fft_tokens.freq_concat_proj": ("spectrum_join", (0, 1, 2)),
    "backbone.encoder.base_norm": ("base_norm", (0, 1, 2)),
    "backbone.encoder.positional_encoder": ("position", (1, 2, 0, 3)),
    "backbone.encoder.mlp_mixer_encoder": ("encoder", (1, 2, 0, 3)),
    "decoder.adapter": ("decoder/adapter", (1, 2, 0, 3)),
    "decoder.decoder_raw_embedding": ("decoder/raw_embed", (1, 2, 0, 3)),
    "decoder.decoder_cat_embedding_layer": ("decoder/categories", (1, 2, 0, 3)),
    "head.base_forecast_block": ("head", (0, 1, 2)),
    "head": ("forecast", (0, 2, 1)),
    "head.fcm_block": ("forecast", (0, 2, 1)),
    "head.fcm_block.fcm_patch_block": ("fcm/windows", (1, 0, 2, 3)),
    "head.fcm_block.fcm_embedding": ("fcm/embed", (1, 2, 0, 3)),
    "head.fcm_block.exog_mixer": ("fcm/mixers", (1, 2, 0, 3)),
    "head.fcm_block.fcm_gating_block": ("fcm/gate", (0, 1, 2, 3)),
    "head.fcm_block.fcm_gating_block.attn_layer": ("fcm/gate/logits", (0, 1, 2, 3)),
    "head.fcm_block.fcm_gating_block.attn_softmax": ("fcm/gate/weights", (0, 1, 2, 3)),
    "head.fcm_block.mlp": ("fcm/out", (0, 1, 2)),
    "multi_quantile_head_block": ("quantiles/levels", (0, 3, 2, 1)),
    "multi_quantile_head_block.dec_proj": ("quantiles/pool", (0, 1, 2)),
    "multi_quantile_head_block.dec_tok_proj": ("quantiles/token", (1, 2, 0, 3)),
    "multi_quantile_head_block.dec_flat_to_hidden": ("quantiles/flat", (0, 1, 2)),
}
# The original folds batch and channels into one axis here, and has the steps last.
FOLDED = {
    "multi_quantile_head_block.dw": "quantiles/filter",
    "multi_quantile_head_block.inorm": "quantiles/norm",
    "multi_quantile_head_block.pw1": "quantiles/up",
    "multi_quantile_head_block.pw2": "quantiles/down",
}
STACKS = {
    "backbone.encoder.mlp_mixer_encoder.": "encoder/",
    "decoder.decoder_block.": "decoder/",
    "head.fcm_block.exog_mixer.": "fcm/mixers/",
}


def place(module):
    """Our tap of an original module, and the order of its axes there."""
    if module in PLACES:
        return PLACES[module]
    stack = next(theirs for theirs in STACKS if module.startswith(theirs))
    inner = r"mixers\.(\d+)(?:\.mixer_layers\.(\d+))?(?:\.(\w+_mixer))?(?:\.(.+))?"
    match = re.fullmatch(inner, module.removeprefix(stack))
    assert match, module
    block, layer, mixer, step = match.groups()
    return STACKS[stack], block, layer, MIXERS.get(mixer, ""), STEPS[step] if step else ""


def turned(taps, module):
    """Our tap of an original module, or of a module of a part, its axes in the original's order."""
    part, _, rest = module.partition("_forecaster.")
    if rest:
        inner = {
            tap.removeprefix(f"{part}/"): value
            for tap, value in taps.items()
            if tap.startswith(f"{part}/")
        }
        return turned(inner, rest)
    if module in FOLDED:
        value = taps[FOLDED[module]]
        if value.ndim == 3:
            return value.reshape(-1, 1, value.shape[-1])
        return np.swapaxes(value.reshape(-1, *value.shape[2:]), 1, 2)
    if match := re.fullmatch(r"backbone\.encoder\.patcher\.projectors\.(\d+)", module):
        value = taps[f"embed_{match[1]}"].transpose(1, 2, 0, 3)
        return value.reshape(-1, value.shape[-1])
    found = place(module)
    if module.startswith("head.fcm_block.fcm_gating_block"):
        value = taps[found[0]][0]  # there is no axis of patches here
    elif len(found) == 2:
        name, axes = found
        value = taps[name].transpose(axes)
    else:
        stack, block, layer, mixer, step = found
        inner = f"block_{block}" + (f"_layer_{layer}" if layer else "")
        inner = inner if stack + inner in taps else f"layer_{block}"
        name = stack + "/".join(filter(None, (inner, mixer, step)))
        axes = (1, 2, 0, 3)
        if step.startswith(("up", "hidden", "mlp", "gate")):
            axes = {"patch_mixer": (1, 2, 3, 0), "channel_mixer": (1, 3, 0, 2)}.get(mixer, axes)
        value = taps[name].transpose(axes)
        if step == "attn":
            value = value.reshape(-1, *value.shape[2:])
    return value
