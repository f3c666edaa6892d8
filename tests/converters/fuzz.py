"""Random and mutated checkpoint files against the importer, in a process of its own.

    python tests/converters/fuzz.py SEED COUNT FOLDER

Prints one JSON object: how many files were refused and how many read, the slowest, how far the
memory of the process grew, and the first files on which anything else happened than a
CheckpointError. File `i` of a seed is the same on every run:
`python tests/converters/fuzz.py SEED -I FOLDER` runs file I alone and leaves it in the folder.
"""

import argparse
import collections
import json
import pathlib
import pickle
import random
import resource
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from handmade_files import (
    dict_of,
    name,
    pickled,
    storage,
    tensor,
    text,
    timer_state,
    torch_legacy,
    torch_zip,
)

from converters import CheckpointError, import_checkpoint, pickles

OPCODES = [bytes((code,)) for code, (step, _) in enumerate(pickles._TABLE) if step is not None]
NAMES = [
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "a.B",
    "torch.FloatStorage",
    "torch.BoolStorage",
    "builtins.dict",
    "builtins.set",
    "_codecs.encode",
    "os.system",
    "copyreg._reconstructor",
    "torch._tensor._rebuild_from_type_v2",
    "torch.Size",
    "builtins.frozenset",
]
NUMBERS = [
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**64 - 1,
]
FOUR = np.arange(4, dtype=np.float32)

PLAIN = {
    "epoch": 3,
    "hyper_parameters": argparse.Namespace(
        lr=1e-3, sizes=(1, 2, [3]), path=pathlib.PurePosixPath("a/b")
    ),
    "ordered": collections.OrderedDict(a=1, b=None),
    "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, float("inf")],
    "text": ["", "é", "x" * 300, b"\x00\xff", True, {1, 2}, frozenset("a"), 1j],
    "default": collections.defaultdict(list, {"x": [1], 2: {}}),
}


