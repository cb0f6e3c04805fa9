"""Base of the routers for experts that divide a dense network: chosen experts begin at weight 1.

Divided experts are summed, not averaged. The weight is ``1 + u_e p_e`` with p the softmax of the scores and u
learned from 0, so that the MoE begins as the sum of the chosen neurons (CMoE, arXiv 2502.04416).

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor, nn

from moe.routers.base import FILED_BY_STEP, Router
from moe.routers.configs.unit_gate_config import UnitGateConfig
from moe.routing.balance import count_load, switch_loss
from moe.routing.load_bias import LoadBias
from moe.types import LayerContext, Routing

UnitGateConfigT = TypeVar("UnitGateConfigT", bound=UnitGateConfig)


class UnitGateRouter(Router[UnitGateConfigT], Generic[UnitGateConfigT]):
    """Router that chooses by probability plus bias and weighs by ``1 + u p``.

    Attributes:
        gain_E: ``[E]`` u.
        load_bias: Bias on the choice, which moves towards even load.
    """

    compile_unsupported_reason = FILED_BY_STEP

    def create_parameters(self) -> None:
        """Registers gains and bias."""
        self.gain_E = nn.Parameter(torch.zeros(self.num_experts))
        self.load_bias = LoadBias(self.num_experts, self.config.bias_rate)

    @property
    def weights_sum_to_one(self) -> bool:
        """False: they sum to about K."""
        return False

    @property
    def weighs_one(self) -> bool:
        """True until u moves."""
        return not bool(self.gain_E.any())

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the rows; sets u and bias to 0."""
        for name, parameter in self.named_parameters():
            if name == "gain_E":
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.init_std, generator=generator)
        self.load_bias.bias_E.zero_()

    @abstractmethod
    def scores(self, x_TD: Tensor) -> Tensor:
        """Computes the ``[T, E]`` scores in at least fp32."""

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the K experts of highest probability plus bias."""
        losses: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = self.scores(x_TD)
            probs_TE = scores_TE.softmax(-1)
            choice_TE = probs_TE.detach() + self.load_bias.bias_E
            if not self.config.bias_rate:
                choice_TE = scores_TE.detach()  # the same order, and probabilities may tie by rounding
            ids_TK = choice_TE.topk(ctx.top_k(self.top_k), dim=-1).indices
            weights_TK = 1 + self.gain_E.to(probs_TE.dtype)[ids_TK] * probs_TE.gather(-1, ids_TK)
            if self.training and self.config.balance_coef:
                mask_T = ctx.token_mask_T(len(ids_TK))
                load = count_load(ids_TK, self.num_experts, mask_T, ctx.run.group)
                losses["balance"] = self.config.balance_coef * switch_loss(load, probs_TE, mask_T)
        if self.training:
            self.load_bias.count(ids_TK, ctx)
        return Routing(
            ids_TK, weights_TK, self.num_experts, scores_TE=probs_TE, logits_TE=scores_TE, losses=losses
        )

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Moves the bias towards even load."""
        self.load_bias.move(ctx)
