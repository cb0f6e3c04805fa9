"""The two stages of a run, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.tracking.report import formats, html
from recipes.tracking.report.formats import NOT_MEASURED, number
from recipes.tracking.report.run_record import RunRecord

_HEAD = [
    "stage",
    "data",
    "steps",
    "tokens",
    "learning rate",
    "val. loss before",
    "after",
    "stage 1's data, after stage 2",
]


def stages(record: RunRecord) -> list[str]:
    """A row a stage, each validated on its own data; nothing for other runs."""
    rows = [_row(stage) for stage in record.summary.get("stages", []) if isinstance(stage, Mapping)]
    if not rows:
        return []
    text = (
        "Each stage is validated on data of its own; the table of results has all models on the second "
        "stage's. The last column is what the second stage has done to the first one's data."
    )
    table = html.table(_HEAD, rows, NOT_MEASURED)
    return [html.heading("The two stages"), html.paragraph(text, "note"), table]


def _row(stage: Mapping[str, Any]) -> list[str]:
    data = stage.get("data")
    after = number(stage.get("val_loss_stage1"))
    return [
        str(stage.get("stage", "?")),
        ", ".join(map(str, data)) if isinstance(data, list) else str(data),
        formats.count(number(stage.get("steps"))),
        formats.count(number(stage.get("tokens"))),
        formats.small(number(stage.get("lr"))),
        formats.loss(number(stage.get("val_loss_before"))),
        formats.loss(number(stage.get("val_loss"))),
        "-" if after is None else formats.loss(after),
    ]
