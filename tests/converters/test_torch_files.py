"""Torch checkpoint files: what torch writes is read, what we write comes back, views stay inside
their storage.
"""

import argparse
import collections
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from handmade_files import (
    dict_of,
    integer,
    name,
    pickled,
    storage,
    tensor,
    text,
    torch_legacy,
    torch_zip,
    tuple_of,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from converters.torch_files import (
    CheckpointError,
    Placeholder,
    read_safetensors,
    read_torch,
    write_torch,
)

DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
]
DTYPES = [np.dtype(d) for d in (*DTYPES, np.complex64, np.complex128)]


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return isinstance(b, float) and struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and a == b


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == np.bool_:
        raw = bytes(b & 1 for b in raw)
    return np.frombuffer(raw, dtype).reshape(shape)


leaves = (
    arrays()
    | st.integers(-(2**100), 2**100)
    | st.floats()
    | st.text(max_size=5)
    | st.booleans()
    | st.none()
)
contents = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=8) | st.integers(-9, 9), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=4,
)


@given(content=contents)
def test_what_is_written_comes_back(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("trip") / "a.ckpt"
    write_torch(file, content)
    found = read_torch(file)
    assert found.container == "zip" and same(found.content, content)


def test_written_files_are_aligned_whole_and_never_replace_another(tmp_path):
    shared = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_torch(tmp_path / "a.pth", {"a": shared, "b": shared, "c": shared.T})
    with zipfile.ZipFile(tmp_path / "a.pth") as zipped:
        assert zipped.testzip() is None
        entries = [i for i in zipped.infolist() if "/data/" in i.filename]
        assert len(entries) == 2  # a and b share theirs
        for entry in entries:
            raw = (tmp_path / "a.pth").read_bytes()
            lengths = struct.unpack_from("<HH", raw, entry.header_offset + 26)
            assert (entry.header_offset + 30 + sum(lengths)) % 64 == 0
    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises(FileExistsError):
        write_torch(tmp_path / "a.pth", {})
    with pytest.raises(ValueError, match=r"model\.x: set does not go"):
        write_torch(tmp_path / "a.pth", {"model": {"x": {1}}}, overwrite=True)
    assert (tmp_path / "a.pth").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    write_torch(tmp_path / "a.pth", {}, overwrite=True)
    assert read_torch(tmp_path / "a.pth").content == {}


VIEWS = {  # offset, size, stride into arange(12)
    "whole": (0, (3, 4), (4, 1)),
    "transposed": (0, (4, 3), (1, 4)),
    "column": (1, (3,), (4,)),
    "expanded": (2, (2, 5), (1, 0)),
    "scalar": (11, (), ()),
    "empty": (12, (0, 3), (3, 1)),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_into_a_storage(tmp_path, container, view):
    data = np.arange(12, dtype=np.float32)
    offset, size, stride = VIEWS[view]
    body = dict_of(("x", tensor(storage("0", 12), offset, size, stride)))
    if container == "zip":
        file = torch_zip(tmp_path / "a.pt", pickled(body), {"0": data.tobytes()})
    else:
        file = torch_legacy(tmp_path / "a.pt", body, {"0": data})
    expected = (
        np.zeros(size)
        if 0 in size
        else np.lib.stride_tricks.as_strided(data[offset:], size, [4 * s for s in stride])
    )
    found = read_torch(file)
    assert found.container == container
    np.testing.assert_array_equal(found.content["x"], expected)
    assert not found.content["x"].flags.writeable


OUTSIDE = {
    "offset": (12, (1,), (1,)),
    "offset before": (-1, (1,), (1,)),
    "size": (0, (13,), (1,)),
    "stride": (0, (3, 4), (5, 1)),
    "negative stride": (11, (3,), (-1,)),
    "negative size": (0, (-1,), (1,)),
    "overflow": (0, (2**33, 2**33), (0, 0)),
    "huge offset": (2**63, (1,), (1,)),
    "huge stride": (0, (2,), (2**64,)),
    "ranks": (0, (3, 4), (1,)),
    "rank 40": (0, (1,) * 40, (1,) * 40),
    "expanded bomb": (0, (10**12,), (0,)),
    "empty bomb": (0, (0, 10**15), (1, 1)),
}


@pytest.mark.parametrize("view", OUTSIDE)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_views_out_of_a_storage_are_refused(tmp_path, container, view):
    body = dict_of(("x", tensor(storage("0", 12), *OUTSIDE[view])))
    data = np.arange(12, dtype=np.float32)
    if container == "zip":
        file = torch_zip(tmp_path / "a.pt", pickled(body), {"0": data.tobytes()})
    else:
        file = torch_legacy(tmp_path / "a.pt", body, {"0": data})
    with pytest.raises(CheckpointError, match=r"a\.pt: .*tensor"):
        read_torch(file)


@given(
    offset=st.integers(-2, 14),
    size=st.lists(st.integers(-1, 6), max_size=4),
    stride=st.lists(st.integers(-2, 8), max_size=4),
)
def test_any_view_is_right_or_refused(tmp_path_factory, offset, size, stride):
    data = np.arange(12, dtype=np.float32)
    body = dict_of(("x", tensor(storage("0", 12), offset, tuple(size), tuple(stride))))
    file = torch_zip(tmp_path_factory.mktemp("view") / "a.pt", pickled(body), {"0": data.tobytes()})
    valid = len(size) == len(stride) and min([offset, *size, *stride]) >= 0
    reach = offset + sum((s - 1) * t for s, t in zip(size, stride)) if valid else 99
    if valid and (0 in size or reach < 12):
        x = read_torch(file).content["x"]
        index = np.array(list(np.ndindex(*size)), int).reshape(x.size, len(size))
        np.testing.assert_array_equal(
            x.ravel(), data[offset + index @ np.array(stride, int)] if x.size else []
        )
    else:
        with pytest.raises(CheckpointError, match="tensor"):
            read_torch(file)


def test_legacy_storage_views_and_old_rebuilder(tmp_path):
    data = np.arange(12, dtype=np.float32)
    view = tuple_of(text("v"), integer(4), integer(6))  # elements 4 to 9
    body = dict_of(("x", tensor(storage("0", 12, "torch.FloatStorage", view), 1, (2,), (2,))))
    np.testing.assert_array_equal(
        read_torch(torch_legacy(tmp_path / "a", body, {"0": data})).content["x"], [5, 7]
    )
    old = name("torch._utils._rebuild_tensor") + tuple_of(
        storage("0", 12), integer(3), *map(tuple_of, map(integer, (2, 1)))
    )
    found = read_torch(torch_legacy(tmp_path / "b", dict_of(("x", old + b"R")), {"0": data}))
    np.testing.assert_array_equal(found.content["x"], [3, 4])
    view = tuple_of(text("v"), integer(8), integer(6))
    body = dict_of(("x", tensor(storage("0", 12, "torch.FloatStorage", view), 0, (2,), (1,))))
    with pytest.raises(CheckpointError, match="view that reaches out"):
        read_torch(torch_legacy(tmp_path / "c", body, {"0": data}))


def test_big_endian_zip(tmp_path):
    data = np.arange(4, dtype=np.float32)
    body = pickled(dict_of(("x", tensor(storage("0", 4), 0, (4,), (1,)))))
    file = torch_zip(
        tmp_path / "a", body, {"0": data.astype(">f4").tobytes()}, {"archive/byteorder": b"big"}
    )
    np.testing.assert_array_equal(read_torch(file).content["x"], data)


def test_untyped_storage_with_dtype(tmp_path):
    store = storage("0", 8, "torch.storage.UntypedStorage")
    one = tuple_of(integer(2))
    ordered = name("collections.OrderedDict") + b")R"
    args = tuple_of(
        store, integer(1), one, tuple_of(integer(1)), b"\x89", ordered, name("torch.uint16"), b"N"
    )
    body = pickled(dict_of(("x", name("torch._utils._rebuild_tensor_v3") + args + b"R")))
    found = read_torch(
        torch_zip(tmp_path / "a", body, {"0": np.arange(4, dtype=np.uint16).tobytes()})
    )
    np.testing.assert_array_equal(found.content["x"], np.array([1, 2], np.uint16))


class Custom:
    def __init__(self):
        self.x = 1

    def __reduce_ex__(self, protocol):
        raise AssertionError("never called on reading")


@pytest.mark.parametrize("protocol", range(6))
def test_other_objects_are_placeholders(tmp_path, protocol):
    content = {
        "hyper_parameters": argparse.Namespace(lr=1e-3, path=pathlib.PurePosixPath("runs/a")),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, b=[2]),
        "scalar": np.float64(1.5),
        "array": np.arange(3),
        "bytes": b"\x00\xff",
        "set": {1, "a"},
        "frozen": frozenset((2,)),
        "complex": 1j,
        "text": "é\n'\"\\",
        "numbers": [0, -1, 255, 256, 65536, -(2**31), 2**31, 2**200, 1.5, float("inf")],
    }
    read = read_torch(torch_zip(tmp_path / "a", pickle.dumps(content, protocol))).content
    for plain in ("ordered", "bytes", "set", "frozen", "text", "numbers"):
        assert read[plain] == content[plain] and type(read[plain]) in (
            dict,
            bytes,
            set,
            frozenset,
            str,
            list,
        )
    assert read["default"] == {"b": [2]} and type(read["default"]) is dict
    extras = read["hyper_parameters"]
    assert (
        isinstance(extras, Placeholder)
        and extras.name == "argparse.Namespace"
        and extras.state["lr"] == 1e-3
    )
    assert (
        isinstance(extras.state["path"], Placeholder)
        and extras.state["path"].name == "pathlib.PurePosixPath"
    )
    assert isinstance(read["scalar"], Placeholder) and isinstance(read["array"], Placeholder)


def test_files_of_other_kinds_are_named(tmp_path):
    def refused(content: bytes, match: str):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_torch(tmp_path / "a.pth")

    refused(b"", "empty")
    refused(b"<!DOCTYPE html><html>", "not a torch checkpoint")
    refused(b"x" * 257 + b"ustar" + b"x" * 200, "tar file")
    refused(b"\x1f\x8b\x08" + b"x" * 50, "compressed")
    refused(pickle.dumps({"a": 1}), "not one that torch.save wrote")
    with pytest.raises(CheckpointError, match="can't be read"):
        read_torch(tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="can't be read"):
        read_torch(tmp_path)
    torch_zip(
        tmp_path / "script.pt",
        pickled(b"}"),
        more={"archive/constants.pkl": b"", "archive/code/a.py": b""},
    )
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_torch(tmp_path / "script.pt")


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.arange(3, dtype=np.float32)}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_safetensors(tmp_path / "a.safetensors")["x"], [0, 1, 2])
    whole = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (
        whole[:-1],
        whole[:5],
        b"",
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"[" + whole[9:],
    ):
        (tmp_path / "b.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"b\.safetensors: not a readable safetensors"):
            read_safetensors(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError):
        read_safetensors(tmp_path / "none.safetensors")


# --- against torch itself


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.torch
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_torch_files_are_read_as_torch_reads_them(torch, tmp_path, new_format):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    tensors = {
        "base": base,
        "view": base[1:, ::2],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "expanded": torch.ones(1).expand(4),
        **{
            str(d): torch.ones(3).to(d)
            for d in (torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
        },
        "complex": torch.tensor([1 + 2j]),
    }
    bfloat16 = torch.tensor([1.5, -2.25, 3e38]).to(torch.bfloat16)
    content = {
        "state_dict": layer.state_dict(),
        "tensors": tensors,
        "bfloat16": bfloat16,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": argparse.Namespace(
            size=torch.Size((2, 3)), device=torch.device("cpu"), dtype=torch.float32
        ),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new_format)
    found = read_torch(tmp_path / "a.ckpt")
    assert found.container == ("zip" if new_format else "legacy")
    for key, value in tensors.items():
        ours = found.content["tensors"][key]
        assert same(ours, value.detach().numpy()), key
    assert found.content["bfloat16"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        found.content["bfloat16"].astype(np.float32), bfloat16.float().numpy()
    )
    for key, value in layer.state_dict().items():
        assert same(found.content["state_dict"][key], value.numpy())
    moments = found.content["optimizer_states"][0]["state"][0]["exp_avg"]
    np.testing.assert_array_equal(moments, optimizer.state_dict()["state"][0]["exp_avg"].numpy())
    assert found.content["epoch"] == 3 and found.content["hyper_parameters"].state["size"] == (2, 3)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_what_is_written(torch, tmp_path, dtype):
    array = (np.arange(12) % 2).reshape(3, 4).astype(dtype)
    write_torch(
        tmp_path / "a.pth",
        {"a": array, "b": [array, 1, "x", 2.5, None], "c": (), "d": np.array(array[0, 0])},
    )
    found = torch.load(tmp_path / "a.pth", weights_only=True)
    assert found["b"][1:] == [1, "x", 2.5, None] and found["c"] == () and found["d"].shape == ()
    assert found["a"].data_ptr() == found["b"][0].data_ptr()
    assert str(found["a"].dtype) == f"torch.{dtype.name}"
    expected = torch.from_numpy(array.astype(np.complex128 if dtype.kind == "c" else np.float64))
    assert torch.equal(found["a"].to(expected.dtype), expected)
    mapped = torch.load(tmp_path / "a.pth", weights_only=True, mmap=True)
    assert torch.equal(mapped["a"], found["a"])
