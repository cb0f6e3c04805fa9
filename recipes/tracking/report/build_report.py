"""Builds the report of a run: ``figures/*.png`` and one ``report.html`` that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import DataError, DiskError
from recipes.runtime.atomic import atomic_write_text, disk_mistake, write_synced
from recipes.tracking.metrics_log import METRICS_FILE
from recipes.tracking.report import canvas, html, sections
from recipes.tracking.report.colours import DARK, LIGHT, Theme
from recipes.tracking.report.faults_section import faults
from recipes.tracking.report.hardware import hardware
from recipes.tracking.report.heatmap import load_figure
from recipes.tracking.report.loss_figures import balance_figure, loss_figure
from recipes.tracking.report.run_record import RunRecord, read_run
from recipes.tracking.report.two_stage_section import stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
_LOSS = "Validation and training loss over tokens of the upcycled model and of the dense model trained on."
_LOAD = "Load of every expert relative to the uniform load, over the steps, for each MoE layer."
_BALANCE = "MaxVio, coefficient of variation of the load, and router entropy over tokens."


def build_report(run_dir: str | Path) -> Path:
    """Draws the figures of a run and writes its report; of an unfinished run, what there is.

    Args:
        run_dir: The run directory.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: There is nothing to report, or a file of the run is damaged.
        DiskError: Something cannot be written.
    """
    record = read_run(run_dir)
    loss = _picture(record, "loss", loss_figure, _LOSS)
    load = _picture(record, "load", lambda r, theme: load_figure(r.loads, theme), _LOAD)
    balance = _picture(record, "balance", balance_figure, _BALANCE)
    body = [
        *sections.introduction(record),
        *sections.results(record),
        *stages(record),
        *_shown("Loss", loss),
        *_shown("Load of the experts", load),
        *_shown("Balance", balance),
        *sections.routing(record),
        *sections.throughput(record),
        *hardware(record),
        *faults(record),
        *sections.exactness(record),
        *sections.export(record),
        *sections.configuration(record),
    ]
    name = str(record.section("run").get("name") or record.run_dir.resolve().name)
    path = record.run_dir / REPORT_FILE
    atomic_write_text(path, html.page(f"{name} - Graft", body))
    return path


def readme_figure(run_dir: str | Path, out_png: str | Path) -> Path:
    """Draws the loss curves of a run on their own, on white.

    Args:
        run_dir: The run directory.
        out_png: Where to write the PNG file.

    Raises:
        DataError: The run has no losses.
        DiskError: It cannot be written.
    """
    record = read_run(run_dir)
    figure = loss_figure(record, LIGHT)
    if figure is None:
        rule = f"holds no loss in {METRICS_FILE}"
        raise DataError.one(
            "run directory", str(run_dir), rule, "Give the directory of a run that has trained."
        )
    return _write(Path(out_png), canvas.png(figure))


def _picture(
    record: RunRecord, name: str, draw: Callable[[RunRecord, Theme], Figure | None], alternative: str
) -> html.Picture | None:
    """Draws a figure in both themes and writes the light one to the run's figures."""
    figure, dark = draw(record, LIGHT), draw(record, DARK)
    if figure is None or dark is None:
        return None
    light = canvas.png(figure)
    _write(record.run_dir / FIGURES_FOLDER / f"{name}.png", light)
    return html.Picture(light, canvas.png(dark), alternative)


def _shown(heading: str, picture: html.Picture | None) -> list[str]:
    return [] if picture is None else [html.heading(heading), html.figure(picture)]


def _write(path: Path, data: bytes) -> Path:
    """Writes a file in one step."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(temporary, data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DiskError([disk_mistake(path, error)]) from error
    return path
