"""The key-table engine: an original state dict <-> a parameter tree, strictly.

A table is a sequence of rules, one line per kind of tensor:

    (r"decoder\\.norm\\.weight", "norm/scale", SAME)
    (r"decoder\\.layers\\.(\\d+)\\.conv1\\.weight", r"layer_\\1/up/kernel", CONV1)
    (r".*\\.rotary_emb\\.inv_freq", DROP, "recomputed from rope_theta")
    (r"position_embedding\\.pe", BUFFER, "fixed sinusoid table")
    (r"(encoder|decoder)\\.embed_tokens\\.weight", COPY, "shared.weight")
    (r"layers\\.(\\d+)\\.experts\\.(\\d+)\\.weight", r"layer_\\1/up/kernel[\\2]", TRANSPOSE)
    (r"layers\\.(\\d+)\\.qkv\\.weight", r"layer_\\1/attn/{q,k,v}/kernel", split_out(64))

A target that ends with `[\\2]` is a slot: the tensors of many keys are one parameter, stacked
along its first axis. A target with `{q,k,v}` is several: one tensor is cut along its first axis
into parts, each a parameter: equal ones, or those of `cut_into`.

Every key matches exactly one rule, every parameter is written exactly once, every shape agrees;
whatever does not is listed in one error. Rules are literal text and groups, so the same table is
read backwards to export.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from converters.pickles import quoted
from ltsm_jax import trees
from ltsm_jax.original_files import CheckpointError, shortened

ALIGNED = 64  # bytes

# Targets that are not parameters.
DROP = "(dropped)"  # the key is not used, for the reason given in place of the transform
BUFFER = "(buffer)"  # not learned, kept as it is for the export
COPY = "(copy)"  # the same tensor as the key in place of the transform; replaces a missing one

_WIDENED = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))  # float32 holds all their values
_MAX_LISTED = 1800  # characters of a list of problems
_MAX_PROBLEM = 300  # characters of one problem
_MAX_HEAD = 500  # characters of the headline
_MAX_GUESSED = 20  # problems after which no more spellings are guessed: it is quadratic
_MAX_GUESSED_KEY = 200  # characters of a key whose spelling is guessed


@dataclasses.dataclass(frozen=True)
class Transform:
    """A named bijection between the original's layout and ours: `inverse(forward(x))` is `x`.

    Attributes:
      name: shown in errors and reports.
      forward, inverse: change the layout of an array, never a value.
      keep: also keep the original tensor for the export, and let it be float64: for tensors that
        are data and that we need in float32.
      parts: (length, transform) of each of the parameters that a tensor is cut into, where they
        differ; () for equal parts, each with this transform.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    keep: bool = False
    parts: tuple[tuple[int, Transform], ...] = ()

    def of_part(self, part: int) -> Transform:
        """Give the transform of a part."""
        return self.parts[part][1] if self.parts else self


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return _of_rank(x, 2).T


def _from_conv1(x: np.ndarray) -> np.ndarray:
    if x.ndim != 3 or x.shape[-1] != 1:
        raise ValueError("three axes expected, the last of length 1")
    return x[..., 0].T


def _to_conv1(x: np.ndarray) -> np.ndarray:
    return x.T[..., None]


def _of_rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim != rank:
        raise ValueError(f"{rank} axes expected")
    return x


SAME = Transform("same", _same, _same)
TRANSPOSE = Transform("transpose", _transposed, _transposed)  # [out, in] <-> [in, out]
CONV1 = Transform("conv kernel 1", _from_conv1, _to_conv1)  # [out, in, 1] <-> [in, out]


def split_out(head_dim: int) -> Transform:
    """Transform a linear into heads, [H*K, D] <-> [D, H, K]."""

    def forward(x):
        return _of_rank(x, 2).T.reshape(x.shape[1], -1, head_dim)

    def inverse(x):
        return x.reshape(x.shape[0], -1).T

    return Transform(f"split outputs into heads of {head_dim}", forward, inverse)


def split_in(head_dim: int) -> Transform:
    """Transform a linear out of heads, [D, H*K] <-> [H, K, D]."""

    def forward(x):
        return _of_rank(x, 2).T.reshape(-1, head_dim, x.shape[0])

    def inverse(x):
        return x.reshape(-1, x.shape[-1]).T

    return Transform(f"split inputs into heads of {head_dim}", forward, inverse)


