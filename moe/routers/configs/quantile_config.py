"""Options of `moe.routers.quantile`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs.projection_config import ProjectionConfig
from moe.types import unless


@dataclass(frozen=True)
class QuantileConfig(ProjectionConfig):
    """Config of `QuantileRouter`."""

    name: Literal["quantile"] = "quantile"
    mode: Literal["fixed", "dynamic"] = "fixed"
    """K experts for every token, or every expert whose threshold the token exceeds (K in the mean)."""
    select_by: Literal["logits", "scores"] = "logits"
    """Quantity that is compared with the thresholds."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits, for the weights."""
    renormalise: bool = True
    """Divide the chosen scores by their sum. Copied experts are exact only when weights sum to 1."""
    iterations: int = 5
    """Iterations of quantile balancing a micro-batch, when fixed; 1 in Su's text and in Megatron's code."""
    decay: float | None = None
    """Share of the old threshold that a step keeps. null takes the sources': 0 when fixed (Megatron's code)
    and 0.9 when dynamic (Su's text)."""
    max_experts: int | None = None
    """Upper bound on a token's experts, when dynamic: its best by margin. null: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k != 1 or not self.renormalise,
                "top_k",
                "an only weight is always 1, and the router gets no gradient from the loss",
                "Set router.renormalise=false, or top_k to 2 or more.",
            ),
            (self.iterations >= 1, "iterations", "nothing would balance", "Set it to 1 or more."),
            (
                self.decay is None or 0 <= self.decay < 1,
                "decay",
                "a threshold keeps a share of itself that is below 1",
                "Set it to 0.9.",
            ),
            (
                self.max_experts is None or self.max_experts >= self.top_k,
                "max_experts",
                f"tokens use top_k={self.top_k} experts in the mean",
                "Set it to more than that, or to null.",
            ),
        )

    @property
    def share_kept(self) -> float:
        """Share of the old threshold that a step keeps."""
        if self.decay is not None:
            return self.decay
        return 0.0 if self.mode == "fixed" else 0.9

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.mode == "fixed", "mode=dynamic does not iterate", "iterations") | unless(
            self.mode == "dynamic", "mode=fixed takes K for every token", "max_experts"
        )
