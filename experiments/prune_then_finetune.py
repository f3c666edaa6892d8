"""Is a pruned and then fine-tuned model as good as the whole one?

And how much smaller and faster is it? Pruning is for the data set at hand.

Run:   python -m experiments.prune_then_finetune --data ETTh1 \\
           --model timer-tiny --ratios 0.1,0.3,0.5,0.7 --ema 0.2,0.5 \\
           --methods ff,sff --seeds 0,1,2
       python -m experiments.prune_then_finetune --data ETTh1 \\
           --model timer-tiny --ratio 0.05,0.1,0.2 --prune-epochs 10
Cost:  about an hour on 2 CPU cores, by its parts: two thirds of it is
       fine-tuning. --few-shot 0.1 --epochs 3 take a tenth of that.
Arms:  zero_shot, the checkpoint; ff, sff, ...: fine-tuned whole; pruned:
       masks, no training; pruned+ff, pruned+sff, ...: the same fine-tuning,
       budget, data order and dropout from the same weights, with the masks.
       --ratio: shares pruned per epoch, a pruning run for each, as the paper
       has it and the default. --ratios: shares of all channels, cut from one
       pruning run per seed and EMA, so that masks are nested and cheap; they
       are not those of a run for each share (--ratio is then that of the one
       run). Ratio and EMA are chosen by the validation MSE of the pruned model
       that is not yet fine-tuned, mean over seeds; with --tune validated by
       that of the fine-tuned one at the first seed, for each method.
Gives: a table on the terminal and, in the folder of --out: results.csv (a row
       per arm, ratio, EMA and seed), choice.json, redundancy.json, report.md
       with pictures; masks/<run>/ of every pruning run; cells/<name>/ with the
       model, of pruned arms without all that can be taken out. The same
       command again goes on where the last one stopped; finished cells and
       pruning runs are not run again. SIGTERM stops it after a checkpoint,
       exit code 75. On several hosts: the same command on each.
Times: `predict` of one window per variate, compiled, of the model with parts
       taken out and of the whole one in turns, whole on one device of the
       first host, whatever --mesh is; latencies are means without the first
       fifth of the runs, the fastest and the slowest one, the speedup is the
       median ratio of neighbours.
Lanes: fine-tunings that are alike, masks included, as lanes of one program
       (--lanes), see experiments.sff.

Differs from the released code (SJTU-DMTai/Prune-then-Finetune): see
`ltsm_jax.methods.pruning`; pruned and whole arms have the same dropout
(--quirks no-dropout for theirs: none in the pruned ones) and the same learning
rate, or with several --lr each the one that validation chooses for it.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import cells, flags, folder, launch, pruning_report, report
from experiments.cells import Comparison
from experiments.flags import BELOW_1, TINY, exact, names, number, numbers, one_of, whole
from ltsm_jax import hosts, sharding, storage, trees
from ltsm_jax.data.splits import SPLIT_QUIRKS
from ltsm_jax.methods import pruning, redundancy, removal
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.strategies import STRATEGIES, Strategy, strategy
from ltsm_jax.models import Model

RATIO = (0.05, 0.1, 0.2)  # per epoch, where no share is given
PASS_RATIO = 0.5  # per epoch, of a run that is cut at --ratios
GROUP = 16  # batches of a pruning step, as the release has it for all its models
SAMPLE, BATCH = (
    4096,
    64,
)  # windows of each part that the original model's statistics are measured on, and of a batch
NO_DROPOUT = "no-dropout"
TUNED = tuple(m for m in STRATEGIES if m != "zero_shot")
TUNE = ("chosen", "each", "all", "validated")
ALL_QUIRKS = tuple(sorted({*SPLIT_QUIRKS, *pruning.PRUNING_QUIRKS, NO_DROPOUT}))
SHARE = "above 0 and below 1"


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Of every pruning run."""

    score: Annotated[
        pruning.Score,
        one_of(get_args(pruning.Score)),
        flags.described(f"importance of a channel, of {', '.join(get_args(pruning.Score))}"),
    ] = "taylor2"
    prune_epochs: Annotated[int, whole(1)] = 1
    """at most; a run stops at the first epoch without a better validation MSE"""
    prune_batch_size: Annotated[int | None, whole(1, unset="recipe")] = None
    """windows per batch"""
    macro_batch: Annotated[
        int | None, whole(1), flags.described(f"windows of a step; by default {GROUP} batches")
    ] = None
    stride: Annotated[int, whole(1)] = 1
    """rows from one window to the next"""
    max_prune_ratio: Annotated[float, number(TINY, 1, says="above 0 and at most 1")] = 1.0
    """stop at this share of zeros; 1: never"""
    expert_threshold: Annotated[float | None, number(-math.inf, BELOW_1, says="below 1")] = None
    """take out experts that at most this share of tokens choose; below 0: all but the top_k"""
    depth: Annotated[int, whole(0)] = 0
    """first take out this many whole layers, those that change least of what runs through them"""
    ema_abs: bool = False
    """average the scores' absolute values"""
    average_expert_score: bool = False
    """judge an expert by the windows that reach it"""
    include_embed: bool = False
    """prune the linears before the blocks too"""
    include_head: bool = False
    """prune the head too"""


