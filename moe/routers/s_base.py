"""S-BASE: BASE layers with Sinkhorn's iteration in place of the auction.

Sources: Clark et al. 2022 (arXiv 2202.01169), whose text we did not have; the order of updates, 3 iterations
and the sigmoid weight are those of sigma-MoE's re-implementation (arXiv 2310.10837). That code adds up
potentials that its loop subtracts, which stalls; this is the standard iteration.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from torch import Tensor

from moe.routers.assigned import AssignedRouter
from moe.routers.configs.s_base_config import SBaseConfig
from moe.routing.sinkhorn_rule import SinkhornRule


class SBaseRouter(AssignedRouter[SBaseConfig]):
    """Assigned router whose weights are the sigmoid of the raw logit, for any number of experts a token."""

    name = "s_base"
    config_class = SBaseConfig

    @property
    def weights_sum_to_one(self) -> bool:
        """False: each weight is a sigmoid of its own."""
        return False

    @property
    def rule(self) -> SinkhornRule:
        """A fixed number of iterations."""
        return SinkhornRule(self.config.iterations, tolerance=None, rows_last=False)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Computes the sigmoid."""
        return logits_TE.sigmoid()
