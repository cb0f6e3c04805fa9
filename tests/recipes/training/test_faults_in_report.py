"""What a report says of steps that were skipped and of processes that failed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from recipes.tracking.metrics_log import MetricsLog
from recipes.tracking.report import build_report


def said(folder: Path, more: dict[int, dict[str, Any]], goodput: dict[str, float]) -> str:
    """The section of a run of ten steps."""
    log = MetricsLog(folder / "metrics.jsonl")
    skipped = 0
    for step in range(1, 11):
        skipped += "skipped" in more.get(step, {})
        row = {"stage": "moe", "step": step, "loss": 3.0, "grad_norm": 1.0, "skipped_steps": skipped}
        log.append(row | more.get(step, {}))
    log.close()
    (folder / "summary.json").write_text(json.dumps({"goodput": goodput} if goodput else {}))
    page = build_report(folder).read_text()
    return page.partition("<h2>Faults</h2>")[2].partition("<h2>")[0]


def test_a_run_without_faults_says_so(tmp_path: Path) -> None:
    text = said(tmp_path, {}, {"recoveries": 0, "recovery_s": 0.0, "recovery_worst_s": 0.0})
    assert "No step was skipped" in text and "No process of the run failed" in text


def test_faults_are_counted(tmp_path: Path) -> None:
    more: dict[int, dict[str, Any]] = {
        3: {"skipped": 1, "loss": math.nan},
        4: {"skipped": 1, "grad_norm": math.inf},
        8: {"skipped": 1, "loss": 90.0},
        9: {"skipped": 1, "loss": 95.0, "went_back_to": 6},
    }
    text = said(tmp_path, more, {"recoveries": 2, "recovery_s": 60.0, "recovery_worst_s": 45.0})
    row = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    assert row is not None
    cells = re.findall(r">([^<]+)</t[hd]>", row[1])
    assert cells[1:] == ["4", "2", "2", "3, 4, 8, 9", "6"]
    assert "30.0 s" in text and "45.0 s" in text


def test_a_run_from_before_says_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"stage": "moe", "step": 1, "loss": 3.0})
    log.close()
    assert "<h2>Faults</h2>" not in build_report(tmp_path).read_text()