def split_bias(head_dim: int) -> Transform:
    """Transform the bias of a linear into heads, [H*K] <-> [H, K]."""

    def forward(x):
        return _of_rank(x, 1).reshape(-1, head_dim)

    def inverse(x):
        return x.reshape(-1)

    return Transform(f"split into heads of {head_dim}", forward, inverse)


def cut_into(*parts: tuple[int, Transform]) -> Transform:
    """Cut a tensor along its first axis into parts of these lengths, each with a transform of its
    own.

    For a target that names as many: r"layer_\\1/{q,k,v}/kernel".
    """
    lengths = " + ".join(str(length) for length, _ in parts)
    return Transform(f"cut into {lengths}", _same, _same, parts=parts)


Rule = tuple[str, str, Transform | str]  # pattern of the key, target, transform or reason or key


@dataclasses.dataclass(frozen=True)
class Converted:
    """A state dict read through a table.

    Attributes:
      params: the parameter tree, NumPy float32.
      buffers: tensors kept for the export, by key.
      dropped: key -> reason, buffers included.
      copies: key -> the key of which it is a copy.
      dtypes: key -> dtype in the file.
    """

    params: dict[str, Any]
    buffers: dict[str, np.ndarray]
    dropped: dict[str, str]
    copies: dict[str, str]
    dtypes: dict[str, str]


# -------------------------------------------------------------------------------------------------
# The table read backwards: from a parameter to its key


def key_of(rules: Sequence[Rule], path: str) -> tuple[str, Transform] | None:
    """Find the original's key of a parameter, and the transform of its rule.

    Args:
      rules: the family's table.
      path: path of a parameter; of a stacked one with its slot, "layer_0/up/kernel[3]".
    Returns: (key, transform), or None where no rule writes this parameter.
    """
    found = _place_of(rules, path)
    return found[:2] if found else None


def _place_of(rules: Sequence[Rule], path: str) -> tuple[str, Transform, int] | None:
    """`key_of`, and which part of the key's tensor the parameter is."""
    for pattern, whole, transform in rules:
        if not isinstance(transform, Transform):
            continue
        for part, target in enumerate(_parts(whole)):
            key = _backward(pattern, target, path)
            if key is not None:
                return key, transform.of_part(part), part
    return None


_PARTS = re.compile(r"\{([^{}]*)\}")


@functools.lru_cache(maxsize=4096)
def _parts(target: str) -> tuple[str, ...]:
    """List the paths of a target: "attn/{q,k}/bias" -> "attn/q/bias", "attn/k/bias"."""
    found = _PARTS.search(target)
    if not found:
        return (target,)  # as nearly all are
    return tuple(_PARTS.sub(name, target) for name in found[1].split(","))


def _backward(pattern: str, target: str, path: str) -> str | None:
    """Find the key of which `target` makes `path`."""
    backward, count = _turned_round(pattern, target)
    match = backward.fullmatch(path)
    if not match:
        return None
    numbered = iter(range(1, count + 1))
    key = re.sub(r"\([^()]*\)", lambda _: match[f"g{next(numbered)}"], pattern)
    return key.replace(r"\.", ".")


@functools.lru_cache(maxsize=4096)  # tables are asked for every parameter of a model
def _turned_round(pattern: str, target: str) -> tuple[re.Pattern, int]:
    """Compile the expression of the paths that `target` makes of keys; count the key's groups.

    A key pattern r"blocks\\.(\\d+)\\.up" with the target r"layer_\\1/up/kernel" gives
    r"layer_(?P<g1>\\d+)/up/kernel" and 1.
    """
    groups = re.findall(r"\([^()]*\)", pattern)
    pieces = []
    for i, piece in enumerate(re.split(r"\\(\d)", target)):
        if i % 2:  # the number of a group
            inside = groups[int(piece) - 1][1:-1]
            pieces.append(f"(?P<g{piece}>{inside})")
        else:
            pieces.append(re.escape(piece))
    return re.compile("".join(pieces)), len(groups)


_SLOT = re.compile(r"^(?P<base>.*)\[(?P<slot>[^\]]*)\]$")


