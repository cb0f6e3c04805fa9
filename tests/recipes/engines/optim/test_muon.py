"""Muon against torch.optim.Muon, and stacks against their matrices one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from recipes.engines.optim.muon import StackedMuon, adjusted_lr, orthogonalise

# The iteration runs in bf16 (eps 2^-8) and its result is multiplied by the adjusted lr: batched and single
# products may round apart, so updates are compared to within two roundings of an update of size one.
BF16_EPS = 2.0**-8


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (6, 6), (1, 5)])
@pytest.mark.parametrize("adjustment", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_one_matrix_is_torch_muon(shape: tuple[int, int], adjustment: str, nesterov: bool) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs, flat, stacked = (nn.Parameter(start.clone()) for _ in range(3))
    stacked = nn.Parameter(stacked.detach()[None].clone())
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    train(torch.optim.Muon([theirs], adjust_lr_fn=adjustment, **settings), [theirs])
    train(StackedMuon([flat], adjustment=adjustment, **settings), [flat])
    train(StackedMuon([stacked], adjustment=adjustment, **settings), [stacked])
    tolerance = 3 * 2 * BF16_EPS * adjusted_lr(0.05, *shape, adjustment)
    torch.testing.assert_close(flat, theirs, rtol=0, atol=tolerance)
    torch.testing.assert_close(stacked[0], theirs, rtol=0, atol=tolerance)


def test_a_stack_is_its_matrices_one_by_one() -> None:
    stack = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalise(stack[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(orthogonalise(stack), alone, rtol=0, atol=2 * BF16_EPS)


def test_singular_values_go_near_one_and_vectors_stay() -> None:
    matrix = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix).float())
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    # X = U f(S) V^T, so U^T X V is diagonal
    core = u.mT @ orthogonalise(matrix).float() @ vh.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.05


def test_no_matrices_is_no_work() -> None:
    assert orthogonalise(torch.empty(0, 3, 4)).shape == (0, 3, 4)


def test_input_is_left_alone() -> None:
    matrix = torch.randn(1, 3, 4, dtype=torch.bfloat16)
    before = matrix.clone()
    orthogonalise(matrix)
    assert torch.equal(matrix, before)


def test_blocks_are_matrices_of_their_own() -> None:
    start = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    fused = nn.Parameter(start.clone())
    fused.grad = gradient
    halves = [nn.Parameter(half.clone()) for half in start.chunk(2, dim=1)]
    for half, grad in zip(halves, gradient.chunk(2, dim=1), strict=True):
        half.grad = grad
    StackedMuon([fused], lr=0.1, blocks=2).step()
    StackedMuon(halves, lr=0.1).step()
    tolerance = 2 * BF16_EPS * adjusted_lr(0.1, 4, 4, "match_rms_adamw")
    torch.testing.assert_close(fused, torch.cat(halves, dim=1), rtol=0, atol=tolerance)


def test_adjusted_lr_by_hand() -> None:
    assert adjusted_lr(0.1, 9, 4, "original") == pytest.approx(0.1 * 1.5)  # sqrt(9 / 4)
    assert adjusted_lr(0.1, 4, 9, "original") == pytest.approx(0.1)
    assert adjusted_lr(0.1, 4, 9, "match_rms_adamw") == pytest.approx(0.1 * 0.2 * math.sqrt(9))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="a parameter is \\(4,\\)"):
        StackedMuon([nn.Parameter(torch.zeros(4))])
    with pytest.raises(ValueError, match="5 rows do not divide into 2"):
        StackedMuon([nn.Parameter(torch.zeros(2, 5, 3))], blocks=2)
