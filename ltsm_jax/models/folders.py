"""Model folders: a model on disk, and where the folder of a name lies on this machine.

A model folder is `config.json` (family, config, where it came from) and `params/` (a stored tree),
and, for an imported checkpoint, `buffers.safetensors`: tensors of the original that are not
learned, kept so that an export has every byte of it. Since format 2 config.json has a digest of
itself and those of the other files, and since format 3 its config has a record for each layer;
folders of earlier formats are read as well, see `models.formats`.

A folder may come from anywhere. Types, ranges and digests are checked before a model is built, and
the number of its parameters against the stored arrays and their bytes before any of it is in
memory.
"""

import difflib
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltsm_jax import hosts, hub, storage, trees
from ltsm_jax.models import FAMILIES, Model, formats

SHIPPED = Path(__file__).parent.parent / "presets"
CONFIG, PARAMS, BUFFERS = "config.json", "params", "buffers.safetensors"
ORIGINALS = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
ADAPTER = "adapter_config.json"

_TABLE = f"{PARAMS}/{storage.DIGESTS}"
_LAYERS = (
    128  # longest list of a config, unless more arrays are stored: every layer has some of its own
)
# What the library reads in a provenance; all else in it is the user's.
_PROVENANCE = {
    "aliases": list,
    "container": str,
    "copies": dict,
    "dtype": (str, dict),
    "extras": dict,
    "hub": dict,
    "prefix": str,
    "pruned_from": dict,
    "published": dict,
    "table": str,
}
_TEXTS = ("aliases", "copies", "dtype")  # those of them whose entries are texts


