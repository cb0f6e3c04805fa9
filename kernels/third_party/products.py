"""Experts from another library's grouped product: rows in expert order, two products, a gather-and-sum.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; I and O any widths in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.torch.grouped_mm import CombineRows

#: Rows ``[R, I]`` in expert order times ``[E, O, I]``: ``[R, O]``, differentiable in both.
Product = Callable[[Tensor, Tensor], Tensor]


def counted(plan: RowPlan) -> tuple[RowPlan, Tensor]:
    """The plan without rows that no expert owns, and the rows of each expert on the host, which waits."""
    sizes_E = plan.counts_E.cpu()
    used = int(sizes_E.sum())
    trimmed = replace(
        plan,
        token_R=plan.token_R[:used],
        slot_R=plan.slot_R[:used],
        row_TK=plan.row_TK.clamp(max=used),
        is_padded=False,
    )
    return trimmed, sizes_E


def hidden_to_rows(x_RD: Tensor, experts: ExpertTensors, product: Product) -> Tensor:
    """Both products of rows that are in expert order already, the activation by torch; not yet weighted."""
    h_RU = product(x_RD, experts.w_up_EUD)
    act = ACTIVATIONS[experts.activation]
    a_RF = act.hidden(*h_RU.chunk(2, dim=1)) if experts.gated else act.forward(h_RU)
    return product(a_RF, experts.w_down_EDF)


def by_product(
    x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors, product: Product
) -> Tensor:
    """The whole computation: our gather before, our gather-and-sum behind."""
    y_RD = hidden_to_rows(x_TD.index_select(0, plan.token_R), experts, product)
    out: Tensor = CombineRows.apply(y_RD, weights_TK, plan)  # type: ignore[no-untyped-call]
    return out