def _stacked(rules: Sequence[Rule]) -> list[re.Pattern]:
    """Compile expressions of the parameter paths that are stacked from many keys."""
    found = []
    for _, target, transform in rules:
        slot = _SLOT.match(target)
        if slot and isinstance(transform, Transform):
            found.append(re.compile(re.sub(r"\\\\\d", r"[^/]+", re.escape(slot["base"]))))
    return found


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place in the parameters that a rule writes: a whole parameter, or one row of a stacked
    one.
    """

    path: str
    slot: int | None = None

    def of(self, flat: Mapping[str, Any]) -> Any:
        """Read it from parameters by path."""
        return flat[self.path] if self.slot is None else flat[self.path][self.slot]


def _places(rules: Sequence[Rule], flat: Mapping[str, Any]) -> dict[str, _Place]:
    """List what the table writes, by path or, for stacked parameters, path with slot."""
    stacked = _stacked(rules)
    places = {}
    for path, leaf in flat.items():
        if not any(pattern.fullmatch(path) for pattern in stacked):
            places[path] = _Place(path)
            continue
        for i in range(leaf.shape[0]):
            places[f"{path}[{i}]"] = _Place(path, i)
    return places


# -------------------------------------------------------------------------------------------------
# Import


def to_params(
    rules: Sequence[Rule],
    state: Mapping[str, Any],
    shapes: trees.Tree,
    *,
    what: str,
    allow_cast: bool = False,
    hints: Mapping[str, str] | None = None,
    problems: Sequence[str] = (),
) -> Converted:
    """Read a state dict through a table.

    Args:
      rules: the family's table.
      state: key -> array, without prefix.
      shapes: the model's tree of shapes (`jax.eval_shape(model.init, key)`).
      what: file and model, as the headline of an error names them.
      allow_cast: round float64 and integer tensors to float32 instead of refusing them.
      hints: regular expression of a parameter path -> what to check when its shape differs.
      problems: found before, to be listed in the same error.
    Returns: `Converted`, whose arrays own their memory. float16 and bfloat16 are widened to
      float32, exactly.
    Raises: CheckpointError that lists every key without a rule (or with two), every parameter that
      is missing or written twice, every shape that differs, every tensor of another type, and
      every one with NaN or infinite values.
    """
    # Problems are collected, so that one error lists all of them.
    leaves = trees.flatten(shapes)
    reading = _Reading(
        rules=rules,
        leaves=leaves,
        allow_cast=allow_cast,
        hints=hints or {},
        problems=list(problems),
    )
    state = reading.without_copies(state)
    absent = sorted(set(reading.expected.values()) - set(state))
    for key, value in state.items():
        reading.read(key, value, absent)
    reading.note_missing()
    if reading.problems:
        raise CheckpointError(
            problem_list(f"{what}: the checkpoint does not fit:", reading.problems)
        )

    # A stacked parameter was written row by row.
    params = {}
    for path, leaf in leaves.items():
        if path in reading.wanted:
            params[path] = reading.flat[path]
        else:
            rows = [reading.flat[f"{path}[{i}]"] for i in range(leaf.shape[0])]
            params[path] = np.stack(rows)
    copied = {key: f"the same tensor as {source}" for key, source in reading.copies.items()}
    return Converted(
        trees.unflatten(params),
        buffers=reading.buffers,
        dropped=reading.dropped | copied,
        copies=reading.copies,
        dtypes=reading.dtypes,
    )


class _Reading:
    """One state dict being read: what the model wants, what was written, what is wrong."""

    def __init__(
        self,
        rules: Sequence[Rule],
        leaves: Mapping[str, Any],
        allow_cast: bool,
        hints: Mapping[str, str],
        problems: list[str],
    ):
        self.rules = [(re.compile(pattern), target, how) for pattern, target, how in rules]
        self.allow_cast, self.hints, self.problems = allow_cast, hints, problems
        self.wanted: dict[str, tuple[int, ...]] = {}  # path, with slot -> shape
        self.expected: dict[str, str] = {}  # path, with slot -> the key it should come from
        for name, place in _places(rules, leaves).items():
            shape = tuple(leaves[place.path].shape)
            self.wanted[name] = shape if place.slot is None else shape[1:]
            if found := key_of(rules, name):
                self.expected[name] = found[0]

        self.written: dict[str, str] = {}  # path, with slot -> the key that wrote it
        self.flat: dict[str, np.ndarray] = {}
        self.buffers: dict[str, np.ndarray] = {}
        self.dropped: dict[str, str] = {}
        self.copies: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}

    def without_copies(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Take out the keys of COPY rules, into `copies`; one replaces a missing source."""
        rest = dict(state)
        for pattern, target, source in self.rules:
            if target != COPY:
                continue
            for key in state:
                match = pattern.fullmatch(key)
                if not match:
                    continue
                value, of = rest.pop(key), match.expand(str(source))
                if of not in rest:
                    rest[of] = value
                elif not same_bytes(value, rest[of]):
                    copy = f"differs from {quoted(of)}, of which it should be a copy"
                    self.problems.append(f"{quoted(key)}: {copy}")
                self.copies[key] = of
        return rest

    def read(self, key: str, value: Any, absent: Sequence[str]) -> None:
        """Read one tensor. absent: expected keys that the file lacks, to guess a spelling from."""
        rule = self._rule_of(key, absent)
        if rule is None:
            return
        match, target, transform = rule
        if target == DROP:
            self.dropped[key] = str(transform)
            return
        if not isinstance(value, np.ndarray):
            kind = getattr(value, "name", type(value).__name__)
            self.problems.append(f"{quoted(key)}: not a tensor but {quoted(str(kind))}")
            return

        # What is kept for the export stays in its own type, whatever that is.
        keep = not isinstance(transform, Transform) or transform.keep
        trouble = _unusable(value, allow_cast=self.allow_cast or keep)
        if trouble:
            self.problems.append(f"{quoted(key)}: {trouble}")
        self.dtypes[key] = value.dtype.name
        if keep:
            self.buffers[key] = np.array(value)
        if not isinstance(transform, Transform):
            self.dropped[key] = f"not a parameter: {transform}"
            return

        # One tensor may be several parameters: it is cut along its first axis, into equal parts
        # unless the transform names their lengths.
        paths = _parts(match.expand(target))
        lengths = [length for length, _ in transform.parts]
        if len(paths) == 1:
            pieces = [value]
        elif value.ndim and lengths and value.shape[0] == sum(lengths):
            pieces = np.split(value, np.cumsum(lengths)[:-1])
        elif value.ndim and not lengths and value.shape[0] % len(paths) == 0:
            pieces = np.split(value, len(paths))
        else:
            wanted = f"cut into {lengths}" if lengths else f"{len(paths)} equal parts"
            self.problems.append(
                f"{quoted(key)}: {value.shape} is not {wanted}{self._hint(paths[0])}"
            )
            self.written |= dict.fromkeys(paths, key)
            return
        for part, (path, piece) in enumerate(zip(paths, pieces, strict=True)):
            self._write(path, piece, transform.of_part(part), key=key, usable=not trouble)
        forget(value)  # what was made of it is a copy

    def _rule_of(self, key: str, absent: Sequence[str]):
        """Find the one rule of a key, as (match, target, transform); None, and a problem, else."""
        hits = []
        for pattern, target, transform in self.rules:
            if match := pattern.fullmatch(key):
                hits.append((match, target, transform))
        if len(hits) == 1:
            return hits[0]
        trouble = "several rules match" if hits else "no rule matches"
        if len(self.problems) < _MAX_GUESSED and len(key) < _MAX_GUESSED_KEY:
            for near in difflib.get_close_matches(key, absent, 1):
                trouble += f" (did it mean {quoted(near)}?)"
        self.problems.append(f"{quoted(key)}: {trouble}")
        return None

    def _write(self, path: str, piece: np.ndarray, transform: Transform, key: str, usable: bool):
        """Write one parameter, or one row of a stacked one."""
        if path in self.written:
            before = f"which {quoted(self.written[path])} has written already"
            self.problems.append(f"{quoted(key)}: writes {path}, {before}")
            return
        self.written[path] = key
        if path not in self.wanted:
            self.problems.append(f"{quoted(key)}: the model has no {path}")
            return
        try:
            array = transform.forward(piece)
            shape = array.shape
        except ValueError as e:
            array = None
            reason = str(e) if "axes" in str(e) else f"does not {transform.name}"
            shape = f"{piece.shape} ({reason})"
        if array is None or shape != self.wanted[path]:
            trouble = f"checkpoint {shape}, model {self.wanted[path]}, from {quoted(key)}"
            self.problems.append(f"{path}: {trouble}{self._hint(path)}")
        elif usable:
            self.flat[path] = owned(array)

    def _hint(self, path: str) -> str:
        for pattern, hint in self.hints.items():
            if re.search(pattern, path):
                return f" ({hint})"
        return ""

    def note_missing(self) -> None:
        """List every parameter that no key has written."""
        for path in self.wanted:
            if path in self.written:
                continue
            key = self.expected.get(path)
            should = f" (its key would be {key!r})" if key else ""
            self.problems.append(f"{path}: missing in the checkpoint{should}")


