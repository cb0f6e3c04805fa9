"""M-SMoE (arXiv 2310.01334): grouped by the cosine of router logits over tokens, with neurons in one order.

The paper chooses the experts that stay over all layers at once, so that layers end with different numbers; no
class of transformers has these, and here every layer keeps the same.
"""

from __future__ import annotations

from torch import Tensor

from moe.errors import ConfigError
from recipes.upcycling.merge.methods.base import MergeMethod
from recipes.upcycling.reduce.expert_sums import ExpertSums


class MSMoE(MergeMethod):
    """Likeness of router logits."""

    name = "msmoe"
    summary = "joined by the cosine of router logits over tokens, with neurons in one order"
    aligns = True

    def likeness_EE(self, sums: ExpertSums, rows_ED: Tensor) -> Tensor:
        """See `MergeMethod.likeness_EE`."""
        if not sums.logits_EE.any():
            rule = "it joins experts by router logits, and this router gives none"
            raise ConfigError.one("--method", self.name, rule, "Take --method frequency, or graft prune.")
        norms_E = sums.logits_EE.diagonal().sqrt().clamp_min(1e-30)
        return sums.logits_EE / norms_E[:, None] / norms_E
