"""One tree on disk: Orbax files beside a table of digests, written whole or not at all, read back only if undamaged.

Orbax restores a flipped byte or another dtype without a word. Digests of the files refuse damage before Orbax sees it
(whose own errors for cut files are long and noisy); digests of the arrays vouch for what Orbax gives back.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from ltsm_jax import trees

ARRAYS, DIGESTS = "arrays", "digests.json"


def cache_folder(kind: str) -> Path:
    """Where files of a kind ("data", "models") are kept: `$LTSM_CACHE`/kind, else ~/.cache/ltsm_jax/kind."""
    return Path(os.environ.get("LTSM_CACHE") or Path.home() / ".cache" / "ltsm_jax") / kind


class DamagedError(ValueError):
    """A stored tree is cut, altered or not one of ours; the message names the folder and what is wrong with it."""


def digests(tree: trees.Tree) -> dict[str, dict[str, Any]]:
    """`{path: {"shape", "dtype", "sha256"}}` of every leaf; the sha256 is of the C-ordered little-endian bytes."""

    def entry(leaf):
        array = np.ascontiguousarray(leaf)
        return {
            "shape": list(np.shape(leaf)),
            "dtype": array.dtype.name,
            "sha256": hashlib.sha256(
                array.view(np.uint8).data if array.size and array.ndim else array.tobytes()
            ).hexdigest(),
        }

    return {path: entry(leaf) for path, leaf in trees.flatten(tree).items()}


def verify(tree: trees.Tree, expected: Mapping[str, Mapping[str, Any]], where: str | Path) -> None:
    """Compare a tree with the digests stored beside it.

    Raises: DamagedError that lists every path that is missing, surplus or altered.
    """
    found = digests(tree)
    problems = [f"  {path}: missing" for path in expected.keys() - found.keys()]
    problems += [f"  {path}: not in {DIGESTS}" for path in found.keys() - expected.keys()]
    for path in expected.keys() & found.keys():
        want, got = expected[path], found[path]
        for what in ("shape", "dtype", "sha256"):
            if want[what] != got[what]:
                reason = (
                    "the values differ from those that were saved"
                    if what == "sha256"
                    else f"{want[what]} was saved, {got[what]} is there"
                )
                problems.append(f"  {path}: {reason}")
                break
    if problems:
        raise DamagedError(f"{where} is damaged; restore it from a copy:\n" + "\n".join(sorted(problems)))


def file_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes", "sha256"}}` of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _file_digest(p) for p in files}


def _file_digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def verify_files(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: DamagedError that lists every file that is missing, cut or altered."""
    problems = []
    for name, want in expected.items():
        file = folder / name
        got = _file_digest(file) if file.is_file() else None
        if got is None:
            problems.append(f"  {name}: missing")
        elif got["bytes"] != want["bytes"]:
            problems.append(f"  {name}: {got['bytes']} bytes, {want['bytes']} were saved")
        elif got["sha256"] != want["sha256"]:
            problems.append(f"  {name}: the bytes differ from those that were saved")
    if problems:
        raise DamagedError(f"{folder} is damaged; restore it from a copy:\n" + "\n".join(problems))


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with a digest of itself."""
    file.write_text(json.dumps({"digest": _text_digest(record), **record}, indent=1) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises: DamagedError when it is missing, cut or altered.
    """
    try:
        record = json.loads(file.read_text())
        digest = record.pop("digest")
    except FileNotFoundError:
        raise DamagedError(f"{file.parent} has no {file.name}: it was not written by ltsm_jax, or is cut") from None
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise DamagedError(f"{file} is cut or altered: {type(err).__name__} {err}") from None
    if digest != _text_digest(record):
        raise DamagedError(f"{file} is altered: its contents do not have the digest it states")
    return record


def _text_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    Raises: FileExistsError when `folder` exists and `overwrite` is False: before anything is written, or at the end if
      another process has made it meanwhile.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder or ask to overwrite it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{end}") for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if overwrite and folder.exists():
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            try:
                os.rename(temporary, folder)
            except OSError as err:
                if not folder.exists():
                    raise
                raise FileExistsError(f"{folder} was made by another process meanwhile") from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tree(folder: str | Path, tree: trees.Tree, *, overwrite: bool = False) -> None:
    """Write a nested dict of arrays to `folder`, whole or not at all.

    Raises: FileExistsError when the folder exists and `overwrite` is False; ValueError for an empty tree.
    """
    host = jax.tree.map(np.asarray, tree)
    empty = [path for path, leaf in trees.flatten(host).items() if leaf.size == 0]
    if empty or not jax.tree.leaves(host):
        raise ValueError(f"cannot save {folder}: " + (f"arrays without values: {empty}" if empty else "no arrays"))
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        ocp.save(str(temporary / ARRAYS), host)
        # names the absolute path it was written to, and nothing reads it: the rename is what commits
        (temporary / ARRAYS / "commit_success.txt").unlink(missing_ok=True)
        write_record(temporary / DIGESTS, {"arrays": digests(host), "files": file_digests(temporary / ARRAYS)})


def load_tree(folder: str | Path, like: trees.Tree | None = None) -> trees.Tree:
    """Read back what `save_tree` wrote, as jax arrays.

    Args:
      folder: the folder.
      like: a tree of `jax.ShapeDtypeStruct` with shardings, to restore straight into shards; None: default device.
    Raises: FileNotFoundError; DamagedError for files that are cut, altered, or of another kind; ValueError listing
      every difference in path, shape or dtype between the folder and `like`.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    record = read_record(folder / DIGESTS)
    expected = record["arrays"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = trees.unflatten(
        {p: jax.ShapeDtypeStruct(tuple(e["shape"]), _dtype(e["dtype"]), sharding=here) for p, e in expected.items()}
    )
    if like is not None:
        trees.require_same(like, stored, ("the model", str(folder)), dtypes=True)
        stored = jax.tree.map(lambda want, plain: want if want.sharding is not None else plain, like, stored)
    verify_files(folder / ARRAYS, record["files"])
    try:
        tree = ocp.load(str(folder / ARRAYS), stored)
    except Exception as err:  # Orbax raises a bare Exception, JSONDecodeError, OSError and others for damaged files
        first = str(err).strip().split("\n")[0][:300]
        raise DamagedError(
            f"{folder / ARRAYS} is damaged ({type(err).__name__}: {first}); restore it from a copy"
        ) from err
    verify(tree, expected, folder)
    return tree


def _dtype(name: str) -> np.dtype:
    return np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(name)
