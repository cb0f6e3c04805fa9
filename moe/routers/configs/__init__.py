"""Options of the routers, one module each, which imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe.errors import Mistake
from moe.types import Config


@dataclass(frozen=True)
class RouterConfig(Config):
    """Config that every router has: its name, which picks the class, and what it needs of a model.

    Attributes:
        varies_top_k: True if K may change between steps, i.e. if the router routes by `LayerContext.top_k`.
        mixes_tokens: True if experts see linear combinations of tokens; the number of routed tokens then
            does not tell how much the experts compute.
    """

    varies_top_k: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = False

    name: str
    """The router's name, as in ``conf/router/NAME.yaml``."""

    def check(self, num_experts: int) -> Mistake | None:
        """Returns the mistake that keeps the router from routing over E experts; None if it can.

        The path is relative to this config.
        """
        top_k = self.experts_per_token
        if top_k <= num_experts:
            return None
        rule = f"a token cannot use more experts than the {num_experts} of upcycle.num_experts"
        remedy = f"Set router.top_k to {num_experts} or less, or raise upcycle.num_experts."
        return Mistake("top_k", top_k, rule, remedy)

    @property
    def experts_per_token(self) -> int:
        """Experts per token (the mean, where it varies): ``top_k``, or 1 for routers without it."""
        top_k: int = getattr(self, "top_k", 1)
        return top_k

    @property
    def needed_keys(self) -> frozenset[str]:
        """The keys of `RouterContext.keys` that the router cannot route without."""
        return frozenset()

    @property
    def reads_experts(self) -> bool:
        """True if the router routes by the experts' weights, which then must all be on every rank."""
        return False
