"""Environments of the programs that benchmarks compare with."""

import subprocess
import sys
from pathlib import Path

# What is installed for a peer; versions are those of the recorded numbers.
PACKAGES = {
    "torch": ("torch==2.13.0", "numpy"),
    "chronos": ("chronos-forecasting==2.3.2", "torch==2.13.0"),
    "newest": (
        "torch==2.13.0",
        "timesfm==3.0.2",
        "tirex-2==0.4.0",
        # what the two below need
        "transformers[torch]==4.57.6",
        "datasets",
        "deprecated",
        "scikit-learn",
        "gluonts[torch]==0.17.0",
        "unit-scaling==0.3.5",
        "jaxtyping==0.3.11",
    ),
}
# Installed without what they ask for: granite-tsfm wants an older PyTorch, toto-2 a newer
# Python, and both run with these.
ALONE = {"newest": ("granite-tsfm==0.3.11", "toto-2==2.0.0", "dd-unit-scaling==0.1.0")}


def python_of(peer: str, folder: Path) -> str:
    """Give the Python of a peer's environment in `folder`, which is made where it is not there yet.

    Raises: ValueError where it cannot be made.
    """
    place = folder / peer
    python = place / "bin" / "python"
    ready = place / "ready"  # of a folder without it, an installation may have stopped half-way
    if ready.exists():
        return str(python)
    install = [str(python), "-m", "pip", "install"]
    steps = [[sys.executable, "-m", "venv", str(place)], [*install, *PACKAGES[peer]]]
    if peer in ALONE:
        steps.append([*install, "--no-deps", "--ignore-requires-python", *ALONE[peer]])
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise ValueError(
                f"the environment {place} for {peer} cannot be made: {said[-1] if said else step}"
            )
    ready.touch()
    return str(python)
