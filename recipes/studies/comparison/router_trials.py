"""The runs of a comparison: which there are, which are done, and how one is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.runtime.source_root import SOURCE_ROOT


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
        router: A choice of ``conf/router``.
        seed: Of router and experts; data, split and dense model are those of seed 0 in every trial.
        folder: The run directory.
    """

    router: str
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
        return self.result() is not None

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.folder.with_suffix(".log")

    def result(self) -> dict[str, Any] | None:
        """The row of the upcycled model in the run's summary; None where there is none yet."""
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        rows = json.loads(path.read_text(encoding="utf-8")).get("results", [])
        return next((row for row in rows if row["model"] == "moe"), None)

    def arguments(self, overrides: Sequence[str]) -> list[str]:
        """What train.py is given. Overrides of the user come before, so that the trial's own win."""
        own = [
            f"router={self.router}",
            f"seed={self.seed}",
            "data.seed=0",
            "compare.cpt=false",
            "tracker.mode=disabled",
            f"output_dir={self.folder.parent}",
            f"run.name={self.folder.name}",
            "resume=auto",
        ]
        return ["+recipe=upcycle", *overrides, *own]


def plan_trials(folder: Path, routers: Sequence[str], seeds: int) -> list[Trial]:
    """Seed by seed, so that a comparison that is cut short holds every router alike."""
    return [
        Trial(router, seed, folder / "runs" / f"{router}-s{seed}")
        for seed in range(seeds)
        for router in routers
    ]


def start(trial: Trial, overrides: Sequence[str], ranks: int) -> int:
    """Runs a trial in processes of its own, so that a failed one takes no other down; returns the exit code.

    A trial that was interrupted goes on from its newest checkpoint.
    """
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(SOURCE_ROOT / "train.py"), *trial.arguments(overrides)]
    with trial.log.open("ab") as log:
        finished = subprocess.run(
            command, cwd=SOURCE_ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ.copy(), check=False
        )
    return finished.returncode
