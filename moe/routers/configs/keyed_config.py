"""Options of `moe.routers.keyed`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig

TOKEN_IDS = "token_ids"


@dataclass(frozen=True)
class KeyedConfig(RouterConfig):
    """Config of `KeyedRouter`."""

    name: Literal["keyed"] = "keyed"
    key: str = "modality"
    """Name of the caller's key that routes; ``token_ids``: the ids of the batch."""
    edges: list[float] = field(default_factory=list)
    """Edges between ranges of a number, ascending; none if the key is the expert itself. A number on an edge
    belongs to the range above it: an edge is the first id of its range."""
    experts: list[int] = field(default_factory=list)
    """The expert of each range; none: range n has expert n. With edges [4, 8196] and experts [0, 1, 0] the
    ids from 4 to 8195 go to expert 1, those below and above to expert 0."""

    def __post_init__(self) -> None:
        ranges = len(self.edges) + 1
        require(
            self,
            (
                all(low < high for low, high in pairwise(self.edges)),
                "edges",
                "they do not ascend",
                "Sort them, each once.",
            ),
            (
                len(self.experts) in (0, ranges),
                "experts",
                f"{len(self.edges)} edges make {ranges} ranges, each with its expert",
                "Name as many, or leave experts empty.",
            ),
            (
                self.key != TOKEN_IDS or bool(self.edges),
                "edges",
                "ids of tokens are not experts",
                "Set router.edges to the first id of every range but the first.",
            ),
        )

    def check(self, num_experts: int) -> Mistake | None:
        """Requires that every range has an expert, and every expert a range."""
        if not self.edges:
            return None
        experts = set(self.experts or range(len(self.edges) + 1))
        if experts == set(range(num_experts)):
            return None
        if self.experts:
            rule = f"must name each of the {num_experts} experts, and no other"
            remedy = f"Correct it, or set upcycle.num_experts to {max(experts) + 1}."
            return Mistake("experts", self.experts, rule, remedy)
        rule = f"{len(self.edges)} edges make {len(experts)} ranges, and there are {num_experts} experts"
        remedy = (
            f"Give {max(num_experts - 1, 0)} edges, say by router.experts which expert each range has, or "
            f"set upcycle.num_experts to {len(experts)}."
        )
        return Mistake("edges", self.edges, rule, remedy)

    @property
    def needed_keys(self) -> frozenset[str]:
        """The key, unless the batch itself has it."""
        return frozenset({self.key} - {TOKEN_IDS})
