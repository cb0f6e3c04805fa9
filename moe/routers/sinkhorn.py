"""Sinkhorn routing as in Megatron-core: balanced selection in training, weights from the raw logits.

Source: megatron-core 0.16, ``transformer/moe/router.py`` (``moe_router_load_balancing_type="sinkhorn"``) and
``moe_utils.py``. Its scaling loop overflows for logits above 88 and has no bound; this is the same loop on
logarithms, with one.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from torch import Tensor

from moe.routers.assigned import AssignedRouter
from moe.routers.configs.sinkhorn_config import SinkhornConfig
from moe.routing.sinkhorn_rule import SinkhornRule


class SinkhornRouter(AssignedRouter[SinkhornConfig]):
    """Assigned router whose weights are the sigmoid of the raw logit for one expert a token.

    For more experts they are the softmax over all experts, not renormalised.
    """

    name = "sinkhorn"
    config_class = SinkhornConfig
    host_syncs = "every check_every iterations, to learn whether Sinkhorn has converged"
    compile_unsupported_reason = (
        "it iterates until it has converged. router=s_base iterates a fixed number of times"
    )

    @property
    def weights_sum_to_one(self) -> bool:
        """True only where every expert is used."""
        return 1 < self.top_k == self.num_experts

    @property
    def rule(self) -> SinkhornRule:
        """Iterations until the column scalings settle."""
        config = self.config
        return SinkhornRule(
            config.max_iterations,
            config.tolerance,
            residual="column_potentials",
            rows_last=False,
            check_every=config.check_every,
        )

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Computes the sigmoid for K = 1, the softmax for more."""
        return logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(-1)
