"""How long a piece of work waited for JAX to trace and compile."""

import contextlib
import threading
from collections.abc import Iterator

import jax


class Waited:
    """Seconds of this process spent tracing and compiling while a block of `measured` is open.

    Tracing a function traces the functions in it, so that its stretches of time overlap: they count
    once.
    """

    def __init__(self):
        self.stretches: list[tuple[float, float]] = []
        self.thread = threading.get_ident()  # compilations of other threads do not delay this one

    @property
    def seconds(self) -> float:
        """The sum so far."""
        total, until = 0.0, -float("inf")
        for begin, end in sorted(self.stretches):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total


_open: list[Waited] = []


def _listen(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
    if not event.startswith("/jax/core/compile/"):
        return
    for waited in _open:
        if waited.thread == threading.get_ident():
            waited.stretches.append((start_time, end_time))


@contextlib.contextmanager
def measured() -> Iterator[Waited]:
    """Measure what is traced and compiled inside the block, as it goes on."""
    waited = Waited()
    if not _open:
        jax.monitoring.register_event_time_span_listener(_listen)
    _open.append(waited)
    try:
        yield waited
    finally:
        _open.remove(waited)
        if not _open:
            with contextlib.suppress(AssertionError):  # all listeners were cleared elsewhere
                jax.monitoring.unregister_event_time_span_listener(_listen)
