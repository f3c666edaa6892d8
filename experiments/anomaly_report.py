"""Tables, pictures and report.md of a folder that `experiments.anomaly` wrote."""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments import folder as folders
from experiments import report, task_runs
from ltsm_jax.methods.strategies import STRATEGIES
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table
from ltsm_jax.tasks.anomaly import Labelled

BASELINES = ("last", "z_score", "discord")
LABELS = {"last": "last value", "z_score": "moving z-score", "discord": "matrix-profile discord"}
QUANTILES = (1, 3, 5, 10)  # per cent of the tokens
EXAMPLES = 6  # series that are drawn
AROUND = 600  # rows that are drawn before and after an anomaly
DRAWS = 2000  # of the bootstrap


def label(method: str) -> str:
    """Name a method or baseline as tables do."""
    return LABELS.get(method) or report.label(method)


def order(results: pd.DataFrame) -> pd.DataFrame:
    """Put rows in the order of results.csv: methods as the library lists them, then baselines; by
    file and seed."""
    known = [*STRATEGIES, *BASELINES]
    keys = results.assign(_method=results["method"].map(known.index))
    return (
        keys.sort_values(["_method", "seed", "file"]).drop(columns="_method").reset_index(drop=True)
    )


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Give a row per method: means over files of the means over seeds, in the order of `order`.

    Returns: columns method, files, missed, found_at_{1,3,5,10} (files, mean over seeds), alpha,
    mean_rank and wins
      (by alpha, among the methods, ties shared), place_right, vus_pr, auc_pr, f1, range_f1,
      seconds.
    """
    by_file = results.groupby(["file", "method"], sort=False)
    alphas = by_file["alpha"].mean().unstack()
    ranks = alphas.rank(axis=1)
    best = alphas.eq(alphas.min(axis=1), axis=0)
    wins = best.div(best.sum(axis=1), axis=0).sum()
    rows = []
    for method, group in order(results).groupby("method", sort=False):
        seeds = group["seed"].nunique()
        row = {
            "method": method,
            "files": group["file"].nunique(),
            "missed": group["rank"].isna().sum() / seeds,
        }
        row |= {f"found_at_{q}": group[f"found_at_{q}"].sum() / seeds for q in QUANTILES}
        row |= {
            "alpha": group["alpha"].mean(),
            "mean_rank": ranks[method].mean(),
            "wins": wins[method],
        }
        row["place_right"] = group["place_right"].sum() / seeds
        row |= {name: group[name].mean() for name in ("vus_pr", "auc_pr", "f1", "range_f1")}
        row["seconds"] = group["seconds"].sum() / seeds
        rows.append(row)
    return pd.DataFrame(rows)


def difference(
    results: pd.DataFrame, first: str, second: str, column: str = "vus_pr"
) -> tuple[float, float, float]:
    """Give the mean over files of `first` minus `second`, and a 95 % interval: bootstrap over
    files, 2000 draws."""
    by_file = results.groupby(["file", "method"])[column].mean().unstack()
    each = (by_file[first] - by_file[second]).dropna().to_numpy()
    draws = np.random.default_rng(0).choice(each, size=(DRAWS, len(each))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(each.mean()), float(low), float(high)


def write(folder: Path, results: pd.DataFrame, series: Sequence[Labelled], command: str) -> None:
    """Write results.csv, report.md and its pictures, and print the summary."""
    results = order(results)
    with folders.replacing(folder / folders.CSV) as temporary:
        results.to_csv(temporary, index=False)
    header, rows = summary_cells(summarise(results))
    task_runs.print_table(header, rows)
    pictures = draw(folder, results, series) if importlib.util.find_spec("matplotlib") else []
    with folders.replacing(folder / "report.md") as temporary:
        temporary.write_text(text_of(results, command, pictures), encoding="utf-8")
    print(f"report: {folder / 'report.md'}")


def summary_cells(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Set the summary as text."""
    header = [
        "method",
        *(f"found at {q} %" for q in QUANTILES),
        "missed",
        "mean alpha",
        "mean rank",
        "wins",
    ]
    header += ["place right", "VUS-PR", "AUC-PR", "F1", "range F1", "seconds"]
    rows = []
    for _, one in summary.iterrows():
        cells = [label(one["method"])]
        cells += [f"{one[f'found_at_{q}']:.3g} of {one['files']}" for q in QUANTILES]
        cells += [
            f"{one['missed']:.3g}",
            f"{one['alpha']:.3f}",
            f"{one['mean_rank']:.2f}",
            f"{one['wins']:.1f}",
        ]
        cells += [f"{one['place_right']:.3g}"]
        cells += [f"{one[name]:.3f}" for name in ("vus_pr", "auc_pr", "f1", "range_f1")]
        rows.append([*cells, f"{one['seconds']:.0f}"])
    return header, rows


