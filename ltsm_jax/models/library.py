"""Models by name: shipped folders, presets, folders on disk and original checkpoint files.

A model folder is `config.json` (family, config, where it came from) and `params/` (a stored tree), and, for an
imported checkpoint, `buffers.safetensors`: tensors of the original that are not learned, kept so that an export has
every byte of it.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltsm_jax import storage, trees
from ltsm_jax.models import FAMILIES, Model

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
    """Write a model folder, whole or not at all.

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
    with storage.atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(json.dumps(record, indent=1) + "\n")
        if buffers:
            from safetensors.numpy import save_file

            save_file({key: np.ascontiguousarray(value) for key, value in buffers.items()}, temporary / BUFFERS)
        storage.save_tree(temporary / PARAMS, params)
    return folder


def load(source: str | Path) -> tuple[Model, trees.Tree]:
    """A model and its parameters: `model, params = ltsm_jax.load("timer-tiny")`.

    Args:
      source: the name of a shipped model, a model folder, an original PyTorch checkpoint file or a folder with one in
        it (read without torch), or the name of a published preset whose checkpoint file lies in the cache
        (`$LTSM_CACHE/models`, else ~/.cache/ltsm_jax/models).
    Raises: FileNotFoundError that lists what was tried; ValueError (or `storage.DamagedError`, or the converters'
      CheckpointError) for files that are damaged or do not fit the model.
    """
    path = _cached(str(source)) or Path(source)
    if path.is_file() or (path.is_dir() and not (path / PARAMS).exists() and originals(path)):
        from converters import import_checkpoint  # the one call upwards: an original file, converted in memory

        model, params, *_ = import_checkpoint(path)
        return model, params
    folder = path if path.is_dir() else SHIPPED / str(source)
    if not folder.is_dir():
        raise FileNotFoundError(_not_found(source))
    model = read_config(folder)[0]
    return model, storage.load_tree(folder / PARAMS, like=shapes(model))


def originals(folder: Path) -> list[Path]:
    """Checkpoint files of an original program in a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix in ORIGINALS and p.name != BUFFERS)


def _cached(name: str) -> Path | None:
    """The checkpoint file of a published preset, where it was put into the cache."""
    if not any(name in family.presets() for family in FAMILIES.values()):
        return None
    return next(
        (p for p in (storage.cache_folder("models") / f"{name}{end}" for end in ORIGINALS) if p.is_file()), None
    )


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
    published = [name for family in FAMILIES.values() for name in family.presets() if name not in shipped()]
    near = difflib.get_close_matches(str(source), shipped() + published, 1)
    lines = [
        f"no model {str(source)!r}: neither a file, nor a folder, "
        f"nor a shipped model ({', '.join(shipped()) or 'none'})"
    ]
    if str(source) in published:
        lines.append(
            "It is a published preset whose weights do not come with the package: put the downloaded checkpoint file "
            f"at {storage.cache_folder('models') / str(source)}.ckpt (or .pth), or give its path; for fresh weights: "
            f"`model = ltsm_jax.preset({str(source)!r}); "
            "params = model.init(key)`"
        )
    elif near:
        lines.append(f"Did you mean {near[0]!r}?")
    return ". ".join(lines)
