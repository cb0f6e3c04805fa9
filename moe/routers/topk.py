"""Top-k routing by a linear router: softmax before or after the selection, or sigmoid scores.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, softmax after top-k), Switch Transformers (arXiv 2101.03961,
softmax before, Eq. 4-6 for the balance loss), ST-MoE (arXiv 2202.08906, Eq. 5 for the z-loss), DeepSeek-V3
(arXiv 2412.19437, Eq. 13-15 for sigmoid scores).

Letters: T tokens, D model width, E experts, K experts a token, N of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from moe.balance import count_load, switch_loss, z_loss
from moe.routers.base import Router, RouterConfig
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class TopKConfig(RouterConfig):
    """Config of `TopKRouter`."""

    name: Literal["topk"] = "topk"
    top_k: int = 2
    """Experts a token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits."""
    order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    """Whether scores are taken over all experts and then selected (Mixtral's and Switch's code), or over
    the selected logits alone (Shazeer)."""
    renormalise: bool = True
    """Divide the selected scores by their sum. Copied experts are exact only when weights sum to 1."""
    init_std: float = 0.02
    """Standard deviation of the initial router weights."""
    balance_coef: float = 0.01
    """Coefficient of the Switch balance loss; 0 leaves it out."""
    z_coef: float = 0.0
    """Coefficient of the router z-loss; 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: a token needs at least one expert. Set it to 1 or more.")
        if self.init_std <= 0:
            raise ValueError(
                f"init_std={self.init_std}: a router of zeros sends every token to the first experts. "
                "Set it above 0; 0.02 is usual."
            )
        for name in ("balance_coef", "z_coef"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)}: a coefficient is not negative. Set it to 0 or more."
                )
        if self.top_k == 1 and self.sums_to_one:
            raise ValueError(
                "top_k=1: the only weight is then always 1, and the router gets no gradient from the loss. "
                "Set router.renormalise=false with router.order=score_then_topk, or top_k to 2 or more."
            )

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token sum to 1."""
        return self.renormalise or (self.score == "softmax" and self.order == "topk_then_score")


class TopKRouter(Router[TopKConfig]):
    """Linear router with top-k selection. Its arithmetic is fp32 in narrower models too, fp64 in fp64 models."""

    name = "topk"
    config_class = TopKConfig

    def __init__(self, config: TopKConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, model_width))
        self.reset_parameters()

    @classmethod
    def check(cls, config: TopKConfig, num_experts: int) -> str | None:
        """A token cannot go to more experts than there are."""
        if config.top_k > num_experts:
            return (
                f"a token cannot use more experts than the {num_experts} of upcycle.num_experts. "
                f"Set router.top_k to {num_experts} or less, or raise upcycle.num_experts"
            )
        return None

    @property
    def top_k(self) -> int:
        """K."""
        return self.config.top_k

    @property
    def weights_sum_to_one(self) -> bool:
        """See `TopKConfig.sums_to_one`."""
        return self.config.sums_to_one

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Normal with ``init_std``."""
        nn.init.normal_(self.weight_ED, std=self.config.init_std, generator=generator)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to its K best experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = x_TD.to(dtype) @ self.weight_ED.to(dtype).t()
            scores_TE = self._scores(logits_TE)
            ids_TK, weights_TK = self._select(logits_TE, scores_TE)
            losses = self._losses(logits_TE, scores_TE, ids_TK, ctx)
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            num_experts=self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            losses=losses,
        )

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()

    def _shares(self, logits_TN: Tensor) -> Tensor:
        """The scores divided by their sum; in log space, where scores that round to zero still compare."""
        log_scores_TN = logits_TN if self.config.score == "softmax" else F.logsigmoid(logits_TN)
        return log_scores_TN.softmax(-1)

    def _select(self, logits_TE: Tensor, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        # Selection is by logits: both score functions are monotonic, and logits tie less often.
        top_TK, ids_TK = logits_TE.topk(self.top_k, dim=-1, sorted=False)
        if self.config.renormalise:
            return ids_TK, self._shares(top_TK)
        if self.config.order == "topk_then_score":
            return ids_TK, self._scores(top_TK)
        return ids_TK, scores_TE.gather(-1, ids_TK)

    def _losses(
        self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor, ctx: LayerContext
    ) -> dict[str, Tensor]:
        if not self.training:
            return {}
        losses = {}
        mask_T = ctx.token_mask_T(len(ids_TK))
        load = count_load(ids_TK, self.num_experts, mask_T, ctx.run.group)
        if self.config.balance_coef:
            probs_TE = scores_TE if self.config.score == "softmax" else self._shares(logits_TE)
            losses["balance"] = self.config.balance_coef * switch_loss(load, probs_TE, mask_T)
        if self.config.z_coef:
            losses["z"] = self.config.z_coef * z_loss(logits_TE, load.tokens_per_rank, mask_T)
        return losses
