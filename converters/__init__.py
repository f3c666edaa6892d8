"""Published checkpoints in and out: files of PyTorch models <-> model folders of this library, without PyTorch.

A family's converter is one file with a key table (see `timer`) and one line in FAMILIES. The file readers know no
model, the key-table engine (`tables`) knows no file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters import tables, timer
from converters.layout import Layout
from converters.torch_files import CheckpointError, Placeholder, quoted, read_safetensors, read_torch, write_torch
from ltsm_jax import trees
from ltsm_jax.models import Model, library

FAMILIES = {"timer": timer}

__all__ = ["FAMILIES", "CheckpointError", "export_checkpoint", "import_checkpoint", "inspect"]


@dataclasses.dataclass(frozen=True)
class _Original:
    """An original file: its state dict, and what else was in it."""

    path: Path
    format: str  # zip, legacy, safetensors
    container: str  # "lightning": the state dict stands under "state_dict"; "state_dict": it is all there is
    state: dict[str, Any]
    extras: dict[str, Any]


def import_checkpoint(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    allow_cast: bool = False,
    overwrite: bool = False,
) -> tuple[Model, trees.Tree, dict[str, Any], dict[str, np.ndarray]]:
    """An original checkpoint file as a model of this library.

    Args:
      src: the file, or a folder with one such file in it.
      dst: model folder to write, whole or not at all; None writes nothing.
      config: the original's hyper-parameters under their published names, or the path of such a JSON file. By default
        config.json beside the file, then `hyper_parameters` in the file, then what the shapes say.
      allow_cast: round float64 and integer tensors to float32 instead of refusing them.
      overwrite: replace a folder at `dst`.
    Returns: (model, params, provenance, buffers): params as jax arrays in float32, provenance as JSON types, buffers
      (tensors that are not learned) as numpy arrays under the original's key.
    Raises: CheckpointError for a file that is damaged, hostile or does not fit; FileExistsError.
    """
    if dst is not None and Path(dst).exists() and not overwrite:
        raise FileExistsError(f"{dst} exists; choose another folder or ask to overwrite it (--overwrite)")
    original = _read(src)
    family, layout = _family(original)
    stripped, copies, problems = layout.strip(original.state)
    published = _published(original, config)
    model_config, notes = family.configure(stripped, published, str(original.path))
    model = family.MODEL(model_config)
    what = f"{original.path}: {model.family} {model_config}"
    problems += family.check_buffers(model_config, stripped)
    converted = tables.to_params(
        family.keys(model_config),
        stripped,
        library.shapes(model),
        what=what,
        allow_cast=allow_cast,
        hints=family.HINTS,
        problems=problems,
    )
    dtypes = set(converted.dtypes.values())
    with open(original.path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    provenance = {
        "source": original.path.name,
        "sha256": sha256,
        "licence": model.licence,
        "format": original.format,
        "container": original.container,
        "prefix": layout.prefix,
        "aliases": sorted({a for a in layout.aliases if any(k.startswith(layout.outer + a) for k in copies)}),
        "dtype": dtypes.pop() if len(dtypes) == 1 else converted.dtypes,
        "dropped": copies | converted.dropped,
        "extras": {k: v for k, v in original.extras.items() if _is_plain(v)},
        "ignored": [k for k, v in original.extras.items() if not _is_plain(v)],
        "notes": notes,
    }
    params = trees.unflatten({path: jnp.asarray(leaf) for path, leaf in trees.flatten(converted.params).items()})
    if dst is not None:
        library.save(dst, model, params, provenance=provenance, buffers=converted.buffers, overwrite=overwrite)
    return model, params, provenance, converted.buffers


def export_checkpoint(src: str | Path, dst: str | Path, *, overwrite: bool = False) -> list[str]:
    """A model folder as a file that the original's code loads.

    Args:
      src: model folder, or the name of a shipped model.
      dst: file to write: `.ckpt` nests the state dict under "state_dict" with the key prefix, as Lightning does;
        `.pth` is the bare state dict. Where the folder was imported from such a file, its own prefix is used, and its
        tensors come back byte for byte unless they were trained since.
      overwrite: replace a file that is there.
    Returns: notes on what could not be kept.
    Raises: ValueError for a model that the original can't hold, or another suffix; FileExistsError.
    """
    dst = Path(dst)
    if dst.suffix not in (".ckpt", ".pth"):
        raise ValueError(f"{dst}: the suffix says the container: .ckpt (Lightning) or .pth (bare state dict)")
    folder = Path(src) if Path(src).is_dir() else library.SHIPPED / str(src)
    model, params = library.load(src)
    record = library.read_config(folder)[1].get("provenance", {})
    kept = library.read_buffers(folder)
    family = FAMILIES[model.family]
    published = family.published(model.config)
    told = record.get("dtype", "float32")
    rules = family.keys(model.config)
    state, wider = tables.to_state(rules, params, told)
    notes = [f"{key}: its values do not fit the original's {told}, so it stays float32" for key in wider]
    state |= kept or family.buffers(model.config)

    container = "lightning" if dst.suffix == ".ckpt" else "state_dict"
    if record.get("container") == container:
        aliases = {a: t for a, t in getattr(family, "ALIASES", {}).items() if a in record.get("aliases", ())}
        layout = Layout(record.get("prefix", ""), aliases)
    else:
        layout = Layout("model." if container == "lightning" else "")
    content: dict[str, Any] = layout.dress(state)
    if container == "lightning":
        content = {**record.get("extras", {}), "state_dict": content, "hyper_parameters": published}
    beside = dst.with_name("config.json")
    dst.parent.mkdir(parents=True, exist_ok=True)
    write_torch(dst, content, overwrite=overwrite)
    if container == "state_dict":  # has no room for what the shapes do not say
        if not beside.exists():
            beside.write_text(json.dumps(published, indent=1) + "\n")
            notes.append(f"{beside}: written too, since the file can't hold the number of heads")
        elif _json(beside) != published:
            notes.append(
                f"{beside} is another model's; this one needs n_heads={published.get('n_heads')} beside its file"
            )
    return notes


def inspect(src: str | Path, *, config: str | Path | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint file or model folder is: family, config, parameter count, dropped keys, dtype, sha256, ...

    Raises: as `import_checkpoint`; a file that can't be imported can't be described either.
    """
    path = Path(src)
    shipped = not path.exists() and str(src) in library.shipped()
    if shipped or (path / library.PARAMS).is_dir():
        folder = path if path.is_dir() else library.SHIPPED / str(src)
        model, params = library.load(src)
        provenance = library.read_config(folder)[1].get("provenance", {})
    else:
        model, params, provenance, _ = import_checkpoint(src, config=config, allow_cast=True)
    return {
        "family": model.family,
        "config": model.config_to_dict(),
        "parameters": trees.count(params),
        **provenance,
    }


