"""Rows and facts of the report's sections, as plain text for the template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from recipes.runtime.run_file import METRICS_FILE
from recipes.tracking.report import formats
from recipes.tracking.report.formats import NOT_MEASURED, number
from recipes.tracking.report.results_table import MODELS, find, missing, read_results
from recipes.tracking.report.run_record import CONFIG_FILE, SUMMARY_FILE, Row, RunRecord, section, series

_ROUTING = (
    ("maxvio", "MaxVio (largest load / mean - 1)", formats.small),
    ("load_cv", "load CV (standard deviation / mean)", formats.small),
    ("entropy", "router entropy (1 = ln E, uniform)", formats.small),
    ("dead_experts", "experts of a layer without a token", formats.small),
    ("dropped_fraction", "routed slots that were dropped", formats.share),
    ("logit_max", "largest router logit", formats.small),
)
TAIL = 0.1
"""Share of a run's steps, at its end, over which the routing is averaged."""
_STEPS_SHOWN = 12


def meta(record: RunRecord) -> list[str]:
    """Returns recipe, start and duration of a run, as far as they are known."""
    run = record.section("run")
    started, lasted = number(run.get("started")), number(run.get("seconds"))
    parts = [f"recipe {run['recipe']}"] if run.get("recipe") else []
    if started is not None:
        parts.append(f"started {datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC")
    return parts if lasted is None else [*parts, f"took {formats.seconds(lasted)}"]


def missing_parts(record: RunRecord) -> list[str]:
    """Lists the parts of a complete run directory that this one lacks."""
    gone = []
    if not record.summary:
        gone.append(f"{SUMMARY_FILE}: the run has not come to its end, or was stopped")
    else:
        parts = [name for name in ("exactness", "export") if not record.section(name)]
        gone += missing(read_results(record.summary))
        gone += [f"{name} (in {SUMMARY_FILE})" for name in parts]
    if not record.stages:
        gone.append(f"{METRICS_FILE}: no row, so there are no curves")
    elif not record.loads:
        gone.append("load of the experts over time")
    return gone if record.config is not None else [*gone, f"{CONFIG_FILE}: the configuration"]


def stage_rows(record: RunRecord) -> list[list[str]]:
    """Returns a row for each stage of a two-stage run, each validated on its own data; else nothing."""
    return [_stage_row(stage) for stage in record.summary.get("stages", []) if isinstance(stage, Mapping)]


def _stage_row(stage: Mapping[str, Any]) -> list[str]:
    data, after = stage.get("data"), number(stage.get("val_loss_stage1"))
    return [
        str(stage.get("stage", "?")),
        ", ".join(map(str, data)) if isinstance(data, list) else str(data),
        formats.count(stage.get("steps")),
        formats.count(stage.get("tokens")),
        formats.small(stage.get("lr")),
        formats.loss(stage.get("val_loss_before")),
        formats.loss(stage.get("val_loss")),
        "-" if after is None else formats.loss(after),
    ]


def routing(record: RunRecord) -> list[tuple[str, str]]:
    """Returns the router's figures as means over the last `TAIL` of the logged steps."""
    pairs = []
    for name, label, show in _ROUTING:
        _, values = series(record.stages.get("moe", ()), f"router/{name}")
        if values.size:
            pairs.append((label, show(float(values[-max(1, round(TAIL * values.size)) :].mean()))))
    return pairs


def throughput(record: RunRecord) -> list[list[str]]:
    """Returns steps, speed, utilisation and time of each stage."""
    timings, found = record.section("timings"), read_results(record.summary)
    known = [m for m in MODELS if m in record.stages or number(timings.get(f"{m}_s")) is not None]
    rows = []
    for stage in known:
        logged = record.stages.get(stage, ())
        steps = [row["step"] for row in logged if number(row.get("step")) is not None]
        result = find(found, stage)
        rows.append(
            [
                "Dense (its own training)" if stage == "dense" else result.label,
                formats.count(max(steps, default=None)),
                formats.count(result.tokens_per_s or _median(logged, "tokens_per_s")),
                formats.share(_median(logged, "mfu")),
                formats.seconds(timings.get(f"{stage}_s")),
            ]
        )
    return rows


