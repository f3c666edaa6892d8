"""Small files that would take long, or much memory: refused at a cost that their bytes bound."""

import json
import os
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from handmade_files import (
    dict_of,
    integer,
    name,
    pickled,
    storage,
    text,
    timer_state,
    torch_legacy,
    torch_zip,
    tuple_of,
)

from converters import CheckpointError, import_checkpoint, pickles, torch_files
from converters.torch_files import read_safetensors, read_torch, write_torch


def refused(file: Path, match: str) -> None:
    """One short error, within 2 seconds (twice that on a busy machine)."""
    began = time.process_time()
    with pytest.raises(CheckpointError, match=match) as error:
        import_checkpoint(file)
    assert time.process_time() - began < 4
    message = str(error.value)
    assert (
        message.startswith(str(file))
        and len(message) < 2000
        and message.replace("\n", "").isprintable()
    )


def refused_in_little_memory(file: Path, match: str) -> None:
    """As `refused`, under 300 MB and twice the size of the file; measured apart, since that takes
    time itself.
    """
    refused(file, match)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            import_checkpoint(file)
        assert tracemalloc.get_traced_memory()[1] < (300 << 20) + 2 * file.stat().st_size
    finally:
        tracemalloc.stop()


def put(tmp_path: Path, data: bytes, suffix: str = ".ckpt") -> Path:
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(data)
    return file


# --- pickles

REBUILD = name("torch._utils._rebuild_tensor_v2")
ONE = storage("0", 1)
SCALAR = tuple_of(ONE, integer(0), b")", b")")
EXPANDED = tuple_of(ONE, integer(0), tuple_of(integer(1 << 21)), tuple_of(integer(0)))
MANY_AXES = tuple_of(ONE, integer(0), *[tuple_of(*[integer(1)] * 32)] * 2)
LONG_STORAGE = tuple_of(
    text("storage"), name("torch.FloatStorage"), text("0" * 100_000), text("cpu"), integer(1)
)
NUMBERS = b"(" + b"".join(integer(i) + b"N" for i in range(20_000)) + b"d"
NONES = b"(" + b"N" * 9000

# by what the file may cost, or done by then
BOUNDED = "much more memory|steps of pickle|holds a list|differ in"
FLOODS = {  # what is stored once (as value 0), what is done again and again, what the refusal says
    "a long tuple as a key": (NONES + b"t", b"}h\0Ns", "type long tuple"),
    "a long tuple in a set": (NONES + b"t", b"\x8f(h\0\x90", "type long tuple"),
    "short tuples as keys": (b"(" + b"N" * 8 + b"t", b"}h\0Ns", "neither text nor integers"),
    "a long name": (text("a" * 100_000), b"h\0h\0\x93", "a name of 200000 characters"),
    "a name": (text("a" * 140), b"h\0h\0\x93", BOUNDED),
    "many names": (b"N", b"ca\nb\n", BOUNDED),
    "a long storage name": (LONG_STORAGE, b"h\0Q", "a name of 100000 characters"),
    "a large state": (NUMBERS, b"ca\nb\nh\0b", BOUNDED),
    "copies of a list": (NONES + b"l", name("builtins.list") + b"h\0\x85R", BOUNDED),
    "copies of a dictionary": (NUMBERS, name("builtins.dict") + b"h\0\x85R", BOUNDED),
    "sets": (b"N", b"\x8f", BOUNDED),
    "frozen sets": (b"N", b"(\x91", BOUNDED),
    "dictionaries": (b"N", b"}NNs", BOUNDED),
    "lists": (b"N", b"]", BOUNDED),
    "objects": (name("a.B"), b"h\0)R", BOUNDED),
    "items of an object": (name("a.B") + b")R", b"h\0NNs0", BOUNDED),
    "tensors": (SCALAR, REBUILD + b"h\0R", BOUNDED),
    "views of many axes": (MANY_AXES, REBUILD + b"h\0R", BOUNDED),
    "expanded tensors": (EXPANDED, REBUILD + b"h\0R", "would expand"),
    "compared with a tensor": (REBUILD + EXPANDED + b"R", b"ca\nb\n)h\0\x92", BOUNDED),
    "bytes of a text": (
        text("x" * 9000),
        name("_codecs.encode") + b"(h\0" + text("latin1") + b"tR",
        BOUNDED,
    ),
}


