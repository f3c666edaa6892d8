"""Published checkpoints in and out: files of PyTorch models <-> model folders of this library,
without PyTorch.

A family's converter is the module `converters.<family>`. The file readers know no model, the
key-table engine (`tables`) knows no file. What a converter module holds:

    MODEL                              the family's class
    keys(config)                       the key table
    recognise(state) -> Layout | None  how a state dict of this family is laid out; None: another's
    configure(state, published, where) -> (config, notes)
                                       published: config.json's fields, or None; those of other
                                       JSON files beside it are found under the file's stem
                                       ("generation_config")
    published(config)                  the fields of config.json, other files under their stem
and, where there is something to say:
    buffers(config)                    tensors that are not learned, where no file brought them
    check_buffers(config, state)       problems with those that a file brought
    HINTS                              regular expression of a path -> what to check where the
                                       shape differs
    ALIASES                            see `Layout`
    SUFFIXES                           file suffix -> container of an export (state_dict,
                                       safetensors, lightning)
    BESIDE                             other JSON files of the original ("generation_config.json")
    BESIDE_YAML                        YAML file that older checkpoints have in place of config.json
A family whose checkpoints come under two sets of keys (its own, and those of the transformers
library) says in `Layout.table` which one it found; `keys`, `published` and `buffers` then take that
name as a second argument:
    TABLES                             file suffix -> table of an export that did not come from
                                       such a file
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters import originals, tables
from converters.fields import uneven_layers
from converters.layout import Layout
from converters.originals import Original, converter, read_config_json, read_yaml
from converters.pickles import Placeholder
from converters.torch_files import write_safetensors, write_torch
from ltsm_jax import hub, storage, trees
from ltsm_jax.models import Model, folders, parts
from ltsm_jax.original_files import CheckpointError, shortened

__all__ = ["CheckpointError", "converter", "export_checkpoint", "import_checkpoint", "inspect"]

_MOST_PUBLISHED = (
    1 << 17
)  # characters of an original's fields; the largest published have a few thousand
SUFFIXES = {
    ".safetensors": "safetensors",
    ".bin": "state_dict",
    ".pth": "state_dict",
    ".ckpt": "state_dict",
}


def import_checkpoint(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    allow_cast: bool = False,
    overwrite: bool = False,
    accept_license: bool = False,
) -> tuple[Model, trees.Tree, dict[str, Any], dict[str, np.ndarray]]:
    """An original checkpoint file as a model of this library.

    Args:
      src: the file, the index file (`*.index.json`) of several, a folder with one such file in it,
        or, where no file is called so, a hub name ("owner/name" or "owner/name@revision"), whose
        files are fetched.
      dst: model folder to write, whole or not at all; None writes nothing.
      config: the original's hyper-parameters under their published names, or the path of such a
        JSON or YAML file. By default config.json beside the file, then `hyper_parameters` in the
        file, then what the shapes say.
      allow_cast: round float64 and integer tensors to float32 instead of refusing them.
      overwrite: replace a folder at `dst`.
      accept_license: accept the licence of weights from the hub that forbids commercial use, see
        `ltsm_jax.load`.
    Returns: (model, params, provenance, buffers): params as jax arrays in float32, provenance as
      JSON types, buffers (tensors that are not learned) as numpy arrays under the original's key.
    Raises: CheckpointError for a file that is damaged, hostile or does not fit; FileExistsError;
      for a hub name also what `ltsm_jax.load` raises.
    """
    if dst is not None:
        folders.require_writable(dst, overwrite)
    path, fetched = _on_disk(src, accept_license)
    if dst is not None and _is_in(path, storage.user_path(dst)):
        raise FileExistsError(
            f"{path} lies in {dst}, which would be replaced; choose another folder"
        )
    original = originals.read_original(path)
    family, layout, original = originals.family_of(original)
    stripped, copies, problems = layout.strip(original.state)
    if missing := uneven_layers(stripped):
        raise CheckpointError(f"{original.path}: {missing}. Save the model's state_dict() again.")
    published = _published(
        original, config, getattr(family, "BESIDE", ()), older=getattr(family, "BESIDE_YAML", None)
    )
    model, notes = _model(family, stripped, published, path=original.path)
    model_config = model.config
    what = f"{original.path}: {model.family} {shortened(str(model_config), 250)}"
    if published is None:
        what += " (no config.json beside it; what the tensors do not say is assumed)"
    if hasattr(family, "check_buffers"):
        problems += family.check_buffers(model_config, stripped)
    converted = tables.to_params(
        _in_table(family.keys, model_config, layout.table),
        stripped,
        _shapes(model, original.path),
        what=what,
        allow_cast=allow_cast,
        hints=getattr(family, "HINTS", None),
        problems=problems,
    )
    dtypes = set(converted.dtypes.values())
    extras = {name: value for name, value in original.extras.items() if _is_plain(value)}
    aliases = set()
    for alias in layout.aliases:
        if any(key.startswith(layout.outer + alias) for key in copies):
            aliases.add(alias)
    provenance = {
        "source": original.path.name,
        "sha256": _sha256(original.files),
        "licence": model.licence,
        "format": original.format,
        "container": original.container,
        "prefix": layout.prefix,
        **({"table": layout.table} if layout.table else {}),
        "aliases": sorted(aliases),
        "dtype": dtypes.pop() if len(dtypes) == 1 else converted.dtypes,
        "dropped": copies | converted.dropped,
        "copies": converted.copies,
        "extras": extras,
        "ignored": [name for name in original.extras if name not in extras],
        "assumed": notes,
        "notes": [*notes, *original.notes],
        **_published_facts(published, _in_table(family.published, model_config, layout.table)),
        **fetched,
    }
    params = jax.device_put(converted.params)  # jnp.asarray would compile a program for every shape
    if dst is not None:
        folders.save(
            dst,
            model,
            params,
            provenance=provenance,
            buffers=converted.buffers,
            overwrite=overwrite,
        )
    return model, params, provenance, converted.buffers


def _model(
    family: Any, state: Mapping[str, Any], published: Any, path: Path
) -> tuple[Model, list[str]]:
    """Build the model that a state dict and its published fields tell, and notes on what had to be
    assumed.

    Raises: CheckpointError.
    """
    try:
        config, notes = family.configure(state, published, str(path))
        # A config that came with the weights is checked as that of a model folder.
        return family.MODEL(
            family.MODEL.config_from_dict(family.MODEL(config).config_to_dict())
        ), notes
    except CheckpointError:
        raise
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as err:
        raise CheckpointError(
            f"{path}: its hyper-parameters make no {family.MODEL.family}: {_said(err)}"
        ) from err


def _shapes(model: Model, path: Path) -> trees.Tree:
    """Give the shapes of a model's parameters.

    Raises: CheckpointError for sizes that do not go together, which fail anywhere in a model and
    with any error.
    """
    try:
        return folders.param_shapes(model)
    except Exception as err:
        raise CheckpointError(f"{path}: no {model.family} has these sizes: {_said(err)}") from err


def _said(error: Exception) -> str:
    """Put an error into one line, with its class where that is not ours."""
    text = " ".join(str(error).split())[:500]
    return text if type(error) is ValueError else f"{type(error).__name__} {text}"


def _in_table(function: Any, config: Any, table: str) -> Any:
    """`keys`, `published` or `buffers` of a family, in the table that a checkpoint is in."""
    return function(config, table) if table else function(config)


def _sha256(files: tuple[Path, ...]) -> str | dict[str, str]:
    """Digest of the one file, or of each by name."""
    found = {}
    for file in files:
        with open(file, "rb") as f:
            found[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return found if len(found) > 1 else next(iter(found.values()))


def export_checkpoint(src: str | Path, dst: str | Path, *, overwrite: bool = False) -> list[str]:
    """A model folder as what the original's code loads.

    Args:
      src: model folder, or the name of a shipped model.
      dst: file to write, or, without a suffix, a folder in the form of the hub (model.safetensors,
        config.json, and what else the original has beside them). The suffix says the container:
        `.safetensors`, `.bin` or `.pth` (bare state dict), `.ckpt` (what the family's published
        .ckpt files are: a state dict, or nested under "state_dict" with a key prefix as Lightning
        does). Where the folder was imported from such a file, its own prefix is used, and its
        tensors come back byte for byte unless they were trained since.
      overwrite: replace an earlier export. Nothing else is ever replaced, and nothing of a model
        folder.
    Returns: notes on what could not be kept.
    Raises: ValueError for a model that the original can't hold, or another suffix; FileExistsError,
      before anything is written.

    A folder that was imported remembers the fields of the original's config.json: those that mean
    what they did then are written as they were, also those that this library does not read.

    A pruned model that the original's classes can't hold as it is (they have one width for all
    layers) is written at its full size, with zeros where parts are missing: the same function, as
    slow as before. The folder must say what it was pruned from (`pruned_from` in its provenance,
    the full model's `config_to_dict()`). A model without some of its experts can't be written at
    all: the original's router would choose the zeros.
    """
    dst = storage.user_path(dst)
    folder = folders.local(src)
    if folder is None or not (folder / folders.CONFIG).is_file():
        raise FileNotFoundError(
            f"{src} is no model folder and no shipped model. An original or a hub name is "
            f"converted first: ltsm convert {src} FOLDER"
        )
    model, params = folders.load_folder(folder)
    record = folders.read_config(folder)[1]["provenance"]
    kept = folders.read_buffers(folder)
    family = converter(model.family)
    suffixes = getattr(family, "SUFFIXES", SUFFIXES)
    file = dst if dst.suffix else dst / "model.safetensors"
    if file.suffix not in suffixes:
        raise ValueError(
            f"{dst}: the suffix says the container, one of {', '.join(suffixes)}; a folder for the "
            "form of the hub"
        )
    container = suffixes[file.suffix]
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} is there already; choose another name or overwrite it")
    imported_from = record.get("container")
    alike = imported_from == container or (
        imported_from in ("student", "nested") and container == "state_dict"
    )
    table = record.get("table", "") if alike else getattr(family, "TABLES", {}).get(file.suffix, "")
    model, params, published, whole = _in_one_width(
        model, params, record, family=family, table=table
    )
    told = record.get("dtype", "float32")
    state, wider = tables.to_state(_in_table(family.keys, model.config, table), params, told)
    notes = whole + [
        f"{key}: its values do not fit the original's {told}, so it stays float32" for key in wider
    ]
    if table != record.get("table", ""):  # under other keys
        kept = {}
    state |= kept or (
        _in_table(family.buffers, model.config, table) if hasattr(family, "buffers") else {}
    )
    state |= {
        key: state[source] for key, source in record.get("copies", {}).items() if source in state
    }

    if alike:
        aliases = {
            a: t
            for a, t in getattr(family, "ALIASES", {}).items()
            if a in record.get("aliases", ())
        }
        layout = Layout(record.get("prefix", ""), aliases)
    else:
        layout = Layout("model." if container == "lightning" else "")
    content: dict[str, Any] = layout.dress(state)
    if table == record.get("table", ""):
        published = _as_published(published, record.get("published", {}), family, state=state)
    beside: dict[Path, Any] = {}
    if container != "lightning":  # no room for what the shapes do not say
        others = {Path(name).stem for name in getattr(family, "BESIDE", ())}
        parts = {name: published.pop(name) for name in others if name in published}
        beside = {
            file.with_name(f"{name}.json"): fields
            for name, fields in {"config": published, **parts}.items()
        }
    _require_free(file, beside, folder, overwrite=overwrite, alone=file is dst)
    file.parent.mkdir(parents=True, exist_ok=True)
    if container == "safetensors":
        write_safetensors(file, content, overwrite=overwrite)
    else:
        if container == "lightning":
            content = {
                **record.get("extras", {}),
                "state_dict": content,
                "hyper_parameters": published,
            }
        write_torch(file, content, overwrite=overwrite)
    for path, fields in beside.items():
        notes += _write_beside(path, fields, file, overwrite=overwrite)
    return notes


def _in_one_width(
    model: Model, params: trees.Tree, record: Mapping[str, Any], family: Any, table: str
) -> tuple[Model, trees.Tree, dict[str, Any], list[str]]:
    """A model as the original can hold it: (model, params, its published fields, notes)."""
    try:
        if narrow := parts.narrow_heads(model):
            raise ValueError(
                "the original's heads are equally wide in all layers; this model has "
                f"{', '.join(narrow)}. A pruned model can't be exported."
            )
        return model, params, dict(_in_table(family.published, model.config, table)), []
    except ValueError as err:
        if "pruned_from" not in record:
            raise ValueError(
                f"{err} If it was pruned by removal, put the full model's config into the "
                "provenance of its folder, "
                "`ltsm_jax.save(..., provenance={'pruned_from': full.config_to_dict()})`: then it "
                "is written at its "
                "full size, with zeros."
            ) from None
    full = parts.as_deep(
        type(model)(type(model).config_from_dict(record["pruned_from"])), model, params
    )
    published = dict(_in_table(family.published, full.config, table))
    padded = parts.pad(model, params, full)
    zeros = trees.count(padded) - trees.count(params)
    note = (
        f"the original can't hold layers of different widths: written at full size, {zeros:,} of "
        f"{trees.count(padded):,} parameters are zeros in the place of what was removed"
    )
    return full, padded, published, [note]


def _is_in(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or lies in it, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _require_free(
    file: Path, beside: Mapping[Path, Mapping[str, Any]], source: Path, overwrite: bool, alone: bool
) -> None:
    """Look at all that an export writes before it writes any of it.

    Args:
      file: the weights. beside: fields of the JSON files that go with them.
      source: the model folder.
      overwrite: whether an earlier export may be replaced.
      alone: only the weights were asked for; JSON files of another model are then left, and a note
        says so.
    Raises: FileExistsError.
    """
    for path in (file, *beside):
        if _is_in(path, source):
            raise FileExistsError(f"{path} lies in the model folder {source}; choose another place")
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise FileExistsError(f"{path} is there, and no file; choose another place")
        if path in beside and folders.is_model_config(path):
            raise FileExistsError(f"{path} is the config of a model folder; choose another place")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} is there already; choose another name or overwrite it")
    if file.exists() and not _is_checkpoint(file):
        raise FileExistsError(f"{file} is no checkpoint, and is not replaced; choose another name")
    for path, fields in beside.items():
        if not path.exists() or (alone and not overwrite) or read_config_json(path) == fields:
            continue
        if not overwrite:
            raise FileExistsError(f"{path} is there already; choose another folder or overwrite it")
        if not _is_like(read_config_json(path), fields):
            raise FileExistsError(
                f"{path} is of something else, and is not replaced; choose another place"
            )


def _is_checkpoint(file: Path) -> bool:
    """Return whether a file begins as one that an export writes."""
    with file.open("rb") as stream:
        start = stream.read(9)
    if file.suffix == ".safetensors":
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size
    return start.startswith((b"PK\x03\x04", b"\x80"))


def _is_like(found: Any, fields: Mapping[str, Any]) -> bool:
    """Return whether JSON holds what an earlier export wrote: most of the fields, with these or
    other values.
    """
    return isinstance(found, dict) and 2 * len(fields.keys() & found.keys()) >= len(fields)


def _write_beside(path: Path, fields: Mapping[str, Any], file: Path, overwrite: bool) -> list[str]:
    if path.exists():
        if read_config_json(path) == fields:
            return []
        if not overwrite:
            return [
                f"{path} is another model's; this one needs beside {file.name}: "
                f"{json.dumps(fields)}"
            ]
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        part.write_text(json.dumps(fields, indent=1) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return [f"{path}: written too, since the file can't hold all hyper-parameters"]


def _published_facts(told: Mapping[str, Any] | None, meant: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the original's fields for an export, and what they meant; nothing where JSON can't hold
    them.
    """
    try:
        if not told or len(json.dumps(told)) > _MOST_PUBLISHED:
            return {}
        return {
            "published": {
                "told": json.loads(json.dumps(told)),
                "meant": json.loads(json.dumps(meant)),
            }
        }
    except (TypeError, ValueError, RecursionError):
        return {}


def _as_published(
    now: Mapping[str, Any], kept: Mapping[str, Any], family: Any, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Write fields as the original had them, where they still mean the same.

    An original may say one thing under two names, of which we write one. So what comes out is read
    again, and where it is not the same model, our own fields are written.
    """
    told, meant = kept.get("told"), kept.get("meant")
    ours: dict[str, Any] = json.loads(json.dumps(now))
    if not isinstance(told, dict) or not isinstance(meant, dict):
        return ours
    merged = _merged(told, meant, ours)
    try:
        same = (
            family.configure(dict(state), merged, "")[0]
            == family.configure(dict(state), ours, "")[0]
        )
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError):
        return ours
    return merged if same else ours


def _merged(
    told: Mapping[str, Any], meant: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that were told, those changed since that mean something else now than they did
    then.
    """
    out = {}
    for name in [*told, *(name for name in now if name not in told)]:
        if all(isinstance(fields.get(name), dict) for fields in (told, meant, now)):
            out[name] = _merged(told[name], meant[name], now[name])
        elif name in now and (name not in meant or now[name] != meant[name]):
            out[name] = now[name]
        elif name in told and (name in now or name not in meant):
            out[name] = told[name]
    return out


def inspect(
    src: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    accept_license: bool = False,
) -> dict[str, Any]:
    """Describe a checkpoint, model folder or hub name: family, config, parameter count, dropped
    keys, dtype, sha256, ...

    Raises: as `import_checkpoint`; a file that can't be imported can't be described either.
    """
    folder = folders.local(src)
    if folder and (folder / folders.PARAMS).is_dir():
        model, params = folders.load_folder(folder)
        provenance = folders.read_config(folder)[1]["provenance"]
    else:
        model, params, provenance, _ = import_checkpoint(
            src, config=config, allow_cast=True, accept_license=accept_license
        )
    return {
        "family": model.family,
        "config": model.config_to_dict(),
        "parameters": trees.count(params),
        # The config says what was published, the notes what was assumed.
        **{name: fact for name, fact in provenance.items() if name not in ("published", "assumed")},
    }


def _on_disk(src: str | Path, accept_license: bool) -> tuple[Path, dict[str, Any]]:
    """Path of an original, fetched from the hub where nothing here is called so, and what to say of
    its origin.
    """
    path = folders.local(src)
    name = hub.parse_name(str(src)) if path is None else None
    if name is None:
        return path or storage.user_path(src), {}
    found = hub.resolve(name, converted=False)
    file, facts = hub.download(
        found, accept_license=accept_license, known=folders.published_licence(name)
    )
    if found.why:
        hub.print_note(
            f"{found.why}; these are the files of commit {found.commit[:7]}, from the cache"
        )
    return file, facts


def _is_plain(value: object) -> bool:
    """Return whether an extra of a Lightning file is worth keeping: a short text or a number."""
    if isinstance(value, str):
        return len(value) <= 200 and value.isprintable()
    return isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) < 2**63)


