"""Table, pictures and report.md of a folder that `experiments.sff` wrote.

Run:   python -m experiments.report runs/sff-etth1
Cost:  seconds; nothing is trained or evaluated.
Gives: a table on the terminal, report.md, and plots/*.png where matplotlib is
       installed (the extra `plots`). `experiments.sff` does it at its end.
"""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import tyro
from rich.console import Console
from rich.table import Table

from experiments import flags, grid, launch, tracked
from experiments import folder as folders
from experiments.flags import exact
from ltsm_jax import storage
from ltsm_jax.methods.strategies import STRATEGIES
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table

NAMES = {
    "zero_shot": "zero-shot",
    "ff": "full fine-tuning (FF)",
    "tfs": "from scratch (TFS)",
    "sff": "smoothed full fine-tuning (SFF)",
    "lp": "linear probing (LP)",
    "lpff": "LP, then FF",
    "l2sp": "FF held to the start (L2-SP)",
    "noise": "FF from checkpoint + noise",
    "shrink": "FF from the shrunken checkpoint",
    "perturb": "FF from checkpoint + random model",
    "sff_norm": "SFF, norms of tensors kept",
    "sff_channel": "SFF, norms of channels kept",
    "sff_sphere": "SFF on the sphere",
    "sff_keep": "SFF, head and embedding kept",
    "sff_warm": "SFF after an epoch of the head",
    "sff_stages": "SFF in two stages",
    "noise_stages": "noise in two stages",
    "lora": "adapters of low rank (LoRA)",
    "msft": "multi-scale fine-tuning (MSFT)",
    "recipe": "the family's own recipe",
    "last_value": "last value",
    "seasonal_naive": "seasonal naive",
}
SHORT = {
    "zero_shot": "zero-shot",
    "ff": "FF",
    "tfs": "TFS",
    "sff": "SFF",
    "lp": "LP",
    "lpff": "LPFF",
}
SHORT |= {
    "l2sp": "L2-SP",
    "noise": "noise",
    "sff_norm": "SFF norm",
    "sff_channel": "SFF channel",
    "sff_sphere": "SFF sphere",
    "sff_keep": "SFF keep",
    "sff_warm": "SFF warm",
    "sff_stages": "SFF stages",
    "noise_stages": "noise stages",
    "lora": "LoRA",
    "msft": "MSFT",
    "last_value": "last value",
    "seasonal_naive": "seasonal naive",
}
# Okabe & Ito's palette, told apart by all common kinds of colour vision; line styles say the same a
# second time.
COLOURS = {
    "zero_shot": "#555555",
    "ff": "#0072B2",
    "tfs": "#D55E00",
    "sff": "#009E73",
    "lp": "#CC79A7",
}
COLOURS |= {
    "lpff": "#56B4E9",
    "l2sp": "#E69F00",
    "noise": "#8A7A00",
    "lora": "#5D3A9B",
    "last_value": "#BBBBBB",
    "seasonal_naive": "#BBBBBB",
}
STYLES = {
    "zero_shot": (0, (4, 2)),
    "ff": "-",
    "tfs": (0, (1, 1)),
    "sff": (0, (7, 1.5)),
    "lp": (0, (5, 1, 1, 1)),
}
STYLES |= {
    "lpff": "--",
    "l2sp": "-.",
    "noise": (0, (3, 1, 1, 1, 1, 1)),
    "lora": (0, (6, 2)),
    "recipe": (0, (2, 2)),
}
MARKERS = {
    "zero_shot": "",
    "ff": "o",
    "tfs": "v",
    "sff": "s",
    "lp": "D",
    "lpff": "^",
    "l2sp": "P",
    "noise": "X",
}
MARKERS |= {"lora": "*", "recipe": "h"}
SCALED = "of standardised data (1: variance of the training part)"
SCALED_Y = "MSE of standardised data\n(1: variance of the training part)"
# times the lowest error: what is beyond it is cut at the edge, or it would squeeze all others
# together
FAR = 3.0
ERRORS = ("val_mse", "val_mae", "test_mse", "test_mae")
NO_PICTURES = "matplotlib is not installed (`pip install 'ltsm-jax[plots]'`)"


def label(method: str, alpha: float | None = None) -> str:
    """Short name of a row: "SFF 0.7", "FF"."""
    return SHORT.get(method, method) + (
        "" if alpha is None or np.isnan(alpha) else f" {exact(alpha)}"
    )


def rank(row: dict[str, Any]) -> Any:
    """The order of results.csv."""
    chosen = (
        row.get("lr") or 0.0,
        row.get("origin") or 0,
    )  # the same in all rows where nothing is chosen
    return list(STRATEGIES).index(row["method"]), row["alpha"] or 0.0, *chosen, row["seed"]


