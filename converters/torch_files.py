"""Reading and writing PyTorch checkpoint files without PyTorch, as data.

A torch checkpoint is a pickle plus raw storages, and a pickle is a program. Here it is run by a small interpreter that
knows containers, numbers, strings and tensors, and nothing else: it imports nothing and calls nothing that the file
names. Objects of other classes (Lightning extras, `argparse.Namespace`, optimizer states) come back as inert
`Placeholder`s; a pickle that names something no checkpoint needs (`os.system`, `builtins.eval`, ...) is refused.

Formats: the zip container of torch >= 1.6, the plain stream before it, and safetensors. Tensors come back as read-only
numpy arrays that view the memory-mapped file. What is wrong with a file is said by one exception, `CheckpointError`.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import itertools
import math
import mmap
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_PICKLE_BYTES = 64 << 20  # the pickle of a 1000-tensor checkpoint has about 0.2 MB
MAX_PICKLE_STEPS = 5_000_000  # the same pickle has about 40,000 opcodes
MAX_EXPANDED = 1 << 24  # elements of a stride-0 view that may exceed its storage


class CheckpointError(ValueError):
    """A checkpoint file that can't be used. The message names the file, what is wrong and what to do."""


@dataclasses.dataclass(eq=False, slots=True)
class Placeholder:
    """What stands where a file names a class or function that is not a tensor or plain container. Never called.

    `name` is the dotted name in the file, `args` what it would have been called with (None: the bare name),
    `state` and `items` what it would have been filled with.
    """

    name: str
    args: Any = dataclasses.field(default=None, repr=False)
    state: Any = dataclasses.field(default=None, repr=False)
    items: list = dataclasses.field(default_factory=list, repr=False)


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A checkpoint file that has been read: the object in it, and its container ("zip" or "legacy")."""

    content: Any
    container: str


def _short(value: object, limit: int = 120) -> str:
    """A name from a file as it may stand in a message: quoted, escaped, bounded."""
    if not isinstance(value, str):
        return type(value).__name__
    return ascii(value if len(value) <= limit else value[:limit] + "...")


# --------------------------------------------------------------------------------------------------------------------
# Names in a pickle
# --------------------------------------------------------------------------------------------------------------------

# What checkpoints really hold from the standard library (None: any name). Any other name of it is refused: none of
# these is ever called, so the list costs only a refusal where it is too short.
_STDLIB_NAMES: dict[str, set[str] | None] = {
    "builtins": {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "slice", "str", "tuple", "type", "Ellipsis", "NotImplemented", "unicode", "long",
    },
    "collections": None,
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "copyreg": {"_reconstructor", "__newobj__", "__newobj_ex__"},
    "datetime": None,
    "decimal": {"Decimal"},
    "enum": None,
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "logging": {"Logger", "getLogger"},
    "numbers": None,
    "pathlib": {"Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "random": {"Random"},
    "re": {"_compile"},
    "types": {"SimpleNamespace"},
    "typing": None,
    "uuid": {"UUID", "SafeUUID"},
    "zoneinfo": {"ZoneInfo"},
}  # fmt: skip
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # modules that have another name today
_PYTHON_2_ONLY = {"commands", "popen2", "cPickle", "cStringIO", "urllib2", "httplib", "exceptions", "dummy_thread"}
_DANGEROUS_PARTS = {  # refused wherever they stand in a dotted name ("torch" + "os.system")
    "os", "posix", "nt", "posixpath", "ntpath", "sys", "subprocess", "builtins", "__builtins__", "__builtin__",
    "importlib", "ctypes", "shutil", "socket", "runpy", "pty", "pickle", "__globals__", "__subclasses__", "__import__",
    "__getattribute__", "__class__", "__dict__", "__code__", "__reduce__", "__reduce_ex__", "__setstate__", "__call__",
}  # fmt: skip
_DANGEROUS_PREFIXES = (
    "torch.hub", "torch.load", "torch.save", "torch.jit", "torch.package", "torch.serialization", "torch.ops",
    "torch.classes", "torch.utils.cpp_extension", "torch.utils.model_zoo", "torch.distributed.rpc",
    "torch.multiprocessing", "torch.storage._load_from_bytes", "torch._dynamo", "torch._inductor", "torch._C",
    "torch.fx", "torch.compile",
    "numpy.load", "numpy.fromfile", "numpy.save", "numpy.memmap", "numpy.testing", "numpy.f2py", "numpy.distutils",
    "numpy.ctypeslib", "numpy.lib", "pandas.eval", "pandas.read_pickle", "pandas.io",
    "pip", "setuptools", "pkg_resources", "distutils", "IPython", "cloudpickle", "dill", "joblib", "requests",
    "pexpect", "paramiko", "fabric", "sh", "jax", "jaxlib", "flax", "ltsm_jax", "converters", "experiments",
)  # fmt: skip
_STATE_TRICKS = {  # attributes that only an attack sets on an object
    "__class__", "__setstate__", "__reduce__", "__reduce_ex__", "__code__", "__globals__", "__builtins__", "__init__",
    "__new__", "__del__", "__call__", "__getattr__", "__getattribute__", "__bases__", "__mro__", "__subclasses__",
}  # fmt: skip


def _is_dangerous(module: str, name: str) -> bool:
    dotted = f"{module}.{name}"
    root = dotted.partition(".")[0]
    if module in _STDLIB_NAMES:
        allowed = _STDLIB_NAMES[module]
        return allowed is not None and name not in allowed or not _DANGEROUS_PARTS.isdisjoint(name.split("."))
    if root in sys.stdlib_module_names or root in _PYTHON_2_ONLY:
        return True
    if not _DANGEROUS_PARTS.isdisjoint(dotted.split(".")):
        return True
    return any(dotted == p or dotted.startswith(p + ".") for p in _DANGEROUS_PREFIXES)


# --------------------------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------------------------

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
    f"torch.{device}{storage}": dtype for dtype, storage in _DTYPES.values() for device in ("", "cuda.")
} | {"torch.storage.UntypedStorage": None, "torch.UntypedStorage": None}
_STORAGE_NAMES = {dtype: storage for dtype, storage in _DTYPES.values()}
_TORCH_DTYPES = {f"torch.{name}": dtype for name, (dtype, _) in _DTYPES.items()} | {
    f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """Raw little-endian bytes and the type they were saved as (None: untyped)."""

    data: memoryview
    dtype: np.dtype | None

    def __post_init__(self) -> None:
        if self.dtype == np.bool_ and self.data.nbytes and np.frombuffer(self.data, np.uint8).max() > 1:
            raise ValueError("a bool storage with bytes other than 0 and 1")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _strided(storage: object, offset: object, size: object, stride: object, dtype: np.dtype | None) -> np.ndarray:
    """The tensor that torch would rebuild, as a read-only view; ValueError where it would reach out of its storage."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise ValueError("a tensor on an untyped storage without a dtype")
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 32):
        raise ValueError("a tensor whose size and stride are not two tuples of one length (32 at most)")
    if not (_is_size(offset) and all(map(_is_size, size)) and all(map(_is_size, stride))):
        raise ValueError("a tensor whose offset, size or stride is not a non-negative integer")
    n = math.prod(size)
    if n == 0:
        if max(size) > MAX_EXPANDED:
            raise ValueError(f"an empty tensor of size {max(size)}")
        return np.empty(size, dtype)
    held = storage.data.nbytes // dtype.itemsize
    reach = offset + sum((s - 1) * t for s, t in zip(size, stride, strict=True))  # type: ignore[operator]
    if reach >= held:
        raise ValueError(f"a tensor that reaches element {reach} of a storage of {held} elements")
    if n > max(held, MAX_EXPANDED):
        raise ValueError(f"a tensor of {n} elements on a storage of {held}")
    strides = tuple(t * dtype.itemsize for t in stride)
    array = np.ndarray(size, dtype, storage.data, offset * dtype.itemsize, strides)  # type: ignore[operator]
    array.flags.writeable = False
    return array


