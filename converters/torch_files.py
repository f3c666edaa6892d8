"""Reading and writing PyTorch checkpoint files without PyTorch, as data.

A torch checkpoint is a pickle plus raw storages. The pickle is run by `converters.pickles`, which
builds tensors and plain containers and nothing else. Formats: the zip container of torch >= 1.6,
the plain stream before it, and safetensors. Tensors come back as read-only numpy arrays that view
the memory-mapped file. What is wrong with a file is said by one exception, `CheckpointError`.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import math
import mmap
import os
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.pickles import MAX_PICKLE_BYTES, Budget, Placeholder, quoted, run_pickle
from ltsm_jax import storage
from ltsm_jax.original_files import CheckpointError

# All tensors of a file together may have four times its bytes, for tensors that stand under several
# names, and this much more, for small ones that are expanded.
MAX_EXPANDED = 16 << 20
MAX_ENTRIES = (
    1 << 16
)  # of a zip file; a checkpoint of 2,600 tensors with their optimiser's has 8,000
MAX_HEADER = 4 << 20  # bytes of a safetensors header; 2,600 tensors have 0.3 MB

_MAX_STORAGE_NAME = 100
_MAX_AXIS = 1 << 24  # of an empty tensor, which no storage bounds
_MAX_EXTRA_FIELDS = 64  # of a zip header


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A checkpoint file that has been read: the object in it, and its container ("zip" or
    "legacy").
    """

    content: Any
    container: str


# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------

