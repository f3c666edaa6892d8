"""Models of the hub: names, listings, downloads, and the cache of converted copies.

A hub name is "owner/name" or "owner/name@revision". Its files go through huggingface_hub, whose
cache, token and switches (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) are used as they are.
Weights whose licence forbids commercial use are not fetched before the licence is accepted
(`require_licence`). A converted copy is a model folder of this library,
`<cache>/models/hub-1/<owner>--<name>/<commit>`; beside it, `refs/<revision>` holds the commit of a
revision, for use without network.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ltsm_jax import storage

# count up when the same files become another model folder, and copies made before are not used
STORE = "hub-1"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ENDINGS = (
    ".safetensors",
    ".ckpt",
    ".pth",
    ".pt",
    ".bin",
)  # other names of weights, in order of preference

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE = re.compile(r"[A-Za-z0-9_][\w.+-]*", re.ASCII)  # of the top folder of a repository
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter|tokenizer)"
)
_MAX_JSON = 1 << 20  # bytes of a config; the largest published one has a few thousand
_MAX_INDEX = 1 << 26
_DAY = 86400
_FORBIDS = re.compile(r"(?i)\bnc\b|non-?commercial")
# licences or repositories, separated by commas, for machines without a user to ask
ACCEPT = "LTSM_ACCEPT_LICENSE"
_said: set[tuple[str, str]] = set()


class LicenceError(PermissionError):
    """The licence of the weights forbids commercial use and was not accepted on this machine."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A repository of the hub at a revision: branch, tag or commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"

    @property
    def store(self) -> Path:
        """Folder of the converted copies of all its commits."""
        return storage.cache_folder("models") / STORE / self.repo.replace("/", "--")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A resolved name: a commit, and its files (of the top folder) as the hub or the cache lists
    them.
    """

    name: Name
    commit: str
    files: Mapping[
        str, tuple[int | None, str | None]
    ]  # name -> bytes and digest (sha256, or git's), where known
    licence: str | None = None  # as the repository states it
    snapshot: Path | None = (
        None  # folder of huggingface_hub's cache, where the hub could not be asked
    )
    why: str = ""  # the hub could not be asked

    @property
    def folder(self) -> Path:
        """The model folder of its converted copy, there or not yet."""
        return self.name.store / self.commit


def parse_name(source: str, revision: str | None = None) -> Name | None:
    """The hub name that a text is; None where it can't be one.

    Raises: ValueError for two different revisions.
    """
    match = _NAME.fullmatch(source)
    if (
        match is None
        or ".." in source
        or "--" in match["repo"]
        or source.endswith((*ENDINGS, ".json"))
    ):
        return None
    told = match["revision"]
    if told and revision and told != revision:
        raise ValueError(
            f"{source!r} names the revision {told!r}, the argument {revision!r}: give one"
        )
    return Name(match["repo"], told or revision or "main")


def endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, else that of huggingface_hub."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def resolve(name: Name, token: str | None = None, *, converted: bool = True) -> Snapshot:
    """Resolve a name to a commit and its files. One request to the hub, none for a commit whose
    converted copy is there; the copy of an earlier time where the hub does not answer or refuses.

    converted: whether a converted copy will do; else the files are needed.

    Raises: FileNotFoundError or PermissionError, both saying what was tried and what to do.
    """
    from huggingface_hub import HfApi

    if converted and _COMMIT.fullmatch(name.revision) and (name.store / name.revision).is_dir():
        return Snapshot(name, name.revision, {})
    try:
        api = HfApi(endpoint=endpoint(), library_name="ltsm_jax")
        revision = None if name.revision == "main" else name.revision
        info = api.model_info(
            name.repo, revision=revision, files_metadata=True, timeout=20, token=token
        )
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"the hub gives {commit[:60]!r} as the commit")
        files = {
            s.rfilename: (s.size, s.lfs.sha256 if s.lfs else s.blob_id)
            for s in info.siblings or []
            if _FILE.fullmatch(s.rfilename)
        }
        return Snapshot(name=name, commit=commit, files=files, licence=_licence(info))
    # Its own errors, those of either of two HTTP clients, and of answers that are not JSON.
    except Exception as error:
        kept = _kept(name, _reason(error), converted)
        if kept is None:
            raise _no_answer(name, error) from error
        return kept


def _licence(info: Any) -> str | None:
    card = info.card_data.to_dict() if info.card_data else {}
    told = card.get("license") or next(
        (t[8:] for t in info.tags or [] if t.startswith("license:")), None
    )
    if told == "other" and card.get("license_name"):
        told = f"other ({card['license_name']})"
    told = ", ".join(map(str, told)) if isinstance(told, list) else told
    return "".join(c for c in str(told) if c.isprintable())[:100] if told else None


def _kept(name: Name, why: str, converted: bool) -> Snapshot | None:
    """Find what is kept on disk: a converted copy, else the files in huggingface_hub's cache."""
    with contextlib.suppress(OSError):
        commit = (
            (name.store / "refs" / urllib.parse.quote(name.revision, safe="")).read_text().strip()
        )
        if converted and _COMMIT.fullmatch(commit) and (name.store / commit).is_dir():
            return Snapshot(name, commit, {}, why=why)
    snapshot = _snapshot(name)
    if snapshot is None:
        return None
    files = {
        p.name: (p.stat().st_size, None)
        for p in snapshot.iterdir()
        if p.is_file() and _FILE.fullmatch(p.name)
    }
    try:
        wanted = weights_file(files)
    except ValueError:
        return None
    return (
        Snapshot(
            name=name, commit=snapshot.name, files=files, licence=None, snapshot=snapshot, why=why
        )
        if wanted in files
        else None
    )


