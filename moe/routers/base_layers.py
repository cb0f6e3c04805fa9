"""BASE layers: in training an assignment gives every expert the same number of tokens.

Source: Lewis et al. 2021 (arXiv 2103.16716) and its release in fairseq (``modules/base_layer.py``).

Letters: T tokens, D model width, E experts; N real tokens.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from moe.routers.base import Router
from moe.routers.configs.base_layers_config import BaseLayersConfig
from moe.routers.projection import linear_logits
from moe.routing.auction import balanced_assignment
from moe.routing.balance import figure_mean
from moe.types import LayerContext, Routing


class BaseLayersRouter(Router[BaseLayersConfig]):
    """Router to one expert a token: by balanced assignment of this rank's tokens in training, else the best.

    The weight is the sigmoid of the raw logit, the gradient's only path to the router.

    Attributes:
        weight_ED: ``[E, D]`` expert embeddings (centroids).
    """

    name = "base_layers"
    config_class = BaseLayersConfig
    host_syncs = "the auction checks once a round whether every token has an owner, and places the rest"
    compile_unsupported_reason = (
        "the number of the auction's rounds depends on the tokens. Compile the experts alone"
    )

    def create_parameters(self) -> None:
        """Registers the embeddings."""
        self.weight_ED = nn.Parameter(torch.empty(self.num_experts, self.model_width))

    @property
    def weights_sum_to_one(self) -> bool:
        """False: the weight is a sigmoid."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws orthogonal embeddings with ``init_gain``."""
        # In fp32 on the CPU, where the generator lives; other dtypes lack the decomposition.
        drawn_ED = torch.empty(self.num_experts, self.model_width, device="cpu")
        nn.init.orthogonal_(drawn_ED, gain=self.config.init_gain, generator=generator)
        with torch.no_grad():
            self.weight_ED.copy_(drawn_ED)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to one expert."""
        metrics: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = linear_logits(x_TD, self.weight_ED)
            scores_TE = logits_TE.sigmoid()
            chosen_T = logits_TE.argmax(-1)
            if self.training:
                chosen_T, metrics = self._balanced(logits_TE.detach(), chosen_T, ctx)
        ids_T1 = chosen_T[:, None]
        return Routing(
            ids_T1,
            scores_TE.gather(-1, ids_T1),
            self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=metrics,
        )

    def _balanced(
        self, logits_TE: Tensor, best_T: Tensor, ctx: LayerContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Assigns the real tokens; padding goes to its best expert and takes no place."""
        mask_T = ctx.token_mask_T(len(logits_TE))
        real_NE = logits_TE if mask_T is None else logits_TE[mask_T]
        found = balanced_assignment(real_NE, max_rounds=self.config.max_rounds)
        chosen_T = found.expert_T
        if mask_T is not None:
            chosen_T = best_T.masked_scatter(mask_T, found.expert_T)
        agreement = figure_mean((chosen_T == best_T).float(), ctx)
        return chosen_T, {
            "choice_agreement": agreement,
            "auction_rounds": torch.full_like(agreement, found.rounds),
        }
