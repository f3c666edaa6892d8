"""The key-table engine: an original state dict <-> a parameter tree, strictly.

A table is a sequence of rules, one line per kind of tensor:

    (r"decoder\\.norm\\.weight",                       "norm/scale",         SAME)
    (r"decoder\\.attn_layers\\.(\\d+)\\.conv1\\.weight",  r"layer_\\1/up/kernel", conv1_kernel)
    (r".*\\.rotary_emb\\.inv_freq",                    DROP,                 "recomputed from rope_theta")
    (r"position_embedding\\.pe",                      BUFFER,               "fixed sinusoid table")
    (r"(encoder|decoder)\\.embed_tokens\\.weight",     COPY,                 "shared.weight")
    (r"layers\\.(\\d+)\\.experts\\.(\\d+)\\.up\\.weight", r"layer_\\1/experts/up/kernel[\\2]", TRANSPOSE)
    (r"layers\\.(\\d+)\\.qkv\\.weight",                r"layer_\\1/attn/{q,k,v}/kernel", split_out(64))

A target that ends with `[\\2]` is a slot: the tensors of many keys are one parameter, stacked along its first axis. A
target with `{q,k,v}` is several: one tensor is cut along its first axis into equal parts, each a parameter.

Every key matches exactly one rule, every parameter is written exactly once, every shape agrees; whatever does not is
listed in one error. Rules are literal text and groups, so the same table is read backwards to export.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from converters.pickles import CheckpointError, quoted, shortened
from ltsm_jax import trees

DROP = "(dropped)"  # a rule's target: the key is not used, for the reason that stands in the transform's place
BUFFER = "(buffer)"  # a rule's target: not learned, kept as it is for the export
COPY = "(copy)"  # the same tensor as the key in the place of the transform; stands in for it where that is missing

_WIDENED = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))  # float32 holds every value of these
_MAX_LISTED = 1800  # characters of a list of problems
_MAX_PROBLEM = 300  # characters of one of them
_MAX_HEAD = 500  # characters of what stands over them


@dataclasses.dataclass(frozen=True)
class Transform:
    """A named bijection between the original's layout and ours: `inverse(forward(x))` is `x`. Values never change.

    keep: the original tensor is kept for the export too, and may be float64: for tensors that are data and that we need
    in float32.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    keep: bool = False


SAME = Transform("same", lambda x: x, lambda x: x)
TRANSPOSE = Transform("transpose", lambda x: _of_rank(x, 2).T, lambda x: _of_rank(x, 2).T)  # [out, in] <-> [in, out]
CONV1 = Transform("conv kernel 1", lambda x: _squeezed(x).T, lambda x: x.T[..., None])  # [out, in, 1] <-> [in, out]


def split_out(head_dim: int) -> Transform:
    """Linear into heads, [H*K, D] <-> [D, H, K]."""
    return Transform(
        f"split outputs into heads of {head_dim}",
        lambda x: _of_rank(x, 2).T.reshape(x.shape[1], -1, head_dim),
        lambda x: x.reshape(x.shape[0], -1).T,
    )


def split_in(head_dim: int) -> Transform:
    """Linear out of heads, [D, H*K] <-> [H, K, D]."""
    return Transform(
        f"split inputs into heads of {head_dim}",
        lambda x: _of_rank(x, 2).T.reshape(-1, head_dim, x.shape[0]),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    )


def split_bias(head_dim: int) -> Transform:
    """Bias of a linear into heads, [H*K] <-> [H, K]."""
    return Transform(
        f"split into heads of {head_dim}", lambda x: _of_rank(x, 1).reshape(-1, head_dim), lambda x: x.reshape(-1)
    )


def _of_rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim != rank:
        raise ValueError(f"{rank} axes expected")
    return x


def _squeezed(x: np.ndarray) -> np.ndarray:
    if x.ndim != 3 or x.shape[-1] != 1:
        raise ValueError("three axes expected, the last of length 1")
    return x[..., 0]


Rule = tuple[str, str, Transform | str]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A state dict read through a table: parameters (numpy, float32), buffers by key, and what was done to whom."""

    params: dict[str, Any]
    buffers: dict[str, np.ndarray]
    dropped: dict[str, str]  # key -> reason, buffers included
    copies: dict[str, str]  # key -> the key of which it is a copy
    dtypes: dict[str, str]  # key -> dtype in the file


_SLOT = re.compile(r"^(?P<base>.*)\[(?P<slot>[^\]]*)\]$")


def key_of(rules: Sequence[Rule], path: str) -> tuple[str, Transform] | None:
    """The original's key of a parameter path (a stacked one with its slot: "layer_0/up/kernel[3]"), and the rule's
    transform: the table read backwards."""
    found = _place_of(rules, path)
    return found[:2] if found else None


_PARTS = re.compile(r"\{([^{}]*)\}")


@functools.lru_cache(maxsize=4096)
def _parts(target: str) -> tuple[str, ...]:
    """The paths of a target: "attn/{q,k}/bias" -> "attn/q/bias", "attn/k/bias"; most targets are one path."""
    found = _PARTS.search(target)
    return tuple(_PARTS.sub(name, target) for name in found[1].split(",")) if found else (target,)


def _place_of(rules: Sequence[Rule], path: str) -> tuple[str, Transform, int] | None:
    """`key_of`, and which part of the key's tensor the parameter is."""
    for pattern, whole, transform in rules:
        if not isinstance(transform, Transform):
            continue
        for part, target in enumerate(_parts(whole)):
            key = _backward(pattern, target, path)
            if key is not None:
                return key, transform, part
    return None


