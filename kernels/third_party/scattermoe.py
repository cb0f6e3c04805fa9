"""ScatterMoE: one Triton kernel that gathers, multiplies and scatters (github.com/shawntan/scattermoe).

Written from the source of 0.3.0: `parallel_linear` and its backward. It takes ``[E, in, out]`` by strides, so
our ``[E, out, in]`` is passed as a view. It keeps x, the pre-activation, the activation and the expanded
output. Its backward has two limits of its own: it overwrites the saved output, so a second pass through a
retained graph gives a wrong gradient of the combine weights; and it addresses rows and weight gradients with
32 bits.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, U rows of the up projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import ExpertTensors, Workload
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend, ThirdPartyLimitError
from kernels.third_party.routed import every_slot_used

_ADDRESSABLE = 2**31


class ScatterMoE(ThirdPartyBackend):
    """ScatterMoE's `parallel_linear` twice, as in its own gated layer, with torch's activation between."""

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
        out_TD = parallel_linear(
            experts.activate(h_RU),
            experts.w_down_EDF.transpose(1, 2),
            1,
            *index,
            expert_biases=experts.b_down_ED,
            # They multiply the output, in its dtype.
            gates=routed.weights_TK.to(x_TD.dtype),
            grouped_in=True,
        )
        return routed.back(out_TD, len(x_TD))
