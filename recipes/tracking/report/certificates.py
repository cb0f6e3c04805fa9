"""Rows of an export's certificates, for the report of its run and for its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.runtime.user_json import UserJsonError, read_json_object
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


def read_certificates(export: Path) -> tuple[list[list[str]], str | None]:
    """Returns the rows of an export's certificates, and what is wrong with their file, if anything is."""
    path = export / CERTIFICATE_FILE
    if not path.exists():
        return [], None
    try:
        return certificate_rows(read_json_object(path)), None
    except UserJsonError as error:
        return [], error.clause
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return [], "holds something else than graft certify writes"


def certificate_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """Returns a row for each program."""
    return [_row(result) for result in content["results"]]


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
