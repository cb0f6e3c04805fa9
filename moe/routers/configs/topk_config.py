"""Options of `moe.routers.topk`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import require
from moe.routers.configs.linear_config import LinearRouterConfig
from moe.types import unless


@dataclass(frozen=True)
class TopKConfig(LinearRouterConfig):
    """Config of `TopKRouter`."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["topk"] = "topk"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits."""
    order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    """Score all experts and then select (Mixtral's and Switch's code), or score the selected logits alone
    (Shazeer)."""
    renormalise: bool = True
    """Divide the selected scores by their sum. Copied experts are exact only when weights sum to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k != 1 or not self.sums_to_one,
                "top_k",
                "the only weight is then always 1, and the router gets no gradient from the loss",
                "Set router.renormalise=false with router.order=score_then_topk, or top_k to 2 or more.",
            ),
        )

    @property
    def sums_to_one(self) -> bool:
        """True if the weights of a token sum to 1."""
        return self.renormalise or (self.score == "softmax" and self.order == "topk_then_score")

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return super().idle() | unless(
            not self.renormalise, "renormalised weights are the same in either order", "order"
        )
