"""Original checkpoints on disk: the files of one, the state dict in them, and whose it is."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from converters import tables
from converters.layout import Layout
from converters.pickles import CheckpointError, Placeholder, quoted, shortened
from converters.torch_files import read_safetensors, read_torch
from ltsm_jax import hub
from ltsm_jax.models import FAMILIES, folders

MAX_JSON = 4 << 20  # bytes; the index of 2,600 tensors has 0.3 MB
NESTED = ("state_dict", "student")  # keys under which programs put the state dict beside other things


# A family's module is found by the family's name, so that a new one is written down in one place only.
_MODULES = {family: importlib.import_module(f"converters.{family}") for family in FAMILIES}


def converter(family: str) -> Any:
    """Give the converter module of a family."""
    return _MODULES[family]


@dataclasses.dataclass(frozen=True)
class Original:
    """An original checkpoint: its state dict, and what else was in it."""

    path: Path  # the file, or the index of several
    files: tuple[Path, ...]
    format: str  # zip, legacy, safetensors
    container: str  # "lightning", "student": the state dict is nested; "state_dict", "safetensors": it is all there is
    state: dict[str, Any]
    extras: dict[str, Any]


def read(src: str | Path) -> Original:
    """Read the checkpoint of a file, of the index of several, or of a folder with one in it.

    Raises: CheckpointError for anything that holds no state dict.
    """
    path = Path(src)
    if path.is_dir():
        path = _only_file(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return Original(path, (path,), "safetensors", "safetensors", read_safetensors(path), {})
    file = read_torch(path)
    content = file.content
    if isinstance(content, Placeholder):
        raise CheckpointError(
            f"{path}: a pickled object of class {quoted(content.name)}, not a state dict. Load it with the program "
            "that wrote it and save its state_dict() with torch.save."
        )
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a state dict. Save the model's state_dict()."
        )
    nest = next((key for key in NESTED if key in content), None)
    nested = content.get(nest)
    if nest and not isinstance(nested, dict):
        raise CheckpointError(f"{path}: its {nest!r} is a {type(nested).__name__}, not a dict of tensors.")
    state = nested if isinstance(nested, dict) else content
    odd = [key for key in state if not isinstance(key, str)]
    if odd or not state:
        what = f"has keys that are not text ({type(odd[0]).__name__})" if odd else "is empty"
        raise CheckpointError(f"{path}: the state dict {what}. Save the model's state_dict() with torch.save.")
    named = {k: v for k, v in content.items() if isinstance(k, str) and len(k) <= 100 and k.isprintable()}
    extras = {k: named[k] for k in list(named)[:100] if k != nest} if nest else {}
    container = {"state_dict": "lightning", "student": "student", None: "state_dict"}[nest]
    return Original(path, (path,), file.container, container, state, extras)


def _only_file(folder: Path) -> Path:
    """The checkpoint of a folder: what the hub calls it, else the one file there is."""
    for name in hub.WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = folders.originals(folder)
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise CheckpointError(
            f"{folder}: one checkpoint file was expected in this folder, found: {names}. Name the file."
        )
    return files[0]


def _read_shards(index: Path) -> Original:
    """A checkpoint in several files: what `weight_map` of the index says, no more and no less."""
    listed = read_json(index)
    table = listed.get("weight_map") if isinstance(listed, dict) else None
    fits = isinstance(table, dict) and table and all(isinstance(name, str) for name in table.values())
    names = sorted(set(table.values())) if fits and table else []
    outside = [name for name in names if Path(name).name != name or not name or len(name) > 255]
    odd = outside or [name for name in names if Path(name).suffix not in folders.ORIGINALS]
    if not fits or odd:
        where = "files outside its folder" if outside else "another index, or other files that hold no tensors"
        what = f"names {where}: {', '.join(map(quoted, odd[:5]))}" if odd else "has no weight_map"
        raise CheckpointError(f"{index}: not the index of a checkpoint in several files: it {what}.")
    assert table
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        shown = ", ".join(map(quoted, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{index}: {shown} not there. Fetch all {len(names)} files.")
    state, problems = {}, []
    parts = [read(index.parent / name) for name in names]
    for name, part in zip(names, parts, strict=True):
        for key, value in part.state.items():
            if table.get(key) != name:
                problems.append(f"{quoted(key)}: in {name}, but the index says {quoted(str(table.get(key)))}")
            state[key] = value
    problems += [f"{quoted(key)}: not in {quoted(name)}" for key, name in table.items() if key not in state]
    if problems:
        raise CheckpointError(tables.listed(f"{index}: the files do not go with the index:", problems))
    return Original(index, tuple(index.parent / n for n in names), parts[0].format, parts[0].container, state, {})


def family_of(original: Original) -> tuple[Any, Layout]:
    """Return the converter module of the family that a state dict is of, and how it lies in its file.

    Raises: CheckpointError for a state dict of no known family.
    """
    for family in map(converter, FAMILIES):
        layout = family.recognise(original.state)
        if layout is not None:
            return family, layout
    keys = ", ".join(quoted(key) for key in list(original.state)[:5])
    raise CheckpointError(
        f"{original.path}: no known model has such keys ({keys}, ...). Known families: {', '.join(FAMILIES)}."
    )


def read_json(path: Path) -> Any:
    """Read a JSON file; CheckpointError where it is none, or has more bytes than one of a checkpoint."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON >> 20} MB, which no checkpoint needs")
        return json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{path}: not readable JSON ({shortened(str(e), 300)}). Mend it or move it away."
        ) from None
