"""Random and mutated checkpoint files: one short error for each, quickly, in little memory
(`fuzz.py` makes them).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def fuzz(seed: int, count: int, folder: Path) -> None:
    """Import `count` files in a process of its own, of which the memory is measured."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / "fuzz.py"), str(seed), str(count), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(
        f"{count} files in {found['seconds']:.0f} s, {found['grown'] >> 20} MB, the slowest "
        f"{found['slowest']:.2f} s"
    )
    assert not found["failures"], found["failures"][:5]
    assert not found["slow"], found["slow"]
    assert found["refused"] + found["read"] == count
    assert found["refused"] > 0.9 * count
    assert found["grown"] < (300 << 20) + 2 * found["largest"]
    assert not list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_hundred_thousand_files(tmp_path, seed):
    fuzz(seed, 25_000, tmp_path)
