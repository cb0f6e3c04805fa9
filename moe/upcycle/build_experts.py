"""Carries out a plan: one expert's matrix out of one dense matrix, block of rows by block of rows.

The blocks have a fixed height, so that a matrix is the same bit for bit whether it is made whole in memory
or streamed into a file.

Letters: D model width, E experts, F width of the dense network or of an expert, U = 2F when gated, else F.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from moe.experts.weights import ExpertBank, FFNWeights
from moe.upcycle.layer_plan import Draws, ExpertPlan, FFNShape, LayerPlan, Matrix, NeuronRows, RouterStart

# Elements of a block of rows: 16 MiB in fp32.
_BLOCK_ELEMENTS = 1 << 22


class DenseMatrix:
    """A matrix of a dense network and what plans ask of it.

    Attributes:
        weight: ``[F, D]`` for gate and up, ``[D, F]`` for down.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        height, width = self.weight.shape
        return height, width

    def rows(self, rows: slice) -> Tensor:
        """Some of the weight's rows as they are."""
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
    """Mean and standard deviation (of the population less one), summed in fp64."""
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
    """Of an expert's matrix."""
    return (model_width, plan.width) if matrix == "down" else (plan.width, model_width)


def expert_blocks(
    plan: ExpertPlan, matrix: Matrix, dense: DenseMatrix, generator: Generator
) -> Iterator[Tensor]:
    """An expert's matrix in blocks of rows, top to bottom.

    Args:
        plan: The expert.
        matrix: Which of its matrices.
        dense: The same matrix of its dense network.
        generator: Of `Draws.of_matrix`.

    Yields:
        Blocks in the dense dtype; a view of the dense matrix where nothing changes.
    """
    height, _ = expert_shape(plan, matrix, dense.shape[0 if matrix == "down" else 1])
    for _, block in expert_rows(plan, matrix, dense, generator, slice(0, height)):
        yield block


def expert_rows(
    plan: ExpertPlan, matrix: Matrix, dense: DenseMatrix, generator: Generator, wanted: slice
) -> Iterator[tuple[int, Tensor]]:
    """Some rows of an expert's matrix, the same bit for bit as in the whole of it.

    Args:
        plan: The expert.
        matrix: Which of its matrices.
        dense: The same matrix of its dense network. Where the plan keeps the matrix, only the wanted rows of
            it are asked for.
        generator: Of `Draws.of_matrix`, freshly made: rows before the wanted ones are drawn as well.
        wanted: From ``start`` to ``stop``.

    Yields:
        Index of a block's first row in the expert's matrix, and the block, in the dense dtype.
    """
    axis = 1 if matrix == "down" else 0
    if plan.keeps(matrix) and (axis == 0 or plan.width == dense.shape[1]):
        assert isinstance(plan.neurons_F, slice)
        first = plan.neurons_F.start if axis == 0 else 0
        yield wanted.start, dense.rows(slice(first + wanted.start, first + wanted.stop))
        return
    height, width = expert_shape(plan, matrix, dense.shape[1 - axis])
    factor = plan.scale.get(matrix, 1.0)
    drawing = _Drawing.of(plan, matrix, dense)
    draws = drawing is not None or plan.noise is not None
    for rows in _blocks(height, width):
        if rows.start >= wanted.stop or rows.stop <= wanted.start and not draws:
            continue
        block = _selected(plan, dense.weight, axis, rows)
        if factor != 1.0 or plan.noise is not None:
            block = _changed(plan, matrix, block, factor, dense, rows, generator)
        if drawing is not None:
            block = drawing.onto(block, rows, axis, generator)
        if rows.stop > wanted.start:
            start = max(rows.start, wanted.start)
            part = block[start - rows.start : wanted.stop - rows.start]
            yield start, part.to(dense.weight.dtype).contiguous()


def _selected(plan: ExpertPlan, weight: Tensor, axis: int, rows: slice) -> Tensor:
    """The dense weights of a block; for an expert that is drawn, zeros to draw into."""
    if plan.neurons_F is None:
        height = rows.stop - rows.start
        shape = (height, weight.shape[1]) if axis == 0 else (height, plan.width)
        return weight.new_zeros(shape)
    if axis == 0:
        if isinstance(plan.neurons_F, slice):
            return weight[plan.neurons_F][rows]
        return weight[plan.neurons_F[rows]]
    return weight[rows][:, plan.neurons_F]


