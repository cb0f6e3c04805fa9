"""DeepGEMM in bf16: products compiled at run time for Hopper and Blackwell (github.com/deepseek-ai/DeepGEMM).

Written from the source of 2.6.1: `m_grouped_bf16_gemm_nt_contiguous`, the same with ``nn``, and
`k_grouped_bf16_gemm_tn_contiguous`. The library has no autograd: forward, dX and dW are three calls, joined
here. Weights are not copied; the rows of each expert are, padded with zeros to the library's alignment (128
on Hopper), and dW is computed in fp32 and rounded. It needs the rows per expert on the host: one wait a call.
FP8 and the fused kernels are not adapted.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, P padded rows; I and O any
widths in and out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.third_party.adapter import Requirement, ThirdPartyBackend
from kernels.third_party.products import by_product, counted


@dataclass(frozen=True)
class _Padded:
    """Layout of rows in which every expert has a multiple of the library's alignment.

    Attributes:
        place_R: ``[R]`` int64, the padded row of each row.
        expert_P: ``[P]`` int32, the expert of each padded row, -1 where it is padding.
        sizes: Padded rows of each expert.
        sizes_E: The same on the device, int32.
    """

    place_R: Tensor
    expert_P: Tensor
    sizes: list[int]
    sizes_E: Tensor

    @staticmethod
    def of(counts_E: Tensor, num_rows: int, alignment: int) -> _Padded:
        padded_E = (counts_E + alignment - 1) // alignment * alignment
        sizes = padded_E.tolist()
        shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
        row_R = torch.arange(num_rows, device=counts_E.device)
        expert_R = torch.searchsorted(counts_E.cumsum(0), row_R, right=True)
        place_R = row_R + shift_E[expert_R]
        expert_P = torch.full((sum(sizes),), -1, dtype=torch.int32, device=counts_E.device)
        expert_P[place_R] = expert_R.to(torch.int32)
        return _Padded(place_R, expert_P, sizes, padded_E.to(torch.int32))

    def pad(self, rows_RI: Tensor) -> Tensor:
        """Returns ``[P, I]``: the rows at their places, zeros between."""
        out_PI = rows_RI.new_zeros(len(self.expert_P), rows_RI.shape[1])
        return out_PI.index_copy_(0, self.place_R, rows_RI)


class _Product(torch.autograd.Function):
    """Product of rows and ``[E, O, I]``, with the library's products for both gradients."""

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, w_EOI: Tensor, padded: _Padded, library: Any) -> Tensor:
        ctx.save_for_backward(rows_RI, w_EOI)
        ctx.padded, ctx.library = padded, library
        out_PO = rows_RI.new_empty(len(padded.expert_P), w_EOI.shape[1])
        library.m_grouped_bf16_gemm_nt_contiguous(padded.pad(rows_RI), w_EOI, out_PO, padded.expert_P)
        return out_PO.index_select(0, padded.place_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_RI, w_EOI = ctx.saved_tensors
        padded, library = ctx.padded, ctx.library
        grad_PO = padded.pad(grad_RO)
        drows_RI = dw_EOI = None
        if ctx.needs_input_grad[0]:
            out_PI = rows_RI.new_empty(len(padded.expert_P), w_EOI.shape[2])
            library.m_grouped_bf16_gemm_nn_contiguous(grad_PO, w_EOI, out_PI, padded.expert_P)
            drows_RI = out_PI.index_select(0, padded.place_R)
        if ctx.needs_input_grad[1]:
            sum_EOI = torch.zeros(w_EOI.shape, dtype=torch.float32, device=w_EOI.device)
            library.k_grouped_bf16_gemm_tn_contiguous(
                grad_PO, padded.pad(rows_RI), sum_EOI, padded.sizes, padded.sizes_E, sum_EOI
            )
            dw_EOI = sum_EOI.to(w_EOI.dtype)
        return drows_RI, dw_EOI, None, None


class DeepGEMM(ThirdPartyBackend):
    """DeepGEMM's bf16 products between our gather and our gather-and-sum."""

    name = "deepgemm"
    requirements = (
        Requirement(
            "deep_gemm",
            "deep_gemm",
            (2, 6),
            (2, 7),
            "build 2.6.1 from github.com/deepseek-ai/DeepGEMM, which needs nvcc; the package index has 1.0",
        ),
    )
    least_capability = (9, 0)
    capabilities = (9, 10)
    # Alignment of the summed axis, which is each width in one product or the other.
    multiple = 64

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        library = self.requirements[0].load()
        alignment = library.get_mk_alignment_for_contiguous_layout()
        plan, _ = counted(plan)
        padded = _Padded.of(plan.counts_E, plan.num_rows, alignment)

        def product(rows_RI: Tensor, w_EOI: Tensor) -> Tensor:
            out: Tensor = _Product.apply(rows_RI, w_EOI.contiguous(), padded, library)  # type: ignore[no-untyped-call]
            return out

        return by_product(x_TD, weights_TK, plan, experts, product)
