"""Options of the trackers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Literal

from moe.errors import Mistake, require
from moe.types import Config, unless
from recipes.runtime.extras import check_extra

#: Values of WANDB_MODE, with what they amount to.
MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


@dataclass(frozen=True)
class TrackerConfig(Config):
    """Settings of the charts.

    Attributes:
        mode: ``online``, ``offline`` (kept under the run directory), ``disabled``, or ``auto``: what
            WANDB_MODE sets, else online if an API key is found, else offline.
        project: wandb project.
        entity: wandb user or team; None for the account's own.
        group: wandb group of runs.
        tags: wandb tags.
        media_every: Steps between pictures and histograms of expert load.
        timeout_s: Seconds to wait for wandb when a run starts and when it ends.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "graft"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    media_every: int = 50
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        require(
            self,
            (bool(self.project), "project", "is empty", "Name a wandb project."),
            (self.media_every >= 1, "media_every", "must be at least 1 step", "Raise it."),
            (self.timeout_s > 0, "timeout_s", "must be more than 0 seconds", "Raise it."),
        )

    def check(self) -> list[Mistake]:
        """Checks that wandb is installed where it is asked for; ``auto`` is content without it."""
        path, asked = "tracker.mode", str(self.mode)
        if self.mode == "auto":
            path, asked = "WANDB_MODE", os.environ.get("WANDB_MODE", "")
        if MODES.get(asked) not in ("online", "offline"):
            return []
        found = check_extra("wandb", path, asked, f"set {path}=disabled")
        return [] if found is None else [found]

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(
            self.mode != "disabled", "mode is disabled", *(f.name for f in fields(self) if f.name != "mode")
        )
