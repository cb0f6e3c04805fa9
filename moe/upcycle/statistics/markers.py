"""Marked neurons of tokens, i.e. those most active with inputs and rows of length 1 (CMoE), and their rates.

Letters: T tokens, D model width, F width of the dense network, K marked neurons of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moe.experts.weights import FFNWeights
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.statistics.base import LayerBatch, Statistic, hidden_of
from moe.upcycle.statistics.reservoir import ReservoirStatistic


class MarkingStatistic(Statistic):
    """Statistic of marks on each token's ``top_k`` most active normalised neurons (arXiv 2502.04416).

    ``h~ = act(x^ . gate^) * (x^ . up^)`` with the hat for length 1, without biases: the norm of a row does
    not tell for which tokens the neuron is.
    """

    @cached_property
    def _unit_ffn(self) -> FFNWeights:
        ffn = self.ffn
        gate_FD = None if ffn.gate_FD is None else normalize(ffn.gate_FD.float(), dim=1)
        up_FD = normalize(ffn.up_FD.float(), dim=1)
        return replace(ffn, up_FD=up_FD, gate_FD=gate_FD, b_up_F=None, b_gate_F=None)

    def marks(self, x_TD: Tensor) -> Tensor:
        """Returns the ``[T, K]`` int64 marked neurons of each token."""
        hidden_TF = hidden_of(self._unit_ffn, normalize(x_TD.float(), dim=1))
        count = min(self.options["top_k"], self.ffn.width)
        return hidden_TF.abs().topk(count, dim=1).indices


class ActivationRate(MarkingStatistic):
    """Share of tokens that mark each neuron, ``[F]``; it sums to ``top_k``."""

    name = "activation_rate_F"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"top_k": 10})

    def start(self) -> None:
        """See `Statistic.start`."""
        self.sums = self.zeros_per_token("marks", self.ffn.width, dtype=torch.int64)

    def update(self, batch: LayerBatch) -> None:
        """Counts marks."""
        self.sums["marks"] += torch.bincount(self.marks(batch.x_TD).flatten(), minlength=self.ffn.width)
        self.sums["tokens"] += len(batch.x_TD)

    def result(self) -> Tensor:
        """Returns ``[F]`` fp64."""
        return (self.sums["marks"].double() / self.sums["tokens"].clamp_min(1)).cpu()


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
