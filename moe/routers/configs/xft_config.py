"""Options of `moe.routers.xft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import require
from moe.routers.configs.linear_config import LinearRouterConfig


@dataclass(frozen=True)
class XFTConfig(LinearRouterConfig):
    """Config of `XFTRouter`."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["xft"] = "xft"
    top_k: int = 2
    """Experts per token, the first one included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k >= 2,
                "top_k",
                "the first expert is one of them, and a choice needs another",
                "Set it to 2 or more.",
            ),
        )
