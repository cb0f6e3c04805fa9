"""What a router holds, in the accounts' two kinds."""

from __future__ import annotations

from torch import nn


def router_elements(router: nn.Module) -> tuple[int, int]:
    """Elements of the matrices that a token is multiplied by, and all others; those of meta tensors, too."""
    matrix = sum(param.numel() for param in router.parameters() if param.ndim >= 2)
    return matrix, sum(param.numel() for param in router.parameters()) - matrix
