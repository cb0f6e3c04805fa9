"""Top-k routing by a linear map: softmax before or after the selection, or sigmoid scores.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, softmax after top-k), Switch Transformers (arXiv 2101.03961,
softmax before, Eq. 4-6 for the balance loss), ST-MoE (arXiv 2202.08906, Eq. 5 for the z-loss), DeepSeek-V3
(arXiv 2412.19437, Eq. 13-15 for sigmoid scores).

Letters: T tokens, D model width, E experts, K experts a token, N of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.errors import require
from moe.routers.linear import LinearRouter, LinearRouterConfig
from moe.routers.projection import normalise_scores, score_logits, select_top_k
from moe.types import LayerContext, Routing, unless


@dataclass(frozen=True)
class TopKConfig(LinearRouterConfig):
    """Config of `TopKRouter`."""

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


class TopKRouter(LinearRouter[TopKConfig]):
    """Linear router to the K experts with the largest logits."""

    name = "topk"
    config_class = TopKConfig
    varies_top_k = True

    @property
    def weights_sum_to_one(self) -> bool:
        """See `TopKConfig.sums_to_one`."""
        return self.config.sums_to_one

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to its K best experts."""
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = score_logits(logits_TE, config.score)
            ids_TK, weights_TK = select_top_k(
                logits_TE, scores_TE, ctx.top_k(self.top_k), config.score, renormalise=config.sums_to_one
            )
            if config.order == "topk_then_score" and not config.sums_to_one:
                weights_TK = logits_TE.gather(-1, ids_TK).sigmoid()
            probs_TE = scores_TE if config.score == "softmax" else normalise_scores(logits_TE, config.score)
            losses = self.balance_losses(logits_TE, probs_TE, ids_TK, ctx)
        return Routing(
            ids_TK, weights_TK, self.num_experts, scores_TE=scores_TE, logits_TE=logits_TE, losses=losses
        )
