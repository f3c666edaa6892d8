"""Which tuning fills holes best, and does it beat a straight line?

The protocol of Timer and SFF: windows of 192 rows, in which whole patches of
24 rows are hidden, each with probability --rates, never the first. Only hidden
points are scored, all of a part pooled, under masks that never change.

Run:   python -m experiments.imputation --data ETTh1,ETTm1 \\
           --model timer-tiny-imputation --rates 0.125,0.25,0.375,0.5 \\
           --methods zero_shot,ff,sff,tfs --seeds 0 --few-shot 0.05 --epochs 3
       python -m experiments.imputation --data my.csv --holes points,blocks
Holes: patches (the protocol), points, blocks (one run of any length in each
       column) and outages (a column is gone from the second patch on); each
       hides the same share on average. A model is tuned for the kind and the
       rate that it is scored on.
Cost:  a minute of one CPU core for each data set, rate, method and seed at
       --few-shot 0.05 --epochs 3; --score-stride 8 scores an eighth.
Gives: a table on the terminal and, in the folder of --out: results.csv (a row
       per data set, kind of holes, rate, method and seed), report.md with
       pictures. The same command again goes on where the last one stopped.

Baselines, under the same masks: linear interpolation, the last visible value,
and the value a whole number of seasons away. anchored_mse is the error after
`tasks.imputation.anchored`, as `ltsm_jax.impute` fills holes.
Differs from the released script: fixed masks in validation and test, a fixed
few-shot subset; the next-token loss is the default (--mode direct is theirs).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import pandas as pd

import ltsm_jax
from experiments import cells, flags, imputation_report, launch, task_runs
from ltsm_jax import storage, training
from ltsm_jax.data import Splits, prepare
from ltsm_jax.methods import binding, sweep
from ltsm_jax.methods.run import Running, RunResult
from ltsm_jax.methods.strategies import STRATEGIES, strategy
from ltsm_jax.models import Model
from ltsm_jax.tasks import imputation
from ltsm_jax.tasks.base import Part
from ltsm_jax.tasks.imputation import HOLES, Imputation
from ltsm_jax.training.lanes import ASKED
from ltsm_jax.trees import Params

FILLS = "fills.npz"
EXAMPLES = 3  # test windows whose holes are drawn


@dataclasses.dataclass(frozen=True)
class Options(task_runs.Options):
    """The command line, beside the options that all tasks share."""

    program: ClassVar[str] = "experiments.imputation"
    data: Annotated[tuple[str, ...], flags.words()] = ("ETTh1",)
    """benchmark names ($LTSM_DATA, cache or download) or .csv, .csv.gz or .parquet files"""
    model: Annotated[str, flags.text("MODEL")] = "timer-tiny-imputation"
    """shipped name, model folder, original checkpoint, or hub name owner/name[@revision]"""
    methods: Annotated[
        tuple[str, ...],
        flags.names(tuple(STRATEGIES)),
        flags.described(f"what to compare, of {', '.join(STRATEGIES)}"),
    ] = ("zero_shot", "ff", "sff", "tfs")
    rates: Annotated[
        tuple[float, ...], flags.numbers(flags.TINY, flags.BELOW_1, says="between 0 and 1")
    ] = (0.25,)
    """shares to hide of what follows the first patch"""
    holes: Annotated[
        tuple[str, ...],
        flags.names(HOLES),
        flags.described(f"kinds of holes, of {', '.join(HOLES)}"),
    ] = ("patches",)
    few_shot: Annotated[
        float, flags.number(flags.TINY, 1, says="a share above 0 and at most 1")
    ] = 1.0
    """share of the training windows"""
    window: Annotated[int, flags.whole(2)] = 192
    """rows of a window"""
    patch: Annotated[int, flags.whole(1)] = 24
    """rows of a hidden patch, and of the first one, whatever the patches of the model"""
    mode: Annotated[str, flags.one_of(("ims", "direct"))] = "ims"
    """of Timer: ims: a token predicts the next patch; direct: its own"""
    score_stride: Annotated[int, flags.whole(1)] = 1
    """validate and test on every N-th window"""
    lanes: Annotated[str, flags.one_of(ASKED)] = "auto"
    """train runs that are alike as lanes of one program: auto (where a few timed steps say that it
    is quicker), on or off"""
    reading: flags.Reading = dataclasses.field(default_factory=flags.Reading)

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        found = super().problems(given)
        if self.window % self.patch or self.window < 2 * self.patch:
            told = f"at least two whole patches of {self.patch}"
            found.append(f"--window must be {told}; got {self.window}")
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """A data set, cut into windows, and the model made ready for it."""

    name: str
    model: Model
    params: Params
    splits: Splits


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of results.csv."""

    setting: Setting
    holes: str
    rate: float
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        holes = f"{self.holes}-{flags.exact(self.rate)}"
        return f"{self.setting.name}-{holes}-{self.method}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a cell needs, resolved and checked."""

    options: Options
    settings: list[Setting]
    config: training.TrainConfig
    record: dict[str, Any]

    def task(self, cell: Cell) -> Imputation:
        """The task of a cell."""
        o = self.options
        holes: Any = cell.holes
        return Imputation(rate=cell.rate, ims=o.mode == "ims", holes=holes, patch_len=o.patch)


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Raises: UsageError listing every bad flag."""
    return flags.parse(Options, argv, __doc__)


def resolve(options: Options) -> Comparison:
    """Load the model, read and cut the data, and try one batch without computing it.

    Raises: UsageError for what does not work.
    """
    settings = []
    try:
        model, params = ltsm_jax.load(options.model, accept_license=options.accept_license)
        model.check_task("imputation")
        for data in options.data:
            series = cells.read_series(data, options.reading)
            own, ready = binding.ready_for(model, params, series, seed=min(options.seeds))
            rows = options.window
            splits = prepare(series, rows, rows, few_shot=options.few_shot, joint=True)
            _try_batch(own, ready, splits, o=options)
            settings.append(
                Setting(
                    name=series.name,
                    model=own,
                    params=ready,
                    splits=cells.thinned(splits, options.score_stride),
                )
            )
    except (ValueError, OSError) as error:
        raise flags.UsageError(str(error)) from error
    config = options.config(model)
    facts = {
        "data_sha256": {
            one.name: cells.series_facts(one.splits.series)["data_sha256"] for one in settings
        },
        "model": options.model_name,
        "model_sha256": storage.sha256_of(params)[:16],
        "alpha": options.alpha,
        "few_shot": options.few_shot,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "schedule": config.schedule,
        "window": options.window,
        "patch": options.patch,
        "mode": options.mode,
        "score_stride": options.score_stride,
    }
    record = {
        "experiment": options.program,
        "settings": facts,
        "model": {"family": model.family, "config": model.config_to_dict()},
        "command": options.command(),
    }
    return Comparison(options=options, settings=settings, config=config, record=record)


def _try_batch(model: Model, params: Params, splits: Splits, o: Options) -> None:
    """Shapes only: what the model has to say about the windows, before anything is compiled."""
    holes: Any = o.holes
    loss = imputation.loss_fn(model, patch_len=o.patch, holes=holes)
    indices, key = np.zeros(1, np.int32), jax.random.key(0)
    jax.eval_shape(lambda p, w: loss(p, w.gather(indices), key, True), params, splits.train)


def groups_of(c: Comparison) -> list[list[Cell]]:
    """Every run, in groups of the same windows, holes and rate: what may be lanes of one
    program."""
    o, found = c.options, []
    for setting in c.settings:
        seasonal = 1 < setting.splits.series.season < o.window
        baselines = imputation_report.BASELINES if seasonal else ("linear", "last")
        for holes in o.holes:
            for rate in o.rates:
                group = []
                for method in o.methods:
                    several = o.seeds if strategy(method).phases else o.seeds[:1]
                    group += [
                        Cell(setting=setting, holes=holes, rate=rate, method=method, seed=seed)
                        for seed in several
                    ]
                group += [
                    Cell(setting=setting, holes=holes, rate=rate, method=name, seed=o.seeds[0])
                    for name in baselines
                ]
                found.append(group)
    return found


def plan(c: Comparison) -> str:
    """Say what will run, in words."""
    o, lines = c.options, []
    for one in c.settings:
        series, parts = one.splits.series, one.splits
        lines.append(
            f"data     {one.name}: {series.n_rows:,} rows x {series.n_variates} columns; windows "
            f"of {o.window}: {parts.train.n:,} to train, {parts.val.n:,} to validate, "
            f"{parts.test.n:,} to test"
        )
    n_runs = sum(map(len, groups_of(c)))
    lines += [
        f"holes    {', '.join(o.holes)} at {', '.join(f'{rate:g}' for rate in o.rates)}",
        f"model    {o.model}: {c.settings[0].model.family}",
        f"training {o.mode}, {o.words_of(c.config)}",
        f"runs     {n_runs}: {', '.join((*o.methods, *imputation_report.BASELINES))}",
        f"results  {o.folder}",
    ]
    return "\n".join(lines)


def compare(c: Comparison) -> list[str]:
    """Run every cell that has no result yet. Returns: what failed, a line each."""
    groups = groups_of(c)
    total, first, failures = sum(map(len, groups)), 1, []
    for group in groups:
        naive = functools.cache(functools.partial(_baselines, c, group[0]))
        run_cell = functools.partial(score, c, tuned(c, task_runs.waiting(c, group)), naive)
        failures += task_runs.run_cells(c, group, run_cell, place=(first, total))
        first += len(group)
    return failures


def tuned(c: Comparison, waiting: Sequence[Cell]) -> dict[str, RunResult | training.NonFiniteError]:
    """Run the methods of a group, alike ones as lanes. Returns: results by the names of their
    cells."""
    runs = [cell for cell in waiting if cell.method in STRATEGIES]
    if not runs:
        return {}
    makers = [functools.partial(begin, c, cell) for cell in runs]

    def finish(running: Running) -> RunResult:
        return running.result()

    asked: Any = c.options.lanes
    found = sweep.train(makers, runs[0].setting.params, lanes=asked, finish=finish)
    return dict(zip([cell.name for cell in runs], found, strict=True))


def begin(c: Comparison, cell: Cell) -> Running:
    """Begin the training of a cell."""
    one = cell.setting
    return Running(
        model=one.model,
        params=one.params,
        strategy=strategy(cell.method, alpha=c.options.alpha),
        data=one.splits,
        task=c.task(cell),
        seed=cell.seed,
        config=c.config,
        label=cell.name,
        show_progress=False,
    )


def score(
    c: Comparison,
    results: dict[str, RunResult | training.NonFiniteError],
    naive: Callable[[Part], dict[str, Any]],
    cell: Cell,
) -> task_runs.Outcome:
    """Score a cell on the test part; beside its row, a few filled windows are kept.

    results: of the methods, by cell. naive: scores of the baselines of the group, by part.
    Raises: NonFiniteError of a run that diverged.
    """
    o, one, task = c.options, cell.setting, c.task(cell)
    began = time.perf_counter()
    arrays, more = {}, {}
    if cell.method in STRATEGIES:
        result = results[cell.name]
        if isinstance(result, training.NonFiniteError):
            raise result
        assert result.test is not None, "it is asked for"
        test, val = result.test, result.val
        places = ((np.arange(EXAMPLES) + 0.5) * one.splits.test.n / EXAMPLES).astype(np.int32)
        tuned_params, windows = result.params, one.splits.test
        shown = imputation.examples(
            one.model, tuned_params, windows, indices=places, **task.options
        )
        names = ("truth", "visible", "filled")
        arrays[FILLS] = {name: array[:, 0] for name, array in zip(names, shown, strict=True)}
        more = {
            "best_epoch": result.best_epoch,
            "epochs": result.epochs,
            "trained_parameters": result.trained,
        }
        seconds = result.seconds
    else:
        test, val = naive("test")[cell.method], naive("val")[cell.method]
        seconds = time.perf_counter() - began
    row = {
        "data": one.name,
        "model": o.model_name,
        "method": cell.method,
        "seed": cell.seed,
        "rate": cell.rate,
        "test_mse": test["mse"],
        "test_mae": test["mae"],
        "holes": cell.holes,
        "few_shot": o.few_shot,
        "val_mse": val["mse"],
        "val_mae": val["mae"],
        "anchored_mse": test["anchored_mse"],
        "anchored_mae": test["anchored_mae"],
        "points": test["points"],
        "windows": test["windows"],
        "train_windows": one.splits.train.n,
        "mix": o.mix_of(cell.method),
        "mode": o.mode,
        "lr": c.config.lr,
        "batch_size": c.config.batch_size,
        "seconds": round(seconds, 3),
    }
    return task_runs.Outcome(
        row | more | task_runs.facts(), f"test MSE {row['test_mse']:.4f}", arrays
    )


def _baselines(c: Comparison, cell: Cell, part: Part) -> dict[str, Any]:
    found = c.task(cell).baselines(cell.setting.model, cell.setting.splits, part)
    return {name.replace(" ", "_"): scores for name, scores in found.items()}


def finish(c: Comparison, rows: list[dict[str, Any]]) -> None:
    """Write results.csv and report.md, and print the table."""
    imputation_report.write(c.options.folder, pd.DataFrame(rows), c.record["command"])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.imputation`; returns the exit code."""
    return task_runs.main(argv, parse, resolve, plan=plan, compare=compare, finish=finish)


if __name__ == "__main__":
    launch.leave(main())
