"""Python programs started without their imports.

The suite starts some two hundred programs, to kill, stop or restart them, and importing takes most
of the life of many. Here one process imports what they need, once for each process of the suite,
and every program is a fork of it: a process of its own, with its own environment, files, signals
and exit, in which JAX has no backend yet. What must hold of the import itself (that it works, what
it costs) is tested with a new interpreter.

    process = forked.start(["-m", "experiments.sff", "--help"], env=os.environ)
    out, err = process.communicate()

As a program it is that process: it listens at the Unix socket of its one argument.
"""

import atexit
import contextlib
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# One thread before the fork: a lock that another holds would stay held in the child. (The allocator
# of pyarrow starts one, which it ends and starts again around a fork.)
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
PRELOADED = ("experiments.prune_then_finetune", "experiments.sff")
_SERVER: list = []  # of this process: the socket's path, and the settings of JAX behind it


class Process:
    """A program that was started: the part of `subprocess.Popen` that the tests use."""

    def __init__(self, connection: socket.socket, pid: int, pipes: tuple[int, int]):
        self.connection, self.pid, self.returncode = connection, pid, None
        self.stdout, self.stderr = pipes

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self.connection.recv(64))
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end: what it wrote to stdout and stderr."""
        deadline = None if timeout is None else time.monotonic() + timeout
        texts: dict[int, list[bytes]] = {self.stdout: [], self.stderr: []}
        still_open = [pipe for pipe in texts if pipe >= 0]
        while still_open:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = select.select(still_open, [], [], left)[0]
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            for pipe in ready:
                data = os.read(pipe, 1 << 16)
                texts[pipe].append(data)
                if not data:
                    still_open.remove(pipe)
                    os.close(pipe)
        out, err = (
            b"".join(texts[pipe]).decode(errors="replace") for pipe in (self.stdout, self.stderr)
        )
        self.stdout = self.stderr = -1
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        return out, err


def start(words, env, cwd=ROOT, limit: int | None = None) -> Process:
    """Start `python words...`; limit: bytes of the largest file that it may write.

    env: its environment. JAX has read its own variables at its import, so that those named JAX_...
    must be as they were then; XLA_FLAGS are read when the program begins to compute.
    """
    path = _server(env)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    asked = {
        "words": [str(word) for word in words],
        "env": dict(env),
        "cwd": str(cwd),
        "limit": limit,
    }
    data = json.dumps(asked).encode()
    socket.send_fds(connection, [len(data).to_bytes(8, "big")], [out_end, err_end])
    connection.sendall(data)
    os.close(out_end)
    os.close(err_end)
    return Process(connection, int.from_bytes(_exactly(connection, 8), "big"), (out, err))


def _jax_settings(env) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("JAX_")}


def _server(env) -> str:
    """The socket of the process that forks, which is started at the first call."""
    settings = _jax_settings(dict(env) | ENVIRONMENT)
    if not _SERVER:
        folder = tempfile.mkdtemp(prefix="ltsm-forks-")
        path = f"{folder}/socket"
        listening = subprocess.Popen(
            [sys.executable, __file__, path], env=dict(env) | ENVIRONMENT, stdout=subprocess.PIPE
        )
        assert listening.stdout is not None
        if listening.stdout.readline() != b"ready\n":
            raise ConnectionError("the process that forks did not start: its stderr says why")

        def end():
            listening.kill()
            listening.wait()
            shutil.rmtree(folder, ignore_errors=True)

        atexit.register(end)
        _SERVER[:] = [path, settings]
    if settings != _SERVER[1]:
        raise ValueError(f"JAX was imported with {_SERVER[1]}, asked for {settings}")
    return _SERVER[0]


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError("the process that forks has ended")
        data += more
    return data


# --------------------------------------------------------------------------------------------------
# The process that forks


def serve(path: str) -> list[str]:
    """Fork for every connection, for ever; in a child that is to be a program: its words."""
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["ltsm_jax.storage"]._orbax()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    parent = os.getppid()
    while True:
        if not select.select([listener], [], [], 5.0)[0]:
            if os.getppid() != parent:
                os._exit(0)  # the suite was killed
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _wait_or_become(connection)
        connection.close()


def _wait_or_become(connection: socket.socket) -> list[str]:
    """Fork once more: the child is the program, the parent tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 8, 2)
    asked = json.loads(_exactly(connection, int.from_bytes(size, "big")))
    pid = os.fork()
    if pid:
        for file in (*files, 0, 1, 2):
            os.close(file)
        with contextlib.suppress(OSError):
            connection.sendall(pid.to_bytes(8, "big"))
            connection.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    connection.close()
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, number)
        os.close(file)
    # Those of the process before knew other files: a pipe cannot be sought in.
    sys.stdin = sys.__stdin__ = open(0)  # noqa: SIM115, as long as the process
    sys.stdout = sys.__stdout__ = open(1, "w")  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    if asked["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], asked["limit"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return asked["words"]


def become(words: list[str]) -> None:
    """Run `python words...` in this process."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # else runpy warns
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    become(serve(sys.argv[1]))
