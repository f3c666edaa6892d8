"""Does Smoothed Full Fine-tuning beat its rivals?  One model, one data set, every method through the same code.

Run:    python -m experiments.sff --data ETTh1 --model timer-tiny --methods zero_shot,ff,tfs,sff,lp,lpff --alpha 0.7 \\
            --seeds 0,1,2 --horizon 96 --out runs/sff-etth1
        python -m experiments.sff --data ETTh1 --model timer-tiny --alpha 0.3,0.5,0.7,0.9 --out runs/sff-alpha
        python -m experiments.sff --data my.csv --target sales --horizon 48 --out runs/mine
Gives:  a table on the terminal and, in the folder of --out: results.csv (a row per method, alpha and seed), report.md
        with pictures, and cells/<method>-seed<n>/ with the tuned model, its training history and example forecasts.
        The same command again continues where the last one stopped; finished cells are not run again. SIGTERM stops
        it after a checkpoint, exit code 75. On several hosts: the same command on each, see `experiments/launch.py`.
Differs from the released script (Meteor-Stars/SFF): the next-token loss is the default (--mode direct is theirs), the
        best-validation weights are restored, tfs and sff share one random model, borders of ETTm1 and PEMS and the
        few-shot subset are correct (--quirks etm1_typo,pems_ratio,few_shot_stride for theirs).
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from experiments import cells, flags, report
from experiments.cells import Comparison
from experiments.flags import FLAGS, PARSERS, TINY, UsageError
from experiments.report import cell_name
from ltsm_jax.methods.strategies import STRATEGIES, strategy

METHODS = "zero_shot,ff,tfs,sff,lp,lpff"
OWN = {"l2sp_weight": "l2sp", "lora_rank": "lora"}  # settings of one method


@dataclasses.dataclass(frozen=True)
class Options(flags.Options):
    """The flags, checked one by one; None is "as the model's recipe has it"."""

    program: ClassVar[str] = "experiments.sff"
    methods: tuple[str, ...] = tuple(METHODS.split(","))
    l2sp_weight: float = 0.1
    lora_rank: int = 4


def parse(argv: Sequence[str]) -> Options:
    """Flags to options. Raises: UsageError listing every bad flag."""
    texts = FLAGS | {
        "methods": f"of {','.join(STRATEGIES)} [{METHODS}]",
        "alpha": "weight(s) of the pretrained side, for sff and noise [0.7]",
        "l2sp-weight": "of the l2sp penalty [0.1]",
        "lora-rank": "of the adapters of lora [4]",
    }
    parsers = PARSERS | {
        "methods": functools.partial(flags.names, tuple(STRATEGIES)),
        "l2sp-weight": functools.partial(flags.number, float, TINY, sys.float_info.max, "positive"),
        "lora-rank": functools.partial(flags.number, int, 1, sys.maxsize, "at least 1"),
    }
    values, problems = flags.read_flags(Options.program, __doc__, argv, texts, parsers)
    if problems := problems + flags.alpha_problems(values, Options.methods):
        raise UsageError("\n".join(problems))
    return Options(**values)


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

    @property
    def label(self) -> str:
        """It in words."""
        return f"{report.label(self.method, self.alpha)}, seed {self.seed}"


def resolve(options: Options) -> Comparison:
    """`cells.resolve`, with the settings that only this experiment has."""
    c = cells.resolve(options)
    own = {name: getattr(options, name) if method in options.methods else None for name, method in OWN.items()}
    return dataclasses.replace(c, settings=c.settings | own)


def cells_of(options: Options) -> tuple[Cell, ...]:
    """Every run that the options ask for."""
    return tuple(Cell(method, alpha, seed) for method, alpha in options.tunings for seed in options.seeds)


def plan(c: Comparison) -> str:
    """What will run, in words."""
    runs, o = cells_of(c.options), c.options
    done = cells.finished(c, runs)
    text = f"runs     {len(runs)}: {', '.join(o.methods)} x seeds {', '.join(map(str, o.seeds))}"
    return cells.plan(c, [text + (f"; {done} finished already" if done else "")])


def compare(c: Comparison, console: Console | None = None) -> list[str]:
    """Run every cell that has no result yet; after each, results.csv is whole. Then the report.

    Returns: what failed (a run that diverged does not stop the others), one line each.
    Raises: UsageError when the folder holds a comparison with other settings.
    """
    cells.claim(c, optional=tuple(OWN))
    order = {method: i for i, method in enumerate(STRATEGIES)}
    rank = lambda row: (order[row["method"]], row["alpha"] or 0.0, row["seed"])  # noqa: E731
    return cells.run_cells(c, cells_of(c.options), functools.partial(run_cell, c), rank, console or Console())


def run_cell(c: Comparison, cell: Cell) -> dict[str, Any]:
    """Run one cell, or go on with it. Returns: its row of results.csv."""
    if cell.method == "zero_shot" and (twin := cells.twin_of(c, "zero_shot-seed*")):
        return cells.take_over(c, cell, twin)  # a checkpoint has no seed: score it once
    o = c.options
    chosen = strategy(cell.method, alpha=cell.alpha or 0.0, l2_sp=o.l2sp_weight, lora_rank=o.lora_rank)
    result = cells.tune(c, cell, chosen)
    columns = {"method": cell.method, "alpha": cell.alpha, "seed": cell.seed}
    row = cells.row_of(c, columns, c.model, result)
    row |= {name: getattr(o, name) if cell.method == method else None for name, method in OWN.items()}
    cells.keep(c, cell, (c.model, result.params), row, result)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.sff`; returns the exit code."""
    return cells.run(argv, parse, resolve, plan, compare, _finish)


def _finish(folder: Path) -> None:
    report.print_table(folder)
    print(f"report: {report.write_report(folder)}")


if __name__ == "__main__":
    sys.exit(main())
