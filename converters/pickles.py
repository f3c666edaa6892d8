"""A pickle as data: an interpreter that knows containers, numbers, strings and what its caller
lends it.

A pickle is a program. Python's own machine imports and calls whatever the program names; this one
imports nothing and calls nothing but the `builders` it is given. Objects of other classes become
inert `Placeholder`s, and a pickle that names something that no checkpoint needs (`os.system`,
`builtins.eval`, ...) is refused.

One opcode of one byte can name, copy or hash a text of a megabyte again, so opcodes are not what is
counted. All pickles of a file spend from one `Budget`, of steps (time) and of bytes (memory), and
what costs more than a plain step pays for it by its length. Nothing that a file declares is
allocated before the bytes are seen to be there.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltsm_jax.original_files import CheckpointError, shortened

MAX_PICKLE_BYTES = 64 << 20  # the pickle of a 1000-tensor checkpoint has about 0.2 MB
MAX_PICKLE_STEPS = 1_000_000  # the same pickle has about 40,000 opcodes
MAX_PICKLE_MEMORY = 64 << 20  # beyond twice the pickle's own size; that pickle becomes about 3 MB

_MAX_NAME = 300  # characters of a dotted name
_MAX_LINE = 700  # characters of a number that is written as text
_MAX_INTEGER = 255  # bytes of an integer
_MAX_ODD_KEYS = 1000  # dictionary keys whose hashes a file can choose
_MAX_KEY_PARTS = 8  # elements of a tuple as a key
_KEY_RANGE = 1 << 64


@dataclasses.dataclass
class Budget:
    """Budget that all pickles of one file share: steps (time) and bytes (memory)."""

    steps: int
    memory: int

    @classmethod
    def of(cls, pickle_bytes: int) -> Budget:
        """The budget of pickles that have so many bytes in their file."""
        size = min(pickle_bytes, MAX_PICKLE_BYTES)
        return cls(MAX_PICKLE_STEPS, MAX_PICKLE_MEMORY + 2 * size)

    def spend(self, steps: int, memory: int) -> None:
        """Take from the budget; ValueError where too little is left."""
        self.steps -= steps
        self.memory -= memory
        if self.steps < 0:
            raise ValueError(
                f"more than {MAX_PICKLE_STEPS} steps of pickle, which no checkpoint needs"
            )
        if self.memory < 0:
            raise ValueError(
                "the pickle grows to much more memory than its size, which no checkpoint needs"
            )


@dataclasses.dataclass(eq=False, slots=True)
class Placeholder:
    """Stand-in for a class or function that a file names and that is not a tensor or plain
    container. Never called.

    `name` is the dotted name in the file, `args` what it would have been called with (None: the
    bare name), `state` and `items` what it would have been filled with.
    """

    name: str
    args: Any = dataclasses.field(default=None, repr=False)
    state: Any = dataclasses.field(default=None, repr=False)
    items: list = dataclasses.field(default_factory=list, repr=False)


def quoted(value: object, limit: int = 120) -> str:
    """A name from a file as it may stand in a message: quoted, escaped, bounded."""
    if not isinstance(value, str):
        return type(value).__name__
    shown = ascii(value if len(value) <= limit else value[:limit] + "...")
    # An escape has up to ten characters for one.
    return shown if len(shown) <= 2 * limit else shown[: 2 * limit] + "...'"


# What checkpoints really hold from the standard library (None: any name). Any other name of it is
# refused: none of these is ever called, so the list costs only a refusal where it is too short.
_STDLIB_NAMES: dict[str, set[str] | None] = {
    "builtins": {
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "object",
        "range",
        "set",
        "slice",
        "str",
        "tuple",
        "type",
        "Ellipsis",
        "NotImplemented",
        "unicode",
        "long",
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
}
_PYTHON_2 = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
}  # modules that have another name today
_PYTHON_2_ONLY = {
    "commands",
    "popen2",
    "cPickle",
    "cStringIO",
    "urllib2",
    "httplib",
    "exceptions",
    "dummy_thread",
}
_DANGEROUS_PARTS = {  # refused wherever they stand in a dotted name ("torch" + "os.system")
    "os",
    "posix",
    "nt",
    "posixpath",
    "ntpath",
    "sys",
    "subprocess",
    "builtins",
    "__builtins__",
    "__builtin__",
    "importlib",
    "ctypes",
    "shutil",
    "socket",
    "runpy",
    "pty",
    "pickle",
    "__globals__",
    "__subclasses__",
    "__import__",
    "__getattribute__",
    "__class__",
    "__dict__",
    "__code__",
    "__reduce__",
    "__reduce_ex__",
    "__setstate__",
    "__call__",
}
_DANGEROUS_PREFIXES = (
    "torch.hub",
    "torch.load",
    "torch.save",
    "torch.jit",
    "torch.package",
    "torch.serialization",
    "torch.ops",
    "torch.classes",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.distributed.rpc",
    "torch.multiprocessing",
    "torch.storage._load_from_bytes",
    "torch._dynamo",
    "torch._inductor",
    "torch._C",
    "torch.fx",
    "torch.compile",
    "numpy.load",
    "numpy.fromfile",
    "numpy.save",
    "numpy.memmap",
    "numpy.testing",
    "numpy.f2py",
    "numpy.distutils",
    "numpy.ctypeslib",
    "numpy.lib",
    "pandas.eval",
    "pandas.read_pickle",
    "pandas.io",
    "pip",
    "setuptools",
    "pkg_resources",
    "distutils",
    "IPython",
    "cloudpickle",
    "dill",
    "joblib",
    "requests",
    "pexpect",
    "paramiko",
    "fabric",
    "sh",
    "jax",
    "jaxlib",
    "flax",
    "ltsm_jax",
    "converters",
    "experiments",
)
_STATE_TRICKS = {  # attributes that only an attack sets on an object
    "__class__",
    "__setstate__",
    "__reduce__",
    "__reduce_ex__",
    "__code__",
    "__globals__",
    "__builtins__",
    "__init__",
    "__new__",
    "__del__",
    "__call__",
    "__getattr__",
    "__getattribute__",
    "__bases__",
    "__mro__",
    "__subclasses__",
}


def _is_dangerous(module: str, name: str) -> bool:
    dotted = f"{module}.{name}"
    root = dotted.partition(".")[0]
    if module in _STDLIB_NAMES:
        allowed = _STDLIB_NAMES[module]
        return (allowed is not None and name not in allowed) or not _DANGEROUS_PARTS.isdisjoint(
            name.split(".")
        )
    if root in sys.stdlib_module_names or root in _PYTHON_2_ONLY:
        return True
    if not _DANGEROUS_PARTS.isdisjoint(dotted.split(".")):
        return True
    return any(dotted == p or dotted.startswith(p + ".") for p in _DANGEROUS_PREFIXES)


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


def _latin1(text: object = None, encoding: object = None) -> bytes:
    """Encode as Python 3 writes bytes in an old pickle: `_codecs.encode(str, "latin1")`."""
    if not (
        isinstance(text, str) and isinstance(encoding, str) and encoding in ("latin1", "latin-1")
    ):
        raise ValueError("_codecs.encode used for something else than bytes")
    return text.encode("latin-1")


_PLAIN_KEYS = (
    str,
    bytes,
    bool,
    type(None),
    Placeholder,
)  # their hashes are random, or there are two of them
_ODD_KEYS = (float, complex)


def _is_plain_key(value: Any) -> bool:
    """Return whether no file can make many of such keys collide."""
    if isinstance(value, int) and not isinstance(value, bool):
        # Python's hash of an integer is its remainder: of wider ones, any number collide.
        return -_KEY_RANGE < value < _KEY_RANGE
    return isinstance(value, _PLAIN_KEYS)


class _Pickle:
    """Runs one pickle, protocols 0 to 5."""

    def __init__(
        self,
        data: Any,
        start: int,
        end: int,
        persistent: Callable[[Any], Any],
        builders: Mapping[str, Callable],
        budget: Budget,
    ):
        self.data, self.pos, self.persistent, self.builders = data, start, persistent, builders
        self.whole = end  # where the file ends, or the entry of a zip file
        self.end = min(end, start + MAX_PICKLE_BYTES)
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the open marks
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], str] = {}  # those found harmless
        self.odd_keys = _MAX_ODD_KEYS
        self.budget = budget

    # reading
    # ----------------------------------------------------------------------------------------------
    def take(self, n: int) -> bytes:
        if n < 0 or n > self.end - self.pos:
            limit = "the file ends inside the pickle"
            if self.end < self.whole:
                limit = f"more than {MAX_PICKLE_BYTES >> 20} MB of pickle"
            raise ValueError(f"{limit} ({n} bytes declared)")
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def payload(self, width: int) -> bytes:
        """Bytes after their length, which has `width` bytes itself."""
        raw = self.take(self.number(width))
        # Text that is not ASCII has up to four bytes a character in memory.
        self.budget.spend(0, len(raw) if len(raw) < 1000 or raw.isascii() else 4 * len(raw))
        return raw

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.pos, self.end)
        raw = self.take((stop if stop >= 0 else self.end) + 1 - self.pos)[:-1]
        self.budget.spend(0, 4 * len(raw))
        return raw

    def short_line(self) -> bytes:
        """A line that holds a number: turning digits into one is not linear in their count."""
        raw = self.line()
        if len(raw) > _MAX_LINE:
            raise ValueError(f"Exceeds the limit ({_MAX_LINE} digits) of a number: {len(raw)}")
        return raw

    def integer(self, n: int) -> int:
        if n > self.end - self.pos:
            self.take(n)  # says that the file ends here
        if n > _MAX_INTEGER:
            raise ValueError(f"an integer of {n} bytes declared, which no checkpoint needs")
        return int.from_bytes(self.take(n), "little", signed=True)

    def key(self, value: Any) -> Any:
        """`value`, if it may be a dictionary key, at a cost that does not depend on it.

        Hashing a hostile nest of tuples would overflow the C stack, hashing one long tuple again
        and again takes time that its bytes do not tell, and a file can hold thousands of tuples,
        fractions and complex numbers of one hash.
        """
        if _is_plain_key(value):
            return value
        short = isinstance(value, tuple) and len(value) <= _MAX_KEY_PARTS
        fits = isinstance(value, _ODD_KEYS) or (short and all(map(_is_plain_key, value)))
        if not fits:
            kind = "wide integer" if isinstance(value, int) else type(value).__name__
            kind = "long tuple" if isinstance(value, tuple) and not short else kind
            raise ValueError(f"a dictionary key or set element of type {kind}")
        self.odd_keys -= 1
        if self.odd_keys < 0:
            raise ValueError(
                f"more than {_MAX_ODD_KEYS} dictionary keys that are neither text nor integers"
            )
        return value

    # stack
    # ----------------------------------------------------------------------------------------------
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

    def spend(self, steps: int, memory: int) -> None:
        self.budget.spend(steps, memory)

    # names and calls
    # ----------------------------------------------------------------------------------------------
    def name(self, module: object, name: object) -> Placeholder:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("the pickle names a class by something that is not text")
        if len(module) + len(name) > _MAX_NAME:
            raise ValueError(
                f"the pickle names {quoted(module)}: a name of {len(module) + len(name)} characters"
            )
        self.spend(0, 200)
        known = self.names.get((module, name))
        if known is not None:
            return Placeholder(known)

        self.spend(15, 500)  # looking through the lists takes about as long as so many plain steps
        dotted = f"{_PYTHON_2.get(module, module)}.{name}"
        if _is_dangerous(_PYTHON_2.get(module, module), name):
            raise ValueError(
                f"the pickle names {quoted(dotted)}, which no checkpoint needs: this file may be "
                "an attack and nothing of it was run"
            )
        self.names[module, name] = dotted
        return Placeholder(dotted)

    def call(self, func: object, args: object) -> Any:
        if not isinstance(args, tuple):
            raise ValueError("the pickle calls something with arguments that are not a tuple")
        if not isinstance(func, Placeholder):
            raise ValueError(f"the pickle calls a {type(func).__name__}")
        if func.args is None:
            if func.name in self.builders:
                self.spend(25, 300)  # a tensor: checks, and a view into the file
                return self.builders[func.name](*args)
            if func.name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4:
                inner, kind, inner_args, state = args  # a tensor with attributes, which are dropped
                if (
                    isinstance(inner, Placeholder)
                    and inner.args is None
                    and inner.name in self.builders
                ):
                    return self.call(inner, inner_args)
                return Placeholder(
                    kind.name if isinstance(kind, Placeholder) else func.name,
                    (inner, inner_args),
                    state,
                )
            if (
                func.name in ("copyreg._reconstructor", "copyreg.__newobj__")
                and args
                and isinstance(args[0], Placeholder)
            ):
                return Placeholder(args[0].name, args[1:])
            if func.name == "_codecs.encode":
                self.spend(0, len(args[0]) if args and isinstance(args[0], str) else 0)
                return _latin1(*args)
            if func.name == "collections.defaultdict":
                return self.container(dict, args[1:])
            if func.name in _CONTAINERS:
                return self.container(_CONTAINERS[func.name], args)
        self.spend(0, 200)
        return Placeholder(func.name, args)

    def container(self, kind: type, args: tuple) -> Any:
        if not args:
            return kind()
        content = args[0]
        if len(args) > 1 or not isinstance(content, (list, tuple, dict, set, frozenset)):
            raise ValueError(
                f"the pickle makes a {kind.__name__} of something that is not a container"
            )
        # The copy costs as much as its content, which may stand in the file once and be copied
        # often.
        self.spend(len(content), (8 if kind in (list, tuple) else 100) * len(content))
        if kind is dict:
            pairs = content.items() if isinstance(content, dict) else content
            made: dict[Any, Any] = {}
            for pair in pairs:
                if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
                    raise ValueError("the pickle makes a dict of something that is not pairs")
                made[self.key(pair[0])] = pair[1]
            return made
        return kind(map(self.key, content)) if kind in (set, frozenset) else kind(content)

    def build(self, state: object) -> None:
        target = self.top()
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if not isinstance(part, dict):
                continue
            # Not a walk through the state, which one opcode may set again and again.
            tricks = sorted(trick for trick in _STATE_TRICKS if trick in part)
            if tricks:
                raise ValueError(
                    f"the pickle sets {', '.join(tricks)} of an object: this file may be an attack"
                )
        if isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(
            target, (dict, np.ndarray)
        ):  # of these, attributes are dropped: `_metadata`
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
            self.spend(0, 100 * len(items))
            target.update(map(self.key, items))
        else:
            raise ValueError(f"the pickle adds elements to a {type(target).__name__}")

    def frozen(self, items: list[Any]) -> frozenset:
        self.spend(0, 100 * len(items))
        return frozenset(map(self.key, items))

    def set_items(self, items: list[Any], target: object) -> object:
        if len(items) % 2:
            raise ValueError("the pickle has a dictionary key without a value")
        self.spend(0, 100 + 50 * len(items))
        if isinstance(target, Placeholder):
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if self.key(key) in target:
                    raise ValueError(f"the key {quoted(key)} stands twice in one dictionary")
                target[key] = value
        else:
            raise ValueError(f"the pickle sets items of a {type(target).__name__}")
        return target

    # the loop
    # ----------------------------------------------------------------------------------------------
    def run(self) -> Any:
        data, end, budget = self.data, self.end, self.budget
        while True:
            if self.pos >= end:
                self.take(1)  # says what is wrong
            code = data[self.pos]
            self.pos += 1
            step, memory = _TABLE[code]
            budget.spend(1, memory)
            if step is not None:
                step(self)
            elif code == _STOP:
                result = self.pop()
                if self.below or self.stack:
                    raise ValueError("the pickle stops with values left over")
                return result
            else:
                what = "an extension code" if code in (0x82, 0x83, 0x84) else "opcode"
                raise ValueError(f"the pickle uses {what} (0x{code:02x}), which torch never writes")


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


_ESCAPE = re.compile(
    rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL
)  # of Python 2's repr, which writes no others
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\", b"'": b"'", b'"': b'"'}


def _unescaped(match: re.Match[bytes]) -> bytes:
    told = match[1]
    if len(told) == 3:
        return bytes((int(told[1:], 16),))
    if told not in _ESCAPES:
        raise ValueError("a string with an escape that Python 2 never wrote")
    return _ESCAPES[told]


def _quoted(p: _Pickle) -> str:
    raw = p.line()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return _old_text(_ESCAPE.sub(_unescaped, raw[1:-1]))


def _mark(p: _Pickle) -> None:
    if len(p.below) >= 1000:
        raise ValueError("the pickle is nested more than 1000 deep")
    p.below.append(p.stack)
    p.stack = []


def _int_line(p: _Pickle) -> Any:
    raw = p.short_line()
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
    if not isinstance(kwargs, dict) or kwargs:
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
    b"(": _mark,
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
    b"L": _push(lambda p: int(p.short_line().removesuffix(b"L"))),
    b"\x8a": _push(lambda p: p.integer(p.number(1))),
    b"\x8b": _push(lambda p: p.integer(p.number(4))),
    b"F": _push(lambda p: float(p.short_line())),
    b"G": _push(lambda p: struct.unpack(">d", p.take(8))[0]),
    b"S": _push(_quoted),
    b"T": _push(lambda p: _old_text(p.payload(4))),
    b"U": _push(lambda p: _old_text(p.payload(1))),
    b"V": _push(lambda p: p.line().decode("raw-unicode-escape")),
    b"X": _push(lambda p: _text(p.payload(4))),
    b"\x8c": _push(lambda p: _text(p.payload(1))),
    b"\x8d": _push(lambda p: _text(p.payload(8))),
    b"B": _push(lambda p: p.payload(4)),
    b"C": _push(lambda p: p.payload(1)),
    b"\x8e": _push(lambda p: p.payload(8)),
    b"\x96": _push(lambda p: p.payload(8)),
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
    b"\x91": _push(lambda p: p.frozen(p.pop_mark())),
    b"p": _put(lambda p: int(p.short_line())),
    b"q": _put(lambda p: p.number(1)),
    b"r": _put(lambda p: p.number(4)),
    b"\x94": _put(lambda p: len(p.memo)),
    b"g": _get(lambda p: int(p.short_line())),
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


_STOP = ord(".")
_PLAIN_MEMORY = 40  # bytes that a step takes: a number, and its place on the stack
_MEMORY = {  # steps that take less (what is there already, or goes), and those that take more
    b"0": 0,
    b"1": 0,
    b"2": 16,
    b"N": 16,
    b"\x88": 16,
    b"\x89": 16,
    b"K": 16,
    b"g": 16,
    b"h": 16,
    b"j": 16,
    b"(": 80,
    b"t": 64,
    b"\x85": 64,
    b"\x86": 64,
    b"\x87": 80,
    b"]": 72,
    b"}": 240,  # with room for its first items
    b"d": 240,
    b"\x8f": 240,
    b"\x91": 240,
    b"p": 120,  # the memo is a dictionary
    b"q": 120,
    b"r": 120,
    b"\x94": 120,
}
_TABLE: list[tuple[Callable[[_Pickle], None] | None, int]] = [
    (_STEPS.get(bytes((code,))), _MEMORY.get(bytes((code,)), _PLAIN_MEMORY)) for code in range(256)
]


def run_pickle(
    file: Path,
    data: Any,
    start: int,
    persistent: Callable[[Any], Any],
    builders: Mapping[str, Callable[..., Any]],
    *,
    end: int | None = None,
    budget: Budget | None = None,
) -> tuple[Any, int]:
    """The object that a pickle describes, and where the pickle ends.

    Args:
      file: for the message of an error.
      data: bytes or mmap.
      start: where in `data` the pickle begins.
      persistent: what stands for a persistent id; raises ValueError for one that it does not know.
      builders: dotted name in the file -> function of ours to call instead.
      end: where in `data` the pickle must have ended; by default the end of `data`.
      budget: what it may cost, and less of it after; by default one for this pickle alone.
    Raises: CheckpointError, whatever is wrong.
    """
    end = len(data) if end is None else end
    pickle = _Pickle(
        data=data,
        start=start,
        end=end,
        persistent=persistent,
        builders=builders,
        budget=budget or Budget.of(end - start),
    )
    try:
        return pickle.run(), pickle.pos
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as e:
        what = shortened(str(e), 1000) or type(e).__name__
        raise CheckpointError(
            f"{file}: {what} (byte {pickle.pos - start} of the pickle). Download the file again, "
            "or get it from a source you trust."
        ) from None
