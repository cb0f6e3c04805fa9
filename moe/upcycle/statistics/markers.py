"""Marked neurons, token by token.

Letters: T tokens, K marked neurons of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from moe.upcycle.layer_plan import FFNShape
from moe.upcycle.statistics.base import LayerBatch
from moe.upcycle.statistics.normalised import MarkingStatistic
from moe.upcycle.statistics.reservoir import ReservoirStatistic


class Markers(MarkingStatistic, ReservoirStatistic):
    """Neurons marked by each token of a bounded sample, ``[T, K]`` int32.

    These ids represent CMoE's boolean matrix ``[T, F]`` in a hundredth of its size.
    """

    name = "markers_TK"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"num_tokens": 4096, "top_k": 10})

    def start(self) -> None:
        """See `Statistic.start`."""
        self.empty(min(self.options["top_k"], self.ffn.width), torch.int32)

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Returns the bytes of four-byte ids and token numbers."""
        return options["num_tokens"] * (4 * options["top_k"] + 8)

    def update(self, batch: LayerBatch) -> None:
        """Offers a batch to the sample."""
        self.keep(self.marks(batch.x_TD).sort(dim=1).values, batch.index_T)
