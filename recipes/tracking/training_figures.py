"""Use of the hardware by a stage, from its rows, for ``summary.json`` and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHARES = ("mfu", "s_mfu", "s_mbu")


def summarise_stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Sums up a stage over all its steps, in all processes; None where a figure was not measured.

    Shares are weighted by the time of their steps, which for one peak is the ratio of the sums (equation 6 of
    MoE-CAP, arXiv:2412.07067), not a mean of ratios; a step without its share makes it None. Energy is of the
    steps alone, of the windows in which it was measured.
    """
    steps = [row for row in rows if _number(row.get("step_s"))]
    found: dict[str, float | None] = {name: _weighted(steps, name) for name in SHARES}
    seconds = sum(row["step_s"] for row in steps)
    tokens = sum(row["tokens_per_s"] * row["step_s"] for row in steps if _number(row.get("tokens_per_s")))
    found["tokens_per_s"] = tokens / seconds if steps and tokens else None
    peaks = [row["memory_bytes"] for row in steps if _number(row.get("memory_bytes"))]
    found["memory_bytes"] = max(peaks, default=None)
    energy = [row for row in steps if _number(row.get("energy_j")) and _number(row.get("joules_per_token"))]
    joules = sum(row["energy_j"] for row in energy)
    measured = sum(row["energy_j"] / row["joules_per_token"] for row in energy)
    found["energy_j"] = joules if energy else None
    found["joules_per_token"] = joules / measured if energy else None
    return found


def _weighted(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    if not steps or not all(_number(row.get(name)) for row in steps):
        return None
    done = sum(row[name] * row["step_s"] for row in steps)
    return float(done / sum(row["step_s"] for row in steps))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
