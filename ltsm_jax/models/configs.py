"""Config dataclasses: built from JSON, and read and replaced at one entry such as "encoder.ffn_dims.0"."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any


def config_from_json(cls: type, fields: Mapping[str, Any]) -> Any:
    """Build a config from what `dataclasses.asdict` and JSON made of it; the inverse of `Model.config_to_dict`.

    Lists are tuples again, at any depth, and fields that are dataclasses are built.

    Raises: TypeError for a field that the class does not have; ValueError from the class.
    """
    types = typing.get_type_hints(cls)

    def value(name: str, x: Any) -> Any:
        kind = types.get(name)
        if dataclasses.is_dataclass(kind) and isinstance(x, Mapping):
            return config_from_json(typing.cast(type, kind), x)
        return _tuples(x)

    return cls(**{name: value(name, x) for name, x in fields.items()})


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else x


def with_entry(config: Any, entry: str, value: Any) -> Any:
    """Put another value at an entry such as "n_heads.3" or "encoder.ffn_dims.0": fields and indices.

    Raises: AttributeError, IndexError for an entry that is not there; ValueError from the config's class.
    """
    if not entry:
        return value
    name, _, rest = entry.partition(".")
    if isinstance(config, tuple):
        i = int(name)
        return (*config[:i], with_entry(config[i], rest, value), *config[i + 1 :])
    return dataclasses.replace(config, **{name: with_entry(getattr(config, name), rest, value)})


def entry_of(config: Any, entry: str) -> Any:
    """Read an entry of a config, see `with_entry`."""
    for name in entry.split("."):
        config = config[int(name)] if isinstance(config, tuple) else getattr(config, name)
    return config
