"""Parts of the experiments that compare methods: the recipe of a run, and cells that never run
twice.

A comparison is a folder, see `experiments.folder`; a cell is one run of it, with a folder of its
own in cells/.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import pandas as pd
from rich.console import Console

import ltsm_jax
from experiments import folder, grid, launch, lists
from experiments.flags import Options, Reading, UsageError
from ltsm_jax import hosts, sharding, storage, training, trees
from ltsm_jax.data import Series, Splits, Windows, prepare, steps_per_epoch
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.data.splits import SPLIT_QUIRKS
from ltsm_jax.methods import binding, checks, run, sweep
from ltsm_jax.methods.starts import prepared, start_params
from ltsm_jax.methods.strategies import Strategy
from ltsm_jax.models import Model
from ltsm_jax.tasks import forecasting
from ltsm_jax.tasks.base import Task
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.training import NonFiniteError, TrainConfig, lanes

C = TypeVar("C", bound="Cell")
EXAMPLES = 4  # test windows whose forecasts are kept
EXAMPLES_FILE = "forecasts.npz"


class Cell(Protocol):
    """One run of a comparison.

    One that has a learning rate of its own, or another origin of validation than the first, says so
    by the attributes `lr` and `origin`.
    """

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

    @property
    def trains(self) -> bool:
        """Whether anything is trained in it."""
        ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a cell needs, resolved and checked."""

    options: Any
    model: Model
    params: Any
    splits: Splits
    config: TrainConfig
    task: Forecasting
    settings: dict[str, Any]  # what decides every number; a folder holds one set of settings
    optional: tuple[
        str, ...
    ] = ()  # settings that may be None on one side, where no cell needs them

    @property
    def folder(self) -> Path:
        """Where it all goes."""
        return self.options.folder

    @property
    def windows(self) -> Windows:
        """The windows of training."""
        return self.task.windows(self.model, self.splits)  # pyright: ignore[reportReturnType]

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """Contents of run.json."""
        model = {"family": self.model.family, "config": self.model.config_to_dict()}
        windows = {"val": self.splits.val.n, "test": self.splits.test.n}
        return {
            "experiment": self.options.program,
            "settings": dict(self.settings),
            "model": model,
            "command": self.options.command(),
            "notes": list(self.splits.notes),
            "windows": windows,
        }


def resolve(options: Options) -> Comparison:
    """Load model and data, fill in the model's recipe, and try one batch without computing it.
    Every host for itself.

    Raises: UsageError listing everything that does not work.
    """
    problems: list[str] = []

    def attempt(f, *args, **kwargs):
        try:
            return f(*args, **kwargs)
        except (ValueError, OSError) as err:
            problems.append(str(err))
            return None

    series = attempt(read_series, options.data, options.reading)
    loaded = attempt(ltsm_jax.load, options.model, accept_license=options.accept_license)
    if loaded is None or series is None:
        raise UsageError("\n".join(problems))
    model, params = loaded
    if options.head:
        sizes = {} if options.horizon is None else {"horizon": options.horizon}
        key = training.keys(min(options.seeds))["init"]
        loaded = attempt(lambda: model.with_head(params, options.head or "", key, **sizes))
    loaded = loaded and attempt(binding.ready_for, *loaded, series)
    if loaded is None:
        raise UsageError("\n".join(problems))
    model, params = loaded
    sha256 = storage.sha256_of(params)[:16]  # before they are split
    mesh = attempt(sharding.make_mesh, options.devices.mesh)
    if mesh is not None:
        params, notes = sharding.shard(params, model.shard_rules, mesh)
        for note in notes if hosts.first() else ():
            print(note, file=sys.stderr)
    recipe = model.recipe()
    context, horizon = options.context or recipe.context_len, options.horizon or recipe.horizon
    task = Forecasting(options.training.mode or binding.default_mode(model))
    config = training_config(model, options)
    quirks = tuple(q for q in options.quirks if q in SPLIT_QUIRKS)
    splits = attempt(
        prepare,
        series,
        context,
        horizon,
        few_shot=options.training.few_shot,
        quirks=quirks,
        joint=model.variates == "joint",
    )
    found = len(problems)
    if splits is not None and options.origins > 1:
        attempt(rolled, splits, options.origins - 1)
    if splits is not None:
        attempt(_try_batch, model, params, splits, task)
    if splits is None or len(problems) > found:
        problems.append(
            binding.what_fits(model, params, series, horizon=horizon, usual_borders=True)
        )
    if splits is None or problems:
        raise UsageError("\n".join(problems))
    splits = thinned(splits, options.score_stride)
    settings = {
        "data": series.name,
        "model": Path(options.model).name if os.sep in options.model else options.model,
        "head": options.head,
        "context": context,
        "horizon": horizon,
        "mode": task.mode,
        **_training_settings(options, config),
        "quirks": ",".join(sorted(options.quirks)) or None,
        **series_facts(series),
        "model_sha256": sha256,
        "score_stride": None if options.score_stride == 1 else options.score_stride,
        **options.training.unusual(),
        **grid.settings(options.over, options.seeds[0], options.origins),
    }
    return Comparison(
        options=options,
        model=model,
        params=params,
        splits=splits,
        config=config,
        task=task,
        settings=settings,
    )


