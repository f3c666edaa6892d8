"""Tables, pictures and report.md of a folder of prune_then_finetune.

Run:   python -m experiments.pruning_report runs/prune-etth1
Cost:  seconds; nothing is pruned, trained or evaluated.
Gives: tables on the terminal, report.md, and plots/*.png where matplotlib is
       installed (the extra `plots`). The experiment does it at its end.
"""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false, reportCallIssue=false, reportReturnType=false, reportAssignmentType=false

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from rich.console import Console

from experiments import flags, grid, launch, report
from experiments.flags import exact
from experiments.report import COLOURS, SCALED_Y, Found, is_fixed, spread
from ltsm_jax import storage
from ltsm_jax.methods.redundancy import heat_map
from ltsm_jax.methods.strategies import STRATEGIES
from ltsm_jax.plotting import new_figure
from ltsm_jax.report import markdown_table

GROUP = ["method", "alpha", "ratio", "ema"]
MEANS = (
    "val_mse",
    "val_mae",
    "test_mse",
    "test_mae",
    "parameters",
    "nonzero_parameters",
    "whole_parameters",
)
MEANS += ("latency_ms", "whole_latency_ms", "speedup", "channels_left", "seconds")
PRUNED = "#882255"
# most that a forecast may differ between the masked model and the one with parts taken out, in
# scaled units
GAP = 1e-5
HEADER = [
    "arm",
    "seeds",
    "parameters",
    "ms (whole)",
    "speedup",
    "val MSE",
    "test MSE",
    "test MAE",
    "vs zero-shot, %",
]
HEADER += ["vs the whole, %", "epochs", "seconds"]


def label(
    method: str, alpha: float | None = None, ratio: float | None = None, ema: float | None = None
) -> str:
    """Short name of a row: "SFF 0.7", "pruned 0.3 (EMA 0.5) + FF"."""
    kind, _, tuning = method.partition("+")
    if kind != "pruned":
        return report.label(method, alpha)
    text = (
        "pruned" if ratio is None or pd.isna(ratio) else f"pruned {exact(ratio)} (EMA {exact(ema)})"
    )
    return text + (f" + {report.label(tuning, alpha)}" if tuning else "")


def rank(row: dict[str, Any]) -> Any:
    """The order of results.csv."""

    def place(x: float | None) -> float:
        return -1.0 if x is None else x

    kind, _, tuning = row["method"].partition("+")
    first = {"zero_shot": 0, "pruned": 2}.get(kind, 1)
    order = ("", *STRATEGIES).index(tuning if first == 2 else kind)
    chosen = (
        place(row.get("lr")),
        row.get("origin") or 0,
    )  # the same in all rows where nothing is chosen
    return (
        first,
        place(row["ratio"]),
        place(row["ema"]),
        order,
        place(row["alpha"]),
        *chosen,
        row["seed"],
    )


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """One row per arm (method, alpha, ratio, EMA): mean and std (n - 1) over seeds, and paired
    differences in test MSE.

    Args:
      results: the rows of results.csv.
    Returns: the columns of an arm, seeds, fixed (the same at every seed), the mean of every number
      and the `_std` of the errors and times, vs_zero_shot and vs_whole{"", _std}: per cent, each
      seed against the same seed of zero-shot, and of the same fine-tuning of the whole model (of a
      pruned model that is not tuned: zero-shot); NaN where there is nothing to compare with.
    """
    results = results.reindex(columns=[*dict.fromkeys([*results.columns, *MEANS])])
    by_seed = {
        arm: g.set_index("seed")["test_mse"]
        for arm, g in results.groupby(["method", "alpha"], dropna=False)
    }
    by_seed = {(m, None if pd.isna(a) else a): values for (m, a), values in by_seed.items()}
    zero, rows = by_seed.get(("zero_shot", None)), []
    for arm, group in results.groupby(GROUP, sort=False, dropna=False):
        fixed = is_fixed(group)
        row: dict[str, Any] = {
            **dict(zip(GROUP, arm, strict=True)),
            "seeds": len(group),
            "fixed": fixed,
        }
        for column in MEANS:
            row[column] = group[column].mean()
            row[f"{column}_std"] = float("nan") if fixed else group[column].std()
        kind, _, tuning = row["method"].partition("+")
        alpha = None if pd.isna(row["alpha"]) else row["alpha"]
        whole = None if kind != "pruned" else by_seed.get((tuning or "zero_shot", alpha))
        for name, base in (
            ("zero_shot", None if row["method"] == "zero_shot" else zero),
            ("whole", whole),
        ):
            change = (
                pd.Series(dtype=float)
                if base is None
                else group.set_index("seed")["test_mse"] / base - 1
            )
            change = 100 * change.dropna()
            row[f"vs_{name}"], row[f"vs_{name}_std"] = change.mean(), change.std()
        rows.append(row | {"epochs": group["epochs"].max()})
    return pd.DataFrame(rows)


