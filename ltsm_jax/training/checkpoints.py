"""A run on disk: what it was asked to do, what it measured, and where it can go on after being killed at any moment.

    config.json                what decides the result; a rerun must ask for the same
    metrics.jsonl              a line per step and per epoch; no clock in it, so two runs can be compared byte by byte
    timing.jsonl               launches, seconds, throughput
    checkpoints/step_00000054/ state/ (arrays and their digests, see `ltsm_jax.storage`) and position.json

A checkpoint appears under its name whole or not at all. It is written by a thread of its own from a copy in host
memory: on the CPU backend an array handed to a donating step would change under the writer's hands.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltsm_jax import storage, trees

CONFIG, METRICS, TIMING, CHECKPOINTS = "config.json", "metrics.jsonl", "timing.jsonl", "checkpoints"
STATE, POSITION = "state", "position.json"
KEEP = 2


class WriteError(OSError):
    """The run folder could not be written (disk full, no permission); what was there before is untouched."""


class RunFolder:
    """One run's folder, open for one process.

    Args:
      folder: made when missing.
      config: JSON-able facts that decide the result.
    Raises: ValueError listing every field in which `config` differs from that of the run already in the folder, or
      when another process has the folder open; WriteError.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]):
        self.folder = Path(folder).absolute()
        self.steps_folder = self.folder / CHECKPOINTS
        self.writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: concurrent.futures.Future | None = None
        self.metrics_hash = hashlib.sha256()
        with contextlib.ExitStack() as files, self._writing():
            self.steps_folder.mkdir(parents=True, exist_ok=True)
            self._lock(files.enter_context(open(self.folder / ".lock", "w")))
            self._settle_config(json.loads(json.dumps(config)))
            for scrap in self.steps_folder.glob(".*"):  # what a killed process was writing or deleting
                shutil.rmtree(scrap, ignore_errors=True)
            self.metrics = files.enter_context(open(self.folder / METRICS, "ab"))
            self.timing = files.enter_context(open(self.folder / TIMING, "a"))
            self.files = files.pop_all()  # open as long as the run, unless something above failed

    def _lock(self, file) -> None:
        try:
            import fcntl  # POSIX only; elsewhere nothing guards against two runs in one folder
        except ImportError:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {self.folder}; wait for it or choose another folder"
            ) from None

    def _settle_config(self, config: dict) -> None:
        path = self.folder / CONFIG
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(config, indent=2) + "\n")
            os.replace(temporary, path)
            return
        try:
            old = _flat(json.loads(path.read_text()))
        except (ValueError, AttributeError) as err:
            raise storage.DamagedError(f"{path} cannot be read ({err}); restore it or choose another folder") from None
        new = _flat(config)
        differing = [
            f"  {k}: {old.get(k, 'absent')} in the folder, {new.get(k, 'absent')} asked for"
            for k in sorted(old.keys() | new.keys())
            if old.get(k, "absent") != new.get(k, "absent")
        ]
        if differing:
            raise ValueError(
                f"{self.folder} holds a run with another configuration; choose another folder or delete this one:\n"
                + "\n".join(differing)
            )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(p.name.removeprefix("step_")) for p in self.steps_folder.glob("step_*"))

    def restore(self, like: trees.Tree) -> tuple[trees.Tree, dict[str, Any]] | None:
        """State and position of the newest checkpoint, or None when there is none; metrics.jsonl is cut back to it.

        Args: like: a tree of the same structure, shapes and dtypes as the saved state; its shardings, where it has any,
          are those of the result, whatever they were when it was saved.
        Raises: storage.DamagedError naming the checkpoint, what is wrong with it and what to do.
        """
        steps = self.steps()
        if not steps:
            self._cut_metrics(0)
            return None
        path = self.path(steps[-1])
        flat_like = trees.flatten(like)
        shapes = {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
            for p, x in flat_like.items()
        }
        try:
            position = storage.read_record(path / POSITION)
            if position["step"] != steps[-1]:
                raise storage.DamagedError(f"it is of step {position['step']}: the folder was renamed")
            tree = storage.load_tree(path / STATE, trees.unflatten(shapes))
        except (ValueError, FileNotFoundError) as err:
            back = f"to go on from {self.path(steps[-2]).name}" if len(steps) > 1 else "to start the run again"
            raise storage.DamagedError(f"checkpoint {path} is damaged; delete that folder {back}: {err}") from err
        flat = trees.flatten(tree)
        self._cut_metrics(position["metrics_bytes"], position["metrics_sha256"])
        return jax.tree.unflatten(jax.tree.structure(like), [flat[p] for p in flat_like]), position

    def save(self, tree: trees.Tree, position: Mapping[str, Any]) -> None:
        """Start writing a checkpoint of `tree` at `position["step"]`; returns when the copy to host memory is made.

        Waits for the checkpoint before, if that is still being written.
        Raises: WriteError of the checkpoint before.
        """
        self.wait()
        with self._writing():
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
        size = self.metrics.tell()
        position = dict(position) | {"metrics_bytes": size, "metrics_sha256": self.metrics_hash.hexdigest()}
        host = trees.unflatten({p: np.array(x) for p, x in trees.flatten(tree).items()})
        self.pending = self.writer.submit(self._write, host, position)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self.pending is not None and not self.pending.done()

    def wait(self) -> None:
        """Return when nothing is being written. Raises: WriteError when that failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _write(self, host: trees.Tree, position: dict[str, Any]) -> None:
        path = self.path(position["step"])
        try:
            with storage.atomic_folder(path, overwrite=True) as temporary:
                storage.save_tree(temporary / STATE, host)
                storage.write_record(temporary / POSITION, position)
        except Exception as err:  # tensorstore reports a full disk as a ValueError
            raise WriteError(
                f"could not write checkpoint {path}: {str(err).strip()[:500]}\n"
                f"Whole before it: {', '.join(self.path(s).name for s in self.steps()) or 'none'}. Make room or allow "
                "writing there, then give the same command again to go on."
            ) from err
        for step in self.steps()[: -1 if position["finished"] else -KEEP]:
            old = self.path(step)
            doomed = old.with_name(f".{old.name}.old")
            os.rename(old, doomed)  # a half-deleted checkpoint must not look like a damaged one
            shutil.rmtree(doomed, ignore_errors=True)

    def record(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to metrics.jsonl: values that another run of the same configuration would write as well."""
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.metrics_hash.update(text)
        with self._writing():
            self.metrics.write(text)
            self.metrics.flush()

    def clock(self, **facts: Any) -> None:
        """Add a line to timing.jsonl."""
        with self._writing():
            self.timing.write(json.dumps({"time": round(time.time(), 3), **facts}) + "\n")
            self.timing.flush()

    def close(self) -> None:
        """Wait for the last checkpoint and let go of the folder. Raises: WriteError when that checkpoint failed."""
        try:
            self.wait()
        finally:
            self.writer.shutdown()
            with contextlib.suppress(OSError):  # a full disk has been reported by the write itself
                self.files.close()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.steps_folder / f"step_{step:08d}"

    def _cut_metrics(self, size: int, sha256: str | None = None) -> None:
        path = self.folder / METRICS
        kept = path.read_bytes()[:size]
        self.metrics_hash = hashlib.sha256(kept)
        if sha256 is not None and self.metrics_hash.hexdigest() != sha256:
            raise storage.DamagedError(
                f"{path} is damaged: its first {size} bytes are not those written before the newest checkpoint; "
                "restore it, or delete the run's folder to start again"
            )
        os.truncate(path, size)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as err:
            raise WriteError(
                f"cannot write to {self.folder}: {err}. Make room or allow writing there, then give the same command "
                "again to go on."
            ) from err


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for k, v in config.items():
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}": v}
    return flat