@dataclasses.dataclass(frozen=True)
class Options(flags.Options):
    """Options of this comparison."""

    program: ClassVar[str] = "experiments.prune_then_finetune"
    methods: Annotated[
        tuple[str, ...],
        names(TUNED),
        flags.described(f"fine-tuning of the whole and of the pruned model, of {', '.join(TUNED)}"),
    ] = ("ff", "sff")
    quirks: Annotated[
        tuple[str, ...],
        names(ALL_QUIRKS),
        flags.described(f"released behaviours to follow, of {', '.join(ALL_QUIRKS)}"),
    ] = ()
    ratios: Annotated[tuple[float, ...] | None, numbers(TINY, BELOW_1, says=SHARE)] = None
    """shares of all channels, cut from one pruning run per EMA and seed: nested masks, in place of
    --ratio
    """
    ratio: Annotated[
        tuple[float, ...] | None,
        numbers(TINY, BELOW_1, says=SHARE),
        flags.described(
            "shares pruned per epoch, a pruning run for each, as the paper has it; by default "
            f"{','.join(map(exact, RATIO))}; with --ratios one, that of its run, by default "
            f"{PASS_RATIO:g}"
        ),
    ] = None
    ema: Annotated[tuple[float, ...], numbers(TINY, 1, says="above 0 and at most 1")] = (0.5,)
    """weights of the new score in the average importance"""
    tune: Annotated[str, one_of(TUNE)] = "chosen"
    """which pruned models are fine-tuned: chosen (the one of lowest validation MSE), each (the best
    EMA of each ratio), all, or validated (all at the first seed; at the others the one of lowest
    validation MSE once fine-tuned)
    """
    timed_runs: Annotated[int, whole(0)] = 30
    """forecasts timed of each pruned model; 0: none"""
    whole: bool = True
    """fine-tune the whole model as well, and measure how redundant it is; --no-whole where another
    comparison does
    """
    pruning: Pruning = dataclasses.field(default_factory=Pruning)

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares that tell the pruned cells of an EMA and seed apart: of all channels, or per
        epoch.
        """
        return self.ratios or self.ratio or RATIO

    @property
    def over(self) -> tuple[str, ...]:
        """Columns whose value validation chooses for each arm, see `experiments.grid`."""
        return (*(("ratio", "ema") if self.tune == "validated" else ()), *super().over)

    @property
    def own_quirks(self) -> tuple[str, ...]:
        """Quirks of the pruning itself."""
        return tuple(q for q in self.quirks if q in pruning.PRUNING_QUIRKS)

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        found = []
        if self.ratios is not None and len(self.ratio or ()) > 1:
            found.append(
                "--ratios are cut from one pruning run, so that --ratio takes one value beside it"
            )
        return found + super().problems(given)


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Raises: UsageError listing every bad flag."""
    return flags.parse(Options, argv, __doc__)


