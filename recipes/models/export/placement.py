"""Placement of an MoE model's weights in a format's files: tensor names, shapes, dtypes and offsets.

Letters: D model width, E experts, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe.upcycle.dense_shape import Matrix
from moe.upcycle.expert_rows import expert_shape
from moe.upcycle.layer_plan import ExpertPlan
from recipes.runtime.safetensors_codec import TensorSpec

if TYPE_CHECKING:
    from recipes.models.export.base import Exporter, Layout
    from recipes.models.export.spec import ModelSpec, MoESpec


@dataclass(frozen=True)
class ExpertTensorKey:
    """Key of one matrix or bias of one expert.

    Attributes:
        layer: Index of the block.
        expert: Index of the routed expert; None for the shared one.
        matrix: Name of the matrix.
        bias: True for its bias instead of the matrix itself.
    """

    layer: int
    expert: int | None
    matrix: Matrix
    bias: bool = False


@dataclass(frozen=True)
class Slot:
    """Place of an expert's matrix or bias in the files.

    Attributes:
        name: The tensor that holds it.
        offset: Number of elements of that tensor before it.
        shape: Shape of the matrix or bias.
        factor: Factor that it is multiplied by when written.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    factor: float


class Placement:
    """Tensors of a checkpoint in a format, and the place of each weight in them.

    Attributes:
        specs: All tensors of the checkpoint.
        constants: Tensors that the format requires and the model lacks, by name.
    """

    def __init__(
        self,
        spec: ModelSpec,
        exporter: Exporter,
        kept: Sequence[TensorSpec],
        dtype: torch.dtype | None,
        layout: Layout | None = None,
    ) -> None:
        """Lays a model out.

        Args:
            spec: The model.
            exporter: The format.
            kept: Its tensors outside the MoE layers, under their names in the model.
            dtype: Dtype of floating-point tensors; None leaves each as it is, and gives experts that of most.
            layout: One of the exporter's layouts; None for the first.
        """
        layout = layout or exporter.layouts[0]
        assert layout in exporter.layouts, (layout, exporter.name, exporter.layouts)
        self._exporter = exporter
        self._dtype = dtype
        self.layout = layout
        self._slots: dict[ExpertTensorKey, Slot] = {}
        self._routers: dict[tuple[int, str], str] = {}
        self._kept: dict[str, str] = {}
        self.specs: list[TensorSpec] = []
        self.constants: dict[str, Tensor] = {}
        floating = [s.dtype for s in kept if s.dtype.is_floating_point]
        self._expert_dtype = dtype or max(set(floating), key=floating.count, default=torch.float32)
        self._seconds: dict[str, tuple[str, ...]] = {}
        for tensor in kept:
            name = self._kept[tensor.name] = exporter.kept_name(tensor.name)
            self._seconds[tensor.name] = exporter.second_names(name)
            for each in (name, *self._seconds[tensor.name]):
                self._add(each, tensor.dtype, tensor.shape)
        for moe in spec.moe_blocks:
            self._place_moe(moe)
        for name, constant in exporter.constants(spec):
            self.constants[name] = constant
            self._add(name, self._expert_dtype, tuple(constant.shape))

    def _add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.specs.append(self._exporter.written(TensorSpec(name, dtype, shape), self._dtype))

    def _place_moe(self, moe: MoESpec) -> None:
        for key, tensor in moe.router.state_dict().items():
            name = self._exporter.router_name(moe, key)
            if name is None:
                continue
            self._routers[moe.index, key] = name
            keeps = self._exporter.keeps_dtype(name) or not tensor.dtype.is_floating_point
            self._add(name, tensor.dtype if keeps else self._expert_dtype, tuple(tensor.shape))
        if self.layout == "fused":
            self._place_fused(moe)
        else:
            for piece, shape in pieces(moe):
                if piece.expert is not None:
                    self._place_alone(moe, piece, shape)
        for piece, shape in pieces(moe):
            if piece.expert is None:
                self._place_alone(moe, piece, shape)

    def _place_alone(self, moe: MoESpec, piece: ExpertTensorKey, shape: tuple[int, ...]) -> None:
        if piece.expert is None:
            name = self._exporter.shared_name(moe, piece.matrix, piece.bias)
        else:
            name = self._exporter.expert_name(moe, piece.expert, piece.matrix, piece.bias)
        self._slots[piece] = Slot(name, 0, shape, self._exporter.factor(moe, piece.expert, piece.matrix))
        self._add(name, self._expert_dtype, shape)

    def _place_fused(self, moe: MoESpec) -> None:
        """Stacks gate rows above up rows, expert by expert, so that each matrix is a run of the stack."""
        E, D, F = moe.num_experts, moe.expert.model_width, moe.expert.width
        U = 2 * F if moe.expert.gated else F
        up, down = (self._exporter.fused_name(moe, matrix) for matrix in ("up", "down"))
        self._add(up, self._expert_dtype, (E, U, D))
        self._add(down, self._expert_dtype, (E, D, F))
        for piece, shape in pieces(moe):
            if piece.expert is None:
                continue
            assert not piece.bias, f"{self._exporter.name} has no fused biases"
            name, offset = (
                (down, piece.expert * D * F) if piece.matrix == "down" else (up, piece.expert * U * D)
            )
            if piece.matrix == "up" and moe.expert.gated:
                offset += F * D
            self._slots[piece] = Slot(
                name, offset, shape, self._exporter.factor(moe, piece.expert, piece.matrix)
            )

    def kept(self, name: str) -> str:
        """Returns the name in the files of a tensor outside the MoE layers."""
        return self._kept[name]

    def seconds(self, name: str) -> tuple[str, ...]:
        """Returns the further names in the files of a tensor that the model ties to others."""
        return self._seconds[name]

    def router(self, layer: int, key: str) -> str | None:
        """Returns the name in the files of a router's tensor; None for one that is not written."""
        return self._routers.get((layer, key))

    def slot(self, piece: ExpertTensorKey) -> Slot:
        """Returns the place of a matrix or bias."""
        return self._slots[piece]

    @property
    def slots(self) -> Mapping[ExpertTensorKey, Slot]:
        """Places of all matrices and biases of all experts."""
        return self._slots


def pieces(moe: MoESpec) -> Iterator[tuple[ExpertTensorKey, tuple[int, ...]]]:
    """Yields all matrices and biases of a layer's experts with their shapes, the shared expert's last."""
    shape, D = moe.expert, moe.expert.model_width
    widths: list[tuple[int | None, int]] = [(e, shape.width) for e in range(moe.num_experts)]
    if moe.shared_width:
        widths.append((None, moe.shared_width))
    for expert, width in widths:
        plan = ExpertPlan(width, slice(0, width))
        for matrix in shape.matrices:
            yield ExpertTensorKey(moe.index, expert, matrix), expert_shape(plan, matrix, D)
            if shape.down_bias if matrix == "down" else shape.up_bias:
                bias = (D,) if matrix == "down" else (width,)
                yield ExpertTensorKey(moe.index, expert, matrix, bias=True), bias
