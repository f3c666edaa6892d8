"""Models by name: shipped models, model folders, published presets, original checkpoint files and
the hub.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltsm_jax import hosts, hub, storage, trees
from ltsm_jax.models import Model, folders, near_presets
from ltsm_jax.original_files import CheckpointError, find_converters


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A model with what is known of its weights.

    provenance: where they are from, as in config.json of a model folder. buffers: tensors of the
    original that are not learned, by their original key.
    """

    model: Model
    params: trees.Tree
    provenance: Mapping[str, Any]
    buffers: Mapping[str, np.ndarray]


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    accept_license: bool = False,
) -> tuple[Model, trees.Tree]:
    """Load a model and its parameters: `model, params = ltsm_jax.load("timer-tiny")`.

    A hub name is fetched and converted once: the copy is kept by repository and commit in
    `$LTSM_CACHE/models` (else ~/.cache/ltsm_jax/models), and loads again without network. The
    licence of the weights is said on stderr, once. From then on this process keeps what it
    compiles, see `storage.keep_compiled`.

    Args:
      source: the name of a shipped model; a model folder; an original PyTorch checkpoint file, the
        index of several, or a folder with one in it (read without torch); the name of a published
        preset whose files were put into `$LTSM_CACHE/models`; or "owner/name" or
        "owner/name@revision" on the hub.
      revision: branch, tag or commit, for a hub name; default "main".
      token: for private and gated repositories; default: the one of huggingface_hub (HF_TOKEN, or
        its login).
      accept_license: accept the licence of weights from the hub that forbids commercial use. It is
        asked for once: the answer is kept in `$LTSM_CACHE/licences` by repository and licence.
          `$LTSM_ACCEPT_LICENSE` may name licences
        ("cc-by-nc-4.0") or repositories instead, separated by commas. Files and folders of your own
        are not asked about; that their weights are non-commercial is said on stderr.
    Raises: FileNotFoundError that lists what was tried; PermissionError where the hub wants a
      token; `hub.LicenceError` (a PermissionError) for a licence that is not accepted, before
      anything is fetched; ValueError (or `storage.DamagedError`, or
      `original_files.CheckpointError`) for files that are damaged or do not fit the model.
    """
    found = load_whole(source, revision=revision, token=token, accept_license=accept_license)
    return found.model, found.params


def load_whole(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    accept_license: bool = False,
) -> Loaded:
    """Load a model, its parameters and what is known of them; arguments and errors as
    for `load`.
    """
    storage.keep_compiled()
    path = folders.local(source) if revision is None else None
    if path is None:
        name = hub.parse_name(str(source), revision)
        if name is None:
            told = (
                f"; a revision is for names of the hub, and {str(source)!r} is none"
                if revision
                else ""
            )
            raise FileNotFoundError(_not_found(source) + told)
        return _from_hub(name, token, accept_license)
    if path.is_file() or (not (path / folders.PARAMS).exists() and folders.originals(path)):
        found = Loaded(*_converted(path))
    else:
        model, params = folders.load_folder(path)
        found = Loaded(
            model=model,
            params=params,
            provenance=folders.read_config(path)[1]["provenance"],
            buffers=folders.read_buffers(path),
        )
    hub.say_local_licence(path, found.provenance)
    return found


