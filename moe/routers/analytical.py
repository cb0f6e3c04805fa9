"""CMoE's router: an expert's score is the activation of one neuron that represents it.

Source: CMoE, arXiv 2502.04416. The upcycling method ``cmoe`` sets the rows to those of the dense network's
representative neurons, scaled to length 1.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.activations import ACTIVATIONS
from moe.routers.configs.analytical_config import AnalyticalConfig
from moe.routers.projection import linear_logits
from moe.routers.unit_gate import UnitGateRouter

if TYPE_CHECKING:
    from moe.experts.experts import Experts


class AnalyticalRouter(UnitGateRouter[AnalyticalConfig]):
    """Router that scores experts by ``|act(x gate^T) * (x up^T)|`` with their own activation.

    Attributes:
        gate_ED: ``[E, D]`` gate rows of the representative neurons.
        up_ED: ``[E, D]`` up rows of the representative neurons.
    """

    name = "analytical"
    config_class = AnalyticalConfig

    def create_parameters(self) -> None:
        """Registers gains, bias and the rows of the representative neurons."""
        super().create_parameters()
        self.gate_ED = nn.Parameter(torch.empty(self.num_experts, self.model_width))
        self.up_ED = nn.Parameter(torch.empty(self.num_experts, self.model_width))
        self._activation = "silu"

    def attach(self, experts: Experts) -> None:
        """Adopts the experts' activation."""
        self._activation = experts.activation

    def scores(self, x_TD: Tensor) -> Tensor:
        """Computes the activations of the representative neurons."""
        gate_TE, up_TE = linear_logits(x_TD, self.gate_ED), linear_logits(x_TD, self.up_ED)
        return ACTIVATIONS[self._activation].hidden(gate_TE, up_TE).abs()
