"""Rows of an export's certificates, for the report of its run and for its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.runtime.user_json import read_json_object
from recipes.tracking.report import formats

CERTIFICATE_FILE = "certificate.json"
HEADER = [
    "program",
    "certified",
    "KL (nats)",
    "log-probabilities within",
    "same experts",
    "greedy",
    "remarks",
]


def read_certificate(export: Path) -> Mapping[str, Any]:
    """Reads the certificates of an export; empty where there are none that can be read."""
    try:
        return read_json_object(export / CERTIFICATE_FILE)
    except ValueError:
        return {}


def certificate_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """Returns a row for each program."""
    return [_row(result) for result in content.get("results") or ()]


def _row(result: Mapping[str, Any]) -> list[str]:
    free, experts, greedy = result.get("free") or {}, result.get("same_experts"), result.get("greedy")
    return [
        str(result.get("version") or result.get("name")),
        "yes" if result.get("certified") else "no",
        formats.small(free.get("mean_kl")) if free else "-",
        formats.small(free.get("max_logprob_diff")) if free else "-",
        formats.share(sum(experts.values()) / len(experts)) if experts else "-",
        f"{greedy[0]} of {greedy[1]}" if greedy else "-",
        str(result.get("reason") or ""),
    ]
