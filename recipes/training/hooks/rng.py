"""Random states of a rank, as checkpoints keep them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def get_rng(device: torch.device) -> dict[str, Tensor]:
    """Returns the random states of this rank."""
    states = {"rng_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets the random states of this rank to what `get_rng` returned."""
    torch.set_rng_state(states["rng_cpu"])
    if device.type == "cuda" and "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"], device)
