"""Does smoothing help, does pruning help, and when? Arms x models x data.

Run:   python -m experiments.study --plan
       python -m experiments.study --data ETTh1,weather --models timer-tiny \\
           --arms zero_shot,ff,sff,pruned+ff --shares 0.1,1 --steps 300,1000
       python -m experiments.study --released
Cost:  --plan says it; a small corner of it takes minutes on 2 CPU cores.
Gives: in the folder of --out: results.csv (a row per pair, arm and seed),
       differences.csv (each arm against ff in each pair), ranks.csv,
       report.md, ranks.png where matplotlib is installed, and a folder of
       `experiments.sff` or `experiments.prune_then_finetune` for each pair.
       The same command again goes on; a larger one joins what is there.
Flags: those of `experiments.sff` that are not among these, as --batch-size,
       go to every pair.

Pairs: a pair is a data set, a model, a share of its training windows and a
       budget of steps. A budget is taken in whole epochs, at least one; what
       comes to as many epochs as another budget is run once. Learning rate,
       alpha, ratio and EMA of each arm are its own: the ones with the lowest
       validation MSE at the first seed, then fixed for the others.

THE RULE, written down before the runs:
       In a pair an arm HELPS where its mean gain over ff (test MSE, each seed
       against the same seed, weights of the epoch with the lowest validation
       MSE) is above 0, and both 95 % intervals of it leave 0 out: that over
       seeds (Student's t) and that over blocks of time of the test part (block
       bootstrap, seeds averaged). It HARMS where the same is true below 0.
       The claim of a paper, smoothing for sff and pruning for pruned+ff, is
       "reproduced" where its arm helps in more than half of the pairs, each
       arm at its own validated setting. Otherwise the answer is
       "implementation exact, claim not confirmed on obtainable weights".
       A pair with one seed counts as not shown. Nothing is left out after the
       fact: every pair that was asked for is in the tables.

Ranks: of mean test MSE, as a share of that of ff, over the (data, model)
       blocks that have every arm, shares and budgets averaged, as those of
       one block are no new data; two arms differ where their mean ranks are
       further apart than the critical difference of Nemenyi's test at 5 %
       (Demsar, JMLR 7, 2006).
"""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false, reportCallIssue=false, reportReturnType=false

import dataclasses
import importlib.util
import itertools
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import pandas as pd
import tyro

from experiments import flags, folder, launch, prune_then_finetune, report, sff
from experiments.flags import TINY, exact
from ltsm_jax import trees
from ltsm_jax.data import steps_per_epoch
from ltsm_jax.methods import checks
from ltsm_jax.methods.strategies import MIXED, STRATEGIES
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table

