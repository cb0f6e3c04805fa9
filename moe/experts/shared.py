"""Shared expert, which every token uses in addition to the routed ones.

Letters: D model width, F its width, U = 2F when gated, else F.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.activations import ACTIVATIONS
from moe.experts.weights import FFNWeights


class SharedExpert(nn.Module):
    """Feed-forward network whose output is added to that of the routed experts.

    Attributes:
        w_up_UD: Gate rows first, then up rows, when gated.
        w_down_DF: Down projection.
        b_up_U: Bias of the up projection, or None.
        b_down_D: Bias of the down projection, or None.
        gate_1D: Row whose product with a token, through a sigmoid, scales its output (Qwen2-MoE), or None.
    """

    def __init__(self, weights: FFNWeights, gate_1D: Tensor | None = None) -> None:
        super().__init__()
        self.activation = weights.activation
        self.gated = weights.gate_FD is not None
        up_UD, b_up_U = weights.up_FD, weights.b_up_F
        if weights.gate_FD is not None:
            up_UD = torch.cat([weights.gate_FD, weights.up_FD])
        if weights.b_gate_F is not None and weights.b_up_F is not None:
            b_up_U = torch.cat([weights.b_gate_F, weights.b_up_F])
        self.w_up_UD = nn.Parameter(up_UD.contiguous())
        self.w_down_DF = nn.Parameter(weights.down_DF.contiguous())
        self.b_up_U = None if b_up_U is None else nn.Parameter(b_up_U.contiguous())
        self.b_down_D = None if weights.b_down_D is None else nn.Parameter(weights.b_down_D.contiguous())
        self.gate_1D = None if gate_1D is None else nn.Parameter(gate_1D)
        # Matrices stacked in one parameter; optimizers that orthogonalise split them.
        self.fused_rows = {"w_up_UD": 2} if self.gated else {}

    def forward(self, x: Tensor) -> Tensor:
        """Computes ``[..., D] -> [..., D]``."""
        hidden = functional.linear(x, self.w_up_UD, self.b_up_U)
        act = ACTIVATIONS[self.activation]
        hidden = act.hidden(*hidden.chunk(2, dim=-1)) if self.gated else act.forward(hidden)
        out = functional.linear(hidden, self.w_down_DF, self.b_down_D)
        return out if self.gate_1D is None else out * functional.linear(x, self.gate_1D).sigmoid()

    def extra_repr(self) -> str:
        """Describes the shape when the model is printed."""
        D, F = self.w_down_DF.shape
        return f"model_width={D}, width={F}, {self.activation}, gated={self.gated}"
