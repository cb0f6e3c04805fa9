"""Figures in the style of the report: one theme for everything drawn, no global state of matplotlib.

matplotlib is imported where a figure is made.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from recipes.runtime.atomic import atomic_write_bytes
from recipes.tracking.report import formats
from recipes.tracking.report.colours import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.2  # inches: the width of the page at 100 dots an inch
_DPI = 180
_TEXT, _TICK = 9, 8.5  # points


def new_figure(height: float, theme: Theme) -> Figure:
    """Returns an empty figure as wide as the page and ``height`` inches tall, with automatic layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, theme: Theme, x: str = "", y: str = "", grid: bool = True) -> None:
    """Gives axes the theme and labels; two spines and, if asked, horizontal grid lines."""
    axes.set_facecolor(theme.background)
    axes.set_xlabel(x, fontsize=_TEXT, color=theme.text)
    axes.set_ylabel(y, fontsize=_TEXT, color=theme.text)
    axes.tick_params(colors=theme.muted, labelsize=_TICK, length=3, width=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
        spine.set_linewidth(0.8)
    if grid:
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)


def token_ticks(axes: Axes) -> None:
    """Writes the x axis in tokens: ``0``, ``500 k``, ``1 M``."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """Formats a count without trailing zeros."""
    digits, _, unit = formats.count(float(value)).partition(" ")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits} {unit}".strip()


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves places apart until neighbours are ``gap`` apart, keeping their order and staying within 0..1.

    Least squares: less ``gap`` times their rank, the places must not fall; where they do, neighbours are
    pooled into their mean (the pool-adjacent-violators algorithm).

    Args:
        places: Wanted places, in any order.
        gap: Least distance of two neighbours.

    Returns:
        The places, moved as little as possible, in the order given.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([places[index] - gap * rank])
        while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    highest = max(0.0, 1.0 - gap * (len(places) - 1))
    levels = [min(max(fmean(pool), 0.0), highest) for pool in pools for _ in pool]
    moved = {index: level + gap * rank for rank, (index, level) in enumerate(zip(order, levels, strict=True))}
    return [moved[index] for index in range(len(places))]


def label_lines(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.1) -> None:
    """Writes names beside the right end of lines, moved apart where they would overlap.

    Args:
        axes: Axes whose limits are final.
        labels: Height of the line's end in data units, text and colour.
        gap: Least distance of two labels, as a fraction of the axes' height.
    """
    low, high = axes.get_ylim()
    places = spread([(y - low) / (high - low) for y, _, _ in labels], gap)
    for place, (_, text, colour) in zip(places, labels, strict=True):
        font: dict[str, Any] = {"fontsize": _TEXT, "fontweight": "bold", "linespacing": 1.25}
        where: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (8, 0), "textcoords": "offset points"}
        axes.annotate(text, (1.0, place), color=colour, va="center", annotation_clip=False, **where, **font)


def note(axes: Axes, text: str, theme: Theme) -> None:
    """Writes a quiet remark on how to read the axes above them."""
    axes.set_title(text, loc="left", fontsize=_TICK, color=theme.muted, pad=8)


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Software": None}, "facecolor": figure.get_facecolor()}
    figure.savefig(buffer, format="png", dpi=_DPI, **options)
    return buffer.getvalue()


def write_png(figure: Figure, path: Path) -> bytes:
    """Replaces a PNG file by the figure in one step; returns its bytes.

    Raises:
        DiskError: The file cannot be written.
    """
    data = png(figure)
    atomic_write_bytes(path, data)
    return data
