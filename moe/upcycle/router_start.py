"""Sets the initial parameters of a router that a method prescribes.

Letters: D model width, E experts, G experts of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.layer_plan import RouterStart

#: Name, among a layer's statistics, of router rows ``[E, D]`` that come from outside the method.
GIVEN_ROWS = "given_rows_ED"


@torch.no_grad()
def take_given_rows(router: Router[Any], known: Mapping[str, Tensor]) -> None:
    """Sets a router's rows to those given for its layer, if any.

    Args:
        router: Router of a method that does not set rows itself.
        known: The layer's statistics.
    """
    given_ED = known.get(GIVEN_ROWS)
    if given_ED is None:
        return
    rows_ED = router.rows_ED()
    assert rows_ED is not None, f"{router.name} has no rows; the source of the rows checks that"
    rows_ED.copy_(given_ED)


@torch.no_grad()
def start_rows(router: Router[Any], start: RouterStart) -> None:
    """Overwrites a router's freshly drawn parameters where a start prescribes them.

    Groups repeat the rows drawn for the first ``E / G`` experts G times each: expert n has row ``n // G``, so
    that the logits of a group tie (arXiv 2410.07524, virtual groups).

    Args:
        router: Freshly drawn.
        start: Result of `moe.upcycle.build_experts.router_start`, with tensors only.
    """
    for name, value in start.tensors.items():
        assert isinstance(value, Tensor), f"{name} has not been read from the dense network"
        router.get_parameter(name).copy_(value)
    if start.group_size == 1 and start.rows_ED is None:
        return
    rows_ED = router.rows_ED()
    assert rows_ED is not None, f"{router.name} has no rows; the method's check rejects it"
    if start.rows_ED is not None:
        assert isinstance(start.rows_ED, Tensor), "the rows have not been read from the dense network"
        rows_ED.copy_(start.rows_ED)
    if start.group_size > 1:
        E = rows_ED.shape[0]
        assert E % start.group_size == 0, (E, start.group_size)
        rows_ED.copy_(rows_ED[: E // start.group_size].repeat_interleave(start.group_size, dim=0))
