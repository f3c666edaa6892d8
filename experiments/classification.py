"""Which tuning classifies time series best, and does it beat random kernels?

Run:   python -m experiments.classification --data BasicMotions_TRAIN.ts \\
           --model MODEL --methods ff,sff,tfs,lp --seeds 0,1,2
Data:  `.ts` files of the UCR and UEA archives, <name>_TRAIN.ts with its
       <name>_TEST.ts beside it, or folders that hold such a pair; several
       separated by commas.
Model: one with a classification head (MOMENT, UniTS); a model without gets a
       fresh, untrained one for the classes of the data.
Cost:  of each run that of tuning on the training part; the baselines take
       seconds.
Gives: a table on the terminal and, in the folder of --out: results.csv (a row
       per data set, method and seed: loss, accuracy and macro-F1 of the test
       part) and report.md with a picture.

A fifth of the training part, of each class alike, is held out and selects the
epoch by its cross entropy. Baselines: the most frequent class, and a ridge on
random convolutions (ROCKET), which trains on the whole training part.
"""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd

import ltsm_jax
from experiments import flags, folder, launch, report, task_runs
from ltsm_jax import storage, training
from ltsm_jax.data import DataError
from ltsm_jax.data.ts_files import LabelledExamples, read_problem
from ltsm_jax.methods import run
from ltsm_jax.methods.strategies import STRATEGIES, strategy
from ltsm_jax.models import Model
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table
from ltsm_jax.tasks import random_kernels
from ltsm_jax.tasks.classification import Classification, Examples, Parts, accuracy_and_f1

BASELINES = {"most_frequent": "most frequent class", "random_kernels": "random kernels + ridge"}
HELD_OUT = 0.2
TASK = Classification()


@dataclasses.dataclass(frozen=True)
class Options(task_runs.Options):
    """The command line: data sets, beside the options that all tasks share."""

    program: ClassVar[str] = "experiments.classification"
    data: Annotated[tuple[str, ...], flags.words()]
    """<name>_TRAIN.ts files or folders of a pair, separated by commas"""
    model: Annotated[str, flags.text("MODEL")]
    """model folder, original checkpoint, or hub name owner/name[@revision]"""
    methods: Annotated[
        tuple[str, ...],
        flags.names(tuple(STRATEGIES)),
        flags.described(f"what to compare, of {', '.join(STRATEGIES)}"),
    ] = ("ff", "sff", "tfs", "lp")
    seeds: Annotated[
        tuple[int, ...], flags.wholes(0, 2**32 - 1, says="between 0 and 2**32 - 1")
    ] = (0,)
    """a run for each, with its own head and its own kernels"""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A data set: all training examples, and the parts that a model is tuned and scored on."""

    name: str
    train: LabelledExamples
    parts: Parts


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of results.csv: a data set, a method or baseline, a seed."""

    problem: Problem
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.problem.name}-{self.method}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a run needs, resolved and checked."""

    options: Options
    model: Model
    params: Any
    problems: list[Problem]
    config: training.TrainConfig
    record: dict[str, Any]


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Raises: UsageError listing every bad flag."""
    return flags.parse(Options, argv, __doc__)


def resolve(options: Options) -> Comparison:
    """Load the model and read the files. Raises: UsageError for what does not work."""
    try:
        problems = [problem_of(path) for path in options.data]
        model, params = ltsm_jax.load(options.model, accept_license=options.accept_license)
        model.check_task("classification")
    except (ValueError, OSError) as error:
        raise flags.UsageError(str(error)) from error
    config = options.config(model)
    digests = [
        storage.sha256_of({"x": p.train.values, "test": p.parts.test})[:16] for p in problems
    ]
    settings = {
        "data_sha256": dict(zip([p.name for p in problems], digests, strict=True)),
        "model_sha256": storage.sha256_of(params)[:16],
        "alpha": options.alpha,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
    }
    record = {
        "experiment": options.program,
        "settings": settings,
        "model": {"family": model.family, "config": model.config_to_dict()},
        "command": options.command(),
    }
    return Comparison(
        options=options, model=model, params=params, problems=problems, config=config, record=record
    )


def problem_of(path: str) -> Problem:
    """Read a data set, and hold out a fifth of each class of its training part."""
    train, test = read_problem(path)
    held_out = hold_out(train.labels)
    kept = np.setdiff1d(np.arange(len(train.labels)), held_out)
    parts = Parts(
        train=Examples.of(train.values[kept], train.labels[kept]),
        val=Examples.of(train.values[held_out], train.labels[held_out]),
        test=Examples.of(test.values, test.labels),
    )
    return Problem(train.name, train, parts)


