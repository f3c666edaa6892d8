"""Key table of TTM: state dicts of ibm-granite/granite-tsfm (TinyTimeMixerForPrediction) <->
`ltsm_jax.models.ttm`.

The decomposed models of r3 are two of these, in one file: `converters.ttm_r3`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.layout import Layout
from converters.pickles import quoted
from converters.tables import (
    BUFFER,
    CONV1,
    SAME,
    TRANSPOSE,
    Rule,
    Transform,
    problem_list,
    split_bias,
    split_in,
    split_out,
)
from ltsm_jax.models.ttm import TTM, QuantileConfig, TTMConfig, factors, scales, tokens_in_front
from ltsm_jax.original_files import CheckpointError

MODEL = TTM
ANCHOR = "backbone.encoder.patcher.weight"
SCALES_ANCHOR = (
    "backbone.encoder.patcher.projectors.0.weight"  # of models with patches of several scales
)
HINTS = {
    r"/channel_mixer/|^fcm/": "check num_input_channels, prediction_channel_indices and "
    "exogenous_channel_indices",
    r"/patch_mixer/": "check context_length, patch_length and patch_stride",
    r"(^|/)embed(_\d+)?/": "check patch_length, d_model and multi_scale",
    r"(^|/)(head|base_norm|quantiles/flat)/": "check prediction_length, context_length, "
    "register_tokens and fft_length",
    r"(^|/)quantiles/": "check quantile_levels and the fields that begin with mq_",
}
# A filter over time: [1, 1, K] <-> [K].
FILTER = Transform(
    "filter over time", lambda x: x.reshape(x.shape[-1:]), lambda x: x.reshape(1, 1, -1)
)


# What every TTM has, and its optional parts, apart from the mixers: readable beside the
# original's state dict.
OUTSIDE_THE_MIXERS: tuple[Rule, ...] = (
    (r"backbone\.encoder\.patcher\.weight", "embed/kernel", TRANSPOSE),
    (r"backbone\.encoder\.patcher\.bias", "embed/bias", SAME),
    (r"backbone\.encoder\.patcher\.projectors\.(\d+)\.weight", r"embed_\1/kernel", TRANSPOSE),
    (r"backbone\.encoder\.patcher\.projectors\.(\d+)\.bias", r"embed_\1/bias", SAME),
    (r"backbone\.encoder\.add_tokens\.patch_tokens", "registers", SAME),
    (r"backbone\.encoder\.add_fft_tokens\.freq_embedding\.weight", "spectrum_table", SAME),
    (
        r"backbone\.encoder\.add_fft_tokens\.freq_index_mlp\.0\.weight",
        "spectrum_up/kernel",
        TRANSPOSE,
    ),
    (r"backbone\.encoder\.add_fft_tokens\.freq_index_mlp\.0\.bias", "spectrum_up/bias", SAME),
    (
        r"backbone\.encoder\.add_fft_tokens\.freq_index_mlp\.2\.weight",
        "spectrum_down/kernel",
        TRANSPOSE,
    ),
    (r"backbone\.encoder\.add_fft_tokens\.freq_index_mlp\.2\.bias", "spectrum_down/bias", SAME),
    (
        r"backbone\.encoder\.add_fft_tokens\.freq_concat_proj\.weight",
        "spectrum_join/kernel",
        TRANSPOSE,
    ),
    (r"backbone\.encoder\.add_fft_tokens\.freq_concat_proj\.bias", "spectrum_join/bias", SAME),
    (r"backbone\.encoder\.base_norm\.weight", "base_norm/scale", SAME),
    (r"backbone\.encoder\.base_norm\.bias", "base_norm/bias", SAME),
    (r"backbone\.encoder\.freq_mod\.0\.weight", "freq_table", SAME),
    (r"backbone\.encoder\.freq_mod\.1\.weight", "freq_up/kernel", TRANSPOSE),
    (r"backbone\.encoder\.freq_mod\.1\.bias", "freq_up/bias", SAME),
    (r"backbone\.encoder\.freq_mod\.3\.weight", "freq_down/kernel", TRANSPOSE),
    (r"backbone\.encoder\.freq_mod\.3\.bias", "freq_down/bias", SAME),
    (r"backbone\.encoder\.positional_encoder\.position_enc", "position", SAME),
    (r"decoder\.adapter\.weight", "decoder/adapter/kernel", TRANSPOSE),
    (r"decoder\.adapter\.bias", "decoder/adapter/bias", SAME),
    (r"decoder\.decoder_raw_embedding\.weight", "decoder/raw_embed/kernel", TRANSPOSE),
    (r"decoder\.decoder_raw_embedding\.bias", "decoder/raw_embed/bias", SAME),
    (
        r"decoder\.decoder_cat_embedding_layer\.embedding_layers\.(\d+)\.weight",
        r"decoder/category_\1",
        SAME,
    ),
    (r"head\.base_forecast_block\.weight", "head/kernel", TRANSPOSE),
    (r"head\.base_forecast_block\.bias", "head/bias", SAME),
    (r"head\.fcm_block\.fcm_embedding\.weight", "fcm/embed/kernel", TRANSPOSE),
    (r"head\.fcm_block\.fcm_embedding\.bias", "fcm/embed/bias", SAME),
    (
        r"head\.fcm_block\.fcm_gating_block\.attn_layer\.weight",
        "fcm/gate/linear/kernel",
        TRANSPOSE,
    ),
    (r"head\.fcm_block\.fcm_gating_block\.attn_layer\.bias", "fcm/gate/linear/bias", SAME),
    (r"head\.fcm_block\.mlp\.weight", "fcm/out/kernel", TRANSPOSE),
    (r"head\.fcm_block\.mlp\.bias", "fcm/out/bias", SAME),
    (r"multi_quantile_head_block\.dw\.weight", "quantiles/filter/kernel", FILTER),
    (r"multi_quantile_head_block\.dw\.bias", "quantiles/filter/bias", SAME),
    (r"multi_quantile_head_block\.inorm\.weight", "quantiles/norm/scale", SAME),
    (r"multi_quantile_head_block\.inorm\.bias", "quantiles/norm/bias", SAME),
    (r"multi_quantile_head_block\.pw1\.weight", "quantiles/up/kernel", CONV1),
    (r"multi_quantile_head_block\.pw1\.bias", "quantiles/up/bias", SAME),
    (r"multi_quantile_head_block\.pw2\.weight", "quantiles/down/kernel", CONV1),
    (r"multi_quantile_head_block\.pw2\.bias", "quantiles/down/bias", SAME),
    (r"multi_quantile_head_block\.dec_proj\.weight", "quantiles/pool/kernel", TRANSPOSE),
    (r"multi_quantile_head_block\.dec_proj\.bias", "quantiles/pool/bias", SAME),
    (r"multi_quantile_head_block\.dec_tok_proj\.weight", "quantiles/token/kernel", TRANSPOSE),
    (r"multi_quantile_head_block\.dec_tok_proj\.bias", "quantiles/token/bias", SAME),
    (
        r"multi_quantile_head_block\.dec_flat_to_hidden\.weight",
        "quantiles/flat/kernel",
        TRANSPOSE,
    ),
    (r"multi_quantile_head_block\.dec_flat_to_hidden\.bias", "quantiles/flat/bias", SAME),
)


def keys(config: TTMConfig) -> list[Rule]:
    """The table: `OUTSIDE_THE_MIXERS`, then the mixers of each part layer by layer."""
    rules = list(OUTSIDE_THE_MIXERS)
    parts = (
        (r"backbone\.encoder\.mlp_mixer_encoder\.", "encoder", config.d_model, config.levels),
        (
            r"decoder\.decoder_block\.",
            "decoder/mixers",
            config.decoder_d_model,
            config.decoder_levels,
        ),
        (r"head\.fcm_block\.exog_mixer\.", "fcm/mixers", 2 * (2 * config.fcm_context + 1), 0),
    )
    for theirs, ours, width, levels in parts:
        if levels:
            for j, f in enumerate(factors(levels, width)):
                layer = (
                    rf"{theirs}mixers\.{j}\.mixer_layers\.(\d+)\.",
                    rf"{ours}/block_{j}_layer_\1",
                )
                rules += _layer(*layer, width // f, config)
        else:
            rules += _layer(rf"{theirs}mixers\.(\d+)\.", rf"{ours}/layer_\1", width, config=config)
    return rules


def _layer(theirs: str, ours: str, width: int, config: TTMConfig) -> list[Rule]:
    """The mixers of one layer."""
    rules: list[Rule] = []
    for kind, name in (("channel_feature", "channel"), ("patch", "patch"), ("feature", "feature")):
        old, new = rf"{theirs}{kind}_mixer\.", f"{ours}/{name}_mixer"
        norms = [("norm", "norm")] + (
            [("norm_attn", "norm_attn")] if name == "patch" and config.attn_heads else []
        )
        for norm, path in norms:
            if config.norm == "BatchNorm":
                batch = rf"{old}{norm}\.norm\.batchnorm\."
                rules += [
                    (rf"{batch}weight", f"{new}/{path}/scale", SAME),
                    (rf"{batch}bias", f"{new}/{path}/bias", SAME),
                    (rf"{batch}running_mean", f"{new}/{path}/mean", SAME),
                    (rf"{batch}running_var", f"{new}/{path}/var", SAME),
                    (rf"{batch}num_batches_tracked", BUFFER, "of training with BatchNorm"),
                ]
            else:
                rules += [
                    (rf"{old}{norm}\.norm\.weight", f"{new}/{path}/layer/scale", SAME),
                    (rf"{old}{norm}\.norm\.bias", f"{new}/{path}/layer/bias", SAME),
                ]
        for linear, path in (
            ("mlp.fc1", "up"),
            ("mlp.fc2", "down"),
            ("gating_block.attn_layer", "gate/linear"),
        ):
            key = old + re.escape(linear)
            rules += [
                (rf"{key}\.weight", f"{new}/{path}/kernel", TRANSPOSE),
                (rf"{key}\.bias", f"{new}/{path}/bias", SAME),
            ]
        if name == "patch" and config.attn_heads:
            k, attn = width // config.attn_heads, rf"{old}self_attn_layer\."
            for q in "qkv":
                rules += [
                    (rf"{attn}{q}_proj\.weight", f"{new}/attn/{q}/kernel", split_out(k)),
                    (rf"{attn}{q}_proj\.bias", f"{new}/attn/{q}/bias", split_bias(k)),
                ]
            rules += [
                (rf"{attn}out_proj\.weight", f"{new}/attn/out/kernel", split_in(k)),
                (rf"{attn}out_proj\.bias", f"{new}/attn/out/bias", SAME),
            ]
    return rules


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """TTM as `save_pretrained` writes it. None for other models."""
    if (ANCHOR in state or SCALES_ANCHOR in state) and any(
        key.startswith("backbone.encoder.mlp_mixer_encoder.mixers.") for key in state
    ):
        return Layout("")
    return None


# published field -> (type, default of the original's class)
_FIELDS: dict[str, tuple[type | tuple[type, ...], Any]] = {
    "context_length": (int, None),
    "prediction_length": (int, None),
    "patch_length": (int, None),
    "patch_stride": (int, None),
    "d_model": (int, None),
    "num_layers": (int, None),
    "num_input_channels": (int, 1),
    "expansion_factor": (int, 2),
    "adaptive_patching_levels": (int, 0),
    "use_decoder": (bool, True),
    "decoder_num_layers": (int, 8),
    "decoder_d_model": (int, 8),
    "decoder_adaptive_patching_levels": (int, 0),
    "decoder_raw_residual": (bool, False),
    "frequency_token_vocab_size": (int, 5),
    "resolution_prefix_tuning": (bool, False),
    "gated_attn": (bool, True),
    "norm_eps": ((int, float), 1e-5),
    "self_attn": (bool, False),
    "self_attn_heads": (int, 1),
    "use_positional_encoding": (bool, False),
    "enable_forecast_channel_mixing": (bool, False),
    "fcm_context_length": (int, 1),
    "fcm_mix_layers": (int, 2),
    "fcm_use_mixer": (bool, False),
    "fcm_gated_attn": (bool, True),
    "fcm_prepend_past": (bool, True),
    "dropout": ((int, float), 0.2),
    "head_dropout": ((int, float), 0.2),
    "quantile": ((int, float), 0.5),
    "huber_delta": ((int, float), 1),
    "post_init": (bool, False),
    "multi_scale": (bool, False),
    "register_tokens": (int, 0),
    "fft_length": (int, 0),
    "use_fft_embedding": (bool, True),
    "fft_ignore_dc": (bool, False),
    "get_one_freq_emb": (bool, False),
    "fft_d_freq_min": (int, 4),
    "fft_d_freq_max": (int, 64),
    "enable_base_norm_always": (bool, False),
    "gate_groups": (int, 8),
    "multi_quantile_head": (bool, False),
    "mq_hidden": (int, 8),
    "mq_kernel_size": (int, 3),
    "mq_eps": ((int, float), 1e-6),
    "mq_use_decoder_pool": (bool, False),
    "mq_decoder_d_model": (int, 8),
    "point_extra_weight": ((int, float), 0),
    "penalize_large_width_ratio": ((int, float), 0),
}
_LISTS = ("prediction_channel_indices", "exogenous_channel_indices", "categorical_vocab_size_list")
_OPTIONAL = ("prediction_filter_length", "fcm_prepend_past_offset")
_CHOICES = {
    "mode": ("common_channel", ("common_channel", "mix_channel")),
    "decoder_mode": ("common_channel", ("common_channel", "mix_channel")),
    "scaling": ("std", ("std", "mean", True, False, None)),
    "positional_encoding_type": ("sincos", ("sincos", "random")),
    "loss": ("mse", ("mse", "mae", "pinball", "huber")),
    "init_linear": ("pytorch", ("pytorch", "normal", "uniform", "xavier_uniform")),
    "gate_mode": ("softmax", ("softmax", "sigmoid", "glu", "group_sigmoid")),
    "mq_q50_type": ("median", ("mean", "median")),
    "mq_cond_path": ("pool", ("pool", "flatten")),
    "mq_cond_mode": ("add", ("add", "concat")),
    "width_penalty_mode": ("boundary", ("boundary", "wis")),
}
_MOST = {
    "num_layers": 256,
    "decoder_num_layers": 256,
    "fcm_mix_layers": 256,
    "adaptive_patching_levels": 16,
    "decoder_adaptive_patching_levels": 16,
    "expansion_factor": 64,
}
_LIMIT = 1 << 16  # far above any TTM: a hostile file must not make us build a giant
_ZERO = (
    "adaptive_patching_levels",
    "decoder_adaptive_patching_levels",
    "fcm_context_length",
    "register_tokens",
    "fft_length",
)
_LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
# What the original's decomposed models call themselves.
DECOMPOSED = "TinyTimeMixerForDecomposedPrediction"


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TTMConfig, list[str]]:
    """The config from config.json, whose fields the shapes must agree with.

    Raises: CheckpointError that lists every contradiction, or says that there is no config.json:
      shapes do not tell the stride of the patches, the levels or the scaling.
    """
    if published is None:
        raise CheckpointError(
            f"{where}: TTM's options are not in its weights (scaling, levels, modes, stride, ...). "
            "Put the original config.json beside the file."
        )
    told, problems = read_fields(published)
    if not problems:
        problems = against(state, told)
    if not problems:
        try:
            return config_of(told), []
        except (ValueError, TypeError, OverflowError, RecursionError) as e:
            problems.append(str(e)[:500])
    raise CheckpointError(
        problem_list(f"{where}: the config does not go with the weights:", problems)
    )


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def read_fields(published: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The published fields with their defaults, and what is wrong with them."""
    told: dict[str, Any] = {}
    problems = []
    for name, (kind, default) in _FIELDS.items():
        value = told[name] = published.get(name, default)
        most, least = _MOST.get(name, _LIMIT), 0 if name in _ZERO else 1
        if name not in published and default is None:
            problems.append(f"{name}: missing")
        elif not _is(value, kind):
            problems.append(
                f"{name}: {quoted(value)} is not "
                f"{'a number' if isinstance(kind, tuple) else kind.__name__}"
            )
        elif kind is int and not least <= value <= most:
            problems.append(f"{name}: not an integer from {least} to {most}")
        elif isinstance(kind, tuple) and not 0 <= value < 1e6:
            problems.append(f"{name}: {quoted(value)} is out of range")
    for name in _LISTS:
        value = published.get(name)
        fits = value is None or (
            isinstance(value, list) and len(value) <= 4096 and all(_is(x, int) for x in value)
        )
        told[name] = tuple(value) if fits and value is not None else None
        if not fits or any(not 0 <= x <= 1 << 24 for x in told[name] or ()):
            problems.append(f"{name}: not a list of integers from 0 to {1 << 24}")
    for name in _OPTIONAL:
        told[name] = published.get(name)
        if told[name] is not None and not (_is(told[name], int) and 0 <= told[name] <= _LIMIT):
            problems.append(f"{name}: not an integer from 0 to {_LIMIT}")
    for name, (default, allowed) in _CHOICES.items():
        value = told[name] = published.get(name, default)
        if not (value is None or isinstance(value, str | bool)) or value not in allowed:
            problems.append(f"{name}: {quoted(value)} is not one of {', '.join(map(str, allowed))}")
    norm = published.get("norm_mlp", "LayerNorm")
    told["norm_mlp"] = (
        "BatchNorm" if isinstance(norm, str) and "batch" in norm.lower() else "LayerNorm"
    )
    if norm not in ("LayerNorm", "BatchNorm"):
        problems.append(f"norm_mlp: {quoted(norm)} is neither LayerNorm nor BatchNorm")
    told["quantile_levels"] = levels = published.get("quantile_levels", _LEVELS)
    if not (
        isinstance(levels, list) and 0 < len(levels) < 1000 and all(_is(q, float) for q in levels)
    ):
        problems.append(f"quantile_levels: {quoted(levels)} is no list of numbers in (0, 1)")
    for name in ("multi_quantile_heads", "masked_context_length", "use_register_context_gating"):
        if published.get(name):
            problems.append(f"{name}: {quoted(published[name])} is not supported here")
    if told["post_init"] and told["init_linear"] != "pytorch":
        problems.append(
            f"post_init with init_linear {quoted(told['init_linear'])} is not supported here"
        )
    return told, problems


