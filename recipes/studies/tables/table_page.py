"""A comparison on a table: figures by router, as text, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.runtime.atomic import atomic_write_json, write_synced
from recipes.studies.comparison.collect_runs import Spread, spread
from recipes.studies.tables.generate import TASKS
from recipes.studies.tables.table_runs import Experiment, final_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recipes.tracking.report.colours import Theme

#: What the others are compared with, seed by seed.
BASE = "topk"
_FIGURES = ("experts_per_example", "load_cv", "seconds")
_HEAD = (
    "router",
    "seeds",
    "lr",
    *TASKS,
    "mean",
    f"minus {BASE}",
    "experts a row",
    "experts in use",
    "load CV",
    "s a run",
)


@dataclass(frozen=True)
class TableResult:
    """A line of the table.

    Attributes:
        spec: What routes.
        seeds: Runs that came to their end.
        missing: Runs that did not.
        lr: The learning rate that validated best on seed 0; None while that is not known.
        auc: Test AUC by task, and ``mean`` over tasks.
        over_base: Mean test AUC less that of `BASE` on the same seed; None where there is none.
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
    """A line for each spec, the best mean AUC first, those without a run at the end."""
    done = {spec: _done(experiment, spec) for spec in experiment.mixtures}
    results = [_result(experiment, spec, done[spec], done.get(BASE, {})) for spec in experiment.mixtures]
    return sorted(results, key=lambda r: -r.auc["mean"].mean if r.auc else 1.0)


def _done(experiment: Experiment, spec: str) -> dict[int, dict[str, Any]]:
    """Results by seed."""
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
        E = experiment.mixtures[spec].num_experts
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


def text_table(results: Sequence[TableResult]) -> str:
    """Aligned columns for the terminal."""
    lines = [_HEAD, *(_row(result) for result in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    shown = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def _row(result: TableResult) -> tuple[str, ...]:
    figures = result.figures
    return (
        result.spec,
        f"{result.seeds}" + (f" ({result.missing} not done)" if result.missing else ""),
        "" if result.lr is None else f"{result.lr:g}",
        *(_cell(result.auc.get(name), 4) for name in (*TASKS, "mean")),
        _cell(result.over_base, 4, "+"),
        _cell(figures.get("experts_per_example"), 2),
        _cell(figures.get("experts_in_use"), 1),
        _cell(figures.get("load_cv"), 2),
        "" if "seconds" not in figures else f"{figures['seconds'].mean:.0f}",
    )


def _cell(value: Spread | None, digits: int, sign: str = "") -> str:
    if value is None:
        return ""
    text = f"{value.mean:{sign}.{digits}f}"
    return text if value.deviation is None else f"{text} +-{value.deviation:.{digits}f}"


def plain(
    results: Sequence[TableResult], ceilings: Sequence[float], experiment: Experiment
) -> dict[str, Any]:
    """Everything as JSON."""
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


def write_figures(folder: Path, figures: Mapping[str, Any]) -> Path:
    """Writes ``tables.json``; returns its path."""
    path = folder / "tables.json"
    atomic_write_json(path, figures)
    return path


def write_picture(folder: Path, results: Sequence[TableResult], ceilings: Sequence[float]) -> Path | None:
    """Writes ``tables.png`` and returns its path; None where there is nothing to draw."""
    from recipes.tracking.report import canvas
    from recipes.tracking.report.colours import LIGHT

    if not any(result.auc for result in results):
        return None
    data = canvas.png(draw(results, ceilings, LIGHT))
    path = folder / "tables.png"
    temporary = path.with_name(f".tmp-{path.name}")
    write_synced(temporary, data)
    temporary.replace(path)
    return path


def draw(results: Sequence[TableResult], ceilings: Sequence[float], theme: Theme) -> Figure:
    """A panel a task, a dot for every seed and a bar at the mean; and one for the experts used."""
    from recipes.tracking.report import canvas

    shown = [result for result in results if result.auc]
    figure = canvas.new_figure(1.25 + 0.3 * len(shown), theme)
    panels = figure.subplots(1, len(TASKS) + 1, sharey=True)
    for axes, task, ceiling in zip(panels, TASKS, ceilings, strict=False):
        canvas.style(axes, theme, x=f"test AUC, {task}")
        _dots(axes, shown, [result.auc[task] for result in shown], theme)
        canvas.note(axes, f"Bar: mean. Ceiling: {ceiling:.3f}.", theme)
    canvas.style(panels[-1], theme, x="experts used")
    _experts(panels[-1], shown, theme)
    canvas.note(panels[-1], "Bar: by a row. Dot: by all.", theme)
    panels[0].set_yticks(range(len(shown)), [result.spec for result in reversed(shown)])
    panels[0].set_ylim(-0.6, len(shown) - 0.4)
    return figure


def _dots(axes: Axes, shown: Sequence[TableResult], values: Sequence[Spread], theme: Theme) -> None:
    for place, (result, value) in enumerate(zip(reversed(shown), reversed(values), strict=True)):
        colour = theme.of("cpt") if result.spec == BASE else theme.of("moe")
        axes.plot(value.values, [place] * len(value.values), "o", color=colour, markersize=4.5, alpha=0.6)
        axes.plot([value.mean], [place], "|", color=colour, markersize=15, markeredgewidth=2.2)


def _experts(axes: Axes, shown: Sequence[TableResult], theme: Theme) -> None:
    """Means: how many experts a row uses, and how many are used at all."""
    for place, result in enumerate(reversed(shown)):
        colour = theme.of("cpt") if result.spec == BASE else theme.of("moe")
        a_row, by_any = (result.figures[name].mean for name in ("experts_per_example", "experts_in_use"))
        axes.plot([a_row, by_any], [place, place], "-", color=colour, linewidth=1.2, alpha=0.4)
        axes.plot([a_row], [place], "|", color=colour, markersize=15, markeredgewidth=2.2)
        axes.plot([by_any], [place], "o", color=colour, markersize=6.5)
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