# --------------------------------------------------------------------------------------------------
# what will run


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: an arm, its alpha where it has one, its ratio and EMA where it is pruned, a seed,
    and where settings are chosen its learning rate and the origin of its validation.
    """

    method: str
    alpha: float | None
    ratio: float | None
    ema: float | None
    seed: int
    lr: float | None = None
    origin: int = 0

    @property
    def name(self) -> str:
        """Its folder."""
        parts = [self.method]
        for letter, x in (("a", self.alpha), ("r", self.ratio), ("e", self.ema)):
            if x is not None:
                parts.append(f"{letter}{exact(x)}")
        return f"{'-'.join(parts)}{report.candidate_name(self.lr, self.origin)}-seed{self.seed}"

    @property
    def label(self) -> str:
        """It in words."""
        name = pruning_report.label(self.method, self.alpha, self.ratio, ema=self.ema)
        return f"{name}{report.chosen_by(self.lr, self.origin)}, seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether anything is trained in it, besides masks."""
        return self.method not in ("zero_shot", "pruned")

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in results.csv."""
        return {name: getattr(self, name) for name in ("method", "alpha", "ratio", "ema", "seed")}


def resolve(options: Options) -> Comparison:
    """`cells.resolve`, with the settings of pruning.

    Raises: UsageError and ValueError for what does not work.
    """
    c = cells.resolve(options)
    full = pruning.full_masks(c.model, **_candidates(options))
    how = options.pruning
    batch = how.prune_batch_size or c.config.batch_size
    assert batch is not None, "filled"
    settings = {
        "cuts": "of all channels, from one run" if options.ratios else "per epoch, a run each",
        "pass_ratio": (options.ratio or (PASS_RATIO,))[0] if options.ratios else None,
        "score": how.score,
        "prune_epochs": how.prune_epochs,
        "prune_batch_size": batch,
        "macro_batch": how.macro_batch or GROUP * batch,
        "stride": how.stride,
        "max_prune_ratio": how.max_prune_ratio,
        "expert_threshold": how.expert_threshold,
        **(
            {"depth": how.depth} if how.depth else {}
        ),  # folders of before do not name it, and have to go on
        "ema_abs": how.ema_abs or None,
        "average_expert_score": how.average_expert_score or None,
        "channels": trees.count(full),
        "include_embed": how.include_embed or None,
        "include_head": how.include_head or None,
    }
    return dataclasses.replace(c, settings=c.settings | settings)


def _candidates(options: Options) -> dict[str, Any]:
    return {
        "include_embed": options.pruning.include_embed,
        "include_head": options.pruning.include_head,
        "quirks": options.own_quirks,
    }


def whole_cells(options: Options, seeds: Sequence[int] | None = None) -> list[Cell]:
    """The arms of the model that is not pruned, with every candidate of theirs; seeds: some of the
    options'.
    """
    arms = [("zero_shot", None), *(options.tunings if options.whole else ())]
    found = []
    for method, alpha in arms:
        for seed in options.seeds if seeds is None else seeds:
            found += _candidate_cells(
                options, Cell(method=method, alpha=alpha, ratio=None, ema=None, seed=seed)
            )
    return found


def pruned_cells(options: Options, seeds: Sequence[int] | None = None) -> list[Cell]:
    """The pruned models that are not fine-tuned, pruning run by pruning run."""
    every = itertools.product(
        options.seeds if seeds is None else seeds, options.ema, options.shares
    )
    return [
        Cell(method="pruned", alpha=None, ratio=ratio, ema=ema, seed=seed)
        for seed, ema, ratio in every
    ]


def tuned_cells(
    options: Options, pairs: Sequence[tuple[float, float]], seeds: Sequence[int] | None = None
) -> list[Cell]:
    """The pruned models of each (ratio, EMA), fine-tuned; seed by seed, as they share
    pruning runs.
    """
    found = []
    for seed in options.seeds if seeds is None else seeds:
        for ratio, ema in pairs:
            for method, alpha in options.tunings:
                found += _candidate_cells(
                    options,
                    Cell(method=f"pruned+{method}", alpha=alpha, ratio=ratio, ema=ema, seed=seed),
                )
    return found


def _candidate_cells(options: Options, cell: Cell) -> list[Cell]:
    """Give a cell with every learning rate to choose from; at the first seed at every origin of
    validation.
    """
    trained = cell.method not in ("zero_shot", "pruned")
    several = trained and cell.seed == options.seeds[0]
    found = []
    for lr in options.lrs_of(cell.method):
        origins = options.origins if several else 1
        found += [dataclasses.replace(cell, lr=lr, origin=origin) for origin in range(origins)]
    return found


def plan(c: Comparison) -> str:
    """Describe the runs that will follow."""
    o, s = c.options, c.settings
    if o.over:
        return _plan_of_choice(c)
    first = [*whole_cells(o), *pruned_cells(o)]
    done, then = cells.finished(c, first), _n_tuned(o)
    runs = len(o.seeds) * len(o.ema) * (1 if o.ratios else len(o.shares))
    lines = [
        f"pruning  {s['channels']:,} channels, {runs} runs of {s['prune_epochs']} epochs, "
        f"{s['score']}, a step every {s['macro_batch']} windows; ratios "
        f"{', '.join(map(exact, o.shares))} ({s['cuts']}), EMA {', '.join(map(exact, o.ema))}",
        f"runs     {len(first) + then}: {len(whole_cells(o))} whole, {len(pruned_cells(o))} "
        f"pruned, {then} pruned and tuned, seeds {', '.join(map(str, o.seeds))}"
        + (f"; {done} finished already" if done else ""),
    ]
    windows = len(c.windows.starts) // s["stride"]
    if windows <= s["macro_batch"] and len(o.ema) > 1 and o.pruning.prune_epochs == 1:
        lines.append(
            "note     a pruning run is one step: the EMA has no say in it; take a smaller "
            "--macro-batch"
        )
    return cells.plan(c, lines)


def _plan_of_choice(c: Comparison) -> str:
    """Describe the runs of a comparison whose settings validation chooses."""
    o, s = c.options, c.settings
    now = (
        len(whole_cells(o, o.seeds[:1]))
        + len(pruned_cells(o, _seeds_pruned(o)))
        + len(_grid_cells(o, None))
    )
    lines = [
        f"pruning  {s['channels']:,} channels, of {s['prune_epochs']} epochs, {s['score']}, a "
        f"step every {s['macro_batch']} windows; ratios {', '.join(map(exact, o.shares))} "
        f"({s['cuts']}), EMA {', '.join(map(exact, o.ema))}",
        f"runs     {now} before validation has chosen {', '.join(o.over)} at seed {o.seeds[0]}; "
        f"then the chosen ones at seeds {', '.join(map(str, o.seeds[1:])) or 'none'}",
    ]
    return cells.plan(c, lines)


def _seeds_pruned(o: Options) -> Sequence[int]:
    """Seeds at which every ratio and EMA is pruned: the first where the fine-tuned models choose
    among them.
    """
    return o.seeds[:1] if o.tune == "validated" else o.seeds


def _grid_cells(o: Options, choice: dict[str, Any] | None) -> list[Cell]:
    """The fine-tuned pruned models of the first seed, with every candidate. choice: None for how
    many there will be.
    """
    if choice is None:
        pairs = list(itertools.product(o.shares, o.ema))
        count = {"chosen": 1, "each": len(o.shares)}.get(o.tune, len(pairs))
        return tuned_cells(o, pairs[:count], o.seeds[:1])
    return tuned_cells(o, _pairs(o, choice), o.seeds[:1])


def _pairs(o: Options, choice: dict[str, Any]) -> list[tuple[float, float]]:
    """Ratio and EMA of the pruned models that are fine-tuned."""
    if o.tune == "chosen":
        return [(choice["ratio"], choice["ema"])]
    if o.tune == "each":
        return [(float(ratio), ema) for ratio, ema in choice["ema_of_ratio"].items()]
    return list(itertools.product(o.shares, o.ema))


def _n_tuned(o: Options) -> int:
    pairs = {"chosen": 1, "each": len(o.shares), "all": len(o.shares) * len(o.ema)}[o.tune]
    return pairs * len(o.tunings) * len(o.seeds)


# --------------------------------------------------------------------------------------------------
# running it


def compare(c: Comparison, console: Console | None = None) -> list[str]:
    """Run every cell that has no result yet; after each, results.csv is whole.

    Returns: what failed (a run that diverged does not stop the others), one line each.
    """
    console = (console or Console()) if hosts.first() else Console(quiet=True)
    o, work, statistics = c.options, Work(c), c.folder / "redundancy.json"
    if o.whole and not hosts.on_first(_whole, statistics):
        hosts.on_first(folder.write_json, statistics, redundancy_of(c))
    if o.over:
        first = [*whole_cells(o, o.seeds[:1]), *pruned_cells(o, _seeds_pruned(o))]
        total = len(first) + len(_grid_cells(o, None)) + _n_chosen(o)
    else:
        first = [*whole_cells(o), *pruned_cells(o)]
        total = len(first) + _n_tuned(o)
    shown: dict[str, Any] = {
        "rank": pruning_report.rank,
        "console": console,
        "begin": work.begin,
    }
    failures = cells.run_cells(c, first, work.run_cell, place=(1, total), **shown)
    rows = hosts.on_first(_rows, c.folder, {cell.name for cell in first})
    choice = choose(rows, o)
    if choice is None:
        return failures
    hosts.on_first(folder.write_json, c.folder / "choice.json", choice)
    console.print(choice["text"], highlight=False, markup=False)
    if choice["warning"]:
        console.print(choice["warning"], highlight=False, markup=False, style="yellow")
    if o.over:
        grid_cells = _grid_cells(o, choice)
        place = (len(first) + 1, total)
        failures += cells.run_cells(c, grid_cells, work.run_cell, place=place, **shown)
        others = [*whole_cells(o, o.seeds[1:]), *tuned_cells(o, _pairs(o, choice), o.seeds[1:])]
        if o.tune == "validated":
            others += pruned_cells(o, o.seeds[1:])
        place = (len(first) + len(grid_cells) + 1, total)
        return failures + cells.run_chosen(c, others, work.run_cell, place=place, **shown)
    tuned = tuned_cells(o, _pairs(o, choice))
    place = (len(first) + 1, total)
    return failures + cells.run_cells(c, tuned, work.run_cell, place=place, **shown)


def _n_chosen(o: Options) -> int:
    """Count the runs that the seeds after the first one add where validation chooses settings."""
    arms = {(method, None if o.choose_alpha else alpha) for method, alpha in o.tunings}
    pairs = {"chosen": 1, "each": len(o.shares), "all": len(o.shares) * len(o.ema), "validated": 1}[
        o.tune
    ]
    pruned = 1 if o.tune == "validated" else 0
    return (1 + len(arms) * (o.whole + pairs) + pruned) * (len(o.seeds) - 1)


def _whole(file: Path) -> bool:
    try:
        storage.read_record(file)
    except storage.DamagedError:
        return False
    return True


def _rows(path: Path, cells: set[str]) -> list[dict[str, Any]]:
    return [record["row"] for name, record in folder.results(path)[0].items() if name in cells]


def choose(rows: Sequence[dict[str, Any]], options: Options) -> dict[str, Any] | None:
    """Ratio and EMA by the mean validation MSE over seeds of the pruned models that are not tuned;
    first of the grid where equal. None where no pruned model has been scored.

    Returns: ratio, ema, val_mse, seeds, zero_shot_val_mse, ema_of_ratio (the best EMA of each
      ratio), text, and warning where validation prefers the model as it was, else "".
    """
    means, counts = {}, {}
    for ratio in options.shares:
        for ema in options.ema:
            found = [
                r["val_mse"]
                for r in rows
                if (r["method"], r["ratio"], r["ema"]) == ("pruned", ratio, ema)
            ]
            if found:
                means[ratio, ema], counts[ratio, ema] = float(np.mean(found)), len(found)
    if not means:
        return None
    ratio, ema = min(means, key=lambda pair: means[pair])
    best = {}
    for share in options.shares:
        scored = [other for other in options.ema if (share, other) in means]
        if scored:
            best[share] = min(scored, key=lambda other, share=share: means[share, other])
    whole = [r["val_mse"] for r in rows if r["method"] == "zero_shot"]
    before = float(np.mean(whole)) if whole else math.nan
    text = f"chosen by validation: ratio {exact(ratio)}, EMA {exact(ema)} "
    text += f"(MSE {means[ratio, ema]:.4f}; not pruned {before:.4f})"
    warning = ""
    if before <= means[ratio, ema]:
        warning = (
            f"Validation prefers the model as it was: MSE {before:.4f} whole, "
            f"{means[ratio, ema]:.4f} with the best pruning. Prune for size and speed, or not at "
            "all."
        )
    return {
        "ratio": ratio,
        "ema": ema,
        "val_mse": means[ratio, ema],
        "seeds": counts[ratio, ema],
        "zero_shot_val_mse": before,
        "ema_of_ratio": {f"{r!r}": e for r, e in best.items()},
        "text": text,
        "warning": warning,
    }


def strategy_of(cell: Cell) -> Strategy:
    """Give the strategy that a cell runs, on the whole or on the pruned model."""
    method = cell.method.removeprefix("pruned").removeprefix("+")
    return strategy(method or "zero_shot", alpha=cell.alpha or 0.0)


class Work:
    """A comparison at work: pruning runs, and the timing of the whole model, are kept for the cells
    that share them. On several hosts all call.
    """

    def __init__(self, c: Comparison):
        self.c = c
        self.whole: Any = None  # the comparison's params on one device
        self.found: tuple[str, pruning.PruneResult] | None = (
            None  # the last one: its cells come together
        )
        self.forecasts: dict[Model, Any] = {}  # compiled

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Run one cell, or go on with it. Returns: its row of results.csv."""
        return self._whole(cell) if cell.ratio is None else self._pruned(cell)

    def _whole(self, cell: Cell) -> dict[str, Any]:
        c = cells.at(self.c, cell)
        if cell.method == "zero_shot" and (twin := cells.twin_of(c, "zero_shot")):
            return cells.take_over(c, cell, twin)  # a checkpoint has no seed: score it once
        result = cells.tune(c, cell, strategy_of(cell))
        row = (
            cells.row_of(c, cell.columns, result.model, result=result)
            | self.chosen(cell)
            | _sizes(c, c.params, c.params)
        )
        cells.keep(c, cell, (result.model, result.params), row=row, result=result)
        return row

    def begin(self, cell: Cell) -> Running:
        """Begin the training of a cell."""
        c = cells.at(self.c, cell)
        rest = {} if cell.ratio is None else self._pruned_model(c, cell)[1]
        return cells.begin(c, cell, strategy_of(cell), **rest)

    def _pruned_model(
        self, c: Comparison, cell: Cell
    ) -> tuple[pruning.PruneResult, dict[str, Any]]:
        """Give the pruning run of a cell, and what its training takes from there."""
        found = self.pruning_run(c, cell)
        masks = pruning.cut(found.order, cell.ratio or 0.0) if c.options.ratios else found.masks
        quirks = (NO_DROPOUT,) if cell.trains and NO_DROPOUT in c.options.quirks else ()
        return found, {
            "model": found.model,
            "params": found.params,
            "masks": masks,
            "quirks": quirks,
        }

    def chosen(self, cell: Cell) -> dict[str, Any]:
        """Columns of a cell in a folder whose settings validation chooses."""
        over = self.c.options.over
        found: dict[str, Any] = {"origin": cell.origin} if over else {}
        return found | ({"lr": cell.lr} if "lr" in over else {})

    def _pruned(self, cell: Cell) -> dict[str, Any]:
        c = cells.at(self.c, cell)
        found, rest = self._pruned_model(c, cell)
        masks, (_, _, method) = rest["masks"], cell.method.partition("+")
        result = cells.tune(c, cell, strategy_of(cell), **rest)
        small, small_params, _ = removal.remove(found.model, result.params, masks)
        row = cells.row_of(c, cell.columns, found.model, result=result)
        row |= (
            self.chosen(cell)
            | _sizes(c, small_params, result.params)
            | {"channels_left": pruning.share_left(masks)}
        )
        more: dict[str, Any] = {}
        if not method:
            row |= self.timing(small, small_params, (found.model, result.params))
            more = {
                "sparsity": redundancy.sparsity(masks),
                "pruning": found.history,
                "stopped": found.stopped,
            }
            if found.gone:
                more |= {"influence": found.influence, "layers_gone": list(found.gone)}
            if found.usage is not None:
                more["usage"] = {
                    path: np.asarray(f_E).tolist() for path, f_E in found.usage.items()
                }
        cells.keep(
            c,
            cell,
            (small, small_params),
            row=row,
            result=result,
            shown=(found.model, result.params),
            **more,
        )
        return row

    def pruning_run(self, c: Comparison, cell: Cell) -> pruning.PruneResult:
        """The pruning run of a cell, started, continued or read. c: the comparison as the cell sees
        it.
        """
        o, s = c.options, c.settings
        ratio = None if o.ratios else cell.ratio  # one run is cut at every ratio
        ema, seed = cell.ema or 0.0, cell.seed
        name = "-".join(
            (*([] if ratio is None else [f"r{exact(ratio)}"]), f"e{exact(ema)}", f"seed{seed}")
        )
        name = f"origin{cell.origin}-{name}" if cell.origin else name
        if self.found is None or self.found[0] != name:
            config = pruning.PruneConfig(
                ratio=s["pass_ratio"] if ratio is None else ratio,
                ema=ema,
                score=o.pruning.score,
                epochs=o.pruning.prune_epochs,
                batch_size=s["prune_batch_size"],
                macro_batch=s["macro_batch"],
                max_prune_ratio=o.pruning.max_prune_ratio,
                ema_abs=o.pruning.ema_abs,
                average_expert_score=o.pruning.average_expert_score,
                expert_threshold=o.pruning.expert_threshold,
                depth=o.pruning.depth,
                stride=o.pruning.stride,
                **_candidates(o),
            )
            found = pruning.prune(
                c.model,
                c.params,
                c.splits,
                config=config,
                task=c.task,
                seed=seed,
                folder=c.folder / "masks" / name,
                label=f"pruning {name}",
            )
            self.found = name, found
        return self.found[1]

    def timing(self, model: Model, params: Any, masked: tuple[Model, Any]) -> dict[str, Any]:
        """Time and memory of one forecast of a window per variate, with parts taken out and whole,
        and how far the forecast is from that of the masked model.
        """
        self.whole = _on_one_device(self.c.params) if self.whole is None else self.whole
        params, masked = _on_one_device(params), (masked[0], _on_one_device(masked[1]))
        return hosts.on_first(self._timing, model, params, masked)

    def _timing(self, model: Model, params: Any, masked: tuple[Model, Any]) -> dict[str, Any]:
        c, runs, context = self.c, self.c.options.timed_runs, _one_window_each(self.c)

        def forecast(model: Model, params: Any) -> Any:
            if model not in self.forecasts:
                function = jax.jit(lambda p, x: model.predict(p, x, c.splits.test.horizon).point)
                self.forecasts[model] = function.lower(params, context).compile()
            return self.forecasts[model]

        self.forecasts = {
            m: f for m, f in self.forecasts.items() if m in (c.model, masked[0])
        }  # others never return
        whole, small = forecast(c.model, self.whole), forecast(model, params)
        gap = np.asarray(small(params, context)) - np.asarray(forecast(*masked)(masked[1], context))
        found = {
            "removal_gap": float(np.abs(gap).max()),
            "peak_mb": _peak(small),
            "whole_peak_mb": _peak(whole),
        }
        if not runs:
            return found
        times = np.empty((runs, 2))
        for i in range(runs):
            for j, (compiled, weights) in enumerate(((small, params), (whole, self.whole))):
                began = time.perf_counter()
                compiled(weights, context).block_until_ready()
                times[i, j] = time.perf_counter() - began
        kept = np.sort(times[runs // 5 :], axis=0)
        kept = kept[1:-1] if len(kept) > 2 else kept
        mine, other = (1e3 * kept.mean(axis=0)).tolist()
        pairs = np.median(
            times[runs // 5 :, 1] / times[runs // 5 :, 0]
        )  # neighbours in time: other work slows both
        return found | {"latency_ms": mine, "whole_latency_ms": other, "speedup": float(pairs)}


def _on_one_device(params: Any) -> Any:
    return jax.device_put(jax.tree.map(sharding.on_host, params), jax.local_devices()[0])


def _one_window_each(c: Comparison) -> jax.Array:
    windows = c.splits.test
    first = (
        [0] if windows.rows is None else np.unique(np.asarray(windows.rows), return_index=True)[1]
    )
    return windows.gather(jnp.asarray(first, jnp.int32))["context"]


def _peak(compiled: Any) -> float | None:
    """Peak memory of a compiled function in MB, weights and context included; None where the
    backend does not say.
    """
    m = compiled.memory_analysis()
    if m is None:
        return None
    parts = (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )
    return max(getattr(m, "peak_memory_in_bytes", 0), parts) / 1e6


def _sizes(c: Comparison, params: Any, merged: Any) -> dict[str, Any]:
    """parameters: with parts taken out; nonzero_parameters: of the masked model; whole_parameters:
    of the original.
    """
    nonzero = sum(int(np.count_nonzero(sharding.on_host(leaf))) for leaf in jax.tree.leaves(merged))
    return {
        "parameters": trees.count(params),
        "nonzero_parameters": nonzero,
        "whole_parameters": trees.count(c.params),
    }


def redundancy_of(c: Comparison) -> dict[str, Any]:
    """Statistics of the original model as JSON, on windows spread evenly over the training and
    validation parts.
    """
    train, val = c.windows, c.splits.val
    val = dataclasses.replace(val, horizon=train.horizon)  # as the loss wants it
    val = val.take(
        np.flatnonzero(
            np.asarray(val.starts) + val.context_len + val.horizon <= c.splits.borders.val[1]
        )
    )
    parts = [part for part in (train, val) if part.n]
    counts = [
        min(SAMPLE, part.n - part.n % BATCH if part.n > BATCH else part.n) for part in parts
    ]  # whole batches
    some = [
        part.take(np.linspace(0, part.n - 1, n).astype(np.int32))
        for part, n in zip(parts, counts, strict=True)
    ]
    found = redundancy.measure(c.model, c.params, *some, mode=c.task.mode, batch_size=BATCH)

    def lists(entry: Any) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(entry).items()}

    windows = [part.n for part in some]
    heads = {path: lists(h) for path, h in found.heads.items()}
    units = {path: lists(u) for path, u in found.units.items()}
    return {
        "windows": windows,
        "heads": heads,
        "units": units,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.prune_then_finetune`; returns the exit code."""
    return cells.main(argv, parse, resolve, plan=plan, compare=compare, finish=_finish)


def _finish(path: Path, by: str) -> None:
    pruning_report.print_table(path, by=by)
    print(f"report: {pruning_report.write_report(path, by)}")


if __name__ == "__main__":
    launch.leave(main())
