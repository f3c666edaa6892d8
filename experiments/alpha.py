"""Which alpha, and which way of mixing, for smoothed fine-tuning?

One table of every choice: the plain mix at a grid of alphas, alphas by group
of leaves, by the curvature of each layer and by the gradient of the validation
loss, mixes that keep the norms of tensors or leave head and embedding alone,
and the controls (shrinking, random part and Gaussian noise alone).

Run:   python -m experiments.alpha --data ETTh1 --model timer-tiny --seeds 0
       python -m experiments.alpha --data ETTh1 --model timer-tiny \\
           --methods zero_shot,ff,sff,sff_norm,groups --alpha 0.5,0.7,0.9 \\
           --few-shot 0.1 --epochs 4 --seeds 0,1,2 --curvature
Cost:  for each choice a run of --epochs, and with a search that of its trials:
       `short` one and `groups` about fifteen trainings of --search-epochs,
       `learned` about 25 gradients for each of 20 outer steps. The first
       command takes hours on 2 CPU cores; --few-shot 0.1 --epochs 4 brings it
       down to a quarter of an hour.
Gives: a table on the terminal and, in the folder of --out: results.csv (a row
       per choice, alpha and seed), report.md with a picture, and for each run
       cells/<choice>-seed<n>/ with the tuned model and, of a search, its
       trials in choice.json. The same command again goes on where the last
       one stopped.

Lanes: runs that are alike but for start, seed or alpha as lanes of one
       program (--lanes), see experiments.sff; the searches come before that,
       one after the other.

Validation chooses everything; the test part is scored at the end and chooses
nothing. `start` is the validation error of the mix before the first step.
"""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import dataclasses
import functools
import importlib.util
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import pandas as pd
from rich.console import Console

from experiments import cells, flags, folder, launch, report
from experiments.cells import Comparison
from ltsm_jax import curvature, hosts, landscape, storage, training
from ltsm_jax.methods.alpha import SAMPLE, choose_alpha, describe
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.starts import Interpolated, groups_of, prepared, start_params
from ltsm_jax.methods.strategies import MIXED, STRATEGIES, Strategy, sff, strategy
from ltsm_jax.plotting import new_figure
from ltsm_jax.sharding import Placement

SEARCHES = {
    "short": "SFF, alpha by short trainings",
    "groups": "SFF, alpha by group",
    "layers": "SFF, alpha by curvature of layers",
    "learned": "SFF, alpha by gradient",
}
METHODS = ("zero_shot", "ff", *MIXED, *SEARCHES)
CHOICE = "choice.json"


@dataclasses.dataclass(frozen=True)
class Options(flags.Options):
    """Options of the comparison."""

    program: ClassVar[str] = "experiments.alpha"
    methods: Annotated[
        tuple[str, ...],
        flags.names((*STRATEGIES, *SEARCHES)),
        flags.described(f"what to compare, of {', '.join((*STRATEGIES, *SEARCHES))}"),
    ] = METHODS
    alpha: Annotated[
        tuple[float, ...],
        flags.numbers(0, 1, says="between 0 and 1, the weight of the pretrained side"),
    ] = (0.5, 0.7, 0.9)
    """grid of sff, short and groups (the last two also try 1)"""
    at: Annotated[float, flags.number(0, 1, says="between 0 and 1")] = 0.7
    """alpha of all other mixes, and the one that groups, layers and learned begin with"""
    search_epochs: Annotated[int, flags.whole(0)] = 1
    """epochs of each trial of short and groups; 0: the error of the start decides"""
    outer_steps: Annotated[int, flags.whole(1)] = 20
    """steps of learned on the validation loss"""
    inner_steps: Annotated[int, flags.whole(1)] = 8
    """steps of training before each of them"""
    samples: Annotated[int, flags.whole(1)] = 8
    """products with the Hessian for layers"""
    curvature: bool = False
    """add the top eigenvalue of the Hessian at each start, of the error of 256 training windows"""

    @property
    def tunings(self) -> tuple[tuple[str, float | None], ...]:
        """(choice, alpha) of every kind of run; alpha None where a choice has none or looks
        for it.
        """
        found: list[tuple[str, float | None]] = []
        for method in self.methods:
            if method == "sff":
                found += [(method, alpha) for alpha in self.alpha]
            elif method in MIXED:
                found.append((method, self.at))
            else:
                found.append((method, None))
        return tuple(found)

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        found = super().problems(given - {"alpha"})
        if self.over or self.origins > 1:
            found.append("--choose-alpha, --origins and several --lr are for experiments.sff")
        if self.report_by != "validation":
            found.append("--report-by is for experiments.sff: this table goes by validation")
        if self.at == 1 and "layers" in self.methods:
            found.append("--at 1 mixes nothing: layers has nothing to spread")
        return found


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Raises: UsageError listing every bad flag."""
    return flags.parse(Options, argv, __doc__)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a choice, its alpha where it has one, and a seed."""

    method: str
    alpha: float | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return report.cell_name(self.method, self.alpha, self.seed)

    @property
    def label(self) -> str:
        """It in words."""
        return f"{report.label(self.method, self.alpha)}, seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether anything is trained in it."""
        return self.method != "zero_shot"