def text_of(results: pd.DataFrame, command: str, pictures: Sequence[str]) -> str:
    """Write report.md."""
    summary = summarise(results)
    methods = summary["method"].tolist()
    lines = [
        "# Anomaly detection",
        "",
        f"    {command}",
        "",
        markdown_table(*summary_cells(summary)),
        "",
    ]
    lines += [
        "alpha: share of the tokens, from the highest score, that must be flagged to find an "
        "anomaly (1: missed); found at q %: files with alpha <= q %. Rank and wins: by alpha "
        "among the methods of a file.",
        "",
    ]
    lines += differences(results, methods)
    lines += ["## Alpha of each file", ""]
    alphas = results.groupby(["file", "method"])["alpha"].mean().unstack()[methods].sort_index()
    body = []
    for name, row in zip(alphas.index, alphas.to_numpy()):
        body.append([name, *(f"{value:.4f}" for value in row)])
    lines += [markdown_table(["file", *map(label, methods)], body), ""]
    if "f1_point_adjusted_inflated" in results:
        lines += [
            "## F1 after point adjustment",
            "",
            "It inflates: one flagged row counts for a whole anomaly.",
            "",
        ]
        means = results.groupby("method")["f1_point_adjusted_inflated"].mean().to_dict()
        body = [[label(method), f"{means[method]:.3f}"] for method in methods]
        lines += [markdown_table(["method", "F1, point-adjusted"], body), ""]
    lines += [f"![]({name})" for name in pictures] or [f"No pictures: {report.NO_PICTURES}."]
    return "\n".join([*lines, ""])


def differences(results: pd.DataFrame, methods: Sequence[str]) -> list[str]:
    """Compare every tuned method with full fine-tuning, else the first one, file by file."""
    against = "ff" if "ff" in methods else methods[0]
    others = [method for method in methods if method != against]
    if results["file"].nunique() < 2 or not others:
        return []
    body = []
    for method in others:
        cells = [label(method)]
        for column in ("alpha", "vus_pr"):
            mean, low, high = difference(results, method, against, column=column)
            cells.append(f"{mean:+.4f} ({low:+.4f} .. {high:+.4f})")
        body.append(cells)
    header = ["method", "alpha (lower is better)", "VUS-PR (higher is better)"]
    told = "Means over files, with 95 % intervals of a bootstrap over files."
    return [f"## Difference to {label(against)}", "", markdown_table(header, body), "", told, ""]


def draw(folder: Path, results: pd.DataFrame, series: Sequence[Labelled]) -> list[str]:
    """Draw the share of files found over flagged tokens, and scores around some anomalies. Returns:
    file names."""
    place = folder / "plots"
    place.mkdir(exist_ok=True)
    figure, ax = new_figure(7, 4)
    for method, group in results.groupby("method", sort=False):
        share = np.sort(group["alpha"].to_numpy())
        found = np.arange(1, len(share) + 1) / len(share)
        style = report.STYLES.get(method, (0, (1, 1)))
        ax.step(
            100 * share,
            100 * found,
            where="post",
            label=label(method),
            linestyle=style,
            color=report.COLOURS.get(method),
        )
    ax.set_xscale("log")
    ax.set(
        xlabel="flagged tokens, % of those with the highest score",
        ylabel="files whose anomaly is found, %",
    )
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(place / "found.png")
    names = ["plots/found.png"]
    shown = results[~results["method"].isin(BASELINES)]
    if len(shown):
        method = summarise(shown).sort_values("vus_pr")["method"].iloc[-1]
        names.append(
            _draw_examples(
                place, folder, series[:EXAMPLES], method=method, seed=int(shown["seed"].min())
            )
        )
    return names


def _draw_examples(
    place: Path, folder: Path, series: Sequence[Labelled], method: str, seed: int
) -> str:
    figure, axes = new_figure(9, 2.2 * len(series), nrows=len(series), ncols=1, squeeze=False)
    for ax, one in zip(axes[:, 0], series, strict=True):
        first, last = one.anomaly
        low, high = max(first - AROUND, one.train_end), min(last + AROUND, len(one.values))
        rows = np.arange(low, high)
        ax.plot(rows, one.values[low:high], color="#334155", linewidth=0.8)
        ax.axvspan(first, last + 1, color="#D55E00", alpha=0.25, linewidth=0)
        file = folder / "cells" / f"{one.name}-{method}-seed{seed}" / "scores.npz"
        if file.is_file():
            with np.load(file) as stored:
                scores = stored["scores"][low - one.train_end : high - one.train_end]
            other = ax.twinx()
            other.plot(rows[: len(scores)], scores, color="#0072B2", linewidth=0.8)
            other.set_yticks([])
        ax.set_title(f"{one.name}: score of {label(method)}", fontsize="small", loc="left")
    figure.savefig(place / "examples.png")
    return "plots/examples.png"
