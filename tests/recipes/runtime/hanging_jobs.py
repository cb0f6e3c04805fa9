"""Whole jobs in which a rank sleeps outside of steps.

The ranks of all cases are forked from one process, which has imported everything.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from recipes.launch import main as launch
from tests.patience import patience, slowness
from tests.recipes.jobs.job_runs import arguments, quick, write_text
from tests.recipes.runtime.forked import fork_ranks

RANKS = 2
# Long enough for every phase that works, also on a slower machine.
LIMIT_S = round(5.0 * slowness(), 1)
_FOR_EVER = 200


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
        # One step, and validations of one batch: nothing here must come within the limit itself.
        {"faults.hang_s": 0.6, "train.eval_samples": 4, "train.steps": 1},
        "faults.hang_s=0.6, 10 times that here",
        6.0,
    ),
    "export": Case(0, "recipes.models.export.write_export.publish", "moe: the export"),
}


def sleep_here(*args: Any, **options: Any) -> None:
    """Does not come back, and leaves when it began."""
    Path("asleep").write_text(str(time.time()))
    time.sleep(_FOR_EVER)


def working_long(work: Callable[..., Any]) -> Callable[..., Any]:
    """Takes more than the limit at first, and says lines meanwhile."""
    done: list[bool] = []

    def slow(*args: Any) -> Any:
        begun, log = time.monotonic(), args[-1]
        while not done and time.monotonic() - begun < 1.5 * LIMIT_S:
            log("tokenise: some more")
            time.sleep(LIMIT_S / 10)
        done.append(True)
        return work(*args)

    return slow


@contextlib.contextmanager
def interfering(name: str, rank: int) -> Iterator[None]:
    """While open, the function of the case is another."""
    case = CASES.get(name, CASES["data"])
    module, _, attribute = case.place.rpartition(".")
    if rank != case.rank:
        yield
    elif name == WORKING:
        with patch(case.place, working_long(getattr(importlib.import_module(module), attribute))):
            yield
    else:
        with patch(case.place, sleep_here):
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
    with quick(), interfering(name, rank):
        return launch(arguments(folder, options | (case.options if case else {})))


def start(folder: Path, name: str) -> dict[int, int]:
    """Process ids by rank."""
    return fork_ranks(folder / name, RANKS, lambda rank: work(folder, name, rank))


def ended(running: dict[str, dict[int, int]]) -> dict[str, Any]:
    """Of each case the exit codes by rank, and when its last one ended; ends what is left."""
    left = {pid: (name, rank) for name, ranks in running.items() for rank, pid in ranks.items()}
    found: dict[str, Any] = {name: {"codes": {}, "ended": 0.0} for name in running}
    deadline = time.monotonic() + patience(60.0)
    while left and time.monotonic() < deadline:
        for pid, (name, rank) in list(left.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[name]["codes"][rank] = os.waitstatus_to_exitcode(status)
                found[name]["ended"] = time.time()
                del left[pid]
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def main(folder: Path) -> None:
    """The job that works fills the cache for the others, which then sleep side by side."""
    write_text(folder / "text")
    for module in (
        "recipes.jobs.session",
        "recipes.jobs.upcycle_job",
        "transformers.models.mixtral.modeling_mixtral",
    ):
        importlib.import_module(module)
    found = ended({WORKING: start(folder, WORKING)})
    found |= ended({name: start(folder, name) for name in CASES})
    (folder / "found.json").write_text(json.dumps(found))
