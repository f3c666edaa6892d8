"""Conventions of programs on a terminal: their errors in a line each, exit codes, and signs that
every terminal can show.
"""

import codecs
import errno
import os
import sys
from collections.abc import Callable

from ltsm_jax import hosts
from ltsm_jax.flags import in_flags

MOST = 2000  # characters of a message
# What a terminal without UTF-8 gets for the signs of tables and messages.
PLAIN = {"±": "+/-", "…": "...", "→": "->", "×": "x", "“": '"', "”": '"', "’": "'"}
PLAIN |= (
    dict.fromkeys("╭╮╰╯┏┓┗┛┡┩└┘┌┐┬┴┼", "+") | dict.fromkeys("│┃", "|") | dict.fromkeys("─━–—", "-")
)


def guarded(run: Callable[[], int], code_of: Callable[[Exception], int] = lambda error: 2) -> int:
    """Return the exit code of `run`, its errors said in a line each: 130 and 75 for what was
    stopped.

    code_of: exit code for an error of files, values and packages; others are raised.
    """
    try:
        return run()
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; make room, and the same command goes on from here" if full else ""
        print(f"error: {_clipped(in_flags(str(err)))}{hint}", file=sys.stderr)
        return code_of(err)
    except (ValueError, ModuleNotFoundError) as err:
        print(f"error: {_clipped(in_flags(str(err)))}", file=sys.stderr)
        return code_of(err)
    except hosts.Stopped as err:
        print(f"{err}\nthe same command goes on from here", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return hosts.EXIT_INTERRUPTED


def _clipped(text: str) -> str:
    """Shorten a message to a readable length."""
    if len(text) <= MOST:
        return text
    return (text[:MOST].rpartition("\n")[0] or text[:MOST]) + "\n..."


def leave(code: int) -> None:
    """End the program with an exit code.

    After Ctrl-C without the interpreter's own end: a compiler or a writer of checkpoints may still
    be at work in another thread, and would be torn down under it.
    """
    if code == hosts.EXIT_INTERRUPTED:
        end(code)
    sys.exit(code)


def end(code: int) -> None:
    """End the process at once, with what it has printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def speak_plainly() -> None:
    """Let no sign that the terminal does not know end the program: it is written in signs that
    every one knows.
    """
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(
            stream, "reconfigure", None
        )  # what stands in for a terminal in tests has none
        if reconfigure is not None and stream.errors != "plain":
            reconfigure(errors="plain")


def _plain(err: UnicodeError) -> tuple[str, int]:
    if not isinstance(err, UnicodeEncodeError):
        raise err
    signs = err.object[err.start : err.end]
    return "".join(
        PLAIN.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in signs
    ), err.end
