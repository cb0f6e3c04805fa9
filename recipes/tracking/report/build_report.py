"""Builds the report of a run: ``figures/*.png`` and one ``report.html`` that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from moe.errors import DataError
from recipes.runtime.run_file import METRICS_FILE
from recipes.tracking.bad_batch import FOLDER
from recipes.tracking.report import canvas, formats, hardware, sections
from recipes.tracking.report.certificates import CERTIFICATE_FILE, HEADER, read_certificates
from recipes.tracking.report.colours import LIGHT
from recipes.tracking.report.heatmap import load_figure
from recipes.tracking.report.loss_figures import balance_figure, loss_figure
from recipes.tracking.report.page import draw_picture, write_page
from recipes.tracking.report.results_table import header, read_results
from recipes.tracking.report.run_record import RunRecord, read_run

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
# File, heading, alternative text and function of each figure.
_FIGURES = (
    (
        "loss",
        "Loss",
        "Validation and training loss over tokens of the upcycled and the continued dense model.",
        loss_figure,
    ),
    (
        "load",
        "Load of the experts",
        "Load of every expert relative to the uniform load, over the steps, for each MoE layer.",
        lambda record, theme: load_figure(record.loads, theme),
    ),
    (
        "balance",
        "Balance",
        "MaxVio, coefficient of variation of the load, and router entropy over tokens.",
        balance_figure,
    ),
)


def build_report(run_dir: str | Path) -> Path:
    """Draws the figures of a run and writes its report; an unfinished run is reported as far as it came.

    Args:
        run_dir: The run directory.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: There is nothing to report, or a file of the run is damaged.
        DiskError: Something cannot be written.
    """
    record = read_run(run_dir)
    name = str(record.section("run").get("name") or record.run_dir.resolve().name)
    exactness, export = record.section("exactness"), record.section("export")
    results = read_results(record.summary)
    export_folder = record.run_dir / str(export.get("path") or "hf")
    certificates, fault = read_certificates(export_folder)
    return write_page(
        record.run_dir / REPORT_FILE,
        "report.html.j2",
        f"{name} - Graft",
        heading=name,
        meta=sections.meta(record),
        missing=sections.missing_parts(record),
        results=results,
        results_header=header(results),
        stages=sections.stage_rows(record),
        pictures=_pictures(record),
        routing=sections.routing(record),
        tail=formats.small(100 * sections.TAIL),
        throughput=sections.throughput(record),
        times=sections.times(record),
        training=hardware.training_rows(record),
        unmeasured=hardware.unmeasured(record),
        use=hardware.use(record),
        goodput=record.section("goodput"),
        guarded=sections.is_guarded(record),
        skipped=sections.skipped_rows(record),
        faults_folder=FOLDER,
        exactness=exactness,
        drifts=sections.drift_rows(exactness),
        export=export,
        export_folder=str(export_folder),
        rounding=sections.rounding(export),
        certificates=certificates,
        certificates_fault=fault and f"{CERTIFICATE_FILE} {fault}: certify the export again (graft certify).",
        certificates_header=HEADER,
        sample=sections.sample_text(export.get("sample")),
        config=record.config,
    )


def readme_figure(run_dir: str | Path, out_png: str | Path) -> Path:
    """Draws the loss curves of a run on their own, on white.

    Args:
        run_dir: The run directory.
        out_png: The PNG file to write.

    Raises:
        DataError: The run has no losses.
        DiskError: The file cannot be written.
    """
    figure = loss_figure(read_run(run_dir), LIGHT)
    if figure is None:
        rule, remedy = f"holds no loss in {METRICS_FILE}", "Give the directory of a run that has trained."
        raise DataError.one("run directory", str(run_dir), rule, remedy)
    canvas.write_png(figure, Path(out_png))
    return Path(out_png)


def _pictures(record: RunRecord) -> list[tuple[str, object]]:
    """Returns heading and picture of each figure; None for the picture of what was not logged."""
    folder = record.run_dir / FIGURES_FOLDER
    return [
        (heading, draw_picture(lambda theme, draw=draw: draw(record, theme), text, folder / f"{name}.png"))
        for name, heading, text, draw in _FIGURES
    ]
