"""Top-k routing by a linear router: softmax before or after the selection, or sigmoid scores.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, softmax after top-k), Switch Transformers (arXiv 2101.03961,
softmax before, Eq. 4-6 for the balance loss), ST-MoE (arXiv 2202.08906, Eq. 5 for the z-loss), DeepSeek-V3
(arXiv 2412.19437, Eq. 13-15 for sigmoid scores).

Letters: T tokens, D model width, E experts, K experts a token, N of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import require
from moe.routers.linear import LinearRouter, LinearRouterConfig
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class TopKConfig(LinearRouterConfig):
    """Config of `TopKRouter`."""

    name: Literal["topk"] = "topk"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits."""
    order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    """Whether scores are taken over all experts and then selected (Mixtral's and Switch's code), or over
    the selected logits alone (Shazeer)."""
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
        """Whether the weights of a token sum to 1."""
        return self.renormalise or (self.score == "softmax" and self.order == "topk_then_score")


class TopKRouter(LinearRouter[TopKConfig]):
    """Linear router with top-k selection."""

    name = "topk"
    config_class = TopKConfig
    varies_top_k: ClassVar[bool] = True

    @property
    def weights_sum_to_one(self) -> bool:
        """See `TopKConfig.sums_to_one`."""
        return self.config.sums_to_one

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to its K best experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = self._scores(logits_TE)
            ids_TK, weights_TK = self._select(logits_TE, scores_TE, ctx.top_k(self.top_k))
            probs_TE = scores_TE if self.config.score == "softmax" else self._shares(logits_TE)
            losses = self.balance_losses(logits_TE, probs_TE, ids_TK, ctx)
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            num_experts=self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            losses=losses,
        )

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()

    def _shares(self, logits_TN: Tensor) -> Tensor:
        """The scores divided by their sum; in log space, where scores that round to zero still compare."""
        log_scores_TN = logits_TN if self.config.score == "softmax" else F.logsigmoid(logits_TN)
        return log_scores_TN.softmax(-1)

    def _select(self, logits_TE: Tensor, scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        # Selection is by logits: both score functions are monotonic, and logits tie less often.
        top_TK, ids_TK = logits_TE.topk(top_k, dim=-1, sorted=False)
        if self.config.renormalise:
            return ids_TK, self._shares(top_TK)
        if self.config.order == "topk_then_score":
            return ids_TK, self._scores(top_TK)
        return ids_TK, scores_TE.gather(-1, ids_TK)
