"""Interface of the kinds of experts in Megatron's layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moe.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor

    from moe.layer import MoELayer


@dataclass(frozen=True, eq=False)
class ExpertTensor:
    """Parameter of one or more of the experts that a rank holds.

    Attributes:
        tensor: The parameter.
        name: Name of the stack that it is a part of, as in `moe.experts.experts.Experts`.
        first: Index of its first expert, among those of this rank.
        stacked: Whether its first axis counts experts; otherwise it is a matrix of a single expert.
    """

    tensor: Tensor
    name: str
    first: int = 0
    stacked: bool = False


class ExpertKind(ABC):
    """Kind of experts in Megatron's layers.

    A subclass is found by being in a module of this package. It imports megatron-core and optional packages
    only in `slot` and `mistakes`.

    Attributes:
        name: Value of ``engine.experts`` that picks it.
        summary: The implementation, in a few words.
        keeps_ours: Whether Graft's own experts compute; otherwise Megatron builds others, with their weights.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    keeps_ours: ClassVar[bool] = False

    @classmethod
    def mistakes(cls, device: str) -> list[Mistake]:
        """Returns the reasons why it cannot be used on a ``cpu`` or ``cuda`` device of this machine."""
        return []

    def fields(self) -> dict[str, Any]:
        """Returns fields of Megatron's ``TransformerConfig`` that it needs."""
        return {}

    @abstractmethod
    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """Returns what goes into ``MoESubmodules.experts``.

        Args:
            layer: Graft's MoE layer.
            version: Version of megatron-core, e.g. ``(0, 16, 1)``.
        """

    @abstractmethod
    def tensors(self, module: Any) -> list[ExpertTensor]:
        """Returns the parameters of the module that Megatron has built from the slot."""
