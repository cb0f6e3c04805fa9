"""What a back end of the expert computation is, and what it is given.

Letters: T tokens, D model width, E experts, K slots a token, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.plan.row_plan import RowPlan


@dataclass(frozen=True)
class LowRank:
    """Low-rank factors beside the stacked weights (LoRA, arXiv 2106.09685): ``W x + scale * B (A x)``.

    The product ``B A`` is never made: each side is two more grouped products of rank r.

    Attributes:
        a_up_ErD: ``[E, r, D]``.
        b_up_EUr: ``[E, U, r]``, rows as those of w_up.
        a_down_ErF: ``[E, r, F]``.
        b_down_EDr: ``[E, D, r]``.
        scale: ``alpha / r``.
    """

    a_up_ErD: Tensor
    b_up_EUr: Tensor
    a_down_ErF: Tensor
    b_down_EDr: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a_up_ErD.shape[1]


@dataclass(frozen=True)
class MainGrads:
    """fp32 buffers that the weights' gradients are added to; autograd then sees none for the weights.

    Attributes:
        w_up_EUD: ``[E, U, D]`` fp32, contiguous.
        w_down_EDF: ``[E, D, F]`` fp32, contiguous.
    """

    w_up_EUD: Tensor
    w_down_EDF: Tensor


@dataclass(frozen=True)
class ExpertTensors:
    """The stacked weights of E experts, in the layout of nn.Linear: ``[out, in]``.

    Attributes:
        w_up_EUD: ``[E, U, D]``; gated: the F gate rows first, then the F up rows.
        w_down_EDF: ``[E, D, F]``.
        activation: A key of `kernels.activations.ACTIVATIONS`.
        gated: Whether the expert is ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``.
        b_up_EU: ``[E, U]`` or None.
        b_down_ED: ``[E, D]`` or None.
        low_rank: Factors beside both weights, or None.
        main_grads: Where the gradients of both weights are added, or None: they are returned.
    """

    w_up_EUD: Tensor
    w_down_EDF: Tensor
    activation: str
    gated: bool
    b_up_EU: Tensor | None = None
    b_down_ED: Tensor | None = None
    low_rank: LowRank | None = None
    main_grads: MainGrads | None = None

    @property
    def width(self) -> int:
        """F."""
        return self.w_down_EDF.shape[2]


@dataclass(frozen=True)
class Workload:
    """What a back end is chosen by.

    Attributes:
        low_rank: The rank of low-rank factors, 0 where there are none.
        accumulates: Whether the weights' gradients are to be added to fp32 buffers.
        gated: Whether the experts have a gate.
        rows: How many rows are routed to experts, where that is known before they run; None where it is not,
            or where the answer is to hold for all batches.
        tokens: Of how many tokens, where the rows are known.
    """

    device: torch.device
    dtype: torch.dtype
    num_experts: int
    model_width: int
    expert_width: int
    activation: str
    has_bias: bool
    low_rank: int = 0
    accumulates: bool = False
    gated: bool = True
    rows: int | None = None
    tokens: int | None = None

    def with_rows(self, plan: RowPlan) -> Workload:
        """The same with the rows of a plan known."""
        return replace(self, rows=plan.num_rows, tokens=len(plan.row_TK))

    @property
    def multiplications(self) -> float:
        """Of one product of all rows, the mean of up and down; infinite where the rows are not known."""
        if self.rows is None:
            return math.inf
        up = 2 * self.expert_width if self.gated else self.expert_width
        return self.rows * self.model_width * (up + self.expert_width) / 2


class Backend(Protocol):
    """One way of computing the experts."""

    @property
    def name(self) -> str:
        """The value of ``experts.backend`` that forces this back end."""

    def unsupported_reason(self, work: Workload) -> str | None:
        """Why this back end cannot run the workload, as a clause; None when it can."""

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """``out[t] = sum_k weights[t, k] * expert[t, k](x[t])``, ``[T, D]`` in the dtype of x."""
