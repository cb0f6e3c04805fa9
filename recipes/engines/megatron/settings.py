"""What a Megatron engine is told of the model, whatever the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipes.engines.megatron.dispatchers import Dispatcher, dispatchers
from recipes.engines.megatron.expert_kinds import ExpertKind, expert_kinds


@dataclass(frozen=True)
class Settings:
    """How a model is built.

    Attributes:
        device: Where this rank computes.
        dtype: Of parameters but routers', which are fp32; where it is lower the optimizer keeps fp32 weights.
        experts: Name of a kind of experts.
        dispatcher: Name of what sends tokens to their experts.
        distributed: Whether each data-parallel rank keeps the optimizer's state of a part alone.
        recomputes: Whether a block's activations are computed again in backward.
    """

    device: torch.device
    dtype: torch.dtype
    experts: str
    dispatcher: str
    distributed: bool
    recomputes: bool

    @property
    def kind(self) -> ExpertKind:
        """Of the experts."""
        return expert_kinds()[self.experts]()

    @property
    def sends(self) -> Dispatcher:
        """What sends tokens."""
        return dispatchers()[self.dispatcher]