BOTH_FORMATS = ("sets", "many names", "tensors", "expanded tensors")
FLOODED = [(case, "zip") for case in FLOODS] + [(case, "legacy") for case in BOTH_FORMATS]
# Every other one is for the slow part.
FLOODED = [
    pytest.param(*each, marks=pytest.mark.slow if i % 2 else ()) for i, each in enumerate(FLOODED)
]


@pytest.mark.parametrize(("case", "container"), FLOODED)
def test_floods_cost_no_more_than_their_bytes(tmp_path, monkeypatch, case, container):
    start, step, match = FLOODS[case]
    body = start + b"q\0" + b"0(" + step * 250_000 + b"l"
    if container == "zip":
        file = torch_zip(tmp_path / "bad.ckpt", pickled(body, 4), {"0": bytes(4)})
    else:
        file = torch_legacy(tmp_path / "bad.ckpt", body, {"0": np.zeros(1, np.float32)})
        match = BOUNDED if case == "expanded tensors" else match  # it is run twice
    refused(file, match)

    # What a pickle pays for memory is what memory it takes, about: seen with a small part of the
    # budget.
    monkeypatch.setattr(pickles, "MAX_PICKLE_MEMORY", pickles.MAX_PICKLE_MEMORY // 32)
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 1 << 20)
    body = start + b"q\0" + b"0(" + step * (400_000 // len(step)) + b"l"
    if container == "zip":
        torch_zip(file, pickled(body, 4), {"0": bytes(4)})
    else:
        torch_legacy(file, body, {"0": np.zeros(1, np.float32)})
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            import_checkpoint(file)
        budget = pickles.Budget.of(len(body)).memory
        assert tracemalloc.get_traced_memory()[1] < 1.5 * budget + 3 * file.stat().st_size
    finally:
        tracemalloc.stop()


def test_text_is_paid_for_as_it_lies_in_memory(tmp_path):
    """One character that is not ASCII makes every other one of a text four bytes wide."""
    wide = b"X" + struct.pack("<L", 1 << 20) + b"x" * ((1 << 20) - 4) + "\U0001f600".encode()
    refused_in_little_memory(
        torch_zip(tmp_path / "bad.ckpt", pickled(b"(" + wide * 40 + b"l")), "much more memory"
    )


REMAINDER = (1 << 61) - 1  # Python's hash of an integer is what is left of it by this
COLLISIONS = {
    "wide integers": (
        b"".join(integer(i * REMAINDER) + b"N" for i in range(1, 20_000)),
        "type wide integer",
    ),
    "fractions": (
        b"".join(b"G" + struct.pack(">d", 2.0**i) + b"N" for i in range(-1000, 1000)),
        "neither text nor",
    ),
    "pairs": (
        b"".join(tuple_of(integer(i), integer(-i)) + b"N" for i in range(2000)),
        "neither text nor integers",
    ),
    "nested tuples": (
        b"".join(tuple_of(tuple_of(integer(i))) + b"N" for i in range(2000)),
        "element of type tuple",
    ),
    "lists": (b"]N" * 2000, "element of type list"),
}


@pytest.mark.parametrize("case", COLLISIONS)
def test_keys_whose_hashes_a_file_chooses(tmp_path, case):
    keys, match = COLLISIONS[case]
    refused(torch_zip(tmp_path / "bad.ckpt", pickled(b"}(" + keys + b"u")), match)


DIGITS = b"7" * 100_000
WIDE_NUMBERS = {
    "LONG4": b"\x8b" + struct.pack("<l", 1 << 20) + b"\x7f" * (1 << 20),
    "LONG": b"L" + DIGITS + b"L\n",
    "INT": b"I" + DIGITS + b"\n",
    "FLOAT": b"F" + DIGITS + b"\n",
    "GET": b"Ng" + DIGITS + b"\n",
    "PUT": b"Np" + DIGITS + b"\n",
}
MAGIC = integer(0x1950A86A20F9469CFC6C)


@pytest.mark.parametrize("container", ["zip", "version", "magic"])
@pytest.mark.parametrize("case", WIDE_NUMBERS)
def test_wide_numbers(tmp_path, case, container):
    body = WIDE_NUMBERS[case]
    if container == "zip":
        file = torch_zip(tmp_path / "bad.ckpt", pickled(body))
    else:
        parts = [MAGIC, body, b"}"] if container == "version" else [body]
        file = put(tmp_path, b"".join(map(pickled, parts)))
    refused(file, "integer of|Exceeds the limit")


VERSIONS = {
    "nested": b")" + b"\x85" * 5000,
    "255 bytes": b"\x8a\xff" + b"\x7f" * 255,
    "text": text("x" * 100_000),
    "object": name("a.B") + b")R",
    "dictionary in itself": b"}q\0K\0h\0s",
}


@pytest.mark.parametrize("case", VERSIONS)
def test_versions_that_are_none(tmp_path, case):
    parts = [MAGIC, VERSIONS[case], b"}"]
    refused(put(tmp_path, b"".join(map(pickled, parts))), "of the old torch format is unknown")


@pytest.mark.parametrize("per_layer", [1, 3], ids=["one of each layer", "three of each layer"])
@pytest.mark.parametrize("first", ["whole", "alike"])
def test_a_name_for_each_of_many_layers_builds_none(tmp_path, per_layer, first):
    """400 kB that would have a model of 500 layers built, half a minute."""
    state = timer_state()
    layer = {key: value for key, value in state.items() if ".attn_layers.0." in key}
    few = list(layer)[:per_layer]
    rest = {key: value for key, value in state.items() if key not in layer}
    deep = {key.replace(".0.", f".{i}."): layer[key] for i in range(100) for key in few}
    write_torch(tmp_path / "bad.pth", rest | deep | (layer if first == "whole" else {}))
    refused(
        tmp_path / "bad.pth",
        "'decoder.attn_layers' has 100 layers, of which .* most of the model is missing",
    )


LONG_KEY = "a." * 100_000 + "x"
KEYS = {
    "a key of many parts": dict_of((LONG_KEY, REBUILD + SCALAR + b"R")),
    "and a short one": dict_of((LONG_KEY, REBUILD + SCALAR + b"R"), ("b", b"N")),
    "many beginnings": dict_of(
        ("a", REBUILD + SCALAR + b"Rq\0"), *[(f"{i}.b", b"h\0") for i in range(49_000)]
    ),
    "one dictionary under many names": b"}("
    + text("first")
    + dict_of(("a", REBUILD + SCALAR + b"Rq\0"), *[(f"{i}.b", b"h\0") for i in range(5000)])
    + b"q\1"
    + b"".join(text(f"n{i}") + b"h\1" for i in range(5000))
    + b"u",
    "too many": dict_of(
        ("a", REBUILD + SCALAR + b"Rq\0"), *[(f"{i}.b", b"h\0") for i in range(60_000)]
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_are_long_or_many(tmp_path, case):
    refused(
        torch_zip(tmp_path / "bad.ckpt", pickled(KEYS[case]), {"0": bytes(4)}),
        "no known model|more than any known",
    )


# --- storages


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_storage_is_looked_through_once(tmp_path, container, monkeypatch):
    """A megabyte of bools under 2,000 tensors: two gigabytes, were it looked through for each of
    them.
    """
    n = 1 << 20
    view = tuple_of(text("view"), integer(0), integer(1))
    whole = storage("0", n, "torch.BoolStorage", *([view] if container == "legacy" else []))
    one = REBUILD + tuple_of(whole, integer(0), tuple_of(integer(1)), tuple_of(integer(1))) + b"R"
    body = dict_of(*[(f"key {i}", one) for i in range(2000)])
    zeros = np.zeros(n, np.bool_)
    if container == "zip":
        file = torch_zip(tmp_path / "bad.ckpt", pickled(body), {"0": zeros.tobytes()})
    else:
        file = torch_legacy(tmp_path / "bad.ckpt", body, {"0": zeros})
    looked = []
    made = torch_files._whole_storage

    def counted(*arguments):
        looked.append(arguments)
        return made(*arguments)

    monkeypatch.setattr(torch_files, "_whole_storage", counted)
    refused(file, "no known model")
    assert len(looked) == 1


def test_a_storage_has_one_type(tmp_path):
    """torch.save writes none that has two; each would be another look through the same bytes."""
    floats = (
        REBUILD + tuple_of(storage("0", 1, "torch.FloatStorage"), integer(0), b")", b")") + b"R"
    )
    bools = REBUILD + tuple_of(storage("0", 4, "torch.BoolStorage"), integer(0), b")", b")") + b"R"
    body = dict_of(("floats", floats), ("bools", bools))
    refused(
        torch_zip(tmp_path / "bad.ckpt", pickled(body), {"0": bytes(4)}),
        "declared twice, differently",
    )


def test_tensors_under_several_names_are_no_expansion(tmp_path):
    """Four names of one tensor are what a program writes that registers a module again; nine are
    not.
    """
    n = 1 << 22
    one = (
        REBUILD
        + tuple_of(storage("0", n), integer(0), tuple_of(integer(n)), tuple_of(integer(1)))
        + b"R"
    )
    for names in (4, 9):
        body = dict_of(*[(f"key {i}", one) for i in range(names)])
        file = torch_zip(tmp_path / "bad.ckpt", pickled(body), {"0": bytes(4 * n)})
        if names == 4:
            assert len(read_torch(file).content) == 4
        else:
            refused(file, "would expand")


# --- zip files


def overlapping(count: int, body: bytes) -> bytes:
    """A zip file whose entries all end at one place: each has all headers after its own in it, and
    the body.
    """
    rest, entries = body, []
    for i in reversed(range(count)):
        raw = f"archive/data/{i:05d}".encode()
        crc, size = zlib.crc32(rest), len(rest)
        rest = (
            struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, crc, size, size, len(raw), 0)
            + raw
            + rest
        )
        entries.append((raw, crc, size, len(rest)))
    listed = b""
    for raw, crc, size, back in reversed(entries):
        place = len(rest) - back
        fields = (20, 20, 0, 0, 0, 0, crc, size, size, len(raw), 0, 0, 0, 0, 0, place)
        listed += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields) + raw
    return (
        rest
        + listed
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(listed), len(rest), 0)
    )


