"""Bias on the choice of experts that moves towards even load between optimizer steps, without a loss.

Source: Wang et al. 2024 (arXiv 2408.15664).

Letters: E experts, K experts a token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moe.routing.balance import count_load
from moe.routing.step_state import Fp32Buffers, StepSums
from moe.types import LayerContext


class LoadBias(Fp32Buffers):
    """Bias of routers that choose by score plus bias.

    Attributes:
        bias_E: ``[E]`` fp32, saved with the model; it has no gradient.
    """

    fp32_buffers: ClassVar[tuple[str, ...]] = ("bias_E",)
    bias_E: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        """Registers a bias of 0.

        Args:
            num_experts: E.
            rate: Step size; 0 leaves the bias unchanged.
        """
        super().__init__()
        self.rate = rate
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self._slots = StepSums()

    def count(self, ids_TK: Tensor, ctx: LayerContext) -> None:
        """Counts the experts that this rank's real tokens chose in training."""
        if self.rate:
            load = count_load(ids_TK, len(self.bias_E), ctx.token_mask_T(len(ids_TK)))
            self._slots.write(ctx.run, load.counts_E)

    @torch.no_grad()
    def move(self, ctx: LayerContext) -> None:
        """Moves the bias, after an optimizer step, towards even load over the step's batch on all ranks."""
        taken_E = self._slots.take()
        if self.rate == 0:
            return
        counts_E = torch.zeros_like(self.bias_E) if taken_E is None else taken_E
        if ctx.run.group is not None:
            torch.distributed.all_reduce(counts_E, group=ctx.run.group)
        self.bias_E.add_((counts_E.mean() - counts_E).sign(), alpha=self.rate)
