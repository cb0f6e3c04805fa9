"""MegaBlocks, its grouped path: permutation kernels in Triton around grouped_gemm
(github.com/databricks/megablocks).

Read at 0.10.0 and 0.11.0.dev0, which differ in a default alone: `ops.gather`, `ops.scatter`, and how its
grouped layer calls the product. Gate and up run as one product here, where its layer has two; with our
layout nothing is copied. Its block-sparse path is not adapted: it pads every expert to 128 rows, and its
authors call the grouped path the default.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows; I and O any widths in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend, ThirdPartyLimitError
from kernels.third_party.grouped_gemm import GROUPED_GEMM
from kernels.third_party.products import hidden_to_rows
from kernels.third_party.routed import every_slot_used


class MegaBlocks(ThirdPartyBackend):
    """Its gather and scatter with grouped_gemm's product between them."""

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
        ops, gmm = self.requirements[0].load("ops"), self.requirements[1].load("ops").gmm
        ends_E = routed.ends_E.to(torch.int32)
        sizes_E = routed.ends_E.diff(prepend=routed.ends_E.new_zeros(1)).cpu()
        slots = routed.weights_TK.shape[1]
        index = (routed.slot_R.to(torch.int32), routed.expert_R.to(torch.int32))

        def product(rows_RI: Tensor, w_EOI: Tensor) -> Tensor:
            out_RO: Tensor = gmm(rows_RI.contiguous(), w_EOI.contiguous(), sizes_E, trans_b=True)
            return out_RO

        x_RD = ops.gather(routed.x_TD.contiguous(), *index, ends_E, slots)
        y_RD = hidden_to_rows(x_RD, experts, product)
        out_TD = ops.scatter(y_RD, *index, routed.weights_TK.reshape(-1), ends_E, slots)
        return routed.back(out_TD, len(x_TD))
