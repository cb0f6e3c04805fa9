"""Interface between the MoE layer and the back ends that compute its experts.

Letters: T tokens, D model width, E experts, K slots a token, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.plan.row_plan import RowPlan


@dataclass(frozen=True)
class LowRank:
    """Low-rank factors beside the stacked weights (LoRA, arXiv 2106.09685): ``W x + scale * B (A x)``.

    The matrix ``B A`` is never formed: each side is two more grouped products of rank r.

    Attributes:
        a_up_ErD: ``[E, r, D]``.
        b_up_EUr: ``[E, U, r]``, rows in the order of those of w_up.
        a_down_ErF: ``[E, r, F]``.
        b_down_EDr: ``[E, D, r]``.
        scale: ``alpha / r``.
    """

    a_up_ErD: Tensor
    b_up_EUr: Tensor
    a_down_ErF: Tensor
    b_down_EDr: Tensor
    scale: float

    @staticmethod
    def of(factors: Sequence[Tensor], scale: float) -> LowRank:
        """Makes it from the four factors in the order of the fields."""
        a_up_ErD, b_up_EUr, a_down_ErF, b_down_EDr = factors
        return LowRank(a_up_ErD, b_up_EUr, a_down_ErF, b_down_EDr, scale)

    @property
    def rank(self) -> int:
        """r."""
        return self.a_up_ErD.shape[1]

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four factors, in the order of the fields."""
        return self.a_up_ErD, self.b_up_EUr, self.a_down_ErF, self.b_down_EDr


@dataclass(frozen=True)
class MainGrads:
    """fp32 buffers that accumulate the weights' gradients, in place of gradients returned by autograd.

    Attributes:
        w_up_EUD: ``[E, U, D]`` fp32, contiguous.
        w_down_EDF: ``[E, D, F]`` fp32, contiguous.
    """

    w_up_EUD: Tensor
    w_down_EDF: Tensor


@dataclass(frozen=True)
class ExpertTensors:
    """Stacked weights of E experts, in the layout of nn.Linear: ``[out, in]``.

    Attributes:
        w_up_EUD: ``[E, U, D]``; gated: the F gate rows first, then the F up rows.
        w_down_EDF: ``[E, D, F]``.
        activation: A key of `kernels.activations.ACTIVATIONS`.
        gated: Whether the expert is ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``.
        b_up_EU: ``[E, U]`` or None.
        b_down_ED: ``[E, D]`` or None.
        low_rank: Low-rank factors of both weights, or None.
        main_grads: Buffers for the gradients of both weights; None returns these gradients.
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

    def activate(self, h_RU: Tensor) -> Tensor:
        """Computes the input ``[R, F]`` of the down projection, differentiable by autograd."""
        act = ACTIVATIONS[self.activation]
        return act.hidden(*h_RU.chunk(2, dim=-1)) if self.gated else act.forward(h_RU)


@dataclass(frozen=True)
class Workload:
    """Properties of a layer, and of a batch where it is known, that a back end is chosen by.

    Attributes:
        low_rank: Rank of the low-rank factors; 0 without factors.
        accumulates: Whether the weights' gradients are added to fp32 buffers.
        gated: Whether the experts have a gate.
        rows: Routed rows; None where they are unknown, or the choice must hold for every batch.
        tokens: Tokens of these rows; None as `rows` is.
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
        """Returns the workload with the rows and tokens of a plan filled in."""
        return replace(self, rows=plan.num_rows, tokens=len(plan.row_TK))

    @property
    def multiplications(self) -> float:
        """Multiplications in one product over all rows, averaged over up and down; infinite if unknown."""
        if self.rows is None:
            return math.inf
        up = 2 * self.expert_width if self.gated else self.expert_width
        return self.rows * self.model_width * (up + self.expert_width) / 2


class Backend(Protocol):
    """One implementation of the expert computation."""

    @property
    def name(self) -> str:
        """The value of ``experts.backend`` that forces this back end."""

    def unsupported_reason(self, work: Workload) -> str | None:
        """Returns why the workload cannot run here, as a clause; None when it can."""

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """Computes ``out[t] = sum_k weights[t, k] * expert[t, k](x[t])``, ``[T, D]`` in the dtype of x."""
