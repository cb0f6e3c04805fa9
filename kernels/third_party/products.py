"""Experts computed with another library's grouped product: gather, two products, gather-and-sum.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; I and O any widths in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.plan.row_plan import RowPlan
from kernels.torch.grouped_mm import CombineRows

#: Multiplies rows ``[R, I]`` in expert order by ``[E, O, I]`` to ``[R, O]``, differentiable in both.
Product = Callable[[Tensor, Tensor], Tensor]


def counted(plan: RowPlan) -> tuple[RowPlan, Tensor]:
    """Returns the plan without padding rows, and the rows of each expert on the host, which waits."""
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
    """Computes the expert outputs of rows in expert order, unweighted, with torch's activation between."""
    return product(experts.activate(product(x_RD, experts.w_up_EUD)), experts.w_down_EDF)


def by_product(
    x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors, product: Product
) -> Tensor:
    """Computes the experts with our gather before and our gather-and-sum after the products."""
    y_RD = hidden_to_rows(x_TD.index_select(0, plan.token_R), experts, product)
    out: Tensor = CombineRows.apply(y_RD, weights_TK, plan)  # type: ignore[no-untyped-call]
    return out