def _entries(state: dict[str, np.ndarray]) -> bytes:
    entries = []
    for i, (key, value) in enumerate(state.items()):
        strides = tuple(s // value.itemsize for s in value.strides)
        entries.append((key, tensor(storage(str(i), value.size), 0, value.shape, strides)))
    return dict_of(*entries)


STATE = timer_state()
SMALL = {f"layer.{i}.weight": FOUR.reshape(2, 2) for i in range(3)}
WHOLE = [
    (pickled(dict_of(("state_dict", _entries(state)), ("epoch", b"K\x03"))), state)
    for state in (STATE, SMALL)
]
WHOLE += [(pickle.dumps(PLAIN, protocol), {}) for protocol in range(6)]


def argument(rng: random.Random, code: bytes) -> bytes:
    """Bytes that fit behind an opcode, mostly."""
    number = rng.choice(NUMBERS)
    length = rng.choice([0, 1, 3, 20, 300, number])
    short = rng.randbytes(min(length, 300))
    if code in b"XTB" or code == b"\x8b":
        return struct.pack("<L", length & 0xFFFFFFFF) + short
    if code in b"\x8d\x8e\x96":
        return struct.pack("<Q", length) + short
    if code in b"CU" or code in (b"\x8c", b"\x8a"):
        return bytes((length & 255,)) + short[: length & 255]
    if code in b"ILFgpSVP":
        return (
            rng.choice([str(number).encode(), b"'x'", b"1e999", b"\\u0041", b"9" * 5000, short])
            + b"\n"
        )
    if code in b"ci":
        return rng.choice(NAMES).replace(".", "\n", 1).encode() + b"\n"
    widths = {
        b"J": 4,
        b"r": 4,
        b"j": 4,
        b"M": 2,
        b"K": 1,
        b"q": 1,
        b"h": 1,
        b"\x80": 1,
        b"G": 8,
        b"\x95": 8,
    }
    return (
        rng.randbytes(1)[:1].replace(b"\xff", b"\0")
        if widths.get(code) == 1
        else rng.randbytes(widths.get(code, 0))
    )


def stream(rng: random.Random) -> bytes:
    """A random stream of opcodes, with more of those that build something than chance
    would have.
    """
    parts = [b"\x80\x04"]
    builders = [
        b"]",
        b"}",
        b")",
        b"N",
        b"(",
        b"\x8f",
        b"K\1",
        text("key"),
        text("storage"),
        b"\x94",
        b"h\0",
        b"2",
    ]
    builders += [name(dotted) for dotted in NAMES]
    builders += [
        storage("0", 4),
        tensor(storage("0", 4), 0, (2, 2), (2, 1)),
        tensor(storage("0", 4), 0, (9,), (0,)),
    ]
    for _ in range(rng.choice([3, 10, 30, 100, 1000])):
        if rng.random() < 0.5:
            parts.append(rng.choice(builders))
        else:
            code = rng.choice(OPCODES)
            parts.append(code + argument(rng, code))
    if rng.random() < 0.1:
        part = rng.choice(parts)
        parts += [part] * min(rng.choice([100, 10_000, 100_000]), (2 << 20) // len(part))
    return b"".join(parts) + b"."


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` after a few changes of a byte, a number, an opcode or a piece."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 2:
            changed[at : at + rng.choice([0, 1, 4, 40])] = b""
        elif kind == 3:
            other = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[other : other + rng.choice([1, 4, 40, 400])]
        elif kind == 4:
            code = rng.choice(OPCODES)
            changed[at:at] = code + argument(rng, code)
        elif kind == 5:
            changed[at : at + 4] = struct.pack("<L", rng.choice(NUMBERS) & 0xFFFFFFFF)
        else:
            piece = bytes(changed[at : at + rng.choice([1, 2, 8])])
            changed[at:at] = piece * rng.choice([2, 100, 5000])
    return bytes(changed)


def safetensors(rng: random.Random) -> bytes:
    """A mutated safetensors file."""
    header = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BOOL", "shape": [4], "data_offsets": [16, 20]},
    }
    raw = json.dumps(header).encode()
    if rng.random() < 0.8:
        raw = mutated(rng, raw)
        return struct.pack("<Q", len(raw)) + raw + bytes(20)
    return mutated(rng, struct.pack("<Q", len(raw)) + raw + bytes(20))


def write(rng: random.Random, folder: Path, i: int) -> Path:
    """File `i`: a stream or a mutation, in a container that is whole or mutated too."""
    kind = rng.random()
    if kind < 0.05:
        file = folder / f"{i}.safetensors"
        file.write_bytes(safetensors(rng))
        return file
    file = folder / f"{i}.pth"
    data, state = rng.choice(WHOLE[1:]) if rng.random() < 0.9 else WHOLE[0]
    state = state or {"0": FOUR}
    data = stream(rng) if kind < 0.45 else mutated(rng, data)
    if kind < 0.75 or rng.random() < 0.5:
        torch_zip(file, data, {str(j): value.tobytes() for j, value in enumerate(state.values())})
    else:
        arrays = {str(j): value for j, value in enumerate(state.values())}
        torch_legacy(file, data.removeprefix(b"\x80\x02").removesuffix(b"."), arrays)
    if kind > 0.9:
        whole = file.read_bytes()
        file.write_bytes(mutated(rng, whole))
    return file


def run(seed: int, numbers: range, folder: Path, keep: bool) -> dict:
    """What `COUNT` files came to."""
    warnings.simplefilter("error")  # as in the tests: a file leads to no warning either
    found = {"refused": 0, "read": 0, "slowest": 0.0, "slow": [], "failures": []}
    largest = 0
    for i in numbers:
        rng = random.Random(f"{seed} {i}")
        file = write(rng, folder, i)
        largest = max(largest, file.stat().st_size)
        began = time.process_time()
        try:
            import_checkpoint(file)
            found["read"] += 1
        except CheckpointError as error:
            found["refused"] += 1
            message = str(error)
            odd = not message.startswith(str(file)) or len(message) >= 2000
            if odd or not message.replace("\n", "").isprintable():
                found["failures"].append([i, f"message: {message[:300]}"])
        except BaseException as error:
            found["failures"].append([i, f"{type(error).__name__}: {str(error)[:300]}"])
        took = time.process_time() - began
        found["slowest"] = max(found["slowest"], took)
        if took > 2:
            found["slow"].append([i, took])
        if not keep:
            file.unlink()
    return {**found, "largest": largest}


def main() -> None:
    """Run from the command line."""
    seed, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    numbers = range(-count, -count + 1) if count < 0 else range(count)
    # The first import traces a model, which takes memory once.
    run(0, range(1), folder, False)
    began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = run(seed, numbers, folder, count < 0)
    unit = 1 if sys.platform == "darwin" else 1024
    found["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    found["seconds"] = time.time() - began
    print(json.dumps(found))


if __name__ == "__main__":
    main()
