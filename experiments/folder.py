"""The folder of a comparison: its settings, its results, and what made them.

    run.json                  what decides every number; a command that asks for another is refused
    baselines.json            scores of the naive forecasts
    results.csv               a row per finished cell, made from their result.json
    cells/<name>/result.json  what a cell left; written last: a cell that has one is finished

Every JSON file carries a digest of itself. A result that was cut or edited is not believed: it is
named, and its cell is run again. One process at a time works in a folder.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from experiments import grid
from experiments.flags import UsageError
from ltsm_jax import hosts, storage
from ltsm_jax.storage import DamagedError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

RESULT = "result.json"
RUN = "run.json"
CSV = "results.csv"
LOCK = ".lock"
WHAT = {  # settings whose names say too little
    "data_sha256": "data (values, stamps and columns)",
    "model_sha256": "weights of the model",
}

# --------------------------------------------------------------------------------------------------
# files


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with a digest of itself, whole or not at all; for the first host
    (`hosts.on_first`).
    """
    with replacing(file) as temporary:
        storage.write_record(temporary, record)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a file to write that takes the place of `file` when the block ends well, and vanishes
    when it does not.
    """
    temporary = file.with_name(f".{file.name}")
    try:
        with naming(file):
            yield temporary
            os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say in an error of the file system where it was, as a write that fails does not."""
    try:
        yield
    except OSError as err:
        if err.filename is not None:
            raise
        raise OSError(err.errno, err.strerror, str(path)) from err


def read_result(folder: Path, cell: str) -> dict[str, Any] | None:
    """Read what a cell left; None where it is not finished.

    Raises: DamagedError where result.json, or a file that it vouches for, is cut or altered.
    """
    file = folder / "cells" / cell / RESULT
    if not file.is_file():
        return None
    record = storage.read_record(file)
    for name, digest in record.get("files", {}).items():
        path = file.with_name(name)
        if not path.is_file() or file_digest(path) != digest:
            raise DamagedError(f"{path} is cut or altered: it is not what {RESULT} says")
    return record


def finished(folder: Path, cell: str) -> bool:
    """Say whether a cell has a result that can be believed."""
    try:
        return read_result(folder, cell) is not None
    except DamagedError:
        return False


