"""Mixture of Depths around the feed-forward network: only some tokens of each sequence use experts.

Source: Raposo et al., "Mixture-of-Depths" (arXiv 2404.02258, Eq. 1 for the gate, Section 3.5 for a
predictor of membership); with experts inside it is their integrated form. There whole blocks are skipped,
attention included, in every second layer (``upcycle.layers=every:2``); here attention always runs.
Reconstructed: all constants but the capacity of 12.5 percent, and that the predictor is linear.

Training takes the best tokens of a sequence, which depends on later ones. Evaluation asks a predictor of
membership that sees one token alone, and so is causal; it meets the capacity only in the mean.

Letters: T tokens, D model width, E experts, K experts a token that is taken, B sequences, S tokens a
sequence.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from moe.routers.configs.mod_config import MoDConfig
from moe.routers.projection import ProjectionRouter
from moe.routing.balance import count_load, figure_mean, loss_mean, switch_loss
from moe.routing.slots import sequence_shape, top_of_sequences
from moe.types import LayerContext, Routing


class MoDRouter(ProjectionRouter[MoDConfig]):
    """Router that takes the best tokens of each sequence to K experts; the rest stay on the residual alone.

    Attributes:
        take_D: ``[D]`` weight of the score r of taking a token.
        predictor_D: ``[D]`` weight of the predictor of membership.
        predictor_bias: ``[1]``.
    """

    name = "mod"
    config_class = MoDConfig

    def create_parameters(self) -> None:
        """Registers projection, score and predictor."""
        super().create_parameters()
        self.take_D = nn.Parameter(torch.empty(self.model_width))
        self.predictor_D = nn.Parameter(torch.empty(self.model_width))
        self.predictor_bias = nn.Parameter(torch.empty(1))

    @property
    def weights_sum_to_one(self) -> bool:
        """False: most tokens have no weight."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws weights, normal with ``init_std``; sets the predictor's bias to 0."""
        super().reset_parameters(generator)
        for weight in (self.take_D, self.predictor_D):
            nn.init.normal_(weight, std=self.config.init_std, generator=generator)
        nn.init.zeros_(self.predictor_bias)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Takes tokens by rank within the sequence in training, by the predictor in evaluation."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            score_T = x_TD @ self.take_D.to(x_TD.dtype)
            guess_T = x_TD.detach() @ self.predictor_D.to(x_TD.dtype) + self.predictor_bias.to(x_TD.dtype)
            taken_T = self._best(score_T.detach(), ctx) if self.training else guess_T > 0
            logits_TE = self.logits(x_TD)
            probs_TE = logits_TE.softmax(-1)
            ids_TK = logits_TE.topk(ctx.top_k(self.top_k), dim=-1).indices
            gate_T = score_T if self.config.gate == "linear" else score_T.sigmoid()
            weights_TK = gate_T[:, None] * probs_TE.gather(-1, ids_TK)
            losses = self._losses(guess_T, taken_T, probs_TE, ids_TK, ctx) if self.training else {}
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            slot_mask_TK=taken_T[:, None].expand_as(ids_TK),
            scores_TE=probs_TE,
            logits_TE=logits_TE,
            losses=losses,
            metrics=self._metrics(guess_T, taken_T, ctx) if self.training else {},
        )

    def _best(self, score_T: Tensor, ctx: LayerContext) -> Tensor:
        """Returns ``[T]`` bool, True for the best tokens of each sequence."""
        B, S = sequence_shape(len(score_T), ctx)
        mask_T = ctx.token_mask_T(len(score_T))
        real_BS = None if mask_T is None else mask_T.view(B, S)
        share = Fraction(self.config.capacity).limit_denominator(10**6)
        return top_of_sequences(score_T.view(B, S, 1), real_BS, share).view(-1)

    def _losses(
        self, guess_T: Tensor, taken_T: Tensor, probs_TE: Tensor, ids_TK: Tensor, ctx: LayerContext
    ) -> dict[str, Tensor]:
        config = self.config
        losses: dict[str, Tensor] = {}
        if config.predictor_coef:
            values_T = F.binary_cross_entropy_with_logits(
                guess_T, taken_T.to(guess_T.dtype), reduction="none"
            )
            losses["predictor"] = config.predictor_coef * loss_mean(values_T, ctx)
        if config.balance_coef:
            # Only real tokens are taken, so this mask covers padding as well.
            load = count_load(ids_TK, self.num_experts, taken_T, ctx.run.group)
            losses["balance"] = config.balance_coef * switch_loss(load, probs_TE, taken_T)
        return losses

    def _metrics(self, guess_T: Tensor, taken_T: Tensor, ctx: LayerContext) -> dict[str, Tensor]:
        right_T = ((guess_T > 0) == taken_T).float()
        return {
            "uncovered": figure_mean((~taken_T).float(), ctx),
            "predictor_right": figure_mean(right_T, ctx),
        }
