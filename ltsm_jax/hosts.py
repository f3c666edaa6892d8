"""Several processes at one job: how they find each other, agree, stop together, and which of them
writes.

Every process runs the same program with the same arguments and takes the same decisions in the same
order; "host" here means such a process, one per machine as a rule. What a host sees for itself (a
clock, a file, a signal, a full disk) must be exchanged before anything is decided by it: a
collective that only some hosts enter waits for ever. With one process, which is the default, every
function here is free and returns what that process says.

SIGTERM and Ctrl-C do not break off what is being computed: in a `session`, and for Ctrl-C in an
`interruptible` block, they are noted, and what runs for long saves and stops between two pieces of
work.

    with hosts.session(coordinator="10.0.0.1:1234", num_processes=2, process_id=0):
        ...                                                 # the same program on every host
        hosts.on_first(table.to_csv, out / "results.csv")   # one writes; if that fails, all fail
"""

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTO = "auto"  # --coordinator auto: the cluster says who takes part
# exit code after SIGTERM: all is saved, the same command goes on (EX_TEMPFAIL of sysexits.h)
EXIT_STOPPED = 75
# exit code after Ctrl-C: all is saved, but the command should not be restarted automatically
EXIT_INTERRUPTED = 130

_stop = threading.Event()
_asked_by = [signal.SIGTERM]  # the signal that has set it
_handling: list[str] = []  # blocks that have put handlers in place, "session" or "block"


class Stopped(Exception):
    """A signal came to one of the hosts, and all have stopped at the same step; the message says
    what was kept.

    Attributes:
      exit_code: for the process, EXIT_STOPPED or, where Ctrl-C came to this host, EXIT_INTERRUPTED.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.exit_code = EXIT_INTERRUPTED if _asked_by[0] == signal.SIGINT else EXIT_STOPPED


class OtherHostError(ValueError):
    """Another host failed, and this one stopped with it; the message is that of the other."""


@contextlib.contextmanager
def session(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Join the other hosts (see `initialize`); SIGTERM or Ctrl-C inside the block asks to save and
    stop.

    What runs for long asks `stopping`, or calls `pause`, between two pieces of work. A second
    signal of the kind ends the process at once. The former handlers are put back at the end of the
    block.
    """
    initialize(coordinator, num_processes, process_id)
    if not _may_handle():
        yield
        return
    _forget()
    # after joining: JAX's own handler, for a service that is not used here, would take its place
    before: dict[int, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, _ask) or signal.SIG_DFL}
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a program's own handler, or none, stays
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _ask)
    _former.update(before)
    _handling.append("session")
    try:
        yield
    finally:
        _handling.pop()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _forget()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Defer a Ctrl-C inside the block until the running computation is done, unless another handler
    is installed.

    KeyboardInterrupt is raised by `pause`, by what is `stopping`, or at the end of the block; a
    second Ctrl-C raises it at once. It must not come out of JAX's compiler: the process then ends
    with a segmentation fault. May be nested, and may decorate a function.
    """
    own = (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    )  # of the program, or none
    if not _may_handle() or own or _handling:
        yield
        return
    _forget()
    _handling.append("block")
    _former[signal.SIGINT] = signal.signal(signal.SIGINT, _ask)
    try:
        yield
        pause()
    finally:
        _handling.pop()
        signal.signal(signal.SIGINT, _former[signal.SIGINT])
        _forget()


_former: dict[int, Any] = {}  # handlers to which a second signal goes


def _forget() -> None:
    _stop.clear()
    _asked_by[0] = signal.SIGTERM


def _may_handle() -> bool:
    return (
        threading.current_thread() is threading.main_thread()
    )  # Python allows handlers in no other thread


def _ask(signum: int, _frame: Any) -> None:
    _asked_by[0] = signal.Signals(signum)
    _stop.set()
    signal.signal(signum, _former[signum])
    what = (
        "saving and stopping"
        if signum == signal.SIGTERM
        else "stopping after what is being computed"
    )
    os.write(2, f"{_name()}: {what} (once more: stop at once)\n".encode())


def _name() -> str:
    return "Ctrl-C" if _asked_by[0] == signal.SIGINT else "SIGTERM"


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other hosts of a job; with no argument, and when joined already, do nothing.

    Args:
      coordinator: "address:port" of process 0, which all others can reach; or "auto": JAX finds
        coordinator, number and id itself (SLURM, TPU pods, Open MPI, Kubernetes).
      num_processes: of the job. process_id: of this process, from 0. Both belong to an address.
    Raises: ValueError listing what is missing or wrong. Must come before any other use of JAX's
    devices.
    """
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    if all(value is None for value in given.values()):
        return
    problems = []
    if coordinator == AUTO:
        problems += [
            f"--{k} comes from the cluster with --coordinator auto"
            for k in given
            if k != "coordinator" and given[k] is not None
        ]
    else:
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            problems.append(f"{', '.join(missing)} missing: the three belong together")
        if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
            problems.append(
                f"--coordinator is address:port of process 0, or auto; got {coordinator!r}"
            )
        if num_processes is not None and num_processes < 1:
            problems.append(f"--num-processes must be at least 1; got {num_processes}")
        elif process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
            problems.append(f"--process-id counts from 0 to --num-processes - 1; got {process_id}")
    if problems:
        raise ValueError("\n".join(problems))
    if jax.distributed.is_initialized():
        return
    try:
        if coordinator == AUTO:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(
                coordinator, num_processes, process_id, cluster_detection_method="deactivate"
            )
    except (ValueError, RuntimeError) as err:
        where = (
            "no cluster that JAX knows was found"
            if coordinator == AUTO
            else f"cannot join {coordinator}"
        )
        raise ValueError(
            f"{where}: {err}. Name it: --coordinator ADDRESS:PORT --num-processes N --process-id I"
        ) from err


