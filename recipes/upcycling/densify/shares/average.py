"""Average: every expert counts the same."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.upcycling.densify.shares.base import Shares
from recipes.upcycling.reduce.expert_sums import ExpertSums


class Average(Shares):
    """Equal shares."""

    name = "average"
    summary = "every expert counts the same"

    def shares_E(self, sums: ExpertSums) -> Tensor:
        """See `Shares.shares_E`."""
        return torch.full_like(sums.counts_E, 1 / len(sums.counts_E))
