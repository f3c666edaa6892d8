"""Pictures: the style of all figures, and of forecasts the end of the history, the point and the
bands around it.

matplotlib is imported only when something is drawn.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ltsm_jax import storage
from ltsm_jax.data.panel import Panel

MOST = 6  # items that are drawn unless some are named
HISTORY = 4  # horizons of history that are drawn, where there are as many
SHORTEST = 50  # rows of history at least
POINT, PAST = "#c2410c", "#334155"
NO_PICTURES = "plots need matplotlib: pip install 'ltsm-jax[plots]'"


def new_figure(width: float, height: float, **kwargs: Any) -> tuple[Any, Any]:
    """Make a figure of `width` x `height` inches and its axes in the style of all pictures here.

    kwargs: of matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots(**kwargs)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def level_columns(table: pd.DataFrame) -> list[str]:
    """Names of the quantile columns of a forecast table, the lowest level first."""
    found = []
    for name in table.columns:
        try:
            level = float(name)
        except (TypeError, ValueError):
            continue
        if 0 < level < 1:
            found.append(name)
    return sorted(found, key=float)


def plot_forecast(
    panel: Panel,
    table: pd.DataFrame,
    path: str | Path | None = None,
    *,
    items: Sequence[Any] | None = None,
    history: int | None = None,
) -> Any:
    """Draw a forecast table behind the end of what it was made from.

    Args:
      panel: what was forecast. table: the forecast, as `Forecaster.predict` returns it.
      path: file to write (.png, .svg, .pdf), or None.
      items: ids to draw; by default the first few.
      history: rows of history; by default a few horizons.
    Returns: the matplotlib Figure.
    Raises: ImportError with what to install; ValueError for ids that are not in the table.
    """
    try:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
        from matplotlib.figure import Figure  # no pyplot: no global state, no display needed
    except ImportError as err:
        raise ImportError(NO_PICTURES) from err

    numbers = _numbers(panel, items)
    shown = list(itertools.product(numbers, range(panel.n_variates)))
    if items is None:
        shown = shown[:MOST]
    figure = Figure(figsize=(9, 2.6 * len(shown)), layout="constrained")
    horizon = len(table) // (panel.n_items * panel.n_variates)
    rows = history or max(HISTORY * horizon, SHORTEST)
    for place, (i, c) in enumerate(shown, 1):
        axes = figure.add_subplot(len(shown), 1, place)
        start = (i * panel.n_variates + c) * horizon
        part = table.iloc[start : start + horizon]
        _draw(axes, panel, i, c=c, part=part, rows=rows)
        if panel.first is not None and panel.freq is not None:
            locator = AutoDateLocator()
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        else:
            axes.set_xlabel("row")
        if place == 1:
            axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=3)
    if path is not None:
        figure.savefig(storage.user_path(path), dpi=120)
    return figure


def _numbers(panel: Panel, items: Sequence[Any] | None) -> list[int]:
    """Numbers of the items called so.

    Raises: ValueError for ids that are not there.
    """
    if items is None:
        return list(range(min(panel.n_items, MOST)))
    wanted = [items] if isinstance(items, str) or not isinstance(items, Sequence) else list(items)
    place = {item: i for i, item in enumerate(panel.ids.tolist())}
    if unknown := [item for item in wanted if item not in place]:
        shown = ", ".join(map(str, list(place)[:5]))
        raise ValueError(
            f"no item {', '.join(map(repr, unknown))} in {panel.name}; there are {shown}, ..."
        )
    return [place[item] for item in wanted]


def _draw(axes: Any, panel: Panel, i: int, c: int, part: pd.DataFrame, rows: int) -> None:
    """One item's target: history, bands and point."""
    series = panel.item(i)
    past = series.values[c, -rows:]
    n = series.n_rows
    ahead = series.stamps_after(len(part))
    if series.timestamps is None or ahead is None:
        x_past, x = np.arange(n - len(past), n), np.arange(n, n + len(part))
    else:
        x_past = _wall(series.in_zone(series.timestamps[-rows:]))
        x = _wall(series.in_zone(ahead))
    axes.plot(x_past, past, color=PAST, linewidth=1, label="history")
    columns = level_columns(part)
    for low, high in zip(columns[: len(columns) // 2], columns[::-1], strict=False):
        bounds = part[low].to_numpy(), part[high].to_numpy()
        label = f"{float(low):g} to {float(high):g}"
        axes.fill_between(x, *bounds, color=POINT, alpha=0.18, linewidth=0, label=label)
    axes.plot(x, part["predictions"].to_numpy(), color=POINT, linewidth=1.5, label="forecast")
    title = panel.columns[c]
    if panel.id_name is not None:
        title = f"{panel.ids[i]}: {title}" if panel.n_variates > 1 else str(panel.ids[i])
    axes.set_title(title, fontsize="medium", loc="left")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def _wall(index: pd.DatetimeIndex) -> np.ndarray:
    """Stamps as the clock on the wall shows them."""
    return index.tz_localize(None).to_numpy() if index.tz is not None else index.to_numpy()
