"""One tree on disk: Orbax files beside a table of digests, written whole or not at all, read back only if undamaged.

Orbax restores a flipped byte or another dtype without a word. Digests of the files refuse damage before Orbax sees it
(whose own errors for cut files are long and noisy); digests of the arrays vouch for what Orbax gives back.

On several hosts a tree may hold arrays that no host has whole. Each host then writes the parts on its own devices and
their digests, one a part, and so the table stays true for any other mesh: a host checks the parts that it has, or,
where the parts are cut otherwise than they were, the whole array.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from ltsm_jax import hosts, sharding, trees

ARRAYS, DIGESTS = "arrays", "digests.json"
SHARE = "share.{}.json"  # digests by one host, until they are in the table
COMMIT = "commit_success.txt"  # of Orbax: names the absolute path it was written to, and nothing reads it
COMPRESSED = 0.9  # of its bytes an array of floats takes about that on disk
Part = tuple[tuple[int, int], ...]  # [start, stop) of each axis
# Orbax tells the steps of a save apart by a counter of the process: a second save beginning meanwhile waits for signals
# of the first until they time out, and the first writes where nobody has made a folder.
_ONE_SAVE = threading.Lock()


def cache_folder(kind: str) -> Path:
    """Where files of a kind ("data", "models") are kept: `$LTSM_CACHE`/kind, else ~/.cache/ltsm_jax/kind."""
    return Path(os.environ.get("LTSM_CACHE") or Path.home() / ".cache" / "ltsm_jax") / kind


class DamagedError(ValueError):
    """A stored tree is cut, altered or not one of ours; the message names the folder and what is wrong with it."""


def digests(tree: trees.Tree) -> dict[str, dict[str, Any]]:
    """`{path: {"shape", "dtype", "sha256"}}` of every leaf; the sha256 is of the C-ordered little-endian bytes.

    Where parts of an array lie on other hosts, all hosts must call.
    """

    def entry(leaf):
        array = sharding.on_host(leaf)
        return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": _sha256(array)}

    return {path: entry(leaf) for path, leaf in trees.flatten(tree).items()}


def sha256_of(tree: Any) -> str:
    """One digest of the paths, shapes, dtypes and values of a tree, of random keys too. Hosts call as for `digests`."""

    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return hashlib.sha256(json.dumps(digests(jax.tree.map(plain, tree))).encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.sha256(array.view(np.uint8).data if array.size and array.ndim else array.tobytes()).hexdigest()


def _part(index: tuple[slice, ...], shape: tuple[int, ...]) -> Part:
    return tuple(cut.indices(n)[:2] for cut, n in zip(index, shape))


def _global(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def verify(tree: trees.Tree, expected: Mapping[str, Mapping[str, Any]], where: str | Path) -> None:
    """Compare a tree with the digests stored beside it.

    Raises: DamagedError that lists every path that is missing, surplus or altered.
    """
    found = trees.flatten(tree)
    problems = [f"  {path}: missing" for path in expected.keys() - found.keys()]
    problems += [f"  {path}: not in {DIGESTS}" for path in found.keys() - expected.keys()]
    for path in sorted(expected.keys() & found.keys()):  # in the same order on every host: a leaf may be gathered
        want, leaf = expected[path], found[path]
        if list(np.shape(leaf)) != want["shape"]:
            problems.append(f"  {path}: {want['shape']} was saved, {list(np.shape(leaf))} is there")
        elif leaf.dtype.name != want["dtype"]:
            problems.append(f"  {path}: {want['dtype']} was saved, {leaf.dtype.name} is there")
        elif not _same_values(leaf, want):
            problems.append(f"  {path}: the values differ from those that were saved")
    if problems:
        raise DamagedError(f"{where} is damaged; restore it from a copy:\n" + "\n".join(sorted(problems)))


def _same_values(leaf: Any, entry: Mapping[str, Any]) -> bool:
    """Whether every part that this host can look at has the digest it was saved with."""
    whole = {"at": [[0, n] for n in entry["shape"]], "sha256": entry.get("sha256")}
    saved = {tuple(map(tuple, part["at"])): part["sha256"] for part in entry.get("parts", [whole])}
    if _global(leaf):
        cuts = {_part(index, leaf.shape) for index in leaf.sharding.devices_indices_map(leaf.shape).values()}
        if saved.keys() <= cuts:  # cut as it was: each host has some of the parts whole
            here = {_part(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
            return all(_sha256(np.asarray(data)) == saved[part] for part, data in here.items() if part in saved)
    host = sharding.on_host(leaf)
    return all(_sha256(host[tuple(slice(*cut) for cut in part)]) == sha256 for part, sha256 in saved.items())


def file_digests(folder: Path, share: tuple[int, int] = (0, 1)) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes", "sha256"}}` of every file below a folder; share (i, n): of every nth, from the ith."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != COMMIT)
    return {p.relative_to(folder).as_posix(): _file_digest(p) for p in files[share[0] :: share[1]]}


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

    Several hosts enter and leave together; the first makes and moves the folder, which all of them must see.

    Raises: FileExistsError when `folder` exists and `overwrite` is False: before anything is written, or at the end if
      another process has made it meanwhile.
    """
    folder = Path(folder).absolute()

    def prepare() -> list[str]:
        if folder.exists() and not overwrite:
            raise FileExistsError(f"{folder} exists; choose another folder or ask to overwrite it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        names = [str(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{end}")) for end in ("tmp", "old")]
        os.mkdir(names[0])
        return names

    def commit() -> None:
        if overwrite and folder.exists():
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
            return
        try:
            os.rename(temporary, folder)
        except OSError as err:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder} was made by another process meanwhile") from err

    temporary, old = map(Path, hosts.on_first(prepare))
    try:
        yield temporary
        hosts.on_first(commit)
    finally:
        if hosts.first():
            shutil.rmtree(temporary, ignore_errors=True)


