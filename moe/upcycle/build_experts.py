"""Builds a layer of experts in memory as a plan prescribes.

Letters: D model width, E experts, F width of the dense network or of an expert, U = 2F when gated, else F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from moe.experts.weights import ExpertBank, FFNWeights
from moe.upcycle.dense_shape import FFNShape, Matrix
from moe.upcycle.expert_rows import DenseMatrix, expert_bias, expert_blocks, expert_shape
from moe.upcycle.layer_plan import Draws, ExpertPlan, LayerPlan, NeuronRows, RouterStart


@dataclass(frozen=True)
class BuiltLayer:
    """Weights of one MoE layer.

    Attributes:
        bank: The routed experts.
        shared: The expert that every token uses; None without one.
        router: Initial parameters of the router, as tensors.
    """

    bank: ExpertBank
    shared: FFNWeights | None
    router: RouterStart


def ffn_shape(ffn: FFNWeights) -> FFNShape:
    """Returns the shape of a network in memory."""
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
    """Builds a layer in memory.

    Args:
        plan: Plan of the layer.
        ffns: The dense networks that its experts come from, all of one shape.
        draws: The layer's randomness.
    """
    dense = [_matrices(ffn) for ffn in ffns]
    first = ffns[0]
    stacks, biases = _stacks(list(enumerate(plan.experts)), ffns, dense, draws)
    bank = ExpertBank(
        w_up_EUD=torch.cat([stacks["gate"], stacks["up"]], 1) if "gate" in stacks else stacks["up"],
        w_down_EDF=stacks["down"],
        activation=first.activation,
        gated=first.gate_FD is not None,
        b_up_EU=torch.cat([biases["gate"], biases["up"]], 1) if "gate" in biases else biases.get("up"),
        b_down_ED=biases.get("down"),
    )
    shared = None
    if plan.shared is not None:
        stacks, biases = _stacks([(None, plan.shared)], ffns, dense, draws)
        weights = {matrix: stack[0] for matrix, stack in stacks.items()}
        vectors = {matrix: stack[0] for matrix, stack in biases.items()}
        shared = FFNWeights(
            up_FD=weights["up"],
            down_DF=weights["down"],
            activation=first.activation,
            gate_FD=weights.get("gate"),
            b_gate_F=vectors.get("gate"),
            b_up_F=vectors.get("up"),
            b_down_D=vectors.get("down"),
        )
    return BuiltLayer(bank, shared, router_start(plan.router, dense[0]))


def _stacks(
    experts: Sequence[tuple[int | None, ExpertPlan]],
    ffns: Sequence[FFNWeights],
    dense: Sequence[Mapping[Matrix, DenseMatrix]],
    draws: Draws,
) -> tuple[dict[Matrix, Tensor], dict[Matrix, Tensor]]:
    """Builds the stacked matrices and biases of numbered experts; None numbers the shared one."""
    first, plans = ffns[0], [plan for _, plan in experts]
    stacks: dict[Matrix, Tensor] = {}
    biases: dict[Matrix, Tensor] = {}
    for matrix in ffn_shape(first).matrices:
        shape = expert_shape(plans[0], matrix, first.model_width)
        stacks[matrix] = first.up_FD.new_empty((len(plans), *shape))
        for target, (number, plan) in zip(stacks[matrix], experts, strict=True):
            _fill(target, plan, matrix, dense[plan.source][matrix], draws.of_matrix(number, matrix))
        if _bias(first, matrix) is not None:
            biases[matrix] = torch.stack([_expert_bias(plan, matrix, ffns[plan.source]) for plan in plans])
    return stacks, biases


def router_start(start: RouterStart, dense: Mapping[Matrix, DenseMatrix]) -> RouterStart:
    """Replaces the dense rows that a router's start names by tensors, in at least fp32.

    Args:
        start: Start in the plan.
        dense: Matrices of dense network 0; only those that the start names are read.
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
