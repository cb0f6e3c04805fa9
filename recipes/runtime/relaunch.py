"""Which command has started this process, so that a restart by torchrun goes on with the run it restarts.

``torchrun --max-restarts`` gives the command once more to new processes. Without a memory of it they would be
refused (their own run directory is in use) or, under an automatic name, begin a second run. The run directory
therefore says which command claimed it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError
from recipes.runtime.run_file import read_run_file

_KEY = "launch"
# What torchrun calls every launch whose user gave no --rdzv-id.
_UNNAMED = "none"


@dataclass(frozen=True)
class Launch:
    """A torchrun command, as one of its processes sees it.

    Attributes:
        run_id: torchrun's ``--rdzv-id``; drawn at random by ``--standalone``.
        agent: Host, number and birth of the torchrun process above this one.
        process: The same of this process.
    """

    run_id: str
    agent: str
    process: str

    @staticmethod
    def of_this_process() -> Launch | None:
        """The command that started this process; None where it was not torchrun."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        import psutil

        mine = psutil.Process()
        above = mine.parent()
        return Launch(
            os.environ["TORCHELASTIC_RUN_ID"], "" if above is None else _born(above), process=_born(mine)
        )

    def record(self) -> dict[str, Any]:
        """What ``run.json`` keeps of it."""
        return {_KEY: asdict(self)}

    def restarts(self, run_dir: Path) -> bool:
        """Whether an earlier process of the same command claimed this run directory.

        The same torchrun process started both; or, where torchrun has moved the first rank to another
        machine, both have the same ``--rdzv-id`` and torchrun counts this as a restart.
        """
        try:
            kept = read_run_file(run_dir).get(_KEY)
        except (OSError, CheckpointError):
            return False
        if not isinstance(kept, Mapping) or kept.get("process") == self.process:
            return False
        if self.agent and kept.get("agent") == self.agent:
            return True
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        return again and self.run_id != _UNNAMED and kept.get("run_id") == self.run_id

    def find(self, folders: Iterable[Path]) -> Path | None:
        """The newest of these run directories that this command claimed before; None where there is none."""
        mine = [folder for folder in folders if self.restarts(folder)]
        return max(mine, key=lambda folder: read_run_file(folder).get("started", 0.0), default=None)


def _born(process: Any) -> str:
    return f"{socket.gethostname()} {process.pid} {process.create_time():.2f}"
