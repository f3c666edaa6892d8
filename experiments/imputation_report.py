"""Tables, pictures and report.md of a folder that `experiments.imputation` wrote."""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import folder as folders
from experiments import report, study, task_runs
from experiments.flags import exact
from ltsm_jax.methods.strategies import STRATEGIES
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table

BASELINES = ("linear", "last", "seasonal_naive")
LABELS = {
    "linear": "linear interpolation",
    "last": "last value",
    "seasonal_naive": "seasonal naive",
}
BLOCK = ["data", "holes", "rate"]  # what rows must have in common to be compared


def label(method: str) -> str:
    """Name a method or baseline as tables do."""
    return LABELS.get(method) or report.label(method)


def rank(row: dict[str, Any]) -> Any:
    """Give the place of a row in results.csv."""
    known = [*STRATEGIES, *BASELINES]
    return row["data"], row["holes"], row["rate"], known.index(row["method"]), row["seed"]


def errors(results: pd.DataFrame, column: str = "test_mse") -> tuple[list[str], list[list[str]]]:
    """Set mean and spread over seeds as text: a row per data set, kind of holes and method, a
    column per rate."""
    rates = sorted(results["rate"].unique())
    body = []
    for (data, holes, method), group in results.groupby(["data", "holes", "method"], sort=False):
        cells = [str(data), str(holes), label(str(method))]
        for rate in rates:
            values = group.loc[group["rate"] == rate, column]
            cells.append(report.spread(values.mean(), values.std()))
        body.append(cells)
    return ["data", "holes", "method", *(f"{rate:g}" for rate in rates)], body


