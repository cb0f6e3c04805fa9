"""BASE layers: in training every expert gets the same number of tokens, by an assignment.

Source: Lewis et al. 2021 (arXiv 2103.16716) and its release in fairseq (``modules/base_layer.py``).

Letters: T tokens, D model width, E experts; N real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from moe.errors import require
from moe.routers.base import Router, RouterConfig
from moe.routers.projection import linear_logits
from moe.routing.auction import balanced_assignment
from moe.routing.token_mean import figure_mean
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class BaseLayersConfig(RouterConfig):
    """Config of `BaseLayersRouter`."""

    name: Literal["base_layers"] = "base_layers"
    init_gain: float = 0.1
    """Gain of the orthogonal initial expert embeddings."""
    max_rounds: int = 100
    """Rounds of bidding, after which the remaining tokens are placed greedily."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.init_gain > 0,
                "init_gain",
                "a router of zeros cannot tell experts apart",
                "Set it above 0; 0.1 is the published value.",
            ),
            (self.max_rounds >= 0, "max_rounds", "it counts rounds", "Set it to 0 or more."),
        )


class BaseLayersRouter(Router[BaseLayersConfig]):
    """Training: one expert a token, by balanced assignment of this rank's tokens. Inference: the best.

    The weight is the sigmoid of the raw logit, the only path of the gradient to the router.

    Attributes:
        weight_ED: ``[E, D]`` expert embeddings (centroids).
    """

    name = "base_layers"
    config_class = BaseLayersConfig
    host_syncs: ClassVar[str | None] = (
        "the auction asks once a round of bidding whether every token is held, and places the rest by index"
    )
    compile_unsupported_reason: ClassVar[str | None] = (
        "the auction lasts as many rounds as the tokens need. Compile the experts alone"
    )

    def __init__(self, config: BaseLayersConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, model_width))
        self.reset_parameters()

    @property
    def top_k(self) -> int:
        """1."""
        return 1

    @property
    def weights_sum_to_one(self) -> bool:
        """Never: the weight is a sigmoid."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Orthogonal with ``init_gain``."""
        # In fp32 on the CPU, whose generator it is; other types lack the decomposition.
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
            expert_ids_TK=ids_T1,
            weights_TK=scores_TE.gather(-1, ids_T1),
            num_experts=self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=metrics,
        )

    def _balanced(
        self, logits_TE: Tensor, best_T: Tensor, ctx: LayerContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The assignment of real tokens; padding goes where it likes and takes no one's place."""
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
