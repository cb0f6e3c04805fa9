"""Options of `moe.routers.avg_k`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs import RouterConfig


@dataclass(frozen=True)
class AvgKConfig(RouterConfig):
    """Config of `AvgKRouter`."""

    name: Literal["avg_k"] = "avg_k"
    top_k: int = 2
    """Experts per token."""
    weights: Literal["one", "softmax"] = "one"
    """Sum the chosen experts unweighted (the paper), or weigh them by the softmax over their logits."""
    normalise: bool = False
    """Divide every mean key by its length, so that directions alone are compared."""

    def __post_init__(self) -> None:
        require(self, (self.top_k >= 1, "top_k", "a token needs at least one expert", "Set it to 1 or more."))

    @property
    def reads_experts(self) -> bool:
        """True: mean keys are the gates."""
        return True
