"""Expert activation norm: the sum of the norms of an expert's outputs (the baseline of arXiv 2510.13999)."""

from __future__ import annotations

from torch import Generator, Tensor

from recipes.upcycling.prune.criteria.base import Criterion
from recipes.upcycling.reduce.expert_sums import ExpertSums


class ExpertActivationNorm(Criterion):
    """Sum of output norms."""

    name = "ean"
    summary = "sum of the norms of an expert's outputs"

    def scores_E(self, sums: ExpertSums, generator: Generator) -> Tensor:
        """See `Criterion.scores_E`."""
        return sums.norms_E
