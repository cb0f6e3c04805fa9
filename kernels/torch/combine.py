"""Gathers tokens into routed rows, and sums rows back in the fixed order of the slots, without atomics.

Letters: T tokens, D model width, K slots a token, R routed rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.plan.row_plan import RowPlan


def gather_rows(x_TD: Tensor, plan: RowPlan) -> Tensor:
    """Returns ``[R, D]``, the token of each routed row; padding rows are zero and have no gradient."""
    return only_used(x_TD.index_select(0, plan.token_R), plan)


def only_used(rows_RD: Tensor, plan: RowPlan) -> Tensor:
    """Returns the rows with padding rows, and their gradient, replaced by zeros."""
    return rows_RD.where(plan.is_used_R1(), 0) if plan.is_padded else rows_RD


def combine_rows(rows_RD: Tensor, plan: RowPlan, weights_TK: Tensor | None) -> Tensor:
    """Computes ``out[t] = sum_k weights[t, k] * rows[row[t, k]]``, accumulated in at least fp32.

    Args:
        rows_RD: ``[R, D]``, or ``[R + 1, D]`` with a last row of zeros when the plan has unused slots.
        plan: Plan of the rows.
        weights_TK: ``[T, K]``, or None for a plain sum.

    Returns:
        ``[T, D]`` in the dtype of the rows.
    """
    D = rows_RD.shape[1]
    if rows_RD.device.type == "cpu" and rows_RD.dtype in (torch.float32, torch.float64):
        weights = None if weights_TK is None else weights_TK.to(rows_RD.dtype)
        return F.embedding_bag(plan.row_TK, rows_RD, mode="sum", per_sample_weights=weights)
    T, K = plan.row_TK.shape
    acc_TD = torch.zeros(T, D, dtype=torch.promote_types(rows_RD.dtype, torch.float32), device=rows_RD.device)
    for k in range(K):
        picked_TD = rows_RD.index_select(0, plan.row_TK[:, k]).to(acc_TD.dtype)
        if weights_TK is None:
            acc_TD += picked_TD
        else:
            acc_TD.addcmul_(picked_TD, weights_TK[:, k, None].to(acc_TD.dtype))
    return acc_TD.to(rows_RD.dtype)
