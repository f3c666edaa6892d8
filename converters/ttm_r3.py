"""Key table of TTM r3: TinyTimeMixerForDecomposedPrediction <-> `ltsm_jax.models.ttm_r3`.

Each of its two parts has the keys of a TTM under a prefix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters import ttm
from converters.layout import Layout
from converters.pickles import quoted
from converters.tables import Rule, Transform, problem_list
from ltsm_jax.models.ttm import TTMConfig
from ltsm_jax.models.ttm_r3 import TTMR3, TTMR3Config
from ltsm_jax.original_files import CheckpointError

MODEL = TTMR3
HINTS = ttm.HINTS
_PREFIXES = {"trend": "trend_forecaster.", "residual": "residual_forecaster."}
# What the trend may have otherwise, each under "trend_" and its own name.
_OF_TREND = (
    "patch_length",
    "patch_stride",
    "d_model",
    "decoder_d_model",
    "num_layers",
    "decoder_num_layers",
    "register_tokens",
    "fft_length",
    "multi_scale",
    "adaptive_patching_levels",
)
_WEIGHTS = {
    "joint_loss_weight": "joint_weight",
    "trend_loss_weight": "trend_weight",
    "residual_loss_weight": "residual_weight",
}


def keys(config: TTMR3Config) -> list[Rule]:
    """The table of each part behind its prefix."""
    rules: list[Rule] = []
    for part, prefix in _PREFIXES.items():
        for pattern, target, how in ttm.keys(getattr(config, part)):
            ours = f"{part}/{target}" if isinstance(how, Transform) else target
            rules.append((prefix.replace(".", r"\.") + pattern, ours, how))
    return rules


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """Two TTMs under the names of the parts. None for other models."""
    for prefix in _PREFIXES.values():
        if ttm.recognise(_inner(state, prefix)) is None:
            return None
    return Layout("")


def _inner(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The state dict of a part."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[TTMR3Config, list[str]]:
    """The config from config.json, whose fields the shapes must agree with.

    Raises: CheckpointError that lists every contradiction, or says that there is no config.json.
    """
    if published is None:
        raise CheckpointError(
            f"{where}: TTM's options are not in its weights (scaling, levels, modes, ...). Put the "
            "original config.json beside the file."
        )
    fields, problems = _fields_of_parts(published)
    configs: dict[str, TTMConfig] = {}
    for part, prefix in _PREFIXES.items():
        told, wrong = ttm.read_fields(fields[part])
        if not wrong:
            wrong = ttm.against(_inner(state, prefix), told)
        if not wrong:
            try:
                configs[part] = ttm.config_of(told)
            except (ValueError, TypeError, OverflowError, RecursionError) as e:
                wrong = [str(e)[:500]]
        problems += [f"{part}: {problem}" for problem in wrong]
    if problems:
        raise CheckpointError(
            problem_list(f"{where}: the config does not go with the weights:", problems)
        )
    return _joined(published, configs), []


def _fields_of_parts(published: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The published fields as each part would have them, and what is wrong with the others."""
    problems = []
    common = {name: value for name, value in published.items() if not name.startswith("trend_")}
    common["scaling"] = None
    residual, trend = dict(common), dict(common)
    length = published.get("residual_context_length")
    if length is not None:
        residual["context_length"] = length
    for name in _OF_TREND:
        value = published.get(f"trend_{name}")
        if value is not None:
            trend[name] = value
    for name in _WEIGHTS:
        value = published.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            problems.append(f"{name}: {quoted(value)} is not a number from 0 to 1e6")
    scaling = published.get("scaling", "std")
    if not (scaling is None or isinstance(scaling, str | bool)):
        problems.append(f"scaling: {quoted(scaling)} is neither a name nor true or false")
    if not isinstance(published.get("combine_quantiles_via_variance", False), bool):
        problems.append("combine_quantiles_via_variance: neither true nor false")
    return {"trend": trend, "residual": residual}, problems


def _joined(published: Mapping[str, Any], configs: Mapping[str, TTMConfig]) -> TTMR3Config:
    scaling = published.get("scaling", "std")
    if scaling is True:
        scaling = "std"
    weights: dict[str, Any] = {
        ours: float(published.get(name, 1)) for name, ours in _WEIGHTS.items()
    }
    return TTMR3Config(
        trend=configs["trend"],
        residual=configs["residual"],
        # Whatever else the file says there ("revin"), the original then scales nothing.
        scaling=scaling if scaling in ("std", "mean") else None,
        add_variances=published.get("combine_quantiles_via_variance", False),
        **weights,
    )


def published(config: TTMR3Config) -> dict[str, Any]:
    """The fields of config.json.

    Raises: ValueError for parts that differ in what the original's config says once, and for a
      pruned model.
    """
    trend, residual = (ttm.published(getattr(config, part)) for part in _PREFIXES)
    fields = residual | {
        "architectures": [ttm.DECOMPOSED],
        "decompose": True,
        "init_processing": False,
        "context_length": config.trend.context_len,
        "residual_context_length": config.residual.context_len,
        "scaling": config.scaling,
        "combine_quantiles_via_variance": config.add_variances,
    }
    del fields["num_patches"]  # of both parts computed anew
    defaults = {"register_tokens": 0, "fft_length": 0, "multi_scale": False}
    for name in _OF_TREND:
        fields[f"trend_{name}"] = trend.get(name, defaults.get(name))
    fields |= {name: getattr(config, ours) for name, ours in _WEIGHTS.items()}

    again, _ = _fields_of_parts(fields)
    for part in _PREFIXES:
        told = ttm.config_of(ttm.read_fields(again[part])[0])
        own = getattr(config, part)
        wanted = {name: getattr(own, name) for name in told.__dataclass_fields__}
        odd = [
            name
            for name, value in wanted.items()
            if name not in _NOT_IN_FILE and getattr(told, name) != value
        ]
        if odd:
            raise ValueError(
                f"the original's config has no place for {', '.join(odd)} of the {part} part "
                "beside the other's"
            )
    return fields


# What a data set sets, and how missing values are filled, is not the original's.
_NOT_IN_FILE = ("freq_token", "categories", "fill", "batch_default_scale")
