"""Sets the parameters of a router as a method wants them to begin.

Letters: D model width, E experts, G experts of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.layer_plan import RouterStart

#: Among the statistics of a layer: router rows ``[E, D]`` that somebody else has chosen.
GIVEN_ROWS = "given_rows_ED"


@torch.no_grad()
def take_given_rows(router: Router[Any], known: Mapping[str, Tensor]) -> None:
    """Sets a router's rows to those given for its layer; nothing where there are none.

    Args:
        router: Of a method that does not set them itself.
        known: The layer's statistics.
    """
    given_ED = known.get(GIVEN_ROWS)
    if given_ED is None:
        return
    rows_ED = router.rows_ED()
    assert rows_ED is not None, f"{router.name} has no rows; whoever gives some checks that"
    rows_ED.copy_(given_ED)


@torch.no_grad()
def start_rows(router: Router[Any], start: RouterStart) -> None:
    """Changes a router's freshly drawn parameters in place; nothing for a start that asks for nothing.

    Groups take the rows that were drawn for the first ``E / G`` experts, each G times over: expert n has
    row ``n // G``, so that the logits of a group tie (arXiv 2410.07524, virtual groups).

    Args:
        router: Freshly drawn.
        start: Of `moe.upcycle.build_experts.router_start`, so that everything in it is a tensor.
    """
    for name, value in start.tensors.items():
        assert isinstance(value, Tensor), f"{name} is still to be read from the dense network"
        router.get_parameter(name).copy_(value)
    if start.group_size == 1 and start.rows_ED is None:
        return
    rows_ED = router.rows_ED()
    assert rows_ED is not None, f"{router.name} has no rows; the method's check refuses it"
    if start.rows_ED is not None:
        assert isinstance(start.rows_ED, Tensor), "the rows are still to be read from the dense network"
        rows_ED.copy_(start.rows_ED)
    if start.group_size > 1:
        E = rows_ED.shape[0]
        assert E % start.group_size == 0, (E, start.group_size)
        rows_ED.copy_(rows_ED[: E // start.group_size].repeat_interleave(start.group_size, dim=0))
