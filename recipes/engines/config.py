"""Options that engines share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Rule, require
from moe.types import Config

# OpenMP ends the process without a word where the system has no room for its threads.
_MOST_THREADS = 4096


@dataclass(frozen=True)
class EngineConfig(Config):
    """Base of the engines' configs, whose name picks the engine."""

    name: str
    """The engine's name, as in ``conf/engine/NAME.yaml``."""


@dataclass(frozen=True)
class ProcessConfig(EngineConfig):
    """Options of a `ProcessEngine`."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products. Master weights, router and loss are always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: GPUs if there are any."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of each rank; ``auto``: on CPUs, the cores divided by the ranks of this machine."""
    activation_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    expert_parallel: int = 1
    """Ranks over which the experts of a layer are sharded; tokens travel to them. 1: every rank holds all."""

    def __post_init__(self) -> None:
        require(self, *self.rules())

    def rules(self) -> list[Rule]:
        """Returns the rules of the options."""
        return [
            (
                self.threads == "auto" or 1 <= self.threads <= _MOST_THREADS,
                "threads",
                f"must be 1 to {_MOST_THREADS}",
                "Or leave it at auto.",
            ),
            (
                self.expert_parallel >= 1,
                "expert_parallel",
                "must be at least 1",
                "Give 1 for experts on every rank.",
            ),
        ]

    def device_type(self) -> str:
        """Returns ``cpu`` or ``cuda``."""
        if self.device == "auto":
            import torch

            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device
