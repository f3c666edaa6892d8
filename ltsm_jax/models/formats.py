"""Configs of model folders of earlier formats, in the form that they have today.

Until format 2 a config had one list for each width, with an entry per layer: `"n_heads": [4, 4],
"ffn_dims": [64, 48]`, and an empty list where every layer had the width of the published model.
Since format 3 it has a record for each layer, see `layers.dims`. `current` is the only place that
knows the older form: whatever reads a config calls it first with the number of its format.
"""

from collections.abc import Mapping
from typing import Any

FORMAT = 3

_Lists = Mapping[str, tuple[str, ...]]

# By the name of a list: where its entries went in a layer's record.
_ATTENTION: _Lists = {
    "n_heads": ("attn", "heads"),
    "qk_dims": ("attn", "qk"),
    "value_dims": ("attn", "value"),
    "rotary_pairs": ("attn", "pairs"),
}
_PLAIN: _Lists = _ATTENTION | {"ffn_dims": ("ffn",)}
_BIASED: _Lists = _PLAIN | {"bias_columns": ("attn", "ids")}
_T5: _Lists = _BIASED | {
    "cross_heads": ("cross", "heads"),
    "cross_qk_dims": ("cross", "qk"),
    "cross_value_dims": ("cross", "value"),
}
_EXPERTS: _Lists = {"kept": ("experts", "ids"), "expert_dims": ("experts", "ffn")}
_LISTS: dict[str, _Lists] = {
    "chronos_2": {
        "n_heads": ("time", "heads"),
        "value_dims": ("time", "value"),
        "group_heads": ("group", "heads"),
        "group_value_dims": ("group", "value"),
        "group_qk_dims": ("group", "qk"),
        "ffn_dims": ("ffn",),
    },
    "chronos_bolt": _T5,
    "chronos_t5": _T5,
    "moirai": _PLAIN,
    "moirai_2": _PLAIN,
    "moirai_moe": _ATTENTION | _EXPERTS,
    "moment": _BIASED,
    "sundial": _PLAIN,
    "time_moe": _ATTENTION
    | _EXPERTS
    | {"n_kv_heads": ("attn", "kv_heads"), "shared_dims": ("shared",)},
    "timer": _PLAIN,
    "timer_hf": _PLAIN,
    "timer_xl": _PLAIN,
    "timesfm_1": _PLAIN,
    "timesfm_2p5": _PLAIN,
    "timesfm_3": {
        "n_heads": ("seq", "heads"),
        "value_dims": ("seq", "value"),
        "var_heads": ("var", "heads"),
        "var_value_dims": ("var", "value"),
        "ffn_dims": ("ffn",),
    },
    "tirex_2": {
        "kinds": ("kind",),
        "lstm_heads": ("lstm_heads",),
        "n_heads": ("attn", "heads"),
        "variate_value_dims": ("attn", "value"),
        "ffn_dims": ("ffn",),
        "variate_dims": ("variate_ffn",),
    },
    "toto_2": _PLAIN | {"kinds": ("kind",), "n_kv_heads": ("attn", "kv_heads")},
    "units": {
        "seq_heads": ("seq_heads",),
        "var_heads": ("var_heads",),
        "ffn_dims": ("ffn",),
    },
}

_QK_DIM = {"toto_2": "qk_dim"}  # field with the width of whole queries; elsewhere head_dim
# Parts of a config that have layers of their own.
_STACKS = {"chronos_bolt": ("encoder", "decoder"), "chronos_t5": ("encoder", "decoder")}
# Lists that could be empty, or be left out.
_OPTIONAL = {"qk", "value", "pairs", "ids"}
_MIXERS = ("encoder", "decoder", "fcm_layers")
_AXES = ("channel", "patch", "feature")


