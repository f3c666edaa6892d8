"""Does Smoothed Full Fine-tuning beat its rivals?  One model, one data set, every method through the same code.

Run:    python -m experiments.sff --data ETTh1 --model timer-tiny --methods zero_shot,ff,tfs,sff,lp,lpff --alpha 0.7 \\
            --seeds 0,1,2 --horizon 96 --out runs/sff-etth1
        python -m experiments.sff --data ETTh1 --model timer-tiny --alpha 0.3,0.5,0.7,0.9 --out runs/sff-alpha
        python -m experiments.sff --data my.csv --target sales --horizon 48 --out runs/mine
Gives:  a table on the terminal and, in the folder of --out: results.csv (a row per method, alpha and seed), report.md
        with pictures, and cells/<method>-seed<n>/ with the tuned model, its training history and example forecasts.
        The same command again continues where the last one stopped; finished cells are not run again.
Differs from the released script (Meteor-Stars/SFF): the next-token loss is the default (--mode direct is theirs), the
        best-validation weights are restored, tfs and sff share one random model, borders of ETTm1 and PEMS and the
        few-shot subset are correct (--quirks etm1_typo,pems_ratio,few_shot_stride for theirs).
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
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from rich.console import Console

import ltsm_jax
from experiments import report
from experiments.report import cell_name
from ltsm_jax import sharding, storage, training, trees
from ltsm_jax.data import Splits, prepare, steps_per_epoch
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.data.splits import QUIRKS
from ltsm_jax.methods import finetune
from ltsm_jax.methods.strategies import MIXED, STRATEGIES, strategy
from ltsm_jax.models import Model
from ltsm_jax.tasks import forecasting
from ltsm_jax.training import NonFiniteError, TrainConfig
from ltsm_jax.training.loop import COMPUTE
from ltsm_jax.training.optimizers import SCHEDULES

EXAMPLES = 4  # test windows shown in the report
METHODS = "zero_shot,ff,tfs,sff,lp,lpff"


class UsageError(ValueError):
    """Flags, files and lengths that do not work; the message lists all of them."""


# ---------------------------------------------------------------------------------------------------------------------
# flags


def _list_of(kind: Callable[[str], Any], text: str, name: str) -> list:
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


def _numbers(kind: Callable[[str], Any], low: float, high: float, says: str, text: str, name: str) -> list:
    values = _list_of(kind, text, name)
    if bad := [v for v in values if not low <= v <= high]:
        raise ValueError(f"--{name} must be {says}; got {', '.join(map(str, bad))}")
    return values


def _number(kind: Callable[[str], Any], low: float, high: float, says: str, text: str, name: str) -> Any:
    values = _numbers(kind, low, high, says, text, name)
    if len(values) > 1:
        raise ValueError(f"--{name} takes one value; got {text!r}")
    return values[0]


def _names(known: Sequence[str], text: str, name: str) -> list[str]:
    items = _list_of(str, text, name)
    if unknown := [item for item in items if item not in known]:
        near = [m for item in unknown for m in difflib.get_close_matches(item, known, 1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"--{name}: unknown {', '.join(map(repr, unknown))}{hint}; known: {', '.join(known)}")
    return items


def _one_of(known: Sequence[str], text: str, name: str) -> str:
    return _names(known, text, name)[0] if "," not in text else _names(known, repr(text), name)[0]


TINY = sys.float_info.min
_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "methods": functools.partial(_names, tuple(STRATEGIES)),
    "alpha": functools.partial(_numbers, float, 0, 1, "between 0 and 1, the weight of the pretrained side"),
    "seeds": functools.partial(_numbers, int, 0, 2**32 - 1, "between 0 and 2**32 - 1"),
    "horizon": functools.partial(_number, int, 1, math.inf, "at least 1"),
    "context": functools.partial(_number, int, 1, math.inf, "at least 1"),
    "epochs": functools.partial(_number, int, 1, math.inf, "at least 1"),
    "batch-size": functools.partial(_number, int, 1, math.inf, "at least 1"),
    "lr": functools.partial(_number, float, TINY, sys.float_info.max, "positive"),
    "few-shot": functools.partial(_number, float, TINY, 1, "a share above 0 and at most 1"),
    "l2sp-weight": functools.partial(_number, float, TINY, sys.float_info.max, "positive"),
    "accumulate": functools.partial(_number, int, 1, math.inf, "at least 1"),
    "compute": functools.partial(_one_of, COMPUTE),
    "mode": functools.partial(_one_of, finetune.MODES),
    "schedule": functools.partial(_one_of, tuple(SCHEDULES)),
    "quirks": functools.partial(_names, tuple(sorted(QUIRKS))),
    "missing": functools.partial(_one_of, ("error", "interpolate")),
    "irregular": functools.partial(_one_of, ("error", "regularise", "ignore")),
    "target": functools.partial(_list_of, str),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, checked one by one; None is "as the model's recipe has it"."""

    data: str = "ETTh1"
    model: str = "timer-tiny"
    head: str | None = None
    methods: tuple[str, ...] = tuple(METHODS.split(","))
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
    l2sp_weight: float = 0.1
    target: tuple[str, ...] | None = None
    time: str | None = None
    missing: str = "error"
    irregular: str = "error"
    mesh: str | None = None
    compute: str | None = None
    accumulate: int | None = None
    plan: bool = False

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        return Path(self.out or f"runs/sff-{Path(self.data).name.split('.')[0]}-{Path(self.model).name.split('.')[0]}")


