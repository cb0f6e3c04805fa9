"""ReMoE: the gates are ReLUs, so that routing is differentiable and the number of experts per token varies.

Source: Wang, Zhu and Chen, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing" (arXiv
2412.14711, Eq. 5 for the gate, 7-9 for the penalty and its controller); thu-ml/ReMoE for the constants.
There one penalty serves all layers and follows their mean sparsity; here every layer has its own and settles
at K.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from moe.routers.base import COUNTS_SLOTS, FILED_BY_STEP
from moe.routers.configs.relu_config import _PENALTY_RANGE, ReLUConfig
from moe.routers.projection import ProjectionRouter
from moe.routing.balance import Load
from moe.routing.slots import chosen_load, coverage_metrics, slots_of_gates
from moe.routing.step_state import Fp32Buffers, StepSums
from moe.types import LayerContext, Routing


class ReLURouter(Fp32Buffers, ProjectionRouter[ReLUConfig]):
    """Router to the experts with a positive logit, weighed by it; tokens start with half of the experts.

    Attributes:
        penalty: fp32 scalar, lambda; it moves after optimizer steps only and is saved with the model.
    """

    name = "relu"
    config_class = ReLUConfig
    host_syncs = COUNTS_SLOTS
    compile_unsupported_reason = FILED_BY_STEP
    fp32_buffers: ClassVar[tuple[str, ...]] = ("penalty",)
    penalty: Tensor

    def create_parameters(self) -> None:
        """Registers projection and penalty."""
        super().create_parameters()
        self.register_buffer("penalty", torch.tensor(self.config.penalty_init))
        self._sums = StepSums()

    @property
    def weights_sum_to_one(self) -> bool:
        """False: a ReLU takes any value from 0 up."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws normal weights; sets the penalty to the config's."""
        super().reset_parameters(generator)
        self.penalty.fill_(self.config.penalty_init)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to the experts whose gate is open, possibly none or all."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            gates_TE = logits_TE.relu()
            ids_TK, weights_TK, used_TK = slots_of_gates(gates_TE)
            losses, metrics = self._regularise(gates_TE, ctx) if self.training else ({}, {})
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            slot_mask_TK=used_TK,
            scores_TE=gates_TE,
            logits_TE=logits_TE,
            losses=losses,
            metrics=metrics,
        )

    def _regularise(self, gates_TE: Tensor, ctx: LayerContext) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        chosen_TE = gates_TE.detach() > 0
        load = chosen_load(chosen_TE, ctx)
        ranks = 1 if ctx.run.group is None else ctx.run.group.size()
        tokens = load.tokens_per_rank * ranks
        self._sums.write(ctx.run, torch.stack([load.num_slots, tokens]))
        mask_T = ctx.token_mask_T(len(gates_TE))
        value = self.penalty * relu_penalty(gates_TE, load, tokens, self._penalty_top_k, mask_T)
        metrics = coverage_metrics(chosen_TE, ctx) | {"penalty": self.penalty.clone()}
        return {"sparsity": value}, metrics

    @property
    def _penalty_top_k(self) -> int | None:
        return self.top_k if self.config.penalty_by_load else None

    @torch.no_grad()
    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Raises the penalty if the step's tokens on all ranks used more than K experts on average."""
        sums = self._sums.take()
        if sums is None:
            return
        used, tokens = sums
        factor = self.config.penalty_factor
        # Sparsity below 1 - K/E is the same as more than K experts per token.
        moved = torch.where(used > self.top_k * tokens, self.penalty * factor, self.penalty / factor)
        moved = torch.where(tokens > 0, moved, self.penalty)
        self.penalty.copy_(moved.clamp(*_PENALTY_RANGE))


def relu_penalty(
    gates_TE: Tensor, load: Load, tokens: Tensor, top_k: int | None, mask_T: Tensor | None = None
) -> Tensor:
    """Computes ``E / (K T^2) sum_e count_e sum_t g_te`` (Eq. 9), or the token mean of ``sum_e g_te`` (Eq. 7).

    Args:
        gates_TE: ``[T, E]`` gates; they carry the gradient.
        load: Number of open gates of each expert over all ranks.
        tokens: Real tokens over all ranks.
        top_k: K; None for Eq. 7, which leaves the load out.
        mask_T: ``[T]`` bool, True for real tokens.

    Returns:
        A scalar, without coefficient.
    """
    if mask_T is not None:
        gates_TE = gates_TE * mask_T[:, None]
    mean_E = gates_TE.sum(0) / load.tokens_per_rank.clamp_min(1)
    if top_k is None:
        return mean_E.sum()
    share_E = load.counts_E * (gates_TE.shape[1] / top_k) / tokens.clamp_min(1)
    return (share_E * mean_E).sum()
