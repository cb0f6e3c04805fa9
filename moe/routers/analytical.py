"""CMoE's router: an expert's score is what one neuron that stands for it would do.

Source: CMoE, arXiv 2502.04416. The upcycling method ``cmoe`` sets the rows to those of the dense network's
representative neurons, scaled to length 1.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from kernels.activations import ACTIVATIONS
from moe.routers.projection import linear_logits
from moe.routers.unit_gate import UnitGateConfig, UnitGateRouter

if TYPE_CHECKING:
    from moe.experts.experts import Experts


@dataclass(frozen=True)
class AnalyticalConfig(UnitGateConfig):
    """Config of `AnalyticalRouter`."""

    name: Literal["analytical"] = "analytical"


class AnalyticalRouter(UnitGateRouter[AnalyticalConfig]):
    """Scores ``|act(x gate^T) * (x up^T)|`` with the experts' own activation.

    Attributes:
        gate_ED: ``[E, D]`` gate rows of the representative neurons.
        up_ED: ``[E, D]`` their up rows.
    """

    name = "analytical"
    config_class = AnalyticalConfig

    def __init__(self, config: AnalyticalConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.gate_ED = nn.Parameter(torch.empty(num_experts, model_width))
        self.up_ED = nn.Parameter(torch.empty(num_experts, model_width))
        self._activation = "silu"
        self.reset_parameters()

    def attach(self, experts: Experts) -> None:
        """Takes over the experts' activation."""
        self._activation = experts.activation

    def scores(self, x_TD: Tensor) -> Tensor:
        """See the class."""
        gate_TE, up_TE = linear_logits(x_TD, self.gate_ED), linear_logits(x_TD, self.up_ED)
        return ACTIVATIONS[self._activation].hidden(gate_TE, up_TE).abs()
