"""Config dataclasses: what is wrong with their fields, and building them from JSON, checked against
their annotations.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

MAX_INTEGER = 1 << 20  # no published size has more than 100,000, and what is larger is damage
MAX_NUMBER = 1e30  # in float32 with room for its square root, its inverse and some products
MAX_ENTRIES = 1 << 16  # of one list
_SHARES = re.compile(r"(^|_)(dropout|prob|eps)$")  # numbers from 0 to 1
_POSITIVE = re.compile(r"(^|_)(std|scale|temperature|theta|base|factor|delta)$")
_MOST_PROBLEMS = 10

# What `hidden_act` of a config.json of the transformers library may name.
HiddenAct = Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
HIDDEN_ACTS: tuple[HiddenAct, ...] = typing.get_args(HiddenAct)


def field_problems(config: Any, *sizes: str) -> list[str]:
    """Say what is wrong with single fields of a config, whatever the others hold.

    Rates of dropout, known by their names, lie in [0, 1); deviations, factors and the like are not
    negative; a field that is annotated with choices holds one of them.

    sizes: names of the fields, numbers or tuples of numbers, that must be at least 1.
    """
    problems = []
    for name in sizes:
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            problems.append(f"{name} must be positive, got {value}")
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        choices = _choices(field.type)
        if choices and value not in choices:
            known = ", ".join(map(str, choices))
            problems.append(f"{name} must be one of {known}, got {value!r}")
        elif name.endswith("dropout") and not 0 <= value < 1:
            problems.append(f"{name} must be in [0, 1), got {value}")
        elif field.type is float and _POSITIVE.search(name) and not value >= 0:
            problems.append(f"{name} must not be negative, got {value}")
    return problems


def _choices(hint: Any) -> tuple[Any, ...]:
    """List what a field can hold; nothing where an annotation allows more than choices."""
    if hint is type(None):
        return (None,)
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return ()
    parts = [_choices(part) for part in typing.get_args(hint)]
    return sum(parts, ()) if all(parts) else ()


def refuse(config: Any, problems: list[str]) -> None:
    """Raise a ValueError with all problems of a config, if there are any."""
    if problems:
        raise ValueError(f"{type(config).__name__}: " + "; ".join(problems))


def require_fields(
    checkpoint: str,
    fields: Mapping[str, Any],
    names: Iterable[str],
    inner: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """Refuse a published config that lacks fields.

    Args:
      checkpoint: what it is of, as users call it.
      names: of the fields that there must be.
      inner: of those within a field that is a mapping of its own, by the place of that field:
        "transformer_config", "transformer_config.transformer".
    Raises: ValueError naming all that are missing, with their places.
    """
    missing = [name for name in names if name not in fields]
    for place, own in (inner or {}).items():
        within: Any = fields
        for name in place.split("."):
            within = within.get(name) if isinstance(within, Mapping) else None
        within = within if isinstance(within, Mapping) else {}
        missing += [f"{place}.{name}" for name in own if name not in within]
    if missing:
        raise ValueError(f"the config of a {checkpoint} checkpoint lacks {', '.join(missing)}")


def config_from_json(cls: type, fields: Mapping[str, Any]) -> Any:
    """Build a config dataclass from what `dataclasses.asdict` and JSON made of it, checked against
    its annotations.

    Lists are tuples again, at any depth, and fields that are dataclasses are built. The inverse of
    `Model.config_to_dict`.

    Raises: ValueError that lists every field that is unknown, missing, of another type or out of
      range; else what the class itself refuses.
    """
    problems: list[str] = []
    built = _dataclass(cls, fields, "", problems=problems)
    if problems:
        more = (
            [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        )
        raise ValueError("; ".join(problems[:_MOST_PROBLEMS] + more))
    return built


def _dataclass(cls: type, fields: Any, where: str, problems: list[str]) -> Any:
    """Build a dataclass, or note why not. where: the name of the field it is, with a dot."""
    if not isinstance(fields, Mapping):
        problems.append(
            f"{where.rstrip('.') or 'the config'}: fields were expected, got {_short(fields)}"
        )
        return None
    before = len(problems)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields.keys() - known.keys():
        near = difflib.get_close_matches(str(name)[:100], known, 1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        problems.append(f"{where}{str(name)[:100]}: no such field{guess}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in known.items():
        if name in fields:
            values[name] = _value(hints[name], fields[name], where + name, problems=problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{where}{name}: missing")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
    ) as err:  # of values that do not go together
        raise ValueError(
            f"no {cls.__name__} has such fields ({type(err).__name__}: {str(err)[:200]})"
        ) from err


def _value(hint: Any, x: Any, where: str, problems: list[str]) -> Any:
    """Read one value as an annotation says, or note what is wrong with it."""
    kind = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), x, where + ".", problems=problems)
    if kind is tuple:
        return _tuple(typing.get_args(hint), x, where, problems=problems)
    if kind in (typing.Union, types.UnionType):
        return _one_of(typing.get_args(hint), x, where, problems=problems)
    if kind is typing.Literal:
        told = typing.get_args(hint)
        if not any(x == value and type(x) is type(value) for value in told):
            problems.append(
                f"{where}: one of {', '.join(map(repr, told))} was expected, got {_short(x)}"
            )
        return x
    name = where.rpartition(".")[2].partition("[")[0]
    if hint is int:
        fits, expected = _is_integer(x), f"an integer of at most {MAX_INTEGER:,}"
    elif hint is float:
        fits, expected = _is_number(x, name)
        x = float(x) if fits else x
    elif hint is bool:
        fits, expected = isinstance(x, bool), "true or false"
    elif hint is str:
        fits, expected = isinstance(x, str) and len(x) <= 1000, "a text"
    elif hint is type(None):
        fits, expected = x is None, "null"
    else:
        raise TypeError(f"{where}: a config can't have a field of type {hint}")
    if not fits:
        problems.append(f"{where}: {expected} was expected, got {_short(x)}")
    return x


def _tuple(parts: tuple[Any, ...], x: Any, where: str, problems: list[str]) -> Any:
    """Read a list. parts: one annotation and an ellipsis, or the annotation of each entry."""
    if not isinstance(x, list | tuple) or len(x) > MAX_ENTRIES:
        problems.append(f"{where}: a list was expected, got {_short(x)}")
        return ()
    if len(parts) == 2 and parts[1] is Ellipsis:
        parts = parts[:1] * len(x)
    if len(parts) != len(x):
        problems.append(f"{where}: {len(parts)} entries were expected, got {_short(x)}")
        return ()
    return tuple(
        _value(part, entry, f"{where}[{i}]", problems=problems)
        for i, (part, entry) in enumerate(zip(parts, x))
    )


def _one_of(choices: tuple[Any, ...], x: Any, where: str, problems: list[str]) -> Any:
    """Read a value of one of several types; of none, say what is wrong with it as the first of
    them.
    """
    told: list[str] = []
    for choice in choices:
        found: list[str] = []
        value = _value(choice, x, where, problems=found)
        if not found:
            return value
        told = told or found
    problems += told
    return None


def _is_integer(x: Any) -> bool:
    return type(x) is int and abs(x) <= MAX_INTEGER


def _is_number(x: Any, name: str) -> tuple[bool, str]:
    """Whether a value is a number that a field of this name can have, and what it can have."""
    low, high = -MAX_NUMBER, MAX_NUMBER
    if _SHARES.search(name):
        low, high = 0.0, 1.0
    elif _POSITIVE.search(name):
        low = 0.0
    fits = type(x) in (int, float) and low <= x <= high and math.isfinite(x)
    return fits, f"a number from {low:g} to {high:g}"


def _short(x: Any) -> str:
    return reprlib.repr(x)[:100]
