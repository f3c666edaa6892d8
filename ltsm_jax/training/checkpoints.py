"""A run on disk: what it was asked to do, what it measured, and where it can go on after being
killed at any moment.

    config.json                what decides the result; a rerun must ask for the same
    metrics.jsonl              a line per step and per epoch, without a clock: two runs can be
                               compared byte by byte
    timing.jsonl               launches, seconds, throughput
    checkpoints/step_00000054/ position.json and state/, arrays and their digests (see
                               `ltsm_jax.storage`)

A checkpoint appears under its name whole or not at all. It is written by a thread of its own from a
copy, while training goes on. It holds the weights of the best epoch, too, so that keeping the
newest few keeps the best.

On several hosts, which must see the same folder, each writes the parts of the arrays that lie on
its devices; the first writes everything else, and moves the checkpoint to its name when all have
told that theirs is written (`poll`, `wait`).
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltsm_jax import hosts, storage, trees

CONFIG, METRICS, TIMING, CHECKPOINTS = "config.json", "metrics.jsonl", "timing.jsonl", "checkpoints"
STATE, POSITION = "state", "position.json"
LOCK = ".lock"
KEEP = 2
SEE_SECONDS = 30.0
WAIT_SECONDS = 0.05
MOST_NAMED, LONGEST = 10, 70  # differences that a message names, and characters of a value

_gave_up = False


class WriteError(OSError):
    """The run folder could not be written (disk full, no permission); what was there before is
    untouched.
    """


class RunFolder:
    """One run's folder, open for one process, or for all hosts of one job. On several hosts, all
    call every method.

    Args:
      folder: made when missing.
      config: JSON-able facts that decide the result.
      keep: how many checkpoints stay, the newest ones; a finished run keeps its last.
    Raises: ValueError listing every field in which `config` differs from that of the run already in
      the folder, or when another process has the folder open, or a host does not see it;
      WriteError.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], keep: int = KEEP):
        self.folder, self.keep = Path(folder).expanduser().absolute(), keep
        self.config_sha256 = _sha256_of(config)
        self.steps_folder = self.folder / CHECKPOINTS
        self.writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: concurrent.futures.Future | None = None
        self.unsealed: tuple[Path, dict[str, Any]] | None = (
            None  # being written by all hosts, not yet moved
        )
        self.metrics_hash = hashlib.sha256()
        self.metrics = self.timing = self.files = None  # open on the first host
        self.broken: WriteError | None = None
        token = hosts.on_first(self._open, config)
        hosts.on_every_host(self._see, token)

    def _open(self, config: Mapping[str, Any]) -> str:
        token = (
            uuid.uuid4().hex if hosts.process_count() > 1 else ""
        )  # by which the others see that it is the same folder
        with contextlib.ExitStack() as files, self._writing():
            asked = json.loads(json.dumps(config))
            self._compare(asked)  # a folder that is refused is left as it is
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = files.enter_context(open(self.folder / LOCK, "a+"))
            self._lock(lock)
            lock.truncate(0)
            lock.write(token)
            lock.flush()
            if not self._compare(asked):  # again: another process may have been faster
                temporary = (self.folder / CONFIG).with_suffix(".tmp")
                temporary.write_text(json.dumps(asked, indent=2) + "\n")
                os.replace(temporary, self.folder / CONFIG)
            self.steps_folder.mkdir(exist_ok=True)
            # what a killed process was writing or deleting
            for scrap in self.steps_folder.glob(".*"):
                shutil.rmtree(scrap, ignore_errors=True)
            for scrap in self.folder.glob("*.tmp"):
                scrap.unlink(missing_ok=True)
            self.metrics = files.enter_context(open(self.folder / METRICS, "ab"))
            self.timing = files.enter_context(open(self.folder / TIMING, "a"))
            self.files = files.pop_all()  # open as long as the run, unless something above failed
        return token

    def _see(self, token: str) -> None:
        deadline = time.monotonic() + SEE_SECONDS  # a network file system may be behind
        while not hosts.first():
            with contextlib.suppress(OSError):
                if (self.folder / LOCK).read_text() == token:
                    return
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.folder} is not the folder that the first host has: several need a "
                    "shared one"
                )
            time.sleep(0.1)

    def _lock(self, file) -> None:
        try:
            import fcntl  # POSIX only; elsewhere nothing guards against two runs in one folder
        except ImportError:
            return
        try:
            fcntl.flock(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # gone with the process, however it ends
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {self.folder}; wait for it or choose another folder"
            ) from None

    def _compare(self, config: dict) -> bool:
        """Tell whether the folder holds a run, which must then be one of this configuration."""
        path = self.folder / CONFIG
        if not path.exists():
            if steps(self.folder):
                raise storage.DamagedError(
                    f"{path} is missing, although {self.folder} has checkpoints of a run; restore "
                    "it, or choose another folder"
                )
            return False
        try:
            old = _flat(json.loads(path.read_text()))
        except (ValueError, AttributeError) as err:
            raise storage.DamagedError(
                f"{path} cannot be read ({err}); restore it or choose another folder"
            ) from None
        new = _flat(config)
        differing = []
        for name in sorted(old.keys() | new.keys()):
            there, wanted = old.get(name, "absent"), new.get(name, "absent")
            if there != wanted:
                differing.append(
                    f"  {name}: {_short(there)} in the folder, {_short(wanted)} asked for"
                )
        if len(differing) > MOST_NAMED:
            differing[MOST_NAMED:] = [f"  and {len(differing) - MOST_NAMED} more"]
        if differing:
            raise ValueError(
                f"{self.folder} holds a run with another configuration; choose another folder or "
                "delete this one:\n" + "\n".join(differing)
            )
        return True

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return hosts.on_first(steps, self.folder)

    def restore(self, like: trees.Tree) -> tuple[trees.Tree, dict[str, Any]] | None:
        """State and position of the newest checkpoint, or None when there is none; metrics.jsonl is
        cut back to it.

        Args: like: a tree of the same structure, shapes and dtypes as the saved state; its
          shardings, where it has any, are those of the result, whatever they were when it was
          saved.
        Raises: storage.DamagedError naming the checkpoint, what is wrong with it and what to do.
        """
        steps = self.steps()
        if not steps:
            hosts.on_first(self._cut_metrics, 0)
            return None
        flat_like = trees.flatten(like)
        shapes = {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
            for p, x in flat_like.items()
        }
        with _damage(self.folder, steps):
            position = hosts.on_every_host(_position, self.folder, steps[-1])
        if position.get("config_sha256", self.config_sha256) != self.config_sha256:
            raise storage.DamagedError(
                f"{self.folder / CONFIG} was edited: checkpoint {self.path(steps[-1]).name} is of "
                "a run with another configuration; restore it, or choose another folder"
            )
        with _damage(self.folder, steps):
            tree = storage.load_tree(
                checkpoint_path(self.folder, steps[-1]) / STATE, trees.unflatten(shapes)
            )
        flat = trees.flatten(tree)
        hosts.on_first(self._cut_metrics, position["metrics_bytes"], position["metrics_sha256"])
        return jax.tree.unflatten(jax.tree.structure(like), [flat[p] for p in flat_like]), position

    def save(self, tree: trees.Tree, position: Mapping[str, Any]) -> None:
        """Start writing a checkpoint of `tree` at `position["step"]`; returns when it is copied.

        Waits for the checkpoint before, if that is still being written.
        Raises: WriteError of the checkpoint before.
        """
        self.wait()
        path = self.path(position["step"])
        temporary = path.with_name(f".{path.name}.tmp")

        def begin() -> dict[str, Any]:
            assert self.metrics is not None
            with self._writing():
                self.metrics.flush()
                os.fsync(self.metrics.fileno())
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / STATE).mkdir(parents=True)
            return {
                # Not tell(): of a file that was cut behind its back that still counts what was cut
                # off.
                "metrics_bytes": os.fstat(self.metrics.fileno()).st_size,
                "metrics_sha256": self.metrics_hash.hexdigest(),
                "config_sha256": self.config_sha256,
            }

        facts: dict[str, Any] = dict(position) | hosts.on_first(begin)
        write = storage.begin_save(temporary / STATE, trees.unflatten(trees.flatten(tree)))
        if hosts.process_count() > 1:
            self.pending, self.unsealed = (
                self.writer.submit(self._reported, path, write),
                (temporary, facts),
            )
        else:
            self.pending = self.writer.submit(
                self._reported, path, lambda: (write(), self._seal(temporary, facts))
            )

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written now, as far as this host knows."""
        return self.pending is not None and not self.pending.done()

    @property
    def failed(self) -> bool:
        """Whether something could not be written on this host; `wait` raises it, on all."""
        done = self.pending is not None and self.pending.done()
        return self.broken is not None or (
            done and self.pending is not None and self.pending.exception() is not None
        )

    def poll(self) -> None:
        """When no host is `saving`: the first may move what all have written to its name, in its
        thread.
        """
        if self.unsealed is not None:
            (temporary, position), self.unsealed = self.unsealed, None
            hosts.on_every_host(self._join)
            if hosts.first():
                self.pending = self.writer.submit(
                    self._reported,
                    self.path(position["step"]),
                    lambda: self._seal(temporary, position),
                )

    def wait(self) -> None:
        """Return when nothing is being written. Raises: WriteError when that failed, on whichever
        host.
        """
        while hosts.process_count() > 1:
            busy, failed = np.any(hosts.agree(self.saving, self.failed), axis=0)
            if failed:
                self._give_up()
            elif busy:
                time.sleep(WAIT_SECONDS)
                continue
            elif self.unsealed is not None:
                self.poll()
                continue
            break
        hosts.on_every_host(self._join)

    def _give_up(self) -> None:
        """A host could not write its part. What the others write waits for it inside Orbax, for
        many minutes.
        """
        global _gave_up
        self.unsealed, _gave_up = None, True
        if self.saving:
            self.pending = None
            self.writer.shutdown(wait=False)

    def _join(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()
        if self.broken is not None:
            raise self.broken

    def _reported(self, path: Path, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as err:  # tensorstore reports a full disk as a ValueError
            # Of several hosts, others may be writing there; the next launch takes it away.
            if hosts.process_count() == 1:
                shutil.rmtree(path.with_name(f".{path.name}.tmp"), ignore_errors=True)
            whole = [checkpoint_path(self.folder, step).name for step in steps(self.folder)]
            raise WriteError(
                f"could not write checkpoint {path}: {_reason(err)}\n"
                f"Whole before it: {', '.join(whole) or 'none'}. "
                "Make room or allow writing there, then give the same command again to go on."
            ) from err

    def _seal(self, temporary: Path, position: dict[str, Any]) -> None:
        path = self.path(position["step"])
        storage.seal(temporary / STATE)
        storage.write_record(temporary / POSITION, position)
        if path.exists():  # of a launch before this one, from the same bits
            _remove(path)
        os.rename(temporary, path)
        for step in steps(self.folder)[: -1 if position["finished"] else -self.keep]:
            _remove(self.path(step))

    def record(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to metrics.jsonl: values that another run of the same configuration would write
        as well.
        """
        if self.metrics is None:
            return
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.metrics_hash.update(text)
        with self._recording():
            self.metrics.write(text)
            self.metrics.flush()

    def clock(self, **facts: Any) -> None:
        """Add a line to timing.jsonl."""
        if self.timing is None:
            return
        with self._recording():
            self.timing.write(json.dumps({"time": round(time.time(), 3), **facts}) + "\n")
            self.timing.flush()

    def close(self) -> None:
        """Let go of the folder. Raises: WriteError when the last checkpoint failed.

        Waits for what this host is writing, and for no other: after an error the hosts may not be
        at the same place.
        """
        try:
            self._join()
        finally:
            self.writer.shutdown(wait=not _gave_up)
            with contextlib.suppress(OSError):  # a full disk has been reported by the write itself
                if self.files is not None:
                    self.files.close()

    def path(self, step: int) -> Path:
        """Path of the checkpoint of a step."""
        return checkpoint_path(self.folder, step)

    def _cut_metrics(self, size: int, sha256: str | None = None) -> None:
        path = self.folder / METRICS
        kept = path.read_bytes()[:size]
        self.metrics_hash = hashlib.sha256(kept)
        if sha256 is not None and self.metrics_hash.hexdigest() != sha256:
            raise storage.DamagedError(
                f"{path} is damaged: its first {size} bytes are not those written before the "
                "newest checkpoint; restore it, or delete the run's folder to start again"
            )
        os.truncate(path, size)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as err:
            raise WriteError(
                f"cannot write to {self.folder}: {err}. Make room or allow writing there, then "
                "give the same command again to go on."
            ) from err

    @contextlib.contextmanager
    def _recording(self):
        """As `_writing`; of several hosts only the first writes, and the others learn of an error
        from `failed`.
        """
        try:
            with self._writing():
                yield
        except WriteError as err:
            if hosts.process_count() == 1:
                raise
            self.broken = err