def _torch_dtype(value: object) -> np.dtype:
    name = value.name if isinstance(value, Placeholder) else _short(value)
    if name not in _TORCH_DTYPES:
        raise ValueError(f"a tensor of dtype {name}, which is not supported")
    return _TORCH_DTYPES[name]


def _latin1(text: object = None, encoding: object = None) -> bytes:
    """How Python 3 writes bytes in an old pickle: `_codecs.encode(str, "latin1")`."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("_codecs.encode used for something else than bytes")
    return text.encode("latin-1")


def _from_type(func: object, kind: object, args: object, state: object) -> object:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with extra attributes, which are dropped."""
    if (
        isinstance(func, Placeholder)
        and func.args is None
        and isinstance(args, tuple)
        and func.name in _TENSOR_BUILDERS
    ):
        return _TENSOR_BUILDERS[func.name](*args)
    return Placeholder(getattr(kind, "name", "torch._tensor._rebuild_from_type_v2"), (func, args), state)


def _is_array(value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError("a torch Parameter around something that is not a tensor")
    return value


_TENSOR_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": lambda st, offset, size, stride: _strided(st, offset, size, stride, None),
    "torch._utils._rebuild_tensor_v2": lambda st, offset, size, stride, *_: _strided(st, offset, size, stride, None),
    "torch._utils._rebuild_tensor_v3": lambda st, offset, size, stride, _grad, _hooks, dtype, *_: _strided(
        st, offset, size, stride, _torch_dtype(dtype)
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: _is_array(data),
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: _is_array(data),
}
_CONTAINERS: dict[str, type] = {
    "collections.OrderedDict": dict,
    "collections.Counter": dict,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "torch.Size": tuple,
}


# --------------------------------------------------------------------------------------------------------------------
# The pickle interpreter
# --------------------------------------------------------------------------------------------------------------------


def _key(value: Any) -> Any:
    """`value`, if it may be a dictionary key: hashing a hostile nest of tuples would overflow the C stack."""
    scalar = (str, bytes, int, float, complex, type(None), Placeholder)
    if isinstance(value, scalar) or isinstance(value, tuple) and all(isinstance(v, scalar) for v in value):
        return value
    raise ValueError(f"a dictionary key or set element of type {type(value).__name__}")


class _Pickle:
    """Runs one pickle, protocols 0 to 5. `persistent` turns a persistent id into a storage."""

    def __init__(self, data: Any, start: int, persistent: Callable[[Any], Any]):
        self.data, self.pos, self.persistent = data, start, persistent
        self.end = min(len(data), start + MAX_PICKLE_BYTES)
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the open marks
        self.memo: dict[int, Any] = {}
        self.steps = MAX_PICKLE_STEPS

    # reading ------------------------------------------------------------------------------------------------------
    def take(self, n: int) -> bytes:
        if n < 0 or n > self.end - self.pos:
            whole = self.end == len(self.data)
            limit = "the file ends inside the pickle" if whole else f"more than {MAX_PICKLE_BYTES >> 20} MB of pickle"
            raise ValueError(f"{limit} ({n} bytes declared)")
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.pos, self.end)
        return self.take((stop if stop >= 0 else self.end) + 1 - self.pos)[:-1]

    # stack --------------------------------------------------------------------------------------------------------
    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("the pickle takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("the pickle uses a value that is not there")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError("the pickle closes a group that was not opened")
        items, self.stack = self.stack, self.below.pop()
        return items

    def spend(self, n: int) -> None:
        self.steps -= n
        if self.steps < 0:
            raise ValueError(f"more than {MAX_PICKLE_STEPS} steps of pickle, which no checkpoint needs")

    # names and calls ----------------------------------------------------------------------------------------------
    def name(self, module: object, name: object) -> Placeholder:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("the pickle names a class by something that is not text")
        module = _PYTHON_2.get(module, module)
        if _is_dangerous(module, name):
            raise ValueError(
                f"the pickle names {_short(f'{module}.{name}')}, which no checkpoint needs: this file may be an attack "
                "and nothing of it was run"
            )
        return Placeholder(f"{module}.{name}")

    def call(self, func: object, args: object) -> Any:
        if not isinstance(args, tuple):
            raise ValueError("the pickle calls something with arguments that are not a tuple")
        if not isinstance(func, Placeholder):
            raise ValueError(f"the pickle calls a {type(func).__name__}")
        if func.args is None:
            if func.name in _TENSOR_BUILDERS:
                return _TENSOR_BUILDERS[func.name](*args)
            if func.name == "torch._tensor._rebuild_from_type_v2":
                return _from_type(*args)
            if func.name == "_codecs.encode":
                self.spend(len(args[0]) if args and isinstance(args[0], str) else 0)
                return _latin1(*args)
            if func.name == "collections.defaultdict":
                return self.container(dict, args[1:])
            if func.name in _CONTAINERS:
                return self.container(_CONTAINERS[func.name], args)
        return Placeholder(func.name, args)

    def container(self, kind: type, args: tuple) -> Any:
        if not args:
            return kind()
        content = args[0]
        if len(args) > 1 or not isinstance(content, (list, tuple, dict, set, frozenset)):
            raise ValueError(f"the pickle makes a {kind.__name__} of something that is not a container")
        self.spend(len(content))
        if kind is dict:
            pairs = content.items() if isinstance(content, dict) else content
            made: dict[Any, Any] = {}
            for pair in pairs:
                if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
                    raise ValueError("the pickle makes a dict of something that is not pairs")
                made[_key(pair[0])] = pair[1]
            return made
        return kind(map(_key, content)) if kind in (set, frozenset) else kind(content)

    def build(self, state: object) -> None:
        target = self.top()
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            tricks = [k for k in part if isinstance(k, str) and k in _STATE_TRICKS] if isinstance(part, dict) else []
            if tricks:
                raise ValueError(f"the pickle sets {', '.join(tricks)} of an object: this file may be an attack")
        if isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(target, (dict, np.ndarray)):  # of those two, attributes are dropped (`_metadata`)
            raise ValueError(f"the pickle sets attributes of a {type(target).__name__}")

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Placeholder):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise ValueError(f"the pickle appends to a {type(target).__name__}")

    def add(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Placeholder):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        else:
            raise ValueError(f"the pickle adds elements to a {type(target).__name__}")

    def set_items(self, items: list[Any], target: object) -> object:
        if len(items) % 2:
            raise ValueError("the pickle has a dictionary key without a value")
        if isinstance(target, Placeholder):
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if _key(key) in target:
                    raise ValueError(f"the key {_short(str(key))} stands twice in one dictionary")
                target[key] = value
        else:
            raise ValueError(f"the pickle sets items of a {type(target).__name__}")
        return target

    # the loop -----------------------------------------------------------------------------------------------------
    def run(self) -> Any:
        while True:
            self.spend(1)
            code = self.take(1)
            if code == b".":
                result = self.pop()
                if self.below or self.stack:
                    raise ValueError("the pickle stops with values left over")
                return result
            if code == b"(":
                if len(self.below) >= 1000:
                    raise ValueError("the pickle is nested more than 1000 deep")
                self.below.append(self.stack)
                self.stack = []
                continue
            step = _STEPS.get(code)
            if step is None:
                what = "an extension code" if code in (b"\x82", b"\x83", b"\x84") else "opcode"
                raise ValueError(f"the pickle uses {what} (0x{code.hex()}), which torch never writes")
            step(self)