def _training_settings(options: Options, config: TrainConfig) -> dict[str, Any]:
    """Settings of all training runs of a comparison; None where they are the usual ones."""
    return {
        "few_shot": options.training.few_shot,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": "by validation" if "lr" in options.over else config.lr,
        "schedule": config.schedule,
        "compute": None if config.compute == "float32" else config.compute,
        "accumulate": None if config.accumulate == 1 else config.accumulate,
        "remat": None if config.remat == "none" else config.remat,
    }


def read_series(data: str, reading: Reading) -> Series:
    """Read a benchmark or a table as the options of a command line ask."""
    return load_series(data, **reading.asked())


def training_config(model: Model, options: Options) -> TrainConfig:
    """Give the model's recipe with what the options change."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    asked = vars(options.training) | vars(options.devices)
    if options.training.lr is not None:
        asked["lr"] = options.training.lr[0]  # of several, cells have their own
    return binding.train_config(
        model, **{k: v for k, v in asked.items() if k in names and v is not None}
    )


def at(c: Comparison, cell: Cell) -> Comparison:
    """Give the comparison as a cell sees it: with its own learning rate, and its own origin of
    validation.
    """
    lr, origin = getattr(cell, "lr", None), getattr(cell, "origin", 0)
    if lr is not None:
        c = dataclasses.replace(c, config=dataclasses.replace(c.config, lr=lr))
    if not origin:
        return c
    return dataclasses.replace(c, splits=thinned(rolled(c.splits, origin), c.options.score_stride))


def thinned(splits: Splits, stride: int) -> Splits:
    """Keep every `stride`-th start of the validation and test windows, of all variates."""

    def kept(windows: Windows) -> Windows:
        starts = np.asarray(windows.starts)
        return windows.take(np.flatnonzero((starts - starts.min()) % stride == 0))

    if stride == 1:
        return splits
    return dataclasses.replace(splits, val=kept(splits.val), test=kept(splits.test))


def rolled(splits: Splits, origin: int) -> Splits:
    """Move validation back by `origin` times its rows, and train on what lies before it.

    Raises: ValueError where what lies before it does not hold a window.
    """
    lo, hi = splits.borders.val
    shift = origin * (hi - lo)
    first = splits.borders.train[0]
    if lo - shift <= first:
        raise ValueError(
            f"--origins {origin + 1}: {lo - first} training rows do not hold so many blocks"
        )
    borders = dataclasses.replace(
        splits.borders, train=(first, lo - shift), val=(lo - shift, hi - shift)
    )
    return prepare(
        splits.series,
        splits.val.context_len,
        splits.val.horizon,
        borders=borders,
        few_shot=splits.few_shot,
        quirks=splits.quirks,
        joint=splits.train.joint,
    )


def series_facts(series: Series) -> dict[str, Any]:
    """Say which data a series holds, for the settings of a folder."""
    more = f" and {series.n_variates - 8} more" if series.n_variates > 8 else ""
    stamps = series.timestamps
    digest = hashlib.sha256(np.ascontiguousarray(series.values).tobytes())
    digest.update(repr((series.columns, series.freq, series.tz)).encode())
    if stamps is not None:
        digest.update(repr([str(stamp) for stamp in stamps]).encode())
    return {
        "columns": ", ".join(series.columns[:8]) + more,
        "rows": series.n_rows,
        "step": series.freq,
        "stamps": None if stamps is None else f"{stamps[0]} to {stamps[-1]}",
        "data_sha256": digest.hexdigest()[:16],
    }


def _try_batch(model: Model, params: Any, splits: Splits, task: Task) -> None:
    """Shapes only: what model, context, horizon and task have to say about each other, before
    anything is compiled.
    """
    loss, windows = task.loss(model), task.windows(model, splits)
    indices, key = np.zeros(1, np.int32), jax.random.key(0)
    jax.eval_shape(lambda p, w: loss(p, w.gather(indices), key, True), params, windows)
    jax.eval_shape(
        lambda p, w: model.predict(p, w.gather(indices)["context"], w.horizon), params, splits.val
    )


def finished(c: Comparison, cells: Iterable[Cell]) -> int:
    """Count the cells that have a result."""
    return sum(folder.finished(c.folder, cell.name) for cell in cells)


def plan(c: Comparison, runs: Sequence[str]) -> str:
    """Describe the runs that will follow; `runs` are the lines that the experiment adds."""
    series, windows = c.splits.series, c.windows
    assert c.config.batch_size is not None, "filled"
    batch = min(c.config.batch_size, windows.n)
    steps = steps_per_epoch(windows.n, batch)
    stamps = series.timestamps
    span = "" if stamps is None else f", {str(stamps[0])[:16]} to {str(stamps[-1])[:16]}"
    borders = "; ".join(
        f"{p} rows {getattr(c.splits.borders, p)[0]}-{getattr(c.splits.borders, p)[1]}"
        for p in ("train", "val", "test")
    )
    lines = [
        f"data     {series.name}: {series.n_rows:,} rows x {series.n_variates} columns "
        f"({c.settings['columns']}), step {series.freq or 'unknown'}{span}",
        f"split    {borders}"
        + (f"; quirks {c.settings['quirks']}" if c.settings["quirks"] else ""),
        f"windows  {c.settings['context']} -> {c.settings['horizon']}: {windows.n:,} to train, "
        f"{c.splits.val.n:,} to validate, {c.splits.test.n:,} to test"
        + (
            f" (few-shot {c.options.training.few_shot:g})"
            if c.options.training.few_shot != 1
            else ""
        ),
        f"model    {c.settings['model']}: {c.model.family}, {trees.count(c.params):,} parameters",
        f"training {c.task.mode}, {c.config.epochs} epochs of {steps} steps of {batch} windows, "
        f"lr {_lr(c)}, schedule {c.config.schedule}",
        f"memory   about {_megabytes(c):,.0f} MB of weights, optimiser state and data; activations "
        "come on top",
        *runs,
        f"results  {c.folder}",
    ]
    return "\n".join(lines + [f"note     {note}" for note in c.splits.notes])


def _lr(c: Comparison) -> str:
    if "lr" not in c.options.over:
        return f"{c.config.lr:g}"
    return " or ".join(f"{lr:g}" for lr in c.options.training.lrs)


def _megabytes(c: Comparison) -> float:
    # pretrained, trained, best, gradient, two moments
    return (6 * sum(p.nbytes for p in jax.tree.leaves(c.params)) + c.splits.val.values.nbytes) / 1e6


# --------------------------------------------------------------------------------------------------
# running it


@contextlib.contextmanager
def claimed(c: Comparison) -> Iterator[None]:
    """Work in the folder of a comparison, alone: make it, or check that the same settings asked for
    what it holds.

    Raises: UsageError when it holds a comparison with other settings, or another process works in
      it; nothing has been written then.
    """
    hosts.on_first(folder.check, c.folder, c.record, c.optional)
    with folder.held(c.folder):
        for problem in hosts.on_first(_begin, c):
            launch.say(f"not believed, and run again where it is asked for: {problem}")
        yield


def _begin(c: Comparison) -> list[str]:
    folder.check(c.folder, c.record, c.optional)  # once more: another process may have been first
    damaged = folder.tidy(c.folder)
    (c.folder / "cells").mkdir(exist_ok=True)
    folder.write_json(c.folder / folder.RUN, c.record)
    file = c.folder / "baselines.json"
    try:
        storage.read_record(file)
    except storage.DamagedError:
        folder.write_json(file, {"baselines": baselines(c)})
    return damaged


def run_cells(
    c: Comparison,
    cells: Sequence[C],
    run_cell: Callable[[C], dict[str, Any]],
    rank: Callable[[dict[str, Any]], Any],
    console: Console,
    place: tuple[int, int] | None = None,
    begin: Callable[[C], run.Running] | None = None,
) -> list[str]:
    """Run every cell that has no result yet; after each, results.csv is whole, its rows in the
    order of `rank`.

    run_cell: leaves the cell's result.json and gives its row of results.csv. place: number of the
    first cell, and how many there are, for the terminal. begin: begins the training of a cell;
    those that can be are then trained together first, as --lanes says, and `run_cell` finds them
    trained.
    Returns: what failed (a run that diverged does not stop the others), one line each.
    """
    first, total = place or (1, len(cells))
    failures = []
    console = console if hosts.first() else Console(quiet=True)
    diverged = {} if begin is None else train_together(c, cells, begin)
    for i, cell in enumerate(cells, first):
        text = f"[{i}/{total}] {cell.label}"
        hosts.stop_if_asked(f"before {text}")
        if hosts.on_first(folder.finished, c.folder, cell.name):
            console.print(f"{text}: finished before", highlight=False, markup=False)
        else:
            try:
                if cell.name in diverged:
                    raise diverged[cell.name]
                row = run_cell(cell)
            except NonFiniteError as err:
                failures.append(f"{text}: {err}")
                console.print(failures[-1], highlight=False, markup=False, style="red")
                continue
            text += (
                f": val MSE {row['val_mse']:.4f}, test MSE {row['test_mse']:.4f}, "
                f"{row['seconds']:.1f} s"
            )
            console.print(text, highlight=False, markup=False)
        hosts.on_first(folder.write_csv, c.folder, rank)
    return failures


def train_together(
    c: Comparison, cells: Sequence[C], begin: Callable[[C], run.Running]
) -> dict[str, NonFiniteError]:
    """Train the cells without a result that can be lanes of one program, see `methods.sweep`.

    Returns: why those that diverged did, by name.
    """
    if c.options.lanes == "off" or hosts.process_count() > 1:
        return {}
    waiting, makers = [], []
    for cell in cells:
        if not folder.finished(c.folder, cell.name) and cell.trains:
            waiting.append(cell)
            makers.append(functools.partial(begin, cell))
    if len(waiting) < 2:
        return {}
    asked: lanes.Asked = c.options.lanes
    found = sweep.train(makers, c.params, lanes=asked, folder=c.folder / "lanes", others=False)
    pairs = zip(waiting, found, strict=True)
    return {cell.name: outcome for cell, outcome in pairs if isinstance(outcome, NonFiniteError)}


def run_chosen(
    c: Comparison,
    cells: Sequence[C],
    run_cell: Callable[[C], dict[str, Any]],
    rank: Callable[[dict[str, Any]], Any],
    console: Console,
    place: tuple[int, int],
    begin: Callable[[C], run.Running] | None = None,
) -> list[str]:
    """Run the cells of the other seeds whose settings the first seed has chosen; see `run_cells`
    and `grid`.
    """
    over, seed = c.options.over, c.settings[grid.SEED]
    rows = hosts.on_first(
        lambda: [record["row"] for record in folder.results(c.folder)[0].values()]
    )
    best = grid.choices(rows, over, seed)
    mine = []
    for cell in cells:
        columns = dataclasses.asdict(cell)  # pyright: ignore[reportArgumentType]
        if best.get(grid.arm(columns, over)) == grid.candidate(columns, over):
            mine.append(cell)
    return run_cells(c, mine, run_cell, rank=rank, console=console, place=place, begin=begin)


def tune(c: Comparison, cell: Cell, chosen: Strategy, **rest: Any) -> run.RunResult:
    """Run the strategy of a cell, or go on with it.

    rest: `model` and `params` in place of the comparison's, and what else `methods.run.run` takes.
    """
    model, params, settings = _settings(c, cell, rest)
    return run.run(model, params, chosen, data=c.splits, test=False, **settings)


def begin(c: Comparison, cell: Cell, chosen: Strategy, **rest: Any) -> run.Running:
    """Begin the run that `tune` runs, for it to take its steps together with others."""
    model, params, settings = _settings(c, cell, rest)
    return run.Running(model, params, chosen, data=c.splits, **settings)


def _settings(c: Comparison, cell: Cell, rest: dict[str, Any]) -> tuple[Model, Any, dict[str, Any]]:
    settings = {
        "task": c.task,
        "seed": cell.seed,
        "config": c.config,
        "folder": c.folder / "cells" / cell.name / "training",
        "label": cell.label,
        "test_each_epoch": c.options.test_each_epoch and not getattr(cell, "origin", 0),
        **rest,
    }
    return settings.pop("model", c.model), settings.pop("params", c.params), settings


def row_of(
    c: Comparison, columns: dict[str, Any], model: Model, result: run.RunResult
) -> dict[str, Any]:
    """The row of a run in results.csv. columns: what tells its cell from the others."""
    season = c.splits.series.season
    scale = c.splits.naive_scale(season) if season > 1 else None
    test = forecasting.evaluate(model, result.params, c.splits.test, naive_scale=scale)
    by_epoch = epoch_tests(result, test) if c.options.test_each_epoch else {}
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
        "mode": c.task.mode,
        "quirks": c.settings["quirks"],
        "context": c.settings["context"],
        "lr": c.config.lr,
        "batch_size": c.config.batch_size,
        "schedule": c.config.schedule,
        "few_shot": c.options.training.few_shot,
        "train_windows": c.windows.n,
        "val_windows": result.val["windows"],
        "trained_parameters": result.trained,
        "git_commit": folder.git_commit(),
        "versions": folder.versions(),
        "device": folder.device(),
        **by_epoch,
    }


def epoch_tests(result: run.RunResult, test: dict[str, Any]) -> dict[str, float | None]:
    """Give the test errors of the last epoch, and of the one with the lowest test MSE, of the last
    phase.

    test: scores of the weights that are kept, which stand for all where nothing was trained. None
    where an epoch was not scored, as in a run that was begun without --test-each-epoch.
    """
    last_phase = [h for h in result.history if h["phase"] == result.history[-1]["phase"]]
    tests = [{"mse": h.get("test_mse"), "mae": h.get("test_mae")} for h in last_phase] or [test]
    if any(scores["mse"] is None for scores in tests):
        return dict.fromkeys(("last_test_mse", "last_test_mae", "best_test_mse", "best_test_mae"))
    best = tests[int(np.argmin(np.array([scores["mse"] for scores in tests], float)))]
    return {
        "last_test_mse": tests[-1]["mse"],
        "last_test_mae": tests[-1]["mae"],
        "best_test_mse": best["mse"],
        "best_test_mae": best["mae"],
    }


def keep(
    c: Comparison,
    cell: Cell,
    final: tuple[Model, Any],
    row: dict[str, Any],
    result: run.RunResult,
    shown: tuple[Model, Any] | None = None,
    **more: Any,
) -> None:
    """Put a finished cell into its folder: example forecasts, the model where it is a new one, and
    last result.json.

    On several hosts all call; the first writes.

    final: model and params to keep. shown: those that forecast the examples, where they are others.
    more: further entries of result.json.
    """
    place = c.folder / "cells" / cell.name
    hosts.on_first(place.mkdir, exist_ok=True)
    write_examples(c, *(shown or final), place / EXAMPLES_FILE)
    if final[1] is not c.params:
        made = {"source": c.settings["model"], "method": cell.name, "command": c.options.command()}
        made["git_commit"] = row["git_commit"]
        if trees.count(final[1]) < trees.count(
            c.params
        ):  # parts were removed: an export needs to know from what
            made["pruned_from"] = c.model.config_to_dict()
        with folder.naming(place / "model"):
            ltsm_jax.save(place / "model", *final, provenance=made, overwrite=True)
    record = {"row": row, "history": result.history, "warnings": list(result.warnings)}
    record["compile_seconds"] = result.compile_seconds
    record["val_blocks"] = val_blocks(shown or final, c.splits.val)
    if c.options.test_each_epoch:
        record["test_blocks"] = val_blocks(shown or final, c.splits.test)

    def finish() -> None:
        finish_cell(c, cell, record | more)
        folder.drop_checkpoints(place)

    hosts.on_first(finish)


def val_blocks(shown: tuple[Model, Any], windows: Windows) -> list[float]:
    """MSE of some windows by blocks, which two arms are compared by; see `checks.block_means`."""
    errors = forecasting.errors(*shown, windows)
    return checks.block_means(
        errors.squared.sum(axis=1), errors.steps.sum(axis=1), windows
    ).tolist()


def start_mse(c: Comparison, chosen: Strategy, seed: int) -> float | None:
    """Validation MSE of what a strategy starts from, before its first step; None where nothing is
    trained.
    """
    if not chosen.phases:
        return None
    key = training.keys(seed)["aux"]
    model, params = prepared(chosen, c.model, c.params, aux_key=key)
    return c.task.evaluate(model, start_params(chosen, model, params, aux_key=key), c.splits)[
        c.task.selects
    ]


def finish_cell(c: Comparison, cell: Cell, record: dict[str, Any]) -> None:
    """Write the result.json of a cell, the last of its files."""
    place = c.folder / "cells" / cell.name
    of = folder.identity(c.record, c.optional)
    files = {EXAMPLES_FILE: folder.file_digest(place / EXAMPLES_FILE)}
    folder.write_json(place / folder.RESULT, record | {"of": of, "files": files})


def take_over(c: Comparison, cell: Cell, twin: str) -> dict[str, Any]:
    """Give a cell the result of another one, called `twin`, that differs in its seed alone, where
    that has no say.

    Returns: its row.
    """

    def copy() -> dict[str, Any]:
        place = c.folder / "cells" / cell.name
        place.mkdir(exist_ok=True)
        stored = folder.read_result(c.folder, twin)
        assert stored is not None, "a twin is finished"
        with folder.replacing(place / EXAMPLES_FILE) as temporary:
            shutil.copyfile(place.with_name(twin) / EXAMPLES_FILE, temporary)
        stored["row"]["seed"] = cell.seed
        finish_cell(c, cell, stored)
        return stored["row"]

    return hosts.on_first(copy)


def twin_of(c: Comparison, method: str) -> str | None:
    """Name of the first finished cell of a method that has neither alpha nor mask."""
    found = hosts.on_first(
        lambda: [n for n in folder.results(c.folder)[0] if n.startswith(f"{method}-seed")]
    )
    return found[0] if found else None


def baselines(c: Comparison) -> list[dict[str, Any]]:
    """Scores of what needs no model (last value, seasonal naive), on the same windows."""
    val, test = (c.task.baselines(c.model, c.splits, part) for part in ("val", "test"))
    found = []
    for name in val:
        row: dict[str, Any] = {"method": name.replace(" ", "_")}
        for part, scores in (("val", val[name]), ("test", test[name])):
            row |= {f"{part}_{metric}": value for metric, value in c.task.row(scores).items()}
        found.append(row)
    return found


def local(series: Series) -> np.ndarray:
    """The stamps of a series as its own clock shows them, [T] datetime64."""
    assert series.timestamps is not None
    if series.tz is None:
        return series.timestamps
    index = pd.DatetimeIndex(series.timestamps).tz_localize("UTC").tz_convert(series.tz)
    return index.tz_localize(None).to_numpy()


def write_examples(c: Comparison, model: Model, params: Any, path: Path) -> None:
    """Forecasts of a few test windows at fixed places of the split, in data units."""
    windows = c.splits.test
    n = min(EXAMPLES, windows.n)
    indices = ((np.arange(n) + 0.5) * windows.n / n).astype(np.int32)
    labels, stamps, shown = [], [], {"context": [], "target": [], "point": []}
    found = dict(
        zip(
            shown,
            forecasting.forecast_windows(model, params, windows, indices=indices),
            strict=True,
        )
    )
    for k, i in enumerate(indices):
        where = windows.describe(int(i))
        variate = where["variate"] or 0  # the first one where a window holds all
        for name, values in found.items():
            mean, std = c.splits.scaler.mean[variate], c.splits.scaler.std[variate]
            shown[name].append(values[k, 0] * std + mean)
        when = f"row {where['target_start']}"
        if c.splits.series.timestamps is not None:
            when = str(local(c.splits.series)[where["target_start"]])[:16].replace("T", " ")
        labels.append(f"{c.splits.columns[variate]}, {when}")
        if c.splits.series.timestamps is not None:
            stamps.append(local(c.splits.series)[where["start"] : where["stop"]])
    arrays: dict[str, Any] = {name: np.stack(values) for name, values in shown.items()}
    if stamps:
        arrays["stamps"] = np.stack(stamps).astype("datetime64[s]")

    def write() -> None:
        with folder.replacing(path) as temporary:
            np.savez(temporary, label=np.array(labels), **arrays)

    hosts.on_first(write)


def main(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Any],
    resolve: Callable[[Any], Comparison],
    plan: Callable[[Comparison], str],
    compare: Callable[[Comparison], list[str]],
    finish: Callable[[Path, str], None],
) -> int:
    """An experiment from its flags to its report, on one host or several; returns its exit code
    (`launch.guarded`).

    Several --data, --model or --few-shot run one after the other, see `lists`.
    parse, resolve, plan: flags to options, to a `Comparison`, to words. compare: runs the cells and
    says what failed. finish: prints the table and writes the report of a folder that has results,
    by the epoch that --report-by names.
    """

    words = sys.argv[1:] if argv is None else argv

    def one(words: Sequence[str]) -> int:
        return main(words, parse, resolve, plan=plan, compare=compare, finish=finish)

    def work() -> int:
        several = lists.run(words, lists.out_of(words, "runs/several"), one)
        if several is not None:
            return several
        options = parse(words)
        with launch.started(options.hosts):
            c = hosts.on_every_host(resolve, options)
            launch.say(plan(c))
            if options.plan:
                return 0
            with claimed(c):
                failures = compare(c)
                if not hosts.on_first((c.folder / folder.CSV).is_file):
                    return 1
                if hosts.first():
                    with folder.naming(c.folder):
                        finish(c.folder, options.report_by)
                    for failure in failures:
                        print(f"failed: {failure}", file=sys.stderr)
            return 1 if failures else 0

    return launch.guarded(work)
