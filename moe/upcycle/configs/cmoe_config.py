"""Options of `moe.upcycle.cmoe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes

_ROUTER = "analytical"


@dataclass(frozen=True)
class CMoEConfig(UpcycleConfig):
    """Config of `CMoE`."""

    starts_router: ClassVar[bool] = True
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

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires parts of one width, and CMoE's own router."""
        found = []
        if router.name != _ROUTER:
            rule = "its experts are chosen by their own neurons, which no other router has"
            found.append(Mistake("router.name", router.name, rule, f"Set router={_ROUTER}."))
        remedy = "Set another number, or another num_shared."
        parts = self.num_experts + self.num_shared
        return found + division_mistakes(shape, parts, "num_experts", self.num_experts, remedy)
