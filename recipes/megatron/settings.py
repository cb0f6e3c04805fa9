"""What a Megatron engine is told of the model, whatever the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Settings:
    """How a model is built.

    Attributes:
        device: Where this rank computes.
        dtype: Of parameters but routers', which are fp32; where it is lower the optimizer keeps fp32 weights.
        experts: ``graft`` for the host's own, ``megatron`` for Megatron's, one after the other.
        distributed: Whether each data-parallel rank keeps the optimizer's state of a part alone.
        recomputes: Whether a block's activations are computed again in backward.
    """

    device: torch.device
    dtype: torch.dtype
    experts: Literal["graft", "megatron"]
    distributed: bool
    recomputes: bool
