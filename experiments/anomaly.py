"""Which tuning finds anomalies best, and does it beat detectors without a model?

The UCR protocol of Timer and SFF: one model per file, tuned on its beginning,
which has no anomaly; tokens of 96 rows of the rest are sorted by their error,
and the rank of the first that overlaps an anomaly, over the number of tokens,
is the file's alpha. NAB and SMAP/MSL files go the same way.

Run:   python -m experiments.anomaly --data UCR --model timer-tiny \\
           --methods zero_shot,ff,sff,tfs --seeds 0
       python -m experiments.anomaly --data my/1_UCR_Anomaly_x_900_950_960.txt
Data:  files and folders, separated by commas: *_UCR_Anomaly_*.txt[.gz]; NAB
       .csv[.gz] below a folder with combined_windows.json; a folder of SMAP or
       MSL (labeled_anomalies.csv, train/, test/). UCR and NAB name the folders
       anomaly/ucr and anomaly/nab of $LTSM_DATA.
Cost:  17 UCR files, four methods and three baselines, with --epochs 3
       --batch-size 32 --lr 3e-4: 336 CPU-seconds of an AMD EPYC. All files
       train and are scored in one compiled program, --windows of each.
Gives: a table on the terminal and, in the folder of --out: results.csv (a row
       per file, method and seed), report.md with pictures, and the scores of
       every test row in cells/<file>-<method>-seed<n>/scores.npz. The same
       command again goes on where the last one stopped.

Beside the rank, of the test rows: whether the highest score lies in the
anomaly (place_right, the archive's own measure), AUC-PR, VUS-PR, and
precision, recall and F1 of rows and of ranges at a threshold, the --quantile
of the scores of the held-out training rows; those scores are means over
--smooth rows. The epoch is chosen by the held-out last 10 % of the training
rows. Baselines: squared step (last), moving z-score, matrix-profile discord.
Differs from the released script: see `ltsm_jax.tasks.anomaly`; the training
windows of a file are thinned out to --windows.
"""

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd

import ltsm_jax
from experiments import anomaly_report, flags, launch, task_runs
from ltsm_jax import storage, training
from ltsm_jax.methods import run
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models import Model
from ltsm_jax.tasks import anomaly, detection_baselines, detection_scores
from ltsm_jax.tasks.anomaly import Labelled
from ltsm_jax.tasks.labelled import read_labelled
from ltsm_jax.trees import Params

NAMED = {"ucr": "anomaly/ucr", "nab": "anomaly/nab"}
SCORES = "scores.npz"
WINDOWS = (anomaly.WINDOW, 4 * anomaly.TOKEN)  # the protocol's, and the one for shorter beginnings


