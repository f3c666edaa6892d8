"""Original checkpoints on disk: the files of one, the state dict in them, and whose it is."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import yaml

from converters import tables, wrappers
from converters.layout import Layout
from converters.pickles import Placeholder, quoted
from converters.torch_files import read_safetensors, read_torch
from ltsm_jax import hub
from ltsm_jax.models import FAMILIES, folders
from ltsm_jax.original_files import CheckpointError, shortened

MAX_JSON = 4 << 20  # bytes; the index of 2,600 tensors has 0.3 MB
MAX_YAML = 32 << 10  # bytes; a config has some 3 KB
_MAX_OPENED = 500  # brackets in it: PyYAML takes minutes for thousands that are never closed
# What a file is called whose state dict stands under these keys; elsewhere: "nested".
_CONTAINERS = {(): "state_dict", ("state_dict",): "lightning", ("student",): "student"}


# A family's module is found by the family's name, so that a new one is written down in one place
# only.
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
    # "lightning", "student", "nested": in a dictionary; "state_dict", "safetensors": all there is
    container: str
    state: dict[str, Any]
    extras: dict[str, Any]
    notes: tuple[str, ...] = ()  # what was done to find the state dict


def read_original(src: str | Path) -> Original:
    """Read the checkpoint of a file, of the index of several, or of a folder with one in it.

    Raises: CheckpointError for anything that holds no state dict.
    """
    path = Path(src)
    if path.is_dir():
        path = _only_file(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        if not tensors:
            raise CheckpointError(
                f"{path}: the file is empty: it holds no tensor. Save the model's state_dict()."
            )
        return Original(
            path=path,
            files=(path,),
            format="safetensors",
            container="safetensors",
            state=tensors,
            extras={},
        )
    file = read_torch(path)
    content = file.content
    if isinstance(content, Placeholder):
        raise CheckpointError(
            f"{path}: a pickled object of class {quoted(content.name)}, not a state dict. Load it "
            "with the program that wrote it and save its state_dict() with torch.save."
        )
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a state dict. Save the model's "
            "state_dict()."
        )
    try:
        nest, state, aside = wrappers.find_state(
            content, lambda found: _recognised(found) is not None
        )
    except ValueError as e:
        raise CheckpointError(
            f"{path}: {e}. Save the one you mean with torch.save, alone."
        ) from None
    if state is None:
        what = "has no tensors under names" if content else "is empty"
        raise CheckpointError(
            f"{path}: the dictionary in it {what}, so it is no state dict. Save the model's "
            "state_dict() with torch.save."
        )
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        raise CheckpointError(
            f"{path}: the state dict has keys that are not text ({type(odd[0]).__name__}). Save "
            "the model's state_dict() with torch.save."
        )
    named = {
        k: v for k, v in content.items() if isinstance(k, str) and len(k) <= 100 and k.isprintable()
    }
    extras = {k: named[k] for k in list(named)[:100] if k != nest[0]} if nest else {}
    container = _CONTAINERS.get(nest, "nested")
    notes = wrappers.nest_notes(nest, aside)
    return Original(
        path=path,
        files=(path,),
        format=file.container,
        container=container,
        state=state,
        extras=extras,
        notes=tuple(notes),
    )


def _only_file(folder: Path) -> Path:
    """The checkpoint of a folder: what the hub calls it, else the one file there is."""
    for name in hub.WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if (folder / folders.ADAPTER).exists():
        raise CheckpointError(folders.adapter_advice(folder))
    files = folders.originals(folder)
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise CheckpointError(
            f"{folder}: one checkpoint file was expected in this folder, found: {names}. Name the "
            "file."
        )
    return files[0]


def _read_shards(index: Path) -> Original:
    """A checkpoint in several files: what `weight_map` of the index says, no more and no less."""
    listed = read_config_json(index)
    table = listed.get("weight_map") if isinstance(listed, dict) else None
    fits = (
        isinstance(table, dict) and table and all(isinstance(name, str) for name in table.values())
    )
    names = sorted(set(table.values())) if fits and table else []
    outside = [name for name in names if Path(name).name != name or not name or len(name) > 255]
    odd = outside or [name for name in names if Path(name).suffix not in folders.ORIGINALS]
    if not fits or odd:
        where = (
            "files outside its folder"
            if outside
            else "another index, or other files that hold no tensors"
        )
        what = f"names {where}: {', '.join(map(quoted, odd[:5]))}" if odd else "has no weight_map"
        raise CheckpointError(
            f"{index}: not the index of a checkpoint in several files: it {what}."
        )
    assert table
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        shown = ", ".join(map(quoted, missing[:5])) + (
            f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        )
        raise CheckpointError(f"{index}: {shown} not there. Fetch all {len(names)} files.")
    state, problems = {}, []
    parts = [read_original(index.parent / name) for name in names]
    for name, part in zip(names, parts, strict=True):
        for key, value in part.state.items():
            if table.get(key) != name:
                problems.append(
                    f"{quoted(key)}: in {name}, but the index says {quoted(str(table.get(key)))}"
                )
            state[key] = value
    problems += [
        f"{quoted(key)}: not in {quoted(name)}" for key, name in table.items() if key not in state
    ]
    if problems:
        raise CheckpointError(
            tables.problem_list(f"{index}: the files do not go with the index:", problems)
        )
    files = tuple(index.parent / name for name in names)
    return Original(
        path=index,
        files=files,
        format=parts[0].format,
        container=parts[0].container,
        state=state,
        extras={},
        notes=parts[0].notes,
    )


def family_of(original: Original) -> tuple[Any, Layout, Original]:
    """Find the family that a state dict is of.

    Returns: the family's converter module, how the state dict lies in its file, and the original
      without what PyTorch's wrappers leave in its keys.
    Raises: CheckpointError for a state dict of no known family, of several models, or of adapters.
    """
    if len(original.state) > wrappers.MAX_KEYS:
        raise CheckpointError(
            f"{original.path}: {len(original.state)} keys, more than any known model has"
        )
    try:
        state, notes = wrappers.without_wrappers(original.state)
    except ValueError as e:
        raise CheckpointError(
            f"{original.path}: {e}. Save the bare model's state_dict()."
        ) from None
    if wrappers.has_adapters(state):
        raise CheckpointError(folders.adapter_advice(original.path))
    found = _recognised(state)
    parts = _by_first_part(state)
    if found is None or not all(map(found[1].covers, state)):
        largest = sorted(parts, key=lambda part: -len(parts[part]))[:20]
        models = [
            part for part in parts if part in largest and _recognised(parts[part]) is not None
        ]
        if len(models) > 1:
            raise CheckpointError(
                f"{original.path}: holds {len(models)} models, whose keys begin with "
                f"{', '.join(quoted(part + '.') for part in models[:5])}. Save the state_dict() of "
                "the one you mean."
            )
        if found is None and models:  # strange keys beside it, which will be listed
            family, inner = _recognised(parts[models[0]]) or (None, Layout())
            found = family, dataclasses.replace(inner, prefix=f"{models[0]}.{inner.prefix}")
    if found is None:
        keys = ", ".join(quoted(key) for key in list(state)[:5])
        raise CheckpointError(
            f"{original.path}: no known model has such keys ({keys}, ...). Known families: "
            f"{', '.join(FAMILIES)}."
        )
    family, layout = found
    if layout.prefix:
        notes = [f"taken off before every key: {quoted(layout.prefix)}", *notes]
    return (
        family,
        layout,
        dataclasses.replace(original, state=state, notes=(*original.notes, *notes)),
    )


def _recognised(state: dict[str, Any]) -> tuple[Any, Layout] | None:
    """The converter module and the layout of the family that knows a state dict, whatever all its
    keys begin with.
    """
    if len(state) > wrappers.MAX_KEYS or not all(isinstance(key, str) for key in state):
        return None
    outer = wrappers.common_prefix(state)
    for n in range(len(outer) + 1):
        prefix = "".join(part + "." for part in outer[:n])
        bare = {key[len(prefix) :]: value for key, value in state.items()}
        for family in _MODULES.values():
            layout = family.recognise(bare)
            if layout is not None:
                return family, dataclasses.replace(layout, prefix=prefix + layout.prefix)
    return None


def _by_first_part(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The state dict in pieces, by the first part of the keys."""
    pieces: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        first, dot, rest = key.partition(".")
        if dot:
            pieces.setdefault(first, {})[rest] = value
    return pieces


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values, such as an original's config before it was JSON.

    Raises: CheckpointError where it is none, has more bytes than a config, refers to parts of
      itself (a few lines that do so are gigabytes), or asks for objects of a program.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_YAML + 1)
        if len(text) > MAX_YAML:
            raise ValueError(f"more than {MAX_YAML >> 10} KB, which no config needs")
        if text.count(b"[") + text.count(b"{") > _MAX_OPENED:
            raise ValueError(
                f"more than {_MAX_OPENED} lists and objects in brackets, which no config needs"
            )
        if any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)
        ):
            raise ValueError("it refers to parts of itself; write them out")
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        said = shortened(" ".join(str(e).split()), 300)
        raise CheckpointError(
            f"{path}: not readable YAML ({said}). Mend it or move it away."
        ) from None


def read_config_json(path: Path) -> Any:
    """Read a JSON file; CheckpointError where it is none, or has more bytes than one of a
    checkpoint.
    """
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
