"""Writes a report as files: figures as JSON, two pictures, and one page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.cap.cap_curves import curves_figure
from recipes.cap.cap_table import (
    ABSENT,
    ACCURACY_HEAD,
    EFFICIENCY_HEAD,
    HARNESS_HEAD,
    HEAD,
    NOTE,
    accuracy_rows,
    efficiency_rows,
    harness_rows,
    peak_lines,
    remarks_of,
    table_rows,
)
from recipes.cap.radar import Radar, draw_radar
from recipes.runtime.atomic import atomic_write_json
from recipes.tracking.report import formats
from recipes.tracking.report.page import Section, draw_picture, write_study

JSON_NAME, PAGE_NAME, CURVES_NAME, RADAR_NAME = "cap.json", "cap.html", "curves.png", "radar.png"
_MEANING = (
    "S-MBU: bytes of the weights that the batch touches and of the cache, over what memory could move in "
    "that time. S-MFU: FLOPs that the tokens need, over what the device could do. Both are ratios of sums "
    "over all timed passes. MBU counts every expert as read. What was not measured is left out, never 0."
)
_EFFICIENCY = (
    "After arXiv 2505.13840, equations 1 to 9. AMU: memory in use over all there is, mean over time. PCU: "
    "FLOPs that the tokens need over the peak, prefill included. AL: mean time of a request. IT: tokens "
    "written per second. AEC: mean power. MCR: times smaller than the first system, times the share of its "
    "accuracy that is kept. TT and ST are of training."
)
Figures = Mapping[str, Any]


def write_report(folder: Path, report: Figures, radar: Radar) -> Path:
    """Writes ``cap.json``, ``curves.png``, ``radar.png`` and ``cap.html``; returns the page's path.

    There are no curves where no utilisation is known.
    """
    atomic_write_json(folder / JSON_NAME, report)
    corners, batches = (
        "Radar of cost, accuracy and performance",
        "S-MBU and S-MFU against batch size, and the roofline",
    )
    triangle = draw_picture(lambda theme: draw_radar(radar, theme), corners, folder / RADAR_NAME)
    curves = draw_picture(lambda theme: curves_figure(report, theme), batches, folder / CURVES_NAME)
    device, *peaks = peak_lines(report)
    accuracy, harness, remarks = accuracy_rows(report), harness_rows(report), remarks_of(report)
    sections = [
        Section(bullets=peaks),
        Section("Cost, accuracy, performance", picture=triangle),
        Section("Against batch size", picture=curves) if curves else Section(),
        Section("Table", head=HEAD, rows=table_rows(report), notes=[NOTE], absent=ABSENT),
        Section("Accuracy" if accuracy else "", head=ACCURACY_HEAD, rows=accuracy, absent=ABSENT),
        Section(head=HARNESS_HEAD, rows=harness, absent=ABSENT),
        Section(
            "EfficientLLM's metrics",
            head=EFFICIENCY_HEAD,
            rows=efficiency_rows(report),
            notes=[_EFFICIENCY],
            absent=ABSENT,
        ),
        Section("Remarks" if remarks else "", bullets=remarks, notes=[_MEANING]),
        Section("Conditions", facts=_facts(report), absent=ABSENT),
    ]
    return write_study(folder / PAGE_NAME, "Use of the hardware", [device], sections)


def _facts(report: Figures) -> list[tuple[str, str]]:
    work, costs = report["workload"], report["cost_assumptions"]
    rows = [(name.replace("_", " "), _plain(value)) for name, value in report["environment"].items()]
    rows += [
        ("workload", f"prompts of {work['prompt']} tokens, {work['new']} written, {work['rounds']} rounds"),
        ("text", str(work["text"])),
        ("price", f"{_plain(costs['price_usd'])} ({costs['price_source']})"),
        ("power without a meter", f"{_plain(costs['power_watts'])} ({costs['power_source']})"),
        ("$/kWh", f"{costs['usd_per_kwh']} ({costs['kwh_source']})"),
        ("PUE, life, busy", f"{costs['pue']}, {costs['life_years']} years, {formats.share(costs['busy'])}"),
    ]
    for system in report["systems"]:
        experts = f"{system['mixtures']} MoE layers" if system["mixtures"] else "dense"
        parameters = "unknown" if system["parameters"] is None else formats.count(system["parameters"])
        rows.append(
            (
                system["name"],
                f"{system['model_type']}, {parameters} parameters, {experts}, {system['folder']}",
            )
        )
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return ABSENT
    return ", ".join(f"{part:g}" for part in value) if isinstance(value, list) else str(value)