def save_tree(folder: str | Path, tree: trees.Tree, *, overwrite: bool = False) -> None:
    """Write a nested dict of arrays to `folder`, whole or not at all. On several hosts, all call.

    Raises: FileExistsError when the folder exists and `overwrite` is False; ValueError for an empty tree.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        hosts.together(begin_save(temporary, tree))
        hosts.on_first(seal, temporary)


def begin_save(folder: Path, tree: trees.Tree) -> Callable[[], None]:
    """Take out of `tree` what this host writes to `folder`; the function returned writes it.

    That function may run in a thread of its own, and the arrays may be donated to the next step meanwhile: it has
    copies. On several hosts all call in the same order, from the thread that uses the devices: Orbax's first half meets
    the other hosts there, its second half only through files and the coordination service. Where all have written, the
    first host calls `seal`.

    Raises: ValueError for an empty tree.
    """
    flat = trees.flatten(tree)
    empty = [path for path, leaf in flat.items() if leaf.size == 0]
    if empty or not flat:
        raise ValueError(f"cannot save {folder}: " + (f"arrays without values: {empty}" if empty else "no arrays"))
    # Not ocp.save_async alone: digests come from the same copy as the bytes, and are written, with those of the files,
    # after Orbax has finished; a thread must do all of that anyway. (On the CPU backend Orbax reads the arrays where
    # they lie, so that a donating step would change them under its hands.)
    if jax.default_backend() == "cpu" and any(map(_global, flat.values())):
        flat = {path: jnp.copy(leaf) if _global(leaf) else leaf for path, leaf in flat.items()}
    kept = {path: leaf if _global(leaf) else np.array(leaf) for path, leaf in flat.items()}
    parts: dict[str, list[tuple[Part, np.ndarray]]] = {}
    for path, leaf in kept.items():
        if isinstance(leaf, np.ndarray):  # the same on every host, written by the first
            parts[path] = [(_part((slice(None),) * leaf.ndim, leaf.shape), leaf)] if hosts.first() else []
        else:
            own = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
            parts[path] = [(_part(shard.index, leaf.shape), np.asarray(shard.data)) for shard in own]
    share = hosts.index(), hosts.count()
    nested = trees.unflatten(kept)
    response = ocp.save_async(str(folder / ARRAYS), nested) if share[1] > 1 else None

    def write() -> None:
        if response is None:
            _check_room(folder, nested)
            with _ONE_SAVE, _quiet():
                ocp.save(str(folder / ARRAYS), nested)
        else:
            response.result()
        table = {
            path: {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "parts": [{"at": part, "sha256": _sha256(data)} for part, data in parts[path]],
            }
            for path, leaf in kept.items()
        }
        record = {"hosts": share[1], "arrays": table, "files": file_digests(folder / ARRAYS, share)}
        write_record(folder / SHARE.format(share[0]), record)

    return write


def _check_room(folder: Path, tree: trees.Tree) -> None:
    """Raises: OSError where the disk has no room for the arrays: Orbax would say it in some hundred lines."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    free = shutil.disk_usage(folder).free
    if free < needed * COMPRESSED:
        size = f"{needed / 1e6:.1f} MB are to be written and {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the threads of a failed save print from stderr; the cause is raised all the same.

    Orbax logs it with its traceback, and each piece that tensorstore was still writing finds its event loop closed and
    prints another, also after the save has failed: only a save that ends well takes the filters away.
    """
    former, log = sys.unraisablehook, logging.getLogger("absl")

    def told(unraisable) -> None:
        closed = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
        if not closed:
            former(unraisable)

    def heard(record: logging.LogRecord) -> bool:
        return "raised an exception" not in str(record.msg)

    sys.unraisablehook = told
    log.addFilter(heard)
    yield
    log.removeFilter(heard)
    if sys.unraisablehook is told:
        sys.unraisablehook = former


def seal(folder: Path) -> None:
    """Make one table of the digests of all hosts; from then on `load_tree` reads the folder."""
    first = read_record(folder / SHARE.format(0))
    shares = [first] + [read_record(folder / SHARE.format(i)) for i in range(1, first["hosts"])]
    arrays, files = {}, {}
    for path, entry in first["arrays"].items():
        parts = [part for share in shares for part in share["arrays"][path]["parts"]]
        same = {"sha256": parts[0]["sha256"]} if len(parts) == 1 else {"parts": parts}
        arrays[path] = {"shape": entry["shape"], "dtype": entry["dtype"]} | same
    for share in shares:
        files |= share["files"]
    (folder / ARRAYS / COMMIT).unlink(missing_ok=True)
    write_record(folder / DIGESTS, {"arrays": arrays, "files": files})
    for i in range(first["hosts"]):
        (folder / SHARE.format(i)).unlink()


def load_tree(folder: str | Path, like: trees.Tree | None = None, *, only: trees.Patterns = None) -> trees.Tree:
    """Read back what `save_tree` wrote, as jax arrays.

    Args:
      folder: the folder.
      like: a tree of `jax.ShapeDtypeStruct` with shardings, to restore straight into shards; None: default device.
        On several hosts all call, and each reads the parts of its devices.
      only: the leaves to read (see `trees.select`), such as "^params/"; `like` has only these. The bytes of the others
        are looked at, for damage, and not restored.
    Raises: FileNotFoundError; DamagedError for files that are cut, altered, or of another kind; ValueError listing
      every difference in path, shape or dtype between the folder and `like`, or for `only` that chooses nothing.
    """
    folder = Path(folder).absolute()
    wide = [x for x in jax.tree.leaves(like) if x.sharding is not None and not x.sharding.is_fully_addressable]
    together = hosts.together if wide else lambda f: f()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def check() -> tuple[dict[str, Any], trees.Tree]:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        record = read_record(folder / DIGESTS)
        chosen = trees.flatten(trees.select(trees.unflatten(dict.fromkeys(record["arrays"], 0)), only))
        expected = {path: entry for path, entry in record["arrays"].items() if chosen[path]}
        if not expected:
            raise ValueError(f"nothing of {folder} is chosen")
        shapes = {p: (tuple(e["shape"]), _dtype(e["dtype"])) for p, e in expected.items()}
        stored = trees.unflatten({p: jax.ShapeDtypeStruct(*facts, sharding=here) for p, facts in shapes.items()})
        if like is not None:
            trees.require_same(like, stored, ("the model", str(folder)), dtypes=True)
            stored = jax.tree.map(lambda want, plain: want if want.sharding is not None else plain, like, stored)
        if only is not None:
            rest = dict.fromkeys(record["arrays"].keys() - expected.keys(), ocp.PLACEHOLDER)
            stored = trees.unflatten(trees.flatten(stored) | rest)
        names = sorted(record["files"])  # of many hosts each looks at its share
        names = names[hosts.index() :: hosts.count()] if wide else names
        verify_files(folder / ARRAYS, {name: record["files"][name] for name in names})
        return expected, stored

    expected, stored = together(check)
    try:
        tree = ocp.load(str(folder / ARRAYS), stored)
    except Exception as err:  # Orbax raises a bare Exception, JSONDecodeError, OSError and others for damaged files
        first = str(err).strip().split("\n")[0][:300]
        raise DamagedError(
            f"{folder / ARRAYS} is damaged ({type(err).__name__}: {first}); restore it from a copy"
        ) from err
    tree = trees.unflatten({path: leaf for path, leaf in trees.flatten(tree).items() if path in expected})
    together(lambda: verify(tree, expected, folder))
    return tree


def _dtype(name: str) -> np.dtype:
    return np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(name)
