"""Thresholds that follow the batches: measured in every forward pass of training, moved once a step.

Letters: N thresholds.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe.routing.fp32_buffers import Fp32Buffers
from moe.routing.step_sums import StepSums
from moe.types import RouterContext


class MovingThreshold(Fp32Buffers, nn.Module):
    """An exponential moving average of N thresholds over optimizer steps; the first step sets it.

    What a step measures is the mean over its micro-batches and ranks, each by its real tokens, so that N
    ranks equal one rank with N times the micro-batches.

    Attributes:
        value_N: ``[N]`` fp32.
        steps: Steps that it has followed; 0 before any, when `value_N` means nothing.
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
        """Forgets what it has followed."""
        self.value_N.zero_()
        self.steps.zero_()

    def measure(self, run: RouterContext, value_N: Tensor, num_tokens: Tensor) -> None:
        """Writes the thresholds of the present micro-batch and the real tokens they are of."""
        weight = num_tokens.float()
        # Thresholds of no token may be anything.
        self._sums.write(run, torch.cat([torch.where(weight > 0, value_N.float() * weight, 0), weight[None]]))

    @torch.no_grad()
    def move(self, run: RouterContext) -> None:
        """After the optimizer step: towards what its micro-batches, on all ranks, have measured."""
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