def _push(make: Callable[[_Pickle], Any]) -> Callable[[_Pickle], None]:
    def step(p: _Pickle) -> None:
        value = make(p)  # first: it may replace the stack
        p.stack.append(value)

    return step


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _old_text(raw: bytes) -> str:  # a `str` of Python 2
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _quoted(p: _Pickle) -> str:
    raw = p.line()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return _old_text(codecs.escape_decode(raw[1:-1])[0])  # type: ignore[attr-defined]


def _int_line(p: _Pickle) -> Any:
    raw = p.line()
    return {b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else int(raw)


def _tuple(n: int) -> Callable[[_Pickle], None]:
    def step(p: _Pickle) -> None:
        items = [p.pop() for _ in range(n)]
        p.stack.append(tuple(reversed(items)))

    return step


def _put(index: Callable[[_Pickle], int]) -> Callable[[_Pickle], None]:
    def step(p: _Pickle) -> None:
        p.memo[index(p)] = p.top()

    return step


def _get(index: Callable[[_Pickle], int]) -> Callable[[_Pickle], None]:
    def step(p: _Pickle) -> None:
        i = index(p)
        if i not in p.memo:
            raise ValueError(f"the pickle refers to value {i}, which it never stored")
        p.stack.append(p.memo[i])

    return step


def _pop_step(p: _Pickle) -> None:
    if p.stack:
        p.stack.pop()
    else:
        p.pop_mark()


def _global_step(p: _Pickle) -> None:
    module, name = _text(p.line()), _text(p.line())
    p.stack.append(p.name(module, name))


def _stack_global(p: _Pickle) -> None:
    name, module = p.pop(), p.pop()
    p.stack.append(p.name(module, name))


def _reduce(p: _Pickle) -> None:
    args, func = p.pop(), p.pop()
    p.stack.append(p.call(func, args))


def _new_ex(p: _Pickle) -> None:
    kwargs, args, kind = p.pop(), p.pop(), p.pop()
    if kwargs != {}:
        args = (args, kwargs)
    p.stack.append(p.call(kind, args))


def _inst(p: _Pickle) -> None:
    kind = p.name(_text(p.line()), _text(p.line()))
    args = tuple(p.pop_mark())
    p.stack.append(p.call(kind, args))


def _obj(p: _Pickle) -> None:
    items = p.pop_mark()
    if not items:
        raise ValueError("the pickle makes an object of no class")
    p.stack.append(p.call(items[0], tuple(items[1:])))


def _build(p: _Pickle) -> None:
    p.build(p.pop())


def _proto(p: _Pickle) -> None:
    version = p.number(1)
    if version > 5:
        raise ValueError(f"pickle protocol {version} is unknown")


def _frame(p: _Pickle) -> None:
    n = p.number(8)
    if n > p.end - p.pos:
        raise ValueError(f"the file ends inside the pickle (a frame of {n} bytes declared)")


def _append(p: _Pickle) -> None:
    value = p.pop()
    p.append([value])


def _set_item(p: _Pickle) -> None:
    value, key = p.pop(), p.pop()
    p.set_items([key, value], p.top())


def _set_items(p: _Pickle) -> None:
    items = p.pop_mark()
    p.set_items(items, p.top())


def _discard_mark(p: _Pickle) -> None:
    p.pop_mark()


_STEPS: dict[bytes, Callable[[_Pickle], None]] = {
    b"\x80": _proto,
    b"\x95": _frame,
    b"0": _pop_step,
    b"1": _discard_mark,
    b"2": _push(lambda p: p.top()),
    b"N": _push(lambda p: None),
    b"\x88": _push(lambda p: True),
    b"\x89": _push(lambda p: False),
    b"I": _push(_int_line),
    b"J": _push(lambda p: int.from_bytes(p.take(4), "little", signed=True)),
    b"K": _push(lambda p: p.number(1)),
    b"M": _push(lambda p: p.number(2)),
    b"L": _push(lambda p: int(p.line().removesuffix(b"L"))),
    b"\x8a": _push(lambda p: int.from_bytes(p.take(p.number(1)), "little", signed=True)),
    b"\x8b": _push(lambda p: int.from_bytes(p.take(p.number(4)), "little", signed=True)),
    b"F": _push(lambda p: float(p.line())),
    b"G": _push(lambda p: struct.unpack(">d", p.take(8))[0]),
    b"S": _push(_quoted),
    b"T": _push(lambda p: _old_text(p.take(p.number(4)))),
    b"U": _push(lambda p: _old_text(p.take(p.number(1)))),
    b"V": _push(lambda p: p.line().decode("raw-unicode-escape")),
    b"X": _push(lambda p: _text(p.take(p.number(4)))),
    b"\x8c": _push(lambda p: _text(p.take(p.number(1)))),
    b"\x8d": _push(lambda p: _text(p.take(p.number(8)))),
    b"B": _push(lambda p: p.take(p.number(4))),
    b"C": _push(lambda p: p.take(p.number(1))),
    b"\x8e": _push(lambda p: p.take(p.number(8))),
    b"\x96": _push(lambda p: p.take(p.number(8))),
    b")": _push(lambda p: ()),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": _push(lambda p: tuple(p.pop_mark())),
    b"]": _push(lambda p: []),
    b"l": _push(lambda p: p.pop_mark()),
    b"a": _append,
    b"e": lambda p: p.append(p.pop_mark()),
    b"}": _push(lambda p: {}),
    b"d": _push(lambda p: p.set_items(p.pop_mark(), {})),
    b"s": _set_item,
    b"u": _set_items,
    b"\x8f": _push(lambda p: set()),
    b"\x90": lambda p: p.add(p.pop_mark()),
    b"\x91": _push(lambda p: frozenset(map(_key, p.pop_mark()))),
    b"p": _put(lambda p: int(p.line())),
    b"q": _put(lambda p: p.number(1)),
    b"r": _put(lambda p: p.number(4)),
    b"\x94": _put(lambda p: len(p.memo)),
    b"g": _get(lambda p: int(p.line())),
    b"h": _get(lambda p: p.number(1)),
    b"j": _get(lambda p: p.number(4)),
    b"c": _global_step,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": _build,
    b"i": _inst,
    b"o": _obj,
    b"\x81": _reduce,
    b"\x92": _new_ex,
    b"P": _push(lambda p: p.persistent(_text(p.line()))),
    b"Q": _push(lambda p: p.persistent(p.pop())),
}


def _run_pickle(file: Path, data: Any, start: int, persistent: Callable[[Any], Any]) -> tuple[Any, int]:
    """The object that a pickle describes, and where the pickle ends."""
    pickle = _Pickle(data, start, persistent)
    try:
        return pickle.run(), pickle.pos
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, MemoryError) as e:
        raise CheckpointError(
            f"{file}: {e or type(e).__name__} (byte {pickle.pos} of the pickle). "
            "Download the file again, or get it from a source you trust."
        ) from None


