"""One tree on disk: Orbax files beside a table of digests, written whole or not at all, read back
only if undamaged.

Orbax restores a flipped byte or another dtype without a word. Digests of the files refuse damage
before Orbax sees it (whose own errors for cut files are long and noisy); digests of the arrays
vouch for what Orbax gives back.

On several hosts a tree may hold arrays that no host has whole. Each host then writes the parts on
its own devices and their digests, one a part, and so the table stays true for any other mesh: a
host checks the parts that it has, or, where the parts are cut otherwise than they were, the whole
array.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ltsm_jax import hosts, sharding, trees

ARRAYS, DIGESTS = "arrays", "digests.json"
SHARE = "share.{}.json"  # digests by one host, until they are in the table
# of Orbax: names the absolute path it was written to, and nothing reads it
COMMIT = "commit_success.txt"
COMPRESSED = 0.9  # of its bytes an array of floats takes about that on disk
AT_ONCE = 1 << 26  # bytes of arrays that are written at the same time
Part = tuple[tuple[int, int], ...]  # [start, stop) of each axis
# Orbax numbers the steps of a save by a counter of the process: of two saves at once, the second
# waits for signals of the first until they time out, and the first writes into a folder that does
# not exist.
_ONE_SAVE = threading.Lock()

MAX_JSON = 1 << 26  # bytes of a table of digests; that of a model of a thousand arrays has 300,000
# What Orbax and asyncio log of a piece that failed; the cause itself is raised.
FAILED_PIECE = ("raised an exception", "exception was never retrieved")
MAX_DEPTH = 64  # levels of a tree: what walks it calls itself
# An array may take more bytes in memory than on the disk, where it is compressed. Weights gain next
# to nothing, what holds mostly zeros gains much. Beyond this a few bytes of a made-up file would
# fill the memory.
MAX_GAIN, FREE_BYTES = 32, 1 << 27

COMPILED = 1 << 30  # bytes of compiled programs that are kept; a forecast's takes 1 to 5 MB
COMPILED_FROM = (
    0.1  # seconds of compiling from which a program is kept: below, reading it takes as long
)

_DTYPES = {"bool", "float16", "float32", "float64", "complex64", "complex128"}
_DTYPES |= {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
_DTYPES |= {"bfloat16", "int4", "uint4"} | {
    name for name in dir(ml_dtypes) if name.startswith("float8_")
}
_DAY = 86400
_SCRAP = re.compile(r"(?P<where>[0-9a-f]{8})-(?P<pid>\d+)\.[0-9a-f]{32}\.(?P<kind>tmp|old)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _orbax() -> Any:
    """Orbax; imported where a tree is stored or read, as that takes a third of the time of
    `import ltsm_jax`.
    """
    from orbax.checkpoint import v1

    return v1


def cache_folder(kind: str) -> Path:
    """Locate the folder for files of a kind ("data", "models"): `$LTSM_CACHE`/kind, else
    ~/.cache/ltsm_jax/kind.
    """
    return Path(os.environ.get("LTSM_CACHE") or Path.home() / ".cache" / "ltsm_jax") / kind


def keep_compiled() -> None:
    """Keep compiled programs in `$LTSM_CACHE`/compiled, so that the next process need not compile
    them.

    Before that, the programs used longest ago are removed until `COMPILED` bytes are left. A folder
    that can't be written keeps nothing. JAX_COMPILATION_CACHE_DIR names another folder, which
    nothing is removed from; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    now = jax.config.values
    if not now["jax_enable_compilation_cache"] or now["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = cache_folder("compiled")
        folder.mkdir(parents=True, exist_ok=True)
        _trim(folder, COMPILED)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILED_FROM)


def _trim(folder: Path, most: int) -> None:
    """Remove the files used longest ago until the others take at most `most` bytes."""
    files = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process trims, too
            state = file.stat()
            files.append((max(state.st_atime, state.st_mtime), state.st_size, file))
    excess = sum(size for _, size, _ in files) - most
    for _, size, file in sorted(files):
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= size


