"""A forecaster in one file that runs without this library.

`write` puts into a file: the program of a forecast (StableHLO by `jax.export`, for a CPU, a GPU and
a TPU), its weights, what is around it (how a context is scaled, the levels of its quantiles, the
calibration of those that the model does not say), and a short program that runs all of it,
`capsule.runner`. The machine that forecasts needs Python and jax:

    python sales.capsule history.csv forecast.csv

The file ends with the SHA-256 of everything before; a changed byte is refused.

With `int8` the matrices are kept as 8-bit integers with a float32 scale for each output channel
(weights alone: products are float32), a quarter of the size. What that does to forecasts is
measured on generated series and said.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ltsm_jax import storage, trees
from ltsm_jax.capsule import runner
from ltsm_jax.data import synthetic
from ltsm_jax.data.windows import context_scale
from ltsm_jax.forecaster import LEVELS, Forecaster
from ltsm_jax.frequency import season_of
from ltsm_jax.tasks import panels

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = 32  # of a program whose batch cannot be left open
SMALLEST = 1024  # numbers of a matrix that is worth to be kept in 8 bits
DRIFT = 64  # generated series that are forecast with and without 8 bits


@dataclasses.dataclass(frozen=True)
class Written:
    """A capsule that was written.

    Attributes:
      path: the file. size: its bytes.
      batch: windows of a call, None where it is open.
      drift: with int8, (mean, largest) absolute change of the point forecast of generated series,
        in standard deviations of the context; else None.
      notes: what could not be kept.
    """

    path: Path
    size: int
    batch: int | None
    drift: tuple[float, float] | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.size / 1e6:.1f} MB; run it by: python {self.path} history.csv"
        ]
        if self.drift is not None:
            lines.append(
                f"8-bit weights move forecasts of {DRIFT} generated series by {self.drift[0]:.2g} "
                f"standard deviations in the mean, by {self.drift[1]:.2g} at most"
            )
        return "\n".join([*lines, *self.notes])


def write(
    forecaster: Forecaster,
    path: str | Path,
    horizon: int,
    *,
    quantile_levels: Sequence[float] = LEVELS,
    n_targets: int | None = None,
    context_len: int | None = None,
    int8: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Written:
    """Write a forecaster as one file that jax alone runs.

    Args:
      path: file to write, such as "sales.capsule".
      horizon: steps that it forecasts.
      quantile_levels: its quantiles, of the model itself or, at levels that it does not say, of the
        forecaster's calibration; () for the point forecast alone.
      n_targets: targets of an item, for models that see all of them together; by default as many
        as the forecaster was fitted on, or one.
      context_len: rows that it looks at; by default the forecaster's.
      int8: keep matrices in 8 bits.
      seed: of the draws of models that sample.
      overwrite: replace a file.
    Returns: what was written; print it.
    Raises: FileExistsError; ValueError for levels that nothing says, and for forecasts that are not
      a program (AutoETS).
    Example: `print(capsule.write(Forecaster.load("runs/sales/model"), "sales.capsule", 28))`
    """
    path = storage.user_path(path)
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path} is there already; overwrite=True replaces a file")
    count = n_targets or len(forecaster.targets) or 1
    season = season_of(forecaster.freq) if forecaster.freq else 1
    way = forecaster.way(count, forecaster.freq, season)
    if way.on_host is not None:
        raise ValueError("AutoETS, the verdict of this forecaster, is no program that jax runs")
    members = count if way.joint else 1
    length = context_len or way.context_len
    levels = tuple(sorted(quantile_levels))
    takes = forecaster.model.covariates if forecaster.baseline is None else ()
    widths = {
        "past": len(forecaster.past) if "past" in takes else 0,
        "known": len(forecaster.known) if "known" in takes else 0,
    }
    kinds = (widths["past"], widths["known"])
    own = panels.own_levels(
        way.predictor, way.params, members, horizon=horizon, wanted=levels, covariates=kinds
    )
    offsets = _offsets(
        forecaster, horizon, count, members=members, levels=[x for x in levels if x not in own]
    )
    flat = trees.flatten(way.params)
    job = _Job(
        predictor=way.predictor,
        paths=tuple(flat),
        length=length,
        horizon=horizon,
        members=members,
        widths=widths,
        levels=own,
        seed=seed,
    )
    whole = [_plain(leaf) for leaf in flat.values()]
    kept = [_in_8_bits(leaf) if int8 and _is_matrix(leaf) else leaf for leaf in whole]
    exported, batch, note = job.exported(kept)
    facts = {
        "format": 1,
        "model": forecaster.baseline or forecaster.model.family,
        "licence": forecaster.licence,
        "context_len": length,
        "horizon": horizon,
        "members": members,
        "joint": way.joint,
        "targets": list(forecaster.targets),
        **widths,
        "levels": list(levels),
        "offsets": offsets,
        "season": season,
        "missing_in_front": getattr(way.predictor, "missing_in_front", True),
        "batch": batch,
        "most": panels.batch_of(way.predictor, members + sum(widths.values()), length),
        "int8": int8,
        "jax": jax.__version__,
        "platforms": list(exported.platforms),
    }
    size = _packed(path, exported, jax.tree.leaves(kept), facts=facts)
    drift = job.drift(whole, kept) if int8 else None
    return Written(path=path, size=size, batch=batch, drift=drift, notes=(note,) if note else ())


def _offsets(
    forecaster: Forecaster, horizon: int, count: int, members: int, levels: Sequence[float]
) -> list | None:
    """Offsets [C or 1, H, W] of the calibration at levels that the model does not say."""
    if not levels:
        return None
    calibration = forecaster.calibration
    if calibration is None or not calibration.fits(horizon, count):
        raise ValueError(
            f"{forecaster.baseline or forecaster.model.family} does not say quantiles "
            f"{', '.join(f'{x:g}' for x in levels)} itself, and this forecaster has no calibration "
            f"of {horizon} steps of {count} targets: fit it on a table, calibrate it "
            "(`Forecaster.calibrated`), or ask for the point forecast alone, quantile_levels=()"
        )
    offsets = calibration.at(horizon, levels)
    if len(offsets) > 1 and members == 1:
        raise ValueError(
            f"the calibration has errors of each of {len(offsets)} targets, and the model "
            "forecasts one target at a time: write a capsule for each, or quantile_levels=()"
        )
    return offsets.tolist()


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A forecast as a function of its weights and scaled windows.

    paths: of the weights, a list of arrays in this order; of (steps, scale) where they are kept in
    8 bits. widths: number of past and known covariates. levels: of the model itself.
    """

    predictor: panels.Predictor
    paths: tuple[str, ...]
    length: int
    horizon: int
    members: int
    widths: dict[str, int]
    levels: tuple[float, ...]
    seed: int

    def forecast(
        self, weights: list[Any], context: jax.Array, *more: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Point [B, C, H] and quantiles [B, C, H, W] after scaled contexts."""
        whole = [_restored(w) if isinstance(w, tuple) else w for w in weights]
        params = trees.unflatten(dict(zip(self.paths, whole, strict=True)))
        rest = list(more)
        past = rest.pop(0) if self.widths["past"] else None
        known = rest.pop(0) if self.widths["known"] else None
        key = jax.random.key(self.seed)
        return panels.program(
            self.predictor,
            params,
            context,
            past=past,
            known=known,
            key=key,
            horizon=self.horizon,
            levels=self.levels,
        )

    def shapes(self, batch: Any) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the windows of a batch."""
        widths = [(self.members, 0), (self.widths["past"], 0), (self.widths["known"], self.horizon)]
        return [
            jax.ShapeDtypeStruct((batch, width, self.length + ahead), jnp.float32)
            for width, ahead in widths
            if width
        ]

    def exported(self, weights: list[Any]) -> tuple[export.Exported, int | None, str]:
        """Export the program, with an open batch where the model can be traced so.

        Returns: the program, whose first argument is the plain list of all arrays; its batch (None:
          open); and a note where it is not open.
        """
        arrays, structure = jax.tree.flatten(weights)
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]

        def program(arrays, *windows):
            return self.forecast(jax.tree.unflatten(structure, arrays), *windows)

        traced = export.export(jax.jit(program), platforms=PLATFORMS)
        (batch,) = export.symbolic_shape("b")
        try:
            return traced(shapes, *self.shapes(batch)), None, ""
        except (TypeError, ValueError, jax.errors.InconclusiveDimensionOperation):
            # A model whose code asks how many windows there are.
            found = traced(shapes, *self.shapes(BATCH))
            return found, BATCH, f"windows go through it {BATCH} at a time"

    def drift(self, whole: list[Any], kept: list[Any]) -> tuple[float, float]:
        """Measure what 8 bits do to forecasts of generated series: mean and largest change."""
        series = synthetic.generate(0, DRIFT * self.members, self.length)
        context = series.reshape(DRIFT, self.members, self.length).astype(np.float64)
        mean, scale = context_scale(context)
        windows = [((context - mean) / scale).astype(np.float32)]
        windows += [np.zeros(s.shape, np.float32) for s in self.shapes(DRIFT)[1:]]
        run = jax.jit(self.forecast)
        before, after = (np.asarray(run(weights, *windows)[0]) for weights in (whole, kept))
        change = np.abs(after - before)
        return float(change.mean()), float(change.max())


