"""Activations of a network whose inputs and rows have length 1, as CMoE looks at them.

Letters: T tokens, D model width, F width of the dense network, K neurons marked of a token.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from torch import Tensor
from torch.nn.functional import normalize

from moe.experts.weights import FFNWeights
from moe.upcycle.statistics.base import Statistic, hidden_of


class MarkingStatistic(Statistic):
    """Marks the ``top_k`` neurons of largest normalised activation of each token (arXiv 2502.04416).

    ``h~ = act(x^ . gate^) * (x^ . up^)`` with the hat for length 1, without biases: the norms of rows say
    nothing about which token a neuron is for.
    """

    @cached_property
    def _unit_ffn(self) -> FFNWeights:
        ffn = self.ffn
        gate_FD = None if ffn.gate_FD is None else normalize(ffn.gate_FD.float(), dim=1)
        up_FD = normalize(ffn.up_FD.float(), dim=1)
        return replace(ffn, up_FD=up_FD, gate_FD=gate_FD, b_up_F=None, b_gate_F=None)

    def marks(self, x_TD: Tensor) -> Tensor:
        """``[T, K]`` int64 neurons of each token."""
        hidden_TF = hidden_of(self._unit_ffn, normalize(x_TD.float(), dim=1))
        count = min(self.options["top_k"], self.ffn.width)
        return hidden_TF.abs().topk(count, dim=1).indices
