"""Mixes experts into one: neurons are brought into one order, then weights are averaged.

Letters: F expert width, N features of a neuron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.upcycle.dense_shape import Matrix
from recipes.models.export.placement import ExpertTensorKey, pieces
from recipes.models.export.spec import MoESpec
from recipes.models.families.source_mixture import SourceMixture

#: Matrix, and whether it is its bias -> weights of one expert.
Weights = Mapping[tuple[Matrix, bool], Tensor]


@dataclass(frozen=True)
class Mixed:
    """Experts mixed into one.

    Attributes:
        weights: Its weights, in the dtype of the first.
        before: Squared distance of the others from the first over the first's square, mean over the others.
        after: The same once neurons are in one order.
    """

    weights: Weights
    before: float
    after: float


def read_expert(
    mixture: SourceMixture, moe: MoESpec, expert: int | None
) -> dict[tuple[Matrix, bool], Tensor]:
    """Reads one expert's weights (None: the shared one's)."""
    found: dict[tuple[Matrix, bool], Tensor] = {}
    for piece, shape in pieces(moe):
        if piece.expert == expert:
            slot = mixture.placement.slot(piece)
            assert slot.factor == 1.0, slot
            run = mixture.files.read_run(slot.name, slot.offset, slot.offset + torch.Size(shape).numel())
            found[piece.matrix, piece.bias] = run.view(shape)
    return found


def expert_key(moe: MoESpec, expert: int, key: tuple[Matrix, bool]) -> ExpertTensorKey:
    """Returns the key of one of an expert's weights in files."""
    return ExpertTensorKey(moe.index, expert, *key)


@torch.no_grad()
def mix_experts(experts: Iterator[Weights], shares: Sequence[float], *, aligns: bool) -> Mixed:
    """Returns the weighted mean of experts; three of them are in memory at a time.

    What all have alike comes out bit for bit: the mean is the first plus the mean of differences from it, in
    fp64.

    Args:
        experts: Weights of each; neurons are in the order of the first's.
        shares: Share of each in the mean; they sum to 1.
        aligns: Whether the others' neurons are brought into that order.
    """
    first = next(experts)
    mean = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in first.items()}
    square = sum(float(tensor.double().square().sum()) for tensor in first.values())
    before = after = 0.0
    for share, other in zip(shares[1:], experts, strict=True):
        before += _distance(first, other)
        ordered = _reordered(other, neuron_order(first, other)) if aligns else other
        after += _distance(first, ordered)
        for key, tensor in ordered.items():
            mean[key] += share * (tensor.double() - first[key].double())
    mixed = {
        key: torch.where(mean[key] == 0, tensor.double(), tensor.double() + mean[key]).to(tensor.dtype)
        for key, tensor in first.items()
    }
    number = max(1, len(shares) - 1) * max(square, 1e-300)
    return Mixed(mixed, before / number, after / number)


def neuron_order(first: Weights, other: Weights) -> Tensor:
    """Returns ``[F]`` neurons of the other in the order that brings them nearest to the first's.

    They minimise the sum of squared distances over all rows and columns of a neuron, by linear assignment
    (arXiv 2310.01334, section 3.2, over both sides of the network).
    """
    a_FN, b_FN = _neurons(first), _neurons(other)
    # Less the squares of the first's, which no order changes.
    cost_FF = b_FN.square().sum(-1) - 2 * (a_FN @ b_FN.T)
    nearest_F = cost_FF.argmin(-1)
    if len(nearest_F.unique()) == len(nearest_F):
        return nearest_F  # each has its own nearest: no order is better
    return torch.from_numpy(linear_sum_assignment(cost_FF.numpy())[1])


def _neurons(weights: Weights) -> Tensor:
    sides = [
        tensor.T if matrix == "down" else tensor.reshape(len(tensor), -1)
        for (matrix, bias), tensor in weights.items()
        if not (matrix == "down" and bias)
    ]
    return torch.cat([side.float() for side in sides], dim=1)


def _reordered(weights: Weights, order_F: Tensor) -> Weights:
    def one(matrix: Matrix, bias: bool, tensor: Tensor) -> Tensor:
        if matrix == "down":
            return tensor if bias else tensor[:, order_F]
        return tensor[order_F]

    return {key: one(*key, tensor) for key, tensor in weights.items()}


def _distance(first: Weights, other: Weights) -> float:
    return sum(float((first[key].double() - other[key].double()).square().sum()) for key in first)
