"""Runs a capsule: a forecaster in one file, for machines that have jax and nothing of ltsm_jax.

    python sales.capsule history.csv forecast.csv

history.csv: a header and a row per time step, oldest first; empty cells are missing. forecast.csv:
a row per target and step ahead. In Python, with this file (`__main__.py` in the capsule) at hand,
`Capsule("sales.capsule").forecast(history)` takes arrays [N, C, T] with NaN for missing values, and
gives "point" [N, C, H], "quantiles" [N, C, H, W] and their "levels".
"""

import csv
import hashlib
import importlib.util
import io
import json
import sys
import zipfile

import jax
import numpy as np
from jax import export

DIGEST = 64  # hexadecimal digits of SHA-256, behind everything else in the file


class Capsule:
    """A forecaster read from `path`. Raises ValueError for a file that is not as it was written."""

    def __init__(self, path):
        with open(path, "rb") as file:
            data = file.read()
        if hashlib.sha256(data[:-DIGEST]).hexdigest().encode() != data[-DIGEST:]:
            raise ValueError(
                f"{path}: damaged or changed: its bytes are not those that were written"
            )
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            self.facts = json.loads(archive.read("capsule.json"))
            program, weights = archive.read("program.bin"), archive.read("weights.npz")
        if importlib.util.find_spec("flatbuffers") is None:
            sys.path.append(str(path))  # it is in the capsule
        try:
            self.call = jax.jit(export.deserialize(bytearray(program)).call)
        except Exception as error:
            written, here = self.facts["jax"], jax.__version__
            raise ValueError(
                f"{path}: written by jax {written}, not read by {here}: {error}"
            ) from error
        with np.load(io.BytesIO(weights)) as arrays:
            self.weights = [jax.device_put(arrays[f"{i}"]) for i in range(len(arrays.files))]

    def forecast(self, history, past=None, known=None):
        """Forecast after `history` [N, C, T]; covariates: past [N, K, T], known [N, K', T + H]."""
        facts, length, rows = self.facts, self.facts["context_len"], len(history)
        history = self.checked(history, facts["members"], "history")
        # Sums go by the order in memory; the library has the variates of a step side by side.
        context = np.ascontiguousarray(history[..., -length:].swapaxes(1, 2)).swapaxes(1, 2)
        if np.isnan(context).all(-1).any():
            raise ValueError(f"no value in the last {length} rows of some row of history")
        mean, scale = scale_of(context)
        windows = [(context - mean) / scale]
        for name, x, ahead in (("past", past, 0), ("known", known, facts["horizon"])):
            if facts[name]:
                x = self.checked(x, facts[name], name)[..., -(length + ahead) :]
                windows.append(scaled(x, length))
            elif x is not None:
                raise ValueError(f"this capsule takes no {name} covariates")
        windows = [x.astype(np.float32) for x in windows]

        answers = []
        size = facts["batch"] or min(1 << max(rows - 1, 0).bit_length(), facts["most"])
        for start in range(0, rows, size):
            count = min(size, rows - start)
            take = np.minimum(np.arange(start, start + size), rows - 1)  # the last fills it up
            answer = self.call(self.weights, *(x[take] for x in windows))
            answers.append([np.asarray(y, np.float64)[:count] for y in answer])
        point, quantiles = (np.concatenate(parts) for parts in zip(*answers))
        point, quantiles = point * scale + mean, quantiles * scale[..., None] + mean[..., None]
        if facts["offsets"] is not None:  # errors of past forecasts, for levels beside the model's
            unit, whole = error_unit(context, facts["season"]), error_unit(history, facts["season"])
            unit = np.where(unit > 0, unit, whole)[..., None, None]
            more = point[..., None] + unit * np.asarray(facts["offsets"])
            quantiles = np.concatenate([quantiles, more], axis=-1)
        return {"point": point, "quantiles": np.sort(quantiles, axis=-1), "levels": facts["levels"]}

    def checked(self, x, width, name):
        """Check the shape of an array, and put missing steps in front of one that is too short."""
        x = np.asarray([] if x is None else x, np.float64)
        length = self.facts["context_len"] + self.facts["horizon"] * (name == "known")
        if x.ndim != 3 or x.shape[1] != width:
            raise ValueError(f"{name} is [N, {width}, time], not {list(x.shape)}")
        short = length - x.shape[-1]
        if short > 0 and not self.facts["missing_in_front"]:
            raise ValueError(f"{x.shape[-1]} rows of {name}; this capsule needs {length}")
        return np.concatenate([np.full((*x.shape[:-1], max(short, 0)), np.nan), x], axis=-1)


