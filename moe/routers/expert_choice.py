"""Expert choice: every expert takes its best tokens; load is perfectly even and no loss is needed.

Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368, Section 3.2:
scores S = softmax(X W), then the top k = n c / e tokens of each column).

An expert's choice depends on all tokens, later ones included: a language model trained this way sees the
future, and generates from another distribution. Use it for encoders, diffusion and vision.

Letters: T tokens, D model width, E experts, K slots a token, B sequences, S tokens a sequence.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from moe.routers.base import COUNTS_SLOTS
from moe.routers.configs.expert_choice_config import ExpertChoiceConfig
from moe.routers.projection import ProjectionRouter, log_scores, score_logits
from moe.routing.slots import (
    coverage_metrics,
    sequence_shape,
    shares_of_chosen,
    slots_of_mask,
    top_of_sequences,
)
from moe.types import LayerContext, Routing


class ExpertChoiceRouter(ProjectionRouter[ExpertChoiceConfig]):
    """Router in which each expert takes its highest-scoring tokens; none, some or all may take a token."""

    name = "expert_choice"
    config_class = ExpertChoiceConfig
    host_syncs = COUNTS_SLOTS
    is_causal = False

    @property
    def weights_sum_to_one(self) -> bool:
        """False: tokens that no expert takes have no weight."""
        return False

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes by column, in evaluation as well, where a single token goes to every expert."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = score_logits(logits_TE, self.config.score)
            chosen_TE = self._choose(scores_TE.detach(), ctx)
            weights_TE = scores_TE
            if self.config.renormalise:
                weights_TE = shares_of_chosen(log_scores(logits_TE, self.config.score), chosen_TE)
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

    def _choose(self, scores_TE: Tensor, ctx: LayerContext) -> Tensor:
        """Returns ``[T, E]`` bool, True where the expert takes the token."""
        T, E = scores_TE.shape
        B, S = sequence_shape(T, ctx) if self.config.scope == "sequence" else (1, T)
        mask_T = ctx.token_mask_T(T)
        real_BS = None if mask_T is None else mask_T.view(B, S)
        return top_of_sequences(scores_TE.view(B, S, E), real_BS, Fraction(self.top_k, E)).view(T, E)
