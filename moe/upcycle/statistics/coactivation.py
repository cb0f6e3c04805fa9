"""Coactivation: counts of neurons that fire together.

Letters: T tokens, F width of the dense network, K active neurons of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.statistics.base import LayerBatch, Statistic

# Tokens whose marks are expanded at once.
_TOKENS_AT_ONCE = 512


class Coactivation(Statistic):
    """Number of tokens in which two neurons are active together, ``[F, F]``, 0 on the diagonal.

    With ``top_percent`` 0 active means ``h > 0``, for ReLU (MoEfication, arXiv 2110.01786); else it means the
    top percentage of neurons by ``|h|``, for activations without zeros. The paper's code clamps sums over
    batches of eight tokens, so that its counts depend on the batches; these counts do not.
    """

    name = "coactivation_FF"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"top_percent": 0})

    def start(self) -> None:
        """See `Statistic.start`."""
        # fp32 counts exactly up to 2^24 tokens.
        self.sums = {"pairs": torch.zeros(self.ffn.width, self.ffn.width, device=self.ffn.up_FD.device)}

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Returns the bytes of one fp32 number per pair."""
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
        """Returns ``[F, F]`` fp32."""
        return self.sums["pairs"].cpu().clone().fill_diagonal_(0)
