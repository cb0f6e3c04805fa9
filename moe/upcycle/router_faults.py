"""Checks for properties of a router that methods need, reported as a user's mistakes.

A virtual group (arXiv 2410.07524) consists of experts with equal router rows, which a token uses together.

Letters: E experts, G experts of a group, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe.errors import Mistake
from moe.routers.configs import RouterConfig
from moe.upcycle.gates import Gates, keeps_groups, observe

# Options that can separate experts with equal rows, with the value at which they do not.
_CALM: dict[str, object] = {"noise_scale": 0, "jitter": 0, "second": "always", "num_groups": 1}
_REMEDY = "Choose a router that selects by the logits of a linear map alone, such as topk."


def group_faults(router: RouterConfig, num_experts: int, group_size: int) -> list[Mistake]:
    """Returns why a router cannot use whole groups; empty if it does, also in training.

    Args:
        router: The router's config, which has passed its own check.
        num_experts: E.
        group_size: G, above 0.
    """
    if group_size == 1:
        return []
    found = []
    if num_experts % group_size:
        rule = f"it is no multiple of the {group_size} experts of a virtual group"
        remedy = f"Set a multiple of {group_size}."
        found.append(Mistake("upcycle.num_experts", num_experts, rule, remedy))
    gates = observe(router, num_experts)
    if gates.top_k % group_size:
        rule = f"a token must use whole virtual groups, of {group_size} experts each"
        remedy = f"Set a multiple of {group_size}."
        option = "router.top_k" if hasattr(router, "top_k") else "router.name"
        found.append(Mistake(option, gates.top_k, rule, remedy))
    if not gates.has_rows:
        rule = "it has no row for each expert, and the experts of a virtual group share one"
        found.append(Mistake("router.name", router.name, rule, _REMEDY))
    return found or list(_parting_faults(router, num_experts, group_size))


def _parting_faults(router: RouterConfig, num_experts: int, group_size: int) -> Iterator[Mistake]:
    kept = [keeps_groups(router, num_experts, group_size, training) for training in (False, True)]
    if all(kept):
        return
    rule = "it separates the experts of a virtual group, whose rows are equal"
    if kept[0]:
        rule = f"in training {rule}"
    causes = [name for name, calm in _CALM.items() if getattr(router, name, calm) != calm]
    for name in causes:
        remedy = f"Set router.{name}={_CALM[name]}, or choose a router without it, such as topk."
        yield Mistake(f"router.{name}", getattr(router, name), rule, remedy)
    if not causes:
        yield Mistake("router.name", router.name, rule, _REMEDY)


def sum_faults(router: RouterConfig, gates: Gates, otherwise: str) -> list[Mistake]:
    """Returns why no factor can compensate for the weights of a router; empty if one can.

    Args:
        router: The router's config.
        gates: Observed gates of the router.
        otherwise: The setting that needs no factor.
    """
    if gates.total is not None:
        return []
    rule = "the sum of its weights differs from token to token, so that no factor compensates for it"
    remedy = f"Choose a router whose weights sum to 1, such as topk, or set {otherwise}."
    return [Mistake("router.name", router.name, rule, remedy)]
