"""Config of faults: skipped steps, rollback, and hangs; see docs/faults.md."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import require
from moe.types import Config, unless

_LEAST_WINDOW = 4


@dataclass(frozen=True)
class FaultsConfig(Config):
    """Rules for skipping steps, rolling back, and ending a run that diverges or hangs.

    Attributes:
        max_nonfinite: Number of consecutive steps with a non-finite loss or gradient that ends the run;
            earlier ones are skipped. 1 ends the run at the first.
        spike_sigma: A step is skipped if its loss or gradient norm is more than this many standard deviations
            above the mean of the window; None never skips. OLMo-core uses 6.
        spike_window: Steps in the window. It must be half full before a step is skipped.
        rollback_after: Number of consecutive skipped spikes after which the newest checkpoint is restored;
            None never rolls back.
        hang_s: Limit in seconds between two beats of a training step (each micro-batch, the update, the row),
            or 5 times the longest interval so far if that is more; a rank beyond it counts as hung, and the
            run ends. The first step of a process may take 6 times as long, the first batch of a validation or
            a save 10 times. None waits for ever.
        phase_hang_s: Limit in seconds for everything else (start-up, export, report), where one rank may work
            while others wait: some rank must make progress within it, by logging a line or by completing a
            part of the work (a batch, a tensor, a document); else the run ends. None waits for ever.
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

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(
            self.spike_sigma is not None, "spike_sigma is null, and no step is a spike", "spike_window"
        )
