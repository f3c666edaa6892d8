"""Evaluate models on fev tasks: forecasts in fev's form, scored by fev itself.

fev (github.com/autogluon/fev) is the forecast evaluation library of fev-bench
and of Chronos' benchmarks: a task names a data set, a horizon, rolling
windows, covariates and a metric, and fev computes the score.

Run:   python -m experiments.fev_tasks --tasks tasks.yaml \\
           --models timer-tiny,amazon/chronos-bolt-tiny --out runs/fev
       python -m experiments.fev_tasks --tasks tasks.yaml --models timer-tiny \\
           --method sff --budget 300
Needs: pip install "ltsm-jax[eval]". A task whose data set lies on the hub
       needs the network, or FEV_DATASETS_PREFIX.
Cost:  a forecast of every series in every window; with --method a fit of each
       model on the first window of each task, as `Forecaster.fit` does it.
Gives: OUT/results.csv, fev's own summary of each task and model, as its
       leaderboards read them; seasonal naive beside the models; on the
       terminal the error of each, its geometric mean relative to seasonal
       naive, and how many tasks it wins. The same command again goes on.

Covariates go to the models that take them. Quantiles that a model does not
say are split-conformal, from the past of each window.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd

from experiments import flags, folder, launch
from ltsm_jax import Forecaster, storage
from ltsm_jax.methods.strategies import STRATEGIES
from ltsm_jax.report import markdown_table

NAIVE = "seasonal_naive"
ZERO_SHOT = "zero_shot"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    program: ClassVar[str] = "experiments.fev_tasks"
    tasks: Annotated[Path, flags.path("FILE")]
    """YAML file with a list `tasks`, see fev.Benchmark.from_yaml"""
    models: Annotated[tuple[str, ...], flags.words()] = ("timer-tiny",)
    """shipped names, model folders, what `ltsm fit` wrote, or hub names"""
    method: Annotated[str, flags.one_of((ZERO_SHOT, "auto", *STRATEGIES))] = ZERO_SHOT
    """how to tune each model on the first window of a task; zero_shot: not at all"""
    budget: Annotated[int, flags.whole(1)] = 300
    """steps of tuning"""
    seed: Annotated[int, flags.whole(0)] = 0
    """of all randomness"""
    out: Annotated[Path, flags.path("FOLDER")] = Path("runs/fev")
    """folder of the results"""
    accept_license: bool = False
    """accept a licence that forbids commercial use"""


def load_tasks(file: Path) -> list[Any]:
    """Read the tasks of a YAML file.

    Raises: UsageError without fev, and for a file that holds no tasks.
    """
    try:
        import fev
    except ImportError as error:
        raise flags.UsageError(f'{error}: pip install "ltsm-jax[eval]"') from error
    if not file.is_file():
        raise flags.UsageError(f"--tasks {file}: no such file")
    try:
        tasks = fev.Benchmark.from_yaml(file).tasks
        for task in tasks:
            # Read now and here: fev forks to read, which a process with jax in it does not survive.
            task.load_full_dataset(num_proc=0)
        return tasks
    except (ValueError, KeyError, TypeError) as error:
        raise flags.UsageError(f"--tasks {file}: no tasks of fev: {error}") from error


def forecasts(forecaster: Forecaster, task: Any, window: Any, seed: int = 0) -> dict[str, list]:
    """Forecast one window of a task.

    Returns: for each target a record per series, with "predictions" and a list for each quantile
    level, in the order of the window's series; what `task.evaluation_summary` takes.
    """
    past, options = tables_of(task, window)
    found = forecaster.predict(
        past,
        task.horizon,
        quantile_levels=task.quantile_levels,
        seed=seed,
        show_progress=False,
        **options,
    )
    if "target_name" not in found:
        found = found.assign(target_name=task.target_columns[0])
    names = ["predictions", *map(str, task.quantile_levels)]
    ids = past[task.id_column].astype(str).unique()  # in the order of the window's series
    records: dict[str, list] = {}
    for target, rows in found.groupby("target_name", sort=False):
        by_series = dict(iter(rows.groupby(rows[task.id_column].astype(str), sort=False)))
        records[str(target)] = []
        for series in ids:
            forecast = by_series[series]
            records[str(target)].append({name: forecast[name].tolist() for name in names})
    return records


def tables_of(task: Any, window: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Give the past of a window as a table, and how it is read."""
    import fev

    past, future, static = fev.convert_input_data(window, adapter="pandas")
    known, beyond = list(task.known_dynamic_columns), list(task.past_dynamic_columns)
    options: dict[str, Any] = {
        "id": task.id_column,
        "time": task.timestamp_column,
        "target": list(task.target_columns),
        "irregular": "regularise",
    }
    for role, names in (("known", known), ("past", beyond), ("static", task.static_columns)):
        if names:
            options[role] = list(names)
    if static is not None:
        past = past.merge(static, on=task.id_column, how="left")
    if known:
        options["future"] = future[[task.id_column, task.timestamp_column, *known]]
    return past, options


