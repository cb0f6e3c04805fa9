"""Entry point of the expert computation: chooses a back end, and runs it.

The choice depends on device, dtype and shape, and on a CPU also on the number of rows. It carries its reason
and can be forced; a forced back end that cannot run a workload is an error, never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kernels.activations import activation_unsupported_reason
from kernels.backend import Backend, ExpertTensors, Workload
from kernels.cpu.cpu_backend import CpuBackend
from kernels.plan.row_plan import RowPlan
from kernels.third_party import THIRD_PARTY
from kernels.torch.expert_loop import LoopBackend
from kernels.torch.grouped_mm import GroupedMMBackend
from kernels.triton.triton_backend import TritonBackend

_GROUPED = GroupedMMBackend()

# Multiplications of a product up to which calls cost a CPU more than arithmetic: in fp32, and in bf16 with at
# most so many experts, since padded batches win above. The rows of one token form a batch without padding,
# which wins in both dtypes. Measured by `python -m kernels.bench --part layer decode`.
_FEW_MULTIPLICATIONS = 50_000_000
_FEW_EXPERTS = 4

#: Back ends by the name that forces them, our own before those of third parties. Not a MappingProxyType:
#: torch.compile cannot read one once the traced code has changed any dict.
BACKENDS: Mapping[str, Backend] = {
    **{backend.name: backend for backend in (CpuBackend(), TritonBackend(), _GROUPED, LoopBackend())},
    **THIRD_PARTY,
}


class BackendError(ValueError):
    """A forced back end does not exist or cannot run the workload."""


@dataclass(frozen=True)
class Choice:
    """A back end and the reason it was chosen, as a sentence for the log."""

    backend: Backend
    reason: str


def choose_backend(work: Workload, forced: str = "auto") -> Choice:
    """Picks the back end for a workload.

    Args:
        work: Device, dtype and shape.
        forced: A key of `BACKENDS`, or ``auto``.

    Raises:
        BackendError: The forced back end is unknown or cannot run the workload; the message says why.
    """
    # Plain values one by one: the only form of a constant that torch.compile accepts.
    values = work.device, work.dtype, work.num_experts, work.model_width, work.expert_width, work.activation
    flags = work.has_bias, work.low_rank, work.accumulates, work.gated, work.rows, work.tokens
    name, reason = _named(forced, *values, *flags)
    return Choice(BACKENDS[name], reason)


def few_products(work: Workload) -> bool:
    """Returns whether a CPU multiplies so little that the cost of calls decides."""
    if work.device.type != "cpu" or work.multiplications > _FEW_MULTIPLICATIONS or work.tokens == 1:
        return False
    assert work.rows is not None, work
    return work.dtype == torch.float32 or min(work.rows, work.num_experts) <= _FEW_EXPERTS


# torch.compile must not trace the look-up of installed packages; such a constant call takes plain values.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _named(forced: str, *values: Any) -> tuple[str, str]:
    assert len(values) == len(fields(Workload)), values
    work = Workload(*values)
    if forced != "auto":
        if forced not in BACKENDS:
            raise BackendError(f"no back end is called {forced!r}; there are: auto, {', '.join(BACKENDS)}")
        unsupported_reason = BACKENDS[forced].unsupported_reason(work)
        if unsupported_reason is not None:
            raise BackendError(f"the back end {forced!r} cannot run this: {unsupported_reason}")
        return forced, "forced by experts.backend"
    if BACKENDS["cpu"].unsupported_reason(work) is None:
        if few_products(work) and _GROUPED.unsupported_reason(work) is None:
            return "grouped_mm", f"{work.dtype} on CPU, so few products that F.grouped_mm's lighter calls win"
        return "cpu", f"fused path for {work.dtype} on CPU"
    # Add triton and third-party back ends here, for the shapes in which kernels.bench shows them faster.
    unsupported_reason = _GROUPED.unsupported_reason(work)
    if unsupported_reason is None:
        how = "one fused kernel" if _GROUPED.is_fused(work) else "a loop over experts inside torch here"
        return "grouped_mm", f"F.grouped_mm takes {work.dtype} on {work.device.type} ({how})"
    return "loop", f"F.grouped_mm cannot run this: {unsupported_reason}; one expert after the other"


def expert_mlp(
    x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors, backend: Backend
) -> Tensor:
    """Computes ``out[t] = sum_k weights[t, k] * expert[t, k](x[t])`` over the used slots.

    Args:
        x_TD: ``[T, D]`` tokens.
        weights_TK: ``[T, K]`` fp32 combine weights; differentiable.
        plan: Routed rows in expert order, from `kernels.plan.row_plan.make_plan`.
        experts: Stacked weights in the dtype of x.
        backend: From `choose_backend`.

    Returns:
        ``[T, D]`` in the dtype of x.

    Raises:
        BackendError: The activation is unknown, or needs gated experts.
    """
    if (unsupported_reason := activation_unsupported_reason(experts.activation, experts.gated)) is not None:
        raise BackendError(f"no back end can run this: {unsupported_reason}")
    # Back ends address the weights by flat slot.
    return backend.run(x_TD, weights_TK.contiguous(), plan, experts)
