"""Expert choice: every expert takes its best tokens, so that load is perfect and no loss is needed.

Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368, Section 3.2:
scores S = softmax(X W), then the top k = n c / e tokens of each column).

Which tokens an expert takes depends on all tokens, later ones too: a language model that is trained this
way sees the future, and generates from another distribution. Use it for encoders, diffusion and vision.

Letters: T tokens, D model width, E experts, K slots a token, B sequences, S tokens a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.routers.projection import ProjectionConfig, ProjectionRouter
from moe.routing.chosen import (
    coverage_metrics,
    sequence_shape,
    shares_of_chosen,
    slots_of_mask,
    top_of_sequences,
)
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class ExpertChoiceConfig(ProjectionConfig):
    """Config of `ExpertChoiceRouter`. ``top_k`` is c: an expert takes ceil(c T / E) tokens."""

    name: Literal["expert_choice"] = "expert_choice"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits; softmax is over the experts of a token."""
    scope: Literal["micro_batch", "sequence"] = "micro_batch"
    """Whether an expert takes its tokens from the whole micro-batch of a rank or from each sequence."""
    renormalise: bool = False
    """Divide a token's scores by their sum over the experts that took it. The paper does not."""


class ExpertChoiceRouter(ProjectionRouter[ExpertChoiceConfig]):
    """Each expert takes the tokens that score highest for it; a token is taken by none, some or all."""

    name = "expert_choice"
    config_class = ExpertChoiceConfig
    host_syncs: ClassVar[str | None] = (
        "K, the slots of a token, is the most experts that any token of the batch uses: asked once a pass"
    )
    is_causal = False

    def __init__(self, config: ExpertChoiceConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.reset_parameters()

    @property
    def weights_sum_to_one(self) -> bool:
        """False: tokens that no expert takes have no weight at all."""
        return False

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes by column: also in evaluation, and a single token goes to every expert."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()
            chosen_TE = self._choose(scores_TE.detach(), ctx)
            weights_TE = scores_TE
            if self.config.renormalise:
                # In log space, where scores that round to zero still compare.
                logs_TE = logits_TE if self.config.score == "softmax" else F.logsigmoid(logits_TE)
                weights_TE = shares_of_chosen(logs_TE, chosen_TE)
            ids_TK, weights_TK, used_TK = slots_of_mask(chosen_TE, weights_TE)
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            num_experts=self.num_experts,
            slot_mask_TK=used_TK,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=coverage_metrics(chosen_TE, ctx) if self.training else {},
        )

    def _choose(self, scores_TE: Tensor, ctx: LayerContext) -> Tensor:
        """``[T, E]`` bool: whether the expert takes the token."""
        T, E = scores_TE.shape
        B, S = sequence_shape(T, ctx) if self.config.scope == "sequence" else (1, T)
        mask_T = ctx.token_mask_T(T)
        real_BS = None if mask_T is None else mask_T.view(B, S)
        return top_of_sequences(scores_TE.view(B, S, E), real_BS, Fraction(self.top_k, E)).view(T, E)
