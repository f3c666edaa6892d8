"""What experiments that compare methods share: flags, the recipe of a run, cells that never run twice, a folder.

A comparison is a folder: run.json (the settings; others are refused), baselines.json, results.csv (a row per finished
cell), cells/<name>/ with result.json, which is written last, and what the experiment adds.
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import numpy as np
import pandas as pd
from rich.console import Console

import ltsm_jax
from experiments import launch
from ltsm_jax import hosts, sharding, storage, training, trees
from ltsm_jax.data import Series, Splits, prepare, steps_per_epoch
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.data.splits import QUIRKS
from ltsm_jax.methods import finetune
from ltsm_jax.methods.strategies import MIXED, Strategy
from ltsm_jax.models import Model
from ltsm_jax.tasks import forecasting
from ltsm_jax.training import NonFiniteError, TrainConfig
from ltsm_jax.training.config import COMPUTE, REMAT
from ltsm_jax.training.optimizers import SCHEDULES

C = TypeVar("C", bound="Cell")
EXAMPLES = 4  # test windows whose forecasts are kept


class UsageError(ValueError):
    """Flags, files and lengths that do not work; the message lists all of them."""


# ---------------------------------------------------------------------------------------------------------------------
# flags


def list_of(kind: Callable[[str], Any], text: str, name: str) -> list:
    """The items of "a,b,c", each made by `kind`; no empty ones, none twice."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"--{name} {text!r}: an empty item; write them as a,b,c")
    values = []
    for item in items:
        try:
            values.append(kind(item))
        except ValueError:
            what = {int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"--{name}: {item!r} is not {what}") from None
    if len(set(values)) < len(values):
        raise ValueError(f"--{name} {text!r}: an item stands there twice")
    return values


def numbers(kind: Callable[[str], Any], low: float, high: float, says: str, text: str, name: str) -> list:
    """Numbers in [low, high], which `says` puts in words."""
    values = list_of(kind, text, name)
    if bad := [v for v in values if not low <= v <= high]:
        raise ValueError(f"--{name} must be {says}; got {', '.join(map(str, bad))}")
    return values


def number(kind: Callable[[str], Any], low: float, high: float, says: str, text: str, name: str) -> Any:
    """One number in [low, high]."""
    values = numbers(kind, low, high, says, text, name)
    if len(values) > 1:
        raise ValueError(f"--{name} takes one value; got {text!r}")
    return values[0]


