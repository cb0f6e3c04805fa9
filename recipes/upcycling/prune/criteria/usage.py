"""Usage: the number of tokens that are routed to an expert."""

from __future__ import annotations

from torch import Generator, Tensor

from recipes.upcycling.prune.criteria.base import Criterion
from recipes.upcycling.reduce.expert_sums import ExpertSums


class Usage(Criterion):
    """Number of tokens."""

    name = "usage"
    summary = "number of tokens that are routed to an expert"

    def scores_E(self, sums: ExpertSums, generator: Generator) -> Tensor:
        """See `Criterion.scores_E`."""
        return sums.counts_E
