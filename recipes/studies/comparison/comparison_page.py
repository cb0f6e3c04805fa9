"""A comparison as a table for the terminal, figures as JSON, a picture, and one page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.runtime.atomic import atomic_write_json, atomic_write_text
from recipes.studies.comparison.collect_runs import RouterResult, Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recipes.tracking.report.colours import Theme

_BASE = "topk"
_HEAD = (
    "router",
    "seeds",
    "val. loss",
    "MaxVio",
    "load CV",
    "dead experts",
    "unused slots",
    "step vs. top-k",
    "train/eval agreement",
)
_NOTE = (
    "Mean over seeds, with the sample standard deviation behind +-. MaxVio, load CV, dead experts and "
    "unused slots are means over layers and the last tenth of the steps. A step's time is the median of its "
    "run; runs follow one another, so that small differences are the machine's."
)


def table_rows(results: Sequence[RouterResult]) -> list[list[str]]:
    """The cells of every router; empty where nothing was measured."""
    base = next((r.figures.get("step_s") for r in results if r.router == _BASE), None)
    return [_row(result, base) for result in results]


def _row(result: RouterResult, base: Spread | None) -> list[str]:
    figures = result.figures
    step = figures.get("step_s")
    seeds = f"{result.seeds}" + (f" ({result.failed} not done)" if result.failed else "")
    return [
        result.router,
        seeds,
        _cell(result.val_loss, 4),
        _cell(figures.get("maxvio"), 3),
        _cell(figures.get("load_cv"), 3),
        _cell(figures.get("dead_experts"), 2),
        _cell(figures.get("dropped_fraction"), 3),
        f"{step.mean / base.mean:.2f}" if step and base else "",
        _cell(figures.get("choice_agreement"), 3),
    ]


def _cell(value: Spread | None, digits: int) -> str:
    if value is None:
        return ""
    text = f"{value.mean:.{digits}f}"
    return text if value.deviation is None else f"{text} +-{value.deviation:.{digits}f}"


def text_table(results: Sequence[RouterResult]) -> str:
    """Aligned columns for the terminal."""
    lines = [list(_HEAD), *table_rows(results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    shown = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def write_page(folder: Path, results: Sequence[RouterResult], description: str) -> Path:
    """Writes ``comparison.json``, ``comparison.png`` and ``comparison.html``; returns the page's path."""
    from recipes.tracking.report import canvas, html
    from recipes.tracking.report.colours import DARK, LIGHT

    atomic_write_json(folder / "comparison.json", {"description": description, "routers": _plain(results)})
    body = [html.title("Routers compared"), html.paragraph(description)]
    if any(result.val_loss for result in results):
        light, dark = (canvas.png(draw(results, theme)) for theme in (LIGHT, DARK))
        (folder / "comparison.png").write_bytes(light)
        body += [
            html.heading("Validation loss"),
            html.figure(html.Picture(light, dark, "Validation loss by router")),
        ]
    body += [
        html.heading("Table"),
        html.table(_HEAD, table_rows(results), "not measured"),
        html.paragraph(_NOTE, "note"),
    ]
    path = folder / "comparison.html"
    atomic_write_text(path, html.page("Routers compared", body))
    return path


def _plain(results: Sequence[RouterResult]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]


def draw(results: Sequence[RouterResult], theme: Theme) -> Figure:
    """A dot for every seed and a bar at the mean, a line for each router, the best on top."""
    from recipes.tracking.report import canvas

    shown = [result for result in results if result.val_loss is not None]
    figure = canvas.new_figure(1.2 + 0.34 * len(shown), theme)
    axes = figure.add_subplot()
    canvas.style(axes, theme, x="validation loss (nats/token)")
    for place, result in enumerate(reversed(shown)):
        assert result.val_loss is not None
        colour = theme.of("cpt") if result.router == _BASE else theme.of("moe")
        values = result.val_loss.values
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=4.5, alpha=0.6)
        axes.plot([result.val_loss.mean], [place], "|", color=colour, markersize=15, markeredgewidth=2.2)
    axes.set_yticks(range(len(shown)), [result.router for result in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    canvas.note(axes, "Dot: a seed. Bar: mean.", theme)
    return figure
