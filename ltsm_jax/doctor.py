"""Examine an installation: versions, devices, caches, and one recorded forecast of every family.

Each family forecasts a fixed series at its small size, with weights that no generator of JAX draws;
the answer must be the stored one. So a device, a driver or a version of a package that computes
something else is found before it costs a day. Nothing is downloaded and nothing is kept.

    for check in doctor.examine():
        print(check)

Matrix products are taken at full float32 precision. Accelerators round them more coarsely by
default (TF32 on NVIDIA's, bfloat16 on TPUs), and forecasts there differ by some 1e-3 for no fault
of theirs.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import storage, trees
from ltsm_jax.models import FAMILIES, Model, folders

ANSWERS = Path(__file__).with_name("doctor.json")
HORIZON = 8  # steps of each forecast
# Weights that are off by 1e-6 of their size, which is more than float32 loses, move the forecasts
# by a tenth of these at most. In units of the series, whose values lie between -1 and 2.
TOLERANCE = 2e-4
# Quantiles through a sinh, which stretches what lies far out.
TOLERANCES = {"chronos_2": 2e-3, "moirai": 1e-3}
ON_ACCELERATORS = (
    10  # times that: they add up in another order, and their exp and tanh are approximations
)
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "huggingface_hub",
    "pyyaml",
)
OPTIONAL = ("matplotlib", "openpyxl", "polars", "statsforecast")
CACHES = ("data", "models", "compiled")
THREADS = 2  # that compile side by side


@dataclasses.dataclass(frozen=True)
class Check:
    """One family on this device.

    Attributes:
      family: its name.
      difference: largest difference from the stored answer, in units of the series; NaN where there
        is no forecast.
      tolerance: what is allowed.
      seconds: with compilation.
      problem: what is wrong and what to do; "" where nothing is.
    """

    family: str
    difference: float
    tolerance: float
    seconds: float
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.family:14} FAULT  {self.problem}"
        return (
            f"{self.family:14} ok     {self.difference:.1e} off, {self.tolerance:.0e} allowed, "
            f"{self.seconds:.1f} s"
        )


# --------------------------------------------------------------------------------------------------
# the machine


def environment() -> dict[str, Any]:
    """Describe what the library runs on, as JSON types.

    Returns: `versions` by package (None: not installed, all optional), `python`, `system`, `cores`,
      `backend`, `devices`, and `caches`: folder, free bytes and a `problem` ("" where there is
        none) by kind.
    """
    devices = [f"{device.device_kind} {device.id}" for device in jax.local_devices()]
    versions = {}
    for name in ("ltsm-jax", *PACKAGES, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": devices,
        "caches": {kind: _cache(storage.cache_folder(kind)) for kind in CACHES},
    }


def _cache(folder: Path) -> dict[str, Any]:
    """Say how much room a cache folder, or the nearest folder above it that is there, has."""
    place = folder
    while not place.exists():
        place = place.parent
    problem = ""
    if not place.is_dir():
        problem = f"{place} is no folder: set LTSM_CACHE to one that may be written"
    elif not os.access(place, os.W_OK):
        problem = f"{place} may not be written: set LTSM_CACHE to a folder that may"
    return {
        "folder": str(folder),
        "free": shutil.disk_usage(place).free,
        "problem": problem,
    }


# --------------------------------------------------------------------------------------------------
# the forecasts


def fixed_weights(path: str, shape: tuple[int, ...], unit_scaled: bool = False) -> np.ndarray:
    """Draw the weights [*shape] of one parameter, float64: the same on every machine and with every
    version.

    Kernels keep the variance of what goes through them, scales of norms are about 1, biases about
    0. unit_scaled: all but scales are of the order of 1, see `Model.unit_scaled`.
    """
    # The generator that NumPy promises not to change, seeded by the name: a new parameter moves no
    # other.
    draw = np.random.RandomState(zlib.crc32(path.encode())).standard_normal(shape)
    if path.rpartition("/")[2] == "scale":
        return 1 + 0.1 * draw
    if unit_scaled:
        return draw
    if len(shape) < 2:
        return 0.1 * draw
    return draw / np.sqrt(max(1, np.prod(shape[:-1])))


def patient(family: str) -> tuple[Model, trees.Tree, np.ndarray]:
    """Make the small model of a family, its weights, and the series [1, C, L] that it forecasts.

    The series is a wave of 24 steps with a trend, another phase in every variate, and one missing
    value.
    """
    model = FAMILIES[family](FAMILIES[family].small())
    variates = 2 if model.variates == "joint" else 1
    model, like = model.for_series(
        _drawn(folders.param_shapes(model), model.unit_scaled),
        n_variates=variates,
        freq="h",
        key=jax.random.key(0),
    )
    # Once more, for what the family has added for such data.
    params = _drawn(like, model.unit_scaled)

    steps_L = np.arange(model.context_len)
    phase_C1 = np.arange(variates)[:, None]
    series_CL = np.sin(2 * np.pi * steps_L / 24 + phase_C1) + 0.01 * steps_L
    series_CL[:, 5] = np.nan
    return model, params, series_CL[None].astype(np.float32)


def _drawn(like: trees.Tree, unit_scaled: bool) -> trees.Tree:
    params = {}
    for path, leaf in trees.flatten(like).items():
        params[path] = jnp.asarray(fixed_weights(path, leaf.shape, unit_scaled), leaf.dtype)
    return trees.unflatten(params)


def fixed_forecast(family: str) -> dict[str, np.ndarray]:
    """Forecast the fixed series: `point` [C, H] and, where the family has them, `quantiles` [C, H,
    Q].
    """
    model, params, series = patient(family)
    predict = jax.jit(model.predict, static_argnums=2)
    with jax.default_matmul_precision("highest"):
        found = predict(params, jnp.asarray(series), HORIZON)
    named = {"point": found.point, "quantiles": found.quantiles}
    return {
        name: np.asarray(value[0], np.float64) for name, value in named.items() if value is not None
    }


@functools.lru_cache(maxsize=1)
def answers() -> dict[str, dict[str, np.ndarray]]:
    """Read the stored forecasts by family."""
    stored = json.loads(ANSWERS.read_text())["families"]
    found = {}
    for family, arrays in stored.items():
        found[family] = {name: np.asarray(array) for name, array in arrays.items()}
    return found


def examine_family(family: str) -> Check:
    """Compare the forecast of one family on this device with the stored one; errors become a
    `problem`.
    """
    accelerated = jax.default_backend() != "cpu"
    tolerance = TOLERANCES.get(family, TOLERANCE) * (ON_ACCELERATORS if accelerated else 1)
    start = time.perf_counter()
    difference, problem = float("nan"), ""
    try:
        difference, problem = _compare(fixed_forecast(family), answers()[family], tolerance)
    except Exception as error:  # of a compiler or a driver, with any class
        said = " ".join(str(error).split())[:300]
        problem = f"no forecast: {type(error).__name__}: {said}"
    if problem:
        problem += f"; {_advice(accelerated)}"
    return Check(
        family=family,
        difference=difference,
        tolerance=tolerance,
        seconds=time.perf_counter() - start,
        problem=problem,
    )


def _shapes(arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _compare(
    found: dict[str, np.ndarray], stored: dict[str, np.ndarray], tolerance: float
) -> tuple[float, str]:
    """Give the largest difference of two forecasts, and what is wrong with the first; "" for
    nothing.
    """
    if _shapes(found) != _shapes(stored):
        return float("nan"), "the forecast has another shape than the stored one"
    if not all(np.isfinite(array).all() for array in found.values()):
        return float("nan"), "the forecast is not finite"
    difference = max(float(np.abs(found[name] - stored[name]).max()) for name in stored)
    if difference > tolerance:
        return difference, f"the forecast is {difference:.1e} off, {tolerance:.0e} is allowed"
    return difference, ""


def _advice(accelerated: bool) -> str:
    if accelerated:
        return (
            "try JAX_PLATFORMS=cpu ltsm doctor: where that finds nothing, the driver or the "
            "plugin of the device is at fault; update it, or compute on the processor"
        )
    return (
        "reinstall jax, jaxlib and numpy in the versions that ltsm-jax asks for, and without "
        "XLA_FLAGS"
    )


def examine(families: Iterable[str] = tuple(FAMILIES)) -> Iterator[Check]:
    """Examine families on the default device, two at a time; results in their order, as they come.

    Takes about half a minute for all of them on two cores, most of it compiling.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(examine_family, families)


def record(file: Path = ANSWERS, *, families: Iterable[str] = tuple(FAMILIES)) -> None:
    """Store the forecasts of this device as the answers, for maintainers who have added or changed
    a family.

    families: those to record; the others keep their answers.
    """
    wanted = set(families)
    stored = json.loads(ANSWERS.read_text())["families"] if wanted < set(FAMILIES) else {}
    found = {}
    for family in FAMILIES:
        if family in wanted:
            arrays = fixed_forecast(family)
            found[family] = {name: _rounded(array) for name, array in arrays.items()}
        elif family in stored:
            found[family] = stored[family]
    made = {
        "horizon": HORIZON,
        "made_with": {name: environment()["versions"][name] for name in ("jax", "jaxlib", "numpy")},
        "made_on": f"{jax.default_backend()}, {platform.machine()}, Python "
        f"{sys.version.split()[0]}",
        "families": found,
    }
    file.write_text(json.dumps(made) + "\n")


def _rounded(array: np.ndarray) -> list:
    """Keep eight digits of float32."""
    return np.vectorize(lambda value: float(f"{value:.8g}"))(array).tolist()
