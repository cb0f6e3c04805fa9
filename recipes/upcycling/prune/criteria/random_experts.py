"""Random experts, which every criterion should beat."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from recipes.upcycling.prune.criteria.base import Criterion
from recipes.upcycling.reduce.expert_sums import ExpertSums


class RandomExperts(Criterion):
    """Uniform draws."""

    name = "random"
    summary = "drawn by the seed"

    def scores_E(self, sums: ExpertSums, generator: Generator) -> Tensor:
        """See `Criterion.scores_E`."""
        return torch.rand(len(sums.counts_E), generator=generator, dtype=torch.float64)
