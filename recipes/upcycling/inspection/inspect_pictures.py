"""Pictures of a mixture, each of which answers one question.

Letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.tracking.report import canvas
from recipes.tracking.report.colours import DIVERGING_STOPS, Theme
from recipes.tracking.report.heatmap import pick_evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

Figures = Mapping[str, Any]
_MOST_NUMBERED = 16  # experts or layers whose tick is each written


def load_picture(figures: Figures, theme: Theme) -> Figure:
    """Draws the load of every expert, in multiples of its fair share, a row for each layer."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    layers = figures["layers"]
    most = max(layer["experts"] for layer in layers)
    load_LE = np.full((len(layers), most), np.nan)
    for row, layer in enumerate(layers):
        load_LE[row, : layer["experts"]] = np.array(layer["load"]) * layer["experts"]
    top = max(2.0, float(np.ceil(np.nanmax(load_LE))))
    figure = canvas.new_figure(1.7 + min(6.0, 0.34 * len(layers)), theme)
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("load", DIVERGING_STOPS).with_extremes(bad=theme.grid)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top)
    mesh = axes.pcolormesh(np.ma.masked_invalid(load_LE), cmap=colours, norm=norm, rasterized=True)
    axes.invert_yaxis()
    canvas.style(axes, theme, x="expert", y="layer", grid=False)
    _ticks(axes, [str(layer["layer"]) for layer in layers], vertical=True)
    _ticks(axes, list(map(str, range(most))), vertical=False)
    _scale(figure, axes, mesh, [0, 0.5, 1, (1 + top) / 2, top], "load over the fair share", theme)
    return figure


def likeness_picture(layer: Figures, theme: Theme) -> Figure:
    """Draws how alike the experts of a layer are: by outputs on text, and by weights."""
    from matplotlib.colors import LinearSegmentedColormap

    figure = canvas.new_figure(4.6, theme)
    colours = LinearSegmentedColormap.from_list("alike", [theme.grid, theme.moe]).with_extremes(
        bad=theme.muted
    )
    panels = (
        ("output_cka", "Outputs on text (linear CKA)"),
        ("weight_cosine", "Weights (cosine, neurons in place)"),
    )
    axes_of = figure.subplots(1, 2)
    for axes, (key, title) in zip(axes_of, panels, strict=True):
        values_EE = np.array(layer[key], dtype=float)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values_EE), cmap=colours, vmin=0.0, vmax=1.0, rasterized=True
        )
        axes.set_aspect("equal")
        axes.invert_yaxis()
        canvas.style(axes, theme, x="expert", y="expert", grid=False)
        canvas.note(axes, title, theme)
        for vertical in (False, True):
            _ticks(axes, list(map(str, range(layer["experts"]))), vertical=vertical)
    _scale(figure, list(axes_of), mesh, [0, 0.25, 0.5, 0.75, 1], "0: unrelated, 1: the same", theme)
    return figure


def margin_picture(figures: Figures, theme: Theme) -> Figure | None:
    """Draws the spread of margins by layer, and the share of near ties; None where no layer has margins."""
    layers = [layer for layer in figures["layers"] if layer["margin_quantiles"] is not None]
    if not layers:
        return None
    figure = canvas.new_figure(3.6, theme)
    spread, ties = figure.subplots(1, 2)
    places, names = np.arange(len(layers)), [str(layer["layer"]) for layer in layers]
    found = {
        q: np.array([layer["margin_quantiles"][q] for layer in layers]) for q in ("5", "25", "50", "75", "95")
    }
    spread.vlines(places, found["5"], found["95"], color=theme.moe, linewidth=1.2)
    spread.vlines(places, found["25"], found["75"], color=theme.moe, linewidth=5)
    spread.plot(places, found["50"], "o", color=theme.background, markeredgecolor=theme.moe, markersize=5)
    canvas.style(spread, theme, x="layer", y="margin")
    canvas.note(spread, "Median, half, and nine tenths of the tokens.", theme)
    ties.bar(places, [100 * layer["near_ties"] for layer in layers], color=theme.cpt, width=0.6)
    canvas.style(ties, theme, x="layer", y="% of tokens")
    canvas.note(ties, "Near ties: bf16 rounding can decide them.", theme)
    for axes in (spread, ties):
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.set_ylim(bottom=0)
        shown = pick_evenly(len(names), _MOST_NUMBERED)
        axes.set_xticks(shown, [names[i] for i in shown])
    return figure


def _ticks(axes: Axes, names: list[str], *, vertical: bool) -> None:
    shown = pick_evenly(len(names), _MOST_NUMBERED)
    set_ticks = axes.set_yticks if vertical else axes.set_xticks
    set_ticks([i + 0.5 for i in shown], [names[i] for i in shown])


def _scale(
    figure: Figure, axes: Axes | list[Axes], mesh: QuadMesh, ticks: list[float], label: str, theme: Theme
) -> None:
    bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=55, shrink=0.6, pad=0.04)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.set_label(label, fontsize=9, color=theme.text)
    bar.ax.tick_params(colors=theme.muted, labelsize=8.5, length=3)
    bar.outline.set_visible(False)
