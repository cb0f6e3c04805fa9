"""Options of `moe.upcycle.cmoe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.upcycle.configs import UpcycleConfig


@dataclass(frozen=True)
class CMoEConfig(UpcycleConfig):
    """Config of `CMoE`."""

    name: Literal["cmoe"] = "cmoe"
    num_experts: int = 14
    """Routed experts."""
    num_shared: int = 2
    """Width of the shared expert in widths of a routed one; 0 for none."""
    activation_top_k: int = 10
    """Neurons that a token marks."""
    marker_tokens: int = 4096
    """Tokens whose marks form the groups; rates are counted over the whole text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            *(
                (getattr(self, name) >= low, name, f"must be at least {low}", "Raise it.")
                for name, low in (("num_shared", 0), ("activation_top_k", 1), ("marker_tokens", 1))
            ),
        )