def ranks(results: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Set mean ranks and wins over blocks of data, holes and rate as text, by the test MSE, mean
    over seeds."""
    means = (
        results.groupby([*BLOCK, "method"], sort=False)["test_mse"]
        .mean()
        .unstack("method")
        .dropna(axis=1)
    )
    places = means.rank(axis=1)
    wins = places.eq(places.min(axis=1), axis=0)
    shared = wins.div(wins.sum(axis=1), axis=0).sum()
    order = places.mean().sort_values()
    body = [
        [label(method), f"{place:.2f}", f"{shared[method]:.3g} of {len(means)}"]
        for method, place in order.items()
    ]
    return ["method", "mean rank", "wins"], body


def differences(results: pd.DataFrame, against: str) -> tuple[list[str], list[list[str]]]:
    """Compare every method with one of them, block by block: relative difference in test MSE, seed
    against seed.

    The interval over blocks is that of `study.seed_interval`, of the mean over seeds of each block.
    """
    means = results.groupby([*BLOCK, "method"], sort=False)["test_mse"].mean().unstack("method")
    body = []
    for method in means.columns:
        if method == against:
            continue
        each = (100 * (means[method] / means[against] - 1)).dropna().to_numpy()
        if not len(each):
            continue
        low, high = study.seed_interval(each)
        interval = "" if math.isnan(low) else f"{low:+.1f} .. {high:+.1f}"
        body.append(
            [
                label(method),
                f"{each.mean():+.1f}",
                interval,
                f"{int((each < 0).sum())} of {len(each)}",
            ]
        )
    return ["method", "difference, %", "95 % over blocks", "better in"], body


def write(folder: Path, results: pd.DataFrame, command: str) -> None:
    """Write results.csv, report.md and its pictures, and print the table."""
    results = pd.DataFrame(sorted(results.to_dict("records"), key=rank))
    with folders.replacing(folder / folders.CSV) as temporary:
        results.to_csv(temporary, index=False)
    header, body = errors(results)
    task_runs.print_table(header, body)
    lines = ["# Imputation", "", f"    {command}", ""]
    lines += [
        "Test MSE of hidden points, standardised data (mean and spread over seeds), by rate:",
        "",
    ]
    lines += [markdown_table(header, body), ""]
    lines += ["After the ends of each fill were moved to the values beside it (`anchored`):", ""]
    models = results[~results["method"].isin(BASELINES)]
    lines += [markdown_table(*errors(models, "anchored_mse")), ""] if len(models) else []
    lines += ["## Ranks", "", "By test MSE, over data sets, kinds of holes and rates.", ""]
    lines += [markdown_table(*ranks(results)), ""]
    for against in ("ff", "linear"):
        if against in set(results["method"]):
            lines += [
                f"## Difference to {label(against)}",
                "",
                markdown_table(*differences(results, against)),
                "",
            ]
    pictures = draw(folder, results) if importlib.util.find_spec("matplotlib") else []
    lines += [f"![]({name})" for name in pictures] or [f"No pictures: {report.NO_PICTURES}."]
    report.write_text(folder / "report.md", [*lines, ""])
    print(f"report: {folder / 'report.md'}")


def draw(folder: Path, results: pd.DataFrame) -> list[str]:
    """Draw the error over the rate, and filled windows. Returns: file names."""
    place = folder / "plots"
    place.mkdir(exist_ok=True)
    groups = list(results.groupby(["data", "holes"], sort=False))
    figure, axes = new_figure(7, 3 * len(groups), nrows=len(groups), squeeze=False)
    for ax, ((data, holes), group) in zip(axes[:, 0], groups, strict=True):
        for method, rows in group.groupby("method", sort=False):
            means = rows.groupby("rate")["test_mse"].agg(["mean", "std"])
            style = {
                "linestyle": report.STYLES.get(method, (0, (1, 1))),
                "color": report.COLOURS.get(method),
            }
            ax.errorbar(
                means.index,
                means["mean"],
                yerr=means["std"].fillna(0),
                label=label(method),
                **style,
            )
        ax.set_yscale("log")
        ax.set(xlabel="share hidden", ylabel="test MSE of hidden points")
        ax.set_title(f"{data}, {holes}", fontsize="medium", loc="left")
        ax.legend(frameon=False, fontsize="x-small", ncols=2)
    figure.savefig(place / "rates.png")
    names = ["plots/rates.png"]
    models = results[~results["method"].isin(BASELINES)]
    if len(models):
        best = models.loc[models["val_mse"].idxmin()]
        names.append(_draw_fills(place, folder, models[models["method"] == best["method"]]))
    return names


def _draw_fills(place: Path, folder: Path, rows: pd.DataFrame) -> str:
    """Draw the first kept window of each data set and kind of holes, at the highest rate and the
    first seed."""
    shown = rows.sort_values(["rate", "seed"], ascending=[False, True]).drop_duplicates(
        ["data", "holes"]
    )
    figure, axes = new_figure(9, 2.2 * len(shown), nrows=len(shown), squeeze=False)
    for ax, row in zip(axes[:, 0], shown.to_dict("records"), strict=True):
        cell = (
            f"{row['data']}-{row['holes']}-{exact(row['rate'])}-{row['method']}-seed{row['seed']}"
        )
        with np.load(folder / "cells" / cell / "fills.npz") as stored:
            truth, visible, filled = (stored[name][0] for name in ("truth", "visible", "filled"))
        steps = np.arange(len(truth))
        ax.plot(steps, truth, color="#BBBBBB", linewidth=0.8, label="hidden truth")
        ax.plot(
            steps, np.where(visible, truth, np.nan), color="#334155", linewidth=0.9, label="shown"
        )
        ax.plot(
            steps,
            np.where(visible, np.nan, filled),
            color="#D55E00",
            linewidth=1.2,
            label=label(row["method"]),
        )
        ax.set_title(
            f"{row['data']}, {row['holes']}, rate {row['rate']:g}", fontsize="small", loc="left"
        )
        ax.legend(frameon=False, fontsize="x-small", ncols=3)
    figure.savefig(place / "fills.png")
    return "plots/fills.png"
