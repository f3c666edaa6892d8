"""Common parts of the experiments on imputation, anomaly detection and classification: options, and
cells that never run twice.

A comparison is a folder, see `experiments.folder`; a cell is one run of it, with a folder of its
own in cells/.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import flags, folder, launch, lists
from ltsm_jax import hosts, training
from ltsm_jax.data import DataError
from ltsm_jax.methods import binding
from ltsm_jax.methods.strategies import MIXED, STRATEGIES
from ltsm_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every such comparison."""

    program: ClassVar[str]
    data: Annotated[tuple[str, ...], flags.words()]
    """files, folders or names, separated by commas"""
    model: Annotated[str, flags.text("MODEL")]
    """shipped name, model folder, original checkpoint, or hub name owner/name[@revision]"""
    accept_license: bool = False
    """accept a licence that forbids commercial use; asked once for each repository"""
    methods: Annotated[
        tuple[str, ...],
        flags.names(tuple(STRATEGIES)),
        flags.described(f"what to compare, of {', '.join(STRATEGIES)}"),
    ] = ("zero_shot", "ff", "sff", "tfs")
    alpha: Annotated[float, flags.number(0, 1, says="between 0 and 1")] = 0.7
    """weight of the pretrained side, for the methods that mix; column `mix`"""
    seeds: Annotated[
        tuple[int, ...], flags.wholes(0, 2**32 - 1, says="between 0 and 2**32 - 1")
    ] = (0,)
    """a run for each; what has no randomness runs once"""
    epochs: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """passes over what is trained on"""
    batch_size: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """windows or examples per step"""
    lr: Annotated[
        float | None, flags.number(flags.TINY, flags.HUGE, says="positive", unset="recipe")
    ] = None
    """learning rate"""
    out: Annotated[str | None, flags.text("FOLDER")] = None
    """folder of the results; by default runs/EXPERIMENT-DATA-MODEL"""
    plan: bool = False
    """print what would run, and stop"""

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        parts = [Path(name).name.split(".")[0] for name in (self.data[0], self.model)]
        name = self.program.rpartition(".")[2]
        return Path(self.out or f"runs/{name}-{'-'.join(parts)}").expanduser()

    @property
    def model_name(self) -> str:
        """The model, as results.csv has it."""
        return Path(self.model).name

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        if "alpha" in given and not set(self.methods) & set(MIXED):
            return [f"--alpha is for {', '.join(MIXED)}, and none of them is among --methods"]
        return []

    def command(self) -> str:
        """Write the command line that asks for the same."""
        place = dataclasses.replace(self, out=str(self.folder))
        return flags.command(place, always=("data", "model", "out"))

    def config(self, model: Model) -> training.TrainConfig:
        """Give the model's recipe with what the options change."""
        asked = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
        given = {name: value for name, value in asked.items() if value is not None}
        return binding.train_config(model, **given)

    def words_of(self, config: training.TrainConfig) -> str:
        """Say how long and how fast is trained."""
        return f"{config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g}"

    def mix_of(self, method: str) -> float | None:
        """Give the weight of the pretrained side of a method; None for those without."""
        return self.alpha if method in MIXED else None


class Cell(Protocol):
    """One row of results.csv."""

    @property
    def name(self) -> str:
        """Its folder."""
        ...


class Comparison(Protocol):
    """An experiment, resolved and checked."""

    @property
    def options(self) -> Any:
        """Its `Options`."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """Content of run.json: experiment, settings (all that decides a number), model, command."""
        ...


class Outcome(NamedTuple):
    """Result of a cell.

    row: of results.csv. said: its scores in words. arrays: to keep beside it, by file name (.npz).
    """

    row: dict[str, Any]
    said: str
    arrays: Mapping[str, Mapping[str, Any]] = {}


C = TypeVar("C", bound=Comparison)
K = TypeVar("K", bound=Cell)


def facts() -> dict[str, str]:
    """Give the columns that say what made a row."""
    return {
        "git_commit": folder.git_commit(),
        "versions": folder.versions(),
        "device": folder.device(),
    }


def waiting(c: Comparison, cells: Sequence[K]) -> list[K]:
    """Give the cells that have no result yet."""
    return [cell for cell in cells if not folder.finished(c.options.folder, cell.name)]


def run_cells(
    c: Comparison,
    cells: Sequence[K],
    run_cell: Callable[[K], Outcome],
    place: tuple[int, int] | None = None,
) -> list[str]:
    """Run every cell that has no result yet.

    place: number of the first cell, and how many there are, for the terminal.
    Returns: what failed (a run that diverged does not stop the others), one line each.
    """
    failures = []
    first, total = place or (1, len(cells))
    for number, cell in enumerate(cells, first):
        text = f"[{number}/{total}] {cell.name}"
        hosts.stop_if_asked(f"before {text}")
        if folder.finished(c.options.folder, cell.name):
            continue
        try:
            outcome = run_cell(cell)
        except (training.NonFiniteError, DataError) as error:
            failures.append(f"{text}: {error}")
            launch.say(failures[-1])
            continue
        _keep(c, cell, outcome)
        launch.say(f"{text}: {outcome.said}, {outcome.row['seconds']:.1f} s")
    return failures


def _keep(c: Comparison, cell: Cell, outcome: Outcome) -> None:
    """Write what a cell left; result.json last, so that a cell that has one is finished."""
    place = c.options.folder / "cells" / cell.name
    place.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, arrays in outcome.arrays.items():
        with folder.replacing(place / name) as temporary:
            np.savez(temporary, **arrays)
        files[name] = folder.file_digest(place / name)
    found = {"row": outcome.row, "of": folder.identity(c.record), "files": files}
    folder.write_json(place / folder.RESULT, found)


def main(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Any],
    resolve: Callable[[Any], C],
    plan: Callable[[C], str],
    compare: Callable[[C], list[str]],
    finish: Callable[[C, list[dict[str, Any]]], None],
) -> int:
    """An experiment from its flags to its report; returns its exit code (`launch.guarded`).

    Several --model or --few-shot run one after the other, see `lists`.

    parse, resolve, plan: flags to options, to a comparison, to words. compare: runs the cells and
    says what failed.
    finish: writes results.csv and report.md from the rows of all finished cells, and prints the
    table.
    """

    words = sys.argv[1:] if argv is None else argv

    def one(words: Sequence[str]) -> int:
        return main(words, parse, resolve, plan=plan, compare=compare, finish=finish)

    def work() -> int:
        out = lists.out_of(words, "runs/several")
        several = lists.run(words, out, one, names=("--model", "--few-shot"))
        if several is not None:
            return several
        options = parse(words)
        with launch.started(flags.Hosts()):
            c = resolve(options)
            launch.say(plan(c))
            if options.plan:
                return 0
            place = options.folder
            folder.check(place, c.record)
            with folder.held(place):
                for problem in folder.tidy(place):
                    launch.say(f"not believed, and run again: {problem}")
                folder.write_json(place / folder.RUN, c.record)
                failures = compare(c)
                rows = [found["row"] for found in folder.results(place)[0].values()]
                if rows:
                    finish(c, rows)
            for failure in failures:
                print(f"failed: {failure}", file=sys.stderr)
            return 1 if failures or not rows else 0

    return launch.guarded(work)


def print_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    table = Table(*header)
    for row in body:
        table.add_row(*row)
    Console(width=140).print(table)
