"""What went wrong in a run and what became of it: steps that were skipped, and processes that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.tracking.bad_batch import FOLDER
from recipes.tracking.report import formats, html
from recipes.tracking.report.formats import NOT_MEASURED, number
from recipes.tracking.report.results_table import find, read_results
from recipes.tracking.report.run_record import RunRecord

_STEPS_SHOWN = 12
_RECOVERY = (
    "A recovery lasts from the last step before a process failed to the first step after it: the time of "
    "torchrun, the start of Python, building the model and reading the checkpoint."
)


def faults(record: RunRecord) -> list[str]:
    """The section; nothing for runs that were made before steps were guarded."""
    stages = {
        stage: rows for stage, rows in record.stages.items() if any("skipped_steps" in row for row in rows)
    }
    goodput = record.section("goodput")
    recoveries = number(goodput.get("recoveries"))
    if not stages and recoveries is None:
        return []
    table = [cells for stage, rows in stages.items() for cells in _skipped(record, stage, rows)]
    pieces = [html.heading("Faults")]
    if table:
        head = ["training of", "steps skipped", "of them not finite", "spikes", "at", "gone back to"]
        pieces.append(html.table(head, table, NOT_MEASURED))
        text = f"The samples of steps that were not finite are listed in {FOLDER}/."
        pieces.append(html.paragraph(text, "note"))
    elif stages:
        pieces.append(html.paragraph("No step was skipped: every loss and gradient was finite.", "note"))
    if recoveries:
        pieces += [html.paragraph(_RECOVERY, "note"), html.facts(_recoveries(goodput), NOT_MEASURED)]
    elif recoveries is not None:
        pieces.append(html.paragraph("No process of the run failed.", "note"))
    return pieces


def _skipped(record: RunRecord, stage: str, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The row of a leg in which steps were skipped."""
    skipped = [row for row in rows if row.get("skipped")]
    if not skipped:
        return []
    bad = [row for row in skipped if number(row.get("loss")) is None or number(row.get("grad_norm")) is None]
    at = ", ".join(formats.count(row.get("step")) for row in skipped[:_STEPS_SHOWN])
    back = ", ".join(formats.count(row["went_back_to"]) for row in rows if "went_back_to" in row)
    return [
        [
            find(read_results(record.summary), stage).label,
            formats.count(len(skipped)),
            formats.count(len(bad)),
            formats.count(len(skipped) - len(bad)),
            at + (" ..." if len(skipped) > _STEPS_SHOWN else ""),
            back or "-",
        ]
    ]


def _recoveries(goodput: Mapping[str, Any]) -> list[tuple[str, str]]:
    count, total = goodput["recoveries"], goodput.get("recovery_s", 0.0)
    return [
        ("failures that the run recovered from", formats.count(count)),
        ("recovery, mean", formats.seconds(total / count)),
        ("recovery, longest", formats.seconds(goodput.get("recovery_worst_s"))),
    ]
