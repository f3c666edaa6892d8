"""Model folders: a model on disk, and where the folder of a name lies on this machine.

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

from ltsm_jax import hosts, hub, storage, trees
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


def load_folder(folder: str | Path) -> tuple[Model, trees.Tree]:
    """Read the model of a folder and its parameters.

    Raises: FileNotFoundError; storage.DamagedError; ValueError where the parameters are not those of the model.
    """
    model = read_config(folder)[0]
    return model, storage.load_tree(Path(folder) / PARAMS, like=shapes(model))


def local(source: str | Path) -> Path | None:
    """Where a source is on this machine: itself, a shipped model, or files put into the cache; None: not here."""
    name = str(source)
    places = [Path(source)]
    if name and ".." not in name and not Path(name).is_absolute():
        place = storage.cache_folder("models") / name
        preset = is_preset(name)
        ends = ORIGINALS if preset else ()
        places = [*(place.with_name(place.name + end) for end in ends), *places, SHIPPED / name]
        places += [place] if preset or hub.parse(name) else []
    return next((p for p in places if p.is_file() or p.is_dir()), None)


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


def is_preset(name: str) -> bool:
    """Whether a name is that of a published preset."""
    return any(name in family.presets() for family in FAMILIES.values())
