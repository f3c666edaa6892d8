"""What every experiment does at its start: join the other hosts, keep what is compiled, and heed SIGTERM.

An experiment has the flags of `FLAGS` (with argparse; their names are the fields of `Scale`) or a `Scale` among its
fields (with tyro), and runs inside

    with launch.started(options):
        c = hosts.together(resolve, options)    # each host reads for itself; where one cannot, all give up
        launch.say(text)                        # one host prints
        hosts.on_first(write, ...)              # one host writes, the others wait; where it fails, all fail
        hosts.stop_if_asked("...")              # between two pieces of work: all stop when SIGTERM has come to one

All hosts run the same lines in the same order. What trains, prunes, evaluates or saves arrays (`training.fit`, `prune`,
`forecasting.evaluate`, `ltsm_jax.save`) is called by all; what touches files and prints, by the first alone. A decision
that rests on a file is the first's: `hosts.on_first(file.is_file)`. After SIGTERM and Ctrl-C the run is saved, and the
same command goes on: on the same hosts, on others, or on one. The exit code is 75 after SIGTERM
(`hosts.EXIT_STOPPED`) and 130 after Ctrl-C (`hosts.EXIT_INTERRUPTED`).
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from ltsm_jax import hosts, storage
from ltsm_jax.training import checkpoints

FLAGS = {
    "mesh": "devices by axis, as data=4,fsdp=2,tensor=1 [all on data]",
    "compute": "dtype of the matrix products in training: float32 or bfloat16 [float32]",
    "accumulate": "parts a batch is taken in, for less memory [1]",
    "remat": "what the backward pass computes again, for less memory: none or 'all but products' [none]",
    "coordinator": "several hosts: address:port of process 0, or auto (SLURM, TPU pod, Open MPI, ...) [one host]",
    "num-processes": "how many processes there are, with an address",
    "process-id": "which of them this one is, from 0, with an address",
}
FIRST_LEAVES_LAST = 2.0  # seconds; with it goes the service whose end the others would take for a crash
PLACE = ("coordinator", "num_processes", "process_id")  # where it runs: no part of what it computes


class Placed(Protocol):
    """Options that say which hosts take part."""

    @property
    def coordinator(self) -> str | None:
        """See `hosts.initialize`, as for the other two."""
        ...

    @property
    def num_processes(self) -> int | None:
        """How many processes."""
        ...

    @property
    def process_id(self) -> int | None:
        """Which one this is."""
        ...


@dataclasses.dataclass(frozen=True)
class Scale:
    """On which devices and hosts, and how."""

    mesh: str | None = None
    """devices by axis, as data=4,fsdp=2,tensor=1; by default all on data"""
    compute: str = "float32"
    """dtype of the matrix products in training: float32 or bfloat16"""
    accumulate: int = 1
    """parts a batch is taken in, for less memory"""
    remat: str = "none"
    """what the backward pass computes again, for less memory: none or 'all but products'"""
    coordinator: str | None = None
    """several hosts: address:port of process 0, or auto (SLURM, TPU pod, Open MPI, Kubernetes)"""
    num_processes: int | None = None
    """how many processes there are, with an address"""
    process_id: int | None = None
    """which of them this one is, from 0, with an address"""


@contextlib.contextmanager
def started(options: Placed) -> Iterator[None]:
    """Join the other hosts, keep compiled programs in `$LTSM_CACHE`/compiled, and stop cleanly on SIGTERM.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    Raises: ValueError for flags that do not go together.
    """
    with hosts.session(options.coordinator, options.num_processes, options.process_id):
        now = jax.config.values
        if now["jax_enable_compilation_cache"] and now["jax_compilation_cache_dir"] is None:
            jax.config.update("jax_compilation_cache_dir", str(storage.cache_folder("compiled")))
        yield


def say(text: Any) -> None:
    """Print, on the first host alone."""
    if hosts.first():
        print(text, flush=True)


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`, its errors in a line each: 2 for what does not work, 130 and 75 for what was stopped.

    Where one of several hosts could not write, the process ends here.
    """
    code = _guarded(run)
    if checkpoints.gave_up():
        if hosts.first():
            time.sleep(FIRST_LEAVES_LAST)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _guarded(run: Callable[[], int]) -> int:
    try:
        return run()
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except hosts.Stopped as err:
        print(f"{err}\nthe same command goes on from here", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return hosts.EXIT_INTERRUPTED
