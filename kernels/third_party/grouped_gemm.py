"""grouped_gemm: one cuBLAS call an expert, or CUTLASS where it was built so
(github.com/tgale96/grouped_gemm).

Written from the sources of 0.1.6 and 0.3.0, which are the same: `ops.gmm`. Our ``[E, out, in]`` is its
transposed operand, so nothing is copied. As installed by default it needs the rows per expert on the host:
one wait a call.

Letters: T tokens, D model width, E experts, K slots a token; I and O any widths in and out.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend
from kernels.third_party.products import Product, by_product, counted

#: MegaBlocks needs it as well.
GROUPED_GEMM = Requirement(
    "grouped_gemm",
    "grouped_gemm",
    (0, 1, 6),
    (0, 4),
    "pip install 'grouped_gemm>=0.1.6,<0.4', which compiles against the installed torch and needs nvcc",
)


def gmm_product(sizes_E: Tensor) -> Product:
    """Returns the library's product for these rows per expert, which are on the CPU."""
    gmm = GROUPED_GEMM.load("ops").gmm

    def product(rows_RI: Tensor, w_EOI: Tensor) -> Tensor:
        out_RO: Tensor = gmm(rows_RI.contiguous(), w_EOI.contiguous(), sizes_E, trans_b=True)
        return out_RO

    return product


class GroupedGemm(ThirdPartyBackend):
    """The product of grouped_gemm between our gather and our gather-and-sum."""

    name = "grouped_gemm"
    requirements = (GROUPED_GEMM,)
    # cuBLAS is given no alignment, and takes rows of 16 bytes without a detour.
    multiple = 8

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        plan, sizes_E = counted(plan)
        return by_product(x_TD, weights_TK, plan, experts, gmm_product(sizes_E))
