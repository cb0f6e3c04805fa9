"""Base of the linear routers that train with balance losses: Switch, importance and z-loss.

Letters: T tokens, D model width, E experts, K experts a token, N of either.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from moe.routers.configs.linear_config import LinearRouterConfig
from moe.routers.projection import ProjectionRouter
from moe.routing.balance import balance_loss, count_load, z_loss
from moe.routing.load_importance import importance_loss
from moe.routing.step_state import StepSums
from moe.types import LayerContext

LinearConfigT = TypeVar("LinearConfigT", bound=LinearRouterConfig)


class LinearRouter(ProjectionRouter[LinearConfigT], Generic[LinearConfigT]):
    """Router whose logits are ``x W^T``, with the Switch, importance and z-losses."""

    def create_parameters(self) -> None:
        """Registers the projection and the sums over a step."""
        super().create_parameters()
        self._load_history = StepSums()
        self._importance_history = StepSums()

    def balance_value(self, probs_TE: Tensor, ids_TK: Tensor, ctx: LayerContext) -> Tensor:
        """Computes the balance loss without its coefficient; the Switch loss unless a router has another."""
        return balance_loss(self.config.balance_scope, probs_TE, ids_TK, ctx, self._load_history)

    def balance_losses(
        self,
        logits_TE: Tensor,
        probs_TE: Tensor,
        ids_TK: Tensor,
        ctx: LayerContext,
        gates_TE: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the losses that the config asks for, times their coefficients; none in evaluation.

        Args:
            logits_TE: Logits, for the z-loss.
            probs_TE: Probabilities that sum to 1 over E; they carry the gradient of the balance loss.
            ids_TK: The chosen experts.
            ctx: Padding, ranks, and the shape of the batch.
            gates_TE: Gates whose sum is the importance; the probabilities if None.
        """
        if not self.training:
            return {}
        losses: dict[str, Tensor] = {}
        config, mask_T = self.config, ctx.token_mask_T(len(ids_TK))
        if config.balance_coef:
            losses["balance"] = config.balance_coef * self.balance_value(probs_TE, ids_TK, ctx)
        if config.importance_coef:
            gates_TE = probs_TE if gates_TE is None else gates_TE
            value = importance_loss(config.balance_scope, gates_TE, ctx, self._importance_history)
            losses["importance"] = config.importance_coef * value
        if config.z_coef:
            load = count_load(ids_TK, self.num_experts, mask_T, ctx.run.group)
            losses["z"] = config.z_coef * z_loss(logits_TE, load.tokens_per_rank, mask_T)
        return losses
