"""Elements of a router, by matrices and others."""

from __future__ import annotations

from torch import nn


def router_elements(router: nn.Module) -> tuple[int, int]:
    """Returns the elements of the matrices that a token is multiplied by, and of all others."""
    matrix = sum(param.numel() for param in router.parameters() if param.ndim >= 2)
    return matrix, sum(param.numel() for param in router.parameters()) - matrix
