"""Sinkhorn routing as in Megatron-core: balanced selection in training, weights from the raw logits.

Source: megatron-core 0.16, ``transformer/moe/router.py`` (``moe_router_load_balancing_type="sinkhorn"``) and
``moe_utils.py``. Its scaling loop overflows for logits above 88 and has no bound; this is the same loop on
logarithms, with one.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe.routers.assigned import AssignedConfig, AssignedRouter
from moe.routing.token_mean import figure_mean
from moe.routing.transport import SinkhornRule, sinkhorn
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class SinkhornConfig(AssignedConfig):
    """Config of `SinkhornRouter`."""

    name: Literal["sinkhorn"] = "sinkhorn"
    tolerance: float = 1e-4
    """Mean absolute change of the column scalings at which the iteration stops."""
    max_iterations: int = 100
    """Upper bound on iterations; ordinary logits need about 6."""
    check_every: int = 4
    """Iterations between two looks of the host at the tolerance; the result does not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        SinkhornRule(self.max_iterations, self.tolerance, check_every=self.check_every)


class SinkhornRouter(AssignedRouter[SinkhornConfig]):
    """Training: top-k of the transport plan of the logits at temperature 1. Inference: top-k of the logits.

    Weights are the sigmoid of the raw logit for one expert a token, and the softmax over all experts, not
    renormalised, for more.
    """

    name = "sinkhorn"
    config_class = SinkhornConfig
    host_syncs: ClassVar[str | None] = "every check_every iterations, whether Sinkhorn has converged"
    compile_unsupported_reason: ClassVar[str | None] = (
        "it iterates until it has converged. router=s_base iterates a fixed number of times"
    )

    @property
    def weights_sum_to_one(self) -> bool:
        """Only where every expert is used."""
        return 1 < self.top_k == self.num_experts

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes each token to K experts."""
        metrics: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(-1)
            choice_TE = logits_TE.detach()
            if self.training:
                choice_TE, metrics = self._balanced(choice_TE, ctx)
            ids_TK = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        return Routing(
            expert_ids_TK=ids_TK,
            weights_TK=scores_TE.gather(-1, ids_TK),
            num_experts=self.num_experts,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            metrics=metrics,
        )

    @torch.no_grad()
    def _balanced(self, logits_TE: Tensor, ctx: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
        config, mask_T = self.config, ctx.token_mask_T(len(logits_TE))
        rule = SinkhornRule(
            config.max_iterations,
            config.tolerance,
            residual="column_potentials",
            rows_last=False,
            check_every=config.check_every,
        )
        found = sinkhorn(logits_TE, rule, mask_T=mask_T, group=ctx.run.group)
        # A row's own scaling does not change its order.
        choice_TE = logits_TE + found.column_E
        agreement = figure_mean((choice_TE.argmax(-1) == logits_TE.argmax(-1)).float(), ctx)
        return choice_TE, {
            "choice_agreement": agreement,
            "sinkhorn_iterations": found.iterations.to(agreement),
        }
