"""Base of the routers that Sinkhorn's iteration balances in training; it takes the place of a balance loss.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic

import torch
from torch import Tensor

from moe.routers.projection import ProjectionConfigT, ProjectionRouter
from moe.routing.balance import figure_mean
from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import sinkhorn
from moe.types import LayerContext, Routing


class AssignedRouter(ProjectionRouter[ProjectionConfigT], Generic[ProjectionConfigT]):
    """Router by top-k of the logits' transport plan (temperature 1) in training, of the logits otherwise."""

    @property
    @abstractmethod
    def rule(self) -> SinkhornRule:
        """Order and stop of Sinkhorn's iteration."""

    @abstractmethod
    def scores(self, logits_TE: Tensor) -> Tensor:
        """Computes the ``[T, E]`` combine weights that experts have if they are chosen."""

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to K experts."""
        metrics: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = self.scores(logits_TE)
            choice_TE = logits_TE.detach()
            if self.training:
                choice_TE, metrics = self._balanced(choice_TE, ctx)
            ids_TK = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(-1, ids_TK)
        return Routing(
            ids_TK, weights_TK, self.num_experts, scores_TE=scores_TE, logits_TE=logits_TE, metrics=metrics
        )

    @torch.no_grad()
    def _balanced(self, logits_TE: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        mask_T, rule = ctx.token_mask_T(len(logits_TE)), self.rule
        found = sinkhorn(logits_TE, rule, mask_T=mask_T, group=ctx.run.group)
        # A row's own potential does not change the order within the row.
        choice_TE = logits_TE + found.column_E
        agreement = figure_mean((choice_TE.argmax(-1) == logits_TE.argmax(-1)).float(), ctx)
        metrics = {"choice_agreement": agreement}
        if rule.tolerance is not None:
            metrics["sinkhorn_iterations"] = found.iterations.to(agreement)
        return choice_TE, metrics
