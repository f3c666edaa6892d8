"""Damaged and hostile checkpoint files: each gives one clear error, runs nothing and leaves nothing
behind.
"""

import io
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from handmade_files import (
    CONFIG,
    dict_of,
    integer,
    name,
    pickled,
    storage,
    tensor,
    text,
    timer_state,
    torch_legacy,
    torch_zip,
    tuple_of,
)

from converters import CheckpointError, import_checkpoint, timer
from converters.torch_files import read_torch, write_torch

PUBLISHED = timer.published(CONFIG)
STATE = {f"model.{key}": value for key, value in timer_state().items()}
MEMORY = 64 << 20  # more than any of these files may make the reader hold


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """An undamaged Lightning checkpoint of a small Timer."""
    file = tmp_path_factory.mktemp("whole") / "whole.ckpt"
    write_torch(file, {"epoch": 3, "state_dict": STATE})
    import_checkpoint(file, config=PUBLISHED)
    return file.read_bytes()


@pytest.fixture(scope="module")
def whole_legacy(tmp_path_factory) -> bytes:
    """The same in the format before torch 1.6."""
    file = tmp_path_factory.mktemp("whole") / "whole.ckpt"
    torch_legacy(file, legacy_body(), {str(i): value for i, value in enumerate(STATE.values())})
    import_checkpoint(file, config=PUBLISHED)
    return file.read_bytes()


def legacy_body() -> bytes:
    entries = []
    for i, (key, value) in enumerate(STATE.items()):
        strides = tuple(s // value.itemsize for s in value.strides)
        entries.append((key, tensor(storage(str(i), value.size), 0, value.shape, strides)))
    return dict_of(("state_dict", dict_of(*entries)))


def refused(file: Path, match: str, **options) -> str:
    """The one error that importing `file` gives; nothing else may happen."""
    folder = file.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=match) as error:
        import_checkpoint(file, folder / "model", **{"config": PUBLISHED, **options})
    message = str(error.value)
    assert (
        file.name in message.split("\n")[0]
        and len(message) < 2000
        and message.replace("\n", "").isprintable()
    )
    assert error.value.__cause__ is None
    assert sorted(folder.rglob("*")) == before  # no canary, no model, no part of one
    return message


