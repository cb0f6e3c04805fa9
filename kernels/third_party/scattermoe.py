"""ScatterMoE: one Triton kernel that gathers, multiplies and scatters (github.com/shawntan/scattermoe).

Read at 0.3.0: `parallel_linear` and its backward. It takes ``[E, in, out]`` by strides, so our ``[E, out,
in]`` is passed as a view; it keeps x, the pre-activation, the activation and the expanded output. Two
properties of its backward that no other back end here has: it overwrites the saved output, so a second pass
through a retained graph gives a wrong gradient of the combine weights; and rows and weight gradients are
addressed with 32 bits.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, U rows of the up projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import ExpertTensors, Workload
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend, ThirdPartyLimitError
from kernels.third_party.routed import every_slot_used

_ADDRESSABLE = 2**31


class ScatterMoE(ThirdPartyBackend):
    """`parallel_linear` twice, as its own gated layer does, the activation by torch."""

    name = "scattermoe"
    requirements = (
        Requirement(
            "scattermoe",
            "scattermoe",
            (0, 3),
            (0, 4),
            "it is on no package index: pip install git+https://github.com/shawntan/scattermoe",
        ),
    )
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    biased = True
    rounds_fp32 = True
    interpretable = True

    def _width_unsupported_reason(self, work: Workload) -> str | None:
        elements = work.num_experts * work.model_width * work.expert_width * (2 if work.gated else 1)
        if elements >= _ADDRESSABLE:
            return f"it addresses weight gradients with 32 bits, and these have {elements} elements"
        return super()._width_unsupported_reason(work)

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        routed = every_slot_used(x_TD, weights_TK, plan)
        widest = max(x_TD.shape[1], experts.w_up_EUD.shape[1])
        if len(routed.slot_R) * widest >= _ADDRESSABLE:
            raise ThirdPartyLimitError(
                f"scattermoe addresses rows with 32 bits: {len(routed.slot_R)} rows of {widest} are too many"
            )
        parallel_linear = self.requirements[0].load().parallel_linear
        index = (routed.expert_R, routed.slot_R, routed.ends_E)
        h_RU = parallel_linear(
            routed.x_TD,
            experts.w_up_EUD.transpose(1, 2),
            routed.weights_TK.shape[1],
            *index,
            expert_biases=experts.b_up_EU,
            grouped_out=True,
        )
        act = ACTIVATIONS[experts.activation]
        a_RF = act.hidden(*h_RU.chunk(2, dim=1)) if experts.gated else act.forward(h_RU)
        out_TD = parallel_linear(
            a_RF,
            experts.w_down_EDF.transpose(1, 2),
            1,
            *index,
            expert_biases=experts.b_down_ED,
            # It multiplies them with the output, in that dtype.
            gates=routed.weights_TK.to(x_TD.dtype),
            grouped_in=True,
        )
        return routed.back(out_TD, len(x_TD))
