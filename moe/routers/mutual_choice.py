"""Mutual choice: the K T best pairs of token and expert of a batch, whichever tokens and experts they join.

Source: Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders"
(arXiv 2411.02124), where the features of an autoencoder take the place of experts; BatchTopK is the same.
Reconstructed for MoEs: the scores, the guard for tokens without an expert, and the threshold that replaces
the batch in evaluation. It balances nothing: hard tokens get more experts, and popular experts more tokens.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from moe.routers.base import COUNTS_SLOTS, FILED_BY_STEP
from moe.routers.configs.mutual_choice_config import MutualChoiceConfig
from moe.routers.projection import ProjectionRouter
from moe.routing.balance import Load, switch_loss
from moe.routing.quantiles import top_thresholds
from moe.routing.slots import chosen_load, coverage_metrics, slots_of_mask
from moe.routing.step_state import MovingThreshold
from moe.types import LayerContext, Routing


class MutualChoiceRouter(ProjectionRouter[MutualChoiceConfig]):
    """Router with one threshold for all pairs: the micro-batch's in training, the past's in evaluation.

    Attributes:
        threshold: The one threshold; it moves after optimizer steps only and is saved with the model.
    """

    name = "mutual_choice"
    config_class = MutualChoiceConfig
    host_syncs = COUNTS_SLOTS
    compile_unsupported_reason = FILED_BY_STEP

    def create_parameters(self) -> None:
        """Registers projection and threshold."""
        super().create_parameters()
        self.threshold = MovingThreshold(1, self.config.decay)

    @property
    def weights_sum_to_one(self) -> bool:
        """False: the number of experts varies, and scores are not renormalised."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws normal weights; clears the threshold."""
        super().reset_parameters(generator)
        self.threshold.reset()

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes the best pairs; in evaluation those above the threshold, or top-k before the first step."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            probs_TE = logits_TE.softmax(-1)
            scores_TE = probs_TE if self.config.score == "softmax" else logits_TE.sigmoid()
            losses: dict[str, Tensor] = {}
            if self.training:
                chosen_TE = self._best_pairs(scores_TE.detach(), ctx)
                if self.config.balance_coef:
                    losses["balance"] = self._balance(probs_TE, chosen_TE, ctx)
            else:
                chosen_TE = self._above_threshold(scores_TE)
            ids_TK, weights_TK, used_TK = slots_of_mask(chosen_TE, scores_TE)
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            slot_mask_TK=used_TK,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            losses=losses,
            metrics=coverage_metrics(chosen_TE, ctx) if self.training else {},
        )

    def _guarded(self, chosen_TE: Tensor, scores_TE: Tensor) -> Tensor:
        if not self.config.at_least_one:
            return chosen_TE
        return chosen_TE.scatter(1, scores_TE.argmax(-1, keepdim=True), True)

    def _best_pairs(self, scores_TE: Tensor, ctx: LayerContext) -> Tensor:
        T, E = scores_TE.shape
        if T == 0:
            return torch.zeros_like(scores_TE, dtype=torch.bool)
        mask_T = ctx.token_mask_T(T)
        tokens = torch.full((), T, device=scores_TE.device) if mask_T is None else mask_T.sum()
        real_TE = scores_TE if mask_T is None else scores_TE.masked_fill(~mask_T[:, None], -torch.inf)
        flat_N = real_TE.reshape(-1)
        # Chosen by place, not by threshold: scores may tie, and the budget must hold.
        order_M = flat_N.topk(self.top_k * T).indices
        within_M = torch.arange(len(order_M), device=flat_N.device) < self.top_k * tokens
        chosen_TE = torch.zeros_like(flat_N, dtype=torch.bool).scatter_(0, order_M, within_M).view(T, E)
        found_1 = top_thresholds(flat_N[:, None], self.top_k * tokens, self.top_k * T)
        self.threshold.measure(ctx.run, found_1, tokens)
        return self._guarded(chosen_TE, scores_TE)

    def _above_threshold(self, scores_TE: Tensor) -> Tensor:
        best_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        best_TE = best_TE.scatter(1, scores_TE.topk(self.top_k, dim=-1).indices, True)
        above_TE = self._guarded(scores_TE > self.threshold.value_N, scores_TE)
        return torch.where(self.threshold.steps > 0, above_TE, best_TE)

    def _balance(self, probs_TE: Tensor, chosen_TE: Tensor, ctx: LayerContext) -> Tensor:
        load: Load = chosen_load(chosen_TE, ctx)
        return self.config.balance_coef * switch_loss(load, probs_TE, ctx.token_mask_T(len(probs_TE)))

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Moves the threshold towards those of the step's micro-batches on all ranks."""
        self.threshold.move(ctx.run)