def _published(
    original: Original,
    config: str | Path | Mapping[str, Any] | None,
    others: tuple[str, ...],
    older: str | None,
) -> Mapping[str, Any] | None:
    """The original's hyper-parameters: as given, from files beside the checkpoint, or within it.

    others, older: `BESIDE` and `BESIDE_YAML` of the family.
    """
    if isinstance(config, Mapping):
        return config
    beside = original.path.with_name("config.json")
    if older and not beside.exists() and original.path.with_name(older).exists():
        beside = original.path.with_name(older)
    if config is not None or beside.exists():
        main = storage.user_path(config) if config is not None else beside
        found = _object(main)
        return found | {
            Path(n).stem: _object(main.with_name(n)) for n in others if main.with_name(n).exists()
        }
    told = original.extras.get("hyper_parameters")
    told = (
        told.state if isinstance(told, Placeholder) and told.name == "argparse.Namespace" else told
    )
    if isinstance(told, dict) and all(
        isinstance(told.get(name), int) for name in ("d_model", "n_heads", "patch_len")
    ):
        return {k: v for k, v in told.items() if isinstance(k, str)}
    return None


def _object(path: Path) -> dict[str, Any]:
    found = read_yaml(path) if path.suffix in (".yaml", ".yml") else read_config_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: an object of hyper-parameters was expected. Mend or move it."
        )
    return found