# --------------------------------------------------------------------------------------------------------------------
# Containers
# --------------------------------------------------------------------------------------------------------------------

_AGAIN = "Download or copy the file again."
_RESAVE = "Load it with the program that wrote it and save its state_dict() with torch.save."


def read_torch(path: str | os.PathLike) -> TorchFile:
    """Reads a torch checkpoint file, whatever its name, without running anything in it.

    Args:
      path: a file that `torch.save` wrote: zip container (torch >= 1.6) or the stream before it.
    Returns: `TorchFile`; tensors in its `content` are read-only numpy arrays on the memory-mapped file (bfloat16 as
      `ml_dtypes.bfloat16`), Parameters are tensors, OrderedDicts are dicts, other objects are `Placeholder`s.
    Raises: CheckpointError for a file that is missing, cut, damaged (zip entries carry a CRC, which is checked),
      hostile, or of another format.
    """
    file = Path(path)
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{file}: the file is empty. {_AGAIN}")
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise CheckpointError(f"{file}: can't be read ({e.strerror or e}). Check the path.") from None
    if mapped[:4] == b"PK\x03\x04":
        return TorchFile(_read_zip(file, mapped), "zip")
    if mapped[257:262] == b"ustar" or mapped[:9] == b"sys_info\0":
        raise CheckpointError(f"{file}: a tar file, as torch wrote before 0.1.10, is not supported. {_RESAVE}")
    if mapped[:2] == b"\x1f\x8b" or mapped[:3] == b"BZh" or mapped[:6] == b"\xfd7zXZ\0":
        raise CheckpointError(f"{file}: the file is compressed. Unpack it first.")
    if mapped[:1] == b"\x80":
        return TorchFile(_read_legacy(file, mapped), "legacy")
    raise CheckpointError(
        f"{file}: not a torch checkpoint (starts with {bytes(mapped[:8])!r}). A cut download or a saved web page looks "
        f"like this. {_AGAIN}"
    )


