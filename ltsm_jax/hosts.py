"""Several processes at one job: how they find each other, agree, stop together, and which of them writes.

Every process runs the same program with the same arguments and takes the same decisions in the same order; "host" here
means such a process, one per machine as a rule. What a host sees for itself (a clock, a file, a signal, a full disk)
must be exchanged before anything is decided by it: a collective that only some hosts enter waits for ever. With one
process, which is the default, every function here is free and returns what that process says.

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
EXIT_STOPPED = 75  # exit code after SIGTERM: all is saved, the same command goes on (EX_TEMPFAIL of sysexits.h)

_stop = threading.Event()


class Stopped(Exception):
    """SIGTERM came to one of the hosts, and all have stopped at the same step; the message says what was kept."""


class OtherHostError(ValueError):
    """Another host failed, and this one stopped with it; the message is that of the other."""


@contextlib.contextmanager
def session(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Join the other hosts (see `initialize`); SIGTERM inside the block asks `stopping` code to save and stop.

    A second SIGTERM ends the process at once. The former handler is put back at the end of the block.
    """
    initialize(coordinator, num_processes, process_id)
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield
        return
    _stop.clear()

    def ask(signum, _frame):
        _stop.set()
        signal.signal(signum, before)
        os.write(2, b"SIGTERM: saving and stopping (once more: stop at once)\n")

    # after joining: JAX's own handler, for a service that is not used here, would take its place
    before = signal.signal(signal.SIGTERM, ask) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _stop.clear()


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other hosts of a job; with no argument, and when joined already, do nothing.

    Args:
      coordinator: "address:port" of process 0, which all others can reach; or "auto": JAX finds coordinator, number and
        id itself (SLURM, TPU pods, Open MPI, Kubernetes).
      num_processes: of the job. process_id: of this process, from 0. Both belong to an address.
    Raises: ValueError listing what is missing or wrong. Must come before any other use of JAX's devices.
    """
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    if all(value is None for value in given.values()):
        return
    problems = []
    if coordinator == AUTO:
        problems += [f"--{k} comes from the cluster with --coordinator auto" for k in given if k != "coordinator" and
                     given[k] is not None]  # fmt: skip
    else:
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            problems.append(f"{', '.join(missing)} missing: the three belong together")
        if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
            problems.append(f"--coordinator is address:port of process 0, or auto; got {coordinator!r}")
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
            jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method="deactivate")
    except (ValueError, RuntimeError) as err:
        where = "no cluster that JAX knows was found" if coordinator == AUTO else f"cannot join {coordinator}"
        raise ValueError(
            f"{where}: {err}. Name it: --coordinator ADDRESS:PORT --num-processes N --process-id I"
        ) from err


def count() -> int:
    """How many hosts there are."""
    return jax.process_count()


def index() -> int:
    """Number of this host, from 0."""
    return jax.process_index()


def first() -> bool:
    """Whether this is the host that writes and speaks."""
    return jax.process_index() == 0


def agree(*values: int) -> np.ndarray:
    """What each host says, [hosts, values] int32, the same on all. Waits for all hosts."""
    mine = np.asarray(values, np.int32)
    return mine[None] if count() == 1 else np.asarray(multihost_utils.process_allgather(mine))


def together(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`f(...)` on every host; where it fails on one, it fails on all. `f` must not itself wait for other hosts.

    Raises: what `f` raises here; OtherHostError where it raised elsewhere.
    """
    if count() == 1:
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
    """`f(...)` on the first host alone; all wait for it and get its result (JSON-able), or fail with it."""
    if count() == 1:
        return f(*args, **kwargs)
    said = together(lambda: json.dumps(f(*args, **kwargs)) if first() else "")
    return json.loads(_texts(said)[0])


def _texts(mine: str) -> list[str]:
    """What each host says, in words."""
    data = mine.encode()
    sizes = agree(len(data))[:, 0]
    if not sizes.any():
        return [""] * len(sizes)
    padded = np.frombuffer(data.ljust(int(sizes.max()), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def stopping() -> bool:
    """Whether SIGTERM has come to this host. Hosts learn of each other's by `agree`."""
    return _stop.is_set()


def stop_if_asked(kept: str) -> None:
    """Between two pieces of work. Raises: Stopped on every host when SIGTERM has come to one of them."""
    if agree(stopping()).any():
        raise Stopped(kept)