def _changed(
    plan: ExpertPlan,
    matrix: Matrix,
    block: Tensor,
    factor: float,
    dense: DenseMatrix,
    rows: slice,
    generator: Generator,
) -> Tensor:
    """Noise, then the factor; in at least fp32."""
    values = block.to(torch.promote_types(block.dtype, torch.float32), copy=True)
    if plan.noise is not None:
        std = plan.noise.std * (dense.moments[1] if plan.noise.relative else 1.0)
        noise = torch.randn(values.shape, generator=generator).to(values) * std
        where = None if plan.noise.positions is None else plan.noise.positions[matrix]
        if where is None:
            values += noise
        else:
            values += noise * _mask(where, plan.width, values, matrix, rows)
    return values * factor


def _mask(where: Tensor, width: int, like: Tensor, matrix: Matrix, rows: slice) -> Tensor:
    """1 at the neurons that are meant, as a column or a row of the block."""
    chosen_F = torch.zeros(width, dtype=like.dtype, device=like.device)
    chosen_F[where] = 1
    return chosen_F if matrix == "down" else chosen_F[rows, None]


@dataclass(frozen=True)
class _Drawing:
    """Which neurons of a matrix are drawn anew, and out of which distribution."""

    chosen_F: Tensor
    mean: float
    std: float

    @staticmethod
    def of(plan: ExpertPlan, matrix: Matrix, dense: DenseMatrix) -> _Drawing | None:
        if plan.drawn is None:
            return None
        drawn = plan.drawn
        chosen_F = torch.ones(plan.width, dtype=torch.bool)
        if drawn.positions is not None:
            chosen_F = torch.zeros(plan.width, dtype=torch.bool)
            chosen_F[drawn.positions[matrix]] = True
        if drawn.std is not None:
            return _Drawing(chosen_F, 0.0, drawn.std)
        if drawn.moments == "matrix":
            return _Drawing(chosen_F, *dense.moments)
        axis = 1 if matrix == "down" else 0
        height, width = expert_shape(plan, matrix, dense.weight.shape[1 - axis])
        parts = (
            _at(_selected(plan, dense.weight, axis, rows), chosen_F, rows, axis)
            for rows in _blocks(height, width)
        )
        return _Drawing(chosen_F, *_moments(parts))

    def onto(self, block: Tensor, rows: slice, axis: int, generator: Generator) -> Tensor:
        """The block with fresh weights at the chosen neurons."""
        fresh = torch.randn(block.shape, generator=generator) * self.std + self.mean
        chosen = self.chosen_F[rows, None] if axis == 0 else self.chosen_F[None]
        return torch.where(chosen.to(block.device), fresh.to(block), block)


def _at(block: Tensor, chosen_F: Tensor, rows: slice, axis: int) -> Tensor:
    return block[chosen_F[rows]] if axis == 0 else block[:, chosen_F]


def expert_bias(plan: ExpertPlan, matrix: Matrix, dense: Tensor) -> Tensor:
    """An expert's bias, ``[F]`` for gate and up and ``[D]`` for down, from the dense one."""
    if matrix == "down":
        return dense * plan.down_bias
    if plan.neurons_F is None:
        return dense.new_zeros(plan.width)
    bias_F = dense[plan.neurons_F] * plan.scale.get(matrix, 1.0)
    if plan.drawn is not None:
        where = plan.drawn.positions
        bias_F[slice(None) if where is None else where[matrix]] = 0
    return bias_F


@dataclass(frozen=True)
class BuiltLayer:
    """The weights of one layer of a mixture.

    Attributes:
        bank: The routed experts.
        shared: The expert that every token uses; None for none.
        router: How the router begins, in tensors.
    """

    bank: ExpertBank
    shared: FFNWeights | None
    router: RouterStart


def ffn_shape(ffn: FFNWeights) -> FFNShape:
    """The shape of a network in memory."""
    return FFNShape(
        width=ffn.width,
        model_width=ffn.model_width,
        gated=ffn.gate_FD is not None,
        activation=ffn.activation,
        up_bias=ffn.b_up_F is not None,
        down_bias=ffn.b_down_D is not None,
    )


