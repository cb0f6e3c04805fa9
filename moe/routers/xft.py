"""A gate that learns how much to leave the dense path: the first expert is always used, the others share.

With p the softmax over the other experts and m its largest value, the first expert weighs 1 - m, and the
K - 1 best of the others m times the softmax of their p. Weights sum to 1: copies are exact.

Source: Ding et al. 2024 (XFT, arXiv 2404.15247), upcycling with a shared expert and routing weight
normalisation.

Letters: T tokens, D model width, E experts, K experts a token, O = E - 1 others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe.errors import require
from moe.routers.linear import LinearRouter, LinearRouterConfig
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class XFTConfig(LinearRouterConfig):
    """Config of `XFTRouter`."""

    name: Literal["xft"] = "xft"
    top_k: int = 2
    """Experts a token, the first one among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k >= 2,
                "top_k",
                "the first expert is one of them, and a choice needs another",
                "Set it to 2 or more.",
            ),
        )


class XFTRouter(LinearRouter[XFTConfig]):
    """Expert 0 and the best of the others.

    Attributes:
        weight_ED: ``[E - 1, D]``: expert 0 is not chosen by a row.
    """

    name = "xft"
    config_class = XFTConfig
    varies_top_k: ClassVar[bool] = True

    def __init__(self, config: XFTConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts - 1)
        self.num_experts = num_experts

    @property
    def weights_sum_to_one(self) -> bool:
        """True: 1 - m and m."""
        return True

    def rows_ED(self) -> Tensor | None:
        """None: the first expert has no row."""
        return None

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to expert 0 and its best others."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TO = self.logits(x_TD)
            probs_TO = logits_TO.softmax(-1)
            # By logits: they tie less often, in the same order.
            ids_TK = logits_TO.topk(ctx.top_k(self.top_k) - 1, dim=-1).indices
            best_TK = probs_TO.gather(-1, ids_TK)
            most_T1 = best_TK[:, :1]
            weights_TK = torch.cat([1 - most_T1, most_T1 * best_TK.softmax(-1)], -1)
            scores_TE = torch.cat([1 - most_T1, most_T1 * probs_TO], -1)
            losses = self.balance_losses(logits_TO, probs_TO, ids_TK, ctx)
        first_T1 = torch.zeros_like(ids_TK[:, :1])
        return Routing(
            expert_ids_TK=torch.cat([first_T1, ids_TK + 1], -1),
            weights_TK=weights_TK,
            num_experts=self.num_experts,
            scores_TE=scores_TE,
            logits_TE=torch.cat([logits_TO.new_zeros(len(logits_TO), 1), logits_TO], -1),
            losses=losses,
        )