def results(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read what every finished cell left, by its name, and say what is damaged."""
    found, damaged = {}, []
    for file in sorted((folder / "cells").glob(f"*/{RESULT}")):
        name = file.parent.name
        try:
            record = read_result(folder, name)
        except DamagedError as err:
            damaged.append(str(err))
            continue
        if record is not None:
            found[name] = record
    return found, damaged


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_csv(folder: Path, rank: Callable[[dict[str, Any]], Any]) -> None:
    """Make results.csv from every finished cell in the folder, those of earlier
    commands included.
    """
    rows = [record["row"] for record in results(folder)[0].values()]
    if (folder / RUN).is_file():
        rows = grid.mark(rows, storage.read_record(folder / RUN)["settings"])
    with replacing(folder / CSV) as temporary:
        pd.DataFrame(sorted(rows, key=rank)).to_csv(temporary, index=False)


def table_of(rows: Sequence[dict[str, Any]], rank: Callable[[dict[str, Any]], Any]) -> pd.DataFrame:
    """Give the rows of finished cells, marked by `grid.mark`, as results.csv has them."""
    rows = sorted(rows, key=rank)
    return pd.read_csv(io.StringIO(pd.DataFrame(rows).to_csv(index=False)))


# --------------------------------------------------------------------------------------------------
# whose folder it is


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and lock it against other processes while the block runs; on several hosts
    all call.

    The lock ends with the process, however that ends. On a file system without locks there is none.
    Raises: UsageError where another process works in the folder.
    """
    with contextlib.ExitStack() as stack:
        hosts.on_first(_hold, folder, stack)
        yield


def _hold(folder: Path, stack: contextlib.ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((folder / LOCK).open("a+", encoding="utf-8"))
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "another process"
        raise UsageError(
            f"{folder} is in use by {who}; wait for it to end, or take another --out"
        ) from None
    except OSError:
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def check(folder: Path, record: Mapping[str, Any], optional: Sequence[str] = ()) -> None:
    """Check that what a folder holds, if anything, was asked for by the same settings; nothing is
    written.

    record: what run.json shall hold. optional: settings that may be None on one of the two sides,
    where no cell needs them; they are filled in `record` from the folder.
    Raises: UsageError when the folder holds a comparison with other settings, or is damaged.
    """
    file = folder / RUN
    if file.is_file():
        try:
            old = storage.read_record(file)
        except DamagedError as err:
            raise UsageError(
                f"{file} is damaged ({err}); delete the folder or take another --out"
            ) from None
        _compare(folder, old, json.loads(json.dumps(record)), optional=optional)
        for name in optional:
            if record["settings"][name] is None:
                record["settings"][name] = old["settings"].get(name)
    wanted = identity(record, optional)
    for name, found in results(folder)[0].items():
        if found.get("of") != wanted:
            raise UsageError(
                f"{folder} has a result of another comparison, cells/{name}; take another --out"
            )


def identity(record: Mapping[str, Any], optional: Sequence[str] = ()) -> str:
    """Digest of what decides every number of a comparison; it stands in each of its results."""
    settings = {name: value for name, value in record["settings"].items() if name not in optional}
    facts = [record["experiment"], settings, record["model"]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _compare(
    folder: Path, old: dict[str, Any], new: dict[str, Any], optional: Sequence[str]
) -> None:
    if "experiment" not in old or "model" not in old:
        raise UsageError(
            f"{folder} was made by an earlier version, which did not record the model; take "
            "another --out"
        )
    if old["experiment"] != new["experiment"]:
        raise UsageError(f"{folder} holds a comparison of {old['experiment']}; take another --out")
    before, now = ({**r["settings"], **_flat(r["model"], "model ")} for r in (old, new))
    lines = []
    for name in dict.fromkeys([*now, *before]):
        there, here = before.get(name), now.get(name)
        if name in optional and (there is None or here is None):
            continue
        if there != here:
            lines.append(f"  {WHAT.get(name, name)}: {there} there, {here} now")
    if lines:
        raise UsageError(
            f"{folder} holds a comparison with other settings; take another --out:\n"
            + "\n".join(lines)
        )


def _flat(record: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {}
    for name, value in record.items():
        found |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return found


def tidy(folder: Path) -> list[str]:
    """Remove what a kill left behind; a damaged result goes with its cell, which is run again when
    it is asked for.

    Returns: what was damaged, in words.
    """
    for pattern in (".*.json", ".*.csv", ".*.md", "cells/*/.*.json", "cells/*/.*.npz"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
    for pattern in ("cells/*/.model.*.tmp", "cells/*/.model.*.old"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    found, damaged = results(folder)
    for name in found:
        drop_checkpoints(folder / "cells" / name)
    for file in (folder / "cells").glob(f"*/{RESULT}"):
        if file.parent.name not in found:
            shutil.rmtree(file.parent)
    return damaged


def drop_checkpoints(cell: Path) -> None:
    """Remove the checkpoints of a finished cell: model/ has the weights; metrics.jsonl stays."""
    for checkpoints in cell.glob("training/phase-*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# what made it


@functools.cache
def git_commit() -> str:
    """Commit of this code, "-dirty" with changes on top; "release" where it does not lie in its own
    repository.
    """
    here = Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=20
        )

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return "release"
        dirty = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
        return git("rev-parse", "--short=12", "HEAD").stdout.strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def versions() -> str:
    """Versions that numbers depend on."""
    try:
        own = version("ltsm-jax")
    except PackageNotFoundError:
        own = "source"
    return f"ltsm-jax {own} jax {jax.__version__} python {platform.python_version()}"


def device() -> str:
    """Name the devices of this run: "cpu, 2 cores", "4 x NVIDIA H200"."""
    if jax.default_backend() == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
