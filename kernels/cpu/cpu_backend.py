"""The back end for CPUs: one autograd node, or, for ``torch.compile``, two operators that do the same."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import ExpertTensors, Workload
from kernels.cpu.cpu_ops import run_operators
from kernels.cpu.expert_autograd import ExpertMLP, Kind, Weights
from kernels.plan.row_plan import RowPlan


class CpuBackend:
    """The fused CPU path: fp64, fp32 and bf16, forward and backward."""

    name = "cpu"

    def unsupported_reason(self, work: Workload) -> str | None:
        """Refuses other devices, and fp16, for which CPUs have no fast product."""
        if work.device.type != "cpu":
            return f"it runs on CPUs, and the weights are on {work.device.type}"
        if work.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            return f"it runs fp64, fp32 and bf16, not {work.dtype}"
        return None

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`."""
        # The node loops over the experts as the counts say, which nothing can trace.
        if torch.compiler.is_compiling() and experts.main_grads is None:
            return run_operators(x_TD.contiguous(), weights_TK, plan, experts)
        kind = Kind(
            act=ACTIVATIONS[experts.activation],
            gated=experts.gated,
            scale=0.0 if experts.low_rank is None else experts.low_rank.scale,
            main_grads=experts.main_grads,
        )
        out: Tensor = ExpertMLP.apply(  # type: ignore[no-untyped-call]
            plan, kind, x_TD.contiguous(), weights_TK, *Weights.of(experts)
        )
        return out
