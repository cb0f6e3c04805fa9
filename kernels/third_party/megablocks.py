"""MegaBlocks' grouped path: Triton permutations around grouped_gemm (github.com/databricks/megablocks).

Written from the sources of 0.10.0 and 0.11.0.dev0, which differ in one default: `ops.gather`, `ops.scatter`,
and the product as its grouped layer calls it. Gate and up are one product here and two in its layer; with our
layout nothing is copied. Its block-sparse path is not adapted: it pads every expert to 128 rows, and the
grouped path is its default.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows; I and O any widths in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend, ThirdPartyLimitError
from kernels.third_party.grouped_gemm import GROUPED_GEMM, gmm_product
from kernels.third_party.products import hidden_to_rows
from kernels.third_party.routed import every_slot_used


class MegaBlocks(ThirdPartyBackend):
    """MegaBlocks' gather and scatter with the product of grouped_gemm between them."""

    name = "megablocks"
    requirements = (
        Requirement(
            "megablocks",
            "megablocks",
            (0, 10),
            (0, 12),
            "pip install --no-deps 'megablocks>=0.10,<0.12' stanford-stk==0.7.1, as it pins an older torch",
        ),
        GROUPED_GEMM,
    )
    multiple = 8

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        routed = every_slot_used(x_TD, weights_TK, plan)
        if len(routed.slot_R) * x_TD.shape[1] >= 2**31:
            raise ThirdPartyLimitError("megablocks addresses rows with 32 bits, and these are too many")
        ops = self.requirements[0].load("ops")
        ends_E = routed.ends_E.to(torch.int32)
        sizes_E = routed.ends_E.diff(prepend=routed.ends_E.new_zeros(1)).cpu()
        slots = routed.weights_TK.shape[1]
        index = (routed.slot_R.to(torch.int32), routed.expert_R.to(torch.int32))
        x_RD = ops.gather(routed.x_TD.contiguous(), *index, ends_E, slots)
        y_RD = hidden_to_rows(x_RD, experts, gmm_product(sizes_E))
        out_TD = ops.scatter(y_RD, *index, routed.weights_TK.reshape(-1), ends_E, slots)
        return routed.back(out_TD, len(x_TD))
