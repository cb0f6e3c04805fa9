"""Identity of the torchrun command behind this process, so that its restarts resume the same run.

``torchrun --max-restarts`` runs the command again in new processes. Without a record these would be rejected
(their own run directory is in use) or, under an automatic name, start a second run. The run directory
therefore records the command that claimed it.
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
# torchrun's name of a launch without --rdzv-id.
_UNNAMED = "none"


@dataclass(frozen=True)
class Launch:
    """A torchrun command, as seen by one of its processes.

    Attributes:
        run_id: torchrun's ``--rdzv-id``; random with ``--standalone``.
        agent: Machine, process id and start time of the torchrun process above this one.
        process: The same of this process.
    """

    run_id: str
    agent: str
    process: str

    @staticmethod
    def of_this_process() -> Launch | None:
        """Returns the command that started this process; None if it was not torchrun."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        import psutil

        mine = psutil.Process()
        above = mine.parent()
        return Launch(
            os.environ["TORCHELASTIC_RUN_ID"], "" if above is None else _born(above), process=_born(mine)
        )

    def record(self) -> dict[str, Any]:
        """Returns the entry for ``run.json``."""
        return {_KEY: asdict(self)}

    def restarts(self, run_dir: Path) -> bool:
        """Returns True if an earlier process of the same command claimed this run directory.

        Either the same torchrun process started both or, if torchrun has moved rank 0 to another machine,
        both have the same ``--rdzv-id`` and torchrun counts this as a restart.
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
        """Returns the newest of these run directories that this command claimed before, or None."""
        mine = [folder for folder in folders if self.restarts(folder)]
        return max(mine, key=lambda folder: read_run_file(folder).get("started", 0.0), default=None)


def _born(process: Any) -> str:
    return f"{socket.gethostname()} {process.pid} {process.create_time():.2f}"
