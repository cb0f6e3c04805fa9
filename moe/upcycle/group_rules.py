"""Rules of virtual groups that options alone tell; `moe.upcycle.router_faults` has those of a router.

A virtual group (arXiv 2410.07524) consists of experts with equal router rows, which a token uses together.
"""

from __future__ import annotations

from moe.errors import Mistake
from moe.routers.configs import RouterConfig


def group_mistakes(router: RouterConfig, num_experts: int, group_size: int) -> list[Mistake]:
    """Requires experts of a layer, and of a token, that are whole virtual groups.

    Args:
        router: The router's config.
        num_experts: Experts of a layer.
        group_size: Experts of a group, above 0.
    """
    found, remedy = [], f"Set a multiple of {group_size}."
    if num_experts % group_size:
        rule = f"it is no multiple of the {group_size} experts of a virtual group"
        found.append(Mistake("upcycle.num_experts", num_experts, rule, remedy))
    if router.experts_per_token % group_size:
        rule = f"a token must use whole virtual groups, of {group_size} experts each"
        option = "router.top_k" if hasattr(router, "top_k") else "router.name"
        found.append(Mistake(option, router.experts_per_token, rule, remedy))
    return found