@dataclasses.dataclass(frozen=True)
class Options(task_runs.Options):
    """The command line, beside the options that all tasks share."""

    program: ClassVar[str] = "experiments.anomaly"
    data: Annotated[tuple[str, ...], flags.words()] = ("UCR",)
    """labelled files and folders; UCR and NAB are those of $LTSM_DATA"""
    model: Annotated[str, flags.text("MODEL")] = "timer-tiny"
    """shipped name, model folder, original checkpoint, or hub name owner/name[@revision]"""
    windows: Annotated[int, flags.whole(1)] = 2048
    """training windows of each file, evenly spread; a file that has fewer repeats some"""
    window: Annotated[int | None, flags.whole(anomaly.SHORTEST_WINDOW, unset="768, or 384")] = None
    """rows of a window, a multiple of 96; by default 768, or 384 where a file is too short for
    that"""
    mode: Annotated[str, flags.one_of(("ims", "direct"))] = "ims"
    """ims: each token predicts the next; direct: the model reconstructs its input"""
    quirks: Annotated[
        tuple[str, ...],
        flags.names(tuple(sorted(anomaly.ANOMALY_QUIRKS))),
        flags.described(
            f"released behaviours to follow, of {', '.join(sorted(anomaly.ANOMALY_QUIRKS))}"
        ),
    ] = ()
    quantile: Annotated[float, flags.number(0, 1, says="between 0 and 1")] = 0.99
    """of the scores of held-out training rows: the threshold"""
    smooth: Annotated[int, flags.whole(1)] = 25
    """rows that a score is averaged over before a threshold and the areas; ranks are of the scores
    as they are"""
    point_adjust: bool = False
    """also F1 after point adjustment, which inflates: for comparison with papers that report it"""

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        found = super().problems(given)
        if self.window is not None and self.window % anomaly.TOKEN:
            found.append(f"--window must be a multiple of {anomaly.TOKEN}; got {self.window}")
        return found


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of results.csv: a series, a method or baseline, a seed."""

    series: Labelled
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.series.name}-{self.method}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a cell needs, resolved and checked."""

    options: Options
    model: Model
    params: Params
    series: list[Labelled]
    window: int
    config: training.TrainConfig
    record: dict[str, Any]
    notes: list[str]

    @functools.cached_property
    def task(self) -> anomaly.Anomaly:
        """The task, whose loss all runs share."""
        return anomaly.Anomaly(ims=self.options.mode == "ims")


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Raises: UsageError listing every bad flag."""
    return flags.parse(Options, argv, __doc__)


def path_of(name: str) -> Path:
    """Give the file or folder that a word of --data means.

    Raises: UsageError for a name without $LTSM_DATA.
    """
    place = NAMED.get(name.lower())
    if place is None or Path(name).exists():
        return Path(name).expanduser()
    if "LTSM_DATA" not in os.environ:
        told = f"--data {name} is {place} in the folder that LTSM_DATA names, and it names none"
        raise flags.UsageError(told)
    return Path(os.environ["LTSM_DATA"]) / place


def resolve(options: Options) -> Comparison:
    """Load the model and read the files. Raises: UsageError for what does not work."""
    try:
        series, notes = read_labelled(path_of(name) for name in options.data)
        model, params = ltsm_jax.load(options.model, accept_license=options.accept_license)
        model.check_task("anomaly")
    except (ValueError, OSError) as error:
        raise flags.UsageError(str(error)) from error
    names = [one.name for one in series]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise flags.UsageError(f"--data has files of the same name: {', '.join(twice)}")
    window = options.window or window_for(series)
    kept = [one for one in series if anomaly.rows_to_train(one.train_end) >= window]
    for one in series:
        if one not in kept:
            rows = f"{one.train_end} training rows"
            notes.append(f"{one.name}: left out, {rows} hold no window of {window}")
    if not kept:
        raise flags.UsageError("\n".join(notes))
    config = options.config(model)
    record = {
        "experiment": options.program,
        "settings": settings_of(options, config, kept, window=window)
        | {"model_sha256": storage.sha256_of(params)[:16]},
        "model": {"family": model.family, "config": model.config_to_dict()},
        "command": options.command(),
        "notes": notes,
    }
    return Comparison(
        options=options,
        model=model,
        params=params,
        series=kept,
        window=window,
        config=config,
        record=record,
        notes=notes,
    )


def window_for(series: Sequence[Labelled]) -> int:
    """Choose the rows of a window: the protocol's where every series has room for it."""
    shortest = min(anomaly.rows_to_train(one.train_end) for one in series)
    return WINDOWS[0] if shortest >= WINDOWS[0] else WINDOWS[1]


def settings_of(
    options: Options,
    config: training.TrainConfig,
    series: Sequence[Labelled],
    window: int,
) -> dict[str, Any]:
    """List what decides every number; a folder holds one set of settings."""
    digest = hashlib.sha256()
    for one in series:
        digest.update(repr((one.name, one.train_end, one.spans)).encode())
        digest.update(np.ascontiguousarray(one.values).tobytes())
    return {
        "files": len(series),
        "data_sha256": digest.hexdigest()[:16],
        "model": Path(options.model).name,
        "alpha": options.alpha,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "schedule": config.schedule,
        "windows": options.windows,
        "window": window,
        "mode": options.mode,
        "quirks": ",".join(sorted(options.quirks)) or None,
        "quantile": options.quantile,
        "smooth": options.smooth,
        "point_adjust": options.point_adjust,
    }


def cells_of(c: Comparison) -> list[Cell]:
    """Every run, method by method, so that files of one method follow one another in one
    program."""
    first = c.options.seeds[0]
    found = []
    for method in c.options.methods:
        several = c.options.seeds if strategy(method).phases else (first,)
        for seed in several:
            found += [Cell(one, method, seed) for one in c.series]
    for name in anomaly_report.BASELINES:
        found += [Cell(one, name, first) for one in c.series]
    return found


def plan(c: Comparison) -> str:
    """Say what will run, in words."""
    rows = sum(len(one.values) for one in c.series)
    o = c.options
    lines = [
        f"data     {len(c.series)} series of {rows:,} rows in all",
        f"windows  {c.window} rows, {o.windows} of each series to train; the last 10 % of training "
        "rows select",
        f"model    {o.model}: {c.model.family}",
        f"training {o.mode}, {c.options.words_of(c.config)}",
        f"runs     {len(cells_of(c))}: {', '.join((*o.methods, *anomaly_report.BASELINES))}",
        f"results  {o.folder}",
    ]
    return "\n".join(lines + [f"note     {note}" for note in c.notes])


