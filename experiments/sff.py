"""Does Smoothed Full Fine-tuning beat its rivals?

One model, one data set, every method through the same code.

Run:   python -m experiments.sff --data ETTh1 --model timer-tiny \\
           --methods zero_shot,ff,tfs,sff,lp,lpff --alpha 0.7 --seeds 0,1,2
       python -m experiments.sff --data ETTh1 --alpha 0.3,0.5,0.7,0.9
       python -m experiments.sff --data my.csv --target sales --horizon 48
Cost:  the first command takes 40 minutes on 2 CPU cores; --few-shot 0.1 and
       --epochs 4 bring a method and seed of it down to half a minute.
Gives: a table on the terminal and, in the folder of --out: results.csv (a row
       per method, alpha and seed), report.md with pictures, and for each run
       cells/<method>-seed<n>/ with the tuned model, its history and example
       forecasts. The same command again goes on where the last one stopped;
       finished cells are not run again. SIGTERM stops it after a checkpoint,
       exit code 75. On several hosts: the same command on each.
Lanes: runs that differ in alpha, seed, learning rate or start alone are
       trained as lanes of one program where a few timed steps find that
       quicker (--lanes auto); on: always, off: never. A row then comes when
       all lanes are trained. A killed sweep goes on from lanes/.

Differs from the released script (Meteor-Stars/SFF): the next-token loss is
the default (--mode direct is theirs), the best-validation weights are
restored, tfs and sff share one random model, borders of ETTm1 and PEMS and
the few-shot subset are correct (--quirks etm1_typo,pems_ratio,few_shot_stride
for theirs).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from rich.console import Console

from experiments import cells, flags, launch, report
from experiments.cells import Comparison
from experiments.report import cell_name
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.strategies import OPTIONS, STRATEGIES, Strategy, strategy

METHODS = ("zero_shot", "ff", "tfs", "sff", "lp", "lpff")
OWN = {  # settings of one method
    "l2sp_weight": "l2sp",
    "lora_rank": "lora",
    "sam_rho": "sam",
    "ema_decay": "ema",
    "swa_share": "swa",
    "last_layers": "last_k",
    "anchor_weight": "anchor",
    "mixout_share": "mixout",
    "msft_scales": "msft",
}


@dataclasses.dataclass(frozen=True)
class Options(flags.Options):
    """Options of this comparison."""

    program: ClassVar[str] = "experiments.sff"
    methods: Annotated[
        tuple[str, ...],
        flags.names(tuple(STRATEGIES)),
        flags.described(f"what to compare, of {', '.join(STRATEGIES)}"),
    ] = METHODS
    l2sp_weight: Annotated[float, flags.number(flags.TINY, flags.HUGE, says="positive")] = 0.1
    """weight of the penalty of l2sp"""
    lora_rank: Annotated[int, flags.whole(1)] = 4
    """rank of the adapters of lora"""
    sam_rho: Annotated[float, flags.number(flags.TINY, flags.HUGE, says="positive")] = 0.05
    """how far up the gradient sam takes its own"""
    ema_decay: Annotated[float, flags.number(flags.TINY, flags.BELOW_1, says="between 0 and 1")] = (
        0.999
    )
    """decay of the average of ema"""
    swa_share: Annotated[float, flags.number(0, 1, says="a share from 0 to 1")] = 0.5
    """share of the epochs, the last ones, that swa averages"""
    last_layers: Annotated[int, flags.whole(1)] = 1
    """layers of each stack that last_k trains"""
    anchor_weight: Annotated[float, flags.number(flags.TINY, flags.HUGE, says="positive")] = 1.0
    """weight of the distance to the checkpoint's forecasts of anchor"""
    mixout_share: Annotated[
        float, flags.number(flags.TINY, flags.BELOW_1, says="between 0 and 1")
    ] = 0.1
    """share of the weights that mixout puts back in each step"""
    msft_scales: Annotated[int, flags.whole(1)] = 2
    """coarser scales that msft adds to the series"""
    curvature: Annotated[tuple[int, ...], flags.wholes(0, says="epochs, 0 for the start")] = ()
    """epochs after which the curvature of the training loss is measured, 0: before training"""


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Raises: UsageError listing every bad flag."""
    return flags.parse(Options, argv, __doc__)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method, its alpha where it has one, a seed, and where settings are chosen its
    learning rate and the origin of its validation.
    """

    method: str
    alpha: float | None
    seed: int
    lr: float | None = None
    origin: int = 0

    @property
    def name(self) -> str:
        """Its folder."""
        return cell_name(self.method, self.alpha, self.seed, lr=self.lr, origin=self.origin)

    @property
    def label(self) -> str:
        """It in words."""
        return (
            f"{report.label(self.method, self.alpha)}{report.chosen_by(self.lr, self.origin)}, "
            f"seed {self.seed}"
        )

    @property
    def trains(self) -> bool:
        """Whether anything is trained in it."""
        return self.method != "zero_shot"


def resolve(options: Options) -> Comparison:
    """`cells.resolve`, with the settings that only this experiment has."""
    c = cells.resolve(options)
    own = {
        name: getattr(options, name) if method in options.methods else None
        for name, method in OWN.items()
    }
    own["curvature"] = ",".join(map(str, options.curvature)) or None
    return dataclasses.replace(c, settings=c.settings | own, optional=tuple(own))