def times(record: RunRecord) -> list[tuple[str, str]]:
    """Returns times, memory and machine of the whole run."""
    timings, backend = record.section("timings"), record.section("experts")
    total = timings.get("total_s", record.section("run").get("seconds"))
    facts = [
        ("from start to the end of the first step", formats.seconds(timings.get("first_step_s"))),
        ("the whole run", formats.seconds(total)),
        ("peak memory, all ranks", formats.size(record.summary.get("peak_memory_bytes"))),
        *((str(key), _text(value)) for key, value in record.section("machine").items()),
    ]
    if backend:
        facts.append(("expert kernels", f"{backend.get('backend')}: {backend.get('reason')}"))
    return facts


def is_guarded(record: RunRecord) -> bool:
    """Returns True where steps of the run were guarded; older runs have no such rows."""
    return any("skipped_steps" in row for rows in record.stages.values() for row in rows)


def skipped_rows(record: RunRecord) -> list[list[str]]:
    """Returns a row for each stage in which steps were skipped."""
    results = read_results(record.summary)
    return [
        [find(results, stage).label, *_skipped(rows)]
        for stage, rows in record.stages.items()
        if any(row.get("skipped") for row in rows)
    ]


def _skipped(rows: Sequence[Row]) -> list[str]:
    skipped = [row for row in rows if row.get("skipped")]
    bad = [row for row in skipped if number(row.get("loss")) is None or number(row.get("grad_norm")) is None]
    at = ", ".join(formats.count(row.get("step")) for row in skipped[:_STEPS_SHOWN])
    back = ", ".join(formats.count(row["went_back_to"]) for row in rows if "went_back_to" in row)
    counts = [formats.count(n) for n in (len(skipped), len(bad), len(skipped) - len(bad))]
    return [*counts, at + (" ..." if len(skipped) > _STEPS_SHOWN else ""), back or "-"]


def drift_rows(exactness: Mapping[str, Any]) -> list[list[str]]:
    """Returns the drift of each layer under a method that is not exact."""
    if exactness.get("claimed_exact") is True:
        return []
    keys = ("relative_error", "cosine", "gain", "load_entropy")
    return [
        [str(row.get("layer")), *(formats.decimal(row.get(key)) for key in keys)]
        for row in exactness.get("layers") or ()
    ]


def rounding(export: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what the dtype of the exported files costs; empty for fp32, and where it was not measured."""
    cost = section(export, "rounding")
    if not cost:
        return []
    left = section(cost, "survival")
    besides = f"; {left['left_out']}" if left.get("left_out") else ""
    return [
        ("dtype of the files", str(cost.get("dtype"))),
        ("weights that training changed", formats.count(left.get("changed"))),
        ("share of them that survives rounding", formats.share(left.get("survived")) + besides),
        ("loss before and after rounding", " and ".join(map(formats.loss, _losses(cost)))),
        ("KL divergence (nats/token)", formats.small(cost.get("kl"))),
        ("expert choices that change", formats.share(cost.get("choices_changed"))),
    ]


def _losses(cost: Mapping[str, Any]) -> tuple[Any, Any]:
    return cost.get("loss_trained"), cost.get("loss_rounded")


def sample_text(sample: Any) -> str:
    """Returns the text of a generated sample, which is JSON with ``prompt`` and ``text``, or plain."""
    if not isinstance(sample, str):
        return ""
    try:
        content = json.loads(sample)
    except ValueError:
        return sample
    return str(section({"sample": content}, "sample").get("text", "")) or sample


def _median(rows: Sequence[Row], name: str) -> float | None:
    _, values = series(rows, name)
    return float(np.median(values)) if values.size else None


def _text(value: Any) -> str:
    """Returns a value of the section ``machine`` as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return NOT_MEASURED if value is None else str(value)
