"""Reading the fields of a published config.json, and the sizes that the tensors tell: all problems
in one error.

    told = Fields(published, "file.safetensors")
    told.integer("num_hidden_layers", high=MAX_LAYERS, weights=layer_count(state,
    r"model\\.layers\\.(\\d+)\\."))
    # raises CheckpointError with all that is wrong
    config = told.build(lambda: TheConfig.from_published(published))

A field that is wrong gives its default (or the lowest value allowed), so that reading can go on to
the next one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np

from converters.pickles import quoted
from converters.tables import problem_list
from ltsm_jax.original_files import CheckpointError

# the deepest published model has 50: a small file must not make us build thousands of layers
MAX_LAYERS = 128
MAX_SIZE = 1 << 20
_DEEP = 64  # layers that take a second to build

_NOTHING = object()
T = TypeVar("T")


class Fields:
    """The fields of one config, read with checks. `problems` collects what is wrong with them."""

    def __init__(self, published: Mapping[str, Any], where: str):
        self.published, self.where = published, where
        self.problems: list[str] = []

    def integer(
        self,
        name: str,
        default: Any = _NOTHING,
        *,
        low: int = 1,
        high: int = MAX_SIZE,
        weights: int | None = None,
    ) -> Any:
        """A whole number from low to high. weights: what the tensors say, where they do; it must
        agree.
        """
        value = self._told(name, default)
        if value is _NOTHING or (value is default and name not in self.published):
            return low if value is _NOTHING else value
        if not _whole(value) or not low <= value <= high:
            return self._wrong(
                name, default, low, what=f"not an integer from {low} to {high}", value=value
            )
        if weights is not None and value != weights:
            self.problems.append(f"{name}: the config says {value}, the weights {weights}")
        return value

    def integers(
        self,
        name: str,
        default: Any = _NOTHING,
        *,
        low: int = 1,
        high: int = MAX_SIZE,
        most: int = 64,
    ) -> tuple[int, ...]:
        """A list of 1 to `most` whole numbers from low to high."""
        value = self._told(name, default)
        if value is _NOTHING or (value is default and name not in self.published):
            return (low,) if value is _NOTHING else value
        fits = isinstance(value, list | tuple) and 0 < len(value) <= most
        if not fits or not all(_whole(v) and low <= v <= high for v in value):
            return self._wrong(
                name,
                default,
                (low,),
                what=f"not a list of 1 to {most} integers from {low} to {high}",
                value=value,
            )
        return tuple(value)

    def number(
        self, name: str, default: Any = _NOTHING, *, low: float = 0.0, high: float = 1e9
    ) -> Any:
        """A number from low to high."""
        value = self._told(name, default)
        if value is _NOTHING or (value is default and name not in self.published):
            return low if value is _NOTHING else value
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not low <= value <= high:
            return self._wrong(
                name, default, low, what=f"not a number from {low:g} to {high:g}", value=value
            )
        return value

    def boolean(self, name: str, default: Any = _NOTHING) -> Any:
        """true or false."""
        value = self._told(name, default)
        if value is _NOTHING or isinstance(value, bool):
            return False if value is _NOTHING else value
        return self._wrong(name, default, False, what="not true or false", value=value)

    def choice(self, name: str, options: Sequence[str], default: Any = _NOTHING) -> Any:
        """One of some names."""
        value = self._told(name, default)
        if value is _NOTHING or (isinstance(value, str) and value in options):
            return options[0] if value is _NOTHING else value
        return self._wrong(
            name, default, options[0], what=f"not one of {', '.join(options)}", value=value
        )

    def build(self, make: Callable[[], T]) -> T:
        """Call `make`, once no field is wrong.

        Raises: CheckpointError that lists every problem, those of `make` included.
        """
        if not self.problems:
            try:
                return make()
            except (ValueError, TypeError, OverflowError, RecursionError) as e:
                self.problems.append(str(e)[:500])
        raise CheckpointError(
            problem_list(f"{self.where}: the config does not go with the weights:", self.problems)
        )

    def _told(self, name: str, default: Any) -> Any:
        if name in self.published:
            return self.published[name]
        if default is _NOTHING:
            self.problems.append(f"{name}: missing")
        return default

    def _wrong(self, name: str, default: Any, low: Any, what: str, value: Any) -> Any:
        told = f": {value}" if _whole(value) and abs(value) < 1 << 64 else f": {quoted(value)}"
        self.problems.append(f"{name}: {what}{told}")
        return low if default is _NOTHING else default


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_levels(value: Any) -> TypeGuard[Sequence[float]]:
    """Return whether a value can be the quantile levels of a model: 1 to 999 numbers between 0 and
    1.
    """
    if not isinstance(value, list | tuple) or not 0 < len(value) <= 999:
        return False
    return all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1 for x in value)


def dims(state: Mapping[str, Any], key: str, rank: int = 2) -> tuple[int, ...] | tuple[None, ...]:
    """The shape of a tensor; Nones where there is no such tensor or it has another number
    of axes.
    """
    value = state.get(key)
    return value.shape if isinstance(value, np.ndarray) and value.ndim == rank else (None,) * rank


def uneven_layers(state: Mapping[str, Any]) -> str | None:
    """Say which layers of a deep model have far fewer tensors than others; None where none has.

    A model of a hundred layers takes seconds to build, and a name for each of them a kilobyte of
    file.
    """
    found: dict[str, dict[str, int]] = {}
    for key in state:
        match = re.match(r"(.*?)\.(\d{1,6})\.", key)
        if match:
            layers = found.setdefault(match[1], {})
            layers[match[2]] = layers.get(match[2], 0) + 1
    for name, layers in found.items():
        fewest, most = min(layers, key=lambda i: layers[i]), max(layers, key=lambda i: layers[i])
        uneven = layers[most] > 2 * layers[fewest] or layers[most] < 4
        if len(layers) > _DEEP and uneven:
            return (
                f"{quoted(name)} has {len(layers)} layers, of which {fewest} has {layers[fewest]} "
                f"tensors and {most} {layers[most]}: most of the model is missing"
            )
    return None


def layer_count(state: Mapping[str, Any], pattern: str) -> int | None:
    """Count the layers of the keys, from 0 without a gap; None where they don't. pattern: up to the
    number.
    """
    found = {int(m[1]) for key in state if (m := re.match(pattern, key)) and len(m[1]) < 7}
    return len(found) if found and found == set(range(len(found))) else None
