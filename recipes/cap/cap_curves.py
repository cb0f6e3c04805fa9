"""Utilisation against batch size, and the roofline that bounds it.

Letters: B sequences per batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.tracking.report import canvas
from recipes.tracking.report.colours import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MORE = {
    "light": ("#2b8a5b", "#8a4fbf", "#c2412d", "#1593a0"),
    "dark": ("#5ec994", "#bd92ea", "#f0806c", "#52c7d4"),
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHED = (0, (4, 2.5))
_DOTTED = (0, (1.2, 1.8))
_STRONG = {"linewidth": 2.0, "markersize": 5, "alpha": 1.0, "zorder": 3}
_FAINT = {"linewidth": 1.4, "markersize": 3.5, "alpha": 0.75, "zorder": 2}
Figures = Mapping[str, Any]


def colours_of(theme: Theme) -> tuple[str, ...]:
    """Returns the colours of systems in order; with more systems than colours they start over."""
    return (theme.moe, theme.cpt, *_MORE[theme.name], theme.dense)


def _look(number: int, theme: Theme) -> dict[str, Any]:
    """Returns colour and marker of a system."""
    palette = colours_of(theme)
    return {"color": palette[number % len(palette)], "marker": _MARKERS[number % len(_MARKERS)]}


def curves_figure(report: Figures, theme: Theme) -> Figure | None:
    """Draws utilisation against batch size, and the roofline; None where no utilisation is known."""
    shown = [system for system in report["systems"] if _measured(system, "flops_per_s")]
    if not shown:
        return None
    sparse = [system for system in shown if _distinct_points(system)]
    above = ["memory", "compute", *(["experts"] if sparse else [])]
    figure = canvas.new_figure(7.8, theme)
    places = figure.subplot_mosaic([above, ["roof"] * len(above)], height_ratios=[1, 1.15])
    memory, compute = places["memory"], places["compute"]
    bandwidth = [("decode", "s_mbu", "-"), ("decode", "mbu", _DASHED)]
    flops = [("decode", "s_mfu", "-"), ("prefill", "s_mfu", _DOTTED)]
    _draw_shares(memory, shown, theme, bandwidth, "of bandwidth")
    _draw_shares(compute, shown, theme, flops, "of FLOP/s")
    canvas.note(memory, "Solid: S-MBU. Dashed: MBU.", theme)
    canvas.note(compute, "S-MFU. Solid: decode. Dotted: prefill.", theme)
    if sparse:
        _draw_experts(places["experts"], shown, theme)
        canvas.note(places["experts"], "Solid: counted. Dotted: uniform bound.", theme)
    _draw_roof(places["roof"], shown, theme)
    _legend(figure, shown, theme)
    return figure


def _measured(system: Figures, key: str, phase: str = "decode") -> list[Figures]:
    return [point for point in system["points"] if point[phase][key] is not None]


def _draw_shares(
    axes: Axes, systems: Sequence[Figures], theme: Theme, lines: Sequence[tuple[str, str, Any]], of: str
) -> None:
    """Draws shares in percent against batch size on a scale of doublings."""
    canvas.style(axes, theme, x="batch size", y=f"share {of} (%)")
    sizes: set[int] = set()
    highest = 0.0
    for number, system in enumerate(systems):
        for phase, key, dashes in lines:
            points = _measured(system, key, phase)
            x = [point["batch_size"] for point in points]
            y = [100 * point[phase][key] for point in points]
            look = _look(number, theme) | (_STRONG if dashes == "-" else _FAINT)
            axes.plot(x, y, linestyle=dashes, **look)
            sizes |= set(x)
            highest = max([highest, *y])
    _batch_axis(axes, sorted(sizes))
    axes.set_ylim(0, 1.12 * highest if highest else 1)
    if highest > 95:
        axes.axhline(100, color=theme.muted, linewidth=1.0, zorder=1)


def _distinct_points(system: Figures) -> list[Figures]:
    return [point for point in system["points"] if point["decode"]["distinct"] is not None]


def _draw_experts(axes: Axes, systems: Sequence[Figures], theme: Theme) -> None:
    """Draws the share of experts that a decode pass touches, and the bound of uniform routing."""
    canvas.style(axes, theme, x="batch size", y="experts touched per pass (%)")
    sizes: set[int] = set()
    for number, system in enumerate(systems):
        look, points = _look(number, theme), _distinct_points(system)
        if not points:
            continue
        x = [point["batch_size"] for point in points]
        most = sum(system["experts"]) / len(system["experts"])
        sizes |= set(x)
        drawn = [point["decode"]["distinct"] for point in points]
        if drawn[0]["source"] == "traced":
            axes.plot(x, [100 * one["mean"] / most for one in drawn], markersize=5, **look)
        bounds = [100 * (one["uniform_bound"] or math.nan) / most for one in drawn]
        axes.plot(x, bounds, color=look["color"], linestyle=_DOTTED, linewidth=1.4, alpha=0.75)
    _batch_axis(axes, sorted(sizes))
    axes.set_ylim(0, 105)


def _batch_axis(axes: Axes, sizes: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(sizes) == 1:
        axes.set_xlim(sizes[0] / 2, sizes[0] * 2)


def _draw_roof(axes: Axes, systems: Sequence[Figures], theme: Theme) -> None:
    """Draws FLOP/s against FLOPs per byte, under min(peak FLOP/s, peak bytes/s times FLOPs per byte)."""
    canvas.style(axes, theme, x="FLOPs per byte moved (S-MFU's over S-MBU's)", y="GFLOP/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = [
        (number, phase, point["batch_size"], point[phase])
        for number, system in enumerate(systems)
        for phase in ("decode", "prefill")
        for point in _measured(system, "flops_per_byte", phase)
    ]
    roofs = sorted({roof for system in systems if (roof := _roof(system)) is not None})
    low, high = _span(
        [values["flops_per_byte"] for *_, values in points] + [flops / width for width, flops in roofs]
    )
    grid = np.geomspace(low, high, 200)
    for row, (width, flops) in enumerate(roofs):
        axes.plot(grid, np.minimum(flops, width * grid) / 1e9, color=theme.muted, linewidth=1.6, zorder=1)
        text = f"{width / 1e9:,.1f} GB/s, {flops / 1e9:,.0f} GFLOP/s"
        # above the slope nothing can lie
        axes.text(
            0.01, 0.96 - 0.08 * row, text, transform=axes.transAxes, va="top", fontsize=8.5, color=theme.muted
        )
    for number, phase, size, values in points:
        look, at = _look(number, theme), (values["flops_per_byte"], values["flops_per_s"] / 1e9)
        face = look["color"] if phase == "decode" else theme.background
        axes.plot([at[0]], [at[1]], markersize=6.5, markerfacecolor=face, zorder=3, **look)
        offset: dict[str, Any] = {"xytext": (7, -8), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(str(size), xy=at, color=look["color"], **offset)
    axes.set_xlim(low, high)
    axes.set_ylim(top=2 * axes.get_ylim()[1])
    canvas.note(axes, "Filled: decode. Hollow: prefill. Numbers: batch size. Line: the roofline.", theme)


def _roof(system: Figures) -> tuple[float, float] | None:
    peaks = system["peaks"]
    width, flops = peaks["bytes_per_s"]["value"], peaks["flops"]["value"]
    devices = system["devices"]
    return None if width is None or flops is None else (devices * width, devices * flops)


def _span(values: Sequence[float]) -> tuple[float, float]:
    return (min(values) / 2, max(values) * 3) if values else (0.1, 1000.0)


def _legend(figure: Figure, systems: Sequence[Figures], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linewidth=2, label=f"{system['name']} ({system['dtype']})", **_look(number, theme))
        for number, system in enumerate(systems)
    ]
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": theme.text}
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), **style)
