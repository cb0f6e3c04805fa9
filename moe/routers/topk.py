"""Top-k routing by a linear map: softmax before or after the selection, or sigmoid scores.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, softmax after top-k), Switch Transformers (arXiv 2101.03961,
softmax before, Eq. 4-6 for the balance loss), ST-MoE (arXiv 2202.08906, Eq. 5 for the z-loss), DeepSeek-V3
(arXiv 2412.19437, Eq. 13-15 for sigmoid scores).

Letters: T tokens, D model width, E experts, K experts a token, N of either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routers.configs.topk_config import TopKConfig
from moe.routers.linear import LinearRouter
from moe.routers.projection import normalise_scores, score_logits, select_top_k
from moe.types import LayerContext, Routing


class TopKRouter(LinearRouter[TopKConfig]):
    """Linear router to the K experts with the largest logits."""

    name = "topk"
    config_class = TopKConfig

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