DATA = ("ETTh1", "ETTm1", "weather", "exchange_rate", "traffic_6", "solar_12", "national_illness")
ARMS = (
    "zero_shot",
    "ff",
    "tfs",
    "lp",
    "lpff",
    "l2sp",
    "lora",
    "noise",
    "sff",
    "pruned+ff",
    "pruned+sff",
)
CLAIMS = {"sff": "smoothing (SFF)", "pruned+ff": "pruning (Prune-then-Finetune)"}
PAIR = ["data", "model", "few_shot", "budget"]
NOT_CONFIRMED = "implementation exact, claim not confirmed on obtainable weights"
REFERENCE = "ff"
KNOWN = (*STRATEGIES, *(f"pruned+{name}" for name in prune_then_finetune.TUNED))
# 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom
STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
# 95 % quantile of the studentised range with infinitely many degrees of freedom over sqrt(2), of 2,
# 3, ... arms
NEMENYI = (
    1.960,
    2.344,
    2.569,
    2.728,
    2.850,
    2.948,
    3.031,
    3.102,
    3.164,
    3.219,
    3.268,
    3.313,
    3.354,
    3.391,
    3.426,
)
NEMENYI += (3.458, 3.489, 3.517, 3.544)
SHARE = r"@(0?\.\d+|1)$"  # of a data set of its own, behind its name
# a second, of two CPU cores in training: for a guess of the cost before anything was measured
FLOPS = 5e10
RELEASED = (
    "--mode",
    "direct",
    "--batch-size",
    "2048",
    "--schedule",
    "halving",
    "--epochs",
    "10",
    "--lr",
    "3e-5",
    "--weight-decay",
    "0",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the study."""

    program: ClassVar[str] = "experiments.study"
    data: Annotated[tuple[str, ...], flags.words()] = DATA
    """benchmark names or files; NAME@SHARE has that share of its training windows in place of
    --shares, for sets that are much larger than the others
    """
    models: Annotated[tuple[str, ...], flags.words()] = ("timer-tiny",)
    """shipped names, model folders or hub names"""
    arms: Annotated[
        tuple[str, ...],
        flags.names(KNOWN),
        flags.described(f"what to compare with ff, of {', '.join(STRATEGIES)} and pruned+METHOD"),
    ] = ARMS
    shares: Annotated[tuple[float, ...], flags.numbers(TINY, 1, says="above 0 and at most 1")] = (
        0.05,
        0.25,
        1.0,
    )
    """shares of the training windows"""
    train_windows: Annotated[int | None, flags.whole(1, unset="--shares")] = None
    """train on so many windows of each data set, evenly spread, in place of a share of them"""
    steps: Annotated[tuple[int, ...], flags.wholes(1, says="at least 1")] = (300, 1000, 3000, 10000)
    """budgets, in steps of training"""
    seeds: Annotated[
        tuple[int, ...], flags.wholes(0, 2**32 - 1, says="between 0 and 2**32 - 1")
    ] = (0, 1, 2, 3, 4)
    """a run for each; the first chooses the settings"""
    lr: Annotated[tuple[float, ...], flags.numbers(TINY, flags.HUGE, says="positive")] = (
        1e-5,
        1e-4,
        1e-3,
    )
    """learning rates to choose from"""
    alpha: Annotated[tuple[float, ...], flags.numbers(0, 1, says="between 0 and 1")] = (
        0.7,
        0.9,
        0.95,
    )
    """weights of the pretrained side to choose from"""
    ratio: Annotated[
        tuple[float, ...], flags.numbers(TINY, flags.BELOW_1, says="above 0 and below 1")
    ] = (
        0.01,
        0.05,
        0.2,
    )
    """shares pruned per epoch to choose from, a pruning run for each"""
    horizon: Annotated[int, flags.whole(1)] = 96
    """steps to forecast"""
    score_windows: Annotated[int | None, flags.whole(1, unset="all")] = None
    """validate and test on about so many windows, evenly spread over time: every n-th start of all
    variates, n for each data set; by default as --score-stride says
    """
    curvature: bool = False
    """measure the curvature of the training loss before the first step, for its correlation with
    the gain of sff
    """
    released: bool = False
    """the recipe of the SFF release in place of the grids and budgets: Adam 3e-5, batch 2048,
    halving, 10 epochs, direct loss, alpha 0.7
    """
    out: Annotated[Path, flags.path("FOLDER")] = Path("runs/study")
    """folder of the results"""
    plan: bool = False
    """print what would run, and what it may cost, and stop"""
    more: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = ""  # further flags, for every pair

    def problems(self, _given: set[str]) -> list[str]:
        """Say what does not go together."""
        found = []
        if REFERENCE not in self.arms:
            found.append(f"--arms lacks {REFERENCE}, which all others are compared with")
        return found


@dataclasses.dataclass(frozen=True)
class Pair:
    """One data set, model, share of the windows and budget, and what they come to."""

    data: str
    model: str
    few_shot: float
    budget: str
    epochs: int
    steps: int
    flops: float  # of a step
    stride: int | None = None  # of scored windows, None: as given

    @property
    def name(self) -> str:
        """Its folder, without what kind of comparison it is."""
        parts = (Path(self.data).name.split(".")[0], Path(self.model).name)
        return "-".join((*parts, exact(self.few_shot), self.budget))


def pairs_of(o: Options) -> list[Pair]:
    """Every pair that the options ask for; each data set and model is looked at, which takes a
    second.
    """
    found = []
    for asked in o.data:
        data, _, own_share = asked.rpartition("@") if re.search(SHARE, asked) else (asked, "", "")
        shares = (float(own_share),) if own_share else o.shares
        for model in o.models:
            words = [
                "--data",
                data,
                "--model",
                model,
                "--horizon",
                str(o.horizon),
                *shlex.split(o.more),
            ]
            c = sff.resolve(sff.parse([*words, *(RELEASED if o.released else ())]))
            batch, config = c.config.batch_size, c.model.config
            stride = o.score_windows and stride_for(c.splits.test.n, o.score_windows)
            assert batch is not None, "filled"
            tokens = c.settings["context"] / getattr(config, "patch_len", c.settings["context"])
            if o.train_windows is not None:
                # the half keeps the rounding to six digits from changing the number
                shares = (min(float(f"{(o.train_windows + 0.5) / c.windows.n:.6g}"), 1.0),)
            for share in shares:
                windows = max(int(c.windows.n * share), 1)
                an_epoch = steps_per_epoch(windows, min(batch, windows))
                flops = 6.0 * trees.count(c.params) * tokens * min(batch, windows)
                seen = set()
                for budget in (None,) if o.released else o.steps:
                    epochs = 10 if budget is None else max(round(budget / an_epoch), 1)
                    name = "released" if budget is None else str(budget)
                    if epochs not in seen:
                        found.append(
                            Pair(
                                data=data,
                                model=model,
                                few_shot=share,
                                budget=name,
                                epochs=epochs,
                                steps=epochs * an_epoch,
                                flops=flops,
                                stride=stride,
                            )
                        )
                    seen.add(epochs)
    return found


def stride_for(count: int, wanted: int) -> int:
    """Find the stride that leaves about `wanted` of `count` windows.

    It has no factor in common with 2 * 3 * 5 * 7, so that it meets every hour of a day and every
    day of a week.
    """
    stride = max(count // wanted, 1)
    while math.gcd(stride, 210) > 1:
        stride += 1
    return stride


def commands(o: Options, pair: Pair) -> dict[str, list[str]]:
    """Give the words of the comparisons of a pair: by program, "sff" and, with pruned arms,
    "prune".
    """
    words = ["--data", pair.data, "--model", pair.model, "--few-shot", exact(pair.few_shot)]
    words += [
        "--horizon",
        str(o.horizon),
        "--seeds",
        ",".join(map(str, o.seeds)),
        "--test-each-epoch",
    ]
    words += [] if pair.stride is None else ["--score-stride", str(pair.stride)]
    alphas, choose = ",".join(map(exact, o.alpha)), len(o.alpha) > 1
    if o.released:
        words += RELEASED
        alphas, choose = "0.7", False
    else:
        words += ["--epochs", str(pair.epochs), "--lr", ",".join(map(exact, o.lr))]
    words += shlex.split(o.more)

    def mixing(methods: Sequence[str]) -> list[str]:
        if not set(methods) & set(MIXED):
            return []
        return ["--alpha", alphas, *(["--choose-alpha"] if choose else [])]

    plain = [arm for arm in o.arms if not arm.startswith("pruned+")]
    curved = ["--curvature", "0"] if o.curvature else []
    pruned = [arm.removeprefix("pruned+") for arm in o.arms if arm.startswith("pruned+")]
    found = {
        "sff": [
            *words,
            "--methods",
            ",".join(plain),
            *mixing(plain),
            *curved,
            "--out",
            str(o.out / "sff" / pair.name),
        ]
    }
    if pruned:
        own = [
            "--ratio",
            ",".join(map(exact, o.ratio)),
            "--tune",
            "validated",
            "--timed-runs",
            "0",
            "--no-whole",
        ]
        own += [
            "--methods",
            ",".join(pruned),
            *mixing(pruned),
            "--out",
            str(o.out / "prune" / pair.name),
        ]
        found["prune"] = [*words, *own]
    return found


PROGRAMS = {"sff": sff, "prune": prune_then_finetune}


def plan(o: Options, pairs: Sequence[Pair]) -> str:
    """Say which pairs would run, in how many runs, and what they may cost."""
    lines, seconds, total = [], 0.0, 0
    rate = measured(o)
    for pair in pairs:
        runs = 0
        for program, words in commands(o, pair).items():
            options = PROGRAMS[program].parse(words)
            runs += n_runs(program, options)
        speed = rate.get(pair.model)
        seconds += runs * pair.steps * (speed or pair.flops / FLOPS)
        total += runs
        lines.append(f"{pair.name}: {pair.epochs} epochs, {pair.steps} steps, {runs} runs")
    how = "from finished runs where there are any" if rate else "a guess from sizes"
    cost = (
        f"about {seconds / 3600:.1f} hours of training ({how}), without validation and compilation"
    )
    return "\n".join([*lines, f"{len(pairs)} pairs, {total} runs; {cost}"])


def n_runs(program: str, options: Any) -> int:
    """Count the runs that train of a comparison, those of later seeds included."""
    if program == "sff":
        trained = [cell for cell in sff.cells_of(options) if cell.method != "zero_shot"]
        return len(trained) + sff.n_chosen(options)
    first = [*prune_then_finetune.whole_cells(options, options.seeds[:1])]
    pairs = list(itertools.product(options.shares, options.ema))
    first += prune_then_finetune.tuned_cells(options, pairs, options.seeds[:1])
    later = len(options.methods) * (len(options.seeds) - 1)
    return sum(cell.method != "zero_shot" for cell in first) + later


def measured(o: Options) -> dict[str, float]:
    """Seconds of a step by model, mean over what has run; empty before anything has."""
    file = o.out / "results.csv"
    if not file.is_file():
        return {}
    table = pd.read_csv(file)
    table = table[table["steps"] > 0]
    return {
        str(model): float((g["seconds"] / g["steps"]).mean())
        for model, g in table.groupby("asked_model")
    }


# --------------------------------------------------------------------------------------------------
# what came out


def records_of(o: Options, pair: Pair) -> list[dict[str, Any]]:
    """Read what the comparisons of a pair left: each chosen row, with its blocks of test errors
    under "blocks".
    """
    found = []
    for program in commands(o, pair):
        path = o.out / program / pair.name
        if not (path / folder.CSV).is_file():
            continue
        rank = report.rank if program == "sff" else prune_then_finetune.pruning_report.rank
        for cell in report.read_folder(path, rank).compared().cells:
            if program == "prune" and not cell["method"].startswith("pruned+"):
                # the whole model's runs are in the other folder, and the pruned one alone is no arm
                continue
            if cell["method"] not in o.arms:
                continue  # of a larger command
            facts = {"few_shot": pair.few_shot, "budget": pair.budget, "asked_model": pair.model}
            steps = cell["epochs"] * pair.steps // pair.epochs
            facts |= {"steps": steps, "blocks": np.asarray(cell.get("test_blocks", ()))}
            facts["sharpness"] = (cell.get("start_curvature") or {}).get("top_eigenvalue", math.nan)
            found.append(cell["row"] | facts)
    return found


def differences(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Compare each arm with ff in each pair.

    Args:
      records: rows of results with "blocks", as `records_of` gives them.
    Returns: a row per pair and arm: seeds, gain (test MSE of ff minus that of the arm, mean over
      seeds), gain in per cent, intervals over seeds and over blocks of time (NaN where there is
      none), and what the rule says: helps, harms or not shown.
    """
    by_arm: dict[tuple, dict[str, dict[int, dict[str, Any]]]] = {}
    for record in records:
        arms = by_arm.setdefault(tuple(record[name] for name in PAIR), {})
        arms.setdefault(record["method"], {})[record["seed"]] = record
    rows = []
    for pair, arms in by_arm.items():
        base = arms.get(REFERENCE, {})
        for arm, mine in arms.items():
            seeds = sorted(set(base) & set(mine))
            if arm == REFERENCE or not seeds:
                continue
            gain = np.array([base[seed]["test_mse"] - mine[seed]["test_mse"] for seed in seeds])
            whole = np.mean([base[seed]["test_mse"] for seed in seeds])
            low, high = seed_interval(gain)
            time = block_interval([base[seed]["blocks"] - mine[seed]["blocks"] for seed in seeds])
            row = dict(zip(PAIR, pair, strict=True)) | {
                "arm": arm,
                "seeds": len(seeds),
                "gain": gain.mean(),
            }
            row |= {"gain_percent": 100 * gain.mean() / whole, "seed_low": low, "seed_high": high}
            row |= {"block_low": time[0], "block_high": time[1]}
            row |= {"sharpness_before": measured_mean(base), "sharpness": measured_mean(mine)}
            rows.append(row | {"rule": judged(gain.mean(), (low, high), time)})
    return pd.DataFrame(rows)


def measured_mean(runs: dict[int, dict[str, Any]]) -> float:
    """Mean top eigenvalue of the starts of some runs by seed, over those where it was measured; NaN
    for none.
    """
    values = [run.get("sharpness", math.nan) for run in runs.values()]
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def sharpness_lines(found: pd.DataFrame) -> list[str]:
    """Say how the gain of sff goes with the sharpness of the checkpoint, and with what mixing takes
    from it.

    found: as `differences` gives it; pairs whose curvature was not measured are left out.
    Returns: lines of the report, none for fewer than four pairs.
    """
    mine = (
        found[found["arm"] == "sff"].dropna(subset=["sharpness_before", "sharpness"])
        if len(found)
        else found
    )
    if len(mine) < 4:
        return []
    change = mine["sharpness"] / mine["sharpness_before"]
    before, less = (spearman(x, mine["gain_percent"]) for x in (mine["sharpness_before"], -change))
    return [
        "",
        "## Sharpness",
        "",
        "Top eigenvalue of the Hessian of the training loss, before the first step, over "
        f"{len(mine)} pairs: mixing lowers it in {int((change < 1).sum())}. Spearman's rank "
        f"correlation with the gain of sff in per cent: {before:+.2f} of the eigenvalue before "
        f"mixing, {less:+.2f} of its relative fall.",
    ]


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank."""
    return float(
        np.corrcoef(pd.Series(np.asarray(x)).rank(), pd.Series(np.asarray(y)).rank())[0, 1]
    )


def seed_interval(gain: np.ndarray) -> tuple[float, float]:
    """95 % around a mean over seeds by Student's t; NaN for fewer than two."""
    if len(gain) < 2:
        return math.nan, math.nan
    quantile = (
        STUDENT[len(gain) - 2] if len(gain) - 2 < len(STUDENT) else 1.96 + 2.6 / (len(gain) - 1)
    )
    width = quantile * gain.std(ddof=1) / len(gain) ** 0.5
    return float(gain.mean() - width), float(gain.mean() + width)


def block_interval(gaps: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % around a mean over blocks of time, seeds averaged; NaN where there are too
    few blocks.
    """
    gap = np.mean(gaps, axis=0)
    if not len(gap):
        return math.nan, math.nan
    numbers = np.arange(len(gap))
    found = checks.bootstrap_difference(
        gap, np.ones(len(gap)), numbers, item_W=np.zeros_like(numbers)
    )
    return found.low, found.high


def judged(mean: float, *intervals: tuple[float, float]) -> str:
    """Apply the rule to a pair: both intervals leave 0 out on the side of the mean."""
    if mean > 0 and all(low > 0 for low, _ in intervals):
        return "helps"
    if mean < 0 and all(high < 0 for _, high in intervals):
        return "harms"
    return "not shown"


def verdicts(found: pd.DataFrame) -> dict[str, str]:
    """Say of each claim whether the rule calls it reproduced."""
    answers = {}
    for arm, claim in CLAIMS.items():
        mine = found[found["arm"] == arm] if len(found) else found
        if not len(mine):
            continue
        helps, harms = (int((mine["rule"] == word).sum()) for word in ("helps", "harms"))
        counts = f"helps in {helps} of {len(mine)} pairs, harms in {harms}"
        answer = "reproduced" if helps > len(mine) / 2 else NOT_CONFIRMED
        answers[arm] = f"{claim}: {answer} ({counts})."
    return answers


def mean_ranks(table: pd.DataFrame) -> tuple[pd.DataFrame, int, float]:
    """Rank the arms in each (data, model) by their mean test MSE over shares, budgets and seeds.

    Args:
      table: rows of results.
    Returns: arm and rank (1 is best, ties share), best first; the number of (data, model) that have
      every arm; the critical difference of mean ranks, NaN for fewer than two blocks or an unknown
      number of arms.
    """
    means = table.groupby([*PAIR, "method"])["test_mse"].mean().unstack("method").dropna()
    if REFERENCE not in means or not len(means):
        return pd.DataFrame({"arm": [], "rank": []}), 0, math.nan
    # an error of one data set is not an error of another: shares of that of ff
    means = means.div(means[REFERENCE], axis=0).groupby(["data", "model"]).mean()
    ranks = means.rank(axis=1).mean().sort_values()
    blocks, arms = len(means), len(means.columns)
    known = blocks > 1 and 2 <= arms < len(NEMENYI) + 2
    width = NEMENYI[arms - 2] * math.sqrt(arms * (arms + 1) / (6 * blocks)) if known else math.nan
    return pd.DataFrame({"arm": ranks.index, "rank": ranks.to_numpy()}), blocks, width


def plot_ranks(ranks: pd.DataFrame, width: float, file: Path) -> None:
    """Draw mean ranks on a line; a bar joins arms that are no further apart than the critical
    difference.
    """
    figure, ax = new_figure(8, 1.2 + 0.3 * len(ranks))
    for i, row in enumerate(ranks.itertuples()):
        ax.plot([row.rank, row.rank], [0, -1 - i], color="#BBBBBB", linewidth=0.8)
        ax.text(row.rank, -1 - i, f" {row.arm} ({row.rank:.2f})", va="center", fontsize=9)
    values = ranks["rank"].to_numpy()
    if not math.isnan(width):
        for i, value in enumerate(values):
            last = int(np.flatnonzero(values - value <= width).max())
            if last > i:
                ax.plot([value, values[last]], [0.3 + 0.15 * i] * 2, color="black", linewidth=2.5)
    ax.set_yticks([])
    ax.set_xlabel(
        "mean rank of the test error (1: best); a bar: no further apart than the critical "
        "difference"
    )
    figure.savefig(file)


def write(o: Options, pairs: Sequence[Pair]) -> list[str]:
    """Write the tables and the report from what has run so far.

    Returns: the answers, a line each.
    """
    records = []
    for pair in pairs:
        records += records_of(o, pair)
    if not records:
        return []
    rows = []
    for record in records:
        own = {name: x for name, x in record.items() if name not in ("blocks", "sharpness")}
        rows.append(own)
    table, found = pd.DataFrame(rows), differences(records)
    ranks, blocks, width = mean_ranks(table)
    for name, content in (("results", table), ("differences", found), ("ranks", ranks)):
        with folder.replacing(o.out / f"{name}.csv") as temporary:
            content.to_csv(temporary, index=False)
    answers = list(verdicts(found).values())
    missing = sum(not records_of(o, pair) for pair in pairs)
    lines = ["# The study", "", *(f"- {answer}" for answer in answers)]
    if missing:
        lines.append(f"- {missing} of {len(pairs)} pairs have not run yet.")
    lines += ["", "## Gain over full fine-tuning", "", gain_table(found)] if len(found) else []
    body = [[str(row["arm"]), f"{row['rank']:.2f}"] for row in ranks.to_dict("records")]
    lines += sharpness_lines(found)
    lines += ["", "## Mean ranks", "", markdown_table(["arm", "rank"], body)]
    cd = "unknown" if math.isnan(width) else f"{width:.2f}"
    lines += ["", f"Over {blocks} pairs of data and model; critical difference {cd}."]
    lines += [
        "",
        "## The rule",
        "",
        "```",
        (__doc__ or "").partition("THE RULE")[2].partition("\n\n")[0],
        "```",
    ]
    lines += ["", "## How it was made", "", "```", _again(o), "```", ""]
    report.write_text(o.out / "report.md", lines)
    if importlib.util.find_spec("matplotlib"):
        plot_ranks(ranks, width, o.out / "ranks.png")
    return answers


def _again(o: Options) -> str:
    return f"{flags.command(dataclasses.replace(o, more=''), always=('out',))} {o.more}".strip()


def gain_table(found: pd.DataFrame) -> str:
    """Set `differences` as a table of Markdown."""
    header = [*PAIR, "arm", "seeds", "gain, %", "95 % over seeds", "95 % over time", "rule"]
    body = []
    for row in found.to_dict("records"):
        spans = []
        for kind in ("seed", "block"):
            low, high = row[f"{kind}_low"], row[f"{kind}_high"]
            spans.append("" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}")
        cells = [str(row[name]) for name in (*PAIR, "arm", "seeds")]
        body.append([*cells, f"{row['gain_percent']:+.2f}", *spans, row["rule"]])
    return markdown_table(header, body)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.study`; returns the exit code."""
    return launch.guarded(lambda: _study(sys.argv[1:] if argv is None else argv))


def _study(argv: Sequence[str]) -> int:
    o, rest = flags.parse_some(Options, argv, __doc__)
    o = dataclasses.replace(o, more=shlex.join(rest))
    if problems := o.problems(flags.given(argv)):
        raise flags.UsageError("\n".join(problems))
    pairs = pairs_of(o)
    launch.say(plan(o, pairs))
    if o.plan:
        return 0
    failed = 0
    for i, pair in enumerate(pairs, 1):
        for program, words in commands(o, pair).items():
            launch.say(f"\npair {i} of {len(pairs)}, {program}: {pair.name}")
            code = PROGRAMS[program].main(words)
            if code not in (0, 1):  # stopped, or refused: the rest would fare alike
                return code
            failed += code  # a run that diverged; the others are there
            jax.clear_caches()  # nothing that was compiled serves the next pair, and it adds up
        for answer in write(o, pairs):
            launch.say(answer)
    launch.say(f"report: {o.out / 'report.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    launch.leave(main())
