"""lm-evaluation-harness as an optional back end of accuracy: its tasks, our models.

It is not among Graft's requirements. Tasks that it would download are read from its own cache or not at all.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.errors import ConfigError, Mistake

PACKAGE = "lm_eval"


def check_harness(tasks: tuple[str, ...], folder: Path | None, package: str = PACKAGE) -> list[Mistake]:
    """Checks that the harness is installed and the folder of task files exists."""
    mistakes = []
    if tasks and importlib.util.find_spec(package) is None:
        rule = "lm-evaluation-harness is not installed"
        mistakes.append(Mistake("--lm-eval", ",".join(tasks), rule, "Install it: pip install lm-eval."))
    if folder is not None and not folder.is_dir():
        remedy = "Name a folder of task files, or leave it out."
        mistakes.append(Mistake("--lm-eval-dir", str(folder), "it is not a folder", remedy))
    if folder is not None and not tasks:
        mistakes.append(Mistake("--lm-eval-dir", str(folder), "no task is named", "Name some: --lm-eval."))
    return mistakes


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: tuple[str, ...],
    folder: Path | None = None,
    limit: int | None = None,
    package: str = PACKAGE,
) -> dict[str, Any]:
    """Runs the harness; returns its version and, for every task, metric -> value.

    Args:
        model: A decoder of transformers, on its device.
        tokenizer: Its own.
        tasks: Names of tasks of the harness.
        folder: Folder of further task files.
        limit: Questions of a task; None for all.
        package: Name of the library.

    Raises:
        ConfigError: It does not know a task.
    """
    library = importlib.import_module(package)
    wrapped = importlib.import_module(f"{package}.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer
    )
    known = importlib.import_module(f"{package}.tasks").TaskManager(
        include_path=None if folder is None else str(folder)
    )
    lost = [task for task in tasks if task not in known.all_tasks]
    if lost:
        remedy = "List its tasks: lm_eval --tasks list; yours are read from --lm-eval-dir."
        raise ConfigError.one("--lm-eval", ",".join(lost), "the harness knows no such task", remedy)
    found = library.simple_evaluate(
        model=wrapped, tasks=list(tasks), task_manager=known, limit=limit, bootstrap_iters=0
    )
    return {
        "version": getattr(library, "__version__", None),
        "limit": limit,
        "tasks": {task: _metrics(values) for task, values in found["results"].items()},
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Keeps numbers alone; the harness writes ``N/A`` for an error that it did not estimate."""
    return {
        key: value if isinstance(value, int | float) else None
        for key, value in values.items()
        if key != "alias" and (isinstance(value, int | float) or value == "N/A")
    }