OWN = ("at", "search_epochs", "outer_steps", "inner_steps", "samples")  # settings of the searches


def resolve(options: Options) -> Comparison:
    """`cells.resolve`, with the settings that only this experiment has."""
    c = cells.resolve(options)
    own: dict[str, Any] = {name: getattr(options, name) for name in OWN}
    own |= {"grid": list(options.alpha), "curvature": options.curvature}
    return dataclasses.replace(c, settings=c.settings | own)


def cells_of(options: Options) -> tuple[Cell, ...]:
    """Every run that the options ask for."""
    every = itertools.product(options.tunings, options.seeds)
    return tuple(Cell(method, alpha, seed) for (method, alpha), seed in every)


def plan(c: Comparison) -> str:
    """Describe the runs that will follow."""
    runs, o = cells_of(c.options), c.options
    done = cells.finished(c, runs)
    text = f"runs     {len(runs)}: {', '.join(o.methods)} x seeds {', '.join(map(str, o.seeds))}"
    return cells.plan(c, [text + (f"; {done} finished already" if done else "")])


def compare(c: Comparison, console: Console | None = None) -> list[str]:
    """Run every cell that has no result yet; after each, results.csv is whole. Returns: what
    failed, one line each.
    """
    work, start = functools.partial(run_cell, c), functools.partial(begin, c)
    return cells.run_cells(
        c, cells_of(c.options), work, rank=rank, console=console or Console(), begin=start
    )


def begin(c: Comparison, cell: Cell) -> Running:
    """Begin the training of a cell; where its alpha has to be looked for, that comes first."""
    return cells.begin(c, cell, strategy_of(c, cell)[0])


def run_cell(c: Comparison, cell: Cell) -> dict[str, Any]:
    """Run one cell, or go on with it. Returns: its row of results.csv."""
    if cell.method == "zero_shot" and (twin := cells.twin_of(c, "zero_shot")):
        return cells.take_over(c, cell, twin)
    chosen, seconds = strategy_of(c, cell)
    result = cells.tune(c, cell, chosen)

    start = chosen.start
    alphas = dict(start.alphas) if isinstance(start, Interpolated) else {}
    columns = {"method": cell.method, "alpha": cell.alpha, "seed": cell.seed}
    columns["alphas"] = "" if chosen.alpha is None else describe(chosen.alpha, alphas)
    begin = cells.start_mse(c, chosen, cell.seed)
    columns["start_val_mse"] = result.val["mse"] if begin is None else begin
    columns["search_seconds"] = seconds
    columns["top_eigenvalue"] = (
        top_eigenvalue(c, chosen, cell.seed) if c.options.curvature else None
    )
    row = cells.row_of(c, columns, result.model, result=result)
    cells.keep(c, cell, (result.model, result.params), row=row, result=result, start_mse=begin)
    return row


def strategy_of(c: Comparison, cell: Cell) -> tuple[Strategy, float]:
    """The strategy of a cell, and the seconds that looking for it took; one that was found before
    is not looked for.
    """
    if cell.method not in SEARCHES:
        return strategy(cell.method, alpha=1.0 if cell.alpha is None else cell.alpha), 0.0
    file = c.folder / "cells" / cell.name / CHOICE
    if not hosts.on_first(file.is_file):
        record = search(c, cell)
        hosts.on_first(file.parent.mkdir, exist_ok=True)
        hosts.on_first(folder.write_json, file, record)
    record = hosts.on_first(storage.read_record, file)
    return sff(record["alpha"], alphas=dict(record["alphas"])), record["seconds"]


