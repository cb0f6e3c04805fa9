"""Linear router for experts that divide a dense network: chosen by a dot product, at weight 1 at first.

MoEfication (arXiv 2110.01786) chooses experts by the similarity of the token to their mean row and sums them;
its trained selector, a small network, is not here. The learned share of the weight is CMoE's.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.routers.configs.unit_linear_config import UnitLinearConfig
from moe.routers.projection import linear_logits
from moe.routers.unit_gate import UnitGateRouter


class UnitLinearRouter(UnitGateRouter[UnitLinearConfig]):
    """Router that scores experts by ``x W^T``.

    Attributes:
        weight_ED: ``[E, D]``.
    """

    name = "unit_linear"
    config_class = UnitLinearConfig

    def create_parameters(self) -> None:
        """Registers gains, bias and projection."""
        super().create_parameters()
        self.weight_ED = nn.Parameter(torch.empty(self.num_experts, self.model_width))

    def rows_ED(self) -> Tensor | None:
        """Returns the projection."""
        return self.weight_ED

    def scores(self, x_TD: Tensor) -> Tensor:
        """Computes ``x W^T``."""
        return linear_logits(x_TD, self.weight_ED)
