"""State that routers carry between optimizer steps: sums over micro-batches, and moving thresholds.

Forward passes write it, optimizer steps move it; activation recomputation changes nothing, and buffers stay
fp32 when a model is cast.

Letters: N thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe.types import RouterContext


class Fp32Buffers(nn.Module):
    """Mix-in for modules whose state moves by small steps: in bf16 a bias of 1 absorbs a step of 0.001.

    ``model.to(torch.bfloat16)`` casts buffers like parameters; those named here keep their fp32 values.

    Attributes:
        fp32_buffers: Names of the buffers.
    """

    fp32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Buffers:
        before = {name: getattr(self, name) for name in self.fp32_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            cast = getattr(self, name)
            if cast.dtype != torch.float32:
                setattr(self, name, cast.float() if value.is_meta else value.float().to(cast.device))
        return self


@dataclass
class StepSums:
    """One tensor per micro-batch: written, not added, so that a recomputed forward pass overwrites its own.

    Attributes:
        step: The optimizer step of the entries.
        entries: Micro-batch to tensor.
    """

    step: int = -1
    entries: dict[int, Tensor] = field(default_factory=dict)

    def write(self, run: RouterContext, value: Tensor) -> None:
        """Writes the entry of the present micro-batch; entries of an earlier step are dropped."""
        if run.step != self.step:
            self.step = run.step
            self.entries.clear()
        self.entries[run.micro_batch] = value.detach()

    def so_far(self, run: RouterContext) -> Tensor:
        """Returns the sum up to the present micro-batch; the same when an earlier one is recomputed."""
        return torch.stack([v for m, v in self.entries.items() if m <= run.micro_batch]).sum(0)

    def take(self) -> Tensor | None:
        """Returns and clears the sum over the step, for ``after_optimizer_step``; None without entries."""
        if not self.entries:
            return None
        total = torch.stack([self.entries[m] for m in sorted(self.entries)]).sum(0)
        self.entries.clear()
        return total


class MovingThreshold(Fp32Buffers, nn.Module):
    """Exponential moving average of N thresholds over optimizer steps; the first step sets it.

    A step's measurement is the mean over its micro-batches and ranks, weighted by real tokens, so that N
    ranks equal one rank with N times the micro-batches.

    Attributes:
        value_N: ``[N]`` fp32.
        steps: Steps so far; before the first, `value_N` is meaningless.
    """

    fp32_buffers: ClassVar[tuple[str, ...]] = ("value_N",)
    value_N: Tensor
    steps: Tensor

    def __init__(self, num_thresholds: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value_N", torch.zeros(num_thresholds))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._sums = StepSums()

    def reset(self) -> None:
        """Forgets all steps."""
        self.value_N.zero_()
        self.steps.zero_()

    def measure(self, run: RouterContext, value_N: Tensor, num_tokens: Tensor) -> None:
        """Records the thresholds of the present micro-batch and its number of real tokens."""
        weight = num_tokens.float()
        # Without tokens the measured thresholds are meaningless.
        self._sums.write(run, torch.cat([torch.where(weight > 0, value_N.float() * weight, 0), weight[None]]))

    @torch.no_grad()
    def move(self, run: RouterContext) -> None:
        """Moves the thresholds, after an optimizer step, towards its measurement."""
        sums = self._sums.take()
        if sums is None:
            return
        if run.group is not None:
            torch.distributed.all_reduce(sums, group=run.group)
        has_tokens = sums[-1] > 0
        mean_N = sums[:-1] / sums[-1].clamp_min(1)
        moved_N = torch.where(self.steps > 0, torch.lerp(mean_N, self.value_N, self.decay), mean_N)
        self.value_N.copy_(torch.where(has_tokens, moved_N, self.value_N))
        self.steps += has_tokens
