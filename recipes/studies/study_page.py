"""Figures over seeds, and the page, JSON and picture in which every study shows them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.runtime.atomic import atomic_write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from recipes.tracking.report.colours import Theme
    from recipes.tracking.report.page import Section


@dataclass(frozen=True)
class Spread:
    """Figure over seeds.

    Attributes:
        mean: Mean over the seeds.
        deviation: Sample standard deviation; None with one seed.
        values: Value of each seed.
    """

    mean: float
    deviation: float | None
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Returns mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, tuple(values))


def cell(value: Spread | None, digits: int = 4, sign: str = "") -> str:
    """Formats a figure for a table; empty where it was not measured."""
    if value is None:
        return ""
    text = f"{value.mean:{sign}.{digits}f}"
    return text if value.deviation is None else f"{text} +-{value.deviation:.{digits}f}"


def seeds_cell(seeds: int, missing: int) -> str:
    """Formats the number of finished runs, and of those that are not done."""
    return f"{seeds}" + (f" ({missing} not done)" if missing else "")


def write_study_files(
    folder: Path, name: str, figures: Mapping[str, Any], title: str, introduction: Sequence[str],
    sections: Sequence[Section],
) -> Path:  # fmt: skip
    """Writes ``name.json`` and ``name.html``; returns the path of the page."""
    from recipes.tracking.report.page import write_study

    atomic_write_json(folder / f"{name}.json", figures)
    return write_study(folder / f"{name}.html", title, introduction, sections)


def draw_seeds(axes: Axes, rows: Sequence[tuple[str, Spread]], base: str, theme: Theme) -> None:
    """Draws a dot for every seed and a bar at the mean, the first row on top; ``base`` has its own colour."""
    for place, (name, value) in enumerate(reversed(rows)):
        colour = colour_of_row(name, base, theme)
        axes.plot(value.values, [place] * len(value.values), "o", color=colour, markersize=4.5, alpha=0.6)
        axes.plot([value.mean], [place], "|", color=colour, markersize=15, markeredgewidth=2.2)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)


def colour_of_row(name: str, base: str, theme: Theme) -> str:
    """Returns the colour of a router: the baseline's, or that of all others."""
    return theme.of("cpt") if name == base else theme.of("moe")