def _backward(pattern: str, target: str, path: str) -> str | None:
    """The key of which `target` makes `path`."""
    backward, count = _turned_round(pattern, target)
    match = backward.fullmatch(path)
    if not match:
        return None
    numbered = iter(range(1, count + 1))
    key = re.sub(r"\([^()]*\)", lambda _: match[f"g{next(numbered)}"], pattern)
    return key.replace(r"\.", ".")


@functools.lru_cache(maxsize=4096)  # tables are asked for every parameter of a model
def _turned_round(pattern: str, target: str) -> tuple[re.Pattern, int]:
    """The expression of the paths that `target` makes of keys of a pattern, and how many groups the pattern has."""
    groups = re.findall(r"\([^()]*\)", pattern)
    # r"layer_\1/up/kernel" -> r"layer_(?P<g1>\d+)/up/kernel"
    parts = re.split(r"\\(\d)", target)
    backward = "".join(
        f"(?P<g{part}>{groups[int(part) - 1][1:-1]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)
    )
    return re.compile(backward), len(groups)


def _stacked(rules: Sequence[Rule]) -> list[re.Pattern]:
    """Expressions of the parameter paths that are stacked from many keys."""
    found = (_SLOT.match(target) for _, target, transform in rules if isinstance(transform, Transform))
    return [re.compile(re.sub(r"\\\\\d", r"[^/]+", re.escape(m["base"]))) for m in found if m]


def _slots(rules: Sequence[Rule], flat: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """What the table writes: path, or path with slot -> (path of the parameter, slot)."""
    stacked, slots = _stacked(rules), {}
    for path, leaf in flat.items():
        if any(pattern.fullmatch(path) for pattern in stacked):
            slots |= {f"{path}[{i}]": (path, i) for i in range(leaf.shape[0])}
        else:
            slots[path] = (path, None)
    return slots


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
    """Reads a state dict through a table.

    Args:
      rules: the family's table.
      state: key -> array, without prefix.
      shapes: the model's tree of shapes (`jax.eval_shape(model.init, key)`).
      what: file and model, as they stand at the head of an error.
      allow_cast: round float64 and integer tensors to float32 instead of refusing them.
      hints: regular expression of a parameter path -> what to check when its shape differs.
      problems: what was found before, to stand in the same error.
    Returns: `Converted`, whose arrays own their memory. float16 and bfloat16 are widened to float32, exactly.
    Raises: CheckpointError that lists every key without a rule (or with two), every parameter that is missing or
      written twice, every shape that differs, every tensor of another type, and every one with NaN or infinite values.
    """
    leaves = trees.flatten(shapes)
    slots = _slots(rules, leaves)
    wanted = {name: tuple(leaves[path].shape[0 if slot is None else 1 :]) for name, (path, slot) in slots.items()}
    expected = {path: found[0] for path in wanted if (found := key_of(rules, path))}
    problems = list(problems)
    written: dict[str, str] = {}
    flat: dict[str, np.ndarray] = {}
    buffers: dict[str, np.ndarray] = {}
    dropped: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    copies: dict[str, str] = {}
    compiled = [(re.compile(pattern), target, transform) for pattern, target, transform in rules]
    free = sorted(set(expected.values()) - set(state))  # the likely meaning of a misspelt key

    state = _without_copies(compiled, state, copies, problems)
    for key, value in state.items():
        hits = [(m, target, how) for pattern, target, how in compiled if (m := pattern.fullmatch(key))]
        if len(hits) != 1:
            near = difflib.get_close_matches(key, free, 1) if free and len(problems) < 20 and len(key) < 200 else []
            guess = f" (did it mean {quoted(near[0])}?)" if near else ""
            problems.append(f"{quoted(key)}: {'no rule matches' if not hits else 'several rules match'}{guess}")
            continue
        match, target, transform = hits[0]
        if target == DROP:
            dropped[key] = str(transform)
            continue
        if not isinstance(value, np.ndarray):
            kind = getattr(value, "name", type(value).__name__)
            problems.append(f"{quoted(key)}: not a tensor but {quoted(str(kind))}")
            continue
        keep = not isinstance(transform, Transform) or transform.keep  # as it is, in its own type
        trouble = _unusable(value, allow_cast or keep)
        if trouble:
            problems.append(f"{quoted(key)}: {trouble}")
        dtypes[key] = value.dtype.name
        if not isinstance(transform, Transform):
            buffers[key] = np.array(value)
            dropped[key] = f"not a parameter: {transform}"
            continue
        if keep:
            buffers[key] = np.array(value)
        paths = _parts(match.expand(target))
        if len(paths) > 1 and (not value.ndim or value.shape[0] % len(paths)):
            problems.append(f"{quoted(key)}: {value.shape} is not {len(paths)} equal parts")
            written |= dict.fromkeys(paths, key)
            continue
        for path, part in zip(paths, np.split(value, len(paths)) if len(paths) > 1 else [value], strict=True):
            if path in written:
                problems.append(f"{quoted(key)}: writes {path}, which {quoted(written[path])} has written already")
                continue
            written[path] = key
            if path not in wanted:
                problems.append(f"{quoted(key)}: the model has no {path}")
                continue
            try:
                array = transform.forward(part)
                shape = array.shape
            except ValueError as e:
                array, shape = None, f"{part.shape} ({e if 'axes' in str(e) else 'does not ' + transform.name})"
            if array is None or shape != wanted[path]:
                check = [hint for pattern, hint in (hints or {}).items() if re.search(pattern, path)]
                hint = f" ({check[0]})" if check else ""
                problems.append(f"{path}: checkpoint {shape}, model {wanted[path]}, from {quoted(key)}{hint}")
                continue
            if not trouble:
                flat[path] = np.array(array, np.float32, order="C")
    problems += [
        f"{path}: missing in the checkpoint" + (f" (its key would be {expected[path]!r})" if path in expected else "")
        for path in wanted
        if path not in written
    ]
    if problems:
        raise CheckpointError(listed(f"{what}: the checkpoint does not fit:", problems))
    params = {
        path: flat[path] if path in wanted else np.stack([flat[f"{path}[{i}]"] for i in range(leaf.shape[0])])
        for path, leaf in leaves.items()
    }
    dropped |= {key: f"the same tensor as {source}" for key, source in copies.items()}
    return Converted(trees.unflatten(params), buffers, dropped, copies, dtypes)


def _without_copies(
    compiled: Sequence[tuple[re.Pattern, str, Transform | str]],
    state: Mapping[str, Any],
    copies: dict[str, str],
    problems: list[str],
) -> dict[str, Any]:
    """The state dict without the keys of COPY rules, which go to `copies`; one stands in for a missing source."""
    rest = dict(state)
    for pattern, target, source in compiled:
        if target != COPY:
            continue
        for key in [k for k in state if pattern.fullmatch(k)]:
            value = rest.pop(key)
            of = pattern.fullmatch(key).expand(str(source))  # pyright: ignore[reportOptionalMemberAccess]
            if of not in rest:
                rest[of] = value
            elif not same_bytes(value, rest[of]):
                problems.append(f"{quoted(key)}: differs from {quoted(of)}, of which it should be a copy")
            copies[key] = of
    return rest


def same_bytes(a: object, b: object) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
    )