def user_path(path: str | os.PathLike) -> Path:
    """Read a path as a shell does: `~` is the home folder, `~name` that of another user.

    Raises: ValueError for a user who is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as err:
        raise ValueError(f"{str(path)!r}: {err}") from None


class DamagedError(ValueError):
    """A stored tree is cut, altered or not one of ours; the message names the folder and what is
    wrong with it.
    """


def digests(tree: trees.Tree) -> dict[str, dict[str, Any]]:
    """`{path: {"shape", "dtype", "sha256"}}` of every leaf; the sha256 is of the C-ordered
    little-endian bytes.

    Where parts of an array lie on other hosts, all hosts must call.
    """

    def entry(leaf):
        array = sharding.on_host(leaf)
        return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": _sha256(array)}

    return {path: entry(leaf) for path, leaf in trees.flatten(tree).items()}


def sha256_of(tree: Any) -> str:
    """One digest of the paths, shapes, dtypes and values of a tree, of random keys too. Hosts call
    as for `digests`.
    """

    def plain(leaf):
        return (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    return hashlib.sha256(json.dumps(digests(jax.tree.map(plain, tree))).encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.sha256(
        array.view(np.uint8).data if array.size and array.ndim else array.tobytes()
    ).hexdigest()


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
    for path in sorted(
        expected.keys() & found.keys()
    ):  # in the same order on every host: a leaf may be gathered
        want, leaf = expected[path], found[path]
        if list(np.shape(leaf)) != want["shape"]:
            problems.append(f"  {path}: {want['shape']} was saved, {list(np.shape(leaf))} is there")
        elif leaf.dtype.name != want["dtype"]:
            problems.append(f"  {path}: {want['dtype']} was saved, {leaf.dtype.name} is there")
        elif not _same_values(leaf, want):
            problems.append(f"  {path}: the values differ from those that were saved")
    if problems:
        raise DamagedError(f"{where} is damaged; restore it from a copy:\n{trees.listed(problems)}")


def _same_values(leaf: Any, entry: Mapping[str, Any]) -> bool:
    """Return whether every part that this host can look at has the digest it was saved with."""
    whole = {"at": [[0, n] for n in entry["shape"]], "sha256": entry.get("sha256")}
    saved = {tuple(map(tuple, part["at"])): part["sha256"] for part in entry.get("parts", [whole])}
    if _global(leaf):
        cuts = {
            _part(index, leaf.shape)
            for index in leaf.sharding.devices_indices_map(leaf.shape).values()
        }
        if saved.keys() <= cuts:  # cut as it was: each host has some of the parts whole
            here = {_part(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
            return all(
                _sha256(np.asarray(data)) == saved[part]
                for part, data in here.items()
                if part in saved
            )
    host = sharding.on_host(leaf)
    for part, sha256 in saved.items():
        region = tuple(slice(*cut) for cut in part)
        if _sha256(host[region]) != sha256:
            return False
    return True


def file_digests(folder: Path, share: tuple[int, int] = (0, 1)) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes", "sha256"}}` of every file below a folder; share (i, n): of every
    nth, from the ith.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != COMMIT)
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in files[share[0] :: share[1]]}


def file_digest(file: Path) -> dict[str, Any]:
    """Give length and sha256 of a file."""
    with file.open("rb") as stream:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }


def verify_files(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: DamagedError that lists every file that is missing, cut or altered."""
    problems = []
    for name, want in expected.items():
        if not _is_file(name, want):
            problems.append(f"  {name[:100]}: it has no digest")
            continue
        file = folder / name
        got = file_digest(file) if file.is_file() else None
        if got is None:
            problems.append(f"  {name}: missing")
        elif got["bytes"] != want["bytes"]:
            problems.append(f"  {name}: {got['bytes']} bytes, {want['bytes']} were saved")
        elif got["sha256"] != want["sha256"]:
            problems.append(f"  {name}: the bytes differ from those that were saved")
    if problems:
        raise DamagedError(
            f"{folder} is damaged; restore it from a copy:\n{trees.listed(problems)}"
        )


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with a digest of itself."""
    plain = json.loads(
        json.dumps(record)
    )  # as it will be read: the digest goes by the order of the names
    file.write_text(json.dumps({"digest": _text_digest(plain), **plain}, indent=1) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises: DamagedError when it is missing, cut or altered.
    """
    if not file.exists():
        raise DamagedError(
            f"{file.parent} has no {file.name}: it was not written by ltsm_jax, or is cut"
        )
    record = read_json(file)
    if "digest" not in record:
        raise DamagedError(f"{file} is cut or altered: it has no digest of itself")
    check_digest(record, file)
    return {name: value for name, value in record.items() if name != "digest"}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Raises: FileNotFoundError; DamagedError for what is no such object, too large, or nested too
    deeply.
    """
    size = file.stat().st_size
    if size > MAX_JSON:
        raise DamagedError(
            f"{file} has {size:,} bytes; no such file of ltsm_jax has more than {MAX_JSON:,}"
        )
    try:
        found = json.loads(file.read_bytes())
    except RecursionError:
        raise DamagedError(f"{file} is cut or altered: nested too deeply") from None
    except ValueError as err:
        raise DamagedError(f"{file} is cut or altered: {err}") from None
    if not isinstance(found, dict):
        raise DamagedError(
            f"{file} is cut or altered: it holds a {type(found).__name__}, no object"
        )
    level = [found]
    for _ in range(MAX_DEPTH):  # what walks it later calls itself
        inner: list[Any] = []
        for x in level:
            inner += x.values() if isinstance(x, dict) else x
        level = [x for x in inner if isinstance(x, dict | list)]
    if level:
        raise DamagedError(f"{file} is cut or altered: nested too deeply")
    return found


def check_digest(record: Mapping[str, Any], file: Path) -> None:
    """Compare a record with the digest that stands in it.

    Raises: DamagedError where they differ.
    """
    rest = {name: value for name, value in record.items() if name != "digest"}
    if record["digest"] != _text_digest(rest):
        raise DamagedError(f"{file} is altered: its contents do not have the digest it states")


def _text_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


Replaces = Callable[[Path], str]  # why a folder that is there may not be replaced; "": it may


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, replaces: Replaces | None = None) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and
    vanishes when it does not.

    Several hosts enter and leave together; the first makes and moves the folder, which all of them
    must see. A process that is killed leaves the old folder in its place or the new one, and scrap
    beside it, which the next one removes.

    Args:
      folder: where; made with its parents. Where it is a link, what it leads to is replaced.
      replaces: asked about the folder that is there, and once more before it is replaced; None:
        nothing is replaced.
    Raises: FileExistsError when `folder` is there and may not be replaced: before anything is
      written, or at the end if another process has made it meanwhile.
    """
    folder = Path(os.path.realpath(user_path(folder)))

    def prepare() -> list[str]:
        put_back(folder)
        require_free(folder, replaces)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_scrap(folder)
        stem = f".{folder.name}.{_this_machine()}-{os.getpid()}.{uuid.uuid4().hex}"
        names = [str(folder.with_name(f"{stem}.{end}")) for end in ("tmp", "old")]
        os.mkdir(names[0])
        return names

    def commit() -> None:
        if replaces is not None and folder.exists():
            require_free(folder, replaces)
            _replace(temporary, folder, old)
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
    except BaseException:
        if hosts.first():
            _remove_for_good(temporary)
        raise
    finally:
        if hosts.first():
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_for_good(folder: Path) -> None:
    """Remove a folder into which Orbax may still be writing: after a save that failed its threads
    end by themselves, and until then one of them may make the folder anew.
    """
    gone = 0
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        gone = 0 if folder.exists() else gone + 1
        if gone == 3:
            return
        time.sleep(0.1)