def _unpack(layout: str, data: Any, at: int) -> tuple:
    if at < 0 or at + struct.calcsize(layout) > len(data):
        raise ValueError("a header reaches over the end of the file")
    return struct.unpack_from(layout, data, at)


def _zip64(extra: bytes, sizes: list[int]) -> list[int]:
    """Replaces the sizes that stand as 0xFFFFFFFF by those of the zip64 field of `extra`."""
    at = 0
    wide: bytes = b""
    while at + 4 <= len(extra):
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


def _zip_entries(data: mmap.mmap) -> dict[str, memoryview]:
    """Name -> bytes of every entry of an uncompressed zip file, after checking all that it says about itself."""
    total = len(data)
    end = data.rfind(b"PK\x05\x06", max(0, total - 65557))
    if end < 0 or end + 22 > total:
        raise ValueError("the end of the zip file is missing: the file was cut")
    disk, first_disk, here, count, size, start, comment = _unpack("<4H2LH", data, end + 4)
    if end + 22 + comment != total:
        raise ValueError("the zip file does not end where it says")
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (size, start) or data[max(0, end - 20) : end][:4] == b"PK\x06\x07":
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

    entries: dict[str, memoryview] = {}
    spans: list[tuple[int, int, str]] = []
    view = memoryview(data)
    at = start
    for _ in range(count):
        head = _unpack("<4s6H3L5H2L", data, at)
        magic, _, *told, crc, packed, plain, n_name, n_extra, n_note, disk, _, _, local = head
        _, flags, method, _, _ = told
        if magic != b"PK\x01\x02" or disk:
            raise ValueError("the list of entries of the zip file is damaged")
        raw = data[at + 46 : at + 46 + n_name]
        plain, packed, local = _zip64(data[at + 46 + n_name : at + 46 + n_name + n_extra], [plain, packed, local])
        at += 46 + n_name + n_extra + n_note
        if at > end:
            raise ValueError("the list of entries of the zip file is cut")
        name = raw.decode("utf-8" if flags & 0x800 else "cp437")
        parts = name.split("/")
        if "\\" in name or "\0" in name or ":" in parts[0] or any(p in ("", ".", "..") for p in parts):
            raise ValueError(f"an entry named {_short(name)}, which is not a plain path")
        if name in entries:
            raise ValueError(f"two entries named {_short(name)}")
        if flags & ~0x0808:
            raise ValueError(f"the entry {_short(name)} is encrypted or patched (flags 0x{flags:04x})")
        if method != 0 or packed != plain:
            raise ValueError(
                f"the entry {_short(name)} is compressed ({packed} bytes declared to become {plain}): torch never does "
                "this, and it was not unpacked"
            )
        if plain > total:
            raise ValueError(f"the entry {_short(name)} declares {plain} bytes in a file of {total}")
        # The local header must tell the same story as the list.
        magic, *l_told, l_crc, l_packed, l_plain, l_name, l_extra = _unpack("<4s5H3L2H", data, local)
        body = local + 30 + l_name + l_extra
        l_plain, l_packed = _zip64(data[local + 30 + l_name : body], [l_plain, l_packed])
        if magic != b"PK\x03\x04" or l_told != told or data[local + 30 : local + 30 + l_name] != raw:
            raise ValueError(f"the header of the entry {_short(name)} does not match the list of entries")
        streamed = bool(flags & 8)  # then crc and sizes stand behind the data, and may be zero here
        l_sizes, sizes = (l_crc, l_packed, l_plain), (crc, packed, plain)
        if l_sizes != sizes and not (streamed and l_sizes == (0, 0, 0)):
            raise ValueError(f"the sizes of the entry {_short(name)} do not match the list of entries")
        stop = body + plain
        if stop > start:
            raise ValueError(f"the entry {_short(name)} reaches over the end of the data")
        content = view[body:stop]
        if zlib.crc32(content) != crc:
            raise ValueError(f"the entry {_short(name)} is damaged (its CRC-32 is wrong)")
        if streamed and data[stop : stop + 4] == b"PK\x07\x08":
            narrow, wide = _unpack("<3L", data, stop + 4), _unpack("<L2Q", data, stop + 4)
            if sizes not in (narrow, wide):
                raise ValueError(f"the descriptor of the entry {_short(name)} does not match the list of entries")
        elif streamed and _unpack("<3L", data, stop) != sizes:
            raise ValueError(f"the descriptor of the entry {_short(name)} does not match the list of entries")
        entries[name] = content
        spans.append((local, stop, name))
    if at != end:
        raise ValueError("the list of entries of the zip file is longer than it says")
    spans.sort()
    for (_, stop, one), (begin, _, two) in itertools.pairwise(spans):
        if stop > begin:
            raise ValueError(f"the entries {_short(one)} and {_short(two)} overlap")
    return entries