def chosen_by(lr: float | None, origin: int) -> str:
    """Say in the name of a run what it is compared by, where validation chooses settings."""
    return (f", lr {exact(lr)}" if lr is not None else "") + (
        f", origin {origin}" if origin else ""
    )


def is_fixed(group: pd.DataFrame) -> bool:
    """Say whether a seed has no say in the rows of an arm: a spread of 0 over seeds would say
    something else.
    """
    same = len(group) > 1 and all(group[column].nunique() == 1 for column in ERRORS)
    return same or set(group["method"]) == {"zero_shot"}


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """One row per (method, alpha): mean and std (n - 1) over seeds, and paired differences in test
    MSE.

    Args:
      results: the rows of results.csv.
    Returns: columns method, alpha, seeds, fixed (the same at every seed: its rows are no
      replicates, without a spread), {val_mse, val_mae, test_mse,
      test_mae}{"", _std}, vs_zero_shot{"", _std} and vs_ff{"", _std} (per cent, each seed against
      the same seed; NaN where there is nothing to compare with), epochs, seconds. In order of first
      appearance.
    """
    by_seed = {}
    for method, group in results.groupby("method"):
        if method in ("zero_shot", "ff"):
            by_seed[method] = group.set_index("seed")["test_mse"]

    rows = []
    for (method, alpha), group in results.groupby(["method", "alpha"], sort=False, dropna=False):
        fixed = is_fixed(group)
        row: dict[str, Any] = {
            "method": method,
            "alpha": alpha,
            "seeds": len(group),
            "fixed": fixed,
        }
        for column in ERRORS:
            row[column] = group[column].mean()
            row[f"{column}_std"] = float("nan") if fixed else group[column].std()

        # The seeds of a method and of its rival have the data order and the random model in common:
        # paired differences vary less than those of the means. Seeds that only one of them has
        # drop out.
        for other in ("zero_shot", "ff"):
            change = pd.Series(dtype=float)
            if other in by_seed and method != other:
                ratio = group.set_index("seed")["test_mse"] / by_seed[other]
                change = 100 * (ratio - 1).dropna()
            row[f"vs_{other}"] = change.mean()
            row[f"vs_{other}_std"] = change.std()
        rows.append(row | {"epochs": group["epochs"].max(), "seconds": group["seconds"].mean()})
    return pd.DataFrame(rows)


def spread(mean: float, std: float, form: str = ".4f") -> str:
    """ "0.3712 ± 0.0031", without what is NaN."""
    if pd.isna(mean):
        return ""
    return f"{mean:{form}}" + ("" if pd.isna(std) else f" ± {std:{form.lstrip('+')}}")