def gave_up() -> bool:
    """Return whether a write was given up because another host failed: a thread still waits for
    that host, and the end of this process would wait for the thread.
    """
    return _gave_up


def settle(run: RunFolder | None, *told: int) -> tuple[np.ndarray, bool]:
    """Between two pieces of work the hosts agree, and what they are writing moves on.

    Args: told: what rests on a clock of this host.
    Returns: what the first host has told, as clocks differ, and whether SIGTERM has come to one of
    them.
    Raises: WriteError, on all hosts, where one could not write.
    """
    saving, failed = (run.saving, run.failed) if run else (False, False)
    said = hosts.agree(hosts.stopping(), saving, failed, *told)
    stop, busy, broken = np.any(said[:, :3], axis=0)
    if run and broken:
        run.wait()
    elif run and not busy:
        run.poll()
    return said[0, 3:], bool(stop)


def read_checkpoint(
    folder: str | Path,
    only: trees.Patterns = None,
    *,
    step: int | None = None,
    like: trees.Tree | None = None,
) -> tuple[trees.Tree, dict[str, Any]]:
    """Arrays and position of a run's checkpoint, without the run: all of them, or a part.

    Args:
      folder: of the run.
      only: expressions, see `trees.select`: "^params/" (the weights there), "^best/" (those of the
        best epoch), "^optimizer/", or deeper, as "^params/layer_0/". Frozen weights are in no
        checkpoint.
      step: of the checkpoint; None: the newest.
      like: a tree of `jax.ShapeDtypeStruct` with shardings, of the leaves chosen, to restore into;
        None: the default device.
    Raises: FileNotFoundError naming the steps there are; storage.DamagedError; ValueError for
      `only` or `like` that do not fit.
    """
    folder = Path(folder).expanduser().absolute()
    there = steps(folder)
    if not there or (step is not None and step not in there):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise FileNotFoundError(
            f"{folder} has {wanted}; steps there: {', '.join(map(str, there)) or 'none'}"
        )
    there = there[: there.index(there[-1] if step is None else step) + 1]
    with _damage(folder, there):
        position = _position(folder, there[-1])
    tree = storage.load_tree(checkpoint_path(folder, there[-1]) / STATE, like, only=only)
    return tree, position