def require_free(folder: Path, replaces: Replaces | None) -> None:
    """Refuse a folder that is there and may not be replaced, see `atomic_folder`.

    Raises: FileExistsError.
    """
    folder = Path(os.path.realpath(folder))
    if not os.path.lexists(folder):
        return
    if replaces is None:
        raise FileExistsError(f"{folder} exists; choose another folder or ask to overwrite it")
    here = Path(os.path.realpath("."))
    why = ""
    if not folder.is_dir():
        why = "it is a file"
    elif folder == here or folder in here.parents:
        why = "the working directory is in it"
    elif any(folder.iterdir()):
        why = replaces(folder)
    if why:
        raise FileExistsError(
            f"{folder} is not replaced: {why}. Choose another folder, or remove it yourself"
        )


def _replace(new: Path, folder: Path, old: Path) -> None:
    """Put a folder in the place of another, which is `old` afterwards, or `new`."""
    if _exchange(new, folder):
        return
    # A process that is killed between the two leaves no folder; `put_back` knows what was there.
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders at once, where the system and its file system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD: the paths are not relative to an open folder
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), 2)
        else:
            failed = libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2)
    except AttributeError:  # a C library without the call
        return False
    return not failed


def put_back(folder: Path) -> None:
    """Put a folder back in its place that a process has moved away to replace it, and
    was killed.
    """
    if os.path.lexists(folder):
        return
    left = [path for path, kind in _scrap(folder) if kind == "old"]
    if left:
        # Another process may be doing the same.
        with contextlib.suppress(OSError):
            os.rename(max(left, key=lambda path: path.stat().st_mtime), folder)


