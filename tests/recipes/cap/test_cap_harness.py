"""lm-evaluation-harness as a back end: what is handed over and what is taken back, with a stand-in for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moe.errors import ConfigError
from recipes.cap.harness import check_harness, run_harness


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules with the names that the harness has; returns what they are given."""
    seen: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        seen.update(options)
        metrics = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": "N/A", "name": "arc"}
        return {"results": {"arc": metrics}}

    library, models, tasks = ModuleType("stand_in"), ModuleType("models"), ModuleType("tasks")
    library.simple_evaluate, library.__version__ = simple_evaluate, "0.0"  # type: ignore[attr-defined]
    models.HFLM = lambda pretrained, tokenizer: (pretrained, tokenizer)  # type: ignore[attr-defined]
    tasks.TaskManager = lambda include_path: SimpleNamespace(  # type: ignore[attr-defined]
        all_tasks=["arc"], path=include_path
    )
    for name, module in (("", library), (".models.huggingface", models), (".tasks", tasks)):
        monkeypatch.setitem(sys.modules, f"stand_in{name}", module)
    return seen


def test_metrics_are_numbers_or_null(stand_in: dict[str, Any], tmp_path: Path) -> None:
    found = run_harness("model", "tokenizer", ("arc",), tmp_path, 5, package="stand_in")
    assert found == {
        "version": "0.0",
        "limit": 5,
        "tasks": {"arc": {"acc,none": 0.25, "acc_stderr,none": None}},
    }
    assert stand_in["model"] == ("model", "tokenizer") and stand_in["limit"] == 5
    assert stand_in["task_manager"].path == str(tmp_path)


def test_a_task_that_it_does_not_know(stand_in: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--lm-eval='mmlu': the harness knows no such task"):
        run_harness("model", "tokenizer", ("arc", "mmlu"), package="stand_in")
    assert not stand_in, "nothing was run"


def test_it_is_asked_for_before_anything_starts(tmp_path: Path) -> None:
    (missing,) = check_harness(("arc",), None, package="no_such_package_here")
    assert missing.rule == "lm-evaluation-harness is not installed"
    assert check_harness((), None, package="no_such_package_here") == []
    assert [m.rule for m in check_harness((), tmp_path / "x")] == ["it is not a folder", "no task is named"]