def export(found: Loaded, path: str | Path, *, overwrite: bool = False) -> list[str]:
    """Write a model as what the original's code loads.

    Args:
      found: the model; its provenance and buffers are those of what it was imported from, if it
        was.
      path: file, whose suffix says the container (.safetensors, .bin, .pth, .ckpt), or, without a
        suffix, a folder in the form of the hub.
      overwrite: replace an earlier export; nothing else is ever replaced.
    Returns: notes on what could not be kept.
    Raises: ValueError for a model that the original can't hold, or another suffix; FileExistsError.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = folders.save(
            Path(place) / "model",
            found.model,
            found.params,
            provenance=found.provenance,
            buffers=found.buffers,
        )
        return find_converters().export_checkpoint(folder, path, overwrite=overwrite)


def _converted(
    path: Path, of: str = ""
) -> tuple[Model, trees.Tree, dict[str, Any], dict[str, np.ndarray]]:
    """Convert an original file in memory; `of` says where it came from, for an error."""
    try:
        found = find_converters().import_checkpoint(path)
    except CheckpointError as error:
        if not of:
            raise
        raise CheckpointError(f"{error}\n  ({of})") from None
    for note in found[2]["assumed"]:  # a forecast may be wrong by it
        hub.print_note(f"{path.name}: {note}")
    return found


def _from_hub(name: hub.Name, token: str | None, accept_license: bool) -> Loaded:
    try:
        found = hub.resolve(name, token)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error) + _advice(str(name))) from error
    if found.why:
        hub.print_note(f"{found.why}; {name} is what was kept of commit {found.commit[:7]}")
    damaged = False
    if found.folder.is_dir():
        try:
            model, record = folders.read_config(found.folder)
            provenance = record["provenance"]
            hub.require_licence(name.repo, provenance.get("licence"), accept_license)
            params = storage.load_tree(
                found.folder / folders.PARAMS, like=folders.param_shapes(model)
            )
            hub.remember(found)
            buffers = folders.read_buffers(found.folder)
            hub.say_licence(found, provenance)
            return Loaded(model=model, params=params, provenance=provenance, buffers=buffers)
        except hub.LicenceError:
            raise
        except (
            ValueError,
            OSError,
        ) as error:  # damaged, or of a version of the library with other configs
            damaged = True
            hub.print_note(f"the converted copy can't be used, converting {name} again ({error})")
            found = found if found.files else hub.resolve(name, token, converted=False)
    if (
        hosts.process_count() > 1
    ):  # each would convert it for itself, and saving is what all do together
        raise ValueError(
            f"{name} is not converted yet: load it once with one process, on every host that has a "
            "cache of its own "
            f"(python -c \"import ltsm_jax; ltsm_jax.load('{name}')\"), and start again"
        )
    file, facts = hub.download(
        found,
        token,
        accept_license=accept_license,
        known=folders.published_licence(name),
    )
    model, params, provenance, buffers = _converted(
        file, f"the files of {name} on the hub, commit {found.commit}"
    )
    provenance = provenance | facts
    # Only now is it known of which family weights are that come without a word on their licence.
    hub.require_licence(name.repo, provenance["licence"], accept_license)
    try:
        folders.save(
            found.folder, model, params, provenance=provenance, buffers=buffers, overwrite=damaged
        )
        hub.remember(found)
    except FileExistsError:
        hub.remember(found)  # another process was quicker, and its copy has the same bytes
    except OSError as error:
        hub.print_note(
            f"the converted copy can't be kept, and will be made again next time: {error}"
        )
    hub.say_licence(found, provenance)
    return Loaded(model=model, params=params, provenance=provenance, buffers=buffers)


def _not_found(source: str | Path) -> str:
    return (
        f"no model {str(source)!r}: neither a file, nor a folder, nor a shipped model "
        f"({', '.join(folders.shipped()) or 'none'}), nor a name of the hub (owner/name)"
        + _advice(str(source))
    )


def _advice(name: str) -> str:
    """Suggest names that may have been meant by one that leads to nothing."""
    if folders.is_preset(name):
        files = "its files" if "/" in name else "the downloaded checkpoint file"
        end = "" if "/" in name else ".ckpt (or .pth)"
        return (
            f"\nIt is a published preset whose weights do not come with the package: put {files} "
            f"at {storage.cache_folder('models') / name}{end}, or give their path; for fresh "
            f"weights: `model = ltsm_jax.preset({name!r}); params = model.init(key)`"
        )
    near = near_presets(name, folders.shipped())
    return f"\nDid you mean {' or '.join(map(repr, near))}?" if near else ""
