"""Sigma-MoE-Tiny's router: one of many experts, balanced by a loss that flat probabilities cannot satisfy.

Source: Sigma-MoE-Tiny (arXiv 2512.16248) and its project page for the loss. Reconstructed: that the
temperature belongs to the loss alone, and the gates are the plain softmax.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routers.configs.sigma_config import SigmaConfig
from moe.routers.projection import ProjectionRouter
from moe.routing.balance import top1_loss
from moe.types import LayerContext, Routing


class SigmaRouter(ProjectionRouter[SigmaConfig]):
    """Router by top-k softmax probability, not renormalised, with the Top-1 balance loss over all ranks."""

    name = "sigma"
    config_class = SigmaConfig

    @property
    def weights_sum_to_one(self) -> bool:
        """False: a weight is a probability, so that a single expert has a gradient, too."""
        return False

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to its K best experts."""
        losses: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = logits_TE.softmax(-1)
            ids_TK = logits_TE.topk(ctx.top_k(self.top_k), dim=-1).indices
            if self.training and self.config.top1_coef:
                sharp_TE = (logits_TE / self.config.temperature).softmax(-1)
                value = top1_loss(sharp_TE, ids_TK, ctx.token_mask_T(len(ids_TK)), ctx.run.group)
                losses["top1"] = self.config.top1_coef * value
        return Routing(
            ids_TK,
            scores_TE.gather(-1, ids_TK),
            self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            losses=losses,
        )