def current(family: str, config: Any, told: int) -> Any:
    """Give the fields of a config as `Model.config_from_dict` reads them.

    Args:
      family: its name. config: what JSON gave. told: the number of the format that it was written
        in.
    Raises: ValueError listing what can't be read.

    Example:
      current("timer", {"head_dim": 8, "n_heads": [2], "ffn_dims": [24]}, 2) has the layers
      [{"attn": {"heads": 2, "qk": 8, "value": 8}, "ffn": 24}].
    """
    if told >= FORMAT or not isinstance(config, Mapping):
        return config
    problems: list[str] = []
    if family == "ttm_r3":
        found = dict(config)
        for part in ("trend", "residual"):
            if isinstance(config.get(part), Mapping):
                found[part] = _of_mixers(config[part], problems)
    elif family == "ttm":
        found = _of_mixers(config, problems)
    elif family in _STACKS:
        found = dict(config)
        for part in _STACKS[family]:
            if isinstance(config.get(part), Mapping):
                found[part] = _of_lists(config[part], family, f"{part}.", problems=problems)
    else:
        found = _of_lists(config, family, "", problems=problems)
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _of_mixers(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Make a record of the three widths that a layer of mixers had as a list."""
    found = dict(config)
    for name in _MIXERS:
        layers = config.get(name, [])
        if not isinstance(layers, list | tuple) or not all(_is_triple(layer) for layer in layers):
            problems.append(
                f"{name}: hidden widths of channels, patches and features were expected"
            )
            continue
        found[name] = [dict(zip(_AXES, layer, strict=True)) for layer in layers]
    return found


def _is_triple(layer: Any) -> bool:
    return isinstance(layer, list | tuple) and len(layer) == len(_AXES)


def _of_lists(
    config: Mapping[str, Any], family: str, where: str, problems: list[str]
) -> dict[str, Any]:
    """Make records of lists. where: the name of this part of a config, with a dot."""
    lists = _LISTS.get(family, {})
    found = {name: value for name, value in config.items() if name not in lists}
    told: dict[str, Any] = {}
    for name, target in lists.items():
        value = config.get(name, ())
        if not isinstance(value, list | tuple):
            problems.append(f"{where}{name}: a list was expected, got {str(value)[:100]}")
        elif value:
            told[name] = value
        elif target[-1] not in _OPTIONAL and target[0] != "cross":
            problems.append(f"{where}{name}: missing, or without any layer")
    lengths = {name: len(value) for name, value in told.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} ({length})" for name, length in lengths.items())
        problems.append(f"{where}{listed} must name the same layers, at least one")
    if problems:
        return found
    heads = told.get("n_heads", ())
    if "bias_columns" in lists and "bias_columns" not in told and len(set(map(str, heads))) > 1:
        problems.append(
            f"layers with {heads} heads share one bias table: bias_columns must say how"
        )
    whole = config.get("head_dim"), config.get(_QK_DIM.get(family, "head_dim"))
    layers: list[dict[str, Any]] = []
    for i in range(max(lengths.values(), default=0)):
        layers.append(_record({name: value[i] for name, value in told.items()}, lists, *whole))
    found["layers"] = layers
    return found


def _record(own: Mapping[str, Any], lists: _Lists, head_dim: Any, qk_dim: Any) -> dict[str, Any]:
    """Make the record of a layer. own: the layer's entry of each list that there is; head_dim and
    qk_dim: widths of whole values and queries.
    """
    record: dict[str, Any] = {}
    for name, value in own.items():
        *parts, key = lists[name]
        target = record
        for part in parts:
            target = target.setdefault(part, {})
        target[key] = value

    # Whole where no list says otherwise.
    for dims in record.values():
        if isinstance(dims, dict) and "heads" in dims:
            pairs = dims.get("pairs")
            first = pairs[0] if isinstance(pairs, list | tuple) and pairs else None
            dims.setdefault("qk", 2 * len(first) if isinstance(first, list | tuple) else qk_dim)
            dims.setdefault("value", head_dim)
    return record