def same_bytes(a: object, b: object) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def owned(array: np.ndarray) -> np.ndarray:
    """Copy into float32 memory that jax on a CPU takes over as it is: at a multiple of 64 bytes."""
    raw = np.empty(4 * array.size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    copy = raw[start : start + 4 * array.size].view(np.float32).reshape(array.shape)
    copy[...] = array
    return copy


def forget(array: np.ndarray) -> None:
    """Let go of the memory of an array on a mapped file, whose bytes are read again when asked for.

    Else a file that was read once from end to end would be in memory as a whole. Arrays that lie
    elsewhere are left alone.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    whole = owner.obj if isinstance(owner, memoryview) else owner
    if not (isinstance(whole, mmap.mmap) and array.size):
        return
    begin = np.frombuffer(whole, np.uint8).__array_interface__["data"][0]
    low, high = (address - begin for address in np.lib.array_utils.byte_bounds(array))
    low = low // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(whole, "madvise"):  # not on Windows
        whole.madvise(mmap.MADV_DONTNEED, low, high - low)


def _unusable(value: np.ndarray, *, allow_cast: bool) -> str | None:
    """Say why a tensor can't become float32 parameters, if it can't."""
    name = value.dtype.name
    if value.dtype.kind == "c":
        return f"complex numbers ({name}) can't become float32"
    exact = value.dtype == np.float32 or value.dtype in _WIDENED
    if not exact and not allow_cast:
        unless = "and is not unless a cast is allowed (--allow-cast)"
        return f"{name} would be rounded to float32, {unless}"
    with np.errstate(over="ignore"):
        bad = int(value.size - np.isfinite(value.astype(np.float32, copy=False)).sum())
    if bad:
        return f"{bad} of {value.size} values are NaN, infinite or too large for float32"
    return None


def problem_list(head: str, problems: Sequence[str]) -> str:
    """Join a headline and problems, a line each, to at most a screen.

    A hostile file must not make an endless message: lines are shortened, and the rest counted.
    """
    lines = [shortened(head, _MAX_HEAD)]
    room = _MAX_LISTED - len(lines[0]) - len("\n  ... and 1000000 more")
    for done, problem in enumerate(problems):
        line = shortened(problem, _MAX_PROBLEM)
        room -= len(line) + 3
        if room < 0:
            lines.append(f"... and {len(problems) - done} more")
            break
        lines.append(line)
    return "\n  ".join(lines)


# -------------------------------------------------------------------------------------------------
# Export


def to_state(
    rules: Sequence[Rule], params: trees.Tree, dtypes: str | Mapping[str, str] = "float32"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Write parameters as the original's state dict: the inverse of `to_params`, without buffers.

    Args:
      rules: the family's table.
      params: the parameters.
      dtypes: dtype of the original file, of all tensors or by key. A tensor goes back to a narrower
        type if that keeps every value; otherwise it stays float32.
    Returns: key -> array, and the keys whose narrower type could not be kept.
    Raises: ValueError for parameters that the table has no line for.
    """
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    pieces: dict[str, dict[int, np.ndarray]] = {}  # key -> part -> array in the original's layout
    unknown: list[str] = []
    for name, place in _places(rules, flat).items():
        found = _place_of(rules, name)
        if found is None:
            unknown.append(name)
            continue
        key, transform, part = found
        pieces.setdefault(key, {})[part] = transform.inverse(place.of(flat))
    if unknown:
        raise ValueError(problem_list("the original has no place for these parameters:", unknown))

    state: dict[str, np.ndarray] = {}
    wider: list[str] = []
    for key, by_part in pieces.items():
        parts = [by_part[i] for i in sorted(by_part)]
        array = np.array(parts[0] if len(parts) == 1 else np.concatenate(parts), order="C")
        name = dtypes if isinstance(dtypes, str) else dtypes.get(key, "float32")
        state[key], exact = _narrowed(array, np.dtype(name))
        if not exact:
            wider.append(key)
    return state, wider


def _narrowed(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """Cast to another dtype if that keeps every value; also say whether it did."""
    if dtype == array.dtype:
        return array, True
    with np.errstate(all="ignore"):
        narrow = array.astype(dtype)
        exact = np.array_equal(narrow.astype(array.dtype), array)
    return (narrow, True) if exact else (array, False)
