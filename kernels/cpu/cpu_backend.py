"""Back end for CPUs: an autograd node, or the operators of `kernels.torch.expert_ops` in compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import ExpertTensors, LowRank, MainGrads, Workload
from kernels.cpu import cpu_path
from kernels.plan.row_plan import RowPlan
from kernels.torch.expert_ops import GRADIENTS, BackwardInputs, run_operators


class CpuBackend:
    """Fused CPU path in fp64, fp32 and bf16, forward and backward."""

    name = "cpu"

    def unsupported_reason(self, work: Workload) -> str | None:
        """Rejects other devices, and fp16, for which CPUs have no fast product."""
        if work.device.type != "cpu":
            return f"it runs on CPUs, and the weights are on {work.device.type}"
        if work.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            return f"it runs fp64, fp32 and bf16, not {work.dtype}"
        return None

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`."""
        # The loop over experts follows the row counts, which cannot be traced.
        if torch.compiler.is_compiling():
            return run_operators("cpu", x_TD.contiguous(), weights_TK, plan, experts)
        low = experts.low_rank
        weights = (experts.w_up_EUD, experts.w_down_EDF, experts.b_up_EU, experts.b_down_ED)
        tensors = (*weights, *((None,) * 4 if low is None else low.factors))
        function = (experts.activation, experts.gated, 0.0 if low is None else low.scale, experts.main_grads)
        out: Tensor = _ExpertMLP.apply(  # type: ignore[no-untyped-call]
            plan, function, x_TD.contiguous(), weights_TK, *tensors
        )
        return out


def _experts(tensors: tuple[Any, ...], function: tuple[str, bool, float, MainGrads | None]) -> ExpertTensors:
    w_up_EUD, w_down_EDF, b_up_EU, b_down_ED, *factors = tensors
    activation, gated, scale, main = function
    low = None if factors[0] is None else LowRank.of(factors, scale)
    return ExpertTensors(w_up_EUD, w_down_EDF, activation, gated, b_up_EU, b_down_ED, low, main)


class _ExpertMLP(torch.autograd.Function):
    """``out = sum_k w_k * expert_k(x)`` with the backward pass of `kernels.cpu.cpu_path`.

    In eager code it replaces the operators, whose calls cost more than the arithmetic of a few tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: RowPlan,
        function: tuple[str, bool, float, MainGrads | None],
        x_TD: Tensor,
        weights_TK: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        out_TD, *kept = cpu_path.forward(x_TD, weights_TK, _experts(tensors, function), plan, keep=True)
        ctx.save_for_backward(x_TD, weights_TK, *kept, *tensors)
        ctx.plan, ctx.function = plan, function
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        # Under checkpointing, saved tensors can be read once.
        saved = ctx.saved_tensors
        x_TD, weights_TK, *kept = saved[:5]
        experts = _experts(saved[5:], ctx.function)
        need = dict(zip(GRADIENTS, ctx.needs_input_grad[2:], strict=True))
        inputs = BackwardInputs(grad_TD, x_TD, weights_TK, experts, ctx.plan, kept, need)
        return None, None, *cpu_path.backward(inputs)
