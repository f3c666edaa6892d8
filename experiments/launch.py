"""What every experiment does at its start: join the other hosts, keep what is compiled, and heed SIGTERM.

An experiment has `flags.Hosts` among its options, and runs inside

    with launch.started(options.hosts):
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

import codecs
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.flags import Hosts, in_flags
from ltsm_jax import hosts, storage
from ltsm_jax.training import checkpoints

FIRST_LEAVES_LAST = 2.0  # seconds; with it goes the service whose end the others would take for a crash
# What a terminal without UTF-8 gets for the signs of tables and messages.
PLAIN = {"±": "+/-", "…": "...", "→": "->", "×": "x", "“": '"', "”": '"', "’": "'"}
PLAIN |= dict.fromkeys("╭╮╰╯┏┓┗┛┡┩└┘┌┐┬┴┼", "+") | dict.fromkeys("│┃", "|") | dict.fromkeys("─━–—", "-")


@contextlib.contextmanager
def started(options: Hosts) -> Iterator[None]:
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
    """Return the exit code of `run`, its errors said in a line each: 2 for what does not work, 130 and 75 for what was
    stopped.

    Where one of several hosts could not write, the process ends here.
    """
    speak_plainly()
    code = _guarded(run)
    if checkpoints.gave_up():
        if hosts.first():
            time.sleep(FIRST_LEAVES_LAST)
        _end(code)
    return code


def _guarded(run: Callable[[], int]) -> int:
    try:
        return run()
    except BrokenPipeError:  # of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; make room, and the same command goes on from here" if full else ""
        print(f"error: {in_flags(str(err))}{hint}", file=sys.stderr)
        return 2
    except (ValueError, ModuleNotFoundError) as err:
        print(f"error: {in_flags(str(err))}", file=sys.stderr)
        return 2
    except hosts.Stopped as err:
        print(f"{err}\nthe same command goes on from here", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return hosts.EXIT_INTERRUPTED


def leave(code: int) -> None:
    """End the program with an exit code.

    After Ctrl-C without the interpreter's own end: a compiler or a writer of checkpoints may still be at work in
    another thread, and would be torn down under it.
    """
    if code == hosts.EXIT_INTERRUPTED:
        _end(code)
    sys.exit(code)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def speak_plainly() -> None:
    """Let no sign that the terminal does not know end the program: it is written in signs that every one knows."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # what stands in for a terminal in tests has none
        if reconfigure is not None and stream.errors != "plain":
            reconfigure(errors="plain")


def _plain(err: UnicodeError) -> tuple[str, int]:
    if not isinstance(err, UnicodeEncodeError):
        raise err
    signs = err.object[err.start : err.end]
    return "".join(PLAIN.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in signs), err.end
