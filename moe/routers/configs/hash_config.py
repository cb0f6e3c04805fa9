"""Options of `moe.routers.hash`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs import RouterConfig


@dataclass(frozen=True)
class HashConfig(RouterConfig):
    """Config of `HashRouter`."""

    name: Literal["hash"] = "hash"
    top_k: int = 1
    """Hashes: different experts per token."""
    table: Literal["random", "balanced", "modulo"] = "random"
    """Assignment of ids: drawn; the most frequent first, to the least loaded expert; or id modulo E."""
    table_size: int = 131072
    """Entries of the table. Larger ids share the entry of id modulo this."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.top_k >= 1, "top_k", "a token needs at least one expert", "Set it to 1 or more."),
            (
                self.table_size >= 1,
                "table_size",
                "a table has at least one entry",
                "Set it to the size of the vocabulary.",
            ),
        )
