"""Settings of the whole suite, and the recorded reference vectors."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quick_compile
from hypothesis import settings

# Nothing is compiled yet. The children of tests inherit it, so that what is compared bit by bit was
# compiled alike.
os.environ["XLA_FLAGS"] = quick_compile.flags()

# A suite that a script started in its background would ignore Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_default_matmul_precision", "highest"
)  # GPUs and TPUs would differ for no fault of ours
settings.register_profile(
    "suite", deadline=None, derandomize=True
)  # the first example compiles; CI is no lottery
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
        (found,) = [
            p for p in self.folder.iterdir() if p.suffix in (".ckpt", ".pth", ".safetensors")
        ]
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
        "--parity",
        action="store_true",
        help="print how much of the recorded tolerances is used; one process",
    )


# Half of the suite's time is compiling. What was compiled is kept in a folder of this run, so that
# workers, child processes and, in .ci/run, stages share it; the folder is new for every run, as no
# test may rest on another run.
CACHE_SETTINGS = {
    "JAX_COMPILATION_CACHE_DIR": None,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def pytest_configure(config):
    """Make the run's folder of compiled programs, unless .ci/run or the controller of this worker
    has made it.
    """
    if "LTSM_TEST_CACHE" not in os.environ:
        folder = tempfile.mkdtemp(prefix="ltsm-compiled-")
        os.environ["LTSM_TEST_CACHE"] = folder

        def remove():
            del os.environ["LTSM_TEST_CACHE"]
            shutil.rmtree(folder, ignore_errors=True)

        config.add_cleanup(remove)

    # Children read the environment; this process has imported JAX already.
    settings_of_run = CACHE_SETTINGS | {"JAX_COMPILATION_CACHE_DIR": os.environ["LTSM_TEST_CACHE"]}
    os.environ.update(settings_of_run)
    jax.config.update("jax_compilation_cache_dir", settings_of_run["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Files that take longest, the longest first: the workers begin with them, so that none is left with
# a long one when the others have nothing to do. `make test` prints the slowest tests.
LONGEST = (
    "models/test_contract.py",
    "experiments/test_all_families.py",
    "experiments/test_hosts.py",
    "training/test_sharding.py",
    "training/test_stopping.py",
    "converters/test_fuzz.py",
    "training/test_checkpoints.py",
    "test_documents.py",
    "test_notebooks.py",
    "methods/test_fit.py",
    "experiments/test_sff.py",
    "models/test_folders.py",
    "experiments/test_prune_then_finetune.py",
    "test_cli.py",
    "experiments/test_landscape_command.py",
    "models/test_moirai.py",
    "converters/test_hostile_costs.py",
    "methods/test_pruning.py",
    "methods/test_removal.py",
    "methods/test_forecast.py",
    "models/test_timer_golden.py",
    "models/test_timesfm_1_golden.py",
    "models/test_ttm_golden.py",
    "models/test_timesfm_2p5_golden.py",
    "models/test_timesfm_3_golden.py",
    "models/test_toto_2.py",
    "methods/test_run.py",
    "models/test_hub.py",
    "models/test_tirex_2.py",
    "models/test_moment.py",
    "methods/test_user_path.py",
)


def pytest_collection_finish():
    """Look for garbage less often, and not among modules and tests: it takes a twelfth of
    the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_collection_modifyitems(items):
    """Put the longest files first; the order within a file, and that of the others, stays."""
    here = Path(__file__).parent
    rank = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop what a file has compiled: little of it is called by another, and it adds up to
    gigabytes.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden_dir(request) -> Path:
    return request.config.getoption("--golden")


@pytest.fixture(scope="session")
def golden(golden_dir):
    """`golden("timer")`: the reference vectors of a family; skipped where the folder has none of
    it.
    """

    def read(family: str) -> Golden:
        folder = golden_dir / family
        if not (folder / "meta.json").is_file():
            pytest.skip(f"no vectors of {family} in {golden_dir}")
        return Golden(folder)

    return read
