"""Settings that a Megatron model is built with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipes.engines.megatron.dispatchers import Dispatcher
from recipes.engines.megatron.expert_kinds.base import ExpertKind


@dataclass(frozen=True)
class BuildSettings:
    """Settings that a model is built with, whatever the model.

    Attributes:
        device: Device of this rank.
        dtype: Dtype of all parameters but the routers', which are fp32. If it is lower than fp32, the
            optimizer keeps fp32 weights.
        experts: The kind of experts.
        dispatcher: What sends tokens to their experts.
        distributed: Whether the optimizer state is sharded over the data-parallel ranks.
        recomputes: Whether the activations of a block are recomputed in backward.
    """

    device: torch.device
    dtype: torch.dtype
    experts: ExpertKind
    dispatcher: Dispatcher
    distributed: bool
    recomputes: bool