def save(
    folder: str | Path,
    model: Model,
    params: trees.Tree,
    *,
    provenance: Mapping[str, Any] | None = None,
    buffers: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder, whole or not at all. On several hosts all call, and see the same
    folder.

    Args:
      folder: where; made with its parents.
      model, params: the model and its parameters.
      provenance: JSON-able facts about the weights (source, sha256, licence, command, ...), kept as
        they are.
      buffers: tensors of an original checkpoint that are not learned, by their original key.
      overwrite: replace a model folder; no other folder is ever replaced.
    Returns: the folder.
    Raises: FileExistsError; ValueError when the params do not fit the model, or are of another
    dtype than it has.
    """
    folder = storage.user_path(folder)
    _require_params(model, params)
    record = {
        "format": formats.FORMAT,
        "family": model.family,
        "config": model.config_to_dict(),
        "parameters": trees.count(params),
        "provenance": dict(provenance or {}),
    }
    try:
        problems = _provenance_problems(json.loads(json.dumps(record["provenance"])))
    except TypeError as err:
        raise ValueError(f"the provenance must be what JSON can hold: {err}") from None
    if problems:
        raise ValueError("; ".join(problems))

    def write_rest(temporary: Path) -> None:
        if buffers:
            storage.save_tensors(temporary / BUFFERS, buffers)
        names = [name for name in (_TABLE, BUFFERS) if (temporary / name).exists()]
        files = {name: storage.file_digest(temporary / name) for name in names}
        storage.write_record(temporary / CONFIG, record | {"files": files})

    with storage.atomic_folder(
        folder, replaces=_no_model_folder if overwrite else None
    ) as temporary:
        storage.save_tree(temporary / PARAMS, params)
        hosts.on_first(write_rest, temporary)
    return folder


def require_writable(folder: str | Path, overwrite: bool) -> None:
    """Refuse a place where `save` would not write, before the work that comes before it.

    Raises: FileExistsError.
    """
    storage.require_free(storage.user_path(folder), _no_model_folder if overwrite else None)


def _require_params(model: Model, params: trees.Tree) -> None:
    """Raises: ValueError unless `load` would give these params back."""
    want = param_shapes(model)
    trees.require_same(want, params, ("the model", "params"))
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(want).items()}
    odd = [path for path, leaf in trees.flatten(params).items() if leaf.dtype != dtypes[path]]
    if odd:
        told = ", ".join(f"{path} is {trees.flatten(params)[path].dtype}" for path in odd[:3])
        raise ValueError(
            f"a model folder holds parameters as the model makes them, in {dtypes[odd[0]]}; of "
            f"these {len(odd)} are of another dtype: {told}. Convert them first: "
            f"jax.tree.map(lambda x: x.astype('{dtypes[odd[0]]}'), params)"
        )


def _no_model_folder(folder: Path) -> str:
    """Why a folder is no model folder, whole or damaged; "" for one."""
    surplus = {path.name for path in folder.iterdir()} - {CONFIG, PARAMS, BUFFERS}
    params = folder / PARAMS
    if params.is_dir():
        surplus |= {f"{PARAMS}/{path.name}" for path in params.iterdir()} - {
            _TABLE,
            f"{PARAMS}/{storage.ARRAYS}",
        }
    if surplus:
        return f"it is no model folder, but holds {', '.join(sorted(surplus)[:5])}"
    if not params.is_dir() and not is_model_config(folder / CONFIG):
        return "it is no model folder"
    return ""


def is_model_config(file: Path) -> bool:
    """Whether a file is the config.json of a model folder, and not that of an original."""
    try:
        return {"family", "config", "parameters"} <= storage.read_json(file).keys()
    except (OSError, storage.DamagedError):
        return False


def load_folder(folder: str | Path) -> tuple[Model, trees.Tree]:
    """Read the model of a folder and its parameters.

    Raises: FileNotFoundError; storage.DamagedError; ValueError where the parameters are not those
    of the model.
    """
    folder = storage.user_path(folder)
    model, record = read_config(folder)
    _check_files(folder, record)
    stored = storage.stored_shapes(folder / PARAMS)
    count = sum(math.prod(shape) for shape in stored.values())
    longest = _longest(record["config"])
    problem = ""
    # Both before the model is traced, which takes its time for many layers.
    if count != record["parameters"]:
        problem = f"it says {record['parameters']:,} parameters, and {count:,} are stored"
    elif longest > max(_LAYERS, len(stored)):
        problem = f"a list of {longest:,} entries, where {len(stored)} arrays are stored"
    like = {}
    if not problem:
        try:
            like = param_shapes(model)
        except (
            Exception
        ) as err:  # sizes that do not go together fail anywhere in a model, with any error
            problem = f"no {model.family} has these sizes ({type(err).__name__}: {str(err)[:300]})"
    if problem:
        raise storage.DamagedError(f"{folder / CONFIG}: {problem}")
    return model, storage.load_tree(folder / PARAMS, like=like)


def _longest(config: Any) -> int:
    """The most entries of any list in a config."""
    if isinstance(config, dict):
        return max(map(_longest, config.values()), default=0)
    return max(len(config), *map(_longest, config)) if isinstance(config, list) and config else 0


def read_config(folder: str | Path) -> tuple[Model, dict[str, Any]]:
    """Read the model of a folder and its whole config.json, without its parameters.

    Raises: FileNotFoundError; storage.DamagedError.
    """
    folder = storage.user_path(folder)
    file = folder / CONFIG
    if (folder / ADAPTER).exists() and not file.exists():
        raise ValueError(adapter_advice(folder))
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: not a model folder")
    record = storage.read_json(file)
    told = record.get("format")
    if type(told) is int and told > formats.FORMAT:
        raise storage.DamagedError(
            f"{file}: a model folder of format {told}, and this version of ltsm_jax reads 1 to "
            f"{formats.FORMAT}: update it"
        )
    if type(told) is not int or told < 1 or not isinstance(record.get("family"), str):
        raise storage.DamagedError(
            f"{file} is not the config of a model folder: it says no format and family"
        )
    if told > 1 and "digest" not in record:
        raise storage.DamagedError(f"{file} is altered: it has no digest of itself")
    if "digest" in record:
        storage.check_digest(record, file)
    record.setdefault("provenance", {})
    problems = _provenance_problems(record["provenance"])
    if type(record.get("parameters")) is not int:
        problems.append("parameters must be a number")
    if problems:
        raise storage.DamagedError(f"{file}: " + "; ".join(problems))
    family = FAMILIES.get(record["family"])
    if family is None:
        near = difflib.get_close_matches(record["family"][:100], FAMILIES, 1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise storage.DamagedError(
            f"{file}: this version of ltsm_jax knows no family {record['family'][:100]!r}; "
            f"{guess}known: {', '.join(FAMILIES)}"
        )
    try:
        for place, name in ((record, "config"), (record["provenance"], "pruned_from")):
            if name in place:
                place[name] = formats.current(record["family"], place[name], told)
        model = family(family.config_from_dict(record.get("config", {})))
    except ValueError as err:
        raise storage.DamagedError(
            f"{file} is not the config of a model that this version of ltsm_jax knows: "
            f"{str(err)[:1000]}"
        ) from err
    return model, record


def _provenance_problems(provenance: Any) -> list[str]:
    """Say what keeps a provenance from being read."""
    if not isinstance(provenance, dict):
        return [f"the provenance must be an object, got {type(provenance).__name__}"]
    problems = []
    for name, kind in _PROVENANCE.items():
        if name in provenance and not isinstance(provenance[name], kind):
            problems.append(
                f"{name} of the provenance can't be a {type(provenance[name]).__name__}"
            )
    for name in _TEXTS:
        entries = provenance.get(name, ())
        entries = entries.values() if isinstance(entries, dict) else entries
        if isinstance(entries, list | type({}.values())) and not all(
            isinstance(entry, str) for entry in entries
        ):
            problems.append(f"{name} of the provenance must hold texts")
    return problems


def _check_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare the files beside config.json with the digests in it.

    Raises: storage.DamagedError.
    """
    if record["format"] < 2:
        return
    files = record.get("files")
    if not isinstance(files, dict) or _TABLE not in files or not files.keys() <= {_TABLE, BUFFERS}:
        raise storage.DamagedError(f"{folder / CONFIG}: it has no digests of the other files")
    if BUFFERS not in files and (folder / BUFFERS).exists():
        raise storage.DamagedError(
            f"{folder} is damaged: {BUFFERS} is there, and was not saved with it"
        )
    storage.verify_files(folder, files)


def read_buffers(folder: str | Path) -> dict[str, np.ndarray]:
    """Read the buffers that were saved with a model; empty where there were none.

    Raises: FileNotFoundError; storage.DamagedError.
    """
    folder = storage.user_path(folder)
    _check_files(folder, read_config(folder)[1])
    file = folder / BUFFERS
    if not file.exists():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (SafetensorError, KeyError) as err:
        raise storage.DamagedError(f"{file} is damaged: {err}") from err


def param_shapes(model: Model) -> trees.Tree:
    """Give shape and dtype of every parameter, without computing any: those of 32 bits, whatever
    JAX is set to.
    """
    return jax.tree.map(lambda leaf: leaf, _shapes(model))  # containers of the caller's own


@functools.lru_cache(maxsize=64)
def _shapes(model: Model) -> trees.Tree:
    """Trace `init`, which takes about a second for a large model: once for each."""
    with jax.enable_x64(False):
        return jax.eval_shape(model.init, jax.random.key(0))


def adapter_advice(place: Path) -> str:
    """Say what a folder or file of the PEFT library is, and how to make a checkpoint of it."""
    return (
        f"{place} holds an adapter of the PEFT library: changes to a model, and no model. Merge it "
        "into its base model in PyTorch, `PeftModel.from_pretrained(base, "
        "FOLDER).merge_and_unload().save_pretrained(NEW)`, and load NEW"
    )


def local(source: str | Path) -> Path | None:
    """Find a source on this machine: itself, a shipped model, or files put into the cache; None: it
    is not here.

    Raises: ValueError for `~name` of a user who is not known.
    """
    name = str(source)
    places = [storage.user_path(source)]
    storage.put_back(places[0])
    if name and ".." not in name and not Path(name).is_absolute():
        place = storage.cache_folder("models") / name
        preset = is_preset(name)
        ends = ORIGINALS if preset else ()
        places = [*(place.with_name(place.name + end) for end in ends), *places, SHIPPED / name]
        places += [place] if preset or hub.parse_name(name) else []
    return next((p for p in places if p.is_file() or p.is_dir()), None)


def originals(folder: Path) -> list[Path]:
    """Checkpoint files of an original program in a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix in ORIGINALS and p.name != BUFFERS)


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}"))


def is_preset(name: str) -> bool:
    """Whether a name is that of a published preset."""
    return any(name in family.presets() for family in FAMILIES.values())


def published_licence(name: hub.Name) -> str | None:
    """Give the licence of the published weights that a name of the hub stands for; None where it is
    no preset.
    """
    for family in FAMILIES.values():
        if str(name) in family.presets() or name.repo in family.presets():
            return family.licence
    return None
