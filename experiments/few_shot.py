"""Which tuning pays with little data? Every method at several shares of it.

Run:   python -m experiments.few_shot --data ETTh1,ETTm1 --model timer-tiny \\
           --few-shot 0.01,0.05,0.25 --methods zero_shot,ff,sff,tfs \\
           --seeds 0,1,2 --epochs 4
       Every other flag is one of `python -m experiments.sff`.
Cost:  that of `experiments.sff` for each data set, model and share.
Gives: a folder of `experiments.sff` for each, and in the folder of --out one
       table across them: results.csv, differences.csv (each method with ff,
       seed against seed), ranks.csv and report.md with mean ranks, wins and
       pictures. The same command again goes on where the last one stopped.

Ranks, intervals and the rule by which a method helps or harms are those of
`experiments.study`.
"""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import dataclasses
import importlib.util
import itertools
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd

from experiments import flags, folder, launch, lists, report, sff, study, task_runs
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table


@dataclasses.dataclass(frozen=True)
class Options:
    """The comparisons to run. Flags that are not here go to `experiments.sff`."""

    program: ClassVar[str] = "experiments.few_shot"
    data: Annotated[tuple[str, ...], flags.words()] = ("ETTh1",)
    """benchmark names or files"""
    model: Annotated[tuple[str, ...], flags.words()] = ("timer-tiny",)
    """shipped names, model folders or hub names"""
    few_shot: Annotated[
        tuple[float, ...], flags.numbers(flags.TINY, 1, says="above 0 and at most 1")
    ] = (
        0.01,
        0.05,
        0.25,
    )
    """shares of the training windows"""
    out: Annotated[Path, flags.path("FOLDER")] = Path("runs/few-shot")
    """folder of the results"""


def words_of(o: Options, data: str, model: str, share: float, more: Sequence[str]) -> list[str]:
    """Write the command line of one comparison."""
    words = [
        "--data",
        data,
        "--model",
        model,
        "--few-shot",
        flags.exact(share),
        "--test-each-epoch",
    ]
    return [*words, *more, "--out", str(place_of(o, data, model, share=share))]


def place_of(o: Options, data: str, model: str, share: float) -> Path:
    """Give the folder of one comparison."""
    name = "-".join((Path(data).name.split(".")[0], Path(model).name, flags.exact(share)))
    return o.out / name


def combinations(o: Options) -> list[tuple[str, str, float]]:
    """Give every data set, model and share."""
    return list(itertools.product(o.data, o.model, o.few_shot))


def records_of(o: Options) -> list[dict[str, Any]]:
    """Read what the comparisons left so far: rows with their blocks of test errors, as `study`
    takes them.
    """
    found = []
    for data, model, share in combinations(o):
        place = place_of(o, data, model, share=share)
        if not (place / folder.CSV).is_file():
            continue
        for cell in report.read_folder(place, report.rank).compared().cells:
            facts = {"few_shot": share, "budget": ""}
            found.append(cell["row"] | facts | {"blocks": np.asarray(cell.get("test_blocks", ()))})
    return found


def wins(table: pd.DataFrame) -> pd.Series:
    """Count for each method the pairs of data, model and share in which its mean test MSE is the
    lowest.
    """
    means = table.groupby([*study.PAIR, "method"])["test_mse"].mean().unstack("method")
    best = means.eq(means.min(axis=1), axis=0)
    return best.div(best.sum(axis=1), axis=0).sum()


