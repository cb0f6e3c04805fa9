"""Cases of the benchmark and their tensors.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.bench.bench_shapes import Shape, expert_ids
from kernels.plan.row_plan import RowPlan, make_plan


@dataclass(frozen=True)
class Case:
    """One case of the benchmark.

    Attributes:
        shape: The layer.
        tokens: T.
        routing: A member of `kernels.bench.bench_shapes.ROUTINGS`.
        dtype: Dtype of tokens and experts.
        device: Device of all tensors.
    """

    shape: Shape
    tokens: int
    routing: str
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Layer:
    """Tensors of a case.

    Attributes:
        case: Shape, tokens, routing, dtype and device.
        x_TD: Tokens.
        weights_TK: Their combine weights.
        ids_TK: Their experts.
        experts: The weights.
        grad_TD: Gradient of the output.
    """

    case: Case
    x_TD: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    experts: ExpertTensors
    grad_TD: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tensors that gradients are taken of."""
        return self.x_TD, self.weights_TK, self.experts.w_up_EUD, self.experts.w_down_EDF

    def first(self, tokens: int) -> Layer:
        """Returns the same layer with only the first tokens."""
        return replace(
            self,
            case=replace(self.case, tokens=tokens),
            x_TD=self.x_TD.detach()[:tokens].requires_grad_(),
            weights_TK=self.weights_TK.detach()[:tokens].requires_grad_(),
            ids_TK=self.ids_TK[:tokens],
            grad_TD=self.grad_TD[:tokens],
        )

    def plan(self, tokens: int) -> RowPlan:
        """Returns the plan of the first tokens."""
        return make_plan(self.ids_TK[:tokens], self.case.shape.experts)


def make_layer(case: Case) -> Layer:
    """Makes the random tensors of a case."""
    s = case.shape
    g = torch.Generator(case.device).manual_seed(0)

    def normal(*size: int, std: float) -> Tensor:
        value = torch.empty(size, dtype=case.dtype, device=case.device).normal_(std=std, generator=g)
        return value.requires_grad_()

    ids_TK = expert_ids(s, case.tokens, case.routing).to(case.device)
    weights_TK = torch.rand(case.tokens, s.slots, device=case.device, generator=g).requires_grad_()
    up = normal(s.experts, 2 * s.expert_width, s.width, std=s.width**-0.5)
    down = normal(s.experts, s.width, s.expert_width, std=s.expert_width**-0.5)
    x_TD = normal(case.tokens, s.width, std=1.0)
    grad_TD = normal(case.tokens, s.width, std=1.0).detach()
    return Layer(case, x_TD, weights_TK, ids_TK, ExpertTensors(up, down, "silu", True), grad_TD)
