"""Whole jobs in which a rank sleeps outside of steps.

The ranks of all cases are forked from one process, which has imported everything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from recipes.launch import main as launch
from recipes.runtime.watchdog import Watchdog
from tests.recipes.jobs.job_runs import arguments, quick, write_text
from tests.recipes.runtime.forked import fork_ranks
from tests.recipes.runtime.standing_clock import Ranks, StandingClock, attend

RANKS = 2
LIMIT_S = 60.0
_FOR_EVER = 10**6


@dataclass(frozen=True)
class Case:
    """Where a rank sleeps.

    Attributes:
        rank: Which.
        place: The function that it does not come back from.
        where: What the message calls the phase.
        options: Of the job.
        limit: What the message says that it was.
        limit_s: How long it was.
    """

    rank: int
    place: str
    where: str
    options: dict[str, Any] = field(default_factory=dict)
    limit: str = f"faults.phase_hang_s={LIMIT_S:g}"
    limit_s: float = LIMIT_S


WORKING = "works"
CASES = {
    "data": Case(0, "recipes.data.build_data.ensure_tokenised", "reading the data"),
    "gate": Case(1, "recipes.jobs.moe_stage.measure_shards", "moe: the equivalence check at step 0"),
    "calibration": Case(
        1,
        "recipes.upcycling.calibration.gather.Calibration._batch",
        "moe: calibration",
        {"upcycle": "llama_moe_v2", "upcycle.layers": "all", "upcycle.num_experts": 3},
    ),
    "save": Case(
        1,
        "recipes.training.hooks.stage_saves.Saver.save",
        "saving",
        {"faults.hang_s": 20, "train.steps": 1},
        "faults.hang_s=20, 10 times that here",
        200.0,
    ),
    "export": Case(0, "recipes.models.export.output_folder.sync_contents", "moe: the export"),
}


def sleep_here(clock: StandingClock, *args: Any, **options: Any) -> None:
    """Does not come back."""
    clock.hang()
    time.sleep(_FOR_EVER)


def working_long(clock: StandingClock, work: Callable[..., Any]) -> Callable[..., Any]:
    """Takes more than the limit at first, and says lines meanwhile."""
    done: list[bool] = []

    def slow(*args: Any, **options: Any) -> Any:
        log = args[-1]
        for _ in range(0 if done else 15):
            log("tokenise: some more")
            clock.work(LIMIT_S / 10)
        done.append(True)
        return work(*args, **options)

    return slow


@contextlib.contextmanager
def interfering(name: str, rank: int, clock: StandingClock) -> Iterator[None]:
    """While open, the function of the case is another."""
    case = CASES.get(name, CASES["data"])
    module, _, attribute = case.place.rpartition(".")
    if rank != case.rank:
        yield
    elif name == WORKING:
        with patch(case.place, working_long(clock, getattr(importlib.import_module(module), attribute))):
            yield
    else:
        with patch(case.place, functools.partial(sleep_here, clock)):
            yield


def work(folder: Path, name: str, rank: int) -> int:
    """Runs the job on one rank."""
    os.chdir(folder / name)
    case = CASES.get(name)
    options: dict[str, Any] = {
        "data.path": folder / "text" / "*.txt",
        "run.name": name,
        "model.steps": 1,
        "model.warmup_steps": 0,
        "train.steps": 0,
        "compare.cpt": "false",
        "optim.schedule.warmup_steps": 0,
        "faults.phase_hang_s": LIMIT_S,
    }
    clock = StandingClock(folder / name)
    watchdog = functools.partial(Watchdog, clock=clock, backstop_s=_FOR_EVER)
    with quick(), patch("recipes.jobs.session.Watchdog", watchdog), interfering(name, rank, clock):
        return launch(arguments(folder, options | (case.options if case else {})))


def start(folder: Path, name: str) -> Ranks:
    """Forks the ranks of a case."""
    return Ranks(folder / name, fork_ranks(folder / name, RANKS, lambda rank: work(folder, name, rank)))


def main(folder: Path) -> None:
    """The job that works fills the cache for the others, which then sleep side by side."""
    write_text(folder / "text")
    for module in (
        "recipes.jobs.session",
        "recipes.jobs.upcycle_job",
        "transformers.models.mixtral.modeling_mixtral",
    ):
        importlib.import_module(module)
    cases = {WORKING: start(folder, WORKING)}
    attend(cases)
    hanging = {name: start(folder, name) for name in CASES}
    attend(hanging)
    found = {
        name: {"codes": ranks.codes, "passed_s": ranks.passed_s} for name, ranks in (cases | hanging).items()
    }
    (folder / "found.json").write_text(json.dumps(found))
