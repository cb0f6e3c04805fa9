"""What a run does when something goes wrong; see docs/faults.md."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import require
from moe.types import Config

_LEAST_WINDOW = 4


@dataclass(frozen=True)
class FaultsConfig(Config):
    """When a step is skipped, when a run goes back or ends, and when a rank counts as hung.

    Attributes:
        max_nonfinite: Steps in a row whose loss or gradient is not finite, after which the run ends. Those
            before are skipped. 1: the run ends at the first.
        spike_sigma: A step is skipped when its loss, or its gradient norm, is more than so many standard
            deviations above the mean of the window; None never skips for that. OLMo-core takes 6.
        spike_window: Steps of the window. It must be half full before a step is skipped.
        rollback_after: Skipped spikes in a row, after which the weights go back to the newest checkpoint;
            None never goes back.
        hang_s: Seconds within which a rank must come from one mark of a training step to the next (each
            micro-batch, the update, the row), or 5 times the longest that one took so far if that is more;
            then it counts as hung, and the run ends. The first step of a process may take 6 times as long,
            the first batch of a validation or a save 10 times. None waits for ever.
        phase_hang_s: In all else (start-up, export, report), where one rank may work for long while others
            wait for it: seconds within which some rank must make progress, by a line that is said or a part
            of the work that is done (a batch, a tensor, a document); else the run ends. None waits for ever.
    """

    max_nonfinite: int = 3
    spike_sigma: float | None = None
    spike_window: int = 128
    rollback_after: int | None = None
    hang_s: float | None = 300.0
    phase_hang_s: float | None = 1800.0

    def __post_init__(self) -> None:
        sigma, after, window = self.spike_sigma, self.rollback_after, self.spike_window
        require(
            self,
            (
                self.max_nonfinite >= 1,
                "max_nonfinite",
                "must be at least 1",
                "Give 1 to end the run at the first.",
            ),
            (
                sigma is None or sigma > 0,
                "spike_sigma",
                "must be more than 0",
                "Set 6, or null to skip no step for a spike.",
            ),
            (window >= _LEAST_WINDOW, "spike_window", f"must be at least {_LEAST_WINDOW} steps", "Raise it."),
            (
                after is None or after >= 1,
                "rollback_after",
                "must be at least 1",
                "Or set null, which never goes back.",
            ),
            (
                after is None or sigma is not None,
                "rollback_after",
                "must come with spike_sigma, which says what a spike is",
                "Set faults.spike_sigma=6.",
            ),
            *(
                (seconds is None or seconds > 0, name, "must be more than 0 seconds", "Or set null.")
                for name, seconds in (("hang_s", self.hang_s), ("phase_hang_s", self.phase_hang_s))
            ),
        )