def tuned(forecaster: Forecaster, task: Any, options: Options) -> tuple[Forecaster, float]:
    """Tune on the past of the first window. Returns: the forecaster and seconds."""
    began = time.monotonic()
    past, reading = tables_of(task, next(iter(task.iter_windows())))
    forecaster = forecaster.fit(
        past,
        task.horizon,
        methods=options.method,
        budget=options.budget,
        seed=options.seed,
        show_progress=False,
        **reading,
    )
    return forecaster, time.monotonic() - began


def summary(forecaster: Forecaster, name: str, task: Any, options: Options) -> dict[str, Any]:
    """Evaluate one model on one task: fev's summary."""
    training = None
    tune = options.method != ZERO_SHOT and name != NAIVE
    if tune:
        forecaster, training = tuned(forecaster, task, options)
    began = time.monotonic()
    found = [
        forecasts(forecaster, task, window, seed=options.seed) for window in task.iter_windows()
    ]
    return task.evaluation_summary(
        found,
        model_name=name,
        training_time_s=training,
        inference_time_s=time.monotonic() - began,
        trained_on_this_dataset=tune,
        extra_info={"ltsm_jax": folder.git_commit()},
    )


def compared(results: pd.DataFrame) -> pd.DataFrame:
    """Compare the models: geometric mean of errors relative to seasonal naive, and tasks won."""
    errors = results.pivot_table(index="task", columns="model_name", values="test_error")
    relative = errors.div(errors[NAIVE], axis=0)
    best = errors.eq(errors.min(axis=1), axis=0)
    table = pd.DataFrame(
        {
            "relative error": np.exp(np.log(relative.clip(1e-2, 100)).mean()),
            "tasks won": best.sum(),
        }
    )
    return table.sort_values("relative error")


def run(options: Options) -> pd.DataFrame:
    """Evaluate every model on every task; what is done already is read."""
    tasks = load_tasks(options.tasks)
    names = [*options.models, NAIVE]
    out = storage.user_path(options.out)
    (out / "summaries").mkdir(parents=True, exist_ok=True)
    rows, loaded = [], {}
    for number, task in enumerate(tasks):
        for name in names:
            tune = name != NAIVE and options.method != ZERO_SHOT
            label = f"{name}+{options.method}" if tune else name
            words = f"{number}-{task.task_name}-{label}"
            file = out / "summaries" / (re.sub(r"[^\w.+-]+", "_", words) + ".json")
            facts = json.loads(json.dumps([task.to_dict(), options.budget, options.seed]))
            record = storage.read_record(file) if file.is_file() else {}
            if record.get("facts") != facts:
                source = options.models[0] if name == NAIVE else name
                if source not in loaded:
                    accept = options.accept_license
                    loaded[source] = Forecaster.load(source, accept_license=accept)
                forecaster = loaded[source]
                if name == NAIVE:
                    forecaster = dataclasses.replace(forecaster, baseline=NAIVE)
                found = summary(forecaster, name, task, options=options) | {"model_name": label}
                record = {"facts": facts, "summary": json.loads(json.dumps(found, default=str))}
                storage.write_record(file, record)
            row = record["summary"] | {"task": f"{number} {task.task_name}"}
            launch.say(f"{row['task']}, {label}: {task.eval_metric} {row['test_error']:.4f}")
            rows.append(row)
    results = pd.DataFrame(rows)
    results.drop(columns="task").to_csv(out / "results.csv", index=False)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.fev_tasks`; returns the exit code."""
    return launch.guarded(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    options = flags.parse(Options, argv, __doc__)
    results = run(options)
    table = compared(results)
    cells = [
        [str(name), f"{relative:.3f}", f"{won:.0f}"]
        for name, relative, won in table.itertuples(name=None)
    ]
    launch.say(markdown_table(["model", "relative error", "tasks won"], cells))
    launch.say(f"{options.out / 'results.csv'}: {len(results)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