def _remove_scrap(folder: Path) -> None:
    for path, _ in _scrap(folder):
        shutil.rmtree(path, ignore_errors=True)


def _scrap(folder: Path) -> list[tuple[Path, str]]:
    """Temporary folders of a folder whose processes are no more, and their kinds."""
    found = []
    if not folder.parent.is_dir():
        return found
    for path in folder.parent.glob(f".{_literally(folder.name)}.*"):
        match = _SCRAP.fullmatch(path.name[len(folder.name) + 2 :])
        if match is None:
            continue
        if match["where"] == _this_machine():
            gone = not _runs(int(match["pid"]))
        else:  # a process of another machine, which can't be asked
            gone = time.time() - path.stat().st_mtime > _DAY
        if gone:
            found.append((path, match["kind"]))
    return found


def _literally(name: str) -> str:
    """A name as a pattern of `glob` that nothing else matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


@functools.cache
def _this_machine() -> str:
    """Eight letters for those processes that can see each other's numbers."""
    where = socket.gethostname()
    with contextlib.suppress(OSError):
        where += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def save_tree(folder: str | Path, tree: trees.Tree, *, overwrite: bool = False) -> None:
    """Write a nested dict of arrays to `folder`, whole or not at all. On several hosts, all call.

    Args:
      folder: where; made with its parents.
      tree: the arrays.
      overwrite: replace a tree that is stored there.
    Raises: FileExistsError when the folder exists and `overwrite` is False, or it is no stored
      tree; ValueError for an empty tree; OSError, such as for a full disk.
    """
    with atomic_folder(folder, replaces=_no_tree if overwrite else None) as temporary:
        hosts.on_every_host(begin_save(temporary, tree, copy=False))  # written before this returns
        hosts.on_first(seal, temporary)


def _no_tree(folder: Path) -> str:
    """Why a folder is no stored tree."""
    surplus = sorted({path.name for path in folder.iterdir()} - {ARRAYS, DIGESTS})
    return f"it is no stored tree, but holds {', '.join(surplus[:5])}" if surplus else ""


