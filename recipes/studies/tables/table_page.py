"""Comparison on a table: figures by router as text, JSON, a picture and one page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.studies.study_page import (
    Spread,
    cell,
    colour_of_row,
    draw_seeds,
    seeds_cell,
    spread,
    write_study_files,
)
from recipes.studies.tables.generate import TASKS
from recipes.studies.tables.table_runs import Experiment, final_runs
from recipes.tracking.report import formats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recipes.tracking.report.colours import Theme

#: The baseline that the others are compared with, seed by seed.
BASE = "topk"
_FIGURES = ("experts_per_example", "load_cv", "seconds")
_HEAD = (
    "router",
    "seeds",
    "lr",
    *TASKS,
    "mean",
    f"minus {BASE}",
    "experts per row",
    "experts in use",
    "load CV",
    "s per run",
)


@dataclass(frozen=True)
class TableResult:
    """One line of the table.

    Attributes:
        spec: The router with its options, as the user wrote it.
        seeds: Number of finished runs.
        missing: Number of the other runs.
        lr: The learning rate that validated best on seed 0; None while that is unknown.
        auc: Test AUC by task, and ``mean`` over tasks.
        over_base: Mean test AUC minus that of `BASE` on the same seed; None where there is none.
        figures: ``experts_per_example``, ``experts_in_use`` (by any row) and ``load_cv`` on the test split,
            mean over tasks; and ``seconds``.
    """

    spec: str
    seeds: int
    missing: int
    lr: float | None
    auc: Mapping[str, Spread]
    over_base: Spread | None
    figures: Mapping[str, Spread]


def collect(experiment: Experiment) -> list[TableResult]:
    """Returns a line for each spec, the best mean AUC first, those without a run last."""
    done = {spec: _done(experiment, spec) for spec in experiment.moes}
    results = [_result(experiment, spec, done[spec], done.get(BASE, {})) for spec in experiment.moes]
    return sorted(results, key=lambda r: -r.auc["mean"].mean if r.auc else 1.0)


def _done(experiment: Experiment, spec: str) -> dict[int, dict[str, Any]]:
    """Returns the results by seed."""
    found = {run.seed: run.result() for run in final_runs(experiment, spec)}
    return {seed: result for seed, result in found.items() if result is not None}


def _mean(result: dict[str, Any]) -> float:
    aucs: list[float] = result["test_auc"]
    return sum(aucs) / len(aucs)


def _result(
    experiment: Experiment, spec: str, own: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]
) -> TableResult:
    runs = final_runs(experiment, spec)
    auc = {}
    if own:
        auc = {task: spread([r["test_auc"][j] for r in own.values()]) for j, task in enumerate(TASKS)}
        auc["mean"] = spread([_mean(result) for result in own.values()])
    figures = {name: spread([r[name] for r in own.values()]) for name in _FIGURES} if own else {}
    if own:
        E = experiment.moes[spec].num_experts
        figures["experts_in_use"] = spread([E - r["dead_experts"] for r in own.values()])
    pairs = [] if spec == BASE else [_mean(own[s]) - _mean(base[s]) for s in own.keys() & base.keys()]
    return TableResult(
        spec=spec,
        seeds=len(own),
        missing=experiment.seeds - len(own),
        lr=runs[0].lr if runs else None,
        auc=auc,
        over_base=spread(pairs) if pairs else None,
        figures=figures,
    )


def table_rows(results: Sequence[TableResult]) -> list[list[str]]:
    """Returns the cells of every spec; empty where nothing was measured."""
    return [_row(result) for result in results]


def text_table(results: Sequence[TableResult]) -> str:
    """Returns the table for the terminal."""
    return formats.aligned(_HEAD, table_rows(results))


def _row(result: TableResult) -> list[str]:
    figures = result.figures
    return [
        result.spec,
        seeds_cell(result.seeds, result.missing),
        "" if result.lr is None else f"{result.lr:g}",
        *(cell(result.auc.get(name)) for name in (*TASKS, "mean")),
        cell(result.over_base, sign="+"),
        cell(figures.get("experts_per_example"), 2),
        cell(figures.get("experts_in_use"), 1),
        cell(figures.get("load_cv"), 2),
        "" if "seconds" not in figures else f"{figures['seconds'].mean:.0f}",
    ]


def plain(
    results: Sequence[TableResult], ceilings: Sequence[float], experiment: Experiment
) -> dict[str, Any]:
    """Returns everything as JSON."""
    return {
        "table": asdict(experiment.table),
        "model": asdict(experiment.model),
        "fit": asdict(experiment.fit),
        "learning_rates": list(experiment.lrs),
        "ceiling": dict(zip(TASKS, ceilings, strict=True)),
        "routers": [
            asdict(result) | {"mixture": experiment.settings(result.spec)["mixture"]} for result in results
        ],
    }


def ceiling_line(ceilings: Sequence[float]) -> str:
    """Returns the sentence that names the ceiling of each task."""
    shown = ", ".join(f"{task} {ceiling:.4f}" for task, ceiling in zip(TASKS, ceilings, strict=True))
    return f"test AUC of the true probabilities (the ceiling): {shown}"


def write_page(
    folder: Path, results: Sequence[TableResult], ceilings: Sequence[float], figures: Mapping[str, Any]
) -> Path:
    """Writes ``tables.json``, ``tables.png`` and ``tables.html``; returns the page's path.

    There is no picture while no run has finished.
    """
    from recipes.tracking.report.page import Section, draw_picture

    sections = [Section("Table", head=_HEAD, rows=table_rows(results), absent="")]
    if any(result.auc for result in results):
        text = "Test AUC of each task and experts used, by router"
        picture = draw_picture(lambda theme: draw(results, ceilings, theme), text, folder / "tables.png")
        sections.insert(0, Section("Test AUC", picture=picture))
    title = "Routers on a multi-task table"
    return write_study_files(folder, "tables", figures, title, [ceiling_line(ceilings)], sections)


def draw(results: Sequence[TableResult], ceilings: Sequence[float], theme: Theme) -> Figure:
    """Draws a panel for each task, and one for the experts used."""
    from recipes.tracking.report import canvas

    shown = [result for result in results if result.auc]
    figure = canvas.new_figure(1.25 + 0.3 * len(shown), theme)
    panels = figure.subplots(1, len(TASKS) + 1, sharey=True)
    for axes, task, ceiling in zip(panels, TASKS, ceilings, strict=False):
        canvas.style(axes, theme, x=f"test AUC, {task}")
        draw_seeds(axes, [(result.spec, result.auc[task]) for result in shown], BASE, theme)
        canvas.note(axes, f"Bar: mean. Ceiling: {ceiling:.3f}.", theme)
    canvas.style(panels[-1], theme, x="experts used")
    _experts(panels[-1], shown, theme)
    canvas.note(panels[-1], "Bar: by a row. Dot: by all.", theme)
    return figure


def _experts(axes: Axes, shown: Sequence[TableResult], theme: Theme) -> None:
    """Draws the mean number of experts that a row uses, and that any row uses."""
    for place, result in enumerate(reversed(shown)):
        colour = colour_of_row(result.spec, BASE, theme)
        a_row, by_any = (result.figures[name].mean for name in ("experts_per_example", "experts_in_use"))
        axes.plot([a_row, by_any], [place, place], "-", color=colour, linewidth=1.2, alpha=0.4)
        axes.plot([a_row], [place], "|", color=colour, markersize=15, markeredgewidth=2.2)
        axes.plot([by_any], [place], "o", color=colour, markersize=6.5)
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