def test_overlapping_entries_are_refused_before_one_is_read(tmp_path, monkeypatch):
    file = put(tmp_path, overlapping(300, b"x" * 10_000))
    with zipfile.ZipFile(file) as zipped:
        infos = zipped.infolist()
    assert len(infos) == 300 and infos[0].file_size > 20_000  # a valid list of entries
    read = []
    monkeypatch.setattr(torch_files.zlib, "crc32", read.append)
    refused_in_little_memory(file, "entries 'archive/data/00000' and 'archive/data/00001' overlap")
    assert not read


@pytest.mark.slow
def test_a_zip_file_of_many_entries(tmp_path):
    entries = {f"{i:x}": b"" for i in range(70_000)}
    refused_in_little_memory(
        torch_zip(tmp_path / "bad.ckpt", pickled(b"}"), None, entries),
        "70003 entries, which no checkpoint needs",
    )


def test_fields_of_a_zip_header_are_few(tmp_path):
    """A field takes four bytes and a step, and a header has room for 16,000 of them."""
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as zipped:
        info = zipfile.ZipInfo("archive/data.pkl")
        info.extra = struct.pack("<HH", 0x4246, 0) * 16_000
        zipped.writestr(info, pickled(b"}"))
    data = (tmp_path / "bad.ckpt").read_bytes()
    at = data.rindex(b"PK\x01\x02")
    refused(put(tmp_path, data[: at + 20] + b"\xff" * 8 + data[at + 28 :]), "zip64 size is missing")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    refused_for = "not a plain file"
    with pytest.raises(CheckpointError, match=refused_for):
        import_checkpoint(tmp_path / f"pipe{suffix}")


