"""Options of `moe.routers.soft_moe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import require
from moe.routers.configs import RouterConfig


@dataclass(frozen=True)
class SoftMoEConfig(RouterConfig):
    """Config of `SoftMoERouter`."""

    mixes_tokens: ClassVar[bool] = True

    name: Literal["soft_moe"] = "soft_moe"
    slots_per_expert: int = 16
    """Averages of a sequence that each expert sees. With S / E of them it costs one expert per token."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.slots_per_expert >= 1,
                "slots_per_expert",
                "an expert sees something",
                "Set it to 1 or more.",
            ),
        )