def recorded(folder: str | Path, name: str) -> Any:
    """Read the field `name` ("train.lr") of the run in the folder; None where there is no run, or
    no such field.
    """
    try:
        found = json.loads((Path(folder).expanduser() / CONFIG).read_text())
        for part in name.split("."):
            found = found[part]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `RunFolder` says what is wrong with it
    return found


def finished(folder: str | Path) -> bool:
    """Tell whether the run in the folder is at its end; False where nothing can be read."""
    folder = Path(folder).expanduser().absolute()
    there = steps(folder)
    try:
        return bool(there) and bool(_position(folder, there[-1])["finished"])
    except (OSError, ValueError, KeyError):
        return False


def begun(folder: str | Path) -> bool:
    """Tell whether a run is in the folder already, and make nothing.

    Raises: WriteError where the folder cannot be made or written.
    """
    folder = Path(folder).expanduser().absolute()
    if (folder / CONFIG).exists():
        return True
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise WriteError(f"cannot write to {folder}: {there} is a file. Choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(
            f"cannot write to {folder}: {there} allows no writing. Allow it, or choose another "
            "folder."
        )
    return False


def _reason(err: Exception) -> str:
    """The message of an error, without tensorstore's long paths where the disk is full."""
    text, full = str(err).strip(), os.strerror(errno.ENOSPC)
    return full if full in text and not isinstance(err, OSError) else text[:500]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _sha256_of(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def steps(folder: Path) -> list[int]:
    """Steps of a run's folder that have a checkpoint, oldest first."""
    return sorted(int(p.name.removeprefix("step_")) for p in (folder / CHECKPOINTS).glob("step_*"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return folder / CHECKPOINTS / f"step_{step:08d}"


def _position(folder: Path, step: int) -> dict[str, Any]:
    position = storage.read_record(checkpoint_path(folder, step) / POSITION)
    if position["step"] != step:
        raise storage.DamagedError(f"it is of step {position['step']}: the folder was renamed")
    return position


@contextlib.contextmanager
def _damage(folder: Path, there: list[int]):
    """Says of an error which checkpoint of `there`, the last, it is about, and what to do."""
    try:
        yield
    except (ValueError, FileNotFoundError) as err:
        path = checkpoint_path(folder, there[-1])
        back = (
            f"to go on from {checkpoint_path(folder, there[-2]).name}"
            if len(there) > 1
            else "to start the run again"
        )
        raise storage.DamagedError(
            f"checkpoint {path} is damaged; delete that folder {back}: {err}"
        ) from err


def _remove(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.old")
    os.rename(path, doomed)  # a half-deleted checkpoint must not look like a damaged one
    shutil.rmtree(doomed, ignore_errors=True)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for k, v in config.items():
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}": v}
    return flat
