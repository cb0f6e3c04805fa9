"""The load of every expert over a run, a panel for each MoE layer.

Letters: S logged steps, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.tracking.report import canvas
from recipes.tracking.report.colours import DIVERGING_STOPS, Theme
from recipes.tracking.report.run_record import Floats, LayerLoad

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

MAX_PANELS = 12
_MAX_COLUMNS = 240  # of a panel; more steps are averaged into these
_MAX_ROWS = 256  # more experts are averaged too


def pick_evenly(count: int, most: int) -> list[int]:
    """Picks at most ``most`` of the indices 0..count-1, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def load_figure(loads: Sequence[LayerLoad], theme: Theme) -> Figure | None:
    """Draws load relative to the uniform share, on a scale centred on 1; None without load.

    Of more than `MAX_PANELS` layers, evenly spaced ones are drawn, with a note in the figure.
    """
    if not loads:
        return None
    shown = [loads[i] for i in pick_evenly(len(loads), MAX_PANELS)]
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    figure = canvas.new_figure(1.5 + rows * (2.6 if rows == 1 else 1.75), theme)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    relative = [_relative(load) for load in shown]
    top = _top(relative)
    for index, (axes, load, cells_SE) in enumerate(zip(grid, shown, relative, strict=False)):
        mesh = _draw(axes, load, cells_SE, top, theme)
        canvas.style(axes, theme, x="step" if index + columns >= len(shown) else "", grid=False)
        axes.set_title(f"layer {load.layer}", loc="left", fontsize=9, color=theme.text, pad=4)
        axes.set_ylabel("expert" if index % columns == 0 else "", fontsize=9, color=theme.text)
        axes.tick_params(labelbottom=index + columns >= len(shown))
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    _add_scale(figure, mesh, list(grid[: len(shown)]), top, theme)
    if len(shown) < len(loads):
        text = f"{len(shown)} of {len(loads)} MoE layers, evenly spaced."
        figure.suptitle(text, x=0.01, ha="left", fontsize=8.5, color=theme.muted)
    return figure


def _relative(load: LayerLoad) -> Floats:
    """Returns ``[S, E]`` load times E, averaged into as many cells as can be seen."""
    cells_SE: Floats = load.load_SE * load.load_SE.shape[1]
    for axis, most in ((0, _MAX_COLUMNS), (1, _MAX_ROWS)):
        if cells_SE.shape[axis] > most:
            parts = np.array_split(cells_SE, most, axis=axis)
            cells_SE = np.stack([part.mean(axis=axis) for part in parts], axis=axis)
    return cells_SE


def _top(relative: Sequence[Floats]) -> float:
    """Returns the end of the scale: twice the uniform load, or what all but 1 in 200 cells stay below."""
    known = np.concatenate([cells_SE[np.isfinite(cells_SE)] for cells_SE in relative])
    return max(2.0, float(np.ceil(np.percentile(known, 99.5)))) if known.size else 2.0


def _draw(axes: Axes, load: LayerLoad, cells_SE: Floats, top: float, theme: Theme) -> QuadMesh:
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    colours = LinearSegmentedColormap.from_list("load", DIVERGING_STOPS).with_extremes(bad=theme.grid)
    steps = [part.mean() for part in np.array_split(load.steps_S, cells_SE.shape[0])]
    experts = np.linspace(-0.5, load.load_SE.shape[1] - 0.5, cells_SE.shape[1] + 1)
    mesh = axes.pcolormesh(
        _edges(np.array(steps)),
        experts,
        np.ma.masked_invalid(cells_SE.T),
        cmap=colours,
        norm=TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top),
        rasterized=True,
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return mesh


def _edges(steps_S: Floats) -> Floats:
    """Returns the borders halfway between the steps, the outer ones as far out as their neighbours."""
    if steps_S.size == 1:
        return np.array([steps_S[0] - 0.5, steps_S[0] + 0.5])
    middles = (steps_S[1:] + steps_S[:-1]) / 2
    return np.concatenate(
        ([2 * steps_S[0] - middles[0]], middles, [2 * steps_S[-1] - middles[-1]]), dtype=np.float64
    )


def _add_scale(figure: Figure, mesh: QuadMesh, panels: Sequence[Axes], top: float, theme: Theme) -> None:
    bar = figure.colorbar(
        mesh, ax=list(panels), location="bottom", extend="max", aspect=55, shrink=0.6, pad=0.03
    )
    ticks = [0, 0.5, 1, *np.linspace(1, top, 3)[1:]]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.set_label(
        "load relative to uniform (1 = each expert has 1/E of the slots)", fontsize=9, color=theme.text
    )
    bar.ax.tick_params(colors=theme.muted, labelsize=8.5, length=3)
    bar.outline.set_visible(False)
