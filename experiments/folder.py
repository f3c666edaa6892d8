"""The folder of a comparison: its settings, its results, and what made them.

run.json has the settings (others are refused), results.csv a row per finished cell, cells/<name>/result.json what a
cell left; it is written last, so that a cell that has one is finished.
"""

import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from experiments.flags import UsageError


def result_file(folder: Path, cell: str) -> Path:
    """What a finished cell has, and no other."""
    return folder / "cells" / cell / "result.json"


def settle(folder: Path, record: dict[str, Any], optional: Sequence[str] = ()) -> None:
    """Make the folder and write run.json, or check that the run.json there asks for the same.

    record: what run.json shall hold; its "settings" are compared. optional: settings that may be None on one of the two
    sides, where no cell needs them.
    Raises: UsageError when the folder holds a comparison with other settings.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    file = folder / "run.json"
    if file.is_file():
        try:
            old = json.loads(file.read_text())["settings"]
        except (ValueError, KeyError) as err:
            raise UsageError(f"{file} is damaged ({err}); delete the folder or take another --out") from None
        now = record["settings"]
        for k in optional:
            if old.get(k) is None or now[k] is None:
                old[k] = now[k] = old.get(k) or now[k]
        if other := [k for k in now if old.get(k) != now[k]]:
            lines = [f"  {k}: {old.get(k)} there, {now[k]} now" for k in other]
            raise UsageError(
                f"{folder} holds a comparison with other settings; take another --out:\n" + "\n".join(lines)
            )
    write_json(file, record)


def write_csv(folder: Path, rank: Callable[[dict[str, Any]], Any]) -> None:
    """results.csv from every finished cell in the folder, those of earlier commands included."""
    rows = [json.loads(file.read_text())["row"] for file in (folder / "cells").glob("*/result.json")]
    temporary = folder / ".results.csv"
    pd.DataFrame(sorted(rows, key=rank)).to_csv(temporary, index=False)
    os.replace(temporary, folder / "results.csv")


def write_json(file: Path, content: Any) -> None:
    """A JSON file, whole or not at all; for the first host (`hosts.on_first`)."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)


@functools.cache
def git_commit() -> str:
    """Commit of this code, "-dirty" with changes on top; "release" where it does not lie in its own repository."""
    here = Path(__file__).parent

    def git(*args):
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=20)

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return "release"
        dirty = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
        return git("rev-parse", "--short=12", "HEAD").stdout.strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def versions() -> str:
    """Versions that numbers depend on."""
    try:
        own = version("ltsm-jax")
    except PackageNotFoundError:
        own = "source"
    return f"ltsm-jax {own} jax {jax.__version__} python {platform.python_version()}"


def device() -> str:
    """What it ran on: "cpu, 2 cores", "4 x NVIDIA H200"."""
    if jax.default_backend() == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