def _swapped(data: memoryview, dtype: np.dtype) -> memoryview:
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return memoryview(np.frombuffer(data, f"u{width}").byteswap()).cast("B") if width > 1 else data


def _storage_id(pid: object, ids: int) -> tuple[np.dtype | None, str, int]:
    """The parts of torch's persistent id ("storage", type, key, location, numel[, view])."""
    if not (isinstance(pid, tuple) and len(pid) in (5, ids) and pid[0] == "storage"):
        raise ValueError("the pickle refers to something outside it that is not a torch storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, Placeholder) or kind.name not in _STORAGE_DTYPES:
        name = kind.name if isinstance(kind, Placeholder) else type(kind).__name__
        raise ValueError(f"a storage of type {_short(name)}, which is not supported")
    if not isinstance(key, str) or not _is_size(numel):
        raise ValueError("a storage whose name is not text or whose size is not a number")
    return _STORAGE_DTYPES[kind.name], key, numel


def _read_zip(file: Path, data: mmap.mmap) -> Any:
    try:
        entries = _zip_entries(data)
        roots = sorted({name.partition("/")[0] for name in entries})
        root = roots[0] if roots else ""
        if len(roots) != 1 or f"{root}/data.pkl" not in entries:
            raise ValueError("a zip file, but not a torch checkpoint (no folder with data.pkl)")
        if any(name.startswith(f"{root}/code/") or name == f"{root}/constants.pkl" for name in entries):
            raise ValueError("a TorchScript archive, which is a program and not a checkpoint")
        order = bytes(entries.get(f"{root}/byteorder", b"little"))
        if order not in (b"little", b"big"):
            raise ValueError(f"an unknown byte order {order[:16]!r}")
        if len(entries[f"{root}/data.pkl"]) > MAX_PICKLE_BYTES:
            raise ValueError(f"data.pkl has {len(entries[f'{root}/data.pkl'])} bytes, which no checkpoint needs")
    except (ValueError, struct.error) as e:
        raise CheckpointError(f"{file}: {e}. {_AGAIN} If it is whole: {_RESAVE[0].lower()}{_RESAVE[1:]}") from None
    made: dict[tuple, _Storage] = {}

    def storage(pid: object) -> _Storage:
        dtype, key, numel = _storage_id(pid, 5)
        if (dtype, key, numel) in made:
            return made[dtype, key, numel]
        name = f"{root}/data/{key}"
        if name not in entries:
            raise ValueError(f"the storage {_short(key)} is missing in the zip file")
        held, needed = len(entries[name]), numel * (dtype.itemsize if dtype else 1)
        if held != needed:
            raise ValueError(f"the storage {_short(key)} has {held} bytes, the pickle says {needed}")
        raw = entries[name]
        if order == b"big":
            if dtype is None:
                raise ValueError("an untyped storage in big-endian byte order, which is not supported")
            raw = _swapped(raw, dtype)
        made[dtype, key, numel] = _Storage(raw, dtype)
        return made[dtype, key, numel]

    pickle = bytes(entries[f"{root}/data.pkl"])
    content, end = _run_pickle(file, pickle, 0, storage)
    if end != len(pickle):
        raise CheckpointError(f"{file}: data.pkl goes on after the end of its pickle. {_AGAIN}")
    return content


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


def _read_legacy(file: Path, data: mmap.mmap) -> Any:
    """Five pickles (magic, version, machine, object, names of storages), then each storage: its length, its data."""

    def nothing(pid: object) -> Any:
        raise ValueError("a storage where none can be")

    magic, at = _run_pickle(file, data, 0, nothing)
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(f"{file}: a pickle, but not one that torch.save wrote. {_RESAVE}")
    version, at = _run_pickle(file, data, at, nothing)
    machine, at = _run_pickle(file, data, at, nothing)
    if version != _LEGACY_VERSION or not isinstance(machine, dict):
        raise CheckpointError(f"{file}: version {_short(str(version))} of the old torch format is unknown. {_RESAVE}")
    if machine.get("little_endian") is not True:
        raise CheckpointError(f"{file}: written on a big-endian machine, which is not supported here. {_RESAVE}")

    # The storages stand behind the pickle that uses them: a first pass over it finds where they are.
    declared: dict[str, tuple[np.dtype | None, int]] = {}

    def declare(pid: object) -> _Storage:
        dtype, key, numel = _storage_id(pid, 6)
        if declared.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise ValueError(f"the storage {_short(key)} is declared twice, differently")
        needed = numel * (dtype.itemsize if dtype else 1)
        if needed > len(data):
            raise ValueError(f"the storage {_short(key)} declares {needed} bytes in a file of {len(data)}")
        return _Storage(zeros[:needed], dtype)  # stands in for the real one

    start = at
    zeros = memoryview(np.zeros(len(data), np.uint8))  # never touched, so never really allocated
    _, at = _run_pickle(file, data, start, declare)
    keys, at = _run_pickle(file, data, at, nothing)
    if not isinstance(keys, list) or any(not isinstance(k, str) for k in keys) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{file}: the list of storages is damaged. {_AGAIN}")
    if set(keys) != set(declared):
        odd = sorted(set(keys) ^ set(declared))[:5]
        odd = ", ".join(map(_short, odd))
        raise CheckpointError(f"{file}: the list of storages and the pickle differ in {odd}. {_AGAIN}")
    storages: dict[str, _Storage] = {}
    for key in keys:
        dtype, numel = declared[key]
        needed = numel * (dtype.itemsize if dtype else 1)
        if at + 8 + needed > len(data):
            raise CheckpointError(f"{file}: the file ends inside the storage {_short(key)}: it was cut. {_AGAIN}")
        held = int.from_bytes(data[at : at + 8], "little")
        if held != numel:
            raise CheckpointError(f"{file}: the storage {_short(key)} has {held} elements, not {numel}. {_AGAIN}")
        storages[key] = _Storage(memoryview(data)[at + 8 : at + 8 + needed], dtype)
        at += 8 + needed
    if at != len(data):
        raise CheckpointError(f"{file}: {len(data) - at} bytes follow the last storage. {_AGAIN}")

    def storage(pid: Any) -> _Storage:
        whole = storages[pid[2]]
        view = pid[5] if len(pid) == 6 else None
        if view is None:
            return whole
        if not (isinstance(view, tuple) and len(view) == 3 and _is_size(view[1]) and _is_size(view[2])):
            raise ValueError("a storage view that is not (name, offset, size)")
        width = whole.dtype.itemsize if whole.dtype else 1
        low, high = view[1] * width, (view[1] + view[2]) * width
        if high > whole.data.nbytes:
            raise ValueError(f"a view that reaches out of the storage {_short(pid[2])}")
        return _Storage(whole.data[low:high], whole.dtype)

    return _run_pickle(file, data, start, storage)[0]


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file: key -> array. Raises CheckpointError for a file that can't be read or is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({e}). {_AGAIN}") from None


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


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
                    raise ValueError(f"{where}: a key of type {type(key).__name__} does not go into a checkpoint")
                self.write(key, where)
                self.write(item, f"{where}.{key}" if where else str(key))
            out.write(b"u")
        elif isinstance(value, (list, tuple)):
            out.write(b"(")
            for i, item in enumerate(value):
                self.write(item, f"{where}[{i}]")
            out.write(b"l" if isinstance(value, list) else b"t")
        else:
            kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{where or 'content'}: {kind} does not go into a checkpoint")


def write_torch(path: str | os.PathLike, content: Any, *, overwrite: bool = False) -> None:
    """Writes a checkpoint that `torch.load(weights_only=True)` reads. Needs no torch.

    Args:
      path: file to write; written beside it first and then renamed, so that it is there whole or not at all.
      content: nested dicts, lists and tuples of numpy arrays (float, bfloat16, int, bool, complex), numbers and text.
        One array object that stands in several places is stored once, as torch does with shared tensors.
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
    members: list[tuple[str, bytes | np.ndarray]] = [("data.pkl", writer.out.getvalue()), ("byteorder", b"little")]
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
                    zipped.writestr(info, content_of if isinstance(content_of, bytes) else _little_endian(content_of))
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _little_endian(array: np.ndarray) -> memoryview:
    plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(plain) if sys.byteorder == "little" else _swapped(memoryview(plain), array.dtype)