def names(known: Sequence[str], text: str, name: str) -> list[str]:
    """Names among the `known` ones."""
    items = list_of(str, text, name)
    if unknown := [item for item in items if item not in known]:
        near = [m for item in unknown for m in difflib.get_close_matches(item, known, 1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"--{name}: unknown {', '.join(map(repr, unknown))}{hint}; known: {', '.join(known)}")
    return items


def one_of(known: Sequence[str], text: str, name: str) -> str:
    """One name among the `known` ones."""
    return names(known, text, name)[0] if "," not in text else names(known, repr(text), name)[0]


TINY = sys.float_info.min
Parser = Callable[[str, str], Any]
PARSERS: dict[str, Parser] = {
    "alpha": functools.partial(numbers, float, 0, 1, "between 0 and 1, the weight of the pretrained side"),
    "seeds": functools.partial(numbers, int, 0, 2**32 - 1, "between 0 and 2**32 - 1"),
    "horizon": functools.partial(number, int, 1, math.inf, "at least 1"),
    "context": functools.partial(number, int, 1, math.inf, "at least 1"),
    "epochs": functools.partial(number, int, 1, math.inf, "at least 1"),
    "batch-size": functools.partial(number, int, 1, math.inf, "at least 1"),
    "lr": functools.partial(number, float, TINY, sys.float_info.max, "positive"),
    "few-shot": functools.partial(number, float, TINY, 1, "a share above 0 and at most 1"),
    "accumulate": functools.partial(number, int, 1, math.inf, "at least 1"),
    "num-processes": functools.partial(number, int, 1, math.inf, "at least 1"),
    "process-id": functools.partial(number, int, 0, math.inf, "at least 0"),
    "compute": functools.partial(one_of, COMPUTE),
    "remat": functools.partial(one_of, tuple(REMAT)),
    "mode": functools.partial(one_of, finetune.MODES),
    "schedule": functools.partial(one_of, tuple(SCHEDULES)),
    "quirks": functools.partial(names, tuple(sorted(QUIRKS))),
    "missing": functools.partial(one_of, ("error", "interpolate")),
    "irregular": functools.partial(one_of, ("error", "regularise", "ignore")),
    "target": functools.partial(list_of, str),
}
FLAGS = {  # what --help says; an experiment puts its own beside them
    "data": "benchmark name ($LTSM_DATA, cache or download) or a .csv, .csv.gz or .parquet file [ETTh1]",
    "model": "shipped name, model folder, original checkpoint, or hub name owner/name[@revision] [timer-tiny]",
    "head": "put a fresh, untrained head of this name on the model (Model.heads) [the checkpoint's own]",
    "methods": "what to compare",
    "alpha": "weight(s) of the pretrained side, for the methods that mix [0.7]",
    "seeds": "[0,1,2]",
    "horizon": "steps to forecast [the model's recipe, as for all that follow without a default]",
    "out": "folder of the results [runs/<experiment>-<data>-<model>]",
    "context": "steps the model sees",
    "mode": "training loss: ims (next token) or direct (the forecast only)",
    "epochs": "",
    "batch-size": "windows per step",
    "lr": "",
    "schedule": f"of {', '.join(SCHEDULES)}",
    "few-shot": "share of the training windows [1]",
    "quirks": f"released behaviours to follow, of {','.join(sorted(QUIRKS))}",
    "target": "column(s) of a table to use [all]",
    "time": "time column of a table [found by name]",
    "missing": "error or interpolate [error]",
    "irregular": "error, regularise or ignore [a benchmark: its rows as they are; else error]",
    **launch.FLAGS,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, checked one by one; None is "as the model's recipe has it"."""

    program: ClassVar[str]  # what `python -m` runs
    data: str = "ETTh1"
    model: str = "timer-tiny"
    head: str | None = None
    methods: tuple[str, ...] = ()
    alpha: tuple[float, ...] = (0.7,)
    seeds: tuple[int, ...] = (0, 1, 2)
    horizon: int | None = None
    out: str | None = None
    context: int | None = None
    mode: finetune.Mode | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    schedule: str | None = None
    few_shot: float = 1.0
    quirks: tuple[str, ...] = ()
    target: tuple[str, ...] | None = None
    time: str | None = None
    missing: str = "error"
    irregular: str | None = None
    mesh: str | None = None
    compute: str | None = None
    accumulate: int | None = None
    remat: str | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    plan: bool = False

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        names = (Path(name).name.split(".")[0] for name in (self.data, self.model))
        return Path(self.out or f"runs/{'-'.join((self.program.split('.')[-1], *names))}")

    @property
    def tunings(self) -> tuple[tuple[str, float | None], ...]:
        """(method, alpha) of every kind of run; alpha None where a method has none."""
        return tuple((m, alpha) for m in self.methods for alpha in (self.alpha if m in MIXED else (None,)))

    def command(self) -> str:
        """The command line that asks for these options; defaults are left out, but for the names of data and model."""
        parts = ["python", "-m", self.program]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in launch.PLACE:
                continue
            if field.name in ("data", "model", "out") or value != field.default:
                value = str(self.folder) if field.name == "out" else value
                text = (
                    ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
                    if isinstance(value, tuple)
                    else str(value)
                )
                parts += [f"--{field.name.replace('_', '-')}", *([] if value is True else [text])]
        return shlex.join(parts)


def read_flags(
    program: str,
    doc: str | None,
    argv: Sequence[str],
    flags: Mapping[str, str],
    parsers: Mapping[str, Parser],
    switches: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The flags that were given, as fields of `Options`, and everything that is wrong with them.

    flags: what --help says of each. parsers: for those that are more than text. switches: flags without a value.
    """
    parser = argparse.ArgumentParser(f"python -m {program}", description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, text in flags.items():
        parser.add_argument(f"--{name}", metavar="", help=text)
    for name, text in {**(switches or {}), "plan": "print what would run, and stop"}.items():
        parser.add_argument(f"--{name}", action="store_true", default=None, help=text)
    given, unknown = parser.parse_known_args(argv)
    known_flags = [option for action in parser._actions for option in action.option_strings]
    problems, values = [], {}
    for item in unknown:
        near = difflib.get_close_matches(item.split("=")[0], known_flags, 1)
        problems.append(f"unknown argument {item!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    for field, value in vars(given).items():
        if value is None:
            continue
        name = field.replace("_", "-")
        try:
            value = parsers[name](value, name) if name in parsers else value
        except ValueError as err:
            problems.append(str(err))
            continue
        values[field] = tuple(value) if isinstance(value, list) else value
    return values, problems


def alpha_problems(values: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    """What is wrong with an alpha that was given, if any; methods: the default ones."""
    if "alpha" not in values or set(values.get("methods", methods)) & set(MIXED):
        return []
    return [f"--alpha is for {' and '.join(MIXED)}, and neither is among --methods"]


# ---------------------------------------------------------------------------------------------------------------------
# what will run


class Cell(Protocol):
    """One run of a comparison."""

    @property
    def seed(self) -> int:
        """Of all its randomness."""
        ...

    @property
    def name(self) -> str:
        """Its folder."""
        ...

    @property
    def label(self) -> str:
        """It in words, for the terminal."""
        ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a cell needs, resolved and checked."""

    options: Any
    model: Model
    params: Any
    splits: Splits
    config: TrainConfig
    mode: finetune.Mode
    settings: dict[str, Any]  # what decides every number; a folder holds one set of settings

    @property
    def folder(self) -> Path:
        """Where it all goes."""
        return self.options.folder


def resolve(options: Options) -> Comparison:
    """Load model and data, fill in the model's recipe, and try one batch without computing it. Every host for itself.

    Raises: UsageError listing everything that does not work.
    """
    problems: list[str] = []

    def attempt(f, *args, **kwargs):
        try:
            return f(*args, **kwargs)
        except (ValueError, OSError) as err:
            problems.append(str(err))
            return None

    read = {"target": list(options.target) if options.target else None, "time": options.time}
    read |= {"missing": options.missing}
    read |= {"irregular": options.irregular} if options.irregular else {}  # benchmarks have a default of their own
    series = attempt(load_series, options.data, **read)
    loaded = attempt(ltsm_jax.load, options.model)
    if loaded is None or series is None:
        raise UsageError("\n".join(problems))
    model, params = loaded
    if options.head:
        sizes = {} if options.horizon is None else {"horizon": options.horizon}
        key = training.keys(min(options.seeds))["init"]
        loaded = attempt(lambda: model.with_head(params, options.head or "", key, **sizes))
    loaded = loaded and attempt(finetune.ready_for, *loaded, series)
    if loaded is None:
        raise UsageError("\n".join(problems))
    model, params = loaded
    sha256 = storage.sha256_of(params)[:16]  # before they are split
    mesh = attempt(sharding.make_mesh, options.mesh)
    if mesh is not None:
        params, notes = sharding.shard(params, model.shard_rules, mesh)
        for note in notes if hosts.first() else ():
            print(note, file=sys.stderr)
    recipe = model.recipe()
    context, horizon = options.context or recipe.context_len, options.horizon or recipe.horizon
    mode = options.mode or finetune.default_mode(model)
    names = ("epochs", "batch_size", "lr", "schedule", "compute", "accumulate", "remat")
    changes = {k: getattr(options, k) for k in names if getattr(options, k) is not None}
    config = finetune.train_config(model, **changes)
    quirks = tuple(q for q in options.quirks if q in QUIRKS)
    splits = attempt(prepare, series, context, horizon, few_shot=options.few_shot, quirks=quirks,
                     joint=model.variates == "joint")  # fmt: skip
    if splits is not None:
        attempt(_try_batch, model, params, splits, mode)
    if splits is None or problems:
        raise UsageError("\n".join(problems))
    settings = {
        "data": series.name,
        "model": Path(options.model).name if os.sep in options.model else options.model,
        "head": options.head,
        "context": context,
        "horizon": horizon,
        "mode": mode,
        "few_shot": options.few_shot,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "schedule": config.schedule,
        "compute": None if config.compute == "float32" else config.compute,
        "accumulate": None if config.accumulate == 1 else config.accumulate,
        "remat": None if config.remat == "none" else config.remat,
        "quirks": ",".join(sorted(options.quirks)) or None,
        **_facts(series),
        "model_sha256": sha256,
    }
    return Comparison(options, model, params, splits, config, mode, settings)


def _facts(series: Series) -> dict[str, Any]:
    more = f" and {series.n_variates - 8} more" if series.n_variates > 8 else ""
    return {
        "columns": ", ".join(series.columns[:8]) + more,
        "rows": series.n_rows,
        "data_sha256": hashlib.sha256(np.ascontiguousarray(series.values).tobytes()).hexdigest()[:16],
    }


def _try_batch(model: Model, params: Any, splits: Splits, mode: finetune.Mode) -> None:
    """Shapes only: what model, context, horizon and mode have to say about each other, before anything is compiled."""
    loss = forecasting.loss_fn(model, finetune.LOSS[mode])
    windows = finetune.training_windows(model, splits, mode)
    indices, key = np.zeros(1, np.int32), jax.random.key(0)
    jax.eval_shape(lambda p, w: loss(p, w.gather(indices), key, True), params, windows)
    jax.eval_shape(lambda p, w: model.predict(p, w.gather(indices)["context"], w.horizon), params, splits.val)


def finished(c: Comparison, cells: Iterable[Cell]) -> int:
    """How many of the cells have a result."""
    return sum(result_file(c, cell).is_file() for cell in cells)


def plan(c: Comparison, runs: Sequence[str]) -> str:
    """What will run, in words; `runs` are the lines that the experiment has to say on it."""
    series, windows = c.splits.series, finetune.training_windows(c.model, c.splits, c.mode)
    batch = min(c.config.batch_size, windows.n)
    steps = steps_per_epoch(windows.n, batch)
    stamps = series.timestamps
    span = "" if stamps is None else f", {str(stamps[0])[:16]} to {str(stamps[-1])[:16]}"
    borders = "; ".join(
        f"{p} rows {getattr(c.splits.borders, p)[0]}-{getattr(c.splits.borders, p)[1]}"
        for p in ("train", "val", "test")
    )
    lines = [
        f"data     {series.name}: {series.n_rows:,} rows x {series.n_variates} columns ({c.settings['columns']}), "
        f"step {series.freq or 'unknown'}{span}",
        f"split    {borders}" + (f"; quirks {c.settings['quirks']}" if c.settings["quirks"] else ""),
        f"windows  {c.settings['context']} -> {c.settings['horizon']}: {windows.n:,} to train, "
        f"{c.splits.val.n:,} to validate, {c.splits.test.n:,} to test"
        + (f" (few-shot {c.options.few_shot:g})" if c.options.few_shot != 1 else ""),
        f"model    {c.settings['model']}: {c.model.family}, {trees.count(c.params):,} parameters",
        f"training {c.mode}, {c.config.epochs} epochs of {steps} steps of {batch} windows, "
        f"lr {c.config.lr:g}, schedule {c.config.schedule}",
        f"memory   about {_megabytes(c):,.0f} MB of weights, optimiser state and data; activations come on top",
        *runs,
        f"results  {c.folder}",
    ]
    return "\n".join(lines + [f"note     {note}" for note in c.splits.notes])


def _megabytes(c: Comparison) -> float:
    # pretrained, trained, best, gradient, two moments
    return (6 * sum(p.nbytes for p in jax.tree.leaves(c.params)) + c.splits.val.values.nbytes) / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# running it


def run_cells(
    c: Comparison,
    cells: Sequence[C],
    run_cell: Callable[[C], dict[str, Any]],
    rank: Callable[[dict[str, Any]], Any],
    console: Console,
    place: tuple[int, int] | None = None,
) -> list[str]:
    """Run every cell that has no result yet; after each, results.csv is whole, its rows in the order of `rank`.

    run_cell: leaves the cell's result.json and gives its row of results.csv. place: number of the first cell, and how
    many there are, for the terminal.
    Returns: what failed (a run that diverged does not stop the others), one line each.
    """
    first, total = place or (1, len(cells))
    failures = []
    console = console if hosts.first() else Console(quiet=True)
    for i, cell in enumerate(cells, first):
        text = f"[{i}/{total}] {cell.label}"
        hosts.stop_if_asked(f"stopped by SIGTERM before {text}")
        if hosts.on_first(result_file(c, cell).is_file):
            console.print(f"{text}: finished before", highlight=False, markup=False)
        else:
            try:
                row = run_cell(cell)
            except NonFiniteError as err:
                failures.append(f"{text}: {err}")
                console.print(failures[-1], highlight=False, markup=False, style="red")
                continue
            text += f": val MSE {row['val_mse']:.4f}, test MSE {row['test_mse']:.4f}, {row['seconds']:.1f} s"
            console.print(text, highlight=False, markup=False)
        write_csv(c, rank)
    return failures


def tune(c: Comparison, cell: Cell, chosen: Strategy, **rest: Any) -> finetune.Result:
    """Run the strategy of a cell, or go on with it.

    rest: `model` and `params` in place of the comparison's, and what else `finetune.run` takes.
    """
    model, params = rest.pop("model", c.model), rest.pop("params", c.params)
    return finetune.run(model, params, chosen, c.splits, seed=cell.seed, config=c.config, mode=c.mode, test=False,
                        folder=c.folder / "cells" / cell.name / "training", label=cell.label, **rest)  # fmt: skip


def row_of(c: Comparison, columns: dict[str, Any], model: Model, result: finetune.Result) -> dict[str, Any]:
    """The row of a run in results.csv. columns: what tells its cell from the others."""
    season = c.splits.series.season
    scale = c.splits.naive_scale(season) if season > 1 else None
    test = forecasting.evaluate(model, result.params, c.splits.test, naive_scale=scale)
    return {
        "data": c.settings["data"],
        "model": c.settings["model"],
        **columns,
        "horizon": c.settings["horizon"],
        "val_mse": result.val["mse"],
        "val_mae": result.val["mae"],
        "test_mse": test["mse"],
        "test_mae": test["mae"],
        "epochs": result.epochs,
        "seconds": round(result.seconds, 3),
        "windows": test["windows"],
        "val_rmse": result.val["rmse"],
        "val_mape": result.val["mape"],
        "test_rmse": test["rmse"],
        "test_mape": test["mape"],
        "test_mase": test.get("mase"),
        "best_epoch": result.best_epoch,
        "last_val_mse": result.history[-1]["val_mse"] if result.history else result.val["mse"],
        "mode": c.mode,
        "quirks": c.settings["quirks"],
        "context": c.settings["context"],
        "lr": c.config.lr,
        "batch_size": c.config.batch_size,
        "schedule": c.config.schedule,
        "few_shot": c.options.few_shot,
        "train_windows": finetune.training_windows(c.model, c.splits, c.mode).n,
        "val_windows": result.val["windows"],
        "trained_parameters": result.trained,
        "git_commit": git_commit(),
        "versions": versions(),
        "device": device(),
    }


def keep(
    c: Comparison,
    cell: Cell,
    final: tuple[Model, Any],
    row: dict[str, Any],
    result: finetune.Result,
    shown: tuple[Model, Any] | None = None,
    **more: Any,
) -> None:
    """Put a finished cell into its folder: example forecasts, the model where it is a new one, and last result.json.

    On several hosts all call; the first writes.

    final: model and params to keep. shown: those that forecast the examples, where they are others. more: further
    entries of result.json.
    """
    folder = c.folder / "cells" / cell.name
    hosts.on_first(folder.mkdir, exist_ok=True)
    write_examples(c, *(shown or final), folder / "forecasts.npz")
    if final[1] is not c.params:
        made = {"source": c.settings["model"], "method": cell.name, "command": c.options.command()}
        made["git_commit"] = row["git_commit"]
        if final[0] != c.model:  # parts were removed: an export needs to know from what
            made["pruned_from"] = c.model.config_to_dict()
        ltsm_jax.save(folder / "model", *final, provenance=made, overwrite=True)
    record = {"row": row, "history": result.history, "warnings": list(result.warnings)}

    def finish() -> None:
        write_json(folder / "result.json", record | more)
        for checkpoints in folder.glob("training/phase-*/checkpoints"):  # model/ has the weights; metrics.jsonl stays
            shutil.rmtree(checkpoints, ignore_errors=True)

    hosts.on_first(finish)


def take_over(c: Comparison, cell: Cell, twin: Path) -> dict[str, Any]:
    """Give a cell the result of another one that differs in its seed alone, where that has no say. Returns: its row."""
    folder = c.folder / "cells" / cell.name

    def copy() -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(twin / "forecasts.npz", folder / "forecasts.npz")
        stored = json.loads((twin / "result.json").read_text())
        stored["row"]["seed"] = cell.seed
        write_json(folder / "result.json", stored)
        return stored["row"]

    return hosts.on_first(copy)


def twin_of(c: Comparison, pattern: str) -> Path | None:
    """The folder of the first finished cell whose name fits the pattern."""
    found = hosts.on_first(lambda: [str(file) for file in sorted((c.folder / "cells").glob(f"{pattern}/result.json"))])
    return Path(found[0]).parent if found else None


def baselines(splits: Splits) -> list[dict[str, Any]]:
    """Scores of last value and, where the step has a season, seasonal naive, on the same windows."""
    naive = {"last_value": forecasting.SeasonalNaive(1)}
    if splits.series.season > 1:
        naive["seasonal_naive"] = forecasting.SeasonalNaive(splits.series.season)
    found = []
    for name, predictor in naive.items():
        val, test = (forecasting.evaluate(predictor, {}, part) for part in (splits.val, splits.test))
        scores = {f"{part}_{k}": score[k] for part, score in (("val", val), ("test", test)) for k in ("mse", "mae")}
        found.append({"method": name, "season": predictor.season} | scores)
    return found


def write_examples(c: Comparison, model: Model, params: Any, path: Path) -> None:
    """Forecasts of a few test windows at fixed places of the split, in data units."""
    windows = c.splits.test
    n = min(EXAMPLES, windows.n)
    indices = ((np.arange(n) + 0.5) * windows.n / n).astype(np.int32)
    labels, shown = [], {"context": [], "target": [], "point": []}
    found = dict(zip(shown, finetune.forecast_windows(model, params, windows, indices), strict=True))
    for k, i in enumerate(indices):
        where = windows.describe(int(i))
        variate = where["variate"] or 0  # the first one where a window holds all
        for name, values in found.items():
            mean, std = c.splits.scaler.mean[variate], c.splits.scaler.std[variate]
            shown[name].append(values[k, 0] * std + mean)
        when = where.get("target_first", f"row {where['target_start']}")
        labels.append(f"{c.splits.columns[variate]}, {when[:16]}")
    arrays: dict[str, Any] = {name: np.stack(values) for name, values in shown.items()}
    hosts.on_first(np.savez, path, label=np.array(labels), **arrays)


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def result_file(c: Comparison, cell: Cell) -> Path:
    """What a finished cell has, and no other."""
    return c.folder / "cells" / cell.name / "result.json"


def settle(c: Comparison, optional: Sequence[str] = ()) -> None:
    """Make the folder, write run.json and baselines.json, or check that the run.json there asks for the same.

    optional: settings that may be None on one of the two sides, where no cell needs them.
    Raises: UsageError when the folder holds a comparison with other settings.
    """
    hosts.on_first(_settle, c, optional)


def _settle(c: Comparison, optional: Sequence[str]) -> None:
    (c.folder / "cells").mkdir(parents=True, exist_ok=True)
    file = c.folder / "run.json"
    record = {"settings": dict(c.settings), "command": c.options.command(), "notes": list(c.splits.notes)}
    record["windows"] = {"val": c.splits.val.n, "test": c.splits.test.n}
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
                f"{c.folder} holds a comparison with other settings; take another --out:\n" + "\n".join(lines)
            )
    write_json(file, record)
    if not (c.folder / "baselines.json").is_file():
        write_json(c.folder / "baselines.json", baselines(c.splits))


def write_csv(c: Comparison, rank: Callable[[dict[str, Any]], Any]) -> None:
    """results.csv from every finished cell in the folder, those of earlier commands included."""

    def write() -> None:
        rows = [json.loads(file.read_text())["row"] for file in (c.folder / "cells").glob("*/result.json")]
        temporary = c.folder / ".results.csv"
        pd.DataFrame(sorted(rows, key=rank)).to_csv(temporary, index=False)
        os.replace(temporary, c.folder / "results.csv")

    hosts.on_first(write)


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


def run(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Any],
    resolve: Callable[[Any], Comparison],
    plan: Callable[[Comparison], str],
    compare: Callable[[Comparison], list[str]],
    finish: Callable[[Path], None],
) -> int:
    """An experiment from its flags to its report, on one host or several; returns its exit code (`launch.guarded`).

    parse, resolve, plan: flags to options, to a `Comparison`, to words. compare: runs the cells and says what failed.
    finish: prints the table and writes the report of a folder that has results.
    """

    def work() -> int:
        options = parse(sys.argv[1:] if argv is None else argv)
        with launch.started(options):
            c = hosts.together(resolve, options)
            launch.say(plan(c))
            if options.plan:
                return 0
            failures = compare(c)
            if not hosts.on_first((c.folder / "results.csv").is_file):
                return 1
            if hosts.first():
                finish(c.folder)
                for failure in failures:
                    print(f"failed: {failure}", file=sys.stderr)
            return 1 if failures else 0

    return launch.guarded(work)
