"""SonicMoE: CuTeDSL kernels for Hopper and Blackwell (github.com/Dao-AILab/sonic-moe).

Written from the sources of 0.1.2 and 0.1.2.post1, which differ only in the version:
`moe_general_routing_inputs`, which takes a routing from outside. Its weights are ``[out, in, E]`` views of
ours, gate rows first with ``concat_layout``, so nothing is copied. It keeps x and the pre-activation, and
sorts by expert inside the call. Its GeGLU is the tanh form.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend
from kernels.third_party.routed import every_slot_used


class SonicMoE(ThirdPartyBackend):
    """SonicMoE's experts after our router."""

    name = "sonicmoe"
    requirements = (
        Requirement(
            "sonicmoe",
            "sonic-moe",
            (0, 1, 2),
            (0, 1, 3),
            "pip install 'sonic-moe>=0.1.2,<0.1.3', which wants Python 3.12 and torch up to 2.9.1",
        ),
    )
    dtypes = (torch.bfloat16, torch.float16)
    activations = {
        "silu": "swiglu",
        "swish": "swiglu",
        "gelu_new": "geglu",
        "gelu_fast": "geglu",
        "gelu_pytorch_tanh": "geglu",
    }
    ungated = False
    least_capability = (9, 0)
    capabilities = (9, 10)
    # Rows are loaded 16 bytes at a time.
    multiple = 8

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        routed = every_slot_used(x_TD, weights_TK, plan)
        tokens, slots = routed.weights_TK.shape
        token_N = torch.arange(tokens, dtype=torch.int32, device=x_TD.device).repeat_interleave(slots)
        assert self.activations is not None
        sonic = self.requirements[0]
        activation = sonic.load("enums").ActivationType(self.activations[experts.activation])
        out_TD, _ = sonic.load().moe_general_routing_inputs(
            *(routed.x_TD.contiguous(), routed.weights_TK.reshape(-1).float(), token_N),
            routed.ids_TK.reshape(-1).to(torch.int32),
            *(experts.w_up_EUD.permute(1, 2, 0), None, experts.w_down_EDF.permute(1, 2, 0), None),
            plan.num_experts,
            torch.cuda.current_stream(x_TD.device).cuda_stream if x_TD.is_cuda else 0,
            activation,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return routed.back(out_TD, len(x_TD))
