"""Start of every experiment: join the other hosts, keep what is compiled, and heed SIGTERM.

An experiment has `flags.Hosts` among its options, and runs inside

    with launch.started(options.hosts):
        c = hosts.on_every_host(resolve, options)  # each host reads for itself; all fail with one
        launch.say(text)                      # one host prints
        hosts.on_first(write, ...)            # one host writes, the others wait; all fail with it
        hosts.stop_if_asked("...")            # between pieces of work: SIGTERM to one stops all

All hosts run the same lines in the same order. What trains, prunes, evaluates or saves arrays
(`training.fit`, `prune`, `forecasting.evaluate`, `ltsm_jax.save`) is called by all; what touches
files and prints, by the first alone. A decision that rests on a file is the first's:
`hosts.on_first(file.is_file)`. After SIGTERM and Ctrl-C the run is saved, and the same command goes
on: on the same hosts, on others, or on one. The exit code is 75 after SIGTERM
(`hosts.EXIT_STOPPED`) and 130 after Ctrl-C (`hosts.EXIT_INTERRUPTED`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments.flags import Hosts
from ltsm_jax import hosts, storage, terminal
from ltsm_jax.terminal import leave, speak_plainly
from ltsm_jax.training import checkpoints

__all__ = ["guarded", "leave", "say", "speak_plainly", "started"]

FIRST_LEAVES_LAST = (
    2.0  # seconds; with it goes the service whose end the others would take for a crash
)


@contextlib.contextmanager
def started(options: Hosts) -> Iterator[None]:
    """Join the other hosts, keep compiled programs in `$LTSM_CACHE`/compiled, and stop cleanly on
    SIGTERM.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps
    nothing.
    Raises: ValueError for flags that do not go together.
    """
    with hosts.session(options.coordinator, options.num_processes, options.process_id):
        storage.keep_compiled()
        yield


def say(text: Any) -> None:
    """Print, on the first host alone."""
    if hosts.first():
        print(text, flush=True)


def guarded(run: Callable[[], int]) -> int:
    """Return the exit code of `run`, its errors said in a line each: 2 for what does not work, 130
    and 75 for what was stopped.

    Where one of several hosts could not write, the process ends here.
    """
    speak_plainly()
    code = terminal.guarded(run)
    if checkpoints.gave_up():
        if hosts.first():
            time.sleep(FIRST_LEAVES_LAST)
        terminal.end(code)
    return code
