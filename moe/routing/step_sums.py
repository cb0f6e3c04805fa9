"""Sums over the micro-batches of a step, safe under activation recomputation.

Letters: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.types import RouterContext


@dataclass
class StepSums:
    """One tensor a micro-batch: written, not added, so that a recomputed forward pass overwrites its own.

    Attributes:
        step: The optimizer step that the entries are of.
        entries: Micro-batch to tensor.
    """

    step: int = -1
    entries: dict[int, Tensor] = field(default_factory=dict)

    def write(self, run: RouterContext, value: Tensor) -> None:
        """Writes the entry of the present micro-batch; those of an earlier step are forgotten."""
        if run.step != self.step:
            self.step = run.step
            self.entries.clear()
        self.entries[run.micro_batch] = value.detach()

    def so_far(self, run: RouterContext) -> Tensor:
        """The sum up to the present micro-batch: the same when an earlier one is recomputed."""
        return torch.stack([v for m, v in self.entries.items() if m <= run.micro_batch]).sum(0)

    def take(self) -> Tensor | None:
        """The sum over the step, for ``after_optimizer_step``; clears it. None where nothing was written."""
        if not self.entries:
            return None
        total = torch.stack([self.entries[m] for m in sorted(self.entries)]).sum(0)
        self.entries.clear()
        return total