def search(c: Comparison, cell: Cell) -> dict[str, Any]:
    """Look for the alphas of a cell. Returns: alpha, alphas, seconds and the trials."""
    o, began = c.options, time.monotonic()
    how: dict[str, Any] = {"by": cell.method, "epochs": 0, "grid": (o.at,)}
    if cell.method in ("short", "groups"):
        grid = o.alpha if 1.0 in o.alpha else (*o.alpha, 1.0)
        how = {
            "by": "grid" if cell.method == "short" else "groups",
            "epochs": o.search_epochs,
            "grid": grid,
        }
    found = choose_alpha(
        c.model,
        c.params,
        c.splits,
        **how,
        alpha=o.at,
        task=c.task,
        seed=cell.seed,
        config=c.config,
        samples=o.samples,
        outer_steps=o.outer_steps,
        inner_steps=o.inner_steps,
    )
    start = found.strategy.start
    assert isinstance(start, Interpolated), "it has an alpha"
    launch.say(str(found))
    return {
        "alpha": start.alpha,
        "alphas": [list(pair) for pair in start.alphas],
        "seconds": round(time.monotonic() - began, 1),
        "trials": found.table(),
        "steps": list(found.steps),
    }


def top_eigenvalue(c: Comparison, chosen: Strategy, seed: int) -> float:
    """Largest eigenvalue of the Hessian of the forecast's error on training windows, at the start
    of a strategy.
    """
    key = training.keys(seed)["aux"]
    model, params = prepared(chosen, c.model, c.params, aux_key=key)
    params = start_params(chosen, model, params, aux_key=key)
    loss = landscape.split_loss(
        model, c.splits.train, sample=SAMPLE, task=c.task, placement=Placement.of(params)
    )
    moving = groups_of(model, params)
    return float(
        curvature.top_eigenvalues(
            loss, params, 1, key=jax.random.key(seed), only=moving.__contains__
        )[0]
    )


# --------------------------------------------------------------------------------------------------
# report


def rank(row: dict[str, Any]) -> Any:
    """The order of results.csv."""
    return [*STRATEGIES, *SEARCHES].index(row["method"]), row["alpha"] or 0.0, row["seed"]


NUMBERS = ("start_val_mse", "val_mse", "test_mse", "search_seconds", "seconds", "top_eigenvalue")


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """One row per choice and alpha: means over seeds, standard deviation of the test MSE, alphas of
    the first seed.
    """
    full = results[results["method"] == "ff"].set_index("seed")["test_mse"]
    rows = []
    for (method, alpha), group in results.groupby(["method", "alpha"], sort=False, dropna=False):
        row: dict[str, Any] = {"method": method, "alpha": alpha, "seeds": len(group)}
        alphas = group["alphas"].iloc[0]
        if not isinstance(alphas, str):  # a column of plain numbers, or an empty cell
            alphas = "" if pd.isna(alphas) else f"{alphas:g}"
        row["alphas"] = alphas
        row |= {name: group[name].mean() for name in NUMBERS}
        fixed = report.is_fixed(group)
        row["test_mse_std"] = float("nan") if fixed else group["test_mse"].std()
        change = group.set_index("seed")["test_mse"] / full - 1
        row["vs_ff"] = float("nan") if method == "ff" else 100 * change.mean()
        rows.append(row)
    return pd.DataFrame(rows)


