"""Round-robin routing for benchmarks and debugging: load is even for any tokens. Nothing is learned.

Source: none. Megatron-core's ``moe_router_force_load_balancing`` has the same purpose, but draws random
logits instead of counting.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routers.configs.forced_config import ForcedConfig
from moe.routers.linear import LinearRouter
from moe.routing.draws import token_positions
from moe.types import LayerContext, Routing


class ForcedRouter(LinearRouter[ForcedConfig]):
    """Router of real token t to experts K*t + layer, K*t + layer + 1, ... modulo E, each weighed 1/K.

    The router's matrix product and its gradient are still computed, so that a step costs what it costs under
    a learned router: weights carry the gradient of the softmax over the chosen logits (straight-through).
    With K = 1 that gradient is zero.
    """

    name = "forced"
    config_class = ForcedConfig

    @property
    def weights_sum_to_one(self) -> bool:
        """True: K times 1/K."""
        return True

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Deals the tokens out to the experts in turn."""
        T, K, E = len(x_TD), ctx.top_k(self.top_k), self.num_experts
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            position_T = token_positions(T, ctx.token_mask_T(T), x_TD.device)
            slot_K = torch.arange(K, device=x_TD.device) + ctx.layer_index
            ids_TK = (position_T[:, None] * K + slot_K) % E
            shares_TK = logits_TE.gather(-1, ids_TK).softmax(-1)
            weights_TK = 1.0 / K + (shares_TK - shares_TK.detach())
            probs_TE = logits_TE.softmax(-1)
            losses = self.balance_losses(logits_TE, probs_TE, ids_TK, ctx)
        return Routing(ids_TK, weights_TK, E, scores_TE=probs_TE, logits_TE=logits_TE, losses=losses)