def put(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "bad.ckpt"
    file.unlink(missing_ok=True)  # where a file is replaced, ext4 waits for the disk
    file.write_bytes(content)
    return file


# --- damage


@pytest.mark.parametrize("part", range(40))
def test_cut_zip(tmp_path, whole, part):
    refused(
        put(tmp_path, whole[: part * len(whole) // 40 + (part % 7)]), "cut|empty|not a torch|end"
    )


@pytest.mark.parametrize("back", [1, 2, 21, 22, 23, 100, 500])
def test_cut_zip_near_its_end(tmp_path, whole, back):
    refused(put(tmp_path, whole[:-back]), "cut|does not end|not where")


@pytest.mark.parametrize("part", range(30))
def test_cut_legacy(tmp_path, whole_legacy, part):
    refused(
        put(tmp_path, whole_legacy[: part * len(whole_legacy) // 30 + (part % 7)]),
        "ends|cut|empty|not a torch",
    )


@pytest.mark.parametrize("back", [1, 8, 40])
def test_cut_legacy_near_its_end(tmp_path, whole_legacy, back):
    refused(put(tmp_path, whole_legacy[:-back]), "cut")


@pytest.mark.parametrize("extra", [b"\0", b"PK\x05\x06" + b"\0" * 18, b"x" * 70_000])
def test_bytes_after_the_end(tmp_path, whole, whole_legacy, extra):
    refused(
        put(tmp_path, whole + extra),
        "does not end|end of the zip|not where|damaged|cut|declares|longer|data.pkl",
    )
    refused(put(tmp_path, whole_legacy + extra), "follow the last storage")


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes((data[at] ^ (1 << bit),)) + data[at + 1 :]


def spans(data: bytes) -> dict[str, range]:
    """Where the parts of a zip file lie."""
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        infos = {i.filename.partition("/")[2]: i for i in zipped.infolist()}
        directory = zipped.start_dir
    out = {}
    for key in ("data.pkl", "data/0", "data/5", "version", "byteorder"):
        info = infos[key]
        start = (
            info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
        )
        out[key] = range(start, start + info.file_size)
        out[f"header of {key}"] = range(
            info.header_offset, info.header_offset + 30 + len(info.filename)
        )
    out["directory"] = range(directory, directory + 400)
    out["end"] = range(len(data) - 22, len(data))
    return out


PARTS = [
    "data.pkl",
    "data/0",
    "data/5",
    "version",
    "byteorder",
    "header of data.pkl",
    "header of data/0",
    "end",
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("i", range(10))
def test_flipped_bit_in_a_part_of_the_zip(tmp_path, whole, part, i):
    span = spans(whole)[part]
    at = span[min(len(span) - 1, i * len(span) // 10)]
    refused(
        put(tmp_path, flipped(whole, at, (3 * i) % 8)),
        r"CRC-32|match|zip|entr|not a torch|header|folder|names? ",
    )


def test_no_flipped_bit_goes_unseen(tmp_path):
    """Every byte of a small file, one bit each: an error, or the very same content."""
    write_torch(tmp_path / "small.pth", {"x": np.arange(3, dtype=np.float32), "y": 1})
    data = (tmp_path / "small.pth").read_bytes()
    unseen = []
    for at in range(len(data)):
        file = put(tmp_path, flipped(data, at, at % 8))
        try:
            content = read_torch(file).content
        except CheckpointError:
            continue
        assert list(content) == ["x", "y"] and content["y"] == 1
        assert content["x"].tobytes() == np.arange(3, dtype=np.float32).tobytes()
        unseen.append(at)
    assert len(unseen) < len(data) / 2  # padding, and who made the file: nothing that is used


def test_flips_in_a_legacy_pickle_never_crash(tmp_path, whole_legacy):
    """That format has no checksum: a flipped header is an error, or names another key or number, or
    stays unseen.
    """
    errors = 0
    for at in range(0, 2500, 20):
        try:
            import_checkpoint(put(tmp_path, flipped(whole_legacy, at, at % 8)), config=PUBLISHED)
        except CheckpointError:
            errors += 1
    assert errors > 75


# --- keys, shapes, types, values

KEYS = list(STATE)


@pytest.mark.parametrize("key", KEYS)
def test_missing_key(tmp_path, key):
    write_torch(tmp_path / "bad.ckpt", {"state_dict": {k: v for k, v in STATE.items() if k != key}})
    message = refused(tmp_path / "bad.ckpt", "missing in the checkpoint")
    assert key.removeprefix("model.") in message


@pytest.mark.parametrize("key", KEYS)
def test_misshapen_key(tmp_path, key):
    value = STATE[key]
    wrong = value[..., None] if KEYS.index(key) % 2 else np.concatenate([value, value])
    write_torch(tmp_path / "bad.ckpt", {"state_dict": STATE | {key: wrong}})
    refused(tmp_path / "bad.ckpt", "does not fit|does not go with")


@pytest.mark.parametrize("key", KEYS[::3])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.bool_, np.complex64])
def test_wrong_dtype(tmp_path, key, dtype):
    write_torch(tmp_path / "bad.ckpt", {"state_dict": STATE | {key: STATE[key].astype(dtype)}})
    if dtype is np.float64 and key.endswith(
        timer.TABLE
    ):  # not a parameter: kept as it is, nothing is rounded
        kept = import_checkpoint(tmp_path / "bad.ckpt")[3]
        assert kept[timer.TABLE].tobytes() == STATE[key].astype(dtype).tobytes()
        return
    refused(tmp_path / "bad.ckpt", "rounded to float32|complex|sinusoid|model ")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", KEYS[::5])
def test_non_finite_values(tmp_path, key, bad):
    value = STATE[key].copy()
    value.flat[value.size // 2] = bad
    write_torch(tmp_path / "bad.ckpt", {"state_dict": STATE | {key: value}})
    message = refused(tmp_path / "bad.ckpt", "NaN, infinite|sinusoid table")
    assert key.removeprefix("model.") in message


SURPLUS = [
    "model.decoder.attn_layers.0.norm3.weight",
    "model.extra",
    "decoder.norm.weight",
    "",
    "model.",
    "model.é\x1b[31m",
    "model.decoder.attn_layers.7.norm1.weight",
    "model.decoder.attn_layers.99999999999999999999.norm1.weight",
    "model." + "x" * 100_000,
    "os.system('x')",
    "'; DROP TABLE --",
    "../../etc/passwd\0",
]


@pytest.mark.parametrize("key", SURPLUS, ids=lambda k: ascii(k)[:40])
def test_surplus_key(tmp_path, key):
    write_torch(tmp_path / "bad.ckpt", {"state_dict": STATE | {key: np.ones(8, np.float32)}})
    refused(tmp_path / "bad.ckpt", "no rule matches|the model has no", config=PUBLISHED)


NOT_WEIGHTS = {
    "empty": {},
    "no state dict": {"epoch": 3},
    "number": 3,
    "list": [STATE],
    "state dict a number": {"state_dict": 3},
    "state dict empty": {"state_dict": {}},
    "number keys": {"state_dict": {0: np.ones(3, np.float32)}},
    "text for a tensor": {"state_dict": STATE | {KEYS[0]: "x"}},
    "list for a tensor": {"state_dict": STATE | {KEYS[1]: [1.0]}},
    "another model": {"state_dict": {"encoder.weight": np.ones(3, np.float32)}},
    "two models": {"state_dict": STATE | {f"other.{k}": v for k, v in STATE.items()}},
    "too deep": {"a": {"b": {"c": {"d": STATE}}}},
    "many layers": {
        "state_dict": STATE
        | {f"model.decoder.attn_layers.{i}.norm1.bias": np.ones(8, np.float32) for i in range(3000)}
    },
}


EXTRAS = {
    "numbers of 5000 digits": {"d_model": 10**600, "n_heads": -(10**600), "patch_len": 1},
    "text": dict.fromkeys(("d_model", "n_heads", "patch_len"), 1)
    | {"d_ff": "x" * 10**6, "e_layers": "\x1b[31m"},
    "nested": dict.fromkeys(("d_model", "n_heads", "patch_len"), 1)
    | {"seq_len": [[[["x"]]]], "dropout": {}},
    "layers": dict.fromkeys(("d_model", "n_heads", "patch_len", "d_ff"), 1) | {"e_layers": 10**9},
}


@pytest.mark.parametrize("case", EXTRAS)
def test_hyper_parameters_that_lie(tmp_path, case):
    write_torch(tmp_path / "bad.ckpt", {"state_dict": STATE, "hyper_parameters": EXTRAS[case]})
    refused(tmp_path / "bad.ckpt", "does not go with the weights", config=None)


def test_too_many_layers(tmp_path):
    layers = {
        k.replace("layers.0", f"layers.{i}"): v
        for i in range(600)
        for k, v in STATE.items()
        if "layers.0" in k
    }
    write_torch(tmp_path / "bad.ckpt", {"state_dict": STATE | layers})
    refused(tmp_path / "bad.ckpt", "without a gap", config=None)


def test_extras_that_would_fill_the_terminal(tmp_path):
    extras = {
        "a": "\x1b[31m",
        "b" * 10**6: 1,
        "c": "x" * 10**6,
        "d": float("nan"),
        "e": float("inf"),
        "\x07": 1,
        "epoch": 3,
    }
    write_torch(tmp_path / "odd.ckpt", {"state_dict": STATE, **extras})
    _, _, provenance, _ = import_checkpoint(
        tmp_path / "odd.ckpt", tmp_path / "model", config=PUBLISHED
    )
    assert provenance["extras"] == {"epoch": 3} and provenance["ignored"] == ["a", "c", "d", "e"]


@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_not_the_weights_of_a_model(tmp_path, case):
    write_torch(tmp_path / "bad.ckpt", NOT_WEIGHTS[case])
    refused(tmp_path / "bad.ckpt", ".")


# --- pickles that would run code

DANGEROUS = """
os.system posix.system nt.system subprocess.Popen subprocess.check_output builtins.eval
builtins.exec builtins.getattr builtins.__import__ builtins.open builtins.compile __builtin__.eval
__builtin__.apply commands.getoutput runpy.run_path runpy._run_code shutil.rmtree
socket.create_connection pty.spawn importlib.import_module operator.attrgetter
operator.methodcaller codecs.decode _codecs.decode ctypes.CDLL webbrowser.open pickle.loads
_pickle.loads marshal.loads types.FunctionType types.CodeType functools.reduce
functools.partialmethod timeit.timeit code.interact pdb.run cProfile.run bdb.Bdb sys.exit
tempfile.mkstemp pathlib.Path.unlink io.open glob.glob multiprocessing.Process threading.Thread
asyncio.run http.client.HTTPConnection urllib.request.urlopen zipfile.ZipFile torch.hub.load
torch.load torch.jit.load torch.ops.load_library torch.utils.cpp_extension.load
torch.storage._load_from_bytes torch.serialization.load torch.distributed.rpc.rpc_sync numpy.load
numpy.fromfile numpy.testing._private.utils.runstring numpy.f2py.compile pip.main setuptools.setup
cloudpickle.loads dill.loads joblib.load pandas.read_pickle torch.os.system
collections.abc.sys.exit argparse._sys.exit logging.os.system ltsm_jax.load jax.jit
copyreg.add_extension inspect.getsource gc.get_objects atexit.register signal.raise_signal
uuid.os.system argparse.Namespace.__init__.__globals__ random._os.system enum.sys.modules
builtins.dict.__class__ typing.get_type_hints.__globals__
""".split()  # noqa: SIM905


def attack(dotted: str, form: str, canary: Path) -> bytes:
    """A pickle that would call `dotted` in one of the ways a pickle can."""
    module, _, attribute = dotted.rpartition(".")
    if form in ("stack_global", "first"):  # protocol 4 splits where it likes
        module, _, attribute = dotted.partition(".")
    argument = text(f"touch {canary}")
    called = {
        "reduce": name(dotted) + tuple_of(argument) + b"R",
        "stack_global": text(module) + text(attribute) + b"\x93" + tuple_of(argument) + b"R",
        "inst": b"(" + argument + f"i{module}\n{attribute}\n".encode(),
        "obj": b"(" + name(dotted) + argument + b"o",
        "newobj": name(dotted) + tuple_of(argument) + b"\x81",
        "newobj_ex": name(dotted) + tuple_of(argument) + b"}\x92",
        "named only": name(dotted),
    }[form]
    good = b"".join(
        text(key) + value for key, value in (("epoch", integer(3)), ("hyper_parameters", called))
    )
    return pickled(b"}(" + good + b"u", 4)


FORMS = ["reduce", "stack_global", "inst", "obj", "newobj", "newobj_ex", "named only"]


@pytest.mark.parametrize("dotted", DANGEROUS)
@pytest.mark.parametrize("form", ["reduce", "stack_global"])
def test_dangerous_names(tmp_path, dotted, form):
    file = torch_zip(tmp_path / "bad.ckpt", attack(dotted, form, tmp_path / "canary"))
    message = refused(file, "which no checkpoint needs")
    assert dotted.replace("__builtin__", "builtins") in message


@pytest.mark.parametrize(
    "dotted", ["os.system", "posix.system", "builtins.eval", "subprocess.call"]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_every_way_to_call(tmp_path, dotted, form, container):
    body = attack(dotted, form, tmp_path / "canary")
    if container == "zip":
        file = torch_zip(tmp_path / "bad.ckpt", body)
    else:
        file = torch_legacy(tmp_path / "bad.ckpt", body[2:-1], {})
    assert dotted in refused(file, "which no checkpoint needs")


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["extra", "weight", "all", "legacy header"])
def test_reduce_of_python(tmp_path, protocol, place):
    evil = Evil(f"touch {tmp_path / 'canary'}")
    content = {"extra": {"x": [1, evil]}, "weight": {"state_dict": {KEYS[0]: evil}}}.get(
        place, evil
    )
    data = pickle.dumps(content, protocol)
    if place == "legacy header":
        file = put(tmp_path, data)
        refused(file, r"which no checkpoint needs|not a torch checkpoint")
    else:
        refused(torch_zip(tmp_path / "bad.ckpt", data), r"(os|posix|nt)\.system")


ONE = tensor(storage("0", 1), 0, (1,), (1,))
ORDERED = name("collections.OrderedDict") + b")R"
TRICKS = {
    # names that exist, used for what they are not
    "codecs": (
        name("_codecs.encode") + tuple_of(text("x"), text("rot13")) + b"R",
        "something else than bytes",
    ),
    "call a tensor": (ONE + b")R", "calls a ndarray"),
    "call a dict": (b"})R", "calls a dict"),
    "call text": (text("os.system") + b")R", "calls a str"),
    "arguments a list": (name("a.B") + b"]R", "not a tuple"),
    "name by number": (integer(1) + integer(2) + b"\x93", "not text"),
    "name by a name": (name("a.B") + text("c") + b"\x93", "not text"),
    "tensor without storage": (
        name("torch._utils._rebuild_tensor_v2") + tuple_of(b"N", b"N", b"N", b"N") + b"R",
        "storage",
    ),
    "tensor of no arguments": (name("torch._utils._rebuild_tensor_v2") + b")R", "argument"),
    "parameter of a dict": (
        name("torch._utils._rebuild_parameter") + tuple_of(b"}", b"\x88", b"}") + b"R",
        "Parameter",
    ),
    "unknown dtype": (
        name("torch._utils._rebuild_tensor_v3")
        + tuple_of(*[b"N"] * 6, name("torch.float4"))
        + b"R",
        "float4",
    ),
    "dict of numbers": (
        name("builtins.dict") + tuple_of(integer(10**18)) + b"R",
        "not a container",
    ),
    "bytes by count": (name("builtins.list") + tuple_of(text("x" * 99)) + b"R", "not a container"),
    "dict of odd pairs": (name("collections.OrderedDict") + tuple_of(b"](]e") + b"R", "not pairs"),
    # attributes
    "class of a dict": (ORDERED + dict_of(("__class__", name("a.B"))) + b"b", "sets __class__"),
    "setstate": (
        name("a.B") + b")R" + dict_of(("__setstate__", name("a.C"))) + b"b",
        "sets __setstate__",
    ),
    "slots": (
        name("a.B") + b")\x81" + tuple_of(b"N", dict_of(("__reduce__", b"N"))) + b"b",
        "sets __reduce__",
    ),
    "attributes of a list": (b"]" + dict_of(("x", b"N")) + b"b", "attributes of a list"),
    "attributes of a number": (integer(3) + b"}b", "attributes of a int"),
    # references outside
    "foreign id": (text("x") + b"Q", "outside it that is not a torch storage"),
    "text id": (b"Pos.system\n", "outside it that is not a torch storage"),
    "storage of no type": (
        tuple_of(text("storage"), text("f"), text("0"), text("cpu"), integer(1)) + b"Q",
        "storage of type",
    ),
    "storage of a class": (storage("0", 1, "a.Storage"), "storage of type 'a.Storage'"),
    "storage name": (
        tuple_of(text("storage"), name("torch.FloatStorage"), b"N", b"N", integer(1)) + b"Q",
        "not text",
    ),
    "storage outside": (storage("../../etc/passwd", 1), "is missing in the zip"),
    "storage missing": (storage("7", 1), "storage '7' is missing"),
    "storage size": (storage("0", 2), "4 bytes, the pickle says 8"),
    "storage size negative": (storage("0", -1), "not a number"),
    "storage size huge": (storage("0", 2**70), "4 bytes, the pickle says"),
    "quantised": (storage("0", 1, "torch.QInt8Storage"), "QInt8Storage"),
    "bool of other bytes": (storage("0", 4, "torch.BoolStorage"), "bool storage"),
    # opcodes
    "extension 1": (b"\x82\x01", "extension code"),
    "extension 2": (b"\x83\x01\x00", "extension code"),
    "extension 4": (b"\x84\x01\x00\x00\x00", "extension code"),
    "out of band": (b"\x97", "opcode"),
    "unknown opcode": (b"\xff", "opcode"),
    "protocol 9": (b"\x80\x09", "protocol 9"),
    "memo never stored": (b"h\x05", "never stored"),
    "memo by text": (b"gabc\n", "invalid literal"),
    "mark never opened": (b"t", "not opened"),
    "nothing to pop": (b"00", "not opened"),
    "object of nothing": (b"(o", "no class"),
    "odd dictionary": (b"}(K\x01u", "without a value"),
    "key twice": (dict_of(("x", b"N"), ("x", b"N")), "stands twice"),
    "list as a key": (b"}(]Nu", "dictionary key"),
    "append to a number": (b"K\x01K\x02a", "appends to a int"),
    "add to a list": (b"](K\x01\x90", "adds elements to a list"),
    "items of a list": (b"](K\x01K\x02u", "sets items of a list"),
    "text not utf-8": (b"X\x02\0\0\0\xff\xfe", "decode"),
    "number not a number": (b"Ix\n", "invalid literal"),
    "number of 5000 digits": (b"L" + b"9" * 5000 + b"L\n", "Exceeds the limit"),
    "string without quotes": (b"Sabc\n", "without quotes"),
    "text 1 GB declared": (b"X\0\0\0\x40x", "1073741824 bytes declared"),
    "text 2**63 declared": (b"\x8d" + b"\xff" * 8, "bytes declared"),
    "bytes 2**60 declared": (b"\x8e" + struct.pack("<Q", 2**60), "bytes declared"),
    "number of 2 GB declared": (b"\x8b\xff\xff\xff\x7f", "bytes declared"),
    "frame declared": (b"\x95" + struct.pack("<Q", 2**50), "frame of"),
    "memo at 2**32": (b"]r\xff\xff\xff\xff0h\x01", "never stored"),
    "nested marks": (b"(" * 5000, "nested more than 1000"),
    "line without end": (b"c" + b"x" * 1000, "ends inside"),
}


@pytest.mark.parametrize("case", TRICKS)
def test_pickle_tricks(tmp_path, case):
    trick, match = TRICKS[case]
    body = b"\x80\x04}(" + text("state_dict") + trick + b"u."
    file = torch_zip(tmp_path / "bad.ckpt", body, {"0": b"\x07\x07\x07\x07"})
    tracemalloc.start()
    try:
        refused(file, match)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


BOMBS = {
    "lists in lists": (b"]" * 200_000 + b"a" * 199_999, "."),
    "tuples in tuples": (b")" + b"\x85" * 300_000, "."),
    "tuples as a key": (b"})" + b"\x85" * 200_000 + b"Ns", "dictionary key"),
    "tuples in a set": (b"\x8f()" + b"\x85" * 200_000 + b"\x90", "set element"),
    "calls of calls": (name("a.B") + b")R" * 300_000, "."),
    "values left over": (b"K\x01K\x02", "left over"),
    "itself": (b"]q\0h\0a", "."),
    "dict in itself": (b"}q\0" + text("state_dict") + b"h\0s", "."),
    "copies of copies": (
        b"](" + b"N" * 10_000 + b"eq\0" + (name("builtins.list") + b"h\0\x85R") * 2000,
        "steps of pickle",
    ),
    "bytes again and again": (
        text("x" * 1_000_000)
        + b"q\0"
        + (name("_codecs.encode") + b"(h\0" + text("latin1") + b"tR") * 2000,
        "much more memory",
    ),
    "empty steps": (b"N0" * 1_100_000, "steps of pickle"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_pickle_bombs(tmp_path, case):
    bomb, match = BOMBS[case]
    file = torch_zip(tmp_path / "bad.ckpt", b"\x80\x02" + bomb + b".")
    refused(file, match)


def test_doubling_costs_nothing(tmp_path):
    """A billion laughs: references cost no memory, and nothing walks through them."""
    laughs = b"(K\x01K\x02tq\0" + b"".join(
        b"0(h" + bytes((i,)) + b"h" + bytes((i,)) + b"tq" + bytes((i + 1,)) for i in range(99)
    )
    refused(torch_zip(tmp_path / "bad.ckpt", b"\x80\x02" + laughs + b"."), "not a state dict")


def test_expanded_tensors_cost_no_memory(tmp_path):
    store = storage("0", 1)
    huge = [(f"model.{i}", tensor(store, 0, (4096, 4096), (0, 0))) for i in range(50)]
    file = torch_zip(
        tmp_path / "bad.ckpt", pickled(dict_of(("state_dict", dict_of(*huge)))), {"0": b"\0\0\0\0"}
    )
    tracemalloc.start()
    try:
        refused(file, "views that would expand")
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


# --- zip files that lie


def patched(
    whole: bytes, entry: str, field: int, value: bytes, *, local: bool = True, central: bool = True
) -> bytes:
    """`whole` with a field of an entry's headers replaced; `field` counts from the flags (local 6,
    central 8).
    """
    data = bytearray(whole)
    raw = f"archive/{entry}".encode()
    if local:
        at = whole.index(b"PK\x03\x04", max(0, whole.index(raw) - 30))
        data[at + 6 + field : at + 6 + field + len(value)] = value
    if central:
        at = whole.rindex(raw) - 46
        assert whole[at : at + 4] == b"PK\x01\x02"
        data[at + 8 + field : at + 8 + field + len(value)] = value
    return bytes(data)


def long(value: int) -> bytes:
    return struct.pack("<L", value)


FLAGS, METHOD, CRC, PACKED, PLAIN = 0, 2, 8, 12, 16
LIES = {
    "zip bomb": ((PLAIN, long(0xFFFFFFFE)), "compressed .* declared"),
    "zip bomb of both sizes": (
        (PACKED, long(0x7FFFFFFF) * 2),
        "declares 2147483647 bytes in a file of",
    ),
    "deflate bomb": (
        (METHOD, b"\x08\0" + b"\0" * 8 + long(100) + long(0xFFFFFFFE)),
        "compressed|match",
    ),
    "zip64 without its field": ((PLAIN, long(0xFFFFFFFF)), "zip64 size is missing"),
    "deflated": ((METHOD, b"\x08\0"), "compressed"),
    "bzip2": ((METHOD, b"\x0c\0"), "compressed"),
    "encrypted": ((FLAGS, b"\x01\0"), "encrypted"),
    "strong encryption": ((FLAGS, b"\x41\0"), "encrypted"),
    "patched data": ((FLAGS, b"\x20\0"), "encrypted or patched"),
    "wrong crc": ((CRC, long(1)), "CRC-32"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("entry", ["data.pkl", "data/9"])
def test_zip_headers_that_lie(tmp_path, whole, lie, entry):
    (field, value), match = LIES[lie]
    tracemalloc.start()
    try:
        refused(put(tmp_path, patched(whole, entry, field, value)), match)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("where", ["local", "central"])
@pytest.mark.parametrize("lie", ["zip bomb", "deflated", "wrong crc", "patched data"])
def test_headers_that_disagree(tmp_path, whole, where, lie):
    (field, value), _ = LIES[lie]
    data = patched(
        whole, "data/9", field, value, local=where == "local", central=where == "central"
    )
    refused(put(tmp_path, data), "match|compressed|patched|CRC")


def end_record(count=None, size=None, start=None, disk=0):
    def change(whole: bytes) -> bytes:
        magic, _, _, n, m, old_size, old_start, comment = struct.unpack("<4s4H2LH", whole[-22:])
        count_, size_, start_ = count or n, size or old_size, start or old_start
        return whole[:-22] + struct.pack(
            "<4s4H2LH", magic, disk, disk, count_, count or m, size_, start_, comment
        )

    return change


ENDS = {
    "more entries": end_record(count=60_000),
    "fewer entries": end_record(count=2),
    "directory size": end_record(size=10**9),
    "directory before": end_record(start=3),
    "directory after": end_record(start=2**32 - 2),
    "zip64 without locator": end_record(start=2**32 - 1),
    "second disk": end_record(disk=1),
    "comment": lambda whole: whole[:-2] + b"\x05\0",
    "zip64 locator far out": lambda whole: (
        whole[:-22]
        + b"PK\x06\x07"
        + struct.pack("<LQL", 0, 2**62, 1)
        + whole[-22:-12]
        + b"\xff" * 8
        + b"\0\0"
    ),
    "directory signature": lambda whole: (
        whole[: whole.rindex(b"PK\x01\x02")] + b"XX" + whole[whole.rindex(b"PK\x01\x02") + 2 :]
    ),
    "something before": lambda whole: b"PK\x03\x04" + b"\0" * 60 + whole,
}


@pytest.mark.parametrize("case", ENDS)
def test_zip_ends_that_lie(tmp_path, whole, case):
    refused(put(tmp_path, ENDS[case](whole)), "zip|list of entries|header")


NAMES = [
    "../../evil",
    "/etc/passwd",
    "archive/../../evil",
    "archive//data/0",
    "C:\\evil",
    "archive\\data",
    "archive/data/0\0",
    "",
    "archive/",
    "./archive/x",
    "c:/evil",
]


@pytest.mark.parametrize("entry", NAMES, ids=ascii)
def test_entry_names(tmp_path, entry):
    placeholder = (
        "archive/" + "q" * (len(entry.encode()) - 8) if len(entry) > 9 else "q" * len(entry)
    )
    torch_zip(
        tmp_path / "bad.ckpt", pickled(b"}"), more={placeholder: b"x"} if entry else {"": b"x"}
    )
    data = (tmp_path / "bad.ckpt").read_bytes()
    assert not placeholder or data.count(placeholder.encode()) == 2
    put(tmp_path, data.replace(placeholder.encode(), entry.encode()) if entry else data)
    refused(tmp_path / "bad.ckpt", "not a plain path")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as zipped:
        for data in (pickled(b"}"), pickled(name("os.system"))):
            zipped.writestr(zipfile.ZipInfo("archive/data.pkl"), data)
    refused(tmp_path / "bad.ckpt", "two entries named 'archive/data.pkl'")


def test_entries_that_overlap(tmp_path, whole):
    """The quine-like bomb: many entries of the list share one body."""
    one, two = (whole.rindex(f"archive/data/{i}".encode()) for i in (8, 9))
    data = bytearray(whole)
    data[two - 46 + 10 : two - 4] = whole[one - 46 + 10 : one - 4]  # sizes and crc ...
    data[two - 4 : two] = whole[one - 4 : one]  # ... and place of the other
    refused(put(tmp_path, bytes(data)), "does not match|overlap")


OTHER_ZIPS = {
    "no pickle": {"a/b": b"x"},
    "two folders": {"archive/data.pkl": pickled(b"}"), "other/data.pkl": pickled(b"}")},
    "torchscript": {"m/data.pkl": pickled(b"}"), "m/constants.pkl": b"", "m/code/m.py": b""},
    "byte order": {"archive/data.pkl": pickled(b"}"), "archive/byteorder": b"middle"},
    "pickle goes on": {"archive/data.pkl": pickled(b"}") + pickled(name("os.system"))},
    "empty pickle": {"archive/data.pkl": b""},
    "numpy": {"x.npy": b"\x93NUMPY"},
    "none": {},
}


@pytest.mark.parametrize("case", OTHER_ZIPS)
def test_other_zip_files(tmp_path, case):
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as zipped:
        for entry, data in OTHER_ZIPS[case].items():
            zipped.writestr(zipfile.ZipInfo(entry), data)
    refused(tmp_path / "bad.ckpt", ".")


def test_large_pickle_is_refused_before_it_is_run(tmp_path):
    torch_zip(tmp_path / "bad.ckpt", b"\x80\x02" + b"N0" * (33 << 20) + b"N.")
    refused(tmp_path / "bad.ckpt", "which no checkpoint needs")


# --- the old format that lies

LEGACY = {
    "big endian": ({"little": False}, None, "big-endian"),
    "storage list short": ({"keys": ["0"]}, None, "differ in"),
    "storage list long": ({"keys": [str(i) for i in range(99)]}, None, "differ in"),
    "storage list doubled": ({"keys": ["0", "0"]}, None, "list of storages is damaged"),
    "storage of another size": (
        {},
        dict_of(("x", tensor(storage("0", 1), 0, (1,), (1,)))),
        "2 elements, not 1",
    ),
    "storage huge": (
        {},
        dict_of(("x", tensor(storage("0", 2**60), 0, (1,), (1,)))),
        "bytes in a file of",
    ),
    "declared twice": (
        {},
        dict_of(
            ("x", tensor(storage("0", 2), 0, (1,), (1,))),
            ("y", tensor(storage("0", 1), 0, (1,), (1,))),
        ),
        "declared twice",
    ),
}


@pytest.mark.parametrize("case", LEGACY)
def test_legacy_files_that_lie(tmp_path, case):
    options, body, match = LEGACY[case]
    if body is None:
        arrays = {str(i): value for i, value in enumerate(STATE.values())}
        file = torch_legacy(tmp_path / "bad.ckpt", legacy_body(), arrays, **options)
    else:
        file = torch_legacy(tmp_path / "bad.ckpt", body, {"0": np.ones(2, np.float32)}, **options)
    refused(file, match)


def test_what_is_harmless_is_read_around(tmp_path):
    """Objects of unknown classes beside the weights are not an error: a real Lightning file is full
    of them.
    """
    extras = pickle.dumps({"callbacks": Evil.__mro__, "loops": np.arange(3)}, 2)
    assert "os" not in {
        str(arg).split()[0] for op, arg, _ in pickletools.genops(extras) if op.name == "GLOBAL"
    }
    weights = []
    storages = {}
    for i, (key, value) in enumerate(STATE.items()):
        storages[str(i)] = value.tobytes()
        strides = tuple(s // value.itemsize for s in value.strides)
        weights.append((key, tensor(storage(str(i), value.size), 0, value.shape, strides)))
    body = dict_of(
        ("state_dict", dict_of(*weights)), ("extras", extras[2:-1]), ("epoch", integer(3))
    )
    torch_zip(tmp_path / "good.ckpt", pickled(body), storages)
    _, _, provenance, _ = import_checkpoint(tmp_path / "good.ckpt", config=PUBLISHED)
    assert provenance["extras"] == {"epoch": 3} and provenance["ignored"] == ["extras"]