def table(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table of choices."""
    header = [
        "choice",
        "alpha",
        "start",
        "val MSE",
        "test MSE",
        "vs FF, %",
        "search, s",
        "training, s",
    ]
    curved = summary["top_eigenvalue"].notna().any()
    body = []
    for r in summary.itertuples():
        line = [
            SEARCHES.get(r.method) or report.NAMES.get(r.method, r.method),
            r.alphas,
            f"{r.start_val_mse:.4f}",
            f"{r.val_mse:.4f}",
            report.spread(r.test_mse, r.test_mse_std),
            "" if pd.isna(r.vs_ff) else f"{r.vs_ff:+.2f}",
            f"{r.search_seconds:.0f}",
            f"{r.seconds:.0f}",
        ]
        body.append([*line, f"{r.top_eigenvalue:.2f}"] if curved else line)
    return [*header, "top eigenvalue"] if curved else header, body


def verdict(summary: pd.DataFrame) -> list[str]:
    """Say what validation picks of all rows, and of the grid, and what that is on the test part."""
    lines = []
    grid = summary[summary["method"].isin(("ff", "sff"))]
    for text, rows in (("Of everything", summary), ("Of the grid, with FF as alpha 1,", grid)):
        if len(rows):
            best = rows.loc[rows["val_mse"].idxmin()]
            alpha = None if pd.isna(best.alpha) else best.alpha
            name = SEARCHES.get(best.method) or report.label(best.method, alpha)
            against = "" if pd.isna(best.vs_ff) else f" ({best.vs_ff:+.2f} % against FF)"
            lines.append(f"{text} validation picks {name}: test MSE {best.test_mse:.4f}{against}.")
    return lines


def write_report(place: Path) -> Path:
    """Write report.md, and its picture where matplotlib is installed."""
    found = report.read_folder(place, rank)
    summary, s = summarise(found.table), found.run["settings"]
    pictures = []
    if importlib.util.find_spec("matplotlib"):
        (place / "plots").mkdir(exist_ok=True)
        _draw(summary, place / "plots" / "choices.png")
        text = (
            "Validation error of each start (circle) and after tuning (square); test error after "
            "tuning (diamond)."
        )
        pictures.append(("choices", text))
    lines = [f"# Choices of alpha, {s['data']}, {s['model']}, {s['context']} -> {s['horizon']}", ""]
    lines += [f"- {line}" for line in verdict(summary)]
    lines += ["", report.markdown_table(*table(summary)), ""]
    lines.append(
        "`start` is the validation MSE before the first step, `val MSE` that of the best epoch, "
        "`test MSE` of the same weights; means over seeds, ± standard deviation. `vs FF` is the "
        "change of test MSE, seed by seed. `search` is the time that looking for alpha took. "
        "Alphas are those of the first seed."
    )
    notes = [f"not believed, and left out: {text}" for text in found.damaged]
    for cell in found.cells:
        notes += [f"{cell['method']}, seed {cell['seed']}: {text}" for text in cell["warnings"]]
    if notes:
        lines += ["", "## Look at this", "", *[f"- {note}" for note in notes]]
    lines += report.picture_lines(pictures, found.run["command"])
    lines += report.made_lines(found.run, found.table)
    return report.write_text(place / "report.md", lines)


def _draw(summary: pd.DataFrame, path: Path) -> None:
    figure, ax = new_figure(8, 1.2 + 0.3 * len(summary))
    places = list(range(len(summary)))[::-1]
    names = []
    for r in summary.itertuples():
        alpha = None if pd.isna(r.alpha) else r.alpha
        names.append(SEARCHES.get(r.method) or report.label(r.method, alpha))
    # A start that is far off would squeeze all others together: it lies at the edge.
    far = report.FAR * summary["val_mse"].min()
    starts = summary["start_val_mse"].clip(upper=far)
    ax.plot(starts, places, "o", color="#555555", fillstyle="none", label="validation, start")
    ax.plot(summary["val_mse"], places, "s", color="#0072B2", label="validation, tuned")
    ax.plot(summary["test_mse"], places, "D", color="#D55E00", label="test, tuned")
    ax.set_yticks(places, names)
    ax.set_xlabel(f"MSE {report.SCALED}", fontsize=9)
    ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside upper center")
    figure.savefig(path)


def _finish(place: Path, by: str) -> None:
    del by  # always validation
    found = report.read_folder(place, rank)
    summary, s = summarise(found.table), found.run["settings"]
    header, body = table(summary)
    title = f"{s['data']}, {s['model']}, {s['context']} -> {s['horizon']}, {s['mode']}"
    caption = "mean over seeds, ± standard deviation"
    console = Console()
    for part in report.fitted(
        header, body, [None] * len(body), title=title, caption=caption, console=console
    ):
        console.print(part)
    for line in verdict(summary):
        console.print(line, highlight=False)
    print(f"report: {write_report(place)}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.alpha`; returns the exit code."""
    return cells.main(argv, parse, resolve, plan=plan, compare=compare, finish=_finish)


if __name__ == "__main__":
    launch.leave(main())
