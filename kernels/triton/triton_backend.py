"""Back end of our own Triton kernels: for GPUs, and for CPU tensors under Triton's interpreter.

It saves only x and the pre-activation H, gathers inside the products, sums the slots of a token in fixed
order, and never waits for the device. No GPU has run it yet: see docs/kernels.md.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import ExpertTensors, Workload
from kernels.plan.row_plan import RowPlan
from kernels.torch.expert_ops import run_operators
from kernels.triton.tuned_blocks import unsupported_reason as tuned_unsupported_reason

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
# One program holds the prefix sum over all experts.
_MOST_EXPERTS = 4096


class TritonBackend:
    """Triton kernels: up, down and gather-and-sum forward; dH, dW and dX backward."""

    name = "triton"

    def unsupported_reason(self, work: Workload) -> str | None:
        """Rejects fp64, all but NVIDIA GPUs from compute capability 8.0, and machines without Triton."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if work.dtype not in _DTYPES:
            return f"it runs fp32, bf16 and fp16, not {work.dtype}"
        if work.activation not in ACTIVATIONS:
            return f"it has no activation {work.activation!r}"
        if work.num_experts > _MOST_EXPERTS:
            return f"it runs up to {_MOST_EXPERTS} experts, not {work.num_experts}"
        return _device_unsupported_reason(work.device)

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`."""
        low, main = experts.low_rank, experts.main_grads
        factors = [] if low is None else low.factors
        main_grads = [] if main is None else [main.w_up_EUD, main.w_down_EDF]
        kinds = [tensor.dtype for tensor in (*factors, *main_grads)]
        expected = [x_TD.dtype] * len(factors) + [torch.float32] * len(main_grads)
        assert kinds == expected, f"factors and fp32 buffers are {kinds}, beside {x_TD.dtype}"
        return run_operators("triton", x_TD, weights_TK, plan, experts)


def _device_unsupported_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "it runs on GPUs; on a CPU only under Triton's interpreter, with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"it runs on GPUs, and the weights are on {device.type}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 runs kernels on CPU tensors, and the weights are on cuda"
    if torch.version.hip is not None:
        return "it is not built for AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, and {device} has {capability[0]}.{capability[1]}"
    return tuned_unsupported_reason(device)
