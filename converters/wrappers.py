"""Unwrap a state dict: programs put dictionaries around it, and names before each key.

One rule for all families. The state dict is the dictionary, at most `MAX_DEPTH` deep, that holds
tensors under text. Where several do, those under the usual names (`NESTS`) go before others, and
those that some family knows before those that none knows; two that are left are refused by name.
Before its keys may stand any prefix that all of them share ("model.", "module._orig_mod.", ...),
and inside them the parts that PyTorch's own wrappers leave (`WRAPPERS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from converters.pickles import quoted

NESTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "student",
    "weights",
    "params",
)
MAX_DEPTH = 3
MAX_KEYS = 50_000  # of a state dict; the largest published one has 2,600
_MAX_LOOKED_AT = 1000  # dictionaries; an optimiser's state has one for each parameter
_MAX_TRIED = 10  # of them, that are shown to all families
_MAX_PREFIX = 8  # parts before every key

# Parts of a key that belong to no model: DistributedDataParallel, torch.compile, FSDP, activation
# checkpoints.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def is_state(value: object) -> bool:
    """Tell whether a value is a dictionary with a tensor under a text."""
    if not isinstance(value, dict):
        return False
    return any(
        isinstance(key, str) and isinstance(entry, np.ndarray) for key, entry in value.items()
    )


def find_state(
    content: dict[Any, Any], known: Callable[[dict[str, Any]], bool]
) -> tuple[tuple[str, ...], dict[str, Any] | None, list[tuple[str, ...]]]:
    """Find the state dict in what a file holds.

    Args:
      content: the dictionary in the file.
      known: whether some family knows a state dict.
    Returns: the keys that lead to the state dict (none: `content` is it), the state dict (None:
      there is none), and the places of others that were left aside.
    Raises: ValueError that names the state dicts among which nothing decides.
    """
    found = _candidates(content)
    if not found:
        return (), None, []
    chosen = list(found)
    if len(chosen) > 1:
        # A program may put a few tensors (means, scales) beside a state dict.
        largest = max(found, key=lambda path: len(found[path]))
        likely = sorted(found, key=lambda path: (not _is_usual(path), -len(found[path])))[
            :_MAX_TRIED
        ]
        chosen = [path for path in found if path in likely and known(found[path])] or [largest]
    usual = [path for path in chosen if _is_usual(path)]
    chosen = usual or chosen
    if len(chosen) > 1:
        names = ", ".join(map(_dotted, chosen[:5])) + (", ..." if len(chosen) > 5 else "")
        raise ValueError(
            f"holds {len(chosen)} state dicts, under {names}, and nothing says which one is meant"
        )
    return chosen[0], found[chosen[0]], [path for path in found if path != chosen[0]]


def _is_usual(path: tuple[str, ...]) -> bool:
    return all(part in NESTS for part in path)


def _candidates(content: dict[Any, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Every dictionary with tensors, by the keys that lead there."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    level: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), content)]
    seen: set[int] = set()  # one dictionary may stand in a file under any number of names
    for _ in range(MAX_DEPTH + 1):
        deeper = []
        for path, value in level:
            if id(value) in seen or len(seen) >= _MAX_LOOKED_AT:
                continue
            seen.add(id(value))
            if is_state(value):
                found[path] = value
            if len(value) <= MAX_KEYS:
                inner = [
                    (key, v)
                    for key, v in value.items()
                    if isinstance(key, str) and isinstance(v, dict)
                ]
                deeper += [((*path, key), v) for key, v in inner]
        level = deeper[:_MAX_LOOKED_AT]
    return found


def _dotted(path: tuple[str, ...]) -> str:
    return quoted(".".join(path)) if path else "the top"


def nest_notes(path: tuple[str, ...], aside: list[tuple[str, ...]]) -> list[str]:
    """Say where a state dict was found, and which others were left aside."""
    notes = []
    if path:
        notes.append(f"the state dict was found under {_dotted(path)}")
    if aside:
        more = ", ..." if len(aside) > 5 else ""
        notes.append(
            f"not read, though they hold tensors too: {', '.join(map(_dotted, aside[:5]))}{more}"
        )
    return notes


def common_prefix(keys: Mapping[str, Any]) -> list[str]:
    """Give the parts with which every key begins, of which none is a whole key."""
    first, *rest = keys
    shared = first.split(".", _MAX_PREFIX)[:-1]
    for key in rest:
        while shared and not key.startswith(".".join(shared) + "."):
            shared.pop()
    return shared


def without_wrappers(state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Take the parts that PyTorch's wrappers leave out of the keys, behind what all keys begin
    with.

    Returns: the state dict, the same one where there are none, and what to say of it.
    Raises: ValueError for two keys that become one.
    """
    start = len(common_prefix(state))
    taken: set[str] = set()
    clean: dict[str, Any] = {}
    for key, value in state.items():
        parts = key.split(".")
        wrapped = WRAPPERS.intersection(parts[start:-1])
        if wrapped:
            taken |= wrapped
            parts = [
                *parts[:start],
                *(part for part in parts[start:-1] if part not in WRAPPERS),
                parts[-1],
            ]
        bare = ".".join(parts)
        if bare in clean:
            raise ValueError(
                f"duplicate key {quoted(bare)}, with and without {', '.join(sorted(taken))}"
            )
        clean[bare] = value
    if not taken:
        return state, []
    return clean, [f"taken out of the keys, as no part of the model: {', '.join(sorted(taken))}"]


def has_adapters(state: Mapping[str, Any]) -> bool:
    """Tell whether some tensors are low-rank adapters, as the PEFT library writes them, and no
    weights of a model.
    """
    return any(".lora_A." in key or ".lora_B." in key or ".lora_embedding_" in key for key in state)
