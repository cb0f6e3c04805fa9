"""S-BASE: BASE layers with Sinkhorn's iteration in place of the auction.

Sources: Clark et al. 2022 (arXiv 2202.01169), whose text we did not have; the order of updates, 3 iterations
and the sigmoid weight are those of sigma-MoE's re-implementation (arXiv 2310.10837). That code adds up
potentials that its loop subtracts, which stalls; the iteration here is the standard one.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.errors import require
from moe.routers.assigned import AssignedConfig, AssignedRouter
from moe.routing.token_mean import figure_mean
from moe.routing.transport import SinkhornRule, sinkhorn
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class SBaseConfig(AssignedConfig):
    """Config of `SBaseRouter`."""

    name: Literal["s_base"] = "s_base"
    top_k: int = 1
    """Experts a token."""
    iterations: int = 3
    """Sinkhorn iterations, always all of them: nothing waits for the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (self.iterations >= 1, "iterations", "without one nothing is balanced", "Set it to 1 or more."),
        )


class SBaseRouter(AssignedRouter[SBaseConfig]):
    """Training: top-k of the transport plan of the logits at temperature 1. Inference: top-k of the logits.

    Weights are the sigmoid of the raw logit, for any number of experts a token.
    """

    name = "s_base"
    config_class = SBaseConfig

    @property
    def weights_sum_to_one(self) -> bool:
        """Never: each weight is a sigmoid of its own."""
        return False

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to K experts."""
        metrics: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = logits_TE.sigmoid()
            choice_TE = logits_TE.detach()
            if self.training:
                choice_TE, metrics = self._balanced(choice_TE, ctx)
            ids_TK = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=scores_TE.gather(-1, ids_TK),
            num_experts=self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=metrics,
        )

    @torch.no_grad()
    def _balanced(self, logits_TE: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        mask_T = ctx.token_mask_T(len(logits_TE))
        rule = SinkhornRule(self.config.iterations, tolerance=None, rows_last=False)
        found = sinkhorn(logits_TE, rule, mask_T=mask_T, group=ctx.run.group)
        choice_TE = logits_TE + found.column_E
        agreement = figure_mean((choice_TE.argmax(-1) == logits_TE.argmax(-1)).float(), ctx)
        return choice_TE, {"choice_agreement": agreement}
