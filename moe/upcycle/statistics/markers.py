"""Which neurons are marked, token by token.

Letters: T tokens, K neurons marked of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.layer_plan import Draws, FFNShape
from moe.upcycle.statistics.base import LayerBatch
from moe.upcycle.statistics.normalised import MarkingStatistic
from moe.upcycle.statistics.reservoir import ReservoirStatistic


class Markers(MarkingStatistic, ReservoirStatistic):
    """``[T, K]`` int32 neurons marked by each of a bounded sample of tokens.

    The ids of the few that are marked stand for CMoE's boolean matrix ``[T, F]``, a hundredth of its size.
    """

    name = "markers_TK"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"num_tokens": 4096, "top_k": 10})

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        super().__init__(ffn, options, earlier, draws)
        self.start(min(self.options["top_k"], ffn.width), torch.int32)

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Ids of four bytes and the number of each token."""
        return options["num_tokens"] * (4 * options["top_k"] + 8)

    def update(self, batch: LayerBatch) -> None:
        """Offers a batch to the sample."""
        self.keep(self.marks(batch.x_TD).sort(dim=1).values, batch.index_T)
