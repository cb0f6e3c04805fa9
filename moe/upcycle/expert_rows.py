"""Streams an expert's matrix out of one dense matrix, block of rows by block of rows.

The blocks have a fixed height, so that a matrix is bit for bit the same whether it is made whole in memory or
streamed into a file.

Letters: D model width, F width of the dense network or of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from moe.upcycle.dense_shape import Matrix
from moe.upcycle.layer_plan import ExpertPlan

# Elements of a block of rows: 16 MiB in fp32.
_BLOCK_ELEMENTS = 1 << 22


class DenseMatrix:
    """Matrix of a dense network, as plans read it.

    Attributes:
        weight: ``[F, D]`` for gate and up, ``[D, F]`` for down.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the weight."""
        height, width = self.weight.shape
        return height, width

    def rows(self, rows: slice) -> Tensor:
        """Returns some of the weight's rows unchanged."""
        return self.weight[rows]

    @cached_property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all elements."""
        return _moments(self.weight[rows] for rows in _blocks(*self.weight.shape))


def _blocks(height: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, height, step):
        yield slice(start, min(height, start + step))


def _moments(blocks: Iterator[Tensor]) -> tuple[float, float]:
    """Returns mean and standard deviation (with divisor N - 1), summed in fp64."""
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        values = block.double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    mean = total / max(1, count)
    variance = (squares - count * mean * mean) / max(1, count - 1)
    return mean, max(0.0, variance) ** 0.5


def expert_shape(plan: ExpertPlan, matrix: Matrix, model_width: int) -> tuple[int, int]:
    """Returns the shape of an expert's matrix."""
    return (model_width, plan.width) if matrix == "down" else (plan.width, model_width)


def expert_blocks(
    plan: ExpertPlan, matrix: Matrix, dense: DenseMatrix, generator: Generator
) -> Iterator[Tensor]:
    """Yields an expert's matrix in blocks of rows, top to bottom.

    Args:
        plan: The expert.
        matrix: The expert's matrix.
        dense: The same matrix of its dense network.
        generator: From `Draws.of_matrix`.

    Yields:
        Blocks in the dense dtype; a view of the dense matrix if nothing changes.
    """
    height, _ = expert_shape(plan, matrix, dense.shape[0 if matrix == "down" else 1])
    for _, block in expert_rows(plan, matrix, dense, generator, slice(0, height)):
        yield block


def expert_rows(
    plan: ExpertPlan, matrix: Matrix, dense: DenseMatrix, generator: Generator, wanted: slice
) -> Iterator[tuple[int, Tensor]]:
    """Yields some rows of an expert's matrix, bit for bit as in the whole matrix.

    Args:
        plan: The expert.
        matrix: The expert's matrix.
        dense: The same matrix of its dense network. Where the plan keeps the matrix, only its wanted rows are
            read.
        generator: From `Draws.of_matrix`, freshly made: rows before the wanted ones are drawn as well.
        wanted: Rows from ``start`` to ``stop``.

    Yields:
        Index of a block's first row in the expert's matrix, and the block, in the dense dtype.
    """
    made = _ExpertMatrix(plan, matrix, dense)
    if plan.keeps(matrix) and (made.axis == 0 or plan.width == dense.shape[1]):
        assert isinstance(plan.neurons_F, slice)
        first = plan.neurons_F.start if made.axis == 0 else 0
        yield wanted.start, dense.rows(slice(first + wanted.start, first + wanted.stop))
        return
    drawing = made.drawing()
    draws = drawing is not None or plan.noise is not None
    for rows in _blocks(*made.shape):
        if rows.start >= wanted.stop or rows.stop <= wanted.start and not draws:
            continue
        block = made.perturbed(made.selected(rows), rows, generator)
        if drawing is not None:
            block = drawing.onto(block, rows, made.axis, generator)
        if rows.stop > wanted.start:
            start = max(rows.start, wanted.start)
            part = block[start - rows.start : wanted.stop - rows.start]
            yield start, part.to(dense.weight.dtype).contiguous()


