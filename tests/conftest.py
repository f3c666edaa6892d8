"""Settings of the whole suite, and the recorded reference vectors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs would differ for no fault of ours
jax.config.update("jax_enable_compilation_cache", False)  # no test may rest on what another run compiled
settings.register_profile("suite", deadline=None)  # the first example compiles
settings.load_profile("suite")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One folder of vectors recorded from an original implementation: its files, read lazily."""

    folder: Path

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def init_stats(self) -> dict[str, Any]:
        return json.loads((self.folder / "init_stats.json").read_text())

    @property
    def checkpoint(self) -> Path:
        (found,) = [p for p in self.folder.iterdir() if p.suffix in (".ckpt", ".pth", ".safetensors")]
        return found

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / name) as file:
            return {key: file[key] for key in file.files}


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder with one folder of reference vectors per model family",
    )
    parser.addoption(
        "--parity", action="store_true", help="print how much of the recorded tolerances is used; one process"
    )


@pytest.fixture(scope="module")
def compile_quickly():
    """For tests of many small programs, each run a few times: they wait for compiling, and a third of that is
    optimisation that a tiny model does not need."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # nothing of it is called again, and it adds up to gigabytes


@pytest.fixture(scope="session")
def golden_dir(request) -> Path:
    return request.config.getoption("--golden")


@pytest.fixture(scope="session")
def golden(golden_dir):
    """`golden("timer")`: the reference vectors of a family; skipped where the folder has none of it."""

    def read(family: str) -> Golden:
        folder = golden_dir / family
        if not (folder / "meta.json").is_file():
            pytest.skip(f"no vectors of {family} in {golden_dir}")
        return Golden(folder)

    return read
