"""Liger: SonicMoE's data flow in Triton (github.com/linkedin/Liger-Kernel).

Written from the sources of 0.8.2 and 0.8.5, which agree here: `LigerFusedMoEFunction`. Its weights are laid
out as ours, so nothing is copied. It keeps x and the pre-activation. It sorts by expert inside the call, with
one copy of the number of tiles to the host. Atomics sum the gradient of the combine weights, in the dtype of
the output's gradient. 0.8.0 is rejected: it addresses with 32 bits.

Letters: T tokens, D model width, K slots a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend
from kernels.third_party.routed import every_slot_used


class Liger(ThirdPartyBackend):
    """Liger's fused function for SwiGLU experts without biases."""

    name = "liger"
    requirements = (
        Requirement(
            "liger_kernel", "liger-kernel", (0, 8, 1), (0, 9), "pip install 'liger-kernel>=0.8.1,<0.9'"
        ),
    )
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    activations = {"silu": "swiglu", "swish": "swiglu"}
    ungated = False
    rounds_fp32 = True
    interpretable = True

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        routed = every_slot_used(x_TD, weights_TK, plan)
        function = self.requirements[0].load("ops").LigerFusedMoEFunction
        out_TD = function.apply(
            routed.x_TD,
            experts.w_up_EUD,
            experts.w_down_EDF,
            routed.ids_TK.to(torch.int32),
            routed.weights_TK,
        )
        return routed.back(out_TD, len(x_TD))
