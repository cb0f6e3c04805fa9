"""Options of the search for a permutation."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moe.errors import not_negative, require
from moe.types import Config, unless


@dataclass(frozen=True)
class PermutationConfig(Config):
    """Config of the search: its length, and how the permutation hardens."""

    steps: int = 0
    """Optimizer steps of the search, from the first on; 1% to 10% of the run is usual. 0: no search, each
    expert keeps its place."""
    entropy_coef: float = 1e-4
    """Coefficient of the entropies of all rows and columns, summed."""
    log10_tau_start: float = -3.0
    """Decimal logarithm of the temperature at the first step."""
    log10_tau_end: float = -7.0
    """The same after the last step; linear in between."""
    iterations_start: int = 20
    """Sinkhorn iterations at the first step."""
    iterations_end: int = 150
    """The same after the last step; linear in between."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.steps >= 0, "steps", "a search cannot be negative", "Set 0 for none."),
            *not_negative(self, "entropy_coef"),
            *(
                (getattr(self, name) >= 1, name, "Sinkhorn needs one", "Set it to 1 or more.")
                for name in ("iterations_start", "iterations_end")
            ),
            *(
                (abs(getattr(self, name)) <= 30, name, "no temperature is that far from 1", "Set -30 to 30.")
                for name in ("log10_tau_start", "log10_tau_end")
            ),
        )

    def temperature(self, step: int) -> float:
        """Returns tau after a number of steps."""
        share = min(step / self.steps, 1.0) if self.steps else 1.0
        return float(10 ** (self.log10_tau_start + share * (self.log10_tau_end - self.log10_tau_start)))

    def iterations(self, step: int) -> int:
        """Returns the Sinkhorn iterations after a number of steps."""
        share = min(step / self.steps, 1.0) if self.steps else 1.0
        return round(self.iterations_start + share * (self.iterations_end - self.iterations_start))

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(
            self.steps > 0,
            "steps is 0, and nothing is searched",
            *(f.name for f in fields(self) if f.name != "steps"),
        )