def no_space(error: BaseException) -> bool:
    """Return whether an error comes from a disk that is full, or from a limit of what may be
    written.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    text = str(error)
    return (isinstance(error, OSError) and error.errno in full) or any(
        os.strerror(code) in text for code in full
    )


def save_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that has the mode of any new file; the library of that name lets its
    owner alone read.

    Raises: FileExistsError; OSError.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with file.open("xb"):
        mode = file.stat().st_mode
    try:
        save_file(
            {key: np.asarray(value, order="C") for key, value in tensors.items()}, file, metadata
        )
    except SafetensorError as err:
        if no_space(err):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from err
        raise
    file.chmod(mode)


def begin_save(folder: Path, tree: trees.Tree, *, copy: bool = True) -> Callable[[], None]:
    """Take out of `tree` what this host writes to `folder`; the function returned writes it.

    That function may run in a thread of its own, and the arrays may be donated to the next step
    meanwhile: it has copies, unless told that this does not happen. On several hosts all call in
    the same order, from the thread that uses the devices: Orbax's first half meets the other hosts
    there, its second half only through files and the coordination service. Where all have written,
    the first host calls `seal`.

    Raises: ValueError for an empty tree.
    """
    flat = trees.flatten(tree)
    empty = [path for path, leaf in flat.items() if leaf.size == 0]
    if empty or not flat:
        raise ValueError(
            f"cannot save {folder}: "
            + (f"arrays without values: {empty}" if empty else "no arrays")
        )
    # Not Orbax's save_async alone: digests come from the same copy as the bytes, and are written,
    # with those of files, after Orbax has finished; a thread must do all of that anyway. (On the
    # CPU backend Orbax reads the arrays where they lie, so that a donating step would change them
    # under its hands.)
    if jax.default_backend() == "cpu" and any(map(_global, flat.values())):
        flat = {path: jnp.copy(leaf) if _global(leaf) else leaf for path, leaf in flat.items()}
    if copy:
        kept = {path: leaf if _global(leaf) else np.array(leaf) for path, leaf in flat.items()}
    else:
        kept = _where_they_lie(flat)
    parts: dict[str, list[tuple[Part, np.ndarray]]] = {}
    for path, leaf in kept.items():
        if isinstance(leaf, np.ndarray):  # the same on every host, written by the first
            parts[path] = (
                [(_part((slice(None),) * leaf.ndim, leaf.shape), leaf)] if hosts.first() else []
            )
        else:
            own = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
            parts[path] = [
                (_part(shard.index, leaf.shape), np.asarray(shard.data)) for shard in own
            ]
    share = hosts.index(), hosts.process_count()
    nested = trees.unflatten(kept)
    response = _orbax().save_async(str(folder / ARRAYS), nested) if share[1] > 1 else None

    def write() -> None:
        if response is None:
            _check_room(folder, nested)
        try:
            if response is None:
                with _ONE_SAVE, _quiet(), _few_at_once(nested):
                    _orbax().save(str(folder / ARRAYS), nested)
            else:
                response.result()
        except Exception as err:  # of a full disk: many lines, or one without a place
            if not no_space(err) or getattr(err, "filename", None):
                raise
            code = getattr(err, "errno", None) or errno.ENOSPC
            raise OSError(code, os.strerror(code), str(folder)) from None
        table = {}
        for path, leaf in kept.items():
            digests = [{"at": part, "sha256": _sha256(data)} for part, data in parts[path]]
            table[path] = {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "parts": digests,
            }
        record = {"hosts": share[1], "arrays": table, "files": file_digests(folder / ARRAYS, share)}
        write_record(folder / SHARE.format(share[0]), record)

    return write


def _check_room(folder: Path, tree: trees.Tree) -> None:
    """Raises: OSError where the disk has no room for the arrays: Orbax would say it in some hundred
    lines.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    free = shutil.disk_usage(folder).free
    if free < needed * COMPRESSED:
        size = f"{needed / 1e6:.1f} MB are to be written and {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size}")


