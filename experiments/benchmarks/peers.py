"""Environments of the programs that benchmarks compare with."""

import subprocess
import sys
from pathlib import Path

# What is installed for a peer; versions are those of the recorded numbers.
PACKAGES = {
    "torch": ("torch==2.13.0", "numpy"),
    "chronos": ("chronos-forecasting==2.3.2", "torch==2.13.0"),
    "timesfm": ("timesfm==3.0.2", "torch==2.13.0"),
}


def python_of(peer: str, folder: Path) -> str:
    """Give the Python of a peer's environment in `folder`, which is made where it is not there yet.

    Raises: ValueError where it cannot be made.
    """
    place = folder / peer
    python = place / "bin" / "python"
    ready = place / "ready"  # of a folder without it, an installation may have stopped half-way
    if ready.exists():
        return str(python)
    steps = (
        [sys.executable, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", *PACKAGES[peer]],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise ValueError(
                f"the environment {place} for {peer} cannot be made: {said[-1] if said else step}"
            )
    ready.touch()
    return str(python)