def _table_rows(
    summary: pd.DataFrame, baselines: Sequence[dict], names: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    header = [
        "method",
        "seeds",
        "val MSE",
        "test MSE",
        "test MAE",
        "vs zero-shot, %",
        "vs FF, %",
        "epochs",
        "seconds",
    ]
    body = []
    for r in summary.itertuples():
        alpha = "" if pd.isna(r.alpha) else f" {r.alpha:g}"
        body.append(
            [
                names.get(r.method, r.method) + alpha,
                "" if r.fixed else str(r.seeds),
                spread(r.val_mse, r.val_mse_std),
                spread(r.test_mse, r.test_mse_std),
                spread(r.test_mae, r.test_mae_std),
                spread(r.vs_zero_shot, r.vs_zero_shot_std, "+.2f"),
                spread(r.vs_ff, r.vs_ff_std, "+.2f"),
                str(int(r.epochs)),
                f"{r.seconds:.0f}",
            ]
        )

    # Baselines have no seeds, epochs or training time.
    zero = summary.loc[summary["method"] == "zero_shot", "test_mse"]
    for b in baselines:
        change = ""
        if len(zero):
            change = f"{100 * (b['test_mse'] / zero.iloc[0] - 1):+.2f}"
        values = [f"{b[k]:.4f}" for k in ("val_mse", "test_mse", "test_mae")]
        body.append([names.get(b["method"], b["method"]), "", *values, change, "", "", ""])
    return header, body


def verdict(
    summary: pd.DataFrame,
    baselines: Sequence[dict] = (),
    blocks: Mapping[tuple[str, float | None], np.ndarray] | None = None,
) -> str:
    """Say which row validation picks, and what it is worth on the test part.

    baselines: the naive forecasts of the same table, which can be that row. blocks: of (method,
    alpha), validation MSE in blocks of windows, see `cells.val_blocks`; with them, whether the best
    tuned row differs from the checkpoint by more than chance.
    """
    best = summary.loc[summary["val_mse"].idxmin()]
    text = f"Lowest validation MSE: {label(best.method, best.alpha)}; its test MSE is "
    text += spread(best.test_mse, best.test_mse_std)
    against = []
    for other in ("zero_shot", "ff"):
        if not pd.isna(best[f"vs_{other}"]):
            against.append(f"{best[f'vs_{other}']:+.2f} % against {SHORT[other]}")
    text += f" ({', '.join(against)})." if against else "."
    text = naive_first(text, best, baselines)
    tuned = summary[summary["method"] != "zero_shot"]
    if best.method == "zero_shot" and len(tuned):
        text += " No tuning beat the checkpoint on validation: keep the checkpoint."
    if blocks and len(tuned):
        rival = tuned.loc[tuned["val_mse"].idxmin()]
        name = label(rival.method, rival.alpha)
        text += chance(name, blocks.get(_arm(rival)), blocks.get(("zero_shot", None)))
    return text


def naive_first(text: str, best: Any, baselines: Sequence[dict]) -> str:
    """Put a naive forecast before the verdict on the models where validation prefers it to all of
    them.
    """
    lowest = min(baselines, key=lambda b: b["val_mse"], default=None)
    if lowest is None or lowest["val_mse"] > best["val_mse"]:
        return text
    name = SHORT[lowest["method"]]
    found = f"Lowest validation MSE: {name} ({lowest['val_mse']:.4f}), which needs no model; "
    found += f"its test MSE is {lowest['test_mse']:.4f}. No model here beats it on validation. "
    return found + text.replace("Lowest validation MSE:", "Lowest of the models:", 1)


def chance(name: str, rival: np.ndarray | None, zero: np.ndarray | None) -> str:
    """Say whether an arm and the checkpoint are equal on validation as far as its windows can tell;
    else nothing.
    """
    if rival is None or zero is None or len(rival) != len(zero) or len(zero) < 2:
        return ""
    gap = rival - zero
    width = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
    if abs(gap.mean()) > width:
        return ""
    low, high = gap.mean() - width, gap.mean() + width
    return (
        f" {name} and the checkpoint are equal there within the paired interval (difference in "
        f"MSE, 95 %: {low:+.4f} to {high:+.4f})."
    )


def _arm(row: Any) -> tuple[str, float | None]:
    return row["method"], None if pd.isna(row["alpha"]) else float(row["alpha"])


def blocks_of(records: Sequence[dict[str, Any]]) -> dict[tuple[str, float | None], np.ndarray]:
    """Validation MSE in blocks of windows of every (method, alpha), mean over its seeds."""
    found: dict[tuple[str, float | None], list[np.ndarray]] = {}
    for record in records:
        if record.get("val_blocks"):
            found.setdefault(_arm(record["row"]), []).append(np.asarray(record["val_blocks"]))
    return {arm: np.mean(blocks, axis=0) for arm, blocks in found.items()}


def terminal_tables(
    summary: pd.DataFrame, baselines: Sequence[dict], title: str, console: Console
) -> list[Table]:
    """The comparison as rich tables; the row with the lowest validation MSE is bold."""
    header, body = _table_rows(summary, baselines, SHORT)
    values = [*summary["val_mse"], *(b["val_mse"] for b in baselines)]
    styles = ["dim" if i >= len(summary) else None for i in range(len(body))]
    styles[int(np.argmin(values))] = "bold"
    caption = "mean ± std over seeds; vs: change of test MSE, paired by seed"
    return fitted(header, body, styles, title=title, caption=caption, console=console)


def fitted(
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    styles: Sequence[str | None],
    title: str,
    caption: str,
    console: Console,
) -> list[Table]:
    """Lay out one table, or several below each other where it is wider than the console: no number
    is cut.

    Every part has the first column, which names the rows.
    """
    sign = "±" if encodable("±", console.encoding) else "+-"
    rows = []
    for cells in body:
        rows.append([cell.replace("±", sign) for cell in cells])
    widths = [max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)]

    # Columns go into the current part as long as it fits beside the first column.
    parts: list[list[int]] = [[]]
    for i in range(1, len(header)):
        used = widths[0] + sum(widths[j] for j in parts[-1])
        if parts[-1] and used + widths[i] > console.width:
            parts.append([])
        parts[-1].append(i)

    # The title is above the first part only, the caption below the last.
    tables = []
    for part in parts:
        first, last = part is parts[0], part is parts[-1]
        table = Table(
            title=title if first else None,
            caption=caption.replace("±", sign) if last else None,
            box=None,
        )
        table.add_column(header[0])
        for i in part:
            table.add_column(header[i], justify="right")
        for cells, style in zip(rows, styles, strict=True):
            table.add_row(cells[0], *(cells[i] for i in part), style=style)
        tables.append(table)
    return tables