def _where_they_lie(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Give leaves as Orbax reads them without a copy: it copies all NumPy arrays at once.

    On several hosts a NumPy array is one that all have, and the first writes.
    """
    kept = {}
    for path, leaf in flat.items():
        alone = not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1
        if _global(leaf):
            kept[path] = leaf
        elif alone and hosts.process_count() == 1:
            kept[path] = jax.device_put(leaf)
        else:
            kept[path] = np.asarray(leaf)
    return kept


def _few_at_once(tree: trees.Tree) -> contextlib.AbstractContextManager:
    """Have Orbax compress and write a part of the arrays at a time; by default it has all of them
    in memory twice more.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(tree))
    context = _orbax().Context()
    context.memory.write_concurrent_bytes = max(2 * largest, AT_ONCE)
    return context


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the threads of a failed save print from stderr; the cause is raised all the same.

    Orbax logs it with its traceback, each piece that tensorstore was still writing finds its event
    loop closed and prints another, and asyncio tells of the pieces that failed as well when they
    are collected, be it at the end of the process: only a save that ends well takes the filters
    away.
    """
    former = sys.unraisablehook
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def told(unraisable) -> None:
        closed = (
            unraisable.exc_type is RuntimeError
            and str(unraisable.exc_value) == "Event loop is closed"
        )
        if not closed:
            former(unraisable)

    def heard(record: logging.LogRecord) -> bool:
        text = str(record.msg)
        return not any(words in text for words in FAILED_PIECE)

    sys.unraisablehook = told
    for log in logs:
        log.addFilter(heard)
    yield
    for log in logs:
        log.removeFilter(heard)
    if sys.unraisablehook is told:
        sys.unraisablehook = former


def seal(folder: Path) -> None:
    """Make one table of the digests of all hosts; from then on `load_tree` reads the folder."""
    first = read_record(folder / SHARE.format(0))
    shares = [first] + [read_record(folder / SHARE.format(i)) for i in range(1, first["hosts"])]
    arrays, files = {}, {}
    for path, entry in first["arrays"].items():
        parts = []
        for share in shares:
            parts += share["arrays"][path]["parts"]
        same = {"sha256": parts[0]["sha256"]} if len(parts) == 1 else {"parts": parts}
        arrays[path] = {"shape": entry["shape"], "dtype": entry["dtype"]} | same
    for share in shares:
        files |= share["files"]
    (folder / ARRAYS / COMMIT).unlink(missing_ok=True)
    write_record(folder / DIGESTS, {"arrays": arrays, "files": files})
    for i in range(first["hosts"]):
        (folder / SHARE.format(i)).unlink()


def load_tree(
    folder: str | Path, like: trees.Tree | None = None, *, only: trees.Patterns = None
) -> trees.Tree:
    """Read back what `save_tree` wrote, as jax arrays.

    Args:
      folder: the folder.
      like: a tree of `jax.ShapeDtypeStruct` with shardings, to restore straight into shards; None:
        default device. On several hosts all call, and each reads the parts of its devices.
      only: the leaves to read (see `trees.select`), such as "^params/"; `like` has only these. The
        bytes of the others are looked at, for damage, and not restored.
    Raises: FileNotFoundError; DamagedError for files that are cut, altered, or of another kind;
      ValueError listing every difference in path, shape or dtype between the folder and `like`, or
      for `only` that chooses nothing.
    """
    folder = Path(folder).absolute()
    wide = [
        x
        for x in jax.tree.leaves(like)
        if x.sharding is not None and not x.sharding.is_fully_addressable
    ]
    together = hosts.on_every_host if wide else lambda f: f()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def check() -> tuple[dict[str, Any], trees.Tree]:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        record = _table(folder)
        chosen = trees.flatten(
            trees.select(trees.unflatten(dict.fromkeys(record["arrays"], 0)), only)
        )
        expected = {path: entry for path, entry in record["arrays"].items() if chosen[path]}
        if not expected:
            raise ValueError(f"nothing of {folder} is chosen")
        shapes = {p: (tuple(e["shape"]), _dtype(e["dtype"])) for p, e in expected.items()}
        stored = trees.unflatten(
            {p: jax.ShapeDtypeStruct(*facts, sharding=here) for p, facts in shapes.items()}
        )
        if like is not None:
            trees.require_same(like, stored, ("the model", str(folder)), dtypes=True)
            stored = jax.tree.map(
                lambda want, plain: want if want.sharding is not None else plain, like, stored
            )
        if only is not None:
            rest = dict.fromkeys(record["arrays"].keys() - expected.keys(), _orbax().PLACEHOLDER)
            stored = trees.unflatten(trees.flatten(stored) | rest)
        names = sorted(record["files"])  # of many hosts each looks at its share
        names = names[hosts.index() :: hosts.process_count()] if wide else names
        verify_files(folder / ARRAYS, {name: record["files"][name] for name in names})
        # Now that the files are as long as the table says, and before anything has its size in
        # memory.
        held = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        on_disk = sum(entry["bytes"] for entry in record["files"].values())
        if held > FREE_BYTES + MAX_GAIN * on_disk:
            raise DamagedError(
                f"{folder}: {held:,} bytes of arrays can't come from files of {on_disk:,} bytes"
            )
        return expected, stored

    expected, stored = together(check)
    try:
        tree = _orbax().load(str(folder / ARRAYS), stored)
    # For damaged files Orbax raises a bare Exception, JSONDecodeError, OSError and others.
    except Exception as err:
        first = str(err).strip().split("\n")[0][:300]
        raise DamagedError(
            f"{folder / ARRAYS} is damaged ({type(err).__name__}: {first}); restore it from a copy"
        ) from err
    tree = trees.unflatten(
        {path: leaf for path, leaf in trees.flatten(tree).items() if path in expected}
    )
    together(lambda: verify(tree, expected, folder))
    return tree


def stored_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Give the shape of each array of a stored tree by its path, without reading any.

    Raises: FileNotFoundError; DamagedError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    return {path: tuple(entry["shape"]) for path, entry in _table(folder)["arrays"].items()}


def _table(folder: Path) -> dict[str, Any]:
    """Read the table of digests of a stored tree, and check that it is one.

    Raises: DamagedError.
    """
    file = folder / DIGESTS
    record = read_record(file)
    fits = set(record) == {"arrays", "files"} and all(
        isinstance(part, dict) for part in record.values()
    )
    odd = (
        [name for name, entry in record["arrays"].items() if not _is_array(name, entry)]
        if fits
        else []
    )
    odd += (
        [name for name, entry in record["files"].items() if not _is_file(name, entry)]
        if fits
        else []
    )
    if not fits or odd:
        which = f": see {odd[0][:100]!r}" if odd else ""
        raise DamagedError(f"{file} is no table of digests{which}; restore it from a copy")
    return record


def _is_array(path: str, entry: Any) -> bool:
    """Return whether an entry of the table describes an array."""
    names = path.split("/")
    if not isinstance(entry, dict) or not all(names) or len(names) > MAX_DEPTH:
        return False
    parts = entry.get("parts", [{"at": [], "sha256": entry.get("sha256")}])
    return (
        _is_counts(entry.get("shape"))
        and isinstance(entry.get("dtype"), str)
        and _dtype_or_none(entry["dtype"]) is not None
        and isinstance(parts, list)
        and all(map(_is_part, parts))
    )


def _is_part(part: Any) -> bool:
    """Return whether an entry describes one part of an array: where it lies, and its digest."""
    if not isinstance(part, dict) or not _is_digest(part.get("sha256")):
        return False
    return isinstance(part.get("at"), list) and all(map(_is_counts, part["at"]))


def _is_file(name: str, entry: Any) -> bool:
    """Return whether an entry of the table describes a file below its folder."""
    inside = not os.path.isabs(name) and ".." not in Path(name).parts
    fits = (
        isinstance(entry, dict)
        and _is_counts([entry.get("bytes")])
        and _is_digest(entry.get("sha256"))
    )
    return inside and fits


def _is_counts(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) <= MAX_DEPTH
    return fits and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _dtype(name: str) -> np.dtype:
    found = _dtype_or_none(name)
    assert found is not None, "the table was checked"
    return found


def _dtype_or_none(name: str) -> np.dtype | None:
    """The dtype of arrays by its name; None for text, objects and what JAX does not have."""
    if name not in _DTYPES:
        return None
    return np.dtype(getattr(ml_dtypes, name, name))