_DTYPES = {  # torch's name: (numpy dtype, name of its typed storage)
    "float32": (np.dtype(np.float32), "FloatStorage"),
    "float64": (np.dtype(np.float64), "DoubleStorage"),
    "float16": (np.dtype(np.float16), "HalfStorage"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BFloat16Storage"),
    "int64": (np.dtype(np.int64), "LongStorage"),
    "int32": (np.dtype(np.int32), "IntStorage"),
    "int16": (np.dtype(np.int16), "ShortStorage"),
    "int8": (np.dtype(np.int8), "CharStorage"),
    "uint8": (np.dtype(np.uint8), "ByteStorage"),
    "bool": (np.dtype(np.bool_), "BoolStorage"),
    "complex64": (np.dtype(np.complex64), "ComplexFloatStorage"),
    "complex128": (np.dtype(np.complex128), "ComplexDoubleStorage"),
}
_STORAGE_DTYPES: dict[str, np.dtype | None] = {
    f"torch.{device}{storage}": dtype
    for (dtype, storage), device in itertools.product(_DTYPES.values(), ("", "cuda."))
} | {"torch.storage.UntypedStorage": None, "torch.UntypedStorage": None}
_STORAGE_NAMES = dict(_DTYPES.values())
_TORCH_DTYPES = {f"torch.{name}": dtype for name, (dtype, _) in _DTYPES.items()}
# These have no storage class of their own.
_TORCH_DTYPES |= {f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")}


@dataclasses.dataclass
class _Views:
    """The bytes that the tensors of a file may still have, were each of them copied out of it."""

    file_bytes: int
    left: int

    @classmethod
    def of(cls, file_bytes: int) -> _Views:
        return cls(file_bytes, 4 * file_bytes + MAX_EXPANDED)

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise ValueError(
                f"the tensors are views that would expand {self.file_bytes} bytes of file to more "
                f"than {4 * self.file_bytes + MAX_EXPANDED}, which no checkpoint needs"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """Raw little-endian bytes, the type they were saved as (None: untyped), and what its file's
    tensors may take.
    """

    data: memoryview
    dtype: np.dtype | None
    views: _Views


def _whole_storage(data: memoryview, dtype: np.dtype | None, views: _Views) -> _Storage:
    """A storage as it lies in the file, looked through once: what is made of it after needs no
    second look.
    """
    if dtype == np.bool_ and data.nbytes and np.frombuffer(data, np.uint8).max() > 1:
        raise ValueError("a bool storage with bytes other than 0 and 1")
    return _Storage(data, dtype, views)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _strided(
    storage: object, offset: object, size: object, stride: object, dtype: np.dtype | None
) -> np.ndarray:
    """The tensor that torch would rebuild, as a read-only view; ValueError where it would reach out
    of its storage.
    """
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise ValueError("a tensor on an untyped storage without a dtype")
    if not (
        isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 32
    ):
        raise ValueError(
            "a tensor whose size and stride are not two tuples of one length (32 at most)"
        )
    if not (_is_size(offset) and all(map(_is_size, size)) and all(map(_is_size, stride))):
        raise ValueError("a tensor whose offset, size or stride is not a non-negative integer")
    n = math.prod(size)
    if n == 0:
        if max(size) > _MAX_AXIS:
            raise ValueError(f"an empty tensor of size {max(size)}")
        nothing = np.empty(size, dtype)
        nothing.flags.writeable = False
        return nothing
    held = storage.data.nbytes // dtype.itemsize
    reach = offset + sum((s - 1) * t for s, t in zip(size, stride, strict=True))  # type: ignore[operator]
    if reach >= held:
        raise ValueError(f"a tensor that reaches element {reach} of a storage of {held} elements")
    if n > held + MAX_EXPANDED:
        raise ValueError(f"a tensor of {n} elements on a storage of {held}")
    storage.views.spend(n * dtype.itemsize)
    strides = tuple(t * dtype.itemsize for t in stride)
    array = np.ndarray(size, dtype, storage.data, offset * dtype.itemsize, strides)  # type: ignore[operator]
    array.flags.writeable = False
    return array


def _torch_dtype(value: object) -> np.dtype:
    name = value.name if isinstance(value, Placeholder) else quoted(value)
    if name not in _TORCH_DTYPES:
        raise ValueError(f"a tensor of dtype {name}, which is not supported")
    return _TORCH_DTYPES[name]


def _is_array(value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError("a torch Parameter around something that is not a tensor")
    return value


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": lambda st, offset, size, stride: _strided(
        st, offset, size, stride=stride, dtype=None
    ),
    "torch._utils._rebuild_tensor_v2": lambda st, offset, size, stride, *_: _strided(
        st, offset, size, stride=stride, dtype=None
    ),
    "torch._utils._rebuild_tensor_v3": lambda st, offset, size, stride, _grad, _hooks, dtype, *_: (
        _strided(st, offset, size, stride=stride, dtype=_torch_dtype(dtype))
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: _is_array(data),
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: _is_array(data),
}


# --------------------------------------------------------------------------------------------------
# Containers
# --------------------------------------------------------------------------------------------------

_AGAIN = "Download or copy the file again."
_RESAVE = "Load it with the program that wrote it and save its state_dict() with torch.save."


def read_torch(path: str | os.PathLike) -> TorchFile:
    """Reads a torch checkpoint file, whatever its name, without running anything in it.

    Args:
      path: a file that `torch.save` wrote: zip container (torch >= 1.6) or the stream before it.
    Returns: `TorchFile`; tensors in its `content` are read-only numpy arrays on the memory-mapped
      file (bfloat16 as `ml_dtypes.bfloat16`), Parameters are tensors, OrderedDicts are dicts, other
      objects are `Placeholder`s.
    Raises: CheckpointError for a file that is missing, cut, damaged (zip entries carry a CRC, which
      is checked), hostile, or of another format.
    """
    file = Path(path)
    try:
        mapped = _mapped(file)
    except OSError as e:
        raise CheckpointError(
            f"{file}: can't be read ({e.strerror or e}). Check the path."
        ) from None
    except ValueError as e:
        raise CheckpointError(f"{file}: {e}. {_AGAIN}") from None
    if mapped[:4] == b"PK\x03\x04":
        return TorchFile(_read_zip(file, mapped), "zip")
    if mapped[257:262] == b"ustar" or mapped[:9] == b"sys_info\0":
        raise CheckpointError(
            f"{file}: a tar file, as torch wrote before 0.1.10, is not supported. {_RESAVE}"
        )
    if mapped[:2] == b"\x1f\x8b" or mapped[:3] == b"BZh" or mapped[:6] == b"\xfd7zXZ\0":
        raise CheckpointError(f"{file}: the file is compressed. Unpack it first.")
    if mapped[:1] == b"\x80":
        return TorchFile(_read_legacy(file, mapped), "legacy")
    raise CheckpointError(
        f"{file}: not a torch checkpoint (starts with {bytes(mapped[:8])!r}). A cut download or a "
        f"saved web page looks like this. {_AGAIN}"
    )


def _mapped(file: Path) -> mmap.mmap:
    """The bytes of a file; OSError where it can't be read, ValueError where there are none."""
    told = os.stat(file)
    if not stat.S_ISREG(told.st_mode):  # opening a pipe would wait for its other end
        raise OSError(errno.EINVAL, "not a plain file")
    if told.st_size == 0:
        raise ValueError("the file is empty")
    with open(file, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _unpack(layout: str, data: Any, at: int) -> tuple:
    if at < 0 or at + struct.calcsize(layout) > len(data):
        raise ValueError("a header reaches over the end of the file")
    return struct.unpack_from(layout, data, at)


def _zip64(extra: bytes, sizes: list[int]) -> list[int]:
    """Replaces the sizes that stand as 0xFFFFFFFF by those of the zip64 field of `extra`."""
    if 0xFFFFFFFF not in sizes:
        return sizes
    at = 0
    wide: bytes = b""
    for _ in range(_MAX_EXTRA_FIELDS):
        if at + 4 > len(extra):
            break
        tag, n = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            wide = extra[at + 4 : at + 4 + n]
        at += 4 + n
    out = []
    for value in sizes:
        if value == 0xFFFFFFFF:
            if len(wide) < 8:
                raise ValueError("a zip64 size is missing")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        out.append(value)
    return out


@dataclasses.dataclass(frozen=True, slots=True)
class _Listed:
    """Entry of a zip file, as its directory lists it."""

    name: str
    raw: bytes  # the name as it stands
    told: list[int]  # version, flags, method, time, date
    crc: int
    plain: int  # bytes
    local: int  # where its own header is


def _zip_end(data: mmap.mmap) -> tuple[int, int, int]:
    """Count, start and end of the list of entries of a zip file."""
    total = len(data)
    end = data.rfind(b"PK\x05\x06", max(0, total - 65557))
    if end < 0 or end + 22 > total:
        raise ValueError("the end of the zip file is missing: the file was cut")
    disk, first_disk, here, count, size, start, comment = _unpack("<4H2LH", data, end + 4)
    if end + 22 + comment != total:
        raise ValueError("the zip file does not end where it says")
    if (
        0xFFFF in (here, count)
        or 0xFFFFFFFF in (size, start)
        or data[max(0, end - 20) : end][:4] == b"PK\x06\x07"
    ):
        magic, _, at, disks = _unpack("<4sLQL", data, end - 20)
        if magic != b"PK\x06\x07" or disks != 1:
            raise ValueError("the zip64 locator is damaged")
        magic, _, _, _, disk, first_disk, here, count, size, start = _unpack("<4sQ2H2L4Q", data, at)
        if magic != b"PK\x06\x06" or at + 56 > end - 20:
            raise ValueError("the zip64 end record is damaged")
        end = at
    if disk or first_disk or here != count:
        raise ValueError("the zip file is split over several disks")
    if start + size != end:
        raise ValueError("the list of entries is not where the zip file says (cut or changed)")
    if count > size // 46:
        raise ValueError(f"the zip file declares {count} entries in a list of {size} bytes")
    if count > MAX_ENTRIES:
        raise ValueError(f"the zip file has {count} entries, which no checkpoint needs")
    return count, start, end


def _zip_list(data: mmap.mmap, count: int, start: int, end: int) -> list[_Listed]:
    """The list of entries, read without a look at the entries."""
    found: list[_Listed] = []
    names: set[str] = set()
    at = start
    for _ in range(count):
        head = _unpack("<4s6H3L5H2L", data, at)
        magic, _, *told, crc, packed, plain, n_name, n_extra, n_note, disk, _, _, local = head
        _, flags, method, _, _ = told
        if magic != b"PK\x01\x02" or disk:
            raise ValueError("the list of entries of the zip file is damaged")
        raw = data[at + 46 : at + 46 + n_name]
        plain, packed, local = _zip64(
            data[at + 46 + n_name : at + 46 + n_name + n_extra], [plain, packed, local]
        )
        at += 46 + n_name + n_extra + n_note
        if at > end:
            raise ValueError("the list of entries of the zip file is cut")
        name = raw.decode("utf-8" if flags & 0x800 else "cp437")
        parts = name.split("/")
        if (
            "\\" in name
            or "\0" in name
            or ":" in parts[0]
            or any(p in ("", ".", "..") for p in parts)
        ):
            raise ValueError(f"an entry named {quoted(name)}, which is not a plain path")
        if name in names:
            raise ValueError(f"two entries named {quoted(name)}")
        names.add(name)
        if flags & ~0x0808:
            raise ValueError(
                f"the entry {quoted(name)} is encrypted or patched (flags 0x{flags:04x})"
            )
        if method != 0 or packed != plain:
            raise ValueError(
                f"the entry {quoted(name)} is compressed ({packed} bytes declared to become "
                f"{plain}): torch never does this, and it was not unpacked"
            )
        if plain > len(data):
            raise ValueError(
                f"the entry {quoted(name)} declares {plain} bytes in a file of {len(data)}"
            )
        found.append(_Listed(name=name, raw=raw, told=told, crc=crc, plain=plain, local=local))
    if at != end:
        raise ValueError("the list of entries of the zip file is longer than it says")
    return found


def _zip_bodies(data: mmap.mmap, listed: list[_Listed], start: int) -> list[int]:
    """Locate the bytes of each entry, all of them before `start` and no two of them in one place.

    Nothing that is as long as an entry is done before: of overlapping entries, a small file has any
    number.
    """
    bodies: list[int] = []
    spans: list[tuple[int, int, str]] = []
    for entry in listed:
        magic, n_name, n_extra = _unpack("<4s22x2H", data, entry.local)
        if magic != b"PK\x03\x04":
            raise ValueError(
                f"the header of the entry {quoted(entry.name)} does not match the list of entries"
            )
        body = entry.local + 30 + n_name + n_extra
        if body + entry.plain > start:
            raise ValueError(f"the entry {quoted(entry.name)} reaches over the end of the data")
        bodies.append(body)
        spans.append((entry.local, body + entry.plain, entry.name))
    spans.sort()
    for (_, stop, one), (begin, _, two) in itertools.pairwise(spans):
        if stop > begin:
            raise ValueError(f"the entries {quoted(one)} and {quoted(two)} overlap")
    return bodies


def _zip_entries(data: mmap.mmap) -> dict[str, memoryview]:
    """Name -> bytes of every entry of an uncompressed zip file, after checking all that it says
    about itself.
    """
    count, start, end = _zip_end(data)
    listed = _zip_list(data, count, start, end=end)
    bodies = _zip_bodies(data, listed, start)
    view = memoryview(data)
    entries: dict[str, memoryview] = {}
    for entry, body in zip(listed, bodies, strict=True):
        name, local, sizes = entry.name, entry.local, (entry.crc, entry.plain, entry.plain)
        # The local header must tell the same story as the list.
        _, *told, crc, packed, plain, n_name, _ = _unpack("<4s5H3L2H", data, local)
        plain, packed = _zip64(data[local + 30 + n_name : body], [plain, packed])
        if told != entry.told or data[local + 30 : local + 30 + n_name] != entry.raw:
            raise ValueError(
                f"the header of the entry {quoted(name)} does not match the list of entries"
            )
        streamed = bool(
            entry.told[1] & 8
        )  # then crc and sizes stand behind the data, and may be zero here
        if (crc, packed, plain) != sizes and not (streamed and (crc, packed, plain) == (0, 0, 0)):
            raise ValueError(
                f"the sizes of the entry {quoted(name)} do not match the list of entries"
            )
        stop = body + entry.plain
        content = view[body:stop]
        if zlib.crc32(content) != entry.crc:
            raise ValueError(f"the entry {quoted(name)} is damaged (its CRC-32 is wrong)")
        if streamed:
            _check_descriptor(data, stop, entry, sizes=sizes)
        entries[name] = content
    return entries


def _check_descriptor(
    data: mmap.mmap, at: int, entry: _Listed, sizes: tuple[int, int, int]
) -> None:
    """Raise ValueError unless the descriptor behind an entry says what the list says."""
    signed = data[at : at + 4] == b"PK\x07\x08"
    if signed:
        told = (_unpack("<3L", data, at + 4), _unpack("<L2Q", data, at + 4))
    else:
        told = (_unpack("<3L", data, at),)
    if sizes not in told:
        raise ValueError(
            f"the descriptor of the entry {quoted(entry.name)} does not match the list of entries"
        )


def _swapped(data: memoryview, dtype: np.dtype) -> memoryview:
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.frombuffer(data, f"u{width}").byteswap().view(np.uint8).data if width > 1 else data


def _storage_id(pid: object, ids: int) -> tuple[np.dtype | None, str, int]:
    """The parts of torch's persistent id ("storage", type, key, location, numel[, view])."""
    fits = (
        isinstance(pid, tuple)
        and len(pid) in (5, ids)
        and isinstance(pid[0], str)
        and pid[0] == "storage"
    )
    if not fits:
        raise ValueError("the pickle refers to something outside it that is not a torch storage")
    assert isinstance(pid, tuple)
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, Placeholder) or kind.name not in _STORAGE_DTYPES:
        name = kind.name if isinstance(kind, Placeholder) else type(kind).__name__
        raise ValueError(f"a storage of type {quoted(name)}, which is not supported")
    if (
        not isinstance(key, str)
        or not isinstance(numel, int)
        or isinstance(numel, bool)
        or numel < 0
    ):
        raise ValueError("a storage whose name is not text or whose size is not a number")
    if len(key) > _MAX_STORAGE_NAME:
        raise ValueError(f"a storage with a name of {len(key)} characters")
    return _STORAGE_DTYPES[kind.name], key, numel


def _same_twice(
    declared: dict[str, tuple[np.dtype | None, int]], key: str, told: tuple[np.dtype | None, int]
) -> None:
    """Raise ValueError where a storage is declared again as something else, which torch.save
    refuses to write.
    """
    if declared.setdefault(key, told) != told:
        raise ValueError(f"the storage {quoted(key)} is declared twice, differently")


def _read_zip(file: Path, data: mmap.mmap) -> Any:
    try:
        entries = _zip_entries(data)
        roots = sorted({name.partition("/")[0] for name in entries})
        root = roots[0] if roots else ""
        if len(roots) != 1 or f"{root}/data.pkl" not in entries:
            raise ValueError("a zip file, but not a torch checkpoint (no folder with data.pkl)")
        if any(
            name.startswith(f"{root}/code/") or name == f"{root}/constants.pkl" for name in entries
        ):
            raise ValueError("a TorchScript archive, which is a program and not a checkpoint")
        order = bytes(entries.get(f"{root}/byteorder", b"little")[:16])
        if order not in (b"little", b"big"):
            raise ValueError(f"an unknown byte order {order!r}")
        if len(entries[f"{root}/data.pkl"]) > MAX_PICKLE_BYTES:
            raise ValueError(
                f"data.pkl has {len(entries[f'{root}/data.pkl'])} bytes, which no checkpoint needs"
            )
    except (ValueError, struct.error) as e:
        raise CheckpointError(
            f"{file}: {e}. {_AGAIN} If it is whole: {_RESAVE[0].lower()}{_RESAVE[1:]}"
        ) from None
    views = _Views.of(len(data))
    declared: dict[str, tuple[np.dtype | None, int]] = {}
    made: dict[str, _Storage] = {}

    def storage(pid: object) -> _Storage:
        dtype, key, numel = _storage_id(pid, 5)
        _same_twice(declared, key, (dtype, numel))
        if key in made:
            return made[key]
        name = f"{root}/data/{key}"
        if name not in entries:
            raise ValueError(f"the storage {quoted(key)} is missing in the zip file")
        held, needed = len(entries[name]), numel * (dtype.itemsize if dtype else 1)
        if held != needed:
            raise ValueError(
                f"the storage {quoted(key)} has {held} bytes, the pickle says {needed}"
            )
        raw = entries[name]
        if order == b"big":
            if dtype is None:
                raise ValueError(
                    "an untyped storage in big-endian byte order, which is not supported"
                )
            raw = _swapped(raw, dtype)
        made[key] = _whole_storage(raw, dtype, views)
        return made[key]

    pickle = bytes(entries[f"{root}/data.pkl"])
    content, end = run_pickle(file, pickle, 0, persistent=storage, builders=_BUILDERS)
    if end != len(pickle):
        raise CheckpointError(f"{file}: data.pkl goes on after the end of its pickle. {_AGAIN}")
    return content


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


def _no_storage(pid: object) -> Any:
    raise ValueError("a storage where none can be")


def _read_legacy(file: Path, data: mmap.mmap) -> Any:
    """Five pickles (magic, version, machine, object, names of storages), then each storage: its
    length, its data.
    """
    budget = Budget.of(len(data))

    def plain(at: int) -> tuple[Any, int]:
        return run_pickle(file, data, at, persistent=_no_storage, builders={}, budget=budget)

    at = _after_legacy_header(file, plain)

    # The storages stand behind the pickle that uses them: a first pass over it finds where they
    # are, and makes nothing.
    declared: dict[str, tuple[np.dtype | None, int]] = {}
    nothing = np.empty(0, np.float32)

    def declare(pid: object) -> None:
        dtype, key, numel = _storage_id(pid, 6)
        _same_twice(declared, key, (dtype, numel))
        needed = numel * (dtype.itemsize if dtype else 1)
        if needed > len(data):
            raise ValueError(
                f"the storage {quoted(key)} declares {needed} bytes in a file of {len(data)}"
            )

    def no_tensor(*_: Any) -> np.ndarray:
        return nothing

    start = at
    memory = budget.memory
    at = run_pickle(
        file,
        data,
        start,
        persistent=declare,
        builders=dict.fromkeys(_BUILDERS, no_tensor),
        budget=budget,
    )[1]
    budget.memory = memory  # what the first pass took is free again
    keys, at = plain(at)
    places = _legacy_places(file, data, at, keys=keys, declared=declared)
    views = _Views.of(len(data))
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        key = pid[2]
        if key not in storages:
            low, high = places[key]
            storages[key] = _whole_storage(memoryview(data)[low:high], declared[key][0], views)
        view = pid[5] if len(pid) == 6 else None
        return storages[key] if view is None else _viewed(storages[key], view, key, views=views)

    return run_pickle(file, data, start, persistent=storage, builders=_BUILDERS, budget=budget)[0]


def _after_legacy_header(file: Path, plain: Callable[[int], tuple[Any, int]]) -> int:
    """Read magic, version and machine, and give the place behind them.

    plain: from a place in the file, the object pickled there and the place behind it.
    Raises: CheckpointError for files that are not of this format.
    """
    magic, at = plain(0)
    if not isinstance(magic, int) or magic != _LEGACY_MAGIC:
        raise CheckpointError(f"{file}: a pickle, but not one that torch.save wrote. {_RESAVE}")
    version, at = plain(at)
    machine, at = plain(at)
    if not isinstance(version, int) or version != _LEGACY_VERSION or not isinstance(machine, dict):
        # Not `str(version)`: a nest of lists, or a number of megabytes, has no text.
        told = (
            f"version {version}"
            if _is_size(version)
            else f"a version that is a {type(version).__name__}"
        )
        raise CheckpointError(f"{file}: {told} of the old torch format is unknown. {_RESAVE}")
    if machine.get("little_endian") is not True:
        raise CheckpointError(
            f"{file}: written on a big-endian machine, which is not supported here. {_RESAVE}"
        )
    return at


def _legacy_places(
    file: Path,
    data: mmap.mmap,
    at: int,
    keys: Any,
    declared: Mapping[str, tuple[np.dtype | None, int]],
) -> dict[str, tuple[int, int]]:
    """First and last place of each storage in the file, by its key.

    at: the place of the first storage. keys: the file's list of them. declared: dtype and number of
    elements of those that its pickle uses.
    Raises: CheckpointError where they contradict each other or the length of the file.
    """
    if (
        not isinstance(keys, list)
        or any(not isinstance(k, str) for k in keys)
        or len(set(keys)) != len(keys)
    ):
        raise CheckpointError(f"{file}: the list of storages is damaged. {_AGAIN}")
    if set(keys) != set(declared):
        odd = sorted(set(keys) ^ set(declared))[:5]
        odd = ", ".join(map(quoted, odd))
        raise CheckpointError(
            f"{file}: the list of storages and the pickle differ in {odd}. {_AGAIN}"
        )
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        dtype, numel = declared[key]
        needed = numel * (dtype.itemsize if dtype else 1)
        if at + 8 + needed > len(data):
            raise CheckpointError(
                f"{file}: the file ends inside the storage {quoted(key)}: it was cut. {_AGAIN}"
            )
        held = int.from_bytes(data[at : at + 8], "little")
        if held != numel:
            raise CheckpointError(
                f"{file}: the storage {quoted(key)} has {held} elements, not {numel}. {_AGAIN}"
            )
        places[key] = (at + 8, at + 8 + needed)
        at += 8 + needed
    if at != len(data):
        raise CheckpointError(f"{file}: {len(data) - at} bytes follow the last storage. {_AGAIN}")
    return places


def _viewed(whole: _Storage, view: Any, key: str, views: _Views) -> _Storage:
    """The part of a storage that a view (name, offset, size) in a legacy file takes.

    Raises: ValueError for something else, and for a view that reaches out of the storage.
    """
    if not (isinstance(view, tuple) and len(view) == 3 and _is_size(view[1]) and _is_size(view[2])):
        raise ValueError("a storage view that is not (name, offset, size)")
    width = whole.dtype.itemsize if whole.dtype else 1
    low, high = view[1] * width, (view[1] + view[2]) * width
    if high > whole.data.nbytes:
        raise ValueError(f"a view that reaches out of the storage {quoted(key)}")
    return _Storage(whole.data[low:high], whole.dtype, views)


_SAFE_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a safetensors file: key -> read-only array on the memory-mapped file.

    The header is looked through before anything is made of it: its length, every type, shape and
    place, and that the tensors fill the file without a gap or an overlap.

    Raises: CheckpointError for a file that can't be read or is damaged.
    """
    try:
        return _safe_arrays(_mapped(Path(path)))
    except (ValueError, OSError, RecursionError) as e:
        what = getattr(e, "strerror", None) or str(e)[:500] or type(e).__name__
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({what}). {_AGAIN}"
        ) from None


def _safe_arrays(data: mmap.mmap) -> dict[str, np.ndarray]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"its header of {size} bytes reaches over the end of the file")
    if size > MAX_HEADER:
        raise ValueError(f"its header has {size} bytes, which no checkpoint needs")
    if data[8:9] != b"{":
        raise ValueError("its header is not a JSON object")
    entries = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=_without_repeats)
    entries.pop("__metadata__", None)
    spans = []
    for key, entry in entries.items():
        dtype, shape, low, high = _safe_entry(key, entry)
        spans.append((low, high, key, dtype, shape))
    # Of empty tensors, any number stand at one place; the order of two of them does not matter.
    spans.sort(key=lambda span: span[:2])

    arrays: dict[str, np.ndarray] = {}
    at = 0
    for low, high, key, dtype, shape in spans:
        if low != at:
            raise ValueError(
                f"the tensor {quoted(key)} begins at byte {low}, where the one before ends at {at}"
            )
        if high > len(data) - 8 - size:
            raise ValueError(f"the tensor {quoted(key)} reaches over the end of the file")
        raw = memoryview(data)[8 + size + low : 8 + size + high]
        if dtype == np.bool_ and high > low and np.frombuffer(raw, np.uint8).max() > 1:
            raise ValueError(f"the bool tensor {quoted(key)} has bytes other than 0 and 1")
        array = np.ndarray(shape, dtype, raw if high > low else None)
        array.flags.writeable = False
        arrays[key] = array
        at = high
    if at != len(data) - 8 - size:
        raise ValueError(
            f"its tensors have {at} bytes, the file {len(data) - 8 - size} after the header"
        )
    return {key: arrays[key] for key in entries}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a key twice")
    return found


def _safe_entry(key: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Type, shape, and where the bytes of one tensor begin and end; ValueError where they
    contradict each other.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {quoted(key)} has no dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SAFE_DTYPES:
        raise ValueError(
            f"the tensor {quoted(key)} has the type {quoted(dtype)}, which is not supported"
        )
    lists = (
        isinstance(shape, list) and len(shape) <= 32 and isinstance(place, list) and len(place) == 2
    )
    if not lists or not all(map(_is_size, [*shape, *place])):
        raise ValueError(f"shape and data_offsets of the tensor {quoted(key)} are not sizes")
    n = math.prod(shape)
    if place[1] - place[0] != n * _SAFE_DTYPES[dtype].itemsize:
        raise ValueError(
            f"the tensor {quoted(key)} of shape {shape} has {place[1] - place[0]} bytes"
        )
    if n == 0 and max(shape) > _MAX_AXIS:
        raise ValueError(f"the tensor {quoted(key)} is empty, of size {max(shape)}")
    return _SAFE_DTYPES[dtype], tuple(shape), place[0], place[1]


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class _PickleWriter:
    """Writes plain containers and arrays as the protocol-2 pickle that torch.save makes of them."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.storages: list[np.ndarray] = []
        self.known: dict[int, int] = {}  # id of an array -> its storage

    def name(self, dotted: str) -> None:
        module, _, name = dotted.rpartition(".")
        self.out.write(f"c{module}\n{name}\n".encode())

    def text(self, value: str) -> None:
        raw = value.encode("utf-8", "surrogatepass")
        self.out.write(b"X" + struct.pack("<L", len(raw)) + raw)

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out.write(b"K" + bytes((value,)))
        elif -(2**31) <= value < 2**31:
            self.out.write(b"J" + struct.pack("<l", value))
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > 255:
                raise ValueError(f"an integer of {len(raw)} bytes does not go into a checkpoint")
            self.out.write(b"\x8a" + bytes((len(raw),)) + raw)

    def integers(self, values: tuple[int, ...]) -> None:
        self.out.write(b"(")
        for value in values:
            self.integer(value)
        self.out.write(b"t")

    def tensor(self, value: np.ndarray) -> None:
        if id(value) not in self.known:
            self.known[id(value)] = len(self.storages)
            self.storages.append(value)
        strides, step = [], 1
        for n in reversed(value.shape):
            strides.append(step)
            step *= max(n, 1)
        self.name("torch._utils._rebuild_tensor_v2")
        self.out.write(b"((")
        self.text("storage")
        self.name(f"torch.{_STORAGE_NAMES[value.dtype]}")
        self.text(str(self.known[id(value)]))
        self.text("cpu")
        self.integer(value.size)
        self.out.write(b"tQK\0")
        self.integers(value.shape)
        self.integers(tuple(reversed(strides)))
        self.out.write(b"\x89ccollections\nOrderedDict\n)Rt")
        self.out.write(b"R")

    def write(self, value: Any, where: str) -> None:
        out = self.out
        if value is None or value is True or value is False:
            out.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, str):
            self.text(value)
        elif type(value) is int:
            self.integer(value)
        elif type(value) is float:
            out.write(b"G" + struct.pack(">d", value))
        elif isinstance(value, np.ndarray) and value.dtype in _STORAGE_NAMES:
            self.tensor(value)
        elif isinstance(value, Mapping):
            out.write(b"}(")
            for key, item in value.items():
                if type(key) not in (str, int):
                    raise ValueError(
                        f"{where}: a key of type {type(key).__name__} does not go into a checkpoint"
                    )
                self.write(key, where)
                self.write(item, f"{where}.{key}" if where else str(key))
            out.write(b"u")
        elif isinstance(value, (list, tuple)):
            out.write(b"](" if isinstance(value, list) else b"(")
            for i, item in enumerate(value):
                self.write(item, f"{where}[{i}]")
            out.write(b"e" if isinstance(value, list) else b"t")
        else:
            kind = (
                f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            )
            raise ValueError(f"{where or 'content'}: {kind} does not go into a checkpoint")


def write_torch(path: str | os.PathLike, content: Any, *, overwrite: bool = False) -> None:
    """Writes a checkpoint that `torch.load(weights_only=True)` reads. Needs no torch.

    Args:
      path: file to write; written beside it first and then renamed, so that it is there whole or
        not at all.
      content: nested dicts, lists and tuples of numpy arrays (float, bfloat16, int, bool, complex),
        numbers and text. One array object that stands in several places is stored once, as torch
        does with shared tensors.
      overwrite: replace a file that is there.
    Raises: ValueError for content that does not go into a checkpoint; FileExistsError.
    """
    file = Path(path)
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} is there already; choose another name or overwrite it")
    writer = _PickleWriter()
    writer.out.write(b"\x80\x02")
    writer.write(content, "")
    writer.out.write(b".")
    members: list[tuple[str, bytes | np.ndarray]] = [
        ("data.pkl", writer.out.getvalue()),
        ("byteorder", b"little"),
    ]
    members += [(f"data/{i}", array) for i, array in enumerate(writer.storages)]
    members += [("version", b"3\n")]
    part = file.with_name(f".{file.name}.part{os.getpid()}")
    try:
        with open(part, "wb") as f:
            with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=True) as zipped:
                for name, content_of in members:
                    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
                    head = f.tell() + 30 + len(info.filename) + 4
                    pad = -head % 64  # data starts at a multiple of 64 bytes, as torch has it
                    info.extra = struct.pack("<HH", 0x4246, pad) + b"Z" * pad
                    zipped.writestr(
                        info,
                        content_of if isinstance(content_of, bytes) else _little_endian(content_of),
                    )
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(
    path: str | os.PathLike, state: Mapping[str, np.ndarray], *, overwrite: bool = False
) -> None:
    """Writes a safetensors file as the hub has it (metadata {"format": "pt"}), whole or not at all.

    Raises: FileExistsError.
    """
    file = Path(path)
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} is there already; choose another name or overwrite it")
    part = file.with_name(f".{file.name}.part{os.getpid()}")
    try:
        storage.save_tensors(part, state, {"format": "pt"})
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _little_endian(array: np.ndarray) -> memoryview:
    plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return plain if sys.byteorder == "little" else _swapped(plain, array.dtype)