# --- safetensors and JSON


def safe(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file; size: what it says its header has."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def f32(low: int, high: int, shape: object = None, **more) -> dict:
    shape = [(high - low) // 4] if shape is None else shape
    return {"dtype": "F32", "shape": shape, "data_offsets": [low, high], **more}


SAFE = {
    "header of 2**63": (safe({}, size=2**63), "reaches over the end"),
    "header cut": (safe({}, size=3), "reaches over the end"),
    "header of 5 MB": (safe(b"{}" + b" " * (5 << 20)), "which no checkpoint needs"),
    "no object": (safe([]), "not a JSON object"),
    "no JSON": (safe(b"{'x'}"), "not a readable"),
    "not UTF-8": (safe(b'{"\xff":1}'), "decode"),
    "deep": (safe(b'{"a":' + b"[" * 1_000_000), "not a readable"),
    "many lists": (safe(b'{"a":[' + b"[]," * 300_000 + b"[]]}"), "no dtype, shape"),
    "wide number": (safe(b'{"a":' + b"9" * 1_000_000 + b"}"), "Exceeds the limit"),
    "key twice": (safe(b'{"a":1,"a":1}'), "twice"),
    "overlap": (
        safe({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)),
        "begins at byte 4, where the one before ends at 8",
    ),
    "gap": (safe({"a": f32(0, 4), "b": f32(8, 12)}, bytes(12)), "begins at byte 8"),
    "too short": (safe({"a": f32(0, 8)}, bytes(4)), "reaches over the end of the file"),
    "too long": (safe({"a": f32(0, 8)}, bytes(12)), "its tensors have 8 bytes, the file 12"),
    "shape": (safe({"a": f32(0, 8, [3])}, bytes(8)), "has 8 bytes"),
    "huge shape": (safe({"a": f32(0, 8, [2**62, 4])}, bytes(8)), "has 8 bytes"),
    "wide shape": (safe({"a": f32(0, 8, [10**600])}, bytes(8)), "not sizes"),
    "negative shape": (safe({"a": f32(0, 8, [-1, -2])}, bytes(8)), "not sizes"),
    "backwards": (safe({"a": f32(8, 0, [0])}, bytes(8)), "has -8 bytes"),
    "text as shape": (safe({"a": f32(0, 8, "2")}, bytes(8)), "not sizes"),
    "bool as shape": (safe({"a": f32(0, 8, [True, 2])}, bytes(8)), "not sizes"),
    "huge and empty": (safe({"a": f32(0, 0, [0, 2**62])}), "is empty, of size"),
    "many axes": (safe({"a": f32(0, 4, [1] * 33)}, bytes(4)), "not sizes"),
    "unknown type": (
        safe({"a": f32(0, 8) | {"dtype": "F4"}}, bytes(8)),
        "type 'F4', which is not supported",
    ),
    "a list as type": (safe({"a": f32(0, 8) | {"dtype": []}}, bytes(8)), "type list"),
    "more fields": (safe({"a": f32(0, 8, more=1)}, bytes(8)), "no dtype, shape"),
    "bool": (
        safe({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2"),
        "other than 0 and 1",
    ),
    "no tensors": (safe({"__metadata__": {"format": "pt"}}), "is empty"),
    "long key": (safe({"x" * 1_000_000: f32(0, 4)}, bytes(4)), "no known model"),
    "long misfit": (safe({"x" * 1_000_000: f32(0, 4, [7] * 32)}, bytes(4)), "has 4 bytes"),
}


@pytest.mark.parametrize("case", SAFE)
def test_safetensors_that_lie(tmp_path, case):
    data, match = SAFE[case]
    refused_in_little_memory(put(tmp_path, data, ".safetensors"), match)


def test_safetensors_are_read_as_the_library_reads_them(tmp_path):
    from safetensors.numpy import load_file, save_file

    arrays = {}
    for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"):
        arrays[kind] = (np.arange(6).reshape(2, 3) % 2).astype(kind)
    arrays["scalar"] = np.array(3, np.float32)
    arrays["empty"] = np.zeros((0, 3), np.float32)
    arrays["none"] = np.zeros(0, np.int8)
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found, expected = (
        read_safetensors(tmp_path / "a.safetensors"),
        load_file(tmp_path / "a.safetensors"),
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        assert found[key].tobytes() == value.tobytes()
        assert not found[key].flags.writeable


MANY_FILES = {"weight_map": {f"{i}": f"{i}.bin" for i in range(40_000)}}
INDEXES = {
    "large": (b'{"weight_map": {' + b" " * (5 << 20) + b"}}", "more than 4 MB"),
    "deep": (b"[" * 1_000_000, "not readable JSON"),
    "many lists": (b"[" + b"[]," * 300_000 + b"[]]", "has no weight_map"),
    "many files": (json.dumps(MANY_FILES).encode(), "and 39995 more"),
    "outside": (
        json.dumps({"weight_map": {"a": "../" * 50_000 + "a.bin"}}).encode(),
        "outside its folder",
    ),
    "itself": (json.dumps({"weight_map": {"a": "bad.bin.index.json"}}).encode(), "another index"),
    "long key": (
        json.dumps({"weight_map": {"x" * 1_000_000: "y" * 1_000_000}}).encode(),
        "outside its folder",
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c == "many files" else c for c in INDEXES]
)
def test_indexes_that_lie(tmp_path, case):
    data, match = INDEXES[case]
    refused_in_little_memory(put(tmp_path, data, ".bin.index.json"), match)
