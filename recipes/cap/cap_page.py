"""A report as files: figures as JSON, two pictures, and one page that opens offline."""

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
from recipes.runtime.atomic import atomic_write_json, atomic_write_text, write_synced
from recipes.tracking.report import canvas, formats, html
from recipes.tracking.report.colours import DARK, LIGHT

JSON_NAME, PAGE_NAME, CURVES_NAME, RADAR_NAME = "cap.json", "cap.html", "curves.png", "radar.png"
_MEANING = (
    "S-MBU: bytes of the weights that the batch touches and of the cache, over what memory could move in "
    "that time. S-MFU: FLOPs that the tokens need, over what the device could do. Both are ratios of sums "
    "over all timed passes. MBU counts every expert as read. What was not measured is left out, never 0."
)
_EFFICIENCY = (
    "After arXiv 2505.13840, equations 1 to 9. AMU: memory in use over all there is, mean over time. PCU: "
    "FLOPs that the tokens need over the peak, prefill included. AL: mean time of a request. IT: tokens "
    "written a second. AEC: mean power. MCR: times smaller than the first system, times the share of its "
    "accuracy that is kept. TT and ST are of training."
)
Figures = Mapping[str, Any]


def write_report(folder: Path, report: Figures, radar: Radar) -> Path:
    """Writes ``cap.json``, ``curves.png``, ``radar.png`` and ``cap.html``; returns the page's path.

    There are no curves where no utilisation is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / JSON_NAME, report)
    body = [
        html.title("What it uses of the hardware"),
        html.paragraph("; ".join(peak_lines(report)[:1]), "meta"),
        html.bullets(peak_lines(report)[1:]),
        html.heading("Cost, accuracy, performance"),
    ]
    pictures = {RADAR_NAME: [canvas.png(draw_radar(radar, theme)) for theme in (LIGHT, DARK)]}
    curves = [curves_figure(report, theme) for theme in (LIGHT, DARK)]
    drawn = [canvas.png(figure) for figure in curves if figure is not None]
    body.append(html.figure(html.Picture(*pictures[RADAR_NAME], "Radar of cost, accuracy and performance")))
    if drawn:
        pictures[CURVES_NAME] = drawn
        body += [
            html.heading("Against batch size"),
            html.figure(html.Picture(*drawn, "S-MBU and S-MFU against batch size, and the roofline")),
        ]
    for name, (light, _) in pictures.items():
        write_synced(folder / name, light)
    body += [
        html.heading("Table"),
        html.table(HEAD, table_rows(report), ABSENT),
        html.paragraph(NOTE, "note"),
    ]
    if accuracy_rows(report):
        body += [html.heading("Accuracy"), html.table(ACCURACY_HEAD, accuracy_rows(report), ABSENT)]
    if harness_rows(report):
        body.append(html.table(HARNESS_HEAD, harness_rows(report), ABSENT))
    body += [
        html.heading("EfficientLLM's metrics"),
        html.table(EFFICIENCY_HEAD, efficiency_rows(report), ABSENT),
        html.paragraph(_EFFICIENCY, "note"),
    ]
    if remarks_of(report):
        body += [html.heading("Remarks"), html.box([html.bullets(remarks_of(report))])]
    body += [html.paragraph(_MEANING, "note"), html.heading("Conditions"), html.facts(_facts(report), ABSENT)]
    page = folder / PAGE_NAME
    atomic_write_text(page, html.page("What it uses of the hardware", body))
    return page


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