def _read(src: str | Path) -> _Original:
    path = Path(src)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in library.ORIGINALS)
        if len(files) != 1:
            names = ", ".join(p.name for p in files) or "none"
            raise CheckpointError(
                f"{path}: one checkpoint file was expected in this folder, found: {names}. Name the file."
            )
        path = files[0]
    if path.suffix == ".safetensors":
        return _Original(path, "safetensors", "state_dict", read_safetensors(path), {})
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
    nested = content.get("state_dict")
    if "state_dict" in content and not isinstance(nested, dict):
        raise CheckpointError(f"{path}: its 'state_dict' is a {type(nested).__name__}, not a dict of tensors.")
    state = nested if isinstance(nested, dict) else content
    odd = [key for key in state if not isinstance(key, str)]
    if odd or not state:
        what = f"has keys that are not text ({type(odd[0]).__name__})" if odd else "is empty"
        raise CheckpointError(f"{path}: the state dict {what}. Save the model's state_dict() with torch.save.")
    named = {k: v for k, v in content.items() if isinstance(k, str) and len(k) <= 100 and k.isprintable()}
    extras = {k: named[k] for k in list(named)[:100] if k != "state_dict"} if isinstance(nested, dict) else {}
    return _Original(path, file.container, "lightning" if isinstance(nested, dict) else "state_dict", state, extras)


def _is_plain(value: object) -> bool:
    """Whether an extra of a Lightning file is worth keeping: a short text or a number."""
    if isinstance(value, str):
        return len(value) <= 200 and value.isprintable()
    return isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) < 2**63)


def _family(original: _Original) -> tuple[Any, Layout]:
    for family in FAMILIES.values():
        layout = family.recognise(original.state)
        if layout is not None:
            return family, layout
    keys = ", ".join(quoted(key) for key in list(original.state)[:5])
    raise CheckpointError(
        f"{original.path}: no known model has such keys ({keys}, ...). Known families: {', '.join(FAMILIES)}."
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable JSON ({e}). Mend it or move it away.") from None


def _published(original: _Original, config: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if isinstance(config, Mapping):
        return config
    beside = original.path.with_name("config.json")
    if config is not None or beside.exists():
        found = _json(Path(config) if config is not None else beside)
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{config or beside}: a JSON object of hyper-parameters was expected. Mend or move it."
            )
        return found
    told = original.extras.get("hyper_parameters")
    told = told.state if isinstance(told, Placeholder) and told.name == "argparse.Namespace" else told
    if isinstance(told, dict) and all(isinstance(told.get(name), int) for name in ("d_model", "n_heads", "patch_len")):
        return {k: v for k, v in told.items() if isinstance(k, str)}
    return None