def _snapshot(name: Name) -> Path | None:
    from huggingface_hub import snapshot_download

    try:  # "config.json": all that must be there for the folder to be given, whole or not
        found = Path(
            snapshot_download(
                name.repo,
                revision=name.revision,
                local_files_only=True,
                allow_patterns=["config.json"],
            )
        )
    except Exception:  # not there, or not whole; each version of huggingface_hub has its own errors
        return None
    return found if found.is_dir() and _COMMIT.fullmatch(found.name) else None


def weights_file(files: Iterable[str]) -> str:
    """The file of a repository that holds the weights, or the index of several.

    Raises: ValueError for none, or several that could be it.
    """
    names = [n for n in files if "/" not in n]
    for name in WEIGHTS:
        if name in names:
            return name
    for end in ENDINGS:
        found = sorted(n for n in names if n.endswith(end) and not _NOT_WEIGHTS.match(n))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"several files that may be the checkpoint: {', '.join(found[:10])}. Download the "
                "right one and give its path."
            )
    listed = ", ".join(sorted(names)[:20]) or "none"
    raise ValueError(f"no checkpoint of PyTorch ({', '.join(ENDINGS)}) among its files: {listed}")


def download(
    found: Snapshot,
    token: str | None = None,
    *,
    accept_license: bool = False,
    known: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The files of a model, fetched where they are not in huggingface_hub's cache: weights and
    every small JSON file; where there is no config.json, every small YAML file too, as the config
    of older checkpoints is in one.

    accept_license: see `require_licence`. known: the licence, where the repository does not state
    it.

    Returns: path of the weights (or of their index), the rest beside it; and what goes into the
      provenance: hub (repo, revision, commit, licence, files with their sha256), and licence where
        the repository states one.
    Raises: LicenceError, before anything is fetched; FileNotFoundError, PermissionError; ValueError
      for a repository without a checkpoint; storage.DamagedError for a file that is not what the
      hub says.
    """
    require_licence(found.name.repo, found.licence or known, accept_license)
    try:
        main = weights_file(found.files)
    except ValueError as error:
        raise ValueError(f"{found.name} at {endpoint()}: {error}") from None
    endings = (".json",) if "config.json" in found.files else (".json", ".yaml", ".yml")
    beside = sorted(
        n
        for n, (size, _) in found.files.items()
        if n.endswith(endings) and not n.endswith(".index.json") and (size or 0) <= _MAX_JSON
    )
    if "config.json" in found.files and "config.json" not in beside:
        raise ValueError(
            f"{found.name}: config.json has {found.files['config.json'][0]} bytes, which no config "
            "needs"
        )
    digests = {}
    with _progress():
        paths = {name: _fetch(found, name, token, digests=digests) for name in [*beside, main]}
        for name in _shards(found, paths[main]) if main.endswith(".index.json") else ():
            _fetch(found, name, token, digests=digests)
    facts = {
        "repo": found.name.repo,
        "revision": found.name.revision,
        "commit": found.commit,
        "licence": found.licence,
        "files": dict(sorted(digests.items())),
    }
    return paths[main], {"hub": facts} | ({"licence": found.licence} if found.licence else {})


def _shards(found: Snapshot, index: Path) -> list[str]:
    """The files that an index names and the repository has; the converter says what is wrong with
    the others.
    """
    try:
        if index.stat().st_size > _MAX_INDEX:
            return []
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return []
    return sorted(
        n
        for n in named
        if isinstance(n, str) and n in found.files and n.endswith((".safetensors", ".bin"))
    )


def _fetch(found: Snapshot, name: str, token: str | None, digests: dict[str, str]) -> Path:
    from huggingface_hub import hf_hub_download

    size, expected = found.files[name]
    told: dict[str, Any] = {
        "revision": found.commit,
        "token": token,
        "endpoint": endpoint(),
        "library_name": "ltsm_jax",
    }
    path, problem = Path(), ""
    for again in (False, True):  # a damaged file in the cache is fetched once more
        try:
            path = found.snapshot / name if found.snapshot else None
            path = path or Path(
                _patiently(hf_hub_download, found.name.repo, name, force_download=again, **told)
            )
        except Exception as error:
            raise _no_answer(found.name, error, name) from error
        length, digests[name] = path.stat().st_size, _sha256(path)
        got = digests[name] if expected is None or len(expected) == 64 else _git_digest(path)
        if size in (None, length) and expected in (None, got):
            return path
        problem = f"{length} bytes with digest {got}, the hub says {size} with {expected}"
    raise storage.DamagedError(
        f"{path}: {problem}, also after it was fetched again. Nothing in it was used; try again "
        "later."
    )


def _patiently(fetch: Callable[..., str], *args: Any, **told: Any) -> str:
    """A transfer that breaks off is taken up where it broke; not every huggingface_hub does that by
    itself.
    """
    for _ in range(4):
        try:
            return fetch(*args, **told)
        except Exception as error:
            if type(error).__name__ not in ("RemoteProtocolError", "ReadError", "ReadTimeout"):
                raise
            told |= {"force_download": False}
            time.sleep(1)
    return fetch(*args, **told)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_digest(path: Path) -> str:
    """Git's digest of a file, which the hub gives in place of a sha256 for small files."""
    data = path.read_bytes() if path.stat().st_size <= _MAX_INDEX else b""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Bars for people, none in log files."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silence = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


def remember(found: Snapshot) -> None:
    """Keep which commit a revision is, and remove what conversions that were killed have left.
    Errors of a cache that can't be written are no errors of the caller's.
    """
    with contextlib.suppress(OSError):
        refs = found.name.store / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        part = refs / f".{uuid.uuid4().hex}.tmp"
        part.write_text(found.commit + "\n")
        os.replace(part, refs / urllib.parse.quote(found.name.revision, safe=""))
        for left in [*found.name.store.glob(".*.tmp"), *refs.glob(".*.tmp")]:
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def is_non_commercial(licence: str) -> bool:
    """Return whether a licence, by its name or in words, forbids commercial use."""
    return _FORBIDS.search(licence) is not None


def require_licence(repo: str, licence: str | None, accept: bool = False) -> None:
    """Require that a non-commercial licence is accepted; `accept` is remembered by repository and
    licence.

    It is kept in `$LTSM_CACHE/licences` (else ~/.cache/ltsm_jax/licences); `$LTSM_ACCEPT_LICENSE`
    may name licences or repositories instead, separated by commas. Licences that allow commercial
    use, and those that are not known, pass.

    Raises: LicenceError naming the licence, the repository and how to accept.
    """
    if licence is None or not is_non_commercial(licence):
        return
    # The licence of a family has a remark behind its name: "CC-BY-NC-4.0, non-commercial (...)".
    short = re.split(r"[,(]", licence)[0].strip().lower() or licence.lower()
    file = (
        storage.cache_folder("licences")
        / repo.replace("/", "--")
        / urllib.parse.quote(short, safe="")
    )
    named = {part.strip().lower() for part in os.environ.get(ACCEPT, "").split(",")}
    if file.is_file() or named & {repo.lower(), short}:
        return
    if not accept:
        raise LicenceError(
            f"the weights of {repo} are under {licence}: NON-COMMERCIAL USE ONLY. Read it at "
            f"{endpoint()}/{repo}; to accept it, once: ltsm_jax.load({repo!r}, "
            f"accept_license=True), or --accept-license with the ltsm command, or {ACCEPT}={short} "
            "in the environment"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(time.strftime("accepted %Y-%m-%d\n"))
    except OSError as error:
        print_note(
            f"that the licence of {repo} is accepted can't be kept, and will be asked again: "
            f"{error}"
        )


def say_licence(found: Snapshot, record: Mapping[str, Any]) -> None:
    """One line to stderr with the licence of the weights, once a process and model.

    record: `provenance` of the model folder.
    """
    stated = record.get("hub", {}).get("licence")
    licence = str(record.get("licence", "unknown"))
    if not stated:
        licence = (
            f"not stated by the repository ({licence} for the published weights of the family)"
        )
    only = " -- NON-COMMERCIAL USE ONLY" if is_non_commercial(licence) else ""
    _say_once(
        found.name.repo,
        found.commit,
        f"weights of {found.name}, commit {found.commit[:7]}: licence {licence}{only}",
    )


def say_local_licence(path: Path, record: Mapping[str, Any]) -> None:
    """One line to stderr, once a process, where weights that lie on this machine forbid commercial
    use.

    Nobody is asked to accept it: whoever has the files has got them somewhere, or made them.
    record: their provenance.
    """
    licence = str(record.get("licence", ""))
    if is_non_commercial(licence):
        _say_once(str(path), "", f"weights of {path}: licence {licence} -- NON-COMMERCIAL USE ONLY")


def _say_once(what: str, commit: str, line: str) -> None:
    if (what, commit) not in _said:
        _said.add((what, commit))
        print_note(line)


def print_note(line: str) -> None:
    """One line to stderr."""
    print(f"ltsm_jax: {line}", file=sys.stderr)


# --- errors


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 9:
        causes.append(cause)  # type: ignore[arg-type]
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return "offline mode is on (HF_HUB_OFFLINE)"
    told = next((e for e in causes if _status(e)), error)
    status = _status(told)
    first = next((line.strip() for line in str(told).splitlines() if line.strip()), "")
    return (
        f"the hub answers {status}"
        if status
        else f"no answer from {endpoint()} ({type(told).__name__}: {first[:200]})"
    )


def _no_answer(name: Name, error: Exception, file: str = "") -> OSError:
    """The error of a name that neither the hub nor a cache has, with what was tried and what
    to do.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status, page = _status(error), f"{endpoint()}/{name.repo}"
    place = storage.cache_folder("models") / str(name)
    kind: type[OSError] = FileNotFoundError
    if isinstance(error, GatedRepoError):
        kind = PermissionError
        reason = f"the repository is gated (the hub answers {status})"
        advice = (
            f"Accept its conditions at {page}, then set HF_TOKEN to a token of that account (or "
            "pass token=...)."
        )
    elif isinstance(error, RevisionNotFoundError):
        reason = f"the repository has no revision {name.revision!r}"
        advice = (
            f"Its branches and tags stand at {page}/tree/main; a preset may have a revision of its "
            "own."
        )
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        reason = (
            f"the hub answers {status}: there is no such repository{' or file' * bool(file)}, or "
            "it is private"
        )
        advice = (
            "Check the name; for a private repository set HF_TOKEN (or pass token=...) to a token "
            "that may read it."
        )
    elif status in (401, 403):
        kind = PermissionError
        reason = (
            f"the hub answers {status}: the token is missing, wrong, or may not read this "
            "repository"
        )
        advice = (
            f"Make a token with read access at {endpoint()}/settings/tokens; set HF_TOKEN to it "
            "(or pass token=...)."
        )
    else:
        reason = _reason(error)
        advice = (
            "Go online, or load it once on a machine that is and copy its caches (HF_HOME, "
            f"LTSM_CACHE), or download its config.json and weights by hand into {place}."
        )
    lines = [
        f"no model {str(name)!r}: {f'{file} could not be fetched: ' * bool(file)}{reason}. Tried:",
        f"  a file or folder of this name in {Path.cwd()}, and {place}",
        f"  a copy converted earlier, in {name.store}",
        f"  its files in the cache of huggingface_hub, {constants.HF_HUB_CACHE}",
        f"  {page}, revision {name.revision}",
        advice,
    ]
    return kind("\n".join(lines))
