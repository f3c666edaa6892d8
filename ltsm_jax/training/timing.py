"""How long work will take: a small piece of it, timed on the device that will do it.

The program that is compiled for the piece is the one that does the work, so nothing is compiled
twice. Where the piece alone would take long, or where it would be compiled for nothing, its time is
reckoned from its floating-point operations and the speed of a matrix product.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ltsm_jax.training import compiling

MOST_SECONDS = 1.0  # a piece that takes longer is reckoned
EFFICIENCY = 0.5  # of a model, as a share of the speed of a large matrix product
SIDE = 1024  # of the matrices of that product
EQUATION_SECONDS = 0.0015  # to compile one equation of a traced program
MOST_EQUATIONS = 600  # a larger program is not compiled for its time alone


@dataclasses.dataclass(frozen=True)
class Piece:
    """Time of one piece of work.

    Attributes:
      seconds: of one call of a compiled program.
      compile_seconds: that tracing and compiling it took; reckoned where it was not compiled.
      measured: whether it was run, or reckoned.
    """

    seconds: float
    compile_seconds: float
    measured: bool = True


@dataclasses.dataclass(frozen=True)
class TimeEstimate:
    """Time of all of the work: `seconds` without compilation, `compile_seconds`; print it."""

    seconds: float
    compile_seconds: float
    measured: bool = True

    @classmethod
    def of(cls, piece: Piece, calls: float, programs: float = 1) -> "TimeEstimate":
        """So many calls of a piece, and compilations of programs like its own."""
        return cls(piece.seconds * calls, piece.compile_seconds * programs, piece.measured)

    def __add__(self, other: "TimeEstimate") -> "TimeEstimate":
        return TimeEstimate(
            self.seconds + other.seconds,
            self.compile_seconds + other.compile_seconds,
            self.measured and other.measured,
        )

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.seconds + self.compile_seconds

    def __str__(self) -> str:
        said = f"about {time_in_words(self.total)}"
        if self.compile_seconds >= 0.5:
            said += f", {time_in_words(self.compile_seconds)} of it to compile"
        if not self.measured:
            said += "; reckoned from floating-point operations"
        return said


def time_in_words(seconds: float) -> str:
    """Say a time, coarsely: 1 s, 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36000 else f"{round(seconds / 3600):,} h"


def of(call: Callable[[], Any], trace: Callable[[], Any], *, work_follows: bool = True) -> Piece:
    """Time one call of a compiled function.

    Args:
      call: does the piece of work, and changes nothing that a second call would need.
      trace: gives its `jax.stages.Traced`, or anything with `jaxpr`.
      work_follows: the program will be used; else a large one is reckoned instead of compiled.
    """
    with compiling.measured() as waited:
        jaxpr = trace().jaxpr
        reckoned = operations(jaxpr) / (EFFICIENCY * speed())
        size = equations(jaxpr)
        if reckoned > MOST_SECONDS or (size > MOST_EQUATIONS and not work_follows):
            return Piece(reckoned, EQUATION_SECONDS * size, measured=False)
        jax.block_until_ready(call())
    shortest = math.inf
    for _ in range(2):
        began = time.monotonic()
        jax.block_until_ready(call())
        shortest = min(shortest, time.monotonic() - began)
    return Piece(shortest, waited.seconds)


@functools.cache
def speed() -> float:
    """Floating-point operations a second of a large matrix product in float32 here; takes
    milliseconds.
    """
    product = jax.jit(jnp.matmul)
    x = jnp.ones((SIDE, SIDE), jnp.float32)
    product(x, x).block_until_ready()
    shortest = math.inf
    for _ in range(3):
        began = time.monotonic()
        product(x, x).block_until_ready()
        shortest = min(shortest, time.monotonic() - began)
    return 2 * SIDE**3 / shortest


def operations(jaxpr: Any) -> float:
    """Floating-point operations of the products and convolutions of a traced function.

    A loop of known length counts as often as it runs, one of unknown length (such as that over
    training steps) once; of branches, the largest counts.
    """
    total = 0.0
    for equation in _plain(jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        inner = [operations(body) for body in _bodies(params)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner)
    return total


def equations(jaxpr: Any) -> int:
    """Equations of a traced function, those of functions in it among them."""
    total = 0
    for equation in _plain(jaxpr).eqns:
        total += 1 + sum(equations(body) for body in _bodies(equation.params))
    return total


def _plain(jaxpr: Any) -> Any:
    return jaxpr if hasattr(jaxpr, "eqns") else jaxpr.jaxpr


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    """Traced functions among the parameters of an equation."""
    for value in params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if hasattr(entry, "eqns") or hasattr(entry, "jaxpr"):
                yield entry
