"""``summary.json``: results of a run so far, written after every stage."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.runtime.atomic import atomic_write_json
from recipes.tracking.step_costs import Costs

LABELS = {
    "dense": "Dense (start)",
    "cpt": "Dense, continued (CPT)",
    "stage1": "MoE after stage 1",
    "moe": "Upcycled (MoE)",
    "scratch": "MoE from scratch",
}


class Results:
    """The summary of a run in progress. Every rank holds the same; rank 0 writes.

    Attributes:
        content: Content of the file.
    """

    def __init__(self, path: Path, content: dict[str, Any], *, writes: bool) -> None:
        self.path = path
        self.content = content
        self._writes = writes
        content.setdefault("results", [])
        content.setdefault("timings", {})

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Reads the results of an earlier process of the run; empty where there are none."""
        if not path.is_file():
            return {}
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def row(self, model: str) -> dict[str, Any] | None:
        """Returns the row of a finished stage; None if there is none."""
        return next((row for row in self.content["results"] if row["model"] == model), None)

    def put_stage(
        self, model: str, label: str, val_loss: float | None, tokens: int, costs: Costs, speed: float | None
    ) -> None:
        """Adds or replaces the row of a model, in the order of `LABELS`."""
        row = {"model": model, "label": label, "val_loss": val_loss, "tokens": tokens}
        row |= {key: value for key, value in asdict(costs).items() if key != "peak_flops"}
        row["tokens_per_s"] = speed
        rows = [old for old in self.content["results"] if old["model"] != model] + [row]
        self.content["results"] = sorted(rows, key=lambda r: _place(r["model"]))
        self.write()

    def put(self, key: str, value: Any) -> None:
        """Sets a section and writes."""
        self.content[key] = value
        self.write()

    def add_time(self, key: str, seconds: float) -> None:
        """Adds to a timing: a resumed stage took the sum of its parts."""
        timings = self.content["timings"]
        timings[key] = timings.get(key, 0.0) + seconds

    def write(self) -> None:
        """Writes the file, atomically."""
        if self._writes:
            atomic_write_json(self.path, self.content)


def stage_label(model: str) -> str:
    """Returns the name of a model in tables; ``cpt_tokens`` and ``scratch_400`` are shorter runs."""
    kind, _, which = model.partition("_")
    if not which:
        return LABELS[kind]
    return f"{LABELS[kind]}, {'equal tokens' if which == 'tokens' else f'+{which} dense steps'}"


def _place(model: str) -> tuple[int, str]:
    return list(LABELS).index(model.partition("_")[0]), model
