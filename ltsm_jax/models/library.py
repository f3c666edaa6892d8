"""Models by name: shipped folders, presets, folders on disk, original checkpoint files and the hub.

A model folder is `config.json` (family, config, where it came from) and `params/` (a stored tree), and, for an
imported checkpoint, `buffers.safetensors`: tensors of the original that are not learned, kept so that an export has
every byte of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltsm_jax import hosts, storage, trees
from ltsm_jax.models import FAMILIES, Model, hub, near_presets

SHIPPED = Path(__file__).parent.parent / "presets"
CONFIG, PARAMS, BUFFERS = "config.json", "params", "buffers.safetensors"
ORIGINALS = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")


def save(
    folder: str | Path,
    model: Model,
    params: trees.Tree,
    *,
    provenance: Mapping[str, Any] | None = None,
    buffers: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder, whole or not at all. On several hosts all call, and see the same folder.

    Args:
      folder: where; made with its parents.
      model, params: the model and its parameters.
      provenance: JSON-able facts about the weights (source, sha256, licence, command, ...), kept as they are.
      buffers: tensors of an original checkpoint that are not learned, by their original key.
      overwrite: replace an existing folder.
    Returns: the folder.
    Raises: FileExistsError; ValueError when the params do not fit the model.
    """
    folder = Path(folder)
    trees.require_same(shapes(model), params, ("the model", "params"))
    record = {
        "format": 1,
        "family": model.family,
        "config": model.config_to_dict(),
        "parameters": trees.count(params),
        "provenance": dict(provenance or {}),
    }

    def write_rest(temporary: Path) -> None:
        (temporary / CONFIG).write_text(json.dumps(record, indent=1) + "\n")
        if buffers:
            from safetensors.numpy import save_file

            save_file({key: np.asarray(value, order="C") for key, value in buffers.items()}, temporary / BUFFERS)

    with storage.atomic_folder(folder, overwrite=overwrite) as temporary:
        hosts.on_first(write_rest, temporary)
        storage.save_tree(temporary / PARAMS, params)
    return folder


def load(source: str | Path, *, revision: str | None = None, token: str | None = None) -> tuple[Model, trees.Tree]:
    """A model and its parameters: `model, params = ltsm_jax.load("timer-tiny")`.

    A hub name is fetched and converted once: the copy is kept by repository and commit in `$LTSM_CACHE/models` (else
    ~/.cache/ltsm_jax/models), and loads again without network. The licence of the weights is said on stderr, once.

    Args:
      source: the name of a shipped model; a model folder; an original PyTorch checkpoint file, the index of several, or
        a folder with one in it (read without torch); the name of a published preset whose files were put into
        `$LTSM_CACHE/models`; or "owner/name" or "owner/name@revision" on the hub.
      revision: branch, tag or commit, for a hub name; default "main".
      token: for private and gated repositories; default: the one of huggingface_hub (HF_TOKEN, or its login).
    Raises: FileNotFoundError that lists what was tried; PermissionError where the hub wants a token; ValueError (or
      `storage.DamagedError`, or the converters' CheckpointError) for files that are damaged or do not fit the model.
    """
    path = local(source) if revision is None else None
    if path is None:
        name = hub.parse(str(source), revision)
        if name is None:
            told = f"; a revision is for names of the hub, and {str(source)!r} is none" if revision else ""
            raise FileNotFoundError(_not_found(source) + told)
        return _from_hub(name, token)
    if path.is_file() or (not (path / PARAMS).exists() and originals(path)):
        return _converted(path)[:2]
    model = read_config(path)[0]
    return model, storage.load_tree(path / PARAMS, like=shapes(model))


def local(source: str | Path) -> Path | None:
    """Where a source is on this machine: itself, a shipped model, or files put into the cache; None: not here."""
    name = str(source)
    places = [Path(source)]
    if name and ".." not in name and not Path(name).is_absolute():
        place = storage.cache_folder("models") / name
        preset = any(name in family.presets() for family in FAMILIES.values())
        ends = ORIGINALS if preset else ()
        places = [*(place.with_name(place.name + end) for end in ends), *places, SHIPPED / name]
        places += [place] if preset or hub.parse(name) else []
    return next((p for p in places if p.is_file() or p.is_dir()), None)


