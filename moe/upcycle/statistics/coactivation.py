"""Which neurons fire together.

Letters: T tokens, F width of the dense network, K neurons active of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.layer_plan import Draws, FFNShape
from moe.upcycle.statistics.base import LayerBatch, Statistic

# Tokens whose marks are unfolded at once.
_TOKENS_AT_ONCE = 512


class Coactivation(Statistic):
    """``[F, F]`` in how many tokens two neurons are active together, 0 on the diagonal.

    Active is ``h > 0`` with ``top_percent`` 0, for ReLU (MoEfication, arXiv 2110.01786); else the so many
    percent of neurons of largest ``|h|``, for activations without zeros. The paper's code clamps sums over
    batches of eight tokens, so that its counts depend on how the text is cut; these do not.
    """

    name = "coactivation_FF"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"top_percent": 0})

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        super().__init__(ffn, options, earlier, draws)
        # fp32 counts exactly up to 2^24 tokens.
        self.sums = {"pairs": torch.zeros(ffn.width, ffn.width, device=ffn.up_FD.device)}

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """One fp32 number a pair."""
        return 4 * shape.width**2

    def update(self, batch: LayerBatch) -> None:
        """Counts pairs."""
        for hidden_TF in torch.split(batch.hidden_TF, _TOKENS_AT_ONCE):
            active_TF = self._active(hidden_TF)
            self.sums["pairs"].addmm_(active_TF.t(), active_TF)

    def _active(self, hidden_TF: Tensor) -> Tensor:
        percent = self.options["top_percent"]
        if percent == 0:
            return (hidden_TF > 0).float()
        count = max(1, hidden_TF.shape[1] * percent // 100)
        top_TK = hidden_TF.abs().topk(count, dim=1).indices
        return torch.zeros_like(hidden_TF, dtype=torch.float32).scatter_(1, top_TK, 1.0)

    def result(self) -> Tensor:
        """``[F, F]`` fp32."""
        return self.sums["pairs"].cpu().clone().fill_diagonal_(0)
