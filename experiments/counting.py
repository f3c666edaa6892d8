"""Count the cost of a step: matrix products in its jaxpr, collectives in its compiled text.

Both count a loop's body as often as it runs where that is known; the compiler's own FLOPs count it
once. A loop whose length is an argument counts once: the loop over the steps of a dispatch, so that
all numbers are those of one step.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products in a jaxpr, 2 for each multiply-add, over
    all devices together.

    Counted: `dot_general`, `ragged_dot` (each row once, by the one expert it goes to) and
    convolutions, forward, backward and recomputed ones alike. Everything else, a few per cent in a
    Transformer, is not. Of a branch the dearest side counts.
    """
    return sum(_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _flops(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        lhs, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2 * out.size * math.prod(lhs.shape[i] for i in parameters["dimension_numbers"][0][0])
    if name == "ragged_dot_general":
        numbers = parameters["ragged_dot_dimension_numbers"]
        lhs, groups, out = (
            equation.invars[0].aval,
            equation.invars[2].aval,
            equation.outvars[0].aval,
        )
        contracting = numbers.dot_dimension_numbers[0][0]
        summed = 2 * out.size * math.prod(lhs.shape[i] for i in contracting)
        # the backward pass of the kernels sums over the ragged rows: each lands in one group's
        # result, not in all
        inside = set(numbers.lhs_ragged_dimensions) <= set(contracting)
        return summed // groups.shape[-1] if inside else summed
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        return (
            2 * out.size * kernel.size // kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
        )
    inner = []
    for value in parameters.values():
        inner += map(product_flops, _jaxprs(value))
    if name == "cond":
        return max(inner)
    # inside shard_map the shapes are those of one device
    times = {"scan": lambda: parameters["length"], "shard_map": lambda: parameters["mesh"].size}
    return sum(inner) * times.get(name, lambda: 1)()


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return list(itertools.chain.from_iterable(map(_jaxprs, value)))
    return [value] if hasattr(value, "eqns") or hasattr(value, "jaxpr") else []


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many a step runs, and the bytes of their results on
    one device.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """Collectives of a compiled program by kind, from its text (`compiled.as_text()`); kinds
    without any are left out.

    An asynchronous pair of start and done is one collective.
    """
    computations = _computations(text)

    @functools.cache
    def totals(name: str) -> tuple[tuple[int, int], ...]:
        found = [[0, 0] for _ in KINDS]
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                kind = found[KINDS.index(match["kind"])]
                kind[0] += 1
                kind[1] += _result_bytes(match["type"], match["kind"], bool(match["start"]))
            times = int(trips[1]) if (trips := _TRIPS.search(line)) else 1
            for called in _calls(line):
                for kind, (count, size) in zip(found, totals(called), strict=True):
                    kind[0] += times * count
                    kind[1] += times * size
        return tuple((count, size) for count, size in found)

    sums = totals("ENTRY")
    return {kind: Traffic(*both) for kind, both in zip(KINDS, sums, strict=True) if both[0]}


_COLLECTIVE = re.compile(rf" = (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALL = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation by name; the one that is run is called ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and " = " not in line.split("(")[0]:
            name = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
            lines = found.setdefault(name, [])
        elif " = " in line:
            lines.append(line)
    return found


def _calls(line: str) -> list[str]:
    several = []
    for names in _CALLS.findall(line):
        several += [name.strip().lstrip("%") for name in names.split(",")]
    return [*_CALL.findall(line), *several]


def _result_bytes(type_: str, kind: str, start: bool) -> int:
    sizes = []
    for dtype, dims in _ARRAY.findall(type_):
        if dims:
            count = math.prod(int(n) for n in dims.split(",") if n)
            sizes.append(count * _itemsize(dtype))
    if start and kind != "all-reduce":  # the operands stand before the results
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _itemsize(dtype: str) -> int:
    bits = _BITS.search(dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1
