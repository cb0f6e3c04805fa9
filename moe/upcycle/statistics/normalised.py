"""Activations of a network whose inputs and rows have length 1, as CMoE uses them.

Letters: T tokens, D model width, F width of the dense network, K marked neurons of a token.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from torch import Tensor
from torch.nn.functional import normalize

from moe.experts.weights import FFNWeights
from moe.upcycle.statistics.base import Statistic, hidden_of


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
