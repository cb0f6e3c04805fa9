"""Frequency: grouped by the cosine of router rows, neurons as they are. The mean is that of M-SMoE."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from recipes.upcycling.merge.methods.base import MergeMethod
from recipes.upcycling.reduce.expert_sums import ExpertSums


class Frequency(MergeMethod):
    """Likeness of router rows."""

    name = "frequency"
    summary = "joined by the cosine of router rows, with neurons as they are"
    aligns = False

    def likeness_EE(self, sums: ExpertSums, rows_ED: Tensor) -> Tensor:
        """See `MergeMethod.likeness_EE`."""
        unit_ED = functional.normalize(rows_ED.double(), dim=-1)
        return unit_ED @ unit_ED.T