def _unusable(value: np.ndarray, allow_cast: bool) -> str | None:
    """Why a tensor can't become float32 parameters."""
    if value.dtype.kind == "c":
        return f"complex numbers ({value.dtype.name}) can't become float32"
    exact = value.dtype == np.float32 or value.dtype in _WIDENED
    if not exact and not allow_cast:
        return f"{value.dtype.name} would be rounded to float32, and is not unless a cast is allowed (--allow-cast)"
    with np.errstate(over="ignore"):
        bad = int(value.size - np.isfinite(value.astype(np.float32)).sum())
    return f"{bad} of {value.size} values are NaN, infinite or too large for float32" if bad else None


def listed(head: str, problems: Sequence[str]) -> str:
    """One message of many lines, as many as go into a screen; a hostile file can't make it endless."""
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


def to_state(
    rules: Sequence[Rule], params: trees.Tree, dtypes: str | Mapping[str, str] = "float32"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The original's state dict of a parameter tree, in its layout: the inverse of `to_params`, without buffers.

    Args:
      params: the parameters.
      dtypes: dtype of the original file, of all tensors or by key. A tensor goes back to a narrower type
        if that keeps every value; otherwise it stays float32.
    Returns: key -> array, and the keys whose narrower type could not be kept.
    Raises: ValueError for parameters that the table has no line for.
    """
    state: dict[str, np.ndarray] = {}
    wider: list[str] = []
    unknown: list[str] = []
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for name, (path, slot) in _slots(rules, flat).items():
        found = _place_of(rules, name)
        if found is None:
            unknown.append(name)
            continue
        key, transform, part = found
        pieces.setdefault(key, {})[part] = transform.inverse(flat[path] if slot is None else flat[path][slot])
    for key, found in pieces.items():
        parts = [found[i] for i in sorted(found)]
        array = np.array(parts[0] if len(parts) == 1 else np.concatenate(parts), order="C")
        dtype = np.dtype(dtypes if isinstance(dtypes, str) else dtypes.get(key, "float32"))
        if dtype != array.dtype:
            with np.errstate(all="ignore"):
                narrow = array.astype(dtype)
                exact = np.array_equal(narrow.astype(array.dtype), array)
            if exact:
                array = narrow
            else:
                wider.append(key)
        state[key] = array
    if unknown:
        raise ValueError(listed("the original has no place for these parameters:", unknown))
    return state, wider