def hold_out(labels: np.ndarray, share: float = HELD_OUT) -> np.ndarray:
    """Number the examples to hold out, [k]: the share of each class, evenly spread, but never all
    of one.

    Raises: ValueError where no class has two examples.
    """
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        found.append(rows[(np.arange(count) + 0.5).astype(int) * len(rows) // max(count, 1)])
    held_out = np.sort(np.concatenate(found))
    if not len(held_out):
        raise DataError("no class has two training examples: one to train on and one to hold out")
    return held_out


def with_head(c: Comparison, problem: Problem, seed: int) -> tuple[Model, Any]:
    """Give the model a fresh head for the classes of a data set, drawn from the seed."""
    key = training.keys(seed)["init"]
    _, n_variates, _ = problem.parts.train.values.shape
    model, params = c.model.for_series(c.params, n_variates=n_variates, key=key)
    sizes = {"n_classes": len(problem.train.classes), "n_variates": n_variates}
    return model.with_head(params, "classification", key, **sizes)


def score(c: Comparison, problem: Problem, method: str, seed: int) -> dict[str, Any]:
    """Run a method or baseline on a data set. Returns: its row of results.csv."""
    began = time.perf_counter()
    parts = problem.parts
    labels = np.asarray(parts.test.labels)
    row = {"data": problem.name, "model": c.options.model_name, "method": method, "seed": seed}
    if method == "most_frequent":
        test = TASK.baselines(c.model, parts, "test")["most frequent class"]
    elif method == "random_kernels":
        train = problem.train
        guess = random_kernels.classify(
            train.values, train.labels, np.asarray(parts.test.values), seed=seed
        )
        test = accuracy_and_f1(guess, labels)
    else:
        model, params = with_head(c, problem, seed)
        result = run.run(
            model,
            params,
            strategy(method, alpha=c.options.alpha),
            data=parts,
            task=TASK,
            seed=seed,
            config=c.config,
            label=f"{problem.name}, {method}",
            show_progress=False,
        )
        assert result.test is not None, "it is asked for"
        test = result.test
        row |= {f"val_{name}": result.val[name] for name in ("loss", "accuracy", "macro_f1")}
        row |= {"best_epoch": result.best_epoch, "alpha": c.options.mix_of(method)}
    row |= {f"test_{name}": test.get(name) for name in ("loss", "accuracy", "macro_f1")}
    row |= {"examples": len(labels), "classes": len(problem.train.classes)}
    row |= {"seconds": round(time.perf_counter() - began, 3)}
    return row | task_runs.facts()


def cells_of(c: Comparison) -> list[Cell]:
    """Every run, data set by data set."""
    found = []
    for problem in c.problems:
        for method in (*c.options.methods, *BASELINES):
            seeds = c.options.seeds[:1] if method == "most_frequent" else c.options.seeds
            found += [Cell(problem, method, seed) for seed in seeds]
    return found


def plan(c: Comparison) -> str:
    """Say what will run, in words."""
    lines = []
    for problem in c.problems:
        trained, tested = len(problem.parts.train.labels), len(problem.parts.test.labels)
        classes = len(problem.train.classes)
        lines.append(
            f"data     {problem.name}: {classes} classes, {trained} examples to train, {tested} to "
            "test"
        )
    lines.append(f"model    {c.options.model}: {c.model.family}")
    lines.append(
        f"training {c.config.epochs} epochs, batch {c.config.batch_size}, lr {c.config.lr:g}"
    )
    lines.append(
        f"runs     {len(cells_of(c))}: {', '.join(c.options.methods)}, and {', '.join(BASELINES)}"
    )
    return "\n".join([*lines, f"results  {c.options.folder}"])


def compare(c: Comparison) -> list[str]:
    """Run all that has no result yet. Returns: what failed, a line each."""

    def run_cell(cell: Cell) -> task_runs.Outcome:
        row = score(c, cell.problem, cell.method, seed=cell.seed)
        return task_runs.Outcome(row, f"test accuracy {row['test_accuracy']:.3f}")

    return task_runs.run_cells(c, cells_of(c), run_cell)


def rank(row: dict[str, Any]) -> Any:
    """Give the place of a row in results.csv."""
    return row["data"], [*STRATEGIES, *BASELINES].index(row["method"]), row["seed"]


def label(method: str) -> str:
    """Name a method or baseline as tables do."""
    return BASELINES.get(method) or report.label(method)


def summary(results: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Give mean and spread over seeds of each data set and method, as text."""
    header = ["data", "method", "accuracy", "macro-F1", "cross entropy", "seconds"]
    body = []
    for (data, method), group in results.groupby(["data", "method"], sort=False):
        cells = [str(data), label(str(method))]
        for name in ("test_accuracy", "test_macro_f1", "test_loss"):
            values = group[name].dropna()
            spread = f" +- {values.std():.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}" if len(values) else "")
        body.append([*cells, f"{group['seconds'].mean():.1f}"])
    return header, body


def finish(c: Comparison, rows: list[dict[str, Any]]) -> None:
    """Write results.csv and report.md, and print the table."""
    place = c.options.folder
    results = pd.DataFrame(sorted(rows, key=rank))
    with folder.replacing(place / folder.CSV) as temporary:
        results.to_csv(temporary, index=False)
    header, body = summary(results)
    task_runs.print_table(header, body)
    lines = [
        "# Classification",
        "",
        f"    {c.record['command']}",
        "",
        markdown_table(header, body),
        "",
    ]
    if importlib.util.find_spec("matplotlib"):
        _draw(place / "accuracy.png", results)
        lines += ["![](accuracy.png)", ""]
    with folder.replacing(place / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    print(f"report: {place / 'report.md'}")


def _draw(file: Path, results: pd.DataFrame) -> None:
    names = results["data"].unique()
    figure, axes = new_figure(7, 2.5 * len(names), nrows=len(names), squeeze=False)
    for ax, name in zip(axes[:, 0], names, strict=True):
        means = (
            results[results["data"] == name].groupby("method", sort=False)["test_accuracy"].mean()
        )
        ax.barh([label(method) for method in means.index], means.to_numpy(), color="#0072B2")
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.set_title(f"{name}: test accuracy", fontsize="medium", loc="left")
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.classification`; returns the exit code."""

    return task_runs.main(argv, parse, resolve, plan=plan, compare=compare, finish=finish)


if __name__ == "__main__":
    launch.leave(main())