@torch.no_grad()
def build_layer(plan: LayerPlan, ffns: Sequence[FFNWeights], draws: Draws) -> BuiltLayer:
    """Carries out a plan in memory.

    Args:
        plan: Of the layer.
        ffns: The dense networks that its experts come from, all of one shape.
        draws: The layer's randomness.
    """
    dense = [_matrices(ffn) for ffn in ffns]
    first = ffns[0]
    matrices = ffn_shape(first).matrices
    stacks: dict[Matrix, Tensor] = {}
    biases: dict[Matrix, Tensor] = {}
    for matrix in matrices:
        shape = expert_shape(plan.experts[0], matrix, first.model_width)
        stack = first.up_FD.new_empty((len(plan.experts), *shape))
        for e, expert in enumerate(plan.experts):
            _fill(stack[e], expert, matrix, dense[expert.source][matrix], draws.of_matrix(e, matrix))
        stacks[matrix] = stack
        if _bias(first, matrix) is not None:
            biases[matrix] = torch.stack(
                [_expert_bias(expert, matrix, ffns[expert.source]) for expert in plan.experts]
            )
    bank = ExpertBank(
        w_up_EUD=torch.cat([stacks["gate"], stacks["up"]], 1) if "gate" in stacks else stacks["up"],
        w_down_EDF=stacks["down"],
        activation=first.activation,
        gated=first.gate_FD is not None,
        b_up_EU=torch.cat([biases["gate"], biases["up"]], 1) if "gate" in biases else biases.get("up"),
        b_down_ED=biases.get("down"),
    )
    shared = None if plan.shared is None else _build_shared(plan.shared, ffns, dense, draws)
    return BuiltLayer(bank, shared, router_start(plan.router, dense[0]))


def router_start(start: RouterStart, dense: Mapping[Matrix, DenseMatrix]) -> RouterStart:
    """A plan's start of the router with the dense rows that it names read, in fp32 or better.

    Args:
        start: Of the plan.
        dense: The matrices of dense network 0; those that the start names are looked at.
    """
    rows_ED = start.rows_ED
    if isinstance(rows_ED, NeuronRows):
        rows_ED = _neuron_rows(rows_ED, dense)
    tensors = {
        name: _neuron_rows(value, dense) if isinstance(value, NeuronRows) else value
        for name, value in start.tensors.items()
    }
    return replace(start, rows_ED=rows_ED, tensors=tensors)


def _neuron_rows(rows: NeuronRows, dense: Mapping[Matrix, DenseMatrix]) -> Tensor:
    weight_FD = dense[rows.matrix].weight
    rows_END = weight_FD[rows.neurons_EN.to(weight_FD.device)]
    rows_END = rows_END.to(torch.promote_types(weight_FD.dtype, torch.float32))
    if rows.normalised:
        rows_END = normalize(rows_END, dim=-1)
    return rows_END.mean(1)


def _matrices(ffn: FFNWeights) -> Mapping[Matrix, DenseMatrix]:
    found: dict[Matrix, DenseMatrix] = {"up": DenseMatrix(ffn.up_FD), "down": DenseMatrix(ffn.down_DF)}
    if ffn.gate_FD is not None:
        found["gate"] = DenseMatrix(ffn.gate_FD)
    return found


def _bias(ffn: FFNWeights, matrix: Matrix) -> Tensor | None:
    return {"gate": ffn.b_gate_F, "up": ffn.b_up_F, "down": ffn.b_down_D}[matrix]


def _expert_bias(plan: ExpertPlan, matrix: Matrix, ffn: FFNWeights) -> Tensor:
    bias = _bias(ffn, matrix)
    assert bias is not None, f"{matrix} has no bias in source {plan.source}"
    return expert_bias(plan, matrix, bias)


def _fill(target: Tensor, plan: ExpertPlan, matrix: Matrix, dense: DenseMatrix, generator: Generator) -> None:
    row = 0
    for block in expert_blocks(plan, matrix, dense, generator):
        target[row : row + len(block)] = block
        row += len(block)
    assert row == len(target), (row, tuple(target.shape))


def _build_shared(
    plan: ExpertPlan,
    ffns: Sequence[FFNWeights],
    dense: Sequence[Mapping[Matrix, DenseMatrix]],
    draws: Draws,
) -> FFNWeights:
    ffn = ffns[plan.source]
    made: dict[Matrix, Tensor] = {}
    biases: dict[Matrix, Tensor | None] = {"gate": None, "up": None, "down": None}
    for matrix in ffn_shape(ffn).matrices:
        made[matrix] = ffn.up_FD.new_empty(expert_shape(plan, matrix, ffn.model_width))
        _fill(made[matrix], plan, matrix, dense[plan.source][matrix], draws.of_matrix(None, matrix))
        if _bias(ffn, matrix) is not None:
            biases[matrix] = _expert_bias(plan, matrix, ffn)
    return FFNWeights(
        up_FD=made["up"],
        down_DF=made["down"],
        activation=ffn.activation,
        gate_FD=made.get("gate"),
        b_gate_F=biases["gate"],
        b_up_F=biases["up"],
        b_down_D=biases["down"],
    )
