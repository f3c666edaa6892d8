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
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

import ltsm_jax
from experiments import flags, folder, launch, report
from ltsm_jax import hosts, storage, training
from ltsm_jax.data import DataError
from ltsm_jax.data.ts_files import LabelledExamples, read_problem
from ltsm_jax.methods import binding, run
from ltsm_jax.methods.strategies import MIXED, STRATEGIES, strategy
from ltsm_jax.models import Model
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table
from ltsm_jax.tasks import random_kernels
from ltsm_jax.tasks.classification import Classification, Examples, Parts, summarise

METHODS = ("ff", "sff", "tfs", "lp")
BASELINES = {"most_frequent": "most frequent class", "random_kernels": "random kernels + ridge"}
HELD_OUT = 0.2
TASK = Classification()


@dataclasses.dataclass(frozen=True)
class Options:
    """What this comparison asks for."""

    program: ClassVar[str] = "experiments.classification"
    data: Annotated[tuple[str, ...], flags.words()]
    """<name>_TRAIN.ts files or folders of a pair, separated by commas"""
    model: Annotated[str, flags.text("MODEL")]
    """model folder, original checkpoint, or hub name owner/name[@revision]"""
    accept_license: bool = False
    """accept a licence that forbids commercial use; asked once for each repository"""
    methods: Annotated[
        tuple[str, ...],
        flags.names(tuple(STRATEGIES)),
        flags.described(f"what to compare, of {', '.join(STRATEGIES)}"),
    ] = METHODS
    alpha: Annotated[float, flags.number(0, 1, says="between 0 and 1")] = 0.7
    """weight of the pretrained side, for the methods that mix"""
    seeds: Annotated[tuple[int, ...], flags.wholes(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = (0,)
    """a run for each, with its own head and its own kernels"""
    epochs: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """passes over the training examples"""
    batch_size: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """examples per step"""
    lr: Annotated[float | None, flags.number(flags.TINY, flags.HUGE, says="positive", unset="recipe")] = None
    """learning rate"""
    out: Annotated[str | None, flags.text("FOLDER")] = None
    """folder of the results; by default runs/classification-MODEL"""

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        return Path(self.out or f"runs/classification-{Path(self.model).name.split('.')[0]}").expanduser()

    def command(self) -> str:
        """Write the command line that asks for the same."""
        place = dataclasses.replace(self, out=str(self.folder))
        return flags.command(place, always=("data", "model", "out"))


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A data set: all training examples, and the parts that a model is tuned and scored on."""

    name: str
    train: LabelledExamples
    parts: Parts


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
    asked = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    config = binding.train_config(model, **{name: value for name, value in asked.items() if value is not None})
    digests = [storage.sha256_of({"x": p.train.values, "test": p.parts.test})[:16] for p in problems]
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
    return Comparison(options, model, params, problems, config, record)


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
    """Number the examples to hold out, [k]: the share of each class, evenly spread, but never all of one.

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
    row = {"data": problem.name, "model": Path(c.options.model).name, "method": method, "seed": seed}
    if method == "most_frequent":
        test = TASK.baselines(c.model, parts, "test")["most frequent class"]
    elif method == "random_kernels":
        train = problem.train
        guess = random_kernels.classify(train.values, train.labels, np.asarray(parts.test.values), seed)
        test = summarise(guess, labels)
    else:
        model, params = with_head(c, problem, seed)
        result = run.run(
            model,
            params,
            strategy(method, alpha=c.options.alpha),
            parts,
            task=TASK,
            seed=seed,
            config=c.config,
            label=f"{problem.name}, {method}",
            show_progress=False,
        )
        assert result.test is not None, "it is asked for"
        test = result.test
        row |= {f"val_{name}": result.val[name] for name in ("loss", "accuracy", "macro_f1")}
        row |= {"best_epoch": result.best_epoch, "alpha": c.options.alpha if method in MIXED else None}
    row |= {f"test_{name}": test.get(name) for name in ("loss", "accuracy", "macro_f1")}
    row |= {"examples": len(labels), "classes": len(problem.train.classes)}
    row |= {"seconds": round(time.perf_counter() - began, 3)}
    return row | {"git_commit": folder.git_commit(), "versions": folder.versions(), "device": folder.device()}


def compare(c: Comparison) -> tuple[list[dict[str, Any]], list[str]]:
    """Run all that has no result yet. Returns: every row, and what failed, a line each."""
    place, failures = c.options.folder, []
    for problem in c.problems:
        for method in (*c.options.methods, *BASELINES):
            seeds = c.options.seeds[:1] if method == "most_frequent" else c.options.seeds
            for seed in seeds:
                name = f"{problem.name}-{method}-seed{seed}"
                hosts.stop_if_asked(f"before {name}")
                if folder.finished(place, name):
                    continue
                try:
                    row = score(c, problem, method, seed)
                except (training.NonFiniteError, DataError) as error:
                    failures.append(f"{name}: {error}")
                    continue
                (place / "cells" / name).mkdir(parents=True, exist_ok=True)
                found = {"row": row, "of": folder.identity(c.record)}
                folder.write_json(place / "cells" / name / folder.RESULT, found)
                launch.say(f"{name}: test accuracy {row['test_accuracy']:.3f}, {row['seconds']:.1f} s")
    return [found["row"] for found in folder.results(place)[0].values()], failures


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
    table = Table(*header)
    for row in body:
        table.add_row(*row)
    Console().print(table)
    lines = ["# Classification", "", f"    {c.record['command']}", "", markdown_table(header, body), ""]
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
        means = results[results["data"] == name].groupby("method", sort=False)["test_accuracy"].mean()
        ax.barh([label(method) for method in means.index], means.to_numpy(), color="#0072B2")
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.set_title(f"{name}: test accuracy", fontsize="medium", loc="left")
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.classification`; returns the exit code."""

    def work() -> int:
        options = parse(sys.argv[1:] if argv is None else argv)
        with launch.started(flags.Hosts()):
            c = resolve(options)
            folder.check(options.folder, c.record)
            with folder.held(options.folder):
                for problem in folder.tidy(options.folder):
                    launch.say(f"not believed, and run again: {problem}")
                folder.write_json(options.folder / folder.RUN, c.record)
                rows, failures = compare(c)
                if rows:
                    finish(c, rows)
            for failure in failures:
                print(f"failed: {failure}", file=sys.stderr)
            return 1 if failures or not rows else 0

    return launch.guarded(work)


if __name__ == "__main__":
    launch.leave(main())