def sized(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with times and speedup of tuned arms: those of the pruned model with the same
    masks.
    """
    found, times = summary.copy(), ["latency_ms", "whole_latency_ms", "speedup"]
    same = {
        (r["ratio"], r["ema"]): r[times] for _, r in summary.iterrows() if r["method"] == "pruned"
    }
    for i, r in summary.iterrows():
        if r["method"].startswith("pruned+") and (r["ratio"], r["ema"]) in same:
            found.loc[i, times] = same[r["ratio"], r["ema"]]
    return found


def _body(summary: pd.DataFrame) -> list[list[str]]:
    body = []
    for r in sized(summary).itertuples():
        body.append(
            [
                label(r.method, r.alpha, r.ratio, ema=r.ema),
                "" if r.fixed else str(r.seeds),
                f"{r.parameters:,.0f} ({100 * r.parameters / r.whole_parameters:.0f} %)",
                "" if pd.isna(r.latency_ms) else f"{r.latency_ms:.2f} ({r.whole_latency_ms:.2f})",
                "" if pd.isna(r.speedup) else f"{r.speedup:.2f}x",
                spread(r.val_mse, r.val_mse_std),
                spread(r.test_mse, r.test_mse_std),
                spread(r.test_mae, r.test_mae_std),
                spread(r.vs_zero_shot, r.vs_zero_shot_std, "+.2f"),
                spread(r.vs_whole, r.vs_whole_std, "+.2f"),
                str(int(r.epochs)),
                f"{r.seconds:.0f}",
            ]
        )
    return body


def arms(summary: pd.DataFrame, ratio: float, ema: float) -> pd.DataFrame:
    """The arms of the model that is not pruned, and those of one (ratio, EMA)."""
    return summary[
        summary["ratio"].isna() | ((summary["ratio"] == ratio) & (summary["ema"] == ema))
    ]


def _ratio_table(summary: pd.DataFrame) -> str:
    """A row per (ratio, EMA): what is left, and the errors before and after every kind
    of tuning.
    """
    tunings = [
        (m, a)
        for m, a in summary[["method", "alpha"]].drop_duplicates().itertuples(index=False)
        if m.startswith("pruned+")
    ]
    header = [
        "ratio",
        "EMA",
        "channels left, %",
        "parameters, %",
        "not 0, %",
        "speedup",
        "val MSE, pruned",
    ]
    header += [
        "test MSE, pruned",
        *(f"test MSE, + {label(m, a).removeprefix('pruned + ')}" for m, a in tunings),
    ]
    body = []
    for r in summary[summary["method"] == "pruned"].itertuples():
        here = summary[(summary["ratio"] == r.ratio) & (summary["ema"] == r.ema)]
        cells = [exact(r.ratio), exact(r.ema), f"{100 * r.channels_left:.1f}"]
        cells += [
            f"{100 * n / r.whole_parameters:.1f}" for n in (r.parameters, r.nonzero_parameters)
        ]
        cells += ["" if pd.isna(r.speedup) else f"{r.speedup:.2f}x"]
        cells += [spread(r.val_mse, r.val_mse_std), spread(r.test_mse, r.test_mse_std)]
        for method, alpha in tunings:
            mine = here[(here["method"] == method) & ((here["alpha"] == alpha) | pd.isna(alpha))]
            cells.append(
                "" if mine.empty else spread(mine["test_mse"].iloc[0], mine["test_mse_std"].iloc[0])
            )
        body.append(cells)
    return markdown_table(header, body)


def _redundancy_table(found: dict[str, Any]) -> str:
    header = ["module", "part of", "mean", "lowest", "highest", "sparse heads or idle units, %"]
    body = []
    for path, h in found["heads"].items():
        c = np.asarray(h["contribution"])
        if c.size:
            cells = [
                f"{c.mean():.3f}",
                f"{c.min():.3f}",
                f"{c.max():.3f}",
                f"{100 * np.mean(h['sparse']):.1f}",
            ]
            body.append([path, "heads: share of the stream", *cells])
    for path, u in found["units"].items():
        a = np.asarray(u["active"])
        if a.size:
            cells = [
                f"{a.mean():.3f}",
                f"{a.min():.3f}",
                f"{a.max():.3f}",
                f"{100 * np.mean(a == 0):.1f}",
            ]
            body.append([path, "units: tokens that activate them", *cells])
    return markdown_table(header, body)


def _changes(settings: dict[str, Any], choice: dict[str, Any], dropout_off: bool) -> str:
    lr = settings["lr"] if isinstance(settings["lr"], str) else f"{settings['lr']:g}"
    budget = f"{settings['epochs']} epochs, batch {settings['batch_size']}, lr {lr}"
    chosen = f"ratio {exact(choice['ratio'])}, EMA {exact(choice['ema'])}"
    off = "off" if dropout_off else "as in the model's config"
    body = [
        ["zero-shot", "checkpoint", "none", "nothing", "", ""],
        [
            "FF, SFF, ...",
            "checkpoint, or its mixture with a random model",
            "none",
            "all",
            "as in the model's config",
            budget,
        ],
        ["pruned", "checkpoint", chosen, "nothing", "", ""],
        [
            "pruned + FF, SFF, ...",
            "the same, then masked",
            chosen,
            "what is not masked",
            off,
            budget,
        ],
    ]
    return markdown_table(["arm", "starts from", "masks", "trains", "dropout", "budget"], body)


def verdict(
    summary: pd.DataFrame,
    baselines: Sequence[dict] = (),
    blocks: Mapping[tuple, np.ndarray] | None = None,
) -> str:
    """Say which arm validation picks, and what it is worth on the test part;
    see `report.verdict`.
    """
    best = summary.loc[summary["val_mse"].idxmin()]
    text = (
        f"Lowest validation MSE: {label(best.method, best.alpha, best.ratio, ema=best.ema)}; "
        "its test MSE is "
    )
    text += spread(best.test_mse, best.test_mse_std)
    if not pd.isna(best.vs_zero_shot):
        text += f" ({best.vs_zero_shot:+.2f} % against zero-shot"
        text += (
            f", {best.vs_whole:+.2f} % against the same without pruning)"
            if not pd.isna(best.vs_whole)
            else ")"
        )
    if best.method == "zero_shot":
        text += (
            ". Neither pruning nor tuning beat the checkpoint on validation: keep the checkpoint"
        )
    text = report.naive_first(f"{text}.", best, baselines)
    rivals = summary[summary["method"] != "zero_shot"]
    if blocks and len(rivals):
        rival = rivals.loc[rivals["val_mse"].idxmin()]
        name = label(rival.method, rival.alpha, rival.ratio, ema=rival.ema)
        text += report.chance(
            name, blocks.get(_arm(rival)), blocks.get(("zero_shot", None, None, None))
        )
    return text


def _arm(row: Any) -> tuple:
    return (
        row["method"],
        *(None if pd.isna(row[name]) else float(row[name]) for name in GROUP[1:]),
    )


def blocks_of(records: Sequence[dict[str, Any]]) -> dict[tuple, np.ndarray]:
    """Validation MSE in blocks of windows of every arm, mean over its seeds."""
    found: dict[tuple, list[np.ndarray]] = {}
    for record in records:
        if record.get("val_blocks"):
            found.setdefault(_arm(record["row"]), []).append(np.asarray(record["val_blocks"]))
    return {arm: np.mean(blocks, axis=0) for arm, blocks in found.items()}


# --------------------------------------------------------------------------------------------------
# pictures


def plot_heat_map(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Share of each weight matrix that the masks take away: a row per layer, a column
    per matrix.
    """
    layers, matrices, values = heat_map(rows)
    figure, ax = new_figure(1.8 + 0.75 * len(matrices), 1.6 + 0.42 * len(layers))
    ax.grid(visible=False, axis="y")
    image = ax.imshow(100 * values, vmin=0, vmax=100, cmap="cividis_r", aspect="auto")
    ax.set_xticks(range(len(matrices)), matrices, rotation=35, ha="right", fontsize=9)
    ax.set_yticks(range(len(layers)), [layer or "outside" for layer in layers], fontsize=9)
    for i, j in np.argwhere(np.isfinite(values)):
        colour = "white" if values[i, j] > 0.5 else "black"
        ax.text(
            j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour
        )
    ax.set_title(title, fontsize=10, loc="left")
    figure.colorbar(image, ax=ax, label="weights pruned, %")
    figure.savefig(path)


def plot_pareto(summary: pd.DataFrame, path: Path) -> bool:
    """Test MSE against the time of a forecast as a share of the whole model's: every arm; a line
    joins those that no other beats in both.

    Returns: False where nothing was timed.
    """
    timed = sized(summary)
    if timed["speedup"].isna().all():
        return False
    timed["time"] = (1 / timed["speedup"]).where(timed["method"].str.startswith("pruned"), 1.0)
    timed = timed[timed["time"].notna()]
    figure, ax = new_figure(8, 4.8)
    markers = dict(zip([None, *sorted(timed["ema"].dropna().unique())], "sovD^P*X<>", strict=False))
    named = set()
    for r in timed.itertuples():
        kind, _, tuning = r.method.partition("+")
        pruned = kind == "pruned"
        colour = PRUNED if pruned and not tuning else COLOURS.get(tuning or r.method, "#555555")
        text = label(r.method, r.alpha).replace("pruned", "pruned" if pruned else "")
        ax.errorbar(
            r.time,
            r.test_mse,
            yerr=np.nan_to_num(r.test_mse_std),
            fmt=markers.get(None if pd.isna(r.ema) else r.ema, "o"),
            color=colour,
            mfc=colour if pruned else "white",
            capsize=2,
            label=None if text in named else text,
        )
        named.add(text)
        if pruned:
            ax.annotate(
                f"{r.ratio:g}",
                (r.time, r.test_mse),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    front, lowest = [], np.inf
    for r in timed.sort_values(["time", "test_mse"]).itertuples():
        if r.test_mse < lowest:
            front.append((r.time, r.test_mse))
            lowest = r.test_mse
    ax.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
    ax.set_xlabel("time of a forecast, as a share of the whole model's", fontsize=10)
    ax.set_ylabel(f"test {SCALED_Y}", fontsize=9)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return True


# --------------------------------------------------------------------------------------------------
# report.md


def read_folder(folder: Path) -> tuple[Found, dict[str, Any]]:
    """Read the folder of a comparison, and choice.json.

    Raises: ValueError where `folder` is not one, or has no pruned model yet, naming what is
    missing.
    """
    found = report.read_folder(folder, rank, "choice.json")
    return found, storage.read_record(folder / "choice.json")


def shown(found: Found, choice: dict[str, Any]) -> pd.DataFrame:
    """Give the rows of the main table: the arms of the chosen pruning, or of each method the one
    that it chose.
    """
    summary = summarise(found.table)
    over = found.run["settings"].get(grid.OVER, "").split(",")
    return summary if "ratio" in over else arms(summary, choice["ratio"], choice["ema"])


def _with_all_pruned(everything: Found, found: Found) -> pd.DataFrame:
    """Give the compared rows, and every pruned model that is not fine-tuned, for the table of
    ratios.
    """
    rest = everything.table[everything.table["method"] == "pruned"]
    return pd.concat([found.table[found.table["method"] != "pruned"], rest])


def write_report(folder: str | Path, by: str = "validation") -> Path:
    """Write report.md, and its pictures where matplotlib is installed, into the folder of a
    comparison.

    by: the epoch whose test errors are shown, see `report.Found.compared`.
    Returns: the path of report.md.
    """
    folder = Path(folder)
    everything, choice = read_folder(folder)
    found = everything.compared(by)
    results, run = found.table, found.run
    settings, summary = run["settings"], summarise(results)
    masks = next(
        cell["sparsity"]
        for cell in everything.cells
        if cell["method"] == "pruned"
        and (cell["ratio"], cell["ema"]) == (choice["ratio"], choice["ema"])
    )
    title = (
        f"Weights pruned at ratio {exact(choice['ratio'])}, EMA {exact(choice['ema'])}, first seed"
    )
    pictures = _pictures(folder, masks, title, summary=summary)
    dropout_off = "no-dropout" in (settings["quirks"] or "").split(",")
    lines = [
        f"# Pruning, then fine-tuning: {settings['data']}, {settings['model']}, "
        f"{settings['context']} -> {settings['horizon']}",
        "",
        verdict(summary, found.baselines, blocks_of(found.cells)),
        "",
        markdown_table(HEADER, _body(shown(found, choice))),
        "",
        "MSE and MAE are on the scale of the data standardised with the training rows. ± is the "
        "standard deviation over seeds; `vs` is the change of test MSE in per cent, each seed "
        "against the same seed; the whole is the same fine-tuning without masks. Parameters are "
        "counted with parts taken out; times are means of runs in turn with the whole model; the "
        "speedup is the median ratio of neighbours, which other work disturbs least. "
        f"{report.BY[by]}. Every window is scored: {run['windows']['val']:,} for validation, "
        f"{run['windows']['test']:,} for test.",
        "",
        "## Choice",
        "",
        f"{choice['text'][0].upper()}{choice['text'][1:]}, mean over {choice['seeds']} seeds: the "
        "lowest of the pruned models that are not fine-tuned.",
    ]
    notes = _notes(found, choice, dropout_off)
    if notes:
        lines += ["", "## Look at this", "", *[f"- {note}" for note in notes]]
    lines += ["", "## What differs between the arms", "", _changes(settings, choice, dropout_off)]
    lines += report.choice_lines(everything)
    lines += ["", "## Ratios", "", _ratio_table(summarise(_with_all_pruned(everything, found)))]
    lines += ["", f"Ratios are {settings['cuts']}."]
    lines += ["", f"## {title}", "", _sparsity_table(masks)]
    lines += _lines_before_pruning(folder)
    lines += report.picture_lines(pictures, f"python -m experiments.pruning_report {folder}")
    lines += report.made_lines(run, results)
    return report.write_text(folder / "report.md", lines)


def _pictures(
    folder: Path, masks: Sequence[dict[str, Any]], title: str, summary: pd.DataFrame
) -> list[tuple[str, str]]:
    """Draw the pictures: (name, caption) of each; none without matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    plot_heat_map(masks, plots / "sparsity.png", title)
    pictures = [("sparsity", f"{title}: 1 - kept inputs x kept outputs, per cent.")]
    if plot_pareto(summary, plots / "pareto.png"):
        text = (
            "Error against time; numbers beside the points: ratio. Marker: EMA. Squares: the "
            "whole model."
        )
        pictures.append(("pareto", text))
    return pictures


def _notes(found: report.Found, choice: dict[str, Any], dropout_off: bool) -> list[str]:
    """List everything that a reader of the table should look at."""
    notes = [choice["warning"]] if choice["warning"] else []
    if dropout_off:
        notes.append(
            "Pruned arms were fine-tuned without dropout, whole ones with it (quirk no-dropout): "
            "part of a difference between them may come from this."
        )
    notes += [f"not believed, and left out: {text}" for text in found.damaged]
    for cell in found.cells:
        name, gap = cell["folder"].name, cell.get("removal_gap") or 0.0
        if gap > GAP:
            notes.append(
                f"{name}: the forecast with parts taken out differs by {gap:.1e} from that of the "
                "masked model"
            )
        notes += [f"{name}: {text}" for text in cell["warnings"]]
    return notes


def _lines_before_pruning(folder: Path) -> list[str]:
    """The section on the checkpoint before pruning; empty where it was not measured."""
    try:
        statistics = storage.read_record(folder / "redundancy.json")
    except storage.DamagedError:
        return []  # the experiment measures them again
    if not statistics:
        return []
    windows = " and ".join(f"{n:,}" for n in statistics["windows"])
    return [
        "",
        "## The checkpoint before pruning",
        "",
        _redundancy_table(statistics),
        "",
        f"Means over the tokens of {windows} windows of training and validation. Sparse: share of "
        "(token, head) pairs in which a head adds at most 5 % of the stream's norm; idle: units "
        "that no token activates.",
    ]


def _sparsity_table(rows: Sequence[dict[str, Any]]) -> str:
    layers, matrices, values = heat_map(rows)
    body = []
    for layer, row in zip(layers, values, strict=True):
        percents = ["" if np.isnan(x) else f"{100 * x:.0f}" for x in row]
        body.append([layer or "outside", *percents])
    return markdown_table(["layer, %", *matrices], body)


def print_table(folder: str | Path, console: Console | None = None, by: str = "validation") -> None:
    """The arms of the chosen pruning, and the verdict, on the terminal; `by` as
    in `write_report`.
    """
    everything, choice = read_folder(Path(folder))
    found = everything.compared(by)
    console = console or Console()
    s, summary = found.run["settings"], summarise(found.table)
    rows = shown(found, choice)
    title = (
        f"{s['data']}, {s['model']}, {s['context']} -> {s['horizon']}, "
        f"{s['mode']}{report.by_words(by)}"
    )
    caption = "mean ± std over seeds; vs: change of test MSE, paired by seed"
    styles: list[str | None] = [None] * len(rows)
    styles[int(np.argmin(rows["val_mse"].to_numpy()))] = "bold"
    for table in report.fitted(
        HEADER, _body(rows), styles, title=title, caption=caption, console=console
    ):
        console.print(table)
    console.print(verdict(summary, found.baselines, blocks_of(found.cells)), highlight=False)


class Options(report.Options):
    """Options of the command."""

    program: ClassVar[str] = "experiments.pruning_report"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.pruning_report FOLDER`."""
    argv = sys.argv[1:] if argv is None else argv
    return report.command(lambda: flags.parse(Options, argv, __doc__), print_table, write_report)


if __name__ == "__main__":
    launch.leave(main())
