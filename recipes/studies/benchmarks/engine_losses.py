"""Losses of the same job on all engines from the same start, as whole runs of ``train.py``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.errors import GraftError
from recipes.engines import engine_classes
from recipes.engines.base import EngineLayout
from recipes.runtime.source_root import TRAIN, child_environment, torchrun

_TAIL = 15
REFERENCE = EngineLayout(1, ("engine=native",))
# Everything that does not change what is computed, and nothing that is not needed here.
_QUIET = ("tracker.mode=disabled", "compare.cpt=false", "train.eval_every=0", "train.save_every=0")


def compared_layouts() -> list[EngineLayout]:
    """Returns the layouts that every engine offers for comparison, the reference first."""
    offered = [layout for name in sorted(engine_classes()) for layout in engine_classes()[name].compared]
    return [REFERENCE, *(layout for layout in offered if layout != REFERENCE)]


@dataclass(frozen=True)
class Series:
    """Losses and speed of a run.

    Attributes:
        layout: Layout of the run.
        losses: Loss of every step.
        validation: Loss at the end.
        step_s: Median seconds of a step.
    """

    layout: EngineLayout
    losses: tuple[float, ...]
    validation: float
    step_s: float

    def distance(self, other: Series) -> float:
        """Returns the largest relative difference of a step's loss."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses, strict=True))


def run_layouts(
    layouts: Sequence[EngineLayout], overrides: Sequence[str], folder: Path, log: Callable[[str], None]
) -> Iterator[Series]:
    """Trains under each layout; without ``dense=``, all start from the default model of the first.

    Yields the results of each run as soon as it has ended.

    Args:
        layouts: Layouts to run.
        overrides: Overrides of ``train.py``, for all.
        folder: Folder of the runs.
        log: Takes lines of progress.

    Raises:
        GraftError: A run failed; the message ends with its output.
    """
    common = list(overrides)
    if not any(option.startswith("dense=") for option in common):
        common += _default_config(layouts[0], common, folder, log)
    for number, layout in enumerate(layouts):
        log(f"{number + 1}/{len(layouts)}: {layout.name}")
        name = f"layout-{number:02d}"
        _train(layout, [*common, f"output_dir={folder}", f"run.name={name}"])
        yield _read(layout, folder / name)


def _default_config(
    layout: EngineLayout, overrides: Sequence[str], folder: Path, log: Callable[[str], None]
) -> list[str]:
    """Trains the default model and returns it as ``dense=FOLDER``, which belongs to no engine."""
    log("making the dense model")
    none = ["train.steps=0", "optim.schedule.warmup_steps=0", f"output_dir={folder}", "run.name=dense"]
    _train(layout, [*overrides, *none])
    identity = json.loads((folder / "dense" / "run.json").read_text(encoding="utf-8"))["identity"]
    return [f"dense={identity['dense']}"]


def _train(layout: EngineLayout, options: Sequence[str]) -> None:
    command = [*torchrun(layout.ranks), *TRAIN, "+recipe=upcycle", *layout.options, *_QUIET, *options]
    ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if ended.returncode != 0:
        tail = "\n".join((ended.stdout + ended.stderr).splitlines()[-_TAIL:])
        raise GraftError(f"{layout.name} failed with exit code {ended.returncode}:\n{tail}")


def _read(layout: EngineLayout, run: Path) -> Series:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row.get("stage") == "moe" and "loss" in row]
    seconds = sorted(row["step_s"] for row in steps)
    validation = [row["val_loss"] for row in rows if row.get("stage") == "moe" and "val_loss" in row][-1]
    return Series(layout, tuple(row["loss"] for row in steps), validation, seconds[len(seconds) // 2])