def process_count() -> int:
    """Number of hosts."""
    return jax.process_count()


def index() -> int:
    """Number of this host, from 0."""
    return jax.process_index()


def first() -> bool:
    """Return whether this is the host that writes and speaks."""
    return jax.process_index() == 0


def agree(*values: int) -> np.ndarray:
    """Gather every host's values: [hosts, values] int32, the same on all. Waits for all hosts."""
    mine = np.asarray(values, np.int32)
    return (
        mine[None] if process_count() == 1 else np.asarray(multihost_utils.process_allgather(mine))
    )


def on_every_host(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`f(...)` on every host; where it fails on one, it fails on all. `f` must not itself wait for
    other hosts.

    Raises: what `f` raises here; OtherHostError where it raised elsewhere.
    """
    if process_count() == 1:
        return f(*args, **kwargs)
    result = error = None
    try:
        result = f(*args, **kwargs)
    except Exception as err:
        error = err
    told = _texts("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if any(told):
        raise OtherHostError("\n".join(f"host {i}: {text}" for i, text in enumerate(told) if text))
    return result


def on_first(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`f(...)` on the first host alone; all wait for it and get its result (JSON-able), or fail
    with it.
    """
    if process_count() == 1:
        return f(*args, **kwargs)
    said = on_every_host(lambda: json.dumps(f(*args, **kwargs)) if first() else "")
    return json.loads(_texts(said)[0])


def _texts(mine: str) -> list[str]:
    """Gather a text from every host."""
    data = mine.encode()
    sizes = agree(len(data))[:, 0]
    if not sizes.any():
        return [""] * len(sizes)
    padded = np.frombuffer(data.ljust(int(sizes.max()), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def stopping() -> bool:
    """Tell whether a signal to stop has come to this host. Hosts learn of each other's
    by `agree`.
    """
    return _stop.is_set()


def stopped(where: str) -> BaseException:
    """Make the exception for a stop: "stopped by SIGTERM {where}".

    It is `Stopped` in a session, KeyboardInterrupt outside, where only Ctrl-C is handled.
    """
    text = f"stopped by {_name()} {where}"
    return KeyboardInterrupt(text) if _handling == ["block"] else Stopped(text)


def asked_for(err: BaseException) -> bool:
    """Tell whether `stopped` has made this exception: state is as it was between two pieces of
    work.

    A second Ctrl-C comes in the middle of one, and has no words.
    """
    return isinstance(err, Stopped) or (isinstance(err, KeyboardInterrupt) and bool(err.args))


def stop_if_asked(where: str) -> None:
    """Between two pieces of work. Raises: `stopped(where)` on every host when a signal has come to
    one of them.
    """
    if agree(stopping()).any():
        raise stopped(where)


def pause() -> None:
    """Between two batches, where there is one host, which need not agree. Raises: `stopped` when it
    was asked to.
    """
    if stopping() and process_count() == 1:
        raise stopped("between two batches")