def errors(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Set test MSE, mean and spread over seeds, as text: a row per data set, model and method, a
    column per share.
    """
    shares = sorted(table["few_shot"].unique())
    body = []
    for (data, model, method), group in table.groupby(["data", "model", "method"], sort=False):
        cells = [str(data), str(model), report.label(str(method))]
        for share in shares:
            values = group.loc[group["few_shot"] == share, "test_mse"]
            cells.append(
                report.spread(values.mean(), values.std() if values.nunique() > 1 else math.nan)
            )
        body.append(cells)
    return ["data", "model", "method", *(f"{share:g}" for share in shares)], body


def rank_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Give mean rank and wins of each method, over all shares and for each share by itself."""
    rows = []
    parts = [("all", table), *((f"{share:g}", part) for share, part in table.groupby("few_shot"))]
    for share, part in parts:
        ranks, blocks, width = study.mean_ranks(part)
        won = wins(part)
        for row in ranks.to_dict("records"):
            facts = {"few_shot": share, "method": row["arm"], "mean_rank": row["rank"]}
            facts |= {"wins": won[row["arm"]], "pairs": blocks, "critical_difference": width}
            rows.append(facts)
    return rows


def write(o: Options, command: str) -> None:
    """Write the tables and report.md from what has run so far, and print the errors."""
    records = records_of(o)
    if not records:
        return
    rows = []
    for record in records:
        rows.append({name: value for name, value in record.items() if name != "blocks"})
    table, found = pd.DataFrame(rows), study.differences(records)
    ranks = pd.DataFrame(rank_rows(table))
    for name, content in (("results", table), ("differences", found), ("ranks", ranks)):
        with folder.replacing(o.out / f"{name}.csv") as temporary:
            content.to_csv(temporary, index=False)
    header, body = errors(table)
    task_runs.print_table(header, body)
    lines = ["# Few-shot tuning", "", f"    {command}", ""]
    lines += ["Test MSE by share of the training windows (mean and spread over seeds):", ""]
    lines += [markdown_table(header, body), "", "## Mean ranks and wins", ""]
    body = []
    for row in ranks.to_dict("records"):
        width = row["critical_difference"]
        cells = [row["few_shot"], report.label(row["method"]), f"{row['mean_rank']:.2f}"]
        body.append([*cells, f"{row['wins']:.3g}", "" if math.isnan(width) else f"{width:.2f}"])
    lines += [
        markdown_table(["share", "method", "mean rank", "wins", "critical difference"], body),
        "",
    ]
    if len(found):
        lines += ["## Gain over full fine-tuning", "", study.gain_table(found), ""]
    if importlib.util.find_spec("matplotlib"):
        draw(o.out / "shares.png", table)
        lines += ["![](shares.png)", ""]
    report.write_text(o.out / "report.md", lines)
    print(f"report: {o.out / 'report.md'}")


def draw(file: Path, table: pd.DataFrame) -> None:
    """Draw the test error of each method over the share of the windows, a panel for each data set
    and model.
    """
    groups = list(table.groupby(["data", "model"], sort=False))
    figure, axes = new_figure(7, 3 * len(groups), nrows=len(groups), squeeze=False)
    for ax, ((data, model), group) in zip(axes[:, 0], groups, strict=True):
        for method, rows in group.groupby("method", sort=False):
            means = rows.groupby("few_shot")["test_mse"].agg(["mean", "std"])
            style = {"linestyle": report.STYLES.get(method), "color": report.COLOURS.get(method)}
            ax.errorbar(
                means.index,
                means["mean"],
                yerr=means["std"].fillna(0),
                label=report.label(method),
                **style,
            )
        ax.set_xscale("log")
        ax.set(xlabel="share of the training windows", ylabel="test MSE")
        ax.set_title(f"{data}, {model}", fontsize="medium", loc="left")
        ax.legend(frameon=False, fontsize="x-small", ncols=2)
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.few_shot`; returns the exit code."""
    return launch.guarded(lambda: _few_shot(sys.argv[1:] if argv is None else argv))


def _few_shot(argv: Sequence[str]) -> int:
    o, more = flags.parse_some(Options, argv, __doc__)
    commands = [words_of(o, *combination, more) for combination in combinations(o)]
    for words in commands:
        sff.parse(words)  # all bad flags before anything runs
    o.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m {o.program} {shlex.join(argv)}"
    code = lists.each(commands, sff.main, lambda: write(o, command))
    return code


if __name__ == "__main__":
    launch.leave(main())
