"""Options of the low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import require
from moe.types import Config, unless


@dataclass(frozen=True)
class LoraConfig(Config):
    """Config of the experts' low-rank factors."""

    rank: int = 0
    """r; 0 trains the experts' weights themselves."""
    alpha: float = 16.0
    """Scale: the product of the factors is multiplied by alpha / r."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.rank >= 0, "rank", "must be 0 or more", "Give 0 to train the weights themselves."),
            (self.alpha > 0, "alpha", "must be above 0", "16 is usual."),
        )

    @property
    def scale(self) -> float:
        """alpha / r; 0 without factors."""
        return self.alpha / self.rank if self.rank else 0.0

    def unsupported_reason(self, model_width: int, expert_width: int) -> str | None:
        """Returns why experts of these widths cannot have such factors, as a clause; None if they can."""
        least = min(model_width, expert_width)
        if self.rank <= least:
            return None
        widths = f"{model_width} and {expert_width}"
        return f"the experts' matrices have widths of {widths}: their rank is at most {least}"

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.rank > 0, "rank is 0", "alpha")
