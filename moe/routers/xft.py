"""XFT's gate, which learns how much to leave the dense path: the first expert always runs, the others share.

With p the softmax over the other experts and m its largest value, the first expert weighs 1 - m, and the
K - 1 best of the others m times the softmax of their p. Weights sum to 1: copies are exact.

Source: Ding et al. 2024 (XFT, arXiv 2404.15247), upcycling with a shared expert and routing weight
normalisation.

Letters: T tokens, D model width, E experts, K experts a token, O = E - 1 others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routers.configs.xft_config import XFTConfig
from moe.routers.linear import LinearRouter
from moe.types import LayerContext, Routing


class XFTRouter(LinearRouter[XFTConfig]):
    """Router to expert 0 and the best of the others.

    Attributes:
        weight_ED: ``[E - 1, D]``: expert 0 is not chosen by a row.
    """

    name = "xft"
    config_class = XFTConfig

    @property
    def num_rows(self) -> int:
        """E - 1: expert 0 has no row."""
        return self.num_experts - 1

    @property
    def weights_sum_to_one(self) -> bool:
        """True: they are 1 - m and shares of m."""
        return True

    def rows_ED(self) -> Tensor | None:
        """None: the first expert has no row."""
        return None

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to expert 0 and its best others."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TO = self.logits(x_TD)
            probs_TO = logits_TO.softmax(-1)
            # Logits tie less often than probabilities.
            ids_TK = logits_TO.topk(ctx.top_k(self.top_k) - 1, dim=-1).indices
            best_TK = probs_TO.gather(-1, ids_TK)
            most_T1 = best_TK[:, :1]
            weights_TK = torch.cat([1 - most_T1, most_T1 * best_TK.softmax(-1)], -1)
            scores_TE = torch.cat([1 - most_T1, most_T1 * probs_TO], -1)
            losses = self.balance_losses(logits_TO, probs_TO, ids_TK, ctx)
        first_T1 = torch.zeros_like(ids_TK[:, :1])
        return Routing(
            torch.cat([first_T1, ids_TK + 1], -1),
            weights_TK,
            self.num_experts,
            scores_TE=scores_TE,
            logits_TE=torch.cat([logits_TO.new_zeros(len(logits_TO), 1), logits_TO], -1),
            losses=losses,
        )
