"""Checks for properties of a router that methods need, reported as a user's mistakes.

A virtual group (arXiv 2410.07524) consists of experts with equal router rows, which a token uses together.

Letters: E experts, G experts of a group, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe.errors import Mistake
from moe.routers.configs import RouterConfig
from moe.upcycle.gates import Gates, keeps_groups, observe
from moe.upcycle.group_rules import group_mistakes

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
    return group_mistakes(router, num_experts, group_size) or observed_group_faults(
        router, num_experts, group_size
    )


def observed_group_faults(router: RouterConfig, num_experts: int, group_size: int) -> list[Mistake]:
    """Returns those of `group_faults` that a router shows when it runs, unless `group_mistakes` has some."""
    if group_size == 1 or group_mistakes(router, num_experts, group_size):
        return []
    if not observe(router, num_experts).has_rows:
        rule = "it has no row for each expert, and the experts of a virtual group share one"
        return [Mistake("router.name", router.name, rule, _REMEDY)]
    return list(_parting_faults(router, num_experts, group_size))


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
