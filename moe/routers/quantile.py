"""Quantile balancing: thresholds follow the quantiles of the experts' scores; causal, without a loss.

Sources: Su, "MoE Odyssey" (kexue.fm 11619: K experts for every token; 11626: a token uses every expert whose
threshold it exceeds), known to us from notes, and Megatron-LM's code (``quantile_balancing``, for K experts).
Megatron does one iteration a micro-batch and, by default, keeps nothing of the old threshold: ``iterations:
1, decay: 0``. The moving average is that of 11626. Ours: five iterations, the guard for tokens without an
expert, the cap, and plain top-k until the first step has set the thresholds.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from moe.routers.base import COUNTS_SLOTS, FILED_BY_STEP
from moe.routers.configs.quantile_config import QuantileConfig
from moe.routers.projection import ProjectionRouter, log_scores, score_logits
from moe.routing.quantiles import quantile_biases, quantile_thresholds
from moe.routing.slots import coverage_metrics, shares_of_chosen, slots_of_mask
from moe.routing.step_state import MovingThreshold
from moe.types import LayerContext, Routing


class QuantileRouter(ProjectionRouter[QuantileConfig]):
    """Router that selects by score minus threshold and weighs by the score alone.

    Attributes:
        threshold: ``[E]`` thresholds beta; they have no gradient, move after optimizer steps only, and are
            saved with the model.
    """

    name = "quantile"
    config_class = QuantileConfig
    host_syncs = f"only when dynamic: {COUNTS_SLOTS}"
    compile_unsupported_reason = FILED_BY_STEP

    def create_parameters(self) -> None:
        """Registers projection and thresholds."""
        super().create_parameters()
        self.threshold = MovingThreshold(self.num_experts, self.config.share_kept)

    @property
    def weights_sum_to_one(self) -> bool:
        """True for renormalised weights: every token uses at least one expert."""
        return self.config.renormalise

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws normal weights; clears the thresholds."""
        super().reset_parameters(generator)
        self.threshold.reset()

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes by the thresholds of earlier steps; the present tokens move those of the next."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = score_logits(logits_TE, self.config.score)
            choice_TE = (logits_TE if self.config.select_by == "logits" else scores_TE).detach()
            if self.training:
                self._measure(choice_TE, ctx)
            logs_TE = log_scores(logits_TE, self.config.score)
            used_TK: Tensor | None = None
            if self.config.mode == "fixed":
                ids_TK, weights_TK, chosen_TE = self._fixed(choice_TE, scores_TE, logs_TE)
            else:
                chosen_TE = self._above(choice_TE)
                weights_TE = shares_of_chosen(logs_TE, chosen_TE) if self.config.renormalise else scores_TE
                ids_TK, weights_TK, used_TK = slots_of_mask(chosen_TE, weights_TE)
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            slot_mask_TK=used_TK,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=coverage_metrics(chosen_TE, ctx) if self.training else {},
        )

    def _margins(self, choice_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``[T, E]`` scores minus thresholds, and each token's experts by falling margin."""
        is_set = self.threshold.steps > 0
        margin_TE = choice_TE - torch.where(is_set, self.threshold.value_N, 0)
        return margin_TE, margin_TE.argsort(dim=-1, descending=True, stable=True)

    def _fixed(self, choice_TE: Tensor, scores_TE: Tensor, logs_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids, weights and mask of the K best; K is known, so the host does not wait."""
        _, order_TE = self._margins(choice_TE)
        ids_TK = order_TE[:, : self.top_k].sort(-1).values
        weights_TK = (logs_TE if self.config.renormalise else scores_TE).gather(-1, ids_TK)
        chosen_TE = torch.zeros_like(choice_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        return ids_TK, weights_TK.softmax(-1) if self.config.renormalise else weights_TK, chosen_TE

    def _above(self, choice_TE: Tensor) -> Tensor:
        """Returns ``[T, E]`` bool: above the thresholds, or the K best before the first step."""
        margin_TE, order_TE = self._margins(choice_TE)
        # The place of each expert in its token's order: 0 is the largest margin.
        place_TE = order_TE.argsort(dim=-1)
        chosen_TE = (margin_TE > 0) | (place_TE == 0)
        chosen_TE = torch.where(self.threshold.steps > 0, chosen_TE, place_TE < self.top_k)
        if self.config.max_experts is not None:
            chosen_TE &= place_TE < self.config.max_experts
        return chosen_TE

    def _measure(self, choice_TE: Tensor, ctx: LayerContext) -> None:
        mask_T = ctx.token_mask_T(len(choice_TE))
        tokens = choice_TE.new_full((), len(choice_TE)) if mask_T is None else mask_T.sum()
        if self.config.mode == "dynamic":
            found_E = quantile_thresholds(choice_TE, self.top_k, mask_T)
        else:
            start_E = self.threshold.value_N.to(choice_TE.dtype)
            found_E = quantile_biases(choice_TE, self.top_k, self.config.iterations, start_E, mask_T)
        self.threshold.measure(ctx.run, found_E, tokens)

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Moves the thresholds towards those measured in the step's micro-batches on all ranks."""
        self.threshold.move(ctx.run)
