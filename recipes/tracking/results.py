"""``summary.json``: results of a run so far, written after every stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.user_json import read_json_object
from recipes.tracking.step_costs import Costs

LABELS = {
    "mixture": "Mixture (start)",
    "dense": "Dense (start)",
    "cpt": "Dense, continued (CPT)",
    "stage1": "MoE after stage 1",
    "moe": "Upcycled (MoE)",
    "scratch": "MoE from scratch",
}


# Keys of the row of a model.
_REQUIRED = {"model", "label", "val_loss", "tokens", "tokens_per_s"}


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
        """Reads the results of an earlier process of the run; empty where there are none.

        A damaged file is named on stderr and made anew, since it holds results alone.
        """
        if not os.path.lexists(path):
            return {}
        try:
            content = read_json_object(path)
            _check_types(content)
        except ValueError as error:
            print(f"{path}: it {error}; it is made anew from here on", file=sys.stderr, flush=True)
            return {}
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


def _check_types(content: Mapping[str, Any]) -> None:
    """Raises ValueError, with a clause, for what later processes of the run could not add to."""
    rows, timings = content.get("results", []), content.get("timings", {})
    kinds: list[tuple[Any, type]] = [
        (rows, list),
        (timings, dict),
        (content.get("stages", []), list),
        *(
            (content.get(name, {}), dict)
            for name in ("training", "export", "exactness", "peaks", "goodput", "energy")
        ),
    ]
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise ValueError("has other sections than a summary")
    if not all(isinstance(row, dict) and row.keys() >= _REQUIRED for row in rows):
        raise ValueError("has results that are no rows of models")
    if not all(
        isinstance(row, dict) and {"stage", "val_loss"} <= row.keys() for row in content.get("stages", [])
    ):
        raise ValueError("has stages that are no rows of stages")
    if any(str(row["model"]).partition("_")[0] not in LABELS for row in rows):
        raise ValueError("has results that name no models of a run")
    numbers = [*timings.values(), content.get("peak_memory_bytes", 0), *(row["tokens"] for row in rows)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("has words in the place of numbers")


def stage_label(model: str) -> str:
    """Returns the name of a model in tables; ``cpt_tokens`` and ``scratch_400`` are shorter runs."""
    kind, _, which = model.partition("_")
    if not which:
        return LABELS[kind]
    return f"{LABELS[kind]}, {'equal tokens' if which == 'tokens' else f'+{which} dense steps'}"


def _place(model: str) -> tuple[int, str]:
    return list(LABELS).index(model.partition("_")[0]), model
