"""REAP (arXiv 2510.13999): the mean, over an expert's own tokens, of weight times norm of its output.

The release averages over routed tokens alone, so that rare specialists survive, and since March 2026 takes
the weights as the router renormalises them. An expert without tokens scores 0.
"""

from __future__ import annotations

from torch import Generator, Tensor

from recipes.upcycling.prune.criteria.base import Criterion
from recipes.upcycling.reduce.expert_sums import ExpertSums


class Reap(Criterion):
    """Saliency of REAP."""

    name = "reap"
    summary = "mean of weight times output norm over an expert's own tokens"

    def scores_E(self, sums: ExpertSums, generator: Generator) -> Tensor:
        """See `Criterion.scores_E`."""
        return sums.weighted_E / sums.counts_E.clamp_min(1)
