"""Checkpoint files made by hand, opcode by opcode and header by header, so that they can be wrong
in any way.
"""

import struct
import zipfile
from pathlib import Path

import numpy as np

from converters import tables, timer
from ltsm_jax.models.timer import Timer, TimerConfig

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


# --- pickles


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(raw),)) + raw


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(*pairs: tuple[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in pairs) + b"u"


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str, numel: int, kind: str = "torch.FloatStorage", *view: bytes) -> bytes:
    return (
        tuple_of(text("storage"), name(kind), text(key), text("cpu"), integer(numel), *view) + b"Q"
    )


def tensor(store: bytes, offset: int, size: tuple, stride: tuple) -> bytes:
    sizes = [tuple_of(*map(integer, numbers)) for numbers in (size, stride)]
    arguments = tuple_of(
        store, integer(offset), *sizes, b"\x89", name("collections.OrderedDict") + b")R"
    )
    return name("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def pickled(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes((protocol,)) + body + b"."


# --- containers


def torch_zip(
    file: Path,
    pickle: bytes,
    storages: dict[str, bytes] | None = None,
    more: dict[str, bytes] | None = None,
):
    """A zip checkpoint with `storages` as its data and `more` entries."""
    entries = {
        "archive/data.pkl": pickle,
        "archive/byteorder": b"little",
        "archive/version": b"3\n",
    }
    entries |= {f"archive/data/{key}": data for key, data in (storages or {}).items()} | (
        more or {}
    )
    with zipfile.ZipFile(file, "w") as zipped:
        for entry, data in entries.items():
            zipped.writestr(zipfile.ZipInfo(entry), data)
    return file


def torch_legacy(
    file: Path, body: bytes, storages: dict[str, np.ndarray], *, little: bool = True, keys=None
):
    """The stream that torch wrote before 1.6: five pickles, then each storage with its length."""
    machine = dict_of(
        ("protocol_version", integer(1001)),
        ("little_endian", b"\x88" if little else b"\x89"),
        ("type_sizes", dict_of(("short", integer(2)), ("int", integer(4)), ("long", integer(4)))),
    )
    listed = b"](" + b"".join(map(text, storages if keys is None else keys)) + b"e"
    parts = [integer(0x1950A86A20F9469CFC6C), integer(1001), machine, body, listed]
    data = b"".join(map(pickled, parts))
    for array in storages.values():
        data += struct.pack("<q", array.size) + array.tobytes()
    file.write_bytes(data)
    return file


# --- a Timer


CONFIG = TimerConfig.of(4, 8, 6, 1, 2, context_len=28, horizon=4)


def timer_state(config: TimerConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict of the original's backbone, in no particular order, with random weights."""
    import jax

    shapes = jax.eval_shape(Timer(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    state, _ = tables.to_state(timer.keys(config), params)
    return state | timer.buffers(config)