def cells_of(options: Options) -> tuple[Cell, ...]:
    """Every run that the options ask for; where settings are chosen, those of the first seed, which
    choose.
    """
    if options.over:
        return grid_cells(options, options.seeds[:1])
    every = itertools.product(options.tunings, options.seeds)
    return tuple(Cell(method, alpha, seed) for (method, alpha), seed in every)


def grid_cells(options: Options, seeds: Sequence[int]) -> tuple[Cell, ...]:
    """Every candidate of every arm at some seeds: at the first one at every origin, at others at
    the usual one.
    """
    found = []
    for method, alpha in options.tunings:
        several = strategy(method, alpha=0.5).phases  # nothing trained, nothing to choose
        for lr in options.lrs_of(method):
            for seed in seeds:
                origins = options.origins if several and seed == options.seeds[0] else 1
                found += [
                    Cell(method=method, alpha=alpha, seed=seed, lr=lr, origin=origin)
                    for origin in range(origins)
                ]
    return tuple(found)


def n_chosen(options: Options) -> int:
    """Count the runs that the seeds after the first one add where settings are chosen."""
    arms = {(m, None if options.choose_alpha else a) for m, a in options.tunings}
    return len(arms) * (len(options.seeds) - 1) if options.over else 0


def plan(c: Comparison) -> str:
    """Describe the runs that will follow."""
    runs, o = cells_of(c.options), c.options
    done = cells.finished(c, runs)
    text = (
        f"runs     {len(runs) + n_chosen(o)}: {', '.join(o.methods)} x seeds "
        f"{', '.join(map(str, o.seeds))}"
    )
    if o.over:
        blocks = f", mean of {o.origins} blocks" if o.origins > 1 else ""
        text += (
            f"; {len(runs)} at seed {o.seeds[0]}, which choose {' and '.join(o.over)} by "
            f"validation{blocks}"
        )
    return cells.plan(c, [text + (f"; {done} finished already" if done else "")])


def compare(c: Comparison, console: Console | None = None) -> list[str]:
    """Run every cell that has no result yet; after each, results.csv is whole. Then the report.

    Returns: what failed (a run that diverged does not stop the others), one line each.
    """
    work, o, console = functools.partial(run_cell, c), c.options, console or Console()
    start = functools.partial(begin, c)
    first = cells_of(o)
    if not o.over:
        return cells.run_cells(c, first, work, rank=report.rank, console=console, begin=start)
    total = len(first) + n_chosen(o)
    failures = cells.run_cells(
        c, first, work, rank=report.rank, console=console, place=(1, total), begin=start
    )
    others = grid_cells(o, o.seeds[1:])
    place = (len(first) + 1, total)
    return failures + cells.run_chosen(
        c, others, work, rank=report.rank, console=console, place=place, begin=start
    )


def strategy_of(options: Options, cell: Cell) -> Strategy:
    """Give the strategy that a cell runs."""
    own = {OPTIONS[method]: getattr(options, name) for name, method in OWN.items()}
    return strategy(cell.method, alpha=cell.alpha or 0.0, **own)


def curvature_of(options: Options, cell: Cell) -> tuple[int, ...]:
    """Give the epochs of a cell after which curvature is measured."""
    return () if cell.origin else options.curvature


def begin(c: Comparison, cell: Cell) -> Running:
    """Begin the training of a cell."""
    o = c.options
    return cells.begin(
        cells.at(c, cell), cell, strategy_of(o, cell), curvature_at=curvature_of(o, cell)
    )


def run_cell(c: Comparison, cell: Cell) -> dict[str, Any]:
    """Run one cell, or go on with it. Returns: its row of results.csv."""
    if cell.method == "zero_shot" and (twin := cells.twin_of(c, "zero_shot")):
        return cells.take_over(c, cell, twin)  # a checkpoint has no seed: score it once
    c, o = cells.at(c, cell), c.options
    chosen = strategy_of(o, cell)
    result = cells.tune(c, cell, chosen, curvature_at=curvature_of(o, cell))
    columns = {"method": cell.method, "alpha": cell.alpha, "seed": cell.seed}
    row = cells.row_of(c, columns, result.model, result=result)
    if o.over:
        row |= {"lr": cell.lr if "lr" in o.over else row["lr"], "origin": cell.origin}
    row |= {
        name: getattr(o, name) if cell.method == method else None for name, method in OWN.items()
    }
    start = cells.start_mse(c, chosen, cell.seed)
    final, mixes = (
        (result.model, result.params),
        [{"weight": w} | scores for w, scores in result.mixes.items()],
    )
    more = {"start_curvature": result.start_curvature, "mixes": mixes}
    cells.keep(c, cell, final, row=row, result=result, start_mse=start, **more)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.sff`; returns the exit code."""
    return cells.main(argv, parse, resolve, plan=plan, compare=compare, finish=_finish)


def _finish(folder: Path, by: str) -> None:
    report.print_table(folder, by=by)
    print(f"report: {report.write_report(folder, by)}")


if __name__ == "__main__":
    launch.leave(main())