def encodable(text: str, encoding: str) -> bool:
    """Say whether a terminal of this encoding can show the text."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


# --------------------------------------------------------------------------------------------------
# pictures


def cell_name(
    method: str, alpha: float | None, seed: int, lr: float | None = None, origin: int = 0
) -> str:
    """Name the folder of a cell: "sff-0.7-seed0"; of candidates "ff-lr0.001-origin1-seed0"."""
    mixed = "" if alpha is None or np.isnan(alpha) else f"-{exact(alpha)}"
    return f"{method}{mixed}{candidate_name(lr, origin)}-seed{seed}"


def candidate_name(lr: float | None, origin: int) -> str:
    """The part of a cell's folder name that says what it is compared by; empty where nothing is
    chosen.
    """
    return (f"-lr{exact(lr)}" if lr is not None else "") + (f"-origin{origin}" if origin else "")


def plot_bars(
    summary: pd.DataFrame, results: pd.DataFrame, baselines: Sequence[dict], path: Path
) -> None:
    """Test MSE of every row, mean bar with std; beside it the change against zero-shot, a dot per
    seed.

    What is far off, as naive forecasts often are, is cut at the edge, with its number.
    """
    rows = [(r.method, r.alpha, r.test_mse, r.test_mse_std) for r in summary.itertuples()]
    rows += [(b["method"], np.nan, b["test_mse"], np.nan) for b in baselines]
    zero = results[results["method"] == "zero_shot"].set_index("seed")["test_mse"]
    figure, axes = new_figure(
        10, 0.9 + 0.42 * len(rows), ncols=2 if len(zero) else 1, sharey=True, squeeze=False
    )
    _draw_errors(axes[0, 0], rows)
    if len(zero):
        _draw_changes(axes[0, 1], rows, results, zero=zero)
    figure.savefig(path)


def _draw_errors(ax: Any, rows: Sequence[tuple]) -> None:
    means = np.array([r[2] for r in rows])
    stds = np.array([r[3] for r in rows], float)
    ends = means + np.nan_to_num(stds)
    limit = 1.16 * ends[means <= FAR * means.min()].max()
    for i, (method, *_) in enumerate(rows):
        cut = ends[i] > limit
        length = limit if cut else means[i]
        colour = COLOURS.get(method, "#555555")
        ax.barh(
            i,
            length,
            color=colour,
            alpha=0.85,
            height=0.62,
            hatch="//" if cut else None,
            edgecolor="white",
        )
        if cut:
            text, place, side = f"{means[i]:.3f} \u25b8", (limit, i), "right"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        else:
            text, place, side, box = f"{means[i]:.3f}", (ends[i], i), "left", None
        shift = (-5 if cut else 5, 0)
        ax.annotate(
            text,
            place,
            xytext=shift,
            textcoords="offset points",
            va="center",
            ha=side,
            fontsize=9,
            bbox=box,
        )
        if np.isfinite(stds[i]) and not cut:
            ax.errorbar(
                means[i], i, xerr=stds[i], fmt="none", ecolor="black", elinewidth=1.2, capsize=3
            )
    ax.set_xlim(0, limit)
    ax.set_xlabel(f"test MSE {SCALED}", fontsize=9)
    ax.set_yticks(np.arange(len(rows)), [label(m, a) for m, a, *_ in rows], fontsize=10)
    ax.invert_yaxis()
    ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    ax.grid(visible=False, axis="y")


def _draw_changes(ax: Any, rows: Sequence[tuple], results: pd.DataFrame, zero: pd.Series) -> None:
    changes = []
    for method, alpha, mean, _ in rows:
        mine = results[
            (results["method"] == method) & ((results["alpha"] == alpha) | pd.isna(alpha))
        ]
        change = 100 * (mine.set_index("seed")["test_mse"] / zero - 1).dropna().to_numpy()
        # A naive forecast has no seed; neither have rows that are the same at every seed.
        changes.append(
            np.unique(change) if len(change) else np.array([100 * (mean / zero.iloc[0] - 1)])
        )
    # The axis shows the models and what is near them; what is far off is written at the edge it
    # lies behind.
    near = [0.0]
    for (method, *_), change in zip(rows, changes, strict=True):
        if method in STYLES:
            near += [x for x in change if x <= 100 * (FAR - 1)]
    furthest = 2 * max(np.abs(near).max(), 1.0)
    near += [change[0] for change in changes if len(change) == 1 and abs(change[0]) <= furthest]
    room = 0.25 * max(np.ptp(near), 1.0)
    low, high = min(near) - room, max(near) + room
    ax.axvline(0, color="#555555", linewidth=1, linestyle=STYLES["zero_shot"])
    for i, ((method, *_), change) in enumerate(zip(rows, changes, strict=True)):
        colour = COLOURS.get(method, "#555555")
        mean = change.mean()
        if not low <= mean <= high:
            right = mean > high
            text = f"{mean:+.0f} % \u25b8" if right else f"\u25c2 {mean:+.0f} %"
            ax.text(
                high if right else low,
                i,
                text,
                ha="right" if right else "left",
                va="center",
                fontsize=9,
            )
            continue
        ax.plot(change, np.full(len(change), i), "o", color=colour, markersize=5, alpha=0.6, mew=0)
        ax.plot(mean, i, "|", color=colour, markersize=17, mew=2.5)
    ax.set_xlim(low, high)
    ax.set_xlabel("change of test MSE against zero-shot, % (dots: seeds)", fontsize=9)
    ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)


def plot_validation(cells: Sequence[dict], path: Path) -> bool:
    """Validation MSE before training (epoch 0) and after every epoch: mean over seeds, and the band
    from the lowest to the highest seed.

    Returns: False where nothing was trained, and then there is no picture.
    """
    groups: dict[tuple[str, float | None], list[list[float]]] = {}
    for cell in cells:
        if cell["history"]:
            start = [np.nan if cell.get("start_mse") is None else cell["start_mse"]]
            curve = start + [h["val_mse"] for h in cell["history"]]
            groups.setdefault((cell["method"], cell["alpha"]), []).append(curve)
    if not groups:
        return False
    figure, ax = new_figure(8, 4.5)
    zero = [c["val_mse"] for c in cells if c["method"] == "zero_shot"]
    if zero:
        ax.axhline(
            zero[0],
            color=COLOURS["zero_shot"],
            linestyle=STYLES["zero_shot"],
            linewidth=1.5,
            label="zero-shot",
        )
    floor, roof, highest = (
        min(zero, default=np.inf),
        max(zero, default=-np.inf),
        max(zero, default=-np.inf),
    )
    for (method, alpha), curves in groups.items():
        values = np.array([c[: min(map(len, curves))] for c in curves])
        epochs = np.arange(values.shape[1])
        style = {"color": COLOURS.get(method, "#555555"), "alpha": _fade(method, alpha, groups)}
        ax.plot(
            epochs,
            values.mean(0),
            linestyle=STYLES.get(method, "-"),
            linewidth=2,
            markersize=5,
            mew=0,
            marker=MARKERS.get(method, "o"),
            label=label(method, alpha),
            **style,
        )
        if len(values) > 1:
            ax.fill_between(
                epochs, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
            )
        floor = min(floor, np.nanmin(values))
        roof = max(roof, values[:, -1].max())
        highest = max(highest, np.nanmax(values))
    # a model from scratch starts far above the rest: the axis shows where the methods end, not
    # where that one began
    span = max(roof - floor, 1e-9)
    ax.set_ylim(floor - 0.08 * span, min(highest + 0.08 * span, roof + 0.7 * span))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch (0: before training)", fontsize=10)
    ax.set_ylabel(f"validation {SCALED_Y}", fontsize=9)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return True


def _fade(method: str, alpha: float | None, groups: Any) -> float:
    """Opacity of a curve: the alphas of one method differ in it."""
    alphas = sorted(a for m, a in groups if m == method and a is not None)
    return (
        1.0
        if alpha is None or len(alphas) < 2
        else 0.35 + 0.65 * alphas.index(alpha) / (len(alphas) - 1)
    )


def plot_alpha(summary: pd.DataFrame, path: Path) -> bool:
    """MSE against alpha, with training from scratch at 0 and full fine-tuning at 1 as its two ends.

    Returns: False without at least two alphas of one method.
    """
    swept = [m for m in ("sff", "noise") if (summary["method"] == m).sum() > 1]
    if not swept:
        return False
    figure, axes = new_figure(9, 3.8, ncols=2)
    zero = summary[summary["method"] == "zero_shot"]
    # The ends of every mixture: alpha 0 is training from scratch, alpha 1 plain fine-tuning.
    ends = {"tfs": 0.0, "ff": 1.0}
    for ax, split in zip(axes, ("val", "test"), strict=True):
        for method in swept:
            points = []
            for r in summary.itertuples():
                if r.method == method:
                    points.append((r.alpha, r))
                elif r.method in ends:
                    points.append((ends[r.method], r))
            points.sort(key=lambda p: p[0])
            alphas = [a for a, _ in points]
            means = [getattr(r, f"{split}_mse") for _, r in points]
            stds = [getattr(r, f"{split}_mse_std") for _, r in points]
            ax.errorbar(
                alphas,
                means,
                yerr=np.nan_to_num(stds),
                capsize=3,
                marker="o",
                linewidth=2,
                color=COLOURS[method],
                linestyle=STYLES[method],
                label=SHORT[method],
            )
        if len(zero):
            ax.axhline(
                zero[f"{split}_mse"].iloc[0],
                color=COLOURS["zero_shot"],
                linestyle=STYLES["zero_shot"],
                label="zero-shot",
            )
        ax.set_xlabel("alpha (0: from scratch, 1: full fine-tuning)", fontsize=10)
        ax.set_ylabel(f"{'validation' if split == 'val' else 'test'} {SCALED_Y}", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=10, ncols=len(labels), loc="outside upper center"
    )
    figure.savefig(path)
    return True


def plot_forecasts(cells: Sequence[dict], path: Path) -> None:
    """Four test windows, chosen by position and not by looks: the end of the context, the truth,
    and the forecasts.
    """
    shown = _shown(cells)
    windows = [dict(np.load(cell["folder"] / "forecasts.npz")) for cell in shown]
    n_windows, horizon = windows[0]["target"].shape
    rows, columns = (n_windows + 1) // 2, min(2, n_windows)
    figure, axes = new_figure(10, 2.9 * rows, nrows=rows, ncols=columns, squeeze=False)
    for i, ax in enumerate(np.ravel(axes)):
        if i >= n_windows:
            ax.set_visible(False)
            continue
        context = windows[0]["context"][i][-horizon:]
        target = windows[0]["target"][i]
        past, future, dated = _times(windows[0], i, len(context))
        joined = [*context, target[0]]  # no gap between the past and the truth
        ax.plot([*past, future[0]], joined, color="#999999", linewidth=1.2)
        ax.plot(future, target, color="black", linewidth=2.4, label="truth")
        step = max(horizon // 8, 1)
        for k, (cell, data) in enumerate(zip(shown, windows, strict=True)):
            method = cell["method"]
            # Forecasts often lie on each other: their signs stand at places of their own.
            first = k * step // len(shown)
            ax.plot(
                future,
                data["point"][i],
                color=COLOURS.get(method, "#555555"),
                linestyle=STYLES.get(method, "-"),
                linewidth=1.4,
                marker=MARKERS.get(method, "o"),
                markersize=4,
                mew=0,
                markevery=(first, step),
                label=label(method, cell["alpha"]),
            )
        ax.axvline(future[0], color="#999999", linewidth=0.8)
        ax.set_title(str(windows[0]["label"][i]), fontsize=10, loc="left")
        if dated:
            _write_dates(ax)
        else:
            ax.set_xlabel("steps from the start of the forecast", fontsize=9)
        if i % columns == 0:
            ax.set_ylabel("data units", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=10, ncols=len(labels), loc="outside upper center"
    )
    figure.savefig(path)


def _shown(cells: Sequence[dict]) -> list[dict]:
    """The cells whose forecasts are drawn: four methods at most, of the first seed, each with its
    best alpha.
    """
    seed = min(cell["seed"] for cell in cells)
    found = []
    for method in dict.fromkeys(
        ["zero_shot", "ff", "sff", "tfs", "lpff", "lp", "lora", "noise", "l2sp", *STRATEGIES]
    ):
        same = [cell for cell in cells if cell["method"] == method and cell["seed"] == seed]
        if same and len(found) < 4:
            found.append(min(same, key=lambda cell: cell["val_mse"]))
    return found


def _times(window: dict[str, Any], i: int, past: int) -> tuple[Any, Any, bool]:
    """Places of past and future on the time axis: stamps where the series has them, else steps."""
    horizon = window["target"].shape[1]
    if "stamps" not in window:
        return np.arange(-past, 0), np.arange(horizon), False
    stamps = window["stamps"][i]
    return stamps[-horizon - past : -horizon], stamps[-horizon:], True


def _write_dates(ax: Any) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=7)  # of which one fits every range
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


# --------------------------------------------------------------------------------------------------
# report.md


@dataclasses.dataclass(frozen=True)
class Found:
    """Contents of a comparison folder.

    Attributes:
      table: the rows of the finished cells, as results.csv has them. cells: the same rows, each
        with what its cell left beside it: history, warnings, and the folder with its example
          forecasts.
      run: run.json. baselines: scores of the naive forecasts. damaged: results that are not
        believed, in words.
    """

    table: pd.DataFrame
    cells: list[dict[str, Any]]
    run: dict[str, Any]
    baselines: list[dict[str, Any]]
    damaged: list[str]

    def compared(self, by: str = "validation") -> "Found":
        """Give what a table compares: of runs that validation chose among, the chosen; test errors
        of the epoch `by`.

        by: see `--report-by`.
        Raises: ValueError where there are no test errors of every epoch, naming such a run.
        """
        table, cells = self.table, self.cells
        if "chosen" in table:
            table, cells = table[table["chosen"]], [cell for cell in cells if cell["chosen"]]
        if by == "validation":
            return dataclasses.replace(self, table=table, cells=cells)

        prefix = {"last": "last_", "best-test": "best_"}[by]
        for cell in cells:
            if cell.get(f"{prefix}test_mse") is None:
                raise ValueError(
                    f"{cell['folder']} has no test errors of every epoch; run it with "
                    "--test-each-epoch in another --out, or report by validation"
                )
        table = table.assign(
            test_mse=table[f"{prefix}test_mse"], test_mae=table[f"{prefix}test_mae"]
        )
        chosen = []
        for cell in cells:
            scores = {name: cell[f"{prefix}{name}"] for name in ("test_mse", "test_mae")}
            chosen.append(cell | scores)
        return dataclasses.replace(self, table=table, cells=chosen)


BY = {
    "validation": "Weights are those of the epoch with the lowest validation MSE",
    "last": "Test errors are those of the last epoch, whatever validation says of it",
    "best-test": "Test errors are those of the epoch with the lowest test MSE, which nobody can "
    "know beforehand: they are a bound, and no result",
}


def read_folder(folder: Path, rank: Callable[[dict[str, Any]], Any], *more: str) -> Found:
    """Read a comparison folder: what its cells left, not results.csv, which anybody can edit.

    more: files that it must have beside those of every comparison.
    Raises: ValueError where `folder` is not one, naming what is missing or damaged.
    """
    needed = (folders.CSV, folders.RUN, "baselines.json", *more)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not the folder of a finished comparison: no {', '.join(missing)}"
        )
    run = storage.read_record(folder / folders.RUN)
    baselines = storage.read_record(folder / "baselines.json")["baselines"]
    records, damaged = folders.results(folder)
    if not records:
        raise ValueError(f"{folder} has no result that can be believed: {'; '.join(damaged)}")
    rows = grid.mark([record["row"] for record in records.values()], run["settings"])
    cells = []
    for (name, record), row in sorted(
        zip(records.items(), rows, strict=True), key=lambda item: rank(item[1])
    ):
        cells.append({**row, **record, "folder": folder / "cells" / name})
    return Found(
        table=folders.table_of(rows, rank),
        cells=cells,
        run=run,
        baselines=baselines,
        damaged=damaged,
    )


def write_report(folder: str | Path, by: str = "validation") -> Path:
    """Write report.md, and its pictures where matplotlib is installed, into the folder of a
    comparison.

    by: the epoch whose test errors are shown, see `Found.compared`.
    Returns: the path of report.md.
    """
    folder = Path(folder)
    everything = read_folder(folder, rank)
    found = everything.compared(by)
    results, run, baselines, cells = found.table, found.run, found.baselines, found.cells
    summary = summarise(results)
    pictures = []
    if importlib.util.find_spec("matplotlib"):
        plots = folder / "plots"
        plots.mkdir(exist_ok=True)
        plot_bars(summary, results, baselines, path=plots / "bars.png")
        pictures.append(
            (
                "bars",
                "Test error of every method. Bars: mean over seeds, whisker: standard deviation.",
            )
        )
        if plot_validation(cells, plots / "validation.png"):
            text = (
                "Validation error before training and after every epoch; band: lowest to highest "
                "seed."
            )
            pictures.append(("validation", text))
        if plot_alpha(summary, plots / "alpha.png"):
            pictures.append(
                ("alpha", "Error against alpha; whisker: standard deviation over seeds.")
            )
        if tracked.plot(cells, label, plots / "curvature.png"):
            pictures.append(
                ("curvature", "Largest eigenvalue of the Hessian by epoch, mean over seeds.")
            )
        plot_forecasts(cells, plots / "forecasts.png")
        pictures.append(
            (
                "forecasts",
                "Test windows at fixed positions of the split, in data units, first seed.",
            )
        )

    settings = run["settings"]
    lines = [
        f"# {settings['data']}, {settings['model']}, {settings['context']} -> "
        f"{settings['horizon']}",
        "",
        verdict(summary, baselines, blocks_of(cells)),
        "",
        markdown_table(*_table_rows(summary, baselines, NAMES)),
        "",
        "MSE and MAE are on the scale of the data standardised with the training rows. ± is the "
        "standard deviation over seeds; rows without a number of seeds are the same at every "
        "seed; `vs` is the change of test MSE in per cent, each seed against the same seed. "
        f"{BY[by]}; seconds are those of training and validation, without compilation. Every "
        f"window is scored: {run['windows']['val']:,} for validation, {run['windows']['test']:,} "
        "for test.",
    ]
    notes = [f"not believed, and left out: {text}" for text in found.damaged]
    for cell in cells:
        name = f"{label(cell['method'], cell['alpha'])}, seed {cell['seed']}"
        notes += [f"{name}: {text}" for text in cell["warnings"]]
    if notes:
        lines += ["", "## Look at this", "", *[f"- {note}" for note in notes]]
    lines += choice_lines(everything)
    if (measured := tracked.table(cells, label))[1]:
        lines += ["", "## Curvature", "", markdown_table(*measured), "", tracked.TEXT]
    lines += picture_lines(pictures, f"python -m experiments.report {folder}")
    lines += made_lines(run, results)
    return write_text(folder / "report.md", lines)


def choice_lines(found: Found) -> list[str]:
    """The part of a report that says what validation chose among; empty where nothing
    was chosen.
    """
    settings = found.run["settings"]
    if grid.OVER not in settings:
        return []
    text = (
        "The candidates of each method at the first seed; the one of lowest validation MSE is its "
        "row above."
    )
    if settings.get("origins"):
        text += (
            f" Validation MSE is the mean of {settings['origins']} blocks, each after training on "
            "what lies before."
        )
    return [
        "",
        "## Chosen by validation",
        "",
        markdown_table(*grid.table(found.table, settings)),
        "",
        text,
    ]


def picture_lines(pictures: Sequence[tuple[str, str]], again: str) -> list[str]:
    """The part of a report that shows its pictures, or says how to get them."""
    if not pictures:
        return ["", f"No pictures: {NO_PICTURES}, then `{again}`."]
    lines = ["", "## Pictures"]
    for name, text in pictures:
        lines += ["", f"![{text}](plots/{name}.png)", "", text]
    return lines


def made_lines(run: dict[str, Any], results: pd.DataFrame) -> list[str]:
    """The part of a report that says how it was made."""
    lines = ["", "## How it was made", "", "```", run["command"], "```", ""]
    settings = [
        [name, "" if value is None else str(value)] for name, value in run["settings"].items()
    ]
    lines.append(
        markdown_table(["setting", "value"], [*settings, ["family", run["model"]["family"]]])
    )
    commits = ", ".join(sorted(set(results["git_commit"].astype(str))))
    return [
        *lines,
        "",
        f"Commit {commits}; {results['versions'].iloc[-1]}; {results['device'].iloc[-1]}.",
        "",
    ]


def write_text(path: Path, lines: Sequence[str]) -> Path:
    """Write a report, whole or not at all, in UTF-8 whatever the terminal speaks."""
    with folders.replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return path


def print_table(folder: str | Path, console: Console | None = None, by: str = "validation") -> None:
    """The comparison and its verdict on the terminal; `by` as in `write_report`."""
    found = read_folder(Path(folder), rank).compared(by)
    console = console or Console()
    summary, s = summarise(found.table), found.run["settings"]
    title = (
        f"{s['data']}, {s['model']}, {s['context']} -> {s['horizon']}, {s['mode']}{by_words(by)}"
    )
    for table in terminal_tables(summary, found.baselines, title, console=console):
        console.print(table)
    console.print(verdict(summary, found.baselines, blocks_of(found.cells)), highlight=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    folder: tyro.conf.Positional[Path]
    """folder of a comparison"""
    report_by: Annotated[
        str,
        flags.one_of(flags.REPORT_BY),
        flags.described(
            "epoch whose test error is shown: validation, or, with --test-each-epoch, last or "
            "best-test"
        ),
    ] = "validation"
    program: ClassVar[str] = "experiments.report"


def by_words(by: str) -> str:
    """Say in a title by which epoch test errors are shown, where it is not the usual one."""
    return {
        "validation": "",
        "last": "; last epoch",
        "best-test": "; epoch of the lowest test error",
    }[by]


def command(
    options: Callable[[], Any], show: Callable[..., None], write: Callable[..., Path]
) -> int:
    """A command about the folder of a comparison: its table, then its report. Returns the exit
    code.
    """

    def work() -> int:
        asked = options()
        show(asked.folder, by=asked.report_by)
        print(write(asked.folder, by=asked.report_by))
        return 0

    return launch.guarded(work)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.report FOLDER`."""
    argv = sys.argv[1:] if argv is None else argv
    return command(lambda: flags.parse(Options, argv, __doc__), print_table, write_report)


if __name__ == "__main__":
    launch.leave(main())