@dataclass(frozen=True)
class _ExpertMatrix:
    """One matrix of an expert, with the dense matrix that it is made from.

    Attributes:
        plan: The expert.
        matrix: The expert's matrix.
        dense: The same matrix of its dense network.
    """

    plan: ExpertPlan
    matrix: Matrix
    dense: DenseMatrix

    @property
    def axis(self) -> int:
        """Axis of the neurons."""
        return 1 if self.matrix == "down" else 0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the expert's matrix."""
        return expert_shape(self.plan, self.matrix, self.dense.shape[1 - self.axis])

    def selected(self, rows: slice) -> Tensor:
        """Returns the dense weights of a block; zeros for an expert whose weights are all drawn."""
        weight, neurons_F = self.dense.weight, self.plan.neurons_F
        if neurons_F is None:
            height = rows.stop - rows.start
            return weight.new_zeros((height, weight.shape[1] if self.axis == 0 else self.plan.width))
        if self.axis == 1:
            return weight[rows][:, neurons_F]
        return weight[neurons_F][rows] if isinstance(neurons_F, slice) else weight[neurons_F[rows]]

    def perturbed(self, block: Tensor, rows: slice, generator: Generator) -> Tensor:
        """Applies the plan's noise and factor, in at least fp32; returns the block if there are none."""
        noise, factor = self.plan.noise, self.plan.scale.get(self.matrix, 1.0)
        if factor == 1.0 and noise is None:
            return block
        values = block.to(torch.promote_types(block.dtype, torch.float32), copy=True)
        if noise is not None:
            std = noise.std * (self.dense.moments[1] if noise.relative else 1.0)
            added = torch.randn(values.shape, generator=generator).to(values) * std
            if noise.positions is not None:
                chosen_F = torch.zeros(self.plan.width, dtype=values.dtype, device=values.device)
                chosen_F[noise.positions[self.matrix]] = 1
                added = added * (chosen_F if self.axis == 1 else chosen_F[rows, None])
            values += added
        return values * factor

    def drawing(self) -> _Drawing | None:
        """Returns the plan's fresh draws; None without any."""
        drawn = self.plan.drawn
        if drawn is None:
            return None
        chosen_F = torch.ones(self.plan.width, dtype=torch.bool)
        if drawn.positions is not None:
            chosen_F = torch.zeros(self.plan.width, dtype=torch.bool)
            chosen_F[drawn.positions[self.matrix]] = True
        if drawn.std is not None:
            return _Drawing(chosen_F, 0.0, drawn.std)
        if drawn.moments == "matrix":
            return _Drawing(chosen_F, *self.dense.moments)
        parts = (
            self.selected(rows)[chosen_F[rows]] if self.axis == 0 else self.selected(rows)[:, chosen_F]
            for rows in _blocks(*self.shape)
        )
        return _Drawing(chosen_F, *_moments(parts))


@dataclass(frozen=True)
class _Drawing:
    """Neurons of a matrix that are drawn anew, with the normal distribution that they come from."""

    chosen_F: Tensor
    mean: float
    std: float

    def onto(self, block: Tensor, rows: slice, axis: int, generator: Generator) -> Tensor:
        """Returns the block with fresh weights at the chosen neurons."""
        fresh = torch.randn(block.shape, generator=generator) * self.std + self.mean
        chosen = self.chosen_F[rows, None] if axis == 0 else self.chosen_F[None]
        return torch.where(chosen.to(block.device), fresh.to(block), block)


def expert_bias(plan: ExpertPlan, matrix: Matrix, dense: Tensor) -> Tensor:
    """Returns an expert's bias, ``[F]`` for gate and up and ``[D]`` for down, made from the dense one."""
    if matrix == "down":
        return dense * plan.down_bias
    if plan.neurons_F is None:
        return dense.new_zeros(plan.width)
    bias_F = dense[plan.neurons_F] * plan.scale.get(matrix, 1.0)
    if plan.drawn is not None:
        where = plan.drawn.positions
        bias_F[slice(None) if where is None else where[matrix]] = 0
    return bias_F
