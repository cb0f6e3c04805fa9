"""Frequency: an expert counts as often as tokens are routed to it."""

from __future__ import annotations

from torch import Tensor

from recipes.upcycling.densify.shares.base import Shares
from recipes.upcycling.reduce.expert_sums import ExpertSums


class Frequency(Shares):
    """Shares of the tokens."""

    name = "frequency"
    summary = "as often as tokens are routed to it"

    def shares_E(self, sums: ExpertSums) -> Tensor:
        """See `Shares.shares_E`."""
        return sums.counts_E / sums.counts_E.sum()
