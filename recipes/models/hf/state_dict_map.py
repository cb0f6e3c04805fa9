"""The pieces of a mixture inside the tensors of a host in memory.

Letters: D model width, E experts, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from recipes.models.export.placement import ExpertTensorKey
from recipes.models.export.spec import ModelSpec, MoESpec


@dataclass(frozen=True)
class StateDictPiece:
    """Which part of a host's tensor a piece is.

    Attributes:
        piece: The piece.
        expert: Index along the first axis; None for a tensor of the shared expert.
        rows: Of what is left.
    """

    piece: ExpertTensorKey
    expert: int | None
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        """The piece as a view of the tensor."""
        return tensor[self.rows] if self.expert is None else tensor[self.expert][self.rows]


@dataclass(frozen=True)
class StateDictRouter:
    """A tensor of a router: the block's index and the key in the router's state."""

    layer: int
    key: str


class StateDictMap:
    """What each tensor of a host holds, told by its name."""

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

    def router(self, name: str) -> StateDictRouter | None:
        """The router's tensor of that name, if it is one."""
        return self._routers.get(name)

    def pieces(self, name: str) -> list[StateDictPiece] | None:
        """The pieces in the tensor of that name; None when it belongs to no mixture."""
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