def _tokens(told: Mapping[str, Any]) -> int:
    """Tokens of the mixers, as the fields say."""
    patches = (told["context_length"] - told["patch_length"]) // told["patch_stride"] + 1
    tokens = sum(scales(patches)) if told["multi_scale"] and patches > 0 else patches
    return tokens + tokens_in_front(
        told["frequency_token_vocab_size"] if told["resolution_prefix_tuning"] else 0,
        told["register_tokens"],
        told["fft_length"],
        spectrum_joined=told["get_one_freq_emb"],
    )


def against(state: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """Contradictions between the fields and the shapes that say the same."""
    problems = []
    head = told["decoder_d_model"] if told["use_decoder"] else told["d_model"]
    if (SCALES_ANCHOR in state) != told["multi_scale"]:
        has = "have" if SCALES_ANCHOR in state else "do not have"
        problems.append(
            f"multi_scale: the config says {told['multi_scale']}, the weights {has} patches of "
            "scales"
        )
    for key, want, fields in (
        (ANCHOR, (told["d_model"], told["patch_length"]), "d_model, patch_length"),
        (SCALES_ANCHOR, (told["d_model"], told["patch_length"]), "d_model, patch_length"),
        (
            "head.base_forecast_block.weight",
            (told["prediction_length"], _tokens(told) * head),
            "prediction_length, tokens (context_length, patch_length, patch_stride, ...) * "
            "decoder_d_model",
        ),
        (
            "backbone.encoder.freq_mod.0.weight",
            (told["frequency_token_vocab_size"], told["patch_length"]),
            "frequency_token_vocab_size, patch_length",
        ),
    ):
        value = state.get(key)
        if isinstance(value, np.ndarray) and value.shape != want:
            problems.append(f"{fields}: the config says {want}, the weights {value.shape} ({key})")
    return problems


def config_of(told: Mapping[str, Any]) -> TTMConfig:
    """Build the configuration of a plain model from the fields of a published config.json, all of
    them there.
    """
    scaling = told["scaling"]
    return TTMConfig.of(
        context_len=told["context_length"],
        horizon=told["prediction_length"],
        patch_len=told["patch_length"],
        patch_stride=told["patch_stride"],
        d_model=told["d_model"],
        decoder_d_model=told["decoder_d_model"],
        layers=told["num_layers"],
        decoder_layers=told["decoder_num_layers"],
        levels=told["adaptive_patching_levels"],
        decoder_levels=told["decoder_adaptive_patching_levels"],
        expansion=told["expansion_factor"],
        use_decoder=told["use_decoder"],
        n_channels=told["num_input_channels"],
        mix_channels=told["mode"] == "mix_channel",
        decoder_mix_channels=told["decoder_mode"] == "mix_channel",
        raw_residual=told["decoder_raw_residual"],
        gated=told["gated_attn"],
        norm=told["norm_mlp"],
        norm_eps=float(told["norm_eps"]),
        attn_heads=told["self_attn_heads"] if told["self_attn"] else 0,
        position=told["positional_encoding_type"] if told["use_positional_encoding"] else None,
        freq_vocab=told["frequency_token_vocab_size"] if told["resolution_prefix_tuning"] else 0,
        vocab=told["categorical_vocab_size_list"] or (),
        scaling="std" if scaling is True else (scaling or None),
        targets=told["prediction_channel_indices"],
        exogenous=told["exogenous_channel_indices"] or (),
        filter_len=told["prediction_filter_length"],
        fcm=told["enable_forecast_channel_mixing"],
        fcm_context=told["fcm_context_length"],
        fcm_layers=told["fcm_mix_layers"]
        if told["enable_forecast_channel_mixing"] and told["fcm_use_mixer"]
        else 0,
        fcm_gated=told["fcm_gated_attn"],
        fcm_past=told["fcm_prepend_past"],
        fcm_offset=told["fcm_prepend_past_offset"],
        dropout=float(told["dropout"]),
        head_dropout=float(told["head_dropout"]),
        loss=told["loss"],
        quantile=float(told["quantile"]),
        huber_delta=float(told["huber_delta"]),
        post_init=told["post_init"],
        multi_scale=told["multi_scale"],
        registers=told["register_tokens"],
        spectrum=told["fft_length"],
        spectrum_table=told["use_fft_embedding"],
        spectrum_skip_mean=told["fft_ignore_dc"],
        spectrum_joined=told["get_one_freq_emb"],
        spectrum_least=told["fft_d_freq_min"],
        spectrum_most=told["fft_d_freq_max"],
        base_norm=told["enable_base_norm_always"],
        gate=told["gate_mode"],
        gate_groups=told["gate_groups"],
        quantiles=_quantiles(told) if told["multi_quantile_head"] else None,
    )


def _quantiles(told: Mapping[str, Any]) -> QuantileConfig:
    return QuantileConfig(
        levels=tuple(sorted(told["quantile_levels"])),
        hidden=told["mq_hidden"],
        kernel_size=told["mq_kernel_size"],
        eps=float(told["mq_eps"]),
        median=told["mq_q50_type"],
        condition=told["mq_cond_path"] if told["mq_use_decoder_pool"] else None,
        join=told["mq_cond_mode"],
        token_width=told["mq_decoder_d_model"],
        point_weight=float(told["point_extra_weight"]),
        width_weight=float(told["penalize_large_width_ratio"]),
        width_mode=told["width_penalty_mode"],
    )


def published(config: TTMConfig) -> dict[str, Any]:
    """The fields of config.json, the derived ones that the original reads from it included.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    blocks, decoder_blocks = max(config.levels, 1), max(config.decoder_levels, 1)
    fields = {
        "architectures": ["TinyTimeMixerForPrediction"],
        "model_type": "tinytimemixer",
        "context_length": config.context_len,
        "prediction_length": config.horizon,
        "patch_length": config.patch_len,
        "patch_stride": config.patch_stride,
        "num_patches": config.n_patches,
        "d_model": config.d_model,
        "num_layers": len(config.encoder) // blocks,
        "num_input_channels": config.n_channels,
        "expansion_factor": _expansion(config),
        "adaptive_patching_levels": config.levels,
        "mode": "mix_channel" if config.mix_channels else "common_channel",
        "use_decoder": bool(config.decoder),
        "decoder_num_layers": len(config.decoder) // decoder_blocks or 1,
        "decoder_d_model": config.decoder_d_model,
        "decoder_adaptive_patching_levels": config.decoder_levels,
        "decoder_mode": "mix_channel" if config.decoder_mix_channels else "common_channel",
        "decoder_raw_residual": config.raw_residual,
        "frequency_token_vocab_size": config.freq_vocab or 5,
        "resolution_prefix_tuning": bool(config.freq_vocab),
        "gated_attn": config.gated,
        "norm_mlp": config.norm,
        "norm_eps": config.norm_eps,
        "self_attn": bool(config.attn_heads),
        "self_attn_heads": config.attn_heads or 1,
        "use_positional_encoding": config.position is not None,
        "positional_encoding_type": config.position or "sincos",
        "scaling": config.scaling,
        "prediction_channel_indices": None if config.targets is None else list(config.targets),
        "exogenous_channel_indices": list(config.exogenous) or None,
        "prediction_filter_length": config.filter_len,
        "categorical_vocab_size_list": list(config.vocab) or None,
        "enable_forecast_channel_mixing": config.fcm,
        "fcm_context_length": config.fcm_context,
        "fcm_use_mixer": bool(config.fcm_layers),
        "fcm_mix_layers": len(config.fcm_layers) or 2,
        "fcm_gated_attn": config.fcm_gated,
        "fcm_prepend_past": config.fcm_past,
        "fcm_prepend_past_offset": config.fcm_offset,
        "dropout": config.dropout,
        "head_dropout": config.head_dropout,
        "loss": config.loss,
        "quantile": config.quantile,
        "huber_delta": config.huber_delta,
        "post_init": config.post_init,
        "init_processing": True,
        "patch_last": True,
        "torch_dtype": "float32",
        **_fields_of_r3(config),
    }
    again = config_of(read_fields(fields)[0])
    differ = [
        field
        for field in ("encoder", "decoder", "fcm_layers")
        if getattr(again, field) != getattr(config, field)
    ]
    if differ:
        raise ValueError(
            "the original TTM has the same share of hidden units in every mixer; here "
            f"{', '.join(differ)} has other widths. A pruned model can't be exported."
        )
    return fields


def _fields_of_r3(config: TTMConfig) -> dict[str, Any]:
    """The fields that came with r3, as far as the config uses them: older releases do not know
    them.
    """
    found: dict[str, Any] = {
        "multi_scale": config.multi_scale,
        "register_tokens": config.registers,
        "fft_length": config.spectrum,
        "enable_base_norm_always": config.base_norm,
    }
    found = {name: value for name, value in found.items() if value}
    if config.gate != "softmax":
        found |= {"gate_mode": config.gate, "gate_groups": config.gate_groups}
    if config.spectrum:
        found |= {
            "use_fft_embedding": config.spectrum_table,
            "fft_ignore_dc": config.spectrum_skip_mean,
            "get_one_freq_emb": config.spectrum_joined,
            "fft_d_freq_min": config.spectrum_least,
            "fft_d_freq_max": config.spectrum_most,
        }
    head = config.quantiles
    if head is not None:
        found |= {
            "multi_quantile_head": True,
            "quantile_levels": list(head.levels),
            "mq_hidden": head.hidden,
            "mq_kernel_size": head.kernel_size,
            "mq_eps": head.eps,
            "mq_q50_type": head.median,
            "mq_use_decoder_pool": head.condition is not None,
            "mq_cond_path": head.condition or "pool",
            "mq_cond_mode": head.join,
            "mq_decoder_d_model": head.token_width,
            "point_extra_weight": head.point_weight,
            "penalize_large_width_ratio": head.width_weight,
            "width_penalty_mode": head.width_mode,
        }
    return found


def _expansion(config: TTMConfig) -> int:
    width = config.d_model // factors(config.levels, config.d_model)[0]
    return max(config.encoder[0].feature // width, 1)