def _converted(path: Path, of: str = "") -> tuple[Model, trees.Tree, dict[str, Any], dict[str, np.ndarray]]:
    """An original file, converted in memory: the one call upwards."""
    from converters import CheckpointError, import_checkpoint

    try:
        return import_checkpoint(path)
    except CheckpointError as error:
        if not of:
            raise
        raise CheckpointError(f"{error}\n  ({of})") from None


def _from_hub(name: hub.Name, token: str | None) -> tuple[Model, trees.Tree]:
    try:
        found = hub.find(name, token)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error) + _advice(str(name))) from error
    if found.why:
        hub.say(f"{found.why}; {name} is what was kept of commit {found.commit[:7]}")
    damaged = False
    if found.folder.is_dir():
        try:
            model, record = read_config(found.folder)
            params = storage.load_tree(found.folder / PARAMS, like=shapes(model))
            hub.remember(found)
            hub.say_licence(found, record.get("provenance", {}))
            return model, params
        except (ValueError, OSError) as error:  # damaged, or of a version of the library with other configs
            damaged = True
            hub.say(f"the converted copy can't be used, converting {name} again ({error})")
            found = found if found.files else hub.find(name, token, converted=False)
    if hosts.count() > 1:  # each would convert it for itself, and saving is what all do together
        raise ValueError(
            f"{name} is not converted yet: load it once with one process, on every host that has a cache of its own "
            f"(python -c \"import ltsm_jax; ltsm_jax.load('{name}')\"), and start again"
        )
    file, facts = hub.download(found, token)
    model, params, provenance, buffers = _converted(file, f"the files of {name} on the hub, commit {found.commit}")
    provenance = provenance | facts
    try:
        save(found.folder, model, params, provenance=provenance, buffers=buffers, overwrite=damaged)
        hub.remember(found)
    except FileExistsError:
        hub.remember(found)  # another process was quicker, and its copy has the same bytes
    except OSError as error:
        hub.say(f"the converted copy can't be kept, and will be made again next time: {error}")
    hub.say_licence(found, provenance)
    return model, params


def originals(folder: Path) -> list[Path]:
    """Checkpoint files of an original program in a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix in ORIGINALS and p.name != BUFFERS)


def read_config(folder: str | Path) -> tuple[Model, dict[str, Any]]:
    """The model of a folder and its whole config.json, without its parameters.

    Raises: FileNotFoundError; storage.DamagedError.
    """
    file = Path(folder) / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: not a model folder")
    try:
        record = json.loads(file.read_text())
        family = FAMILIES[record["family"]]
        return family(family.config_from_dict(record["config"])), record
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise storage.DamagedError(f"{file} is not the config of a known model: {type(err).__name__} {err}") from err


def read_buffers(folder: str | Path) -> dict[str, np.ndarray]:
    """The buffers that were saved with a model; empty where there were none."""
    file = Path(folder) / BUFFERS
    if not file.exists():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except SafetensorError as err:
        raise storage.DamagedError(f"{file} is damaged: {err}") from err


def shapes(model: Model) -> trees.Tree:
    """Shape and dtype of every parameter, without computing any."""
    return jax.eval_shape(model.init, jax.random.key(0))


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}"))


def _not_found(source: str | Path) -> str:
    return (
        f"no model {str(source)!r}: neither a file, nor a folder, nor a shipped model "
        f"({', '.join(shipped()) or 'none'}), nor a name of the hub (owner/name)" + _advice(str(source))
    )


def _advice(name: str) -> str:
    """What may have been meant by a name that leads to nothing."""
    if any(name in family.presets() for family in FAMILIES.values()):
        files = "its files" if "/" in name else "the downloaded checkpoint file"
        end = "" if "/" in name else ".ckpt (or .pth)"
        return (
            f"\nIt is a published preset whose weights do not come with the package: put {files} "
            f"at {storage.cache_folder('models') / name}{end}, or give their path; for fresh weights: "
            f"`model = ltsm_jax.preset({name!r}); params = model.init(key)`"
        )
    near = near_presets(name, shipped())
    return f"\nDid you mean {' or '.join(map(repr, near))}?" if near else ""
