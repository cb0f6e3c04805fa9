"""Map from the tensors of a model in memory to the expert matrices and router tensors inside them.

Letters: D model width, E experts, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from recipes.models.export.placement import ExpertTensorKey
from recipes.models.lora_model import is_factor
from recipes.runtime.safetensors_codec import TensorSpec

if TYPE_CHECKING:
    from recipes.models.export.spec import ModelSpec, MoESpec
    from recipes.models.hf.hf_model import HFModel


@dataclass(frozen=True)
class StateDictPiece:
    """An expert's matrix or bias inside a tensor of the model.

    Attributes:
        piece: The matrix or bias.
        expert: Index along the first axis; None for a tensor of the shared expert.
        rows: Rows along the next axis.
    """

    piece: ExpertTensorKey
    expert: int | None
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the matrix or bias as a view of the tensor."""
        return tensor[self.rows] if self.expert is None else tensor[self.expert][self.rows]


@dataclass(frozen=True)
class StateDictRouter:
    """A router's tensor: the block's index and the key in the router's state."""

    layer: int
    key: str


class StateDictMap:
    """Content of each tensor of a model, found by its name."""

    def __init__(self, spec: ModelSpec) -> None:
        self._pieces: dict[str, list[StateDictPiece]] = {}
        self._routers: dict[str, StateDictRouter] = {}
        for moe in spec.moe_blocks:
            self._add(moe)

    def _add(self, moe: MoESpec) -> None:
        for key in moe.router.state_dict():
            self._routers[f"{moe.site}.router.{key}"] = StateDictRouter(moe.index, key)
        experts: list[int | None] = list(range(moe.num_experts))
        for expert in [*experts, None] if moe.shared_width else experts:
            for name, piece in _live(moe, expert):
                self._pieces.setdefault(name, []).append(piece)

    def names(self) -> list[str]:
        """Returns the names of all tensors of MoE layers."""
        return [*self._routers, *self._pieces]

    def router(self, name: str) -> StateDictRouter | None:
        """Returns the router's tensor of that name, or None if it is none."""
        return self._routers.get(name)

    def pieces(self, name: str) -> list[StateDictPiece] | None:
        """Returns the matrices and biases in the tensor of that name; None if it belongs to no expert."""
        return self._pieces.get(name)


def _live(moe: MoESpec, expert: int | None) -> Iterator[tuple[str, StateDictPiece]]:
    shape, layer = moe.expert, moe.index
    width = moe.shared_width if expert is None else shape.width
    module, end = ("shared", "") if expert is None else ("experts", "E")
    up, down = f"{moe.site}.{module}.w_up_{end}UD", f"{moe.site}.{module}.w_down_{end}DF"
    b_up, b_down = f"{moe.site}.{module}.b_up_{end}U", f"{moe.site}.{module}.b_down_{end}D"
    first = slice(0, width)
    second = slice(width, 2 * width) if shape.gated else first
    if shape.gated:
        yield up, StateDictPiece(ExpertTensorKey(layer, expert, "gate"), expert, first)
    yield up, StateDictPiece(ExpertTensorKey(layer, expert, "up"), expert, second)
    yield down, StateDictPiece(ExpertTensorKey(layer, expert, "down"), expert, slice(None))
    if shape.up_bias:
        if shape.gated:
            yield b_up, StateDictPiece(ExpertTensorKey(layer, expert, "gate", True), expert, first)
        yield b_up, StateDictPiece(ExpertTensorKey(layer, expert, "up", True), expert, second)
    if shape.down_bias:
        yield b_down, StateDictPiece(ExpertTensorKey(layer, expert, "down", True), expert, slice(None))


def tied_names(model: HFModel) -> set[str]:
    """Returns the second names of tied parameters, which are not written to files."""
    every = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.module.named_parameters()}


def kept_specs(model: HFModel, live: StateDictMap) -> list[TensorSpec]:
    """Lists the tensors that belong to no MoE layer, tied ones once, without low-rank factors."""
    tied = tied_names(model)
    return [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.module.state_dict().items()
        if not (name in tied or is_factor(name) or live.pieces(name) or live.router(name))
    ]
