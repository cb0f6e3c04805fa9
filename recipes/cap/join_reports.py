"""Joins reports into the same tables and figures, and lists the differences in kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.errors import ConfigError, Mistake
from recipes.cap.cap_report import SCHEMA, SCHEMA_VERSION
from recipes.cap.cap_table import ABSENT, duration
from recipes.runtime.user_json import read_json_object
from recipes.tracking.report import formats

Figures = dict[str, Any]
RATIO_HEAD = ("system", "batch", "TPOT", "of the first", "tokens/s", "of the first", "S-MBU", "difference")


def read_reports(paths: Sequence[Path]) -> list[Figures]:
    """Reads files that ``python -m tools.cap`` wrote.

    Raises:
        ConfigError: All files that are none, or of another version.
    """
    reports, mistakes = [], []
    for path in paths:
        try:
            content = read_json_object(path)
        except (OSError, ValueError) as error:
            remedy = "Give files that python -m tools.cap --json wrote."
            mistakes.append(Mistake("--compare", str(path), f"it {error}", remedy))
            continue
        known = content.get("schema") == SCHEMA
        if not known or content.get("schema_version") != SCHEMA_VERSION:
            found = f"{content.get('schema')} {content.get('schema_version')}" if known else "no report"
            rule = f"it is {found}; {SCHEMA} {SCHEMA_VERSION} is known here"
            mistakes.append(Mistake("--compare", str(path), rule, "Measure again with this version."))
            continue
        reports.append(content)
    if mistakes:
        raise ConfigError(mistakes)
    return reports


def join_reports(reports: Sequence[Figures], names: Sequence[str]) -> Figures:
    """Joins the systems of all reports; equal names are followed by that of their file."""
    every = [system["name"] for report in reports for system in report["systems"]]
    systems = []
    for report, name in zip(reports, names, strict=True):
        for system in report["systems"]:
            twice = every.count(system["name"]) > 1
            systems.append(system | ({"name": f"{system['name']} ({name})"} if twice else {}))
    return {**reports[0], "systems": systems}


def differences(reports: Sequence[Figures]) -> list[str]:
    """Describes the differences that forbid a one-to-one comparison of the figures."""
    return list(_differences(reports))


def _differences(reports: Sequence[Figures]) -> Iterator[str]:
    looked = {
        "environment": ("device", "processor", "threads", "torch", "transformers"),
        "workload": ("prompt", "new", "rounds", "text"),
        "cost_assumptions": ("price_usd", "power_watts", "usd_per_kwh", "pue", "life_years", "busy"),
    }
    for part, keys in looked.items():
        for key in keys:
            values = [report[part][key] for report in reports]
            if any(value != values[0] for value in values):
                yield f"{key.replace('_', ' ')} differs: {', '.join(str(value) for value in values)}"
    for key in ("bytes_per_s", "flops"):
        peaks = [system["peaks"][key] for report in reports for system in report["systems"]]
        shown = dict.fromkeys(_peak(peak) for peak in peaks)
        if len(shown) > 1:
            yield f"peak {key.replace('_', ' ')} differs, and shares with it: {', '.join(shown)}"


def _peak(peak: Mapping[str, Any]) -> str:
    value = ABSENT if peak["value"] is None else formats.giga(peak["value"])
    return f"{value} G ({peak['source'] or 'not known'})"


def ratio_rows(report: Figures) -> list[list[str]]:
    """Returns the ratio of every system and batch size to the first system at the same batch size."""
    first = {point["batch_size"]: point for point in report["systems"][0]["points"]}
    return [
        _ratio_row(system["name"], point, first.get(point["batch_size"]))
        for system in report["systems"]
        for point in system["points"]
    ]


def _ratio_row(name: str, point: Figures, base: Figures | None) -> list[str]:
    time, rate, share = _values(point)
    base_time, base_rate, base_share = (None, None, None) if base is None else _values(base)
    return [
        name,
        str(point["batch_size"]),
        duration(time),
        _ratio(time, base_time),
        ABSENT if rate is None else formats.count(rate),
        _ratio(rate, base_rate),
        ABSENT if share is None else formats.share(share),
        ABSENT if share is None or base_share is None else f"{100 * (share - base_share):+.2f} points",
    ]


def _values(point: Figures) -> tuple[float | None, float | None, float | None]:
    time = point["tpot_s"] and point["tpot_s"]["mean"]
    return time, point["tokens_per_s"], point["decode"]["s_mbu"]


def _ratio(value: float | None, base: float | None) -> str:
    return ABSENT if value is None or base is None else f"{value / base:.3f}"
