"""Weights of ``1 + logit`` from a router of zeros: experts begin as a plain sum, and the gradient flows.

Source: He et al. 2025 (arXiv 2512.02351, sparsity in unified multimodal models). There, zeros tie, so that
all tokens take the first K experts until the router moves; here a fixed random projection of the token breaks
ties, too small to matter beside a learned logit.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from moe.routers.configs.one_plus_config import OnePlusConfig
from moe.routers.linear import LinearRouter
from moe.routers.projection import linear_logits
from moe.types import LayerContext, Routing


class OnePlusRouter(LinearRouter[OnePlusConfig]):
    """Router by top-k of raw logits, with weights ``1 + logit``.

    Attributes:
        tie_ED: ``[E, D]`` projection that breaks ties: fixed, saved with the model.
    """

    name = "one_plus"
    config_class = OnePlusConfig
    tie_ED: Tensor

    def create_parameters(self) -> None:
        """Registers projection and tie breaker."""
        super().create_parameters()
        self.register_buffer("tie_ED", torch.zeros(self.num_experts, self.model_width))

    @property
    def weights_sum_to_one(self) -> bool:
        """False: they sum to about K."""
        return False

    @property
    def weighs_one(self) -> bool:
        """True until the weights move."""
        return not bool(self.weight_ED.any())

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Zeroes the weights; draws the tie breaker."""
        self.weight_ED.zero_()
        self.tie_ED.normal_(std=self.config.init_std, generator=generator)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to its K best experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            choice_TE = logits_TE.detach() + linear_logits(x_TD, self.tie_ED)
            ids_TK = choice_TE.topk(ctx.top_k(self.top_k), dim=-1).indices
            weights_TK = 1 + logits_TE.gather(-1, ids_TK)
            losses = self.balance_losses(logits_TE, logits_TE.softmax(-1), ids_TK, ctx)
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            scores_TE=logits_TE.softmax(-1),
            logits_TE=logits_TE,
            losses=losses,
        )