def _plain(leaf: Any) -> np.ndarray:
    """Give an array as the file holds it: NumPy has no bfloat16."""
    return np.asarray(leaf, np.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else None)


def _is_matrix(array: np.ndarray) -> bool:
    return array.ndim >= 2 and array.size >= SMALLEST and array.dtype == np.float32


def _in_8_bits(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each channel of the last axis to 255 steps, up to its largest entry."""
    largest = np.abs(array).max(axis=tuple(range(array.ndim - 1)))
    scale = np.where(largest > 0, largest, 1.0).astype(np.float32) / 127
    return np.round(array / scale).astype(np.int8), scale


def _restored(pair: Sequence[jax.Array]) -> jax.Array:
    steps, scale = pair
    return steps.astype(scale.dtype) * scale.reshape((1,) * (steps.ndim - 1) + (-1,))


def _packed(
    path: Path, exported: export.Exported, weights: list[np.ndarray], facts: dict[str, Any]
) -> int:
    """Write the file beside its place and move it there. Returns: its bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("__main__.py", Path(runner.__file__).read_bytes())
        # What jax reads programs with and does not bring along (Apache-2.0, its METADATA says so).
        for file in importlib.metadata.files("flatbuffers") or ():
            if file.suffix == ".py" or file.name == "METADATA":
                archive.writestr(str(file), file.read_binary())
        archive.writestr("capsule.json", json.dumps(facts))
        archive.writestr("program.bin", bytes(exported.serialize()), zipfile.ZIP_DEFLATED)
        arrays = io.BytesIO()
        named: dict[str, Any] = {f"{i}": weight for i, weight in enumerate(weights)}
        np.savez(arrays, **named)
        archive.writestr("weights.npz", arrays.getvalue())
        archive.comment = b"0" * runner.DIGEST
    data = content.getvalue()[: -runner.DIGEST]
    data += hashlib.sha256(data).hexdigest().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return len(data)
