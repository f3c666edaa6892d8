"""Write verdict.json, report.md and report.html: the sentence first, then what it rests on.

report.html is one file: pictures are drawn into it as SVG, and nothing is fetched from elsewhere.
matplotlib is imported only here, and only when something is drawn; without it there are tables
alone, and the report says so.
"""

import dataclasses
import html
import importlib.util
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltsm_jax.methods.decision import ZERO_SHOT, Verdict, four_digits
from ltsm_jax.plotting import new_figure

NO_PICTURES = "No pictures: matplotlib is not installed (`pip install 'ltsm-jax[plots]'`)."
UNITS = (
    "MSE and MAE are in units standardised per item and target by its training rows: 1 is their "
    "variance."
)
# times the lowest error: what is beyond it is cut at the edge, or it would squeeze the others
FAR = 3.0
# Okabe & Ito's palette, told apart by all common kinds of colour vision; line styles say the same a
# second time.
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#5D3A9B")
STYLES = ("-", (0, (7, 1.5)), "-.", (0, (5, 1, 1, 1)), "--", (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
ZERO_COLOUR, NAIVE_COLOUR = "#555555", "#8A7A00"
CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; color: #52606d; font-weight: 600; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.25rem; border-left: .35rem solid #0072B2; padding: .4rem 0 .4rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child { text-align: left; }
tr.deployed { font-weight: 700; background: #eef6fc; }
figure { margin: 1rem 0 2rem; } figure svg { max-width: 100%; height: auto; }
figcaption, .small { color: #52606d; font-size: .9rem; }
"""


def write_report(verdict: Verdict, folder: str | Path) -> tuple[Path, Path]:
    """Write verdict.json, report.md and report.html into a folder, which is made where there is
    none.

    Returns: the paths of the two reports.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = json.dumps(verdict.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "verdict.json").write_text(record + "\n", encoding="utf-8")
    pictures = _pictures(verdict) if importlib.util.find_spec("matplotlib") else []
    sections = _sections(verdict)
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(_markdown(verdict, sections, bool(pictures)), encoding="utf-8")
    page.write_text(_html(verdict, sections, pictures), encoding="utf-8")
    return markdown, page


# --- text


@dataclasses.dataclass(frozen=True)
class _Section:
    """A part of a report: tables, lines and remarks under a heading."""

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()
    remark: str = ""
    marked: int = -1


def _sections(verdict: Verdict) -> list[_Section]:
    header, rows = verdict.rows()
    names = [found.name for found in verdict.candidates]
    remark = (
        f"{UNITS} A dash: not scored there, as only what validation chose is scored on the test "
        "span. Seconds "
    )
    remark += "are those of training and of scoring validation, without compilation."
    sections = [
        _Section("Candidates", header, rows, remark=remark, marked=names.index(verdict.deploy))
    ]
    if verdict.differences:
        remark = (
            "Below zero the first of the two is better. The intervals are paired block-bootstrap "
            "ones, of blocks "
        )
        remark += (
            f"of {verdict.horizon} consecutive origins with all items together, or of items, "
            "whichever is wider."
        )
        sections.append(
            _Section(
                "Differences in MSE on the test span",
                lines=verdict.difference_lines(),
                remark=remark,
            )
        )

    facts = [
        ["targets", ", ".join(verdict.columns)],
        ["items long enough to be scored", f"{verdict.items:,}"],
        ["step", verdict.freq or "unknown"],
        ["horizon", f"{verdict.horizon} rows"],
        ["context", f"{verdict.context_len} rows at most"],
        ["blocks of time on the test span", str(verdict.blocks)],
    ]
    for part, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        span = verdict.spans.get(part)
        when = f", {_day(span[0])} to {_day(span[1])}" if span else ""
        facts.append([name, f"{verdict.windows[part]:,} windows{when}"])
    remark = (
        "Every item is cut by itself: its last rows test, those before validate, the rest trains; "
        "spans are from "
    )
    remark += "the first of all items to the last."
    sections.append(_Section("Data", ["", verdict.name], facts, remark=remark))

    settings = {name: value for name, value in verdict.settings.items() if name != "train"}
    settings |= verdict.settings.get("train", {})
    made = [["model", verdict.model]]
    made += [[name, str(value)] for name, value in settings.items() if value is not None]
    made += [[name, str(value)] for name, value in verdict.versions.items()]
    if notes := verdict.all_notes():
        sections.append(_Section("Notes", lines=notes))
    return [*sections, _Section("How it was made", ["setting", "value"], made)]


def _day(stamp: str) -> str:
    return stamp.removesuffix("T00:00:00").replace("T", " ")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A GitHub table; every column but the first is right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def _markdown(verdict: Verdict, sections: Sequence[_Section], drawn: bool) -> str:
    def plain(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    lines = [
        f"# {plain(verdict.name)}, {verdict.model}, horizon {verdict.horizon}",
        "",
        plain(verdict.reason),
    ]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        if section.rows:
            rows = []
            for i, row in enumerate(section.rows):
                cells = [plain(cell) for cell in row]
                if i == section.marked:
                    cells[0] = f"**{cells[0]}**"
                rows.append(cells)
            lines.append(markdown_table([plain(name) for name in section.header], rows))
        lines += [f"- {plain(line)}" for line in section.lines]
        if section.remark:
            lines += ["", section.remark]
    lines += ["", "Pictures are in report.html." if drawn else NO_PICTURES, ""]
    return "\n".join(lines)


def _html(
    verdict: Verdict, sections: Sequence[_Section], pictures: Sequence[tuple[str, str]]
) -> str:
    heading = html.escape(f"{verdict.name}, {verdict.model}, horizon {verdict.horizon}")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{heading}</title><style>{CSS}</style></head><body>",
        f"<h1>{heading}</h1>",
        f'<p class="verdict">{html.escape(verdict.reason)}</p>',
    ]
    for i, section in enumerate(sections):
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.rows:
            parts.append(_html_table(section))
        if section.lines:
            items = "".join(f"<li>{html.escape(line)}</li>" for line in section.lines)
            parts.append(f"<ul>{items}</ul>")
        if section.remark:
            parts.append(f'<p class="small">{html.escape(section.remark)}</p>')
        if i == 0:
            for text, svg in pictures:
                parts.append(f"<figure>{svg}<figcaption>{html.escape(text)}</figcaption></figure>")
    if not pictures:
        parts.append(f'<p class="small">{html.escape(NO_PICTURES)}</p>')
    return "\n".join([*parts, "</body></html>", ""])


def _html_table(section: _Section) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in section.header)
    rows = []
    for i, row in enumerate(section.rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        rows.append(
            f'<tr class="deployed">{cells}</tr>' if i == section.marked else f"<tr>{cells}</tr>"
        )
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


# --- pictures


def figures(verdict: Verdict) -> list[tuple[str, Any]]:
    """The pictures of a report as (caption, matplotlib Figure); needs matplotlib."""
    text = "Error of every candidate on validation, and on the test span where it was scored. "
    text += "An arrow: the bar is cut, and its number stands at its end."
    found = [(text, _bars(verdict))]
    if any(candidate.epochs for candidate in verdict.candidates):
        text = (
            "Validation error before training (epoch 0) and after every epoch; the ring is the "
            "epoch that is kept."
        )
        found.append((text, _curves(verdict)))
    if verdict.examples:
        text = (
            "Windows of the test span, evenly spread and not chosen by looks, in the units of the "
            "data."
        )
        found.append((text, _examples(verdict)))
    return found


def _pictures(verdict: Verdict) -> list[tuple[str, str]]:
    return [(text, _svg(figure)) for text, figure in figures(verdict)]


def _svg(figure: Any) -> str:
    """A figure as an element of HTML: without the header of a file, and without addresses in it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ltsm"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _look(verdict: Verdict) -> dict[str, tuple[str, Any]]:
    """Colour and line style of each candidate."""
    found: dict[str, tuple[str, Any]] = {}
    tuned = 0
    for candidate in verdict.candidates:
        if candidate.name == ZERO_SHOT:
            found[candidate.name] = ZERO_COLOUR, (0, (4, 2))
        elif candidate.kind == "naive":
            found[candidate.name] = NAIVE_COLOUR, (0, (1, 1))
        else:
            found[candidate.name] = COLOURS[tuned % len(COLOURS)], STYLES[tuned % len(STYLES)]
            tuned += 1
    return found


def _bars(verdict: Verdict) -> Any:
    look = _look(verdict)
    count = len(verdict.candidates)
    figure, ax = new_figure(8, 1.0 + 0.5 * count)
    scores = []
    for found in verdict.candidates:
        scores += [part["mse"] for part in (found.val, found.test) if part]
    lowest = max(min(scores), 1e-12)
    near = [score for score in scores if score <= FAR * lowest]
    limit = 1.25 * max(near)
    for i, found in enumerate(verdict.candidates):
        for part, shift, alpha in ((found.val, -0.2, 0.4), (found.test, 0.2, 0.95)):
            if part is None:
                continue
            cut = part["mse"] > limit
            length = limit if cut else part["mse"]
            hatch = "//" if cut else None
            ax.barh(
                i + shift,
                length,
                0.36,
                color=look[found.name][0],
                alpha=alpha,
                hatch=hatch,
                edgecolor="white",
            )
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if cut else None
            ax.annotate(
                four_digits(part["mse"]) + (" \u25b8" if cut else ""),
                (length, i + shift),
                xytext=(-4 if cut else 4, 0),
                textcoords="offset points",
                ha="right" if cut else "left",
                va="center",
                fontsize=8,
                bbox=box,
            )
    ax.set_xlim(0, limit)
    ax.set_yticks(range(count), [found.name for found in verdict.candidates], fontsize=10)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    ax.set_xlabel("MSE of standardised data; pale: validation, full: test", fontsize=9)
    return figure


def _curves(verdict: Verdict) -> Any:
    look = _look(verdict)
    figure, ax = new_figure(8, 4)
    zero = verdict.candidate(ZERO_SHOT).val["mse"]
    lines = [(ZERO_SHOT, zero)]
    if verdict.naive is not None:
        lines.append((verdict.naive, verdict.candidate(verdict.naive).val["mse"]))
    trained = [found for found in verdict.candidates if found.epochs]
    ends = [zero]
    for found in trained:
        curve = [entry["val_mse"] for entry in found.history]
        epochs = [entry["epoch"] for entry in found.history]
        colour, style = look[found.name]
        ax.plot(
            epochs,
            curve,
            color=colour,
            linestyle=style,
            linewidth=2,
            marker="o",
            markersize=4,
            label=found.name,
        )
        if 0 < found.best_epoch < len(curve):
            ax.plot(
                found.best_epoch,
                curve[found.best_epoch],
                "o",
                color=colour,
                markersize=11,
                mfc="none",
                mew=1.5,
            )
        ends += curve[1:]

    # The axis shows where the methods end. What lies far above, a start from random weights or a
    # naive forecast, is cut off, and the legend says where it is.
    span = max(max(ends) - min(ends), 0.02 * abs(zero), 1e-9)
    low, high = min(ends) - 0.1 * span, max(ends) + 0.35 * span
    for name, value in lines:
        colour, style = look[name]
        label = name if low <= value <= high else f"{name}: {four_digits(value)} (off the axis)"
        ax.axhline(value, color=colour, linestyle=style, linewidth=1.5, label=label)
        if name != ZERO_SHOT and low - span <= value < low:
            low = value - 0.1 * span
    ax.set_ylim(low, high)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch (0: before training)", fontsize=9)
    ax.set_ylabel("validation MSE", fontsize=9)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _examples(verdict: Verdict) -> Any:
    look = _look(verdict)
    shown = verdict.examples
    rows, columns = -(-len(shown) // 2), min(2, len(shown))
    figure, axes = new_figure(10, 3.0 * rows, nrows=rows, ncols=columns, squeeze=False)
    for ax, example in zip(np.ravel(axes), shown, strict=False):
        context, target = (
            np.asarray(example["context"], float),
            np.asarray(example["target"], float),
        )
        places, dated = _places(example, len(context), len(target))
        past, future = places[: len(context)], places[len(context) :]
        # No gap between the past and the truth.
        ax.plot([*past, future[0]], [*context, target[0]], color="#999999", linewidth=1.2)
        ax.plot(future, target, color="black", linewidth=2.2, label="truth")
        for name, point in example["forecasts"].items():
            colour, style = look[name]
            ax.plot(
                future,
                np.asarray(point, float),
                color=colour,
                linestyle=style,
                linewidth=1.6,
                label=name,
            )
        ax.axvline(future[0], color="#999999", linewidth=0.8)
        title = (
            example["column"]
            if example["item"] == verdict.name
            else f"{example['item']}: {example['column']}"
        )
        ax.set_title(_short(title), fontsize=10, loc="left")
        ax.set_ylabel(_short(example["column"], 24), fontsize=9)
        if dated:
            _write_dates(ax)
        else:
            ax.set_xlabel("rows from the start of the forecast", fontsize=9)
    for ax in np.ravel(axes)[len(shown) :]:
        ax.set_visible(False)
    handles, labels = np.ravel(axes)[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=10, ncols=len(labels), loc="outside upper center"
    )
    return figure


def _places(example: Any, past: int, ahead: int) -> tuple[np.ndarray, bool]:
    """Places on the time axis: stamps where there are some, else rows."""
    if example["stamps"] is None:
        return np.arange(-past, ahead), False
    return np.array(example["stamps"], "datetime64[us]"), True


def _write_dates(ax: Any) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=7)  # of which one fits every range
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _short(text: str, most: int = 48) -> str:
    """A name that fits over a picture; a dollar sign begins no formula."""
    text = text if len(text) <= most else text[: most - 1] + "\u2026"
    return text.replace("$", r"\$")
