"""Pictures of surfaces: contours, hills, and lines. They need matplotlib
(`pip install ltsm-jax[plots]`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltsm_jax.landscape.grid import Surface

LEVELS = 14  # contour lines
MAP = "viridis"
GREY = "#555555"
STEEP = 4.0  # of the loss at the centre: from here on the colours of a picture no longer change
Places = Mapping[str, tuple[float, float]]


def draw_contours(
    surfaces: Mapping[str, Surface],
    path: str | Path,
    *,
    notes: Mapping[str, str] | None = None,
    places: Places | None = None,
) -> Path:
    """Draw planes side by side as contours, in one scale of colours.

    Args:
      surfaces: planes by name.
      path: of the picture, .png, .svg or .pdf.
      notes: a line under the name of a surface, such as its top eigenvalue.
      places: (x, y) of models to mark, as `Plane.places`.
    Returns: the path. Raises: ValueError for no surface, or one that is a line; ImportError without
      matplotlib.
    """
    low, high = _scale(surfaces, lines=False)
    figure, axes = _figure(len(surfaces), 3.5, 3.7)
    filled = None
    for ax, (name, found) in zip(axes, surfaces.items(), strict=True):
        assert found.y is not None, "planes were asked for"
        loss = np.clip(np.nan_to_num(found.loss, nan=high, posinf=high), low, high)
        levels = np.geomspace(low, high, LEVELS) if low > 0 else np.linspace(low, high, LEVELS)
        filled = ax.contourf(found.x, found.y, loss, levels=levels, cmap=MAP, norm=_norm(low, high))
        ax.contour(found.x, found.y, loss, levels=levels, colors="white", linewidths=0.4, alpha=0.7)
        if places is None:
            ax.plot(0, 0, marker="+", color="white", markersize=9)
        for label, (x, y) in (places or {}).items():
            ax.plot(x, y, marker="o", color="white", markeredgecolor="black", markersize=5)
            ax.annotate(
                label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color="white"
            )
        ax.set_aspect("equal")
        _name(ax, name, notes)
    bar = figure.colorbar(filled, ax=axes, shrink=0.85, pad=0.02)
    _ticks(bar.ax, low, high)
    bar.set_label("loss", fontsize=9)
    return _save(figure, path)


def draw_hills(
    surfaces: Mapping[str, Surface], path: str | Path, *, notes: Mapping[str, str] | None = None
) -> Path:
    """Draw planes side by side as hills; what is far above the centre is cut off.

    Args and errors as `draw_contours`.
    """
    low, high = _scale(surfaces, lines=False)
    figure, axes = _figure(len(surfaces), 3.7, 3.7, projection="3d")
    for ax, (name, found) in zip(axes, surfaces.items(), strict=True):
        assert found.y is not None, "planes were asked for"
        wide, up = np.meshgrid(found.x, found.y)
        loss = np.clip(np.nan_to_num(found.loss, nan=high, posinf=high), low, high)
        ax.plot_surface(
            wide,
            up,
            loss,
            cmap=MAP,
            norm=_norm(low, high),
            rcount=80,
            ccount=80,
            linewidth=0.15,
            edgecolor="#00000022",
        )
        ax.set_zlim(low, high)
        ax.view_init(elev=30, azim=-60)
        ax.tick_params(labelsize=7, pad=0)
        _name(ax, name, notes)
    return _save(figure, path)


def draw_lines(
    surfaces: Mapping[str, Surface], path: str | Path, *, notes: Mapping[str, str] | None = None
) -> Path:
    """Draw the loss along the first direction, one curve for each surface.

    Of a plane it is the row through the centre.

    Args and errors as `draw_contours`, but for lines, which are welcome.
    """
    rows = {}
    for name, found in surfaces.items():
        loss = found.loss if found.y is None else found.loss[int(np.argmin(np.abs(found.y)))]
        rows[name] = Surface(found.x, None, loss)
    _, high = _scale(rows, lines=True)
    figure, (ax,) = _figure(1, 6.0, 3.8)
    for name, row in rows.items():
        note = (notes or {}).get(name)
        ax.plot(row.x, row.loss, linewidth=1.6, label=f"{name} ({note})" if note else name)
    ax.set_ylim(top=high + 0.05 * abs(high))
    ax.set_xlabel("step along the direction, in norms of each filter", fontsize=9)
    ax.set_ylabel("loss", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    ax.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _scale(surfaces: Mapping[str, Surface], *, lines: bool) -> tuple[float, float]:
    """Lowest loss, and where the colours end: the highest, or a few times the highest centre."""
    if not surfaces:
        raise ValueError("there is no surface to draw")
    flat = [name for name, found in surfaces.items() if found.y is None]
    if flat and not lines:
        raise ValueError(f"{', '.join(flat)}: a line, not a plane; draw it with draw_lines")
    values = np.concatenate([found.loss.ravel() for found in surfaces.values()])
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("no loss of these surfaces is finite")
    low, high = float(values.min()), float(values.max())
    centre = max(found.centre for found in surfaces.values())
    if centre > 0:
        high = min(high, STEEP * centre)
    if not high > low:
        high = low + max(abs(low), 1.0) * 1e-3
    return low, high


def _figure(count: int, width: float, height: float, **of_axes: Any) -> tuple[Any, Any]:
    """A figure with `count` axes in a row."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed
    from matplotlib.ticker import MaxNLocator

    figure = Figure(
        figsize=(width * count + (0.9 if count > 1 else 0.0), height), layout="constrained", dpi=150
    )
    axes = figure.subplots(1, count, squeeze=False, subplot_kw=of_axes)[0]
    for ax in axes:
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return figure, axes


def _norm(low: float, high: float) -> Any:
    """Colours by the logarithm where all losses are positive: the valley is what a picture is
    about.
    """
    from matplotlib.colors import LogNorm, Normalize

    return LogNorm(low, high) if low > 0 else Normalize(low, high)


def _ticks(ax: Any, low: float, high: float) -> None:
    """Mark the scale with a few plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    marks = np.geomspace(low, high, 6) if low > 0 else np.linspace(low, high, 6)
    ax.yaxis.set_major_locator(FixedLocator(marks.tolist()))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.tick_params(labelsize=8)


def _name(ax: Any, name: str, notes: Mapping[str, str] | None) -> None:
    note = (notes or {}).get(name)
    ax.set_title(f"{name}\n{note}" if note else name, fontsize=10)


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
