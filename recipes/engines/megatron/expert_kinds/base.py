"""What stands in the expert slot of Megatron's layers, and which of the host's tensors its parameters are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moe.errors import Mistake
from moe.layer import MoELayer


@dataclass(frozen=True, eq=False)
class ExpertTensor:
    """A parameter of some of the experts that a rank holds.

    Attributes:
        tensor: The parameter.
        name: Of the host's stack that it is a part of, as in `moe.experts.experts.Experts`.
        first: The first of its experts, among those of this rank.
        stacked: Whether its first axis counts experts; else it is a matrix of one.
    """

    tensor: Tensor
    name: str
    first: int = 0
    stacked: bool = False


class ExpertKind(ABC):
    """One kind of experts.

    A subclass sets `name` and `told` and is found by being in a module of
    `recipes.engines.megatron.expert_kinds`, none of which imports megatron-core or what it needs beside it
    before `slot` is called.

    Attributes:
        name: The value of ``engine.experts`` that picks it.
        told: What computes, in some words.
        keeps_ours: Whether the host's own experts compute; else Megatron builds others, which get their
            weights.
    """

    name: ClassVar[str]
    told: ClassVar[str]
    keeps_ours: ClassVar[bool] = False

    @classmethod
    def mistakes(cls, device: str) -> list[Mistake]:
        """Why it cannot be used on this machine.

        Args:
            device: ``cpu`` or ``cuda``.
        """
        return []

    def fields(self) -> dict[str, Any]:
        """Of Megatron's ``TransformerConfig``, where it needs others."""
        return {}

    @abstractmethod
    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """What to put into ``MoESubmodules.experts``.

        Args:
            layer: Of the host.
            version: Of megatron-core, as in ``(0, 16, 1)``.
        """

    @abstractmethod
    def tensors(self, module: Any) -> list[ExpertTensor]:
        """The parameters of what Megatron has built of the slot."""
