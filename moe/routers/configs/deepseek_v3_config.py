"""Options of `moe.routers.deepseek_v3`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import Mistake, require
from moe.routers.configs.linear_config import LinearRouterConfig
from moe.routing.scope import BalanceScope
from moe.types import unless


@dataclass(frozen=True)
class DeepSeekV3Config(LinearRouterConfig):
    """Config of `DeepSeekV3Router`. V2's: softmax scores, groups chosen by their best expert, no bias."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["deepseek_v3"] = "deepseek_v3"
    balance_coef: float = 1e-4
    """Coefficient of the balance loss that complements the bias; 0 leaves it out."""
    balance_scope: BalanceScope = "sequence"
    """Tokens over which that loss counts load."""
    balance_counts: Literal["scores", "chosen"] = "scores"
    """Choices that this loss counts: the K best by score alone (V3's Eq. 18; Megatron-core), or those made,
    with bias and groups (V2's experts selected)."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Score function over the logits."""
    renormalise: bool = True
    """Divide the selected scores by their sum."""
    routed_scaling: float = 1.0
    """Factor on the weights: 2.5 in V3, 16 in V2. Copied experts are exact only at 1."""
    num_groups: int = 1
    """Groups of neighbouring experts, one for each node that holds experts: 8 in DeepSeek-V3."""
    top_groups: int = 1
    """Groups that the experts of a token are chosen from: 4 in DeepSeek-V3."""
    group_score: Literal["top2_sum", "share_sum", "max"] = "top2_sum"
    """Score of a group: the sum of its two best scores (V3's code, transformers, torchtitan), of its
    ``top_k / top_groups`` best (Megatron-core; the same for V3's 8 of 4 groups), or the best (V2)."""
    bias_rate: float = 1e-3
    """Step size of the bias; 0 leaves it at 0. A spread of the bias of 1 or more (metric ``bias_alarm``)
    means that some choices no longer depend on the token; it takes at least 1 / (2 bias_rate) steps."""
    bias_update: Literal["sign", "proportional"] = "sign"
    """Step by the sign of mean load - load, or by (mean load - load) / mean load."""
    bias_stop_step: int | None = None
    """Optimizer step after which the bias is frozen; null: never. DeepSeek-V3 froze it for its last 3
    percent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k != 1 or not self.renormalise,
                "top_k",
                "the only weight is then always the same, and the router gets no gradient from the loss",
                "Set router.renormalise=false, or top_k to 2 or more.",
            ),
            (
                1 <= self.top_groups <= self.num_groups,
                "top_groups",
                (
                    f"a token chooses from at least one of the num_groups={self.num_groups} groups, and from "
                    "no more than there are"
                ),
                "Set it from 1 to num_groups.",
            ),
            (
                self.group_score != "share_sum" or self.top_k >= self.top_groups,
                "group_score",
                f"a group's share, {self.top_k} / top_groups={self.top_groups}, is less than one expert",
                "Set it to top2_sum, or top_groups to top_k or less.",
            ),
            (
                self.routed_scaling > 0,
                "routed_scaling",
                "experts that count nothing cannot learn",
                "Set it above 0; 1 keeps copied experts exact.",
            ),
            (
                self.bias_rate >= 0,
                "bias_rate",
                "the bias would favour the loaded experts",
                "Set it to 0 or more.",
            ),
        )

    def check(self, num_experts: int) -> Mistake | None:
        """Requires groups of one size, of which the chosen ones hold K experts."""
        if found := super().check(num_experts):
            return found
        if num_experts % self.num_groups:
            rule = (
                f"groups are of one size, and the {num_experts} experts of upcycle.num_experts do not divide "
                f"into router.num_groups={self.num_groups}"
            )
            remedy = f"Set num_groups to a divisor of {num_experts}."
            return Mistake("num_groups", self.num_groups, rule, remedy)
        in_reach = self.top_groups * (num_experts // self.num_groups)
        if self.top_k > in_reach:
            rule = (
                f"a token uses router.top_k={self.top_k} experts, and router.top_groups="
                f"{self.top_groups} of {self.num_groups} groups hold {in_reach}"
            )
            return Mistake("top_k", self.top_k, rule, "Raise top_groups, or lower top_k.")
        return None

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return (
            super().idle()
            | unless(self.balance_coef > 0, "balance_coef is 0", "balance_counts")
            | unless(self.bias_rate > 0, "bias_rate is 0", "bias_update", "bias_stop_step")
            | unless(self.num_groups > 1, "num_groups is 1", "group_score")
            | unless(self.top_groups < self.num_groups, "top_groups takes every group", "group_score")
        )
