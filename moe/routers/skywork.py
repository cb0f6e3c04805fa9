"""Skywork-MoE's routing: normalised logits, and a balance coefficient that tracks each layer's imbalance.

Source: Skywork-MoE (arXiv 2406.06563, sections on gating logit normalisation and adaptive auxiliary loss
coefficients). Lambda = 1, xi = 1/5, alpha_max = 0.01, beta = 0.99, the router's bias, the renormalised
weights and the loss of Eq. 4 are the report's. Ours: the standard deviation is the population's, and the drop
rate is computed as if experts had a capacity.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from moe.routers.base import FILED_BY_STEP
from moe.routers.configs.skywork_config import SkyworkConfig
from moe.routers.linear import LinearRouter
from moe.routers.projection import select_top_k
from moe.routing.balance import count_load
from moe.routing.load_importance import importance_loss
from moe.routing.step_state import Fp32Buffers, StepSums
from moe.types import LayerContext, Routing

# Below a standard deviation of 0.001 the normalisation fades, so that noise is not amplified into a decision.
_VARIANCE_FLOOR = 1e-6


class SkyworkRouter(Fp32Buffers, LinearRouter[SkyworkConfig]):
    """Router by top-k of ``softmax(lambda (z - mean) / std)``, with mean and std over a token's logits.

    Attributes:
        bias_E: ``[E]``; None without ``bias``.
        balance_alpha: ``[1]`` fp32, the present balance coefficient; saved with the model.
    """

    name = "skywork"
    config_class = SkyworkConfig
    compile_unsupported_reason = FILED_BY_STEP
    fp32_buffers: ClassVar[tuple[str, ...]] = ("balance_alpha",)
    balance_alpha: Tensor

    def create_parameters(self) -> None:
        """Registers projection, bias and balance coefficient."""
        super().create_parameters()
        self.bias_E = nn.Parameter(torch.empty(self.num_experts)) if self.config.bias else None
        alpha = torch.full((1,), self.config.balance_coef, dtype=torch.float32)
        self.register_buffer("balance_alpha", alpha)
        self._slots = StepSums()

    @property
    def weights_sum_to_one(self) -> bool:
        """True for renormalised weights."""
        return self.config.renormalise

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws normal weights; sets the bias to 0 and the balance coefficient to the config's."""
        super().reset_parameters(generator)
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)
        self.balance_alpha.fill_(self.config.balance_coef)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to its K best experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            normalised_TE = normalise_logits(logits_TE, self.config.logit_scale)
            probs_TE = normalised_TE.softmax(-1)
            ids_TK, weights_TK = select_top_k(
                normalised_TE, probs_TE, ctx.top_k(self.top_k), renormalise=self.config.renormalise
            )
            losses = self.balance_losses(logits_TE, probs_TE, ids_TK, ctx)
            if "balance" in losses:
                factor = self.balance_alpha[0].to(probs_TE.dtype) / self.config.balance_coef
                losses["balance"] = losses["balance"] * factor
        if self.training and self._adapts:
            counts_E = count_load(ids_TK, self.num_experts, ctx.token_mask_T(len(ids_TK))).counts_E
            self._slots.write(ctx.run, counts_E)
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            scores_TE=probs_TE,
            logits_TE=logits_TE,
            losses=losses,
            # A copy, as the buffer moves after the step that is reported.
            metrics={"balance_alpha": self.balance_alpha[0].clone()} if self._adapts else {},
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """Returns the logits, with the bias."""
        logits_TE = super().logits(x_TD)
        return logits_TE if self.bias_E is None else logits_TE + self.bias_E.to(logits_TE.dtype)

    def balance_value(self, probs_TE: Tensor, ids_TK: Tensor, ctx: LayerContext) -> Tensor:
        """Computes the report's loss, or the Switch loss."""
        if self.config.balance_form == "switch":
            return super().balance_value(probs_TE, ids_TK, ctx)
        # As probabilities sum to 1, sum (1/E - P)^2 is their squared coefficient of variation over E.
        scope = self.config.balance_scope
        return importance_loss(scope, probs_TE, ctx, self._load_history) / self.num_experts

    @property
    def _adapts(self) -> bool:
        return self.config.adaptive and self.config.balance_coef > 0

    @torch.no_grad()
    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Sets ``alpha = beta alpha + (1 - beta) min(xi d, alpha_max)`` with d the step's drop rate."""
        config, group = self.config, ctx.run.group
        if not self._adapts:
            return
        taken_E = self._slots.take()
        zeros_E = torch.zeros(self.num_experts, device=self.balance_alpha.device)
        counts_E = zeros_E if taken_E is None else taken_E
        if group is not None:
            torch.distributed.all_reduce(counts_E, group=group)
        dropped = drop_rate(counts_E, config.capacity_factor)
        target = (config.sensitivity * dropped).clamp_max(config.balance_coef_max)
        # A step without tokens leaves the coefficient unchanged.
        moved = self.balance_alpha.lerp(target, 1 - config.momentum)
        self.balance_alpha.copy_(torch.where(counts_E.sum() > 0, moved, self.balance_alpha))


def normalise_logits(logits_TE: Tensor, scale: float) -> Tensor:
    """Computes ``scale (z - mean) / std`` over each token's finite logits; -infinity stays.

    Args:
        logits_TE: ``[T, E]``.
        scale: Lambda.
    """
    finite_TE = logits_TE.isfinite()
    num_T1 = finite_TE.sum(-1, keepdim=True).clamp_min(1)
    known_TE = logits_TE.masked_fill(~finite_TE, 0)
    centred_TE = (known_TE - known_TE.sum(-1, keepdim=True) / num_T1).masked_fill(~finite_TE, 0)
    variance_T1 = centred_TE.square().sum(-1, keepdim=True) / num_T1
    normalised_TE = scale * centred_TE * (variance_T1 + _VARIANCE_FLOOR).rsqrt()
    return normalised_TE.masked_fill(~finite_TE, -torch.inf)


def drop_rate(counts_E: Tensor, capacity_factor: float) -> Tensor:
    """Computes the share of slots above ``capacity_factor`` times the even load; 0 without slots."""
    over_E = (counts_E - capacity_factor * counts_E.mean()).clamp_min(0)
    return over_E.sum() / counts_E.sum().clamp_min(1)
