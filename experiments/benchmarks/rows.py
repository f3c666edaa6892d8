"""Measurements as rows: what a benchmark gives, and what is known of the machine that gave it.

    {"benchmark": "epoch", "what": "ltsm_jax", "value": 51.3, "unit": "s", "processor": ..., "busy":
    0.02, ...}

One row is one line of JSON, so that files of several machines and days are joined by `cat`.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks import machine

BUSY = 0.3  # of each core; above it a time says little
LOOK_SECONDS = 2.0  # of watching the machine before a benchmark
MOST_CELLS = 4  # significant digits of a value in the table


@dataclasses.dataclass(frozen=True)
class Measured:
    """One number. what: of what, within its benchmark. unit: "s", "ratio", "windows/s", ..."""

    what: str
    value: float
    unit: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark as the runner knows it.

    Attributes:
      name: of its module.
      cost: roughly, on 2 CPU cores.
      measure: gives the numbers; takes the Python of the peer's environment, or None: our side
        alone.
      peer: the environment of `peers.PACKAGES` that the other side needs.
    """

    name: str
    cost: str
    measure: Callable[[str | None], Iterable[Measured]]
    peer: str | None = None


def busy() -> float:
    """Share of all cores that other programs use now, in [0, 1], watched for `LOOK_SECONDS`.

    The load average would count what this program itself did a minute ago. It is asked where there
    is no /proc/stat.
    """
    try:
        before = _ticks()
        time.sleep(LOOK_SECONDS)
        after = _ticks()
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    total = sum(after) - sum(before)
    idle = sum(after[3:5]) - sum(before[3:5])  # idle, and waiting for a disk
    return 1 - idle / max(total, 1)


def _ticks() -> list[int]:
    return [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def circumstances(busy_share: float) -> dict[str, Any]:
    """Say when, where and with what a row is measured; `busy_share` as `busy` gave it."""
    import jax

    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "processor": machine.name(),
        "cores": os.cpu_count(),
        "busy": round(busy_share, 3),
        "loaded": busy_share > BUSY,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
    }


def commit() -> str | None:
    """Name the commit of the source tree, with + where files differ from it; None outside of a
    repository.
    """
    root = Path(__file__).parents[2]
    ask = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def of(benchmark: Benchmark, python: str | None, busy_share: float) -> Iterator[dict[str, Any]]:
    """Run a benchmark and give its rows as they come."""
    known = circumstances(busy_share)
    for one in benchmark.measure(python):
        yield {"benchmark": benchmark.name, **dataclasses.asdict(one), **known}


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of rows. Raises: ValueError naming the line that is none."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["benchmark"], row["what"], row["value"], row["unit"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is no measurement: {line[:80]!r}") from None
        found.append(row)
    return found


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as the tables of RESULTS.md: for each benchmark and machine the median of each
    number.

    Numbers measured beside other programs are marked; they stay apart from those that were not.
    """
    groups: dict[tuple, dict[tuple, list[float]]] = {}
    for row in found:
        day = str(row.get("date", ""))[:10]
        jax_version = (row.get("versions") or {}).get("jax", "?")
        machine_of = (
            f"{row.get('processor', '?')}, {row.get('cores', '?')} cores, jax {jax_version}"
        )
        where = (row["benchmark"], day, machine_of, row.get("commit"), bool(row.get("loaded")))
        groups.setdefault(where, {}).setdefault((row["what"], row["unit"]), []).append(row["value"])

    lines = []
    for (benchmark, day, machine_of, commit_of, loaded), numbers in groups.items():
        beside = ", **beside other programs**" if loaded else ""
        lines += [f"**{benchmark}**: {day}, {machine_of}, commit {commit_of}{beside}", ""]
        lines += ["| | median | unit | runs |", "| --- | ---: | --- | ---: |"]
        for (what, unit), values in numbers.items():
            lines.append(
                f"| {what} | {statistics.median(values):.{MOST_CELLS}g} | {unit} | {len(values)} |"
            )
        lines.append("")
    return "\n".join(lines)