def parse(argv: Sequence[str]) -> Options:
    """Flags to options. Raises: UsageError listing every bad flag."""
    parser = argparse.ArgumentParser("python -m experiments.sff", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    flag = functools.partial(parser.add_argument, metavar="")
    flag("--data", help="benchmark name ($LTSM_DATA, cache or download) or a .csv, .csv.gz or .parquet file [ETTh1]")
    flag(
        "--model",
        help="shipped name, model folder, original checkpoint, or hub name owner/name[@revision] [timer-tiny]",
    )
    flag("--head", help="put a fresh, untrained head of this name on the model (Model.heads) [the checkpoint's own]")
    flag("--methods", help=f"of {','.join(STRATEGIES)} [{METHODS}]")
    flag("--alpha", help="weight(s) of the pretrained side, for sff and noise [0.7]")
    flag("--seeds", help="[0,1,2]")
    flag("--horizon", help="steps to forecast [the model's recipe, as for all that follow without a default]")
    flag("--out", help="folder of the results [runs/sff-<data>-<model>]")
    flag("--context", help="steps the model sees")
    flag("--mode", help="training loss: ims (next token) or direct (the forecast only)")
    flag("--epochs")
    flag("--batch-size", help="windows per step")
    flag("--lr")
    flag("--schedule", help=f"of {', '.join(SCHEDULES)}")
    flag("--few-shot", help="share of the training windows [1]")
    flag("--quirks", help=f"released behaviours to follow, of {','.join(sorted(QUIRKS))}")
    flag("--l2sp-weight", help="of the l2sp penalty [0.1]")
    flag("--target", help="column(s) of a table to use [all]")
    flag("--time", help="time column of a table [found by name]")
    flag("--missing", help="error or interpolate [error]")
    flag("--irregular", help="error, regularise or ignore [error]")
    flag("--mesh", help="devices by axis, as data=4,fsdp=2,tensor=1 [all on data]")
    flag("--compute", help="dtype of the matrix products in training: float32 or bfloat16 [float32]")
    flag("--accumulate", help="parts a batch is taken in, for less memory [1]")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
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
            value = _PARSERS[name](value, name) if name in _PARSERS else value
        except ValueError as err:
            problems.append(str(err))
            continue
        values[field] = tuple(value) if isinstance(value, list) else value
    if "alpha" in values and not set(values.get("methods", METHODS.split(","))) & set(MIXED):
        problems.append(f"--alpha is for {' and '.join(MIXED)}, and neither is among --methods")
    if problems:
        raise UsageError("\n".join(problems))
    return Options(**values)


# ---------------------------------------------------------------------------------------------------------------------
# what will run


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method, its alpha where it has one, and a seed."""

    method: str
    alpha: float | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return cell_name(self.method, self.alpha, self.seed)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a cell needs, resolved and checked."""

    options: Options
    model: Model
    params: Any
    splits: Splits
    config: TrainConfig
    mode: finetune.Mode
    settings: dict[str, Any]  # what decides every number; a folder holds one set of settings
    cells: tuple[Cell, ...]

    @property
    def folder(self) -> Path:
        """Where it all goes."""
        return self.options.folder


def resolve(options: Options) -> Comparison:
    """Load model and data, fill in the model's recipe, and try one batch without computing it.

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
    read |= {"missing": options.missing, "irregular": options.irregular}
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
    mesh = attempt(sharding.make_mesh, options.mesh)
    if mesh is not None:
        params, notes = sharding.shard(params, model.shard_rules, mesh)
        for note in notes:
            print(note, file=sys.stderr)
    recipe = model.recipe()
    context, horizon = options.context or recipe.context_len, options.horizon or recipe.horizon
    mode = options.mode or finetune.default_mode(model)
    names = ("epochs", "batch_size", "lr", "schedule", "compute", "accumulate")
    changes = {k: getattr(options, k) for k in names if getattr(options, k) is not None}
    config = finetune.train_config(model, **changes)
    splits = attempt(prepare, series, context, horizon, few_shot=options.few_shot, quirks=options.quirks,
                     joint=model.variates == "joint")  # fmt: skip
    if splits is not None:
        attempt(_try_batch, model, params, splits, mode)
    if splits is None or problems:
        raise UsageError("\n".join(problems))
    cells = [
        Cell(method, alpha, seed)
        for method in options.methods
        for alpha in (options.alpha if method in MIXED else (None,))
        for seed in options.seeds
    ]
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
        "quirks": ",".join(sorted(options.quirks)) or None,
        "l2sp_weight": options.l2sp_weight if "l2sp" in options.methods else None,
        "columns": ", ".join(series.columns[:8])
        + (f" and {series.n_variates - 8} more" if series.n_variates > 8 else ""),
        "rows": series.n_rows,
        "data_sha256": hashlib.sha256(np.ascontiguousarray(series.values).tobytes()).hexdigest()[:16],
        "model_sha256": hashlib.sha256(json.dumps(storage.digests(params)).encode()).hexdigest()[:16],
    }
    return Comparison(options, model, params, splits, config, mode, settings, tuple(cells))


def _try_batch(model: Model, params: Any, splits: Splits, mode: finetune.Mode) -> None:
    """Shapes only: what model, context, horizon and mode have to say about each other, before anything is compiled."""
    loss = forecasting.loss_fn(model, finetune.LOSS[mode])
    windows = finetune.training_windows(model, splits, mode)
    indices, key = np.zeros(1, np.int32), jax.random.key(0)
    jax.eval_shape(lambda p, w: loss(p, w.gather(indices), key, True), params, windows)
    jax.eval_shape(lambda p, w: model.predict(p, w.gather(indices)["context"], w.horizon), params, splits.val)


def plan(c: Comparison) -> str:
    """What will run, in words."""
    series, windows = c.splits.series, finetune.training_windows(c.model, c.splits, c.mode)
    batch = min(c.config.batch_size, windows.n)
    steps = steps_per_epoch(windows.n, batch)
    done = sum((c.folder / "cells" / cell.name / "result.json").is_file() for cell in c.cells)
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
        f"runs     {len(c.cells)}: {', '.join(c.options.methods)} x seeds {', '.join(map(str, c.options.seeds))}"
        + (f"; {done} finished already" if done else ""),
        f"results  {c.folder}",
    ]
    return "\n".join(lines + [f"note     {note}" for note in c.splits.notes])


def _megabytes(c: Comparison) -> float:
    # pretrained, trained, best, gradient, two moments
    return (6 * sum(p.nbytes for p in jax.tree.leaves(c.params)) + c.splits.val.values.nbytes) / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# running it


def compare(c: Comparison, console: Console | None = None) -> list[str]:
    """Run every cell that has no result yet; after each, results.csv is whole. Then the report.

    Returns: what failed (a run that diverged does not stop the others), one line each.
    Raises: UsageError when the folder holds a comparison with other settings.
    """
    console = console or Console()
    (c.folder / "cells").mkdir(parents=True, exist_ok=True)
    _settle(c)
    if not (c.folder / "baselines.json").is_file():
        _write_json(c.folder / "baselines.json", baselines(c.splits))
    failures = []
    for i, cell in enumerate(c.cells):
        place = f"[{i + 1}/{len(c.cells)}] {report.label(cell.method, cell.alpha)}, seed {cell.seed}"
        file = c.folder / "cells" / cell.name / "result.json"
        if file.is_file():
            console.print(f"{place}: finished before", highlight=False, markup=False)
        else:
            try:
                row = run_cell(c, cell)
            except NonFiniteError as err:
                failures.append(f"{place}: {err}")
                console.print(failures[-1], highlight=False, markup=False, style="red")
                continue
            text = f"{place}: val MSE {row['val_mse']:.4f}, test MSE {row['test_mse']:.4f}, {row['seconds']:.1f} s"
            console.print(text, highlight=False, markup=False)
        _write_csv(c)
    return failures


def run_cell(c: Comparison, cell: Cell) -> dict[str, Any]:
    """Run one cell, or go on with it; result.json comes last, so a cell with one is whole.

    Returns: its row of results.csv.
    """
    folder = c.folder / "cells" / cell.name
    folder.mkdir(exist_ok=True)
    if cell.method == "zero_shot" and (twin := _same_zero_shot(c)):  # a checkpoint has no seed: score it once
        shutil.copyfile(twin / "forecasts.npz", folder / "forecasts.npz")
        stored = json.loads((twin / "result.json").read_text())
        stored["row"]["seed"] = cell.seed
        _write_json(folder / "result.json", stored)
        return stored["row"]
    chosen = strategy(cell.method, alpha=cell.alpha or 0.0, l2_sp=c.options.l2sp_weight)
    label = f"{report.label(cell.method, cell.alpha)}, seed {cell.seed}"
    result = finetune.run(c.model, c.params, chosen, c.splits, seed=cell.seed, config=c.config, mode=c.mode, test=False,
                          folder=folder / "training", label=label)  # fmt: skip
    season = c.splits.series.season
    scale = c.splits.naive_scale(season) if season > 1 else None
    test = forecasting.evaluate(c.model, result.params, c.splits.test, naive_scale=scale)
    row = {
        "data": c.settings["data"],
        "model": c.settings["model"],
        "method": cell.method,
        "alpha": cell.alpha,
        "seed": cell.seed,
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
        "l2sp_weight": c.options.l2sp_weight if cell.method == "l2sp" else None,
        "train_windows": finetune.training_windows(c.model, c.splits, c.mode).n,
        "val_windows": result.val["windows"],
        "trained_parameters": result.trained,
        "git_commit": git_commit(),
        "versions": versions(),
        "device": device(),
    }
    _write_examples(c, result.params, folder / "forecasts.npz")
    if chosen.phases:
        made = {
            "source": c.settings["model"],
            "method": cell.name,
            "command": _command(c.options),
            "git_commit": row["git_commit"],
        }
        ltsm_jax.save(folder / "model", c.model, result.params, provenance=made, overwrite=True)
    _write_json(folder / "result.json", {"row": row, "history": result.history, "warnings": list(result.warnings)})
    for checkpoints in folder.glob("training/phase-*/checkpoints"):  # model/ has the weights; metrics.jsonl stays
        shutil.rmtree(checkpoints, ignore_errors=True)
    return row


def _same_zero_shot(c: Comparison) -> Path | None:
    return next((f.parent for f in sorted((c.folder / "cells").glob("zero_shot-seed*/result.json"))), None)


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


def _write_examples(c: Comparison, params: Any, path: Path) -> None:
    """Forecasts of a few test windows at fixed places of the split, in data units."""
    windows = c.splits.test
    n = min(EXAMPLES, windows.n)
    indices = ((np.arange(n) + 0.5) * windows.n / n).astype(np.int32)
    labels, shown = [], {"context": [], "target": [], "point": []}
    found = dict(zip(shown, finetune.forecast_windows(c.model, params, windows, indices), strict=True))
    for k, i in enumerate(indices):
        where = windows.describe(int(i))
        variate = where["variate"] or 0  # the first one where a window holds all
        for name, values in found.items():
            mean, std = c.splits.scaler.mean[variate], c.splits.scaler.std[variate]
            shown[name].append(values[k, 0] * std + mean)
        when = where.get("target_first", f"row {where['target_start']}")
        labels.append(f"{c.splits.columns[variate]}, {when[:16]}")
    arrays: dict[str, Any] = {name: np.stack(values) for name, values in shown.items()}
    np.savez(path, label=np.array(labels), **arrays)


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def _settle(c: Comparison) -> None:
    """Write run.json, or check that the one there asks for the same."""
    file = c.folder / "run.json"
    record = {"settings": c.settings, "command": _command(c.options), "notes": list(c.splits.notes)}
    record["windows"] = {"val": c.splits.val.n, "test": c.splits.test.n}
    if file.is_file():
        try:
            old = json.loads(file.read_text())["settings"]
        except (ValueError, KeyError) as err:
            raise UsageError(f"{file} is damaged ({err}); delete the folder or take another --out") from None
        if old.get("l2sp_weight") is None or c.settings["l2sp_weight"] is None:  # no l2sp cell on one of the sides
            weight = old.get("l2sp_weight") or c.settings["l2sp_weight"]
            old["l2sp_weight"] = record["settings"]["l2sp_weight"] = weight
        if other := [k for k in c.settings if old.get(k) != c.settings[k]]:
            lines = [f"  {k}: {old.get(k)} there, {c.settings[k]} now" for k in other]
            raise UsageError(
                f"{c.folder} holds a comparison with other settings; take another --out:\n" + "\n".join(lines)
            )
    _write_json(file, record)


def _write_csv(c: Comparison) -> None:
    """results.csv from every finished cell in the folder, those of earlier commands included."""
    rows = [json.loads(file.read_text())["row"] for file in (c.folder / "cells").glob("*/result.json")]
    rank = {method: i for i, method in enumerate(STRATEGIES)}
    rows.sort(key=lambda r: (rank[r["method"]], r["alpha"] or 0.0, r["seed"]))
    temporary = c.folder / ".results.csv"
    pd.DataFrame(rows).to_csv(temporary, index=False)
    os.replace(temporary, c.folder / "results.csv")


def _write_json(file: Path, content: Any) -> None:
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)


def _command(options: Options) -> str:
    """The command line that asks for these options; defaults are left out, but for the names of data and model."""
    parts = ["python", "-m", "experiments.sff"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in ("data", "model", "out") or value != field.default:
            value = str(options.folder) if field.name == "out" else value
            text = (
                ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
                if isinstance(value, tuple)
                else str(value)
            )
            parts += [f"--{field.name.replace('_', '-')}", *([] if value is True else [text])]
    return shlex.join(parts)


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


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.sff`; returns the exit code."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        comparison = resolve(options)
        print(plan(comparison))
        if options.plan:
            return 0
        failures = compare(comparison)
        if not (comparison.folder / "results.csv").is_file():
            return 1
        report.print_table(comparison.folder)
        print(f"report: {report.write_report(comparison.folder)}")
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
        return 1 if failures else 0
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
