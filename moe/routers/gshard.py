"""GShard's top-2 routing: the second expert is used at random, more often the more it weighs.

Sources: GShard (arXiv 2006.16668, Algorithm 1); Mesh TensorFlow's ``moe.py`` (threshold 0.2, that is 5 g2)
and fairseq's top-2 gate (the second expert sampled by Gumbel noise) for the variants. All three normalise
the two gates to a sum of 1 first. Their capacity, which drops tokens, is left out: experts take all tokens.

Letters: T tokens, E experts, K = 2 experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routers.base import NOISE_KEY_ON_HOST
from moe.routers.configs.gshard_config import GShardConfig
from moe.routers.linear import LinearRouter
from moe.routing.draws import gumbel_noise, uniform_noise
from moe.types import LayerContext, Routing


class GShardRouter(LinearRouter[GShardConfig]):
    """Router to two experts a token, weighed by renormalised probabilities; the second may be left out.

    The first keeps its weight if the second is left out, as in the sources; such a token counts less.
    """

    name = "gshard"
    config_class = GShardConfig
    compile_unsupported_reason = NOISE_KEY_ON_HOST

    @property
    def weights_sum_to_one(self) -> bool:
        """False where training leaves out second experts; in evaluation weights always sum to 1."""
        return self.config.second in ("sampled", "always")

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to its best expert and, perhaps, to a second one."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            probs_TE = logits_TE.softmax(-1)
            ids_TK = self._choose(logits_TE.detach(), ctx)
            weights_TK = logits_TE.gather(-1, ids_TK).softmax(-1)
            losses = self.balance_losses(logits_TE, probs_TE, ids_TK[:, :1], ctx)
        return Routing(
            ids_TK,
            weights_TK,
            self.num_experts,
            slot_mask_TK=self._kept(weights_TK, ctx),
            scores_TE=probs_TE,
            logits_TE=logits_TE,
            losses=losses,
        )

    def _choose(self, logits_TE: Tensor, ctx: LayerContext) -> Tensor:
        """Returns ``[T, 2]`` experts, the first choice in the first column."""
        if not (self.training and self.config.second == "sampled"):
            return logits_TE.topk(2, dim=-1).indices
        first_T1 = logits_TE.argmax(-1, keepdim=True)
        (T, E), device = logits_TE.shape, logits_TE.device
        noise_TE = gumbel_noise(self.config.noise_seed, "gshard", T, E, ctx, device)
        others_TE = (logits_TE + noise_TE).scatter(1, first_T1, -torch.inf)
        second_T1 = others_TE.argmax(-1, keepdim=True)
        return torch.cat([first_T1, second_T1], dim=1)

    def _kept(self, weights_TK: Tensor, ctx: LayerContext) -> Tensor | None:
        """Returns ``[T, 2]`` bool, True for used slots; None if all are used."""
        factor = {"paper": 2.0, "mesh_tf": 5.0}.get(self.config.second)
        if not self.training or factor is None:
            return None
        T, device = len(weights_TK), weights_TK.device
        chance_T1 = uniform_noise(self.config.noise_seed, "gshard", T, 1, ctx, device)
        second_T1 = chance_T1 < factor * weights_TK[:, 1:].detach()
        return torch.cat([torch.ones_like(second_T1), second_T1], dim=1)