# As `ltsm_jax.data.windows` and `ltsm_jax.tasks.panels` have it, bit for bit.


def scale_of(x):
    """Mean and deviation [..., 1] of what is observed of x [..., T]; its size where it is still."""
    observed = ~np.isnan(x)
    known = np.where(observed, x, 0.0)
    count = np.maximum(observed.sum(-1, keepdims=True), 1)
    size = np.abs(known).max(-1, keepdims=True)
    size = np.where(size > 0, size, 1.0)
    small = known / size
    mean = small.sum(-1, keepdims=True) / count
    std = np.sqrt(np.square(np.where(observed, small - mean, 0.0)).sum(-1, keepdims=True) / count)
    return mean * size, np.where(std > 16 * np.finfo(np.float64).eps, std, 1.0) * size


def scaled(x, length):
    """Scale covariates [..., T] by their first `length` steps; what is still is only moved."""
    seen = x[..., :length]
    mean, std = scale_of(seen)
    missing = np.isnan(seen)
    low = np.where(missing, np.inf, seen).min(-1, keepdims=True)
    high = np.where(missing, -np.inf, seen).max(-1, keepdims=True)
    return (x - mean) / np.where(high > low, std, 1.0)


def error_unit(x, season):
    """Unit of errors after x [..., T]: how far it strays, and how well it repeats itself."""
    mean, scale = scale_of(x)
    z = (x - mean) / scale
    observed = ~np.isnan(z)
    count = np.maximum(observed.sum(-1), 1)
    std = np.sqrt(np.square(np.where(observed, z, 0.0)).sum(-1) / count)
    lag = season if season < z.shape[-1] else 1
    gap = np.abs(z[..., lag:] - z[..., :-lag])
    there = ~np.isnan(gap)
    repeated = np.where(there, gap, 0.0).sum(-1) / np.maximum(there.sum(-1), 1)
    repeated = np.where(there.any(-1), repeated, std)
    unit = np.where(std > 0.5, np.sqrt(std * np.maximum(repeated, 0.01 * std)), 0.0)
    return unit * scale[..., 0]


def main(path, words):
    """Forecast what comes after a CSV file."""
    capsule = Capsule(path)
    facts = capsule.facts
    if not 1 <= len(words) <= 2 or facts["past"] or facts["known"]:
        told = {name: fact for name, fact in facts.items() if name != "offsets"}
        sys.exit(f"{__doc__}\n{json.dumps(told, indent=1)}")
    with open(words[0], newline="") as file:
        header, *rows = csv.reader(file)
    columns = dict(zip(header, zip(*rows)))
    names = facts["targets"] or [name for name in header if is_numbers(columns[name])]
    series = []
    for name in names:
        series.append([float(cell or "nan") for cell in columns[name]])
    table = np.array(series)
    found = capsule.forecast(table[None] if facts["joint"] else table[:, None])
    point = found["point"].reshape(len(names), facts["horizon"])
    quantiles = found["quantiles"].reshape(*point.shape, len(found["levels"]))
    with open(words[1], "w", newline="") if len(words) > 1 else sys.stdout as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["target", "step", "predictions", *found["levels"]])
        for c, h in np.ndindex(*point.shape):
            writer.writerow([names[c], h + 1, point[c, h].item(), *quantiles[c, h].tolist()])


def is_numbers(cells):
    """Return whether all cells of a column are numbers or empty."""
    try:
        return [float(cell or "nan") for cell in cells] != []
    except ValueError:
        return False


if __name__ == "__main__":
    main(sys.argv[0], sys.argv[1:])
