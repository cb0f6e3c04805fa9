"""Comparison of routers as a table for the terminal, JSON, a picture, and one page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.studies.comparison.collect_runs import RouterResult
from recipes.studies.study_page import Spread, cell, draw_seeds, seeds_cell, write_study_files
from recipes.tracking.report import formats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recipes.tracking.report.colours import Theme

_BASE = "topk"
# Figure and digits of each column behind the loss, up to the time.
_FIGURES = (("maxvio", 3), ("load_cv", 3), ("dead_experts", 2), ("dropped_fraction", 3))
_HEAD = (
    *("router", "seeds", "val. loss", "MaxVio", "load CV", "dead experts", "unused slots"),
    *("step vs. top-k", "train/eval agreement"),
)
_NOTE = (
    "Mean over seeds, with the sample standard deviation behind +-. MaxVio, load CV, dead experts and "
    "unused slots are means over layers and the last tenth of the steps. The time of a step is the median of "
    "its run; runs follow one another, so small differences come from the machine."
)


def table_rows(results: Sequence[RouterResult]) -> list[list[str]]:
    """Returns the cells of every router; empty where nothing was measured."""
    base = next((r.figures.get("step_s") for r in results if r.router == _BASE), None)
    return [_row(result, base) for result in results]


def _row(result: RouterResult, base: Spread | None) -> list[str]:
    figures, step = result.figures, result.figures.get("step_s")
    return [
        result.router,
        seeds_cell(result.seeds, result.failed),
        cell(result.val_loss),
        *(cell(figures.get(name), digits) for name, digits in _FIGURES),
        f"{step.mean / base.mean:.2f}" if step and base else "",
        cell(figures.get("choice_agreement"), 3),
    ]


def text_table(results: Sequence[RouterResult]) -> str:
    """Returns the table for the terminal."""
    return formats.aligned(_HEAD, table_rows(results))


def write_page(folder: Path, results: Sequence[RouterResult], description: str) -> Path:
    """Writes ``comparison.json``, ``comparison.png`` and ``comparison.html``; returns the page's path."""
    from recipes.tracking.report.page import Section, draw_picture

    sections = [Section("Table", head=_HEAD, rows=table_rows(results), notes=[_NOTE])]
    if any(result.val_loss for result in results):
        name, text = folder / "comparison.png", "Validation loss by router"
        picture = draw_picture(lambda theme: draw(results, theme), text, name)
        sections.insert(0, Section("Validation loss", picture=picture))
    figures = {"description": description, "routers": [asdict(result) for result in results]}
    return write_study_files(folder, "comparison", figures, "Routers compared", [description], sections)


def draw(results: Sequence[RouterResult], theme: Theme) -> Figure:
    """Draws a line for each router, the best on top."""
    from recipes.tracking.report import canvas

    rows = [(result.router, result.val_loss) for result in results if result.val_loss is not None]
    figure = canvas.new_figure(1.2 + 0.34 * len(rows), theme)
    axes = figure.add_subplot()
    canvas.style(axes, theme, x="validation loss (nats/token)")
    draw_seeds(axes, rows, _BASE, theme)
    canvas.note(axes, "Dot: a seed. Bar: mean.", theme)
    return figure
