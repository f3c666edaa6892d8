"""The runtime of a program: the dtype of its products, its devices, and its platform.

The layers that products are taken in lie deep inside a model, and these three are decided far above
it, by whoever compiles a program. So they travel in two ways. Down to the border of a model, in
training, evaluation and measurements, a `Runtime` is an argument like any other. Inside the model
it would be an argument of every method and module of every family, of which `Linear`, `Experts`
and `Dropout` alone read it. There the layers ask `Runtime.current()` instead, and `Runtime.call` is
the one place that sets what they find. It is the only hidden argument of the library.
"""

import contextvars
import dataclasses
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

from ltsm_jax.sharding import Placement

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How and where a program computes; hashable, so that it may be static under jit.

        Runtime(compute="bfloat16").call(model.predict, params, context, 96)

    Attributes:
      compute: dtype in which every `Linear` and `Experts` multiplies, whatever its input and its
        parameters are in; None: that of the input. Norms, softmax, residual sums with float32 and
        losses stay in float32; so do the parameters, and with them gradients and optimiser.
      placement: the devices that share the rows of the batch, which is split by `sharding.BATCH`.
        Each computes the experts of the tokens of its own rows. Left to itself, XLA sorts the
        tokens of all devices by expert, and computes all of them on every device.
      platform: "cpu", "gpu", "tpu", which decides how experts and dropout are computed; None: that
        of the machine that traces. For programs that are compiled on one machine for another.
    """

    compute: str | None = None
    placement: Placement = dataclasses.field(default_factory=Placement)
    platform: str | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether the program runs on a CPU."""
        return (self.platform or jax.default_backend()) == "cpu"

    @staticmethod
    def current() -> "Runtime":
        """Give the runtime that a layer is traced with; a plain one where nobody said any."""
        return _CURRENT.get() or Runtime()

    def call(
        self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs
    ) -> Result:
        """Call `function`; the layers that are traced meanwhile compute with this runtime.

        Use it inside the function that is compiled, around the call of a model. A program has one
        runtime: inside the call of another one it is an error.
        """
        assert _CURRENT.get() in (None, self), "a program has one runtime"
        before = _CURRENT.set(self)
        try:
            return function(*args, **kwargs)
        finally:
            _CURRENT.reset(before)


_CURRENT: contextvars.ContextVar[Runtime | None] = contextvars.ContextVar("runtime", default=None)
