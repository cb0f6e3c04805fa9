"""The CAP radar: cost, accuracy and performance of several systems on one triangle.

Every axis runs from 0.2 (its worse anchor) to 1 (its better anchor), so that the worst is not in the centre.
By default anchors are fixed, and a system's shape does not depend on what it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe.errors import Mistake
from recipes.cap.accuracy import share_right
from recipes.cap.cap_curves import colours_of
from recipes.cap.cap_table import duration
from recipes.tracking.report import canvas, formats
from recipes.tracking.report.colours import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST = 0.2
# Systems whose values have a line each, and whose shapes are filled.
_ROOMY, _FILLED = 5, 3
_RINGS = (0.2, 0.4, 0.6, 0.8, 1.0)
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Anchors:
    """The ends of an axis.

    Attributes:
        worse: Value at 0.2.
        better: Value at 1.
        logarithmic: True if equal steps are equal ratios.
    """

    worse: float
    better: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """Places a value between 0.2 and 1; values beyond the anchors are clamped."""
        if self.worse == self.better:
            return 1.0
        low, high, at = self.worse, self.better, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = (at - low) / (high - low)
        return _LEAST + (1 - _LEAST) * min(max(share, 0.0), 1.0)

    def covers(self, value: float) -> bool:
        """Returns True if a value lies between the anchors."""
        return min(self.worse, self.better) <= value <= max(self.worse, self.better)


DEFAULTS: Mapping[str, Anchors] = {
    "tpot_s": Anchors(1.0, 0.001, True),
    "usd_per_mtok": Anchors(100.0, 0.01, True),
    "accuracy": Anchors(0.0, 1.0, False),
    "bits_per_byte": Anchors(8.0, 0.0, False),
}
_TITLES = {
    "tpot_s": "performance\n(time per output token)",
    "usd_per_mtok": "cost\n($ per million tokens)",
    "accuracy": "accuracy\n(answers right)",
    "bits_per_byte": "accuracy\n(bits per byte of text)",
}


@dataclass(frozen=True)
class Corner:
    """Value and place of one system on one axis; both None where it was not measured."""

    value: float | None
    place: float | None


@dataclass(frozen=True)
class Radar:
    """Content of the radar.

    Attributes:
        axes: Keys of `DEFAULTS`, three of them.
        anchors: Ends of each axis.
        systems: Name, and its corners.
        batch_size: That speed and cost are of; None where no size was measured for all.
        scale: ``fixed`` or ``min-max``.
    """

    axes: tuple[str, ...]
    anchors: tuple[Anchors, ...]
    systems: tuple[tuple[str, tuple[Corner, ...]], ...]
    batch_size: int | None
    scale: str


def parse_anchors(given: Sequence[str]) -> tuple[dict[str, Anchors], list[Mistake]]:
    """Returns the default anchors as changed by ``AXIS=WORSE:BETTER``, and the mistakes in these."""
    found, mistakes = dict(DEFAULTS), []
    for text in given:
        axis, _, ends = text.partition("=")
        worse, _, better = ends.partition(":")
        try:
            low, high = float(worse), float(better)
        except ValueError:
            low = high = math.nan
        wrong = _wrong_anchors(axis, low, high)
        if wrong is not None:
            remedy = f"Axes are {', '.join(DEFAULTS)}; write tpot_s=1:0.001."
            mistakes.append(Mistake("--anchors", text, wrong, remedy))
        else:
            found[axis] = replace(DEFAULTS[axis], worse=low, better=high)
    return found, mistakes


def _wrong_anchors(axis: str, worse: float, better: float) -> str | None:
    if axis not in DEFAULTS or not (math.isfinite(worse) and math.isfinite(better)):
        return "it must be AXIS=WORSE:BETTER"
    if worse == better:
        return "the two ends are one"
    if DEFAULTS[axis].logarithmic and not min(worse, better) > 0:
        return "this axis is logarithmic, and its ends must be above 0"
    return None


def make_radar(
    report: Figures,
    anchors: Mapping[str, Anchors] = DEFAULTS,
    scale: str = "fixed",
    batch_size: int | None = None,
) -> Radar:
    """Makes the radar of a report.

    Args:
        report: Report of one run, or of several joined.
        anchors: Ends by axis; unused with ``min-max``.
        scale: ``fixed``, or ``min-max``: every axis from the worst to the best of these systems (all at 1
            where they are equal), which changes with every system that is added.
        batch_size: That speed and cost are of; None is the largest that was measured for all.
    """
    systems = report["systems"]
    asked = any(share_right(system["accuracy"]) is not None for system in systems)
    keys = ("tpot_s", "usd_per_mtok", "accuracy" if asked else "bits_per_byte")
    size = batch_size if batch_size is not None else _common_size(systems)
    values = {system["name"]: tuple(_value(system, key, size) for key in keys) for system in systems}
    ends = tuple(
        anchors[key] if scale == "fixed" else _min_max(key, [row[i] for row in values.values()])
        for i, key in enumerate(keys)
    )
    corners = tuple(
        (name, tuple(_corner(value, end) for value, end in zip(row, ends, strict=True)))
        for name, row in values.items()
    )
    return Radar(keys, ends, corners, size, scale)


def _corner(value: float | None, ends: Anchors) -> Corner:
    return Corner(value, None if value is None else ends.place(value))


def _common_size(systems: Sequence[Figures]) -> int | None:
    measured = [{p["batch_size"] for p in system["points"] if p["reason"] is None} for system in systems]
    return max(set.intersection(*measured), default=None) if measured else None


def _value(system: Figures, key: str, size: int | None) -> float | None:
    if key == "accuracy":
        return share_right(system["accuracy"])
    if key == "bits_per_byte":
        return system["accuracy"]["perplexity"] and system["accuracy"]["perplexity"]["bits_per_byte"]
    point = next((point for point in system["points"] if point["batch_size"] == size), None)
    if point is None or point["reason"] is not None:
        return None
    return point["tpot_s"]["mean"] if key == "tpot_s" else point["cost"]["usd_per_mtok"]


def _min_max(key: str, values: Sequence[float | None]) -> Anchors:
    known = [value for value in values if value is not None]
    if not known:
        return DEFAULTS[key]
    low, high = min(known), max(known)
    higher_is_better = DEFAULTS[key].better > DEFAULTS[key].worse
    worse, better = (low, high) if higher_is_better else (high, low)
    return Anchors(worse, better, logarithmic=False)


def draw_radar(radar: Radar, theme: Theme) -> Figure:
    """Draws the triangle, with a list of the values beside it."""
    figure = canvas.new_figure(5.4, theme)
    axes, side = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for each in (axes, side):
        each.set_facecolor(theme.background)
        each.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-1.45, 1.45)
    axes.set_ylim(-0.92, 1.34)
    _draw_grid(axes, radar, theme)
    palette = colours_of(theme)
    for number, (_, corners) in enumerate(radar.systems):
        alpha = 0.10 if len(radar.systems) <= _FILLED else 0.0
        _draw_system(axes, corners, palette[number % len(palette)], alpha)
    _write_values(side, radar, theme)
    return figure


def _at(axis: int, place: float) -> tuple[float, float]:
    """Returns a point of an axis: the first axis points up, the others follow clockwise."""
    angle = math.pi / 2 - 2 * math.pi * axis / 3
    return place * math.cos(angle), place * math.sin(angle)


def _draw_grid(axes: Axes, radar: Radar, theme: Theme) -> None:
    for ring in _RINGS:
        x, y = zip(*(_at(i % 3, ring) for i in range(4)), strict=True)
        axes.plot(x, y, color=theme.grid, linewidth=1.4 if ring == 1 else 0.9, zorder=1)
    for i, (key, ends) in enumerate(zip(radar.axes, radar.anchors, strict=True)):
        axes.plot(*zip((0, 0), _at(i, 1.0), strict=True), color=theme.grid, linewidth=0.9, zorder=1)
        x, y = _at(i, 1.06)
        x, up = x + (0.0, 0.1, -0.1)[i], ("bottom", "top", "top")[i]
        known = any(corners[i].value is not None for _, corners in radar.systems)
        text = _TITLES[key] + ("" if known else "\nnot measured")
        colour = theme.text if known else theme.muted
        axes.text(x, y, text, ha="center", va=up, fontsize=9, color=colour, linespacing=1.3)
        if known:
            for ring, value in ((_LEAST, ends.worse), (1.0, ends.better)):
                _write_end(axes, i, ring, shown(key, value), theme)


def _write_end(axes: Axes, axis: int, ring: float, text: str, theme: Theme) -> None:
    from matplotlib.patheffects import withStroke

    offset, across = ((5, 0), (2, 7), (-2, 7))[axis], ("left", "left", "right")[axis]
    halo = [withStroke(linewidth=3, foreground=theme.background)]
    where: dict[str, Any] = {"xy": _at(axis, ring), "xytext": offset, "textcoords": "offset points"}
    font: dict[str, Any] = {"ha": across, "va": "center", "fontsize": 7.5, "color": theme.muted}
    axes.annotate(text, path_effects=halo, zorder=4, **where, **font)


def _draw_system(axes: Axes, corners: Sequence[Corner], colour: str, alpha: float) -> None:
    """Draws a closed shape where all three corners are known, else a line between the known ones."""
    known = [(i, corner.place) for i, corner in enumerate(corners) if corner.place is not None]
    points = [_at(i, place) for i, place in known]
    if len(points) == len(corners):
        axes.fill(*zip(*points, strict=True), facecolor=colour, alpha=alpha, zorder=2)
        points.append(points[0])
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, marker="o", markersize=5, zorder=3)


def _write_values(axes: Axes, radar: Radar, theme: Theme) -> None:
    """Lists every system with its values, so that nothing has to be read off the triangle."""
    palette = colours_of(theme)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    size = "no batch size was measured for all" if radar.batch_size is None else f"batch {radar.batch_size}"
    scale = "fixed anchors" if radar.scale == "fixed" else "from worst to best of these"
    note = f"{size}, {scale}; outward is better"
    if any(_beyond(corner, ends) for _, row in radar.systems for corner, ends in _paired(row, radar)):
        note += "; *: beyond them"
    axes.text(0, 0.98, note, fontsize=8.5, color=theme.muted, va="top")
    # Four lines per system if there is room for them, else two.
    short = len(radar.systems) > _ROOMY
    step = min(0.27, 0.9 / max(1, len(radar.systems)))
    for number, (name, corners) in enumerate(radar.systems):
        top = 0.9 - step * number
        colour = palette[number % len(palette)]
        axes.text(0, top, name, fontsize=9.5, fontweight="bold", color=colour, va="top")
        lines = [
            f"{_TITLES[key].partition(chr(10))[0]}: {_labelled(key, corner, ends)}"
            for key, corner, ends in zip(radar.axes, corners, radar.anchors, strict=True)
        ]
        if short:
            lines = [", ".join(line.partition(": ")[2] for line in lines)]
        values = "\n".join(lines)
        axes.text(0, top - 0.048, values, fontsize=8.5, color=theme.text, va="top", linespacing=1.35)


def _paired(corners: Sequence[Corner], radar: Radar) -> list[tuple[Corner, Anchors]]:
    return list(zip(corners, radar.anchors, strict=True))


def _beyond(corner: Corner, ends: Anchors) -> bool:
    return corner.value is not None and not ends.covers(corner.value)


def _labelled(key: str, corner: Corner, ends: Anchors) -> str:
    if corner.value is None:
        return formats.NOT_MEASURED
    return shown(key, corner.value) + ("*" if _beyond(corner, ends) else "")


def shown(key: str, value: float) -> str:
    """Formats a value of an axis."""
    if key == "tpot_s":
        return duration(value)
    if key == "usd_per_mtok":
        return f"${value:.3g}"
    return formats.share(value) if key == "accuracy" else f"{value:.3g} bits/byte"