def run_cell(c: Comparison, cell: Cell) -> task_runs.Outcome:
    """Run one cell; beside its row, the score of every test row is kept."""
    began = time.perf_counter()
    if cell.method in anomaly_report.BASELINES:
        scorers = detection_baselines.scorers(cell.series.values[: cell.series.train_end])
        scores = scorers[cell.method](cell.series.values)
        held_out = scores[anomaly.rows_to_train(cell.series.train_end) : cell.series.train_end]
        found, facts = scores[cell.series.train_end :], {}
    else:
        held_out, found, facts = tuned_scores(c, cell)
    facts["seconds"] = round(time.perf_counter() - began, 3)
    row = row_of(c, cell, held_out, scores=found) | facts
    place = "missed" if row["rank"] is None else f"rank {row['rank']} of {row['tokens']}"
    kept = {"scores": found.astype(np.float32), "first_row": cell.series.train_end}
    return task_runs.Outcome(row, f"{place}, VUS-PR {row['vus_pr']:.3f}", {SCORES: kept})


def tuned_scores(c: Comparison, cell: Cell) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Tune on one series. Returns: squared errors of its held-out training rows, of its test rows,
    and facts."""
    o = c.options
    prepared = anomaly.scale_series(
        cell.series, quirks=o.quirks, window=c.window, n_windows=o.windows
    )
    result = run.run(
        c.model,
        c.params,
        strategy(cell.method, alpha=o.alpha),
        data=prepared,
        task=c.task,
        seed=cell.seed,
        config=c.config,
        test=False,
        label=cell.name,
        show_progress=False,
    )
    b, n_rows = cell.series.train_end, len(cell.series.values)

    def errors(rows: tuple[int, int]) -> np.ndarray:
        tail = "uncovered_is_hit" not in o.quirks
        ims = c.task.ims
        return anomaly.row_errors(
            c.model,
            result.params,
            prepared.values,
            rows=rows,
            ims=ims,
            tail=tail,
            window=c.window,
        )

    facts = {
        "val_mse": result.val["mse"],
        "best_epoch": result.best_epoch,
        "mix": o.mix_of(cell.method),
        "compile_seconds": round(result.compile_seconds, 3),
    }
    return errors((anomaly.rows_to_train(b), b)), errors((b, n_rows)), facts


def row_of(c: Comparison, cell: Cell, held_out: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Measure a series: scores of its held-out training rows, and of its test rows from the first
    on."""
    o, series = c.options, cell.series
    ranked = anomaly.rank_rows(scores, series, o.quirks)
    spans = [(first - series.train_end, last - series.train_end) for first, last in series.spans]
    labels = detection_scores.label_rows(spans, len(scores))
    smoothed = detection_scores.smooth_scores(scores, o.smooth)
    threshold = float(np.quantile(detection_scores.smooth_scores(held_out, o.smooth), o.quantile))
    flagged = smoothed > threshold
    ranges = detection_scores.range_scores(flagged, labels)
    place_right = any(detection_scores.place_is_right(smoothed, span) for span in spans)
    row = {
        "file": series.name,
        "method": cell.method,
        "seed": cell.seed,
        "rank": ranked.rank,
        "alpha": ranked.share,
        "found_at_3": int(ranked.share <= 0.03),
        "found_at_1": int(ranked.share <= 0.01),
        "found_at_5": int(ranked.share <= 0.05),
        "found_at_10": int(ranked.share <= 0.1),
        "tokens": ranked.n_tokens,
        "place_right": int(place_right),
        "auc_pr": detection_scores.auc_pr(smoothed, labels),
        "vus_pr": detection_scores.vus_pr(smoothed, labels),
        "threshold": threshold,
        **detection_scores.point_scores(flagged, labels),
        **{f"range_{name}": value for name, value in ranges.items()},
        "anomalies": len(spans),
        "test_rows": len(scores),
        "train_rows": series.train_end,
        "model": c.record["settings"]["model"],
        "window": c.window,
        **task_runs.facts(),
    }
    if o.point_adjust:
        adjusted = detection_scores.point_adjust(flagged, labels)
        row["f1_point_adjusted_inflated"] = detection_scores.point_scores(adjusted, labels)["f1"]
    return row


def compare(c: Comparison) -> list[str]:
    """Run every cell that has no result yet. Returns: what failed, a line each."""
    return task_runs.run_cells(c, cells_of(c), functools.partial(run_cell, c))


def finish(c: Comparison, rows: list[dict[str, Any]]) -> None:
    """Write results.csv and report.md, and print the summary."""
    anomaly_report.write(
        c.options.folder, pd.DataFrame(rows), c.series, command=c.record["command"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.anomaly`; returns the exit code."""
    return task_runs.main(argv, parse, resolve, plan=plan, compare=compare, finish=finish)


if __name__ == "__main__":
    launch.leave(main())
